"""Making a course: directories, gradebook, git repository, configuration. What is there already is kept."""

import contextlib
import dataclasses
import os
import shlex
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nbgrader_aalto import shared, trees
from nbgrader_aalto.course import (
    CONFIG,
    COURSE,
    INSTRUCTORS,
    INSTRUCTORS_FILE,
    Course,
    CourseError,
    Wanted,
    finding_of,
    is_movable,
    movable_finding,
    slug_problem,
)
from nbgrader_aalto.takeover import Inherited, committed, git

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
.*.dropped.*
.*.replaced
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
GIT_WRITTEN = ("COMMIT_EDITMSG", "FETCH_HEAD")
"""In .git; git makes these by the umask whatever core.sharedRepository says, and then writes into what is there: so a
colleague could not commit. Those that we make first stay the group's."""
_NO_LIMITS = trees.TreeLimits(1 << 62, 1 << 62, 1 << 62, 1 << 62)


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
    inherited = committed(course, old) if old else None
    making = Making(course)
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


class Making:
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
            descriptor = os.open(path, trees.REACHED | os.O_DIRECTORY)
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
            finding = finding_of(str(path), os.fstat(descriptor), gid, wanted)
            self.missing.extend([str(finding)] if finding else [])
        finally:
            os.close(descriptor)

    def _exchange_root(self, path: Path) -> None:
        status = os.stat(path)
        if is_movable(status):
            self.missing.append(str(movable_finding(path, status)))

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
                    with trees.reached(part, dir_fd=descriptor) as made:
                        shared.mend(made, self._course.gid, INSTRUCTORS.bits)
                descriptor = stack.enter_context(trees.opened(part, dir_fd=descriptor))
            yield descriptor

    def _new_file(self, name: str, parent: int, content: bytes) -> None:
        """Complete or not at all, and never over something: under a name of its own first, then link(2)."""
        new = trees.beside(Path(name)).name
        try:
            trees.write_file(new, content, dir_fd=parent, mode=0o600)
            with trees.reached(new, dir_fd=parent) as descriptor:
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
                git(Path(directory), "init", "--quiet", "--template=", "--shared=group", ".")
                for name in GIT_WRITTEN:
                    (Path(directory) / ".git" / name).touch()
                os.mkdir(new, 0o700)
                with trees.reached(new) as descriptor:
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
                if git(self._course.root, *setting).strip() not in {b"0", b"false", b"umask", b""}:
                    return
            git(self._course.root, *setting, "group")
            self.done.append(f"set core.sharedRepository to group in {place}")
        except CourseError as error:
            self.missing.append(f"{place} could not be set to be shared by the group: {error}")

    def inherit(self, inherited: "Inherited") -> None:
        """Put last year's files in, and leave alone what is there already."""
        made = sum(self.file(path, content, quiet=True) for path, content in inherited.files.items())
        self.done.extend(inherited.notes)
        if made:
            self.done.append(f"took {made} files over from {inherited.origin}")


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
