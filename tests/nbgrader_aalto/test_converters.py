"""Turns of nbgrader's converters: nothing is lost, nobody is disturbed, everybody may carry on.

Autograde's own are in test_intake.py and e2e/test_killed.py. Here a hook of the course, which nbgrader calls in the
middle of a turn, keeps a real process there for as long as a test needs it.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nbformat
import pytest
from clerks import Clerks
from traitlets.config import Config

from attacks.harness import eventually
from campus import Campus, CourseTree, Member
from e2e.courses import Course, answer, check, contents, notebook
from nbgrader_aalto import converters, shared, turns
from nbgrader_aalto.configure import configure

SECONDS = 120.0
HOOK = """
import os, pathlib, signal, time

def stay(assignment, student, notebooks):
    place = os.environ.get("STAY")
    if place and not os.path.exists(place + ".done"):
        half = pathlib.Path(os.environ["HALF"])
        half.mkdir(parents=True, exist_ok=True)
        (half / "half.txt").write_text("half made")
        pathlib.Path(place).touch()
        while not os.path.exists(place + ".go"):
            time.sleep(0.02)
        pathlib.Path(place + ".done").touch()

"""
PRE = HOOK + "c.BaseConverter.pre_convert_hook = stay\n"
POST = HOOK + "c.BaseConverter.post_convert_hook = stay\n"
NO_EXECUTION = """
c.Autograde.autograde_preprocessors = ["nbgrader.preprocessors.SaveAutoGrades"]
"""
"""What is autograded does not matter here, and a sandbox takes its time."""

GENERATED = {
    "generate_assignment": "release/ps1",
    "generate_solution": "solution/ps1",
    "generate_feedback": "feedback/ann/ps1",
}
"""Command, and what it makes."""
SOURCES = {"generate_feedback": "autograded/ann/ps1/p1.ipynb"}


def add_source(course: Course, name: str = "p1", assignment: str = "ps1") -> None:
    source = course.root / "source" / assignment
    source.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook(answer("one"), check("test_one", "assert one == 1", 2)), source / f"{name}.ipynb")
    (source / "data ä.txt").write_text("data")


def make_graded(top: Path) -> Course:
    """Assignment ps1, autograded for ann and bea; of everything that is made from it there is an earlier result."""
    course = Course(top, NO_EXECUTION)
    add_source(course)
    assert convert(course, "GenerateAssignment") == ""
    assert convert(course, "GenerateSourceWithTests") == ""
    assert convert(course, "GenerateSolution") == ""
    for student in ("ann", "bea"):
        course.submit(student, answers={"one": "one = 1"})
    assert convert(course, "Autograde", student="*") == ""
    assert convert(course, "GenerateFeedback", student="*") == ""
    return course


def convert(course: Course, name: str, assignment: str = "ps1", student: str = "*", **settings: Any) -> str:
    """Run a converter as Formgrader's buttons do, always with force. Returns what it complains of."""
    import nbgrader.converters
    from nbgrader.coursedir import CourseDirectory

    with course._here():
        config = course._api().config
        config.merge(Config({name: {"force": True}, **settings}))
        course_directory = CourseDirectory(config=config)
        course_directory.assignment_id, course_directory.student_id = assignment, student
        converter = getattr(nbgrader.converters, name)(coursedir=course_directory, config=config)
        try:
            converter.start()
        except nbgrader.converters.NbGraderException as error:
            return str(error) or "failed"
        return ""


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory) -> Course:
    """Not to be changed: see `course`."""
    return make_graded(tmp_path_factory.mktemp("graded") / "with blank")


@pytest.fixture
def course(graded: Course, tmp_path: Path) -> Course:
    """A copy of it, with everything at another place."""
    copy = Course(tmp_path / "with blank", NO_EXECUTION)
    shutil.copytree(graded.root, copy.root, dirs_exist_ok=True)
    copy.configure(NO_EXECUTION)
    return copy


def names_beside(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.iterdir())


def locks(root: Path) -> list[str]:
    return sorted(path.name for path in (root / ".locks").iterdir()) if (root / ".locks").exists() else []


