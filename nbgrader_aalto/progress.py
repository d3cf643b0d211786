"""How far autograding a class has come: a bar on a terminal, and plain lines of the log elsewhere.

Names no student. Refuses to know what is executed, and how.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import Protocol, TextIO

from tqdm import tqdm


class Progress(Protocol):
    """Shows numbers: students done, sandboxes running, students waiting. Callable by any thread."""

    def show(self, done: int, running: int, waiting: int) -> None:
        """Another student is done."""

    def change(self, running: int, waiting: int) -> None:
        """The same number is done."""


@contextlib.contextmanager
def progress(total: int, log: logging.Logger) -> Iterator[Progress]:
    """For as long as this lasts. On a terminal, lines of the log appear above the bar and do not tear it."""
    if not sys.stderr.isatty():
        yield _Lines(total, log)
        return
    with _Tqdm(total=total, unit="student", file=sys.stderr, dynamic_ncols=True) as bar, _above(bar, log):
        yield _Bar(bar)


class _Tqdm(tqdm):
    """Without a thread of its own that looks for bars that are late."""

    monitor_interval = 0


class _Lines:
    def __init__(self, total: int, log: logging.Logger) -> None:
        self._total, self._log, self._began = total, log, time.monotonic()

    def show(self, done: int, running: int, waiting: int) -> None:
        if done:
            left = (time.monotonic() - self._began) / done * (self._total - done)
            text = "%d of %d students done, %d running, %d waiting, about %.0f s left"
            self._log.info(text, done, self._total, running, waiting, left)

    def change(self, running: int, waiting: int) -> None:
        pass


class _Bar:
    def __init__(self, bar: "tqdm[None]") -> None:
        self._bar = bar

    def show(self, done: int, running: int, waiting: int) -> None:
        self._bar.update(done - self._bar.n)
        self.change(running, waiting)

    def change(self, running: int, waiting: int) -> None:
        self._bar.set_postfix_str(f"{running} running, {waiting} waiting")


class _Above:
    """A stream whose lines go above the bar."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        tqdm.write(text, file=self._stream, end="")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()


@contextlib.contextmanager
def _above(bar: "tqdm[None]", log: logging.Logger) -> Iterator[None]:
    """Redirects the handlers of this logger, and of those above it, that write to the terminal."""
    with contextlib.ExitStack() as stack:
        current: logging.Logger | None = log
        while current is not None:
            for handler in current.handlers:
                if isinstance(handler, logging.StreamHandler) and handler.stream in {sys.stderr, sys.stdout}:
                    stack.callback(handler.setStream, handler.stream)
                    handler.setStream(_Above(handler.stream))
            current = current.parent if current.propagate else None
        yield
