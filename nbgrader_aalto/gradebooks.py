"""One database engine for all gradebooks that a run opens: each query is compiled once, and not for every student.

nbgrader opens its gradebook anew in every step of every student, nine times each, and SQLAlchemy keeps compiled
queries with the engine. Closing a gradebook closes its connections and ends its session, as ever; only the engine
is the one that the same thread had before. Whatever else the process does with gradebooks has engines of its own.

Refuses to know what is asked of a gradebook.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import nbgrader.api
import sqlalchemy

_here = threading.local()


@contextlib.contextmanager
def one_engine() -> Iterator[None]:
    """While inside, this thread's gradebooks of one database share an engine; in the end its connections are closed."""
    outer, _here.engines = getattr(_here, "engines", None), {}
    try:
        yield
    finally:
        engines, _here.engines = _here.engines, outer
        for engine in engines.values():
            engine.dispose()


def _create_engine(url: Any, **options: Any) -> sqlalchemy.Engine:
    """As `sqlalchemy.create_engine`."""
    engines: dict[Any, sqlalchemy.Engine] | None = getattr(_here, "engines", None)
    if engines is None:
        return sqlalchemy.create_engine(url, **options)
    key = url, *sorted(options.items())
    if key not in engines:
        engines[key] = sqlalchemy.create_engine(url, **options)
    return engines[key]


if vars(nbgrader.api).get("create_engine") is sqlalchemy.create_engine:  # nbgrader/api.py, `Gradebook.__init__`
    nbgrader.api.create_engine = _create_engine
