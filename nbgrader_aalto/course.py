"""A course of several instructors: where it is, whose, and what its directories must be like.

Knows modes and nbgrader's configuration; `create` makes a course, `takeover` reads an earlier one, `upkeep` finds and
mends what somebody broke by hand. All of them reach everything by descriptors and never through a link, and none looks
at what students handed in.

Root is careful: instructors may write in the course directory, so that root runs nothing that lies there (the
configuration, git with the repository's own settings) and gives nobody a file that has a second name elsewhere.
"""

import contextlib
import dataclasses
import grp
import os
import shlex
import stat
from pathlib import Path

from nbgrader_aalto import shared, trees

CONFIG = "nbgrader_config.py"


class CourseError(Exception):
    """Nothing was done; the text says why, and what to do."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Modes: bits that must be there, and bits that must not."""

    bits: int
    forbidden: int = 0

    def of(self, mode: int) -> int:
        """The nearest mode that will do."""
        return (mode | self.bits) & ~self.forbidden


SPECIAL = 0o7000
"""No file has them: setgid on a program of a student's that came in would be the group's rights for the student."""
INSTRUCTORS, INSTRUCTORS_FILE = Wanted(0o2770, 0o5000), Wanted(0o660, SPECIAL)
COURSE = Wanted(0o2770, 0o5007)
RELEASED, RELEASED_FILE = Wanted(0o2775, 0o5002), Wanted(0o664, 0o002 | SPECIAL)
HIDDEN = Wanted(0o3773, 0o4004)


@dataclasses.dataclass(frozen=True)
class Course:
    """Where a course is, and whose."""

    slug: str
    root: Path
    exchange: Path | None
    """The exchange's root, None where it is not known."""
    gid: int
    db_url: str = ""

    @property
    def group(self) -> str:
        """The name of the instructors' group."""
        return shared.group_name(self.gid)

    @property
    def gradebook(self) -> Path | None:
        """Its file, None for a database server."""
        return shared.gradebook(self.db_url or f"sqlite:///{self.root / 'gradebook.db'}")

    @property
    def in_exchange(self) -> tuple[tuple[Path, Wanted], ...]:
        """The course's directories in the exchange, and their modes."""
        if self.exchange is None or not self.slug:
            return ()
        top = self.exchange / self.slug
        return (top, RELEASED), (top / "outbound", RELEASED), (top / "inbound", HIDDEN), (top / "feedback", HIDDEN)


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that not all instructors can use: what is wrong, whose it is, and what that person, or root, runs."""

    path: str
    owner: str
    problem: str
    command: str

    def __str__(self) -> str:
        return f"{printable(self.path)}: {self.problem} (owner: {self.owner})\n    {self.command}"


def slug_problem(slug: str) -> str:
    """Why this cannot be the name of a course's directory in an exchange; empty if it can."""
    if not slug or slug.startswith((".", "-")) or slug != slug.strip():
        return "it is empty, or starts with a dot or a dash, or has blanks around it"
    if "/" in slug or not slug.isprintable() or len(os.fsencode(slug)) > 200:
        return "it has a slash or unprintable characters, or is too long"
    return ""


def printable(path: str) -> str:
    """For a person's terminal: names come from students, too."""
    return path if path.isprintable() else ascii(path)


def shell_quoted(path: str) -> str:
    """For a shell, bash's $'' where the name has characters that a terminal would not show."""
    if path.isprintable():
        return shlex.quote(path)
    codes = (chr(code) if 32 <= code < 127 and code not in b"'\\" else f"\\x{code:02x}" for code in os.fsencode(path))
    return f"$'{''.join(codes)}'"


def finding_of(path: str, status: os.stat_result, gid: int, wanted: Wanted) -> Finding | None:
    mode = stat.S_IMODE(status.st_mode)
    directory = stat.S_ISDIR(status.st_mode)
    problems = []
    if status.st_gid != gid:
        problems.append(f"belongs to the group {shared.group_name(status.st_gid)}, not to {shared.group_name(gid)}")
    if wanted.of(mode) != mode:
        problems.append(f"{_lacking(mode, wanted)} (mode {mode:o})")
    if not problems:
        return None
    return Finding(
        path, shared.owner_name(status.st_uid), " and ".join(problems), _command(path, status, gid, directory, wanted)
    )


def _lacking(mode: int, wanted: Wanted) -> str:
    words = {0o2000: "is not setgid", 0o1000: "is not sticky", 0o040: "is not group-readable"}
    words |= {0o020: "is not group-writable", 0o010: "cannot be entered by the group"}
    words |= {0o004: "cannot be read by students", 0o002: "lets no student in", 0o001: "cannot be entered by students"}
    lacking = [text for bit, text in words.items() if wanted.bits & ~mode & bit]
    if wanted.bits & ~mode & 0o700:
        lacking.append("is closed to its owner")
    if wanted.forbidden & mode & 0o007:
        lacking.append("is open to everybody")
    if wanted.forbidden & mode & SPECIAL:
        lacking.append("is setuid, setgid or sticky")
    return ", ".join(lacking)


