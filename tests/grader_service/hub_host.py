"""A real JupyterHub for tests: its proxy, the hub as root, and single-user servers of real Unix users.

    with Accounts.open(stage) as accounts, HubHost.open(stage, python, config="...") as hub:
        hub.start_server(accounts.user("ada", "teachers").pw_name)
        token = hub.server_token(...)          # what the user's own server got: JUPYTERHUB_API_TOKEN

Who logs in is not asked (the "dummy" authenticator), everything else is as an administrator runs it. The proxy comes
from PATH, or from npm into the session's directory. At the end everything is gone, also what the hub started in
sessions of its own: each process carries a word of this host's in its environment.
"""

import contextlib
import dataclasses
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from attacks.harness import Stage, eventually, marked

HUB_PYTHON = "GRADER_SERVICE_TEST_HUB_PYTHON"
"""Names an interpreter with another version of JupyterHub than this one's."""
_PROXY = "configurable-http-proxy@^4.6"
_MARK = "GRADER_SERVICE_TEST_HUB"
_LONG = 120.0
_READY = "JupyterHub is now running"

_CONFIG = """\
c.JupyterHub.bind_url = {url!r}
c.JupyterHub.hub_bind_url = {hub_url!r}
c.ConfigurableHTTPProxy.api_url = {proxy_url!r}
c.ConfigurableHTTPProxy.command = {proxy!r}
c.ConfigurableHTTPProxy.pid_file = {directory!r} + "/proxy.pid"
c.JupyterHub.db_url = "sqlite:///" + {directory!r} + "/hub.sqlite"
c.JupyterHub.cookie_secret_file = {directory!r} + "/cookie_secret"
c.JupyterHub.authenticator_class = "dummy"
c.Authenticator.allow_all = True
c.JupyterHub.spawner_class = "jupyterhub.spawner.LocalProcessSpawner"
c.Spawner.cmd = [{python!r}, "-m", "jupyterhub.singleuser"]
c.Spawner.environment = {{{mark_name!r}: {mark!r}}}
c.Spawner.start_timeout = c.Spawner.http_timeout = {long!r}
c.JupyterHub.services = [{{"name": "test-administrator", "api_token": {admin_token!r}, "admin": True}}]
"""


@dataclasses.dataclass(frozen=True)
class Answer:
    """Of the hub's API."""

    status: int
    body: Any


