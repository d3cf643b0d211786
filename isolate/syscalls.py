"""The Linux system calls that Python 3.11 does not offer, as typed functions; nowhere else is ctypes used.

Every function raises `OSError` with the kernel's errno. Standard library only: this file is also read by
processes that run on a bare interpreter. Sources: the man pages of section 2 named at each function, and
include/uapi/linux of the kernel for the numbers.
"""

from __future__ import annotations  # read by Pythons from 3.9, too

import ctypes
import os
import platform

# sched.h, unshare(2)
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
ALL_NAMESPACES = (
    CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP
)
"""What a base and a room each have of their own, and what code in a room may not make: all but time."""

# mount(2)
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_NOSYMFOLLOW = 256  # Linux 5.10
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2

# mount_setattr(2)
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_IDMAP = 0x100000

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_AT_RECURSIVE = 0x8000
_OPEN_TREE_CLONE = 1
_OPEN_TREE_CLOEXEC = os.O_CLOEXEC
_MOVE_MOUNT_F_EMPTY_PATH = 0x4
_RENAME_EXCHANGE = 2

# prctl(2)
_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_SECCOMP = 22
_PR_CAPBSET_READ = 23
_PR_CAPBSET_DROP = 24
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2
_PR_CAP_AMBIENT_CLEAR_ALL = 4
CAP_SETGID, CAP_SETUID = 6, 7
_SECCOMP_MODE_FILTER = 2

_KEYCTL_JOIN_SESSION_KEYRING = 1
_LINUX_CAPABILITY_VERSION_3 = 0x20080522

# The calls after 5.0 have one number on every architecture; the older ones do not.
_OPEN_TREE, _MOVE_MOUNT, _CLOSE_RANGE, _MOUNT_SETATTR = 428, 429, 436, 442
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_LANDLOCK_CREATE_RULESET_VERSION = 1
_LANDLOCK_RULE_PATH_BENEATH = 1
_OLD_NUMBERS = {
    "x86_64": {"pivot_root": 155, "capset": 126, "keyctl": 250, "renameat2": 316},
    "aarch64": {"pivot_root": 41, "capset": 91, "keyctl": 219, "renameat2": 276},
}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _number(name: str) -> int:
    machine = platform.machine()
    if machine not in _OLD_NUMBERS:
        raise OSError(38, f"isolate does not know this architecture ({machine}); it runs on x86_64 and aarch64")
    return _OLD_NUMBERS[machine][name]


def _check(result: int, what: str) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _syscall(what: str, number: int, *arguments: object) -> int:
    return _check(_libc.syscall(ctypes.c_long(number), *arguments), what)


def unshare(flags: int) -> None:
    """Leave the namespaces named by `flags` for new ones. unshare(2)."""
    _check(_libc.unshare(ctypes.c_int(flags)), "unshare")


def mount(source: str, target: str, fstype: str | None, flags: int, data: str | None = None) -> None:
    """mount(2). Paths may hold any bytes that the file system encoding can carry."""
    arguments = [None if text is None else os.fsencode(text) for text in (source, target, fstype, data)]
    src, dst, kind, options = arguments
    _check(_libc.mount(src, dst, kind, ctypes.c_ulong(flags), options), f"mount {fstype or 'bind'} on {target}")


def umount_detached(target: str) -> None:
    """Take the mount out of the tree at once and free it when its last user goes. umount2(2), MNT_DETACH."""
    _check(_libc.umount2(os.fsencode(target), ctypes.c_int(MNT_DETACH)), f"umount {target}")


def pivot_root(new_root: str, put_old: str) -> None:
    """Make `new_root` the root of this mount namespace. pivot_root(2)."""
    _syscall("pivot_root", _number("pivot_root"), os.fsencode(new_root), os.fsencode(put_old))


def open_tree(path: str) -> int:
    """A descriptor of a private, recursive copy of the mounts at `path`. open_tree(2), kernel 5.2."""
    flags = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | _AT_RECURSIVE
    return _syscall(f"open_tree {path}", _OPEN_TREE, ctypes.c_int(_AT_FDCWD), os.fsencode(path), ctypes.c_uint(flags))


