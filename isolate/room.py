"""The second stage of a sandbox: the room in which somebody's code runs, nested in a base.

Its own user namespace locks the mounts of the base, so that not even all capabilities could change them; then
it gives up every capability. `run_outer` unshares and forks; `_run_init` is PID 1 of the room: it makes the
writable places, closes the walls, starts the command, reaps, and when the command ends kills what is left.

Standard library only, for any Python from 3.9: a template process of a course's own environment may enter a
room too. Nothing here returns to its caller: each function that forks ends its process.
"""

from __future__ import annotations

import array
import base64
import contextlib
import fcntl
import json
import os
import resource
import select
import signal
import socket
import struct
import termios
from collections.abc import Callable, Iterator
from typing import IO, Any, NoReturn

from isolate import landlock, sockets, syscalls, workdir

Plan = dict[str, Any]

DEVICES = ("null", "zero", "full", "random", "urandom")
WALLS = ("no capabilities", "no_new_privs", "seccomp", "rlimits")
"""What `close_walls` and `start` put in force, for the report."""

WRITABLE_PLACES = ("/tmp", "/home/student", "/dev/shm")

INSIDE_ID = 1000
"""The uid and gid that code inside sees as its own, on every host."""


class BuildError(Exception):
    """A step could not be done; `layer` names the part of the sandbox that is missing."""

    def __init__(self, layer: str, cause: str, remedy: str = "", error_number: int = 0) -> None:
        super().__init__(f"{layer}: {cause}")
        self.layer, self.cause, self.remedy, self.error_number = layer, cause, remedy, error_number

    def as_dict(self) -> dict[str, Any]:
        return {"layer": self.layer, "cause": self.cause, "remedy": self.remedy}


@contextlib.contextmanager
def step(layer: str, what: str) -> Iterator[None]:
    """Names what was tried when the kernel refuses."""
    try:
        yield
    except OSError as error:
        raise BuildError(layer, f"{what}: {error}", error_number=error.errno or 0) from error


def send_event(box: socket.socket, event: str, **values: Any) -> None:
    """One message to the supervisor. Socket of type SOCK_SEQPACKET: messages of several senders stay whole."""
    box.send(json.dumps({"event": event, **values}).encode())


@contextlib.contextmanager
def report_failures(box: socket.socket) -> Iterator[None]:
    """The last thing a stage that cannot be built does is to say why; then its process ends."""
    try:
        yield
    except BuildError as error:
        with contextlib.suppress(OSError):
            send_event(box, "failed", **error.as_dict())
        os._exit(1)
    except BaseException as error:  # noqa: BLE001  # a forked child must never return into its parent's code
        with contextlib.suppress(OSError):
            send_event(box, "failed", layer="internal", cause=f"{type(error).__name__}: {error}")
        os._exit(1)


def write_file(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def write_id_maps(host_proc: int, outside_uid: int, outside_gid: int) -> None:
    """Map one user and one group. user_namespaces(7): no privilege needed once setgroups is denied."""
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{INSIDE_ID} {outside_uid} 1"),
        ("gid_map", f"{INSIDE_ID} {outside_gid} 1"),
    ):
        descriptor = os.open(f"self/{name}", os.O_WRONLY | os.O_CLOEXEC, dir_fd=host_proc)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)


def mount_proc(target: str) -> bool:
    """A proc of this PID namespace that holds nothing but process directories. Whether the host allows it."""
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
    try:
        syscalls.mount("proc", target, "proc", flags, "subset=pid")
    except OSError:
        return False  # EPERM where parts of the outer /proc are masked; then there is none inside
    return True


def close_all_but(*keep: int) -> None:
    """Close every descriptor above standard error that is not named. close_range(2)"""
    first = 3
    for descriptor in sorted(fd for fd in set(keep) if fd > 2):
        syscalls.close_range(first, descriptor - 1)
        first = descriptor + 1
    syscalls.close_range(first, 0x7FFFFFFF)


def wait_and_exit(pid: int, lifeline: socket.socket | None = None) -> NoReturn:
    """Reap until `pid` ends, then end. Whatever else lives in a PID namespace dies with its init.

    When the other end of the lifeline closes, it is killed.
    """
    if lifeline is not None:
        poll = select.poll()
        poll.register(lifeline, 0)
        poll.register(end := os.pidfd_open(pid), select.POLLIN)
        if end not in dict(poll.poll()):
            os.kill(pid, signal.SIGKILL)
    while True:
        ended, _ = os.wait()
        if ended == pid:
            os._exit(0)


