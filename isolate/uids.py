"""Which unprivileged user a sandbox runs as when root starts it."""

import contextlib
import dataclasses
import os
import pwd
import random
import socket
from collections.abc import Iterator

from isolate.policy import SandboxError

_FIRST, _COUNT = 1_879_048_192, 1 << 20
"""A range that no distribution hands out: systemd's docs/UIDS-GIDS.md, "unused" above the container range."""


@dataclasses.dataclass(frozen=True)
class Lease:
    """A uid (and the gid of the same number) that is ours as long as somebody holds the descriptor open."""

    uid: int
    holder: int


def usable_ids() -> range:
    """Ids that this process may change to: inside a container only a few may be mapped. user_namespaces(7)."""
    mapped: list[range] = []
    with open("/proc/self/uid_map", encoding="ascii") as file:
        for line in file:
            first, _, count = (int(field) for field in line.split())
            mapped.append(range(first, first + count))
    if any(_FIRST in ids and _FIRST + _COUNT - 1 in ids for ids in mapped):
        return range(_FIRST, _FIRST + _COUNT)
    highest = max(mapped, key=lambda ids: ids.stop)
    return range(max(highest.start, highest.stop - 4096, 20_000), min(highest.stop, 65_534))


@contextlib.contextmanager
def lease() -> Iterator[Lease | None]:
    """A uid of its own when we are root; None for an ordinary user, who has no other.

    The lease is an abstract unix socket: the kernel frees it when its last holder ends, however it ends.
    Hand the descriptor to the processes that use the uid. Raises `SandboxError` when none is free.
    """
    if os.geteuid() != 0:
        yield None
        return
    candidates = usable_ids()
    for _ in range(200):
        if not candidates:
            break
        uid = random.choice(candidates)
        with contextlib.suppress(KeyError):
            pwd.getpwuid(uid)
            continue
        holder = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            holder.bind(f"\0isolate-uid-{uid}")
        except OSError:
            holder.close()
            continue
        with holder:
            yield Lease(uid, holder.fileno())
        return
    raise SandboxError("unprivileged user", "no free uid for a sandbox in this user namespace")
