"""A pytest plugin for nbgrader's own tests: notes who executed each notebook and performed each exchange operation.

Without it a configuration that is not read would look like one that works. `run.py` loads it into every test
process and counts its notes. Two things that differ between these tests and life are levelled here, too: they run
many commands in one process, and those of the API write a configuration of their own and read none.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nbgrader.apps.api import NbGraderAPI
from nbgrader.apps.nbgraderapp import NbGraderApp
from nbgrader.converters import Autograde
from nbgrader.exchange import abc
from nbgrader.preprocessors import Execute

NOTES = "UPSTREAM_WITNESS"
"""The environment variable that names the file: one line for each deed, `what by whom`."""
CONFIGURED = "JUPYTER_CONFIG_PATH" in os.environ
NOTEBOOKS, OPERATIONS = "notebooks executed", "operations of the exchange"
OURS, STOCK = "ours", "stock"
EXCHANGE = "nbgrader_aalto.exchange."


def pytest_configure(config: pytest.Config) -> None:
    """Wrap the classes before any test has made an object of them."""
    from nbgrader_aalto.execute import IsolatedExecute

    Execute.preprocess = _executing(Execute.preprocess, STOCK)
    IsolatedExecute.preprocess = _executing(IsolatedExecute.preprocess, OURS)  # type: ignore[method-assign]
    abc.Exchange.start = _operating(abc.Exchange.start)
    NbGraderApp.start = _as_a_process(NbGraderApp.start)
    if CONFIGURED:
        NbGraderAPI.__init__ = _configured(NbGraderAPI.__init__)


def _note(what: str, who: str) -> None:
    with Path(os.environ[NOTES]).open("a") as notes:
        notes.write(f"{what} by {who}\n")


def _executing(preprocess: Callable[..., Any], who: str) -> Callable[..., Any]:
    @functools.wraps(preprocess)
    def noting(self: Any, *arguments: Any, **named: Any) -> Any:
        if isinstance(getattr(self.parent, "parent", None), Autograde):  # `nbgrader validate` is not our affair
            _note(NOTEBOOKS, who)
        return preprocess(self, *arguments, **named)

    return noting


def _operating(start: Callable[..., Any]) -> Callable[..., Any]:
    """The one method that every operation comes by, whichever class performs it."""

    @functools.wraps(start)
    def noting(self: Any) -> Any:
        _note(OPERATIONS, OURS if type(self).__module__.startswith(EXCHANGE) else STOCK)
        return start(self)

    return noting


def _as_a_process(start: Callable[..., Any]) -> Callable[..., Any]:
    """A command that sets the umask of its process does so for itself, not for the commands after it."""

    @functools.wraps(start)
    def starting(self: Any) -> Any:
        umask = os.umask(0o022)
        os.umask(umask)
        try:
            return start(self)
        finally:
            os.umask(umask)

    return starting


def _configured(initialise: Callable[..., Any]) -> Callable[..., Any]:
    import nbgrader_aalto

    @functools.wraps(initialise)
    def initialising(self: Any, *arguments: Any, **named: Any) -> None:
        if "config" in named:
            nbgrader_aalto.configure(named["config"])
        initialise(self, *arguments, **named)

    return initialising
