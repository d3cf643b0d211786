"""Jobs in both databases: what is accepted, how it is held, how it ends. In one process; see `test_jobs_many`."""

import dataclasses
from typing import Any

import pytest
from desk import DAY_SECONDS, LEASE_SECONDS, Desk, multiply, values
from participants import new_job
from sqlalchemy import Engine

from grader_service.jobs import KeyReused, QuotaExceeded
from grader_service.models import ENDED, STATES, State

# Accepted once


def test_a_new_job_is_queued_as_it_was_asked_for(desk: Desk) -> None:
    new = new_job(kind="interactive", asked={"limits": {"wall_seconds": 1.5}, "skip": [1, 2], "name": "Ä ∀ \x00"})
    job, created = desk.store.add(new)
    assert created
    assert values(desk.job(new.id)) == values(job)
    assert {name: getattr(job, name) for name in dataclasses.asdict(new)} == dataclasses.asdict(new)
    assert (job.state, job.attempts, job.submitted_at) == ("queued", 0, desk.clock.now)
    assert (job.lease, job.result, job.started_at, job.ended_at, job.keep_until) == (None,) * 5


def test_words_that_look_like_sql_are_words(desk: Desk) -> None:
    evil = "x'; DROP TABLE jobs; -- \" % %s :x {}"
    job_id = desk.add(course=evil, assignment=evil, student=evil, submitter=evil, idempotency_key=evil)
    (found,), _ = desk.store.find(evil, assignment=evil, student=evil, submitter=evil)
    assert (found.id, found.student) == (job_id, evil)
    assert [job.id for job in desk.store.of_student(evil)] == [job_id]
    assert desk.store.get(evil) is None
    assert desk.started(courses={evil: 1}) == job_id
    assert desk.store.renew([evil], 1) == set()


def test_the_same_key_and_request_is_the_same_job(desk: Desk) -> None:
    first = new_job(idempotency_key="k1")
    again = dataclasses.replace(new_job(idempotency_key="k1"), digest=first.digest)
    assert desk.store.add(first)[1]
    job, created = desk.store.add(again)
    assert (job.id, created) == (first.id, False)
    assert desk.store.counts() == {("algebra", "queued"): 1}


def test_a_key_finds_its_job_in_every_state(desk: Desk) -> None:
    job_id = desk.add(idempotency_key="k1")
    _, lease = desk.run()
    assert desk.add(idempotency_key="k1") == job_id
    desk.store.finish(job_id, lease, "done", "", True)
    assert desk.add(idempotency_key="k1") == job_id


def test_the_same_key_for_another_request_is_refused(desk: Desk) -> None:
    desk.add(idempotency_key="k1")
    with pytest.raises(KeyReused, match="use a new key"):
        desk.add(idempotency_key="k1", digest="1" * 64)


def test_keys_of_other_courses_and_jobs_without_keys_are_others(desk: Desk) -> None:
    ids = {desk.add(idempotency_key="k1"), desk.add(course="biology", idempotency_key="k1"), desk.add(), desk.add()}
    assert len(ids) == 4


def test_adding_again_after_a_lost_answer_is_still_new(desk: Desk) -> None:
    """Or its submitter would take the files for superfluous."""
    new = new_job()
    assert [desk.store.add(new)[1] for _ in range(2)] == [True, True]
    assert desk.store.counts() == {("algebra", "queued"): 1}


def test_a_quota_is_for_a_course_and_24_hours(desk: Desk) -> None:
    for _ in range(3):
        desk.store.add(new_job(), daily_quota=3)
        desk.clock.now += 100
    with pytest.raises(QuotaExceeded, match="algebra has submitted 3 jobs") as caught:
        desk.store.add(new_job(), daily_quota=3)
    assert caught.value.retry_after_seconds == DAY_SECONDS - 300
    desk.store.add(new_job(course="biology"), daily_quota=3)
    desk.clock.now += caught.value.retry_after_seconds
    desk.store.add(new_job(), daily_quota=3)
    with pytest.raises(QuotaExceeded):
        desk.store.add(new_job(), daily_quota=3)


def test_what_was_accepted_before_does_not_count_again(desk: Desk) -> None:
    new = new_job(idempotency_key="k1")
    desk.store.add(new, daily_quota=1)
    assert desk.store.add(new_job(idempotency_key="k1"), daily_quota=1)[0].id == new.id


def test_cancelled_jobs_count_for_the_quota(desk: Desk) -> None:
    desk.store.cancel(desk.store.add(new_job(), daily_quota=1)[0].id)
    with pytest.raises(QuotaExceeded):
        desk.store.add(new_job(), daily_quota=1)


