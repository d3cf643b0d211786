"""`nbgrader-aalto`, by real Unix users: a course is made, broken by hand and mended; a watcher; receipts."""

import grp
import itertools
import json
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from clerks import Clerks
from places import NOTEBOOK, OLD_NS, Place, commands, mode, own

from campus import Campus, CourseTree, Done, Member

_NUMBER = itertools.count(1)


# create


@pytest.mark.parametrize("who", ["root", "instructor"])
def test_create_makes_what_the_exchange_and_nbgrader_need(place: Place, who: str) -> None:
    first, second = place.campus.instructors
    if who == "instructor":
        for path in (place.root.parent, place.top):
            os.chown(path, first.uid, first.gid)
    done = place.create(place.administrator if who == "root" else first)
    assert done.code == 0, done.log
    expected = {
        place.root: "2770",
        place.root / "source": "2770",
        place.root / "logs": "2770",
        place.root / "gradebook.db": "660",
        place.root / "nbgrader_config.py": "660",
        place.root / ".gitignore": "660",
        place.inside: "2775",
        place.inside / "outbound": "2775",
        place.inside / "inbound": "3773",
        place.inside / "feedback": "3773",
    }
    assert {path: mode(path) for path in expected} == expected
    assert {path.lstat().st_gid for path in expected} == {place.campus.gid}
    assert mode(place.exchange) == "755"
    for number, instructor in enumerate((first, second)):
        added = place.clerks.nbgrader(instructor, "db", "assignment", "add", f"ps{number}", cwd=place.root)
        assert added.code == 0, added.log
        assert (place.root / "logs" / f"{instructor.name}.log").is_file()
    listed = place.clerks.nbgrader(second, "db", "assignment", "list", cwd=place.root)
    assert "ps0" in listed.log
    assert "ps1" in listed.log
    assert not list(place.root.glob("**/root.log"))
    checks = [place.clerks.aalto(who, "course", "check", cwd=place.root) for who in (first, second)]
    if who == "root":
        checks.append(first.aalto("course", "check", cwd=place.root))
    assert [(checked.code, checked.log) for checked in checks] == [(0, "")] * len(checks)
    assert place.check(place.administrator).code == 0


def test_create_again_changes_nothing_and_says_what_is_kept(made: Place) -> None:
    config = made.root / "nbgrader_config.py"
    config.write_text(config.read_text() + "# ours\n")
    before = {path: (mode(path), path.lstat().st_ino, path.lstat().st_mtime_ns) for path in made.top.rglob("*")}
    for who in (*made.campus.instructors, made.administrator):
        done = made.create(who)
        assert done.code == 0, done.log
        assert f"{config} is kept as it is" in done.log
        assert not re.search(r"^(made|changed|missing)", done.log, re.MULTILINE)
    kept = {path: (mode(path), path.lstat().st_ino, path.lstat().st_mtime_ns) for path in before}
    assert kept == before
    assert config.read_text().endswith("# ours\n")


def test_where_a_member_may_not_write_the_administrators_command_is_printed_and_works(place: Place) -> None:
    first, _ = place.campus.instructors
    for round in range(6):
        done = place.create(first)
        needed = re.findall(r"An administrator runs: (.*)$", done.log, re.MULTILINE)
        if not needed:
            break
        assert done.code == 1, done.log
        for command in needed:
            ran = place.administrator.run("sh", "-c", command, cwd=place.top)
            assert ran.code == 0, (round, command, ran.log)
    assert done.code == 0, done.log
    assert [mode(place.root), mode(place.inside / "inbound")] == ["2770", "3773"]
    assert place.check(first).code == 0


def _link(place: Place) -> Path:
    place.root.symlink_to(place.top)
    return place.root


def _file(place: Place) -> Path:
    place.root.write_text("")
    return place.root


def _strangers(place: Place) -> Path:
    (place.root / "mine").mkdir(parents=True)
    own(place.root, place.campus.students[0], 0o755)
    return place.root


