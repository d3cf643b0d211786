"""The vault: every submission that was ever taken in, in the course's own directory, where no student can come.

    <vault>/<assignment>/<student>/<time>-<hash>/files/...           what was handed in
                                                /submission.json     a `Record`

Theory of operation. An entry of inbound belongs to a student, who can change it at any moment. It is taken in by
descriptors: surveyed, copied, surveyed again. Its time is the newest ctime of the survey, by the file server's
clock, which nobody can set back; if the second survey differs, the copy is dropped and made anew. A copy is
complete before it has its name. What changes later has a newer ctime, so it is another submission, and the
vault keeps both. Taking in needs the lock of the course (`lock`); reading does not.

What a file system cannot promise: a student who changes a submission before anybody took it in destroys the first
one; and a write through mmap(2) moves the ctime only when the kernel writes the page back, up to half a minute
later, so that such a change may be taken in as part of the earlier submission.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from nbgrader_aalto import trees
from nbgrader_aalto.exchange.names import assignment_problem, file_problem, student_problem
from nbgrader_aalto.exchange.people import People
from nbgrader_aalto.exchange.stamps import NS, OddName, SubmissionName, from_ns, parse_name
from nbgrader_aalto.inspection import printable

FILES, RECORD = "files", "submission.json"
SAME_MOMENT_NS = 1 * NS
"""How long after the time in its name a submission may have been finished for the name to stand for that time."""

_TRIES = 3
_PARTIAL = ".partial-"


@dataclasses.dataclass(frozen=True)
class Record:
    """A submission in the vault. Times are ns since 1970; `directory` is not part of the file."""

    name: str
    assignment: str
    student: str
    owner: int
    time_ns: int
    claimed_ns: int
    claimed: str
    digest: str
    files: tuple[trees.FileEntry, ...]
    taken_by: str
    on_behalf_by: str = ""
    notes: tuple[str, ...] = ()
    directory: Path = Path()

    @property
    def is_named_in_time(self) -> bool:
        """Whether the time in its name is that of its last change, but for the moment that finishing it took."""
        return 0 <= self.time_ns - self.claimed_ns <= SAME_MOMENT_NS


@dataclasses.dataclass(frozen=True)
class Refused:
    """An entry of inbound that is not taken: its name fit to print, and why. `held`: until its owner is known."""

    name: str
    reason: str
    held: bool = False


@dataclasses.dataclass(frozen=True)
class Incoming:
    """Who takes in what: the registry, the limits for one tree, and whether owners say who a student is."""

    people: People
    limits: trees.TreeLimits
    by_owner: bool = True
    taken_by: str = ""


class Vault:
    """The vault of one course."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def records(self, assignment: str) -> list[Record]:
        """All submissions of an assignment, oldest first."""
        found: list[Record] = []
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for student in os.scandir(self.path / assignment):
                if not student.name.startswith(".") and student.is_dir(follow_symlinks=False):
                    found.extend(self._of_student(assignment, student.name))
        return sorted(found, key=lambda record: (record.time_ns, record.name))

    def assignments(self) -> list[str]:
        """Those with a submission."""
        try:
            return sorted(entry.name for entry in os.scandir(self.path) if not entry.name.startswith("."))
        except FileNotFoundError:
            return []

    def _of_student(self, assignment: str, student: str) -> Iterator[Record]:
        for entry in os.scandir(self.path / assignment / student):
            if not entry.name.startswith("."):
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    yield read_record(Path(entry.path))

    def take_in(
        self,
        inbound: Path,
        incoming: Incoming,
        wanted: Callable[[SubmissionName], bool] = lambda name: True,
        done: Callable[[Record | Refused], None] = lambda one: None,
    ) -> tuple[list[Record], list[Refused]]:
        """Take in every entry of `inbound` that is new; returns what is new and what was refused.

        Nothing that lies there stops it from going on with the next entry. `done` is told of each as it happens.
        Raises `OSError` if `inbound` or the vault itself cannot be used, and `people.RegistryError`.
        """
        new: list[Record] = []
        refused: list[Refused] = []

        def refuse(one: Refused) -> None:
            refused.append(one)
            done(one)

        shared = self.path.parent.stat().st_mode & stat.S_ISGID
        self.path.mkdir(mode=0o770 if shared else 0o700, exist_ok=True)
        with trees.opened(inbound) as directory:
            for name in sorted(os.listdir(directory)):
                if name.startswith("."):
                    continue  # being made, or the rest of a submit that was killed
                try:
                    claim = parse_name(os.fsencode(name).decode("utf-8"))
                    if not wanted(claim):
                        continue
                    record = self._take_one(directory, claim, incoming)
                except OddName as error:
                    refuse(Refused(printable(name), str(error)))
                except UnicodeDecodeError:
                    refuse(Refused(printable(name), "has a name that is not UTF-8"))
                except _Held as error:
                    refuse(Refused(printable(name), str(error), held=True))
                except trees.Unfit as error:
                    refuse(Refused(printable(name), printable(str(error))))
                except FileNotFoundError:
                    continue  # its owner removed it
                except OSError as error:
                    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                        raise
                    refuse(Refused(printable(name), _why(error, directory, name)))
                else:
                    if record is not None:
                        new.append(record)
                        done(record)
        return new, refused

    def _take_one(self, inbound: int, claim: SubmissionName, incoming: Incoming) -> Record | None:
        if problem := assignment_problem(claim.assignment):
            raise trees.Unfit(problem)
        with trees.opened(claim.name, dir_fd=inbound) as source:
            owner = os.fstat(source).st_uid
            student, on_behalf_by = _whose(claim, owner, incoming)
            for _ in range(_TRIES):
                before = trees.survey(source, incoming.limits)
                if before.files == 0:
                    return None  # what is left where an instructor removed a submission
                strangers = before.owners - {owner}
                if strangers and incoming.by_owner:
                    raise trees.Unfit(f"holds files of somebody else (uid {', '.join(map(str, sorted(strangers)))})")
                place = self.path / claim.assignment / student / _place_name(claim.name, before.newest_ns)
                if os.path.lexists(place):
                    return None
                record = self._copy(source, before, place, claim, student, owner, on_behalf_by, incoming)
                if record is not None:
                    return record
        raise trees.Unfit("is being changed again and again while it is copied; it is looked at again next time")

    def _copy(
        self,
        source: int,
        before: trees.Survey,
        place: Path,
        claim: SubmissionName,
        student: str,
        owner: int,
        on_behalf_by: str,
        incoming: Incoming,
    ) -> Record | None:
        """The new record, or None if the source changed meanwhile."""
        for directory in (place.parent.parent, place.parent):
            directory.mkdir(exist_ok=True)
        partial = place.with_name(_PARTIAL + secrets.token_hex(6))
        try:
            os.makedirs(partial / FILES)
            with trees.opened(partial / FILES) as target:
                copied = trees.copy_tree(source, target, trees.EVERYTHING, incoming.limits)
            for file in copied.files:
                if problem := file_problem(file.path):
                    raise trees.Unfit(f"{file.path!r} {problem}")
            after = trees.survey(source, incoming.limits)
            if after != before:
                return None
            notes = [f"submitted by {on_behalf_by} on behalf of {student}"] if on_behalf_by else []
            if not 0 <= before.newest_ns - claim.time_ns <= SAME_MOMENT_NS:
                notes.append(
                    f"named {claim.timestamp}, but last changed {from_ns(before.newest_ns)} UTC, which is its time"
                )
            record = Record(
                name=claim.name,
                assignment=claim.assignment,
                student=student,
                owner=owner,
                time_ns=before.newest_ns,
                claimed_ns=claim.time_ns,
                claimed=claim.timestamp,
                digest=trees.digest_of(copied.files),
                files=copied.files,
                taken_by=incoming.taken_by,
                on_behalf_by=on_behalf_by,
                notes=tuple(notes),
                directory=place,
            )
            trees.write_file(partial / RECORD, _to_json(record))
            with trees.opened(partial) as descriptor:
                os.fsync(descriptor)
            os.rename(partial, place)
            return record
        finally:
            if os.path.lexists(partial):
                trees.remove(partial)

    def clean(self) -> None:
        """Remove what a killed process left half copied. With the lock of the course held."""
        for partial in self.path.glob(f"*/*/{_PARTIAL}*"):
            trees.remove(partial)


