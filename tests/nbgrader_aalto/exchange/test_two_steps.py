"""File systems that cannot exchange two names in one step, as NFS: two steps, and a death between them.

A seccomp filter answers as such a file system (or such a kernel) does; the rest is as it is.
"""

import os
import subprocess
from pathlib import Path

import pytest
from worlds import NOTEBOOK, World

NO_EXCHANGE = """
import errno, pyseccomp
filter = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
filter.add_rule(pyseccomp.ERRNO(errno.{name}), "renameat2", pyseccomp.Arg(4, pyseccomp.NE, 0))
filter.load()
"""
EINVAL, ENOSYS = NO_EXCHANGE.format(name="EINVAL"), NO_EXCHANGE.format(name="ENOSYS")
KILLED_BETWEEN = """
import os, signal, sys
def between(event, arguments):
    if event == "os.rename" and os.path.lexists("{directory}/.{name}.replaced"):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(between)
"""
"""The second rename of the two: the first has put the earlier version aside."""
KILLED_AFTER = """
import os, signal, sys
def after(event, arguments):
    if event == "shutil.rmtree" and str(arguments[0]).endswith("{ending}"):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(after)
"""
"""Both names are right, and the earlier version is to be removed."""
FAILS_BETWEEN = """
import os, sys
def between(event, arguments):
    if event == "os.rename" and str(arguments[1]) == "{directory}/{name}" and os.path.lexists(
        "{directory}/.{name}.replaced"
    ) and str(arguments[0]).endswith(".new"):
        raise OSError(5, os.strerror(5))
sys.addaudithook(between)
"""


def version(path: Path) -> str:
    return (path / "version.txt").read_text()


def hidden(path: Path) -> list[str]:
    """What lies beside it that is not to be seen."""
    return sorted(name for name in os.listdir(path.parent) if name.startswith("."))


