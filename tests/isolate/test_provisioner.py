"""Kernels of ordinary Jupyter clients in a sandbox: what they see, how they start, restart, and end."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import papermill
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jupyter_client.manager import KernelManager

from attacks.harness import LONG as PATIENCE
from attacks.harness import Person, Stage
from e2e.clients import BASH, LONG, PYTHON, Specs, own_descriptors, started
from e2e.host import descendants, eventually, marked
from isolate import provisioner
from isolate.kernels import Door
from isolate.policy import MIB, TIERS, Limits, SandboxError
from isolate.provisioner import KEYS, KernelPolicy, parse_policy

REPOSITORY = Path(__file__).parents[2]


def refusal(raw: Any) -> SandboxError:
    with pytest.raises(SandboxError) as caught:
        parse_policy(raw, "kernelspec 'x' (/kernels/x/kernel.json)")
    return caught.value


# The policy of a kernelspec


def test_an_empty_policy_shows_nothing_and_bounds_a_week() -> None:
    policy = parse_policy({}, "x")
    assert policy == KernelPolicy()
    assert (policy.work, policy.read_only, policy.writable, policy.pass_environment) == (None, (), (), ())
    assert policy.limits == Limits(wall_seconds=7 * 86_400, cpu_seconds=7 * 86_400)


def test_every_key_is_read(tmp_path: Path) -> None:
    raw = {
        "read_only": ["/srv/data", "~/shared"],
        "writable": ["/srv/out", {"path": "/srv/cache", "at": "/cache"}],
        "hidden": ["/srv/data/solutions"],
        "environment": {"COURSE": "c1"},
        "pass_environment": ["LANG"],
        "memory": "1.5G",
        "files": 1048576,
        "processes": 64,
        "wall_seconds": 60,
        "cpu_seconds": 0.5,
        "work": str(tmp_path),
        "tier": "namespaces",
    }
    assert set(raw) == set(KEYS)
    policy = parse_policy(raw, "x")
    assert [str(bind.source) for bind in policy.read_only] == ["/srv/data", str(Path.home() / "shared")]
    assert [str(bind.target) for bind in policy.writable] == ["/srv/out", "/cache"]
    assert policy.limits == Limits(
        memory_bytes=1536 * MIB, files_bytes=MIB, processes=64, wall_seconds=60, cpu_seconds=0.5
    )
    assert (policy.work, policy.environment) == (tmp_path, {"COURSE": "c1"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("read-only", ["/srv"]),
        ("readonly", []),
        ("network", True),
        ("", 1),
        ("read_only", "/srv"),
        ("read_only", ["srv"]),
        ("read_only", [""]),
        ("read_only", ["/srv/../etc"]),
        ("read_only", ["~other/x"]),
        ("read_only", [{"path": "/srv"}]),
        ("read_only", ["/srv\0/x"]),
        ("read_only", None),
        ("writable", [{"at": "/x"}]),
        ("writable", [{"path": "/srv", "to": "/x"}]),
        ("writable", [{"path": "/srv", "at": "x"}]),
        ("writable", [5]),
        ("writable", ["/"]),
        ("writable", ["~/"]),
        ("writable", [{"path": "~/.", "at": "/home/x"}]),
        ("hidden", "/srv"),
        ("environment", ["A=1"]),
        ("environment", {"A": 1}),
        ("environment", {"A=B": "1"}),
        ("environment", {"": "1"}),
        ("environment", {"A": "x\0y"}),
        ("pass_environment", "HOME"),
        ("pass_environment", ["A=B"]),
        ("memory", "lots"),
        ("memory", 0),
        ("memory", -1),
        ("memory", True),
        ("memory", 1.5),
        ("files", "0"),
        ("processes", "64"),
        ("processes", 0),
        ("processes", True),
        ("wall_seconds", "60"),
        ("wall_seconds", 0),
        ("wall_seconds", float("nan")),
        ("wall_seconds", float("inf")),
        ("cpu_seconds", True),
        ("work", "notebooks"),
        ("work", "/no/such/directory"),
        ("work", "~/"),
        ("work", None),
        ("tier", "none"),
        ("tier", ["landlock"]),
    ],
)
def test_what_is_not_understood_is_refused_by_name(key: str, value: Any) -> None:
    error = refusal({"memory": "1G", key: value})
    assert error.layer == "policy"
    assert error.cause.startswith(f"kernelspec 'x' (/kernels/x/kernel.json): {key}: ")
    assert error.remedy


@pytest.mark.parametrize("raw", [None, [], "private", 1])
def test_a_policy_is_a_table(raw: Any) -> None:
    assert "policy" in refusal(raw).cause


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), json_values, max_size=4))
def test_any_json_is_understood_or_refused(raw: dict[str, Any]) -> None:
    with contextlib.suppress(SandboxError):
        assert isinstance(parse_policy(raw, "x"), KernelPolicy)


def test_every_key_has_a_row_in_the_documentation() -> None:
    text = (REPOSITORY / "docs/kernels.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1] for line in text.splitlines() if line.startswith("| `")}
    assert rows == set(KEYS)


def test_jupyter_finds_the_provisioner() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jupyter_client.kernelspecapp", "provisioners"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "isolate.provisioner:SandboxProvisioner" in done.stdout


# What the person who wanted a kernel is told


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"policy": {"memroy": "2G"}}, ["Test bad", "kernels/bad/kernel.json", "memroy", "no such key", "memory"]),
        ({"polcy": {}}, ["Test bad", "polcy", "the only key is policy"]),
        ({"policy": {}, "tier": "x"}, ["Test bad", "config: tier"]),
        ({"policy": {"read_only": ["/no/such/path"]}}, ["/no/such/path", "No such file"]),
    ],
)
def test_no_kernel_starts_without_the_sandbox_that_was_asked_for(
    specs: Specs, config: dict[str, Any], words: list[str]
) -> None:
    specs.add_sandboxed("bad", config=config)
    descriptors = []
    for _ in range(3):  # the first makes an event loop for jupyter_client
        manager = KernelManager(kernel_name="bad")
        with pytest.raises(SandboxError) as caught:
            manager.start_kernel()
        assert all(word in str(caught.value) for word in words)
        assert not manager.has_kernel
        descriptors.append(len(own_descriptors()))
    assert descriptors[1] == descriptors[2]


def test_a_program_that_does_not_exist_is_named(specs: Specs) -> None:
    specs.add_sandboxed("bad", ["/no/such/python", "{connection_file}"])
    with pytest.raises(SandboxError, match=r"/no/such/python.*check the kernelspec's argv"):
        KernelManager(kernel_name="bad").start_kernel()


def test_the_layer_that_is_missing_is_named(specs: Specs, monkeypatch: pytest.MonkeyPatch) -> None:
    specs.add_sandboxed("py")
    monkeypatch.setattr("isolate.seccomp.compiled_filters", _no_filters)
    with pytest.raises(SandboxError, match=r"seccomp: libseccomp cannot be loaded.*apt-get"):
        KernelManager(kernel_name="py").start_kernel()


def _no_filters() -> None:
    raise SandboxError("seccomp", "libseccomp cannot be loaded: no", "apt-get install libseccomp2")


def test_required_encryption_is_not_silently_left_out(specs: Specs) -> None:
    metadata = {"kernel_provisioner": {"provisioner_name": "isolate"}, "supported_encryption": "curve"}
    specs.add("py", metadata=metadata)
    manager = KernelManager(kernel_name="py", transport_encryption="required")
    with pytest.raises(SandboxError, match="transport encryption is required"):
        manager.start_kernel()


# What a kernel sees

LOOK = """
import json, os, socket
said = {"uid": os.getuid(), "cwd": os.getcwd(), "files": os.listdir(), "environ": dict(os.environ), "pids": []}
for pid in os.listdir("/proc"):
    if pid.isdecimal():
        said["pids"].append(open(f"/proc/{pid}/cmdline").read())
