"""An earlier course's source and settings, out of its git, without any student's data.

Refuses to look at anything but committed objects: whatever else lies there may be a student's.
"""

import ast
import dataclasses
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nbgrader_aalto.course import (
    CONFIG,
    Course,
    CourseError,
    printable,
)

_LEFT_BY_STUDENTS = frozenset({"submitted", "autograded", "feedback", "vault", ".ipynb_checkpoints"})
OLD_CONFIG = "nbgrader_config.old.py"


@dataclasses.dataclass(frozen=True)
class Inherited:
    origin: str
    files: dict[str, bytes]
    config: str
    """The earlier one for the new course; empty where that was not safe, or there was none."""
    notes: tuple[str, ...]


def committed(course: Course, old: Path) -> Inherited:
    """source/, *.md and the settings of the last commit, and nothing else, whatever was committed.

    The objects themselves, so that no filter, hook or attribute of the repository's has a say.
    """
    if not old.is_dir():
        raise CourseError(f"{old} is not a directory")
    if course.root.is_dir() and os.path.samefile(old, course.root):
        raise CourseError(f"{old} is this course itself")
    try:
        commit = git(old, "rev-parse", "--verify", "--quiet", "HEAD^{commit}").decode().strip()
        chosen, left_out = _chosen(git(old, "ls-tree", "-r", "-z", commit))
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
    return Inherited(f"{old} (commit {commit[:12]})", blobs, config, tuple(notes))


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
    output = git(repository, "cat-file", "--batch", input="".join(f"{name}\n" for name in names).encode())
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


def git(directory: Path, *arguments: str, input: bytes = b"") -> bytes:
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
