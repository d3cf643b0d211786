"""nbgrader's own tests of autograding and of the exchange, as its wheel ships them, against `configure(c)` of ours.

    make test-upstream                                      with our configuration
    .venv/bin/python tests/upstream/run.py --stock          the same tests with nbgrader as it is, for comparison
    .venv/bin/python tests/upstream/run.py --only collect   of the modules whose name contains the word

Theory of operation. Some of these tests assert file modes, which root ignores. Started by root, this program
therefore makes a stage below /tmp: an ordinary Unix user and, because the interpreter of .venv may lie where
only root can enter, an environment from the system's Python with this checkout installed. It runs pytest there
as that user. Both go at the end, also after Ctrl-C, SIGTERM or SIGHUP: first the processes, then the user, then
the files. Started by an ordinary user it makes a temporary directory only and runs the current environment.

What passes with stock nbgrader must pass here. The exceptions are in exceptions.toml, each with its reason and
the tests of ours that take its place. The exit code is 0 if every other test ran and passed, none was skipped
but those that the table names, and every notebook was seen to be executed in a sandbox, every operation of the
exchange to be one of our classes (`witness`).
"""

import argparse
import ast
import contextlib
import dataclasses
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

PACKAGE = "nbgrader.tests.apps"
NOTEBOOKS, OPERATIONS = "notebooks executed", "operations of the exchange"
MODULES = {
    "test_nbgrader_autograde": {NOTEBOOKS},
    "test_nbgrader_list": {OPERATIONS},
    "test_nbgrader_fetch_assignment": {OPERATIONS},
    "test_nbgrader_fetchfeedback": {NOTEBOOKS, OPERATIONS},
    "test_nbgrader_submit": {OPERATIONS},
    "test_nbgrader_collect": {OPERATIONS},
    "test_nbgrader_releaseassignment": {OPERATIONS},
    "test_nbgrader_releasefeedback": {NOTEBOOKS, OPERATIONS},
    "test_nbgrader_zip_collect": set(),
    "test_api": {NOTEBOOKS, OPERATIONS},
}
"""The modules of `PACKAGE`, and what each must be seen to do."""
OURS, STOCK = "ours", "stock"
HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
CONFIGURATION = "import nbgrader_aalto\n\nc = get_config()\nnbgrader_aalto.configure(c)\n"
EXTRAS = "test"
MINIMUM = (3, 11)
LONG = 7200.0
"""Seconds: many times what the tests take."""


class Trouble(Exception):
    """The tests cannot be run, or their result means nothing; says what to do."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One test in exceptions.toml."""

    reason: str
    instead: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """exceptions.toml. Keys are `module::test`; one without parameters stands for the test with all of them."""

    excepted: Mapping[str, Entry]
    skipped: Mapping[str, Entry]
    as_root: Mapping[str, Entry]

    @classmethod
    def read(cls, path: Path) -> "Table":
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        sections = {field.name for field in dataclasses.fields(cls)}
        if raw.keys() != sections:
            raise Trouble(f"{path.name}: expected the sections {sorted(sections)}, found {sorted(raw)}")
        return cls(
            **{
                section: {
                    f"{module}::{name}": Entry(entry["reason"], tuple(entry.get("instead", ())))
                    for module, tests in raw[section].items()
                    for name, entry in tests.items()
                }
                for section in sections
            }
        )

    def of(self, modules: Collection[str], collected: Collection[str]) -> "Table":
        """The entries for `modules`, as names of collected tests where there are some: one for each parameter."""

        def chosen(entries: Mapping[str, Entry]) -> dict[str, Entry]:
            found: dict[str, Entry] = {}
            for name, entry in entries.items():
                module = name.partition("::")[0]
                if module in modules or module not in MODULES:
                    tests = [test for test in collected if test.partition("[")[0] == name]
                    found |= dict.fromkeys(tests or [name], entry)
            return found

        return Table(chosen(self.excepted), chosen(self.skipped), chosen(self.as_root))

    def untrue(self, collected: Collection[str]) -> list[str]:
        """What the table says and is not so: names that no test has, replacements that do not exist."""
        tables = {"excepted": self.excepted, "skipped": self.skipped, "as_root": self.as_root}
        found = [
            f"exceptions.toml, {section}: nbgrader has no test {name}"
            for section, entries in tables.items()
            for name in entries
            if name not in collected
        ]
        found += [
            f"exceptions.toml, excepted: {name} has no replacement"
            for name, entry in self.excepted.items()
            if not entry.instead
        ]
        return found + [
            f"exceptions.toml: {name} is replaced by {test}, which does not exist"
            for entries in tables.values()
            for name, entry in entries.items()
            for test in entry.instead
            if not exists(test)
        ]


