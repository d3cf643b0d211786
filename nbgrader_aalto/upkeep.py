"""Finding what somebody broke by hand in a course, and mending it as far as whoever runs this may."""

import contextlib
import dataclasses
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from nbgrader_aalto import lock, shared, trees, turns
from nbgrader_aalto.course import (
    COURSE,
    INSTRUCTORS,
    INSTRUCTORS_FILE,
    RELEASED,
    RELEASED_FILE,
    SPECIAL,
    Course,
    CourseError,
    Finding,
    Wanted,
    finding_of,
    is_movable,
    movable_finding,
    printable,
    shell_quoted,
)
from nbgrader_aalto.create import Making
from nbgrader_aalto.remains import Kind, Remains, remains_of

_STILL_OPEN = re.compile(r"\.nfs[0-9a-f]+")
"""What NFS keeps of a removed file that somebody has open."""
_GIT_READ_ONLY = frozenset({"TAG_EDITMSG", "MERGE_MSG", "SQUASH_MSG"})
"""In .git; git removes these itself."""
_SHARED_REPOSITORY = re.compile(
    r"^\s*sharedrepository\s*=\s*\"?(group|true|1|2|all|world|everybody|0?66\d)\b", re.M | re.I
)
_DEEPEST = 200
_CHUNK = 1 << 20
_RECENT_NS = 10 * 10**9
"""A file that was written to so short ago may be open for writing still: what comes after a copy would be lost."""
_KEPT_BY_GIT = Wanted(0o440, SPECIAL)
_LOG = Wanted(0o640, SPECIAL)
"""Only its owner writes it; nbgrader opens it before it has set the umask."""


def check(course: Course) -> list[Finding]:
    """What not all instructors can use, in the course directory and in the exchange. Changes nothing."""
    look = _Look(course, mend=False)
    look.at_all()
    return look.findings


def repair(course: Course, say: Callable[[str], None]) -> list[Finding]:
    """Mend what may be mended, and return what is left, as a new `check` finds it.

    One's own files (for root, all) are given group and mode. Files of others become a copy of ours, put in their
    place by rename(2) when it is complete and equal, where the directory lets us; never a gradebook or a log, which
    somebody may have open for writing. What killed commands left behind is put right, but not by root.
    """
    with _alone(course, say) as is_alone:
        look = _Look(course, mend=True, is_alone=is_alone)
        look.at_all()
    for line in look.mended:
        say(line)
    return [
        dataclasses.replace(finding, problem=f"{finding.problem}; {look.reasons[finding.path]}")
        if finding.path in look.reasons
        else finding
        for finding in check(course)
    ]


@contextlib.contextmanager
def _alone(course: Course, say: Callable[[str], None]) -> Iterator[bool]:
    """While nobody collects or releases. Root replaces no file, and so needs no lock, nor a path to make one in.

    Raises `CourseError` when a colleague is at it for long. False where no lock was made; nothing is replaced then.
    """
    is_alone = False
    with contextlib.ExitStack() as stack:
        if os.geteuid() != 0:
            umask = os.umask(shared.UMASK)
            stack.callback(os.umask, umask)
            try:
                directory, purpose = course.root / turns.LOCKS, "repairing the course"
                stack.enter_context(lock.locked(directory, turns.EXCHANGE, purpose, log=say))
                is_alone = True
            except lock.Busy as error:
                raise CourseError(str(error)) from error
            except OSError as error:
                say(f"{course.root / turns.LOCKS}: {error.strerror}; repairing without a lock")
        yield is_alone


_Rules = Callable[[str], tuple[Wanted | None, Wanted]]
"""What directories and files at a path must be like."""