def _linked_in_exchange(place: Place) -> Path:
    place.exchange.mkdir()
    place.inside.symlink_to(place.top)
    return place.inside


@pytest.mark.parametrize("obstacle", [_link, _file, _strangers, _linked_in_exchange])
@pytest.mark.parametrize("who", ["root", "instructor"])
def test_create_refuses_what_is_in_the_way(place: Place, obstacle: object, who: str) -> None:
    assert callable(obstacle)
    path = obstacle(place)
    before = sorted(place.top.rglob("*"))
    done = place.create(place.administrator if who == "root" else place.campus.instructors[0])
    assert done.code == 2
    assert str(path) in done.log
    assert sorted(place.top.rglob("*")) == before


def test_create_refuses_those_who_are_no_instructors_and_says_how_to_make_a_group(place: Place) -> None:
    done = place.create(place.campus.students[0])
    assert done.code == 2
    assert f"not a member of the group {place.campus.group}" in done.log
    no_group = place.administrator.aalto(
        "course", "create", "no-such", "--course-dir", place.root, "--exchange", place.exchange, cwd=place.top
    )
    assert no_group.code == 2
    assert "groupadd jupyter-no-such" in no_group.log
    assert not place.root.exists()
    assert not place.exchange.exists()


def _git(who: Member, place: Place, *arguments: str) -> str:
    identity = ("-c", f"user.name={who.name}", "-c", f"user.email={who.name}@example.org")
    done = who.run("git", *identity, *arguments, cwd=place.root)
    assert done.code == 0, done.log
    return done.log


def test_both_instructors_commit_and_students_stay_out_of_git(made: Place) -> None:
    first, second = made.campus.instructors
    assert second.run("git", "status", cwd=made.root).code != 0  # a colleague's repository
    second.run("git", "config", "--global", "--add", "safe.directory", made.root)
    for path in ("submitted/s/ps1/a.ipynb", "autograded/s/ps1/a.ipynb", "feedback/s/a.html", "vault/ps1/s/f", "a.log"):
        (made.root / path).parent.mkdir(parents=True, exist_ok=True)
        (made.root / path).write_text("secret")
    try:
        for number, who in enumerate((first, second, first)):
            done = who.python("import sys; open(sys.argv[1], 'w').write('text')", f"source/{number}.md", cwd=made.root)
            assert done.code == 0, done.log
            _git(who, made, "add", "--all")
            _git(who, made, "commit", "--quiet", "--message", f"{number}")
        files = _git(second, made, "ls-files").split()
        assert sorted(files) == [".gitignore", "nbgrader_config.py", *(f"source/{n}.md" for n in range(3))]
        assert _git(first, made, "log", "--format=%an").split() == [first.name, second.name, first.name]
    finally:
        (second.home / ".gitconfig").unlink()
    checked = made.check(second)
    assert ".git" not in checked.log


# check and repair


def _released(place: Place) -> Path:
    path = place.inside / "outbound" / "ps1"
    path.mkdir()
    own(path, place.campus.instructors[0], 0o2775, place.campus.gid)
    (path / "p1.ipynb").write_text(NOTEBOOK)
    own(path / "p1.ipynb", place.campus.instructors[0], 0o600, place.campus.gid)
    return path / "p1.ipynb"


def _source_file(place: Place, bits: int, name: str = "p1.ipynb") -> Path:
    path = place.root / "source" / name
    path.write_text(NOTEBOOK)
    own(path, place.campus.instructors[0], bits, place.campus.gid)
    return path


def _source_directory(place: Place) -> Path:
    path = place.root / "source" / "ps1"
    path.mkdir()
    (path / "a").write_text("a")
    own(path / "a", place.campus.instructors[0], 0o660, place.campus.gid)
    own(path, place.campus.instructors[0], 0o755, place.campus.gid)
    return path