class Staying:
    """A process in the middle of a turn, as told by the course's hook."""

    def __init__(self, place: Path, half: Path, start: Callable[..., "subprocess.Popen[str]"], *command: str) -> None:
        self.place = place
        place.parent.chmod(0o777)  # other users' processes write there, too
        self.process = start(*command, STAY=str(place), HALF=str(half))

    def __enter__(self) -> "Staying":
        assert eventually(lambda: self.place.exists() or self.process.poll() is not None, SECONDS)
        assert self.process.poll() is None, self.process.communicate()[0]
        return self

    def go_on(self) -> tuple[int, str]:
        self.place.with_name(self.place.name + ".go").touch()
        log, _ = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, log

    def end(self, number: int) -> str:
        os.killpg(self.process.pid, number)
        log, _ = self.process.communicate(timeout=SECONDS)
        assert self.process.returncode != 0
        return log

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


@pytest.mark.parametrize(
    ("name", "broken", "made"),
    [
        ("GenerateAssignment", "source/ps1/p1.ipynb", "release/ps1"),
        ("GenerateSourceWithTests", "source/ps1/p1.ipynb", "source_with_tests/ps1"),
        ("GenerateSolution", "source/ps1/p1.ipynb", "solution/ps1"),
        ("GenerateFeedback", "autograded/ann/ps1/p1.ipynb", "feedback/ann/ps1"),
    ],
)
def test_a_run_that_fails_loses_nothing(course: Course, name: str, broken: str, made: str) -> None:
    earlier, inode = contents(course.root / made), (course.root / made).stat().st_ino
    assert earlier
    (course.root / broken).chmod(0o644)
    (course.root / broken).write_text("not a notebook")
    assert convert(course, name, student="ann")
    assert (contents(course.root / made), (course.root / made).stat().st_ino) == (earlier, inode)
    assert names_beside(course.root / made) == ["ps1"]
    assert locks(course.root) == []


@pytest.mark.slow
@pytest.mark.parametrize("hook", [PRE, POST], ids=["half made", "not yet settled"])
@pytest.mark.parametrize("command", GENERATED)
def test_after_a_kill_the_earlier_result_is_found_again(
    course: Course, tmp_path: Path, command: str, hook: str
) -> None:
    made = course.root / GENERATED[command]
    earlier = contents(made)
    course.configure(NO_EXECUTION + hook)
    with Staying(tmp_path / "stay", made, course.start, command, "ps1", "--force") as staying:
        assert contents(made.parent / ".ps1.before") == earlier
        assert len(locks(course.root)) == (4 if command == "generate_feedback" else 2)  # what it reads, too
        staying.end(signal.SIGKILL)
    assert contents(made) != earlier
    course.configure(NO_EXECUTION)
    source = course.root / SOURCES.get(command, "source/ps1/p1.ipynb")
    good = source.read_bytes()
    source.chmod(0o644)
    source.write_text("not a notebook")
    name = command.title().replace("_", "")
    assert convert(course, name, student="ann")
    assert contents(made) == earlier
    source.write_bytes(good)
    assert convert(course, name, student="ann") == ""
    assert set(contents(made)) == set(earlier)
    assert names_beside(made) == ["ps1"]
    assert locks(course.root) == []


@pytest.mark.slow
def test_an_interrupted_run_lets_go_of_the_lock_and_keeps_the_earlier_result(course: Course, tmp_path: Path) -> None:
    made = course.root / "release/ps1"
    earlier = contents(made)
    course.configure(NO_EXECUTION + PRE)
    with Staying(tmp_path / "stay", made, course.start, "generate_assignment", "ps1", "--force") as staying:
        staying.end(signal.SIGINT)
    assert contents(made) == earlier
    assert names_beside(made) == ["ps1"]
    assert locks(course.root) == []


@pytest.mark.slow
def test_who_comes_second_is_told_who_is_at_work_and_the_others_go_on(course: Course, tmp_path: Path) -> None:
    made, other = course.root / "feedback/ann/ps1", course.root / "feedback/bea/ps1"
    earlier, inode = contents(made), other.stat().st_ino
    course.configure(NO_EXECUTION + PRE)
    first = ("generate_feedback", "ps1", "--force", "--student=ann")
    with Staying(tmp_path / "stay", made, course.start, *first) as staying:
        half = contents(made)
        second = course.nbgrader("generate_feedback", "ps1", "--force", "--CarefulExporter.lock_seconds=0.1")
        assert second.code == 1, second.log
        assert "ps1 of ann: root has been making feedback on ps1 of ann on host" in second.log or os.geteuid() != 0
        assert f"(process {staying.process.pid}) since " in second.log
        assert "Traceback" not in second.log
        assert contents(made.parent / ".ps1.before") == earlier
        assert contents(made) == half
        assert other.stat().st_ino != inode, "the other student's is new"
        code, log = staying.go_on()
        assert code == 0, log
    assert set(contents(made)) == {*earlier, "half.txt"}
    assert names_beside(made) == ["ps1"]


