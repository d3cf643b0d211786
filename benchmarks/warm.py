"""Warm kernels beside a stock kernel without isolation, in one run: time to the first cell, memory of one more kernel.

    python benchmarks/warm.py [--rounds 15]

Rows take turns. Prints Markdown. Memory is the sum of proportional set sizes (PSS) of all processes below this one, the
drivers (the clients of our kernels) included; the client of the stock kernels is this process, which is not counted.
"""

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
from sandbox import IPYKERNEL, Kernels, Measured, Sample, machine, memory_of_children, table, take_turns

from isolate.environment import environment_policy, home_files
from isolate.notebook import Kernel, execute
from isolate.warm import Nursery

NUMERIC = "import numpy, pandas, matplotlib.pyplot"
CODES = {"`1 + 1`": "1 + 1", f"`{NUMERIC}`": NUMERIC}
_AT_ONCE = 4
_PYTHON = Path(sys.executable)
_KERNEL = Kernel(IPYKERNEL, home_files=home_files(_PYTHON))


def _run(code: str, nursery: Nursery | None, told: "dict[str, float]", wait: "threading.Event | None" = None) -> None:
    """`told` gets the seconds until the first cell has started, has finished, and until all has ended."""
    began = time.perf_counter()

    def progress(_: int, state: str) -> None:
        told.setdefault(state, time.perf_counter() - began)
        if state == "finished" and wait is not None:
            wait.wait()

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    done = execute(notebook, _KERNEL, environment_policy([_PYTHON]), warm=nursery, progress=progress)
    assert done.report.ended == "finished", done.report
    assert done.report.start == ("cold" if nursery is None else "warm"), done.report.start
    told["whole"] = time.perf_counter() - began


def ours(code: str, nursery: Nursery | None) -> Sample:
    told: dict[str, float] = {}
    _run(code, nursery, told)
    return told


def stock(kernels: Kernels, code: str) -> Sample:
    """A kernel of its own by jupyter_client, over unix sockets: ready, the cell's end, all ended."""
    told: dict[str, float] = {}
    began = time.perf_counter()
    with _stock_kernel(kernels, code, told, began):
        pass
    told["whole"] = time.perf_counter() - began
    return told


@contextmanager
def _stock_kernel(kernels: Kernels, code: str, told: "dict[str, float]", began: float) -> Iterator[None]:
    manager = kernels.manager("plain")
    manager.start_kernel(stdout=-3, stderr=-3)
    try:
        client = manager.blocking_client()
        client.start_channels()
        client.wait_for_ready(timeout=60)
        told["started"] = time.perf_counter() - began
        reply = client.execute_interactive(code, timeout=60, store_history=False, output_hook=lambda _: None)
        assert reply["content"]["status"] == "ok", reply
        told["finished"] = time.perf_counter() - began
        yield
        client.stop_channels()
    finally:
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()


def memory_of_ours(nursery: Nursery) -> Sample:
    """What each of several kernels at once adds to what one needs."""
    go = threading.Event()
    counted = []
    threads = []
    for _ in range(_AT_ONCE):
        told: dict[str, float] = {}
        threads.append(threading.Thread(target=_run, args=(NUMERIC, nursery, told, go)))
        threads[-1].start()
        while "finished" not in told and threads[-1].is_alive():
            time.sleep(0.02)
        counted.append(memory_of_children())
    go.set()
    for thread in threads:
        thread.join()
    return {"memory": (counted[-1] - counted[0]) / (_AT_ONCE - 1)}


def memory_of_stock(kernels: Kernels) -> Sample:
    counted = []

    def one_more(number: int) -> None:
        with _stock_kernel(kernels, NUMERIC, {}, time.perf_counter()):
            counted.append(memory_of_children())
            if number:
                one_more(number - 1)

    one_more(_AT_ONCE - 1)
    return {"memory": (counted[-1] - counted[0]) / (_AT_ONCE - 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="(%(default)s)")
    options = parser.parse_args()
    print(machine(), flush=True)
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as directory,
        Nursery() as plain,
        Nursery(NUMERIC[7:].split(", ")) as full,
    ):
        os.environ["JUPYTER_RUNTIME_DIR"] = os.environ["IPYTHONDIR"] = directory
        kernels = Kernels(Path(directory))
        kernels.write()
        for name, code in CODES.items():
            nursery = full if code == NUMERIC else plain
            rows = [
                Measured("stock kernel, no sandbox", lambda code=code: stock(kernels, code)),  # type: ignore[misc]
                Measured("cold, isolated", lambda code=code: ours(code, None)),  # type: ignore[misc]
                Measured("warm, isolated", lambda code=code, nursery=nursery: ours(code, nursery)),  # type: ignore[misc]
            ]
            take_turns(rows, options.rounds)
            titles = {"started": ": ready for the first cell", "finished": ": its end", "whole": ": all ended"}
            table(f"{name}, from nothing:", rows, titles)
        memory = [
            Measured("stock kernel, no sandbox", lambda: memory_of_stock(kernels)),
            Measured("warm, isolated, with its driver", lambda: memory_of_ours(full)),
        ]
        take_turns(memory, 3)
        table(f"Memory of one more kernel of {_AT_ONCE} at once, `{NUMERIC}`:", memory, {"memory": ""})


if __name__ == "__main__":
    main()
