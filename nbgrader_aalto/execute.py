"""The seam into nbgrader: `IsolatedExecute` stands in the place of nbgrader's `Execute`.

One notebook enters `preprocess` sanitised by nbgrader (cells overwritten from the gradebook); its code sources
go to a driver room and the files beside it to a kernel room (`isolate.notebook`); outputs come back. What the
student's code caused becomes an error in its cells; what it did not cause becomes no score at all.
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from textwrap import dedent
from typing import IO, TYPE_CHECKING, Any

import nbformat
from jupyter_client.kernelspec import NATIVE_KERNEL_NAME, KernelSpec, KernelSpecManager, NoSuchKernel
from nbformat import NotebookNode
from nbgrader.api import Gradebook
from nbgrader.converters.base import NbGraderException
from nbgrader.preprocessors import Execute
from traitlets import Bool, Dict, Enum, Float, Integer, List, Unicode, default

from isolate.environment import environment_policy, find_executable, home_files
from isolate.files import pack
from isolate.notebook import Execution, ExecutionReport, Kernel, Settings, execute
from isolate.outputs import error
from isolate.policy import LASTING, TIERS, Bind, Limits, Policy, SandboxError, parse_size
from nbgrader_aalto.shared import is_shared
from nbgrader_aalto.written import WRITTEN_SUFFIX, keep_written

if TYPE_CHECKING:
    from grader_service.schemas import JobView

_DEFAULT = Limits()
_HOOKS = tuple(f"on_notebook_{when}" for when in ("start", "complete", "error")) + tuple(
    f"on_cell_{when}" for when in ("start", "execute", "complete", "error")
)


class HostFault(NbGraderException):
    """No score: the sandbox or the host failed, and the student is not to blame."""


class IsolatedExecute(Execute):
    """nbgrader's Execute, with the kernel in a sandbox. `c.Execute.*` settings keep their meaning.

    Where they cannot, docs/configuration.md says so.
    """

    environment = Unicode(
        "",
        help=dedent(
            """
            The prefix (venv, conda environment) in which student code runs. Empty: that of the notebook's
            kernelspec. Name one to grade without the packages that only instructors need.
            """
        ),
    ).tag(config=True)
    read_only = List(
        Unicode(),
        help="Directories and files of this machine that student code can read, such as /coursedata.",
    ).tag(config=True)
    hidden = List(
        Unicode(),
        help=dedent(
            """
            Paths to mask where they lie inside something visible, besides the course, the exchange and what is
            masked in every environment (etc/jupyter and the like).
            """
        ),
    ).tag(config=True)
    pass_environment = List(
        Unicode(),
        help="Names of environment variables that student code finds with the grader's values. All others are absent.",
    ).tag(config=True)
    environment_variables = Dict(help="Environment variables for student code: name -> value.").tag(config=True)
    memory = Unicode("2G", help="Memory of one notebook's processes together, such as 2G or 500M.").tag(config=True)
    files = Unicode("256M", help="Size of all files that one notebook may write, with those it was given.").tag(
        config=True
    )
    files_count = Integer(_DEFAULT.files_count, help="How many files one notebook may have.").tag(config=True)
    processes = Integer(_DEFAULT.processes, help="Processes and threads of one notebook.").tag(config=True)
    wall_seconds = Float(
        _DEFAULT.wall_seconds, help="Time for one notebook, whatever the cells' own timeouts add up to."
    ).tag(config=True)
    cpu_seconds = Float(_DEFAULT.cpu_seconds, help="Processor time of one notebook's processes together.").tag(
        config=True
    )
    cell_output = Unicode("4M", help="Output of one cell that is kept; the rest is cut with a notice.").tag(config=True)
    output = Unicode("24M", help="Output of one notebook that is kept.").tag(config=True)
    keep_files = Bool(
        False,
        help=dedent(
            f"""
            Whether files that a notebook wrote are kept for the instructor, beside the autograded notebook in
            <notebook>{WRITTEN_SUFFIX}/. Regular files only. Later notebooks of the assignment see them anyway.
            """
        ),
    ).tag(config=True)

    service_url = Unicode(
        "",
        help=dedent(
            """
            The grading service that executes notebooks instead of this machine: https://host:port, or
            unix:///path/of/socket. What student code sees is then the service's administrator's to say. Empty: none.
            """
        ),
    ).tag(config=True)
    service_course = Unicode("", help="The course's name in the service. Empty: c.CourseDirectory.course_id.").tag(
        config=True
    )
    service_token_file = Unicode(
        "",
        help=dedent(
            """
            A file with the course's token, which students cannot read: 0600, or 0640 of the course's group. Empty: the
            token of this JupyterHub server, if the service knows the hub.
            """
        ),
    ).tag(config=True)
    tier = Enum(
        TIERS,
        default_value=TIERS[0],
        help=dedent(
            """
            Which wall stands. `landlock` is for a container in which no namespaces can be made: weaker, and never
            chosen by itself. `isolate doctor` says what this host can do and what that tier does not stop.
            """
        ),
    ).tag(config=True)
    report_file = Unicode(
        "",
        help=dedent(
            """
            A file to which one line of JSON is appended for each executed notebook: who, how it ended, limits,
            seconds, memory. It names students: keep it with the gradebook. Empty: none.
            """
        ),
    ).tag(config=True)

    @default("pass_environment")
    def _pass_environment_default(self) -> list[str]:
        return ["AALTO_JUPYTERHUB", "JUPYTER_IMAGE_SPEC", "NBGRADER_EXECUTION", "LANG", "LC_ALL", "TZ"]

    def preprocess(
        self, nb: NotebookNode, resources: dict[str, Any], km: object = None
    ) -> tuple[NotebookNode, dict[str, Any]]:
        """The notebook with its outputs. Raises `HostFault` when there can be no score."""
        where = resources["nbgrader"]
        directory = Path(resources["metadata"]["path"])
        try:
            execution = self._execute_or_retry(nb, where, directory)
        except SandboxError as error:
            text = (
                f"No score for notebook '{where['notebook']}' of assignment '{where['assignment']}' of student "
                f"'{where['student']}', and it is not the student's fault: {error}. Nothing was changed in the "
                "gradebook for this notebook; mend the cause and autograde this student again."
            )
            self.log.error(text)
            raise HostFault(text) from error
        report = execution.report
        if report.ended != "finished" or report.limits:
            limits = f" [limits: {', '.join(report.limits)}]" if report.limits else ""
            self.log.warning(
                "Notebook '%s' of student '%s' ended: %s%s. %s",
                where["notebook"],
                where["student"],
                report.ended,
                limits,
                report.message,
            )
        self.log.info(
            "Executed notebook '%s' of student '%s': %s, %.1f s, %.1f s cpu, %d MiB",
            *(where["notebook"], where["student"], report.ended),
            *(report.wall_seconds, report.cpu_seconds, report.memory_peak_bytes >> 20),
        )
        self._append_report(where, report)
        executed = execution.notebook
        executed.metadata["isolate"] = {
            "ended": report.ended,
            "message": report.message,
            "limits": list(report.limits),
            "tier": report.tier,
            "layers": list(report.layers),
            **({"gaps": list(report.gaps)} if report.gaps else {}),
        }
        for cell in executed.cells:
            _let_failures_decide(cell)
        return executed, resources

    def _append_report(self, where: dict[str, str], report: ExecutionReport) -> None:
        """Measurements go here and not into the notebook: the same submission must give the same file twice."""
        if not self.report_file:
            return
        line = json.dumps({**{name: where[name] for name in ("assignment", "student", "notebook")}, **report.as_dict()})
        descriptor = os.open(self.report_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o660)
        with open(descriptor, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _execute_or_retry(self, nb: NotebookNode, where: dict[str, str], directory: Path) -> Execution:
        try:
            return self._execute(nb, where, directory)
        except SandboxError as error:
            if error.layer in LASTING | {"service"}:  # a service has tried again by itself
                raise
            self.log.warning(
                "Trying notebook '%s' of student '%s' once more: %s",
                where["notebook"],
                where["student"],
                error,
            )
            return self._execute(nb, where, directory)

    def _execute(self, nb: NotebookNode, where: dict[str, str], directory: Path) -> Execution:
        self._warn_of_hooks()
        limits = self._limits()
        work = self._work(where)
        files = work.files or pack(
            directory,
            leave_out=["*.ipynb", f"*{WRITTEN_SUFFIX}"],
            max_bytes=limits.work_bytes,
            max_files=limits.work_files,
        )
        keep: IO[bytes] = tempfile.TemporaryFile()
        execute_it = self._execute_by_service if self.service_url else self._execute_here
        try:
            execution = execute_it(nb, where, files, keep)
            if self.keep_files:
                keep_written(keep, files, directory / f"{where['notebook']}{WRITTEN_SUFFIX}")
        except BaseException:
            keep.close()
            raise
        if keep.seek(0, os.SEEK_END):
            work.files = keep
        return execution

    def _execute_here(self, nb: NotebookNode, where: dict[str, str], files: IO[bytes], keep: IO[bytes]) -> Execution:
        kernel, policy = self._kernel_and_policy(where)
        return execute(
            nb,
            kernel,
            policy,
            self._settings(),
            files=files,
            keep=keep,
            skip=self._skipped(nb, where),
            timeouts=self._timeouts(nb),
            progress=self._log_progress,
        )

    def _execute_by_service(
        self, nb: NotebookNode, where: dict[str, str], files: IO[bytes], keep: IO[bytes]
    ) -> Execution:
        from nbgrader_aalto import remote  # httpx and pydantic: only those who use the service pay

        asked = {
            "assignment": where["assignment"],
            "student": where["student"],
            "notebook": where["notebook"],
            "kind": "batch" if self._converter.coursedir.student_id == "*" else "interactive",
            "kernel": self._kernel_name(where),
            "kernel_arguments": list(self.extra_arguments),
            "environment": {**self._passed_variables(), **self.environment_variables},
            "limits": self._limits_asked(),
            "settings": dataclasses.asdict(self._settings()),
            "skip": sorted(self._skipped(nb, where)),
            "timeouts": self._timeouts(nb),
            "keep_files": self.keep_files or len(self._converter.notebooks) > 1,
        }
        with remote.connect(self.service_url, self.service_token_file, self._course_group()) as client:
            course = self.service_course or self._converter.coursedir.course_id
            return remote.execute(client, course, asked, nb, files, keep, self._log_job(where))

    def _course_group(self) -> int | None:
        """The group of a course of several instructors, who share its token."""
        course = self._converter.coursedir
        root = Path(course.root)
        return root.stat().st_gid if is_shared(root, bool(course.groupshared)) else None

    def _limits_asked(self) -> dict[str, float]:
        """Only what the course set: for the rest, the service has the course's defaults."""
        configured = self._configured()
        if local := sorted(_LOCAL_SETTINGS & configured):
            raise SandboxError(
                "policy",
                f"c.IsolatedExecute.{local[0]} is about this machine, and notebooks are executed by {self.service_url}",
                "remove that line; what student code sees there is in the service's table of this course",
            )
        limits = dataclasses.asdict(self._limits())
        return {name: limits[name] for setting, name in _LIMITS.items() if setting in configured}

    def _configured(self) -> set[str]:
        """Names of the settings that a configuration file or the command line set."""
        sections = [self.config.get(cls.__name__, {}) for cls in type(self).mro()]
        return {name for section in sections for name in section}

    def _log_job(self, where: dict[str, str]) -> Callable[["JobView"], None]:
        from nbgrader_aalto.remote import words_of

        def tell(job: "JobView") -> None:
            self.log.info("Notebook '%s' of student '%s' is %s", where["notebook"], where["student"], words_of(job))

        return tell

    def _work(self, where: dict[str, str]) -> "_Work":
        """The assignment's work directory, which its notebooks share, one after the other, as in stock nbgrader."""
        converter = self._converter
        work: _Work | None = getattr(converter, "_isolated_work", None)
        if work is None or (work.student, work.assignment) != (where["student"], where["assignment"]):
            if work is not None and work.files is not None:
                work.files.close()
            work = _Work(where["student"], where["assignment"])
            converter._isolated_work = work
        return work

    @property
    def _converter(self) -> Any:
        """nbgrader's converter: parent of the exporter, which is the parent of this preprocessor."""
        return self.parent.parent

    def _settings(self) -> Settings:
        return Settings(
            timeout=self._get_timeout(None),
            interrupt_on_timeout=self.interrupt_on_timeout,
            error_on_timeout=self.error_on_timeout,
            iopub_timeout=self.iopub_timeout,
            startup_timeout=self.startup_timeout,
            allow_errors=self.allow_errors,
            allow_error_names=tuple(self.allow_error_names),
            force_raise_errors=self.force_raise_errors,
            store_widget_state=self.store_widget_state,
            record_timing=self.record_timing,
            coalesce_streams=self.coalesce_streams,
        )

    def _timeouts(self, nb: NotebookNode) -> dict[int, float | None]:
        if self.timeout_func is None:
            return {}
        return {index: self._get_timeout(cell) for index, cell in enumerate(nb.cells)}

    def _limits(self) -> Limits:
        try:
            return Limits(
                wall_seconds=self.wall_seconds,
                cpu_seconds=self.cpu_seconds,
                memory_bytes=parse_size(self.memory),
                processes=self.processes,
                files_bytes=parse_size(self.files),
                files_count=self.files_count,
                cell_output_bytes=parse_size(self.cell_output),
                output_bytes=parse_size(self.output),
            )
        except ValueError as error:
            raise SandboxError("policy", f"c.IsolatedExecute: {error}", "correct nbgrader_config.py") from error

    def _kernel_and_policy(self, where: dict[str, str]) -> tuple[Kernel, Policy]:
        spec = self._kernelspec(where)
        executable = find_executable(spec.argv[0], Path(self.environment) if self.environment else None)
        policy = environment_policy([executable], environment=self._passed_variables(), limits=self._limits())
        visible = [Path(path) for path in self.read_only]
        if spec.resource_dir and any("{resource_dir}" in word for word in spec.argv):
            visible.append(Path(spec.resource_dir))
        try:
            binds = [Bind(path) for path in visible]
        except ValueError as error:
            raise SandboxError("policy", f"c.IsolatedExecute.read_only: {error}") from error
        policy = dataclasses.replace(
            policy,
            read_only=(*policy.read_only, *binds),
            hidden=(*policy.hidden, *self._hidden_paths()),
            environment={**policy.environment, **self.environment_variables},
            tier=self.tier,
        )
        argv = [word.replace("{resource_dir}", spec.resource_dir) for word in spec.argv[1:]]
        kernel = Kernel(
            argv=[str(executable), *argv, *self._kernel_arguments(is_ipykernel=any("ipykernel" in w for w in argv))],
            environment=spec.env,
            interrupt_mode=spec.interrupt_mode,
            home_files=home_files(executable, self.tier),
        )
        return kernel, policy

    def _passed_variables(self) -> dict[str, str]:
        return {name: os.environ[name] for name in self.pass_environment if name in os.environ}

    def _kernel_arguments(self, *, is_ipykernel: bool) -> list[str]:
        extra = list(self.extra_arguments)
        if is_ipykernel and self.ipython_hist_file and not any("HistoryManager.hist_file" in word for word in extra):
            extra.append(f"--HistoryManager.hist_file={self.ipython_hist_file}")
        return extra

    def _hidden_paths(self) -> list[Path]:
        """The course and the exchange, wherever they lie, and what the administrator names."""
        from nbgrader.exchange.default import Exchange

        course = self._converter.coursedir
        exchange = Exchange(coursedir=course, parent=self._converter)
        paths = [course.root, exchange.root, exchange.cache, *self.hidden]
        return [Path(os.path.abspath(path)) for path in paths if path]

    def _kernel_name(self, where: dict[str, str]) -> str:
        """The instructor's choice, never the student's: the setting, the source notebook, or the default."""
        name = str(self.kernel_name or self._kernel_name_of_source(where) or NATIVE_KERNEL_NAME)
        # As in jupyter_client's KernelManager: the kernel of this interpreter.
        return NATIVE_KERNEL_NAME if name == "python" else name

    def _kernelspec(self, where: dict[str, str]) -> KernelSpec:
        name = self._kernel_name(where)
        try:
            if self.environment:
                return _kernelspec_in(Path(self.environment), name)
            return KernelSpecManager(parent=self).get_kernel_spec(name)
        except NoSuchKernel as error:
            raise SandboxError("kernel", f"there is no kernel named '{name}' here", "install its kernelspec") from error

    def _kernel_name_of_source(self, where: dict[str, str]) -> str:
        with Gradebook(self._converter.coursedir.db_url, self._converter.coursedir.course_id) as gradebook:
            stored = gradebook.find_notebook(where["notebook"], where["assignment"]).kernelspec
        name = (json.loads(stored) if stored else {}).get("name", "")
        return name if isinstance(name, str) else ""

    def _skipped(self, nb: NotebookNode, where: dict[str, str]) -> Collection[int]:
        """Cells that the instructor's notebook tags with `skip_cells_with_tag`; what a student tags runs."""
        tagged = [
            cell for cell in self._source_cells(where) if self.skip_cells_with_tag in cell.metadata.get("tags", [])
        ]
        names = {_grade_id(cell) for cell in tagged} - {None}
        texts = {cell.source for cell in tagged if _grade_id(cell) is None}
        return {
            index
            for index, cell in enumerate(nb.cells)
            if (_grade_id(cell) in names if _grade_id(cell) is not None else cell.source in texts)
        }

    def _source_cells(self, where: dict[str, str]) -> list[NotebookNode]:
        course = self._converter.coursedir
        directory = course.format_path(course.source_directory, ".", where["assignment"])
        path = os.path.join(directory, f"{where['notebook']}.ipynb")
        if not os.path.exists(path):
            return []
        return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]

    def _log_progress(self, index: int, state: str) -> None:
        self.log.debug("Cell %d %s", index + 1, state)

    def _warn_of_hooks(self) -> None:
        for name in _HOOKS:
            if getattr(self, name, None) is not None:
                self.log.warning("c.Execute.%s is not called: cells run in a sandbox", name)


