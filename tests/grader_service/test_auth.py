import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accounts import Accounts
from fake_hub import ACCESS, ADA, OWN, FakeHub, Write, fake_hub, json_answer, settings_of
from porter import Porter, settings_with
from sqlalchemy import Engine
from structlog.testing import capture_logs

from attacks.harness import Stage
from grader_service import auth
from grader_service.auth import Unauthorized, unix_groups_of
from grader_service.database import open_engine, upgrade
from grader_service.hub import HubUnavailable
from grader_service.settings import GradersTable, Settings

DAY = 86_400.0
TEACHERS = GradersTable(hub_groups=["teachers"])


@pytest.fixture
def fake() -> Iterator[FakeHub]:
    with fake_hub() as fake:
        yield fake


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Engine]:
    engine = open_engine(f"sqlite:///{tmp_path}/one.db")
    upgrade(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def settings(fake: FakeHub, tmp_path: Path) -> Callable[..., Settings]:
    """Of courses by name, with this hub."""
    return lambda **courses: settings_with(tmp_path, settings_of(tmp_path, fake.url), courses)


@pytest.fixture
def porter(settings: Callable[..., Settings], sqlite: Engine) -> Iterator[Porter]:
    """A hub, where Ada is a teacher, and a course `python` of the teachers."""
    with Porter.open(settings(python=TEACHERS), sqlite) as porter:
        yield porter


@pytest.fixture
def accounts(stage: Stage) -> Iterator[Accounts]:
    with Accounts.open(stage) as accounts:
        yield accounts


@pytest.mark.parametrize("word", ["Bearer", "bearer", "BEARER", "token", "Token"])
def test_a_token_comes_as_bearer_or_as_the_hub_has_it(porter: Porter, word: str) -> None:
    assert porter.runner.run(porter.authenticator.identify(f"{word} {ADA}")).name == "ada"


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        ADA,
        "Bearer",
        "Bearer ",
        f"Basic {ADA}",
        f"Bearer {ADA} {ADA}",
        f"Bearer\t{ADA}",
        f"Bearer {ADA}\n",
        f"Bearer {ADA}\r\nX-More: yes",
        f"Bearer {ADA}\0",
        "Bearer ä" + ADA,
        "Bearer " + "x" * 513,
        " Bearer " + ADA,
    ],
)
def test_what_is_no_token_is_refused_without_asking(porter: Porter, fake: FakeHub, header: str | None) -> None:
    with pytest.raises(Unauthorized, match="Send your token"):
        porter.runner.run(porter.authenticator.identify(header))
    assert fake.asked == []


def test_a_courses_token_is_good_for_its_course(
    settings: Callable[..., Settings], engine: Engine, fake: FakeHub
) -> None:
    tokens_only = GradersTable(tokens_only=True)
    with Porter.open(settings(python=TEACHERS, Python=tokens_only, r=tokens_only), engine) as porter:
        token_id, token = porter.tokens.create("r", DAY, "", "root")
        _, of_no_course = porter.tokens.create("gone", DAY, "", "root")
        identity = porter.who(token)
        assert (identity.name, identity.kind, identity.token_course) == (f"token:{token_id}", "token", "r")
        assert porter.courses(token) == ["r"]
        assert [porter.may(token, course) for course in ("r", "R", "python", "Python", "", "gone")] == [True] + [
            False
        ] * 5
        assert [porter.may(of_no_course, course) for course in ("r", "python", "gone")] == [False] * 3
        porter.tokens.revoke(token_id)
        with pytest.raises(Unauthorized):
            porter.who(token)
    assert fake.asked == [], "the hub is not shown tokens of courses"


def test_a_wrong_token_of_a_course_is_not_shown_to_the_hub(porter: Porter, fake: FakeHub) -> None:
    _, token = porter.tokens.create("python", DAY, "", "root")
    for wrong in (token[:-1], token + "x", "gst_", "gst_" + "0" * 12 + "_" + "A" * 43):
        with pytest.raises(Unauthorized, match="not known, or has expired"):
            porter.who(wrong)
    assert fake.asked == []


