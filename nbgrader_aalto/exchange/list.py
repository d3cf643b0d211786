"""Listing: released assignments, one's own submissions with their feedback, and for instructors what is in inbound.

The dictionaries are nbgrader's (exchange/default/list.py), which the Assignment List and Formgrader read.
"""

import contextlib
import fnmatch
import functools
import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbgrader.exchange import default

from nbgrader_aalto import trees
from nbgrader_aalto.exchange.base import AaltoExchange, Places
from nbgrader_aalto.exchange.boxes import Outbox, OwnBoxes, feedback_name
from nbgrader_aalto.exchange.names import assignment_problem
from nbgrader_aalto.exchange.people import People, RegistryError
from nbgrader_aalto.exchange.receipts import ReceiptError, parse_receipt
from nbgrader_aalto.exchange.stamps import OddName, SubmissionName, parse_name

_REMOVED = ".being-removed"
"""In a submission that an instructor is removing."""


@dataclass(frozen=True)
class _Listed:
    """One assignment or submission that was found, before it is described."""

    course: str
    assignment: str
    path: Path
    student: str = ""
    timestamp: str = ""
    notebooks: tuple[str, ...] | None = None
    """Where the files are not at `path`: of a submission that only its feedback tells of."""
    feedback: dict[str, Path] = field(default_factory=dict)
    """Released feedback, by notebook."""


