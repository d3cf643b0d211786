"""`isolate kernel`: a kernelspec that calls a wrapper, and the bytes between a client's ports and unix sockets."""

import asyncio
import contextlib
import json
import os
import shlex
import signal
import socket
import struct
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.clients import BASH, ISOLATE, LONG, PYTHON, Specs, started
from e2e.host import descendants, eventually, marked
from isolate import relay
from isolate.cli import NOT_BUILT, WALL_LIMIT
from isolate.kernels import CHANNELS
from isolate.policy import SandboxError
from isolate.relay import ConnectionFile, Relay

KERNEL = (*ISOLATE, "kernel", "-f", "{connection_file}")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [sock.getsockname()[1] for sock in socks]


@pytest.fixture
def connection_file(tmp_path: Path) -> Path:
    """What a client would have written."""
    ports = dict(zip((f"{channel}_port" for channel in CHANNELS), free_ports(5), strict=True))
    path = tmp_path / "connection.json"
    path.write_text(json.dumps({"transport": "tcp", "ip": "127.0.0.1", "key": "k", **ports}))
    return path


# The client's connection file


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"transport": "ipc"}, "only tcp can be relayed"),
        ({"ip": ""}, "the ip is ''"),
        ({"ip": 5}, "the ip is 5"),
        ({"shell_port": 0}, "shell_port is 0"),
        ({"hb_port": "80"}, "hb_port is '80'"),
        ({"control_port": 65536}, "control_port is 65536"),
        ({"stdin_port": True}, "stdin_port is True"),
    ],
)
def test_an_odd_connection_file_is_refused(connection_file: Path, change: dict[str, Any], words: str) -> None:
    connection_file.write_text(json.dumps({**json.loads(connection_file.read_text()), **change}))
    with pytest.raises(SandboxError, match=words):
        ConnectionFile.read(connection_file)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "[" * 60_000, '"x"', "\xff"])
def test_what_is_no_connection_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(SandboxError, match=str(tmp_path / "file")):
        ConnectionFile.read(tmp_path / "file")


def test_a_word_that_names_the_file_names_it_inside(connection_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(connection_file.parent)
    file = ConnectionFile.read(connection_file)
    inside = "/run/kernel/connection.json"
    assert [file.inside(word) for word in (str(connection_file), connection_file.name, "{connection_file}")] == [
        inside
    ] * 3
    assert file.inside("--f={connection_file}") == f"--f={inside}"
    assert file.inside("other.json") == "other.json"


# Bytes


@contextlib.asynccontextmanager
async def relayed(
    tmp_path: Path, serve: Callable[..., Any] | None, lives: Callable[[], bool] = lambda: True
) -> AsyncIterator[int]:
    """A relay for one channel to a unix socket that `serve` answers; the TCP port."""
    path, (port,) = str(tmp_path / "socket"), free_ports(1)
    one = Relay(lambda _: path, lives)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(one.listening("127.0.0.1", {"shell": port}))
        if serve is not None:
            stack.push_async_exit(await asyncio.start_unix_server(serve, path))
        yield port


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while block := await reader.read(1 << 16):
            writer.write(block)
            await writer.drain()
    writer.close()


def test_bytes_pass_unchanged_both_ways_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        data = os.urandom(1 << 20) * 8
        async with relayed(tmp_path, echo) as port:
            streams = [await asyncio.open_connection("127.0.0.1", port) for _ in range(4)]

            async def send(writer: asyncio.StreamWriter) -> None:
                writer.write(data)
                await writer.drain()

            async with asyncio.timeout(LONG):
                got = await asyncio.gather(
                    *(reader.readexactly(len(data)) for reader, _ in streams), *(send(writer) for _, writer in streams)
                )
            assert all(block == data for block in got[:4])
            for _, writer in streams:
                writer.close()

    asyncio.run(main())


def test_a_client_that_comes_first_is_held(tmp_path: Path) -> None:
    async def main() -> None:
        async with relayed(tmp_path, None) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"early")
            await asyncio.sleep(0.2)
            async with await asyncio.start_unix_server(echo, str(tmp_path / "socket")):
                async with asyncio.timeout(LONG):
                    assert await reader.readexactly(5) == b"early"
                writer.close()

    asyncio.run(main())