def _gradebook(place: Place) -> Path:
    own(place.root / "gradebook.db", place.campus.instructors[0], 0o640, place.campus.gid)
    return place.root / "gradebook.db"


def _journal(place: Place) -> Path:
    path = place.root / "gradebook.db-journal"
    path.write_bytes(b"")
    own(path, place.campus.instructors[0], 0o644, place.campus.gid)
    return path


def _chmod(path: str, bits: int, *, exchange: bool = False) -> object:
    def broken(place: Place) -> Path:
        found = (place.inside if exchange else place.root) / path
        found.chmod(bits)
        return found

    return broken


NOT_FOR_OTHERS = {
    "an unreadable file": lambda place: _source_file(place, 0o600),
    "a name for a shell": lambda place: _source_file(place, 0o600, 'it\'s $HOME\n\x1b[31m "*" ä'),
    "a directory": _source_directory,
    "the gradebook": _gradebook,
    "its journal": _journal,
    "a released file": _released,
    "source": _chmod("source", 0o750),
    "the course": _chmod(".", 0o700),
    "open to students": _chmod(".", 0o2775),
    "outbound": _chmod("outbound", 0o755, exchange=True),
    "inbound": _chmod("inbound", 0o2777, exchange=True),
    "feedback": _chmod("feedback", 0o2770, exchange=True),
    "the course in the exchange": _chmod(".", 0o2755, exchange=True),
}


@pytest.mark.parametrize("breakage", NOT_FOR_OTHERS)
@pytest.mark.parametrize("mender", ["owner", "owner by hand", "root"])
def test_what_only_the_owner_or_root_can_mend(made: Place, breakage: str, mender: str) -> None:
    first, second = made.campus.instructors
    path = NOT_FOR_OTHERS[breakage](made)  # type: ignore[no-untyped-call,operator]
    status = path.lstat()
    content = path.read_bytes() if path.is_file() else None
    if breakage != "the course":  # there a colleague cannot even look
        for look in (made.check, made.repair):
            done = look(second)
            assert done.code == 1, done.log
            assert first.name in done.log
            assert path.lstat()[:2] == status[:2], "changed, or replaced"
    if mender == "owner by hand":
        found = commands(made.check(first).log)
        assert [name for name, _ in found] == [first.name]
        ran = first.run("bash", "-c", found[0][1])
        assert ran.code == 0, ran.log
    else:
        done = made.repair(first if mender == "owner" else made.administrator)
        assert done.code == 0, done.log
    assert (path.read_bytes() if path.is_file() else None) == content
    assert path.lstat().st_uid == first.uid
    for who in (first, second, made.administrator):
        checked = made.check(who)
        assert (checked.code, checked.log) == (0, "")


@pytest.mark.parametrize("whose", ["colleague", "student"])
def test_a_readable_file_of_somebody_else_is_replaced_by_a_copy(made: Place, whose: str) -> None:
    first, second = made.campus.instructors
    who = first if whose == "colleague" else made.campus.students[0]
    path = made.root / "source" / "data ä.csv"
    path.write_bytes(os.urandom(3_000_000))
    own(path, who, 0o644)
    content = path.read_bytes()
    assert made.check(second).code == 1
    assert path.lstat().st_uid == who.uid
    done = made.repair(second)
    assert done.code == 0, done.log
    status = path.lstat()
    assert (status.st_uid, status.st_gid, mode(path)) == (second.uid, made.campus.gid, "664")
    assert status.st_mtime_ns == OLD_NS
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == [path.name]


def test_a_file_that_has_just_been_changed_is_not_replaced(made: Place) -> None:
    _, second = made.campus.instructors
    path = _source_file(made, 0o644)
    soon = time.time() + 3600  # as just now, however long it takes until it is looked at
    os.utime(path, (soon, soon))
    before = path.lstat().st_ino
    done = made.repair(second)
    assert done.code == 1, done.log
    assert "changed a moment ago" in done.log
    assert path.lstat().st_ino == before


