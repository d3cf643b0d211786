"""The demo, as a visitor runs it; and that honest students get from the sandbox what stock nbgrader gives them."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from e2e.courses import REPOSITORY, Course
from e2e.host import command_of, descendants, eventually, mounts, processes

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("demo")]

DEMO = REPOSITORY / "examples/course/demo.py"
Run = Callable[..., tuple[int, str, dict[str, Any]]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run the demo with a TMPDIR of its own: exit code, output, scores; fails if anything is left behind."""

    def run(*options: str) -> tuple[int, str, dict[str, Any]]:
        temporary, scores = tmp_path / "väli aikainen", tmp_path / "scores.json"
        temporary.mkdir(exist_ok=True)
        scores.unlink(missing_ok=True)
        before, log = mounts(), tmp_path / "log"
        environment = Course(tmp_path / f"visitor{len(options)}").environment(TMPDIR=str(temporary))
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, DEMO, "--scores", scores, *options],
                cwd=tmp_path,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        seen: set[tuple[int, str]] = set()
        try:

            def ended() -> bool:
                seen.update(descendants(process.pid))
                return process.poll() is not None

            assert eventually(ended, 1200, 0.5), log.read_text(errors="replace")[-3000:]
        finally:
            process.kill()
            process.wait()
        assert eventually(lambda: not seen & set(processes()), 20), [command_of(one) for one in seen & set(processes())]
        assert len(seen) > 10
        assert list(temporary.iterdir()) == []
        assert not mounts() - before
        text = log.read_text(errors="replace")
        return process.returncode, text, json.loads(scores.read_text()) if scores.exists() else {}

    return run


def test_the_demo_is_all_as_it_should_be_and_honest_scores_are_those_of_stock_nbgrader(run: Run) -> None:
    code, text, scores = run()
    assert code == 0, text[-6000:]
    assert "all as it should be" in text
    assert "FAILED" not in text
    code, text, stock = run("--stock")
    assert code == 0, text[-6000:]
    assert len(stock) > 3
    assert len(scores) > len(stock), "hostile students are graded in the sandbox only"
    assert {student: scores[student] for student in stock} == stock
    assert any(cell for graded in stock.values() for book in graded.values() for cell in book.values())
