"""Two rooms for one notebook: the kernel's and the driver's, from their start to the end of both.

This is the process side of `isolate.notebook`: it starts the two sandboxes, carries words between them, and comes
back with how each ended and one unread document. It refuses to know what a cell or an output is.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import selectors
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from isolate import driver, uids
from isolate.environment import grader_paths, grader_policy, without_working_directory
from isolate.policy import MIB, Limits, Policy, Report, SandboxError
from isolate.sandbox import Command, Sandbox, last_words
from isolate.warm import Nursery

_SOCKETS = "/run/kernel"
_CONNECTION_FILE = f"{_SOCKETS}/connection.json"
_KEPT_STDERR_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How to start a kernel: what a kernelspec says."""

    argv: Sequence[str]
    """With `{connection_file}` in it."""
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    interrupt_mode: str = "signal"
    home_files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Small files that a fresh HOME should have: path -> text."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How both rooms ended. `document` is None when it was too large, or too much for the driver."""

    kernel: Report
    driver: Report
    document: bytes | None
    start: str
    """How the kernel was started: "warm", "cold", or "cold: " and why it was not warm."""


Progress = Callable[[int, str], None]
"""Called with a cell's index and `started` or `finished`."""


def driver_limits(limits: Limits) -> Limits:
    """The driver's own bounds: enough for the outputs that are kept, several times over, and no more."""
    return dataclasses.replace(
        limits,
        memory_bytes=384 * MIB + 8 * limits.output_bytes,
        wall_seconds=limits.wall_seconds + 60,
        cpu_seconds=limits.cpu_seconds + 60,
        processes=32,
        files_bytes=1 * MIB,
        files_count=64,
    )


