"""A burst at the deadline: 50 students submit 10 times each, all at once, while an instructor collects in a loop.

    make bench-exchange

As root, since it makes Unix users, and removes them. Stock nbgrader and this plugin take turns in one run. Prints
submissions a second, the latency of one, what a collect took meanwhile, and what of the submissions was kept,
complete and attributed to the right person at the end: an exchange that loses one is not fast. Every process has
imported nbgrader and done its work once before the burst begins, so that imports, which take all of them far longer
than a submission, are not what is measured. Exit code 1 if ours lost one.
"""

import argparse
import contextlib
import json
import os
import pwd
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from attacks.harness import Stage, eventually, lives, processes
from campus import Campus, Member

COURSE, ASSIGNMENT, WARMING_UP = "burst", "ps1", "warm-up"
STOCK, OURS = "stock nbgrader", "nbgrader-aalto"
_START = """
import json, logging, select, sys, time
from nbgrader.apps.baseapp import NbGrader
from nbgrader.auth import Authenticator
from nbgrader.coursedir import CourseDirectory
from nbgrader.exchange import ExchangeFactory
app = NbGrader(); app.log.setLevel(logging.CRITICAL); app.load_config_file()
def run(operation, assignment, **traits):
    config = app.config.copy()
    config.CourseDirectory.assignment_id = assignment
    one = getattr(ExchangeFactory(config=config), operation)(
        coursedir=CourseDirectory(config=config), authenticator=Authenticator(config=config), config=config)
    for name, value in traits.items():
        setattr(one, name, value)
    one.start()
"""
SUBMIT = (
    _START
    + """
run("Submit", sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
times = []
for number in range(int(sys.argv[3])):
    with open(f"{sys.argv[1]}/number.txt", "w") as file:
        file.write(str(number))
    started = time.monotonic()
    run("Submit", sys.argv[1])
    times.append((started, time.monotonic()))
print(json.dumps(times), flush=True)
"""
)
COLLECT = (
    _START
    + """
def collect():
    try:
        run("Collect", sys.argv[1], update=True)
    except Exception as error:
        errors.append(type(error).__name__ + ": " + str(error)[:100])
errors = []
collect()
print("ready", flush=True)
sys.stdin.readline()
times = []
while not select.select([sys.stdin], [], [], 0)[0]:
    started = time.monotonic()
    collect()
    times.append(time.monotonic() - started)
started = time.monotonic()
collect()
times.append(time.monotonic() - started)
print(json.dumps([times, errors]), flush=True)
"""
)


@dataclass(frozen=True)
class Place:
    """A course with released assignments."""

    root: Path
    inbound: Path
    env: dict[str, str]


@contextlib.contextmanager
def people(count: int) -> Iterator[tuple[Campus, list[Member]]]:
    """Unix users who share a group; gone afterwards with their processes, also when told to end meanwhile."""
    stage, students = Stage.new(), []
    campus = Campus(stage)
    try:
        campus = Campus.open(stage)
        for _ in range(count):
            students.append(_student(f"burst-{secrets.token_hex(4)}", campus))
        yield campus, students
    finally:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        for student in students:
            eventually(lambda: not _killed(student.uid), 20)  # noqa: B023
            subprocess.run(["userdel", student.name], capture_output=True, check=False)
        campus.close()
        stage.close()


def _student(name: str, campus: Campus) -> Member:
    group = campus.students[0].gid
    home = campus.stage.directory / "campus" / name
    options = ["--no-user-group", "--no-create-home", "--gid", str(group), "--home-dir", str(home)]
    subprocess.run(["useradd", *options, name], check=True, capture_output=True)
    uid = pwd.getpwnam(name).pw_uid
    for path in (home, home / "tmp"):
        path.mkdir(mode=0o700)
        os.chown(path, uid, group)
    return Member(name, uid, group, (group,), home, campus.python)


def _killed(uid: int) -> list[int]:
    found = processes(lambda pid: os.stat(f"/proc/{pid}").st_uid == uid and lives(pid))
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return found


