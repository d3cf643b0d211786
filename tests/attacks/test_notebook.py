# ruff: noqa: E501  # the probes are programs in strings
"""Rows where two rooms matter: the student's kernel in one, the driver that speaks with it in the other."""

import secrets
import socket
import time
from typing import Any

import pytest

from attacks.harness import Attacker, eventually, marked, mostly_as_user

MIB = 1 << 20


def _text(end: dict[str, Any], cell: int) -> str:
    """What a cell has printed, and the names of its errors."""
    assert end["error"] is None, end["error"]
    parts = []
    for output in end["outputs"][cell]:
        parts += [output.get("text", ""), output.get("ename", ""), str(output.get("data", {}).get("text/plain", ""))]
    return " ".join(parts)


def _ended(end: dict[str, Any], cell: int) -> str:
    assert end["error"] is None, end["error"]
    return str(end["report"]["cells"][str(cell)])


@pytest.mark.threat(13)
def test_cells_that_have_not_run_are_nowhere(attacker: Attacker) -> None:
    """A walk through all files of the kernel's room, before the hidden test is sent."""
    hidden = "hidden" + secrets.token_hex(8)
    search = f"""
import os
word = {hidden[::-1]!r}[::-1].encode()
found, read = [], 0
for where, directories, names in os.walk("/"):
    if where.startswith(("/usr", {str(attacker.python.parent.parent)!r})):
        directories.clear(); continue
    for name in names:
        path = os.path.join(where, name)
        if os.path.isfile(path) and not os.path.islink(path):
            try:
                with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                    read += 1
                    if word in file.read(1 << 20): found.append(path)
            except OSError: pass
"""
    (end,) = attacker.notebooks([search + "\nprint(found, read > 20)", f"assert {hidden!r}"])
    assert _text(end, 0).strip() == "[] True"


@pytest.mark.threat(5, 8, 10)
def test_the_kernel_room_sees_nothing_of_the_driver_or_the_host(attacker: Attacker) -> None:
    (end,) = attacker.notebooks(["""
import glob, os
everything = ""
for path in glob.glob("/proc/*/environ") + glob.glob("/proc/*/cmdline") + glob.glob("/proc/*/mountinfo"):
    try:
        everything += open(path, errors="replace").read()
    except OSError:
        pass
few = len([p for p in os.listdir("/proc") if p.isdecimal()]) < 4
print("driver" in everything, os.environ.get("JUPYTERHUB_API_TOKEN"), few)
print(sorted(os.listdir("/run/kernel")))
print([t for t in glob.glob("/proc/*/fd/*") if "driver" in os.path.realpath(t)])
"""])  # fmt: skip
    text = _text(end, 0)
    assert "False None True" in text
    assert attacker.token not in text
    assert "[]" in text


@pytest.mark.threat(24)
def test_a_daemon_of_a_cell_is_gone_with_the_notebook(attacker: Attacker) -> None:
    mark = secrets.token_hex(12)
    (end,) = attacker.notebooks(
        [
            f"""
import subprocess, sys
for i in range(3):
    subprocess.Popen([sys.executable, "-c", "import os, time; os.setsid(); os.fork(); time.sleep(300)", {mark!r}],
        start_new_session=True, close_fds=False)
print("started")
"""
        ]
    )
    assert "started" in _text(end, 0)
    assert eventually(lambda: not marked(mark), 5)


@pytest.mark.threat(29)
def test_a_cell_that_ignores_interrupts_is_killed_and_named(attacker: Attacker) -> None:
    cell = """
import signal, time
for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)
while True: time.sleep(1)
"""
    (end,) = attacker.notebooks(["1", cell, "2"], settings={"timeout": 1})
    assert _ended(end, 0) == "ok"
    assert _ended(end, 1) == "stuck"
    assert "CellTimeoutError" in _text(end, 1)
    assert _ended(end, 2) == "not run"
    assert "NotRunError" in _text(end, 2)
    assert "timeout" in end["report"]["limits"]


