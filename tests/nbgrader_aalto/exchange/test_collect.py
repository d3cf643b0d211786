"""Collecting what hostile, careless and honest students left in inbound."""

import json
import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from nbgrader.utils import parse_utc
from worlds import BY_HAND, NOTEBOOK, World, by_hand, modes, now, set_due_date

from campus import Member


def timestamp(world: World, who: Member, assignment: str) -> datetime:
    moment: datetime = parse_utc((world.submitted(who, assignment) / "timestamp.txt").read_text())
    return moment


@pytest.mark.threat("90")
def test_modes_after_collecting(world: World) -> None:
    assignment, student = world.release(), world.campus.students[0]
    world.submit(student, assignment, {"sub/data.txt": "1"})
    world.collect(assignment)
    found = modes(world.submitted(student, assignment).parents[1])
    assert {mode for name, mode in found.items() if Path(name).suffix} == {"660"}
    assert {mode for name, mode in found.items() if not Path(name).suffix} == {"2770"}
    vault = modes(world.tree.root / "vault" / assignment)
    assert set(vault.values()) == {"660", "2770"}
    assert {path.stat().st_gid for path in world.tree.root.rglob("*")} == {world.campus.gid}


@pytest.mark.threat("90")
def test_one_instructor_carries_on_where_the_other_stopped(world: World) -> None:
    assignment, (alice, bob, _) = world.release(), world.campus.students
    world.submit(alice, assignment)
    assert "Collecting" in world.collect(assignment, who=0)
    world.submit(alice, assignment, {"second.txt": "2"})
    world.submit(bob, assignment)
    assert "Updating" in world.collect(assignment, "--update", who=1)
    assert (world.submitted(alice, assignment) / "second.txt").read_text() == "2"
    assert (world.submitted(bob, assignment) / "p1.ipynb").is_file()
    log = world.collect(assignment, "--update", who=0)
    assert log.count("No newer submission to collect") == 2
    assert [record["student"] for record in world.records(assignment)] == [alice.name, alice.name, bob.name]


@pytest.mark.threat("84")
def test_the_owner_is_the_submitter(world: World) -> None:
    assignment, (alice, bob, _) = world.release(), world.campus.students
    world.submit(alice, assignment)
    by_hand(world, bob, assignment, user=alice.name, time=now(hours=1))
    log = world.collect(assignment)
    assert f"claims to be {alice.name}'s, but belongs to {bob.name}; cheating attempt?" in log
    assert [(record["student"], record["owner"]) for record in world.records(assignment)] == [(alice.name, alice.uid)]
    assert not world.submitted(bob, assignment).exists()


@pytest.mark.threat("84")
def test_the_time_is_the_file_servers(world: World) -> None:
    assignment, student = world.release(), world.campus.students[0]
    back = "\nfor d, _, f in os.walk(path):\n    for n in [*f, '.']: os.utime(os.path.join(d, n), (1e9, 1e9))"
    started = datetime.now(UTC).replace(tzinfo=None)
    by_hand(world, student, assignment, back, time="2020-01-01 00:00:00.000000 UTC")
    log = world.collect(assignment)
    assert "named 2020-01-01 00:00:00.000000 UTC, but last changed" in log
    assert (
        started - timedelta(seconds=1)
        <= timestamp(world, student, assignment)
        <= datetime.now(UTC).replace(tzinfo=None)
    )


@pytest.mark.threat("85")
def test_a_change_after_the_deadline_is_a_late_submission(world: World) -> None:
    """Row 85: the intact one counts if somebody took it in, and the changed one is reported."""
    assignment, student = world.release(), world.campus.students[0]
    path = world.submit(student, assignment)
    watched = world.aalto("exchange", "watch", world.tree.name, "--once", who=1)
    assert watched.code == 0, watched.log
    set_due_date(world, assignment, datetime.now(UTC))
    changed = student.python("import sys; open(sys.argv[1], 'a').write(' ')", path / "p1.ipynb")
    assert changed.code == 0
    log = world.collect(assignment, "--before-duedate")
    assert "but last changed" in log
    assert (world.submitted(student, assignment) / "p1.ipynb").read_text() == NOTEBOOK
    assert len(world.records(assignment)) == 2
    log = world.collect(assignment, "--update")
    assert "Late: " in log
    assert (world.submitted(student, assignment) / "p1.ipynb").read_text() == NOTEBOOK + " "


