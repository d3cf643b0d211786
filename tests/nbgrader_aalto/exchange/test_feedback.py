"""Feedback: one page, one person."""

import shutil
from pathlib import Path

import pytest
from worlds import World

from campus import Member


def boxes(world: World, who: Member) -> list[Path]:
    """A person's boxes, by their owner."""
    return [path for path in world.boxes.iterdir() if path.lstat().st_uid == who.uid]


def pages(world: World, who: Member, assignment: str) -> list[str]:
    """What lies in a person's boxes for an assignment."""
    found = [path for box in boxes(world, who) for path in box.glob(f"{assignment}+*.html")]
    return [path.read_text() for path in found]


def fetched(world: World, who: Member, assignment: str) -> list[str]:
    """Fetch feedback; the texts of the pages."""
    done = world.as_student(who, "fetch_feedback", assignment)
    assert done.code == 0, done.log
    return [p.read_text() for p in sorted((world.notebooks(who) / assignment / "feedback").glob("*/p1.html"))]


def release(world: World, assignment: str, *options: str, who: int = 0) -> str:
    done = world.as_instructor("release_feedback", assignment, *options, who=who)
    assert done.code == 0, done.log
    return done.log


@pytest.mark.threat("86")
def test_feedback_reaches_one_person(world: World) -> None:
    assignment, (alice, bob, carol) = world.release(), world.campus.students
    world.submit(alice, assignment)
    world.submit(bob, assignment)
    world.collect(assignment)
    world.write_feedback(alice, assignment, "for alice")
    world.write_feedback(bob, assignment, "for bob")
    assert "reached 2 of 2" in release(world, assignment, who=1)
    assert fetched(world, alice, assignment) == ["for alice"]
    assert fetched(world, bob, assignment) == ["for bob"]
    (page,) = (path for box in boxes(world, alice) for path in box.glob(f"{assignment}+*.html"))
    assert f"{page.stat().st_mode & 0o777:o}" == "644"
    for other in (bob, carol, world.campus.outsider):
        done = other.python("import sys; print(open(sys.argv[1]).read())", page)
        assert "PermissionError" in done.log, other


def test_feedback_of_one_student_only(world: World) -> None:
    assignment, (alice, bob, _) = world.release(), world.campus.students
    for student in (alice, bob):
        world.submit(student, assignment)
    world.collect(assignment)
    for student in (alice, bob):
        world.write_feedback(student, assignment, f"for {student.name}")
    release(world, assignment, "--student", alice.name)
    assert (len(pages(world, alice, assignment)), len(pages(world, bob, assignment))) == (1, 0)
    release(world, assignment)
    assert (len(pages(world, alice, assignment)), len(pages(world, bob, assignment))) == (1, 1)


@pytest.mark.parametrize("aside", [".{assignment}.before", "{assignment}/.p1.html.before"])
def test_feedback_that_is_being_generated_is_not_released(world: World, aside: str) -> None:
    """By a colleague, for one notebook or all: it is half a page now. The others get theirs."""
    assignment, (alice, bob, _) = world.release(), world.campus.students
    for student in (alice, bob):
        world.submit(student, assignment)
    world.collect(assignment)
    for student in (alice, bob):
        world.write_feedback(student, assignment, f"for {student.name}")
    mark = world.tree.root / "feedback" / alice.name / aside.format(assignment=assignment)
    mark.touch()
    log = release(world, assignment)
    assert f"No feedback released for '{alice.name}': it is being generated now" in log
    assert (len(pages(world, alice, assignment)), len(pages(world, bob, assignment))) == (0, 1)
    mark.unlink()
    release(world, assignment)
    assert len(pages(world, alice, assignment)) == 1


def test_excluded_students_get_no_feedback(world: World) -> None:
    assignment, (alice, bob, _) = world.release(), world.campus.students
    for student in (alice, bob):
        world.submit(student, assignment)
    world.collect(assignment)
    for student in (alice, bob):
        world.write_feedback(student, assignment, f"for {student.name}")
    release(world, assignment, f"--CourseDirectory.student_id_exclude={bob.name},nobody")
    assert (len(pages(world, alice, assignment)), len(pages(world, bob, assignment))) == (1, 0)


def test_feedback_again_after_regrading(world: World) -> None:
    """By the other instructor, over the file of the first."""
    assignment, student = world.release(), world.campus.students[0]
    world.submit(student, assignment)
    world.collect(assignment)
    world.write_feedback(student, assignment, "first")
    release(world, assignment, who=0)
    assert fetched(world, student, assignment) == ["first"]
    world.write_feedback(student, assignment, "second")
    release(world, assignment, who=1)
    assert fetched(world, student, assignment) == ["second"]
    assert len(pages(world, student, assignment)) == 1


def test_listing_tells_new_feedback(world: World) -> None:
    assignment, student = world.release(), world.campus.students[0]

    def listed(who: Member | None = None) -> str:
        if who is None:
            return world.as_instructor("list", assignment, "--inbound").log
        return world.as_student(who, "list", assignment, "--cached").log

    world.submit(student, assignment)
    assert "(no feedback available)" in listed(student)
    world.collect(assignment)
    world.write_feedback(student, assignment, "first")
    release(world, assignment)
    assert "(feedback ready to be fetched)" in listed(student)
    assert "(feedback ready to be fetched)" in listed()
    fetched(world, student, assignment)
    assert "(feedback already fetched)" in listed(student)
    world.write_feedback(student, assignment, "second")
    release(world, assignment)
    assert "(feedback ready to be fetched)" in listed(student)
    world.submit(student, assignment)
    log = listed(student)
    assert log.count("(feedback ready to be fetched)") == 1
    assert log.count("(no feedback available)") == 1


