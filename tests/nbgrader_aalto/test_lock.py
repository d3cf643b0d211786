"""The lock: one holder at a time, whatever is killed or stopped, and nobody waits for the dead."""

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from nbgrader_aalto import lock

MODULE = Path(lock.__file__)
NEVER = 3600.0
"""A heartbeat is never that old in a test: only a process that is known to be gone is dead."""
LOAD = """
import fcntl, importlib.util, os, random, signal, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("lock", sys.argv[1])
lock = importlib.util.module_from_spec(spec)
sys.modules["lock"] = lock
spec.loader.exec_module(lock)
directory = Path(sys.argv[2])
"""
HOLD = """
wait, stale = map(float, sys.argv[3:5])
def say(word): print(word, flush=True)
try:
    with lock.locked(directory, "ps1", "collecting 'ps1'", wait_seconds=wait, stale_seconds=stale,
                     log=lambda text: say("log " + text)) as held:
        say("held")
        for line in sys.stdin:
            if line == "leave\\n":
                break
            try:
                held.check()
                say("ours")
            except lock.LockLost as error:
                say(f"lost {error}")
    say("left")
except lock.Busy as error:
    say(f"busy {error}")
except lock.LockLost as error:
    say("left, lost")
"""
COUNT = """
for _ in range(int(sys.argv[3])):
    with lock.locked(directory, "counter", "counting"):
        number = int((directory / "number").read_text())
        (directory / "number").write_text(str(number + 1))
"""
CONTEND = """
# SIGALRM ends the process at once, as kill -9 does: nothing is cleaned up, wherever it is
signal.signal(signal.SIGALRM, signal.SIG_DFL)
rounds, mortal, witness = int(sys.argv[3]), sys.argv[4] == "mortal", os.open(sys.argv[5], os.O_RDWR)
if mortal:
    signal.setitimer(signal.ITIMER_REAL, random.uniform(0.001, 0.1))
while rounds > 0:
    with lock.locked(directory, "race", "racing", wait_seconds=60, stale_seconds=3600):
        try:
            fcntl.flock(witness, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it when a process dies
        except BlockingIOError:
            os._exit(77)
        if mortal and random.random() < 0.5:
            os.kill(os.getpid(), signal.SIGKILL)
        fcntl.flock(witness, fcntl.LOCK_UN)
        rounds -= not mortal
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "kurssi ä" / ".locks"


@pytest.fixture(autouse=True)
def _parent(directory: Path) -> None:
    directory.parent.mkdir()


class Process:
    """Another process that holds the lock `ps1`, or waits for it, and does what it is told."""

    def __init__(self, directory: Path, *, wait: float = 60.0, stale: float = NEVER, **how: Any) -> None:
        python, module = how.pop("python", sys.executable), how.pop("module", MODULE)
        self.popen = subprocess.Popen(
            [python, "-c", LOAD + HOLD, module, directory, str(wait), str(stale)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            **how,
        )

    def answer(self) -> str:
        assert self.popen.stdout
        return self.popen.stdout.readline().rstrip("\n")

    def tell(self, word: str) -> str:
        assert self.popen.stdin
        self.popen.stdin.write(word + "\n")
        self.popen.stdin.flush()
        return self.answer()

    def kill(self) -> None:
        """Dead when this returns, and not waited for: a zombie, as below a parent that does not care."""
        self.popen.kill()
        os.waitid(os.P_PID, self.popen.pid, os.WEXITED | os.WNOWAIT)


Start = Callable[..., Process]


@pytest.fixture
def start(directory: Path) -> Iterator[Start]:
    processes: list[Process] = []

    def run(place: Path = directory, **how: Any) -> Process:
        processes.append(Process(place, **how))
        return processes[-1]

    yield run
    for process in processes:
        process.popen.kill()
        process.popen.communicate()


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for what has no event."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def files(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def change(file: Path, **fields: Any) -> None:
    """Write other fields into a lock that is held; as in life, the file stays the same one."""
    text = json.dumps(json.loads(file.read_text()) | fields)
    with file.open("r+") as opened:
        opened.write(text)
        opened.truncate()


OTHER_HOST = {"boot_id": "00000000-0000-0000-0000-000000000000"}


def test_many_processes_count_without_losing_one(directory: Path) -> None:
    directory.mkdir()
    (directory / "number").write_text("0")
    counters = [
        subprocess.Popen([sys.executable, "-c", LOAD + COUNT, MODULE, directory, "25"], stderr=subprocess.PIPE)
        for _ in range(6)
    ]
    for counter in counters:
        errors = counter.communicate()[1]
        assert counter.returncode == 0, errors
    assert (directory / "number").read_text() == str(6 * 25)
    assert files(directory) == ["number"]


def test_threads_of_one_process_exclude_each_other(directory: Path) -> None:
    with lock.locked(directory, "ps1", "collecting", wait_seconds=0):
        with lock.locked(directory, "ps2", "collecting", wait_seconds=0):
            pass
        refused: list[lock.Busy] = []

        def other() -> None:
            try:
                with lock.locked(directory, "ps1", "collecting", wait_seconds=0):
                    pass
            except lock.Busy as error:
                refused.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert [error.holder and error.holder.pid for error in refused] == [os.getpid()]
    assert files(directory) == []


def test_busy_says_who_what_where_and_since_when(directory: Path, start: Start) -> None:
    before = datetime.now(UTC) - timedelta(seconds=2)
    holder = start()
    assert holder.answer() == "held"
    waited: list[str] = []
    with pytest.raises(lock.Busy) as caught:
        with lock.locked(directory, "ps1", "releasing", wait_seconds=0.3, log=waited.append):
            pytest.fail("two holders")
    found = caught.value.holder
    assert found is not None
    assert (found.pid, found.purpose) == (holder.popen.pid, "collecting 'ps1'")
    assert before < found.since < datetime.now(UTC) + timedelta(seconds=2)
    who = (
        f"{found.user} has been collecting 'ps1' on host {found.host} (process {found.pid}) "
        f"since {found.since:%Y-%m-%d %H:%M:%S} UTC"
    )
    assert str(caught.value) == f"{who}; waited 0 s. Try again when it is done."
    assert waited == [f"waiting: {who}"]
    assert holder.tell("leave") == "left"
    assert files(directory) == []


def test_who_waits_gets_it_when_it_is_free(directory: Path, start: Start) -> None:
    with lock.locked(directory, "ps1", "releasing") as held:
        waiter = start()
        assert waiter.answer() == f"log waiting: {held.holder}"
        held.check()
    assert waiter.answer() == "held"
    assert waiter.tell("check") == "ours"
    assert waiter.tell("leave") == "left"


def test_the_lock_of_a_killed_process_is_taken_at_once(directory: Path, start: Start) -> None:
    holder = start()
    assert holder.answer() == "held"
    holder.kill()
    told: list[str] = []
    with lock.locked(directory, "ps1", "releasing", wait_seconds=0, stale_seconds=NEVER, log=told.append) as held:
        held.check()
        assert held.holder.pid == os.getpid()
        assert len(files(directory)) == 2  # the lock, and its own name
    assert len(told) == 1
    assert told[0].startswith("taking over from a process that is dead: ")
    assert files(directory) == []


def test_a_process_number_that_somebody_else_has_now_is_dead(directory: Path, start: Start) -> None:
    holder = start()
    assert holder.answer() == "held"
    change(directory / "ps1.lock", start_time=1)
    with lock.locked(directory, "ps1", "releasing", wait_seconds=0, stale_seconds=NEVER):
        pass


def test_killed_anywhere_there_are_never_two_holders_and_no_deadlock(directory: Path, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    witness.touch()
    command = [sys.executable, "-c", LOAD + CONTEND, MODULE, directory]
    lasting = [subprocess.Popen([*command, "80", "lasting", witness]) for _ in range(3)]
    deaths = 0
    while any(process.poll() is None for process in lasting):
        mortal = [subprocess.Popen([*command, "1", "mortal", witness]) for _ in range(2)]
        ends = [process.wait() for process in mortal]
        assert set(ends) <= {-signal.SIGKILL, -signal.SIGALRM}
        deaths += len(ends)
    assert [process.returncode for process in lasting] == [0, 0, 0]
    assert deaths > 5
    with lock.locked(directory, "race", "cleaning up", wait_seconds=0, stale_seconds=NEVER):
        pass
    # who was killed before it had written its name is nobody that could be known to be dead
    assert [name for name in files(directory) if (directory / name).stat().st_size] == []


def dead_lock(directory: Path, start: Start) -> str:
    """A lock whose holder was killed; returns its token."""
    holder = start()
    assert holder.answer() == "held"
    holder.kill()
    token: str = json.loads((directory / "ps1.lock").read_text())["token"]
    return token


def test_of_those_who_find_a_dead_lock_one_removes_it(directory: Path, start: Start) -> None:
    with lock.locked(directory, "another", "being at work") as alive:
        token = dead_lock(directory, start)
        os.link(directory / f"another.{alive.holder.token}", directory / f"ps1.{token}.1")
        assert start(wait=0).answer().startswith("busy ")
        waiter = start()
        assert waiter.answer().startswith("log waiting: ")
        assert json.loads((directory / "ps1.lock").read_text())["token"] == token
        (directory / f"ps1.{token}.1").unlink()
        assert waiter.answer().startswith("log taking over ")
        assert waiter.answer() == "held"
        assert waiter.tell("leave") == "left"
    assert files(directory) == []


def test_who_was_killed_while_removing_a_dead_lock_stops_nobody(directory: Path, start: Start) -> None:
    token = dead_lock(directory, start)
    for turn in (1, 2):
        shutil.copyfile(directory / "ps1.lock", directory / f"ps1.{token}.{turn}")
    with lock.locked(directory, "ps1", "releasing", wait_seconds=0, stale_seconds=NEVER) as held:
        held.check()
    assert files(directory) == []


def test_who_lets_go_while_taken_for_dead_leaves_a_dead_lock(directory: Path) -> None:
    with lock.locked(directory, "another", "being at work") as alive:
        with lock.locked(directory, "ps1", "releasing", stale_seconds=NEVER) as held:
            right = directory / f"ps1.{held.holder.token}.1"
            os.link(directory / f"another.{alive.holder.token}", right)
        assert (directory / "ps1.lock").exists()  # removing it is the other's right
        right.unlink()
        with lock.locked(directory, "ps1", "releasing", wait_seconds=0, stale_seconds=NEVER):
            pass
    assert files(directory) == []


@contextlib.contextmanager
def attempt(directory: Path, stale_seconds: float) -> Iterator[lock._Attempt]:
    """What `locked` is made of, to stop where no test could stop a process."""
    descriptor = os.open(directory, os.O_RDONLY)
    made = lock._Attempt(lock._Files(descriptor, directory, "ps1", stale_seconds), "being in between")
    try:
        yield made
    finally:
        made.close()
        os.close(descriptor)


def test_who_comes_late_to_a_dead_lock_leaves_the_next_one_alone(directory: Path, start: Start) -> None:
    token = dead_lock(directory, start)
    with lock.locked(directory, "ps1", "releasing", wait_seconds=0) as held:
        with attempt(directory, stale_seconds=0) as late:
            assert late._end(token)  # it is gone, whoever removed it
            held.check()
    assert files(directory) == []


def be_taken_for_dead(directory: Path) -> None:
    with lock.locked(directory, "ps1", "releasing", stale_seconds=NEVER) as held:
        with attempt(directory, stale_seconds=NEVER) as other:
            assert not other._end(held.holder.token)
        assert json.loads((directory / "ps1.lock").read_text())["token"] == held.holder.token
        held.check()
        pytest.fail("went on")


def test_who_is_found_alive_at_the_last_moment_keeps_others_out_and_may_not_go_on(directory: Path) -> None:
    with pytest.raises(lock.LockLost):
        be_taken_for_dead(directory)
    with lock.locked(directory, "ps1", "releasing", wait_seconds=0, stale_seconds=NEVER):
        pass
    assert files(directory) == []


@pytest.mark.parametrize("place", [{}, OTHER_HOST], ids=["this host", "another host"])
def test_who_stands_still_is_replaced_and_learns_it(directory: Path, start: Start, place: dict[str, str]) -> None:
    holder = start(stale=1.0)
    assert holder.answer() == "held"
    change(directory / "ps1.lock", **place)
    holder.popen.send_signal(signal.SIGSTOP)
    with lock.locked(directory, "ps1", "releasing 'ps1'", stale_seconds=1.0) as held:
        holder.popen.send_signal(signal.SIGCONT)
        lost = holder.tell("check")
        assert lost.startswith("lost the lock ")
        assert str(held.holder) in lost
        assert holder.tell("leave") == "left, lost"
        held.check()
    assert files(directory) == []


def test_of_another_host_only_the_heartbeat_counts(directory: Path, start: Start) -> None:
    holder = start()
    assert holder.answer() == "held"
    change(directory / "ps1.lock", **OTHER_HOST)
    holder.kill()
    with pytest.raises(lock.Busy):
        with lock.locked(directory, "ps1", "releasing", wait_seconds=0, stale_seconds=NEVER):
            pytest.fail("two holders")
    os.utime(directory / "ps1.lock", (1, 1))
    with lock.locked(directory, "ps1", "releasing", wait_seconds=0, stale_seconds=NEVER):
        pass


def test_looking_tells_whether_somebody_is_at_work_and_touches_nothing(
    directory: Path, start: Start, tmp_path: Path
) -> None:
    assert not lock.is_held(directory, "ps1")
    assert not lock.is_held(tmp_path / "missing", "ps1")
    holder = start()
    assert holder.answer() == "held"
    before = {name: (directory / name).lstat() for name in files(directory)}
    assert lock.is_held(directory, "ps1", stale_seconds=NEVER)
    assert not lock.is_held(directory, "another", stale_seconds=NEVER)
    change(directory / "ps1.lock", **OTHER_HOST)
    assert lock.is_held(directory, "ps1", stale_seconds=NEVER)
    assert files(directory) == sorted(before)
    os.utime(directory / "ps1.lock", (1, 1))
    assert not lock.is_held(directory, "ps1"), "its heart has not beaten for long"
    other = start(tmp_path)
    assert other.answer() == "held"
    other.kill()
    assert not lock.is_held(tmp_path, "ps1", stale_seconds=NEVER), "its process is gone"
    assert files(tmp_path) != []


def test_the_heart_beats(directory: Path) -> None:
    with lock.locked(directory, "ps1", "releasing", stale_seconds=1.0) as held:
        file = directory / "ps1.lock"
        for _ in range(3):
            os.utime(file, (1, 1))
            eventually(lambda: file.stat().st_mtime > 1)
        held.check()


def test_who_was_taken_for_dead_and_looks_first_keeps_the_lock(directory: Path, start: Start) -> None:
    """`check` beats before it looks: from then on the lock is fresh for everybody."""
    with lock.locked(directory, "ps1", "releasing", stale_seconds=NEVER) as held:
        change(directory / "ps1.lock", **OTHER_HOST)
        os.utime(directory / "ps1.lock", (1, 1))
        held.check()
        assert start(wait=0).answer().startswith("busy ")
        held.check()


def remove_by_hand(directory: Path, error: type[Exception] | None = None) -> None:
    with lock.locked(directory, "ps1", "releasing") as held:
        (directory / "ps1.lock").unlink()
        with pytest.raises(lock.LockLost):
            held.check()
        if error:
            raise error


def test_a_lock_that_was_removed_by_hand_is_lost(directory: Path) -> None:
    with pytest.raises(lock.LockLost, match="Nobody is known to hold it now"):
        remove_by_hand(directory)
    assert files(directory) == []


def test_losing_it_does_not_hide_another_exception(directory: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        remove_by_hand(directory, ZeroDivisionError)
    assert files(directory) == []


def test_a_fork_of_the_holder_lets_go_of_nothing(directory: Path) -> None:
    program = """
