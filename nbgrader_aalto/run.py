"""What all executions of one run of a converter share, from its first question to its end.

Nothing of it outlives the run, but for the nursery that a server keeps (`kept`).
"""

import dataclasses
from typing import IO, Any

from nbformat import NotebookNode

from isolate.notebook import Kernel, Nursery
from isolate.policy import Policy
from nbgrader_aalto import kept
from nbgrader_aalto.readahead import ReadAhead


@dataclasses.dataclass
class Work:
    """The assignment's work directory, which a student's notebooks share, one after the other, as in stock nbgrader."""

    student: str
    assignment: str
    files: IO[bytes] | None = None

    def take(self, files: IO[bytes] | None) -> None:
        """From now on this is what it holds."""
        if self.files is not None:
            self.files.close()
        self.files = files


class Run:
    """Whoever began it (see `window`) closes it."""

    def __init__(self) -> None:
        self.ahead: ReadAhead | None = None
        self.pays_warmth = False
        """Whether there are so many notebooks that making templates takes less time than it saves."""
        self.nurseries: dict[str, Nursery] = {}
        """By assignment: each has its own imports."""
        self.kernels: dict[str, tuple[Kernel, Policy]] = {}
        """By name, as found at first in this run."""
        self.kernelspecs: dict[tuple[str, str], str | None] = {}
        """By assignment and notebook, as the gradebook has them: JSON."""
        self.sources: dict[str, tuple[tuple[int, ...], list[NotebookNode]]] = {}
        """Code cells of the instructor's notebooks, by path, with the file's inode, size and time."""
        self._work = Work("", "")

    def work_of(self, where: dict[str, str]) -> Work:
        """That of this student and assignment; another's is gone then."""
        if (self._work.student, self._work.assignment) != (where["student"], where["assignment"]):
            self._work.take(None)
            self._work = Work(where["student"], where["assignment"])
        return self._work

    def close(self) -> None:
        """End everything that belongs to this run. Returns when no sandbox, thread or file is left."""
        self._work.take(None)
        if self.ahead is not None:
            self.ahead.stop()
        for nursery in self.nurseries.values():
            kept.let_go(nursery)
        if self.ahead is not None:
            self.ahead.join()


def run_of(converter: Any) -> Run:
    """The run of this converter, which begins with the first question for it."""
    run: Run | None = getattr(converter, "_isolated_run", None)
    if run is None:
        run = converter._isolated_run = Run()
    return run
