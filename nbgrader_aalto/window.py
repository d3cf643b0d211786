"""The window of one run of Autograde: whose turn it is, who is executed ahead of it, and what to show of it.

At the beginning of each turn the students before it are let go, and as many to come are prepared as `readahead` wants.
Whom nbgrader would skip, or the inspection refuses, is not among them. Runs in nbgrader's thread. Nothing here can
fail a student: without a result from ahead, the notebook is executed in its turn.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any

from grader_service.machine import processors
from nbgrader_aalto.coming import Coming
from nbgrader_aalto.execute import IsolatedExecute
from nbgrader_aalto.progress import Progress, progress
from nbgrader_aalto.readahead import ReadAhead, automatic_jobs
from nbgrader_aalto.run import run_of

_PAYS_WARMTH = 3
"""Notebooks, at least. Making a template takes as long as starting one kernel, and it makes two."""


@dataclasses.dataclass(frozen=True)
class _Turn:
    assignment: str
    student: str
    notebooks: Sequence[str]
    """Paths, in nbgrader's order."""


class Window:
    """Over the turns of an exporter's Autograde, which it has set out on. Close it, whatever happens."""

    def __init__(self, exporter: Any) -> None:
        self._exporter, self._converter = exporter, exporter.converter
        self._turns = _turns(self._converter)
        self._places = {(turn.assignment, turn.student): place for place, turn in enumerate(self._turns)}
        self._now = self._next = 0
        self._ends = contextlib.ExitStack()
        self._ends.callback(self._end_run)
        self._coming: Coming | None = None
        self._ahead: ReadAhead | None = None
        self._progress: Progress | None = None
        run_of(self._converter).pays_warmth = sum(len(turn.notebooks) for turn in self._turns) >= _PAYS_WARMTH
        if len(self._turns) > 1:
            self._progress = self._ends.enter_context(progress(len(self._turns), self._converter.log))
            self._begin()

    def turn(self, assignment: str, student: str) -> None:
        """This student's turn begins, and those before it are over."""
        place = self._places.get((assignment, student))
        if place is None:
            return
        ahead = self._ahead
        if ahead is not None:
            for turn in self._turns[self._now : place]:
                ahead.drop(turn.assignment, turn.student)
        self._now, self._next = place, max(place, self._next)
        while ahead is not None and ahead.wanted and self._next < len(self._turns):
            self._prepare(ahead, self._turns[self._next])
            self._next += 1
        if self._progress is not None:
            self._progress.show(place, *self._numbers())

    def close(self) -> None:
        """Returns when no sandbox, thread or file is left."""
        self._progress = None
        self._ends.close()

    def _begin(self) -> None:
        try:
            self._coming = Coming(self._exporter)
            jobs = _jobs(self._coming.execute)
        except Exception as error:  # noqa: BLE001  # each student's own turn meets it, too
            self._converter.log.info("Nobody's notebooks are executed ahead of their turn: %s", error)
            return
        if jobs > 1:
            self._ahead = ReadAhead(jobs, self._changed, self._converter.log.warning)
            run_of(self._converter).ahead = self._ahead

    def _end_run(self) -> None:
        try:
            run_of(self._converter).close()
        finally:
            self._converter._isolated_run = None
        if self._ahead is not None:
            self._converter.log.info("%d notebook(s) were executed ahead of their turn", self._ahead.used)

    def _prepare(self, ahead: ReadAhead, turn: _Turn) -> None:
        exporter = self._exporter
        whose = (turn.assignment, turn.student)
        try:
            if turn.student in self._converter.coursedir.student_id_exclude.split(","):
                return
            # in this order: what was not inspected must not be read
            if exporter.refusals(*whose, turn.notebooks) or exporter.unchanged(*whose, turn.notebooks):
                return
            known = exporter.known_notebooks(turn.assignment)
            names = [os.path.basename(path) for path in turn.notebooks]
            assert self._coming is not None
            files, orders = self._coming.orders(*whose, [name[: -len(".ipynb")] for name in names if name in known])
        except Exception as error:  # noqa: BLE001  # whatever it is, the student's own turn meets it, too, and says so
            self._converter.log.debug("Not executed ahead: %s: %s", type(error).__name__, error)
            return
        ahead.add(*whose, files, orders)

    def _changed(self) -> None:
        if self._progress is not None:
            self._progress.change(*self._numbers())

    def _numbers(self) -> tuple[int, int]:
        return (self._ahead.running, self._ahead.waiting) if self._ahead is not None else (1, 0)


def _jobs(execute: IsolatedExecute) -> int:
    if execute.jobs:
        return int(execute.jobs)
    return processors() if execute.service_url else automatic_jobs(execute.limits().memory_bytes)


def _turns(converter: Any) -> list[_Turn]:
    """In the order of `BaseConverter.convert_notebooks`."""
    pattern = re.compile(converter._format_source("(?P<assignment_id>.*)", "(?P<student_id>.*)", escape=True))
    turns = []
    for directory in sorted(converter.assignments):
        if match := pattern.match(directory):
            whose = match["assignment_id"], match["student_id"]
            turns.append(_Turn(*whose, sorted(converter.assignments[directory])))
    return turns