with lock.locked(directory, "ps1", "releasing") as held:
    child = os.fork()
    if not child:
        sys.exit(7)
    assert os.waitpid(child, 0)[1] == 7 << 8
    held.check()
"""
    subprocess.run([sys.executable, "-c", LOAD + program, MODULE, directory], check=True)
    assert files(directory) == []


NAMES = ["ps1", "", ".", "..", "a/b", "a%2Fb", "a b\n", "ääkköset", "a.lock", "\udcff", "x" * 5000, "x" * 4999 + "y"]


def test_any_name_is_a_lock_of_its_own_in_the_directory(directory: Path) -> None:
    held = [lock.locked(directory, name, "trying names", wait_seconds=0) for name in NAMES]
    for one in held:
        one.__enter__()
    assert len([name for name in files(directory) if name.endswith(".lock")]) == len(NAMES)
    for one in held:
        one.__exit__(None, None, None)
    assert files(directory) == []
    assert files(directory.parent) == [".locks"]


def link_to_elsewhere(file: Path) -> None:
    file.symlink_to(file.parent.parent / "elsewhere")


GARBAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.touch(),
    "half": lambda file: file.write_text('{"user": "bo'),
    "deep": lambda file: file.write_text("[" * 8000),
    "no object": lambda file: file.write_text("[1]"),
    "wrong type": lambda file: file.write_text(json.dumps({"user": 1, "since": 2})),
    "binary": lambda file: file.write_bytes(bytes(range(256))),
    "FIFO": os.mkfifo,
    "link": link_to_elsewhere,
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_in_its_place_counts_by_its_age(directory: Path, kind: str) -> None:
    directory.mkdir()
    elsewhere = directory.parent / "elsewhere"
    elsewhere.write_text("untouched")
    GARBAGE[kind](directory / "ps1.lock")
    with pytest.raises(lock.Busy, match=r"somebody holds .*ps1\.lock, which cannot be read") as caught:
        with lock.locked(directory, "ps1", "releasing", wait_seconds=0):
            pytest.fail("two holders")
    assert caught.value.holder is None
    os.utime(directory / "ps1.lock", (1, 1), follow_symlinks=False)
    with lock.locked(directory, "ps1", "releasing", wait_seconds=0):
        pass
    assert files(directory) == []
    assert elsewhere.read_text() == "untouched"


def test_a_directory_that_is_a_link_is_refused(directory: Path, tmp_path: Path) -> None:
    directory.symlink_to(tmp_path)
    before = files(tmp_path)
    with pytest.raises(OSError, match="locks"):
        with lock.locked(directory, "ps1", "releasing"):
            pytest.fail("followed")
    assert files(tmp_path) == before


def test_what_killed_processes_left_is_removed(directory: Path, start: Start) -> None:
    with lock.locked(directory, "ps1", "releasing"):
        waiter, stopped = start(), start()
        assert waiter.answer().startswith("log waiting")
        assert stopped.answer().startswith("log waiting")
        waiter.kill()
        stopped.popen.send_signal(signal.SIGSTOP)
        (directory / f"ps1.{'0' * 32}").touch()
        (directory / f"ps1.{'1' * 32}").touch()
        os.utime(directory / f"ps1.{'1' * 32}", (1, 1))
        (directory / f"ps2.{'1' * 32}").touch()
        os.utime(directory / f"ps2.{'1' * 32}", (1, 1))
    with lock.locked(directory, "ps1", "releasing", wait_seconds=0):
        pass
    left = files(directory)
    assert f"ps1.{'0' * 32}" in left  # not known to be dead
    assert f"ps2.{'1' * 32}" in left  # of another lock
    assert len(left) == 3  # and who was only stopped
    stopped.popen.send_signal(signal.SIGCONT)
    assert stopped.answer() == "held"


def test_the_umask_does_not_keep_colleagues_out(directory: Path) -> None:
    directory.parent.chmod(0o2770)
    before = os.umask(0o077)
    try:
        with lock.locked(directory, "ps1", "releasing"):
            assert stat.S_IMODE(directory.stat().st_mode) == 0o2770
            assert {stat.S_IMODE((directory / name).stat().st_mode) for name in files(directory)} == {0o660}
    finally:
        os.umask(before)


SYSTEM_PYTHON = "/usr/bin/python3"
GROUP, BOB, EVE = 61_000, 61_001, 61_002


@pytest.fixture
def course() -> Iterator[Path]:
    """A course's directory of one group, with a copy of the module that everybody may read."""
    if os.geteuid() != 0:
        pytest.skip("only root can be two other users")
    if not os.path.exists(SYSTEM_PYTHON):
        pytest.skip(f"no {SYSTEM_PYTHON} that every user may run")
    version = subprocess.check_output([SYSTEM_PYTHON, "-c", "import sys; print(sys.version_info >= (3, 11))"])
    if version.strip() != b"True":
        pytest.skip(f"{SYSTEM_PYTHON} is older than Python 3.11")
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    shutil.copyfile(MODULE, place / "lock.py")
    (place / "lock.py").chmod(0o644)
    (place / "course").mkdir()
    os.chown(place / "course", BOB, GROUP)
    (place / "course").chmod(0o2770)
    yield place / "course"
    shutil.rmtree(place)


