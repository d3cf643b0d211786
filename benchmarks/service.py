"""The grading service under load: a real one, on SQLite and on PostgreSQL, in a directory of its own.

    python benchmarks/service.py [accept] [dispatch] [memory] [overhead] [kill]

Without a name: all but `kill`. Prints the machine and Markdown that can be put into `docs/benchmarks.md`, which says
what the rows mean. Clients and service share the machine's cores. PostgreSQL's rows say so where it is not installed.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import io
import itertools
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import nbformat
import pytest
from sqlalchemy import func, insert, select

ROOT = Path(__file__).resolve().parents[1]
# The repository before its tests, where directories of the same names lie.
sys.path += [str(path) for path in (ROOT, ROOT / "tests", ROOT / "tests/grader_service")]
# ruff: noqa: E402
import postgres as servers
from attacks.harness import Stage, eventually
from grader_service import policies
from grader_service.bundles import KEPT, Bundles
from grader_service.database import open_engine, writing
from grader_service.jobs import Claimed, JobStore, NewJob
from grader_service.models import JOBS
from grader_service.settings import load
from isolate.notebook import execute
from service_host import COURSE, Host, free_port, hosting, notebook, submission, texts
from short_service import __file__ as SHORT

SQLITE, POSTGRESQL = "SQLite", "PostgreSQL"
MIB = 1 << 20
LONG = 1800.0
"""Seconds: far more than anything here takes."""
HELD = {"limits": {"wall_seconds": 7200}}
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
Urls = dict[str, Callable[[], str] | None]
"""How to get an empty database, by kind; None where there is none of this kind."""


# What everything runs on, and what is printed.


class _Durable(servers._Person):
    """Runs the server as a service's is run: what is committed is on the disk, unlike in tests."""

    def command(self, *argv: str | Path) -> list[str]:
        more = ["-c", "fsync=on"] if Path(argv[0]).name == "postgres" else []
        return super().command(*argv, *more)


class _Postgres(servers.Postgres):
    def __init__(self, binaries: Path, directory: Path, person: servers._Person) -> None:
        super().__init__(binaries, directory, _Durable(person.uid, person.gid))


@contextlib.contextmanager
def databases() -> Iterator[tuple[Urls, servers.Postgres | None]]:
    """SQLite makes its own when it is opened, so its URL is empty."""
    with contextlib.ExitStack() as stack:
        stage = Stage.new()
        stack.callback(stage.close)
        urls: Urls = {SQLITE: lambda: "", POSTGRESQL: None}
        server = None
        with contextlib.suppress(pytest.skip.Exception):
            server = stack.enter_context(_Postgres.running(stage))
            urls[POSTGRESQL] = server.create
        yield urls, server


@contextlib.contextmanager
def place(*arguments: Any, **options: Any) -> Iterator[Host]:
    """`hosting`, of which nothing stays, also when a signal comes while many files are being removed."""
    directory = None
    try:
        with hosting(*arguments, **options) as host:
            directory = host.directory
            yield host
    finally:
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)


def end(number: int, _: object) -> None:
    """Once: what is started and made is taken away, and a second signal does not disturb that."""
    for one in ENDING:
        signal.signal(one, signal.SIG_IGN)
    sys.exit(128 + number)


def machine() -> str:
    """In one line."""
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)
    return (
        f"{model.partition(': ')[2] or platform.machine()}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, "
        f"Linux {platform.release()}, Python {platform.python_version()}, load {os.getloadavg()[0]:.2f} at the start, "
        f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC"
    )


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n| --- |{' ---: |' * (len(columns) - 1)}")
    for row in rows:
        cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row]
        print(f"| {' | '.join(cells)} |")
    sys.stdout.flush()


