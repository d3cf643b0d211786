"""The driver room's parts: the budget, the guarded channel, the depth of values, the document."""

import asyncio
import json
import os
import queue
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq
import zmq.asyncio
from hypothesis import given, settings
from hypothesis import strategies as st
from jupyter_client.session import Session

from isolate import driver
from isolate.driver import Budget, Driver, GuardedChannel
from isolate.outputs import parse_document

KEY = b"a key of this test"


def take(budget: Budget, size: int) -> int:
    return budget.take(size, decides=False)


def test_a_cell_gets_its_share_and_no_more() -> None:
    budget = Budget(10, 100)
    budget.start_cell()
    assert take(budget, 10) == 10
    assert not budget.cut
    assert take(budget, 1) == 0
    assert budget.cut
    budget.start_cell()
    assert not budget.cut
    assert take(budget, 10) == 10


def test_the_head_of_the_first_that_is_too_large_and_nothing_after_it() -> None:
    budget = Budget(10, 100)
    budget.start_cell()
    assert take(budget, 4) == 4
    assert take(budget, 11) == 6
    assert take(budget, 1) == 0
    assert not budget.lost


def test_the_notebook_ends_the_budget_too() -> None:
    budget = Budget(10, 15)
    for expected in (10, 5, 0):
        budget.start_cell()
        assert sum(take(budget, 1) for _ in range(20)) == expected


def test_what_decides_over_points_is_wanted_after_the_cut() -> None:
    budget = Budget(10, 100)
    budget.start_cell()
    assert take(budget, 11) == 10
    assert budget.take(500, decides=True) == 500
    assert take(budget, 1) == 0
    assert not budget.lost


def test_what_decides_is_bounded_too_and_its_loss_is_known() -> None:
    budget = Budget(10, 100)
    budget.start_cell()
    taken = 0
    while budget.take(10_000, decides=True):
        taken += 10_000
        assert taken < 10_000_000
    assert budget.lost
    assert budget.cut
    budget.start_cell()
    assert not budget.lost


@given(st.lists(st.lists(st.integers(0, 50), max_size=8), max_size=8), st.integers(1, 60), st.integers(1, 200))
def test_never_more_than_the_bounds(cells: list[list[int]], cell_bytes: int, total_bytes: int) -> None:
    budget, total = Budget(cell_bytes, total_bytes), 0
    for sizes in cells:
        budget.start_cell()
        taken = sum(take(budget, size) for size in sizes)
        assert taken <= cell_bytes
        assert budget.cut or taken == sum(sizes)
        total += taken
    assert total <= total_bytes


@pytest.mark.parametrize(
    ("kind", "content", "expected"),
    [
        ("error", {}, True),
        ("execute_result", {}, True),
        ("stream", {"name": "stderr", "text": ""}, True),
        ("stream", {"name": "stdout", "text": ""}, False),
        ("display_data", {}, False),
    ],
)
def test_which_messages_decide(kind: str, content: dict[str, str], expected: bool) -> None:
    session = Session(key=KEY)
    _, parts = session.feed_identities(session.serialize(session.msg(kind, content)))
    assert driver.decides(parts[1], parts[4]) is expected


class Wire:
    """A guarded channel and the kernel's end of it, both in this process."""

    def __init__(self, budget: Budget | None = None) -> None:
        self.context = zmq.asyncio.Context()
        self.kernel = Session(key=KEY)
        self.sender = self.context.socket(zmq.PAIR)
        receiver = self.context.socket(zmq.PAIR)
        self.sender.bind("inproc://wire")
        receiver.connect("inproc://wire")
        self.channel = GuardedChannel(receiver, Session(key=KEY), asyncio.get_running_loop())
        self.channel.budget = budget

    async def send(self, kind: str, content: Any, **keywords: Any) -> None:
        await self.raw(self.kernel.serialize(self.kernel.msg(kind, content, **keywords)))

    async def raw(self, frames: list[bytes]) -> None:
        await self.sender.send_multipart(frames)

    async def received(self) -> list[str]:
        """What arrives until nothing does: the contents' `n`, or the type of the message."""
        found = []
        while True:
            try:
                message = await self.channel.get_msg(timeout=0.2)
            except queue.Empty:
                return found
            found.append(message["content"].get("n", message["msg_type"]))

    def close(self) -> None:
        self.context.destroy(linger=0)


def on_the_wire(scenario: Callable[[Wire], Any], budget: Budget | None = None) -> Any:
    async def run() -> Any:
        wire = Wire(budget)
        try:
            return await scenario(wire)
        finally:
            wire.close()

    return asyncio.run(run())


def test_an_ordinary_message_arrives() -> None:
    async def scenario(wire: Wire) -> list[str]:
        await wire.send("stream", {"n": 1})
        return await wire.received()

    assert on_the_wire(scenario) == [1]


