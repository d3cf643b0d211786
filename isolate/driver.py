"""The driver room's program: speaks the Jupyter protocol with a kernel that may be hostile.

It runs inside a sandbox of its own with no file of anybody's, because whoever parses what student code sends
is a target: a print loop alone fills the memory of an ordinary client. Sockets are reached through the
descriptor of a directory; the result is one JSON document on a pipe. Losing this process loses one notebook.

nbclient executes the cells, as nbgrader's own Execute does, so that outputs, display updates, widgets and
timeouts mean the same. What is different: input is counted before it is parsed and cut at a budget; nothing
polls; a cell that ends badly is recorded and never raises out of here.

Arguments: numbers of the descriptors of the sockets' directory, the result, the progress, the words.
Standard input: the job (see `isolate.notebook`).
"""

import asyncio
import contextlib
import json
import os
import queue
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from isolate import lean  # noqa: F401

# isort: split
import nbformat
import zmq
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat.validator import NotebookValidationError
from traitlets import Type

from isolate.outputs import MAX_NESTING, MAX_WIDGET_BYTES, OddDocument, clean_count, clean_outputs, nesting

PROGRESS = struct.Struct("<II")
"""A progress record: cell index, state. Fixed in size, so that its reader needs no parser."""
STARTED, FINISHED, INTERRUPT, KILL, READY = 1, 2, 3, 4, 5
OUT_OF_MEMORY_CODE = 77
"""Exit code when the kernel's messages did not fit into the driver's memory."""

_MAX_MESSAGE_BYTES = 16 * 1024 * 1024
ODD_MESSAGE = (
    *(ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError),
    *(nbformat.ValidationError, NotebookValidationError),
)
"""What a message that breaks the protocol's rules can raise in jupyter_client, nbclient and nbformat."""
_MAX_INTERRUPTS = 3
_MAX_LAST_WORDS = 10_000
"""How often to look for messages of a dead kernel, which nobody may be reading any more."""
_RESERVE_BYTES = 512 * 1024


class Budget:
    """How many bytes of output are still wanted, for this cell and for the notebook.

    Errors, results and stderr decide over points, so a reserve is theirs when the rest is used up: printing a lot
    must not make a failure disappear. When even one of these had to be dropped, the cell's outputs are `lost`.
    """

    def __init__(self, cell_bytes: int, total_bytes: int) -> None:
        self._cell_bytes, self._total_left = cell_bytes, total_bytes
        self.start_cell()

    def start_cell(self) -> None:
        self._left, self._reserve = min(self._cell_bytes, self._total_left), _RESERVE_BYTES
        self.cut = self.lost = False

    def take(self, size: int, *, decides: bool) -> int:
        """How many bytes of a message of this size are still wanted: all, the first ones, or none.

        After the first that was not wanted whole, only what decides is.
        """
        if not self.cut and size <= self._left:
            self._left -= size
            self._total_left -= size
            return size
        head, self.cut = 0 if self.cut else self._left, True
        if not decides:
            self._total_left -= head
            return head
        if size <= self._reserve:
            self._reserve -= size
            return size
        self.lost = True
        return 0


def decides(header: bytes, content: bytes) -> bool:
    """Whether a message may decide over points, told without parsing it; in doubt, it may."""
    kinds = (b'"error"', b'"execute_result"')
    return any(kind in header for kind in kinds) or (b'"stream"' in header and b'"stderr"' in content)


class GuardedChannel(AsyncZMQSocketChannel):
    """A channel that drops what is no message of this protocol, and what is over the budget before parsing it."""

    budget: Budget | None = None

    async def get_msg(self, timeout: float | None = None) -> dict[str, Any]:
        """The next message; raises `queue.Empty` after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if deadline is not None and not await self.socket.poll(max(0, int((deadline - time.monotonic()) * 1000))):
                raise queue.Empty
            message = self._parse(await self.socket.recv_multipart())
            if message is not None:
                return message

    def _parse(self, frames: list[bytes]) -> dict[str, Any] | None:
        try:
            _, parts = self.session.feed_identities(frames)
            is_status = b'"status"' in parts[1] and len(parts[4]) < 1024
            size = sum(map(len, frames))
            wanted = size
            if self.budget and not is_status:
                wanted = self.budget.take(size, decides=decides(parts[1], parts[4]))
            if not wanted:
                return None
            message: dict[str, Any] = self.session.deserialize(parts, copy=True)
            if wanted < size:
                if message["header"]["msg_type"] != "stream":
                    return None  # half an image is none
                message["content"]["text"] = message["content"]["text"][:wanted]
        except ODD_MESSAGE:
            return None
        well_formed = isinstance(message.get("content"), dict) and isinstance(message.get("parent_header"), dict)
        return message if well_formed and nesting(message["content"]) <= MAX_NESTING else None


class RoomClient(AsyncKernelClient):
    """A client whose kernel lives in another room: whether it is alive is the supervisor's word."""

    iopub_channel_class = Type(GuardedChannel)
    shell_channel_class = Type(GuardedChannel)
    alive = True

    def _create_connected_socket(self, channel: str, identity: bytes | None = None) -> Any:
        socket_type = {
            "shell": zmq.DEALER,
            "control": zmq.DEALER,
            "stdin": zmq.DEALER,
            "iopub": zmq.SUB,
            "hb": zmq.REQ,
        }
        sock = self.context.socket(socket_type[channel])
        sock.linger = 0
        sock.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES)
        sock.setsockopt(zmq.RECONNECT_IVL, 5)
        if identity:
            sock.identity = identity
        sock.connect(self._make_url(channel))
        return sock

    async def is_alive(self) -> bool:
        return self.alive


