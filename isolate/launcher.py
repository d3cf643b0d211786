"""The helper that builds one sandbox and outlives its owner by just long enough to leave nothing behind.

Executed by `isolate.sandbox` as a program of its own, single-threaded and with an empty environment, so that
no thread of the caller can be forked half-way and no death signal follows a thread. It opens what only its
owner may reach, forks the base (`isolate.base`), watches the limits that count all processes together, and
kills the base when a limit is reached or when the owner's end of the socket closes, however that came about.
A control group (`isolate.cgroups`) and the landlock tier's private directory would outlive a killed launcher: a
guard, forked before anything else, waits for the launcher's end and removes them.

Standard library only. Arguments: the number of the socket's descriptor, the number of the plan's.
"""

import contextlib
import functools
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from isolate import base, cgroups, confined, forks, room, syscalls
from isolate.forks import Started
from isolate.room import BuildError, send_event, step
from isolate.sampler import Sampler, as_user, children
from isolate.sockets import SocketMemory

Plan = dict[str, Any]

_SAMPLE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 1.0
_KEEPER_SECONDS = 5.0


class Watch:
    """Samples of one sandbox: the most that it used, and the first limit that it reached."""

    def __init__(
        self,
        pid: int,
        counter: cgroups.Group | Sampler,
        private: confined.PrivateDirectory | None,
        plan: Plan,
        started: float,
    ) -> None:
        self._pid, self._counter, self._private, self._started = pid, counter, private, started
        self._uid, self._limits = plan["uid"], plan["limits"]
        self.memory_peak_bytes = 0
        self.cpu_seconds = 0.0

    @property
    def wall_seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def seconds_left(self) -> float:
        return max(0.0, float(self._limits["wall_seconds"]) - self.wall_seconds)

    def count(self) -> cgroups.Usage:
        """One sample of memory and processor time."""
        with as_user(self._uid if isinstance(self._counter, Sampler) else None):
            usage = self._counter.sample()
        self.memory_peak_bytes = max(self.memory_peak_bytes, usage.memory_bytes)
        self.cpu_seconds = max(self.cpu_seconds, usage.cpu_seconds)
        return usage

    def take(self) -> str | None:
        """The name of the limit that is reached now, or None."""
        usage = self.count()
        if usage.limit:
            return usage.limit
        if usage.cpu_seconds > self._limits["cpu_seconds"]:
            return "cpu"
        if self._private is not None and self._private.is_full(self._pid, self._uid):
            return "files"
        return "wall" if self.wall_seconds > self._limits["wall_seconds"] else None


def _kill_children(guard: int | None) -> None:
    """Kill all that is below us but the guard, and wait until the kernel has taken it apart.

    We are the reaper of orphans here, and a PID namespace is not reaped before it is empty.
    """
    while below := [pid for pid in children(os.getpid()) if pid != guard]:
        for pid in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(below[0], 0)


def _let_keeper_kill(pid: int) -> None:
    """It may be able to end all that is below it at once (`confined`), which we are not."""
    deadline = time.monotonic() + _KEEPER_SECONDS
    with contextlib.suppress(ChildProcessError):  # ended, and waited for: the number is no longer its own
        if os.waitpid(pid, os.WNOHANG)[0] == 0:
            os.kill(pid, signal.SIGUSR2)
        while os.waitpid(pid, os.WNOHANG)[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.01)


def _watch(end: int, box: socket.socket, watch: Watch) -> str | None:
    """Wait for the end of the process of this pidfd; the name of the limit that was reached, or None."""
    poll = select.poll()
    poll.register(end, select.POLLIN)
    poll.register(box, 0)  # messages are for the room's init; only the hang-up is for us
    ended = False
    while True:
        before = time.monotonic()
        limit = watch.take()
        if ended:
            return limit if limit == "memory" else None  # the kernel may have been first with the killing
        if limit:
            return limit
        # Sampling many processes costs: a tenth of our time, more only when so slow that limits would be missed.
        pause = max(_SAMPLE_SECONDS, min(10 * (time.monotonic() - before), _LONGEST_PAUSE_SECONDS))
        pause = min(pause, watch.seconds_left) + 0.001
        events = dict(poll.poll(pause * 1000))
        ended = end in events
        if not ended and events:
            return "owner"


