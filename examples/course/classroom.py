"""A whole course in a temporary directory, run with nbgrader's own commands.

One Unix user plays everybody here: students submit with `nbgrader submit --student NAME` from a home of their
own, so the exchange cannot tell them apart by the owner of their files (`check_owner` is off for that
reason, and only here). On a real machine each student is a user.
"""

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from nbgrader.api import Gradebook

from commands import Job, run, run_all
from grading_service import GradingService
from submissions import Scores, Student, build

COURSE_ID = "pyscience"
ASSIGNMENTS = ("ps1", "ps2")
HERE = Path(__file__).parent

# In the copy these lines stand before the line of the course's configuration that calls the plugin.
OVERRIDES = """\
c.Exchange.root = {exchange!r}
c.ExchangeCollect.check_owner = False
c.Execute.timeout = {timeout}
c.IsolatedExecute.report_file = {reports!r}

"""
SERVICE = """\
c.IsolatedExecute.service_url = {url!r}
c.IsolatedExecute.service_token_file = {token_file!r}

"""
CALL = 'if not os.environ.get("NBGRADER_AALTO_STOCK"):\n'
STUDENT_CONFIG = """\
import os

c = get_config()
c.CourseDirectory.course_id = "{course}"
c.Exchange.root = {exchange!r}
if not os.environ.get("NBGRADER_AALTO_STOCK"):
    import nbgrader_aalto

    nbgrader_aalto.configure(c)
"""


@contextlib.contextmanager
def temporary_directory(keep: bool) -> Iterator[Path]:
    """A directory with a blank in its name that is removed in the end, unless it is to be kept."""
    root = Path(tempfile.mkdtemp(prefix="nbgrader-aalto demo-"))
    try:
        # Open to all: what keeps a hostile notebook out must be the sandbox, not the mode of this directory.
        root.chmod(0o755)
        yield root
    finally:
        if not keep:
            for folder in [
                root,
                *(path for path in root.rglob("*") if path.is_dir() and not path.is_symlink()),
            ]:
                folder.chmod(0o755)
            shutil.rmtree(root)


