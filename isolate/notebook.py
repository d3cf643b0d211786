"""Execute one notebook in two rooms: the student's code in one, the Jupyter protocol in the other.

The caller's process sends code sources to the driver room and files to the kernel room. It takes back one
JSON document of limited size, and from it only outputs and execution counts per code cell, the language's
description and widget state; everything else of the notebook stays as the caller gave it.

    caller --sources--> driver room ==unix sockets==> kernel room <--files-- caller
    caller <--document-- driver room                  kernel room --work directory, opaque--> next notebook

The rooms themselves are in `isolate.rooms`, the reader of the document in `isolate.outputs`.
"""

import copy
import dataclasses
import enum
import re
from collections.abc import Collection, Mapping, Sequence
from typing import IO, Any

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

from isolate import outputs
from isolate.policy import Policy, Report, SandboxError
from isolate.rooms import Kernel, Outcome, Progress, TwoRooms
from isolate.sandbox import explain_limit
from isolate.warm import Nursery


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
    start: str
    """How the kernel was started: "warm", "cold", or "cold: " and why it was not warm."""
    layers: tuple[str, ...]
    gaps: tuple[str, ...]
    """What this tier does not stop."""

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {
            "limits": list(self.limits),
            "layers": list(self.layers),
            "gaps": list(self.gaps),
            "cells": {str(index): str(ended) for index, ended in self.cells.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ExecutionReport":
        """What `as_dict` gave, after a way through JSON. Raises `ValueError` for anything else."""
        names = {field.name for field in dataclasses.fields(cls)}
        if set(values) != names:
            raise ValueError(f"not a report: {sorted(names ^ set(values))[:5]}")
        lists = {name: tuple(map(str, values[name])) for name in ("limits", "layers", "gaps")}
        cells = {int(index): Ended(ended) for index, ended in values["cells"].items()}
        return cls(**{**values, **lists, "cells": cells})


@dataclasses.dataclass(frozen=True)
class Execution:
    """The executed notebook (a new object) and its report."""

    notebook: NotebookNode
    report: ExecutionReport


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
    warm: Nursery | None = None,
) -> Execution:
    """Execute every code cell of a notebook of format 4 and return a copy with its outputs.

    `files` is a tar archive for the work directory (`isolate.files.pack`, or an earlier `keep`); `keep`
    receives the work directory as the code left it, to be given to the next notebook and not to be parsed.
    Cells in `skip` are not executed; `timeouts` overrides the cell timeout by index. With `warm`, both rooms are
    forked from its templates where that is possible.

    What the code caused is in the outputs and the report. Raises `SandboxError` for what it did not: a layer
    that cannot be built, a kernel that does not start, a driver that fails, a host out of memory.
    """
    job = _Job(notebook, policy, settings or Settings(), frozenset(skip), timeouts or {})

    def tell(index: int, state: str) -> None:
        if progress and index < len(notebook.cells):
            progress(index, state)

    try:
        outcome = TwoRooms(kernel, policy, job.settings.startup_timeout, tell, warm).run(job.for_driver(), files, keep)
    except OSError as error:  # a full disk, no descriptors left
        raise SandboxError("host", str(error)) from error
    return job.finish(outcome)


def to_bytes(notebook: NotebookNode) -> bytes:
    """The notebook's JSON, in ASCII: a student may write half a surrogate pair, which no UTF-8 has."""
    text: str = nbformat.writes(notebook, ensure_ascii=True)
    return text.encode()


@dataclasses.dataclass(frozen=True)
class _Job:
    """What was asked for, and how the answer becomes a notebook again."""

    notebook: NotebookNode
    policy: Policy
    settings: Settings
    skip: frozenset[int]
    timeouts: Mapping[int, float | None]

    def _timeout(self, index: int) -> float | None:
        return self.timeouts.get(index, self.settings.timeout)

    def _runs(self, index: int) -> bool:
        return index not in self.skip and _is_code(self.notebook.cells[index])

    def for_driver(self) -> dict[str, Any]:
        cells = []
        for index, cell in enumerate(self.notebook.cells):
            runs = self._runs(index)
            timeout = self._timeout(index)
            cells.append({"source": cell.source if runs else "", "run": runs, "timeout": timeout})
        return {"cells": cells, "settings": self.settings.for_driver()}

    def finish(self, outcome: Outcome) -> Execution:
        """The executed notebook and its report. Raises `SandboxError` for a document that cannot be used."""
        kernel, limits = outcome.kernel, list[str]()
        result: dict[str, Any] = {"cells": {}}
        try:
            if outcome.document is None:
                raise outputs.TooMuchError("bytes")
            result = outputs.parse_document(outcome.document)
        except outputs.TooMuchError:
            limits.append("output")
        if kernel.limit:
            limits.append(kernel.limit)
        notebook, cells, cause = self._merge(result, kernel, limits)
        ended, message = "finished", ""
        if any(ending in _FINAL for ending in cells.values()):
            first = next(ending for ending in cells.values() if ending in _FINAL)
            name = {Ended.STUCK: "timeout", Ended.NOT_RUN: "output"}.get(first, str(first))
            ended, message = kernel.limit or name, cause
        report = ExecutionReport(
            ended=ended,
            message=message,
            limits=tuple(dict.fromkeys(limits)),
            cells=cells,
            wall_seconds=kernel.wall_seconds,
            cpu_seconds=kernel.cpu_seconds,
            memory_peak_bytes=kernel.memory_peak_bytes,
            tier=kernel.tier,
            start=outcome.start,
            layers=kernel.layers,
            gaps=kernel.gaps,
        )
        return Execution(notebook, report)

    def _merge(
        self, result: Mapping[str, Any], kernel: Report, limits: list[str]
    ) -> tuple[NotebookNode, dict[int, Ended], str]:
        """The caller's notebook with the outputs from the document; a cell that did not run has an error.

        Also how each cell ended, and what kept later ones from running, in words.
        """
        notebook = copy.deepcopy(self.notebook)
        cells: dict[int, Ended] = {}
        where, cause = "its outputs", explain_limit("output", self.policy)
        for index, cell in enumerate(notebook.cells):
            if cell.cell_type == "code":  # a blank one, too: nothing of earlier runs may be scored
                cell.outputs, cell.execution_count = [], None
            if not self._runs(index):
                continue
            record = result["cells"].get(index)
            if record is None:
                cells[index] = Ended.NOT_RUN
                cell.outputs = [outputs.error("NotRunError", f"This cell was not run, because of {where}: {cause}.")]
                continue
            ended = Ended(record["ended"])
            cells[index] = ended
            cell.outputs, cell.execution_count = record["outputs"], record["execution_count"]
            if record["timing"] and self.settings.record_timing:
                cell.metadata["execution"] = record["timing"]
            if record["cut"]:
                limits.append("output")
                cell.outputs.append(outputs.notice(self.policy.limits))
            limits += _name_refusals(cell.outputs, self.policy)
            if ended in {Ended.TIMEOUT, Ended.STUCK}:
                limits.append("timeout")
            if ended not in {Ended.OK, Ended.TIMEOUT}:
                where, cause = f"cell {index + 1} of the notebook", _cause(ended, kernel)
                cell.outputs += _explain_cell(ended, cause, self.settings, self._timeout(index), cell.outputs)
        if result.get("language_info"):
            notebook.metadata["language_info"] = result["language_info"]
        if outputs.is_widget_state(result.get("widgets")):
            notebook.metadata["widgets"] = result["widgets"]
        try:
            # Only what is new: how valid the rest is was the caller's to judge.
            new = new_notebook()
            for index in cells:
                new.cells.append(new_code_cell())
                new.cells[-1].outputs = notebook.cells[index].outputs
            nbformat.validate(new)
        except (nbformat.ValidationError, RecursionError) as error:
            raise SandboxError("driver", f"its document makes an invalid notebook: {str(error)[:200]}") from error
        return notebook, cells, cause


_FINAL = frozenset({Ended.KERNEL_DIED, Ended.STUCK, Ended.STOPPED, Ended.NOT_RUN})
"""Endings after which no further cell could run."""


_REFUSALS = {
    "memory": re.compile(r"MemoryError"),
    "files": re.compile(r"\[Errno (27|28|122)\]"),  # EFBIG, ENOSPC, EDQUOT
    "open_files": re.compile(r"\[Errno 24\]"),  # EMFILE
    "processes": re.compile(r"BlockingIOError: \[Errno 11\]|can't start new thread"),  # fork(2): EAGAIN
}
"""How Python tells of a limit that refused something and ended nothing."""


def _name_refusals(cell_outputs: Sequence[NotebookNode], policy: Policy) -> list[str]:
    """Limits that errors of a cell tell of, by the cell's own word; each such error says in the end which it was."""
    found = []
    for output in cell_outputs:
        if output.output_type == "error":
            words = f"{output.ename}: {output.evalue}"
            for limit in (name for name, pattern in _REFUSALS.items() if pattern.search(words)):
                found.append(limit)
                output.traceback = [*output.traceback, f"isolate: {explain_limit(limit, policy)}"]
    return found


def _is_code(cell: NotebookNode) -> bool:
    return bool(cell.cell_type == "code" and cell.source.strip())


def _cause(ended: Ended, kernel: Report) -> str:
    if ended is Ended.STOPPED:
        return "execution stops at the first error (allow_errors)"
    if ended in {Ended.IOPUB_TIMEOUT, Ended.ODD_MESSAGE, Ended.LOST}:
        return "its outputs were lost"
    if kernel.ended == "exited":
        return f"the kernel ended by itself with exit code {kernel.exit_code} (os._exit, exit or quit?)"
    if kernel.ended == "killed":
        return "the cell did not end in time and did not react to an interrupt, so the kernel was killed"
    if kernel.ended == "signal":
        return f"the kernel crashed: {kernel.message}"
    return kernel.message


def _explain_cell(
    ended: Ended, cause: str, settings: Settings, timeout: float | None, found: Sequence[Any]
) -> list[NotebookNode]:
    if ended is Ended.STOPPED and any(output.output_type == "error" for output in found):
        return []
    text = {
        Ended.KERNEL_DIED: ("KernelDiedError", f"The kernel ended while this cell ran: {cause}."),
        Ended.STUCK: (
            "CellTimeoutError",
            f"This cell did not end within its timeout of {timeout} s: {cause}.",
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


__all__ = ["Ended", "Execution", "ExecutionReport", "Kernel", "Nursery", "Settings", "execute", "to_bytes"]