@pytest.mark.threat(30)
@pytest.mark.parametrize("how", ["os._exit(0)", "ctypes.string_at(0)", "os.kill(os.getpid(), 9)", "os.abort()"])
def test_a_kernel_that_ends_fails_that_cell_and_the_rest(attacker: Attacker, how: str) -> None:
    (end,) = attacker.notebooks(["1", f"import ctypes, os; {how}", "2"])
    assert _ended(end, 0) == "ok"
    assert _ended(end, 1) == "kernel died"
    assert "KernelDiedError" in _text(end, 1)
    assert "NotRunError" in _text(end, 2)


@pytest.mark.threat("30a")
def test_a_cell_cannot_kill_what_started_its_kernel(attacker: Attacker) -> None:
    cell = """
import os
for pid in (os.getppid(), 1):
    for number in (15, 2, 9, 19):
        try:
            os.kill(pid, number)  # Landlock answers EPERM; without it an init takes no notice
        except PermissionError:
            pass
print("sent")
"""
    (end,) = attacker.notebooks([cell, "print('alive')"])
    assert "sent" in _text(end, 0)
    assert "alive" in _text(end, 1)


@pytest.mark.threat(31)
def test_killed_supervisor_takes_both_rooms(attacker: Attacker) -> None:
    mark = secrets.token_hex(12)
    running = attacker.start(
        [], notebooks=[["import os, time\nif os.fork() == 0: os.setsid()\ntime.sleep(300)"]], env={"MARK": mark}
    )
    assert eventually(lambda: len(marked(mark)) >= 2, 30)
    running.process.kill()
    running.process.wait()
    assert eventually(lambda: not marked(mark), 5)


