"""The checks on one submission: what may lie in it, and what nbgrader may be given to read.

`inspect_submission` looks at a submission without following a link or waiting for anything, and never changes
it. It knows files, JSON and nbgrader's metadata; it refuses to know how nbgrader is run (see `intake`).

Links, FIFOs, sockets, devices and odd names are refused everywhere, also in what nbgrader ignores
(`CourseDirectory.ignore`): whether stock ignores a file depends on globbing its path, which a directory
called ``d[1]`` defeats. Sizes count only for what nbgrader copies or parses.

Between the inspection and nbgrader's copying lies some time. `submitted/` must therefore belong to the
instructors, as it does after ``nbgrader collect``; who can write there can swap a file after it was seen.
"""

import fnmatch
import json
import os
import re
import stat
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

import dateutil.parser
import nbformat
from nbformat.validator import get_validator, normalize
from nbgrader.nbgraderformat import SCHEMA_VERSION
from nbgrader.utils import parse_utc

from nbgrader_aalto.remains import is_reserved

MAX_REFUSALS = 20  # of one submission: enough to see what is wrong, and a million links stay a short message
MAX_PATH_BYTES = 1024  # relative; far below PATH_MAX (4096), which the longer path in autograded/ must not reach
MAX_TIMESTAMP_BYTES = 100
# nbformat explains what is wrong with an invalid notebook by jsonschema, at 55 kB and 1 ms per bad value
# (a 400 kB notebook took 5.4 GB and 95 s); a valid one costs a hundredth of that.
MAX_INVALID_VALUES = 50_000
MAX_INVALID_CELL_VALUES = 2_000

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO (named pipe)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
    stat.S_IFREG: "a regular file",
}
_GLOB = re.compile(r"[*?\[]")
# control characters, line separators, bidirectional embeddings, overrides and isolates, non-UTF-8 bytes
BAD_NAME = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# dateutil opens a zone that is a path, so no component may lead out of the zone database
_TIMESTAMP = re.compile(r"(?!.*\.\.)(?!.*(?:^|[ :])/)[0-9A-Za-z :.,+/_-]*")
# One match: what is not structure, strings included, then one structural byte or the end. The possessive
# quantifiers (Python 3.11) make it linear for every input.
_STRUCTURE = re.compile(rb'(?:[^"\[\]{},]++|"(?:[^"\\]++|\\.)*+"?)*+([\[\]{},]|\Z)', re.DOTALL)
# what nbformat, which checks little before it uses it, raises for a notebook of a wrong shape
_UNREADABLE = (
    *(nbformat.ValidationError, ArithmeticError, AssertionError, AttributeError),
    *(LookupError, RecursionError, TypeError, ValueError),
)

_AGAIN = "Ask the student to submit it again, or repair it in submitted/"
_BY_HAND = "Look at it with `ls -l`; put a regular file in its place, or remove it"
_SMALLER = "Ask for a smaller submission, or raise the limit {} in nbgrader_config.py"


@dataclass(frozen=True)
class IntakeLimits:
    """What a submission may have. The help texts of `IntakeExporter` give the reasons for the defaults."""

    max_notebook_bytes: int = 50_000_000
    max_notebook_values: int = 250_000
    max_notebook_depth: int = 100
    max_file_bytes: int = 100_000_000
    max_tree_bytes: int = 100_000_000
    max_entries: int = 10_000
    max_tree_depth: int = 32
    allow_hard_links: bool = False


@dataclass(frozen=True)
class Refusal:
    """Why one file keeps a submission from being graded, in words that can be printed anywhere."""

    file: str
    reason: str
    advice: str

    def __str__(self) -> str:
        return f"{self.file} {self.reason}. {self.advice}."


class Unfit(Exception):
    """One file cannot be accepted: the arguments are the reason and the advice."""

    def __init__(self, reason: str, advice: str = _AGAIN) -> None:
        super().__init__(reason, advice)
        self.reason, self.advice = printable(reason), advice


class _Enough(Exception):
    """There is no use in looking at more of the tree."""


