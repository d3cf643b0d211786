"""Courses that tests break by hand, or in which commands are killed. Everybody is a real Unix user."""

import dataclasses
import os
import re
import stat
import tempfile
from pathlib import Path

import nbformat
import pytest
from clerks import Clerks

from campus import Campus, Done, Member

NOTEBOOK = nbformat.writes(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("answer = 42")]))
OLD_NS = 1_700_000_000_123_456_789


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a course is made. An administrator owns everything above it."""

    campus: Campus
    clerks: Clerks
    top: Path
    slug: str = "python26"

    @property
    def root(self) -> Path:
        return self.top / "kurssit" / "python ä 26"

    @property
    def exchange(self) -> Path:
        return self.top / "vaihto"

    @property
    def inside(self) -> Path:
        """The course in the exchange."""
        return self.exchange / self.slug

    @property
    def administrator(self) -> Member:
        return Member("root", 0, 0, (0,), self.top / "root", self.campus.python)

    def create(self, who: Member, *options: str | Path, slug: str | None = None) -> Done:
        places = ("--group", self.campus.group, "--course-dir", self.root, "--exchange", self.exchange)
        return self.clerks.aalto(who, "course", "create", slug or self.slug, *places, *options, cwd=who.home)

    def check(self, who: Member) -> Done:
        return self._look("check", who)

    def repair(self, who: Member, first: str = "") -> Done:
        return self._look("repair", who, first)

    def _look(self, what: str, who: Member, first: str = "") -> Done:
        options = ("--course-dir", self.root, "--exchange", self.exchange, "--group", self.campus.group)
        return self.clerks.aalto(who, "course", what, self.slug, *options, cwd=who.home, first=first)


@pytest.fixture
def place(campus: Campus, clerks: Clerks) -> Place:
    found = Place(campus, clerks, Path(tempfile.mkdtemp(prefix="course-", dir=campus.directory)))
    for path in (found.top, found.root.parent, found.administrator.home, found.administrator.home / "tmp"):
        path.mkdir(exist_ok=True)
        path.chmod(0o755)
    return found


@pytest.fixture
def made(place: Place) -> Place:
    """A course, its directories the first instructor's."""
    owner = place.campus.instructors[0]
    for path in (place.root.parent, place.top):
        os.chown(path, owner.uid, owner.gid)
    done = place.create(owner)
    assert done.code == 0, done.log
    for path in (place.root.parent, place.top):
        os.chown(path, 0, 0)
    return place


def mode(path: Path) -> str:
    return f"{stat.S_IMODE(os.lstat(path).st_mode):o}"


def commands(log: str) -> list[tuple[str, str]]:
    """Who is to run what, as `check` and `repair` print it."""
    return re.findall(r"^ *(\S+) runs: (.*)$", log, re.MULTILINE)


def own(path: Path, who: Member, bits: int, gid: int | None = None) -> None:
    """Make a file or directory somebody's, long ago."""
    os.chown(path, who.uid, who.gid if gid is None else gid)
    path.chmod(bits)
    os.utime(path, ns=(OLD_NS, OLD_NS))
