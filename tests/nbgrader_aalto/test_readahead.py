"""Reading ahead, with warm kernels: the same scores and files as without, nothing not asked for, and nothing left."""

import json
import os
import re
import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import nbformat
import pytest
from nbformat import NotebookNode
from nbgrader.api import Gradebook

from e2e.courses import COURSE_ID, Course, Done, answer, check, code, notebook
from e2e.host import command_of, descendants, eventually, leases, marked, mounts, processes
from isolate.notebook import Execution
from isolate.policy import SandboxError
from nbgrader_aalto import readahead
from nbgrader_aalto.orders import Stop
from nbgrader_aalto.readahead import ReadAhead

slow = pytest.mark.slow
pytestmark = pytest.mark.xdist_group("readahead")

GONE_SECONDS = 20.0
FULL = {"test_one": 2, "test_two": 3}
RIGHT = {"one": "one = 1", "two": "print(open('left').read()); two = 2"}
HOSTILE = """
import os, signal
open("helper.py", "w").write("raise SystemExit")
os.symlink("/etc/passwd", "link")
one = 1
"""
STUDENTS: dict[str, dict[str, str]] = {
    "anna": RIGHT,
    "bertha": {"one": "one = 2", "two": "import os, time; time.sleep(1); os._exit(3)"},
    "carla": {**RIGHT, "one": "one = 1\nimport time; time.sleep(1); os = __import__('os'); os.kill(os.getpid(), 9)"},
    "dora": {**RIGHT, "one": "while True: pass"},
    "edith": {**RIGHT, "one": HOSTILE, "two": "two = 2"},
    "fanny": {"one": "one = undefined", "two": "import helper; two = helper.TWO"},
}


def pair() -> dict[str, NotebookNode]:
    first = notebook(answer("one"), code("open('left', 'w').write('of p1')"), check("test_one", "assert one == 1", 2))
    return {"p1": first, "p2": notebook(answer("two"), check("test_two", "assert two == 2", 3))}


def without_ids(document: NotebookNode) -> None:
    """Format 4.5 without the ids that it demands: nbformat makes up others each time."""
    document.nbformat_minor = 5
    for cell in document.cells:
        cell.pop("id", None)


def executed(course: Course, student: str, name: str) -> dict[str, Any]:
    """Without what differs from run to run."""
    document: dict[str, Any] = json.loads(nbformat.writes(course.result(student, name=name)))
    for cell in document["cells"]:
        cell["metadata"].pop("execution", None)
        cell.pop("id", None)
    return document


def ahead(log: str) -> int:
    """How many notebooks were executed ahead, by the command's own word."""
    found = re.search(r"(\d+) notebook\(s\) were executed ahead", log)
    assert found, log[-3000:]
    return int(found[1])


def sandboxes(done: Done) -> int:
    """How many notebooks were executed at all, ahead or not; needs --debug."""
    return len(re.findall(r"Cell 1 started", done.log))


@pytest.fixture(scope="module")
def course(make_course: Callable[..., Course]) -> Course:
    one = make_course("c.Execute.timeout = 3\n")
    one.add("ps1", pair(), {"helper.py": "TWO = 2\n"})
    for student, answers in STUDENTS.items():
        one.submit(student, answers=answers, files={"sub dir/data ä.txt": "x", "own.txt": student})
    for student in ("anna", "fanny"):
        for path in (one.root / "submitted" / student / "ps1").glob("*.ipynb"):
            document = nbformat.read(path, as_version=4)
            without_ids(document)
            path.write_text(json.dumps(document))
    return one


@slow
def test_scores_and_notebooks_are_the_same_as_without(course: Course) -> None:
    plain = course.click("*", changes={"IsolatedExecute": {"jobs": 1}})
    assert plain["success"], plain
    assert "executed ahead" not in plain["log"]
    before = {student: course.scores(student) for student in STUDENTS}
    documents = {(s, n): executed(course, s, n) for s in STUDENTS for n in ("p1", "p2")}
    assert before["anna"] == FULL
    assert before["fanny"] == {"test_one": 0, "test_two": 3}
    assert before["carla"]["test_one"] == before["dora"]["test_one"] == before["bertha"]["test_two"] == 0
    children, threads = descendants(os.getpid()), threading.active_count()
    done = course.click("*", changes={"IsolatedExecute": {"jobs": 4}})
    left = descendants(os.getpid()) - children
    assert done["success"], done
    assert ahead(done["log"]) == 2 * len(STUDENTS)
    assert {student: course.scores(student) for student in STUDENTS} == before
    for (student, name), document in documents.items():
        assert executed(course, student, name) == document, (student, name)
    # in a server that goes on
    assert not left, [command_of(one) for one in left]
    assert threading.active_count() <= threads


