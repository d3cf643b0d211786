"""Several instructors in one course directory: who is one, which umask, whose gradebook.

A shared course is one with `c.CourseDirectory.groupshared`, or whose directory is setgid and group-writable. Its
instructors are the members of that directory's group. `prepare` is called before every operation of nbgrader's
that writes there; for students, and in courses of one instructor, it changes nothing.

Standard library only. Knows `CourseDirectory`'s settings and Unix modes; refuses to know the exchange.
"""

import contextlib
import grp
import os
import pwd
import shlex
import stat
from pathlib import Path

UMASK = 0o007
GRADEBOOK_MODE = 0o660
_SQLITE = "sqlite:///"
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_REACHED = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class NotShared(Exception):
    """Something in the course directory cannot be used by its instructors; says who can mend it, and how."""


def is_shared(root: Path, groupshared: bool) -> bool:
    """Whether several instructors work in this course directory."""
    try:
        mode = os.stat(root).st_mode
    except OSError:
        return False
    return groupshared or bool(mode & stat.S_ISGID and mode & stat.S_IWGRP)


def is_instructor(gid: int) -> bool:
    """Whether this process is a member of the course's group, which is the group of the course directory."""
    return gid in {os.getegid(), *os.getgroups()}


def prepare(root: Path, db_url: str, groupshared: bool) -> None:
    """Set this process' umask to 007 and see to the gradebook, for an instructor of a shared course.

    SQLite makes a database with 0644 at any umask, and its journals with the database's mode: so an empty file of
    0660, which is an empty database, is made first. Raises `NotShared` when a gradebook of somebody else's cannot
    be written to. Cheap, and the same when repeated.

    A directory where the group may not write is nobody's shared course, whatever `groupshared` says: nbgrader takes
    the working directory when none is configured, and that may be the home of a student.
    """
    try:
        status = os.stat(root)
    except OSError:
        return
    if not is_shared(root, groupshared) or not status.st_mode & stat.S_IWGRP or not is_instructor(status.st_gid):
        return
    os.umask(UMASK)
    if path := gradebook(db_url):
        _share_gradebook(path, status.st_gid)


def gradebook(db_url: str) -> Path | None:
    """The file of a gradebook, None if it is a server's, or relative to wherever nbgrader is started."""
    path = Path(db_url.removeprefix(_SQLITE))
    return path if db_url.startswith(_SQLITE) and path.is_absolute() else None


def logfile(root: str | Path) -> str:
    """For `c.NbGrader.logfile`: this instructor's own in the course directory; empty, no log, for everybody else.

    Lines of several processes that append to one file get mixed up, above all on NFS.
    """
    directory = os.path.join(root, "logs")
    path = os.path.join(directory, f"{owner_name(os.geteuid()).replace(os.sep, '_')}.log")
    writable = os.access(path if os.path.lexists(path) else directory, os.W_OK)
    return path if writable and not os.path.islink(path) else ""


def owner_name(uid: int) -> str:
    """The username, or the number of an unknown one."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def group_name(gid: int) -> str:
    """The name of the group, or the number of an unknown one, as chgrp(1) takes it."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def is_member(uid: int, gid: int) -> bool:
    """Whether a user is a member of a group, as far as is known here."""
    try:
        entry = pwd.getpwuid(uid)
        return entry.pw_gid == gid or entry.pw_name in grp.getgrgid(gid).gr_mem
    except KeyError:
        return False


def mend(descriptor: int, gid: int, mode: int) -> None:
    """Give what `descriptor` (of any kind, O_PATH too) refers to this group and mode. Raises `OSError`."""
    place = f"/proc/self/fd/{descriptor}"
    if os.fstat(descriptor).st_gid != gid:
        os.chown(place, -1, gid)
    if stat.S_IMODE(os.fstat(descriptor).st_mode) != mode:
        os.chmod(place, mode)


def _share_gradebook(path: Path, gid: int) -> None:
    try:
        descriptor = os.open(path, _NEW_FILE, GRADEBOOK_MODE)
    except FileExistsError:
        _share_existing(path, gid)
        return
    except OSError:
        return  # whoever opens the gradebook next says what is wrong with the directory
    try:
        mend(descriptor, gid, GRADEBOOK_MODE)
    finally:
        os.close(descriptor)


def _share_existing(path: Path, gid: int) -> None:
    try:
        descriptor = os.open(path, _REACHED)
    except OSError:
        return
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return
        mode = stat.S_IMODE(status.st_mode)
        if status.st_uid == os.geteuid():
            if mode & GRADEBOOK_MODE != GRADEBOOK_MODE or status.st_gid != gid:
                with contextlib.suppress(OSError):  # a read-only file system, say: the database's error is clearer
                    mend(descriptor, gid, mode | GRADEBOOK_MODE)
            return
    finally:
        os.close(descriptor)
    if not os.access(path, os.R_OK | os.W_OK):
        quoted, group = shlex.quote(str(path)), group_name(gid)
        command = f"chmod g+rw {quoted}"
        if status.st_gid != gid:
            command = f"chgrp {group} {quoted} && {command}"
        raise NotShared(
            f"The gradebook {path} cannot be written to by you. Its owner {owner_name(status.st_uid)} runs: {command}\n"
            "or `nbgrader-aalto course repair`, which mends all that he or she owns in the course"
        )


def share(root: Path, dest: Path, file_mode: int | None = None) -> list[str]:
    """Let all instructors of a shared course write to everything below `dest`, and to the directories on the way.

    Directories become setgid and g+rwx, files g+rw on top of `file_mode` or of what they have (files of students come
    with their own), all with the group of the course directory. Nothing is followed. Returns what could not be.
    """
    gid = os.stat(root).st_gid
    way = [path for path in reversed(dest.parents) if root in path.parents]
    below = [Path(top) / name for top, _, files in os.walk(dest) for name in (".", *files)]
    return [line for path in [*way, *below] if (line := _share_one(path, gid, file_mode))]


def _share_one(path: Path, gid: int, file_mode: int | None) -> str:
    try:
        descriptor = os.open(path, _REACHED)
    except OSError as error:
        return explain(error)
    try:
        status = os.fstat(descriptor)
        mode = stat.S_IMODE(status.st_mode)
        if stat.S_ISDIR(status.st_mode):
            needed, wanted = 0o2070, mode | 0o2770
        elif stat.S_ISREG(status.st_mode):
            needed, wanted = 0o060, (mode if file_mode is None else file_mode) | 0o660
        else:
            return ""
        try:
            mend(descriptor, gid, wanted)
        except OSError:
            if mode & needed == needed and status.st_gid == gid:
                return ""  # a colleague's, and as it must be
            owner = owner_name(status.st_uid)
            return f"{path} belongs to {owner}, and the other instructors cannot write to it; {_repair(owner)}"
    finally:
        os.close(descriptor)
    return ""


def explain(error: OSError) -> str:
    """What happened, with the path; if it was not permitted, whose it is and what to do."""
    if not isinstance(error, PermissionError) or not error.filename:
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    path = Path(os.fsdecode(error.filename))
    # what may be done to a name is up to its directory
    culprit = path if os.access(path.parent, os.W_OK | os.X_OK) else path.parent
    try:
        owner = owner_name(os.lstat(culprit).st_uid)
    except OSError:
        return f"{path}: {error.strerror}"
    return f"{path}: {error.strerror}. {culprit} belongs to {owner}; {_repair(owner)}"


def _repair(owner: str) -> str:
    return f"{owner} runs `nbgrader-aalto course repair`, or you, which mends what can be mended without {owner}"
