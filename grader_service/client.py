"""A typed client of the service, for processes that wait (`GraderClient`) and for asyncio (`AsyncGraderClient`).

Needs httpx and pydantic, and nothing of the service itself. Each operation is written once, as a generator that
yields requests and is sent responses; the two clients differ only in how they carry them. A request that meets no
service, or one that is restarting, is repeated with growing pauses; a submission carries an idempotency key, so that
repeating it makes no second job.
"""

import asyncio
import contextlib
import io
import json
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping
from typing import IO, Any, Literal, TypeVar
from urllib.parse import quote

import httpx

from grader_service.schemas import ENDED, CourseView, JobPage, JobView, Submission

T = TypeVar("T")
Progress = Callable[[JobView], None]

_WAIT_SECONDS = 25.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.2, 5.0
_TIMEOUT = httpx.Timeout(60.0, connect=10.0)
_LONGEST_DETAIL = 2000


class ServiceError(Exception):
    """The service refused; `status` and `kind` as in its problem document, the text is for people."""

    def __init__(self, status: int, kind: str, detail: str) -> None:
        self.status, self.kind = status, kind
        super().__init__(detail)


class ServiceUnavailable(ServiceError):
    """The service could not be reached, or could not answer, for longer than the client has patience."""


class _Call:
    """One request. `save` names a file for the body; `parts` are those of a submission, opened anew each time."""

    def __init__(
        self,
        method: Literal["GET", "POST"],
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        parts: Mapping[str, bytes | IO[bytes]] | None = None,
        save: IO[bytes] | None = None,
    ) -> None:
        self.method, self.path, self.save = method, path, save
        self.query = {name: value for name, value in (query or {}).items() if value is not None}
        self.headers, self._parts = dict(headers or {}), parts
        self.waits = float(self.query.get("wait", 0))

    def files(self) -> dict[str, Any] | None:
        """For httpx, each from its beginning."""
        if self._parts is None:
            return None
        for part in self._parts.values():
            if not isinstance(part, bytes):
                part.seek(0)
        types = {"job": "application/json"}
        return {name: (name, part, types.get(name, "application/octet-stream")) for name, part in self._parts.items()}


_Steps = Generator[_Call, httpx.Response, T]


def _submit(course: str, submission: Submission, notebook: bytes, files: IO[bytes] | None, key: str) -> _Steps[JobView]:
    parts: dict[str, bytes | IO[bytes]] = {
        "job": submission.model_dump_json(exclude_unset=True).encode(),
        "notebook": notebook,
    }
    if files is not None:
        parts["files"] = files
    call = _Call("POST", f"/v1/courses/{_quoted(course)}/jobs", headers={"Idempotency-Key": key}, parts=parts)
    return JobView.model_validate_json((yield call).content)


def _get(job_id: str, wait: float = 0) -> _Steps[JobView]:
    query = {"wait": wait} if wait else {}
    return JobView.model_validate_json((yield _Call("GET", f"/v1/jobs/{_quoted(job_id)}", query=query)).content)


def _wait(job_id: str, progress: Progress | None, deadline: float | None) -> _Steps[JobView]:
    told = None
    while True:
        left = _WAIT_SECONDS if deadline is None else min(_WAIT_SECONDS, max(0.0, deadline - time.monotonic()))
        # The first look is not a long one, so that a progress display starts at once.
        job = yield from _get(job_id, left if told is not None else 0)
        if progress is not None and job != told:
            progress(job)
        told = job
        if job.state in ENDED or (deadline is not None and time.monotonic() >= deadline):
            return job


def _cancel(job_id: str) -> _Steps[JobView]:
    return JobView.model_validate_json((yield _Call("POST", f"/v1/jobs/{_quoted(job_id)}/cancel")).content)


def _find(course: str, query: Mapping[str, Any]) -> _Steps[JobPage]:
    return JobPage.model_validate_json((yield _Call("GET", f"/v1/courses/{_quoted(course)}/jobs", query=query)).content)


def _courses() -> _Steps[list[CourseView]]:
    return [CourseView.model_validate(one) for one in json.loads((yield _Call("GET", "/v1/courses")).content)]


def _content(job_id: str, what: str) -> _Steps[bytes]:
    return (yield _Call("GET", f"/v1/jobs/{_quoted(job_id)}/{what}")).content


def _save(job_id: str, what: str, file: IO[bytes]) -> _Steps[None]:
    yield _Call("GET", f"/v1/jobs/{_quoted(job_id)}/{what}", save=file)


def _quoted(name: str) -> str:
    return quote(name, safe="")


