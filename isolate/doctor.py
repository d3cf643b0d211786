"""Which layers of a sandbox this host gives, found out by doing each step for real, and what to do about the rest.

Theory of operation
-------------------
A call that succeeds proves nothing: a container's seccomp profile, AppArmor on Ubuntu and a masked /proc each
let some steps pass and refuse the next. So three processes stand in a line:

    doctor      `examine`: gathers evidence, compiles the filter, explains, builds one whole sandbox at the end
      helper    `perform_probes`: executed afresh, single-threaded, the standard library alone; forks the probes
        probe   one for each layer; does the step and what it needs, looks whether it holds, says so, is killed

A probe that fails hides only the layers that cannot be had without it; those are `not tried`. Nothing that a probe
does outlives it: its namespaces go with its process, and its control group is removed. What could not be done is
explained from evidence that is gathered beside it (`Evidence`), which is the only part that guesses, and says so.
"""

import argparse
import base64
import contextlib
import dataclasses
import errno
import functools
import importlib.metadata
import json
import os
import platform
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import isolate
from isolate import cgroups, landlock, room, seccomp, syscalls, uids
from isolate.policy import LANDLOCK_GAPS, MIB, Limits, Policy, SandboxError, system_policy
from isolate.sandbox import Command, Sandbox

Plan = dict[str, Any]
Answer = dict[str, Any]

IN_FORCE, MISSING, WEAKER = "in force", "missing", "weaker"
_PROBE_SECONDS = 10.0
_HELPER_SECONDS = 120.0
_WIDTH = 100
_CAP_SYS_ADMIN = 21
_READ_ONLY = syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV  # as in `base`
_ENOUGH_LINUX = (5, 12)


# --- The probes: what runs in the helper ---------------------------------------------------------------------------


class Wrong(Exception):
    """The kernel refused nothing, and yet the layer is not there."""


def _leave_root(plan: Plan) -> None:
    if plan["uid"] is not None:
        os.setgroups([])
        os.setresgid(plan["uid"], plan["uid"], plan["uid"])
        os.setresuid(plan["uid"], plan["uid"], plan["uid"])
        syscalls.set_dumpable(True)  # as in `base.run_outer`
    syscalls.set_parent_death_signal(signal.SIGKILL)


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


def _expect(number: int, call: Callable[[], object], otherwise: str) -> None:
    """Raises `Wrong` unless the call is refused with this errno."""
    try:
        call()
    except OSError as error:
        if error.errno == number:
            return
        raise Wrong(f"{otherwise} (it answered {os.strerror(error.errno or 0)})") from error
    raise Wrong(otherwise)


def _status(name: str) -> str:
    """One line of /proc/self/status."""
    return _field(Path("/proc/self/status").read_text(encoding="utf-8"), name)


def _field(text: str, name: str) -> str:
    match = re.search(rf"^{name}:\s*(.*)$", text, re.MULTILINE)
    return match[1] if match else ""


def _unprivileged_user(plan: Plan) -> str:
    if not plan["root"]:
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


def _leave(flag: int, name: str) -> str:
    before = os.readlink(f"/proc/self/ns/{name}")
    syscalls.unshare(flag)
    if os.readlink(f"/proc/self/ns/{name}") == before:
        raise Wrong("unshare succeeded, and nothing changed")
    return "one of its own"


def _id_maps(plan: Plan) -> str:
    _leave_root(plan)
    outside = os.getuid()
    _unshare(plan | {"uid": None})
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


def _show_usr(plan: Plan) -> int:
    """/usr as a room sees it, below an empty root. The host's /proc, opened."""
    tree = _open_usr() if plan["uid"] is not None else None  # root: before it is given up, as in `base.open_trees`
    host_proc = _unshare_mounts(plan)
    tree = _open_usr() if tree is None else tree
    _enter_tmpfs()
    os.mkdir("usr")
    syscalls.move_mount(tree, "usr")
    return host_proc


def _open_usr() -> int:
    tree = syscalls.open_tree("/usr")
    syscalls.mount_setattr(tree, _READ_ONLY, recursive=True)
    return tree


def _read_only_view(plan: Plan) -> str:
    _show_usr(plan)
    _expect(errno.EROFS, lambda: os.open("usr/.isolate", os.O_CREAT | os.O_WRONLY), "a file could be made in it")
    return "/usr can be shown, and writing to it is refused"


