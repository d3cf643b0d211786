"""On which line of a TOML text a key stands, by the word of the parser that reads the text.

tomllib says where a text is broken, and of a good one only what it means; tomlkit does not keep places either
(its issue 55). But no statement of TOML goes on where a new one could begin: the fewest lines that parse alone are
one statement, and tomllib itself says which keys it sets. Nothing here knows the grammar of keys, strings or comments.
"""

import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

Key = tuple[str | int, ...]
"""From the top of the file: names of tables and keys, and positions in arrays."""


def lines_of(text: str) -> dict[Key, int]:
    """The line, from 1 on, where the statement begins that first names each key. `text` is TOML, as tomllib says."""
    found: dict[Key, int] = {}
    arrays: dict[Key, int] = {}
    table: Key = ()
    statement: list[str] = []
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        statement.append(line)
        try:
            parsed = tomllib.loads("\n".join(statement))
        except tomllib.TOMLDecodeError:
            continue  # in the middle of a text or an array
        begin = number - len(statement) + 1
        if statement[0].lstrip(" \t").startswith("["):
            table = _header(parsed, arrays)
            for length in range(1, len(table)):
                found.setdefault(table[:length], begin)
            found[table] = begin
        else:
            for key in _keys(parsed):
                found.setdefault(table + key, begin)
        statement = []
    return found


def line_of(key: Key, lines: Mapping[Key, int]) -> int | None:
    """The line of a key, or of the nearest table around it; None for what the whole file lacks."""
    return next((lines[key[:length]] for length in range(len(key), 0, -1) if key[:length] in lines), None)


def _header(parsed: Any, arrays: dict[Key, int]) -> Key:
    """The table that `[a.b]` or `[[a.b]]` opens. `arrays` holds how far each array of tables has come."""
    key: Key = ()
    while parsed:
        ((name, parsed),) = parsed.items()
        key += (name,)
        if isinstance(parsed, list):  # only the last name of [[a.b]] opens a new element
            arrays[key] = arrays.get(key, -1) + 1
            parsed = parsed[0]
        if key in arrays:
            key += (arrays[key],)
    return key


def _keys(value: Any) -> Iterator[Key]:
    """All keys in a value, each before those in it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield (name,)
        for key in _keys(inner):
            yield (name, *key)
