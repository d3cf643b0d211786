"""Connections that bring no request: closed, however lively they are."""

import asyncio
import os
import resource
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from grader_service import serve

pytestmark = pytest.mark.threat(93)

LONG = 30.0


async def _app(_scope: Any, _receive: Any, send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
    await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"no"})


async def _drip(path: Path, head: bytes, drop: bytes) -> bytes:
    """What the server says to one who sends this head and then a drop now and then, until it hangs up."""
    config = uvicorn.Config(_app, uds=str(path), http=serve._Protocol, lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    try:
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(head)
        answer = asyncio.create_task(reader.read())
        async with asyncio.timeout(LONG):
            while not answer.done():
                writer.write(drop)
                await asyncio.wait([answer], timeout=0.02)
        writer.close()
        return b"" if answer.exception() else answer.result()  # a reset connection has ended, too
    finally:
        await server.shutdown()


@pytest.mark.parametrize(
    ("head", "drop"),
    [
        (b"", b""),
        (b"GET / HT", b""),
        (b"GET / HTTP/1.1\r\nHost: x\r\n", b"X: y\r\n"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n", b"x"),
    ],
)
def test_who_does_not_ask_is_hung_up_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: bytes, drop: bytes
) -> None:
    monkeypatch.setattr(serve, "_HEAD_SECONDS", 0.3)
    monkeypatch.chdir(tmp_path)  # a short name. unix(7)
    asyncio.run(_drip(Path("s"), head, drop))


def test_there_are_descriptors_for_all_connections() -> None:
    """In a process of its own: a limit that was lowered stays."""
    pid = os.fork()
    if not pid:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        serve._allow_descriptors()
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        os._exit(soft not in {hard, serve._MOST_DESCRIPTORS})
    assert os.waitpid(pid, 0)[1] == 0
