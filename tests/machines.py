"""A machine in small, for configurations of the grading service: what they name, and the file itself."""

import os
from pathlib import Path

SERVICE = 'data_directory = "HOST/data"\n'
COURSE = '[courses.a]\nenvironment = "HOST/env"\ngraders.users = ["teacher"]\n'
IMAGE_COURSE = COURSE.replace("HOST/env", "/opt/course") + 'image_root = "HOST/images/v1"\n'


def make_machine(directory: Path) -> Path:
    """An environment, an image, course data, a data directory, a token, a key and a certificate below a directory."""
    for prefix in ("env", "images/v1/opt/course"):
        (directory / prefix / "bin").mkdir(parents=True)
        (directory / prefix / "lib/python3.11").mkdir(parents=True)
        (directory / prefix / "bin/python3").touch()
        (directory / prefix / "bin/other").touch()
    for name in ("data", "coursedata", "etc", "images/v1/srv/data", "images/v1/etc"):
        (directory / name).mkdir(parents=True)
    for path in (directory, *directory.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (directory / "data").chmod(0o700)
    for name in ("token", "key"):
        (directory / "etc" / name).write_text("secret")
        (directory / "etc" / name).chmod(0o600)
    (directory / "etc/certificate").touch()
    return directory


def write_configuration(machine: Path, text: str, mode: int = 0o600) -> Path:
    """The file; `HOST` in it stands for the machine's directory."""
    path = machine / "etc" / "service.toml"
    path.write_text(text.replace("HOST", os.fspath(machine)), encoding="utf-8")
    path.chmod(mode)
    return path
