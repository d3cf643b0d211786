"""Releasing: complete or not at all, by any instructor."""

import os
import subprocess
from pathlib import Path

import pytest
from worlds import NOTEBOOK, World, modes

from campus import CourseTree


def prepare(world: World, assignment: str, text: str = "1", who: int = 0, name: str = "p1.ipynb") -> None:
    """The release version in the course directory, as `generate_assignment` makes it."""
    code = (
        "import os, sys; os.umask(0o007); d = sys.argv[1]; os.makedirs(d + '/data', exist_ok=True); "
        "open(d + '/' + sys.argv[4], 'w').write(sys.argv[2]); open(d + '/data/d.txt', 'w').write(sys.argv[3]); "
        "os.chmod(d + '/data/d.txt', 0o640)"
    )
    path = world.tree.root / "release" / assignment
    done = world.campus.instructors[who].python(code, path, NOTEBOOK, text, name)
    assert done.code == 0, done.log


def outbound(tree: CourseTree) -> Path:
    return tree.exchange / tree.name / "outbound"


def test_modes_after_releasing(world: World) -> None:
    prepare(world, "modes")
    done = world.as_instructor("release_assignment", "modes")
    assert done.code == 0, done.log
    assert modes(outbound(world.tree) / "modes") == {
        ".": "2775",
        "p1.ipynb": "664",
        "data": "2775",
        "data/d.txt": "664",
    }
    student = world.campus.students[0]
    fetched = world.as_student(student, "fetch_assignment", "modes")
    assert fetched.code == 0, fetched.log
    found = modes(world.notebooks(student) / "modes")
    assert found == {".": "755", "p1.ipynb": "644", "data": "755", "data/d.txt": "644"}


def test_the_other_instructor_releases_again_and_takes_back(world: World) -> None:
    prepare(world, "again", "first")
    assert world.as_instructor("release_assignment", "again", who=0).code == 0
    prepare(world, "other", "x", who=1)
    assert world.as_instructor("release_assignment", "again", who=1).code == 1  # there already
    prepare(world, "again", "second")
    done = world.as_instructor("release_assignment", "again", "--force", who=1)
    assert done.code == 0, done.log
    assert (outbound(world.tree) / "again/data/d.txt").read_text() == "second"
    assert not [name for name in os.listdir(outbound(world.tree)) if name.startswith(".")]
    done = world.as_instructor("list", "again", "--remove", who=0)
    assert done.code == 0, done.log
    assert not (outbound(world.tree) / "again").exists()


def test_a_release_that_fails_leaves_the_one_before(world: World) -> None:
    prepare(world, "fails", "first")
    assert world.as_instructor("release_assignment", "fails").code == 0
    closed = world.tree.root / "release/fails/data/d.txt"
    assert world.campus.instructors[0].python("import os, sys; os.chmod(sys.argv[1], 0)", closed).code == 0
    done = world.as_instructor("release_assignment", "fails", "--force", who=1)
    assert done.code == 1
    assert "What was released before is unchanged" in done.log
    assert (outbound(world.tree) / "fails/data/d.txt").read_text() == "first"
    assert not [name for name in os.listdir(outbound(world.tree)) if name.startswith(".")]


GENERATING = """
import sys
from pathlib import Path
from nbgrader_aalto.turns import turn
with turn(Path(sys.argv[1]), "release", ".", sys.argv[2]):
    print("at work", flush=True)
    sys.stdin.read()
"""


def test_nothing_is_released_while_a_colleague_generates_it(world: World) -> None:
    """It would be half of it, for all students."""
    prepare(world, "busy")
    first = world.campus.instructors[0]
    pipes = {"stdin": subprocess.PIPE, "umask": 0o007}
    generating = first.start(first.interpreter, "-P", "-c", GENERATING, world.tree.root, "busy", **pipes)
    try:
        assert generating.stdout is not None
        assert generating.stdout.readline() == "at work\n"
        done = world.as_instructor("release_assignment", "busy", "--AaltoExchange.lock_seconds=0.1", who=1)
    finally:
        generating.communicate()
    assert done.code == 1
    assert f"{first.name} has been generating busy on host" in done.log
    assert not (outbound(world.tree) / "busy").exists()
    done = world.as_instructor("release_assignment", "busy", who=1)
    assert done.code == 0, done.log


