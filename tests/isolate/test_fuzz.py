"""The supervisor survives everything that a driver room can send.

The driver may have been taken over, so its document is any bytes at all. Whatever they are, the caller gets a
`SandboxError` or a notebook that is valid, can be written, read and scored, and differs from its own in nothing but
what the cells that ran may have made.

`FUZZ_EXAMPLES=50000` (`make fuzz`) looks for longer and elsewhere each time; by default it is short and the same.
Documents that once were trouble are in `corpus`.
"""

import contextlib
import copy
import dataclasses
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, new_raw_cell
from nbgrader.utils import determine_grade

from isolate import driver, rooms
from isolate.environment import grader_policy
from isolate.notebook import Ended, Execution, Kernel, Settings, _Job, execute
from isolate.outputs import OddDocument, clean_outputs
from isolate.policy import MIB, Limits, Policy, Report, SandboxError

SHORT = 400
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", SHORT))
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES == SHORT,
    database=None,
    suppress_health_check=list(HealthCheck),
)

CORPUS = {path.stem: path.read_bytes() for path in sorted((Path(__file__).parent / "corpus").glob("*.json"))}
TEST_CELL, CODE_CELL, SKIPPED = 2, 1, 4
RAN = (CODE_CELL, TEST_CELL)


def asked_for() -> NotebookNode:
    """What the caller gave: of its cells 1 and 2 are executed, and 2 is a test worth points."""
    test = {"grade": True, "solution": False, "locked": True, "task": False, "points": 2, "schema_version": 3}
    forged = [new_output("stream", name="stdout", text="of the student's own making")]
    return new_notebook(
        cells=[
            new_markdown_cell("# Heading", id="heading"),
            new_code_cell("one = 1", id="code", outputs=forged, metadata={"tags": ["mine"]}),
            new_code_cell("assert one == 1", id="test", metadata={"nbgrader": {**test, "grade_id": "t"}}),
            new_raw_cell("raw", id="raw"),
            new_code_cell("skipped", id="skipped", outputs=forged, execution_count=3),
            new_code_cell("  \n", id="blank"),
        ],
        metadata={"mine": {"kept": [1, 2]}, "kernelspec": {"name": "python3", "display_name": "Python 3"}},
    )


def job() -> _Job:
    return _Job(asked_for(), Policy(), Settings(), frozenset({SKIPPED}), {})


def finish(document: bytes | None) -> Execution | None:
    """What the supervisor makes of it, checked; None when it refused with the one error that is allowed."""
    room = Report("exited", exit_code=0)
    asked = job()
    before = copy.deepcopy(asked.notebook)
    execution, refused = None, None
    try:
        execution = asked.finish(rooms.Outcome(room, room, document, "cold"))
    except SandboxError as error:
        refused = error
    assert asked.notebook == before, "the caller's own notebook was changed"
    if execution:
        assert_fit(execution)
    else:
        assert_plain(refused, "driver")
    return execution


def assert_plain(error: SandboxError | None, *layers: str) -> None:
    """It can go into a log."""
    assert error
    assert error.layer in layers
    assert len(str(error)) < 700
    str(error).encode("utf-8")


def assert_fit(execution: Execution) -> None:
    done, asked = execution.notebook, asked_for()
    nbformat.validate(done)
    strict = json.dumps(done, allow_nan=False, ensure_ascii=False)
    strict.encode("utf-8")
    written = nbformat.writes(done)
    assert nbformat.reads(written, as_version=4) == done
    assert json.loads(strict) == done
    assert copy.deepcopy(done) == done
    json.dumps(execution.report.as_dict(), allow_nan=False).encode("utf-8")
    assert set(execution.report.cells) == set(RAN)
    assert_only_outputs_changed(done, asked)
    grade(done.cells[TEST_CELL])


