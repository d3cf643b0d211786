"""Many processes at once, many jobs, and what dies in between: nothing is lost, nothing is done twice."""

import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from desk import Desk, multiply
from participants import GIB, Participant, new_job, participants
from sqlalchemy import Connection, Engine, event, text

from attacks.harness import LONG, Stage, eventually
from grader_service.database import open_engine, reading, upgrade, writing
from grader_service.jobs import Claimed, JobStore
from grader_service.models import JOBS
from postgres import Postgres

OPEN = {"algebra": 0, "biology": 0}


def _all_at_once(processes: list[Participant], *words: object) -> list[Any]:
    for process in processes:
        process.tell(*words)
    return [process.answer() for process in processes]


def _later(engine: Engine) -> JobStore:
    """A store an hour from now, when nobody's lease holds any more."""
    return JobStore(engine, lambda: time.time() + 3600)


def _run_to_the_end(engine: Engine, process: Participant, log: Path) -> None:
    """Bring back what died and run it, until all has ended."""
    _later(engine).expire_leases(1000)
    process.ask("run_all", OPEN, str(log))
    states = {state for _, state in JobStore(engine).counts()}
    assert states == {"done"}


def _check_that_each_ended_once(engine: Engine, log: Path) -> None:
    """What the processes told, also those that were killed, is what the rows say."""
    told = [line.split() for line in log.read_text().splitlines()]
    assert len({job_id for job_id, _ in told}) == len(told)
    with reading(engine) as connection:
        results = {row.id: row.result for row in connection.execute(JOBS.select())}
    assert all(results[job_id] == lease for job_id, lease in told)


def test_no_job_is_claimed_twice(desk: Desk, database_url: str) -> None:
    ids = [desk.add(course=course) for _ in range(40) for course in OPEN]
    with participants(database_url, 4) as processes:
        claimed = _all_at_once(processes, "claim_all", OPEN)
    assert sorted(job_id for some in claimed for job_id in some) == sorted(ids)


def test_a_courses_limit_holds_for_all_processes_together(desk: Desk, database_url: str) -> None:
    for _ in range(20):
        desk.add()
    with participants(database_url, 4) as processes:
        claimed = _all_at_once(processes, "claim_all", {"algebra": 3})
    assert sum(map(len, claimed)) == 3


