"""The local engine: one process for each call, and none is left, whatever ends."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from attacks.harness import eventually, lives
from grader_service.engines import LocalEngine, WorkerDied
from grader_service.settings import CourseSettings
from grader_service.worker import TOO_LATE_CODE, Task, _watching
from isolate.rooms import driver_limits


@pytest.fixture(scope="module")
def engine() -> Iterator[LocalEngine]:
    engine = LocalEngine()
    yield engine
    engine.shutdown(cancel_futures=True)


def _twice(number: int) -> tuple[int, int]:
    return 2 * number, os.getpid()


def _fail() -> None:
    raise ValueError("no")


def _sleep(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(3600)


def _die(path: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class _Held:
    """A store in which the job is always ours."""

    def holds(self, job_id: str, lease: str) -> bool:
        return bool(job_id and lease)


def _hang() -> None:
    course = CourseSettings.model_validate({"environment": sys.prefix, "graders": {"tokens_only": True}})
    longest = 2 * driver_limits(course.maximum_limits).wall_seconds
    task = Task("job", "lease", "", Path("/"), course, 1, watch_seconds=0.05, grace_seconds=0.5 - longest)
    with _watching(_Held(), task):  # type: ignore[arg-type]
        time.sleep(3600)


def _pid(path: Path) -> int:
    assert eventually(lambda: path.exists() and path.read_text().isdigit(), 60)
    return int(path.read_text())


def test_calls_run_in_processes_of_their_own(engine: LocalEngine) -> None:
    answers = [future.result(60) for future in [engine.submit(_twice, number) for number in range(4)]]
    assert [answer[0] for answer in answers] == [0, 2, 4, 6]
    assert len({answer[1] for answer in answers} | {os.getpid()}) == 5


def test_an_exception_is_the_futures(engine: LocalEngine) -> None:
    with pytest.raises(RuntimeError, match="ValueError: no"):
        engine.submit(_fail).result(60)


def test_a_worker_that_hangs_outside_of_its_sandbox_ends(engine: LocalEngine) -> None:
    with pytest.raises(WorkerDied) as died:
        engine.submit(_hang).result(60)
    assert died.value.code == TOO_LATE_CODE


def test_a_worker_that_dies_takes_no_other_with_it(engine: LocalEngine, tmp_path: Path) -> None:
    other = engine.submit(_sleep, str(tmp_path / "pid"))
    pid = _pid(tmp_path / "pid")
    with pytest.raises(WorkerDied, match="SIGKILL"):
        engine.submit(_die, "").result(60)
    assert engine.submit(_twice, 1).result(60)[0] == 2
    assert not other.done()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerDied):
        other.result(60)


def test_shutdown_ends_what_runs(tmp_path: Path) -> None:
    engine = LocalEngine()
    future = engine.submit(_sleep, str(tmp_path / "pid"))
    pid = _pid(tmp_path / "pid")
    engine.shutdown(cancel_futures=True)
    with pytest.raises(WorkerDied):
        future.result(60)
    assert not lives(pid)
    with pytest.raises(RuntimeError, match="shut down"):
        engine.submit(_twice, 1)


def test_a_service_that_is_killed_leaves_no_worker_and_no_file(tmp_path: Path) -> None:
    script = tmp_path / "service.py"
    script.write_text(
        "import time\nfrom grader_service.engines import LocalEngine\n"
        "def sleep(path):\n    import os\n    open(path, 'w').write(str(os.getpid()))\n    time.sleep(3600)\n"
        "if __name__ == '__main__':\n    import sys\n"
        "    LocalEngine().submit(sleep, sys.argv[1])\n    time.sleep(3600)\n"
    )
    # A short name for sockets. unix(7)
    with tempfile.TemporaryDirectory(prefix="gs-", dir="/tmp") as temporary:
        environment = {**os.environ, "TMPDIR": temporary}
        process = subprocess.Popen([sys.executable, str(script), str(tmp_path / "pid")], env=environment)
        try:
            pid = _pid(tmp_path / "pid")
            assert [name for name in os.listdir(temporary) if name.startswith("pymp-")]
        finally:
            process.kill()
            process.wait()
        assert eventually(lambda: not lives(pid), 60)
        assert eventually(lambda: not os.listdir(temporary), 60), os.listdir(temporary)