def _locked_mounts(plan: Plan) -> str:
    host_proc = _show_usr(plan)
    syscalls.unshare(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNS)
    room.write_id_maps(host_proc, room.INSIDE_ID, room.INSIDE_ID)
    flags = syscalls.MS_REMOUNT | syscalls.MS_BIND | syscalls.MS_NOSUID | syscalls.MS_NODEV
    _expect(
        errno.EPERM,
        lambda: syscalls.mount("none", "usr", None, flags),
        "the read-only view could be made writable again",
    )
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
    def open_all() -> list[int]:
        return [syscalls.open_tree(f"/dev/{name}") for name in room.DEVICES]

    trees = open_all() if plan["uid"] is not None else None
    _unshare_mounts(plan)
    trees = open_all() if trees is None else trees
    _enter_tmpfs()
    for name, tree in zip(room.DEVICES, trees, strict=True):
        room.write_file(name, "")
        syscalls.move_mount(tree, name)
    with open("zero", "rb") as file:
        if file.read(1) != b"\0":
            raise Wrong("/dev/zero does not work in it")
    return ", ".join(room.DEVICES)


def _proc(plan: Plan) -> str:
    _unshare_mounts(plan, syscalls.CLONE_NEWPID)

    def mount_one() -> str:
        _enter_tmpfs()
        os.mkdir("proc")
        if not room.mount_proc("proc"):
            raise Wrong("none can be mounted, so there is no /proc inside")
        return "one of its own, process directories only"

    return _unwrap(_forked(mount_one))


def _devpts(plan: Plan) -> str:
    _unshare_mounts(plan)
    _enter_tmpfs()
    os.mkdir("pts")
    flags = syscalls.MS_NOSUID | syscalls.MS_NOEXEC
    syscalls.mount("devpts", "pts", "devpts", flags, "newinstance,ptmxmode=0666")
    os.close(os.open("pts/ptmx", os.O_RDWR | os.O_NOCTTY))
    return "terminals of its own"


def _pid_namespace(plan: Plan) -> str:
    _unshare(plan, syscalls.CLONE_NEWPID)

    def look() -> str:
        if os.getpid() != 1:
            raise Wrong(f"the first process in it has the number {os.getpid()}")
        return "no process of the host can be named"

    return _unwrap(_forked(look))


def _network_namespace(plan: Plan) -> str:
    _unshare(plan, syscalls.CLONE_NEWNET)
    room._bring_up_loopback()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.sendto(b"x", sock.getsockname())
        sock.settimeout(_PROBE_SECONDS / 2)
        sock.recv(1)
    return "a loopback of its own and nothing else"


def _namespace(flag: int, name: str) -> Callable[[Plan], str]:
    def leave(plan: Plan) -> str:
        _unshare(plan)
        return _leave(flag, name)

    return leave


def _host_name(plan: Plan) -> str:
    _unshare(plan, syscalls.CLONE_NEWUTS)
    socket.sethostname("sandbox")
    return "a host name of its own"


def _capabilities(plan: Plan) -> str:
    _unshare(plan)
    syscalls.drop_bounding_capabilities()
    syscalls.drop_capabilities()
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        if int(_status(name) or "1", 16):
            raise Wrong(f"{name} is {_status(name)} after all were dropped")
    return "all dropped, none can be gained"


def _no_new_privs(_: Plan) -> str:
    syscalls.set_no_new_privs()
    if _status("NoNewPrivs") not in {"1", ""}:  # gVisor does not tell
        raise Wrong("it was set and is not in force")
    return "no set-uid program gains anything"


def _seccomp(plan: Plan) -> str:
    def make_fifo() -> None:
        os.mkfifo("/nowhere/at/all")  # the filter refuses before the kernel looks for the directory

    syscalls.set_no_new_privs()
    _expect(errno.ENOENT, make_fifo, "mknod is refused already before the filter is loaded")
    for program in plan["seccomp"]:
        syscalls.load_seccomp_filter(base64.b64decode(program))
    _expect(errno.EPERM, make_fifo, "the filter is loaded and refuses nothing")
    return "loaded, and it refuses"


def _rlimits(plan: Plan) -> str:
    room._limit_resources(plan["limits"])
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    def open_one_too_many() -> None:
        for _ in range(most + 1):
            os.open("/dev/null", os.O_RDONLY)

    _expect(errno.EMFILE, open_one_too_many, "more files can be opened than allowed")
    return "set, and they hold"


def _counting(_: Plan) -> str:
    hold_end, hold = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(hold)
        os.read(hold_end, 1)
        os._exit(0)
    path = f"/proc/self/task/{os.getpid()}/children"
    try:
        if str(pid) not in Path(path).read_text(encoding="ascii").split():
            raise Wrong("a child process is not listed in /proc/PID/task/TID/children")
    finally:
        os.close(hold)
        os.waitpid(pid, 0)
    return "the processes of a sandbox can be found from outside"


