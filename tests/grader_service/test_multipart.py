"""Bodies as they arrive: whole, in single bytes, too large, too many parts, cut, slow."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from grader_service import multipart
from grader_service.multipart import receive
from grader_service.problems import ProblemError

BOUNDS = {"job": 100, "notebook": 1000, "files": 10_000}
TYPE = "multipart/form-data; boundary=edge"


def part(name: str, data: bytes, headers: str = "") -> bytes:
    return f'--edge\r\nContent-Disposition: form-data; name="{name}"\r\n{headers}\r\n'.encode() + data + b"\r\n"


def body(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--edge--\r\n"


GOOD = body(part("job", b"{}"), part("notebook", b"n" * 999), part("files", os.urandom(9999)))


async def _pieces(data: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def take(data: bytes, directory: Path, *, size: int = 4096, content_type: str = TYPE) -> str:
    return asyncio.run(receive(_pieces(data, size), content_type, directory, BOUNDS))


@pytest.mark.parametrize("size", [1, 7, 4096, 1 << 20])
def test_parts_become_files_that_only_we_may_read(tmp_path: Path, size: int) -> None:
    take(GOOD, tmp_path, size=size)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files", "job", "notebook"]
    assert (tmp_path / "notebook").read_bytes() == b"n" * 999
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_the_digest_is_that_of_the_parts_and_not_of_their_order(tmp_path: Path) -> None:
    parts = [part("job", b"{}"), part("notebook", b"n"), part("files", b"f")]
    found = []
    for number, chosen in enumerate([parts, parts[::-1], [*parts[:2], part("files", b"g")], parts[:2]]):
        directory = tmp_path / str(number)
        directory.mkdir()
        found.append(take(body(*chosen), directory))
    assert found[0] == found[1]
    assert len(set(found)) == 3


@pytest.mark.threat(93)
@pytest.mark.parametrize(
    ("data", "status"),
    [
        (body(part("job", b"{}"), part("notebook", b"n" * 1001)), 413),
        (body(part("job", b"x" * 101), part("notebook", b"n")), 413),
        (body(part("job", b"{}")), 400),
        (body(part("notebook", b"n")), 400),
        (body(part("job", b"{}"), part("job", b"{}"), part("notebook", b"n")), 400),
        (body(part("job", b"{}"), part("notebook", b"n"), part("../../etc/passwd", b"x")), 400),
        (body(*(part(f"p{number}", b"") for number in range(100_000))), 413),
        (body(*(part(f"p{number}", b"") for number in range(100))), 400),
        (body(part("job", b"{}"), part("notebook", b"n", "Content-Transfer-Encoding: base64\r\n")), 400),
        (body(part("job", b"{}", "".join(f"X-{n}: y\r\n" for n in range(1_000))), part("notebook", b"n")), 400),
        (body(part("job", b"{}", f"X: {'y' * 20_000}\r\n"), part("notebook", b"n")), 400),
        (body(part("job", b"{}"), part("notebook", b"n"))[:-30], 400),
        (b"", 400),
        (b"no multipart at all", 400),
        (b"--edge\r\n\r\nno disposition\r\n--edge--\r\n", 400),
        (GOOD + b"x" * 200_000, 413),
    ],
)
def test_what_is_not_a_submission_is_refused(tmp_path: Path, data: bytes, status: int) -> None:
    with pytest.raises(ProblemError) as caught:
        take(data, tmp_path)
    assert caught.value.status == status
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= sum(BOUNDS.values())
    assert not list(tmp_path.parent.glob("etc"))


@pytest.mark.parametrize(
    "content_type", ["", "application/json", "multipart/form-data", "multipart/mixed; boundary=edge"]
)
def test_another_media_type_is_refused(tmp_path: Path, content_type: str) -> None:
    with pytest.raises(ProblemError) as caught:
        take(GOOD, tmp_path, content_type=content_type)
    assert caught.value.status == 415


def test_a_boundary_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProblemError) as caught:
        take(GOOD, tmp_path, content_type=f"multipart/form-data; boundary={'b' * 5000}")
    assert caught.value.status in {400, 415}


@pytest.mark.threat(93)
def test_a_body_without_an_end_is_read_up_to_its_bound(tmp_path: Path) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        yield part("job", b"{}") + b'--edge\r\nContent-Disposition: form-data; name="files"\r\n\r\n'
        while True:
            sent += 4096
            yield bytes(4096)

    with pytest.raises(ProblemError) as caught:
        asyncio.run(receive(endless(), TYPE, tmp_path, BOUNDS))
    assert caught.value.status == 413
    assert sent < 1 << 20


@pytest.mark.threat(93)
def test_slow_bytes_are_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multipart, "_IDLE_SECONDS", 0.2)

    async def stalls() -> AsyncIterator[bytes]:
        yield GOOD[:100]
        await asyncio.sleep(3600)

    with pytest.raises(ProblemError) as caught:
        asyncio.run(receive(stalls(), TYPE, tmp_path, BOUNDS))
    assert caught.value.status == 408

    monkeypatch.setattr(multipart, "_GRACE_SECONDS", 0.2)

    async def drips() -> AsyncIterator[bytes]:
        for number in range(len(GOOD)):
            await asyncio.sleep(0.05)
            yield GOOD[number : number + 1]

    (tmp_path / "two").mkdir()
    with pytest.raises(ProblemError) as caught:
        asyncio.run(receive(drips(), TYPE, tmp_path / "two", BOUNDS))
    assert caught.value.status == 408
