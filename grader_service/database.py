"""Connections to the service's database, SQLite by default, PostgreSQL by URL; migrations; going on after a loss.

Every transaction begins as one that writes (on SQLite: BEGIN IMMEDIATE), because one that begins as a reader and
writes later cannot wait for another writer, it fails. Who only reads says so: `reading(engine)`.

Refuses to know what is in the tables. No message of this module shows a password or a parameter of a statement.
"""

import contextlib
import os
import random
import sqlite3
import stat
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import URL, Connection, Engine, ExceptionContext, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

_Value = TypeVar("_Value")

BUSY_SECONDS = 30.0
"""How long one who writes waits for another."""
_CLAIMS, _SUBMISSIONS, _UPGRADES = 0x67726164, 0x67726165, 0x67726166
"""Keys of PostgreSQL's advisory locks, which each database has for itself."""
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.05, 5.0
_writers: "weakref.WeakKeyDictionary[Engine, threading.RLock]" = weakref.WeakKeyDictionary()
"""SQLite lets those who wait poll, and some of them for seconds; threads of one process need not."""


class DatabaseError(Exception):
    """The database cannot be used as it is. The words say why, and what to do."""


class NeedsUpgrade(DatabaseError):
    """The database is older than this program, or empty."""


class NewerDatabase(DatabaseError):
    """The database was made by a later version of this program."""


def open_engine(url: str, *, pool_size: int = 10) -> Engine:
    """The database of this URL, whose connections are opened when they are needed: `sqlite:///FILE` or
    `postgresql+psycopg://...`. SQLite's file is made if it is missing, for its owner alone.

    `pool_size`: connections that are kept open; at most twice as many are used at once. Raises `DatabaseError`.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise DatabaseError("the database URL cannot be understood; it looks like sqlite:////path/service.db") from None
    common: dict[str, Any] = {
        "hide_parameters": True,  # they hold names of students
        "pool_pre_ping": True,
        "pool_size": pool_size,
        "max_overflow": pool_size,
    }
    if parsed.get_backend_name() == "sqlite":
        return _open_sqlite(parsed, common)
    if parsed.drivername == "postgresql+psycopg":
        return _open_postgresql(parsed, common)
    raise DatabaseError(f"no such database: {parsed.drivername}; use sqlite:///FILE or postgresql+psycopg://")


def _open_sqlite(url: URL, common: dict[str, Any]) -> Engine:
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        raise DatabaseError("the service needs SQLite in a file: sqlite:////path/service.db")
    _make_private(Path(url.database))
    timeout = {} if "timeout" in url.query else {"timeout": BUSY_SECONDS}
    engine = create_engine(url, **common, pool_timeout=BUSY_SECONDS, connect_args=timeout)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    _writers[engine] = threading.RLock()
    return engine


def _open_postgresql(url: URL, common: dict[str, Any]) -> Engine:
    """Who holds locks and is not heard of any more is cut off by the server, and a dead server is noticed."""
    milliseconds = int(BUSY_SECONDS * 1000)
    limits = {
        "lock_timeout": milliseconds,
        "statement_timeout": 2 * milliseconds,
        "idle_in_transaction_session_timeout": milliseconds,
    }
    wanted = {
        "application_name": "grader-service",
        "connect_timeout": 10,
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 60_000,
        "options": " ".join(f"-c {name}={value}" for name, value in limits.items()),
    }
    arguments = {name: value for name, value in wanted.items() if name not in url.query}  # the administrator's win
    engine = create_engine(url, **common, pool_timeout=BUSY_SECONDS, connect_args=arguments)
    event.listen(engine, "handle_error", _leave_out_details)
    return engine


def _leave_out_details(context: ExceptionContext) -> None:
    """PostgreSQL shows the row that a constraint refuses, and with it the name of a student."""
    for error in (context.original_exception, context.sqlalchemy_exception):
        if error is not None and error.args:
            error.args = (str(error.args[0]).partition("\nDETAIL:")[0], *error.args[1:])


def _make_private(path: Path) -> None:
    """Mode 0600 for the file and what SQLite puts beside it, which takes the file's mode when it is new.

    By path: a descriptor of a database that is closed takes away the locks that this process holds on it
    (sqlite.org/howtocorrupt.html, 2.2).
    """
    try:
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        for name in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
            with contextlib.suppress(FileNotFoundError):
                mode = os.stat(name).st_mode
                if not stat.S_ISREG(mode):
                    raise DatabaseError(f"the database {name} is not a file")
                if mode & 0o077:
                    os.chmod(name, 0o600)
    except OSError as error:
        raise DatabaseError(
            f"the database {path} cannot be made private to this user: {error.strerror}. It must lie in an existing "
            "directory and belong to the user that runs the service."
        ) from error


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # transactions begin as `_begin_sqlite` says, not as the driver guesses
    mode = _write_ahead(connection)
    if mode != "wal":
        raise DatabaseError(f"SQLite cannot keep a write-ahead log here (journal mode {mode}): use a local file system")
    connection.execute("PRAGMA synchronous=FULL")  # a commit is on the disk: sqlite.org/pragma.html#pragma_synchronous
    connection.execute("PRAGMA foreign_keys=ON")
    connection.execute(
        "PRAGMA secure_delete=ON"
    )  # what is deleted is overwritten: sqlite.org/pragma.html#pragma_secure_delete


def _write_ahead(connection: sqlite3.Connection) -> str:
    """The journal mode after asking for the log. Changing it does not wait for others, whatever the timeout."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return str(connection.execute("PRAGMA journal_mode=WAL").fetchone()[0])
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(_SHORTEST_PAUSE * random.uniform(0.1, 1))  # SQLite has no event for it


