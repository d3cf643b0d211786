"""Reading a configuration file: who may have written it, and what is wrong with it, line by line.

Knows pydantic and TOML; what the settings are and mean is `grader_service.settings`' business.
"""

import dataclasses
import difflib
import json
import os
import re
import stat
import tomllib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from grader_service.toml_lines import Key, line_of, lines_of

_MOST_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Mistake:
    """One thing that is wrong: where, and why."""

    path: Path
    line: int | None
    """From 1 on; of the table where a key is missing; None where that is the whole file."""
    key: str
    reason: str

    def __str__(self) -> str:
        place = str(self.path) if self.line is None else f"{self.path}:{self.line}"
        return ": ".join(part for part in (place, self.key, self.reason) if part)


class ConfigurationError(Exception):
    """The configuration cannot be used. `mistakes` are all that were found, in the order of the file."""

    def __init__(self, mistakes: typing.Iterable[Mistake]) -> None:
        self.mistakes = tuple(sorted(mistakes, key=lambda mistake: mistake.line or 0))
        super().__init__("\n".join(map(str, self.mistakes)))

    @property
    def first(self) -> Mistake:
        return self.mistakes[0]


class Faults(ValueError):
    """What a validator found, each with its key relative to the value that was validated."""

    def __init__(self, faults: typing.Iterable[tuple[Key, str]]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(reason for _, reason in self.faults))

    @classmethod
    def check(cls, faults: typing.Iterable[tuple[Key, str]]) -> None:
        """Raise if there are any."""
        if found := tuple(faults):
            raise cls(found)


@dataclasses.dataclass(frozen=True)
class Text:
    """A configuration file as it was read."""

    path: Path
    content: str
    readable_by_all: bool

    def parse(self) -> dict[str, Any]:
        """Raises `ConfigurationError` with the line where it is not TOML."""
        try:
            return tomllib.loads(self.content)
        except tomllib.TOMLDecodeError as error:
            match = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", str(error))
            line = int(match[1]) if match and match[1] else self.content.rstrip("\n").count("\n") + 1
            reason = f"not TOML: {str(error)[: match.start()] if match else error}"
            raise ConfigurationError([Mistake(self.path, line, "", reason)]) from error

    def mistakes(self, error: ValidationError, model: type[BaseModel]) -> list[Mistake]:
        """The same as an administrator wants to read it. `model` is what the whole file was validated as."""
        lines = lines_of(self.content)
        return [
            Mistake(self.path, line_of(key, lines), _written(key), reason) for key, reason in _mistakes(error, model)
        ]

    def unknown(self, key: Key, model: type[BaseModel]) -> Mistake:
        """For a key that cannot even be validated."""
        line = line_of(key, lines_of(self.content))
        return Mistake(self.path, line, _written(key), _unknown_key(key, model))


def _written(key: Key) -> str:
    """As it would stand in the file: `courses."a b".read_only[0]`."""
    text = ""
    for part in key:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            bare = re.fullmatch(r"[A-Za-z0-9_-]+", part)
            text += ("." if text else "") + (part if bare else json.dumps(part, ensure_ascii=False))
    return text


def read(path: Path) -> Text:
    """Read a file that decides who may grade. Raises `ConfigurationError`, also when others may have written it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigurationError([Mistake(path, None, "", f"cannot be opened: {error.strerror}")]) from error
    status = os.fstat(descriptor)
    if problem := _untrusted(path, status):
        os.close(descriptor)
        raise ConfigurationError([Mistake(path, None, "", problem)])
    with open(descriptor, "rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ConfigurationError([Mistake(path, None, "", f"is larger than {_MOST_BYTES >> 20} MiB")])
    try:
        return Text(path, data.decode("utf-8"), bool(status.st_mode & stat.S_IROTH))
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigurationError([Mistake(path, line, "", "not TOML: this is not UTF-8")]) from error


def _untrusted(path: Path, status: os.stat_result) -> str:
    """Why somebody else may have written this, or an empty text."""
    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file"
    if status.st_uid not in {0, os.geteuid()}:
        return "belongs to another user, who so decides who may grade; give it to root or to the service's user"
    if status.st_mode & 0o022:
        return "may be written by its group or by others, who so decide who may grade; chmod go-w"
    directory = os.path.dirname(os.path.realpath(path))
    above = os.stat(directory)
    if above.st_mode & 0o022 and not above.st_mode & stat.S_ISVTX:
        return f"could be replaced by others, who may write to {directory}; chmod go-w"
    return ""


def _mistakes(error: ValidationError, model: type[BaseModel]) -> Iterator[tuple[Key, str]]:
    for one in error.errors(include_url=False, include_input=False):
        key: Key = tuple(part for part in one["loc"] if part != "[key]")
        cause = one.get("ctx", {}).get("error")
        if isinstance(cause, Faults):
            yield from ((key + below, reason) for below, reason in cause.faults)
        elif one["type"] == "extra_forbidden":
            yield key, _unknown_key(key, model)
        elif one["type"] == "missing":
            yield key, "is missing"
        elif cause is not None:
            yield key, str(cause)
        else:
            yield key, one["msg"].replace("Input should", "should").replace("String should", "should")


def _unknown_key(key: Key, model: type[BaseModel]) -> str:
    """What to say of a key that no table has at this place."""
    name = str(key[-1])
    tables = dict(_tables(model))
    here = next((fields for pattern, fields in tables.items() if _fits(key[:-1], pattern)), ())
    places = ["the top of the file" if not pattern else f"[{'.'.join(pattern)}]" for pattern in tables]
    elsewhere = [place for place, fields in zip(places, tables.values(), strict=True) if name in fields]
    close = difflib.get_close_matches(name, here, n=1)
    meant = f"; did you mean {close[0]}?" if close else ""
    return f"is unknown here{meant}" + (f"; {name} belongs into {elsewhere[0]}" if elsewhere else "")


_ANY = "NAME"


def _tables(model: type[BaseModel], pattern: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """(where it stands, its keys) for this table and those in it."""
    yield pattern, tuple(model.model_fields)
    for name, field in model.model_fields.items():
        for inner, named in _models(field.annotation):
            yield from _tables(inner, (*pattern, name, *((_ANY,) if named else ())))


def _models(annotation: Any, named: bool = False) -> Iterator[tuple[type[BaseModel], bool]]:
    """The models in a type, and whether each is below a free name."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, named
    origin = typing.get_origin(annotation)
    for argument in typing.get_args(annotation):
        yield from _models(argument, named or (isinstance(origin, type) and issubclass(origin, Mapping)))


def _fits(key: Key, pattern: tuple[str, ...]) -> bool:
    return len(key) == len(pattern) and all(b in {a, _ANY} for a, b in zip(key, pattern, strict=True))
