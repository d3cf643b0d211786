"""Packing a directory for a room, without trusting what lies in it.

Every file is opened relative to its directory's descriptor and never through a link, so that nobody who can
write there leads us to a file of somebody else's. openat(2), O_NOFOLLOW.
"""

import fnmatch
import io
import os
import stat
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
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
            for name, descriptor, status in _walk(root, "", patterns):
                info = tarfile.TarInfo(name)
                number += 1
                if descriptor is None:
                    info.type, info.mode = tarfile.DIRTYPE, 0o755
                    archive.addfile(info)
                else:
                    with open(descriptor, "rb") as content:
                        info.size, info.mode = status.st_size, stat.S_IMODE(status.st_mode)
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


_MAX_DEPTH = 256
"""Each level holds a descriptor open."""


def _walk(directory: int, prefix: str, patterns: tuple[str, ...]) -> Iterator[tuple[str, int | None, os.stat_result]]:
    """(name, open descriptor or None for a directory, status); closes `directory`. The taker closes the files."""
    try:
        for name in sorted(os.listdir(directory)):
            if any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
                continue
            path = prefix + name
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                if path.count("/") >= _MAX_DEPTH:
                    raise SandboxError("files", f"{path[:60]!r}... nests more than {_MAX_DEPTH} directories")
                yield path, None, status
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                yield from _walk(os.open(name, flags, dir_fd=directory), path + "/", patterns)
            elif stat.S_ISREG(status.st_mode):
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                descriptor = os.open(name, flags, dir_fd=directory)
                opened = os.fstat(descriptor)
                if not stat.S_ISREG(opened.st_mode):
                    os.close(descriptor)
                    raise SandboxError("files", f"{path!r} is not a regular file any more")
                yield path, descriptor, opened
            else:
                raise SandboxError("files", f"{path!r} is neither a regular file nor a directory")
    finally:
        os.close(directory)
