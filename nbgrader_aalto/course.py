"""Making a course for several instructors, and mending what somebody broke in it by hand.

`create` makes directories, gradebook, git repository and configuration; `check` finds what instructors cannot all
use, `repair` mends it as far as whoever runs it may. Everything is reached by descriptors and never through a link.

Root is careful: instructors may write in the course directory, so that root runs nothing that lies there (the
configuration, git with the repository's own settings) and gives nobody a file that has a second name elsewhere.

Knows modes, git and nbgrader's configuration; refuses to look at what students handed in: inbound is never opened.
"""

import ast
import contextlib
import dataclasses
import grp
import os
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from nbgrader_aalto import lock, shared, trees

CONFIG, OLD_CONFIG = "nbgrader_config.py", "nbgrader_config.old.py"
_LEFT_BY_STUDENTS = frozenset({"submitted", "autograded", "feedback", "vault", ".ipynb_checkpoints"})
_IGNORE = """\
# Student data, and what can be made again, is not kept in git.
submitted/
autograded/
feedback/
vault/
downloaded/
gradebook.db*
/grades.csv
.locks/
logs/
*.log
__pycache__/
.ipynb_checkpoints/
.*.before
.*.new
"""
_CONFIG = """\
# nbgrader's configuration for the course's instructors, made by `nbgrader-aalto course create`.
c = get_config()
c.CourseDirectory.course_id = {slug!r}
c.CourseDirectory.root = {root!r}
c.CourseDirectory.groupshared = True
c.Exchange.root = {exchange!r}
c.AaltoExchange.group = {group!r}

import nbgrader_aalto
from nbgrader_aalto import shared

c.NbGrader.logfile = shared.logfile(c.CourseDirectory.root)  # each instructor's own

# Your settings come here.

nbgrader_aalto.configure(c)
"""
_BEING_MADE = re.compile(r"\..*\.[0-9a-f]{12}\.new|\.nfs[0-9a-f]+", re.DOTALL)
_GIT_READ_ONLY = frozenset({"TAG_EDITMSG", "MERGE_MSG", "SQUASH_MSG"})
"""In .git; git removes these itself."""
_GIT_WRITTEN = ("COMMIT_EDITMSG", "FETCH_HEAD")
"""In .git; git makes these by the umask whatever core.sharedRepository says, and then writes into what is there: so a
colleague could not commit. Those that we make first stay the group's."""
_SHARED_REPOSITORY = re.compile(
    r"^\s*sharedrepository\s*=\s*\"?(group|true|1|2|all|world|everybody|0?66\d)\b", re.M | re.I
)
_DEEPEST = 200
_REACHED = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_CHUNK = 1 << 20
_RECENT_NS = 10 * 10**9
"""A file that was written to so short ago may be open for writing still: what comes after a copy would be lost."""
_NO_LIMITS = trees.TreeLimits(1 << 62, 1 << 62, 1 << 62, 1 << 62)


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


_SPECIAL = 0o7000
"""No file has them: setgid on a program of a student's that came in would be the group's rights for the student."""
INSTRUCTORS, INSTRUCTORS_FILE = Wanted(0o2770, 0o5000), Wanted(0o660, _SPECIAL)
COURSE = Wanted(0o2770, 0o5007)
RELEASED, RELEASED_FILE = Wanted(0o2775, 0o5002), Wanted(0o664, 0o002 | _SPECIAL)
HIDDEN = Wanted(0o3773, 0o4004)
_KEPT_BY_GIT = Wanted(0o440, _SPECIAL)
_LOG = Wanted(0o640, _SPECIAL)
"""Only its owner writes it; nbgrader opens it before it has set the umask."""


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


# create


@dataclasses.dataclass(frozen=True)
class Created:
    """What `create` did, and what is still missing, with the command that makes it."""

    done: tuple[str, ...]
    missing: tuple[str, ...]


