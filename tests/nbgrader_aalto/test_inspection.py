"""The checks on one submission alone, without nbgrader's commands (those: test_intake.py).

Rows 70a, 74, 76, 78, 79 and 80 of the threat catalogue.
"""

import json
import os
import time
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbgrader_aalto.inspection import (
    MAX_REFUSALS,
    IntakeLimits,
    Refusal,
    Unfit,
    inspect_notebook,
    inspect_submission,
    inspect_timestamp,
    printable,
    scan_json,
)
from released import cell, notebook


def inspect(path: Path, limits: IntakeLimits | None = None, **changes: Any) -> list[Refusal]:
    names = changes.get("notebooks", ["p1.ipynb"])
    return inspect_submission(path, PurePosixPath("bob/ps1"), names, limits or IntakeLimits(), ["*.pyc"])


@pytest.fixture
def submission(tmp_path: Path) -> Path:
    path = tmp_path / "bob/ps1"
    path.mkdir(parents=True)
    (path / "p1.ipynb").write_text(json.dumps(notebook()))
    return path


def test_a_good_submission_has_no_refusals(submission: Path, tmp_path: Path) -> None:
    assert inspect(tmp_path) == []


def test_the_instructors_part_of_the_path_may_be_a_link(submission: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    assert inspect(tmp_path / "link") == []


def test_a_missing_submission_is_refused(tmp_path: Path) -> None:
    assert "cannot be read" in inspect(tmp_path)[0].reason


@pytest.mark.skipif(os.geteuid() != 0, reason="mknod needs root")
def test_a_device_is_refused(submission: Path, tmp_path: Path) -> None:
    os.mknod(submission / "null", 0o600 | 0o020000, os.makedev(1, 3))
    assert inspect(tmp_path)[0].reason == "is a device"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_refused(submission: Path, tmp_path: Path) -> None:
    (submission / "data.txt").touch(mode=0)
    assert inspect(tmp_path)[0].reason == "cannot be read: permission denied"


def test_hard_links_can_be_allowed(submission: Path, tmp_path: Path) -> None:
    (submission / "b").hardlink_to(submission / "p1.ipynb")
    assert {refusal.file for refusal in inspect(tmp_path)} == {"'b'", "'p1.ipynb'"}
    assert inspect(tmp_path, IntakeLimits(allow_hard_links=True)) == []


def test_sizes_count_what_nbgrader_reads(submission: Path, tmp_path: Path) -> None:
    (submission / "a.pyc").write_bytes(b"x" * 3000)
    (submission / "other.ipynb").write_bytes(b"x" * 3000)
    limits = IntakeLimits(max_tree_bytes=3000, max_file_bytes=1000)
    assert inspect(tmp_path, limits) == []
    (submission / "d[1]").mkdir()  # here stock's globbing ignores nothing, and copies
    (submission / "d[1]/a.pyc").write_bytes(b"x" * 3000)
    advice = [refusal.advice for refusal in inspect(tmp_path, limits)]
    assert len(advice) == 2
    assert "c.IntakeExporter.max_file_bytes" in advice[0]
    assert "c.IntakeExporter.max_tree_bytes" in advice[1]


def test_a_report_stays_short(submission: Path, tmp_path: Path) -> None:
    for number in range(100):
        (submission / str(number)).symlink_to("/")
    assert len(inspect(tmp_path)) == MAX_REFUSALS


def test_a_refusal_is_printable() -> None:
    assert printable("a\n\u202e\udcff ä'") == r"a\n\u202e\udcff ä'"
    assert str(Refusal("'a'", "is b", "Do c")) == "'a' is b. Do c."


GOOD_TIMES = [
    "",
    "\n",
    "2015-02-02 15:58:23.948203 UTC\n",
    "2015-02-02 15:58 America/Los_Angeles",
    "2015-02-02",
]
GOOD_TIMES += ["2026-01-31 12:00:00 +0200", "2026-01-31T12:00:00+02:00", "Sat Jan 31 12:00:00 2026"]
BAD_TIMES = [
    "soon",
    "5",
    "10:00",
    "2026-01",
    "9999-12-31 23:59:59 UTC",
    "0001-01-01 00:00 UTC",
    "9" * 90,
    "\0",
]
BAD_TIMES += ["2026-01-31 12:00 /etc/localtime", "2026-01-31 12:00 :/etc/localtime", "2026-01-31 12:00 ../x"]
BAD_TIMES += ["2026-01-31 12:00 99999999999999999", "2026-13-01 12:00 UTC", "2026-01-31 12:00\u2028UTC"]


@pytest.mark.parametrize("text", GOOD_TIMES)
def test_a_time_is_accepted(text: str) -> None:
    inspect_timestamp(text.encode())


@pytest.mark.parametrize("text", BAD_TIMES)
def test_what_is_not_a_time_is_refused(text: str) -> None:
    with pytest.raises(Unfit):
        inspect_timestamp(text.encode())


def changed(**changes: Any) -> bytes:
    return json.dumps({**notebook(), **changes}).encode()


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (changed(nbformat=True), "nbformat that is not"),
        (changed(nbformat=[4]), "nbformat that is not"),
        (changed(nbformat_minor=5.0), "nbformat_minor that is not"),
        (changed(metadata=[]), "cannot be read as a notebook"),
        (changed(metadata={"language": 1}), "metadata.language"),
        (changed(metadata={"x": 1e400}), "is not JSON"),
        (changed(cells=[1]), "cannot be read as a notebook"),
        (changed(cells=[{"cell_type": "code", "metadata": {}, "source": [1]}]), "cannot be read"),
        (changed(cells=[{"cell_type": "code", "metadata": {}, "outputs": []}]), "no type or no source"),
        (changed(cells=[{"id": [], "cell_type": "raw", "metadata": {}, "source": ""}]), "cannot be read"),
        (changed(cells=[{"cell_type": "raw", "metadata": {"tags": [{}]}, "source": ""}]), "tags"),
        (changed(cells=[cell("", grade=True)]), "no grade_id"),
        (changed(cells=[{"cell_type": "raw", "metadata": {"nbgrader": []}, "source": ""}]), "garbled"),
        (changed(metadata={"x": [{}] * 200_000}), "JSON values"),
        (b"1" * 5000, "is not JSON"),
        (b"\xef\xbb\xbf{}", "is not JSON"),
    ],
)
def test_a_notebook_that_nbgrader_cannot_use_is_refused(raw: bytes, reason: str) -> None:
    with pytest.raises(Unfit) as refused:
        inspect_notebook(raw, IntakeLimits())
    assert reason in refused.value.reason


