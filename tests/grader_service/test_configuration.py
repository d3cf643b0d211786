"""Every mistake in a configuration: refused, and said with its line, its key and the reason."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from grader_service.settings import ConfigurationError, load
from machines import COURSE, IMAGE_COURSE, SERVICE

REFERENCE = (Path(__file__).parents[2] / "docs" / "service-configuration.md").read_text(encoding="utf-8")


Write = Callable[..., Path]


def mistakes(path: Path) -> list[tuple[int | None, str, str]]:
    with pytest.raises(ConfigurationError) as caught:
        load(path)
    for mistake, line in zip(caught.value.mistakes, str(caught.value).splitlines(), strict=True):
        assert line == str(mistake)
        place = f"{path}:{mistake.line}" if mistake.line else str(path)
        assert line.startswith(f"{place}: ")
        assert line.endswith(f"{mistake.key}: {mistake.reason}" if mistake.key else mistake.reason)
    assert caught.value.first == caught.value.mistakes[0]
    return [(mistake.line, mistake.key, mistake.reason) for mistake in caught.value.mistakes]


WRONG = [
    # the top of the file
    'data_directory = "data"  # data_directory: absolute',
    "data_directory = 3  # data_directory: path",
    'data_directory = "HOST/missing/data"  # data_directory: HOST/missing does not exist',
    'data_directory = "HOST/coursedata"  # data_directory: may be entered by others; chmod 700',
    'data_directory = "HOST/etc/token"  # data_directory: not a directory',
    SERVICE + 'databse_url = ""  # databse_url: did you mean database_url',
    SERVICE + 'database_url = "mysql://x:hunter2@y/z"  # database_url: sqlite or postgresql',
    SERVICE + 'database_url = "hunter2"  # database_url: should be a URL',
    SERVICE + 'database_url = "sqlite:///service.db"  # database_url: outlive',
    SERVICE + 'database_url = "sqlite://"  # database_url: outlive',
    SERVICE + "cores = 0  # cores: greater than 0",
    SERVICE + "cores = inf  # cores: finite",
    SERVICE + 'cores = "2"  # cores: valid number',
    SERVICE + 'memory = "lots"  # memory: not a size',
    SERVICE + "memory = true  # memory: size",
    SERVICE + "memory = 0  # memory: greater than 0",
    SERVICE + "memory = 1.5  # memory: size",
    SERVICE + "max_attempts = 0  # max_attempts: greater",
    SERVICE + "lease_seconds = nan  # lease_seconds: ",
    SERVICE + 'max_notebook = "1G"  # max_notebook: more than max_bundle',
    SERVICE + "port = 80  # port: belongs into [listen]",
    SERVICE + "wall_seconds = 80  # wall_seconds: wall_seconds belongs into [courses.NAME.limits]",
    SERVICE + "_env_file = 'x'  # _env_file: unknown",
    SERVICE + "Memory = 1  # Memory: did you mean memory",
    SERVICE + "courses = 3  # courses: valid dictionary",
    # listen
    SERVICE + '[listen]\nhost = "0.0.0.0"  # listen.host: not loopback',
    SERVICE + '[listen]\nhost = "grader.example"  # listen.host: not loopback',
    SERVICE + '[listen]\ntls_key = "HOST/etc/key"  # listen.tls_key: together',
    SERVICE + '[listen]\ntls_certificate = "HOST/etc/certificate"  # listen.tls_certificate: together',
    SERVICE
    + '[listen]\ntls_key = "HOST/etc/key"\ntls_certificate = "HOST/x"  # listen.tls_certificate: does not exist',
    SERVICE
    + '[listen]\ntls_certificate = "HOST/etc/certificate"\ntls_key = "HOST/etc/certificate"  # listen.tls_key: chmod',
    SERVICE + '[listen]\nunix_socket = "HOST/run/socket"  # listen.unix_socket: HOST/run does not exist',
    SERVICE + f'[listen]\nunix_socket = "HOST/etc/{"x" * 108}"  # listen.unix_socket: 107 bytes',
    SERVICE + "[listen]\nport = 65536  # listen.port: less than",
    # the hub
    SERVICE + '[hub]  # hub.api_url: missing\ntoken_file = "HOST/etc/token"',
    SERVICE + '[hub]\napi_url = "hub"  # hub.api_url: URL\ntoken_file = "HOST/etc/token"',
    SERVICE + '[hub]\napi_url = "http://hub:1/"  # hub.api_url: loopback\ntoken_file = "HOST/etc/token"',
    SERVICE + '[hub]\napi_url = "https://me:word@hub/"  # hub.api_url: password\ntoken_file = "HOST/etc/token"',
    SERVICE + '[hub]\napi_url = "https://hub/"\ntoken_file = "HOST/etc/certificate"  # hub.token_file: chmod 600',
    SERVICE + '[hub]\napi_url = "https://hub/"\ntoken_file = "HOST/etc/none"  # hub.token_file: No such file',
    SERVICE + '[hub]\napi_url = "https://hub/"\ntoken_file = "HOST/etc"  # hub.token_file: regular file',
    SERVICE
    + '[hub]\napi_url = "https://hub/"\ntoken_file = "HOST/etc/token"\ncache_seconds = 61  # hub.cache_seconds: 60',
    # courses
    SERVICE + '[courses.a]  # courses.a.environment: missing\ngraders.users = ["t"]',
    SERVICE + '[courses.a]  # courses.a.graders: missing\nenvironment = "HOST/env"',
    SERVICE + COURSE + 'enviroment = "x"  # courses.a.enviroment: did you mean environment',
    SERVICE + COURSE + "processes = 3  # courses.a.processes: belongs into [courses.NAME.limits]",
    SERVICE + COURSE + 'tier = "none"  # courses.a.tier: namespaces',
    SERVICE + COURSE + 'read_only = ["HOST/coursedata", "HOST/none"]  # courses.a.read_only[1]: does not exist',
    SERVICE + COURSE + 'read_only = ["coursedata"]  # courses.a.read_only[0]: absolute',
    SERVICE + COURSE + 'read_only = ["HOST/coursedata/../data"]  # courses.a.read_only[0]: ..',
    SERVICE + COURSE + 'read_only = ["/"]  # courses.a.read_only[0]: kernel',
    SERVICE + COURSE + 'read_only = ["/proc/sys"]  # courses.a.read_only[0]: kernel',
    SERVICE + COURSE + 'read_only = ["HOST/data"]  # courses.a.read_only[0]: would show data_directory',
    SERVICE + COURSE + 'read_only = ["HOST/etc"]  # courses.a.read_only[0]: would show the configuration',
    SERVICE + COURSE + "environment_variables = { 'A=B' = '' }  # courses.a.environment_variables.\"A=B\": pattern",
    SERVICE + COURSE + "environment_variables = { A = 3 }  # courses.a.environment_variables.A: valid string",
    SERVICE + COURSE + "kernels.r = []  # courses.a.kernels.r: at least 1",
    SERVICE + COURSE + 'kernels.r = ["R", "{connection_file}"]  # courses.a.kernels.r: the program \'R\'',
    SERVICE + COURSE + 'kernels.r = ["other"]  # courses.a.kernels.r: {connection_file}',
    SERVICE + COURSE + "concurrent_jobs = -1  # courses.a.concurrent_jobs: greater",
    SERVICE + COURSE + "daily_quota = 1.5  # courses.a.daily_quota: integer",
    SERVICE + COURSE + 'retention = "soon"  # courses.a.retention: not a duration',
    SERVICE + COURSE + 'retention = "0d"  # courses.a.retention: greater than 0',
    SERVICE + COURSE + 'limits.memory_bytes = "x"  # courses.a.limits.memory_bytes: not a size',
    SERVICE + COURSE + "limits.wall_seconds = inf  # courses.a.limits.wall_seconds: finite",
    SERVICE + COURSE + "limits.memory = 1  # courses.a.limits.memory: did you mean memory_bytes",
    SERVICE + COURSE + 'maximum.memory_bytes = "1G"  # courses.a.maximum.memory_bytes: 1024 MiB, below',
    SERVICE + COURSE + "maximum.processes = 9  # courses.a.maximum.processes: below",
    SERVICE + 'memory = "1G"\n[courses.a]  # courses.a.limits.memory_bytes: could never start\n' + COURSE[12:],
    SERVICE + COURSE + 'maximum.memory_bytes = "900T"  # courses.a.maximum.memory_bytes: could never start',
    SERVICE + '[courses.a]\nenvironment = "HOST/none"  # courses.a.environment: does not exist\ngraders.users = ["t"]',
    SERVICE + '[courses.a]\nenvironment = "HOST/etc"  # courses.a.environment: no bin/python3\ngraders.users = ["t"]',
    SERVICE + '[courses.a]\nenvironment = "HOST/env"\ngraders.users = []  # courses.a.graders: name users',
    SERVICE + '[courses.a]\nenvironment = "HOST/env"\ngraders = {}  # courses.a.graders: name users',
    SERVICE + COURSE + "[courses.a.x]  # courses.a.x: unknown",
    SERVICE + '[courses."a b"]  # courses."a b": pattern\nenvironment = "HOST/env"\ngraders.users = ["t"]',
    SERVICE + '[courses."../x"]  # courses."../x": pattern\nenvironment = "HOST/env"\ngraders.users = ["t"]',
    SERVICE + '[courses.a]\nenvironment = "HOST/env"\ngraders.users = ["t,u"]  # courses.a.graders.users[0]: pattern',
    # images
    SERVICE + COURSE + 'image_root = "HOST/none"  # courses.a.image_root: cannot be opened',
    SERVICE + COURSE + 'image_root = "/"  # courses.a.image_root: the host itself',
    SERVICE
    + '[courses.a]\nimage_root = "HOST/images/v1"\nenvironment = "/opt/none"  # courses.a.environment: in HOST\n'
    'graders.users = ["t"]',
    SERVICE + IMAGE_COURSE + 'tier = "landlock"  # courses.a.tier: cannot show an image',
    SERVICE + IMAGE_COURSE + 'read_only = ["HOST/images/v1/etc"]  # courses.a.read_only[0]: not to be shown',
    SERVICE + IMAGE_COURSE + 'read_only = ["HOST/images/v1/none"]  # courses.a.read_only[0]: does not exist',
    SERVICE + IMAGE_COURSE + 'read_only = ["/usr/bin"]  # courses.a.read_only[0]: own system',
    # not TOML
    SERVICE + "a b = 1  # : not TOML",
    SERVICE + 'x = """  # : not TOML',
    SERVICE + SERVICE.strip() + "  # : not TOML: Cannot overwrite",
]


