"""A released notebook, as small as can be: one answer and one test."""

from typing import Any

import nbformat

Notebook = dict[str, Any]


def cell(source: str, **flags: Any) -> Notebook:
    meta = {"grade": False, "solution": False, "locked": False, "schema_version": 3, **flags}
    made: Notebook = nbformat.v4.new_code_cell(source, metadata={"nbgrader": meta})
    return made


def notebook() -> Notebook:
    made: Notebook = nbformat.v4.new_notebook(
        cells=[
            cell("### BEGIN SOLUTION\nx = 1\n### END SOLUTION", grade_id="answer", solution=True),
            cell("assert x == 1", grade_id="test", grade=True, locked=True, points=2),
        ],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )
    return made
