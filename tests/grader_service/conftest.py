"""Both databases for all tests of the service, and an engine on them."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from desk import Clock, Desk
from sqlalchemy import Engine

from attacks.harness import Stage
from grader_service.database import open_engine, upgrade
from grader_service.jobs import JobStore
from machines import make_machine, write_configuration
from postgres import Postgres


@pytest.fixture(scope="session")
def postgres(stage: Stage) -> Iterator[Postgres]:
    """A server for all tests of this worker; who wants to kill one has `Postgres.running`."""
    with Postgres.running(stage) as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def new_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], str]]:
    """Makes empty databases of this test's own; each call returns the URL of one."""
    if request.param == "sqlite":
        numbers = itertools.count()
        yield lambda: f"sqlite:///{tmp_path}/service-{next(numbers)}.db"
        return
    server: Postgres = request.getfixturevalue("postgres")
    with contextlib.ExitStack() as stack:

        def create() -> str:
            url = server.create()
            stack.callback(server.drop, url)
            return url

        yield create


@pytest.fixture
def database_url(new_database: Callable[[], str]) -> str:
    """An empty database of this test's own, on SQLite and on PostgreSQL."""
    return new_database()


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """A connection to it, with the service's tables in it."""
    engine = open_engine(database_url)
    upgrade(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def postgres_engine(postgres: Postgres) -> Iterator[Engine]:
    """For what cannot happen on SQLite, where one transaction writes at a time."""
    url = postgres.create()
    engine = open_engine(url)
    upgrade(engine)
    yield engine
    engine.dispose()
    postgres.drop(url)


@pytest.fixture
def desk(engine: Engine) -> Desk:
    """A store in that database, with a clock that stands still."""
    clock = Clock()
    return Desk(JobStore(engine, clock), clock)


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """The small machine that configurations are about."""
    return make_machine(tmp_path)


@pytest.fixture
def write(host: Path) -> Callable[..., Path]:
    """Write the configuration; `HOST` in it stands for the small machine's directory."""
    return functools.partial(write_configuration, host)
