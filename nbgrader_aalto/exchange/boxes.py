"""Boxes: how something reaches one student and nobody else.

Theory of operation. Nobody but root can hand a file to one other user by modes alone. So the student makes a box, a
directory of 2770 with the course's group (`deposit`), in `<exchange>/<course>/feedback`, where everybody can make
something and nobody can list: at submit, or later at list or fetch if there was none. The student's client
remembers its name; instructors find it by its owner. Instructors write files of 0644 into it, by descriptor and rename.

What a student's boxes are to hold lies in the outbox, `<vault>/.outbox/<student>/`, and delivering makes the boxes
equal to it: so a student who has no box yet, or lost it, gets everything with the next delivery.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from nbgrader_aalto import deposit, trees
from nbgrader_aalto.exchange.people import People
from nbgrader_aalto.exchange.stamps import RECEIPT

_TEMPORARY = ".tmp-"
_MODE = 0o644
_FEEDBACK = ".html"
_MOST_BOXES = 20
"""Of one student: more than anybody loses; each of them holds everything, and the course pays for it."""
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def feedback_name(assignment: str, timestamp: str, notebook: str) -> str:
    """Of a feedback file in a box. Assignments and timestamps hold no `+`."""
    return f"{assignment}+{timestamp}+{notebook}{_FEEDBACK}"


def receipt_name(submission: str) -> str:
    """Of a confirmed receipt in a box."""
    return f"{submission}{RECEIPT}"


@dataclasses.dataclass(frozen=True)
class Feedback:
    """One feedback file in a box of one's own."""

    path: Path
    assignment: str
    timestamp: str
    notebook: str


class OwnBoxes:
    """The boxes of the student who runs this. Their names are kept in `<cache>/.boxes/<course>`.

    `hidden` is False where everybody has one uid.
    """

    def __init__(self, feedback: Path, cache: Path, course: str, *, hidden: bool = True) -> None:
        self._feedback, self._memory, self._hidden = feedback, cache / ".boxes" / course, hidden

    def ensure(self, user: str) -> None:
        """Make a box if there is none. Raises `deposit.DepositError`, `OSError`."""
        if self.paths() or not self._feedback.is_dir():
            return
        name = f"{user}+{secrets.token_urlsafe(12)}"
        self._memory.parent.mkdir(parents=True, exist_ok=True)
        names = [*self._names(), name]
        temporary = self._memory.with_name(f".{self._memory.name}.{secrets.token_hex(4)}")
        temporary.write_text(json.dumps(names), encoding="utf-8")  # before the box: it could not be found again
        os.replace(temporary, self._memory)
        deposit.make(self._feedback, name, hidden=self._hidden)

    def paths(self) -> list[Path]:
        """Those that exist and are one's own."""
        found = []
        for name in self._names():
            with contextlib.suppress(OSError):
                status = os.lstat(self._feedback / name)
                if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
                    found.append(self._feedback / name)
        return found

    def _names(self) -> list[str]:
        try:
            names = json.loads(self._memory.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        return [name for name in names if isinstance(name, str) and "/" not in name and not name.startswith(".")]

    def feedback(self) -> list[Feedback]:
        """All feedback files, each once."""
        found: dict[str, Feedback] = {}
        for path in self._files(_FEEDBACK):
            parts = path.name.removesuffix(_FEEDBACK).split("+", 2)
            if len(parts) == 3:
                found[path.name] = Feedback(path, *parts)
        return [found[name] for name in sorted(found)]

    def receipts(self) -> dict[str, tuple[int, bytes]]:
        """Name of the submission -> the uid that owns the receipt, and what stands in it."""
        found: dict[str, tuple[int, bytes]] = {}
        for path in self._files(RECEIPT):
            with contextlib.suppress(OSError), open(os.open(path, _READ), "rb") as file:
                status = os.fstat(file.fileno())
                if stat.S_ISREG(status.st_mode):
                    found[path.name.removesuffix(RECEIPT)] = status.st_uid, file.read(4_000_000)
        return found

    def _files(self, suffix: str) -> Iterator[Path]:
        for box in self.paths():
            with contextlib.suppress(OSError):
                yield from (box / name for name in sorted(os.listdir(box)) if name.endswith(suffix) and name[0] != ".")


class Outbox:
    """What students' boxes are to hold, in the vault."""

    def __init__(self, vault: Path) -> None:
        self.path = vault / ".outbox"

    def put(self, student: str, name: str, content: bytes) -> bool:
        """Have a file in the student's boxes. Returns whether it is new or another one."""
        directory = self.path / student
        directory.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):
            if (directory / name).read_bytes() == content:
                return False
        temporary = f"{_TEMPORARY}{secrets.token_hex(6)}"
        with trees.opened(directory) as descriptor:
            trees.write_file(temporary, content, dir_fd=descriptor)
            os.rename(temporary, name, src_dir_fd=descriptor, dst_dir_fd=descriptor)
        return True

    def students(self) -> list[str]:
        """Those for whom there is something."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(os.listdir(self.path))
        return []

    def files(self, student: str) -> dict[str, os.stat_result]:
        """Name -> status of what is to be in the student's boxes."""
        with contextlib.suppress(FileNotFoundError):
            return {
                entry.name: entry.stat(follow_symlinks=False)
                for entry in os.scandir(self.path / student)
                if not entry.name.startswith(".")
            }
        return {}