def test_hosts_that_would_start_different_jobs_of_a_course_decide_one_after_the_other(postgres_engine: Engine) -> None:
    other_engine = open_engine(postgres_engine.url.render_as_string())
    store = JobStore(postgres_engine)
    store.add(new_job(kind="interactive", memory_bytes=8 * GIB))
    batch, _ = store.add(new_job())
    with ThreadPoolExecutor(1) as threads:
        other: list[Future[Claimed | None]] = []

        def answered_or_waiting() -> bool:
            query = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
            with reading(other_engine) as connection:
                return other[0].done() or connection.execute(query).scalar_one() == 1

        def let_the_other_try(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
            if statement.startswith("UPDATE"):
                other.append(threads.submit(_claim, JobStore(other_engine), 8 * GIB))
                assert eventually(answered_or_waiting, LONG)

        event.listen(postgres_engine, "before_cursor_execute", let_the_other_try)
        claimed = _claim(store, GIB)
        assert claimed is not None
        assert claimed.job.id == batch.id
        assert other[0].result(LONG) is None
    other_engine.dispose()


def _claim(store: JobStore, memory_bytes: int) -> Claimed | None:
    """On a host with so much memory, of a course that may run one job."""
    return store.claim(courses={"algebra": 1}, memory_free=memory_bytes, memory_total=memory_bytes, lease_seconds=60)


def test_a_key_makes_one_job_whoever_uses_it_at_once(desk: Desk, database_url: str) -> None:
    with participants(database_url, 4) as processes:
        answers = [answer for some in _all_at_once(processes, "add", 5, "k1", 0) for answer in some]
    assert len({job_id for job_id, _ in answers}) == 1
    assert Counter(created for _, created in answers) == {True: 1, False: 19}


def test_who_is_a_moment_later_with_the_same_key_gets_the_first_job(postgres_engine: Engine) -> None:
    """Between looking for the key and using it."""
    store, new = JobStore(postgres_engine), new_job(idempotency_key="k1")
    faster = [first := new_job(idempotency_key="k1")]

    def be_faster(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("INSERT") and faster:
            store.add(faster.pop())

    event.listen(postgres_engine, "before_cursor_execute", be_faster)
    job, created = store.add(new)
    assert (job.id, created) == (first.id, False)


def test_a_quota_holds_for_all_processes_together(desk: Desk, database_url: str) -> None:
    with participants(database_url, 4) as processes:
        accepted = _all_at_once(processes, "add", 5, None, 10)
    assert sum(map(len, accepted)) == 10
    assert desk.store.counts() == {("algebra", "queued"): 10}


def test_a_job_outlives_the_process_that_runs_it(engine: Engine, database_url: str) -> None:
    store = JobStore(engine)
    new = new_job()
    store.add(new)
    with participants(database_url, 2) as (first, second):
        job_id, lease = first.ask("claim", OPEN)
        assert second.ask("claim", OPEN) is None
        first.kill()
        assert store.expire_leases(3) == []  # its lease still lasts
        assert second.ask("claim", OPEN) is None
        assert _later(engine).expire_leases(3) == [new.id]
        again, other_lease = second.ask("claim", OPEN)
    assert again == job_id
    assert not store.finish(job_id, lease, "done", "", True)
    assert store.finish(job_id, other_lease, "done", "", True)


def test_a_process_that_is_killed_before_its_claim_is_complete_has_claimed_nothing(
    desk: Desk, database_url: str
) -> None:
    job_id = desk.add()
    with participants(database_url, 2) as (first, second):
        first.tell("claim_but_wait_before_the_commit", OPEN)
        assert first.answer() == "committing"
        second.tell("claim", OPEN)
        first.kill()
        assert second.answer()[0] == job_id
    assert desk.job(job_id).attempts == 1


def test_each_job_ends_once_although_processes_are_killed(engine: Engine, database_url: str, tmp_path: Path) -> None:
    moments = random.Random(6)
    store, log = JobStore(engine), tmp_path / "finished"
    for number in range(100):
        store.add(new_job(course=moments.choice(list(OPEN)), idempotency_key=str(number)))
    for round_number in range(3):
        with participants(database_url, 2) as processes:
            for process in processes:
                process.tell("run_all", OPEN, str(log))
            assert eventually(partial(_grown, [log], 5 * round_number), LONG)
            for process in processes:
                time.sleep(moments.uniform(0, 0.05))  # any moment will do
                process.kill()
        _later(engine).expire_leases(1000)
    assert _lines(log) > 0
    with participants(database_url, 1) as (last,):
        _run_to_the_end(engine, last, log)
    assert sum(store.counts().values()) == 100
    _check_that_each_ended_once(engine, log)


def _grown(paths: list[Path], lines: int) -> bool:
    return all(_lines(path) > lines for path in paths)


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_postgresql_is_killed_while_jobs_are_added_and_claimed_and_nothing_is_lost(
    stage: Stage, tmp_path: Path
) -> None:
    finished, accepted = tmp_path / "finished", tmp_path / "accepted"
    with Postgres.running(stage) as server:
        url = server.create()
        engine = open_engine(url)
        upgrade(engine)
        with participants(url, 4) as processes:
            adder, *runners = processes
            adder.tell("add_for_ever", str(accepted))
            for runner in runners:
                runner.tell("run_all_for_ever", OPEN, str(finished))
            for _ in range(4):
                seen = max(_lines(finished), _lines(accepted))
                assert eventually(partial(_grown, [finished, accepted], seen), LONG)
                server.kill()
                server.start()
            for process in processes:
                process.kill()
        with participants(url, 1) as (last,):
            _run_to_the_end(engine, last, finished)
        _check_that_each_ended_once(engine, finished)
        told = [line.split() for line in accepted.read_text().splitlines()]
        with reading(engine) as connection:
            ids = set(connection.execute(text("SELECT id FROM jobs")).scalars())
        engine.dispose()
    assert {job_id for job_id, _ in told} <= ids
    assert len(ids) - len(told) <= 1  # the last one may have been accepted without being told
    assert {created for _, created in told} == {"True"}


# 100,000 jobs


def _statements(engine: Engine, call: Callable[[], object]) -> list[tuple[str, Any]]:
    """What a call asks the database, with its parameters."""
    found: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        found.append((statement, parameters))

    event.listen(engine, "before_cursor_execute", note)
    call()
    event.remove(engine, "before_cursor_execute", note)
    return [(statement, parameters) for statement, parameters in found if re.match("SELECT|WITH|UPDATE", statement)]


def _scans(engine: Engine, statements: list[tuple[str, Any]]) -> list[str]:
    """The steps of their plans that read all jobs."""
    sqlite = engine.dialect.name == "sqlite"
    with reading(engine) as connection:
        steps = [
            str(row[-1])
            for statement, parameters in statements
            for row in connection.exec_driver_sql(f"EXPLAIN {'QUERY PLAN ' if sqlite else ''}{statement}", parameters)
        ]
    assert any("ix_jobs_state_course_kind_sequence" in step for step in steps)
    return [step for step in steps if re.search(r"SCAN (jobs|other)" if sqlite else "Seq Scan on jobs", step)]


@contextmanager
def _work(engine: Engine) -> Iterator[list[int]]:
    """For each transaction that is committed: instructions of SQLite's machine, or rows that PostgreSQL read."""
    found = [0]

    def count() -> None:
        found[-1] += 1

    def rows(connection: Connection) -> int:
        query = "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'jobs'"
        return int(connection.exec_driver_sql(query).scalar_one())

    def begin(connection: Connection) -> None:
        if engine.dialect.name == "postgresql":
            found[-1] = -rows(connection)  # earlier transactions may still be in it
        else:
            connection.connection.dbapi_connection.set_progress_handler(count, 1)  # type: ignore[union-attr]

    def commit(connection: Connection) -> None:
        if engine.dialect.name == "postgresql":
            found[-1] += rows(connection)
        else:
            connection.connection.dbapi_connection.set_progress_handler(None, 1)  # type: ignore[union-attr]
        found.append(0)

    event.listen(engine, "begin", begin)
    event.listen(engine, "commit", commit)
    yield found
    event.remove(engine, "begin", begin)
    event.remove(engine, "commit", commit)


def _claim_some(desk: Desk, engine: Engine, count: int) -> list[int]:
    """The work for each of so many claims. PostgreSQL changes to prepared statements meanwhile."""
    courses = {f"course-{number}": 0 for number in range(20)}
    with _work(engine) as work:
        for _ in range(count):
            assert desk.started(courses=courses)
    return work[:-1]


def test_a_claim_costs_the_same_with_100_000_jobs_in_the_queue(desk: Desk, engine: Engine) -> None:
    for number in range(20):
        desk.add(course=f"course-{number}", kind="interactive" if number % 2 else "batch", memory_bytes=0)
    multiply(engine, 10)
    few = max(_claim_some(desk, engine, 3))
    multiply(engine, 500)
    assert desk.store.counts()["course-0", "queued"] > 4000
    many = _claim_some(desk, engine, 15)
    assert _scans(engine, _statements(engine, lambda: _claim_some(desk, engine, 1))) == []
    with writing(engine) as connection:
        connection.execute(text("ANALYZE"))
    many += _claim_some(desk, engine, 15)
    with writing(engine) as connection:  # the usual sight: a long past, a short queue
        connection.execute(text("UPDATE jobs SET state = 'done' WHERE state = 'queued' AND sequence < 99000"))
        connection.execute(text("ANALYZE"))
    many += _claim_some(desk, engine, 15)
    assert _scans(engine, _statements(engine, lambda: _claim_some(desk, engine, 1))) == []
    assert max(many) < 2 * few + 200
