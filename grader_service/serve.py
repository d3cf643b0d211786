"""`grader-service serve`: from the configuration file to a listening process, and down again.

SIGTERM and SIGINT: no new request, running jobs go back into the queue. SIGHUP: the file is read again. `kill -9`: the
next start finds everything in the database, and what ran runs again when its lease has ended.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import structlog
import uvicorn

from grader_service import logs, worker
from grader_service.app import create_app
from grader_service.database import DatabaseError, open_engine, upgrade
from grader_service.hub import HubMisconfigured
from grader_service.service import Service
from grader_service.settings import Settings, load

_MOST_CONNECTIONS = 4096
_SHUTDOWN_SECONDS = 10

log = structlog.get_logger("serve")


def serve(
    config: Path,
    *,
    level: str = "info",
    as_json: bool = True,
    upgrade_first: bool = False,
    run: worker.Runner = worker.run,
) -> int:
    """Until a signal ends it. Returns the exit code. `run` is what an engine does with a job.

    Raises `settings.ConfigurationError`.
    """
    logs.configure(level, as_json=as_json)
    settings = load(config)
    os.umask(0o077)
    try:
        if upgrade_first:
            upgrade(open_engine(settings.database_url))
        service = Service(settings, run=run)
    except DatabaseError as error:
        log.error("not_started", reason=str(error))
        return 2
    return asyncio.run(_run(service, config))


async def _run(service: Service, config: Path) -> int:
    server = _Server(_uvicorn(service))
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, lambda: service.reload(lambda: load(config)))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.handle_exit, number, None)
    log.info("starting", courses=sorted(service.settings.courses), slots=service.settings.slots)
    try:
        await service.examine()
    except HubMisconfigured as error:
        log.error("not_started", reason=str(error))
        return 2
    await server.serve()
    log.info("stopped")
    return 0 if server.started else 2


class _Server(uvicorn.Server):
    """Ends with our exit code. uvicorn's own would raise the signal once more after a clean end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _uvicorn(service: Service) -> uvicorn.Config:
    settings: Settings = service.settings
    listen = settings.listen
    place = {"uds": str(listen.unix_socket)} if listen.unix_socket else {"host": listen.host, "port": listen.port}
    return uvicorn.Config(
        create_app(service),
        **place,
        ssl_certfile=listen.tls_certificate,
        ssl_keyfile=listen.tls_key,
        access_log=False,  # addresses may hold a student's name
        log_config=None,
        server_header=False,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
        h11_max_incomplete_event_size=64 * 1024,
    )
