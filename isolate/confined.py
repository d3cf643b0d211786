"""The landlock tier: a weaker sandbox for hosts where no namespace can be made, such as an ordinary container.

It is built only where the policy asks for it by name. The wall is Landlock (which files), seccomp (which calls;
`isolate.seccomp.landlock_tier_filter` adds what this tier needs) and rlimits. `isolate.policy.LANDLOCK_GAPS` says
what it does not stop.

Theory of operation
-------------------
    launcher   as for a room; makes the private directory, and removes it with everything in it
      keeper   this module; a subreaper in the place of a PID namespace's init
        command

The keeper unpacks, closes the walls, starts the command, reaps and packs, with the same functions as the init of a
room. There are no mounts: the places that a room has are directories of the private one, and `_translate` puts
their real paths where the caller wrote the usual ones. When the launcher is killed, the keeper's death signal lets
it kill all below; when the keeper is killed, its orphans become the launcher's, which does. The names of private
directories tell whose they are, so that the next sandbox removes what two `kill -9` at once left.

Standard library only. Nothing here returns to its caller after a fork.
"""

import contextlib
import hashlib
import os
import re
import resource
import signal
import socket
import stat
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from isolate import landlock, room, syscalls
from isolate.cgroups import start_time
from isolate.room import BuildError, step
from isolate.sampler import as_user, descendants, most_processes, tasks

Plan = dict[str, Any]

_HELPERS = 16
"""Processes of ours that run as the sandbox's user when two sandboxes share one."""
_STALE_SECONDS = 60.0
_FILES_SAMPLE_SECONDS = 0.5
_HOME = "/home/student"
_MAPS_BYTES = 8 << 20
_MOST_LEVELS = 200
_MOST_KILLS = 100_000


