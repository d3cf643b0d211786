"""Intake: one run of the real `nbgrader autograde` over honest and broken submissions.

Rows 70a, 74, 75, 76, 78, 79 and 80 of the threat catalogue, as far as they concern autograde. The checks
alone are in test_inspection.py.
"""

import copy
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbgrader.api import Gradebook, MissingEntry
from nbgrader.nbgraderformat import SchemaTooOldError
from traitlets.config import Config

from nbgrader_aalto.configure import configure
from nbgrader_aalto.inspection import IntakeLimits
from nbgrader_aalto.intake import IntakeExporter, forget_duplicates
from released import Notebook, notebook

pytestmark = pytest.mark.xdist_group("intake")

CANARY = "canary-7c1f0b"
CONFIG = """
c = get_config()
c.CourseDirectory.course_id = "course"
c.CourseDirectory.student_id_exclude = "excluded"
c.IntakeExporter.max_notebook_bytes = 2_000_000
c.IntakeExporter.max_entries = 100

import nbgrader_aalto

nbgrader_aalto.configure(c)
"""


def nbgrader(course: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run nbgrader as a person would, with a time limit, so that a FIFO that is opened fails the test."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])  # nbgrader starts `alembic`
    python_path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "nbgrader", *arguments],
        cwd=course,
        env={**os.environ, "PATH": path, "PYTHONPATH": python_path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )


# --- ways to break a submission: each gets its directory, whose p1.ipynb is right until then


def edit(change: Callable[[Notebook], Any]) -> Callable[[Path], None]:
    def breaker(submission: Path) -> None:
        document = json.loads((submission / "p1.ipynb").read_text())
        change(document)
        (submission / "p1.ipynb").write_text(json.dumps(document))

    return breaker


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda submission: (submission / name).write_bytes(content)


def swap(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def breaker(submission: Path) -> None:
        (submission / name).parent.mkdir(exist_ok=True)
        (submission / name).unlink(missing_ok=True)
        make(submission / name)

    return breaker


def link(submission_file: Path) -> None:
    submission_file.symlink_to(outside(submission_file) / "secret.txt")


def outside(path: Path) -> Path:
    return next(parent for parent in path.parents if (parent / "outside").is_dir()) / "outside"


def linked_directory(path: Path) -> None:
    shutil.copytree(path, outside(path) / path.parent.name / "ps1")
    shutil.rmtree(path)
    path.symlink_to(outside(path) / path.parent.name / "ps1")


def linked_student(path: Path) -> None:
    shutil.copytree(path, outside(path) / path.parent.name / "ps1")
    shutil.rmtree(path.parent)
    path.parent.symlink_to(outside(path) / path.parent.name)


def unix_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path has at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(here)


def deep_tree(submission: Path) -> None:
    submission.joinpath(*["d"] * 40).mkdir(parents=True)


def many_files(submission: Path) -> None:
    for number in range(120):
        (submission / f"{number}.txt").touch()


def sparse(submission: Path) -> None:
    with open(submission / "large.bin", "wb") as file:
        file.truncate(101_000_000)


def meta(**changes: Any) -> Callable[[Path], None]:
    return edit(lambda nb: nb["cells"][1]["metadata"]["nbgrader"].update(changes))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "link_to_file": (swap("data.txt", link), "is a symbolic link"),
    "link_notebook": (swap("p1.ipynb", link), "is a symbolic link"),
    "link_assignment": (linked_directory, "is a symbolic link, not a directory"),
    "link_student": (linked_student, "is a symbolic link, not a directory"),
    "link_in_ignored": (swap("__pycache__/a.pyc", link), "is a symbolic link"),
    "link_in_brackets": (swap("d[1]/a.pyc", link), "is a symbolic link"),
    "link_dangling": (swap("data.txt", lambda path: path.symlink_to("nowhere")), "is a symbolic link"),
    "hard_link": (
        swap("data.txt", lambda path: path.hardlink_to(outside(path) / "secret.txt")),
        "is a hard link",
    ),
    "fifo_notebook": (swap("p1.ipynb", os.mkfifo), "is a FIFO"),
    "fifo_file": (swap("data.txt", os.mkfifo), "is a FIFO"),
    "fifo_timestamp": (swap("timestamp.txt", os.mkfifo), "is a FIFO"),
    "unix_socket": (swap("data.txt", unix_socket), "is a socket"),
    "notebook_directory": (swap("p1.ipynb", Path.mkdir), "is a directory"),
    "new\nline": (lambda submission: None, "has a control character in its name"),
    "not_utf8_name": (
        swap(os.fsdecode(b"a\xff.txt"), Path.touch),
        r"a\udcff.txt' has a control character or",
    ),
    "bidi_name": (swap("a\u202etxt.py", Path.touch), r"a\u202etxt.py' has a control character or"),
    "a[b]": (lambda submission: None, "has a name that is a wildcard"),
    "deep_tree": (deep_tree, "is deeper than 32 directories"),
    "many_files": (many_files, "is part of more than 100 files"),
    "large_file": (sparse, "has 101000000 bytes, more than 100000000"),
    "large_metadata": (edit(lambda nb: nb["metadata"].update(x="y" * 2_000_000)), "more than 2000000"),
    "empty": (write("p1.ipynb", b""), "is empty"),
    "broken_json": (write("p1.ipynb", b'{"cells": ['), "is not JSON"),
    "deep_json": (write("p1.ipynb", b"[" * 200_000 + b"]" * 200_000), "nested deeper than 100"),
    "latin1": (write("p1.ipynb", '{"é": 1}'.encode("latin-1")), "is not UTF-8"),
    "surrogate": (edit(lambda nb: nb["cells"][0].update(source="x = '\ud800'")), "a lone surrogate"),
    "nan": (edit(lambda nb: nb["metadata"].update(x=float("nan"))), "is not JSON"),
    "a_list": (write("p1.ipynb", b"[1]"), "is JSON but not a notebook"),
    "nbformat_99": (edit(lambda nb: nb.update(nbformat=99)), "the unknown format nbformat 99"),
    "no_cells": (edit(lambda nb: nb.pop("cells")), "cannot be read as a notebook"),
    "schema_too_new": (meta(schema_version=99), "unknown nbgrader schema_version 99 in cell 2"),
    "schema_too_old": (meta(schema_version=2), "run `nbgrader update`"),
    "schema_text": (meta(schema_version="3"), "unknown nbgrader schema_version '3'"),
    "schema_missing": (
        edit(lambda nb: nb["cells"][0]["metadata"].update(nbgrader={})),
        "schema_version 0 in cell 1",
    ),
    "grade_id_list": (meta(grade_id=["test"]), "no grade_id, or one that is not text"),
    "costly_outputs": (
        edit(lambda nb: nb["cells"][0].update(outputs=[{}] * 5000)),
        "is not a valid notebook",
    ),
    "timestamp_garbage": (write("timestamp.txt", b"soon"), "does not hold a time"),
    "earlier": (swap("data.txt", link), "is a symbolic link"),
}
ODD = ["a+b [1] (c) & 'd' \".txt", "ääkköset.txt", "שלום\u200f.txt", "d[1]/x.txt"]


