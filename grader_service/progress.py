"""Progress of a running job: eight bytes for each event, and nothing else comes out of a sandbox before its end.

One record: the cell's index and a state, two unsigned 32-bit integers, little-endian. A worker appends, whoever
watches reads on from where it was.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

_RECORD = struct.Struct("<II")
_STATES = {"started": 1, "finished": 2}
_WORDS = {number: word for word, number in _STATES.items()}
_MOST_RECORDS = 100_000


class ProgressWriter:
    """Appends records to a file that only this user may read."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._left = _MOST_RECORDS

    def __call__(self, index: int, state: str) -> None:
        """One event of one cell; a state that is unknown, or more events than cells can have, is not written."""
        if state in _STATES and self._left > 0:
            self._left -= 1
            os.write(self._descriptor, _RECORD.pack(index, _STATES[state]))

    def close(self) -> None:
        os.close(self._descriptor)


def read(path: Path, offset: int) -> tuple[list[tuple[int, str]], int]:
    """Events (cell index, `started` or `finished`) from this byte on, and the byte to go on from."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(_RECORD.size * 4096)
    except FileNotFoundError:
        return [], offset
    whole = len(data) - len(data) % _RECORD.size
    return list(_events(data[:whole])), offset + whole


def _events(data: bytes) -> Iterator[tuple[int, str]]:
    for index, state in _RECORD.iter_unpack(data):
        if state in _WORDS:
            yield index, _WORDS[state]