def printable(text: str, limit: int = 300) -> str:
    """`text` with everything escaped that a terminal, a log or a page may take for something else."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:limit])


def inspect_submission(
    base: Path,
    inside: PurePosixPath,
    notebooks: Collection[str],
    limits: IntakeLimits,
    ignore: Sequence[str] = (),
) -> list[Refusal]:
    """Look at the submission in `base`/`inside`; an empty list means that nbgrader may read it.

    `base` is the instructors' and may be reached through links; no component of `inside` may be one.
    `notebooks` are the names of the files that nbgrader will parse; `ignore` is `CourseDirectory.ignore`.
    Nothing is raised for what a submission holds, nor for a file that cannot be read.
    """
    patterns = () if _GLOB.search(str(base / inside)) else (*ignore, "*.ipynb")
    inspection = _Inspection(notebooks, limits)
    opened: list[int] = []
    try:
        opened.append(os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        for part in inside.parts:
            inspection.name(PurePosixPath(part))
            opened.append(inspection.open_directory(opened[-1], part, PurePosixPath(part)))
        inspection.tree(opened[-1], PurePosixPath(), patterns)
        if not inspection.refusals:
            inspection.contents(opened[-1])
    except _Enough:
        pass  # the last refusal says what was too much
    except OSError as error:
        inspection.refuse(inside, Unfit(f"cannot be read: {error.strerror}", _BY_HAND))
    finally:
        for descriptor in opened:
            os.close(descriptor)
    return inspection.refusals


class _Inspection:
    """One look at one tree, each name opened relative to its directory's descriptor."""

    def __init__(self, notebooks: Collection[str], limits: IntakeLimits) -> None:
        self.notebooks, self.limits = notebooks, limits
        self.refusals: list[Refusal] = []
        self.entries = self.bytes = 0

    def refuse(self, path: PurePosixPath, why: Unfit) -> None:
        self.refusals.append(Refusal(f"'{printable(str(path))}'", why.reason, why.advice))
        if len(self.refusals) >= MAX_REFUSALS:
            raise _Enough

    def too_much(self, path: PurePosixPath, reason: str, setting: str) -> None:
        self.refuse(path, Unfit(reason, _SMALLER.format(f"c.IntakeExporter.{setting}")))

    def name(self, path: PurePosixPath) -> None:
        if BAD_NAME.search(path.name):
            self.refuse(path, Unfit("has a control character or non-UTF-8 bytes in its name", "Rename it"))
        elif len(os.fsencode(path)) > MAX_PATH_BYTES:
            self.refuse(path, Unfit(f"has a path longer than {MAX_PATH_BYTES} bytes", "Rename it"))
            raise _Enough
        elif is_reserved(path.name):
            self.refuse(path, Unfit("has a name that nbgrader-aalto gives to earlier results", "Rename it"))

    def open_directory(self, parent: int, name: str, path: PurePosixPath) -> int:
        try:
            return os.open(name, _READ | os.O_DIRECTORY, dir_fd=parent)
        except OSError:
            status = os.lstat(name, dir_fd=parent)
            if stat.S_ISDIR(status.st_mode):
                raise
            self.refuse(path, Unfit(f"is {_kind(status)}, not a directory", _BY_HAND))
            raise _Enough from None

    def tree(self, directory: int, path: PurePosixPath, patterns: Sequence[str], ignored: bool = False) -> None:
        """Look at all names below the open `directory`, ignored ones too, as os.walk does in stock."""
        if len(path.parts) > self.limits.max_tree_depth:
            self.too_much(path, f"is deeper than {self.limits.max_tree_depth} directories", "max_tree_depth")
            raise _Enough
        with os.scandir(directory) as entries:
            for entry in entries:
                self.entries += 1
                if self.entries > self.limits.max_entries:
                    self.too_much(path, f"is part of more than {self.limits.max_entries} files", "max_entries")
                    raise _Enough
                below = path / entry.name
                self.name(below)
                skipped = ignored or is_ignored(entry.name, patterns)
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    self._directory(directory, below, () if _GLOB.search(entry.name) else patterns, skipped)
                else:
                    self._leaf(directory, below, status, skipped)

    def _directory(self, parent: int, path: PurePosixPath, patterns: Sequence[str], ignored: bool) -> None:
        try:
            descriptor = self.open_directory(parent, path.name, path)
        except OSError as error:
            self.refuse(path, Unfit(f"cannot be read: {error.strerror}", _BY_HAND))
            return
        try:
            self.tree(descriptor, path, patterns, ignored)
        finally:
            os.close(descriptor)

    def _leaf(self, parent: int, path: PurePosixPath, status: os.stat_result, ignored: bool) -> None:
        if not stat.S_ISREG(status.st_mode):
            return self.refuse(path, Unfit(f"is {_kind(status)}", _BY_HAND))
        if status.st_nlink > 1 and not self.limits.allow_hard_links:
            return self.refuse(path, Unfit(f"is a hard link: the file has {status.st_nlink} names", _BY_HAND))
        parsed = str(path) in self.notebooks
        if ignored and not parsed:
            return None
        if not os.access(path.name, os.R_OK, dir_fd=parent):
            self.refuse(path, Unfit("cannot be read: permission denied", _BY_HAND))
        most, setting = (
            (self.limits.max_notebook_bytes, "max_notebook_bytes")
            if parsed
            else (self.limits.max_file_bytes, "max_file_bytes")
        )
        if status.st_size > most:
            self.too_much(path, f"has {status.st_size} bytes, more than {most}", setting)
        self.bytes += status.st_size
        if self.bytes > self.limits.max_tree_bytes:
            most = self.limits.max_tree_bytes
            self.too_much(path, f"and the files before it have more than {most} bytes", "max_tree_bytes")
            raise _Enough
        return None

    def contents(self, directory: int) -> None:
        """Parse what nbgrader will parse: its notebooks and timestamp.txt."""
        checks: list[tuple[str, Callable[[bytes], None], int]] = [
            (name, lambda raw: inspect_notebook(raw, self.limits), self.limits.max_notebook_bytes)
            for name in sorted(self.notebooks)
        ]
        for name, check, most in [*checks, ("timestamp.txt", inspect_timestamp, MAX_TIMESTAMP_BYTES)]:
            try:
                check(_read(directory, name, most))
            except FileNotFoundError:
                continue  # stock scores a missing notebook 0, and no timestamp is no lateness
            except Unfit as why:
                self.refuse(PurePosixPath(name), why)
            except OSError as error:
                self.refuse(PurePosixPath(name), Unfit(f"cannot be read: {error.strerror}", _BY_HAND))


