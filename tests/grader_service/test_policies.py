"""What a course's jobs run in, and what a client may ask for: on the host, and in an image, as root and as a user."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import images
from attacks.harness import Person, Stage
from grader_service.policies import Asked, Refused, limits_of, plan
from grader_service.settings import CourseSettings, GradersTable, LimitsTable
from images import CHANGED, CHANGED_VERSION, PACKAGE, PREFIX
from isolate.policy import GIB, Limits, SandboxError


def course(environment: Path = Path("/usr"), **settings: Any) -> CourseSettings:
    return CourseSettings(environment=environment, graders=GradersTable(users=["teacher"]), **settings)


COURSE = course(
    limits=LimitsTable(memory_bytes=GIB, wall_seconds=60), maximum=LimitsTable(memory_bytes=2 * GIB, processes=200)
)


def test_limits_of_who_asks_for_nothing() -> None:
    assert limits_of(COURSE, Asked()) == Limits(memory_bytes=GIB, wall_seconds=60)


def test_less_and_up_to_the_maximum_may_be_asked_for() -> None:
    asked = Asked(limits={"memory_bytes": 2.0 * GIB, "wall_seconds": 1, "processes": 1})
    limits = limits_of(COURSE, asked)
    assert limits == Limits(memory_bytes=2 * GIB, wall_seconds=1, processes=1)
    assert (type(limits.memory_bytes), type(limits.wall_seconds)) == (int, float)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("memory_bytes", 2 * GIB + 1, ["memory_bytes", "2147483649", "2147483648"]),
        ("wall_seconds", 60.5, ["wall_seconds", "60.5", "maximum of 60"]),
        ("wall_seconds", math.inf, ["wall_seconds", "positive"]),
        ("wall_seconds", math.nan, ["wall_seconds", "positive"]),
        ("wall_seconds", 0, ["wall_seconds", "positive"]),
        ("processes", -1, ["processes", "positive"]),
        ("processes", 1.5, ["processes", "whole"]),
        ("processes", 0.5, ["processes", "whole"]),
        ("processes", True, ["processes", "positive"]),
        ("processes", "1", ["processes", "positive"]),
        ("open_files", 513, ["open_files", "513", "512"]),
        ("network", 1, ["network", "memory_bytes"]),
        ("x" * 10_000, 1, ["'xxx"]),
    ],
)
def test_more_is_refused_with_the_numbers(name: str, value: Any, words: list[str]) -> None:
    with pytest.raises(Refused) as caught:
        limits_of(COURSE, Asked(limits={name: value}))
    assert all(word in str(caught.value) for word in words), caught.value
    assert len(str(caught.value)) < 400


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """An environment by its looks, with a kernel for another language."""
    binaries = tmp_path / "env" / "bin"
    (tmp_path / "env/lib/python3.11").mkdir(parents=True)
    binaries.mkdir()
    for name in ("python3", "calc"):
        (binaries / name).touch()
    argv = ["calc", "--boot", "{resource_dir}/boot", "{connection_file}"]
    images.write_spec(tmp_path / "env", "calc", argv=argv, env={"A": "1"}, interrupt_mode="message")
    return tmp_path / "env"


def test_a_kernel_of_the_environment(prefix: Path) -> None:
    kernel, policy = plan("a", course(prefix, environment_variables={"B": "2"}), Asked("calc"))
    boot = f"{prefix}/share/jupyter/kernels/calc/boot"
    assert list(kernel.argv) == [f"{prefix}/bin/calc", "--boot", boot, "{connection_file}"]
    assert (kernel.environment, kernel.interrupt_mode) == ({"A": "1"}, "message")
    assert policy.environment["B"] == "2"
    assert policy.environment["PATH"].split(":")[0] == f"{prefix}/bin"
    assert prefix in [bind.target for bind in policy.read_only]
    assert policy.limits == Limits()


@pytest.mark.parametrize("name", ["python3", "python"])
def test_python_is_the_environments(prefix: Path, name: str) -> None:
    kernel, _ = plan("a", course(prefix), Asked(name))
    assert kernel.argv[0] == f"{prefix}/bin/python3"
    assert "ipykernel_launcher" in kernel.argv


def test_a_kernel_of_the_administrators(prefix: Path) -> None:
    settings = course(prefix, kernels={"calc": ["calc", "{connection_file}"], "python3": ["python", "-V"]})
    assert list(plan("a", settings, Asked("calc"))[0].argv) == [f"{prefix}/bin/calc", "{connection_file}"]
    assert list(plan("a", settings, Asked())[0].argv) == [f"{prefix}/bin/python3", "-V"]


@pytest.mark.parametrize("name", ["none", "", "../calc", "/usr/bin/python3", "calc/../calc", "calc\0", "x" * 10_000])
def test_there_is_no_such_kernel(prefix: Path, name: str) -> None:
    with pytest.raises(Refused, match="course a; there are: calc, extra, python3") as caught:
        plan("a", course(prefix, kernels={"extra": ["calc"]}), Asked(name))
    assert str(prefix) not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_what_a_course_shows_besides(prefix: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    _, policy = plan("a", course(prefix, read_only=[tmp_path / "data"], tier="landlock"), Asked())
    assert (tmp_path / "data", tmp_path / "data") in [(bind.source, bind.target) for bind in policy.read_only]
    assert policy.tier == "landlock"


def test_an_environment_that_is_gone_is_nobodys_fault(prefix: Path) -> None:
    settings = course(prefix)
    shutil.rmtree(prefix)
    with pytest.raises(SandboxError) as caught:
        plan("a", settings, Asked())
    assert caught.value.layer == "environment"
    with pytest.raises(SandboxError):
        plan("a", course(prefix, image_root=prefix), Asked())


@pytest.fixture(scope="session")
def image(stage: Stage) -> Path:
    return images.course_image(stage)


def test_paths_in_an_image(image: Path, tmp_path: Path) -> None:
    copy = tmp_path / "image"
    shutil.copytree(image, copy, symlinks=True, copy_function=os.link)
    (copy / "srv/data").mkdir(parents=True)
    (copy / "srv/link").symlink_to("/data/of the image")
    (copy / "data/of the image").mkdir(parents=True)
    (tmp_path / "coursedata").mkdir()
    shown = [copy / "srv/data", copy / "srv/link", tmp_path / "coursedata"]
    kernel, policy = plan("a", course(PREFIX, image_root=copy, read_only=shown), Asked("greeting"))
    places = {bind.target: bind.source for bind in policy.read_only}
    assert places[Path("/srv/data")] == copy / "srv/data"
    assert places[Path("/srv/link")] == places[Path("/data/of the image")] == copy / "data/of the image"
    assert places[tmp_path / "coursedata"] == tmp_path / "coursedata"
    assert all(source.is_relative_to(copy) for target, source in places.items() if target != tmp_path / "coursedata")
    assert kernel.argv[0] == str(PREFIX / "bin/python")
    assert kernel.environment == {"GREETING": "from a kernelspec of the image"}
    (copy / "srv/link").unlink()
    with pytest.raises(SandboxError, match="/srv/link"):
        plan("a", course(PREFIX, image_root=copy, read_only=shown), Asked())


_RUN = """
import dataclasses, json, sys
import nbformat
from grader_service.policies import Asked, plan
from grader_service.settings import CourseSettings
from isolate.notebook import execute

