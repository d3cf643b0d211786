"""One sandbox: what it shows, what it caps, how it reports, and that it leaves nothing."""

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from e2e import host
from isolate import sandbox as sandbox_module
from isolate import uids
from isolate.policy import HOME, MIB, WORK, Bind, Limits, Policy, SandboxError, system_policy
from isolate.sandbox import Command, Sandbox, explain_limit

PACKAGE = Path(sandbox_module.__file__).parents[1]
Shell = Callable[..., object]


@pytest.fixture(autouse=True)
def new_processes() -> Iterator[Callable[[], list[int]]]:
    """Living processes of this test, oldest first. When it ends there are none, and no mount or descriptor is new.

    Servers of wider fixtures do not count: they have children that come and go.
    """
    older = host.descendants(os.getpid())

    def new() -> list[int]:
        found = host.descendants(os.getpid(), besides=older) - older
        return [pid for pid, _ in sorted(found, key=lambda process: (int(process[1]), process[0]))]

    def state() -> tuple[int, list[int], str]:
        return len(os.listdir("/proc/self/fd")), new(), Path("/proc/self/mountinfo").read_text()

    before = state()
    yield new
    assert state() == before


def tree(tmp_path: Path) -> Path:
    """a/{file, inner/{file, deep/file}}"""
    (tmp_path / "a" / "inner" / "deep").mkdir(parents=True)
    for where in ("a", "a/inner", "a/inner/deep"):
        (tmp_path / where / "file").write_text(where)
    return tmp_path / "a"


