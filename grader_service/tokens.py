"""Tokens of courses, for where there is no JupyterHub: made once, shown once, kept as a digest.

A token is `gst_<id>_<secret>`. The id names it in lists and logs, the secret has 256 random bits: that many cannot be
guessed, so a plain SHA-256 is enough (no salt, no slow hash; NIST SP 800-63B-3, 5.1.2.2). Nothing is
remembered here between two requests, so a token that is revoked or has expired is refused at once.

Refuses to know how a client keeps its token (see `token_file`), and who may grade a course (see `auth`).
"""

import dataclasses
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine, Row, insert, select, update

from grader_service.database import reading, writing
from grader_service.models import TOKENS

PREFIX = "gst_"
"""How every course token begins; a scanner for lost secrets can look for it. No token of a JupyterHub does."""
LONGEST_SECONDS = 5 * 366 * 86_400.0
"""How long a token may last."""
_FORM = re.compile(r"gst_([0-9a-f]{12})_[A-Za-z0-9_-]{43}", re.ASCII)
_COURSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)
_MOST_NOTE = 200


@dataclasses.dataclass(frozen=True)
class TokenInfo:
    """What is known of a token; nothing of it lets anybody in. Times are seconds since the epoch."""

    id: str
    course: str
    created_at: float
    expires_at: float
    revoked_at: float | None
    note: str
    created_by: str


class TokenStore:
    """The tokens in the database. Safe to use from several threads and services at once."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.time) -> None:
        self._engine, self._clock = engine, clock

    def create(self, course: str, expires_seconds: float, note: str, created_by: str) -> tuple[str, str]:
        """Make a token for a course. Returns its id and the token itself, which is not to be had again.

        Raises `ValueError` when the course's name, the time or the note are not possible.
        """
        if not _COURSE.fullmatch(course):
            raise ValueError(f"{course!r} cannot be the name of a course")
        if not 0 < expires_seconds <= LONGEST_SECONDS:
            raise ValueError(f"a token lasts more than 0 and at most {LONGEST_SECONDS / 86_400:.0f} days")
        for words in (note, created_by):
            if len(words) > _MOST_NOTE or not words.isprintable():
                raise ValueError(f"at most {_MOST_NOTE} printable characters, on one line: {words[:50]!r}")
        token_id = secrets.token_hex(6)
        token = f"{PREFIX}{token_id}_{secrets.token_urlsafe(32)}"
        now = self._clock()
        row = {
            "id": token_id,
            "course": course,
            "digest": _digest(token),
            "created_at": now,
            "expires_at": now + expires_seconds,
            "revoked_at": None,
            "note": note,
            "created_by": created_by,
        }
        with writing(self._engine) as connection:
            connection.execute(insert(TOKENS).values(row))
        return token_id, token

    def verify(self, text: str) -> TokenInfo | None:
        """The token that this is, None if it is none, has expired or was revoked."""
        match = _FORM.fullmatch(text)
        if match is None:
            return None
        with reading(self._engine) as connection:
            row = connection.execute(select(TOKENS).where(TOKENS.c.id == match[1])).one_or_none()
        # who knows an id learns nothing from how long this takes
        same = hmac.compare_digest(_digest(text), row.digest if row else _digest(PREFIX))
        if row is None or not same:
            return None
        info = _info(row)
        return info if info.revoked_at is None and self._clock() < info.expires_at else None

    def list(self, course: str | None = None) -> tuple[TokenInfo, ...]:
        """All tokens, or those of a course, also the expired and revoked; the oldest first."""
        query = select(TOKENS).order_by(TOKENS.c.created_at, TOKENS.c.id)
        if course is not None:
            query = query.where(TOKENS.c.course == course)
        with reading(self._engine) as connection:
            return tuple(_info(row) for row in connection.execute(query))

    def revoke(self, token_id: str) -> bool:
        """Make a token useless, from the next request on. False if there is no such token; twice is as good as once."""
        unrevoked = update(TOKENS).where(TOKENS.c.id == token_id, TOKENS.c.revoked_at.is_(None))
        with writing(self._engine) as connection:
            if connection.execute(unrevoked.values(revoked_at=self._clock())).rowcount == 1:
                return True
            return connection.execute(select(TOKENS.c.id).where(TOKENS.c.id == token_id)).one_or_none() is not None


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _info(row: Row[Any]) -> TokenInfo:
    return TokenInfo(**{field.name: getattr(row, field.name) for field in dataclasses.fields(TokenInfo)})
