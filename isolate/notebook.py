"""Execute one notebook in two rooms: the student's code in one, the Jupyter protocol in the other.

The caller's process sends code sources to the driver room and files to the kernel room. It takes back one
JSON document of limited size, and from it only outputs and execution counts per code cell, the language's
description and widget state; everything else of the notebook stays as the caller gave it.

    caller --sources--> driver room ==unix sockets==> kernel room <--files-- caller
    caller <--document-- driver room                  kernel room --work directory, opaque--> next notebook
"""

import contextlib
import copy
import dataclasses
import enum
import json
import os
import secrets
import selectors
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

from isolate import driver, outputs, uids
from isolate.environment import grader_paths, grader_policy
from isolate.policy import MIB, WORK, Limits, Policy, Report, SandboxError
from isolate.sandbox import Command, Sandbox, explain_limit

_SOCKETS = "/run/kernel"
_KEPT_STDERR_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How to start a kernel: what a kernelspec says."""

    argv: Sequence[str]
    """With `{connection_file}` in it."""
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    interrupt_mode: str = "signal"
    home_files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Small files that a fresh HOME should have: path -> text."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """nbclient's settings of the same names, with nbgrader's defaults. Seconds."""

    timeout: float | None = 30
    interrupt_on_timeout: bool = True
    error_on_timeout: Mapping[str, Any] | None = dataclasses.field(
        default_factory=lambda: {
            "ename": "CellTimeoutError",
            "evalue": "",
            "traceback": ["\x1b[0;31mCellTimeoutError\x1b[0m: No reply from kernel before timeout"],
        }
    )
    iopub_timeout: int = 4
    """Outputs that do not end within it are an error of that cell."""
    startup_timeout: float = 60
    allow_errors: bool = True
    allow_error_names: Sequence[str] = ()
    force_raise_errors: bool = False
    store_widget_state: bool = True
    record_timing: bool = True
    coalesce_streams: bool = False

    def for_driver(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        del values["timeout"], values["startup_timeout"]
        return values | {"allow_error_names": list(self.allow_error_names), "raise_on_iopub_timeout": True}


class Ended(enum.StrEnum):
    """How one cell ended. All but OK and NOT_CODE leave an error in the cell's outputs."""

    OK = "ok"
    TIMEOUT = "timeout"
    STUCK = "stuck"
    KERNEL_DIED = "kernel died"
    IOPUB_TIMEOUT = "iopub timeout"
    LOST = "lost"
    ODD_MESSAGE = "odd message"
    STOPPED = "stopped"
    NOT_RUN = "not run"


@dataclasses.dataclass(frozen=True)
class ExecutionReport:
    """How one notebook went: `ended` is `finished`, or what ended it; `message` says so to a person."""

    ended: str
    message: str
    limits: tuple[str, ...]
    """Names of the limits that were hit: timeout, wall, cpu, memory, files, output."""
    cells: Mapping[int, Ended]
    wall_seconds: float
    cpu_seconds: float
    memory_peak_bytes: int
    tier: str
    layers: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {
            "limits": list(self.limits),
            "layers": list(self.layers),
            "cells": {str(index): str(ended) for index, ended in self.cells.items()},
        }


@dataclasses.dataclass(frozen=True)
class Execution:
    """The executed notebook (a new object) and its report."""

    notebook: NotebookNode
    report: ExecutionReport


Progress = Callable[[int, str], None]
"""Called with a cell's index and `started` or `finished`."""


def driver_limits(limits: Limits) -> Limits:
    """The driver's own bounds: enough for the outputs that are kept, several times over, and no more."""
    return dataclasses.replace(
        limits,
        memory_bytes=384 * MIB + 8 * limits.output_bytes,
        wall_seconds=limits.wall_seconds + 60,
        cpu_seconds=limits.cpu_seconds + 60,
        processes=32,
        files_bytes=1 * MIB,
        files_count=64,
    )


