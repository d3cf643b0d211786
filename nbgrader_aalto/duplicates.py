"""Test cells that a student copied: which of them counts."""

from typing import Any

from nbgrader.utils import is_grade, is_locked, is_solution


def forget_duplicates(notebook: Any) -> list[str]:
    """Take the nbgrader metadata from all but the last of the cells with one grade_id; returns those ids.

    nbgrader's DeduplicateIds keeps the last one too, but leaves the others with empty metadata, which its own
    check then takes for an old schema: a student who copied a test cell ended the run for everybody (0.9.6).
    """
    seen: set[str] = set()
    duplicates: list[str] = []
    for cell in reversed(notebook.cells):
        if not (is_grade(cell) or is_solution(cell) or is_locked(cell)):
            continue
        grade_id = cell.metadata["nbgrader"]["grade_id"]
        if grade_id in seen:
            duplicates.append(grade_id)
            del cell.metadata["nbgrader"]
        seen.add(grade_id)
    return duplicates