class Released:
    """An assignment that is released again and again."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.path = world.tree.exchange / world.tree.name / "outbound" / name
        self.write("1")
        done = world.as_instructor("release_assignment", name)
        assert done.code == 0, done.log

    def write(self, text: str) -> None:
        code = (
            "import os, sys; os.umask(0o007); d = sys.argv[1]; os.makedirs(d, exist_ok=True); "
            "open(d + '/p1.ipynb', 'w').write(sys.argv[2]); open(d + '/version.txt', 'w').write(sys.argv[3])"
        )
        place = self.world.tree.root / "release" / self.name
        assert self.world.campus.instructors[0].python(code, place, NOTEBOOK, text).code == 0

    def again(self, first: str, who: int = 0) -> tuple[int, str]:
        """Release with `first` done before; code and log."""
        instructor = self.world.campus.instructors[who]
        done = self.world.clerks.nbgrader(
            *(instructor, "release_assignment", self.name, "--force"),
            cwd=self.world.tree.root,
            env=self.world.tree.env(),
            first=first,
        )
        return done.code, done.log

    def moment(self, code: str) -> str:
        return code.format(directory=self.path.parent, name=self.name)


@pytest.mark.parametrize("answer", [EINVAL, ENOSYS], ids=["EINVAL", "ENOSYS"])
def test_a_release_replaces_another(world: World, answer: str) -> None:
    released = Released(world, f"whole{answer == EINVAL}")
    released.write("2")
    code, log = released.again(answer, who=1)
    assert code == 0, log
    assert version(released.path) == "2"
    assert hidden(released.path) == []


def test_a_release_that_is_killed_between_its_two_steps(world: World) -> None:
    """The version before has another name, and is back before the next release even begins."""
    released, student = Released(world, "between"), world.campus.students[0]
    released.write("2")
    code, _ = released.again(EINVAL + released.moment(KILLED_BETWEEN))
    assert code == -9
    assert not released.path.exists()
    assert version(released.path.with_name(".between.replaced")) == "1"

    (world.tree.root / "release/between/p1.ipynb").chmod(0)  # so that this one fails after it has recovered
    code, log = released.again("", who=1)
    assert code == 1
    assert "What was released before is unchanged" in log
    assert version(released.path) == "1"
    assert hidden(released.path) == []
    assert world.as_student(student, "fetch_assignment", "between").code == 0
    (world.tree.root / "release/between/p1.ipynb").chmod(0o660)
    code, log = released.again(EINVAL, who=1)
    assert code == 0, log
    assert version(released.path) == "2"


@pytest.mark.parametrize(("answer", "ending"), [(EINVAL, ".replaced"), ("", ".new")], ids=["two steps", "one step"])
def test_a_release_that_is_killed_before_it_has_removed_the_version_before(
    world: World, answer: str, ending: str
) -> None:
    """In two steps, and in one."""
    released = Released(world, f"after{len(answer)}")
    released.write("2")
    code, _ = released.again(answer + KILLED_AFTER.format(ending=ending))
    assert code == -9
    assert version(released.path) == "2"
    (left,) = hidden(released.path)
    assert left.endswith(ending)
    released.write("3")
    code, log = released.again(answer, who=1)
    assert code == 0, log
    assert version(released.path) == "3"
    assert hidden(released.path) == []


def test_a_release_is_taken_back_in_one_step(world: World) -> None:
    """By a command that is killed while it removes the files; and not while a colleague is at work."""
    released, (first, second) = Released(world, "back"), world.campus.instructors
    where = {"cwd": world.tree.root, "env": world.tree.env()}
    command = ("list", "back", "--remove")
    holding = (
        "import sys; from pathlib import Path; from nbgrader_aalto.lock import locked\n"
        "with locked(Path(sys.argv[1]), 'exchange', 'at work'): print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "umask": 0o007}
    holder = first.start(first.interpreter, "-P", "-c", holding, world.tree.root / ".locks", **pipes)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        done = world.clerks.nbgrader(second, *command, "--AaltoExchange.lock_seconds=0.1", **where)
    finally:
        holder.communicate()
    assert done.code == 1
    assert f"{first.name} has been at work on host" in done.log
    assert version(released.path) == "1"
    assert world.clerks.nbgrader(second, *command, first=KILLED_AFTER.format(ending=".new"), **where).code == -9
    assert not released.path.exists()
    assert len(hidden(released.path)) == 1
    released.write("2")
    code, log = released.again("")
    assert code == 0, log
    assert (version(released.path), hidden(released.path)) == ("2", [])


def test_the_second_step_fails(world: World) -> None:
    released = Released(world, "fails")
    released.write("2")
    code, log = released.again(EINVAL + released.moment(FAILS_BETWEEN))
    assert code == 1
    assert "What was released before is unchanged" in log
    assert version(released.path) == "1"
    assert hidden(released.path) == []


def test_a_collect_that_is_killed_between_its_two_steps(world: World) -> None:
    assignment, student = world.release(), world.campus.students[0]
    first, second = world.campus.instructors
    world.submit(student, assignment, {"version.txt": "1"})
    world.collect(assignment)
    path = world.submitted(student, assignment)
    world.submit(student, assignment, {"version.txt": "2"})
    command = ("collect", assignment, "--update")
    where = {"cwd": world.tree.root, "env": world.tree.env()}
    killed = EINVAL + KILLED_BETWEEN.format(directory=path.parent, name=assignment)
    assert world.clerks.nbgrader(first, *command, first=killed, **where).code == -9
    assert not path.exists()
    for number in range(2):
        done = world.clerks.nbgrader(second, *command, first=EINVAL, **where)
        assert done.code == 0, done.log
        assert ("Updating" if number == 0 else "No newer submission") in done.log
        assert version(path) == "2"
        assert hidden(path) == []


def test_an_earlier_submission_is_back_where_nothing_newer_is_collected(world: World) -> None:
    """A colleague who collects without --update gets what was there, and not nothing."""
    assignment, student = world.release(), world.campus.students[1]
    world.submit(student, assignment, {"version.txt": "1"})
    world.collect(assignment)
    path = world.submitted(student, assignment)
    world.submit(student, assignment, {"version.txt": "2"})
    killed = EINVAL + KILLED_BETWEEN.format(directory=path.parent, name=assignment)
    instructor = world.campus.instructors[0]
    done = world.clerks.nbgrader(
        instructor, "collect", assignment, "--update", cwd=world.tree.root, env=world.tree.env(), first=killed
    )
    assert done.code == -9
    assert "already exists" in world.collect(assignment, who=1)
    assert version(path) == "1"
    assert hidden(path) == []
