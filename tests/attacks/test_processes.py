"""Rows 23 to 31: processes that multiply, survive, reach for others, or lose their supervisor."""

import contextlib
import os
import random
import secrets
import signal
import time

import pytest

from attacks.harness import Attacker, Running, eventually, marked, processes


def _mounts() -> set[str]:
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        return {line.split(" - ")[0] for line in file}


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return [int(child) for child in file.read().split()]
    return []


def _below(pid: int) -> list[int]:
    return [found for child in _children(pid) for found in [child, *_below(child)]]


def _alive(pid: int, started: str) -> bool:
    with contextlib.suppress(OSError):
        fields = _stat(pid)
        return fields[19] == started and fields[0] not in "ZX"
    return False


def _stat(pid: int) -> list[str]:
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].split()


@pytest.mark.threat(23, 38)
def test_fork_bomb_is_capped(attacker: Attacker) -> None:
    """The host can still start a process in the middle of it."""
    running = attacker.start_code(
        """
print("up", flush=True)
while True:
    try:
        os.fork()
    except OSError:
        time.sleep(0.01)
""",
        limits={"processes": 40, "wall_seconds": 2},
    )
    running.hear("up")
    time.sleep(0.5)
    below = [pid for pid in _below(running.process.pid) if _alive(pid, _stat(pid)[19])]
    assert 20 < len(below) <= 40 + 6 + 6 * attacker.warm  # the launcher, the helpers; those of the template
    assert os.waitpid(os.spawnv(os.P_NOWAIT, "/bin/true", ["true"]), 0)[1] == 0
    assert running.finish()["report"]["limit"] == "wall"


_DAEMON = """
mark = sys.argv[1]
def daemon():
    os.setsid()
    if os.fork():
        os._exit(0)
    import signal
    for number in range(1, 65):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            pass
    for fd in range(3):
        os.close(fd)
    libc.prctl(1, 0)    # no death signal
    libc.prctl(4, 0)    # not dumpable
    libc.prctl(36, 1)   # a subreaper
    libc.prctl(15, b"kworker/0:1")
    time.sleep(300)
    os._exit(0)
if os.fork() == 0:
    daemon()
os.wait()
print("up", flush=True)
"""


@pytest.mark.threat(24)
@pytest.mark.parametrize("ending", ["exit", "sleep"])
def test_a_daemon_is_gone_when_the_job_ends(attacker: Attacker, ending: str) -> None:
    """Double fork, own session, all signals ignored, closed stdio, another name."""
    mark = secrets.token_hex(12)
    tail = "time.sleep(0.5)" if ending == "exit" else "time.sleep(300)"
    running = attacker.start_code(_DAEMON + tail, mark, limits={"wall_seconds": 1.5})
    running.hear("up")
    assert eventually(lambda: len(marked(mark)) >= 1)
    running.finish()
    assert eventually(lambda: not marked(mark), 3)


@pytest.mark.threat(25)
def test_reaching_into_other_processes_is_denied(attacker: Attacker) -> None:
    said = attacker.run("""
pid = os.fork()
if pid == 0:
    time.sleep(30)
fd = os.pidfd_open(pid)
one = os.pidfd_open(1)
buffer = ctypes.create_string_buffer(64)
iov = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), 64)
tries = {
    "ptrace attach": syscall(native(101, 117), 16, pid, 0, 0),
    "ptrace seize": syscall(native(101, 117), 0x4206, pid, 0, 0),
    "traceme": syscall(native(101, 117), 0, 0, 0, 0),
    "readv": syscall(native(310, 270), pid, ctypes.byref(iov), 1, ctypes.byref(iov), 1, 0),
    "writev": syscall(native(311, 271), 1, ctypes.byref(iov), 1, ctypes.byref(iov), 1, 0),
    "getfd": syscall(438, fd, 0, 0), "getfd of init": syscall(438, one, 3, 0),
    "madvise": syscall(440, one, ctypes.byref(iov), 1, 21, 0), "kcmp": syscall(native(312, 272), 1, pid, 0, 0, 0),
    "init memory": attempt(open, "/proc/1/mem", "r+b"),
}
os.kill(pid, 9)
say(**tries)
""").said
    assert set(said.values()) <= {"EPERM", "EACCES", "ENOSYS"}, said