def test_an_empty_channel_says_so_in_time() -> None:
    async def scenario(wire: Wire) -> float:
        started = time.monotonic()
        with pytest.raises(queue.Empty):
            await wire.channel.get_msg(timeout=0.1)
        return time.monotonic() - started

    assert 0.09 <= on_the_wire(scenario) < 10


HOSTILE: dict[str, Callable[[Session], list[bytes]]] = {
    "nothing": lambda session: [b""],
    "no delimiter": lambda session: [b"a", b"b"],
    "only a delimiter": lambda session: [b"<IDS|MSG>"],
    "too few frames": lambda session: session.serialize(session.msg("stream", {}))[:4],
    "wrong signature": lambda session: Session(key=b"another").serialize(session.msg("stream", {"n": 0})),
    "no signature": lambda session: Session(key=b"").serialize(session.msg("stream", {"n": 0})),
    "content is a list": lambda session: signed(session, content=b"[]"),
    "content is null": lambda session: signed(session, content=b"null"),
    "content is a number": lambda session: signed(session, content=b"5"),
    "content is not JSON": lambda session: signed(session, content=b"{"),
    "content is too deep to parse": lambda session: signed(
        session, content=b'{"n":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    ),
    "content is deeper than an output": lambda session: signed(
        session, content=b'{"n":' + b"[" * 70 + b"]" * 70 + b"}"
    ),
    "content is a huge number": lambda session: signed(session, content=b'{"n": ' + b"9" * 10_000 + b"}"),
    "header is a list": lambda session: signed(session, header=b"[]"),
    "header is empty": lambda session: signed(session, header=b"{}"),
    "header is null": lambda session: signed(session, header=b"null"),
    "header's type is a number": lambda session: signed(session, header=b'{"msg_id": 1, "msg_type": 5}'),
    "header's date is odd": lambda session: signed(
        session, header=b'{"msg_id": "1", "msg_type": "stream", "date": "9999999999-99"}'
    ),
    "parent is a list": lambda session: signed(session, parent=b"[]"),
    "parent is null": lambda session: signed(session, parent=b"null"),
    "metadata is a list": lambda session: signed(session, metadata=b"[1]"),
}


def signed(session: Session, **parts: bytes) -> list[bytes]:
    """A message with a right signature over wrong parts: student code holds the key."""
    frames = session.serialize(session.msg("stream", {"n": 0}))
    place = {"header": 2, "parent": 3, "metadata": 4, "content": 5}
    for name, value in parts.items():
        frames[place[name]] = value
    frames[1] = session.sign(frames[2:6])
    return frames


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_message_is_passed_over(name: str) -> None:
    async def scenario(wire: Wire) -> list[str]:
        await wire.raw(HOSTILE[name](wire.kernel))
        await wire.send("stream", {"n": "after"})
        return await wire.received()

    found = on_the_wire(scenario)
    assert found[-1] == "after"
    if name not in {"metadata is a list", "header's date is odd"}:  # nothing of these is ever used
        assert found == ["after"]


@given(st.lists(st.binary(max_size=30), min_size=1, max_size=8), st.booleans())
@settings(max_examples=50, deadline=None)
def test_any_frames_are_passed_over(frames: list[bytes], with_delimiter: bool) -> None:
    async def scenario(wire: Wire) -> list[str]:
        await wire.raw([b"<IDS|MSG>", *frames] if with_delimiter else frames)
        await wire.send("stream", {"n": "after"})
        return [(await wire.channel.get_msg(timeout=10))["content"]["n"]]

    assert on_the_wire(scenario) == ["after"]


def test_what_is_over_the_budget_does_not_arrive_whole() -> None:
    budget = Budget(2000, 10_000)
    budget.start_cell()

    async def scenario(wire: Wire) -> list[Any]:
        await wire.send("stream", {"name": "stdout", "text": "first"})
        await wire.send("stream", {"name": "stdout", "text": "ä" * 10_000})
        await wire.send("stream", {"name": "stdout", "text": "third"})
        await wire.send("status", {"execution_state": "idle"})
        found = []
        while not found or found[-1]["msg_type"] != "status":
            found.append(await wire.channel.get_msg(timeout=10))
        return [message["content"].get("text") for message in found]

    texts = on_the_wire(scenario, budget)
    assert texts[0] == "first"
    assert texts[-1] is None
    assert all(set(text) == {"ä"} and len(text) <= 2000 for text in texts[1:-1])
    assert budget.cut


def test_a_large_status_counts_like_anything_else() -> None:
    budget = Budget(2000, 10_000)
    budget.start_cell()

    async def scenario(wire: Wire) -> list[str]:
        await wire.send("status", {"execution_state": "busy", "padding": "x" * 5000})
        await wire.send("status", {"execution_state": "idle"})
        return await wire.received()

    assert on_the_wire(scenario, budget) == ["status"]


def test_a_stream_that_calls_itself_status_does_not_pass_for_free() -> None:
    budget = Budget(1000, 10_000)
    budget.start_cell()

    async def scenario(wire: Wire) -> list[str]:
        for number in range(20):
            await wire.send("stream", {"n": number, "text": "x" * 50}, header=None, metadata={"a": '"status"'})
        return await wire.received()

    assert len(on_the_wire(scenario, budget)) < 5


@pytest.fixture
def made() -> Iterator[Callable[..., Driver]]:
    """Drivers without a kernel."""
    ends = os.pipe()

    def make(*sources: str, **settings_: Any) -> Driver:
        settings_ = {"allow_errors": True, "store_widget_state": True, "record_timing": True} | settings_
        job = {
            "cells": [{"source": source, "run": True, "timeout": 1} for source in sources],
            "settings": settings_,
            "connection": {
                "transport": "ipc",
                "ip": "k",
                "key": "x",
                "signature_scheme": "hmac-sha256",
                "shell_port": 1,
            },
            "interrupt_mode": "signal",
            "cell_output_bytes": 100,
            "output_bytes": 1000,
            "document_bytes": 1_000_000,
        }
        return Driver(job, ends[1], ends[0])

    yield make
    for end in ends:
        os.close(end)


def test_progress_records_are_fixed_in_size() -> None:
    assert driver.PROGRESS.size == 8
    assert struct.calcsize(driver.PROGRESS.format) == 8


def test_the_document_of_a_driver_can_be_read(made: Callable[..., Driver]) -> None:
    made_driver = made("1", "2")
    made_driver.result["cells"][0] = {"ended": "ok", "cut": True}
    cell = made_driver.runner.nb.cells[0]
    cell.outputs = [
        {
            "output_type": "display_data",
            "metadata": {"a": float("nan")},
            "data": {"application/json": {"x": float("inf"), 1: "\ud800"}},
        }
    ]
    cell.execution_count = 4
    text = made_driver.document()
    assert b"NaN" not in text
    result = parse_document(text)
    assert set(result["cells"]) == {0}
    assert result["cells"][0]["cut"] is True
    assert result["cells"][0]["execution_count"] == 4
    assert result["cells"][0]["outputs"][0]["data"]["application/json"] == {"x": None, "1": "?"}


def test_a_widget_state_that_is_too_large_is_left_out(made: Callable[..., Driver]) -> None:
    made_driver = made("1")
    made_driver.runner.reset_execution_trackers()
    made_driver.runner.widget_state["a"] = {"_model_name": "X", "value": "small"}
    made_driver._keep_widget_state()
    assert json.loads(made_driver.document())["widgets"]
    made_driver.result["widgets"] = None
    made_driver.runner.widget_state["b"] = {"_model_name": "X", "value": "x" * 5_000_000}
    made_driver._keep_widget_state()
    assert json.loads(made_driver.document())["widgets"] is None


def test_a_document_that_grew_is_cut_but_its_errors_stay(made: Callable[..., Driver]) -> None:
    made_driver = made("1", "2")
    stream = {"output_type": "stream", "name": "stdout", "text": "\0" * 500_000}  # six bytes each as JSON
    error = {"output_type": "error", "ename": "E", "evalue": "v", "traceback": []}
    for index, cell in enumerate(made_driver.runner.nb.cells):
        cell.outputs = [stream, error] if index == 0 else [{**stream, "text": "short"}]
        made_driver.result["cells"][index] = {"ended": "ok", "cut": False}
    text = made_driver.document()
    assert len(text) <= 1_000_000
    cells = parse_document(text)["cells"]
    assert [output.output_type for output in cells[0]["outputs"]] == ["error"]
    assert [cells[index]["cut"] for index in (0, 1)] == [True, False]
    assert cells[1]["outputs"][0].text == "short"


def test_the_error_of_a_reply_is_recorded_once(made: Callable[..., Driver]) -> None:
    runner = made("1").runner
    cell = runner.nb.cells[0]
    reply = {"content": {"status": "error", "ename": "E", "evalue": "v", "traceback": []}}
    for _ in range(2):
        runner.on_error_in_reply(cell=cell, cell_index=0, execute_reply=reply)
    assert [output.ename for output in cell.outputs] == ["E"]
    assert "showtraceback was disabled" in cell.outputs[0].traceback[0]
    runner.on_error_in_reply(cell=cell, cell_index=0, execute_reply={"content": {"status": "ok"}})
    assert len(cell.outputs) == 1


def test_the_drivers_own_start_does_without_parsers_that_it_does_not_need() -> None:
    code = "import sys, isolate.driver; print('lark' in sys.modules, sys.modules.get('rfc3987_syntax', 0))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout == "False 0\n"
