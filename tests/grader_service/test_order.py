"""Which job is next: as a question about values, and as the databases answer it."""

import dataclasses
from typing import Any

from desk import LEASE_SECONDS, Clock, Desk, multiply, values
from hypothesis import given, settings
from hypothesis import strategies as st
from participants import GIB
from sqlalchemy import Engine, event

from grader_service.jobs import JobStore
from grader_service.models import KINDS, Kind
from grader_service.order import Capacity, Head, choose

AGEING = 600.0
NOW = 1000.0
OPEN = Capacity({"algebra": 0, "biology": 0}, memory_free=8 * GIB, memory_total=8 * GIB, ageing_seconds=AGEING)


def _head(sequence: int, **different: Any) -> Head:
    values = {"course": "algebra", "kind": "batch", "memory_bytes": GIB, "submitted_at": NOW}
    return Head(sequence, **{**values, **different})


def _next(*heads: Head, last: Kind | None = None, **capacity: Any) -> int | None:
    head = choose(heads, last, dataclasses.replace(OPEN, **capacity), NOW)
    return None if head is None else head.sequence


def test_nothing_waits() -> None:
    assert _next() is None


def test_interactive_comes_before_batch() -> None:
    assert _next(_head(1), _head(2, kind="interactive")) == 2


def test_a_batch_job_that_has_waited_gets_every_second_start() -> None:
    batch, interactive = _head(1, submitted_at=NOW - AGEING), _head(2, kind="interactive")
    assert _next(batch, interactive, last="interactive") == 1
    assert _next(batch, interactive, last="batch") == 2
    young = dataclasses.replace(batch, submitted_at=NOW - AGEING + 1)
    assert _next(young, interactive, last="interactive") == 2


def test_only_the_batch_job_that_has_waited_comes_first() -> None:
    young = _head(1, course="biology")
    aged = _head(2, submitted_at=NOW - AGEING, running=5)
    assert _next(young, aged, _head(3, kind="interactive"), last="interactive") == 2


def test_the_course_with_fewer_running_jobs_is_next_whoever_came_first() -> None:
    assert _next(_head(1, running=2), _head(9, course="biology", running=1, served=50)) == 9


def test_of_courses_with_as_many_the_one_that_was_served_longest_ago_is_next() -> None:
    assert _next(_head(1, running=1, served=7), _head(9, course="biology", running=1, served=6)) == 9
    assert _next(_head(1, served=1), _head(9, course="biology")) == 9


def test_of_courses_that_were_never_served_the_first_is_next() -> None:
    assert _next(_head(9, course="biology"), _head(1)) == 1


def test_a_course_at_its_limit_waits_and_is_passed() -> None:
    full, other = _head(1, running=2, submitted_at=0), _head(2, course="biology", running=9)
    assert _next(full, other, courses={"algebra": 2, "biology": 0}) == 2
    assert _next(full, courses={"algebra": 2}) is None
    assert _next(full, courses={"algebra": 3}) == 1


def test_a_course_that_is_not_configured_waits_and_is_passed() -> None:
    assert _next(_head(1, submitted_at=0), _head(2, course="biology"), courses={"biology": 0}) == 2


def test_what_does_not_fit_now_is_passed_until_it_has_waited() -> None:
    big, small = _head(1, memory_bytes=4 * GIB), _head(2, course="biology")
    assert _next(big, small, memory_free=3 * GIB) == 2
    waited = dataclasses.replace(big, submitted_at=NOW - AGEING)
    assert _next(waited, small, memory_free=3 * GIB) is None
    assert _next(waited, small, memory_free=4 * GIB) == 1


def test_what_came_before_it_does_not_pass_it() -> None:
    big, small = _head(5, memory_bytes=4 * GIB, submitted_at=0), _head(4, course="biology")
    assert _next(big, small, memory_free=3 * GIB) == 4


def test_interactive_jobs_do_not_pass_it_either() -> None:
    big = _head(1, memory_bytes=4 * GIB, submitted_at=0)
    assert _next(big, _head(2, kind="interactive"), memory_free=3 * GIB) is None


def test_what_never_fits_or_may_not_start_holds_nobody_up() -> None:
    giant, small = _head(1, memory_bytes=9 * GIB, submitted_at=0), _head(2, course="biology")
    assert _next(giant, small) == 2
    full = _head(1, memory_bytes=4 * GIB, submitted_at=0, running=1)
    assert _next(full, small, memory_free=2 * GIB, courses={"algebra": 1, "biology": 0}) == 2


@dataclasses.dataclass(frozen=True)
class _Arrival:
    at: int
    course: str
    kind: Kind
    gibibytes: int
    seconds: int


