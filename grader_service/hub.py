"""The JupyterHub: who owns a token, and in which groups of the hub they are.

Theory of operation. Two questions, each answered by the hub at once and never remembered here (`auth` does that, for a
bounded time). `GET /user` with the caller's token says who owns it and what it is good for; any token may ask that.
Then `GET /users/NAME` with the service's own token says in which groups this user is now.

A token counts only if it carries `access:services!service=NAME` of this service. Without that, any program that
somebody logs in to through the hub could use their token here: a student's Jupyter server gets a token of each
instructor who visits it (OAuth; JupyterHub's documentation, "Services" and "Scopes"). Being an administrator of the hub
gives no right to grade.

The hub is not trusted to be quick or sane: one deadline for both answers, a bound on their size, no redirect, no proxy
of the environment, exact comparison of names. Whatever is not clear is `HubUnavailable`: nobody is let in.
Refuses to know about courses, except in the text of `hub_config`.
"""

import asyncio
import contextlib
import dataclasses
import ssl
import unicodedata
from collections.abc import AsyncIterator
from typing import Literal, TypeVar
from urllib.parse import quote

import httpx
import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from grader_service.settings import HubSettings, Settings
from grader_service.token_file import TokenFileError, read_token_file

log = structlog.get_logger("hub")

SERVICE_NAME = "grader-service"
"""What `hub_config` calls the service. The hub says what it is called really."""
NEEDED = frozenset({"read:users:groups"})
"""The scopes of the service's own token: names and groups of users, and nothing else about them."""
UNKNOWN_TOKEN = "The token is not known, or has expired."
DEADLINE_SECONDS = 10.0
"""For all that is asked about one token."""
_MOST_BYTES = 1 << 20
"""Of one answer: a user may be in some thousands of groups."""
_MOST_AT_ONCE, _MOST_WAITING = 16, 512
_MOST_NAME = 255
_MOST_WORDS = 200
_BLOCK_BYTES = 1 << 16
_REFUSALS, _NOT_FOUND = frozenset({401, 403}), 404
_DEFAULT_SERVER_SCOPES = ("users:activity!user", "access:servers!server")
"""Of the role `server`: jupyterhub/roles.py, get_default_roles."""


class HubUnavailable(Exception):
    """Who asks cannot be found out at present. The words may be shown to anybody; the reason is in the log."""


class HubMisconfigured(HubUnavailable):
    """The same, until an administrator changes something. The words say what."""


class HubRefused(Exception):
    """The token is not good here. The words are for who showed it; `user` owns it, if that is known."""

    def __init__(self, words: str, user: str | None = None) -> None:
        super().__init__(words)
        self.user = user


@dataclasses.dataclass(frozen=True)
class HubUser:
    """Who owns a token."""

    name: str
    groups: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Own:
    """The service as the hub sees it: its name there, and scopes that it has beyond need."""

    name: str
    superfluous: frozenset[str]


