"""IsolatedExecute through nbgrader's own commands: scores, ends, host faults, files, environment.

One course is graded by the real command; what needs other settings is graded by what Formgrader's bolt calls.
"""

import json
import os
import re
import stat
import sys
import venv
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_output, new_raw_cell
from nbgrader.utils import determine_grade
from packaging.requirements import Requirement

from e2e.courses import SECRET, Course, Done, answer, check, code, contents, errors, find, notebook, printed
from nbgrader_aalto.decisive import let_failures_decide

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("execute")]

RIGHT = {"one": "one = 1", "two": "two = 2", "half": "half = 1.0"}
FULL = {"test_one": 2, "test_two": 3, "test_partial": 4, "test_last": 1}
# A result that is displayed while the tested function runs, before the assertion that fails.
DISPLAYED = """
from IPython import get_ipython
class One:
    def __eq__(self, other):
        get_ipython().displayhook({value})
        return False
one = One()
"""
DISPLAYS_MORE = """
class Half:
    def __rmul__(self, other):
        get_ipython().displayhook(4.0)
        return 1.0
half = Half()
"""
HOARD = """
import os, time
for _ in range(4):
    if not os.fork():
        x = b"x" * (130 << 20)
        time.sleep(60)
time.sleep(60)
"""


def ps1(**source: Any) -> NotebookNode:
    return notebook(
        answer("one"),
        check("test_one", "assert one == 1", 2),
        code("a_cell_of_nobody = 1"),
        answer("two"),
        check("test_two", "assert two == 2", 3),
        answer("half"),
        check("test_partial", "4 * half", 4),
        check("test_last", "assert one == 1", 1),
        **source,
    )


def tag_tests(*tags: str) -> Callable[[NotebookNode], object]:
    def edit(document: NotebookNode) -> None:
        for cell in document.cells:
            cell.metadata["tags"] = list(tags)
            cell.metadata["deletable"] = True
            cell.metadata["jupyter"] = {"source_hidden": True}
            cell.metadata["execution"] = {"skip": "x"}

    return edit


def change_type(document: NotebookNode) -> None:
    for name in ("test_one", "test_two"):
        at = document.cells.index(find(document, name))
        document.cells[at] = new_raw_cell(document.cells[at].source, metadata=document.cells[at].metadata)


def notebook_metadata(document: NotebookNode) -> None:
    document.metadata["kernelspec"] = {"name": "evil", "display_name": "evil", "language": "python"}
    document.metadata["language_info"] = {"name": "evil"}
    document.metadata["skip_cells_with_tag"] = "x"
    document.metadata["execution"] = {"timeout": -1, "skip": True}
    document.metadata["isolate"] = {"layers": ["forged"]}


def outputs_of_its_own(document: NotebookNode) -> None:
    for cell in document.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], 1


