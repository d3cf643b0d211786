"""`isolate kernel`: a sandboxed kernel for kernelspecs whose argv names a wrapper around the kernel's command.

Theory of operation
-------------------
The client wrote a connection file with TCP ports and expects a kernel to listen there. This process listens in its
place, on exactly the address of the file, and starts the kernel in a room without a network, with a connection file
of its own that names unix sockets (`isolate.kernels`):

    client ==TCP==> this process ==unix sockets==> kernel in its room

Bytes are copied and never looked at: signatures and encryption are between the client and the kernel. What is under
way is bounded, by asyncio's buffers per connection and by the number of connections; whoever does not read is not
read from. A connection that comes before the kernel has bound its sockets is held.

Who ends what: SIGINT interrupts the kernel. SIGTERM asks it to end, a second one kills it. When the kernel ends, what
it said last is delivered, and this process ends with its exit code. When this process is killed, or when the client
that started it (JPY_PARENT_PID) is gone, the launcher ends the kernel.
"""

import asyncio
import contextlib
import dataclasses
import functools
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from isolate.environment import find_executable
from isolate.kernels import CHANNELS, CONNECTION_FILE, Door, Ending, RunningKernel, channel_path, kernel_command
from isolate.policy import WORK, Policy, SandboxError
from isolate.sandbox import Command

_BLOCK_BYTES = 1 << 16
_MAX_CONNECTIONS = 256
_MAX_FILE_BYTES = 1 << 16
_RETRY_SECONDS = 0.02
_LAST_WORDS_SECONDS = 2.0
_PASSED_ON = ("key", "signature_scheme", "kernel_name", "curve_publickey", "curve_secretkey")


@dataclasses.dataclass(frozen=True)
class ConnectionFile:
    """Where the client will knock, and what the kernel has to know to answer."""

    path: Path
    ip: str
    ports: Mapping[str, int]
    """Channel -> TCP port."""
    secrets: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> "ConnectionFile":
        """Raises `SandboxError`. Format: jupyter_client's documentation, "Connection files"."""
        try:
            with path.open("rb") as file:
                raw = json.loads(file.read(_MAX_FILE_BYTES))
            return cls._checked(path, raw)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise SandboxError("connection file", f"{path}: {type(error).__name__}: {error}") from error

    @classmethod
    def _checked(cls, path: Path, raw: Any) -> "ConnectionFile":
        if not isinstance(raw, dict):
            raise ValueError("it is no table")
        if raw.get("transport", "tcp") != "tcp":
            raise ValueError(f"the transport is {raw['transport']!r}; only tcp can be relayed")
        ports = {channel: raw[f"{channel}_port"] for channel in CHANNELS}
        for channel, port in ports.items():
            if type(port) is not int or not 0 < port < 1 << 16:
                raise ValueError(f"{channel}_port is {port!r}, which is not a port")
        if not isinstance(raw["ip"], str) or not raw["ip"]:
            raise ValueError(f"the ip is {raw['ip']!r}")
        return cls(path, raw["ip"], ports, {name: str(raw[name]) for name in _PASSED_ON if name in raw})

    def inside(self, word: str) -> str:
        """A word of the kernel's command, with the file's place inside."""
        return CONNECTION_FILE if self._is_meant_by(word) else word.replace("{connection_file}", CONNECTION_FILE)

    def _is_meant_by(self, word: str) -> bool:
        return word == str(self.path) or os.path.abspath(word) == os.path.abspath(self.path)