def test_who_does_not_read_is_not_read_from(tmp_path: Path) -> None:
    """A kernel that writes without end at a client that sleeps must not fill this process."""
    sent = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        with contextlib.suppress(OSError):
            while True:
                writer.write(b"x" * (1 << 20))
                await writer.drain()
                sent += 1 << 20

    async def main() -> None:
        async with relayed(tmp_path, flood) as port:
            with socket.create_connection(("127.0.0.1", port)):
                before = -1
                while before != sent:
                    before = sent
                    await asyncio.sleep(0.5)

    asyncio.run(main())
    assert 0 < sent < 32 << 20


@pytest.mark.parametrize("who", ["client", "kernel"])
def test_a_reset_ends_one_connection_and_no_other(tmp_path: Path, who: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.readexactly(1) == b"r":
            writer.transport.abort()
        await echo(reader, writer)

    async def main() -> None:
        async with relayed(tmp_path, serve) as port:
            staying, its_writer = await asyncio.open_connection("127.0.0.1", port)
            its_writer.write(b"s")
            leaving, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"r" if who == "kernel" else b"s")
            if who == "client":
                sock = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
            else:
                with contextlib.suppress(OSError):
                    assert await asyncio.wait_for(leaving.read(), LONG) == b""
            its_writer.write(b"still there")
            assert await asyncio.wait_for(staying.readexactly(11), LONG) == b"still there"
            its_writer.close()

    asyncio.run(main())


def test_what_the_kernel_said_last_arrives(tmp_path: Path) -> None:
    data = b"z" * (3 << 20)

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        writer.close()

    async def main() -> None:
        async with relayed(tmp_path, speak) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert await asyncio.wait_for(reader.read(-1), LONG) == data
            writer.close()

    asyncio.run(main())


def test_connections_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "_MAX_CONNECTIONS", 3)

    async def main() -> None:
        async with relayed(tmp_path, echo) as port:
            streams = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
            for reader, writer in streams:
                writer.write(b"x")
                assert await asyncio.wait_for(reader.readexactly(1), LONG) == b"x"
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"x")
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(reader.readexactly(1), LONG)
            for _, other in [*streams, (reader, writer)]:
                other.close()

    asyncio.run(main())


def test_a_waiting_client_is_sent_away_when_the_kernel_dies(tmp_path: Path) -> None:
    async def main() -> None:
        alive = True
        async with relayed(tmp_path, None, lambda: alive) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            alive = False
            assert await asyncio.wait_for(reader.read(), LONG) == b""
            writer.close()

    asyncio.run(main())


# Kernelspecs that call a wrapper


@pytest.mark.parametrize("name", ["python", sys.executable])
def test_ipython_behind_ports(specs: Specs, name: str) -> None:
    specs.add("py", [*KERNEL, "--", name, *PYTHON[1:]])
    with started("py") as session:
        assert session.manager.transport == "tcp"
        assert session.run("1 + 1") == "2"
        assert "FileNotFoundError" in session.run("open('/etc/shadow')")
        assert session.run("import os; os.listdir(), 'JUPYTERHUB_API_TOKEN' in os.environ") == "([], False)"
        port = session.manager.shell_port
        code = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"
        assert "ConnectionRefusedError" in session.run(code)
        session.begin("print('begun', flush=True); import time; time.sleep(600)")
        session.manager.interrupt_kernel()
        assert session.finish().strip() == "KeyboardInterrupt"
        assert len(session.run("print('y' * 5_000_000)")) == 5_000_001
        session.manager.restart_kernel()
        session.client.wait_for_ready(timeout=LONG)
        assert session.run("4") == "4"


