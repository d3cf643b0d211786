"""The grading service on this machine, for `demo.py --service`: started, waited for, and stopped again."""

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from commands import CommandFailed
from grader_service.client import GraderClient, ServiceError

CONFIG = """\
data_directory = {data}

[listen]
unix_socket = {socket}

[courses.{course}]
environment = {environment}
graders = {{ tokens_only = true }}
"""


@dataclass(frozen=True)
class GradingService:
    """Where the service listens, and the file with the course's token."""

    url: str
    token_file: Path
    course: str

    def client(self) -> GraderClient:
        """A client of the course."""
        return GraderClient(self.url, self.token_file.read_text().strip(), patience_seconds=60)

    @contextlib.contextmanager
    def progress(self, console: Console, text: str) -> Iterator[None]:
        """Show what is done, runs and waits, as the service tells it, until the block ends."""
        ended = threading.Event()

        def watch() -> None:
            with self.client() as client, console.status(text) as status:
                while not ended.wait(0.5):
                    with contextlib.suppress(ServiceError):
                        status.update(f"{text}: {self._counts(client)}")

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _counts(self, client: GraderClient) -> str:
        alive = client.find(self.course, state=["queued", "running"], limit=200).jobs
        done = client.find(self.course, state=["done"], limit=200).jobs
        running = sum(job.state == "running" for job in alive)
        return f"{len(done)} notebooks done, {running} running, {len(alive) - running} waiting"


@contextlib.contextmanager
def running(directory: Path, course: str) -> Iterator[GradingService]:
    """A service of one course, with its data below this directory. Raises `CommandFailed`."""
    data = directory / "data"
    data.mkdir(mode=0o700, parents=True)
    config, socket, token_file = directory / "grader-service.toml", directory / "socket", directory / "token"
    values = {"data": data, "socket": socket, "course": course, "environment": sys.prefix}
    config.write_text(CONFIG.format(**{name: json.dumps(str(value)) for name, value in values.items()}))
    config.chmod(0o600)
    command = [sys.executable, "-m", "grader_service.cli", "--config", str(config)]
    _run([*command, "db", "upgrade"])
    token_file.touch(0o600)
    token_file.write_text(_run([*command, "token", "create", "--course", course, "--expires", "1d"]))
    service = GradingService(f"unix://{socket}", token_file, course)
    log = directory / "service.log"
    with log.open("wb") as out:
        process = subprocess.Popen([*command, "serve"], stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        with service.client() as client:
            client.courses()
        yield service
    except ServiceError as error:
        raise CommandFailed(f"{error}\n{log.read_text(errors='replace')[-3000:]}") from error
    finally:
        process.terminate()
        process.wait()


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CommandFailed(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit("This is a part of demo.py; run that.")
