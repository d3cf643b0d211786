"""EarlierResult: an earlier result goes only when a new one is complete, whatever happens in between."""

import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from attacks.harness import Stage
from nbgrader_aalto.earlier import EarlierResult, aside, recover
from upstream import run as upstream

REPOSITORY = Path(__file__).parents[2]


def make(directory: Path, text: str) -> None:
    directory.mkdir(parents=True)
    (directory / "p1.ipynb").write_text(text)
    (directory / "p1.ipynb").chmod(0o444)  # as nbgrader leaves it


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "autograded" / "ann" / "ps1"


def read(directory: Path) -> str | None:
    """What is there; and nothing else may be beside it."""
    assert not directory.parent.exists() or [path.name for path in directory.parent.iterdir()] in ([], ["ps1"])
    return (directory / "p1.ipynb").read_text() if directory.exists() else None


def test_a_new_result_replaces_it(directory: Path) -> None:
    make(directory, "old")
    earlier = EarlierResult(directory)
    earlier.put_aside()
    assert not directory.exists()
    make(directory, "new")
    earlier.settle()
    assert read(directory) == "new"


def test_without_a_new_result_it_comes_back(directory: Path) -> None:
    make(directory, "old")
    inode = directory.stat().st_ino
    earlier = EarlierResult(directory)
    earlier.put_aside()
    earlier.settle()
    assert read(directory) == "old"
    assert directory.stat().st_ino == inode


def test_settling_twice_or_without_putting_aside_changes_nothing(directory: Path) -> None:
    make(directory, "old")
    EarlierResult(directory).settle()
    assert read(directory) == "old"
    earlier = EarlierResult(directory)
    earlier.put_aside()
    earlier.settle()
    earlier.settle()
    assert read(directory) == "old"


def test_where_nothing_was_there_is_nothing_to_keep(directory: Path) -> None:
    earlier = EarlierResult(directory)
    earlier.put_aside()
    earlier.settle()
    assert read(directory) is None
    make(directory, "new")
    earlier.settle()
    assert read(directory) == "new"


@pytest.mark.parametrize("half_made", [False, True])
def test_after_a_killed_run_the_next_one_finds_the_earlier_result(directory: Path, half_made: bool) -> None:
    make(directory, "old")
    EarlierResult(directory).put_aside()
    if half_made:
        make(directory, "half")
    # here the run was killed
    next_run = EarlierResult(directory)
    assert read(directory) == "old"
    next_run.put_aside()
    next_run.settle()
    assert read(directory) == "old"


def test_the_name_aside_is_matched_by_none_of_nbgraders_patterns(directory: Path) -> None:
    make(directory, "old")
    EarlierResult(directory).put_aside()
    (aside,) = directory.parent.iterdir()
    assert aside.name != directory.name
    assert list(directory.parent.glob("*")) in ([], [aside])
    import glob

    assert glob.glob(str(directory.parent / "*")) == []
    assert glob.glob(str(directory.parent.parent / "*" / "*")) == []


def test_a_link_is_left_alone(directory: Path, tmp_path: Path) -> None:
    make(tmp_path / "elsewhere", "mine")
    directory.parent.mkdir(parents=True)
    directory.symlink_to(tmp_path / "elsewhere")
    earlier = EarlierResult(directory)
    earlier.put_aside()
    assert directory.is_symlink()
    earlier.settle()
    assert (tmp_path / "elsewhere/p1.ipynb").read_text() == "mine"


def test_assignments_whose_names_resemble_each_other_do_not_meet(tmp_path: Path) -> None:
    first, second = tmp_path / "ann/ps1", tmp_path / "ann/ps1.before"
    make(first, "first")
    make(second, "second")
    one, two = EarlierResult(first), EarlierResult(second)
    one.put_aside()
    two.put_aside()
    assert len(os.listdir(tmp_path / "ann")) == 2
    one.settle()
    two.settle()
    assert ((first / "p1.ipynb").read_text(), (second / "p1.ipynb").read_text()) == ("first", "second")


def test_a_result_made_by_hand_meanwhile_is_not_lost_in_silence(directory: Path) -> None:
    """Killed run, then the instructor removed what was half made: the earlier result still comes back."""
    make(directory, "old")
    EarlierResult(directory).put_aside()
    make(directory, "half")
    shutil.rmtree(directory)
    EarlierResult(directory)
    assert read(directory) == "old"


@pytest.fixture
def notebook(directory: Path) -> Path:
    return directory / "p1.ipynb"


