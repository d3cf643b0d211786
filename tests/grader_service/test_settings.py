"""The administrator's file: what it means, and a reference that is true."""

import pickle
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from grader_service import machine
from grader_service.settings import (
    CourseSettings,
    GradersTable,
    HubSettings,
    LimitsTable,
    ListenSettings,
    Settings,
    load,
)
from isolate.policy import GIB, MIB, Limits
from machines import COURSE, SERVICE

REFERENCE = (Path(__file__).parents[2] / "docs" / "service-configuration.md").read_text(encoding="utf-8")


Write = Callable[..., Path]


def test_a_short_file_is_enough(write: Write, host: Path) -> None:
    settings = load(write(SERVICE + COURSE))
    assert settings.database_url == f"sqlite:///{host}/data/service.db"
    assert (settings.listen.host, settings.listen.port, settings.hub) == ("127.0.0.1", 8970, None)
    assert settings.cores == machine.processors()
    assert settings.slots == machine.processors()
    assert settings.memory_bytes == machine.memory_bytes() * 8 // 10
    course = settings.courses["a"]
    assert course.default_limits == course.maximum_limits == Limits()
    assert course.retention == 7 * 86_400
    assert pickle.loads(pickle.dumps(settings)) == settings


def test_every_key_can_be_set(write: Write, host: Path) -> None:
    text = """
        data_directory = "HOST/data"
        database_url = "postgresql+psycopg://grader:word@/grader"
        cores = 2.5
        memory = "6G"
        max_attempts = 5
        lease_seconds = 10.5
        ageing_seconds = 0
        max_bundle = "1G"
        max_notebook = 1_000_000
        [listen]
        host = "0.0.0.0"
        port = 443
        unix_socket = "HOST/etc/socket"
        tls_certificate = "HOST/etc/certificate"
        tls_key = "HOST/etc/key"
        plain_http_beyond_loopback = true
        [hub]
        api_url = "http://hub:8081/hub/api/"
        token_file = "HOST/etc/token"
        cache_seconds = 0
        [courses.a]
        image_root = "HOST/images/v1"
        environment = "/opt/course"
        kernels.other = ["other", "{connection_file}"]
        read_only = ["HOST/coursedata", "HOST/images/v1/srv/data"]
        environment_variables = { CONDA_DIR = "/opt/conda" }
        tier = "namespaces"
        limits = { memory_bytes = "1.5G", wall_seconds = 60 }
        maximum = { memory_bytes = "4GiB", processes = 200 }
        concurrent_jobs = 3
        daily_quota = 1000
        retention = "12h"
        [courses.a.graders]
        users = ["aino", "eino@campus"]
        hub_groups = ["teachers"]
        unix_groups = ["jupyter-a"]
        [courses.b]
        environment = "HOST/env"
        tier = "landlock"
        graders.tokens_only = true
    """
    settings = load(write(text))
    given = tomllib.loads(text)
    assert set(given) == set(Settings.model_fields)
    assert set(given["listen"]) == set(ListenSettings.model_fields)
    assert set(given["hub"]) == set(HubSettings.model_fields)
    assert set(given["courses"]["a"]) == set(CourseSettings.model_fields)
    graders = {**given["courses"]["a"]["graders"], **given["courses"]["b"]["graders"]}
    assert set(graders) == set(GradersTable.model_fields)
    course = settings.courses["a"]
    assert settings.database_url == "postgresql+psycopg://grader:word@/grader"
    assert (settings.slots, settings.memory_bytes, settings.max_notebook) == (2, 6 * GIB, 1_000_000)
    assert settings.hub is not None
    assert settings.hub.api_url == "http://hub:8081/hub/api"
    assert course.default_limits == Limits(memory_bytes=1536 * MIB, wall_seconds=60)
    assert course.maximum_limits == Limits(memory_bytes=4 * GIB, wall_seconds=60, processes=200)
    assert course.retention == 12 * 3600
    assert settings.courses["b"].tier == "landlock"


