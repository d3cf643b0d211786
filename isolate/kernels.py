"""A kernel in one sandbox that somebody else's client speaks to: what the provisioner and the relay share.

There is no driver room here: the Jupyter client of a notebook server, of nbclient or of a terminal reads the
kernel's messages itself. It reaches them through unix sockets in a tiny directory that the kernel's room made and of
which this process holds a read-only mount (`Command.share_at`); nothing of it has a name on the host but
`/proc/PID/fd/N`. No symlink in it is followed.

`RunningKernel` has a thread of its own, so that neither an event loop nor a blocking client has to look after a
sandbox. It is a daemon thread: when this process ends, however that comes about, its end of the launcher's socket
closes, and the launcher ends the kernel. Refuses to know of kernelspecs and of ports.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import selectors
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from isolate.environment import environment_policy, home_files, without_working_directory
from isolate.policy import WORK, Limits, Policy, Report
from isolate.sandbox import Command, Sandbox, last_words

INTERACTIVE = Limits(wall_seconds=7 * 86_400.0, cpu_seconds=7 * 86_400.0)
"""What a kernel or a shell with a person in front of it gets unless told otherwise."""

CHANNELS = ("shell", "iopub", "stdin", "control", "hb")
PORTS: Mapping[str, int] = {f"{name}_port": port for port, name in enumerate(CHANNELS, start=1)}
"""Over unix sockets a port is the number at the end of a socket's name."""

_SOCKETS = "/run/kernel"
CONNECTION_FILE = f"{_SOCKETS}/connection.json"
"""Where a kernel finds its connection file, inside."""

_KEPT_WORDS_BYTES = 4096


class Door:
    """A number of a descriptor behind which the sockets of a kernel lie, and after a restart those of the next.

    Clients stay connected to a path over restarts, so the number must stay the same; and since numbers are used
    again, each door has a name of its own for its sockets.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._number: int | None = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self.name = f"k{secrets.token_hex(4)}"
        self.prefix = f"/proc/{os.getpid()}/fd/{self._number}/{self.name}"
        """On the host: a client's `ip`. At most 107 bytes with the port. unix(7)"""

    def open(self, directory: int) -> None:
        """Lead to this directory from now on."""
        with self._lock:
            if self._number is not None:
                os.dup2(directory, self._number, inheritable=False)

    def shut(self) -> None:
        """Lead nowhere, but keep the number."""
        nowhere = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.open(nowhere)
        finally:
            os.close(nowhere)

    def close(self) -> None:
        with self._lock:
            if self._number is not None:
                os.close(self._number)
            self._number = None


def kernel_policy(executable: Path, limits: Limits = INTERACTIVE) -> Policy:
    """The system and this program's environment, read-only."""
    return environment_policy([executable], limits=limits)


def kernel_command(
    argv: Sequence[str], door: Door, connection: Mapping[str, Any], policy: Policy, cwd: str = WORK
) -> Command:
    """A kernel behind this door. `connection` holds the key, and what else its connection file should say."""
    said = {**connection, "transport": "ipc", "ip": f"{_SOCKETS}/{door.name}", **PORTS}
    return Command(
        without_working_directory(argv),
        cwd=cwd,
        room_files={CONNECTION_FILE: json.dumps(said), **home_files(Path(argv[0]), policy.tier)},
        share_at=_SOCKETS,
    )


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a kernel ended. `exit_code` is as of `subprocess.Popen`; `problem` is empty unless a person should know."""

    exit_code: int
    problem: str = ""
    report: Report | None = None


class RunningKernel:
    """A kernel from its start to its end, which are futures that any thread or event loop can wait for."""

    def __init__(self, prepare: Callable[[], tuple[Policy, Command]], door: Door) -> None:
        self._prepare, self._door = prepare, door
        self._lock = threading.Lock()
        self._sandbox: Sandbox | None = None
        self._early: list[str] = []
        self._said = bytearray()
        self._asked_to_end = False
        self.started: Future[None] = Future()
        """Raises `SandboxError` when the sandbox could not be built."""
        self.ended: Future[Ending] = Future()
        """When nothing of it is left."""
        for future in (self.started, self.ended):
            future.set_running_or_notify_cancel()  # else who stops waiting would cancel it for everybody
        threading.Thread(target=self._run, name="isolate-kernel", daemon=True).start()

    def send(self, word: str) -> None:
        """`interrupt`, `terminate` or `kill`, also while it is being built. See `Sandbox.send`."""
        with self._lock:
            self._asked_to_end = self._asked_to_end or word != "interrupt"
            if self._sandbox is None:
                self._early.append(word)
            else:
                self._sandbox.send(word)

    def expect_end(self) -> None:
        """Somebody asked the kernel itself to end: whatever it then ends with is no problem."""
        self._asked_to_end = True

    def _run(self) -> None:
        try:
            report = self._keep(*self._prepare())
        except BaseException as error:  # noqa: BLE001  # whatever it is belongs to whoever waits
            if not self.started.done():
                self.started.set_exception(error)
            self.ended.set_result(Ending(-signal.SIGKILL, str(error)))
        else:
            self.ended.set_result(self._ending(report))

    def _keep(self, policy: Policy, command: Command) -> Report:
        """Start it, hear it, and come back when nothing is left."""
        reader, writer = os.pipe()
        with contextlib.ExitStack() as stack:
            words = stack.enter_context(open(reader, "rb", buffering=0))
            os.set_blocking(reader, False)
            with open(writer, "wb", buffering=0) as theirs:
                command = dataclasses.replace(command, stdout=theirs, stderr=theirs)
                sandbox = stack.enter_context(Sandbox(policy, command))
            stack.callback(self._let_go)
            assert sandbox.shared is not None
            self._door.open(sandbox.shared)
            stack.callback(self._door.shut)
            with self._lock:
                self._sandbox = sandbox
                for word in self._early:
                    sandbox.send(word)
            self.started.set_result(None)
            self._listen(sandbox, words.fileno())
            return sandbox.report()

    def _listen(self, sandbox: Sandbox, words: int) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(sandbox, selectors.EVENT_READ)
            selector.register(words, selectors.EVENT_READ)
            while not sandbox.finished:
                for key, _ in selector.select():
                    if key.fileobj is sandbox:
                        sandbox.receive()
                    elif not self._hear(words):
                        selector.unregister(words)
        self._hear(words)

    def _hear(self, words: int) -> bool:
        """Keep the last of what it wrote; whether there may be more. Never read by anything but people."""
        try:
            block = os.read(words, 1 << 16)
        except BlockingIOError:
            return True
        self._said += block
        del self._said[:-_KEPT_WORDS_BYTES]
        return bool(block)

    def _let_go(self) -> None:
        with self._lock:
            self._sandbox = None

    def _ending(self, report: Report) -> Ending:
        if report.ended == "exited" and report.exit_code is not None:
            code, problem = report.exit_code, f"it ended with exit code {report.exit_code}" if report.exit_code else ""
        else:
            code, problem = -(report.signal or signal.SIGKILL), report.message or "it was killed"
        if report.ended != "limit" and self._asked_to_end:
            problem = ""
        if problem and (said := last_words(self._said)):
            problem += f"; it said: {said}"
        return Ending(code, problem, report)


def channel_path(door: Door, channel: str) -> str:
    """The socket of one channel, on the host."""
    return f"{door.prefix}-{PORTS[f'{channel}_port']}"
