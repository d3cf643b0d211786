"""Warm kernels: forked, already in their sandbox, from a template that has imported what they would import first.

Theory of operation
-------------------
A `Nursery` belongs to one owner, say one run of autograde, and keeps templates: one for each way of starting a kernel
(interpreter, environment variables, view, imports), and one for the driver rooms. A template starts on first use,
is replaced when packages were installed, and ends with the nursery, with its owner's process, or unused.

It imports what every kernel imports late, then what its owner asks for, and does once what each process would do for
the first time (`rehearsal`). No student's code ever runs in a template.

Where a template cannot be had, the kernel starts cold, in the same two rooms, and `start` of the report says why.
What is the same in all kernels of a template, and is not in cold ones: the seed of hash() of strings, and the addresses
of what was loaded. numpy's global generator is seeded anew for each kernel, and `random` does so by itself.
"""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import os
import select
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from isolate import landlock, room, sockets, syscalls, template, workdir
from isolate.environment import find_executable, grader_paths, prefixes_of, python_module
from isolate.policy import GIB, Limits, Policy, SandboxError
from isolate.sandbox import Command, Sandbox, TemplateProgram, last_words
from isolate.uids import Lease

IDLE_SECONDS = 300.0
_KERNEL_MODULES = ("ipykernel_launcher", "ipykernel")
_KERNEL_IMPORTS = """
ipykernel.kernelapp ipykernel.debugger IPython.core.completerlib IPython.core.oinspect IPython.core.logger
IPython.core.debugger pdb IPython.extensions.storemagic tornado.locks tornado.platform.asyncio tornado.queues
faulthandler gc resource runpy sqlite3
""".split()
"""What an ipykernel has imported when its first cell runs; one that a version does not have is left out."""
_KERNEL_REHEARSAL = """
from ipykernel.kernelapp import IPKernelApp
from IPython.core.inputtransformer2 import TransformerManager
IPKernelApp().parse_command_line([])
TransformerManager().transform_cell("a = 1\\n")
"""
"""Fills caches of compiled expressions and of traits; the objects are dropped."""
_DRIVER_REHEARSAL = "import nbformat; nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell()])"
"""Has nbformat compile its schema."""
_DRIVER_IMPORTS = ("isolate.driver",)
_VARIABLES = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
"""What ipykernel sets before a notebook can import anything: ipykernel/kernelapp.py, `init_gui_pylab`."""
_NOT_YET = "there is no template yet"
_COLD_SECONDS = 300.0
"""How long not to try again to make a template that could not be had."""
_LAST_SECONDS = 5.0
_TEND_SECONDS = 5.0
"""How long it may go unnoticed that another template was missed."""
_FOREVER = 10.0 * 365 * 86400
_START = f"exec(open({template.SOURCE}, closefd=False).read())"
_LOADER = """
def load():
    import sys, types
    package = types.ModuleType("isolate")
    package.__path__ = []
    sys.modules["isolate"] = package
    for name, text in MODULES.items():
        module = types.ModuleType("isolate." + name)
        sys.modules[module.__name__] = module
        setattr(package, name, module)
        exec(compile(text, "<isolate." + name + ">", "exec"), module.__dict__)
    for name in ("isolate", *("isolate." + name for name in MODULES)):
        del sys.modules[name]
    return module
main = load().main
del load, MODULES
main()
"""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One way to start a kernel or a driver: all that a template has to share with what is forked from it."""

    python: Sequence[str]
    """The interpreter and its options."""
    policy: Policy
    program: str
    imports: Sequence[str]
    paths: Sequence[str] = ()
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    share_at: str | None = None
    rehearsal: str = ""
    """Python that the template runs after its imports, so that it need not be done for the first time in each."""

    @property
    def key(self) -> str:
        view = [[*_identity(bind.source), str(bind.target)] for bind in self.policy.read_only]
        hidden = [_identity(path) for path in self.policy.hidden]
        environment = dict(self.policy.environment)
        shown = [view, hidden, environment, sorted(self.files), self.share_at]
        parts = [list(self.python), self.program, list(self.imports), *shown, _stamps(self.python[0])]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _identity(path: os.PathLike[str]) -> list[Any]:
    """Which file it is. A view shows the one that was there: not one that has its name since, nor does it mask that."""
    try:
        status = os.stat(path)
    except OSError:
        return [os.fspath(path)]
    return [os.fspath(path), status.st_dev, status.st_ino]


def _stamps(python: str) -> list[list[Any]]:
    """What changes when packages are installed or removed: times of the directories that hold them."""
    if not all(map(os.path.exists, _stamped(python))):
        _stamped.cache_clear()
    return [[path, os.stat(path).st_mtime_ns] for path in _stamped(python)]


@functools.lru_cache(maxsize=64)
def _stamped(python: str) -> tuple[str, ...]:
    """Found once: it takes longer than all else that a kernel needs of us."""
    patterns = ("pyvenv.cfg", "lib/python3*/site-packages", "lib/python3/dist-packages", "conda-meta")
    prefixes = prefixes_of(find_executable(python))
    return tuple(str(path) for prefix in prefixes for pattern in patterns for path in sorted(prefix.glob(pattern)))


class _Template:
    """A running one. Closed with its stack; raises `SandboxError` when it cannot be had."""

    def __init__(self, recipe: Recipe, lasting: bool) -> None:
        self.lost = False
        """Whether it has been found to be gone."""
        with contextlib.ExitStack() as stack:
            source = stack.enter_context(open(os.memfd_create("isolate-source"), "w+b"))
            source.write(_source().encode())
            source.seek(0)
            words = stack.enter_context(open(os.memfd_create("isolate-words"), "w+b"))
            state = {
                "argv": [*recipe.python, "-c", _START],
                "environment": dict(recipe.policy.environment),
                "variables": dict(recipe.variables),
                "paths": list(recipe.paths),
                "imports": list(recipe.imports),
                "kernel_imports": list(_KERNEL_IMPORTS),
                "program": recipe.program,
                "rehearsal": recipe.rehearsal,
                "lasting": lasting,
            }
            program = TemplateProgram(source, state, recipe.files, IDLE_SECONDS)
            limits = Limits(_FOREVER, _FOREVER, memory_bytes=4 * GIB)
            policy = dataclasses.replace(recipe.policy, limits=limits)
            sandbox = Sandbox(
                policy, Command([], template=program, share_at=recipe.share_at, stdout=words, stderr=words)
            )
            try:
                self.sandbox = stack.enter_context(sandbox)
            except SandboxError as error:
                words.seek(0)
                said = last_words(words.read(1 << 16))
                cause = error.cause if error.layer == "template" else str(error)
                raise SandboxError("template", cause + (f"; it said: {said}" if said else "")) from error
            self._stack = stack.pop_all()

    @property
    def ended(self) -> bool:
        """Whether it has ended: by itself, unused for long or killed, or because it was closed."""
        return self.lost or self.wait(0)

    def wait(self, seconds: float) -> bool:
        """Whether it ends meanwhile."""
        poll = select.poll()
        try:
            poll.register(self.sandbox, select.POLLIN)
        except ValueError:  # closed
            return True
        return bool(poll.poll(1000 * seconds))

    def close(self) -> None:
        self._stack.close()


def _source() -> str:
    """The template's program with the modules that it needs."""
    modules = {
        module.__name__.rpartition(".")[2]: inspect.getsource(module)
        for module in (syscalls, landlock, sockets, workdir, room, template)
    }
    return f"MODULES = {modules!r}\n{_LOADER}"


