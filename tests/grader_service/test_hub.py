"""Identity on a real JupyterHub with real users' servers. What odd hubs answer is in test_hub_answers.py."""

import asyncio
import contextlib
import dataclasses
import pwd
import secrets
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from accounts import Accounts
from hub_host import HubHost, quote_name
from porter import Porter, settings_with
from sqlalchemy import Engine

from attacks.harness import Stage, eventually
from campus import Campus
from grader_service.auth import Authenticator, Unauthorized
from grader_service.database import open_engine, upgrade
from grader_service.hub import Hub, HubMisconfigured, HubUnavailable, check, hub_config
from grader_service.settings import GradersTable, HubSettings, Settings
from service_host import LONG, hosting, notebook, submission, texts

pytestmark = pytest.mark.slow

ACCESS = "access:services!service=grader-service"
DOCUMENT = Path(__file__).resolve().parents[2] / "docs/service-identity.md"
OTHERS = {"none": [], "narrow": ["read:users:groups!group=teachers"], "much": ["read:users:groups", "list:groups"]}
"""Other services of the hub, and their scopes."""


def _secret_file(directory: Path, word: str) -> Path:
    path = directory / word
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32) + "\n")
    return path


def _more_services(directory: Path) -> str:
    lines = []
    for word, scopes in OTHERS.items():
        token = _secret_file(directory, word).read_text().strip()
        lines.append(f"c.JupyterHub.services.append({{'name': {word!r}, 'api_token': {token!r}}})")
        if scopes:
            role = {"name": f"{word}-role", "services": [word], "scopes": scopes}
            lines.append(f"c.JupyterHub.load_roles.append({role!r})")
    return "\n".join(lines) + "\n"


@dataclasses.dataclass(frozen=True)
class World:
    """A hub, the service's settings, a directory for files of root, and who is called what."""

    host: HubHost
    settings: Settings
    directory: Path
    teacher: str
    student: str

    def hub_settings(self, token_file: Path | None = None, url: str = "", cache_seconds: float = 30) -> HubSettings:
        """As the settings have it, but for what is given."""
        hub = self.settings.hub
        assert hub is not None
        return HubSettings(
            api_url=url or hub.api_url, token_file=token_file or hub.token_file, cache_seconds=cache_seconds
        )

    def join(self, user: str) -> None:
        """Make a user a teacher."""
        self.host.done("POST", "/groups/teachers/users", json={"users": [user]})

    def leave(self, user: str) -> None:
        """Take that back."""
        self.host.done("DELETE", "/groups/teachers/users", json={"users": [user]})


@contextlib.contextmanager
def _world(stage: Stage, accounts: Accounts, python: Path, graders: GradersTable) -> Iterator[World]:
    directory = accounts.directory / f"etc-{secrets.token_hex(4)}"
    directory.mkdir(mode=0o700)
    token_file = _secret_file(directory, "hub-token")
    # the port is known only when there is a host; the text that goes into its configuration does not need it
    hub = HubSettings(api_url="http://127.0.0.1:1/hub/api", token_file=token_file)
    text = hub_config(settings_with(directory, hub, {"python": graders})) + _more_services(directory)
    with HubHost.open(stage, python, text) as host:
        hub = HubSettings(api_url=host.public_api_url, token_file=token_file)
        settings = settings_with(directory, hub, {"python": graders, "r": GradersTable(users=["somebody"])})
        teacher, student = accounts.name("teacher"), accounts.name("student")
        host.done("POST", "/users", json={"usernames": [teacher, student]})
        yield World(host, settings, directory, teacher, student)


@pytest.fixture(scope="module")
def people(stage: Stage) -> Iterator[Accounts]:
    with Accounts.open(stage) as accounts:
        for group in ("course", "people"):
            accounts.group(group)
        accounts.user("teacher", "people", "course")
        accounts.user("student", "people")
        yield accounts


@pytest.fixture(scope="module")
def python(people: Accounts, campus: Campus) -> Path:
    """With JupyterLab and JupyterHub, for all users."""
    return campus.python


