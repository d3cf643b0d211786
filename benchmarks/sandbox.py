"""Time and memory of a sandbox, beside bubblewrap and beside none, in one run; the rows take turns.

    python benchmarks/sandbox.py [--rounds 15] [--kernel-rounds 10]

Prints Markdown: the machine, then median, minimum and maximum of each row, and how many runs these are of. What is
not installed says so. `docs/benchmarks.md` says what the rows mean.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import nbformat
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

from isolate.environment import environment_policy
from isolate.notebook import Kernel, execute
from isolate.policy import MIB, Policy, system_policy
from isolate.sandbox import Command, Sandbox

BWRAP = shutil.which("bwrap")
PACKAGES = ("ipykernel", "jupyter_client", "nbclient", "pyzmq")
CODE = "1 + 1"
SEPARATE = "--unshare-all --die-with-parent --new-session --ro-bind / / --dev /dev --proc /proc --tmpfs /tmp".split()
"""What the bwrap command itself is asked for: all namespaces, the host's files read-only, a private /tmp."""

Sample = dict[str, float]
Row = Callable[[], Sample]
"""One run; what it measured, by name. Seconds, or bytes where the name says memory."""


# From the fork to the exit of `true`.


def _call(*argv: str) -> Sample:
    started = time.perf_counter()
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    return {"seconds": time.perf_counter() - started}


def no_sandbox() -> Sample:
    return _call("true")


def bubblewrap() -> Sample:
    assert BWRAP
    return _call(BWRAP, *SEPARATE, "true")


def command_line() -> Sample:
    return _call(sys.executable, "-m", "isolate.cli", "run", "--", "true")


def library() -> Sample:
    """`Sandbox` in a process that has imported it; the second number is the launcher's own count."""
    started = time.perf_counter()
    with Sandbox(system_policy(), Command(["true"])) as sandbox:
        report = sandbox.wait()
    assert report.exit_code == 0, report
    return {"seconds": time.perf_counter() - started, "room": report.wall_seconds}


# From nothing to the result of the first cell, and the memory of all processes at that moment.


def _below(root: int) -> Iterator[int]:
    children: dict[int, list[int]] = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{name}/stat").read_text(errors="replace").rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(name))
    waiting = list(children.get(root, []))
    while waiting:
        pid = waiting.pop()
        yield pid
        waiting += children.get(pid, [])


def memory_of_children() -> int:
    """Of all processes below this one: what is shared by n of all processes counts as an n-th. proc_pid_smaps(5)"""
    kib = 0
    for pid in _below(os.getpid()):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    kib += int(line.split()[1])
    return kib * 1024


def _answer(client: BlockingKernelClient) -> None:
    said: list[str] = []

    def hear(message: dict[str, dict[str, dict[str, str]]]) -> None:
        said.append(message["content"].get("data", {}).get("text/plain", ""))

    client.execute_interactive(CODE, timeout=60, output_hook=hear, store_history=False)
    assert "2" in said, said


def _through_a_client(manager: KernelManager) -> Sample:
    """As a notebook server does it: start, wait until ready, execute."""
    started = time.perf_counter()
    manager.start_kernel(**_SILENT)
    try:
        client = manager.blocking_client()
        client.start_channels()
        client.wait_for_ready(timeout=60)
        _answer(client)
        seconds = time.perf_counter() - started
        memory = memory_of_children()
        client.stop_channels()
    finally:
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()
    return {"seconds": seconds, "memory": memory}