class Relay:
    """Listens where the client expects the kernel, and copies bytes to and from its sockets."""

    def __init__(self, connect_to: Callable[[str], str], kernel_lives: Callable[[], bool]) -> None:
        self._connect_to, self._kernel_lives = connect_to, kernel_lives
        self._connections: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def listening(self, ip: str, ports: Mapping[str, int]) -> AsyncIterator[None]:
        """Raises `OSError` when a port is taken."""
        async with contextlib.AsyncExitStack() as stack:
            for channel, port in ports.items():
                server = await asyncio.start_server(
                    functools.partial(self._accept, channel), ip, port, limit=_BLOCK_BYTES
                )
                stack.callback(server.close)
            yield
        await self._finish()

    def _accept(self, channel: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= _MAX_CONNECTIONS:
            writer.transport.abort()
            return
        task = asyncio.create_task(self._serve(channel, reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, channel: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            async with _closing(writer):
                theirs = await self._knock(self._connect_to(channel))
                if theirs is not None:
                    async with _closing(theirs[1]):
                        await _copy_both_ways((reader, writer), theirs)

    async def _knock(self, path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        """Connect to the kernel's socket as soon as it is there. There is no event for that."""
        while self._kernel_lives():
            try:
                return await asyncio.open_unix_connection(path, limit=_BLOCK_BYTES)
            except OSError:
                await asyncio.sleep(_RETRY_SECONDS)
        return None

    async def _finish(self) -> None:
        """The kernel has ended: deliver what it said last, to whoever still listens."""
        if self._connections:
            await asyncio.wait(self._connections, timeout=_LAST_WORDS_SECONDS)
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)


@contextlib.asynccontextmanager
async def _closing(writer: asyncio.StreamWriter) -> AsyncIterator[None]:
    """Closed with what is buffered delivered; cut off at an error or a cancellation."""
    try:
        yield
        writer.close()
        await writer.wait_closed()
    finally:
        writer.transport.abort()


_Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _copy_both_ways(client: _Stream, kernel: _Stream) -> None:
    """Until either side is done: in this protocol nobody closes one direction only."""
    ways = [
        asyncio.create_task(_copy(client[0], kernel[1])),
        asyncio.create_task(_copy(kernel[0], client[1])),
    ]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while block := await reader.read(_BLOCK_BYTES):
        writer.write(block)
        await writer.drain()


@dataclasses.dataclass(frozen=True)
class RelayedKernel:
    """What `isolate kernel` was asked to run."""

    file: ConnectionFile
    argv: Sequence[str]
    policy_for: Callable[[Path], Policy]
    cwd: str = WORK

    def prepare(self, door: Door) -> tuple[Policy, Command]:
        executable = find_executable(self.argv[0])
        policy = self.policy_for(executable)
        argv = [str(executable), *(self.file.inside(word) for word in self.argv[1:])]
        return policy, kernel_command(argv, door, self.file.secrets, policy, self.cwd)

    async def run(self) -> Ending:
        """Raises `SandboxError`, or `OSError` when a port is taken."""
        with contextlib.closing(Door()) as door:
            kernel = RunningKernel(lambda: self.prepare(door), door)
            relay = Relay(functools.partial(channel_path, door), lambda: not kernel.ended.done())
            try:
                with _signals_to(kernel), _ending_with_parent(kernel):
                    async with relay.listening(self.file.ip, self.file.ports):
                        await asyncio.wrap_future(kernel.started)
                        return await asyncio.wrap_future(kernel.ended)
            finally:
                kernel.send("kill")
                await asyncio.wrap_future(kernel.ended)


@contextlib.contextmanager
def _signals_to(kernel: RunningKernel) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    asked: list[int] = []

    def terminate() -> None:
        kernel.send("kill" if asked else "terminate")
        asked.append(signal.SIGTERM)

    loop.add_signal_handler(signal.SIGINT, kernel.send, "interrupt")
    loop.add_signal_handler(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def _ending_with_parent(kernel: RunningKernel) -> Iterator[None]:
    """When the client that started us is gone, nobody would ever end the kernel. pidfd_open(2)"""
    parent = os.environ.get("JPY_PARENT_PID", "")
    if not parent.isdecimal() or int(parent) <= 1:
        yield
        return
    try:
        descriptor = os.pidfd_open(int(parent))
    except ProcessLookupError:
        kernel.send("kill")
        yield
        return
    except OSError:  # a container's filter refuses the call: the client's own signal has to do
        yield
        return
    loop = asyncio.get_running_loop()

    def end() -> None:
        loop.remove_reader(descriptor)  # it stays readable
        kernel.send("kill")

    loop.add_reader(descriptor, end)
    try:
        yield
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def run(file: Path, argv: Sequence[str], policy_for: Callable[[Path], Policy], cwd: str = WORK) -> Ending:
    """Until the kernel has ended. Raises `SandboxError`, or `OSError` when a port is taken."""
    return asyncio.run(RelayedKernel(ConnectionFile.read(file), argv, policy_for, cwd).run())
