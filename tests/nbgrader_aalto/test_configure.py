"""configure(c): what it sets and leaves alone; and that no configuration gets student code past the sandbox unseen.

In the runs of the real command, the student's notebook writes a file on the host if it can.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbgrader.preprocessors
import pytest
from nbconvert.preprocessors import ExecutePreprocessor
from nbgrader.converters import Autograde
from traitlets.config import Config
from traitlets.config.loader import PyFileConfigLoader

from e2e.courses import SAFE, Course, answer, check, contents, notebook
from nbgrader_aalto import configure
from nbgrader_aalto.configure import EXCHANGE, GENERATING, INTAKE_EXPORTER, ISOLATED_EXECUTE, REFUSE_TO_RUN, isolated
from nbgrader_aalto.execute import IsolatedExecute
from nbgrader_aalto.intake import IntakeExporter

pytestmark = pytest.mark.xdist_group("configure")

STOCK = list(Autograde.autograde_preprocessors.default())
EXECUTE = "nbgrader.preprocessors.Execute"


class OwnPreprocessor(nbgrader.preprocessors.ClearOutput):
    """What a course may have added."""


class OwnIsolated(IsolatedExecute):
    """A course's own subclass of the safe class."""


class OwnExecute(nbgrader.preprocessors.Execute):
    """A course's own subclass of the unsafe class."""


class OwnIntake(IntakeExporter):
    """A course's own subclass of the exporter."""


def own_function(nb: Any, resources: Any) -> tuple[Any, Any]:
    return nb, resources


def read(text: str, directory: Path) -> Config:
    """The configuration that a file with this text makes."""
    (directory / "nbgrader_config.py").write_text(f"c = get_config()\n{text}\n")
    return PyFileConfigLoader("nbgrader_config.py", path=str(directory)).load_config()


def is_refused(config: Config) -> bool:
    assert config.Autograde.autograde_preprocessors == [REFUSE_TO_RUN] or "reason" not in config.RefuseToRun
    return bool(config.Autograde.autograde_preprocessors == [REFUSE_TO_RUN])


def test_without_settings_only_execute_is_replaced_and_the_intake_added() -> None:
    config = Config()
    configure(config)
    assert config == {
        "Autograde": {
            "autograde_preprocessors": [ISOLATED_EXECUTE, *STOCK[1:]],
            "exporter_class": INTAKE_EXPORTER,
        },
        "ExchangeFactory": EXCHANGE,
        **{converter: {"exporter_class": exporter} for converter, exporter in GENERATING.items()},
    }


def test_an_exchange_that_the_course_chose_stays_whole() -> None:
    config = Config()
    config.ExchangeFactory.submit = "ngshare_exchange.ExchangeSubmit"
    configure(config)
    assert config.ExchangeFactory == {"submit": "ngshare_exchange.ExchangeSubmit"}


def test_all_other_settings_stay_as_they_were(tmp_path: Path) -> None:
    config = read(
        """
c.CourseDirectory.course_id = "a"
c.Execute.timeout = 17
c.Execute.extra_arguments.append("--x")
c.Autograde.create_student = False
c.Autograde.sanitize_preprocessors.append("m.C")
c.IsolatedExecute.memory = "1G"
c.Exchange.root = "/srv/x"
c.ClearSolutions.code_stub = {"python": "pass"}
""",
        tmp_path,
    )
    before = copy.deepcopy(config)
    configure(config)
    assert set(config.Autograde) == {
        "create_student", "sanitize_preprocessors", "autograde_preprocessors", "exporter_class",
    }  # fmt: skip
    del config.Autograde["autograde_preprocessors"], config.Autograde["exporter_class"]
    for ours in ("ExchangeFactory", *GENERATING):
        del config[ours]
    assert repr(config) == repr(before)


