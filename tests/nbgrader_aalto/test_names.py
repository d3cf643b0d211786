"""Names: those that are let through go through nbgrader's whole cycle, the others are refused with the reason.

Row 80 of the threat catalogue, as far as it concerns what instructors name. The cycle is one real Jupyter server with
Formgrader, asked with the addresses that a browser makes of Formgrader's links: those put names in as they are.
"""

import json
import os
import secrets
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import nbformat
import pytest

from e2e.courses import Course, answer, check, notebook
from e2e.host import eventually, free_port
from e2e.test_formgrader import Server
from nbgrader_aalto.exchange.names import (
    MAX_ASSIGNMENT,
    MAX_FILE_NAME,
    MAX_NOTEBOOK,
    MAX_STUDENT,
    assignment_problem,
    file_problem,
    notebook_problem,
    student_problem,
)

ALL = (assignment_problem, notebook_problem, student_problem)
GOOD = [
    "Problem Set 1",
    "a (b) & 'c', d; e=f @ g: h ~ $HOME! {0} ^ | > ]",
    "a.b..c",
    "A.B..C",
    unicodedata.normalize("NFC", "Tehtävä"),
    unicodedata.normalize("NFD", "Tehtävä"),
    "תרגיל 練習 👩‍🎓",
    "&amp",
    "é" * 30,
]
BAD = {
    "": "is empty",
    " ps1": "begins or ends with a blank",
    "ps1\u00a0": "begins or ends with a blank",
    ".ps1": "begins with '.'",
    "..": "begins with '.'",
    "-ps1": "begins with '-'",
    "a/b": "holds '/'",
    "a\\b": "holds '\\\\'",
    "a\0b": "a control character",
    "a\nb": "a control character",
    "a\x85b": "a control character",
    "a\u2028b": "a control character",
    "a\u202eb": "a text direction mark",
    "a\u2066b": "a text direction mark",
    "a\u200fb": "a text direction mark",
    os.fsdecode(b"a\xffb"): "bytes that are not UTF-8",
    "a\ud800b": "bytes that are not UTF-8",
    "a*": "holds '*'",
    "a?": "holds '?'",
    "a[b]": "holds '['",
    "a#b": "holds '#'",
    "100%": "holds '%'",
    'a"b': "holds '\"'",
    "a<b": "holds '<'",
    "R&amp;D": "holds '&amp;'",
    "é" * 60: "bytes",
}
CONFIG = """
c.Autograde.autograde_preprocessors = ["nbgrader.preprocessors.SaveAutoGrades"]
c.GenerateAssignment.exporter_class = "nbgrader_aalto.converters.AssignmentExporter"
c.GenerateFeedback.exporter_class = "nbgrader_aalto.converters.FeedbackExporter"
"""
"""What is run does not matter for names, and a sandbox takes its time."""


@pytest.mark.parametrize("name", GOOD)
def test_a_good_name_is_good_for_all(name: str) -> None:
    assert [problem(name) for problem in ALL] == [None, None, None]


@pytest.mark.parametrize("name", BAD, ids=ascii)
def test_a_bad_name_is_refused_with_the_reason(name: str) -> None:
    for problem, what in zip(ALL, ("assignment", "notebook", "student"), strict=True):
        reason = problem(name)
        assert reason is not None
        assert BAD[name] in reason
        assert reason.endswith(f"rename the {what}")
        reason.encode()


def test_a_plus_is_refused_where_nbgrader_refuses_it() -> None:
    assert [problem("c++") is None for problem in ALL] == [False, True, True]


@pytest.mark.parametrize("name", ["feedback", "__pycache__", "x.pyc"])
def test_what_nbgrader_ignores_is_no_name_of_an_assignment(name: str) -> None:
    assert "ignores" in (assignment_problem(name) or "")
    assert notebook_problem(name) is None


def test_names_made_of_the_longest_names_are_names_of_files() -> None:
    time, random = "2026-01-31 12:00:00.000000 UTC+1", "x" * 12
    assert len(time) == 32, "one more than is promised"
    submission = "+".join(["u" * MAX_STUDENT, "a" * MAX_ASSIGNMENT, time, random])
    feedback = "+".join(["a" * MAX_ASSIGNMENT, time[:-1], "n" * MAX_NOTEBOOK]) + ".html"
    assert len(submission) <= MAX_FILE_NAME
    assert len(feedback) == MAX_FILE_NAME
    longest = (MAX_ASSIGNMENT, MAX_NOTEBOOK, MAX_STUDENT)
    assert [problem("x" * most) for problem, most in zip(ALL, longest, strict=True)] == [None] * 3
    assert all(problem("x" * (most + 1)) for problem, most in zip(ALL, longest, strict=True))


