"""Taking turns at one result of a course, `<step>/<student>/<assignment>`: whose turn it is says a lock's name.

Light, unlike `converters`: the exchange and `course repair` take turns, too. Refuses to know what is done in a turn.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from nbgrader_aalto.course import printable
from nbgrader_aalto.lock import Lock, locked

LOCKS = ".locks"
"""Below the course directory."""

EXCHANGE = "exchange"
"""The lock of what a course has in the exchange, in submitted/ and in the vault."""

_DOING = {"autograded": "autograding", "feedback": "making feedback on", "release": "generating"}


def lock_name(step: str, student: str, assignment: str) -> str:
    """Of one result; the student of an assignment itself is "."."""
    return f"{step} {student} {assignment}"


@contextlib.contextmanager
def turn(
    root: Path,
    step: str,
    student: str,
    assignment: str,
    *,
    purpose: str = "",
    wait_seconds: float = 30.0,
    log: Callable[[str], object] | None = None,
) -> Iterator[Lock | None]:
    """The lock of one result of the course directory `root`.

    Raises `Busy` with who is at work, `OSError`. None, and no lock, where nothing can be written in the course.
    """
    directory = root / LOCKS
    with contextlib.ExitStack() as stack:
        lock = None
        if any(os.access(path, os.W_OK | os.X_OK) for path in (directory, root)):
            doing = purpose or f"{_DOING.get(step, f'making {step} of')} {who(assignment, student)}"
            name = lock_name(step, student, assignment)
            try:
                lock = stack.enter_context(locked(directory, name, doing, wait_seconds=wait_seconds, log=log))
            except OSError as error:  # its own says the lock's name only
                raise OSError(error.errno, f"no lock can be made: {error.strerror}", str(directory)) from error
        yield lock


def who(assignment: str, student: str) -> str:
    """For a message."""
    name = printable(assignment)
    return name if student == "." else f"{name} of {printable(student)}"
