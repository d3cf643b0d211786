# ruff: noqa: E501  # the probes are programs in strings
"""Rows 36 to 46: every hoard ends at a limit, and the report says at which."""

import time

import pytest

from attacks.harness import Attacker, Outcome, mostly_as_user

MIB = 1 << 20


def _ended_by(outcome: Outcome, limit: str) -> None:
    assert outcome.limit == limit, outcome
    assert outcome.report is not None
    assert limit.rstrip("s") in outcome.report["message"]


@pytest.mark.threat(36)
def test_a_loop_ends_at_the_cpu_limit(attacker: Attacker) -> None:
    _ended_by(attacker.run("while True: pass", limits={"cpu_seconds": 1, "wall_seconds": 20}), "cpu")


# Processor time that no single process uses up: children one after the other, all at once, orphans, and
# children whose times the kernel throws away because nobody will wait for them.
_CPU = {
    "one by one": """
while True:
    if os.fork() == 0:
        end = time.process_time() + 0.2
        while time.process_time() < end: pass
        os._exit(0)
    os.wait()
""",
    "at once": """
for _ in range(6): os.fork()
while True: pass
""",
    "orphans": """
while True:
    if os.fork() == 0:
        if os.fork() == 0:
            end = time.process_time() + 0.2
            while time.process_time() < end: pass
            os._exit(0)
        os._exit(0)
    os.wait()
    time.sleep(0.1)
""",
    "nobody waits": """
import signal
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
while True:
    if os.fork() == 0:
        end = time.process_time() + 0.2
        while time.process_time() < end: pass
        os._exit(0)
    try:
        os.wait()
    except ChildProcessError:
        pass
""",
    "threads": """
import threading
for _ in range(4):
    threading.Thread(target=lambda: sum(iter(int, 1))).start()
""",
}


@pytest.mark.threat(36, 38)
@mostly_as_user("how", _CPU, "at once", "nobody waits")
def test_processor_time_is_counted_in_total(attacker: Attacker, how: str) -> None:
    _ended_by(attacker.run(_CPU[how], limits={"cpu_seconds": 1.5, "wall_seconds": 9}), "cpu")


@pytest.mark.threat(37)
def test_one_allocation_above_the_limit_fails(attacker: Attacker) -> None:
    said = attacker.run(
        "try: x = bytearray(3 << 30)\nexcept MemoryError: say(end='MemoryError')", limits={"memory_bytes": 256 * MIB}
    ).said
    assert said["end"] == "MemoryError"


# Memory in forms that a sum of resident sets may not see. Each tries to hold 500 MiB and then sleeps.
_HOARDS = {
    "many processes": """
for _ in range(10):
    if os.fork() == 0:
        x = bytearray(b"x") * (50 << 20)
        time.sleep(60)
""",
    "shared": """
import mmap
for _ in range(10):
    m = mmap.mmap(-1, 50 << 20)
    for at in range(0, len(m), 4096): m[at] = 1
    keep = globals().setdefault("kept", []); keep.append(m)
""",
    "shared but not mapped in": """
import mmap
kept = []
for _ in range(10):
    m = mmap.mmap(-1, 50 << 20)
    m.write(b"x" * (50 << 20))
    m.madvise(mmap.MADV_DONTNEED)
    kept.append(m)
""",
    "shared, of /dev/zero": """
import mmap
kept = []
fd = os.open("/dev/zero", os.O_RDWR)
for _ in range(10):
    m = mmap.mmap(fd, 50 << 20)
    m.write(b"x" * (50 << 20))
    m.madvise(mmap.MADV_DONTNEED)
    kept.append(m)
""",
    "shared, touched by a child": """
import mmap
kept = [mmap.mmap(-1, 50 << 20) for _ in range(10)]
if os.fork() == 0:
    for m in kept:
        m.write(b"x" * (50 << 20))
        m.madvise(mmap.MADV_DONTNEED)
    os._exit(0)
os.wait()
""",
    "behind a thread": """
import threading
go = threading.Event()
def hoard():
    go.wait()
    time.sleep(0.3)
    global x
    x = bytearray(b"x") * (60 << 20)
    time.sleep(60)
for _ in range(8):
    if os.fork() == 0:
        threading.Thread(target=hoard).start()
        go.set()
        syscall(native(60, 93), 0)  # the first thread ends, and with it what /proc/PID shows of the memory
"""
    + "time.sleep(5)",
    "page tables": """
import mmap
kept = []
for _ in range(250):  # 4 KiB of tables for every 2 MiB of addresses
    m = mmap.mmap(-1, 1 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000, prot=mmap.PROT_READ)
    m.madvise(mmap.MADV_NOHUGEPAGE)
    for at in range(0, 1 << 30, 2 << 20): m[at]
    kept.append(m)
""",
    "socket buffers": """
import socket
def fill():
    kept = []
    try:
        while True:
            pair = socket.socketpair()
            kept.append(pair)
            for one in pair:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
                one.setblocking(False)
                try:
                    while True: one.send(b"x" * 65536)
                except BlockingIOError: pass
    except OSError: pass
    time.sleep(60)
for _ in range(3):
    if os.fork() == 0: fill()
""",
    "loopback tcp": """
import socket
socket.setdefaulttimeout(1)
server = socket.create_server(("127.0.0.1", 0), backlog=1000)
kept, held = [], 0
def fill():
    global held
    try:
        while True:
            one = socket.create_connection(server.getsockname())
            kept.append(one)
            one.setblocking(False)
            try:
                while True: held += one.send(b"x" * 65536)
            except BlockingIOError: pass
    except OSError: pass
fill()
""",
    "pipes": """
import fcntl
kept, held = [], 0
def fill():
    global held
    try:
        while True:
            r, w = os.pipe()
            kept.extend((r, w))
            try: fcntl.fcntl(w, 1031, 1 << 20)
            except OSError: pass
            os.set_blocking(w, False)
            try:
                while True: held += os.write(w, b"x" * 65536)
            except BlockingIOError: pass
    except OSError: pass
fill()
""",
}
_UNLIKELY = {"loopback tcp", "pipes"}
"""Hoards that the kernel bounds by itself: they only must not reach their goal unnoticed."""


