"""Formgrader's lightning bolt in a real Jupyter server: graded in the sandbox, with answers that say why not."""

import contextlib
import dataclasses
import http.client
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.courses import SECRET, Course, answer, check, find, notebook, printed
from e2e.host import command_of, descendants, eventually, free_port, processes

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("formgrader")]

SPY = """
import json, os, socket
one = 1
said = {"environ": dict(os.environ), "others": "", "files": [], "connected": []}
for pid in os.listdir("/proc"):
    for name in ("environ", "cmdline"):
        try:
            said["others"] += open(f"/proc/{pid}/{name}").read()
        except OSError:
            pass
for path in PATHS:
    if os.path.exists(path):
        said["files"].append(path)
for family, address in ((socket.AF_INET, ("127.0.0.1", PORT)), (socket.AF_INET6, ("::1", PORT))):
    try:
        with socket.socket(family) as sock:
            sock.settimeout(2)
            sock.connect(address)
            said["connected"].append(address)
    except OSError:
        pass
print(json.dumps(said))
"""
STUDENTS = {"right": "one = 1", "wrong": "one = 2"}
SCORES = {"right": {"test_one": 2}, "wrong": {"test_one": 0}, "spy": {"test_one": 2}}


@dataclasses.dataclass
class Server:
    """A Jupyter server in the course directory."""

    course: Course
    port: int
    token: str
    process: "subprocess.Popen[bytes]"
    log: Path

    def request(self, method: str, path: str, token: str | None = None) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            connection.request(method, path, headers={"Authorization": f"token {token or self.token}"})
            response = connection.getresponse()
            return response.status, response.read().decode()

    def autograde(self, student: str) -> dict[str, Any]:
        status, body = self.request("POST", f"/formgrader/api/submission/ps1/{student}/autograde")
        assert status == 200, (body, self.log.read_text()[-3000:])
        result: dict[str, Any] = json.loads(body)
        return result

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        with contextlib.suppress(OSError):
            return self.request("GET", "/formgrader/api/assignments")[0] == 200
        return False


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    course = Course(tmp_path_factory.mktemp("formgrader") / "with blank")
    course.add("ps1", {"p1": notebook(answer("one"), check("test_one", "assert one == 1", 2))})
    for student, source in STUDENTS.items():
        course.submit(student, answers={"one": source})
    port, token = free_port(), secrets.token_hex(16)
    paths = [str(course.root / "gradebook.db"), str(course.home / ".jupyter"), str(course.home / "runtime")]
    course.submit("spy", answers={"one": SPY.replace("PORT", str(port)).replace("PATHS", repr(paths))})
    refused = course.submit("refused", answers={"one": "one = 1"})
    (refused / "data.txt").symlink_to(course.root / "gradebook.db")
    config = course.home / ".jupyter/jupyter_server_config.py"
    config.parent.mkdir(exist_ok=True)
    config.write_text(
        "c.ServerApp.jpserver_extensions = {'nbgrader.server_extensions.formgrader': True}\n"
        f"c.ServerApp.port = {port}\nc.ServerApp.port_retries = 0\nc.ServerApp.open_browser = False\n"
    )
    log = course.top / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyter_server", *(["--allow-root"] if os.geteuid() == 0 else [])],
            cwd=course.root,
            env=course.environment(JUPYTER_TOKEN=token, JUPYTER_RUNTIME_DIR=str(course.home / "runtime")),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        one = Server(course, port, token, process, log)
        assert eventually(one.is_ready, 120), log.read_text()
        yield one
    finally:
        left = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        finally:
            process.kill()
            process.wait()
    assert eventually(lambda: not left & set(processes()), 20), [command_of(one) for one in left & set(processes())]


def test_nobody_grades_without_the_token(server: Server) -> None:
    status, _ = server.request("POST", "/formgrader/api/submission/ps1/right/autograde", token="x" * 32)
    assert status == 403
    assert server.course.scores("right") == {}