class _Answer(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class _TokenOwner(_Answer):
    """Of `GET /user`."""

    kind: Literal["user", "service"]
    name: str
    scopes: list[str]


class _User(_Answer):
    """Of `GET /users/NAME`."""

    kind: Literal["user"]
    name: str
    groups: list[str]


_Model = TypeVar("_Model", _TokenOwner, _User)


class Hub:
    """One JupyterHub, for as long as the service runs. For one event loop."""

    def __init__(self, settings: HubSettings, *, deadline_seconds: float = DEADLINE_SECONDS) -> None:
        """Raises `HubMisconfigured` if there is no token to be had from the token file."""
        try:
            self._token = read_token_file(settings.token_file)
        except TokenFileError as error:
            raise HubMisconfigured(f"hub.token_file: {error}") from error
        self._api_url = str(settings.api_url).rstrip("/")
        self._deadline_seconds = deadline_seconds
        self._own: Own | None = None
        self._turns, self._waiting = asyncio.Semaphore(_MOST_AT_ONCE), 0
        self._client = httpx.AsyncClient(
            headers={"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": SERVICE_NAME},
            verify=ssl.create_default_context(),  # the host's authorities: a university may have its own
            trust_env=False,  # a proxy of the environment would be shown tokens
            follow_redirects=False,  # so would be another host
            timeout=httpx.Timeout(deadline_seconds),
            # none is kept: the hub or a proxy before it may close one just when the next question is sent on it
            limits=httpx.Limits(max_connections=_MOST_AT_ONCE, max_keepalive_connections=0),
        )

    async def close(self) -> None:
        """Give back the connections."""
        await self._client.aclose()

    async def user_of(self, token: str) -> HubUser:
        """The hub's user who owns this token. Raises `HubRefused`, `HubUnavailable`."""
        async with self._turn():
            service = (await self._ask_own()).name
            status, body = await self._get("/user", token)
            if status in _REFUSALS:
                raise HubRefused(UNKNOWN_TOKEN)
            owner = self._parse(_TokenOwner, status, body)
            if owner.kind != "user":
                raise HubRefused("The token belongs to a service of the hub, not to a person.")
            if (problem := name_problem(owner.name)) is not None:
                raise HubRefused(f"The name of this hub user cannot be used here: {problem}.")
            if not {f"access:services!service={service}", "access:services"} & set(owner.scopes):
                raise HubRefused(
                    f"The token lacks the scope access:services!service={service}. If you may grade, restart your "
                    "Jupyter server (File > Hub Control Panel); if that does not help, ask the hub's administrator.",
                    user=owner.name,
                )
            status, body = await self._get(f"/users/{quote(owner.name, safe='')}", self._token)
            if status in _REFUSALS:
                self._own = None
                raise HubMisconfigured(f"{self._api_url} does not let the service read the groups of users any more")
            if status == _NOT_FOUND:  # deleted a moment ago
                raise HubRefused(UNKNOWN_TOKEN, user=owner.name)
            user = self._parse(_User, status, body)
            if user.name != owner.name:
                raise _unavailable("it answered for another user")
            return HubUser(user.name, frozenset(user.groups))

    async def own(self) -> Own:
        """What the hub thinks of the service's own token, asked anew.

        Raises `HubMisconfigured` if it is not what is needed, `HubUnavailable` if that cannot be told.
        """
        async with self._turn():
            self._own = None
            return await self._ask_own()

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """A place among those who ask, and the time for all that they ask."""
        if self._waiting >= _MOST_WAITING:
            raise _unavailable("too many wait for it")
        self._waiting += 1
        try:
            async with asyncio.timeout(self._deadline_seconds), self._turns:
                yield
        except TimeoutError:
            raise _unavailable(f"no answer within {self._deadline_seconds:g} s") from None
        finally:
            self._waiting -= 1

    async def _ask_own(self) -> Own:
        if self._own is None:
            status, body = await self._get("/user", self._token)
            if status in _REFUSALS:
                raise HubMisconfigured(f"{self._api_url} does not accept the token in hub.token_file")
            self._own = self._judge(self._parse(_TokenOwner, status, body))
        return self._own

    def _judge(self, owner: _TokenOwner) -> Own:
        if owner.kind != "service":
            raise HubMisconfigured("the token in hub.token_file belongs to a person; make one for a service of the hub")
        scopes = frozenset(owner.scopes)
        if missing := NEEDED - scopes:
            narrower = sorted(scope for scope in scopes if scope.partition("!")[0] in missing)
            words = f" (it has only {', '.join(narrower)})" if narrower else ""
            raise HubMisconfigured(
                f"the hub's service {owner.name!r} lacks the scope {', '.join(sorted(missing))}{words}; "
                "see `grader-service hub-config`"
            )
        return Own(owner.name, scopes - NEEDED)

    async def _get(self, path: str, token: str) -> tuple[int, bytes]:
        """Status and body of an answer; the body only of what was found. Raises `HubUnavailable` for odd ones."""
        body = bytearray()
        try:
            headers = {"Authorization": f"token {token}"}
            async with self._client.stream("GET", self._api_url + path, headers=headers) as answer:
                if answer.status_code in {*_REFUSALS, _NOT_FOUND}:
                    return answer.status_code, b""
                if answer.status_code != 200:
                    raise _unavailable(f"it answered with status {answer.status_code}")
                # as it came: decompressed, a small body may become a huge one
                async for block in answer.aiter_raw(_BLOCK_BYTES):
                    body += block
                    if len(body) > _MOST_BYTES:
                        raise _unavailable(f"its answer is longer than {_MOST_BYTES} bytes")
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            # without the cause: it holds the request, and that the token
            raise _unavailable(f"{type(error).__name__}: {error}"[:_MOST_WORDS]) from None
        return 200, bytes(body)

    def _parse(self, model: type[_Model], status: int, body: bytes) -> _Model:
        if status == _NOT_FOUND:
            raise HubMisconfigured(f"there is no API of a JupyterHub at {self._api_url}")
        try:
            return model.model_validate_json(body)
        except ValidationError:  # its words quote the answer
            raise _unavailable("its answer is not what a JupyterHub answers") from None


async def check(hub: Hub) -> list[str]:
    """At the start: is the service's own token what it must be? Returns warnings, which are in the log as well.

    Raises `HubMisconfigured`, naming the scope that is missing. A hub that is away now is a warning: until it is back
    it lets nobody in, and then it is asked the same.
    """
    try:
        own = await hub.own()
    except HubMisconfigured as error:
        log.error("hub_misconfigured", reason=str(error))
        raise
    except HubUnavailable as error:
        log.warning("hub_not_checked", reason=str(error))
        return [str(error)]
    if own.superfluous:
        log.warning("hub_token_may_too_much", service=own.name, needed=sorted(NEEDED), more=sorted(own.superfluous))
        return [
            f"the hub's service {own.name!r} needs no other scope than {', '.join(sorted(NEEDED))}, and has "
            f"{', '.join(sorted(own.superfluous))}"
        ]
    log.info("hub_checked", service=own.name)
    return []


def name_problem(name: str) -> str | None:
    """Why a hub user of this name is not let in; None if nothing is wrong with it.

    The name stands in tables and logs beside `token:<id>`, and is a Unix user's. Everything else is compared exactly.
    """
    if not 0 < len(name) <= _MOST_NAME or name in {".", ".."}:
        return "it is empty, too long, or dots"
    if not name.isprintable() or any(letter.isspace() for letter in name):
        return "it has spaces or letters that cannot be seen"
    if unicodedata.normalize("NFKC", name) != name:
        return "it has letters that look like others (it is not in the Unicode form NFKC)"
    if taken := {":", "/", ","} & set(name):
        return f"it has {' '.join(sorted(taken))}"
    return None


def _unavailable(reason: str) -> HubUnavailable:
    return HubUnavailable(f"JupyterHub cannot be asked who you are: {reason}. Try again in a minute.")


_HUB_CONFIG = """\
# The grading service in JupyterHub (5 or newer); made by `grader-service hub-config`.
# Append it to jupyterhub_config.py, restart the hub, and let instructors restart their servers.
import pathlib

# The service has a token of its own: `openssl rand -hex 32`, in a file that the hub and the service can read.
# With it, the service may ask in which groups a user is, and nothing else.
c.JupyterHub.services.append(
    {{"name": {name!r}, "api_token": pathlib.Path({token_file!r}).read_text().strip()}}
)
c.JupyterHub.load_roles.append(
    {{
        "name": {name!r},
        "description": "Read in which groups the hub's users are",
        "services": [{name!r}],
        "scopes": {needed!r},
    }}
)

{who}
# The token of a user's server may be shown to the service, if its owner may. The first two scopes are JupyterHub's
# default: if you changed the role "server", write what it says instead.
c.Spawner.server_token_scopes.extend({server!r})
"""
_GROUPS = """\
# Whoever is in one of these groups may show the service a token. The service decides on each course itself.
c.JupyterHub.load_roles.append(
    {{
        "name": {role!r},
        "description": "Use the grading service",
        "groups": {groups!r},
        "scopes": [{access!r}],
    }}
)
"""
_EVERYBODY = """\
# Every user may show the service a token: some course names its graders by user or by Unix group, and the hub does not
# know those. The service decides on each course itself, and refuses students.
import jupyterhub

if jupyterhub.version_info >= (6,):
    c.JupyterHub.extra_user_scopes.add({access!r})
else:  # if you changed the role "user" already, add the scope there
    c.JupyterHub.load_roles.append({{"name": "user", "scopes": ["self", {access!r}]}})
"""


def hub_config(settings: Settings, service: str = SERVICE_NAME) -> str:
    """What the hub's administrator appends to jupyterhub_config.py. Raises `ValueError` if no hub is configured."""
    if settings.hub is None:
        raise ValueError("the configuration has no table [hub]: there is no hub to configure")
    graders = [course.graders for course in settings.courses.values()]
    access = f"access:services!service={service}"
    if any(table.users or table.unix_groups for table in graders):
        who = _EVERYBODY.format(access=access)
    else:
        groups = sorted({group for table in graders for group in table.hub_groups})
        who = _GROUPS.format(role=f"{service}-users", groups=groups, access=access)
    return _HUB_CONFIG.format(
        name=service,
        token_file=str(settings.hub.token_file),
        needed=sorted(NEEDED),
        who=who,
        server=[*_DEFAULT_SERVER_SCOPES, access],
    )
