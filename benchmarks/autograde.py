"""Time `nbgrader autograde`, stock and in the sandbox, in one run on one course; the runs alternate.

    python benchmarks/autograde.py [--students 6] [--rounds 3]

Prints medians and ranges. Stock runs the same honest notebooks without any isolation: do not give it others.
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook

NOTEBOOKS = {
    "trivial": ["total = sum(range(10))", "assert total == 45"],
    "numeric": [
        "import numpy as np\nimport pandas as pd\nimport matplotlib.pyplot as plt",
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


def nbgrader(course: Path, mode: str, *words: str) -> None:
    environment = {**os.environ, "BENCH_MODE": mode, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "nbgrader", *words]
    done = subprocess.run(command, cwd=course, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{done.stderr[-2000:]}")


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


def seconds(course: Path, mode: str, name: str) -> float:
    started = time.perf_counter()
    nbgrader(course, mode, "autograde", name, "--force")
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"{options.students} students, {options.rounds} rounds, seconds for the whole command: median (min-max)")
    with tempfile.TemporaryDirectory(prefix="nbgrader-aalto bench-") as directory:
        course = Path(directory) / "course"
        prepare(course, options.students)
        for name in NOTEBOOKS:
            seconds(course, "isolated", name)  # fonts and byte code: paid once
            times: dict[str, list[float]] = {"stock": [], "isolated": []}
            for _ in range(options.rounds):
                for mode, found in times.items():
                    found.append(seconds(course, mode, name))
            for mode, found in times.items():
                spread = f"{statistics.median(found):6.2f} ({min(found):.2f}-{max(found):.2f})"
                each = statistics.median(found) / options.students
                print(f"{name:8} {mode:9} {spread}, {each:.2f} a student")


if __name__ == "__main__":
    main()
