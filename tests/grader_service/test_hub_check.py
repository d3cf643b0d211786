"""Whether the hub is set up for the service. A real JupyterHub is in test_hub.py."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import ADA, OWN, FakeHub, fake_hub, json_answer, settings_of
from structlog.testing import capture_logs

from grader_service.hub import Hub, HubMisconfigured, check
from grader_service.settings import HubSettings


@pytest.fixture
def fake() -> Iterator[FakeHub]:
    with fake_hub() as fake:
        yield fake


def inspect(settings: HubSettings) -> list[str]:
    """The warnings of `check`."""

    async def checking() -> list[str]:
        hub = Hub(settings)
        try:
            return await check(hub)
        finally:
            await hub.close()

    return asyncio.run(checking())


def test_the_check_is_content_with_what_is_needed(fake: FakeHub, tmp_path: Path) -> None:
    with capture_logs() as logs:
        assert inspect(settings_of(tmp_path, fake.url)) == []
    assert [entry["event"] for entry in logs] == ["hub_checked"]


@pytest.mark.parametrize(
    ("scopes", "words"),
    [
        ([], "lacks the scope read:users:groups;"),
        (["read:users:name", "list:users"], "lacks the scope read:users:groups;"),
        (["read:users:groups!group=teachers"], r"\(it has only read:users:groups!group=teachers\)"),
    ],
)
def test_the_check_names_what_is_missing(fake: FakeHub, tmp_path: Path, scopes: list[str], words: str) -> None:
    fake.answers["/hub/api/user", OWN] = json_answer({"kind": "service", "name": "grades", "scopes": scopes})
    with pytest.raises(HubMisconfigured, match=words):
        inspect(settings_of(tmp_path, fake.url))


def test_the_check_warns_of_what_is_too_much(fake: FakeHub, tmp_path: Path) -> None:
    scopes = ["read:users:groups", "admin:users", "shutdown"]
    fake.answers["/hub/api/user", OWN] = json_answer({"kind": "service", "name": "grades", "scopes": scopes})
    with capture_logs() as logs:
        (warning,) = inspect(settings_of(tmp_path, fake.url))
    assert warning.endswith("and has admin:users, shutdown")
    assert [(entry["event"], entry["more"]) for entry in logs] == [
        ("hub_token_may_too_much", ["admin:users", "shutdown"])
    ]


def test_the_check_knows_a_token_of_a_person_and_a_dead_one(fake: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(HubMisconfigured, match="belongs to a person"):
        inspect(settings_of(tmp_path, fake.url, ADA))
    with pytest.raises(HubMisconfigured, match="does not accept the token"):
        inspect(settings_of(tmp_path, fake.url, "no-such-token"))
    fake.answers["/hub/api/user", OWN] = json_answer({}, "404 Not Found")
    with pytest.raises(HubMisconfigured, match="no API of a JupyterHub at"):
        inspect(settings_of(tmp_path, fake.url))


def test_a_hub_that_is_away_at_the_start_is_a_warning(tmp_path: Path) -> None:
    with capture_logs() as logs:
        (warning,) = inspect(settings_of(tmp_path, "http://127.0.0.1:9/hub/api"))
    assert "cannot be asked" in warning
    assert [entry["event"] for entry in logs] == ["hub_not_checked"]
