"""Rows 32 to 35: nothing of the host's network, and no socket family that has none to give."""

import contextlib
import os
import secrets
import socket
from collections.abc import Iterator

import pytest

from attacks.harness import Attacker


@contextlib.contextmanager
def _listener(kind: int = socket.SOCK_STREAM, address: str = "127.0.0.1") -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.bind((address, 0))
        if kind == socket.SOCK_STREAM:
            sock.listen()
        sock.settimeout(0.2)
        yield sock


def _own_address() -> str:
    """The address that this host has towards others, or its loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
        sock.connect(("192.0.2.1", 9))
        return str(sock.getsockname()[0])
    return "127.0.0.1"


_CONNECT = """
import socket
tried = {}
for target in sys.argv[1:]:
    host, port = target.rsplit(":", 1)
    for name, kind in (("tcp", socket.SOCK_STREAM), ("udp", socket.SOCK_DGRAM)):
        sock = socket.socket(socket.AF_INET, kind)
        sock.settimeout(1)
        def call():
            sock.connect((host, int(port)))
            sock.send(b"hello")
        tried[f"{name} {target}"] = attempt(call)
say(**tried)
"""


@pytest.mark.threat(32, 33)
@pytest.mark.parametrize("where", ["loopback", "own address"])
def test_services_of_the_host_are_out_of_reach(attacker: Attacker, where: str) -> None:
    """Judged by listeners on the host, which the control does reach."""
    address = "127.0.0.1" if where == "loopback" else _own_address()
    with _listener(address=address) as tcp, _listener(socket.SOCK_DGRAM, address) as udp:
        targets = [f"{address}:{sock.getsockname()[1]}" for sock in (tcp, udp)]
        assert attacker.control(_CONNECT, *targets)[f"tcp {targets[0]}"] == "ok"
        assert tcp.accept()
        assert udp.recv(16)
        said = attacker.run(_CONNECT, *targets).said
        with pytest.raises(TimeoutError):
            tcp.accept()
        with pytest.raises(TimeoutError):
            udp.recv(16)
    assert said[f"tcp {targets[0]}"] in {"ECONNREFUSED", "ENETUNREACH"}


@pytest.mark.threat(32)
def test_the_world_is_unreachable(attacker: Attacker) -> None:
    said = attacker.run(
        _CONNECT + "say(**tried, dns=attempt(socket.getaddrinfo, 'example.org', 80), "
        "links=[name for _, name in socket.if_nameindex()] if 0 else open('/proc/self/net/dev').read())",
        "192.0.2.1:80", "169.254.169.254:80", "1.1.1.1:53", "255.255.255.255:67", "224.0.0.1:5353",
    ).said  # fmt: skip
    links = {line.split(":")[0].strip() for line in said.pop("links").splitlines()[2:]}
    assert links <= {"lo", "sit0", "tunl0", "ip6tnl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "ip6gre0"}
    assert said.pop("dns") != "ok"
    assert set(said.values()) <= {"ENETUNREACH", "EACCES", "EPERM"}, said


@pytest.mark.threat(34)
def test_abstract_sockets_of_the_host_are_out_of_reach(attacker: Attacker) -> None:
    name = "attack-" + secrets.token_hex(8)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0" + name)
        listener.listen()
        probe = "import socket; say(it=attempt(socket.socket(socket.AF_UNIX).connect, '\\0' + sys.argv[1]))"
        assert attacker.control(probe, name)["it"] == "ok"
        assert attacker.run(probe, name).said["it"] == "ECONNREFUSED"


@pytest.mark.threat(34)
def test_socket_families_and_raw_sockets_are_denied(attacker: Attacker) -> None:
    said = attacker.run("""
import socket
families = {}
for family in range(64):
    for high in (0, 1 << 32):
        if family in (1, 2, 10) and not high:
            continue
        for kind in (1, 2, 3, 5):
            answer = syscall(native(41, 198), family | high, kind, 0)
            families.setdefault(answer, []).append(family | high)
