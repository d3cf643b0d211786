"""Why a layer is missing, and what to do: explained from what the host says about itself beside the probes.

The only part of the doctor that guesses. What /proc and /sys say may be wrong in a container that lies, and the
kernel tells an errno, never a reason; so where the evidence points nowhere, the cause is "cannot be told from here".
"""

import dataclasses
import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

from isolate.policy import SandboxError
from isolate.probes import read_status

Diagnosis = tuple[str, str]
"""(cause, remedy)"""

GUIDE = "docs/hosts.md"
NOT_TOLD = "cannot be told from here"


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What the host says about itself."""

    release: str = ""
    """Of the kernel, as in uname(2)."""
    version: str = ""
    machine: str = "x86_64"
    root: bool = False
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
        """Older than mount_setattr(2)."""
        match = re.match(r"(\d+)\.(\d+)", self.release)
        return match is not None and (int(match[1]), int(match[2])) < (5, 12)


def gather_evidence(root: Path = Path("/")) -> Evidence:
    """Read what /proc and /sys below `root` say about this process and its host. proc(5)"""
    process, sysctl = root / "proc/self", root / "proc/sys"
    status = read_status(process / "status")
    mounts = [line.split(" ")[4] for line in _text(process / "mountinfo").splitlines()]
    uname = os.uname()
    return Evidence(
        release=uname.release,
        version=uname.version,
        machine=uname.machine,
        root=os.geteuid() == 0,
        seccomp=status.get("Seccomp") == "2",
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


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip(" \n\0")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdecimal() else None


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


# The causes and remedies

_LOG = f"look at the system's log (dmesg) and at {GUIDE}"
_STOCK_KERNEL = "use a distribution's stock kernel"
_CALLS_LET_THROUGH = "that lets unshare and the mount calls through"
_SECCOMP_REMEDY = {
    "Docker": f"docker run --security-opt seccomp=FILE, with a profile {_CALLS_LET_THROUGH}",
    "Podman": f"podman run --security-opt seccomp=FILE, with a profile {_CALLS_LET_THROUGH}",
    "Kubernetes": (
        f"in the pod's securityContext a seccompProfile of type Localhost {_CALLS_LET_THROUGH}, and hostUsers: false; "
        "in JupyterHub by c.KubeSpawner.container_security_context and extra_pod_config"
    ),
}


def _set_sysctl(setting: str) -> str:
    return f"sysctl -w {setting}, and the same in /etc/sysctl.d to keep it"


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
        return "this kernel was built without this kind of namespace", _STOCK_KERNEL
    if number in {errno.EPERM, errno.EACCES}:
        return _refused(layer, number, seen)
    return NOT_TOLD, _LOG


def diagnose_library(error: SandboxError) -> Diagnosis:
    """Why `seccomp.compiled_filters` failed."""
    if error.remedy:
        return "libseccomp.so.2 is not installed, or cannot be read by this Python", error.remedy
    return "this libseccomp is too old or broken", "update it to 2.5 or newer"


def _unknown_call(seen: Evidence) -> Diagnosis:
    if seen.old:
        return f"Linux {seen.release} is older than 5.12", "update the kernel to 5.12 or newer"
    if seen.seccomp:
        return _seccomp_profile(seen)
    return "this kernel does not know the call", f"{_STOCK_KERNEL}, 5.12 or newer"


def _used_up(seen: Evidence) -> Diagnosis:
    if seen.max_user_namespaces == 0:
        return (
            "the sysctl user.max_user_namespaces is 0: an administrator, or RHEL 7's default",
            _set_sysctl("user.max_user_namespaces=15000"),
        )
    return (
        "as many namespaces as user.max_*_namespaces allows, here or further out, are in use or none is allowed; or "
        "user namespaces are nested 32 deep",
        "raise them (sysctl user), outside of the container too",
    )


def _refused(layer: str, number: int, seen: Evidence) -> Diagnosis:
    """EPERM and EACCES. A filter refuses calls; AppArmor refuses what is done in a namespace, by EACCES."""
    by_apparmor = _apparmor(seen)
    if by_apparmor and (layer == "id maps" or number == errno.EACCES):
        return by_apparmor
    if seen.seccomp and layer != "id maps":
        return _seccomp_profile(seen)
    return _switched_off(seen) or by_apparmor or _refused_untold(layer, seen)


def _switched_off(seen: Evidence) -> Diagnosis | None:
    if seen.unprivileged_userns_clone == 0:
        return (
            "the sysctl kernel.unprivileged_userns_clone is 0: Debian's and Arch's switch for ordinary users",
            _set_sysctl("kernel.unprivileged_userns_clone=1"),
        )
    if seen.chrooted:
        return "we run in a chroot, where Linux makes no user namespaces", "run in a container or outside of it"
    return None


def _refused_untold(layer: str, seen: Evidence) -> Diagnosis:
    if seen.selinux:
        return (
            f"{NOT_TOLD}; SELinux is enforcing and may be it",
            "ausearch -m avc -ts recent, and allow what it shows",
        )
    if layer == "user namespace":
        return f"{NOT_TOLD}: no filter, sysctl, chroot or security module that we know shows itself", _LOG
    return f"{NOT_TOLD}; a security module refuses it", _LOG


def _seccomp_profile(seen: Evidence) -> Diagnosis:
    whose = f"{seen.container}'s" if seen.container else "a container's (Docker, Podman, Kubernetes) or a service's"
    remedy = _SECCOMP_REMEDY.get(seen.container) or (
        f"a container: a seccomp profile {_CALLS_LET_THROUGH}; a systemd service: no RestrictNamespaces=, and a "
        "SystemCallFilter= with the same calls"
    )
    return f"{whose} seccomp profile, loaded before us, refuses it", f"{remedy}: {GUIDE}"


def _apparmor(seen: Evidence) -> Diagnosis | None:
    profile = seen.apparmor_profile.removesuffix(" (enforce)")
    if "docker" in profile or "cri-containerd" in profile or "containers-default" in profile:
        return (
            f"the container's AppArmor profile ({profile}) forbids mounts",
            "Docker: --security-opt apparmor=PROFILE; Kubernetes: appArmorProfile of type Localhost; "
            f"the profile's text: {GUIDE}",
        )
    if seen.apparmor_restricts:
        return (
            "AppArmor's restriction of unprivileged user namespaces (Ubuntu 24.04 and newer)",
            f"give the grader's Python an AppArmor profile with 'userns,': the text is in {GUIDE}; or "
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0 for the whole host",
        )
    if seen.apparmor_profile.endswith("(enforce)"):
        return f"the AppArmor profile {profile}, in which we run", "add 'userns,' and 'mount,' to it"
    return None


# Layers that fail for reasons of their own; None where the general ones hold


def _about_user(_: int, seen: Evidence) -> Diagnosis | None:
    if not seen.root:
        return None
    if seen.mapped_ids < 1 << 16:
        return (
            f"this root is that of a user namespace in which {seen.mapped_ids} ids are mapped",
            "map a range of at least 65536 ids, or run the grader as an ordinary user",
        )
    return "this root may not change its uid and groups", "grant CAP_SETUID and CAP_SETGID, or run as an ordinary user"


def _about_proc(_: int, seen: Evidence) -> Diagnosis | None:
    if not seen.proc_masks:
        return None
    shown = ", ".join(seen.proc_masks[:3]) + (" ..." if len(seen.proc_masks) > 3 else "")
    return (
        f"parts of /proc are masked ({shown}), as containers do; then Linux lets nobody mount another",
        "not needed: Python, its kernels and the usual packages run without /proc. To have one: Docker "
        "--security-opt systempaths=unconfined, Kubernetes procMount: Unmasked (with hostUsers: false)",
    )


def _about_seccomp(number: int, _: Evidence) -> Diagnosis | None:
    return ("this kernel was built without CONFIG_SECCOMP_FILTER", _STOCK_KERNEL) if number == errno.EINVAL else None


def _about_landlock(_: int, seen: Evidence) -> Diagnosis | None:
    if seen.gvisor:
        return None
    return (
        "Linux is older than 5.19 (ABI 2), or was started without landlock among its security modules, or a "
        "container's seccomp profile refuses its calls",
        "not needed: it stands on top of the mounts. To have it: a newer kernel, or lsm=landlock,... on its command "
        "line",
    )


def _about_counting(_: int, seen: Evidence) -> Diagnosis | None:
    if seen.gvisor:
        return None
    return (
        "this kernel was built without CONFIG_PROC_CHILDREN, or /proc is mounted so that it hides processes",
        f"{_STOCK_KERNEL}, and mount /proc without subset=pid",
    )


def _about_totals(_: int, __: Evidence) -> Diagnosis:
    return (
        "no control group is delegated to us (version 2), and we are not root over version 1's",
        "not needed: sampling keeps the limits, less exactly. To have one: systemd-run --user --scope -p Delegate=yes, "
        "or Delegate=yes and DelegateSubgroup=supervisor in the service's unit (docs/hosts.md)",
    )


_SPECIAL: dict[str, Callable[[int, Evidence], Diagnosis | None]] = {
    "unprivileged user": _about_user,
    "own /proc": _about_proc,
    "seccomp": _about_seccomp,
    "Landlock": _about_landlock,
    "counting processes": _about_counting,
    "limits in total": _about_totals,
}
