"""Imported before nbformat where a process is started for one notebook: takes a second out of its start.

jsonschema imports rfc3987_syntax where it is installed (jupyter_server's dependencies bring it), which builds some
forty parsers, for the formats "iri" and "iri-reference" alone. A notebook's schema has neither, and jsonschema does
without: jsonschema/_format.py.
"""

import contextlib
import importlib
import sys

_SLOW = "rfc3987_syntax"

if "jsonschema" not in sys.modules and _SLOW not in sys.modules:
    sys.modules[_SLOW] = None  # type: ignore[assignment]  # importing it is an ImportError
    with contextlib.suppress(ImportError):  # who needs it will say so
        importlib.import_module("jsonschema")
    del sys.modules[_SLOW]
