"""A lock that several instructors on several hosts share through a file system, NFSv3 included.

Theory of operation. The lock is a file with a fixed name that says who holds it. Each who wants it makes a file under a
name of its own and links it to the fixed one, which link(2) does for one process only, on NFS too. A thread refreshes
the file's mtime. A lock is dead when its process is gone, if that is on this host and in this PID namespace; or
when its heart has not beaten for `stale_seconds`, by the file server's clock.

The fixed name is removed by one process at a time: by who has the right to end the lock of that token. That right is
another link, `<name>.<token>.1`; if who has it is dead, `.2`, and so on. These names belong to one token and that
never comes back, so who comes late to a dead lock cannot remove the lock of who came after; letting go uses the same
right. Who ends a lock first removes the holder's own file and only then looks at its heartbeat again, while the holder
in `Lock.check` beats first and then looks for its own file. One of the two sees the other.

Files are opened anew to be looked at (close-to-open consistency, nfs(5)): attributes that a client remembers may be a
minute old. Standard library only. Refuses to know what is locked.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import pwd
import random
import re
import secrets
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_SHORTEST_POLL, _LONGEST_POLL = 0.02, 0.5
_LONGEST_BEAT = 5.0
_MOST_BYTES = 8192
_MOST_PURPOSE = 300
_MOST_NAME = 80
_MOST_ENDERS = 100
_DAY = 86_400.0


class LockLost(Exception):
    """Somebody took us for dead and may hold the lock now: nothing may be made final."""


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who is at work. `since` by the file server's clock; the rest below `purpose` tells whether it still runs.

    `start_time`: of the process, in clock ticks since boot, field 22 of proc_pid_stat(5).
    """

    user: str
    host: str
    pid: int
    since: datetime
    purpose: str
    boot_id: str
    pid_namespace: int
    start_time: int
    token: str

    def __str__(self) -> str:
        words = (
            f"{self.user} has been {self.purpose} on host {self.host} (process {self.pid}) "
            f"since {self.since.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
        )
        return "".join(letter if letter.isprintable() else "?" for letter in words)  # it goes to a terminal


class Busy(Exception):
    """Somebody else is at work. `holder` is None when the lock's file does not say who."""

    def __init__(self, holder: Holder | None, lock: Path, waited_seconds: float) -> None:
        self.holder = holder
        who = str(holder) if holder else f"somebody holds {lock}, which cannot be read"
        super().__init__(f"{who}; waited {waited_seconds:.0f} s. Try again when it is done.")


class Lock:
    """A lock that is held, until the block of `locked` ends."""

    def __init__(self, attempt: "_Attempt") -> None:
        self._attempt = attempt
        self.holder = attempt.holder

    def check(self) -> None:
        """Raises `LockLost` if the lock is not ours any more; `OSError` if that cannot be told.

        Call it right before a step that makes something final. When it returns, nobody else can have the lock for
        the next `stale_seconds`, as long as this process lives.
        """
        self._attempt.beat()
        if not self._attempt.holds():
            raise LockLost(self._attempt.loss())


@contextlib.contextmanager
def locked(
    directory: Path,
    name: str,
    purpose: str,
    *,
    wait_seconds: float = 60.0,
    log: Callable[[str], object] | None = None,
    stale_seconds: float = 60.0,
) -> Iterator[Lock]:
    """Hold the lock `name` in `directory`, which is made if it is missing, for everybody who may write there.

    `purpose` completes "bob has been ...". Waits for up to `wait_seconds` (0: not at all), telling `log` once for whom,
    then raises `Busy`. All who use one lock must agree on `stale_seconds`. Raises `OSError` where no file can be made
    or linked. Leaving the block in order raises `LockLost` if the lock was lost meanwhile, since then somebody else may
    have been at the same work; leaving it by an exception keeps that exception.
    """
    descriptor = _open_directory(directory)
    try:
        attempt = _Attempt(_Files(descriptor, directory, _stem(name), stale_seconds), purpose)
        try:
            attempt.acquire(wait_seconds, log)
            attempt.sweep()
            yield Lock(attempt)
        except BaseException:
            with contextlib.suppress(OSError):  # what is left is a dead lock sooner or later
                attempt.close()
            raise
        if not attempt.close():
            raise LockLost(attempt.loss())
    finally:
        os.close(descriptor)


