"""What the seven exchange operations share: settings, places, and what must hold before any of them runs.

The exchange is a directory tree on a POSIX file system; people are Unix users, instructors the members of the
group of the exchange's course directory:

    <root>/                       the administrator's; nobody can move a course's directory away
    <root>/<course>/              2775, group of the course
    <root>/<course>/outbound/     2775, released assignments
    <root>/<course>/inbound/      3773, submissions: 2770, of the student and the group
    <root>/<course>/feedback/     3773, boxes: 2770, of the student and the group (`boxes`)

Hiding comes from these owners and modes and from nothing else. Where one of them is not as it must be, the
operation refuses and says what to do. Another backend for sites where everybody has one uid would take the place
of the modules below this one (`vault.take_in`, `boxes`, `deposit`), not of the seven classes.
"""

import contextlib
import dataclasses
import grp
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbgrader.exchange import default
from nbgrader.utils import get_osusername, get_username
from traitlets import Bool, Enum, Float, Integer, List, Unicode

from nbgrader_aalto import deposit, lock, shared, trees, turns
from nbgrader_aalto.exchange.boxes import OwnBoxes
from nbgrader_aalto.exchange.names import student_problem
from nbgrader_aalto.exchange.people import People, RegistryError
from nbgrader_aalto.exchange.vault import Vault

COURSE_MODE, OUTBOUND_MODE, HIDDEN_MODE = 0o2775, 0o2775, 0o3773
RELEASED_DIRECTORY, RELEASED_FILE = 0o2775, 0o664


@dataclasses.dataclass(frozen=True)
class Places:
    """The directories of one course in the exchange."""

    course: Path

    @property
    def outbound(self) -> Path:
        """Released assignments."""
        return self.course / "outbound"

    @property
    def inbound(self) -> Path:
        """Submissions."""
        return self.course / "inbound"

    @property
    def feedback(self) -> Path:
        """Students' boxes."""
        return self.course / "feedback"


