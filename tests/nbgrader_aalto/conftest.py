"""A course for the tests of one module, see `e2e.courses`; and clerks and places for those of real Unix users."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.append(os.path.dirname(__file__))  # for tests in directories below

from clerks import Clerks
from places import made, place

from e2e.courses import Course

__all__ = ["made", "place"]


@pytest.fixture(scope="session")
def clerks() -> Iterator[Clerks]:
    """People's processes that have imported nbgrader."""
    made = Clerks()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The font list's place, one for all courses: building it takes seconds."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def make_course(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Callable[..., Course]:
    """Make a course in a directory of its own: `make_course(config)`."""

    def make(config: str = "") -> Course:
        return Course(tmp_path_factory.mktemp("course") / "with blank", config, cache)

    return make
