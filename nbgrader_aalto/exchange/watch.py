"""The watcher: takes submissions into the vault soon after they were handed in, until it is told to stop.

What a student destroys or changes later then changes nothing about what was handed in. Any instructor may run it,
or a timer with `once`; two of them, or one and a `collect`, take turns.
"""

import threading
import time
from collections.abc import Callable

from nbgrader.exchange import ExchangeError

from nbgrader_aalto.exchange.collect import ExchangeCollect

_REST = 4
"""At most a fifth of the time is spent looking, however large the course is."""


def watch(
    collector: ExchangeCollect,
    say: Callable[[str], None],
    *,
    once: bool = False,
    interval_seconds: float = 2.0,
    stop: threading.Event | None = None,
) -> int:
    """Take in everything that is new, for all assignments, again and again. Returns how many were taken in.

    A pass that fails (a full disk, a colleague who collects for long) is said and tried again, unless it is the only
    one: then `ExchangeError` is raised.
    """
    stop = stop or threading.Event()
    taken = 0
    while True:
        started = time.monotonic()
        try:
            people = collector.people()  # anew each time: students and instructors come and go
            with collector.locked("taking in submissions"):
                new, _ = collector.take_in(people, collector.is_known)
        except ExchangeError as error:
            if once:
                raise
            say(f"Trying again: {error}")
        else:
            taken += len(new)
            for record in new:
                say(f"Taken in: {record.student} {record.assignment} {record.claimed} ({len(record.files)} files)")
        if once or stop.wait(max(interval_seconds, _REST * (time.monotonic() - started))):
            return taken
