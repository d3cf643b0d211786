"""An unpacked image as an environment: notebooks run in it, and neither they nor its maker see anything of the host."""

import dataclasses
import importlib.metadata
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import images
from attacks.harness import Person, Stage
from images import CHANGED, CHANGED_VERSION, PACKAGE, PACKAGE_VERSION, PREFIX, SECRET
from isolate import environment
from isolate.image import image_home_files, image_policy, inside, open_image
from isolate.policy import HOME, Limits, Policy, SandboxError
from isolate.sandbox import Command, Sandbox

HOST_SECRET = "canary-of-the-host"
PYTHON = PREFIX / "bin/python"

_RUN = """
import json, sys
from pathlib import Path
import nbformat
from isolate import kernelspecs
from isolate.image import image_home_files, image_policy, open_image
from isolate.notebook import Kernel, execute
from isolate.policy import Limits, SandboxError

job = json.load(sys.stdin)
root, prefix = Path(job["image"]), Path(job["prefix"])
notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in job["cells"]])
try:
    spec = kernelspecs.find(job["kernel"], prefix, open_image(root))
    if spec is None:
        raise SandboxError("kernel", "there is none of this name")
    policy = image_policy(root, [spec.program], limits=Limits(wall_seconds=90, memory_bytes=1 << 30))
    files = image_home_files(root, spec.program)
    kernel = Kernel([str(spec.program), *spec.arguments], spec.environment, spec.interrupt_mode, files)
    execution = execute(notebook, kernel, policy)
    end = {"outputs": [cell.outputs for cell in execution.notebook.cells], "report": execution.report.as_dict()}
except SandboxError as error:
    end = {"error": str(error)}
print(json.dumps(end))
"""

Run = Callable[..., list[str]]


@pytest.fixture(scope="session")
def image(stage: Stage) -> Path:
    return images.course_image(stage)


