"""One sandbox, from the side of the process that wants it.

Theory of operation
-------------------
Six processes stand in a line; each knows only the next:

    supervisor   the caller: a grader, a server, the command line; any threads, any privileges
      launcher   isolate.launcher, executed afresh; the host's namespaces; watches limits, cleans up
        outer    isolate.base; gives up root, leaves the host's namespaces, waits
          base   PID 1 of the base; lays the read-only view and locks it
            room's outer      leaves the base's namespaces, waits
              room's init     isolate.room; PID 1 of the room; closes the walls, reaps, packs
                command       somebody's code

One SOCK_SEQPACKET socket pair runs along it. Upwards travel small JSON events, written only by our own code
before or after the command's life and never by the command, whose descriptors do not include it: `ready`
(the layers in force), `failed` (which layer, why), `exited` (wait status), `gone` (which limit ended it).
Downwards travel the words interrupt, terminate and kill.

Who ends what: when the command ends, the room's init kills what it left and ends; each outer follows. When a
limit is reached, or when the supervisor's end of the socket closes (also by `kill -9`), the launcher kills
the outer; the death signal takes the base's init, and the kernel empties both PID namespaces before it reaps
that init, for which the launcher waits. When the launcher is killed, the death signals run down the same
line. Mounts live in the namespaces and go with them; no file on the host belongs to a sandbox.

This is the tier of namespaces. Where a policy names the weaker landlock tier, `isolate.confined` stands in the
place of the four processes between launcher and command.
"""

import base64
import contextlib
import dataclasses
import json
import os
import selectors
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, Any, Self

import isolate
from isolate import landlock, seccomp, uids
from isolate.policy import HOME, LANDLOCK_GAPS, WORK, Bind, Policy, Report, SandboxError
from isolate.room import WRITABLE_PLACES

_MAX_EVENT_BYTES = 65_536
_LONGEST_PARENT = 44
_TEMPLATE_SECONDS = 120.0
"""Longer than importing takes, which nobody waits for that hangs."""
_ROOM_PLAN = """
uid gid limits seccomp argv cwd work below_writable keep_bytes keep_files room_files share_at terminal tier template
""".split()
"""What of a plan a template's process is told: nothing that names what lies at another path on the host."""

_ETC = {
    "/etc/passwd": f"student:x:1000:1000:student:{HOME}:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "/etc/group": "student:x:1000:\nnogroup:x:65534:\n",
    "/etc/hosts": "127.0.0.1 localhost sandbox\n::1 localhost\n",
    "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    "/etc/resolv.conf": "",
}

_REMEDIES = {
    "namespaces": (
        "this host does not let us make namespaces: check sysctl user.max_user_namespaces and "
        "kernel.unprivileged_userns_clone, a container's seccomp profile, or AppArmor's restriction on Ubuntu "
        "(kernel.apparmor_restrict_unprivileged_userns)"
    ),
    "user namespace": "on Ubuntu 24.04 give this program an AppArmor profile with 'userns,'",
    "read-only view": "Linux 5.12 or newer is needed, and the paths must be readable for the sandbox's user",
}


@dataclasses.dataclass(frozen=True)
class Command:
    """What runs in the room, and what it is given besides what the policy shows."""

    argv: Sequence[str]
    cwd: str = WORK
    archive: IO[bytes] | None = None
    """A tar archive (a real file) that is unpacked into the work directory first."""
    keep: IO[bytes] | None = None
    """A real file into which the work directory is packed when the command has ended. Not to be parsed outside."""
    room_files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Small files to write into the room's writable places: path -> text."""
    share_at: str | None = None
    """Where to mount a tiny directory for unix sockets, whose descriptor is then `Sandbox.shared`."""
    terminal: bool = False
    """Give it a terminal of the room's own instead of stdin, stdout and stderr; its master is then `Sandbox.shared`."""
    pass_fds: Sequence[int] = ()
    template: "TemplateProgram | None" = None
    """Not a command, but a template that others are forked from (see `isolate.warm`)."""
    connects: bool = False
    """Whether it connects to unix sockets that are not its own. Only the landlock tier asks."""
    stdin: int | IO[bytes] | None = subprocess.DEVNULL
    stdout: int | IO[bytes] | None = None
    stderr: int | IO[bytes] | None = None


