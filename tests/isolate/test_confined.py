# ruff: noqa: E501  # the probes are programs in strings
"""The landlock tier: what it stops, what it leaves, and that it is never taken for the other one."""

import dataclasses
import functools
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from attacks.harness import Attacker, eventually, processes
from isolate import confined, landlock
from isolate.policy import LANDLOCK_GAPS, Bind, Limits, Policy, SandboxError, system_policy
from isolate.sampler import Sampler
from isolate.sandbox import Command, Sandbox

MIB = 1 << 20
pytestmark = pytest.mark.skipif(landlock.abi() == 0, reason="this kernel has no Landlock")


def _policy(**limits: float) -> Policy:
    bounds = Limits(**{"wall_seconds": 30, "cpu_seconds": 20, **limits})  # type: ignore[arg-type]
    return dataclasses.replace(system_policy(limits=bounds), tier="landlock")


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where private directories are made during this test; nothing may be left in it."""
    directory = Path(tempfile.mkdtemp(prefix="tier-", dir="/var/tmp"))
    directory.chmod(0o755)
    monkeypatch.setattr("isolate.sandbox.tempfile.gettempdir", lambda: str(directory))
    yield directory
    assert eventually(lambda: os.listdir(directory) == [], 15)
    directory.rmdir()


def test_the_report_names_the_tier_and_what_it_does_not_stop(parent: Path) -> None:
    with Sandbox(_policy(), Command(["true"])) as sandbox:
        report = sandbox.wait()
    assert (report.ended, report.exit_code, report.tier) == ("exited", 0, "landlock")
    assert report.gaps == LANDLOCK_GAPS
    assert f"Landlock ABI {landlock.abi()}" in report.layers
    assert not any("namespace" in layer for layer in report.layers)
    with Sandbox(dataclasses.replace(_policy(), tier="namespaces"), Command(["true"])) as sandbox:
        assert sandbox.wait().gaps == ()


def test_a_tier_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="namespaces, landlock"):
        dataclasses.replace(_policy(), tier="none")


def test_what_it_cannot_show_is_refused(tmp_path: Path) -> None:
    policy = dataclasses.replace(_policy(), writable=(Bind(tmp_path, Path("/elsewhere")),))
    with pytest.raises(SandboxError, match="at another place"):
        Sandbox(policy, Command(["true"])).__enter__()


@pytest.mark.parametrize("kind", ["hidden", "read_only"])
def test_what_cannot_be_protected_below_something_writable_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "inside").mkdir()
    inside = tmp_path / "inside"
    policy = dataclasses.replace(_policy(), writable=(Bind(tmp_path),))
    change = {"hidden": (inside,)} if kind == "hidden" else {"read_only": (*policy.read_only, Bind(inside))}
    with pytest.raises(SandboxError, match="below something writable"):
        Sandbox(dataclasses.replace(policy, **change), Command(["true"])).__enter__()  # type: ignore[arg-type]


def test_without_landlock_there_is_no_tier() -> None:
    """A real refusal: a filter that makes Landlock's calls answer ENOSYS, in a process of its own."""
    code = """
import dataclasses, errno, pyseccomp, sys
filter = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
filter.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "landlock_create_ruleset")
filter.load()
from isolate.policy import SandboxError, system_policy
from isolate.sandbox import Command, Sandbox
policy = system_policy()
with Sandbox(policy, Command(["true"])) as sandbox:
    assert not any("Landlock" in layer for layer in sandbox.wait().layers)
try:
    Sandbox(dataclasses.replace(policy, tier="landlock"), Command(["true"])).__enter__()
except SandboxError as error:
    print(error.layer, error.cause)
"""
    root = str(Path(confined.__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root)
    assert done.stdout == "landlock this kernel has none\n", done.stderr


class Tier:
    """An attacker in the landlock tier, with a place of its own for private directories."""

    def __init__(self, attacker: Attacker) -> None:
        self.attacker, self.place = attacker, attacker.elsewhere("t")  # a short name: sockets lie below
        self._job = {"tier": "landlock", "supervisor_env": {"TMPDIR": str(self.place)}}
        self.run = functools.partial(attacker.run, **self._job)
        self.start_code = functools.partial(attacker.start_code, **self._job)
        self.notebooks = functools.partial(attacker.notebooks, **self._job)

    def is_empty(self) -> bool:
        return os.listdir(self.place) == []


@pytest.fixture
def tier(attacker: Attacker) -> Tier:
    return Tier(attacker)


@pytest.mark.threat(1, 2, 3, 5, 15)
def test_files_outside_can_neither_be_read_nor_changed(tier: Tier) -> None:
    """Files of the very user who grades, which only Landlock keeps apart when that user is an ordinary one."""
    place = tier.attacker.elsewhere("course")
    secret = tier.attacker.write(place / "gradebook.db", tier.attacker.token, 0o666)
    said = tier.run(
        """
place = sys.argv[1]; secret = place + "/gradebook.db"
def read(path):
    with open(path, "rb") as file: file.read()
tries = {"read": attempt(read, secret), "list": attempt(os.listdir, place), "write": attempt(open, secret, "w"),
    "append": attempt(os.open, secret, os.O_WRONLY | os.O_APPEND), "truncate": attempt(os.truncate, secret, 0),
    "unlink": attempt(os.unlink, secret), "rename": attempt(os.rename, secret, place + "/x"),
    "make": attempt(os.mkdir, place + "/d"), "link": attempt(os.link, secret, "l"),
    "symlink": (os.symlink(secret, "s"), attempt(read, "s"))[1], "move in": attempt(os.rename, secret, "moved"),
    "shadow": attempt(read, "/etc/shadow"), "passwd": attempt(read, "/etc/passwd"), "proc": attempt(read, "/proc/1/environ"),
    "own proc": attempt(os.listdir, "/proc"), "tmp": attempt(os.listdir, os.path.dirname(os.environ["TMPDIR"]) + "/.."),
    "home": attempt(os.listdir, "/home"), "mem": attempt(open, "/proc/self/mem", "wb"), "run": attempt(os.listdir, "/run")}
attempt(os.chmod, secret, 0o777); attempt(os.utime, secret, (1, 1)); attempt(os.chown, secret, -1, os.getgid())
attempt(os.setxattr, secret, "user.x", b"y")
say(**tries)
""",
        str(place),
    ).said
    assert set(said.values()) <= {"EACCES", "EPERM", "EXDEV", "EROFS"}, said
    assert secret.read_text() == tier.attacker.token
    status = secret.stat()
    assert stat.S_IMODE(status.st_mode) == 0o666
    assert status.st_mtime > 1000
    assert os.listxattr(secret) == []


@pytest.mark.threat(28, "30a", 25)
def test_processes_outside_cannot_be_signalled_or_slowed(tier: Tier) -> None:
    victim = subprocess.Popen(["sleep", "60"], **tier.attacker.person.credentials())
    try:
        said = tier.run(
            """
import signal
pid = int(sys.argv[1])
say(kill=attempt(os.kill, pid, 9), all=attempt(os.kill, -1, 15), parent=attempt(os.kill, os.getppid(), 9),
    group=attempt(os.killpg, os.getpgid(pid), 9), nice=attempt(os.setpriority, os.PRIO_PROCESS, pid, 19),
    user=attempt(os.setpriority, os.PRIO_USER, os.getuid(), 19), limit=syscall(native(302, 261), pid, 7, 0, 0),
    trace=syscall(native(101, 117), 16, pid, 0, 0), fd=attempt(signal.pidfd_send_signal, os.pidfd_open(pid), 9)
        if hasattr(os, "pidfd_open") else "EPERM")
os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0)) if os.getuid() < 10**9 else None
""",
            str(victim.pid),
        ).said
        assert victim.poll() is None
        assert os.getpriority(os.PRIO_PROCESS, victim.pid) == 0
        assert os.sched_getscheduler(victim.pid) == os.SCHED_OTHER
        assert said["kill"] == said["parent"] == said["nice"] == said["fd"] == "EPERM"
    finally:
        victim.kill()
        victim.wait()


@pytest.mark.threat(32, 33, 34, 35)
def test_no_socket_leads_out(tier: Tier) -> None:
    said = tier.run(
        """
import socket
tries = {}
for family in range(1, 46):
    for kind in (1, 2, 3, 5):
        try: socket.socket(family, kind).close(); tries[f"{family} {kind}"] = "ok"
        except OSError: pass
stream = socket.socket(socket.AF_UNIX)
say(open=tries, connect=attempt(stream.connect, "/run/dbus/system_bus_socket"), abstract=attempt(stream.connect, b"\\0x"),
    send=attempt(stream.sendto, b"x", "/run/systemd/notify"),
    pair=attempt(socket.socketpair, socket.AF_UNIX, socket.SOCK_DGRAM), raw=attempt(socket.socketpair, socket.AF_UNIX, 3))
""",
    ).said
    assert said["pair"] == said["raw"] == "EPERM"  # each end could send to any path
    assert set(said["open"]) <= {"1 1", "1 5"}
    assert said["connect"] == said["abstract"] == "EPERM"
    assert said["send"] != "ok"


def test_siblings_of_something_hidden_stay_visible(parent: Path) -> None:
    place = Path(tempfile.mkdtemp(dir="/var/tmp"))
    try:
        place.chmod(0o755)
        for name in ("etc/jupyter/secret", "etc/fonts/list", "lib/code"):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(name)
        (place / "outward").symlink_to("/etc")
        policy = dataclasses.replace(_policy().with_visible([place]), hidden=(place / "etc/jupyter",))
        script = "cat lib/code etc/fonts/list; cat etc/jupyter/secret; ls etc; cat outward/hostname; cat outward/passwd"
        with tempfile.TemporaryFile() as output:
            with Sandbox(policy, Command(["sh", "-c", script], cwd=str(place), stdout=output)) as sandbox:
                sandbox.wait()
            output.seek(0)
            assert output.read() == b"lib/codeetc/fonts/list"
    finally:
        subprocess.run(["rm", "-rf", str(place)], check=True)


_ENDS = {
    "memory": ("for _ in range(6):\n    if os.fork() == 0: break\nx = bytearray(b'x') * (60 << 20)\ntime.sleep(20)", {"memory_bytes": 150 * MIB}),
    "files": ("f = open('big', 'wb')\nfor n in range(40): open(f'f{n}', 'wb').write(b'x' * (1 << 20)); time.sleep(0.1)", {"files_bytes": 8 * MIB}),
    "wall": ("time.sleep(60)", {"wall_seconds": 1}),
    "cpu": ("for _ in range(3): os.fork()\nwhile True: pass", {"cpu_seconds": 1.0}),
}  # fmt: skip


@pytest.mark.parametrize("limit", _ENDS)
def test_limits_hold(tier: Tier, limit: str) -> None:
    code, limits = _ENDS[limit]
    outcome = tier.run(code, limits={"wall_seconds": 25, "processes": 20, **limits})
    assert outcome.limit == limit, outcome
    assert eventually(tier.is_empty)


_HIDDEN_FILES = {
    "nameless": "files = []\nfor n in range(9):\n    files.append(open('f', 'wb', 0)); os.unlink('f'); files[-1].write(b'x' * (2 << 20))",
    "only mapped": """
import mmap
maps = []
for n in range(9):
    with open('f', 'w+b') as f: f.write(b'x' * (2 << 20)); f.flush(); maps.append(mmap.mmap(f.fileno(), 2 << 20))
    os.unlink('f')""",
    "in a directory that cannot be listed": "os.mkdir('d', 0o300)\nfor n in range(9): open(f'd/{n}', 'wb').write(b'x' * (2 << 20))",
    "by a program that cannot be read": """
import shutil
with open('/usr/bin/sleep', 'rb') as f: program = f.read()
with open('sleep', 'wb', opener=lambda name, flags: os.open(name, flags, 0o100)) as f: f.write(program)
for n in range(9):
    f = os.open('f', os.O_CREAT | os.O_WRONLY); os.set_inheritable(f, True); os.unlink('f'); os.write(f, b'x' * (2 << 20))
os.execv('sleep', ['sleep', '20'])""",
}  # fmt: skip


@pytest.mark.threat(20, 39)
@pytest.mark.parametrize("person", ["root", "user"], indirect=True)
@pytest.mark.parametrize("files", _HIDDEN_FILES)
def test_files_cannot_be_hidden_from_their_limit(tier: Tier, files: str) -> None:
    outcome = tier.run(_HIDDEN_FILES[files] + "\ntime.sleep(20)", limits={"wall_seconds": 15, "files_bytes": 8 * MIB})
    assert outcome.limit == "files" or (outcome.report or {}).get("signal") == signal.SIGKILL, outcome
    assert eventually(tier.is_empty)


@pytest.mark.threat(15, 20)
@pytest.mark.parametrize("person", ["root", "user"], indirect=True)
def test_descriptors_do_no_more_than_their_files_allow(tier: Tier) -> None:
    secret = tier.attacker.write(tier.attacker.elsewhere("course") / "notes", "x", 0o666)
    os.setxattr(secret, "user.k", b"topsecret")
    said = tier.run(
        """
import fcntl, socket
own = os.open("own", os.O_CREAT | os.O_RDWR); shown = os.open(sys.executable, os.O_RDONLY)
def ioctl(fd, number): return attempt(fcntl.ioctl, fd, number, bytes(64))
say(keep=syscall(native(285, 47), own, 1, 0, 1 << 30), size=os.fstat(own).st_blocks,
    lease=attempt(fcntl.fcntl, shown, 1024, 0), own_lease=attempt(fcntl.fcntl, own, 1024, 0), dumpable=syscall(native(157, 167), 4, 0, 0, 0, 0),
    flags=ioctl(shown, 0x40086602), subvolume=ioctl(shown, 0x5000940E), verity=ioctl(shown, 0x40806685),
    interfaces=ioctl(socket.socket(1).fileno(), 0x8912), read=attempt(os.getxattr, sys.argv[1], "user.k"), list=attempt(os.listxattr, sys.argv[1]),
    pipe=attempt(fcntl.ioctl, os.pipe()[0], 0x541B, bytes(4)))
""",
        str(secret),
    ).said
    assert said.pop("pipe") == "ok"
    assert said.pop("size") == 0
    assert set(said.values()) <= {"EOPNOTSUPP", "ENOTSUP", "EINVAL", "EPERM", "ENOTTY"}, said


@pytest.mark.threat(23, 29)
@pytest.mark.parametrize("person", ["root", "user"], indirect=True)
def test_a_fork_bomb_does_not_outrun_its_end(tier: Tier) -> None:
    """Processes that live for the time of one fork: whoever kills one after another is always late."""
    code = """
for _ in range(4): os.fork()
while True:
    try:
        if os.fork(): os._exit(0)
    except OSError: pass
"""
    running = tier.run("if os.fork():\n    time.sleep(60)\n" + code, limits={"wall_seconds": 3, "processes": 60})
    assert running.limit == "wall", running
    assert running.report is not None
    assert running.report["wall_seconds"] < 12
    assert eventually(tier.is_empty)


def test_removing_follows_no_link(tmp_path: Path) -> None:
    """What a process that outlived both of ours could put where a directory was a moment ago."""
    target = tmp_path / "target"
    target.mkdir(mode=0o755)
    (tmp_path / "link").symlink_to(target)
    top = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="link"):
            confined._open_directory("link", top)
    finally:
        os.close(top)
    assert stat.S_IMODE(target.stat().st_mode) == 0o755