# Leases


def test_a_renewed_lease_lasts_and_one_that_is_not_ends(desk: Desk) -> None:
    desk.add(), desk.add()
    (kept, lease), (lost, other) = desk.run(), desk.run()
    desk.clock.now += LEASE_SECONDS - 1
    assert desk.store.renew([lease, "unknown"], LEASE_SECONDS) == {lease}
    desk.clock.now += 2
    assert desk.store.expire_leases(3) == [lost]
    assert (desk.store.holds(kept, lease), desk.store.holds(lost, other)) == (True, False)
    assert desk.store.renew([lease, other], LEASE_SECONDS) == {lease}
    assert desk.store.renew([], LEASE_SECONDS) == set()


def test_a_lease_belongs_to_one_job(desk: Desk) -> None:
    desk.add(), desk.add()
    (one, lease), (other, _) = desk.run(), desk.run()
    assert not desk.store.holds(other, lease)
    assert not desk.store.finish(other, lease, "done", "", True)
    assert desk.store.release(other, lease, "x", 3) is None
    assert desk.store.holds(one, lease)


def test_a_late_renewal_holds_as_long_as_nobody_took_the_lease(desk: Desk) -> None:
    desk.add()
    job_id, lease = desk.run()
    desk.clock.now += 10 * LEASE_SECONDS
    assert desk.store.renew([lease], LEASE_SECONDS) == {lease}
    assert desk.store.expire_leases(3) == []
    assert desk.store.holds(job_id, lease)


def test_a_job_whose_lease_ended_is_first_in_the_queue_again(desk: Desk) -> None:
    first, second = desk.add(), desk.add()
    desk.run()
    desk.clock.now += LEASE_SECONDS + 1
    assert desk.store.expire_leases(3) == [first]
    job = desk.job(first)
    assert (job.state, job.attempts, job.lease, job.lease_until) == ("queued", 1, None, None)
    assert job.reason == "the process that ran it was lost (attempt 1 of 3)"
    assert [desk.started(), desk.started()] == [first, second]
    assert desk.job(first).attempts == 2


# Ended exactly once


@pytest.mark.parametrize(("state", "result"), [("done", True), ("failed", False), ("failed", True)])
def test_a_job_ends_with_its_reason_and_result(desk: Desk, state: State, result: bool) -> None:
    job_id, lease = desk.bring("running")
    desk.clock.now += 5
    assert desk.store.finish(job_id, lease, state, "because", result)
    job = desk.job(job_id)
    assert (job.state, job.reason, job.result) == (state, "because", lease if result else None)
    assert (job.ended_at, job.keep_until) == (desk.clock.now, desk.clock.now + 7 * DAY_SECONDS)
    assert not desk.store.holds(job_id, lease)


def test_finishing_with_a_lost_lease_is_refused(desk: Desk) -> None:
    job_id, lost = desk.bring("running")
    desk.clock.now += LEASE_SECONDS + 1
    desk.store.expire_leases(3)
    assert not desk.store.finish(job_id, lost, "done", "", True)
    assert desk.job(job_id).state == "queued"
    _, lease = desk.run()
    assert not desk.store.finish(job_id, lost, "done", "", True)
    assert desk.store.finish(job_id, lease, "failed", "", False)
    before = values(desk.job(job_id))
    assert not desk.store.finish(job_id, lost, "failed", "", True)
    assert desk.store.release(job_id, lost, "late", 3) is None
    assert values(desk.job(job_id)) == before


def test_finishing_twice_is_finishing_once(desk: Desk) -> None:
    job_id, lease = desk.bring("running")
    assert desk.store.finish(job_id, lease, "done", "first", True)
    before = values(desk.job(job_id))
    desk.clock.now += 1
    assert desk.store.finish(job_id, lease, "done", "second", True)
    assert not desk.store.finish(job_id, lease, "failed", "third", False)
    assert values(desk.job(job_id)) == before


@pytest.mark.parametrize("state", ["queued", "running", "cancelled"])
def test_a_job_finishes_as_done_or_failed_only(desk: Desk, state: State) -> None:
    job_id, lease = desk.bring("running")
    with pytest.raises(ValueError, match=state):
        desk.store.finish(job_id, lease, state, "", False)