def execute(
    notebook: NotebookNode,
    kernel: Kernel,
    policy: Policy,
    settings: Settings | None = None,
    *,
    files: IO[bytes] | None = None,
    keep: IO[bytes] | None = None,
    skip: Collection[int] = (),
    timeouts: Mapping[int, float | None] | None = None,
    progress: Progress | None = None,
) -> Execution:
    """Execute every code cell of a notebook of format 4 and return a copy with its outputs.

    `files` is a tar archive for the work directory (`isolate.files.pack`, or an earlier `keep`); `keep`
    receives the work directory as the code left it, to be given to the next notebook and not to be parsed.
    Cells in `skip` are not executed; `timeouts` overrides the cell timeout by index.

    What the code caused is in the outputs and the report. Raises `SandboxError` for what it did not: a layer
    that cannot be built, a kernel that does not start, a driver that fails, a host out of memory.
    """
    run = _Run(notebook, kernel, policy, settings or Settings(), skip, timeouts or {}, progress)
    try:
        return run.execute(files, keep)
    except OSError as error:  # a full disk, no descriptors left
        raise SandboxError("host", str(error)) from error


class _Run:
    def __init__(
        self,
        notebook: NotebookNode,
        kernel: Kernel,
        policy: Policy,
        settings: Settings,
        skip: Collection[int],
        timeouts: Mapping[int, float | None],
        progress: Progress | None,
    ) -> None:
        self._notebook, self._kernel, self._settings = notebook, kernel, settings
        self._policy = dataclasses.replace(policy, environment={**policy.environment, **kernel.environment})
        self._timeouts, self._progress = timeouts, progress
        self._code = [
            index for index, cell in enumerate(notebook.cells) if cell.cell_type == "code" and cell.source.strip()
        ]
        self._runs = [index for index in self._code if index not in skip]
        self._connection = {
            "transport": "ipc",
            "key": secrets.token_hex(32),
            "signature_scheme": "hmac-sha256",
            **{f"{name}_port": port for port, name in enumerate(("shell", "iopub", "stdin", "control", "hb"), start=1)},
        }
        self._document = bytearray()
        self._kernel_said = bytearray()
        self._driver_said = bytearray()
        self._ready = False
        self._document_limit = 2 * policy.limits.output_bytes + 8 * MIB

    def execute(self, files: IO[bytes] | None, keep: IO[bytes] | None) -> Execution:
        killed_by_host = _out_of_memory_kills()
        with contextlib.ExitStack() as stack:
            lease = stack.enter_context(uids.lease())  # one for both rooms, which share a directory of sockets
            errors, errors_end = _pipe(stack)
            command = self._kernel_command(files, keep, errors_end)
            kernel = stack.enter_context(Sandbox(self._policy, command, lease=lease))
            os.close(errors_end)
            driver_report = self._drive(kernel, errors, lease)
            if not kernel.finished:
                kernel.send("kill")
            kernel_report = kernel.wait()
            if keep is not None and not kernel.kept:
                keep.seek(0)
                keep.truncate()
        if kernel_report.signal == signal.SIGKILL and _out_of_memory_kills() != killed_by_host:
            raise SandboxError("host", "it ran out of memory while the notebook ran", "grade fewer at a time")
        if not self._ready:
            self._raise_not_started(kernel_report, driver_report)
        return self._finish(kernel_report, driver_report)

    def _kernel_command(self, files: IO[bytes] | None, keep: IO[bytes] | None, stderr: int) -> Command:
        connection_file = f"{_SOCKETS}/connection.json"
        return Command(
            without_working_directory(
                [word.replace("{connection_file}", connection_file) for word in self._kernel.argv]
            ),
            archive=files,
            keep=keep,
            room_files={
                connection_file: json.dumps({**self._connection, "ip": f"{_SOCKETS}/k"}),
                **self._kernel.home_files,
            },
            share_at=_SOCKETS,
            stdout=stderr,
            stderr=stderr,
        )

    def _job(self) -> bytes:
        cells = []
        for index, cell in enumerate(self._notebook.cells):
            runs = index in self._runs
            timeout = self._timeouts.get(index, self._settings.timeout)
            cells.append({"source": cell.source if runs else "", "run": runs, "timeout": timeout})
        limits = self._policy.limits
        job = {
            "cells": cells,
            "settings": self._settings.for_driver(),
            "connection": {**self._connection, "ip": "k"},
            "interrupt_mode": self._kernel.interrupt_mode,
            "cell_output_bytes": limits.cell_output_bytes,
            "output_bytes": limits.output_bytes,
            "document_bytes": self._document_limit,
        }
        return json.dumps(job).encode()

    def _drive(self, kernel: Sandbox, kernel_errors: int, lease: uids.Lease | None) -> Report:
        """Run the driver against this kernel until it ends; its report."""
        with contextlib.ExitStack() as stack:
            job = stack.enter_context(tempfile.TemporaryFile())
            job.write(self._job())
            job.seek(0)
            result, result_end = _pipe(stack)
            progress, progress_end = _pipe(stack)
            words_end, words = _pipe(stack)
            errors, errors_end = _pipe(stack)
            assert kernel.shared is not None
            theirs = [kernel.shared, result_end, progress_end, words_end]
            start = (
                f"import sys; sys.path[:0] = {grader_paths()!r}; from isolate.driver import main; "
                "sys.exit(main(*map(int, sys.argv[1:])))"
            )
            command = Command(
                [sys.executable, "-I", "-B", "-c", start, *map(str, theirs)],
                cwd="/",
                pass_fds=theirs,
                stdin=job,
                stdout=errors_end,
                stderr=errors_end,
            )
            policy = grader_policy(driver_limits(self._policy.limits))
            sandbox = stack.enter_context(Sandbox(policy, command, lease=lease))
            for descriptor in (result_end, progress_end, words_end, errors_end):
                os.close(descriptor)
            self._listen(kernel, sandbox, {"kernel": kernel_errors, "driver": errors}, result, progress, words)
            return sandbox.report()

    def _listen(
        self,
        kernel: Sandbox,
        sandbox: Sandbox,
        errors: Mapping[str, int],
        result: int,
        progress: int,
        words: int,
    ) -> None:
        """Serve both rooms until the driver is gone."""
        with selectors.DefaultSelector() as selector:
            selector.register(kernel, selectors.EVENT_READ, lambda: self._hear_kernel(kernel, selector, words))
            selector.register(sandbox, selectors.EVENT_READ, sandbox.receive)
            selector.register(result, selectors.EVENT_READ, lambda: self._take_document(result, sandbox, selector))
            selector.register(progress, selectors.EVENT_READ, lambda: self._take_progress(progress, kernel, selector))
            said = {"kernel": self._kernel_said, "driver": self._driver_said}
            for name, descriptor in errors.items():
                take = _take_words(descriptor, said[name], selector)
                selector.register(descriptor, selectors.EVENT_READ, take)
            patience = self._settings.startup_timeout
            deadline = time.monotonic() + patience if patience and patience > 0 else None
            while not sandbox.finished:
                left = None if self._ready or deadline is None else max(0.0, deadline - time.monotonic())
                for key, _ in selector.select(left):
                    key.data()
                if not self._ready and deadline is not None and time.monotonic() >= deadline:
                    kernel.send("kill")
                    sandbox.send("kill")
                    deadline = None

    def _hear_kernel(self, kernel: Sandbox, selector: selectors.BaseSelector, words: int) -> None:
        event = kernel.receive()
        if event is None:
            selector.unregister(kernel)
        if event is None or event["event"] in {"exited", "gone"}:
            with contextlib.suppress(OSError):
                os.write(words, b"dead")

    def _take_document(self, result: int, sandbox: Sandbox, selector: selectors.BaseSelector) -> None:
        block = os.read(result, 1 << 20)
        self._document += block
        if not block:
            selector.unregister(result)
        elif len(self._document) > self._document_limit:
            selector.unregister(result)
            sandbox.send("kill")

    def _take_progress(self, progress: int, kernel: Sandbox, selector: selectors.BaseSelector) -> None:
        record = os.read(progress, driver.PROGRESS.size)
        if len(record) != driver.PROGRESS.size:
            selector.unregister(progress)
            return
        index, state = driver.PROGRESS.unpack(record)
        if state == driver.READY:
            self._ready = True
        elif state == driver.INTERRUPT:
            kernel.send("interrupt")
        elif state == driver.KILL:
            kernel.send("kill")
        elif self._progress and index < len(self._notebook.cells):
            self._progress(index, "started" if state == driver.STARTED else "finished")

    def _raise_not_started(self, kernel_report: Report, driver_report: Report) -> None:
        said = self._kernel_said.decode("utf-8", "replace").strip().splitlines()
        last = f"; it said: {said[-1][:300]}" if said else ""
        if kernel_report.ended == "killed":
            if driver_report.ended == "exited" and driver_report.exit_code:
                raise SandboxError("driver", self._driver_words())
            cause = f"it was not ready within {self._settings.startup_timeout:g} s"
        else:
            cause = kernel_report.message or f"it ended with exit code {kernel_report.exit_code}"
        raise SandboxError("kernel", f"it did not start: {cause}{last}", "check the environment and its ipykernel")

    def _driver_words(self) -> str:
        said = self._driver_said.decode("utf-8", "replace").strip().splitlines()
        return said[-1][:300] if said else "it ended without a document"

    def _finish(self, kernel_report: Report, driver_report: Report) -> Execution:
        limits: list[str] = []
        lost = driver_report.limit is not None or driver_report.exit_code == driver.OUT_OF_MEMORY_CODE
        if lost or len(self._document) > self._document_limit:
            result: dict[str, Any] = {"cells": {}}
            limits.append("output")
            cause = f"its outputs were too much: {explain_limit('output', self._policy)}"
        else:
            if driver_report.ended != "exited" or driver_report.exit_code != 0:
                raise SandboxError("driver", driver_report.message or self._driver_words())
            result = outputs.parse_document(bytes(self._document))
            cause = self._cause(kernel_report)
        if kernel_report.limit:
            limits.append(kernel_report.limit)
        notebook, cells = self._merge(result, cause, limits)
        bad = [ended for ended in cells.values() if ended in {Ended.KERNEL_DIED, Ended.STUCK, Ended.STOPPED}]
        ended, message = "finished", ""
        if bad or Ended.NOT_RUN in cells.values():
            ended = limits[-1] if limits else str(bad[0]) if bad else "kernel died"
            message = cause
        report = ExecutionReport(
            ended=ended,
            message=message,
            limits=tuple(dict.fromkeys(limits)),
            cells=cells,
            wall_seconds=kernel_report.wall_seconds,
            cpu_seconds=kernel_report.cpu_seconds,
            memory_peak_bytes=kernel_report.memory_peak_bytes,
            tier=kernel_report.tier,
            layers=kernel_report.layers,
        )
        return Execution(notebook, report)

    def _cause(self, kernel_report: Report) -> str:
        if kernel_report.ended == "exited":
            return f"the kernel ended by itself with exit code {kernel_report.exit_code} (os._exit, exit or quit?)"
        if kernel_report.ended == "killed":
            return "the cell did not end in time and did not react to an interrupt, so the kernel was killed"
        if kernel_report.ended == "signal":
            return f"the kernel crashed: {kernel_report.message}"
        return kernel_report.message

    def _merge(self, result: Mapping[str, Any], cause: str, limits: list[str]) -> tuple[NotebookNode, dict[int, Ended]]:
        """The caller's notebook with the outputs from the document; a cell that did not run has an error."""
        notebook = copy.deepcopy(self._notebook)
        cells: dict[int, Ended] = {}
        culprit: int | None = None
        for index in self._code:
            cell = notebook.cells[index]
            cell.outputs, cell.execution_count = [], None
            if index not in self._runs:
                continue
            record = result["cells"].get(index)
            if record is None:
                cells[index] = Ended.NOT_RUN
                where = f"cell {culprit + 1} of the notebook" if culprit is not None else "an earlier cell"
                text = f"This cell was not run, because of {where}: {cause}."
                cell.outputs = [outputs.error("NotRunError", text)]
                continue
            ended = Ended(record["ended"])
            cells[index] = ended
            cell.outputs, cell.execution_count = record["outputs"], record["execution_count"]
            if record["timing"] and self._settings.record_timing:
                cell.metadata["execution"] = record["timing"]
            if record["cut"]:
                limits.append("output")
                cell.outputs.append(outputs.notice(self._policy.limits))
            if any(output.output_type == "error" and output.ename == "MemoryError" for output in cell.outputs):
                limits.append("memory")  # the cell's own word: an allocation was refused, and nothing was killed
            if ended is Ended.TIMEOUT:
                limits.append("timeout")
            elif ended is not Ended.OK:
                culprit = index
                limits += ["timeout"] if ended is Ended.STUCK else []
                cell.outputs += _explain_cell(ended, cause, self._settings, cell.outputs)
        if result.get("language_info"):
            notebook.metadata["language_info"] = result["language_info"]
        if result.get("widgets"):
            notebook.metadata["widgets"] = result["widgets"]
        try:
            # Only what is new: how valid the rest is was the caller's to judge.
            executed = [new_code_cell(outputs=notebook.cells[index].outputs) for index in cells]
            nbformat.validate(new_notebook(cells=executed))
        except (nbformat.ValidationError, RecursionError) as error:
            raise SandboxError("driver", f"its document makes an invalid notebook: {str(error)[:200]}") from error
        return notebook, cells