def test_too_many_mappings_count_whole_and_are_not_read_to_their_end() -> None:
    code = """
import mmap, sys
whole = mmap.mmap(-1, 400 << 20, prot=mmap.PROT_READ)
maps = [mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=1 + 2 * (n % 2)) for n in range(20000)]
print("up", flush=True); sys.stdin.read()
"""
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        usage = Sampler(
            process.pid, {"memory_bytes": 300 * MIB, "processes": 9}, helpers_below=0, sockets=None
        ).sample()
        process.communicate(b"")
    assert usage.limit == "memory"


def test_too_many_files_end_it(tier: Tier) -> None:
    code = "for n in range(100000): os.mkdir(f'd{n}'); n % 100 or time.sleep(0.05)"
    assert tier.run(code, limits={"files_count": 300}).limit == "files"


_TREES = {
    "deep": "for _ in range(3000):\n    os.mkdir('d'); os.chdir('d')",
    "closed": "os.makedirs('a/b/c'); open('a/b/c/f', 'w').close(); [os.chmod(d, 0) for d in ('a/b/c', 'a/b', 'a', '.')]",
    "odd": "import socket; socket.socket(1).bind('s'); attempt(os.mkfifo, 'p'); os.symlink('/usr', 'u'); os.symlink('u', '../run')",
    "names": "[open(os.fsencode(os.environ['TMPDIR']) + b'/' + bytes([n]), 'w').close() for n in range(1, 256) if n not in (46, 47)]",
}  # fmt: skip