def create(course: Course, old: Path | None = None) -> Created:
    """Make what the course does not have yet. Raises `CourseError`, before anything is made, when something else is
    in a place, or belongs to another group. With `old`, the directory of an earlier course, its committed source/
    and settings are taken over.
    """
    if course.exchange is None:
        raise CourseError("which exchange? --exchange")
    if problem := slug_problem(course.slug):
        raise CourseError(f"{course.slug!r} cannot be a course: {problem}")
    _refuse_strangers(course)
    inherited = _committed(course, old) if old else None
    making = _Making(course)
    umask = os.umask(shared.UMASK)
    try:
        for path, wanted in _places(course):
            making.directory(path, wanted)
        if os.access(course.root, os.W_OK | os.X_OK):
            config = _CONFIG.format(
                slug=course.slug, root=str(course.root), exchange=str(course.exchange), group=course.group
            )
            if inherited:
                making.inherit(inherited)
                config = inherited.config or config
            making.file(CONFIG, config.encode())
            making.file(".gitignore", _IGNORE.encode())
            making.gradebook()
            making.repository()
    finally:
        os.umask(umask)
    return Created(tuple(making.done), tuple(making.missing))


def slug_problem(slug: str) -> str:
    """Why this cannot be the name of a course's directory in an exchange; empty if it can."""
    if not slug or slug.startswith((".", "-")) or slug != slug.strip():
        return "it is empty, or starts with a dot or a dash, or has blanks around it"
    if "/" in slug or not slug.isprintable() or len(os.fsencode(slug)) > 200:
        return "it has a slash or unprintable characters, or is too long"
    return ""


def _places(course: Course) -> Iterator[tuple[Path, Wanted]]:
    yield course.root, COURSE
    for name in ("source", "release", "submitted", "autograded", "feedback", "vault", "logs", ".locks"):
        yield course.root / name, INSTRUCTORS
    assert course.exchange is not None
    yield course.exchange, Wanted(0o755)
    yield from course.in_exchange


def _refuse_strangers(course: Course) -> None:
    if os.geteuid() != 0 and not shared.is_instructor(course.gid):
        raise CourseError(
            f"you are not a member of the group {course.group}, or not since this login. A member runs this, or root"
        )
    problems = []
    for path, _ in _places(course):
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
            continue
        if stat.S_ISLNK(status.st_mode):
            problems.append(f"{path} is a link; name the place itself")
        elif not stat.S_ISDIR(status.st_mode):
            problems.append(f"{path} is not a directory")
        elif path != course.exchange and status.st_gid != course.gid and not _own_and_empty(path, status):
            problems.append(f"{path} belongs to the group {shared.group_name(status.st_gid)}, not to {course.group}")
    if course.exchange and course.exchange / course.slug == course.root:
        problems.append(f"{course.root} cannot be both the course directory and the exchange's")
    if problems:
        raise CourseError("\n".join(["nothing was made:", *problems]))


def _own_and_empty(path: Path, status: os.stat_result) -> bool:
    """As a mkdir(1) of one's own leaves it, or a death of ours right after."""
    with contextlib.suppress(OSError):
        return status.st_uid == os.geteuid() and not os.listdir(path)
    return False