@pytest.mark.slow
@pytest.mark.parametrize("interrupt", [False, True])
def test_who_comes_second_waits(course: Course, tmp_path: Path, interrupt: bool) -> None:
    made = course.root / "release/ps1"
    earlier = contents(made)
    course.configure(NO_EXECUTION + PRE)
    again = ("generate_assignment", "ps1", "--force")
    with Staying(tmp_path / "stay", made, course.start, *again) as staying:
        second = course.start(*again, "--CarefulExporter.lock_seconds=300")
        assert second.stdout is not None
        try:
            seen = ""
            while "waiting: " not in seen and (line := second.stdout.readline()):
                seen += line
            assert "has been generating ps1 on host" in seen
            if interrupt:
                second.send_signal(signal.SIGINT)
                rest, _ = second.communicate(timeout=SECONDS)
                assert second.returncode != 0, rest
            assert contents(made.parent / ".ps1.before") == earlier
            assert (made / "half.txt").exists()
            code, log = staying.go_on()
            assert code == 0, log
            if not interrupt:
                rest, _ = second.communicate(timeout=SECONDS)
                assert second.returncode == 0, rest
                assert contents(made).keys() == earlier.keys(), "its own, made anew"
        finally:
            second.kill()
            second.communicate()
    assert names_beside(made) == ["ps1"]
    assert locks(course.root) == []


def test_feedback_is_that_of_stock(course: Course) -> None:
    settings = "c.HTMLExporter.exclude_input_prompt = True\n"
    made = course.root / "feedback/ann/ps1/p1.html"
    results = []
    for end in (None, ""):
        course.configure(NO_EXECUTION + settings, *([] if end is None else [end]))
        made.parent.parent.joinpath("ps1").rename(course.root / f"feedback/ann/.old{len(results)}")
        assert convert(course, "GenerateFeedback", student="ann") == ""
        results.append(made.read_bytes())
    assert len(results[0]) > 10_000
    assert results[0] == results[1]


def test_one_notebook_of_several_is_made_anew(course: Course) -> None:
    add_source(course, "p2", "ps2")
    add_source(course, "p1", "ps2")
    assert convert(course, "GenerateAssignment", "ps2") == ""
    made = course.root / "release/ps2"
    other, inode = (made / "p1.ipynb").stat(), (made / "p2.ipynb").stat().st_ino
    assert convert(course, "GenerateAssignment", "ps2", CourseDirectory={"notebook_id": "p2"}) == ""
    assert (made / "p1.ipynb").stat().st_ino == other.st_ino
    assert (made / "p2.ipynb").stat().st_ino != inode
    assert names_beside(made / "p1.ipynb") == ["data ä.txt", "p1.ipynb", "p2.ipynb"]


def test_feedback_finds_what_a_killed_autograde_left_aside(course: Course) -> None:
    ann, bea = course.root / "autograded/ann", course.root / "autograded/bea"
    for student in (ann, bea):
        (student / "ps1").rename(student / ".ps1.before")
    (bea / "ps1").mkdir()
    (bea / "ps1/p1.ipynb").write_text("half made")
    shutil.rmtree(course.root / "feedback")
    (course.root / "autograded/zoe/ps1").mkdir(parents=True)
    (course.root / "autograded/zoe/ps1/p1.ipynb").write_text("half made, the first time")
    (course.root / "autograded/zoe/.ps1.before").touch()
    assert convert(course, "GenerateFeedback") == ""
    assert sorted(path.parent.parent.name for path in (course.root / "feedback").rglob("*.html")) == ["ann", "bea"]
    assert names_beside(ann / "ps1") == names_beside(bea / "ps1") == ["ps1"]
    assert list((course.root / "autograded/zoe").iterdir()) == []


