"""The work directory of a room: unpacked from an archive before the command runs, packed into one after it.

Both are done inside, by the room's own init; the archive that comes out is opaque to the host and given to the next
room as it is. Standard library only, for any Python from 3.9.
"""

from __future__ import annotations

import contextlib
import os
import tarfile
from typing import IO


def unpack(file: IO[bytes], directory: str) -> None:
    """Regular files and directories of a tar archive that the supervisor or an earlier room packed."""
    if not file.seek(0, os.SEEK_END):
        return  # nothing could be kept
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            parts = member.name.split("/")
            if member.name.startswith("/") or ".." in parts:
                raise OSError(22, f"a file name that leads out: {member.name!r}")
            path = os.path.join(directory, member.name)
            if member.isdir():
                os.makedirs(path, exist_ok=True)
            elif member.isreg():
                os.makedirs(os.path.dirname(path), exist_ok=True)
                content = archive.extractfile(member)
                assert content is not None
                mode = 0o755 if member.mode & 0o100 else 0o644
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
                with open(descriptor, "wb") as target:
                    while block := content.read(1 << 20):
                        target.write(block)


def pack_or_nothing(file: IO[bytes], directory: str, max_bytes: int, max_files: int) -> None:
    """What the code left may be made to break a packer (ten thousand nested directories): then nothing is kept."""
    with file:
        try:
            _pack(file, directory, max_bytes, max_files)
        except (OSError, ValueError, RecursionError, MemoryError, tarfile.TarError):
            file.seek(0)
            file.truncate()


def _pack(file: IO[bytes], directory: str, max_bytes: int, max_files: int) -> None:
    """The work directory as the code left it: regular files and directories, names and contents, no more.

    Links and special files are left out, and so is what goes over the bounds (sparse files count whole).
    """
    room_left, names_left = max_bytes, max_files
    with tarfile.open(fileobj=file, mode="w:", format=tarfile.PAX_FORMAT) as archive:
        for where, directories, names in os.walk(directory):
            for name in [*directories]:
                with contextlib.suppress(OSError):
                    os.chmod(os.path.join(where, name), 0o755, follow_symlinks=True)
            for name in sorted([*directories, *names]):
                path = os.path.join(where, name)
                info = tarfile.TarInfo(os.path.relpath(path, directory))
                names_left -= 1
                if names_left < 0:
                    return
                try:
                    if os.path.isdir(path) and not os.path.islink(path):
                        info.type, info.mode = tarfile.DIRTYPE, 0o755
                        archive.addfile(info)
                    elif os.path.isfile(path) and not os.path.islink(path):
                        os.chmod(path, 0o755 if os.stat(path).st_mode & 0o100 else 0o644)
                        info.size = os.path.getsize(path)
                        info.mode = os.stat(path).st_mode & 0o777
                        taken = -(-info.size // 4096) * 4096
                        if taken > room_left:
                            continue
                        room_left -= taken
                        with open(path, "rb") as content:
                            archive.addfile(info, content)
                except UnicodeEncodeError:
                    continue  # a name that no archive can carry