def test_repair_goes_on_after_each_problem(made: Place) -> None:
    first, second = made.campus.instructors
    for number in range(4):
        _source_file(made, 0o600 if number % 2 else 0o644, f"{number}.md")
    done = made.repair(second)
    assert done.code == 1
    assert [mode(made.root / "source" / f"{n}.md") for n in range(4)] == ["664", "600", "664", "600"]
    assert {name for name, _ in commands(done.log)} == {first.name}
    assert len(commands(done.log)) == 2
    assert made.repair(first).code == 0
    assert made.repair(second).code == 0


@pytest.mark.parametrize("who", ["instructor", "root"])
def test_repair_follows_no_link_and_opens_no_other_name_of_a_file(made: Place, who: str) -> None:
    first, _ = made.campus.instructors
    outside = made.top / "private"
    outside.mkdir()
    for name in ("file", "second name"):
        (outside / name).write_text("private")
        own(outside / name, first, 0o600)
    own(outside, first, 0o700)
    (made.root / "source" / "link").symlink_to(outside / "file")
    (made.root / "source" / "directory").symlink_to(outside)
    os.mkfifo(made.root / "source" / "fifo", 0o600)
    os.link(outside / "second name", made.root / "source" / "second name")
    own(outside / "second name", first, 0o600)
    done = made.repair(first if who == "instructor" else made.administrator)
    assert done.code == 1
    assert "2 names" in done.log
    assert [mode(outside), mode(outside / "file"), mode(outside / "second name")] == ["700", "600", "600"]
    assert (made.root / "source" / "second name").samefile(outside / "second name")


def test_root_gives_no_file_of_a_students_the_rights_of_the_group(made: Place) -> None:
    program = made.root / "source" / "program"
    program.write_text("")
    own(program, made.campus.students[0], 0o6755)
    assert made.repair(made.administrator).code == 0
    assert (mode(program), program.lstat().st_gid) == ("775", made.campus.gid)


def test_repair_leaves_what_students_handed_in_alone(made: Place) -> None:
    student = made.campus.students[0]
    inbound = made.inside / "inbound"
    done = student.python(
        "import os, sys; os.umask(0); os.mkdir(sys.argv[1]); open(sys.argv[1] + '/f', 'w')", inbound / "entry"
    )
    assert done.code == 0, done.log
    (inbound / "entry").chmod(0o700)
    before = [path.lstat() for path in (inbound / "entry", inbound / "entry" / "f")]
    for who in (*made.campus.instructors, made.administrator):
        done = made.repair(who)
        assert (done.code, done.log) == (0, "")
    assert [path.lstat() for path in (inbound / "entry", inbound / "entry" / "f")] == before


def test_a_repository_that_is_not_shared_is_found(made: Place) -> None:
    first, second = made.campus.instructors
    _git(first, made, "config", "core.sharedRepository", "umask")
    assert "core.sharedRepository" in made.check(second).log
    assert made.repair(first).code == 0
    assert _git(first, made, "config", "core.sharedRepository").strip() in {"group", "1", "true"}
    assert made.check(second).code == 0


def test_a_wrong_group_of_the_course_directory_itself_is_found(made: Place) -> None:
    os.chown(made.root, -1, made.campus.students[0].gid)
    made.root.chmod(0o2770)
    done = made.check(made.administrator)
    assert done.code == 1
    assert f"not to {made.campus.group}" in done.log
    assert made.repair(made.administrator).code == 0
    assert made.root.stat().st_gid == made.campus.gid


def test_check_refuses_strangers_and_says_why(made: Place) -> None:
    done = made.campus.outsider.aalto("course", "check", "--course-dir", made.root, cwd=made.campus.outsider.home)
    assert done.code == 2
    assert str(made.root) in done.log


# an earlier course


