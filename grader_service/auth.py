"""Who asks, and may they grade this course.

Theory of operation. A caller shows a token of a course (`tokens`) or of the JupyterHub (`hub`). The first is looked up
for each request. What the hub and the host's user database say of the second is remembered, under the token's SHA-256,
for at most `hub.cache_seconds` from the moment when the asking began: that, and nothing else, is how long a removed
instructor can go on. Requests with the same token at the same time ask once. A question that could not be answered is
not remembered, and an old answer never stands in for it.

Names are compared exactly: a hub user, a Unix user, a name in the configuration file are the same person if they are
the same letters. A course's token has the name `token:<id>`, which no hub user may have.

Refuses to know what grading is. Every decision is in the log, with the user's id and the course.
"""

import asyncio
import dataclasses
import grp
import hashlib
import os
import pwd
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import structlog
from anyio import to_thread

from grader_service.hub import UNKNOWN_TOKEN, Hub, HubMisconfigured, HubRefused, HubUnavailable
from grader_service.settings import CourseSettings, Settings
from grader_service.tokens import PREFIX, TokenStore

log = structlog.get_logger("auth")

LONGEST_CACHE_SECONDS = 60.0
_REFUSAL_SECONDS = 5.0
"""How long a refusal is remembered: who was just given a right does not wait long for it."""
_MOST_REMEMBERED = 4096
_AUTHORIZATION = re.compile(r"(?:bearer|token) +([!-~]{1,512})", re.ASCII | re.IGNORECASE)
_USERS_SECONDS = 5.0
_USERS_THREADS = 4


class Unauthorized(Exception):
    """No token, or none that is good. The words are for who asked and tell nothing about anybody."""


@dataclasses.dataclass(frozen=True)
class Identity:
    """Who asks. `groups` are the hub's, `unix_groups` the host's; a course's token has none."""

    name: str
    kind: Literal["hub", "token"]
    groups: frozenset[str] = frozenset()
    token_course: str | None = None
    unix_groups: frozenset[str] = frozenset()
    until: float = 0.0
    """When this is too old to be relied on, by `time.monotonic`. A long answer identifies its caller again then."""


@dataclasses.dataclass(frozen=True)
class _Refusal:
    words: str
    until: float