class ExchangeList(AaltoExchange, default.ExchangeList):
    """nbgrader's. A student lists the own submissions with `--cached`; `--inbound` is the instructors'."""

    def start(self) -> Any:
        """As in nbgrader; for Formgrader, which lists when it starts, this is where a shared course is prepared."""
        if self.coursedir is not None and self.coursedir.course_id and self.is_member():
            self.prepare_course()
        return super().start()

    def init_dest(self) -> None:
        """Find what matches."""
        student = self.coursedir.student_id or "*"
        assignment = self.coursedir.assignment_id or "*"
        self.found: list[_Listed] = []
        for course in self._courses():
            places = Places(Path(self.root) / course)
            if self.inbound:
                found = self._inbound(course, places)
            elif self.cached:
                found = self._cached(course, places)
            else:
                found = self._released(course, places)
            self.found += [
                one
                for one in found
                if fnmatch.fnmatchcase(one.assignment, assignment)
                and (not one.student or fnmatch.fnmatchcase(one.student, student))
            ]
        self.assignments = [str(one.path) for one in self.found]

    def _courses(self) -> list[str]:
        """The configured course, or all that somebody could be in."""
        if self.coursedir.course_id:
            return [self.coursedir.course_id]
        names: set[str] = set()
        with contextlib.suppress(OSError):
            names |= set(os.listdir(self.cache if self.cached else self.root))
        return sorted(name for name in names if not name.startswith("."))

    def _released(self, course: str, places: Places) -> Iterator[_Listed]:
        with contextlib.suppress(OSError):
            for name in sorted(os.listdir(places.outbound)):
                if not name.startswith("."):
                    yield _Listed(course, name, places.outbound / name)

    def _inbound(self, course: str, places: Places) -> Iterator[_Listed]:
        try:
            names = sorted(os.listdir(places.inbound))
        except FileNotFoundError:
            return
        except OSError as error:
            self.log.warning(
                "%s: %s. Instructors list what was submitted; for what you submitted: nbgrader list --cached",
                places.inbound,
                error.strerror,
            )
            return
        released, people = Outbox(self.open_vault().path), self.people()
        files_of = functools.cache(released.files)
        for name in names:
            path = places.inbound / name
            if name.startswith("."):
                continue
            try:
                claim = parse_name(name)
                if not fnmatch.fnmatchcase(claim.assignment, self.coursedir.assignment_id or "*"):
                    continue
                if problem := assignment_problem(claim.assignment):
                    raise OddName(f"is for an assignment of an odd name: {problem}")
                student = self._owner(claim, path, people)
                if not os.listdir(path):
                    continue  # removed by an instructor who does not own it
            except (OddName, OSError, RegistryError) as error:
                self.log.warning("Not a submission: %r: %s", name, error)
                continue
            files = files_of(student)
            yield _Listed(
                course,
                claim.assignment,
                path,
                student,
                claim.timestamp,
                feedback={
                    notebook: released.path / student / name
                    for notebook in self._notebooks(path)
                    if (name := feedback_name(claim.assignment, claim.timestamp, notebook)) in files
                },
            )

    def _owner(self, claim: SubmissionName, path: Path, people: People) -> str:
        """Whose a submission is: the name counts only if it says the same as the owner, or is an instructor's."""
        status = os.lstat(path)
        if not stat.S_ISDIR(status.st_mode):
            raise OddName("is not a directory")
        if self.identity == "shared":
            return claim.user
        owner = people.username(status.st_uid)
        if owner != claim.user and not people.is_instructor(status.st_uid):
            raise OddName(f"belongs to {owner or f'uid {status.st_uid}, whom the registry does not know'}")
        return claim.user

    def _cached(self, course: str, places: Places) -> Iterator[_Listed]:
        """One's own submissions, and what was collected or graded without one."""
        boxes = OwnBoxes(places.feedback, Path(self.cache), course, hidden=self.identity == "unix")
        if self.coursedir.course_id:
            self.ensure_box()
        feedback: dict[tuple[str, str], dict[str, Path]] = {}
        for one in boxes.feedback():
            feedback.setdefault((one.assignment, one.timestamp), {})[one.notebook] = one.path
        times, others = self._confirmed(boxes)
        shown: set[tuple[str, str]] = set()
        directory = Path(self.cache) / course
        with contextlib.suppress(OSError):
            for name in sorted(os.listdir(directory)):
                with contextlib.suppress(OddName):
                    claim = parse_name(name)
                    key = claim.assignment, times.get((claim.assignment, claim.timestamp), claim.timestamp)
                    shown.add(key)
                    yield _Listed(
                        course,
                        claim.assignment,
                        directory / name,
                        claim.user,
                        key[1],
                        feedback=feedback.get(key, {}),
                    )
        for key in sorted((feedback.keys() | others.keys()) - shown):
            notebooks = others.get(key) or tuple(sorted(feedback.get(key, {})))
            user = self.username()
            yield _Listed(course, key[0], places.feedback, user, key[1], notebooks, feedback.get(key, {}))

    def _confirmed(self, boxes: OwnBoxes) -> tuple[dict[tuple[str, str], str], dict[tuple[str, str], tuple[str, ...]]]:
        """From the receipts in one's boxes: (assignment, time in the name) -> official time, and its notebooks."""
        times: dict[tuple[str, str], str] = {}
        notebooks: dict[tuple[str, str], tuple[str, ...]] = {}
        for name, (_, raw) in boxes.receipts().items():
            with contextlib.suppress(ReceiptError, OddName):
                receipt, claim = parse_receipt(raw), parse_name(name)
                times[claim.assignment, claim.timestamp] = receipt.time
                notebooks[claim.assignment, receipt.time] = tuple(
                    file.path.removesuffix(".ipynb")
                    for file in receipt.files
                    if file.path.endswith(".ipynb") and "/" not in file.path
                )
        return times, notebooks

    def _notebooks(self, path: Path) -> list[str]:
        with contextlib.suppress(OSError):
            return sorted(
                name.removesuffix(".ipynb")
                for name in os.listdir(path)
                if name.endswith(".ipynb") and not name.startswith(".")
            )
        return []

    def parse_assignments(self) -> list[dict[str, Any]]:
        """nbgrader's dictionaries; submissions are grouped by course, student and assignment."""
        courses = (
            self.authenticator.get_student_courses(self.coursedir.student_id)
            if self.coursedir.student_id and self.authenticator is not None
            else None
        )
        found = [one for one in self.found if courses is None or one.course in courses]
        described = [self._describe(one) for one in found]
        if not (self.inbound or self.cached):
            return described
        groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
        for info in described:
            groups.setdefault((info["course_id"], info["student_id"], info["assignment_id"]), []).append(info)
        return [
            {
                "course_id": course,
                "student_id": student,
                "assignment_id": assignment,
                "status": submissions[0]["status"],
                "submissions": sorted(submissions, key=lambda info: info["timestamp"]),
            }
            for (course, student, assignment), submissions in sorted(groups.items())
        ]

    def _describe(self, one: _Listed) -> dict[str, Any]:
        own = Path(self.assignment_dir, *([one.course] if self.path_includes_course else []), one.assignment)
        info: dict[str, Any] = {"course_id": one.course, "assignment_id": one.assignment}
        submitted = self.inbound or self.cached
        if submitted:
            info |= {
                "student_id": one.student,
                "timestamp": one.timestamp,
                "status": "submitted",
                "path": str(one.path),
            }
        elif own.exists():
            info |= {"status": "fetched", "path": os.path.abspath(own)}
        else:
            info |= {"status": "released", "path": str(one.path)}
        if self.remove:
            info["status"] = "removed"
        notebooks = list(one.notebooks) if one.notebooks is not None else self._notebooks(Path(info["path"]))
        if not notebooks:
            self.log.warning("No notebooks found in %s", info["path"])
        info["notebooks"] = [
            {"notebook_id": name, "path": os.path.abspath(os.path.join(info["path"], f"{name}.ipynb"))}
            for name in notebooks
        ]
        if info["status"] == "submitted":
            local = own / "feedback" / one.timestamp
            for notebook in info["notebooks"]:
                notebook |= _feedback_state(local / f"{notebook['notebook_id']}.html", one.feedback, notebook)
            states = info["notebooks"]
            info["has_local_feedback"] = bool(states) and all(n["has_local_feedback"] for n in states)
            info["has_exchange_feedback"] = bool(states) and all(n["has_exchange_feedback"] for n in states)
            info["feedback_updated"] = any(n["feedback_updated"] for n in states)
            info["local_feedback_path"] = os.path.abspath(local) if info["has_local_feedback"] else None
        return info

    def remove_files(self) -> list[dict[str, Any]]:
        """List and remove; any instructor can, while nobody collects or releases. Raises `ExchangeError`."""
        assignments = self.parse_assignments()
        self.log.info(
            "Removing submitted assignments:" if self.inbound or self.cached else "Removing released assignments:"
        )
        for assignment in assignments:
            for info in assignment.get("submissions", [assignment]):
                describe = self.format_inbound_assignment if "student_id" in info else self.format_outbound_assignment
                self.log.info(describe(info))
        found = [one.path for one in self.found if one.notebooks is None]
        at_work = not self.cached and self.is_member()  # a student has no place for locks
        with self.locked("removing assignments") if at_work else contextlib.nullcontext():
            for path in found:
                try:
                    left = self._remove(path)
                except OSError as error:
                    left = [f"{path}: {error.strerror}"]
                for line in left:
                    self.log.error("Not removed: %s", line)
        return assignments

    def _remove(self, path: Path) -> list[str]:
        """Returns what is left. What was released is gone in one step: nobody fetches half of it. Raises `OSError`."""
        if self.inbound:
            return _emptied(path)
        if self.cached:
            return trees.remove(path)
        aside = trees.beside(path)
        os.rename(path, aside)
        return trees.remove(aside)


