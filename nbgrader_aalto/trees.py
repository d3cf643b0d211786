"""Directory trees that somebody else may be changing: surveyed, copied by descriptors, put in place in one step.

Standard library and `isolate` only: `deposit`, which a student's submit starts, must start fast. Knows files;
refuses to know what they are for.
"""

import contextlib
import dataclasses
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from isolate import files, syscalls

_CHUNK = 1 << 20
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
REACHED = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Unfit(Exception):
    """A tree that is not taken; the text says which file, and why."""


@dataclasses.dataclass(frozen=True)
class TreeLimits:
    """What one tree may have. Bytes; `entries` are files and directories; `depth` is directories inside one another."""

    file_bytes: int
    tree_bytes: int
    entries: int = 10_000
    depth: int = 32


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """One file of a tree: its path relative to the tree's top, bytes, and SHA-256 in hex."""

    path: str
    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a tree looked like: the newest ctime in it (ns since 1970, its top included) and whose files it holds."""

    newest_ns: int
    owners: frozenset[int]
    entries: int
    files: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Copied:
    """The files of a finished copy, sorted by path, its directories, and what was left out with the reason."""

    files: tuple[FileEntry, ...]
    directories: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Selection:
    """nbgrader's choice of what is copied: `CourseDirectory.ignore` and `include`, both patterns of names."""

    ignore: tuple[str, ...] = ()
    include: tuple[str, ...] = ("*",)

    def ignores(self, path: str) -> bool:
        """Whether the last part of the path matches a pattern to ignore."""
        return files.matches(path, self.ignore)

    def includes(self, path: str) -> bool:
        """Whether a file of that name is wanted at all."""
        return files.matches(path, self.include)


EVERYTHING = Selection()


@contextlib.contextmanager
def opened(path: str | Path, *, dir_fd: int | None = None) -> Iterator[int]:
    """A descriptor of a directory that is not a link itself. Raises `OSError`; ENOTDIR or ELOOP for something else."""
    descriptor = os.open(path, _DIRECTORY, dir_fd=dir_fd)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def reached(path: str | Path, *, dir_fd: int | None = None) -> Iterator[int]:
    """A descriptor of anything, a link itself included, that one need not be able to read. open(2), O_PATH."""
    descriptor = os.open(path, REACHED, dir_fd=dir_fd)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def survey(directory: int, limits: TreeLimits) -> Survey:
    """Look at every file and directory below the open `directory`, each opened, none followed.

    Opening matters on NFS: it makes the client ask the server. Raises `Unfit` for what is not a regular file with
    one name or a directory, and as soon as a limit is passed; `OSError` for what cannot be opened.
    """
    top = os.fstat(directory)
    newest, owners, entries, regular, total = top.st_ctime_ns, {top.st_uid}, 0, 0, 0
    for entry in _walk(directory):
        if entry.descriptor is not None:
            os.close(entry.descriptor)
            _one_name(entry)
            regular += 1
            total += entry.status.st_size
        elif entry.status.st_dev != top.st_dev:  # where owners and times may be whatever its maker says
            raise Unfit(f"{entry.path!r} is another file system")
        entries += 1
        _within(entry, entries, total, limits)
        newest = max(newest, entry.status.st_ctime_ns)
        owners.add(entry.status.st_uid)
    return Survey(newest, frozenset(owners), entries, regular, total)