def is_held(directory: Path, name: str, *, stale_seconds: float = 60.0) -> bool:
    """Whether somebody is at work, as far as looking tells: by this host's clock, which a heart may be late for.

    For who only wants to say something: it may be otherwise by the time that this returns.
    """
    try:
        descriptor = os.open(directory, _DIRECTORY)
    except OSError:
        return False
    try:
        files = _Files(descriptor, directory, _stem(name), 2 * stale_seconds)
        now = time.time()
        found = files.look(files.lock)
        return found is not None and not files.is_dead(found, now)
    finally:
        os.close(descriptor)


@dataclasses.dataclass(frozen=True)
class _Found:
    """A file as it was found. Who cannot be told has no holder; what may not be read has beaten just now, for ever."""

    key: str
    holder: Holder | None
    beaten: float


@dataclasses.dataclass(frozen=True)
class _Files:
    """The files of one lock, in an open directory."""

    descriptor: int
    directory: Path
    stem: str
    stale_seconds: float

    @property
    def lock(self) -> str:
        return f"{self.stem}.lock"

    def own(self, token: str) -> str:
        return f"{self.stem}.{token}"

    def right_to_end(self, token: str, turn: int) -> str:
        return f"{self.stem}.{token}.{turn}"

    def look(self, name: str) -> _Found | None:
        """None if there is nothing of that name."""
        try:
            with open(os.open(name, _READ, dir_fd=self.descriptor), "rb") as file:
                status = os.fstat(file.fileno())
                text = file.read(_MOST_BYTES) if stat.S_ISREG(status.st_mode) else b""
        except PermissionError:
            return _Found("", None, math.inf)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE):
                return None
            if error.errno not in (errno.ELOOP, errno.ENXIO):  # a symbolic link, a socket
                raise
            try:
                status, text = os.stat(name, dir_fd=self.descriptor, follow_symlinks=False), b""
            except FileNotFoundError:
                return None
        holder = _parse(text)
        nameless = hashlib.sha256(f"{status.st_ino} {status.st_mtime_ns}".encode()).hexdigest()[:32]
        return _Found(holder.token if holder else nameless, holder, status.st_mtime)

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.descriptor)

    def is_dead(self, found: _Found, now: float) -> bool:
        """`now` must have been asked for before `found` was: who is stopped in between judges too mildly."""
        return now - found.beaten > self.stale_seconds or (found.holder is not None and _is_gone(found.holder))