def _limits_in_total(plan: Plan) -> str:
    group = cgroups.create(plan["limits"])
    if group is None:
        raise Wrong("sampled 20 times a second: no control group can be made here")

    def enter() -> str:
        group.enter()
        return ""

    try:
        _unwrap(_forked(enter))
    finally:
        group.remove()
    return group.layer.removeprefix("limits in total: ")


def _landlock(_: Plan) -> str:
    version = landlock.abi()
    if version < landlock.REFER_SINCE:
        raise Wrong(f"ABI {version}, too old to be of use" if version else "the kernel offers none")

    def write_own_name() -> None:
        os.close(os.open("/proc/self/comm", os.O_WRONLY))

    write_own_name()
    syscalls.set_no_new_privs()
    landlock.restrict([("/", "read")])
    _expect(errno.EACCES, write_own_name, "it is in force and refuses nothing")
    return f"ABI {version}, on top of the mounts"


@dataclasses.dataclass(frozen=True)
class _Probe:
    layer: str
    perform: Callable[[Plan], str]
    needs: str = ""
    """The layer without which this one cannot be tried."""
    required: bool = True


_PROBES = (
    _Probe("unprivileged user", _unprivileged_user),
    _Probe("user namespace", _user_namespace, "unprivileged user"),
    _Probe("id maps", _id_maps, "user namespace"),
    _Probe("mount namespace", _mount_namespace, "id maps"),
    _Probe("empty root", _empty_root, "mount namespace"),
    _Probe("new mount calls", _new_mount_calls),
    _Probe("read-only view", _read_only_view, "empty root"),
    _Probe("locked mounts", _locked_mounts, "read-only view"),
    _Probe("pivot_root", _pivot, "empty root"),
    _Probe("devices", _devices, "empty root"),
    _Probe("terminals (devpts)", _devpts, "empty root", required=False),
    _Probe("pid namespace", _pid_namespace, "id maps"),
    _Probe("own /proc", _proc, "pid namespace", required=False),
    _Probe("network namespace", _network_namespace, "id maps"),
    _Probe("ipc namespace", _namespace(syscalls.CLONE_NEWIPC, "ipc"), "id maps"),
    _Probe("uts namespace", _host_name, "id maps"),
    _Probe("cgroup namespace", _namespace(syscalls.CLONE_NEWCGROUP, "cgroup"), "id maps"),
    _Probe("no capabilities", _capabilities, "id maps"),
    _Probe("no_new_privs", _no_new_privs),
    _Probe("seccomp", _seccomp, "libseccomp"),
    _Probe("Landlock", _landlock, required=False),
    _Probe("rlimits", _rlimits),
    _Probe("counting processes", _counting),
    _Probe("limits in total", _limits_in_total, required=False),
)


def _answer(call: Callable[[], str]) -> Answer:
    try:
        return {"detail": call()}
    except Wrong as error:
        return {"refused": str(error), "errno": 0}
    except OSError as error:
        return {"refused": error.strerror or str(error), "errno": error.errno or 0}
    except room.BuildError as error:
        number = error.__cause__.errno if isinstance(error.__cause__, OSError) else 0
        return {"refused": error.cause, "errno": number or 0}
    except Exception as error:  # noqa: BLE001  # a fault of ours must be told, and not for a layer that is there
        return {"refused": f"the probe itself failed: {type(error).__name__}: {error}", "errno": 0}


def _unwrap(answer: Answer) -> str:
    """The detail of a child's success; its failure as our own."""
    if "detail" in answer:
        return str(answer["detail"])
    if answer["errno"]:
        raise OSError(answer["errno"], answer["refused"])
    raise Wrong(answer["refused"])


