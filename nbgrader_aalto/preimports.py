"""Which modules the kernels of an assignment are going to import: what the instructor's own notebooks say.

Refuses to look at anything that a student wrote, and to know how kernels start.
"""

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import nbformat

_LOOKS_AT_MODULES = re.compile(r"\b(modules|meta_path)\b")
"""`sys.modules`, in whatever way it was imported; `sys.meta_path` is not asked for what is imported already."""
_MAGIC = re.compile(r"^\s*[%!?].*$", re.MULTILINE)


def preimports(directory: Path | None, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """What to import beforehand for the assignment whose notebooks lie here: `wanted`, or what they import.

    Only what they import at the top level, and not files that lie beside them. Nothing where their code, or that of a
    Python file beside them, looks at `sys.modules`: a test that forbids a package would take it for the student's.
    Nor where a notebook cannot be read, or there is none.
    """
    try:
        sources = list(_sources(directory)) if directory is not None else []
        files = [path.read_text(encoding="utf-8") for path in sorted(directory.rglob("*.py"))] if directory else []
    except (OSError, ValueError, nbformat.ValidationError, nbformat.reader.NotJSONError):
        return ()
    if not sources or any(_LOOKS_AT_MODULES.search(text) for text in (*sources, *files)):
        return ()
    if wanted is not None:
        return tuple(wanted)
    assert directory is not None
    beside = {path.name.partition(".")[0] for path in directory.iterdir()}
    found = dict.fromkeys(name for source in sources for name in _imported(source))
    return tuple(name for name in found if name.partition(".")[0] not in beside)


def _sources(directory: Path) -> Iterator[str]:
    """Of code cells."""
    for path in sorted(directory.glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                yield cell.source


def _imported(source: str) -> Iterator[str]:
    """`from package import name` gives both, since `name` may be a module of the package."""
    try:
        statements = ast.parse(_MAGIC.sub("", source)).body
    except (SyntaxError, ValueError):
        return
    for statement in statements:
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
            yield statement.module
            yield from (f"{statement.module}.{alias.name}" for alias in statement.names if alias.name != "*")
