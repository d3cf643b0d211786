"""A burst at the deadline: 50 students submit 10 times each, all at once, while an instructor collects in a loop.

    make bench-exchange

As root, since it makes Unix users, and removes them. Stock nbgrader and this plugin take turns in one run. Prints
submissions a second, the latency of one, what a collect took meanwhile, and what of the submissions was kept,
complete and attributed to the right person at the end: an exchange that loses one is not fast.
"""

import argparse
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
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from attacks.harness import Stage
from campus import Campus, Member

COURSE, ASSIGNMENT = "burst", "ps1"
SUBMIT = """
import json, os, sys, time
from nbgrader.apps.baseapp import NbGrader
from nbgrader.auth import Authenticator
from nbgrader.coursedir import CourseDirectory
from nbgrader.exchange import ExchangeFactory
import logging
app = NbGrader(); app.log.setLevel(logging.CRITICAL); app.load_config_file()
config = app.config
config.CourseDirectory.assignment_id = sys.argv[1]
def submit():
    ExchangeFactory(config=config).Submit(
        coursedir=CourseDirectory(config=config), authenticator=Authenticator(config=config), config=config).start()
print("ready", flush=True)
sys.stdin.readline()
times = []
for number in range(int(sys.argv[2])):
    open(f"{sys.argv[1]}/number.txt", "w").write(str(number))
    started = time.monotonic()
    submit()
    times.append(time.monotonic() - started)
print(json.dumps(times), flush=True)
"""
COLLECT = """
import json, os, select, sys, time
from nbgrader.apps.baseapp import NbGrader
from nbgrader.auth import Authenticator
from nbgrader.coursedir import CourseDirectory
from nbgrader.exchange import ExchangeFactory
import logging
app = NbGrader(); app.log.setLevel(logging.CRITICAL); app.load_config_file()
config = app.config
config.CourseDirectory.assignment_id = sys.argv[1]
def collect():
    one = ExchangeFactory(config=config).Collect(
        coursedir=CourseDirectory(config=config), authenticator=Authenticator(config=config), config=config)
    one.update = True
    try:
        one.start()
    except Exception as error:
        return type(error).__name__ + ": " + str(error)[:100]
print("ready", flush=True)
sys.stdin.readline()
times, errors = [], []
while not select.select([sys.stdin], [], [], 0)[0]:
    started = time.monotonic()
    errors.append(collect())
    times.append(time.monotonic() - started)
errors.append(collect())
print(json.dumps([times, [error for error in errors if error]]), flush=True)
"""


def make_students(count: int, group: int, top: Path, python: Path) -> list[Member]:
    """Unix users who share a group."""
    found = []
    for _ in range(count):
        name = f"burst-{secrets.token_hex(4)}"
        home = top / name
        options = ["--no-user-group", "--no-create-home", "--gid", str(group), "--home-dir", str(home)]
        subprocess.run(["useradd", *options, name], check=True, capture_output=True)
        uid = pwd.getpwnam(name).pw_uid
        for path in (home, home / "tmp"):
            path.mkdir(mode=0o700)
            os.chown(path, uid, group)
        found.append(Member(name, uid, group, (group,), home, python))
    return found