_ARRIVALS = st.lists(
    st.builds(
        _Arrival,
        at=st.integers(0, 60),
        course=st.sampled_from(["algebra", "biology", "chemistry"]),
        kind=st.sampled_from(KINDS),
        gibibytes=st.integers(1, 6),
        seconds=st.integers(1, 30),
    ),
    max_size=40,
)


class _World:
    """Jobs that come, start as `choose` says, and end, second by second."""

    TOTAL = 6

    def __init__(self, arrivals: list[_Arrival], limit: int, ageing: int) -> None:
        self.jobs = dict(enumerate(sorted(arrivals, key=lambda arrival: arrival.at), start=1))
        self.waiting = dict(self.jobs)
        self.ends: dict[int, int] = {}
        self.started: list[int] = []
        self.now = 0
        self._courses, self._ageing = {"algebra": limit, "biology": 0, "chemistry": 1}, ageing

    def capacity(self) -> Capacity:
        taken = sum(self.jobs[number].gibibytes for number in self.ends)
        return Capacity(self._courses, self.TOTAL - taken, self.TOTAL, self._ageing)

    def heads(self) -> list[Head]:
        found: dict[tuple[str, str], Head] = {}
        for number, job in self.waiting.items():
            if job.at <= self.now:
                running = sum(self.jobs[other].course == job.course for other in self.ends)
                turns = [turn for turn, other in enumerate(self.started, 1) if self.jobs[other].course == job.course]
                head = Head(number, job.course, job.kind, job.gibibytes, job.at, running, max(turns, default=0))
                found.setdefault((job.course, job.kind), head)
        return list(found.values())

    def start_one(self) -> bool:
        last = self.jobs[self.started[-1]].kind if self.started else None
        head = choose(self.heads(), last, self.capacity(), self.now)
        if head is None:
            return False
        self._check(head)
        self.ends[head.sequence] = self.now + self.waiting.pop(head.sequence).seconds
        self.started.append(head.sequence)
        return True

    def _check(self, head: Head) -> None:
        capacity, heads = self.capacity(), self.heads()
        assert head in heads
        assert capacity.takes(head)
        assert head.memory_bytes <= capacity.memory_free
        for other in heads:
            waited = self.now - other.submitted_at >= self._ageing and capacity.takes(other)
            assert not (waited and other.sequence < head.sequence and other.memory_bytes > capacity.memory_free)

    def tick(self) -> None:
        self.now += 1
        self.ends = {number: end for number, end in self.ends.items() if end > self.now}


@settings(max_examples=200, deadline=None)
@given(arrivals=_ARRIVALS, limit=st.integers(0, 2), ageing=st.integers(0, 40))
def test_every_job_starts_in_order_within_limits_and_none_passes_one_that_has_waited(
    arrivals: list[_Arrival], limit: int, ageing: int
) -> None:
    world = _World(arrivals, limit, ageing)
    one_after_the_other = 60 + sum(arrival.seconds for arrival in arrivals)
    while world.waiting:
        while world.start_one():
            pass
        assert world.now <= one_after_the_other, f"never started: {world.waiting}"
        world.tick()


@settings(max_examples=20, deadline=None)
@given(seconds=st.integers(1, 5), ageing=st.integers(0, 20))
def test_a_stream_of_others_starves_nobody(seconds: int, ageing: int) -> None:
    """Interactive and small jobs come faster than they end; the big batch job starts all the same."""
    stream = [
        _Arrival(at, course, kind, 1, seconds)
        for at in range(200)
        for course in ("algebra", "biology")
        for kind in KINDS
    ]
    big = _Arrival(10, "chemistry", "batch", _World.TOTAL, 1)
    world = _World([*stream, big], 0, ageing)
    while not any(world.jobs[number].gibibytes == _World.TOTAL for number in world.started):
        assert world.now < 200
        if not world.start_one():
            world.tick()


# Started in order


def test_a_claimed_job_runs(desk: Desk) -> None:
    job_id = desk.add()
    claimed = desk.claim()
    assert claimed is not None
    assert values(claimed.job) == values(desk.job(job_id))
    job = claimed.job
    assert (job.id, job.state, job.attempts, job.lease) == (job_id, "running", 1, claimed.lease)
    assert (job.started_at, job.lease_until) == (desk.clock.now, desk.clock.now + LEASE_SECONDS)
    assert desk.claim() is None


def test_leases_are_never_the_same(desk: Desk) -> None:
    for _ in range(20):
        desk.add()
    assert len({desk.run()[1] for _ in range(20)}) == 20


def test_first_come_first_served_within_a_course(desk: Desk) -> None:
    ids = [desk.add() for _ in range(5)]
    assert [desk.started() for _ in range(6)] == [*ids, None]


