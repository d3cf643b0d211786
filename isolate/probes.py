"""The doctor's helper: does each step of a sandbox for real, and says of each whether it holds.

A call that succeeds proves nothing: a container's seccomp profile, AppArmor on Ubuntu and a masked /proc each let
some steps pass and refuse the next. So there is a probe for each layer. It does the step and what that needs in a
process of its own, looks whether the layer holds, says so, and is killed. Nothing that it does outlives it: its
namespaces go with its process, and its control group is removed.

Executed by `isolate.doctor` as a program of its own, single-threaded and with an empty environment. A plan comes on
standard input; one line of JSON goes to standard output for each probe: `layer`, and with it `detail` (it holds), or
`refused` and `errno` (it does not; 0 where no call failed), or `untried` (the layer that it needs and that is missing).
Standard library only.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from isolate import base, cgroups, landlock, room, sampler, syscalls

Plan = dict[str, Any]
"""`uid` and `gid`: whom root gives way to, or None; `no_uid`: why root has none; `limits`; `seccomp`: the filter."""
Answer = dict[str, Any]

_PROBE_SECONDS = 10.0


class Wrong(Exception):
    """The kernel refused nothing, and yet the layer is not there."""


def expect_refusal(number: int, call: Callable[[], object], otherwise: str) -> None:
    """Raises `Wrong` unless the call is refused with this errno."""
    try:
        call()
    except OSError as error:
        if error.errno == number:
            return
        raise Wrong(f"{otherwise} (it answered {os.strerror(error.errno or 0)})") from error
    raise Wrong(otherwise)


def read_status(path: Path = Path("/proc/self/status")) -> dict[str, str]:
    """The fields of a process's status; none where there is no such file. proc_pid_status(5)"""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


# What several probes need first


def _leave_root(plan: Plan) -> None:
    base.leave_launcher(plan, os.getppid(), signal.SIGKILL)


def _unshare(plan: Plan, flags: int = 0) -> int:
    """An own user namespace with one id mapped, and the namespaces of `flags`. The host's /proc, opened."""
    _leave_root(plan)
    uid, gid = os.getuid(), os.getgid()
    host_proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    syscalls.unshare(syscalls.CLONE_NEWUSER | flags)
    room.write_id_maps(host_proc, uid, gid)
    return host_proc


def _unshare_mounts(plan: Plan, flags: int = 0) -> int:
    host_proc = _unshare(plan, syscalls.CLONE_NEWNS | flags)
    syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    return host_proc


def _enter_tmpfs() -> None:
    """An empty tmpfs as the current directory, over a place that every host has."""
    staging = "/tmp" if os.path.isdir("/tmp") else "/usr"
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV
    syscalls.mount("tmpfs", staging, "tmpfs", flags, "size=4m,nr_inodes=64,mode=755")
    os.chdir(staging)


def _enter_tmpfs_with(plan: Plan, open_trees: Callable[[], list[int]]) -> tuple[int, list[int]]:
    """The host's /proc and the trees, opened; by root before it is given up, as in `base.open_trees_as_root`."""
    trees = None
    if plan["uid"] is not None:
        with contextlib.suppress(PermissionError):
            trees = open_trees()
    host_proc = _unshare_mounts(plan)
    trees = open_trees() if trees is None else trees
    _enter_tmpfs()
    return host_proc, trees


def _show_usr(plan: Plan) -> int:
    """/usr as a room sees it, below an empty root. The host's /proc, opened."""

    def open_usr() -> list[int]:
        tree = syscalls.open_tree("/usr")
        syscalls.mount_setattr(tree, base.READ_ONLY, recursive=True)
        return [tree]

    host_proc, (tree,) = _enter_tmpfs_with(plan, open_usr)
    os.mkdir("usr")
    syscalls.move_mount(tree, "usr")
    return host_proc


def _leave(flag: int, name: str) -> str:
    before = os.readlink(f"/proc/self/ns/{name}")
    syscalls.unshare(flag)
    if os.readlink(f"/proc/self/ns/{name}") == before:
        raise Wrong("unshare succeeded, and nothing changed")
    return "one of its own"


