"""A small real course for one test module: made, submitted to, graded and looked at as nbgrader's users do.

Commands run in a process of their own with a HOME of their own; `click` does what Formgrader's lightning bolt
does, in this process, which saves the import. Directories have a blank and a letter beyond ASCII in their names.
"""

import contextlib
import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import NotebookNode

REPOSITORY = Path(__file__).parents[2]
COURSE_ID = "kurssi"
SECRET = "canary-token-51d0"
LONG = 240.0
"""Seconds: far more than any command here takes."""

SAFE = """
import nbgrader_aalto

nbgrader_aalto.configure(c)
"""
"""The end of a course's configuration."""

Edit = Callable[[NotebookNode], object]


def code(source: str, **metadata: Any) -> NotebookNode:
    """A code cell without nbgrader's metadata."""
    return nbformat.v4.new_code_cell(source, metadata=metadata)


def answer(grade_id: str, **metadata: Any) -> NotebookNode:
    """A cell that the student fills in, not graded itself."""
    return _nbgrader_cell(f"### BEGIN SOLUTION\n{grade_id} = 1\n### END SOLUTION", grade_id, metadata, solution=True)


def check(grade_id: str, source: str, points: float, **metadata: Any) -> NotebookNode:
    """A test cell."""
    return _nbgrader_cell(source, grade_id, metadata, grade=True, locked=True, points=points)


def _nbgrader_cell(source: str, grade_id: str, metadata: Mapping[str, Any], **flags: Any) -> NotebookNode:
    base = {"grade": False, "solution": False, "locked": False, "schema_version": 3, "grade_id": grade_id}
    return nbformat.v4.new_code_cell(source, metadata={**metadata, "nbgrader": {**base, **flags}})


def notebook(*cells: NotebookNode, kernel: str | None = "python3") -> NotebookNode:
    """A notebook of these cells."""
    spec = {"name": kernel, "display_name": kernel, "language": "python"}
    return nbformat.v4.new_notebook(cells=list(cells), metadata={"kernelspec": spec} if kernel else {})


def find(document: NotebookNode, grade_id: str) -> NotebookNode:
    """The cell with this id."""
    return next(cell for cell in document.cells if cell.metadata.get("nbgrader", {}).get("grade_id") == grade_id)


def printed(cell: NotebookNode) -> str:
    """What the cell wrote to stdout."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def errors(cell: NotebookNode) -> list[str]:
    """`name: text` of each error in the cell's outputs."""
    return [f"{output.ename}: {output.evalue}" for output in cell.outputs if output.output_type == "error"]


@dataclasses.dataclass(frozen=True)
class Done:
    """A finished command: exit code and everything that it wrote."""

    code: int
    log: str


