"""Takes jobs from the database and gives them to the engine; keeps their leases; clears up after what died.

One thread. It holds nothing that is not in the database but the futures of what it has started, so that it may be
killed at any moment: leases of a dead service end by themselves, and its jobs run again.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future

import structlog
from sqlalchemy.exc import SQLAlchemyError

from grader_service import worker
from grader_service.bundles import Bundles
from grader_service.engines import WorkerDied
from grader_service.housekeeping import tidy
from grader_service.jobs import Claimed, JobStore
from grader_service.settings import CourseSettings, Settings
from grader_service.worker import Task

_POLL_SECONDS = 1.0
"""How long a job that another service accepted, or whose lease ended, may lie unseen."""
_BACK_OFF_SECONDS = 1.0

log = structlog.get_logger("dispatcher")


class Dispatcher:
    """Starts jobs while cores and memory allow. `changed` is called with a job's id whenever its row has changed."""

    def __init__(
        self,
        settings: Settings,
        store: JobStore,
        bundles: Bundles,
        engine: Executor,
        changed: Callable[[str], None] = lambda job_id: None,
        run: worker.Runner = worker.run,
    ) -> None:
        self._settings, self._store, self._bundles, self._engine = settings, store, bundles, engine
        self._changed, self._run = changed, run
        self._held: dict[str, tuple[Claimed, Future[None]]] = {}
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._loop, name="dispatcher", daemon=True)
        self._next_renewal = 0.0
        self.healthy_at = time.monotonic()

    def reload(self, settings: Settings) -> None:
        """Other courses and limits from the next start on; what runs, runs on under those that it began with."""
        self._settings = settings
        self.wake()

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There may be something to start."""
        self._wake.set()

    def stop(self) -> None:
        """Start nothing more, and put what runs back into the queue."""
        self._stopping.set()
        self.wake()
        self._thread.join()
        self._engine.shutdown(wait=True, cancel_futures=True)
        for claimed, _ in self._held.values():  # of what has ended, nothing is released
            with contextlib.suppress(SQLAlchemyError):  # then its lease ends by itself
                self._store.release(claimed.job.id, claimed.lease, "the service was stopped", max_attempts=0)
        self._held.clear()

    @property
    def memory_free(self) -> int:
        """Bytes that no running job of this service may take."""
        return self._settings.memory_bytes - sum(claimed.job.memory_bytes for claimed, _ in list(self._held.values()))

    @property
    def slots_free(self) -> int:
        return self._settings.slots - len(self._held)

    def _loop(self) -> None:
        while not self._stopping.is_set():
            try:
                self._reap()
                self._keep_leases()
                self._start_what_fits()
                self.healthy_at = time.monotonic()
            except SQLAlchemyError as error:
                log.warning("database_unavailable", error=type(error).__name__)
                self._stopping.wait(_BACK_OFF_SECONDS)
                continue
            except Exception as error:  # noqa: BLE001  # a full disk, no descriptors, a fault of ours: the others go on
                log.error("cannot_start_jobs", error=type(error).__name__, errno=getattr(error, "errno", None))
                self._stopping.wait(_BACK_OFF_SECONDS)
                continue
            self._wake.wait(_POLL_SECONDS)
            self._wake.clear()

    def _start_what_fits(self) -> None:
        while self.slots_free > 0 and not self._stopping.is_set() and not self._bundles.is_full:
            settings = self._settings  # which a reload may replace at any moment
            claimed = self._store.claim(
                courses={name: course.concurrent_jobs for name, course in settings.courses.items()},
                memory_free=self.memory_free,
                memory_total=settings.memory_bytes,
                lease_seconds=settings.lease_seconds,
                ageing_seconds=settings.ageing_seconds,
            )
            if claimed is None:
                return
            self._begin(claimed, settings.courses[claimed.job.course])

    def _begin(self, claimed: Claimed, course: CourseSettings) -> None:
        task = Task(
            job_id=claimed.job.id,
            lease=claimed.lease,
            database_url=self._settings.database_url,
            data_directory=self._settings.data_directory,
            course=course,
            max_attempts=self._settings.max_attempts,
        )
        try:
            future = self._engine.submit(self._run, task)
        except OSError as error:
            self._store.release(claimed.job.id, claimed.lease, f"no worker could be started: {error}", max_attempts=0)
            raise
        self._held[claimed.job.id] = claimed, future
        future.add_done_callback(lambda _: self.wake())
        log.info("job_started", job=claimed.job.id, course=claimed.job.course, attempt=claimed.job.attempts)
        self._changed(claimed.job.id)

    def _reap(self) -> None:
        for job_id, (claimed, future) in list(self._held.items()):
            if not future.done():
                continue
            error = future.exception()
            if error is not None and (state := self._give_back(claimed, _words(error))) is not None:
                log.warning("job_attempt_failed", job=job_id, error=type(error).__name__, now=state)
            tidy(self._store, self._bundles, job_id)
            del self._held[job_id]
            log.info("job_left_engine", job=job_id)
            self._changed(job_id)

    def _give_back(self, claimed: Claimed, reason: str) -> str | None:
        return self._store.release(claimed.job.id, claimed.lease, reason, self._settings.max_attempts)

    def _keep_leases(self) -> None:
        now = time.monotonic()
        if now >= self._next_renewal:
            self._store.renew([claimed.lease for claimed, _ in self._held.values()], self._settings.lease_seconds)
            for job_id in self._store.expire_leases(self._settings.max_attempts):
                log.warning("job_lease_ended", job=job_id)
                self._changed(job_id)
            self._next_renewal = now + self._settings.lease_seconds / 3


def _words(error: BaseException) -> str:
    """For the job's reason: what an exception says may quote a notebook or a path."""
    return str(error) if isinstance(error, WorkerDied) else f"the worker failed ({str(error).partition(':')[0][:100]})"
