"""What goes wrong on the host becomes an answer that says what to do, and nothing of what was inside."""

import asyncio
import errno
import os

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy.exc import TimeoutError as PoolTimeout

from grader_service import problems


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (OSError(errno.ENOSPC, "No space", "/secret"), 507, "urn:grader-service:disk"),
        (OSError(errno.EMFILE, "Too many", "/secret"), 503, "urn:grader-service:busy"),
        (PermissionError(errno.EACCES, "Denied", "/secret"), 500, "about:blank"),
        (PoolTimeout("secret"), 503, "urn:grader-service:database"),
        (KeyError("secret"), 500, "about:blank"),
    ],
)
def test_a_fault_of_the_host_is_a_problem_document(error: Exception, status: int, kind: str) -> None:
    app = FastAPI()
    problems.install(app)

    @app.get("/")
    async def fail() -> None:
        raise error

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get("/")

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.json()["type"]) == (status, kind)
    assert answer.headers["content-type"] == problems.MEDIA_TYPE
    assert "secret" not in answer.text
    assert os.strerror(errno.ENOSPC) not in answer.text