def move_mount(tree_fd: int, target: str) -> None:
    """Attach what `open_tree` returned at `target`. move_mount(2), kernel 5.2."""
    _syscall(
        f"move_mount to {target}",
        _MOVE_MOUNT,
        ctypes.c_int(tree_fd),
        b"",
        ctypes.c_int(_AT_FDCWD),
        os.fsencode(target),
        ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH),
    )


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def mount_setattr(mount: int | str, attr_set: int, *, recursive: bool = False, userns_fd: int = 0) -> None:
    """Set attributes of a mount, given by a descriptor or a path. mount_setattr(2), kernel 5.12.

    Flags that the mount already carries stay, so locked ones need not be repeated.
    """
    attributes = _MountAttr(attr_set, 0, 0, userns_fd)
    flags = _AT_RECURSIVE if recursive else 0
    if isinstance(mount, int):
        descriptor, path, flags = mount, b"", flags | _AT_EMPTY_PATH
    else:
        descriptor, path = _AT_FDCWD, os.fsencode(mount)
    _syscall(
        "mount_setattr",
        _MOUNT_SETATTR,
        ctypes.c_int(descriptor),
        path,
        ctypes.c_uint(flags),
        ctypes.byref(attributes),
        ctypes.c_size_t(ctypes.sizeof(attributes)),
    )


def close_range(first: int, last: int) -> None:
    """Close every descriptor from `first` to `last`. close_range(2), kernel 5.9."""
    if first <= last:
        _syscall("close_range", _CLOSE_RANGE, ctypes.c_uint(first), ctypes.c_uint(last), ctypes.c_uint(0))


def _prctl(what: str, option: int, *arguments: int) -> int:
    padded = [*arguments, 0, 0, 0, 0][:4]
    longs = [ctypes.c_ulong(value) for value in padded]
    return _check(_libc.prctl(ctypes.c_int(option), *longs), f"prctl {what}")


def set_parent_death_signal(signal_number: int) -> None:
    """The kernel sends this signal when the *thread* that forked us ends. prctl(2), PR_SET_PDEATHSIG."""
    _prctl("PR_SET_PDEATHSIG", _PR_SET_PDEATHSIG, signal_number)


def set_dumpable(dumpable: bool) -> None:
    """Whether processes of the same uid may look into this one. prctl(2), PR_SET_DUMPABLE."""
    _prctl("PR_SET_DUMPABLE", _PR_SET_DUMPABLE, int(dumpable))


def reset_personality() -> None:
    """The domain and flags of an ordinary program, such as random addresses, from the next execve on. personality(2)"""
    _check(_libc.personality(ctypes.c_ulong(0)), "personality")


def set_child_subreaper() -> None:
    """Orphans below this process become its children. prctl(2), PR_SET_CHILD_SUBREAPER."""
    _prctl("PR_SET_CHILD_SUBREAPER", _PR_SET_CHILD_SUBREAPER, 1)


def set_no_new_privs() -> None:
    """No execve from here on gains a privilege. prctl(2), PR_SET_NO_NEW_PRIVS."""
    _prctl("PR_SET_NO_NEW_PRIVS", _PR_SET_NO_NEW_PRIVS, 1)


