"""What a sandbox may see and use, and what it says afterwards: frozen values and nothing else."""

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

HOME = "/home/student"
WORK = "/home/student/work"
"""Where a submission lies inside a room: in the room's own memory, so that no mount names its source."""

MIB = 1024 * 1024
GIB = 1024 * MIB


def parse_size(text: str) -> int:
    """Bytes from `500M`, `2G`, `1.5GiB`, `4096`: powers of 1024. Raises `ValueError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)(?:i?[bB])?", text.strip())
    size = float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " ") if match else 0
    if not 1 <= size < 1 << 62:
        raise ValueError(f"{text!r} is not a size; write for example 500M or 2G")
    return int(size)


TIERS = ("namespaces", "landlock")

LANDLOCK_GAPS = (
    "whoever guesses a path learns whether it exists, its size, times and owner, and where a link leads; no contents",
    "the host's name, kernel, load, network interfaces and process numbers are visible",
    "grading as an ordinary user: student code has that user's uid, so one missing rule would reach all its files",
    "work directory, HOME and /tmp lie on a disk of the host; their size is looked at twice a second, not enforced",
    "files that were removed and are under way in a socket are not counted in that size",
    "processes are found by descent, not by a namespace: killing launcher and keeper at once leaves them running",
    "grading as an ordinary user: the number of processes is counted together with all others of that user",
    "student code can listen on abstract unix names of the host, so that a local user who connects could talk with it",
    "the driver, should a kernel ever take it over, can connect to unix sockets of the host as the grading user",
    "before Linux 6.12: processes are ended one after another, which a chain of forks may outrun",
    "without cgroups: memory in the buffers of sockets is not counted",
    "files that can be read can be locked (flock) by one job and seen locked by another",
)
"""What the landlock tier does not stop, and the namespaces tier does. In every report of that tier."""


class SandboxError(Exception):
    """The sandbox could not be built or its host failed; what ran inside is not to blame.

    `layer` is the part that is missing, `cause` what the kernel said, `remedy` what to do about it.
    """

    def __init__(self, layer: str, cause: str, remedy: str = "") -> None:
        self.layer, self.cause, self.remedy = layer, cause, remedy
        super().__init__(f"{layer}: {cause}" + (f" ({remedy})" if remedy else ""))


LASTING = frozenset({"policy", "environment", "seccomp", "landlock", "user namespace"})
"""Layers of a `SandboxError` that are missing the second time, too."""


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """Upper bounds for one sandbox, all its processes together unless it says otherwise."""

    wall_seconds: float = 3600.0
    cpu_seconds: float = 3600.0
    """Processor time, user and system."""
    memory_bytes: int = 2 * GIB
    """Resident memory in total; the same number bounds each process's private data (RLIMIT_DATA)."""
    processes: int = 128
    """Processes and threads. RLIMIT_NPROC, counted per user namespace."""
    files_bytes: int = 256 * MIB
    """All writable places together (work directory, HOME, /tmp, /dev/shm): one tmpfs holds them."""
    files_count: int = 20_000
    """Inodes of that tmpfs."""
    open_files: int = 512
    """Descriptors of each process. RLIMIT_NOFILE. Below the usual 1024 of a supervisor, because descriptors under way
    between sockets are counted per user, and whose own limit is passed cannot send one. unix(7), ETOOMANYREFS."""
    cell_output_bytes: int = 4 * MIB
    """Output of one notebook cell that is kept; the rest is cut with a notice."""
    output_bytes: int = 24 * MIB
    """Output of one notebook that is kept."""

    @property
    def work_bytes(self) -> int:
        """What a submission, or what one notebook leaves to the next, may take of `files_bytes`: a kernel that is to
        start needs some room of its own."""
        return self.files_bytes * 3 // 4

    @property
    def work_files(self) -> int:
        return self.files_count * 3 // 4

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not 0 < getattr(self, field.name) < float("inf"):
                raise ValueError(f"the limit {field.name} must be positive, not {getattr(self, field.name)}")


