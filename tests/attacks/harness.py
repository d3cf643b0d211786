"""Who attacks, with what, and how the outside looks meanwhile: the tools that all attack tests share.

Everything that a test session makes on the host (an environment that everybody may enter, a Unix user, places
for canaries) lies in or is named after one `Stage`, and goes when the controller ends the session.
"""

import base64
import contextlib
import dataclasses
import fcntl
import grp
import json
import os
import platform
import pwd
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

_REPOSITORY = Path(__file__).resolve().parent.parent.parent
_REQUIREMENTS = ("nbclient", "jupyter_client", "nbformat", "ipykernel", "traitlets", "pyseccomp")
_MINIMUM = (3, 11)
LONG = 60.0
"""Seconds: far more than anything here takes."""

PRELUDE = '''
import ctypes, errno, json, os, platform, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def attempt(call, *arguments, **named):
    """`ok`, or the name of the error."""
    try:
        call(*arguments, **named)
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error.errno))
    return "ok"
def syscall(number, *arguments):
    arguments = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    if libc.syscall(ctypes.c_long(number), *arguments) >= 0:
        return "ok"
    return errno.errorcode[ctypes.get_errno()]
def native(x86_64, aarch64):
    return {"x86_64": x86_64, "aarch64": aarch64}[platform.machine()]
def say(**values):
    print("\\nsaid " + json.dumps(values), flush=True)
'''
"""What every probe starts with, inside and outside of a sandbox."""

_PROBE = """
import sys
code = sys.argv.pop(1)
exec(compile(code, "<string>", "exec"), globals())
"""
"""A module that a template can turn into: what `python -c` does with its words."""


@dataclasses.dataclass(frozen=True)
class Person:
    """Who runs the supervisor."""

    name: str
    uid: int
    gid: int
    home: Path

    @property
    def is_root(self) -> bool:
        return self.uid == 0

    def credentials(self) -> dict[str, Any]:
        """Arguments for `subprocess` so that the process is this person's."""
        if os.geteuid() != 0 or self.is_root:
            return {}
        return {"user": self.uid, "group": self.gid, "extra_groups": []}


