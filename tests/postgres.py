"""A real PostgreSQL in a directory of the test session's: started, killed, started again.

It listens on a unix socket in that directory only, and is told to end when the test process that started it is gone.
"""

import contextlib
import dataclasses
import os
import pwd
import secrets
import select
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from attacks.harness import LONG, Stage, processes

_READY = "database system is ready to accept connections"


@dataclasses.dataclass(frozen=True)
class _Person:
    """Who runs the server: it refuses to be root."""

    uid: int
    gid: int

    def command(self, *argv: str | Path) -> list[str]:
        """These words as this person; the process gets SIGINT, a fast shutdown, when its parent is gone."""
        become = [f"--reuid={self.uid}", f"--regid={self.gid}", "--clear-groups"] if os.geteuid() == 0 else []
        return ["setpriv", *become, "--pdeathsig=INT", *(str(word) for word in argv)]


class Postgres:
    """One server, which keeps what was committed whatever happens to its processes."""

    def __init__(self, binaries: Path, directory: Path, person: _Person) -> None:
        self._binaries, self._directory, self._person = binaries, directory, person
        self._process: subprocess.Popen[str] | None = None
        self.log: list[str] = []

    @classmethod
    @contextlib.contextmanager
    def running(cls, stage: Stage) -> Iterator["Postgres"]:
        """A new server without databases, gone at the end. Skips the test where there is no PostgreSQL."""
        binaries = _binaries()
        if binaries is None or shutil.which("setpriv") is None:
            pytest.skip("no PostgreSQL server (initdb, postgres) or no setpriv on this host")
        person = _person(stage)
        directory = Path(tempfile.mkdtemp(prefix="pg-", dir=stage.directory))
        os.chown(directory, person.uid, person.gid)
        server = cls(binaries, directory, person)
        try:
            server._initialise()
            server.start()
            yield server
        finally:
            server.stop()
            shutil.rmtree(directory)

    def _initialise(self) -> None:
        words = ["--username=grader", "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync"]
        initdb = [self._binaries / "initdb", *words, "--pgdata", self._directory / "data"]
        subprocess.run(self._person.command(*initdb), check=True, capture_output=True, cwd="/", timeout=LONG)

    def start(self) -> None:
        """Return when it takes connections."""
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self._directory),
            "fsync": "off",  # what processes leave to the kernel outlives them; tests cannot cut the power
            "logging_collector": "off",
            "log_checkpoints": "off",
        }
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        self._process = subprocess.Popen(
            self._person.command(self._binaries / "postgres", "-D", self._directory / "data", *options),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={"LC_ALL": "C", "PATH": os.environ["PATH"]},
            text=True,
            errors="replace",
            cwd="/",
            start_new_session=True,
        )
        ready = threading.Event()
        self._reader = threading.Thread(target=self._read, args=(self._process, ready), daemon=True)
        self._reader.start()
        if not ready.wait(LONG) or self._process.poll() is not None:
            self.stop()
            pytest.fail("PostgreSQL does not start:\n" + "\n".join(self.log[-30:]))

    def _read(self, process: "subprocess.Popen[str]", ready: threading.Event) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            self.log.append(line.rstrip())
            if _READY in line:
                ready.set()
        ready.set()  # it has ended

    def kill(self) -> None:
        """SIGKILL for the server and all that it started; return when they are gone. It may be started again."""
        process = self._process
        assert process is not None
        process.send_signal(signal.SIGSTOP)  # so that it starts nothing while we look
        children = processes(lambda pid: _parent(pid) == process.pid)
        _kill([process.pid, *children])
        self._end()

    def stop(self) -> None:
        """A fast shutdown, which leaves no shared memory behind."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        assert process is not None
        assert process.stderr is not None
        process.wait(LONG)
        self._reader.join(LONG)  # at the end of the pipe, which all processes of the server hold
        process.stderr.close()

    def create(self) -> str:
        """The URL of a new, empty database."""
        name = f"test_{secrets.token_hex(6)}"
        self._administer(f"CREATE DATABASE {name}")
        return f"postgresql+psycopg://grader@/{name}?host={self._directory}"

    def drop(self, url: str) -> None:
        """Remove a database, whoever is still connected to it."""
        name = url.partition("@/")[2].partition("?")[0]
        self._administer(f"DROP DATABASE {name} WITH (FORCE)")

    def _administer(self, statement: str) -> None:
        with psycopg.connect(f"host={self._directory} user=grader dbname=postgres", autocommit=True) as connection:
            connection.execute(statement)


def _binaries() -> Path | None:
    """Where initdb and postgres are: on PATH, or where Debian keeps those of each version."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    versions = [path for path in Path("/usr/lib/postgresql").glob("*/bin") if (path / "initdb").exists()]
    return max(versions, key=lambda path: float(path.parent.name), default=None)


def _person(stage: Stage) -> _Person:
    try:
        entry = pwd.getpwnam("postgres")
    except KeyError:
        person = stage.user()
        return _Person(person.uid, person.gid)
    return _Person(entry.pw_uid, entry.pw_gid) if os.geteuid() == 0 else _Person(os.geteuid(), os.getegid())


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _kill(pids: list[int]) -> None:
    """End them all with SIGKILL, and wait for that."""
    with contextlib.ExitStack() as stack:
        poll, waiting = select.poll(), 0
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                descriptor = os.pidfd_open(pid)
                stack.callback(os.close, descriptor)
                poll.register(descriptor, select.POLLIN)
                waiting += 1
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        while waiting:
            ended = poll.poll(LONG * 1000)
            assert ended, f"{waiting} processes do not end"
            for descriptor, _ in ended:
                poll.unregister(descriptor)
                waiting -= 1
