"""A course for the tests of one module; see `e2e.courses`."""

from collections.abc import Callable
from pathlib import Path

import pytest

from e2e.courses import Course


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