@pytest.mark.parametrize("tree", _TREES)
def test_the_private_directory_goes_whatever_is_in_it(tier: Tier, tree: str) -> None:
    outcome = tier.run(_TREES[tree] + "\nsys.exit(0)", keep=True)
    assert outcome.report is not None, outcome
    assert outcome.report["exit_code"] == 0 or outcome.limit == "files", outcome
    assert tier.is_empty()


@pytest.mark.parametrize("victims", [("launcher",), ("keeper",), ("guard",), ("guard", "launcher"), ("supervisor",)])
def test_nothing_is_left_after_kill_9(tier: Tier, victims: tuple[str, ...]) -> None:
    """A daemon, too: processes are found by descent here."""
    running = tier.start_code(
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork(): os._exit(0)\nprint('up', flush=True)\ntime.sleep(99)",
    )
    running.hear("up")

    def below(pid: int) -> list[int]:
        def is_child(one: int) -> bool:
            with open(f"/proc/{one}/stat", "rb") as file:
                return int(file.read().rpartition(b")")[2].split()[1]) == pid

        return processes(is_child)

    (launcher,) = below(running.process.pid)
    guard, keeper = sorted(below(launcher))[:2]
    everything = {launcher, guard, keeper, *below(keeper), *(two for one in below(keeper) for two in below(one))}
    names = {"launcher": launcher, "guard": guard, "keeper": keeper, "supervisor": running.process.pid}
    for name in victims:
        os.kill(names[name], signal.SIGKILL)

    def alive(pid: int) -> bool:
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                return file.read().rpartition(b")")[2].split()[0] != b"Z"
        except OSError:
            return False

    if victims == ("guard",):
        assert alive(keeper)
        running.process.kill()
    assert eventually(lambda: not any(map(alive, everything)))
    if victims == ("guard", "launcher"):  # nobody is left to do it: the next sandbox does
        (left,) = tier.place.iterdir()
        os.utime(left, (1, 1))
        tier.run("pass")
    assert eventually(tier.is_empty)


