"""Watch the host while hostile notebooks run, and compare it with what it was before.

It knows /proc, file systems and the outputs of notebooks, but not what a sandbox is.
"""

import contextlib
import hashlib
import os
import re
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import nbformat

MIB = 1024 * 1024
INTERVAL_SECONDS = 0.2


def memory_available() -> int:
    """What the kernel could still hand out, in bytes (proc_meminfo(5))."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 if found else 0


def mounts() -> set[str]:
    """The mount table as this process sees it."""
    return set(Path("/proc/self/mounts").read_text().splitlines())


def core_pattern() -> str:
    """What the host does with core dumps."""
    return Path("/proc/sys/kernel/core_pattern").read_text()


def marked_processes(marker: str) -> list[int]:
    """The living processes that carry the marker as their name or in their arguments; no zombies."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            state = Path("/proc", entry, "stat").read_text(errors="replace")
            arguments = Path("/proc", entry, "cmdline").read_bytes()
        except OSError:
            continue  # it has just ended
        name, rest = state[state.index("(") + 1 :].rsplit(")", 1)
        if rest.split()[0] not in "ZX" and (name == marker[:15] or marker.encode() in arguments):
            found.append(int(entry))
    return found


def survivors(marker: str, seconds: float = 2.0) -> list[int]:
    """The marked processes that are still there after a moment in which dying ones may finish."""
    end = time.monotonic() + seconds
    while (alive := marked_processes(marker)) and time.monotonic() < end:
        time.sleep(0.05)
    return alive


def fingerprint(paths: list[Path]) -> dict[str, str]:
    """Kind, mode, time and content of every file at or below paths, in one comparable line each."""
    result = {}
    for top in paths:
        for path in [top, *sorted(top.rglob("*"))]:
            facts = path.lstat()
            content = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(facts.st_mode) else ""
            changed = facts.st_mtime_ns if not stat.S_ISDIR(facts.st_mode) else 0
            result[str(path)] = f"{facts.st_mode:o} {changed} {content}"
    return result


def traces(folders: list[Path], marker: str) -> list[str]:
    """Symlinks, set-uid files, devices, and files named after the marker that lie below folders."""
    found = []
    for folder in folders:
        for path in folder.rglob("*"):
            mode = path.lstat().st_mode
            odd = not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
            setuid = stat.S_ISREG(mode) and mode & (stat.S_ISUID | stat.S_ISGID)
            if odd or setuid or marker in path.name:
                found.append(str(path))
    return found


def tries(notebook: Path) -> dict[str, str]:
    """What a hostile notebook says about each attempt: the `TRY name: outcome` lines of its outputs."""
    result = {}
    for cell in nbformat.read(notebook, as_version=4).cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                for line in output.text.splitlines():
                    if found := re.match(r"TRY ([^:]+): (.*)", line):
                        result[found[1]] = found[2]
    return result


def marked_files(root: Path, places: list[Path], marker: str) -> tuple[int, int]:
    """How many files bear the marker, below root or directly in one of the places, and their size in bytes."""
    count, size = 0, 0
    for top in [root, *places]:
        for folder, inner, names in os.walk(top):  # not pathlib: folders may vanish meanwhile
            if top != root and marker not in folder:
                inner[:] = [name for name in inner if marker in name]
            for name in names:
                if marker in name or marker in folder:
                    with contextlib.suppress(OSError):
                        count, size = count + 1, size + os.lstat(os.path.join(folder, name)).st_blocks * 512
    return count, size


@dataclass
class Watch:
    """A thread that samples memory, marked files and marked processes; the maxima are there when it ends."""

    marker: str
    root: Path
    places: list[Path]
    memory_taken: int = 0
    file_bytes: int = 0
    file_count: int = 0
    disk_taken: int = 0
    most_processes: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Watch":
        self._memory = memory_available()
        self._disks = {place: os.statvfs(place) for place in self.places}
        self._thread = ThreadPoolExecutor(1)
        self._sampling = self._thread.submit(self._sample)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.shutdown()
        self._sampling.result()  # a witness that fell asleep is no witness

    def _sample(self) -> None:
        while not self._stop.wait(INTERVAL_SECONDS):
            self.memory_taken = max(self.memory_taken, self._memory - memory_available())
            self.most_processes = max(self.most_processes, len(marked_processes(self.marker)))
            for place, before in self._disks.items():
                now = os.statvfs(place)
                self.disk_taken = max(self.disk_taken, (before.f_bfree - now.f_bfree) * now.f_frsize)
            count, size = marked_files(self.root, self.places, self.marker)
            self.file_count, self.file_bytes = max(self.file_count, count), max(self.file_bytes, size)
