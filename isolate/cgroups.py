"""One control group for all processes of a sandbox: the kernel counts their memory, number and processor time.

`create` finds where this process may make groups: version 2 where an administrator or systemd delegated one,
version 1 as root; None where neither is to be had, and then the launcher samples. The launcher stays outside of
the group, so that no death in it is the launcher's. The group's memory holds the files, too, which lie in a
tmpfs; so its hard limit is the sum of both, and what is not files is held to its own limit by `Group.sample`.

Standard library only. Sources: cgroups(7), Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst of
the kernel, "Delegation" in systemd's CGROUP_DELEGATION.md.
"""

import contextlib
import os
import re
import signal
import time
from typing import Any, NamedTuple

_HELPERS = 8
"""Processes of ours in the group: two outers, two inits, and a few under way."""
_HELPERS_BYTES = 16 << 20
"""Private memory of those."""
_BATCH_BYTES = 1 << 20
"""The kernel takes from a limit in batches for each processor."""
_TCP_BYTES = 64 << 20
"""Version 1 counts buffers of TCP apart."""
_STALE_SECONDS = 60.0
_REMOVE_SECONDS = 10.0
_V1 = ("memory", "cpuacct", "pids", "cpu")
_V1_NEEDED = frozenset({"memory", "cpuacct"})
_V2_NEEDED = frozenset({"memory", "pids"})


class Usage(NamedTuple):
    """What a sandbox uses now, and the limit that it has reached, if any."""

    memory_bytes: int
    cpu_seconds: float
    limit: str | None = None


class Hierarchy(NamedTuple):
    """A mounted hierarchy of control groups and our place in it. proc_pid_cgroup(5), proc_pid_mountinfo(5)."""

    version: int
    controllers: frozenset[str]
    mount: str
    place: str
    """The directory of our own group; at or below `mount`."""


def hierarchies(cgroup_text: str, mountinfo_text: str) -> list[Hierarchy]:
    """What /proc/self/cgroup and /proc/self/mountinfo say together; hierarchies that are not mounted are left out."""
    mounts: list[tuple[str, str, str, frozenset[str]]] = []
    for line in mountinfo_text.splitlines():
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.split(" ")[:3] if rest.count(" ") >= 2 else ("", "", "")
        if kind in {"cgroup", "cgroup2"}:
            root, mount = (_unescaped(field) for field in fields.split(" ")[3:5])
            mounts.append((kind, root, mount, frozenset(options.split(","))))
    found = []
    for line in cgroup_text.splitlines():
        number, names, path = line.split(":", 2)
        controllers = frozenset(names.split(",")) - {""}
        for kind, root, mount, mounted in mounts:
            matches = kind == "cgroup2" if number == "0" else kind == "cgroup" and controllers <= mounted
            inside = os.path.relpath(path, root)
            if matches and inside.split("/")[0] != "..":
                place = os.path.normpath(os.path.join(mount, inside))
                found.append(Hierarchy(2 if number == "0" else 1, controllers, mount, place))
                break
    return found


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


class Group:
    """A group of our own: one directory (version 2), or one for each controller (version 1)."""

    def __init__(self, version: int, directories: dict[str, str], limits: dict[str, Any]) -> None:
        self._version, self._directories, self._limits = version, directories, limits

    @property
    def layer(self) -> str:
        """For the report: what counts in total."""
        names = sorted(self._directories)
        if self._version == 2:
            controllers = set(_read(self._file("cgroup.controllers")).split())
            names = sorted(controllers & {"cpu", "memory", "pids"})
        return f"limits in total: cgroup v{self._version} ({', '.join(names)})"

    def configure(self) -> None:
        """Write the limits. Raises `OSError` when a needed one cannot be set."""
        limits = self._limits
        memory = self._directories["memory"]
        hard = max(limits["memory_bytes"], limits["files_bytes"]) + limits["files_bytes"] + _HELPERS_BYTES
        if self._version == 2:
            _write(f"{memory}/memory.max", hard)
            with contextlib.suppress(OSError):  # no swap accounting
                _write(f"{memory}/memory.swap.max", 0)
            _write(f"{memory}/memory.oom.group", 1)
        else:
            _write(f"{memory}/memory.limit_in_bytes", hard)
            also = {
                "memory.memsw.limit_in_bytes": hard,
                "memory.kmem.tcp.limit_in_bytes": _TCP_BYTES,
                "memory.swappiness": 0,
            }
            for name, value in also.items():
                with contextlib.suppress(OSError):  # not every kernel counts these
                    _write(f"{memory}/{name}", value)
        if "pids" in self._directories:
            _write(f"{self._directories['pids']}/pids.max", limits["processes"] + _HELPERS)

    def add(self, pid: int = 0) -> None:
        """Move a process in, the calling one if not told otherwise; its children follow. Raises `OSError`."""
        for directory in dict.fromkeys(self._directories.values()):
            _write(f"{directory}/cgroup.procs", pid)

    def sample(self) -> Usage:
        """Memory that is neither page cache nor helpers, processor time, and whether `memory` was reached.

        Shared memory may be files: up to the files' own limit it does not count against the memory limit.
        """
        values = _table(self._file("memory.stat"))
        used = int(_read(self._file("memory.current", "memory.usage_in_bytes")) or 0) - _HELPERS_BYTES
        for name in ("active_file", "inactive_file", "slab_reclaimable"):  # version 1 does not tell the last
            used -= values.get(name, 0)
        files = min(values.get("shmem", 0), self._limits["files_bytes"])
        reached = used - files > self._limits["memory_bytes"] or (self._kills() and self._refused())
        if self._version == 2:
            cpu = _table(self._file("cpu.stat")).get("usage_usec", 0) / 1e6
        else:
            cpu = int(_read(f"{self._directories['cpuacct']}/cpuacct.usage") or 0) / 1e9
        return Usage(max(0, used), cpu, "memory" if reached else None)

    def killed_by_host(self) -> bool:
        """Whether a process in here was killed for want of memory although our own limit had room."""
        return self._kills() > 0 and not self._refused()

    def _file(self, name: str, name_in_version_1: str = "") -> str:
        return (
            f"{self._directories['memory']}/{name_in_version_1 if self._version == 1 and name_in_version_1 else name}"
        )

    def _kills(self) -> int:
        return _table(self._file("memory.events", "memory.oom_control")).get("oom_kill", 0)

    def _refused(self) -> bool:
        """Whether our own limit was ever met; in version 1, also when the page cache could make room."""
        if self._version == 2:
            return _table(self._file("memory.events")).get("oom", 0) > 0
        most, limit = (
            int(_read(self._file(f"memory.{name}")) or 0) for name in ("max_usage_in_bytes", "limit_in_bytes")
        )
        return most >= limit - _BATCH_BYTES  # memory.failcnt does not count on every kernel (6.18)

    def remove(self) -> None:
        """Kill whatever is in the group and remove it. Safe to call again."""
        deadline = time.monotonic() + _REMOVE_SECONDS
        for directory in dict.fromkeys(self._directories.values()):
            while os.path.isdir(directory) and time.monotonic() < deadline:
                for pid in _read(f"{directory}/cgroup.procs").split():
                    if pid == "0":
                        continue  # of a PID namespace that is not below ours
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(int(pid), signal.SIGKILL)
                try:
                    os.rmdir(directory)
                except OSError:
                    time.sleep(0.005)  # the kernel has no event for the last exit of version 1


