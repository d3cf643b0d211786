"""Packing a directory that somebody else may write to."""

import os
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isolate import files
from isolate.files import pack
from isolate.policy import SandboxError

BOUNDS: dict[str, Any] = {"leave_out": (), "max_bytes": 1_000_000, "max_files": 1000}


def names_in(archive: IO[bytes]) -> dict[str, bytes | None]:
    with archive, tarfile.open(fileobj=archive) as tar:
        return {
            member.name: (tar.extractfile(member).read() if member.isreg() else None)  # type: ignore[union-attr]
            for member in tar
        }


def test_files_and_directories(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "deep" / "a.csv").write_bytes(b"1,2\r\n")
    (tmp_path / "nothing").touch()
    expected = {"empty": None, "data": None, "data/deep": None, "data/deep/a.csv": b"1,2\r\n", "nothing": b""}
    assert names_in(pack(tmp_path, **BOUNDS)) == expected


def test_left_out_by_pattern_at_every_depth(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").touch()
    (tmp_path / "sub").mkdir()
    for name in ("ps1.ipynb", "sub/other.ipynb", "sub/data.csv"):
        (tmp_path / name).touch()
    archive = pack(tmp_path, leave_out=("*.ipynb", ".git"), max_bytes=10, max_files=10)
    assert set(names_in(archive)) == {"sub", "sub/data.csv"}


def test_what_is_left_out_may_be_anything(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/etc/passwd")
    assert names_in(pack(tmp_path, leave_out=("pipe", "link"), max_bytes=10, max_files=10)) == {}


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path.name)
    finally:
        os.chdir(here)


def make_device(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root makes device nodes")
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("this host makes no device nodes")


ODD: dict[str, Callable[[Path], None]] = {
    "fifo": make_fifo,
    "socket": make_socket,
    "device": make_device,
    "link to a file": lambda path: path.symlink_to("/etc/passwd"),
    "link to a directory": lambda path: path.symlink_to("/etc"),
    "link to nothing": lambda path: path.symlink_to("/no/such/file"),
    "link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("where", ["entry", "sub/entry"])
def test_anything_else_is_refused_by_name(tmp_path: Path, kind: str, where: str) -> None:
    (tmp_path / "sub").mkdir()
    ODD[kind](tmp_path / where)
    with pytest.raises(SandboxError, match=where) as caught:
        pack(tmp_path, **BOUNDS)
    assert caught.value.layer == "files"


def test_the_directory_itself_may_not_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(OSError):
        pack(tmp_path / "link", **BOUNDS)


@pytest.mark.parametrize(
    ("sizes", "max_bytes", "max_files", "fits"),
    [([5, 5], 10, 2, True), ([5, 6], 10, 2, False), ([1, 1, 1], 10, 2, False), ([11], 10, 5, False), ([], 1, 1, True)],
)
def test_bounds(tmp_path: Path, sizes: list[int], max_bytes: int, max_files: int, fits: bool) -> None:
    for number, size in enumerate(sizes):
        (tmp_path / str(number)).write_bytes(b"x" * size)
    if fits:
        assert len(names_in(pack(tmp_path, leave_out=(), max_bytes=max_bytes, max_files=max_files))) == len(sizes)
    else:
        with pytest.raises(SandboxError, match=f"{max_bytes} bytes or {max_files} files"):
            pack(tmp_path, leave_out=(), max_bytes=max_bytes, max_files=max_files)


def test_directories_count_as_files(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / str(number)).mkdir()
    with pytest.raises(SandboxError):
        pack(tmp_path, leave_out=(), max_bytes=10, max_files=4)


def test_a_sparse_terabyte_is_refused_without_reading_it(tmp_path: Path) -> None:
    with open(tmp_path / "sparse", "wb") as file:
        try:
            file.truncate(1 << 40)
        except OSError:
            pytest.skip("this file system holds no file of a terabyte")
    with pytest.raises(SandboxError):
        pack(tmp_path, **BOUNDS)


def test_a_refusal_leaves_no_descriptor(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "link").symlink_to("x")
    (tmp_path / "a" / "big").write_bytes(b"x" * 100)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(SandboxError):
            pack(tmp_path, **BOUNDS)
        with pytest.raises(SandboxError):
            pack(tmp_path, leave_out=("link",), max_bytes=10, max_files=100)
    assert len(os.listdir("/proc/self/fd")) == before


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=40)


@given(st.lists(NAMES, min_size=1, max_size=5, unique=True))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_name_comes_back(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    names = [name for name in names if name not in {".", ".."} and len(name.encode()) < 250]
    directory = tmp_path_factory.mktemp("names")
    for name in names:
        (directory / name).write_bytes(name.encode())
    assert names_in(pack(directory, **BOUNDS)) == {name: name.encode() for name in names}


@pytest.mark.parametrize(
    "name",
    [
        b"caf\xe9",
        b"new\nline",
        b"\xff\xfe",
        b"tab\t",
        b" ",
        b"-rf",
        b"x" * 255,
        "\u202ertl".encode(),
        b"a\\b",
        b"*?[x]",
    ],
)
def test_odd_names(tmp_path: Path, name: bytes) -> None:
    path = os.path.join(os.fsencode(tmp_path), name)
    os.mkdir(path)
    with open(os.path.join(path, name), "wb") as file:
        file.write(b"content")
    text = os.fsdecode(name)
    assert names_in(pack(tmp_path, **BOUNDS)) == {text: None, f"{text}/{text}": b"content"}


def test_a_long_way_down(tmp_path: Path) -> None:
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        for _ in range(200):
            os.mkdir("d" * 50)
            os.chdir("d" * 50)
        with open("leaf", "wb") as file:
            file.write(b"deep")
    finally:
        os.chdir(here)
    found = names_in(pack(tmp_path, **BOUNDS))
    assert found["/".join(["d" * 50] * 200 + ["leaf"])] == b"deep"


def test_deeper_than_can_be_held_open_is_refused(tmp_path: Path) -> None:
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        for _ in range(1500):
            os.mkdir("d")
            os.chdir("d")
        with pytest.raises(SandboxError) as caught:
            pack(tmp_path, leave_out=(), max_bytes=10, max_files=10_000)
        assert caught.value.layer == "files"
    finally:
        for _ in range(1500):
            os.chdir("..")
            os.rmdir("d")
        os.chdir(here)


def test_an_unreadable_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "locked").write_text("x")
    (tmp_path / "locked").chmod(0)
    if os.access(tmp_path / "locked", os.R_OK):
        pytest.skip("root reads everything")
    with pytest.raises((SandboxError, PermissionError), match="locked"):
        pack(tmp_path, **BOUNDS)


def resize_when_opened(monkeypatch: pytest.MonkeyPatch, change: Callable[[str], None]) -> None:
    """Change a file after its size was announced and before it is read, as a student may who still writes."""
    opened = files._Exactly

    def late(content: IO[bytes], size: int) -> object:
        change(f"/proc/self/fd/{content.fileno()}")
        return opened(content, size)

    monkeypatch.setattr(files, "_Exactly", late)


def test_a_file_that_shrinks_is_filled_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    (tmp_path / "b").write_bytes(b"after")
    shrunk = []

    def shrink(path: str) -> None:
        if not shrunk:
            os.truncate(path, 3)
            shrunk.append(path)

    resize_when_opened(monkeypatch, shrink)
    assert names_in(pack(tmp_path, **BOUNDS)) == {"a": b"xxx".ljust(100_000, b"\0"), "b": b"after"}


def test_a_file_that_grows_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"x" * 10)
    (tmp_path / "b").write_bytes(b"after")

    def grow(path: str) -> None:
        with open(path, "ab") as file:
            file.write(b"y" * 50_000)

    resize_when_opened(monkeypatch, grow)
    assert names_in(pack(tmp_path, **BOUNDS)) == {"a": b"x" * 10, "b": b"after"}


@pytest.mark.parametrize("replacement", ["link", "fifo", "directory"])
def test_a_file_swapped_between_look_and_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replacement: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "a").write_text("harmless")
    look = os.stat

    def swap(name: Any, *arguments: Any, **keywords: Any) -> os.stat_result:
        status = look(name, *arguments, **keywords)
        if name == "a" and keywords.get("dir_fd") is not None:
            (tree / "a").unlink()
            make = {"link": lambda: (tree / "a").symlink_to(secret), "fifo": lambda: os.mkfifo(tree / "a")}
            make.get(replacement, lambda: (tree / "a").mkdir())()
        return status

    monkeypatch.setattr(os, "stat", swap)
    with pytest.raises((SandboxError, OSError)):
        pack(tree, **BOUNDS)


def test_executables_stay_executable(tmp_path: Path) -> None:
    (tmp_path / "run.sh").touch()
    (tmp_path / "run.sh").chmod(0o755)
    with pack(tmp_path, **BOUNDS) as archive, tarfile.open(fileobj=archive) as tar:
        assert tar.getmember("run.sh").mode & 0o100


def test_the_archive_has_no_name_on_the_host(tmp_path: Path) -> None:
    with pack(tmp_path, **BOUNDS) as archive:
        assert os.fstat(archive.fileno()).st_nlink == 0
        assert archive.tell() == 0