class TestView:
    def test_visible_is_read_only(self, shell: Shell, tmp_path: Path) -> None:
        a = tree(tmp_path)
        done = shell(f"cat {a}/inner/file; echo x > {a}/file; rm {a}/file; mkdir {a}/new", read_only=[Bind(a)])
        assert done.stdout == "a/inner"
        assert done.stderr.count("Read-only file system") == 3

    def test_what_is_not_named_is_absent(self, shell: Shell, tmp_path: Path) -> None:
        a = tree(tmp_path)
        (tmp_path / "other").write_text("x")
        done = shell(f"cd {tmp_path} && ls -A; ls -A /; cat /etc/shadow", read_only=[Bind(a)])
        assert done.stdout.splitlines()[0] == "a"
        assert "other" not in done.stdout
        assert "root" not in done.stdout.split() or shell("ls -A /root").stdout == ""
        assert "No such file" in done.stderr

    def test_mask_below_visible(self, shell: Shell, tmp_path: Path) -> None:
        a = tree(tmp_path)
        done = shell(f"cat {a}/file; ls -A {a}/inner; touch {a}/inner/x", read_only=[Bind(a)], hidden=[a / "inner"])
        assert done.stdout == "a"
        assert "Read-only" in done.stderr or "denied" in done.stderr

    def test_masked_file_is_empty(self, shell: Shell, tmp_path: Path) -> None:
        a = tree(tmp_path)
        assert shell(f"cat {a}/file {a}/inner/file", read_only=[Bind(a)], hidden=[a / "file"]).stdout == "a/inner"

    def test_visible_below_hidden(self, shell: Shell, tmp_path: Path) -> None:
        a = tree(tmp_path)
        visible = [Bind(a), Bind(a / "inner" / "deep")]
        done = shell(f"cat {a}/inner/deep/file; ls -A {a}/inner", read_only=visible, hidden=[a / "inner"])
        assert done.stdout == "a/inner/deepdeep\n"

    def test_a_mask_wins_at_the_same_place(self, shell: Shell, tmp_path: Path) -> None:
        a = tree(tmp_path)
        assert shell(f"ls -A {a}", read_only=[Bind(a)], hidden=[a]).stdout == ""

    def test_a_mask_holds_for_every_name_of_the_place(self, shell: Shell, tmp_path: Path) -> None:
        a = tree(tmp_path)
        (tmp_path / "alias").symlink_to("a")
        visible = [Bind(a), Bind(tmp_path / "alias"), Bind(a, Path("/elsewhere")), Bind(a / "inner", Path("/inner"))]
        for hidden in (a / "inner", tmp_path / "alias" / "inner"):
            done = shell(
                f"cat {a}/inner/file {tmp_path}/alias/inner/file /elsewhere/inner/file /inner/file /elsewhere/file",
                read_only=visible,
                hidden=[hidden],
            )
            assert done.stdout == "a"

    def test_a_mask_through_a_link_that_leads_elsewhere(self, shell: Shell, tmp_path: Path) -> None:
        a = tree(tmp_path)
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "secret").write_text("secret")
        (a / "to").symlink_to(tmp_path / "b")
        done = shell(
            f"cat {a}/to/secret {tmp_path}/b/secret", read_only=[Bind(a), Bind(tmp_path / "b")], hidden=[a / "to"]
        )
        assert "secret" not in done.stdout

    def test_a_link_shows_what_it_leads_to(self, shell: Shell, tmp_path: Path) -> None:
        a = tree(tmp_path)
        (tmp_path / "alias").symlink_to("a")
        done = shell(f"cat {tmp_path}/alias/file; ls {tmp_path}", read_only=[Bind(tmp_path / "alias")])
        assert done.stdout == "aalias\n"
        assert a.exists()

    def test_a_link_by_way_of_another(self, shell: Shell, tmp_path: Path) -> None:
        a = tree(tmp_path)
        (tmp_path / "middle").symlink_to("a/inner")
        (tmp_path / "alias").symlink_to("middle")
        assert shell(f"cat {tmp_path}/alias/file", read_only=[Bind(a), Bind(tmp_path / "alias")]).stdout == "a/inner"

    def test_a_link_in_the_view_leads_nowhere_outside(self, shell: Shell, tmp_path: Path) -> None:
        a = tree(tmp_path)
        (a / "out").symlink_to("/etc/shadow")
        (a / "up").symlink_to("../../../../../../../../../..")
        done = shell(f"cat {a}/out; ls -A {a}/up/home", read_only=[Bind(a)])
        assert done.stdout == "student\n"

    def test_a_place_of_another_name(self, shell: Shell, tmp_path: Path) -> None:
        a = tree(tmp_path)
        done = shell(
            "cat /data/sets/file; cat /f", read_only=[Bind(a, Path("/data/sets")), Bind(a / "file", Path("/f"))]
        )
        assert done.stdout == "aa"

    def test_writable_below_read_only(self, shell: Shell, tmp_path: Path) -> None:
        a = tree(tmp_path)
        done = shell(f"echo new > {a}/inner/new; touch {a}/no", read_only=[Bind(a)], writable=[Bind(a / "inner")])
        assert (a / "inner" / "new").read_text() == "new\n"
        assert not (a / "no").exists()
        assert done.stderr.count("Read-only") == 1

    def test_a_mask_below_writable_protects(self, shell: Shell, tmp_path: Path) -> None:
        a = tree(tmp_path)
        shell(f"rm -rf {a}/inner/*; echo x > {a}/inner/file; rm {a}/file", writable=[Bind(a)], hidden=[a / "inner"])
        assert (a / "inner" / "file").read_text() == "a/inner"
        assert not (a / "file").exists()

    def test_a_view_below_tmp_home_and_shm(self, shell: Shell, tmp_path: Path) -> None:
        a = tree(tmp_path)
        places = ["/tmp/course", f"{HOME}/data", "/dev/shm/data", f"{WORK}/data"]
        script = "".join(f"cat {place}/file; touch {place}/x {place}/../own && rm {place}/../own;" for place in places)
        done = shell(script, read_only=[Bind(a, Path(place)) for place in places])
        assert done.stdout == "a" * 4
        assert done.stderr.count("Read-only") == 4

    @pytest.mark.parametrize(
        "name", ["two words", "grüße", "new\nline", "tab\t", "back\\slash", "c,omma", "*?[x]", "caf\udce9"]
    )
    def test_odd_names(self, shell: Shell, tmp_path: Path, name: str) -> None:
        directory = tmp_path / name
        directory.mkdir()
        (directory / "file").write_text("x")
        (directory / "hidden").mkdir()
        (directory / "hidden" / "secret").write_text("secret")
        done = shell(
            'cat "$P/file" "$P/hidden/secret"',
            read_only=[Bind(directory)],
            hidden=[directory / "hidden"],
            environment={"P": str(directory)},
        )
        assert done.stdout == "x"

    @pytest.mark.parametrize("kind", ["missing", "dangling"])
    def test_a_path_that_is_not_there(self, tmp_path: Path, kind: str) -> None:
        if kind == "dangling":
            (tmp_path / "x").symlink_to("nowhere")
        with pytest.raises(SandboxError, match=re.escape(str(tmp_path / "x"))) as caught:
            Sandbox(Policy(read_only=(Bind(tmp_path / "x"),)), Command(["true"])).__enter__()
        assert caught.value.layer == "policy"

    def test_a_hidden_path_that_is_not_there(self, shell: Shell, tmp_path: Path) -> None:
        a = tree(tmp_path)
        assert shell(f"cat {a}/file", read_only=[Bind(a)], hidden=[a / "no" / "such", Path("/no")]).stdout == "a"

    def test_the_root_is_read_only(self, shell: Shell) -> None:
        done = shell("for d in / /etc /dev /usr /var /run /root /proc; do touch $d/new && echo wrote $d; done")
        assert done.stdout == ""

    def test_hundreds_of_paths(self, shell: Shell, tmp_path: Path) -> None:
        for number in range(300):
            (tmp_path / str(number)).mkdir()
            (tmp_path / str(number) / "file").write_text("x")
        binds = [Bind(tmp_path / str(number), Path(f"/data/{number}/deep")) for number in range(300)]
        assert shell("cat /data/*/deep/file | wc -c", read_only=binds).stdout.strip() == "300"