@pytest.mark.threat("85")
def test_a_change_right_after_the_submission_is_a_later_one(world: World) -> None:
    """Within the second in which the time in the name counts: else the first state, once collected, would stay."""
    assignment, student = world.release(), world.campus.students[0]
    path = world.submit(student, assignment)
    world.collect(assignment)
    changed = student.python("import sys; open(sys.argv[1], 'a').write(' ')", path / "p1.ipynb")
    assert changed.code == 0
    assert "but last changed" in world.collect(assignment, "--update")
    assert (world.submitted(student, assignment) / "p1.ipynb").read_text() == NOTEBOOK + " "
    assert [record["again"] for record in world.records(assignment)] == [False, True]


@pytest.mark.threat("85")
def test_a_change_that_is_set_back_is_late_too(world: World) -> None:
    assignment, student = world.release(), world.campus.students[0]
    path = world.submit(student, assignment, {"wrong.txt": "wrong"})
    set_due_date(world, assignment, datetime.now(UTC))
    code = "import os, sys; s = os.stat(sys.argv[1]); os.unlink(sys.argv[1] + '/wrong.txt'); " + (
        "os.utime(sys.argv[1], ns=(s.st_atime_ns, s.st_mtime_ns))"
    )
    assert student.python(code, path).code == 0
    assert "Late: " in world.collect(assignment, "--before-duedate")


ODD = {
    "a symbolic link to another directory": "os.symlink(sys.argv[4], os.path.join(inbound, entry))",
    "a plain file": "open(os.path.join(inbound, entry), 'w').write('x')",
    "a FIFO": "os.mkfifo(os.path.join(inbound, entry))",
}


@pytest.mark.threat("84a")
def test_odd_entries_never_stop_the_others(world: World) -> None:
    """Links to directories of the victim, names without a user or a time, plain files, closed directories."""
    assignment, (alice, bob, carol) = world.release(), world.campus.students
    world.submit(alice, assignment)
    victims = world.submit(carol, assignment)
    odd = "\n".join(
        f"entry = f'{bob.name}+{assignment}+2026-01-0{number} 00:00:00 UTC+abcdefghijkl'\n{code}"
        for number, code in enumerate(ODD.values(), 1)
    )
    more = f"""
{odd}
os.symlink(sys.argv[4], os.path.join(inbound, '{carol.name}+{assignment}+{now(hours=1)}+abcdefghijkl'))
for name in ('{bob.name}+{assignment}+no time+abcdefghijkl', 'nobody+{assignment}+{now()}+abcdefghijkl',
             '{bob.name}+{assignment}', '+{assignment}+{now()}', '{bob.name}+{assignment}+..-..-etc-passwd',
             '{bob.name}+{assignment}+99999999999999999999+abcdefghijkl'):
    os.mkdir(os.path.join(inbound, name)); open(os.path.join(inbound, name, 'p1.ipynb'), 'w').close()
os.mkdir(os.path.join(os.fsencode(inbound), b'\\xff\\xfe+x'))
closed = os.path.join(inbound, f'{bob.name}+{assignment}+{now()}+closed_one_')
os.mkdir(closed); open(closed + '/p1.ipynb', 'w').close(); os.chmod(closed, 0)
"""
    name = f"{bob.name}+unrelated+{now()}+abcdefghijkl"
    done = bob.python(BY_HAND + more, world.inbound, name, NOTEBOOK, victims)
    assert done.code == 0, done.log
    try:
        log = world.collect(assignment)
    finally:
        for entry in os.scandir(os.fsencode(world.inbound)):
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
            elif os.lstat(entry.path).st_uid == bob.uid:
                shutil.rmtree(entry.path)
    for reason in (
        "is a symbolic link",
        "is not a directory",
        "claims to be nobody's",
        "has no time in its name",
        "is not named",
        "cannot be read: Permission denied",
    ):
        assert reason in log, reason
    assert {record["student"] for record in world.records(assignment)} == {alice.name, carol.name}
    assert not world.submitted(bob, assignment).exists()
    assert not world.submitted("nobody", assignment).exists()