class Stage:
    """One directory for everything of a session; safe to use from several test workers at once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        # One user for each test worker: a limit on a user's processes (RLIMIT_NPROC) counts those of all workers.
        self._prefix = "attack-" + re.sub(r"[^a-z0-9]", "", directory.name.lower())[-12:]
        self.user_name = self._prefix + "-" + os.environ.get("PYTEST_XDIST_WORKER", "gw0")

    @classmethod
    def new(cls) -> "Stage":
        directory = Path(tempfile.mkdtemp(prefix="attacks-"))
        directory.chmod(0o755)
        return cls(directory)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.directory / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def environment(self) -> Path:
        """An interpreter that every user may run, with what `isolate` and a kernel need. Skips if impossible."""
        python = self.directory / "env/bin/python"
        with self._locked():
            if (self.directory / "env-refused").exists():
                pytest.skip((self.directory / "env-refused").read_text())
            if not (self.directory / "env-ready").exists():
                try:
                    self._build_environment(python)
                except subprocess.CalledProcessError as error:
                    words = f"no environment for other users: {error.stderr[-500:]}"
                    (self.directory / "env-refused").write_text(words)
                    pytest.skip(words)
                (self.directory / "env-ready").touch()
        return python

    def _build_environment(self, python: Path) -> None:
        base = _system_python()
        if base is None:
            pytest.skip(f"no Python of at least {_MINIMUM} that every user may run")
        quiet: dict[str, Any] = {"check": True, "umask": 0o022, "capture_output": True, "text": True}
        if prepared := os.environ.get("ISOLATE_TEST_ENVIRONMENT"):  # where no package can be had: see tests/vm
            shutil.copytree(prepared, python.parent.parent, symlinks=True)
        else:
            virtualenv = [sys.executable, "-m", "virtualenv", "--quiet", "--no-periodic-update", "-p", base]
            subprocess.run([*virtualenv, "--app-data", self.directory / "app-data", python.parent.parent], **quiet)
            pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
            subprocess.run([*pip, *_REQUIREMENTS], **quiet)
        (packages,) = (python.parent.parent / "lib").glob("python3*/site-packages")
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(_REPOSITORY / "isolate", packages / "isolate", ignore=ignore)
        shutil.copy(Path(__file__).with_name("runner.py"), self.directory / "runner.py")
        (self.directory / "probe").mkdir()
        (self.directory / "probe/isolate_probe.py").write_text(_PROBE)
        subprocess.run([python, "-m", "compileall", "-q", packages], check=False, umask=0o022)
        for path in (packages / "isolate", self.directory / "probe", self.directory / "runner.py"):
            subprocess.run(["chmod", "-R", "a+rX", path], check=True)

    def user(self) -> Person:
        """An ordinary Unix user who exists only for this session; without root, ourselves."""
        if os.geteuid() != 0:
            entry = pwd.getpwuid(os.geteuid())
            return Person(entry.pw_name, entry.pw_uid, entry.pw_gid, Path(entry.pw_dir))
        with self._locked():
            try:
                entry = pwd.getpwnam(self.user_name)
            except KeyError:
                home = self.directory / f"home-{self.user_name}"
                subprocess.run(
                    ["useradd", "--system", "--user-group", "--create-home", "--home-dir", home, self.user_name],
                    check=True,
                    capture_output=True,
                )
                entry = pwd.getpwnam(self.user_name)
        return Person(entry.pw_name, entry.pw_uid, entry.pw_gid, Path(entry.pw_dir))

    def close(self) -> None:
        """Remove the users of all workers, whatever they still run, and all files."""
        for entry in pwd.getpwall():
            if os.geteuid() == 0 and entry.pw_uid != 0 and entry.pw_name.startswith(f"{self._prefix}-"):
                for pid in processes(lambda pid: os.stat(f"/proc/{pid}").st_uid == entry.pw_uid):  # noqa: B023
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                subprocess.run(["userdel", entry.pw_name], check=False, capture_output=True)
                with contextlib.suppress(KeyError):
                    grp.getgrnam(entry.pw_name)
                    subprocess.run(["groupdel", entry.pw_name], check=False, capture_output=True)
        shutil.rmtree(self.directory, ignore_errors=True)


def _system_python() -> str | None:
    for name in ("/usr/bin/python3", *(f"/usr/bin/python3.{minor}" for minor in range(30, 10, -1))):
        if not os.path.exists(name):
            continue
        check = f"import sys; sys.exit(sys.version_info < {_MINIMUM})"
        if subprocess.run([name, "-I", "-c", check], check=False, capture_output=True).returncode == 0:
            return name
    return None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a sandboxed command ended: the report, or the error that says why there was no sandbox."""

    report: Mapping[str, Any] | None
    error: Mapping[str, Any] | None
    output: str
    kept: Mapping[str, Any]

    @property
    def said(self) -> dict[str, Any]:
        """What the probe told by `say`. The last word counts."""
        words = [line[5:] for line in self.output.splitlines() if line.startswith("said ")]
        assert words, f"the probe said nothing: {self.report} {self.error} {self.output[-2000:]}"
        value: dict[str, Any] = json.loads(words[-1])
        return value

    @property
    def limit(self) -> str | None:
        """The limit that ended it; fails when there was no sandbox or no report."""
        assert self.error is None, self.error
        assert self.report is not None
        return self.report["limit"]


class Running:
    """A supervisor that is still at work."""

    def __init__(self, process: subprocess.Popen[bytes], end: Path) -> None:
        self.process, self._end = process, end
        self._heard = b""

    def hear(self, word: str, seconds: float = LONG) -> str:
        """Wait until the sandboxed command has written this."""
        assert self.process.stderr is not None
        os.set_blocking(self.process.stderr.fileno(), False)
        deadline = time.monotonic() + seconds
        while word.encode() not in self._heard:
            assert time.monotonic() < deadline, f"not heard in time: {self._heard!r}"
            block = self.process.stderr.read()
            assert block != b"", f"it ended: {self._heard!r}"
            if block is None:
                time.sleep(0.02)
            else:
                self._heard += block
        return self._heard.decode(errors="replace")

    def finish(self, seconds: float = LONG) -> dict[str, Any]:
        try:
            _, errors = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            pytest.fail(f"the supervisor did not end within {seconds} s")
        text = self._end.read_text(encoding="utf-8")
        assert text, f"the supervisor failed: {(self._heard + (errors or b''))[-3000:].decode(errors='replace')}"
        result: dict[str, Any] = json.loads(text)
        return result