class PrivateDirectory:
    """What a command may write in, on a disk of the host."""

    def __init__(self, path: str, limits: dict[str, Any]) -> None:
        self.path, self._limits = path, limits
        self._next = time.monotonic() + _FILES_SAMPLE_SECONDS
        self._unreadable: set[int] = set()

    @classmethod
    def make(cls, parent: str, uid: int | None, limits: dict[str, Any]) -> "PrivateDirectory":
        """A new one, which only the sandbox's user may enter. Removes what killed sandboxes left. Raises `OSError`."""
        here = _numbering()
        for entry in os.scandir(parent):
            match = re.fullmatch(rf"isolate-(\d+)-(\d+)-{here}\w+", entry.name)
            with contextlib.suppress(OSError):
                if (
                    match
                    and start_time(int(match[1])) != int(match[2])
                    and entry.stat(follow_symlinks=False).st_uid == os.geteuid()
                    and time.time() - entry.stat(follow_symlinks=False).st_mtime > _STALE_SECONDS
                ):
                    cls(entry.path, limits).remove()
        path = f"{parent}/isolate-{os.getpid()}-{start_time(os.getpid())}-{here}{os.urandom(4).hex()}"
        os.mkdir(path, 0o700)
        for name in ("home", "home/work", "tmp", "run"):
            os.mkdir(f"{path}/{name}", 0o700)
        if uid is not None:
            os.chmod(path, 0o711)  # ours, so that we know it again; what is in it is the sandbox's
            for name in ("home/work", "home", "tmp", "run"):
                os.chown(f"{path}/{name}", uid, uid, follow_symlinks=False)
        return cls(path, limits)

    def is_full(self, keeper: int, uid: int | None) -> bool:
        """Whether its files pass the limits, those without a name included; looked at twice a second at most."""
        started = time.monotonic()
        if started < self._next:
            return False
        most: int = self._limits["files_bytes"]
        most_files: int = self._limits["files_count"]
        with as_user(uid):
            nameless = self._held_without_a_name(list(descendants([keeper], most_processes(self._limits))))
        taken, count = sum(nameless.values()), len(nameless)
        for status in self._walk():
            if status is None:
                return True  # deeper than honest trees are
            taken += status.st_blocks * 512
            count += 1
            if taken > most or count > most_files:
                return True
        now = time.monotonic()
        self._next = now + max(_FILES_SAMPLE_SECONDS, 3 * (now - started))
        return False

    def _walk(self) -> Iterator[os.stat_result | None]:
        """Everything in it, by descriptors from the top: what is swapped for a link meanwhile leads nowhere.

        None for a directory that lies too deep to be looked into.
        """
        waiting: list[tuple[str, ...]] = [()]
        while waiting:
            parts = waiting.pop()
            if len(parts) > _MOST_LEVELS:
                yield None
            try:
                directory = self._open_below(parts)
            except OSError:  # it changes while we look
                continue
            try:
                with os.scandir(directory) as entries:
                    for entry in entries:
                        with contextlib.suppress(FileNotFoundError):
                            status = entry.stat(follow_symlinks=False)
                            yield status
                            if stat.S_ISDIR(status.st_mode):
                                waiting.append((*parts, entry.name))
            finally:
                os.close(directory)

    def _open_below(self, parts: tuple[str, ...]) -> int:
        directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        for name in parts:
            above = directory
            try:
                directory = _open_directory(name, above)
            finally:
                os.close(above)
        return directory

    def _held_without_a_name(self, pids: list[int]) -> dict[int, int]:
        """Bytes of files of ours that were removed while a process held them: inode -> bytes.

        Who executes a program that its user may execute but not read cannot be looked into, and is killed.
        """
        found: dict[int, int] = {}
        unreadable = set()
        for pid in pids:
            try:
                for status in _removed_files(pid, f"{self.path}/"):
                    found[status.st_ino] = status.st_blocks * 512
                for inode, size in _removed_mappings(pid, f"{self.path}/"):
                    found.setdefault(inode, size)
            except PermissionError:
                unreadable.add(pid)
            except (FileNotFoundError, ProcessLookupError):
                continue
        for pid in unreadable & self._unreadable:  # seen twice: any can be closed for a moment before it starts
            with contextlib.suppress(PermissionError, ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._unreadable = unreadable
        return found

    def remove(self) -> None:
        """Remove it with all in it, however deep: what lies in a directory is moved up before that one goes.

        Only once nothing of the sandbox runs any more. Safe to call again.
        """
        try:
            top = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            while names := os.listdir(top):
                for name in names:
                    _remove_flat(top, name)
            os.rmdir(self.path)
        finally:
            os.close(top)


def _numbering() -> str:
    """Names this boot of this host and our PID namespace: in others, who lives has other numbers.

    Containers may share /tmp, and the nodes of a cluster a TMPDIR. pid_namespaces(7), random(4)
    """
    with open("/proc/sys/kernel/random/boot_id", "rb") as file:
        boot = file.read()
    return hashlib.sha256(boot + os.readlink("/proc/self/ns/pid").encode()).hexdigest()[:8]


def _remove_flat(top: int, name: str) -> None:
    if not stat.S_ISDIR(os.stat(name, dir_fd=top, follow_symlinks=False).st_mode):
        os.unlink(name, dir_fd=top)
        return
    directory = _open_directory(name, top)
    try:
        for child in os.listdir(directory):
            if stat.S_ISDIR(os.stat(child, dir_fd=directory, follow_symlinks=False).st_mode):
                os.close(_open_directory(child, directory))
                os.rename(child, f"isolate-removed-{os.urandom(8).hex()}", src_dir_fd=directory, dst_dir_fd=top)
            else:
                os.unlink(child, dir_fd=directory)
    finally:
        os.close(directory)
    os.rmdir(name, dir_fd=top)


def _open_directory(name: str, above: int | None = None) -> int:
    """With its mode made such that its owner can look into it, and move it. No link is followed at its end.

    chmod(2) by name would follow one that a process puts there meanwhile, and change somebody else's file.
    """
    flags = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    place = os.open(name, os.O_PATH | flags, dir_fd=above)
    try:
        if os.fstat(place).st_mode & stat.S_IRWXU != stat.S_IRWXU:
            os.chmod(f"/proc/self/fd/{place}", 0o700)
        return os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    finally:
        os.close(place)


def _removed_files(pid: int, place: str) -> Iterator[os.stat_result]:
    """Of this place, held open by any of its threads: they need not share their descriptors. proc_pid_fd(5)"""
    for task in tasks(pid):
        with os.scandir(f"/proc/{pid}/task/{task}/fd") as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if os.readlink(entry.path).startswith(place):
                        status = entry.stat()
                        if status.st_nlink == 0 and stat.S_ISREG(status.st_mode):
                            yield status


def _removed_mappings(pid: int, place: str) -> Iterator[tuple[int, int]]:
    """Of this place, held by a mapping, up to where it is mapped: inode, bytes. proc_pid_maps(5)"""
    for task in tasks(pid):
        with open(f"/proc/{pid}/task/{task}/maps", "rb") as file:
            text = file.read(_MAPS_BYTES + 1)
        if len(text) > _MAPS_BYTES:
            raise PermissionError("more mappings than can be looked at")
        for line in text.splitlines():
            if line.endswith(b" (deleted)"):
                addresses, _, offset, _, inode, path = line.split(maxsplit=5)
                if path.startswith(os.fsencode(place)):
                    first, last = (int(address, 16) for address in addresses.split(b"-"))
                    yield int(inode), int(offset, 16) + last - first
        if text:
            return  # threads share their memory; the first one shows none when it has ended


def run_outer(plan: Plan, box: socket.socket, private: str, leave_launcher: Callable[[int], None]) -> NoReturn:
    """Become the sandbox's user, close the walls, run the command, pack, end."""
    with room.report_failures(box):
        # Not SIGKILL: there is no PID namespace that would take everything below with us.
        signal.signal(signal.SIGUSR2, lambda *_: _kill_all_and_exit(_kill_below))
        with contextlib.suppress(PermissionError):  # an ordinary user may not; no_new_privs does without
            syscalls.drop_bounding_capabilities()
        leave_launcher(signal.SIGUSR2)
        syscalls.set_child_subreaper()
        os.umask(0o022)
        plan = _translate(plan, private)
        shared = None
        if plan["share_at"]:
            shared = os.open(plan["share_at"], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        room.set_up_files(plan)
        keep = room.open_keep(plan)
        rules = _rules(plan, private)
        if plan["uid"] is None:
            plan["limits"]["processes"] += _tasks_of(os.getuid())
        else:
            plan["limits"]["processes"] += _HELPERS
        syscalls.set_dumpable(False)
        room.close_walls(plan["seccomp"])
        with step("landlock", "scope signals"):
            kill_below = _kill_domain if landlock.scope_signals() else _kill_below
        signal.signal(signal.SIGUSR2, lambda *_: _kill_all_and_exit(kill_below))
        layers = [f"Landlock ABI {landlock.abi()}", *room.WALLS, "private directory on disk, its size sampled"]
        if plan["uid"] is not None:
            layers.insert(0, "unprivileged uid of its own")
        room.send_ready(box, [*layers, plan["counted"]], shared)
        pid = room.start(plan, box, lambda: _close_last_walls(plan, rules))
        room.finish(plan, box, keep, room.reap_until_end(pid, box, kill_below))
    os._exit(0)


def _close_last_walls(plan: Plan, rules: list[landlock.Rule]) -> None:
    syscalls.set_dumpable(True)  # the launcher looks into what runs; the keeper itself stays closed
    syscalls.set_parent_death_signal(signal.SIGKILL)
    room.restrict(rules)
    with step("seccomp", "load this tier's filter"):
        room.load_filters(plan["tier_seccomp"])


def _kill_below() -> None:
    for pid in descendants([os.getpid()], _MOST_KILLS):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _kill_domain() -> None:
    """All below us at once: what goes from process to process by forking could outrun one `kill` after another."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(-1, signal.SIGKILL)


def _kill_all_and_exit(kill_below: Callable[[], None]) -> NoReturn:
    room.empty(kill_below)
    os._exit(1)


def _translate(plan: Plan, private: str) -> Plan:
    """The same plan with the real paths of HOME, /tmp and the sockets' directory in what the command is given.

    A visible path that lies below one of these names keeps its own.
    """
    places = {_HOME: f"{private}/home", "/tmp": f"{private}/tmp"}
    if plan["share_at"]:
        places[plan["share_at"]] = f"{private}/run"
    places = {**{path: path for path in plan["tier_visible"]}, **places}
    names = "|".join(re.escape(name) for name in sorted(places, key=len, reverse=True))
    pattern = re.compile(f"(?<![^\\s:=,'\"(\\[])({names})(?![^/:'\"\\s,;)\\]])")

    def real(text: str) -> str:
        return pattern.sub(lambda match: places[match[1]], text)

    return {
        **plan,
        "argv": [real(word) for word in plan["argv"]],
        "environment": {name: real(value) for name, value in plan["environment"].items()},
        "cwd": real(plan["cwd"]),
        "work": real(plan["work"]),
        "share_at": real(plan["share_at"]) if plan["share_at"] else None,
        "room_files": {real(path): real(text) for path, text in plan["room_files"].items()},
        "limits": dict(plan["limits"]),
    }


def _rules(plan: Plan, private: str) -> list[landlock.Rule]:
    rules: list[landlock.Rule] = [(f"/dev/{name}", "device") for name in room.DEVICES]
    rules += [(f"{private}/home", "write"), (f"{private}/tmp", "write"), (f"{private}/run", "sockets")]
    for path in plan["tier_read_only"]:
        _check_readable(path)
        with step("landlock", f"look into {path}"):
            rules += [(part, "read") for part in landlock.without(path, plan["tier_hidden"])]
    return rules + [(path, "write") for path in plan["tier_writable"]]


def _check_readable(path: str) -> None:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        cause = f"the sandbox's user cannot read {path}: {error.strerror}"
        raise BuildError("read-only view", cause, "this tier needs an environment that every user may read") from error


def _tasks_of(uid: int) -> int:
    """Processes and threads of this user now: RLIMIT_NPROC counts them all. setrlimit(2)"""
    count = 0
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{name}").st_uid == uid:
                    count += len(os.listdir(f"/proc/{name}/task"))
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    return count if soft == resource.RLIM_INFINITY else min(count, soft)