@pytest.mark.parametrize("state", STATES)
def test_cancelling_in_every_state(desk: Desk, state: State) -> None:
    job_id, lease = desk.bring(state)
    before = values(desk.job(job_id))
    desk.clock.now += 5
    job = desk.store.cancel(job_id, "cancelled by inka")
    assert job is not None
    assert values(job) == values(desk.job(job_id))
    if state in ENDED:
        assert values(job) == before
    else:
        assert (job.state, job.reason, job.lease) == ("cancelled", "cancelled by inka", None)
        assert (job.ended_at, job.keep_until) == (desk.clock.now, desk.clock.now + 7 * DAY_SECONDS)
    assert not desk.store.holds(job_id, lease)
    assert desk.claim() is None
    if state == "running":
        assert not desk.store.finish(job_id, lease, "done", "", True)
        assert desk.store.release(job_id, lease, "x", 3) is None
        assert desk.store.renew([lease], LEASE_SECONDS) == set()


def test_cancelling_what_is_not_there(desk: Desk) -> None:
    assert desk.store.cancel("nothing") is None


def test_a_job_that_fails_each_time_is_parked_with_its_reason(desk: Desk) -> None:
    job_id = desk.add()
    outcomes = [desk.store.release(*desk.run(), "the worker died", 3) for _ in range(3)]
    assert outcomes == ["queued", "queued", "failed"]
    job = desk.job(job_id)
    assert (job.state, job.attempts, job.reason) == ("failed", 3, "the worker died (attempt 3 of 3)")
    assert (job.lease, job.result, job.keep_until) == (None, None, desk.clock.now + 7 * DAY_SECONDS)
    assert desk.claim() is None


def test_lost_leases_count_as_attempts(desk: Desk) -> None:
    job_id = desk.add()
    for _ in range(2):
        desk.run()
        desk.clock.now += LEASE_SECONDS + 1
        assert desk.store.expire_leases(2) == [job_id]
    assert (desk.job(job_id).state, desk.job(job_id).reason) == (
        "failed",
        "the process that ran it was lost (attempt 2 of 2)",
    )


def test_an_attempt_that_is_not_the_jobs_fault_does_not_count(desk: Desk) -> None:
    job_id = desk.add()
    for _ in range(5):
        assert desk.store.release(*desk.run(), "the service was stopped", 0) == "queued"
    job = desk.job(job_id)
    assert (job.attempts, job.reason) == (0, "the service was stopped")


def test_a_parked_job_does_not_hold_up_those_behind_it(desk: Desk) -> None:
    desk.add()
    second = desk.add()
    desk.store.release(*desk.run(), "the worker died", 1)
    assert desk.started() == second


# Kept as long as promised


def test_retention_begins_when_a_job_ends(desk: Desk) -> None:
    ids = [desk.add(retention_seconds=seconds) for seconds in (200, 100, 300)]
    desk.clock.now += 1000
    assert desk.store.over_retention(10) == []
    for _ in ids:
        desk.store.finish(*desk.run(), "done", "", True)
    desk.clock.now += 99
    assert desk.store.over_retention(10) == []
    desk.clock.now += 101
    assert [job.id for job in desk.store.over_retention(10)] == [ids[1], ids[0]]
    assert [job.id for job in desk.store.over_retention(1)] == [ids[1]]


def test_what_nobody_starts_ends_and_is_then_kept_as_long_as_any(desk: Desk) -> None:
    """Such as a job of a course that was removed."""
    short = desk.add(course="removed", retention_seconds=100)
    long = desk.add(retention_seconds=10 * 86_400)
    desk.clock.now += 86_400
    assert desk.store.give_up(10) == []
    desk.clock.now += 1
    assert desk.store.give_up(10) == [short]
    assert desk.store.give_up(10) == []
    job = desk.store.get(short)
    assert job is not None
    assert (job.state, "no service started it in 1.0 days" in (job.reason or "")) == ("failed", True)
    desk.clock.now += 101
    assert [job.id for job in desk.store.over_retention(10)] == [short]
    job_id, _ = desk.run()
    assert job_id == long
    desk.clock.now += 20 * 86_400
    assert desk.store.give_up(10) == []  # it was started


def test_what_was_started_and_given_back_is_not_given_up_for_having_waited_before(desk: Desk) -> None:
    job_id = desk.add(retention_seconds=100)
    desk.clock.now += 86_300
    _, lease = desk.run()
    desk.clock.now += 600
    assert desk.store.release(job_id, lease, "the service was stopped", max_attempts=0) == "queued"
    assert desk.store.give_up(10) == []
    desk.clock.now += 86_400
    assert desk.store.give_up(10) == [job_id]


@pytest.mark.parametrize("state", STATES)
def test_only_what_has_ended_can_be_deleted(desk: Desk, state: State) -> None:
    job_id, _ = desk.bring(state)
    assert desk.store.delete([job_id, "unknown"]) == (state in ENDED)
    assert (desk.store.get(job_id) is None) == (state in ENDED)


