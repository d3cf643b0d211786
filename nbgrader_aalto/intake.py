"""Intake: has each submission inspected before anything else of ``nbgrader autograde`` reads it.

Stock nbgrader copies a submission with calls that follow links, opens a FIFO and waits, and lets one
student's metadata end the run for everybody. `IntakeExporter` puts `inspection` before nbgrader's own first
look, by configuration only::

    c.Autograde.exporter_class = "nbgrader_aalto.intake.IntakeExporter"

It also sees to it that what runs afterwards is the sandbox. What it refuses to know: how a sandbox works, how an
earlier result is kept, the exchange, scores.
"""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from nbconvert.exporters import NotebookExporter
from nbgrader.api import Gradebook, MissingEntry
from nbgrader.converters import Autograde
from nbgrader.converters.base import NbGraderException
from nbgrader.nbgraderformat.common import SchemaMismatchError
from traitlets import Bool, Integer

from nbgrader_aalto.configure import ConfigurationError, isolated
from nbgrader_aalto.converters import CarefulExporter
from nbgrader_aalto.duplicates import forget_duplicates
from nbgrader_aalto.inspection import IntakeLimits, Refusal, inspect_submission, printable
from nbgrader_aalto.window import Window


class IntakeExporter(CarefulExporter, NotebookExporter):
    """A `NotebookExporter` that has each submission inspected before nbgrader's Autograde touches it.

    Theory of operation. It works in turns (see `converters`). When a student's turn has begun, `admits` inspects, and
    answers False for a refused submission, so that stock leaves what it autograded earlier where it is. At the end
    an exception says who was refused, and why. For others than an Autograde it is a NotebookExporter.
    """

    max_notebook_bytes = Integer(
        50_000_000,
        help="Largest notebook, in bytes. Intake and nbgrader took 380 MB of memory for one of 50 MB.",
    ).tag(config=True)
    max_notebook_values = Integer(
        250_000,
        help="Most JSON values in a notebook. Each may cost 1.3 kB of memory, whatever it takes in the file.",
    ).tag(config=True)
    max_notebook_depth = Integer(
        100,
        help="Deepest nesting of JSON in a notebook. nbformat recurses; Python's stack has 1,000 calls.",
    ).tag(config=True)
    max_file_bytes = Integer(
        None, allow_none=True, help="Largest other file, in bytes. Default: CourseDirectory.max_file_size."
    ).tag(config=True)
    max_tree_bytes = Integer(
        None, allow_none=True, help="Most bytes in a submission. Default: CourseDirectory.max_dir_size."
    ).tag(config=True)
    max_entries = Integer(
        10_000, help="Most files and directories in a submission, those that nbgrader ignores included."
    ).tag(config=True)
    max_tree_depth = Integer(32, help="Most directories inside one another in a submission.").tag(config=True)
    allow_hard_links = Bool(
        False,
        help="""Accept files with several names. A collected submission has none; a student's hard link may
        be another person's file. For courses whose backups or snapshots are made of hard links.""",
    ).tag(config=True)

    def __init__(self, config: Any = None, **kwargs: Any) -> None:
        self._refused: dict[tuple[str, str], list[Refusal]] = {}
        self._known: dict[str, frozenset[str]] = {}
        self._window: Window | None = None
        super().__init__(config=config, **kwargs)

    @property
    def converter(self) -> Any:
        """The Autograde; None for others."""
        return self.parent if isinstance(self.parent, Autograde) else None

    def check_start(self) -> None:
        """Raises `NbGraderException` if student code would run outside of the sandbox."""
        _refuse_unless_isolated(self.converter)
        self._set_aside_unmatched(self.converter)

    def admits(self, assignment_id: str, student_id: str) -> bool:
        """Inspect the submission, and have those of the next students executed ahead."""
        if self._window is not None:
            self._window.turn(assignment_id, student_id)
        refusals = self.refusals(assignment_id, student_id, self.converter.notebooks)
        if refusals:
            self._refuse(assignment_id, student_id, refusals)
        return not refusals

    def wrappers(self) -> dict[str, Callable[..., Any]]:
        """Metadata of a wrong schema must not end the run for everybody; the run has a window."""
        stock = self.converter.convert_single_notebook

        def convert_single_notebook(filename: str) -> None:
            try:
                stock(filename)
            except SchemaMismatchError as error:  # stock would stop here, and grade nobody else
                raise NbGraderException(f"{printable(filename)}: nbgrader metadata: {error}") from error

        wrappers = super().wrappers()
        in_turns = wrappers["convert_notebooks"]

        def convert_notebooks() -> None:
            self._window = Window(self)
            try:
                in_turns()
            finally:
                self._window.close()
                self._window = None

        wrappers["convert_single_notebook"] = convert_single_notebook
        wrappers["convert_notebooks"] = convert_notebooks
        return wrappers

    def summary(self) -> list[str]:
        """The refused submissions, too."""
        if not self._refused:
            return super().summary()
        lines = [
            f"  {printable(student)} ({printable(assignment)}): {'; '.join(map(str, refusals))}"
            for (assignment, student), refusals in self._refused.items()
        ]
        message = f"{len(lines)} submission(s) refused, not graded; earlier results of theirs are kept:\n"
        return [message + "\n".join(lines), *super().summary()]

    def from_notebook_node(self, nb: Any, resources: Any = None, **kwargs: Any) -> tuple[Any, Any]:
        """As in stock, except that a copied test cell does not end the run (see `forget_duplicates`)."""
        if isinstance(self.parent, Autograde):
            for grade_id in forget_duplicates(nb):
                student = (resources or {}).get("nbgrader", {}).get("student")
                self.log.warning("Student %s has cell '%s' several times; the last is graded", student, grade_id)
        exported: tuple[Any, Any] = super().from_notebook_node(nb, resources, **kwargs)
        return exported

    def limits(self) -> IntakeLimits:
        """The limits in force for the course. nbgrader's kilobytes have 1,000 bytes."""
        course = self.parent.coursedir
        files, tree = self.max_file_bytes, self.max_tree_bytes
        return IntakeLimits(
            max_notebook_bytes=self.max_notebook_bytes,
            max_notebook_values=self.max_notebook_values,
            max_notebook_depth=self.max_notebook_depth,
            max_file_bytes=1000 * course.max_file_size if files is None else files,
            max_tree_bytes=1000 * course.max_dir_size if tree is None else tree,
            max_entries=self.max_entries,
            max_tree_depth=self.max_tree_depth,
            allow_hard_links=self.allow_hard_links,
        )

    def _set_aside_unmatched(self, converter: Any) -> None:
        """Refuse at once the directories at whose name stock's loop would raise (".*" matches no newline)."""
        pattern = converter._format_source("(?P<assignment_id>.*)", "(?P<student_id>.*)", escape=True)
        for directory in [name for name in converter.assignments if re.match(pattern, name) is None]:
            del converter.assignments[directory]
            self._refuse(
                converter.coursedir.assignment_id,
                printable(os.path.relpath(directory, converter.coursedir.root)),
                [Refusal("its directory", "has a control character in its name", "Rename it")],
            )

    def refusals(self, assignment_id: str, student_id: str, notebooks: Sequence[str]) -> list[Refusal]:
        """Why this submission, of which nbgrader has found these notebooks (paths), must not be read."""
        converter, course = self.converter, self.converter.coursedir
        source = os.path.normpath(converter._format_source(assignment_id, student_id))
        if any(os.path.dirname(path) != source for path in map(os.path.normpath, notebooks)):
            # glob took a student called "a[b]" for a pattern and found the notebooks of the student "ab"
            return [Refusal("its directory", "has a name that is a wildcard for another student's", "Rename it")]
        base, inside = self.place(assignment_id, student_id)
        refusals = inspect_submission(base, inside, (), self.limits(), course.ignore)
        if refusals or self.unchanged(assignment_id, student_id, notebooks):
            return refusals
        names = self.known_notebooks(assignment_id) & {os.path.basename(path) for path in notebooks}
        return inspect_submission(base, inside, names, self.limits(), course.ignore)

    def place(self, assignment_id: str, student_id: str) -> tuple[Path, PurePosixPath]:
        """Of a submission; see `split_source`."""
        course = self.converter.coursedir
        return split_source(course, course.submitted_directory, student_id, assignment_id)

    def known_notebooks(self, assignment_id: str) -> frozenset[str]:
        """The files that nbgrader will parse. It skips other notebooks, and reports an unknown assignment."""
        if assignment_id not in self._known:
            course = self.converter.coursedir
            with Gradebook(course.db_url, course.course_id) as gradebook:
                try:
                    notebooks = gradebook.find_assignment(assignment_id).notebooks
                except MissingEntry:
                    notebooks = []
                self._known[assignment_id] = frozenset(f"{notebook.name}.ipynb" for notebook in notebooks)
        return self._known[assignment_id]

    def _refuse(self, assignment_id: str, student_id: str, refusals: list[Refusal]) -> None:
        self._refused[assignment_id, student_id] = refusals
        for refusal in refusals:
            self.log.error(
                "Refused: student %s, assignment %s: %s",
                printable(student_id),
                printable(assignment_id),
                refusal,
            )


def _refuse_unless_isolated(converter: Any) -> None:
    """The last word on what will run, whichever configuration file came last. Raises `NbGraderException`."""
    for name in ("sanitize_preprocessors", "autograde_preprocessors"):
        configured = list(getattr(converter, name))
        try:
            if isolated(configured) != configured:
                raise ConfigurationError(
                    f"c.Autograde.{name} holds nbgrader's own Execute, which would run student code outside of "
                    "the sandbox; call nbgrader_aalto.configure(c) after all other settings"
                )
        except ConfigurationError as error:
            converter.log.error("Nothing was autograded: %s", error)
            raise NbGraderException(f"Nothing was autograded: {error}") from error


def split_source(course: Any, step: str, student_id: str, assignment_id: str) -> tuple[Path, PurePosixPath]:
    """The path of a submission, cut where the student's own part begins; above are the instructors."""
    source = PurePosixPath(course.format_path(step, student_id, assignment_id))
    template = PurePosixPath(course.directory_structure).parts
    first = next((i for i, part in enumerate(template) if "{student_id}" in part), len(template) - 1)
    own = len(template) - first
    return Path(*source.parts[:-own]), PurePosixPath(*source.parts[-own:])
