"""From a course and what a client asks for, to what runs: a kernel and a policy of `isolate`.

A client names a kernel and asks for limits. It never names a path of this machine, and what is more than the course's
maximum is refused, not cut. All paths and the wall that stands are the administrator's (`grader_service.settings`).
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

from grader_service.settings import CourseSettings
from isolate import kernelspecs
from isolate.environment import environment_policy, home_files
from isolate.image import image_home_files, image_policy, inside, open_image
from isolate.kernelspecs import KernelSpec
from isolate.policy import Limits, Policy
from isolate.rooms import Kernel, driver_limits
from isolate.roots import HOST, Root


class Refused(Exception):
    """What was asked for is not to be had in this course. The text is for whoever asked."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a client may choose."""

    kernel: str = kernelspecs.PYTHON
    limits: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """By the names of `isolate.policy.Limits`."""


def limits_of(course: CourseSettings, asked: Asked) -> Limits:
    """The course's limits with those that were asked for in their place. Raises `Refused`."""
    most = dataclasses.asdict(course.maximum_limits)
    wanted: dict[str, float] = {}
    for name, value in asked.limits.items():
        if name not in most:
            raise Refused(f"there is no limit {name[:50]!r}; there are: {', '.join(most)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise Refused(f"the limit {name} must be a positive number")
        if value > most[name]:
            raise Refused(f"the limit {name}={value:.15g} is more than the course's maximum of {most[name]:.15g}")
        wanted[name] = float(value) if name.endswith("_seconds") else int(value)
        if wanted[name] != value:
            raise Refused(f"the limit {name} must be a whole number")
    return dataclasses.replace(course.default_limits, **wanted)  # type: ignore[arg-type]


def memory_of(limits: Limits) -> int:
    """Bytes that a job is counted with: of its kernel and its driver together."""
    return limits.memory_bytes + driver_limits(limits).memory_bytes


def as_counted(limits: Limits, memory_bytes: int) -> Limits:
    """No more memory than the job was counted with: the course's defaults may have been raised since.

    Raises `Refused` where none is left.
    """
    most = limits.memory_bytes - max(0, memory_of(limits) - memory_bytes)
    if most <= 0:
        raise Refused("the course's limits were changed since it was submitted; submit it again")
    return dataclasses.replace(limits, memory_bytes=most)


def plan(course_name: str, course: CourseSettings, asked: Asked) -> tuple[Kernel, Policy]:
    """How to start the kernel, and what its room shows. Raises `Refused` for what the course does not have, and
    `SandboxError` when its environment is not as it was when the configuration was read."""
    limits = limits_of(course, asked)
    root = HOST if course.image_root is None else open_image(course.image_root)
    spec = _kernelspec(course_name, course, asked.kernel, root)
    if course.image_root is None:
        policy, files = _on_host(course, spec, limits), home_files(spec.program, course.tier)
    else:
        policy = _in_image(course, course.image_root, spec, limits, root)
        files = image_home_files(course.image_root, spec.program)
    policy = dataclasses.replace(policy, tier=course.tier)
    argv = [str(spec.program), *spec.arguments]
    return Kernel(argv, spec.environment, spec.interrupt_mode, files), policy


def _kernelspec(course_name: str, course: CourseSettings, name: str, root: Root) -> KernelSpec:
    name = kernelspecs.PYTHON if name == "python" else name  # as in jupyter_client
    if name in course.kernels:
        return kernelspecs.command(course.kernels[name], course.environment, root)
    spec = kernelspecs.find(name, course.environment, root)
    if spec is None:
        names = sorted({*course.kernels, *kernelspecs.names(course.environment, root)})
        raise Refused(f"there is no kernel {name[:100]!r} in course {course_name}; there are: {', '.join(names)}")
    return spec


def _executables(course: CourseSettings, spec: KernelSpec, root: Root) -> list[Path]:
    """The kernel's program, and the environment's interpreter, which another language's kernel may still call."""
    python = kernelspecs.interpreter(course.environment, root)
    return [spec.program, *([python] if python else [])]


def _on_host(course: CourseSettings, spec: KernelSpec, limits: Limits) -> Policy:
    executables = _executables(course, spec, HOST)
    policy = environment_policy(executables, environment=course.environment_variables, limits=limits)
    more = [*course.read_only, *([spec.resource_dir] if spec.resource_dir else [])]
    return policy.with_visible(more)


def _in_image(course: CourseSettings, image: Path, spec: KernelSpec, limits: Limits, root: Root) -> Policy:
    """Paths of `read_only` below the image appear where they lie in it, all others where they lie on the host."""
    places = {path: inside(path, image) for path in course.read_only}
    policy = image_policy(
        image,
        _executables(course, spec, root),
        visible=[place for place in (*places.values(), spec.resource_dir) if place is not None],
        environment=course.environment_variables,
        limits=limits,
    )
    return policy.with_visible(path for path, place in places.items() if place is None)