@pytest.mark.parametrize(
    "raw",
    [
        changed(),
        changed(nbformat_minor=4),  # with cell ids, which 4.4 has not: common, and graded by stock
        changed(metadata={"x": "😀\u2028"}),
        changed(cells=[cell("x", grade_id="unknown-to-the-course", grade=True, points=-1)]),
        changed(metadata={"figure": list(range(100_000))}),
    ],
)
def test_a_notebook_that_stock_grades_is_accepted(raw: bytes) -> None:
    inspect_notebook(raw, IntakeLimits())


@pytest.mark.parametrize("piece", [b'"', b'"\\', b"\\", b'\\"', b"[", b'"",', b"{", b"a"])
def test_the_scanner_is_linear(piece: bytes) -> None:
    started = time.process_time()
    scan_json(piece * (3_000_000 // len(piece)), 100_000, 100)
    assert time.process_time() - started < 2


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def measured(value: Any) -> tuple[int, int]:
    if not isinstance(value, list | dict):
        return 1, 0
    inner = [measured(item) for item in (value.values() if isinstance(value, dict) else value)]
    return 1 + sum(count for count, _ in inner), 1 + max((depth for _, depth in inner), default=0)


@given(json_values, st.booleans(), st.sampled_from([None, 1]))
def test_the_scanner_agrees_with_json(value: Any, escape: bool, indent: int | None) -> None:
    raw = json.dumps(value, ensure_ascii=escape, indent=indent).encode("utf-8", "surrogatepass")
    count, depth = measured(value)
    values, deepest = scan_json(raw, 10**9, 10**9)
    assert deepest == depth
    assert count <= values <= 2 * count


@given(st.text('[]{}",:\\a1 ').map(str.encode))
def test_the_scanner_ends_for_any_text_and_never_measures_less_than_json_parses(raw: bytes) -> None:
    values, depth = scan_json(raw, 10**9, 10**9)
    try:
        count, deepest = measured(json.loads(raw))
    except ValueError:
        return
    assert depth == deepest
    assert values >= count
