"""The documentation held true: a setting without a line in the reference, or a line without a setting, fails."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from nbgrader.preprocessors import Execute

from isolate.policy import LANDLOCK_GAPS
from nbgrader_aalto.converters import CarefulExporter
from nbgrader_aalto.exchange import AaltoExchange
from nbgrader_aalto.execute import IsolatedExecute
from nbgrader_aalto.intake import IntakeExporter

ROOT = Path(__file__).parent.parent
REFERENCE = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")


def section(title: str) -> set[str]:
    """The names in the first column of the table below a heading."""
    text = REFERENCE.split(f"\n## {title}", 1)[1].split("\n## ", 1)[0]
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def own_settings(cls: Any, base: Any = None) -> set[str]:
    inherited = set(base.class_traits(config=True)) if base else set()
    return set(cls.class_traits(config=True)) - inherited


def test_every_setting_of_the_sandbox_is_documented() -> None:
    assert section("The sandbox: `c.IsolatedExecute`") == own_settings(IsolatedExecute, Execute)


def test_every_setting_of_execute_is_explained() -> None:
    explained = section("nbgrader's own: `c.Execute`")
    assert set(Execute.class_traits(config=True)) <= explained <= set(Execute.class_traits())


def test_every_setting_of_intake_is_documented() -> None:
    names = set(IntakeExporter.class_own_traits(config=True))
    assert section("Submissions: `c.IntakeExporter`") == names


def test_every_setting_of_the_converters_is_documented() -> None:
    assert section("Converters: `c.CarefulExporter`") == set(CarefulExporter.class_own_traits(config=True))


def test_every_setting_of_the_exchange_is_documented() -> None:
    names = set(AaltoExchange.class_own_traits(config=True))
    assert section("The exchange: `c.AaltoExchange`") == names


@pytest.mark.parametrize("trait", ["memory", "files_count", "processes", "wall_seconds", "keep_files", "output"])
def test_defaults_in_the_reference_are_the_defaults(trait: str) -> None:
    row = next(line for line in REFERENCE.splitlines() if line.startswith(f"| `{trait}`"))
    value = IsolatedExecute.class_traits()[trait].default_value
    shown = f'"{value}"' if isinstance(value, str) else str(value)
    assert f"`{shown}`" in row.split("|")[2]


def test_the_gaps_of_the_landlock_tier_are_in_the_threat_model() -> None:
    text = (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")
    listed = text.split("<!-- LANDLOCK_GAPS", 1)[1].split("-->\n", 1)[1].split("\n\n", 1)[0]
    assert tuple(line.removeprefix("- ") for line in listed.strip().splitlines()) == LANDLOCK_GAPS


def test_imports_go_downwards() -> None:
    order = ["isolate", "grader_service", "nbgrader_aalto"]
    for rank, package in enumerate(order):
        for path in (ROOT / package).rglob("*.py"):
            imported = set(re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
            assert not imported & set(order[rank + 1 :]), path
            if package == "isolate":
                assert "nbgrader" not in imported, path


def test_only_one_module_knows_ctypes() -> None:
    for path in (ROOT / "isolate").glob("*.py"):
        if path.name != "syscalls.py":
            assert "ctypes" not in re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.MULTILINE), path


def test_what_enters_a_room_imports_the_standard_library_alone() -> None:
    for name in "syscalls room base launcher confined cgroups sampler sockets landlock workdir probes".split():
        text = (ROOT / "isolate" / f"{name}.py").read_text(encoding="utf-8")
        imported = set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)) - {"isolate"}
        assert imported <= set(sys.stdlib_module_names), name


def test_help_of_the_command_teaches() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "isolate.cli", "run", "--help"], capture_output=True, text=True, check=True
    )
    assert all(word in done.stdout for word in ("--ro", "--rw", "--memory", "exit code", "124", "125", "examples"))
