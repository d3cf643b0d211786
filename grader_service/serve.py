"""`grader-service serve`: from the configuration file to a listening process, and down again.

SIGTERM and SIGINT: no new request, running jobs go back into the queue. SIGHUP: the file is read again, and the TLS
certificate. `kill -9`: the next start finds everything in the database, and what ran runs again when its lease has
ended.
"""

import asyncio
import contextlib
import os
import resource
import signal
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import structlog
import uvicorn
from sqlalchemy.exc import SQLAlchemyError
from uvicorn.protocols.http.h11_impl import H11Protocol

from grader_service import logs, worker
from grader_service.app import create_app
from grader_service.database import DatabaseError, open_engine, upgrade
from grader_service.hub import HubMisconfigured
from grader_service.service import Service
from grader_service.settings import Settings, load

_MOST_CONNECTIONS = 4096
_MOST_DESCRIPTORS = 4 * _MOST_CONNECTIONS
_SHUTDOWN_SECONDS = 10
_HEAD_SECONDS = 20.0
"""How long a connection may be without a request that is being answered."""

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
    _allow_descriptors()
    try:
        if upgrade_first:
            upgrade(open_engine(settings.database_url))
        service = Service(settings, run=run)
    except DatabaseError as error:
        log.error("not_started", reason=str(error))
        return 2
    except SQLAlchemyError as error:
        log.error("not_started", reason=f"the database does not answer: {type(error).__name__}; is it running?")
        return 2
    return asyncio.run(_run(service, config))


async def _run(service: Service, config: Path) -> int:
    server = _Server(_uvicorn(service), service)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, lambda: _reload(service, server.config, config))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.handle_exit, number, None)
    log.info("starting", courses=sorted(service.settings.courses), slots=service.settings.slots)
    listen = service.settings.listen
    if listen.unix_socket is not None and _is_listened_to(listen.unix_socket):  # asyncio would take it away
        log.error("not_started", reason=f"another process answers at {listen.unix_socket}; is the service running?")
        return 2
    try:
        await service.examine()
    except HubMisconfigured as error:
        log.error("not_started", reason=str(error))
        return 2
    try:
        await server.serve()
    except OSError as error:  # a unix socket's; what is started is given back by the application's end
        log.error("not_started", reason=f"cannot listen, or read the TLS certificate or key: {error}")
        return 2
    log.info("stopped")
    return 0 if server.started else 2


def _reload(service: Service, config: uvicorn.Config, file: Path) -> None:
    """The configuration, and what lies at the paths of the TLS certificate and key, for connections to come."""
    listen = service.settings.listen
    in_use: ssl.SSLContext | None = getattr(config, "ssl", None)  # not there before it listens
    if in_use is not None and listen.tls_certificate is not None:
        try:
            tried = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # a half renewed pair must not stay in the one in use
            for context in (tried, in_use):
                context.load_cert_chain(listen.tls_certificate, listen.tls_key)
        except OSError as error:
            log.error("certificate_not_reloaded", reason=str(error))
    service.reload(lambda: load(file))


def _is_listened_to(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(5.0)
        try:
            probe.connect(str(path))
        except TimeoutError:  # somebody is there, and busy
            return True
        except OSError:  # nothing there, or left by a service that was killed
            return False
    return True


class _Server(uvicorn.Server):
    """Ends with our exit code. uvicorn's own would raise the signal once more after a clean end."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: "list[socket.socket] | None" = None) -> None:
        """Answer those who wait for a job, instead of waiting with them; then the rest."""
        self._service.waiters.close()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Protocol(H11Protocol):
    """Closes a connection that brings no request, which uvicorn keeps for as long as a byte comes now and then."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop()

    def _look(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(_HEAD_SECONDS, self._end)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


def _allow_descriptors() -> None:
    """As many as all connections may need; the usual 1024 are few. getrlimit(2)"""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _uvicorn(service: Service) -> uvicorn.Config:
    settings: Settings = service.settings
    listen = settings.listen
    place = {"uds": str(listen.unix_socket)} if listen.unix_socket else {"host": listen.host, "port": listen.port}
    return uvicorn.Config(
        create_app(service),
        **place,
        ssl_certfile=listen.tls_certificate,
        ssl_keyfile=listen.tls_key,
        http=_Protocol,
        ws="none",
        access_log=False,  # addresses may hold a student's name
        log_config=None,
        server_header=False,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
        h11_max_incomplete_event_size=64 * 1024,
    )
