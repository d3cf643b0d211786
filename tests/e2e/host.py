"""How this host looks, before and after: processes, mounts, leases."""

import contextlib
import os
import re
import socket
import time
from collections.abc import Callable, Set
from pathlib import Path

_Process = tuple[int, str]


def processes() -> dict[_Process, _Process | None]:
    """(pid, start time) of each living process -> that of its parent. No zombies. proc_pid_stat(5)"""
    parents: dict[int, tuple[str, int]] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{name}/stat").read_text(errors="replace").rpartition(")")[2].split()
                if fields[0] not in "ZX":
                    parents[int(name)] = (fields[19], int(fields[1]))
    return {
        (pid, start): (parent, parents[parent][0]) if parent in parents else None
        for pid, (start, parent) in parents.items()
    }


def descendants(pid: int, besides: Set[_Process] = frozenset()) -> set[_Process]:
    """All living processes below this one, itself included; without these others and what is below them."""
    everybody = processes()
    found = {process for process in everybody if process[0] == pid}
    while new := {child for child, parent in everybody.items() if parent in found} - found - besides:
        found |= new
    return found


def command_of(process: _Process) -> str:
    """Its command line; empty when it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process[0]}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def marked(marker: str) -> set[_Process]:
    """Living processes with this word in their command line."""
    return {process for process in processes() if marker in command_of(process)}


def mounts() -> set[str]:
    """The mount table as this process sees it."""
    return set(Path("/proc/self/mounts").read_text().splitlines())


def leases() -> set[str]:
    """The uids that root's sandboxes hold (see `isolate.uids`)."""
    return set(re.findall(r"@(isolate-uid-\d+)", Path("/proc/net/unix").read_text()))


def eventually(what: Callable[[], object], seconds: float = 60.0, interval: float = 0.05) -> bool:
    """Whether it becomes true in time."""
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(interval)
    return True


def free_port() -> int:
    """Of the loopback, at this moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
