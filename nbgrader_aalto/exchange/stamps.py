"""The names of submissions in inbound, and the times in them.

`user+assignment+timestamp+random`, as in nbgrader. A name is a claim: the user is whoever owns the files, the
time is the file server's. Usernames may hold `+`; assignments, timestamps and random strings do not.
"""

import dataclasses
import functools
import os
import re
import secrets
from datetime import UTC, datetime

from dateutil.tz import gettz
from nbgrader.utils import parse_utc

from nbgrader_aalto.exchange.names import MAX_FILE_NAME

_NUMBERS = "%Y-%m-%d %H:%M:%S.%f"
DEFAULT_FORMAT = f"{_NUMBERS} %Z"
"""nbgrader's."""

RECEIPT = ".receipt"
"""Put after a submission's name, this is its receipt's."""
_RANDOM = re.compile(r"[A-Za-z0-9_-]{8,64}")
# what nbgrader's parse_utc may be given: dateutil opens a zone that is a path
_TIME = re.compile(r"\d[0-9A-Za-z :.,_-]{5,60}")
_OTHER_TIME = re.compile(r"(?!.*\.\.)(?!.*[ :]/)\d[0-9A-Za-z :.,/_+-]{5,60}")
_LONGEST_NAME = MAX_FILE_NAME - len(RECEIPT)
NS = 1_000_000_000


@dataclasses.dataclass(frozen=True)
class SubmissionName:
    """What the name of an entry of inbound claims; `time` in ns since 1970."""

    name: str
    user: str
    assignment: str
    timestamp: str
    time_ns: int


class OddName(ValueError):
    """Not the name of a submission."""


def parse_name(name: str) -> SubmissionName:
    """Raises `OddName`."""
    if len(os.fsencode(name)) > _LONGEST_NAME:
        raise OddName(f"has a name of more than {_LONGEST_NAME} bytes")
    parts = name.rsplit("+", 3)
    if len(parts) == 4 and _RANDOM.fullmatch(parts[3]) and (time_ns := _time_of(parts[2])) is not None:
        user, assignment, timestamp, _ = parts
    elif len(parts) >= 3 and (time_ns := _time_of(parts[-1])) is not None:
        user, assignment, timestamp = name.rsplit("+", 2)
    elif len(parts) == 4 and _RANDOM.fullmatch(parts[3]):
        raise OddName("has no time in its name that can be read")
    else:
        raise OddName("is not named `user+assignment+timestamp`")
    if not user or not assignment:
        raise OddName("names no user or no assignment")
    return SubmissionName(name, user, assignment, timestamp, time_ns)


def fit_for_a_name(text: str) -> str:
    """The timestamp, in other words if it would break a name; empty if it is none."""
    if _time_of(text) is not None:
        return text
    try:
        return from_ns(parse_time(text)).strftime(f"{_NUMBERS} UTC") if _OTHER_TIME.fullmatch(text) else ""
    except (ValueError, OverflowError):
        return ""


def _time_of(text: str) -> int | None:
    try:
        return parse_time(text) if _TIME.fullmatch(text) else None
    except (ValueError, OverflowError):
        return None


@functools.lru_cache(maxsize=1 << 16)
def parse_time(text: str) -> int:
    """ns since 1970 of a timestamp, as nbgrader reads it (without a zone: UTC). Raises `ValueError`.

    Remembered: reading one takes longer than looking at the submission, and a watcher reads the same ones again.
    """
    moment = parse_utc(text)
    seconds, microseconds = int(moment.replace(microsecond=0, tzinfo=UTC).timestamp()), int(moment.microsecond)
    return seconds * NS + microseconds * 1000


def from_ns(time_ns: int) -> datetime:
    """Naive, UTC, rounded down to microseconds: what nbgrader keeps in its database."""
    return datetime.fromtimestamp(time_ns // NS, UTC).replace(tzinfo=None, microsecond=time_ns % NS // 1000)


def format_time(time_ns: int, timezone: str, pattern: str) -> str:
    """A timestamp as the course wants it, if nbgrader reads the same moment back from it; else in UTC.

    nbgrader does not know abbreviations such as EEST when it reads, and would take them for UTC: a student would be
    three hours late. And `+` or `/` cannot stand in the name of a submission.
    """
    zone = gettz(timezone)
    moment = from_ns(time_ns).replace(tzinfo=UTC)
    text = moment.astimezone(zone).strftime(pattern) if zone else ""
    wanted = time_ns // 1000 * 1000
    try:
        if _TIME.fullmatch(text) and parse_time(text) == wanted:
            return text
    except (ValueError, OverflowError):
        pass
    return moment.strftime(DEFAULT_FORMAT)


def new_name(user: str, assignment: str, timestamp: str, *, random: bool = True) -> str:
    """Of a submission. The random part makes it hard to guess; nothing relies on that."""
    return "+".join([user, assignment, timestamp, *([secrets.token_urlsafe(9)] if random else [])])