def create(limits: dict[str, Any]) -> Group | None:
    """A new, empty group with these limits where this process may make one."""
    try:
        found = hierarchies(_read("/proc/self/cgroup"), _read("/proc/self/mountinfo"))
    except (OSError, ValueError):
        return None
    name = f"isolate-{os.getpid()}-{start_time(os.getpid())}"
    for make in (_create_v2, _create_v1):
        group = make(found, name, limits)
        if group is not None:
            try:
                group.configure()
            except OSError:
                group.remove()
                continue
            return group
    return None


def _create_v2(found: list[Hierarchy], name: str, limits: dict[str, Any]) -> Group | None:
    """Below our own group if it is free of processes, else beside it, else further up: as near as possible.

    A group with processes in it cannot have limited groups below it ("no internal processes"), except the root. So a
    limit of an enclosing slice or container holds for sandboxes, too, and that of our own group only where its
    processes lie in a subgroup (systemd's DelegateSubgroup=).
    """
    for hierarchy in found:
        if hierarchy.version != 2:
            continue
        place = hierarchy.place
        while True:
            if _controls(place):
                with contextlib.suppress(OSError):
                    _remove_stale(place)
                    os.mkdir(f"{place}/{name}")
                    return Group(2, dict.fromkeys(("memory", "pids"), f"{place}/{name}"), limits)
            if place == hierarchy.mount:
                break
            place = os.path.dirname(place)
    return None


def _controls(place: str) -> bool:
    """Whether groups below this one can have limits of memory and processes, if need be after asking for it."""
    if not os.access(place, os.W_OK) or not os.access(f"{place}/cgroup.procs", os.W_OK):
        return False
    available = set(_read(f"{place}/cgroup.controllers").split())
    if not available >= _V2_NEEDED:
        return False
    wanted = (_V2_NEEDED | {"cpu"}) & available
    if not set(_read(f"{place}/cgroup.subtree_control").split()) >= wanted:
        with contextlib.suppress(OSError):  # EBUSY: processes lie in it
            _write(f"{place}/cgroup.subtree_control", " ".join(f"+{controller}" for controller in sorted(wanted)))
    return set(_read(f"{place}/cgroup.subtree_control").split()) >= _V2_NEEDED


def _create_v1(found: list[Hierarchy], name: str, limits: dict[str, Any]) -> Group | None:
    places = {
        controller: hierarchy.place
        for hierarchy in found
        for controller in _V1
        if hierarchy.version == 1 and controller in hierarchy.controllers and os.access(hierarchy.place, os.W_OK)
    }
    if not places.keys() >= _V1_NEEDED:
        return None
    made = {controller: f"{place}/{name}" for controller, place in places.items()}
    group = Group(1, made, limits)
    try:
        for place in dict.fromkeys(places.values()):
            _remove_stale(place)
            os.mkdir(f"{place}/{name}")
    except OSError:
        group.remove()
        return None
    return group


def _remove_stale(place: str) -> None:
    """Empty groups whose launcher and its guard were both killed."""
    for entry in os.scandir(place):
        match = re.fullmatch(r"isolate-(\d+)-(\d+)", entry.name)
        if match and start_time(int(match[1])) != int(match[2]):
            with contextlib.suppress(OSError):  # in use, or removed by somebody else
                if time.time() - entry.stat().st_ctime > _STALE_SECONDS:
                    os.rmdir(entry.path)


def start_time(pid: int) -> int:
    """When it started, in ticks since boot: tells a process from a later one of its number. -1: no such process."""
    with contextlib.suppress(OSError, IndexError):
        return int(_read(f"/proc/{pid}/stat").rpartition(")")[2].split()[19])
    return -1


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _write(path: str, value: int | str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, str(value).encode())
    finally:
        os.close(descriptor)


def _table(path: str) -> dict[str, int]:
    """A file of lines `name number`."""
    pairs = (line.split() for line in _read(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
