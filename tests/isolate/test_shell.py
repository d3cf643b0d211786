"""`isolate shell`, typed into through a terminal as a person does."""

import os
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest

from e2e.clients import ISOLATE, LONG
from e2e.host import descendants, eventually
from isolate import shell
from isolate.cli import NOT_BUILT, WALL_LIMIT
from isolate.policy import MIB, Bind

PROMPT = r"\(sandbox\) [^\r\n]*\$ "
Shell = Callable[..., Any]


@pytest.fixture
def typed() -> Iterator[Shell]:
    """A shell that shows its first prompt; ended after the test."""
    children = []

    def start(*options: str, ready: str = PROMPT, **env: str) -> Any:
        child = pexpect.spawn(
            ISOLATE[0],
            [*ISOLATE[1:], "shell", *options],
            env={**os.environ, "TERM": "dumb", **env},
            timeout=LONG,
            encoding="utf-8",
            dimensions=(33, 101),
        )
        children.append(child)
        child.expect(ready)
        return child

    yield start
    for child in children:
        child.close(force=True)


def ask(child: Any, command: str) -> str:
    """What a command writes."""
    child.sendline(command)
    child.expect(PROMPT)
    _, _, said = child.before.partition("\r\n")
    return str(said.replace("\r\n", "\n"))


def test_looking_around(typed: Shell, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "file").write_text("content\n")
    child = typed("--ro", str(tmp_path), JUPYTERHUB_API_TOKEN="the-hubs-token")
    assert ask(child, "id -u; pwd; ls") == "1000\n/home/student/work\n"
    assert "No such file" in ask(child, "cat /etc/shadow")
    assert ask(child, f"cat {tmp_path}/file") == "content\n"
    assert "Read-only" in ask(child, f"touch {tmp_path}/new")
    assert "the-hubs-token" not in ask(child, "env")


def test_it_has_a_terminal_of_its_own(typed: Shell) -> None:
    child = typed()
    assert ask(child, "tty") == "/dev/pts/0\n"
    assert ask(child, "echo to the terminal > /dev/pts/0") == "to the terminal\n"
    assert ask(child, "readlink /proc/self/fd/0") == "/dev/pts/0\n"
    assert ask(child, "ls /dev/pts") == "0  ptmx\n"


def test_the_window_has_the_size_of_the_persons(typed: Shell) -> None:
    child = typed()
    assert ask(child, "stty size") == "33 101\n"
    child.setwinsize(44, 55)
    assert eventually(lambda: ask(child, "stty size") == "44 55\n", 20)


def interrupt(child: Any) -> None:
    """Until there is a prompt: between two commands, the shell may take one for itself."""
    child.sendintr()
    while child.expect([PROMPT, pexpect.TIMEOUT], timeout=2):
        child.sendintr()


def test_control_keys_and_jobs(typed: Shell) -> None:
    child = typed()
    child.sendline("echo begun; sleep 600")
    child.expect("\nbegun")
    interrupt(child)
    assert ask(child, "echo $?") == "130\n"
    child.sendline("echo begun; sleep 600")
    child.expect("\nbegun")
    child.send("\x1a")
    child.expect("Stopped")
    child.expect(PROMPT)
    assert "Stopped" in ask(child, "jobs")
    child.sendline("fg")
    child.expect("sleep 600")
    interrupt(child)
    assert ask(child, "jobs") == ""


def test_more_keys_than_a_terminal_takes_at_once(typed: Shell) -> None:
    child = typed()
    line = "x" * 70
    child.sendline("stty -echo; cat > pasted; stty echo")
    child.send(f"{line}\n" * 3000)
    child.send("\x04")
    child.expect(PROMPT)
    assert ask(child, "sort -u pasted; wc -l < pasted") == f"{line}\n3000\n"


def test_all_of_a_long_output_is_shown(typed: Shell) -> None:
    child = typed()
    assert ask(child, "seq 1 60000").split() == [str(number) for number in range(1, 60001)]
    child.sendline("seq 1 60000; exit 0")
    child.expect(pexpect.EOF)
    assert "60000\r\n" in child.before


@pytest.mark.parametrize("code", [0, 7])
def test_the_exit_code_is_passed_on(typed: Shell, code: int) -> None:
    child = typed()
    child.sendline(f"exit {code}")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == code


