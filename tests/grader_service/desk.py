"""What tests of jobs do to a store: a clock that they set, jobs that they bring where they want them."""

import dataclasses
from typing import Any

from participants import GIB, new_job
from sqlalchemy import Engine, text

from grader_service.database import writing
from grader_service.jobs import Claimed, JobStore
from grader_service.models import JOBS, Job, State

DAY_SECONDS = 86_400.0
LEASE_SECONDS = 30.0


@dataclasses.dataclass
class Clock:
    """Time that passes when a test says so."""

    now: float = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclasses.dataclass(frozen=True)
class Desk:
    """A store, its clock, and a host with 8 GiB that may run jobs of three courses."""

    store: JobStore
    clock: Clock

    def add(self, **different: Any) -> str:
        return self.store.add(new_job(**different))[0].id

    def claim(self, **different: Any) -> Claimed | None:
        host: dict[str, Any] = {
            "courses": {"algebra": 0, "biology": 0, "chemistry": 0},
            "memory_free": 8 * GIB,
            "memory_total": 8 * GIB,
            "lease_seconds": LEASE_SECONDS,
        }
        return self.store.claim(**{**host, **different})

    def started(self, **different: Any) -> str | None:
        """The id of the next job, which runs from now on."""
        claimed = self.claim(**different)
        return claimed.job.id if claimed else None

    def run(self) -> tuple[str, str]:
        """Id and lease of the next job."""
        claimed = self.claim()
        assert claimed is not None
        return claimed.job.id, claimed.lease

    def job(self, job_id: str) -> Job:
        job = self.store.get(job_id)
        assert job is not None
        return job

    def why(self, job_id: str, **different: Any) -> str | None:
        host: dict[str, Any] = {"courses": {"algebra": 0}, "memory_free": 8 * GIB, "memory_total": 8 * GIB}
        return self.store.why_waiting(self.job(job_id), **{**host, **different})

    def bring(self, state: State) -> tuple[str, str]:
        """A job in this state, and the lease under which it ran, if it did."""
        job_id = self.add()
        if state == "queued":
            return job_id, "none"
        if state == "cancelled":
            self.store.cancel(job_id)
            return job_id, "none"
        claimed, lease = self.run()
        assert claimed == job_id
        if state in ("done", "failed"):
            assert self.store.finish(job_id, lease, state, "its reason", state == "done")
        return job_id, lease


def values(job: Job) -> dict[str, Any]:
    """Everything that the row says."""
    return {column.name: getattr(job, column.name) for column in JOBS.columns}


def multiply(engine: Engine, count: int) -> None:
    """So many more of each job that does not run, behind those that are there."""
    names = ", ".join(c.name for c in JOBS.columns if c.name not in ("sequence", "id", "idempotency_key"))
    statement = f"""
        WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count})
        INSERT INTO jobs (id, {names})
        SELECT id || '-{count}-' || i, {names} FROM n CROSS JOIN jobs WHERE state <> 'running' ORDER BY i, sequence
    """
    with writing(engine) as connection:
        connection.execute(text(statement))
