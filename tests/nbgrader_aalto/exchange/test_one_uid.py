"""`identity = "shared"`: everybody is jovyan, in a container of his or her own, with one uid and an own home."""

import dataclasses
import grp
import json
import os
import shutil
from pathlib import Path

import pytest
from clerks import Clerks
from worlds import NOTEBOOK, give

from campus import Campus, CourseTree, Done, Member

STUDENTS, INSTRUCTOR = ("aino", "b.o+b"), "inka"


@dataclasses.dataclass(frozen=True)
class Site:
    """People of one hub, all of whom are one Unix user. Only the instructor's container has the course directory."""

    jovyan: Member
    tree: CourseTree
    clerks: Clerks

    def home(self, name: str) -> Path:
        return self.tree.top / "homes" / name

    @property
    def boxes(self) -> Path:
        return self.tree.exchange / self.tree.name / "feedback"

    def nbgrader(self, name: str, *arguments: str | Path, code: int = 0) -> str:
        return self._ended(self.clerks.nbgrader(self.jovyan, *arguments, **self._where(name)), code)

    def verify(self, name: str, *paths: Path, code: int) -> str:
        return self._ended(self.clerks.aalto(self.jovyan, "receipt", "verify", *paths, **self._where(name)), code)

    def _where(self, name: str) -> dict[str, object]:
        home = self.home(name)
        config = self.tree.config_dir if name == INSTRUCTOR else self.tree.top / "students"
        env = {"HOME": home, "TMPDIR": home, "JUPYTERHUB_USER": name}
        env |= {"JUPYTER_DATA_DIR": home / ".local", "JUPYTER_CONFIG_DIR": home / ".jupyter"}
        env |= {"JUPYTER_CONFIG_PATH": config}
        cwd = self.tree.root if name == INSTRUCTOR else home
        return {"cwd": cwd, "env": {key: str(value) for key, value in env.items()}}

    def _ended(self, done: Done, code: int) -> str:
        assert done.code == code, done.log
        return done.log

    def records(self, name: str) -> list[Path]:
        """Of what somebody submitted, oldest first."""
        return sorted(path.parent for path in (self.home(name) / ".local").rglob("receipt.json"))

    def page(self, name: str, text: str) -> None:
        """A feedback page, as `generate_feedback` makes it."""
        place = self.tree.root / "feedback" / name / "ps1"
        place.mkdir(parents=True, exist_ok=True)
        (place / "p1.html").write_text(text)
        shutil.copy(self.tree.root / "submitted" / name / "ps1/timestamp.txt", place)
        give(self.tree.root / "feedback", self.jovyan)


@pytest.fixture(scope="module")
def site(campus: Campus, clerks: Clerks) -> Site:
    jovyan, tree = campus.outsider, campus.course("hub")
    settings = (
        f"c.AaltoExchange.group = {grp.getgrgid(jovyan.gid).gr_name!r}\n"
        "c.AaltoExchange.identity = 'shared'\nc.AaltoExchange.accept_readable_submissions = True\n"
    )
    tree.configure(settings)
    config = (tree.config_dir / "nbgrader_config.py").read_text()
    (tree.top / "students").mkdir()
    students = "".join(line for line in config.splitlines(True) if "CourseDirectory.root" not in line)
    (tree.top / "students/nbgrader_config.py").write_text(students)
    made = Site(jovyan, tree, clerks)
    for name in (*STUDENTS, INSTRUCTOR):
        made.home(name).mkdir(parents=True)
    release = tree.root / "release/ps1"
    release.mkdir(parents=True)
    (release / "p1.ipynb").write_text(NOTEBOOK)
    for path in (tree.top / "homes", tree.root, tree.exchange):
        give(path, jovyan)
    made.nbgrader(INSTRUCTOR, "release_assignment", "ps1")
    return made