def _is_below(path: str, parent: str) -> bool:
    return path == parent or path.startswith(parent.rstrip("/") + "/")


def _mount_entries(policy: Policy) -> list[dict[str, Any]]:
    """What the base lays, parents before children; at the same place a mask comes last and wins."""
    visible = [(bind, "read-only") for bind in policy.read_only] + [(bind, "writable") for bind in policy.writable]
    real_sources = [os.path.realpath(bind.source) for bind, _ in visible]
    entries: dict[tuple[str, str], dict[str, Any]] = {}

    def show(bind: Bind, kind: str) -> None:
        source, target = str(bind.source), str(bind.target)
        if target == "/":
            raise SandboxError("policy", "the whole file system cannot be made visible", "name directories")
        try:
            mode = os.stat(source).st_mode
        except OSError as error:
            raise SandboxError("policy", f"the visible path {source} cannot be read: {error.strerror}") from error
        entry: dict[str, Any] = {
            "kind": kind,
            "source": source,
            "target": target,
            "directory": stat.S_ISDIR(mode),
        }
        if os.path.islink(source):
            real = os.path.realpath(source)
            if any(_is_below(real, other) for other in real_sources if other != real) and source == target:
                entry["link"] = real  # such as /bin -> /usr/bin; what lies between may not be visible
            else:
                entry["source"] = real
        entries[target, "visible"] = entry

    for bind, kind in visible:
        show(bind, kind)
    for hidden in policy.hidden:
        real = os.path.realpath(hidden)
        for (bind, _), source in zip(visible, real_sources, strict=True):
            if _is_below(real, source):
                target = os.path.normpath(os.path.join(bind.target, os.path.relpath(real, source)))
                entries[target, "hidden"] = {"kind": "hidden", "target": target}
    return sorted(entries.values(), key=lambda entry: (entry["target"].count("/"), entry["kind"] == "hidden"))


@dataclasses.dataclass(frozen=True)
class TemplateProgram:
    """What a template is to be (see `isolate.template` and `isolate.warm`)."""

    source: IO[bytes]
    """Python source that the interpreter executes."""
    state: Mapping[str, Any]
    files: Mapping[str, str]
    """What its HOME has: path -> text."""
    idle_seconds: float


def _template_plan(program: TemplateProgram | None, uid: int | None) -> dict[str, Any] | None:
    if program is None:
        return None
    ids = uids.usable_ids() if uid is not None else None
    return {
        "source_fd": program.source.fileno(),
        "state": dict(program.state),
        "files": dict(program.files),
        "idle_seconds": program.idle_seconds,
        "ids": [ids.start, len(ids)] if ids is not None else None,
    }


def _plan(policy: Policy, command: Command, uid: int | None) -> dict[str, Any]:
    mounts = _mount_entries(policy)
    directories = [*WRITABLE_PLACES, "/run"]
    if command.share_at is not None:
        directories.append(command.share_at)
    return {
        "uid": uid,
        "gid": uid,
        "mounts": mounts,
        "below_writable": [
            entry["target"]
            for entry in mounts
            if entry["kind"] != "hidden" and any(_is_below(entry["target"], place) for place in WRITABLE_PLACES)
        ],
        "files": _ETC,
        "directories": directories,
        "root_inodes": 2048 + 16 * len(mounts),
        "limits": dataclasses.asdict(policy.limits),
        "keep_bytes": policy.limits.work_bytes,
        "keep_files": policy.limits.work_files,
        "seccomp": [base64.b64encode(program).decode() for program in seccomp.compiled_filters()],
        "argv": list(command.argv),
        "environment": dict(policy.environment),
        "cwd": command.cwd,
        "work": WORK,
        "archive_fd": command.archive.fileno() if command.archive else None,
        "keep_fd": command.keep.fileno() if command.keep else None,
        "room_files": dict(command.room_files),
        "share_at": command.share_at,
        "terminal": command.terminal,
        "pass_fds": list(command.pass_fds),
        "template": _template_plan(command.template, uid),
        **_tier_plan(policy, command, uid),
    }


