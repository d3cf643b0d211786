"""The whole course from release to feedback, graded in the sandbox, with honest and hostile students.

    python examples/course/demo.py              grade everybody, print who got what and who tried what
    python examples/course/demo.py --stock      the honest students only, with stock nbgrader, for comparison
    python examples/course/demo.py --service    the same as without, but a grading service executes the notebooks

Everything happens in a temporary directory. The exit code is 0 if every honest student got the score that
`submissions.py` expects and no hostile attempt succeeded, and 1 if not.
"""

import argparse
import contextlib
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.table import Table

import grading_service
from canaries import Canaries
from classroom import ASSIGNMENTS, COURSE_ID, Classroom, temporary_directory
from commands import CommandFailed
from submissions import STUDENTS, Scores, Student
from verdicts import Judge, Row, all_held
from witness import MIB, Watch, survivors

TIMEOUT_SECONDS = 5
console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)

AllScores = dict[str, dict[str, dict[str, Scores]]]


def step(text: str) -> Callable[[str], None]:
    """Announce a step; the function that is returned says how it ended."""
    begun = time.monotonic()
    console.print(f"[bold]·[/] {text} …")

    def done(result: str) -> None:
        console.print(f"  [dim]{time.monotonic() - begun:5.1f} s  {result}[/]")

    return done


def hold_the_course(room: Classroom, canaries: Canaries, students: list[Student]) -> None:
    """Release, fetch, work, submit in time and late, collect."""
    done = step("The instructor generates and releases ps1 and ps2")
    canaries.plant()
    emails = {student.name: f"{student.name}@example.org" for student in students}
    room.release(emails | {"aino": f"{canaries.tokens['gradebook']}@example.org"})
    done("nbgrader db student import, generate_assignment, release_assignment")
    done = step(f"{len(students)} students fetch, work and submit")
    room.fetch(students)
    room.work(students, canaries.told())
    canaries.plant_in_submission(room.home(students[0]) / "ps1" / "functions.ipynb")
    room.submit([student for student in students if not student.late])
    room.close()
    room.submit([student for student in students if student.late])
    room.collect()
    done("nbgrader fetch_assignment, submit, db assignment add --duedate, submit, collect")


def grade(room: Classroom) -> list[str]:
    """Autograde both assignments, give feedback, export; return what nbgrader complained about."""
    troubles = []
    for assignment in ASSIGNMENTS:
        done = step(f"nbgrader autograde {assignment}")
        with room.service.progress(console, assignment) if room.service else contextlib.nullcontext():
            code = room.autograde(assignment)
        done("done" if code == 0 else f"exit code {code}")
        if code:
            troubles.append(f"nbgrader autograde {assignment} ended with exit code {code}")
            troubles += room.errors(assignment)
    done = step("Feedback and export")
    try:
        room.give_back()
    except CommandFailed as error:
        troubles.append(f"feedback or export failed: {str(error).strip().splitlines()[-1]}")
    done("nbgrader generate_feedback, release_feedback, export")
    return troubles


def make_sure_of_the_sandbox(room: Classroom, student: Student) -> None:
    """Grade one honest student first, and refuse to go on if that was not done in a sandbox.

    nbgrader logs an error in nbgrader_config.py and goes on without that file, which here means without a
    sandbox; the hostile notebooks are in the course by then.
    """
    done = step(f"nbgrader autograde ps1 --student={student.name}, to be sure that there is a sandbox")
    room.autograde("ps1", student.name)
    reports = room.reports(student.name, "ps1")
    if not reports or not all(report.get("layers") for report in reports):
        raise CommandFailed(f"{room.log.read_text()[-3000:]}\n\nNo sandbox: nothing more was graded.")
    layers = reports[0]["layers"]
    done(f"in force: {', '.join(map(str, layers)) if isinstance(layers, list) else layers}")


def collect_scores(room: Classroom, students: list[Student]) -> AllScores:
    """Student, assignment, notebook, grade cell: automatic score."""
    return {
        student.name: {assignment: room.scores(student.name, assignment) for assignment in student.assignments}
        for student in students
    }


def wrong_scores(students: list[Student], found: AllScores) -> list[str]:
    """Where a student's score differs from the expected one, cell by cell."""
    wrong = []
    for student in students:
        for name, expected in student.expected.items():
            assignment, notebook = name.split("/")
            if assignment not in student.assignments:
                continue
            cells = found[student.name][assignment].get(notebook, {})
            for cell, score in expected.items():
                if cells.get(cell, "no score") != score:
                    got = cells.get(cell, "no score")
                    wrong.append(f"{student.name} {name} {cell}: expected {score}, got {got}")
    return wrong


def number(report: dict[str, object], key: str) -> float:
    """A number from a notebook's report; 0 if it is absent."""
    value = report.get(key)
    return float(value) if isinstance(value, int | float) else 0.0


