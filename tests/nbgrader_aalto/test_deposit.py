"""A deposit has modes that hide it, whatever the umask of its process, and leaves that umask alone."""

import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nbgrader_aalto import deposit, trees

LIMITS = trees.TreeLimits(10**6, 10**6)
FORBIDDEN = """
import errno, json, sys
import pyseccomp
filter = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
filter.add_rule(pyseccomp.ERRNO(errno.EPERM), "unshare")
filter.load()
from pathlib import Path
from isolate import syscalls
from nbgrader_aalto import deposit, trees
try:
    syscalls.unshare(0x200)
    sys.exit("the filter does not filter")
except PermissionError:
    pass
place, work, name = map(Path, sys.argv[1:])
try:
    made = deposit.copy(place, str(name), work, trees.EVERYTHING, trees.TreeLimits(10**6, 10**6), 0, hidden=True)
    print(json.dumps([[file.path for file in made.files], list(made.directories)]))
except deposit.DepositError as error:
    print(json.dumps(str(error)))
"""
"""As Docker's seccomp profile does it."""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where everybody puts something in: setgid."""
    path = tmp_path / "inbound"
    path.mkdir()
    path.chmod(0o3773)
    return path


@pytest.fixture
def work(tmp_path: Path) -> Path:
    path = tmp_path / "work"
    (path / "sub").mkdir(parents=True)
    for name in ("p1.ipynb", "sub/run.sh"):
        (path / name).write_text(name)
        (path / name).chmod(0o777)
    return path


def modes(path: Path) -> set[str]:
    found = [path, *path.rglob("*")]
    return {f"{stat.S_IFMT(p.lstat().st_mode) == stat.S_IFDIR}:{p.lstat().st_mode & 0o7777:o}" for p in found}


HIDDEN = {"True:2770", "False:660"}


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_modes_in_a_thread(place: Path, work: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        made = deposit.copy(place, "new", work, trees.EVERYTHING, LIMITS, 0, hidden=True)
        deposit.make(place, "box", hidden=True)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert modes(place / "new") == HIDDEN
    assert modes(place / "box") == {"True:2770"}
    assert [file.path for file in made.files] == ["p1.ipynb", "sub/run.sh"]
    assert made.directories == ("sub",)
    assert made.newest_ns == max(path.lstat().st_ctime_ns for path in [place / "new", *(place / "new").rglob("*")])


def test_modes_in_a_child_where_no_thread_may_have_a_umask_of_its_own(place: Path, work: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORBIDDEN, place, work, "new"], capture_output=True, text=True, umask=0, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [["p1.ipynb", "sub/run.sh"], ["sub"]]
    assert modes(place / "new") == HIDDEN


def test_other_threads_keep_their_umask_meanwhile(place: Path, work: Path, tmp_path: Path) -> None:
    """A Jupyter server writes other files at the same time."""
    for number in range(200):
        (work / f"{number}.txt").write_text("x")
    elsewhere, stop = tmp_path / "elsewhere", threading.Event()
    elsewhere.mkdir()

    def write() -> None:
        number = 0
        while not stop.is_set() or not number:
            os.close(os.open(elsewhere / f"{number}", os.O_CREAT | os.O_WRONLY, 0o666))
            number += 1

    before = os.umask(0o022)
    thread = threading.Thread(target=write)
    try:
        thread.start()
        for name in ("a", "b", "c"):
            deposit.copy(place, name, work, trees.EVERYTHING, LIMITS, 0, hidden=True)
    finally:
        stop.set()
        thread.join()
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in elsewhere.iterdir()} == {0o644}
    assert modes(place / "c") == HIDDEN
    assert not [one for one in threading.enumerate() if one.name.startswith("deposit")]


@pytest.mark.parametrize("how", ["thread", "child"])
def test_a_deposit_that_fails_leaves_nothing(place: Path, work: Path, how: str) -> None:
    (work / "giant").write_bytes(b"x" * 2_000_000)
    (work / "large").write_bytes(b"x" * 900_000)
    (work / "larger").write_bytes(b"x" * 900_000)
    if how == "thread":
        with pytest.raises(deposit.DepositError, match="all files together have more than 1000000 bytes"):
            deposit.copy(place, "new", work, trees.EVERYTHING, LIMITS, 0, hidden=True)
    else:
        done = subprocess.run([sys.executable, "-c", FORBIDDEN, place, work, "new"], capture_output=True, text=True)
        assert "all files together have more than 1000000 bytes" in json.loads(done.stdout), done.stderr
    assert os.listdir(place) == []


def test_what_would_belong_to_another_group_is_refused(place: Path, work: Path) -> None:
    """The setgid bit is gone, and so the group of what is made is one's own."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory to another group")
    os.chown(place, -1, 12345)
    place.chmod(0o1773)
    with pytest.raises(deposit.DepositError, match="so that others could read it"):
        deposit.copy(place, "new", work, trees.EVERYTHING, LIMITS, 0, hidden=True)
    with pytest.raises(deposit.DepositError, match="so that others could read it"):
        deposit.make(place, "box", hidden=True)
    assert os.listdir(place) == []
    deposit.make(place, "box", hidden=False)
    assert os.listdir(place) == ["box"]


def test_a_link_in_the_place_of_the_directory(place: Path, work: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(place)
    with pytest.raises(deposit.DepositError):
        deposit.copy(tmp_path / "link", "new", work, trees.EVERYTHING, LIMITS, 0, hidden=True)
    assert os.listdir(place) == []
