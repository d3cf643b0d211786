"""What is imported before kernels start, when nothing is, and that nobody can tell from the results."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import NotebookNode

from e2e.courses import REPOSITORY, Course, answer, check, code, notebook
from nbgrader_aalto.preimports import preimports

pytestmark = pytest.mark.xdist_group("preimports")

EXAMPLE = REPOSITORY / "examples/course"


def source(directory: Path, *cells: str) -> Path:
    """An assignment's directory with one notebook of these cells, and prose that looks like code."""
    document = notebook(nbformat.v4.new_markdown_cell("import prose  # sys.modules"), *map(code, cells))
    nbformat.write(document, directory / "p1.ipynb")
    return directory


def test_what_the_notebooks_import_at_the_top_level(tmp_path: Path) -> None:
    source(
        tmp_path,
        "%matplotlib inline\n!pip list\nimport numpy as np, pandas\nfrom matplotlib import pyplot as plt",
        "import numpy\nfrom os.path import *\nfrom . import here\nfrom .here import there",
        "import helpers, data.more\nfrom helpers import thing",
        "def f():\n    import inside\nif True:\n    import inside\n",
        "this is no Python\nimport lost",
    )
    (tmp_path / "helpers.py").write_text("import only_for_helpers")
    (tmp_path / "data").mkdir()
    (tmp_path / "p2.ipynb").write_text((tmp_path / "p1.ipynb").read_text().replace("import numpy", "import scipy"))
    found = ("numpy", "pandas", "matplotlib", "matplotlib.pyplot", "os.path", "scipy")
    assert preimports(tmp_path, None) == found
    assert preimports(tmp_path, ["chosen", "helpers"]) == ("chosen", "helpers")


@pytest.mark.parametrize(
    "looks",
    [
        "assert 'numpy' not in sys.modules",
        "from sys import modules as loaded",
        "getattr(sys, 'modules')",
        "sys.meta_path.insert(0, Forbid())",
    ],
)
def test_nothing_where_the_instructor_looks_at_the_modules(tmp_path: Path, looks: str) -> None:
    for directory in ("in the notebook", "beside it"):
        (tmp_path / directory).mkdir()
    one = source(tmp_path / "in the notebook", "import numpy", looks)
    other = source(tmp_path / "beside it", "import numpy")
    assert preimports(other, None) == ("numpy",)
    (other / "testing").mkdir()
    (other / "testing" / "rules.py").write_text(looks)
    for wanted in (None, ["numpy"]):
        assert preimports(one, wanted) == preimports(other, wanted) == ()


def test_nothing_without_a_notebook_that_can_be_read(tmp_path: Path) -> None:
    for wanted in (None, ["numpy"]):
        assert preimports(None, wanted) == preimports(tmp_path, wanted) == ()
    source(tmp_path, "import numpy")
    (tmp_path / "p2.ipynb").write_text("{")
    assert preimports(tmp_path, ["numpy"]) == ()


# --- through nbgrader


def graded(course: Course, assignment: str, **settings: Any) -> list[str]:
    """Autograde everybody, as often as wanted; how the kernels were started."""
    reports = course.top / "reports"
    reports.unlink(missing_ok=True)
    done = course.click("*", assignment, changes={"IsolatedExecute": {"report_file": str(reports), **settings}})
    assert done["success"], done
    return [json.loads(line)["start"] for line in reports.read_text().splitlines()]


@pytest.mark.slow
def test_a_test_that_forbids_a_package_holds_and_others_find_theirs(make_course: Callable[..., Course]) -> None:
    course = make_course()
    loaded = "import sys; one = 'statistics' in sys.modules"  # a small one that no kernel needs
    imports = {"p2": notebook(code("import statistics")), "p3": notebook(answer("three"))}
    forbids = "import sys; assert 'statistics' not in sys.modules"
    course.add("finds", {"p1": notebook(answer("one"), check("test_one", "assert one", 1)), **imports})
    course.add("forbids", {"p1": notebook(answer("one"), check("test_one", forbids, 1)), **imports})
    for assignment in ("finds", "forbids"):
        course.submit("anna", assignment, {"one": loaded})
        assert graded(course, assignment) == ["warm"] * 3
        assert course.scores("anna", assignment) == {"test_one": 1}
    assert graded(course, "finds", warm_imports=["json"]) == ["warm"] * 3
    assert course.scores("anna", "finds") == {"test_one": 0}


@pytest.mark.slow
def test_the_example_course_gets_the_same_warm_and_cold(make_course: Callable[..., Course]) -> None:
    """numpy, pandas and a figure: outputs, execution counts, scores and the files beside the notebook."""
    course = make_course("c.Execute.timeout = 60\n")
    shutil.copytree(EXAMPLE / "source" / "ps2", course.root / "source" / "ps2")
    course.generate("ps2")
    answers = _answers()
    for student, given in {"right": answers.RIGHT, "also": answers.ALSO_RIGHT, "half": answers.HALF}.items():
        course.submit(student, "ps2", given["ps2/weather"])
    found = []
    for warm in (False, True):
        assert graded(course, "ps2", warm=warm) == (["warm"] if warm else ["cold"]) * 3
        students = ("right", "also", "half")
        found.append({student: (course.scores(student, "ps2"), _outputs(course, student)) for student in students})
    assert found[0]["right"][0]["test_plot"] == 3
    assert found[0] == found[1]


def _answers() -> Any:
    spec = importlib.util.spec_from_file_location("answers", EXAMPLE / "answers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _outputs(course: Course, student: str) -> list[Any]:
    document: NotebookNode = course.result(student, "ps2", "weather")
    assert any("image/png" in output.get("data", {}) for cell in document.cells for output in cell.get("outputs", []))
    return [[cell.get("execution_count"), cell.get("outputs")] for cell in document.cells]
