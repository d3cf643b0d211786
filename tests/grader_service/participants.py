"""Processes that use one database at the same time, and that a test may kill.

As a script: does what each line of stdin says and answers with one line of JSON. As a module: how a test starts such
processes and asks them. What a process has finished it writes into a file, so that a killed one has told, too.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, event

from grader_service.database import check_revision, open_engine, retrying, upgrade
from grader_service.jobs import Claimed, JobStore, NewJob

REPOSITORY = Path(__file__).resolve().parents[2]
GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Participant:
    """A running process, seen by the test."""

    process: "subprocess.Popen[str]"

    def tell(self, *words: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the process ended without an answer"
        return json.loads(line)

    def ask(self, *words: object) -> Any:
        self.tell(*words)
        return self.answer()

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def participants(url: str, count: int) -> Iterator[list[Participant]]:
    """So many processes that are ready; killed at the end."""
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(_started(url)) for _ in range(count)]
        for one in started:
            assert one.answer() == "ready"
        yield started


@contextlib.contextmanager
def _started(url: str) -> Iterator[Participant]:
    process = subprocess.Popen(
        [sys.executable, "-P", __file__, url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, sys.path)])},
        text=True,
    )
    try:
        yield Participant(process)
    finally:
        process.kill()
        with process:
            pass


def new_job(**different: Any) -> NewJob:
    """A batch job of one GiB in the course `algebra`."""
    values: dict[str, Any] = {
        "course": "algebra",
        "assignment": "ps1",
        "student": "ada",
        "notebook": "problem1",
        "kind": "batch",
        "submitter": "inka",
        "digest": "0" * 64,
        "asked": {"kernel": "python3", "limits": {}},
        "memory_bytes": GIB,
        "bundle_bytes": 1000,
        "retention_seconds": 7 * 86_400.0,
    }
    return NewJob(**{**values, **different})


class _Commands:
    """What a process can be told."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._store = engine, JobStore(engine)

    def upgrade(self) -> bool:
        upgrade(self._engine)
        check_revision(self._engine)
        return True

    def claim(self, courses: dict[str, int], lease_seconds: float = 60) -> list[str] | None:
        claimed = self._claim(courses, lease_seconds)
        return [claimed.job.id, claimed.lease] if claimed else None

    def claim_all(self, courses: dict[str, int]) -> list[str]:
        found = []
        while claimed := self._claim(courses, 60):
            found.append(claimed.job.id)
        return found

    def add(self, count: int, key: str | None, quota: int) -> list[list[Any]]:
        """[id, whether it is new] of each; those over the quota are left out."""
        found: list[list[Any]] = []
        for _ in range(count):
            with contextlib.suppress(Exception if quota else ()):
                job, created = self._store.add(new_job(idempotency_key=key), quota)
                found.append([job.id, created])
        return found

    def add_for_ever(self, path: str) -> None:
        """Submit until killed; what was accepted is in the file."""
        with open(path, "a", buffering=1) as log:
            while True:
                new = new_job()
                job, created = retrying(lambda new=new: self._store.add(new))  # type: ignore[misc]
                log.write(f"{job.id} {created}\n")

    def run_all(self, courses: dict[str, int], path: str) -> int:
        """Claim and finish until nothing is left; what was finished is in the file."""
        count = 0
        with open(path, "a", buffering=1) as log:
            while claimed := retrying(lambda: self._claim(courses, 60)):
                job_id, lease = claimed.job.id, claimed.lease
                if retrying(lambda job_id=job_id, lease=lease: self._store.finish(job_id, lease, "done", "", True)):  # type: ignore[misc]
                    log.write(f"{job_id} {lease}\n")
                    count += 1
        return count

    def run_all_for_ever(self, courses: dict[str, int], path: str) -> None:
        """The same until killed, whatever happens to the database."""
        while True:
            self.run_all(courses, path)

    def claim_but_wait_before_the_commit(self, courses: dict[str, int]) -> Sequence[str] | None:
        def wait(_connection: Connection) -> None:
            print(json.dumps("committing"), flush=True)
            sys.stdin.readline()

        event.listen(self._engine, "commit", wait)
        return self.claim(courses)

    def _claim(self, courses: dict[str, int], lease_seconds: float) -> Claimed | None:
        plenty = 1 << 50
        return self._store.claim(courses=courses, memory_free=plenty, memory_total=plenty, lease_seconds=lease_seconds)


def _main(url: str) -> None:
    commands = _Commands(open_engine(url, pool_size=1))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(commands, name)(*arguments)), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1])
