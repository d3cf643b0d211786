"""A course in the exchange with real Unix users, and what the tests of all operations do there."""

import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import nbformat
import pytest
from clerks import Clerks

from campus import Campus, CourseTree, Done, Member

_NUMBER = itertools.count(1)
NOTEBOOK = nbformat.writes(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("answer = 42")]))


@dataclasses.dataclass(frozen=True)
class World:
    """A course, its people, and shorthands for what they do. Assignments are released by hand, which is fast."""

    campus: Campus
    tree: CourseTree
    clerks: Clerks

    @property
    def inbound(self) -> Path:
        return self.tree.exchange / self.tree.name / "inbound"

    @property
    def boxes(self) -> Path:
        return self.tree.exchange / self.tree.name / "feedback"

    def notebooks(self, who: Member) -> Path:
        """A student's directory for this course: other modules' tests run at the same time."""
        return who.home / f"notebooks {self.tree.top.name}"

    def release(self, assignment: str | None = None) -> str:
        """A new assignment in the exchange, as released by an instructor."""
        assignment = assignment or f"ps{next(_NUMBER)}"
        path = self.tree.exchange / self.tree.name / "outbound" / assignment
        code = (
            "import os, sys; os.umask(0o002); os.mkdir(sys.argv[1]); "
            "open(sys.argv[1] + '/p1.ipynb', 'w').write(sys.argv[2])"
        )
        done = self.campus.instructors[0].python(code, str(path), NOTEBOOK)
        assert done.code == 0, done.log
        return assignment

    def work(self, who: Member, assignment: str, files: Mapping[str, str] | None = None) -> Path:
        """The student's working directory with the notebook and these files."""
        directory = self.notebooks(who) / assignment
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in {"p1.ipynb": NOTEBOOK, **(files or {})}.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text(text, encoding="utf-8")
        give(self.notebooks(who), who)
        return directory.parent

    def submit(self, who: Member, assignment: str, files: Mapping[str, str] | None = None, *options: str) -> Path:
        """Submit; returns the entry of inbound."""
        before = set(os.listdir(self.inbound))
        cwd = self.work(who, assignment, files)
        done = self.clerks.nbgrader(who, "submit", assignment, *options, cwd=cwd, env=self.tree.env())
        assert done.code == 0, done.log
        (name,) = {name for name in set(os.listdir(self.inbound)) - before if not name.startswith(".")}
        return self.inbound / name

    def as_student(self, who: Member, *arguments: str) -> Done:
        """An nbgrader command in the student's notebooks."""
        self.notebooks(who).mkdir(exist_ok=True)
        give(self.notebooks(who), who)
        return self.clerks.nbgrader(who, *arguments, cwd=self.notebooks(who), env=self.tree.env())

    def as_instructor(self, *arguments: str, who: int = 0) -> Done:
        """An nbgrader command in the course directory."""
        return self.clerks.nbgrader(self.campus.instructors[who], *arguments, cwd=self.tree.root, env=self.tree.env())

    def aalto(self, *arguments: str, who: int = 0) -> Done:
        """An nbgrader-aalto command of an instructor's in the course directory."""
        return self.clerks.aalto(self.campus.instructors[who], *arguments, cwd=self.tree.root, env=self.tree.env())

    def collect(self, assignment: str, *options: str, who: int = 0) -> str:
        """Collect; returns what was said."""
        done = self.as_instructor("collect", assignment, *options, who=who)
        assert done.code == 0, done.log
        return done.log

    def submitted(self, who: Member | str, assignment: str) -> Path:
        """Where a collected submission lies."""
        return self.tree.root / "submitted" / (who if isinstance(who, str) else who.name) / assignment

    def records(self, assignment: str) -> list[dict[str, Any]]:
        """Of the vault, oldest first."""
        place = self.tree.root / "vault" / assignment
        found = sorted(place.glob("*/*/submission.json"), key=lambda path: path.parent.name)
        return [json.loads(path.read_text()) for path in found]

    def write_feedback(self, who: Member | str, assignment: str, text: str) -> None:
        """A feedback page, as `generate_feedback` makes it, by an instructor."""
        name = who if isinstance(who, str) else who.name
        code = (
            "import os, sys, shutil; os.umask(0o007); d = f'feedback/{sys.argv[1]}/{sys.argv[2]}'; "
            "os.makedirs(d, exist_ok=True); open(d + '/p1.html', 'w').write(sys.argv[3]); "
            "s = f'submitted/{sys.argv[1]}/{sys.argv[2]}/timestamp.txt'; "
            "os.path.exists(s) and shutil.copyfile(s, d + '/timestamp.txt')"
        )
        done = self.campus.instructors[0].python(code, name, assignment, text, cwd=self.tree.root)
        assert done.code == 0, done.log


BY_HAND = """
import os, sys
os.umask(0o007)
inbound, name, notebook = sys.argv[1:4]
path = os.path.join(inbound, name)
os.mkdir(path)
open(os.path.join(path, "p1.ipynb"), "w").write(notebook)
"""
"""A submission made without nbgrader; what a test adds follows in `path`."""


def by_hand(world: World, who: Member, assignment: str, more: str = "", *, user: str = "", time: str = "") -> Path:
    """A submission as a clever student makes it; `time` is a claim."""
    name = f"{user or who.name}+{assignment}+{time or now()}+abcdefghijkl"
    done = who.python(BY_HAND + more, world.inbound, name, NOTEBOOK)
    assert done.code == 0, done.log
    return world.inbound / name


def now(**delta: float) -> str:
    return (datetime.now(UTC) + timedelta(**delta)).strftime("%Y-%m-%d %H:%M:%S.%f UTC")


def set_due_date(world: World, assignment: str, moment: datetime) -> None:
    """In the gradebook, by an instructor."""
    due = moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f UTC")
    done = world.as_instructor("db", "assignment", "add", assignment, f"--duedate={due}")
    assert done.code == 0, done.log


def give(path: Path, who: Member) -> None:
    """Make everything below the path a person's own."""
    for directory, _, names in os.walk(path):
        for name in (".", *names):
            os.chown(os.path.join(directory, name), who.uid, who.gid, follow_symlinks=False)


def modes(path: Path) -> dict[str, str]:
    """Relative path -> mode in octal, of everything below and the path itself."""
    found = {".": path, **{str(p.relative_to(path)): p for p in path.rglob("*")}}
    return {name: f"{os.lstat(p).st_mode & 0o7777:o}" for name, p in found.items()}


@pytest.fixture(scope="module")
def world(campus: Campus, clerks: Clerks, request: pytest.FixtureRequest) -> Iterator[World]:
    """One course for the tests of a module; each test has assignments of its own."""
    name = "k" + request.module.__name__.rpartition("_")[2][:8]
    tree = campus.course(name)
    exchange = tree.exchange / tree.name
    made = campus.instructors[0].python(
        "import os, sys\nfor name, mode in (('outbound', 0o2775), ('inbound', 0o3773), ('feedback', 0o3773)):\n"
        "    os.mkdir(f'{sys.argv[1]}/{name}'); os.chmod(f'{sys.argv[1]}/{name}', mode)",
        str(exchange),
    )
    assert made.code == 0, made.log
    made_world = World(campus, tree, clerks)
    try:
        yield made_world
    finally:
        for student in campus.students:
            shutil.rmtree(made_world.notebooks(student), ignore_errors=True)
