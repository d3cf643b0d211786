"""How far autograding has come: lines of a log, or a bar that does not disturb them."""

import contextlib
import logging
import os
import pty
import re
import sys
import termios
import threading

import pytest

from nbgrader_aalto.progress import progress


def test_plain_lines_in_a_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", open(os.devnull, "w"))
    with caplog.at_level(logging.INFO), progress(3, logging.getLogger("lines")) as shown:
        shown.show(0, 2, 1)
        shown.change(1, 2)
        shown.show(1, 2, 0)
    (line,) = caplog.messages
    assert re.fullmatch(r"1 of 3 students done, 2 running, 0 waiting, about \d+ s left", line)


def _all_of(terminal: int) -> str:
    """What was written to a pseudoterminal that its writer has closed; reading it ends with EIO. pty(7)"""
    said = b""
    with contextlib.suppress(OSError):
        while block := os.read(terminal, 1 << 16):
            said += block
    os.close(terminal)
    return said.decode()


def test_a_bar_on_a_terminal_with_the_log_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 100))
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        log, handler = logging.Logger("bar"), logging.StreamHandler(terminal)
        log.addHandler(handler)
        threads = threading.active_count()
        with progress(3, log) as shown:
            shown.show(1, 2, 1)
            log.warning("a line of the log")
            shown.show(2, 1, 0)
            assert threading.active_count() == threads
        assert handler.stream is terminal
    said = _all_of(master)
    assert re.search(r"(^|[\r\n])\s*a line of the log\r\n", said), said
    assert re.search(r"2/3 .*1 running, 0 waiting", said), said
