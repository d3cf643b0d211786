"""Where paths lead in a tree that is somebody else's root; the kernel itself is asked what is right."""

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isolate.roots import HOST, Root

NAMES = ["a", "b", "c"]
WORDS = st.lists(st.sampled_from([*NAMES, "..", ".", ""]), min_size=1, max_size=6)


def build(root: Path, entries: list[tuple[list[str], str | list[str], bool]]) -> None:
    """Directories, files and links, each where there is room for it."""
    for where, what, absolute in entries:
        path = root.joinpath(*where)
        with contextlib.suppress(OSError):
            if what == "directory":
                path.mkdir(parents=True)
            elif what == "file":
                path.touch()
            elif isinstance(what, list):
                path.symlink_to(("/" if absolute else "") + "/".join(what) or ".")


def by_the_kernel(root: Path, paths: list[str]) -> list[str | None]:
    """Where a process whose root this is ends up. chroot(2)"""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            descriptors = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY)
            os.chroot(root)
            os.chdir("/")
            found = []
            for path in paths:
                try:
                    descriptor = os.open(path, os.O_PATH)
                    found.append(os.readlink(str(descriptor), dir_fd=descriptors))
                except OSError:
                    found.append("")
            os.write(writer, "\n".join(found).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        answer = file.read().decode().split("\n")
    os.waitpid(pid, 0)
    return [path or None for path in answer]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can ask the kernel by chroot")
@given(
    entries=st.lists(
        st.tuples(
            st.lists(st.sampled_from(NAMES), min_size=1, max_size=3),
            st.one_of(st.just("directory"), st.just("file"), WORDS),
            st.booleans(),
        ),
        max_size=12,
    ),
    paths=st.lists(WORDS, min_size=1, max_size=8),
)
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_paths_lead_where_the_kernel_leads_them(
    entries: list[tuple[list[str], str | list[str], bool]], paths: list[list[str]], make_tree: Callable[[], Path]
) -> None:
    root = make_tree()
    build(root, entries)
    texts = ["/" + "/".join(words) for words in paths]
    tree = Root.at(root)
    # A `Path` has neither `.` nor a slash at its end; in links there can be both.
    ours = [tree.real(Path(text)) for text in texts]
    assert [str(path) if path else None for path in ours] == by_the_kernel(root, [str(Path(text)) for text in texts])


@pytest.fixture
def make_tree(tmp_path: Path) -> Callable[[], Path]:
    count = 0

    def make() -> Path:
        nonlocal count
        count += 1
        root = tmp_path / f"tree-{count}"
        root.mkdir()
        return root

    return make


@pytest.fixture
def tree(tmp_path: Path) -> Root:
    """Beside it lies what must never be reached."""
    (tmp_path / "canary").write_text("outside")
    (tmp_path / "tree" / "etc").mkdir(parents=True)
    return Root.at(tmp_path / "tree")


@pytest.mark.parametrize(
    "target", ["../canary", "../../../../../../{outside}", "{outside}/canary", "/proc/self/root{outside}/canary"]
)
def test_no_link_leads_out(tree: Root, tmp_path: Path, target: str) -> None:
    (tree.path / "link").symlink_to(target.replace("{outside}", str(tmp_path)))
    assert not tree.exists(Path("/link"))
    assert tree.lexists(Path("/link"))
    assert tree.names(Path("/link")) == []
    with pytest.raises(OSError):
        tree.read(Path("/link"), 100)


def test_an_absolute_link_starts_at_the_trees_own_root(tree: Root) -> None:
    (tree.path / "etc" / "shadow").write_text("the image's")
    (tree.path / "secret").symlink_to("/etc/shadow")
    assert tree.real(Path("/secret")) == Path("/etc/shadow")
    assert tree.on_host(Path("/secret")) == tree.path / "etc" / "shadow"
    assert tree.read(Path("/secret"), 100) == b"the image's"


@pytest.mark.parametrize(("links", "leads"), [(40, True), (41, False)])
def test_as_many_links_as_the_kernel_follows(tree: Root, links: int, leads: bool) -> None:
    (tree.path / "0").touch()
    for number in range(links):
        (tree.path / str(number + 1)).symlink_to(str(number))
    assert tree.exists(Path("/", str(links))) is leads
    assert (tree.path / str(links)).exists() is leads  # the kernel's own opinion


def test_a_tree_as_deep_as_nobody_makes_one(tree: Root) -> None:
    directory = os.open(tree.path, os.O_RDONLY)
    for _ in range(300):
        os.mkdir("d", dir_fd=directory)
        below = os.open("d", os.O_RDONLY, dir_fd=directory)
        os.close(directory)
        directory = below
    os.close(directory)
    assert tree.exists(Path("/" + "d/" * 200))
    before = len(os.listdir("/proc/self/fd"))
    assert not tree.exists(Path("/" + "d/" * 300))
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("path", ["relative", "/nul\0", "/" + "x" * 5000, "/etc/missing/x"])
def test_what_is_no_path_leads_nowhere(tree: Root, path: str) -> None:
    assert tree.real(Path(path)) is None
    assert tree.names(Path(path)) == []
    assert tree.link(Path(path)) is None


def test_what_is_no_file_is_not_opened(tree: Root) -> None:
    os.mkfifo(tree.path / "fifo")  # opening it would wait for a writer
    (tree.path / "link-to-fifo").symlink_to("fifo")
    for name in ("fifo", "link-to-fifo", "etc", ""):
        with pytest.raises(OSError, match="not a regular file"):
            tree.read(Path("/", name), 100)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make devices")
def test_a_device_in_the_tree_is_not_opened(tree: Root) -> None:
    os.mknod(tree.path / "zero", 0o666 | 0o020000, os.makedev(1, 5))
    with pytest.raises(OSError, match="not a regular file"):
        tree.read(Path("/zero"), 100)


def test_a_file_that_is_too_large(tree: Root) -> None:
    (tree.path / "file").write_bytes(b"x" * 101)
    with pytest.raises(OSError, match="too large"):
        tree.read(Path("/file"), 100)
    assert tree.read(Path("/file"), 101) == b"x" * 101


def test_kinds_and_names(tree: Root) -> None:
    (tree.path / "etc" / "b").touch()
    (tree.path / "etc" / "a").symlink_to("b")
    assert tree.names(Path("/etc")) == ["a", "b"]
    assert tree.is_file(Path("/etc/a"))
    assert not tree.is_directory(Path("/etc/a"))
    assert tree.is_directory(Path("/etc"))
    assert tree.link(Path("/etc/a")) == "b"
    assert tree.link(Path("/etc/b")) is None


def test_there_must_be_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("missing", "file"):
        with pytest.raises(OSError):
            Root.at(tmp_path / name)


@pytest.mark.parametrize("path", [sys.executable, "/usr/bin/env", "/bin", "/etc/localtime", "/no/such/thing"])
def test_the_hosts_own_tree_is_the_host(path: str) -> None:
    by_hand = Root(Path("/"))
    assert HOST.real(Path(path)) == by_hand.real(Path(path))
    assert HOST.link(Path(path)) == by_hand.link(Path(path))
    assert HOST.exists(Path(path)) == by_hand.exists(Path(path)) == os.path.exists(path)
    assert HOST.names(Path(path)) == by_hand.names(Path(path))