def assert_only_outputs_changed(done: NotebookNode, asked: NotebookNode) -> None:
    assert len(done.cells) == len(asked.cells)
    for index, (cell, other) in enumerate(zip(done.cells, asked.cells, strict=True)):
        if cell.cell_type != "code":
            assert cell == other
            continue
        assert {**cell, "outputs": 0, "execution_count": 0, "metadata": 0} == {
            **other,
            "outputs": 0,
            "execution_count": 0,
            "metadata": 0,
        }
        assert {key: value for key, value in cell.metadata.items() if key != "execution"} == other.metadata
        if index not in RAN:
            assert (cell.outputs, cell.execution_count) == ([], None)
            assert "execution" not in cell.metadata
    changed = {key for key in done.metadata if done.metadata[key] != asked.metadata.get(key)}
    assert changed <= {"language_info", "widgets"}
    assert "of the student's own making" not in json.dumps(done)


def grade(cell: NotebookNode) -> None:
    """Points as nbgrader counts them: never more than there are, never a stumble."""
    with contextlib.suppress(MoreThanThereIs):
        points, most = _determine_grade(cell)
        assert most == 2
        assert 0 <= points <= 2


class MoreThanThereIs(Exception):
    """A result such as 3 of 2 points: nbgrader refuses it, and `nbgrader_aalto` may judge it; nothing of ours does."""


def _determine_grade(cell: NotebookNode) -> tuple[float, float]:
    try:
        points, most = determine_grade(cell)
    except ValueError as error:
        if "partial credit cannot be greater" in str(error):
            raise MoreThanThereIs from error
        raise
    return points, most


class TestCorpus:
    @pytest.mark.parametrize("name", CORPUS)
    def test_as_it_is(self, name: str) -> None:
        finish(CORPUS[name])

    @pytest.mark.parametrize("name", CORPUS)
    def test_cut_off_anywhere(self, name: str) -> None:
        document = CORPUS[name].rstrip()
        for length in range(0, len(document), 1 + len(document) // 600):
            assert finish(document[:length]) is None

    def test_the_honest_one_is_taken_whole(self) -> None:
        execution = finish(CORPUS["honest"])
        assert execution
        assert [output.output_type for output in execution.notebook.cells[1].outputs] == ["stream", "execute_result"]
        assert set(execution.notebook.cells[1].metadata["execution"]) > {"iopub.status.busy"}
        assert set(execution.report.cells.values()) == {Ended.OK}
        assert execution.report.limits == ("output",)

    def test_a_cell_that_nobody_asked_for_is_dropped(self) -> None:
        execution = finish(CORPUS["found_cell_of_nobody"])
        assert execution
        assert set(execution.report.cells.values()) == {Ended.NOT_RUN}

    @pytest.mark.parametrize("name", ["found_result_without_text", "found_result_with_empty_text"])
    def test_a_result_without_text_costs_no_points(self, name: str) -> None:
        execution = finish(CORPUS[name])
        assert execution
        assert determine_grade(execution.notebook.cells[TEST_CELL]) == (2, 2)


# Any document, changed in any place.


@dataclasses.dataclass(frozen=True)
class Raw:
    """Words of JSON, or of what only looks like it."""

    text: str


@dataclasses.dataclass(frozen=True)
class Pairs:
    """An object whose names may be said twice."""

    pairs: list[tuple[str, Any]]


def encode(value: Any) -> str:
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, dict):
        value = Pairs(list(value.items()))
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(key)}:{encode(item)}" for key, item in value.pairs) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(encode, value)) + "]"
    return json.dumps(value)


