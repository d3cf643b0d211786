"""Kernelspecs of a test's own, and a client that runs a cell and tells what came out of it."""

import asyncio
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

from e2e.host import eventually

LONG = 90.0
PYTHON = ("python", "-m", "ipykernel_launcher", "-f", "{connection_file}")
BASH = (sys.executable, "-m", "bash_kernel", "-f", "{connection_file}")
ISOLATE = (sys.executable, "-m", "isolate.cli")


@dataclasses.dataclass(frozen=True)
class Specs:
    """A data directory of Jupyter's with kernelspecs in it."""

    data: Path

    def add(self, name: str, argv: Any = PYTHON, **more: Any) -> Path:
        """A kernelspec without a sandbox, unless `argv` makes one."""
        directory = self.data / "kernels" / name
        directory.mkdir(parents=True, exist_ok=True)
        spec = {"argv": list(argv), "display_name": f"Test {name}", "language": "python", **more}
        (directory / "kernel.json").write_text(json.dumps(spec))
        return directory

    def add_sandboxed(
        self, name: str, argv: Any = PYTHON, policy: Any = None, config: Mapping[str, Any] | None = None, **more: Any
    ) -> Path:
        config = config if config is not None else {} if policy is None else {"policy": policy}
        metadata = {"kernel_provisioner": {"provisioner_name": "isolate", "config": config}}
        return self.add(name, argv, metadata=metadata, **more)


@dataclasses.dataclass(frozen=True)
class Session:
    """A kernel that runs, and a client connected to it."""

    manager: KernelManager
    client: BlockingKernelClient

    def run(self, code: str, timeout: float = LONG) -> str:
        """Streams, results as text, and an error as its name and value."""
        said: list[str] = []

        def hear(message: dict[str, Any]) -> None:
            content = message["content"]
            if message["msg_type"] == "stream":
                said.append(content["text"])
            elif message["msg_type"] == "error":
                said.append(f"{content['ename']}: {content['evalue']}")
            elif message["msg_type"] in {"execute_result", "display_data"}:
                said.append(content["data"].get("text/plain", ""))

        self.client.execute_interactive(code, output_hook=hear, timeout=timeout, stop_on_error=False)
        return "".join(said)

    def begin(self, code: str) -> None:
        """Run this, and come back as soon as it has written something."""
        identifier = self.client.execute(code, stop_on_error=False)  # else the kernel drops what comes right after
        while True:
            message = self.client.get_iopub_msg(timeout=LONG)
            if message["parent_header"].get("msg_id") == identifier and message["msg_type"] == "stream":
                return

    def finish(self) -> str:
        """Wait for what `begin` began; the name of its error."""
        while True:
            reply = self.client.get_shell_msg(timeout=LONG)
            if reply["msg_type"] == "execute_reply":
                return str(reply["content"].get("ename", ""))

    def wait_until_dead(self) -> int | None:
        """The exit code, as the client sees it."""
        assert eventually(lambda: not self.manager.is_alive(), LONG)
        assert self.manager.provisioner is not None
        return asyncio.run(self.manager.provisioner.poll())


@contextlib.contextmanager
def started(name: str, **keywords: Any) -> Iterator[Session]:
    """A kernel of this kernelspec that answers; it is gone afterwards."""
    manager = KernelManager(kernel_name=name)
    manager.start_kernel(**keywords)
    client = manager.blocking_client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=LONG)
        yield Session(manager, client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        client.context.destroy(linger=0)
        manager.context.destroy(linger=0)


def own_descriptors() -> dict[str, str]:
    """Of this process: number -> what it leads to."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[name] = os.readlink(f"/proc/self/fd/{name}")
    return found
