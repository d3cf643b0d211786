"""Names that go through nbgrader's whole cycle, and those that are refused before they do harm.

nbgrader puts names into paths, patterns for glob(3), addresses and pages. Each of these was tried with nbgrader 0.9.6:
generate, autograde, feedback, and what a browser makes of Formgrader's links. What breaks in one of them is refused
when an assignment is generated or released, with the reason. What does not is let through: blanks, dots, commas,
`( ) ] & ' ; : @ $ ! ~ { }`, letters of any language and emoji; `+` in names of notebooks and students.

Names are compared by their bytes, as the file system does: upper and lower case are different names, and so are an
"ä" in one piece (NFC) and in two (NFD), although they look the same. Each works as long as it is spelt the same
everywhere. Each function returns None, or why and what to do.
"""

import re

from nbgrader_aalto.inspection import BAD_NAME, MAX_PATH_BYTES
from nbgrader_aalto.remains import is_reserved

MAX_FILE_NAME = 255
"""Bytes: NAME_MAX of the file systems in use. pathconf(3)"""

MAX_ASSIGNMENT = 110
"""Bytes. A submission is called `user+assignment+timestamp+random`: 32, this, 31 and 12 bytes, and three of `+`."""

MAX_TIMESTAMP = 31
"""Bytes, of one as nbgrader writes them."""

MAX_NOTEBOOK = MAX_FILE_NAME - MAX_ASSIGNMENT - MAX_TIMESTAMP - len("++.html")
"""Bytes. A file of feedback is called `assignment+timestamp+notebook.html`."""

MAX_STUDENT = 80
"""Bytes: less than a submission's name has room for, and more than useradd(8) allows."""

_MARKS = re.compile("[\u061c\u200e\u200f\ufeff]")  # invisible: in a text they do good, in a name they hide a difference
_GLOB = re.compile(r"[*?\[]")
_URL = re.compile(r"[/\\%#]")  # browsers turn a backslash into a slash
_PAGE = re.compile(r'["<]|&[0-9A-Za-z]+;')  # Formgrader's templates put names into pages as they are
_IGNORED = re.compile(r"feedback|__pycache__|.*\.pyc")  # by default, `CourseDirectory.ignore`


def assignment_problem(name: str) -> str | None:
    """Of an assignment."""
    if "+" in name:
        return "it holds '+', which separates the parts of a submission's name; rename the assignment"
    if _IGNORED.fullmatch(name):
        return "nbgrader ignores files and directories of that name, and would leave files out; rename the assignment"
    return _common(name, "the assignment", MAX_ASSIGNMENT)


def notebook_problem(name: str) -> str | None:
    """Of a notebook, without `.ipynb`; the last part if it lies in a directory."""
    return _common(name, "the notebook", MAX_NOTEBOOK)


def student_problem(name: str) -> str | None:
    """Of a student."""
    return _common(name, "the student", MAX_STUDENT)


def file_problem(path: str) -> str | None:
    """Of another file of an assignment or submission, relative to its top."""
    if BAD_NAME.search(path):
        return "has a control character, a text direction mark or non-UTF-8 bytes in its name; rename it"
    parts = path.split("/")
    if any(is_reserved(part) for part in parts):
        return "has a name that nbgrader-aalto gives to earlier results; rename it"
    if not all(parts) or {".", ".."}.intersection(parts):
        return "is not a path inside of the directory; rename it"
    if any(len(part.encode()) > MAX_FILE_NAME for part in parts):
        return f"has a name of more than {MAX_FILE_NAME} bytes; rename it"
    if len(path.encode()) > MAX_PATH_BYTES:
        return f"has a path longer than {MAX_PATH_BYTES} bytes; rename it"
    return None


def _common(name: str, what: str, most: int) -> str | None:
    remedy = f"rename {what}"
    if not name or name != name.strip():
        return f"it is empty, or begins or ends with a blank; {remedy}"
    if name.startswith((".", "-")):
        return f"it begins with {name[0]!r}, so that nbgrader would overlook it or take it for an option; {remedy}"
    if BAD_NAME.search(name) or _MARKS.search(name):
        return f"it holds a control character, a text direction mark or bytes that are not UTF-8; {remedy}"
    if found := _GLOB.search(name):
        return f"it holds {found[0]!r}, which nbgrader takes for a pattern of several names; {remedy}"
    if found := _URL.search(name):
        return f"it holds {found[0]!r}, which has a meaning of its own in an address of Formgrader; {remedy}"
    if found := _PAGE.search(name):
        return f"it holds {found[0]!r}, which has a meaning of its own in a page of Formgrader; {remedy}"
    if len(name.encode()) > most:
        return f"it has more than {most} bytes, so that names made of it would be too long for a file; {remedy}"
    return None
