"""What commands that were killed left behind in a course: what it is, whose, and putting it right.

    .NAME.<12 hex>.new      was being made (`trees.beside`): by collect, release, course create or course repair
    .NAME.replaced          the version before, between the two steps of `trees.put_in_place`
    .NAME.before            the earlier result while a new one is made (`earlier`); empty where there was none
    .NAME.dropped.<8 hex>   an earlier result that counts for nothing, and could not be removed (`earlier`)

Theory of operation. Each of these exists in good order while somebody is at work, who then holds a lock (`turns`): of
the exchange for the first two, of the result for the others. So what was seen, and is still there when nobody holds the
lock, was left by somebody who is dead. `course create` alone takes no lock: what was written to a moment ago is let be.
Mending is what the next command of that kind would do by itself, under the same lock. Files of students may not have
such names (`is_reserved`): one of them would be taken for an earlier result, and come to lie in its place.
"""

import dataclasses
import enum
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

from nbgrader_aalto import earlier, lock, shared, trees, turns
from nbgrader_aalto.course import Finding, printable, shell_quoted

RECENT_SECONDS = 10.0
_NAMES = re.compile(
    r"\.(?P<name>.+)\.(?:(?P<new>[0-9a-f]{12}\.new)|(?P<replaced>replaced)|(?P<before>before)"
    r"|(?P<dropped>dropped\.[0-9a-f]{8}))",
    re.DOTALL,
)
_OTHERS = frozenset({".git", "source", "vault", "logs", turns.LOCKS})
"""Directories of a course in which no result lies: there, such a name is somebody's own."""
_STUDENTS = frozenset({"submitted", "autograded", "feedback"})
"""Directories in which results are students', and in their directories."""
_NOTEBOOK = (".ipynb", ".html")
"""A result of its own, where nbgrader was called with --notebook."""


class Kind(enum.Enum):
    """See the table above."""

    NEW = "new"
    REPLACED = "replaced"
    BEFORE = "before"
    DROPPED = "dropped"


@dataclasses.dataclass(frozen=True)
class Remains:
    """Something of this kind at `path`; `result` is what it belongs to, `lock` what its maker held."""

    kind: Kind
    path: Path
    result: Path
    root: Path
    lock: str
    turn: tuple[str, str, str] | None = None
    """Step, student and assignment, where the lock is that of a result."""

    def is_left(self) -> bool:
        """Whether it is there although nobody is at work. As far as looking tells: nothing is touched."""
        if lock.is_held(self.root / turns.LOCKS, self.lock):
            return False
        return self._is_there()

    def _is_there(self) -> bool:
        try:
            status = os.lstat(self.path)
        except OSError:
            return False
        return self.kind is not Kind.NEW or abs(time.time() - status.st_mtime) >= RECENT_SECONDS

    def finding(self) -> Finding:
        """What it is, in words, and who runs what."""
        owner = shared.owner_name(os.lstat(self.path).st_uid)
        remove = f"{owner} runs: rm -r {shell_quoted(str(self.path))}"
        repair = "any instructor runs: nbgrader-aalto course repair"
        name = printable(self.result.name)
        if self.kind is Kind.NEW:
            words = f"is what a command left that was killed while it was making {name}"
            command = f"{repair}; or {remove}"
        elif self.kind is Kind.DROPPED:
            words = f"is an earlier result of {name} that could not be removed, and counts for nothing"
            command = f"{repair}; or {remove}"
        elif self.kind is Kind.REPLACED and os.path.lexists(self.result):
            words, command = f"is the version before of {name}, which replaced it", f"{repair}; or {remove}"
        elif self.kind is Kind.REPLACED:
            words = f"is {name}, which has no other name since a command was killed that was replacing it"
            command = f"{repair}, or that command again"
        else:
            what = "is the earlier result of" if earlier.is_result(self.path) else "says that there was no result of"
            words = f"{what} {name}, put aside by a command that was killed: what is called {name} is not complete"
            command = f"{repair}, or that command again"
        return Finding(str(self.path), owner, words, command)

    def mend(self) -> str:
        """What was done, or "" if there is nothing to do. For who holds the lock of the exchange.

        Raises `OSError`, and `lock.Busy` or `lock.LockLost` where it is somebody's turn.
        """
        if self.turn is None:
            return self._mended() if self._is_there() else ""
        with turns.turn(self.root, *self.turn, purpose="repairing the course", wait_seconds=0) as held:
            return self._mended() if held and self._is_there() else ""

    def _mended(self) -> str:
        if self.kind in (Kind.NEW, Kind.DROPPED):
            return self._removed(self.path)
        is_old = os.path.lexists(self.result)
        if self.kind is Kind.REPLACED:
            trees.recover(self.result)
            self._refuse_left()
            return "removed" if is_old else f"is {printable(self.result.name)} again"
        had = earlier.recover(self.result)
        self._refuse_left()
        return f"is {printable(self.result.name)} again" if had else "removed, with what was half made"

    def _removed(self, path: Path) -> str:
        if path.is_dir() and not path.is_symlink():
            left = trees.remove(path)
            if left:
                raise OSError(None, f"{len(left)} names in it cannot be removed: {left[0]}")
        else:
            os.unlink(path)
        return "removed"

    def _refuse_left(self) -> None:
        if os.path.lexists(self.path):
            raise OSError(None, "it cannot be removed as a whole")


def is_reserved(name: str) -> bool:
    """Whether a file of this name could be taken for one of ours."""
    return _NAMES.fullmatch(name) is not None


def remains_of(path: Path, root: Path, outbound: Path | None) -> Remains | None:
    """What `path` is by its name and place, in the course directory `root` or among what was released."""
    match = _NAMES.fullmatch(path.name)
    if match is None:
        return None
    kind = next(kind for kind in Kind if match[kind.value])
    result = path.with_name(match["name"])
    if kind is Kind.NEW:
        return Remains(kind, path, result, root, turns.EXCHANGE)
    if outbound is not None and path.parent == outbound:
        return Remains(kind, path, result, root, turns.EXCHANGE) if kind is Kind.REPLACED else None
    if not path.is_relative_to(root):
        return None
    parts = result.relative_to(root).parts
    if parts[0] in _OTHERS:
        return None
    if kind is Kind.REPLACED:
        return Remains(kind, path, result, root, turns.EXCHANGE) if len(parts) == 3 else None
    turn = _turn(parts) if parts[0] != "submitted" else None  # nothing is made there, and files are the students'
    return turn and Remains(kind, path, result, root, turns.lock_name(*turn), turn)


def _turn(parts: Sequence[str]) -> tuple[str, str, str] | None:
    """Of `<step>/<assignment>` or `<step>/<student>/<assignment>`, or of a notebook in one of them."""
    if parts[-1].endswith(_NOTEBOOK):
        parts = parts[:-1]
    if len(parts) == 2 and parts[0] not in _STUDENTS:
        return parts[0], ".", parts[1]
    return (parts[0], parts[1], parts[2]) if len(parts) == 3 else None