def test_a_click_grades_in_the_sandbox_as_the_command_does(server: Server) -> None:
    course = server.course
    for student in STUDENTS:
        answered = server.autograde(student)
        assert answered["success"] is True, answered
        assert course.scores(student) == SCORES[student]
        assert course.result(student).metadata["isolate"]["layers"]
    by_click = {student: course.scores(student) for student in STUDENTS}
    for student in STUDENTS:
        assert course.nbgrader("autograde", "ps1", f"--student={student}", "--force").code == 0
    assert {student: course.scores(student) for student in STUDENTS} == by_click
    status, body = server.request("GET", "/formgrader/api/submission/ps1/right")
    assert status == 200
    assert json.loads(body)["score"] == 2


def warm(server: Server, student: str) -> dict[str, Any]:
    """What the first click answers that finds the templates which an earlier one missed."""
    answers = []

    def click() -> bool:
        answers.append(server.autograde(student))
        assert answers[-1]["success"] is True, answers
        return "(warm)" in answers[-1]["log"]

    assert eventually(click, 120), [one["log"] for one in answers]
    return answers[-1]


def test_a_later_click_finds_what_an_earlier_one_missed(server: Server) -> None:
    course = server.course
    first = server.autograde("wrong")["log"]
    assert re.search(r"\((warm|cold: there is no template yet)\)", first), first
    for student in STUDENTS:
        answered = warm(server, student)
        assert "cold" not in answered["log"]
        assert course.scores(student) == SCORES[student]
    course.configure("c.IsolatedExecute.warm = False\n")
    try:
        answered = server.autograde("right")
    finally:
        course.configure("c.IsolatedExecute.warm = True\n")  # a server remembers what a file no longer says
        server.autograde("right")
        course.configure("")
    assert "(cold)" in answered["log"]


@pytest.mark.parametrize("start", ["cold", "warm"])
def test_the_students_code_knows_nothing_of_the_server(server: Server, start: str) -> None:
    answered = server.autograde("spy") if start == "cold" else warm(server, "spy")
    assert answered["success"] is True, answered
    assert server.course.scores("spy") == SCORES["spy"]
    text = printed(find(server.course.result("spy"), "one"))
    said = json.loads(text)
    assert server.token not in text
    assert SECRET not in text
    assert not [name for name in said["environ"] if name.startswith("JUPYTER")]
    assert "jupyter_server" not in said["others"]
    assert said["files"] == []
    assert said["connected"] == []
    # the control: from here all of that can be found
    assert server.token in Path(f"/proc/{server.process.pid}/environ").read_text()
    socket.create_connection(("127.0.0.1", server.port), 5).close()


def test_a_refused_submission_says_why_and_others_are_graded(server: Server) -> None:
    answered = server.autograde("refused")
    assert answered["success"] is False
    assert "refused (ps1): 'data.txt' is a symbolic link" in answered["error"]
    assert not server.course.autograded("refused").exists()
    assert server.autograde("right")["success"] is True


def test_a_fault_of_the_host_fails_and_keeps_the_score(server: Server) -> None:
    course = server.course
    assert server.autograde("right")["success"] is True
    executed = course.result("right")
    course.configure("c.IsolatedExecute.read_only = ['/nowhere/at/all']\n")
    try:
        answered = server.autograde("right")
    finally:
        course.configure("")
    assert answered["success"] is False
    assert "No score for notebook 'p1'" in answered["error"] + answered["log"]
    assert "/nowhere/at/all" in answered["error"] + answered["log"]
    assert course.scores("right") == SCORES["right"]
    assert course.result("right") == executed
    server.process.poll()
    assert server.process.returncode is None


def test_a_killed_server_leaves_no_template(server: Server) -> None:
    """The last one here."""
    server.course.configure("c.IsolatedExecute.read_only = []\n")  # a server remembers what a file no longer says
    warm(server, "right")
    left = descendants(server.process.pid)
    assert len(left) > 5, [command_of(one) for one in left]
    server.process.kill()
    server.process.wait()
    assert eventually(lambda: not left & set(processes()), 20), [command_of(one) for one in left & set(processes())]