def exists(test: str) -> bool:
    """Whether the checkout has this test, given as path::name."""
    path, _, name = test.partition("::")
    if not (REPOSITORY / path).is_file():
        return False
    module = ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in module.body)


@dataclasses.dataclass(frozen=True)
class Place:
    """Who runs the tests, with which interpreter, and where they may write."""

    python: Path
    directory: Path
    who: str
    is_root: bool = False
    credentials: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def environment(self, stock: bool) -> dict[str, str]:
        """No setting of the person who started this reaches the tests, except where programs are found."""
        found = {
            "PATH": os.pathsep.join([str(self.python.parent), os.environ.get("PATH", os.defpath)]),
            "HOME": str(self.directory / "home"),
            "USER": pwd.getpwuid(self.credentials.get("user", os.geteuid())).pw_name,
            "TMPDIR": str(self.directory / "tmp"),
            "PYTHONPATH": str(self.directory / "plugin"),
            "UPSTREAM_WITNESS": str(self.directory / "witness.txt"),
            "LANG": "C.UTF-8",
        }
        return found if stock else found | {"JUPYTER_CONFIG_PATH": str(self.directory / "config")}

    def prepare(self) -> None:
        """What the tests need besides the interpreter."""
        for name in ("home", "tmp", "plugin", "config"):
            (self.directory / name).mkdir()
        shutil.copy(HERE / "witness.py", self.directory / "plugin")
        (self.directory / "plugin/pytest.ini").write_text("[pytest]\n")
        (self.directory / "config/nbgrader_config.py").write_text(CONFIGURATION)
        (self.directory / "witness.txt").touch()
        if self.credentials:
            for path in (self.directory, *self.directory.rglob("*")):
                os.chown(path, self.credentials["user"], self.credentials["group"])

    def run(self, *arguments: str, stock: bool, capture: bool = False) -> "subprocess.CompletedProcess[str]":
        """The interpreter with these arguments, in a process group of its own that never outlives this call."""
        process = subprocess.Popen(
            [str(self.python), *arguments],
            cwd=self.directory / "home",
            env=self.environment(stock),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if capture else None,
            stderr=subprocess.STDOUT if capture else None,
            text=True,
            umask=0o022,
            process_group=0,
            **self.credentials,
        )
        try:
            output, _ = process.communicate(timeout=LONG)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return subprocess.CompletedProcess(process.args, process.returncode, output)