class Leftovers:
    """What would outlive a killed launcher: a control group, a private directory.

    A guard, forked before anything else, removes them as soon as nobody holds the other end of its pipe.
    """

    def __init__(self, things: list[cgroups.Group | confined.PrivateDirectory]) -> None:
        self._things = things
        self.guard: int | None = None
        if things:
            end_of_us, self.lifeline = os.pipe()
            self.guard = os.fork()
            if self.guard == 0:
                try:
                    room.close_all_but(end_of_us)
                    os.read(end_of_us, 1)
                    self._remove()
                finally:
                    os._exit(0)
            os.close(end_of_us)

    def _remove(self) -> None:
        for thing in self._things:
            with contextlib.suppress(OSError):
                thing.remove()

    def close(self) -> None:
        """Have them removed; by ourselves, if the guard was killed."""
        if self.guard is not None:
            os.close(self.lifeline)
            os.waitpid(self.guard, 0)
            self._remove()


def _fork_sandbox(
    plan: Plan,
    box: socket.socket,
    things: "Things",
    diagnostics: socket.socket | None,
    jobs: socket.socket | None = None,
) -> Started:
    """Fork the first process of a sandbox, or of a base with a template that hears `jobs`. Raises `BuildError`."""
    private, group, leftovers = things.private, things.group, things.leftovers
    trees = base.open_trees_as_root(plan) if private is None else None
    launcher_pid = os.getpid()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        ours.close()
        plan["counted"] = "limits in total: sampled"
        plan["diagnostics_fd"] = diagnostics.fileno() if diagnostics else None
        if group is not None:
            with contextlib.suppress(OSError):  # the group that we come from may be another user's
                group.add()
                plan["counted"], plan["diagnostics_fd"] = group.layer, None
        theirs.send(b"counted" if plan["diagnostics_fd"] is None else b"sampled")
        if private is not None:  # this one keeps the lifeline: as long as it lives, the directory is needed
            theirs.close()
            leave = functools.partial(base.leave_launcher, plan, launcher_pid)
            confined.run_outer(plan, box, private.path, leave)
        if leftovers.guard is not None:
            os.close(leftovers.lifeline)
        base.run_outer(plan, box, trees, launcher_pid, jobs, theirs)
    theirs.close()
    for tree in trees or ():
        if tree is not None:
            os.close(tree)
    with ours:
        counted = ours.recv(16) == b"counted"
        if plan["template"] and plan["template"]["ids"] and ours.recv(16) == b"map":
            with contextlib.suppress(OSError):  # then it says what is missing
                base.map_range(pid, *plan["template"]["ids"])
            ours.send(b"mapped")

    def end() -> None:
        if private:
            _let_keeper_kill(pid)
        _kill_children(leftovers.guard)

    return Started(pid, counted, 0 if private else 3, end)


def _make_private(plan: Plan) -> confined.PrivateDirectory | None:
    if plan["tier"] != "landlock":
        return None
    with step("private directory", f"make one in {plan['private_parent']}"):
        return confined.PrivateDirectory.make(plan["private_parent"], plan["uid"], plan["limits"])


class Things:
    """What a sandbox has on the host while it runs: a control group, a private directory, their guard."""

    def __init__(self, plan: Plan) -> None:
        things: list[cgroups.Group | confined.PrivateDirectory] = []
        try:
            self.private = _make_private(plan)
            things += [self.private] if self.private else []
            self.group = cgroups.create(plan["limits"])
            things[:0] = [self.group] if self.group else []
            with step("limits", "start a guard"):
                self.leftovers = Leftovers(things)
        except BaseException:
            for thing in things:
                thing.remove()
            raise

    def close(self) -> None:
        _kill_children(self.leftovers.guard)  # an error of ours must not leave a keeper, for whose end the guard waits
        self.leftovers.close()