class _Making:
    """The steps of `create`. Each is done if need be, and an obstacle is noted, so that the next one gets its turn."""

    def __init__(self, course: Course) -> None:
        self._course = course
        self.done: list[str] = []
        self.missing: list[str] = []

    def directory(self, path: Path, wanted: Wanted) -> None:
        mode, gid = wanted.bits, self._course.gid
        common = path == self._course.exchange  # by all courses: an existing one is as the administrator made it
        new = not os.path.lexists(path)
        try:
            if new:
                os.mkdir(path, 0o700)
                self.done.append(f"made {path}")
            elif common:
                self._exchange_root(path)
                return
            descriptor = os.open(path, _REACHED | os.O_DIRECTORY)
        except OSError as error:
            owner = "" if common else f"-g {shlex.quote(self._course.group)} "
            self.missing.append(
                f"{path} could not be made ({error.strerror}). An administrator runs: "
                f"install -d {owner}-m {mode:o} {shlex.quote(str(path))}"
            )
            return
        try:
            status = os.fstat(descriptor)
            before = stat.S_IMODE(status.st_mode)
            after = wanted.of(before) if not new else mode
            if before == after and (common or status.st_gid == gid):
                return
            shared.mend(descriptor, status.st_gid if common else gid, after)
            if not new:
                self.done.append(f"changed the mode of {path} from {before:o} to {after:o}")
        except OSError:
            finding = _finding(str(path), os.fstat(descriptor), gid, wanted)
            self.missing.extend([str(finding)] if finding else [])
        finally:
            os.close(descriptor)

    def _exchange_root(self, path: Path) -> None:
        status = os.stat(path)
        if _movable(status):
            self.missing.append(str(_movable_finding(path, status)))

    def file(self, path: str, content: bytes, *, quiet: bool = False) -> bool:
        """Make a file, and the directories above it, that are not there yet. `path` is relative to the course's."""
        try:
            with self._parent(path) as parent:
                name = os.path.basename(path)
                if _lexists(name, parent):
                    if _content(name, parent, len(content)) != content:
                        self.done.append(f"{self._course.root / path} is kept as it is")
                    return False
                self._new_file(name, parent, content)
        except OSError as error:
            self.missing.append(f"{self._course.root / path} could not be made: {error.strerror}")
            return False
        if not quiet:
            self.done.append(f"made {self._course.root / path}")
        return True

    @contextlib.contextmanager
    def _parent(self, path: str) -> Iterator[int]:
        """The directory of a file, each one on the way made if need be, and none reached through a link."""
        with contextlib.ExitStack() as stack:
            descriptor = stack.enter_context(trees.opened(self._course.root))
            for part in path.split("/")[:-1]:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o700, dir_fd=descriptor)
                    with _reached(part, descriptor) as made:
                        shared.mend(made, self._course.gid, INSTRUCTORS.bits)
                descriptor = stack.enter_context(trees.opened(part, dir_fd=descriptor))
            yield descriptor

    def _new_file(self, name: str, parent: int, content: bytes) -> None:
        """Complete or not at all, and never over something: under a name of its own first, then link(2)."""
        new = trees.beside(Path(name)).name
        try:
            trees.write_file(new, content, dir_fd=parent, mode=0o600)
            with _reached(new, parent) as descriptor:
                shared.mend(descriptor, self._course.gid, INSTRUCTORS_FILE.bits)
            with contextlib.suppress(FileExistsError):
                os.link(new, name, src_dir_fd=parent, dst_dir_fd=parent, follow_symlinks=False)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(new, dir_fd=parent)

    def gradebook(self) -> None:
        """An empty file, which is an empty database: SQLite gives its journals the mode of the database."""
        if not os.path.lexists(self._course.root / "gradebook.db"):
            self.file("gradebook.db", b"")

    def repository(self) -> None:
        """Initialised where nobody else can write, so that no hook or setting of another's is run, and copied."""
        place = self._course.root / ".git"
        if os.path.lexists(place):
            self._share_repository(place)
            return
        if shutil.which("git") is None:
            self.missing.append("git is not installed here: there is no repository; run this again where it is")
            return
        new = trees.beside(place)
        try:
            with tempfile.TemporaryDirectory() as directory:
                _git(Path(directory), "init", "--quiet", "--template=", "--shared=group", ".")
                for name in _GIT_WRITTEN:
                    (Path(directory) / ".git" / name).touch()
                os.mkdir(new, 0o700)
                with _reached(new) as descriptor:
                    shared.mend(descriptor, self._course.gid, INSTRUCTORS.bits)
                with trees.opened(new) as target, trees.opened(Path(directory) / ".git") as source:
                    trees.copy_tree(source, target, trees.EVERYTHING, _NO_LIMITS)
            os.rename(new, place)
        except (OSError, CourseError) as error:
            trees.remove(new)
            self.missing.append(f"{place} could not be made: {error}")
            return
        self.done.append(f"made {place}, shared by the group")

    def _share_repository(self, place: Path) -> None:
        if os.geteuid() == 0 or not stat.S_ISDIR(os.lstat(place).st_mode) or shutil.which("git") is None:
            return
        setting = ("config", "--local", "core.sharedRepository")
        try:
            with contextlib.suppress(CourseError):  # it is not set
                if _git(self._course.root, *setting).strip() not in {b"0", b"false", b"umask", b""}:
                    return
            _git(self._course.root, *setting, "group")
            self.done.append(f"set core.sharedRepository to group in {place}")
        except CourseError as error:
            self.missing.append(f"{place} could not be set to be shared by the group: {error}")

    def inherit(self, inherited: "_Inherited") -> None:
        """Put last year's files in, and leave alone what is there already."""
        made = sum(self.file(path, content, quiet=True) for path, content in inherited.files.items())
        self.done.extend(inherited.notes)
        if made:
            self.done.append(f"took {made} files over from {inherited.origin}")