@contextlib.contextmanager
def place() -> Iterator[Place]:
    """An ordinary user who can run the tests: ourselves, or one who exists only meanwhile."""
    stage = Path(tempfile.mkdtemp(prefix="upstream-"))
    python = Path(sys.executable)
    work = stage / "work"
    work.mkdir()
    try:
        if os.geteuid() != 0:
            yield Place(python, work, "as yourself")
            return
        base = system_python()
        missing = [name for name in ("useradd", "userdel") if shutil.which(name) is None]
        if base is None or missing:
            lacks = (
                f"no {' and no '.join(missing)}" if missing else f"no Python >= {MINIMUM[0]}.{MINIMUM[1]} in /usr/bin"
            )
            yield Place(python, work, f"as root, because there is {lacks}", is_root=True)
            return
        stage.chmod(0o755)
        name = f"upstream-{secrets.token_hex(4)}"
        with ordinary_user(name, work / "home") as user:
            yield Place(
                install(base, stage),
                work,
                f"as the ordinary user {name}",
                credentials={"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []},
            )
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # an impatient second Ctrl-C leaves nothing behind either
        shutil.rmtree(stage, ignore_errors=True)


def system_python() -> str | None:
    """A Python that every user may run and that is new enough."""
    for name in ("/usr/bin/python3", *(f"/usr/bin/python3.{minor}" for minor in range(30, MINIMUM[1] - 1, -1))):
        check = f"import sys; sys.exit(sys.version_info < {MINIMUM})"
        if os.path.exists(name) and subprocess.run([name, "-I", "-c", check], capture_output=True).returncode == 0:
            return name
    return None


@contextlib.contextmanager
def ordinary_user(name: str, home: Path) -> Iterator[pwd.struct_passwd]:
    """A new Unix user, and afterwards neither it nor any process of its."""
    command = ["useradd", "--user-group", "--no-create-home", "--home-dir", str(home), "--shell", "/bin/sh", name]
    try:
        _quietly(command)
        user = pwd.getpwnam(name)
        try:
            yield user
        finally:
            _end_processes_of(user.pw_uid)
    finally:
        for program in ("userdel", "groupdel"):  # the second for systems where the first leaves the group
            subprocess.run([program, name], capture_output=True, check=False)


def _end_processes_of(uid: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        living = [pid for pid in os.listdir("/proc") if pid.isdecimal() and _owner(pid) == uid]
        if not living:
            return
        for pid in living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.05)


def _owner(pid: str) -> int | None:
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except FileNotFoundError:
        return None


def install(base: str, stage: Path) -> Path:
    """An environment in `stage` with this checkout in it; its interpreter.

    pip builds from a copy, because a build leaves directories behind.
    """
    print(f"Making an environment with {base} that an ordinary user can run; this takes a minute.", flush=True)
    source, prefix = stage / "source", stage / "environment"
    source.mkdir()
    for path in (*REPOSITORY.glob("README*"), *REPOSITORY.glob("LICENSE*"), REPOSITORY / "pyproject.toml"):
        shutil.copy(path, source)
    for marker in REPOSITORY.glob("*/py.typed"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(marker.parent, source / marker.parent.name, ignore=ignore)
    python = prefix / "bin/python"
    virtualenv = [sys.executable, "-m", "virtualenv", "--quiet", "--no-periodic-update"]
    _quietly([*virtualenv, "--app-data", str(stage / "app-data"), "-p", base, str(prefix)])
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _quietly([*pip, "--root-user-action=ignore", f"{source}[{EXTRAS}]"])
    _quietly(["chmod", "-R", "a+rX", str(prefix)])
    return python


def _quietly(command: list[str]) -> None:
    """Run it; its words only if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, umask=0o022, cwd="/", check=False)
    if done.returncode != 0:
        raise Trouble(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}".rstrip())


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How the tests went: name -> `passed`, `failed` or `skipped`; and what was done by whom, how often."""

    tests: Mapping[str, str]
    done: Mapping[tuple[str, str], int]
    exit_code: int
    seconds: float

    def named(self, how: str) -> list[str]:
        return sorted(name for name, went in self.tests.items() if went == how)


def pytest_arguments(where: Place) -> list[str]:
    """Those that collecting and running have in common. Node ids are relative to nbgrader's own parent."""
    script = "import importlib.util as u; print(u.find_spec('nbgrader').origin)"
    found = where.run("-c", script, stock=True, capture=True)
    if found.returncode != 0:
        raise Trouble(f"nbgrader cannot be found:\n{found.stdout}")
    packages = Path(found.stdout.strip()).parents[1]
    configuration = where.directory / "plugin/pytest.ini"
    return ["-m", "pytest", "-c", str(configuration), f"--rootdir={packages}", "-p", "no:cacheprovider", "-q"]


def collect(where: Place, common: list[str], modules: Collection[str]) -> dict[str, str]:
    """nbgrader's tests: `module::test` -> node id."""
    done = where.run(*common, "--collect-only", *_pyargs(modules), stock=True, capture=True)
    if done.returncode != 0:
        raise Trouble(f"nbgrader's tests cannot be collected:\n{done.stdout}")
    ids = [line for line in done.stdout.splitlines() if "::" in line]
    names = {f"{Path(node_id.partition('::')[0]).stem}::{node_id.rpartition('::')[2]}": node_id for node_id in ids}
    if len(names) != len(ids):
        raise Trouble("two of nbgrader's tests have one name; exceptions.toml needs longer ones")
    return names


def _pyargs(modules: Collection[str]) -> list[str]:
    return ["--pyargs", *(f"{PACKAGE}.{module}" for module in modules)]


def run(
    where: Place, common: list[str], modules: Collection[str], without: Collection[str], workers: int, stock: bool
) -> Outcome:
    """Run all tests of the modules but the node ids in `without`."""
    report = where.directory / "home/report.xml"
    options = ["-p", "witness", "-n", str(workers), "--tb=short", "-W", "ignore", f"--junitxml={report}"]
    deselected = [f"--deselect={node_id}" for node_id in without]
    started = time.monotonic()
    done = where.run(*common, *options, *deselected, *_pyargs(modules), stock=stock)
    if not report.exists():
        raise Trouble(f"pytest ended with exit code {done.returncode} and without a report")
    tests: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        went = {child.tag for child in case} & {"failure", "error", "skipped"}
        how = "passed" if not went else "skipped" if went == {"skipped"} else "failed"
        module = next((part for part in case.attrib["classname"].split(".") if part in MODULES), "")
        name = f"{module}::{case.attrib['name']}"
        tests[name] = "failed" if tests.get(name) == "failed" else how  # one that fails twice is there twice
    notes = [line.rpartition(" by ") for line in (where.directory / "witness.txt").read_text().splitlines()]
    counted = Counter((what, who) for what, _, who in notes)
    return Outcome(tests, counted, done.returncode, time.monotonic() - started)


def problems(
    table: Table, modules: Collection[str], expected: Collection[str], outcome: Outcome, stock: bool
) -> list[str]:
    """Everything for which the exit code must not be 0."""
    found = [f"failed: {name}" for name in outcome.named("failed")]
    found += [f"did not run: {name}" for name in sorted(set(expected) - outcome.tests.keys())]
    found += [f"ran, and should not have: {name}" for name in sorted(outcome.tests.keys() - set(expected))]
    found += [
        f"skipped, and not in exceptions.toml: {name}" for name in outcome.named("skipped") if name not in table.skipped
    ]
    found += [
        f"in exceptions.toml as skipped, but ran: {name}"
        for name in table.skipped
        if outcome.tests.get(name) in {"passed", "failed"}
    ]
    right, wrong = (STOCK, OURS) if stock else (OURS, STOCK)
    found += [
        f"no {what} by {right}: the configuration was not in force"
        for what in sorted(set().union(*(MODULES[module] for module in modules)))
        if not outcome.done.get((what, right))
    ]
    found += [
        f"{count} {what} by {who}, and there should be none"
        for (what, who), count in sorted(outcome.done.items())
        if who == wrong
    ]
    if outcome.exit_code != 0 and not found:
        found.append(f"pytest ended with exit code {outcome.exit_code}")
    return found


def summary(table: Table, where: Place, outcome: Outcome, excepted: Collection[str], stock: bool) -> str:
    configuration = "stock nbgrader" if stock else "nbgrader_aalto.configure(c)"
    done = ", ".join(f"{what} by {who}: {count}" for (what, who), count in sorted(outcome.done.items()))
    lines = [
        "",
        f"nbgrader's own tests with {configuration}, {where.who}, in {outcome.seconds:.0f} s:",
        f"  passed {len(outcome.named('passed'))}, excepted {len(excepted)}, "
        f"skipped by nbgrader {len(outcome.named('skipped'))}, failed {len(outcome.named('failed'))}",
        f"  {done or 'nothing seen to be done'}",
    ]
    entries = {**table.skipped, **table.as_root, **table.excepted}
    for title, names in (("excepted", sorted(excepted)), ("skipped", outcome.named("skipped"))):
        for name in names:
            entry = entries.get(name, Entry("unknown", ()))
            lines.append(f"  {title}: {name}: {entry.reason}")
            lines += [f"    instead: {test}" for test in entry.instead]
    return "\n".join(lines)


def main() -> int:
    """Exit code: 0 all is well, 1 tests failed, 2 they could not be run."""
    parser = argparse.ArgumentParser(description="Run nbgrader's own tests against this plugin.")
    parser.add_argument("--stock", action="store_true", help="without our configuration, nothing excepted")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes [%(default)s]")
    parser.add_argument("--only", metavar="WORD", default="", help="the modules whose name contains this")
    arguments = parser.parse_args()
    modules = [module for module in MODULES if arguments.only in module]
    if not modules:
        parser.error(f"no module's name contains {arguments.only!r}; there are {', '.join(MODULES)}")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        table = Table.read(HERE / "exceptions.toml")
        with place() as where:
            where.prepare()
            common = pytest_arguments(where)
            collected = collect(where, common, modules)
            table = table.of(modules, collected)
            excepted = {} if arguments.stock else dict(table.excepted)
            excepted |= table.as_root if where.is_root else {}
            untrue = table.untrue(collected)
            without = [collected[name] for name in excepted if name in collected]
            outcome = run(where, common, modules, without, arguments.workers, arguments.stock)
            expected = collected.keys() - excepted.keys()
            wrong = untrue + problems(table, modules, expected, outcome, arguments.stock)
            print(summary(table, where, outcome, excepted, arguments.stock), flush=True)
    except Trouble as trouble:
        print(f"nbgrader's tests could not be run: {trouble}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; the temporary user and files are gone.", file=sys.stderr)
        return 130
    for line in wrong:
        print(f"  PROBLEM: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
