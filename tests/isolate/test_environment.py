"""Which directories an interpreter needs, which of them may not be shown, and what in them is masked."""

import json
import os
import pwd
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isolate import environment
from isolate.environment import (
    environment_policy,
    find_executable,
    grader_paths,
    grader_policy,
    home_files,
    prefixes_of,
    secrets_below,
    without_working_directory,
)
from isolate.policy import HOME, Limits, SandboxError
from isolate.sandbox import Command, Sandbox

ODD_NAMES = ["env", "my course env", "ympäristö-環境", "a=b", "colon:in", "new\nline"]


def make_prefix(directory: Path) -> Path:
    """A prefix with an interpreter that is only a name; its `bin/python`."""
    (directory / "bin").mkdir(parents=True)
    (directory / "lib" / "python3.11" / "site-packages").mkdir(parents=True)
    (directory / "bin" / "python").write_text("#!/bin/sh\n")
    (directory / "bin" / "python").chmod(0o755)
    return directory / "bin" / "python"


def make_venv(directory: Path, base: Path, *, by_link: bool = True) -> Path:
    """What `python -m venv` leaves: pyvenv.cfg with `home`, and a link to the base's interpreter."""
    (directory / "bin").mkdir(parents=True)
    (directory / "lib" / "python3.11" / "site-packages").mkdir(parents=True)
    (directory / "pyvenv.cfg").write_text(f"home = {base.parent}\ninclude-system-site-packages = false\n")
    if by_link:
        (directory / "bin" / "python").symlink_to(base)
    else:
        (directory / "bin" / "python").write_text("a copy")
    return directory / "bin" / "python"


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_prefix_of_its_own(tmp_path: Path, name: str) -> None:
    assert prefixes_of(make_prefix(tmp_path / name)) == (tmp_path / name,)


@pytest.mark.parametrize("name", [name for name in ODD_NAMES if "\n" not in name])
@pytest.mark.parametrize("by_link", [True, False])
def test_a_venv_brings_its_base(tmp_path: Path, name: str, by_link: bool) -> None:
    base = make_prefix(tmp_path / f"base {name}")
    python = make_venv(tmp_path / name, base, by_link=by_link)
    assert prefixes_of(python) == (tmp_path / name, tmp_path / f"base {name}")


def test_a_venv_of_a_venv(tmp_path: Path) -> None:
    base = make_prefix(tmp_path / "base")
    first = make_venv(tmp_path / "first", base)
    second = make_venv(tmp_path / "second", first)
    assert prefixes_of(second) == (tmp_path / "second", tmp_path / "first", tmp_path / "base")


def test_a_venv_inside_its_base_is_shown_with_it(tmp_path: Path) -> None:
    base = make_prefix(tmp_path / "base")
    python = make_venv(tmp_path / "base" / "envs" / "course", base)
    assert prefixes_of(python) == (tmp_path / "base",)


def test_an_interpreter_behind_links(tmp_path: Path) -> None:
    real = make_prefix(tmp_path / "versions" / "3.11.7")
    (tmp_path / "versions" / "current").symlink_to("3.11.7")
    (tmp_path / "shims").mkdir()
    shim = tmp_path / "shims" / "python"
    shim.symlink_to("../versions/current/bin/python")
    assert real.exists()
    found = prefixes_of(shim)
    assert found[0] == shim
    assert tmp_path / "versions" / "3.11.7" in found
    assert all(path == shim or path.is_relative_to(tmp_path / "versions") for path in found)


def test_a_conda_environment(tmp_path: Path) -> None:
    python = make_prefix(tmp_path / "envs" / "course")
    (tmp_path / "envs" / "course" / "conda-meta").mkdir()
    assert prefixes_of(python) == (tmp_path / "envs" / "course",)
    policy = environment_policy([python])
    assert policy.environment["CONDA_PREFIX"] == str(tmp_path / "envs" / "course")
    assert policy.environment["PATH"].split(":")[0] == str(python.parent)


def test_a_script_without_a_prefix_stands_alone(tmp_path: Path) -> None:
    script = tmp_path / "check.py"
    script.write_text("")
    assert prefixes_of(script) == (script,)


@pytest.mark.parametrize("levels", [".", "..", "../.."])
def test_a_home_directory_is_refused_as_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, levels: str) -> None:
    prefix = tmp_path / "prefix"
    home = Path(os.path.normpath(prefix / "home" / "somebody" / levels))
    python = make_prefix(prefix)
    home.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("HOME", str(home))
    with pytest.raises(SandboxError, match="home directory") as caught:
        prefixes_of(python)
    assert caught.value.layer == "environment"
    assert str(prefix) in caught.value.cause


