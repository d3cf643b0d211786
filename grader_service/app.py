"""The HTTP application: routes, errors and lifetime of one service."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from anyio import to_thread
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from grader_service import metrics, problems, routes
from grader_service.schemas import Submission
from grader_service.service import Service

_MOST_THREADS = 64
"""Requests that may be inside the database or a file at the same time."""

_DESCRIPTION = """\
Grades Jupyter notebooks in sandboxes, for the courses that the administrator names.

Send `Authorization: Bearer TOKEN` with a JupyterHub token or a token of a course (`grader-service token create`).
Submit a notebook with the files beside it, wait for the job, fetch the executed notebook and the report.
Errors are problem documents (RFC 9457).
"""


def create_app(service: Service) -> FastAPI:
    """The HTTP API of this service."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        to_thread.current_default_thread_limiter().total_tokens = _MOST_THREADS
        async with service.running():
            yield

    app = FastAPI(
        title="grader-service",
        version="1",
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url="/docs",
        redoc_url=None,
        openapi_url="/v1/openapi.json",
    )
    app.state.service = service
    problems.install(app)
    app.include_router(routes.router)
    app.include_router(metrics.router)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]  # as FastAPI's manual extends the document
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, with what it cannot see: the parts of a submission, and how callers say who they are."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        components = document.setdefault("components", {})
        _, models = models_json_schema([(Submission, "validation")], ref_template="#/components/schemas/{model}")
        components.setdefault("schemas", {}).update(models["$defs"])
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path, operations in document["paths"].items():
            if path.startswith(("/v1/courses", "/v1/jobs")):
                for operation in operations.values():
                    operation["security"] = [{"token": []}]
        app.openapi_schema = document
    return app.openapi_schema