def test_feedback_for_a_student_without_a_box_arrives_later(world: World) -> None:
    """A zip import: nothing was submitted, so that nobody made a box."""
    assignment, student = world.release(), world.campus.students[2]
    for box in boxes(world, student):
        shutil.rmtree(box)
    code = "import os, sys; os.umask(0o007); os.makedirs(sys.argv[1])"
    assert world.campus.instructors[0].python(code, world.submitted(student, assignment)).code == 0
    world.write_feedback(student, assignment, "from the zip")
    log = release(world, assignment)
    assert f"No box yet: {student.name}" in log
    listed = world.as_student(student, "list", assignment, "--cached")
    assert listed.code == 0, listed.log
    assert len(boxes(world, student)) == 1
    release(world, assignment)
    assert "(feedback ready to be fetched)" in world.as_student(student, "list", assignment, "--cached").log
    assert fetched(world, student, assignment) == ["from the zip"]


def test_a_lost_box_is_filled_again(world: World) -> None:
    """The student's local memory of the box is lost, so another one is made; what was released is delivered again."""
    assignment, student = world.release(), world.campus.students[0]
    world.submit(student, assignment)
    world.collect(assignment)
    world.write_feedback(student, assignment, "once")
    release(world, assignment)
    before = len(boxes(world, student))
    (student.home / ".local/share/jupyter/nbgrader_cache/.boxes" / world.tree.name).unlink()
    assert fetched(world, student, assignment) == []
    assert len(boxes(world, student)) == before + 1
    world.collect(assignment)
    assert fetched(world, student, assignment) == ["once"]


TRAPS = """
import os, sys
box, assignment, secret = sys.argv[1:4]
for name in os.listdir(box):
    if name.startswith(assignment):
        os.unlink(os.path.join(box, name))
        {trap}
"""


@pytest.mark.parametrize(
    "trap",
    [
        "os.symlink(secret, os.path.join(box, name))",
        "os.mkfifo(os.path.join(box, name))",
        "os.link(sys.argv[4], os.path.join(box, name))",
    ],
)
def test_traps_in_a_box(world: World, trap: str) -> None:
    """A link to an instructor's file in the place of a page: the link is replaced, the file stays as it is."""
    assignment, student = world.release(), world.campus.students[0]
    world.submit(student, assignment)
    world.collect(assignment)
    world.write_feedback(student, assignment, "first")
    release(world, assignment)
    secret = world.tree.root / f"secret-{assignment}"
    made = "import os, sys; os.umask(0o007); open(sys.argv[1], 'w').write('SECRET')"
    assert world.campus.instructors[0].python(made, secret).code == 0
    (box,) = boxes(world, student)[:1]
    own = student.home / "own.html"
    student.python("import sys; open(sys.argv[1], 'w').write('own')", own)
    done = student.python(TRAPS.format(trap=trap), box, assignment, secret, own)
    assert done.code == 0, done.log
    world.write_feedback(student, assignment, "second")
    release(world, assignment)
    assert secret.read_text() == "SECRET"
    assert own.read_text() == "own"
    (page,) = box.glob(f"{assignment}+*.html")
    assert not page.is_symlink()
    assert page.read_text() == "second"


def test_a_box_that_cannot_be_written_to_costs_nobody_else(world: World) -> None:
    assignment, (alice, bob, _) = world.release(), world.campus.students
    for student in (alice, bob):
        world.submit(student, assignment)
    world.collect(assignment)
    closed = boxes(world, alice)
    for box in closed:
        assert alice.python("import os, sys; os.chmod(sys.argv[1], 0o700)", box).code == 0
    for student in (alice, bob):
        world.write_feedback(student, assignment, f"for {student.name}")
    try:
        log = release(world, assignment)
        assert "could not be written to: Permission denied" in log
        assert pages(world, bob, assignment) == [f"for {bob.name}"]
        assert pages(world, alice, assignment) == []
    finally:
        for box in closed:
            shutil.rmtree(box)


def test_a_box_that_calls_itself_another_persons_is_its_owners(world: World) -> None:
    assignment, (alice, bob, _) = world.release(), world.campus.students
    for student in (alice, bob):
        world.submit(student, assignment)
    trap = world.boxes / f"{alice.name}+aaaaaaaaaaaaaaaa"
    assert bob.python("import os, sys; os.umask(0o007); os.mkdir(sys.argv[1])", trap).code == 0
    world.collect(assignment)
    world.write_feedback(alice, assignment, "for alice")
    release(world, assignment)
    assert not list(trap.glob(f"{assignment}+*.html"))
    shutil.rmtree(trap)


def test_own_submissions_are_listed_with_their_official_time(world: World) -> None:
    """One that the instructor made on behalf is listed, too, as soon as it was collected."""
    assignment, (student, *_) = world.release(), world.campus.students
    instructor = world.campus.instructors[0]
    world.submit(student, assignment)
    world.submit(instructor, assignment, None, f"--student={student.name}")
    world.collect(assignment)
    log = world.as_student(student, "list", assignment, "--cached").log
    times = {record["claimed"] for record in world.records(assignment)}
    assert len(times) == 2
    for time in times:
        assert f"{student.name} {assignment} {time}" in log
