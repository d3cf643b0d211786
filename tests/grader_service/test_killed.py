"""`kill -9` at random moments, of the service, of workers, of PostgreSQL: each job ends exactly once, none is lost.

Row 95 of the threat catalogue. What runs in a job's place is `short`, except in the last test. The seed is fixed; the
moments are not, since the machine's are not. `benchmarks/service.py kill --kill-minutes 60` does it at length.
"""

import contextlib
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest

from attacks.harness import Stage, eventually
from grader_service.client import GraderClient
from grader_service.schemas import JobView
from postgres import Postgres
from service_host import COURSE, LONG, Host, hosting, notebook, submission, texts
from short_service import __file__ as SHORT

pytestmark = [pytest.mark.slow, pytest.mark.threat(95)]

JOBS = 1000
JOBS_WITHOUT_DATABASE = 300
"""Fewer, since a killed PostgreSQL takes seconds to come back; the benchmark has as many as one likes."""
SUBMITTERS = 8
Kill = Callable[[], None]
T = TypeVar("T")


def kill_during(work: Callable[[], T], kills: list[Kill], seed: int, pause: tuple[float, float]) -> T:
    """Do this work in a thread and call one of these at random moments, until it is done and each was called.

    The kills happen in this thread: what is told to end with its parent ends with the thread that started it. prctl(2)
    """
    chance, names = random.Random(seed), Counter({kill.__name__: 0 for kill in kills})
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        while not future.done() or 0 in names.values():
            time.sleep(chance.uniform(*pause))
            kill = chance.choice(kills)
            kill()
            names[kill.__name__] += 1
        return future.result()


def submit_all(host: Host, count: int) -> list[str]:
    """From several clients at once, who are patient."""
    ids: list[str] = []
    token = host.token()

    def go(numbers: range) -> None:
        with host.client(token, patience_seconds=LONG) as client:
            for number in numbers:
                asked = submission(student=f"s{number}", kind="batch" if number % 3 else "interactive")
                ids.append(client.submit(COURSE, asked, notebook(str(number))).id)

    threads = [threading.Thread(target=go, args=(range(n, count, SUBMITTERS),)) for n in range(SUBMITTERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ids


def wait_all(client: GraderClient) -> None:
    deadline = time.monotonic() + 3 * LONG
    while client.find(COURSE, state=["queued", "running"], limit=1).jobs:
        assert time.monotonic() < deadline, "jobs linger"
        time.sleep(0.2)


def everything(client: GraderClient) -> list[str]:
    states, after = [], None
    while True:
        page = client.find(COURSE, limit=200, after=after)
        states += [job.state for job in page.jobs]
        if (after := page.next) is None:
            return states


def judge(host: Host, ids: list[str], count: int) -> None:
    """Every job ended once, with its own result; what was executed is what was submitted, and nothing else."""
    assert len(set(ids)) == count
    with host.client(patience_seconds=LONG) as client:
        wait_all(client)
        assert Counter(everything(client)) == {"done": count}
        for job_id in random.Random(1).sample(ids, 20):
            assert client.notebook(job_id)
    lines = (host.directory / "data/executed").read_text().splitlines()
    assert {line.split()[0] for line in lines} == set(ids)
    for job_id in ids:
        names = os.listdir(host.directory / "data/jobs" / job_id)
        assert len([name for name in names if name.startswith("result-")]) == 1, names
        bundle = host.directory / "data/jobs" / job_id / "notebook"
        assert eventually(lambda: not bundle.exists(), LONG), names  # noqa: B023


def test_the_service_and_its_workers_are_killed() -> None:
    with hosting(lease_seconds=2, max_attempts=1000, cores=6) as host:
        command = (sys.executable, SHORT, str(host.config))
        host.start(*command)

        def service() -> None:
            host.kill()
            host.start(*command)

        def worker() -> None:
            for pid in host.workers()[:1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

        ids = kill_during(lambda: submit_all(host, JOBS), [service, *[worker] * 8], seed=26, pause=(0.3, 1.5))
        judge(host, ids, JOBS)


def test_postgresql_is_killed(stage: Stage) -> None:
    with (
        Postgres.running(stage) as server,
        hosting(server.create(), lease_seconds=2, max_attempts=1000, cores=6) as host,
    ):
        command = (sys.executable, SHORT, str(host.config))
        host.start(*command)

        def database() -> None:
            server.kill()
            server.start()

        def service() -> None:
            host.kill()
            host.start(*command)

        ids = kill_during(
            lambda: submit_all(host, JOBS_WITHOUT_DATABASE), [database, database, service], seed=27, pause=(2.0, 5.0)
        )
        judge(host, ids, JOBS_WITHOUT_DATABASE)


def test_real_sandboxes_are_killed_with_their_service() -> None:
    """Fewer, with everything real; and no sandbox is left behind."""
    count = 12
    with hosting(lease_seconds=2, max_attempts=1000) as host:
        host.start()

        def service() -> None:
            host.kill()
            host.start()

        def worker() -> None:
            for pid in host.workers()[:1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

        def submit() -> list[JobView]:
            with host.client(patience_seconds=LONG) as client:
                return [client.submit(COURSE, submission(), notebook(f"print({n})")) for n in range(count)]

        jobs = kill_during(submit, [service, worker, worker], seed=28, pause=(1.0, 3.0))
        with host.client(patience_seconds=LONG) as client:
            wait_all(client)
            assert Counter(everything(client)) == {"done": count}
            for number, job in enumerate(jobs):
                assert texts(client.notebook(job.id)) == [f"{number}\n"]
