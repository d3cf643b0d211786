"""A submission as it arrives: three named parts, each with a bound, written away as it comes.

The parser is python-multipart's. What is ours: no part but those we know, none twice, none larger than allowed,
no more memory than one chunk, and no client that is slower than a modem.
"""

import hashlib
import os
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import anyio
from anyio import to_thread
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from grader_service.problems import ProblemError

JOB, NOTEBOOK, FILES = "job", "notebook", "files"
_CHUNK = 1 << 18
_IDLE_SECONDS = 30.0
_GRACE_SECONDS = 30.0
_SLOWEST_BYTES_PER_SECOND = 16 * 1024
_FRAME_BYTES = 64 * 1024
"""Boundaries and headers of all parts together."""
OPENAPI: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["job", "notebook"],
                    "additionalProperties": False,
                    "properties": {
                        "job": {"$ref": "#/components/schemas/Submission"},
                        "notebook": {"type": "string", "format": "binary", "description": "A notebook of format 4."},
                        "files": {
                            "type": "string",
                            "format": "binary",
                            "description": "A tar archive for the work directory, unpacked inside the sandbox only.",
                        },
                    },
                },
                "encoding": {"job": {"contentType": "application/json"}},
            }
        },
    }
}
"""For FastAPI, which does not see what a route reads by itself."""


def _malformed(detail: str) -> ProblemError:
    return ProblemError(400, "multipart", detail)


class Receiver:
    """Takes a body apart into files of a directory. `digest` is that of all parts together, when all are there."""

    def __init__(self, directory: Path, boundary: bytes, bounds: Mapping[str, int]) -> None:
        self._directory, self._bounds = directory, bounds
        self._digests: dict[str, str] = {}
        self._header, self._value, self._disposition = b"", b"", b""
        self._name, self._size, self._descriptor = "", 0, -1
        self._hash = hashlib.sha256()
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._field,
                "on_header_value": self._add_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._open,
                "on_part_data": self._data,
                "on_part_end": self._close,
                "on_end": self._end,
            },
        )

    @property
    def digest(self) -> str:
        """SHA-256 over the names and digests of the parts, hexadecimal."""
        return hashlib.sha256(repr(sorted(self._digests.items())).encode()).hexdigest()

    def feed(self, data: bytes) -> None:
        """The next bytes. Raises `ProblemError`."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise _malformed("The body is not well-formed multipart/form-data.") from error

    def finish(self) -> None:
        """After the last byte. Raises `ProblemError` when something is missing."""
        if not self._ended:
            raise _malformed("The body ends in the middle of a part.")
        for name in (JOB, NOTEBOOK):
            if name not in self._digests:
                raise _malformed(f"The part '{name}' is missing.")

    def close(self) -> None:
        """Safe to call again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _begin(self) -> None:
        self._header, self._value, self._disposition, self._name, self._size = b"", b"", b"", "", 0
        self._hash = hashlib.sha256()

    def _field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        elif self._header.lower() == b"content-transfer-encoding" and self._value.lower() not in {b"binary", b"8bit"}:
            raise _malformed("A part has a transfer encoding, which multipart/form-data has not. RFC 7578, 4.7")
        self._header, self._value = b"", b""

    def _open(self) -> None:
        kind, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if kind != b"form-data" or name not in self._bounds:
            raise _malformed(f"Only the parts {', '.join(self._bounds)} are known.")
        if name in self._digests:
            raise _malformed(f"The part '{name}' comes twice.")
        self._name = name
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(self._directory / name, flags, 0o600)

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._size += end - start
        if self._size > self._bounds[self._name]:
            detail = f"The part '{self._name}' is larger than the {self._bounds[self._name]} bytes that are allowed."
            raise ProblemError(413, "too-large", detail)
        piece = memoryview(data)[start:end]
        self._hash.update(piece)
        while piece:
            piece = piece[os.write(self._descriptor, piece) :]

    def _close(self) -> None:
        os.fsync(self._descriptor)
        self.close()
        self._digests[self._name] = self._hash.hexdigest()

    def _end(self) -> None:
        self._ended = True


async def receive(stream: AsyncIterator[bytes], content_type: str, directory: Path, bounds: Mapping[str, int]) -> str:
    """Write the parts of this body into an empty directory and give their digest.

    Every file is on disk (fsync) when this returns. Raises `ProblemError`: 400, 408, 413, 415.
    """
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise ProblemError(415, "media-type", "Send multipart/form-data with the parts job, notebook and files.")
    try:
        receiver = Receiver(directory, options[b"boundary"], bounds)
    except FormParserError as error:
        raise _malformed("The boundary is not one.") from error
    most, received, began = sum(bounds.values()) + _FRAME_BYTES, 0, time.monotonic()
    waiting = bytearray()
    try:
        while (chunk := await _next(stream)) is not None:
            received += len(chunk)
            if received > most:
                raise ProblemError(413, "too-large", f"The body is larger than {most} bytes.")
            if time.monotonic() - began > _GRACE_SECONDS + received / _SLOWEST_BYTES_PER_SECOND:
                raise ProblemError(408, "slow", "The body comes too slowly.", headers={"Connection": "close"})
            waiting += chunk
            if len(waiting) >= _CHUNK:
                await to_thread.run_sync(receiver.feed, bytes(waiting))
                waiting.clear()
        await to_thread.run_sync(receiver.feed, bytes(waiting))
        receiver.finish()
    finally:
        receiver.close()
    return receiver.digest


async def _next(stream: AsyncIterator[bytes]) -> bytes | None:
    try:
        with anyio.fail_after(_IDLE_SECONDS):
            return await anext(stream, None)
    except TimeoutError:
        raise ProblemError(408, "slow", "No byte came for a while.", headers={"Connection": "close"}) from None
