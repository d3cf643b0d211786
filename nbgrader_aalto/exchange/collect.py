"""Collecting: take in what is new (`vault`), choose for each student, put into submitted/ in one step."""

import fnmatch
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nbgrader.api import Gradebook, MissingEntry
from nbgrader.exchange import default
from nbgrader.utils import check_mode, get_osusername

from nbgrader_aalto import lock, trees
from nbgrader_aalto.exchange.base import AaltoExchange
from nbgrader_aalto.exchange.boxes import Delivery, Outbox, deliver, receipt_name
from nbgrader_aalto.exchange.names import MAX_TIMESTAMP, assignment_problem
from nbgrader_aalto.exchange.people import People, RegistryError
from nbgrader_aalto.exchange.receipts import CONFIRMED, Receipt
from nbgrader_aalto.exchange.stamps import SubmissionName, format_time, from_ns, parse_time
from nbgrader_aalto.exchange.usage import readable, usage
from nbgrader_aalto.exchange.vault import FILES, Incoming, Record, Refused, choose
from nbgrader_aalto.inspection import printable
from nbgrader_aalto.turns import turn

NOT_COPIED = ("timestamp.txt", "submission_secret.txt")
"""At the top of a submission: the first is written anew with the file server's time."""


_EXISTS = "Submission already exists, use --update to update"


