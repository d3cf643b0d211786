"""A course graded by a service: the same notebooks and the same scores as here, and clear words when it cannot be."""

import json
import signal
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import nbformat
import pytest

import images
from attacks.harness import Stage, eventually
from e2e.courses import COURSE_ID, SECRET, Course, answer, check, code, contents, notebook
from nbgrader_aalto import remote
from service_host import LONG, Host, hosting, submission, texts
from service_host import notebook as code_notebook

pytestmark = pytest.mark.slow

STUDENTS: dict[str, dict[str, str]] = {
    "aino": {"one": "one = 1", "two": "print(open('left').read()); two = 2"},
    "eero": {"one": "one = 2", "two": "two = undefined"},
    # A second, so that what the kernel has said by then has left it: its count of the cell comes by another thread.
    "ilmari": {
        "one": "one = 1\nimport os, signal, time; time.sleep(1); os.kill(os.getpid(), signal.SIGKILL)",
        "two": "two = 2",
    },
    "outi": {"one": "import time; time.sleep(60)", "two": "import os; print(sorted(os.environ)); two = 2"},
}


@pytest.fixture(scope="module")
def service() -> Iterator[Host]:
    with hosting() as host:
        usual = {"environment": sys.prefix, "graders": {"tokens_only": True}}
        host.configure(**{COURSE_ID: usual, "narrow": {**usual, "limits": {"memory_bytes": "512M"}}})
        host.start()
        yield host


def settings(host: Host, token_file: Path, course: str = COURSE_ID) -> str:
    token_file.write_text(host.token(course))
    token_file.chmod(0o600)
    return (
        f"c.IsolatedExecute.service_url = {host.url!r}\nc.IsolatedExecute.service_token_file = {str(token_file)!r}\n"
        f"c.IsolatedExecute.service_course = {course!r}\nc.Execute.timeout = 5\n"
    )


@pytest.fixture(scope="module")
def course(make_course: Callable[..., Course], service: Host) -> Course:
    one = make_course("c.Execute.timeout = 5\n")
    first = notebook(answer("one"), code("open('left', 'w').write('of p1')"), check("test_one", "assert one == 1", 2))
    second = notebook(answer("two"), check("test_two", "assert two == 2", 3), check("part", "1.5", 4))
    one.add("ps1", {"p1": first, "p2": second}, {"data.txt": "tieto"})
    for student, answers in STUDENTS.items():
        one.submit(student, answers=answers, files={"data.txt": "tieto"})
    return one


def executed(course: Course, student: str) -> list[dict[str, Any]]:
    """The autograded notebooks without what differs from run to run: times, ids, who executed."""
    found = []
    for name in ("p1", "p2"):
        document = json.loads(nbformat.writes(course.result(student, name=name)))
        document["metadata"].pop("isolate")
        for cell in document["cells"]:
            cell["metadata"].pop("execution", None)
            cell.pop("id", None)
        found.append(document)
    return found


def test_scores_and_notebooks_are_the_same_as_here(course: Course, service: Host, tmp_path: Path) -> None:
    done = course.nbgrader("autograde", "ps1")
    assert done.code == 0, done.log
    here = {student: (course.scores(student), executed(course, student)) for student in STUDENTS}
    course.configure(settings(service, course.top / "token"))
    done = course.nbgrader("autograde", "ps1", "--force")
    assert done.code == 0, done.log
    assert "is done" in done.log
    for student in STUDENTS:
        assert course.scores(student) == here[student][0], student
        assert executed(course, student) == here[student][1], student
    assert here["aino"][0] == {"test_one": 2, "test_two": 3, "part": 1.5}
    assert course.result("aino").metadata["isolate"]["layers"]
    assert SECRET not in str([executed(course, student) for student in STUDENTS])
    with service.client(service.token(COURSE_ID)) as client:
        jobs = client.find(COURSE_ID, limit=200).jobs
    assert {job.kind for job in jobs} == {"batch"}
    assert len(jobs) == 2 * len(STUDENTS)