class TestInside:
    def test_identity(self, shell: Shell) -> None:
        assert shell(
            "id -u; id -g; id -un; pwd; hostname 2>/dev/null || cat /proc/sys/kernel/hostname"
        ).stdout.startswith(f"1000\n1000\nstudent\n{WORK}\n")

    def test_the_environment_is_the_policys(self, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("JUPYTERHUB_API_TOKEN", "secret")
        names = {line.partition("=")[0] for line in shell("env", environment={"MINE": "x"}).stdout.splitlines()}
        assert names - {"PWD", "_", "SHLVL", "OLDPWD"} == {"MINE", *system_policy().environment}

    def test_only_the_named_descriptors(self, tmp_path: Path) -> None:
        read, write = os.pipe()
        os.set_inheritable(read, True)
        code = f"import os; print(sorted(int(fd) for fd in os.listdir('/proc/self/fd'))); os.write({write}, b'x')"
        with open(tmp_path / "out", "w+b") as out, open(read, "rb"), open(write, "wb"):
            with Sandbox(system_policy(), Command(["python3", "-c", code], stdout=out, pass_fds=[write])) as sandbox:
                sandbox.wait()
            out.seek(0)
            # one more is the listing itself
            assert {fd for fd in json.loads(out.read()) if fd > 3} - {write} == set() or write <= 3
            assert os.read(read, 1) == b"x"

    def test_no_other_processes(self, shell: Shell) -> None:
        done = shell("ls /proc | grep -c '^[0-9]' || true; kill -0 1 && echo one")
        assert int(done.stdout.split()[0]) < 8

    def test_files_from_an_archive_and_room_files(self, shell: Shell, tmp_path: Path) -> None:
        from isolate.files import pack

        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "data").write_text("data")
        with pack(tmp_path, leave_out=(), max_bytes=1000, max_files=10) as archive:
            done = shell(
                "cat sub/data ~/note; echo more >> sub/data; cat sub/data",
                archive=archive,
                room_files={f"{HOME}/note": "note"},
            )
        assert done.stdout == "datanotedatamore\n"
        assert (tmp_path / "sub" / "data").read_text() == "data"

    def test_what_is_kept_goes_on(self, shell: Shell) -> None:
        with tempfile.TemporaryFile() as first, tempfile.TemporaryFile() as second:
            shell("mkdir -p d/e; echo one > d/e/f; ln -s /etc/passwd l; mkfifo p; chmod 0 d", keep=first)
            done = shell("find . | sort; cat d/e/f; echo two > g", archive=first, keep=second)
            assert done.stdout == ".\n./d\n./d/e\n./d/e/f\none\n"
            assert shell("cat g d/e/f", archive=second).stdout == "two\none\n"

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "script",
        [
            "import os\nfor _ in range(1200): os.mkdir('d'); os.chdir('d')",
            "import os\nos.mkdir(b'\\xff\\xfe'); open(b'\\xff\\xfe/new\\nline', 'w').write('x')",
            "import os\nos.chmod('.', 0)",
            "import os\nos.rename('.', '../gone') if False else os.rename('/home/student/work', '/home/student/w2')",
            "open('sparse', 'wb').truncate(1 << 23)",
            "import os\nos.symlink('/', 'x'); os.symlink('x', 'y'); os.link('f', 'g') if os.path.exists('f') else None",
            "open('full', 'wb').write(b'x' * (8 << 20))",
            "import os\n[open(f'f{n}', 'w').close() for n in range(190)]",
        ],
    )
    def test_a_hostile_work_directory_does_not_fail_the_host(self, shell: Shell, script: str) -> None:
        """What student code leaves is no reason for a SandboxError, neither when it is packed nor in the next room."""
        limits = Limits(wall_seconds=60, files_bytes=8 * MIB, files_count=2000)
        fewer = Limits(wall_seconds=60, files_bytes=8 * MIB, files_count=200) if "range(190)" in script else limits
        with tempfile.TemporaryFile() as keep:
            quoted = script.replace("'", "'\\''")
            shell(f"python3 -c '{quoted}'", keep=keep, limits=fewer)
            done = shell("echo ran", archive=keep, limits=fewer, room_files={f"{HOME}/.cache/fonts": "x" * 10_000})
        assert done.stdout == "ran\n"

    def test_a_shared_directory_of_sockets(self) -> None:
        code = "from socket import *; s = socket(AF_UNIX); s.bind('/run/k/s'); s.listen(); s.accept()[0].send(b'hi')"
        with Sandbox(system_policy(), Command(["python3", "-c", code], share_at="/run/k")) as sandbox:
            assert sandbox.shared is not None
            assert not os.get_inheritable(sandbox.shared)
            here = os.open(".", os.O_RDONLY)
            try:
                os.fchdir(sandbox.shared)
                assert os.listdir("..") == os.listdir(".")
                with pytest.raises(OSError):
                    open("new", "w").close()
                deadline = time.monotonic() + 30
                while "s" not in os.listdir("."):
                    assert time.monotonic() < deadline
                    os.sched_yield()
            finally:
                os.fchdir(here)
                os.close(here)
            if os.geteuid() == 0:  # others may not enter the sandbox uid's directory
                os.fchdir(sandbox.shared)
                try:
                    with socket.socket(socket.AF_UNIX) as client:
                        client.connect("s")
                        assert client.recv(2) == b"hi"
                finally:
                    os.chdir("/")
            sandbox.send("kill")
            sandbox.wait(30)


