"""Kernels of an environment, read as data, from the host and from an image that does not mean well."""

import json
import os
from pathlib import Path

import pytest

from isolate import kernelspecs
from isolate.kernelspecs import KernelSpec, find, interpreter, names
from isolate.policy import SandboxError
from isolate.roots import HOST, Root

PREFIX = Path("/opt/course")
ARGV = ["python", "-m", "ipykernel_launcher", "-f", "{connection_file}"]


@pytest.fixture
def image(tmp_path: Path) -> Root:
    """An image with an environment that has an interpreter and no kernelspec."""
    binaries = tmp_path / "image" / "opt/course/bin"
    binaries.mkdir(parents=True)
    (binaries / "python3").touch()
    return Root.at(tmp_path / "image")


def write(image: Root, name: str, spec: object, prefix: Path = PREFIX) -> Path:
    """A kernel.json; its path on the host."""
    directory = image.path.joinpath(*prefix.parts[1:], "share/jupyter/kernels", name)
    directory.mkdir(parents=True)
    path = directory / "kernel.json"
    path.write_text(spec if isinstance(spec, str) else json.dumps(spec))
    return path


def test_what_a_kernelspec_says(image: Root) -> None:
    spec = {
        "argv": ["python", "-x", "{resource_dir}/boot", "{prefix}/y"],
        "env": {"A": "b"},
        "interrupt_mode": "message",
    }
    write(image, "odd", {**spec, "display_name": "Odd", "metadata": {"kernel_provisioner": {}}})
    directory = PREFIX / "share/jupyter/kernels/odd"
    assert find("odd", PREFIX, image) == KernelSpec(
        PREFIX / "bin/python3", ("-x", f"{directory}/boot", "/opt/course/y"), {"A": "b"}, "message", directory
    )


def test_every_environment_has_its_own_python(image: Root) -> None:
    assert find("python3", PREFIX, image) == KernelSpec(PREFIX / "bin/python3", tuple(ARGV[1:]))


def test_python_is_never_another_environments(image: Root) -> None:
    (image.path / "usr/bin").mkdir(parents=True)
    (image.path / "usr/bin/python3").touch()
    write(image, "python3", {"argv": ["/usr/bin/python3", *ARGV[1:]]}, Path("/usr"))
    found = find("python3", PREFIX, image)
    assert found is not None
    assert found.program == PREFIX / "bin/python3"
    (image.path / "opt/course/bin/python3").unlink()
    with pytest.raises(SandboxError, match="python"):
        find("python3", PREFIX, image)


def test_kernels_of_an_images_system(image: Root) -> None:
    for prefix, program in (("/usr", "R"), ("/usr/local", "julia")):
        path = image.path / prefix[1:] / "bin"
        path.mkdir(parents=True)
        (path / program).touch()
        write(image, program.lower(), {"argv": [program]}, Path(prefix))
    assert names(PREFIX, image) == ["julia", "python3", "r"]
    found = find("r", PREFIX, image)
    assert found is not None
    assert found.program == Path("/usr/bin/R")


def test_of_a_host_only_the_prefix_counts(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    write(Root(Path("/")), "mine", {"argv": ["python"]}, tmp_path)
    assert names(tmp_path) == ["mine", "python3"]
    assert interpreter(tmp_path, HOST) == tmp_path / "bin" / "python"


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/etc", "x\0", "-x", "nothing", "a" * 101])
def test_no_such_kernel(image: Root, name: str) -> None:
    write(image, "x", {"argv": ARGV})
    assert find(name, PREFIX, image) is None


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "{",
        "[" * 200_000,
        "\ud800".encode("utf-16", "surrogatepass").decode("latin-1"),
        [],
        {},
        {"argv": []},
        {"argv": "python"},
        {"argv": ["python", 1]},
        {"argv": ["python", "a\0b"]},
        {"argv": ARGV, "env": ["A=b"]},
        {"argv": ARGV, "env": {"A": 1}},
        {"argv": ARGV, "env": {"A=": "b"}},
        {"argv": ARGV, "env": {"": "b"}},
        {"argv": ARGV, "env": {"A": "\0"}},
        {"argv": ARGV, "interrupt_mode": "polite"},
        " " * ((1 << 20) + 1),
    ],
)
def test_a_broken_kernelspec_is_an_error_that_names_it(image: Root, spec: object) -> None:
    write(image, "broken", spec)
    with pytest.raises(SandboxError, match=r"kernels/broken/kernel\.json cannot be used") as caught:
        find("broken", PREFIX, image)
    assert caught.value.layer == "kernel"


@pytest.mark.parametrize(
    "program", ["nothing", "/bin/nothing", "../../bin/x", "/opt/course/bin/../bin/python3", "bin", ""]
)
def test_a_kernel_without_its_program(image: Root, program: str) -> None:
    write(image, "lost", {"argv": [program]})
    with pytest.raises(SandboxError, match="the program") as caught:
        find("lost", PREFIX, image)
    assert caught.value.layer == "environment"


@pytest.mark.parametrize("at", ["kernel.json", "directory", "kernels"])
@pytest.mark.parametrize("way", ["absolute", "up"])
def test_no_kernelspec_is_read_from_outside(image: Root, tmp_path: Path, at: str, way: str) -> None:
    outside = write(Root(Path("/")), "evil", {"argv": ARGV, "env": {"STOLEN": "from the host"}}, tmp_path / "host")
    kernels = image.path / "opt/course/share/jupyter/kernels"
    target = {"kernel.json": outside, "directory": outside.parent, "kernels": outside.parent.parent}[at]
    link = {"kernel.json": kernels / "evil/kernel.json", "directory": kernels / "evil", "kernels": kernels}[at]
    link.parent.mkdir(parents=True)
    link.symlink_to(target if way == "absolute" else Path("../" * 20, *target.parts[1:]))
    assert link.resolve(strict=True) == target  # it would lead there, were it followed as the host follows it
    assert find("evil", PREFIX, image) is None
    assert names(PREFIX, image) == ["python3"]


def test_a_kernelspec_behind_a_link_inside(image: Root) -> None:
    write(image, "real", {"argv": ARGV}, Path("/srv/kernels"))
    kernels = image.path / "opt/course/share/jupyter/kernels"
    kernels.mkdir(parents=True)
    (kernels / "linked").symlink_to("/srv/kernels/share/jupyter/kernels/real")
    assert find("linked", PREFIX, image) is not None


def test_a_fifo_as_kernelspec_does_not_wait(image: Root) -> None:
    path = write(image, "fifo", "")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(SandboxError, match="not a regular file"):
        find("fifo", PREFIX, image)


def test_an_argv_of_the_administrators(image: Root) -> None:
    assert kernelspecs.command(["python3.99", "-m", "k"], PREFIX, image) == KernelSpec(
        PREFIX / "bin/python3", ("-m", "k")
    )