class AaltoExchange(default.Exchange):
    """Settings of the exchange, for each of its operations. `c.Exchange.*` keeps its meaning beside them."""

    identity = Enum(
        ["unix", "shared"],
        "unix",
        help="""Who a person is: 'unix', a real Unix user of his or her own; or 'shared', where everybody has the
        same uid (jovyan) and is told apart by JUPYTERHUB_USER. With 'shared' a file system can hide nothing and
        prove nothing: see accept_readable_submissions.""",
    ).tag(config=True)
    accept_readable_submissions = Bool(
        False,
        help="""The administrator's word that, with identity = 'shared', every student can read, change and delete
        every submission and all feedback of the course. Without it nothing runs.""",
    ).tag(config=True)
    registry = Unicode(
        "nss",
        help="""Where usernames and uids are looked up: 'nss'; 'file:/PATH', lines as in /etc/passwd, written by the
        hub for containers that know no other users; or 'command:ARGV', run with the uid or the username as last
        argument (as in 'command:getent passwd').""",
    ).tag(config=True)
    group = Unicode(
        "jupyter-{course_id}",
        help="""The Unix group of the course's instructors. Where a group of this name exists, the exchange's course
        directory must belong to it.""",
    ).tag(config=True)
    instructors = List(
        Unicode(),
        help="""Usernames that count as instructors although the registry of groups here does not list them: they may
        submit on behalf of students.""",
    ).tag(config=True)
    vault = Unicode(
        "vault", help="Directory, relative to the course's, in which all collected submissions are kept."
    ).tag(config=True)
    max_entries = Integer(10_000, help="Most files and directories in one submission.").tag(config=True)
    max_tree_depth = Integer(32, help="Most directories inside one another in one submission.").tag(config=True)
    max_kept = Integer(
        1000,
        help="""Most submissions of one student to one assignment in the vault. A submission that is changed afterwards
        is kept as another one. What comes after that is held in inbound and reported.""",
    ).tag(config=True)
    max_kept_size = Integer(
        0,
        help="""Most kilobytes of one student's submissions to one assignment in the vault; 0 for 50 times
        CourseDirectory.max_dir_size.""",
    ).tag(config=True)
    lock_seconds = Float(
        60.0, help="How long to wait for a colleague who is at the same work before giving up and saying who it is."
    ).tag(config=True)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        directory = os.path.expanduser(self.assignment_dir)
        self.set_trait("assignment_dir", directory)
        if os.path.isabs(directory):
            with contextlib.suppress(OSError):  # the Assignment List enters it before anything of ours is called
                os.makedirs(directory, exist_ok=True)

    def start(self) -> Any:
        """Refuse where the exchange cannot hide what it must, then do what nbgrader does."""
        if self.coursedir is not None and self.coursedir.course_id:
            self._refuse_unhidden()
            self._refuse_movable()
        return super().start()

    def ensure_root(self) -> None:
        """Stock wants a root that everybody can write to, and so move a course away; we want one that exists."""
        if not os.path.isdir(self.root):
            self.fail(
                f"The exchange {self.root} does not exist; an administrator makes it (nbgrader-aalto course create)"
            )

    def refuse_file_system_root(self) -> None:
        """A Jupyter server whose root is `/` would put assignments there."""
        if os.path.abspath(self.assignment_dir) == "/":
            self.fail(
                "Assignments would lie in '/'. Where the server starts in '/', the administrator says where each "
                "assignments are: c.Exchange.assignment_dir = '~/notebooks' or another absolute path"
            )

    @property
    def places(self) -> Places:
        """Of the course that is configured."""
        return Places(Path(self.root) / self.coursedir.course_id)

    @property
    def course_gid(self) -> int | None:
        """The group of the course's instructors, None if the course is not in the exchange yet."""
        with contextlib.suppress(OSError):
            return os.stat(self.places.course).st_gid
        return None

    def people(self) -> People:
        """The registry of users. Raises `ExchangeError`."""
        try:
            return People(self.registry, self.course_gid, self.instructors)
        except RegistryError as error:
            self.fail(str(error))
            raise

    def tree_limits(self) -> trees.TreeLimits:
        """For one submission. nbgrader's kilobytes have 1,000 bytes."""
        return trees.TreeLimits(
            file_bytes=1000 * self.coursedir.max_file_size,
            tree_bytes=1000 * self.coursedir.max_dir_size,
            entries=self.max_entries,
            depth=self.max_tree_depth,
        )

    def selection(self) -> trees.Selection:
        """Which files nbgrader copies."""
        return trees.Selection(tuple(self.coursedir.ignore), tuple(self.coursedir.include))

    def open_vault(self) -> Vault:
        """The course's vault."""
        return Vault(Path(self.coursedir.root) / self.vault)

    def no_limits(self) -> trees.TreeLimits:
        """For what instructors made."""
        return trees.TreeLimits(1 << 62, 1 << 62, 1 << 62, 1 << 62)

    def own_boxes(self) -> OwnBoxes:
        """The boxes of whoever runs this."""
        hidden = self.identity == "unix"
        return OwnBoxes(self.places.feedback, Path(self.cache), self.coursedir.course_id, hidden=hidden)

    def ensure_box(self) -> None:
        """Make a box for a student who has none. Instructors need none but for submissions of their own."""
        if self.identity == "unix" and self.is_member():
            return
        try:
            self.own_boxes().ensure(self.username())
        except (OSError, deposit.DepositError) as error:
            self.log.error("No box for your feedback could be made in %s: %s", self.places.feedback, error)

    def prepare_course(self) -> None:
        """Umask and gradebook of a course that several instructors share."""
        try:
            shared.prepare(Path(self.coursedir.root), self.coursedir.db_url, self.coursedir.groupshared)
        except shared.NotShared as error:
            self.fail(str(error))

    @contextlib.contextmanager
    def locked(self, purpose: str) -> Iterator[lock.Lock]:
        """The one lock of what a course has in the exchange and in the vault.

        Raises `ExchangeError` if somebody else holds it, took it over, or no lock can be made.
        """
        directory = Path(self.coursedir.root) / turns.LOCKS
        try:
            with lock.locked(
                directory, turns.EXCHANGE, purpose, wait_seconds=self.lock_seconds, log=self.log.warning
            ) as held:
                yield held
        except (lock.Busy, lock.LockLost) as error:
            self.fail(str(error))
        except OSError as error:
            self.fail(f"{purpose}: {error.filename or directory}: {error.strerror}. See `nbgrader-aalto course check`")

    def username(self) -> str:
        """Of whoever runs this. With identity 'shared' only the hub's word for it. Raises `ExchangeError`."""
        if self.identity == "unix":
            return str(get_username())
        name = os.environ.get("JUPYTERHUB_USER", "")
        if problem := student_problem(name):
            self.fail(
                f"Who are you? JUPYTERHUB_USER is {name!r}, and nothing else tells (identity 'shared'): {problem}"
            )
        return name

    def is_member(self) -> bool:
        """Whether this process is one of the course's instructors; with identity 'shared' everybody may be."""
        return self.course_gid in {os.getegid(), *os.getgroups()}

    def _refuse_unhidden(self) -> None:
        if self.identity == "shared":
            if not self.accept_readable_submissions:
                self.fail(
                    "c.AaltoExchange.identity is 'shared': everybody has one uid, so every student can read, change "
                    "and delete every submission. The administrator accepts that by name with "
                    "c.AaltoExchange.accept_readable_submissions = True, or gives each person a Unix user"
                )
            self.log.warning("Submissions of this course can be read and changed by every student (identity 'shared')")
            return
        hub_user = os.environ.get("JUPYTERHUB_USER")
        if hub_user and get_osusername() == "jovyan" != hub_user:
            self.fail(
                f"You are {hub_user}, but this server runs everybody as 'jovyan', so that submissions cannot be hidden "
                "nor their owners known; see c.AaltoExchange.identity"
            )

    def _refuse_movable(self) -> None:
        """A directory that somebody else can move away, or put another in the place of, is not the course's."""
        root = self._status(Path(self.root))
        if root is None:
            return
        if root.st_mode & stat.S_IWOTH and not root.st_mode & stat.S_ISVTX and root.st_uid != os.geteuid():
            self.fail(
                f"Anybody can move the courses in {self.root} away. Its owner {shared.owner_name(root.st_uid)} runs: "
                f"chmod +t '{self.root}'"
            )
        course = self._status(self.places.course)
        if course is None:
            return
        if course.st_mode & stat.S_IWOTH:
            self.fail(
                f"Anybody can change {self.places.course}. Its owner {shared.owner_name(course.st_uid)} runs: "
                f"chmod o-w '{self.places.course}'"
            )
        expected = self._expected_gid()
        if expected is not None and course.st_gid != expected:
            found, wanted = shared.group_name(course.st_gid), shared.group_name(expected)
            self.fail(
                f"{self.places.course} belongs to the group {found} and not to {wanted}: it is not the "
                "course's, or was made by hand. See `nbgrader-aalto course check`; or set c.AaltoExchange.group"
            )

    def _refuse_common_group(self, path: str, gid: int) -> None:
        """A group of several people that is not the course's may hold students, who could then read everything."""
        if self.identity == "shared" or gid == self._expected_gid():
            return
        members = {entry.pw_name for entry in pwd.getpwall() if entry.pw_gid == gid}
        with contextlib.suppress(KeyError):
            members |= set(grp.getgrgid(gid).gr_mem)
        others = sorted(members - set(self.instructors) - {get_osusername()})
        if not others:
            return
        group = shared.group_name(gid)
        words = f"{path} belongs to the group {group}, so that {', '.join(others[:5])} can read all submissions"
        if self.coursedir.groupshared:  # the course's own word that this is the instructors' group
            self.log.warning("%s. If they are instructors, set c.AaltoExchange.group to its name", words)
            return
        group = self.group.format(course_id=self.coursedir.course_id)
        self.fail(
            f"{words}. Make a group of the instructors, {group} (nbgrader-aalto course create), or set "
            "c.AaltoExchange.group to the name of this one if they are instructors"
        )

    def _expected_gid(self) -> int | None:
        with contextlib.suppress(KeyError):
            return grp.getgrnam(self.group.format(course_id=self.coursedir.course_id)).gr_gid
        return None

    def _status(self, path: Path) -> os.stat_result | None:
        """lstat(2) of a directory; None if there is none. Raises `ExchangeError` for anything else."""
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self.fail(f"{path}: {error.strerror}")
            raise
        if stat.S_ISLNK(status.st_mode) and path == Path(self.root):
            status = os.stat(path)  # the administrator's own link
        if not stat.S_ISDIR(status.st_mode):
            self.fail(f"{path} is not a directory")
        return status