def test_no_feedback_on_what_is_being_autograded(course: Course) -> None:
    shutil.rmtree(course.root / "feedback")
    before = course.root / "autograded/ann/.ps1.before"
    (course.root / "autograded/ann/ps1").rename(before)
    shutil.copytree(before, course.root / "autograded/ann/ps1")
    with turns.turn(course.root, "autograded", "ann", "ps1"):
        complaint = convert(course, "GenerateFeedback")
    assert "ps1 of ann: " in complaint
    assert "has been autograding ps1 of ann on host" in complaint
    assert before.exists()
    assert [path.parent.parent.name for path in (course.root / "feedback").rglob("*.html")] == ["bea"]


def test_no_feedback_while_the_student_is_autograded(course: Course) -> None:
    """In the moments in which nothing lies aside, too; the others get theirs."""
    shutil.rmtree(course.root / "feedback")
    with turns.turn(course.root, "autograded", "ann", "ps1"):
        complaint = convert(course, "GenerateFeedback", CarefulExporter={"lock_seconds": 0.1})
    assert "ps1 of ann: " in complaint
    assert "has been autograding ps1 of ann on host" in complaint
    assert [path.parent.parent.name for path in (course.root / "feedback").rglob("*.html")] == ["bea"]
    assert locks(course.root) == []
    assert convert(course, "GenerateFeedback") == ""


@pytest.mark.parametrize(
    ("assignment", "book", "reason"),
    [
        ("ps#1", "p1", "the assignment 'ps#1': it holds '#'"),
        ("ps[1]", "p1", "the assignment 'ps[1]': it holds '['"),
        ("ps1", "p%41", "the notebook 'p%41': it holds '%'"),
    ],
)
def test_a_bad_name_is_refused_before_anything_is_touched(
    course: Course, assignment: str, book: str, reason: str
) -> None:
    add_source(course, book, assignment)
    before, gradebook = contents(course.root / "release"), (course.root / "gradebook.db").read_bytes()
    assert reason in convert(course, "GenerateAssignment", assignment)
    assert reason in convert(course, "GenerateSolution", assignment)
    assert contents(course.root / "release") == before
    assert (course.root / "gradebook.db").read_bytes() == gradebook


def test_names_of_a_pattern_are_those_that_it_finds(course: Course) -> None:
    add_source(course, "p1", "ps2")
    assert convert(course, "GenerateAssignment", "ps*") == ""
    assert (course.root / "release/ps2/p1.ipynb").exists()


def test_the_courses_own_exporter_stays_and_it_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    own = "nbconvert.exporters.NotebookExporter"
    config = Config(GenerateAssignment={"exporter_class": own})
    configure(config)
    assert config.GenerateAssignment.exporter_class == own
    assert config.GenerateFeedback.exporter_class == "nbgrader_aalto.converters.FeedbackExporter"
    assert "GenerateAssignment uses 'nbconvert.exporters.NotebookExporter'" in capsys.readouterr().err
    configure(config := Config(BaseConverter={"exporter_class": own}))
    assert "exporter_class" not in config.GenerateFeedback
    assert config.Autograde.exporter_class == "nbgrader_aalto.intake.IntakeExporter"


def test_without_a_converter_they_are_plain_exporters() -> None:
    document = notebook(answer("one"))
    assert converters.AssignmentExporter().from_notebook_node(document)[0].startswith("{")
    assert "<html" in converters.FeedbackExporter().from_notebook_node(document)[0]


# --- several instructors, who are real Unix users


@pytest.fixture(scope="module")
def tree(campus: Campus) -> CourseTree:
    """A course of two instructors, who have generated and graded nothing yet."""
    return campus.course("kurssi", NO_EXECUTION)


def modes(root: Path, below: Path) -> Mapping[str, str]:
    """What is not as it must be: the step, the student and everything below."""
    gid = root.stat().st_gid
    way = [path for path in below.parents if root in path.parents]
    found = {}
    for path in [*way, below, *below.rglob("*")]:
        status, needed = path.stat(), 0o2770 if path.is_dir() else 0o660
        if status.st_mode & needed != needed or status.st_gid != gid:
            found[str(path)] = oct(status.st_mode)
    return found


def prepare(tree: CourseTree, member: Member, assignment: str, submit: bool = False) -> Path:
    """The source of an assignment, and with `submit` a submission of alice's, with modes of their own."""
    for place in [
        tree.root / "source" / assignment,
        *([tree.root / f"submitted/alice/{assignment}"] if submit else []),
    ]:
        script = "import sys, pathlib; p = pathlib.Path(sys.argv[1]); (p / 'own').mkdir(parents=True, exist_ok=True)"
        done = member.python(script, place, umask=0o007)
        assert done.code == 0, done.log
        document = notebook(answer("one"), check("test_one", "assert one == 1", 2))
        for path, text in (
            (place / "p1.ipynb", nbformat.writes(document)),
            (place / "p2.ipynb", nbformat.writes(document)),
            (place / "own/run.sh", "true"),
        ):
            path.write_text(text)
            os.chown(path, member.uid, member.gid)
            path.chmod(0o740 if path.suffix == ".sh" else 0o440)
    return tree.root / "release" / assignment


