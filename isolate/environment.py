"""What an interpreter needs to be visible, and what in its prefix may hold a secret.

An environment is a prefix: a venv, a conda environment, a pyenv version, or /usr. Found by following links
and pyvenv.cfg, never by running the interpreter on the host. The prefix may lie in an image (`isolate.image`): what
looks at files takes the tree in which they are, `isolate.roots.Root`, the host's own unless told otherwise.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from isolate.policy import HOME, TIERS, Bind, Limits, Policy, SandboxError, system_policy
from isolate.roots import HOST, Root
from isolate.sandbox import Command, Sandbox

_SECRETS = """
etc/jupyter etc/ipython etc/conda etc/pip.conf etc/nbgrader pip.conf .condarc condarc .netrc .pypirc
share/jupyter/runtime share/jupyter/nbgrader share/nbgrader share/jupyter/notebook_secret
""".split()
"""Below a prefix: configuration that may carry tokens, and places where an exchange lies by default."""
_MOST_CONFIG_BYTES = 1 << 20


def prefixes_of(executable: Path, root: Root = HOST) -> tuple[Path, ...]:
    """The directories that this executable's interpreter reads, nearest first; a path of its own if it has none.

    Raises `SandboxError` where that would show somebody's whole home directory.
    """
    found: list[Path] = []
    path = Path(os.path.abspath(executable))
    for _ in range(40):  # as many links as the kernel follows, path_resolution(7)
        prefix = path.parent.parent
        if path.parent.name in {"bin", "sbin"} and _is_prefix(prefix, root):
            found += _with_real(prefix, root)
            found += _bases(prefix, root)
        else:
            found.append(path)
        link = root.link(path)
        if link is None:
            break
        path = Path(os.path.normpath(path.parent / link))
    found += _with_real(Path(os.path.abspath(executable)), root)[1:]
    unique = [path for path in dict.fromkeys(found) if root.lexists(path)]
    result = tuple(p for p in unique if not any(p != other and p.is_relative_to(other) for other in unique))
    homes = _homes(root)
    for path in result:
        _refuse_home(path, root, homes)
    return result


def _with_real(path: Path, root: Root) -> list[Path]:
    real = root.real(path)
    return [path] if real is None else [path, real]


def _is_prefix(directory: Path, root: Root) -> bool:
    if directory == Path("/"):
        return False
    return any(root.exists(directory / name) for name in ("pyvenv.cfg", "conda-meta")) or any(
        name.startswith("python3") for name in root.names(directory / "lib")
    )


def _bases(prefix: Path, root: Root) -> list[Path]:
    """The prefix that a virtual environment was made from, by `home` in pyvenv.cfg. PEP 405."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for line in root.read(prefix / "pyvenv.cfg", _MOST_CONFIG_BYTES).decode("utf-8").splitlines():
            name, _, value = line.partition("=")
            if name.strip().lower() == "home":
                base = Path(value.strip()).parent
                return _with_real(base, root) if _is_prefix(base, root) else []
    return []


def _homes(root: Root) -> set[Path]:
    """Home directories of this tree's users, free of links."""
    if root == HOST:
        names = {entry.pw_dir for entry in pwd.getpwall()} | {os.path.expanduser("~")}
    else:
        names = {"/root"}
        with contextlib.suppress(OSError):
            lines = root.read(Path("/etc/passwd"), _MOST_CONFIG_BYTES).decode("utf-8", "replace").splitlines()
            names |= {fields[5] for line in lines if len(fields := line.split(":")) == 7}  # passwd(5)
    homes = {root.real(Path(name)) or Path(name) for name in names if name.startswith("/")}
    nobodys = ("/", "/bin", "/sbin", "/usr/sbin", "/usr/bin", "/usr", "/nonexistent")
    return homes - {Path(name) for name in nobodys}


def _refuse_home(path: Path, root: Root, homes: Iterable[Path]) -> None:
    real = root.real(path) or path
    if real in {Path("/usr"), Path("/opt"), Path("/usr/local")}:
        return  # system accounts keep theirs there
    if any(home.is_relative_to(real) for home in homes):
        raise SandboxError(
            "environment",
            f"{path} is or holds a home directory and would be visible as a whole",
            "put the environment into a directory of its own, such as a venv",
        )


def environment_policy(
    executables: Iterable[Path],
    *,
    environment: Mapping[str, str] | None = None,
    limits: Limits | None = None,
) -> Policy:
    """The system, the prefixes of these executables read-only with their secrets masked, and a PATH for them."""
    prefixes = list(dict.fromkeys(prefix for executable in executables for prefix in prefixes_of(executable)))
    return _policy_of(prefixes, system_policy(environment, limits), environment)