class TestLimits:
    @pytest.mark.parametrize("places", [("/tmp", "/dev/shm"), (HOME, WORK), ("/tmp", WORK)])
    def test_writable_places_are_capped_together(self, shell: Shell, places: tuple[str, str]) -> None:
        write = "head -c 6000000 /dev/zero > {}/x && echo fits"
        limits = Limits(files_bytes=10 * MIB, wall_seconds=60)
        assert shell(write.format(places[0]), limits=limits).stdout == "fits\n"
        done = shell("; ".join(write.format(place) for place in places), limits=limits)
        assert done.stdout == "fits\n"
        assert "No space left" in done.stderr

    def test_number_of_files(self, shell: Shell) -> None:
        done = shell(
            "i=0; while touch /tmp/$i; do i=$((i+1)); done; echo $i", limits=Limits(files_count=200, wall_seconds=60)
        )
        assert 100 < int(done.stdout) < 200
        assert "No space left" in done.stderr

    def test_one_file_too_large(self, shell: Shell) -> None:
        script = 'import signal; signal.signal(signal.SIGXFSZ, signal.SIG_DFL); open("x", "wb").truncate(1 << 40)'
        done = shell(f"exec python3 -c '{script}'", limits=Limits(files_bytes=8 * MIB, wall_seconds=60))
        assert (done.report.ended, done.report.limit) == ("limit", "files")
        assert "8 MiB" in done.report.message

    def test_processes(self, shell: Shell) -> None:
        done = shell(
            "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 60 & done; echo all",
            limits=Limits(processes=10, wall_seconds=60),
        )
        assert "all" not in done.stdout
        assert "fork" in done.stderr.lower()

    def test_memory_of_one_process_is_an_error_of_its_own(self, shell: Shell) -> None:
        done = shell(
            "exec python3 -c 'x = bytearray(300 << 20)'", limits=Limits(memory_bytes=100 * MIB, wall_seconds=60)
        )
        assert done.report.exit_code == 1
        assert "MemoryError" in done.stderr

    def test_a_busy_process_is_stopped_by_the_cpu_limit(self, shell: Shell) -> None:
        report = shell("while :; do :; done", limits=Limits(cpu_seconds=1, wall_seconds=60)).report
        assert (report.ended, report.limit) == ("limit", "cpu")
        assert report.cpu_seconds >= 1

    def test_short_lived_children_count(self, shell: Shell) -> None:
        script = "while :; do sh -c 'i=0; while [ $i -lt 30000 ]; do i=$((i+1)); done'; done"
        report = shell(script, limits=Limits(cpu_seconds=1, wall_seconds=60)).report
        assert (report.ended, report.limit) == ("limit", "cpu")

    @pytest.mark.parametrize(
        "script", ["trap '' TERM INT HUP; while :; do sleep 1; done", "kill -STOP $$", "(setsid sleep 60 &) ; sleep 60"]
    )
    def test_the_wall_limit_takes_everything(self, shell: Shell, script: str) -> None:
        report = shell(script, limits=Limits(wall_seconds=0.5)).report
        assert (report.ended, report.limit) == ("limit", "wall")
        assert 0.5 <= report.wall_seconds < 30

    def test_every_limit_explains_itself(self) -> None:
        policy = Policy(
            limits=Limits(
                wall_seconds=7, cpu_seconds=8, memory_bytes=9 * MIB, files_bytes=10 * MIB, output_bytes=11 * MIB
            )
        )
        for name, amount in {
            "wall": "7 s",
            "cpu": "8 s",
            "memory": "9 MiB",
            "files": "10 MiB",
            "output": "11 MiB",
        }.items():
            assert amount in explain_limit(name, policy)
            assert name.removesuffix("s") in explain_limit(name, policy)