def test_words_reach_the_command(parent: Path) -> None:
    script = "trap 'echo int; exit 5' INT; echo up >&2; while :; do sleep 0.05; done"
    read, write = os.pipe()
    with open(read, "rb") as words:
        with Sandbox(_policy(), Command(["sh", "-c", script], stdout=write, stderr=write)) as sandbox:
            os.close(write)
            assert words.readline() == b"up\n"
            sandbox.send("interrupt")
            assert sandbox.wait(20).exit_code == 5
        assert words.read() == b"int\n"


@pytest.mark.parametrize(
    ("text", "real"),
    [
        ("/tmp", "/p/tmp"),
        ("/tmp/x", "/p/tmp/x"),
        ("/tmpfs", "/tmpfs"),
        ("/var/tmp", "/var/tmp"),
        ("--file=/home/student/work/a:/tmp", "--file=/p/home/work/a:/p/tmp"),
        ('{"ip": "/run/kernel/k"}', '{"ip": "/p/run/k"}'),
        ("/tmp/env/bin/python", "/tmp/env/bin/python"),
        ("/tmp/environment", "/p/tmp/environment"),
        ("/home/students/x", "/home/students/x"),
    ],
)
def test_places_are_translated_and_visible_paths_are_not(text: str, real: str) -> None:
    plan = {
        "argv": [text], "environment": {"X": text}, "cwd": "/", "work": "/home/student/work", "share_at": "/run/kernel",
        "room_files": {}, "limits": {}, "tier_visible": ["/tmp/env", "/usr"],
    }  # fmt: skip
    translated = confined._translate(plan, "/p")
    assert translated["argv"] == [real]
    assert translated["environment"] == {"X": real}