class Authenticator:
    """Decides for one service. `settings` may be replaced at any time. For one event loop."""

    def __init__(
        self,
        settings: Settings,
        tokens: TokenStore,
        hub: Hub | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self._tokens, self._hub, self._clock = tokens, hub, clock
        self._remembered: OrderedDict[bytes, Identity | _Refusal] = OrderedDict()
        self._asking: dict[bytes, asyncio.Task[Identity | _Refusal]] = {}
        self._threads = ThreadPoolExecutor(_USERS_THREADS, thread_name_prefix="users")

    async def identify(self, authorization: str | None) -> Identity:
        """Who sent this Authorization header. Raises `Unauthorized`, `HubUnavailable`."""
        match = _AUTHORIZATION.fullmatch(authorization or "")
        if match is None:
            log.info("identity_refused", reason="no token")
            raise Unauthorized("Send your token: Authorization: Bearer TOKEN")
        token = match[1]
        if token.startswith(PREFIX):
            return await self._of_course(token)
        if self._hub is None:
            log.info("identity_refused", reason="not a course's token, and there is no hub")
            raise Unauthorized(UNKNOWN_TOKEN)
        found = await self._of_hub(self._hub, token)
        if isinstance(found, _Refusal):
            raise Unauthorized(found.words)
        return found

    async def may_grade(self, identity: Identity, course: str) -> bool:
        """Whether they may. A course that does not exist is one that nobody may grade."""
        table = self.settings.courses.get(course)
        by = _right(identity, course, table) if table is not None else None
        log.info(
            "grading_allowed" if by else "grading_refused",
            user=identity.name,
            course=course if table is not None else None,  # else it is anything that somebody sent
            by=by,
        )
        return by is not None

    async def courses_of(self, identity: Identity) -> list[str]:
        """The courses that they may grade, by name."""
        return sorted(name for name, table in self.settings.courses.items() if _right(identity, name, table))

    async def _of_course(self, token: str) -> Identity:
        started = self._clock()
        info = await to_thread.run_sync(self._tokens.verify, token)
        if info is None:
            log.info("identity_refused", reason="no valid token of a course")
            raise Unauthorized(UNKNOWN_TOKEN)
        return Identity(f"token:{info.id}", "token", token_course=info.course, until=started + self._cache_seconds)

    @property
    def _cache_seconds(self) -> float:
        return min(self.settings.hub.cache_seconds if self.settings.hub else 30.0, LONGEST_CACHE_SECONDS)

    async def _of_hub(self, hub: Hub, token: str) -> Identity | _Refusal:
        key = hashlib.sha256(token.encode()).digest()
        found = self._remembered.get(key)
        if found is not None and self._clock() < found.until:
            self._remembered.move_to_end(key)
            return found
        task = self._asking.get(key)
        if task is None:
            task = asyncio.create_task(self._ask(hub, token, key))
            self._asking[key] = task
            task.add_done_callback(lambda done: self._asked(key, done))
        return await asyncio.shield(task)  # others wait for it, too, when this request is given up

    def _asked(self, key: bytes, task: "asyncio.Task[Identity | _Refusal]") -> None:
        del self._asking[key]
        if not task.cancelled():
            task.exception()  # seen, also if nobody waits any more

    async def _ask(self, hub: Hub, token: str, key: bytes) -> Identity | _Refusal:
        started = self._clock()
        found: Identity | _Refusal
        try:
            user = await hub.user_of(token)
            until = started + self._cache_seconds
            unix_groups = await self._unix_groups(user.name)
            found = Identity(user.name, "hub", user.groups, None, unix_groups, until)
            log.info("identity_known", user=user.name)
        except HubRefused as refusal:
            found = _Refusal(str(refusal), started + min(_REFUSAL_SECONDS, self._cache_seconds))
            log.info("identity_refused", user=refusal.user, reason=str(refusal))
        except HubUnavailable as error:
            log.error("identity_unavailable", reason=str(error))
            if isinstance(error, HubMisconfigured):  # its words are for administrators
                raise HubUnavailable(
                    "JupyterHub cannot be asked who you are; tell the service's administrator."
                ) from None
            raise
        self._remembered[key] = found
        self._remembered.move_to_end(key)
        while len(self._remembered) > _MOST_REMEMBERED:
            self._remembered.popitem(last=False)
        return found

    async def _unix_groups(self, name: str) -> frozenset[str]:
        if not any(course.graders.unix_groups for course in self.settings.courses.values()):
            return frozenset()
        try:
            async with asyncio.timeout(_USERS_SECONDS):
                return await asyncio.get_running_loop().run_in_executor(self._threads, unix_groups_of, name)
        except (TimeoutError, OSError):
            raise HubUnavailable(
                "The host's list of users and groups does not answer. Try again in a minute."
            ) from None


def _right(identity: Identity, course: str, table: CourseSettings) -> str | None:
    """What gives them the right to grade this course, in one word; None if nothing does."""
    if identity.kind == "token":
        return "token" if identity.token_course == course else None
    graders = table.graders
    if identity.name in graders.users:
        return "user"
    if not identity.groups.isdisjoint(graders.hub_groups):
        return "hub_group"
    return "unix_group" if not identity.unix_groups.isdisjoint(graders.unix_groups) else None


def unix_groups_of(name: str) -> frozenset[str]:
    """The names of all groups of a Unix user on this host, the primary one included, from NSS; none if there is no such
    user. Blocks for as long as NSS does. getgrouplist(3)
    """
    try:
        entry = pwd.getpwnam(name)
    except (KeyError, ValueError):
        return frozenset()
    if entry.pw_name != name:  # a directory that does not tell upper from lower case
        return frozenset()
    found = set()
    for gid in os.getgrouplist(name, entry.pw_gid):
        try:
            found.add(grp.getgrgid(gid).gr_name)
        except KeyError:
            continue
    return frozenset(found)
