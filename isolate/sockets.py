"""Memory that the sockets of a room hold: for hosts where no control group counts it.

The room's init opens a diagnostic socket in its own network namespace, while it may, and hands it to the launcher,
which asks the kernel. Standard library only, for any Python from 3.9. Sources: sock_diag(7), netlink(7),
include/uapi/linux/{unix_diag,inet_diag,sock_diag}.h.
"""

from __future__ import annotations

import array
import contextlib
import socket
import struct
from collections.abc import Iterator

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_REQUEST_DUMP = 0x1 | 0x300
_HEADER = struct.Struct("=IHHII")
_ALL_STATES = 0xFFFFFFFF
_UDIAG_SHOW_MEMINFO, _UNIX_DIAG_MEMINFO, _UNIX_MESSAGE_BYTES = 0x20, 5, 16
_INET_DIAG_SKMEMINFO, _INET_MESSAGE_BYTES = 7, 72
_MEMINFO = struct.Struct("=9I")
_PATIENCE_SECONDS = 1.0

_UNIX_REQUEST = struct.pack("=BBHIIIII", socket.AF_UNIX, 0, 0, _ALL_STATES, 0, _UDIAG_SHOW_MEMINFO, *[0xFFFFFFFF] * 2)
_REQUESTS = [(_UNIX_REQUEST, _UNIX_MESSAGE_BYTES, _UNIX_DIAG_MEMINFO)] + [
    (
        struct.pack("=BBBBI48x", family, protocol, 1 << (_INET_DIAG_SKMEMINFO - 1), 0, _ALL_STATES),
        _INET_MESSAGE_BYTES,
        _INET_DIAG_SKMEMINFO,
    )
    for family in (socket.AF_INET, socket.AF_INET6)
    for protocol in (socket.IPPROTO_TCP, socket.IPPROTO_UDP)
]


def send_diagnostic(channel: socket.socket) -> None:
    """From inside a network namespace: hand out a socket that sees all sockets of it. Raises `OSError`."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as diagnostic:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [diagnostic.fileno()]))
        channel.sendmsg([b"d"], [rights])


class SocketMemory:
    """Bytes in the buffers of a room's sockets; 0 until the room has handed out its diagnostic socket."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._channel.setblocking(False)
        self._diagnostic: socket.socket | None = None

    def bytes(self) -> int:
        """Buffers of unix, TCP and UDP sockets, as the kernel accounts them. Kinds it cannot tell of count nothing."""
        if self._diagnostic is None:
            self._receive()
        if self._diagnostic is None:
            return 0
        total = 0
        for request, message_bytes, attribute in _REQUESTS:
            with contextlib.suppress(OSError):  # ENOENT: a kernel without this kind's diagnostics
                for message in _dump(self._diagnostic, request):
                    total += _memory(message, message_bytes, attribute)
        return total

    def _receive(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            _, descriptors, _, _ = socket.recv_fds(self._channel, 1, 1)
            if descriptors:
                self._diagnostic = socket.socket(fileno=descriptors[0])
                self._diagnostic.settimeout(_PATIENCE_SECONDS)


def _dump(diagnostic: socket.socket, request: bytes) -> Iterator[memoryview]:
    diagnostic.send(_HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, 1, 0) + request)
    while True:
        data = memoryview(diagnostic.recv(1 << 18))
        while len(data) >= _HEADER.size:
            length, kind, _, _, _ = _HEADER.unpack_from(data)
            if kind == _NLMSG_DONE:
                return
            if kind == _NLMSG_ERROR:
                (number,) = struct.unpack_from("=i", data, _HEADER.size)
                raise OSError(-number, "sock_diag")
            yield data[_HEADER.size : length]
            data = data[max(_HEADER.size, (length + 3) & ~3) :]


def _memory(message: memoryview, at: int, wanted: int) -> int:
    while at + 4 <= len(message):
        length, kind = struct.unpack_from("=HH", message, at)
        if length < 4:
            break
        if kind == wanted and length >= 4 + _MEMINFO.size:
            received, _, sent, _, reserved, queued, optional, backlog, _ = _MEMINFO.unpack_from(message, at + 4)
            return int(received + max(sent, queued) + reserved + optional + backlog)
        at += (length + 3) & ~3
    return 0