def test_control_d_leaves(typed: Shell) -> None:
    child = typed()
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_a_limit_is_named_and_the_terminal_is_set_back(typed: Shell) -> None:
    child = typed("--wall", "2")
    child.expect("isolate: the wall limit of 2 s was reached")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == WALL_LIMIT


def _outer(options: str, after: str) -> Any:
    """`isolate shell` started by a shell that shows how it found the terminal afterwards."""
    command = shlex.join(ISOLATE)
    script = f"before=$(stty -g); {command} shell {options}; echo code $?; test $before = $(stty -g) && echo {after}"
    return pexpect.spawn("sh", ["-c", script], env={**os.environ, "TERM": "dumb"}, timeout=LONG, encoding="utf-8")


def test_the_terminal_is_set_back_after_an_exit() -> None:
    child = _outer("", "as-before")
    child.expect(PROMPT)
    child.sendline("stty raw -echo; exit 3")
    child.expect("code 3\r\n")
    child.expect("as-before")
    child.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_terminal_is_set_back_after_a_signal(number: int) -> None:
    child = _outer("", "as-before")
    child.expect(PROMPT)
    (isolate,) = (pid for pid, _ in descendants(child.pid) if _is_isolate_shell(pid))
    below = descendants(isolate)
    os.kill(isolate, number)
    child.expect("code 137\r\n")
    child.expect("as-before")
    child.close()
    assert eventually(lambda: not below & descendants(os.getpid()))


def _is_isolate_shell(pid: int) -> bool:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return words[1:4] == [b"-m", b"isolate.cli", b"shell"]


def test_the_terminal_is_set_back_when_no_sandbox_can_be_built() -> None:
    child = _outer("--ro /no/such/place", "as-before")
    child.expect("the sandbox could not be built: policy: .*/no/such/place")
    child.expect(f"code {NOT_BUILT}\r\n")
    child.expect("as-before")
    child.close()


def test_it_goes_with_its_terminal(typed: Shell) -> None:
    child = typed()
    below = descendants(child.pid)
    assert len(below) >= 5
    child.close(force=False)
    assert eventually(lambda: not below & descendants(os.getpid()), 30)


def test_without_a_terminal_it_says_what_to_use() -> None:
    done = subprocess.run([*ISOLATE, "shell"], input="ls\n", capture_output=True, text=True, check=False)
    assert done.returncode == NOT_BUILT
    assert "isolate run -- CMD" in done.stderr


def test_a_tier_without_terminals_says_so() -> None:
    child = _outer("--tier landlock", "as-before")
    child.expect("landlock tier has no terminal")
    child.expect(f"code {NOT_BUILT}\r\n")
    child.close()


def test_the_banner_is_one_line_of_what_is_visible() -> None:
    places = [Bind(Path("/srv/data"))], [Bind(Path("/srv/out"), Path("/out"))]
    line = shell.banner(*places, 256 * MIB)
    assert "\n" not in line
    assert all(word in line for word in ("/srv/data (read-only)", "/out (writable", "256 MiB", "no network"))


@pytest.mark.parametrize(
    ("own", "expected"), [("/usr/bin/zsh", "/bin/bash"), ("/opt/fish", "/bin/bash"), ("", "/bin/bash")]
)
def test_which_shell(monkeypatch: pytest.MonkeyPatch, own: str, expected: str) -> None:
    monkeypatch.setenv("SHELL", own)
    monkeypatch.setattr(os.path, "exists", lambda path: True)
    assert shell.shell() == expected


@pytest.mark.parametrize(
    ("own", "expected"), [("/usr/bin/zsh", "/usr/bin/zsh"), ("/opt/fish", "/bin/sh"), ("", "/bin/sh")]
)
def test_which_shell_without_bash(monkeypatch: pytest.MonkeyPatch, own: str, expected: str) -> None:
    monkeypatch.setenv("SHELL", own)
    monkeypatch.setattr(os.path, "exists", lambda path: path != "/bin/bash")
    assert shell.shell() == expected


def test_the_persons_terminal_is_nowhere_inside(typed: Shell) -> None:
    """Its descriptors would let code inside read keys, or write to the screen around the copy."""
    child = typed()
    said = ask(child, "for n in /proc/[0-9]*/fd/*; do readlink $n; done 2>/dev/null | grep -v pipe | sort -u")
    assert {line for line in said.split() if line.startswith("/dev/")} <= {"/dev/null", "/dev/pts/0"}