def _command(path: str, status: os.stat_result, gid: int, directory: bool, wanted: Wanted) -> str:
    """What mends it, and who runs it: the owner, if he or she may, else root."""
    quoted = shell_quoted(path)
    commands = []
    if status.st_gid != gid:
        commands.append(f"chgrp {shared.group_name(gid)} {quoted}")
    mode = stat.S_IMODE(status.st_mode)
    if wanted.of(mode) != mode:
        commands.append(f"chmod {wanted.of(mode):o} {quoted}")
    member = status.st_uid == os.geteuid() or shared.is_member(status.st_uid, gid)
    who = shared.owner_name(status.st_uid) if member else "root"
    return f"{who} runs: {' && '.join(commands)}"


def is_movable(status: os.stat_result) -> bool:
    return bool(status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX)


def movable_finding(path: Path, status: os.stat_result) -> Finding:
    owner = shared.owner_name(status.st_uid)
    problem = "everybody can move the courses in it away and put others there"
    return Finding(str(path), owner, problem, f"{owner} runs: chmod +t {shell_quoted(str(path))}")


def find(
    slug: str | None, directory: Path | None, *, exchange: Path | None, group: int | None, run_configuration: bool
) -> Course:
    """The course of a directory, or else the one that is configured, or of the working directory.

    Its configuration is run as nbgrader would, unless told not to: root must not. Raises `CourseError` when there is
    none, or it is another one.
    """
    settings = _settings(directory) if run_configuration else _Settings(str(directory or Path.cwd()))
    root = Path(os.path.realpath(settings.root))
    if directory and root != Path(os.path.realpath(directory)):
        raise CourseError(f"nbgrader is configured for the course directory {root}, and {directory} says nothing else")
    if slug and settings.course_id and slug != settings.course_id:
        raise CourseError(f"{root} is the course {settings.course_id!r}, not {slug!r}")
    try:
        with trees.opened(root) as descriptor:
            status = os.fstat(descriptor)
    except OSError as error:
        raise CourseError(f"{root}: {error.strerror}") from error
    if run_configuration and not shared.is_shared(root, settings.groupshared):
        raise CourseError(
            f"{root} is not a course of several instructors: c.CourseDirectory.groupshared is not set. Name "
            "another one with --course-dir, or see `nbgrader-aalto course create --help`"
        )
    gid = _group(slug or settings.course_id, settings.group, status.st_gid) if group is None else group
    if os.geteuid() != 0 and not shared.is_instructor(gid):
        raise CourseError(f"you are not a member of the group {shared.group_name(gid)} of {root}")
    place = exchange or (Path(settings.exchange) if settings.exchange else None)
    return Course(slug or settings.course_id, root, place, gid, settings.db_url)


def _group(slug: str, configured: str, found: int) -> int:
    """Of the instructors: the group that the exchange wants, as far as it exists here, or that of the directory."""
    with contextlib.suppress(KeyError, ValueError, IndexError):
        return grp.getgrnam((configured or "jupyter-{course_id}").format(course_id=slug)).gr_gid
    return found


@dataclasses.dataclass(frozen=True)
class _Settings:
    root: str
    course_id: str = ""
    groupshared: bool = False
    db_url: str = ""
    exchange: str = ""
    group: str = ""


def _settings(directory: Path | None) -> _Settings:
    """From the files that nbgrader reads, in its order; without nbgrader's application, which would import it all."""
    from jupyter_core.application import JupyterApp
    from traitlets.config import Application

    app = JupyterApp(config_file_name="nbgrader_config", raise_config_file_errors=True)
    try:
        app.load_config_file(suppress_errors=False)
        Application.load_config_file(app, "nbgrader_config", path=os.getcwd())
        root = str(directory or app.config.CourseDirectory.get("root") or os.getcwd())
        Application.load_config_file(app, "nbgrader_config", path=root)
    except (Exception, SystemExit) as error:
        raise CourseError(f"nbgrader_config.py cannot be used: {type(error).__name__}: {error}") from error
    course, exchange = app.config.CourseDirectory, app.config.Exchange
    return _Settings(
        root=os.path.abspath(course.get("root") or root),
        course_id=course.get("course_id") or "",
        groupshared=course.get("groupshared") is True,
        db_url=course.get("db_url") or "",
        exchange=exchange.get("root") or "",
        group=app.config.AaltoExchange.get("group") or "",
    )
