"""The launcher's side of warm sandboxes: one launcher that keeps a template, and one forked from it for each job.

    supervisor --(box of the template)--> launcher ==forks==> job's launcher ----(box of the job)---- supervisor
                                             |                    |  lifeline
                                             \\_ base: template ==forks==> outer, room's init, kernel

A job is one message on the template's socket with the job's own socket, plan and files. The job's launcher counts,
limits and cleans up as `isolate.launcher` does for any sandbox; only, the process that it watches is not its child.
It learns that process's number from the kernel (SCM_CREDENTIALS, unix(7)), moves it into the job's control group
before it does anything, and holds its lifeline: when that closes, however that came about, the room is ended.

Standard library only.
"""

import contextlib
import json
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from isolate import cgroups
from isolate.room import BuildError

Plan = dict[str, Any]

_MAX_MESSAGE_BYTES, _MAX_DESCRIPTORS = 65_536, 64
_UCRED = struct.Struct("=iII")
_LAST_WORDS_SECONDS = 10.0


class Started(NamedTuple):
    """The first process of a sandbox, and how its launcher deals with it."""

    pid: int
    counted: bool
    """Whether it is in the control group."""
    helpers_below: int
    """Generations of our own processes between it and what is counted."""
    end: Callable[[], None]
    """Ends it and all below it."""


class Request(NamedTuple):
    """A job: its descriptors by name. `box` and `plan` are always there."""

    descriptors: dict[str, int]

    def close(self) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)


def receive(box: socket.socket) -> Request | None:
    """The next job, or None when its sender is gone."""
    data, descriptors, _, _ = socket.recv_fds(box, _MAX_MESSAGE_BYTES, _MAX_DESCRIPTORS)
    if not descriptors:
        return None  # the end, or the word for it
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)  # recv_fds leaves it to be inherited
    return Request(dict(zip(json.loads(data), descriptors, strict=True)))


def serve(
    end: int,
    box: socket.socket,
    run_job: Callable[[Request], None],
    kill: Callable[[], None],
    idle_seconds: float,
) -> None:
    """Fork a launcher for every job until the template ends (its pidfd), the owner is gone, or nothing is wanted.

    Then the template is killed, with all rooms, and their launchers clean up by themselves.
    """
    poll = select.poll()
    poll.register(end, select.POLLIN)
    poll.register(box, select.POLLIN)
    running: set[int] = set()
    last = time.monotonic()
    while True:
        events = dict(poll.poll(1000))
        running = {pid for pid in running if os.waitpid(pid, os.WNOHANG)[0] == 0}
        if end in events:
            break
        if events:
            request = receive(box)
            if request is None:
                break
            if (pid := os.fork()) == 0:
                try:
                    os.close(end)
                    box.close()
                    run_job(request)
                finally:
                    os._exit(0)
            request.close()
            running.add(pid)
        if running:
            last = time.monotonic()
        elif time.monotonic() - last > idle_seconds:
            break
    kill()
    deadline = time.monotonic() + _LAST_WORDS_SECONDS
    while running and time.monotonic() < deadline:
        running = {pid for pid in running if os.waitpid(pid, os.WNOHANG)[0] == 0}
        time.sleep(0.01)


def start_room(
    jobs: socket.socket, request: Request, group: cgroups.Group | None, diagnostics: socket.socket
) -> Started:
    """Have the template fork this job's room. Raises `BuildError` when there is no template any more."""
    lifeline, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    lifeline.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    with theirs:
        sent = {**request.descriptors, "lifeline": theirs.fileno(), "diagnostics": diagnostics.fileno()}
        try:
            socket.send_fds(jobs, [json.dumps(list(sent)).encode()], list(sent.values()))
        except OSError as error:
            raise BuildError("template", f"it has ended: {error.strerror}") from error
    jobs.close()
    _, ancillary, _, _ = lifeline.recvmsg(64, socket.CMSG_SPACE(_UCRED.size))
    pids = [
        _UCRED.unpack(data)[0]
        for level, kind, data in ancillary
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS)
    ]
    if not pids or pids[0] <= 0:
        raise BuildError("template", "it has ended")
    end = os.pidfd_open(pids[0])  # it waits for our answer, so the number is still its own
    answer: dict[str, Any] = {"counted": "limits in total: sampled", "diagnostics_fd": 0}
    counted = False
    if group is not None:
        with contextlib.suppress(OSError):  # the group that it comes from may be another user's
            group.add(pids[0])
            answer, counted = {"counted": group.layer, "diagnostics_fd": None}, True
    with contextlib.suppress(OSError):
        lifeline.send(json.dumps(answer).encode())

    def finish() -> None:
        lifeline.close()
        poll = select.poll()
        poll.register(end, select.POLLIN)
        if not poll.poll(1000 * _LAST_WORDS_SECONDS):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(end, signal.SIGKILL)
            poll.poll()

    return Started(pids[0], counted, 1, finish)
