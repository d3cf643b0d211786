"""The one reader of the driver's document: it returns clean outputs or raises SandboxError, and nothing else."""

import json
from typing import Any

import nbformat
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from isolate.outputs import error, nesting, notice, parse_document
from isolate.policy import MIB, Limits, SandboxError

RECORD = {"ended": "ok", "outputs": [], "execution_count": 1, "timing": None, "cut": False}


def document(**changes: Any) -> bytes:
    return json.dumps({"cells": {"0": {**RECORD, **changes}}, "language_info": None, "widgets": None}).encode()


def with_output(**output: Any) -> bytes:
    return document(outputs=[output])


def assert_fit_for_a_notebook(result: dict[str, Any]) -> None:
    """What the caller does with it: into a notebook, validated, written as strict JSON in UTF-8."""
    assert set(result) == {"cells", "language_info", "widgets"}
    notebook = nbformat.v4.new_notebook()
    for index, record in result["cells"].items():
        assert type(index) is int
        assert index >= 0
        assert type(record["cut"]) is bool
        cell = nbformat.v4.new_code_cell("1")
        cell.outputs, cell.execution_count = record["outputs"], record["execution_count"]
        if record["timing"]:
            cell.metadata["execution"] = record["timing"]
        notebook.cells.append(cell)
    if result["language_info"]:
        notebook.metadata["language_info"] = result["language_info"]
    if result["widgets"]:
        notebook.metadata["widgets"] = result["widgets"]
    nbformat.validate(notebook)
    json.dumps(notebook, allow_nan=False, ensure_ascii=False).encode("utf-8")


def parse(data: bytes) -> dict[str, Any] | None:
    """The result, checked; None when it was refused with the one exception that is allowed."""
    refused: SandboxError | None = None
    try:
        result = parse_document(data)
    except SandboxError as error_:
        refused = error_
    if refused:
        assert refused.layer == "driver"
        assert len(str(refused)) < 500
        return None
    assert_fit_for_a_notebook(result)
    return result


def test_what_an_honest_driver_sends() -> None:
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": "hi\n"},
        {"output_type": "execute_result", "data": {"text/plain": "1"}, "metadata": {"a": [1]}, "execution_count": 1},
        {"output_type": "display_data", "data": {"application/json": {"a": None}, "image/png": "aGk="}, "metadata": {}},
        {"output_type": "error", "ename": "E", "evalue": "v", "traceback": ["t"]},
    ]
    record = {**RECORD, "outputs": outputs, "timing": {"shell.execute_reply": "2024-01-01T00:00:00Z"}, "cut": True}
    sent = {"cells": {"3": record}, "language_info": {"name": "python"}, "widgets": {"a/b+json": {"state": {}}}}
    result = parse(json.dumps(sent).encode())
    assert result
    assert result["cells"][3]["outputs"] == outputs
    assert result["cells"][3]["cut"] is True
    assert result["cells"][3]["timing"] == record["timing"]
    assert result["language_info"] == {"name": "python"}
    assert result["widgets"] == {"a/b+json": {"state": {}}}


GOOD = document(outputs=[{"output_type": "stream", "name": "stdout", "text": "grüße"}])


@pytest.mark.parametrize("length", range(0, len(GOOD), 7))
def test_truncated(length: int) -> None:
    with pytest.raises(SandboxError):
        parse_document(GOOD[:length])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"\xff\xfe{\0}\0",
        GOOD.decode().encode("utf-16"),
        GOOD + GOOD,
        GOOD + b"\0",
        b'{"cells": {"0": "\xed\xa0\x80"}}',
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"cells": {}, "widgets": {"a": ' + b"[" * 200 + b"]" * 200 + b"}}",
        b'{"cells": {}, "widgets": {"a": NaN}}',
        b'{"cells": {}, "widgets": {"a": Infinity}}',
        b'{"cells": {}, "widgets": {"a": -Infinity}}',
        b'{"cells": {}, "widgets": {"a": ' + b"9" * 100_000 + b"}}",
        *(json.dumps(value).encode() for value in (None, True, 1, "x", [], {}, [[]], {"cells": []}, {"cells": None})),
    ],
    ids=lambda data: repr(data[:24]),
)
def test_not_a_document(data: bytes) -> None:
    with pytest.raises(SandboxError):
        parse_document(data)


@pytest.mark.parametrize("number", [b"1e999", b"-1e999", b"1e400"])
def test_a_number_too_big_for_a_float_is_no_infinity(number: bytes) -> None:
    parse(b'{"cells": {}, "widgets": {"a": ' + number + b"}}")
    output = {"output_type": "display_data", "data": {}, "metadata": {"a": 0.5}}
    parse(with_output(**output).replace(b"0.5", number))


WRONG: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1.5,
    10**40,
    "",
    "x",
    "\ud800",
    [],
    ["x"],
    [[]],
    {},
    {"x": "y"},
    [None],
    {"a": [1]},
]


@pytest.mark.parametrize("field", ["ended", "outputs", "execution_count", "timing", "cut"])
def test_wrong_types_in_a_record(field: str) -> None:
    for value in WRONG:
        parse(document(**{field: value}))


@pytest.mark.parametrize("field", ["output_type", "name", "text"])
def test_wrong_types_in_a_stream(field: str) -> None:
    for value in WRONG:
        parse(with_output(**{"output_type": "stream", "name": "stdout", "text": "x", field: value}))


@pytest.mark.parametrize("field", ["ename", "evalue", "traceback"])
def test_wrong_types_in_an_error(field: str) -> None:
    for value in WRONG:
        parse(with_output(**{"output_type": "error", "ename": "E", "evalue": "v", "traceback": ["t"], field: value}))


