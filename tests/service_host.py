"""A real service for tests: `grader-service serve` in a process of its own, killed and started again at will."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import nbformat

from attacks.harness import eventually
from grader_service.client import GraderClient
from grader_service.database import open_engine, upgrade
from grader_service.schemas import Submission
from grader_service.tokens import TokenStore

COURSE = "python26"
LONG = 180.0
"""Seconds: far more than anything here takes."""


def notebook(*sources: str) -> bytes:
    """A notebook of these code cells."""
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    document = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "x"}})
    return nbformat.writes(document).encode()


def submission(**values: Any) -> Submission:
    """One of a student's who exists in no other test."""
    return Submission.model_validate({"assignment": "ps1", "student": "aino", "notebook": "p1", **values})


def texts(answer: bytes) -> list[str]:
    """What each code cell printed, or the names of its errors."""
    found = []
    for cell in nbformat.reads(answer.decode(), as_version=4).cells:
        outputs = cell.get("outputs", [])
        found.append("".join(one.get("text", one.get("ename", "")) for one in outputs))
    return found


@dataclasses.dataclass
class Host:
    """A directory with a configuration, and the service that runs on it, or not at the moment."""

    directory: Path
    database_url: str
    tables: dict[str, Any]
    courses: dict[str, dict[str, Any]]
    port: int | None = None
    tls: tuple[Path, Path] | None = None
    """Certificate and key; only with a port."""
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def config(self) -> Path:
        return self.directory / "grader-service.toml"

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")

    @property
    def url(self) -> str:
        return f"http{'s' * bool(self.tls)}://127.0.0.1:{self.port}" if self.port else f"unix://{self.directory}/s"

    def configure(self, **courses: dict[str, Any]) -> None:
        """Write the configuration, with these courses changed or added."""
        self.courses |= courses
        top = {"data_directory": str(self.directory / "data"), "database_url": self.database_url, **self.tables}
        lines = [f"{name} = {_toml(value)}" for name, value in top.items()]
        socket_line = f"unix_socket = {json.dumps(f'{self.directory}/s')}"
        lines += ["[listen]", f"port = {self.port}" if self.port else socket_line]
        for name, path in zip(("tls_certificate", "tls_key"), self.tls or (), strict=False):
            lines.append(f"{name} = {json.dumps(str(path))}")
        for name, course in self.courses.items():
            lines.append(f"[courses.{json.dumps(name)}]")
            lines += [f"{key} = {_toml(value)}" for key, value in course.items()]
        self.config.write_text("\n".join(lines) + "\n")
        self.config.chmod(0o600)

    def token(self, course: str = COURSE, *, expires_seconds: float = 3600.0) -> str:
        engine = open_engine(self.database_url)
        try:
            return TokenStore(engine).create(course, expires_seconds=expires_seconds, note="", created_by="a test")[1]
        finally:
            engine.dispose()

    def client(self, token: str | None = None, **options: Any) -> GraderClient:
        return GraderClient(self.url, token or self.token(), **options)

    def raw(self, token: str | None = None) -> httpx.Client:
        """Without any of our client's care."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        transport = None if self.port else httpx.HTTPTransport(uds=f"{self.directory}/s")
        base = self.url if self.port else "http://localhost"
        return httpx.Client(base_url=base, headers=headers, transport=transport, timeout=LONG)

    def start(self, *command: str) -> None:
        """Start it and wait until it is ready. `command` in place of `grader-service serve`, if any."""
        assert self.process is None
        words = command or (sys.executable, "-m", "grader_service.cli", "--config", str(self.config), "serve")
        with open(self.directory / "log", "ab") as log:
            self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        assert eventually(self._ready, LONG), self.log[-3000:]

    def _ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log[-3000:]
        with contextlib.suppress(httpx.TransportError), self.raw() as client:
            return client.get("/v1/ready").status_code == 200
        return False

    def kill(self) -> None:
        """kill -9, of the service itself only."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.process = None

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(LONG)
        self.process = None
        return code

    def workers(self) -> list[int]:
        """Processes of jobs, by what the fork server has forked."""
        return [pid for parent in _children(self.process.pid) for pid in _children(parent)] if self.process else []


def _children(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return [
            int(child)
            for task in os.listdir(f"/proc/{pid}/task")
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split()
        ]
    return []


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_toml(one)}" for name, one in value.items()) + " }"
    return json.dumps(value)


@contextlib.contextmanager
def hosting(
    database_url: str = "", course: dict[str, Any] | None = None, port: int | None = None, **tables: Any
) -> Iterator[Host]:
    """A configured directory with a migrated database; nothing runs yet, and nothing does in the end."""
    # A short name: sockets lie in it. unix(7)
    with tempfile.TemporaryDirectory(prefix="gs ä-", dir="/tmp") as name:
        directory = Path(name)
        (directory / "data").mkdir(mode=0o700)
        url = database_url or f"sqlite:///{directory}/data/service.db"
        usual = {"environment": sys.prefix, "graders": {"tokens_only": True}, "limits": {"wall_seconds": 120}}
        host = Host(directory, url, {"lease_seconds": 5, **tables}, {COURSE: {**usual, **(course or {})}}, port)
        host.configure()
        engine = open_engine(url)
        upgrade(engine)
        engine.dispose()
        try:
            yield host
        finally:
            if host.process is not None:
                host.stop()


def free_port() -> int:
    """One of loopback that nobody listens on at the moment."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