class _CapHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapData(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def drop_bounding_capabilities(*keep: int) -> None:
    """Take all but these from the bounding set; needs CAP_SETPCAP. capabilities(7)"""
    for capability in range(64):
        if capability in keep:
            continue
        try:
            present = _prctl("PR_CAPBSET_READ", _PR_CAPBSET_READ, capability)
        except OSError:
            break  # EINVAL: one past the last capability that this kernel knows
        if present:
            _prctl("PR_CAPBSET_DROP", _PR_CAPBSET_DROP, capability)


def drop_capabilities() -> None:
    """Empty the ambient, effective, permitted and inheritable sets. capabilities(7), capset(2)."""
    hold_capabilities()


def hold_capabilities(*keep: int, effective: bool = False, across_exec: bool = False) -> None:
    """Give up all capabilities but these, of the first 32; what is kept has force only if `effective`.

    With `across_exec` an ordinary user's next program has them, too, in force. capabilities(7), "ambient"
    """
    bits = sum(1 << capability for capability in keep)
    _prctl("PR_CAP_AMBIENT", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    header = _CapHeader(_LINUX_CAPABILITY_VERSION_3, 0)
    sets = (_CapData * 2)(_CapData(bits if effective else 0, bits, bits if across_exec else 0))
    _syscall("capset", _number("capset"), ctypes.byref(header), ctypes.byref(sets))
    for capability in keep if across_exec else ():
        _prctl("PR_CAP_AMBIENT", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, capability)


class _SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def load_seccomp_filter(program: bytes) -> None:
    """Load a classic BPF program (8 bytes an instruction) on this thread. seccomp(2); needs no_new_privs."""
    fprog = _SockFprog(len(program) // 8, program)
    address = ctypes.addressof(fprog)
    _prctl("PR_SET_SECCOMP", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, address)


def landlock_abi() -> int:
    """The version of Landlock that this kernel has; 0 if none, or switched off. landlock_create_ruleset(2)"""
    try:
        flags = ctypes.c_uint(_LANDLOCK_CREATE_RULESET_VERSION)
        return _syscall("landlock", _LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), flags)
    except OSError:  # ENOSYS: not built in; EOPNOTSUPP: not switched on; EPERM: a filter refuses
        return 0


def landlock_create_ruleset(access_fs: int, scoped: int) -> int:
    """A descriptor of an empty set of rules that handles these rights; `scoped` needs ABI 6."""
    attributes = (ctypes.c_uint64 * 3)(access_fs, 0, scoped)  # struct landlock_ruleset_attr: fs, net, scoped
    size = 24 if scoped else 8
    return _syscall(
        "landlock_create_ruleset", _LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(size), ctypes.c_uint(0)
    )


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def landlock_add_path(ruleset_fd: int, access_fs: int, path_fd: int) -> None:
    """Allow these rights at and below what the descriptor names. landlock_add_rule(2)"""
    rule = _PathBeneath(access_fs, path_fd)
    _syscall(
        "landlock_add_rule",
        _LANDLOCK_ADD_RULE,
        ctypes.c_int(ruleset_fd),
        ctypes.c_int(_LANDLOCK_RULE_PATH_BENEATH),
        ctypes.byref(rule),
        ctypes.c_uint(0),
    )


def landlock_restrict_self(ruleset_fd: int) -> None:
    """Put this thread and all it will start under the rules. landlock_restrict_self(2); needs no_new_privs."""
    _syscall("landlock_restrict_self", _LANDLOCK_RESTRICT_SELF, ctypes.c_int(ruleset_fd), ctypes.c_uint(0))


def rename_exchange(one: str, other: str) -> None:
    """Let two existing paths change places in one step. renameat2(2), RENAME_EXCHANGE.

    `OSError` EINVAL or ENOSYS where the file system (NFS) or this file (other processors) cannot.
    """
    _syscall(
        f"rename {one} <-> {other}",
        _number("renameat2"),
        ctypes.c_int(_AT_FDCWD),
        os.fsencode(one),
        ctypes.c_int(_AT_FDCWD),
        os.fsencode(other),
        ctypes.c_uint(_RENAME_EXCHANGE),
    )


def join_new_session_keyring() -> None:
    """Leave the session keyring of whoever started us for an empty one. keyctl(2)."""
    _syscall("keyctl", _number("keyctl"), ctypes.c_int(_KEYCTL_JOIN_SESSION_KEYRING), None)


def overwrite_command_line(title: bytes) -> None:
    """Replace what /proc/PID/cmdline shows of this process, which would name paths of the host. proc(5)."""
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end, fields 48 and 49 of the line
    length = end - start
    if length > 1:
        ctypes.memset(start, 0, length)
        ctypes.memmove(start, title[: length - 1], min(len(title), length - 1))