def test_without_a_hub_only_tokens_of_courses_count(tmp_path: Path, sqlite: Engine) -> None:
    settings = settings_with(tmp_path, None, {"python": GradersTable(tokens_only=True)})
    with Porter.open(settings, sqlite) as porter:
        _, token = porter.tokens.create("python", DAY, "", "root")
        assert porter.may(token, "python")
        with pytest.raises(Unauthorized, match="not known, or has expired"):
            porter.who(ADA)


def test_who_may_grade_is_each_courses_own(settings: Callable[..., Settings], sqlite: Engine, fake: FakeHub) -> None:
    """A teaching assistant here may be a student there."""
    courses = {
        "python": GradersTable(hub_groups=["teachers", "assistants"]),
        "r": GradersTable(users=["bea", "ada"]),
        "c": GradersTable(hub_groups=["nobody"], users=["somebody"]),
    }
    fake.user(ADA, "ada", "assistants", "students-c")
    fake.user("token-of-bea", "bea", "students-python")
    with Porter.open(settings(**courses), sqlite) as porter:
        assert porter.courses(ADA) == ["python", "r"]
        assert porter.courses("token-of-bea") == ["r"]
        for token in (ADA, "token-of-bea"):
            assert [course for course in (*courses, "x", "") if porter.may(token, course)] == porter.courses(token)


def test_an_administrator_of_the_hub_is_no_grader(porter: Porter, fake: FakeHub) -> None:
    everything = ["admin:users", "access:services", "read:users:groups"]
    fake.answers["/hub/api/user", ADA] = json_answer(
        {"kind": "user", "name": "root", "admin": True, "scopes": everything, "groups": ["teachers"]}
    )
    fake.answers["/hub/api/users/root", OWN] = json_answer(
        {"kind": "user", "name": "root", "admin": True, "groups": []}
    )
    assert porter.who(ADA).name == "root"
    assert not porter.may(ADA, "python")


@pytest.mark.parametrize("name", ["Ada", "ADA", "аda", "adа", "ada1", "ad", "а", "adä", "ada.", "1000", "0"])
def test_a_name_that_is_alike_is_another_name(
    settings: Callable[..., Settings], sqlite: Engine, fake: FakeHub, name: str
) -> None:
    fake.user("another", name)
    with Porter.open(settings(python=GradersTable(users=["ada"])), sqlite) as porter:
        assert porter.may(ADA, "python")
        assert porter.who("another").name == name
        assert not porter.may("another", "python")


def test_nobody_is_called_like_a_token(settings: Callable[..., Settings], sqlite: Engine, fake: FakeHub) -> None:
    with Porter.open(settings(python=GradersTable(tokens_only=True)), sqlite) as porter:
        token_id, token = porter.tokens.create("python", DAY, "", "root")
        assert porter.may(token, "python")
        fake.user(ADA, f"token:{token_id}")
        with pytest.raises(Unauthorized, match="name of this hub user"):
            porter.who(ADA)


def test_a_users_name_is_no_group_and_a_group_no_user(
    settings: Callable[..., Settings], sqlite: Engine, fake: FakeHub
) -> None:
    fake.user(ADA, "ada", "bea")
    fake.user("token-of-teachers", "teachers", "ada")
    with Porter.open(settings(python=TEACHERS, r=GradersTable(users=["bea"])), sqlite) as porter:
        assert porter.courses(ADA) == []
        assert porter.courses("token-of-teachers") == []