job = json.load(sys.stdin)
notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in job["cells"]])
kernel, policy = plan("a", CourseSettings(**job["course"]), Asked(**job["asked"]))
execution = execute(notebook, kernel, policy)
outputs = [cell.outputs for cell in execution.notebook.cells]
print(json.dumps({"outputs": outputs, "report": execution.report.as_dict()}))
"""

Run = Callable[..., list[Any]]


@pytest.fixture
def run(stage: Stage, person: Person, request: pytest.FixtureRequest) -> Iterator[Run]:
    """Execute cells as a job of a course, the service being this person's; the outputs of each cell."""
    packages = images.service_packages(stage)
    directory = stage.directory / "policies" / f"{os.getpid()}-{abs(hash(request.node.nodeid)):x}"
    directory.mkdir(parents=True)
    os.chown(directory, person.uid, person.gid)

    def run(settings: Mapping[str, Any], *cells: str, **asked: Any) -> list[Any]:
        job = {"course": {**settings, "graders": {"users": ["teacher"]}}, "cells": cells, "asked": asked}
        done = subprocess.run(
            [stage.environment(), "-B", "-P", "-c", _RUN],
            input=json.dumps(job),
            env={"PATH": os.defpath, "HOME": str(directory), "TMPDIR": str(directory), "PYTHONPATH": str(packages)},
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
            **person.credentials(),
        )
        assert done.returncode == 0, done.stderr[-3000:]
        end = json.loads(done.stdout)
        assert end["report"]["ended"] == "finished", end["report"]
        return [[_plain(output) for output in outputs] for outputs in end["outputs"]]

    yield run
    shutil.rmtree(directory)


