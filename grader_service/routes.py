"""The routes below /v1: who may, what exactly, and then one call of the store. Nothing is decided here twice."""

import dataclasses
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any

import structlog
from anyio import to_thread
from fastapi import APIRouter, Depends, Header, Query, Request
from pydantic import ValidationError
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse

from grader_service import multipart, policies, progress
from grader_service.auth import Identity, Unauthorized
from grader_service.bundles import KEPT, LEAST_FREE_BYTES, NOTEBOOK, REPORT, Bundles, is_job_id
from grader_service.database import retrying
from grader_service.housekeeping import tidy
from grader_service.hub import HubUnavailable
from grader_service.jobs import KeyReused, NewJob, QuotaExceeded
from grader_service.models import Job
from grader_service.problems import RESPONSES, ProblemError, disk_full, not_found, places
from grader_service.schemas import ENDED, CourseView, JobPage, JobView, State, Submission
from grader_service.service import Service
from grader_service.settings import CourseSettings

router = APIRouter(prefix="/v1", tags=["jobs"], responses=RESPONSES)
log = structlog.get_logger("api")

LONGEST_WAIT_SECONDS = 50.0
"""Of one request: who may no longer grade a course is told so at the next one."""
_REREAD_SECONDS = 2.0
"""Another service may have changed the row."""
_PROGRESS_SECONDS = 0.25
_KEEP_ALIVE_SECONDS = 15.0
_LOOK_AT_DISK_BYTES = 16 << 20
_JOB_PART_BYTES = 1 << 20
_PATIENCE_SECONDS = 10.0
"""With a database that restarts."""


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def identity_of(
    request: Request,
    authorization: Annotated[str | None, Header(description="`Bearer TOKEN`", include_in_schema=False)] = None,
) -> Identity:
    """Who asks. Raises 401, or 503 when the hub cannot be asked."""
    try:
        return await service_of(request).authenticator.identify(authorization)
    except Unauthorized as error:
        raise ProblemError(401, "token", str(error), headers={"WWW-Authenticate": "Bearer"}) from None
    except HubUnavailable as error:
        raise ProblemError(503, "hub", str(error), headers={"Retry-After": "10"}) from None


async def _grader_of(request: Request, identity: Identity, course: str) -> None:
    """Raises 403, in the same words for a course that does not exist."""
    if not await service_of(request).authenticator.may_grade(identity, course):
        raise ProblemError(403, "course", "There is no such course, or you may not grade it.")


async def job_of(request: Request, job_id: str, identity: Annotated[Identity, Depends(identity_of)]) -> Job:
    """The job of this id, if the caller may grade its course. Raises 404 otherwise."""
    service = service_of(request)
    job = await to_thread.run_sync(service.store.get, job_id) if is_job_id(job_id) else None
    if job is None or not await service.authenticator.may_grade(identity, job.course):
        raise not_found()
    return job


Caller = Annotated[Identity, Depends(identity_of)]
TheJob = Annotated[Job, Depends(job_of)]
Filter = Annotated[str | None, Query(max_length=255, pattern=r"^[^\x00]*$")]
"""PostgreSQL has no NUL in a text."""


@router.get("/courses", summary="The courses that you may grade")
async def courses(request: Request, identity: Caller) -> list[CourseView]:
    service = service_of(request)
    return [
        CourseView(
            name=name,
            limits=dataclasses.asdict(service.settings.courses[name].default_limits),
            maximum=dataclasses.asdict(service.settings.courses[name].maximum_limits),
        )
        for name in await service.authenticator.courses_of(identity)
    ]