@pytest.mark.parametrize(
    ("own", "after"),
    [
        ([nbgrader.preprocessors.Execute, OwnPreprocessor], [ISOLATED_EXECUTE, OwnPreprocessor]),
        ([EXECUTE, "m.NotThere"], None),
        (
            [OwnPreprocessor, "nbgrader.preprocessors.execute.Execute", "nbgrader.preprocessors.SaveAutoGrades"],
            [OwnPreprocessor, ISOLATED_EXECUTE, "nbgrader.preprocessors.SaveAutoGrades"],
        ),
        ([EXECUTE, own_function, EXECUTE], [ISOLATED_EXECUTE, own_function, ISOLATED_EXECUTE]),
        ([OwnIsolated, OwnPreprocessor], [OwnIsolated, OwnPreprocessor]),
        ([ISOLATED_EXECUTE], [ISOLATED_EXECUTE]),
        ((EXECUTE,), [ISOLATED_EXECUTE]),
        ([OwnExecute], None),
        ([nbgrader.preprocessors.Execute()], None),
        ([ISOLATED_EXECUTE, ExecutePreprocessor], None),
        ([ISOLATED_EXECUTE, "nbconvert.preprocessors.ExecutePreprocessor"], None),
        (17, None),
    ],
)
def test_a_courses_own_list_keeps_everything_but_execute(own: Any, after: list[Any] | None) -> None:
    """None: nothing may be autograded with such a list."""
    config = Config(Autograde={"autograde_preprocessors": own})
    configure(config)
    assert is_refused(config) is (after is None)
    if after is not None:
        assert config.Autograde.autograde_preprocessors == after


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("c.Autograde.autograde_preprocessors.append('m.C')", [ISOLATED_EXECUTE, *STOCK[1:], "m.C"]),
        ("c.Autograde.autograde_preprocessors.insert(1, 'm.C')", [ISOLATED_EXECUTE, "m.C", *STOCK[1:]]),
        ("c.Autograde.autograde_preprocessors.extend(['m.C', 'm.D'])", [ISOLATED_EXECUTE, *STOCK[1:], "m.C", "m.D"]),
        ("c.Autograde.autograde_preprocessors.prepend(['m.C'])", ["m.C", ISOLATED_EXECUTE, *STOCK[1:]]),
    ],
)
def test_a_change_of_nbgraders_list_is_carried_out(line: str, expected: list[Any], tmp_path: Path) -> None:
    own = f"{__name__}.OwnPreprocessor"
    config = read(line.replace("m.C", own).replace("m.D", own), tmp_path)
    configure(config)
    assert config.Autograde.autograde_preprocessors == [own if entry in {"m.C", "m.D"} else entry for entry in expected]


def test_calling_it_twice_is_calling_it_once() -> None:
    config = Config(Autograde={"autograde_preprocessors": [EXECUTE, OwnPreprocessor], "exporter_class": OwnIntake})
    configure(config)
    once = copy.deepcopy(config)
    configure(config)
    assert config == once
    assert config.Autograde.exporter_class is OwnIntake


def test_a_second_call_does_not_undo_a_refusal() -> None:
    config = Config(Autograde={"autograde_preprocessors": [OwnExecute]})
    configure(config)
    reason = config.RefuseToRun.reason
    configure(config)
    assert is_refused(config)
    assert config.RefuseToRun.reason == reason
    assert f"{__name__}.OwnExecute" in reason


@pytest.mark.parametrize("exporter", ["nbconvert.exporters.NotebookExporter", "m.NotThere", own_function])
def test_an_exporter_that_is_not_the_intake_is_refused(exporter: Any) -> None:
    config = Config(Autograde={"exporter_class": exporter})
    configure(config)
    assert is_refused(config)


def test_no_list_is_isolated_that_was_not_looked_at() -> None:
    assert isolated(STOCK) == [ISOLATED_EXECUTE, *STOCK[1:]]
    assert isolated(isolated(STOCK)) == isolated(STOCK)


# --- the real command, with a student whose code writes a file on the host if it can