class RoomKernel:
    """What nbclient wants of a kernel manager: here, words to the supervisor."""

    def __init__(self, driver: "Driver") -> None:
        self._driver = driver
        self._interrupts = 0

    @property
    def interrupted(self) -> bool:
        return self._interrupts > 0

    def start_cell(self) -> None:
        self._interrupts = 0

    async def interrupt_kernel(self) -> None:
        self._interrupts += 1
        if self._interrupts > _MAX_INTERRUPTS:
            self._driver.tell(KILL)
            return
        if self._driver.job["interrupt_mode"] == "message":
            client = self._driver.client
            client.control_channel.send(client.session.msg("interrupt_request", {}))
        else:
            self._driver.tell(INTERRUPT)


class CellRunner(NotebookClient):
    """nbclient's execution of one cell, with nbgrader's rule that an error is always recorded in the cell."""

    def on_error_in_reply(self, *, cell: Any, cell_index: int, execute_reply: Mapping[str, Any]) -> None:
        """As nbgrader.preprocessors.Execute.on_cell_executed: also where `showtraceback` was disabled."""
        content = execute_reply["content"]
        if content.get("status") != "error":
            return
        name = str(content.get("ename", "Error"))
        if any(output.output_type == "error" and output.ename == name for output in cell.outputs):
            return
        traceback = [str(line) for line in content.get("traceback", [])]
        cell.outputs.append(
            nbformat.v4.new_output(
                "error",
                ename=name,
                evalue=str(content.get("evalue", "")),
                traceback=traceback or ["ERROR: An error occurred while showtraceback was disabled"],
            )
        )