def percentile(found: Sequence[float], percent: float) -> float:
    """The smallest value that so many per cent of all do not exceed."""
    return sorted(found)[max(0, -int(-len(found) * percent // 100) - 1)]


def spread(found: Sequence[float], scale: float = 1000.0) -> list[float]:
    """Median, 95 %, 99 %, worst."""
    return [scale * percentile(found, percent) for percent in (50, 95, 99, 100)]


def hold_the_only_place(host: Host) -> None:
    """A real job that sleeps until the service ends, so that whatever else is submitted waits."""
    with host.client() as client:
        job = client.submit(
            COURSE, submission(settings={"timeout": None}), notebook(f"import time; time.sleep({LONG})")
        )
        assert eventually(lambda: client.get(job.id).state == "running", LONG)


# accept: many clients submit at once.


def request(host: Host, token: str, data: bytes) -> bytes:
    """A submission as it goes over the wire, with a key of its own."""
    headers = {"Authorization": f"Bearer {token}", "Idempotency-Key": uuid.uuid4().hex, "Connection": "close"}
    job = submission(student=uuid.uuid4().hex, kind="batch").model_dump_json(exclude_unset=True).encode()
    parts = {name: (name, part) for name, part in {"job": job, "notebook": data, "files": data}.items()}
    made = httpx.Request("POST", f"{host.url}/v1/courses/{COURSE}/jobs", headers=headers, files=parts)
    body = made.read()
    lines = [f"POST {made.url.path} HTTP/1.1", *(f"{name}: {value}" for name, value in made.headers.items()), "", ""]
    return "\r\n".join(lines).encode() + body


async def client(port: int, data: bytes, begin: float) -> tuple[float, float]:
    """From before the connection to the end of the answer, which says that the job is on the disk."""
    await asyncio.sleep(max(0.0, begin - time.monotonic()))
    started = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    answer = await reader.read()
    ended = time.monotonic()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 202 "), answer[:500]
    return started, ended


def burst(host: Host, token: str, clients: int, within_seconds: float, data: bytes) -> list[tuple[float, float]]:
    """One submission of each client, at moments spread evenly at random over this time."""
    chance = random.Random(clients)
    ready = [request(host, token, data) for _ in range(clients)]
    assert host.port is not None
    port = host.port

    async def go() -> list[tuple[float, float]]:
        start = time.monotonic() + 0.1
        return await asyncio.gather(*(client(port, one, start + chance.uniform(0, within_seconds)) for one in ready))

    return asyncio.run(go())


def accept_at(url: str, options: argparse.Namespace, running: bool) -> list[list[Any]]:
    """Rows for one database: spread over the time, and all at the same moment."""
    data = notebook("# " + "x" * options.kilobytes * 1000)
    rows = []
    with place(url, HELD, free_port(), cores=2 if running else 1, lease_seconds=60) as host:
        host.start(*((sys.executable, SHORT, str(host.config)) if running else ()))
        if not running:
            hold_the_only_place(host)
        token = host.token()
        burst(host, token, 50, 0, data)  # connections to the database, byte code: not counted
        found: dict[float, list[list[tuple[float, float]]]] = {options.within: [], 0.0: []}
        for _ in range(options.rounds):
            for within, runs in found.items():
                runs.append(burst(host, token, options.clients, within, data))
        submitted = 50 + 2 * options.rounds * options.clients
        store = JobStore(open_engine(host.database_url))
        assert sum(store.counts().values()) == submitted + (not running), "a job was lost"
        for within, runs in found.items():
            rates = [len(run) / (max(end for _, end in run) - min(start for start, _ in run)) for run in runs]
            rows.append(
                [
                    f"within {within:g} s" if within else "all at once",
                    statistics.median(rates),
                    *spread([end - start for run in runs for start, end in run]),
                ]
            )
    return rows


def accept(options: argparse.Namespace, urls: Urls) -> None:
    rows: list[list[Any]] = []
    for running in (False, True):
        for name, url in urls.items():
            title = f"{name}, {'short jobs run meanwhile' if running else 'nothing starts meanwhile'}"
            if url is None:
                rows.append([f"{title}: not installed", *[""] * 5])
                continue
            rows += [[f"{title}, {first}", *others] for first, *others in accept_at(url(), options, running)]
    size = f"a notebook and files of {options.kilobytes} kB each"
    what = f"`accept`: {options.clients} clients submit {size}; {options.rounds} rounds"
    table(what, ["what", "jobs/s", "median ms", "95 % ms", "99 % ms", "worst ms"], rows)


# dispatch: does a start take longer when 100,000 jobs wait?


def fill(host: Host, count: int, kind: str, courses: Sequence[str], *, bundles: bool = True) -> list[str]:
    """Queued jobs, with their files or without; not through HTTP, which would take an hour."""
    jobs = [
        NewJob(
            course=courses[number % len(courses)],
            assignment="ps1",
            student=f"s{number}",
            notebook="p1",
            kind=kind,  # type: ignore[arg-type]
            submitter="token:0",
            digest="0" * 64,
            asked=submission(kind=kind).model_dump(mode="json", exclude_unset=True),
            memory_bytes=MIB,
            bundle_bytes=1000,
            retention_seconds=3600.0,
            idempotency_key=uuid.uuid4().hex,
        )
        for number in range(count)
    ]
    data = notebook("1")
    for job in jobs if bundles else []:
        path = host.directory / "data/jobs" / job.id
        path.mkdir(parents=True)
        (path / "notebook").write_bytes(data)
    values = [
        {**dataclasses.asdict(job), "state": "queued", "attempts": 0, "submitted_at": time.time()} for job in jobs
    ]
    engine = open_engine(host.database_url)
    with writing(engine) as connection:
        for start in range(0, count, 5000):
            connection.execute(insert(JOBS), values[start : start + 5000])
    engine.dispose()
    return [job.id for job in jobs]


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    value = call()
    return time.perf_counter() - started, value


def in_the_store(host: Host, count: int) -> tuple[list[float], list[float]]:
    """Seconds of each claim and of each finish, in this process alone."""
    store = JobStore(open_engine(host.database_url))
    courses = dict.fromkeys(host.courses, 0)
    claims, finishes = [], []
    for number in range(count + 5):
        seconds, claimed = timed(
            lambda: store.claim(courses=courses, memory_free=1 << 40, memory_total=1 << 40, lease_seconds=600)
        )
        assert isinstance(claimed, Claimed)
        end, ended = timed(lambda: store.finish(claimed.job.id, claimed.lease, "done", "", result=False))  # noqa: B023
        assert ended
        if number >= 5:
            claims.append(seconds)
            finishes.append(end)
    return claims, finishes


def through_the_service(host: Host, count: int) -> tuple[float, float]:
    """Seconds from the start of the process to the first job's, and seconds a job from the 20th end to the last."""
    ids = set(fill(host, count, "interactive", [COURSE]))  # which go before all batches
    began = time.time()
    host.start(sys.executable, SHORT, str(host.config))
    engine = open_engine(host.database_url)
    mine = select(JOBS.c.started_at, JOBS.c.ended_at).where(JOBS.c.course == COURSE, JOBS.c.kind == "interactive")
    left = select(func.count()).where(JOBS.c.course == COURSE, JOBS.c.kind == "interactive", JOBS.c.ended_at.is_(None))

    def over() -> bool:
        with engine.connect() as connection:
            return connection.execute(left).scalar_one() == 0

    while not over():
        time.sleep(0.5)
    host.kill()
    with engine.connect() as connection:
        times = connection.execute(mine.where(JOBS.c.id.in_(ids))).all()
    engine.dispose()
    ends = sorted(end for _, end in times)
    return min(start for start, _ in times) - began, (ends[-1] - ends[19]) / (len(ends) - 20)


WORKERS = """
import json, os, sys, time
from grader_service.engines import LocalEngine
engine, times = LocalEngine(), [time.perf_counter()]
for _ in range(int(sys.argv[1]) + 5):
    engine.submit(os.getpid).result()
    times.append(time.perf_counter())
print(json.dumps([end - start for start, end in zip(times, times[1:])][5:]))
"""
"""In a process of its own: workers import the main module of who starts them, and this one is not the service's."""


def dispatch(options: argparse.Namespace, urls: Urls) -> None:
    rows: list[list[Any]] = []
    for name, url in urls.items():
        if url is None:
            rows.append([f"{name}: not installed", *[""] * 6])
            continue
        for queued in (options.jobs + 50, options.queued):
            with place(url(), cores=2, lease_seconds=60) as host:
                host.configure(**{f"course{number}": host.courses[COURSE] for number in range(20)})
                fill(host, queued, "batch", sorted(host.courses), bundles=options.bundles)
                claims, finishes = in_the_store(host, options.jobs)
                first, each = through_the_service(host, options.jobs)
            middle = [1000 * pick for pick in (statistics.median(claims), percentile(claims, 99))]
            ends = [1000 * pick for pick in (statistics.median(finishes), percentile(finishes, 99))]
            rows.append([f"{name}, {queued:,} queued", *middle, *ends, 1000 * each, first])
    forks = json.loads(subprocess.check_output([sys.executable, "-c", WORKERS, str(options.jobs)], cwd=ROOT))
    columns = ["what", "claim, median ms", "99 %", "finish, median ms", "99 %", "whole service, ms a job", "first, s"]
    table(f"`dispatch`: {options.jobs} jobs of 21 courses", columns, rows)
    table(
        "`dispatch`: a worker process, from nothing to its answer",
        ["median ms", "95 %", "99 %", "worst"],
        [spread(forks)],
    )


# memory: bundles and results that are large.


def status(pid: int, name: str) -> float:
    """MiB, of a line of /proc/PID/status. proc_pid_status(5)"""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise LookupError(name)


def large_tar(path: Path, megabytes: int) -> None:
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("data.bin")
        member.size = megabytes * 1_000_000
        archive.addfile(member, io.BytesIO(os.urandom(member.size)))


def ended_with(host: Host, kept: Path, count: int) -> list[str]:
    """Jobs that have ended and left this archive; before the service runs."""
    ids = fill(host, count, "batch", [COURSE])
    store, bundles = JobStore(open_engine(host.database_url)), Bundles(host.directory / "data")
    for _ in ids:
        claimed = store.claim(courses={COURSE: 0}, memory_free=1 << 40, memory_total=1 << 40, lease_seconds=600)
        assert claimed is not None
        with bundles.make_result(claimed.job.id, claimed.lease) as result:
            os.link(kept, result / KEPT)
        assert store.finish(claimed.job.id, claimed.lease, "done", "", result=True)
    return ids


def memory(options: argparse.Namespace, urls: Urls) -> None:
    """On SQLite: where the rows are makes no difference to files."""
    rows: list[list[Any]] = []
    count, size = options.streams, options.megabytes
    with place(course=HELD, port=free_port(), cores=1, lease_seconds=60) as host:
        kept = host.directory / "large.tar"
        large_tar(kept, size)
        ids = ended_with(host, kept, count)
        host.start()
        hold_the_only_place(host)
        assert host.process is not None
        pid, token = host.process.pid, host.token()

        def send(number: int) -> None:
            with host.client(token) as client, open(kept, "rb") as file:
                client.submit(COURSE, submission(student=f"large{number}"), notebook("1"), file)

        def fetch(number: int) -> None:
            with host.client(token) as client, open(os.devnull, "r+b") as file:
                with client._client.stream("GET", f"/v1/jobs/{ids[number]}/files") as answer:
                    assert sum(file.write(chunk) for chunk in answer.iter_bytes(MIB)) == kept.stat().st_size

        for name, work in [("bundles are sent", send), ("results are fetched", fetch)] * 2:
            with contextlib.suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak begins anew. proc_pid_clear_refs(5)
            before = status(pid, "VmRSS")
            with ThreadPoolExecutor(count) as pool:
                seconds, _ = timed(lambda: list(pool.map(work, range(count))))  # noqa: B023
            rows.append([name, before, status(pid, "VmHWM"), status(pid, "VmRSS"), count * size / seconds])
    what = f"`memory`: the service's process while {count} clients stream {size} MB each at once"
    table(what, ["what", "before, MiB", "peak, MiB", "after, MiB", "MB/s together"], rows)


# overhead: one notebook, through the service and without.


def overhead(options: argparse.Namespace, urls: Urls) -> None:
    """One after the other on an idle service; the two take turns."""
    data = notebook("print(1 + 1)")
    names = [
        "through the service, SQLite",
        "until it has started",
        "until it has ended",
        "until the client knows",
        "fetch",
    ]
    samples: dict[str, list[float]] = {name: [] for name in ["`isolate.notebook.execute` in this process", *names]}
    with place(lease_seconds=60) as host, contextlib.ExitStack() as stack:
        host.start()
        course = load(host.config).courses[COURSE]
        client = stack.enter_context(host.client())

        def service() -> list[float]:
            times = [time.time()]
            job = client.wait(client.submit(COURSE, submission(), data).id)
            times.append(time.time())
            assert texts(client.notebook(job.id)) == ["2\n"]
            times.append(time.time())
            assert job.started_at is not None
            assert job.ended_at is not None
            moments = [times[0], job.started_at.timestamp(), job.ended_at.timestamp(), *times[1:]]
            return [times[-1] - times[0], *(b - a for a, b in itertools.pairwise(moments))]

        def here() -> float:
            started = time.time()
            kernel, policy = policies.plan(COURSE, course, policies.Asked("python3", {}))
            done = execute(nbformat.reads(data.decode(), as_version=4), kernel, policy)
            assert done.notebook.cells[0].outputs[0].text == "2\n"
            return time.time() - started

        for number in range(options.notebooks + 1):
            found = [here(), *service()]
            if number:
                for name, seconds in zip(samples, found, strict=True):
                    samples[name].append(seconds)
    rows = [[name, *(1000 * pick(found) for pick in (statistics.median, min, max))] for name, found in samples.items()]
    title = f"`overhead`: a notebook of one cell, {options.notebooks} times; the last rows are parts of the second"
    table(title, ["what", "median ms", "minimum", "maximum"], rows)


# kill: tests/grader_service/test_killed.py, at length.


def kill_round(url: str, server: servers.Postgres | None, jobs: int, seed: int) -> list[Any]:
    """`kill -9` of the service, its workers and, if given, PostgreSQL; fails unless every job ended exactly once."""
    import test_killed

    killed: Counter[str] = Counter()
    started = time.monotonic()
    with place(url, lease_seconds=2, max_attempts=1000, cores=6) as host:
        command = (sys.executable, SHORT, str(host.config))
        host.start(*command)

        def service() -> None:
            host.kill()
            host.start(*command)
            killed["service"] += 1

        def worker() -> None:
            for pid in host.workers()[:1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed["worker"] += 1

        def database() -> None:
            assert server is not None
            server.kill()
            server.start()
            killed["PostgreSQL"] += 1

        kills = [service, *[worker] * 8, *([database] if server else [])]
        pause = (0.5, 3.0) if server else (0.3, 1.5)
        ids = test_killed.kill_during(lambda: test_killed.submit_all(host, jobs), kills, seed=seed, pause=pause)
        test_killed.judge(host, ids, jobs)
        executed = len((host.directory / "data/executed").read_text().splitlines())
    kinds = [killed[name] for name in ("service", "worker", "PostgreSQL")]
    return [POSTGRESQL if server else SQLITE, seed, len(ids), *kinds, executed, time.monotonic() - started]


def kill(options: argparse.Namespace, urls: Urls, server: servers.Postgres | None) -> None:
    """Databases take turns until the time is over; the last round is brought to its end."""
    rows: list[list[Any]] = []
    deadline, seed = time.monotonic() + 60 * options.kill_minutes, options.seed
    while time.monotonic() < deadline:
        for one in [None, server] if server else [None]:
            rows.append(kill_round(one.create() if one else "", one, options.kill_jobs, seed))
            print(f"  {rows[-1]}", file=sys.stderr, flush=True)
        seed += 1
    columns = ["database", "seed", "jobs, each ended once", "service", "worker", "PostgreSQL", "executions", "s"]
    table("`kill`: `kill -9` at random moments while 8 clients submit", columns, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"accept": accept, "dispatch": dispatch, "memory": memory, "overhead": overhead}
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(parts)}, kill")
    parser.add_argument("--clients", type=int, default=500, help="of accept [%(default)s]")
    parser.add_argument("--within", type=float, default=10.0, help="seconds of accept [%(default)s]")
    parser.add_argument("--kilobytes", type=int, default=20, help="of a notebook, and of files [%(default)s]")
    parser.add_argument("--rounds", type=int, default=3, help="of accept [%(default)s]")
    parser.add_argument("--queued", type=int, default=100_000, help="of dispatch [%(default)s]")
    parser.add_argument("--jobs", type=int, default=200, help="of dispatch, more than 20 [%(default)s]")
    parser.add_argument("--bundles", action="store_true", help="dispatch: with files of all queued jobs; takes minutes")
    parser.add_argument("--streams", type=int, default=4, help="of memory [%(default)s]")
    parser.add_argument("--megabytes", type=int, default=200, help="of memory [%(default)s]")
    parser.add_argument("--notebooks", type=int, default=15, help="of overhead [%(default)s]")
    parser.add_argument("--kill-minutes", type=float, default=10.0, help="[%(default)s]")
    parser.add_argument("--kill-jobs", type=int, default=1000, help="of each round [%(default)s]")
    parser.add_argument("--seed", type=int, default=1, help="of the first round of kill [%(default)s]")
    options = parser.parse_args()
    wanted = options.parts or list(parts)
    if unknown := set(wanted) - {*parts, "kill"}:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    tempfile.tempdir = "/tmp"
    for number in ENDING:
        signal.signal(number, end)
    print(machine(), flush=True)
    with databases() as (urls, server):
        for part in wanted:
            if part == "kill":
                kill(options, urls, server)
            else:
                parts[part](options, urls)
    return 0


if __name__ == "__main__":
    sys.exit(main())