def _policy_of(prefixes: Sequence[Path], base: Policy, environment: Mapping[str, str] | None = None) -> Policy:
    return Policy(
        read_only=(*base.read_only, *(Bind(prefix) for prefix in prefixes if not _shown(prefix, base))),
        hidden=(*base.hidden, *secrets_below(prefixes)),
        environment=variables_for(prefixes, base.environment, environment or {}),
        limits=base.limits,
    )


def variables_for(
    prefixes: Sequence[Path], base: Mapping[str, str], wanted: Mapping[str, str], root: Root = HOST
) -> dict[str, str]:
    """Environment variables with which the first of these prefixes is the one that is used."""
    binaries = [str(prefix / "bin") for prefix in prefixes if root.is_directory(prefix / "bin")]
    path = ":".join(dict.fromkeys([*binaries[:1], *base["PATH"].split(":")]))
    variables = {**base, "PATH": path, **wanted}
    if prefixes and root.is_directory(prefixes[0] / "conda-meta"):
        variables.setdefault("CONDA_PREFIX", str(prefixes[0]))
    return variables


def secrets_below(prefixes: Iterable[Path], root: Root = HOST) -> tuple[Path, ...]:
    """What to mask in these directories, as far as it exists."""
    return tuple(prefix / name for prefix in prefixes for name in _SECRETS if root.lexists(prefix / name))


def _shown(path: Path, policy: Policy) -> bool:
    return any(path.is_relative_to(bind.source) for bind in policy.read_only)


def grader_policy(limits: Limits) -> Policy:
    """What this very process runs on: its interpreter, its packages, this package. For the driver room."""
    policy = _policy_of(_own_prefixes(), system_policy(None, limits))
    extra = [Path(entry) for entry in grader_paths() if Path(entry).is_dir() and not _shown(Path(entry), policy)]
    policy = policy.with_visible([path for path in extra if path != _package_parent()])
    if not _shown(_package_parent(), policy):
        policy = policy.with_visible([_package_parent() / "isolate"])
    return policy


@functools.cache
def _own_prefixes() -> tuple[Path, ...]:
    """They do not change while we run; what must be masked in them may."""
    return prefixes_of(Path(sys.executable))


def grader_paths() -> list[str]:
    """Where this process finds its packages outside of the standard library, in order."""
    names = ("site-packages", "dist-packages")
    paths = [entry for entry in sys.path if os.path.basename(entry.rstrip("/")) in names and os.path.isdir(entry)]
    return [*dict.fromkeys([*paths, str(_package_parent())])]


def _package_parent() -> Path:
    return Path(os.path.abspath(__file__)).parent.parent


_FONT_CACHE_SCRIPT = """
import glob, os, sys
os.environ["MPLCONFIGDIR"] = directory = os.environ["TMPDIR"] + "/matplotlib"
import matplotlib.font_manager
for path in glob.glob(directory + "/fontlist-*.json"):
    with open(path) as file:
        sys.stdout.write(os.path.basename(path) + "\\n" + file.read())
"""
_FONT_CACHE_MAX_BYTES = 8 * 1024 * 1024


@functools.lru_cache(maxsize=32)
def home_files(python: Path, tier: str = TIERS[0]) -> Mapping[str, str]:
    """Files that make a fresh HOME fit for use by this Python: matplotlib's list of the fonts in the sandbox.

    Without the list the first plot takes seconds, and a warning about it on stderr would cost a test cell its
    points. Built once in a sandbox of its own, before any student's code, and kept in the user's cache.
    """
    return font_files(python, HOST, lambda: _build_font_list(python, tier))


def font_files(python: Path, root: Root, build: Callable[[], str]) -> Mapping[str, str]:
    """matplotlib's list of fonts as `home_files` gives it, from the cache or from `build`. Raises `ValueError`."""
    installed = list(_matplotlibs(python, root))
    if not installed:
        return {}
    key = json.dumps([[str(path), path.stat().st_mtime_ns] for path in installed] + [str(python)])
    cached = _cache_directory() / f"fonts-{hashlib.sha256(key.encode()).hexdigest()[:24]}"
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return _as_home_file(cached.read_text(encoding="utf-8"))
    text = build()
    if not text:
        return {}
    with contextlib.suppress(OSError):  # a cache is a convenience: a read-only HOME costs a second each time
        cached.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile("w", dir=cached.parent, delete=False, encoding="utf-8") as file:
            file.write(text)
        try:
            os.replace(file.name, cached)
        except OSError:
            os.unlink(file.name)
            raise
    return _as_home_file(text)