def _emptied(submission: Path) -> list[str]:
    """Remove what is in a submission; the directory itself where that may be: inbound is sticky, only its owner can.

    First of all a file of ours is put there, and it goes last: half of a submission is then one that holds files of
    somebody else, and is not taken in, even if this is killed.
    """
    mark = submission / _REMOVED
    if not os.path.lexists(mark):
        trees.write_file(mark, b"", mode=0o660)
    left: list[str] = []
    for entry in [Path(entry) for entry in os.scandir(submission) if entry.name != _REMOVED]:
        if entry.is_dir() and not entry.is_symlink():
            left += trees.remove(entry)
        else:
            try:
                os.unlink(entry)
            except OSError as error:
                left.append(f"{entry}: {error.strerror}")
    if not left:
        os.unlink(mark)
        with contextlib.suppress(OSError):
            os.rmdir(submission)
    return left


def _feedback_state(local: Path, released: dict[str, Path], notebook: dict[str, Any]) -> dict[str, Any]:
    there, here = released.get(notebook["notebook_id"]), local.is_file()
    return {
        "has_local_feedback": here,
        "has_exchange_feedback": there is not None,
        "local_feedback_path": str(local) if here else None,
        "feedback_updated": here and there is not None and _digest(local) != _digest(there),
    }


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""
