"""Who is who: uid to username and back, and who is an instructor of the course.

The kernel says which uid owns a file; a course's container often has no other users in its NSS, so the registry
that knows their names may be a file that the hub writes, or a command. Both speak passwd(5).
"""

import functools
import grp
import os
import pwd
import shlex
import stat
import subprocess
from collections.abc import Collection

from nbgrader_aalto.exchange.names import student_problem

_SECONDS = 10.0


class RegistryError(Exception):
    """The registry cannot be used; nobody is known."""


class People:
    """A registry and a group.

    `registry` is `nss`, `file:PATH` (lines as in /etc/passwd) or `command:ARGV`, which is run with the uid or the
    username as its last argument and prints such a line (`command:getent passwd`). `instructors` are usernames that
    count as members of the group `gid` where NSS does not list them. What was asked once is remembered: one for each
    round of work.
    """

    def __init__(self, registry: str, gid: int | None, instructors: Collection[str] = ()) -> None:
        kind, _, argument = registry.partition(":")
        if kind not in {"nss", "file", "command"} or (kind != "nss" and not argument):
            raise RegistryError(f"{registry!r} is no registry: write 'nss', 'file:/PATH' or 'command:getent passwd'")
        self._kind, self._argument = kind, argument
        self._gid, self._instructors = gid, frozenset(instructors)
        self._known: dict[int | str, tuple[str, int] | None] = {}

    def username(self, uid: int) -> str | None:
        """The name of a uid, None if the registry has none that nbgrader could use. Raises `RegistryError`."""
        entry = self._entry(uid)
        return entry[0] if entry and entry[1] == uid and student_problem(entry[0]) is None else None

    def uid(self, username: str) -> int | None:
        """The uid of a name. Raises `RegistryError`."""
        entry = self._entry(username)
        return entry[1] if entry and entry[0] == username else None

    def is_instructor(self, uid: int) -> bool:
        """Whether a user is a member of the course's group, or named as an instructor."""
        name = self.username(uid)
        if name is not None and name in self._instructors:
            return True
        if self._gid is None:
            return False
        if uid == os.geteuid() and self._gid in {os.getegid(), *os.getgroups()}:
            return True
        return name is not None and (name in self._members or _primary_group(name) == self._gid)

    @functools.cached_property
    def _members(self) -> frozenset[str]:
        assert self._gid is not None  # by the caller
        try:
            return frozenset(grp.getgrgid(self._gid).gr_mem)
        except KeyError:
            return frozenset()

    def _entry(self, key: int | str) -> tuple[str, int] | None:
        """(username, uid). A username may be all digits, so that the type of the key says what it is."""
        if key not in self._known:
            self._known[key] = {"nss": self._from_nss, "file": self._from_file, "command": self._from_command}[
                self._kind
            ](key)
        return self._known[key]

    def _from_nss(self, key: int | str) -> tuple[str, int] | None:
        try:
            entry = pwd.getpwuid(key) if isinstance(key, int) else pwd.getpwnam(key)
        except (KeyError, OverflowError, ValueError):
            return None
        return entry.pw_name, entry.pw_uid

    def _from_command(self, key: int | str) -> tuple[str, int] | None:
        command = [*shlex.split(self._argument), str(key)]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise RegistryError(f"the registry's command {self._argument!r} failed: {error}") from error
        return _parse(done.stdout.partition("\n")[0]) if done.returncode == 0 else None

    def _from_file(self, key: int | str) -> tuple[str, int] | None:
        return self._file.get(key)

    @functools.cached_property
    def _file(self) -> dict[int | str, tuple[str, int]]:
        try:
            with open(self._argument, encoding="utf-8") as file:
                if os.fstat(file.fileno()).st_mode & stat.S_IWOTH:
                    raise RegistryError(f"{self._argument} can be changed by everybody; chmod o-w {self._argument}")
                entries = [entry for line in file if (entry := _parse(line)) is not None]
        except OSError as error:
            raise RegistryError(f"the registry {self._argument} cannot be read: {error.strerror}") from error
        found: dict[int | str, tuple[str, int]] = {}
        for entry in entries:  # the first one counts, as in NSS
            found.setdefault(entry[0], entry)
            found.setdefault(entry[1], entry)
        return found


def _parse(line: str) -> tuple[str, int] | None:
    """`name:password:uid:...`; None for anything else. passwd(5)"""
    fields = line.strip().split(":")
    return (fields[0], int(fields[2])) if len(fields) >= 3 and fields[0] and fields[2].isdecimal() else None


def _primary_group(name: str) -> int | None:
    try:
        return pwd.getpwnam(name).pw_gid
    except KeyError:
        return None