@slow
def test_what_changes_before_its_turn_is_executed_anew(make_course: Callable[..., Course]) -> None:
    """While the first student's notebook runs, others' submissions change: a notebook, and a file."""
    one, marker = make_course("c.IsolatedExecute.jobs = 4\n"), secrets.token_hex(8)
    waits = f"""
import subprocess, sys
subprocess.run([sys.executable, "-c", "import time; time.sleep(3600)", "{marker}"])
one = 1
"""
    one.add("ps1", pair())
    one.submit("anna", answers={**RIGHT, "one": waits})
    one.submit("bertha", answers={**RIGHT, "one": "one = 2"})
    one.submit("carla", answers={**RIGHT, "one": "one = int(open('n').read())"}, files={"n": "2"})
    one.submit("dora", answers=RIGHT)
    process = one.start("autograde", "ps1", "--debug", "--Execute.timeout=200")
    lines: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if sum("Cell 1 finished" in text for text in lines) == 6:  # all but anna's
            break
    bertha = one.root / "submitted/bertha/ps1/p1.ipynb"
    bertha.write_text(bertha.read_text().replace("one = 2", "one = 1"))
    (one.root / "submitted/carla/ps1/n").write_text("1")
    assert eventually(lambda: marked(marker))
    for pid, _ in marked(marker):
        os.kill(pid, signal.SIGKILL)
    rest, _ = process.communicate(timeout=120)
    log = "".join(lines) + rest
    assert process.returncode == 0, log
    students = ("anna", "bertha", "carla", "dora")
    assert {student: one.scores(student) for student in students} == dict.fromkeys(students, FULL)
    assert ahead(log) == 4


@slow
def test_only_those_are_executed_whom_nbgrader_asks_for(make_course: Callable[..., Course]) -> None:
    one = make_course("c.IsolatedExecute.jobs = 2\nc.Autograde.create_student = False\n")
    one.add("ps1", pair())
    for student in ("done", "excluded", "known", "linked", "piped", "unknown"):
        one.submit(student, answers=RIGHT)
    with Gradebook(f"sqlite:///{one.root}/gradebook.db", COURSE_ID) as gradebook:
        for student in ("done", "excluded", "known", "linked", "piped"):
            gradebook.add_student(student)
    one.autograded("done").mkdir(parents=True)
    os.symlink("/etc/passwd", one.root / "submitted/linked/ps1/link")
    one.autograded("piped").mkdir(parents=True)
    (one.autograded("piped") / "timestamp.txt").write_text("2026-01-01 00:00:00 UTC")
    os.mkfifo(one.root / "submitted/piped/ps1/timestamp.txt")  # whoever opens it, waits
    done = one.nbgrader("autograde", "ps1", "--debug", "--CourseDirectory.student_id_exclude=excluded")
    assert done.code == 1, done.log
    assert sandboxes(done) == ahead(done.log) == 2, done.log
    assert one.scores("known") == FULL
    assert "Skipping existing assignment" in done.log
    assert "Refused: student linked" in done.log
    assert "Refused: student piped" in done.log
    assert "No student with ID 'unknown'" in done.log


@slow
def test_a_host_fault_is_met_again_in_the_students_turn(course: Course) -> None:
    others = ",".join(list(STUDENTS)[2:])
    changes = {"CourseDirectory": {"student_id_exclude": others}, "IsolatedExecute": {"jobs": 2, "memory": "8M"}}
    done = course.click("*", changes=changes)
    assert not done["success"]
    assert done["log"].count("once more") == 2
    assert done["log"].count("No score for notebook 'p1'") >= 2
    assert ahead(done["log"]) == 0


@slow
@pytest.mark.parametrize(("number", "warm"), [(signal.SIGINT, True), (signal.SIGINT, False), (signal.SIGTERM, True)])
def test_nothing_is_left_when_it_is_stopped(tmp_path: Path, number: signal.Signals, warm: bool) -> None:
    marker, one, temporary = secrets.token_hex(8), Course(tmp_path / "with blank"), tmp_path / "tmp"
    temporary.mkdir()
    one.configure(f"c.Execute.timeout = 1000\nc.IsolatedExecute.jobs = 3\nc.IsolatedExecute.warm = {warm}\n")
    one.add("ps1", {"p1": notebook(answer("one"), check("test_one", "assert one == 1", 2))})
    endless = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)", "{marker}"], start_new_session=True)