@pytest.mark.parametrize("person", ["root", "user"], indirect=True)
def test_a_notebook_runs_as_usual(tier: Tier) -> None:
    (end,) = tier.notebooks(
        ["x = 6 * 7", "x", "open('/etc/shadow')", "import time; time.sleep(60)", "x + 1", "import os; os._exit(3)", "x"], timeout=3,
    )  # fmt: skip
    assert end["error"] is None, end
    outputs = end["outputs"]
    assert "42" in str(outputs[1])
    assert "PermissionError" in str(outputs[2])
    assert "CellTimeoutError" in str(outputs[3])
    assert "43" in str(outputs[4])
    assert "KernelDiedError" in str(outputs[5])
    assert end["report"]["tier"] == "landlock"
    assert eventually(tier.is_empty)


def test_stale_directories_of_the_living_stay(parent: Path) -> None:
    limits = dataclasses.asdict(Limits())
    mine = confined.PrivateDirectory.make(str(parent), None, limits)
    stale = parent / f"isolate-999999999-5-{confined._numbering()}abc"
    elsewhere = parent / "isolate-999999999-5-01234567abc"  # made in another PID namespace, or on another host
    for path in (stale, elsewhere):
        path.mkdir()
    for old in (mine.path, stale, elsewhere):
        os.utime(old, (1, 1))
    again = confined.PrivateDirectory.make(str(parent), None, limits)
    assert sorted(map(str, parent.iterdir())) == sorted([mine.path, again.path, str(elsewhere)])
    elsewhere.rmdir()
    assert time.time() - os.stat(again.path).st_mtime < 60
    mine.remove()
    again.remove()
    again.remove()