def course(campus: Campus, plugin: bool) -> tuple[Path, Path, dict[str, str]]:
    """A released assignment; (course directory, inbound, environment)."""
    tree = campus.course(COURSE)
    if not plugin:
        text = (tree.config_dir / "nbgrader_config.py").read_text()
        (tree.config_dir / "nbgrader_config.py").write_text(
            text.partition("import nbgrader_aalto")[0].replace("c.AaltoExchange", "# ")
        )
        tree.exchange.chmod(0o777)
    release = tree.root / "release" / ASSIGNMENT
    release.mkdir(parents=True)
    notebook = {"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (release / "p1.ipynb").write_text(json.dumps(notebook))
    instructor = campus.instructors[0]
    for path in (release.parent, release, release / "p1.ipynb"):
        os.chown(path, instructor.uid, campus.gid)
    done = instructor.nbgrader("release_assignment", ASSIGNMENT, cwd=tree.root, env=tree.env(), umask=0o007)
    assert done.code == 0, done.log
    return tree.root, tree.exchange / COURSE / "inbound", tree.env()


def burst(campus: Campus, students: list[Member], each: int, plugin: bool, kilobytes: int) -> dict[str, Any]:
    """One run: seconds, latencies, collects, and what was kept."""
    root, inbound, env = course(campus, plugin)
    workers = []
    for student in students:
        work = student.home / secrets.token_hex(4)
        (work / ASSIGNMENT).mkdir(parents=True)
        (work / ASSIGNMENT / "p1.ipynb").write_bytes((root / "release" / ASSIGNMENT / "p1.ipynb").read_bytes())
        (work / ASSIGNMENT / "data.bin").write_bytes(os.urandom(kilobytes * 1000))
        for path in (work, work / ASSIGNMENT, *(work / ASSIGNMENT).iterdir()):
            os.chown(path, student.uid, student.gid)
        command = [student.interpreter, "-P", "-c", SUBMIT, ASSIGNMENT, str(each)]
        workers.append(student.start(*command, cwd=work, env=env, stdin=subprocess.PIPE, stderr=None))
    instructor = campus.instructors[0]
    collector = instructor.start(
        *(instructor.interpreter, "-P", "-c", COLLECT, ASSIGNMENT),
        cwd=root,
        env=env,
        umask=0o007,
        stdin=subprocess.PIPE,
        stderr=None,
    )
    everybody = [*workers, collector]
    for process in everybody:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    started = time.monotonic()
    for process in reversed(everybody):
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    latencies = [second for worker in workers for second in json.loads(worker.communicate()[0] or "[]")]
    seconds = time.monotonic() - started
    collects, errors = json.loads(collector.communicate("\n")[0])
    owners = {student.uid: student.name for student in students}
    kept = 0
    for entry in os.scandir(inbound):
        files = {path.name for path in Path(entry.path).iterdir()}
        whole = {"p1.ipynb", "data.bin", "number.txt", "timestamp.txt"} <= files
        kept += whole and entry.name.startswith(owners[entry.stat().st_uid] + "+")
    last = sum(
        (root / "submitted" / student.name / ASSIGNMENT / "number.txt").read_text() == str(each - 1)
        for student in students
        if (root / "submitted" / student.name / ASSIGNMENT / "number.txt").exists()
    )
    vault = len(list((root / "vault").glob("*/*/*/submission.json")))
    result = {
        "submissions/s": len(latencies) / seconds,
        "median s": statistics.median(latencies) if latencies else float("nan"),
        "95 % s": statistics.quantiles(latencies, n=20)[-1] if len(latencies) > 1 else float("nan"),
        "collects": len(collects),
        "collect median s": statistics.median(collects) if collects else float("nan"),
        "collects failed": len(errors),
        "kept in inbound": kept,
        "kept in the vault": vault,
        "last one collected": last,
    }
    shutil.rmtree(root.parent)
    return result


def main() -> int:
    """Exit code 1 if ours lost one."""
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
    stage, students = Stage.new(), []
    campus = Campus.open(stage)
    wanted = arguments.students * arguments.each
    lost = False
    try:
        students = make_students(arguments.students, campus.students[0].gid, stage.directory / "campus", campus.python)
        runs: dict[str, list[dict[str, Any]]] = {"stock nbgrader": [], "nbgrader-aalto": []}
        for _ in range(arguments.rounds):
            for name, found in runs.items():
                found.append(burst(campus, students, arguments.each, name == "nbgrader-aalto", arguments.kilobytes))
        lost = any(run["kept in the vault"] != wanted for run in runs["nbgrader-aalto"])
        people, rounds = f"{arguments.students} students", f"medians of {arguments.rounds}"
        print(f"{people}, {arguments.each} submissions each, all at once, {rounds}")
        print(f"{'':22}" + "".join(f"{name:>18}" for name in runs))
        for row in runs["stock nbgrader"][0]:
            cells = [statistics.median(run[row] for run in found) for found in runs.values()]
            print(f"{row:22}" + "".join(f"{cell:18.2f}" for cell in cells))
    finally:
        for student in students:
            subprocess.run(["userdel", student.name], capture_output=True, check=False)
        campus.close()
        stage.close()
    return int(lost)


if __name__ == "__main__":
    sys.exit(main())
