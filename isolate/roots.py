"""Paths in a directory tree that somebody else has, or will have, as their `/`.

In an unpacked image, `/usr/bin/python` may be a link to `/opt/python/bin/python`: the image's, not the host's. So
every link is followed here by hand, step by step from descriptors, and none leads out of the tree, as for a process
whose root it is: path_resolution(7), and RESOLVE_IN_ROOT in openat2(2), which not every container lets through.
`HOST` is the host's own tree, so that the same code can look at both.

What is found is good for as long as nobody changes the tree. Whoever may write to it is trusted with what it shows.
"""

import contextlib
import dataclasses
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

_MOST_LINKS = 40
"""As many as the kernel follows. path_resolution(7)"""
_MOST_LEVELS = 256
"""Each holds a descriptor open."""


@dataclasses.dataclass(frozen=True, slots=True)
class Root:
    """A tree. `path` is where it lies on the host, free of links; all other paths are as seen inside, absolute."""

    path: Path

    @classmethod
    def at(cls, path: Path) -> "Root":
        """The tree at this directory of the host. Raises `OSError` if there is none."""
        real = Path(os.path.realpath(path, strict=True))
        if not real.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        return cls(real)

    def real(self, path: Path) -> Path | None:
        """Where a path leads, inside and free of links; None where nothing is."""
        try:
            with self._reached(path) as (names, _):
                return Path("/", *names)
        except (OSError, ValueError):  # ValueError: a NUL
            return None

    def on_host(self, path: Path) -> Path | None:
        """The place on the host of what a path leads to, free of links; None where nothing is."""
        real = self.real(path)
        return None if real is None else self.path.joinpath(*real.parts[1:])

    def link(self, path: Path) -> str | None:
        """What a link says; None for everything else."""
        with contextlib.suppress(OSError, ValueError):
            with self._reached(path.parent) as (_, above):
                return os.readlink(path.name, dir_fd=above[-1])
        return None

    def exists(self, path: Path) -> bool:
        """Whether a path leads to something."""
        return self.real(path) is not None

    def lexists(self, path: Path) -> bool:
        """Whether something is there, be it a link that leads nowhere."""
        return self.link(path) is not None or self.exists(path)

    def is_directory(self, path: Path) -> bool:
        """Whether a path leads to a directory."""
        return stat.S_ISDIR(self._mode(path))

    def is_file(self, path: Path) -> bool:
        """Whether a path leads to a regular file."""
        return stat.S_ISREG(self._mode(path))

    def _mode(self, path: Path) -> int:
        with contextlib.suppress(OSError, ValueError):
            with self._reached(path) as (_, above):
                return os.fstat(above[-1]).st_mode
        return 0

    def names(self, path: Path) -> list[str]:
        """What lies in a directory, sorted; nothing where there is none."""
        with contextlib.suppress(OSError, ValueError):
            with self._reached(path) as (_, above):
                directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=above[-1])
                try:
                    return sorted(os.listdir(directory))
                finally:
                    os.close(directory)
        return []

    def read(self, path: Path, max_bytes: int) -> bytes:
        """A regular file as a whole. Raises `OSError`, also for what is no regular file, or too large."""
        with self._reached(path) as (names, above):
            # Looked at before it is opened: opening a device may do something, and a FIFO would wait.
            if not names or not stat.S_ISREG(os.fstat(above[-1]).st_mode):
                raise OSError(errno.EINVAL, "not a regular file", str(path))
            descriptor = os.open(
                names[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=above[-2]
            )
            with open(descriptor, "rb") as file:
                data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
        return data

    @contextlib.contextmanager
    def _reached(self, path: Path) -> Iterator[tuple[list[str], list[int]]]:
        """The names from the root to where a path leads, and O_PATH descriptors of the root and of each of them.

        Raises `OSError` where it leads nowhere.
        """
        if not path.is_absolute():
            raise OSError(errno.EINVAL, "not an absolute path", str(path))
        names: list[str] = []
        above = [os.open(self.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)]
        try:
            self._walk(os.fspath(path), names, above)
            yield names, above
        finally:
            for descriptor in above:
                os.close(descriptor)

    def _walk(self, path: str, names: list[str], above: list[int]) -> None:
        waiting, links = path.split("/")[::-1], 0
        while waiting:
            name = waiting.pop()
            if name in {"", ".", ".."}:
                if not stat.S_ISDIR(os.fstat(above[-1]).st_mode):
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
                if name == ".." and names:
                    names.pop()
                    os.close(above.pop())
                continue
            found = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above[-1])
            above.append(found)
            names.append(name)
            if not stat.S_ISLNK(os.fstat(found).st_mode):
                if len(names) > _MOST_LEVELS:
                    raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), path)
                continue
            links += 1
            if links > _MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            target = os.readlink("", dir_fd=found)  # of the descriptor itself: readlink(2)
            back = len(names) if target.startswith("/") else 1
            for _ in range(back):
                names.pop()
                os.close(above.pop())
            waiting += target.split("/")[::-1]


class _Host(Root):
    """The tree whose links the kernel follows for us, which is ten times faster."""

    def real(self, path: Path) -> Path | None:
        try:
            return Path(os.path.realpath(path, strict=True))
        except (OSError, ValueError):
            return None

    def link(self, path: Path) -> str | None:
        try:
            return os.readlink(path)
        except (OSError, ValueError):
            return None

    def names(self, path: Path) -> list[str]:
        try:
            return sorted(os.listdir(path))
        except (OSError, ValueError):
            return []

    def exists(self, path: Path) -> bool:
        return path.exists()


HOST = _Host(Path("/"))
"""The host's own tree."""
