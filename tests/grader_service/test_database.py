"""Connections, migrations, and going on after a loss, on real databases."""

import contextlib
import dataclasses
import os
import sqlite3
import stat
import subprocess
import sys
import threading
import tomllib
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from participants import REPOSITORY, new_job, participants
from sqlalchemy import Engine, insert, inspect, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from attacks.harness import LONG, Stage
from grader_service.database import (
    DatabaseError,
    NeedsUpgrade,
    NewerDatabase,
    check_revision,
    one_claims,
    one_submits,
    open_engine,
    reading,
    retrying,
    upgrade,
    writing,
)
from grader_service.models import JOBS
from postgres import Postgres


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/service.db"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "cannot be understood"),
        ("service.db", "cannot be understood"),
        ("mysql://u:hunter2@h/d", "no such database: mysql"),
        ("postgresql://u:hunter2@h/d", "use sqlite"),
        ("sqlite://", "in a file"),
        ("sqlite:///:memory:", "in a file"),
        ("sqlite:////nowhere/at/all.db", "existing directory"),
    ],
)
def test_a_url_that_cannot_serve_is_refused_with_what_to_do(url: str, words: str) -> None:
    with pytest.raises(DatabaseError, match=words) as caught:
        open_engine(url)
    assert "hunter2" not in str(caught.value)


def test_a_directory_in_the_place_of_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatabaseError, match="is not a file"):
        open_engine(f"sqlite:///{tmp_path}")


def test_files_of_sqlite_are_for_their_owner_alone(sqlite_url: str, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        engine = open_engine(sqlite_url)
        upgrade(engine)
        with writing(engine) as connection:
            connection.execute(text("CREATE TABLE t (x)"))
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    finally:
        os.umask(before)
    engine.dispose()
    assert modes == dict.fromkeys(["service.db", "service.db-wal", "service.db-shm"], 0o600)


def test_files_that_others_may_read_are_closed_to_them(sqlite_url: str, tmp_path: Path) -> None:
    engine = open_engine(sqlite_url)
    upgrade(engine)
    for path in tmp_path.iterdir():
        path.chmod(0o644)
    assert len(list(tmp_path.iterdir())) == 3
    again = open_engine(sqlite_url)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}
    check_revision(again)
    again.dispose()
    engine.dispose()


def test_opening_again_leaves_the_locks_of_this_process_alone(sqlite_url: str) -> None:
    """A descriptor of the file that is closed takes them away; then the next process that leaves removes the log."""
    engine = open_engine(sqlite_url)
    upgrade(engine)
    with reading(engine) as connection:
        connection.execute(text("SELECT * FROM jobs"))
        open_engine(sqlite_url).dispose()
        passer_by = "import sqlite3, sys; sqlite3.connect(sys.argv[1]).execute('SELECT * FROM jobs').connection.close()"
        subprocess.run([sys.executable, "-c", passer_by, sqlite_url[10:]], check=True)
        assert Path(f"{sqlite_url[10:]}-wal").exists()
    engine.dispose()
    assert not Path(f"{sqlite_url[10:]}-wal").exists()


def test_what_sqlite_commits_is_on_the_disk(sqlite_url: str) -> None:
    engine = open_engine(sqlite_url)
    with reading(engine) as connection:
        values = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    engine.dispose()
    assert values == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}


def test_postgresql_cuts_off_who_holds_locks_and_is_silent(postgres: Postgres) -> None:
    url = postgres.create()
    names = ("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout")
    for wanted, query in ((["30s", "1min", "30s"], ""), (["7s", "0", "0"], "&options=-c%20lock_timeout%3D7s")):
        engine = open_engine(url + query)
        with reading(engine) as connection:
            assert [connection.exec_driver_sql(f"SHOW {name}").scalar_one() for name in names] == wanted
        engine.dispose()
    postgres.drop(url)


def test_readers_and_a_writer_do_not_wait_for_each_other(engine: Engine) -> None:
    with writing(engine) as writer:
        writer.execute(text("CREATE TABLE t (x INTEGER)"))
    with writing(engine) as writer, reading(engine) as reader:
        writer.execute(text("INSERT INTO t VALUES (1)"))
        assert reader.execute(text("SELECT count(*) FROM t")).scalar_one() == 0
    with reading(engine) as reader:
        assert reader.execute(text("SELECT count(*) FROM t")).scalar_one() == 1


def test_a_block_that_raises_commits_nothing(engine: Engine) -> None:
    with writing(engine) as connection:
        connection.execute(text("CREATE TABLE t (x INTEGER)"))
    with contextlib.suppress(ZeroDivisionError), writing(engine) as connection:
        connection.execute(text("INSERT INTO t VALUES (1)"))
        raise ZeroDivisionError
    with reading(engine) as connection:
        assert connection.execute(text("SELECT count(*) FROM t")).scalar_one() == 0