def test_many_are_deleted_at_once(desk: Desk, engine: Engine) -> None:
    desk.store.cancel(desk.add())
    multiply(engine, 1200)
    ids = [job.id for job in desk.store.of_student("ada")]
    assert desk.store.delete(ids) == len(ids) == 1201


def test_a_key_may_be_used_again_when_its_job_is_gone(desk: Desk) -> None:
    job_id = desk.add(idempotency_key="k1")
    desk.store.cancel(job_id)
    desk.store.delete([job_id])
    assert desk.add(idempotency_key="k1", digest="1" * 64) != job_id


def test_everything_of_a_student_is_found(desk: Desk) -> None:
    mine = [desk.bring(state)[0] for state in ("done", "cancelled", "running", "queued")]
    mine.append(desk.add(course="biology"))
    desk.add(student="ada2"), desk.add(student="Ada")
    assert [job.id for job in desk.store.of_student("ada")] == mine


# Lists and numbers


def test_lists_are_filtered(desk: Desk) -> None:
    a = desk.add(assignment="ps1", student="ada", submitter="inka")
    b = desk.add(assignment="ps2", student="ada", submitter="ivan")
    c = desk.add(assignment="ps2", student="bob", submitter="inka", course="biology")
    desk.store.cancel(b)
    desk.run()

    def ids(*course: Any, **filters: Any) -> list[str]:
        return [job.id for job in desk.store.find(*course, **filters)[0]]

    assert ids() == [c, b, a]
    assert ids("algebra") == ids(["algebra", "history"]) == [b, a]
    assert ids([]) == ids("alg") == []
    assert ids(None, states=["running"]) == [a]
    assert ids(None, states=["cancelled", "queued"]) == [c, b]
    assert ids(None, assignment="ps2") == [c, b]
    assert ids("biology", assignment="ps2", student="bob", submitter="inka") == [c]
    assert ids(None, student="ada", submitter="inka") == [a]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 6])
def test_pages_hold_everything_once_while_jobs_are_added(desk: Desk, count: int) -> None:
    ids = [desk.add() for _ in range(count)]
    found, cursor, pages = [], None, 0
    while pages == 0 or cursor is not None:
        jobs, cursor = desk.store.find("algebra", after=cursor, limit=2)
        found += [job.id for job in jobs]
        pages += 1
        desk.add()
    assert found == ids[::-1]
    assert pages == max(1, -(-count // 2))


def test_a_page_stays_where_it_is_when_its_last_job_is_deleted(desk: Desk) -> None:
    ids = [desk.add() for _ in range(4)]
    jobs, cursor = desk.store.find("algebra", limit=2)
    desk.store.cancel(jobs[-1].id)
    desk.store.delete([jobs[-1].id])
    assert [job.id for job in desk.store.find("algebra", after=cursor)[0]] == [ids[1], ids[0]]


def test_a_page_is_bounded(desk: Desk, engine: Engine) -> None:
    desk.add()
    multiply(engine, 500)
    for asked, given in ((10_000, 200), (200, 200), (0, 1), (-1, 1)):
        jobs, cursor = desk.store.find(limit=asked)
        assert (len(jobs), cursor is None) == (given, False)


@pytest.mark.parametrize("cursor", ["", "x", "-1", "1.5", "1 OR 1=1", "9" * 19, "٣"])
def test_a_cursor_that_is_none_is_refused(desk: Desk, cursor: str) -> None:
    with pytest.raises(ValueError, match="cursor"):
        desk.store.find(after=cursor)


def test_jobs_are_counted_by_course_and_state(desk: Desk) -> None:
    assert desk.store.counts() == {}
    for state in ("done", "failed", "cancelled", "running"):
        desk.bring(state)
    desk.add(), desk.add(course="biology"), desk.add(course="biology")
    states: list[State] = ["done", "failed", "cancelled", "running", "queued"]
    assert desk.store.counts() == {**{("algebra", state): 1 for state in states}, ("biology", "queued"): 2}


def test_how_long_the_oldest_has_waited(desk: Desk) -> None:
    assert desk.store.oldest_queued_seconds() == 0
    job_id = desk.add(course="history")
    desk.clock.now += 50
    desk.add(kind="interactive")
    assert desk.store.oldest_queued_seconds() == 50
    desk.store.cancel(job_id)
    assert desk.store.oldest_queued_seconds() == 0
    desk.clock.now -= 10
    assert desk.store.oldest_queued_seconds() == 0