@pytest.mark.parametrize("name", ["a[1]", "a*", ".hidden", "-f", "a\u202eb", "x" * 200])
def test_names_that_would_break_later_are_refused_with_the_reason(world: World, name: str) -> None:
    prepare(world, name)
    done = world.as_instructor("release_assignment", f"--assignment={name}")
    assert done.code == 1
    assert "cannot be released" in done.log
    assert "rename the assignment" in done.log


def test_a_notebook_whose_name_would_break_later_is_refused(world: World) -> None:
    prepare(world, "books", name="p[1].ipynb")
    done = world.as_instructor("release_assignment", "books")
    assert done.code == 1
    assert "rename the notebook" in done.log


@pytest.mark.parametrize("name", ["ps 1 (a) & b's", "tehtävä.1", "a'b; c=d", "課題"])
def test_names_that_work(world: World, name: str) -> None:
    """Through release, fetch, submit, collect, feedback and its fetching."""
    student = world.campus.students[1]
    prepare(world, name)
    steps = [("release_assignment", name), ("list",)]
    for step in steps:
        done = world.as_instructor(*step)
        assert done.code == 0, done.log
    assert f"{world.tree.name} {name}" in done.log
    fetched = world.as_student(student, "fetch_assignment", name)
    assert fetched.code == 0, fetched.log
    submitted = world.as_student(student, "submit", name)
    assert submitted.code == 0, submitted.log
    world.collect(name)
    assert (world.submitted(student, name) / "data/d.txt").read_text() == "1"
    world.write_feedback(student, name, "page")
    assert world.as_instructor("release_feedback", name).code == 0
    assert "feedback ready" in world.as_student(student, "list", name, "--cached").log
    assert world.as_student(student, "fetch_feedback", name).code == 0
    pages = list((world.notebooks(student) / name / "feedback").glob("*/p1.html"))
    assert [page.read_text() for page in pages] == ["page"]


def test_a_group_of_students_is_no_group_for_a_course(world: World) -> None:
    """A course without groupshared, made by somebody whose primary group is everybody's."""
    student = world.campus.students[0]
    top = student.directory("teaching")
    exchange = world.campus.directory / "open exchange"
    exchange.mkdir(exist_ok=True)
    exchange.chmod(0o1777)
    config = (
        f"c = get_config()\nc.CourseDirectory.course_id = 'own'\nc.CourseDirectory.root = {str(top)!r}\n"
        f"c.Exchange.root = {str(exchange)!r}\nimport nbgrader_aalto\nnbgrader_aalto.configure(c)\n"
    )
    code = (
        "import os, sys; os.makedirs('release/ps1'); open('release/ps1/p1.ipynb', 'w').write('{}'); "
        "open('nbgrader_config.py', 'w').write(sys.argv[1])"
    )
    assert student.python(code, config, cwd=top).code == 0
    done = world.clerks.nbgrader(student, "release_assignment", "ps1", cwd=top, env={})
    assert done.code == 1
    assert "can read all submissions" in done.log


def test_nothing_is_put_into_the_root_of_the_file_system(world: World) -> None:
    assignment, student = world.release(), world.campus.students[0]
    done = world.clerks.nbgrader(student, "fetch_assignment", assignment, cwd=Path("/"), env=world.tree.env())
    assert done.code == 1
    assert "c.Exchange.assignment_dir" in done.log
    there = "--Exchange.assignment_dir=~/not there yet"
    done = world.clerks.nbgrader(student, "fetch_assignment", assignment, there, cwd=Path("/"), env=world.tree.env())
    assert done.code == 0, done.log
    assert (student.home / "not there yet" / assignment / "p1.ipynb").is_file()