@contextlib.contextmanager
def _reached(path: str | Path, dir_fd: int | None = None) -> Iterator[int]:
    descriptor = os.open(path, _REACHED, dir_fd=dir_fd)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lexists(name: str, directory: int) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _content(name: str, directory: int, most: int) -> bytes | None:
    with contextlib.suppress(OSError, trees.Unfit):
        return trees.read_file(name, directory, most)
    return None


# taking over an earlier course


@dataclasses.dataclass(frozen=True)
class _Inherited:
    origin: str
    files: dict[str, bytes]
    config: str
    """The earlier one for the new course; empty where that was not safe, or there was none."""
    notes: tuple[str, ...]


def _committed(course: Course, old: Path) -> _Inherited:
    """source/, *.md and the settings of the last commit, and nothing else, whatever was committed.

    The objects themselves, so that no filter, hook or attribute of the repository's has a say.
    """
    if not old.is_dir():
        raise CourseError(f"{old} is not a directory")
    if course.root.is_dir() and os.path.samefile(old, course.root):
        raise CourseError(f"{old} is this course itself")
    try:
        commit = _git(old, "rev-parse", "--verify", "--quiet", "HEAD^{commit}").decode().strip()
        chosen, left_out = _chosen(_git(old, "ls-tree", "-r", "-z", commit))
        blobs = dict(zip(chosen, _blobs(old, chosen.values()), strict=True))
    except CourseError as error:
        raise CourseError(
            f"{old} cannot be taken over: {error}. Only what is committed to git counts, since nothing else is certain "
            "to be no student's. There, an instructor runs `git add source` and `git commit` first"
        ) from error
    if not any(path.startswith("source/") for path in blobs):
        raise CourseError(f"{old} cannot be taken over: no source/ is committed in its git")
    notes = [f"left out of the earlier course: {', '.join(printable(path) for path in left_out)}"] if left_out else []
    config = ""
    if text := blobs.pop(CONFIG, b""):
        config = renewed(text, course)
        if config:
            notes.append(f"{CONFIG} is the earlier one with the names and places of {course.slug}")
        else:
            blobs[OLD_CONFIG] = text
            notes.append(
                f"the earlier {CONFIG} names things of its course that could not be replaced for certain: it is beside "
                f"the new one as {OLD_CONFIG}; copy from it what you need, then remove it"
            )
    return _Inherited(f"{old} (commit {commit[:12]})", blobs, config, tuple(notes))


def _chosen(listing: bytes) -> tuple[dict[str, str], list[str]]:
    """Path to object of what is taken over, and what is not although it lies among that. git-ls-tree(1)"""
    chosen: dict[str, str] = {}
    left_out = []
    for line in listing.split(b"\0")[:-1]:
        about, _, raw = line.partition(b"\t")
        mode, _, name = about.decode().split()
        path = os.fsdecode(raw)
        parts = path.split("/")
        if parts[0] != "source" and (len(parts) > 1 or not (path.endswith(".md") or path == CONFIG)):
            continue
        students = any(part in _LEFT_BY_STUDENTS or part.startswith("gradebook.db") for part in parts)
        if students or mode not in {"100644", "100755"} or {"", ".", "..", ".git"} & set(parts):
            left_out.append(path)
        else:
            chosen[path] = name
    return chosen, left_out


def _blobs(repository: Path, names: Iterable[str]) -> Iterator[bytes]:
    """Their contents, in order. git-cat-file(1), --batch"""
    output = _git(repository, "cat-file", "--batch", input="".join(f"{name}\n" for name in names).encode())
    at = 0
    while at < len(output):
        end = output.index(b"\n", at)
        fields = output[at:end].split()
        if len(fields) != 3 or fields[1] != b"blob":
            raise CourseError(f"an object is missing in its git: {output[at:end].decode(errors='replace')}")
        size = int(fields[2])
        yield output[end + 1 : end + 1 + size]
        at = end + 1 + size + 1


