"""Runs commands as real Unix users, each in a process of its own, without importing nbgrader for each of them.

For each person there is a process of that person's which has imported nbgrader, and forks for every order. Importing
takes a second or two; the commands themselves hardly any. What importing does, and how the commands are started, is not
tried here: `campus.Member` starts them as a person does.
"""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from campus import Done, Member

_CLERK = """
import json, os, signal, sys, tempfile, time
import nbgrader.api, nbgrader.apps.nbgraderapp, nbgrader.dbutil
from alembic.script import ScriptDirectory
import nbgrader_aalto.cli, nbgrader_aalto.exchange, nbgrader_aalto.execute, nbgrader_aalto.intake
from nbgrader.apps.nbgraderapp import NbGraderApp

# for each new gradebook nbgrader would start alembic's command, which takes longer than everything else here
version = ScriptDirectory(nbgrader.dbutil.ALEMBIC_DIR).get_current_head()
nbgrader.api.get_alembic_version = lambda: version

def carry_out(order):
    os.umask(order["umask"]); os.chdir(order["cwd"])
    os.environ.clear(); os.environ.update(order["env"])
    tempfile.tempdir = None
    exec(order["first"], {})
    if order["program"] == "nbgrader":
        NbGraderApp.launch_instance(argv=order["argv"])
        return 0
    sys.argv = ["nbgrader-aalto", *order["argv"]]
    return nbgrader_aalto.cli.main(order["argv"])

for line in sys.stdin:
    order = json.loads(line)
    log = tempfile.TemporaryFile()
    pid = os.fork()
    if pid == 0:
        os.dup2(log.fileno(), 1); os.dup2(log.fileno(), 2); os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.setpgid(0, 0)
        code = 1
        try:
            code = carry_out(order)
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
    if order["kill_after"] is not None:
        time.sleep(order["kill_after"])
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    log.seek(0)
    print(json.dumps([status, log.read().decode(errors="replace")]), flush=True)
"""


class Clerks:
    """One for each person who gave an order; they end with the session."""

    def __init__(self) -> None:
        self._at_work: dict[str, subprocess.Popen[str]] = {}

    def nbgrader(self, who: Member, *argv: str | Path, cwd: Path, **how: Any) -> Done:
        """As `Member.nbgrader`. `how`: see `_order`."""
        return self._order(who, "nbgrader", argv, cwd, **how)

    def aalto(self, who: Member, *argv: str | Path, cwd: Path, **how: Any) -> Done:
        """As `Member.aalto`."""
        return self._order(who, "nbgrader-aalto", argv, cwd, **how)

    def _order(
        self,
        who: Member,
        program: str,
        argv: tuple[str | Path, ...],
        cwd: Path,
        *,
        env: Mapping[str, str] | None = None,
        umask: int = 0o022,
        first: str = "",
        kill_after: float | None = None,
    ) -> Done:
        """`first` is Python code that the process runs before the command.

        It is killed, with all that it started, after so many seconds, if any are given.
        """
        order = {
            "program": program,
            "argv": [str(argument) for argument in argv],
            "cwd": str(cwd),
            "env": who.environment(**(env or {})),
            "umask": umask,
            "first": first,
            "kill_after": kill_after,
        }
        clerk = self._clerk(who)
        assert clerk.stdin is not None
        assert clerk.stdout is not None
        clerk.stdin.write(json.dumps(order) + "\n")
        clerk.stdin.flush()
        answer = clerk.stdout.readline()
        if not answer:
            pytest.fail(f"the clerk of {who.name} is gone")
        return Done(*json.loads(answer))

    def _clerk(self, who: Member) -> "subprocess.Popen[str]":
        if who.name not in self._at_work:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stderr": None, "cwd": Path("/")}
            self._at_work[who.name] = who.start(who.interpreter, "-P", "-c", _CLERK, **pipes)
        return self._at_work[who.name]

    def close(self) -> None:
        """All are gone afterwards."""
        for clerk in self._at_work.values():
            clerk.communicate(timeout=60)
