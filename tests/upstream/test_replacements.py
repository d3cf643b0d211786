"""What happens here where nbgrader's own tests want something else: see exceptions.toml.

Each test grades the very notebook that nbgrader's test uses, by the real `nbgrader autograde`.
"""

import dataclasses
import importlib.util
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from e2e.courses import Course, check, code, errors, notebook

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("upstream_replacements")]

SIDE_EFFECT = "side-effect.txt"


def nbgraders(name: str) -> NotebookNode:
    """A notebook that nbgrader's tests use, as the wheel ships it."""
    spec = importlib.util.find_spec("nbgrader")
    assert spec is not None
    assert spec.origin is not None
    return nbformat.read(Path(spec.origin).parent / "tests/apps/files" / name, as_version=4)


def names(directory: Path) -> set[str]:
    """Everything that lies below it."""
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Course:
    return Course(tmp_path_factory.mktemp("replacements"))


# --- test_side_effects: one notebook writes a file; stock nbgrader leaves it in autograded/


@dataclasses.dataclass(frozen=True)
class SideEffects:
    """The names of the files after a grading, and after another with `keep_files`."""

    course: Course
    autograded: set[str]
    submitted: set[str]
    kept: set[str]


@pytest.fixture(scope="module")
def side_effects(course: Course) -> SideEffects:
    seen = check("seen", f"assert open({SIDE_EFFECT!r}).read() == 'a side effect'", 1)
    course.add("ps1", {"p1": nbgraders("side-effects.ipynb"), "p2": notebook(seen)})
    submitted = course.submit("foo")
    first = course.nbgrader("autograde", "ps1")
    assert first.code == 0, first.log
    left = names(course.autograded("foo"))
    again = course.nbgrader("autograde", "ps1", "--force", "--IsolatedExecute.keep_files=True")
    assert again.code == 0, again.log
    return SideEffects(course, left, names(submitted), names(course.autograded("foo")))


def test_a_side_effect_is_seen_by_the_next_notebook(side_effects: SideEffects) -> None:
    assert side_effects.course.scores("foo") == {"seen": 1}


def test_a_side_effect_is_not_in_autograded_or_submitted(side_effects: SideEffects) -> None:
    assert side_effects.autograded == {"p1.ipynb", "p2.ipynb"}
    assert side_effects.submitted == {"p1.ipynb", "p2.ipynb"}


def test_a_side_effect_is_kept_beside_the_notebook_on_demand(side_effects: SideEffects) -> None:
    written = f"p1_written/{SIDE_EFFECT}"
    assert side_effects.kept == {"p1.ipynb", "p2.ipynb", "p1_written", written}
    assert (side_effects.course.autograded("foo") / written).read_text() == "a side effect"


# --- test_missing_source_kernelspec: stock nbgrader then takes the student's kernel, and fails if there is none


def test_a_source_without_a_kernel_is_graded_whatever_kernel_the_student_names(course: Course) -> None:
    cell = check("ran", "import sys\nassert 'ipykernel' in sys.modules", 1)
    course.add("kernel", {"p1": notebook(cell, kernel=None)})
    for student, name in (("foo", "python"), ("bar", "blarg"), ("baz", None)):
        named = notebook(kernel=name).metadata
        course.submit(student, "kernel", edit=lambda document, named=named: document.update(metadata=named))
    done = course.nbgrader("autograde", "kernel")
    assert done.code == 0, done.log
    for student in ("foo", "bar", "baz"):
        assert course.scores(student, "kernel") == {"ran": 1}


# --- test_infinite_loop_with_output: nbgrader skips it, because the loop fills the memory of the machine


def test_a_loop_that_fills_the_memory_ends_in_its_own_cell(course: Course) -> None:
    loop = nbgraders("infinite-loop-with-output.ipynb").cells[0].source
    course.add("memory", {"p1": notebook(code(loop), check("after", "pass", 1))})
    course.submit("foo", "memory")
    course.submit("bar", "memory", edit=lambda document: document.cells[0].update(source="x = 1"))
    done = course.nbgrader("autograde", "memory", "--IsolatedExecute.memory=300M")
    assert done.code == 0, done.log
    result = course.result("foo", "memory")
    assert errors(result.cells[0])
    assert result.metadata["isolate"]["limits"] == ["memory"]
    assert course.scores("bar", "memory") == {"after": 1}