WRONG = {"one": "one = 0", "two": "two = 0", "half": "half = 0"}
NOTHING = dict.fromkeys(FULL, 0)
STUDENTS: dict[str, tuple[dict[str, str], Any, dict[str, float]]] = {
    "honest": (RIGHT, None, FULL),
    "half": ({**RIGHT, "two": "two = 0", "half": "half = 0.25"}, None, {**FULL, "test_two": 0, "test_partial": 1}),
    "empty": ({}, None, NOTHING),
    # row 67a
    "skip": (WRONG, tag_tests("skip-execution"), NOTHING),
    "raises": (WRONG, tag_tests("raises-exception", "remove-cell", "parameters"), NOTHING),
    "skip_right": (RIGHT, tag_tests("skip-execution"), FULL),
    "raw_tests": (WRONG, change_type, NOTHING),
    "metadata": (WRONG, notebook_metadata, NOTHING),
    "metadata_right": (RIGHT, notebook_metadata, FULL),
    "outputs": (WRONG, outputs_of_its_own, NOTHING),
    # row 67b
    "displays": ({**RIGHT, "one": DISPLAYED.format(value="'x'")}, None, {**FULL, "test_one": 0, "test_last": 0}),
    "displays_number": ({**RIGHT, "one": DISPLAYED.format(value="2.0")}, None, {**FULL, "test_one": 0, "test_last": 0}),
    "displays_more": (
        {**RIGHT, "half": DISPLAYS_MORE},
        None,
        {**FULL, "test_partial": 0},
    ),
    # how a kernel may end
    "exits": ({**RIGHT, "two": "import os\nos._exit(0)"}, None, {**NOTHING, "test_one": 2}),
    "crashes": ({**RIGHT, "two": "import ctypes\nctypes.string_at(0)"}, None, {**NOTHING, "test_one": 2}),
    "hoards": (
        {**RIGHT, "two": HOARD},
        None,
        {**NOTHING, "test_one": 2},
    ),
    "allocates": ({**RIGHT, "two": "two = b'x' * (1 << 30)"}, None, {**FULL, "test_two": 0}),
    "exits_in_test": (
        {**RIGHT, "one": "import os\nclass One:\n    def __eq__(self, other):\n        os._exit(0)\none = One()"},
        None,
        NOTHING,
    ),
}
ENDS = {
    "exits": ("kernel died", "exit code 0"),
    "crashes": ("kernel died", "SIGSEGV"),
    "hoards": ("memory", "memory limit of 400 MiB"),
    "exits_in_test": ("kernel died", "exit code 0"),
}
CONFIG = """
c.Execute.timeout = 20
c.IsolatedExecute.memory = "400M"
c.IsolatedExecute.files = "2M"
"""


class Graded:
    """The course after the one run that most tests look at."""

    def __init__(self, course: Course) -> None:
        self.course = course
        course.add("ps1", {"p1": ps1()})
        for student, (answers, edit, _) in STUDENTS.items():
            course.submit(student, answers=answers, edit=edit)
        self.done: Done = course.nbgrader("autograde", "ps1")
        self.before = {name: course.scores(name) for name in STUDENTS}


@pytest.fixture(scope="module")
def graded(make_course: Callable[..., Course]) -> Graded:
    return Graded(make_course(CONFIG))


@pytest.fixture(scope="module")
def course(graded: Graded) -> Course:
    return graded.course


@pytest.mark.parametrize("student", STUDENTS)
def test_scores(graded: Graded, student: str) -> None:
    assert graded.before[student] == STUDENTS[student][2], graded.course.result(student).cells


def test_what_students_cause_does_not_fail_the_command(graded: Graded) -> None:
    assert graded.done.code == 0, graded.done.log[-3000:]
    assert "Traceback" not in graded.done.log
    assert "once more" not in graded.done.log


@pytest.mark.parametrize("student", ENDS)
def test_an_ended_kernel_leaves_an_error_in_every_cell_from_there(graded: Graded, student: str) -> None:
    ended, words = ENDS[student]
    result = graded.course.result(student)
    report = result.metadata["isolate"]
    assert (report["ended"], words in report["message"]) == (ended, True), report
    culprit = result.cells.index(find(result, "test_one" if student == "exits_in_test" else "two"))
    assert [errors(cell) for cell in result.cells[: culprit or 1]] == [[]] * culprit
    (said,) = errors(result.cells[culprit])
    assert words in said
    for cell in result.cells[culprit + 1 :]:
        (said,) = errors(cell)
        assert f"was not run, because of cell {culprit + 1}" in said
        assert words in said
    assert f"Notebook 'p1' of student '{student}' ended: {ended}" in graded.done.log


def test_the_report_is_in_the_notebook_and_not_the_students(graded: Graded) -> None:
    report = graded.course.result("metadata").metadata["isolate"]
    assert report["ended"] == "finished"
    assert report["tier"] == "namespaces"
    assert len(report["layers"]) > 5
    assert "forged" not in report["layers"]
    assert "wall_seconds" not in report  # the same submission gives the same file twice
    assert "cells" not in report


