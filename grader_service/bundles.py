"""The files of jobs: what was submitted, how far it is, what came out. Below one directory that is the service's alone.

    incoming/<random>/            being received, or being removed; never looked at, removed when its client is gone
    jobs/<id>/notebook, files     the bundle; complete before the job's row is written
    jobs/<id>/progress-<lease>    events of one attempt (`grader_service.progress`)
    jobs/<id>/result-<lease>/     what one attempt made; counts if the row names this lease

Whatever appears under its final name is complete and on disk: written beside, fsynced, renamed, the directory
fsynced. Any host that sees this directory and the database can run a job by its id.
"""

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_LEASE = re.compile(r"[A-Za-z0-9_-]{8,100}")
NOTEBOOK, REPORT, KEPT = "notebook.ipynb", "report.json", "kept.tar"
LEAST_FREE_BYTES = 1 << 30
"""With less, nothing is accepted and nothing started: a job that fails for want of room has not had its turn."""


class Bundles:
    """The data directory of a service."""

    def __init__(self, directory: Path) -> None:
        self._incoming, self._jobs = directory / "incoming", directory / "jobs"
        for path in (directory, self._incoming, self._jobs):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextlib.contextmanager
    def upload(self) -> Iterator[Path]:
        """An empty directory to receive into; what is still in it at the end goes."""
        path = self._incoming / secrets.token_hex(16)
        path.mkdir(mode=0o700)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def admit(self, received: Path, job_id: str) -> None:
        """Make what was received the bundle of this job. Its files are fsynced already."""
        os.utime(received)  # a slow upload is no orphan of the past between here and its row
        sync(received)
        os.rename(received, self._directory(job_id))
        sync(self._jobs)

    def bundle(self, job_id: str) -> tuple[Path, Path | None]:
        """The notebook and, if any, the archive of the files beside it."""
        directory = self._directory(job_id)
        files = directory / "files"
        return directory / "notebook", files if files.exists() else None

    def progress(self, job_id: str, lease: str) -> Path:
        """Where one attempt tells how far it is."""
        return self._directory(job_id) / f"progress-{_checked(_LEASE, lease)}"

    @contextlib.contextmanager
    def make_result(self, job_id: str, lease: str) -> Iterator[Path]:
        """A directory to write a result into; it is complete and on disk when the block ends without an exception."""
        final = self.result(job_id, lease)
        partial = final.with_name(f".{final.name}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=0o700)
        try:
            yield partial
            for path in partial.iterdir():
                sync(path)
            sync(partial)
            os.rename(partial, final)
            sync(final.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def result(self, job_id: str, lease: str) -> Path:
        """The directory with what this attempt made."""
        return self._directory(job_id) / f"result-{_checked(_LEASE, lease)}"

    def forget_all_but(self, job_id: str, lease: str | None) -> None:
        """After the end: the bundle and other attempts go, the result and its progress stay."""
        kept = {f"result-{lease}", f"progress-{lease}"} if lease else set()
        with contextlib.suppress(FileNotFoundError):
            for path in list(self._directory(job_id).iterdir()):
                if path.name not in kept:
                    _remove(path)

    def remove(self, job_id: str) -> bool:
        """Everything of this job. Whether there was anything. Raises `OSError` when it cannot be removed.

        It is moved away first: of several who remove it, one does, and a worker that still writes finds no place.
        """
        moved = self._incoming / secrets.token_hex(16)
        try:
            os.rename(self._directory(job_id), moved)
        except FileNotFoundError:
            return False
        _remove(moved)
        return True

    def sweep(self, known: Iterable[str], older_than_seconds: float) -> int:
        """Remove what no row knows and no client can be sending any more: left by a crash. How many."""
        names, limit, count = set(known), time.time() - older_than_seconds, 0
        for parent, kept in ((self._incoming, set[str]()), (self._jobs, names)):
            for path in list(parent.iterdir()):
                with contextlib.suppress(FileNotFoundError):
                    touched = _touched(path) if parent == self._incoming else path.lstat().st_mtime
                    if path.name not in kept and touched < limit:
                        _remove(path)
                        count += 1
        return count

    def ids(self) -> list[str]:
        """Jobs that have a directory."""
        return [name for name in os.listdir(self._jobs) if _ID.fullmatch(name)]

    def free_bytes(self) -> int:
        return shutil.disk_usage(self._jobs).free

    @property
    def is_full(self) -> bool:
        """Whether there is too little room to go on."""
        return self.free_bytes() < LEAST_FREE_BYTES

    def _directory(self, job_id: str) -> Path:
        return self._jobs / _checked(_ID, job_id)


def is_job_id(text: str) -> bool:
    """Whether this can be the id of a job at all, and hence the name of a directory."""
    return _ID.fullmatch(text) is not None


def sync(path: Path) -> None:
    """Bring a file or a directory's entries to disk. fsync(2)"""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checked(pattern: re.Pattern[str], text: str) -> str:
    if not pattern.fullmatch(text):
        raise ValueError("not a name of ours")
    return text


def _touched(path: Path) -> float:
    """When something was last received here; a directory does not tell of writing to its files."""
    times = [path.lstat().st_mtime]
    with contextlib.suppress(NotADirectoryError):
        times += [entry.stat(follow_symlinks=False).st_mtime for entry in os.scandir(path)]
    return max(times)


def _remove(path: Path) -> None:
    """Also if somebody else removes it at the same time."""

    def failed(_function: Any, _path: str, cause: Any) -> None:
        if not isinstance(cause[1], FileNotFoundError):
            raise cause[1]

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, onerror=failed)
    else:
        path.unlink(missing_ok=True)
