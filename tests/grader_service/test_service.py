"""The whole service as its clients meet it: a real process, a real database, real sandboxes."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from attacks.harness import eventually
from grader_service.client import GraderClient, ServiceError, ServiceUnavailable
from grader_service.schemas import JobView
from service_host import COURSE, LONG, Host, hosting, notebook, submission, texts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    other = {"environment": sys.prefix, "graders": {"tokens_only": True}}
    with hosting(course={"limits": {"wall_seconds": 120, "memory_bytes": "1G"}, "daily_quota": 1000}) as host:
        host.configure(other=other, narrow={**other, "daily_quota": 2}, alone={**other, "concurrent_jobs": 1})
        host.start()
        yield host


@pytest.fixture(scope="module")
def client(host: Host) -> Iterator[GraderClient]:
    with host.client() as client:
        yield client


def done(client: GraderClient, job: JobView) -> JobView:
    job = client.wait(job.id, timeout_seconds=LONG)
    assert job.state == "done", job
    return job


def archive(**files: bytes) -> io.BytesIO:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file


def test_a_notebook_is_executed_beside_its_files(client: GraderClient) -> None:
    job = client.submit(COURSE, submission(), notebook("print(open('data').read())", "1/0"), archive(data=b"kolme"))
    assert (job.state, job.submitter.partition(":")[0]) == ("queued", "token")
    job = done(client, job)
    assert texts(client.notebook(job.id)) == ["kolme\n", "ZeroDivisionError"]
    report = client.report(job.id)
    assert report["ended"] == "finished"
    assert report["layers"]
    assert job.attempts == 1
    assert job.started_at is not None
    assert job.ended_at is not None
    assert job.submitted_at <= job.started_at <= job.ended_at


def test_the_work_directory_goes_on_to_the_next_notebook(client: GraderClient) -> None:
    first = client.submit(COURSE, submission(keep_files=True), notebook("open('left', 'w').write('x' * 1000)"))
    kept = io.BytesIO()
    client.save_files(done(client, first).id, kept)
    second = done(client, client.submit(COURSE, submission(), notebook("print(len(open('left').read()))"), kept))
    assert texts(client.notebook(second.id)) == ["1000\n"]
    with pytest.raises(ServiceError) as caught:
        client.save_files(second.id, io.BytesIO())
    assert caught.value.status == 404


def test_what_is_asked_is_what_the_sandbox_has(client: GraderClient) -> None:
    asked = submission(
        limits={"wall_seconds": 60, "memory_bytes": 700 << 20},
        environment={"COURSE_YEAR": "2026"},
        settings={"timeout": 2},
        skip=[1],
        timeouts={2: 1.0},
    )
    cells = ["import os; print(os.environ['COURSE_YEAR'])", "print('skipped')", "while True: pass"]
    job = done(client, client.submit(COURSE, asked, notebook(*cells)))
    printed, skipped, error = texts(client.notebook(job.id))
    assert (printed, skipped) == ("2026\n", "")
    assert error.endswith("CellTimeoutError")  # on a busy machine after the KeyboardInterrupt that it caused
    assert client.report(job.id)["limits"] == ["timeout"]


@pytest.mark.threat(92)
@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"limits": {"memory_bytes": 1 << 40}}, "memory_bytes"),
        ({"limits": {"wall_seconds": 1e6}}, "wall_seconds"),
        ({"limits": {"no_such_limit": 1}}, "no_such_limit"),
    ],
)
def test_more_than_the_policy_allows_is_refused(
    client: GraderClient, values: dict[str, dict[str, float]], says: str
) -> None:
    with pytest.raises(ServiceError, match=says) as caught:
        client.submit(COURSE, submission(**values), notebook("1"))
    assert (caught.value.status, caught.value.kind) == (422, "policy")


@pytest.mark.threat(92)
@pytest.mark.parametrize(
    "extra",
    [
        {"read_only": ["/etc"]},
        {"environment_prefix": "/root"},
        {"tier": "landlock"},
        {"kernel": "../../../etc"},
        {"kernel": "/bin/sh"},
        {"limits": {"memory_bytes": -1}},
        {"limits": {"memory_bytes": 1e400}},
        {"student": "a/b"},
        {"student": "a\nb"},
        {"environment": {"A=B": "c"}},
        {"skip": [-1]},
        {"settings": {"error_on_timeout": {"ename": float("nan")}}},
    ],
)
def test_what_no_client_may_say_is_refused(host: Host, extra: dict[str, object]) -> None:
    asked = {"assignment": "ps1", "student": "aino", "notebook": "p1", **extra}
    files = {"job": json.dumps(asked).encode(), "notebook": notebook("1")}
    with host.raw(host.token()) as raw:
        answer = raw.post(f"/v1/courses/{COURSE}/jobs", files=files)
    assert answer.status_code == 422, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert "aino" not in answer.text


def test_an_unknown_kernel_fails_with_its_name(client: GraderClient) -> None:
    job = client.submit(COURSE, submission(kernel="nosuchkernel"), notebook("1"))
    job = client.wait(job.id, timeout_seconds=LONG)
    assert job.state == "failed"
    assert "nosuchkernel" in job.reason


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b'{"nbformat": 4}', b"[" * 100_000, b"\xff\xfe"])
def test_what_is_no_notebook_fails_and_says_so(client: GraderClient, data: bytes) -> None:
    job = client.wait(client.submit(COURSE, submission(), data).id, timeout_seconds=LONG)
    assert job.state == "failed"
    assert "notebook" in job.reason
    assert job.attempts == 1


def test_half_a_surrogate_pair_is_executed_and_comes_back(client: GraderClient) -> None:
    document = json.loads(notebook("print(1)", "x"))
    document["cells"][1]["source"] = "# \ud800\nprint(2)"
    data = json.dumps(document).encode()
    job = client.wait(client.submit(COURSE, submission(), data).id, timeout_seconds=LONG)
    assert (job.state, job.attempts) == ("done", 1), job
    executed = json.loads(client.notebook(job.id))
    assert "".join(executed["cells"][1]["source"]) == document["cells"][1]["source"]


def test_what_is_no_archive_fails_and_says_so(client: GraderClient) -> None:
    job = client.submit(COURSE, submission(), notebook("1"), io.BytesIO(b"no archive" * 1000))
    job = client.wait(job.id, timeout_seconds=LONG)
    assert job.state == "failed", job


def test_progress_tells_of_cells_and_of_nothing_else(client: GraderClient) -> None:
    job = client.submit(COURSE, submission(), notebook("print('salaisuus')", "import time; time.sleep(2)", "1"))
    events = list(client.events(job.id))
    cells = [(data["index"], data["state"]) for name, data in events if name == "cell"]
    assert cells == [(index, state) for index in range(3) for state in ("started", "finished")]
    assert all(set(data) == {"index", "state", "attempt"} for name, data in events if name == "cell")
    states = [data["state"] for name, data in events if name == "job"]
    assert states[-1] == "done"
    assert "running" in states
    assert "salaisuus" not in str(events)


def test_waiting_ends_with_the_job_and_not_before(host: Host, client: GraderClient) -> None:
    seen: list[JobView] = []
    job = client.submit(COURSE, submission(), notebook("import time; time.sleep(3)"))
    with host.raw(host.token()) as raw:
        assert raw.get(f"/v1/jobs/{job.id}?wait=0.1").json()["state"] in {"queued", "running"}
    job = client.wait(job.id, progress=seen.append, timeout_seconds=LONG)
    assert job.state == "done"
    assert [one.state for one in seen][-1] == "done"


class TestIdempotency:
    def test_the_same_submission_again_is_the_same_job(self, client: GraderClient) -> None:
        key, data = uuid.uuid4().hex, notebook("1")
        first = client.submit(COURSE, submission(), data, key=key)
        assert client.submit(COURSE, submission(), data, key=key).id == first.id

    def test_another_submission_under_the_key_is_refused(self, host: Host, client: GraderClient) -> None:
        key = uuid.uuid4().hex
        client.submit(COURSE, submission(), notebook("1"), key=key)
        before = os.listdir(host.directory / "data/jobs")
        with pytest.raises(ServiceError) as caught:
            client.submit(COURSE, submission(), notebook("2"), key=key)
        assert (caught.value.status, caught.value.kind) == (409, "key-reused")
        assert len(os.listdir(host.directory / "data/jobs")) <= len(before)

    def test_many_at_once_make_one_job(self, client: GraderClient) -> None:
        key, data, found = uuid.uuid4().hex, notebook("1"), []
        threads = [
            threading.Thread(target=lambda: found.append(client.submit(COURSE, submission(), data, key=key).id))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 8
        assert len(set(found)) == 1


class TestCancel:
    def test_a_running_job_stops_with_its_sandbox(self, host: Host, client: GraderClient) -> None:
        job = client.submit(COURSE, submission(), notebook("import time; time.sleep(100)"))
        assert eventually(lambda: client.get(job.id).state == "running" and bool(host.workers()), LONG)
        assert client.cancel(job.id).state == "cancelled"
        assert client.wait(job.id, timeout_seconds=LONG).state == "cancelled"
        assert eventually(lambda: not host.workers(), LONG)
        with pytest.raises(ServiceError) as caught:
            client.notebook(job.id)
        assert caught.value.status == 404

    def test_a_queued_job_never_runs(self, host: Host) -> None:
        with host.client(host.token("alone")) as client:
            first = client.submit("alone", submission(), notebook("import time; time.sleep(100)"))
            second = client.submit("alone", submission(), notebook("1"))
            assert eventually(lambda: client.get(first.id).state == "running", LONG)
            assert "1 of 1" in client.get(second.id).waiting
            assert client.cancel(second.id).state == "cancelled"
            assert client.cancel(first.id).state == "cancelled"
            assert client.get(second.id).started_at is None

    def test_what_has_ended_stays_as_it_is(self, client: GraderClient) -> None:
        job = done(client, client.submit(COURSE, submission(), notebook("1")))
        assert client.cancel(job.id).state == "done"
        assert client.notebook(job.id)


@pytest.mark.threat(91)
class TestWhoMay:
    def paths(self, job: JobView) -> list[tuple[str, str]]:
        jobs = [("GET", ""), ("GET", "/notebook"), ("GET", "/report"), ("GET", "/files"), ("GET", "/events")]
        own = [*((method, f"/v1/jobs/{job.id}{tail}") for method, tail in jobs), ("POST", f"/v1/jobs/{job.id}/cancel")]
        return [*own, ("GET", f"/v1/courses/{COURSE}/jobs"), ("POST", f"/v1/courses/{COURSE}/jobs")]

    @pytest.mark.parametrize(
        "header",
        [None, "", "Bearer", "Bearer x", "Basic eDp4", "token x", "Bearer gst_000000000000_" + "a" * 43],
    )
    def test_no_token_or_a_wrong_one(self, host: Host, client: GraderClient, header: str | None) -> None:
        job = client.submit(COURSE, submission(), notebook("1"))
        for method, path in [*self.paths(job), ("GET", "/v1/courses")]:
            with host.raw() as raw:
                answer = raw.request(method, path, headers={"Authorization": header} if header is not None else {})
            assert answer.status_code == 401, (path, answer.text)
            assert not any(word in answer.text for word in (job.id, COURSE, "aino")), answer.text

    def test_another_courses_token(self, host: Host, client: GraderClient) -> None:
        job = client.submit(COURSE, submission(), notebook("1"))
        with host.raw(host.token("other")) as raw:
            for method, path in self.paths(job):
                answer = raw.request(method, path)
                assert answer.status_code in {403, 404}, (path, answer.text)
                strange = raw.request(method, path.replace(job.id, str(uuid.uuid4())).replace(COURSE, "nosuch"))
                assert (answer.status_code, answer.json()) == (strange.status_code, strange.json())
            assert [course["name"] for course in raw.get("/v1/courses").json()] == ["other"]

    def test_a_token_that_was_revoked_or_has_expired(self, host: Host) -> None:
        run = [sys.executable, "-m", "grader_service.cli", "--config", str(host.config)]
        token = subprocess.run(
            [*run, "token", "create", "--course", COURSE], capture_output=True, text=True, check=True
        ).stdout.strip()
        with host.raw(token) as raw:
            assert raw.get("/v1/courses").status_code == 200
            subprocess.run([*run, "token", "revoke", token.split("_")[1]], capture_output=True, check=True)
            assert raw.get("/v1/courses").status_code == 401
        with host.raw(host.token(expires_seconds=0.01)) as raw:
            assert eventually(lambda: raw.get("/v1/courses").status_code == 401, 10)


@pytest.mark.threat(94)
@pytest.mark.parametrize(
    "path",
    [
        "/v1/jobs/' OR 1=1 --",
        "/v1/jobs/..%2f..%2fetc%2fpasswd",
        "/v1/jobs/../../../etc/passwd",
        "/v1/courses/x' OR '1'='1/jobs",
        f"/v1/courses/{COURSE}/jobs?after=1%20OR%201=1",
        f"/v1/courses/{COURSE}/jobs?student=%25",
        f"/v1/courses/{COURSE}/jobs?student='%20OR%201=1--",
        f"/v1/courses/{COURSE}/jobs?after=%00",
        f"/v1/courses/{COURSE}/jobs?student=%00",
    ],
)
def test_what_is_injected_is_inert(host: Host, client: GraderClient, path: str) -> None:
    client.submit(COURSE, submission(), notebook("1"))
    with host.raw(host.token()) as raw:
        answer = raw.get(path, headers={"Idempotency-Key": "a"})
    assert answer.status_code < 500, answer.text
    if answer.status_code == 200:
        assert answer.json() == {"jobs": [], "next": None}
    assert "root:" not in answer.text


@pytest.mark.threat(94)
def test_headers_cannot_be_injected(host: Host) -> None:
    asked = submission(student='x" \\ ; filename="y', notebook="n: m")
    with host.client() as client:
        job = done(client, client.submit(COURSE, asked, notebook("1")))
    with host.raw(host.token()) as raw:
        answer = raw.get(f"/v1/jobs/{job.id}/notebook")
    assert answer.headers["content-disposition"] == 'attachment; filename="notebook.ipynb"'
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_lists_have_pages_and_filters(host: Host) -> None:
    with host.client(host.token("other")) as client:
        ids = [client.submit("other", submission(student=f"s{n % 2}"), notebook()).id for n in range(5)]
        page = client.find("other", limit=3)
        rest = client.find("other", limit=3, after=page.next)
        assert [job.id for job in [*page.jobs, *rest.jobs]] == ids[::-1]
        assert rest.next is None
        assert len(client.find("other", student="s1").jobs) == 2
        assert eventually(lambda: len(client.find("other", state=["done"]).jobs) == 5, LONG)


def test_a_quota_says_when_to_come_back(host: Host) -> None:
    with host.client(host.token("narrow")) as client:
        for _ in range(2):
            client.submit("narrow", submission(), notebook("1"))
        with pytest.raises(ServiceError, match="seconds") as caught:
            client.submit("narrow", submission(), notebook("1"))
        assert (caught.value.status, caught.value.kind) == (429, "quota")


def test_operations_are_seen_without_a_name(host: Host, client: GraderClient) -> None:
    client.submit(COURSE, submission(student="salanimi"), notebook("1"))
    with host.raw() as raw:
        assert raw.get("/v1/health").json() == {"status": "ok"}
        metrics = raw.get("/metrics").text
        assert f'grader_jobs{{course="{COURSE}",state="' in metrics
        assert "salanimi" not in metrics
        document = raw.get("/v1/openapi.json").json()
    assert document["info"]["title"] == "grader-service"
    assert "salanimi" not in host.log


class TestRestart:
    """These have services of their own: they stop them."""

    def test_who_waits_is_answered_when_the_service_stops_and_events_go_on_after_it(self) -> None:
        with hosting() as host:
            host.start()
            token = host.token()
            seen: list[tuple[str, dict[str, object]]] = []
            with host.client(token, patience_seconds=LONG) as client, host.raw(token) as raw:
                job = client.submit(COURSE, submission(), notebook("import time; time.sleep(6)"))
                thread = threading.Thread(target=lambda: seen.extend(client.events(job.id)))
                with raw.stream("GET", f"/v1/jobs/{job.id}/events") as stream:
                    lines = stream.iter_lines()
                    assert eventually(lambda: '"running"' in next(lines), LONG)
                    thread.start()
                    assert host.stop() == 0
                    assert list(lines)  # to a proper end: a stream that is cut off raises
                assert "graceful shutdown exceeded" not in host.log
                host.start()
                thread.join()
            assert [data["state"] for name, data in seen if name == "job"][-1] == "done"

    def test_jobs_and_waiting_clients_outlive_the_service(self) -> None:
        with hosting() as host:
            host.start()
            with host.client(patience_seconds=LONG) as client:
                jobs = [client.submit(COURSE, submission(), notebook("import time; time.sleep(2)")) for _ in range(3)]
                answers: list[JobView] = []
                threads = [
                    threading.Thread(target=lambda job=job: answers.append(client.wait(job.id, timeout_seconds=LONG)))
                    for job in jobs
                ]
                for thread in threads:
                    thread.start()
                assert eventually(lambda: any(client.get(job.id).state == "running" for job in jobs), LONG)
                host.kill()
                host.start()
                for thread in threads:
                    thread.join()
            assert [answer.state for answer in answers] == ["done"] * 3

    def test_a_stopped_service_puts_back_what_runs_and_counts_no_attempt(self) -> None:
        with hosting() as host:
            host.start()
            token = host.token()
            with host.client(token) as client:
                job = client.submit(COURSE, submission(), notebook("import time; time.sleep(100)"))
                assert eventually(lambda: client.get(job.id).state == "running", LONG)
            assert host.stop() == 0
            host.start()
            with host.client(token) as client:
                assert eventually(lambda: client.get(job.id).state == "running", LONG)
                assert client.get(job.id).attempts == 1
                client.cancel(job.id)

    def test_a_worker_that_is_killed_is_replaced(self) -> None:
        with hosting() as host:
            host.start()
            with host.client() as client:
                job = client.submit(COURSE, submission(), notebook("import time; time.sleep(3)"))
                assert eventually(lambda: len(host.workers()) == 1, LONG)
                os.kill(host.workers()[0], signal.SIGKILL)
                job = client.wait(job.id, timeout_seconds=LONG)
                assert (job.state, job.attempts) == ("done", 2)

    def test_a_job_that_kills_its_workers_is_parked(self) -> None:
        with hosting(max_attempts=2) as host:
            host.start()
            with host.client() as client:
                job = client.submit(COURSE, submission(), notebook("import time; time.sleep(30)"))
                for attempt in (1, 2):
                    assert eventually(lambda: client.get(job.id).attempts == attempt and bool(host.workers()), LONG)  # noqa: B023
                    (pid,) = host.workers()
                    os.kill(pid, signal.SIGKILL)
                    assert eventually(lambda: pid not in host.workers(), LONG)  # noqa: B023
                job = client.wait(job.id, timeout_seconds=LONG)
                assert job.state == "failed"
                assert "attempt 2 of 2" in job.reason

    def test_the_configuration_is_read_again_without_losing_a_job(self) -> None:
        with hosting() as host:
            host.start()
            token = host.token()
            with host.client(token) as client:
                job = client.submit(COURSE, submission(), notebook("import time; time.sleep(5)"))
                assert eventually(lambda: client.get(job.id).state == "running", LONG)
                host.configure(fresh={"environment": sys.prefix, "graders": {"tokens_only": True}})
                assert host.process is not None
                host.process.send_signal(signal.SIGHUP)
                with host.raw(host.token("fresh")) as raw:
                    assert eventually(lambda: len(raw.get("/v1/courses").json()) == 1, LONG)
                text = host.config.read_text()
                host.config.write_text(text.replace("environment", "enviroment"))
                host.process.send_signal(signal.SIGHUP)
                assert eventually(lambda: "reload_refused" in host.log, LONG)
                assert client.wait(job.id, timeout_seconds=LONG).state == "done"

    def test_a_waiting_job_has_the_memory_that_it_was_counted_with(self) -> None:
        """Else raised defaults would start more than fits into the host."""
        with hosting(course={"limits": {"memory_bytes": "400M"}}, cores=1) as host:
            host.start()
            with host.client() as client:
                first = client.submit(COURSE, submission(), notebook("import time; time.sleep(5)"))
                assert eventually(lambda: client.get(first.id).state == "running", LONG)
                second = client.submit(COURSE, submission(), notebook("x = bytearray(700 << 20)"))
                host.configure(**{COURSE: {**host.courses[COURSE], "limits": {"memory_bytes": "2G"}}})
                assert host.process is not None
                host.process.send_signal(signal.SIGHUP)
                assert eventually(lambda: '"reloaded"' in host.log, LONG), host.log
                third = client.submit(COURSE, submission(), notebook("x = bytearray(700 << 20)"))
                for job, limits in ((second, ["memory"]), (third, [])):
                    assert client.wait(job.id, timeout_seconds=LONG).state == "done"
                    assert list(client.report(job.id)["limits"]) == limits

    def test_purging_a_student_leaves_nothing_of_hers(self) -> None:
        with hosting() as host:
            host.start()
            run = [sys.executable, "-m", "grader_service.cli", "--config", str(host.config), "purge", "--student"]
            with host.client() as client:
                kept = client.submit(COURSE, submission(student="other"), notebook("'other'"))
                gone = [client.submit(COURSE, submission(student="liisa"), notebook("'liisa'")) for _ in range(2)]
                done(client, gone[0])
                client.wait(kept.id, timeout_seconds=LONG)
                said = subprocess.run([*run, "liisa"], capture_output=True, text=True, check=True).stdout
                assert "2 jobs would be deleted" in said
                said = subprocess.run([*run, "liisa", "--yes"], capture_output=True, text=True, check=True).stdout
                assert f"{COURSE}: 2 jobs deleted" in said
                for job in gone:
                    with pytest.raises(ServiceError):
                        client.get(job.id)
                assert client.notebook(kept.id)
            assert eventually(lambda: not host.workers(), LONG)
            for path in host.directory.rglob("*"):
                if path.is_file() and path.name != "log":
                    assert b"liisa" not in path.read_bytes(), path

    def test_retention_ends(self) -> None:
        with hosting(course={"retention": "1s"}) as host:
            host.start()
            token = host.token()
            with host.client(token) as client:
                job = done(client, client.submit(COURSE, submission(), notebook("1")))
            host.stop()
            time.sleep(1)
            host.start()
            with host.client(token) as client:

                def is_gone() -> bool:
                    with pytest.raises(ServiceError), contextlib.suppress(AssertionError):
                        client.get(job.id)
                    return not (host.directory / "data/jobs" / job.id).exists()

                assert eventually(is_gone, LONG)


def test_a_client_gives_up_and_says_where_it_looked(tmp_path: Path) -> None:
    with GraderClient(f"unix://{tmp_path}/none", "x", patience_seconds=0.5) as client:
        with pytest.raises(ServiceUnavailable, match="cannot be reached"):
            client.courses()
    with pytest.raises(ValueError, match="address"):
        GraderClient("ftp://x", "x")