def _earlier(made: Place, config: str | None = None) -> dict[str, str]:
    """Commit a course with students in its git. Returns what of it may be taken over."""
    first, _ = made.campus.instructors
    taken = {"source/ps1/p 1 ä.ipynb": NOTEBOOK, "source/header.ipynb": NOTEBOOK, "README.md": "read me"}
    students = {"submitted/s/ps1/p1.ipynb": "s", "notes/s.md": "s", "students.csv": "s", "source/gradebook.db": "s"}
    (made.root / ".gitignore").write_text("")
    if config is not None:
        (made.root / "nbgrader_config.py").write_text(config)
    for path, text in {**taken, **students}.items():
        (made.root / path).parent.mkdir(parents=True, exist_ok=True)
        (made.root / path).write_text(text)
    for path in made.root.rglob("*"):
        os.chown(path, first.uid, first.gid, follow_symlinks=False)
    _git(first, made, "add", "--all", "--force")
    _git(first, made, "commit", "--quiet", "--message", "all, students too")
    return taken


def _next_year(made: Place) -> Place:
    top = Path(tempfile.mkdtemp(prefix="next-", dir=made.campus.directory))
    found = Place(made.campus, made.clerks, top, "python27")
    for path in (found.top, found.root.parent, found.administrator.home, found.administrator.home / "tmp"):
        path.mkdir(exist_ok=True)
        path.chmod(0o755)
        os.chown(path, made.campus.instructors[1].uid, made.campus.gid)
    return found


@pytest.mark.parametrize("who", ["root", "instructor"])
def test_from_takes_source_and_settings_and_no_students(made: Place, who: str) -> None:
    taken = _earlier(made)
    (made.root / "source" / "header.ipynb").write_text("not committed")
    new = _next_year(made)
    maker = new.administrator if who == "root" else made.campus.instructors[1]
    done = new.create(maker, "--from", made.root)
    assert done.code == 0, done.log
    assert {path: (new.root / path).read_text() for path in taken} == taken
    everything = {str(path.relative_to(new.root)) for path in new.root.rglob("*") if path.is_file()}
    everything -= {path for path in everything if path.startswith(".git/")}
    assert everything == {*taken, ".gitignore", "gradebook.db", "nbgrader_config.py"}
    config = (new.root / "nbgrader_config.py").read_text()
    assert made.slug not in config
    assert repr(new.slug) in config
    assert str(new.root) in config
    for instructor in new.campus.instructors:
        checked = new.check(instructor)
        assert (checked.code, checked.log) == (0, "")


def test_settings_that_cannot_be_replaced_for_certain_lie_beside_the_new_ones(made: Place) -> None:
    _earlier(made, "c = get_config()\nif True:\n    c.CourseDirectory.course_id = 'python26'\n")
    new = _next_year(made)
    done = new.create(made.campus.instructors[1], "--from", made.root)
    assert done.code == 0, done.log
    assert "nbgrader_config.old.py" in done.log
    assert "if True" in (new.root / "nbgrader_config.old.py").read_text()
    assert "python26" not in (new.root / "nbgrader_config.py").read_text()


@pytest.mark.parametrize("who", ["root", "instructor"])
def test_the_earlier_repository_makes_nobody_run_anything(made: Place, who: str) -> None:
    first, second = made.campus.instructors
    (made.root / ".gitattributes").write_text("* filter=evil\n")
    _earlier(made)
    ran = made.campus.directory / f"ran-{made.top.name}"
    evil = f"sh -c 'touch \"{ran}\"; cat'"
    for name in ("filter.evil.smudge", "filter.evil.clean", "core.fsmonitor", "core.pager", "tar.tar.command"):
        _git(first, made, "config", name, evil)
    hooks = made.root / ".git" / "hooks"
    hooks.mkdir(exist_ok=True)
    for name in ("post-checkout", "post-index-change", "reference-transaction"):
        (hooks / name).write_text(f"#!/bin/sh\ntouch '{ran}'\n")
        (hooks / name).chmod(0o755)
    new = _next_year(made)
    done = new.create(new.administrator if who == "root" else second, "--from", made.root)
    assert done.code == 0, done.log
    assert (new.root / "README.md").read_text() == "read me"
    assert not ran.exists()