def _kind(status: os.stat_result) -> str:
    return _KINDS.get(stat.S_IFMT(status.st_mode), "of an unknown type")


def is_ignored(name: str, patterns: Sequence[str]) -> bool:
    """What nbgrader.utils.is_ignored finds by globbing: a wildcard does not match a leading dot."""
    return any(
        name == pattern or (fnmatch.fnmatchcase(name, pattern) and (pattern[0] == "." or name[0] != "."))
        for pattern in patterns
        if pattern
    )


def _read(directory: int, name: str, most: int) -> bytes:
    """The bytes of a regular file; O_NONBLOCK and the second look are for one that was swapped meanwhile."""
    descriptor = os.open(name, _READ, dir_fd=directory)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise Unfit(f"is {_kind(status)}", _BY_HAND)
    with open(descriptor, "rb") as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise Unfit(f"has more than {most} bytes")
    return raw


def inspect_timestamp(raw: bytes) -> None:
    """Raise `Unfit` for a timestamp.txt that crashes nbgrader, or that it fills up with today's date."""
    text = raw.decode("ascii", "replace").strip()
    advice = "Write the time of the submission into it, like 2026-01-31 12:00:00 UTC, or remove it"
    if not _TIMESTAMP.fullmatch(text):
        raise Unfit(f"does not hold a time, but {text!r}", advice)
    if not text:
        return  # stock takes it for no timestamp
    try:
        time = parse_utc(text)
        # the zone is the third of three words for parse_utc; two defaults show what the text leaves out
        words = text.split(" ")
        date = " ".join(words[:2] if len(words) == 3 else words)
        defaults = (datetime(2000, 1, 1), datetime(2001, 2, 2))
        dates = {dateutil.parser.parse(date, default=default).date() for default in defaults}
    except (ValueError, OverflowError, TypeError, AttributeError) as error:
        raise Unfit(f"does not hold a time, but {text!r} ({error})", advice) from None
    if len(dates) > 1 or not 1970 <= time.year < 2200:
        raise Unfit(f"does not hold a plausible date and time, but {text!r}", advice)


def scan_json(raw: bytes, most_values: int, most_depth: int) -> tuple[int, int]:
    """(values, depth) of a JSON text, in linear time, without recursion; stops once a limit is passed.

    The values are counted as commas and opening brackets, and one: never less than there are, nor more than
    twice as many. A text that is not JSON is measured at least as far as a parser would read it.
    """
    values, depth, deepest, position = 1, 0, 0, 0
    while values <= most_values and deepest <= most_depth:
        found = _STRUCTURE.match(raw, position)
        assert found is not None  # the pattern matches every text, the empty one too
        position, mark = found.end(), found[1]
        if not mark:
            break
        if mark in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        if mark in b"]}":
            depth -= 1
        else:
            values += 1
    return values, deepest


