"""`isolate run`, called as a person calls it: exit codes, words on stderr, paths, variables, signals."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolate import cli
from isolate.policy import MIB, Report

Run = Callable[..., "subprocess.CompletedProcess[str]"]
KEEPS_CHILDREN = (
    "import subprocess, sys\nkids = [subprocess.Popen([sys.executable, '-c', {child!r}]) for _ in range(4)]\n"
)
HOARD = "x = b'1' * (60 << 20); import time; time.sleep(60)"


@pytest.mark.parametrize("code", [0, 1, 3, 124, 255])
def test_exit_code_is_that_of_the_command(isolate_run: Run, code: int) -> None:
    done = isolate_run("--", "sh", "-c", f"exit {code}")
    assert (done.returncode, done.stderr) == (code, "")


def test_stdin_stdout_and_stderr_are_passed_through(isolate_run: Run) -> None:
    done = isolate_run("--", "sh", "-c", "cat; echo oops >&2", stdin="grüß\n")
    assert (done.stdout, done.stderr) == ("grüß\n", "oops\n")


def test_binary_stdin_arrives_whole(tmp_path: Path) -> None:
    data = bytes(range(256)) * 4096
    done = subprocess.run(
        [sys.executable, "-m", "isolate.cli", "run", "cat"],
        input=data,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])},
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == data


def test_wall_limit_is_124_and_names_itself(isolate_run: Run) -> None:
    done = isolate_run("--wall", "1", "--", "sleep", "60")
    assert done.returncode == cli.WALL_LIMIT == 124
    assert re.fullmatch(r"isolate: the wall limit of 1 s was reached\n", done.stderr)


def test_cpu_limit_counts_all_processes_together(isolate_run: Run) -> None:
    # two loops of 0.75 s each: neither reaches the limit alone
    done = isolate_run("--cpu", "1.5", "--wall", "60", "--", "sh", "-c", "(while :; do :; done) & while :; do :; done")
    assert done.returncode == 128 + signal.SIGKILL
    assert done.stderr == "isolate: the cpu limit of 1.5 s of processor time was reached\n"


def test_memory_limit_counts_all_processes_together(isolate_run: Run) -> None:
    script = KEEPS_CHILDREN.format(child=HOARD) + "[kid.wait() for kid in kids]"
    done = isolate_run("--memory", "150M", "--wall", "60", "--", "python3", "-c", script)
    assert done.returncode == 128 + signal.SIGKILL
    assert done.stderr == "isolate: the memory limit of 150 MiB for all processes together was reached\n"


def test_each_of_the_processes_was_below_the_memory_limit(isolate_run: Run) -> None:
    done = isolate_run("--memory", "150M", "--", "python3", "-c", HOARD.replace("sleep(60)", "sleep(0)"))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV, signal.SIGRTMIN, signal.SIGRTMIN + 6]
)
def test_signal_is_128_and_its_number(isolate_run: Run, number: int) -> None:
    done = isolate_run("--", "sh", "-c", f"kill -{int(number)} $$")
    assert done.returncode == 128 + number
    assert done.stderr.startswith("isolate: ended by ")
    assert done.stderr.count("\n") == 1


def test_not_found_is_127(isolate_run: Run) -> None:
    done = isolate_run("--", "no-such-program")
    assert done.returncode == 127
    assert "no-such-program" in done.stderr


def test_not_executable_is_126(isolate_run: Run) -> None:
    done = isolate_run("--", "/etc/passwd")
    assert done.returncode == 126
    assert "/etc/passwd" in done.stderr


def test_a_missing_working_directory_is_named(isolate_run: Run) -> None:
    done = isolate_run("--cwd", "/no/such/place", "--", "true")
    assert done.returncode in {cli.NOT_BUILT, 126, 127}
    assert "/no/such/place" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--rw", "/no/such/directory"], "/no/such/directory"),
        (["--ro", "/no/such/directory"], "/no/such/directory"),
        (["--ro", "/"], "whole file system"),
        (["--rw", "/"], "whole file system"),
    ],
)
def test_not_built_is_125_and_names_the_cause(isolate_run: Run, arguments: list[str], word: str) -> None:
    done = isolate_run(*arguments, "--", "echo", "ran")
    assert (done.returncode, done.stdout) == (cli.NOT_BUILT, "")
    assert done.stderr.startswith("isolate: the sandbox could not be built: policy: ")
    assert word in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "name", ["plain", "with space", "grüße-日本", "colon:inside", "new\nline", "quote'\"", "-dash"]
)
def test_read_only_paths_of_any_name(isolate_run: Run, tmp_path: Path, name: str) -> None:
    directory = tmp_path / name
    directory.mkdir()
    (directory / "file").write_text("content")
    done = isolate_run("--ro", str(directory), "--", "sh", "-c", 'cat "$1/file"; touch "$1/new"', "sh", str(directory))
    assert done.stdout == "content"
    assert done.returncode == 1
    assert "Read-only" in done.stderr
    assert not (directory / "new").exists()


def test_read_only_file_alone(isolate_run: Run, tmp_path: Path) -> None:
    (tmp_path / "seen").write_text("seen")
    (tmp_path / "unseen").write_text("unseen")
    done = isolate_run("--ro", str(tmp_path / "seen"), "--", "sh", "-c", f"cat {tmp_path}/seen; ls {tmp_path}")
    assert done.stdout == "seenseen\n"


@pytest.mark.parametrize("name", ["plain", "with space", "grüße", "colon:inside", "colon:/abs"])
def test_writable_paths_of_any_name(isolate_run: Run, tmp_path: Path, name: str) -> None:
    directory = tmp_path / name
    directory.mkdir(parents=True)
    done = isolate_run("--rw", str(directory), "--", "sh", "-c", 'echo ran > "$1/new"', "sh", str(directory))
    assert (done.returncode, done.stderr) == (0, "")
    assert (directory / "new").read_text() == "ran\n"
    assert (directory / "new").stat().st_uid == os.getuid()


@pytest.mark.parametrize("name", ["out", "two words", "colon:inside"])
def test_writable_path_elsewhere_and_relative(isolate_run: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    done = isolate_run("--rw", f"./{name}:/out", "--", "sh", "-c", "echo ran > /out/new; ls /", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / name / "new").read_text() == "ran\n"
    assert "out" in done.stdout.split()
    assert tmp_path.parts[1] == "tmp" or tmp_path.parts[1] not in done.stdout.split()


def test_writable_place_over_tmp(isolate_run: Run, tmp_path: Path) -> None:
    done = isolate_run(
        "--rw", f"{tmp_path}:/tmp/inner", "--", "sh", "-c", "echo ran > /tmp/inner/new; echo ok > /tmp/own"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_several_paths_at_once(isolate_run: Run, tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    a, b, c = (str(tmp_path / name) for name in "abc")
    done = isolate_run(
        "--ro", a, "--ro", b, "--rw", c, "--", "sh", "-c", f"cat {a}/file {b}/file {c}/file; touch {c}/new"
    )
    assert done.stdout == "abc"
    assert (tmp_path / "c" / "new").exists()


def test_variables(isolate_run: Run) -> None:
    arguments = ["--env", "GIVEN=one=two words", "--env", "MINE", "--env", "EMPTY="]
    done = isolate_run(*arguments, "--", "env", MINE="passed on", UNNAMED="secret")
    variables = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert variables["GIVEN"] == "one=two words"
    assert variables["MINE"] == "passed on"
    assert variables["EMPTY"] == ""
    assert "UNNAMED" not in variables


def test_report(isolate_run: Run, tmp_path: Path) -> None:
    path = tmp_path / "report of it.json"
    done = isolate_run("--report", str(path), "--", "sh", "-c", "exit 7")
    report = json.loads(path.read_text())
    assert done.returncode == report["exit_code"] == 7
    assert (report["ended"], report["tier"], report["limit"], report["signal"]) == ("exited", "namespaces", None, None)
    assert 0 < report["wall_seconds"] < 60
    assert report["memory_peak_bytes"] > 100_000
    assert {"seccomp", "no_new_privs", "no capabilities", "rlimits"} <= set(report["layers"])
    assert set(report) == set(Report.__dataclass_fields__)


def test_report_of_a_limit(isolate_run: Run, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    isolate_run("--report", str(path), "--wall", "1", "--", "sleep", "60")
    report = json.loads(path.read_text())
    assert (report["ended"], report["limit"], report["exit_code"]) == ("limit", "wall", None)
    assert "wall limit of 1 s" in report["message"]


def test_report_that_cannot_be_written_is_found_before_the_command_runs(isolate_run: Run, tmp_path: Path) -> None:
    done = isolate_run("--report", str(tmp_path / "missing" / "report.json"), "--", "echo", "ran")
    assert done.returncode == cli.NOT_BUILT
    assert "missing/report.json" in done.stderr
    assert done.stdout == ""


def test_options_after_the_command_belong_to_it(isolate_run: Run) -> None:
    done = isolate_run("--wall", "50", "--", "sh", "-c", "echo $1 $2", "sh", "--wall", "--help")
    assert (done.returncode, done.stdout) == (0, "--wall --help\n")


@pytest.mark.parametrize(
    "command", [["echo", "-n", "x"], ["echo", "--wall", "x"], ["sh", "-c", "echo x"], ["echo", "--", "x"]]
)
def test_options_after_the_command_belong_to_it_without_dashes_too(isolate_run: Run, command: list[str]) -> None:
    with_dashes = isolate_run("--", *command)
    without = isolate_run(*command)
    assert (with_dashes.returncode, with_dashes.stderr) == (0, "")
    assert (without.returncode, without.stdout) == (0, with_dashes.stdout)


def test_dashes_of_the_command_stay(isolate_run: Run) -> None:
    assert isolate_run("--", "printf", "%s,", "--", "a", "--", "b").stdout == "--,a,--,b,"


def test_arguments_that_are_not_utf8_arrive(isolate_run: Run) -> None:
    assert isolate_run("--", "printf", "%s", "caf\udce9").stdout == "caf\udce9"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--"],
        ["--nonsense", "--", "true"],
        ["--memory", "lots", "--", "true"],
        ["--memory", "0", "--", "true"],
        ["--memory", "0.5", "--", "true"],
        ["--memory", "-1", "--", "true"],
        ["--memory", "9" * 400, "--", "true"],
        ["--files", "0.1", "--", "true"],
        ["--wall", "0", "--", "true"],
        ["--wall", "nan", "--", "true"],
        ["--wall", "1e999", "--", "true"],
        ["--cpu", "soon", "--", "true"],
        ["--processes", "1.5", "--", "true"],
        ["--processes", "0", "--", "true"],
        ["--env", "=x", "--", "true"],
        ["--env", "NOT_SET_ANYWHERE", "--", "true"],
        ["--rw", "out:/a/../b", "--", "true"],
        ["--rw", "", "--", "true"],
        ["--ro", "", "--", "true"],
    ],
)
def test_option_errors_exit_2(isolate_run: Run, arguments: list[str]) -> None:
    done = isolate_run(*arguments)
    assert done.returncode == 2
    assert "usage: isolate" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--memory", "99999999T"],
        ["--files", "99999999T"],
        ["--cpu", "1e300"],
        ["--wall", "1e300"],
        ["--processes", "9" * 20],
    ],
)
def test_limits_beyond_the_machine_work_or_are_option_errors(isolate_run: Run, arguments: list[str]) -> None:
    done = isolate_run(*arguments, "--", "echo", "ran")
    assert (done.returncode, done.stdout) in {(0, "ran\n"), (2, "")}
    assert "Error" not in done.stderr


def test_help_teaches(isolate_run: Run) -> None:
    text = isolate_run("--help").stdout
    for word in ("124", "125", "126", "127", "128 + N", "examples:", "--ro PATH", "--rw PATH[:AT]", "no\nnetwork"):
        assert word.replace("\n", " ") in text.replace("\n", " ")


def test_the_examples_of_the_help_run(isolate_run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert "FileNotFoundError" in isolate_run("--", "python3", "-c", 'print(open("/etc/shadow").read())').stderr
    assert isolate_run("--rw", "./out:/out", "--", "sh", "-c", "date > /out/when", cwd=tmp_path).returncode == 0
    assert (tmp_path / "out" / "when").read_text()


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "INT"), (signal.SIGTERM, "TERM")])
def test_signals_are_forwarded(number: signal.Signals, name: str) -> None:
    script = f"trap 'echo got {name}; exit 9' {name}; echo ready; while :; do sleep 0.05; done"
    process = subprocess.Popen(
        [sys.executable, "-m", "isolate.cli", "run", "--wall", "60", "--", "sh", "-c", script],
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (9, f"got {name}\n")
    assert "isolate:" not in err


def test_a_signal_while_the_sandbox_is_being_built() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "isolate.cli", "run", "--wall", "60", "--", "sleep", "50"],
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])},
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not children.read_text():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=40)
    assert process.returncode in {128 + signal.SIGINT, -signal.SIGINT}
    assert "Traceback" not in err


def test_a_command_that_does_not_mind_ends_by_the_signal() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "isolate.cli", "run", "--wall", "60", "--", "sh", "-c", "echo ready; exec sleep 50"],
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert err == "isolate: ended by SIGTERM\n"


def test_the_interpreter_of_a_venv_brings_its_environment(isolate_run: Run) -> None:
    done = isolate_run("--", sys.executable, "-c", "import nbformat, sys; print(sys.prefix)")
    assert (done.stdout, done.stderr) == (f"{sys.prefix}\n", "")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("4096", 4096),
        ("500M", 500 * MIB),
        ("500MB", 500 * MIB),
        ("500MiB", 500 * MIB),
        ("1.5G", 1536 * MIB),
        ("2k", 2048),
        ("1T", 1024 * 1024 * MIB),
        ("10 M", 10 * MIB),
        ("7B", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert cli.size(text) == size


@given(st.integers(1, 10_000), st.sampled_from(["", "k", "M", "G", "T"]), st.sampled_from(["", "B", "iB"]))
def test_sizes_are_powers_of_1024(number: int, prefix: str, unit: str) -> None:
    assert cli.size(f"{number}{prefix}{unit}") == number * 1024 ** ["", "k", "M", "G", "T"].index(prefix)


def parsed(parse: Callable[[str], float], text: str) -> float | None:
    """None for an argument error, the only one that may be raised."""
    try:
        return parse(text)
    except argparse.ArgumentTypeError:
        return None


@given(st.text(max_size=12))
def test_any_text_is_a_positive_size_time_and_number_or_an_argument_error(text: str) -> None:
    for parse in (cli.size, cli.seconds, cli.count):
        value = parsed(parse, text)
        assert value is None or 0 < value < float("inf")


@pytest.mark.parametrize(
    ("report", "code"),
    [
        (Report("exited", exit_code=5), 5),
        (Report("limit", limit="wall"), 124),
        (Report("limit", limit="memory"), 137),
        (Report("limit", limit="files"), 137),
        (Report("signal", signal=15), 143),
        (Report("killed"), 137),
    ],
)
def test_exit_code_of_a_report(report: Report, code: int) -> None:
    assert cli.exit_code(report) == code