def test_unix_groups_are_those_of_the_host(
    settings: Callable[..., Settings], sqlite: Engine, fake: FakeHub, accounts: Accounts
) -> None:
    """Primary and other groups count; a group of the hub with the same name, a uid or a gid for a name do not."""
    gid = accounts.group("course")
    accounts.group("students")
    first, second = accounts.user("first", "course"), accounts.user("second", "students", "course")
    student = accounts.user("student", "students")
    names = [
        first.pw_name,
        second.pw_name,
        student.pw_name,
        str(first.pw_uid),
        str(gid),
        first.pw_name.upper(),
        "unknown",
    ]
    for name in names:
        fake.user(f"token-of-{name}", name)
    fake.user("token-of-pretender", "pretender", accounts.name("course"), str(gid))
    graders = GradersTable(unix_groups=[accounts.name("course")])
    with Porter.open(settings(python=graders, r=GradersTable(unix_groups=[str(gid)])), sqlite) as porter:
        allowed = [name for name in [*names, "pretender"] if porter.courses(f"token-of-{name}")]
        assert allowed == [first.pw_name, second.pw_name]
        assert porter.courses(f"token-of-{first.pw_name}") == ["python"]


def test_a_hub_group_is_not_fulfilled_by_a_unix_group(
    settings: Callable[..., Settings], sqlite: Engine, fake: FakeHub, accounts: Accounts
) -> None:
    accounts.group("course")
    accounts.group("other")
    user = accounts.user("user", "course", "other")
    fake.user(ADA, user.pw_name)
    courses = {
        "python": GradersTable(hub_groups=[accounts.name("course")]),
        "r": GradersTable(unix_groups=[accounts.name("other")]),
    }
    with Porter.open(settings(**courses), sqlite) as porter:
        assert porter.courses(ADA) == ["r"]


def test_who_leaves_a_unix_group_stops_within_the_time(
    settings: Callable[..., Settings], sqlite: Engine, fake: FakeHub, accounts: Accounts
) -> None:
    for word in ("course", "students"):
        accounts.group(word)
    people = {
        "other": accounts.user("other", "students", "course").pw_name,
        "primary": accounts.user("primary", "course").pw_name,
        "deleted": accounts.user("deleted", "course").pw_name,
    }
    for name in people.values():
        fake.user(f"token-of-{name}", name)
    with Porter.open(settings(python=GradersTable(unix_groups=[accounts.name("course")])), sqlite) as porter:

        def still() -> list[str]:
            return [word for word, name in people.items() if porter.may(f"token-of-{name}", "python")]

        assert still() == list(people)
        accounts.set_groups("other")
        accounts.set_primary("primary", "students")
        accounts.remove("deleted")
        porter.clock.now += 29.9
        assert still() == list(people), "the test could not fail"
        porter.clock.now += 0.1
        assert still() == []
        accounts.set_groups("other", "course")
        porter.clock.now += 30
        assert still() == ["other"]


def test_unix_groups_of_nobody() -> None:
    for name in ("", "no-such-user", "0", "1000", "ROOT", "root\0", "root:x", "\ud800"):
        assert unix_groups_of(name) == frozenset()
    assert "root" in unix_groups_of("root")