def test_interactive_jobs_come_first_and_aged_batch_jobs_get_every_second_start(desk: Desk) -> None:
    batch = [desk.add() for _ in range(3)]
    interactive = [desk.add(kind="interactive") for _ in range(4)]
    assert desk.started() == interactive[0]
    desk.clock.now += 600
    order = [desk.started() for _ in range(6)]
    assert order == [batch[0], interactive[1], batch[1], interactive[2], batch[2], interactive[3]]


def test_how_long_a_batch_job_waits_is_for_the_caller_to_say(desk: Desk) -> None:
    batch, first, second = desk.add(), desk.add(kind="interactive"), desk.add(kind="interactive")
    desk.clock.now += 10
    assert [desk.started(ageing_seconds=10) for _ in range(3)] == [first, batch, second]


def test_courses_take_turns(desk: Desk) -> None:
    many = [desk.add() for _ in range(4)]
    few = [desk.add(course="biology") for _ in range(2)]
    assert [desk.started() for _ in range(6)] == [many[0], few[0], many[1], few[1], many[2], many[3]]


def test_a_course_whose_jobs_ended_is_behind_those_that_were_served_longer_ago(desk: Desk) -> None:
    algebra = [desk.add() for _ in range(2)]
    biology = [desk.add(course="biology") for _ in range(2)]
    for expected in (algebra[0], biology[0], algebra[1], biology[1]):
        job_id, lease = desk.run()
        assert job_id == expected
        desk.store.finish(job_id, lease, "done", "", True)


def test_fairness_needs_no_clock_that_goes_forward(desk: Desk) -> None:
    algebra, biology = [desk.add() for _ in range(2)], [desk.add(course="biology") for _ in range(2)]
    order = []
    for _ in range(4):
        desk.clock.now -= 1000
        job_id, lease = desk.run()
        desk.store.finish(job_id, lease, "done", "", True)
        order.append(job_id)
    assert order == [algebra[0], biology[0], algebra[1], biology[1]]


def test_a_course_runs_no_more_than_its_limit(desk: Desk) -> None:
    first, second = desk.add(), desk.add()
    other = desk.add(course="biology")
    courses = {"algebra": 1, "biology": 0}
    assert [desk.started(courses=courses) for _ in range(3)] == [first, other, None]
    desk.store.cancel(first)
    assert desk.started(courses=courses) == second


def test_jobs_of_a_course_that_is_not_configured_stay(desk: Desk) -> None:
    job_id = desk.add(course="history")
    assert desk.started() is None
    assert desk.job(job_id).state == "queued"


def test_memory_that_is_not_free_is_waited_for_and_small_jobs_pass_for_a_while(desk: Desk) -> None:
    big = desk.add(memory_bytes=6 * GIB)
    small = [desk.add(course="biology") for _ in range(2)]
    assert desk.started(memory_free=5 * GIB) == small[0]
    desk.clock.now += 600
    assert desk.started(memory_free=5 * GIB) is None
    assert desk.started(memory_free=6 * GIB) == big
    assert desk.started(memory_free=5 * GIB) == small[1]


def test_what_this_host_can_never_run_is_left_to_others(desk: Desk) -> None:
    giant, small = desk.add(memory_bytes=16 * GIB), desk.add()
    desk.clock.now += 10_000
    assert [desk.started(), desk.started()] == [small, None]
    assert desk.started(memory_total=16 * GIB, memory_free=16 * GIB) == giant


def test_a_job_that_is_cancelled_while_it_is_being_claimed_is_not_claimed(postgres_engine: Engine) -> None:
    """Between seeing it and taking it."""
    desk = Desk(JobStore(postgres_engine, clock := Clock()), clock)
    waiting = [first := desk.add()]
    second = desk.add()

    def cancel(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("UPDATE") and waiting:
            desk.store.cancel(waiting.pop())

    event.listen(postgres_engine, "before_cursor_execute", cancel)
    assert desk.started() == second
    assert desk.job(first).state == "cancelled"


# Why it waits


def test_it_is_told_why_a_job_waits(desk: Desk) -> None:
    first, second = desk.add(memory_bytes=2 * GIB), desk.add()
    assert desk.why(first) is None
    assert desk.why(second) == "1 job is before it in its course"
    assert desk.why(first, memory_free=GIB) == "memory: needs 2 GiB, 1 GiB is free"
    assert desk.why(first, memory_total=3 * GIB // 2) == (
        "memory: needs 2 GiB, this host has 1.5 GiB for all jobs together"
    )
    assert desk.why(first, courses={}) == "its course is not configured in this service"
    desk.run()
    assert desk.why(second, courses={"algebra": 1}) == "its course already runs 1 of 1 jobs"
    assert desk.why(first) is None  # it runs


def test_a_long_queue_is_not_counted_to_its_end(desk: Desk, engine: Engine) -> None:
    desk.add()
    multiply(engine, 1500)
    last = desk.add()
    assert desk.why(last) == "more than 1000 jobs are before it in its course"
