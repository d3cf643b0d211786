"""keep_written: what of an archive that student code filled reaches the instructor's disk."""

import io
import os
import stat
import tarfile
from pathlib import Path
from typing import IO

import pytest

from nbgrader_aalto.written import keep_written


def archive(*members: tuple[str, bytes | bytes, bytes]) -> IO[bytes]:
    """A tar file of (name, content, type)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:", format=tarfile.PAX_FORMAT) as tar:
        for name, content, kind in members:
            info = tarfile.TarInfo(name)
            info.type, info.mode = kind, 0o6777
            if kind == tarfile.REGTYPE:
                info.size = len(content)
            else:
                info.linkname = content.decode()
            tar.addfile(info, io.BytesIO(content))
    file.seek(0)
    return file


def file(name: str, content: bytes = b"new") -> tuple[str, bytes, bytes]:
    return name, content, tarfile.REGTYPE


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_new_and_changed_files_are_kept_and_others_not(tmp_path: Path) -> None:
    before = archive(file("same", b"1"), file("changed", b"1"), file("deleted", b"1"), file("d/same", b"1"))
    after = archive(file("same", b"1"), file("changed", b"2"), file("d/same", b"1"), file("d/ä b", b""), file("n"))
    keep_written(after, before, tmp_path / "w")
    assert tree(tmp_path / "w") == {"changed": b"2", "d/ä b": b"", "n": b"new"}
    assert (before.tell(), after.tell()) == (0, 0)  # both are read again, by the next notebook


def test_nothing_written_makes_no_directory_and_removes_the_last_one(tmp_path: Path) -> None:
    same = archive(file("a"))
    keep_written(same, same, tmp_path / "w")
    assert not (tmp_path / "w").exists()
    keep_written(archive(file("a"), file("b")), same, tmp_path / "w")
    keep_written(archive(file("a"), file("c")), same, tmp_path / "w")
    assert tree(tmp_path / "w") == {"c": b"new"}
    keep_written(same, same, tmp_path / "w")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("name", ["../out", "/out", "a/../../out", "..", "//out", "a/b/../../../out", "/../out"])
def test_a_name_that_leads_out_is_not_kept(tmp_path: Path, name: str) -> None:
    (tmp_path / "below").mkdir()
    keep_written(archive(file(name), file("in")), archive(), tmp_path / "below/w")
    assert tree(tmp_path) == {"below/w/in": b"new"}
    assert not os.path.lexists("/out")


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE]
)
def test_what_is_not_a_regular_file_is_not_kept(tmp_path: Path, kind: bytes) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    keep_written(archive(("odd", str(secret).encode(), kind), file("in")), archive(), tmp_path / "w")
    assert [path.name for path in (tmp_path / "w").rglob("*")] == ["in"]


def test_files_are_plain_whatever_the_archive_says(tmp_path: Path) -> None:
    keep_written(archive(file("a")), archive(), tmp_path / "w")
    status = (tmp_path / "w/a").stat()
    assert not stat.S_IMODE(status.st_mode) & 0o7133
    assert status.st_uid == os.geteuid()


def test_a_link_in_the_place_of_the_directory_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/a").write_bytes(b"old")
    (tmp_path / "w").symlink_to(tmp_path / "precious")
    keep_written(archive(file("a")), archive(), tmp_path / "w")
    assert tree(tmp_path / "precious") == {"a": b"old"}
    assert not (tmp_path / "w").is_symlink()
    assert tree(tmp_path / "w") == {"a": b"new"}


def test_a_file_in_the_place_of_the_directory_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"in the way")
    keep_written(archive(file("a")), archive(), tmp_path / "w")
    assert tree(tmp_path / "w") == {"a": b"new"}


@pytest.mark.parametrize("raw", [b"", b"\0" * 100, b"not a tar file" * 100])
def test_what_was_never_packed_is_nothing(tmp_path: Path, raw: bytes) -> None:
    keep_written(io.BytesIO(raw), archive(file("a")), tmp_path / "w")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("cut", [1, 511, 513, 700, 1300])
def test_an_archive_that_was_cut_does_not_fail_the_grading(tmp_path: Path, cut: int) -> None:
    """The room was killed while its init packed."""
    whole = archive(file("a", b"1" * 400), file("b", b"2" * 400)).getvalue()  # type: ignore[attr-defined]
    keep_written(io.BytesIO(whole[:cut]), archive(), tmp_path / "w")
    assert set(tree(tmp_path / "w")) <= {"a"}


@pytest.mark.parametrize(
    "members", [[file("a"), file("a/b")], [file("a/b"), file("a")], [file("a"), file("a", b"again")]]
)
def test_names_that_contradict_each_other_do_not_fail_the_grading(
    tmp_path: Path, members: list[tuple[str, bytes, bytes]]
) -> None:
    keep_written(archive(*members), archive(), tmp_path / "w")
    assert len(tree(tmp_path / "w")) == 1


def test_a_path_that_is_too_long_for_this_host_does_not_fail_the_grading(tmp_path: Path) -> None:
    """Inside, code can go down with chdir as deep as it likes; outside, PATH_MAX counts from the root."""
    keep_written(archive(file("d/" * 2040 + "deep"), file("in")), archive(), tmp_path / "w")
    assert tree(tmp_path / "w") == {"in": b"new"}