def test_an_unpacked_image_gives_the_same_scores_with_its_own_packages(
    course: Course, service: Host, stage: Stage
) -> None:
    image = {"image_root": str(images.course_image(stage)), "environment": str(images.PREFIX)}
    service.configure(image={**image, "graders": {"tokens_only": True}})
    assert service.process is not None
    service.process.send_signal(signal.SIGHUP)
    with service.client(service.token("image")) as client:
        assert eventually(lambda: len(client.courses()) == 1, LONG)
        version = f"import importlib.metadata as m; print(m.version({images.CHANGED!r}))"
        job = client.wait(client.submit("image", submission(), code_notebook(version)).id)
        assert texts(client.notebook(job.id)) == [f"{images.CHANGED_VERSION}\n"], job
    assert metadata.version(images.CHANGED) != images.CHANGED_VERSION
    course.configure("c.Execute.timeout = 5\n")
    assert course.click("aino")["success"]
    here = course.scores("aino"), executed(course, "aino")
    course.configure(settings(service, course.top / "token", "image"))
    result = course.click("aino")
    assert result["success"], result
    assert (course.scores("aino"), executed(course, "aino")) == here


def test_the_bolt_is_interactive_and_keeps_the_score(course: Course, service: Host) -> None:
    course.configure(settings(service, course.top / "token"))
    result = course.click("aino")
    assert result["success"], result
    assert course.scores("aino") == {"test_one": 2, "test_two": 3, "part": 1.5}
    with service.client(service.token(COURSE_ID)) as client:
        assert client.find(COURSE_ID, limit=1).jobs[0].kind == "interactive"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("c.IsolatedExecute.service_url = 'unix:///nonexistent/socket'\n", "cannot be reached"),
        ("c.IsolatedExecute.service_url = 'nonsense'\n", "address"),
        ("c.IsolatedExecute.service_course = 'nosuch'\n", "may not grade"),
        ("c.IsolatedExecute.service_token_file = '/nonexistent/token'\n", "token"),
        ("c.IsolatedExecute.memory = '1000G'\n", "memory_bytes"),
        ("c.IsolatedExecute.read_only = ['/coursedata']\n", "c.IsolatedExecute.read_only"),
        ("c.Execute.kernel_name = 'nosuch'\n", "nosuch"),
    ],
)
def test_without_the_service_there_is_no_score_and_nothing_is_lost(
    course: Course, service: Host, monkeypatch: pytest.MonkeyPatch, change: str, says: str
) -> None:
    monkeypatch.setattr(remote, "PATIENCE_SECONDS", 1.0)
    course.configure(settings(service, course.top / "token"))
    assert course.click("eero")["success"]
    before = contents(course.autograded("eero")), course.scores("eero")
    course.configure(settings(service, course.top / "token") + change)
    result = course.click("eero")
    assert not result["success"]
    assert says in result["log"]
    assert "not the student's fault" in result["log"]
    assert (contents(course.autograded("eero")), course.scores("eero")) == before


def test_a_token_that_others_can_read_is_not_used(course: Course, service: Host) -> None:
    course.configure(settings(service, course.top / "token"))
    (course.top / "token").chmod(0o644)
    result = course.click("eero")
    (course.top / "token").chmod(0o600)
    assert not result["success"]
    assert "token" in result["log"]
    assert (course.top / "token").read_text() not in result["log"]


def test_ctrl_c_cancels_the_job(course: Course, service: Host) -> None:
    course.configure(settings(service, course.top / "token"))
    process = course.start("autograde", "ps1", "--force", "--student=outi")
    with service.client(service.token(COURSE_ID)) as client:
        assert eventually(lambda: bool(client.find(COURSE_ID, student="outi", state=["running"]).jobs), LONG)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=LONG)
        assert eventually(lambda: not client.find(COURSE_ID, student="outi", state=["running", "queued"]).jobs, LONG)
        assert client.find(COURSE_ID, student="outi", limit=1).jobs[0].state == "cancelled"