@pytest.mark.threat(26)
def test_namespaces_are_denied(attacker: Attacker) -> None:
    """A clone that succeeds ends its child at once."""
    said = attacker.run("""
one = os.pidfd_open(1)
flags = {"NEWUSER": 0x10000000, "NEWNS": 0x20000, "NEWPID": 0x20000000, "NEWNET": 0x40000000, "NEWTIME": 0x80}
clone_args = (ctypes.c_uint64 * 11)(0x10000000, 0, 0, 0, 17)
me = os.getpid()
def clone(*arguments):
    answer = syscall(*arguments)
    if os.getpid() != me:
        os._exit(0)
    return answer
tries = {
    "setns": syscall(native(308, 268), one, 0x20000000), "clone3": clone(435, ctypes.byref(clone_args), 88),
    "nsfs": attempt(open, "/proc/self/ns/user"),
}
for name, flag in flags.items():
    if name != "NEWTIME":
        tries["clone " + name] = clone(native(56, 220), flag | 17, 0, 0, 0, 0)
        tries["clone high " + name] = clone(native(56, 220), flag | 17 | 1 << 40, 0, 0, 0, 0)
for name, flag in flags.items():
    tries["unshare " + name] = syscall(native(272, 97), flag)
say(**tries)
""").said
    opened = said.pop("nsfs")
    assert opened in {"ok", "EACCES"}  # a name of one's own namespace gives nothing without setns
    assert set(said.values()) <= {"EPERM", "EACCES", "ENOSYS"}, said