@pytest.mark.parametrize(
    ("gid", "mode"), [(GROUP, 0o2770), (61_009, 0o2770), (61_009, 0o770)], ids=["primary", "supplementary", "no setgid"]
)
def test_colleagues_with_other_uids_share_it(course: Path, start: Start, gid: int, mode: int) -> None:
    if mode == 0o770:  # somebody made it by hand
        (course / ".locks").mkdir()
        os.chown(course / ".locks", BOB, GROUP)
        (course / ".locks").chmod(mode)
        course.chmod(mode)

    def instructor(uid: int, **how: Any) -> Process:
        return start(
            course / ".locks",
            python=SYSTEM_PYTHON,
            module=course.parent / "lock.py",
            user=uid,
            group=gid,
            extra_groups=[GROUP],
            umask=0o022,
            cwd="/",
            **how,
        )

    bob = instructor(BOB)
    assert bob.answer() == "held"
    made = (course / ".locks").stat()
    assert (made.st_uid, made.st_gid, stat.S_IMODE(made.st_mode)) == (BOB, GROUP, mode)
    refused = instructor(EVE, wait=0).answer()
    assert refused.startswith(f"busy uid {BOB} has been collecting 'ps1' on host ")
    bob.kill()
    eve = instructor(EVE, wait=0)
    assert eve.answer().startswith(f"log taking over from a process that is dead: uid {BOB} ")
    assert eve.answer() == "held"
    assert eve.tell("check") == "ours"
    assert {(course / ".locks" / name).stat().st_gid for name in files(course / ".locks")} == {GROUP}
    (course / ".locks" / "ps1.lock").chmod(0o600)
    os.utime(course / ".locks" / "ps1.lock", (1, 1))
    assert "which cannot be read" in instructor(BOB, wait=0).answer()
    assert eve.tell("leave") == "left"
    assert instructor(BOB, wait=0).answer() == "held"
