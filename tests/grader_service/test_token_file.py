import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from accounts import Accounts, run_as

from attacks.harness import Stage
from grader_service.token_file import TokenFileError, read_token_file

TOKEN = "gst_0123456789ab_" + "A" * 43


def _token(directory: Path, mode: int = 0o600, text: str = TOKEN + "\n") -> Path:
    path = directory / "token"
    path.write_text(text)
    path.chmod(mode)
    return path


def _access_list(*entries: tuple[int, int, int]) -> bytes:
    """Tag, permissions, id of each entry, as setfacl would write them: linux/posix_acl_xattr.h."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def _lets_in(uid: int) -> bytes:
    """Owner, this user, group, mask, others."""
    none = 0xFFFFFFFF
    return _access_list((0x01, 6, none), (0x02, 6, uid), (0x04, 4, none), (0x10, 6, none), (0x20, 0, none))


@pytest.fixture
def accounts(stage: Stage) -> Iterator[Accounts]:
    with Accounts.open(stage) as accounts:
        yield accounts


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_closed_file_is_read(tmp_path: Path, mode: int) -> None:
    assert read_token_file(_token(tmp_path, mode)) == TOKEN


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o601, 0o640, 0o620, 0o610, 0o660, 0o644, 0o666, 0o777])
def test_a_file_for_others_is_refused(tmp_path: Path, mode: int) -> None:
    if os.geteuid() == 0:
        os.chown(tmp_path, 0, 12345)
        os.chown(_token(tmp_path), 0, 12345)
    path = _token(tmp_path, mode)
    with pytest.raises(TokenFileError, match="chmod") as caught:
        read_token_file(path)
    assert TOKEN not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("mode", [0o777, 0o722, 0o702])
def test_a_directory_that_everybody_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    upper = tmp_path / "upper"
    lower = upper / "lower"
    lower.mkdir(parents=True)
    path = _token(lower)
    for directory in (lower, upper):
        directory.chmod(mode)
        with pytest.raises(TokenFileError, match=f"may write to {directory} and replace it"):
            read_token_file(path)
        directory.chmod(0o755)
    assert read_token_file(path) == TOKEN


def test_a_sticky_directory_is_no_danger(tmp_path: Path) -> None:
    path = _token(tmp_path)
    tmp_path.chmod(0o1777)
    assert read_token_file(path) == TOKEN


def test_links_of_our_own_are_followed_to_what_is_checked(tmp_path: Path) -> None:
    """As Kubernetes mounts secrets: token -> ..data/token, ..data -> ..2026."""
    real = tmp_path / "..2026"
    real.mkdir()
    _token(real)
    (tmp_path / "..data").symlink_to("..2026")
    link = tmp_path / "link"
    link.symlink_to("..data/token")
    assert read_token_file(link) == TOKEN
    real.chmod(0o777)
    with pytest.raises(TokenFileError, match="2026"):
        read_token_file(link)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "short",
        "two words of it",
        "a" * 513,
        "b" * 100_000,
        "ä" * 20,
        "tab\tinside",
        "nul\0inside",
        f"{TOKEN}\n{TOKEN}",
    ],
)
def test_only_one_token_is_taken(tmp_path: Path, text: str) -> None:
    with pytest.raises(TokenFileError, match="one token on one line"):
        read_token_file(_token(tmp_path, text=text))


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    pipe, directory, sock, loop = (tmp_path / name for name in ("pipe", "directory", "socket", "loop"))
    os.mkfifo(pipe, 0o600)
    directory.mkdir(mode=0o700)
    loop.symlink_to(loop)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(sock))
        for path in (
            pipe,
            directory,
            sock,
            loop,
            tmp_path / "nothing",
            tmp_path / "nothing/token",
            Path("/"),
            Path("/dev/zero"),
        ):
            with pytest.raises(TokenFileError, match="token file"):
                read_token_file(path)


def test_a_group_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TokenFileError, match="no group 'no-such-group'"):
        read_token_file(_token(tmp_path), group="no-such-group")


def test_a_course_of_several_instructors(accounts: Accounts) -> None:
    """root puts the token into the course's directory, which is the first instructor's and the group's to write to."""
    gid = accounts.group("course")
    accounts.group("students")
    first, second = accounts.user("first", "course"), accounts.user("second", "students", "course")
    student = accounts.user("student", "students")
    course = accounts.directory / "course"
    course.mkdir()
    os.chown(course, first.pw_uid, gid)
    course.chmod(0o2770)
    path = _token(course, 0o640)
    os.chown(path, 0, gid)
    for instructor in (first, second):
        assert run_as(instructor, lambda: read_token_file(path, group=gid)) == TOKEN
        assert run_as(instructor, lambda: read_token_file(path, group=accounts.name("course"))) == TOKEN
        assert "TokenFileError" in run_as(instructor, lambda: read_token_file(path))
    assert run_as(student, lambda: read_token_file(path, group=gid)).endswith("cannot be read: Permission denied")
    assert run_as(student, lambda: path.read_text()).startswith("PermissionError")


