"""`nbgrader autograde` is killed, or interrupted, while a student's code runs: nothing is left, nothing is lost."""

import dataclasses
import json
import os
import secrets
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.courses import Course, answer, check, contents, notebook
from e2e.host import command_of, descendants, eventually, leases, marked, mounts, processes

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("killed")]

GONE_SECONDS = 20.0  # on a busy host; alone it takes a tenth of a second
FULL = {"test_one": 2}
ENDLESS = """
import subprocess, sys
one = 1
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)", "{marker}"], start_new_session=True)
while True:
    pass
"""


@dataclasses.dataclass
class Running:
    """`nbgrader autograde`, busy with the endless notebook of bertha, whose earlier result is put aside."""

    course: Course
    process: "subprocess.Popen[str]"
    marker: str
    temporary: Path
    leases_before: set[str]
    mounts_before: set[str]

    def everybody(self) -> set[tuple[int, str]]:
        return descendants(self.process.pid) | marked(self.marker)


@pytest.fixture
def running(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Running]:
    marker, course, temporary = secrets.token_hex(8), Course(tmp_path / "with blank"), tmp_path / "tmp ä"
    temporary.mkdir()
    course.add("ps1", {"p1": notebook(answer("one"), check("test_one", "assert one == 1", 2))})
    for student in ("anna", "bertha", "carla"):
        course.submit(student, answers={"one": "one = 1"})
    if request.param == "again":
        assert course.click("bertha")["success"]
        assert course.scores("bertha") == FULL
    bertha = course.root / "submitted/bertha/ps1/p1.ipynb"
    right = bertha.read_text()
    bertha.write_text(right.replace('"one = 1"', json.dumps(ENDLESS.replace("{marker}", marker))))
    before = (leases(), mounts())
    process = course.start("autograde", "ps1", "--force", "--Execute.timeout=1000", TMPDIR=str(temporary))
    one = Running(course, process, marker, temporary, *before)
    result = course.autograded("bertha")
    turn = result.with_name(".ps1.before") if request.param == "again" else result
    try:
        started = eventually(lambda: (marked(marker) and turn.exists()) or process.poll() is not None)
        assert started, "the student's code did not start, or it is not bertha's turn"
        assert process.poll() is None, process.communicate()[0]
        yield one
    finally:
        process.kill()
        process.communicate()


def restore(course: Course) -> None:
    """The student hands in something that ends."""
    path = course.root / "submitted/bertha/ps1/p1.ipynb"
    path.unlink()
    path.write_text((course.root / "submitted/anna/ps1/p1.ipynb").read_text())


def assert_nothing_is_left(running: Running, before: set[tuple[int, str]]) -> None:
    def left() -> set[tuple[int, str]]:
        return (before & set(processes())) | marked(running.marker)

    assert eventually(lambda: not left(), GONE_SECONDS), [command_of(process) for process in left()]
    assert not mounts() - running.mounts_before
    assert list(running.temporary.iterdir()) == []


@pytest.mark.parametrize("running", ["again"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_and_the_earlier_result_is_not_lost(running: Running, number: signal.Signals) -> None:
    course, everybody = running.course, running.everybody()
    assert len(everybody) > 5, "a sandbox has more processes than that"
    uids = {os.stat(f"/proc/{pid}").st_uid for pid, _ in marked(running.marker)}
    earlier = contents(course.root / "autograded/bertha/.ps1.before")
    assert set(earlier) == {"p1.ipynb"}
    if number == signal.SIGINT:
        os.killpg(running.process.pid, number)  # as the terminal does
    else:
        running.process.send_signal(number)
    log, _ = running.process.communicate(timeout=GONE_SECONDS)
    assert running.process.returncode != 0, log
    assert_nothing_is_left(running, everybody)
    if os.geteuid() == 0:
        ours = {f"isolate-uid-{uid}" for uid in uids} - running.leases_before
        assert ours
        assert not ours & leases()
    # the next run fails for a reason of the host, and the earlier result is there again
    assert course.click("bertha", changes={"IsolatedExecute": {"memory": "lots"}})["success"] is False
    assert contents(course.autograded("bertha")) == earlier
    assert not list(course.autograded("bertha").parent.glob(".*"))
    assert course.scores("bertha") == FULL
    # and one that does not grades everybody
    restore(course)
    done = course.nbgrader("autograde", "ps1", "--force")
    assert done.code == 0, done.log
    assert [course.scores(student) for student in ("anna", "bertha", "carla")] == [FULL] * 3
    assert [path.name for path in course.autograded("bertha").parent.iterdir()] == ["ps1"]


@pytest.mark.parametrize("running", ["first"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_half_made_first_result_is_not_taken_for_a_whole_one(running: Running, number: signal.Signals) -> None:
    """Stock nbgrader leaves the sanitised notebook behind and from then on skips that student."""
    course, everybody = running.course, running.everybody()
    os.killpg(running.process.pid, number)
    running.process.communicate(timeout=GONE_SECONDS)
    assert_nothing_is_left(running, everybody)
    assert set(course.scores("bertha").values()) <= {None}
    restore(course)
    done = course.nbgrader("autograde", "ps1")
    assert done.code == 0, done.log
    assert [course.scores(student) for student in ("anna", "bertha", "carla")] == [FULL] * 3
    assert course.result("bertha").metadata["isolate"]["ended"] == "finished"
    assert [path.name for path in course.autograded("bertha").parent.iterdir()] == ["ps1"]