class ExchangeCollect(AaltoExchange, default.ExchangeCollect):
    """nbgrader's, by the owners and times that the kernel reports. What is refused is listed; the rest is collected."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._told: set[Refused] = set()

    def init_src(self) -> None:
        """Raises `ExchangeError` when there is no course or its inbound cannot be listed."""
        if self.coursedir.course_id == "":
            self.fail("No course id specified. Re-run with --course flag.")
        self.course_path = str(self.places.course)
        self.inbound_path = str(self.places.inbound)
        if not os.path.isdir(self.inbound_path):
            self.fail(f"Course not found: {self.inbound_path}")
        if not check_mode(self.inbound_path, read=True, execute=True):
            self.fail(
                f"You don't have read permissions for the directory: {self.inbound_path}. Instructors are members of "
                "its group"
            )
        self.prepare_course()
        with Gradebook(self.coursedir.db_url, self.coursedir.course_id) as gradebook:
            try:
                self.duedate = gradebook.find_assignment(self.coursedir.assignment_id).duedate
            except MissingEntry:
                self.duedate = None

    def copy_files(self) -> None:
        """Raises `ExchangeError` if a colleague is at it, the registry fails or there is no room for the copies."""
        course, assignment = self.coursedir, self.coursedir.assignment_id
        people = self.people()
        with self.locked(f"collecting '{assignment}'"):
            _, refused = self.take_in(people, lambda claim: claim.assignment == assignment)
            if refused:
                self.log.warning("%d entries of %s were not taken in, see above", len(refused), self.inbound_path)
            by_student = self._by_student(assignment)
            self.warn_of_sizes(people)
            if not by_student:
                self.log.warning("No submissions of '%s' for course '%s' to collect", assignment, course.course_id)
                return
            words = "Processing %d submissions of '%s' for course '%s'"
            self.log.info(words, len(by_student), assignment, course.course_id)
            for student in sorted(by_student):
                path = Path(course.format_path(course.submitted_directory, student, assignment))
                self._collect(self._chosen(by_student[student]), path)

    def _by_student(self, assignment: str) -> dict[str, list[Record]]:
        """All that the vault has of the students who are asked for; and everybody's receipts are there."""
        found: dict[str, list[Record]] = defaultdict(list)
        receipts = Outbox(self.open_vault().path).path
        for record in self.open_vault().records(assignment, self.log.error):
            if not (receipts / record.student / receipt_name(record.name)).exists():
                self._confirm(record)  # whoever took it in was killed before
            if fnmatch.fnmatchcase(record.student, self.coursedir.student_id or "*"):
                found[record.student].append(record)
        return found

    def take_in(
        self, people: People, wanted: Callable[[SubmissionName], bool] = lambda claim: True
    ) -> tuple[list[Record], list[Refused]]:
        """Copy what is new in inbound into the vault and give receipts. With the lock of the course held."""
        vault = self.open_vault()
        by_owner = self.identity == "unix"
        name = get_osusername() if by_owner else os.environ.get("JUPYTERHUB_USER", get_osusername())
        incoming = Incoming(
            *(people, self.tree_limits(), by_owner, name),
            most=self.max_kept,
            most_bytes=1000 * (self.max_kept_size or 50 * self.coursedir.max_dir_size),
        )
        try:
            vault.clean()
            new, refused = vault.take_in(self.places.inbound, incoming, wanted, self._taken)
            self.deliver(people)
        except RegistryError as error:
            self.fail(str(error))
            raise
        except OSError as error:
            self.fail(
                f"{error.filename or self.places.inbound}: {error.strerror}. What was taken in before this is in "
                f"{vault.path}; mend this and run it again"
            )
            raise
        return new, refused

    def is_known(self, claim: SubmissionName) -> bool:
        """Whether there is, or was, such an assignment. What is for none is reported: it might fill the vault."""
        course, assignment = self.coursedir, claim.assignment
        if assignment_problem(assignment) is None and any(
            os.path.lexists(path)
            for path in (
                self.places.outbound / assignment,
                self.open_vault().path / assignment,
                course.format_path(course.source_directory, ".", assignment),
                course.format_path(course.release_directory, ".", assignment),
            )
        ):
            return True
        reason = "is for an assignment that this course does not have; `nbgrader collect` takes it in by name"
        self._taken(Refused(printable(claim.name), reason, held=True))
        return False

    def warn_of_sizes(self, people: People) -> None:
        """Say who has more in inbound than ten submissions of the largest size."""
        try:
            found = usage(self.places.inbound, people)
        except RegistryError as error:
            self.fail(str(error))
            raise
        for one in found:
            if one.bytes > 10 * self.tree_limits().tree_bytes or one.files > 10 * self.max_entries:
                self.log.warning(
                    "%s has %s in %d files in %s; only a quota of the file system can end that",
                    *(one.owner, readable(one.bytes), one.files, self.places.inbound),
                )

    def deliver(self, people: People) -> Delivery:
        """Bring receipts and feedback into the students' boxes."""
        outbox = Outbox(self.open_vault().path)
        return deliver(outbox, self.places.feedback, people, by_owner=self.identity == "unix")

    def _taken(self, one: Record | Refused) -> None:
        if isinstance(one, Refused):
            if one in self._told:
                return  # by an earlier pass of the same watcher
            self._told.add(one)
            self.log.error("%s: %s %s", "Held" if one.held else "Refused", one.name, one.reason)
            return
        for note in one.notes:
            if self.check_owner or not one.on_behalf_by:
                self.log.warning("%s, '%s': %s", one.student, one.assignment, note)
        self._confirm(one)

    def _confirm(self, one: Record) -> None:
        """Have a receipt in the student's boxes."""
        receipt = Receipt(
            CONFIRMED,
            self.coursedir.course_id,
            one.assignment,
            one.student,
            one.name,
            self.label(one, None),
            one.digest,
            one.files,
            one.taken_by,
            "; ".join(one.notes),
        )
        Outbox(self.open_vault().path).put(one.student, receipt_name(one.name), receipt.to_json())

    def label(self, record: Record, due_ns: int | None) -> str:
        """The timestamp of a submission: the one in its name if that is the same moment, else the file server's."""
        fits = len(record.claimed) <= MAX_TIMESTAMP  # it becomes a part of names
        if (
            fits
            and record.is_named_in_time
            and not (due_ns is not None and record.claimed_ns <= due_ns < record.time_ns)
        ):
            return record.claimed
        return format_time(record.time_ns, self.timezone, self.timestamp_format)

    @property
    def _due_ns(self) -> int | None:
        return None if self.duedate is None else parse_time(self.duedate.isoformat())

    def _chosen(self, records: list[Record]) -> Record:
        return choose(records, self._due_ns if self.before_duedate else None)

    def _collect(self, record: Record, path: Path) -> None:
        """Put a chosen submission at `path`, unless what is there is to stay. Says what it does, and why not."""
        label, name = self.label(record, self._due_ns), f"{record.student} {record.assignment}"
        try:
            trees.recover(path)
        except OSError as error:
            self.log.error("Not collected: %s: %s. It is safe in %s", name, error, record.directory)
            return
        there = path.is_dir()
        if there and not self._replaces(path, label):
            words = "No newer submission to collect" if self.update else _EXISTS
            self.log.info("%s: %s", words, name)
            return
        self.log.info("%s submission: %s", "Updating" if there else "Collecting", name)
        if self._due_ns is not None and record.time_ns > self._due_ns:
            self.log.warning("Late: %s, last change %s UTC", name, from_ns(record.time_ns))
        course = self.coursedir
        try:
            with turn(  # not while somebody is autograding what would be replaced
                *(Path(course.root), course.autograded_directory, record.student, record.assignment),
                purpose=f"collecting {name}",
                wait_seconds=self.lock_seconds,
                log=self.log.warning,
            ):
                self._place(record, label, path)
        except (lock.Busy, lock.LockLost, OSError, trees.Unfit) as error:
            self.log.error("Not collected: %s: %s. It is safe in %s", name, error, record.directory)

    def _replaces(self, path: Path, label: str) -> bool:
        """As in nbgrader: a newer one with --update, any other one with --before-duedate."""
        existing, new = self._existing_ns(path), parse_time(label)
        newer = self.update and (existing is None or new > existing)
        return newer or (self.before_duedate and existing != new)

    def _existing_ns(self, path: Path) -> int | None:
        try:
            return parse_time((path / "timestamp.txt").read_text(encoding="utf-8").strip())
        except (OSError, ValueError, OverflowError):
            return None

    def _place(self, record: Record, label: str, path: Path) -> None:
        new = trees.beside(path)
        try:
            new.mkdir(parents=True)
            with trees.opened(record.directory / FILES) as source, trees.opened(new) as target:
                chosen = self.selection()
                trees.copy_tree(source, target, chosen, self.tree_limits())
            for name in NOT_COPIED:
                (new / name).unlink(missing_ok=True)
            trees.write_file(new / "timestamp.txt", label.encode())
            for left in trees.put_in_place(new, path):
                self.log.warning("An earlier submission could not be removed whole: %s", left)
        finally:
            if os.path.lexists(new):
                trees.remove(new)
