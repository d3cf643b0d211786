"""The seam into nbgrader: `IsolatedExecute` stands in the place of nbgrader's `Execute`.

One notebook enters `preprocess` sanitised by nbgrader (cells overwritten from the gradebook); its code sources
go to a driver room and the files beside it to a kernel room (`isolate.notebook`); outputs come back. What the
student's code caused becomes an error in its cells; what it did not cause becomes no score at all.
"""

import copy
import dataclasses
import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import nbformat
from jupyter_client.kernelspec import NATIVE_KERNEL_NAME, KernelSpec, KernelSpecManager, NoSuchKernel
from nbformat import NotebookNode
from nbgrader.api import Gradebook
from nbgrader.converters.base import NbGraderException
from nbgrader.preprocessors import Execute

from isolate.environment import environment_policy, find_executable, home_files
from isolate.files import pack
from isolate.notebook import Execution, ExecutionReport, Kernel, Nursery, Settings
from isolate.policy import LASTING, Bind, Policy, SandboxError
from nbgrader_aalto import kept
from nbgrader_aalto.decisive import let_failures_decide
from nbgrader_aalto.orders import LocalOrder, Order, Result, ServiceOrder, bare, carry_out, take_outputs
from nbgrader_aalto.preimports import preimports
from nbgrader_aalto.run import Run, run_of
from nbgrader_aalto.settings import LIMITS, LOCAL_SETTINGS, SandboxSettings
from nbgrader_aalto.shared import is_shared
from nbgrader_aalto.written import WRITTEN_SUFFIX, keep_written

if TYPE_CHECKING:
    from grader_service.schemas import JobView

_HOOKS = tuple(f"on_notebook_{when}" for when in ("start", "complete", "error")) + tuple(
    f"on_cell_{when}" for when in ("start", "execute", "complete", "error")
)


LEFT_OUT = ("*.ipynb", f"*{WRITTEN_SUFFIX}")
"""Names of files beside a notebook that its code does not find there."""


class HostFault(NbGraderException):
    """No score: the sandbox or the host failed, and the student is not to blame."""


