"""Names that go through nbgrader's whole cycle, and those that are refused before they do harm.

nbgrader puts names into paths, patterns for glob(3), regular expressions and URLs. What breaks in one of them is
refused when an assignment is generated or released, with the reason; what does not (blanks, dots, quotes,
parentheses, `&`, letters of any language) is let through. Each function returns None, or why and what to do.
"""

import re

from nbgrader_aalto.inspection import BAD_NAME

MAX_FILE_NAME = 255
"""Bytes: NAME_MAX of the file systems in use. pathconf(3)"""

MAX_ASSIGNMENT, MAX_NOTEBOOK = 120, 120
"""Bytes: `user+assignment+timestamp+random` and `assignment+timestamp+notebook.html` are names of files."""

MAX_STUDENT = 80

_GLOB = re.compile(r"[*?\[\]]")
_URL = re.compile(r"[/\\%#;]")


def assignment_problem(name: str) -> str | None:
    """Of an assignment."""
    if "+" in name:
        return "it holds '+', which separates the parts of a submission's name; rename the assignment"
    return _common(name, "the assignment", MAX_ASSIGNMENT)


def notebook_problem(name: str) -> str | None:
    """Of a notebook, without `.ipynb`; the last part if it lies in a directory."""
    return _common(name, "the notebook", MAX_NOTEBOOK)


def student_problem(name: str) -> str | None:
    """Of a student."""
    return _common(name, "the student", MAX_STUDENT)


def file_problem(path: str) -> str | None:
    """Of another file of an assignment or submission, relative to its top."""
    for part in path.split("/"):
        if BAD_NAME.search(part):
            return "has a control character, a text direction mark or non-UTF-8 bytes in its name; rename it"
        if len(part.encode("utf-8", "surrogateescape")) > MAX_FILE_NAME:
            return f"has a name of more than {MAX_FILE_NAME} bytes; rename it"
    return None


def _common(name: str, what: str, most: int) -> str | None:
    remedy = f"rename {what}"
    if not name or name != name.strip():
        return f"it is empty, or begins or ends with a blank; {remedy}"
    if name.startswith((".", "-")):
        return f"it begins with {name[0]!r}, so that nbgrader would overlook it or take it for an option; {remedy}"
    if BAD_NAME.search(name):
        return f"it holds a control character, a text direction mark or bytes that are not UTF-8; {remedy}"
    if found := _GLOB.search(name):
        return f"it holds {found[0]!r}, which nbgrader takes for a pattern of several names; {remedy}"
    if found := _URL.search(name):
        return f"it holds {found[0]!r}, which has a meaning of its own in an address of Formgrader; {remedy}"
    if len(name.encode()) > most:
        return f"it has more than {most} bytes, so that names made of it would be too long for a file; {remedy}"
    return None