def test_the_whole_street(site: Site) -> None:
    """Release, fetch, submit, collect, feedback, and what a receipt says on the way."""
    for name in STUDENTS:
        assert "hub ps1" in site.nbgrader(name, "list")
        site.nbgrader(name, "fetch_assignment", "ps1")
        (site.home(name) / "ps1/answer.txt").write_text(name)
        log = site.nbgrader(name, "submit", "ps1")
        assert "can be read and changed by every student" in log
        assert site.verify(name, code=3).startswith("unconfirmed: ")
    log = site.nbgrader(INSTRUCTOR, "collect", "ps1")
    for name in STUDENTS:
        assert f"Collecting submission: {name} ps1" in log
        assert (site.tree.root / "submitted" / name / "ps1/answer.txt").read_text() == name
        said = site.verify(name, code=3)
        assert said.startswith(f"unproved: hub ps1: confirmed by {INSTRUCTOR}, time ")
        assert "everybody has one uid here" in said
        (mine,) = site.records(name)
        assert site.verify(INSTRUCTOR, mine, code=0).startswith("confirmed: hub ps1: ")
        site.page(name, f"for {name}")
    assert "reached 2 of 2" in site.nbgrader(INSTRUCTOR, "release_feedback", "ps1")
    for name in STUDENTS:
        assert "feedback ready to be fetched" in site.nbgrader(name, "list", "--cached")
        site.nbgrader(name, "fetch_feedback", "ps1")
        assert [page.read_text() for page in site.home(name).glob("ps1/feedback/*/p1.html")] == [f"for {name}"]
        assert "feedback already fetched" in site.nbgrader(name, "list", "--cached")
    assert site.nbgrader(INSTRUCTOR, "list", "--inbound").count("hub ") == 2


def test_a_forged_confirmation_is_no_confirmation(site: Site) -> None:
    """Another student writes it, which nothing here can prevent; so it must not be believed."""
    name = STUDENTS[0]
    (site.home(name) / "ps1").mkdir(exist_ok=True)
    (site.home(name) / "ps1/p1.ipynb").write_text(NOTEBOOK)
    give(site.home(name), site.jovyan)
    site.nbgrader(name, "submit", "ps1")
    newest = site.records(name)[-1]
    receipt = json.loads((newest / "receipt.json").read_text())
    box = next(path for path in site.boxes.iterdir() if path.name.rpartition("+")[0] == name)
    forged = box / f"{receipt['name']}.receipt"
    forged.write_text(json.dumps({**receipt, "status": "confirmed", "confirmed_by": INSTRUCTOR}))
    os.chown(forged, site.jovyan.uid, site.jovyan.gid)
    assert site.verify(name, newest, code=3).startswith("unproved: ")
    assert site.verify(INSTRUCTOR, newest, code=3).startswith(
        "unconfirmed: hub ps1: unconfirmed: the vault has no such"
    )
    site.nbgrader(INSTRUCTOR, "collect", "ps1", "--update")
    assert site.verify(INSTRUCTOR, newest, code=0).startswith("confirmed: ")
    (newest / "p1.ipynb").write_text("{}")
    assert "p1.ipynb: has changed" in site.verify(name, newest, code=1)


def test_a_box_is_made_by_listing_and_fetching_too(site: Site) -> None:
    """Who never submitted gets feedback, too: on behalf, or from a zip."""
    name = "late.comer"
    site.home(name).mkdir()
    os.chown(site.home(name), site.jovyan.uid, site.jovyan.gid)
    submitted = site.tree.root / "submitted" / name / "ps1"
    submitted.mkdir(parents=True)
    (submitted / "timestamp.txt").write_text("2026-01-01 12:00:00 UTC")
    give(submitted.parent, site.jovyan)
    site.page(name, "for a late comer")
    assert f"No box yet: {name}" in site.nbgrader(INSTRUCTOR, "release_feedback", "ps1", "--student", name)
    site.nbgrader(name, "list", "--cached")
    site.nbgrader(INSTRUCTOR, "release_feedback", "ps1", "--student", name)
    site.nbgrader(name, "fetch_feedback", "ps1")
    assert [page.read_text() for page in site.home(name).glob("ps1/feedback/*/p1.html")] == ["for a late comer"]


def test_nobody_without_a_name_submits(site: Site) -> None:
    """All would be one and the same."""
    site.home("").mkdir(exist_ok=True)
    assert "Who are you? JUPYTERHUB_USER is ''" in site.nbgrader("", "list", "--cached", code=1)
