# ruff: noqa: E501  # the probes are programs in strings
"""The whole surface, not only what the catalogue lists: every system call, socket, file of proc, inherited thing.

What these tests allow is the reviewed list that docs/surface.md explains. Something new that a later kernel or a
change of ours brings fails here and wants a decision.
"""

import itertools
import signal
import socket
from pathlib import Path

import pyseccomp
import pytest

from attacks.harness import Attacker, x86_64_only
from isolate import seccomp

_TABLE_SIZE = 600
"""System call numbers that are tried: more than there are."""

# One child for each number, all arguments -1: a bad descriptor, pointer, pid, flag. What the child says is its exit
# status: the errno, 200 for success. A pending alarm ends what waits.
_EVERY_CALL = """
import signal
answers = {}
for number in range(int(sys.argv[1])):
    pid = os.fork()
    if pid == 0:
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, 1); os.dup2(null, 2)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(-1)] * 6)
        os._exit(ctypes.get_errno() if result == -1 else 200)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    answers[number] = errno.errorcode.get(code, "reached") if code >= 0 else f"signal {-code}"
say(**{str(n): a for n, a in answers.items()})
"""

_PAST_EVERY_FILTER = {"335", "uretprobe", "336", "uprobe"}
"""Linux (from 6.14) lets these pass all filters on x86_64, and ends whoever calls them from outside its trampoline."""

# The kernel's own EPERM or ENOSYS for such arguments, or this project's answer to them: `clone`, `socket` and others
# are allowed for some arguments only. A call that this machine's libseccomp or kernel does not know is not there.
_REFUSE_SUCH_ARGUMENTS = """clone socket socketpair personality futex prlimit64 setrlimit setgroups epoll_ctl_old
epoll_wait_old chmod fchmod fchmodat creat open openat""".split()


def _names() -> dict[int, str]:
    """Number to name, as libseccomp knows them."""
    found = {}
    for number in range(_TABLE_SIZE):
        try:
            found[number] = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, number).decode()
        except (ValueError, OSError):
            continue
    return found


@pytest.mark.threat(57)
def test_every_system_call_answers_as_the_list_says(attacker: Attacker) -> None:
    """Also those that nobody has a name for yet: what is not allowed by name is refused by number."""
    said = attacker.run(_EVERY_CALL, str(_TABLE_SIZE)).said
    names = _names()
    assert len(said) == _TABLE_SIZE
    reached = {names.get(int(n), n) for n, answer in said.items() if answer not in {"EPERM", "ENOSYS"}}
    allowed = {*seccomp.allowed_names()}
    assert reached - _PAST_EVERY_FILTER <= allowed
    assert {said[number] for number in ("335", "336")} <= {"ENOSYS", "ENXIO", f"signal {int(signal.SIGILL)}"}
    refused = {names[int(n)] for n, answer in said.items() if answer in {"EPERM", "ENOSYS"} and int(n) in names}
    absent = {names[int(n)] for n, answer in said.items() if answer == "ENOSYS" and names.get(int(n)) in _NEW}
    assert (refused & allowed) - absent <= set(_REFUSE_SUCH_ARGUMENTS)


_NEW = {"futex_wake", "futex_wait", "futex_requeue", "map_shadow_stack", "mseal", "futex_waitv", "landlock_create_ruleset",
        "landlock_add_rule", "landlock_restrict_self", "memfd_secret", "epoll_pwait2", "pkey_alloc", "pkey_free",
        "pkey_mprotect", "get_mempolicy", "set_mempolicy", "mbind"}  # fmt: skip
"""Allowed calls that an older or smaller kernel answers with ENOSYS by itself."""