PYTHON_NAMES = """
__class__ __dict__ __deepcopy__ __copy__ __reduce__ __reduce_ex__ __getstate__ __setstate__ __html__ __len__
_allownew allow_new_attr update copy keys items get pop merge hasattr outputs metadata cell_type source id nbgrader
execution filenames tags output_type data text/plain name ended __proto__ constructor $ref
""".split()
MIMES = [
    *("text/plain", "text/html", "image/png", "application/json", "application/vnd.jupyter.widget-view+json"),
    *("image/svg+xml", "text/markdown", "text/latex", "application/javascript", "application/x+json"),
    *("application/json\n", "application/\n+json", "Application/JSON"),
    *("application/json;x", "application/+json", "x/application/json", "", "\x00", "a b", "text/plain\n"),
]
ENDINGS = ["ok", "timeout", "stuck", "kernel died", "iopub timeout", "odd message", "stopped", "lost", "not run"]
KINDS = ["stream", "error", "display_data", "execute_result", "pyout", "update_display_data", "unrecognized_output"]
TEXTS = st.one_of(
    st.text(st.characters(), max_size=8),
    st.sampled_from([*PYTHON_NAMES, *MIMES, *ENDINGS, *KINDS]),
    st.sampled_from(
        ["\ud800", "\udfff\ud800", "\x00", "\u2028", "nan", "inf", "-1", "1.5", "3", "1e999", "٣", "\x1b]0;x\a"]
    ),
    st.integers(1, 20_000).map(lambda size: "k" * size),
)
NUMBERS = st.sampled_from(
    [
        *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-999", "-0", "-0.0", "1E400", "0.1e1", "1.", "01"),
        *(str(2**31), str(2**31 - 1), str(2**63), str(-(2**63)), str(2**64), "9" * 400, "9" * 4300, "9" * 4301),
    ]
).map(Raw)
NESTED = st.tuples(st.sampled_from(["[]", '{"a":}']), st.integers(1, 2000)).map(
    lambda way: Raw(way[0][:-1] * way[1] + ("" if way[0] == "[]" else "1") + way[0][-1] * way[1])
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS | NUMBERS
HOSTILE = st.recursive(
    LEAVES | NESTED,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=10,
)


def mostly(right: st.SearchStrategy[Any], wrong: st.SearchStrategy[Any] = HOSTILE) -> st.SearchStrategy[Any]:
    """Right, and now and then not, so that a document with many such places is still taken often enough."""
    return st.integers(0, 15).flatmap(lambda chance: right if chance else wrong)


BUNDLE = st.dictionaries(mostly(st.sampled_from(MIMES[:5]), TEXTS), mostly(TEXTS), max_size=4)
OUTPUT = st.one_of(
    st.fixed_dictionaries(
        {
            "output_type": st.just("stream"),
            "name": mostly(st.sampled_from(["stdout", "stderr"])),
            "text": mostly(TEXTS),
        }
    ),
    st.fixed_dictionaries(
        {
            "output_type": st.just("error"),
            "ename": mostly(TEXTS),
            "evalue": mostly(TEXTS),
            "traceback": mostly(st.lists(mostly(TEXTS), max_size=3)),
        }
    ),
    st.fixed_dictionaries(
        {
            "output_type": mostly(st.sampled_from(["display_data", "execute_result"]), st.sampled_from(KINDS)),
            "data": mostly(BUNDLE),
        },
        optional={
            "metadata": mostly(st.dictionaries(mostly(st.sampled_from(MIMES), TEXTS), mostly(TEXTS), max_size=3)),
            "execution_count": mostly(st.integers(-1, 9)),
        },
    ),
)
RECORD = st.fixed_dictionaries(
    {"ended": mostly(st.sampled_from(ENDINGS[:-1])), "outputs": mostly(st.lists(OUTPUT, max_size=3))},
    optional={
        "execution_count": mostly(st.integers(0, 9)),
        "timing": mostly(st.dictionaries(TEXTS, TEXTS, max_size=3)),
        "cut": mostly(st.booleans()),
    },
)
KEYS = mostly(st.sampled_from(["1", "2"]), st.sampled_from(["0", "3", "4", "5", "01", "9999999", "-1", "٣", "1.0", ""]))
DOCUMENT = st.fixed_dictionaries(
    {"cells": st.dictionaries(KEYS, RECORD, max_size=4)},
    optional={
        "language_info": mostly(
            st.fixed_dictionaries(
                {"name": TEXTS},
                optional=dict.fromkeys(
                    ("codemirror_mode", "file_extension", "mimetype", "pygments_lexer", *PYTHON_NAMES[:4]),
                    mostly(TEXTS),
                ),
            )
        ),
        "widgets": mostly(st.dictionaries(TEXTS, mostly(TEXTS), max_size=3)),
    },
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a document."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        one = waiting.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        for key in keys:
            found.append((one, key))
            waiting.append(one[key])
    return found


def change(document: Any, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
    """One change, anywhere: another value, another name, a name said twice, gone, more of it, deeper."""
    spots = places(document)
    if not spots:
        return
    where, key = spots[draw(st.integers(0, len(spots) - 1))]
    way = draw(st.sampled_from(["replace", "replace", "rename", "twice", "remove", "add", "repeat", "wrap", "swap"]))
    if way == "replace":
        where[key] = draw(HOSTILE)
    elif way == "rename" and isinstance(where, dict):
        where[draw(TEXTS)] = where.pop(key)
    elif way == "twice" and isinstance(where[key], dict):
        where[key] = Pairs([*where[key].items(), *((name, draw(HOSTILE)) for name in where[key])])
    elif way == "remove":
        del where[key]
    elif way == "add" and isinstance(where[key], dict):
        where[key][draw(TEXTS)] = draw(HOSTILE)
    elif way == "repeat" and isinstance(where[key], list):
        where[key] *= draw(st.integers(2, 50))
    elif way == "wrap":
        where[key] = [where[key]]
    else:
        other, name = spots[draw(st.integers(0, len(spots) - 1))]
        where[key] = copy.deepcopy(other.get(name) if isinstance(other, dict) else None)


SEEDS = [json.loads(text) for name, text in CORPUS.items() if name not in {"found_constants", "found_float_overflow"}]


@given(st.data())
@fuzz
def test_a_document_changed_anywhere(data: st.DataObject) -> None:
    document = copy.deepcopy(data.draw(st.sampled_from(SEEDS) | DOCUMENT))
    for _ in range(data.draw(st.integers(0, 3))):
        change(document, data.draw)
    finish(encode(document).encode("utf-8", "surrogatepass"))


@given(DOCUMENT)
@fuzz
def test_a_document_that_is_nearly_right(document: Any) -> None:
    finish(encode(document).encode("utf-8", "surrogatepass"))


@given(HOSTILE)
@fuzz
def test_any_json(value: Any) -> None:
    finish(encode(value).encode("utf-8", "surrogatepass"))


@given(st.sampled_from(sorted(CORPUS)), st.integers(0), st.integers(1, 8))
@fuzz
def test_bytes_changed_anywhere(name: str, seed: int, changes: int) -> None:
    """Flipped, put in, taken out, doubled, exchanged with a piece of another document."""
    rng = random.Random(seed)
    document = bytearray(CORPUS[name])
    for _ in range(changes):
        start = rng.randrange(len(document) + 1)
        end = min(len(document), start + rng.choice([0, 1, 1, 2, 8, 64]))
        other = CORPUS[rng.choice(sorted(CORPUS))]
        cut = rng.randrange(len(other))
        document[start:end] = rng.choice(
            [
                bytes([rng.randrange(256)]),
                b"",
                bytes(document[start:end]) * 2,
                other[cut : cut + rng.choice([1, 8, 64])],
                rng.choice([b"[", b"{", b'"', b"\\", b"\\ud800", b"\xed\xa0\x80", b"\xff", b"\0", b"NaN", b"1e999"]),
                b"[" * rng.choice([1, 70, 2000]),
            ]
        )
    finish(bytes(document))


@pytest.fixture(scope="module")
def html() -> HTMLExporter:
    return HTMLExporter()


VIEW, STATE = (f"application/vnd.jupyter.widget-{name}+json" for name in ("view", "state"))
NAMES_OF_WIDGETS = st.sampled_from(["abc", "xyz"]) | TEXTS
SHOWN = st.fixed_dictionaries(
    {
        "output_type": st.sampled_from(["display_data", "execute_result"]),
        "data": st.dictionaries(st.sampled_from(MIMES[:10]), mostly(TEXTS), max_size=3)
        | st.fixed_dictionaries({VIEW: mostly(st.fixed_dictionaries({"model_id": NAMES_OF_WIDGETS}))}),
        "metadata": st.dictionaries(
            st.sampled_from([*MIMES[:10], "filenames", "isolated", "needs_background"]), HOSTILE
        ),
    }
)


@given(
    st.lists(SHOWN, min_size=1, max_size=3),
    mostly(st.fixed_dictionaries({STATE: mostly(st.fixed_dictionaries({"state": mostly(st.just({"abc": {}}))}))})),
    mostly(st.fixed_dictionaries({"name": TEXTS}, optional={"pygments_lexer": TEXTS, "codemirror_mode": HOSTILE})),
)
@settings(fuzz, max_examples=max(1, EXAMPLES // 8))
def test_what_is_taken_can_be_shown(html: HTMLExporter, shown: list[Any], widgets: Any, language: Any) -> None:
    """Graders look at it in the formgrader, and students in their feedback: nbconvert makes both."""
    record = {"ended": "ok", "outputs": shown}
    document = encode({"cells": {"1": record, "2": record}, "widgets": widgets, "language_info": language})
    execution = finish(document.encode("utf-8", "surrogatepass"))
    if execution:
        text, _ = html.from_notebook_node(execution.notebook)
        text.encode("utf-8")


@given(st.binary(max_size=400))
@fuzz
def test_any_bytes(document: bytes) -> None:
    assert finish(document) is None


# What an honest driver makes of a hostile kernel's messages is never the grader's fault.


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64) | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=10,
)
BUNDLES = st.dictionaries(st.sampled_from(MIMES) | TEXTS, TEXTS | PLAIN, max_size=4)
MESSAGES = st.one_of(
    st.fixed_dictionaries({"output_type": st.just("stream"), "name": PLAIN, "text": TEXTS}),
    st.fixed_dictionaries(
        {"output_type": st.just("error"), "ename": TEXTS, "evalue": TEXTS, "traceback": st.lists(TEXTS)}
    ),
    st.fixed_dictionaries(
        {
            "output_type": st.sampled_from(["display_data", "execute_result"]),
            "data": BUNDLES,
            "metadata": st.dictionaries(TEXTS, PLAIN, max_size=3),
            "execution_count": PLAIN,
        }
    ),
)


@given(
    st.lists(st.lists(MESSAGES, max_size=4), min_size=2, max_size=2),
    st.dictionaries(TEXTS, PLAIN, max_size=3),
    st.lists(st.sampled_from(ENDINGS[:-1]), min_size=2, max_size=2),
)
@fuzz
def test_what_the_driver_finds_clean_is_taken(
    outputs: list[list[Any]], language: dict[str, Any], ended: list[str]
) -> None:
    cells = {}
    for index, some, ending in zip(RAN, outputs, ended, strict=True):
        record: dict[str, Any] = {"ended": ending}
        try:
            record["outputs"] = clean_outputs(driver._finite(some))
        except OddDocument:
            record.update(ended="odd message", outputs=[])
        cells[index] = record
    sent = driver._encode({"cells": cells, "language_info": driver._finite(language), "widgets": None})
    execution = finish(sent)
    assert execution
    for index, record in cells.items():
        assert execution.report.cells[index] == record["ended"]
        kept = execution.notebook.cells[index].outputs
        assert json.loads(json.dumps(kept[: len(record["outputs"])])) == json.loads(driver._encode(record["outputs"]))


# Bounds of memory and time, each with the largest document that the rooms let through.


def filled(head: str, item: str, tail: str) -> bytes:
    size = 2 * Limits().output_bytes + 8 * MIB - len(head) - len(tail) - len(item)
    return (head + (item + ",") * (size // (len(item) + 1)) + item + tail).encode()


CELL = '{"cells": {"1": {"ended": "ok", "outputs": ['
DATA = CELL + '{"output_type": "display_data", "data": {"application/json": '
GREEDY: dict[str, Callable[[], bytes]] = {
    "empty objects": lambda: filled(DATA + "[", "{}", "]}}]}}}"),
    "empty objects, just allowed": lambda: (DATA + "[" + "{}," * 395_000 + "{}]}}]}}}").encode(),
    "objects of one, just allowed": lambda: (DATA + "[" + '{"a":1},' * 395_000 + "{}]}}]}}}").encode(),
    "empty lists, just allowed": lambda: (DATA + "[" + "[]," * 990_000 + "[]]}}]}}}").encode(),
    "names, just allowed": lambda: (
        DATA + "{" + ",".join(f'"{number}":1' for number in range(1_990_000)) + "}}}]}}}"
    ).encode(),
    "outputs": lambda: filled(CELL, '{"output_type":"stream","text":""}', "]}}}"),
    "outputs, just allowed": lambda: (
        CELL + ",".join(['{"output_type":"stream","text":""}'] * 99_000) + "]}}}"
    ).encode(),
    "displays, just allowed": lambda: (
        CELL + ",".join(['{"output_type":"display_data","data":{"text/plain":"x"}}'] * 99_000) + "]}}}"
    ).encode(),
    "cells": lambda: (
        '{"cells": {' + ",".join(f'"{number}":{{"ended":"ok","outputs":[]}}' for number in range(280_000)) + "}}"
    ).encode(),
    "a text": lambda: (CELL + '{"output_type":"stream","text":"' + "," * 55_000_000 + '"}]}}}').encode(),
    "a text of escapes": lambda: (CELL + '{"output_type":"stream","text":"' + "\\n" * 27_000_000 + '"}]}}}').encode(),
    "a text of pairs": lambda: (
        CELL + '{"output_type":"stream","text":"' + "\\ud83d\\ude00" * 4_600_000 + '"}]}}}'
    ).encode(),
    "a text without an end": lambda: (CELL + '"' + ",\\" * 27_000_000).encode(),
    "texts without an end": lambda: b'",' * 28_000_000,
    "one number": lambda: (DATA + "1" * 55_000_000 + "}}]}}}").encode(),
    "one fraction": lambda: (DATA + "0." + "1" * 55_000_000 + "}}]}}}").encode(),
    "long numbers": lambda: filled(DATA + "[", "9" * 4300, "]}}]}}}"),
    "nested": lambda: b"[" * 56_000_000,
    "nested, just allowed": lambda: b"[" * 1_900_000,
    "blanks": lambda: b" " * 56_000_000,
    "language": lambda: ('{"cells": {}, "language_info": {"name": "' + "x" * 55_000_000 + '"}}').encode(),
    "widgets": lambda: ('{"cells": {}, "widgets": {"name": "' + "\\u0000" * 9_000_000 + '"}}').encode(),
    "times": lambda: (
        '{"cells": {"1": {"ended": "ok", "outputs": [], "timing": {'
        + ",".join(f'"{number}":"x"' for number in range(1_500_000))
        + "}}}}"
    ).encode(),
}
MOST_BYTES = 3 << 29
MOST_CPU_SECONDS = 60


@pytest.mark.slow
@pytest.mark.parametrize("name", GREEDY)
def test_memory_and_time_are_bounded(name: str) -> None:
    """In a process that is killed beyond: what comes of it is one of the two, and within bounds."""
    code = f"import test_fuzz; test_fuzz.take_greedy({name!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def take_greedy(name: str) -> None:
    document = GREEDY[name]()
    assert len(document) <= 2 * Limits().output_bytes + 8 * MIB
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (MOST_CPU_SECONDS, MOST_CPU_SECONDS))
    room = Report("exited", exit_code=0)
    with contextlib.suppress(SandboxError):
        job().finish(rooms.Outcome(room, room, document, "cold"))


# A driver that is somebody else's, in the real rooms.


PRELUDE = """
import json, os, signal, struct, subprocess, sys, time
def tell(state, index=0):
    os.write(progress, struct.pack("<II", index, state))
def send(data):
    view = memoryview(data)
    while view:
        view = view[os.write(result, view[:1 << 16]):]
GOOD = json.dumps({"cells": {"0": {"ended": "ok", "outputs": [{"output_type": "stream", "text": "fine"}]}}}).encode()
"""
TAKEN, REFUSED = "taken", "refused"
LIES: dict[str, tuple[str, str]] = {
    "honest": (TAKEN, "tell(5); tell(1); send(GOOD); tell(2)"),
    "nothing": (REFUSED, "tell(5)"),
    "never ready": (REFUSED, "send(GOOD)"),
    "half a document": (REFUSED, "tell(5); send(GOOD[:40])"),
    "random bytes": (REFUSED, "tell(5); send(os.urandom(1 << 20))"),
    "invalid utf-8": (REFUSED, "tell(5); send(GOOD.replace(b'fine', b'\\xff\\xfe'))"),
    "nested": (REFUSED, "tell(5); send(b'[' * 1_000_000)"),
    "not a number": (REFUSED, "tell(5); send(GOOD.replace(b'\"fine\"', b'NaN'))"),
    "lone surrogates": (TAKEN, "tell(5); send(GOOD.replace(b'fine', b'\\\\ud800'))"),
    "two documents": (REFUSED, "tell(5); send(GOOD + GOOD)"),
    "without an end": (TAKEN, "tell(5)\nwhile True: send(b' ' * (1 << 20))"),
    "too many commas": (TAKEN, "tell(5); send(b'[' + b'0,' * 2_000_001 + b'0]')"),
    "half a record": (TAKEN, "tell(5); os.write(progress, b'abc'); send(GOOD)"),
    "records out of nowhere": (TAKEN, "tell(5)\nfor n in range(20000): tell(n % 7 + 5, 0xffffffff - n)\nsend(GOOD)"),
    "records of any bytes": (TAKEN, "tell(5)\nfor n in range(2000): os.write(progress, b'\\xff' * 8)\nsend(GOOD)"),
    "interrupts": (TAKEN, "tell(5)\nfor _ in range(5000): tell(3)\nsend(GOOD)"),
    "kills": (TAKEN, "tell(5)\nfor _ in range(5000): tell(4)\nsend(GOOD)"),
    "progress closed": (TAKEN, "tell(5); os.close(progress); send(GOOD)"),
    "result closed": (REFUSED, "tell(5); os.close(result)"),
    "words closed": (TAKEN, "tell(5); os.close(words); send(GOOD)"),
    "stderr without an end": (
        REFUSED,
        "tell(5)\nfor _ in range(500): os.write(2, b'\\xff\\x1b[2J\\n' * 10_000)\nsys.exit(1)",
    ),
    "stderr of one line": (REFUSED, "tell(5); os.write(2, b'x' * 1_000_000); sys.exit(1)"),
    "a crash": (REFUSED, "tell(5); send(GOOD); os.kill(os.getpid(), 11)"),
    "killed": (REFUSED, "tell(5); send(GOOD); os.kill(os.getpid(), 9)"),
    "an exit code": (REFUSED, "tell(5); send(GOOD); sys.exit(3)"),
    "out of memory, it says": (TAKEN, "tell(5); sys.exit(77)"),
    "out of memory": (TAKEN, "tell(5)\nx = []\nwhile True: x.append(bytearray(1 << 24))"),
    "children that stay": (
        TAKEN,
        "tell(5)\nfor _ in range(8):\n    if os.fork() == 0:\n        os.setsid(); time.sleep(3600)\nsend(GOOD)",
    ),
    "it hangs": (TAKEN, "tell(5); send(GOOD); time.sleep(3600)"),
    "it hangs with all closed": (TAKEN, "tell(5); os.closerange(0, 256); time.sleep(3600)"),
    "it waits for words": (TAKEN, "tell(5); tell(4); os.read(words, 64); send(GOOD)"),
    "a small pipe": (TAKEN, "import fcntl\ntell(5); fcntl.fcntl(result, 1031, 4096); send(GOOD)"),
    "it reads its own result": (
        REFUSED,
        "tell(5); own = os.open(f'/proc/self/fd/{result}', os.O_RDONLY | os.O_NONBLOCK); os.write(result, GOOD)\n"
        "while True:\n    try: os.read(own, 1 << 16)\n    except BlockingIOError: break\n",
    ),
    "it makes sockets in the kernel's place": (
        REFUSED,
        "import socket\nos.fchdir(sockets); tell(5); socket.socket(socket.AF_UNIX).bind('k-1'); send(GOOD)",
    ),
}
UNCERTAIN = {"it reads its own result", "out of memory"}
"""Who is quicker decides."""


@pytest.fixture
def take_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """From now on the driver is this program."""
    package = tmp_path / "isolate"
    package.mkdir()
    tmp_path.chmod(0o755)

    def take(program: str) -> None:
        body = "".join(f"    {line}\n" for line in program.splitlines())
        text = f"{PRELUDE}\ndef main(*numbers):\n    global sockets, result, progress, words\n"
        (package / "__init__.py").write_text("")
        (package / "driver.py").write_text(
            f"{text}    sockets, result, progress, words = numbers\n{body}    return 0\n"
        )
        bounds = Limits(wall_seconds=4, memory_bytes=256 * MIB, processes=32, files_bytes=MIB, files_count=64)
        monkeypatch.setattr(rooms, "grader_paths", lambda: [str(tmp_path)])
        monkeypatch.setattr(rooms, "grader_policy", lambda limits: grader_policy(limits).with_visible([tmp_path]))
        monkeypatch.setattr(rooms, "driver_limits", lambda limits: bounds)

    return take


def left() -> tuple[list[str], list[int]]:
    """Descriptors of this process, and its children, dead ones too."""
    descriptors = sorted(os.listdir("/proc/self/fd"), key=int)
    return descriptors, [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


@pytest.fixture
def nothing_is_left() -> Iterator[None]:
    before = left()
    yield
    assert left() == before


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize("name", LIES)
def test_a_driver_that_was_taken_over(name: str, take_over: Callable[[str], None], kernel_policy: Policy) -> None:
    expected, program = LIES[name]
    take_over(program)
    notebook = new_notebook(cells=[new_code_cell("x", id="x"), new_markdown_cell("y", id="y")])
    policy = dataclasses.replace(kernel_policy, limits=Limits(wall_seconds=30))
    sleeper = Kernel([sys.executable, "-S", "-c", "import time; time.sleep(3600)"])
    told: list[tuple[int, str]] = []
    started = time.monotonic()
    outcome = REFUSED
    refused, execution = None, None
    try:
        execution = execute(notebook, sleeper, policy, progress=lambda index, state: told.append((index, state)))
    except SandboxError as error:
        refused = error
    if execution:
        outcome = TAKEN
        nbformat.validate(execution.notebook)
        assert execution.notebook.cells[1] == notebook.cells[1]
        assert list(execution.report.cells) == [0]
    else:
        assert_plain(refused, "driver", "kernel")
    assert outcome == expected or name in UNCERTAIN
    assert all(index < 2 and state in {"started", "finished"} for index, state in told)
    assert time.monotonic() - started < 60
