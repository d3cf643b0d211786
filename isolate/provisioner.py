"""Any kernel of any Jupyter client in a sandbox: a kernel provisioner for jupyter_client.

A kernelspec asks for it in its metadata (docs/kernels.md):

    "metadata": {"kernel_provisioner": {"provisioner_name": "isolate", "config": {"policy": {...}}}}

The client's process starts the sandbox and speaks with the kernel over unix sockets (`isolate.kernels`), so a
notebook server, nbclient, papermill and a console need no change. Nothing of the client's environment enters: only
what the kernelspec's `env` and the policy name. A policy that is not understood word for word starts no kernel.
"""

import asyncio
import dataclasses
import functools
import os
import re
import signal
import string
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jupyter_client.provisioning import KernelProvisionerBase
from jupyter_core.paths import jupyter_config_dir, jupyter_data_dir, jupyter_runtime_dir
from traitlets import Any as AnyTrait

from isolate.environment import find_executable
from isolate.kernels import (
    CONNECTION_FILE,
    INTERACTIVE,
    PORTS,
    Door,
    Ending,
    RunningKernel,
    kernel_command,
    kernel_policy,
)
from isolate.policy import TIERS, WORK, Bind, Limits, Policy, SandboxError, parse_size
from isolate.sandbox import Command

PRIVATE = "private"
_WORDS = {signal.SIGINT: "interrupt", signal.SIGTERM: "terminate", signal.SIGKILL: "kill"}


@dataclasses.dataclass(frozen=True)
class KernelPolicy:
    """The `policy` of a kernelspec, checked."""

    read_only: tuple[Bind, ...] = ()
    writable: tuple[Bind, ...] = ()
    hidden: tuple[Path, ...] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    pass_environment: tuple[str, ...] = ()
    limits: Limits = INTERACTIVE
    work: Path | None = None
    tier: str = TIERS[0]


def _text(value: object) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"{value!r} is not a text")
    return value


def _path(value: object) -> Path:
    text = _text(value)
    path = Path(text).expanduser() if text.startswith("~/") else Path(text)
    if not path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{text!r} is not an absolute path; it must begin with / or ~/ and hold no '..'")
    return path


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is not a list")
    return value


def _read_only(value: object) -> tuple[Bind, ...]:
    return tuple(Bind(_path(entry)) for entry in _list(value))


def _writable(value: object) -> tuple[Bind, ...]:
    return tuple(_writable_place(entry) for entry in _list(value))


def _writable_place(entry: object) -> Bind:
    if not isinstance(entry, dict):
        return _without_home(Bind(_path(entry)))
    if "path" not in entry or not entry.keys() <= {"path", "at"}:
        raise ValueError(f'{entry!r} is not {{"path": ...}} or {{"path": ..., "at": ...}}')
    return _without_home(Bind(_path(entry["path"]), _path(entry["at"]) if "at" in entry else None))


def _without_home(bind: Bind) -> Bind:
    """Whoever can write a home directory writes its owner's start-up files, and is out at the next login."""
    if Path(os.path.realpath(Path.home())).is_relative_to(os.path.realpath(bind.source)):
        raise ValueError(f"{bind.source} is or holds the home directory of this user; name a directory below it")
    return bind


def _hidden(value: object) -> tuple[Path, ...]:
    return tuple(_path(entry) for entry in _list(value))


def _name(value: object) -> str:
    name = _text(value)
    if "=" in name:
        raise ValueError(f"{name!r} is not the name of a variable")
    return name


def _environment(value: object) -> Mapping[str, str]:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is not a table of names and values")
    for text in value.values():
        if not isinstance(text, str) or "\0" in text:
            raise ValueError(f"{text!r} is not a text")
    return {_name(name): text for name, text in value.items()}


def _names(value: object) -> tuple[str, ...]:
    return tuple(_name(entry) for entry in _list(value))


def _size(value: object) -> int:
    return parse_size(str(value) if type(value) is int else _text(value))


def _count(value: object) -> int:
    if type(value) is not int or value <= 0:
        raise ValueError(f"{value!r} is not a positive whole number")
    return value


def _seconds(value: object) -> float:
    if type(value) not in {int, float} or not 0 < float(value) < 1e9:  # type: ignore[arg-type]
        raise ValueError(f"{value!r} is not a positive number of seconds")
    return float(value)  # type: ignore[arg-type]


def _work(value: object) -> Path | None:
    if value == PRIVATE:
        return None
    path = _without_home(Bind(_path(value))).source
    if not path.is_dir():
        raise ValueError(f"the directory {path} does not exist; make it, or write {PRIVATE!r}")
    return path


