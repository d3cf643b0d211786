"""Names of submissions, and the times in them."""

import pytest

from nbgrader_aalto.exchange.stamps import DEFAULT_FORMAT, OddName, fit_for_a_name, format_time, new_name, parse_name

MOMENT = 1_790_000_000_123_456_789
TIME = format_time(MOMENT, "UTC", DEFAULT_FORMAT)


@pytest.mark.parametrize("random", [True, False])
@pytest.mark.parametrize("user", ["alice", "a+b", "+", "anna.virtanen@uni.fi"])
def test_what_is_written_is_read_back(user: str, random: bool) -> None:
    claim = parse_name(new_name(user, "ps 1", TIME, random=random))
    assert (claim.user, claim.assignment, claim.timestamp) == (user, "ps 1", TIME)
    assert claim.time_ns == MOMENT // 1000 * 1000


def test_a_random_part_that_looks_like_a_time_is_none() -> None:
    """Else once in a while an honest student would be told of a cheating attempt."""
    claim = parse_name(f"alice+ps1+{TIME}+20260101")
    assert (claim.user, claim.assignment, claim.timestamp) == ("alice", "ps1", TIME)


@pytest.mark.parametrize(
    "name", ["", "alice", "alice+ps1", f"+ps1+{TIME}", f"alice++{TIME}", "alice+ps1+noon+abcdefgh"]
)
def test_odd_names(name: str) -> None:
    with pytest.raises(OddName):
        parse_name(name)


@pytest.mark.parametrize(
    ("text", "fit"),
    [
        (TIME, TIME),
        ("2026-01-01", "2026-01-01"),
        ("2026-01-01T12:00:00+00:00", "2026-01-01 12:00:00.000000 UTC"),
        ("2026/01/01 12:00", "2026-01-01 12:00:00.000000 UTC"),
        ("", ""),
        ("yesterday", ""),
        ("2026-01-01 12:00 /etc/passwd", ""),
        ("2026-01-01 ../../x", ""),
        ("2026-01-01" + " " * 300, ""),
    ],
)
def test_a_time_that_becomes_a_part_of_a_name(text: str, fit: str) -> None:
    assert fit_for_a_name(text) == fit
