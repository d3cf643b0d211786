"""The text for jupyterhub_config.py, as JupyterHub's own loader reads it. What it brings about is in test_hub.py."""

from pathlib import Path
from typing import Any

import jupyterhub
import pytest
from porter import settings_with
from traitlets.config import Config

from grader_service.hub import hub_config
from grader_service.settings import GradersTable, HubSettings, Settings

ACCESS = "access:services!service=grader-service"


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / 'hub\'s "token"'
    path.write_text("the-token-of-the-service\n")
    return path


def _settings(token_file: Path, **courses: GradersTable) -> Settings:
    hub = HubSettings(api_url="http://127.0.0.1:1/hub/api", token_file=token_file)
    return settings_with(token_file.parent, hub, courses)


def _executed(text: str, before: str = "") -> Config:
    config = Config()
    exec(before + text, {"c": config})
    return config


def _added(value: Any) -> list[Any]:
    """What is in a list of a configuration, or will be added to the default."""
    return list(value) if isinstance(value, list) else list(value.get_value([]))


def test_the_service_and_its_one_scope(token_file: Path) -> None:
    config = _executed(hub_config(_settings(token_file, a=GradersTable(hub_groups=["g"]))))
    assert _added(config.JupyterHub.services) == [{"name": "grader-service", "api_token": "the-token-of-the-service"}]
    (own, _) = _added(config.JupyterHub.load_roles)
    assert (own["services"], own["scopes"]) == (["grader-service"], ["read:users:groups"])
    assert _added(config.Spawner.server_token_scopes) == ["users:activity!user", "access:servers!server", ACCESS]


def test_only_the_courses_groups_may_show_a_token(token_file: Path) -> None:
    courses = {
        "a": GradersTable(hub_groups=['teachers\' "A"'.replace(" ", "-"), "b"]),
        "b": GradersTable(hub_groups=["b"]),
        "c": GradersTable(tokens_only=True),
    }
    config = _executed(hub_config(_settings(token_file, **courses)))
    (_, who) = _added(config.JupyterHub.load_roles)
    assert who["groups"] == ["b", 'teachers\'-"A"']
    assert who["scopes"] == [ACCESS]
    assert "extra_user_scopes" not in config.JupyterHub


@pytest.mark.parametrize("graders", [GradersTable(users=["ada"]), GradersTable(unix_groups=["jupyter-b"])])
@pytest.mark.parametrize("version", [(5, 2, 0), (6, 0, 0)])
def test_everybody_may_where_the_hub_does_not_know_who_grades(
    token_file: Path, monkeypatch: pytest.MonkeyPatch, graders: GradersTable, version: tuple[int, ...]
) -> None:
    monkeypatch.setattr(jupyterhub, "version_info", version)
    config = _executed(hub_config(_settings(token_file, a=GradersTable(hub_groups=["g"]), b=graders)))
    roles = {role["name"]: role for role in _added(config.JupyterHub.load_roles)}
    if version[0] == 5:
        assert roles["user"]["scopes"] == ["self", ACCESS]
    else:
        assert set(roles) == {"grader-service"}
        assert config.JupyterHub.extra_user_scopes.get_value(set()) == {ACCESS}


def test_what_the_administrator_had_stays(token_file: Path) -> None:
    before = """
c.JupyterHub.services = [{"name": "idle-culler"}]
c.JupyterHub.load_roles = [{"name": "idle-culler"}]
c.Spawner.server_token_scopes = ["users:activity!user", "access:servers!server", "read:users!user"]
"""
    config = _executed(hub_config(_settings(token_file, a=GradersTable(hub_groups=["g"]))), before)
    assert [service["name"] for service in config.JupyterHub.services] == ["idle-culler", "grader-service"]
    assert config.JupyterHub.load_roles[0] == {"name": "idle-culler"}
    assert {"read:users!user", ACCESS} <= set(config.Spawner.server_token_scopes)


def test_another_name(token_file: Path) -> None:
    config = _executed(hub_config(_settings(token_file, a=GradersTable(hub_groups=["g"])), "grades"))
    assert [service["name"] for service in _added(config.JupyterHub.services)] == ["grades"]
    assert "access:services!service=grades" in _added(config.Spawner.server_token_scopes)


def test_the_token_itself_is_not_in_the_text(token_file: Path) -> None:
    assert "the-token-of" not in hub_config(_settings(token_file, a=GradersTable(hub_groups=["g"])))


def test_without_a_hub_there_is_nothing_to_configure(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no table \[hub\]"):
        hub_config(settings_with(tmp_path, None, {"a": GradersTable(tokens_only=True)}))
