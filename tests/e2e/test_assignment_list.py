"""A course as its people see it: the Assignment List and Formgrader in JupyterLabs of real Unix users, in Chromium.

The first instructor releases, a student fetches and submits, the second instructor collects, grades and gives
feedback, and the student reads it: from directories of their own, and with the file system's root as that of Jupyter.
"""

import contextlib
import dataclasses
import http.client
import json
import secrets
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import nbformat
import pytest

from campus import Campus, CourseTree, Member
from e2e.browser import Browser, browser
from e2e.courses import answer, check, notebook
from e2e.host import descendants, eventually, free_port, processes

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("assignment_list")]

ASSIGNMENT = "ps 1"
WRITE = """
import os, pathlib, sys
path = pathlib.Path(sys.argv[1])
path.parent.mkdir(parents=True, exist_ok=True)
path.write_text(sys.stdin.read(), encoding="utf-8")
"""
QUIET = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
"""Of JupyterLab: no question whether it may look for news."""


@dataclasses.dataclass(frozen=True)
class Lab:
    """A JupyterLab of one person's."""

    member: Member
    port: int
    token: str
    process: "subprocess.Popen[str]"
    log: Path

    def request(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", quote(path), headers={"Authorization": f"token {self.token}"})
            response = connection.getresponse()
            return response.status, response.read().decode()

    def address(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}?token={self.token}"

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        with contextlib.suppress(OSError):
            return self.request("/api/status")[0] == 200
        return False


@contextlib.contextmanager
def lab_of(member: Member, tree: CourseTree, root: Path, top: Path) -> Iterator[Lab]:
    """This person's JupyterLab, started in `root`, which is the root of its files; gone afterwards with all it ran."""
    settings = member.python(WRITE, member.home / ".jupyter/labconfig/page_config.json", stdin=json.dumps(QUIET))
    assert settings.code == 0, settings.log
    port, token, log = free_port(), secrets.token_hex(16), top / f"{member.name}.log"
    options = [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--ServerApp.open_browser=False"]
    with log.open("w") as out:
        process = member.start(
            *[member.interpreter, "-P", "-m", "jupyterlab", *options, f"--ServerApp.root_dir={root}"],
            cwd=root,
            env={**tree.env(), "JUPYTER_TOKEN": token},
            stdout=out,
        )
    try:
        one = Lab(member, port, token, process, log)
        assert eventually(one.is_ready, 180), log.read_text()
        yield one
    except BaseException as error:
        error.add_note(f"the server's log: {log.read_text()[-6000:]}")
        raise
    finally:
        below = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            member.kill(process)
            process.wait()
        assert eventually(lambda: not below & processes().keys(), 30)


def open_assignment_list(page: Browser, lab: Lab) -> None:
    page.open(lab.address("/lab"))
    page.click(".lm-MenuBar-itemLabel", "Nbgrader")
    page.click('li[data-command="nbgrader:open-assignment-list"]')
    page.find("#released_assignments_list")


def press(page: Browser, css: str) -> str:
    """A button of Formgrader's; what its log says. Fails with what an error says."""
    page.click(css)
    page.find("#success-modal .modal-body, #error-modal .modal-body")
    said = page.text(".modal-body")
    assert page.has("#success-modal"), said
    page.click(".modal-footer button")
    assert eventually(lambda: not page.has(".modal"))
    return said


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the two people's servers begin, and where the student's assignments lie."""

    student: Path
    instructor: Path
    assignments: Path


@pytest.fixture(params=["own directories", "whole file system"])
def course(request: pytest.FixtureRequest, campus: Campus) -> tuple[CourseTree, Places]:
    """Released by the first instructor. In the second kind servers have the root of the file system for theirs."""
    student, whole = campus.students[0], request.param == "whole file system"
    name = "koko" if whole else "oma"
    notebooks = student.directory(f"notebooks {name}")
    config = f"import os\nc.Exchange.assignment_dir = os.path.expanduser('~/{notebooks.name}')\n" if whole else ""
    tree = campus.course(name, config)
    first = campus.instructors[0]
    cells = notebook(answer("one"), check("test_one", "assert one == 1", 2))
    source = tree.root / "source" / ASSIGNMENT / "p1.ipynb"
    done = [first.python(WRITE, source, stdin=nbformat.writes(cells), cwd=tree.root)]
    done += [
        first.nbgrader(command, ASSIGNMENT, cwd=tree.root, env=tree.env())
        for command in ("generate_assignment", "release_assignment")
    ]
    assert all(one.code == 0 for one in done), done
    return tree, Places(*(Path("/"), Path("/")) if whole else (notebooks, tree.root), notebooks)


def test_from_release_to_feedback(course: tuple[CourseTree, Places], campus: Campus, tmp_path: Path) -> None:
    tree, places = course
    student, second = campus.students[0], campus.instructors[1]
    work = places.assignments / ASSIGNMENT
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(lab_of(student, tree, places.student, tmp_path))
        page = stack.enter_context(browser(tmp_path / "student"))
        open_assignment_list(page, lab)
        fetches(page, work)
        solution = nbformat.read(work / "p1.ipynb", as_version=4)
        solution.cells[0].source = "one = 1"
        saved = student.python(WRITE, work / "p1.ipynb", stdin=nbformat.writes(solution))
        assert saved.code == 0, saved.log
        submits(page)
        with (
            lab_of(second, tree, places.instructor, tmp_path) as office,
            browser(tmp_path / "instructor") as desk,
        ):
            collects_and_grades(desk, office, tree, student)
        reads_feedback(page, work)


def fetches(page: Browser, work: Path) -> None:
    assert page.text("#released_assignments_list .item_name", ASSIGNMENT) == ASSIGNMENT
    page.click("#released_assignments_list .item_status button", "Fetch")
    page.find("#fetched_assignments_list .item_name", ASSIGNMENT)
    assert (work / "p1.ipynb").is_file()
    assert not page.has("#released_assignments_list .item_name", ASSIGNMENT)


def submits(page: Browser) -> None:
    page.click("#fetched_assignments_list .item_status button", "Submit")
    page.find("#submitted_assignments_list .item_name", ASSIGNMENT)
    assert not page.has("#submitted_assignments_list .list_item", "feedback")


def collects_and_grades(page: Browser, lab: Lab, tree: CourseTree, student: Member) -> None:
    page.open(lab.address("/formgrader/manage_assignments"))
    link = str(page.find("td.name a", ASSIGNMENT).get_attribute("href"))
    press(page, "td.collect a")
    assert page.text("td.num-submissions a") == "1"
    page.click("td.num-submissions a")
    assert page.text("td.student-id") == student.name
    press(page, "td.autograde a")
    assert page.text("td.score", "/") == "2 / 2"
    press(page, "td.generate-feedback a")
    press(page, "td.release-feedback a")
    # where the assignment's name leads to is the course's source, however far from the server's root
    status, listing = lab.request("/api/contents" + directory_of(link))
    assert status == 200, (link, listing)
    content: list[dict[str, Any]] = json.loads(listing)["content"]
    assert {entry["name"] for entry in content} == {path.name for path in (tree.root / "source" / ASSIGNMENT).iterdir()}


def directory_of(link: str) -> str:
    """The path of a link of the form http://host/tree/PATH."""
    return "/" + unquote(link.partition("/tree/")[2])


def reads_feedback(page: Browser, work: Path) -> None:
    page.click("#refresh_assignments_list")
    page.find("#submitted_assignments_list .list_item", "feedback available to fetch")
    page.click("#submitted_assignments_list .item_status button", "Fetch Feedback")
    page.click("#submitted_assignments_list .list_item a", "view feedback")
    page.double_click(".jp-DirListing-item", "p1.html")
    assert "Score: 2.0 / 2.0" in page.inside(".jp-HTMLViewer iframe")
    # and the notebook itself is opened by its name in the list
    page.click(".lm-TabBar-tabLabel", "Assignments")
    page.click("#fetched_assignments_list .item_name a", ASSIGNMENT)
    page.click("#fetched_assignments_list .list_item a", "p1")
    assert "one = 1" in page.text(".jp-NotebookPanel .jp-Cell", "one = 1")