INSIDE = {
    "a link to a file": ("os.symlink('/etc/passwd', path + '/x')", "is neither a regular file nor a directory"),
    "a link to a directory": ("os.symlink('/etc', path + '/x')", "is neither a regular file nor a directory"),
    "a dangling link": ("os.symlink('/nowhere', path + '/x')", "is neither a regular file nor a directory"),
    "the notebook is a link": (
        "os.unlink(path + '/p1.ipynb'); os.symlink('/etc/passwd', path + '/p1.ipynb')",
        "is neither a regular file nor a directory",
    ),
    "a loop": ("os.symlink('.', path + '/loop')", "is neither a regular file nor a directory"),
    "a FIFO": ("os.mkfifo(path + '/x')", "is neither a regular file nor a directory"),
    "the notebook is a FIFO": (
        "os.unlink(path + '/p1.ipynb'); os.mkfifo(path + '/p1.ipynb')",
        "is neither a regular file nor a directory",
    ),
    "a socket": (
        "import socket; os.chdir(path); socket.socket(socket.AF_UNIX).bind('x')",
        "is neither a regular file nor a directory",
    ),
    "a hard link": ("os.link(path + '/p1.ipynb', path + '/p2.ipynb')", "is a hard link"),
    "a giant": ("os.truncate(path + '/p1.ipynb', 1 << 40)", "more than 100000000"),
    "many giants": (
        "[(open(f'{path}/{i}', 'w').close(), os.truncate(f'{path}/{i}', 60_000_000)) for i in range(2)]",
        "all files together",
    ),
    "many files": ("[os.mkdir(f'{path}/{i}') for i in range(10_001)]", "more than 10000 files"),
    "deep directories": (
        "os.chdir(path)\nfor i in range(400): os.mkdir('d'); os.chdir('d')",
        "deeper than",
    ),
    "a closed file": ("os.chmod(path + '/p1.ipynb', 0)", "cannot be read: Permission denied"),
    "an earlier result": ("open(path + '/.p1.ipynb.before', 'w')", "gives to earlier results"),
    "a directory as one": ("os.mkdir(path + '/.p1.ipynb.before')", "gives to earlier results"),
    "a newline": ("open(path + '/a' + chr(10) + 'b', 'w')", "control character"),
    "a text direction mark": ("open(path + '/a' + chr(0x202E) + 'b', 'w')", "control character"),
    "bytes that are no text": ("open(os.fsencode(path) + bytes([47, 255]), 'w')", "control character"),
}


@pytest.mark.threat("74", "75", "76", "78", "80")
def test_what_may_not_lie_in_a_submission(world: World) -> None:
    """All at once, by one student each; the honest one is collected, and every refusal is listed with its reason."""
    assignment, (alice, bob, _) = world.release(), world.campus.students
    world.submit(alice, assignment)
    entries = {}
    for number, (case, (code, reason)) in enumerate(INSIDE.items()):
        name = f"{bob.name}+{assignment}+{now()}+case{number:08d}"
        done = bob.python(BY_HAND + code, world.inbound, name, NOTEBOOK)
        assert done.code == 0, f"{case}: {done.log}"
        entries[case] = (name, reason)
    try:
        log = world.collect(assignment)
    finally:
        for name, _ in entries.values():
            shutil.rmtree(world.inbound / name)
    for case, (name, reason) in entries.items():
        (line,) = (line for line in log.splitlines() if name in line)
        assert reason in line, case
    assert [record["student"] for record in world.records(assignment)] == [alice.name]
    assert not world.submitted(bob, assignment).exists()
    assert not list((world.tree.root / "vault").rglob(".partial-*"))


@pytest.mark.threat("80")
def test_odd_names_of_files_are_collected(world: World) -> None:
    assignment, student = world.release(), world.campus.students[0]
    files = {f"sub {mark}/file {mark}.txt": mark for mark in "+([)]&'\";,äé漢!#%~$`=@"}
    world.submit(student, assignment, files)
    world.collect(assignment)
    for name, text in files.items():
        assert (world.submitted(student, assignment) / name).read_text() == text


