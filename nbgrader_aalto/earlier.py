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
    """One directory, put aside under a name that nbgrader's patterns do not match.

    Where there was none, an empty file of that name says so. A run that was killed leaves either behind; the
    next run finds it, drops what is half made, and puts the earlier result back.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._aside = directory.with_name(f".{directory.name}.before")
        if os.path.lexists(self._aside):
            _remove(self._directory)
            self._put_back()

    def put_aside(self) -> None:
        """Out of nbgrader's way, on the same file system, in one step."""
        if self._directory.is_dir() and not self._directory.is_symlink():
            os.rename(self._directory, self._aside)
        else:
            self._aside.parent.mkdir(parents=True, exist_ok=True)
            self._aside.touch()

    def settle(self) -> None:
        """Drop it if there is a new result, put it back if there is none (nbgrader removes what failed)."""
        if self._directory.exists():
            _remove(self._aside)
        else:
            self._put_back()

    def _put_back(self) -> None:
        if self._aside.is_dir() and not self._aside.is_symlink():
            os.rename(self._aside, self._directory)
        else:
            _remove(self._aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
