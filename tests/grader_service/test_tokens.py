import dataclasses
import re
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, select

from grader_service.database import reading
from grader_service.models import TOKENS
from grader_service.tokens import LONGEST_SECONDS, TokenStore

DAY = 86_400.0


class Clock:
    """Seconds since the epoch, as a test sets them."""

    now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(engine: Engine, clock: Clock) -> Iterator[TokenStore]:
    return TokenStore(engine, clock)


def test_a_token_names_its_course(store: TokenStore, clock: Clock) -> None:
    token_id, token = store.create("python26", 180 * DAY, "the course's laptop", "root")
    info = store.verify(token)
    assert info is not None
    assert dataclasses.asdict(info) == {
        "id": token_id,
        "course": "python26",
        "created_at": clock.now,
        "expires_at": clock.now + 180 * DAY,
        "revoked_at": None,
        "note": "the course's laptop",
        "created_by": "root",
    }


def test_what_is_kept_lets_nobody_in(store: TokenStore, engine: Engine) -> None:
    token_id, token = store.create("python26", DAY, "", "root")
    with reading(engine) as connection:
        (row,) = connection.execute(select(TOKENS)).all()
    secret = token.removeprefix(f"gst_{token_id}_")
    assert len(secret) == 43
    assert all(secret not in str(value) for value in row)
    for kept in (row.digest, f"gst_{token_id}_{row.digest}", f"gst_{token_id}_{row.digest[:43]}"):
        assert store.verify(kept) is None


def test_tokens_are_found_by_scanners_and_never_alike(store: TokenStore) -> None:
    made = [store.create("c", DAY, "", "root")[1] for _ in range(50)]
    assert len(set(made)) == 50
    assert all(re.fullmatch(r"gst_[0-9a-f]{12}_[A-Za-z0-9_-]{43}", token) for token in made)


def test_other_tokens_are_refused(store: TokenStore) -> None:
    token_id, token = store.create("c", DAY, "", "root")
    other_id, other = store.create("other", DAY, "", "root")
    wrong = [
        "",
        "gst_",
        token[:-1],
        token + "x",
        token + "\n",
        " " + token,
        token.upper(),
        token[:-1] + ("a" if token[-1] != "a" else "b"),
        f"gst_{token_id}_" + other.removeprefix(f"gst_{other_id}_"),
        f"gst_{token_id}_" + "A" * 43,
        "gst_" + "0" * 12 + token.removeprefix(f"gst_{token_id}"),
        f"gst_' OR 1=1 -- _{'A' * 43}",
        f"gst_%%%%%%%%%%%%_{'A' * 43}",
        token.replace("g", "ｇ", 1),
        token.replace("_", "\0", 1),
        "\ud800" + token,
        "gst_" + "a" * 1_000_000,
    ]
    assert [text for text in wrong if store.verify(text) is not None] == []
    assert store.verify(token) is not None


def test_a_token_expires(store: TokenStore, clock: Clock) -> None:
    _, token = store.create("c", 60.0, "", "root")
    clock.now += 59.9
    assert store.verify(token) is not None
    clock.now += 0.1
    assert store.verify(token) is None


def test_a_revoked_token_is_refused_from_then_on(store: TokenStore, engine: Engine, clock: Clock) -> None:
    token_id, token = store.create("c", DAY, "", "root")
    other_service = TokenStore(engine, clock)
    assert other_service.verify(token) is not None
    clock.now += 5
    assert store.revoke(token_id) is True
    assert other_service.verify(token) is None
    revoked_at = clock.now
    clock.now += 5
    assert store.revoke(token_id) is True, "it is revoked, which is what was asked for"
    assert [info.revoked_at for info in store.list()] == [revoked_at]


@pytest.mark.parametrize("token_id", ["", "000000000000", "%", "' OR '1'='1"])
def test_what_does_not_exist_is_not_revoked(store: TokenStore, token_id: str) -> None:
    _, token = store.create("c", DAY, "", "root")
    assert store.revoke(token_id) is False
    assert store.verify(token) is not None


def test_list_has_all_of_a_course_and_no_secrets(store: TokenStore, clock: Clock) -> None:
    first_id, first = store.create("a", 1.0, "old", "root")
    clock.now += 10
    second_id, second = store.create("a", DAY, "new", "root")
    third_id, third = store.create("A", DAY, "", "root")
    store.revoke(second_id)
    assert [info.id for info in store.list("a")] == [first_id, second_id]
    assert {info.id for info in store.list()} == {first_id, second_id, third_id}
    assert not any(token in repr(store.list()) for token in (first, second, third))


@pytest.mark.parametrize(
    ("course", "seconds", "note"),
    [
        ("", DAY, ""),
        ("a/b", DAY, ""),
        ("../a", DAY, ""),
        ("kürssi", DAY, ""),
        ("x" * 64, DAY, ""),
        ("c", 0.0, ""),
        ("c", -1.0, ""),
        ("c", float("nan"), ""),
        ("c", float("inf"), ""),
        ("c", LONGEST_SECONDS + 1, ""),
        ("c", DAY, "two\nlines"),
        ("c", DAY, "\x1b[31m"),
        ("c", DAY, "x" * 201),
    ],
)
def test_impossible_tokens_are_not_made(store: TokenStore, course: str, seconds: float, note: str) -> None:
    with pytest.raises(ValueError):
        store.create(course, seconds, note, "root")
    assert store.list() == ()