def _tier_plan(policy: Policy, command: Command, uid: int | None) -> dict[str, Any]:
    """What `isolate.confined` needs to know. Raises `SandboxError` for what the landlock tier cannot do."""
    if policy.tier != "landlock":
        return {"tier": policy.tier}
    if not landlock.abi():
        raise SandboxError("landlock", "this kernel has none", "Linux 5.13 or newer, booted with lsm=...,landlock")
    for bind in (*policy.read_only, *policy.writable):
        if bind.source != bind.target:
            raise SandboxError("policy", f"the landlock tier cannot show {bind.source} at another place")
    writable = [os.path.realpath(bind.source) for bind in policy.writable]
    for path in (*(bind.source for bind in policy.read_only), *policy.hidden):
        if any(_is_below(os.path.realpath(path), place) for place in writable):
            cause = f"the landlock tier cannot protect {path} below something writable: its rules only add"
            raise SandboxError("policy", cause, "show less writable, or use the namespaces tier")
    extra = seccomp.landlock_tier_filter(
        connects=command.connects,
        truncates=landlock.abi() >= landlock.TRUNCATE_SINCE,
        signals=landlock.abi() >= landlock.SCOPES_SINCE,
        shared_user=uid is None,
    )
    return {
        "tier": policy.tier,
        "tier_visible": [str(bind.source) for bind in (*policy.read_only, *policy.writable)],
        "tier_read_only": list(dict.fromkeys(os.path.realpath(bind.source) for bind in policy.read_only)),
        "tier_writable": writable,
        "tier_hidden": [os.path.realpath(path) for path in policy.hidden],
        "tier_seccomp": [base64.b64encode(extra).decode()],
        "private_parent": _private_parent(uid),
    }


def _private_parent(uid: int | None) -> str:
    """Where private directories are made. Sockets lie below, whose paths may have 107 bytes (unix(7)); and the
    sandbox's user, if it is not ours, must be able to go there."""
    parent = tempfile.gettempdir()
    fits = len(os.fsencode(parent)) <= _LONGEST_PARENT
    return parent if fits and (uid is None or os.stat(parent).st_mode & stat.S_IXOTH) else "/tmp"


