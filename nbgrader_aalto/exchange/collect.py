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
from nbgrader_aalto.converters import turn
from nbgrader_aalto.exchange.base import AaltoExchange
from nbgrader_aalto.exchange.boxes import Delivery, Outbox, deliver, receipt_name
from nbgrader_aalto.exchange.people import RegistryError
from nbgrader_aalto.exchange.receipts import CONFIRMED, Receipt
from nbgrader_aalto.exchange.stamps import SubmissionName, format_time, from_ns, parse_time
from nbgrader_aalto.exchange.usage import readable, usage
from nbgrader_aalto.exchange.vault import FILES, Incoming, Record, Refused, choose

NOT_COPIED = ("timestamp.txt", "submission_secret.txt")
"""At the top of a submission: the first is written anew with the file server's time."""


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
        assignment = self.coursedir.assignment_id
        with self.locked(f"collecting '{assignment}'"):
            _, refused = self.take_in(lambda claim: claim.assignment == assignment)
            if refused:
                self.log.warning("%d entries of %s were not taken in, see above", len(refused), self.inbound_path)
            by_student: dict[str, list[Record]] = defaultdict(list)
            receipts = Outbox(self.open_vault().path).path
            for record in self.open_vault().records(assignment):
                if not (receipts / record.student / receipt_name(record.name)).exists():
                    self._confirm(record)  # whoever took it in was killed before
                if fnmatch.fnmatchcase(record.student, self.coursedir.student_id or "*"):
                    by_student[record.student].append(record)
            self.warn_of_sizes()
            if not by_student:
                self.log.warning(
                    "No submissions of '%s' for course '%s' to collect", assignment, self.coursedir.course_id
                )
                return
            self.log.info(
                "Processing %d submissions of '%s' for course '%s'",
                len(by_student),
                assignment,
                self.coursedir.course_id,
            )
            for student in sorted(by_student):
                trees.recover(self._path(student, assignment))
                self._collect(student, by_student[student])

    def take_in(
        self, wanted: Callable[[SubmissionName], bool] = lambda claim: True
    ) -> tuple[list[Record], list[Refused]]:
        """Copy what is new in inbound into the vault and give receipts. With the lock of the course held."""
        vault, people = self.open_vault(), self.people()
        incoming = Incoming(people, self.tree_limits(), self.identity == "unix", get_osusername())
        try:
            vault.clean()
            new, refused = vault.take_in(self.places.inbound, incoming, wanted, self._taken)
            self.deliver()
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

    def warn_of_sizes(self) -> None:
        """Say who has more in inbound than ten submissions of the largest size."""
        for one in usage(self.places.inbound, self.people()):
            if one.bytes > 10 * self.tree_limits().tree_bytes or one.files > 10 * self.max_entries:
                self.log.warning(
                    "%s has %s in %d files in %s; only a quota of the file system can end that",
                    *(one.owner, readable(one.bytes), one.files, self.places.inbound),
                )

    def deliver(self) -> Delivery:
        """Bring receipts and feedback into the students' boxes."""
        outbox = Outbox(self.open_vault().path)
        return deliver(outbox, self.places.feedback, self.people(), by_owner=self.identity == "unix")

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
        if record.is_named_in_time and not (due_ns is not None and record.claimed_ns <= due_ns < record.time_ns):
            return record.claimed
        return format_time(record.time_ns, self.timezone, self.timestamp_format)

    def _collect(self, student: str, records: list[Record]) -> None:
        due_ns = None if self.duedate is None else parse_time(self.duedate.isoformat())
        record = choose(records, due_ns if self.before_duedate else None)
        label, name = self.label(record, due_ns), f"{student} {record.assignment}"
        path = self._path(student, record.assignment)
        if path.is_dir():
            existing = self._existing_ns(path)
            new = parse_time(label)
            newer = self.update and (existing is None or new > existing)
            other = self.before_duedate and existing != new
            if not newer and not other:
                words = (
                    "No newer submission to collect"
                    if self.update
                    else ("Submission already exists, use --update to update")
                )
                self.log.info("%s: %s", words, name)
                return
            self.log.info("Updating submission: %s", name)
        else:
            self.log.info("Collecting submission: %s", name)
        if due_ns is not None and record.time_ns > due_ns:
            self.log.warning("Late: %s, last change %s UTC", name, from_ns(record.time_ns))
        course = self.coursedir
        try:
            with turn(  # not while somebody is autograding what would be replaced
                *(Path(course.root), course.autograded_directory, student, record.assignment),
                purpose=f"collecting {name}",
                wait_seconds=self.lock_seconds,
                log=self.log.warning,
            ):
                self._place(record, label, path)
        except (lock.Busy, lock.LockLost, OSError, trees.Unfit) as error:
            self.log.error("Not collected: %s: %s. It is safe in %s", name, error, record.directory)

    def _path(self, student: str, assignment: str) -> Path:
        return Path(self.coursedir.format_path(self.coursedir.submitted_directory, student, assignment))

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