def _begin_sqlite(connection: Connection) -> None:
    only_reads = connection.get_execution_options().get("only_reads", False)
    connection.exec_driver_sql("BEGIN" if only_reads else "BEGIN IMMEDIATE")


@contextlib.contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A transaction that waits for nobody and for which nobody waits."""
    with engine.connect() as connection:
        connection = connection.execution_options(only_reads=True)
        with connection.begin():
            yield connection


@contextlib.contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A transaction that is committed when the block ends in order."""
    with _writers.get(engine, contextlib.nullcontext()), engine.begin() as connection:
        yield connection


def one_claims(connection: Connection) -> None:
    """Until the transaction ends, nobody else gets past this. On SQLite whoever writes is alone anyway."""
    _lock(connection, _CLAIMS, 0)


def one_submits(connection: Connection, course: str) -> None:
    """Until the transaction ends, nobody else gets past this for this course."""
    _lock(connection, _SUBMISSIONS, zlib.crc32(course.encode()) - (1 << 31))


def _lock(connection: Connection, key: int, detail: int) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key, :detail)"), {"key": key, "detail": detail})


def erase(engine: Engine) -> bool:
    """Take what was deleted out of the database's files and logs, too. False if somebody kept it from ending in time.

    SQLite: the write-ahead log is emptied. PostgreSQL: dead rows are removed; its own log keeps them until it is
    recycled, and backups do for as long as they are kept.
    """
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        raw = connection.connection.driver_connection
        assert raw is not None
        if engine.dialect.name == "postgresql":
            raw.execute("VACUUM jobs")
            return True
        deadline = time.monotonic() + BUSY_SECONDS
        while raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
            if time.monotonic() > deadline:
                return False
            time.sleep(_SHORTEST_PAUSE)  # SQLite has no event for it
        return True


def upgrade(engine: Engine) -> None:
    """Bring the tables to this program's version, all or nothing. Several processes may do it at once.

    Raises `NewerDatabase`.
    """
    with writing(engine) as connection:
        if connection.dialect.name == "postgresql":
            for name in ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"):
                connection.execute(text(f"SET LOCAL {name} = 0"))
        _lock(connection, _UPGRADES, 0)
        config = _config()
        _position(connection, config)
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def check_revision(engine: Engine) -> None:
    """Raises `NeedsUpgrade` or `NewerDatabase` unless the tables are those of this program's version."""
    config = _config()
    with reading(engine) as connection:
        if not _position(connection, config):
            raise NeedsUpgrade("the database is empty or older than this program: run `grader-service db upgrade`")


def _config() -> Config:
    config = Config()
    directory = Path(__file__).parent / "migrations"
    config.set_main_option("script_location", str(directory).replace("%", "%%"))  # configparser's escape
    return config


def _position(connection: Connection, config: Config) -> bool:
    """Whether the database has this program's revision. Raises `NewerDatabase` if it has one that is not known."""
    script = ScriptDirectory.from_config(config)
    found = MigrationContext.configure(connection).get_current_heads()
    for revision in found:
        try:
            script.get_revision(revision)
        except CommandError:
            raise NewerDatabase(
                f"the database has revision {revision}, which this program does not know: a later version made it. "
                "Install that version, or restore a copy of the database from before its upgrade."
            ) from None
    return set(found) == set(script.get_heads())


def retrying(call: Callable[[], _Value], *, seconds: float = 300.0, stop: threading.Event | None = None) -> _Value:
    """The value of `call`, which is called again while the database is away, for this long or until `stop` is set.

    `call` must do the same when it is done twice: the answer to a commit may be lost with the connection.
    """
    deadline, pause = time.monotonic() + seconds, _SHORTEST_PAUSE
    waiter = stop or threading.Event()
    while True:
        try:
            return call()
        except (DBAPIError, PoolTimeout) as error:
            left = deadline - time.monotonic()
            if not will_pass(error) or left <= 0 or waiter.wait(min(left, pause * random.uniform(0.5, 1))):
                raise
            pause = min(2 * pause, _LONGEST_PAUSE)


def will_pass(error: Exception) -> bool:
    """Whether it is a matter of time: the server restarts, somebody else holds a lock, the disk is full."""
    if isinstance(error, PoolTimeout):
        return True
    if isinstance(error, DBAPIError) and isinstance(error.orig, sqlite3.Error):
        return isinstance(error, OperationalError) and error.orig.sqlite_errorcode != sqlite3.SQLITE_ERROR
    return isinstance(error, OperationalError | InterfaceError) or (
        isinstance(error, DBAPIError) and error.connection_invalidated
    )