class Driver:
    """Runs one job and keeps its result."""

    def __init__(self, job: dict[str, Any], progress: int, words: int) -> None:
        self.job = job
        self._progress, self._words = progress, words
        self._cell = 0
        self.result: dict[str, Any] = {"cells": {}, "language_info": None, "widgets": None}
        self.client = RoomClient()
        self.client.load_connection_info(job["connection"])
        self.client.allow_stdin = False
        self.budget = Budget(job["cell_output_bytes"], job["output_bytes"])
        self.kernel = RoomKernel(self)
        self.runner = self._make_runner()

    def _make_runner(self) -> CellRunner:
        settings = self.job["settings"]
        cells = []
        for cell in self.job["cells"]:
            new = nbformat.v4.new_code_cell(cell["source"])
            new.metadata["timeout"] = cell["timeout"]
            cells.append(new)
        notebook = nbformat.v4.new_notebook(cells=cells)
        runner = CellRunner(notebook, km=self.kernel, **settings)
        runner.timeout_func = lambda cell: cell.metadata["timeout"]
        runner.on_cell_executed = runner.on_error_in_reply
        return runner

    def tell(self, state: int) -> None:
        os.write(self._progress, PROGRESS.pack(self._cell, state))

    async def run(self) -> None:
        asyncio.get_running_loop().add_reader(self._words, self._hear)
        self.client.start_channels(shell=True, iopub=True, stdin=False, hb=False, control=True)
        self.client.iopub_channel.budget = self.budget
        self.budget.start_cell()
        try:
            self.result["language_info"] = await self._wait_until_ready()
            self.tell(READY)
            self.runner.kc = self.client
            self.runner.reset_execution_trackers()
            for index, cell in enumerate(self.runner.nb.cells):
                self._cell = index
                if not self.job["cells"][index]["run"]:
                    continue
                if not self.client.alive or not await self._run_cell(index, cell):
                    break
            self._keep_widget_state()
        finally:
            self.client.stop_channels()

    def _hear(self) -> None:
        """The supervisor says that the kernel has ended: what it still sent is read, then its cell ends."""
        os.read(self._words, 64)
        asyncio.get_running_loop().remove_reader(self._words)
        self._burial = asyncio.ensure_future(self._bury())  # the loop alone would not keep it

    async def _bury(self) -> None:
        """On a busy machine messages come late: the kernel is dead when a tenth of a second brought none."""
        with contextlib.suppress(zmq.ZMQError):
            for _ in range(_MAX_LAST_WORDS):
                if not await self.client.iopub_channel.socket.poll(100):
                    break
                await asyncio.sleep(0)
        self.client.alive = False
        task = self.runner.task_poll_for_reply
        if task is not None:
            task.cancel()

    async def _wait_until_ready(self) -> dict[str, Any]:
        """Ask who the kernel is until both channels have answered: no fixed sleeps, no welcome relied upon."""
        info: dict[str, Any] | None = None
        while self.client.alive:
            self.client.kernel_info()
            if info is None and await self.client.shell_channel.socket.poll(1000):
                reply = await self.client.shell_channel.get_msg()
                if reply["header"]["msg_type"] == "kernel_info_reply":
                    told = reply["content"].get("language_info")
                    info = told if isinstance(told, dict) else {}
            if info is not None and await self.client.iopub_channel.socket.poll(500):
                return info
        raise DeadKernelError("the kernel ended before it was ready")

    async def _reconnected(self) -> bool:
        """Whether outputs flow again through a new socket.

        libzmq closes one for good when a message is over the size that it allows.
        """
        self.client.iopub_channel.close()
        self.client._iopub_channel = None
        self.client.iopub_channel.budget = self.budget
        try:
            await asyncio.wait_for(self._wait_until_ready(), timeout=10)
        except (TimeoutError, DeadKernelError):
            return False
        return True

    async def _run_cell(self, index: int, cell: Any) -> bool:
        """Whether the kernel can go on. What happened is in the result."""
        record: dict[str, Any] = {"ended": "ok"}
        self.budget.start_cell()
        self.kernel.start_cell()
        self.tell(STARTED)
        started = time.monotonic()
        go_on = True
        try:
            await self.runner.async_execute_cell(cell, index)
        except DeadKernelError:
            record["ended"], go_on = "kernel died", False
        except CellTimeoutError:
            # Either the cell's own time is up and may not be interrupted, or its outputs did not end.
            if self.kernel.interrupted or not self.runner.interrupt_on_timeout:
                record["ended"], go_on = "stuck", False
                self.tell(KILL)
            else:
                record["ended"] = "iopub timeout"
                go_on = await self._reconnected()
        except CellExecutionError:
            record["ended"], go_on = "stopped", False
        except ODD_MESSAGE:
            record["ended"] = "odd message"
        record["seconds"] = time.monotonic() - started
        if record["ended"] == "ok":
            record["ended"] = "timeout" if self.kernel.interrupted else "lost" if self.budget.lost else "ok"
        record["cut"] = self.budget.cut
        # Later cells may update earlier displays, so outputs are gathered at the end.
        self.result["cells"][index] = record
        if go_on:
            self.tell(FINISHED)
        return go_on

    def _keep_widget_state(self) -> None:
        if not self.runner.store_widget_state:
            return
        self.runner.set_widgets_metadata()
        widgets = self.runner.nb.metadata.get("widgets")
        if widgets and len(json.dumps(widgets)) <= MAX_WIDGET_BYTES:
            self.result["widgets"] = widgets

    def document(self) -> bytes:
        """The result, in which every string can be written as UTF-8 and no number is NaN.

        Within `document_bytes`: what takes far more room as JSON than it took as a message (control characters)
        goes, the largest cell first.
        """
        for index, cell in enumerate(self.runner.nb.cells):
            record = self.result["cells"].get(index)
            if record is not None:
                try:
                    record["outputs"] = clean_outputs(_finite(cell.outputs))
                except OddDocument:
                    record.update(ended="odd message", outputs=[])
                record["execution_count"] = clean_count(cell.execution_count)
                record["timing"] = cell.metadata.get("execution")
        text = _encode(self.result)
        while len(text) > self.job["document_bytes"]:
            largest = max(self.result["cells"].values(), key=lambda record: len(_encode(record["outputs"])))
            largest["outputs"] = [output for output in largest["outputs"] if output["output_type"] == "error"][:1]
            largest["cut"] = True
            if len(_encode(largest["outputs"])) > self.job["document_bytes"] // 4:
                largest["outputs"] = [nbformat.v4.new_output("error", ename="Error", evalue="", traceback=[])]
            shorter = _encode(self.result)
            if len(shorter) >= len(text):
                break
            text = shorter
        return text


def _encode(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False, ensure_ascii=False).encode("utf-8", "replace")


def _finite(value: Any) -> Any:
    """NaN and infinities as null, as nbformat and browsers want them."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value


def _blocks(data: bytes) -> Iterator[memoryview]:
    view = memoryview(data)
    for start in range(0, len(view), 1 << 16):
        yield view[start : start + (1 << 16)]


def main(sockets: int, result: int, progress: int, words: int) -> int:
    """Run the job on standard input; exit code 0 when a document was written."""
    os.fchdir(sockets)
    try:
        driver = Driver(json.load(sys.stdin), progress, words)
        try:
            asyncio.run(driver.run())
        except DeadKernelError:
            driver.result["dead_before_ready"] = True
        for block in _blocks(driver.document()):
            while block:
                block = block[os.write(result, block) :]
    except MemoryError:
        os._exit(OUT_OF_MEMORY_CODE)
    return 0