class SafetyNet:
    """A control group for probes behind a wall that has no limits, so that they cannot hurt this host.

    It holds processes and memory down and ends what is left. Only root can make one; without, such probes are skipped.
    """

    _LIMITS: Mapping[str, Mapping[str, str]] = {
        "memory": {"memory.limit_in_bytes": str(1 << 30)},
        "pids": {"pids.max": "300"},
    }

    def __init__(self, name: str) -> None:
        self._groups: list[Path] = []
        if os.geteuid() != 0:
            pytest.skip("no safety net for another wall: only root can make a control group")
        for controller, limits in self._LIMITS.items():
            group = self._own_group(controller) / f"attacks-{name}"
            try:
                group.mkdir()
                self._groups.append(group)
                for file, value in limits.items():
                    (group / file).write_text(value)
            except OSError as error:
                self.close()
                pytest.skip(f"no safety net for another wall: {group}: {error.strerror} (control groups v1 are needed)")

    @staticmethod
    def _own_group(controller: str) -> Path:
        """Below our own group, whose limits so hold for the probes too. cgroups(7)"""
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                return Path(f"/sys/fs/cgroup/{controller}") / path.lstrip("/")
        return Path("/sys/fs/cgroup/none")

    def catch(self, pid: int) -> None:
        for group in self._groups:
            (group / "cgroup.procs").write_text(str(pid))

    def _caught(self) -> set[int]:
        return {int(pid) for group in self._groups for pid in (group / "cgroup.procs").read_text().split()}

    def close(self) -> None:
        """Kill until nobody is left, then remove the groups."""

        def emptied() -> bool:
            for pid in self._caught():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not self._caught()

        assert eventually(emptied, 20), f"processes that cannot be killed in {self._groups}"
        for group in self._groups:
            eventually(lambda: _removed(group), 5)  # noqa: B023
        self._groups.clear()


def _removed(group: Path) -> bool:
    with contextlib.suppress(OSError):
        group.rmdir()
    return not group.exists()


class Attacker:
    """Runs probes as one person, inside sandboxes and (for the control) outside."""

    def __init__(
        self, stage: Stage, person: Person, directory: Path, wall: str = "isolate", warm: bool = False
    ) -> None:
        self.stage, self.person, self.directory = stage, person, directory
        self.wall = wall
        """What the probes run behind: ours, or another one to compare with (see `compare`)."""
        self.warm = warm
        """Whether Python in sandboxes is forked from a template, which the runner starts first."""
        self.python = stage.environment()
        self.token = "canary" + secrets.token_hex(12)
        """In the supervisor's environment, and free to be put elsewhere. Nobody inside may ever know it."""
        self.temporary = self.make_directory("temporary")
        self._running: list[subprocess.Popen[bytes]] = []
        self._elsewhere: list[Path] = []
        self._net = None if self.is_ours else SafetyNet(directory.name)

    @property
    def is_ours(self) -> bool:
        return self.wall == "isolate"

    def make_directory(self, name: str) -> Path:
        path = self.directory / name
        path.mkdir(parents=True)
        self.give(path)
        return path

    def write(self, path: Path, text: str, mode: int = 0o644) -> Path:
        """A file of this person's."""
        path.write_text(text, encoding="utf-8")
        path.chmod(mode)
        self.give(path)
        return path

    def give(self, path: Path) -> None:
        os.chown(path, self.person.uid, self.person.gid)

    def elsewhere(self, name: str) -> Path:
        """A directory of this person's that no writable place of a sandbox would cover."""
        path = Path(tempfile.mkdtemp(prefix=f"{name}-", dir="/var/tmp"))
        path.chmod(0o755)
        self.give(path)
        self._elsewhere.append(path)
        return path

    def _environment(self) -> dict[str, str]:
        return {
            "PATH": os.defpath,
            "HOME": str(self.person.home),
            "TMPDIR": str(self.temporary),
            "JUPYTERHUB_API_TOKEN": self.token,
            "LANG": "C.UTF-8",
        }

    def start(self, argv: Sequence[str], **job: Any) -> Running:
        """A supervisor with a job, see `runner`."""
        if ("notebooks" in job or self.warm) and not self.is_ours:
            pytest.skip("n/a: another wall does not execute notebooks")
        end = self.directory / f"end-{secrets.token_hex(4)}"
        self.write(end, "")
        job = {
            "argv": list(argv),
            "python": str(self.python),
            "end": str(end),
            "wall": self.wall,
            "warm": self.warm,
            **job,
        }
        runner = [job.pop("supervisor", str(self.python)), "-B", "-P", str(self.stage.directory / "runner.py")]
        process = subprocess.Popen(
            [*self._prefix(), *runner],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**self._environment(), **job.pop("supervisor_env", {})},
            cwd=self.temporary,
            start_new_session=not self.is_ours,  # so that a probe which kills its process group ends there
            **(self.person.credentials() if self.is_ours else {}),
        )
        self._running.append(process)
        assert process.stdin is not None
        if self._net is not None:
            self._net.catch(process.pid)
        process.stdin.write(json.dumps(job).encode())
        process.stdin.close()
        process.stdin = None
        return Running(process, end)

    def _prefix(self) -> list[str]:
        """Behind another wall, host names and SysV ids are nobody's: what a probe leaves of them goes with it."""
        if self.is_ours:
            return []
        ids = ["--reuid", str(self.person.uid), "--regid", str(self.person.gid), "--clear-groups"]
        return ["unshare", "--ipc", "--uts", "--", "setpriv", *ids, "--"]

    def python_argv(self, code: str, *arguments: str) -> list[str]:
        return [str(self.python), "-c", PRELUDE + code, *arguments]

    def start_code(self, code: str, *arguments: str, **job: Any) -> Running:
        if self.warm:  # a forked process shows the template's command line and environment, see `marked`
            job["env"] = {**job.get("env", {}), "ARGUMENTS": " ".join(arguments)}
        return self.start(self.python_argv(code, *arguments), live=True, **job)

    def run(self, code: str, *arguments: str, **job: Any) -> Outcome:
        """Python code in a sandbox, to its end."""
        return self.run_argv(self.python_argv(code, *arguments), **job)

    def run_argv(self, argv: Sequence[str], **job: Any) -> Outcome:
        job.setdefault("limits", {})
        job["limits"] = {"wall_seconds": 30, "cpu_seconds": 20, "memory_bytes": 512 << 20, **job["limits"]}
        result = self.start(argv, **job).finish()
        output = base64.b64decode(result["output"]).decode(errors="replace")
        return Outcome(result["report"], result["error"], output, result.get("kept", {}))

    def notebooks(self, *notebooks: Sequence[str], **job: Any) -> list[dict[str, Any]]:
        """Execute notebooks, given as sources of their cells; outputs, report and error of each."""
        job.setdefault("limits", {})
        job["limits"] = {"wall_seconds": 60, "cpu_seconds": 40, "memory_bytes": 1 << 30, **job["limits"]}
        result = self.start([], notebooks=[list(cells) for cells in notebooks], **job).finish(2 * LONG)
        ends: list[dict[str, Any]] = result["notebooks"]
        return ends

    def control(self, code: str, *arguments: str) -> dict[str, Any]:
        """The same Python code without a sandbox, as the same person: shows that the probe can find something."""
        done = subprocess.run(
            self.python_argv(code, *arguments),
            env=self._environment(),
            cwd=self.temporary,
            capture_output=True,
            timeout=LONG,
            check=False,
            **self.person.credentials(),
        )
        return Outcome(None, None, (done.stdout + done.stderr).decode(errors="replace"), {}).said

    def close(self) -> None:
        """End what still runs and remove all files; nothing here may stop the rest."""
        for process in self._running:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stderr is not None:
                process.stderr.close()
        if self._net is not None:
            self._net.close()
        for path in (self.directory, *self._elsewhere):
            shutil.rmtree(path, ignore_errors=True)