class _Base:
    """What both clients share: where the service is, and when to try again."""

    def __init__(self, url: str, token: str, patience_seconds: float) -> None:
        """`url` is http(s)://host:port, or unix:///path/of/socket. Raises `ValueError`."""
        self._socket: str | None = None
        if url.startswith("unix://"):
            self._socket, url = url.removeprefix("unix://"), "http://localhost"
        parsed = httpx.URL(url)
        if parsed.scheme not in {"http", "https"} or not parsed.host:
            raise ValueError(f"{url!r} is not the address of a service; write https://host:port or unix:///path")
        self._options: dict[str, Any] = {
            "base_url": url,
            "headers": {"Authorization": f"Bearer {token}"},
            "timeout": _TIMEOUT,
            "follow_redirects": False,  # the token goes to this service alone
        }
        self._patience = patience_seconds

    def _request(self, client: httpx.Client | httpx.AsyncClient, call: _Call) -> httpx.Request:
        timeout = httpx.Timeout(60.0 + call.waits, connect=10.0)
        return client.build_request(
            call.method, call.path, params=call.query, headers=call.headers, files=call.files(), timeout=timeout
        )

    @staticmethod
    def _pause(attempt: int, response: httpx.Response | None) -> float:
        """Seconds before the next try: twice as long each time, a little at random, or what the service asks for."""
        pause = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2**attempt)
        if response is not None and (asked := response.headers.get("Retry-After", "")).isdecimal():
            pause = max(pause, min(float(asked), _LONGEST_PAUSE_SECONDS))
        return float(pause * random.uniform(0.5, 1.0))


_AGAIN = frozenset({502, 503, 504})


def _check(response: httpx.Response) -> None:
    """Raises `ServiceError` for what is not a success. The body has been read."""
    if response.is_success:
        return
    kind, detail = "", response.text[:_LONGEST_DETAIL]
    with contextlib.suppress(ValueError, AttributeError, TypeError):
        problem = response.json()
        errors = "; ".join(problem.get("errors", []))
        kind = str(problem["type"]).removeprefix("urn:grader-service:")
        detail = f"{problem['detail']} {errors}".strip()[:_LONGEST_DETAIL]
    error = ServiceUnavailable if response.status_code in _AGAIN else ServiceError
    raise error(response.status_code, kind, detail or f"the service answered {response.status_code}")


class GraderClient(_Base):
    """The service, for code that waits. A context manager; safe to share between threads."""

    def __init__(self, url: str, token: str, *, patience_seconds: float = 300.0) -> None:
        super().__init__(url, token, patience_seconds)
        transport = httpx.HTTPTransport(uds=self._socket) if self._socket else None
        self._client = httpx.Client(**self._options, transport=transport)

    def __enter__(self) -> "GraderClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def submit(
        self,
        course: str,
        submission: Submission,
        notebook: bytes,
        files: IO[bytes] | None = None,
        *,
        key: str | None = None,
    ) -> JobView:
        """Returns when the job is on the service's disk. `files` is a tar archive that can be rewound."""
        return self._run(_submit(course, submission, notebook, files, key or uuid.uuid4().hex))

    def get(self, job_id: str) -> JobView:
        return self._run(_get(job_id))

    def wait(self, job_id: str, *, progress: Progress | None = None, timeout_seconds: float | None = None) -> JobView:
        """The job when it has ended, or as it is after the timeout. Goes on when the service restarts."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        return self._run(_wait(job_id, progress, deadline))

    def cancel(self, job_id: str) -> JobView:
        return self._run(_cancel(job_id))

    def find(self, course: str, **query: Any) -> JobPage:
        """One page; arguments as in the query of GET /v1/courses/{course}/jobs."""
        return self._run(_find(course, query))

    def courses(self) -> list[CourseView]:
        return self._run(_courses())

    def notebook(self, job_id: str) -> bytes:
        """The executed notebook, JSON."""
        return self._run(_content(job_id, "notebook"))

    def report(self, job_id: str) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(self._run(_content(job_id, "report")))
        return report

    def save_files(self, job_id: str, file: IO[bytes]) -> None:
        """The work directory as the notebook left it, written into this file."""
        self._run(_save(job_id, "files", file))

    def events(self, job_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """(`job` or `cell`, data) as it happens, to the job's end; reconnects."""
        while True:
            with self._client.stream("GET", f"/v1/jobs/{_quoted(job_id)}/events") as response:
                if not response.is_success:
                    response.read()
                    _check(response)
                for event in _events(response.iter_lines()):
                    yield event
                    if event[0] == "job" and event[1]["state"] in ENDED:
                        return

    def _run(self, steps: _Steps[T]) -> T:
        try:
            call = next(steps)
            while True:
                call = steps.send(self._send(call))
        except StopIteration as done:
            result: T = done.value
            return result

    def _send(self, call: _Call) -> httpx.Response:
        deadline = time.monotonic() + self._patience
        for attempt in range(1_000_000):
            response, cause = None, ""
            try:
                response = self._client.send(self._request(self._client, call), stream=True)
                with contextlib.closing(response):
                    if response.is_success and call.save is not None:
                        call.save.seek(0)
                        call.save.truncate()
                        for chunk in response.iter_bytes(1 << 20):
                            call.save.write(chunk)
                        return response
                    response.read()
                if response.status_code not in _AGAIN:
                    _check(response)
                    return response
            except httpx.TransportError as error:
                cause = f"{type(error).__name__}: {error}"
            pause = self._pause(attempt, response)
            if time.monotonic() + pause > deadline:
                _give_up(response, cause, self._options["base_url"])
            time.sleep(pause)
        raise AssertionError("unreachable")