def course(campus: Campus, plugin: bool) -> Place:
    """With two released assignments: the one of the burst, and one for warming up."""
    tree = campus.course(COURSE)
    if not plugin:
        text = (tree.config_dir / "nbgrader_config.py").read_text()
        (tree.config_dir / "nbgrader_config.py").write_text(
            text.partition("import nbgrader_aalto")[0].replace("c.AaltoExchange", "# ")
        )
        tree.exchange.chmod(0o777)
    instructor = campus.instructors[0]
    notebook = {"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    for name in (ASSIGNMENT, WARMING_UP):
        release = tree.root / "release" / name
        release.mkdir(parents=True)
        (release / "p1.ipynb").write_text(json.dumps(notebook))
        for path in (release.parent, release, release / "p1.ipynb"):
            os.chown(path, instructor.uid, campus.gid)
        done = instructor.nbgrader("release_assignment", name, cwd=tree.root, env=tree.env(), umask=0o007)
        if done.code != 0:
            raise SystemExit(f"{name} could not be released:\n{done.log}")
    return Place(tree.root, tree.exchange / COURSE / "inbound", tree.env())


def burst(campus: Campus, students: list[Member], each: int, plugin: bool, kilobytes: int) -> dict[str, float]:
    """One run, by the name of each row; the rows are what is printed."""
    place = course(campus, plugin)
    instructor = campus.instructors[0]
    pipes: dict[str, Any] = {"env": place.env, "stdin": subprocess.PIPE, "stderr": None}
    with contextlib.ExitStack() as ends:
        workers = []
        for student in students:
            command = [student.interpreter, "-P", "-c", SUBMIT, ASSIGNMENT, WARMING_UP, str(each)]
            workers.append(student.start(*command, cwd=_homework(student, kilobytes), **pipes))
            ends.callback(_end, workers[-1])
        command = [instructor.interpreter, "-P", "-c", COLLECT, ASSIGNMENT]
        collector = instructor.start(*command, cwd=place.root, umask=0o007, **pipes)
        ends.callback(_end, collector)
        for process in (*workers, collector):
            _line(process)
        for process in (collector, *workers):
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        times = [span for worker in workers for span in json.loads(_line(worker))]
        collects, errors = json.loads(collector.communicate("\n")[0])
    if errors:
        print(f"collecting failed: {errors[0]}", file=sys.stderr)
    latencies = [end - start for start, end in times]
    result = {
        "submissions/s": len(times) / (max(end for _, end in times) - min(start for start, _ in times)),
        "median s": statistics.median(latencies),
        "95 % s": statistics.quantiles(latencies, n=20)[-1] if len(latencies) > 1 else latencies[0],
        "collects": len(collects),
        "collect median s": statistics.median(collects),
        "the last collect s": collects[-1],
        "collects failed": len(errors),
        **_kept(place, students, each),
    }
    shutil.rmtree(place.root.parent)
    return result


def _end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate()  # a user whose process is a zombie cannot be removed


def _line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    if not (line := process.stdout.readline()):
        raise SystemExit(f"a process of the burst ended with code {process.wait()}")
    return line


def _homework(student: Member, kilobytes: int) -> Path:
    """A directory with both assignments, fetched and worked on."""
    work = student.home / secrets.token_hex(4)
    for name in (ASSIGNMENT, WARMING_UP):
        (work / name).mkdir(parents=True)
        (work / name / "p1.ipynb").write_text("{}")
        (work / name / "data.bin").write_bytes(os.urandom(kilobytes * 1000))
    for path in (work, *work.rglob("*")):
        os.chown(path, student.uid, student.gid)
    return work


def _kept(place: Place, students: list[Member], each: int) -> dict[str, float]:
    """What is complete and its owner's, in inbound and in the vault; and who has the last submission in submitted."""
    owners = {student.uid: student.name for student in students}
    kept = 0
    for entry in os.scandir(place.inbound):
        files = {path.name for path in Path(entry.path).iterdir()}
        whole = {"p1.ipynb", "data.bin", "number.txt", "timestamp.txt"} <= files
        kept += whole and entry.name.startswith(f"{owners[entry.stat().st_uid]}+{ASSIGNMENT}+")
    vault = {student.name: set[str]() for student in students}
    for path in (place.root / "vault" / ASSIGNMENT).glob("*/*/files/number.txt"):
        vault[path.parts[-4]].add(path.read_text())
    last = [place.root / "submitted" / student.name / ASSIGNMENT / "number.txt" for student in students]
    return {
        "kept in inbound": kept,
        "kept in the vault": sum(len(numbers) for numbers in vault.values()),
        "last one collected": sum(path.exists() and path.read_text() == str(each - 1) for path in last),
    }


def machine() -> str:
    """In one line."""
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    name, cores = model.partition(": ")[2] or os.uname().machine, os.cpu_count()
    return f"{name}, {cores} cores, {memory:.0f} GiB, Linux {os.uname().release}, load {os.getloadavg()[0]:.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", type=int, default=50)
    parser.add_argument("--each", type=int, default=10, help="submissions of each student [%(default)s]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kilobytes", type=int, default=20, help="of one submission [%(default)s]")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        print("Only root can make the Unix users of this benchmark.", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # so that the users go
    wanted, lost = arguments.students * arguments.each, False
    runs: dict[str, list[dict[str, float]]] = {STOCK: [], OURS: []}
    print(f"{machine()} at the start", flush=True)
    with people(arguments.students) as (campus, students):
        for number in range(1, arguments.rounds + 1):
            for name, found in runs.items():
                started = time.monotonic()
                found.append(burst(campus, students, arguments.each, name == OURS, arguments.kilobytes))
                seconds = time.monotonic() - started
                print(
                    f"round {number} of {arguments.rounds}, {name}: {seconds:.0f} s with all imports", file=sys.stderr
                )
    lost = any(run["kept in the vault"] != wanted or run["kept in inbound"] != wanted for run in runs[OURS])
    each = f"{arguments.each} submissions of {arguments.kilobytes} kB each"
    print(f"{arguments.students} students, {each}, all at once; medians of {arguments.rounds} rounds\n")
    print("| | " + " | ".join(runs) + " |\n| --- | ---: | ---: |")
    for row in runs[STOCK][0]:
        cells = [statistics.median(run[row] for run in found) for found in runs.values()]
        print(f"| {row} | " + " | ".join(f"{cell:.4g}" for cell in cells) + " |")
    return int(lost)


if __name__ == "__main__":
    sys.exit(main())