class _Attempt:
    """One file of our own: what becomes the lock, what the server's clock is read from, what takes rights."""

    def __init__(self, files: _Files, purpose: str) -> None:
        self._files = files
        self._beating, self._stop = threading.Lock(), threading.Event()
        self._heart = threading.Thread(target=self._keep_beating, name=f"lock {files.stem}", daemon=True)
        place = _place()
        self.holder = Holder(
            user=_user(os.geteuid()),
            host=socket.gethostname(),
            pid=os.getpid(),
            since=datetime.now(UTC),
            purpose=purpose[:_MOST_PURPOSE],
            boot_id=place[0],
            pid_namespace=place[1],
            start_time=_start_time(os.getpid()) or 0,
            token=secrets.token_hex(16),
        )
        self._name = files.own(self.holder.token)
        self._file = os.open(self._name, _NEW, 0o666, dir_fd=files.descriptor)
        try:
            self._open_to_the_group()
            self._write()
        except BaseException:
            os.close(self._file)
            files.remove(self._name)
            raise

    def _open_to_the_group(self) -> None:
        directory, ours = os.fstat(self._files.descriptor), os.fstat(self._file)
        if directory.st_mode & stat.S_IWGRP:
            if ours.st_gid != directory.st_gid:
                with contextlib.suppress(PermissionError):
                    os.fchown(self._file, -1, directory.st_gid)
            os.fchmod(self._file, 0o660)

    def _write(self) -> None:
        """Also over an earlier text, which has the same length: a reader in between finds an unknown, living holder."""
        fields = dataclasses.asdict(self.holder) | {"since": self.holder.since.isoformat(timespec="seconds")}
        text = json.dumps(fields).encode()
        if os.pwrite(self._file, text, 0) != len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._files.directory / self._name))
        os.fsync(self._file)

    def beat(self) -> float:
        """Returns the time on the file server."""
        with self._beating:
            os.utime(self._file)
            return os.fstat(self._file).st_mtime

    def _keep_beating(self) -> None:
        while not self._stop.wait(min(self._files.stale_seconds / 4, _LONGEST_BEAT)):
            with contextlib.suppress(OSError):  # the server is away, or the file: `Lock.check` finds out
                self.beat()

    def acquire(self, wait_seconds: float, log: Callable[[str], object] | None) -> None:
        started, poll, told, holder, at_once = time.monotonic(), _SHORTEST_POLL, False, None, 3
        while True:
            now = self.beat()
            if self._link(self._files.lock):
                self.holder = dataclasses.replace(self.holder, since=datetime.fromtimestamp(now, UTC))
                self._heart.start()
                self._write()
                return
            found = self._files.look(self._files.lock)
            if found is None or (self._files.is_dead(found, now) and self._end(found.key)):
                if found and found.holder and log:
                    log(f"taking over from a process that is dead: {found.holder}")
                at_once -= 1
                if at_once >= 0:
                    continue
            holder = found.holder if found else holder
            waited = time.monotonic() - started
            if waited >= wait_seconds:
                raise Busy(holder, self._files.directory / self._files.lock, waited)
            if log and not told:
                told = True
                log(f"waiting: {holder or 'somebody holds ' + str(self._files.directory / self._files.lock)}")
            # no event tells of a file that is removed on another host
            time.sleep(min(poll * random.uniform(0.5, 1), wait_seconds - waited))
            poll = min(poll * 1.5, _LONGEST_POLL)

    def _link(self, name: str) -> bool:
        """Whether the name is ours now. NFS may lose the answer to a link(2) that was done: so look whose it is."""
        directory = self._files.descriptor
        try:
            os.link(self._name, name, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)
        except OSError as error:
            found = self._files.look(name)
            if found and found.key == self.holder.token:
                return True
            if isinstance(error, FileExistsError):
                return False
            raise
        return True

    def _take_right(self, key: str) -> int:
        """Become the only one who may end the lock `key`. Returns our turn, 0 if somebody else is at it."""
        for turn in range(1, _MOST_ENDERS):
            name = self._files.right_to_end(key, turn)
            now = self.beat()
            if self._link(name):
                return turn
            other = self._files.look(name)
            if other is None or not self._files.is_dead(other, now):
                return 0
        return 0

    def _end(self, key: str) -> bool:
        """Remove the dead lock `key`. False if it was not dead after all or somebody else is at it."""
        turn = self._take_right(key)
        if not turn:
            return False
        lowest = turn
        try:
            self._files.remove(self._files.own(key))
            now = self.beat()
            again = self._files.look(self._files.lock)
            if again is not None and again.key == key:
                if not self._files.is_dead(again, now):
                    return False
                self._files.remove(self._files.lock)
            lowest = 1
            return True
        finally:
            for number in range(lowest, turn + 1):
                self._files.remove(self._files.right_to_end(key, number))

    def holds(self) -> bool:
        """Whether the lock is ours, asked from the file server: by our own name and by the lock's."""
        mine = os.fstat(self._file).st_ino
        for name in (self._name, self._files.lock):
            try:
                descriptor = os.open(name, _READ, dir_fd=self._files.descriptor)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ESTALE, errno.ELOOP, errno.ENXIO, errno.EACCES):
                    return False
                raise
            try:
                status = os.fstat(descriptor)
            finally:
                os.close(descriptor)
            # a remembered name may lead to our file although it is another's by now; the number of names is fresh
            if status.st_ino != mine or status.st_nlink < 2:
                return False
        return True

    def loss(self) -> str:
        """What to tell who lost it."""
        found = self._files.look(self._files.lock)
        who = f"Now {found.holder}." if found and found.holder else "Nobody is known to hold it now."
        return (
            f"the lock {self._files.directory / self._files.lock} was lost while {self.holder.purpose}: this process, "
            f"or the way to the file server, stood still for more than {self._files.stale_seconds:g} s. {who} Look at "
            "what is there, and do it again."
        )

    def close(self) -> bool:
        """Let go of what we have. False if the lock is not ours."""
        if self.holder.pid != os.getpid():  # a fork of the holder: nothing here is its own
            return True
        self._stop.set()
        if self._heart.ident is not None:
            self._heart.join()
        try:
            held = self.holds()
            if not (held and self._let_go()):
                # who took us for dead ends our lock, or saw that we live and left it: now we are dead
                os.utime(self._file, (0, 0))
            self._files.remove(self._name)
        finally:
            with self._beating:
                os.close(self._file)
                self._file = -1  # for `Lock.check` in a thread that goes on after the block
        return held

    def _let_go(self) -> bool:
        """Remove the lock that is ours; False if somebody else has the right to end it."""
        key = self.holder.token
        turn = self._take_right(key)
        if turn:
            found = self._files.look(self._files.lock)
            if found and found.key == key:
                self._files.remove(self._files.lock)
            for number in range(1, turn + 1):
                self._files.remove(self._files.right_to_end(key, number))
        return turn > 0

    def sweep(self) -> None:
        """Remove files that processes left which were killed. With the lock held; never anything of our own token."""
        ours = re.compile(re.escape(self._files.stem) + r"\.([0-9a-f]{32})(\.\d{1,2})?")
        now = self.beat()
        for name in os.listdir(self._files.descriptor):
            match = ours.fullmatch(name)
            if match is None or match[1] == self.holder.token:
                continue
            with contextlib.suppress(OSError):  # another sweeps, too, or it belongs to somebody else: not our task
                found = self._files.look(name)
                if found and (now - found.beaten > _DAY or (found.holder and _is_gone(found.holder))):
                    self._files.remove(name)