class Nursery:
    """Templates of one owner; a context manager. May be used by several threads at once."""

    patient = True
    """Whether who asks first waits for the template. Else it is started cold, and `tend` makes what was missed."""

    def __init__(self, imports: Sequence[str] = (), *, lasting: bool = False) -> None:
        """`lasting`: it outlives a run, and has no template with a module that somebody may edit meanwhile."""
        self._imports, self._lasting = tuple(imports), lasting
        self._templates: dict[str, _Template] = {}
        self._missed: dict[str, Recipe] = {}
        self._expecting: threading.Thread | None = None
        self._cold: dict[str, tuple[str, float]] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock, self._tending = threading.Lock(), threading.Lock()
        self._closed = False
        self._owner = os.getpid()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all templates, and what still runs in them; nothing starts any more."""
        if os.getpid() != self._owner:
            return
        with self._lock:
            self._closed = True
            templates, self._templates = list(self._templates.values()), {}
        for one in templates:
            one.close()
        if self._expecting is not None:
            self._expecting.join(_LAST_SECONDS)

    @property
    def tended(self) -> bool:
        """Whether a thread is at `tend`."""
        return self._tending.locked()

    def tend(self) -> None:
        """See to the templates until each has ended, unused for long or closed: clear up, make what was missed.

        Returns at once where another thread is at it.
        """
        if not self._tending.acquire(blocking=False):
            return
        try:
            self._tend()
        finally:
            self._tending.release()

    def _tend(self) -> None:
        while True:
            self._warm_up()
            with self._lock:
                running = dict(self._templates)
            if not running:
                return
            next(iter(running.values())).wait(_TEND_SECONDS)
            for key, found in running.items():
                if found.ended:
                    self._forget(key, found)

    def _warm_up(self) -> None:
        """Make the templates that were missed. Returns when they are ready, or cannot be had."""
        while True:
            with self._lock:
                recipe = self._missed.popitem()[1] if self._missed else None
            if recipe is None:
                return
            with contextlib.suppress(SandboxError):  # closed
                self._template(recipe, patient=True)

    def _forget(self, key: str, template: _Template) -> None:
        with self._lock:
            if self._templates.get(key) is not template:
                return
            del self._templates[key]
        template.close()

    def start_kernel(
        self,
        stack: contextlib.ExitStack,
        policy: Policy,
        command: Command,
        lease: Lease | None,
        argv: Sequence[str],
    ) -> tuple[Sandbox, str]:
        """Enter a kernel's room on `stack`. It, and how it was started: "warm", or "cold: " and the reason.

        `command` is how to start it cold; `argv` is the kernelspec's, with the connection file in its place.
        Raises `SandboxError` when it starts neither way.
        """
        parts = python_module(argv)
        if parts is None or parts[1] not in _KERNEL_MODULES:
            return stack.enter_context(Sandbox(policy, command, lease=lease)), "cold: not IPython's kernel"
        python, module, words = parts
        files = {path: text for path, text in command.room_files.items() if path.startswith(policy.environment["HOME"])}
        imports = (*_KERNEL_IMPORTS, *self._imports)
        recipe = Recipe(python, policy, module, imports, (), _VARIABLES, files, command.share_at, _KERNEL_REHEARSAL)
        return self.start(stack, recipe, policy, dataclasses.replace(command, argv=words), command, lease)

    def expect_driver(self, policy: Policy) -> None:
        """Begin to make the template for drivers, so that it is ready when the first kernel is; returns at once."""

        def make() -> None:
            with contextlib.suppress(SandboxError):  # closed meanwhile
                self._template(_driver_recipe(policy), patient=True)

        with self._lock:
            if self._closed or self._expecting is not None or not self.patient:
                return
            thread = threading.Thread(target=make, name="driver template", daemon=True)
            with contextlib.suppress(RuntimeError):  # no more threads; who needs it makes it then
                thread.start()
                self._expecting = thread

    def start_driver(
        self, stack: contextlib.ExitStack, policy: Policy, command: Command, lease: Lease | None
    ) -> tuple[Sandbox, str]:
        """Enter a driver's room on `stack`; as `start_kernel`."""
        return self.start(stack, _driver_recipe(policy), policy, dataclasses.replace(command, argv=[]), command, lease)

    def start(
        self,
        stack: contextlib.ExitStack,
        recipe: Recipe,
        policy: Policy,
        warm: Command,
        cold: Command,
        lease: Lease | None,
    ) -> tuple[Sandbox, str]:
        """Enter a sandbox on `stack`: of the recipe's template, or else cold; as `start_kernel`."""
        for _ in range(2):
            found = self._template(recipe, self.patient)
            if not isinstance(found, _Template):
                break
            try:
                return stack.enter_context(Sandbox(policy, warm, lease=lease, template=found.sandbox)), "warm"
            except SandboxError as error:
                if error.layer != "template":
                    raise
                found.lost, found = True, error.cause  # it ended after we had looked
        return stack.enter_context(Sandbox(policy, cold, lease=lease)), f"cold: {found}"

    def _template(self, recipe: Recipe, patient: bool) -> "_Template | str":
        """The template for this, or why there is none. Raises `SandboxError` when the nursery is closed."""
        if recipe.policy.tier != "namespaces":
            return f"the {recipe.policy.tier} tier has no templates"
        if recipe.policy.writable:
            return "something of the host is writable"
        key = recipe.key
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        if not lock.acquire(blocking=patient):
            return _NOT_YET
        try:
            if self._closed:
                raise _run_has_ended()
            reason, until = self._cold.get(key, ("", 0.0))
            if time.monotonic() < until:
                return reason
            found = self._templates.get(key)
            if found is not None:
                if not found.ended:
                    return found
                self._forget(key, found)
            if not patient:
                self._missed[key] = recipe
                return _NOT_YET
            try:
                found = _Template(recipe, self._lasting)
            except SandboxError as error:
                self._cold[key] = str(error), time.monotonic() + _COLD_SECONDS
                return str(error)
            with self._lock:
                if not self._closed:
                    self._templates[key] = found
                    return found
            found.close()
            raise _run_has_ended()
        finally:
            lock.release()


def _driver_recipe(policy: Policy) -> Recipe:
    python = [sys.executable, "-I", "-B"]
    return Recipe(python, policy, "isolate.driver:main", _DRIVER_IMPORTS, grader_paths(), rehearsal=_DRIVER_REHEARSAL)


def _run_has_ended() -> SandboxError:
    return SandboxError("template", "there are no more kernels, since the run has ended")
