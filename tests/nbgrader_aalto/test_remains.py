"""What killed commands left in a course: `course check` says what it is, `course repair` puts it right."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import NOTEBOOK, OLD_NS, Place, commands, mode, own

from campus import Member

KILLED = """
import os, signal, sys
def at(event, arguments):
    if event == "{event}" and str(arguments[0]).endswith("{ending}"):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(at)
"""
"""Right before something is renamed or removed; the lock of the exchange is held then."""
TURN = """
import sys
from pathlib import Path
from nbgrader_aalto.lock import locked
with locked(Path(sys.argv[1]) / ".locks", sys.argv[2], "at work"):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def at_work(made: Place, who: Member, lock: str) -> Iterator[None]:
    """Somebody holds a lock of the course."""
    process = who.start(who.interpreter, "-P", "-c", TURN, made.root, lock, stdin=subprocess.PIPE, umask=0o007)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield
    finally:
        process.communicate()


def tree(made: Place, path: str, text: str | None, who: Member | None = None) -> Path:
    """A directory with one notebook, as an instructor's command makes it; `None` for an empty file instead."""
    who = who or made.campus.instructors[0]
    place = made.root / path if not path.startswith("outbound/") else made.inside / path
    missing = [parent for parent in reversed(place.parents) if not parent.exists()]
    for parent in missing:
        parent.mkdir()
        own(parent, who, 0o2770, made.campus.gid)
    is_file = text is None or path.endswith((".ipynb", ".ipynb.before"))
    if is_file:
        place.write_text(text or "")
        own(place, who, 0o660, made.campus.gid)
        return place
    place.mkdir()
    (place / "p1.ipynb").write_text(text)
    own(place / "p1.ipynb", who, 0o664, made.campus.gid)
    own(place, who, 0o2775, made.campus.gid)
    return place


def content(path: Path) -> str | None:
    """Of a notebook, or of the one in a directory; None if there is nothing."""
    file = path / "p1.ipynb" if path.is_dir() else path
    return file.read_text() if file.exists() else None


def names(path: Path) -> list[str]:
    return sorted(os.listdir(path.parent))


def test_a_repair_that_is_killed_leaves_a_copy_that_the_next_one_removes(made: Place) -> None:
    first, second = made.campus.instructors
    path = made.root / "source" / "data.csv"
    path.write_text("data")
    own(path, first, 0o644)
    assert made.repair(second, KILLED.format(event="os.rename", ending=".new")).code == -9
    assert (path.read_text(), path.lstat().st_uid) == ("data", first.uid)
    (copy,) = (path.with_name(name) for name in names(path) if name.endswith(".new"))
    os.utime(copy, ns=(OLD_NS, OLD_NS))

    done = made.check(second)
    assert done.code == 1
    assert f"{copy}: is what a command left that was killed while it was making data.csv" in done.log
    assert (second.name, f"rm -r '{copy}'") in commands(done.log.replace("; or ", "\n"))
    done = made.repair(first)
    assert done.code == 0, done.log
    assert f"{copy}: removed" in done.log
    assert names(path) == ["data.csv"]
    assert mode(path) == "664"


def test_what_is_being_made_is_left_alone(made: Place) -> None:
    """`course create` holds no lock: what is a moment old may be its."""
    first, second = made.campus.instructors
    fresh, old = (made.root / f".x{number}.0123456789ab.new" for number in range(2))
    for path in (fresh, old):
        path.write_text("half")
        own(path, first, 0o600, made.campus.gid)
    os.utime(fresh)
    with at_work(made, first, "exchange"):
        assert made.check(second).code == 0
    assert str(old) in made.check(second).log
    done = made.repair(second)
    assert done.code == 0, done.log
    assert not old.exists()
    assert fresh.read_text() == "half"


@pytest.mark.parametrize("killed", ["between", "after"])
def test_a_version_before_that_lies_aside(made: Place, killed: str) -> None:
    """Of a release or a collect on a file system that cannot exchange two names."""
    first, second = made.campus.instructors
    cases = [("outbound/ps1", "outbound/.ps1.replaced"), ("submitted/ann/ps1", "submitted/ann/.ps1.replaced")]
    for path, aside in cases:
        tree(made, aside, "before")
        if killed == "after":
            tree(made, path, "new")
    done = made.check(second)
    assert done.code == 1
    words = "is the version before of ps1" if killed == "after" else "is ps1, which has no other name"
    assert done.log.count(words) == 2
    with at_work(made, first, "exchange"):
        assert ".ps1.replaced" not in made.check(second).log
    done = made.repair(second)
    assert done.code == 0, done.log
    for path, _ in cases:
        place = made.inside / path if path.startswith("outbound") else made.root / path
        assert content(place) == ("new" if killed == "after" else "before")
        assert names(place) == ["ps1"]


