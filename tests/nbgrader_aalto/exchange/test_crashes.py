"""Disk full, and kill -9 in the middle: the state before or the state after, never between."""

import contextlib
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from worlds import NOTEBOOK, World, give

FILES = 40


def many(text: str) -> dict[str, str]:
    """Files that belong together: a tree with some old and some new ones is between."""
    return {f"d{i % 4}/f{i}.txt": text * 2000 for i in range(FILES)}


def state(path: Path) -> set[str]:
    """The versions that the files of a tree are of; `missing` if one is not there."""
    found = set()
    for name in many(""):
        file = path / name
        found.add(file.read_text()[:1] if file.exists() and file.stat().st_size == 2000 else "missing")
    return found


def moments(rounds: int, longest: float) -> list[float]:
    """The same in each run."""
    chance = random.Random(4)
    return [chance.uniform(0.02, longest) for _ in range(rounds)]


def clock(call: Callable[[], object]) -> float:
    started = time.monotonic()
    call()
    return time.monotonic() - started


@pytest.mark.slow
def test_submit_is_killed(world: World) -> None:
    assignment, student = world.release(), world.campus.students[0]
    world.work(student, assignment, many("a"))
    cwd = world.notebooks(student)
    whole = clock(lambda: world.as_student(student, "submit", assignment))
    for moment in moments(10, whole):
        world.clerks.nbgrader(student, "submit", assignment, cwd=cwd, env=world.tree.env(), kill_after=moment)
        for name in os.listdir(world.inbound):
            if f"+{assignment}+" in name:
                assert state(world.inbound / name) == {"a"}, "a submission is visible before it is complete"
    done = world.as_student(student, "submit", assignment)
    assert done.code == 0, done.log
    world.collect(assignment)
    assert state(world.submitted(student, assignment)) == {"a"}
    hidden = [
        n for n in os.listdir(world.inbound) if n.startswith(".") and (world.inbound / n).stat().st_uid == student.uid
    ]
    assert hidden == [], "the next submit removes what a killed one left"


@pytest.mark.slow
def test_collect_is_killed(world: World) -> None:
    assignment, student = world.release(), world.campus.students[0]
    instructor = world.campus.instructors[0]
    world.submit(student, assignment, many("a"))
    world.collect(assignment)
    path = world.submitted(student, assignment)
    before = "a"
    for version, moment in zip("bcdefghij", moments(9, 0.5), strict=True):
        world.submit(student, assignment, many(version))
        world.clerks.nbgrader(
            *(instructor, "collect", assignment, "--update"),
            cwd=world.tree.root,
            env=world.tree.env(),
            kill_after=moment,
        )
        found = state(path)
        assert found in ({before}, {version}), found
        assert "timestamp.txt" in os.listdir(path)
        before = next(iter(found))
    log = world.collect(assignment, "--update", who=1)
    assert state(path) == {"j"}, log
    assert len(world.records(assignment)) == 10
    assert not list((world.tree.root / "vault").rglob(".partial-*"))


@pytest.mark.slow
def test_release_is_killed(world: World) -> None:
    first, second = world.campus.instructors
    release = world.tree.root / "release/crash"
    outbound = world.tree.exchange / world.tree.name / "outbound/crash"

    def write(version: str) -> None:
        for name, text in {"p1.ipynb": NOTEBOOK, **many(version)}.items():
            (release / name).parent.mkdir(parents=True, exist_ok=True)
            (release / name).write_text(text)
        give(release, first)

    write("a")
    (world.tree.root / "release").chmod(0o2777)
    assert world.as_instructor("release_assignment", "crash").code == 0
    for version, moment in zip("bcdefghij", moments(9, 0.4), strict=True):
        before = state(outbound)
        write(version)
        world.clerks.nbgrader(
            *(first, "release_assignment", "crash", "--force"),
            cwd=world.tree.root,
            env=world.tree.env(),
            kill_after=moment,
        )
        assert state(outbound) in (before, {version})
        assert len(state(outbound)) == 1
    done = world.clerks.nbgrader(
        second, "release_assignment", "crash", "--force", cwd=world.tree.root, env=world.tree.env()
    )
    assert done.code == 0, done.log
    assert state(outbound) == {"j"}


