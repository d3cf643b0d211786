"""A small server that answers like a JupyterHub, or as badly as a test wants; real sockets, a real port."""

import contextlib
import dataclasses
import json
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from grader_service.settings import HubSettings

OWN, ADA = "own-token-of-the-service", "token-of-ada"
ACCESS = "access:services!service=grades"
Write = Callable[[bytes], None]


def json_answer(value: Any, status: str = "200 OK", *more: str) -> bytes:
    """A whole answer; bytes are the body as they are, `more` are headers."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    head = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {len(body)}", *more]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


@dataclasses.dataclass
class FakeHub:
    """Speaks HTTP on a real socket. `answers` is by path and token; a function is called to write what it likes."""

    port: int = 0
    asked: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    sent_bytes: int = 0
    over: threading.Event = dataclasses.field(default_factory=threading.Event)
    answers: dict[tuple[str, str], bytes | Callable[[Write], None]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        scopes = ["access:servers!server=ada/", ACCESS, "users:activity!user=ada"]
        self.answers = {
            ("/hub/api/user", OWN): json_answer({"kind": "service", "name": "grades", "scopes": ["read:users:groups"]}),
            ("/hub/api/user", ADA): json_answer({"kind": "user", "name": "ada", "groups": ["lies"], "scopes": scopes}),
            ("/hub/api/users/ada", OWN): json_answer({"kind": "user", "name": "ada", "groups": ["teachers"]}),
        }

    def user(self, token: str, name: str, *groups: str, scopes: tuple[str, ...] = (ACCESS,)) -> None:
        """From now on this token belongs to this user, who is in these groups."""
        self.answers["/hub/api/user", token] = json_answer({"kind": "user", "name": name, "scopes": list(scopes)})
        path = f"/hub/api/users/{quote(name, safe='')}"
        self.answers[path, OWN] = json_answer({"kind": "user", "name": name, "groups": list(groups)})

    @property
    def url(self) -> str:
        """Of its API."""
        return f"http://127.0.0.1:{self.port}/hub/api"

    def serve(self, connection: socket.socket) -> None:
        """Answer all requests of one connection."""
        file = connection.makefile("rb")
        while line := file.readline():
            path, token = line.split()[1].decode(), ""
            while (header := file.readline().strip()) != b"":
                name, _, value = header.decode().partition(": ")
                if name.lower() == "authorization":
                    token = value.removeprefix("token ")
            self.asked.append((path, token))
            answer = self.answers.get((path, token), json_answer({"message": "Forbidden"}, "403 Forbidden"))

            def write(block: bytes) -> None:
                connection.sendall(block)
                self.sent_bytes += len(block)

            if isinstance(answer, bytes):
                write(answer)
            else:
                answer(write)
                return


@contextlib.contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """One that is up until the block ends."""
    fake = FakeHub()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                fake.serve(self.request)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False
        allow_reuse_address = True

    with Server(("127.0.0.1", 0), Handler) as server:
        fake.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield fake
        finally:
            fake.over.set()
            server.shutdown()
            thread.join()


def settings_of(directory: Path, url: str, token: str = OWN) -> HubSettings:
    """Of a hub at this URL; its token is in a file of this directory."""
    path = directory / "hub-token"
    path.touch(mode=0o600)
    path.write_text(token + "\n")
    return HubSettings(api_url=url, token_file=path)