OWN_EXECUTE = """
from nbgrader.preprocessors import Execute
class Mine(Execute):
    pass
"""
OWN_EXPORTER = """
from nbconvert.exporters import NotebookExporter
class Mine(NotebookExporter):
    pass
"""
UNSAFE = {
    "own_execute": (
        OWN_EXECUTE + "c.Autograde.autograde_preprocessors = [Mine, 'nbgrader.preprocessors.SaveAutoGrades']\n" + SAFE,
        "c.Autograde.autograde_preprocessors holds",
    ),
    "nbconvert_execute": (
        "c.Autograde.autograde_preprocessors.append('nbconvert.preprocessors.ExecutePreprocessor')\n" + SAFE,
        "c.Autograde.autograde_preprocessors holds nbconvert",
    ),
    "own_exporter": (OWN_EXPORTER + "c.Autograde.exporter_class = Mine\n" + SAFE, "c.Autograde.exporter_class is"),
    "back_after_it": (
        SAFE + f"c.Autograde.autograde_preprocessors = [{EXECUTE!r}, 'nbgrader.preprocessors.SaveAutoGrades']\n",
        "c.Autograde.autograde_preprocessors holds nbgrader's own Execute",
    ),
    "sanitize": (
        SAFE + f"c.Autograde.sanitize_preprocessors.append({EXECUTE!r})\n",
        "c.Autograde.sanitize_preprocessors holds nbgrader's own Execute",
    ),
}


@pytest.fixture(scope="module")
def course(make_course: Callable[..., Course]) -> Course:
    made = make_course()
    made.add("ps1", {"p1": notebook(answer("one"), check("test_one", "assert one == 1", 2))})
    made.submit("ann", answers={"one": f"one = 1\nopen({str(made.top / 'canary')!r}, 'w').write('ran outside')"})
    return made


@pytest.fixture
def canary(course: Course) -> Iterator[Path]:
    yield course.top / "canary"
    (course.top / "canary").unlink(missing_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", UNSAFE)
def test_student_code_does_not_run_outside_whatever_the_configuration(course: Course, canary: Path, name: str) -> None:
    config, words = UNSAFE[name]
    course.configure(config, end="")
    done = course.nbgrader("autograde", "ps1")
    assert not canary.exists(), done.log
    assert done.code == 1
    assert words in done.log
    assert set(course.scores("ann").values()) <= {None}
    assert not course.autograded("ann").exists()


@pytest.mark.slow
def test_the_bolt_refuses_too(course: Course, canary: Path) -> None:
    for config, words in UNSAFE.values():
        course.configure(config, end="")
        answer = course.click("ann")
        assert not canary.exists(), words
        assert answer["success"] is False
        assert words in answer["error"] + answer["log"]


@pytest.mark.slow
def test_settings_on_the_command_line_do_not_lead_outside(course: Course, canary: Path) -> None:
    course.configure("")
    done = course.nbgrader("autograde", "ps1", f"--Autograde.autograde_preprocessors={EXECUTE}")
    assert not canary.exists(), done.log
    assert done.code == 1
    assert "holds nbgrader's own Execute" in done.log


@pytest.mark.slow
def test_stock_nbgrader_runs_it_outside_and_with_the_two_lines_it_runs_inside(course: Course, canary: Path) -> None:
    """The control: the canary can sing."""
    course.configure("", end="")
    assert course.nbgrader("autograde", "ps1").code == 0
    assert canary.exists()
    canary.unlink()
    course.configure("")
    done = course.nbgrader("autograde", "ps1", "--force")
    assert done.code == 0, done.log
    assert not canary.exists()
    assert course.scores("ann") == {"test_one": 2}
    assert course.result("ann").metadata["isolate"]["layers"]


@pytest.mark.slow
def test_a_refused_configuration_costs_no_earlier_result(course: Course, canary: Path) -> None:
    course.configure("")
    assert course.click("ann")["success"]
    before = contents(course.autograded("ann"))
    assert before
    for name in ("own_execute", "own_exporter", "back_after_it"):
        course.configure(UNSAFE[name][0], end="")
        assert course.click("ann")["success"] is False
        assert contents(course.autograded("ann")) == before, name
        assert course.scores("ann") == {"test_one": 2}
    assert not canary.exists()
