"""Wakes requests that wait for a job, from whatever thread knows that it changed."""

import asyncio
import contextlib
from collections.abc import Iterator

_AT_FULL_PACE = 100
"""How many may wait before each looks less often."""
_LONGEST_SECONDS = 10.0


class Waiters:
    """One event for each job that somebody waits for. A wake-up is a hint: whoever waits reads the row again."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._count = 0
        self.closed = False

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """The loop in which requests wait."""
        self._loop = loop

    def notify(self, job_id: str) -> None:
        """From any thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._set, job_id)

    def close(self) -> None:
        """Let everybody go who waits; in the loop."""
        self.closed = True
        for job_id in list(self._waiting):
            self._set(job_id)

    def _set(self, job_id: str) -> None:
        for event in self._waiting.get(job_id, ()):
            event.set()

    @contextlib.contextmanager
    def watching(self, job_id: str) -> Iterator[asyncio.Event]:
        """An event that is set when this job changes. Watch first, then read the row."""
        event = asyncio.Event()
        self._waiting.setdefault(job_id, set()).add(event)
        self._count += 1
        try:
            yield event
        finally:
            self._count -= 1
            self._waiting[job_id].discard(event)
            if not self._waiting[job_id]:
                del self._waiting[job_id]

    async def wait(self, event: asyncio.Event, seconds: float, longest: float = _LONGEST_SECONDS) -> None:
        """Until the event is set, or this long; up to `longest` when many wait, whose looks would fill the machine."""
        slower = min(_LONGEST_SECONDS, seconds * max(1.0, self._count / _AT_FULL_PACE))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(slower, longest)):
                await event.wait()
        event.clear()