RESULTS = {
    "an autograded submission": ("autograded/ann/ps1", "autograded/ann/.ps1.before", "autograded ann ps1"),
    "a release": ("release/ps1", "release/.ps1.before", "release . ps1"),
    "one notebook": ("autograded/ann/ps1/p1.ipynb", "autograded/ann/ps1/.p1.ipynb.before", "autograded ann ps1"),
}


@pytest.mark.parametrize("what", RESULTS)
def test_an_earlier_result_that_lies_aside(made: Place, what: str) -> None:
    first, second = made.campus.instructors
    path, aside, lock = RESULTS[what]
    if what == "one notebook":
        (made.root / "autograded/ann").mkdir(parents=True)
        for parent in ("autograded/ann", "autograded"):
            own(made.root / parent, first, 0o2770, made.campus.gid)
    tree(made, aside, "before")
    tree(made, path, "half made")
    done = made.check(second)
    assert done.code == 1
    name = Path(path).name
    assert f"{made.root / aside}: is the earlier result of {name}, put aside by a command that was killed" in done.log
    with at_work(made, first, lock):
        assert made.check(second).code == 0
        done = made.repair(second)
        assert done.code == 0, done.log
        assert content(made.root / path) == "half made"
    done = made.repair(second)
    assert done.code == 0, done.log
    assert f"{made.root / aside}: is {name} again" in done.log
    assert content(made.root / path) == "before"
    assert not (made.root / aside).exists()
    assert made.check(second).code == 0


def test_what_was_made_for_the_first_time_and_never_finished(made: Place) -> None:
    _, second = made.campus.instructors
    aside, path = tree(made, "feedback/ann/.ps1.before", None), tree(made, "feedback/ann/ps1", "half made")
    assert "says that there was no result of ps1" in made.check(second).log
    done = made.repair(second)
    assert done.code == 0, done.log
    assert not aside.exists()
    assert not path.exists()


def test_refuse_of_somebody_who_forbids_its_removal(made: Place) -> None:
    """The owner is named, with the command; and that command works."""
    first, second = made.campus.instructors
    tree(made, "autograded/ann/ps1", "new")
    refuse = tree(made, "autograded/ann/.ps1.dropped.01234567", "earlier")
    refuse.chmod(0o700)
    for look in (made.check, made.repair):
        done = look(second)
        assert done.code == 1
        assert f"{refuse}: is an earlier result of ps1 that could not be removed" in done.log
    assert "not mended: 1 names in it cannot be removed" in done.log or "not mended: 2 names" in done.log
    (command,) = (line for who, line in commands(done.log.replace("; or ", "\n")) if who == first.name)
    assert command == f"rm -r '{refuse}'"
    assert first.run("bash", "-c", command).code == 0
    assert made.check(second).code == 0


def test_root_says_what_is_left_and_removes_nothing(made: Place) -> None:
    """Locks are instructors', in a directory of theirs: root takes none, and so disturbs nobody."""
    aside, path = tree(made, "release/.ps1.before", "before"), tree(made, "release/ps1", "half made")
    done = made.repair(made.administrator)
    assert done.code == 1
    assert f"{aside}: is the earlier result of ps1" in done.log
    assert "any other instructor can" in done.log
    assert content(path) == "half made"
    assert content(aside) == "before"


def test_files_of_instructors_and_students_with_such_names_stay(made: Place) -> None:
    """Where none of our commands makes any: in source, and in what students handed in."""
    _, second = made.campus.instructors
    kept = [
        tree(made, "source/ps1/.p1.ipynb.before", NOTEBOOK),
        tree(made, "source/ps1/.x.replaced", NOTEBOOK),
        tree(made, "submitted/ann/ps1/.p1.ipynb.before", NOTEBOOK),
        tree(made, "autograded/.ann.before", NOTEBOOK),
    ]
    done = made.repair(second)
    assert done.code == 0, done.log
    assert all(path.exists() for path in kept)
    assert made.check(second).code == 0