class HubHost:
    """A JupyterHub that runs. `url` is the proxy's, `api_url` the hub's own API without the proxy between."""

    def __init__(self, directory: Path, python: Path, proxy: list[str], config: str) -> None:
        self.directory = directory
        self._python, self._proxy, self._config = python, proxy, config
        self._mark, self.admin_token = secrets.token_hex(16), secrets.token_hex(16)
        self._process: subprocess.Popen[str] | None = None
        self._said: list[str] = []
        ports = _free_ports(3)
        self.url, self._hub_url, self._proxy_url = (f"http://127.0.0.1:{port}" for port in ports)
        self.api_url = f"{self._hub_url}/hub/api"
        self.public_api_url = f"{self.url}/hub/api"

    @classmethod
    @contextlib.contextmanager
    def open(cls, stage: Stage, python: Path, config: str = "") -> Iterator["HubHost"]:
        """Start it with this at the end of its jupyterhub_config.py. Skips, with the reason, where there is no proxy.

        `python` has jupyterhub, and every user may run it.
        """
        if os.geteuid() != 0:
            pytest.skip("only root can start servers of other users")
        if shutil.which("setpriv") is None:
            pytest.skip("no setpriv (util-linux), without which a JupyterHub might outlive the tests")
        proxy = proxy_command(stage)
        directory = stage.directory / f"hub-{secrets.token_hex(4)}"
        directory.mkdir(mode=0o700)
        host = cls(directory, python, proxy, config)
        try:
            host.start()
            yield host
        finally:
            host.close()

    def start(self) -> None:
        """Start the hub, or start it again; returns when it says that it runs."""
        config = self.directory / "jupyterhub_config.py"
        values = {
            "url": self.url,
            "hub_url": self._hub_url,
            "proxy_url": self._proxy_url,
            "proxy": self._proxy,
            "directory": str(self.directory),
            "python": str(self._python),
            "mark_name": _MARK,
            "mark": self._mark,
            "admin_token": self.admin_token,
            "long": int(_LONG),
        }
        config.write_text(_CONFIG.format(**values) + self._config, encoding="utf-8")
        interpreter = os.environ.get(HUB_PYTHON, sys.executable)
        environment = {name: os.environ[name] for name in ("PATH", "LANG", "HOME") if name in os.environ}
        self._process = subprocess.Popen(
            # it ends its servers and its proxy when the test process is killed, too
            ["setpriv", "--pdeathsig=TERM", interpreter, "-m", "jupyterhub", "-f", str(config)],
            cwd=self.directory,
            env={**environment, _MARK: self._mark},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
            errors="replace",
        )
        ready = threading.Event()
        threading.Thread(target=self._listen, args=(self._process, ready), daemon=True).start()
        assert ready.wait(_LONG), self.log
        assert self._process.poll() is None or _READY in self.log, self.log

    @property
    def log(self) -> str:
        """What the hub said so far, the end of it."""
        return "".join(self._said[-200:])

    def _listen(self, process: "subprocess.Popen[str]", ready: threading.Event) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._said.append(line)
            if _READY in line:
                ready.set()
        ready.set()  # it ended

    def call(self, method: str, path: str, *, json: Any = None, token: str | None = None) -> Answer:
        """Ask the hub's API, as the test's administrator if no token is given."""
        headers = {"Authorization": f"token {token or self.admin_token}"}
        answer = httpx.request(method, self.api_url + path, json=json, headers=headers, timeout=_LONG, trust_env=False)
        try:
            return Answer(answer.status_code, answer.json())
        except ValueError:
            return Answer(answer.status_code, answer.text)

    def done(self, method: str, path: str, *, json: Any = None) -> Any:
        """The same, for what must succeed."""
        answer = self.call(method, path, json=json)
        assert answer.status < 300, (method, path, answer, self.log)
        return answer.body

    def user_token(self, user: str, scopes: list[str] | None = None) -> str:
        """A new token of a user, with these scopes, or with all that the user may."""
        token: str = self.done("POST", f"/users/{quote_name(user)}/tokens", json={"scopes": scopes} if scopes else {})[
            "token"
        ]
        return token

    def start_server(self, user: str) -> None:
        """Start a user's Jupyter server as the hub's page does, and wait until it is ready."""
        self.done("POST", f"/users/{quote_name(user)}/server")
        url = f"{self.api_url}/users/{quote_name(user)}/server/progress"
        headers = {"Authorization": f"token {self.admin_token}"}
        with httpx.stream("GET", url, headers=headers, timeout=_LONG, trust_env=False) as events:
            for line in events.iter_lines():
                if line.startswith("data:"):
                    event = json.loads(line.removeprefix("data:"))
                    assert not event.get("failed"), (event, self.log)
                    if event.get("ready"):
                        return
        pytest.fail(f"the server of {user} did not become ready: {self.log}")

    def server_token(self, user: str) -> str:
        """JUPYTERHUB_API_TOKEN in the environment of the user's running server."""
        uid = pwd.getpwnam(user).pw_uid
        for pid in marked(self._mark):
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{pid}").st_uid != uid:
                    continue
                for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    name, _, value = entry.partition(b"=")
                    if name == b"JUPYTERHUB_API_TOKEN":
                        return value.decode()
        pytest.fail(f"no server of {user} runs")

    def signal(self, number: int) -> None:
        """Send a signal to the hub itself; the proxy and the servers go on."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """End the hub without a farewell; the proxy and the servers go on."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End everything and remove its files."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(30)  # it ends servers and proxy in order
        gone = eventually(lambda: not _killed(self._mark), 30)
        if self._process is not None:
            self._process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)
        assert gone, "processes of the hub are left"


def proxy_command(stage: Stage) -> list[str]:
    """How to run configurable-http-proxy. Skips, with the reason, where it is not and cannot be had."""
    if (found := shutil.which("configurable-http-proxy")) is not None:
        return [found]
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip(
            "no JupyterHub without configurable-http-proxy, which needs node and npm: apt-get install nodejs npm"
        )
    place = stage.directory / "proxy"
    with stage._locked():
        if (place / "refused").exists():
            pytest.skip((place / "refused").read_text())
        if not (place / "ready").exists():
            place.mkdir(exist_ok=True)
            command = [npm, "install", "--no-audit", "--no-fund", "--cache", place / "cache", "--prefix", place, _PROXY]
            done = subprocess.run(command, capture_output=True, text=True, cwd=place, check=False)
            if done.returncode != 0:
                (place / "refused").write_text(f"npm could not install {_PROXY}: {done.stderr[-500:]}")
                pytest.skip((place / "refused").read_text())
            (place / "ready").touch()
    return [node, str(place / "node_modules/configurable-http-proxy/bin/configurable-http-proxy")]


def _free_ports(count: int) -> list[int]:
    """Nobody has them now; whoever takes one before the hub does makes it say so."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _killed(mark: str) -> list[int]:
    """All processes with this word in their environment, who were sent SIGKILL."""
    found = marked(mark)
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return found


def quote_name(name: str) -> str:
    """A user's name as a part of a URL."""
    return quote(name, safe="")
