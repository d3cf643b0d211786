"""Runs one sandbox, or one notebook, as whoever executes this file: a job as JSON on stdin, the end on stdout.

What the sandboxed command writes is handed on to stderr while it runs. Knows nothing of tests.
"""

import base64
import dataclasses
import io
import json
import os
import resource
import signal
import sys
import tarfile
import tempfile
import threading
from pathlib import Path
from typing import IO, Any

from isolate.environment import environment_policy
from isolate.policy import WORK, Bind, Limits, Policy, SandboxError
from isolate.sandbox import Command, Sandbox

_KEPT = 1 << 20


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


def _listing(file: IO[bytes]) -> dict[str, Any]:
    if file.seek(0, os.SEEK_END) == 0:
        return {}
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as archive:
        return {repr(member.name)[1:-1]: [member.mode, member.size, member.type.decode()] for member in archive}


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
        with Sandbox(_policy(job), command) as sandbox:
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


def notebook(job: dict[str, Any]) -> dict[str, Any]:
    """One notebook after the other; the work directory goes from each to the next."""
    import nbformat

    from isolate.notebook import Kernel, Settings, execute

    policy = _policy(job)
    files = _archive(job["files"]) if "files" in job else None
    ends: list[dict[str, Any]] = []
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
                )
                outputs = [cell.outputs for cell in done.notebook.cells]
                ends.append({"outputs": outputs, "report": done.report.as_dict(), "error": None})
            except SandboxError as error:
                ends.append({"error": {"layer": error.layer, "cause": error.cause}})
            keep.seek(0)
            files = os.fdopen(os.dup(keep.fileno()), "rb") if keep.read(1) else None
    return {"notebooks": ends}


def main() -> None:
    job = json.load(sys.stdin)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))  # as in an ordinary login session
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    result = notebook(job) if "notebooks" in job else run(job)
    with open(job["end"], "w", encoding="utf-8") as file:  # a pipe that no sandbox inherits
        json.dump(result, file)


if __name__ == "__main__":
    main()
