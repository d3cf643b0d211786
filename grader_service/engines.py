"""Where jobs run: a `concurrent.futures.Executor`, and nothing else is asked of it.

The local engine gives each job a process of its own, forked from a server that has imported the worker and holds no
job: a worker that dies takes no other with it, unlike in a `ProcessPoolExecutor`. How many run at once is decided by
who submits. A distributed engine is another `Executor`; a `grader_service.worker.Task` is all that it has to carry.
"""

import contextlib
import errno
import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import os
import select
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, ParamSpec, TypeVar

from isolate import syscalls

P = ParamSpec("P")
T = TypeVar("T")


_PRELOADED = [
    "grader_service.fork_server",
    "grader_service.worker",
    "sqlalchemy.dialects.postgresql.psycopg",
    "psycopg",
]
"""The driver, too: SQLAlchemy would import it when it opens the database, in each worker anew (0.1 s)."""


class WorkerDied(Exception):
    """The process of a job ended without an answer; `code` as in `multiprocessing.Process.exitcode`."""

    def __init__(self, code: int | None) -> None:
        self.code = code
        name = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        super().__init__(f"the worker ended by {name}")


class LocalEngine(Executor):
    """One process for each call, on this machine. All of them end when this process ends, also by `kill -9`."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOADED)
        self._running: set[multiprocessing.process.BaseProcess] = set()
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Start it now. The future's exception is the call's, or `WorkerDied`. Raises `OSError` if it cannot."""
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()
        answers, answers_end = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_call, args=(answers_end, fn, args, kwargs), daemon=True)
        with self._lock:
            if self._closed:
                raise RuntimeError("the engine is shut down")
            process.start()
            self._running.add(process)
        answers_end.close()
        try:
            threading.Thread(target=self._wait, args=(process, answers, future), daemon=True).start()
        except RuntimeError as error:  # no more threads
            process.kill()
            with self._lock:
                self._running.discard(process)
            raise BlockingIOError(errno.EAGAIN, str(error)) from error
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls. With `cancel_futures`, what runs is killed."""
        with self._lock:
            self._closed = True
            running = list(self._running)
        for process in running if cancel_futures else []:
            process.kill()
        for process in running if wait else []:
            multiprocessing.connection.wait([process.sentinel])

    def _wait(
        self,
        process: multiprocessing.process.BaseProcess,
        answers: "multiprocessing.connection.Connection[Any, Any]",
        future: "Future[Any]",
    ) -> None:
        answer: tuple[bool, Any] | None = None
        with contextlib.suppress(EOFError, OSError):
            answer = answers.recv()
        answers.close()
        process.join()
        with self._lock:
            self._running.discard(process)
        if answer is None:
            future.set_exception(WorkerDied(process.exitcode))
        elif answer[0]:
            future.set_result(answer[1])
        else:
            future.set_exception(answer[1])


def _call(
    answers: "multiprocessing.connection.Connection[Any, Any]",
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """In the worker, which ends with the fork server, and with the service."""
    syscalls.set_parent_death_signal(signal.SIGKILL)
    threading.Thread(target=_end_with_service, args=(answers.fileno(),), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the service's to handle
    answer: tuple[bool, Any]
    try:
        answer = True, fn(*args, **kwargs)
    except Exception as error:  # noqa: BLE001  # the future's, as in every Executor
        answer = False, RuntimeError(f"{type(error).__name__}: {error}")
    answers.send(answer)


def _end_with_service(answers: int) -> None:
    """The fork server outlives a service that was killed; the other end of our pipe does not. poll(2): POLLERR"""
    poll = select.poll()
    poll.register(answers, 0)
    poll.poll()
    os.kill(os.getpid(), signal.SIGKILL)
