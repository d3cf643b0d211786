"""`isolate shell`: a shell in a sandbox, for looking around.

The terminal is the room's own (`Command.terminal`), so job control, window size and `tty` work as everywhere and
nothing inside holds the person's terminal. This process copies keys and screen between the two, with the person's
terminal in raw mode; whatever happens, it is set back.
"""

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import termios
import tty
from collections.abc import Iterator, Sequence
from types import FrameType

from isolate.policy import TIERS, WORK, Bind, Policy, Report, SandboxError
from isolate.sandbox import Command, Sandbox

_BLOCK_BYTES = 1 << 16
_KEYBOARD, _SCREEN = 0, 1
_SYSTEM_PLACES = ("/bin/", "/usr/bin/")


def shell() -> str:
    """bash, or the person's own if it is one of the system's, or sh."""
    own = os.environ.get("SHELL", "")
    candidates = ["/bin/bash", *([own] if own.startswith(_SYSTEM_PLACES) else [])]
    return next((name for name in candidates if os.path.exists(name)), "/bin/sh")


def variables() -> dict[str, str]:
    """By these programs know the terminal, and the person knows where they are."""
    return {"TERM": os.environ.get("TERM", "dumb"), "SHELL": shell(), "PS1": r"(sandbox) \w\$ "}


def banner(read_only: Sequence[Bind], writable: Sequence[Bind], files_bytes: int) -> str:
    """One line: what is visible besides the system's programs, by what the person named."""
    words = ["the system's programs"]
    words += [f"{bind.target} (read-only)" for bind in read_only]
    words += [f"{bind.target} (writable: the real files)" for bind in writable]
    memory = f"{WORK}, HOME and /tmp (empty, {files_bytes >> 20} MiB of memory)"
    return f"isolate: a sandbox with {', '.join(words)}, {memory}; no network. Ctrl-D leaves."


def run(policy: Policy, cwd: str) -> Report:
    """Until the shell ends. Raises `SandboxError`."""
    if not (os.isatty(_KEYBOARD) and os.isatty(_SCREEN)):
        raise SandboxError("terminal", "stdin and stdout are not a terminal", "use: isolate run -- CMD...")
    if policy.tier != TIERS[0]:
        raise SandboxError(
            "terminal", f"the {policy.tier} tier has no terminal of its own", "use: isolate run -- CMD..."
        )
    quiet = subprocess.DEVNULL
    command = Command([shell()], cwd=cwd, terminal=True, stdin=quiet, stdout=quiet, stderr=quiet)
    with Sandbox(policy, command) as sandbox, _ended_by_signals(sandbox):
        assert sandbox.shared is not None
        with _raw_terminal(), _window_follows(sandbox.shared):
            _copy(sandbox, sandbox.shared)
        return sandbox.report()


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    """Keys go inside as they are; what the person's terminal was set to comes back. termios(3)"""
    before = termios.tcgetattr(_KEYBOARD)
    try:
        tty.setraw(_KEYBOARD)
        yield
    finally:
        with contextlib.suppress(termios.error):  # it may be gone
            termios.tcsetattr(_KEYBOARD, termios.TCSADRAIN, before)


@contextlib.contextmanager
def _window_follows(terminal: int) -> Iterator[None]:
    """The inner terminal has the outer one's size, now and after each change. ioctl_tty(2)"""

    def take(number: int = 0, frame: FrameType | None = None) -> None:
        with contextlib.suppress(OSError):
            size = fcntl.ioctl(_KEYBOARD, termios.TIOCGWINSZ, b"\0" * 8)
            fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)

    before = signal.signal(signal.SIGWINCH, take)
    try:
        take()
        yield
    finally:
        signal.signal(signal.SIGWINCH, before)


@contextlib.contextmanager
def _ended_by_signals(sandbox: Sandbox) -> Iterator[None]:
    """A signal from outside ends the sandbox, and then us in the ordinary way, with the terminal set back."""
    before = {
        number: signal.signal(number, lambda *_: sandbox.send("kill"))
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _copy(sandbox: Sandbox, terminal: int) -> None:
    """Keys in and screen out until the sandbox has ended and all it wrote is shown."""
    os.set_blocking(terminal, False)
    keys = b""  # not taken by the inner terminal yet; no more are read until they are
    poll = select.poll()
    poll.register(sandbox, select.POLLIN)
    poll.register(terminal, select.POLLIN)
    poll.register(_KEYBOARD, select.POLLIN)
    while not sandbox.finished:
        for descriptor, event in poll.poll():
            if descriptor == sandbox.fileno():
                sandbox.receive()
            elif descriptor == _KEYBOARD:
                keys = _read_keys() if event & select.POLLIN else b""
                if keys:
                    poll.register(terminal, select.POLLIN | select.POLLOUT)
                else:
                    sandbox.send("kill")  # the person's terminal is gone
                poll.unregister(_KEYBOARD)
            elif event & select.POLLOUT and (keys := _type(terminal, keys)) == b"":
                poll.register(terminal, select.POLLIN)
                poll.register(_KEYBOARD, select.POLLIN)
            elif event & (select.POLLIN | select.POLLHUP) and not _show(terminal) and event & select.POLLHUP:
                poll.unregister(terminal)
    while _show(terminal):
        pass


def _read_keys() -> bytes:
    """Empty when the terminal is gone."""
    with contextlib.suppress(OSError):
        return os.read(_KEYBOARD, _BLOCK_BYTES)
    return b""


def _type(terminal: int, keys: bytes) -> bytes:
    """What is left of the keys."""
    with contextlib.suppress(BlockingIOError):
        return keys[os.write(terminal, keys) :]
    return keys


def _show(terminal: int) -> bool:
    """Whether there was something to show. EIO: nobody inside holds the terminal any more. pty(7)"""
    try:
        block = os.read(terminal, _BLOCK_BYTES)
    except OSError:
        return False
    while block:
        block = block[os.write(_SCREEN, block) :]
    return True
