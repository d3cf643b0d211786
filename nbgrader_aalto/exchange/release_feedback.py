"""Releasing feedback: into the outbox, and from there into the box of the one student whose it is."""

import glob
import os
import re
from pathlib import Path
from typing import NamedTuple

from nbgrader.exchange import default

from nbgrader_aalto import trees
from nbgrader_aalto.earlier import unfinished
from nbgrader_aalto.exchange.base import AaltoExchange
from nbgrader_aalto.exchange.boxes import Outbox, deliver, feedback_name
from nbgrader_aalto.exchange.names import MAX_FILE_NAME, student_problem
from nbgrader_aalto.exchange.people import RegistryError
from nbgrader_aalto.exchange.stamps import fit_for_a_name
from nbgrader_aalto.inspection import printable

NO_TIME = "without a time"
"""The timestamp of feedback for a submission that came without one, such as a zip import."""

_MAX_BYTES = 100_000_000


class _Page(NamedTuple):
    student: str
    notebook: str
    timestamp: str
    content: bytes


class ExchangeReleaseFeedback(AaltoExchange, default.ExchangeReleaseFeedback):
    """For one student or all, any number of times. Students who have no box yet are listed; theirs arrives later."""

    def init_src(self) -> None:
        """As in nbgrader."""
        self.prepare_course()
        super().init_src()

    def init_dest(self) -> None:
        """Raises `ExchangeError` when there is no course."""
        if self.coursedir.course_id == "":
            self.fail("No course id specified. Re-run with --course flag.")
        self.dest_path = str(self.places.feedback)
        if not self.places.feedback.is_dir():
            self.log.warning(
                "%s does not exist, so nobody can have a box; release an assignment first, or `nbgrader-aalto course "
                "create`. The feedback is kept and delivered then",
                self.places.feedback,
            )

    def copy_files(self) -> None:
        """Raises `ExchangeError` if a colleague is at it or the registry fails."""
        with self.locked(f"releasing feedback for '{self.coursedir.assignment_id}'"):
            outbox = Outbox(self.open_vault().path)
            pages = list(self._pages())
            students = {page.student for page in pages}
            try:
                outbox.path.parent.mkdir(mode=0o770, exist_ok=True)
                for page in pages:
                    self.log.info(
                        "Releasing feedback for student '%s' on assignment '%s/%s/%s' (%s)",
                        page.student,
                        self.coursedir.course_id,
                        self.coursedir.assignment_id,
                        page.notebook,
                        page.timestamp,
                    )
                    name = feedback_name(self.coursedir.assignment_id, page.timestamp, page.notebook)
                    outbox.put(page.student, name, page.content)
                done = deliver(
                    outbox,
                    self.places.feedback,
                    self.people(),
                    by_owner=self.identity == "unix",
                    wanted=students.__contains__,
                )
            except RegistryError as error:
                self.fail(str(error))
                raise
            except OSError as error:
                self.fail(f"{error.filename or outbox.path}: {error.strerror}. Run it again when this is mended")
                raise
        for name, why in done.failed:
            self.log.error("The box %s could not be written to: %s", printable(name), why)
        if done.boxless:
            self.log.warning(
                "No box yet: %s. It is made when the student next lists or fetches, and the feedback arrives with the "
                "next collect, release_feedback or `nbgrader-aalto exchange watch`",
                ", ".join(sorted(done.boxless)),
            )
        self.log.info("Feedback reached %d of %d students", len(done.reached), len(students))

    def _pages(self) -> "list[_Page]":
        course = self.coursedir
        excluded = set(course.student_id_exclude.split(",")) if course.student_id_exclude else set()
        structure = course.directory_structure.format(
            nbgrader_step=glob.escape(course.feedback_directory),
            student_id=course.student_id or "*",
            assignment_id=glob.escape(course.assignment_id),
        )
        pattern = os.path.join(glob.escape(course.root), structure)
        expression = course.format_path(
            re.escape(course.feedback_directory), "(?P<student>[^/]+)", re.escape(course.assignment_id), escape=True
        )
        pages: list[_Page] = []
        for directory in sorted(glob.glob(pattern)):
            match = re.fullmatch(expression, directory)
            if match is None or match["student"] in excluded:
                self.log.debug("Skipping '%s'", directory)
                continue
            pages.extend(self._of_student(match["student"], Path(directory)))
        return pages

    def _of_student(self, student: str, directory: Path) -> "list[_Page]":
        try:
            if problem := student_problem(student):
                raise trees.Unfit(problem)
            return _read(student, directory, self.coursedir.assignment_id)
        except (OSError, trees.Unfit) as error:
            self.log.error("No feedback released for '%s': %s", printable(student), error)
            return []


def _read(student: str, directory: Path, assignment: str) -> "list[_Page]":
    """All pages of one student, as they were at one moment. Raises `OSError`, `trees.Unfit`."""
    with trees.opened(directory) as opened:
        before = _state(opened)
        if unfinished(directory, before):
            raise trees.Unfit("it is being generated now, or that was killed; generate it first")
        timestamp = NO_TIME
        if "timestamp.txt" in before:  # it may be a student's own text, and becomes a part of a name
            text = trees.read_file("timestamp.txt", opened, 1000).decode("utf-8", "replace")
            timestamp = fit_for_a_name(text.strip()) or NO_TIME
        pages = [
            _Page(student, name.removesuffix(".html"), timestamp, trees.read_file(name, opened, _MAX_BYTES))
            for name in sorted(before)
            if name.endswith(".html") and not name.startswith(".")
        ]
        if os.fstat(opened).st_ino != os.stat(directory).st_ino or _state(opened) != before:
            raise trees.Unfit("it has just been generated anew; release it again")
    for page in pages:
        if len(os.fsencode(feedback_name(assignment, timestamp, page.notebook))) > MAX_FILE_NAME:
            raise trees.Unfit(f"{page.notebook!r} and {timestamp!r} are too long for the name of a file")
    return pages


def _state(directory: int) -> dict[str, tuple[int, int, int]]:
    found = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(directory)}
    return {name: (status.st_ino, status.st_mtime_ns, status.st_size) for name, status in found.items()}