raw = [attempt(socket.socket, f, socket.SOCK_RAW, p) for f in (2, 10) for p in (1, 6, 255)]
raw += [attempt(socket.socket, f, socket.SOCK_DGRAM, p) for f, p in ((2, 1), (10, 58))]
say(families=families, raw=raw)
""").said
    assert set(said["families"]) <= {"EAFNOSUPPORT", "EINVAL", "ENOSYS", "EPERM"}, said["families"]
    assert set(said["raw"]) <= {"EPERM", "EACCES", "EPROTONOSUPPORT"}


@pytest.mark.threat(34)
def test_socketpair_gives_unix_sockets_only(attacker: Attacker) -> None:
    """socketpair(2) makes a socket of any family before it says that pairs are not supported."""
    said = attacker.run("""
families = {}
fds = (ctypes.c_int * 2)()
for family in (2, 4, 5, 9, 10, 15, 16, 17, 21, 29, 30, 31, 35, 38, 40, 41, 43, 44, 45):
    for kind in (1, 2, 3, 5):
        answer = syscall(native(53, 199), family, kind, 0, ctypes.byref(fds))
        families.setdefault(answer, []).append((family, kind))
say(**families)
""").said
    # EOPNOTSUPP and ESOCKTNOSUPPORT come from the family itself: its code ran, its module was loaded
    assert set(said) <= {"EPERM", "EAFNOSUPPORT", "ENOSYS", "EINVAL"}, said


@pytest.mark.threat(34)
def test_odd_inet_protocols_load_no_module(attacker: Attacker) -> None:
    """Any socket(AF_INET, ..., protocol) asks the host to load net-pf-2-proto-N: SCTP, DCCP, UDP-Lite, L2TP, SMC."""
    if not os.path.exists("/proc/modules"):
        pytest.skip("this host's kernel has no modules to load")
    with open("/proc/modules", encoding="ascii") as file:
        before = {line.split()[0] for line in file}
    said = attacker.run("""
tried = {}
for protocol in (33, 115, 132, 136, 256, 262):
    for family in (2, 10):
        for kind in (1, 2, 5, 6):
            answer = syscall(native(41, 198), family, kind, protocol)
            if answer == "ok":
                tried[f"{family} {kind} {protocol}"] = answer
say(**tried)
""").said
    with open("/proc/modules", encoding="ascii") as file:
        loaded = {line.split()[0] for line in file} - before
    assert not loaded & {"sctp", "dccp", "l2tp_ip", "smc", "tipc"}
    assert {name.split()[2] for name in said} <= {"136", "262"} if said else True


@pytest.mark.threat(33)
def test_two_rooms_have_two_loopbacks(attacker: Attacker) -> None:
    server = attacker.start_code(
        "import socket\ns = socket.create_server(('127.0.0.1', 45678)); print('up', flush=True); time.sleep(60)"
    )
    server.hear("up")
    assert attacker.run(_CONNECT, "127.0.0.1:45678").said["tcp 127.0.0.1:45678"] == "ECONNREFUSED"


@pytest.mark.threat(34)
def test_network_cannot_be_configured(attacker: Attacker) -> None:
    said = attacker.run("""
import fcntl, socket, struct
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
tries = {hex(request): attempt(fcntl.ioctl, sock, request, struct.pack("16sH22x", b"lo", 0))
    for request in (0x8914, 0x8916, 0x8922, 0x8924, 0x89a0, 0x8946)}
tries["bind device"] = attempt(sock.setsockopt, socket.SOL_SOCKET, 25, b"lo\\0")
tries["mark"] = attempt(sock.setsockopt, socket.SOL_SOCKET, 36, 1)
tries["iptables"] = attempt(sock.setsockopt, 0, 64, b"\\0" * 96)
tries["iptables get"] = attempt(sock.getsockopt, 0, 64, 96)
say(**tries)
""").said
    said.pop("bind device")
    assert "ok" not in set(said.values()), said