def _forked(call: Callable[[], str], seconds: float = _PROBE_SECONDS) -> Answer:
    """What `call` says in a child process, which is killed afterwards with all that it started."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setpgid(0, 0)
            syscalls.set_parent_death_signal(signal.SIGKILL)
            os.write(writing, json.dumps(_answer(call)).encode())
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


def perform_probes() -> int:
    """The helper: a plan on standard input, one line of JSON on standard output for each probe."""
    plan: Plan = json.load(sys.stdin)
    syscalls.set_child_subreaper()
    lacking: dict[str, str] = {} if plan["seccomp"] else {"libseccomp": "libseccomp"}
    for probe in _PROBES:
        if probe.needs in lacking:
            answer: Answer = {"untried": lacking[probe.needs]}
            lacking[probe.layer] = lacking[probe.needs]
        else:
            answer = _forked(functools.partial(probe.perform, plan))
            if "refused" in answer:
                lacking[probe.layer] = probe.layer
        print(json.dumps({"layer": probe.layer, **answer}), flush=True)
    return 0


# --- The evidence, and what follows from it ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What the host says about itself, beside the probes. Every value may be wrong in a container that lies."""

    release: str = ""
    """Of the kernel, as in uname(2)."""
    version: str = ""
    machine: str = "x86_64"
    root: bool = False
    sys_admin: bool = False
    """Whether this process has CAP_SYS_ADMIN."""
    seccomp: bool = False
    """Whether a filter was loaded on this process before us."""
    container: str = ""
    apparmor_restricts: bool = False
    """kernel.apparmor_restrict_unprivileged_userns: Ubuntu, switched on from 24.04 on."""
    apparmor_profile: str = ""
    max_user_namespaces: int | None = None
    unprivileged_userns_clone: int | None = None
    """A sysctl of Debian's and Arch's kernels."""
    proc_masks: tuple[str, ...] = ()
    """What is mounted over parts of /proc."""
    mapped_ids: int = 1 << 32
    chrooted: bool = False
    selinux: bool = False

    @property
    def gvisor(self) -> bool:
        """gVisor's kernel gives itself away by its fixed date: pkg/sentry/syscalls/linux, `LinuxVersion`."""
        return "gvisor" in self.release.lower() or "Sun Jan 10 15:06:54 PST 2016" in self.version

    @property
    def old(self) -> bool:
        match = re.match(r"(\d+)\.(\d+)", self.release)
        return match is not None and (int(match[1]), int(match[2])) < _ENOUGH_LINUX


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip(" \n\0")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdecimal() else None


def gather_evidence(root: Path = Path("/")) -> Evidence:
    """Read what /proc and /sys below `root` say about this process and its host."""
    process, sysctl = root / "proc/self", root / "proc/sys"
    status = _text(process / "status")
    mounts = [line.split(" ")[4] for line in _text(process / "mountinfo").splitlines()]
    uname = os.uname()
    return Evidence(
        release=uname.release,
        version=uname.version,
        machine=uname.machine,
        root=os.geteuid() == 0,
        sys_admin=bool(int(_field(status, "CapEff") or "0", 16) >> _CAP_SYS_ADMIN & 1),
        seccomp=_field(status, "Seccomp") == "2",
        container=_container(root),
        apparmor_restricts=bool(_number(sysctl / "kernel/apparmor_restrict_unprivileged_userns")),
        apparmor_profile=_text(process / "attr/apparmor/current") or _text(process / "attr/current"),
        max_user_namespaces=_number(sysctl / "user/max_user_namespaces"),
        unprivileged_userns_clone=_number(sysctl / "kernel/unprivileged_userns_clone"),
        proc_masks=tuple(sorted({mount for mount in mounts if mount.startswith("/proc/")})),
        mapped_ids=sum(int(line.split()[2]) for line in _text(process / "uid_map").splitlines()),
        chrooted=bool(mounts) and "/" not in mounts,
        selinux=_text(root / "sys/fs/selinux/enforce") == "1",
    )


def _container(root: Path) -> str:
    """Whose container this looks like; empty where nothing hints at one."""
    if "KUBERNETES_SERVICE_HOST" in os.environ or (root / "var/run/secrets/kubernetes.io").exists():
        return "Kubernetes"
    if (root / ".dockerenv").exists():
        return "Docker"
    if (root / "run/.containerenv").exists():
        return "Podman"
    groups = _text(root / "proc/self/cgroup")
    hints = {"kubepods": "Kubernetes", "docker": "Docker", "libpod": "Podman", "containerd": "containerd", "lxc": "LXC"}
    return next((name for hint, name in hints.items() if hint in groups), "")


Diagnosis = tuple[str, str]
"""(cause, remedy)"""

_HOSTS = "docs/hosts.md"
_SECCOMP_REMEDY = {
    "Docker": "docker run --security-opt seccomp=FILE, with a profile that lets unshare and the mount calls through",
    "Podman": "podman run --security-opt seccomp=FILE, with a profile that lets unshare and the mount calls through",
    "Kubernetes": (
        "in the pod's securityContext a seccompProfile of type Localhost that lets unshare and the mount calls "
        "through, and hostUsers: false; in JupyterHub by c.KubeSpawner.container_security_context and extra_pod_config"
    ),
}
_NOT_TOLD = "cannot be told from here"