def honest_with_odd_files(submission: Path) -> None:
    for name in ODD:
        (submission / name).parent.mkdir(exist_ok=True)
        (submission / name).write_text("kept")
    (submission / "scratch.ipynb").write_text("not a notebook, and not of the assignment")
    (submission / "__pycache__").mkdir()
    with open(submission / "__pycache__/large.pyc", "wb") as file:
        file.truncate(200_000_000)  # ignored, never copied


def as_nbformat_3(submission: Path) -> None:
    old = nbformat.convert(nbformat.read(submission / "p1.ipynb", as_version=4), 3)
    (submission / "p1.ipynb").write_text(nbformat.writes(old, version=3))


HONEST: dict[str, Callable[[Path], object]] = {
    "ab": lambda submission: None,
    "odd_files": honest_with_odd_files,
    "nbformat_3": as_nbformat_3,
    "copied_test_cell": edit(lambda nb: nb["cells"].append({**copy.deepcopy(nb["cells"][1]), "id": "copy"})),
}


class Run:
    """The course after the one run that most tests look at."""

    def __init__(self, course: Path) -> None:
        self.course = course
        self.kept = course / "autograded/earlier/ps1/p1.ipynb"
        self.generated = nbgrader(course, "generate_assignment", "ps1")
        self.submit("earlier", write("timestamp.txt", b"2026-01-01 12:00:00 UTC"))
        self.first = nbgrader(course, "autograde", "ps1")
        self.before = self.kept.stat()
        shutil.rmtree(course / "submitted/earlier")
        self.submit("earlier", write("timestamp.txt", b"2026-01-02 12:00:00 UTC"))
        for student, breaker in {**HONEST, "excluded": swap("p1.ipynb", os.mkfifo)}.items():
            self.submit(student, breaker)
        for student, (broken, _) in BROKEN.items():
            self.submit(student, broken)
        self.result = nbgrader(course, "autograde", "ps1")
        self.log = self.result.stdout

    def submit(self, student: str, breaker: Callable[[Path], object]) -> None:
        submission = self.course / "submitted" / student / "ps1"
        if not submission.exists():
            submission.mkdir(parents=True)
            document = nbformat.read(self.course / "release/ps1/p1.ipynb", as_version=4)
            document.cells[0].source = "x = 1"
            nbformat.write(document, submission / "p1.ipynb")
        breaker(submission)

    def score(self, student: str) -> float:
        with Gradebook(f"sqlite:///{self.course}/gradebook.db", "course") as gradebook:
            return float(gradebook.find_submission("ps1", student).score)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    course = tmp_path_factory.mktemp("course")
    (course / "source/ps1").mkdir(parents=True)
    (course / "outside").mkdir()
    (course / "outside/secret.txt").write_text(CANARY)
    (course / "nbgrader_config.py").write_text(CONFIG)
    nbformat.write(nbformat.from_dict(notebook()), course / "source/ps1/p1.ipynb")
    return Run(course)


