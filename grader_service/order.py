"""Which job is next: interactive ones before batches, fair between courses, first come first served within.

    1  Of each course and kind only the oldest job is looked at, its *head*. Courses at their limit of concurrent jobs
       are left out, and heads that need more memory than this host ever has (another host may run them).
    2  Interactive before batch. A batch job that has waited for `ageing_seconds` gets every second start.
    3  Within a kind: the course with the fewest running jobs, then the one that was served longest ago.
    4  A head whose memory is not free now may be passed by others until it has waited for `ageing_seconds`. From then
       on only jobs that came before it start, so that memory comes free.

Nobody waits for ever: a head that has waited is passed by finitely many, and every job becomes the head of its queue.
The work does not depend on the length of the queues: a few look-ups in an index for each course that waits. Refuses
to know what a job does.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping

from sqlalchemy import Connection, Select, bindparam, func, literal_column, select
from sqlalchemy.sql.elements import ColumnElement

from grader_service.models import JOBS, Kind

QUEUED: ColumnElement[str] = literal_column("'queued'")
RUNNING: ColumnElement[str] = literal_column("'running'")
"""Written into the statements, so that a planner knows how few rows they stand for."""
_ONE: ColumnElement[int] = literal_column("1")
_NOT_LIMITED = 1 << 62


@dataclasses.dataclass(frozen=True)
class Head:
    """The oldest queued job of one course and kind, and what its place in the order depends on."""

    sequence: int
    course: str
    kind: Kind
    memory_bytes: int
    submitted_at: float
    running: int = 0
    """Jobs of its course that run now."""
    served: int = 0
    """The turn in which its course was served last; 0: never."""


@dataclasses.dataclass(frozen=True)
class Capacity:
    """What may be started on this host now."""

    courses: Mapping[str, int]
    """How many jobs of a course may run at once on all hosts together; 0: as many as fit."""
    memory_free: int
    """Bytes."""
    memory_total: int
    """Bytes that are free when nothing runs."""
    ageing_seconds: float = 600.0

    def takes(self, head: Head) -> bool:
        """Whether the head's course may start one more."""
        limit = self.courses.get(head.course)
        return limit is not None and (limit == 0 or head.running < limit)


def choose(heads: Iterable[Head], last: Kind | None, capacity: Capacity, now: float) -> Head | None:
    """The head that starts now. `last` is the kind of the job that was started last."""
    able = [head for head in heads if capacity.takes(head) and head.memory_bytes <= capacity.memory_total]

    def aged(head: Head) -> bool:
        return now - head.submitted_at >= capacity.ageing_seconds

    def fits(head: Head) -> bool:
        return head.memory_bytes <= capacity.memory_free

    def place(head: Head) -> tuple[int, int, int, int]:
        first = 1 if head.kind == "interactive" else 0 if last == "interactive" and aged(head) else 2
        return first, head.running, head.served, head.sequence

    barrier = min((head.sequence for head in able if aged(head) and not fits(head)), default=math.inf)
    return min((head for head in able if fits(head) and head.sequence < barrier), key=place, default=None)


def heads(connection: Connection, memory_total: int = _NOT_LIMITED) -> list[Head]:
    """The heads of all queues, of jobs that need at most this much memory."""
    found = connection.execute(_FIRST, {"memory_total": memory_total}).all()
    served = {row.course: row.served or 0 for row in found}
    numbers = [number for row in found for number in (row.interactive, row.batch) if number is not None]
    if not numbers:
        return []
    running: dict[str, int] = {row.course: row.jobs for row in connection.execute(_RUNNING)}
    return [
        Head(*row, running=running.get(row.course, 0), served=served.get(row.course, 0))
        for row in connection.execute(_HEADS, {"numbers": numbers})
    ]


def last_turn(connection: Connection) -> tuple[int, Kind | None]:
    """The number of the last start, and of which kind it was."""
    row = connection.execute(_LAST).one_or_none()
    return (0, None) if row is None else (row.turn, row.kind)


def running_jobs(connection: Connection, course: str) -> int:
    """How many jobs of this course run now."""
    counted = select(func.count()).where(JOBS.c.state == RUNNING, JOBS.c.course == course)
    return connection.execute(counted).scalar_one()


def _first_statement() -> Select[tuple[str, int | None, int | None, int | None]]:
    """For each course that waits: its first job of either kind, and when it was served.

    The courses are found by going from one to the next in the index, which `SELECT DISTINCT` would read as a whole.
    """
    jobs = JOBS.alias("other")
    by_course = select(jobs.c.course).where(jobs.c.state == QUEUED).order_by(jobs.c.course).limit(_ONE)
    waiting = select(by_course.scalar_subquery().label("course")).cte("waiting", recursive=True)
    following = by_course.where(jobs.c.course > waiting.c.course).correlate(waiting).scalar_subquery()
    waiting = waiting.union_all(select(following).where(waiting.c.course.is_not(None)))

    def first(kind: Kind) -> ColumnElement[int | None]:
        mine = (
            select(JOBS.c.sequence)
            .where(
                JOBS.c.state == QUEUED, JOBS.c.course == waiting.c.course, JOBS.c.kind == literal_column(f"'{kind}'")
            )
            .where(JOBS.c.memory_bytes <= bindparam("memory_total"))
        )
        return mine.order_by(JOBS.c.sequence).limit(_ONE).correlate(waiting).scalar_subquery().label(kind)

    served = select(func.max(JOBS.c.turn)).where(JOBS.c.course == waiting.c.course).correlate(waiting)
    columns = waiting.c.course, first("interactive"), first("batch"), served.scalar_subquery().label("served")
    return select(*columns).where(waiting.c.course.is_not(None))


_FIRST = _first_statement()
_HEADS = select(JOBS.c.sequence, JOBS.c.course, JOBS.c.kind, JOBS.c.memory_bytes, JOBS.c.submitted_at).where(
    JOBS.c.sequence.in_(bindparam("numbers", expanding=True))
)
_RUNNING = select(JOBS.c.course, func.count().label("jobs")).where(JOBS.c.state == RUNNING).group_by(JOBS.c.course)
_LAST = select(JOBS.c.turn, JOBS.c.kind).where(JOBS.c.turn.is_not(None)).order_by(JOBS.c.turn.desc()).limit(_ONE)
