"""What sandboxes leave on the host, whatever they do and however they end: nothing. `make soak` is the long form."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from attacks.harness import Attacker, Person

SOAK = Path(__file__).with_name("soak.py")
pytestmark = pytest.mark.slow


@pytest.fixture
def soaked(attacker: Attacker, person: Person) -> dict[str, Any]:
    """The counts before and after, of a process of this person's."""
    program = attacker.write(attacker.directory / "soak.py", SOAK.read_text(encoding="utf-8"))
    done = subprocess.run(
        [attacker.python, "-P", program, "--sandboxes", "60", "--json"],
        cwd=attacker.temporary,
        env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": str(person.home)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        **person.credentials(),
    )
    assert done.stdout, done.stderr[-3000:]
    counts: dict[str, Any] = json.loads(done.stdout)
    return counts


def test_the_numbers_are_those_it_began_with(soaked: dict[str, Any]) -> None:
    assert soaked["wrong"] == []
    assert soaked["left"] == {}
    for name, before in soaked["before"].items():
        if name.startswith(("descriptors", "processes", "zombies", "threads", "temporary files", "mounts, ours")):
            assert soaked["after"][name] == before, name
    assert soaked["growth_bytes"] < 8 << 20
    assert sum(soaked["done"].values()) == 60
    assert {"ended", "wall limit", "launcher killed", "supervisor killed", "notebook"} <= set(soaked["done"])


@pytest.mark.parametrize(
    ("leak", "name"),
    [
        ("os.open('/dev/null', os.O_RDONLY)", "descriptors"),
        ("subprocess.Popen(['sleep', '60'])", "processes"),
        ("os.posix_spawn('/bin/true', ['true'], {}) and time.sleep(0.2)", "zombies"),
        ("os.mkdir(tempfile.gettempdir() + '/left')", "temporary files"),
        ("Path('/dev/shm/isolate-left').touch()", "files in /tmp, /var/tmp, /dev/shm, /run"),
        ("globals().update(kept=socket.socket(socket.AF_UNIX)) or kept.bind('\\0isolate-left')", "abstract sockets"),
        ("threading.Thread(target=time.sleep, args=(60,), daemon=True).start()", "threads"),
    ],
)
def test_a_leak_is_seen(leak: str, name: str, tmp_path: Path) -> None:
    """Each count can fail."""
    program = (
        "import os, socket, subprocess, sys, tempfile, threading, time\nfrom pathlib import Path\n"
        f"sys.path.insert(0, {str(SOAK.parent)!r})\nimport soak\nsoak._PATIENCE_SECONDS = 0.5\n"
        f"tempfile.tempdir = {str(tmp_path)!r}\nbefore = soak.Census.take()\n{leak}\n"
        "try:\n    print(sorted(soak._left(before)[1]))\n"
        "finally:\n    Path('/dev/shm/isolate-left').unlink(missing_ok=True)\n"
        "    [os.kill(child, 9) for child in soak._children()]\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert name in done.stdout, done.stdout + done.stderr
