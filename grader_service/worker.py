"""Run one job by its id, in a process of its own, on any host that sees the database and the data directory.

    dispatcher --Task--> engine --> run() here --> isolate.notebook.execute --> result files --> one row is ended

A task carries the lease under which it was claimed. When the row names another lease, or none, this process is
nobody: it ends at once, and its sandboxes with it. Nothing is told back but by the database.
"""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import nbformat
from sqlalchemy.exc import SQLAlchemyError

from grader_service import policies
from grader_service.bundles import KEPT, NOTEBOOK, REPORT, Bundles
from grader_service.database import open_engine, retrying
from grader_service.jobs import JobStore
from grader_service.models import Job
from grader_service.progress import ProgressWriter
from grader_service.schemas import State, Submission
from grader_service.settings import CourseSettings
from isolate.notebook import Execution, Settings, execute, to_bytes
from isolate.policy import LASTING, SandboxError
from isolate.rooms import driver_limits

LOST_LEASE_CODE, TOO_LATE_CODE = 75, 70
"""Exit codes of a worker whose job is somebody else's by now, and of one that hangs; see EX_TEMPFAIL and EX_SOFTWARE in
sysexits.h."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What a worker is told. Everything else it finds by the job's id."""

    job_id: str
    lease: str
    database_url: str
    data_directory: Path
    course: CourseSettings
    max_attempts: int
    watch_seconds: float = 2.0
    """How often to look whether the job is still ours: the longest that a cancelled job runs on."""
    grace_seconds: float = 300.0
    """For all that is not a sandbox's: reading the bundle, writing the result."""


def run(task: Task) -> None:
    """Execute the job and end its row, or put it back when the fault is the host's.

    Returns without an exception when the row is taken care of. An exception, or the death of this process, leaves
    the row to the dispatcher or to the lease's end.
    """
    store, bundles = JobStore(open_engine(task.database_url)), Bundles(task.data_directory)
    job = retrying(lambda: store.get(task.job_id))
    if job is None or not retrying(lambda: store.holds(task.job_id, task.lease)):
        return
    with _watching(store, task):
        try:
            _execute(task, bundles, job)
        except policies.Refused as error:
            _end(store, task, "failed", str(error), result=False)
        except SandboxError as error:
            if error.layer in LASTING | {"kernel"}:
                _end(store, task, "failed", str(error), result=False)
            else:
                reason = str(error)
                retrying(lambda: store.release(task.job_id, task.lease, reason, task.max_attempts))
        else:
            _end(store, task, "done", "", result=True)


def _execute(task: Task, bundles: Bundles, job: Job) -> None:
    asked = Submission.model_validate_json(json.dumps(job.asked))
    kernel, policy = policies.plan(job.course, task.course, policies.Asked(asked.kernel, asked.limits))
    kernel = dataclasses.replace(kernel, argv=[*kernel.argv, *asked.kernel_arguments])
    policy = dataclasses.replace(
        policy,
        environment={**policy.environment, **_variables(asked, task.course)},
        limits=policies.as_counted(policy.limits, job.memory_bytes),
    )
    notebook_path, files_path = bundles.bundle(task.job_id)
    notebook = _read(notebook_path)
    progress = ProgressWriter(bundles.progress(task.job_id, task.lease))
    with tempfile.TemporaryFile() as keep, bundles.make_result(task.job_id, task.lease) as result:
        files = open(files_path, "rb") if files_path else None
        try:
            execution = execute(
                notebook,
                kernel,
                policy,
                Settings(**asked.settings.model_dump(exclude_unset=True)),
                files=files,
                keep=keep if asked.keep_files else None,
                skip=asked.skip,
                timeouts=asked.timeouts,
                progress=progress,
            )
        finally:
            progress.close()
            if files is not None:
                files.close()
        _write(result, execution, keep if asked.keep_files else None)


def _read(path: Path) -> Any:
    """Raises `policies.Refused`, which ends the job: the second time it would be no better."""
    try:
        notebook = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
        nbformat.validate(notebook)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, nbformat.ValidationError) as error:
        # Not its words: they quote the notebook.
        raise policies.Refused(f"the notebook cannot be read ({type(error).__name__})") from error
    return notebook


def _variables(asked: Submission, course: CourseSettings) -> dict[str, str]:
    return {name: value for name, value in asked.environment.items() if name not in course.environment_variables}


def _write(directory: Path, execution: Execution, keep: IO[bytes] | None) -> None:
    _put(directory / NOTEBOOK, io.BytesIO(to_bytes(execution.notebook)))
    _put(directory / REPORT, io.BytesIO(json.dumps(execution.report.as_dict()).encode()))
    if keep is not None and keep.seek(0, os.SEEK_END):
        keep.seek(0)
        _put(directory / KEPT, keep)


def _put(path: Path, data: IO[bytes]) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        shutil.copyfileobj(data, file)


def _end(store: JobStore, task: Task, state: State, reason: str, *, result: bool) -> None:
    retrying(lambda: store.finish(task.job_id, task.lease, state, reason, result))


@contextlib.contextmanager
def _watching(store: JobStore, task: Task) -> Iterator[None]:
    """End this process as soon as the job is not ours any more: cancelled, or run again by somebody else.

    And when it takes longer than any sandbox of the course may: then it is not the sandbox that hangs.
    """
    stop = threading.Event()
    deadline = time.monotonic() + 2 * driver_limits(task.course.maximum_limits).wall_seconds + task.grace_seconds

    def watch() -> None:
        while not stop.wait(task.watch_seconds):
            if time.monotonic() > deadline:
                os._exit(TOO_LATE_CODE)
            with contextlib.suppress(SQLAlchemyError):  # away for minutes: whose the job is, it says when it is back
                if not retrying(lambda: store.holds(task.job_id, task.lease), stop=stop) and not stop.is_set():
                    os._exit(LOST_LEASE_CODE)

    thread = threading.Thread(target=watch, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()


Runner = Callable[[Task], None]
