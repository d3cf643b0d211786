"""Files that a notebook wrote, kept for the instructor: regular ones, into a fresh directory."""

import contextlib
import os
import shutil
import tarfile
from pathlib import Path
from typing import IO

WRITTEN_SUFFIX = "_written"


def keep_written(after: IO[bytes], before: IO[bytes], directory: Path) -> None:
    """Unpack what is new or changed in the archive `after` into `directory`, replacing that directory.

    The archive was packed by the room's init, never by student code, from regular files within the policy's
    size; names are the student's and may not lead out. Nothing is made when nothing was written.
    """
    known = dict(_regular_files(before))
    if directory.is_symlink() or directory.is_file():
        directory.unlink()
    elif directory.exists():
        shutil.rmtree(directory)
    for name, content in _regular_files(after):
        if known.get(name) == content:
            continue
        target = directory / name
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with contextlib.suppress(OSError):
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(os.open(target, flags, 0o644), "wb") as file:
                file.write(content)


def _regular_files(archive: IO[bytes]) -> list[tuple[str, bytes]]:
    archive.seek(0)
    found = []
    try:
        with tarfile.open(fileobj=archive, mode="r:") as tar:
            for member in tar:
                parts = member.name.split("/")
                content = tar.extractfile(member) if member.isreg() and ".." not in parts and parts[0] else None
                if content is not None:
                    found.append((member.name, content.read()))
    except tarfile.ReadError:
        return []  # nothing was packed: the kernel was killed as a whole
    finally:
        archive.seek(0)
    return found
