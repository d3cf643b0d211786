"""What the other students can do to a submission or a box: nothing. Each attack is tried by a process of theirs."""

import json
import os
from pathlib import Path

import pytest
from worlds import World, modes

from campus import Member

ATTEMPTS = """
import json, os, sys
target, other = sys.argv[1], sys.argv[2]
def attempt(call, *arguments, **named):
    try:
        call(*arguments, **named)
    except OSError as error:
        return type(error).__name__
    return "ok"
inbound = os.path.dirname(target)
files = [os.path.join(target, name) for name in ("p1.ipynb", "timestamp.txt", "sub/data.txt")]
print(json.dumps({
    "list inbound": attempt(os.listdir, inbound),
    "list": attempt(os.listdir, target),
    "enter": attempt(os.chdir, target),
    **{f"read {os.path.basename(f)}": attempt(open, f) for f in files},
    **{f"write {os.path.basename(f)}": attempt(open, f, "a") for f in files},
    **{f"stat {os.path.basename(f)}": attempt(os.stat, f) for f in files},
    "add": attempt(open, os.path.join(target, "new"), "w"),
    "link": attempt(os.link, files[0], other),
    "rename": attempt(os.rename, target, target + "x"),
    "rename inside inbound": attempt(os.rename, target, os.path.join(inbound, "z+z+2020-01-01 00:00:00 UTC")),
    "over it": attempt(os.rename, other, target),
    "remove": attempt(os.rmdir, target),
    "chmod": attempt(os.chmod, target, 0o777),
    "chown": attempt(os.chown, target, os.geteuid(), -1),
    "time": attempt(os.utime, target),
    "move inbound": attempt(os.rename, inbound, inbound + "x"),
    "move the course": attempt(os.rename, os.path.dirname(inbound), os.path.dirname(inbound) + "x"),
    "chmod inbound": attempt(os.chmod, inbound, 0o777),
    "a course beside it": attempt(os.mkdir, os.path.dirname(inbound) + "x"),
}))
"""


def attempts(who: Member, target: Path) -> dict[str, str]:
    """What each attack on the directory ended in, tried by this person's own process."""
    own = who.home / "own"
    who.python("import os, sys; os.makedirs(sys.argv[1], exist_ok=True)", own)
    done = who.python(ATTEMPTS, target, own)
    assert done.code == 0, done.log
    found: dict[str, str] = json.loads(done.log.splitlines()[-1])
    return found


@pytest.mark.threat("81", "82", "83", "84b")
@pytest.mark.parametrize("attacker", ["another student", "outsider"])
def test_nobody_else_can_do_anything_to_a_submission(world: World, attacker: str) -> None:
    assignment = world.release()
    path = world.submit(world.campus.students[0], assignment, {"sub/data.txt": "mine"})
    before = modes(path), os.stat(path).st_mtime_ns
    who = world.campus.students[1] if attacker == "another student" else world.campus.outsider
    found = attempts(who, path)
    assert {name for name, outcome in found.items() if outcome != "PermissionError"} == set()
    assert (modes(path), os.stat(path).st_mtime_ns) == before
    assert "Collecting submission" in world.collect(assignment)


@pytest.mark.threat("86")
def test_nobody_else_can_do_anything_to_a_box(world: World) -> None:
    assignment = world.release()
    student = world.campus.students[0]
    world.submit(student, assignment)
    box = next(world.boxes / name for name in os.listdir(world.boxes) if name.startswith(student.name))
    found = attempts(world.campus.students[1], box)
    assert {name for name, outcome in found.items() if outcome != "PermissionError"} == set()