Become = Callable[[Plan], NoReturn]
"""How a forked process turns into the command: by execve(2), or as what it already is."""


def execute(plan: Plan) -> NoReturn:
    """The command of the plan as a program of its own. Exit code 127: not found, 126: cannot be executed (env(1))."""
    try:
        os.execvpe(plan["argv"][0], plan["argv"], plan["environment"])
    except OSError as error:
        os.write(2, f"isolate: {plan['argv'][0]}: {error.strerror}\n".encode())
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)


def run_outer(
    plan: Plan,
    box: socket.socket,
    host_proc: int,
    layers: list[str],
    become: Become = execute,
    lifeline: socket.socket | None = None,
) -> NoReturn:
    """Leave the base's namespaces for the room's and fork PID 1 of the room."""
    with report_failures(box):
        syscalls.set_parent_death_signal(signal.SIGKILL)
        uid, gid = os.getuid(), os.getgid()
        with step("room", "unshare user, mount, pid, net, ipc, uts, cgroup"):
            syscalls.unshare(syscalls.ALL_NAMESPACES)
        with step("room", "map one user and one group"):
            write_id_maps(host_proc, uid, gid)
        os.close(host_proc)
        pid = os.fork()
        if pid == 0:
            _run_init(plan, box, layers, become)
        _hide_command_line(become)
        close_all_but(box.fileno(), *([lifeline.fileno()] if lifeline else []))
        wait_and_exit(pid, lifeline)
    os._exit(1)


def _hide_command_line(become: Become) -> None:
    """Of a template's descendant, where it is the kernel's, which has been forked. Without /proc nobody reads it."""
    if become is not execute:
        with contextlib.suppress(OSError):
            syscalls.overwrite_command_line(b"isolate")


def _run_init(plan: Plan, box: socket.socket, layers: list[str], become: Become) -> NoReturn:
    """PID 1 of the room, from the first mount to the last reaped process."""
    with report_failures(box):
        syscalls.set_parent_death_signal(signal.SIGKILL)
        # Not dumpable: nobody in here reads this process's memory, descriptors or root. ptrace(2)
        syscalls.set_dumpable(False)
        with step("room", "leave the session keyring"), contextlib.suppress(PermissionError):
            syscalls.join_new_session_keyring()  # EPERM where the host forbids keyctl, to us and to the room
        _make_writable_places(plan)
        shared = _share_sockets(plan) if plan["share_at"] else None
        shared = _open_terminal() if plan["terminal"] else shared
        with step("network namespace", "bring up the room's own loopback"):
            bring_up_loopback()
        _hand_out_diagnostics(plan["diagnostics_fd"])
        socket.sethostname("sandbox")
        keep = open_keep(plan)
        set_up_files(plan)
        with step("capabilities", "empty the bounding set"):
            syscalls.drop_bounding_capabilities()
        close_walls(plan["seccomp"])
        layers += WALLS
        rules = None
        if landlock.abi() >= landlock.REFER_SINCE:
            rules = _landlock_rules(plan)
            layers.append(f"Landlock ABI {landlock.abi()}")
        send_ready(box, [*layers, plan["counted"]], shared)
        pid = start(plan, box, lambda: restrict(rules), become)
        _hide_command_line(become)
        finish(plan, box, keep, reap_until_end(pid, box, kill_namespace))
    os._exit(0)


def finish(plan: Plan, box: socket.socket, keep: IO[bytes] | None, status: int) -> None:
    """Pack what the command left, if anybody wants it, and say how it ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    if keep is not None:
        workdir.pack_or_nothing(keep, plan["work"], plan["keep_bytes"], plan["keep_files"])
    send_event(
        box,
        "exited",
        status=status,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        memory_peak_bytes=usage.ru_maxrss * 1024,
    )


def _landlock_rules(plan: Plan) -> list[landlock.Rule]:
    """All is to be read; written is what is the room's own, or shown writable. Nothing below /proc is written."""
    writable = list(WRITABLE_PLACES)
    writable += [entry["target"] for entry in plan["mounts"] if entry["kind"] == "writable"]
    devices = [f"/dev/{name}" for name in DEVICES]
    return [
        ("/", "read"),
        *([(plan["share_at"], "sockets")] if plan["share_at"] else []),
        *((path, "write") for path in writable),
        *((path, "device") for path in devices),
        ("/dev/pts", "terminal"),
    ]


def restrict(rules: list[landlock.Rule] | None) -> None:
    """Landlock for the command alone: the room's init still has to pack. None: this kernel has none."""
    if rules is not None:
        with step("landlock", "restrict"):
            landlock.restrict(rules)