class _Held(Exception):
    """Nobody is lost, but nobody can be named."""


def _whose(claim: SubmissionName, owner: int, incoming: Incoming) -> tuple[str, str]:
    """(student, the instructor who submitted for the student or ""). Raises `_Held`, `trees.Unfit`."""
    if not incoming.by_owner:
        if problem := student_problem(claim.user):
            raise trees.Unfit(problem)
        return claim.user, ""
    username = incoming.people.username(owner)
    if username is None:
        raise _Held(
            f"belongs to uid {owner}, which the registry of users does not know; it is kept where it is and taken in "
            "when the registry does (c.AaltoExchange.registry)"
        )
    if username == claim.user:
        return username, ""
    if not incoming.people.is_instructor(owner):
        raise trees.Unfit(f"claims to be {printable(claim.user)}'s, but belongs to {username}; cheating attempt?")
    if problem := student_problem(claim.user):
        raise trees.Unfit(problem)
    return claim.user, username


def _why(error: OSError, directory: int, name: str) -> str:
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        with contextlib.suppress(OSError):
            mode = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
            if not stat.S_ISDIR(mode):
                return "is a symbolic link" if stat.S_ISLNK(mode) else "is not a directory"
        return "holds something that was swapped while it was read"
    return f"cannot be read: {error.strerror}"


def _place_name(name: str, time_ns: int) -> str:
    """Sortable, and the same for the same state of the same entry of inbound."""
    short = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return f"{from_ns(time_ns).strftime('%Y%m%dT%H%M%S.%f')}Z{time_ns % 1000:03d}-{short}"


def _to_json(record: Record) -> bytes:
    fields = dataclasses.asdict(record)
    del fields["directory"]
    return json.dumps(fields, indent=1).encode() + b"\n"


def read_record(directory: Path) -> Record:
    """The record of one submission in the vault. Raises `OSError`, or `ValueError` when somebody edited it badly."""
    fields = json.loads((directory / RECORD).read_text(encoding="utf-8"))
    fields["files"] = tuple(trees.FileEntry(**file) for file in fields["files"])
    fields["notes"] = tuple(fields["notes"])
    return Record(directory=directory, **fields)


def choose(records: list[Record], due_ns: int | None) -> Record:
    """nbgrader's choice among one student's submissions: the last one, or with a due date the last one before it.

    If all came after the due date, the last one.
    """
    in_time = [record for record in records if due_ns is None or record.time_ns <= due_ns]
    return max(in_time or records, key=lambda record: record.time_ns)