def test_a_list_of_users_that_does_not_answer_lets_nobody_in(
    settings: Callable[..., Settings], sqlite: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()

    def slow(name: str) -> frozenset[str]:
        over.wait(60)
        return frozenset({"course"})

    monkeypatch.setattr(auth, "unix_groups_of", slow)
    monkeypatch.setattr(auth, "_USERS_SECONDS", 0.2)
    with Porter.open(settings(python=GradersTable(unix_groups=["course"])), sqlite) as porter:
        for _ in range(6):  # more than there are threads
            with pytest.raises(HubUnavailable, match="users and groups does not answer"):
                porter.who(ADA)
        over.set()
        assert porter.may(ADA, "python"), "it is asked again as soon as it answers"


@pytest.mark.parametrize("how", ["groups", "scope", "token", "user"])
def test_who_is_removed_in_the_hub_stops_within_the_time(porter: Porter, fake: FakeHub, how: str) -> None:
    assert porter.may(ADA, "python")
    if how == "groups":
        fake.user(ADA, "ada")
    elif how == "scope":
        fake.user(ADA, "ada", "teachers", scopes=("users:activity!user=ada",))
    elif how == "token":
        del fake.answers["/hub/api/user", ADA]
    else:
        fake.answers["/hub/api/users/ada", OWN] = json_answer({}, "404 Not Found")
    porter.clock.now += 29.9
    assert porter.may(ADA, "python"), "the test could not fail"
    porter.clock.now += 0.1
    assert not porter.may(ADA, "python")


def test_the_time_counts_from_the_question(porter: Porter, fake: FakeHub) -> None:
    """The hub answered in the beginning, and its answer was long on the way."""
    answer = fake.answers["/hub/api/users/ada", OWN]
    assert isinstance(answer, bytes)

    def late(write: Write) -> None:
        porter.clock.now += 25
        write(answer)

    fake.answers["/hub/api/users/ada", OWN] = late
    identity = porter.who(ADA)
    assert identity.until == pytest.approx(porter.clock.now + 5)
    fake.user(ADA, "ada")
    porter.clock.now += 5
    assert not porter.may(ADA, "python")


@pytest.mark.parametrize("seconds", [0.0, 1.0, 60.0])
def test_the_configured_time_holds(
    settings: Callable[..., Settings], sqlite: Engine, fake: FakeHub, seconds: float
) -> None:
    some = settings(python=TEACHERS)
    assert some.hub is not None
    some = some.model_copy(update={"hub": some.hub.model_copy(update={"cache_seconds": seconds})})
    with Porter.open(some, sqlite) as porter:
        assert porter.may(ADA, "python")
        fake.user(ADA, "ada")
        porter.clock.now += seconds
        assert not porter.may(ADA, "python")


def test_an_identity_says_when_it_is_too_old(porter: Porter) -> None:
    assert porter.who(ADA).until == porter.clock.now + 30
    _, token = porter.tokens.create("python", DAY, "", "root")
    assert porter.who(token).until == porter.clock.now + 30


def test_an_old_answer_does_not_stand_in_for_a_hub_that_is_down(porter: Porter, fake: FakeHub) -> None:
    assert porter.may(ADA, "python")
    answers = dict(fake.answers)
    for key in fake.answers:
        fake.answers[key] = json_answer({}, "503 Service Unavailable")
    porter.clock.now += 29
    assert porter.may(ADA, "python")
    porter.clock.now += 1
    for _ in range(3):
        with pytest.raises(HubUnavailable):
            porter.who(ADA)
    fake.answers = answers
    assert porter.may(ADA, "python"), "a hub that is back is asked at once"


def test_a_new_right_is_noticed_after_seconds(porter: Porter, fake: FakeHub) -> None:
    fake.user(ADA, "ada", "teachers", scopes=())
    assert not porter.may(ADA, "python")
    fake.user(ADA, "ada", "teachers")
    porter.clock.now += 4.9
    assert not porter.may(ADA, "python")
    porter.clock.now += 0.1
    assert porter.may(ADA, "python")


def test_a_user_who_was_made_again_has_nothing_of_the_old_one(porter: Porter, fake: FakeHub) -> None:
    assert porter.may(ADA, "python")
    del fake.answers["/hub/api/user", ADA]
    fake.user("new-token", "ada")
    assert not porter.may("new-token", "python"), "what is remembered of the old one's token is of that token"
    porter.clock.now += 30
    assert not porter.may(ADA, "python")
    assert not porter.may("new-token", "python")


def test_the_configuration_is_obeyed_at_once(porter: Porter, settings: Callable[..., Settings]) -> None:
    porter.authenticator.settings = settings(python=GradersTable(users=["ada"]))
    assert porter.may(ADA, "python")
    porter.authenticator.settings = settings(python=GradersTable(users=["bea"]))
    assert not porter.may(ADA, "python")
    porter.authenticator.settings = settings(r=GradersTable(users=["ada"]))
    assert [porter.may(ADA, course) for course in ("python", "r")] == [False, True]


def test_many_requests_ask_once(porter: Porter, fake: FakeHub) -> None:
    async def many() -> set[str]:
        identities = await asyncio.gather(*(porter.authenticator.identify(f"Bearer {ADA}") for _ in range(500)))
        return {identity.name for identity in identities}

    assert porter.runner.run(many()) == {"ada"}
    assert len(fake.asked) == 3


def test_one_who_gives_up_does_not_take_the_others_along(porter: Porter, fake: FakeHub) -> None:
    answer, arrived, go_on = fake.answers["/hub/api/user", ADA], threading.Event(), threading.Event()
    assert isinstance(answer, bytes)

    def waits(write: Write) -> None:
        arrived.set()
        go_on.wait(30)
        write(answer)

    fake.answers["/hub/api/user", ADA] = waits

    async def two() -> str:
        first = asyncio.create_task(porter.authenticator.identify(f"Bearer {ADA}"))
        await asyncio.to_thread(arrived.wait, 30)
        second = asyncio.create_task(porter.authenticator.identify(f"Bearer {ADA}"))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        go_on.set()
        assert first.cancelled()
        return (await second).name

    assert porter.runner.run(two()) == "ada"
    assert len(fake.asked) == 3


def test_what_is_remembered_is_bounded_and_holds_no_token(porter: Porter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "_MOST_REMEMBERED", 20)
    assert porter.may(ADA, "python")
    for number in range(50):
        porter.may(f"guess-{number}", "python")
    held = vars(porter.authenticator)
    assert len(held["_remembered"]) == 20
    assert held["_asking"] == {}
    assert ADA not in repr(held)
    assert "guess-" not in repr(held)


@pytest.mark.filterwarnings("error")
def test_every_decision_is_logged_and_no_token(
    porter: Porter, fake: FakeHub, settings: Callable[..., Settings], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    _, of_course = porter.tokens.create("python", DAY, "", "root")
    fake.user("token-of-bea", "bea")
    fake.user("token-of-odd", "to:ken", scopes=(ACCESS,))
    tokens = [ADA, "token-of-bea", "token-of-odd", "token-of-nobody", of_course, of_course[:-1]]
    with capture_logs() as logs:
        for token in tokens:
            for course in ("python", "no-such-course\n"):
                porter.may(token, course)
        fake.answers["/hub/api/user", "token-of-late"] = lambda write: write(b"rubbish")
        with pytest.raises(HubUnavailable):
            porter.who("token-of-late")
    shown = [(entry["event"], entry.get("user"), entry.get("course"), entry.get("by")) for entry in logs]
    token_name = porter.who(of_course).name
    for expected in (
        ("identity_known", "ada", None, None),
        ("grading_allowed", "ada", "python", "hub_group"),
        ("grading_refused", "ada", None, None),
        ("grading_refused", "bea", "python", None),
        ("grading_allowed", token_name, "python", "token"),
        ("identity_refused", None, None, None),
        ("identity_unavailable", None, None, None),
    ):
        assert expected in shown, shown
    keys: set[Any] = {key for entry in logs for key in entry}
    assert keys <= {"event", "log_level", "user", "course", "by", "reason"}
    everything = repr(logs) + caplog.text
    assert not any(token in everything for token in (*tokens, "token-of-late", OWN))
    assert "no-such-course" not in everything


def test_what_is_wrong_with_the_service_is_for_its_administrator(porter: Porter, fake: FakeHub) -> None:
    fake.answers["/hub/api/user", OWN] = json_answer({}, "403 Forbidden")
    with capture_logs() as logs, pytest.raises(HubUnavailable) as caught:
        porter.who(ADA)
    assert str(fake.port) not in str(caught.value)
    assert "tell the service's administrator" in str(caught.value)
    assert f"{fake.port}/hub/api does not accept the token in hub.token_file" in logs[-1]["reason"]


def test_what_callers_are_told_names_nobody(porter: Porter, fake: FakeHub) -> None:
    fake.user("token-of-bea", "bea", scopes=())
    words = []
    for token in ("token-of-bea", "unknown", "gst_unknown"):
        with pytest.raises(Unauthorized) as caught:
            porter.who(token)
        words.append(str(caught.value))
    assert not any(secret in text for text in words for secret in ("bea", "unknown"))
