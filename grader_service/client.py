"""A typed client of the service, for processes that wait (`GraderClient`) and for asyncio (`AsyncGraderClient`).

Needs httpx and pydantic, and nothing of the service itself. Each operation is written once, in
`calls`; the two clients differ only in how they carry them. A request that meets no
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
from collections.abc import AsyncIterator, Iterator
from typing import IO, Any, TypeVar

import httpx

from grader_service import calls
from grader_service.schemas import ENDED, CourseView, JobPage, JobView, Submission
from grader_service.values import is_loopback

T = TypeVar("T")
Progress = calls.Progress

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


class _Base:
    """What both clients share: where the service is, and when to try again."""

    def __init__(self, url: str, token: str, patience_seconds: float, plain_http_beyond_loopback: bool) -> None:
        """As `GraderClient`'s."""
        self._socket: str | None = None
        where = url
        if url.startswith("unix://"):
            self._socket, url = url.removeprefix("unix://"), "http://localhost"
        parsed = httpx.URL(url)
        if parsed.scheme not in {"http", "https"} or not parsed.host:
            raise ValueError(f"{url!r} is not the address of a service; write https://host:port or unix:///path")
        if parsed.scheme == "http" and not is_loopback(parsed.host) and not plain_http_beyond_loopback:
            raise ValueError(
                f"{url!r} is plain HTTP beyond loopback, where token and submissions would travel in the open"
            )
        self._options: dict[str, Any] = {
            "base_url": url,
            "headers": {"Authorization": f"Bearer {token}"},
            "timeout": _TIMEOUT,
            "follow_redirects": False,  # the token goes to this service alone
            "trust_env": parsed.scheme == "https",  # a proxy's variable would send it elsewhere in the open
        }
        self._patience, self._where = patience_seconds, where

    def _request(self, client: httpx.Client | httpx.AsyncClient, call: calls.Call) -> httpx.Request:
        timeout = httpx.Timeout(60.0 + call.waits, connect=10.0)
        return client.build_request(
            call.method, call.path, params=call.query, headers=call.headers, files=call.files(), timeout=timeout
        )

    @staticmethod
    def _pause(attempt: int, response: httpx.Response | None) -> float:
        """Seconds before the next try: twice as long each time, a little at random, or what the service asks for."""
        pause = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2 ** min(attempt, 10))
        if response is not None and (asked := response.headers.get("Retry-After", "")).isdecimal():
            pause = max(pause, min(float(asked), _LONGEST_PAUSE_SECONDS))
        return float(pause * random.uniform(0.5, 1.0))

    def _pause_after(self, error: Exception, failures: int, heard: float) -> float:
        """Seconds before the stream is opened again. Raises `ServiceUnavailable` when it was silent for too long."""
        if time.monotonic() - heard > self._patience:
            _give_up(None, f"{type(error).__name__}: {error}", self._where)
        return self._pause(failures, None)


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

    def __init__(
        self, url: str, token: str, *, patience_seconds: float = 300.0, plain_http_beyond_loopback: bool = False
    ) -> None:
        """`url` is http(s)://host:port, or unix:///path/of/socket; http:// only of this machine, unless told otherwise.

        Raises `ValueError` for another `url`.
        """
        super().__init__(url, token, patience_seconds, plain_http_beyond_loopback)
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
        return self._run(calls.submit(course, submission, notebook, files, key or uuid.uuid4().hex))

    def get(self, job_id: str) -> JobView:
        return self._run(calls.get(job_id))

    def wait(self, job_id: str, *, progress: Progress | None = None, timeout_seconds: float | None = None) -> JobView:
        """The job when it has ended, or as it is after the timeout. Goes on when the service restarts."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        return self._run(calls.wait(job_id, progress, deadline))

    def cancel(self, job_id: str, *, patience_seconds: float | None = None) -> JobView:
        return self._run(calls.cancel(job_id), patience_seconds)

    def find(self, course: str, **query: Any) -> JobPage:
        """One page; arguments as in the query of GET /v1/courses/{course}/jobs."""
        return self._run(calls.find(course, query))

    def courses(self) -> list[CourseView]:
        return self._run(calls.courses())

    def notebook(self, job_id: str) -> bytes:
        """The executed notebook, JSON."""
        return self._run(calls.content(job_id, "notebook"))

    def report(self, job_id: str) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(self._run(calls.content(job_id, "report")))
        return report

    def save_files(self, job_id: str, file: IO[bytes]) -> None:
        """The work directory as the notebook left it, written into this file."""
        self._run(calls.save(job_id, "files", file))

    def events(self, job_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """(`job` or `cell`, data) as it happens, to the job's end; reconnects."""
        failures, heard = 0, time.monotonic()
        while True:
            try:
                with self._client.stream("GET", f"/v1/jobs/{calls.quoted(job_id)}/events") as response:
                    if not response.is_success:
                        response.read()
                        _check(response)
                    for event in _events(response.iter_lines()):
                        failures, heard = 0, time.monotonic()
                        yield event
                        if event[0] == "job" and event[1]["state"] in ENDED:
                            return
            except (httpx.TransportError, ServiceUnavailable) as error:
                time.sleep(self._pause_after(error, failures, heard))
                failures += 1

    def _run(self, steps: calls.Steps[T], patience_seconds: float | None = None) -> T:
        try:
            call = next(steps)
            while True:
                call = steps.send(self._send(call, patience_seconds))
        except StopIteration as done:
            result: T = done.value
            return result

    def _send(self, call: calls.Call, patience_seconds: float | None = None) -> httpx.Response:
        deadline = time.monotonic() + (self._patience if patience_seconds is None else patience_seconds)
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
                _give_up(response, cause, self._where)
            time.sleep(pause)
        raise AssertionError("unreachable")


