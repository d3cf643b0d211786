"""Fetching feedback from one's own boxes."""

import os
import shutil
from pathlib import Path
from typing import Any

from nbgrader.exchange import default

from nbgrader_aalto.exchange.base import AaltoExchange


class ExchangeFetchFeedback(AaltoExchange, default.ExchangeFetchFeedback):
    """Feedback for an assignment, into `<assignment>/feedback/<timestamp>/<notebook>.html` as in nbgrader."""

    def init_src(self) -> None:
        """Raises `ExchangeError` when there is no course."""
        if self.coursedir.course_id == "":
            self.fail("No course id specified. Re-run with --course flag.")
        self.refuse_file_system_root()
        self.src_path = str(self.places.feedback)
        if not os.path.isdir(self.places.course):
            self._assignment_not_found(self.src_path, os.path.join(self.root, "*"))
        self.ensure_box()
        assignment = self.coursedir.assignment_id
        self.feedback_files = [
            (one.notebook, one.timestamp, str(one.path))
            for one in self.own_boxes().feedback()
            if assignment in ("", one.assignment)
        ]
        for notebook, timestamp, _ in self.feedback_files:
            self.log.info(
                "Found feedback for '%s/%s/%s' submitted at %s",
                self.coursedir.course_id,
                assignment,
                notebook,
                timestamp,
            )
        if not self.feedback_files:
            self.log.warning(
                "There is no feedback for '%s/%s' yet. If your instructor has released it, it arrives here at the "
                "next collect or release",
                self.coursedir.course_id,
                assignment,
            )

    def do_copy(self, src: Any, dest: Any) -> None:
        """Each file complete or as it was before."""
        for notebook, timestamp, path in self.feedback_files:
            directory = Path(dest) / timestamp
            directory.mkdir(parents=True, exist_ok=True)
            html = directory / f"{notebook}.html"
            temporary = directory / f".{notebook[:100]}.new"
            shutil.copyfile(path, temporary)
            os.replace(temporary, html)
            self.log.info("Fetched feedback: %s", html)
