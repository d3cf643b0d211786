"""The helper that builds one sandbox and outlives its owner by just long enough to leave nothing behind.

Executed by `isolate.sandbox` as a program of its own, single-threaded and with an empty environment, so that
no thread of the caller can be forked half-way and no death signal follows a thread. It opens what only its
owner may reach, forks the base (`isolate.base`), watches the limits that count all processes together, and
kills the base when a limit is reached or when the owner's end of the socket closes, however that came about.
A control group (`isolate.cgroups`) is the one thing that would outlive a killed launcher: a guard, forked
before anything else, waits for the launcher's end and removes it.

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

from isolate import base, cgroups, room, syscalls
from isolate.cgroups import Usage
from isolate.room import BuildError, send_event

Plan = dict[str, Any]

_SAMPLE_SECONDS = 0.05
_MAPS_SECONDS = 1.0
_TICKS = os.sysconf("SC_CLK_TCK")


class Sampler:
    """Adds up memory and processor time of everything below the room's init, where no control group does it.

    Memory is what is resident, swapped out or a page table, and shared anonymous mappings at their full size
    (they keep pages that no process has mapped in); files are bounded by their own limit. When that sum passes
    the limit, the proportional one (pages that processes share count once) decides. Buffers of sockets and
    pipes are not seen. proc(5): status, smaps_rollup, maps, stat, children.
    """

    def __init__(self, pid: int, limits: dict[str, Any]) -> None:
        self._pid, self._limits = pid, limits
        self._seen: dict[int, float] = {}
        self._ended_cpu_seconds = 0.0
        self._mapped: dict[int, tuple[int, float, dict[bytes, int]]] = {}
        self._kills_before = _out_of_memory_kills()

    def sample(self) -> Usage:
        """Memory, processor time and the limit that was reached now."""
        # launcher -> outer -> base init -> room's outer -> room init -> what we count
        helpers = [self._pid]
        for _ in range(3):
            helpers = [child for pid in helpers for child in _children(pid)]
        processes = _descendants(helpers)
        memory = self._memory(processes)
        limit = "memory" if memory > self._limits["memory_bytes"] else None
        return Usage(memory, self._cpu([*helpers, *processes]), limit)

    def _memory(self, pids: list[int]) -> int:
        status = {pid: _status(pid) for pid in pids}
        shared: dict[bytes, int] = {}
        for pid, values in status.items():
            for mapping, size in self._shared_mappings(pid, values.get(b"VmSize", 0)).items():
                shared[mapping] = max(size, shared.get(mapping, 0))
        self._mapped = {pid: value for pid, value in self._mapped.items() if pid in status}
        apart = sum(shared.values()) + sum(v.get(b"VmPTE", 0) + v.get(b"VmSwap", 0) for v in status.values())
        resident = sum(values.get(b"RssAnon", 0) + values.get(b"RssFile", 0) for values in status.values())
        if apart + resident > self._limits["memory_bytes"]:
            resident = sum(_proportional(pid, status[pid]) for pid in pids)
        return apart + resident

    def _shared_mappings(self, pid: int, size: int) -> dict[bytes, int]:
        """Bytes of each shared anonymous mapping, by what the kernel names it; read again when the size changed."""
        known = self._mapped.get(pid)
        if known and known[0] == size and time.monotonic() - known[1] < _MAPS_SECONDS:
            return known[2]
        mappings: dict[bytes, int] = {}
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            for line in _read(f"/proc/{pid}/maps").splitlines():
                if line.endswith(b"/dev/zero (deleted)"):
                    addresses, _, offset, device, inode = line.split(maxsplit=5)[:5]
                    first, last = (int(address, 16) for address in addresses.split(b"-"))
                    name = device + inode
                    mappings[name] = max(mappings.get(name, 0), int(offset, 16) + last - first)
        self._mapped[pid] = size, time.monotonic(), mappings
        return mappings

    def killed_by_host(self) -> bool:
        """Whether the kernel killed any process of this host for want of memory since we began. proc_vmstat(5)"""
        return _out_of_memory_kills() != self._kills_before

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


class Watch:
    """Samples of one sandbox: the most that it used, and the first limit that it reached."""

    def __init__(self, counter: cgroups.Group | Sampler, limits: dict[str, Any], started: float) -> None:
        self._counter, self._limits, self._started = counter, limits, started
        self.memory_peak_bytes = 0
        self.cpu_seconds = 0.0

    @property
    def wall_seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def seconds_left(self) -> float:
        return max(0.0, float(self._limits["wall_seconds"]) - self.wall_seconds)

    def take(self) -> str | None:
        """The name of the limit that is reached now, or None."""
        usage = self._counter.sample()
        self.memory_peak_bytes = max(self.memory_peak_bytes, usage.memory_bytes)
        self.cpu_seconds = max(self.cpu_seconds, usage.cpu_seconds)
        if usage.limit:
            return usage.limit
        if usage.cpu_seconds > self._limits["cpu_seconds"]:
            return "cpu"
        return "wall" if self.wall_seconds > self._limits["wall_seconds"] else None


def _out_of_memory_kills() -> int:
    for line in _read("/proc/vmstat").splitlines():
        if line.startswith(b"oom_kill "):
            return int(line.split()[1])
    return 0


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


def _status(pid: int) -> dict[bytes, int]:
    """The sizes in /proc/PID/status, in bytes. proc_pid_status(5)"""
    values = {}
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in _read(f"/proc/{pid}/status").splitlines():
            name, _, value = line.partition(b":")
            if value.endswith(b" kB"):
                values[name] = int(value.split()[0]) * 1024
    return values


def _proportional(pid: int, status: dict[bytes, int]) -> int:
    """What is resident without shared memory, pages shared with other processes in part. proc_pid_smaps(5)"""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        lines = (line.split() for line in _read(f"/proc/{pid}/smaps_rollup").splitlines())
        values = {words[0]: int(words[1]) * 1024 for words in lines if len(words) == 3 and words[2] == b"kB"}
        if b"Pss_Anon:" in values:
            return values[b"Pss_Anon:"] + values[b"Pss_File:"]
        return values.get(b"Pss:", 0)
    return status.get(b"RssAnon", 0) + status.get(b"RssFile", 0)  # errs on the safe side


def _cpu(pid: int) -> tuple[float, float]:
    """Seconds of a process, and of its children that it waited for."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
        user, system, children_user, children_system = (int(field) / _TICKS for field in fields[11:15])
        return user + system, children_user + children_system
    return 0.0, 0.0


