"""Fetching a released assignment: complete or not at all, with modes of the student's own."""

import os
from pathlib import Path
from typing import Any

from nbgrader.exchange import default

from nbgrader_aalto import deposit, trees
from nbgrader_aalto.exchange.base import AaltoExchange


class ExchangeFetchAssignment(AaltoExchange, default.ExchangeFetchAssignment):
    """nbgrader's, but files do not come with the instructors' modes, and a fetch that fails leaves nothing."""

    def init_src(self) -> None:
        """As in nbgrader; makes a box for feedback if the student has none."""
        self.refuse_file_system_root()
        super().init_src()
        self.ensure_box()

    def do_copy(self, src: Any, dest: Any) -> None:
        """Raises `ExchangeError`."""
        if os.path.isdir(self.dest_path):
            super().do_copy(src, dest)
            return
        path = Path(dest)
        new = trees.beside(path)
        try:
            new.mkdir(parents=True)
            with trees.opened(src) as source, trees.opened(new) as target:
                chosen = trees.Selection(tuple(self.coursedir.ignore))
                copied = trees.copy_tree(source, target, chosen, self.no_limits(), own=True)
            os.rename(new, path)
        except (OSError, trees.Unfit, deposit.DepositError) as error:
            trees.remove(new)
            self.fail(f"'{self.coursedir.assignment_id}' was not fetched: {error}")
        for name, why in copied.left_out:
            self.log.warning("Not fetched: %s %s", name, why)
