"""Time clicks on Formgrader's lightning bolt, stock and in the sandbox: two servers on one course, which take turns.

    python benchmarks/bolt.py [--clicks 10]

A click is the request that the bolt sends; the time is until its answer, when the student's new score is in the
gradebook. The first click of ours starts its kernel cold and is a row of its own; so are those after it. Stock runs
the same honest notebooks without any isolation: do not give it others. Prints Markdown.
"""

import argparse
import contextlib
import http.client
import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from autograde import NOTEBOOKS, prepare
from sandbox import machine

_LONG = 120.0
_SERVER = "c.ServerApp.jpserver_extensions = {'nbgrader.server_extensions.formgrader': True}\n"
_STUDENTS = 3


class Server:
    """A Jupyter server with Formgrader on the course, as an instructor has one."""

    def __init__(self, course: Path, home: Path, mode: str) -> None:
        self._token = secrets.token_hex(16)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        (home / ".jupyter").mkdir(parents=True)
        (home / ".jupyter/jupyter_server_config.py").write_text(_SERVER, encoding="utf-8")
        words = [f"--ServerApp.port={self._port}", "--ServerApp.open_browser=False", "--allow-root"]
        environment = {**os.environ, "BENCH_MODE": mode, "HOME": str(home), "JUPYTER_TOKEN": self._token}
        self._log = (home / "log").open("w+b")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jupyter_server", *words],
            cwd=course,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )

    def _request(self, method: str, path: str) -> tuple[int, bytes]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=_LONG)) as connection:
            connection.request(method, path, headers={"Authorization": f"token {self._token}"})
            response = connection.getresponse()
            return response.status, response.read()

    def wait(self) -> None:
        deadline = time.monotonic() + _LONG
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if self._request("GET", "/formgrader/api/assignments")[0] == 200:
                    return
            time.sleep(0.1)
        self._log.seek(0)
        sys.exit(f"the server does not answer:\n{self._log.read().decode()[-3000:]}")

    def click(self, assignment: str, student: str) -> tuple[float, str]:
        """Seconds until the answer, and what was logged meanwhile."""
        started = time.perf_counter()
        status, body = self._request("POST", f"/formgrader/api/submission/{assignment}/{student}/autograde")
        seconds = time.perf_counter() - started
        answer = json.loads(body) if status == 200 else {}
        if not answer.get("success"):
            sys.exit(f"a click failed ({status}): {body.decode()[-2000:]}")
        return seconds, answer["log"]

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._log.close()


@contextlib.contextmanager
def serving(course: Path, home: Path, mode: str) -> Iterator[Server]:
    server = Server(course, home, mode)
    try:
        server.wait()
        yield server
    finally:
        server.close()


def measure(stock: Server, ours: Server, name: str, clicks: int) -> dict[str, list[float]]:
    """Seconds of each click, by row; the first one of a server, which imports, is not counted."""
    rows: dict[str, list[float]] = {"stock nbgrader": [], "isolated, the first click": [], "isolated, later clicks": []}
    stock.click(name, "s000")
    seconds, log = ours.click(name, "s000")
    assert "(cold" in log, log
    rows["isolated, the first click"].append(seconds)
    deadline = time.monotonic() + _LONG
    while "(warm)" not in ours.click(name, "s000")[1]:
        assert time.monotonic() < deadline, log
    for number in range(clicks):
        student = f"s{number % _STUDENTS:03}"
        rows["stock nbgrader"].append(stock.click(name, student)[0])
        seconds, log = ours.click(name, student)
        assert "(warm)" in log, log
        rows["isolated, later clicks"].append(seconds)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clicks", type=int, default=10)
    options = parser.parse_args()
    print(machine(), flush=True)
    print("\n| notebook | what | median | minimum | maximum | clicks |")
    print("| --- | --- | ---: | ---: | ---: | ---: |", flush=True)
    with tempfile.TemporaryDirectory(prefix="nbgrader-aalto bench-") as directory:
        course = Path(directory) / "course"
        prepare(course, _STUDENTS)
        with (
            serving(course, Path(directory) / "stock", "stock") as stock,
            serving(course, Path(directory) / "ours", "isolated") as ours,
        ):
            for name in NOTEBOOKS:
                for what, found in measure(stock, ours, name, options.clicks).items():
                    times = f"{statistics.median(found):.2f} s | {min(found):.2f} | {max(found):.2f}"
                    print(f"| {name} | {what} | {times} | {len(found)} |", flush=True)


if __name__ == "__main__":
    main()