@pytest.mark.threat(25)
def test_no_capability_and_no_new_privileges(attacker: Attacker) -> None:
    """In no set, and none can be had back."""
    said = attacker.run("""
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
names = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp", "Uid", "Groups")
found = {n: status[n].strip() for n in names}
ids = {n: attempt(getattr(os, n), 0) for n in ("setuid", "setgid", "seteuid")} | {"groups": attempt(os.setgroups, [0])}
say(found=found, ids=ids, maps=open("/proc/self/uid_map").read().split(),
    caps=syscall(native(126, 91), b"\\0" * 8, b"\\xff" * 24))
""").said
    found = said["found"]
    assert {int(found[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert found["NoNewPrivs"] == "1"
    assert set(said["ids"].values()) <= {"EPERM", "EINVAL"}
    assert said["caps"] != "ok"
    if attacker.is_ours:
        assert found["Seccomp"] == "2"
        assert set(found["Uid"].split()) == {"1000"}
        # Below a template, which has rooms of several users, the number outside is the one of this room.
        assert said["maps"] == ["1000", said["maps"][1] if attacker.warm and attacker.person.is_root else "1000", "1"]


@pytest.mark.threat(25)
def test_host_uid_zero_is_never_ours(attacker: Attacker) -> None:
    mark = secrets.token_hex(12)
    running = attacker.start_code("print('up', flush=True); time.sleep(60)", mark)
    running.hear("up")
    (pid, *_) = marked(mark)
    uid = os.stat(f"/proc/{pid}").st_uid
    assert uid != 0
    assert (uid == attacker.person.uid) == (not attacker.person.is_root)


@pytest.mark.threat(27)
def test_limits_and_priorities_cannot_be_raised(attacker: Attacker) -> None:
    said = attacker.run("""
import resource
kinds = {n: getattr(resource, n) for n in dir(resource) if n.startswith("RLIMIT_")}
raised = {}
for name, kind in kinds.items():
    soft, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        try:
            resource.setrlimit(kind, (hard, hard + 1))
            raised[name] = (soft, hard)
        except (OSError, ValueError):
            pass
tries = {"nice": attempt(os.nice, -5), "fifo": attempt(os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(1)),
    "rr": attempt(os.sched_setscheduler, 0, os.SCHED_RR, os.sched_param(99)),
    "deadline": syscall(native(314, 274), 0, (ctypes.c_uint64 * 7)(48 | 6 << 32, 0, 0, 10**7, 10**7, 10**7, 0), 0),
    "ioprio": syscall(native(251, 30), 1, 0, 1 << 13),
    "oom": attempt(lambda: open("/proc/self/oom_score_adj", "wb", 0).write(b"-1"))}
say(raised=raised, tries=tries)
""").said
    assert said["raised"] == {}
    assert set(said["tries"].values()) <= {"EPERM", "EACCES"}, said["tries"]


@pytest.mark.threat(28)
def test_kill_everything_reaches_the_own_job_only(attacker: Attacker) -> None:
    """Another sandbox of the same person and an ordinary process of that person live on."""
    mark = secrets.token_hex(12)
    other = attacker.start_code("print('up', flush=True); time.sleep(60)", mark)
    other.hear("up")
    before = marked(mark)
    outcome = attacker.run("""
import signal
for number in (0, signal.SIGTERM, signal.SIGKILL):
    if os.fork() == 0:
        attempt(os.kill, -1, number)
        os._exit(0)
for pid in (1, *range(2, 400)):
    if pid != os.getpid():
        for number in (signal.SIGSTOP, signal.SIGKILL, signal.SIGINT, signal.SIGHUP):
            attempt(os.kill, pid, number)
say(survived=True)
""")
    assert outcome.report is not None
    assert outcome.report["ended"] in {"exited", "signal"}
    assert marked(mark) == before
    assert other.process.poll() is None


@pytest.mark.threat(29, 46)
def test_ignored_signals_end_at_the_wall_limit(attacker: Attacker) -> None:
    mark = secrets.token_hex(12)
    outcome = attacker.run(
        """
import signal
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
os.setsid() if os.getpid() != os.getsid(0) else os.setpgid(0, 0) if os.fork() == 0 else None
while True:
    time.sleep(100)
""",
        mark,
        limits={"wall_seconds": 1},
    )
    assert outcome.limit == "wall"
    assert outcome.report is not None
    assert "wall" in outcome.report["message"]
    assert not marked(mark)


_TO_INIT = """
import signal
tried = [attempt(os.kill, 1, number) for number in range(1, 65)]
fd = os.pidfd_open(1)
tried += [attempt(signal.pidfd_send_signal, fd, number) for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV)]
attempt(os.setpriority, os.PRIO_PROCESS, 1, 19)
attempt(os.sched_setaffinity, 1, {0})
attempt(os.sched_setscheduler, 1, os.SCHED_IDLE, os.sched_param(0))
say(tried=tried)
"""


@pytest.mark.threat(30)
def test_init_of_the_room_does_not_care_for_signals(attacker: Attacker) -> None:
    outcome = attacker.run(_TO_INIT + "sys.exit(5)")
    assert outcome.error is None
    assert outcome.report is not None
    assert (outcome.report["ended"], outcome.report["exit_code"]) == ("exited", 5)


_PRLIMIT = """
import resource
kinds = {n: getattr(resource, n) for n in dir(resource) if n.startswith("RLIMIT_")}
open("file", "w").write("x")
names = [sys.argv[1]] if len(sys.argv) > 1 else list(kinds)
done = {n: attempt(resource.prlimit, 1, kinds[n], (0, 0)) for n in names}
say(**done)
end = time.process_time() + 0.1
while time.process_time() < end:
    [attempt(os.kill, 1, 17) for _ in range(1000)]
"""


@pytest.mark.threat(27, 30)
@pytest.mark.parametrize("name", ["RLIMIT_CPU", "RLIMIT_NOFILE", "RLIMIT_AS", "RLIMIT_FSIZE", "RLIMIT_NPROC"])
def test_the_limits_of_init_cannot_be_lowered(attacker: Attacker, name: str) -> None:
    """A room's init that cannot pack or report would make the student's doing look like the host's fault."""
    outcome = attacker.run(_PRLIMIT, name, keep=True)
    assert outcome.said[name] in {"EPERM", "ENOSYS"}
    assert outcome.error is None


@pytest.mark.threat(30)
@pytest.mark.parametrize(
    ("code", "ended"),
    [("os._exit(3)", "exited"), ("os.kill(os.getpid(), 11)", "signal"), ("os.abort()", "signal"),
     ("ctypes.string_at(0)", "signal"), ("os.kill(os.getpid(), 9)", "signal"), ("os.close(1); os.close(2)", "exited")],
)  # fmt: skip
def test_every_end_has_its_report(attacker: Attacker, code: str, ended: str) -> None:
    outcome = attacker.run(code)
    assert outcome.error is None
    assert outcome.report is not None
    assert outcome.report["ended"] == ended


@pytest.mark.threat(30)
def test_a_segfault_starts_no_core_dump_helper(attacker: Attacker) -> None:
    """A pipe in core_pattern ignores a limit of 0 and runs as root on the host; only 1 stops it. core(5)"""
    said = attacker.run("import resource; say(core=resource.getrlimit(resource.RLIMIT_CORE))").said
    assert said["core"] == [1, 1]


@pytest.mark.threat("30a")
def test_the_parent_cannot_be_killed(attacker: Attacker) -> None:
    """Neither by number nor by what the code thinks is its parent, nor by the pid that it has on the host."""
    outcome = attacker.run("attempt(os.kill, os.getppid(), 9); attempt(os.killpg, 0, 0); say(parent=os.getppid())")
    assert outcome.said["parent"] == 1 or not attacker.is_ours
    assert outcome.error is None


def _start_tree(attacker: Attacker, mark: str) -> Running:
    running = attacker.start_code(_DAEMON + "time.sleep(300)", mark, limits={"wall_seconds": 120})
    running.hear("up")
    return running


@pytest.mark.threat(31)
def test_kill_9_of_the_supervisor_leaves_no_process(attacker: Attacker) -> None:
    mark = secrets.token_hex(12)
    running = _start_tree(attacker, mark)
    assert marked(mark)
    running.process.kill()
    running.process.wait()
    assert eventually(lambda: not marked(mark), 5)


@pytest.mark.threat(31)
@pytest.mark.parametrize("victim", ["supervisor", "launcher", "outer", "both", "stopped supervisor"])
def test_killed_helpers_take_the_sandbox_with_them(attacker: Attacker, victim: str) -> None:
    mounts, mark = _mounts(), secrets.token_hex(12)
    running = _start_tree(attacker, mark)
    (launcher,) = _children(running.process.pid)
    outer = max(_children(launcher), key=lambda pid: len(_below(pid)))  # beside it stands who removes the control group
    tree = {pid: _stat(pid)[19] for pid in _below(running.process.pid)}
    assert marked(mark)
    assert len(tree) >= 7
    if victim == "stopped supervisor":
        os.kill(running.process.pid, signal.SIGSTOP)
    pids = {"launcher": [launcher], "outer": [outer], "both": [launcher, running.process.pid]}
    for pid in pids.get(victim, [running.process.pid]):
        os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: not marked(mark), 5)
    if victim in {"launcher", "outer"}:
        assert running.finish()["error"] is not None
    running.process.wait()
    assert eventually(lambda: not [pid for pid, started in tree.items() if _alive(pid, started)], 5)
    assert _mounts() == mounts
    assert os.listdir(attacker.temporary) == []


@pytest.mark.threat(31)
def test_killed_at_any_moment_of_the_building(attacker: Attacker) -> None:
    """`kill -9` of the supervisor, and of it together with the launcher, while the sandbox is being built."""
    mounts, mark = _mounts(), secrets.token_hex(12)
    dice = random.Random(1)
    trees: dict[int, str] = {}
    for attempt in range(12):
        running = attacker.start_code("time.sleep(300)", mark, limits={"wall_seconds": 120})
        assert eventually(lambda: _children(running.process.pid) != [])  # noqa: B023
        time.sleep(dice.uniform(0, 0.12))
        victims = [running.process.pid, *(_children(running.process.pid) if attempt % 2 else [])]
        for pid in _below(running.process.pid):
            with contextlib.suppress(OSError):
                trees[pid] = _stat(pid)[19]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        running.process.wait()
    assert eventually(lambda: not marked(mark), 5)
    assert eventually(lambda: not [pid for pid, started in trees.items() if _alive(pid, started)], 5)
    assert _mounts() == mounts


@pytest.mark.threat(31)
def test_no_process_of_the_launcher_survives_a_failed_build(attacker: Attacker) -> None:
    missing = attacker.elsewhere("gone") / "nothing"
    outcome = attacker.run("say()", ro=[str(missing)])
    assert outcome.error is not None
    python = str(attacker.python)
    assert not processes(lambda pid: os.readlink(f"/proc/{pid}/exe") == python)


@pytest.mark.threat(29)
def test_many_unreaped_and_reparented_processes_do_not_confuse_the_end(attacker: Attacker) -> None:
    """Thousands of zombies and orphans, a vfork-like stopped child, and a main process that ends at once."""
    mark = secrets.token_hex(12)
    outcome = attacker.run(
        """
import signal
for _ in range(1500):
    try:
        if os.fork() == 0:
            if os.fork() == 0:
                os._exit(0)
            os._exit(0)
    except OSError:
        pass
    try:
        os.waitpid(-1, os.WNOHANG)
    except OSError:
        pass
for _ in range(10):
    try:
        if os.fork() == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
    except OSError:
        pass
sys.stdout.flush()
os._exit(7)
""",
        mark,
    )
    assert outcome.report is not None
    assert outcome.report["exit_code"] == 7
    assert not marked(mark)