def diagnose(layer: str, number: int, seen: Evidence) -> Diagnosis:
    """Why this layer is missing, as far as the evidence goes, and what to do. `number` is the errno or 0."""
    if seen.machine not in {"x86_64", "aarch64"}:
        return f"isolate does not know the architecture {seen.machine}", "run it on x86_64 or aarch64"
    special = _SPECIAL.get(layer)
    if special and (found := special(number, seen)):
        return found
    if seen.gvisor:
        return (
            "this is gVisor (runsc), whose kernel does not know all that a sandbox needs",
            "give the graders nodes or pods without runtimeClassName: gvisor",
        )
    if number == errno.ENOSYS:
        return _unknown_call(seen)
    if number in {errno.ENOSPC, errno.EUSERS}:
        return _used_up(seen)
    if number == errno.EINVAL:
        return "this kernel was built without this kind of namespace", "use a distribution's stock kernel"
    if number in {errno.EPERM, errno.EACCES}:
        return _refused(layer, number, seen)
    return _NOT_TOLD, f"look at the system's log (dmesg) and at {_HOSTS}"


def _unknown_call(seen: Evidence) -> Diagnosis:
    if seen.old:
        return f"Linux {seen.release} is older than 5.12", "update the kernel to 5.12 or newer"
    if seen.seccomp:
        return _seccomp_profile(seen)
    return "this kernel does not know the call", "use a distribution's stock kernel, 5.12 or newer"


def _used_up(seen: Evidence) -> Diagnosis:
    if seen.max_user_namespaces == 0:
        return (
            "the sysctl user.max_user_namespaces is 0: an administrator, or RHEL 7's default",
            "sysctl -w user.max_user_namespaces=15000, and the same in /etc/sysctl.d to keep it",
        )
    return (
        "as many namespaces as user.max_*_namespaces allows, here or further out, are in use or none is allowed; or "
        "user namespaces are nested 32 deep",
        "raise them (sysctl user), outside of the container too",
    )


def _refused(layer: str, number: int, seen: Evidence) -> Diagnosis:
    by_apparmor = _apparmor(seen)
    if by_apparmor and (layer == "id maps" or number == errno.EACCES):
        return by_apparmor
    if layer in {"read-only view", "devices"} and seen.root and not seen.sys_admin:
        return (
            "this root has no CAP_SYS_ADMIN, which root needs to show what only root may reach",
            "run the grader as an ordinary user of the container, which needs no capability",
        )
    if seen.seccomp and layer != "id maps":
        return _seccomp_profile(seen)
    if seen.unprivileged_userns_clone == 0:
        return (
            "the sysctl kernel.unprivileged_userns_clone is 0: Debian's and Arch's switch for ordinary users",
            "sysctl -w kernel.unprivileged_userns_clone=1, and the same in /etc/sysctl.d to keep it",
        )
    if seen.chrooted:
        return "we run in a chroot, where Linux makes no user namespaces", "run in a container or outside of it"
    if by_apparmor:
        return by_apparmor
    if seen.selinux:
        return (
            f"{_NOT_TOLD}; SELinux is enforcing and may be it",
            "ausearch -m avc -ts recent, and allow what it shows",
        )
    if layer == "user namespace":
        return (
            f"{_NOT_TOLD}: no filter, sysctl, chroot or security module that we know shows itself",
            f"look at the system's log (dmesg) and at {_HOSTS}",
        )
    return f"{_NOT_TOLD}; a security module refuses it", f"look at the system's log (dmesg) and at {_HOSTS}"


def _seccomp_profile(seen: Evidence) -> Diagnosis:
    whose = f"{seen.container}'s" if seen.container else "a container's (Docker, Podman, Kubernetes) or a service's"
    remedy = _SECCOMP_REMEDY.get(seen.container) or (
        "a container: a seccomp profile that lets unshare and the mount calls through; a systemd service: no "
        "RestrictNamespaces=, and a SystemCallFilter= with the same calls"
    )
    return f"{whose} seccomp profile, loaded before us, refuses it", f"{remedy}: {_HOSTS}"


def _apparmor(seen: Evidence) -> Diagnosis | None:
    profile = seen.apparmor_profile.removesuffix(" (enforce)")
    if "docker" in profile or "cri-containerd" in profile or "containers-default" in profile:
        return (
            f"the container's AppArmor profile ({profile}) forbids mounts",
            "Docker: --security-opt apparmor=PROFILE; Kubernetes: appArmorProfile of type Localhost; "
            f"the profile's text: {_HOSTS}",
        )
    if seen.apparmor_restricts:
        return (
            "AppArmor's restriction of unprivileged user namespaces (Ubuntu 24.04 and newer)",
            f"give the grader's Python an AppArmor profile with 'userns,': the text is in {_HOSTS}; or "
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0 for the whole host",
        )
    if seen.apparmor_profile.endswith("(enforce)"):
        return f"the AppArmor profile {profile}, in which we run", "add 'userns,' and 'mount,' to it"
    return None