def _matplotlibs(python: Path, root: Root) -> Iterator[Path]:
    """Where matplotlib is installed for this Python, on the host."""
    for prefix in prefixes_of(python, root):
        for version in root.names(prefix / "lib"):
            for packages in root.names(prefix / "lib" / version) if version.startswith("python3") else ():
                found = root.on_host(prefix / "lib" / version / packages / "matplotlib")
                if packages.endswith("-packages") and found is not None:
                    yield found


def _as_home_file(text: str) -> Mapping[str, str]:
    name, _, content = text.partition("\n")
    if not (name.startswith("fontlist-") and name.endswith(".json") and "/" not in name):
        raise ValueError("not a list of fonts")
    json.loads(content)
    return {f"{HOME}/.cache/matplotlib/{name}": content}


def _build_font_list(python: Path, tier: str) -> str:
    return run_font_script(python, dataclasses.replace(environment_policy([python]), tier=tier))


def run_font_script(python: Path, policy: Policy) -> str:
    """What `font_files` wants: written by this Python, in a sandbox that shows what this policy shows."""
    policy = dataclasses.replace(policy, limits=Limits(wall_seconds=120, cpu_seconds=120))
    with tempfile.TemporaryFile() as output:
        command = Command([str(python), "-I", "-c", _FONT_CACHE_SCRIPT], stdout=output, stderr=subprocess.DEVNULL)
        with Sandbox(policy, command) as sandbox:
            report = sandbox.wait()
        output.seek(0)
        text = output.read(_FONT_CACHE_MAX_BYTES + 1)
    if report.exit_code != 0 or len(text) > _FONT_CACHE_MAX_BYTES:
        return ""  # a matplotlib that cannot be imported is the notebook's problem, and it will say so
    return text.decode("utf-8")


def _cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "isolate"


def find_executable(name: str, prefix: Path | None = None) -> Path:
    """Where a kernelspec's first word leads to; bare names are looked for in `prefix`, then on PATH.

    Raises `SandboxError`.
    """
    if os.path.isabs(name):
        candidate: str | None = name
    elif prefix is not None and (prefix / "bin" / name).exists():
        candidate = str(prefix / "bin" / name)
    elif name in {"python", "python3", f"python3.{sys.version_info[1]}"} and prefix is None:
        candidate = sys.executable  # as jupyter_client does
    else:
        candidate = shutil.which(name)
    if candidate is None or not os.path.exists(candidate):
        raise SandboxError("environment", f"the program {name!r} does not exist", "check the kernelspec's argv")
    return Path(candidate)


_PYTHON_FLAGS = "[bBdEiIOPqRsSuvVx]"
_PYTHON_OPTION = re.compile(rf"-{_PYTHON_FLAGS}+|-{_PYTHON_FLAGS}*[XW].*|--check-hash-based-pycs")
_PYTHON_MODULE = re.compile(rf"-({_PYTHON_FLAGS}*)m(.*)")
"""python(1), "Command line": flags may be written together, and a value right behind its option."""


def python_module(argv: Sequence[str]) -> tuple[list[str], str, list[str]] | None:
    """`python [options] -m MODULE ...` in parts: python and its options, the module, its arguments; None for others."""
    if not argv or not os.path.basename(argv[0]).startswith("python"):
        return None
    at = 1
    while at < len(argv) and _PYTHON_OPTION.fullmatch(argv[at]):
        at += 2 if argv[at][-1] in "XW" or argv[at].startswith("--") else 1
    found = _PYTHON_MODULE.fullmatch(argv[at]) if at < len(argv) else None
    if found is None or not (found[2] or at + 1 < len(argv)):
        return None
    module, rest = (found[2], at + 1) if found[2] else (argv[at + 1], at + 2)
    return [*argv[:at], *([f"-{found[1]}"] if found[1] else [])], module, list(argv[rest:])


def without_working_directory(argv: Sequence[str]) -> list[str]:
    """`python [options] -m ipykernel_launcher ...` such that the kernel is never imported from the work directory.

    `-m` looks there first, so that a student's ipykernel_launcher.py would be the kernel and its own examiner.
    IPython puts the directory back for the notebook. (Python's `-P` does this from 3.11 on only.)
    """
    parts = python_module(argv)
    if parts is None:
        return list(argv)
    python, module, arguments = parts
    start = (
        "import sys; sys.path[:] = [entry for entry in sys.path if entry]; import runpy; "
        f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    return [*python, "-c", start, *arguments]