# One function for each layer, in the order of `PROBES`


def _unprivileged_user(plan: Plan) -> str:
    if os.geteuid() != 0:
        return f"uid {os.getuid()}, an ordinary user"
    if plan["uid"] is None:
        raise Wrong(plan["no_uid"])
    _leave_root(plan)
    if os.getresuid() != (plan["uid"],) * 3:
        raise Wrong("root could not be given up")
    return f"root gives way to uid {plan['uid']}, which nobody else has"


def _user_namespace(plan: Plan) -> str:
    _leave_root(plan)
    return _leave(syscalls.CLONE_NEWUSER, "user")


def _id_maps(plan: Plan) -> str:
    outside = plan["uid"] or os.getuid()
    _unshare(plan)
    if (os.getuid(), os.getgid()) != (room.INSIDE_ID, room.INSIDE_ID):
        raise Wrong(f"the uid inside is {os.getuid()}")
    return f"uid {room.INSIDE_ID} inside is uid {outside} outside, and there is no other"


def _mount_namespace(plan: Plan) -> str:
    _unshare_mounts(plan)
    return "one of its own, from which no mount spreads"


def _empty_root(plan: Plan) -> str:
    _unshare_mounts(plan)
    _enter_tmpfs()
    if os.statvfs(".").f_files != 64:
        raise Wrong("the number of files of a tmpfs cannot be capped")
    return "a tmpfs, capped in bytes and files"


def _new_mount_calls(_: Plan) -> str:
    """Refused for want of privilege is fine here: the layers below are the ones that use them."""
    for call in (
        lambda: syscalls.open_tree("/"),
        lambda: syscalls.move_mount(-1, "/"),
        lambda: syscalls.mount_setattr(-1, syscalls.MOUNT_ATTR_RDONLY),
    ):
        try:
            call()
        except OSError as error:
            if error.errno == errno.ENOSYS:
                raise
    return "open_tree, move_mount and mount_setattr are not unknown here"


def _read_only_view(plan: Plan) -> str:
    _show_usr(plan)
    expect_refusal(errno.EROFS, lambda: os.open("usr/.isolate", os.O_CREAT | os.O_WRONLY), "a file could be made in it")
    return "/usr can be shown, and writing to it is refused"


def _locked_mounts(plan: Plan) -> str:
    host_proc = _show_usr(plan)
    syscalls.unshare(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNS)
    room.write_id_maps(host_proc, room.INSIDE_ID, room.INSIDE_ID)
    flags = syscalls.MS_REMOUNT | syscalls.MS_BIND | syscalls.MS_NOSUID | syscalls.MS_NODEV
    remount = functools.partial(syscalls.mount, "none", "usr", None, flags)
    expect_refusal(errno.EPERM, remount, "the read-only view could be made writable again")
    return "a second user namespace cannot make the view writable again"


def _pivot(plan: Plan) -> str:
    _unshare_mounts(plan)
    _enter_tmpfs()
    syscalls.pivot_root(".", ".")
    syscalls.umount_detached(".")
    os.chdir("/")
    if os.listdir("/"):
        raise Wrong("something of the host is still visible")
    return "the host's tree is gone"


def _devices(plan: Plan) -> str:
    _, trees = _enter_tmpfs_with(plan, lambda: [syscalls.open_tree(f"/dev/{name}") for name in room.DEVICES])
    for name, tree in zip(room.DEVICES, trees, strict=True):
        room.write_file(name, "")
        syscalls.move_mount(tree, name)
    with open("zero", "rb") as file:
        if file.read(1) != b"\0":
            raise Wrong("/dev/zero does not work in it")
    return ", ".join(room.DEVICES)


def _devpts(plan: Plan) -> str:
    _unshare_mounts(plan)
    _enter_tmpfs()
    os.mkdir("pts")
    flags = syscalls.MS_NOSUID | syscalls.MS_NOEXEC
    syscalls.mount("devpts", "pts", "devpts", flags, "newinstance,ptmxmode=0666")
    os.close(os.open("pts/ptmx", os.O_RDWR | os.O_NOCTTY))
    return "terminals of its own"