class Sandbox:
    """A running sandbox; a context manager that leaves nothing when it closes.

    Raises `SandboxError` on entry when any layer cannot be built. Inside the `with`, the command runs;
    `wait` returns the report. Two sandboxes that share sockets share a `lease` (see `isolate.uids`), which the
    caller holds. Not for use by several threads at once.
    """

    def __init__(
        self,
        policy: Policy,
        command: Command,
        *,
        lease: uids.Lease | None = None,
        template: "Sandbox | None" = None,
    ) -> None:
        self._policy, self._command, self._lease, self._template = policy, command, lease, template
        self._stack = contextlib.ExitStack()
        self._events: dict[str, dict[str, Any]] = {}
        self._killed = False
        self.layers: tuple[str, ...] = ()
        self.shared: int | None = None
        self.finished = False

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._launch(stack)
            self._stack = stack.pop_all()
        try:
            self._socket.settimeout(_TEMPLATE_SECONDS if self._command.template else None)
            while "ready" not in self._events and not self.finished:
                self.receive()
            self._socket.settimeout(None)
            self._raise_failure()
        except TimeoutError:
            self.__exit__(None, None, None)
            raise SandboxError("template", f"it was not ready within {_TEMPLATE_SECONDS:g} s") from None
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _launch(self, stack: contextlib.ExitStack) -> None:
        leased = self._lease or stack.enter_context(uids.lease())
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket = stack.enter_context(ours)
        with theirs, open(os.memfd_create("isolate-plan"), "w+b") as plan_file:
            plan = _plan(self._policy, self._command, leased.uid if leased else None)
            holder = leased.holder if leased else None
            if self._template is not None:
                plan_file.write(json.dumps({name: plan[name] for name in _ROOM_PLAN} | {"mounts": []}).encode())
                plan_file.seek(0)
                self._template.start_job(self._command, theirs, plan_file, holder)
                return
            plan_file.write(json.dumps(plan).encode())
            plan_file.seek(0)
            stack.callback(_start_launcher(self._command, theirs, plan_file, holder).wait)

    def start_job(self, command: Command, box: socket.socket, plan: IO[bytes], holder: int | None) -> None:
        """Of a template: have it start a sandbox for this command. May be called by several threads at once.

        Raises `SandboxError` when it has ended.
        """
        with contextlib.ExitStack() as stack:
            named: dict[str, int] = {"box": box.fileno(), "plan": plan.fileno()}
            for number, (name, stream) in enumerate(
                (("stdin", command.stdin), ("stdout", command.stdout), ("stderr", command.stderr))
            ):
                if stream == subprocess.DEVNULL:
                    stream = stack.enter_context(open(os.devnull, "r+b", buffering=0))
                named[name] = number if stream is None else stream if isinstance(stream, int) else stream.fileno()
            if holder is not None:
                named["holder"] = holder
            for name, file in (("archive", command.archive), ("keep", command.keep)):
                if file is not None:
                    named[name] = file.fileno()
            named |= {f"pass{number}": descriptor for number, descriptor in enumerate(command.pass_fds)}
            try:
                socket.send_fds(self._socket, [json.dumps(list(named)).encode()], list(named.values()))
            except OSError as error:
                raise SandboxError("template", f"it has ended: {error.strerror}") from error

    def fileno(self) -> int:
        """Readable when `receive` has something to say: for selectors."""
        return self._socket.fileno()

    def receive(self) -> dict[str, Any] | None:
        """Take the next event; None, and `finished`, when the launcher and all below it have ended."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._socket, _MAX_EVENT_BYTES, 1)
        except ConnectionResetError:
            # The other end closed with a word of ours unread: said once, and what it sent before is still there.
            data, descriptors, _, _ = socket.recv_fds(self._socket, _MAX_EVENT_BYTES, 1)
        if not data:
            self.finished = True
            return None
        event: dict[str, Any] = json.loads(data)
        if descriptors:
            self.shared = descriptors[0]
            os.set_inheritable(self.shared, False)  # recv_fds leaves it to be inherited
            self._stack.callback(os.close, self.shared)
        if event["event"] == "ready":
            self.layers = tuple(event["layers"])
        self._events.setdefault(event["event"], event)
        return event

    def _raise_failure(self) -> None:
        failed = self._events.get("failed")
        if failed:
            remedy = failed.get("remedy") or _REMEDIES.get(failed["layer"], "")
            raise SandboxError(failed["layer"], failed["cause"], remedy)
        if self.finished and self._template is not None and "ready" not in self._events:
            raise SandboxError("template", "it has ended")
        if self.finished and "gone" not in self._events:
            raise SandboxError("launcher", "it ended without a word; the host may be out of memory or processes")

    def send(self, word: str) -> None:
        """`interrupt` (SIGINT to the command's process group), `terminate` (SIGTERM) or `kill` (everything)."""
        self._killed = self._killed or word == "kill"
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._socket.send(word.encode())

    def wait(self, timeout: float | None = None) -> Report:
        """Wait until nothing of the sandbox is left, and say how it went.

        Raises `TimeoutError` after `timeout` seconds, with the sandbox still running, and `SandboxError` when
        the host failed.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            while not self.finished:
                left = None if deadline is None else deadline - time.monotonic()
                if not selector.select(None if left is None else max(0.0, left)):
                    raise TimeoutError("the sandbox is still running")
                self.receive()
        return self.report()

    def report(self) -> Report:
        """How it went; only when `finished`."""
        self._raise_failure()
        gone, exited = self._events["gone"], self._events.get("exited")
        exited_cpu = exited["cpu_seconds"] if exited else 0.0
        common: dict[str, Any] = {
            "wall_seconds": round(gone["wall_seconds"], 3),
            "cpu_seconds": round(max(gone["cpu_seconds"], exited_cpu), 3),
            "memory_peak_bytes": max(gone["memory_peak_bytes"], self._largest_process(exited)),
            "tier": self._policy.tier,
            "layers": self.layers,
            "gaps": LANDLOCK_GAPS if self._policy.tier == "landlock" else (),
        }
        limit = gone["limit"]
        by_kill = exited is not None and os.waitstatus_to_exitcode(exited["status"]) == -signal.SIGKILL
        if gone["killed_by_host"] and limit is None and (by_kill or exited is None) and not self._killed:
            raise SandboxError("host", "it ran out of memory while the sandbox ran", "run fewer at a time")
        if limit == "memory" and exited is not None and not self._killed:
            return Report("limit", limit=limit, message=self._explain(limit), **common)
        if exited is None:
            if limit == "owner" or (limit is None and self._killed):
                return Report("killed", **common)
            if limit is None:
                raise SandboxError("room", "its init ended without a word; the host may be out of memory")
            return Report("limit", limit=limit, message=self._explain(limit), **common)
        if self._killed:
            return Report("killed", **common)
        code = os.waitstatus_to_exitcode(exited["status"])
        if code >= 0:
            return Report("exited", exit_code=code, **common)
        limit_of_signal = {int(signal.SIGXCPU): "cpu", int(signal.SIGXFSZ): "files"}.get(-code)
        if limit_of_signal is None and -code == signal.SIGKILL and exited_cpu >= self._policy.limits.cpu_seconds:
            limit_of_signal = "cpu"
        if limit_of_signal:
            return Report("limit", limit=limit_of_signal, message=self._explain(limit_of_signal), **common)
        return Report("signal", signal=-code, message=f"ended by {_signal_name(-code)}", **common)

    def _largest_process(self, exited: dict[str, Any] | None) -> int:
        """Of a forked one, what it shares with its template would be counted, too. getrusage(2), ru_maxrss"""
        return int(exited["memory_peak_bytes"]) if exited and self._template is None else 0

    @property
    def kept(self) -> bool:
        """Whether the room's init came to the end of packing what the command left (see `Command.keep`)."""
        return "exited" in self._events

    @property
    def ending(self) -> bool:
        """Whether it ends, or has ended, by itself, and the report will say why."""
        return self.finished or bool({"exited", "gone"} & self._events.keys())

    def _explain(self, limit: str) -> str:
        return explain_limit(limit, self._policy)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.finished:
            self.send("kill")
        self._socket.close()  # the launcher ends what is left when this end is gone
        self._stack.close()


def _start_launcher(
    command: Command, box: socket.socket, plan: IO[bytes], holder: int | None
) -> "subprocess.Popen[bytes]":
    """Raises `SandboxError`."""
    files = [file.fileno() for file in (command.archive, command.keep) if file]
    files += [command.template.source.fileno()] if command.template else []
    package = os.path.dirname(os.path.dirname(os.path.abspath(isolate.__file__)))
    start = (
        f"import sys; sys.path.append({package!r}); from isolate.launcher import main; "
        "sys.exit(main(*map(int, sys.argv[1:])))"
    )
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", start, str(box.fileno()), str(plan.fileno())],
            env={},
            cwd="/",
            stdin=command.stdin,
            stdout=command.stdout,
            stderr=command.stderr,
            pass_fds=[
                box.fileno(),
                plan.fileno(),
                *files,
                *([] if holder is None else [holder]),
                *command.pass_fds,
            ],
            start_new_session=True,
        )
    except OSError as error:
        raise SandboxError("launcher", f"cannot be started: {error}") from error


def _signal_name(number: int) -> str:
    """Real-time signals have no name in Python."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def explain_limit(limit: str, policy: Policy) -> str:
    """One sentence for people: which limit, and how much it was."""
    limits = policy.limits
    mib = 1024 * 1024
    return {
        "wall": f"the wall limit of {limits.wall_seconds:g} s was reached",
        "cpu": f"the cpu limit of {limits.cpu_seconds:g} s of processor time was reached",
        "memory": f"the memory limit of {limits.memory_bytes / mib:g} MiB for all processes together was reached",
        "files": f"the file limit of {limits.files_bytes / mib:g} MiB in {limits.files_count} files was reached",
        "processes": f"the limit of {limits.processes} processes and threads was reached",
        "open_files": f"the limit of {limits.open_files} open files of a process was reached",
        "output": f"the output limit of {limits.output_bytes / mib:g} MiB was reached",
    }[limit]


def last_words(said: bytes | bytearray) -> str:
    """The last line of what a room wrote to its standard error, fit for a log: short, and no control characters."""
    lines = said.decode("utf-8", "replace").strip().splitlines()
    return "".join(one if one.isprintable() else "?" for one in lines[-1][:300]) if lines else ""
