"""Sandboxed kernels in a real JupyterLab server: sessions over HTTP, cells over its websocket."""

import contextlib
import dataclasses
import http.client
import json
import os
import secrets
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import websocket

from e2e.clients import BASH, ISOLATE, LONG, PYTHON, Specs
from e2e.host import descendants, eventually, free_port, processes

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("jupyterlab")]

KERNELS = {"sandboxed", "own-files", "bash", "refused", "relayed"}


@dataclasses.dataclass(frozen=True)
class Lab:
    """A JupyterLab server of a person's own."""

    port: int
    token: str
    process: "subprocess.Popen[bytes]"
    notebooks: Path
    log: Path

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LONG)
        with contextlib.closing(connection):
            headers = {"Authorization": f"token {self.token}"}
            connection.request(method, path, json.dumps(body) if body is not None else None, headers)
            response = connection.getresponse()
            text = response.read().decode()
            return response.status, json.loads(text) if text[:1] in {"{", "["} else text

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        with contextlib.suppress(OSError):
            return self.request("GET", "/api/status")[0] == 200
        return False

    @contextlib.contextmanager
    def session(self, kernel: str, path: str = "notebook.ipynb") -> Iterator["Notebook"]:
        model = {"kernel": {"name": kernel}, "name": path, "path": path, "type": "notebook"}
        status, answer = self.request("POST", "/api/sessions", model)
        assert status == 201, (answer, self.log.read_text()[-3000:])
        kernel_id = answer["kernel"]["id"]
        wire = websocket.create_connection(
            f"ws://127.0.0.1:{self.port}/api/kernels/{kernel_id}/channels?token={self.token}", timeout=LONG
        )
        try:
            yield Notebook(self, kernel_id, answer["id"], wire)
        finally:
            wire.close()
            assert self.request("DELETE", f"/api/sessions/{answer['id']}")[0] == 204


