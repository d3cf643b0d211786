"""The kernels of an environment, read as data: of a prefix on the host, or of one inside an unpacked image.

jupyter_client finds kernels for whoever runs it, by that process's environment and links. A service knows the prefix
instead, and an image's links are its own; so the few lines that a kernel.json has are read and checked here. See
"Kernel specs" in jupyter_client's documentation.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isolate.policy import SandboxError
from isolate.roots import HOST, Root

_DIRECTORY = Path("share", "jupyter", "kernels")
_SYSTEM = (Path("/usr/local"), Path("/usr"))
_BINARIES = (Path("/usr/local/bin"), Path("/usr/bin"), Path("/bin"))
_MOST_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
PYTHON = "python3"
"""The kernel that each environment has, with a kernelspec or without."""


@dataclasses.dataclass(frozen=True)
class KernelSpec:
    """How a kernel is started, with `{connection_file}` still in it; paths are as seen by the kernel."""

    program: Path
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    interrupt_mode: str = "signal"
    resource_dir: Path | None = None
    """Where its kernel.json lies; named only if an argument does."""


def interpreter(prefix: Path, root: Root = HOST) -> Path | None:
    """The Python of a prefix, as a path in it."""
    candidates = (prefix / "bin" / name for name in ("python3", "python"))
    return next((path for path in candidates if root.is_file(path)), None)


def find(name: str, prefix: Path, root: Root = HOST) -> KernelSpec | None:
    """The kernel of this name, or None. Raises `SandboxError` for one that is there and cannot be used."""
    if not _NAME.fullmatch(name):
        return None
    for place in _places(prefix, root) if name != PYTHON else (prefix,):
        directory = place / _DIRECTORY / name
        if root.exists(directory / "kernel.json"):
            return _read(directory, prefix, root)
    return (
        command(["python", "-m", "ipykernel_launcher", "-f", "{connection_file}"], prefix, root)
        if (name == PYTHON)
        else None
    )


def names(prefix: Path, root: Root = HOST) -> list[str]:
    """The kernels that `find` finds, sorted."""
    found = {PYTHON}
    for place in _places(prefix, root):
        directory = place / _DIRECTORY
        found |= {name for name in root.names(directory) if root.exists(directory / name / "kernel.json")}
    return sorted(name for name in found if _NAME.fullmatch(name))


def command(argv: list[str], prefix: Path, root: Root = HOST) -> KernelSpec:
    """A kernel that is started like this. Raises `SandboxError` when its program is not there."""
    return KernelSpec(
        _program(argv[0], prefix, root), tuple(word.replace("{prefix}", str(prefix)) for word in argv[1:])
    )


def _places(prefix: Path, root: Root) -> list[Path]:
    """An image is an environment as a whole; of a host, only the prefix is."""
    return [prefix] if root == HOST else list(dict.fromkeys([prefix, *_SYSTEM]))


def _program(word: str, prefix: Path, root: Root) -> Path:
    """What the first word of an argv means: a path, or a name in this environment."""
    if word.startswith("/"):
        candidates = [Path(word)]
    elif re.fullmatch(r"python(3(\.\d+)?)?", word):
        # as in jupyter_client: the environment's own, whatever the name of its program, and never another
        candidates = [prefix / "bin" / name for name in (word, "python3", "python")]
    else:
        candidates = [place / word for place in (prefix / "bin", *_BINARIES)]
    for path in candidates:
        if ".." not in path.parts and root.is_file(path):
            return path
    raise SandboxError("environment", f"the program {word!r} of a kernel is not in {prefix}", "check its argv")


def _read(directory: Path, prefix: Path, root: Root) -> KernelSpec:
    path = directory / "kernel.json"
    try:
        spec = json.loads(root.read(path, _MOST_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise _unusable(path, reason or "it cannot be read") from error
    argv, variables, mode = _checked(spec, path)
    uses = any("{resource_dir}" in word for word in argv)
    plain = command([word.replace("{resource_dir}", str(directory)) for word in argv], prefix, root)
    return dataclasses.replace(
        plain, environment=variables, interrupt_mode=mode, resource_dir=directory if uses else None
    )


def _checked(spec: Any, path: Path) -> tuple[list[str], dict[str, str], str]:
    if not isinstance(spec, dict):
        raise _unusable(path, "it is not an object")
    argv, variables, mode = spec.get("argv"), spec.get("env") or {}, spec.get("interrupt_mode", "signal")
    if not isinstance(argv, list) or not argv or not all(isinstance(word, str) and "\0" not in word for word in argv):
        raise _unusable(path, "its argv is not a list of words")
    if not isinstance(variables, dict) or not all(isinstance(value, str) for value in variables.values()):
        raise _unusable(path, "its env does not map names to texts")
    if any(not name or {"=", "\0"} & set(name) or "\0" in value for name, value in variables.items()):
        raise _unusable(path, "its env has a name or a value that no process can have")
    if mode not in {"signal", "message"}:
        raise _unusable(path, "its interrupt_mode is neither signal nor message")
    return argv, variables, mode


def _unusable(path: Path, reason: str) -> SandboxError:
    return SandboxError("kernel", f"the kernelspec {path} cannot be used: {reason}", "mend it")
