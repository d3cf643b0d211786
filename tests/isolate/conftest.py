"""What several of these files need: rooms for a short command, kernels for a short notebook."""

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

from e2e.clients import Specs
from isolate.environment import environment_policy
from isolate.notebook import Execution, Kernel, Settings, execute
from isolate.policy import Limits, Policy, Report, system_policy
from isolate.sandbox import Command, Sandbox

REPOSITORY = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Done:
    """A finished command of a sandbox."""

    report: Report
    stdout: str
    stderr: str


@pytest.fixture
def shell() -> Callable[..., Done]:
    """Run a shell script in a sandbox of the system's programs; keywords go to `Policy` and `Command`."""

    def run(script: str, *, limits: Limits | None = None, **keywords: Any) -> Done:
        base = system_policy(limits=limits or Limits(wall_seconds=60))
        extra = tuple(keywords.pop("read_only", ()))
        policy = dataclasses.replace(
            base,
            read_only=(*base.read_only, *extra),
            writable=tuple(keywords.pop("writable", ())),
            hidden=(*base.hidden, *keywords.pop("hidden", ())),
            environment={**base.environment, **keywords.pop("environment", {})},
        )
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            with Sandbox(policy, Command(["sh", "-c", script], stdout=out, stderr=err, **keywords)) as sandbox:
                report = sandbox.wait()
            out.seek(0)
            err.seek(0)
            return Done(report, out.read().decode("utf-8", "replace"), err.read().decode("utf-8", "replace"))

    return run


@pytest.fixture
def isolate_run() -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """The `isolate run` command as a person calls it."""

    def run(
        *arguments: str, stdin: str = "", cwd: Path | None = None, **env: str
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "isolate.cli", "run", *arguments],
            input=stdin,
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), **env},
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=100,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def kernel() -> Kernel:
    return Kernel([sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"])


@pytest.fixture(scope="session")
def kernel_policy() -> Policy:
    return environment_policy([Path(sys.executable)])


@pytest.fixture
def run_cells(kernel: Kernel, kernel_policy: Policy) -> Callable[..., Execution]:
    """Execute a notebook of these code cells in two rooms."""

    def run(
        *sources: str,
        settings: Settings | None = None,
        limits: Limits | None = None,
        kernel: Kernel = kernel,
        **keywords: Any,
    ) -> Execution:
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
        policy = dataclasses.replace(kernel_policy, limits=limits or Limits(wall_seconds=90))
        return execute(notebook, kernel, policy, settings or Settings(), **keywords)

    return run


@pytest.fixture
def specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Specs:
    """Kernelspecs, and all else that Jupyter keeps for a user, in places of this test's own."""
    for name in ("data", "runtime", "config"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"JUPYTER_{name.upper()}_DIR", str(tmp_path / name))
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", "the-hubs-token")
    return Specs(tmp_path / "data")
