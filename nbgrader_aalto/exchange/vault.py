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
    """A submission in the vault. Times are ns since 1970; `directory` is not part of the file.

    `again`: the same entry of inbound is here in an earlier state.
    """

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
    again: bool = False
    directory: Path = Path()

    @property
    def is_named_in_time(self) -> bool:
        """Whether the time in its name is that of its last change, but for the moment that finishing it took."""
        return not self.again and 0 <= self.time_ns - self.claimed_ns <= SAME_MOMENT_NS


@dataclasses.dataclass(frozen=True)
class Refused:
    """An entry of inbound that is not taken: its name fit to print, and why. `held`: until its owner is known."""

    name: str
    reason: str
    held: bool = False


@dataclasses.dataclass(frozen=True)
class Incoming:
    """Who takes in what: the registry, the limits for one tree, and whether owners say who a student is.

    `most` and `most_bytes` are for all submissions of a student to an assignment. What a student changes is kept as a
    further submission, and the course pays for it: else a few bytes that change again and again would fill its disk.
    """

    people: People
    limits: trees.TreeLimits
    by_owner: bool = True
    taken_by: str = ""
    most: int = 1000
    most_bytes: int = 1 << 62


class Vault:
    """The vault of one course."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kept: dict[Path, tuple[int, int]] = {}
        """For one round of taking in: how many submissions a student's directory has, and their bytes."""

    def records(self, assignment: str, odd: Callable[[str], None] = lambda words: None) -> list[Record]:
        """All submissions of an assignment, oldest first. `odd` is told of those whose record cannot be read."""
        found: list[Record] = []
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for student in os.scandir(self.path / assignment):
                if not student.name.startswith(".") and student.is_dir(follow_symlinks=False):
                    found.extend(self._of_student(assignment, student.name, odd))
        return sorted(found, key=lambda record: (record.time_ns, record.name))

    def assignments(self) -> list[str]:
        """Those with a submission."""
        try:
            return sorted(entry.name for entry in os.scandir(self.path) if not entry.name.startswith("."))
        except FileNotFoundError:
            return []

    def _of_student(self, assignment: str, student: str, odd: Callable[[str], None]) -> Iterator[Record]:
        for entry in os.scandir(self.path / assignment / student):
            if not entry.name.startswith("."):
                try:
                    yield read_record(Path(entry.path))
                except (FileNotFoundError, NotADirectoryError):
                    continue
                except (OSError, ValueError, TypeError, KeyError) as error:
                    odd(f"{entry.path}/{RECORD} cannot be read ({error}); this submission counts for nothing")

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

        self._kept.clear()
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
            if incoming.by_owner:
                _refuse_foreign(os.fstat(source), os.fstat(inbound))
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
                self._hold_if_too_much(place.parent, before, incoming)
                record = self._copy(source, before, place, claim, student, owner, on_behalf_by, incoming)
                if record is not None:
                    return record
        raise trees.Unfit("is being changed again and again while it is copied; it is looked at again next time")

    def _hold_if_too_much(self, kept: Path, new: trees.Survey, incoming: Incoming) -> None:
        """Raises `_Held`."""
        if kept not in self._kept:
            records = self._of_student(kept.parent.name, kept.name, lambda words: None) if kept.is_dir() else ()
            sizes = [sum(file.size for file in record.files) for record in records]
            self._kept[kept] = len(sizes), sum(sizes)
        number, size = self._kept[kept]
        if number >= incoming.most or size + new.bytes > incoming.most_bytes:
            raise _Held(
                f"would be one of more than {incoming.most} submissions, or with the others more than "
                f"{incoming.most_bytes} bytes: it stays where it is, and the vault keeps the {number} that it has. "
                "See c.AaltoExchange.max_kept and max_kept_size"
            )

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
            for path in (*copied.directories, *(file.path for file in copied.files)):
                if problem := file_problem(path):
                    raise trees.Unfit(f"{path!r} {problem}")
            after = trees.survey(source, incoming.limits)
            if after != before:
                return None
            notes = [f"submitted by {on_behalf_by} on behalf of {student}"] if on_behalf_by else []
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
                again=any(name.endswith(f"-{_short(claim.name)}") for name in os.listdir(place.parent)),
                directory=place,
            )
            if not record.is_named_in_time:
                notes.append(
                    f"named {claim.timestamp}, but last changed {from_ns(record.time_ns)} UTC, which is its time"
                )
            record = dataclasses.replace(record, notes=tuple(notes))
            trees.write_file(partial / RECORD, _to_json(record))
            with trees.opened(partial) as descriptor:
                os.fsync(descriptor)
            os.rename(partial, place)
            number, size = self._kept.get(place.parent, (0, 0))
            self._kept[place.parent] = number + 1, size + before.bytes
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


def _refuse_foreign(status: os.stat_result, inbound: os.stat_result) -> None:
    """A directory that its owner made in inbound has inbound's group and file system. Raises `trees.Unfit`.

    One that others may write to can be moved here by them: rename(2) asks for no more. It is not its owner's doing.
    """
    if status.st_dev != inbound.st_dev:
        raise trees.Unfit("is another file system")
    if status.st_gid != inbound.st_gid and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise trees.Unfit(
            f"was made elsewhere (group {status.st_gid}) where others than its owner may write, so that they could "
            "have put it here; its owner submits it again"
        )


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
    return f"{from_ns(time_ns).strftime('%Y%m%dT%H%M%S.%f')}Z{time_ns % 1000:03d}-{_short(name)}"


def _short(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:12]


def _to_json(record: Record) -> bytes:
    fields = dataclasses.asdict(record)
    del fields["directory"]
    return json.dumps(fields, indent=1).encode() + b"\n"


def read_record(directory: Path) -> Record:
    """The record of one submission in the vault. Raises `OSError`, or when somebody edited it badly `ValueError`,
    `TypeError` or `KeyError`."""
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
