"""Jobs: accepted once, executed at least once, ended exactly once.

Theory of operation. A job is a row, and each of its changes is one UPDATE that names the state it starts from:

    queued --claim--> running --finish--> done | failed
       ^                 |  |
       +----release------+  +--cancel---> cancelled      (a queued job, too)

A claim writes a *lease* into the row, a random word, and a time until which its holder must renew it. Who holds
another lease than the row is nobody: its UPDATEs find no row. Leases that were not renewed are taken away by
`expire_leases`, which every service calls; the job is then in the queue again, at its old place, or ends as failed when
it was started too often. An ended job keeps the lease that ended it, so that `finish` may be said twice: the answer to
the first time may have been lost with the connection.

Times are those of the hosts' clocks, which must agree to within a few seconds: much less than a lease lasts.
All is synchronous and safe in threads. Refuses to know about files, HTTP, sandboxes, and who may do what.
"""

import dataclasses
import secrets
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from sqlalchemy import Connection, Engine, Select, delete, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from grader_service import order
from grader_service.database import one_claims, one_submits, reading, writing
from grader_service.models import ENDED, JOBS, Job, Kind, State

LONGEST_PAGE = 200
_DAY_SECONDS = 86_400.0
_ALIVE: tuple[State, ...] = ("queued", "running")
_COUNTED = 1000
"""How far the jobs before a waiting one are counted."""
_AT_ONCE = 500
"""How many values one statement names at most."""


class KeyReused(Exception):
    """The idempotency key belongs to another request of the same course."""


class QuotaExceeded(Exception):
    """The course has had its jobs for now."""

    def __init__(self, course: str, quota: int, retry_after_seconds: float) -> None:
        self.retry_after_seconds = retry_after_seconds
        super().__init__(
            f"the course {course} has submitted {quota} jobs in 24 hours, which is its quota; "
            f"the next is accepted in {retry_after_seconds:.0f} s"
        )


@dataclasses.dataclass(frozen=True)
class NewJob:
    """A request, accepted but for its row. The files of `id` are on the disk already."""

    course: str
    assignment: str
    student: str
    notebook: str
    kind: Kind
    submitter: str
    digest: str
    asked: Mapping[str, Any]
    memory_bytes: int
    bundle_bytes: int
    retention_seconds: float
    idempotency_key: str | None = None
    id: str = dataclasses.field(default_factory=lambda: str(uuid.uuid4()))


@dataclasses.dataclass(frozen=True)
class Claimed:
    """A job that is ours to run as long as we hold the lease."""

    job: Job
    lease: str


