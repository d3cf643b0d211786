"""Control groups: where they can be made, what they count, that none is left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from isolate import cgroups
from isolate.policy import Limits, SandboxError, system_policy
from isolate.sandbox import Command, Sandbox

MIB = 1 << 20
LIMITS = {"memory_bytes": 64 * MIB, "files_bytes": 16 * MIB, "processes": 10, "cpu_seconds": 5, "wall_seconds": 20}


class _Launchers:
    """The launchers that this test starts, and their control groups; other tests run at the same time."""

    def __init__(self) -> None:
        self.pids: list[int] = []

    def groups(self) -> list[Path]:
        texts = (Path("/proc/self/cgroup").read_text(), Path("/proc/self/mountinfo").read_text())
        mounts = {Path(hierarchy.mount) for hierarchy in cgroups.hierarchies(*texts)}  # beside ours or above, too
        return [path for mount in mounts for pid in self.pids for path in mount.glob(f"**/isolate-{pid}-*")]


@pytest.fixture
def launchers(monkeypatch: pytest.MonkeyPatch) -> _Launchers:
    found = _Launchers()

    class Recorded(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            found.pids.append(self.pid)

    monkeypatch.setattr("isolate.sandbox.subprocess.Popen", Recorded)
    return found


@pytest.fixture
def group() -> cgroups.Group:
    made = cgroups.create(LIMITS)
    if made is None:
        pytest.skip("this user may not make control groups here")
    return made


def test_what_proc_says_about_hierarchies() -> None:
    mountinfo = """
30 23 0:26 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw,nosuid - cgroup2 cgroup2 rw
32 30 0:28 /docker/abc /sys/fs/cgroup/me\\040mory rw,nosuid - cgroup cgroup rw,memory
33 30 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct
"""
    found = cgroups.hierarchies("9:memory:/docker/abc/x\n4:cpu,cpuacct:/\n3:pids:/\n0::/user.slice", mountinfo)
    assert [(h.version, h.place) for h in found] == [
        (1, "/sys/fs/cgroup/me mory/x"),
        (1, "/sys/fs/cgroup/cpu,cpuacct"),
        (2, "/sys/fs/cgroup/unified/user.slice"),
    ]
    assert cgroups.hierarchies("9:memory:/elsewhere", mountinfo) == []


def test_a_group_counts_and_is_removed(group: cgroups.Group) -> None:
    """A child that enters holds 20 MiB and burns processor time; both are seen from outside."""
    code = f"""
import sys, time
sys.path.append({str(Path(cgroups.__file__).parent.parent)!r})
from isolate import cgroups
group = cgroups.Group({group._version}, {group._directories!r}, {LIMITS!r})
group.add()
held = bytearray(b"x") * (40 << 20)
end = time.process_time() + 0.3
while time.process_time() < end: pass
print("up", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        usage = group.sample()
        assert 20 * MIB < usage.memory_bytes < 60 * MIB
        assert 0.25 < usage.cpu_seconds < 10
        assert usage.limit is None
        assert not group.killed_by_host()
    finally:
        group.remove()
        assert process.wait() == -signal.SIGKILL
        assert process.stdout is not None
        process.stdout.close()
    assert not any(os.path.exists(directory) for directory in group._directories.values())


def test_stale_groups_go_with_the_next_one(group: cgroups.Group, monkeypatch: pytest.MonkeyPatch) -> None:
    place = os.path.dirname(group._directories["memory"])
    stale, fresh_of_living = f"{place}/isolate-1-1", f"{place}/isolate-{os.getpid()}-{cgroups.start_time(os.getpid())}"
    os.mkdir(stale)
    group.remove()
    monkeypatch.setattr(cgroups, "_STALE_SECONDS", -1.0)
    again = cgroups.create(LIMITS)
    try:
        assert again is not None
        assert not os.path.exists(stale)
        assert os.path.exists(fresh_of_living)
    finally:
        if again:
            again.remove()


def test_the_report_says_who_counts(launchers: _Launchers) -> None:
    with Sandbox(system_policy(), Command(["true"])) as sandbox:
        layers = sandbox.wait().layers
    (counted,) = [layer for layer in layers if layer.startswith("limits in total")]
    assert counted.startswith(("limits in total: cgroup v", "limits in total: sampled"))
    assert launchers.pids
    assert launchers.groups() == []


def test_no_group_is_left_when_the_sandbox_cannot_be_built(launchers: _Launchers) -> None:
    policy = system_policy(limits=Limits(files_count=3))  # not enough for the writable places themselves
    with pytest.raises(SandboxError):
        Sandbox(policy, Command(["true"])).__enter__()
    assert launchers.pids
    assert launchers.groups() == []


def test_the_guard_removes_the_group_of_a_killed_launcher(launchers: _Launchers) -> None:
    with Sandbox(system_policy(), Command(["sleep", "60"])) as sandbox:
        if "limits in total: sampled" in sandbox.layers:
            pytest.skip("this user may not make control groups here")
        assert launchers.groups()
        os.kill(launchers.pids[0], signal.SIGKILL)
        with pytest.raises(SandboxError):
            sandbox.wait()
    deadline = time.monotonic() + 10
    while launchers.groups() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert launchers.groups() == []
