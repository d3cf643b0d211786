"""Releasing an assignment: students see the version before or the version after, and any instructor may do it."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbgrader.exchange import default

from nbgrader_aalto import earlier, lock, trees
from nbgrader_aalto.exchange.base import (
    COURSE_MODE,
    HIDDEN_MODE,
    OUTBOUND_MODE,
    RELEASED_DIRECTORY,
    RELEASED_FILE,
    AaltoExchange,
)
from nbgrader_aalto.exchange.names import assignment_problem, file_problem, notebook_problem
from nbgrader_aalto.turns import turn


class ExchangeReleaseAssignment(AaltoExchange, default.ExchangeReleaseAssignment):
    """nbgrader's, with modes that hide what must be hidden and without a moment in which nothing is released."""

    def ensure_root(self) -> None:
        """Make the root if it is missing; one of our own that students cannot enter, or where they could move a course
        away, is mended."""
        root = Path(self.root)
        try:
            if not root.exists():
                self.log.warning("Creating exchange directory: %s", root)
                root.mkdir(parents=True)
                root.chmod(0o755)
            mode = stat.S_IMODE(root.stat().st_mode)
            wanted = mode | 0o755 | (stat.S_ISVTX if mode & 0o022 else 0)
            if mode != wanted and root.stat().st_uid == os.geteuid():
                self.log.warning("Permissions of %s: changing them from %o to %o", root, mode, wanted)
                root.chmod(wanted)
        except OSError as error:
            self.fail(f"Could not prepare {root}: {error.strerror}. An administrator runs nbgrader-aalto course create")

    def init_src(self) -> None:
        """As in nbgrader; a name that would break later steps is refused here."""
        self.prepare_course()
        if problem := assignment_problem(self.coursedir.assignment_id):
            self.fail(f"'{self.coursedir.assignment_id}' cannot be released: {problem}")
        course, assignment = self.coursedir, self.coursedir.assignment_id
        with self._turn():
            earlier.recover(Path(course.format_path(course.release_directory, ".", assignment)))
        super().init_src()
        for directory, _, names in os.walk(self.src_path):
            for name in names:
                relative = os.path.relpath(os.path.join(directory, name), self.src_path)
                stem = name.removesuffix(".ipynb")
                problem = notebook_problem(stem) if stem != name else file_problem(relative)
                if problem:
                    self.fail(f"'{self.coursedir.assignment_id}' cannot be released: {relative!r} {problem}")

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """While nobody generates the assignment. Raises `ExchangeError`."""
        course, assignment = self.coursedir, self.coursedir.assignment_id
        whose = (Path(course.root), course.release_directory, ".", assignment)
        try:
            with turn(
                *whose, purpose=f"releasing '{assignment}'", wait_seconds=self.lock_seconds, log=self.log.warning
            ):
                yield
        except (lock.Busy, lock.LockLost, OSError) as error:
            self.fail(f"'{assignment}' cannot be released now: {error}")

    def init_dest(self) -> None:
        """Make the course's places in the exchange, or mend the modes of one's own. Raises `ExchangeError`."""
        if self.coursedir.course_id == "":
            self.fail("No course id specified. Re-run with --course flag.")
        self.ensure_root()
        places = self.places
        self.course_path, self.outbound_path = str(places.course), str(places.outbound)
        self.inbound_path = str(places.inbound)
        self.dest_path = str(places.outbound / self.coursedir.assignment_id)
        self.ensure_directory(self.course_path, COURSE_MODE)
        self._refuse_movable()
        self.ensure_directory(self.outbound_path, OUTBOUND_MODE)
        self.ensure_directory(self.inbound_path, HIDDEN_MODE)
        self.ensure_directory(str(places.feedback), HIDDEN_MODE)

    def ensure_directory(self, path: Any, mode: int) -> None:
        """A directory of this mode and of the course's group. Another instructor's is taken as it is if it is right."""
        try:
            made = not os.path.isdir(path)
            if made:
                os.mkdir(path)
            status = os.stat(path)
            mine = status.st_uid == os.geteuid()
            expected = self._expected_gid()
            if mine and expected is not None and status.st_gid != expected and expected in os.getgroups():
                os.chown(path, -1, expected)
            if mine and stat.S_IMODE(os.stat(path).st_mode) != mode:
                os.chmod(path, mode)
        except OSError as error:
            self.fail(f"{path}: {error.strerror}. See `nbgrader-aalto course check`")
        status = os.stat(path)
        if mode == HIDDEN_MODE and (status.st_mode & 0o7007) != mode & 0o7007:
            self.fail(
                f"{path} has the mode {stat.S_IMODE(status.st_mode):o}, so that submissions would not be hidden. "
                f"Its owner (uid {status.st_uid}) runs: chmod {mode:o} '{path}'"
            )
        self._refuse_common_group(path, status.st_gid)

    def copy_files(self) -> None:
        """Raises `ExchangeError`; then what was released before is still there."""
        course, assignment = self.coursedir.course_id, self.coursedir.assignment_id
        path = Path(self.dest_path)
        with self.locked(f"releasing '{assignment}'") as held, self._turn():
            trees.recover(path)
            if path.is_dir() and not self.force:
                self.fail(f"Destination already exists, add --force to overwrite: {course} {assignment}")
            self.log.info("Source: %s", self.src_path)
            self.log.info("Destination: %s", path)
            new = trees.beside(path)
            try:
                new.mkdir()
                with trees.opened(self.src_path) as source, trees.opened(new) as target:
                    copied = trees.copy_tree(source, target, self.selection(), self.tree_limits(), own=True)
                for directory, _, names in os.walk(new):
                    for name in names:
                        os.chmod(os.path.join(directory, name), RELEASED_FILE)
                    os.chmod(directory, RELEASED_DIRECTORY)
                held.check()
                if path.is_dir():
                    self.log.info("Overwriting files: %s %s", course, assignment)
                for left in trees.put_in_place(new, path):
                    self.log.warning("The version before could not be removed whole: %s", left)
            except (OSError, trees.Unfit) as error:
                self.fail(
                    f"'{assignment}' was not released: {error}. What was released before is unchanged. "
                    "See `nbgrader-aalto course check`"
                )
            finally:
                if os.path.lexists(new):
                    trees.remove(new)
        for name, why in copied.left_out:
            self.log.warning("Not released: %s %s", name, why)
        self.log.info("Released as: %s %s", course, assignment)