def test_a_submission_can_be_read_by_both_instructors(world: World) -> None:
    path = world.submit(world.campus.students[0], world.release(), {"sub/data.txt": "mine"})
    for instructor in world.campus.instructors:
        done = instructor.python("import sys; print(open(sys.argv[1]).read())", path / "sub/data.txt")
        assert done.log == "mine\n"


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_modes_of_a_submission(world: World, umask: int) -> None:
    assignment, student = world.release(), world.campus.students[0]
    cwd = world.work(student, assignment, {"sub/data.txt": "mine", "sub/deep/run.sh": "true"})
    (cwd / assignment / "sub/data.txt").chmod(0o400)
    (cwd / assignment / "sub/deep/run.sh").chmod(0o777)
    done = world.clerks.nbgrader(student, "submit", assignment, cwd=cwd, env=world.tree.env(), umask=umask)
    assert done.code == 0, done.log
    (name,) = (name for name in os.listdir(world.inbound) if f"+{assignment}+" in name)
    assert modes(world.inbound / name) == {
        ".": "2770",
        "p1.ipynb": "660",
        "timestamp.txt": "660",
        "sub": "2770",
        "sub/data.txt": "660",
        "sub/deep": "2770",
        "sub/deep/run.sh": "660",
    }
    for path in (world.inbound / name).rglob("*"):
        assert (path.stat().st_uid, path.stat().st_gid) == (student.uid, world.campus.gid)


def test_modes_of_the_exchange(world: World) -> None:
    tree = world.campus.course("fresh")
    release = tree.root / "release/ps1"
    first, second = world.campus.instructors
    code = "import os, sys; os.umask(0o022); os.makedirs(sys.argv[1]); open(sys.argv[1] + '/p1.ipynb', 'w').write('{}')"
    assert first.python(code, release).code == 0
    done = world.clerks.nbgrader(first, "release_assignment", "ps1", cwd=tree.root, env=tree.env())
    assert done.code == 0, done.log
    places = tree.exchange / "fresh"
    found = {name: f"{os.stat(places / name).st_mode & 0o7777:o}" for name in os.listdir(places)}
    assert found == {"outbound": "2775", "inbound": "3773", "feedback": "3773"}
    assert {os.stat(places / name).st_gid for name in found} == {world.campus.gid}
    assert attempts(world.campus.students[0], places / "inbound")["list"] == "PermissionError"
    done = world.clerks.nbgrader(second, "release_assignment", "ps1", "--force", cwd=tree.root, env=tree.env())
    assert done.code == 0, done.log


@pytest.mark.parametrize("mode", [0o2733, 0o3777, 0o2777])
def test_a_student_is_told_when_inbound_hides_nothing(world: World, mode: int) -> None:
    assignment, student = world.release(), world.campus.students[0]
    cwd = world.work(student, assignment)
    world.inbound.chmod(mode)
    try:
        done = world.clerks.nbgrader(student, "submit", assignment, cwd=cwd, env=world.tree.env())
    finally:
        world.inbound.chmod(0o3773)
    assert done.code == 1
    assert "Nothing was submitted" in done.log
    assert not [name for name in os.listdir(world.inbound) if f"+{assignment}+" in name]


def test_nothing_runs_in_an_exchange_whose_courses_can_be_moved_away(world: World) -> None:
    assignment, student = world.release(), world.campus.students[0]
    cwd = world.work(student, assignment)
    world.tree.exchange.chmod(0o777)
    try:
        done = world.clerks.nbgrader(student, "submit", assignment, cwd=cwd, env=world.tree.env())
    finally:
        world.tree.exchange.chmod(0o755)
    assert done.code == 1
    assert "chmod +t" in done.log


def test_a_course_directory_of_another_group_is_not_the_course(world: World) -> None:
    assignment, student = world.release(), world.campus.students[0]
    cwd = world.work(student, assignment)
    course = world.tree.exchange / world.tree.name
    os.chown(course, student.uid, student.gid)
    try:
        done = world.clerks.nbgrader(student, "submit", assignment, cwd=cwd, env=world.tree.env())
    finally:
        os.chown(course, world.campus.instructors[0].uid, world.campus.gid)
        course.chmod(0o2775)
    assert done.code == 1
    assert "it is not the course's" in done.log


def test_one_uid_for_everybody_is_refused_until_it_is_accepted_by_name(world: World) -> None:
    shared = world.campus.course("jovyans", "c.AaltoExchange.identity = 'shared'")
    instructor = world.campus.instructors[0]
    done = world.clerks.nbgrader(instructor, "list", cwd=shared.root, env=shared.env())
    assert done.code == 1
    assert "accept_readable_submissions" in done.log
    accepted = ["--AaltoExchange.accept_readable_submissions=True"]
    done = world.clerks.nbgrader(instructor, "list", *accepted, cwd=shared.root, env=shared.env())
    assert done.code == 0, done.log
    assert "can be read and changed by every student" in done.log