def test_one_notebook_of_several(notebook: Path) -> None:
    make(notebook.parent, "old")
    (notebook.parent / "p2.ipynb").write_text("other")
    earlier = EarlierResult(notebook)
    earlier.put_aside()
    assert not notebook.exists()
    earlier.settle()
    assert notebook.read_text() == "old"
    earlier.put_aside()
    notebook.write_text("new")
    earlier.settle()
    assert notebook.read_text() == "new"
    assert sorted(path.name for path in notebook.parent.iterdir()) == ["p1.ipynb", "p2.ipynb"]


def test_one_notebook_after_a_killed_run(notebook: Path) -> None:
    make(notebook.parent, "old")
    EarlierResult(notebook).put_aside()
    notebook.write_text("half made")
    EarlierResult(notebook)
    assert notebook.read_text() == "old"


def test_a_first_notebook_that_fails_leaves_nothing(notebook: Path) -> None:
    """But the directory, as in stock nbgrader."""
    earlier = EarlierResult(notebook)
    earlier.put_aside()
    earlier.settle()
    assert list(notebook.parent.iterdir()) == []
    earlier.put_aside()
    notebook.write_text("half made, and killed")
    EarlierResult(notebook)
    assert list(notebook.parent.iterdir()) == []


@pytest.mark.parametrize("half_made", [False, True])
def test_what_is_not_complete_is_no_result(directory: Path, half_made: bool) -> None:
    """However much of it is there: nbgrader may have been interrupted while it removed what failed."""
    make(directory, "old")
    earlier = EarlierResult(directory)
    earlier.put_aside()
    if half_made:
        make(directory, "half")
    assert earlier.settle(complete=False) == []
    assert read(directory) == "old"


def test_recover_says_whether_there_was_an_earlier_result(directory: Path) -> None:
    assert recover(directory) is False
    assert not directory.parent.exists()
    make(directory, "old")
    assert recover(directory) is False
    EarlierResult(directory).put_aside()
    make(directory, "half")
    assert recover(directory) is True
    assert read(directory) == "old"
    shutil.rmtree(directory)
    EarlierResult(directory).put_aside()
    make(directory, "half, the first time")
    assert recover(directory) is False
    assert read(directory) is None


WHO_MAY_NOT = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from nbgrader_aalto.earlier import EarlierResult
path = Path(sys.argv[1])
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
earlier = EarlierResult(path)
earlier.put_aside()
path.mkdir()
(path / "p1.ipynb").write_text("new")
print(earlier.settle())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can leave files of others behind")
def test_what_cannot_be_removed_is_told_and_counts_for_nothing(stage: Stage) -> None:
    """A process of somebody else's, who may write beside the earlier result and not in all of it."""
    package = stage.directory / f"code-{secrets.token_hex(4)}"
    directory = package / "autograded/ann/ps1"
    for name in ("nbgrader_aalto", "isolate"):
        shutil.copytree(REPOSITORY / name, package / name, ignore=shutil.ignore_patterns("__pycache__"))
    make(directory, "old")
    make(directory / "kept", "old")
    for path, mode in ((directory.parent, 0o777), (directory, 0o777), (directory / "kept", 0o755)):
        path.chmod(mode)
    done = subprocess.run(
        [upstream.system_python() or sys.executable, "-c", WHO_MAY_NOT, directory, package],
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "kept/p1.ipynb: Permission denied" in done.stdout
    assert (directory / "p1.ipynb").read_text() == "new"
    assert not (directory / "kept").exists()
    # somebody who may, here root, removes it in passing; the new result stays
    assert recover(directory) is False
    assert read(directory) == "new"


def test_refuse_of_one_is_not_the_earlier_result_of_another(tmp_path: Path) -> None:
    first, second = tmp_path / "ann/ps1", tmp_path / "ann/ps1.dropped.0123abcd"
    make(first, "first")
    make(second, "second")
    EarlierResult(second).put_aside()
    earlier = EarlierResult(first)
    earlier.put_aside()
    make(first, "new")
    earlier.settle()
    EarlierResult(first)
    assert recover(second) is True
    assert (second / "p1.ipynb").read_text() == "second"


def test_a_link_survives_a_killed_run(directory: Path, tmp_path: Path) -> None:
    make(tmp_path / "elsewhere", "mine")
    directory.parent.mkdir(parents=True)
    directory.symlink_to(tmp_path / "elsewhere")
    EarlierResult(directory).put_aside()
    assert aside(directory).exists()
    EarlierResult(directory)
    assert directory.is_symlink()
    assert (tmp_path / "elsewhere/p1.ipynb").read_text() == "mine"