class TestReport:
    def test_of_an_ordinary_end(self, shell: Shell) -> None:
        report = shell("exit 3").report
        assert (report.ended, report.exit_code, report.limit, report.signal, report.message) == (
            "exited",
            3,
            None,
            None,
            "",
        )
        assert report.tier == "namespaces"
        assert 0 < report.wall_seconds < 60
        assert 0 <= report.cpu_seconds < 60
        assert report.memory_peak_bytes > 100_000

    def test_layers_in_force(self, shell: Shell) -> None:
        layers = shell("true").report.layers
        for part in ("namespaces", "read-only view", "no capabilities", "no_new_privs", "seccomp", "rlimits"):
            assert any(part in layer for layer in layers), part
        assert ("unprivileged uid of its own" in layers) == (os.geteuid() == 0)

    def test_time_and_memory_used(self, shell: Shell) -> None:
        report = shell(
            "exec python3 -c 'from time import process_time as t; x = b\"1\" * (50 << 20)\nwhile t() < .5: pass'"
        ).report
        assert report.memory_peak_bytes > 50 * MIB
        assert report.cpu_seconds > 0.3

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGSEGV, signal.SIGKILL, signal.SIGRTMIN + 6])
    def test_of_a_signal(self, shell: Shell, number: int) -> None:
        report = shell(f"kill -{int(number)} $$").report
        assert (report.ended, report.signal, report.exit_code) == ("signal", number, None)
        assert report.message.startswith("ended by ")

    def test_of_a_kill(self) -> None:
        with Sandbox(system_policy(), Command(["sleep", "60"])) as sandbox:
            sandbox.send("kill")
            assert sandbox.wait(30).ended == "killed"

    @pytest.mark.parametrize(("word", "number"), [("interrupt", signal.SIGINT), ("terminate", signal.SIGTERM)])
    def test_words_to_the_command(self, word: str, number: int) -> None:
        with Sandbox(system_policy(), Command(["sleep", "60"])) as sandbox:
            sandbox.send(word)
            report = sandbox.wait(30)
        assert (report.ended, report.signal) == ("signal", number)

    def test_words_after_the_end_are_no_error(self) -> None:
        with Sandbox(system_policy(), Command(["true"])) as sandbox:
            sandbox.wait(30)
            for word in ("interrupt", "terminate", "kill"):
                sandbox.send(word)


