"""Judge the hostile notebooks: what each attempt says, next to what was seen from outside.

What a hostile notebook says counts only against the sandbox (it may boast of a success that nobody else can
see, such as a name lookup); that an attempt failed is believed only where the outside agrees.
"""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from canaries import Canaries
from classroom import Classroom
from submissions import STUDENTS, Student
from witness import MIB, Watch, core_pattern, fingerprint, mounts, survivors, traces, tries

# Between what a well-behaved run takes and what the attacks reach for. Files and processes are told apart by
# their names; memory and disks are those of the whole machine, where others may be at work too.
MEMORY_BOUND, DISK_BOUND = 3584 * MIB, 4096 * MIB
FILE_BOUND, COUNT_BOUND, PROCESS_BOUND = 300 * MIB, 30_000, 290


@dataclass(frozen=True)
class Seen:
    """One observation from outside: which attempts it judges, what was seen, and whether the wall held."""

    attempts: tuple[str, ...]
    text: str
    held: bool


@dataclass(frozen=True)
class Row:
    """One line of the second table."""

    notebook: str
    attempt: str
    said: str
    seen: str
    held: bool


class Judge:
    """Takes the host's picture before the hostile notebooks run, and compares afterwards."""

    def __init__(self, room: Classroom, canaries: Canaries) -> None:
        self.room, self.canaries = room, canaries
        self.precious = [
            *(room.course / name for name in ("source", "submitted", "nbgrader_config.py", "tutors.txt")),
            *(room.root / "exchange" / "pyscience" / name for name in ("inbound", "outbound")),
            canaries.home_file,
            canaries.target,
        ]
        self.files = fingerprint(self.precious)
        self.mounts, self.core_pattern = mounts(), core_pattern()
        self.seen: list[Seen] = []

    def note(self, text: str, held: bool, *attempts: str) -> None:
        """Add an observation about the attempts whose names begin so."""
        self.seen.append(Seen(attempts, text, held))

    def look(self, watch: Watch) -> None:
        """Observe everything once, right after the hostile notebooks have been graded."""
        self._look_for_processes(watch)
        self._look_for_tokens()
        self._look_for_hidden_tests()
        self._listen()
        self._look_at_resources(watch)
        self._look_at_the_host()
        self._look_at_the_gradebook()

    def _look_for_processes(self, watch: Watch) -> None:
        alive = survivors(self.canaries.marker)
        self.note(f"{len(alive)} alive after the job", not alive, "daemon", "program in a session")
        most = watch.most_processes
        self.note(f"at most {most} at a time", most < PROCESS_BOUND, "fork bomb")

    def _look_for_tokens(self) -> None:
        folders = [self.room.course / name for name in ("autograded", "feedback")]
        places = self.canaries.found([*folders, self.room.root / "exchange" / "pyscience" / "feedback"])
        said = " ".join(line for student in hostile() for _, _, line in self._tries(student))
        if self.canaries.tokens["hidden"] in said:
            places["hidden"].append("what a hostile notebook printed before the tests ran")
        attempts = {
            "environment": ("own environment", "environments", "initial environment"),
            "submission": ("read submission", "read autograded notebook of aino"),
            "hidden": ("read source", "read autograded notebook with", "hidden tests"),
            "gradebook": ("read gradebook.db",),
            "tutors": ("read file beside",),
            "home": ("read home", "root of process 1", "double chroot"),
            "config": ("read nbgrader_config.py",),
        }
        for name, judged in attempts.items():
            leaks = places[name]
            self.note(f"token in {', '.join(leaks[:2])}" if leaks else "token nowhere", not leaks, *judged)
        leaks = sorted(name for name, found in places.items() if found)
        self.note(f"leaked: {', '.join(leaks)}" if leaks else "no token anywhere", not leaks, "walk for tokens")

    def _look_for_hidden_tests(self) -> None:
        """A hook sees a test while it runs; it must not tell the student more than everybody's feedback does."""
        feedback = self.room.course / "feedback"
        pages = [feedback / student / "ps1/functions.html" for student in ("dana", "mallory-reads")]
        if not all(page.exists() for page in pages):
            self.note("no feedback to look at", False, "hook that prints")
            return
        usual, attackers = (page.read_text() for page in pages)
        shown, told = self.canaries.tokens["hidden"] in usual, "SEEN" in attackers
        where = "in everybody's feedback" if shown else "in the attacker's feedback" if told else "in no feedback"
        self.note(f"hidden tests: {where}", shown or not told, "hook that prints")

    def _listen(self) -> None:
        names = {"tcp": "TCP", "udp": "UDP", "abstract": "abstract Unix", "unix": "Unix socket by path"}
        for ear, attempt in names.items():
            heard = self.canaries.ears[ear].heard
            self.note(f"heard {heard} times", heard == 0, attempt)

    def _look_at_resources(self, watch: Watch) -> None:
        self.note(
            f"host gave at most {watch.memory_taken // MIB} MiB",
            watch.memory_taken < MEMORY_BOUND,
            *("4 GiB", "256 MiB", "SysV"),
        )
        disk = f"on the host: {watch.file_bytes // MIB} MiB, disks grew {watch.disk_taken // MIB} MiB"
        held = watch.file_bytes < FILE_BOUND and watch.disk_taken < DISK_BOUND
        self.note(disk, held, "fill /", "fill the work", "a sparse file")
        text = f"on the host: {watch.file_count} files"
        self.note(text, watch.file_count < COUNT_BOUND, "fill inodes")

    def _look_at_the_host(self) -> None:
        left = mounts() - self.mounts
        self.note(f"{len(left)} mounts left", not left, "mount a", "remount", "nested", "enter the")
        same = core_pattern() == self.core_pattern
        self.note("unchanged" if same else "changed", same, "core_pattern")
        now = fingerprint(self.precious)
        changed = sorted({name for name in self.files.keys() | now.keys() if self.files.get(name) != now.get(name)})
        text = f"changed: {Path(changed[0]).name} and {len(changed) - 1} more" if changed else "files unchanged"
        self.note(text, not changed, "write into the course", "write through", "symlink in place")
        top = [self.room.course, self.room.root / "home"]
        left_behind = traces(top, self.canaries.marker)
        for place in (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm")):
            left_behind += [str(path) for path in place.glob(f"{self.canaries.marker}*")]
        text = f"left: {left_behind[0]}" if left_behind else "nothing left"
        self.note(text, not left_behind, "set-uid", "symlink in place", "device node")

    def _look_at_the_gradebook(self) -> None:
        names, expected = sorted(self.room.names_in_gradebook()), sorted(student.name for student in STUDENTS)
        self.note("students unchanged" if names == expected else "changed", names == expected, "add a row")

    def rows(self) -> list[Row]:
        """The second table: every attempt, what it says, and what was seen."""
        rows = []
        for student in hostile():
            for notebook, attempt, said in self._tries(student):
                seen = [one for one in self.seen if attempt.startswith(one.attempts)]
                text = "; ".join(one.text for one in seen) or "(its own word)"
                boast = said.startswith("got ") and not self._is_mistaken(attempt, said)
                held = all(one.held for one in seen) and not boast
                rows.append(Row(f"{student.name} {notebook}", attempt, said, text, held))
        return rows + self._tampering()

    def _tries(self, student: Student) -> list[tuple[str, str, str]]:
        """Notebook, attempt and outcome of all that a hostile student tried, as the student tells it."""
        found = []
        for assignment in student.assignments:
            folder = self.room.course / "autograded" / student.name / assignment
            for path in sorted(folder.glob("*.ipynb")):
                found += [(path.stem, name, said) for name, said in tries(path).items()]
        return found

    def _is_mistaken(self, attempt: str, said: str) -> bool:
        """Did a sandbox's own /etc/shadow pass for the host's?"""
        shadow = Path("/etc/shadow")
        try:
            return attempt == "/etc/shadow" and sha256(shadow.read_bytes()).hexdigest() not in said
        except PermissionError:
            return False

    def _tampering(self) -> list[Row]:
        """Hostile students solved nothing, so no test may give a point; and each must have been heard."""
        rows = []
        for student in hostile():
            graded = self.room.scores(student.name, "ps1")
            points = sum(score or 0 for cells in graded.values() for score in cells.values())
            what = "tags, points and checksums of tests" if student.edit else "points without an answer"
            told = f"{points:g} points" if graded else "was not graded"
            held = bool(graded) and points == 0
            rows.append(Row(student.name, what, "-", told, held))
            if not self._tries(student):
                rows.append(Row(student.name, "(any)", "-", "the notebook said nothing, so nothing is shown", False))
        return rows


def hostile() -> list[Student]:
    """The students who attack."""
    return [student for student in STUDENTS if student.kind == "hostile"]


def all_held(rows: list[Row], complain: Callable[[str], None]) -> bool:
    """Did the wall hold everywhere? Complain about each place where it did not."""
    for row in rows:
        if not row.held:
            complain(f"{row.notebook}: {row.attempt}: {row.said} / {row.seen}")
    return all(row.held for row in rows)
