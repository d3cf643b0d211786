"""EarlierResult: an earlier result goes only when a new one is complete, whatever happens in between."""

import os
import shutil
from pathlib import Path

import pytest

from nbgrader_aalto.earlier import EarlierResult


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