@dataclass(frozen=True)
class Classroom:
    """The copy of the course below root, its exchange, and everybody's home directory."""

    root: Path
    stock: bool
    timeout_seconds: int
    secrets: dict[str, str]
    service: GradingService | None = None

    @property
    def course(self) -> Path:
        """The instructor's course directory."""
        return self.root / "course"

    @property
    def log(self) -> Path:
        """What all the commands said."""
        return self.root / "nbgrader.log"

    def environment(self) -> dict[str, str]:
        """The instructor's environment, with a home in the temporary directory and secrets in it."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("JUPYTER", "IPYTHON", "XDG_CONFIG", "XDG_DATA", "XDG_CACHE", "NBGRADER_AALTO_"))
        }
        stock = {"NBGRADER_AALTO_STOCK": "1"} if self.stock else {}
        # nbgrader calls `alembic` by name: as in an activated environment, ours comes first
        path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
        return {**kept, "PATH": path, "HOME": str(self.root / "home"), **self.secrets, **stock}

    def copy_course(self) -> None:
        """Copy the course's own files, with this classroom's exchange and a short time limit."""
        for name in ("course", "exchange", "home", "students"):
            (self.root / name).mkdir()
        shutil.copytree(HERE / "source", self.course / "source")
        before, call, after = (HERE / "nbgrader_config.py").read_text().partition(CALL)
        if not call:
            raise ValueError(f"nbgrader_config.py has no line {CALL!r}")
        overrides = OVERRIDES.format(
            exchange=str(self.root / "exchange"), timeout=self.timeout_seconds, reports=str(self.report_file)
        )
        if self.service:
            overrides += SERVICE.format(url=self.service.url, token_file=str(self.service.token_file))
        (self.course / "nbgrader_config.py").write_text(before + overrides + call + after)

    def release(self, emails: dict[str, str]) -> None:
        """Import the list of students, generate both assignments and release them."""
        rows = "".join(f"{name},{email}\n" for name, email in emails.items())
        (self.course / "students.csv").write_text(f"id,email\n{rows}")
        self._instruct(
            ["db", "student", "import", "students.csv"],
            *(["generate_assignment", name, "--create"] for name in ASSIGNMENTS),
            *(["release_assignment", name] for name in ASSIGNMENTS),
        )

    def _instruct(self, *commands: list[str]) -> None:
        jobs = [Job(command, str(self.course)) for command in commands]
        run_all(jobs, self.course, self.environment(), self.log)

    def home(self, student: Student) -> Path:
        """The home directory of a student."""
        return self.root / "students" / student.name

    def fetch(self, students: list[Student]) -> None:
        """Every student fetches what is released."""
        for student in students:
            self.home(student).mkdir()
            config = STUDENT_CONFIG.format(course=COURSE_ID, exchange=str(self.root / "exchange"))
            (self.home(student) / "nbgrader_config.py").write_text(config)
        self._study("fetch_assignment", students)

    def submit(self, students: list[Student]) -> None:
        """Every student hands in what is in his or her home."""
        self._study("submit", students)

    def _study(self, command: str, students: list[Student]) -> None:
        """Run a student's command for each of the assignments that the students work on."""
        jobs = [
            Job([command, assignment, f"--student={student.name}"], str(self.home(student)))
            for student in students
            for assignment in student.assignments
        ]
        run_all(jobs, self.root, self.environment(), self.log)

    def work(self, students: list[Student], told: dict[str, object]) -> None:
        """Every student fills in the notebooks."""
        for student in students:
            for assignment in student.assignments:
                build(student, assignment, self.home(student) / assignment, told)

    def close(self) -> None:
        """Make this very moment the deadline: what is submitted from now on is late."""
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S.%f UTC")
        self._instruct(*(["db", "assignment", "add", name, f"--duedate={now}"] for name in ASSIGNMENTS))

    def collect(self) -> None:
        """Fetch everybody's submissions from the exchange."""
        self._instruct(*(["collect", name] for name in ASSIGNMENTS))

    def autograde(self, assignment: str, student: str = "*") -> int:
        """Grade one assignment in a process of its own; the exit code is 1 if one submission failed."""
        command = ["autograde", assignment, "--Autograde.create_student=True", f"--student={student}"]
        return run(command, self.course, self.environment(), self.log)

    def errors(self, assignment: str) -> list[str]:
        """The lines of the log that are errors about this assignment."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line[:500] for line in lines if "| ERROR]" in line and assignment in line]

    def give_back(self) -> None:
        """Generate and release feedback, and export the grades."""
        self._instruct(
            *(["generate_feedback", name] for name in ASSIGNMENTS),
            *(["release_feedback", name] for name in ASSIGNMENTS),
            ["export", "--to=grades.csv"],
        )

    def gradebook(self) -> Gradebook:
        """The gradebook, to be used in a `with` statement."""
        return Gradebook(f"sqlite:///{self.course / 'gradebook.db'}", COURSE_ID)

    def names_in_gradebook(self) -> list[str]:
        """The students that the gradebook knows."""
        with self.gradebook() as gradebook:
            return [student.id for student in gradebook.students]

    def scores(self, student: str, assignment: str) -> dict[str, Scores]:
        """The automatic score of each grade cell, by notebook; empty if there is no submission."""
        with self.gradebook() as gradebook:
            for submission in gradebook.student_submissions(student):
                if submission.assignment.name == assignment:
                    return {
                        notebook.name: {grade.name: grade.auto_score for grade in notebook.grades}
                        for notebook in submission.notebooks
                    }
        return {}

    def total(self, student: str, assignment: str) -> tuple[float, float, float] | None:
        """Score, highest possible score, and the penalty for being late; None if there is no submission."""
        with self.gradebook() as gradebook:
            for submission in gradebook.student_submissions(student):
                if submission.assignment.name == assignment:
                    return submission.score, submission.max_score, submission.late_submission_penalty or 0.0
        return None

    @property
    def report_file(self) -> Path:
        """Where the plugin writes one line of JSON for each executed notebook."""
        return self.root / "reports.jsonl"

    def reports(self, student: str, assignment: str) -> list[dict[str, object]]:
        """What the plugin reports about each executed notebook, the last time it was; empty for stock nbgrader."""
        lines = self.report_file.read_text(encoding="utf-8").splitlines() if self.report_file.exists() else []
        wanted = [report for report in map(json.loads, lines) if report["student"] == student]
        found = {report["notebook"]: report for report in wanted if report["assignment"] == assignment}
        return [found[name] for name in sorted(found)]


if __name__ == "__main__":
    sys.exit("This is a part of demo.py; run that.")