CLICKS = """
import sys
from nbgrader.apps import NbGraderAPI
from nbgrader.converters import GenerateSolution
from nbgrader.coursedir import CourseDirectory
from traitlets.config.loader import PyFileConfigLoader

config = PyFileConfigLoader("nbgrader_config.py", path=sys.argv[1]).load_config()
course = CourseDirectory(config=config)
api = NbGraderAPI(course, config=config)
course.assignment_id = "ps1"
results = [api.generate_assignment("ps1")]
solution = GenerateSolution(coursedir=course, config=config)
solution.force = True
solution.start()
results += [api.autograde("ps1", "alice"), api.generate_feedback("ps1")]
for result in results:
    print(result.get("error", ""), result.get("log", ""))
sys.exit(not all(result["success"] for result in results))
"""
"""What Formgrader's buttons do, and a solution, in one process."""


def nbgrader(clerks: Clerks, tree: CourseTree, member: Member, *arguments: str, code: int = 0) -> str:
    done = clerks.nbgrader(member, *arguments, cwd=tree.root, env=tree.env())
    assert done.code == code, done.log
    return done.log


@pytest.mark.slow
def test_either_instructor_may_make_it_anew_and_everybody_can_write_to_it(
    clerks: Clerks, tree: CourseTree, campus: Campus
) -> None:
    inka, ivan = campus.instructors
    prepare(tree, inka, "ps1", submit=True)
    for member in (inka, ivan):
        done = member.python(CLICKS, tree.config_dir, cwd=tree.root)
        assert done.code == 0, done.log
    for made in ("release/ps1", "solution/ps1", "autograded/alice/ps1", "feedback/alice/ps1"):
        assert modes(tree.root, tree.root / made) == {}
        assert (tree.root / made).stat().st_uid == ivan.uid
        assert names_beside(tree.root / made) == ["ps1"]
        assert (tree.root / made / "own/run.sh").stat().st_mode & 0o060 == 0o060
    nbgrader(clerks, tree, inka, "generate_assignment", "ps1", "--notebook=p1", "--force")
    release = tree.root / "release/ps1"
    assert ((release / "p1.ipynb").stat().st_uid, (release / "p2.ipynb").stat().st_uid) == (inka.uid, ivan.uid)
    assert modes(tree.root, release) == {}
    assert locks(tree.root) == []


@pytest.mark.slow
def test_where_a_colleague_forbids_it_nothing_is_lost_and_the_owner_is_named(
    clerks: Clerks, tree: CourseTree, campus: Campus
) -> None:
    inka, ivan = campus.instructors
    prepare(tree, inka, "ps2", submit=True)
    for command in ("generate_assignment", "autograde"):
        nbgrader(clerks, tree, inka, command, "ps2")
    made = tree.root / "autograded/alice/ps2"
    earlier = contents(made)
    made.parent.chmod(0o2755)
    try:
        log = nbgrader(clerks, tree, ivan, "autograde", "ps2", "--force", code=1)
    finally:
        made.parent.chmod(0o2770)
    assert f"{made.parent} belongs to {inka.name}; {inka.name} runs `nbgrader-aalto course repair`" in log
    assert "Traceback" not in log
    assert contents(made) == earlier


@pytest.mark.slow
def test_what_cannot_be_removed_does_not_cost_the_new_result(clerks: Clerks, tree: CourseTree, campus: Campus) -> None:
    inka, ivan = campus.instructors
    made = prepare(tree, inka, "ps3")
    nbgrader(clerks, tree, inka, "generate_assignment", "ps3")
    (made / "own").chmod(0o2755)
    log = nbgrader(clerks, tree, ivan, "generate_assignment", "ps3", "--force")
    assert "The new result is in place, but something of the earlier one could not be removed" in log
    assert "own/run.sh: Permission denied" in log
    assert made.stat().st_uid == (made / "p1.ipynb").stat().st_uid == ivan.uid
    assert modes(tree.root, made) == {}
    (refuse,) = (path for path in made.parent.iterdir() if path.name.startswith(".ps3.dropped."))
    assert [path.name for path in refuse.iterdir()] == ["own"]
    # the next run of its owner removes it
    nbgrader(clerks, tree, inka, "generate_assignment", "ps3", "--force")
    assert not refuse.exists()