def renewed(config: bytes, course: Course) -> str:
    """An earlier nbgrader_config.py with this course's names and places; empty if they cannot be replaced for certain.

    Certain: each is set once, at top level, to a plain string, and no other string names the earlier course.
    """
    values = {
        "c.CourseDirectory.course_id": course.slug,
        "c.CourseDirectory.root": str(course.root),
        "c.Exchange.root": str(course.exchange),
        "c.AaltoExchange.group": course.group,
    }
    try:
        text = config.decode()
        tree = ast.parse(text)
    except (ValueError, SyntaxError):
        return ""
    settings: dict[str, list[ast.expr]] = {}
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            settings.setdefault(ast.unparse(statement.targets[0]), []).append(statement.value)
    found = {name: settings.get(name, []) for name in values}
    if not all(len(each) == 1 and _is_string(each[0]) for each in found.values()):
        return ""
    old = {name: ast.literal_eval(each[0]) for name, each in found.items()}
    if not _is_ours(tree, settings) or _named_elsewhere(tree, [each[0] for each in found.values()], old):
        return ""
    lines = [line.encode() for line in text.splitlines(keepends=True)]
    for name, (value,) in found.items():
        line = lines[value.lineno - 1]
        if value.end_lineno != value.lineno:
            return ""
        lines[value.lineno - 1] = line[: value.col_offset] + repr(values[name]).encode() + line[value.end_col_offset :]
    return b"".join(lines).decode()


def _is_string(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _is_ours(tree: ast.Module, settings: dict[str, list[ast.expr]]) -> bool:
    """Whether several instructors are provided for, and this plugin is set."""
    grouped = settings.get("c.CourseDirectory.groupshared", [])
    configured = any(
        isinstance(statement, ast.Expr) and ast.unparse(statement.value) == "nbgrader_aalto.configure(c)"
        for statement in tree.body
    )
    return configured and bool(grouped) and ast.unparse(grouped[-1]) == "True"


def _named_elsewhere(tree: ast.Module, replaced: list[ast.expr], old: dict[str, str]) -> bool:
    slug, root = old["c.CourseDirectory.course_id"], old["c.CourseDirectory.root"]
    pattern = re.compile(rf"(?<![^\W_]){re.escape(slug)}(?![^\W_])|{re.escape(root)}")
    return any(
        isinstance(node, ast.Constant) and isinstance(node.value, str) and pattern.search(node.value)
        for node in ast.walk(tree)
        if node not in replaced
    )


def _git(directory: Path, *arguments: str, input: bytes = b"") -> bytes:
    """Run git in a directory, also a colleague's repository. Raises `CourseError` with git's words.

    Such a repository must not make us run anything, so no transport is allowed (objects that are missing would be
    fetched by a command of its choice); the commands used here read no index and run no hook. As root, in the name
    of the directory's owner.
    """
    if shutil.which("git") is None:
        raise CourseError("git is not installed here")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"GIT_ALLOW_PROTOCOL": "none", "LC_ALL": "C.UTF-8"}
    who: dict[str, Any] = {}
    status = os.stat(directory)
    if os.geteuid() == 0 and status.st_uid != 0:
        who = {"user": status.st_uid, "group": status.st_gid, "extra_groups": [status.st_gid]}
        environment |= {"HOME": "/", "GIT_CONFIG_GLOBAL": os.devnull}
    command = ["git", "-c", "safe.directory=*", "-C", str(directory), *arguments]
    done = subprocess.run(command, input=input, env=environment, capture_output=True, check=False, **who)
    if done.returncode != 0:
        words = done.stderr.decode(errors="replace").strip()
        raise CourseError(words or f"git {arguments[0]} found nothing")
    output: bytes = done.stdout
    return output


# check and repair


def printable(path: str) -> str:
    """For a person's terminal: names come from students, too."""
    return path if path.isprintable() else ascii(path)


def _quoted(path: str) -> str:
    """For a shell, bash's $'' where the name has characters that a terminal would not show."""
    if path.isprintable():
        return shlex.quote(path)
    codes = (chr(code) if 32 <= code < 127 and code not in b"'\\" else f"\\x{code:02x}" for code in os.fsencode(path))
    return f"$'{''.join(codes)}'"


def check(course: Course) -> list[Finding]:
    """What not all instructors can use, in the course directory and in the exchange. Changes nothing."""
    look = _Look(course, mend=False)
    look.at_all()
    return look.findings


