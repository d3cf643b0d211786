"""What the configuration's values are worth on this machine: do the paths exist, and who may read or write them.

`examining` switches it on, for `grader_service.settings.load`; values that a program makes are not looked at. Functions
raise `ValueError` for a fault in their value, or give back faults with their keys.
"""

import contextlib
import dataclasses
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path

from grader_service.toml_lines import Key
from isolate import kernelspecs
from isolate.environment import environment_policy
from isolate.image import image_policy, inside, open_image
from isolate.policy import SYSTEM_PATHS, Policy, SandboxError
from isolate.roots import HOST, Root

Fault = tuple[Key, str]


@dataclasses.dataclass
class Examination:
    """One reading of a configuration."""

    readable_by_all: bool
    """Whether everybody may read the configuration."""
    secrets: dict[Path, str]
    """What no student's code may see, and what it is; grows while values are read."""
    memory_bytes: int | None = None
    """Of all sandboxes together, once read."""


_current: ContextVar[Examination | None] = ContextVar("examination", default=None)


def current() -> Examination | None:
    """The examination that goes on, if any."""
    return _current.get()


@contextlib.contextmanager
def examining(configuration: Path, *, readable_by_all: bool) -> Iterator[None]:
    """Have values examined that are made inside."""
    token = _current.set(Examination(readable_by_all, {configuration: "the configuration"}))
    try:
        yield
    finally:
        _current.reset(token)


def keep_secret(path: Path, what: str) -> None:
    """No course may show this."""
    if examined := current():
        examined.secrets[path] = what


def data_directory(path: Path) -> None:
    """Of the service's user, and closed to everybody else; or not there yet, and then it is made like that."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise ValueError(f"{path.parent} does not exist, in which it would be made") from None
        return
    except OSError as error:
        raise ValueError(f"cannot be looked at: {error.strerror}") from error
    if not stat.S_ISDIR(status.st_mode):
        raise ValueError("is not a directory")
    if status.st_mode & 0o077:
        raise ValueError("holds submissions and may be entered by others; chmod 700")
    if os.geteuid() not in {0, status.st_uid}:
        raise ValueError("belongs to another user than the one that runs the service; chown it")


def secret_file(path: Path, mask: int = 0o077) -> None:
    """A file with a secret: there, and for those that `mask` names neither to read nor to write."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("is not a regular file")
    if status.st_mode & mask:
        raise ValueError(f"holds a secret and may be read by others; chmod {'600' if mask == 0o077 else 'o='}")


def listening(unix_socket: Path | None, certificate: Path | None, key: Path | None) -> Iterator[Fault]:
    """Faults of a `listen` table, by its keys."""
    if unix_socket is not None:
        if not unix_socket.parent.is_dir():
            yield ("unix_socket",), f"{unix_socket.parent} does not exist"
        if len(os.fsencode(unix_socket)) > 107:
            yield ("unix_socket",), "is longer than 107 bytes, the most that unix(7) allows"
    if certificate is not None and not certificate.is_file():
        yield ("tls_certificate",), "does not exist"
    if key is not None:
        keep_secret(key, "listen.tls_key")
        try:
            secret_file(key, 0o007)  # a group of those who may use certificates is customary
        except ValueError as error:
            yield ("tls_key",), str(error)


def image_root(path: Path) -> None:
    """An unpacked image that nobody but its owner may change."""
    with _as_fault():
        image = open_image(path)
    status = os.stat(image.path)
    if status.st_mode & 0o022:
        raise ValueError("may be changed by its group or by others, who so decide what is graded; chmod go-w")
    if status.st_uid not in {0, os.geteuid()}:
        raise ValueError("belongs to another user, who so decides what is graded; chown it")