class TestWait:
    def test_a_timeout_leaves_it_running(self) -> None:
        with Sandbox(system_policy(), Command(["sleep", "20"])) as sandbox:
            started = time.monotonic()
            with pytest.raises(TimeoutError):
                sandbox.wait(0.2)
            assert time.monotonic() - started < 10
            assert not sandbox.finished
            sandbox.send("kill")
            assert sandbox.wait(30).ended == "killed"

    @pytest.mark.parametrize("timeout", [0, -1])
    def test_no_time_at_all(self, timeout: float) -> None:
        with Sandbox(system_policy(), Command(["sleep", "20"])) as sandbox, pytest.raises(TimeoutError):
            sandbox.wait(timeout)

    def test_no_time_but_events_are_there(self) -> None:
        code = """
from isolate.policy import system_policy
from isolate.sandbox import Command, Sandbox
import select
with Sandbox(system_policy(), Command(["true"])) as sandbox:
    select.select([sandbox], [], [])
    while True:
        try:
            print(sandbox.wait(0).ended)
            break
        except TimeoutError:
            select.select([sandbox], [], [])
"""
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(PACKAGE)},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert (done.stdout, done.stderr) == ("exited\n", "")

    def test_twice_says_the_same(self) -> None:
        with Sandbox(system_policy(), Command(["true"])) as sandbox:
            assert sandbox.wait() == sandbox.wait() == sandbox.report()


BROKEN_HOST = """
import os, sys
from pathlib import Path
from isolate import room, syscalls
from isolate.policy import SandboxError, system_policy
from isolate.sandbox import Command, Sandbox

def lines(name):
    return "".join(f"{line.split()[0]} {line.split()[0]} {line.split()[2]}\\n" for line in Path(name).open())

go, go_end = os.pipe()
done, done_end = os.pipe()
if os.geteuid() == 0:  # all our ids stay what they are; written from outside
    pid, maps = os.getpid(), [(name, lines(f"/proc/self/{name}")) for name in ("uid_map", "gid_map")]
    if os.fork() == 0:
        os.read(go, 1)
        for name, text in maps:
            room.write_file(f"/proc/{pid}/{name}", text)
        os.write(done_end, b"x")
        os._exit(0)
    syscalls.unshare(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNS)
    os.write(go_end, b"x")
    os.read(done, 1)
    os.wait()
else:
    uid, gid = os.getuid(), os.getgid()
    syscalls.unshare(syscalls.CLONE_NEWUSER)
    room.write_id_maps(os.open("/proc", os.O_RDONLY), uid, gid)
for kind, number in [word.split("=") for word in sys.argv[1:]]:
    Path(f"/proc/sys/user/max_{kind}_namespaces").write_text(number)
try:
    with Sandbox(system_policy(), Command(["echo", "ran"])) as sandbox:
        sandbox.wait()
except SandboxError as error:
    print("layer:", error.layer)
    print("cause:", error.cause)
    print("remedy:", error.remedy)
"""


def on_a_host_with(*numbers: str) -> str:
    """Start a sandbox in a user namespace of our own that allows only so many namespaces below it."""
    done = subprocess.run(
        [sys.executable, "-c", BROKEN_HOST, *numbers],
        env={**os.environ, "PYTHONPATH": str(PACKAGE)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    return done.stdout


class TestFailing:
    def test_a_sandbox_within_a_user_namespace(self) -> None:
        assert on_a_host_with("user=100") == "ran\n"

    @pytest.mark.parametrize("kind", ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"])
    def test_a_host_without_some_namespaces(self, kind: str) -> None:
        said = on_a_host_with(f"{kind}=0")
        assert "[Errno 28]" in said
        if kind == "mnt" and os.geteuid() == 0:  # a cloned tree is a mount namespace of its own, and comes first
            assert said.startswith("layer: read-only view\n")
        else:
            assert said.startswith("layer: namespaces\ncause: unshare user, mount, pid, net, ipc, uts, cgroup: ")
            assert "max_user_namespaces" in said.partition("remedy: ")[2]

    def test_a_host_that_allows_only_one_level(self) -> None:
        assert on_a_host_with("user=1").startswith("layer: room\n")

    def test_a_failure_leaves_nothing_and_raises_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sandbox_module.seccomp, "compiled_filters", lambda: (b"\0" * 8,))
        with pytest.raises(SandboxError) as caught:
            Sandbox(system_policy(), Command(["echo", "ran"])).__enter__()
        assert caught.value.layer == "seccomp"

    def test_an_archive_that_is_none(self) -> None:
        with tempfile.TemporaryFile() as file:
            file.write(b"garbage" * 1000)
            with pytest.raises(SandboxError):
                Sandbox(system_policy(), Command(["true"], archive=file)).__enter__()

    @pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x"])
    def test_an_archive_whose_names_lead_out(self, name: str) -> None:
        import io
        import tarfile

        with tempfile.TemporaryFile() as file:
            with tarfile.open(fileobj=file, mode="w") as archive:
                archive.addfile(tarfile.TarInfo(name), io.BytesIO())
            with pytest.raises(SandboxError, match="leads out") as caught:
                Sandbox(system_policy(), Command(["true"], archive=file)).__enter__()
        assert caught.value.layer == "files"

    def test_an_interpreter_that_cannot_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "executable", "/no/such/python")
        with pytest.raises(SandboxError) as caught:
            Sandbox(system_policy(), Command(["true"])).__enter__()
        assert caught.value.layer == "launcher"

    def test_a_launcher_that_dies_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "executable", "/bin/true")
        with pytest.raises(SandboxError, match="without a word") as caught:
            Sandbox(system_policy(), Command(["true"])).__enter__()
        assert caught.value.layer == "launcher"


