"""Run nbgrader's own commands, either one in a process of its own or several after a single import.

`python -m nbgrader submit` takes two seconds to import nbgrader and a tenth of a second to submit.
When twenty students submit, the import is paid once: this file, started as a program, imports nbgrader,
reads a list of jobs from its standard input, and forks one child per job, which runs nbgrader's `main`.
"""

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """One nbgrader command line, and the directory it is run in."""

    arguments: list[str]
    directory: str


class CommandFailed(RuntimeError):
    """An nbgrader command ended with an error; the message holds the end of what it said."""


def run(arguments: Sequence[str], directory: Path, environment: Mapping[str, str], log: Path) -> int:
    """Run `nbgrader ARGUMENTS` in a process of its own, append what it says to log, return its exit code."""
    return _run([sys.executable, "-m", "nbgrader", *arguments], directory, environment, log)


def run_all(jobs: Sequence[Job], directory: Path, environment: Mapping[str, str], log: Path) -> None:
    """Run several nbgrader commands one after the other, with one import. Raises CommandFailed."""
    text = json.dumps([asdict(job) for job in jobs])
    before = log.stat().st_size if log.exists() else 0
    if _run([sys.executable, __file__], directory, environment, log, text) != 0:
        with log.open("rb") as said:
            said.seek(before)
            raise CommandFailed(said.read().decode(errors="replace")[-3000:])


def _run(command: list[str], directory: Path, environment: Mapping[str, str], log: Path, text: str = "") -> int:
    with log.open("a") as out:
        process = subprocess.Popen(
            command,
            cwd=directory,
            env=dict(environment),
            text=True,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        try:
            process.communicate(text)
        except BaseException:  # Ctrl-C: whatever the command has started in its session ends with it
            os.killpg(process.pid, signal.SIGTERM)
            _end(process)
            raise
    return process.returncode


def _end(process: subprocess.Popen[str], seconds: float = 3.0) -> None:
    """Wait until a process that has been asked to end has ended; kill its session if it takes too long."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _fork(job: Job) -> int:
    """Run one job in a child and return its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        from nbgrader.apps.nbgraderapp import main

        os.chdir(job.directory)
        sys.argv = ["nbgrader", *job.arguments]
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001 - the child must never return into the parent's loop
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _main() -> int:
    import nbgrader.apps.nbgraderapp  # noqa: F401 - the import that the children share

    for job in (Job(**values) for values in json.load(sys.stdin)):
        print("$ nbgrader", *job.arguments, flush=True)
        if code := _fork(job):
            print(f"failed with exit code {code}: nbgrader {' '.join(job.arguments)}", flush=True)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