def test_nothing_outside_is_looked_into_or_changed_through_a_link(parent: Path) -> None:
    """A directory that is swapped for a link between two looks leads the launcher nowhere."""
    outside = Path(tempfile.mkdtemp(dir="/var/tmp"))
    (outside / "b").mkdir(mode=0o555)
    mine = confined.PrivateDirectory.make(str(parent), None, dataclasses.asdict(Limits()))
    try:
        work = Path(mine.path) / "home/work"
        (work / "a" / "b").mkdir(parents=True)
        for status in mine._walk():  # what a process may do in the middle of it
            assert status is not None
            if (work / "a").is_dir() and not (work / "a").is_symlink():
                os.rename(work / "a", work / "moved")
                (work / "a").symlink_to(outside)
        with pytest.raises(OSError):
            mine._open_below(("home", "work", "a", "b"))
        assert stat.S_IMODE((outside / "b").stat().st_mode) == 0o555
    finally:
        mine.remove()
        subprocess.run(["rm", "-rf", str(outside)], check=True)


def test_files_that_come_and_go_hide_no_others(tier: Tier) -> None:
    outcome = tier.run(
        """
if os.fork() == 0:
    while True:
        for n in range(50): open(f"gone{n}", "w").close()
        for n in range(50): os.unlink(f"gone{n}")
for n in range(30): open(f"stay{n}", "wb").write(b"x" * (1 << 20)); time.sleep(0.1)
time.sleep(20)
""",
        limits={"files_bytes": 8 * MIB, "wall_seconds": 25},
    )
    assert outcome.limit == "files", outcome


def test_a_notebook_with_much_code_is_no_large_file_of_the_driver(tier: Tier) -> None:
    (end,) = tier.notebooks(["x = '" + "y" * 3_000_000 + "'", "len(x)"])
    assert end["error"] is None, end
    assert "3000000" in str(end["outputs"][1])