def score_table(room: Classroom, students: list[Student]) -> Table:
    """The first table: what each student got, and what the execution took."""
    table = Table("student", "story", "", "score", "max", "time", "memory", "how it ended", title="Grades")
    for student in students:
        for assignment in student.assignments:
            reports = room.reports(student.name, assignment)
            wall = f"{sum(number(one, 'wall_seconds') for one in reports):.1f} s" if reports else "-"
            peak = max((number(one, "memory_peak_bytes") for one in reports), default=0)
            ended = ", ".join(str(one.get("ended", "-")) for one in reports) or "-"
            total = room.total(student.name, assignment)
            score, most, late = "none", "-", ""
            if total:
                score, most = f"{total[0]:g}", f"{total[1]:g}"
                late = f" -{total[2]:g} late" if total[2] else ""
            memory = f"{peak / MIB:.0f} MiB" if peak else "-"
            table.add_row(student.name, student.story, assignment, score + late, most, wall, memory, ended)
    return table


def attempt_table(rows: list[Row]) -> Table:
    """The second table: what each hostile notebook tried, and what came of it."""
    table = Table("notebook", "attempt", "what it says", "seen from outside", "", title="Hostile attempts")
    for row in rows:
        verdict = "[green]held[/]" if row.held else "[bold red]FAILED[/]"
        table.add_row(row.notebook, row.attempt, row.said.replace("[", r"\["), row.seen, verdict)
    return table


def demonstrate(room: Classroom, students: list[Student], scores_file: Path | None, token: str) -> list[str]:
    """Run the course and print the tables; return everything that is not as it should be."""
    canaries = Canaries(room.root)
    canaries.tokens["environment"] = token
    room.copy_course()
    with canaries.listening():
        hold_the_course(room, canaries, students)
        judge = None if room.stock else Judge(room, canaries)
        places = [Path(name) for name in ("/tmp", "/var/tmp", "/dev/shm", "/run", Path.home())]
        try:
            if not room.stock:
                make_sure_of_the_sandbox(room, students[0])
            with Watch(canaries.marker, room.root, places) as watch:
                troubles = grade(room)
            if judge:
                judge.look(watch)
        finally:
            for process in survivors(canaries.marker, seconds=0):
                os.kill(process, signal.SIGKILL)
    found = collect_scores(room, students)
    if scores_file:
        scores_file.write_text(json.dumps(found, indent=2) + "\n")
    console.print(score_table(room, students))
    if judge:
        rows = judge.rows()
        console.print(attempt_table(rows))
        all_held(rows, lambda text: troubles.append(f"the sandbox did not hold: {text}"))
    return wrong_scores(students, found) + troubles


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Grade a small course with honest and hostile students.")
    parser.add_argument("--stock", action="store_true", help="honest students only, with stock nbgrader")
    parser.add_argument("--service", action="store_true", help="let a grading service, started here, do the work")
    parser.add_argument("--keep", action="store_true", help="keep the temporary directory and print its name")
    parser.add_argument("--scores", type=Path, metavar="FILE", help="write every cell's score as JSON")
    return parser.parse_args()


def stop(number: int, frame: FrameType | None) -> None:
    """End as Ctrl-C does, so that the temporary directory is removed."""
    raise KeyboardInterrupt


def main() -> int:
    """Run the demo; the exit code is 0 if all is as it should be."""
    options = arguments()
    signal.signal(signal.SIGTERM, stop)
    students = [student for student in STUDENTS if student.kind == "honest" or not options.stock]
    token = f"canary-environment-{secrets.token_hex(8)}"
    begun = time.monotonic()
    try:
        with temporary_directory(options.keep) as root, contextlib.ExitStack() as stack:
            service = None
            if options.service:
                done = step("Start a grading service")
                service = stack.enter_context(grading_service.running(root / "service", COURSE_ID))
                done("grader-service db upgrade, token create, serve")
            room = Classroom(root, options.stock, TIMEOUT_SECONDS, {"JUPYTERHUB_API_TOKEN": token}, service)
            troubles = demonstrate(room, students, options.scores, token)
            if options.keep:
                console.print(f"Everything is kept in {root}", soft_wrap=True)
    except CommandFailed as error:
        console.print("[bold red]An nbgrader command failed.[/]")
        console.print(str(error), markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted; the temporary directory is removed.")
        return 130
    for trouble in troubles:
        console.print(f"[red]✗[/] {trouble}", soft_wrap=True)
    verdict = "[bold red]not as it should be[/]" if troubles else "[bold green]all as it should be[/]"
    console.print(f"{len(students)} students, {time.monotonic() - begun:.0f} s: {verdict}")
    return 1 if troubles else 0


if __name__ == "__main__":
    sys.exit(main())