def inspect_notebook(raw: bytes, limits: IntakeLimits) -> None:
    """Raise `Unfit` for a notebook that nbgrader could not sanitise, or only at an unreasonable cost.

    A notebook that is readable but invalid by its schema, or in an older format, is accepted as in stock.
    """
    values, depth = scan_json(raw, limits.max_notebook_values, limits.max_notebook_depth)
    if depth > limits.max_notebook_depth:
        raise Unfit(f"is JSON nested deeper than {limits.max_notebook_depth}")
    if values > limits.max_notebook_values:
        setting = _SMALLER.format("c.IntakeExporter.max_notebook_values")
        raise Unfit(f"holds more than {limits.max_notebook_values} JSON values", setting)
    document = _parse(raw)
    for raw_cell in _cells(document):
        metadata = raw_cell.get("metadata")
        tags = metadata.get("tags", []) if isinstance(metadata, dict) else []
        if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
            raise Unfit("has a cell whose tags are not a list of words")
    notebook: Any = _upgrade(document, values)
    for number, cell in enumerate(notebook.cells, 1):
        if not isinstance(cell, dict) or not isinstance(cell.get("metadata"), dict):
            raise Unfit(f"has no metadata in cell {number}")
        if not isinstance(cell.get("cell_type"), str) or not isinstance(cell.get("source"), str):
            raise Unfit(f"has no type or no source in cell {number}")
        if "nbgrader" in cell["metadata"]:
            _inspect_nbgrader(cell["metadata"]["nbgrader"], number)


def _parse(raw: bytes) -> dict[str, Any]:
    if not raw.strip():
        raise Unfit("is empty")
    try:
        document = json.loads(raw.decode("utf-8"))
        json.dumps(document, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise Unfit(f"is not UTF-8 (byte {error.start})") from None
    except UnicodeEncodeError:
        raise Unfit("has half a character (a lone surrogate), which cannot be written as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise Unfit(f"is not JSON ({error})") from None
    if not isinstance(document, dict):
        raise Unfit("is JSON but not a notebook")
    for key in ("nbformat", "nbformat_minor"):
        if type(document.get(key, 0)) is not int:
            raise Unfit(f"has a {key} that is not a whole number")
    return document


def _cells(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The cells of a notebook of any format (2 and 3 keep them in worksheets) and of any shape."""
    worksheets = document.get("worksheets")
    for holder in [document, *(worksheets if isinstance(worksheets, list) else [])]:
        cells = holder.get("cells") if isinstance(holder, dict) else None
        yield from (cell for cell in (cells if isinstance(cells, list) else []) if isinstance(cell, dict))


def _upgrade(document: dict[str, Any], values: int) -> Any:
    """The notebook as nbformat 4; `Unfit` if nbformat cannot read it, or would validate it too long."""
    major, minor = document.get("nbformat", 1), document.get("nbformat_minor", 0)
    if major not in nbformat.versions:
        raise Unfit(f"has the unknown format nbformat {major}")
    if major < 4:  # the conversion itself validates
        _cap_explained(document, values, f"has the old format nbformat {major}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # stock warns of missing cell ids when its turn comes
            reader: Any = nbformat.versions[major]
            notebook: Any = nbformat.convert(reader.to_notebook_json(document, minor=minor), 4)
            normalize(notebook)
        language = notebook.metadata.get("language", "")
    except _UNREADABLE as error:
        raise Unfit(f"cannot be read as a notebook ({type(error).__name__}: {error})") from None
    if not isinstance(language, str):
        raise Unfit("has a metadata.language that is not text")
    validator = get_validator(4, notebook.get("nbformat_minor", 0), name="fastjsonschema")
    try:
        if validator is not None:
            validator.validate(notebook)
    except nbformat.ValidationError:
        _cap_explained(notebook, values, "is not a valid notebook")
    return notebook


def _cap_explained(document: Any, values: int, reason: str) -> None:
    """Keep what nbformat would explain at length (see MAX_INVALID_VALUES) to a bearable size."""
    cells = (json.dumps(cell).encode() for cell in _cells(document))
    most = MAX_INVALID_CELL_VALUES
    if values > MAX_INVALID_VALUES or any(scan_json(cell, most, values)[0] > most for cell in cells):
        raise Unfit(f"{reason}, and is too large to be accepted so")


def _inspect_nbgrader(meta: Any, number: int) -> None:
    """Refuse the metadata that nbgrader neither overwrites nor survives (nbgraderformat/common.py)."""
    if not isinstance(meta, dict):
        raise Unfit(f"has garbled nbgrader metadata in cell {number}")
    version = meta.get("schema_version", 0)
    if type(version) is not int or version > SCHEMA_VERSION:
        raise Unfit(f"has the unknown nbgrader schema_version {version!r} in cell {number}")
    if version < SCHEMA_VERSION:
        advice = "Back up the course, then run `nbgrader update` on this submission"
        raise Unfit(f"has the old nbgrader schema_version {version} in cell {number}", advice)
    needed = any(meta.get(key) for key in ("grade", "solution", "locked", "task"))
    if not isinstance(meta.get("grade_id", None if needed else ""), str):
        raise Unfit(f"has no grade_id, or one that is not text, in cell {number}")
