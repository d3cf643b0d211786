"""What a course's nbgrader_config.py calls. It sets the seams into nbgrader and no setting of the course's own."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbgrader_aalto import shared

if TYPE_CHECKING:
    from traitlets.config import Config

ISOLATED_EXECUTE = "nbgrader_aalto.execute.IsolatedExecute"
INTAKE_EXPORTER = "nbgrader_aalto.intake.IntakeExporter"
GENERATING = {
    "GenerateAssignment": "nbgrader_aalto.converters.AssignmentExporter",
    "GenerateSourceWithTests": "nbgrader_aalto.converters.AssignmentExporter",
    "GenerateSolution": "nbgrader_aalto.converters.AssignmentExporter",
    "GenerateFeedback": "nbgrader_aalto.converters.FeedbackExporter",
}
"""nbgrader's other converters, and the exporters with which they lose nothing."""
REFUSE_TO_RUN = "nbgrader_aalto.refusal.RefuseToRun"
EXCHANGE = {
    "exchange": "nbgrader_aalto.exchange.AaltoExchange",
    "fetch_assignment": "nbgrader_aalto.exchange.ExchangeFetchAssignment",
    "fetch_feedback": "nbgrader_aalto.exchange.ExchangeFetchFeedback",
    "release_assignment": "nbgrader_aalto.exchange.ExchangeReleaseAssignment",
    "release_feedback": "nbgrader_aalto.exchange.ExchangeReleaseFeedback",
    "list": "nbgrader_aalto.exchange.ExchangeList",
    "submit": "nbgrader_aalto.exchange.ExchangeSubmit",
    "collect": "nbgrader_aalto.exchange.ExchangeCollect",
}
"""The traits of `ExchangeFactory`, and our classes."""


class ConfigurationError(Exception):
    """The course's configuration would run student code outside of the sandbox."""


def configure(c: "Config") -> None:
    """Make `nbgrader autograde`, Formgrader's lightning bolt included, run notebooks in a sandbox.

    Call it last in nbgrader_config.py, with the `c` of that file. Of `c.Autograde.autograde_preprocessors` it
    replaces nbgrader's `Execute` alone, so preprocessors that the course added stay. When the course has put
    another class in the place of `Execute`, or an exporter class of its own, student code or files would get
    past the sandbox: then every autograde fails with a message that says which line to change.

    The exchange becomes the one of `nbgrader_aalto.exchange`, unless the course set classes of another exchange in
    `c.ExchangeFactory`; then all of them stay as they are. In a course of several instructors, an instructor's process
    gets a umask of 007, and the gradebook is one that all of them can write to.
    """
    if not any(name in c.get("ExchangeFactory", {}) for name in EXCHANGE):
        for name, cls in EXCHANGE.items():
            c.ExchangeFactory[name] = cls
    _share(c)
    try:
        _keep_earlier_results(c)
        c.Autograde.autograde_preprocessors = isolated(_configured_preprocessors(c))
        c.Autograde.exporter_class = _exporter(c)
    except Exception as error:  # noqa: BLE001  # whatever it is, stock nbgrader must not run instead
        print(f"nbgrader-aalto: nothing will be autograded: {error}", file=sys.stderr)
        c.Autograde.autograde_preprocessors = [REFUSE_TO_RUN]
        c.Autograde.exporter_class = INTAKE_EXPORTER
        c.RefuseToRun.reason = str(error)


def _share(c: "Config") -> None:
    """Umask and gradebook of a course of several instructors, before nbgrader opens its log and the gradebook."""
    course = c.get("CourseDirectory", {})  # c.CourseDirectory would make one
    root = Path(str(course.get("root", "") or os.getcwd()))
    db_url = str(course.get("db_url", "") or f"sqlite:///{root.absolute()}/gradebook.db")
    try:
        shared.prepare(root, db_url, bool(course.get("groupshared", False)))
    except (shared.NotShared, OSError) as error:
        print(f"nbgrader-aalto: {error}", file=sys.stderr)


def _keep_earlier_results(c: "Config") -> None:
    """An exporter class of the course's own stays: no student code runs there."""
    for converter, exporter in GENERATING.items():
        sections = [c.get(name, {}) for name in (converter, "BaseConverter")]  # c[name] would make one
        own = next((section["exporter_class"] for section in sections if "exporter_class" in section), None)
        if own is None:
            c[converter].exporter_class = exporter
        elif not _is_careful(own):
            print(
                f"nbgrader-aalto: {converter} uses {own!r}, so a failed run with --force loses the earlier result; "
                f"make that class a subclass of nbgrader_aalto.converters.CarefulExporter, too",
                file=sys.stderr,
            )


def _exporter(c: "Config") -> Any:
    exporter = c.Autograde.get("exporter_class", INTAKE_EXPORTER)
    if exporter == INTAKE_EXPORTER or _is_intake(exporter):
        return exporter
    raise ConfigurationError(
        f"c.Autograde.exporter_class is {exporter!r}, but submissions are checked by {INTAKE_EXPORTER}; "
        "remove that line, or make your class a subclass of it"
    )


def _configured_preprocessors(c: "Config") -> list[Any]:
    """The course's list, or nbgrader's; `.append(...)` and kin in the configuration are carried out here."""
    from nbgrader.converters import Autograde  # imports take a second: only those who autograde pay
    from traitlets.config import LazyConfigValue

    default = list(Autograde.autograde_preprocessors.default())
    value = c.Autograde.get("autograde_preprocessors", default)
    return list(value.get_value(default) if isinstance(value, LazyConfigValue) else value)


def isolated(preprocessors: list[Any]) -> list[Any]:
    """The list with nbgrader's `Execute` replaced. Entries are classes or their import strings."""
    return [_replacement(entry) for entry in preprocessors]


def _replacement(entry: Any) -> Any:
    from nbconvert.preprocessors import ExecutePreprocessor
    from nbgrader.preprocessors import Execute
    from traitlets.utils.importstring import import_item

    from nbgrader_aalto.execute import IsolatedExecute

    item = import_item(entry) if isinstance(entry, str) else entry
    cls = item if isinstance(item, type) else type(item)
    if item is Execute:
        return ISOLATED_EXECUTE
    if isinstance(cls, type) and issubclass(cls, IsolatedExecute):
        return entry
    if isinstance(cls, type) and issubclass(cls, ExecutePreprocessor):
        raise ConfigurationError(
            f"c.Autograde.autograde_preprocessors holds {cls.__module__}.{cls.__qualname__}, which would run "
            f"student code outside of the sandbox; make it a subclass of {ISOLATED_EXECUTE}"
        )
    return entry


def _is_intake(exporter: Any) -> bool:
    from traitlets.utils.importstring import import_item

    from nbgrader_aalto.intake import IntakeExporter

    cls = import_item(exporter) if isinstance(exporter, str) else exporter
    return isinstance(cls, type) and issubclass(cls, IntakeExporter)


def _is_careful(exporter: Any) -> bool:
    from traitlets.utils.importstring import import_item

    if exporter in GENERATING.values():
        return True  # without an import

    from nbgrader_aalto.converters import CarefulExporter

    cls = import_item(exporter) if isinstance(exporter, str) else exporter
    return isinstance(cls, type) and issubclass(cls, CarefulExporter)
