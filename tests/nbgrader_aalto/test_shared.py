"""Courses of several instructors, with real users: whom `prepare` touches, and what becomes of the gradebook."""

import os
import sqlite3
import stat
from pathlib import Path

import pytest

from campus import Campus, Done, Member
from nbgrader_aalto import shared

PREPARE = """
import os, sys
from pathlib import Path
from nbgrader_aalto import shared
root = Path(sys.argv[1])
try:
    for _ in range(2):
        shared.prepare(root, sys.argv[2], bool(int(sys.argv[3])))
except shared.NotShared as error:
    print("NotShared:", error)
print("umask %03o" % os.umask(0))
"""
WRITE = """
import sqlite3, sys, os
os.umask(0o022)
connection = sqlite3.connect(sys.argv[1])
connection.execute("pragma journal_mode=" + sys.argv[2])
connection.execute("create table if not exists t (x)")
connection.commit()
connection.execute("insert into t values (1)")
for name in sorted(os.listdir(os.path.dirname(sys.argv[1]))):
    print(name, "%o" % (os.stat(os.path.join(os.path.dirname(sys.argv[1]), name)).st_mode & 0o7777))
connection.commit()
connection.close()
"""


@pytest.fixture
def root(campus: Campus) -> Path:
    """An empty course directory, 2770 of the first instructor."""
    return campus.course("jaettu").root


def prepare(who: Member, root: Path, *, groupshared: bool = True, url: str = "") -> Done:
    return who.python(PREPARE, root, url or f"sqlite:///{root}/gradebook.db", str(int(groupshared)))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.mark.parametrize("groupshared", [True, False])
def test_instructor_gets_the_umask_and_a_gradebook_for_the_group(campus: Campus, root: Path, groupshared: bool) -> None:
    done = prepare(campus.instructors[1], root, groupshared=groupshared)
    assert (done.code, done.log) == (0, "umask 007\n")
    gradebook = root / "gradebook.db"
    assert (mode(gradebook), gradebook.stat().st_gid, gradebook.stat().st_size) == (0o660, campus.gid, 0)


def test_both_instructors_write_to_the_gradebook_and_its_journals_whatever_their_umask(
    campus: Campus, root: Path
) -> None:
    one, two = campus.instructors
    prepare(one, root)
    for journal, files in (("delete", ["-journal"]), ("wal", ["-shm", "-wal"])):
        for who in (one, two):
            done = who.python(WRITE, root / "gradebook.db", journal)
            assert done.code == 0, done.log
            assert done.log.splitlines() == ["gradebook.db 660", *(f"gradebook.db{name} 660" for name in files)]
    with sqlite3.connect(root / "gradebook.db") as connection:
        assert connection.execute("select count(*) from t").fetchone() == (4,)


def test_without_it_sqlite_locks_the_second_instructor_out(campus: Campus, root: Path) -> None:
    one, two = campus.instructors
    assert "gradebook.db 644" in one.python(WRITE, root / "gradebook.db", "delete").log
    assert "readonly database" in two.python(WRITE, root / "gradebook.db", "delete").log


@pytest.mark.parametrize("who", ["student", "outsider"])
def test_who_is_no_member_is_not_touched(campus: Campus, root: Path, who: str) -> None:
    root.chmod(0o2777)  # even where they could
    person = campus.students[0] if who == "student" else campus.outsider
    assert prepare(person, root).log == "umask 022\n"
    assert list(root.iterdir()) == []


def test_home_of_a_student_is_no_course_because_groupshared_is_configured_for_all(campus: Campus) -> None:
    # nbgrader takes the working directory when no course directory is configured
    student = campus.students[0]
    home = student.directory("työ")
    assert prepare(student, home).log == "umask 022\n"
    assert list(home.iterdir()) == []


def test_course_of_one_instructor_is_left_alone(campus: Campus, root: Path) -> None:
    root.chmod(0o0755)
    assert prepare(campus.instructors[0], root, groupshared=False).log == "umask 022\n"
    assert list(root.iterdir()) == []


def test_missing_directory_is_nobodys_course(campus: Campus, root: Path) -> None:
    assert prepare(campus.instructors[0], root / "nowhere").log == "umask 022\n"


def test_own_gradebook_is_opened_to_the_group(campus: Campus, root: Path) -> None:
    one, two = campus.instructors
    one.python(WRITE, root / "gradebook.db", "delete")
    prepare(one, root)
    assert mode(root / "gradebook.db") == 0o664
    assert "gradebook.db 664" in two.python(WRITE, root / "gradebook.db", "delete").log


def test_colleagues_gradebook_that_is_closed_names_the_colleague_and_the_command(campus: Campus, root: Path) -> None:
    one, two = campus.instructors
    one.python(WRITE, root / "gradebook.db", "delete")
    done = prepare(two, root)
    assert f"Its owner {one.name} runs: chmod g+rw '{root}/gradebook.db'\n" in done.log
    assert "nbgrader-aalto course repair" in done.log
    one.run("sh", "-c", done.log.partition("runs: ")[2].partition("\n")[0])
    assert prepare(two, root).log == "umask 007\n"


def test_link_in_the_place_of_the_gradebook_is_not_followed(campus: Campus, root: Path) -> None:
    one = campus.instructors[0]
    target = one.home / "private"
    one.run("sh", "-c", 'echo secret > "$1" && chmod 600 "$1" && ln -s "$1" "$2"', "sh", target, root / "gradebook.db")
    assert prepare(one, root).log == "umask 007\n"
    assert mode(target) == 0o600
    (root / "gradebook.db").unlink()
    one.run("ln", "-s", one.home / "new", root / "gradebook.db")
    prepare(one, root)
    assert not (one.home / "new").exists()


@pytest.mark.parametrize("url", ["postgresql://host/db", "sqlite:///gradebook.db", "sqlite://"])
def test_other_databases_are_left_to_who_configured_them(campus: Campus, root: Path, url: str) -> None:
    assert prepare(campus.instructors[0], root, url=url).log == "umask 007\n"
    assert list(root.iterdir()) == []


def test_each_instructor_has_a_log_and_students_have_none(campus: Campus, root: Path) -> None:
    code = "import sys; from nbgrader_aalto import shared; print(shared.logfile(sys.argv[1]))"
    one, two = campus.instructors
    assert one.python(code, root).log == "\n"
    one.run("mkdir", "-m", "2770", root / "logs")
    for who in (one, two):
        assert who.python(code, root).log == f"{root}/logs/{who.name}.log\n"
    assert campus.students[0].python(code, root).log == "\n"
    one.run("touch", root / f"logs/{two.name}.log")  # 0644: logging would fail, and nbgrader with it
    assert two.python(code, root).log == "\n"


def test_who_is_a_member(campus: Campus) -> None:
    assert shared.is_member(campus.instructors[1].uid, campus.gid)
    assert not shared.is_member(campus.students[0].uid, campus.gid)
    assert not shared.is_member(2**31 - 5, campus.gid)
    code = "import sys; from nbgrader_aalto import shared; print(shared.is_instructor(int(sys.argv[1])))"
    assert campus.instructors[0].python(code, str(campus.gid)).log == "True\n"
    assert campus.students[0].python(code, str(campus.gid)).log == "False\n"


def test_names_of_the_unknown_are_numbers() -> None:
    assert shared.owner_name(os.geteuid()) != f"uid {os.geteuid()}"
    assert shared.owner_name(2**31 - 5) == f"uid {2**31 - 5}"
    assert shared.group_name(2**31 - 5) == str(2**31 - 5)