class IsolatedExecute(SandboxSettings, Execute):
    """nbgrader's Execute, with the kernel in a sandbox. `c.Execute.*` settings keep their meaning.

    Where they cannot, docs/configuration.md says so.
    """

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
            "Executed notebook '%s' of student '%s' (%s): %s, %.1f s, %.1f s cpu, %d MiB",
            *(where["notebook"], where["student"], report.start, report.ended),
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
            let_failures_decide(cell)
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
            run_of(self._converter).kernels.clear()
            return self._execute(nb, where, directory)

    def _execute(self, nb: NotebookNode, where: dict[str, str], directory: Path) -> Execution:
        self._warn_of_hooks()
        limits = self.limits()
        run = run_of(self._converter)
        work = run.work_of(where)
        files = work.files or pack(
            directory, leave_out=LEFT_OUT, max_bytes=limits.work_bytes, max_files=limits.work_files
        )
        order = self.order(nb, where, len(self._converter.notebooks))
        result = self._ahead_or_now(run, order, where, files)
        try:
            if self.keep_files:
                keep_written(result.keep, files, directory / f"{where['notebook']}{WRITTEN_SUFFIX}")
        except BaseException:
            result.keep.close()
            raise
        if result.keep.seek(0, os.SEEK_END):
            work.take(result.keep)
        execution = result.execution
        return Execution(take_outputs(copy.deepcopy(nb), execution.notebook), execution.report)

    def _ahead_or_now(self, run: Run, order: Order, where: dict[str, str], files: IO[bytes]) -> Result:
        ahead = run.ahead
        if ahead is None:
            return carry_out(order, files)
        result = ahead.take(where["assignment"], where["student"], where["notebook"], order, files)
        if result is not None:
            return result
        with ahead.alone():
            return carry_out(order, files)

    def order(self, nb: NotebookNode, where: dict[str, str], notebooks: int) -> Order:
        """What is to be executed for this sanitised notebook, one of so many of a student's. Raises `SandboxError`."""
        if self.service_url:
            return self._service_order(nb, where, notebooks)
        kernels = run_of(self._converter).kernels
        name = self._kernel_name(where)
        if name not in kernels:
            kernels[name] = self._kernel_and_policy(name)
        kernel, policy = kernels[name]
        return LocalOrder(
            bare(nb),
            kernel,
            policy,
            self._settings(),
            frozenset(self._skipped(nb, where)),
            self._timeouts(nb),
            self._log_progress,
            self._nursery(where["assignment"]),
        )

    def _nursery(self, assignment: str) -> Nursery | None:
        """Where this assignment's kernels are forked, if they are. Made once in a run."""
        run, course = run_of(self._converter), self._converter.coursedir
        if assignment not in run.nurseries:
            # Not where others are executed ahead: such a run ends its sandboxes by closing their nursery.
            keeps = kept.in_server() and run.ahead is None and not run.nurseries
            if not (self.warm and (run.pays_warmth or keeps)):
                return None
            steps = (course.source_directory, course.release_directory)
            directories = [Path(course.format_path(step, ".", assignment)) for step in steps]
            imports = preimports(next(filter(Path.is_dir, directories), None), self.warm_imports)
            self.log.info("Imported before kernels start: %s", ", ".join(imports) or "nothing of the assignment's")
            run.nurseries[assignment] = (
                kept.nursery((course.root, assignment), imports, patient=run.pays_warmth) if keeps else Nursery(imports)
            )
        return run.nurseries[assignment]

    def _service_order(self, nb: NotebookNode, where: dict[str, str], notebooks: int) -> ServiceOrder:
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
            "keep_files": self.keep_files or notebooks > 1,
        }
        return ServiceOrder(
            bare(nb),
            self.service_url,
            self.service_token_file,
            self._course_group(),
            self.service_plain_http,
            self.service_course or self._converter.coursedir.course_id,
            asked,
            self._log_job(where),
        )

    def _course_group(self) -> int | None:
        """The group of a course of several instructors, who share its token."""
        course = self._converter.coursedir
        root = Path(course.root)
        return root.stat().st_gid if is_shared(root, bool(course.groupshared)) else None

    def _limits_asked(self) -> dict[str, float]:
        """Only what the course set: for the rest, the service has the course's defaults."""
        configured = self.configured()
        if local := sorted(LOCAL_SETTINGS & configured):
            raise SandboxError(
                "policy",
                f"c.IsolatedExecute.{local[0]} is about this machine, and notebooks are executed by {self.service_url}",
                "remove that line; what student code sees there is in the service's table of this course",
            )
        limits = dataclasses.asdict(self.limits())
        return {name: limits[name] for setting, name in LIMITS.items() if setting in configured}

    def _log_job(self, where: dict[str, str]) -> Callable[["JobView"], None]:
        from nbgrader_aalto.remote import words_of

        def tell(job: "JobView") -> None:
            self.log.info("Notebook '%s' of student '%s' is %s", where["notebook"], where["student"], words_of(job))

        return tell

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

    def _kernel_and_policy(self, name: str) -> tuple[Kernel, Policy]:
        spec = self._kernelspec(name)
        executable = find_executable(spec.argv[0], Path(self.environment) if self.environment else None)
        policy = environment_policy([executable], environment=self._passed_variables(), limits=self.limits())
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

    def _kernelspec(self, name: str) -> KernelSpec:
        try:
            if self.environment:
                return _kernelspec_in(Path(self.environment), name)
            return KernelSpecManager(parent=self).get_kernel_spec(name)
        except NoSuchKernel as error:
            raise SandboxError("kernel", f"there is no kernel named '{name}' here", "install its kernelspec") from error

    def _kernel_name_of_source(self, where: dict[str, str]) -> str:
        kernelspecs, which = run_of(self._converter).kernelspecs, (where["assignment"], where["notebook"])
        if which not in kernelspecs:
            with Gradebook(self._converter.coursedir.db_url, self._converter.coursedir.course_id) as gradebook:
                kernelspecs[which] = gradebook.find_notebook(where["notebook"], where["assignment"]).kernelspec
        stored = kernelspecs[which]
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
        try:
            status = os.stat(path)
        except FileNotFoundError:
            return []
        known, version = run_of(self._converter).sources, (status.st_ino, status.st_size, status.st_mtime_ns)
        if path not in known or known[path][0] != version:
            cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
            known[path] = version, cells
        return known[path][1]

    def _log_progress(self, index: int, state: str) -> None:
        self.log.debug("Cell %d %s", index + 1, state)

    def _warn_of_hooks(self) -> None:
        for name in _HOOKS:
            if getattr(self, name, None) is not None:
                self.log.warning("c.Execute.%s is not called: cells run in a sandbox", name)


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
