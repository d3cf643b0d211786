"""How much of a machine there is for the service, also where a control group leaves less of it."""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from grader_service import machine
from grader_service.settings import Settings
from isolate.cgroups import hierarchies
from isolate.policy import MIB

_LIMIT = 512 * MIB
_ASK = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); from grader_service import machine; print({})"


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group below our own with a limit on memory."""
    texts = [Path(f"/proc/self/{name}").read_text(encoding="utf-8") for name in ("cgroup", "mountinfo")]
    for one in hierarchies(*texts):
        name = "memory.max" if one.version == 2 else "memory.limit_in_bytes"
        if one.version == 2 or "memory" in one.controllers:
            directory = Path(one.place) / f"grader-service-{uuid.uuid4().hex[:12]}"
            try:
                directory.mkdir()
            except OSError:
                continue
            try:
                (directory / name).write_text(str(_LIMIT))
                yield directory
            except OSError as error:
                pytest.skip(f"no control group with a limit can be made: {error.strerror}")
            finally:
                directory.rmdir()
            return
    pytest.skip("no control group can be made: only root, or whom one is delegated to, can")


def test_a_control_group_leaves_less(group: Path) -> None:
    (group / "below").mkdir()  # a limit further up holds, too
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK.format("machine.memory_bytes()"), group / "below" / "cgroup.procs"],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        (group / "below").rmdir()
    assert done.stdout.strip() == str(_LIMIT), done.stderr


def test_no_more_than_the_machine_has() -> None:
    assert 0 < machine.memory_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_only_processors_that_we_may_use() -> None:
    ask = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from grader_service import machine"
    done = subprocess.run(
        [sys.executable, "-c", f"{ask}; print(machine.processors())"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "1"
    assert machine.processors() >= 1


def test_sandboxes_get_four_fifths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_bytes", lambda: _LIMIT)
    assert Settings(data_directory=Path("/data")).memory_bytes == _LIMIT * 8 // 10
