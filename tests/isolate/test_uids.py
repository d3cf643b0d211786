"""Leases of unprivileged uids: one holder each, gone with the holder's process."""

import contextlib
import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from isolate import uids
from isolate.policy import SandboxError

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root has other uids to give")
PACKAGE = Path(uids.__file__).parents[1]


@pytest.mark.skipif(os.geteuid() == 0, reason="for an ordinary user")
def test_an_ordinary_user_has_no_other_uid() -> None:
    with uids.lease() as lease:
        assert lease is None


@root_only
def test_leases_are_distinct_and_nobodys() -> None:
    with contextlib.ExitStack() as stack:
        leases = [stack.enter_context(uids.lease()) for _ in range(50)]
        numbers = {lease.uid for lease in leases if lease}
    assert len(numbers) == 50
    for number in numbers:
        assert number >= 1000
        with pytest.raises(KeyError):
            pwd.getpwuid(number)


@root_only
def test_threads_get_distinct_leases() -> None:
    def hold(_: int) -> list[int]:
        with contextlib.ExitStack() as stack:
            leases = [stack.enter_context(uids.lease()) for _ in range(20)]
            return [lease.uid for lease in leases if lease]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(hold, range(8)))
    assert all(len(set(numbers)) == 20 for numbers in found)


@pytest.fixture
def one_candidate(monkeypatch: pytest.MonkeyPatch) -> int:
    """Only one uid to choose from, so that who holds it decides; another one in each test process."""
    number = 1_879_048_192 + (1 << 20) + os.getpid()
    monkeypatch.setattr(uids, "usable_ids", lambda: range(number, number + 1))
    return number


@root_only
def test_a_held_uid_is_not_given_again(one_candidate: int) -> None:
    with uids.lease() as lease:
        assert lease
        assert lease.uid == one_candidate
        with pytest.raises(SandboxError, match="no free uid"), uids.lease():
            pass
    with uids.lease() as again:
        assert again
        assert again.uid == one_candidate


@contextlib.contextmanager
def holder_of(number: int, inherit: bool = False) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds a lease; with `inherit`, a child of it holds the descriptor too."""
    code = f"""
import subprocess, sys
from isolate import uids
uids.usable_ids = lambda: range({number}, {number} + 1)
with uids.lease() as lease:
    if {inherit}:
        subprocess.Popen(['sleep', '60'], pass_fds=[lease.holder], stdout=subprocess.DEVNULL)
    print(lease.uid, flush=True)
    sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(PACKAGE)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        assert process.stdout
        assert process.stdout.readline() == f"{number}\n"
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@root_only
def test_freed_when_its_process_is_killed(one_candidate: int) -> None:
    with holder_of(one_candidate) as process:
        with pytest.raises(SandboxError), uids.lease():
            pass
        process.kill()
        process.wait()
        with uids.lease() as lease:
            assert lease
            assert lease.uid == one_candidate


@root_only
def test_kept_while_a_process_that_uses_the_uid_lives(one_candidate: int) -> None:
    with holder_of(one_candidate, inherit=True) as process:
        process.kill()
        process.wait()
        with pytest.raises(SandboxError), uids.lease():
            pass


@root_only
def test_candidates_are_mapped_here() -> None:
    candidates = uids.usable_ids()
    mapped = []
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        first, _, count = map(int, line.split())
        mapped.append(range(first, first + count))
    assert any(candidates[0] in ids and candidates[-1] in ids for ids in mapped)
    assert 0 not in candidates
    assert 65_534 not in candidates