class JobStore:
    """All that is done with jobs in one database. What it returns are copies of rows."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.time) -> None:
        self._engine, self._clock = engine, clock

    def add(self, new: NewJob, daily_quota: int = 0) -> tuple[Job, bool]:
        """The job, and whether it is this one: False for the one that came earlier with the same key and digest.

        Saying it again with the same `id` changes nothing. `daily_quota`: how many jobs the course may submit in 24
        hours, as far as retention keeps them; 0: any number. Raises `KeyReused`, `QuotaExceeded`.
        """
        try:
            return self._add(new, daily_quota)
        except IntegrityError:  # somebody else was faster with the same key; if it is not that, it comes again
            return self._add(new, daily_quota)

    def _add(self, new: NewJob, daily_quota: int) -> tuple[Job, bool]:
        with writing(self._engine) as connection:
            if (earlier := _earlier(connection, new)) is not None:
                return earlier, earlier.id == new.id
            now = self._clock()
            if daily_quota:
                one_submits(connection, new.course)
                _check_quota(connection, new.course, daily_quota, now)
            values = {**dataclasses.asdict(new), "state": "queued", "attempts": 0, "submitted_at": now}
            connection.execute(insert(JOBS), values)
            return _one(connection, select(JOBS).where(JOBS.c.id == new.id)), True

    def get(self, job_id: str) -> Job | None:
        with reading(self._engine) as connection:
            return _get(connection, job_id)

    def find(
        self,
        course: str | Collection[str] | None = None,
        *,
        states: Collection[State] = (),
        assignment: str | None = None,
        student: str | None = None,
        submitter: str | None = None,
        after: str | None = None,
        limit: int = LONGEST_PAGE,
    ) -> tuple[list[Job], str | None]:
        """One page of jobs, newest first, and the cursor that as `after` gives the next one; None at the end.

        `course`: one, several, or None for all. Jobs that come meanwhile do not move the pages. Raises `ValueError` if
        the cursor is none of ours.
        """
        limit = max(1, min(limit, LONGEST_PAGE))
        query = select(JOBS).order_by(JOBS.c.sequence.desc()).limit(limit + 1)
        if course is not None:
            query = query.where(JOBS.c.course.in_([course] if isinstance(course, str) else sorted(course)))
        if states:
            query = query.where(JOBS.c.state.in_(sorted(states)))
        for column, value in (("assignment", assignment), ("student", student), ("submitter", submitter)):
            if value is not None:
                query = query.where(JOBS.c[column] == value)
        if after is not None:
            query = query.where(JOBS.c.sequence < _position(after))
        with reading(self._engine) as connection:
            jobs = _all(connection, query)
        return jobs[:limit], str(jobs[limit - 1].sequence) if len(jobs) > limit else None

    def claim(
        self,
        *,
        courses: Mapping[str, int],
        memory_free: int,
        memory_total: int,
        lease_seconds: float,
        ageing_seconds: float = 600.0,
    ) -> Claimed | None:
        """The next job in `order`, running now, and ours; None if nothing may start. See `order.Capacity`."""
        capacity = order.Capacity(courses, memory_free, memory_total, ageing_seconds)
        with writing(self._engine) as connection:
            one_claims(connection)
            while True:
                turn, last = order.last_turn(connection)
                now = self._clock()
                head = order.choose(order.heads(connection, memory_total), last, capacity, now)
                if head is None:
                    return None
                lease = secrets.token_hex(16)
                started = (
                    update(JOBS)
                    .where(JOBS.c.sequence == head.sequence, JOBS.c.state == "queued")
                    .values(state="running", attempts=JOBS.c.attempts + 1, turn=turn + 1, started_at=now)
                    .values(lease=lease, lease_until=now + lease_seconds)
                )
                if connection.execute(started).rowcount == 1:  # else it was cancelled since we saw it
                    return Claimed(_one(connection, select(JOBS).where(JOBS.c.sequence == head.sequence)), lease)

    def why_waiting(self, job: Job, *, courses: Mapping[str, int], memory_free: int, memory_total: int) -> str | None:
        """For people: what keeps a queued job from running. None if it is not in the queue, or if it is next."""
        if job.state != "queued":
            return None
        if job.course not in courses:
            return "its course is not configured in this service"
        if job.memory_bytes > memory_total:
            return f"memory: needs {_size(job.memory_bytes)}, this host has {_size(memory_total)} for all jobs together"
        with reading(self._engine) as connection:
            running = order.running_jobs(connection, job.course)
            before = _jobs_before(connection, job)
        if 0 < courses[job.course] <= running:
            return f"its course already runs {running} of {courses[job.course]} jobs"
        if before:
            return f"{_jobs(before)} before it in its course"
        if job.memory_bytes > memory_free:
            return f"memory: needs {_size(job.memory_bytes)}, {_size(memory_free)} is free"
        return None

    def renew(self, leases: Iterable[str], lease_seconds: float) -> set[str]:
        """Hold these for so much longer from now on. Returns those that are still held."""
        wanted, held = list(leases), set[str]()
        if not wanted:
            return held
        with writing(self._engine) as connection:
            for some in _chunks(wanted):
                mine = (JOBS.c.state == order.RUNNING, JOBS.c.lease.in_(some))
                connection.execute(update(JOBS).where(*mine).values(lease_until=self._clock() + lease_seconds))
                held.update(connection.execute(select(JOBS.c.lease).where(*mine)).scalars())
        return held

    def holds(self, job_id: str, lease: str) -> bool:
        """Whether the job still runs under this lease."""
        with reading(self._engine) as connection:
            found = select(JOBS.c.sequence).where(JOBS.c.id == job_id, JOBS.c.lease == lease, JOBS.c.state == "running")
            return connection.execute(found).first() is not None

    def finish(self, job_id: str, lease: str, state: State, reason: str, result: bool) -> bool:
        """End the job as done or failed; `result`: the files of this lease are its result.

        False if the job is not ours any more. True again when the same is said twice.
        """
        if state not in ("done", "failed"):
            raise ValueError(f"a job does not finish as {state}")
        with writing(self._engine) as connection:
            ours = update(JOBS).where(JOBS.c.id == job_id, JOBS.c.lease == lease, JOBS.c.state == "running")
            values = {"state": state, "reason": reason, "result": lease if result else None, **self._end()}
            if connection.execute(ours.values(**values)).rowcount == 1:
                return True
            job = _get(connection, job_id)
            return job is not None and job.lease == lease and job.state == state

    def release(self, job_id: str, lease: str, reason: str, max_attempts: int) -> State | None:
        """Give a job back whose attempt came to nothing. Returns `queued`, or `failed` after so many attempts.

        `max_attempts` 0: it is not the job's fault, and the attempt is not counted. None if the job is not ours.
        """
        with writing(self._engine) as connection:
            return self._give_back(connection, job_id, lease, reason, max_attempts)

    def expire_leases(self, max_attempts: int) -> list[str]:
        """Take away all leases that were not renewed in time. Returns the ids of the jobs that had them."""
        reason = "the process that ran it was lost"
        with writing(self._engine) as connection:
            one_claims(connection)  # else two of these could wait for each other's rows
            over = (JOBS.c.state == order.RUNNING, JOBS.c.lease_until < self._clock())
            found = connection.execute(select(JOBS.c.id, JOBS.c.lease).where(*over)).all()
            return [
                job_id
                for job_id, lease in found
                if self._give_back(connection, job_id, lease, reason, max_attempts, *over) is not None
            ]

    def _give_back(
        self, connection: Connection, job_id: str, lease: str, reason: str, max_attempts: int, *over: Any
    ) -> State | None:
        ours = (JOBS.c.id == job_id, JOBS.c.lease == lease, JOBS.c.state == "running", *over)
        attempts = connection.execute(select(JOBS.c.attempts).where(*ours)).scalar_one_or_none()
        if attempts is None:
            return None
        if max_attempts:
            reason = f"{reason} (attempt {attempts} of {max_attempts})"
        values: dict[str, Any] = {"state": "queued", "reason": reason, "lease": None, "lease_until": None}
        if not max_attempts:
            values["attempts"] = attempts - 1
        elif attempts >= max_attempts:
            values |= {"state": "failed", **self._end()}
        changed = connection.execute(update(JOBS).where(*ours).values(**values)).rowcount
        state: State = values["state"]
        return state if changed == 1 else None

    def cancel(self, job_id: str, reason: str = "cancelled") -> Job | None:
        """The job, which runs no more: at once if it was queued; a worker sees that its lease is gone.

        A job that has ended stays as it is. None if there is none of this id.
        """
        with writing(self._engine) as connection:
            alive = update(JOBS).where(JOBS.c.id == job_id, JOBS.c.state.in_(_ALIVE))
            connection.execute(alive.values(state="cancelled", reason=reason, lease=None, **self._end()))
            return _get(connection, job_id)

    def _end(self) -> dict[str, Any]:
        now = self._clock()
        return {"ended_at": now, "keep_until": JOBS.c.retention_seconds + now, "lease_until": None}

    def give_up(self, limit: int) -> list[str]:
        """End as failed the jobs that have waited for longer than they would be kept afterwards. Returns their ids.

        Such as those of a course that no service has any more: else their files would stay for ever.
        """
        now = self._clock()
        since = func.coalesce(JOBS.c.started_at, JOBS.c.submitted_at)  # it may have been given back
        waited = (
            JOBS.c.state == order.QUEUED,
            since < now - _DAY_SECONDS,  # at least, where retention is shorter
            since + JOBS.c.retention_seconds < now,
        )
        with reading(self._engine) as connection:
            found = connection.execute(select(JOBS.c.id, since).where(*waited).limit(limit)).all()
        given_up = []
        for job_id, began in found:
            reason = f"no service started it in {(now - began) / _DAY_SECONDS:.1f} days; submit it again"
            with writing(self._engine) as connection:
                over = update(JOBS).where(JOBS.c.id == job_id, *waited)
                if connection.execute(over.values(state="failed", reason=reason, **self._end())).rowcount == 1:
                    given_up.append(job_id)
        return given_up

    def over_retention(self, limit: int) -> list[Job]:
        """Jobs that have been kept long enough, oldest first."""
        query = select(JOBS).where(JOBS.c.keep_until <= self._clock()).order_by(JOBS.c.keep_until).limit(limit)
        with reading(self._engine) as connection:
            return _all(connection, query)

    def of_student(self, student: str) -> list[Job]:
        """All jobs of one person, in any state and course."""
        with reading(self._engine) as connection:
            return _all(connection, select(JOBS).where(JOBS.c.student == student).order_by(JOBS.c.sequence))

    def delete(self, job_ids: Iterable[str]) -> int:
        """Forget these; their files must be gone already. A job that has not ended stays. Returns how many went."""
        count = 0
        with writing(self._engine) as connection:
            for some in _chunks(list(job_ids)):
                gone = delete(JOBS).where(JOBS.c.id.in_(some), JOBS.c.state.in_(ENDED))
                count += connection.execute(gone).rowcount
        return count

    def counts(self) -> dict[tuple[str, State], int]:
        """How many jobs there are, by course and state."""
        columns = JOBS.c.course, JOBS.c.state
        with reading(self._engine) as connection:
            rows = connection.execute(select(*columns, func.count()).group_by(*columns))
            return {(course, state): count for course, state, count in rows}

    def oldest_queued_seconds(self) -> float:
        """How long the job has waited that waits longest; 0 if none does."""
        with reading(self._engine) as connection:
            times = [head.submitted_at for head in order.heads(connection)]
        return max(0.0, self._clock() - min(times)) if times else 0.0


def _all(connection: Connection, query: Select[Any]) -> list[Job]:
    return [Job(**row) for row in connection.execute(query).mappings()]


def _one(connection: Connection, query: Select[Any]) -> Job:
    return Job(**connection.execute(query).mappings().one())


def _get(connection: Connection, job_id: str) -> Job | None:
    found = _all(connection, select(JOBS).where(JOBS.c.id == job_id))
    return found[0] if found else None


def _earlier(connection: Connection, new: NewJob) -> Job | None:
    """What was added with this id or key before. Raises `KeyReused`."""
    same = JOBS.c.id == new.id
    if new.idempotency_key is not None:
        same = or_(same, (JOBS.c.course == new.course) & (JOBS.c.idempotency_key == new.idempotency_key))
    found = _all(connection, select(JOBS).where(same))
    for job in found:
        if job.digest != new.digest:
            raise KeyReused(f"the idempotency key belongs to the job {job.id}, which is another request; use a new key")
    return found[0] if found else None


def _check_quota(connection: Connection, course: str, quota: int, now: float) -> None:
    """The quota is used up when the last job but `quota` came less than a day ago."""
    newest = select(JOBS.c.submitted_at).where(JOBS.c.course == course).order_by(JOBS.c.sequence.desc())
    earliest = connection.execute(newest.offset(quota - 1).limit(1)).scalar_one_or_none()
    if earliest is not None and earliest > now - _DAY_SECONDS:
        raise QuotaExceeded(course, quota, earliest + _DAY_SECONDS - now)


def _jobs_before(connection: Connection, job: Job) -> int:
    """How many jobs of its course and kind are before it; at most one more than are counted."""
    mine = (JOBS.c.state == order.QUEUED, JOBS.c.course == job.course, JOBS.c.kind == job.kind)
    some = select(JOBS.c.sequence).where(*mine, JOBS.c.sequence < job.sequence).limit(_COUNTED + 1).subquery()
    return connection.execute(select(func.count()).select_from(some)).scalar_one()


def _jobs(count: int) -> str:
    if count > _COUNTED:
        return f"more than {_COUNTED} jobs are"
    return "1 job is" if count == 1 else f"{count} jobs are"


def _position(cursor: str) -> int:
    if not (cursor.isascii() and cursor.isdigit() and len(cursor) < 19):
        raise ValueError("the cursor is not one that a page of jobs came with")
    return int(cursor)


def _chunks(values: list[str]) -> Iterable[list[str]]:
    return (values[start : start + _AT_ONCE] for start in range(0, len(values), _AT_ONCE))


def _size(count: int) -> str:
    """Bytes for people: 1.5 GiB."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << power:
            return f"{count / (1 << power):.4g} {unit}"
    return f"{count} B"