def test_bash_behind_an_old_wrapper(specs: Specs, tmp_path: Path) -> None:
    data = tmp_path / "course data"
    data.mkdir(mode=0o755)
    (data / "file").write_text("content")
    wrapper = tmp_path / "wrapper.sh"
    command = shlex.join(ISOLATE)
    wrapper.write_text(f'#!/bin/sh\nfile=$1; shift\nexec {command} kernel -f "$file" --ro "{data}" -- "$@"\n')
    wrapper.chmod(0o755)
    tmp_path.chmod(0o755)
    specs.add("bash", [str(wrapper), "{connection_file}", *BASH], language="bash", env={"PS1": "$"})
    with started("bash") as session:
        assert session.run(f'cat "{data}/file"; echo; id -u') == "content\n1000\n"
        assert "No such file" in session.run("cat /etc/shadow")


def _start(file: Path, *command: str, options: tuple[str, ...] = (), **env: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*ISOLATE, "kernel", "-f", str(file), *options, "--", *command],
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def running(connection_file: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """`isolate kernel`, ended at the end of the test if it was not before."""
    processes = []

    def start(*command: str, **more: Any) -> "subprocess.Popen[str]":
        processes.append(_start(connection_file, *command, **more))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


READY = """
import json, signal, socket, sys, time
said = json.load(open(sys.argv[1]))
def answer(number, frame):
    sys.exit({signal.SIGINT: 42, signal.SIGTERM: 43}[number])
signal.signal(signal.SIGINT, answer)
signal.signal(signal.SIGTERM, answer if "stubborn" not in sys.argv else signal.SIG_IGN)
sock = socket.socket(socket.AF_UNIX)
sock.bind(said["ip"] + "-" + str(said["shell_port"]))
sock.listen()
client, _ = sock.accept()
client.sendall(json.dumps(said).encode() + b"\\n")
time.sleep(600)
"""


def _hear(file: Path) -> dict[str, Any]:
    """Knock as a client would, and read the line that the kernel above sends."""
    port = json.loads(file.read_text())["shell_port"]

    def connected() -> socket.socket | None:
        with contextlib.suppress(OSError):
            return socket.create_connection(("127.0.0.1", port), LONG)
        return None

    found: list[socket.socket] = []
    assert eventually(lambda: found or found.extend(filter(None, [connected()])) or found, LONG)
    with found[0] as sock, sock.makefile() as lines:
        said: dict[str, Any] = json.loads(lines.readline())
        return said


def test_the_kernel_is_given_a_connection_file_of_its_own(running: Callable[..., Any], connection_file: Path) -> None:
    running("python", "-c", READY, str(connection_file))
    said = _hear(connection_file)
    assert (said["transport"], said["key"]) == ("ipc", "k")
    assert said["ip"].startswith("/run/kernel/k")
    assert sorted(said[f"{channel}_port"] for channel in CHANNELS) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 42), (signal.SIGTERM, 43)])
def test_signals_reach_the_kernel_and_its_exit_code_comes_back(
    running: Callable[..., Any], connection_file: Path, number: int, code: int
) -> None:
    process = running("python", "-c", READY, str(connection_file))
    _hear(connection_file)
    process.send_signal(number)
    assert process.wait(LONG) == code


def test_a_second_sigterm_kills(running: Callable[..., Any], connection_file: Path) -> None:
    process = running("python", "-c", READY, str(connection_file), "stubborn")
    _hear(connection_file)
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(LONG) == 128 + signal.SIGKILL


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        (["sh", "-c", "exit 0"], 0, ""),
        (["sh", "-c", "echo why >&2; exit 3"], 3, "isolate: the kernel: it ended with exit code 3; it said: why\n"),
        (["sh", "-c", "kill -9 $$"], 137, "isolate: the kernel: ended by SIGKILL\n"),
        (["/no/such/kernel"], NOT_BUILT, "isolate: the sandbox could not be built: environment: the program"),
    ],
)
def test_how_it_ended_is_told(running: Callable[..., Any], command: list[str], code: int, words: str) -> None:
    process = running(*command)
    out, errors = process.communicate(timeout=LONG)
    assert (process.returncode, out) == (code, "")
    assert errors.startswith(words)
    assert errors.count("\n") == bool(words)


