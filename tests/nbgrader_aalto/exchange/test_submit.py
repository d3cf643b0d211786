"""Submitting: what is copied, what is said, what the student keeps."""

import json
import os
import shutil

import pytest
from worlds import NOTEBOOK, World, give, modes


def entry(world: World, assignment: str) -> str:
    """The name of the one submission of an assignment."""
    (name,) = (name for name in os.listdir(world.inbound) if f"+{assignment}+" in name)
    return name


def test_a_tree_that_is_too_large_is_refused_with_the_reason(world: World) -> None:
    assignment, student = world.release(), world.campus.students[0]
    world.work(student, assignment, {"a.txt": "x" * 1500, "b.txt": "x" * 1500})
    done = world.as_student(student, "submit", assignment, "--CourseDirectory.max_dir_size=2")
    assert done.code == 1
    assert "was NOT submitted" in done.log
    assert "more than 2000 bytes" in done.log
    assert not [name for name in os.listdir(world.inbound) if f"+{assignment}+" in name or name.startswith(".")]


def test_what_is_left_out_is_said(world: World) -> None:
    assignment, student = world.release(), world.campus.students[0]
    cwd = world.work(student, assignment, {"large.txt": "x" * 3000, "small.txt": "x", "__pycache__/x.pyc": "x"})
    work = cwd / assignment
    (work / "to a file").symlink_to(work / "small.txt")
    (work / "to a directory").symlink_to("/usr")
    (work / "to nothing").symlink_to("/nowhere")
    os.mkfifo(work / "fifo")
    give(work, student)
    done = world.as_student(student, "submit", assignment, "--CourseDirectory.max_file_size=2")
    assert done.code == 0, done.log
    for name in ("large.txt has 3000 bytes", "to a directory", "to nothing", "fifo"):
        assert f"Not submitted: {name}" in done.log
    path = world.inbound / entry(world, assignment)
    assert sorted(os.listdir(path)) == ["p1.ipynb", "small.txt", "timestamp.txt", "to a file"]
    assert not (path / "to a file").is_symlink()
    assert (path / "to a file").read_text() == "x"


@pytest.mark.parametrize("name", ["a\nb.txt", ".p1.ipynb.before", "d/.ps1.0123456789ab.new"])
def test_a_name_that_would_be_refused_at_collect_is_refused_at_once(world: World, name: str) -> None:
    """While the student is there to rename it."""
    assignment, student = world.release(), world.campus.students[0]
    world.work(student, assignment, {name: "x"})
    done = world.as_student(student, "submit", assignment)
    assert done.code == 1
    assert "was NOT submitted" in done.log
    assert "rename it" in done.log
    assert not [entry for entry in os.listdir(world.inbound) if f"+{assignment}+" in entry or entry.startswith(".")]


def test_modules_beside_the_notebook_are_no_part_of_python(world: World) -> None:
    """Students call their files `json.py` and `random.py`."""
    assignment, student = world.release(), world.campus.students[0]
    traps = {f"{name}.py": "raise SystemExit('imported')" for name in ("hashlib", "fnmatch", "secrets", "dataclasses")}
    cwd = world.work(student, assignment, traps)
    done = student.nbgrader("submit", assignment, cwd=cwd, env=world.tree.env())
    assert done.code == 0, done.log
    for name in traps:
        (cwd / name).write_text(traps[name])
    give(cwd, student)
    assert world.as_student(student, "submit", assignment).code == 0


def test_in_a_container_that_forbids_unshare(world: World) -> None:
    """As Docker's seccomp profile does: then a process of its own makes the copy."""
    assignment, student = world.release(), world.campus.students[0]
    forbidden = (
        "import errno, pyseccomp; f = pyseccomp.SyscallFilter(pyseccomp.ALLOW); "
        "f.add_rule(pyseccomp.ERRNO(errno.EPERM), 'unshare'); f.load()"
    )
    cwd = world.work(student, assignment, {"sub/data.txt": "1"})
    done = world.clerks.nbgrader(student, "submit", assignment, cwd=cwd, env=world.tree.env(), first=forbidden)
    assert done.code == 0, done.log
    found = modes(world.inbound / entry(world, assignment))
    assert found == {".": "2770", "p1.ipynb": "660", "timestamp.txt": "660", "sub": "2770", "sub/data.txt": "660"}
    assert f"Collecting submission: {student.name}" in world.collect(assignment)


def test_the_student_keeps_a_record_with_a_receipt(world: World) -> None:
    assignment, student = world.release(), world.campus.students[0]
    path = world.submit(student, assignment, {"answer.txt": "42"})
    cache = student.home / ".local/share/jupyter/nbgrader_cache" / world.tree.name
    (record,) = (cache / name for name in os.listdir(cache) if f"+{assignment}+" in name)
    assert path.name.startswith(record.name)
    receipt = json.loads((record / "receipt.json").read_text())
    assert (receipt["status"], receipt["student"], receipt["name"]) == ("unconfirmed", student.name, path.name)
    assert {file["path"]: file["size"] for file in receipt["files"]} == {
        "answer.txt": 2,
        "p1.ipynb": len(NOTEBOOK.encode()),
        "timestamp.txt": (path / "timestamp.txt").stat().st_size,
    }
    assert (record / "answer.txt").read_text() == "42"


def test_the_submission_stands_when_no_record_can_be_kept(world: World) -> None:
    assignment, student = world.release(), world.campus.students[1]
    world.work(student, assignment)
    blocked = student.home / "no cache"
    blocked.mkdir()
    (blocked / world.tree.name).write_text("in the way")
    give(blocked, student)
    done = world.as_student(student, "submit", assignment, f"--Exchange.cache={blocked}")
    assert done.code == 0, done.log
    assert "Submitted, but your own record of it could not be written" in done.log
    assert entry(world, assignment)
    shutil.rmtree(blocked)


def test_many_submissions_of_one_student_at_once(world: World) -> None:
    """None of them removes what another one is just writing."""
    assignment, student = world.release(), world.campus.students[0]
    cwd = world.work(student, assignment, {f"{i}.txt": "x" * 1000 for i in range(50)})
    command = [student.interpreter, "-P", "-m", "nbgrader", "submit", assignment]
    at_once = [student.start(*command, cwd=cwd, env=world.tree.env()) for _ in range(4)]
    logs = [process.communicate(timeout=120)[0] for process in at_once]
    assert [process.returncode for process in at_once] == [0] * 4, logs
    names = [name for name in os.listdir(world.inbound) if f"+{assignment}+" in name]
    assert len(names) == 4
    assert {len(os.listdir(world.inbound / name)) for name in names} == {52}