def test_from_refuses_a_course_without_git_and_says_why(made: Place) -> None:
    shutil.rmtree(made.root / ".git")
    new = _next_year(made)
    done = new.create(made.campus.instructors[1], "--from", made.root)
    assert done.code == 2
    assert "committed to git" in done.log
    assert not new.root.exists()


# the watcher, and receipts


@pytest.fixture
def tree(campus: Campus, clerks: Clerks) -> CourseTree:
    """A course that everybody is configured for, with one assignment released."""
    made = campus.course(f"kurssi{os.getpid()}x{next(_NUMBER)}")
    first = campus.instructors[0]
    places = ("--group", campus.group, "--course-dir", made.root, "--exchange", made.exchange)
    done = clerks.aalto(first, "course", "create", made.name, *places, cwd=first.home)
    assert done.code == 0, done.log
    released = first.python(
        "import os, sys; os.umask(0o002); os.mkdir(sys.argv[1]); "
        "open(sys.argv[1] + '/p1.ipynb', 'w').write(sys.argv[2])",
        made.exchange / made.name / "outbound" / "ps1",
        NOTEBOOK,
    )
    assert released.code == 0, released.log
    return made


def submit(tree: CourseTree, clerks: Clerks, who: Member, files: Mapping[str, str]) -> Path:
    """Returns the student's own record."""
    work = who.home / tree.name
    (work / "ps1").mkdir(parents=True, exist_ok=True)
    for name, text in {"p1.ipynb": NOTEBOOK, **files}.items():
        (work / "ps1" / name).write_text(text)
    for path in (work, *work.rglob("*")):
        os.chown(path, who.uid, who.gid)
    done = clerks.nbgrader(who, "submit", "ps1", cwd=work, env=tree.env())
    assert done.code == 0, done.log
    records = who.home / ".local/share/jupyter/nbgrader_cache" / tree.name
    return max((path for path in records.iterdir() if path.name[0] != "."), key=lambda path: path.name)


def vault(tree: CourseTree) -> list[str]:
    """Whose submissions are in it."""
    return [json.loads(path.read_text())["student"] for path in sorted(tree.root.glob("vault/ps1/*/*/submission.json"))]


def test_watch_once_takes_in_what_is_there(tree: CourseTree, clerks: Clerks) -> None:
    campus = tree.campus
    submit(tree, clerks, campus.students[0], {})
    for instructor in campus.instructors:
        done = clerks.aalto(instructor, "exchange", "watch", tree.name, "--once", cwd=tree.root, env=tree.env())
        assert done.code == 0, done.log
        assert vault(tree) == [campus.students[0].name]
    assert not (tree.root / "submitted").exists() or not list((tree.root / "submitted").iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_watch_takes_in_what_comes_until_it_is_told_to_end(
    tree: CourseTree, clerks: Clerks, number: signal.Signals
) -> None:
    watcher, student = tree.campus.instructors[1], tree.campus.students[0]
    interpreter = (watcher.interpreter, "-P", "-m", "nbgrader_aalto.cli")
    options = ("exchange", "watch", tree.name, "--interval", "0.1")
    process = watcher.start(*interpreter, *options, cwd=tree.root, env=tree.env())
    timer = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("nothing was taken in"))
    signal.alarm(300)
    try:
        assert process.stdout
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "Watching" in line:
                submit(tree, clerks, student, {})
            if "Taken in" in line:
                break
        assert student.name in lines[-1]
        process.send_signal(number)
        rest, _ = process.communicate(timeout=30)
        assert process.returncode == 0, rest
        assert "Traceback" not in rest
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, timer)
        watcher.kill(process)
    assert vault(tree) == [student.name]
    assert not [name for name in os.listdir(tree.root / ".locks") if not name.startswith(".")]


