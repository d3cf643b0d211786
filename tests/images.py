"""An image root for tests: the running Python with a kernel's packages, the libraries that it needs, and a shell.

Copied from this machine and laid out as in a container, but unlike the host where a notebook can tell: a package of
the course's own that the host lacks, another version of one that it has, and secrets that no student may see.
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from attacks.harness import Stage

PREFIX = Path("/opt/course")
"""Where the image's environment lies, inside."""
PACKAGE, PACKAGE_VERSION = "course_of_the_image", "2.5"
CHANGED, CHANGED_VERSION = "traitlets", "5.99.0"
"""A package that the host has, too, in another version."""
SECRET = "canary-of-the-image"
_PROGRAMS = ("sh", "cat", "ls", "grep", "find", "readlink")
_LEFT_OUT = "test tests __pycache__ idlelib tkinter ensurepip lib2to3 turtledemo site-packages dist-packages".split()


def course_image(stage: Stage) -> Path:
    """The image of this test session, made when it is first asked for."""
    root = stage.directory / "image"
    with stage._locked():
        if not (stage.directory / "image-ready").exists():
            shutil.rmtree(root, ignore_errors=True)
            _build(root)
            (stage.directory / "image-ready").touch()
    return root


def _build(root: Path) -> None:
    old = os.umask(0o022)
    try:
        for name in ("bin", "lib", "lib64", "sbin"):
            (root / "usr" / name).mkdir(parents=True)
            (root / name).symlink_to(f"usr/{name}")
        for name in ("etc", "home/teacher", "root", "var", "proc", "tmp"):
            (root / name).mkdir(parents=True)
        prefix = root / PREFIX.relative_to("/")
        _copy_python(prefix)
        packages = _packages_of(prefix)
        for distribution in _needed("ipykernel"):
            _copy_distribution(distribution, packages)
        _make_unlike_the_host(packages)
        for name in _PROGRAMS:
            if found := shutil.which(name, path="/usr/bin:/bin"):
                shutil.copy(found, root / "usr/bin" / name)
        _copy_libraries([*_elf_files(prefix), *(root / "usr/bin").iterdir()], root)
        _write_specs_and_secrets(root, prefix)
    finally:
        os.umask(old)


def _packages_of(prefix: Path) -> Path:
    return prefix / f"lib/python3.{sys.version_info[1]}/site-packages"


def _copy_python(prefix: Path) -> None:
    name = f"python3.{sys.version_info[1]}"
    ignore = shutil.ignore_patterns(*_LEFT_OUT, "config-3*")
    shutil.copytree(sysconfig.get_path("stdlib"), prefix / "lib" / name, ignore=ignore)
    (prefix / "bin").mkdir()
    shutil.copy(os.path.realpath(sys.executable), prefix / "bin" / name)
    for link in ("python3", "python"):
        (prefix / "bin" / link).symlink_to(name)
    _packages_of(prefix).mkdir()
    (prefix / "lib" / name / "dist-packages").symlink_to("site-packages")  # as Debian's Python calls it


def _needed(
    name: str, found: dict[str, importlib.metadata.Distribution] | None = None
) -> list[importlib.metadata.Distribution]:
    """This distribution and those that it requires here."""
    found = {} if found is None else found
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key not in found:
        try:
            found[key] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            return list(found.values())  # for another system or an extra
        for requirement in found[key].requires or ():
            if "extra ==" not in requirement:
                _needed(re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0], found)
    return list(found.values())


def _copy_distribution(distribution: importlib.metadata.Distribution, packages: Path) -> None:
    for file in distribution.files or ():
        source = Path(str(distribution.locate_file(file)))
        if ".." not in file.parts and "__pycache__" not in file.parts and source.is_file():
            (packages / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, packages / file)


def _make_unlike_the_host(packages: Path) -> None:
    (packages / PACKAGE).mkdir()
    (packages / PACKAGE / "__init__.py").write_text(f"__version__ = {PACKAGE_VERSION!r}\n")
    (metadata,) = packages.glob(f"{CHANGED}-*.dist-info/METADATA")
    text = re.sub(r"(?m)^Version: .*$", f"Version: {CHANGED_VERSION}", metadata.read_text(encoding="utf-8"), count=1)
    metadata.write_text(text, encoding="utf-8")


def _elf_files(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.rglob("*")):
        if path.is_file() and not path.is_symlink() and (path.parent.name == "bin" or ".so" in path.name):
            yield path


def _copy_libraries(files: Iterable[Path], root: Path) -> None:
    """What ldd(1) says they need: at the same place, or where every loader looks if that is not the system's."""
    said = subprocess.run(["ldd", *files], capture_output=True, text=True, check=False).stdout
    for path in sorted({Path(match) for match in re.findall(r"(/\S+) \(0x", said)}):
        if path.is_relative_to(root):
            continue
        system = path.parts[1].startswith("lib") or path.is_relative_to("/usr/lib")
        target = root / (path.relative_to("/") if system else Path("usr/lib", path.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)


def _write_specs_and_secrets(root: Path, prefix: Path) -> None:
    argv = [str(PREFIX / "bin/python"), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    write_spec(prefix, "python3", argv=argv)
    write_spec(prefix, "greeting", argv=argv, env={"GREETING": "from a kernelspec of the image"})
    for name in ("etc/shadow", "home/teacher/.netrc", "root/.profile", "usr/local/etc/token"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(SECRET)
    for name in ("etc/jupyter/nbgrader_config.py", "pip.conf"):
        (prefix / name).parent.mkdir(parents=True, exist_ok=True)
        (prefix / name).write_text(SECRET)


def write_spec(prefix: Path, name: str, **spec: object) -> Path:
    """A kernelspec in this prefix, as a path of the host."""
    directory = prefix / "share/jupyter/kernels" / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "kernel.json").write_text(json.dumps(spec))
    return directory / "kernel.json"


def service_packages(stage: Stage) -> Path:
    """A directory for PYTHONPATH with which `stage.environment()` can import `grader_service.policies`."""
    target = stage.directory / "service"
    python = stage.environment()
    with stage._locked():
        if not (stage.directory / "service-ready").exists():
            pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", target]
            done = subprocess.run(
                [*pip, "pydantic-settings", "sqlalchemy"], umask=0o022, capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                pytest.skip(f"no packages of the service for other users: {done.stderr[-500:]}")
            source = Path(__file__).parent.parent / "grader_service"
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, target / "grader_service", ignore=ignore, dirs_exist_ok=True)
            subprocess.run(["chmod", "-R", "a+rX", target], check=True)
            (stage.directory / "service-ready").touch()
    return target
