"""How much of this machine the service may use, unless its administrator says otherwise."""

import contextlib
import os
from pathlib import Path

from isolate.cgroups import hierarchies


def processors() -> int:
    """Those that this process may run on. sched_setaffinity(2)"""
    return len(os.sched_getaffinity(0))


def memory_bytes() -> int:
    """The machine's memory, or what the control groups around this process leave of it, such as a container's."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([total, *_group_limits()])


def _group_limits() -> list[int]:
    """cgroups(7): `memory.max` in version 2, `memory.limit_in_bytes` in version 1, of our group and those above."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        texts = [Path(f"/proc/self/{name}").read_text(encoding="utf-8") for name in ("cgroup", "mountinfo")]
        for group in hierarchies(*texts):
            place = Path(group.place)
            for directory in (place, *place.parents):
                for name in ("memory.max", "memory.limit_in_bytes"):
                    with contextlib.suppress(OSError, ValueError):  # absent, or the word `max`
                        found.append(int((directory / name).read_text(encoding="ascii")))
                if directory == Path(group.mount):
                    break
    return found