class TestNothingIsLeft:
    """The fixture above counts processes, mounts and descriptors around each of these."""

    def test_after_an_exception_inside(self) -> None:
        with pytest.raises(RuntimeError, match="mine"), Sandbox(system_policy(), Command(["sleep", "60"])):
            raise RuntimeError("mine")

    def test_without_waiting(self) -> None:
        with Sandbox(system_policy(), Command(["sh", "-c", "sleep 60 & sleep 60"])):
            pass

    def test_of_daemons(self, shell: Shell) -> None:
        shell("setsid sleep 60 & (setsid setsid sleep 61 &) ; nohup sleep 62 >/dev/null 2>&1 & exit 0")

    def test_of_a_fork_bomb(self, shell: Shell) -> None:
        script = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
        shell(f"exec python3 -c '{script}'", limits=Limits(wall_seconds=1, processes=40))

    def test_when_a_killed_launcher_takes_all_with_it(self, new_processes: Callable[[], list[int]]) -> None:
        with Sandbox(system_policy(), Command(["sleep", "60"])) as sandbox:
            launcher = new_processes()[0]
            os.kill(launcher, signal.SIGKILL)
            with pytest.raises(SandboxError):
                sandbox.wait(30)
        wait_until(lambda: not new_processes())

    def test_from_many_threads(self) -> None:
        def one(number: int) -> int | None:
            with Sandbox(system_policy(), Command(["sh", "-c", f"exit {number}"])) as sandbox:
                return sandbox.wait(60).exit_code

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(one, range(24))) == list(range(24))

    def test_a_sandbox_outlives_the_thread_that_started_it(self) -> None:
        sandboxes: list[Sandbox] = []
        stack = contextlib.ExitStack()
        thread = threading.Thread(
            target=lambda: sandboxes.append(
                stack.enter_context(Sandbox(system_policy(), Command(["sh", "-c", "read x; exit 5"], stdin=read)))
            )
        )
        read, write = os.pipe()
        with open(read, "rb"), open(write, "wb") as stdin, stack:
            thread.start()
            thread.join()
            stdin.write(b"go\n")
            stdin.flush()
            assert sandboxes[0].wait(30).exit_code == 5

    def test_two_share_a_lease(self) -> None:
        with uids.lease() as lease:
            with Sandbox(system_policy(), Command(["sleep", "60"]), lease=lease):
                with Sandbox(system_policy(), Command(["true"]), lease=lease) as other:
                    assert other.wait(30).exit_code == 0

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
    def test_when_the_supervisor_is_killed(self, number: int, new_processes: Callable[[], list[int]]) -> None:
        code = """
import os
from isolate.policy import system_policy
from isolate.sandbox import Command, Sandbox
script = "trap '' TERM; sleep 60 & (setsid sleep 60 &); echo ready; sleep 60"
with Sandbox(system_policy(), Command(["sh", "-c", script])) as sandbox:
    sandbox.wait()
"""
        marker = f"ISOLATE_TEST_{os.getpid()}_{number}"
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(PACKAGE), marker: "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        with process:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
            below = new_processes()
            assert len(below) >= 8
            process.send_signal(number)
            # Its last holder is a process of the sandbox: the pipe ends when the last of them has gone.
            assert select.select([process.stdout], [], [], 30)[0]
            assert process.stdout.read() == ""
        wait_until(lambda: not any(alive(pid) for pid in below))


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until(true: Callable[[], bool], seconds: float = 30) -> None:
    """For what no event tells: that a process of somebody else's has gone."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