@dataclasses.dataclass(frozen=True)
class Notebook:
    """An open notebook: what JupyterLab in a browser does with its kernel."""

    lab: Lab
    kernel_id: str
    session_id: str
    wire: "websocket.WebSocket"

    def send(self, code: str) -> str:
        identifier = uuid.uuid4().hex
        header = {"msg_id": identifier, "msg_type": "execute_request", "username": "", "session": "s", "version": "5.4"}
        content = {"code": code, "silent": False, "store_history": True, "allow_stdin": False}
        content["stop_on_error"] = False  # else the kernel drops what comes right after an error
        message = {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"}
        self.wire.send(json.dumps({**message, "buffers": []}))
        return identifier

    def hear(self, identifier: str, until: str, seconds: float = LONG) -> str:
        """Everything said to this request until a message of this type, or `idle`. Raises `TimeoutError`."""
        said = ""
        for message in self._messages(seconds):
            if message["parent_header"].get("msg_id") != identifier:
                continue
            content = message["content"]
            said += content.get("text", "") + content.get("data", {}).get("text/plain", "")
            said += content["ename"] if message["msg_type"] == "error" else ""
            if message["msg_type"] == until or content.get("execution_state") == until:
                return said
        raise TimeoutError(f"no {until} to this request; it said {said!r}")

    def _messages(self, seconds: float = LONG) -> Iterator[dict[str, Any]]:
        """What comes in this time."""
        deadline = time.monotonic() + seconds
        self.wire.settimeout(1)  # the server's pings would put off a longer one for ever
        while time.monotonic() < deadline:
            with contextlib.suppress(websocket.WebSocketTimeoutException):
                yield json.loads(self.wire.recv())

    def run(self, code: str) -> str:
        return self.hear(self.send(code), "idle")

    def run_after_restart(self, code: str) -> str:
        """The server's sockets come back to a restarted kernel a moment later, and miss what it said before."""
        for _ in range(30):
            with contextlib.suppress(TimeoutError):
                if said := self.hear(self.send(code), "idle", 3):
                    return said
        raise TimeoutError("no answer after the restart")

    def begin(self, code: str) -> str:
        """Come back as soon as it has written something."""
        identifier = self.send(code)
        self.hear(identifier, "stream")
        return identifier

    def ask(self, action: str) -> int:
        return self.lab.request("POST", f"/api/kernels/{self.kernel_id}/{action}")[0]

    def wait_for_a_new_kernel(self) -> None:
        """Until the server has noticed that the kernel died, and a new one says something."""
        states = (message["content"].get("execution_state") for message in self._messages())
        assert any(state in {"restarting", "autorestarting"} for state in states)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    top = tmp_path_factory.mktemp("jupyterlab")
    notebooks = top / "notebooks"
    specs = Specs(top / "data")
    for path in (notebooks / "week 1", top / "runtime", top / "home"):
        path.mkdir(parents=True)
    policy = {"memory": "400M"}
    specs.add_sandboxed("sandboxed", policy=policy)
    specs.add_sandboxed("own-files", policy={"work": str(notebooks)})
    specs.add_sandboxed("bash", BASH, language="bash", env={"PS1": "$"})
    specs.add_sandboxed("refused", policy={"read_only": ["/no/such/data"]})
    specs.add("relayed", [*ISOLATE, "kernel", "-f", "{connection_file}", "--", *PYTHON])
    port, token, log = free_port(), secrets.token_hex(16), top / "server.log"
    options = [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--ServerApp.open_browser=False"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options, *(["--allow-root"] if os.geteuid() == 0 else [])],
            cwd=notebooks,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(top / "home"),
                "JUPYTER_TOKEN": token,
                "JUPYTER_DATA_DIR": str(specs.data),
                "JUPYTER_RUNTIME_DIR": str(top / "runtime"),
                "JUPYTERHUB_API_TOKEN": "the-hubs-token",
            },
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        one = Lab(port, token, process, notebooks, log)
        assert eventually(one.is_ready, 120), log.read_text()
        yield one
    finally:
        below = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert eventually(lambda: not below & processes().keys(), 30)


def test_it_is_jupyterlab(lab: Lab) -> None:
    status, page = lab.request("GET", "/lab")
    assert status == 200
    assert "JupyterLab" in page
    assert lab.request("GET", "/api/kernelspecs")[1]["kernelspecs"].keys() >= KERNELS


@pytest.mark.parametrize("kernel", ["sandboxed", "relayed"])
def test_a_python_notebook(lab: Lab, kernel: str) -> None:
    with lab.session(kernel) as notebook:
        assert notebook.run("1 + 1") == "2"
        assert notebook.run("open('/etc/shadow')") == "FileNotFoundError"
        assert notebook.run("import os; print(os.listdir(), 'JUPYTERHUB_API_TOKEN' in os.environ)") == "[] False\n"
        assert notebook.run("!echo $HOME").strip() == "/home/student"
        cell = notebook.begin("print('begun', flush=True); import time; time.sleep(600)")
        assert notebook.ask("interrupt") == 204
        assert notebook.hear(cell, "idle").strip() == "KeyboardInterrupt"  # IPython is sometimes short: "\nKeyboard..."
        notebook.run("x = 1")
        assert notebook.ask("restart") == 200
        assert notebook.run_after_restart("x") == "NameError"


def test_a_bash_notebook(lab: Lab) -> None:
    with lab.session("bash") as notebook:
        assert notebook.run("echo $((40 + 2))") == "42\n"
        assert "No such file" in notebook.run("cat /etc/shadow")
        cell = notebook.begin("echo begun; sleep 600")
        assert notebook.ask("interrupt") == 204
        notebook.hear(cell, "idle")
        assert notebook.run("id -u") == "1000\n"


def test_ones_own_files_in_the_directory_of_the_notebook(lab: Lab) -> None:
    with lab.session("own-files", "week 1/notebook.ipynb") as notebook:
        assert notebook.run("import os; print(os.getcwd())") == f"{lab.notebooks / 'week 1'}\n"
        notebook.run("open('result', 'w').write('42')")
    assert (lab.notebooks / "week 1/result").read_text() == "42"
    assert lab.request("GET", "/api/contents/week%201/result")[1]["content"] == "42"


def test_a_dead_kernel_is_started_again(lab: Lab) -> None:
    with lab.session("sandboxed") as notebook:
        notebook.run("x = 1")
        notebook.send("import os; os._exit(1)")
        notebook.wait_for_a_new_kernel()
        assert notebook.run_after_restart("x") == "NameError"


def test_the_person_is_told_why_no_kernel_starts(lab: Lab) -> None:
    model = {"kernel": {"name": "refused"}, "name": "n", "path": "n.ipynb", "type": "notebook"}
    status, answer = lab.request("POST", "/api/sessions", model)
    assert status == 500
    assert "/no/such/data" in answer["message"]


def test_a_limit_is_named_in_the_servers_log(lab: Lab) -> None:
    child = "x = b'1' * (150 << 20); import time; time.sleep(600)"
    code = f"import subprocess, sys\nfor n in range(5): subprocess.Popen([sys.executable, '-c', {child!r}])"
    with lab.session("sandboxed") as notebook:
        notebook.send(code)
        notebook.wait_for_a_new_kernel()
        assert notebook.run_after_restart("3") == "3"
    assert "the memory limit of 400 MiB for all processes together was reached" in lab.log.read_text()


def test_closed_notebooks_leave_no_process_and_no_descriptor(lab: Lab) -> None:
    def state() -> tuple[int, int]:
        return len(descendants(lab.process.pid)), len(os.listdir(f"/proc/{lab.process.pid}/fd"))

    with lab.session("sandboxed") as notebook:
        notebook.run("1")
    assert eventually(lambda: state()[0] == 1)
    _, descriptors = state()
    for _ in range(4):
        with lab.session("sandboxed") as notebook:
            assert notebook.run("1") == "1"
    assert eventually(lambda: state()[0] == 1)
    assert eventually(lambda: state()[1] <= descriptors + 3), (descriptors, state())
    assert not list((lab.log.parent / "runtime").glob("kernel-*.json"))
