"""What nbgrader's Autograde will ask `IsolatedExecute` for when a student's turn comes, found out in memory.

It reads what nbgrader is going to read, the submission by descriptors (`isolate.files.walk`), and does to the notebooks
what the sanitising preprocessors do to code, with what the gradebook said when it was first asked. Nothing is written,
and nothing is said in the log. It is a guess: `readahead` uses a result only where it turns out to be right.

Runs in nbgrader's thread and costs a few milliseconds for each notebook. Refuses to know how anything is executed.
"""

import dataclasses
import functools
import heapq
import itertools
import logging
import os
import stat
import tarfile
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import IO, Any

import nbformat
from nbformat import NotebookNode
from nbgrader.api import Gradebook, MissingEntry
from nbgrader.preprocessors import CheckCellMetadata, ClearOutput, DeduplicateIds, OverwriteCells, OverwriteKernelspec
from nbgrader.utils import setenv
from traitlets.utils.importstring import import_item

from isolate.files import NotPlain, matches, walk
from nbgrader_aalto.duplicates import forget_duplicates
from nbgrader_aalto.execute import LEFT_OUT, IsolatedExecute
from nbgrader_aalto.inspection import is_ignored
from nbgrader_aalto.orders import Order

_NO_EFFECT_ON_CODE = (ClearOutput, OverwriteKernelspec, CheckCellMetadata)

_QUIET = logging.Logger("nbgrader_aalto.coming", logging.CRITICAL + 1)
"""nbgrader says the same when the student's turn has come."""


class NotAhead(Exception):
    """What will be asked for cannot be known, with the reason."""


@dataclasses.dataclass(frozen=True, slots=True)
class _File:
    path: str
    content: IO[bytes]
    status: os.stat_result