while True: pass
"""
    for student in ("anna", "bertha", "carla", "dora"):
        one.submit(student, answers={"one": endless})
    mounts_before, leases_before = mounts(), leases()
    process = one.start("autograde", "ps1", TMPDIR=str(temporary))
    try:
        assert eventually(lambda: len(marked(marker)) == 3 or process.poll() is not None)
        assert process.poll() is None, process.communicate()[0]
        everybody = descendants(process.pid) | marked(marker)
        ours = {f"isolate-uid-{os.stat(f'/proc/{pid}').st_uid}" for pid, _ in marked(marker)} - leases_before
        os.killpg(process.pid, number)
        log, _ = process.communicate(timeout=GONE_SECONDS)
    finally:
        process.kill()
    assert process.returncode != 0, log

    def left() -> set[tuple[int, str]]:
        return (everybody & set(processes())) | marked(marker)

    assert eventually(lambda: not left(), GONE_SECONDS), [command_of(process) for process in left()]
    assert not mounts() - mounts_before
    assert not ours & leases()
    assert ours or os.geteuid() != 0
    assert list(temporary.iterdir()) == []


# --- the window, without sandboxes


class Waits:
    """An order that ends when it is let, or stopped."""

    def __init__(self, key: str = "a") -> None:
        self.key, self.go, self.began = key, threading.Event(), threading.Event()

    def run(self, files: IO[bytes], keep: IO[bytes], stop: Stop | None = None) -> Execution:
        assert stop is not None
        self.began.set()
        with stop.by(self.go.set):
            assert self.go.wait(10)
        if stop.requested:
            raise SandboxError("launcher", "stopped")
        keep.write(files.read() + b"+")
        keep.flush()
        return Execution(NotebookNode(), None)  # type: ignore[arg-type]


def files_of(content: bytes) -> IO[bytes]:
    file: IO[bytes] = tempfile.TemporaryFile()
    file.write(content)
    file.seek(0)
    return file


def window(jobs: int, *chains: list[Waits]) -> ReadAhead:
    made = ReadAhead(jobs, lambda: None, lambda text: None)
    for number, orders in enumerate(chains):
        made.add("ps1", str(number), files_of(b"x"), [(str(at), order) for at, order in enumerate(orders)])  # type: ignore[misc]
    return made


def test_the_window_is_bounded_and_so_are_the_sandboxes() -> None:
    chains = [[Waits()] for _ in range(4)]
    made = window(2)
    assert made.wanted == 4
    made = window(2, *chains)
    assert made.wanted == 0
    assert chains[0][0].began.wait(5)
    assert chains[1][0].began.wait(5)
    time.sleep(0.1)
    assert not chains[2][0].began.is_set()
    assert (made.running, made.waiting) == (2, 2)
    entered = threading.Event()

    def enter() -> None:
        with made.alone():
            entered.set()

    threading.Thread(target=enter).start()
    assert not entered.wait(0.1)
    chains[0][0].go.set()
    assert entered.wait(5)  # before the third, which has waited longer
    assert made.take("ps1", "0", "0", chains[0][0], files_of(b"x")) is not None  # type: ignore[arg-type]
    assert made.wanted == 0  # its turn is not over
    made.drop("ps1", "0")
    assert made.wanted == 1
    before = threading.active_count()
    made.stop()
    made.join()
    assert threading.active_count() <= before - 2
    assert made.running == 0


def test_a_result_is_for_the_same_order_and_the_same_files_only() -> None:
    for key, content, taken in (("a", b"x", True), ("b", b"x", False), ("a", b"y", False)):
        first, second = Waits(), Waits()
        made = window(1, [first, second])
        first.go.set()
        second.go.set()
        asked = Waits(key)
        assert (made.take("ps1", "0", "0", asked, files_of(content)) is not None) == taken  # type: ignore[arg-type]
        # what the first left is what the second starts with
        result = made.take("ps1", "0", "1", Waits(), files_of(b"x+"))  # type: ignore[arg-type]
        assert (result is not None) == taken
        made.stop()
        made.join()


def test_wrong_guesses_end_the_guessing() -> None:
    said: list[str] = []
    made = ReadAhead(4, lambda: None, said.append)
    for number in range(3):
        made.add("ps1", str(number), files_of(b"x"), [("p1", Waits())])  # type: ignore[list-item]
    for number in range(3):
        assert made.wanted
        assert made.take("ps1", str(number), "p1", Waits("other"), files_of(b"x")) is None  # type: ignore[arg-type]
    assert made.wanted == 0
    assert len(said) == 1
    made.stop()
    made.join()


def test_no_more_sandboxes_than_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readahead, "processors", lambda: 8)
    monkeypatch.setattr(readahead, "available_bytes", lambda: 7 << 30)
    assert [readahead.automatic_jobs(size << 30) for size in (1, 2, 3, 9)] == [7, 3, 2, 1]
    monkeypatch.setattr(readahead, "processors", lambda: 2)
    assert readahead.automatic_jobs(1 << 30) == 2


def test_available_memory_is_a_part_of_this_machines() -> None:
    assert 0 < readahead.available_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