def _about_proc(number: int, seen: Evidence) -> Diagnosis | None:
    if not seen.proc_masks:
        return None
    shown = ", ".join(seen.proc_masks[:3]) + (" ..." if len(seen.proc_masks) > 3 else "")
    return (
        f"parts of /proc are masked ({shown}), as containers do; then Linux lets nobody mount another",
        "not needed: Python, its kernels and the usual packages run without /proc. To have one: Docker "
        "--security-opt systempaths=unconfined, Kubernetes procMount: Unmasked (with hostUsers: false)",
    )


def _about_user(number: int, seen: Evidence) -> Diagnosis | None:
    if not seen.root:
        return None
    if seen.mapped_ids < 1 << 16:
        return (
            f"this root is that of a user namespace in which {seen.mapped_ids} ids are mapped",
            "map a range of at least 65536 ids, or run the grader as an ordinary user",
        )
    return "this root may not change its uid and groups", "grant CAP_SETUID and CAP_SETGID, or run as an ordinary user"


def _about_counting(number: int, seen: Evidence) -> Diagnosis | None:
    if seen.gvisor:
        return None
    return (
        "this kernel was built without CONFIG_PROC_CHILDREN, or /proc is mounted so that it hides processes",
        "use a distribution's stock kernel, and mount /proc without subset=pid",
    )


def _about_totals(number: int, seen: Evidence) -> Diagnosis | None:
    return (
        "no control group is delegated to us (version 2), and we are not root over version 1's",
        "not needed: sampling keeps the limits, less exactly. To have one: systemd-run --user --scope -p Delegate=yes, "
        "or Delegate=yes in the service's unit",
    )


def _about_seccomp(number: int, seen: Evidence) -> Diagnosis | None:
    if number == errno.EINVAL:
        return "this kernel was built without CONFIG_SECCOMP_FILTER", "use a distribution's stock kernel"
    return None


def _about_landlock(number: int, seen: Evidence) -> Diagnosis | None:
    if seen.gvisor:
        return None
    return (
        "Linux is older than 5.19 (ABI 2), or was started without landlock among its security modules, or a "
        "container's seccomp profile refuses its calls",
        "not needed: it stands on top of the mounts. To have it: a newer kernel, or lsm=landlock,... on its command "
        "line",
    )


_SPECIAL: dict[str, Callable[[int, Evidence], Diagnosis | None]] = {
    "own /proc": _about_proc,
    "unprivileged user": _about_user,
    "counting processes": _about_counting,
    "limits in total": _about_totals,
    "seccomp": _about_seccomp,
    "Landlock": _about_landlock,
}


# --- The doctor ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Finding:
    """One layer: whether it is `in force`, `missing`, or `weaker` than it could be; what was seen, why, what to do."""

    layer: str
    state: str
    detail: str
    cause: str = ""
    remedy: str = ""


@dataclasses.dataclass(frozen=True)
class Examination:
    """What the doctor found out about this host for this user."""

    kernel: str
    user: str
    findings: tuple[Finding, ...]
    full: Finding
    """The whole sandbox, built as for any command."""
    landlock_tier: Finding
    """The weaker sandbox, which stands only where an administrator asks for it by name: `policy.LANDLOCK_GAPS`."""

    @property
    def ok(self) -> bool:
        return self.full.state == IN_FORCE and all(finding.state != MISSING for finding in self.findings)

    @property
    def tier(self) -> str | None:
        """The best tier that can be had, one of `policy.TIERS`, or None."""
        if self.ok:
            return "namespaces"
        return "landlock" if self.landlock_tier.state == IN_FORCE else None

    def as_dict(self) -> dict[str, Any]:
        return {
            "version": _version(),
            "kernel": self.kernel,
            "user": self.user,
            "ok": self.ok,
            "tier": self.tier,
            "findings": [dataclasses.asdict(finding) for finding in (*self.findings, self.full)],
            "landlock_tier": {**dataclasses.asdict(self.landlock_tier), "gaps": list(LANDLOCK_GAPS)},
        }


def _version() -> str:
    try:
        return importlib.metadata.version("nbgrader-aalto")
    except importlib.metadata.PackageNotFoundError:  # run from a copy of the sources
        return "unknown"


