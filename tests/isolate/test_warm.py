"""Warm kernels do what cold ones do, are replaced, and say why one was cold."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest

from e2e import host
from isolate import sandbox, warm
from isolate.notebook import Execution, Kernel, execute
from isolate.policy import Bind, Policy, SandboxError
from isolate.warm import Nursery

Run = Callable[..., Execution]


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as one:
        yield one


def _text(execution: Execution, index: int = 0) -> str:
    return "".join(output.get("text", "") for output in execution.notebook.cells[index].outputs)


def _templates() -> set[tuple[int, str]]:
    """Processes of this test's templates: what is below us and was started with a descriptor as its program."""
    return {process for process in host.descendants(os.getpid()) if "exec(open(3" in host.command_of(process)}


def test_a_kernel_says_how_it_started(run_cells: Run, nursery: Nursery) -> None:
    cold, first, second = run_cells("1 + 1"), run_cells("1 + 1", warm=nursery), run_cells("1 + 1", warm=nursery)
    assert [one.report.start for one in (cold, first, second)] == ["cold", "warm", "warm"]
    assert second.report.layers == cold.report.layers
    assert second.notebook.cells[0].outputs == cold.notebook.cells[0].outputs


def test_memory_of_the_template_is_not_the_kernels(run_cells: Run) -> None:
    """What the template has loaded is counted once, in the template."""
    with Nursery(["nbformat", "sqlalchemy", "fastapi"]) as full, Nursery() as empty:
        code = "import nbformat, sqlalchemy, fastapi"
        most = run_cells(code, warm=empty).report.memory_peak_bytes
        least = run_cells(code, warm=full).report.memory_peak_bytes
        assert least < most - (10 << 20)


def test_what_is_imported_beforehand_is_there(run_cells: Run) -> None:
    code = "import sys, json; print(json.dumps([name in sys.modules for name in ('wave', 'no_such', 'isolate')]))"
    with Nursery(["wave", "no_such"]) as one:
        done = run_cells(code, warm=one)
    assert (done.report.start, json.loads(_text(done))) == ("warm", [True, False, False])


def test_a_package_that_asks_for_the_shell_is_imported_by_the_kernel(run_cells: Run) -> None:
    """It would be told that there is none, and keep that in mind."""
    with Nursery(["matplotlib_inline.backend_inline"]) as one:
        done = run_cells(
            "import sys; print('matplotlib_inline.backend_inline' in sys.modules)",
            "get_ipython() is get_ipython().kernel.shell",
            warm=one,
        )
    assert (done.report.start, _text(done)) == ("warm", "False\n")


@pytest.mark.parametrize("name", ["this", "imp"])
def test_what_a_package_says_when_imported_is_said_in_the_notebook(run_cells: Run, name: str) -> None:
    """`this` prints, `imp` warns."""
    with Nursery(["wave", name]) as one:
        done = run_cells(f"import sys; print('wave' in sys.modules, {name!r} in sys.modules); import {name}", warm=one)
    assert done.report.start == "warm"
    assert _text(done).startswith("True False\n")
    assert len(_text(done)) > 50


