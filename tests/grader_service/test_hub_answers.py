"""What the service makes of a hub's answers, good ones and bad ones. A real JupyterHub is in test_hub.py."""

import asyncio
import contextlib
import gzip
import json
import socket
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from fake_hub import ACCESS, ADA, OWN, FakeHub, Write, fake_hub, json_answer, settings_of

from grader_service.hub import Hub, HubMisconfigured, HubRefused, HubUnavailable, HubUser, name_problem
from grader_service.settings import HubSettings


@pytest.fixture
def fake() -> Iterator[FakeHub]:
    with fake_hub() as fake:
        yield fake


def ask(settings: HubSettings, token: str = ADA, seconds: float = 20.0) -> HubUser:
    """What the hub says of a token; the test fails if it says nothing in time."""

    async def asking() -> HubUser:
        hub = Hub(settings, deadline_seconds=seconds)
        try:
            return await asyncio.wait_for(hub.user_of(token), 60)
        finally:
            await hub.close()

    return asyncio.run(asking())


def test_a_user_has_the_groups_that_the_services_own_token_reads(fake: FakeHub, tmp_path: Path) -> None:
    assert ask(settings_of(tmp_path, fake.url)) == HubUser("ada", frozenset({"teachers"}))
    assert fake.asked == [("/hub/api/user", OWN), ("/hub/api/user", ADA), ("/hub/api/users/ada", OWN)]


def test_a_slash_at_the_end_of_the_url_is_no_matter(fake: FakeHub, tmp_path: Path) -> None:
    assert ask(settings_of(tmp_path, fake.url + "/")).name == "ada"