def environment(prefix: Path, image: Path | None) -> None:
    """A prefix with an interpreter, on the host or in the image, and a policy that would show it."""
    where = "" if image is None else f" in {image}"
    with _as_fault():
        root = _root(image)
        python = kernelspecs.interpreter(prefix, root)
        if python is None:
            raise ValueError(f"{'has no bin/python3' if root.is_directory(prefix) else 'does not exist'}{where}")
        _policy(image, [python])


def kernels(table: Mapping[str, list[str]], prefix: Path, image: Path | None) -> Iterator[Fault]:
    """Faults of a `kernels` table, by its keys."""
    for name, argv in table.items():
        try:
            kernelspecs.command(argv, prefix, _root(image))
        except SandboxError as error:
            yield (name,), error.cause
        if not any("{connection_file}" in word for word in argv):
            yield (name,), "has no word with {connection_file}, without which no kernel is reached"


def read_only(paths: Sequence[Path], image: Path | None) -> Iterator[Fault]:
    """Faults of a `read_only` list, by their positions."""
    for position, path in enumerate(paths):
        with contextlib.suppress(SandboxError):  # of the image itself, which is said at `image_root`
            yield from (((position,), f"{path} {reason}") for reason in _unfit(path, image))


def _unfit(path: Path, image: Path | None) -> Iterator[str]:
    """Why this cannot be shown."""
    real = Path(os.path.realpath(path))
    place = None if image is None else inside(path, image)
    if place is not None and image is not None:
        if not open_image(image).exists(place):
            yield "does not exist"
            return
        try:
            image_policy(image, [], visible=[place])
        except SandboxError as error:
            yield f"cannot be shown: {error.cause}"
    elif not path.exists():
        yield "does not exist"
    elif any(Path(own).is_relative_to(real) or real.is_relative_to(own) for own in ("/proc", "/sys", "/dev")):
        yield "is or holds the kernel's own files; name a directory with data"
    elif image is not None and any(path.is_relative_to(system) for system in SYSTEM_PATHS):
        yield "would lie inside the image's own system; put the data elsewhere"


def visible(prefix: Path, image: Path | None, more: Sequence[Path]) -> Iterator[Fault]:
    """Secrets that a course's sandboxes would show."""
    if (examined := current()) is None:
        return
    with contextlib.suppress(SandboxError):  # said at `environment`
        python = kernelspecs.interpreter(prefix, _root(image))
        policy = _policy(image, [python] if python else [])
        for path in dict.fromkeys(bind.source for bind in policy.read_only):
            yield from ((("environment",), reason) for reason in _shows(path, examined))
    for position, path in enumerate(more):
        yield from ((("read_only", position), reason) for reason in _shows(path, examined))


def memory(key: Key, most_bytes: int) -> Iterator[Fault]:
    """More memory for a job of a course than there is."""
    if (examined := current()) and examined.memory_bytes is not None and most_bytes > examined.memory_bytes:
        reason = f"{most_bytes / 2**30:.3g} GiB for a job is more than `memory` allows all sandboxes together"
        yield key, f"{reason}, {examined.memory_bytes / 2**30:.3g} GiB: it could never start"


def _shows(path: Path, examined: Examination) -> Iterator[str]:
    """Secrets that lie below a visible path, or that it is a part of."""
    real = Path(os.path.realpath(path))
    for secret, what in examined.secrets.items():
        if any(other != secret and secret.is_relative_to(other) for other in examined.secrets):
            continue  # said with what is around it
        place = Path(os.path.realpath(secret))
        if place.is_relative_to(real) or real.is_relative_to(place):
            yield f"{path} would show {what} ({secret}) to students' code; keep the two apart"


def _root(image: Path | None) -> Root:
    return HOST if image is None else open_image(image)


def _policy(image: Path | None, executables: Sequence[Path]) -> Policy:
    return environment_policy(executables) if image is None else image_policy(image, executables)


@contextlib.contextmanager
def _as_fault() -> Iterator[None]:
    try:
        yield
    except SandboxError as error:
        raise ValueError(f"{error.cause}" + (f"; {error.remedy}" if error.remedy else "")) from error