@pytest.mark.parametrize(
    "path",
    [
        "a",
        ".hidden/b c",
        "a.before",
        ".a.new",
        ".before",
        "a+b [1] (c) & 'd' \".txt",
        "שלום\u200f.txt",
        "é" * 127,
        "x/" * 9 + "y",
    ],
)
def test_a_file_may_be_called_nearly_anything(path: str) -> None:
    assert file_problem(path) is None


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("", "not a path"),
        ("/etc/passwd", "not a path"),
        ("a/../b", "not a path"),
        ("a//b", "not a path"),
        ("a/b\nc", "control character"),
        ("a\u202eb", "text direction mark"),
        ("a\udcffb/c", "non-UTF-8"),
        ("é" * 128, "more than 255 bytes"),
        ("a/.b.ipynb.before/c", "gives to earlier results"),
        (".a.dropped.0123abcd", "gives to earlier results"),
        (".a.replaced", "gives to earlier results"),
        (".a.0123456789ab.new", "gives to earlier results"),
        ("/".join(["x" * 100] * 11), "path longer than"),
    ],
)
def test_a_file_that_is_refused(path: str, reason: str) -> None:
    assert reason in (file_problem(path) or "")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    course = Course(tmp_path_factory.mktemp("names") / "with blank")
    course.configure(CONFIG, end="")
    for name in GOOD:
        (course.root / "source" / name).mkdir(parents=True)
        document = notebook(answer("one"), check("test_one", "assert one == 1", 2))
        nbformat.write(document, course.root / "source" / name / f"{name}.ipynb")
        (course.root / "source" / name / f"{name}.txt").write_text("data")
    port, token, log = free_port(), secrets.token_hex(16), course.top / "server.log"
    options = ["--no-browser", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    config = course.home / ".jupyter/jupyter_server_config.py"
    config.parent.mkdir()
    config.write_text("c.ServerApp.jpserver_extensions = {'nbgrader.server_extensions.formgrader': True}\n")
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyter_server", *options, *(["--allow-root"] if os.geteuid() == 0 else [])],
            cwd=course.root,
            env=course.environment(JUPYTER_TOKEN=token, JUPYTER_RUNTIME_DIR=str(course.home / "runtime")),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
    try:
        one = Server(course, port, token, process, log)
        assert eventually(one.is_ready, 120), log.read_text()
        yield one
    finally:
        process.terminate()
        try:
            process.wait(30)
        finally:
            process.kill()
            process.wait()


def address(*parts: str) -> str:
    """What a browser sends for a link put together of names: only some characters are encoded. URL Standard, 1.3"""
    return quote("/formgrader/" + "/".join(parts), safe="/!$%&'()*+,-.:;=@[]\\_|~")


def ask(server: Server, method: str, *parts: str) -> Any:
    status, body = server.request(method, address(*parts))
    assert status == 200, (body, server.log.read_text()[-3000:])
    return json.loads(body)


@pytest.mark.slow
@pytest.mark.parametrize("name", GOOD)
def test_a_good_name_goes_through_the_whole_cycle(server: Server, name: str) -> None:
    course, api = server.course, "api"
    answered = ask(server, "POST", api, "assignment", name, "assign")
    assert answered["success"], answered
    course.submit(name, name, answers={"one": "one = 1"})
    answered = ask(server, "POST", api, "submission", name, name, "autograde")
    assert answered["success"], answered
    answered = ask(server, "POST", api, "assignment", name, name, "generate_feedback")
    assert answered["success"], answered
    assert course.scores(name, name) == {"test_one": 2}
    made = {path.name for path in (course.root / "feedback" / name / name).iterdir()}
    assert made == {f"{name}.html", f"{name}.txt"}
    (submission,) = ask(server, "GET", api, "submissions", name)
    assert (submission["student"], submission["name"], submission["score"]) == (name, name, 2)
    (graded,) = ask(server, "GET", api, "submitted_notebooks", name, name)
    for parts in (("manage_submissions", name), ("gradebook", name, name), ("manage_students", name, name)):
        status, page = server.request("GET", address(*parts))
        assert status == 200
        assert f'var assignment_id = "{name}";' in page
    status, page = server.request("GET", address("submissions", graded["id"]) + "/")
    assert status == 200
    assert "test_one" in page


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a#b", "a%41b", "a?b", "a\\b"])
def test_formgraders_own_links_lose_a_refused_name(server: Server, name: str) -> None:
    """Else it would be refused without need."""
    # a browser ends the path at these, and makes a slash of a backslash
    path = ("/formgrader/manage_submissions/" + name).partition("#")[0].partition("?")[0].replace("\\", "/")
    status, page = server.request("GET", quote(path, safe="/%"))
    assert status != 200 or f'var assignment_id = "{name}";' not in page