def test_the_wall_limit_is_124(running: Callable[..., Any]) -> None:
    process = running("sleep", "600", options=("--wall", "1"))
    assert "the wall limit of 1 s was reached" in process.communicate(timeout=LONG)[1]
    assert process.returncode == WALL_LIMIT


def test_a_port_that_is_taken_is_an_error(running: Callable[..., Any], connection_file: Path) -> None:
    port = json.loads(connection_file.read_text())["control_port"]
    marker = f"marker-{os.urandom(6).hex()}"
    with socket.create_server(("127.0.0.1", port)):
        process = running("sh", "-c", "sleep 600", marker)
        _, errors = process.communicate(timeout=LONG)
    assert process.returncode == NOT_BUILT
    assert "address already in use" in errors
    assert "Traceback" not in errors
    assert eventually(lambda: not marked(marker), 20)


def test_a_missing_connection_file_is_named(tmp_path: Path) -> None:
    process = _start(tmp_path / "none.json", "true")
    _, errors = process.communicate(timeout=LONG)
    assert process.returncode == NOT_BUILT
    assert str(tmp_path / "none.json") in errors


def test_it_listens_on_nothing_but_the_address_of_the_file(running: Callable[..., Any], connection_file: Path) -> None:
    said = json.loads(connection_file.read_text())
    connection_file.write_text(json.dumps({**said, "ip": "127.0.0.5"}))
    running("sleep", "600")

    def answers(ip: str) -> bool:
        with contextlib.suppress(OSError):
            socket.create_connection((ip, said["hb_port"]), 2).close()
            return True
        return False

    assert eventually(lambda: answers("127.0.0.5"), LONG)
    assert not answers("127.0.0.1")


def test_nothing_is_left_when_it_is_killed(running: Callable[..., Any], connection_file: Path) -> None:
    marker = f"marker-{os.urandom(6).hex()}"
    process = running("python", "-c", READY, str(connection_file), marker)
    _hear(connection_file)
    below = descendants(process.pid)
    assert len(below) > 3
    process.kill()
    process.wait()
    assert eventually(lambda: not marked(marker), 20)


PARENT = """
import os, subprocess, sys
subprocess.Popen(sys.argv[1:], env={**os.environ, "JPY_PARENT_PID": str(os.getpid())}, start_new_session=True)
print("started", flush=True)
sys.stdin.read()
"""


def test_it_ends_when_the_client_that_started_it_is_gone(connection_file: Path) -> None:
    marker = f"marker-{os.urandom(6).hex()}"
    command = [
        *ISOLATE,
        "kernel",
        "-f",
        str(connection_file),
        "--",
        "python",
        "-c",
        READY,
        str(connection_file),
        marker,
    ]
    client = subprocess.Popen([sys.executable, "-c", PARENT, *command], stdin=subprocess.PIPE)
    try:
        _hear(connection_file)
        assert marked(marker)
    finally:
        client.kill()
        client.wait()
        assert client.stdin is not None
        client.stdin.close()
    assert eventually(lambda: not marked(marker), 20)


def test_nothing_inside_holds_a_descriptor_of_the_client(running: Callable[..., Any], connection_file: Path) -> None:
    code = """
    import os, sys
    print(sorted(os.readlink(f"/proc/self/fd/{n}").split(":")[0] for n in range(3)), file=sys.stderr)
    sys.exit(1)
    """
    process = running("python", "-c", textwrap.dedent(code))
    _, errors = process.communicate(timeout=LONG)
    assert "it said: ['/dev/null', 'pipe', 'pipe']" in errors


def test_help_of_the_command_teaches() -> None:
    done = subprocess.run([*ISOLATE, "kernel", "--help"], capture_output=True, text=True, check=True)
    assert all(word in done.stdout for word in ("{connection_file}", "--ro", "SIGTERM", "docs/kernels.md", "604800"))