@pytest.mark.threat(37, 38, 42)
@pytest.mark.parametrize("how", _HOARDS)
def test_memory_is_counted_in_every_form(attacker: Attacker, how: str) -> None:
    code = _HOARDS[how] + "\nprint('full', globals().get('held'), flush=True)\ntime.sleep(1.5)"
    outcome = attacker.run(
        code, limits={"memory_bytes": 200 * MIB, "wall_seconds": 15, "open_files": 1024, "processes": 40}
    )
    assert outcome.error is None
    if how in _UNLIKELY and outcome.limit != "memory":
        assert int(outcome.output.partition("full ")[2]) < 400 * MIB
        return
    assert outcome.report is not None
    if outcome.report["ended"] == "exited" and "full" not in outcome.output:
        assert "MemoryError" in outcome.output or "OSError" in outcome.output, outcome
        return
    _ended_by(outcome, "memory")


@pytest.mark.threat(39, 41)
def test_sparse_and_large_files_end_at_the_file_limit(attacker: Attacker) -> None:
    said = attacker.run(
        """
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
file = open("sparse", "wb")
say(truncate=attempt(os.truncate, "sparse", 1 << 40), seek=attempt(os.pwrite, file.fileno(), b"x", 1 << 40),
    allocate=attempt(os.posix_fallocate, file.fileno(), 0, 1 << 30), size=os.path.getsize("sparse"))
""",
        limits={"files_bytes": 16 * MIB},
    ).said
    assert {said[name] for name in ("truncate", "seek", "allocate")} <= {"EFBIG", "ENOSPC"}
    assert said["size"] <= 16 * MIB
    loud = attacker.run(
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_DFL); os.truncate(os.open('f', 66, 0o600), 1 << 40)"
    )
    _ended_by(loud, "files")


@pytest.mark.threat(40)
@mostly_as_user("kind", ["files", "directories", "links", "hard links", "sockets", "long links"], "files")
def test_inodes_are_capped(attacker: Attacker, kind: str) -> None:
    said = attacker.run(
        """
import socket
kind, count = sys.argv[1], 0
open("first", "w").close()
makers = {
    "files": lambda n: os.close(os.open(f"f{n}", os.O_CREAT, 0o600)), "directories": lambda n: os.mkdir(f"f{n}"),
    "links": lambda n: os.symlink("x", f"f{n}"), "hard links": lambda n: os.link("first", f"f{n}"),
    "sockets": lambda n: socket.socket(socket.AF_UNIX).bind(f"f{n}"),
    "long links": lambda n: os.symlink("x" * 4000, f"f{n}"),
}
for count in range(5000):
    error = attempt(makers[kind], count)
    if error != "ok":
        break
say(count=count, error=error)
""",
        kind,
        limits={"files_count": 700},
    ).said
    assert said["error"] in {"ENOSPC", "EMLINK"}
    assert said["count"] < 700