def _plain(output: dict[str, Any]) -> Any:
    kind = output["output_type"]
    return output["text"] if kind == "stream" else output["ename"] if kind == "error" else output["data"]["text/plain"]


_LESSON = ["total = sum(range(10))\nprint(total)", "total", "assert total == 44, 'no'", "import os; os.getcwd()"]


@pytest.mark.slow
def test_a_job_in_an_image_is_like_one_on_the_host_but_for_its_packages(run: Run, image: Path, stage: Stage) -> None:
    inside = {"image_root": str(image), "environment": str(PREFIX), "environment_variables": {"TERM_NAME": "spring"}}
    outside = {"environment": str(stage.environment().parent.parent), "environment_variables": {"TERM_NAME": "spring"}}
    look = [
        f"import importlib.util; importlib.util.find_spec({PACKAGE!r}) is not None",
        f"import importlib.metadata; importlib.metadata.version({CHANGED!r})",
        "import sys; sys.prefix",
        "import os; os.environ['TERM_NAME'], os.environ.get('GREETING')",
    ]
    *lesson, has, version, prefix, variables = run(inside, *_LESSON, *look)
    *lesson_outside, has_outside, version_outside, prefix_outside, variables_outside = run(outside, *_LESSON, *look)
    assert lesson == lesson_outside == [["45\n"], ["45"], ["AssertionError"], ["'/home/student/work'"]]
    assert (has, has_outside) == (["True"], ["False"])
    assert version == [repr(CHANGED_VERSION)] != version_outside
    assert (prefix, prefix_outside) == ([repr(str(PREFIX))], [repr(outside["environment"])])
    assert variables == variables_outside == [repr(("spring", None))]


@pytest.mark.slow
def test_limits_and_kernels_hold_in_an_image(run: Run, image: Path) -> None:
    settings = {"image_root": str(image), "environment": str(PREFIX), "limits": {"memory_bytes": GIB}}
    greeting, memory = run(
        settings,
        "import os; os.environ['GREETING']",
        f"import {PACKAGE}\nbytearray(700 << 20)",
        kernel="greeting",
        limits={"memory_bytes": 512 << 20},
    )
    assert greeting == ["'from a kernelspec of the image'"]
    assert memory == ["MemoryError"]


def test_the_image_is_unlike_the_host() -> None:
    """Else the tests above prove nothing."""
    code = f"import importlib.metadata as m; print(m.version({CHANGED!r}))\nimport {PACKAGE}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() not in {"", CHANGED_VERSION}
    assert f"No module named '{PACKAGE}'" in done.stderr
