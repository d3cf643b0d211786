"""The one reader of what a driver room sends: a bounded JSON document in, plain notebook outputs out.

The driver may have been taken over by the kernel it talks to, so nothing here trusts a type, a name or a
depth. `parse_document` either returns values that hold nothing but what it names, or raises `SandboxError`.
"""

import json
import re
from typing import Any, NoReturn

from nbformat import NotebookNode, from_dict

from isolate.policy import MIB, Limits, SandboxError

MAX_NESTING = 64
"""Lists and dicts of an output nest at most this deep."""
MAX_WIDGET_BYTES = 4 * MIB
"""Widget state of a notebook that is kept, as JSON; what is larger is dropped whole."""
_JSON_TYPE = re.compile(r"application/(.*\+)?json")
"""nbformat's own pattern: only these may hold something else than text."""
_WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
_WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
_MAX_LANGUAGE_BYTES = 64 * 1024
_MAX_TIMES = 16
_MAX_OUTPUTS = 100_000
"""Of all cells together."""
_MAX_VALUES = 2_000_000
"""Each may cost a hundred bytes of memory for two of text, and an object four times as much."""
_VALUES_OF_A_MARK = {b",": 1, b"[": 1, b"{": 4}
_TOKEN = re.compile(rb'[,[{]|"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
"""Such a mark or a text, to its end or that of the document; takes time in proportion to its length."""
_ENDINGS = {"ok", "timeout", "stuck", "kernel died", "iopub timeout", "odd message", "stopped", "lost"}
_DOCUMENT_NESTING = MAX_NESTING + 16


class OddDocument(ValueError):
    """Something in a document is not what it should be."""


class TooMuchError(SandboxError):
    """A document holds more than is kept: student code can cause it, and an honest driver sends it."""

    def __init__(self, what: str) -> None:
        super().__init__("driver", f"it sent a document with too many {what}")


def nesting(value: object) -> int:
    """How deep lists and dicts nest, without recursion."""
    deepest = 0
    waiting: list[tuple[object, int]] = [(value, 1)]
    while waiting:
        item, depth = waiting.pop()
        deepest = max(deepest, depth)
        if isinstance(item, dict):
            waiting.extend((child, depth + 1) for child in item.values())
        elif isinstance(item, list):
            waiting.extend((child, depth + 1) for child in item)
    return deepest


def _refuse_constant(name: str) -> NoReturn:
    raise OddDocument(f"the number {name}")


def _finite_float(text: str) -> float:
    value = float(text)
    if value - value != 0:
        raise OddDocument(f"the number {text[:20]}")
    return value


def parse_document(document: bytes) -> dict[str, Any]:
    """`cells` (index -> ended, outputs, execution_count, timing, cut), `language_info`, `widgets`.

    Raises `SandboxError` for a document that is truncated, too deep, not UTF-8, or not of this form, and
    `TooMuchError` for one that is too much.
    """
    if _values(document) > _MAX_VALUES:
        raise TooMuchError("values")
    try:
        raw = json.loads(document.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite_float)
        if nesting(raw) > _DOCUMENT_NESTING:
            raise OddDocument("too deeply nested")
        cells = {_index(key): _dict(value) for key, value in _dict(_dict(raw).get("cells")).items()}
        if sum(len(record["outputs"]) for record in cells.values() if isinstance(record.get("outputs"), list)) > (
            _MAX_OUTPUTS
        ):
            raise TooMuchError("outputs")
        return {
            "cells": {index: _record(record) for index, record in cells.items()},
            "language_info": _language_info(raw.get("language_info")),
            "widgets": _widgets(raw.get("widgets")),
        }
    except (ValueError, TypeError, RecursionError) as error:
        raise SandboxError("driver", f"it sent a document that cannot be used: {str(error)[:200]}") from error


def _values(document: bytes) -> int:
    """How many values a document may hold at most: told by its punctuation, before anything is made of it."""
    count = sum(document.count(mark) * values for mark, values in _VALUES_OF_A_MARK.items())
    if count <= _MAX_VALUES:
        return count
    count = texts = 0
    for token in _TOKEN.finditer(document):  # a table that was printed is one value, whatever commas it has
        values = _VALUES_OF_A_MARK.get(token[0][:1], 0)
        count += values
        texts += not values
        if max(count, texts // 2) > _MAX_VALUES:  # between two marks there is a name and a value, or it is no JSON
            return _MAX_VALUES + 1
    return count


def _dict(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise OddDocument("an object was expected")
    return value


def _str(value: object) -> str:
    if not isinstance(value, str):
        raise OddDocument("a text was expected")
    return value.encode("utf-8", "replace").decode("utf-8")  # no lone surrogates: a file must hold it


def _index(key: str) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) < 8):
        raise OddDocument("a cell index was expected")
    return int(key)


def _clean(value: Any) -> Any:
    """JSON whose texts can all be written as UTF-8. The nesting is known to be small."""
    if isinstance(value, str):
        return _str(value)
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {_str(key): _clean(item) for key, item in value.items()}
    return value


def _json_dict(value: object) -> dict[str, Any] | None:
    return None if value is None else {_str(key): _clean(item) for key, item in _dict(value).items()}


def _widgets(value: object) -> dict[str, Any] | None:
    """Widget state, unless it is more than the driver was to send."""
    widgets = _json_dict(value)
    return None if widgets and len(json.dumps(widgets)) > MAX_WIDGET_BYTES else widgets


def _language_info(value: object) -> dict[str, Any] | None:
    """The kernel's words about itself, which student code can change: what nbformat would refuse is left out."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    info = _json_dict(value) or {}
    if len(json.dumps(info)) > _MAX_LANGUAGE_BYTES:
        return None
    for name in ("file_extension", "mimetype", "pygments_lexer"):
        if not isinstance(info.get(name, ""), str):
            del info[name]
    if not isinstance(info.get("codemirror_mode", ""), str | dict):
        del info["codemirror_mode"]
    return info


def clean_count(value: object) -> int | None:
    """An execution count; None for what cannot be one (the kernel may say what it likes)."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
        return None
    return value


def clean_outputs(raw: object) -> list[NotebookNode]:
    """New outputs that hold what nbformat allows and nothing else. Raises `OddDocument`."""
    if not isinstance(raw, list):
        raise OddDocument("a list of outputs was expected")
    return [_output(output) for output in raw]


def _record(record: dict[str, Any]) -> dict[str, Any]:
    if record.get("ended") not in _ENDINGS:
        raise OddDocument("an unknown ending of a cell")
    return {
        "ended": record["ended"],
        "outputs": clean_outputs(record.get("outputs")),
        "execution_count": clean_count(record.get("execution_count")),
        "timing": _timing(record.get("timing")),
        "cut": record.get("cut") is True,
    }


def _timing(value: object) -> dict[str, str] | None:
    if value is None:
        return None
    times = list(_dict(value).items())
    if len(times) > _MAX_TIMES:
        raise OddDocument("fewer times were expected")
    return {_str(key)[:64]: _str(item)[:64] for key, item in times}


def _output(value: object) -> NotebookNode:
    raw = _dict(value)
    kind = raw.get("output_type")
    if kind == "stream":
        name = raw.get("name")
        return stream("stdout" if name == "stdout" else "stderr", _str(raw.get("text")))
    if kind == "error":
        lines = raw.get("traceback")
        if not isinstance(lines, list):
            raise OddDocument("a traceback was expected")
        return error(_str(raw.get("ename")), _str(raw.get("evalue")), [_str(line) for line in lines])
    if kind in {"display_data", "execute_result"}:
        data = {_str(mime): _mime(mime, item) for mime, item in _dict(raw.get("data")).items()}
        metadata = _json_dict(raw.get("metadata")) or {}
        _leave_out_what_cannot_be_shown(data, metadata)
        if kind == "display_data" or not data.get("text/plain"):  # nbgrader fails on a result that has no text
            return _new("display_data", data=data, metadata=metadata)
        count = clean_count(raw.get("execution_count"))
        return _new("execute_result", data=data, metadata=metadata, execution_count=count)
    raise OddDocument("an unknown kind of output")


def _leave_out_what_cannot_be_shown(data: dict[str, Any], metadata: dict[str, Any]) -> None:
    """What is valid, and yet nbconvert fails on it when it makes HTML: a grader's view, a student's feedback."""
    view = data.get(_WIDGET_VIEW, {"model_id": ""})
    if not isinstance(view, dict) or not isinstance(view.get("model_id"), str):
        del data[_WIDGET_VIEW]
    for name in ("filenames", *data):
        if not isinstance(metadata.get(name, {}), dict):
            del metadata[name]


def is_widget_state(widgets: object) -> bool:
    """Whether nbconvert can look up a widget in it."""
    state = widgets.get(_WIDGET_STATE) if isinstance(widgets, dict) else None
    return isinstance(state, dict) and isinstance(state.get("state"), dict)


def _mime(mime: str, value: Any) -> Any:
    """Text, unless the type is JSON: nbformat's schema, `mimebundle`."""
    if _JSON_TYPE.fullmatch(mime):
        return _clean(value)
    if isinstance(value, list):
        return "".join(_str(line) for line in value)
    return _str(value)


def _new(kind: str, **fields: Any) -> NotebookNode:
    """As nbformat's `new_output`, which checks each against the schema; whoever takes many checks them at once."""
    return from_dict({"output_type": kind, **fields})


def stream(name: str, text: str) -> NotebookNode:
    """What was written to `stdout` or `stderr`."""
    return _new("stream", name=name, text=text)


def error(name: str, text: str, traceback: list[str] | None = None) -> NotebookNode:
    """An error output; nbgrader scores a test cell that has one with zero."""
    lines = [f"\x1b[0;31m{name}\x1b[0m: {text}"] if traceback is None else traceback
    return _new("error", ename=name, evalue=text, traceback=lines)


def notice(limits: Limits) -> NotebookNode:
    """What stands where output was cut. On stdout: stderr would cost a test cell its points."""
    kept, total = limits.cell_output_bytes / MIB, limits.output_bytes / MIB
    text = (
        f"\n[The rest of this cell's output was cut: at most {kept:g} MiB a cell and {total:g} MiB a notebook "
        "are kept.]\n"
    )
    return stream("stdout", text)