for path in ["/etc/shadow", "/root", HOME, DATA]:
    said[path] = os.path.exists(path) and os.path.isfile(path) and open(path).read(9)
try:
    socket.create_connection(("127.0.0.1", PORT), 2).close()
    said["connected"] = True
except OSError:
    said["connected"] = False
print(json.dumps(said))
"""


@pytest.fixture
def listener() -> Iterator[int]:
    """A port of the host that answers."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock.getsockname()[1]


def look(specs: Specs, port: int) -> str:
    secret = specs.data / "secret"
    secret.write_text("my secret")
    return LOOK.replace("HOME", repr(str(Path.home()))).replace("DATA", repr(str(secret))).replace("PORT", str(port))


def test_ipython_without_a_sandbox_sees_the_host(specs: Specs, listener: int) -> None:
    """The control: the same code finds what there is to find."""
    specs.add("plain")
    with started("plain") as session:
        said = json.loads(session.run(look(specs, listener)))
    assert said["connected"] is True
    assert said["environ"]["JUPYTERHUB_API_TOKEN"] == "the-hubs-token"
    assert said[str(specs.data / "secret")] == "my secret"


def test_ipython_in_a_sandbox(specs: Specs, listener: int, tmp_path: Path) -> None:
    specs.add_sandboxed("py")
    with started("py", cwd=str(tmp_path)) as session:
        assert session.run("1 + 1") == "2"
        said = json.loads(session.run(look(specs, listener)))
        assert "FileNotFoundError" in session.run("open('/etc/shadow')")
        assert session.run("!echo from the shell").strip() == "from the shell"
        assert session.run("%%bash\necho from bash; pwd") == "from bash\n/home/student/work\n"
        assert session.run("import sqlite3, ssl, ctypes; 'imported'") == "'imported'"
    assert (said["uid"], said["cwd"], said["files"]) == (1000, "/home/student/work", [])
    assert said["connected"] is False
    assert not any(value for name, value in said.items() if name.startswith("/"))
    assert "the-hubs-token" not in json.dumps(said)
    assert not set(said["environ"]) & {"JPY_PARENT_PID", "JPY_SESSION_NAME", "JUPYTER_DATA_DIR", "VIRTUAL_ENV"}
    assert not any("pytest" in command for command in said["pids"])