def open_keep(plan: Plan) -> IO[bytes] | None:
    """Where the work directory is to be packed into at the end."""
    return None if plan["keep_fd"] is None else open(plan["keep_fd"], "wb")


def set_up_files(plan: Plan) -> None:
    """Unpack what was given for the work directory, and write the small files of the plan."""
    if plan["archive_fd"] is not None:
        with step("files", "unpack the files into the room"), open(plan["archive_fd"], "rb") as file:
            workdir.unpack(file, plan["work"])
    for path, text in plan["room_files"].items():
        with step("files", f"write {path}"):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write_file(path, text)


def _make_writable_places(plan: Plan) -> None:
    """One tmpfs for all of them, so that their sizes are capped together; a proc and a devpts of the room."""
    with step("mount namespace", "stop mounts from spreading"):
        syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    mount_proc("/proc")
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV
    limits = plan["limits"]
    covered = open_what_will_be_covered(plan)
    with step("files", "mount the writable places"):
        options = f"size={limits['files_bytes']},nr_inodes={limits['files_count']},mode=755"
        syscalls.mount("tmpfs", "/tmp", "tmpfs", flags, options)
        places = {"/home/student": ("home", 0o755), "/dev/shm": ("shm", 0o1777), "/tmp": ("tmp", 0o1777)}
        for target, (name, mode) in places.items():  # /tmp last: it covers the way to the others
            os.mkdir(f"/tmp/{name}")
            os.chmod(f"/tmp/{name}", mode)
            syscalls.mount(f"/tmp/{name}", target, None, syscalls.MS_BIND)
        os.makedirs(plan["work"], exist_ok=True)
    show_again(covered)
    with contextlib.suppress(OSError):  # without one, `!command` in IPython fails and says so
        syscalls.mount(
            "devpts",
            "/dev/pts",
            "devpts",
            syscalls.MS_NOSUID | syscalls.MS_NOEXEC,
            "newinstance,ptmxmode=0666",
        )


def open_what_will_be_covered(plan: Plan) -> dict[str, tuple[int, bool]]:
    """The parts of the view that lie below a writable place, say an environment below /tmp.

    A clone of a locked mount stays read-only: the flag is locked, not only the place.
    """
    found = {}
    for target in plan["below_writable"]:
        with step("read-only view", f"keep {target}"):
            if os.path.lexists(target):
                found[target] = (syscalls.open_tree(target), os.path.isdir(target))
    return found


def show_again(covered: dict[str, tuple[int, bool]]) -> None:
    """What `open_what_will_be_covered` gave, at its place."""
    for target, (tree, is_directory) in covered.items():
        with step("read-only view", f"show {target} again"):
            os.makedirs(target if is_directory else os.path.dirname(target), exist_ok=True)
            if not is_directory:
                write_file(target, "")
            syscalls.move_mount(tree, target)
            os.close(tree)


def _share_sockets(plan: Plan) -> int:
    """A tiny directory for unix sockets; the descriptor that comes back is a read-only mount of it alone.

    A plain directory descriptor would lead up and out by `..`; a cloned, detached mount has no parent. No symlink
    in it is followed, lest somebody outside who connects to a socket in here ends at one of the host's.
    """
    with step("sockets", f"mount {plan['share_at']}"):
        flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC | syscalls.MS_NOSYMFOLLOW
        syscalls.mount("tmpfs", plan["share_at"], "tmpfs", flags, "size=64k,nr_inodes=16,mode=700")
        tree = syscalls.open_tree(plan["share_at"])
        syscalls.mount_setattr(tree, syscalls.MOUNT_ATTR_RDONLY)
    return tree


def _open_terminal() -> int:
    """A terminal of this room's own devpts as stdin, stdout and stderr; the descriptor of its master. openpty(3)"""
    with step("terminal", "open a pseudo terminal of the room's own"):
        master, slave = os.openpty()
        for descriptor in range(3):
            os.dup2(slave, descriptor)
        os.close(slave)
    return master


def _hand_out_diagnostics(descriptor: int | None) -> None:
    """Where the launcher samples, it asks the kernel through a socket of ours how much our sockets hold."""
    if descriptor is not None:
        with socket.socket(fileno=descriptor) as channel, contextlib.suppress(OSError):
            sockets.send_diagnostic(channel)


def bring_up_loopback() -> None:
    """netdevice(7): SIOCGIFFLAGS, SIOCSIFFLAGS."""
    get_flags, set_flags, up = 0x8913, 0x8914, 0x1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sH14x", b"lo", 0)
        (flags,) = struct.unpack_from("H", fcntl.ioctl(sock, get_flags, request), 16)
        fcntl.ioctl(sock, set_flags, struct.pack("16sH14x", b"lo", flags | up))


