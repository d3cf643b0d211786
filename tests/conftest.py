"""Fixtures for all tests: who runs the supervisor, and an environment that every user may enter."""

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(os.path.dirname(__file__))  # for the package `attacks`; last, since `isolate` lies beside it

from attacks import compare, table
from attacks.harness import Attacker, Person, Stage
from campus import Campus

pytest_plugins = ["pytester"]
_STAGE = "ISOLATE_TEST_STAGE"


def pytest_addoption(parser: pytest.Parser) -> None:
    table.add_options(parser)
    parser.getgroup("threats").addoption(
        "--every-start", action="store_true", help="an ordinary user's warm sandboxes, too (see `_leave_out_user_warm`)"
    )
    parser.getgroup("threats").addoption(
        "--wall", choices=["isolate", *compare.OTHERS], default="isolate", help="what the probes run behind"
    )


def pytest_configure(config: pytest.Config) -> None:
    table.configure(config)
    config.addinivalue_line("markers", "threat(*rows): rows of the threat catalogue that this test tries")
    # A shell starts what is in the background with Ctrl-C ignored, and what we start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(config, "workerinput"):  # the controller of pytest-xdist, or the only process
        for number in (signal.SIGTERM, signal.SIGHUP):  # like Ctrl-C, so that what is on the stage goes
            signal.signal(number, signal.default_int_handler)
        os.environ[_STAGE] = str(Stage.new().directory)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    compare.leave_out(config.getoption("--wall"), items)
    if not config.getoption("--every-start"):
        _leave_out_user_warm(config, items)
    # A file goes to one worker as a whole, so files of few long tests must not come last. See the Makefile.
    items.sort(key=lambda item: _LONGEST_FIRST.index(_part(item)))


def _leave_out_user_warm(config: pytest.Config, items: list[pytest.Item]) -> None:
    """To save time: what is both is tried as root's warm and as the user's cold one. `make attacks` leaves out none."""
    kinds = [getattr(item, "callspec", None) for item in items]
    both = [
        item
        for item, kind in zip(items, kinds, strict=True)
        if kind
        and kind.params.get("person") == "user"
        and kind.params.get("start") == "warm"
        and "test_warm" not in item.nodeid
    ]
    if both and os.geteuid() == 0:
        config.hook.pytest_deselected(items=both)
        items[:] = [item for item in items if item not in set(both)]


_LONGEST_FIRST = ["e2e", "grader_service", "nbgrader_aalto", "upstream", "attacks", "isolate", ""]


def _part(item: pytest.Item) -> str:
    parts = (
        item.path.relative_to(Path(__file__).parent).parts if item.path.is_relative_to(Path(__file__).parent) else ()
    )
    return parts[0] if parts and parts[0] in _LONGEST_FIRST else ""


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput") and _STAGE in os.environ:
        stage = Stage(Path(os.environ.pop(_STAGE)))
        Campus(stage).close()
        stage.close()


@pytest.fixture(scope="session")
def stage() -> Stage:
    """Where this session keeps what it makes on the host; shared by the workers, removed at the end."""
    return Stage(Path(os.environ[_STAGE]))


@pytest.fixture(scope="session")
def campus(stage: Stage) -> Campus:
    """Students, instructors and an outsider, who are real Unix users of this session's."""
    return Campus.open(stage)


@pytest.fixture(params=["root", "user"])
def person(request: pytest.FixtureRequest, stage: Stage) -> Person:
    """Who runs the supervisor: root and an ordinary user."""
    if request.param == "user":
        return stage.user()
    if os.geteuid() != 0:
        pytest.skip("only root can be root")
    return Person("root", 0, 0, Path("/root"))


@pytest.fixture(params=["cold", "warm"])
def start(request: pytest.FixtureRequest) -> str:
    """How sandboxes start: as programs of their own, or forked from a template (see `isolate.warm`)."""
    return str(request.param)


@pytest.fixture
def attacker(stage: Stage, person: Person, start: str, request: pytest.FixtureRequest) -> Iterator[Attacker]:
    """Probes as this person, with a directory of their own that is gone after the test."""
    number = f"{os.getpid()}-{abs(hash(request.node.nodeid)):x}"
    directory = stage.directory / "cases" / number
    directory.mkdir(parents=True)
    one = Attacker(stage, person, directory, request.config.getoption("--wall"), start == "warm")
    try:
        yield one
    finally:
        one.close()
        shutil.rmtree(directory, ignore_errors=True)
