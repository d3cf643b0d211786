"""The students of the example course: what each hands in, and the score that each must get.

A submission is built from the *released* notebooks by filling in solution cells, as a student does, so
that it stays in step with `source/`. Nothing here runs any of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import nbformat
from nbformat import NotebookNode

from answers import ALSO_RIGHT, HALF, RIGHT, Answers

# honest: stock nbgrader grades it too; breaking: it hangs, stops or fills the memory of stock nbgrader
Kind = Literal["honest", "breaking", "hostile"]
Scores = dict[str, float | None]
Edit = Callable[[Path, Mapping[str, Any]], None]

HOSTILE_SOURCES = Path(__file__).parent / "hostile"

# Every graded cell, with the automatic score of a right answer; None: a person has to read it.
FULL: dict[str, Scores] = {
    "ps1/functions": {
        "test_mean": 2,
        "test_mean_empty": 1,
        "test_collatz": 3,
        "test_longest_start": 4,
        "own_function": None,
        "why_while": None,
    },
    "ps1/text": {"test_words": 2, "test_count_words": 3, "test_favourites": 3, "why_lower": None},
    "ps2/weather": {
        "test_load": 2,
        "test_monthly_means": 3,
        "test_moving_average": 4,
        "test_plot": 3,
        "describe": None,
    },
}
NOTHING: dict[str, Scores] = {name: dict.fromkeys(cells, 0) for name, cells in FULL.items()}


@dataclass(frozen=True)
class Student:
    """One student: a story, the answers, further changes to the files, and the scores expected."""

    name: str
    story: str
    kind: Kind
    assignments: tuple[str, ...]
    answers: Answers
    expected: dict[str, Scores]
    late: bool = False
    edit: Edit | None = None
    hostile: Mapping[str, str] = field(default_factory=dict)


def build(student: Student, assignment: str, folder: Path, known: Mapping[str, Any]) -> None:
    """Turn the released assignment in folder into what the student hands in."""
    for path in sorted(folder.glob("*.ipynb")):
        name = f"{assignment}/{path.stem}"
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            answer = student.answers.get(name, {}).get(grade_id(cell))
            if answer is not None:
                cell.source = answer.strip("\n")
        if source := student.hostile.get(name):
            notebook.cells[2:2] = hostile_cells(source, known)
        nbformat.write(notebook, path)
    if student.edit:
        student.edit(folder, known)


def grade_id(cell: NotebookNode) -> str:
    """The nbgrader id of a cell, or an empty string."""
    return str(cell.metadata.get("nbgrader", {}).get("grade_id", ""))


def hostile_cells(source: str, known: Mapping[str, Any]) -> list[NotebookNode]:
    """The cells of a hostile script (`# %%` begins a cell), after those that all of them share."""
    common = (HOSTILE_SOURCES / "common.py").read_text().replace("KNOWN: dict = {}", f"KNOWN: dict = {known!r}")
    script = (HOSTILE_SOURCES / source).read_text().replace("from common import *\n", "")
    head, *rest = script.split("# %% ")
    cells = [common, head, *(f"# {text}" for text in rest)]
    return [nbformat.v4.new_code_cell(text.strip("\n")) for text in cells]


def change(path: Path, edit: Callable[[NotebookNode], None]) -> None:
    """Read a notebook, edit it in place, write it back."""
    notebook = nbformat.read(path, as_version=4)
    edit(notebook)
    nbformat.write(notebook, path)


def duplicate_a_test(folder: Path, known: Mapping[str, Any]) -> None:
    """Copy a test cell with its metadata, as copy and paste in JupyterLab does."""

    def twice(notebook: NotebookNode) -> None:
        at = next(n for n, cell in enumerate(notebook.cells) if grade_id(cell) == "test_collatz")
        notebook.cells.insert(at, NotebookNode(notebook.cells[at] | {"id": "pasted-copy"}))

    change(folder / "functions.ipynb", twice)


def rename_a_notebook(folder: Path, known: Mapping[str, Any]) -> None:
    """Hand in what the browser saved."""
    (folder / "functions.ipynb").rename(folder / "functions (1).ipynb")


def bring_the_result(folder: Path, known: Mapping[str, Any]) -> None:
    """The file that the first notebook wrote when the student ran it at home."""
    (folder / "result.txt").write_text("871\n")


def bring_notes(folder: Path, known: Mapping[str, Any]) -> None:
    """A file with blanks and letters beyond ASCII, in a folder with the same."""
    notes = folder / "mina anteckningar" / "etiketter för bilden åäö ☂.txt"
    notes.parent.mkdir()
    notes.write_text("dag\ntemperatur (°C)\n", encoding="utf-8")


def tamper(folder: Path, known: Mapping[str, Any]) -> None:
    """Tags and metadata that could switch tests off, change their points or hide them."""

    def edit(notebook: NotebookNode) -> None:
        for cell in notebook.cells:
            if grade_id(cell).startswith("test_"):
                cell.metadata["tags"] = ["skip-execution", "raises-exception", "remove-cell"]
                cell.metadata["nbgrader"] |= {"points": 100, "checksum": "0" * 32, "locked": False}
                cell.source = "1000.0"

    for path in folder.glob("*.ipynb"):
        change(path, edit)


def with_answer(notebook: str, cell: str, source: str, also: Answers | None = None) -> Answers:
    """The right answers, but for one cell."""
    answers = {**RIGHT, **(also or {})}
    return {**answers, notebook: {**answers[notebook], cell: source}}


def scores(**notebooks: Mapping[str, float | None]) -> dict[str, Scores]:
    """The scores of right answers, with changes given by notebook: `scores(functions={"test_mean": 0})`."""
    result = {name: dict(cells) for name, cells in FULL.items()}
    for name in result:
        result[name].update(notebooks.get(name.split("/")[1], {}))
    return result


PS1, PS2, BOTH = ("ps1",), ("ps2",), ("ps1", "ps2")
RIGHT_MEAN, RIGHT_COLLATZ = (RIGHT["ps1/functions"][cell] for cell in ("mean", "collatz"))
CARELESS = with_answer("ps1/functions", "mean", RIGHT_MEAN + '\nnumbers = input("numbers, please: ")\n')
CARELESS["ps1/functions"]["collatz"] = RIGHT_COLLATZ.replace("result = [n]", 'result = [n or input("n: ")]')
CARELESS["ps1/functions"]["own_function"] = (
    "from pathlib import Path\n\nPath('result.txt').write_text(f'{longest_start(1000)}\\n')\n"
)
CARELESS["ps1/text"] = {
    **CARELESS["ps1/text"],
    "favourites": "start = int(open('result.txt').read())  # from the first notebook\n\n"
    + RIGHT["ps1/text"]["favourites"].replace("[:n]", "[:min(n, start)]"),
}

STUDENTS: tuple[Student, ...] = (
    Student("aino", "everything right", "honest", BOTH, RIGHT, scores()),
    Student(
        "bertil",
        "everything right, in other ways (recursion, caches, regular expressions)",
        "honest",
        BOTH,
        ALSO_RIGHT,
        scores(),
    ),
    Student(
        "chen",
        "about half of it right",
        "honest",
        BOTH,
        HALF,
        scores(
            functions={"test_mean_empty": 0, "test_longest_start": 2, "own_function": 0, "why_while": 0},
            text={"test_words": 0, "test_count_words": 0},
            weather={"test_monthly_means": 0, "test_moving_average": 1, "describe": 0},
        ),
    ),
    Student("dana", "handed in the release untouched", "honest", BOTH, {}, NOTHING),
    Student("eero", "right, but after the deadline", "honest", PS1, RIGHT, scores(), late=True),
    Student(
        "farid",
        "careless: asks with input(), reads a file that the other notebook wrote",
        "honest",
        PS1,
        CARELESS,
        scores(),
        edit=bring_the_result,
    ),
    Student(
        "greta",
        "copied a test cell together with its id",
        "breaking",
        PS1,
        RIGHT,
        scores(),
        edit=duplicate_a_test,
    ),
    Student(
        "hugo",
        "handed in 'functions (1).ipynb'",
        "honest",
        PS1,
        RIGHT,
        scores(functions=NOTHING["ps1/functions"]),
        edit=rename_a_notebook,
    ),
    Student(
        "iida",
        "reads an extra file with blanks and ä in its name",
        "honest",
        PS2,
        with_answer(
            "ps2/weather",
            "plot_temperatures",
            """\