def test_a_template_that_hangs_is_none(run_cells: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    source = warm._source
    monkeypatch.setattr(warm, "_source", lambda: "import time; time.sleep(600)\n" + source())
    monkeypatch.setattr(sandbox, "_TEMPLATE_SECONDS", 0.5)
    with Nursery() as one:
        done = run_cells("print(1)", warm=one)
    assert done.report.start == "cold: template: it was not ready within 0.5 s"
    assert _text(done) == "1\n"


def test_a_closed_nursery_starts_nothing(run_cells: Run) -> None:
    one = Nursery()
    one.close()
    with pytest.raises(SandboxError, match="the run has ended"):
        run_cells("1", warm=one)


def test_a_kernel_that_is_not_ipythons_starts_cold(run_cells: Run, kernel: Kernel, nursery: Nursery) -> None:
    argv = [kernel.argv[0], "-c", "from ipykernel.kernelapp import main; main()", *kernel.argv[3:]]
    done = run_cells("print(1)", kernel=dataclasses.replace(kernel, argv=argv), warm=nursery)
    assert (done.report.start, _text(done)) == ("cold: not IPython's kernel", "1\n")


def test_a_template_with_a_thread_is_none(run_cells: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    source = warm._source
    thread = "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    monkeypatch.setattr(warm, "_source", lambda: thread + source())
    with Nursery() as one:
        done = run_cells("print(1)", warm=one)
    assert done.report.start.startswith("cold: ")
    assert "2 threads run" in done.report.start
    assert _text(done) == "1\n"


def test_several_at_once(run_cells: Run, nursery: Nursery) -> None:
    found: list[str] = []

    def one(number: int) -> None:
        done = run_cells(f"print({number})", warm=nursery)
        found.append(f"{done.report.start} {_text(done)}")

    threads = [threading.Thread(target=one, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [f"warm {number}\n" for number in range(6)]


def test_a_killed_template_is_replaced(run_cells: Run) -> None:
    before = _templates()
    with Nursery() as one:
        run_cells("1", warm=one)
        mine = _templates() - before
        assert len(mine) >= 2  # for kernels and for drivers
        for pid, _ in mine:
            with_pidfd = os.pidfd_open(pid)
            signal.pidfd_send_signal(with_pidfd, signal.SIGKILL)
            os.close(with_pidfd)
        assert host.eventually(lambda: not mine & host.processes().keys())
        assert run_cells("1", warm=one).report.start == "warm"
    assert host.eventually(lambda: _templates() == before)


def test_a_template_killed_at_work_is_no_fault_of_the_notebook(run_cells: Run) -> None:
    with Nursery() as one:
        run_cells("1", warm=one)
        errors: list[BaseException] = []

        def work() -> None:
            try:
                run_cells("import time; time.sleep(60)", warm=one)
            except SandboxError as error:
                errors.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(1.5)
        one.close()
        thread.join(30)
        assert not thread.is_alive()
        assert len(errors) == 1


def test_installed_packages_make_another_template(run_cells: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _templates()
    with Nursery() as one:
        run_cells("1", warm=one)
        first = _templates() - before
        stamps = warm._stamps
        monkeypatch.setattr(warm, "_stamps", lambda python: [*stamps(python), ["installed", 1]])
        run_cells("1", warm=one)
        assert len(_templates() - before) > len(first)


@pytest.fixture
def shown() -> Iterator[Path]:
    """A directory that every sandbox's user may be shown."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="shown ä-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def _run(policy: Policy, kernel: Kernel, nursery: Nursery, source: str) -> Execution:
    cells = [nbformat.v4.new_code_cell(source)]
    return execute(nbformat.v4.new_notebook(cells=cells), kernel, policy, warm=nursery)


@pytest.mark.threat(63)
def test_what_was_replaced_is_seen_and_masked_as_it_is_now(kernel: Kernel, kernel_policy: Policy, shown: Path) -> None:
    """A template's view is of files, not of names: one that was renamed over is neither the old one nor unmasked."""
    (shown / "data").mkdir()
    (shown / "file").write_text("first")
    (shown / "data/secret").write_text("canary")
    look = f"""
import os
def at(path):
    try:
        return open(path).read()
    except OSError as error:
        return type(error).__name__
print([at(path) for path in {[str(shown / name) for name in ("file", "data/secret", "data/late", "data/open")]!r}])
"""
    policy = dataclasses.replace(
        kernel_policy,
        read_only=(*kernel_policy.read_only, Bind(shown / "file"), Bind(shown / "data")),
        hidden=(*kernel_policy.hidden, shown / "data/secret", shown / "data/late"),
    )
    with Nursery() as one:
        done = _run(policy, kernel, one, look)
        assert (done.report.start, _text(done)) == (
            "warm",
            "['first', '', 'FileNotFoundError', 'FileNotFoundError']\n",
        )
        for name in ("file", "data/secret", "data/late", "data/open"):
            (shown / "new").write_text(f"second {name}")
            (shown / "new").rename(shown / name)
        done = _run(policy, kernel, one, look)
        assert (done.report.start, _text(done)) == ("warm", "['second file', '', '', 'second data/open']\n")


def test_a_lasting_nursery_has_nothing_that_somebody_may_edit(
    kernel: Kernel, kernel_policy: Policy, shown: Path
) -> None:
    (shown / "helper.py").write_text("value = 1")
    policy = dataclasses.replace(
        kernel_policy.with_visible([shown]),
        environment={**kernel_policy.environment, "PYTHONPATH": str(shown)},
    )
    with Nursery(["helper"]) as one, Nursery(["helper"], lasting=True) as lasting, Nursery(["wave"]) as fine:
        assert _run(policy, kernel, one, "import helper").report.start == "warm"
        assert "helper is not a package of the environment" in _run(policy, kernel, lasting, "1").report.start
        assert _run(policy, kernel, fine, "import helper").report.start == "warm"


def test_who_is_not_patient_starts_cold_until_it_was_tended_to(run_cells: Run) -> None:
    before = _templates()
    errors: list[BaseException] = []
    one = Nursery(lasting=True)
    one.patient = False

    def tend() -> None:
        try:
            one.tend()
        except BaseException as error:
            errors.append(error)
            raise

    assert run_cells("1", warm=one).report.start == "cold: there is no template yet"
    assert _templates() == before
    thread = threading.Thread(target=tend)
    thread.start()
    assert host.eventually(lambda: run_cells("1", warm=one).report.start == "warm")
    one.close()
    thread.join(30)
    assert not thread.is_alive()
    assert not errors
    assert host.eventually(lambda: _templates() == before)


def test_unused_templates_end(run_cells: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "IDLE_SECONDS", 0.5)
    before = _templates()
    with Nursery() as one:
        run_cells("1", warm=one)
        assert host.eventually(lambda: _templates() == before)
        assert run_cells("1", warm=one).report.start == "warm"


_OWNER = """
import sys
from pathlib import Path
import nbformat
from isolate.environment import environment_policy
from isolate.notebook import Kernel, execute
from isolate.warm import Nursery
python = Path(sys.executable)
kernel = Kernel([str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"])
nursery = Nursery()
cells = [nbformat.v4.new_code_cell("import time; time.sleep(600)")]
execute(nbformat.v4.new_notebook(cells=cells), kernel, environment_policy([python]), warm=nursery,
        progress=lambda index, state: print(state, flush=True))
"""


def test_kill_9_of_the_owner_leaves_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", _OWNER], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "started\n"
        below = host.descendants(owner.pid)
        assert len(below) > 5
        owner.kill()
    assert host.eventually(lambda: not below & host.processes().keys())