def repair(course: Course, say: Callable[[str], None]) -> list[Finding]:
    """Mend what may be mended, and return what is left, as a new `check` finds it.

    One's own files (for root, all) are given group and mode. Files of others become a copy of ours, put in their
    place by rename(2) when it is complete and equal, where the directory lets us; never a gradebook or a log, which
    somebody may have open for writing.
    """
    look = _Look(course, mend=True)
    with _alone(course, say):
        look.at_all()
    for line in look.mended:
        say(line)
    return [
        dataclasses.replace(finding, problem=f"{finding.problem}; {look.reasons[finding.path]}")
        if finding.path in look.reasons
        else finding
        for finding in check(course)
    ]


@contextlib.contextmanager
def _alone(course: Course, say: Callable[[str], None]) -> Iterator[None]:
    """While nobody collects or releases. Root replaces no file, and so needs no lock, nor a path to make one in.

    Raises `CourseError` when a colleague is at it for long. Where no lock can be made, nothing can be replaced either.
    """
    with contextlib.ExitStack() as stack:
        if os.geteuid() != 0:
            umask = os.umask(shared.UMASK)
            stack.callback(os.umask, umask)
            try:
                stack.enter_context(lock.locked(course.root / ".locks", "exchange", "repairing the course", log=say))
            except lock.Busy as error:
                raise CourseError(str(error)) from error
            except OSError as error:
                say(f"{course.root / '.locks'}: {error.strerror}; repairing without a lock")
        yield


def _finding(path: str, status: os.stat_result, gid: int, wanted: Wanted) -> Finding | None:
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
    if wanted.forbidden & mode & _SPECIAL:
        lacking.append("is setuid, setgid or sticky")
    return ", ".join(lacking)


def _command(path: str, status: os.stat_result, gid: int, directory: bool, wanted: Wanted) -> str:
    """What mends it, and who runs it: the owner, if he or she may, else root."""
    quoted = _quoted(path)
    commands = []
    if status.st_gid != gid:
        commands.append(f"chgrp {shared.group_name(gid)} {quoted}")
    mode = stat.S_IMODE(status.st_mode)
    if wanted.of(mode) != mode:
        commands.append(f"chmod {wanted.of(mode):o} {quoted}")
    member = status.st_uid == os.geteuid() or shared.is_member(status.st_uid, gid)
    who = shared.owner_name(status.st_uid) if member else "root"
    return f"{who} runs: {' && '.join(commands)}"


def _movable(status: os.stat_result) -> bool:
    return bool(status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX)


def _movable_finding(path: Path, status: os.stat_result) -> Finding:
    owner = shared.owner_name(status.st_uid)
    problem = "everybody can move the courses in it away and put others there"
    return Finding(str(path), owner, problem, f"{owner} runs: chmod +t {_quoted(str(path))}")


_Rules = Callable[[str], tuple[Wanted | None, Wanted]]
"""What directories and files at a path must be like."""