@pytest.mark.threat(26, 57)
def test_calls_that_pass_their_arguments_in_memory_do_not_exist(attacker: Attacker) -> None:
    """No filter can see into memory: clone3, openat2 and the newest calls answer ENOSYS, so that libraries fall back."""
    said = attacker.run("""
how = (ctypes.c_uint64 * 3)(0, 0, 0)
args = (ctypes.c_uint64 * 11)(0, 0, 0, 0, 17)
me = os.getpid()
tries = {"openat2": syscall(437, -100, b"/usr", ctypes.byref(how), 24), "fchmodat2": syscall(452, -100, b"/tmp", 0o700, 0),
    "setxattrat": syscall(463, -100, b"/tmp", 0, b"user.x", None, 0), "getxattrat": syscall(464, -100, b"/tmp", 0, b"x", None, 0),
    "cachestat": syscall(451, 0, None, None, 0), "statmount": syscall(457, None, None, 0, 0), "listmount": syscall(458, None, None, 0, 0),
    "lsm_get_self_attr": syscall(459, 100, None, None, 0), "lsm_set_self_attr": syscall(460, 100, None, 0, 0),
    "lsm_list_modules": syscall(461, None, None, 0), "open_tree_attr": syscall(467, -100, b"/usr", 0, None, 0),
    "file_getattr": syscall(468, -100, b"/usr", None, 0, 0), "file_setattr": syscall(469, -100, b"/tmp", None, 0, 0),
    "listns": syscall(470, None, None, 0, 0), "memfd_create": syscall(native(319, 279), b"x", 0),
    "clone3": syscall(435, ctypes.byref(args), 88)}
os._exit(0) if os.getpid() != me else say(**tries)
""").said
    assert set(said.values()) == {"ENOSYS"}, said


@x86_64_only
def test_every_number_of_the_x32_table_kills(attacker: Attacker) -> None:
    """Numbers with bit 30 set: the architecture says x86_64, only the number tells. And i386 through int 0x80."""
    said = attacker.run("""
import mmap, signal
ends = {}
gate = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=7)
gate.write(bytes.fromhex("89f8cd80c3"))  # mov eax, edi; int 0x80; ret
call = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(gate)))
def end_of(what):
    pid = os.fork()
    if pid == 0:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        what()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
x32 = {end_of(lambda: libc.syscall(ctypes.c_long(0x40000000 | number), *[ctypes.c_long(-1)] * 6)) for number in (*range(0, 335), *range(512, 548))}
i386 = {end_of(lambda: call(number)) for number in range(0, 460)}
say(x32=sorted(x32), i386=sorted(i386))
""").said
    # SIGSEGV: a kernel without 32-bit calls has no such gate at all
    assert said["x32"] == [-signal.SIGSYS]
    assert said["i386"] in ([-signal.SIGSYS], [-signal.SIGSEGV])


_TYPES = (1, 2, 3, 4, 5, 6, 10)
_PROTOCOLS = (0, 1, 2, 6, 17, 33, 58, 115, 132, 136, 255, 262)


@pytest.mark.threat(34)
def test_every_socket_family_type_and_protocol(attacker: Attacker) -> None:
    """What can be made, also with flags and with high halves that the kernel ignores: unix, and TCP and UDP."""
    said = attacker.run(
        """
types, protocols = json.loads(sys.argv[1])
made, odd = [], {}
for family in range(0, 65):
    for kind in types:
        for protocol in protocols:
            answer = syscall(native(41, 198), family, kind | 0o4000, protocol)
            if answer == "ok": made.append([family, kind, protocol])
            elif family not in (1, 2, 10): odd.setdefault(answer, set()).add(family)
    os.closerange(3, 500)
high = [f for f in range(0, 65) if f not in (1, 2, 10) and syscall(native(41, 198), f | 1 << 32, 2, 0) == "ok"]
low = [p for p in (33, 132, 136, 255, 262) for k in (1, 2, 3, 5, 6) if syscall(native(41, 198), 2, k, p | 1 << 32) == "ok"]
say(made=made, odd={a: sorted(f) for a, f in odd.items()}, high=high, low=low)
""",
        f"[{list(_TYPES)}, {list(_PROTOCOLS)}]",
        limits={"open_files": 400},
    ).said
    unix = {(socket.AF_UNIX, kind, protocol) for kind in (1, 2, 3, 5) for protocol in (0, 1)}
    stream = {(family, 1, protocol) for family in (socket.AF_INET, socket.AF_INET6) for protocol in (0, 6)}
    datagram = {(family, 2, protocol) for family in (socket.AF_INET, socket.AF_INET6) for protocol in (0, 17)}
    assert {tuple(one) for one in said["made"]} == unix | stream | datagram
    assert said["odd"].pop("EINVAL") == [socket.AF_NETLINK]
    assert set(said["odd"]) <= {"EAFNOSUPPORT", "ENOSYS"}
    assert (said["high"], said["low"]) == ([], [])