_INSIDE = """
fail() { echo "$1"; exit 1; }
[ "$(id -u)" = 1000 ] || fail "the uid inside is $(id -u)"
[ ! -e /root ] && [ ! -e /etc/shadow ] || fail "files of the host are visible inside"
(: > /usr/.isolate) 2>/dev/null && fail "/usr is writable inside"
(: > "$HOME/file" && : > /tmp/file) || fail "HOME and /tmp are not writable inside"
mkfifo /tmp/fifo 2>/dev/null && fail "mknod is not refused inside"
if [ -r /proc/self/status ]; then
    while read -r name value; do
        case "$name $value" in
            CapEff:*[1-9a-f]*|CapBnd:*[1-9a-f]*|CapPrm:*[1-9a-f]*) fail "there are capabilities inside" ;;
            "NoNewPrivs: 0") fail "no_new_privs is not set inside" ;;
            "Seccomp: 0") fail "no seccomp filter is in force inside" ;;
        esac
    done < /proc/self/status
fi
exit 0
"""


def examine() -> Examination:
    """Perform every step on this host, as the user who runs this. Takes about a second; leaves nothing."""
    seen = gather_evidence()
    limits = Limits(wall_seconds=30, cpu_seconds=30, memory_bytes=256 * MIB, files_bytes=16 * MIB)
    findings: list[Finding] = []
    with contextlib.ExitStack() as stack:
        plan: Plan = {"root": seen.root, "uid": None, "limits": dataclasses.asdict(limits), "seccomp": []}
        try:
            lease = stack.enter_context(uids.lease())
            plan["uid"] = lease.uid if lease else None
        except SandboxError as error:
            plan["no_uid"] = error.cause
        try:
            plan["seccomp"] = [base64.b64encode(program).decode() for program in seccomp.compiled_filters()]
            library = Finding("libseccomp", IN_FORCE, "loaded, and the filter compiles")
        except SandboxError as error:
            library = Finding("libseccomp", MISSING, error.cause, *_about_library(error))
        for answer in _ask_helper(plan):
            if answer["layer"] == "seccomp":
                findings.append(library)
            findings.append(_judge(answer, seen))
    policy = system_policy(limits=limits)
    full = _try_sandbox(policy, findings)
    weaker = _try_landlock_tier(dataclasses.replace(policy, tier="landlock"))
    who = "root" if seen.root else f"uid {os.getuid()}"
    return Examination(f"{platform.system()} {seen.release} {seen.machine}", who, tuple(findings), full, weaker)


def _about_library(error: SandboxError) -> Diagnosis:
    if error.remedy:
        return "libseccomp.so.2 is not installed, or cannot be read by this Python", error.remedy
    return "this libseccomp is too old or broken", "update it to 2.5 or newer"


