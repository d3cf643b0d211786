"""The helper that builds one sandbox and outlives its owner by just long enough to leave nothing behind.

Executed by `isolate.sandbox` as a program of its own, single-threaded and with an empty environment, so that
no thread of the caller can be forked half-way and no death signal follows a thread. It opens what only its
owner may reach, forks the base (`isolate.base`), watches the limits that count all processes together, and
kills the base when a limit is reached or when the owner's end of the socket closes, however that came about.

Standard library only. Arguments: the number of the socket's descriptor, the number of the plan's.
"""

import contextlib
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from typing import Any

from isolate import base, syscalls
from isolate.room import BuildError, send_event

Plan = dict[str, Any]

_SAMPLE_SECONDS = 0.05
_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")


class Sampler:
    """Adds up memory and processor time of everything below the room's init.

    Memory is the resident set; when that sum passes the limit, the proportional one (pages that are shared
    count once) decides. proc(5): statm, smaps_rollup, stat, children.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._seen: dict[int, float] = {}
        self._ended_cpu_seconds = 0.0
        self.memory_peak_bytes = 0
        self.cpu_seconds = 0.0

    def sample(self, memory_limit: int) -> tuple[int, float]:
        """(bytes, seconds) now."""
        # launcher -> outer -> base init -> room's outer -> room init -> what we count
        helpers = [self._pid]
        for _ in range(3):
            helpers = [child for pid in helpers for child in _children(pid)]
        processes = _descendants(helpers)
        memory = sum(_resident(pid) for pid in processes)
        if memory > memory_limit:
            memory = sum(_proportional(pid) for pid in processes)
        cpu = self._cpu([*helpers, *processes])
        self.memory_peak_bytes = max(self.memory_peak_bytes, memory)
        self.cpu_seconds = max(self.cpu_seconds, cpu)
        return memory, cpu

    def _cpu(self, pids: list[int]) -> float:
        """Seconds of the living and the dead, by two counts of which the larger holds.

        A parent's count of its dead children misses those that it ignores (SIGCHLD), ours those that live for
        less than a sample.
        """
        own, with_children = {}, 0.0
        for pid in pids:
            own[pid], children = _cpu(pid)
            with_children += own[pid] + children
        self._ended_cpu_seconds += sum(value for pid, value in self._seen.items() if pid not in own)
        self._seen = own
        return max(with_children, sum(own.values()) + self._ended_cpu_seconds)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found.extend(int(child) for child in _read(f"/proc/{pid}/task/{task}/children").split())
    return found


def _descendants(roots: list[int]) -> list[int]:
    found: list[int] = []
    waiting = [child for root in roots for child in _children(root)]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting.extend(_children(pid))
    return found


def _resident(pid: int) -> int:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return int(_read(f"/proc/{pid}/statm").split()[1]) * _PAGE
    return 0


def _proportional(pid: int) -> int:
    try:
        for line in _read(f"/proc/{pid}/smaps_rollup").splitlines():
            if line.startswith(b"Pss:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        return 0
    except PermissionError:
        return _resident(pid)  # counts shared pages more than once: errs on the safe side
    return 0


def _cpu(pid: int) -> tuple[float, float]:
    """Seconds of a process, and of its children that it waited for."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
        user, system, children_user, children_system = (int(field) / _TICKS for field in fields[11:15])
        return user + system, children_user + children_system
    return 0.0, 0.0


def _kill_children() -> None:
    """Kill all that is below us and wait until the kernel has taken it apart.

    We are the reaper of orphans here, and a PID namespace is not reaped before it is empty.
    """
    while True:
        for child in _children(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _watch(pid: int, box: socket.socket, limits: dict[str, Any], sampler: Sampler) -> str | None:
    """Wait for the base to end; the name of the limit that was reached, or None."""
    started = time.monotonic()
    wakeup, wakeup_end = os.pipe()
    os.set_blocking(wakeup_end, False)
    signal.set_wakeup_fd(wakeup_end)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    poll = select.poll()
    poll.register(wakeup, select.POLLIN)
    poll.register(box, 0)  # messages are for the room's init; only the hang-up is for us
    while True:
        ended, _ = os.waitpid(pid, os.WNOHANG)
        if ended == pid:
            return None
        before = time.monotonic()
        memory, cpu = sampler.sample(limits["memory_bytes"])
        now = time.monotonic()
        if memory > limits["memory_bytes"]:
            return "memory"
        if cpu > limits["cpu_seconds"]:
            return "cpu"
        if now - started > limits["wall_seconds"]:
            return "wall"
        # Sampling many processes may cost more than it protects: at most a tenth of our time goes there.
        pause = max(_SAMPLE_SECONDS, 10 * (now - before))
        pause = min(pause, max(0.0, limits["wall_seconds"] - (now - started)) + 0.001)
        for descriptor, event in poll.poll(pause * 1000):
            if descriptor == wakeup:
                os.read(wakeup, 512)
            elif event & (select.POLLHUP | select.POLLERR):
                return "owner"


def main(box_fd: int, plan_fd: int) -> int:
    """Run one sandbox from its plan to its end. Exit code 0 whenever the ending was reported."""
    started = time.monotonic()
    box = socket.socket(fileno=box_fd)
    with open(plan_fd, "rb") as file:
        plan: Plan = json.load(file)
    syscalls.overwrite_command_line(b"isolate")
    syscalls.set_child_subreaper()
    # Ctrl-C and a hang-up are the owner's business; it closes the socket when it wants us to stop.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    if not os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
        send_event(box, "failed", layer="limits", cause="/proc/PID/task/TID/children is missing", remedy="")
        return 1
    try:
        trees = base.open_trees(plan) if plan["uid"] is not None else None
    except BuildError as error:
        send_event(box, "failed", **error.as_dict())
        return 1
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    launcher_pid = os.getpid()
    pid = os.fork()
    if pid == 0:
        base.run_outer(plan, box, trees, launcher_pid)
    sampler = Sampler(pid)
    limit = _watch(pid, box, plan["limits"], sampler)
    _kill_children()
    with contextlib.suppress(OSError):  # the owner may be gone
        send_event(
            box,
            "gone",
            limit=limit,
            wall_seconds=time.monotonic() - started,
            cpu_seconds=sampler.cpu_seconds,
            memory_peak_bytes=sampler.memory_peak_bytes,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