class AsyncGraderClient(_Base):
    """The service, for asyncio. Methods as in `GraderClient`."""

    def __init__(self, url: str, token: str, *, patience_seconds: float = 300.0) -> None:
        super().__init__(url, token, patience_seconds)
        transport = httpx.AsyncHTTPTransport(uds=self._socket) if self._socket else None
        self._client = httpx.AsyncClient(**self._options, transport=transport)

    async def __aenter__(self) -> "AsyncGraderClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._client.aclose()

    async def submit(
        self,
        course: str,
        submission: Submission,
        notebook: bytes,
        files: bytes | None = None,
        *,
        key: str | None = None,
    ) -> JobView:
        parts = None if files is None else io.BytesIO(files)
        return await self._run(_submit(course, submission, notebook, parts, key or uuid.uuid4().hex))

    async def get(self, job_id: str) -> JobView:
        return await self._run(_get(job_id))

    async def wait(
        self, job_id: str, *, progress: Progress | None = None, timeout_seconds: float | None = None
    ) -> JobView:
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        return await self._run(_wait(job_id, progress, deadline))

    async def cancel(self, job_id: str) -> JobView:
        return await self._run(_cancel(job_id))

    async def find(self, course: str, **query: Any) -> JobPage:
        return await self._run(_find(course, query))

    async def courses(self) -> list[CourseView]:
        return await self._run(_courses())

    async def notebook(self, job_id: str) -> bytes:
        return await self._run(_content(job_id, "notebook"))

    async def report(self, job_id: str) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(await self._run(_content(job_id, "report")))
        return report

    async def events(self, job_id: str) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        while True:
            async with self._client.stream("GET", f"/v1/jobs/{_quoted(job_id)}/events") as response:
                if not response.is_success:
                    await response.aread()
                    _check(response)
                lines: list[str] = []
                async for line in response.aiter_lines():
                    lines.append(line)
                    if line == "":
                        for event in _events(iter(lines)):
                            yield event
                            if event[0] == "job" and event[1]["state"] in ENDED:
                                return
                        lines.clear()

    async def _run(self, steps: _Steps[T]) -> T:
        try:
            call = next(steps)
            while True:
                call = steps.send(await self._send(call))
        except StopIteration as done:
            result: T = done.value
            return result

    async def _send(self, call: _Call) -> httpx.Response:
        deadline = time.monotonic() + self._patience
        for attempt in range(1_000_000):
            response, cause = None, ""
            try:
                response = await self._client.send(self._request(self._client, call))
                if response.status_code not in _AGAIN:
                    _check(response)
                    return response
            except httpx.TransportError as error:
                cause = f"{type(error).__name__}: {error}"
            pause = self._pause(attempt, response)
            if time.monotonic() + pause > deadline:
                _give_up(response, cause, self._options["base_url"])
            await asyncio.sleep(pause)
        raise AssertionError("unreachable")


def _give_up(response: httpx.Response | None, cause: str, url: str) -> None:
    if response is not None:
        _check(response)
    raise ServiceUnavailable(0, "unreachable", f"the grading service at {url} cannot be reached: {cause}")


def _events(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Server-sent events with JSON data. HTML standard, 9.2.6"""
    name, data = "", ""
    for line in lines:
        if line.startswith("event:"):
            name = line.removeprefix("event:").strip()
        elif line.startswith("data:"):
            data += line.removeprefix("data:").strip()
        elif not line:
            if name and data:
                yield name, json.loads(data)
            name, data = "", ""