def _tier(value: object) -> str:
    if value not in TIERS:
        raise ValueError(f"{value!r} is none of {', '.join(TIERS)}")
    return str(value)


_READERS: Mapping[str, Callable[[object], Any]] = {
    "read_only": _read_only,
    "writable": _writable,
    "hidden": _hidden,
    "environment": _environment,
    "pass_environment": _names,
    "work": _work,
    "tier": _tier,
}
_LIMIT_READERS: Mapping[str, tuple[str, Callable[[object], Any]]] = {
    "memory": ("memory_bytes", _size),
    "files": ("files_bytes", _size),
    "processes": ("processes", _count),
    "wall_seconds": ("wall_seconds", _seconds),
    "cpu_seconds": ("cpu_seconds", _seconds),
}
KEYS = (*_READERS, *_LIMIT_READERS)
"""All keys of a policy. Each has a row in docs/kernels.md."""


def parse_policy(raw: object, where: str) -> KernelPolicy:
    """Raises `SandboxError` that names the kernelspec (`where`) and the key."""
    if not isinstance(raw, dict):
        raise _refused(where, "policy", f"{raw!r} is not a table")
    values: dict[str, Any] = {}
    limits: dict[str, Any] = {}
    for key, value in raw.items():
        try:
            if key in _READERS:
                values[key] = _READERS[key](value)
            elif key in _LIMIT_READERS:
                name, reader = _LIMIT_READERS[key]
                limits[name] = reader(value)
            else:
                raise ValueError(f"there is no such key; the keys are {', '.join(KEYS)}")
        except (ValueError, RuntimeError) as error:  # RuntimeError: no home directory can be found
            raise _refused(where, key, str(error)) from error
    return KernelPolicy(**values, limits=dataclasses.replace(INTERACTIVE, **limits))


def _refused(where: str, key: str, cause: str) -> SandboxError:
    return SandboxError("policy", f"{where}: {key}: {cause}", "correct the kernelspec")


@dataclasses.dataclass(frozen=True)
class Launch:
    """All that one start of a kernel needs to know."""

    argv: Sequence[str]
    environment: Mapping[str, str]
    resource_dir: Path | None
    client_environment: Mapping[str, str]
    client_cwd: str | None
    policy: KernelPolicy
    connection: Mapping[str, Any]

    def prepare(self, door: Door) -> tuple[Policy, Command]:
        """Raises `SandboxError`. Runs in the kernel's thread: it may make a list of fonts first."""
        executable = find_executable(self.argv[0])
        base = kernel_policy(executable, self.policy.limits)
        work = (Bind(self.policy.work),) if self.policy.work else ()
        passed = {
            name: self.client_environment[name]
            for name in self.policy.pass_environment
            if name in self.client_environment
        }
        policy = dataclasses.replace(
            base,
            read_only=(*base.read_only, *self.policy.read_only, *self._resources()),
            writable=(*self.policy.writable, *work),
            hidden=(*base.hidden, *_jupyters_own(), *self.policy.hidden),
            environment=self._variables({**base.environment, **passed}),
            tier=self.policy.tier,
        )
        return policy, kernel_command([str(executable), *self.argv[1:]], door, self.connection, policy, self._cwd())

    def _resources(self) -> tuple[Bind, ...]:
        """The kernelspec's own directory, if its argv speaks of it."""
        wanted = self.resource_dir and any(str(self.resource_dir) in word for word in self.argv)
        return (Bind(self.resource_dir),) if wanted and self.resource_dir else ()

    def _variables(self, known: Mapping[str, str]) -> dict[str, str]:
        """`${NAME}` in the kernelspec's `env` is a variable of the sandbox, never one of the client's."""
        own = {name: string.Template(text).safe_substitute(known) for name, text in self.environment.items()}
        return {**known, **own, **self.policy.environment}

    def _cwd(self) -> str:
        """Where the client wants it, if that is visible."""
        if self.policy.work is None:
            return WORK
        if self.client_cwd and Path(os.path.realpath(self.client_cwd)).is_relative_to(
            os.path.realpath(self.policy.work)
        ):
            relative = os.path.relpath(os.path.realpath(self.client_cwd), os.path.realpath(self.policy.work))
            return os.path.normpath(self.policy.work / relative)
        return str(self.policy.work)


def _jupyters_own() -> tuple[Path, ...]:
    """Masked wherever they are visible: keys of other kernels, tokens, kernelspecs without a sandbox."""
    paths = (jupyter_config_dir(), jupyter_data_dir(), jupyter_runtime_dir())
    return tuple(Path(os.path.abspath(path)) for path in paths if path)