@pytest.mark.threat(42, 43)
def test_memory_outside_of_the_limits_cannot_be_had(attacker: Attacker) -> None:
    """memfd, SysV shared memory, huge pages, locked memory, POSIX queues, hidden memory."""
    said = attacker.run("""
import mmap, resource
tries = {"memfd": syscall(native(319, 279), b"x", 0), "shmget": syscall(native(29, 194), 0, 1 << 20, 0o1600),
    "msgget": syscall(native(68, 186), 0, 0o1600), "semget": syscall(native(64, 190), 0, 9, 0o1600),
    "secret": syscall(447, 0), "mq_open": syscall(native(240, 180), b"q", 66, 0o600, None)}
tries["mlock"] = "ok" if libc.mlockall(3) == 0 and resource.getrlimit(resource.RLIMIT_MEMLOCK)[1] > 1 << 20 else "no"
say(**tries)
""").said
    assert "ok" not in said.values(), said


@pytest.mark.threat(44, 45)
def test_descriptors_and_threads_are_capped(attacker: Attacker) -> None:
    said = attacker.run(
        """
import threading
fds = []
try:
    while True: fds.append(os.dup(0))
except OSError as error: full = error.errno
for fd in fds: os.close(fd)
threads = 0
try:
    for _ in range(500):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        threads += 1
except RuntimeError: pass
say(fds=len(fds), full=errno.errorcode[full], threads=threads)
sys.stdout.flush()
os._exit(0)
""",
        limits={"open_files": 128, "processes": 50},
    ).said
    assert said["full"] == "EMFILE"
    assert said["fds"] < 128
    assert 10 < said["threads"] < 50


@pytest.mark.threat(46)
def test_sleeping_for_ever_ends_at_the_wall_limit(attacker: Attacker) -> None:
    started = time.monotonic()
    _ended_by(attacker.run("time.sleep(1e6)", limits={"wall_seconds": 1}), "wall")
    assert time.monotonic() - started < 20


@pytest.mark.threat(46)
def test_a_full_stdout_that_nobody_reads_does_not_hold_the_end(attacker: Attacker) -> None:
    _ended_by(attacker.run("while True: os.write(1, b'x' * 65536)", limits={"wall_seconds": 1}), "wall")


@pytest.mark.threat(38, 50)
def test_host_wide_tables_are_not_used_up(attacker: Attacker) -> None:
    """Asynchronous input/output has one table for the whole host: /proc/sys/fs/aio-max-nr."""

    def used() -> int:
        with open("/proc/sys/fs/aio-nr", encoding="ascii") as file:
            return int(file.read())

    before, most = used(), 0
    running = attacker.start_code("""
for number in range(3000):
    context = ctypes.c_ulong(0)
    if syscall(native(206, 0), 1000, ctypes.byref(context)) != "ok":
        break
print("up", flush=True)
time.sleep(1)
""")
    running.hear("up")
    most = used() - before
    running.finish()
    assert most < 5000


@pytest.mark.threat(50)
@pytest.mark.parametrize(
    "person",
    ["root", "user"],
    indirect=True,
)
def test_descriptors_in_flight_do_not_stop_the_next_sandbox(attacker: Attacker) -> None:
    """The kernel counts descriptors that are being sent per *host* user; an ordinary user's sandboxes share one."""
    hog = attacker.start_code("""
import array, socket
kept = []
sent = 0
payload = array.array("i", [0] * 250)
try:
    while sent < 100000:
        a, b = socket.socketpair()
        a.setblocking(False)
        kept.append((a, b))
        a.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, payload)])
        sent += 250
except OSError as error:
    print(error)
print("up", sent, flush=True)
time.sleep(30)
""")
    hog.hear("up")
    (end,) = attacker.notebooks(["1 + 1"])
    assert end["error"] is None, end