SWAP = """
import os, sys, time
path, secret = sys.argv[1:3]
inner, aside, trap = path + "/sub", path + "/aside", path + "/trap"
os.mkdir(inner)
open(inner + "/data.txt", "w").write("harmless")
os.symlink(secret, trap)
print("ready", flush=True)
end = time.monotonic() + 60
while time.monotonic() < end and not os.path.exists(sys.argv[3]):
    os.rename(inner, aside); os.rename(trap, inner)
    os.rename(inner, trap); os.rename(aside, inner)
"""


@pytest.mark.threat("88")
def test_a_directory_that_is_swapped_for_a_link_while_it_is_collected(world: World, tmp_path: Path) -> None:
    """The secret is one that only instructors can read."""
    assignment, (alice, bob, _) = world.release(), world.campus.students
    world.submit(alice, assignment)
    secret = world.tree.root / "solutions"
    made = (
        "import os, sys; os.umask(0o007); os.mkdir(sys.argv[1]); open(sys.argv[1] + '/data.txt', 'w').write('SECRET')"
    )
    assert world.campus.instructors[0].python(made, secret).code == 0
    path = by_hand(world, bob, assignment)
    stop = bob.home / "stop"
    swapper = bob.start(bob.interpreter, "-c", SWAP, path, secret, stop)
    try:
        assert swapper.stdout is not None
        assert swapper.stdout.readline() == "ready\n"
        for _ in range(5):
            world.collect(assignment, "--update")
    finally:
        stop.touch()
        swapper.wait(60)
        shutil.rmtree(path)
    assert (world.submitted(alice, assignment) / "p1.ipynb").is_file()
    found = [p for place in ("vault", "submitted") for p in (world.tree.root / place).rglob("*") if p.is_file()]
    assert found
    assert not [p for p in found if b"SECRET" in p.read_bytes()]


def test_files_of_somebody_else_in_a_submission(world: World) -> None:
    assignment, (alice, bob, _) = world.release(), world.campus.students
    path = by_hand(world, alice, assignment, "os.chmod(path, 0o777)")
    assert bob.python("import sys; open(sys.argv[1] + '/more.txt', 'w').write('help')", path).code == 0
    log = world.collect(assignment)
    assert f"holds files of somebody else (uid {bob.uid})" in log
    assert not world.submitted(alice, assignment).exists()


def test_an_unknown_uid_is_held_and_not_lost(world: World, tmp_path: Path) -> None:
    """A registry in a file that first does not know the student, then does."""
    assignment, student = world.release(), world.campus.students[0]
    world.submit(student, assignment)
    registry = world.tree.config_dir / "users"
    instructor = world.campus.instructors[0]
    registry.write_text(f"{instructor.name}:x:{instructor.uid}:\n")
    option = f"--AaltoExchange.registry=file:{registry}"
    log = world.collect(assignment, option)
    assert f"belongs to uid {student.uid}, which the registry of users does not know" in log
    assert "Held" in log
    assert not world.records(assignment)
    registry.write_text(f"{student.name}:x:{student.uid}:\n")
    world.collect(assignment, option)
    assert [record["student"] for record in world.records(assignment)] == [student.name]


@pytest.mark.parametrize("name", ["a+b", "anna.virtanen@uni.fi", "123456", "matti meikäläinen"])
def test_usernames_of_all_kinds(world: World, name: str) -> None:
    """Known to a command that the administrator names."""
    assignment, student = world.release(), world.campus.students[0]
    by_hand(world, student, assignment, user=name)
    command = world.tree.config_dir / "who"
    command.write_text(
        '#!/bin/sh\ncase "$1" in ' + f"{student.uid}|'{name}') echo '{name}:x:{student.uid}:';; *) exit 2;; esac\n"
    )
    command.chmod(0o755)
    world.collect(assignment, f"--AaltoExchange.registry=command:'{command}'")
    assert (world.submitted(name, assignment) / "p1.ipynb").is_file()
    shutil.rmtree(world.submitted(name, assignment).parent)