class SandboxProvisioner(KernelProvisionerBase):
    """One kernel after another, each in a sandbox of its own, behind the same door. See `KernelProvisionerBase`."""

    policy: Any = AnyTrait({}, help="What the kernel sees and uses: docs/kernels.md.")

    def __init__(self, **keywords: Any) -> None:
        unknown = sorted(keywords.keys() - {"kernel_id", "kernel_spec", "parent", "config", "log", "policy"})
        if unknown:
            raise _refused(_name_of(keywords.get("kernel_spec")), f"config: {unknown[0]}", "the only key is policy")
        super().__init__(**keywords)
        self._kernel: RunningKernel | None = None
        self._door: Door | None = None

    @property
    def has_process(self) -> bool:
        return self._kernel is not None

    async def pre_launch(self, **keywords: Any) -> dict[str, Any]:
        """The command, with the connection file's place inside. Replaces what the base does to the environment."""
        if getattr(self.parent, "transport_encryption", "disabled") == "required":
            cause = "transport encryption is required, and the unix sockets of a sandbox do without"
            raise _refused(_name_of(self.kernel_spec), "supported_encryption", cause)
        argv = [*self.kernel_spec.argv, *keywords.pop("extra_arguments", [])]
        return {**keywords, "cmd": [self._filled(word) for word in argv]}

    def _filled(self, word: str) -> str:
        known = {
            "connection_file": CONNECTION_FILE,
            "prefix": sys.prefix,
            "resource_dir": self.kernel_spec.resource_dir,
        }
        return re.sub(r"\{(\w+)\}", lambda match: known.get(match[1], match[0]), word)

    async def launch_kernel(self, cmd: list[str], **keywords: Any) -> dict[str, Any]:
        """Raises `SandboxError`, which clients show to the person who wanted a kernel."""
        spec = self.kernel_spec
        session = self.parent.session
        launch = Launch(
            argv=cmd,
            environment=spec.env,
            resource_dir=Path(spec.resource_dir) if spec.resource_dir else None,
            client_environment=keywords.get("env") or os.environ,
            client_cwd=keywords.get("cwd"),
            policy=parse_policy(self.policy, _name_of(spec)),
            connection={"key": session.key.decode(), "signature_scheme": session.signature_scheme},
        )
        self._door = self._door or Door()
        kernel = RunningKernel(functools.partial(launch.prepare, self._door), self._door)
        try:
            await asyncio.wrap_future(kernel.started)
        except BaseException:
            kernel.send("kill")
            self._close_door()
            raise
        self._kernel = kernel
        kernel.ended.add_done_callback(lambda ended: self._tell(ended.result()))
        self.connection_info = {
            "transport": "ipc",
            "ip": self._door.prefix,
            **PORTS,
            "key": session.key,
            "signature_scheme": session.signature_scheme,
        }
        return self.connection_info

    def _tell(self, ending: Ending) -> None:
        if ending.problem:
            self.log.warning("kernel %s in its sandbox: %s", self.kernel_id, ending.problem)

    async def poll(self) -> int | None:
        if self._kernel is None:
            return 0
        return self._kernel.ended.result().exit_code if self._kernel.ended.done() else None

    async def wait(self) -> int | None:
        """Until nothing of the kernel is left."""
        if self._kernel is None:
            return 0
        ending = await asyncio.wrap_future(self._kernel.ended)
        self._kernel = None
        return ending.exit_code

    async def send_signal(self, signum: int) -> None:
        """SIGINT and SIGTERM to the kernel's process group; SIGKILL ends the sandbox. Others do not pass."""
        if signum and signum not in _WORDS:
            raise ValueError(f"signal {signum} cannot be sent into a sandbox, only SIGINT, SIGTERM and SIGKILL")
        if self._kernel is not None and signum:
            self._kernel.send(_WORDS[signal.Signals(signum)])

    async def kill(self, restart: bool = False) -> None:
        await self.send_signal(signal.SIGKILL)

    async def terminate(self, restart: bool = False) -> None:
        await self.send_signal(signal.SIGTERM)

    async def shutdown_requested(self, restart: bool = False) -> None:
        if self._kernel is not None:
            self._kernel.expect_end()

    async def cleanup(self, restart: bool = False) -> None:
        """Leave nothing; before a restart the number of the door stays, to which clients are connected."""
        if self._kernel is not None:
            await self.kill()
            await self.wait()
        if not restart:
            self._close_door()

    def _close_door(self) -> None:
        if self._door is not None:
            self._door.close()
        self._door = None


def _name_of(spec: Any) -> str:
    """For people: which kernelspec, and where it lies."""
    if spec is None:
        return "kernelspec"
    where = f" ({os.path.join(spec.resource_dir, 'kernel.json')})" if spec.resource_dir else ""
    return f"kernelspec {spec.display_name or spec.name!r}{where}"