def test_another_users_home_is_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = make_prefix(tmp_path / "somebody" / ".local")
    with monkeypatch.context() as patch:
        entry = pwd.struct_passwd(("x", "x", 4321, 4321, "", str(tmp_path / "somebody" / ".local"), "/bin/sh"))
        patch.setattr(pwd, "getpwall", lambda: [entry])
        with pytest.raises(SandboxError, match="home directory"):
            prefixes_of(python)


def test_a_venv_below_a_home_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert prefixes_of(make_prefix(tmp_path / "venv")) == (tmp_path / "venv",)


def test_looping_links_end(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises((SandboxError, OSError)):
        environment_policy([find_executable(str(tmp_path / "a"))])


def test_secrets_in_a_prefix_are_masked(tmp_path: Path) -> None:
    python = make_prefix(tmp_path / "env")
    names = ["etc/jupyter/nbgrader_config.py", "etc/ipython/x", ".condarc", "pip.conf", "share/jupyter/runtime/k.json"]
    for name in names:
        (tmp_path / "env" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "env" / name).write_text("token = 'canary-51'")
    (tmp_path / "env" / "share" / "data.txt").write_text("harmless")
    policy = environment_policy([python], limits=Limits(wall_seconds=60))
    assert tmp_path / "env" / "etc" / "jupyter" in policy.hidden
    with Sandbox(policy, Command(["grep", "-r", "canary", str(tmp_path / "env")])) as sandbox:
        assert sandbox.wait().exit_code == 1
    with Sandbox(policy, Command(["grep", "-rq", "harmless", str(tmp_path / "env")])) as sandbox:
        assert sandbox.wait().exit_code == 0


def test_only_what_exists_is_masked(tmp_path: Path) -> None:
    assert secrets_below([tmp_path]) == ()
    (tmp_path / ".netrc").symlink_to("/no/such/place")
    assert secrets_below([tmp_path]) == (tmp_path / ".netrc",)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_prefix_of_any_name_can_be_shown_and_run(tmp_path: Path, name: str) -> None:
    python = make_prefix(tmp_path / name)
    python.write_text("#!/bin/sh\nexit 7\n")
    with Sandbox(environment_policy([python], limits=Limits(wall_seconds=60)), Command([str(python)])) as sandbox:
        assert sandbox.wait().exit_code == 7


def test_the_policy_of_this_interpreter_runs_it() -> None:
    policy = environment_policy([Path(sys.executable)], environment={"MINE": "x"}, limits=Limits(wall_seconds=60))
    code = "import sys, os, nbformat; sys.exit(0 if os.environ['MINE'] == 'x' else 1)"
    with Sandbox(policy, Command([sys.executable, "-c", code])) as sandbox:
        assert sandbox.wait().exit_code == 0
    assert policy.environment["PATH"].split(":")[0] == os.path.dirname(sys.executable)


def test_the_graders_policy_runs_the_driver() -> None:
    code = f"import sys; sys.path[:0] = {grader_paths()!r}; import isolate.driver, zmq, nbclient"
    with Sandbox(grader_policy(Limits(wall_seconds=60)), Command([sys.executable, "-I", "-c", code])) as sandbox:
        assert sandbox.wait().exit_code == 0


def test_the_graders_policy_shows_no_more_than_the_package() -> None:
    repository = Path(environment.__file__).parents[1]
    shown = [bind.source for bind in grader_policy(Limits()).read_only]
    assert not any(repository.is_relative_to(path) for path in shown if "site-packages" not in repository.parts)


@pytest.mark.parametrize(
    ("name", "expected"), [("python3", sys.executable), ("python", sys.executable), (sys.executable, sys.executable)]
)
def test_finding_the_interpreter_as_jupyter_client_does(name: str, expected: str) -> None:
    assert find_executable(name) == Path(expected)


def test_finding_in_a_prefix_first(tmp_path: Path) -> None:
    python = make_prefix(tmp_path / "env")
    assert find_executable("python", tmp_path / "env") == python


@pytest.mark.parametrize("name", ["no-such-kernel", "/no/such/python"])
def test_a_missing_program_is_an_error_that_names_it(name: str) -> None:
    with pytest.raises(SandboxError, match=name) as caught:
        find_executable(name)
    assert caught.value.layer == "environment"


@pytest.fixture
def fonts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """An environment with a matplotlib in name; the sandbox that would list its fonts counts its calls."""
    python = make_prefix(tmp_path / "env")
    (tmp_path / "env" / "lib" / "python3.11" / "site-packages" / "matplotlib").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    built = []

    def build(_: Path, tier: str) -> str:
        built.append(1)
        return 'fontlist-v1.json\n{"fonts": []}'

    monkeypatch.setattr(environment, "_build_font_list", build)

    def ask() -> int:
        """Ask as a new process would; how often the list has been built so far."""
        home_files.cache_clear()
        assert home_files(python) == {f"{HOME}/.cache/matplotlib/fontlist-v1.json": '{"fonts": []}'}
        return len(built)

    yield ask
    home_files.cache_clear()


def cached(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "isolate").iterdir())


