# ruff: noqa: E501  # the probes are programs in strings
"""Rows 51 to 59: system calls that nobody in a sandbox needs."""

import pytest

from attacks.harness import Attacker, x86_64_only

# Name: number on x86_64, number on aarch64, arguments that would be accepted or fail late.
_CALLS = {
    51: {"add_key": (248, 217, 'b"user", b"x", b"y", 1, -4'), "keyctl": (250, 219, "0, -3, 1"),
         "request_key": (249, 218, 'b"user", b"x", None, -4')},
    52: {"bpf": (321, 280, "0, None, 0")},
    53: {"perf_event_open": (298, 241, "None, 0, -1, -1, 0"), "lookup_dcookie": (212, 18, "0, None, 0")},
    54: {"io_uring_setup": (425, 425, "4, None"), "io_uring_enter": (426, 426, "0, 0, 0, 0, None, 0"),
         "io_uring_register": (427, 427, "0, 0, None, 0")},
    55: {"userfaultfd": (323, 282, "1")},
    59: {"kexec_load": (246, 104, "0, 0, None, 0"), "kexec_file_load": (320, 294, "0, 0, 0, None, 0"),
         "init_module": (175, 105, "None, 0, None"), "finit_module": (313, 273, "0, b'', 0"),
         "delete_module": (176, 106, "b'x', 0"), "swapon": (167, 224, "b'/tmp', 0"), "swapoff": (168, 225, "b'/tmp'"),
         "reboot": (169, 142, "0xfee1dead, 672274793, 0, None"), "clock_settime": (227, 112, "0, None"),
         "settimeofday": (164, 170, "None, None"), "adjtimex": (159, 171, "None"), "clock_adjtime": (305, 266, "0, None"),
         "sethostname": (170, 161, "b'x', 1"), "setdomainname": (171, 162, "b'x', 1"), "acct": (163, 89, "None"),
         "syslog": (103, 116, "10, None, 0"), "quotactl": (179, 60, "0, None, 0, None"),
         "name_to_handle_at": (303, 264, "-100, b'/usr', None, None, 0"),
         "open_by_handle_at": (304, 265, "0, None, 0"), "fanotify_init": (300, 262, "0, 0"),
         "vhangup": (153, 58, ""), "nfsservctl": (180, 42, ""), "fsopen": (430, 430, "b'ext4', 0"),
         "landlock bypass openat2": (437, 437, "-100, b'/usr', None, 0")},
}  # fmt: skip


@pytest.mark.parametrize("row", [pytest.param(row, marks=pytest.mark.threat(row)) for row in _CALLS])
def test_calls_are_refused(attacker: Attacker, row: int) -> None:
    tries = [f"{n!r}: syscall(native({a}, {b}), {rest})" for n, (a, b, rest) in _CALLS[row].items()]
    said = attacker.run("say(**{" + ", ".join(tries) + "})").said
    assert set(said.values()) <= {"EPERM", "ENOSYS"}, said


@pytest.mark.threat(56)
def test_typing_into_a_terminal_is_refused(attacker: Attacker) -> None:
    """Also where only the low half of the request says so, which is all that the kernel reads."""
    said = attacker.run("""
import fcntl, pty
main, side = pty.openpty()
ioctl = native(16, 29)
requests = [r | high for r in (0x5412, 0x541c) for high in (0, 1 << 32, 0xffffffff << 32)]
say(**{hex(r): syscall(ioctl, side, r, b"x") for r in requests}, other=syscall(ioctl, side, 0x5413, b"\\0" * 8))
""").said
    assert said.pop("other") == "ok"  # the control: an ordinary request of a terminal works
    assert set(said.values()) == {"EPERM"}


# eax = number of getpid for i386 (20); int 0x80; ret. And: mov eax, 0x40000000 + 39 (x32); syscall; ret.
_FOREIGN = {"int 0x80": "b814000000cd80c3", "x32": "b8270000400f05c3", "x32 write": "b8010000400f05c3"}


@x86_64_only
@pytest.mark.threat(57)
@pytest.mark.parametrize("how", _FOREIGN)
def test_foreign_system_calls_kill(attacker: Attacker, how: str) -> None:
    code = """
import mmap
m = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=7)
m.write(bytes.fromhex(sys.argv[1]))
print("before", flush=True)
ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()
print("after", flush=True)
"""
    outcome = attacker.run(code, _FOREIGN[how])
    assert outcome.report is not None
    assert (outcome.report["ended"], outcome.report["signal"]) == ("signal", 31)
    assert "before" in outcome.output
    assert "after" not in outcome.output


@pytest.mark.threat(58)
def test_personality_cannot_be_changed(attacker: Attacker) -> None:
    said = attacker.run("""
number = native(135, 92)
flags = {"no randomisation": 0x40000, "read implies exec": 0x400000, "linux32": 8, "compat layout": 0x200000,
    "high": 1 << 32 | 0x40000, "zero page": 0x100000}
say(**{n: syscall(number, f) for n, f in flags.items()}, asking=syscall(number, 0xffffffff))
""").said
    assert said.pop("asking") == "ok"
    assert set(said.values()) <= {"EPERM", "ENOSYS"}


@pytest.mark.threat(26, 57)
def test_the_filter_holds_in_every_descendant(attacker: Attacker) -> None:
    """After execve, in a thread, in a child, by execveat of a file in memory, and with a filter of one's own."""
    said = attacker.run("""
import subprocess, threading
probe = "import os\\ntry: os.chroot('/')\\nexcept OSError as e: print(e.errno)"
results = {"exec": subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout.strip()}
def in_thread(): results["thread"] = attempt(os.chroot, "/")
thread = threading.Thread(target=in_thread); thread.start(); thread.join()
allow_all = (ctypes.c_uint64 * 1)(0x7fff000000000006)
class Program(ctypes.Structure): _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))
program = Program(1, ctypes.addressof(allow_all))
results["own filter"] = syscall(native(317, 277), 1, 0, ctypes.byref(program))
results["after it"] = attempt(os.chroot, "/")
results["strict off"] = "ok" if libc.prctl(22, 0) == 0 else "no"
say(**results)
""").said
    said.pop("own filter")
    assert said == {"exec": "1", "thread": "EPERM", "after it": "EPERM", "strict off": "no"}