_PROC_SELF = """arch_status attr autogroup auxv cgroup clear_refs cmdline comm coredump_filter cpu_resctrl_groups
cpuset cwd environ exe fd fdinfo gid_map io ksm_merging_pages ksm_stat latency limits loginuid make-it-fail fail-nth
map_files maps mem mountinfo mounts mountstats net ns numa_maps oom_adj oom_score oom_score_adj pagemap patch_state
personality projid_map root sched schedstat sessionid setgroups smaps smaps_rollup stack stat statm status syscall task
timens_offsets timers timerslack_ns uid_map wchan seccomp_cache children""".split()
_DEVICES = "fd full null ptmx pts random shm stderr stdin stdout urandom zero".split()


@pytest.mark.threat(9, 19)
def test_proc_sys_and_dev_hold_what_is_listed(attacker: Attacker) -> None:
    said = attacker.run("""
say(root=sorted(os.listdir("/")), proc=[n for n in os.listdir("/proc") if not n.isdecimal()], own=os.listdir("/proc/self"),
    dev=sorted(os.listdir("/dev")), pts=os.listdir("/dev/pts"), sys=attempt(os.listdir, "/sys"), etc=sorted(os.listdir("/etc")),
    run=os.listdir("/run"), var=os.listdir("/var"), shm=os.listdir("/dev/shm"), tmp=os.listdir("/tmp"))
""").said
    assert sorted(said["proc"]) == ["self", "thread-self"]
    assert set(said["own"]) <= set(_PROC_SELF)
    assert said["dev"] == _DEVICES
    assert (said["pts"], said["sys"], said["run"], said["shm"]) == (["ptmx"], "ENOENT", [], [])
    assert said["tmp"] == [] or not Path(attacker.stage.directory).is_relative_to("/tmp") or len(said["tmp"]) == 1
    system = {
        "bin",
        "dev",
        "etc",
        "home",
        "lib",
        "lib32",
        "lib64",
        "libx32",
        "nix",
        "proc",
        "run",
        "sbin",
        "tmp",
        "usr",
        "var",
    }
    assert set(said["root"]) <= system
    assert said["var"] == ["tmp"]
    shown = "alternatives fonts group hosts java ld.so.cache ld.so.conf ld.so.conf.d localtime mime.types nsswitch.conf passwd"
    assert set(said["etc"]) <= {*shown.split(), "R", "matplotlibrc", "resolv.conf", "timezone"}


# A process may open these of its own for writing; each is judged in docs/surface.md.
_OWN_WRITABLE = set(
    """autogroup clear_refs comm coredump_filter gid_map loginuid mem oom_adj oom_score_adj projid_map
sched setgroups timens_offsets timerslack_ns uid_map attr/current attr/exec attr/fscreate attr/keycreate attr/prev
attr/sockcreate attr/apparmor/current attr/apparmor/exec attr/smack/current latency make-it-fail fail-nth""".split()
)


@pytest.mark.threat(9, 18, 27)
def test_what_can_be_opened_for_writing_in_proc(attacker: Attacker) -> None:
    """Of one's own process, of another one of the room, and of the room's init: of that, nothing."""
    said = attacker.run("""
child = os.fork()
if child == 0:
    time.sleep(60)
def writable(top):
    found = []
    for where, directories, names in os.walk(top):
        directories[:] = [d for d in directories if d not in ("cwd", "root", "fd", "map_files", "net", "task", "ns")]
        for name in names:
            path = os.path.join(where, name)
            if os.path.islink(path): continue
            if attempt(lambda: os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))) == "ok":
                found.append(os.path.relpath(path, top))
    return found
own, task = writable("/proc/self"), writable(f"/proc/self/task/{os.getpid()}")
init, other = writable("/proc/1"), writable(f"/proc/{child}")
def put(name, text, who="self"):
    return attempt(lambda: os.write(os.open(f"/proc/{who}/{name}", os.O_WRONLY), text))
effects = {"uid_map": put("uid_map", b"0 0 1"), "gid_map": put("gid_map", b"0 0 1"), "setgroups": put("setgroups", b"allow"),
    "projid_map": put("projid_map", b"0 0 1"), "loginuid": put("loginuid", b"0"), "oom": put("oom_score_adj", b"-999"),
    "oom of init": put("oom_score_adj", b"1000", "1"), "timens": put("timens_offsets", b"monotonic 1000 0"),
    "autogroup": put("autogroup", b"-10"), "attr": put("attr/current", b"unconfined"), "init": put("comm", b"x", "1")}
os.kill(child, 9)
say(own=own, task=task, init=init, other=other, effects=effects)
""").said
    assert set(said["own"]) | set(said["task"]) | set(said["other"]) <= _OWN_WRITABLE
    assert said["init"] == []
    assert "ok" not in said["effects"].values(), said["effects"]


