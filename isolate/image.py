"""An unpacked image as an environment: its own system instead of the host's, read-only, and nothing else of it.

An image root is a directory that holds what a container would have as `/`: a debootstrap tree, an exported container.
Its /usr, /bin, /lib and so on appear at /usr, /bin, /lib; its home directories, /etc, /var and /srv do not, and of
the host nothing does. Links are followed as inside of it (`isolate.roots`) before anything is mounted, so that what
the sandbox binds are places in the image and none of them a link. Nothing of an image ever runs on the host.

The image is its maker's: who may write to it decides what student code finds there. It is not trusted with the host.
The landlock tier has no mounts and cannot show a path at another place; it refuses these policies.
"""

import functools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from isolate.environment import font_files, prefixes_of, run_font_script, secrets_below, variables_for
from isolate.policy import BASE_ENVIRONMENT, SYSTEM_HIDDEN, SYSTEM_PATHS, Bind, Limits, Policy, SandboxError
from isolate.roots import Root

_NEVER_AS_A_WHOLE = tuple(map(Path, "/etc /home /root /var /run /boot /srv /media /mnt".split()))
"""What holds an image's state, its users' files, and whatever was left in it."""
_KERNELS_OWN = tuple(map(Path, "/proc /sys /dev".split()))
"""A sandbox has its own of these."""


def image_policy(
    root: Path,
    executables: Iterable[Path],
    *,
    visible: Iterable[Path] = (),
    environment: Mapping[str, str] | None = None,
    limits: Limits | None = None,
) -> Policy:
    """The image's system and the prefixes of these executables read-only with their secrets masked.

    `root` is a path of the host; the executables, and what else is to be `visible`, are paths inside the image.
    Raises `SandboxError` when there is no such image, or a path leads where more would be shown than is meant.
    """
    image = open_image(root)
    prefixes = list(dict.fromkeys(prefix for one in executables for prefix in prefixes_of(one, image)))
    binds: dict[Path, Bind] = {}
    for path in (*map(Path, SYSTEM_PATHS), *prefixes, *visible):
        if not image.exists(path) and str(path) not in SYSTEM_PATHS:
            raise SandboxError("environment", f"there is no {path} in the image {root}")
        for place in _places(path, image):
            if not any(place.is_relative_to(shown) for shown in binds):
                binds[place] = _bind(place, image)
    hidden = (image.on_host(path) for path in (*map(Path, SYSTEM_HIDDEN), *secrets_below(prefixes, image)))
    return Policy(
        read_only=tuple(binds.values()),
        hidden=tuple(dict.fromkeys(path for path in hidden if path is not None)),
        environment=variables_for(prefixes, BASE_ENVIRONMENT, environment or {}, image),
        limits=limits or Limits(),
    )


def open_image(root: Path) -> Root:
    """The tree at this directory of the host. Raises `SandboxError`."""
    try:
        image = Root.at(root)
    except OSError as error:
        raise SandboxError("environment", f"the image {root} cannot be opened: {error.strerror}") from error
    if image.path == Path("/"):
        raise SandboxError("environment", f"the image {root} is the host itself", "unpack it into a directory")
    return image


def inside(path: Path, root: Path) -> Path | None:
    """What a path of the host is in this image; None for one that leads elsewhere.

    Found by what comes first: links before the image are the host's, all after it are the image's.
    """
    image = os.path.realpath(root)
    for part in (*reversed(path.parents), path):
        place = Path(os.path.realpath(part))
        if place.is_relative_to(image):
            return Path("/", place.relative_to(image), path.relative_to(part))
    return None


def _places(path: Path, image: Root) -> list[Path]:
    """Where this is to appear: where it is looked for, and where its links say that it is."""
    real = image.real(path)
    if real is None or not (image.is_directory(real) or image.is_file(real)):
        return []
    for place in (path, real):
        _refuse_too_much(path, place)
    return list(dict.fromkeys([path, real]))


def _refuse_too_much(path: Path, place: Path) -> None:
    shows_all = any(state.is_relative_to(place) for state in (*_NEVER_AS_A_WHOLE, *_KERNELS_OWN))
    if shows_all or any(place.is_relative_to(own) for own in _KERNELS_OWN):
        leads = "" if place == path else f" leads to {place}, which"
        cause = f"{path} in the image{leads} is not to be shown"
        raise SandboxError("environment", cause, "mend the image, or name a directory of its own")


def _bind(place: Path, image: Root) -> Bind:
    source = image.on_host(place)
    if source is None:
        raise SandboxError("environment", f"{place} in the image is gone")
    return Bind(source, at=place)


@functools.lru_cache(maxsize=32)
def image_home_files(root: Path, python: Path) -> Mapping[str, str]:
    """`isolate.environment.home_files` for the Python of an image: its own fonts, listed by its own matplotlib."""
    image = open_image(root)
    try:
        return font_files(python, image, lambda: run_font_script(python, image_policy(root, [python])))
    except (ValueError, RecursionError):
        return {}  # an image may write what it likes: without a list its first plot is slow, and no more
