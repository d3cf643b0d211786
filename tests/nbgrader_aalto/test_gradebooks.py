"""One engine for a run's gradebooks: no connection, and nothing of what was read, outlives a gradebook for it."""

import os
import threading
from pathlib import Path

import nbgrader.api
import pytest
from nbgrader.api import Gradebook

from nbgrader_aalto.gradebooks import _create_engine, one_engine


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A gradebook with an assignment."""
    path = tmp_path / "grade book ä.db"
    with Gradebook(f"sqlite:///{path}") as gradebook:
        gradebook.add_assignment("ps1")
    return path


def _descriptors(path: Path) -> list[str]:
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            continue
    return [name for name in found if name.startswith(str(path))]


def test_nbgrader_still_makes_its_engines_by_that_name() -> None:
    assert vars(nbgrader.api)["create_engine"] is _create_engine


def test_gradebooks_of_one_database_share_an_engine_while_the_run_lasts(path: Path, tmp_path: Path) -> None:
    url, other = f"sqlite:///{path}", f"sqlite:///{tmp_path}/other.db"
    with one_engine():
        with Gradebook(url) as first:
            pass
        with Gradebook(url) as second, Gradebook(other) as third:
            assert first.engine is second.engine
            assert third.engine is not second.engine
        with one_engine(), Gradebook(url) as inner:
            assert inner.engine is not first.engine
        with Gradebook(url) as again:
            assert again.engine is first.engine
    with Gradebook(url) as later:
        assert later.engine is not first.engine


def test_a_closed_gradebook_holds_nothing(path: Path) -> None:
    url = f"sqlite:///{path}"
    with one_engine():
        with Gradebook(url) as gradebook:
            gradebook.find_assignment("ps1")
            assert _descriptors(path)
        assert not _descriptors(path)
        os.rename(path, path.with_suffix(".old"))
        with Gradebook(url) as gradebook:  # a new one, with its tables
            assert gradebook.assignments == []
        os.replace(path.with_suffix(".old"), path)
        with Gradebook(url) as gradebook:
            assert [assignment.name for assignment in gradebook.assignments] == ["ps1"]


def test_what_others_wrote_is_seen_by_the_next_gradebook(path: Path) -> None:
    url = f"sqlite:///{path}"
    with one_engine():
        with Gradebook(url) as gradebook:
            assert gradebook.find_assignment("ps1").duedate is None

        def write() -> None:
            with Gradebook(url) as elsewhere:
                engines.append(elsewhere.engine)
                elsewhere.update_or_create_assignment("ps1", duedate="2030-01-01 12:00:00 UTC")

        engines = []
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
        with Gradebook(url) as gradebook:
            assert gradebook.find_assignment("ps1").duedate is not None
            assert gradebook.engine not in engines  # another thread's gradebooks have engines of their own


def test_an_error_ends_the_sharing(path: Path) -> None:
    url = f"sqlite:///{path}"
    opened = []

    def fail() -> None:
        with one_engine():
            opened.append(Gradebook(url))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with Gradebook(url) as later:
        assert later.engine is not opened[0].engine
    opened[0].close()
    assert not _descriptors(path)
