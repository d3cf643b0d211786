"""What lives as long as the service does, put together in one place."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor

import structlog
from anyio import to_thread

from grader_service import hub as hubs
from grader_service import worker
from grader_service.auth import Authenticator
from grader_service.bundles import Bundles
from grader_service.database import check_revision, open_engine
from grader_service.dispatcher import Dispatcher
from grader_service.engines import LocalEngine
from grader_service.housekeeping import Housekeeper
from grader_service.jobs import JobStore
from grader_service.settings import ConfigurationError, Settings
from grader_service.tokens import TokenStore
from grader_service.waiters import Waiters
from grader_service.worker import Runner

log = structlog.get_logger("service")


class Service:
    """Everything that a request or a signal needs to reach. One for each process."""

    def __init__(self, settings: Settings, engine: Executor | None = None, run: Runner = worker.run) -> None:
        self.settings = settings
        database = open_engine(settings.database_url)
        check_revision(database)
        self.store = JobStore(database)
        self.bundles = Bundles(settings.data_directory)
        self.waiters = Waiters()
        self.hub = hubs.Hub(settings.hub) if settings.hub else None
        self.authenticator = Authenticator(settings, TokenStore(database), self.hub)
        self.dispatcher = Dispatcher(
            settings, self.store, self.bundles, engine or LocalEngine(), changed=self.waiters.notify, run=run
        )
        self.housekeeper = Housekeeper(self.store, self.bundles)
        self._database = database

    def reload(self, load: Callable[[], Settings]) -> bool:
        """Take over a changed configuration, or keep the old one and say what is wrong. Jobs are not touched."""
        try:
            settings = load()
        except ConfigurationError as error:
            log.error("reload_refused", reason=str(error))
            return False
        for name in ("data_directory", "database_url", "listen", "hub"):
            if getattr(settings, name) != getattr(self.settings, name):
                log.error("reload_refused", reason=f"{name} can only be changed by a restart")
                return False
        self.settings = settings
        self.authenticator.settings = settings
        self.dispatcher.reload(settings)
        log.info("reloaded", courses=sorted(settings.courses))
        return True

    async def examine(self) -> None:
        """Before the start: does the hub give the service what it needs? Raises `hub.HubMisconfigured`."""
        if self.hub is not None:
            await hubs.check(self.hub)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """From the first started job to the last lease given back."""
        self.waiters.attach(asyncio.get_running_loop())
        self.dispatcher.start()
        self.housekeeper.start()
        try:
            yield
        finally:
            self.waiters.close()
            await to_thread.run_sync(self.dispatcher.stop)
            await to_thread.run_sync(self.housekeeper.stop)
            if self.hub is not None:
                await self.hub.close()
            self._database.dispose()
