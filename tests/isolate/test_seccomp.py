"""The filters: they compile, they load, they answer as their tables say."""

import base64
import errno
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from isolate import seccomp

PACKAGE = Path(seccomp.__file__).parents[1]
PROLOGUE = """
import base64, ctypes, errno, os, socket, sys
from isolate import syscalls
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def call(number, *arguments):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    return errno.errorcode[ctypes.get_errno()] if result == -1 else "ok"
syscalls.set_no_new_privs()
for program in sys.argv[1:]:
    syscalls.load_seccomp_filter(base64.b64decode(program))
"""


def inside(code: str, programs: Sequence[bytes] | None = None) -> "subprocess.CompletedProcess[str]":
    """Run Python code in a process that has loaded the filters, and nothing else of a sandbox."""
    encoded = [base64.b64encode(program).decode() for program in programs or seccomp.compiled_filters()]
    return subprocess.run(
        [sys.executable, "-c", PROLOGUE + code, *encoded],
        env={**os.environ, "PYTHONPATH": str(PACKAGE)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_two_programs_of_whole_instructions() -> None:
    programs = seccomp.compiled_filters()
    assert len(programs) == 2
    for program in programs:
        assert 0 < len(program) <= 8 * 4096  # BPF_MAXINSNS
        assert len(program) % 8 == 0


def test_compiled_once() -> None:
    assert seccomp.compiled_filters() is seccomp.compiled_filters()


def test_compiles_to_the_same_bytes_in_another_process() -> None:
    code = "import isolate.seccomp, sys; sys.stdout.buffer.write(b''.join(isolate.seccomp.compiled_filters()))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(PACKAGE)}, capture_output=True, check=True
    )
    assert done.stdout == b"".join(seccomp.compiled_filters())


def test_loads_in_a_child_and_python_goes_on() -> None:
    done = inside("import subprocess, threading; print(subprocess.check_output(['echo', 'ran']).decode(), end='')")
    assert (done.stdout, done.stderr, done.returncode) == ("ran\n", "", 0)


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        ("print(call(165, None, None, None, 0, None))", "EPERM"),  # mount
        ("print(call(272, 0x10000000))", "EPERM"),  # unshare(CLONE_NEWUSER)
        ("print(call(56, 0x10000000 | 17, None))", "ENOSYS"),  # clone(CLONE_NEWUSER | SIGCHLD)
        ("print(call(435, None, 0))", "ENOSYS"),  # clone3
        ("print(call(425, 1, None))", "EPERM"),  # io_uring_setup
        ("print(call(321, 0, None, 0))", "EPERM"),  # bpf
        ("print(call(101, 0, 0, None, None))", "EPERM"),  # ptrace
        ("print(call(250, 0, 0, 0, 0, 0))", "EPERM"),  # keyctl
        ("print(call(319, ctypes.c_char_p(b'x'), 0))", "ENOSYS"),  # memfd_create
        ("print(call(135, 0x0040000))", "ENOSYS"),  # personality(ADDR_NO_RANDOMIZE)
        ("print(call(135, 0xffffffff))", "ok"),
        ("print(call(16, 0, 0x5412, None))", "EPERM"),  # ioctl(TIOCSTI)
        ("print(call(16, 0, 0xdead00000000 | 0x5412, None))", "EPERM"),
        ("print(call(9999))", "ENOSYS"),
    ],
)
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are those of x86_64")
def test_answers(code: str, answer: str) -> None:
    done = inside(code)
    assert done.stdout.strip() == answer, done.stderr


@pytest.mark.parametrize(
    ("family", "number"),
    [
        ("AF_UNIX", 0),
        ("AF_INET", 0),
        ("AF_INET6", 0),
        ("AF_NETLINK", errno.EINVAL),
        ("AF_PACKET", errno.EAFNOSUPPORT),
        ("AF_ALG", errno.EAFNOSUPPORT),
        ("AF_VSOCK", errno.EAFNOSUPPORT),
    ],
)
def test_socket_families(family: str, number: int) -> None:
    code = f"""
try:
    socket.socket(socket.{family}, socket.SOCK_DGRAM).close()
    print(0)
except OSError as error:
    print(error.errno)
"""
    assert inside(code).stdout.strip() == str(number)


@pytest.mark.parametrize("mode", [0o4755, 0o2755, 0o6777])
def test_no_set_uid_file(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    path.touch()
    for code in (
        f"os.chmod({str(path)!r}, {mode})",
        f"os.fchmod(os.open({str(path)!r}, os.O_RDWR), {mode})",
        f"os.open({str(path)!r} + '2', os.O_CREAT | os.O_WRONLY, {mode})",
        f"os.open({str(tmp_path)!r}, os.O_TMPFILE | os.O_WRONLY, {mode})",
    ):
        done = inside(code)
        assert "PermissionError" in done.stderr, code
    assert [entry.stat().st_mode & 0o7000 for entry in tmp_path.iterdir()] == [0]


def test_ordinary_modes_still_work(tmp_path: Path) -> None:
    done = inside(f"os.chmod({str(tmp_path)!r}, 0o1755); os.open({str(tmp_path / 'x')!r}, os.O_CREAT, 0o640)")
    assert done.stderr == ""
    assert (tmp_path / "x").exists()


def test_no_name_is_both_allowed_and_refused() -> None:
    assert not set(seccomp._ALLOWED) & set(seccomp._REFUSED)


def test_libseccomp_missing_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyseccomp", None)
    with pytest.raises(seccomp.SandboxError, match="libseccomp2") as caught:
        seccomp.compiled_filters.__wrapped__()
    assert caught.value.layer == "seccomp"


def test_a_foreign_architecture_is_killed() -> None:
    """The first instructions load the architecture and compare: a filter without that check could be walked around."""
    for program in seccomp.compiled_filters():
        code, _, _, offset = struct.unpack_from("HBBI", program)  # struct sock_filter
        assert (code, offset) == (0x20, 4)  # BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)
