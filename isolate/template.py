"""What runs in a base instead of a room, to fork rooms from: an interpreter that has imported what kernels import.

    launcher --(socket)--> template (here)          one thread, no capability in force, nothing of any job
                             \\_ outer               forked for one job: takes its uid, makes the room's namespaces
                                  \\_ room's init    as in `isolate.room`
                                       \\_ kernel    turns into the program without an execve

Its command line and environment are those of its kernels, since whoever is forked shows them. It reads no file but
modules and hears nothing but jobs. A job's plan, archive and sockets come by descriptors, which only the forked
process reads. A package that asks for IPython's shell while it is imported cannot be imported beforehand, because
there is none yet, and one that writes or warns is to do so in the notebook: the template starts again without them.

Standard library only, for any Python from 3.9; its source and that of `isolate.room` come through a descriptor, since
a course's environment does not have this package.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import re
import signal
import site
import socket
import sys
import sysconfig
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from isolate import room, syscalls

SOURCE, STATE, JOBS, HOST_PROC, BOX = 3, 4, 5, 6, 7
"""Descriptors that the template starts with."""
_MAX_MESSAGE_BYTES, _MAX_DESCRIPTORS = 1 << 20, 64
_SHELLS = "IPython.core.getipython"
_ASK_AGAIN = frozenset({"matplotlib.pyplot"})
"""Modules that ask for the shell when imported and again when they need it: pyplot does in `switch_backend`."""


def main() -> NoReturn:
    """Import, say so, and fork until there is nobody to fork for."""
    with open(STATE, encoding="utf-8", closefd=False) as file:
        state: dict[str, Any] = json.load(file)
    box = socket.socket(fileno=BOX)
    with room.report_failures(box):
        caps = (syscalls.CAP_SETGID, syscalls.CAP_SETUID) if state["changes_uid"] else ()
        syscalls.hold_capabilities(*caps)
        sys.path[:] = [*state["paths"], *(entry for entry in sys.path if entry)]
        os.environ.update(state["variables"])
        refused = _import_all(state["imports"], state["kernel_imports"])
        if refused:
            _start_again(state, refused, caps)
        with contextlib.suppress(Exception):
            exec(state["rehearsal"], {"__name__": "rehearsal"})  # the nursery's own
        for name in state["variables"]:
            if name not in state["environment"]:
                del os.environ[name]
        if state["lasting"] and (elsewhere := _imported_from_elsewhere(state["paths"])):
            raise room.BuildError("template", f"{elsewhere} is not a package of the environment, and may be edited")
        if (threads := _threads()) != 1:
            raise room.BuildError("template", f"{threads} threads run after importing {', '.join(state['imports'])}")
        gc.collect()
        gc.freeze()
        os.close(SOURCE)
        os.close(STATE)
        room.send_event(box, "ready", layers=state["layers"])
    box.close()
    with socket.socket(fileno=JOBS) as jobs:
        _serve(jobs, state)
    os._exit(0)


def _imported_from_elsewhere(paths: list[str]) -> str | None:
    """A module that is neither of the standard library nor installed: whoever edits it leaves no mark there."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    places = {*paths, *map(sysconfig.get_path, names), *site.getsitepackages()}
    places |= {os.path.realpath(place) for place in places}
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and not any(file.startswith(place + os.sep) for place in places):
            return name
    return None