def test_bash_in_a_sandbox(specs: Specs) -> None:
    specs.add_sandboxed("bash", BASH, language="bash", env={"PS1": "$"})
    with started("bash") as session:
        assert session.run("echo $((40 + 2)); id -u") == "42\n1000\n"
        assert "No such file" in session.run("cat /etc/shadow")
        assert "the-hubs-token" not in session.run("env")
        # one process that says it and stays: bash_kernel sends one ^C, which is lost between two commands
        session.begin("bash -c 'echo begun; exec sleep 600'")
        session.manager.interrupt_kernel()
        session.finish()
        assert session.run("echo back") == "back\n"


def test_variables_come_from_the_kernelspec_and_the_policy_alone(specs: Specs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COURSE", "c1")
    monkeypatch.setenv("NOT_NAMED", "no")
    env = {"A": "of the spec", "FROM": "${COURSE}-${NOT_NAMED}", "WHERE": "$HOME", "B": "of the spec"}
    policy = {"pass_environment": ["COURSE", "NOT_SET"], "environment": {"B": "of the policy"}}
    specs.add_sandboxed("py", policy=policy, env=env)
    with started("py") as session:
        names = "['A', 'B', 'COURSE', 'FROM', 'NOT_NAMED', 'NOT_SET', 'WHERE']"
        said = eval(session.run(f"import os; [os.environ.get(name) for name in {names}]"))
    assert said == ["of the spec", "of the policy", "c1", "c1-${NOT_NAMED}", None, None, "/home/student"]


def test_read_only_hidden_and_writable_paths(specs: Specs, tmp_path: Path) -> None:
    for name in ("data", "data/solutions", "out", "cache"):
        (tmp_path / "course" / name).mkdir(parents=True)
        (tmp_path / "course" / name / "file").write_text("content")
    course = tmp_path / "course"
    policy = {
        "read_only": [str(course / "data")],
        "hidden": [str(course / "data/solutions")],
        "writable": [str(course / "out"), {"path": str(course / "cache"), "at": "/cache"}],
    }
    specs.add_sandboxed("py", policy=policy)
    code = f"""
    import os
    os.chdir({str(course)!r})
    print(sorted(os.listdir()), open("data/file").read(), os.listdir("data/solutions"))
    open("out/new", "w").write("1"); open("/cache/new", "w").write("2")
    open("data/new", "w")
    """
    with started("py") as session:
        said = session.run(textwrap.dedent(code))
    assert said.startswith("['data', 'out'] content []\n")
    assert "Read-only file system" in said
    assert [(course / name).read_text() for name in ("out/new", "cache/new")] == ["1", "2"]
    assert (course / "out/new").stat().st_uid == os.getuid()


def test_a_visible_data_directory_of_jupyter_is_masked(specs: Specs, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (specs.data / "key").write_text("secret")
    (tmp_path / "seen").write_text("seen")
    specs.add_sandboxed("py", policy={"read_only": [str(tmp_path)]})
    with started("py") as session:
        code = f"import os; [sorted(os.listdir({str(tmp_path)!r} + name)) for name in ('', '/data', '/runtime')]"
        assert session.run(code) == "[['config', 'data', 'runtime', 'seen'], [], []]"


def test_work_is_the_persons_own_directory(specs: Specs, tmp_path: Path) -> None:
    below = tmp_path / "notebooks" / "week 1"
    below.mkdir(parents=True)
    (below / "helper.py").write_text("answer = 42")
    specs.add_sandboxed("py", policy={"work": str(tmp_path / "notebooks")})
    with started("py", cwd=str(below)) as session:
        assert session.run("import os; os.getcwd()") == repr(str(below))
        assert session.run("import helper; open('result', 'w').write('x'); helper.answer") == "42"
    assert (below / "result").read_text() == "x"
    with started("py", cwd="/usr") as session:
        assert session.run("import os; os.getcwd()") == repr(str(tmp_path / "notebooks"))


def test_resource_dir_and_arguments_of_the_client(specs: Specs) -> None:
    start = "import runpy, sys; sys.orig = list(sys.argv); del sys.argv[2]; runpy.run_path(sys.argv[1])"
    argv = ["python", "-c", start, "{resource_dir}/start.py", "{unknown}", "-f", "{connection_file}"]
    directory = specs.add_sandboxed("py", argv)
    (directory / "start.py").write_text("from ipykernel import kernelapp; kernelapp.launch_new_instance()")
    with started("py", extra_arguments=["--Session.username=me"]) as session:
        assert eval(session.run("import sys; sys.orig")) == [
            "-c",
            str(directory / "start.py"),
            "{unknown}",
            "-f",
            "/run/kernel/connection.json",
            "--Session.username=me",
        ]


def test_the_default_for_kernelspecs_that_name_no_provisioner(specs: Specs) -> None:
    specs.add("plain")
    code = "from jupyter_client.manager import start_new_kernel as start; manager, client = start(kernel_name='plain');"
    code += "client.execute_interactive('import os; print(os.getuid(), os.path.exists(\"/etc/shadow\"))', timeout=60);"
    code += "client.stop_channels(); manager.shutdown_kernel()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "JUPYTER_DEFAULT_PROVISIONER_NAME": "isolate"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.stdout == "1000 False\n", done.stderr


def test_nothing_inside_holds_a_descriptor_of_the_client(specs: Specs) -> None:
    specs.add_sandboxed("py")
    code = "import os; sorted({os.readlink(f'/proc/self/fd/{n}').split(':')[0] for n in range(3)})"
    with started("py") as session:
        assert session.run(code) == "['/dev/null', 'pipe']"


# Starting, interrupting, restarting, ending


@pytest.mark.parametrize("mode", ["signal", "message"])
def test_interrupt(specs: Specs, mode: str) -> None:
    specs.add_sandboxed("py", interrupt_mode=mode)
    with started("py") as session:
        session.begin("print('begun', flush=True); import time; time.sleep(600)")
        session.manager.interrupt_kernel()
        assert session.finish().strip() == "KeyboardInterrupt"
        assert session.run("3") == "3"


@pytest.mark.parametrize("now", [True, False])
def test_a_connected_client_stays_connected_over_restarts(specs: Specs, now: bool) -> None:
    specs.add_sandboxed("py")
    with started("py") as session:
        before = session.manager.get_connection_info()
        for number in range(3):
            session.run(f"x = {number}; open('/tmp/left', 'w')")
            session.manager.restart_kernel(now=now)
            session.client.wait_for_ready(timeout=LONG)
            assert "NameError" in session.run("x")
            assert session.run("import os; os.path.exists('/tmp/left')") == "False"
        assert session.manager.get_connection_info() == before
        file = json.loads(Path(session.manager.connection_file).read_text())
        assert (file["transport"], file["ip"]) == ("ipc", before["ip"])
        assert stat.S_IMODE(Path(session.manager.connection_file).stat().st_mode) == 0o600


def test_a_second_client_connects_by_the_connection_file(specs: Specs) -> None:
    specs.add_sandboxed("py")
    with started("py") as session:
        done = subprocess.run(
            [sys.executable, "-m", "jupyter_client.runapp", "--existing", session.manager.connection_file],
            input="print(6 * 7)",
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    assert "42" in done.stdout, done.stderr


def test_it_ends_when_asked_politely(specs: Specs) -> None:
    specs.add_sandboxed("py")
    with started("py") as session:
        session.manager.shutdown_kernel()
        assert session.manager._shutdown_status.name == "ShutdownRequest"
        assert not session.manager.has_kernel


def test_a_kernel_that_does_not_want_to_end_is_ended(specs: Specs) -> None:
    specs.add_sandboxed("py")
    with started("py") as session:
        session.manager.shutdown_wait_time = 1.0
        session.begin(
            "import signal, time\n"
            "for n in (signal.SIGINT, signal.SIGTERM): signal.signal(n, signal.SIG_IGN)\n"
            "import threading; print('begun', flush=True)\n"
            "while True: time.sleep(1)\n"
        )
        session.manager.shutdown_kernel()
        assert not session.manager.has_kernel


@pytest.mark.parametrize(
    ("code", "expected"), [("import os; os._exit(3)", 3), ("import os; os.kill(os.getpid(), 6)", -6)]
)
def test_a_kernel_that_dies_is_seen_and_can_be_restarted(specs: Specs, code: str, expected: int) -> None:
    specs.add_sandboxed("py")
    with started("py") as session:
        session.client.execute(code)
        assert session.wait_until_dead() == expected
        session.manager.restart_kernel()
        session.client.wait_for_ready(timeout=LONG)
        assert session.run("4") == "4"


@contextlib.contextmanager
def heard(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What jupyter_client's managers log, which does not reach the root logger."""
    logger = logging.getLogger("traitlets")
    logger.addHandler(caplog.handler)
    try:
        yield
    finally:
        logger.removeHandler(caplog.handler)


def test_last_words_are_in_the_log_and_cannot_write_to_a_terminal(
    specs: Specs, caplog: pytest.LogCaptureFixture
) -> None:
    words = "import os, sys; os.write(1, b'x' * 200_000); sys.exit('\\nlast \\x1b[31mwords')"
    specs.add_sandboxed("bad", ["python", "-c", words, "{connection_file}"])
    manager = KernelManager(kernel_name="bad")
    with heard(caplog):
        manager.start_kernel()
        assert eventually(lambda: not manager.is_alive(), LONG)
        manager.shutdown_kernel(now=True)
    assert "it ended with exit code 1; it said: last ?[31mwords" in caplog.text


def test_a_limit_that_ends_it_is_named_in_the_log(specs: Specs, caplog: pytest.LogCaptureFixture) -> None:
    specs.add_sandboxed("py", policy={"wall_seconds": 4})
    with heard(caplog), started("py") as session:
        session.client.execute("import time; time.sleep(600)")
        assert session.wait_until_dead() == -signal.SIGKILL
    assert "the wall limit of 4 s was reached" in caplog.text


def test_the_memory_limit_counts(specs: Specs, caplog: pytest.LogCaptureFixture) -> None:
    specs.add_sandboxed("py", policy={"memory": "300M"})
    hoard = "import subprocess, sys\nfor n in range(6):\n    subprocess.Popen([sys.executable, '-c', CHILD])\n"
    child = "x = b'1' * (90 << 20); import time; time.sleep(600)"
    with heard(caplog), started("py") as session:
        session.client.execute(hoard.replace("CHILD", repr(child)))
        assert session.wait_until_dead() == -signal.SIGKILL
    assert "the memory limit of 300 MiB for all processes together was reached" in caplog.text


def test_an_asked_end_is_no_problem_worth_a_warning(specs: Specs, caplog: pytest.LogCaptureFixture) -> None:
    specs.add_sandboxed("py")
    with heard(caplog):
        with started("py") as session:
            session.manager.shutdown_kernel()
        with started("py"):
            pass
    assert "in its sandbox" not in caplog.text


def test_signals_that_do_not_pass_are_refused(specs: Specs) -> None:
    specs.add_sandboxed("py")
    with started("py") as session:
        with pytest.raises(ValueError, match="SIGINT, SIGTERM and SIGKILL"):
            session.manager.signal_kernel(signal.SIGUSR1)
        session.manager.signal_kernel(0)
        session.manager.signal_kernel(signal.SIGTERM)
        assert session.wait_until_dead() == -signal.SIGTERM


def test_twenty_cycles_leave_nothing(specs: Specs) -> None:
    specs.add_sandboxed("py")
    me = os.getpid()

    def state() -> tuple[Any, ...]:
        return len(own_descriptors()), len(descendants(me)), threading.active_count()

    async def cycle(number: int) -> None:
        manager = KernelManager(kernel_name="py")
        await manager._async_start_kernel()
        if number % 3 == 1:
            await manager._async_restart_kernel(now=True)
        if number % 3 == 2:
            manager.provisioner._kernel.send("kill")  # type: ignore[union-attr]
        await manager._async_shutdown_kernel(now=number % 2 == 0)
        manager.context.destroy(linger=0)

    asyncio.run(cycle(0))
    before = state()
    for number in range(20):
        asyncio.run(cycle(number))
    assert eventually(lambda: state() == before), (before, state())
    assert os.listdir(os.environ["JUPYTER_RUNTIME_DIR"]) == []


def test_a_start_that_is_cancelled_leaves_nothing(specs: Specs) -> None:
    specs.add_sandboxed("py")

    async def start_and_change_ones_mind() -> None:
        task = asyncio.ensure_future(KernelManager(kernel_name="py")._async_start_kernel())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    descriptors, processes = len(own_descriptors()), len(descendants(os.getpid()))
    asyncio.run(start_and_change_ones_mind())
    assert eventually(lambda: len(descendants(os.getpid())) == processes)
    assert eventually(lambda: len(own_descriptors()) <= descriptors)


def test_the_event_loop_goes_on_while_a_kernel_starts(specs: Specs) -> None:
    specs.add_sandboxed("py")

    async def start() -> list[float]:
        loop, late = asyncio.get_running_loop(), []

        async def tick() -> None:
            while True:
                before = loop.time()
                await asyncio.sleep(0.01)
                late.append(loop.time() - before)

        ticking = asyncio.ensure_future(tick())
        manager = KernelManager(kernel_name="py")
        await manager._async_start_kernel()
        ticking.cancel()
        await manager._async_shutdown_kernel(now=True)
        manager.context.destroy(linger=0)
        return late

    asyncio.run(start())  # imports and caches
    assert len(asyncio.run(start())) >= 2


def test_kernels_side_by_side_do_not_see_each_other(specs: Specs) -> None:
    specs.add_sandboxed("py")
    with started("py") as one, started("py") as two:
        assert one.manager.ip != two.manager.ip
        one.run("open('/tmp/mine', 'w').write('x'); x = 1")
        assert "FileNotFoundError" in two.run("open('/tmp/mine')")
        assert "NameError" in two.run("x")


CLIENT = """
import sys
from jupyter_client.manager import start_new_kernel
manager, client = start_new_kernel(kernel_name="py")
sleeper = "[sys.executable, '-c', 'import time; time.sleep(600)', sys.argv[-1]]"
client.execute_interactive(f"import subprocess, sys; child = subprocess.Popen({sleeper})")
print("started", flush=True)
client.execute("while True: pass")
sys.stdin.read()
"""


def test_it_dies_with_its_client(specs: Specs) -> None:
    marker = f"marker-{os.urandom(6).hex()}"
    specs.add_sandboxed("py", [*PYTHON, marker])
    process = subprocess.Popen([sys.executable, "-c", CLIENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"started\n"
        below = descendants(process.pid)
        assert len(marked(marker)) >= 2
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
    assert eventually(lambda: not marked(marker), 20)
    assert eventually(lambda: not below & set().union(*(descendants(pid) for pid, _ in below)), 20)


# Doors


def test_a_kernel_cannot_lead_its_client_to_a_socket_of_the_host(specs: Specs, tmp_path: Path) -> None:
    """Who may write the directory may put a symlink where a socket was, and who connects is outside."""
    specs.add_sandboxed("py")
    with socket.socket(socket.AF_UNIX) as host:
        host.bind(str(tmp_path / "host"))
        host.listen()
        host.settimeout(1)
        with started("py") as session:
            path = f"{session.manager.ip}-{session.manager.hb_port}"
            with socket.socket(socket.AF_UNIX) as control:
                control.connect(path)
            name = f"/run/kernel/{os.path.basename(path)}"
            said = session.run(f"import os; os.unlink({name!r}); os.symlink({str(tmp_path / 'host')!r}, {name!r})")
            assert not os.path.exists(path)
            with socket.socket(socket.AF_UNIX) as client:
                if "PermissionError" in said:  # Landlock
                    with pytest.raises(FileNotFoundError):
                        client.connect(path)
                else:
                    assert os.readlink(path) == str(tmp_path / "host")
                    with pytest.raises(OSError, match="symbolic links"):
                        client.connect(path)
        with pytest.raises(TimeoutError):
            host.accept()


def test_the_directory_of_sockets_leads_nowhere_and_cannot_be_written(specs: Specs) -> None:
    specs.add_sandboxed("py")
    with started("py") as session:
        directory = os.path.dirname(session.manager.ip)
        assert sorted(os.listdir(f"{directory}/..")) == sorted(os.listdir(directory))
        with pytest.raises(OSError, match="Read-only"):
            open(f"{directory}/new", "w")


def test_a_doors_path_fits_into_a_socket_address() -> None:
    door = Door()
    try:
        longest = door.prefix.replace(str(os.getpid()), "4194304").replace("/fd/", "/fd/100000") + "-5"
        assert len(longest) <= 107
    finally:
        door.close()


def test_a_closed_door_stays_closed() -> None:
    door = Door()
    number = int(door.prefix.split("/")[4])
    door.close()
    with open(os.devnull) as other:
        door.open(other.fileno())
        door.shut()
        door.close()
    with pytest.raises(OSError):
        os.fstat(number)


# Other clients


def _notebook(*sources: str, name: str) -> Any:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    kernelspec = {"name": name, "display_name": name, "language": "python"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernelspec})


def test_nbclient(specs: Specs, tmp_path: Path) -> None:
    specs.add_sandboxed("py")
    notebook = _notebook("x = 20", "import os; print(os.listdir()); x + 1", "open('/etc/shadow')", name="py")
    client = nbclient.NotebookClient(notebook, allow_errors=True, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [cell.outputs for cell in notebook.cells]
    assert outputs[1][0].text == "[]\n"
    assert outputs[1][1].data["text/plain"] == "21"
    assert outputs[2][0].ename == "FileNotFoundError"


def test_nbclient_shows_why_there_is_no_sandbox(specs: Specs) -> None:
    specs.add_sandboxed("py", policy={"hiden": []})
    with pytest.raises(SandboxError, match="hiden: there is no such key"):
        nbclient.NotebookClient(_notebook("1", name="py")).execute()


def test_papermill(specs: Specs, tmp_path: Path) -> None:
    specs.add_sandboxed("py")
    notebook = _notebook("a = 1", "import os; print(a, os.environ.get('JUPYTERHUB_API_TOKEN'), os.getuid())", name="py")
    notebook.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, tmp_path / "in.ipynb")
    papermill.execute_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", {"a": 7}, progress_bar=False)
    done = nbformat.read(tmp_path / "out.ipynb", 4)
    assert done.cells[-1].outputs[0].text == "7 None 1000\n"


def test_papermill_with_bash(specs: Specs, tmp_path: Path) -> None:
    specs.add_sandboxed("bash", BASH, language="bash", env={"PS1": "$"})
    notebook = _notebook("echo $HOME; id -u", name="bash")
    nbformat.write(notebook, tmp_path / "in.ipynb")
    papermill.execute_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", progress_bar=False)
    outputs = nbformat.read(tmp_path / "out.ipynb", 4).cells[0].outputs
    assert "".join(output.text for output in outputs) == "/home/student\n1000\n"


# Other people

AS_SOMEBODY = """
import json, os, sys
from importlib.metadata import EntryPoint
from jupyter_client.manager import start_new_kernel
from jupyter_client.provisioning import KernelProvisionerFactory
value, group = "isolate.provisioner:SandboxProvisioner", KernelProvisionerFactory.GROUP_NAME
KernelProvisionerFactory.instance().provisioners["isolate"] = EntryPoint("isolate", value, group)
manager, client = start_new_kernel(kernel_name="py")
said = []
def hear(message):
    said.append(message["content"].get("text", "") + message["content"].get("ename", ""))
client.execute_interactive("import os; print(os.listdir())", output_hook=hear, timeout=60)
client.execute_interactive(f"open({sys.argv[1]!r}).read()", output_hook=hear, timeout=60)
manager.restart_kernel()
client.wait_for_ready(timeout=60)
client.execute_interactive("print('again')", output_hook=hear, timeout=60)
client.stop_channels()
manager.shutdown_kernel()
print(json.dumps({"uid": os.getuid(), "said": "".join(said), "left": os.listdir(os.environ["JUPYTER_RUNTIME_DIR"])}))
"""


@pytest.mark.parametrize("tier", TIERS)
def test_as_root_and_as_an_ordinary_user(stage: Stage, person: Person, tier: str) -> None:
    python = stage.environment()
    home = stage.directory / f"provisioner-{person.name}-{tier}"
    specs = Specs(home / "data")
    specs.add_sandboxed("py", policy={"tier": tier})
    (home / "runtime").mkdir(mode=0o700, exist_ok=True)
    for path in (home, home / "runtime"):
        os.chown(path, person.uid, person.gid)
    done = subprocess.run(
        [python, "-P", "-c", AS_SOMEBODY, str(specs.data / "kernels/py/kernel.json")],
        env={
            "PATH": os.defpath,
            "HOME": str(home),
            "JUPYTER_DATA_DIR": str(home / "data"),
            "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        },
        cwd=home,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
        **person.credentials(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["uid"] == person.uid
    assert said["said"] == f"[]\n{'PermissionError' if tier == 'landlock' else 'FileNotFoundError'}again\n"


def test_the_tier_is_handed_on(specs: Specs) -> None:
    launch = provisioner.Launch(
        argv=[sys.executable],
        environment={},
        resource_dir=None,
        client_environment={},
        client_cwd=None,
        policy=parse_policy({"tier": "landlock"}, "x"),
        connection={"key": "k"},
    )
    door = Door()
    try:
        assert launch.prepare(door)[0].tier == "landlock"
    finally:
        door.close()


def test_poll_and_wait_before_any_kernel(specs: Specs) -> None:
    specs.add_sandboxed("py")
    manager = KernelManager(kernel_name="py")
    one = provisioner.SandboxProvisioner(kernel_id="1", kernel_spec=manager.kernel_spec, parent=manager)
    assert not one.has_process
    assert asyncio.run(one.poll()) == 0
    assert asyncio.run(one.wait()) == 0
    asyncio.run(one.cleanup())