class _Look:
    """One round through a course. Goes on after each problem."""

    def __init__(self, course: Course, *, mend: bool, is_alone: bool = False) -> None:
        self._course, self._mend, self._is_alone = course, mend, is_alone
        path = course.gradebook
        self._gradebook = Path(os.path.realpath(path.parent)) / path.name if path else None
        self._elsewhere: set[tuple[int, int]] = set()
        self.findings: list[Finding] = []
        self.mended: list[str] = []
        self.reasons: dict[str, str] = {}

    def at_all(self) -> None:
        """The exchange first: it may lie below the course directory, where its insides are not looked at."""
        if self._course.exchange is not None:
            self._exchange(self._course.exchange)
        self._top(self._course.root, COURSE, lambda path: _instructors(path, self._course.root), whole=True)
        if self._gradebook and self._course.root not in self._gradebook.parents:
            self._beside(self._gradebook)
        self._repository()

    def _repository(self) -> None:
        """Read by us, not by git, which would heed the rest of what stands there."""
        place = self._course.root / ".git"
        try:
            with trees.opened(place) as directory:
                owner = shared.owner_name(os.fstat(directory).st_uid)
                text = trees.read_file("config", directory, 1 << 20).decode(errors="replace")
        except (OSError, trees.Unfit):
            return  # no repository; or found already
        if _SHARED_REPOSITORY.search(text):
            return
        if self._mend and os.geteuid() != 0:
            making = Making(self._course)
            making.repository()
            self.mended.extend(making.done)
        elif not self._mend:
            command = f"git -C {shell_quoted(str(self._course.root))} config core.sharedRepository group"
            words = "core.sharedRepository is not group: what one instructor commits, others cannot add to"
            self.findings.append(Finding(str(place), owner, words, f"{owner} runs: {command}"))

    def _exchange(self, root: Path) -> None:
        with contextlib.suppress(OSError):
            status = os.stat(root)
            self._elsewhere.add((status.st_dev, status.st_ino))
            if is_movable(status):
                self.findings.append(movable_finding(root, status))
        for path, wanted in self._course.in_exchange:
            if os.path.islink(path.parent) and path.parent != root:
                return  # and so found already: nothing below it is the course's
            if self._mend and path.name != self._course.slug and not os.path.lexists(path):
                making = Making(self._course)
                making.directory(path, wanted)
                self.mended.extend(making.done)
            self._top(path, wanted, _released, whole=path.name == "outbound")

    def _beside(self, gradebook: Path) -> None:
        """A gradebook that lies elsewhere, and its journals."""
        try:
            with trees.opened(gradebook.parent) as directory:
                for name in sorted(os.listdir(directory)):
                    if name.startswith(gradebook.name):
                        self._one(directory, name, str(gradebook.parent / name), lambda path: (None, INSTRUCTORS_FILE))
        except OSError as error:
            self._unreadable(str(gradebook.parent), error)

    def _top(self, path: Path, wanted: Wanted, below: _Rules, *, whole: bool) -> None:
        """A directory that must be there, and, if it is to be looked at as a whole, what is in it."""
        try:
            with trees.reached(path) as descriptor:
                status = os.fstat(descriptor)
                self._elsewhere.add((status.st_dev, status.st_ino))
                if not stat.S_ISDIR(status.st_mode):
                    what = "is a link" if stat.S_ISLNK(status.st_mode) else "is not a directory"
                    self.findings.append(Finding(str(path), shared.owner_name(status.st_uid), what, "look what it is"))
                    return
                self._judge(descriptor, None, str(path), wanted)
                if whole:
                    self._contents(descriptor, str(path), below, 0)
        except FileNotFoundError:
            command = "see: nbgrader-aalto course create --help"
            self.findings.append(Finding(str(path), "nobody", "is missing", command))
        except OSError as error:
            self._unreadable(str(path), error)

    def _contents(self, reached: int, path: str, rules: _Rules, depth: int) -> None:
        try:
            directory = os.open(f"/proc/self/fd/{reached}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            self._unreadable(path, error)
            return
        try:
            for name in sorted(os.listdir(directory)):
                if not _STILL_OPEN.fullmatch(name) and not self._is_refuse(f"{path}/{name}"):
                    self._one(directory, name, f"{path}/{name}", rules, depth)
        except OSError as error:
            self._unreadable(path, error)
        finally:
            os.close(directory)

    def _one(self, directory: int, name: str, path: str, rules: _Rules, depth: int = 0) -> None:
        try:
            with trees.reached(name, dir_fd=directory) as descriptor:
                status = os.fstat(descriptor)
                wanted_directory, wanted_file = rules(path)
                if stat.S_ISREG(status.st_mode):
                    self._judge(descriptor, (directory, name), path, wanted_file)
                if not stat.S_ISDIR(status.st_mode) or (status.st_dev, status.st_ino) in self._elsewhere:
                    return
                if wanted_directory:
                    self._judge(descriptor, None, path, wanted_directory)
                if depth >= _DEEPEST:
                    self.findings.append(
                        Finding(path, shared.owner_name(status.st_uid), "is too deep to be looked at", "move it higher")
                    )
                elif os.path.basename(path) != turns.LOCKS:  # who is at work: see `lock`
                    self._contents(descriptor, path, rules, depth + 1)
        except FileNotFoundError:
            return  # gone meanwhile: a course is alive
        except OSError as error:
            self._unreadable(path, error)

    def _is_refuse(self, path: str) -> bool:
        """Whether this is something of which the insides do not count. Looks after what is left of killed commands."""
        outbound = self._course.exchange and self._course.exchange / self._course.slug / "outbound"
        remains = remains_of(Path(path), self._course.root, outbound)
        if remains is None:
            return False
        with contextlib.suppress(FileNotFoundError):  # whoever is at work has just done it
            if self._mend:
                self._put_right(remains)
            elif remains.is_left():
                self.findings.append(remains.finding())
        return remains.kind in (Kind.NEW, Kind.DROPPED)

    def _put_right(self, remains: Remains) -> None:
        path = str(remains.path)
        if not self._is_alone:
            self.reasons[path] = "not mended: that needs a lock, which was not made; any other instructor can"
            return
        try:
            if done := remains.mend():
                self.mended.append(f"{printable(path)}: {done}")
        except (lock.Busy, lock.LockLost) as error:
            self.reasons[path] = f"not mended: {error}"
        except OSError as error:
            self.reasons[path] = f"not mended: {error.strerror or error}"

    def _unreadable(self, path: str, error: OSError) -> None:
        owner = "unknown"
        with contextlib.suppress(OSError):
            owner = shared.owner_name(os.lstat(path).st_uid)
        if not any(finding.path == path for finding in self.findings):
            self.findings.append(
                Finding(
                    path, owner, f"cannot be looked at: {error.strerror}", f"{owner} runs: nbgrader-aalto course repair"
                )
            )

    def _judge(self, descriptor: int, place: tuple[int, str] | None, path: str, wanted: Wanted) -> None:
        """Find what is wrong with what `descriptor` refers to; mend it if this is a repair. `place` is of a file."""
        status = os.fstat(descriptor)
        finding = finding_of(path, status, self._course.gid, wanted)
        if finding is None:
            return
        if not self._mend:
            self.findings.append(finding)
            return
        try:
            self.mended.append(f"{printable(path)}: {self._mended(descriptor, place, path, status, wanted)}")
        except (OSError, _Left) as error:
            self.reasons[path] = f"not mended: {getattr(error, 'strerror', None) or error}"

    def _mended(
        self, descriptor: int, place: tuple[int, str] | None, path: str, status: os.stat_result, wanted: Wanted
    ) -> str:
        mode = stat.S_IMODE(status.st_mode)
        if place is not None and status.st_nlink != 1:
            raise _Left(f"it has {status.st_nlink} names (hard links), one of which may be no file of the course's")
        if status.st_uid == os.geteuid() or os.geteuid() == 0:
            shared.mend(descriptor, self._course.gid, wanted.of(mode))
            return f"mode {mode:o} is {stat.S_IMODE(os.fstat(descriptor).st_mode):o} now, group {self._course.group}"
        if place is None:
            raise _Left("only its owner, or root, can")
        relative = os.path.relpath(path, self._course.root).split(os.sep)
        if (self._gradebook and path.startswith(str(self._gradebook))) or relative[0] == "logs":
            raise _Left("somebody may have it open, so that a copy would lose what is written")
        _replace_by_copy(place, status, self._course.gid, wanted.of(mode) & 0o777)
        return f"replaced by a copy; it was {shared.owner_name(status.st_uid)}'s"


def _instructors(path: str, root: Path) -> tuple[Wanted | None, Wanted]:
    parts = os.path.relpath(path, root).split(os.sep)
    if parts[0] == "logs":
        return INSTRUCTORS, _LOG
    if ".git" in parts[:-1]:
        inside = parts[parts.index(".git") + 1 :]
        if inside[0] == "objects" or (len(inside) == 1 and inside[0] in _GIT_READ_ONLY):
            return INSTRUCTORS, _KEPT_BY_GIT
    return INSTRUCTORS, INSTRUCTORS_FILE


def _released(path: str) -> tuple[Wanted | None, Wanted]:
    return RELEASED, RELEASED_FILE


class _Left(Exception):
    """Why something is left as it is."""


def _replace_by_copy(place: tuple[int, str], seen: os.stat_result, gid: int, mode: int) -> None:
    """Put a copy of ours in the place of a file of somebody else's: content and times, in one step. Raises `OSError`,
    or `_Left` when it is being changed; then the file is as it was.
    """
    directory, name = place
    new = trees.beside(Path(name)).name
    source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    try:
        if not _same(os.fstat(source), seen):
            raise _Left("it is being changed")
        copy = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
        try:
            with open(source, "rb", closefd=False) as reader, open(copy, "r+b", closefd=False) as writer:
                shutil.copyfileobj(reader, writer, _CHUNK)
                writer.flush()
                os.fsync(copy)
                if not _equal(reader, writer):
                    raise _Left("it is being changed")
            if os.fstat(copy).st_mtime_ns - seen.st_mtime_ns < _RECENT_NS:  # both by the file server's clock
                raise _Left("it was changed a moment ago, and may be open for writing; run this again")
            shared.mend(copy, gid, mode)
            os.utime(copy, ns=(seen.st_atime_ns, seen.st_mtime_ns))
            if not _same(os.stat(name, dir_fd=directory, follow_symlinks=False), seen):
                raise _Left("it is being changed")
            os.rename(new, name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(new, dir_fd=directory)
            raise
        finally:
            os.close(copy)
    finally:
        os.close(source)


def _same(one: os.stat_result, other: os.stat_result) -> bool:
    names = ("st_dev", "st_ino", "st_mode", "st_size", "st_mtime_ns", "st_ctime_ns", "st_nlink")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def _equal(one: IO[bytes], other: IO[bytes]) -> bool:
    one.seek(0)
    other.seek(0)
    while True:
        left, right = one.read(_CHUNK), other.read(_CHUNK)
        if left != right or not left:
            return left == right