def _spec(directory: Path, argv: Sequence[str], **metadata: object) -> None:
    directory.mkdir(parents=True)
    spec = {"argv": list(argv), "display_name": directory.name, "language": "python", "metadata": metadata}
    (directory / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")


_SILENT = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
IPYKERNEL = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Kernelspecs of this benchmark only, in a directory of its own. Sockets lie there: no network is needed."""

    directory: Path

    def write(self) -> None:
        kernels = self.directory / "kernels"
        _spec(kernels / "plain", IPYKERNEL)
        runtime = str(self.directory)
        # The connection file and the sockets must be the host's; the network namespace is the sandbox's own. In a
        # new PID namespace ipykernel takes its parent for dead, unless it is not told to watch it.
        words = ["--bind", runtime, runtime, "--unsetenv", "JPY_PARENT_PID"]
        _spec(kernels / "bwrap", [str(BWRAP), *SEPARATE, *words, *IPYKERNEL])
        provisioner = {"provisioner_name": "isolate", "config": {"policy": {}}}
        _spec(kernels / "isolate", IPYKERNEL, kernel_provisioner=provisioner)

    def manager(self, name: str) -> KernelManager:
        specs = KernelSpecManager(kernel_dirs=[str(self.directory / "kernels")], ensure_native_kernel=False)
        manager = KernelManager(kernel_name=name, kernel_spec_manager=specs, transport="ipc")
        number = len(list(self.directory.iterdir()))
        manager.connection_file = str(self.directory / f"{name}-{number}.json")
        return manager

    def row(self, name: str) -> Row:
        return lambda: _through_a_client(self.manager(name))


def _notebook() -> NotebookNode:
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CODE)])


def nbclient_execute() -> Sample:
    """The whole of nbclient's execution of a notebook of one cell, its end as well."""
    notebook = _notebook()
    started = time.perf_counter()
    NotebookClient(notebook, kernel_name="python3").execute(**_SILENT)
    seconds = time.perf_counter() - started
    assert notebook.cells[0].outputs[0].data["text/plain"] == "2"
    return {"whole": seconds}


def two_rooms() -> Sample:
    """`isolate.notebook.execute`, the same notebook: the first cell, and the whole."""
    first: dict[str, float] = {}
    policy: Policy = environment_policy([Path(sys.executable)])

    def told(_: int, state: str) -> None:
        if state == "finished":
            finished = time.perf_counter()
            first.update(seconds=finished - started, memory=memory_of_children())
            first["counting"] = time.perf_counter() - finished

    started = time.perf_counter()
    done = execute(_notebook(), Kernel(IPYKERNEL), policy, progress=told)
    whole = time.perf_counter() - started
    assert done.notebook.cells[0].outputs[0].data["text/plain"] == "2", done.report
    return {**first, "whole": whole - first["counting"]}


# What is printed.


@dataclasses.dataclass
class Measured:
    """All samples of one row."""

    name: str
    run: Row | None
    missing: str = "not installed"
    samples: list[Sample] = dataclasses.field(default_factory=list)

    def lines(self, columns: dict[str, str]) -> Iterator[str]:
        if self.run is None:
            yield f"| {self.name} | {self.missing} | | | |"
            return
        for key, title in columns.items():
            found = [sample[key] for sample in self.samples if key in sample]
            if found:
                scale, unit, digits = (1 / MIB, "MiB", 1) if key == "memory" else (1000, "ms", 1)
                low, middle, high = (scale * pick(found) for pick in (min, statistics.median, max))
                name = f"{self.name}{title}"
                yield f"| {name} | {middle:.{digits}f} {unit} | {low:.{digits}f} | {high:.{digits}f} | {len(found)} |"


def take_turns(rows: Sequence[Measured], rounds: int) -> None:
    """Each row once a round, so that a slow minute of the machine is everybody's; the first round is not counted."""
    for number in range(rounds + 1):
        for row in rows:
            if row.run is not None:
                sample = row.run()
                if number:
                    row.samples.append(sample)


def machine() -> str:
    model = platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    if BWRAP:
        versions.append(subprocess.run([BWRAP, "--version"], capture_output=True, text=True, check=True).stdout.strip())
    who = "root" if os.geteuid() == 0 else "an ordinary user"
    load = os.getloadavg()[0]
    return (
        f"{model}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, Linux {platform.release()}, "
        f"{platform.freedesktop_os_release().get('PRETTY_NAME', '')}, Python {platform.python_version()}, "
        f"{', '.join(versions)}; as {who}, load {load:.2f} at the start"
    )


def table(title: str, rows: Sequence[Measured], columns: dict[str, str]) -> None:
    print(f"\n{title}\n\n| what | median | minimum | maximum | runs |\n| --- | ---: | ---: | ---: | ---: |")
    for row in rows:
        for line in row.lines(columns):
            print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="of `true` (%(default)s)")
    parser.add_argument("--kernel-rounds", type=int, default=10, help="of kernels (%(default)s)")
    options = parser.parse_args()
    print(machine(), flush=True)
    commands = [
        Measured("`true`, no sandbox", no_sandbox),
        Measured("`bwrap ... true`", bubblewrap if BWRAP else None),
        Measured("`Sandbox` of the library, `true`", library),
        Measured("`isolate run -- true`", command_line),
    ]
    take_turns(commands, options.rounds)
    table("From the start to the end of a command:", commands, {"seconds": "", "room": ": in the launcher's count"})
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        os.environ["JUPYTER_RUNTIME_DIR"] = os.environ["IPYTHONDIR"] = directory
        kernels = Kernels(Path(directory))
        kernels.write()
        provided = importlib.util.find_spec("isolate.provisioner") is not None
        registered = any(
            entry.name == "isolate"
            for entry in importlib.metadata.entry_points(group="jupyter_client.kernel_provisioners")
        )
        rows = [
            Measured("plain kernel", kernels.row("plain")),
            Measured("kernel under bwrap", kernels.row("bwrap") if BWRAP else None),
            Measured(
                "kernel through the provisioner",
                kernels.row("isolate") if provided and registered else None,
                "its entry point is not installed",
            ),
            Measured("`isolate.notebook.execute`", two_rooms),
            Measured("nbclient, no sandbox", nbclient_execute),
        ]
        take_turns(rows, options.kernel_rounds)
    columns = {"seconds": "", "memory": ": memory", "whole": ": the whole notebook"}
    table("From nothing to the result of the first cell; memory (PSS) of all processes then:", rows, columns)


if __name__ == "__main__":
    main()
