"""Policies, limits and reports are values: frozen, checked when made, plain when written out."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolate.policy import BASE_ENVIRONMENT, HOME, WORK, Bind, Limits, Policy, Report, SandboxError, system_policy

LIMITS = [field.name for field in dataclasses.fields(Limits)]


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("value", [0, -1])
def test_limits_are_positive(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=name):
        Limits(**{name: value})


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_that_is_no_number_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Limits(**{name: float("nan")})


def test_values_are_frozen() -> None:
    for value, name in (
        (Limits(), "processes"),
        (Bind(Path("/a")), "at"),
        (Policy(), "hidden"),
        (Report("exited"), "ended"),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, 1)


@pytest.mark.parametrize("path", ["relative", "../up", "/a/../b", ".", "", "/a/.."])
def test_a_visible_path_is_absolute_and_without_dots(path: str) -> None:
    with pytest.raises(ValueError, match="absolute"):
        Bind(Path(path))
    with pytest.raises(ValueError, match="absolute"):
        Bind(Path("/a"), Path(path))


@given(st.text(st.characters(exclude_characters="/\0"), min_size=1).filter(lambda name: name not in {".", ".."}))
def test_a_visible_path_may_have_any_name(name: str) -> None:
    bind = Bind(Path("/") / name)
    assert bind.target == bind.source
    assert Bind(Path("/a"), Path("/") / name).target.name == name


def test_with_visible_leaves_the_original_alone() -> None:
    policy = Policy(read_only=(Bind(Path("/a")),))
    more = policy.with_visible([Path("/b")])
    assert [str(bind.source) for bind in more.read_only] == ["/a", "/b"]
    assert len(policy.read_only) == 1


def test_an_error_names_layer_cause_and_remedy() -> None:
    error = SandboxError("seccomp", "cannot be loaded", "install it")
    assert (error.layer, error.cause, error.remedy) == ("seccomp", "cannot be loaded", "install it")
    assert str(error) == "seccomp: cannot be loaded (install it)"
    assert str(SandboxError("seccomp", "cannot be loaded")) == "seccomp: cannot be loaded"


def test_a_report_is_json() -> None:
    report = Report("limit", limit="wall", message="the wall limit", layers=("one", "two"))
    assert json.loads(report.to_json()) == report.as_dict()
    assert report.as_dict()["layers"] == ["one", "two"]


def test_the_system_policy_shows_programs_and_nothing_of_the_state() -> None:
    shown = {str(bind.source) for bind in system_policy().read_only}
    assert "/usr" in shown
    for path in (
        "/",
        "/home",
        "/root",
        "/etc",
        "/var",
        "/tmp",
        "/proc",
        "/sys",
        "/dev",
        "/run",
        "/opt",
        "/srv",
        "/mnt",
    ):
        assert path not in shown
    assert all(os.path.lexists(path) for path in shown)
    assert not system_policy().writable


def test_the_environment_inherits_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", "secret")
    assert system_policy().environment == BASE_ENVIRONMENT
    assert system_policy({"A": "b"}).environment == {**BASE_ENVIRONMENT, "A": "b"}
    assert BASE_ENVIRONMENT["HOME"] == HOME
    assert Path(WORK).is_relative_to(HOME)
