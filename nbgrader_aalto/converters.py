"""What all of nbgrader's converters have in common here: turns, in which nothing is lost and nobody is disturbed.

Stock's --force, which Formgrader's buttons always use, removes what was there and only then makes the new one. These
exporters change that for generate_assignment, generate_solution, autograde and generate_feedback, by configuration
only (`exporter_class`, set by `nbgrader_aalto.configure`).

Theory of operation. `BaseConverter.start` finds the sources by name, makes its exporter with itself as the parent,
and calls its own `convert_notebooks`, which for each student calls `init_destination`, then the conversion, then
`set_permissions` and `run_post_convert_hook`. The exporter wraps these four on that one object until
`convert_notebooks` returns. In `init_destination` a turn begins: its lock is taken, what a killed run left is
mended, the earlier result is put aside (`earlier`). When `run_post_convert_hook` returned, the new result is complete.
The turn ends before the next one begins: the earlier result is dropped or comes back, and the lock is let go.

When stock's loop catches an exception, it removes what lies at the destination, whosever it is. So nothing may be
raised while that is not known to be our own: what fails in `init_destination` is kept, and reported at the end.

Refuses to know how a notebook is converted, sandboxes, the exchange.
"""

import contextlib
import dataclasses
import gc
import glob
import os
import re
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nbconvert.exporters import Exporter, HTMLExporter, NotebookExporter
from nbgrader.converters.base import BaseConverter, NbGraderException
from traitlets import Float
from traitlets.config import Application

from nbgrader_aalto import shared
from nbgrader_aalto.earlier import EarlierResult, aside, recover
from nbgrader_aalto.gradebooks import one_engine
from nbgrader_aalto.inspection import printable
from nbgrader_aalto.lock import Busy, Lock, LockLost
from nbgrader_aalto.turns import turn, who


class _Interrupted(BaseException):
    """Ctrl-C at a moment when stock's loop must not see it; see above."""


@dataclasses.dataclass
class _Turn:
    """One result being made: with its lock, if there is one, and the earlier results that are put aside."""

    assignment: str
    student: str
    dest: Path
    ends: contextlib.ExitStack
    lock: Lock | None
    results: list[EarlierResult]
    complete: bool = False