class TwoRooms:
    """One kernel room and one driver room, for one job. Use `run` once."""

    def __init__(
        self, kernel: Kernel, policy: Policy, startup_timeout: float, progress: Progress, warm: Nursery | None = None
    ) -> None:
        self._kernel, self._startup_timeout, self._progress = kernel, startup_timeout, progress
        self._warm = warm
        self._start = "cold"
        self._policy = dataclasses.replace(policy, environment={**policy.environment, **kernel.environment})
        self._driver_policy = dataclasses.replace(grader_policy(driver_limits(policy.limits)), tier=policy.tier)
        self._connection = {
            "transport": "ipc",
            "key": secrets.token_hex(32),
            "signature_scheme": "hmac-sha256",
            **{f"{name}_port": port for port, name in enumerate(("shell", "iopub", "stdin", "control", "hb"), start=1)},
        }
        self._document = bytearray()
        self._document_limit = 2 * policy.limits.output_bytes + 8 * MIB
        self._kernel_said = bytearray()
        self._driver_said = bytearray()
        self._ready = False

    def run(self, job: Mapping[str, Any], files: IO[bytes] | None, keep: IO[bytes] | None) -> Outcome:
        """Give the driver this job and wait for both rooms to be gone.

        Raises `SandboxError` when a room cannot be built, the kernel does not start, or driver or host fail.
        """
        with contextlib.ExitStack() as stack:
            lease = stack.enter_context(uids.lease())  # one for both rooms, which share a directory of sockets
            errors, errors_end = _pipe(stack)
            command = self._kernel_command(files, keep, errors_end)
            if self._warm is None:
                kernel = stack.enter_context(Sandbox(self._policy, command, lease=lease))
            else:
                self._warm.expect_driver(self._driver_policy)
                argv = self._with_connection_file(self._kernel.argv)
                kernel, self._start = self._warm.start_kernel(stack, self._policy, command, lease, argv)
            os.close(errors_end)
            driver_report = self._drive(job, kernel, errors, lease)
            if not kernel.ending:  # else who killed it would be us
                kernel.send("kill")
            kernel_report = kernel.wait()
            if keep is not None and not kernel.kept:
                keep.seek(0)
                keep.truncate()
        if not self._ready:
            self._raise_not_started(kernel_report, driver_report)
        overwhelmed = driver_report.limit is not None or driver_report.exit_code == driver.OUT_OF_MEMORY_CODE
        if overwhelmed or len(self._document) > self._document_limit:
            return Outcome(kernel_report, driver_report, None, self._start)
        if driver_report.ended != "exited" or driver_report.exit_code != 0:
            raise SandboxError("driver", driver_report.message or self._driver_words())
        return Outcome(kernel_report, driver_report, bytes(self._document), self._start)

    def _kernel_command(self, files: IO[bytes] | None, keep: IO[bytes] | None, stderr: int) -> Command:
        return Command(
            without_working_directory(self._with_connection_file(self._kernel.argv)),
            archive=files,
            keep=keep,
            room_files={
                _CONNECTION_FILE: json.dumps({**self._connection, "ip": f"{_SOCKETS}/k"}),
                **self._kernel.home_files,
            },
            share_at=_SOCKETS,
            stdout=stderr,
            stderr=stderr,
        )

    @staticmethod
    def _with_connection_file(argv: Sequence[str]) -> list[str]:
        return [word.replace("{connection_file}", _CONNECTION_FILE) for word in argv]

    def _drive(self, job: Mapping[str, Any], kernel: Sandbox, kernel_errors: int, lease: uids.Lease | None) -> Report:
        """Run the driver against this kernel until it ends; its report."""
        with contextlib.ExitStack() as stack:
            job_file = stack.enter_context(tempfile.TemporaryFile())
            job_file.write(json.dumps({**job, **self._for_driver()}).encode())
            job_file.seek(0)
            result, result_end = _pipe(stack)
            progress, progress_end = _pipe(stack)
            words_end, words = _pipe(stack)
            errors, errors_end = _pipe(stack)
            assert kernel.shared is not None
            theirs = [kernel.shared, result_end, progress_end, words_end]
            start = (
                f"import sys; sys.path[:0] = {grader_paths()!r}; from isolate.driver import main; "
                "sys.exit(main(*map(int, sys.argv[1:])))"
            )
            command = Command(
                [sys.executable, "-I", "-B", "-c", start, *map(str, theirs)],
                cwd="/",
                pass_fds=theirs,
                connects=True,
                stdin=job_file,
                stdout=errors_end,
                stderr=errors_end,
            )
            if self._warm is None:
                sandbox = stack.enter_context(Sandbox(self._driver_policy, command, lease=lease))
            else:
                sandbox, _ = self._warm.start_driver(stack, self._driver_policy, command, lease)
            for descriptor in (result_end, progress_end, words_end, errors_end):
                os.close(descriptor)
            self._listen(kernel, sandbox, {"kernel": kernel_errors, "driver": errors}, result, progress, words)
            return sandbox.report()

    def _for_driver(self) -> dict[str, Any]:
        limits = self._policy.limits
        return {
            "connection": {**self._connection, "ip": "k"},
            "interrupt_mode": self._kernel.interrupt_mode,
            "cell_output_bytes": limits.cell_output_bytes,
            "output_bytes": limits.output_bytes,
            "document_bytes": self._document_limit,
        }

    def _listen(
        self,
        kernel: Sandbox,
        sandbox: Sandbox,
        errors: Mapping[str, int],
        result: int,
        progress: int,
        words: int,
    ) -> None:
        """Serve both rooms until the driver is gone."""
        with selectors.DefaultSelector() as selector:
            selector.register(kernel, selectors.EVENT_READ, lambda: self._hear_kernel(kernel, selector, words))
            selector.register(sandbox, selectors.EVENT_READ, sandbox.receive)
            selector.register(result, selectors.EVENT_READ, lambda: self._take_document(result, sandbox, selector))
            selector.register(progress, selectors.EVENT_READ, lambda: self._take_progress(progress, kernel, selector))
            said = {"kernel": self._kernel_said, "driver": self._driver_said}
            for name, descriptor in errors.items():
                take = _take_words(descriptor, said[name], selector)
                selector.register(descriptor, selectors.EVENT_READ, take)
            patience = self._startup_timeout
            deadline = time.monotonic() + patience if patience and patience > 0 else None
            while not sandbox.finished:
                left = None if self._ready or deadline is None else max(0.0, deadline - time.monotonic())
                for key, _ in selector.select(left):
                    key.data()
                if not self._ready and deadline is not None and time.monotonic() >= deadline:
                    kernel.send("kill")
                    sandbox.send("kill")
                    deadline = None

    def _hear_kernel(self, kernel: Sandbox, selector: selectors.BaseSelector, words: int) -> None:
        event = kernel.receive()
        if event is None:
            selector.unregister(kernel)
        if event is None or event["event"] in {"exited", "gone"}:
            with contextlib.suppress(OSError):
                os.write(words, b"dead")

    def _take_document(self, result: int, sandbox: Sandbox, selector: selectors.BaseSelector) -> None:
        block = os.read(result, 1 << 20)
        self._document += block
        if not block:
            selector.unregister(result)
        elif len(self._document) > self._document_limit:
            selector.unregister(result)
            sandbox.send("kill")

    def _take_progress(self, progress: int, kernel: Sandbox, selector: selectors.BaseSelector) -> None:
        record = os.read(progress, driver.PROGRESS.size)
        if len(record) != driver.PROGRESS.size:
            selector.unregister(progress)
            return
        index, state = driver.PROGRESS.unpack(record)
        if state == driver.READY:
            self._ready = True
        elif state == driver.INTERRUPT:
            kernel.send("interrupt")
        elif state == driver.KILL:
            kernel.send("kill")
        else:
            self._progress(index, "started" if state == driver.STARTED else "finished")

    def _raise_not_started(self, kernel_report: Report, driver_report: Report) -> None:
        said = last_words(self._kernel_said)
        last = f"; it said: {said}" if said else ""
        if kernel_report.ended == "killed":
            if driver_report.ended in {"signal", "limit"} or driver_report.exit_code:
                raise SandboxError("driver", driver_report.message or self._driver_words())
            cause = f"it was not ready within {self._startup_timeout:g} s"
        else:
            cause = kernel_report.message or f"it ended with exit code {kernel_report.exit_code}"
        raise SandboxError("kernel", f"it did not start: {cause}{last}", "check the environment and its ipykernel")

    def _driver_words(self) -> str:
        return last_words(self._driver_said) or "it ended without a document"


def _pipe(stack: contextlib.ExitStack) -> tuple[int, int]:
    """(read end, write end); what is still open is closed with the stack."""
    ends = os.pipe()
    for end in ends:
        stack.callback(_close_once, end, os.fstat(end).st_ino)
    return ends


def _close_once(descriptor: int, inode: int) -> None:
    with contextlib.suppress(OSError):
        if os.fstat(descriptor).st_ino == inode:
            os.close(descriptor)


def _take_words(descriptor: int, kept: bytearray, selector: selectors.BaseSelector) -> Callable[[], None]:
    """Drain a pipe, keeping its last few kilobytes."""

    def take() -> None:
        block = os.read(descriptor, 1 << 16)
        if not block:
            selector.unregister(descriptor)
        kept.extend(block)
        del kept[:-_KEPT_STDERR_BYTES]

    return take