def copy_tree(
    source: int,
    target: int,
    selection: Selection,
    limits: TreeLimits,
    *,
    own: bool = False,
) -> Copied:
    """Copy what lies below the open directory `source` into the open, empty directory `target`; both stay open.

    Modes are what the umask makes of 0777 and 0666; owners and groups what the target gives. A tree of somebody
    else's is refused (`Unfit`) for any odd file. One of our `own`, a student's work directory or an instructor's
    release, is copied as nbgrader does: a link to a file counts as that file, and what cannot be copied (other
    links, FIFOs, files over the limit) is left out and listed. Files and directories are synced to the disk.
    """
    left_out: list[tuple[str, str]] = []
    found: list[FileEntry] = []
    directories: list[str] = []
    entries, total = 0, 0

    def odd(path: str, what: str) -> None:
        left_out.append((path, what))

    for entry in _walk(source, selection.ignores, odd if own else None):
        entries += 1
        if entry.descriptor is None:
            _within(entry, entries, total, limits)
            os.mkdir(entry.path, 0o777, dir_fd=target)
            directories.append(entry.path)
            continue
        with open(entry.descriptor, "rb", buffering=0) as content:
            if not selection.includes(entry.path):
                continue
            if own and entry.status.st_size > limits.file_bytes:
                left_out.append((entry.path, f"has {entry.status.st_size} bytes, more than {limits.file_bytes}"))
                continue
            if not own:
                _one_name(entry)
            total += entry.status.st_size
            _within(entry, entries, total, limits)
            found.append(_copy_file(content.fileno(), entry, target))
    for path in [*reversed(directories), "."]:
        with opened(path, dir_fd=target) as descriptor:
            os.fsync(descriptor)
    return Copied(tuple(sorted(found, key=lambda file: file.path)), tuple(directories), tuple(left_out))


def list_files(directory: int, limits: TreeLimits) -> tuple[FileEntry, ...]:
    """The files below the open `directory`, read and digested, sorted by path. Raises as `survey`."""
    found, total = [], 0
    for entries, entry in enumerate(_walk(directory), 1):
        if entry.descriptor is not None:
            with open(entry.descriptor, "rb") as content:
                total += entry.status.st_size
                _within(entry, entries, total, limits)
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            found.append(FileEntry(entry.path, entry.status.st_size, digest))
    return tuple(sorted(found, key=lambda file: file.path))


def _walk(
    directory: int,
    leave_out: Callable[[str], bool] = lambda path: False,
    odd: Callable[[str, str], None] | None = None,
) -> Iterator[files.Entry]:
    """With `odd`, links to files are followed and everything else goes there; without, it is `Unfit`."""
    try:
        if odd is None:
            yield from files.walk(os.dup(directory), leave_out)
        else:
            yield from files.walk(os.dup(directory), leave_out, odd, follow_links=True)
    except files.NotPlain as error:
        raise Unfit(str(error)) from error


def _one_name(entry: files.Entry) -> None:
    if entry.status.st_nlink != 1:
        raise Unfit(f"{entry.path!r} is a hard link: the file has {entry.status.st_nlink} names")


def _within(entry: files.Entry, entries: int, total: int, limits: TreeLimits) -> None:
    if stat.S_ISREG(entry.status.st_mode) and entry.status.st_size > limits.file_bytes:
        raise Unfit(f"{entry.path!r} has {entry.status.st_size} bytes, more than {limits.file_bytes}")
    if total > limits.tree_bytes:
        raise Unfit(f"all files together have more than {limits.tree_bytes} bytes")
    if entries > limits.entries:
        raise Unfit(f"there are more than {limits.entries} files and directories")
    if entry.path.count("/") >= limits.depth:
        raise Unfit(f"{entry.path[:60]!r}... is deeper than {limits.depth} directories")


def _copy_file(source: int, entry: files.Entry, target: int) -> FileEntry:
    """As many bytes as the file had when it was opened; a file that changes meanwhile is found by the next survey."""
    digest, left = hashlib.sha256(), entry.status.st_size
    copy = os.open(entry.path, _NEW_FILE, 0o666, dir_fd=target)
    try:
        while left > 0 and (data := os.read(source, min(left, _CHUNK))):
            left -= len(data)
            digest.update(data)
            _write(copy, data)
        os.fsync(copy)
    finally:
        os.close(copy)
    return FileEntry(entry.path, entry.status.st_size - left, digest.hexdigest())


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def entry_of(path: str, content: bytes) -> FileEntry:
    """The entry of a file with this content."""
    return FileEntry(path, len(content), hashlib.sha256(content).hexdigest())


