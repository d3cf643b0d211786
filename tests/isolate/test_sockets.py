"""Memory in socket buffers, as the kernel tells it."""

import contextlib
import socket
from collections.abc import Iterator

import pytest

from isolate.sockets import SocketMemory, send_diagnostic


@pytest.fixture
def memory() -> Iterator[SocketMemory]:
    """Of the sockets of this network namespace: those of other tests among them, so only growth can be told."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        one = SocketMemory(ours)
        assert one.bytes() == 0  # nothing handed out yet
        send_diagnostic(theirs)
        yield one
        if one._diagnostic is not None:
            one._diagnostic.close()


def _fill(one: socket.socket) -> int:
    one.setblocking(False)
    held = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            held += one.send(b"x" * 65536)
    return held


def test_unix_and_tcp_buffers_are_counted(memory: SocketMemory) -> None:
    with contextlib.ExitStack() as stack:
        before = memory.bytes()
        held = 0
        for _ in range(40):
            pair = [stack.enter_context(one) for one in socket.socketpair()]
            held += sum(map(_fill, pair))
        unix = memory.bytes()
        assert held > 4 << 20
        assert unix - before > held * 0.8
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=20))
        held = sum(
            _fill(stack.enter_context(socket.create_connection(server.getsockname(), timeout=5))) for _ in range(10)
        )
        assert memory.bytes() - unix > held * 0.8 - (1 << 20)


def test_a_room_that_ended_counts_nothing() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        theirs.close()
        assert SocketMemory(ours).bytes() == 0
