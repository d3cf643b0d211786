"""`--threat-table`: the attack tests as a table, one line for each row of the threat catalogue.

A pytest plugin. Rows and persons travel in the reports (`user_properties`), so that the workers of pytest-xdist
may run the tests and the controller prints. `--threat-json` writes the same as data, for `compare`.
"""

import dataclasses
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest

from attacks import rows

_PROPERTY = "threat"
PERSONS = ("root", "user")
_WORST_FIRST = ("failed", "hole", "ok", "skipped")
"""Of several results the first of these stands in the table: a skip does not hide what was tried."""


@dataclasses.dataclass(frozen=True)
class Result:
    """How one test went, for each of the rows that it tries."""

    test: str
    rows: tuple[str, ...]
    person: str
    outcome: str
    reason: str = ""


def add_options(parser: pytest.Parser) -> None:
    group = parser.getgroup("threats")
    group.addoption("--threat-table", action="store_true", help="print the attack tests as a table; fail if rows lack")
    group.addoption("--threat-json", metavar="FILE", help="write the results of the attack tests into a file")


def configure(config: pytest.Config) -> None:
    if config.getoption("--threat-table") or config.getoption("--threat-json"):
        config.pluginmanager.register(ThreatTable(config))


def rows_of(item: pytest.Item) -> tuple[str, ...]:
    """What the markers of a test name, in order."""
    found = {str(row) for marker in item.iter_markers("threat") for row in marker.args}
    return tuple(sorted(found, key=rows.sort_key))


def person_of(item: pytest.Item) -> str:
    """As whom a test attacks; a test that does not choose runs as whoever runs pytest."""
    callspec = getattr(item, "callspec", None)
    person = callspec.params.get("person") if callspec else None
    return person if person in PERSONS else PERSONS[os.geteuid() != 0]


class ThreatTable:
    """Collects the reports of one session and prints the table at its end."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._results: dict[str, Result] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if numbers := rows_of(item):
                item.user_properties.append((_PROPERTY, [person_of(item), *numbers]))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)
        if _PROPERTY not in properties:
            return
        person, *numbers = properties[_PROPERTY]
        outcome, reason = outcome_of(report)
        if outcome is None:
            return
        result = Result(report.nodeid, tuple(numbers), person, outcome, reason)
        before = self._results.get(report.nodeid)
        self._results[report.nodeid] = worst([before, result]) if before else result

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(self._config, "workerinput"):
            return
        if path := self._config.getoption("--threat-json"):
            found = [dataclasses.asdict(result) for result in self._results.values()]
            Path(path).write_text(json.dumps(found), encoding="utf-8")
        if self._config.getoption("--threat-table") and gaps(self._results.values()):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._config.getoption("--threat-table"):
            terminalreporter.section("threats")
            for line in lines(list(self._results.values())):
                terminalreporter.write_line(line)


def outcome_of(report: pytest.TestReport) -> tuple[str | None, str]:
    """One of `_WORST_FIRST` with its reason; None for a phase that says nothing."""
    if report.failed:
        return "failed", ""
    if report.skipped and hasattr(report, "wasxfail"):
        return "hole", report.wasxfail.removeprefix("reason: ")
    if report.skipped:
        words = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        return "skipped", words.removeprefix("Skipped: ")
    return ("ok" if report.when == "call" else None), ""


def worst(results: Iterable[Result]) -> Result:
    return min(results, key=lambda result: _WORST_FIRST.index(result.outcome))


def by_row(results: Iterable[Result]) -> Mapping[str, list[Result]]:
    found: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        for row in result.rows:
            found[row].append(result)
    return found


def gaps(results: Iterable[Result]) -> list[str]:
    """What makes the table incomplete: rows that nothing tries, and reasons that no longer hold."""
    tried = by_row(results)
    missing = [f"row {row} is not tried" for row in rows.required() if row not in tried and row not in rows.NOT_TRIED]
    stale = [f"row {row} is tried, but rows.NOT_TRIED has it" for row in rows.NOT_TRIED if row in tried]
    unknown = [f"row {row} has no title" for row in tried if row not in rows.TITLES]
    return missing + stale + unknown


def lines(results: Sequence[Result]) -> list[str]:
    """The table, its skips and holes beneath each row, and the totals."""
    tried = by_row(results)
    written = [f"{'row':>4}  {'threat':<48}{'as root':<10}{'as user':<10}tests"]
    for row in sorted({*tried, *rows.required()}, key=rows.sort_key):
        written += _row(row, tried.get(row, []))
    count = Counter(result.outcome for result in results)
    written += ["", ", ".join(f"{count[outcome]} {outcome}" for outcome in reversed(_WORST_FIRST))]
    return written + [f"INCOMPLETE: {gap}" for gap in gaps(results)]


def _row(row: str, results: Sequence[Result]) -> list[str]:
    cells = []
    for person in PERSONS:
        own = [result for result in results if result.person == person]
        cells.append(worst(own).outcome if own else "-")
    title = rows.TITLES.get(row, "?")
    if not results:
        reason = rows.NOT_TRIED.get(row, "no test carries this row")
        return [f"{row:>4}  {title:<48}not tried: {reason}"]
    written = [f"{row:>4}  {title:<48}{cells[0]:<10}{cells[1]:<10}{len(results)}"]
    notes: dict[str, int] = defaultdict(int)
    for result in results:
        if result.outcome != "ok":
            name = re.sub(r"^.*::", "", result.test) if result.outcome == "failed" else result.reason
            notes[f"{result.outcome}: {name}"] += 1
    return written + [f"{'':>8}{note}" + (f" ({times} times)" if times > 1 else "") for note, times in notes.items()]