_LOOK_AROUND = """
import resource, signal
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines())
def prctl(option): return libc.prctl(option, 0, 0, 0, 0)
def timer(which): return signal.getitimer(which)[0]
stat = open("/proc/self/stat").read().rpartition(")")[2].split()
def read(name):
    try: return open(f"/proc/self/{name}").read().strip()
    except OSError as error: return errno.errorcode[error.errno]
mode = ctypes.c_int(-1)
say(fds=[fd for fd in range(1024) if attempt(os.fstat, fd) == "ok"], environment=dict(os.environ), cwd=os.getcwd(),
    umask=os.umask(0), blocked=int(status["SigBlk"], 16), pending=int(status["SigPnd"], 16) | int(status["ShdPnd"], 16),
    ignored=int(status["SigIgn"], 16) & ~(3 << 31), tty=int(stat[4]), devtty=attempt(open, "/dev/tty"), leader=os.getsid(0) == os.getpgrp() == os.getpid(),
    policy=os.sched_getscheduler(0), personality=libc.syscall(ctypes.c_long(native(135, 92)), ctypes.c_long(0xffffffff)), securebits=prctl(27), keepcaps=prctl(7), timerslack=prctl(30),
    thp=prctl(42), death=attempt(lambda: None), dumpable=prctl(3), mce=prctl(34), timers=[timer(n) for n in range(3)],
    oom=int(read("oom_score_adj")), cgroup=read("cgroup"), hostname=os.uname().nodename, domain=os.uname()[1], timens=read("timens_offsets"),
    mempolicy=[syscall(native(239, 236), ctypes.byref(mode), None, 0, 0, 0), mode.value], keys=syscall(native(250, 219), 0, -3, 0),
    ioprio=libc.syscall(ctypes.c_long(native(252, 31)), ctypes.c_long(1), ctypes.c_long(0)), nice=os.getpriority(0, 0),
    groups=os.getgroups(), ids=[*os.getresuid(), *os.getresgid()], core=resource.getrlimit(resource.RLIMIT_CORE),
    stack=resource.getrlimit(resource.RLIMIT_STACK), loginuid=read("loginuid"), session=read("sessionid"))
"""
_RANDOMISED = """
lines = [line.split() for line in open("/proc/self/maps")]
say(places={words[-1]: words[0].split("-")[0] for words in lines if words[-1] in ("[stack]", "[vdso]")})
"""


@pytest.mark.threat(8, 11)
@pytest.mark.parametrize("odd", [False, True], ids=["plain", "odd parent"])
def test_nothing_is_inherited_but_what_is_listed(attacker: Attacker, odd: bool) -> None:
    """Also when the supervisor itself has open files, blocked and ignored signals, a umask, timers.

    Inherited on purpose, because only less may come of it: niceness and scheduling policy, processors, lower rlimits,
    the timer slack. docs/surface.md has the list.
    """
    outcome = attacker.run(_LOOK_AROUND, odd=odd)
    assert outcome.limit is None  # a blocked SIGCHLD did not hide the command's end until the time was up
    said = outcome.said
    assert said["fds"] == [0, 1, 2]
    assert set(said["environment"]) <= {
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "TMPDIR", "LANG", "LC_CTYPE", "PWD"),
        *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"),
    }
    expected = {
        "cwd": "/home/student/work", "umask": 0o022, "blocked": 0, "pending": 0, "tty": 0, "leader": True,
        "securebits": 0, "keepcaps": 0, "dumpable": 1, "timers": [0.0] * 3,
        "hostname": "sandbox", "mempolicy": ["ok", 0], "keys": "EPERM", "groups": [], "ids": [1000] * 6, "core": [1, 1],
    }  # fmt: skip
    python_ignores = 1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1
    expected["ignored"] = python_ignores
    expected["devtty"] = "ENOENT"
    assert {name: said[name] for name in expected} == expected
    assert said["oom"] >= (555 if odd else 0)
    assert {line.split(":", 2)[2] for line in said["cgroup"].splitlines()} <= {"/"}