@pytest.mark.parametrize("text", WRONG)
def test_a_mistake_is_said_with_its_line(write: Write, host: Path, text: str) -> None:
    """Each text says itself where it is wrong: `# key: part of the reason`."""
    ((line, comment),) = [
        (number, line.split("  # ", 1)[1]) for number, line in enumerate(text.split("\n"), 1) if "  # " in line
    ]
    key, _, reason = comment.partition(": ") if not comment.startswith(": ") else ("", "", comment[2:])
    ((found_line, found_key, found_reason),) = mistakes(write(text))
    assert (found_line, found_key) == (line, key)
    assert reason.replace("HOST", str(host)) in found_reason
    assert "hunter2" not in found_reason


def test_what_is_missing_from_the_whole_file_has_no_line(write: Write) -> None:
    assert mistakes(write("")) == [(None, "data_directory", "is missing")]


def test_all_mistakes_are_said_in_the_order_of_the_file(write: Write) -> None:
    text = """data_directory = "HOST/coursedata"
        memory = "x"
        __init__ = 3
        [courses.a]
        environment = "HOST/none"
        read_only = [
            "HOST/none",
            "HOST/etc",
            "/proc",
        ]
        limits = { wall_seconds = -1, wal_seconds = 1 }
        retention = "never"
        [hub]
        cache_seconds = 100
        [courses.b]
        environment = "HOST/env"
        read_only = ["HOST/coursedata"]
        graders = { users = ["t"], tokens_only = true }
    """
    assert [(line, key) for line, key, _ in mistakes(write(text))] == [
        (1, "data_directory"),
        (2, "memory"),
        (3, "__init__"),
        (4, "courses.a.graders"),
        (5, "courses.a.environment"),
        (6, "courses.a.read_only[0]"),
        (6, "courses.a.read_only[2]"),
        (11, "courses.a.limits.wall_seconds"),
        (11, "courses.a.limits.wal_seconds"),
        (12, "courses.a.retention"),
        (13, "hub.api_url"),
        (13, "hub.token_file"),
        (14, "hub.cache_seconds"),
        (18, "courses.b.graders"),
    ]