@pytest.mark.slow
def test_a_colleagues_work_is_not_taken_for_a_killed_run(
    clerks: Clerks, tree: CourseTree, campus: Campus, tmp_path: Path
) -> None:
    inka, ivan = campus.instructors
    made = prepare(tree, inka, "ps4")
    nbgrader(clerks, tree, inka, "generate_assignment", "ps4")
    earlier = contents(made)
    tree.configure(NO_EXECUTION + PRE)

    place = Path(campus.directory) / "stay" / "ps4"
    place.parent.mkdir()

    def start(*command: str, **env: str) -> "subprocess.Popen[str]":
        arguments = [inka.interpreter, "-P", "-m", "nbgrader", *command]
        return inka.start(*arguments, cwd=tree.root, env={**tree.env(), **env})

    try:
        with Staying(place, made, start, "generate_assignment", "ps4", "--force") as staying:
            command = ("generate_assignment", "ps4", "--force", "--CarefulExporter.lock_seconds=0.1")
            log = nbgrader(clerks, tree, ivan, *command, code=1)
            assert f"ps4: {inka.name} has been generating ps4 on host" in log
            assert contents(made.parent / ".ps4.before") == earlier
            staying.end(signal.SIGKILL)
        assert contents(made).keys() != earlier.keys()
        nbgrader(clerks, tree, ivan, *command)
    finally:
        tree.configure(NO_EXECUTION)
        shutil.rmtree(place.parent)
    assert contents(made).keys() == earlier.keys()
    assert made.stat().st_uid == ivan.uid
    assert not (made.parent / ".ps4.before").exists()


TURN = """
import pathlib, sys
from nbgrader_aalto.turns import turn
with turn(pathlib.Path(sys.argv[1]), "release", ".", "ps1") as lock:
    print(lock is None)
"""


def test_there_is_no_lock_where_nothing_can_be_written(campus: Campus) -> None:
    tree = campus.course("readonly")
    inka, ivan = campus.instructors
    tree.root.chmod(0o2750)
    assert ivan.python(TURN, tree.root).log == "True\n"
    assert not (tree.root / ".locks").exists()
    assert inka.python(TURN, tree.root).log == "False\n"
    tree.root.chmod(0o2770)
    (tree.root / ".locks").chmod(0o2750)
    done = ivan.python(TURN, tree.root)
    assert f"no lock can be made: Permission denied: '{tree.root / '.locks'}'" in done.log


def test_sharing_follows_nothing(tmp_path: Path) -> None:
    root, outside = tmp_path / "course", tmp_path / "outside"
    made = root / "autograded/ann/ps1"
    made.mkdir(parents=True)
    outside.mkdir(mode=0o700)
    (outside / "secret").write_text("")
    (outside / "secret").chmod(0o600)
    (made / "link").symlink_to(outside / "secret")
    (made / "links").symlink_to(outside)
    (made / "run.sh").write_text("")
    (made / "run.sh").chmod(0o700)
    assert shared.share(root, made) == []
    assert (outside / "secret").stat().st_mode & 0o777 == 0o600
    assert outside.stat().st_mode & 0o7777 == 0o700
    assert (made / "run.sh").stat().st_mode & 0o777 == 0o760
    assert made.stat().st_mode & made.parent.stat().st_mode & 0o2770 == 0o2770


def test_a_students_file_is_never_taken_for_an_earlier_result(course: Course) -> None:
    """With its name, generating feedback would put the student's notebook in the place of the autograded one."""
    submitted, graded = course.root / "submitted/ann/ps1", course.root / "autograded/ann/ps1/p1.ipynb"
    text = (submitted / "p1.ipynb").read_text()
    (submitted / ".p1.ipynb.before").write_text(text.replace("one = 1", "one = 'the student was here'"))
    before = graded.read_bytes()
    assert "'.p1.ipynb.before' has a name that" in convert(course, "Autograde")
    assert graded.read_bytes() == before
    assert convert(course, "GenerateFeedback") == ""
    assert graded.read_bytes() == before
