"""Reading a token from a file, if nobody but those who may have it could have read the file or put it there.

Who may: root, the user who reads, and for a course of several instructors the members of its group. Each directory on
the way is checked, too, because who may write to one can put another file in the place of ours (as OpenSSH does it:
safe_path in misc.c). Standard library only, since the client in a course's container reads its token with it.
Refuses to know what the token is good for.
"""

import contextlib
import dataclasses
import errno
import grp
import os
import pwd
import re
import stat
import struct
from pathlib import Path

_MOST_BYTES = 4096
_WORD = re.compile(rb"[!-~]{8,512}")
_STEP = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_ACL, _ACL_ENTRY, _ACL_HEADER_BYTES = "system.posix_acl_access", struct.Struct("<HHI"), 4
_ACL_USER, _ACL_GROUP = 0x02, 0x08
"""Layout and numbers: linux/posix_acl_xattr.h, linux/posix_acl.h."""


class TokenFileError(Exception):
    """The token's file cannot be trusted or read. The words say why, and what to do; never what is in it."""


def read_token_file(path: Path, *, group: str | int | None = None) -> str:
    """The token in this file. Raises `TokenFileError` for any doubt.

    The file is root's or the user's own, and 0600. `group` is the course's group (name or gid), if it has one: then the
    file may be 0640 with that group. No directory above it may be written to by anybody but root, the user, and members
    of that group.
    """
    real = Path(os.path.realpath(path))
    with contextlib.ExitStack() as stack:
        try:
            directories = _open_directories(real.parent, stack)
            trusted = _Trusted(path, _gid(path, group))
            for place, descriptor in directories:
                trusted.check_directory(place, descriptor)
            file = os.open(real.name or ".", _READ, dir_fd=directories[-1][1])
            stack.callback(os.close, file)
            trusted.check_file(file)
            data = os.read(file, _MOST_BYTES + 1)
        except OSError as error:
            raise TokenFileError(f"the token file {path} cannot be read: {error.strerror}") from error
    if _WORD.fullmatch(data.strip()) is None:
        raise TokenFileError(f"the token file {path} holds something else than one token on one line")
    return data.strip().decode("ascii")


def _open_directories(directory: Path, stack: contextlib.ExitStack) -> list[tuple[Path, int]]:
    """Descriptors of `/` and of each directory below it to `directory`, for as long as `stack` lives."""
    found: list[tuple[Path, int]] = []
    for place in (*reversed(directory.parents), directory):
        descriptor = os.open(place.name or "/", _STEP, dir_fd=found[-1][1] if found else None)
        stack.callback(os.close, descriptor)
        found.append((place, descriptor))
    return found


def _gid(path: Path, group: str | int | None) -> int | None:
    if not isinstance(group, str):
        return group
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise TokenFileError(f"the token file {path} is not used: there is no group {group!r} on this host") from None


@dataclasses.dataclass(frozen=True)
class _Trusted:
    """Root, the user, and the members of one group, if any."""

    path: Path
    gid: int | None

    def check_file(self, descriptor: int) -> None:
        """Raises `TokenFileError` if anybody else may have read or written it."""
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise self._refusal("it is not a regular file")
        if status.st_uid not in {0, os.geteuid()}:
            raise self._refusal(f"it belongs to {_user(status.st_uid)}; it must be root's or your own")
        if status.st_mode & stat.S_IRWXO:
            raise self._refusal(f"everybody may use it; run: chmod o= {self.path}")
        if status.st_mode & stat.S_IWGRP:
            raise self._refusal(f"its group may change it; run: chmod g-w {self.path}")
        if status.st_mode & stat.S_IRWXG and status.st_gid not in {0, self.gid}:
            owner = _group(status.st_gid)
            raise self._refusal(f"{owner} may read it, and is not the course's; run: chmod g= {self.path}")
        if status.st_mode & stat.S_IRWXG and (strangers := _on_access_list(descriptor)):
            raise self._refusal(f"its access list lets in {strangers}; run: setfacl -b {self.path}")

    def check_directory(self, place: Path, descriptor: int) -> None:
        """Raises `TokenFileError` if anybody else could put another file, or another directory, into this one."""
        status = os.fstat(descriptor)
        ours = self.gid is not None and status.st_gid == self.gid
        if status.st_uid not in {0, os.geteuid()} and not (ours and _is_member(status.st_uid, status.st_gid)):
            raise self._refusal(f"{place} belongs to {_user(status.st_uid)}, who could replace it")
        if status.st_mode & stat.S_ISVTX:
            return  # there nobody can move what is another's: inode(7)
        if status.st_mode & stat.S_IWOTH:
            raise self._refusal(f"everybody may write to {place} and replace it; run: chmod o-w {place}")
        if not status.st_mode & stat.S_IWGRP:
            return
        if status.st_gid != 0 and not ours:
            raise self._refusal(f"{_group(status.st_gid)} may write to {place} and replace it; run: chmod g-w {place}")
        if strangers := _on_access_list(descriptor):
            raise self._refusal(f"the access list of {place} lets in {strangers}; run: setfacl -b {place}")

    def _refusal(self, reason: str) -> TokenFileError:
        return TokenFileError(f"the token file {self.path} is not used: {reason}")


def _on_access_list(descriptor: int) -> str:
    """Users and groups whom a POSIX access list names beside owner and group, but not root and ourselves. acl(5)"""
    try:
        data = os.getxattr(f"/proc/self/fd/{descriptor}", _ACL)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTSUP):
            return ""
        raise
    named = [
        _user(number) if tag == _ACL_USER else _group(number)
        for tag, permissions, number in _ACL_ENTRY.iter_unpack(data[_ACL_HEADER_BYTES:])
        if permissions and (tag == _ACL_GROUP or (tag == _ACL_USER and number not in {0, os.geteuid()}))
    ]
    return ", ".join(named)


def _is_member(uid: int, gid: int) -> bool:
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return False
    return gid in os.getgrouplist(entry.pw_name, entry.pw_gid)


def _user(uid: int) -> str:
    try:
        return f"the user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"the user {uid}"


def _group(gid: int) -> str:
    try:
        return f"the group {grp.getgrgid(gid).gr_name}"
    except KeyError:
        return f"the group {gid}"
