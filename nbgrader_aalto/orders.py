"""One execution as one value: everything that enters the rooms but the files, to be carried out in any thread.

An order's notebook is bare: sources of code cells, at their places, and nothing else of the document. So the same
order gives the same result whatever else a document holds, and outputs go back by the cells' places.
Refuses to know nbgrader, its gradebook, and where files come from.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from nbformat import NotebookNode
from nbformat.v4 import new_notebook

from isolate.notebook import Execution, Kernel, Nursery, Settings, execute
from isolate.policy import Policy

if TYPE_CHECKING:
    from grader_service.schemas import JobView


class Stop:
    """Says to executions in other threads that nobody wants any result any more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._means: list[Callable[[], None]] = []
        self._requested = False

    @property
    def requested(self) -> bool:
        return self._requested

    def request(self) -> None:
        """Returns at once; each execution that is under way is ended by its own means, in a thread of its own."""
        with self._lock:
            if self._requested:
                return
            self._requested = True
            means = list(self._means)
        for end in means:
            threading.Thread(target=end, name="stop", daemon=True).start()

    @contextlib.contextmanager
    def by(self, end: Callable[[], None]) -> Iterator[None]:
        """While inside, a request calls `end`; at once, if it came before."""
        with self._lock:
            self._means.append(end)
            late = self._requested
        try:
            if late:
                threading.Thread(target=end, name="stop", daemon=True).start()
            yield
        finally:
            with self._lock:
                self._means.remove(end)


@dataclasses.dataclass(frozen=True)
class LocalOrder:
    """To be executed on this machine."""

    notebook: NotebookNode
    kernel: Kernel
    policy: Policy
    settings: Settings
    skip: frozenset[int]
    timeouts: Mapping[int, float | None]
    tell: Callable[[int, str], None]
    """Called with a cell's index and what happens to it."""
    warm: Nursery | None = None

    @functools.cached_property
    def key(self) -> str:
        """Equal for two orders only if the same enters the rooms, the files apart."""
        rooms = [dataclasses.asdict(part) for part in (self.kernel, self.policy, self.settings)]
        values = [_cells(self.notebook), *rooms, self.warm is not None]
        return _digest([*values, sorted(self.skip), sorted(self.timeouts.items())])

    def run(self, files: IO[bytes], keep: IO[bytes], stop: Stop | None = None) -> Execution:
        """As `isolate.notebook.execute`. With `stop`, an early end is a `SandboxError`, too."""
        with _stoppable(stop):
            return execute(
                self.notebook,
                self.kernel,
                self.policy,
                self.settings,
                files=files,
                keep=keep,
                skip=self.skip,
                timeouts=self.timeouts,
                progress=self.tell,
                warm=self.warm,
            )


@dataclasses.dataclass(frozen=True)
class ServiceOrder:
    """To be executed by a grading service."""

    notebook: NotebookNode
    url: str
    token_file: str
    course_group: int | None
    plain_http: bool
    course: str
    asked: Mapping[str, Any]
    """The fields of a `grader_service.schemas.Submission`."""
    tell: Callable[["JobView"], None]

    @functools.cached_property
    def key(self) -> str:
        """As of a `LocalOrder`."""
        return _digest([_cells(self.notebook), self.url, self.token_file, self.course_group, self.course, self.asked])

    def run(self, files: IO[bytes], keep: IO[bytes], stop: Stop | None = None) -> Execution:
        """As of a `LocalOrder`; a job that nobody wants any more is cancelled."""
        from nbgrader_aalto import remote  # httpx and pydantic: only those who use the service pay

        with remote.connect(self.url, self.token_file, self.course_group, self.plain_http) as client:
            return remote.execute(client, self.course, self.asked, self.notebook, files, keep, self.tell, stop)


Order = LocalOrder | ServiceOrder


@dataclasses.dataclass(frozen=True)
class Result:
    """An execution, with the work directory as it was left (empty: nothing could be kept)."""

    execution: Execution
    keep: IO[bytes]


def carry_out(order: Order, files: IO[bytes], stop: Stop | None = None) -> Result:
    """Starting with this archive of files. Raises `SandboxError`."""
    keep: IO[bytes] = tempfile.TemporaryFile()
    try:
        return Result(order.run(files, keep, stop), keep)
    except BaseException:
        keep.close()
        raise


def bare(notebook: NotebookNode) -> NotebookNode:
    """The code cells' sources at their places, in a notebook of their own; other cells are there and empty."""
    made = new_notebook(nbformat_minor=4)  # the last one without ids of cells, which would be random
    for cell in notebook.cells:
        is_code = cell.cell_type == "code"
        new: dict[str, Any] = {
            "cell_type": "code" if is_code else "raw",
            "metadata": {},
            "source": cell.source if is_code else "",
        }
        made.cells.append(_node({**new, "outputs": [], "execution_count": None} if is_code else new))
    return made


def _node(values: Mapping[str, Any]) -> NotebookNode:
    return NotebookNode({**values, "metadata": NotebookNode()})


def take_outputs(notebook: NotebookNode, executed: NotebookNode) -> NotebookNode:
    """Put into `notebook`, and return, what the execution of its bare one gave."""
    for cell, done in zip(notebook.cells, executed.cells, strict=True):
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = done.outputs, done.execution_count
            if "execution" in done.metadata:
                cell.metadata["execution"] = done.metadata["execution"]
    for name in ("language_info", "widgets"):
        if name in executed.metadata:
            notebook.metadata[name] = executed.metadata[name]
    return notebook


def digest_of(file: IO[bytes]) -> str:
    """Of all bytes of a file that nobody else reads at the same time; it is rewound."""
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    file.seek(0)
    return digest


def another(file: IO[bytes]) -> IO[bytes]:
    """The same file, opened anew, with an offset of its own; it may have no name any more. proc(5), /proc/pid/fd"""
    file.flush()
    return open(f"/proc/self/fd/{file.fileno()}", "rb")


def _cells(notebook: NotebookNode) -> list[Any]:
    return [[cell.cell_type, cell.source] for cell in notebook.cells]


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: object) -> Any:
    """What JSON has no form for. Raises `TypeError`: a value of unknown form must not make two orders equal."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is no part of an order")


@contextlib.contextmanager
def _stoppable(stop: Stop | None) -> Iterator[None]:
    """A request ends what this thread executes here."""
    if stop is None:
        yield
        return
    over, thread = threading.Event(), threading.get_native_id()

    def end() -> None:
        while not over.is_set():
            _kill_children(thread)
            over.wait(0.02)

    try:
        with stop.by(end):
            yield
    finally:
        over.set()


def _kill_children(thread: int) -> None:
    """The launchers, of sandboxes and templates, that this thread started; all below them end with them.

    proc(5), /proc/pid/task/tid/children. A pid counts if it is still in the list when we hold a descriptor of it.
    """
    for pid in _children(thread):
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            try:
                if pid in _children(thread):
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            finally:
                os.close(descriptor)


def _children(thread: int) -> list[int]:
    try:
        return [int(pid) for pid in Path(f"/proc/self/task/{thread}/children").read_text(encoding="ascii").split()]
    except OSError:
        return []
