# ruff: noqa: E501  # the probes are programs in strings
"""What only warm kernels have: a template, and what is the same in all that is forked from it."""

import json
import os
import secrets
import signal
from pathlib import Path
from typing import Any

import pytest

from attacks.harness import Attacker, eventually, marked

pytestmark = [pytest.mark.threat(63), pytest.mark.parametrize("start", ["warm"], indirect=True)]


def _said(end: dict[str, Any], cell: int = 0) -> Any:
    assert end["error"] is None, end["error"]
    assert end["report"]["start"] == "warm"
    return json.loads("".join(output.get("text", "") for output in end["outputs"][cell]) or "null")


_SEARCH = """
import json, re
def everything():
    for line in open("/proc/self/maps"):
        first, _, last = line.split()[0].partition("-")
        if line.split()[1][0] == "r" and "[v" not in line:
            yield int(first, 16), int(last, 16)
word = re.compile("".join("[" + letter + "]" for letter in reversed({word!r})).encode())  # nowhere in one piece
found, read = 0, 0
with open("/proc/self/mem", "rb", buffering=0) as memory:
    for first, last in everything():
        for at in range(first, last, 1 << 20):
            memory.seek(at)
            try: block = memory.read(min(1 << 20, last - at))
            except OSError: continue
            read += len(block)
            found += len(word.findall(block))
            del block
print(json.dumps([found, read > 1 << 24]))
"""


def test_no_memory_of_another_notebook_and_no_secret(attacker: Attacker) -> None:
    """The whole memory of a kernel, after another one that had a secret in its cells, files, and environment."""
    word = secrets.token_hex(12)
    keep = f"secret = {word!r}; open('left', 'w').write(secret)"
    search = _SEARCH.format(word=word[::-1])
    knows = f"import json; secret = {word!r}\n" + search
    # One after the other from the same template; the middle one shows that the search finds what is there.
    first, second, third = attacker.notebooks([keep], [knows], [search], files={"own": word}, fresh=True)
    assert _said(first) is None
    assert _said(second)[0] > 0
    assert _said(third) == [0, True]
    token = attacker.token
    (end,) = attacker.notebooks([_SEARCH.format(word=token[::-1])])
    assert _said(end) == [0, True]


def test_what_a_kernel_changes_stays_in_it(attacker: Attacker) -> None:
    """Modules, builtins, the shell, files in every writable place, signal handlers, limits, the working directory."""
    spoil = """
import builtins, json, os, resource, signal, sys, IPython.core.interactiveshell as shell
builtins.print_was, json.loads = print, None
shell.InteractiveShell.ask_exit = None
sys.path.insert(0, "/tmp"); sys.modules["antigravity"] = json
os.environ["SPOILT"] = "1"; os.umask(0); os.chdir("/tmp")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
for place in ("/tmp", "/dev/shm", os.path.expanduser("~")): open(place + "/spoilt", "w").close()
if os.fork() == 0:
    os.setsid()
    import time; time.sleep(600)
"""
    look = """
import builtins, json, os, resource, signal, sys
print(json.dumps([hasattr(builtins, "print_was") or json.loads is None, "/tmp" in sys.path, "antigravity" in sys.modules, "SPOILT" in os.environ,
    signal.getsignal(signal.SIGTERM) == signal.SIG_IGN, resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 20,
    any(os.path.exists(p + "/spoilt") for p in ("/tmp", "/dev/shm", os.path.expanduser("~"))), os.getcwd() == "/tmp"]))
"""
    _, end = attacker.notebooks([spoil], [look], fresh=True)
    assert _said(end) == [False] * 8


def test_random_numbers_differ(attacker: Attacker) -> None:
    """Of every generator that is seeded when it is imported, which was before the fork."""
    draw = """
import json, random, secrets, tempfile, uuid, os, ssl
numbers = [random.random(), secrets.token_hex(8), str(uuid.uuid4()), tempfile.mktemp(), os.urandom(8).hex(), ssl.RAND_bytes(8).hex()]
try:
    import numpy
    numbers += [float(numpy.random.random()), float(numpy.random.default_rng().random())]
except ImportError: pass
print(json.dumps(numbers))
"""
    ends = attacker.notebooks([draw], [draw], [draw], fresh=True, imports=["random", "tempfile", "uuid", "ssl"])
    drawn = [_said(end) for end in ends]
    for numbers in zip(*drawn, strict=True):
        assert len(set(numbers)) == len(drawn)


def _has_power_under_the_kernels_name(place: Path) -> bool:
    status = dict(line.split(":", 1) for line in place.joinpath("status").read_text().splitlines())
    return int(status["CapEff"], 16) != 0 and "isolate" not in place.joinpath("cmdline").read_text()


def test_descriptors_environment_and_command_line_of_a_template(attacker: Attacker, tmp_path: Path) -> None:
    """Seen from the host: nothing of a student and no secret in what the template's process is, or has open."""
    mark = secrets.token_hex(12)
    wait = "import time; print('up', flush=True); time.sleep(60)"
    running = attacker.start_code(wait, env={"MARK": mark}, files={"own": "x"}, limits={"wall_seconds": 50})
    running.hear("up")
    looked = 0
    for pid in marked(mark):
        place = Path(f"/proc/{pid}")
        seen = place.joinpath("environ").read_bytes() + place.joinpath("cmdline").read_bytes()
        assert attacker.token.encode() not in seen
        assert eventually(lambda place=place: not _has_power_under_the_kernels_name(place))  # a room's own helpers have
        links = [os.readlink(link) for link in place.joinpath("fd").iterdir()]
        assert not [link for link in links if str(attacker.directory) in link or link.startswith("/root")]
        looked += 1
    assert looked >= 2
    running.process.kill()
    assert eventually(lambda: not marked(mark))


@pytest.mark.parametrize("victim", ["template", "everything of the runner's"])
def test_kill_9_leaves_nothing(attacker: Attacker, victim: str) -> None:
    mark = secrets.token_hex(12)
    running = attacker.start_code("import time; print('up', flush=True); time.sleep(60)", env={"MARK": mark})
    running.hear("up")
    assert len(marked(mark)) >= 2
    for pid in marked(mark) if victim == "template" else [running.process.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    assert eventually(lambda: not marked(mark))