class CarefulExporter(Exporter):
    """Makes the converter that made it work in turns. For anybody else it is the exporter that it is mixed into."""

    lock_seconds = Float(
        30.0,
        min=0,
        help="""How long to wait, for each student, while somebody else is at work on the same result. Then that
        student is left out, with a message that says who is at work since when, and the others go on.""",
    ).tag(config=True)

    def __init__(self, config: Any = None, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        self._failed: dict[tuple[str, str], str] = {}
        self._turn: _Turn | None = None
        if self.converter is not None:
            self._prepare()
            for name, wrapper in self.wrappers().items():
                setattr(self.converter, name, wrapper)

    @property
    def converter(self) -> Any:
        """Whose exporter this is; None if it is not a converter of nbgrader's."""
        return self.parent if isinstance(self.parent, BaseConverter) else None

    def check_start(self) -> None:
        """Called before anything is done. Raises `NbGraderException` if nothing must be."""

    def admits(self, assignment_id: str, student_id: str) -> bool:
        """Called when a student's turn has begun; with False there is no new result, and the earlier one stays."""
        return True

    def steps(self) -> tuple[str, ...]:
        """The results that nobody else may be at: the one that is made, and after it those that are read."""
        return (self.converter._output_directory,)

    def summary(self) -> list[str]:
        """What to tell at the end, since it did not work."""
        if not self._failed:
            return []
        lines = [f"  {who(assignment, student)}: {reason}" for (assignment, student), reason in self._failed.items()]
        return [f"{len(lines)} result(s) not made:\n" + "\n".join(lines)]

    def wrappers(self) -> dict[str, Callable[..., Any]]:
        """By name, what stands in for methods of the converter until its `convert_notebooks` returns."""
        converter = self.converter
        names = ("init_destination", "set_permissions", "run_post_convert_hook", "convert_notebooks")
        stock: dict[str, Callable[..., Any]] = {name: getattr(converter, name) for name in names}

        def init_destination(assignment_id: str, student_id: str) -> bool:
            try:
                self._end_turn()
                return self._begin_turn(assignment_id, student_id, stock["init_destination"])
            except KeyboardInterrupt as interrupt:
                raise _Interrupted from interrupt
            except Exception as error:  # noqa: BLE001  # stock would remove what is there, whatever the error
                self._fail(assignment_id, student_id, error)
                self._end_turn()
                return False

        def set_permissions(assignment_id: str, student_id: str) -> None:
            if self._shared():  # stock's stops at the first file of a colleague's
                self._share(int(str(converter.permissions), 8))
            else:
                stock["set_permissions"](assignment_id, student_id)

        def run_post_convert_hook() -> None:
            stock["run_post_convert_hook"]()
            if converter.post_convert_hook and self._shared():
                self._share()
            if self._turn is not None:
                self._turn.complete = True

        def convert_notebooks() -> None:
            failure: str | None = None
            if isinstance(converter.parent, Application):
                gc.freeze()  # a command's modules stay until its end: looking through them for garbage takes a second
            try:
                with one_engine():
                    stock["convert_notebooks"]()
            except NbGraderException as error:
                failure = str(error)
            except _Interrupted:
                self.log.error("Canceled")
                raise KeyboardInterrupt from None
            finally:
                try:
                    self._end_turn()
                finally:
                    for name in replaced:
                        vars(converter).pop(name, None)
            self._report(failure)

        wrappers: dict[str, Callable[..., Any]] = {
            "init_destination": init_destination,
            "set_permissions": set_permissions,
            "run_post_convert_hook": run_post_convert_hook,
            "convert_notebooks": convert_notebooks,
        }
        replaced = wrappers  # those that a subclass adds, too
        return wrappers

    def unchanged(self, assignment_id: str, student_id: str, notebooks: Sequence[str]) -> bool:
        """Whether stock will skip this student with these notebooks, since the result is there and nothing newer."""
        converter = self.converter
        course, done = converter.coursedir, converter._format_dest(assignment_id, student_id)
        paths = [done] if course.notebook_id == "*" else map(str, self._paths(Path(done), notebooks))
        if converter.force or not all(map(os.path.exists, paths)):
            return False
        new = course.get_existing_timestamp(converter._format_source(assignment_id, student_id))
        old = course.get_existing_timestamp(done)
        return new is None or old is None or new <= old

    def _paths(self, dest: Path, notebooks: Sequence[str]) -> list[Path]:
        """What this run replaces: a student's whole result, or with --notebook the notebooks that it names."""
        if self.converter.coursedir.notebook_id == "*":
            return [dest]
        stems = (os.path.splitext(os.path.basename(path))[0] for path in notebooks)
        return [dest / f"{stem}{self.file_extension}" for stem in stems]

    def _prepare(self) -> None:
        course = self.converter.coursedir
        try:
            shared.prepare(Path(course.root), course.db_url, course.groupshared)
        except (shared.NotShared, OSError) as error:
            self.refuse_all(str(error))
        self.check_start()

    def refuse_all(self, reason: str) -> None:
        """Raises `NbGraderException`, always."""
        self.log.error("Nothing was done: %s", reason)
        raise NbGraderException(f"Nothing was done: {reason}")

    def _begin_turn(self, assignment_id: str, student_id: str, stock: Callable[[str, str], Any]) -> bool:
        converter = self.converter
        if student_id in converter.coursedir.student_id_exclude.split(","):
            return bool(stock(assignment_id, student_id))
        dest = Path(os.path.normpath(converter._format_dest(assignment_id, student_id)))
        with contextlib.ExitStack() as stack:
            lock, *_ = [stack.enter_context(self._locked(step, student_id, assignment_id)) for step in self.steps()]
            self._turn = now = _Turn(assignment_id, student_id, dest, stack.pop_all(), lock, [])
        # first of all, since it mends what a killed run left, and what is there decides what is done
        now.results = [EarlierResult(path) for path in self._paths(dest, converter.notebooks)]
        if not self.admits(assignment_id, student_id):
            self._end_turn()
            return False
        if not self.unchanged(assignment_id, student_id, converter.notebooks):
            for result in now.results:
                result.put_aside()
        wanted = bool(stock(assignment_id, student_id))
        if not wanted:
            self._end_turn()
        return wanted

    def _locked(self, step: str, student_id: str, assignment_id: str) -> contextlib.AbstractContextManager[Lock | None]:
        root = Path(self.converter.coursedir.root)
        return turn(root, step, student_id, assignment_id, wait_seconds=self.lock_seconds, log=self.log.warning)

    def _end_turn(self) -> None:
        """Raises nothing but what interrupts; what fails is kept for the report."""
        ended, self._turn = self._turn, None
        if ended is None:
            return
        try:
            with ended.ends:
                if ended.lock is not None:
                    ended.lock.check()
                left = [line for result in ended.results for line in result.settle(ended.complete)]
            which = ("new", "earlier") if ended.complete else ("earlier", "new")
            for line in left:
                self.log.warning(
                    "The %s result is in place, but something of the %s one could not be removed: %s. It counts for "
                    "nothing, and is removed in the next run of its owner",
                    *which,
                    line,
                )
        except (LockLost, OSError) as error:
            self._fail(ended.assignment, ended.student, error)

    def _fail(self, assignment_id: str, student_id: str, error: Exception) -> None:
        if isinstance(error, OSError):
            reason = shared.explain(error)
        elif isinstance(error, Busy | LockLost | NbGraderException | shared.NotShared):
            reason = str(error)
        else:
            reason = f"{type(error).__name__}: {error}"
            self.log.error("".join(traceback.format_exception(error)))
        self._failed[assignment_id, student_id] = reason
        self.log.error("%s: %s", who(assignment_id, student_id), reason)

    def _report(self, other: str | None) -> None:
        """Raise what the instructor must know, with stock's own message if others failed in another way."""
        ours = self.summary()
        for message in ours:
            self.log.error(message)
        if other is not None or ours:
            raise NbGraderException("\n".join(filter(None, [other, *ours])))

    def _shared(self) -> bool:
        course = self.converter.coursedir
        return shared.is_shared(Path(course.root), course.groupshared)

    def _share(self, file_mode: int | None = None) -> None:
        assert self._turn is not None  # called in the middle of one
        for line in shared.share(Path(self.converter.coursedir.root), self._turn.dest, file_mode):
            self.log.warning("%s", line)


class AssignmentExporter(CarefulExporter, NotebookExporter):
    """For what is generated from an assignment's source: release, solution, source_with_tests.

    Also refuses a name that would break a later step, while it can still be changed at no cost.
    """

    def check_start(self) -> None:
        """Raises `NbGraderException` for a bad name of an assignment or notebook."""
        # here, since the exchange uses this module
        from nbgrader_aalto.exchange.names import assignment_problem, notebook_problem

        converter, problems = self.converter, []
        pattern = converter._format_source("(?P<assignment_id>.*)", "(?P<student_id>.*)", escape=True)
        asked = converter.coursedir.assignment_id
        literal = converter._format_source(asked, converter.coursedir.student_id)
        names = {asked} if os.path.lexists(literal) else set()  # else it is a pattern, and these are what it found:
        for directory, notebooks in converter.assignments.items():
            match = re.match(pattern, directory, re.DOTALL)
            names.add(match["assignment_id"] if match else os.path.basename(directory))
            stems = sorted(os.path.splitext(os.path.basename(path))[0] for path in notebooks)
            problems += [("notebook", stem, problem) for stem in stems if (problem := notebook_problem(stem))]
        problems += [("assignment", name, problem) for name in sorted(names) if (problem := assignment_problem(name))]
        if problems:
            self.refuse_all("; ".join(f"the {what} '{printable(name)}': {problem}" for what, name, problem in problems))


class FeedbackExporter(CarefulExporter, HTMLExporter):
    """For generate_feedback. nbgrader's settings and templates for `HTMLExporter` hold for it, as for any subclass."""

    def steps(self) -> tuple[str, ...]:
        """Not while the student is being autograded: that would be feedback on half a notebook."""
        return (*super().steps(), self.converter.coursedir.autograded_directory)

    def check_start(self) -> None:
        """Put back autograded results that a killed run left aside, and leave out those that are being made.

        Else a student would be left out in silence, or get feedback on half a notebook.
        """
        converter, course = self.converter, self.converter.coursedir
        pattern = converter._format_source("(?P<assignment_id>.*)", "(?P<student_id>.*)", escape=True)
        busy: set[str] = set()
        unsettled = self._unsettled(Path(converter._format_source(course.assignment_id, course.student_id)))
        for path, result in unsettled:
            match = re.match(pattern, str(result), re.DOTALL)
            whose = (match["assignment_id"], match["student_id"]) if match else (course.assignment_id, str(result))
            try:
                with turn(Path(course.root), course.autograded_directory, whose[1], whose[0], wait_seconds=0):
                    recover(path)
            except (Busy, LockLost, OSError) as error:
                self._fail(*whose, error)
                busy.add(str(result))
        if unsettled:
            converter.init_notebooks()
            for directory in [name for name in converter.assignments if os.path.normpath(name) in busy]:
                del converter.assignments[directory]

    def _unsettled(self, results: Path) -> list[tuple[Path, Path]]:
        """What was put aside and is not settled, of the results that match the pattern: it, and its result."""
        whole = [_result(path) for path in glob.glob(str(aside(results)))]
        parts = [_result(path) for path in glob.glob(str(results / ".*.ipynb.before"))]
        return [(path, path) for path in whole] + [(path, path.parent) for path in parts]


def _result(aside: str) -> Path:
    path = Path(os.path.normpath(aside))
    return path.with_name(path.name.removeprefix(".").removesuffix(".before"))