def test_the_font_list_is_built_once(fonts: Callable[[], int], tmp_path: Path) -> None:
    assert fonts() == 1
    assert fonts() == 1
    assert len(cached(tmp_path)) == 1
    assert (tmp_path / "cache" / "isolate").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"fontlist-v1.json",
        b"fontlist-v1.json\n{",
        b"\xff\xfe",
        b"../../.profile\n{}",
        b"fontlist-v1.json\n" + b"[" * 100_000,
    ],
)
def test_a_damaged_cache_is_built_again(fonts: Callable[[], int], tmp_path: Path, damage: bytes) -> None:
    fonts()
    cached(tmp_path)[0].write_bytes(damage)
    assert fonts() == 2
    assert fonts() == 2


def test_a_directory_in_the_place_of_the_cache(fonts: Callable[[], int], tmp_path: Path) -> None:
    fonts()
    file = cached(tmp_path)[0]
    file.unlink()
    file.mkdir()
    assert fonts() == 2
    assert cached(tmp_path) == [file]  # nothing half-written is left beside it


def test_a_cache_that_cannot_be_written(fonts: Callable[[], int], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the directory should be: as good as read-only, for root too")
    assert fonts() == 1
    assert fonts() == 2


def test_a_new_matplotlib_has_a_new_list(fonts: Callable[[], int], tmp_path: Path) -> None:
    fonts()
    os.utime(tmp_path / "env" / "lib" / "python3.11" / "site-packages" / "matplotlib", (1, 1))
    assert fonts() == 2


def test_no_matplotlib_no_files(tmp_path: Path) -> None:
    assert home_files(make_prefix(tmp_path / "env")) == {}


@pytest.mark.slow
def test_the_real_list_makes_a_silent_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    home_files.cache_clear()
    try:
        files = home_files(Path(sys.executable))
    finally:
        home_files.cache_clear()
    assert [path.startswith(f"{HOME}/.cache/matplotlib/fontlist-") for path in files] == [True]
    fonts = json.loads(next(iter(files.values())))
    assert fonts["ttflist"]
    code = (
        "import matplotlib; matplotlib.use('agg'); import matplotlib.pyplot as p; p.plot([1]); p.savefig('/tmp/x.png')"
    )
    policy = environment_policy([Path(sys.executable)], limits=Limits(wall_seconds=60))
    with open(tmp_path / "stderr", "w+b") as errors:
        command = Command([sys.executable, "-c", code], room_files=files, stderr=errors)
        with Sandbox(policy, command) as sandbox:
            assert sandbox.wait().exit_code == 0
        errors.seek(0)
        assert errors.read() == b""


@pytest.mark.parametrize(
    ("argv", "changed"),
    [
        ("python -m k -f x", "python -c START -f x"),
        ("/e/bin/python3.12 -mk -f x", "/e/bin/python3.12 -c START -f x"),
        ("python3 -Xfrozen_modules=off -m k", "python3 -Xfrozen_modules=off -c START"),
        ("python3 -X frozen_modules=off -W ignore -u -m k a", "python3 -X frozen_modules=off -W ignore -u -c START a"),
        ("python -Bum k", "python -Bu -c START"),
        ("python -Wignore -bb -OO -m k", "python -Wignore -bb -OO -c START"),
        ("python --check-hash-based-pycs always -m k", "python --check-hash-based-pycs always -c START"),
        ("python -c pass -m k", "python -c pass -m k"),
        ("python script.py -m k", "python script.py -m k"),
        ("python - -m k", "python - -m k"),
        ("python -m", "python -m"),
        ("python", "python"),
        ("bash -m k", "bash -m k"),
        ("", ""),
    ],
)
def test_a_kernel_is_never_imported_from_the_work_directory(argv: str, changed: str) -> None:
    got = without_working_directory(argv.split())
    start = [word for word in got if word.startswith("import sys; sys.path")]
    assert [("START" if word in start else word) for word in got] == changed.split()
    assert all("run_module('k'" in word for word in start)
