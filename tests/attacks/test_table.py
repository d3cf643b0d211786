"""The table of the attacks, and the other walls that it compares with."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from attacks import compare, rows, table
from attacks.harness import Attacker, Person, Stage

_INNER = """
import pytest

@pytest.mark.threat(7)
@pytest.mark.parametrize("person", ["root", "user"])
def test_both(person): pass

@pytest.mark.threat(30, "30a")
@pytest.mark.parametrize("person", ["user"])
def test_one_skips(person): pytest.skip("no such thing here")

@pytest.mark.threat(30)
@pytest.mark.parametrize("person", ["user"])
@pytest.mark.xfail(strict=True, reason="known hole: a thing")
def test_hole(person): assert 0

def test_no_row(): pass
"""


@pytest.fixture
def inner(pytester: pytest.Pytester) -> Iterator[pytest.Pytester]:
    """A test session of its own that knows nothing but the table."""
    pytester.makeconftest(f"""
import sys
sys.path.append({str(Path(__file__).parent.parent)!r})
from attacks import rows, table
def pytest_addoption(parser): table.add_options(parser)
def pytest_configure(config):
    config.addinivalue_line("markers", "threat(*rows): rows")
    table.configure(config)
    rows.NOT_TRIED["63"] = "waits for a reason"
""")
    pytester.makepyfile(_INNER)
    return pytester


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["one process", "xdist"])
def test_rows_persons_and_reasons_are_told_and_gaps_fail(inner: pytest.Pytester, workers: tuple[str, ...]) -> None:
    result = inner.runpytest_subprocess("--threat-table", "-p", "no:cacheprovider", *workers)
    result.stdout.re_match_lines(
        [
            r" +7 +processes of the host +ok +ok +2",
            r" +30 +.* +- +hole +2",
            r" +skipped: no such thing here",
            r" +hole: known hole: a thing",
            r" +30a +.* +- +skipped +1",
            r" +63 +.*not tried: waits for a reason",
            r".*INCOMPLETE: row 1 is not tried",
        ]
    )
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def _result(row: str, outcome: str = "ok", person: str = "user") -> table.Result:
    return table.Result(f"test_{row}", (row,), person, outcome)


def test_a_reason_that_no_longer_holds_is_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rows.NOT_TRIED, "63", "waits for a reason")
    complete = [_result(row) for row in rows.required() if row not in rows.NOT_TRIED]
    assert table.gaps(complete) == []
    assert table.gaps([*complete, _result("63")]) == ["row 63 is tried, but rows.NOT_TRIED has it"]
    assert table.gaps(complete[1:]) == ["row 1 is not tried"]


def test_every_row_up_to_the_last_has_a_title_and_comes_in_order() -> None:
    required = list(rows.required())
    assert required[:2] == ["1", "2"]
    assert required == sorted(required, key=rows.sort_key)
    assert len(required) == rows.LAST + 1 + len(rows.OTHERS) + 2  # 30a, 84a, 84b
    assert {rows.sort_key(row)[0] for row in required} == {*range(1, rows.LAST + 1), *rows.OTHERS}
    assert {rows.sort_key(row)[0] for row in rows.of_the_sandbox()} == set(range(1, rows.LAST + 1))


@pytest.mark.parametrize(
    ("root", "user", "words"),
    [(["ok"], ["ok"], "stopped"), (["failed"], ["ok"], "root: not stopped; user: stopped"), ([], [], "n/a"),
     (["skipped"], ["ok", "failed"], "1 of 2 stopped (user)")],
)  # fmt: skip
def test_one_cell_of_the_comparison(root: list[str], user: list[str], words: str) -> None:
    results = [{"person": "root", "outcome": outcome} for outcome in root]
    assert compare.cell(results + [{"person": "user", "outcome": outcome} for outcome in user]) == words


@pytest.mark.parametrize("wall", compare.OTHERS)
def test_honest_code_runs_behind_the_other_walls(stage: Stage, person: Person, tmp_path: Path, wall: str) -> None:
    """Else a wall that cannot be built would look like one that stops nothing."""
    missing = compare.missing_programs(wall)
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    directory = stage.directory / "cases" / f"{tmp_path.name}-{person.name}"
    directory.mkdir(parents=True)
    attacker = Attacker(stage, person, directory, wall)
    try:
        said = attacker.run("say(here=os.getcwd(), python=sys.prefix, shadow=attempt(os.stat, '/etc/shadow'))").said
    finally:
        attacker.close()
    assert said == {"here": "/home/student/work", "python": str(attacker.python.parent.parent), "shadow": "ENOENT"}
    assert not directory.exists()
