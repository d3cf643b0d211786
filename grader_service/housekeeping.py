"""Deletes what is over: bundles of ended jobs, results after their retention, what a crash left behind.

Jobs that nobody starts end here, too, so that theirs is over some day.

A thread of its own, since it looks at every job's directory, and leases are not to wait for it. What is deleted is
decided by rows; files go first, so that a crash in between leaves a row that leads here again.
"""

import threading
import time
from collections.abc import Mapping

import structlog
from sqlalchemy.exc import SQLAlchemyError

from grader_service.bundles import Bundles
from grader_service.jobs import JobStore
from grader_service.models import ENDED

_RETENTION_SECONDS = 60.0
_TIDY_SECONDS = 3600.0
_ORPHAN_SECONDS = 3600.0
"""How old a directory without a row is when no client can be sending it any more."""
_BATCH = 500

log = structlog.get_logger("housekeeping")


class Housekeeper:
    """For as long as a service runs. Several services may keep the same house."""

    def __init__(self, store: JobStore, bundles: Bundles) -> None:
        self._store, self._bundles = store, bundles
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="housekeeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns when nothing is being deleted."""
        self._stopping.set()
        self._thread.join()

    def _loop(self) -> None:
        next_tidy = 0.0
        while not self._stopping.is_set():
            try:
                self._give_up()
                self._end_retention()
                if time.monotonic() >= next_tidy:
                    self._tidy_all()
                    next_tidy = time.monotonic() + _TIDY_SECONDS
            except (SQLAlchemyError, OSError) as error:
                log.warning("housekeeping_put_off", error=type(error).__name__)
            self._stopping.wait(_RETENTION_SECONDS)

    def _give_up(self) -> None:
        while (jobs := self._store.give_up(_BATCH)) and not self._stopping.is_set():
            for job_id in jobs:
                tidy(self._store, self._bundles, job_id)
            log.warning("jobs_never_started", jobs=len(jobs))

    def _end_retention(self) -> None:
        while (jobs := self._store.over_retention(_BATCH)) and not self._stopping.is_set():
            gone = []
            for job in jobs:
                try:
                    self._bundles.remove(job.id)
                    gone.append(job.id)
                except OSError as error:
                    log.error("files_not_removed", job=job.id, error=type(error).__name__)
            self._store.delete(gone)
            log.info("retention_ended", jobs=len(gone))
            if len(gone) < len(jobs):
                return  # until next time

    def _tidy_all(self) -> None:
        known = []
        for job_id in self._bundles.ids():
            if self._stopping.is_set():
                return
            if tidy(self._store, self._bundles, job_id):
                known.append(job_id)
        if count := self._bundles.sweep(known, _ORPHAN_SECONDS):
            log.info("orphans_removed", count=count)


def tidy(store: JobStore, bundles: Bundles, job_id: str) -> bool:
    """Of a job that has ended, leave its result and nothing else. Whether there is such a job at all."""
    job = store.get(job_id)
    if job is not None and job.state in ENDED:
        try:
            bundles.forget_all_but(job_id, job.result)
        except OSError as error:  # a worker still wrote; the housekeeper comes by again
            log.warning("files_not_removed", job=job_id, error=type(error).__name__)
    return job is not None


def purge_student(store: JobStore, bundles: Bundles, student: str) -> Mapping[str, int]:
    """Delete everything of one person in this service, running jobs included. How many jobs, by course."""
    found: dict[str, int] = {}
    for job in store.of_student(student):
        store.cancel(job.id)  # a worker ends when it sees that; without its directory it can write nothing more
        bundles.remove(job.id)
        store.delete([job.id])
        found[job.course] = found.get(job.course, 0) + 1
    return found