def _threads() -> int:
    """Of this process, as the kernel counts them. proc(5)"""
    task = os.open("self/task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=HOST_PROC)
    try:
        return len(os.listdir(task))
    finally:
        os.close(task)


def _import_all(names: list[str], kernel_imports: list[str]) -> list[str]:
    """Import what can be imported. Those that asked for the shell, or said something and are not the kernel's."""
    refused = []
    for name in names:
        said = _bytes_said()
        with _warning_as_in_a_notebook(), _watching_for_shells() as asked, contextlib.suppress(Exception):
            __import__(name)  # warnings for who imports are for this module then
        if (asked and name not in _ASK_AGAIN) or (_bytes_said() > said and name not in kernel_imports):
            refused.append(name)
    return refused


@contextlib.contextmanager
def _warning_as_in_a_notebook() -> Iterator[None]:
    """Which shows warnings of deprecation, too, where they are for itself. What an import filters stays filtered."""
    warnings.filterwarnings("default", category=DeprecationWarning, module=re.escape(__name__))
    entry = warnings.filters[0]
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            warnings.filters.remove(entry)  # type: ignore[attr-defined]
        warnings._filters_mutated()  # type: ignore[attr-defined]


def _bytes_said() -> int:
    """In stdout and stderr, which are a file while the template starts."""
    sys.stdout.flush()
    sys.stderr.flush()
    return os.fstat(1).st_size


@contextlib.contextmanager
def _watching_for_shells() -> Iterator[list[bool]]:
    """A list that is no longer empty when somebody asked IPython for its shell. The function stays the same object."""
    asked: list[bool] = []
    module = sys.modules.get(_SHELLS)
    if module is None:
        yield asked
        return
    function = module.get_ipython
    code = function.__code__
    vars(module)["_isolate_asked"] = asked  # the code below runs with the module's globals
    function.__code__ = (lambda: _isolate_asked.append(True)).__code__  # type: ignore[name-defined]  # noqa: F821
    try:
        yield asked
    finally:
        function.__code__ = code
        del vars(module)["_isolate_asked"]


def _start_again(state: dict[str, Any], refused: list[str], caps: tuple[int, ...]) -> NoReturn:
    state["imports"] = [name for name in state["imports"] if name not in refused]
    os.ftruncate(STATE, 0)
    os.pwrite(STATE, json.dumps(state).encode(), 0)
    for descriptor in (SOURCE, STATE):
        os.lseek(descriptor, 0, os.SEEK_SET)
    for descriptor in (SOURCE, STATE, JOBS, HOST_PROC, BOX):
        os.set_inheritable(descriptor, True)
    syscalls.hold_capabilities(*caps, effective=True, across_exec=True)
    os.execvpe(state["argv"][0], state["argv"], state["environment"])


def _serve(jobs: socket.socket, state: dict[str, Any]) -> None:
    """One message for each job: names of the descriptors that come with it. An empty one: the launcher has ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    own_pid = os.getpid()
    while True:
        message, descriptors, _, _ = socket.recv_fds(jobs, _MAX_MESSAGE_BYTES, _MAX_DESCRIPTORS)
        if not message:
            return
        if os.fork() == 0:
            jobs.close()
            _become_room(dict(zip(json.loads(message), descriptors)), own_pid, state)  # noqa: B905  # not in 3.9
        for descriptor in descriptors:
            os.close(descriptor)


def _become_room(found: dict[str, int], template: int, state: dict[str, Any]) -> NoReturn:
    """In the forked process: be this job's, and only this job's."""
    box = socket.socket(fileno=found["box"])
    with room.report_failures(box):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        lifeline = socket.socket(fileno=found["lifeline"])
        lifeline.send(b"here")  # with our credentials, by which the launcher knows our pid
        with open(found["plan"], "rb") as file:
            file.seek(0)  # the job's launcher has read it through the same open file
            plan: room.Plan = json.load(file)
        answer = lifeline.recv(4096)
        if not answer:
            os._exit(1)
        plan.update(json.loads(answer))
        if plan["diagnostics_fd"] is not None:
            plan["diagnostics_fd"] = found["diagnostics"]
        for name in ("archive", "keep"):
            plan[f"{name}_fd"] = found.get(name)
        plan["pass_fds"] = [descriptor for name, descriptor in found.items() if name.startswith("pass")]
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            os.dup2(found[name], number)
            os.close(found[name])
        if state["changes_uid"]:
            with room.step("unprivileged user", "take the uid of this sandbox"):
                syscalls.hold_capabilities(syscalls.CAP_SETGID, syscalls.CAP_SETUID, effective=True)
                os.setresgid(plan["gid"], plan["gid"], plan["gid"])
                os.setresuid(plan["uid"], plan["uid"], plan["uid"])
        syscalls.set_dumpable(True)  # else the id maps cannot be written
        # Of the template: when it ends, so do we. After the uid: a change of credentials clears it. prctl(2)
        syscalls.set_parent_death_signal(signal.SIGKILL)
        if os.getppid() != template:
            os._exit(1)
        room.run_outer(plan, box, HOST_PROC, state["layers"], _program(state["program"]), lifeline)
    os._exit(1)


def _program(name: str) -> Callable[[room.Plan], NoReturn]:
    def become(plan: room.Plan) -> NoReturn:
        words, descriptors = plan["argv"], plan["pass_fds"]
        plan.clear()
        syscalls.set_dumpable(True)  # as execve(2) would: the room's init is not, and is in another process
        _restore_signals()
        importlib.invalidate_caches()
        numpy_random = sys.modules.get("numpy.random")
        if numpy_random is not None:
            numpy_random.seed()
        module, _, function = name.partition(":")
        if function:
            _run(lambda: sys.exit(getattr(sys.modules[module], function)(*descriptors)))
        import runpy

        sys.argv = ["-c", *words]
        _run(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True))

    return become


def _restore_signals() -> None:
    """As an interpreter does when it starts: Python/pylifecycle.c, `init_signals`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)


def _run(program: Callable[[], object]) -> NoReturn:
    """To its end, and with what an interpreter does at its own: threads, exit functions, buffers."""
    code = 0
    try:
        program()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001  # there is no caller to return to
        traceback.print_exc()
        code = 1
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()
    os._exit(code & 0xFF)