def test_the_same_after_windows_edited_it(write: Write) -> None:
    path = write(SERVICE + COURSE + "concurrent_jobs = -1\n")
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert [(line, key) for line, key, _ in mistakes(path)] == [(5, "courses.a.concurrent_jobs")]


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_refused(write: Write, mode: int) -> None:
    ((line, key, reason),) = mistakes(write(SERVICE, mode))
    assert (line, key) == (None, "")
    assert "decide who may grade" in reason


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
def test_a_file_that_others_may_replace_is_refused(write: Write, host: Path, mode: int) -> None:
    path = write(SERVICE)
    (host / "etc").chmod(mode)
    assert "could be replaced" in mistakes(path)[0][2]
    (host / "etc").chmod(mode | 0o1000)
    load(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to somebody else")
def test_a_file_of_somebody_else_is_refused(write: Write) -> None:
    path = write(SERVICE)
    os.chown(path, 65_534, 65_534)
    assert "another user" in mistakes(path)[0][2]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to somebody else")
def test_an_image_of_somebody_else_is_refused(write: Write, host: Path) -> None:
    path = write(SERVICE + IMAGE_COURSE)
    load(path)
    os.chown(host / "images/v1", 65_534, 65_534)
    assert [(line, key) for line, key, _ in mistakes(path)] == [(5, "courses.a.image_root")]


def test_an_image_that_others_may_change_is_refused(write: Write, host: Path) -> None:
    path = write(SERVICE + IMAGE_COURSE)
    (host / "images/v1").chmod(0o775)
    assert [(line, key) for line, key, _ in mistakes(path)] == [(5, "courses.a.image_root")]


def test_what_cannot_be_read_as_a_file(host: Path, write: Write) -> None:
    assert "cannot be opened" in mistakes(host / "none.toml")[0][2]
    assert "not a regular file" in mistakes(host / "env")[0][2]
    os.mkfifo(host / "etc/fifo", 0o600)  # to which nobody writes
    assert "not a regular file" in mistakes(host / "etc/fifo")[0][2]
    path = write("# " + "x" * (1 << 20))
    assert "larger than 1 MiB" in mistakes(path)[0][2]
    path.write_bytes(b"a = 1\nb = '\xff'\n")
    assert mistakes(path)[0][:2] == (2, "")


def test_a_password_in_a_file_that_everybody_reads_is_refused(write: Write) -> None:
    text = SERVICE + 'database_url = "postgresql+psycopg://grader:hunter2@db/grader"\n'
    assert load(write(text, 0o640)).database_url.endswith("hunter2@db/grader")
    ((line, key, reason),) = mistakes(write(text, 0o644))
    assert (line, key) == (2, "database_url")
    assert "chmod o-r" in reason
    assert load(write(text.replace(":hunter2", ""), 0o644)).database_url == "postgresql+psycopg://grader@db/grader"


@pytest.mark.parametrize("secret", ["etc/token", "etc/key", "data", "own/service.db"])
@pytest.mark.parametrize("way", ["read_only", "by a link", "environment", "image"])
def test_no_course_can_show_what_is_the_services_own(write: Write, host: Path, secret: str, way: str) -> None:
    place = {"environment": "env/share", "image": "images/v1/opt/course/share"}.get(way, "coursedata")
    if way in {"environment", "image"}:
        (host / place).mkdir()
        (host / place).chmod(0o755)
    for name in ("etc", "data"):
        (host / name).rename(host / place / name)
    (host / place / "own").mkdir()
    (host / "etc").mkdir(mode=0o755)  # the configuration stays
    (host / "elsewhere").symlink_to(host / "coursedata")
    text = f"""data_directory = "HOST/{place}/data"
        database_url = "sqlite:///HOST/{place}/own/service.db"
        [listen]
        tls_certificate = "HOST/{place}/etc/certificate"
        tls_key = "HOST/{place}/etc/key"
        [hub]
        api_url = "https://hub/"
        token_file = "HOST/{place}/etc/token"
        [courses.a]
        graders.users = ["t"]
    """
    text += {
        "read_only": 'environment = "HOST/env"\nread_only = ["HOST/coursedata"]',
        "by a link": 'environment = "HOST/env"\nread_only = ["HOST/elsewhere"]',
        "environment": 'environment = "HOST/env"',
        "image": 'image_root = "HOST/images/v1"\nenvironment = "/opt/course"',
    }[way]
    found = mistakes(write(text))
    assert {key for _, key, _ in found} == {
        "courses.a.environment" if place != "coursedata" else "courses.a.read_only[0]"
    }
    assert any(f"({host}/{place}/{secret})" in reason for _, _, reason in found)


def test_a_course_cannot_show_a_part_of_the_data(write: Write, host: Path) -> None:
    (host / "data/jobs").mkdir()
    ((line, key, reason),) = mistakes(write(SERVICE + COURSE + 'read_only = ["HOST/data/jobs"]'))
    assert (line, key) == (5, "courses.a.read_only[0]")
    assert "data_directory" in reason


def test_the_mistakes_of_the_reference_are_said_like_that(write: Write, host: Path) -> None:
    lines = [line.strip() for line in REFERENCE.splitlines() if line.startswith("    /etc/grader-service.toml:")]
    text = SERVICE + '[courses.statistics]\nenvironment = "HOST/env"\ngraders.users = ["t"]\n\n\nenviroment = 3\n\n\n\n'
    text += "[courses.statistics.maximum]\nmemory_bytes = '1G'\n"
    path = write(text)
    assert [f"/etc/grader-service.toml:{line}: {key}: {reason}" for line, key, reason in mistakes(path)] == lines