@pytest.mark.threat(33)
def test_a_cell_cannot_reach_services_of_the_host(attacker: Attacker) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        (end,) = attacker.notebooks([f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"])
        with pytest.raises(TimeoutError):
            server.accept()
    assert "ConnectionRefusedError" in _text(end, 0)


_FLOODS = {
    "print": "while True: print('x' * 10000)",
    "lines": "import os\nwhile True: os.write(1, b'y\\n' * 1000); print('y')",
    "display": "from IPython.display import display\nwhile True: display('x' * 10000)",
    "update": "from IPython.display import display\nh = display(1, display_id=True)\nwhile True: h.update('x' * 10000)",
    "clear": "from IPython.display import clear_output\nwhile True: clear_output(); print('x' * 1000)",
    "errors": "import sys\nwhile True: print('x' * 10000, file=sys.stderr)",
    "one message": "print('x' * 300_000_000)",
    "one display": "from IPython.display import display\ndisplay({'text/plain': 'x' * 100_000_000}, raw=True)",
    "stdout of the process": "import os\nwhile True: os.write(2, b'x' * 65536); os.system('head -c 1000000 /dev/zero')",
}


def _peak_of(pid: int) -> int:
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


@pytest.mark.threat(47, 48, 49)
@mostly_as_user("how", _FLOODS, "print", "display", "one message")
def test_a_flood_is_cut_and_the_supervisor_stays_small(attacker: Attacker, how: str) -> None:
    running = attacker.start(
        [],
        notebooks=[[_FLOODS[how], "print('after')"]],
        settings={"timeout": 1},
        limits={"wall_seconds": 30, "cell_output_bytes": MIB, "output_bytes": 2 * MIB, "memory_bytes": 3 << 30},
    )
    peak = 0
    while running.process.poll() is None:
        try:
            peak = max(peak, _peak_of(running.process.pid))
        except (OSError, StopIteration):
            break
        eventually(lambda: running.process.poll() is not None, 0.1)
    (end,) = running.finish(90)["notebooks"]
    assert end["error"] is None, end["error"]
    assert len(str(end["outputs"])) < 8 * MIB
    assert 10 * MIB < peak < 250 * MIB
    assert _ended(end, 0) in {"ok", "timeout", "stuck", "iopub timeout", "kernel died", "not run"}
    if how not in {"stdout of the process", "one message", "one display", "clear"}:
        assert set(end["report"]["limits"]) & {"output", "timeout"}


# One line each that makes the kernel's own messages break a rule. All are the student's doing, so the notebook
# has an outcome: never an error that says the host is at fault.
_ODD = {
    "negative count": "get_ipython().execution_count = -5",
    "huge count": "get_ipython().execution_count = 10**30",
    "text count": "get_ipython().execution_count = 'x'",
    "data is a number": "display({'text/plain': 5}, raw=True)",
    "data is a list": "display({'text/plain': [1, [2]]}, raw=True)",
    "data is null": "display({'image/png': None}, raw=True)",
    "json with nan": "display({'application/json': float('nan')}, raw=True)",
    "deep json": "x = []\nfor _ in range(300): x = [x]\ndisplay({'application/json': x}, raw=True)",
    "metadata is odd": "get_ipython().display_pub.publish({'text/plain': 'x'}, metadata={'a': {'b': [None]}})",
    "surrogates": "print('\\ud800'); display({'text/html': '\\udfff'}, raw=True)",
    "error without traceback": "get_ipython()._showtraceback = lambda *a: None\n1/0",
    "odd error name": "class E(Exception): pass\nE.__name__ = 'x\\ud800'\nraise E('\\x00' * 9)",
    "error is odd": "k = get_ipython().kernel\nk.session.send(k.iopub_socket, 'error', {'ename': 5, 'evalue': None,"
    " 'traceback': 'abc'}, parent=k.get_parent())",
    "error lacks all": "k = get_ipython().kernel\nk.session.send(k.iopub_socket, 'error', {}, parent=k.get_parent())",
    "stream is odd": "k = get_ipython().kernel\nk.session.send(k.iopub_socket, 'stream', {'name': 7, 'text': ['a']},"
    " parent=k.get_parent())",
    "result is odd": "k = get_ipython().kernel\nk.session.send(k.iopub_socket, 'execute_result', {'data': {}, 'metadata':"
    " 4, 'execution_count': 1.5}, parent=k.get_parent())",
    "status is odd": "k = get_ipython().kernel\nk.session.send(k.iopub_socket, 'status', {'execution_state': []},"
    " parent=k.get_parent())",
    "unknown type": "k = get_ipython().kernel\nk.session.send(k.iopub_socket, 'x' * 1000, {'a': 1}, parent=k.get_parent())",
    "widget state": "k = get_ipython().kernel\nk.session.send(k.iopub_socket, 'comm_open', {'comm_id': 'a', 'target_name':"
    " 'jupyter.widget', 'data': {'state': {'_model_name': 5, 'x': None}}}, parent=k.get_parent())",
    "comm is odd": "k = get_ipython().kernel\nk.session.send(k.iopub_socket, 'comm_open', {'comm_id': ['a'], 'data': 3},"
    " parent=k.get_parent())",
    "garbage frames": "k = get_ipython().kernel\nk.iopub_socket.send_multipart([b'\\xff'] * 9)",
    "no frames": "k = get_ipython().kernel\nk.iopub_socket.send_multipart([b''])",
    "reply is odd": "k = get_ipython().kernel\nold = k.do_execute\nasync def new(*a, **b):\n    await old(*a, **b)\n"
    "    return {'status': 5, 'execution_count': {}, 'payload': 7}\nk.do_execute = new",
    "reply is a list": "k = get_ipython().kernel\nold = k.do_execute\nasync def new(*a, **b):\n    await old(*a, **b)\n"
    "    return [1]\nk.do_execute = new",
    "reply error is odd": "k = get_ipython().kernel\nold = k.do_execute\nasync def new(*a, **b):\n    await old(*a, **b)\n"
    "    return {'status': 'error', 'ename': [], 'evalue': {}, 'traceback': 3}\nk.do_execute = new",
    "closed sockets": "get_ipython().kernel.iopub_socket.close()",
    "unlinked sockets": "import glob, os\nfor p in glob.glob('/run/kernel/*'): os.unlink(p)",
    "filled socket directory": "import os\ntry:\n    open('/run/kernel/x', 'wb').write(b'x' * (1 << 20))\nexcept OSError: pass\n"
    "try:\n    for i in range(99): open(f'/run/kernel/{i}', 'w').close()\nexcept OSError: print('full')",
}  # fmt: skip


@pytest.mark.threat(20, 30, 68)
@mostly_as_user("how", _ODD, "negative count", "filled socket directory")
def test_messages_that_break_the_rules_are_the_students_failure(attacker: Attacker, how: str) -> None:
    source = "from IPython.display import display\n" + _ODD[how]
    (end,) = attacker.notebooks(["print('before')", source, "assert 0", "1"], settings={"timeout": 3})
    assert end["error"] is None, end["error"]
    assert "before" in _text(end, 0)
    # The failing cell after it must not look good, whatever happened to the messages.
    failed = any(output["output_type"] == "error" for output in end["outputs"][2])
    forged = how.startswith(("reply", "closed", "garbage"))
    assert failed or _ended(end, 2) != "ok" or forged, end


_KERNELS = {
    "exits": "sys.exit(3)",
    "sleeps": "time.sleep(100)",
    "floods stderr": "while True: os.write(2, b'x' * 65536)",
    "garbage socket": """
import socket
kept = []
for name in range(1, 6):
    s = socket.socket(socket.AF_UNIX); s.bind(f"/run/kernel/k-{name}"); s.listen(); kept.append(s)
while True:
    c, _ = kept[0].accept()
    try:
        while True: c.send(os.urandom(65536))
    except OSError: pass
""",
    "links for sockets": "for n in range(1, 6): os.symlink('/proc/self/fd/0', f'/run/kernel/k-{n}')\ntime.sleep(100)",
}


@pytest.mark.threat(20, 30)
@mostly_as_user("how", _KERNELS, "exits")
def test_a_kernel_that_never_starts_is_an_error_within_bounds(attacker: Attacker, how: str) -> None:
    kernel = attacker.python_argv(_KERNELS[how], "{connection_file}")
    started = time.monotonic()
    (end,) = attacker.notebooks(["1"], kernel=kernel, settings={"startup_timeout": 3})
    assert end["error"] is not None
    assert end["error"]["layer"] == "kernel"
    assert time.monotonic() - started < 30  # the start has a limit of 3 s, the room one of 60 s


# A kernel of our own that answers as it likes; `FORGE` is what it does with the first execute request.
_FORGER = """
import zmq
from jupyter_client.session import Session
info = json.load(open(sys.argv[1]))
session = Session(key=info["key"].encode())
context = zmq.Context()
def bind(name, kind):
    sock = context.socket(kind)
    sock.sndhwm = 0
    sock.bind(f"ipc://{info['ip']}-{info[name + '_port']}")
    return sock
shell, iopub, control = bind("shell", zmq.ROUTER), bind("iopub", zmq.PUB), bind("control", zmq.ROUTER)
def tell(kind, content, parent): session.send(iopub, kind, content, parent=parent)
while True:
    idents, message = session.recv(shell, mode=0)
    kind = message["header"]["msg_type"]
    tell("status", {"execution_state": "busy"}, message)
    if kind == "kernel_info_request":
        content = {"status": "ok", "protocol_version": "5.3", "language_info": LANGUAGE}
        session.send(shell, "kernel_info_reply", content, parent=message, ident=idents)
    elif kind == "execute_request":
        FORGE
        session.send(shell, "execute_reply", {"status": "ok", "execution_count": 1}, parent=message, ident=idents)
    tell("status", {"execution_state": "idle"}, message)
"""
_FORGERIES = {
    "honest": ("{'name': 'x'}", "pass"),
    "odd language": ("{'name': 'x', 'pygments_lexer': 5, 'codemirror_mode': [3]}", "pass"),
    "no language": ("5", "pass"),
    "large messages on shell": (
        "{'name': 'x'}",
        "[shell.send_multipart([idents[0], b'x' * 15_000_000]) for _ in range(40)]",
    ),
    "many frames": (
        "{'name': 'x'}",
        "[iopub.send(b'x' * 8_000_000, zmq.SNDMORE if n < 70 else 0) for n in range(71)]",
    ),
    "many outputs": (
        "{'name': 'x'}",
        "[tell('stream', {'name': 'stdout' if n % 2 else 'stderr', 'text': ''}, message) for n in range(105_000)]",
    ),
    "many displays": (
        "{'name': 'x'}",
        "[tell('display_data', {'data': {}, 'metadata': {}}, message) for n in range(105_000)]",
    ),
    "no reply": ("{'name': 'x'}", "continue"),
    "end": ("{'name': 'x'}", "os._exit(1)"),
}


@pytest.mark.threat(30, 49, 68)
@mostly_as_user("how", _FORGERIES, "honest")
def test_a_hostile_kernel_ends_as_the_students_failure(attacker: Attacker, how: str) -> None:
    language, forge = _FORGERIES[how]
    kernel = attacker.python_argv(_FORGER.replace("LANGUAGE", language).replace("FORGE", forge), "{connection_file}")
    (end,) = attacker.notebooks(
        ["1", "2"],
        kernel=kernel,
        settings={"timeout": 5, "startup_timeout": 20},
        limits={"cell_output_bytes": MIB, "output_bytes": 2 * MIB, "memory_bytes": 3 << 30, "wall_seconds": 40},
    )
    assert end["error"] is None, end["error"]


_LEFT = {
    "one sparse file": "import os\nos.truncate(os.open('s', 66, 0o600), (8 << 20) - 1)",
    "rounding": "import os\nfor n in range(2000): os.truncate(os.open(f's{n}', 66, 0o600), 4000)",
    "inodes": "import os\nfor n in range(9000): os.close(os.open(f's{n}', 66, 0o600))",
    "work is a link": "import os\nos.chdir('/')\nos.rename('/home/student/work', '/home/student/w')\n"
    "os.symlink('/usr/share', '/home/student/work')",
    "deep": "import os\nfor _ in range(3000): os.mkdir('d'); os.chdir('d')",
}


@pytest.mark.threat(20, 39, 40)
@mostly_as_user("leave", _LEFT, "one sparse file")
def test_what_one_notebook_leaves_does_not_stop_the_next(attacker: Attacker, leave: str) -> None:
    ends = attacker.notebooks([_LEFT[leave]], ["print('second')"], limits={"files_bytes": 8 * MIB, "files_count": 3000})
    assert [end["error"] for end in ends] == [None, None]
    assert "second" in _text(ends[1], 0) or "Error" in _text(ends[1], 0)


@pytest.mark.threat(67)
@pytest.mark.parametrize(
    "name", ["ipykernel_launcher.py", "ipykernel/__init__.py", "zmq.py", "json.py", "sitecustomize.py"]
)
def test_files_beside_the_notebook_do_not_replace_the_kernel(attacker: Attacker, name: str) -> None:
    """`python -m ipykernel_launcher` looks into the working directory first."""
    files = {name: "import os\nos.write(2, b'taken over')\nos._exit(7)\n"}
    (end,) = attacker.notebooks(["print('fine')"], files=files)
    assert end["error"] is None, end["error"]
    assert "fine" in _text(end, 0)


@pytest.mark.threat(6, 8)
def test_two_kernels_of_one_person_at_once_do_not_meet(attacker: Attacker) -> None:
    mark = secrets.token_hex(12)
    cell = f"import os, time\nopen('/tmp/{mark}', 'w').close(); open('/dev/shm/{mark}', 'w').close(); time.sleep(20)"
    attacker.start([], notebooks=[[cell]], env={"MARK": mark})
    assert eventually(lambda: len(marked(mark)) >= 1, 30)
    (end,) = attacker.notebooks([f"import os; print(any(os.path.exists(p + '/{mark}') for p in ('/tmp', '/dev/shm')))"])
    assert _text(end, 0).strip() == "False"
