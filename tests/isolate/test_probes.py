"""How probes are performed, and that they can tell a layer that holds from one that does not."""

import dataclasses
import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isolate import room, syscalls
from isolate.policy import Limits
from isolate.probes import PROBES, Wrong, answer_of, expect_refusal, forked, in_child, read_status

PERFORM = {probe.layer: probe.perform for probe in PROBES}


class TestPerforming:
    def test_one_that_hangs_is_ended(self) -> None:
        def hang() -> str:
            time.sleep(60)
            return "never"

        before = time.monotonic()
        assert forked(hang, 0.2) == {"refused": "it took longer than 0.2 s", "errno": 0}
        assert time.monotonic() - before < 10

    def test_one_that_dies(self) -> None:
        def die() -> str:
            os.kill(os.getpid(), 9)
            return "never"

        assert "without a word" in forked(die)["refused"]

    def test_the_error_of_a_child_of_a_child(self) -> None:
        def inner() -> str:
            raise OSError(errno.EROFS, "read-only")

        assert forked(lambda: in_child(inner)) == {"refused": "read-only", "errno": errno.EROFS}

    def test_the_error_of_a_step(self) -> None:
        def build() -> str:
            with room.step("devices", "open one"):
                raise OSError(errno.ENOENT, "not there")

        answer = answer_of(build)
        assert answer["errno"] == errno.ENOENT
        assert answer["refused"].startswith("open one: ")

    def test_a_fault_of_ours_is_told(self) -> None:
        assert "the probe itself failed: ZeroDivisionError" in answer_of(lambda: str(1 // 0))["refused"]

    def test_what_is_not_refused_is_told(self) -> None:
        with pytest.raises(Wrong, match="was possible"):
            expect_refusal(errno.EPERM, lambda: None, "it was possible")
        with pytest.raises(Wrong, match="No such file"):
            expect_refusal(errno.EPERM, lambda: os.stat("/nowhere/at/all"), "it was possible")

    def test_the_status_of_a_process(self, tmp_path: Path) -> None:
        assert read_status()["Pid"] == str(os.getpid())
        assert read_status(tmp_path / "none") == {}


class TestProbes:
    def test_every_need_is_a_layer_before(self) -> None:
        known = {"", "libseccomp"}
        for probe in PROBES:
            assert probe.needs in known
            known.add(probe.layer)

    def test_a_view_that_is_not_locked_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In the namespace that made the mounts, the same remount succeeds: the probe can tell the difference."""
        uid = 1_879_048_200 if os.geteuid() == 0 else None

        def without_the_second_namespace() -> str:
            unshare = syscalls.unshare
            calls = iter([unshare, lambda flags: None])
            monkeypatch.setattr(syscalls, "unshare", lambda flags: next(calls)(flags))
            monkeypatch.setattr(room, "write_id_maps", _once(room.write_id_maps))
            return PERFORM["locked mounts"]({"uid": uid, "gid": uid})

        answer = forked(without_the_second_namespace)
        assert answer["refused"] == "the read-only view could be made writable again", answer

    def test_the_control_group_is_removed(self) -> None:
        answer = answer_of(lambda: PERFORM["limits in total"]({"limits": dataclasses.asdict(Limits())}))
        assert answer.get("detail", "").startswith("cgroup v") or "no control group" in answer["refused"]
        assert not list(Path("/sys/fs/cgroup").glob(f"**/isolate-{os.getpid()}-*"))


def _once(call: Callable[..., None]) -> Callable[..., None]:
    calls = iter([call])
    return lambda *arguments: next(calls, _nothing)(*arguments)


def _nothing(*_: Any) -> None:
    return None