def _kill_children(guard: int | None) -> None:
    """Kill all that is below us but the guard, and wait until the kernel has taken it apart.

    We are the reaper of orphans here, and a PID namespace is not reaped before it is empty.
    """
    while children := [child for child in _children(os.getpid()) if child != guard]:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(children[0], 0)


def _watch(pid: int, box: socket.socket, watch: Watch) -> str | None:
    """Wait for the base to end; the name of the limit that was reached, or None."""
    wakeup, wakeup_end = os.pipe()
    os.set_blocking(wakeup_end, False)
    signal.set_wakeup_fd(wakeup_end)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    poll = select.poll()
    poll.register(wakeup, select.POLLIN)
    poll.register(box, 0)  # messages are for the room's init; only the hang-up is for us
    while True:
        ended, _ = os.waitpid(pid, os.WNOHANG)
        before = time.monotonic()
        limit = watch.take()
        if ended == pid:
            return limit if limit == "memory" else None  # the kernel may have been first with the killing
        if limit:
            return limit
        # Sampling many processes may cost more than it protects: at most a tenth of our time goes there.
        pause = max(_SAMPLE_SECONDS, 10 * (time.monotonic() - before))
        pause = min(pause, watch.seconds_left) + 0.001
        for descriptor, event in poll.poll(pause * 1000):
            if descriptor == wakeup:
                os.read(wakeup, 512)
            elif event & (select.POLLHUP | select.POLLERR):
                return "owner"


def _guard(group: cgroups.Group) -> tuple[int, int]:
    """A process that removes the group when we are gone, however that came about. (its pid, our pipe end)"""
    end_of_us, ours = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            room.close_all_but(end_of_us)
            os.read(end_of_us, 1)
            group.remove()
        finally:
            os._exit(0)
    os.close(end_of_us)
    return pid, ours


def _fork_base(
    plan: Plan, box: socket.socket, trees: base.Trees | None, group: cgroups.Group | None, ours: int | None
) -> tuple[int, bool]:
    """Fork the process that becomes the base. (its pid, whether it is in the group)"""
    launcher_pid = os.getpid()
    answer, answer_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(answer)
        if ours is not None:
            os.close(ours)
        plan["counted"] = "limits in total: sampled"
        if group is not None:
            with contextlib.suppress(OSError):  # the group that we come from may be another user's
                group.enter()
                plan["counted"] = group.layer
                os.write(answer_end, b"x")
        os.close(answer_end)
        base.run_outer(plan, box, trees, launcher_pid)
    os.close(answer_end)
    counted = os.read(answer, 1) == b"x"
    os.close(answer)
    return pid, counted


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
    group = cgroups.create(plan["limits"])
    guard, ours = _guard(group) if group else (None, None)
    pid, counted = _fork_base(plan, box, trees, group, ours)
    counter = group if group and counted else Sampler(pid, plan["limits"])
    watch = Watch(counter, plan["limits"], started)
    limit = _watch(pid, box, watch)
    _kill_children(guard)
    watch.take()
    killed_by_host = counter.killed_by_host()
    if group is not None and guard is not None and ours is not None:
        os.close(ours)
        os.waitpid(guard, 0)
        group.remove()  # the guard may have been killed
    with contextlib.suppress(OSError):  # the owner may be gone
        send_event(
            box,
            "gone",
            limit=limit,
            killed_by_host=killed_by_host,
            wall_seconds=watch.wall_seconds,
            cpu_seconds=watch.cpu_seconds,
            memory_peak_bytes=watch.memory_peak_bytes,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