def _run(plan: Plan, box: socket.socket, start: Callable[[Things, socket.socket], Started]) -> dict[str, Any]:
    """Build, watch, kill, clean up; what there is to say at the end. Raises `BuildError`."""
    began = time.monotonic()
    with contextlib.closing(Things(plan)) as things:
        diagnostics, diagnostics_end = socket.socketpair()
        with diagnostics_end:
            started = start(things, diagnostics_end)
        counter: cgroups.Group | Sampler
        if things.group and started.counted:
            counter = things.group
        else:  # the sockets of the whole host are no help to the landlock tier
            sockets = None if things.private else SocketMemory(diagnostics)
            counter = Sampler(started.pid, plan["limits"], started.helpers_below, sockets)
        watch = Watch(started.pid, counter, things.private, plan, began)
        limit = _watch(os.pidfd_open(started.pid), box, watch)
        started.end()
        watch.count()
        killed_by_host = counter.killed_by_host()
    return {
        "limit": limit,
        "killed_by_host": killed_by_host,
        "wall_seconds": watch.wall_seconds,
        "cpu_seconds": watch.cpu_seconds,
        "memory_peak_bytes": watch.memory_peak_bytes,
    }


def _keep_template(plan: Plan, box: socket.socket) -> dict[str, Any]:
    """Build a base with a template in it and run its jobs; nothing to say at the end. Raises `BuildError`."""
    jobs, jobs_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.closing(Things(plan)) as things:
        with jobs_end:
            started = _fork_sandbox(plan, box, things, None, jobs_end)

        def run_job(request: forks.Request) -> None:
            if things.leftovers.guard is not None:
                os.close(things.leftovers.lifeline)
            with socket.socket(fileno=request.descriptors["box"]) as its_box:
                with open(request.descriptors["plan"], "rb", closefd=False) as file:
                    its_plan = json.load(file)
                _report(
                    its_box,
                    lambda: _run(
                        its_plan,
                        its_box,
                        lambda its_things, diagnostics: forks.start_room(jobs, request, its_things.group, diagnostics),
                    ),
                )

        def kill() -> None:
            os.kill(started.pid, signal.SIGKILL)

        forks.serve(os.pidfd_open(started.pid), box, run_job, kill, plan["template"]["idle_seconds"])
    return {}


def _report(box: socket.socket, run: Callable[[], dict[str, Any]]) -> int:
    """Exit code 0 whenever the ending was reported."""
    try:
        end = run()
    except BuildError as error:
        with contextlib.suppress(OSError):
            send_event(box, "failed", **error.as_dict())
        return 1
    with contextlib.suppress(OSError):  # the owner may be gone
        send_event(box, "gone", **end)
    return 0


def main(box_fd: int, plan_fd: int) -> int:
    """Run one sandbox, or one template, from its plan to its end. Exit code 0 whenever the ending was reported."""
    box = socket.socket(fileno=box_fd)
    with open(plan_fd, "rb") as file:
        plan: Plan = json.load(file)
    syscalls.overwrite_command_line(b"isolate")
    syscalls.set_child_subreaper()
    room.default_signals()  # whoever starts us may ignore or block SIGCHLD, by which a room's init learns of ends
    # Ctrl-C and a hang-up are the owner's business; it closes the socket when it wants us to stop. The last two are
    # ignored by every Python, since they are errors there.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)
    if not os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
        send_event(box, "failed", layer="limits", cause="/proc/PID/task/TID/children is missing", remedy="")
        return 1
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if plan["template"]:
        return _report(box, lambda: _keep_template(plan, box))

    def fork(things: Things, diagnostics: socket.socket) -> Started:
        return _fork_sandbox(plan, box, things, diagnostics)

    return _report(box, lambda: _run(plan, box, fork))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
