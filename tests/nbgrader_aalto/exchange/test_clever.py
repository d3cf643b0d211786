"""What a clever student tries beyond the catalogue: at collect, with receipts, and at the course's expense."""

import json
import os
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from nbgrader.utils import parse_utc
from worlds import NOTEBOOK, World, by_hand, now, set_due_date

from campus import Done, Member


def forget_boxes(world: World, who: Member) -> None:
    """Of this course; other courses' tests run at the same time."""
    (who.home / ".local/share/jupyter/nbgrader_cache/.boxes" / world.tree.name).unlink(missing_ok=True)


@pytest.mark.threat("82")
@pytest.mark.parametrize("place", ["inbound", "feedback"])
def test_nothing_is_put_where_it_would_belong_to_the_students_group(world: World, place: str) -> None:
    """Somebody took the setgid bit away: what a student makes there would be open to all who share a primary group."""
    assignment, student = world.release(), world.campus.students[0]
    world.work(student, assignment)
    path = world.tree.exchange / world.tree.name / place
    before = set(os.listdir(path))
    forget_boxes(world, student)
    path.chmod(0o1773)
    try:
        done = world.as_student(student, "submit", assignment)
    finally:
        path.chmod(0o3773)
    assert done.code == (1 if place == "inbound" else 0), done.log
    assert "so that others could read it" in done.log
    assert "nbgrader-aalto course repair" in done.log
    assert set(os.listdir(path)) == before


@pytest.mark.threat("84")
def test_a_directory_of_the_victims_that_is_moved_into_inbound(world: World) -> None:
    """Two students work in a directory that both may write to. rename(2) into inbound keeps the victim its owner."""
    assignment, (alice, bob, _) = world.release(), world.campus.students
    genuine = world.submit(alice, assignment)
    team = world.campus.directory / f"team {world.tree.top.name}"
    team.mkdir()
    os.chown(team, 0, alice.gid)
    team.chmod(0o770)
    code = (
        "import os, sys; os.umask(0o002); os.mkdir('work'); "
        "open('work/p1.ipynb', 'w').write(sys.argv[1].replace('42', '41'))"
    )
    try:
        assert alice.python(code, NOTEBOOK, cwd=team).code == 0
        trap = world.inbound / f"{alice.name}+{assignment}+{now()}+abcdefghijkl"
        moved = bob.python("import os, sys; os.rename('work', sys.argv[1])", trap, cwd=team)
        assert moved.code == 0, moved.log
        assert trap.lstat().st_uid == alice.uid
        log = world.collect(assignment)
    finally:
        shutil.rmtree(team)
        shutil.rmtree(trap)
    assert "was made elsewhere" in log
    assert [record["name"] for record in world.records(assignment)] == [genuine.name]
    assert (world.submitted(alice, assignment) / "p1.ipynb").read_text() == NOTEBOOK


@pytest.mark.threat("84")
@pytest.mark.parametrize("inside", [False, True])
def test_a_file_system_of_ones_own_says_whatever_its_maker_wants(world: World, inside: bool) -> None:
    """With FUSE and `user_allow_other`, owners and times come from the attacker. Here root mounts it for her."""
    assignment, (alice, bob, _) = world.release(), world.campus.students
    whose = bob if inside else alice
    trap = world.inbound / f"{whose.name}+{assignment}+{now()}+abcdefghijkl"
    code = "import os, sys; os.umask(0o007); os.makedirs(sys.argv[1] + '/sub'); open(sys.argv[1] + '/p1.ipynb', 'w')"
    assert bob.python(code, trap).code == 0
    place = trap / "sub" if inside else trap
    options = f"size=1m,uid={whose.uid},gid={world.campus.gid},mode=2770"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], capture_output=True, text=True)
    if mounted.returncode != 0:
        shutil.rmtree(trap)
        pytest.skip(f"no file system can be mounted here: {mounted.stderr}")
    try:
        (place / "p1.ipynb").write_text(NOTEBOOK)
        os.chown(place / "p1.ipynb", whose.uid, world.campus.gid)
        log = world.collect(assignment)
    finally:
        subprocess.run(["umount", "-l", place], check=True)
        shutil.rmtree(trap)
    assert "is another file system" in log
    assert not world.records(assignment)


