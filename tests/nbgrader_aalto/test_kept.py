"""The nursery that a server keeps: for whom, until when, and never for a run with more than one turn."""

import asyncio
import threading
from collections.abc import Iterator

import pytest

from e2e.courses import Course, answer, check, notebook
from e2e.host import eventually
from nbgrader_aalto import kept


@pytest.fixture(autouse=True)
def nothing_is_kept() -> Iterator[None]:
    """Before and after."""
    kept._keep(None)
    yield
    kept._keep(None)
    assert eventually(lambda: "kept templates" not in {thread.name for thread in threading.enumerate()})


def test_a_server_is_what_has_a_running_loop() -> None:
    async def ask() -> bool:
        return kept.in_server()

    assert not kept.in_server()
    assert asyncio.run(ask())


def test_one_is_kept_for_each_course_assignment_and_list_of_imports() -> None:
    first = kept.nursery("ps1", ["wave"], patient=False)
    kept.let_go(first)
    assert kept.nursery("ps1", ["wave"], patient=True) is first
    assert first.patient
    second = kept.nursery("ps1", ["wave", "json"], patient=False)
    assert second is not first
    assert first._closed
    assert not second._closed
    kept.let_go(first)  # of a run that began before
    assert kept.nursery("ps1", ["wave", "json"], patient=False) is second


def test_where_memory_is_short_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "available_bytes", lambda: kept._ENOUGH_BYTES - 1)
    first = kept.nursery("ps1", [], patient=False)
    kept.let_go(first)
    assert first._closed
    assert kept.nursery("ps1", [], patient=False) is not first


@pytest.mark.slow
def test_a_run_of_several_assignments_in_a_notebook_grades_all(tmp_path_factory: pytest.TempPathFactory) -> None:
    """nbgrader goes from student to student, and through all assignments of each."""
    course = Course(tmp_path_factory.mktemp("kept") / "with blank")
    for name in ("ps1", "ps2"):
        course.add(name, {"p1": notebook(answer("one"), check("test_one", "assert one == 1", 2))})
        for student in ("aino", "eino", "venla"):
            course.submit(student, name, answers={"one": "one = 1"})

    async def grade() -> dict[str, object]:
        return course.click("*", "ps*")

    answered = asyncio.run(grade())
    assert answered["success"] is True, answered
    for name in ("ps1", "ps2"):
        for student in ("aino", "eino", "venla"):
            assert course.scores(student, name) == {"test_one": 2}
