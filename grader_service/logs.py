"""Structured logs: one JSON object a line on standard error. Ids of jobs and of who grades; nobody's name or work.

Requests are not logged as such, since their addresses may hold a student's name; decisions are, where they are made.
"""

import json
import logging
import sys
import traceback
from typing import Any

import structlog


def configure(level: str = "info", *, as_json: bool = True) -> None:
    """For the whole process. `as_json=False` writes lines for people."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer(colors=False),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Libraries())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)


class _Libraries(logging.Formatter):
    """What libraries say: of an exception its type and where it was, not its words, which may hold a value."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {"event": record.getMessage().partition("\n")[0], "logger": record.name}
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = record.exc_info[0].__name__
            frames = traceback.extract_tb(record.exc_info[2])
            line["where"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames[-20:]]
        return json.dumps({**line, "level": record.levelname.lower()})
