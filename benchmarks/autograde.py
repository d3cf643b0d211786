"""Time `nbgrader autograde`, stock and in the sandbox, in one run on one course; the runs alternate.

    python benchmarks/autograde.py [--students 60] [--rounds 3] [--only trivial|numeric]

Stock runs the same honest notebooks without any isolation: do not give it others. `limit` is what the cells alone
cost, if nothing else took time: their own processor time (of a warm kernel, less that of a kernel with one empty cell)
of all students, divided by the cores. `isolate alone` executes the same notebooks in warm kernels, as many at once as
there are cores, without nbgrader. Prints Markdown: medians and ranges of the whole command, in seconds, and the most
memory that the command's own process had.
"""

import argparse
import concurrent.futures
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook
from sandbox import IPYKERNEL, machine

from isolate.environment import environment_policy, home_files
from isolate.notebook import Kernel, execute
from isolate.warm import Nursery

CORES = len(os.sched_getaffinity(0))
NOTEBOOKS = {
    "trivial": ["total = sum(range(10))", "assert total == 45"],
    "numeric": [
        "import numpy as np\nimport pandas as pd\nimport matplotlib.pyplot as plt",
        "from time import process_time\nend = process_time() + 0.2\nwhile end > process_time():\n    np.ones(9).sum()",
        "frame = pd.DataFrame({'x': np.arange(1000)})\nframe.plot()\nplt.show()",
        "assert frame.x.sum() == 499500",
    ],
}
CONFIG = """
c = get_config()
c.CourseDirectory.course_id = "bench"
import os
if os.environ["BENCH_MODE"] == "isolated":
    import nbgrader_aalto
    nbgrader_aalto.configure(c)
"""


def notebook(sources: list[str]) -> nbformat.NotebookNode:
    """A notebook whose last cell is an autograder test."""
    cells = [new_code_cell(source) for source in sources]
    cells[-1].metadata["nbgrader"] = {
        "grade": True,
        "solution": False,
        "locked": True,
        "grade_id": "test",
        "points": 1,
        "schema_version": 3,
        "task": False,
        "cell_type": "code",
    }
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return new_notebook(cells=cells, metadata=metadata)


def nbgrader(course: Path, mode: str, *words: str) -> int:
    """The most memory of its process, in KiB. getrusage(2)"""
    environment = {**os.environ, "BENCH_MODE": mode, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "nbgrader", *words]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, cwd=course, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if status:
            log.seek(0)
            sys.exit(f"{' '.join(words)} failed:\n{log.read().decode()[-2000:]}")
    return usage.ru_maxrss


def prepare(course: Path, students: int) -> None:
    course.mkdir()
    (course / "nbgrader_config.py").write_text(CONFIG, encoding="utf-8")
    for name, sources in NOTEBOOKS.items():
        source = course / "source" / name
        source.mkdir(parents=True)
        nbformat.write(notebook(sources), source / f"{name}.ipynb")
        nbgrader(course, "stock", "generate_assignment", name)
        for number in range(students):
            shutil.copytree(course / "release" / name, course / "submitted" / f"s{number:03}" / name)


def seconds(course: Path, mode: str, name: str) -> tuple[float, int]:
    """And the most memory of the command's own process, in KiB."""
    started = time.perf_counter()
    memory = nbgrader(course, mode, "autograde", name, "--force")
    return time.perf_counter() - started, memory


class Alone:
    """The same notebooks by `isolate.notebook.execute`, without nbgrader."""

    def __init__(self, nursery: Nursery) -> None:
        python = Path(sys.executable)
        self._kernel, self._nursery = Kernel(IPYKERNEL, home_files=home_files(python)), nursery
        self._policy = environment_policy([python])

    def processor_seconds(self, sources: list[str]) -> float:
        """Of one notebook in a kernel."""
        done = execute(notebook(sources), self._kernel, self._policy, warm=self._nursery)
        assert (done.report.ended, done.report.start) == ("finished", "warm"), done.report
        return done.report.cpu_seconds

    def own_seconds(self, sources: list[str]) -> float:
        """What the cells themselves need."""
        found = [self.processor_seconds(sources) - self.processor_seconds([""]) for _ in range(5)]
        return statistics.median(found)

    def seconds(self, sources: list[str], students: int) -> float:
        started = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(CORES) as pool:
            list(pool.map(lambda _: self.processor_seconds(sources), range(students)))
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=list(NOTEBOOKS))
    options = parser.parse_args()
    print(machine(), flush=True)
    print(f"\n{options.students} students, {options.rounds} rounds, each of which has every row once\n")
    print("| notebook | what | median | minimum | maximum | a student | stock takes | of the limit | memory |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    with tempfile.TemporaryDirectory(prefix="nbgrader-aalto bench-") as directory:
        course = Path(directory) / "course"
        prepare(course, options.students)
        for name in [options.only] if options.only else NOTEBOOKS:
            measure(course, name, options.students, options.rounds)


def measure(course: Path, name: str, students: int, rounds: int) -> None:
    sources = NOTEBOOKS[name]
    with Nursery(["numpy", "pandas", "matplotlib.pyplot"] if name == "numeric" else []) as nursery:
        alone = Alone(nursery)
        limit = alone.own_seconds(sources) * students / CORES
        seconds(course, "isolated", name)  # fonts and byte code: paid once
        times: dict[str, list[float]] = {"stock nbgrader": [], "isolated": [], "`isolate` alone": []}
        memory = {"stock nbgrader": 0, "isolated": 0}
        for _ in range(rounds):
            for what, mode in (("stock nbgrader", "stock"), ("isolated", "isolated")):
                took, most = seconds(course, mode, name)
                times[what].append(took)
                memory[what] = max(memory[what], most)
            times["`isolate` alone"].append(alone.seconds(sources, students))
    stock = statistics.median(times["stock nbgrader"])
    print(f"| {name} | limit | {limit:.1f} | | | {limit / students:.3f} | | 1 | |")
    for what, found in times.items():
        middle = statistics.median(found)
        most = f"{memory[what] >> 10} MiB" if what in memory else ""
        ratio = f"{middle / limit:.1f}" if limit > 0.05 else "-"
        print(
            f"| {name} | {what} | {middle:.1f} | {min(found):.1f} | {max(found):.1f} | {middle / students:.3f} "
            f"| {stock / middle:.1f} times as long | {ratio} | {most} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