@pytest.fixture(scope="module")
def world(stage: Stage, people: Accounts, python: Path) -> Iterator[World]:
    """The hub's group `teachers` grades. A teacher's and a student's servers run."""
    with _world(stage, people, python, GradersTable(hub_groups=["teachers"])) as world:
        world.join(world.teacher)
        for user in (world.teacher, world.student):
            world.host.start_server(user)
        yield world


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = open_engine(f"sqlite:///{tmp_path}/tokens.db")
    upgrade(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def porter(world: World, engine: Engine) -> Iterator[Porter]:
    with Porter.open(world.settings, engine) as porter:
        yield porter


def _inspect(settings: HubSettings) -> list[str]:
    async def inspecting() -> list[str]:
        hub = Hub(settings)
        try:
            return await check(hub)
        finally:
            await hub.close()

    return asyncio.run(inspecting())


def test_a_teachers_server_grades_with_the_documented_scopes(world: World, porter: Porter) -> None:
    token, name = world.host.server_token(world.teacher), world.teacher
    mine = world.host.call("GET", "/user", token=token).body
    documented = [f"access:servers!server={name}/", ACCESS, f"users:activity!user={name}"]
    # what the hub gives to every token, and what the last one contains
    implied = [f"read:users:{what}!user={name}" for what in ("activity", "groups", "name")]
    assert mine["scopes"] == sorted([*documented, *implied])
    for scope in (ACCESS, "access:servers!server", "users:activity!user", "read:users:groups"):
        assert f"`{scope}`" in DOCUMENT.read_text(encoding="utf-8")
    assert porter.who(token).name == name
    assert porter.courses(token) == ["python"]
    assert porter.may(token, "python")
    assert not porter.may(token, "r")


def test_the_services_token_may_do_exactly_what_is_needed(world: World) -> None:
    assert _inspect(world.hub_settings()) == []
    assert _inspect(world.hub_settings(url=world.host.api_url)) == [], "without the proxy"
    token = world.hub_settings().token_file.read_text().strip()
    answer = world.host.call("GET", f"/users/{world.teacher}", token=token)
    assert answer.body == {"kind": "user", "name": world.teacher, "groups": ["teachers"]}
    for method, path in (
        ("GET", "/users"),
        ("GET", "/groups"),
        ("GET", "/groups/teachers"),
        ("GET", f"/users/{world.teacher}/tokens"),
        ("POST", f"/users/{world.teacher}/tokens"),
        ("POST", "/groups/teachers/users"),
        ("DELETE", f"/users/{world.teacher}"),
        ("POST", f"/users/{world.teacher}/server"),
        ("GET", "/info"),
        ("GET", "/proxy"),
    ):
        assert world.host.call(method, path, token=token, json=None).status in (403, 404), (method, path)


def test_a_students_server_does_not_grade(world: World, porter: Porter) -> None:
    token = world.host.server_token(world.student)
    assert ACCESS not in world.host.call("GET", "/user", token=token).body["scopes"]
    with pytest.raises(Unauthorized, match="lacks the scope"):
        porter.who(token)
    everything = world.host.user_token(world.student)
    with pytest.raises(Unauthorized, match="lacks the scope"):
        porter.who(everything)
    refused = world.host.call("POST", f"/users/{world.student}/tokens", json={"scopes": [ACCESS]}, token=everything)
    assert refused.status in (400, 403), "nor may a student make one that does"


def test_a_token_that_another_program_got_of_a_teacher_is_refused(world: World, porter: Porter) -> None:
    """Who visits a student's server leaves a token with these scopes there. Spawner.oauth_client_allowed_scopes"""
    name = world.teacher
    token = world.host.user_token(name, [f"access:servers!user={name}"])
    assert world.host.call("GET", "/user", token=token).body["name"] == name, "the hub says it is the teacher's"
    with pytest.raises(Unauthorized, match="lacks the scope"):
        porter.who(token)
    assert porter.may(world.host.user_token(name, [ACCESS]), "python"), "one that was meant for us is not"


def test_tokens_of_services_are_nobodys(world: World, porter: Porter) -> None:
    tokens = [world.host.admin_token, world.hub_settings().token_file.read_text().strip()]
    for token in (*tokens, "", "0" * 32, tokens[0][:-1], tokens[0].upper()):
        with pytest.raises(Unauthorized):
            porter.who(token)


@pytest.mark.parametrize("way", ["server", "made"])
def test_a_teacher_who_is_removed_stops_within_the_time(world: World, porter: Porter, way: str) -> None:
    token = world.host.server_token(world.teacher) if way == "server" else world.host.user_token(world.teacher)
    assert porter.may(token, "python")
    world.leave(world.teacher)
    try:
        porter.clock.now += 29.9
        assert porter.may(token, "python"), "the test could not fail"
        porter.clock.now += 0.1
        assert not porter.may(token, "python")
        assert world.host.call("GET", "/user", token=token).body["name"] == world.teacher, "but is still a user"
    finally:
        world.join(world.teacher)
    porter.clock.now += 5
    assert porter.may(token, "python"), "and is a teacher again, with the same server"


def test_the_same_by_the_real_clock(world: World, engine: Engine) -> None:
    settings = world.settings.model_copy(update={"hub": world.hub_settings(cache_seconds=1.0)})
    token = world.host.server_token(world.teacher)
    with Porter.open(settings, engine) as porter:
        porter.authenticator = Authenticator(settings, porter.tokens, porter.hub)
        assert porter.may(token, "python")
        world.leave(world.teacher)
        try:
            assert eventually(lambda: not porter.may(token, "python"), 60)
        finally:
            world.join(world.teacher)


def test_a_revoked_token_stops_within_the_time(world: World, porter: Porter) -> None:
    token = world.host.user_token(world.teacher)
    token_id = world.host.call("GET", "/user", token=token).body["token_id"]
    assert porter.may(token, "python")
    world.host.done("DELETE", f"/users/{world.teacher}/tokens/{token_id}")
    porter.clock.now += 30
    with pytest.raises(Unauthorized, match="not known"):
        porter.who(token)


def test_a_user_who_is_deleted_and_made_again_starts_anew(world: World, porter: Porter) -> None:
    world.host.done("POST", "/users/guest")
    world.join("guest")
    old = world.host.user_token("guest")
    assert porter.may(old, "python")
    world.host.done("DELETE", "/users/guest")
    world.host.done("POST", "/users/guest")
    try:
        new = world.host.user_token("guest")
        assert not porter.may(new, "python"), "although the old one is still remembered"
        porter.clock.now += 30
        for token in (old, new):
            assert not porter.may(token, "python")
        world.join("guest")
        porter.clock.now += 5
        assert porter.may(new, "python")
        assert not porter.may(old, "python")
    finally:
        world.host.done("DELETE", "/users/guest")


def test_the_check_names_what_a_service_lacks_or_has_too_much(world: World) -> None:
    with pytest.raises(HubMisconfigured, match="'none' lacks the scope read:users:groups;"):
        _inspect(world.hub_settings(world.directory / "none"))
    with pytest.raises(HubMisconfigured, match=r"it has only read:users:groups!group=teachers\)"):
        _inspect(world.hub_settings(world.directory / "narrow"))
    (warning,) = _inspect(world.hub_settings(world.directory / "much"))
    assert warning.endswith("and has list:groups, read:groups:name")
    with pytest.raises(HubMisconfigured, match="does not accept the token"):
        _inspect(world.hub_settings(_secret_file(world.directory, "unknown")))
    person = _secret_file(world.directory, "person")
    person.write_text(world.host.user_token(world.teacher))
    with pytest.raises(HubMisconfigured, match="belongs to a person"):
        _inspect(world.hub_settings(person))
    with pytest.raises(HubMisconfigured, match="no API of a JupyterHub"):
        _inspect(world.hub_settings(url=world.host.url + "/hub/apiary"))


def test_a_hub_that_stands_still_or_is_killed_lets_nobody_in(world: World, engine: Engine) -> None:
    token = world.host.server_token(world.teacher)
    with contextlib.ExitStack() as stack:
        porters = []
        for url in (world.host.public_api_url, world.host.api_url):
            settings = world.settings.model_copy(update={"hub": world.hub_settings(url=url)})
            porters.append(stack.enter_context(Porter.open(settings, engine)))
        assert all(porter.may(token, "python") for porter in porters)

        world.host.signal(signal.SIGSTOP)
        try:
            for porter in porters:
                assert porter.may(token, "python"), "what is remembered does for a while"
                assert porter.hub is not None
                porter.hub._deadline_seconds = 0.5
                porter.clock.now += 30
                with pytest.raises(HubUnavailable, match="no answer within"):
                    porter.who(token)
        finally:
            world.host.signal(signal.SIGCONT)

        world.host.kill()
        try:
            for porter in porters:
                assert porter.hub is not None
                porter.hub._deadline_seconds = 20
                with pytest.raises(HubUnavailable):
                    porter.who(token)
        finally:
            world.host.start()
        # the same server, which outlived the hub, goes on as soon as the hub is back
        assert all(porter.may(token, "python") for porter in porters)


@pytest.fixture(scope="module")
def open_world(stage: Stage, people: Accounts, python: Path) -> Iterator[World]:
    """The other half of `hub_config`: every user may show a token. Who grades is in a Unix group."""
    graders = GradersTable(unix_groups=[people.name("course")])
    with _world(stage, people, python, graders) as world:
        yield world


def test_a_course_of_a_unix_group(open_world: World, people: Accounts, engine: Engine) -> None:
    world = open_world
    for user in (world.teacher, world.student):
        world.host.start_server(user)
    teacher, student = (world.host.server_token(user) for user in (world.teacher, world.student))
    with Porter.open(world.settings, engine) as porter:
        assert porter.who(student).name == world.student, "the service knows the student"
        assert [porter.may(token, "python") for token in (teacher, student)] == [True, False]
        with pytest.raises(Unauthorized, match="lacks the scope"):
            porter.who(world.host.user_token(world.teacher, [f"access:servers!user={world.teacher}"]))
        people.set_groups("teacher")
        try:
            porter.clock.now += 29.9
            assert porter.may(teacher, "python"), "the test could not fail"
            porter.clock.now += 0.1
            assert [porter.may(token, "python") for token in (teacher, student)] == [False, False]
        finally:
            people.set_groups("teacher", "course")


def _likenesses(name: str) -> list[str]:
    """Names of hub users that are not this one, whatever a careless comparison thinks."""
    entry = pwd.getpwnam(name)
    alike = [name.upper(), name.title(), name.replace("a", "а", 1), f"{name}1", f"{name}@x", f"{name}%2F", f"{name}+"]
    return [*alike, str(entry.pw_uid), str(entry.pw_gid), "0"]


def test_users_with_likenesses_are_nobody_else(open_world: World, engine: Engine) -> None:
    world = open_world
    with Porter.open(world.settings, engine) as porter:
        assert porter.may(world.host.user_token(world.teacher), "python")
        for other in _likenesses(world.teacher):
            world.host.done("POST", f"/users/{quote_name(other)}")
            token = world.host.user_token(other)
            assert porter.who(token).name == other
            assert not porter.may(token, "python")


@pytest.mark.parametrize("name", ["token:0123456789ab", "a:b", "a b", "a\u200b", "ｔeacher", "a,b"])
def test_users_with_impossible_names_are_refused(open_world: World, engine: Engine, name: str) -> None:
    open_world.host.done("POST", f"/users/{quote_name(name)}")
    with Porter.open(open_world.settings, engine) as porter:
        with pytest.raises(Unauthorized, match="name of this hub user"):
            porter.who(open_world.host.user_token(name))


def test_servers_tokens_at_the_service_itself(world: World) -> None:
    """Over HTTP, as the plugin sends them: the teacher's grades, the student's does not, a removed teacher's stops."""
    hub = world.settings.hub
    assert hub is not None
    table = {"api_url": hub.api_url, "token_file": str(hub.token_file), "cache_seconds": 1}
    course = {"environment": sys.prefix, "graders": {"hub_groups": ["teachers"]}}
    teacher, student = (world.host.server_token(user) for user in (world.teacher, world.student))
    with hosting(hub=table) as service:
        service.configure(hubcourse=course)
        service.start()
        with service.client(teacher) as client:
            assert [one.name for one in client.courses()] == ["hubcourse"]
            job = client.submit("hubcourse", submission(), notebook("print(6 * 7)"))
            job = client.wait(job.id, timeout_seconds=LONG)
            assert (job.state, job.submitter) == ("done", world.teacher)
            assert texts(client.notebook(job.id)) == ["42\n"]
        with service.raw(student) as raw:
            paths = ["/v1/courses/hubcourse/jobs", f"/v1/jobs/{job.id}", f"/v1/jobs/{job.id}/notebook"]
            assert {raw.get(path).status_code for path in paths} <= {401, 403, 404}
            assert raw.post("/v1/courses/hubcourse/jobs", files={"job": b"{}"}).status_code in {401, 403}
        world.leave(world.teacher)
        try:
            with service.raw(teacher) as raw:
                assert eventually(lambda: raw.get(f"/v1/jobs/{job.id}").status_code in {401, 404}, 60)
                assert raw.get("/v1/courses/hubcourse/jobs").status_code in {401, 403}
        finally:
            world.join(world.teacher)
        log = service.log
    assert teacher not in log
    assert student not in log
    assert "aino" not in log
