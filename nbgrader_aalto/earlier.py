"""An earlier autograded result, kept until the new one is complete.

nbgrader removes autograded/<student>/<assignment> before it makes the new one, and again when that fails: a
sandbox that cannot be built on a bad day would cost the result of a good one.
"""

import os
import shutil
from pathlib import Path


class EarlierResult:
    """One directory, put aside under a name that nbgrader's patterns do not match.

    A run that was killed leaves it aside; the next run finds it there and puts it back first.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._aside = directory.with_name(f".{directory.name}.before")
        if self._aside.is_dir() and not self._aside.is_symlink():
            self._settle_killed_run()

    def _settle_killed_run(self) -> None:
        if self._directory.exists():
            shutil.rmtree(self._directory)  # half-made by the run that was killed
        os.rename(self._aside, self._directory)

    def put_aside(self) -> None:
        """Out of nbgrader's way, on the same file system, in one step."""
        if self._directory.is_dir() and not self._directory.is_symlink():
            os.rename(self._directory, self._aside)

    def settle(self) -> None:
        """Drop it if there is a new result, put it back if there is none (nbgrader removes what failed)."""
        if not self._aside.is_dir():
            return
        if self._directory.exists():
            shutil.rmtree(self._aside)
        else:
            os.rename(self._aside, self._directory)