@dataclasses.dataclass(frozen=True, slots=True)
class Bind:
    """A file or directory of the host that is visible inside, at the same path unless `at` says another."""

    source: Path
    at: Path | None = None

    @property
    def target(self) -> Path:
        return self.at or self.source

    def __post_init__(self) -> None:
        for path in (self.source, self.target):
            if not path.is_absolute() or ".." in path.parts:
                raise ValueError(f"a visible path must be absolute and without '..': {path}")


@dataclasses.dataclass(frozen=True)
class Policy:
    """What is visible (read-only, writable, hidden), the environment variables, and the limits.

    There is no network inside, ever: only a loopback of the sandbox's own. `hidden` paths are masked where
    they lie below a visible one; a visible path below a hidden one is visible again.
    """

    read_only: tuple[Bind, ...] = ()
    writable: tuple[Bind, ...] = ()
    hidden: tuple[Path, ...] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    limits: Limits = dataclasses.field(default_factory=Limits)
    tier: str = "namespaces"
    """Which wall stands: `namespaces`, or `landlock`, which is weaker (`LANDLOCK_GAPS`) and never chosen by itself."""

    def __post_init__(self) -> None:
        if self.tier not in TIERS:
            raise ValueError(f"the tier must be one of {', '.join(TIERS)}, not {self.tier!r}")

    def with_visible(self, paths: Iterable[Path]) -> "Policy":
        """This policy with more read-only paths."""
        return dataclasses.replace(self, read_only=(*self.read_only, *(Bind(path) for path in paths)))


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """How one sandbox went.

    `ended` is `exited` (see `exit_code`), `signal` (see `signal`), `limit` (see `limit`: wall, cpu, memory,
    files, output) or `killed` (by whoever held the sandbox).
    """

    ended: str
    exit_code: int | None = None
    signal: int | None = None
    limit: str | None = None
    message: str = ""
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    memory_peak_bytes: int = 0
    tier: str = "namespaces"
    layers: tuple[str, ...] = ()
    gaps: tuple[str, ...] = ()
    """What this tier does not stop."""

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"layers": list(self.layers), "gaps": list(self.gaps)}

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=2)


SYSTEM_PATHS = """
/usr /bin /sbin /lib /lib32 /lib64 /libx32 /nix/store /etc/alternatives /etc/fonts /etc/ld.so.cache
/etc/ld.so.conf /etc/ld.so.conf.d /etc/localtime /etc/timezone /etc/mime.types /etc/matplotlibrc /etc/R /etc/java
""".split()
"""What an operating system's programs read, and what holds nothing of its state and nothing of anybody's."""
SYSTEM_HIDDEN = """
/usr/etc/jupyter /usr/etc/ipython /usr/local/etc /usr/share/jupyter/nbgrader /usr/local/share/nbgrader
/usr/src /usr/local/src
""".split()


def system_policy(environment: Mapping[str, str] | None = None, limits: Limits | None = None) -> Policy:
    """The operating system's programs and libraries, read-only; nothing of its state, nothing of anybody's."""
    return Policy(
        read_only=tuple(Bind(Path(path)) for path in SYSTEM_PATHS if os.path.lexists(path)),
        hidden=tuple(Path(path) for path in SYSTEM_HIDDEN if os.path.lexists(path)),
        environment={**BASE_ENVIRONMENT, **(environment or {})},
        limits=limits or Limits(),
    )


BASE_ENVIRONMENT: Mapping[str, str] = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": HOME,
    "USER": "student",
    "LOGNAME": "student",
    "SHELL": "/bin/sh",
    "TMPDIR": "/tmp",
    "LANG": "C.UTF-8",
    # One thread each by default: the graders beside this one have the other cores.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
"""What every sandboxed process finds in its environment; nothing is inherited."""
