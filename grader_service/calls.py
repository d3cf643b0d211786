"""The operations of the service's API: each a generator that yields requests and is sent responses.

`grader_service.client` carries them, blocking or not.
"""

import json
import time
from collections.abc import Callable, Generator, Mapping
from typing import IO, Any, Literal, TypeVar
from urllib.parse import quote

import httpx

from grader_service.schemas import ENDED, CourseView, JobPage, JobView, Submission

T = TypeVar("T")
Progress = Callable[[JobView], None]

_WAIT_SECONDS = 25.0


class Call:
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


Steps = Generator[Call, httpx.Response, T]


def submit(course: str, submission: Submission, notebook: bytes, files: IO[bytes] | None, key: str) -> Steps[JobView]:
    parts: dict[str, bytes | IO[bytes]] = {
        "job": submission.model_dump_json(exclude_unset=True).encode(),
        "notebook": notebook,
    }
    if files is not None:
        parts["files"] = files
    call = Call("POST", f"/v1/courses/{quoted(course)}/jobs", headers={"Idempotency-Key": key}, parts=parts)
    return JobView.model_validate_json((yield call).content)


def get(job_id: str, wait: float = 0) -> Steps[JobView]:
    query = {"wait": wait} if wait else {}
    return JobView.model_validate_json((yield Call("GET", f"/v1/jobs/{quoted(job_id)}", query=query)).content)


def wait(job_id: str, progress: Progress | None, deadline: float | None) -> Steps[JobView]:
    told = None
    while True:
        left = _WAIT_SECONDS if deadline is None else min(_WAIT_SECONDS, max(0.0, deadline - time.monotonic()))
        # The first look is not a long one, so that a progress display starts at once.
        job = yield from get(job_id, left if told is not None else 0)
        if progress is not None and job != told:
            progress(job)
        told = job
        if job.state in ENDED or (deadline is not None and time.monotonic() >= deadline):
            return job


def cancel(job_id: str) -> Steps[JobView]:
    return JobView.model_validate_json((yield Call("POST", f"/v1/jobs/{quoted(job_id)}/cancel")).content)


def find(course: str, query: Mapping[str, Any]) -> Steps[JobPage]:
    return JobPage.model_validate_json((yield Call("GET", f"/v1/courses/{quoted(course)}/jobs", query=query)).content)


def courses() -> Steps[list[CourseView]]:
    return [CourseView.model_validate(one) for one in json.loads((yield Call("GET", "/v1/courses")).content)]


def content(job_id: str, what: str) -> Steps[bytes]:
    return (yield Call("GET", f"/v1/jobs/{quoted(job_id)}/{what}")).content


def save(job_id: str, what: str, file: IO[bytes]) -> Steps[None]:
    yield Call("GET", f"/v1/jobs/{quoted(job_id)}/{what}", save=file)


def quoted(name: str) -> str:
    return quote(name, safe="")