@router.post(
    "/courses/{course}/jobs",
    status_code=202,
    summary="Submit a job",
    openapi_extra=multipart.OPENAPI,
    response_model=JobView,
    responses={
        200: {"model": JobView, "description": "The same submission was accepted before, under this key."},
        **{
            status: RESPONSES[400] | {"description": words}
            for status, words in {
                408: "The body comes too slowly.",
                409: "The idempotency key was used for another submission.",
                413: "A part is too large.",
                415: "Not multipart/form-data.",
                429: "The course's quota for a day is used up.",
                507: "The disk is full.",
            }.items()
        },
    },
)
async def submit(
    request: Request,
    course: str,
    identity: Caller,
    idempotency_key: Annotated[str | None, Header(max_length=255, pattern=r"^[!-~]{1,255}$")] = None,
) -> Response:
    """Answers once notebook, files and job are on disk: a job that was accepted is never lost.

    Send an `Idempotency-Key`, and the same submission can be sent again when the answer did not arrive.
    """
    service = service_of(request)
    await _grader_of(request, identity, course)
    settings = service.settings
    if await to_thread.run_sync(service.bundles.free_bytes) < LEAST_FREE_BYTES + settings.max_bundle:
        raise disk_full()
    bounds = {
        multipart.JOB: _JOB_PART_BYTES,
        multipart.NOTEBOOK: settings.max_notebook,
        multipart.FILES: settings.max_bundle,
    }
    with service.bundles.upload() as received:
        content_type = request.headers.get("content-type", "")
        stream = _while_room(request.stream(), service.bundles)
        digest = await multipart.receive(stream, content_type, received, bounds)
        # A body may take hours: who sent it may no longer grade, or the course may be another by now.
        identity = await identity_of(request, request.headers.get("authorization"))
        await _grader_of(request, identity, course)
        table = service.settings.courses[course]

        def admit() -> tuple[Job, bool]:
            asked = _read_submission((received / multipart.JOB).read_bytes())
            size = sum(path.stat().st_size for path in received.iterdir())
            new = _new_job(table, identity, course, asked, digest, size, idempotency_key)
            service.bundles.admit(received, new.id)
            quota = table.daily_quota
            try:
                job, created = retrying(lambda: service.store.add(new, daily_quota=quota), seconds=_PATIENCE_SECONDS)
            except (KeyReused, QuotaExceeded):
                service.bundles.remove(new.id)
                raise  # after an error of the database the row may be there; what has none is swept
            if not created:
                service.bundles.remove(new.id)
            return job, created

        try:
            job, created = await to_thread.run_sync(admit)
        except KeyReused:
            raise ProblemError(409, "key-reused", "This Idempotency-Key was used for another submission.") from None
        except QuotaExceeded as error:
            seconds = max(1, round(error.retry_after_seconds))
            detail = f"The course has used up its jobs of one day; the next is accepted in {seconds} seconds."
            raise ProblemError(429, "quota", detail, headers={"Retry-After": str(seconds)}) from None
        except policies.Refused as error:
            raise ProblemError(422, "policy", str(error)) from None
    if created:
        log.info("job_accepted", job=job.id, course=course, user=identity.name)
        service.dispatcher.wake()
    view = JobView.of(job).model_dump(mode="json")
    return JSONResponse(view, 202 if created else 200, {"Location": f"/v1/jobs/{job.id}"})


async def _while_room(stream: AsyncIterator[bytes], bundles: Bundles) -> AsyncIterator[bytes]:
    """This body, as long as the disk has room: many may be received at a time. Raises 507."""
    received = 0
    async for chunk in stream:
        received += len(chunk)
        if received > _LOOK_AT_DISK_BYTES:
            received = 0
            if await to_thread.run_sync(lambda: bundles.is_full):
                raise disk_full()
        yield chunk


def _read_submission(data: bytes) -> Submission:
    try:
        return Submission.model_validate_json(data)
    except ValidationError as error:
        raise ProblemError(422, "invalid", "The part 'job' is not valid.", errors=places(error.errors())) from None


def _new_job(
    table: CourseSettings, identity: Identity, course: str, asked: Submission, digest: str, size: int, key: str | None
) -> NewJob:
    limits = policies.limits_of(table, policies.Asked(asked.kernel, asked.limits))
    return NewJob(
        id=str(uuid.uuid4()),
        course=course,
        assignment=asked.assignment,
        student=asked.student,
        notebook=asked.notebook,
        kind=asked.kind,
        submitter=identity.name,
        idempotency_key=key,
        digest=digest,
        asked=asked.model_dump(mode="json", exclude_unset=True),
        memory_bytes=policies.memory_of(limits),
        bundle_bytes=size,
        retention_seconds=table.retention,
    )


@router.get("/courses/{course}/jobs", summary="Jobs of a course, newest first")
async def find(
    request: Request,
    course: str,
    identity: Caller,
    state: Annotated[list[State] | None, Query()] = None,
    assignment: Filter = None,
    student: Filter = None,
    submitter: Filter = None,
    after: Annotated[str | None, Query(max_length=100, description="`next` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> JobPage:
    await _grader_of(request, identity, course)

    def look() -> JobPage:
        jobs, cursor = service_of(request).store.find(
            course,
            states=state or [],
            assignment=assignment,
            student=student,
            submitter=submitter,
            after=after,
            limit=limit,
        )
        return JobPage(jobs=[JobView.of(job) for job in jobs], next=cursor)

    try:
        return await to_thread.run_sync(look)
    except ValueError:
        raise ProblemError(422, "invalid", "`after` is not what a page gave as `next`.") from None


@router.get("/jobs/{job_id}", summary="A job; with `wait`, once it has ended or this many seconds have passed")
async def get(
    request: Request, job: TheJob, identity: Caller, wait: Annotated[float, Query(ge=0, le=LONGEST_WAIT_SECONDS)] = 0
) -> JobView:
    service = service_of(request)
    deadline = min(time.monotonic() + wait, _until(identity, wait))
    with service.waiters.watching(job.id) as event:
        while True:
            row = await to_thread.run_sync(service.store.get, job.id)
            if row is None:
                raise not_found()
            left = deadline - time.monotonic()
            if row.state in ENDED or left <= 0 or service.waiters.closed:
                return await to_thread.run_sync(_view, service, row)
            await service.waiters.wait(event, _REREAD_SECONDS, left)


def _view(service: Service, job: Job) -> JobView:
    waiting = ""
    if job.state == "queued":
        courses = {name: course.concurrent_jobs for name, course in service.settings.courses.items()}
        free, total = service.dispatcher.memory_free, service.settings.memory_bytes
        waiting = service.store.why_waiting(job, courses=courses, memory_free=free, memory_total=total) or ""
        if not waiting and service.bundles.is_full:
            waiting = "the service's disk is nearly full"
        elif not waiting and service.dispatcher.slots_free <= 0:
            waiting = f"all {service.settings.slots} places for sandboxes are taken"
    return JobView.of(job, waiting)


@router.get(
    "/jobs/{job_id}/events",
    summary="Server-sent events: `job` whenever the job changes, `cell` whenever a cell starts or finishes",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}, "description": "Ends with the job, or after some time."}},
)
async def events(request: Request, job: TheJob, identity: Caller) -> StreamingResponse:
    """Reconnect when the stream ends before the job does."""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    deadline = min(time.monotonic() + LONGEST_WAIT_SECONDS, _until(identity, LONGEST_WAIT_SECONDS))
    return StreamingResponse(_events(service_of(request), job.id, deadline), 200, headers, "text/event-stream")