def without_working_directory(argv: Sequence[str]) -> list[str]:
    """`python -m ipykernel_launcher ...` such that the kernel is never imported from the work directory.

    `-m` looks there first, so that a student's ipykernel_launcher.py would be the kernel and its own examiner.
    IPython puts the directory back for the notebook. (Python's `-P` does this from 3.11 on only.)
    """
    if len(argv) < 3 or argv[1] != "-m" or not os.path.basename(argv[0]).startswith("python"):
        return list(argv)
    start = (
        "import sys; sys.path[:] = [entry for entry in sys.path if entry]; import runpy; "
        f"runpy.run_module({argv[2]!r}, run_name='__main__', alter_sys=True)"
    )
    return [argv[0], "-c", start, *argv[3:]]


def _explain_cell(ended: Ended, cause: str, settings: Settings, found: Sequence[Any]) -> list[NotebookNode]:
    if ended is Ended.STOPPED and any(output.output_type == "error" for output in found):
        return []
    text = {
        Ended.KERNEL_DIED: ("KernelDiedError", f"The kernel ended while this cell ran: {cause}."),
        Ended.STUCK: (
            "CellTimeoutError",
            f"This cell did not end within its timeout of {settings.timeout} s: {cause}.",
        ),
        Ended.IOPUB_TIMEOUT: (
            "OutputTimeoutError",
            f"The outputs of this cell did not end within {settings.iopub_timeout} s (iopub_timeout) after it ran; "
            "a single output of more than 16 MiB has this effect, too.",
        ),
        Ended.LOST: ("OutputLimitError", "Errors or results of this cell were lost because its output is too long."),
        Ended.ODD_MESSAGE: ("ProtocolError", "The kernel sent a message that breaks the Jupyter protocol."),
        Ended.STOPPED: ("CellExecutionError", "The execution stopped in this cell."),
    }[ended]
    return [outputs.error(*text)]


def _pipe(stack: contextlib.ExitStack) -> tuple[int, int]:
    """(read end, write end); what is still open is closed with the stack."""
    ends = os.pipe()
    for end in ends:
        stack.callback(_close_once, end, os.fstat(end).st_ino)
    return ends


def _close_once(descriptor: int, inode: int) -> None:
    with contextlib.suppress(OSError):
        if os.fstat(descriptor).st_ino == inode:
            os.close(descriptor)


def _take_words(descriptor: int, kept: bytearray, selector: selectors.BaseSelector) -> Callable[[], None]:
    """Drain a pipe, keeping its first few kilobytes."""

    def take() -> None:
        block = os.read(descriptor, 1 << 16)
        if not block:
            selector.unregister(descriptor)
        kept.extend(block[: _KEPT_STDERR_BYTES - len(kept)])

    return take


def _out_of_memory_kills() -> int:
    """How often this host's kernel has killed a process for want of memory. proc_vmstat(5)"""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


__all__ = ["WORK", "Ended", "Execution", "ExecutionReport", "Kernel", "Settings", "execute"]