class Coming:
    """The students to come of one run of an Autograde; `exporter` is its exporter."""

    def __init__(self, exporter: Any) -> None:
        """Raises `NotAhead` where the course's own preprocessors decide what is executed."""
        self._exporter, self._converter = exporter, exporter.converter
        self._gradebook = _Remembered(self._converter.coursedir)
        self._sanitizers = [made for entry in self._converter.sanitize_preprocessors for made in self._made(entry)]
        self.execute = self._first(self._converter.autograde_preprocessors)

    def orders(
        self, assignment: str, student: str, notebooks: Sequence[str]
    ) -> tuple[IO[bytes], list[tuple[str, Order]]]:
        """The archive of files with which the first notebook starts, and by name, in turn, what is asked for.

        `notebooks` are names without suffix, of those that the gradebook knows. Raises whatever a submission, the
        gradebook or the configuration can cause; then there is no guess.
        """
        course = self._converter.coursedir
        if not self._converter.create_student:
            self._gradebook.check_student(student)
        limits = self.execute.limits()
        found: dict[str, bytes] = {}
        archive = _pack(self._layers(assignment, student, set(notebooks), found), limits.work_bytes, limits.work_files)
        try:
            orders = []
            for name in notebooks:
                where = {"student": student, "assignment": assignment, "notebook": name, "db_url": course.db_url}
                notebook = self._sanitized(found[name].decode("utf-8"), where)
                with setenv(NBGRADER_EXECUTION="autograde"):
                    order = self.execute.order(notebook, where, len(notebooks))
                assert order.key  # what cannot be compared is not executed ahead
                orders.append((name, order))
        except BaseException:
            archive.close()
            raise
        return archive, orders

    def _made(self, entry: Any) -> list[Callable[..., Any]]:
        cls = import_item(entry) if isinstance(entry, str) else entry
        if cls in _NO_EFFECT_ON_CODE:
            return []
        if cls is DeduplicateIds:
            return [DeduplicateIds(parent=self._exporter, log=_QUIET)]
        if cls is OverwriteCells:
            return [_OverwriteCells(self._gradebook, parent=self._exporter, log=_QUIET)]
        raise NotAhead(f"c.Autograde.sanitize_preprocessors holds {entry!r}")

    def _first(self, entries: Sequence[Any]) -> IsolatedExecute:
        for entry in entries:
            cls = import_item(entry) if isinstance(entry, str) else entry
            if isinstance(cls, type) and issubclass(cls, IsolatedExecute):
                made = cls(parent=self._exporter)
                if made.enabled:
                    return made
                raise NotAhead("nothing is executed")
            raise NotAhead(f"c.Autograde.autograde_preprocessors holds {entry!r} before the execution")
        raise NotAhead("nothing is executed")

    def _sanitized(self, text: str, where: dict[str, str]) -> NotebookNode:
        notebook = nbformat.convert(nbformat.reader.reads(text), 4)
        forget_duplicates(notebook)
        resources: Any = {"nbgrader": where}
        for sanitize in self._sanitizers:
            notebook, resources = sanitize(notebook, resources)
        return notebook

    def _layers(
        self, assignment: str, student: str, wanted: set[str], found: dict[str, bytes]
    ) -> list[Iterator[_File]]:
        """The files that will lie beside the notebook: the later layer wins. See `Autograde.init_assignment`."""
        converter, course = self._converter, self._converter.coursedir
        layers = []
        if course.notebook_id != "*":  # then what was there stays
            layers.append(_files(_opened(converter._format_dest(assignment, student))))
        layers.append(self._submitted(assignment, student, wanted, found))
        master = _opened(course.format_path(course.source_directory, ".", assignment))
        kept = set(converter.exclude_overwriting.get(assignment, []))
        layers.append(
            _files(
                master,
                lambda path: path in kept or is_ignored(os.path.basename(path), course.ignore),
                lambda path, what: None,
                follow_links=True,
            )
        )
        return layers

    def _submitted(self, assignment: str, student: str, wanted: set[str], found: dict[str, bytes]) -> Iterator[_File]:
        """Files; notebooks of these names are read into `found`. No part of the student's is reached by a link."""
        base, inside = self._exporter.place(assignment, student)
        ignored = self._converter.coursedir.ignore
        names = {f"{name}.ipynb" for name in wanted}
        directory = _opened(base)
        assert directory is not None
        for part in PurePosixPath(inside).parts:
            below = os.open(part, _DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
            os.close(directory)
            directory = below
        for entry in _files(directory, lambda path: is_ignored(os.path.basename(path), ignored), read=names):
            if entry.path in names:
                with entry.content:
                    found[entry.path.removesuffix(".ipynb")] = entry.content.read(self._exporter.max_notebook_bytes + 1)
            else:
                yield entry


class _OverwriteCells(OverwriteCells):
    """nbgrader's, with a gradebook that is not opened anew for each notebook."""

    def __init__(self, remembered: "_Remembered", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gradebook = remembered

    def preprocess(self, nb: NotebookNode, resources: Any) -> tuple[NotebookNode, Any]:
        self.notebook_id, self.assignment_id = resources["nbgrader"]["notebook"], resources["nbgrader"]["assignment"]
        nb, resources = super(OverwriteCells, self).preprocess(nb, resources)
        if self.add_missing_cells:
            nb, resources = self.add_missing_grade_cells(nb, resources)
            nb, resources = self.add_missing_task_cells(nb, resources)
        return nb, resources


class _Remembered:
    """What `OverwriteCells` asks a gradebook for, read once for each notebook of an assignment."""

    def __init__(self, course: Any) -> None:
        self._course = course

    def check_student(self, student: str) -> None:
        """Raises `MissingEntry`."""
        with Gradebook(self._course.db_url, self._course.course_id) as gradebook:
            gradebook.find_student(student)

    @functools.cache  # noqa: B019  # lives as long as the run
    def find_notebook(self, notebook: str, assignment: str) -> SimpleNamespace:
        names = ("name", "cell_type", "locked", "checksum", "source")
        with Gradebook(self._course.db_url, self._course.course_id) as gradebook:
            found = gradebook.find_notebook(notebook, assignment)
            return SimpleNamespace(
                source_cells=[_copy(cell, *names) for cell in found.source_cells],
                grade_cells=[_copy(cell, "name", "max_score") for cell in found.grade_cells],
                solution_cells=[_copy(cell, "name") for cell in found.solution_cells],
                task_cells=[_copy(cell, "name", "max_score") for cell in found.task_cells],
            )

    def find_source_cell(self, name: str, notebook: str, assignment: str) -> SimpleNamespace:
        return _named(name, self.find_notebook(notebook, assignment).source_cells)

    def find_graded_cell(self, name: str, notebook: str, assignment: str) -> SimpleNamespace:
        found = self.find_notebook(notebook, assignment)
        return _named(name, [*found.grade_cells, *found.task_cells])


def _copy(cell: Any, *names: str) -> SimpleNamespace:
    return SimpleNamespace(**{name: getattr(cell, name) for name in names})


def _named(name: str, cells: Sequence[SimpleNamespace]) -> SimpleNamespace:
    for cell in cells:
        if cell.name == name:
            return cell
    raise MissingEntry(name)


_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def _opened(path: str | Path) -> int | None:
    try:
        return os.open(path, _DIRECTORY)
    except FileNotFoundError:
        return None


def _refuse(path: str, what: str) -> None:
    raise NotPlain(f"{path!r} {what}")


def _files(
    directory: int | None,
    leave_out: Callable[[str], bool] = lambda path: False,
    odd: Callable[[str, str], None] = _refuse,
    *,
    follow_links: bool = False,
    read: Collection[str] = (),
) -> Iterator[_File]:
    """The files alone, since nbgrader copies files and makes directories for them.

    What enters no room is not among them, unless it is in `read`.
    """
    if directory is None:
        return

    def is_left_out(path: str) -> bool:
        return path not in read and (matches(path, LEFT_OUT) or leave_out(path))

    for entry in walk(directory, is_left_out, odd, follow_links=follow_links):
        if entry.descriptor is not None:
            yield _File(entry.path, open(entry.descriptor, "rb"), entry.status)


def _pack(layers: Sequence[Iterable[_File]], max_bytes: int, max_files: int) -> IO[bytes]:
    """The archive that `isolate.files.pack` makes of a directory into which these layers were copied.

    Holds one file of each layer open at a time. Raises `NotAhead` beyond these bounds, `OSError`, `NotPlain`.
    """
    merged = heapq.merge(*itertools.starmap(_ranked, enumerate(layers)), key=lambda item: item[:2])
    made: set[str] = set()
    total = 0
    packed: IO[bytes] = tempfile.TemporaryFile()
    try:
        with tarfile.open(fileobj=packed, mode="w:", format=tarfile.PAX_FORMAT) as archive:
            for _, versions in itertools.groupby(merged, key=lambda item: item[0]):
                *covered, file = (version for _, _, version in versions)
                for other in covered:
                    other.content.close()
                for directory in [str(parent) for parent in reversed(PurePosixPath(file.path).parents[:-1])]:
                    if directory not in made:
                        made.add(directory)
                        info = tarfile.TarInfo(directory)
                        info.type, info.mode = tarfile.DIRTYPE, 0o755
                        archive.addfile(info)
                info = tarfile.TarInfo(file.path)
                info.size, info.mode = file.status.st_size, stat.S_IMODE(file.status.st_mode)
                made.add(file.path)
                total += info.size
                if total > max_bytes or len(made) > max_files:
                    raise NotAhead("there is more than a notebook may have")
                with file.content:
                    archive.addfile(info, file.content)
    except BaseException:
        packed.close()
        raise
    packed.seek(0)
    return packed


def _ranked(rank: int, layer: Iterable[_File]) -> Iterator[tuple[list[str], int, _File]]:
    """In the order of `isolate.files.walk`: each directory's names sorted, a directory before what follows it."""
    for file in layer:
        yield file.path.split("/"), rank, file
