"""Submitting: a copy that instructors can read and no other student can, visible when complete, and a receipt."""

import contextlib
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from nbgrader.exchange import default

from nbgrader_aalto import deposit, trees
from nbgrader_aalto.exchange.base import AaltoExchange
from nbgrader_aalto.exchange.names import assignment_problem, file_problem
from nbgrader_aalto.exchange.receipts import FILE, UNCONFIRMED, Receipt
from nbgrader_aalto.exchange.stamps import format_time, new_name
from nbgrader_aalto.inspection import printable


class ExchangeSubmit(AaltoExchange, default.ExchangeSubmit):
    """nbgrader's, with the copying done by `deposit`.

    The copy is made under a hidden name in inbound and renamed when it is complete, which never changes its group.
    The time in its name is the file server's, taken from the last file that was written.
    """

    def init_src(self) -> None:
        """As in nbgrader."""
        self.refuse_file_system_root()
        super().init_src()

    def init_dest(self) -> None:
        """As in nbgrader, and the student must be hidden behind inbound's modes before anything is written."""
        super().init_dest()
        self.student_id = self.username() if self.coursedir.student_id == "*" else self.coursedir.student_id
        if problem := assignment_problem(self.coursedir.assignment_id):
            self.fail(f"This assignment's name cannot be submitted: {problem}")
        status = os.stat(self.inbound_path)
        if self.identity == "unix" and (not status.st_mode & stat.S_ISVTX or status.st_mode & stat.S_IROTH):
            self.fail(
                f"Others could read or delete your submission in {self.inbound_path} "
                f"(mode {status.st_mode & 0o7777:o}). Nothing was submitted. Please tell your instructor to run "
                "`nbgrader-aalto course repair`"
            )

    def copy_files(self) -> None:
        """Raises `ExchangeError`; then nothing was submitted, and earlier submissions are as they were."""
        self.init_release()
        self.check_filename_diff()
        self.log.info("Source: %s", self.src_path)
        inbound, hidden = Path(self.inbound_path), f".{secrets.token_urlsafe(15)}"
        self._clean_up()
        try:
            with self._pending(hidden) as note:
                made = deposit.copy(
                    *(inbound, hidden, Path(self.src_path), self.selection(), self.tree_limits(), note),
                    hidden=self.identity == "unix",
                )
                self._refuse_names(inbound, hidden, made)
                name, receipt = self._finish(inbound, hidden, made)
        except (deposit.DepositError, OSError) as error:
            self.fail(
                f"'{self.coursedir.assignment_id}' was NOT submitted: {error}. What you submitted before is still "
                "there. Try again; if it stays so, tell your instructor this message"
            )
            raise
        for path, why in made.left_out:
            told = self.log.error if path.endswith(".ipynb") else self.log.warning
            told("Not submitted: %s %s", path, why)
        self.log.info("Destination: %s", inbound / name)
        self._remember(inbound / name, receipt)
        self.log.info("Submitted as: %s %s %s", receipt.course, receipt.assignment, receipt.time)
        self.log.info(
            "Receipt (unconfirmed until it is collected): %d files, sha256 %s", len(receipt.files), receipt.digest
        )

    def _refuse_names(self, inbound: Path, hidden: str, made: deposit.Deposit) -> None:
        """Now, and not when somebody collects: the student is here. Raises `deposit.DepositError`."""
        paths = (*made.directories, *(file.path for file in made.files))
        problems = [f"{printable(path)!r} {problem}" for path in paths if (problem := file_problem(path))]
        if problems:
            shutil.rmtree(inbound / hidden, ignore_errors=True)
            raise deposit.DepositError("; ".join(problems[:5]))

    def _finish(self, inbound: Path, hidden: str, made: deposit.Deposit) -> tuple[str, Receipt]:
        """The last file and the visible name."""
        timestamp = format_time(made.newest_ns, self.timezone, self.timestamp_format)
        name = new_name(self.student_id, self.coursedir.assignment_id, timestamp, random=self.add_random_string)
        try:
            with trees.reached(inbound) as parent, trees.opened(hidden, dir_fd=parent) as directory:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink("timestamp.txt", dir_fd=directory)  # of an earlier submission that was fetched back
                trees.write_file("timestamp.txt", timestamp.encode(), dir_fd=directory, mode=0o660)
                files = (
                    *(file for file in made.files if file.path != "timestamp.txt"),
                    trees.entry_of("timestamp.txt", timestamp.encode()),
                )
                os.fsync(directory)
                if not self.add_random_string and os.path.lexists(inbound / name):
                    raise FileExistsError(17, "a submission of this name exists", name)
                os.rename(hidden, name, src_dir_fd=parent, dst_dir_fd=parent)
        except BaseException:
            shutil.rmtree(inbound / hidden, ignore_errors=True)
            raise
        files = tuple(sorted(files, key=lambda file: file.path))
        receipt = Receipt(
            UNCONFIRMED,
            self.coursedir.course_id,
            self.coursedir.assignment_id,
            self.student_id,
            name,
            timestamp,
            trees.digest_of(files),
            files,
        )
        return name, receipt

    def _remember(self, submission: Path, receipt: Receipt) -> None:
        """The student's own record, which `nbgrader list --cached` shows. The submission stands without it."""
        cached = Path(self.cache_path) / f"{receipt.student}+{receipt.assignment}+{receipt.time}"
        new = cached.with_name(f".{secrets.token_hex(6)}.new")
        try:
            new.mkdir(parents=True)
            with trees.opened(submission) as source, trees.opened(new) as target:
                trees.copy_tree(source, target, trees.EVERYTHING, self.tree_limits(), own=True)
            (new / FILE).write_bytes(receipt.to_json())
            os.rename(new, cached)
        except (OSError, trees.Unfit) as error:
            shutil.rmtree(new, ignore_errors=True)
            self.log.error("Submitted, but your own record of it could not be written in %s: %s", self.cache, error)
        try:
            self.own_boxes().ensure(self.username())
        except (OSError, deposit.DepositError) as error:
            self.log.error("Submitted, but no box for your feedback could be made: %s", error)

    @property
    def _notes(self) -> Path:
        return Path(self.cache, ".pending", self.coursedir.course_id)

    @contextlib.contextmanager
    def _pending(self, hidden: str) -> Iterator[int]:
        """Note the hidden name while it may be there, locked: if we die, the next submit removes it."""
        self._notes.mkdir(parents=True, exist_ok=True)
        note = self._notes / hidden
        descriptor = os.open(note, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with contextlib.suppress(OSError):  # where there are no locks, nobody removes anything
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            if not os.path.lexists(Path(self.inbound_path) / hidden):
                note.unlink(missing_ok=True)
            os.close(descriptor)

    def _clean_up(self) -> None:
        """Remove what an earlier submit of ours, which was killed, left in inbound."""
        for name in os.listdir(self._notes) if self._notes.is_dir() else []:
            note, left = self._notes / name, Path(self.inbound_path) / name
            with contextlib.suppress(OSError), open(note, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.lexists(left) and os.lstat(left).st_uid == os.geteuid():
                    shutil.rmtree(left, ignore_errors=True)
                if not os.path.lexists(left):
                    note.unlink(missing_ok=True)
