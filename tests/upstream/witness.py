"""A pytest plugin for nbgrader's own tests: notes who executed each notebook that was autograded.

Without it a configuration that is not read would look like one that works. `run.py` loads it into every test
process and counts its notes.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nbgrader.converters import Autograde
from nbgrader.preprocessors import Execute

NOTES = "UPSTREAM_WITNESS"
"""The environment variable that names the file: one word a notebook, `sandbox` or `stock`."""


def pytest_configure(config: pytest.Config) -> None:
    """Wrap both classes before any test has made an object of them."""
    from nbgrader_aalto.execute import IsolatedExecute

    Execute.preprocess = _noted(Execute.preprocess, "stock")
    IsolatedExecute.preprocess = _noted(IsolatedExecute.preprocess, "sandbox")  # type: ignore[method-assign]


def _noted(preprocess: Callable[..., Any], word: str) -> Callable[..., Any]:
    def noting(self: Any, *arguments: Any, **named: Any) -> Any:
        if isinstance(getattr(self.parent, "parent", None), Autograde):  # `nbgrader validate` is not our affair
            with Path(os.environ[NOTES]).open("a") as notes:
                notes.write(f"{word}\n")
        return preprocess(self, *arguments, **named)

    return noting