@contextlib.contextmanager
def small_disk(path: Path, kilobytes: int) -> Iterator[None]:
    """A file system of this size over a directory, with the owner and mode that the directory has."""
    status = path.stat()
    options = f"size={kilobytes}k,uid={status.st_uid},gid={status.st_gid},mode={status.st_mode & 0o7777:o}"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", path], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


@pytest.mark.threat("87")
def test_the_exchange_is_full(world: World) -> None:
    assignment, (alice, bob, _) = world.release(), world.campus.students
    with small_disk(world.inbound, 400):
        kept = world.submit(alice, assignment, {"data.bin": "x" * 100_000})
        world.work(bob, assignment, {"data.bin": "x" * 1_000_000})
        done = world.as_student(bob, "submit", assignment)
        assert done.code == 1
        assert "was NOT submitted" in done.log
        assert "No space left on device" in done.log
        assert os.listdir(world.inbound) == [kept.name], "what did not fit is gone"
        world.collect(assignment)
    assert (world.submitted(alice, assignment) / "data.bin").stat().st_size == 100_000


def test_the_vault_is_full(world: World) -> None:
    assignment, (alice, bob, _) = world.release(), world.campus.students
    world.submit(alice, assignment)
    world.collect(assignment)
    path = world.submit(bob, assignment, {"data.bin": "x" * 1_000_000})
    vault = world.tree.root / "vault"
    with small_disk(vault, 300):
        done = world.as_instructor("collect", assignment)
        assert done.code == 1
        assert "No space left on device" in done.log
        assert not list(vault.rglob(".partial-*"))
        assert path.is_dir()
    assert (world.submitted(alice, assignment) / "p1.ipynb").is_file()
    world.collect(assignment)
    assert (world.submitted(bob, assignment) / "data.bin").stat().st_size == 1_000_000


def test_outbound_is_full(world: World) -> None:
    outbound = world.tree.exchange / world.tree.name / "outbound"
    code = (
        "import os, sys; os.umask(0o007); os.makedirs('release/full', exist_ok=True); "
        "open('release/full/p1.ipynb', 'w').write(sys.argv[1] * int(sys.argv[2]))"
    )
    instructor = world.campus.instructors[0]
    with small_disk(outbound, 300):
        assert instructor.python(code, "a", "100000", cwd=world.tree.root).code == 0
        assert world.as_instructor("release_assignment", "full").code == 0
        assert instructor.python(code, "b", "500000", cwd=world.tree.root).code == 0
        done = world.as_instructor("release_assignment", "full", "--force")
        assert done.code == 1
        assert "What was released before is unchanged" in done.log
        assert (outbound / "full/p1.ipynb").read_text() == "a" * 100_000
        assert os.listdir(outbound) == ["full"]


@pytest.mark.threat("87")
def test_who_uses_how_much_is_reported(world: World) -> None:
    """Sparse files count by their blocks; directories nested deeper than Python can call are counted, too."""
    alice, bob, _ = world.campus.students
    world.submit(alice, world.release(), {"data.bin": "x" * 300_000})
    name = f"{bob.name}+deep+2026-01-01 00:00:00 UTC+abcdefghijkl"
    code = (
        "import os, sys; os.umask(0o007); os.chdir(sys.argv[1]); os.mkdir(sys.argv[2]); os.chdir(sys.argv[2])\n"
        "open('sparse', 'w').truncate(1 << 40)\n"
        "for i in range(3000): os.mkdir('d'); os.chdir('d')\n"
        "open('bottom', 'w').write('x')"
    )
    made = bob.python(code, world.inbound, name)
    assert made.code == 0, made.log
    try:
        done = world.aalto("exchange", "sizes", world.tree.name, who=1)
        assert done.code == 0, done.log
        units = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
        rows = [line.split() for line in done.log.splitlines()[1:]]
        used = {row[-1]: float(row[0]) * units[row[1]] for row in rows}
        assert used[alice.name] >= 300_000
        assert used[bob.name] < 1e9
        log = world.collect("deep")
        assert "deeper than" in log or "has 1099511627776 bytes" in log
    finally:
        subprocess.run(["rm", "-rf", world.inbound / name], check=True)