def close_walls(filters: list[str]) -> None:
    """The order matters: what needs a privilege first, the filter that forbids changes last."""
    with step("rlimits", "keep the host's crash handler out"):
        # Not 0, with which a core_pattern that is a pipe runs the host's crash handler as root; 1 is the
        # kernel's own word for "no dump, no handler". fs/coredump.c
        _, hard = resource.getrlimit(resource.RLIMIT_CORE)
        core = 1 if hard == resource.RLIM_INFINITY else min(1, hard)
        resource.setrlimit(resource.RLIMIT_CORE, (core, core))
    with step("capabilities", "drop them all"):
        syscalls.drop_capabilities()
    with step("no_new_privs", "set"):
        syscalls.set_no_new_privs()
    with step("seccomp", "load the filter"):
        load_filters(filters)


def load_filters(filters: list[str]) -> None:
    """Programs in base64, in order. Raises `OSError`."""
    for program in filters:
        syscalls.load_seccomp_filter(base64.b64decode(program))


def limit_resources(limits: dict[str, Any]) -> None:
    """setrlimit(2) for the command and all it starts; the init of the room stays free to pack and report."""
    bounds = {
        resource.RLIMIT_NPROC: limits["processes"],
        resource.RLIMIT_DATA: limits["memory_bytes"],
        resource.RLIMIT_FSIZE: limits["files_bytes"],
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_CPU: int(limits["cpu_seconds"]) + 1,
        resource.RLIMIT_MEMLOCK: 64 * 1024,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 1024,
        resource.RLIMIT_NICE: 0,
        resource.RLIMIT_RTPRIO: 0,
    }
    with step("rlimits", "set resource limits"):
        for which, value in bounds.items():
            _, hard = resource.getrlimit(which)
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(which, (value, value))


def send_ready(box: socket.socket, layers: list[str], shared: int | None) -> None:
    message = json.dumps({"event": "ready", "layers": layers}).encode()
    ancillary = []
    if shared is not None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [shared]))]
    box.sendmsg([message], ancillary)
    if shared is not None:
        os.close(shared)


def start(plan: Plan, box: socket.socket, close_last_walls: Callable[[], None], become: Become = execute) -> int:
    """Fork the command, which leaves this code for good. Exit code 126: it could not be started."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        if plan["terminal"]:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        with report_failures(box):
            limit_resources(plan["limits"])
            close_last_walls()
        default_signals()
        try:
            os.chdir(plan["cwd"])
        except OSError as error:
            os.write(2, f"isolate: the working directory {plan['cwd']}: {error.strerror}\n".encode())
            os._exit(126)
        close_all_but(*plan["pass_fds"])
        for descriptor in plan["pass_fds"]:
            os.set_inheritable(descriptor, True)
        become(plan)
    finally:
        os._exit(126)


def default_signals() -> None:
    """Every signal does what it does by default, and none is blocked: both outlive fork and execve. signal(7)"""
    for number in range(1, signal.NSIG):
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def reap_until_end(main_pid: int, box: socket.socket, kill_others: Callable[[], None]) -> int:
    """Reap everything, obey the supervisor, and when the main process ends kill the rest. Its wait status."""
    wakeup, wakeup_end = os.pipe()
    os.set_blocking(wakeup_end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakeup_end)
    poll = select.poll()
    poll.register(wakeup, select.POLLIN)
    poll.register(box, select.POLLIN)
    while True:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == main_pid:
                empty(kill_others)
                return status
            if pid == 0:
                break
        for descriptor, _ in poll.poll():
            if descriptor == wakeup:
                os.read(wakeup, 512)
            else:
                _obey(box, main_pid, kill_others)


def _obey(box: socket.socket, main_pid: int, kill_others: Callable[[], None]) -> None:
    command = box.recv(64)
    if command in {b"interrupt", b"terminate"}:
        number = signal.SIGINT if command == b"interrupt" else signal.SIGTERM
        with contextlib.suppress(ProcessLookupError):
            try:
                os.killpg(main_pid, number)
            except ProcessLookupError:  # it has not called setsid yet
                os.kill(main_pid, number)
    else:  # b"kill", or the supervisor is gone
        kill_others()


def kill_namespace() -> None:
    """All processes of this PID namespace but its init. kill(2)"""
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)


def empty(kill_others: Callable[[], None]) -> None:
    """Kill and reap until we have no child left; orphans become our children."""
    while True:
        kill_others()
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return