def test_only_the_courses_group_may_read(accounts: Accounts) -> None:
    gid, students = accounts.group("course"), accounts.group("students")
    instructor = accounts.user("lecturer", "course", "students")
    path = _token(accounts.directory, 0o640)
    os.chown(path, 0, students)
    for group in (gid, None):
        said = run_as(instructor, lambda: read_token_file(path, group=group))  # noqa: B023
        assert f"the group {accounts.name('students')} may read it, and is not the course's" in said


def test_a_file_of_somebody_else_is_refused(accounts: Accounts) -> None:
    gid = accounts.group("course")
    first, second = accounts.user("first", "course"), accounts.user("second", "course")
    path = _token(accounts.directory, 0o640)
    os.chown(path, first.pw_uid, gid)
    assert run_as(first, lambda: read_token_file(path, group=gid)) == TOKEN
    assert "it must be root's or your own" in run_as(second, lambda: read_token_file(path, group=gid))


def test_a_directory_of_somebody_else_is_refused(accounts: Accounts) -> None:
    """Also in a sticky directory above it, where everybody may have made it."""
    gid = accounts.group("course")
    accounts.group("students")
    instructor, student = accounts.user("lecturer", "course"), accounts.user("student", "students")
    sticky = accounts.directory / "sticky"
    sticky.mkdir()
    sticky.chmod(0o1777)
    theirs = sticky / "theirs"
    theirs.mkdir()
    path = _token(theirs)
    os.chown(path, instructor.pw_uid, gid)
    for owner, group in ((student.pw_uid, student.pw_gid), (student.pw_uid, gid)):
        os.chown(theirs, owner, group)
        assert f"{theirs} belongs to the user {student.pw_name}" in run_as(
            instructor, lambda: read_token_file(path, group=gid)
        )
    os.chown(theirs, instructor.pw_uid, gid)
    assert run_as(instructor, lambda: read_token_file(path, group=gid)) == TOKEN


def test_a_directory_that_another_group_may_write_to_is_refused(accounts: Accounts) -> None:
    gid, students = accounts.group("course"), accounts.group("students")
    instructor = accounts.user("lecturer", "course")
    directory = accounts.directory / "shared"
    directory.mkdir()
    path = _token(directory, 0o640)
    os.chown(path, 0, gid)
    os.chown(directory, 0, students)
    directory.chmod(0o775)
    assert "chmod g-w" in run_as(instructor, lambda: read_token_file(path, group=gid))
    os.chown(directory, 0, gid)
    directory.chmod(0o775)
    assert run_as(instructor, lambda: read_token_file(path, group=gid)) == TOKEN


def test_access_lists_are_seen(accounts: Accounts) -> None:
    """The mode says 0640 or 0770 while a student is let in by name."""
    gid = accounts.group("course")
    accounts.group("students")
    instructor, student = accounts.user("lecturer", "course"), accounts.user("student", "students")
    directory = accounts.directory / "course"
    directory.mkdir()
    os.chown(directory, 0, gid)
    directory.chmod(0o771)
    path = _token(directory, 0o640)
    os.chown(path, 0, gid)
    try:
        os.setxattr(path, "system.posix_acl_access", _lets_in(student.pw_uid))
    except OSError as error:
        pytest.skip(f"no access lists here: {error}")
    path.chmod(0o640)
    assert run_as(student, lambda: path.read_text()) == TOKEN + "\n", "the danger is real"
    assert f"lets in the user {student.pw_name}" in run_as(instructor, lambda: read_token_file(path, group=gid))
    os.setxattr(path, "system.posix_acl_access", _lets_in(instructor.pw_uid))
    path.chmod(0o640)
    assert run_as(instructor, lambda: read_token_file(path, group=gid)) == TOKEN, "as systemd gives credentials"
    os.removexattr(path, "system.posix_acl_access")
    path.chmod(0o640)
    os.setxattr(directory, "system.posix_acl_access", _lets_in(student.pw_uid))
    directory.chmod(0o771)
    assert f"{directory} lets in the user {student.pw_name}" in run_as(
        instructor, lambda: read_token_file(path, group=gid)
    )