@pytest.mark.parametrize("student", HONEST)
def test_an_honest_student_has_a_score(run: Run, student: str) -> None:
    assert run.score(student) == 2, run.log


@pytest.mark.parametrize("student", BROKEN)
def test_a_broken_submission_is_refused_with_the_reason(run: Run, student: str) -> None:
    directory = "submitted/new\\nline/ps1" if student == "new\nline" else student
    lines = [line for line in run.log.splitlines() if f"Refused: student {directory}, assignment ps1" in line]
    assert lines, run.log[-4000:]
    assert any(BROKEN[student][1] in line for line in lines)
    if student != "earlier":
        assert not (run.course / "autograded" / student).exists()
        with pytest.raises(MissingEntry):
            run.score(student)


def test_the_run_fails_and_sums_up(run: Run) -> None:
    assert run.first.returncode == 0, run.first.stdout
    assert run.result.returncode == 1
    assert f"{len(BROKEN)} submission(s) refused" in run.log
    assert "Traceback" not in run.log
    assert "student excluded" not in run.log
    assert "cell 'test' several times" in run.log


def test_an_earlier_result_survives_the_refusal(run: Run) -> None:
    assert run.kept.stat() == run.before
    assert run.score("earlier") == 2


def test_nothing_behind_a_link_was_copied(run: Run) -> None:
    files = [path for path in (run.course / "autograded").rglob("*") if path.is_symlink() or path.is_file()]
    assert len(files) > len(HONEST)
    assert not [path for path in files if path.is_symlink() or CANARY.encode() in path.read_bytes()]


def test_files_with_odd_names_are_copied_and_ignored_ones_are_not(run: Run) -> None:
    graded = run.course / "autograded/odd_files/ps1"
    assert [(graded / name).read_text() for name in ODD] == ["kept"] * len(ODD)
    assert not (graded / "__pycache__").exists()
    assert not (graded / "scratch.ipynb").exists()


def formgrader_click(course: Path, student: str, **config: Any) -> dict[str, Any]:
    from nbgrader.apps import NbGraderAPI
    from nbgrader.coursedir import CourseDirectory

    settings = Config(config)
    settings.CourseDirectory.root = str(course)
    settings.CourseDirectory.course_id = "course"
    configure(settings)
    api = NbGraderAPI(CourseDirectory(config=settings), config=settings)
    result: dict[str, Any] = api.autograde("ps1", student)
    return result


@pytest.fixture
def alembic_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable), prepend=os.pathsep)


@pytest.mark.usefixtures("alembic_on_path")
def test_the_lightning_bolt_shows_the_reason(run: Run) -> None:
    result = formgrader_click(run.course, "fifo_notebook")
    assert result["success"] is False
    assert "fifo_notebook (ps1): 'p1.ipynb' is a FIFO" in result["error"]
    assert "Refused: student fifo_notebook" in result["log"]


def fail_as_an_old_schema(nb: Any, resources: Any) -> None:
    raise SchemaTooOldError("too old", 1, 3)


@pytest.mark.usefixtures("alembic_on_path")
def test_a_schema_error_ends_one_student_and_is_reported_with_the_refusals(run: Run, tmp_path: Path) -> None:
    """Stock ends the whole run at the first of these; its own error must not hide the refusals."""
    course = tmp_path / "course"
    subprocess.run(["cp", "-a", str(run.course), str(course)], check=True)
    settings = Config(sanitize_preprocessors=[fail_as_an_old_schema])
    result = formgrader_click(course, "*", Autograde=settings)
    assert result["success"] is False
    for student in HONEST:
        assert f"There was an error processing assignment 'ps1' for student '{student}'" in result["log"]
    assert "errors on the above failures" in result["error"]
    assert "fifo_notebook (ps1)" in result["error"]


def test_without_an_autograde_it_is_a_plain_notebook_exporter() -> None:
    exporter = IntakeExporter(config=Config(IntakeExporter={"max_entries": 7}))
    assert exporter.file_extension == ".ipynb"
    assert exporter.max_entries == 7
    output, _ = exporter.from_notebook_node(nbformat.from_dict(notebook()))
    assert len(json.loads(output)["cells"]) == 2


def test_the_exporters_defaults_are_those_of_the_limits() -> None:
    exporter, limits = IntakeExporter(), IntakeLimits()
    names = [name for name in vars(limits) if getattr(exporter, name) is not None]
    assert len(names) == 6
    assert all(getattr(exporter, name) == getattr(limits, name) for name in names)


def test_only_the_last_copy_of_a_cell_keeps_its_metadata() -> None:
    document: Any = nbformat.from_dict(notebook())
    document.cells.append(copy.deepcopy(document.cells[1]))
    assert forget_duplicates(document) == ["test"]
    assert ["nbgrader" in cell.metadata for cell in document.cells] == [True, False, True]