from pathlib import Path

LABELS = Path("mina anteckningar/etiketter för bilden åäö ☂.txt").read_text(encoding="utf-8").splitlines()

def plot_temperatures(table):
    fig, ax = plt.subplots()
    for station, part in table.groupby("station"):
        ax.plot(part["date"], part["temperature"], label=station)
    ax.set(xlabel=LABELS[0], ylabel=LABELS[1])
    ax.legend()
    return ax
""",
        ),
        scores(),
        edit=bring_notes,
    ),
    Student(
        "jonas",
        "a loop that never ends",
        "honest",
        PS1,
        with_answer("ps1/functions", "longest_start", "def longest_start(limit):\n    while True:\n        pass\n"),
        scores(functions={"test_longest_start": 0}),
    ),
    Student(
        "kaisa",
        "a loop that never ends and ignores interrupts",
        "breaking",
        PS1,
        with_answer(
            "ps1/text",
            "favourites",
            """\
import signal

signal.signal(signal.SIGINT, signal.SIG_IGN)
while True:
    pass
""",
        ),
        scores(text={"test_favourites": 0}),
    ),
    Student(
        "lars",
        "prints without end",
        "breaking",
        PS1,
        with_answer(
            "ps1/text",
            "favourites",
            """\
def favourites(counts, n):
    for _ in range(20_000_000):
        print("still looking for the most frequent word", counts)
""",
        ),
        scores(text={"test_favourites": 0}),
    ),
    Student(
        "mika",
        "ends the kernel with os._exit",
        "breaking",
        PS1,
        with_answer("ps1/functions", "collatz", "import os\n\nos._exit(3)\n"),
        scores(functions={"test_collatz": 0, "test_longest_start": 0}),
    ),
    Student(
        "noor",
        "crashes the interpreter through ctypes",
        "breaking",
        PS2,
        with_answer(
            "ps2/weather",
            "plot_temperatures",
            """\
import ctypes

def plot_temperatures(table):
    return ctypes.string_at(0)
""",
        ),
        scores(weather={"test_plot": 0}),
    ),
    Student(
        "mallory-reads",
        "hostile: reads files, environments and the network",
        "hostile",
        PS1,
        {},
        NOTHING,
        hostile={"ps1/functions": "reads.py"},
    ),
    Student(
        "mallory-fills",
        "hostile: fills processes, disk and memory",
        "hostile",
        PS1,
        {},
        NOTHING,
        hostile={"ps1/functions": "fills.py", "ps1/text": "hoards.py"},
    ),
    Student(
        "mallory-escapes",
        "hostile: survives, escapes, tampers with tests and files",
        "hostile",
        PS1,
        {},
        NOTHING,
        edit=tamper,
        hostile={"ps1/functions": "escapes.py", "ps1/text": "kills.py"},
    ),
)