def test_every_code_cell_was_executed_in_order(graded: Graded) -> None:
    for student in ("honest", "skip_right", "metadata_right"):
        counts = [cell.execution_count for cell in graded.course.result(student).cells]
        assert counts == list(range(1, len(counts) + 1))


def test_modes_are_those_of_stock_nbgrader(graded: Graded) -> None:
    directory = graded.course.autograded("honest")
    assert [path.name for path in directory.iterdir()] == ["p1.ipynb"]
    assert stat.S_IMODE((directory / "p1.ipynb").stat().st_mode) == 0o444
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o777 & ~umask
    assert not list((graded.course.root / "autograded").rglob(".*"))


def test_nobody_but_the_grader_left_something_in_the_course_or_home(graded: Graded) -> None:
    assert {path.name for path in graded.course.root.iterdir()} <= {
        "source", "release", "submitted", "autograded", "gradebook.db", "nbgrader_config.py", ".locks",
    }  # fmt: skip
    assert not list((graded.course.root / ".locks").iterdir())
    assert not (graded.course.home / ".ipython/profile_default").exists()  # where a kernel would have run


# --- with other settings


@pytest.fixture(scope="module")
def probe(course: Course) -> Callable[..., tuple[dict[str, Any], dict[str, Any]]]:
    """Submit code for the first cell, grade it with these settings; the answer, and what the code printed as JSON."""
    numbers = iter(range(1000))

    def run(source: str, changes: dict[str, Any] | None = None, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        student = f"probe{next(numbers)}"
        course.submit(student, answers={**RIGHT, "one": f"one = 1\n{source}"}, **more)
        answered = course.click(student, changes=changes)
        if not answered["success"]:
            return answered, {}
        cell = find(course.result(student), "one")
        text = printed(cell)
        answered["scores"] = course.scores(student)
        answered["notebook"] = course.result(student)
        return answered, json.loads(text.splitlines()[-1]) if text else {"errors": errors(cell)}

    return run


Probe = Callable[..., tuple[dict[str, Any], dict[str, Any]]]
SAY_ENVIRONMENT = "import json, os\nprint(json.dumps(dict(os.environ)))"


def test_the_environment_is_a_list_of_names(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AALTO_JUPYTERHUB", "1")  # click() passes on what does not begin with JUPYTER
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    monkeypatch.setenv("SOME_PASSWORD", SECRET)
    changes = {"IsolatedExecute": {"environment_variables": {"COURSE_MODE": "exam"}}}
    _, said = probe(SAY_ENVIRONMENT, changes)
    assert said["AALTO_JUPYTERHUB"] == "1"
    assert said["LC_ALL"] == "C.UTF-8"
    assert said["NBGRADER_EXECUTION"] == "autograde"
    assert said["COURSE_MODE"] == "exam"
    assert SECRET not in json.dumps(said)
    assert "JUPYTERHUB_API_TOKEN" not in said


def test_the_command_passes_on_the_same_variables(course: Course) -> None:
    course.submit("environment", answers={**RIGHT, "one": f"one = 1\n{SAY_ENVIRONMENT}"})
    done = course.nbgrader("autograde", "ps1", "--student=environment", JUPYTER_IMAGE_SPEC="image:1", SOME_TOKEN=SECRET)
    assert done.code == 0, done.log
    said = json.loads(printed(find(course.result("environment"), "one")))
    assert said["JUPYTER_IMAGE_SPEC"] == "image:1"
    assert said["NBGRADER_EXECUTION"] == "autograde"
    assert SECRET not in json.dumps(said)
    assert not {"JUPYTERHUB_API_TOKEN", "SOME_TOKEN", "PYTHONPATH"} & set(said)
    assert said["HOME"] != str(course.home)


def test_the_course_and_the_exchange_are_not_visible_even_below_something_visible(course: Course, probe: Probe) -> None:
    data = course.root / "data"
    data.mkdir(exist_ok=True)
    (data / "numbers.csv").write_text("1,2\n")
    beside = course.top / "beside.txt"
    beside.write_text("beside")
    (course.exchange / "somebody").mkdir(exist_ok=True)
    paths = [course.root / name for name in ("gradebook.db", "source", "submitted", "nbgrader_config.py")]
    paths += [course.exchange / "somebody", beside, data / "numbers.csv"]
    source = f"""
import json, os
def look(path):
    if os.path.isdir(path):
        return os.listdir(path)
    return open(path).read() if os.path.exists(path) else ""
print(json.dumps([look(path) for path in {[str(path) for path in paths]!r}]))
"""
    nothing = [""] * 7
    assert probe(source)[1] == nothing
    _, said = probe(source, {"IsolatedExecute": {"read_only": [str(course.top), str(data)]}})
    assert said == [*nothing[:5], "beside", "1,2\n"]
    _, said = probe(source, {"IsolatedExecute": {"read_only": [str(course.top)], "hidden": [str(beside)]}})
    assert said == nothing


def test_shared_data_can_be_read_and_not_written(course: Course, probe: Probe) -> None:
    data = course.top / "shared data ä"
    data.mkdir()
    (data / "numbers.csv").write_text("1,2\n")
    source = f"""
import json
data = open({str(data / "numbers.csv")!r}).read()
try:
    open({str(data / "new.txt")!r}, "w")
    wrote = "wrote"
except OSError as error:
    wrote = type(error).__name__
print(json.dumps([data, wrote]))
"""
    _, said = probe(source, {"IsolatedExecute": {"read_only": [str(data)]}})
    assert said[0] == "1,2\n"
    assert said[1] in {"OSError", "PermissionError"}
    assert [path.name for path in data.iterdir()] == ["numbers.csv"]


def test_timeouts(probe: Probe) -> None:
    """A cell that can be interrupted costs its points, one that cannot costs the rest; earlier cells keep theirs."""
    changes = {"Execute": {"timeout": 2}}
    answered, _ = probe("", changes, edit=lambda document: find(document, "two").update(source="while True: pass"))
    result = answered["notebook"]
    assert answered["scores"] == {**FULL, "test_two": 0}
    assert "CellTimeoutError" in "".join(errors(find(result, "two")))
    assert result.metadata["isolate"]["limits"] == ["timeout"]
    stubborn = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass"
    answered, _ = probe("", changes, edit=lambda document: find(document, "two").update(source=stubborn))
    result = answered["notebook"]
    assert answered["scores"] == {**NOTHING, "test_one": 2}
    assert "did not end within its timeout" in "".join(errors(find(result, "two")))
    assert "was not run" in "".join(errors(find(result, "test_two")))


def test_without_a_timeout_the_wall_limit_ends_it(probe: Probe) -> None:
    changes = {"Execute": {"timeout": None}, "IsolatedExecute": {"wall_seconds": 12.0}}
    answered, _ = probe("", changes, edit=lambda document: find(document, "two").update(source="while True: pass"))
    assert answered["scores"] == {**NOTHING, "test_one": 2}
    assert answered["notebook"].metadata["isolate"]["limits"] == ["wall"]
    assert "wall limit of 12 s" in "".join(errors(find(answered["notebook"], "test_last")))


def test_extra_arguments_of_the_kernel(probe: Probe) -> None:
    argument = "--IPKernelApp.code_to_run=given = 7"
    _, said = probe("import json\nprint(json.dumps(given))", {"Execute": {"extra_arguments": [argument]}})
    assert said == 7


@pytest.fixture
def special_kernel(course: Course, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("special", "evil"):
        directory = course.home / ".local/share/jupyter/kernels" / name
        directory.mkdir(parents=True, exist_ok=True)
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        spec = {"argv": argv, "display_name": name, "language": "python", "env": {"WHICH_KERNEL": name}}
        (directory / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(course.home / ".local/share/jupyter"))


@pytest.mark.usefixtures("special_kernel")
def test_the_kernel_is_the_instructors_choice(course: Course, probe: Probe) -> None:
    source = "import json, os\nprint(json.dumps(os.environ.get('WHICH_KERNEL', 'plain')))"
    assert probe(source, edit=notebook_metadata)[1] == "plain"
    assert probe(source, {"Execute": {"kernel_name": "special"}}, edit=notebook_metadata)[1] == "special"
    # a source that names no kernel leaves the student's name in the notebook
    course.add("nokernel", {"p1": ps1(kernel=None)})
    course.submit("evil", "nokernel", {**RIGHT, "one": f"one = 1\n{source}"}, notebook_metadata)
    assert course.click("evil", "nokernel")["success"]
    assert json.loads(printed(find(course.result("evil", "nokernel"), "one"))) == "plain"
    assert course.scores("evil", "nokernel") == FULL


def test_the_instructors_own_skip_counts(course: Course) -> None:
    """Two cells that the instructor skips: one graded, one without nbgrader's metadata."""
    tagged = {"tags": ["skip-execution"]}
    course.add(
        "skips",
        {
            "p1": notebook(
                answer("one"),
                code("raise ValueError('never run')", **tagged),
                check("test_skipped", "raise ValueError('never run')", 2, **tagged),
                check("test_one", "assert one == 1", 2),
            )
        },
    )

    def untag(document: NotebookNode) -> None:
        for cell in document.cells:
            cell.metadata.pop("tags", None)

    course.submit("right", "skips", RIGHT)
    course.submit("untagged", "skips", RIGHT, untag)
    course.submit("wrong", "skips", WRONG, tag_tests("skip-execution"))
    for student, points in {"right": 2, "untagged": 2, "wrong": 0}.items():
        assert course.click(student, "skips")["success"]
        # as in stock nbgrader, a test cell that the instructor lets skip has no error and full points
        assert course.scores(student, "skips") == {"test_skipped": 2, "test_one": points}
        assert [cell.execution_count for cell in course.result(student, "skips").cells] == [1, None, None, 2]


def plain_venv(directory: Path, *requirements: str) -> Path:
    """A venv with copies of these installed packages and what they need, and nothing else."""
    venv.create(directory, symlinks=True)
    (packages,) = directory.glob("lib/python3*/site-packages")
    waiting, seen = list(requirements), set()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        distribution = metadata.distribution(name)
        for file in distribution.files or []:
            if not str(file).startswith("..") and "__pycache__" not in file.parts:
                (packages / file).parent.mkdir(parents=True, exist_ok=True)
                (packages / file).write_bytes(Path(str(distribution.locate_file(file))).read_bytes())
        for line in distribution.requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return directory


def test_student_code_runs_in_the_environment_that_the_course_names(course: Course, probe: Probe) -> None:
    prefix = plain_venv(course.top / "student env", "ipykernel")
    source = """
import importlib.util, json, sys
names = ("nbgrader", "nbconvert", "sqlalchemy", "isolate")
print(json.dumps([sys.prefix, [name for name in names if importlib.util.find_spec(name)]]))
"""
    _, said = probe(source)
    assert said[0] == sys.prefix
    assert "nbgrader" in said[1]
    answered, said = probe(source, {"IsolatedExecute": {"environment": str(prefix)}})
    assert answered["success"], answered["log"][-3000:]
    assert said == [str(prefix), []]
    assert answered["scores"] == FULL


def test_a_plot_has_its_list_of_fonts_and_writes_nothing_to_stderr(course: Course, probe: Probe, cache: Path) -> None:
    pytest.importorskip("matplotlib")
    source = """
import json, os
import matplotlib.pyplot as plt
plt.plot([1, 2])
print(json.dumps(os.listdir(os.path.expanduser("~/.cache/matplotlib"))))
"""
    answered, said = probe(source)
    assert any(name.startswith("fontlist") for name in said)
    outputs = find(answered["notebook"], "one").outputs
    assert not [output for output in outputs if output.get("name") == "stderr"]
    cached = list((cache / "isolate").glob("fonts-*"))
    assert cached
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in cached)
    assert {path.name for path in (cache / "isolate").iterdir()} == {path.name for path in cached}


# --- faults of the host


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no_ipykernel": ({"environment": "{top}/bare"}, "No module named"),
    "no_environment": ({"environment": "{top}/nowhere"}, "does not exist"),
    "no_such_path": ({"read_only": ["{top}/nowhere"]}, "cannot be read"),
    "memory_is_no_size": ({"memory": "lots"}, "'lots' is not a size"),
    "memory_is_too_small": ({"memory": "8M"}, "it did not start"),
    "too_few_processes": ({"processes": 1}, "it did not start"),
    "no_seconds": ({"wall_seconds": 0.0}, "must be positive"),
    "relative_path": ({"read_only": ["data"]}, "absolute"),
    "no_such_kernel": ({"kernel_name": "nowhere"}, "no kernel named 'nowhere'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_host_is_no_score_and_keeps_what_was_there(course: Course, fault: str) -> None:
    if not (course.top / "bare").exists():
        venv.create(course.top / "bare", symlinks=True)
    settings, words = FAULTS[fault]
    changes = json.loads(json.dumps(settings).replace("{top}", str(course.top)))
    before, scores = contents(course.autograded("honest")), course.scores("honest")
    assert scores == FULL
    answered = course.click("honest", changes={"IsolatedExecute": changes})
    assert answered["success"] is False
    said = next(line for line in answered["log"].splitlines() if "No score" in line)
    assert "notebook 'p1' of assignment 'ps1' of student 'honest'" in said
    assert "not the student's fault" in said
    assert words in said
    lasting = words in {"cannot be read", "'lots' is not a size", "must be positive", "absolute"}
    assert answered["log"].count("once more") <= (0 if lasting else 1)
    assert contents(course.autograded("honest")) == before
    assert course.scores("honest") == scores
    assert not list(course.autograded("honest").parent.glob(".*"))


def test_one_notebook_by_name_keeps_its_earlier_result_after_a_fault(course: Course) -> None:
    before = contents(course.autograded("honest"))
    one = ("autograde", "ps1", "--student=honest", "--notebook=p1", "--force")
    done = course.nbgrader(*one, "--IsolatedExecute.memory=lots")
    assert done.code == 1
    assert contents(course.autograded("honest")) == before
    assert course.nbgrader(*one).code == 0
    assert course.scores("honest") == FULL


def test_a_student_without_an_earlier_result_has_none_after_a_fault(course: Course) -> None:
    course.submit("new", answers=RIGHT)
    assert course.click("new", changes={"IsolatedExecute": {"memory": "lots"}})["success"] is False
    assert not course.autograded("new").exists()
    assert set(course.scores("new").values()) <= {None}
    assert course.click("new")["success"]
    assert course.scores("new") == FULL


def test_the_command_grades_the_others_and_fails(course: Course) -> None:
    """One student's files are more than the sandbox takes (c.IsolatedExecute.files): nobody else is concerned."""
    course.submit("big1", answers=RIGHT)
    course.submit("big2", answers=RIGHT, files={"large.txt": "x" * 3_000_000})
    course.submit("big3", answers=RIGHT)
    done = course.nbgrader("autograde", "ps1", "--student=big*")
    assert done.code == 1
    assert [course.scores(student) for student in ("big1", "big3")] == [FULL, FULL]
    assert set(course.scores("big2").values()) <= {None}
    assert "student 'big2'" in done.log
    assert "files" in done.log
    assert "There was an error processing assignment 'ps1' for student 'big2'" in done.log
    assert not course.autograded("big2").exists()


# --- files


LOOK = """
import json, os
found = {}
for directory, _, names in os.walk("."):
    for name in names:
        path = os.path.relpath(os.path.join(directory, name), ".")
        found[path] = open(path).read()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def pair(course: Course) -> Course:
    """An assignment of two notebooks with support files."""
    documents = {name: notebook(answer(name), check(f"test_{name}", f"assert {name} == 1", 1)) for name in ("p1", "p2")}
    course.add("pair", documents, {"helper.py": "WHOSE = 'instructor'\n", "table.csv": "1\n"})
    return course


FIRST = (
    LOOK
    + """
open("written.txt", "w").write("by p1")
open("own.txt", "a").write("+")
os.mkdir("d")
open("d/deep.txt", "w").write("deep")
os.symlink("/etc/passwd", "link")
p1 = 1
"""
)
SECOND = 'import os\nif os.path.islink("link"):\n    os.remove("link")\n' + LOOK + "p2 = 1"


def submit_pair(course: Course, student: str) -> None:
    files = {"helper.py": "WHOSE = 'student'\n", "own.txt": "mine", "sub/ä.txt": "deep"}
    course.submit(student, "pair", {"p1": FIRST, "p2": SECOND}, files=files)


def test_a_notebook_finds_the_right_files_and_no_notebook(pair: Course) -> None:
    submit_pair(pair, "files")
    assert pair.click("files", "pair")["success"]
    assert pair.scores("files", "pair") == {"test_p1": 1, "test_p2": 1}
    first = json.loads(printed(pair.result("files", "pair", "p1").cells[0]))
    assert first == {"helper.py": "WHOSE = 'instructor'\n", "table.csv": "1\n", "own.txt": "mine", "sub/ä.txt": "deep"}
    second = json.loads(printed(pair.result("files", "pair", "p2").cells[0]))
    assert second == {**first, "written.txt": "by p1", "own.txt": "mine+", "d/deep.txt": "deep"}


def test_what_was_written_is_not_left_in_the_result(pair: Course) -> None:
    submit_pair(pair, "leaves")
    assert pair.click("leaves", "pair")["success"]
    found = {
        str(path.relative_to(pair.autograded("leaves", "pair")))
        for path in pair.autograded("leaves", "pair").rglob("*")
    }
    assert found == {"p1.ipynb", "p2.ipynb", "helper.py", "table.csv", "own.txt", "sub", "sub/ä.txt"}
    assert (pair.autograded("leaves", "pair") / "own.txt").read_text() == "mine"


def test_what_was_written_can_be_kept(pair: Course) -> None:
    submit_pair(pair, "keeps")
    assert pair.click("keeps", "pair", changes={"IsolatedExecute": {"keep_files": True}})["success"]
    kept = pair.autograded("keeps", "pair") / "p1_written"
    assert {str(path.relative_to(kept)): path.read_text() for path in kept.rglob("*") if path.is_file()} == {
        "written.txt": "by p1",
        "own.txt": "mine+",
        "d/deep.txt": "deep",
    }
    assert not (pair.autograded("keeps", "pair") / "p2_written").exists()  # it wrote nothing
    assert not any(path.is_symlink() for path in kept.rglob("*"))
    # a second time: what was kept is neither a file of the submission nor in the way
    assert pair.click("keeps", "pair", changes={"IsolatedExecute": {"keep_files": True}})["success"]
    assert "p1_written" not in printed(pair.result("keeps", "pair", "p1").cells[0])


@pytest.mark.parametrize(("text", "points"), [("1e999", 0), ("inf", 0), ("3", 0), ("2.0", 2), ("1", 1), ("'fine'", 2)])
def test_a_result_above_the_points_of_its_cell_is_an_error_of_that_cell(text: str, points: float) -> None:
    """nbgrader itself would give up the whole notebook."""
    cell = new_code_cell("f()", outputs=[new_output("execute_result", {"text/plain": text})])
    cell.metadata["nbgrader"] = {"grade": True, "solution": False, "points": 2, "grade_id": "a", "schema_version": 3}
    let_failures_decide(cell)
    assert determine_grade(cell) == (points, 2)