def _open_directory(directory: Path) -> int:
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory)
    descriptor = os.open(directory, _DIRECTORY)
    try:
        status, parent = os.fstat(descriptor), os.stat(directory.parent)
        shared = stat.S_ISGID | stat.S_IWGRP
        # not only when it is new: who made it may have been killed before this line
        if parent.st_mode & shared == shared != status.st_mode & shared and status.st_uid == os.geteuid():
            os.fchmod(descriptor, 0o2770)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _stem(name: str) -> str:
    """A file name without dots, different for each name."""
    safe = quote(name.encode("utf-8", "surrogatepass"), safe="").replace(".", "%2E")
    if len(safe) <= _MOST_NAME:
        return safe
    return f"{safe[: _MOST_NAME // 2]}+{hashlib.sha256(safe.encode()).hexdigest()[:32]}"


def _parse(text: bytes) -> Holder | None:
    try:
        fields = json.loads(text)
        fields["since"] = datetime.fromisoformat(fields["since"])
        holder = Holder(**fields)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    sound = (
        all(type(fields[field.name]) is field.type for field in dataclasses.fields(Holder))
        and holder.since.tzinfo is not None
        and 1970 <= holder.since.year < 9999
        and 0 < holder.pid < 2**31
        and re.fullmatch("[0-9a-f]{32}", holder.token)
    )
    return holder if sound else None


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _place() -> tuple[str, int]:
    """Where a process number means what it means here: this boot of a kernel, this PID namespace. ("", 0): nowhere."""
    try:
        if os.readlink("/proc/self") == str(os.getpid()):  # else /proc is another namespace's
            return Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        pass
    return "", 0


def _is_gone(holder: Holder) -> bool:
    """Whether the process is known not to exist any more; of another host nothing is known."""
    here = (socket.gethostname(), *_place())  # the name, too: clones of a virtual machine share a boot id
    if not holder.boot_id or (holder.host, holder.boot_id, holder.pid_namespace) != here:
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # it exists; /proc may hide it (hidepid, proc(5))
    return holder.start_time > 0 and _start_time(holder.pid) not in (None, holder.start_time)


def _start_time(pid: int) -> int | None:
    """None if it cannot be told, -1 of a process that has ended and waits for its parent."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    state, threads, start = fields[0], fields[17], fields[19]
    # a thread may still be writing after the first one of a killed process has ended
    return -1 if state in "ZX" and threads in "01" else int(start)