class _Look:
    """One round through a course. Goes on after each problem."""

    def __init__(self, course: Course, *, mend: bool) -> None:
        self._course, self._mend = course, mend
        path = course.gradebook
        self._gradebook = Path(os.path.realpath(path.parent)) / path.name if path else None
        self._elsewhere: set[tuple[int, int]] = set()
        self.findings: list[Finding] = []
        self.mended: list[str] = []
        self.reasons: dict[str, str] = {}

    def at_all(self) -> None:
        """The exchange first: it may lie below the course directory, where its insides are not looked at."""
        if self._course.exchange is not None:
            self._exchange(self._course.exchange)
        self._top(self._course.root, COURSE, lambda path: _instructors(path, self._course.root), whole=True)
        if self._gradebook and self._course.root not in self._gradebook.parents:
            self._beside(self._gradebook)
        self._repository()

    def _repository(self) -> None:
        """Read by us, not by git, which would heed the rest of what stands there."""
        place = self._course.root / ".git"
        try:
            with trees.opened(place) as directory:
                owner = shared.owner_name(os.fstat(directory).st_uid)
                text = trees.read_file("config", directory, 1 << 20).decode(errors="replace")
        except (OSError, trees.Unfit):
            return  # no repository; or found already
        if _SHARED_REPOSITORY.search(text):
            return
        if self._mend and os.geteuid() != 0:
            making = _Making(self._course)
            making.repository()
            self.mended.extend(making.done)
        elif not self._mend:
            command = f"git -C {_quoted(str(self._course.root))} config core.sharedRepository group"
            words = "core.sharedRepository is not group: what one instructor commits, others cannot add to"
            self.findings.append(Finding(str(place), owner, words, f"{owner} runs: {command}"))

    def _exchange(self, root: Path) -> None:
        with contextlib.suppress(OSError):
            status = os.stat(root)
            self._elsewhere.add((status.st_dev, status.st_ino))
            if _movable(status):
                self.findings.append(_movable_finding(root, status))
        for path, wanted in self._course.in_exchange:
            if os.path.islink(path.parent) and path.parent != root:
                return  # and so found already: nothing below it is the course's
            if self._mend and path.name != self._course.slug and not os.path.lexists(path):
                making = _Making(self._course)
                making.directory(path, wanted)
                self.mended.extend(making.done)
            self._top(path, wanted, _released, whole=path.name == "outbound")

    def _beside(self, gradebook: Path) -> None:
        """A gradebook that lies elsewhere, and its journals."""
        try:
            with trees.opened(gradebook.parent) as directory:
                for name in sorted(os.listdir(directory)):
                    if name.startswith(gradebook.name):
                        self._one(directory, name, str(gradebook.parent / name), lambda path: (None, INSTRUCTORS_FILE))
        except OSError as error:
            self._unreadable(str(gradebook.parent), error)

    def _top(self, path: Path, wanted: Wanted, below: _Rules, *, whole: bool) -> None:
        """A directory that must be there, and, if it is to be looked at as a whole, what is in it."""
        try:
            with _reached(path) as descriptor:
                status = os.fstat(descriptor)
                self._elsewhere.add((status.st_dev, status.st_ino))
                if not stat.S_ISDIR(status.st_mode):
                    what = "is a link" if stat.S_ISLNK(status.st_mode) else "is not a directory"
                    self.findings.append(Finding(str(path), shared.owner_name(status.st_uid), what, "look what it is"))
                    return
                self._judge(descriptor, None, str(path), wanted)
                if whole:
                    self._contents(descriptor, str(path), below, 0)
        except FileNotFoundError:
            command = "see: nbgrader-aalto course create --help"
            self.findings.append(Finding(str(path), "nobody", "is missing", command))
        except OSError as error:
            self._unreadable(str(path), error)

    def _contents(self, reached: int, path: str, rules: _Rules, depth: int) -> None:
        try:
            directory = os.open(f"/proc/self/fd/{reached}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            self._unreadable(path, error)
            return
        try:
            for name in sorted(os.listdir(directory)):
                if not _BEING_MADE.fullmatch(name):
                    self._one(directory, name, f"{path}/{name}", rules, depth)
        except OSError as error:
            self._unreadable(path, error)
        finally:
            os.close(directory)

    def _one(self, directory: int, name: str, path: str, rules: _Rules, depth: int = 0) -> None:
        try:
            with _reached(name, directory) as descriptor:
                status = os.fstat(descriptor)
                wanted_directory, wanted_file = rules(path)
                if stat.S_ISREG(status.st_mode):
                    self._judge(descriptor, (directory, name), path, wanted_file)
                if not stat.S_ISDIR(status.st_mode) or (status.st_dev, status.st_ino) in self._elsewhere:
                    return
                if wanted_directory:
                    self._judge(descriptor, None, path, wanted_directory)
                if depth >= _DEEPEST:
                    self.findings.append(
                        Finding(path, shared.owner_name(status.st_uid), "is too deep to be looked at", "move it higher")
                    )
                elif os.path.basename(path) != ".locks":  # who is at work: see `lock`
                    self._contents(descriptor, path, rules, depth + 1)
        except FileNotFoundError:
            return  # gone meanwhile: a course is alive
        except OSError as error:
            self._unreadable(path, error)

    def _unreadable(self, path: str, error: OSError) -> None:
        owner = "unknown"
        with contextlib.suppress(OSError):
            owner = shared.owner_name(os.lstat(path).st_uid)
        if not any(finding.path == path for finding in self.findings):
            self.findings.append(
                Finding(
                    path, owner, f"cannot be looked at: {error.strerror}", f"{owner} runs: nbgrader-aalto course repair"
                )
            )

    def _judge(self, descriptor: int, place: tuple[int, str] | None, path: str, wanted: Wanted) -> None:
        """Find what is wrong with what `descriptor` refers to; mend it if this is a repair. `place` is of a file."""
        status = os.fstat(descriptor)
        finding = _finding(path, status, self._course.gid, wanted)
        if finding is None:
            return
        if not self._mend:
            self.findings.append(finding)
            return
        try:
            self.mended.append(f"{printable(path)}: {self._mended(descriptor, place, path, status, wanted)}")
        except (OSError, _Left) as error:
            self.reasons[path] = f"not mended: {getattr(error, 'strerror', None) or error}"

    def _mended(
        self, descriptor: int, place: tuple[int, str] | None, path: str, status: os.stat_result, wanted: Wanted
    ) -> str:
        mode = stat.S_IMODE(status.st_mode)
        if place is not None and status.st_nlink != 1:
            raise _Left(f"it has {status.st_nlink} names (hard links), one of which may be no file of the course's")
        if status.st_uid == os.geteuid() or os.geteuid() == 0:
            shared.mend(descriptor, self._course.gid, wanted.of(mode))
            return f"mode {mode:o} is {stat.S_IMODE(os.fstat(descriptor).st_mode):o} now, group {self._course.group}"
        if place is None:
            raise _Left("only its owner, or root, can")
        relative = os.path.relpath(path, self._course.root).split(os.sep)
        if (self._gradebook and path.startswith(str(self._gradebook))) or relative[0] == "logs":
            raise _Left("somebody may have it open, so that a copy would lose what is written")
        _replace_by_copy(place, status, self._course.gid, wanted.of(mode) & 0o777)
        return f"replaced by a copy; it was {shared.owner_name(status.st_uid)}'s"


def _instructors(path: str, root: Path) -> tuple[Wanted | None, Wanted]:
    parts = os.path.relpath(path, root).split(os.sep)
    if parts[0] == "logs":
        return INSTRUCTORS, _LOG
    if ".git" in parts[:-1]:
        inside = parts[parts.index(".git") + 1 :]
        if inside[0] == "objects" or (len(inside) == 1 and inside[0] in _GIT_READ_ONLY):
            return INSTRUCTORS, _KEPT_BY_GIT
    return INSTRUCTORS, INSTRUCTORS_FILE


def _released(path: str) -> tuple[Wanted | None, Wanted]:
    return RELEASED, RELEASED_FILE


class _Left(Exception):
    """Why something is left as it is."""


def _replace_by_copy(place: tuple[int, str], seen: os.stat_result, gid: int, mode: int) -> None:
    """Put a copy of ours in the place of a file of somebody else's: content and times, in one step. Raises `OSError`,
    or `_Left` when it is being changed; then the file is as it was.
    """
    directory, name = place
    new = trees.beside(Path(name)).name
    source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    try:
        if not _same(os.fstat(source), seen):
            raise _Left("it is being changed")
        copy = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
        try:
            with open(source, "rb", closefd=False) as reader, open(copy, "r+b", closefd=False) as writer:
                shutil.copyfileobj(reader, writer, _CHUNK)
                writer.flush()
                os.fsync(copy)
                if not _equal(reader, writer):
                    raise _Left("it is being changed")
            if os.fstat(copy).st_mtime_ns - seen.st_mtime_ns < _RECENT_NS:  # both by the file server's clock
                raise _Left("it was changed a moment ago, and may be open for writing; run this again")
            shared.mend(copy, gid, mode)
            os.utime(copy, ns=(seen.st_atime_ns, seen.st_mtime_ns))
            if not _same(os.stat(name, dir_fd=directory, follow_symlinks=False), seen):
                raise _Left("it is being changed")
            os.rename(new, name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(new, dir_fd=directory)
            raise
        finally:
            os.close(copy)
    finally:
        os.close(source)


def _same(one: os.stat_result, other: os.stat_result) -> bool:
    names = ("st_dev", "st_ino", "st_mode", "st_size", "st_mtime_ns", "st_ctime_ns", "st_nlink")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def _equal(one: IO[bytes], other: IO[bytes]) -> bool:
    one.seek(0)
    other.seek(0)
    while True:
        left, right = one.read(_CHUNK), other.read(_CHUNK)
        if left != right or not left:
            return left == right


# finding a course


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
