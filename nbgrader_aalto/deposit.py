"""Puts a student's files where instructors can read them and other students cannot.

Theory of operation. In a directory that is setgid and of the course's group, what is made with a umask of 007 comes
out as 2770 and 0660, of the student and of that group. The umask must be there before mkdir(2): a chmod(2) by
somebody who is not in the group would take the setgid bit away. Where the bit is missing, the group would be the
student's own, often that of all students: so the group is looked at before anything is written.

The umask belongs to a process, and nbgrader's Assignment List submits inside of the Jupyter server. So the work is
done in a thread that has left its process' umask for one of its own, unshare(2) with CLONE_FS, which asks for no
privilege. Where that is forbidden (Docker's seccomp profile) it is done in a process of its own, with one JSON request
on stdin and one JSON answer on stdout; starting that takes longer than all the rest.

Makes directories with names that its caller chose at random and copies one tree; refuses to know what a submission is.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from isolate import syscalls
from nbgrader_aalto import trees

UMASK = 0o007
_CLONE_FS = 0x200
"""linux/sched.h: working directory, root and umask."""
_PROGRAM = "import sys; sys.path.append(sys.argv[1]); from nbgrader_aalto.deposit import main; sys.exit(main())"


class DepositError(Exception):
    """Nothing was left in the directory; the text says why."""


@dataclasses.dataclass(frozen=True)
class Deposit:
    """A directory that was made: what is in it, what was left out, and the newest ctime in it (ns since 1970)."""

    files: tuple[trees.FileEntry, ...]
    directories: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    newest_ns: int


def make(directory: Path, name: str, *, hidden: bool) -> None:
    """Make an empty directory `name` in `directory`, which is `hidden` from everybody outside of the latter's group.

    Raises `DepositError`.
    """
    _request({"directory": str(directory), "name": name, "hidden": hidden})


def copy(
    directory: Path,
    name: str,
    source: Path,
    selection: trees.Selection,
    limits: trees.TreeLimits,
    held: int,
    *,
    hidden: bool,
) -> Deposit:
    """The same with a copy of `source`. Keeps `held` open meanwhile. Raises `DepositError`; then it is not there."""
    answer = _request(
        {
            "directory": str(directory),
            "name": name,
            "hidden": hidden,
            "source": str(source),
            "selection": dataclasses.asdict(selection),
            "limits": dataclasses.asdict(limits),
        },
        (held,),
    )
    return Deposit(
        tuple(trees.FileEntry(**file) for file in answer["files"]),
        tuple(answer["directories"]),
        tuple((path, why) for path, why in answer["left_out"]),
        answer["newest_ns"],
    )


def _request(request: dict[str, Any], held: tuple[int, ...] = ()) -> dict[str, Any]:
    with concurrent.futures.ThreadPoolExecutor(1, "deposit") as thread:  # it ends with the block
        answer = thread.submit(_in_this_thread, request).result()
    if answer is None:
        answer = _in_a_child(request, held)
    if "error" in answer:
        raise DepositError(answer["error"])
    return answer


def _in_this_thread(request: dict[str, Any]) -> dict[str, Any] | None:
    """None where a thread cannot have a umask of its own."""
    try:
        syscalls.unshare(_CLONE_FS)
    except OSError:
        return None
    os.umask(UMASK)
    return _answer(request)


def _in_a_child(request: dict[str, Any], held: tuple[int, ...]) -> dict[str, Any]:
    # -P, and ours last on the path: a `json.py` in a student's working directory is no part of Python.
    # -S: installed packages are not needed, and looking for them takes a quarter of the time.
    command = [sys.executable, "-P", "-S", "-c", _PROGRAM, str(Path(__file__).parents[1])]
    done = subprocess.run(command, input=json.dumps(request).encode(), capture_output=True, check=False, pass_fds=held)
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        words = done.stderr.decode(errors="replace").strip().splitlines()
        raise DepositError(
            f"the copying process ended with code {done.returncode}: {(words or ['no word'])[-1]}"
        ) from None
    return answer


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """With the umask set. What fails is told, not raised: it may have to go to another process."""
    try:
        return _carry_out(request)
    except trees.Unfit as error:
        return {"error": str(error)}
    except OSError as error:
        return {"error": f"{error.filename or 'the copy'}: {error.strerror}"}


def _carry_out(request: dict[str, Any]) -> dict[str, Any]:
    directory, name = request["directory"], request["name"]
    with trees.reached(directory) as parent:
        os.mkdir(name, 0o777, dir_fd=parent)
        try:
            if request["hidden"]:
                with trees.opened(name, dir_fd=parent) as made:
                    _refuse_other_group(directory, os.fstat(parent).st_gid, os.fstat(made).st_gid)
            if "source" not in request:
                return {}
            with trees.opened(request["source"]) as source, trees.opened(name, dir_fd=parent) as target:
                selection = {key: tuple(value) for key, value in request["selection"].items()}
                limits = trees.TreeLimits(**request["limits"])
                copied = trees.copy_tree(source, target, trees.Selection(**selection), limits, own=True)
                newest = trees.survey(target, limits).newest_ns
        except BaseException:
            with contextlib.suppress(OSError):
                shutil.rmtree(name, dir_fd=parent)
            raise
    return {
        "files": [dataclasses.asdict(file) for file in copied.files],
        "directories": copied.directories,
        "left_out": copied.left_out,
        "newest_ns": newest,
    }


def _refuse_other_group(directory: str, wanted: int, found: int) -> None:
    if found != wanted:
        raise trees.Unfit(
            f"what is made in {directory} belongs to your own group (gid {found}) and not to the course's ({wanted}), "
            "so that others could read it. Please tell your instructor to run `nbgrader-aalto course repair`"
        )


def main() -> int:
    """Answer the one request."""
    os.umask(UMASK)
    print(json.dumps(_answer(json.load(sys.stdin))))
    return 0