_LIMITS = {
    "memory": "memory_bytes",
    "files": "files_bytes",
    "files_count": "files_count",
    "processes": "processes",
    "wall_seconds": "wall_seconds",
    "cpu_seconds": "cpu_seconds",
    "cell_output": "cell_output_bytes",
    "output": "output_bytes",
}
"""Settings here, and fields of `isolate.policy.Limits`."""

_LOCAL_SETTINGS = frozenset({"environment", "read_only", "tier"})


@dataclasses.dataclass
class _Work:
    student: str
    assignment: str
    files: IO[bytes] | None = None


def _grade_id(cell: NotebookNode) -> str | None:
    value = cell.metadata.get("nbgrader", {}).get("grade_id")
    return value if isinstance(value, str) else None


def _kernelspec_in(prefix: Path, name: str) -> KernelSpec:
    """A kernelspec of this prefix, or the plain Python kernel of a prefix that has ipykernel but no spec."""
    directory = prefix / "share" / "jupyter" / "kernels" / name
    if (directory / "kernel.json").exists():
        return KernelSpec.from_resource_dir(str(directory))
    if name == NATIVE_KERNEL_NAME:
        python = str(prefix / "bin" / "python")
        return KernelSpec(argv=[python, "-m", "ipykernel_launcher", "-f", "{connection_file}"], language="python")
    raise NoSuchKernel(name)


