"""Runs one sandbox, or one notebook, as whoever executes this file: a job as JSON on stdin, the end on stdout.

What the sandboxed command writes is handed on to stderr while it runs. Knows nothing of tests.

A job may name another wall than ours, to compare with: `bwrap`, as its manual's first page has it, or `chroot`
under unshare, as the shell script was that instructors used before. Both see what our policy shows.
"""

import base64
import contextlib
import ctypes
import dataclasses
import io
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from isolate import syscalls, uids
from isolate.environment import environment_policy
from isolate.policy import HOME, WORK, Bind, Limits, Policy, SandboxError
from isolate.sandbox import Command, Sandbox
from isolate.warm import Nursery, Recipe

_KEPT = 1 << 20
_MOST_SECONDS = 20.0
"""Another wall has no limits; what runs behind it is ended here, which no test takes for the wall's doing."""
_PROBE = Path(__file__).parent / "probe"
"""A module that a template can turn into."""
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")


def _bind(entry: str | list[str]) -> Bind:
    return Bind(Path(entry)) if isinstance(entry, str) else Bind(Path(entry[0]), Path(entry[1]))


def _policy(job: dict[str, Any]) -> Policy:
    base = environment_policy([Path(job["python"])], limits=Limits(**job.get("limits", {})))
    return dataclasses.replace(
        base,
        read_only=(*base.read_only, *map(_bind, job.get("ro", []))),
        writable=tuple(map(_bind, job.get("rw", []))),
        hidden=(*base.hidden, *map(Path, job.get("hidden", []))),
        environment={**base.environment, **job.get("env", {})},
        tier=job.get("tier", "namespaces"),
    )


def _archive(files: dict[str, str]) -> IO[bytes]:
    file: IO[bytes] = tempfile.TemporaryFile()
    with tarfile.open(fileobj=file, mode="w:", format=tarfile.PAX_FORMAT) as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    file.seek(0)
    return file


def _drain(descriptor: int, kept: bytearray, live: bool) -> None:
    while block := os.read(descriptor, 1 << 16):
        kept.extend(block[: _KEPT - len(kept)])
        if live:
            os.write(2, block)