@pytest.mark.threat(58)
@pytest.mark.parametrize("odd", [False, True])
def test_addresses_are_random_whatever_the_parent_had(attacker: Attacker, odd: bool) -> None:
    first, second = (attacker.run(_RANDOMISED, odd=odd).said["places"] for _ in range(2))
    assert set(first) == {"[stack]", "[vdso]"}
    assert not set(first.values()) & set(second.values())


def test_time_cannot_be_changed_and_what_it_tells(attacker: Attacker) -> None:
    """The clocks are the host's: how long it has been up is no secret to a sandbox. Nobody's files or names are."""
    said = attacker.run("""
say(namespace=attempt(os.readlink, "/proc/self/ns/time"), up=time.clock_gettime(time.CLOCK_BOOTTIME),
    set=[attempt(time.clock_settime, clock, 1.0) for clock in (0, 1, 7, 11)], stat=attempt(open, "/proc/stat"),
    wake=attempt(lambda: 1 / 0 if syscall(native(283, 85), 9, 0) == "ok" else None) if 0 else syscall(native(283, 85), 9, 0),
    uptime=attempt(open, "/proc/uptime"), loadavg=attempt(open, "/proc/loadavg"), rtc=attempt(open, "/dev/rtc"))
""").said
    assert "ok" not in said["set"]
    assert {said["stat"], said["uptime"], said["loadavg"], said["rtc"]} == {"ENOENT"}
    assert said["wake"] == "EPERM"  # timerfd on CLOCK_BOOTTIME_ALARM would wake a sleeping host


@pytest.mark.threat(56)
def test_ioctls_that_change_a_device_or_a_file_system_are_refused(attacker: Attacker) -> None:
    """The random devices, terminals, and the file systems of the host that can be read."""
    said = attacker.run("""
import fcntl, pty
main, side = pty.openpty()
random = os.open("/dev/urandom", os.O_RDWR)
usr, own = os.open("/usr", os.O_RDONLY), os.open("/usr/bin/env", os.O_RDONLY)
zeros = bytes(64)
def ioctl(fd, request, argument=zeros): return attempt(fcntl.ioctl, fd, request, argument)
tries = {"RNDADDENTROPY": ioctl(random, 0x40085203), "RNDADDTOENTCNT": ioctl(random, 0x40045201), "RNDZAPENTCNT": ioctl(random, 0x5204),
    "RNDCLEARPOOL": ioctl(random, 0x5206), "RNDRESEEDCRNG": ioctl(random, 0x5207),
    "FIFREEZE": ioctl(usr, 0xC0045877), "FITHAW": ioctl(usr, 0xC0045878), "FITRIM": ioctl(usr, 0xC0185879), "FIBMAP": ioctl(own, 1),
    "SETFLAGS": ioctl(own, 0x40086602), "FSSETXATTR": ioctl(own, 0x401C5820), "VERITY": ioctl(own, 0x40806685),
    "TIOCSTI": ioctl(side, 0x5412, b"x"), "TIOCLINUX": ioctl(side, 0x541C, b"\\2"), "TIOCCONS": ioctl(side, 0x541D),
    "KDSKBENT": ioctl(side, 0x4B47), "VT_ACTIVATE": ioctl(side, 0x5606), "LOOP_CTL": attempt(open, "/dev/loop-control"),
    "block": attempt(open, "/dev/vda"), "kvm": attempt(open, "/dev/kvm"), "fuse": attempt(open, "/dev/fuse"), "uffd": attempt(open, "/dev/userfaultfd"),
    "tun": attempt(open, "/dev/net/tun"), "mem": attempt(open, "/dev/mem"), "console": attempt(open, "/dev/console")}
say(tries=tries, winsize=ioctl(side, 0x5413), readable=ioctl(main, 0x541B, bytes(4)))
""").said
    assert (said["winsize"], said["readable"]) == ("ok", "ok")  # the control: ordinary requests
    assert "ok" not in said["tries"].values(), said["tries"]


