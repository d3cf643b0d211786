"""Real people for tests of the exchange: Unix users who share groups as at a university, and courses of theirs.

Three students with one primary group, two instructors whose primary group is the course's, and an outsider. Each of
them runs real processes, with an environment of this checkout and of the system's Python that all of them may run.
Made once in a test session and shared by its workers (see `Stage`); users, their processes and files go at its end.

Refuses to know what the exchange does: a `CourseTree` is what an administrator makes before it.
"""

import contextlib
import dataclasses
import fcntl
import functools
import grp
import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from attacks.harness import Stage, eventually, lives, processes
from upstream import run as upstream

PREPARED = "NBGRADER_AALTO_TEST_ENVIRONMENT"
"""Names an environment with everything but this checkout; a copy of it is used, so that no package need be had."""
STUDENTS, INSTRUCTORS, OUTSIDER = ("alice", "bob", "carol"), ("inka", "ivan"), "oscar"
_REPOSITORY = Path(__file__).resolve().parent.parent
_UMASK = 0o022


@dataclasses.dataclass(frozen=True)
class Done:
    """A finished process: exit code, and everything that it wrote to stdout and stderr."""

    code: int
    log: str


@dataclasses.dataclass(frozen=True)
class Member:
    """A real Unix user."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: Path
    interpreter: Path

    def environment(self, **variables: str) -> dict[str, str]:
        """What a login would give, and nothing of the tester's."""
        return {
            "HOME": str(self.home),
            "USER": self.name,
            "LOGNAME": self.name,
            "PATH": os.pathsep.join([str(self.interpreter.parent), "/usr/local/bin", "/usr/bin", "/bin"]),
            "LANG": "C.UTF-8",
            "TMPDIR": str(self.home / "tmp"),
            "JUPYTER_CONFIG_DIR": str(self.home / ".jupyter"),
            "JUPYTER_DATA_DIR": str(self.home / ".local/share/jupyter"),
            "JUPYTER_RUNTIME_DIR": str(self.home / "runtime"),
            **variables,
        }

    def start(
        self,
        *argv: str | Path,
        cwd: Path | None = None,
        umask: int = _UMASK,
        env: Mapping[str, str] | None = None,
        **popen: Any,
    ) -> "subprocess.Popen[str]":
        """A process of this user's, in a session of its own; `env` comes on top of `environment()`.

        stdout and stderr are one pipe, stdin is empty, unless `popen` says otherwise.
        """
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(
            [str(argument) for argument in argv],
            cwd=cwd or self.home,
            umask=umask,
            env=self.environment(**(env or {})),
            user=self.uid,
            group=self.gid,
            extra_groups=list(self.groups),
            start_new_session=True,
            text=True,
            errors="replace",
            **{**options, **popen},
        )

    def run(self, *argv: str | Path, stdin: str | None = None, timeout: float = 120, **how: Any) -> Done:
        """The same, to its end; `stdin` is text. Fails the test if there is none in time."""
        if stdin is not None:
            how["stdin"] = subprocess.PIPE
        process = self.start(*argv, **how)
        try:
            log, _ = process.communicate(stdin, timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill(process)
            log, _ = process.communicate()
            pytest.fail(f"no end within {timeout} s: {argv}\n{(log or '')[-3000:]}")
        except BaseException:
            self.kill(process)
            raise
        return Done(process.returncode, log or "")

    def kill(self, process: "subprocess.Popen[str]", number: int = signal.SIGKILL) -> None:
        """Send a signal to a process of `start` and to all that it started in its session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    def python(self, code: str, *arguments: str | Path, **how: Any) -> Done:
        """Run Python code. `how` as for `run`, here and below."""
        return self.run(self.interpreter, "-P", "-c", code, *arguments, **how)

    def nbgrader(self, *arguments: str | Path, cwd: Path, **how: Any) -> Done:
        """Run `nbgrader ARGUMENTS`."""
        return self.run(self.interpreter, "-P", "-m", "nbgrader", *arguments, cwd=cwd, **how)

    def aalto(self, *arguments: str | Path, cwd: Path, **how: Any) -> Done:
        """Run `nbgrader-aalto ARGUMENTS`."""
        return self.run(self.interpreter, "-P", "-m", "nbgrader_aalto.cli", *arguments, cwd=cwd, **how)

    def directory(self, name: str) -> Path:
        """A new directory in this user's home."""
        path = self.home / name
        path.mkdir(mode=0o755)
        os.chown(path, self.uid, self.gid)
        return path


@dataclasses.dataclass(frozen=True)
class CourseTree:
    """A course as a careful administrator prepares it: directories, and configuration that everybody reads."""

    campus: "Campus"
    name: str
    top: Path
    """Everything of this course; everybody may enter."""

    @property
    def root(self) -> Path:
        """The course directory: 2770, of the first instructor and the course's group."""
        return self.top / f"{self.name} dir"

    @property
    def exchange(self) -> Path:
        """The root of the exchange: root's. The course's directory in it is like `root`, but 2775."""
        return self.top / "exchange"

    @property
    def config_dir(self) -> Path:
        """Holds nbgrader_config.py."""
        return self.top / "etc"

    def env(self) -> dict[str, str]:
        """With this, a process has the course's configuration."""
        return {"JUPYTER_CONFIG_PATH": str(self.config_dir)}

    def configure(self, config: str) -> None:
        """Write nbgrader_config.py anew, with this between the administrator's lines and the plugin's."""
        start = f"""c = get_config()
c.CourseDirectory.course_id = {self.name!r}
c.CourseDirectory.root = {str(self.root)!r}
c.CourseDirectory.groupshared = True
c.Exchange.root = {str(self.exchange)!r}
c.AaltoExchange.group = {self.campus.group!r}
"""
        end = "\nimport nbgrader_aalto\n\nnbgrader_aalto.configure(c)\n"
        path = self.config_dir / "nbgrader_config.py"
        path.write_text(start + config + end, encoding="utf-8")
        path.chmod(0o644)


@dataclasses.dataclass(frozen=True)
class Campus:
    """The people, their groups, and a place for their courses."""

    stage: Stage

    @classmethod
    def open(cls, stage: Stage) -> "Campus":
        """The one of this session, made if need be. Skips where users cannot be made, and says why."""
        campus, top = cls(stage), stage.directory / "campus"
        if os.geteuid() != 0:
            pytest.skip("only root can make Unix users")
        if missing := [name for name in ("useradd", "groupadd", "userdel", "groupdel") if shutil.which(name) is None]:
            pytest.skip(f"no Unix users can be made without {', '.join(missing)}")
        with campus._locked():
            if (top / "refused").exists():
                pytest.skip((top / "refused").read_text())
            if not (top / "ready").exists():
                for path in (top, campus.directory):
                    path.mkdir()
                    path.chmod(0o755)
                try:
                    _build_environment(top)
                except upstream.Trouble as trouble:
                    (top / "refused").write_text(f"no environment for other users: {str(trouble)[-500:]}")
                    pytest.skip((top / "refused").read_text())
                with stage._locked():  # it makes users, too
                    campus._make_people()
                (top / "ready").touch()
        return campus

    @property
    def python(self) -> Path:
        """Everybody may run it; it has nbgrader, JupyterLab and this checkout."""
        return self.stage.directory / "campus/environment/bin/python"

    @property
    def directory(self) -> Path:
        """For courses; everybody may enter."""
        return self.stage.directory / "kurssit ä"

    @property
    def _suffix(self) -> str:
        """Of all names of users and groups, so that sessions at the same time do not meet."""
        return re.sub(r"[^a-z0-9]", "", self.stage.directory.name.lower())[-8:]

    @property
    def group(self) -> str:
        """The instructors'."""
        return f"jupyter-{self._suffix}"

    @functools.cached_property
    def gid(self) -> int:
        """Of `group`."""
        return grp.getgrnam(self.group).gr_gid

    @functools.cached_property
    def students(self) -> tuple[Member, Member, Member]:
        """They share one primary group, and have no other."""
        one, two, three = (self._member(name) for name in STUDENTS)
        return one, two, three

    @functools.cached_property
    def instructors(self) -> tuple[Member, Member]:
        """Their primary group is `group`."""
        one, two = (self._member(name) for name in INSTRUCTORS)
        return one, two

    @functools.cached_property
    def outsider(self) -> Member:
        """Somebody with an account here who has nothing to do with any course."""
        return self._member(OUTSIDER)

    def course(self, name: str, config: str = "") -> CourseTree:
        """A new course with this id; `config` is more of its nbgrader_config.py. The place is a new one each time."""
        tree = CourseTree(self, name, Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.directory)))
        inside = tree.exchange / name
        for path, mode in ((tree.top, 0o755), (tree.config_dir, 0o755), (tree.exchange, 0o755)):
            path.mkdir(exist_ok=True)
            path.chmod(mode)
        for path, mode in ((tree.root, 0o2770), (inside, 0o2775)):
            path.mkdir()
            os.chown(path, self.instructors[0].uid, self.gid)
            path.chmod(mode)
        tree.configure(config)
        return tree

    @property
    def _groups(self) -> Mapping[str, tuple[str, ...]]:
        """Name of each group, and who is in it."""
        return {self.group: INSTRUCTORS, f"students-{self._suffix}": STUDENTS, f"others-{self._suffix}": (OUTSIDER,)}

    def _member(self, name: str) -> Member:
        entry = pwd.getpwnam(f"{name}-{self._suffix}")
        gid = entry.pw_gid
        return Member(entry.pw_name, entry.pw_uid, gid, (gid,), Path(entry.pw_dir), self.python)

    def _make_people(self) -> None:
        for group, names in self._groups.items():
            _account("groupadd", group)
            for name in (f"{name}-{self._suffix}" for name in names):
                home = self.stage.directory / "campus" / name
                options = ["--no-user-group", "--no-create-home", "--gid", group, "--home-dir", str(home)]
                _account("useradd", *options, "--shell", "/bin/sh", name)
                entry = pwd.getpwnam(name)
                for path in (home, home / "tmp"):
                    path.mkdir()
                    path.chmod(0o700)
                    os.chown(path, entry.pw_uid, entry.pw_gid)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """A lock of its own: the environment takes a minute, in which others can use the rest of the stage."""
        with open(self.stage.directory / "campus.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def close(self) -> None:
        """Remove the people and whatever they still run. The files go with the stage."""
        if os.geteuid() != 0 or not (self.stage.directory / "campus").exists():
            return
        with self._locked():
            for group, names in self._groups.items():
                for name in (f"{name}-{self._suffix}" for name in names):
                    with contextlib.suppress(KeyError):
                        uid = pwd.getpwnam(name).pw_uid
                        eventually(lambda: not _killed(uid), 20)  # noqa: B023
                        _account("userdel", name, check=False)
                with contextlib.suppress(KeyError):
                    grp.getgrnam(group)
                    _account("groupdel", group, check=False)


def _killed(uid: int) -> list[int]:
    """All processes of a user, who were sent SIGKILL."""
    found = processes(lambda pid: os.stat(f"/proc/{pid}").st_uid == uid and lives(pid))
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return found


def _account(*command: str, check: bool = True) -> None:
    """Change the lists of users; another test session may have locked them."""

    def run() -> "subprocess.CompletedProcess[str]":
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")

    done = run()

    def over() -> bool:
        nonlocal done
        if "lock" in done.stderr:
            done = run()
        return "lock" not in done.stderr

    eventually(over, 30)
    if check and done.returncode != 0:
        raise OSError(f"{' '.join(command)}: {done.stderr}")


def _build_environment(top: Path) -> None:
    base = upstream.system_python()
    if base is None:
        raise upstream.Trouble("there is no Python in /usr/bin that is new enough")
    if (prepared := os.environ.get(PREPARED)) is None:
        upstream.install(base, top)
        return
    environment = top / "environment"
    shutil.copytree(prepared, environment, symlinks=True, copy_function=_link)
    for script in (environment / "bin").iterdir():
        if not script.is_symlink() and (text := script.read_bytes()).startswith(f"#!{prepared}/".encode()):
            script.unlink()
            script.write_bytes(text.replace(prepared.encode(), os.fsencode(environment), 1))
            script.chmod(0o755)
    (packages,) = (environment / "lib").glob("python3*/site-packages")
    for marker in _REPOSITORY.glob("*/py.typed"):
        copy = packages / marker.parent.name
        shutil.copytree(marker.parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
        subprocess.run([environment / "bin/python", "-m", "compileall", "-q", copy], check=False, umask=_UMASK)
        subprocess.run(["chmod", "-R", "a+rX", copy], check=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # on another file system
        shutil.copy2(source, target)
