"""An earlier result, kept until the new one is complete.

nbgrader removes autograded/<student>/<assignment>, or release/<assignment>, before it makes the new one, and again
when that fails: a bad notebook or a full disk would cost the result of a good day. And a run that was killed leaves
a half made result there, which nbgrader takes for a whole one from then on.

Theory of operation. For `ps1` the earlier result lies beside it, as `.ps1.before`. As long as that exists, what is
called `ps1` is not complete. Each change of state is one rename: the new result counts from the moment that
`.ps1.before` is called `.ps1.dropped.<random>`, and what has that name is refuse, even if it cannot be removed.

All of it is for who holds the lock of this result (`turns.turn`): for anybody else a colleague's work looks like
what a killed run left. Refuses to know nbgrader.
"""

import contextlib
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

from nbgrader_aalto import trees


class EarlierResult:
    """One directory, or one notebook of it, put aside under a name that nbgrader's patterns do not match.

    Where there was none, an empty file of that name says so. A run that was killed leaves either behind; the
    next run finds it, drops what is half made, and puts the earlier result back. Methods raise `OSError`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._aside = aside(path)
        recover(path)

    def put_aside(self) -> None:
        """Out of nbgrader's way, on the same file system, in one step."""
        if is_result(self._path):
            os.rename(self._path, self._aside)
        else:
            self._aside.parent.mkdir(parents=True, exist_ok=True)
            self._aside.touch()

    def settle(self, complete: bool = True) -> list[str]:
        """Drop it if there is a complete new result, else put it back. Returns what could not be removed, and why."""
        if not os.path.lexists(self._aside):
            return []
        if complete and self._path.exists():
            return _drop(self._aside)
        return _put_back(self._path)


def aside(path: Path) -> Path:
    """Where the earlier result of `path` lies while the new one is being made."""
    return path.with_name(f".{path.name}.before")


def unfinished(path: Path, names: Iterable[str]) -> bool:
    """Whether the result `path`, a directory with these names in it, or a notebook of it, is not complete now."""
    return os.path.lexists(aside(path)) or any(name.startswith(".") and name.endswith(".before") for name in names)


def recover(path: Path) -> bool:
    """Put back what a killed run left aside, and remove its refuse. Returns whether there was an earlier result.

    Call it with the lock of this result held, and before anything looks at `path`; without the lock it would undo
    what somebody is doing. Raises `OSError`; then the earlier result is where it was.
    """
    _sweep(path)
    if not os.path.lexists(aside(path)):
        return False
    had = is_result(aside(path))
    _put_back(path)
    return had


def _put_back(path: Path) -> list[str]:
    """A name is freed by a rename, which works wherever the earlier result can be put back at all."""
    before = aside(path)
    if is_result(before):
        left = _drop(path) if os.path.lexists(path) else []
        os.rename(before, path)
        return left
    left = _drop(path) if _is_made(path) else []  # a link was there before: nbgrader makes none
    _drop(before)
    return left


def _drop(path: Path) -> list[str]:
    """Give it a name that counts for nothing, then remove it as far as that goes."""
    refuse = path.with_name(f".{_stem(path)}.dropped.{secrets.token_hex(4)}")
    os.rename(path, refuse)
    return _remove(refuse)


def _stem(path: Path) -> str:
    """The name of the result, of itself or of what was put aside."""
    return path.name.removeprefix(".").removesuffix(".before") if path.name.startswith(".") else path.name


def _sweep(path: Path) -> None:
    """Try again to remove refuse; a colleague, whose files they may be, can perhaps."""
    refuse = re.compile(rf"\.{re.escape(path.name)}\.dropped\.[0-9a-f]{{8}}")
    with contextlib.suppress(OSError):
        for name in os.listdir(path.parent):
            if refuse.fullmatch(name):  # an assignment may well be called "ps1.dropped."
                _remove(path.with_name(name))


def is_result(path: Path) -> bool:
    """A directory, or a notebook, which is never empty."""
    return not path.is_symlink() and (path.is_dir() or (path.is_file() and path.stat().st_size > 0))


def _is_made(path: Path) -> bool:
    return os.path.lexists(path) and not path.is_symlink()


def _remove(path: Path) -> list[str]:
    """Returns what is left of it, with the reason."""
    if path.is_dir() and not path.is_symlink():
        return trees.remove(path)
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        return [f"{path}: {error.strerror}"]
    return []