def test_an_unknown_token_is_refused(fake: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(HubRefused, match="not known"):
        ask(settings_of(tmp_path, fake.url), "something-else")


@pytest.mark.parametrize(
    "scopes",
    [
        [],
        ["access:servers!server=ada/", "users:activity!user=ada"],
        ["access:services!service=other"],
        ["access:services!service=grades2", "access:services!service=grade"],
        ["read:users:groups", "admin:users"],
    ],
)
def test_a_token_that_was_not_meant_for_the_service_is_refused(
    fake: FakeHub, tmp_path: Path, scopes: list[str]
) -> None:
    fake.answers["/hub/api/user", ADA] = json_answer({"kind": "user", "name": "ada", "scopes": scopes})
    with pytest.raises(HubRefused, match="lacks the scope access:services!service=grades"):
        ask(settings_of(tmp_path, fake.url))


def test_a_service_of_the_hub_is_nobody(fake: FakeHub, tmp_path: Path) -> None:
    fake.answers["/hub/api/user", ADA] = json_answer({"kind": "service", "name": "ada", "scopes": [ACCESS]})
    with pytest.raises(HubRefused, match="not to a person"):
        ask(settings_of(tmp_path, fake.url))


def test_a_user_who_is_gone_is_nobody(fake: FakeHub, tmp_path: Path) -> None:
    fake.answers["/hub/api/users/ada", OWN] = json_answer({}, "404 Not Found")
    with pytest.raises(HubRefused, match="not known"):
        ask(settings_of(tmp_path, fake.url))


@pytest.mark.parametrize("name", ["Ada", "ada ", "аda", "bob", "", "ada\0"])
def test_an_answer_for_somebody_else_is_no_answer(fake: FakeHub, tmp_path: Path, name: str) -> None:
    fake.answers["/hub/api/users/ada", OWN] = json_answer({"kind": "user", "name": name, "groups": ["teachers"]})
    with pytest.raises(HubUnavailable, match="another user"):
        ask(settings_of(tmp_path, fake.url))


@pytest.mark.parametrize(
    "name",
    [
        "token:0123456789ab",
        "a:b",
        "a/b",
        "..",
        ".",
        "",
        "a b",
        "a\tb",
        "a\0b",
        "a\nb",
        "a\u200bb",
        "a\u202eb",
        "ａda",
        "ﬁn",
        "e\u0301va",
        "\ud800",
        "x" * 256,
    ],
)
def test_names_that_could_be_taken_for_others_are_refused(fake: FakeHub, tmp_path: Path, name: str) -> None:
    assert name_problem(name) is not None
    fake.answers["/hub/api/user", ADA] = json_answer({"kind": "user", "name": name, "scopes": [ACCESS]})
    with pytest.raises((HubRefused, HubUnavailable)):
        ask(settings_of(tmp_path, fake.url))
    assert len(fake.asked) == 2, "nothing was asked with such a name in the path"


@pytest.mark.parametrize(
    "name", ["1000", "ada@aalto.fi", "åsa", "éva", "a.b-c_d+e", "а-кириллица", "50%", "a%2Fb", "o'neil"]
)
def test_odd_names_are_asked_for_as_they_are(fake: FakeHub, tmp_path: Path, name: str) -> None:
    fake.answers["/hub/api/user", ADA] = json_answer({"kind": "user", "name": name, "scopes": [ACCESS]})
    fake.answers["/hub/api/users/" + quote(name, safe=""), OWN] = json_answer(
        {"kind": "user", "name": name, "groups": []}
    )
    assert ask(settings_of(tmp_path, fake.url)) == HubUser(name, frozenset())


RUBBISH: dict[str, bytes] = {
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n",
    "nothing": b"",
    "HTML": json_answer(b"<html>Welcome to the Wi-Fi of the university</html>"),
    "empty": json_answer(b""),
    "null": json_answer(None),
    "a list": json_answer([{"kind": "user", "name": "ada"}]),
    "a number for a name": json_answer({"kind": "user", "name": 1000, "scopes": [ACCESS]}),
    "no scopes": json_answer({"kind": "user", "name": "ada"}),
    "a text for scopes": json_answer({"kind": "user", "name": "ada", "scopes": ACCESS}),
    "a kind of its own": json_answer({"kind": "admin", "name": "ada", "scopes": [ACCESS]}),
    "true for a name": json_answer({"kind": "user", "name": True, "scopes": [ACCESS]}),
    "deep": json_answer(b"[" * 500_000 + b"]" * 500_000),
    "no UTF-8": json_answer(b'{"kind": "user", "name": "\xff", "scopes": ["' + ACCESS.encode() + b'"]}'),
    "cut off": json_answer({"kind": "user", "name": "ada", "scopes": [ACCESS]})[:-5],
    "headers without end": b"HTTP/1.1 200 OK\r\n" + b"X-More: more\r\n" * 100_000,
    "a status of its own": json_answer({}, "299 Fine"),
    "500": json_answer({}, "500 Internal Server Error"),
    "503": json_answer({}, "503 Service Unavailable"),
    "204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "404": json_answer({}, "404 Not Found"),
    "compressed": json_answer(
        gzip.compress(json.dumps({"kind": "user", "name": "ada", "scopes": [ACCESS]}).encode()),
        "200 OK",
        "Content-Encoding: gzip",
    ),
}


@pytest.mark.parametrize("asked", [("/hub/api/user", OWN), ("/hub/api/user", ADA), ("/hub/api/users/ada", OWN)])
@pytest.mark.parametrize("name", RUBBISH)
def test_rubbish_lets_nobody_in(fake: FakeHub, tmp_path: Path, name: str, asked: tuple[str, str]) -> None:
    def rubbish(write: Write) -> None:
        write(RUBBISH[name])

    fake.answers[asked] = rubbish
    gone = name == "404" and asked[0] != "/hub/api/user"
    with pytest.raises(HubRefused if gone else HubUnavailable) as caught:
        ask(settings_of(tmp_path, fake.url))
    assert fake.asked[-1] == asked, "and nothing was asked after it"
    assert ADA not in str(caught.value)
    assert OWN not in str(caught.value)


@pytest.mark.parametrize(
    "status", ["301 Moved Permanently", "302 Found", "307 Temporary Redirect", "308 Permanent Redirect"]
)
def test_tokens_are_carried_nowhere_else(fake: FakeHub, tmp_path: Path, status: str) -> None:
    fake.answers["/hub/api/user", ADA] = json_answer({}, status, f"Location: http://127.0.0.1:{fake.port}/elsewhere")
    with pytest.raises(HubUnavailable, match=f"status {status[:3]}"):
        ask(settings_of(tmp_path, fake.url))
    assert [path for path, _ in fake.asked] == ["/hub/api/user", "/hub/api/user"]


def test_a_proxy_of_the_environment_is_not_used(fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    (tmp_path / ".netrc").write_text("default login somebody password else\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ask(settings_of(tmp_path, fake.url)).name == "ada"


def _endless(head: bytes, block: bytes) -> Callable[[Write], None]:
    def answer(write: Write) -> None:
        write(head)
        while True:
            write(block)

    return answer


LARGE = {
    "10 GB": _endless(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n", b" " * 65536),
    "no length": _endless(b"HTTP/1.1 200 OK\r\n\r\n", b"[" * 65536),
    "chunks": _endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b"1" * 65536 + b"\r\n"),
    "headers": _endless(b"HTTP/1.1 200 OK\r\n", b"X-More: " + b"x" * 65536 + b"\r\n"),
    "one header": _endless(b"HTTP/1.1 200 OK\r\nX-More: ", b"x" * 65536),
    "a status line": _endless(b"HTTP/1.1 200 ", b"x" * 65536),
}


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """The block takes less than 20 MiB at any moment."""
    tracemalloc.start()
    try:
        yield
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 20 << 20


@pytest.mark.parametrize("name", LARGE)
def test_answers_without_end_take_little_memory(fake: FakeHub, tmp_path: Path, name: str) -> None:
    fake.answers["/hub/api/user", ADA] = LARGE[name]
    with little_memory(), pytest.raises(HubUnavailable):
        ask(settings_of(tmp_path, fake.url))
    assert fake.sent_bytes < 20 << 20, "what the sockets hold is a part of it"


def test_a_compressed_answer_is_not_unpacked(fake: FakeHub, tmp_path: Path) -> None:
    body = gzip.compress(b" " * (200 << 20), 1)
    fake.answers["/hub/api/user", ADA] = json_answer(body, "200 OK", "Content-Encoding: gzip")
    with little_memory(), pytest.raises(HubUnavailable):
        ask(settings_of(tmp_path, fake.url))


def _hang(fake: FakeHub, head: bytes) -> Callable[[Write], None]:
    def answer(write: Write) -> None:
        write(head)
        fake.over.wait()

    return answer


def _drip(fake: FakeHub) -> Callable[[Write], None]:
    def answer(write: Write) -> None:
        write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        while not fake.over.wait(0.02):
            write(b" ")

    return answer


def _informed(fake: FakeHub) -> Callable[[Write], None]:
    def answer(write: Write) -> None:
        while not fake.over.wait(0.02):
            write(b"HTTP/1.1 103 Early Hints\r\n\r\n")

    return answer


@pytest.mark.parametrize("how", ["silent", "after the head", "byte by byte", "early hints"])
@pytest.mark.parametrize("asked", [("/hub/api/user", OWN), ("/hub/api/user", ADA), ("/hub/api/users/ada", OWN)])
def test_a_slow_hub_lets_nobody_in(fake: FakeHub, tmp_path: Path, how: str, asked: tuple[str, str]) -> None:
    """Each single byte comes soon; the deadline is one for all."""
    fake.answers[asked] = {
        "silent": _hang(fake, b""),
        "after the head": _hang(fake, b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n"),
        "byte by byte": _drip(fake),
        "early hints": _informed(fake),
    }[how]
    with pytest.raises(HubUnavailable, match=r"no answer within 0\.5 s"):
        ask(settings_of(tmp_path, fake.url), seconds=0.5)


def test_a_hub_that_accepts_nothing_lets_nobody_in(tmp_path: Path) -> None:
    with socket.socket() as full:  # its backlog takes one, then the kernel lets them wait
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        with contextlib.ExitStack() as stack:
            for _ in range(8):
                filler = stack.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", port))
            with pytest.raises(HubUnavailable):
                ask(settings_of(tmp_path, f"http://127.0.0.1:{port}/hub/api"), seconds=0.5)


def test_no_hub_lets_nobody_in(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for url in (
        f"http://127.0.0.1:{port}/hub/api",
        "http://no-such-host.invalid/hub/api",
        "https://127.0.0.1:1/hub/api",
    ):
        with pytest.raises(HubUnavailable):
            ask(settings_of(tmp_path, url))


def test_few_ask_at_once_and_too_many_are_told(fake: FakeHub, tmp_path: Path) -> None:
    most, lock, now = 0, threading.Lock(), 0
    held = threading.Event()

    def slow(write: Write) -> None:
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
        held.wait(30)
        with lock:
            now -= 1
        write(json_answer({}, "403 Forbidden", "Connection: close"))

    tokens = [f"token-{number:04}" for number in range(600)]
    for token in tokens:
        fake.answers["/hub/api/user", token] = slow

    async def asking() -> list[BaseException | HubUser]:
        hub = Hub(settings_of(tmp_path, fake.url), deadline_seconds=60)
        try:
            tasks = [asyncio.create_task(hub.user_of(token)) for token in tokens]
            refused = 0
            while refused < 88:  # those beyond the bound are told at once, the others wait
                await asyncio.sleep(0.01)
                refused = sum(task.done() for task in tasks)
            held.set()
            return await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            await hub.close()

    results = asyncio.run(asyncio.wait_for(asking(), 120))
    assert sum(isinstance(result, HubUnavailable) for result in results) == 88
    assert sum(isinstance(result, HubRefused) for result in results) == 512
    assert most <= 16


def test_a_right_that_the_service_lost_is_noticed(fake: FakeHub, tmp_path: Path) -> None:
    fake.answers["/hub/api/users/ada", OWN] = json_answer({}, "403 Forbidden")
    with pytest.raises(HubMisconfigured, match="does not let the service read the groups"):
        ask(settings_of(tmp_path, fake.url))


def test_a_token_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "http://127.0.0.1:9/hub/api")
    settings.token_file.chmod(0o644)
    with pytest.raises(HubMisconfigured, match=r"hub\.token_file: .*chmod"):
        Hub(settings)


def test_nothing_that_is_printed_shows_the_token(fake: FakeHub, tmp_path: Path) -> None:
    hub = Hub(settings_of(tmp_path, fake.url))
    assert OWN not in repr(hub)
    assert OWN not in str(hub)
    fake.answers["/hub/api/user", OWN] = lambda write: write(b"rubbish")
    with pytest.raises(HubUnavailable) as caught:
        asyncio.run(hub.own())
    chain, error = [], caught.value
    while error is not None:
        chain.append(error)
        error = None if error.__suppress_context__ and error.__cause__ is None else error.__cause__ or error.__context__
    assert OWN not in repr(chain)
    assert not any(hasattr(one, "request") for one in chain)