def test_the_environment_sets_nothing(write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("MAX_ATTEMPTS=9\nmax_attempts=9\n")
    for name in ("max_attempts", "MAX_ATTEMPTS", "HUB", "hub"):
        monkeypatch.setenv(name, "9")
    settings = load(write(SERVICE))
    assert (settings.max_attempts, settings.hub) == (3, None)


def test_values_of_a_program_are_not_looked_for_on_the_disk() -> None:
    course = CourseSettings(environment=Path("/no/such"), graders=GradersTable(users=["t"]))
    settings = Settings(data_directory=Path("/no/such/data"), memory=GIB, courses={"a": course})
    assert settings.courses["a"] == course
    with pytest.raises(ValidationError):
        CourseSettings(environment=Path("relative"), graders=GradersTable(users=["t"]))


def test_settings_cannot_be_changed_afterwards() -> None:
    settings = Settings(data_directory=Path("/data"))
    with pytest.raises(ValidationError, match="frozen"):
        settings.max_attempts = 9
    with pytest.raises(ValidationError, match="frozen"):
        settings.listen.port = 9


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"])
def test_loopback_needs_no_tls(host: str) -> None:
    assert ListenSettings(host=host).host == host


# The reference


def rows(title: str) -> dict[str, str]:
    """Keys in the table below a heading, with what stands in the column `default`."""
    assert f"# {title}\n" in REFERENCE, title
    text = re.split(r"\n#+ ", REFERENCE.split(f"# {title}\n", 1)[1])[0]
    cells = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    return {re.findall(r"`(\w+)`", row[1])[0]: row[2].strip() for row in cells}


TABLES: list[tuple[str, type[BaseModel], dict[str, Any]]] = [
    ("The top of the file", Settings, {"data_directory": "/data"}),
    ("Where it answers: `[listen]`", ListenSettings, {}),
    ("The hub: `[hub]`", HubSettings, {"api_url": "https://hub/api", "token_file": "/x"}),
    ("A course: `[courses.NAME]`", CourseSettings, {"environment": "/x", "graders": {"users": ["t"]}}),
    ("Limits: `[courses.NAME.limits]` and `[courses.NAME.maximum]`", LimitsTable, {}),
    ("Who may grade: `[courses.NAME.graders]`", GradersTable, {"tokens_only": True}),
]


@pytest.mark.parametrize(("title", "model", "required"), TABLES)
def test_every_setting_is_in_the_reference_with_its_default(
    title: str, model: type[BaseModel], required: dict[str, Any]
) -> None:
    documented = rows(title)
    tables = {"listen", "hub", "courses"} if model is Settings else set()
    assert set(documented) == set(model.model_fields) - tables
    written = {
        name: tomllib.loads(f"value = {text.strip('`')}")["value"]
        for name, text in documented.items()
        if text.startswith("`") and name not in required
    }
    plain, spelled = model(**required), model(**required, **written)
    if model is LimitsTable:
        assert isinstance(spelled, LimitsTable)
        assert spelled.over(Limits(**dict.fromkeys(written, 1))) == Limits()
    else:
        assert spelled == plain
    for name, field in model.model_fields.items():
        if name not in tables:
            assert field.is_required() == (documented[name] == "required"), name
            assert (field.default is None and model is not LimitsTable) == (documented[name] == "none"), name


def test_limits_are_those_of_the_sandbox() -> None:
    assert set(LimitsTable.model_fields) == set(Limits.__dataclass_fields__)


def test_the_example_of_the_reference_is_valid() -> None:
    text = REFERENCE.split("```toml\n", 1)[1].split("```", 1)[0]
    settings = Settings(**tomllib.loads(text))
    assert settings.courses["statistics"].maximum_limits.memory_bytes == 4 * GIB
    assert settings.courses["signals"].retention == 30 * 86_400
