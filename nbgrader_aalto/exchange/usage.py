"""Who uses how much of the exchange. Only the file system's quota can bound it; this tells for whom one is due."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nbgrader_aalto.exchange.people import People


@dataclass(frozen=True)
class Usage:
    """Of one owner: names in inbound, files below them, and bytes on the disk (blocks, not what sparse files claim)."""

    owner: str
    entries: int
    files: int
    bytes: int


def usage(inbound: Path, people: People) -> list[Usage]:
    """What lies in inbound, hidden and odd entries included, by owner; the largest first. Nothing is followed.

    What cannot be looked into counts as an entry. Raises `OSError` if inbound cannot be listed, `RegistryError`.
    """
    found: dict[int, list[int]] = {}
    for entry in os.scandir(inbound):
        with contextlib.suppress(FileNotFoundError):
            status = entry.stat(follow_symlinks=False)
            sums = found.setdefault(status.st_uid, [0, 0, 0])
            sums[0] += 1
            for file in _files(entry.path) if entry.is_dir(follow_symlinks=False) else [status]:
                sums[1] += 1
                sums[2] += 512 * file.st_blocks
    named = [Usage(people.username(uid) or f"uid {uid}", *sums) for uid, sums in found.items()]
    return sorted(named, key=lambda one: (-one.bytes, one.owner))


def _files(path: str) -> Iterator[os.stat_result]:
    """Not recursive: a student may nest directories deeper than Python can call."""
    ahead = [path]
    while ahead:
        with contextlib.suppress(OSError):
            for entry in os.scandir(ahead.pop()):
                if entry.is_dir(follow_symlinks=False):
                    ahead.append(entry.path)
                else:
                    yield entry.stat(follow_symlinks=False)


def readable(size: int) -> str:
    """1234567 -> `1.2 MB`."""
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