class Course:
    """A course directory with its exchange and its instructor's home, all below `top`."""

    def __init__(self, top: Path, config: str = "", cache: Path | None = None) -> None:
        self.top = top
        self.root, self.exchange, self.home = top / "kurssi ä", top / "exchange", top / "home"
        self._cache = cache or self.home / ".cache"
        for directory in (self.root, self.exchange, self.home):
            directory.mkdir(parents=True)
        self.configure(config)

    def configure(self, config: str, end: str = SAFE) -> None:
        """Write nbgrader_config.py: `config`, with `end` (the plugin's two lines) after it."""
        start = (
            f"c = get_config()\nc.CourseDirectory.course_id = {COURSE_ID!r}\nc.Exchange.root = {str(self.exchange)!r}\n"
        )
        (self.root / "nbgrader_config.py").write_text(start + config + end, encoding="utf-8")

    def add(
        self, assignment: str, notebooks: Mapping[str, NotebookNode], files: Mapping[str, str] | None = None
    ) -> None:
        """Write the source of an assignment and generate its release version."""
        source = self.root / "source" / assignment
        source.mkdir(parents=True)
        for name, document in notebooks.items():
            nbformat.write(document, source / f"{name}.ipynb")
        for name, text in (files or {}).items():
            (source / name).write_text(text, encoding="utf-8")
        self.generate(assignment)

    def generate(self, assignment: str) -> None:
        """Make the release version of what lies in source/."""
        with self._here():
            result = self._api().generate_assignment(assignment)
        assert result["success"], result

    def submit(
        self,
        student: str,
        assignment: str = "ps1",
        answers: Mapping[str, str] | None = None,
        edit: Edit | None = None,
        files: Mapping[str, str] | None = None,
    ) -> Path:
        """Put the released notebooks, with these answers (by grade id) and after `edit`, into submitted/."""
        submission = self.root / "submitted" / student / assignment
        submission.mkdir(parents=True)
        for path in (self.root / "release" / assignment).glob("*.ipynb"):
            document = nbformat.read(path, as_version=4)
            for cell in document.cells:
                cell.source = (answers or {}).get(cell.metadata.get("nbgrader", {}).get("grade_id", ""), cell.source)
            if edit:
                edit(document)
            nbformat.write(document, submission / path.name)
        for name, text in (files or {}).items():
            (submission / name).parent.mkdir(parents=True, exist_ok=True)
            (submission / name).write_text(text, encoding="utf-8")
        return submission

    def environment(self, **variables: str) -> dict[str, str]:
        """The instructor's environment: nothing of the tester's Jupyter, a secret, and `alembic` on PATH."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "IPYTHON", "XDG_", "NBGRADER"))}
        return {
            **kept,
            "HOME": str(self.home),
            "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")])),
            "XDG_CACHE_HOME": str(self._cache),
            "JUPYTERHUB_API_TOKEN": SECRET,
            **variables,
        }

    def start(self, *arguments: str, **variables: str) -> "subprocess.Popen[str]":
        """`nbgrader ARGUMENTS` in the course, in a session of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "nbgrader", *arguments],
            cwd=self.root,
            env=self.environment(**variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def nbgrader(self, *arguments: str, **variables: str) -> Done:
        """Run `nbgrader ARGUMENTS` to its end."""
        process = self.start(*arguments, **variables)
        try:
            log, _ = process.communicate(timeout=LONG)
        except subprocess.TimeoutExpired:
            process.kill()
            log, _ = process.communicate()
            pytest.fail(f"nbgrader did not end: {log[-3000:]}")
        return Done(process.returncode, log)

    def click(
        self, student: str, assignment: str = "ps1", *, changes: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """What Formgrader's lightning bolt answers; `changes` are merged over the course's configuration."""
        with self._here():
            result: dict[str, Any] = self._api(changes).autograde(assignment, student)
        return result

    @contextlib.contextmanager
    def _here(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.root)
            for name, value in self.environment().items():
                if name != "PYTHONPATH":
                    patch.setenv(name, value)
            yield

    def _api(self, changes: Mapping[str, Any] | None = None) -> Any:
        from nbgrader.apps import NbGraderAPI
        from nbgrader.coursedir import CourseDirectory
        from traitlets.config import Config
        from traitlets.config.loader import PyFileConfigLoader

        config = PyFileConfigLoader("nbgrader_config.py", path=str(self.root)).load_config()
        config.CourseDirectory.root = str(self.root)
        config.merge(Config(changes or {}))
        return NbGraderAPI(CourseDirectory(config=config), config=config)

    def scores(self, student: str, assignment: str = "ps1") -> dict[str, float | None]:
        """The automatic score of each test cell, by its id; empty if there is no submission."""
        from nbgrader.api import Gradebook, MissingEntry

        with Gradebook(f"sqlite:///{self.root}/gradebook.db", COURSE_ID) as gradebook:
            try:
                submission = gradebook.find_submission(assignment, student)
            except MissingEntry:
                return {}
            return {grade.name: grade.auto_score for book in submission.notebooks for grade in book.grades}

    def autograded(self, student: str, assignment: str = "ps1") -> Path:
        """The directory of the result."""
        return self.root / "autograded" / student / assignment

    def result(self, student: str, assignment: str = "ps1", name: str = "p1") -> NotebookNode:
        """The executed notebook."""
        return nbformat.read(self.autograded(student, assignment) / f"{name}.ipynb", as_version=4)


def contents(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Mode and bytes of every file below: equal only if nothing has changed."""
    return {
        str(path.relative_to(directory)): (path.stat().st_mode, path.read_bytes() if path.is_file() else b"")
        for path in sorted(directory.rglob("*"))
    }
