"""Health, readiness and Prometheus metrics. No student, no user, no job: numbers by course and state."""

import time
from collections.abc import Iterator

from anyio import to_thread
from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import BaseModel
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import Response

from grader_service.problems import Problem, ProblemError
from grader_service.service import Service

router = APIRouter(tags=["operations"])
_STALE_SECONDS = 60.0


class Health(BaseModel):
    """`ok`, always: that it is answered is the news."""

    status: str = "ok"


@router.get("/v1/health", summary="Whether the process answers")
async def health() -> Health:
    return Health()


@router.get(
    "/v1/ready",
    summary="Whether jobs are accepted and run",
    responses={503: {"model": Problem, "description": "What is missing."}},
)
async def ready(request: Request) -> Health:
    await to_thread.run_sync(_check_ready, request.app.state.service)
    return Health()


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    registry = CollectorRegistry()
    registry.register(_Jobs(request.app.state.service))
    text = await to_thread.run_sync(generate_latest, registry)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


def _check_ready(service: Service) -> None:
    store, bundles, dispatcher = service.store, service.bundles, service.dispatcher
    try:
        store.counts()
    except SQLAlchemyError:
        raise ProblemError(503, "database", "The database does not answer.") from None
    if bundles.is_full:
        raise ProblemError(503, "disk", "Less than 1 GiB is free in the data directory.")
    if time.monotonic() - dispatcher.healthy_at > _STALE_SECONDS:
        raise ProblemError(503, "dispatcher", "No job can be started at the moment.")


class _Jobs(Collector):
    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        store, dispatcher = self._service.store, self._service.dispatcher
        jobs = GaugeMetricFamily("grader_jobs", "Jobs by course and state.", labels=["course", "state"])
        for (course, state), count in store.counts().items():
            jobs.add_metric([course, state], count)
        yield jobs
        yield GaugeMetricFamily(
            "grader_oldest_queued_seconds", "Age of the oldest queued job.", store.oldest_queued_seconds()
        )
        yield GaugeMetricFamily("grader_slots_free", "Sandboxes that could start now.", dispatcher.slots_free)
        yield GaugeMetricFamily("grader_memory_free_bytes", "Memory for more sandboxes.", dispatcher.memory_free)
        yield GaugeMetricFamily(
            "grader_disk_free_bytes", "Free in the data directory.", self._service.bundles.free_bytes()
        )