@pytest.mark.threat(20, 39)
def test_a_full_file_system_does_not_hide_the_end(attacker: Attacker) -> None:
    """The room's init packs and reports although nothing can be written any more."""
    outcome = attacker.run(
        "try:\n    open('big', 'wb').write(b'x' * (1 << 30))\nexcept OSError: pass\nsys.exit(9)",
        limits={"files_bytes": 4 * MIB},
        keep=True,
    )
    assert outcome.error is None
    assert outcome.report is not None


# What the code leaves in its work directory for the room's init to pack.
_ODD_TREES = {
    "deep": "for _ in range(5000):\n    os.mkdir('d'); os.chdir('d')",
    "odd names": "for n in (b'\\xff\\xfe', b'a\\nb', b'\\xed\\xa0\\x80', b'\\x1b[2J', b' ', b'-rf'): open(n, 'w').close()",
    "fifos and sockets": "import socket; s = socket.socket(socket.AF_UNIX); s.bind('sock'); attempt(os.mkfifo, 'fifo')",
    "no permissions": "os.mkdir('a'); open('a/b', 'w').close(); os.chmod('a/b', 0); os.chmod('a', 0); os.chmod('.', 0)",
    "sparse": "[os.truncate(os.open(f's{n}', 66, 0o600), 4 << 20) for n in range(20)]",
    "links": "os.symlink('/etc', 'etc'); os.symlink('self', 'self'); os.symlink('/proc/1/environ', 'p'); os.link('p', 'q')",
    "work is a link to usr": "os.chdir('/'); os.rename('/home/student/work', '/home/student/w'); os.symlink('/usr', '/home/student/work')",
    "work is a link to proc": "os.chdir('/'); os.rename('/home/student/work', '/home/student/w'); os.symlink('/proc/1', '/home/student/work')",
    "work is gone": "os.chdir('/'); os.rmdir('/home/student/work')",
    "work is a file": "os.chdir('/'); os.rmdir('/home/student/work'); open('/home/student/work', 'w').close()",
    "long names": "[open('n' * 250 + str(n), 'w').close() for n in range(2000)]",
    "changing": "os.fork() or [open(f'c{n % 9}', 'ab').write(b'x' * 999) for n in range(10**9)]",
}  # fmt: skip


@pytest.mark.threat(20, 30)
@mostly_as_user("tree", _ODD_TREES, "deep", "work is a link to proc", "no permissions")
def test_whatever_is_left_in_the_work_directory_is_no_fault_of_the_host(attacker: Attacker, tree: str) -> None:
    outcome = attacker.run(_ODD_TREES[tree] + "\nsys.exit(0)", keep=True, limits={"files_bytes": 32 * MIB})
    assert outcome.error is None
    assert outcome.report is not None
    assert outcome.report["exit_code"] == 0, outcome
    assert all(kind in "05" and not mode & 0o7022 for mode, _, kind in outcome.kept.values())
    assert sum(size for _, size, _ in outcome.kept.values()) <= 32 * MIB
    assert not any(name.startswith("/") or ".." in name.split("/") for name in outcome.kept)


@pytest.mark.threat(50)
def test_one_greedy_job_leaves_time_for_another(attacker: Attacker) -> None:
    greedy = attacker.start_code("print('up', flush=True)\nfor _ in range(5): os.fork()\nwhile True: pass")
    greedy.hear("up")
    outcome = attacker.run("say(sum=sum(range(1000000)))", limits={"wall_seconds": 60})
    assert outcome.said["sum"] == 499999500000
    assert outcome.report is not None
    assert outcome.report["wall_seconds"] < 40


@pytest.mark.threat(50)
@pytest.mark.parametrize("person", ["root"], indirect=True)
def test_many_processes_have_the_share_of_one_sandbox(attacker: Attacker) -> None:
    """Thirty sessions against one process, all pinned to one processor: with control groups each sandbox has half."""
    pin = "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    greedy = attacker.start_code(
        pin
        + "for _ in range(30):\n    if os.fork() == 0: os.setsid(); break\nprint('up', flush=True)\nwhile True: pass"
    )
    greedy.hear("up")
    modest = attacker.run(
        pin + "end = time.monotonic() + 4\nwhile time.monotonic() < end: pass\nsay(used=time.process_time())"
    )
    assert modest.report is not None
    if not any("cgroup" in layer and "cpu" in layer for layer in modest.report["layers"]):
        pytest.skip("no control group with a share of the processor can be made here")
    # Other tests run on this processor, too; one of 31 equal shares would be 0.13 s.
    assert modest.said["used"] > 0.4