def processes(wanted: Callable[[int], bool]) -> list[int]:
    """Pids on this host for which it holds."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError):
                if wanted(int(name)):
                    found.append(int(name))
    return found


def lives(pid: int) -> bool:
    """A zombie does not: who adopted it reaps it when it comes to it. proc_pid_stat(5)"""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def marked(marker: str) -> list[int]:
    """Living processes whose command line or environment holds this word; zombies have neither."""

    def holds(pid: int) -> bool:
        for name in ("cmdline", "environ"):
            with contextlib.suppress(PermissionError), open(f"/proc/{pid}/{name}", "rb") as file:
                if marker.encode() in file.read():
                    return True
        return False

    return processes(holds)


def eventually(what: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether it becomes true in time."""
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def known_hole(reason: str) -> pytest.MarkDecorator:
    """The attack succeeds today. Fails as soon as it does not, so that this mark goes with the hole."""
    return pytest.mark.xfail(strict=True, reason=f"known hole: {reason}")


def mostly_as_user(
    name: str, cases: Iterable[str], *as_root: str, holes: Mapping[str, str] | None = None
) -> pytest.MarkDecorator:
    """Parametrise by `name`: every case as the ordinary user, and where it hardly matters only some as root.

    `holes` are the cases that succeed today, with what they are.
    """
    pairs = [("user", case) for case in cases] + [("root", case) for case in as_root]
    marks = {case: known_hole(reason) for case, reason in (holes or {}).items()}
    parameters = [pytest.param(who, case, marks=marks.get(case, ())) for who, case in pairs]
    return pytest.mark.parametrize(("person", name), parameters, indirect=["person"])


x86_64_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="machine code of x86_64")