@pytest.mark.parametrize("lock", [one_claims, lambda connection: one_submits(connection, "algebra")])
def test_what_is_read_under_a_lock_still_holds_when_it_is_written(
    engine: Engine, database_url: str, lock: Callable[..., None]
) -> None:
    with writing(engine) as connection:
        connection.execute(text("CREATE TABLE t (x INTEGER)"))
        connection.execute(text("INSERT INTO t VALUES (0)"))

    def count_up(_: int) -> None:
        own = open_engine(database_url)  # as another process has
        for _ in range(20):
            with writing(own) as connection:
                lock(connection)
                value = connection.execute(text("SELECT x FROM t")).scalar_one()
                connection.execute(text("UPDATE t SET x = :x"), {"x": value + 1})
        own.dispose()

    with ThreadPoolExecutor(5) as threads:
        list(threads.map(count_up, range(5)))
    with reading(engine) as connection:
        assert connection.execute(text("SELECT x FROM t")).scalar_one() == 100


def test_courses_do_not_wait_for_each_other_when_they_submit(postgres: Postgres) -> None:
    url = postgres.create()
    engine = open_engine(url)
    with writing(engine) as one, writing(engine) as other:
        one_submits(one, "algebra")
        other.execute(text("SET lock_timeout = '10ms'"))
        one_submits(other, "biology")
        with pytest.raises(OperationalError, match="lock timeout"):
            one_submits(other, "algebra")
        other.rollback()
    engine.dispose()
    postgres.drop(url)


@pytest.mark.parametrize("wrong", [{"course": None}, {"kind": "urgent"}, {"id": "known"}], ids=str)
def test_names_of_students_are_in_no_error_message(engine: Engine, wrong: dict[str, str | None]) -> None:
    job = {**dataclasses.asdict(new_job(id="known", student="ada.lovelace")), "state": "queued", "attempts": 0}
    job["submitted_at"] = 0.0
    with writing(engine) as connection:
        connection.execute(insert(JOBS), job)
    with pytest.raises(IntegrityError) as caught:
        _insert(engine, {**job, "id": "new", **wrong})
    told = "".join(traceback.format_exception(caught.value))
    assert "SQL parameters hidden" in told
    assert "ada.lovelace" not in told


def _insert(engine: Engine, job: dict[str, Any]) -> None:
    with writing(engine) as connection:
        connection.execute(insert(JOBS), job)


def test_an_empty_database_asks_for_the_upgrade(database_url: str) -> None:
    engine = open_engine(database_url)
    with pytest.raises(NeedsUpgrade, match="grader-service db upgrade"):
        check_revision(engine)
    for _ in range(2):
        upgrade(engine)
        check_revision(engine)
    engine.dispose()


def test_a_newer_database_is_refused_and_left_alone(engine: Engine) -> None:
    with writing(engine) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    for step in (check_revision, upgrade):
        with pytest.raises(NewerDatabase, match="revision 9999"):
            step(engine)
    with reading(engine) as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all() == ["9999"]


def test_a_migration_that_fails_leaves_nothing(database_url: str) -> None:
    engine = open_engine(database_url)
    with writing(engine) as connection:
        connection.execute(text("CREATE TABLE tokens (x INTEGER)"))  # so that jobs can be made, tokens cannot
    with pytest.raises(DBAPIError):
        upgrade(engine)
    assert inspect(engine).get_table_names() == ["tokens"]
    with writing(engine) as connection:
        connection.execute(text("DROP TABLE tokens"))
    upgrade(engine)
    check_revision(engine)
    engine.dispose()


def test_several_processes_may_open_and_upgrade_a_new_database_at_once(database_url: str) -> None:
    with participants(database_url, 4) as processes:
        for process in processes:
            process.tell("upgrade")
        assert [process.answer() for process in processes] == [True] * 4


def test_migrations_are_in_the_wheel() -> None:
    setuptools = pytest.importorskip("setuptools")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    wanted = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert "grader_service.migrations.versions" in setuptools.find_packages(str(REPOSITORY), include=wanted)


def test_postgresql_may_be_killed_and_started_again(stage: Stage) -> None:
    with Postgres.running(stage) as server:
        engine = open_engine(server.create())
        upgrade(engine)
        server.kill()
        with pytest.raises(OperationalError):
            check_revision(engine)
        failed = threading.Event()

        def ask() -> bool:
            try:
                check_revision(engine)
            except OperationalError:
                failed.set()
                raise
            return True

        with ThreadPoolExecutor(1) as threads:
            answer = threads.submit(retrying, ask)
            assert failed.wait(LONG)
            server.start()
            assert answer.result(LONG)
        server.kill()
        server.start()
        check_revision(engine)  # a connection that died meanwhile is not handed out
        engine.dispose()


def test_retrying_ends_with_the_error_when_time_is_up_or_it_is_told_to(sqlite_url: str) -> None:
    engine = open_engine(f"{sqlite_url}?timeout=0")
    upgrade(engine)
    calls = []

    def write() -> None:
        calls.append(None)
        with writing(engine):
            pass

    stop = threading.Event()
    stop.set()
    with contextlib.closing(sqlite3.connect(sqlite_url[10:], isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(OperationalError, match="locked"):
            retrying(write, seconds=0)
        with pytest.raises(OperationalError, match="locked"):
            retrying(write, stop=stop)
    assert len(calls) == 2
    retrying(write)
    engine.dispose()


def test_what_time_does_not_mend_is_not_tried_again(engine: Engine) -> None:
    calls = []

    def ask() -> None:
        calls.append(None)
        with reading(engine) as connection:
            connection.execute(text("SELECT * FROM no_such_table"))

    with pytest.raises(DBAPIError):
        retrying(ask)
    assert len(calls) == 1