@dataclasses.dataclass(frozen=True)
class Delivery:
    """Who has everything, who has no box, and which boxes could not be written to, with the reason."""

    reached: frozenset[str]
    boxless: frozenset[str]
    failed: tuple[tuple[str, str], ...]


def deliver(
    outbox: Outbox,
    feedback: Path,
    people: People,
    *,
    by_owner: bool = True,
    wanted: Callable[[str], bool] = lambda student: True,
) -> Delivery:
    """Make the boxes hold what the outbox holds, for students that are `wanted`. With the lock of the course.

    A box is what its owner, as the kernel says, is: the name does not count unless `by_owner` is False. Raises
    `people.RegistryError`, and `OSError` if `feedback` cannot be listed.
    """
    students = {student for student in outbox.students() if wanted(student)}
    reached: set[str] = set()
    failed: list[tuple[str, str]] = []
    if not students or not feedback.is_dir():
        return Delivery(frozenset(), frozenset(students), ())
    with trees.opened(feedback) as directory:
        found: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for name in sorted(os.listdir(directory)):
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(name, dir_fd=directory, follow_symlinks=False)
                student = _student_of(name, status, people, by_owner)
                if student in students:
                    found[student].append((status.st_ctime_ns, name))
        for student, boxes in found.items():
            for _, name in sorted(boxes, reverse=True)[:_MOST_BOXES]:  # the newest: a lost one is made anew
                try:
                    with trees.opened(name, dir_fd=directory) as box:
                        if _student_of(name, os.fstat(box), people, by_owner) == student:  # it may have been swapped
                            _fill(box, outbox, student)
                            reached.add(student)
                except OSError as error:  # removed, closed to the group, or no directory: its owner's loss
                    failed.append((name, error.strerror or str(error)))
    return Delivery(frozenset(reached), frozenset(students - reached), tuple(failed))


def _student_of(name: str, status: os.stat_result, people: People, by_owner: bool) -> str:
    if not by_owner:
        return name.rpartition("+")[0]
    return people.username(status.st_uid) or ""


def _fill(box: int, outbox: Outbox, student: str) -> None:
    for entry in os.scandir(box):
        if entry.name.startswith(_TEMPORARY) and not entry.is_dir(follow_symlinks=False):
            with contextlib.suppress(OSError):
                os.unlink(entry.name, dir_fd=box)  # of a release that was killed
    for name, wanted in outbox.files(student).items():
        with contextlib.suppress(OSError):
            there = os.stat(name, dir_fd=box, follow_symlinks=False)
            same = (there.st_size, there.st_mtime_ns) == (wanted.st_size, wanted.st_mtime_ns)
            if stat.S_ISREG(there.st_mode) and same:
                continue
        content = (outbox.path / student / name).read_bytes()
        temporary = f"{_TEMPORARY}{secrets.token_hex(6)}"
        try:
            # what a crash of the host leaves unwritten is not as long as the outbox says, and comes again
            trees.write_file(temporary, content, dir_fd=box, mode=_MODE, sync=False)
            os.utime(temporary, ns=(wanted.st_mtime_ns, wanted.st_mtime_ns), dir_fd=box, follow_symlinks=False)
            os.rename(temporary, name, src_dir_fd=box, dst_dir_fd=box)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=box)
            raise