class AsyncGraderClient(_Base):
    """The service, for asyncio. Arguments and methods as in `GraderClient`."""

    def __init__(
        self, url: str, token: str, *, patience_seconds: float = 300.0, plain_http_beyond_loopback: bool = False
    ) -> None:
        super().__init__(url, token, patience_seconds, plain_http_beyond_loopback)
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
        return await self._run(calls.submit(course, submission, notebook, parts, key or uuid.uuid4().hex))

    async def get(self, job_id: str) -> JobView:
        return await self._run(calls.get(job_id))

    async def wait(
        self, job_id: str, *, progress: Progress | None = None, timeout_seconds: float | None = None
    ) -> JobView:
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        return await self._run(calls.wait(job_id, progress, deadline))

    async def cancel(self, job_id: str) -> JobView:
        return await self._run(calls.cancel(job_id))

    async def find(self, course: str, **query: Any) -> JobPage:
        return await self._run(calls.find(course, query))

    async def courses(self) -> list[CourseView]:
        return await self._run(calls.courses())

    async def notebook(self, job_id: str) -> bytes:
        return await self._run(calls.content(job_id, "notebook"))

    async def report(self, job_id: str) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(await self._run(calls.content(job_id, "report")))
        return report

    async def events(self, job_id: str) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        failures, heard = 0, time.monotonic()
        while True:
            try:
                async with self._client.stream("GET", f"/v1/jobs/{calls.quoted(job_id)}/events") as response:
                    if not response.is_success:
                        await response.aread()
                        _check(response)
                    lines: list[str] = []
                    async for line in response.aiter_lines():
                        lines.append(line)
                        for event in _events(iter(lines)) if line == "" else ():
                            failures, heard = 0, time.monotonic()
                            lines.clear()
                            yield event
                            if event[0] == "job" and event[1]["state"] in ENDED:
                                return
            except (httpx.TransportError, ServiceUnavailable) as error:
                await asyncio.sleep(self._pause_after(error, failures, heard))
                failures += 1

    async def _run(self, steps: calls.Steps[T]) -> T:
        try:
            call = next(steps)
            while True:
                call = steps.send(await self._send(call))
        except StopIteration as done:
            result: T = done.value
            return result

    async def _send(self, call: calls.Call) -> httpx.Response:
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
                _give_up(response, cause, self._where)
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