def _pid_namespace(plan: Plan) -> str:
    def look() -> str:
        if os.getpid() != 1:
            raise Wrong(f"the first process in it has the number {os.getpid()}")
        return "no process of the host can be named"

    _unshare(plan, syscalls.CLONE_NEWPID)
    return in_child(look)


def _proc(plan: Plan) -> str:
    def mount_one() -> str:
        _enter_tmpfs()
        os.mkdir("proc")
        if not room.mount_proc("proc"):
            raise Wrong("none can be mounted, so there is no /proc inside")
        return "one of its own, process directories only"

    _unshare_mounts(plan, syscalls.CLONE_NEWPID)
    return in_child(mount_one)


def _network_namespace(plan: Plan) -> str:
    _unshare(plan, syscalls.CLONE_NEWNET)
    room.bring_up_loopback()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.sendto(b"x", sock.getsockname())
        sock.settimeout(_PROBE_SECONDS / 2)
        sock.recv(1)
    return "a loopback of its own and nothing else"


def _uts_namespace(plan: Plan) -> str:
    _unshare(plan, syscalls.CLONE_NEWUTS)
    socket.sethostname("sandbox")
    return "a host name of its own"


def _other_namespace(flag: int, name: str, plan: Plan) -> str:
    _unshare(plan)
    return _leave(flag, name)


def _no_capabilities(plan: Plan) -> str:
    _unshare(plan)
    syscalls.drop_bounding_capabilities()
    syscalls.drop_capabilities()
    status = read_status()
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        if int(status.get(name, "1"), 16):
            raise Wrong(f"{name} is {status.get(name, 'not told')} after all were dropped")
    return "all dropped, none can be gained"


def _no_new_privs(_: Plan) -> str:
    syscalls.set_no_new_privs()
    if read_status().get("NoNewPrivs", "1") != "1":  # gVisor does not tell
        raise Wrong("it was set and is not in force")
    return "no set-uid program gains anything"


def _seccomp(plan: Plan) -> str:
    def make_fifo() -> None:
        os.mkfifo("/nowhere/at/all")  # the filter refuses before the kernel looks for the directory

    syscalls.set_no_new_privs()
    expect_refusal(errno.ENOENT, make_fifo, "mknod is refused already before the filter is loaded")
    room.load_filters(plan["seccomp"])
    expect_refusal(errno.EPERM, make_fifo, "the filter is loaded and refuses nothing")
    return "loaded, and it refuses"


def _landlock(_: Plan) -> str:
    def write_own_name() -> None:
        os.close(os.open("/proc/self/comm", os.O_WRONLY))

    version = landlock.abi()
    if version < landlock.REFER_SINCE:
        raise Wrong(f"ABI {version}, too old to be of use" if version else "the kernel offers none")
    write_own_name()
    syscalls.set_no_new_privs()
    landlock.restrict([("/", "read")])
    expect_refusal(errno.EACCES, write_own_name, "it is in force and refuses nothing")
    return f"ABI {version}, on top of the mounts"


def _rlimits(plan: Plan) -> str:
    def open_one_too_many() -> None:
        for _ in range(resource.getrlimit(resource.RLIMIT_NOFILE)[0] + 1):
            os.open("/dev/null", os.O_RDONLY)

    room.limit_resources(plan["limits"])
    expect_refusal(errno.EMFILE, open_one_too_many, "more files can be opened than allowed")
    return "set, and they hold"


def _counting(_: Plan) -> str:
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    try:
        if pid not in sampler.children(os.getpid()):
            raise Wrong("a child process is not listed in /proc/PID/task/TID/children")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return "the processes of a sandbox can be found from outside"


def _limits_in_total(plan: Plan) -> str:
    group = cgroups.create(plan["limits"])
    if group is None:
        raise Wrong("sampled 20 times a second: no control group can be made here")
    try:
        in_child(group.add)
    finally:
        group.remove()
    return group.layer.removeprefix("limits in total: ")


@dataclasses.dataclass(frozen=True)
class Probe:
    """A layer and the function that tries it, which returns what it saw."""

    layer: str
    perform: Callable[[Plan], str]
    needs: str = ""
    """The layer without which this one cannot be tried."""
    required: bool = True


