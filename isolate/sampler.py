"""What a sandbox uses, by looking at its processes from outside: for hosts where no control group counts.

Standard library only. Sources: proc(5), and at each function the page of its file.
"""

import contextlib
import functools
import os
import time
from collections.abc import Iterator
from typing import Any

from isolate.cgroups import Usage
from isolate.sockets import SocketMemory

_MAPS_SECONDS = 1.0
_MAPS_BYTES = 512 << 10
"""Some six thousand mappings: a hundred times what an interpreter has."""
_PROPORTIONAL_SECONDS = 1.0
_MOST_MISSED = 10_000
_CAP_SYS_PTRACE = 19
_TICKS = os.sysconf("SC_CLK_TCK")


class Sampler:
    """Adds up memory and processor time of everything below a process of ours and a line of `helpers_below` more.

    Memory is what is resident, swapped out or a page table, and shared anonymous mappings at their full size
    (they keep pages that no process has mapped in); files are bounded by their own limit. When that sum passes
    the limit, the proportional one (pages that processes share count once) decides. Buffers of pipes are not seen;
    the kernel bounds them for each user. proc(5): status, smaps_rollup, maps, stat, children; pipe(7).
    """

    def __init__(self, pid: int, limits: dict[str, Any], helpers_below: int, sockets: SocketMemory | None) -> None:
        self._pid, self._limits, self._helpers_below = pid, limits, helpers_below
        self._sockets = sockets
        self._seen: dict[int, float] = {}
        self._missed: dict[int, float] = {}
        self._ended_cpu_seconds = 0.0
        self._mapped: dict[int, tuple[int, float, dict[bytes, int]]] = {}
        self._kills_before = _out_of_memory_kills()

    def sample(self) -> Usage:
        """Memory, processor time and the limit that was reached now."""
        helpers = [self._pid]
        for _ in range(self._helpers_below):
            helpers = [child for pid in helpers for child in children(pid)]
        processes = list(descendants(helpers, most_processes(self._limits)))
        memory = self._memory(processes)
        limit = "memory" if memory > self._limits["memory_bytes"] else None
        return Usage(memory, self._cpu([*helpers, *processes]), limit)

    def _memory(self, pids: list[int]) -> int:
        status = dict(map(_status_of_living_thread, pids))
        shared: dict[bytes, int] = {}
        for pid, values in status.items():
            for mapping, size in self._shared_mappings(pid, values.get(b"VmSize", 0)).items():
                shared[mapping] = max(size, shared.get(mapping, 0))
        self._mapped = {pid: value for pid, value in self._mapped.items() if pid in status}
        apart = sum(shared.values()) + sum(v.get(b"VmPTE", 0) + v.get(b"VmSwap", 0) for v in status.values())
        resident = sum(values.get(b"RssAnon", 0) + values.get(b"RssFile", 0) for values in status.values())
        if self._sockets is not None:
            apart += self._sockets.bytes()
        if apart <= self._limits["memory_bytes"] < apart + resident:
            deadline = time.monotonic() + _PROPORTIONAL_SECONDS
            resident = sum(_proportional(pid, values, deadline) for pid, values in status.items())
        return apart + resident

    def _shared_mappings(self, pid: int, size: int) -> dict[bytes, int]:
        """Bytes of each shared anonymous mapping, by what the kernel names it; read again when the size changed."""
        known = self._mapped.get(pid)
        if known and known[0] == size and time.monotonic() - known[1] < _MAPS_SECONDS:
            return known[2]
        mappings: dict[bytes, int] = {}
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            try:
                text = _read(f"/proc/{pid}/maps", _MAPS_BYTES + 1)
            except PermissionError:  # what it shares, by its own count
                return {b"of %d" % pid: _status(pid).get(b"RssShmem", 0)}
            if len(text) > _MAPS_BYTES:  # reading on would take longer than others wait for their limits
                mappings[b"of %d" % pid] = size
            for line in text.splitlines():
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
        self._missed.update((pid, seconds) for pid, seconds in self._seen.items() if pid not in own)
        for pid in own.keys() & self._missed.keys():
            seconds = self._missed.pop(pid)
            if own[pid] < seconds:  # another process, of the same number; else it was only overlooked
                self._ended_cpu_seconds += seconds
        if len(self._missed) > _MOST_MISSED:
            self._ended_cpu_seconds += sum(self._missed.values())
            self._missed.clear()
        self._seen = own
        return max(with_children, sum(own.values()) + sum(self._missed.values()) + self._ended_cpu_seconds)


def _out_of_memory_kills() -> int:
    for line in _read("/proc/vmstat").splitlines():
        if line.startswith(b"oom_kill "):
            return int(line.split()[1])
    return 0


def _read(path: str, most: int = -1) -> bytes:
    with open(path, "rb") as file:
        return file.read(most)


@contextlib.contextmanager
def as_user(uid: int | None) -> Iterator[None]:
    """Look at the processes of this user as that user; for root in a container, who may not look into others'.

    Whoever could signal us before still cannot: the real and the saved uid stay. kill(2), ptrace(2), credentials(7)
    """
    if uid is None or _may_look_into_others():
        yield
        return
    before = os.geteuid(), os.getegid()
    try:
        os.setegid(uid)
        os.seteuid(uid)
        yield
    finally:
        os.seteuid(before[0])
        os.setegid(before[1])


@functools.cache
def _may_look_into_others() -> bool:
    status = dict(line.split(b":", 1) for line in _read("/proc/self/status").splitlines())
    return bool(int(status[b"CapEff"], 16) >> _CAP_SYS_PTRACE & 1)


def children(pid: int) -> list[int]:
    """Pids of the children of all its threads. proc_pid_task(5): children"""
    found: list[int] = []
    for task in tasks(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            found.extend(int(child) for child in _read(f"/proc/{pid}/task/{task}/children").split())
    return found


def tasks(pid: int) -> list[int]:
    """Its threads; none when it has ended, or must not be looked at (hidepid). proc(5)"""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        return [int(task) for task in os.listdir(f"/proc/{pid}/task")]
    return []


def most_processes(limits: dict[str, Any]) -> int:
    """How many processes to look at: more than there can be at one time, since a fork bomb may have no end."""
    return 4 * int(limits["processes"]) + 64


def descendants(roots: list[int], most: int) -> Iterator[int]:
    """Everything below these, without them."""
    waiting = [child for root in roots for child in children(root)]
    while waiting and most > 0:
        pid = waiting.pop()
        most -= 1
        yield pid
        waiting.extend(children(pid))


def _status_of_living_thread(pid: int) -> tuple[int, dict[bytes, int]]:
    """What `_status` says, through another thread where the first one has ended: it shows no memory any more."""
    values = _status(pid)
    if b"VmRSS" not in values:
        for task in tasks(pid):
            if b"VmRSS" in (through := _status(task)):
                return task, through
    return pid, values


def _status(pid: int) -> dict[bytes, int]:
    """The sizes in /proc/PID/status, in bytes. proc_pid_status(5)"""
    values = {}
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in _read(f"/proc/{pid}/status").splitlines():
            name, _, value = line.partition(b":")
            if value.endswith(b" kB"):
                values[name] = int(value.split()[0]) * 1024
    return values


def _proportional(pid: int, status: dict[bytes, int], deadline: float) -> int:
    """What is resident without shared memory, pages shared with other processes in part. proc_pid_smaps(5)

    The kernel visits every page for it; after the deadline, shared pages count whole.
    """
    if time.monotonic() > deadline:
        return status.get(b"RssAnon", 0) + status.get(b"RssFile", 0)
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