@pytest.mark.parametrize("kind", ["display_data", "execute_result"])
@pytest.mark.parametrize("field", ["data", "metadata", "execution_count"])
def test_wrong_types_in_a_display(kind: str, field: str) -> None:
    for value in WRONG:
        parse(
            with_output(
                **{"output_type": kind, "data": {"text/plain": "x"}, "metadata": {}, "execution_count": 1, field: value}
            )
        )


@pytest.mark.parametrize(
    "mime",
    [
        "text/plain",
        "image/png",
        "application/json",
        "application/x+json",
        "x/y+json",
        "a b/c+json",
        "",
        "+json",
        "\ud800",
        "\n+json",
    ],
)
def test_wrong_types_in_a_mime_bundle(mime: str) -> None:
    for value in WRONG:
        parse(with_output(output_type="display_data", data={mime: value}, metadata={}))


@pytest.mark.parametrize("field", ["cells", "language_info", "widgets"])
def test_wrong_types_at_the_top(field: str) -> None:
    for value in WRONG:
        parse(json.dumps({"cells": {}, "language_info": None, "widgets": None, field: value}).encode())


@pytest.mark.parametrize("field", ["name", "codemirror_mode", "file_extension", "mimetype", "pygments_lexer"])
def test_wrong_types_in_the_language(field: str) -> None:
    """The kernel's own words about itself: a wrong one may not make the notebook invalid."""
    for value in WRONG:
        info = {"name": "python", field: value}
        parse(json.dumps({"cells": {}, "language_info": info, "widgets": None}).encode())


@pytest.mark.parametrize("key", ["-1", "1.0", "", "x", "٣", "1e3", "99999999", " 1", "+1", "0x1"])
def test_wrong_indices(key: str) -> None:
    with pytest.raises(SandboxError):
        parse_document(json.dumps({"cells": {key: RECORD}}).encode())


def test_lone_surrogates_become_writable() -> None:
    result = parse(with_output(output_type="stream", name="stdout", text="a\ud800b"))
    assert result
    assert result["cells"][0]["outputs"][0]["text"] == "a?b"


def test_too_many_outputs() -> None:
    data = b'{"cells": {"0": {"ended": "ok", "outputs": [' + b",".join([b"1"] * 100_001) + b"]}}}"
    with pytest.raises(SandboxError):
        parse_document(data)


def test_what_is_not_named_is_dropped() -> None:
    output = {"output_type": "stream", "name": "stdout", "text": "x", "evil": "y", "metadata": {"z": 1}}
    result = parse(document(outputs=[output], source="changed", evil=1))
    assert result
    assert result["cells"][0]["outputs"] == [{"output_type": "stream", "name": "stdout", "text": "x"}]
    assert set(result["cells"][0]) == set(RECORD)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
KEYS = ["output_type", "name", "text", "ename", "evalue", "traceback", "data", "metadata", "execution_count"]
KINDS = st.sampled_from(["stream", "error", "display_data", "execute_result"]) | JSON
OUTPUT = st.fixed_dictionaries({"output_type": KINDS}, optional=dict.fromkeys(KEYS[1:], JSON))
CLOSE_RECORD = st.fixed_dictionaries(
    {"ended": st.sampled_from(["ok", "stuck", "timeout"]) | JSON, "outputs": st.lists(OUTPUT, max_size=3) | JSON},
    optional=dict.fromkeys(("execution_count", "timing", "cut"), JSON),
)
CLOSE = st.fixed_dictionaries(
    {"cells": st.dictionaries(st.sampled_from(["0", "1", "007"]), CLOSE_RECORD, max_size=2) | JSON},
    optional={
        "language_info": st.fixed_dictionaries({"name": JSON}, optional={"mimetype": JSON, "codemirror_mode": JSON})
        | JSON,
        "widgets": JSON,
    },
)


@given(JSON | CLOSE)
@example({"cells": {"0": {"ended": [], "outputs": []}}})
@example({"cells": {"0": {"ended": "ok", "outputs": [{"output_type": {}}]}}})
@example({"cells": {"0": {"ended": "ok", "outputs": [{"output_type": "stream", "name": [], "text": ""}]}}})
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_json_is_taken_clean_or_refused(value: Any) -> None:
    parse(json.dumps(value).encode())


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_refused(data: bytes) -> None:
    assert parse(data) is None


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_flipped_bytes(data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(GOOD) - 1))
    value = data.draw(st.integers(0, 255))
    parse(GOOD[:position] + bytes([value]) + GOOD[position + 1 :])


def test_the_notice_costs_no_points_and_names_the_bounds() -> None:
    cut = notice(Limits(cell_output_bytes=2 * MIB, output_bytes=5 * MIB))
    assert (cut.output_type, cut.name) == ("stream", "stdout")
    assert "2 MiB" in cut.text
    assert "5 MiB" in cut.text


def test_an_error_output_shows_its_text() -> None:
    output = error("NotRunError", "because")
    assert output.output_type == "error"
    assert "because" in output.traceback[0]


@pytest.mark.parametrize(
    ("value", "depth"),
    [(1, 1), ("x", 1), ([], 1), ({}, 1), ([1], 2), ({"a": 1}, 2), ([[], {"a": [1]}], 4), ({"a": {}, "b": [[]]}, 3)],
)
def test_nesting(value: Any, depth: int) -> None:
    assert nesting(value) == depth


def test_nesting_of_a_hundred_thousand_levels() -> None:
    value: Any = []
    for _ in range(100_000):
        value = [value]
    assert nesting(value) == 100_001
    while value:  # taken apart by hand: freeing it at once recurses
        value = value.pop()