def digest_of(entries: Sequence[FileEntry]) -> str:
    """One SHA-256 for a list of files: over `<sha256>  <path>` lines, as sha256sum(1) prints them."""
    lines = "".join(f"{file.sha256}  {file.path}\n" for file in sorted(entries, key=lambda file: file.path))
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def write_file(
    name: str | Path, content: bytes, *, dir_fd: int | None = None, mode: int | None = None, sync: bool = True
) -> None:
    """A new file with this content, on the disk; never through a link, never over something. Raises `OSError`."""
    descriptor = os.open(name, _NEW_FILE, 0o666 if mode is None else mode, dir_fd=dir_fd)
    try:
        if mode is not None:
            os.fchmod(descriptor, mode)
        _write(descriptor, content)
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_file(name: str, directory: int, most: int) -> bytes:
    """The content of a regular file in the open `directory`, never through a link. Raises `Unfit`, `OSError`."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with open(os.open(name, flags, dir_fd=directory), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise Unfit(f"{name!r} is not a regular file")
        content = file.read(most + 1)
    if len(content) > most:
        raise Unfit(f"{name!r} has more than {most} bytes")
    return content


def beside(path: Path) -> Path:
    """A name for something that is being made and will be put at `path`: hidden from nbgrader's patterns."""
    return path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.new")


def put_in_place(new: Path, path: Path) -> list[str]:
    """Make the complete directory `new` be `path`, in one step; what was at `path` is then removed.

    Where the file system cannot exchange two names (NFS), there are two steps, and after a death between them
    `recover(path)` finds the earlier one. Returns what of it could not be removed, with the reason.
    """
    with opened(new) as descriptor:
        os.fsync(descriptor)
    left: list[str] = []
    if not os.path.lexists(path):
        os.rename(new, path)
    else:
        try:
            syscalls.rename_exchange(str(new), str(path))
        except OSError:
            left = remove(_in_two_steps(new, path))
        else:
            left = remove(new)
    with opened(path.parent) as descriptor, contextlib.suppress(OSError):
        os.fsync(descriptor)
    return left


def _in_two_steps(new: Path, path: Path) -> Path:
    """Returns where the earlier one is now."""
    earlier = aside(path)
    os.rename(path, earlier)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(earlier, path)
        raise
    return earlier


def aside(path: Path) -> Path:
    """Where the earlier one lies between the two steps."""
    return path.with_name(f".{path.name}.replaced")


def recover(path: Path) -> None:
    """After `put_in_place` died: the earlier one is back, or the new one is there alone, and nothing lies beside it.

    For who holds the lock under which things are put there. Raises `OSError`.
    """
    earlier = aside(path)
    if os.path.lexists(earlier):
        if os.path.lexists(path):
            remove(earlier)
        else:
            os.rename(earlier, path)
    being_made = re.compile(rf"\.{re.escape(path.name[:100])}\.[0-9a-f]{{12}}\.new", re.DOTALL)
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(path.parent):
            if being_made.fullmatch(name):
                remove(path.with_name(name))


def remove(path: Path) -> list[str]:
    """Remove a tree of instructors' as far as it goes; returns what is left, with the reason, and raises nothing."""
    left: list[str] = []

    def failed(_: object, name: str, info: tuple[type[BaseException], BaseException, object]) -> None:
        error = info[1]
        if not isinstance(error, FileNotFoundError) and not os.path.basename(name).startswith(".nfs"):
            left.append(f"{name}: {getattr(error, 'strerror', None) or error}")

    try:
        shutil.rmtree(path, onerror=failed)
    except RecursionError:  # made by somebody who meant it
        left.append(f"{path}: too many directories inside one another; remove it with rm -r")
    return left