def test_watch_says_why_it_cannot(tree: CourseTree, clerks: Clerks) -> None:
    student, first = tree.campus.students[0], tree.campus.instructors[0]
    for who, course, code, words in (
        (student, tree.name, 1, "permission"),
        (first, "another", 2, f"is the course {tree.name!r}"),
        (Place(tree.campus, clerks, tree.top).administrator, tree.name, 2, "root does not watch"),
    ):
        done = clerks.aalto(who, "exchange", "watch", course, "--once", cwd=tree.top, env=tree.env())
        assert done.code == code, done.log
        assert words in done.log


def verify(tree: CourseTree, clerks: Clerks, who: Member, *arguments: str | Path, cwd: Path | None = None) -> Done:
    return clerks.aalto(who, "receipt", "verify", *arguments, cwd=cwd or who.home, env=tree.env())


def test_a_receipt_from_submit_to_a_forged_confirmation(tree: CourseTree, clerks: Clerks) -> None:
    first, second = tree.campus.instructors
    student = tree.campus.students[1]
    assert verify(tree, clerks, student).code == 3  # nothing yet
    record = submit(tree, clerks, student, {"data.txt": "1"})
    before = verify(tree, clerks, student)
    assert before.code == 3, before.log
    assert before.log.startswith("unconfirmed: ")
    at_course = verify(tree, clerks, second, record, cwd=tree.root)
    assert at_course.code == 1, "the record is the student's, who alone can read it"
    sent = tree.top / "receipt.json"
    shutil.copy(record / "receipt.json", sent)
    sent.chmod(0o644)
    assert verify(tree, clerks, second, sent, cwd=tree.root).code == 3

    assert clerks.aalto(first, "exchange", "watch", tree.name, "--once", cwd=tree.root, env=tree.env()).code == 0
    after = verify(tree, clerks, student)
    assert after.code == 0, after.log
    assert first.name in after.log
    assert verify(tree, clerks, student, "--course", tree.name, record).code == 0
    assert verify(tree, clerks, student, record / "receipt.json").code == 0
    assert verify(tree, clerks, second, sent, cwd=tree.root).code == 0

    (record / "data.txt").write_text("2")
    changed = verify(tree, clerks, student)
    assert changed.code == 1
    assert "data.txt: has changed" in changed.log

    forged = submit(tree, clerks, student, {"data.txt": "3"})
    assert forged != record
    receipt = json.loads((forged / "receipt.json").read_text())
    (box,) = (tree.exchange / tree.name / "feedback").iterdir()
    text = json.dumps({**receipt, "status": "confirmed", "confirmed_by": first.name})
    made = student.python(
        "import sys; open(sys.argv[1], 'w').write(sys.argv[2])", box / f"{receipt['name']}.receipt", text
    )
    assert made.code == 0, made.log
    wrong = verify(tree, clerks, student, forged)
    assert wrong.code == 1
    assert "not written by an instructor" in wrong.log


def test_receipts_of_a_student_who_is_configured_for_no_course(tree: CourseTree, clerks: Clerks) -> None:
    student = tree.campus.students[2]
    record = submit(tree, clerks, student, {})
    config = tree.config_dir / "nbgrader_config.py"
    config.write_text("".join(line for line in config.read_text().splitlines(True) if "course_id" not in line))
    for arguments in ((record,), ("--course", tree.name)):
        done = verify(tree, clerks, student, *arguments)
        assert done.code == 3, done.log
        assert tree.name in done.log


def test_the_group_is_named_after_the_course_unless_told() -> None:
    from nbgrader_aalto import cli

    name = grp.getgrgid(os.getgid()).gr_name
    assert cli.group(name) == os.getgid()
