"""Many sandboxes of every kind, ended in every way; then a table of what this host has now and had before.

    python tests/isolate/soak.py [--sandboxes 2000] [--threads 4] [--without-notebooks] [--json]

Exit code 0 when nothing was left. Runs as any user; knows nothing of tests.

This process is the subreaper of all that it starts, so whatever is left becomes its child and is counted. What others
do on the host meanwhile is told apart by time: a thing is left over when it is new and stays.
"""

import argparse
import collections
import contextlib
import ctypes
import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat

from isolate import landlock
from isolate.environment import environment_policy
from isolate.notebook import Kernel, execute
from isolate.policy import MIB, Bind, Limits, Policy, Report, SandboxError, system_policy
from isolate.sandbox import Command, Sandbox

_PR_SET_CHILD_SUBREAPER = 36
_PATIENCE_SECONDS = 30.0
"""How long what goes by itself may take on a busy host."""
_RSS_TOLERANCE_BYTES = 8 * MIB
_PLACES = ("/tmp", "/var/tmp", "/dev/shm", "/run")


def _run(*argv: str, policy: Policy | None = None, **limits: float) -> Report:
    policy = policy or system_policy()
    bounds = dataclasses.replace(Limits(wall_seconds=60), **limits)  # type: ignore[arg-type]
    command = Command(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with Sandbox(dataclasses.replace(policy, limits=bounds), command) as sandbox:
        return sandbox.wait()


def _python(code: str, **limits: float) -> Report:
    return _run(sys.executable, "-S", "-c", code, policy=_environment(), **limits)


def _environment() -> Policy:
    return environment_policy([Path(sys.executable)])


def _ends(expected: str, report: Report) -> None:
    found = report.limit or report.ended
    if found != expected:
        raise AssertionError(f"expected {expected}, found {report}")


def _killed() -> None:
    with Sandbox(system_policy(), Command(["sleep", "3600"])) as sandbox:
        sandbox.send("kill")
        _ends("killed", sandbox.wait())


def _terminated() -> None:
    with Sandbox(system_policy(), Command(["sleep", "3600"])) as sandbox:
        sandbox.send("terminate")
        sandbox.wait()


def _abandoned() -> None:
    """As an exception in the caller's own code leaves it."""
    with contextlib.suppress(ZeroDivisionError), Sandbox(system_policy(), Command(["sleep", "3600"])):
        raise ZeroDivisionError


def _not_built() -> None:
    policy = dataclasses.replace(system_policy(), read_only=(Bind(Path("/nowhere/at/all")),))
    with contextlib.suppress(SandboxError), Sandbox(policy, Command(["true"])):
        raise AssertionError("a sandbox with a path that is not there was built")


def _not_built_late() -> None:
    """A failure far down the line: what should be unpacked is no archive."""
    with tempfile.TemporaryFile() as file:
        file.write(os.urandom(4096))
        file.seek(0)
        with contextlib.suppress(SandboxError), Sandbox(system_policy(), Command(["true"], archive=file)) as sandbox:
            sandbox.wait()


def _notebook(*sources: str) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    kernel = Kernel([sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"])
    with tempfile.TemporaryFile() as keep:
        execute(notebook, kernel, dataclasses.replace(_environment(), limits=Limits(wall_seconds=90)), keep=keep)


def _kernel_does_not_start() -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")])
    with contextlib.suppress(SandboxError):
        execute(notebook, Kernel(["false"]), _environment())
        raise AssertionError("a kernel that is none was started")


def _in_child(victim: str) -> None:
    done = subprocess.run([sys.executable, __file__, "--kill", victim], capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"{victim} killed: {done.stderr[-2000:]}")


def _landlock(ends: str, *argv: str, **limits: float) -> None:
    """The tier for hosts without namespaces, whose private directory is a real one."""
    if landlock.abi() > 0:
        _ends(ends, _run(*argv, policy=dataclasses.replace(system_policy(), tier="landlock"), **limits))


_STAYS = "import os, time\nfor _ in range(5):\n    if os.fork() == 0:\n        os.setsid()\n        time.sleep(3600)\n"
_HOARDS = (
    "import os, time\nfor _ in range(12):\n    if os.fork() == 0:\n        break\n"
    "hoard = bytearray(b'x') * (16 << 20)\ntime.sleep(3600)\n"
)
ENDS: dict[str, tuple[int, Callable[[], None]]] = {
    "ended": (4, lambda: _ends("exited", _run("true"))),
    "ended with a code": (1, lambda: _ends("exited", _run("sh", "-c", "exit 3"))),
    "no such program": (1, lambda: _ends("exited", _run("/nowhere"))),
    "crashed": (1, lambda: _ends("signal", _run("sh", "-c", "kill -SEGV $$"))),
    "left processes": (2, lambda: _ends("exited", _python(_STAYS))),
    "left files": (1, lambda: _ends("exited", _run("sh", "-c", "head -c 4000000 /dev/zero > ~/x; mkdir -p /tmp/a/b"))),
    "wall limit": (2, lambda: _ends("wall", _run("sleep", "3600", wall_seconds=0.5))),
    "memory limit": (1, lambda: _ends("memory", _python(_HOARDS, memory_bytes=64 * MIB))),
    "cpu limit": (1, lambda: _ends("cpu", _python("while True: pass", cpu_seconds=1))),
    "killed": (2, _killed),
    "terminated": (1, _terminated),
    "abandoned": (1, _abandoned),
    "not built": (1, _not_built),
    "not built, late": (1, _not_built_late),
    "ended (Landlock)": (1, lambda: _landlock("exited", "sh", "-c", "mkdir -p ~/a/b; echo x > /tmp/c; sleep 60 &")),
    "wall limit (Landlock)": (1, lambda: _landlock("wall", "sleep", "3600", wall_seconds=0.5)),
    "launcher killed": (1, lambda: _in_child("launcher")),
    "supervisor killed": (1, lambda: _in_child("supervisor")),
}
NOTEBOOKS: dict[str, tuple[int, Callable[[], None]]] = {
    "notebook": (1, lambda: _notebook("1 + 1")),
    "notebook, kernel died": (1, lambda: _notebook("import os; os._exit(1)")),
    "notebook, kernel did not start": (1, _kernel_does_not_start),
}
"""Name -> how many of each round, and what is done."""


# In a process of their own: who kills the launcher, or the supervisor.


def _become_subreaper() -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")


def _children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def _reap_all(patience: float) -> int:
    """Wait until there is no child any more, ours or fallen to us; how many were still alive after all patience."""
    deadline = time.monotonic() + patience
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return 0
        if pid == 0:
            if time.monotonic() > deadline:
                return len(_children())
            time.sleep(0.01)


def kill_one(victim: str) -> int:
    """Start a sandbox, kill the launcher or the supervisor, and see everybody else go; 0 if they do."""
    _become_subreaper()
    if victim == "launcher":
        with contextlib.suppress(SandboxError), Sandbox(system_policy(), Command(["sleep", "3600"])) as sandbox:
            os.kill(_children()[0], signal.SIGKILL)
            sandbox.wait()
        return _reap_all(_PATIENCE_SECONDS)
    ready, ready_end = os.pipe()
    supervisor = os.fork()
    if supervisor == 0:
        with Sandbox(system_policy(), Command(["sleep", "3600"])):
            os.write(ready_end, b"x")
            signal.pause()
        os._exit(1)
    os.close(ready_end)
    os.read(ready, 1)
    os.kill(supervisor, signal.SIGKILL)
    return _reap_all(_PATIENCE_SECONDS)


# What there is.


def _descriptors() -> collections.Counter[str]:
    found: collections.Counter[str] = collections.Counter()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            found["file" if target.startswith("/") else re.sub(r"\d+", "N", target)] += 1
    return found


def _below() -> dict[int, tuple[str, bool]]:
    """Pid -> name and whether it is dead, of all below this process. proc_pid_stat(5)"""
    children: dict[int, list[tuple[int, str, bool]]] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError):
                head, _, tail = Path(f"/proc/{name}/stat").read_text(errors="replace").rpartition(")")
                state, parent = tail.split()[:2]
                entry = (int(name), head.partition("(")[2], state in "ZX")
                children.setdefault(int(parent), []).append(entry)
    found: dict[int, tuple[str, bool]] = {}
    waiting = [os.getpid()]
    while waiting:
        for pid, comm, is_dead in children.get(waiting.pop(), []):
            waiting.append(pid)
            found[pid] = comm, is_dead
    return found


def _names(path: str, pattern: str = "") -> set[str]:
    """Entries of a directory that this user may list."""
    with contextlib.suppress(OSError):
        return {f"{path}/{name}" for name in os.listdir(path) if re.search(pattern, name)}
    return set()


def _mounts(pid: str) -> set[str]:
    with contextlib.suppress(OSError):
        return set(Path(f"/proc/{pid}/mountinfo").read_text(errors="replace").splitlines())
    return set()


def _groups() -> set[str]:
    """Of launchers of ours and of dead ones: another test's sandbox may run as long as it likes.

    Walked by `os.walk`, which passes by what somebody else's sandbox removes at the moment.
    """
    walked = os.walk("/sys/fs/cgroup")
    found = {f"{where}/{name}" for where, names, _ in walked for name in names if name.startswith("isolate")}
    below = _below()

    def is_anothers(group: str) -> bool:
        with contextlib.suppress(ValueError, OSError):
            pid, began = os.path.basename(group).split("-")[1:3]
            tail = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
            return tail[0] not in "ZX" and tail[19] == began and int(pid) not in below
        return False

    return {group for group in found if not is_anothers(group)}


def _sockets() -> set[str]:
    """Abstract ones that this process or one below it holds: there is none without a holder. unix(7)"""
    held = set()
    for pid in (os.getpid(), *_below()):
        with contextlib.suppress(OSError):
            for name in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    held |= set(re.findall(r"^socket:\[(\d+)\]$", os.readlink(f"/proc/{pid}/fd/{name}")))
    lines = [line.split(maxsplit=7) for line in Path("/proc/net/unix").read_text(errors="replace").splitlines()]
    return {line[7] for line in lines if len(line) == 8 and line[7].startswith("@isolate") and line[6] in held}


HOST: dict[str, Callable[[], set[str]]] = {
    "mounts, ours": lambda: _mounts("self"),
    "mounts, the host's": lambda: _mounts("1"),
    "temporary files": lambda: _names(tempfile.gettempdir()),
    "files in /tmp, /var/tmp, /dev/shm, /run": lambda: set().union(*(_names(place, "isolate") for place in _PLACES)),
    "control groups": _groups,
    "abstract sockets": _sockets,
}


@dataclasses.dataclass(frozen=True)
class Census:
    """Everything that a sandbox could leave."""

    descriptors: collections.Counter[str]
    living: list[str]
    dead: list[str]
    threads: int
    resident_bytes: int
    host: dict[str, set[str]]

    @classmethod
    def take(cls) -> "Census":
        below = [(f"{comm} ({pid})", is_dead) for pid, (comm, is_dead) in _below().items()]
        living, dead = ([name for name, is_dead in below if is_dead is which] for which in (False, True))
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        host = {name: look() for name, look in HOST.items()}
        return cls(_descriptors(), living, dead, threading.active_count(), resident, host)

    def rows(self) -> dict[str, int]:
        kinds = {f"descriptors: {kind}": number for kind, number in sorted(self.descriptors.items())}
        return {
            "descriptors": self.descriptors.total(),
            **kinds,
            "processes": len(self.living),
            "zombies": len(self.dead),
            "threads": self.threads,
            **{name: len(things) for name, things in self.host.items()},
            "resident KiB": self.resident_bytes // 1024,
        }


def _left(before: Census) -> tuple[Census, dict[str, list[str]]]:
    """What is new and stays, after all patience; by name."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    stays: dict[str, set[str]] | None = None
    while True:
        now = Census.take()
        new = {name: now.host[name] - things for name, things in before.host.items()}
        stays = new if stays is None else {name: stays[name] & things for name, things in new.items()}
        left = {name: sorted(things) for name, things in stays.items() if things}
        for name, found, expected in (
            ("processes", now.living, before.living),
            ("zombies", now.dead, before.dead),
            ("descriptors", list(now.descriptors.elements()), list(before.descriptors.elements())),
        ):
            extra = collections.Counter(found) - collections.Counter(expected)
            if extra:
                left[name] = sorted(extra.elements())
        if now.threads > before.threads:
            left["threads"] = [thread.name for thread in threading.enumerate()]
        if not left or time.monotonic() > deadline:
            return now, left
        time.sleep(0.05)


# All of it.


def _plan(with_notebooks: bool) -> Iterator[str]:
    """Names of what is done, over and over, each kind as often as its weight, well mixed."""
    everything = {**ENDS, **(NOTEBOOKS if with_notebooks else {})}
    most = max(weight for weight, _ in everything.values())
    rounds = [name for turn in range(most) for name, (weight, _) in everything.items() if weight > turn]
    return itertools.cycle(rounds)


def _do(names: list[str], threads: int) -> list[str]:
    """Do all of these, several at once; what did not end as it should."""
    everything = {**ENDS, **NOTEBOOKS}

    def one(name: str) -> str | None:
        try:
            everything[name][1]()
        except (AssertionError, SandboxError, OSError, TimeoutError) as error:
            return f"{name}: {error}"
        return None

    with ThreadPoolExecutor(threads) as pool:
        return [wrong for wrong in pool.map(one, names) if wrong]


@dataclasses.dataclass(frozen=True)
class Result:
    """Before and after, and what is wrong."""

    done: collections.Counter[str]
    before: Census
    after: Census
    left: dict[str, list[str]]
    wrong: list[str]
    growth_bytes: int

    @property
    def clean(self) -> bool:
        return not self.left and not self.wrong and self.growth_bytes <= _RSS_TOLERANCE_BYTES

    def table(self) -> str:
        before, after = self.before.rows(), self.after.rows()
        kinds = ", ".join(f"{number} {name}" for name, number in self.done.items())
        lines = [f"{self.done.total()} sandboxes: {kinds}", "", "| what | before | after |", "| --- | ---: | ---: |"]
        lines += [f"| {name} | {before.get(name, 0)} | {after.get(name, 0)} |" for name in {**before, **after}]
        lines += ["", *(f"LEFT {name}: {', '.join(things)}" for name, things in self.left.items())]
        lines += [f"WRONG {words}" for words in self.wrong]
        if self.growth_bytes > _RSS_TOLERANCE_BYTES:
            lines.append(f"GREW by {self.growth_bytes / MIB:.1f} MiB")
        return "\n".join(lines).rstrip()

    def as_dict(self) -> dict[str, object]:
        return {
            "clean": self.clean,
            "done": self.done,
            "before": self.before.rows(),
            "after": self.after.rows(),
            "left": self.left,
            "wrong": self.wrong,
            "growth_bytes": self.growth_bytes,
        }


def soak(sandboxes: int, threads: int, with_notebooks: bool) -> Result:
    """So many sandboxes. Everything is done once before the first count: imports, caches and pools are no leak."""
    _become_subreaper()
    names = list(itertools.islice(_plan(with_notebooks), sandboxes))
    wrong = _do(sorted(set(names)), threads)
    before, _ = _left(Census.take())
    wrong += _do(names[: len(names) // 2], threads)
    half = Census.take().resident_bytes
    wrong += _do(names[len(names) // 2 :], threads)
    after, left = _left(before)
    # The first half may fill what the allocator keeps; from then on it must be flat.
    growth = min(after.resident_bytes - before.resident_bytes, after.resident_bytes - half)
    return Result(collections.Counter(names), before, after, left, wrong, growth)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sandboxes", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--without-notebooks", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--kill", choices=["launcher", "supervisor"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kill:
        return kill_one(options.kill)
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        os.chmod(directory, 0o711)  # where root's sandboxes have a uid of their own, they must get through
        os.environ["TMPDIR"] = tempfile.tempdir = directory
        result = soak(options.sandboxes, options.threads, not options.without_notebooks)
        print(json.dumps(result.as_dict()) if options.json else result.table())
    return 0 if result.clean else 1


if __name__ == "__main__":
    sys.exit(main())