def _become_odd() -> None:
    """What a careless parent could hand down: everything that survives fork and execve, set to something unusual."""
    for descriptor in (7, 42, 900):
        os.dup2(os.open("/etc/passwd", os.O_RDONLY), descriptor, inheritable=True)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR2, signal.SIGCHLD, signal.SIGALRM})
    os.umask(0o777)
    os.nice(5)
    libc = ctypes.CDLL(None)
    libc.personality(0x0040000 | 0x0400000)  # ADDR_NO_RANDOMIZE, READ_IMPLIES_EXEC
    libc.prctl(29, 777_000, 0, 0, 0)  # PR_SET_TIMERSLACK
    libc.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE
    libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
    libc.prctl(33, 1, 1, 0, 0)  # PR_MCE_KILL: early
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    resource.setrlimit(resource.RLIMIT_STACK, (4 << 20, 64 << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    signal.setitimer(signal.ITIMER_REAL, 1000)
    os.environ["LD_PRELOAD"] = os.environ["PYTHONSTARTUP"] = "/nonexistent/canary"
    with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("555")


def _listing(file: IO[bytes]) -> dict[str, Any]:
    if file.seek(0, os.SEEK_END) == 0:
        return {}
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as archive:
        return {repr(member.name)[1:-1]: [member.mode, member.size, member.type.decode()] for member in archive}


@contextlib.contextmanager
def _sandbox(job: dict[str, Any], command: Command) -> Iterator[Sandbox]:
    """`python -c CODE ARGUMENT...` is forked from a template where the job asks for it."""
    policy, python = _policy(job), str(job["python"])
    if not job["warm"] or list(command.argv[:2]) != [python, "-c"]:
        with Sandbox(policy, command) as sandbox:
            yield sandbox
        return
    with Nursery() as nursery, uids.lease() as lease, contextlib.ExitStack() as stack:
        policy = dataclasses.replace(policy, read_only=(*policy.read_only, Bind(_PROBE)))
        recipe = Recipe([python], policy, "isolate_probe", ("isolate_probe",), [str(_PROBE)])
        warm = dataclasses.replace(command, argv=command.argv[2:])
        sandbox, start = nursery.start(stack, recipe, policy, warm, command, lease)
        if start != "warm" and not (policy.writable or policy.tier == "landlock"):
            raise RuntimeError(start)
        yield sandbox


def run(job: dict[str, Any]) -> dict[str, Any]:
    out, out_end = os.pipe()
    kept = bytearray()
    reader = threading.Thread(target=_drain, args=(out, kept, job.get("live", False)), daemon=True)
    reader.start()
    keep: IO[bytes] | None = tempfile.TemporaryFile() if job.get("keep") else None
    extra = [os.open(path, os.O_RDONLY) for path in job.get("open_before", [])]
    for descriptor in extra:
        os.set_inheritable(descriptor, True)
    command = Command(
        job["argv"],
        cwd=job.get("cwd", WORK),
        archive=_archive(job["files"]) if "files" in job else None,
        keep=keep,
        stdout=out_end,
        stderr=out_end,
    )
    result: dict[str, Any] = {"report": None, "error": None}
    try:
        with _sandbox(job, command) as sandbox:
            result["layers"] = sandbox.layers
            result["report"] = sandbox.wait().as_dict()
    except SandboxError as error:
        result["error"] = {"layer": error.layer, "cause": error.cause}
    os.close(out_end)
    reader.join(10)
    result["output"] = base64.b64encode(bytes(kept)).decode()
    if keep is not None and result["error"] is None:
        result["kept"] = _listing(keep)
    return result


def _visible(policy: Policy) -> list[tuple[Bind, bool]]:
    """What is shown and whether it is read-only, parents before children. Nothing is masked."""
    shown = [(bind, True) for bind in policy.read_only] + [(bind, False) for bind in policy.writable]
    return sorted(shown, key=lambda pair: len(pair[0].target.parts))


def _bwrap(policy: Policy, argv: list[str]) -> list[str]:
    """bwrap(1): everything unshared, the same places visible."""
    words = ["bwrap", "--unshare-all", "--die-with-parent", "--proc", "/proc", "--dev", "/dev"]
    words += ["--tmpfs", "/tmp", "--tmpfs", HOME, "--dir", WORK, "--chdir", WORK]
    for bind, read_only in _visible(policy):
        words += ["--ro-bind" if read_only else "--bind", str(bind.source), str(bind.target)]
    for name, value in policy.environment.items():
        words += ["--setenv", name, value]
    return [*words, "--", *argv]


def _chroot(policy: Policy, argv: list[str], root: str) -> list[str]:
    """A shell script around unshare(1), mount(8) and chroot(8); an ordinary user is root in a user namespace."""
    lines = ["mount -t tmpfs tmpfs .", f"cd {shlex.quote(root)}"]
    lines += [f"mkdir -p proc dev/shm tmp run etc root var .{WORK}", "mount -t proc proc proc"]
    lines += [f"touch dev/{name}; mount --bind /dev/{name} dev/{name}" for name in _DEVICES]
    for bind, read_only in _visible(policy):
        source, target = shlex.quote(os.path.realpath(bind.source)), shlex.quote(f".{bind.target}")
        make = f"mkdir -p {target}" if bind.source.is_dir() else f"mkdir -p $(dirname {target}); touch {target}"
        lines += [make, f"mount --rbind {source} {target}"]
        if read_only:
            lines.append(
                f"mount -o remount,bind,ro {target} 2>/dev/null || mount -o remount,bind,ro,nosuid,nodev {target}"
            )
    variables = [f"{name}={value}" for name, value in policy.environment.items()]
    inside = ["env", *variables, "sh", "-c", f'cd {WORK} && exec "$@"', "sh", *argv]
    lines.append("PATH=$PATH:/usr/sbin:/sbin exec chroot . " + shlex.join(inside))
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *user, "--mount", "--pid", "--fork", "sh", "-ec", "\n".join(lines)]


def run_elsewhere(job: dict[str, Any]) -> dict[str, Any]:
    """The command behind another wall. The report says how it ended; there are no limits to report."""
    syscalls.join_new_session_keyring()  # keys that a probe adds are nobody else's
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    policy = _policy(job)
    kept = bytearray()
    out, out_end = os.pipe()
    for path in job.get("open_before", []):
        os.set_inheritable(os.open(path, os.O_RDONLY), True)
    root = tempfile.mkdtemp()
    argv = _bwrap(policy, job["argv"]) if job["wall"] == "bwrap" else _chroot(policy, job["argv"], root)
    process = subprocess.Popen(
        argv, cwd=root, stdin=subprocess.DEVNULL, stdout=out_end, stderr=out_end, close_fds=False
    )
    os.close(out_end)
    reader = threading.Thread(target=_drain, args=(out, kept, job.get("live", False)), daemon=True)
    reader.start()
    try:
        code = process.wait(min(_MOST_SECONDS, job.get("limits", {}).get("wall_seconds", _MOST_SECONDS) + 3))
        ended = "exited" if code >= 0 else "signal"
    except subprocess.TimeoutExpired:
        process.kill()
        code, ended = process.wait(), "killed"
    reader.join(2)
    os.rmdir(root)
    report = {"ended": ended, "exit_code": code, "signal": None, "limit": None, "message": "", "wall_seconds": 0.0}
    return {"report": report, "error": None, "output": base64.b64encode(bytes(kept)).decode()}


def notebook(job: dict[str, Any]) -> dict[str, Any]:
    """One notebook after the other; the work directory goes from each to the next, unless each is to be `fresh`."""
    import nbformat

    from isolate.notebook import Kernel, Settings, execute

    policy = _policy(job)
    files = _archive(job["files"]) if "files" in job else None
    ends: list[dict[str, Any]] = []
    nursery = Nursery(job.get("imports", ())) if job["warm"] else None
    for cells in job["notebooks"]:
        document = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
        argv = job.get("kernel") or [job["python"], "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        with tempfile.TemporaryFile() as keep:
            try:
                done = execute(
                    document,
                    Kernel(argv),
                    policy,
                    Settings(**job.get("settings", {})),
                    files=files,
                    keep=keep,
                    timeouts={int(key): value for key, value in job.get("timeouts", {}).items()},
                    warm=nursery,
                )
                outputs = [cell.outputs for cell in done.notebook.cells]
                ends.append({"outputs": outputs, "report": done.report.as_dict(), "error": None})
            except SandboxError as error:
                ends.append({"error": {"layer": error.layer, "cause": error.cause}})
            keep.seek(0)
            files = os.fdopen(os.dup(keep.fileno()), "rb") if keep.read(1) and not job.get("fresh") else None
    if nursery is not None:
        nursery.close()
    return {"notebooks": ends}


def main() -> None:
    job = json.load(sys.stdin)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))  # as in an ordinary login session
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if job.get("odd"):
        _become_odd()
    if job.get("wall", "isolate") != "isolate":
        result = run_elsewhere(job)
    else:
        result = notebook(job) if "notebooks" in job else run(job)
    with open(job["end"], "w", encoding="utf-8") as file:  # a pipe that no sandbox inherits
        json.dump(result, file)


if __name__ == "__main__":
    main()