@pytest.fixture
def place(stage: Stage, person: Person, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory of this person's, which everybody may enter."""
    directory = stage.directory / "images" / f"{os.getpid()}-{abs(hash(request.node.nodeid)):x}"
    directory.mkdir(parents=True)
    os.chown(directory, person.uid, person.gid)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def run(stage: Stage, person: Person, place: Path) -> Run:
    """Execute cells in an image as this person; the text that each printed."""

    def run(image: Path, *cells: str, kernel: str = "python3", prefix: Path = PREFIX) -> list[str]:
        job = {"image": str(image), "prefix": str(prefix), "kernel": kernel, "cells": cells}
        done = subprocess.run(
            [stage.environment(), "-B", "-P", "-c", _RUN],
            input=json.dumps(job),
            env={"PATH": os.defpath, "HOME": str(place), "TMPDIR": str(place), "TOKEN": HOST_SECRET},
            cwd=place,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
            **person.credentials(),
        )
        assert done.returncode == 0, done.stderr[-3000:]
        end = json.loads(done.stdout)
        if "error" in end:
            raise SandboxError("there", end["error"])
        assert end["report"]["ended"] == "finished", end["report"]
        return [_printed(outputs) for outputs in end["outputs"]]

    return run


def _printed(outputs: list[dict[str, Any]]) -> str:
    assert all(output["output_type"] == "stream" and output["name"] == "stdout" for output in outputs), outputs
    return "".join(output["text"] for output in outputs).strip()


@pytest.mark.slow
def test_a_notebook_runs_in_the_image_and_not_on_the_host(run: Run, image: Path) -> None:
    versions, python, libraries, shell = run(
        image,
        f"import {PACKAGE}, importlib.metadata as m; print({PACKAGE}.__version__, m.version({CHANGED!r}))",
        "import os, sys; print(sys.prefix, sys.executable, os.getcwd())",
        "import ssl, sqlite3, ctypes, lzma, zmq; print('loaded')",
        "!ls /usr/bin",
    )
    assert versions == f"{PACKAGE_VERSION} {CHANGED_VERSION}"
    assert importlib.metadata.version(CHANGED) != CHANGED_VERSION
    assert python == f"{PREFIX} {PYTHON} {HOME}/work"
    assert libraries == "loaded"
    assert shell.split() == sorted(os.listdir(image / "usr/bin"))


_SEARCH = f"""
import os, sys
found, seen = [], 0
def look(path):
    with open(path, "rb") as file:
        data = file.read()
    if {SECRET.encode()!r} in data or {HOST_SECRET.encode()!r} in data:
        found.append(path)
for top, directories, files in os.walk("/", followlinks=False):
    if top.startswith(("/proc", "/dev")):
        directories.clear()
        continue
    for name in [*directories, *files]:
        path = os.path.join(top, name)
        if os.path.isfile(path):
            seen += 1
            look(path)
        elif os.path.islink(path) and os.path.isdir(path):
            for inner in os.listdir(path):
                if os.path.isfile(os.path.join(path, inner)):
                    look(os.path.join(path, inner))
print(seen > 1000, [path for path in found if not path.startswith({HOME!r})])
"""
"""Reads every file that can be seen; the cell itself may lie in HOME, in a history."""


@pytest.mark.slow
def test_secrets_of_the_image_and_the_host_are_absent(run: Run, image: Path, stage: Stage) -> None:
    assert any(SECRET in path.read_text() for path in (image / "opt/course").rglob("*.conf"))
    searched, control, variables, tops, mounts = run(
        image,
        _SEARCH,
        f"with open('/tmp/control', 'w') as file: _ = file.write({SECRET!r})\n{_SEARCH}",
        "import os; print(sorted(value for value in os.environ.values() if 'canary' in value))",
        f"print([p for p in {[str(stage.directory), __file__, '/usr/bin/env', '/root']} if os.path.exists(p)])",
        "print(open('/proc/self/mountinfo').read() if os.path.exists('/proc/self/mountinfo') else '')",
    )
    assert searched == "True []"
    assert "'/tmp/control'" in control
    assert variables == "[]"
    assert tops == "[]"
    shown = {fields[4]: fields[3] for fields in map(str.split, mounts.splitlines())}  # proc_pid_mountinfo(5)
    for target, source in {"/usr": "usr", "/bin": "usr/bin", "/lib": "usr/lib", str(PREFIX): "opt/course"}.items():
        assert not shown or shown[target].endswith(f"/image/{source}")


def copy_of(image: Path, place: Path) -> Path:
    """The same image to be spoiled; regular files are shared."""
    copy = place / "image"
    shutil.copytree(image, copy, symlinks=True, copy_function=os.link)
    return copy


def link(path: Path, target: Path | str) -> None:
    """Put a link here, whatever was there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["absolute", "up"])
def test_a_hostile_image_shows_nothing_of_the_host(run: Run, image: Path, place: Path, way: str) -> None:
    secrets = place / "host"
    kernel = images.write_spec(secrets, "evil", argv=[str(PYTHON), "-m", "ipykernel_launcher"], env={"A": HOST_SECRET})
    for name in ("secret", "fonts.conf", "pyvenv.cfg", "__init__.py"):
        (secrets / name).write_text(f"home = /usr/bin\n# {HOST_SECRET}\n")
    copy = copy_of(image, place)

    def out(path: Path) -> Path:
        return path if way == "absolute" else Path("../" * 30, *path.parts[1:])

    places = {
        "etc/fonts": secrets,
        "etc/alternatives": secrets,
        "etc/mime.types": secrets / "secret",
        "etc/ld.so.conf": Path("/etc/passwd"),
        "lib32": secrets,
        "libx32": secrets,
        "usr/share/host": secrets,
        "usr/src": secrets,
        "opt/course/data": secrets,
        "opt/course/etc/jupyter": secrets,
        "opt/course/pyvenv.cfg": secrets / "pyvenv.cfg",
        "opt/course/lib/python3": secrets,
        "opt/course/share/jupyter/kernels/evil": kernel.parent,
    }
    for name, target in places.items():
        link(copy / name, out(target))
        assert os.path.realpath(copy / name) == str(target)  # as the host would follow it
    os.mkfifo(copy / "etc/localtime")
    if os.geteuid() == 0:
        os.mknod(copy / "etc/timezone", 0o666 | 0o060000, os.makedev(254, 0))
    searched, links = run(copy, _SEARCH, f"print(sorted(n for n in {sorted(places)!r} if os.path.exists('/' + n)))")
    assert searched == "True []"
    assert links == "[]"
    with pytest.raises(SandboxError, match="there is none of this name"):
        run(copy, "print(1)", kernel="evil")


@pytest.mark.slow
def test_a_kernelspec_of_the_image(run: Run, image: Path) -> None:
    assert run(image, "import os; print(os.environ['GREETING'])", kernel="greeting") == [
        "from a kernelspec of the image"
    ]


def policy_of(image: Path) -> Policy:
    return image_policy(image, [PYTHON], limits=Limits(wall_seconds=60))


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("usr", "/etc"),
        ("usr", "/"),
        ("bin", "/home"),
        ("lib", ".."),
        ("lib64", "/root"),
        ("usr", "/opt/../etc"),
        ("opt/course", "/home"),
        ("opt/course", "/"),
        ("etc/fonts", "/etc"),
        ("nix/store", "/proc"),
    ],
)
def test_a_link_that_would_show_more_than_is_meant_is_refused(
    image: Path, tmp_path: Path, name: str, target: str
) -> None:
    copy = tmp_path / "image"
    for directory in ("opt/course/bin", "opt/course/lib/python3.11", "home/bin", "home/lib/python3.11", "bin", "lib"):
        (copy / directory).mkdir(parents=True)
    for directory in ("etc", "root", "proc", "lib/python3.11"):
        (copy / directory).mkdir()
    for binaries in ("opt/course/bin", "home/bin", "bin"):
        (copy / binaries / "python").touch()
    policy_of(copy)
    link(copy / name, target)
    with pytest.raises(SandboxError) as caught:
        policy_of(copy)
    assert caught.value.layer == "environment"


def test_a_link_to_nothing_or_to_the_host_is_not_shown(image: Path, tmp_path: Path) -> None:
    copy = copy_of(image, tmp_path)
    link(copy / "usr", "/etc/nothing")
    assert not {bind.target for bind in policy_of(copy).read_only} & {Path("/usr"), Path("/bin")}


def test_what_is_bound_is_in_the_image_and_no_link(image: Path) -> None:
    policy = policy_of(image)
    for bind in policy.read_only:
        assert bind.source.is_relative_to(image)
        assert os.path.realpath(bind.source) == str(bind.source)
    shown = {bind.target: bind.source for bind in policy.read_only}
    assert shown[Path("/bin")] == image / "usr/bin"
    assert shown[PREFIX] == image / "opt/course"
    assert {image / "opt/course/etc/jupyter", image / "opt/course/pip.conf", image / "usr/local/etc"} <= set(
        policy.hidden
    )
    assert policy.environment["PATH"].split(":")[0] == str(PREFIX / "bin")


def test_an_environment_behind_links(image: Path, tmp_path: Path) -> None:
    copy = copy_of(image, tmp_path)
    (copy / "srv").mkdir()
    (copy / "opt/course").rename(copy / "srv/course-7")
    link(copy / "opt/course", "/srv/course-7")
    link(copy / "srv/course-7/bin/python", "/opt/course/bin/python3")
    shown = {bind.target: bind.source for bind in policy_of(copy).read_only}
    assert shown[PREFIX] == shown[Path("/srv/course-7")] == copy / "srv/course-7"
    assert copy / "srv/course-7/pip.conf" in policy_of(copy).hidden
    code = "import sys; sys.exit(any(open(f'{p}/pip.conf').read() for p in ('/opt/course', '/srv/course-7')))"
    with Sandbox(policy_of(copy), Command([str(PYTHON), "-c", code])) as sandbox:
        assert sandbox.wait().exit_code == 0


def test_a_virtual_environment_in_an_image_brings_its_base(image: Path, tmp_path: Path) -> None:
    copy = copy_of(image, tmp_path)
    venv = copy / "srv/env"
    (venv / "bin").mkdir(parents=True)
    (venv / "pyvenv.cfg").write_text("home = /opt/course/bin\n")
    link(venv / "bin/python", "/opt/course/bin/python")
    policy = image_policy(copy, [Path("/srv/env/bin/python")], limits=Limits(wall_seconds=60))
    code = "import sys; sys.exit((sys.prefix, sys.base_prefix) != ('/srv/env', '/opt/course'))"
    with Sandbox(policy, Command(["/srv/env/bin/python", "-c", code])) as sandbox:
        assert sandbox.wait().exit_code == 0


@pytest.mark.parametrize("home", ["/srv/people/teacher", "/srv/people/teacher/deep"])
def test_a_home_directory_of_the_image_is_not_shown_as_a_prefix(tmp_path: Path, home: str) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text(f"teacher:x:1000:100::{home}:/bin/bash\nodd line\n")
    (tmp_path / "srv/people/teacher/bin").mkdir(parents=True)
    (tmp_path / "srv/people/teacher/lib/python3.11").mkdir(parents=True)
    (tmp_path / "srv/people/teacher/bin/python").touch()
    with pytest.raises(SandboxError, match="home directory"):
        image_policy(tmp_path, [Path("/srv/people/teacher/bin/python")])


@pytest.mark.parametrize("path", ["/missing", "/", "/etc/passwd", "/etc/.."])
def test_an_image_that_is_none(path: str) -> None:
    with pytest.raises(SandboxError) as caught:
        open_image(Path(path))
    assert caught.value.layer == "environment"


@pytest.mark.parametrize("path", ["/srv/data", "/data", "/proc/self", "/dev", "/home", "/"])
def test_more_of_an_image_can_be_shown_but_not_everything(tmp_path: Path, path: str) -> None:
    for name in ("srv/data", "proc/self", "dev", "home"):
        (tmp_path / name).mkdir(parents=True)
    if path == "/srv/data":
        shown = image_policy(tmp_path, [], visible=[Path(path)]).read_only
        assert [(bind.source, bind.target) for bind in shown] == [(tmp_path / "srv/data", Path(path))]
    else:
        with pytest.raises(SandboxError, match="in the image"):
            image_policy(tmp_path, [], visible=[Path(path)])


def test_what_a_path_of_the_host_is_in_an_image(tmp_path: Path) -> None:
    root = tmp_path / "images/v7"
    (root / "opt").mkdir(parents=True)
    (root / "opt/data").symlink_to("/etc")
    (tmp_path / "current").symlink_to("images/v7")
    assert inside(root / "opt/data/x", root) == Path("/opt/data/x")
    assert inside(tmp_path / "current/opt/data", root) == Path("/opt/data")
    assert inside(root / "opt", tmp_path / "current") == Path("/opt")
    assert inside(Path("/etc"), root) is None
    assert inside(tmp_path, root) is None


def test_the_landlock_tier_refuses_an_image(image: Path) -> None:
    policy = dataclasses.replace(policy_of(image), tier="landlock")
    with pytest.raises(SandboxError):
        Sandbox(policy, Command(["/bin/sh", "-c", "true"])).__enter__()


_FONTS = """
import os, sys
with open(os.environ["MPLCONFIGDIR"] + "/fontlist-v1.json", "w") as file:
    file.write({text})
"""


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("'{\"prefix\": \"' + sys.prefix + '\"}'", f'{{"prefix": "{PREFIX}"}}'),
        ("'[' * 100_000", None),
        ("'no JSON'", None),
        ("'\\udc80'", None),
    ],
)
def test_the_font_list_is_made_by_the_images_own_python(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, content: str | None
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copy = copy_of(image, tmp_path)
    (packages,) = (copy / "opt/course/lib").glob("python3*/site-packages")
    (packages / "matplotlib").mkdir()
    (packages / "matplotlib/__init__.py").write_text("import os; os.makedirs(os.environ['MPLCONFIGDIR'])")
    (packages / "matplotlib/font_manager.py").write_text(_FONTS.format(text=text))
    expected = {} if content is None else {f"{HOME}/.cache/matplotlib/fontlist-v1.json": content}
    assert image_home_files(copy, PYTHON) == expected
    # and from the cache, as a new process would
    image_home_files.cache_clear()
    monkeypatch.setattr(environment, "run_font_script", None)
    monkeypatch.setattr("isolate.image.run_font_script", lambda *_: "fontlist-v1.json\nasked again")
    assert image_home_files(copy, PYTHON) == expected
    image_home_files.cache_clear()


def test_an_image_without_matplotlib_needs_no_fonts(image: Path) -> None:
    assert image_home_files(image, PYTHON) == {}