def _ask_helper(plan: Plan) -> Iterator[Answer]:
    """One answer for each probe, also when the helper came to grief."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(isolate.__file__)))
    start = f"import sys; sys.path.append({package!r}); from isolate import doctor; sys.exit(doctor.perform_probes())"
    command = [sys.executable, "-I", "-S", "-B", "-c", start]
    output, trouble = "", "the helper ended without a word"
    try:
        done = subprocess.run(
            command,
            input=json.dumps(plan),
            capture_output=True,
            text=True,
            env={},
            cwd="/",
            timeout=_HELPER_SECONDS,
            start_new_session=True,
            check=False,
        )
        output = done.stdout
        trouble = (done.stderr.strip().splitlines() or [trouble])[-1]
    except subprocess.TimeoutExpired as error:
        raw = error.stdout or b""
        output, trouble = raw if isinstance(raw, str) else raw.decode(), "the helper took too long"
    except OSError as error:
        trouble = f"the helper cannot be started: {error}"
    answers = {answer["layer"]: answer for answer in map(json.loads, output.splitlines())}
    for probe in _PROBES:
        yield answers.get(probe.layer) or {"layer": probe.layer, "refused": trouble, "errno": 0}


_REQUIRED = {probe.layer: probe.required for probe in _PROBES}


def _judge(answer: Answer, seen: Evidence) -> Finding:
    layer = answer["layer"]
    if "detail" in answer:
        return Finding(layer, IN_FORCE, answer["detail"])
    state = MISSING if _REQUIRED[layer] else WEAKER
    if "untried" in answer:
        return Finding(layer, state, f"not tried: it needs {answer['untried']}")
    return Finding(layer, state, answer["refused"], *diagnose(layer, answer["errno"], seen))


def _try_sandbox(policy: Policy, findings: Sequence[Finding]) -> Finding:
    """Build a whole sandbox by the same door as everybody and look around in it."""
    layer = "the whole sandbox"
    with tempfile.TemporaryFile() as output:
        command = Command(["/bin/sh", "-c", _INSIDE], stdout=output, stderr=subprocess.STDOUT)

        def last_line() -> str:
            output.seek(0)
            return (output.read(20_000).decode("utf-8", "replace").strip().splitlines() or [""])[-1]

        try:
            with Sandbox(policy, command) as sandbox:
                report = sandbox.wait()
        except SandboxError as error:
            said = f" ({last_line()})" if last_line() else ""
            detail = f"{error.layer}: {error.cause}{said}"
            if _first_missing(findings):
                return Finding(layer, MISSING, detail, "see the first layer above that is missing")
            return Finding(layer, MISSING, detail, _NOT_TOLD, error.remedy)
        if report.exit_code != 0:
            detail = last_line() or report.message
            return Finding(layer, MISSING, detail, "it was built, and does not hold", "please report it")
    return Finding(layer, IN_FORCE, f"built and looked at from inside, in {report.wall_seconds:.2f} s")


def _try_landlock_tier(policy: Policy) -> Finding:
    layer = "landlock tier"
    try:
        with Sandbox(policy, Command(["/bin/true"], stderr=subprocess.DEVNULL)) as sandbox:
            report = sandbox.wait()
    except SandboxError as error:
        return Finding(layer, MISSING, f"{error.layer}: {error.cause}", "", error.remedy)
    if report.exit_code != 0:
        return Finding(layer, MISSING, report.message or f"/bin/true ended with exit code {report.exit_code}")
    return Finding(layer, IN_FORCE, ", ".join(report.layers))


def _first_missing(findings: Sequence[Finding]) -> Finding | None:
    return next((finding for finding in findings if finding.state == MISSING), None)


# --- What a person reads -------------------------------------------------------------------------------------------


def as_text(examination: Examination) -> str:
    """A table for 100 columns, and what to do next."""
    findings = (*examination.findings, examination.full)
    first = max(len(finding.layer) for finding in findings)
    lines = [f"isolate doctor: {examination.kernel}, as {examination.user}", ""]
    lines.append(f"{'layer':{first}}  {'state':8}  what was seen")
    lines.append(f"{'-' * first}  {'-' * 8}  {'-' * (_WIDTH - first - 12)}")
    for finding in findings:
        lines += _row(finding, first)
    return "\n".join([*lines, "", *_verdict(examination), "", *_about_the_weaker_tier(examination)]) + "\n"


def _row(finding: Finding, first: int) -> list[str]:
    state = finding.state.upper() if finding.state == MISSING else finding.state
    start = f"{finding.layer:{first}}  {state:8}  "
    lines = _wrapped(start, finding.detail)
    margin = " " * len(start)
    if finding.cause:
        lines += _wrapped(f"{margin}cause:  ", finding.cause)
    if finding.remedy:
        lines += _wrapped(f"{margin}remedy: ", finding.remedy)
    return lines


def _wrapped(start: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_on_hyphens=False,
    ) or [start.rstrip()]


def _verdict(examination: Examination) -> list[str]:
    if examination.ok:
        weaker = sum(finding.state == WEAKER for finding in examination.findings)
        also = f" {weaker} of the layers could be better; none of those is needed." if weaker else ""
        return _wrapped("", f"The full sandbox can be built on this host.{also}")
    lines = _wrapped("", "The full sandbox can NOT be built on this host, so nothing will be graded in it.")
    missing = _first_missing((*examination.findings, examination.full))
    if missing and missing.remedy:
        lines += _wrapped("Next:   ", f"{missing.layer}: {missing.remedy}")
        lines += _wrapped("Then:   ", "run `isolate doctor` again, as the user who will grade.")
    return lines


def _about_the_weaker_tier(examination: Examination) -> list[str]:
    tier = examination.landlock_tier
    if tier.state != IN_FORCE:
        ending = ", which is not needed here, cannot be built" if examination.ok else " cannot be built here either"
        return _wrapped("", f"The weaker landlock tier{ending}: {tier.detail}.")
    beginning = "could be built, too" if examination.ok else "can be built, for policies that ask for it by name"
    lines = _wrapped("", f"The weaker landlock tier {beginning}. It does not stop this:")
    for gap in LANDLOCK_GAPS:
        lines += _wrapped("  - ", gap)
    return lines


def run(options: argparse.Namespace) -> int:
    """`isolate doctor`: exit code 0 if the full sandbox can be built, 1 if not."""
    examination = examine()
    if options.json:
        print(json.dumps(examination.as_dict(), indent=2))
    else:
        print(as_text(examination), end="")
    return 0 if examination.ok else 1