def test_on_behalf_of_a_student(world: World) -> None:
    assignment, instructor = world.release(), world.campus.instructors[0]
    student = world.campus.students[2].name
    world.submit(instructor, assignment, None, f"--student={student}")
    log = world.collect(assignment, who=1)
    assert f"submitted by {instructor.name} on behalf of {student}" in log
    (record,) = world.records(assignment)
    assert (record["student"], record["on_behalf_by"]) == (student, instructor.name)
    assert (world.submitted(student, assignment) / "p1.ipynb").is_file()


def test_a_student_cannot_submit_on_behalf_of_another(world: World) -> None:
    assignment, (alice, bob, _) = world.release(), world.campus.students
    world.submit(bob, assignment, None, f"--student={alice.name}")
    assert "cheating attempt?" in world.collect(assignment)
    assert not world.records(assignment)


@pytest.mark.threat("89")
def test_two_instructors_collect_at_the_same_moment(world: World) -> None:
    assignment = world.release()
    for student in world.campus.students:
        world.submit(student, assignment)
    both = [
        instructor.start(
            instructor.interpreter,
            "-P",
            "-m",
            "nbgrader",
            "collect",
            assignment,
            cwd=world.tree.root,
            env=world.tree.env(),
        )
        for instructor in world.campus.instructors
    ]
    logs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], logs
    assert sum(log.count("Collecting submission") for log in logs) == 3
    assert len(world.records(assignment)) == 3


def test_an_original_that_was_deleted_after_it_was_taken_in(world: World) -> None:
    assignment, student = world.release(), world.campus.students[0]
    path = world.submit(student, assignment)
    world.collect(assignment)
    shutil.rmtree(world.submitted(student, assignment))
    assert student.python("import shutil, sys; shutil.rmtree(sys.argv[1])", path).code == 0
    world.collect(assignment)
    assert (world.submitted(student, assignment) / "p1.ipynb").is_file()


def test_a_submission_that_an_instructor_removed_is_not_taken_in_again(world: World) -> None:
    """Only its owner can remove the name of a directory in a sticky one; an empty one is no submission."""
    assignment, student = world.release(), world.campus.students[0]
    path = world.submit(student, assignment)
    done = world.as_instructor("list", assignment, "--inbound", "--remove", who=1)
    assert done.code == 0, done.log
    assert not path.exists() or os.listdir(path) == []
    assert "No submissions of" in world.collect(assignment)
    assert student.name not in world.as_instructor("list", assignment, "--inbound").log


KILLED = """
import os, signal, sys
def at(event, arguments):
    if event == "os.remove" and str(arguments[0]).endswith({ending!r}):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(at)
"""


def test_half_of_a_submission_that_was_being_removed_is_never_taken_in(world: World) -> None:
    """Whoever removed it was killed. To collect, it would be a later submission."""
    assignment, student = world.release(), world.campus.students[0]
    path = world.submit(student, assignment, {"a.txt": "1", "b.txt": "2"})
    instructor = world.campus.instructors[0]
    command = ("list", assignment, "--inbound", "--remove")
    where = {"cwd": world.tree.root, "env": world.tree.env()}
    for ending in ("b.txt", "p1.ipynb"):
        killed = world.clerks.nbgrader(instructor, *command, first=KILLED.format(ending=ending), **where)
        assert killed.code == -9, killed.log
        assert "holds files of somebody else" in world.collect(assignment, who=1)
    done = world.clerks.nbgrader(world.campus.instructors[1], *command, **where)
    assert done.code == 0, done.log
    assert os.listdir(path) == []
    assert "No submissions of" in world.collect(assignment)
    assert not world.records(assignment)


def test_receipts_become_confirmed(world: World) -> None:
    assignment, student = world.release(), world.campus.students[0]
    world.submit(student, assignment)
    world.collect(assignment)
    boxes = [world.boxes / name for name in os.listdir(world.boxes) if name.startswith(student.name)]
    found = [path for box in boxes for path in box.glob(f"*+{assignment}+*.receipt")]
    (text,) = {path.read_text() for path in found}  # two submissions at once may have made two boxes: both get it
    receipt = json.loads(text)
    assert receipt["status"] == "confirmed"
    assert receipt["confirmed_by"] == world.campus.instructors[0].name
    assert [file["path"] for file in receipt["files"]] == ["p1.ipynb", "timestamp.txt"]
    assert {path.stat().st_uid for path in found} == {world.campus.instructors[0].uid}
