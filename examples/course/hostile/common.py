# ruff: noqa: F401
# Put in front of every hostile notebook: what the attacker knows, and how each attempt is recorded.
import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# submissions.py replaces the next line. The attacker is well informed: paths, ports and names of the demo.
KNOWN: dict = {}

if not KNOWN:
    raise SystemExit("These notebooks are run by demo.py, inside the sandbox. Do not run them by hand.")

MIB = 1024 * 1024
libc = ctypes.CDLL(None, use_errno=True)


def attempt(name: str) -> Callable[[Callable[[], str]], None]:
    """Run the decorated attack at once and print one line about it, with whatever it raises."""

    def run(attack: Callable[[], str]) -> None:
        try:
            said = attack()
        except Exception as error:  # noqa: BLE001 - an attacker takes every failure in his stride
            text = getattr(error, "strerror", None) or str(error)
            said = f"failed: {type(error).__name__} {text}"
        print(f"TRY {name}: {' '.join(said.split())[:300]}", flush=True)

    return run


def call(name: str, *arguments: object) -> int:
    """A libc function by name; raises OSError as Python's os would."""
    result = getattr(libc, name)(*arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def loot(data: bytes) -> str:
    """The canary tokens in data: proof that something was read."""
    found = sorted({token.decode() for token in re.findall(rb"canary-[a-z]+-[0-9a-f]{16}", data)})
    return f"got {' '.join(found)}" if found else f"read {len(data)} bytes without a token"


def in_child(work: Callable[[], str], seconds: float = 3.0) -> str:
    """Run work in a forked child, which may die of it, and return what it said."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            signal.alarm(int(seconds) + 1)
            said = work()
        except Exception as error:  # noqa: BLE001
            said = f"failed: {type(error).__name__} {getattr(error, 'strerror', None) or error}"
        with contextlib.suppress(OSError):
            os.write(writing, said.encode()[:1000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return said or f"failed: the child ended with {status}"


def name_process() -> None:
    """Give this process a name by which the demo finds it from outside."""
    libc.prctl(15, KNOWN["marker"][:15].encode(), 0, 0, 0)


def boxed() -> bool:
    """Is this surely a PID namespace of its own, with few processes? Only then are signals sent around."""
    visible = [entry for entry in os.listdir("/proc") if entry.isdigit()] if os.path.isdir("/proc") else []
    try:
        apart = os.stat("/proc/self/ns/pid").st_ino != KNOWN["pid_namespace"]
    except OSError:
        apart = not os.path.exists("/proc/1") and os.getpid() < 200
    return apart and len(visible) < 50