def _let_failures_decide(cell: NotebookNode) -> None:
    """Put errors and stderr before results in a test cell.

    nbgrader's `determine_grade` stops at the first result, so that one displayed by the tested code would
    otherwise decide over the assertion that fails after it. An honest cell has no result before its error, and one
    result at the most: the value of its last expression. Which of several is the instructor's cannot be told.
    """
    if cell.cell_type != "code" or not cell.metadata.get("nbgrader", {}).get("grade"):
        return
    results = [output for output in cell.outputs if output.output_type == "execute_result"]
    others = [output for output in cell.outputs if output.output_type != "execute_result"]
    if len(results) > 1:
        text = "This test cell has several results, so that one of them was displayed by the tested code; no points."
        others.append(error("SeveralResultsError", text))
    if any(_is_above(output, cell.metadata["nbgrader"].get("points", 0)) for output in results):
        text = "The result of this test cell is a number above the cell's points, so that it is no partial credit."
        others.append(error("ResultAboveMaximumError", text))
    cell.outputs = [*others, *results]


def _is_above(output: NotebookNode, points: float) -> bool:
    """Whether nbgrader would give up the whole notebook for this result. nbgrader.utils.get_partial_grade"""
    try:
        return float(output.data.get("text/plain", "")) > float(points)
    except ValueError:
        return False