PROBES = (
    Probe("unprivileged user", _unprivileged_user),
    Probe("user namespace", _user_namespace, "unprivileged user"),
    Probe("id maps", _id_maps, "user namespace"),
    Probe("mount namespace", _mount_namespace, "id maps"),
    Probe("empty root", _empty_root, "mount namespace"),
    Probe("new mount calls", _new_mount_calls),
    Probe("read-only view", _read_only_view, "empty root"),
    Probe("locked mounts", _locked_mounts, "read-only view"),
    Probe("pivot_root", _pivot, "empty root"),
    Probe("devices", _devices, "empty root"),
    Probe("terminals (devpts)", _devpts, "empty root", required=False),
    Probe("pid namespace", _pid_namespace, "id maps"),
    Probe("own /proc", _proc, "pid namespace", required=False),
    Probe("network namespace", _network_namespace, "id maps"),
    Probe("ipc namespace", functools.partial(_other_namespace, syscalls.CLONE_NEWIPC, "ipc"), "id maps"),
    Probe("uts namespace", _uts_namespace, "id maps"),
    Probe("cgroup namespace", functools.partial(_other_namespace, syscalls.CLONE_NEWCGROUP, "cgroup"), "id maps"),
    Probe("no capabilities", _no_capabilities, "id maps"),
    Probe("no_new_privs", _no_new_privs),
    Probe("seccomp", _seccomp, "libseccomp"),
    Probe("Landlock", _landlock, required=False),
    Probe("rlimits", _rlimits),
    Probe("counting processes", _counting),
    Probe("limits in total", _limits_in_total, required=False),
)


# How they are performed


def answer_of(call: Callable[[], object]) -> Answer:
    """What `call` returns or raises, as an answer."""
    try:
        return {"detail": str(call())}
    except Wrong as error:
        return {"refused": str(error), "errno": 0}
    except OSError as error:
        return {"refused": error.strerror or str(error), "errno": error.errno or 0}
    except room.BuildError as error:
        return {"refused": error.cause, "errno": error.error_number}
    except Exception as error:  # noqa: BLE001  # a fault of ours must be told, and not for a layer that is there
        return {"refused": f"the probe itself failed: {type(error).__name__}: {error}", "errno": 0}


def forked(call: Callable[[], object], seconds: float = _PROBE_SECONDS) -> Answer:
    """The answer of a child process, which is killed afterwards with all that it started."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setpgid(0, 0)
            syscalls.set_parent_death_signal(signal.SIGKILL)
            os.write(writing, json.dumps(answer_of(call)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    try:
        ready, _, _ = select.select([reading], [], [], seconds)
        data = os.read(reading, 65_536) if ready else b""
    finally:
        os.close(reading)
        for kill, target in ((os.kill, pid), (os.killpg, pid)):
            with contextlib.suppress(ProcessLookupError):
                kill(target, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    if data:
        answer: Answer = json.loads(data)
        return answer
    how = f"it ended without a word (wait status {status})" if ready else f"it took longer than {seconds:g} s"
    return {"refused": how, "errno": 0}


def in_child(call: Callable[[], object]) -> str:
    """What `call` returns in a child process; its failure as our own."""
    answer = forked(call)
    if "detail" in answer:
        return str(answer["detail"])
    if answer["errno"]:
        raise OSError(answer["errno"], answer["refused"])
    raise Wrong(answer["refused"])


def main() -> int:
    """Performs all; a probe that fails hides only the layers that cannot be had without it."""
    plan: Plan = json.load(sys.stdin)
    syscalls.set_child_subreaper()
    lacking: dict[str, str] = {} if plan["seccomp"] else {"libseccomp": "libseccomp"}
    for probe in PROBES:
        if probe.needs in lacking:
            answer: Answer = {"untried": lacking[probe.needs]}
            lacking[probe.layer] = lacking[probe.needs]
        else:
            answer = forked(functools.partial(probe.perform, plan))
            if "refused" in answer:
                lacking[probe.layer] = probe.layer
        print(json.dumps({"layer": probe.layer, **answer}), flush=True)
    return 0