@pytest.mark.threat("85")
def test_a_submission_that_was_prepared_in_time_and_shown_afterwards_is_late(world: World) -> None:
    """Hidden in inbound, or complete in another place of the same file system: moving it changes its time."""
    assignment, (alice, bob, _) = world.release(), world.campus.students
    prepare = "import os, sys; os.umask(0o022); os.mkdir(sys.argv[1]); open(sys.argv[1] + '/p1.ipynb', 'w').close()"
    name = f"+{assignment}+{now()}+abcdefghijkl"
    elsewhere = bob.home / f"kept {assignment}"
    assert alice.python(prepare, world.inbound / f".{assignment}").code == 0
    assert bob.python(prepare, elsewhere).code == 0
    set_due_date(world, assignment, datetime.now(UTC))
    move = "import os, sys; os.rename(*sys.argv[1:])"
    for who, place in ((alice, world.inbound / f".{assignment}"), (bob, elsewhere)):
        done = who.python(move, place, world.inbound / f"{who.name}{name}")
        assert done.code == 0, done.log
    log = world.collect(assignment, "--before-duedate")
    assert f"Late: {alice.name} {assignment}" in log
    assert f"Late: {bob.name} {assignment}" in log


LEASE = """
import fcntl, os, sys, time
file = os.open(sys.argv[1], os.O_RDWR)
fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.threat("75")
def test_a_file_under_a_lease_holds_nobody_up(world: World) -> None:
    """fcntl(2), F_SETLEASE: an ordinary open(2) would wait for 45 seconds, for each file, with the course's lock."""
    assignment, (alice, bob, _) = world.release(), world.campus.students
    path = world.submit(bob, assignment)
    world.submit(alice, assignment)
    holder = bob.start(bob.interpreter, "-c", LEASE, path / "p1.ipynb", stdin=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        log = world.collect(assignment)
    finally:
        bob.kill(holder)
        holder.communicate()
    assert "cannot be read: Resource temporarily unavailable" in log
    assert [record["student"] for record in world.records(assignment)] == [alice.name]
    world.collect(assignment)
    assert len(world.records(assignment)) == 2


def test_the_name_of_a_submission_must_leave_room_for_its_receipts(world: World) -> None:
    """One byte more, and no receipt could be written: nobody's submission would be collected any more."""
    (alice, bob, _), assignment = world.campus.students, "y" * 110
    tail = f"+{assignment}+{now()}" + " " * 30
    longest = f"{bob.name}{tail}+" + "z" * (247 - len(f"{bob.name}{tail}+"))
    code = (
        "import os, sys\nos.umask(0o007)\nfor name in sys.argv[2:]: "
        "os.mkdir(os.path.join(sys.argv[1], name)); open(os.path.join(sys.argv[1], name, 'p1.ipynb'), 'w').close()"
    )
    assert bob.python(code, world.inbound, longest, f"{longest}z").code == 0
    by_hand(world, alice, assignment)
    try:
        log = world.collect(assignment)
    finally:
        for name in (longest, f"{longest}z"):
            shutil.rmtree(world.inbound / name)
    assert "has a name of more than 247 bytes" in log
    assert {record["student"] for record in world.records(assignment)} == {alice.name, bob.name}
    assert (world.submitted(alice, assignment) / "p1.ipynb").is_file()
    stamp = (world.submitted(bob, assignment) / "timestamp.txt").read_text()
    assert len(stamp) <= 31, "a time with blanks in it would make names of feedback too long"


def test_the_course_does_not_pay_for_what_one_student_changes_again_and_again(world: World) -> None:
    assignment, (alice, bob, _) = world.release(), world.campus.students
    path, limits = world.submit(bob, assignment), ("--AaltoExchange.max_kept=3", "--update")
    for number in range(5):
        changed = bob.python("import sys; open(sys.argv[1], 'w').write(sys.argv[2])", path / "new.txt", str(number))
        assert changed.code == 0
        log = world.collect(assignment, *limits)
    assert f"Held: {path.name} would be one of more than 3 submissions" in log
    assert len(world.records(assignment)) == 3
    assert (world.submitted(bob, assignment) / "new.txt").read_text() == "2"
    world.submit(alice, assignment)
    assert f"Collecting submission: {alice.name}" in world.collect(assignment, *limits)
    log = world.collect(assignment, "--AaltoExchange.max_kept_size=1", "--update")
    assert "more than 1000 bytes" in log
    assert len(world.records(assignment)) == 4
    world.collect(assignment, "--update")
    assert (world.submitted(bob, assignment) / "new.txt").read_text() == "4", "what is held is not lost"


def test_assignments_that_a_student_invents_do_not_fill_the_vault(world: World) -> None:
    assignment, (alice, bob, _) = world.release(), world.campus.students
    trap = by_hand(world, bob, "invented")
    world.submit(alice, assignment)
    done = world.aalto("exchange", "watch", world.tree.name, "--once")
    assert done.code == 0, done.log
    assert f"Held: {trap.name} is for an assignment that this course does not have" in done.log
    assert len(world.records(assignment)) == 1
    assert not (world.tree.root / "vault/invented").exists()
    world.collect("invented")
    assert len(world.records("invented")) == 1, "an instructor may want it all the same"
    shutil.rmtree(trap)


def test_feedback_is_not_copied_into_thousands_of_boxes(world: World) -> None:
    assignment, student = world.release(), world.campus.students[0]
    world.submit(student, assignment)
    make = "import os, sys; os.umask(0o007); [os.mkdir(f'{sys.argv[1]}/box {i}') for i in range(60)]"
    assert student.python(make, world.boxes).code == 0
    try:
        forget_boxes(world, student)
        world.submit(student, assignment)  # makes a box, the newest
        world.collect(assignment)
        filled = {path.parent.name for path in world.boxes.glob(f"*/*+{assignment}+*.receipt")}
        assert 1 <= len(filled) <= 20
        assert any(not name.startswith("box") for name in filled)
    finally:
        for number in range(60):
            shutil.rmtree(world.boxes / f"box {number}")


def test_a_name_is_not_printed_on_the_instructors_terminal_as_it_is(world: World) -> None:
    bob = world.campus.students[1]
    paths = [by_hand(world, bob, "red \x1b[31m"), by_hand(world, bob, "ps1", user="\x1b[2J")]
    try:
        for arguments in (("list", "--inbound"), ("collect", "ps1")):
            done = world.as_instructor(*arguments)
            assert done.code == 0, done.log
            assert "\x1b" not in done.log.replace("\x1b[0m", "").replace("\x1b[1;31m", "")
    finally:
        for path in paths:
            shutil.rmtree(path)


def test_feedback_whose_time_is_a_path_reaches_nobody_else(world: World) -> None:
    """The time comes from a file, after a zip import a student's; it is a part of the name of the file in the box."""
    assignment, (alice, bob, _) = world.release(), world.campus.students
    for student in (alice, bob):
        world.submit(student, assignment)
    world.collect(assignment)
    world.write_feedback(alice, assignment, "for alice")
    world.write_feedback(bob, assignment, "a page of bob's")
    outbox = world.tree.root / "vault/.outbox"
    paths = {
        "up": f"x/../../{alice.name}/{assignment}",
        "long": "2026-01-01" + " " * 200 + "12:00",
        "with a sign": "2026-01-01 12:00 +0200",
    }
    for text in paths.values():
        (world.tree.root / "feedback" / bob.name / assignment / "timestamp.txt").write_text(text)
        before = {path.name for path in (outbox / alice.name).iterdir()}
        done = world.as_instructor("release_feedback", assignment)
        assert done.code == 0, done.log
        assert "reached 2 of 2" in done.log
        assert {path.name for path in (outbox / alice.name).iterdir()} - before <= {
            name for name in os.listdir(outbox / alice.name) if "for alice" in (outbox / alice.name / name).read_text()
        }
    names = {name for name in os.listdir(outbox / bob.name) if name.startswith(f"{assignment}+")}
    assert f"{assignment}+without a time+p1.html" in names
    moment = parse_utc(paths["with a sign"]).strftime("%Y-%m-%d %H:%M:%S.%f UTC")
    assert f"{assignment}+{moment}+p1.html" in names


# receipts


def verify(world: World, who: Member, *paths: str | Path) -> Done:
    cwd = world.notebooks(who) if who in world.campus.students else world.tree.root
    return world.clerks.aalto(who, "receipt", "verify", *paths, cwd=cwd, env=world.tree.env())


def record(world: World, who: Member, assignment: str) -> Path:
    """The newest one of a student's own records of an assignment."""
    directory = who.home / ".local/share/jupyter/nbgrader_cache" / world.tree.name
    return max(path for path in directory.iterdir() if f"+{assignment}+" in path.name)


def test_the_confirmation_of_another_submission_confirms_nothing(world: World) -> None:
    """The same files, handed in for another assignment: the instructor's own file, under another name."""
    assignment, late = world.release(), world.release()
    student = world.campus.students[0]
    world.submit(student, assignment)
    world.collect(assignment)
    genuine = record(world, student, assignment)
    assert verify(world, student, genuine).code == 0
    receipt = json.loads((genuine / "receipt.json").read_text())
    forged = {**receipt, "assignment": late, "name": receipt["name"].replace(f"+{assignment}+", f"+{late}+")}
    mine = student.home / "forged.json"
    mine.write_text(json.dumps(forged))
    os.chown(mine, student.uid, student.gid)
    confirmations = list(world.boxes.glob(f"*/{receipt['name']}.receipt"))
    assert confirmations
    for path in confirmations:
        rename = "import os, sys; os.rename(*sys.argv[1:])"
        done = student.python(rename, path, path.with_name(f"{forged['name']}.receipt"))
        assert done.code == 0, done.log
    done = verify(world, student, mine)
    assert done.code == 1, done.log
    assert "is of another submission" in done.log


def test_a_mailed_receipt_is_not_believed(world: World, tmp_path: Path) -> None:
    """An instructor asks the vault: for another time, and for a vault of the student's own."""
    assignment, student = world.release(), world.campus.students[0]
    world.submit(student, assignment)
    world.collect(assignment)
    receipt = json.loads((record(world, student, assignment) / "receipt.json").read_text())
    mail = world.tree.top / "mail"
    mail.mkdir()
    instructor = world.campus.instructors[1]

    def ask(**changed: str) -> Done:
        (mail / "receipt.json").write_text(json.dumps({**receipt, **changed}))
        return verify(world, instructor, mail / "receipt.json")

    earlier = "2020-01-01 00:00:00.000000 UTC"
    assert ask().code == 0
    assert ask(status="confirmed").code == 0
    done = ask(time=earlier)
    assert done.code == 0, done.log
    assert receipt["time"] in done.log
    assert earlier not in done.log
    done = ask(status="confirmed", time=earlier)
    assert done.code == 1
    assert f"says {earlier}, but the course has it from {receipt['time']}" in done.log

    (vaulted,) = (world.tree.root / "vault" / assignment / student.name).iterdir()
    shutil.copytree(vaulted, mail / "vault" / student.name / vaulted.name)
    subprocess.run(["chmod", "-R", "a+rX", mail], check=True)
    for change in ({"assignment": os.path.relpath(mail / "vault", world.tree.root / "vault")}, {"student": ".."}):
        done = ask(**change)
        assert done.code == 1, done.log
        assert "no such receipt was ever given" in done.log
