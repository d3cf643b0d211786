"""Landlock: which files a process may open and change, whatever its namespaces and uid would allow.

In a room it stands on top of the mounts: what they lock, it forbids once more, and besides the writable files
of proc. In the landlock tier (`isolate.confined`) it is the wall itself. Rules only ever add: what is allowed
for a directory is allowed for everything below it.

Standard library only, for any Python from 3.9. Sources: landlock(7), include/uapi/linux/landlock.h.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

from isolate import syscalls

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REMOVE_DIR, _REMOVE_FILE = 1 << 4, 1 << 5
_MAKE_CHAR, _MAKE_DIR, _MAKE_REG, _MAKE_SOCK, _MAKE_FIFO, _MAKE_BLOCK, _MAKE_SYM = (1 << bit for bit in range(6, 13))
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_SCOPE_ABSTRACT_UNIX_SOCKET, _SCOPE_SIGNAL = 1, 2

_ALL_OF_ABI_1 = (1 << 13) - 1
_SINCE = {2: _REFER, 3: _TRUNCATE, 5: _IOCTL_DEV}
SCOPES_SINCE = 6
"""The ABI from which a process cannot signal others, nor connect to their abstract sockets."""
REFER_SINCE = 2
"""The ABI before which no file can be moved between two directories."""
TRUNCATE_SINCE = 3

_READ = _EXECUTE | _READ_FILE | _READ_DIR
_CHANGE = (_WRITE_FILE | _TRUNCATE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _MAKE_SOCK | _MAKE_FIFO) | (
    _MAKE_SYM | _REFER
)
_OF_FILES = _EXECUTE | _READ_FILE | _WRITE_FILE | _TRUNCATE | _IOCTL_DEV
_KINDS = {
    "read": _READ,
    "write": _READ | _CHANGE,
    "sockets": _READ_FILE | _READ_DIR | _WRITE_FILE | _REMOVE_FILE | _MAKE_SOCK,
    "device": _READ_FILE | _WRITE_FILE | _TRUNCATE,
    "terminal": _READ_FILE | _READ_DIR | _WRITE_FILE | _IOCTL_DEV,
}

Rule = tuple[str, str]
"""(path, kind): `read` (and execute), `write` (all but making devices), `sockets` (no links: somebody outside follows
what lies there), `device`, `terminal`."""


def abi() -> int:
    """The version of Landlock that this kernel offers; 0 if none."""
    return syscalls.landlock_abi()


def restrict(rules: Iterable[Rule]) -> None:
    """Restrict this thread, and all that it will start, to these rules for good.

    A path that does not exist is left out. Raises `OSError`; needs no_new_privs.
    """
    version = abi()
    handled = _ALL_OF_ABI_1
    for since, right in _SINCE.items():
        handled |= right if version >= since else 0
    scoped = _SCOPE_ABSTRACT_UNIX_SOCKET | _SCOPE_SIGNAL if version >= SCOPES_SINCE else 0
    ruleset = syscalls.landlock_create_ruleset(handled, scoped)
    try:
        for path, kind in rules:
            _add(ruleset, path, _KINDS[kind] & handled)
        syscalls.landlock_restrict_self(ruleset)
    finally:
        os.close(ruleset)


def scope_signals() -> bool:
    """Close this process in with what it will start: no signal of theirs goes further. Whether the kernel can.

    Raises `OSError`; needs no_new_privs.
    """
    if abi() < SCOPES_SINCE:
        return False
    ruleset = syscalls.landlock_create_ruleset(0, _SCOPE_SIGNAL)
    try:
        syscalls.landlock_restrict_self(ruleset)
    finally:
        os.close(ruleset)
    return True


def _add(ruleset: int, path: str, access: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            access &= _OF_FILES
        syscalls.landlock_add_path(ruleset, access, descriptor)
    finally:
        os.close(descriptor)


def without(path: str, hidden: Iterable[str]) -> list[str]:
    """What to allow so that all below `path` is, but not what is hidden: siblings, since no rule can take away.

    Directories on the way to something hidden cannot be listed, then. Paths must be real ones.
    """
    below = [os.path.relpath(one, path).split(os.sep) for one in hidden if one == path or one.startswith(path + os.sep)]
    if not below:
        return [path]
    names = {parts[0] for parts in below}
    if "." in names:
        return []
    allowed = []
    with os.scandir(path) as entries:
        for entry in sorted(entries, key=lambda one: one.name):
            if entry.is_symlink():
                continue  # following one needs no right; what it leads to is allowed by itself or not at all
            if entry.name not in names:
                allowed.append(entry.path)
            elif entry.is_dir(follow_symlinks=False):
                allowed += without(entry.path, hidden)
    return allowed
