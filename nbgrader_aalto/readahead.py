"""Executing ahead: the sandboxes of the next students run while this one is being scored.

Theory of operation. Who knows the order of students gives `ReadAhead` chains, one for each student to come: the orders
of that student's notebooks, and the archive of files with which the first one starts. Threads execute the chains in
that order, at most `jobs` at a time; what a notebook leaves is what the next one of its chain starts with. When the
student's turn comes, `take` gives a result only for an order with the same key and for files with the same digest:
a wrong guess costs time, never a score. A failure here is no result, so that it is repeated the normal way.

How many chains wait is bounded by whoever adds them (`wanted`). Results are in memory, files in unlinked temporary
files. What runs already and nobody wants any more goes on to its end, and is forgotten: other sandboxes may hang on
what its thread has started. `stop` ends whatever runs, `join` returns when nothing is left.
Refuses to know nbgrader and what is in an order.
"""

import contextlib
import dataclasses
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from grader_service.machine import memory_bytes, processors
from nbgrader_aalto.orders import Order, Result, Stop, another, carry_out, digest_of

_AHEAD = 2
"""Students for whom everything is ready or waits, beyond those whose sandboxes run."""
_MISSES = 3
"""So many wrong guesses in a row, and there is no use in guessing."""
_LAST_SECONDS = 10.0
"""A sandbox ends within a fraction of it. Only what waits for a service that does not answer outlives it."""


def automatic_jobs(memory_of_one: int) -> int:
    """One for each processor, and no more than fit into the memory that is available now; at least one."""
    return max(1, min(processors(), available_bytes() // memory_of_one))


def available_bytes() -> int:
    """What could be used without swapping, in this machine and its control groups. proc(5), /proc/meminfo"""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return min(int(line.split()[1]) << 10, memory_bytes())
    return memory_bytes()


@dataclasses.dataclass
class _Step:
    notebook: str
    order: Order
    ended: threading.Event = dataclasses.field(default_factory=threading.Event)
    files: str = ""
    """Digest of those with which it was executed."""
    result: Result | None = None


@dataclasses.dataclass(eq=False)
class _Chain:
    whose: tuple[str, str]
    files: IO[bytes]
    steps: list[_Step]
    running: bool = False
    dropped: bool = False

    def drop(self) -> None:
        """What nobody took is gone; the files of a step that runs go when it ends."""
        self.dropped = True
        for step in self.steps:
            result, step.result = step.result, None
            if result is not None:
                result.keep.close()


class ReadAhead:
    """Chains that are executed ahead; `jobs` sandboxes at a time, those of `alone` included.

    Not for use by several threads at once. `changed` is called, by any thread, when numbers have changed, and `tell`
    with a sentence when there is no more reading ahead.
    """

    def __init__(self, jobs: int, changed: Callable[[], None], tell: Callable[[str], None]) -> None:
        self._jobs, self._changed, self._tell = jobs, changed, tell
        self._condition = threading.Condition()
        self._chains: dict[tuple[str, str], _Chain] = {}
        self._queue: deque[_Chain] = deque()
        self._threads: list[threading.Thread] = []
        self._busy = self._first = self._misses = self.used = 0
        self._stop = Stop()

    @property
    def wanted(self) -> int:
        """How many more chains to add."""
        hopeless = self._misses >= _MISSES
        return 0 if hopeless or self._stop.requested else max(0, self._jobs + _AHEAD - len(self._chains))

    @property
    def running(self) -> int:
        """Sandboxes at work."""
        return self._busy

    @property
    def waiting(self) -> int:
        """Students whose results are there, or who are next."""
        with self._condition:
            return sum(not chain.running for chain in self._chains.values())

    def add(self, assignment: str, student: str, files: IO[bytes], orders: Sequence[tuple[str, Order]]) -> None:
        """Execute these notebooks, the first one with this archive of files, when their turn comes."""
        chain = _Chain((assignment, student), files, [_Step(name, order) for name, order in orders])
        with self._condition:
            self._chains[chain.whose] = chain
            self._queue.append(chain)
            self._condition.notify_all()
        if len(self._threads) < self._jobs:
            self._threads.append(threading.Thread(target=self._work, name="ahead", daemon=True))
            self._threads[-1].start()
        self._changed()

    def take(self, assignment: str, student: str, notebook: str, order: Order, files: IO[bytes]) -> Result | None:
        """The result of exactly this, waited for; None if there is none, and then nothing of this student is."""
        chain = self._chains.get((assignment, student))
        if chain is None:
            return None
        step = next((step for step in chain.steps if step.notebook == notebook), None)
        if step is not None and step.order.key == order.key:
            step.ended.wait()
            result = step.result
            if result is None:  # it failed; that says nothing about the guess
                self.drop(assignment, student)
                return None
            if step.files == digest_of(files):
                step.result = None
                self._misses = 0
                self.used += 1
                return result
        self.drop(assignment, student)
        self._misses += 1
        if self._misses == _MISSES:
            self._tell(
                f"What was executed ahead was not what {_MISSES} students' notebooks turned out to be; from here on "
                "they are executed one after the other"
            )
        return None

    def drop(self, assignment: str, student: str) -> None:
        """This student's turn has ended, or the guess was wrong."""
        with self._condition:
            chain = self._chains.pop((assignment, student), None)
            if chain is None:
                return
            if chain in self._queue:
                self._queue.remove(chain)
                chain.files.close()
            chain.drop()
        self._changed()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """For an execution by the caller, who does not wait for more than one of those ahead to end."""
        with self._slot(first=True):
            yield

    def stop(self) -> None:
        """Let everything end; returns at once."""
        with self._condition:
            self._stop.request()
            self._condition.notify_all()
        for whose in list(self._chains):
            self.drop(*whose)

    def join(self) -> None:
        """After `stop`: returns when no sandbox, thread or file is left."""
        for thread in self._threads:
            thread.join(_LAST_SECONDS)

    def _work(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._stop.requested or self._queue)
                if self._stop.requested:
                    return
                chain = self._queue.popleft()
                chain.running = True
            try:
                self._execute(chain)
            finally:
                with self._condition:
                    chain.running = False
                for step in chain.steps:
                    step.ended.set()
                self._changed()

    def _execute(self, chain: _Chain) -> None:
        """One notebook after the other, until one fails: then the others' files are not known."""
        files = chain.files
        try:
            for step in chain.steps:
                with self._slot(first=False):
                    if chain.dropped:
                        return
                    self._changed()
                    step.files = digest_of(files)
                    result = carry_out(step.order, files, self._stop)
                if result.keep.seek(0, os.SEEK_END):
                    files.close()
                    files = another(result.keep)
                with self._condition:
                    if chain.dropped:
                        result.keep.close()
                        return
                    step.result = result
                step.ended.set()
        except Exception:  # noqa: BLE001  # whatever it is, nbgrader's own turn meets it, too, and says so
            return
        finally:
            files.close()

    @contextlib.contextmanager
    def _slot(self, first: bool) -> Iterator[None]:
        with self._condition:
            self._first += first
            try:
                self._condition.wait_for(
                    lambda: self._stop.requested or (self._busy < self._jobs and (first or not self._first))
                )
            finally:
                self._first -= first
            self._busy += 1
        try:
            yield
        finally:
            with self._condition:
                self._busy -= 1
                self._condition.notify_all()
