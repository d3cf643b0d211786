"""Errors of the HTTP API as problem documents. RFC 9457.

Whatever goes wrong, the caller learns what it can change and nothing about anybody else.
"""

import errno
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

MEDIA_TYPE = "application/problem+json"
_MOST_ERRORS = 20
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
_NOT_NOW = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN})


class Problem(BaseModel):
    """A problem document. `type` is a stable name below `urn:grader-service:`; branch on it, not on texts."""

    type: str = Field("about:blank", examples=["urn:grader-service:quota"])
    title: str = Field(examples=["Too Many Requests"])
    status: int = Field(examples=[429])
    detail: str = Field("", examples=["The course 'python26' may submit 500 jobs a day; try again in 42 minutes."])
    errors: list[str] = Field(default_factory=list, description="What is wrong in the request, place by place.")


class ProblemError(Exception):
    """Raised anywhere below a route; becomes the response."""

    def __init__(
        self,
        status: int,
        kind: str,
        detail: str,
        *,
        errors: tuple[str, ...] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.kind, self.detail, self.errors, self.headers = status, kind, detail, errors, headers or {}

    def response(self) -> Response:
        """The document, with this problem's headers."""
        problem = Problem(
            type=f"urn:grader-service:{self.kind}" if self.kind else "about:blank",
            title=HTTPStatus(self.status).phrase,
            status=self.status,
            detail=self.detail,
            errors=list(self.errors),
        )
        return JSONResponse(problem.model_dump(), self.status, dict(self.headers), MEDIA_TYPE)


def not_found(what: str = "job") -> ProblemError:
    """The same answer for what does not exist and for what is not the caller's."""
    return ProblemError(404, "not-found", f"There is no such {what}, or you may not see it.")


def disk_full() -> ProblemError:
    """There is no room for another job."""
    return ProblemError(507, "disk", "The service's disk is nearly full; its administrator has to make room.")


def install(app: FastAPI) -> None:
    """Make every error of this application a problem document."""

    async def own(_: Request, error: Exception) -> Response:
        assert isinstance(error, ProblemError)
        return error.response()

    async def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        detail = error.detail if isinstance(error.detail, str) else ""
        return ProblemError(error.status_code, "", detail, headers=error.headers).response()

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return ProblemError(422, "invalid", "The request is not valid.", errors=places(error.errors())).response()

    async def database(_: Request, error: Exception) -> Response:
        detail = "The database does not answer; nothing was changed, or it was changed as a whole. Try again."
        return ProblemError(503, "database", detail, headers={"Retry-After": "5"}).response()

    async def host(_: Request, error: Exception) -> Response:
        assert isinstance(error, OSError)
        if error.errno in _NO_ROOM:
            return disk_full().response()
        if error.errno in _NOT_NOW:
            detail = "The service has too much to do at the moment. Try again."
            return ProblemError(503, "busy", detail, headers={"Retry-After": "5"}).response()
        raise error

    async def gone(_: Request, error: Exception) -> Response:
        return ProblemError(400, "incomplete", "The body ends early.").response()  # nobody reads it

    async def unforeseen(_: Request, error: Exception) -> Response:
        return ProblemError(500, "", "A fault of the service; its log says more.").response()

    app.add_exception_handler(ProblemError, own)
    app.add_exception_handler(DBAPIError, database)
    app.add_exception_handler(PoolTimeout, database)
    app.add_exception_handler(OSError, host)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Exception, unforeseen)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)


def places(errors: Any) -> tuple[str, ...]:
    """Pydantic's errors as `place: what is wrong`, without the values: they may be a student's."""
    return tuple(f"{'.'.join(map(str, error['loc']))}: {error['msg']}"[:300] for error in list(errors)[:_MOST_ERRORS])


RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "content": {MEDIA_TYPE: {}}, "description": words}
    for status, words in {
        400: "The request cannot be read.",
        401: "No token, or one that is not valid.",
        403: "You may not grade this course.",
        404: "There is no such thing, or you may not see it.",
        422: "The request can be read and says something that is not allowed.",
        503: "Something that the service needs is away; try again.",
    }.items()
}
"""For FastAPI's `responses`."""