def _until(identity: Identity, seconds: float) -> float:
    """When the caller has to be identified anew, by `time.monotonic`; a course's token is looked up each time."""
    return identity.until or time.monotonic() + seconds


async def _events(service: Service, job_id: str, deadline: float) -> AsyncIterator[str]:
    told, lease, offset, spoke = "", "", 0, time.monotonic()
    with service.waiters.watching(job_id) as event:
        while True:
            row = await to_thread.run_sync(service.store.get, job_id)
            if row is None:
                return
            new_lease = row.lease or row.result or ""
            if new_lease != lease:
                lease, offset = new_lease, 0
            if lease:
                found, offset = await to_thread.run_sync(progress.read, service.bundles.progress(job_id, lease), offset)
                for index, state in found:
                    yield _event("cell", {"index": index, "state": state, "attempt": row.attempts})
            view = await to_thread.run_sync(_view, service, row)
            if (text := view.model_dump_json()) != told:
                told, spoke = text, time.monotonic()
                yield f"event: job\ndata: {text}\n\n"
            if row.state in ENDED or time.monotonic() > deadline or service.waiters.closed:
                return
            if time.monotonic() - spoke > _KEEP_ALIVE_SECONDS:
                spoke = time.monotonic()
                yield ": still there\n\n"
            await service.waiters.wait(event, _PROGRESS_SECONDS if row.state == "running" else _REREAD_SECONDS)


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


@router.post("/jobs/{job_id}/cancel", summary="Cancel a job; one that has ended stays as it is")
async def cancel(request: Request, job: TheJob, identity: Caller) -> JobView:
    service = service_of(request)
    row = await to_thread.run_sync(service.store.cancel, job.id)
    if row is None:
        raise not_found()
    if row.state == "cancelled":
        await to_thread.run_sync(tidy, service.store, service.bundles, job.id)
    log.info("job_cancelled", job=job.id, course=job.course, user=identity.name, state=row.state)
    service.waiters.notify(job.id)
    return JobView.of(row)


def _result(service: Service, job: Job, name: str, media_type: str) -> FileResponse:
    """One file of what a job made. Raises 409 while there is none, 404 when there will be none."""
    if job.state not in ENDED:
        raise ProblemError(409, "not-ended", f"The job is {job.state}; wait for its end.")
    path = service.bundles.result(job.id, job.result) / name if job.result else None
    if path is None or not path.is_file():
        raise ProblemError(
            404, "no-result", f"The job is {job.state} and has no such result. {job.reason or ''}".strip()
        )
    headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
    return FileResponse(path, headers=headers, media_type=media_type, filename=name)


_CONFLICT: dict[int | str, dict[str, Any]] = {409: RESPONSES[400] | {"description": "The job has not ended."}}


@router.get(
    "/jobs/{job_id}/notebook", summary="The executed notebook", response_class=FileResponse, responses=_CONFLICT
)
async def notebook(request: Request, job: TheJob) -> Response:
    return _result(service_of(request), job, NOTEBOOK, "application/x-ipynb+json")


@router.get(
    "/jobs/{job_id}/report",
    summary="How the execution went: limits, cells, seconds, memory, layers of the sandbox",
    response_class=FileResponse,
    responses=_CONFLICT,
)
async def report(request: Request, job: TheJob) -> Response:
    return _result(service_of(request), job, REPORT, "application/json")


@router.get(
    "/jobs/{job_id}/files",
    summary="The work directory as student code left it, if `keep_files` was set; give it to the next notebook unread",
    response_class=FileResponse,
    responses=_CONFLICT,
)
async def files(request: Request, job: TheJob) -> Response:
    return _result(service_of(request), job, KEPT, "application/x-tar")
