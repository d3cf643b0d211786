"""Listening: connections that bring no request are closed, TLS is renewed, nobody's socket is taken away."""

import asyncio
import contextlib
import os
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from certipy import Certipy  # JupyterHub's own

from attacks.harness import eventually
from grader_service import serve
from grader_service.client import GraderClient, ServiceUnavailable
from service_host import Host, free_port, hosting

pytestmark = pytest.mark.threat(93)

LONG = 60.0


async def _app(_scope: Any, _receive: Any, send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
    await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"no"})


async def _drip(path: Path, head: bytes, drop: bytes) -> bytes:
    """What the server says to one who sends this head and then a drop now and then, until it hangs up."""
    config = uvicorn.Config(_app, uds=str(path), http=serve._Protocol, lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    try:
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(head)
        answer = asyncio.create_task(reader.read())
        async with asyncio.timeout(LONG):
            while not answer.done():
                writer.write(drop)
                await asyncio.wait([answer], timeout=0.02)
        writer.close()
        return b"" if answer.exception() else answer.result()  # a reset connection has ended, too
    finally:
        await server.shutdown()


@pytest.mark.parametrize(
    ("head", "drop"),
    [
        (b"", b""),
        (b"GET / HT", b""),
        (b"GET / HTTP/1.1\r\nHost: x\r\n", b"X: y\r\n"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n", b"x"),
    ],
)
def test_who_does_not_ask_is_hung_up_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: bytes, drop: bytes
) -> None:
    monkeypatch.setattr(serve, "_HEAD_SECONDS", 0.3)
    monkeypatch.chdir(tmp_path)  # a short name. unix(7)
    asyncio.run(_drip(Path("s"), head, drop))


def test_there_are_descriptors_for_all_connections() -> None:
    """In a process of its own: a limit that was lowered stays."""
    pid = os.fork()
    if not pid:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        serve._allow_descriptors()
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        os._exit(soft not in {hard, serve._MOST_DESCRIPTORS})
    assert os.waitpid(pid, 0)[1] == 0


@contextlib.contextmanager
def _authority(directory: Path) -> Iterator[Callable[[str], tuple[Path, Path]]]:
    """Makes certificates for 127.0.0.1, with their keys, that clients of this process trust meanwhile."""
    authority = Certipy(store_dir=str(directory))
    trusted = authority.create_ca("ca").get("files")["cert"]

    def sign(name: str) -> tuple[Path, Path]:
        files = authority.create_signed_pair(name, "ca", alt_names=["IP:127.0.0.1"]).get("files")
        return Path(files["cert"]), Path(files["key"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", trusted)
        yield sign


def _install(host: Host, certificate: Path, key: Path) -> None:
    assert host.tls is not None
    for source, target in zip((certificate, key), host.tls, strict=True):
        shutil.copyfile(source, target)
        target.chmod(0o600)


def _presented(host: Host) -> str:
    assert host.port is not None
    return ssl.get_server_certificate(("127.0.0.1", host.port))


def test_a_certificate_is_renewed_while_the_service_runs(tmp_path: Path) -> None:
    with hosting(port=free_port()) as host, _authority(tmp_path / "authority") as sign:
        first, second = sign("first"), sign("second")
        host.tls = host.directory / "certificate.pem", host.directory / "key.pem"
        _install(host, *first)
        host.configure()
        host.start()
        assert host.process is not None
        with host.client() as client:
            assert [course.name for course in client.courses()] == list(host.courses)
            before = _presented(host)
            _install(host, second[0], first[1])  # the key has not come yet
            host.process.send_signal(signal.SIGHUP)
            assert eventually(lambda: "certificate_not_reloaded" in host.log, LONG)
            assert _presented(host) == before
            _install(host, *second)
            host.process.send_signal(signal.SIGHUP)
            assert eventually(lambda: _presented(host) != before, LONG)
            assert client.courses()
        with host.client() as client:
            assert client.courses()


def test_who_answers_at_a_socket_keeps_it() -> None:
    with hosting() as host:
        host.start()
        second = [sys.executable, "-m", "grader_service.cli", "--config", str(host.config), "serve"]
        done = subprocess.run(second, capture_output=True, text=True, timeout=LONG, check=False)
        assert done.returncode == 2
        assert "another process answers" in done.stdout + done.stderr
        with host.client() as client:
            assert client.courses()
        host.kill()
        host.start()  # what a killed one left is in nobody's way


@pytest.mark.parametrize("url", ["http://192.0.2.1:8970", "http://grader.example.org"])
def test_a_token_goes_to_another_machine_in_the_open_only_if_that_is_said(url: str) -> None:
    with pytest.raises(ValueError, match="plain HTTP"):
        GraderClient(url, "x")
    with GraderClient(url, "x", plain_http_beyond_loopback=True):
        pass


def test_a_proxys_variable_does_not_send_a_token_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.settimeout(1.0)
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        with GraderClient(f"http://127.0.0.1:{free_port()}", "secret", patience_seconds=0.2) as client:
            with pytest.raises(ServiceUnavailable):
                client.courses()
        with pytest.raises(TimeoutError):
            proxy.accept()