@pytest.mark.threat(50)
def test_one_job_does_not_touch_what_the_processor_schedules_for_others(attacker: Attacker) -> None:
    """Core scheduling would keep the other half of a processor idle while this job runs; sync would flush every disk."""
    said = attacker.run("""
say(core=[errno.errorcode[ctypes.get_errno()] if libc.prctl(62, option, 0, 0, 0) else "ok" for option in (1, 2, 3)],
    sync=[syscall(native(162, 81)), syscall(native(306, 267), os.open("/usr", os.O_RDONLY))])
""").said
    assert set(said["core"]) == {"EINVAL"}
    assert set(said["sync"]) == {"ok"}  # answered by the filter: there is no disk to write to


# Row 62: what two jobs could tell each other through a file that both may only read.
_SENDER = """
import fcntl
fd = os.open(sys.argv[1], os.O_RDONLY)
said_of = {"flock": attempt(fcntl.flock, fd, fcntl.LOCK_EX | fcntl.LOCK_NB)}
shared = __import__("struct").pack("hhqqi", 0, 0, 0, 0, 0)
said_of["read lock"] = attempt(fcntl.fcntl, fd, fcntl.F_SETLK, shared)
said_of["lease"] = attempt(fcntl.fcntl, fd, 1024, 0)
said_of["write lock"] = attempt(fcntl.lockf, fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("up", json.dumps(said_of), flush=True)
time.sleep(60)
"""
_RECEIVER = """
import fcntl, struct
fd = os.open(sys.argv[1], os.O_RDONLY)
asked = fcntl.fcntl(fd, fcntl.F_GETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))
say(flock=attempt(fcntl.flock, fd, fcntl.LOCK_EX | fcntl.LOCK_NB), seen=struct.unpack("hhqqi4x", asked)[0] != fcntl.F_UNLCK,
    pid=struct.unpack("hhqqi4x", asked)[4], inotify=syscall(native(294, 26), 0), fanotify=syscall(native(300, 262), 0, 0),
    dnotify=attempt(fcntl.fcntl, os.open(os.path.dirname(sys.argv[1]), os.O_RDONLY), fcntl.F_NOTIFY, 1),
    lease=attempt(fcntl.fcntl, os.open(sys.argv[1], os.O_RDONLY), 1024, fcntl.F_WRLCK),
    read_lease=attempt(fcntl.fcntl, os.open(sys.argv[1], os.O_RDONLY), 1024, fcntl.F_RDLCK))
"""


@pytest.mark.threat(62)
def test_what_two_jobs_can_tell_each_other_through_a_shared_file(attacker: Attacker) -> None:
    """Locks: yes, and docs/surface.md says how fast. Watches, leases: no. Neither names a process of the other."""
    data = attacker.elsewhere("data")
    path = attacker.write(data / "file", "1")
    sender = attacker.start_code(_SENDER, str(path), ro=[str(data)])
    sender.hear("up")
    said = attacker.run(_RECEIVER, str(path), ro=[str(data)]).said
    assert said["flock"] in {"EAGAIN", "ok"}  # EAGAIN: seen, the channel that is documented
    assert said["pid"] == 0
    assert said["inotify"] == "ENOSYS"
    assert said["fanotify"] == "EPERM"
    assert said["dnotify"] == said["lease"] == said["read_lease"] == "EINVAL"


def test_the_lists_do_not_overlap_and_are_known() -> None:
    """A name that nobody's table knows would be a typing error that silently allows or refuses nothing."""
    names = set(_names().values())
    allowed, refused = set(seccomp.allowed_names()), set(seccomp.refused_names())
    assert not allowed & refused
    newer_or_elsewhere = {"mseal", "setxattrat"}
    unknown = {name for name in itertools.chain(allowed, refused) if name not in names} - newer_or_elsewhere
    resolvable = {name for name in unknown if _resolves(name)}
    assert unknown == resolvable


def _resolves(name: str) -> bool:
    """Whether libseccomp knows the name at all: negative numbers are calls of other architectures."""
    try:
        return bool(pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name) != -1)
    except (ValueError, OSError):
        return False
