"""An earlier autograded result, kept until the new one is complete.

nbgrader removes autograded/<student>/<assignment> before it makes the new one, and again when that fails: a
sandbox that cannot be built on a bad day would cost the result of a good one. And a run that was killed leaves
a sanitised notebook there, which nbgrader takes for a result from then on.
"""

import contextlib
import os
import shutil
from pathlib import Path


class EarlierResult:
    """One directory, or one notebook of it, put aside under a name that nbgrader's patterns do not match.

    Where there was none, an empty file of that name says so. A run that was killed leaves either behind; the
    next run finds it, drops what is half made, and puts the earlier result back.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._aside = path.with_name(f".{path.name}.before")
        if os.path.lexists(self._aside):
            _remove(self._path)
            self._put_back()

    def put_aside(self) -> None:
        """Out of nbgrader's way, on the same file system, in one step."""
        if _is_result(self._path):
            os.rename(self._path, self._aside)
        else:
            self._aside.parent.mkdir(parents=True, exist_ok=True)
            self._aside.touch()

    def settle(self) -> None:
        """Drop it if there is a new result, put it back if there is none (nbgrader removes what failed)."""
        if self._path.exists():
            _remove(self._aside)
        else:
            self._put_back()

    def _put_back(self) -> None:
        if _is_result(self._aside):
            os.rename(self._aside, self._path)
        else:
            _remove(self._aside)


def _is_result(path: Path) -> bool:
    """A directory, or a notebook, which is never empty."""
    return not path.is_symlink() and (path.is_dir() or (path.is_file() and path.stat().st_size > 0))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
