"""The nursery that a server keeps from one click on a lightning bolt to the next.

A click executes a notebook or two, which are over before templates for them would be made. So the first click on an
assignment starts cold; what it missed is made after its answer, in a thread, and the next minutes' clicks find it.
One assignment's is kept, the one of the last click. Templates end by themselves when they are unused
(`isolate.warm.IDLE_SECONDS`), and with the server, however that ends.

Refuses to know what a click is: only that the process has an event loop, and so goes on after this run.
"""

import asyncio
import atexit
import threading
from collections.abc import Hashable, Sequence

from isolate.policy import GIB
from isolate.warm import Nursery
from nbgrader_aalto.readahead import available_bytes

_ENOUGH_BYTES = 1 * GIB
"""Where less is available, nothing is kept: nobody asked for the 100 MB of a template with numpy and pandas."""

_lock = threading.Lock()
_kept: tuple[Hashable, Nursery] | None = None


def in_server() -> bool:
    """Whether this thread is an event loop's."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def nursery(whose: Hashable, imports: Sequence[str], *, patient: bool) -> Nursery:
    """The one that is kept, if it is for these; else a new one, which is kept instead."""
    key = (whose, tuple(imports))
    with _lock:
        if _kept is not None and _kept[0] == key:
            found = _kept[1]
        else:
            found = Nursery(imports, lasting=True)
            _keep((key, found))
    found.patient = patient
    return found


def let_go(nursery: Nursery) -> None:
    """At the end of a run: close it, unless it is the one that is kept; then see to its templates, in a thread."""
    with _lock:
        if _kept is None or _kept[1] is not nursery:
            nursery.close()
        elif available_bytes() < _ENOUGH_BYTES and not nursery.tended:
            _keep(None)
        else:
            try:
                threading.Thread(target=nursery.tend, name="kept templates", daemon=True).start()
            except RuntimeError:  # no more threads
                _keep(None)


def _keep(one: tuple[Hashable, Nursery] | None) -> None:
    """From now on, instead of what was kept, which is closed."""
    global _kept
    before, _kept = _kept, one
    if before is not None:
        before[1].close()


atexit.register(_keep, None)
