"""Reading a directory without trusting what lies in it, and packing it for a room.

Every file is opened relative to its directory's descriptor and never through a link, so that nobody who can
write there leads us to a file of somebody else's. openat(2), O_NOFOLLOW.
"""

import dataclasses
import fnmatch
import io
import os
import stat
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from isolate.policy import SandboxError


def pack(directory: Path, *, leave_out: Iterable[str], max_bytes: int, max_files: int) -> IO[bytes]:
    """A tar archive, in an unlinked temporary file, of the regular files and directories below `directory`.

    `leave_out` are patterns of names (fnmatch). Raises `SandboxError` when something else than a regular file
    or directory lies there, or more than `max_bytes` or `max_files`.
    """
    patterns = tuple(leave_out)
    file: IO[bytes] = tempfile.TemporaryFile()
    try:
        with tarfile.open(fileobj=file, mode="w:", format=tarfile.PAX_FORMAT) as archive:
            root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            total, number = 0, 0
            for entry in walk(root, lambda path: matches(path, patterns)):
                info = tarfile.TarInfo(entry.path)
                number += 1
                if entry.descriptor is None:
                    info.type, info.mode = tarfile.DIRTYPE, 0o755
                    archive.addfile(info)
                else:
                    with open(entry.descriptor, "rb") as content:
                        info.size, info.mode = entry.status.st_size, stat.S_IMODE(entry.status.st_mode)
                        total += info.size
                        if total > max_bytes or number > max_files:
                            break
                        archive.addfile(info, _Exactly(content, info.size))
                if total > max_bytes or number > max_files:
                    break
            if total > max_bytes or number > max_files:
                raise SandboxError(
                    "files",
                    f"the files of the submission exceed {max_bytes} bytes or {max_files} files",
                    "raise the file limit of the policy",
                )
    except NotPlain as error:
        file.close()
        raise SandboxError("files", str(error)) from error
    except BaseException:
        file.close()
        raise
    file.seek(0)
    return file


class _Exactly(io.RawIOBase):
    """Reads as many bytes as were announced: a file that shrinks meanwhile is filled up with zeros."""

    def __init__(self, content: IO[bytes], size: int) -> None:
        self._content, self._left = content, size

    def read(self, size: int = -1) -> bytes:
        wanted = self._left if size < 0 else min(size, self._left)
        data = self._content.read(wanted).ljust(wanted, b"\0")
        self._left -= wanted
        return data


MAX_DEPTH = 256
"""Each level holds a descriptor open."""

_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class NotPlain(Exception):
    """Something that is neither a regular file nor a directory, or lies too deep."""


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """What `walk` found: `status` is fstat(2) of the opened file or directory."""

    path: str
    descriptor: int | None
    """Of a regular file, open for reading, which the taker closes; None for a directory."""
    status: os.stat_result


def _refuse(path: str, what: str) -> None:
    raise NotPlain(f"{path[:200]!r} {what}")


def walk(
    directory: int,
    leave_out: Callable[[str], bool] = lambda path: False,
    odd: Callable[[str, str], None] = _refuse,
    *,
    follow_links: bool = False,
) -> Iterator[Entry]:
    """All files and directories below the open `directory`, which is closed; each directory before its contents.

    Paths are relative. Those for which `leave_out` is true are not looked at. What is neither file nor directory goes
    to `odd(path, what it is)`, which raises `NotPlain` unless given. With `follow_links` a link to a regular file
    counts as that file; never one to a directory. Raises `OSError` for what cannot be opened, or is swapped meanwhile.
    """
    yield from _walk(directory, "", leave_out, odd, follow_links)


def _walk(
    directory: int,
    prefix: str,
    leave_out: Callable[[str], bool],
    odd: Callable[[str, str], None],
    follow_links: bool,
) -> Iterator[Entry]:
    try:
        for name in sorted(os.listdir(directory)):
            path = prefix + name
            if leave_out(path):
                continue
            kind = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
            if stat.S_ISDIR(kind):
                if path.count("/") >= MAX_DEPTH:
                    odd(path[:60] + "...", f"nests more than {MAX_DEPTH} directories")
                    continue
                below = os.open(name, _READ | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
                try:
                    yield Entry(path, None, os.fstat(below))
                except BaseException:
                    os.close(below)
                    raise
                yield from _walk(below, path + "/", leave_out, odd, follow_links)
            elif stat.S_ISREG(kind) or (follow_links and _leads_to_file(directory, name)):
                descriptor = os.open(name, _READ | (0 if follow_links else os.O_NOFOLLOW), dir_fd=directory)
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    os.close(descriptor)
                    odd(path, "is not a regular file any more")
                else:
                    yield Entry(path, descriptor, status)
            else:
                odd(path, "is neither a regular file nor a directory")
    finally:
        os.close(directory)


def _leads_to_file(directory: int, name: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(name, dir_fd=directory).st_mode)
    except OSError:
        return False


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether the last part of the path matches one of the patterns of names (fnmatch)."""
    return any(fnmatch.fnmatch(path.rpartition("/")[2], pattern) for pattern in patterns)
