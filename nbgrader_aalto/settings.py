"""Settings of `IsolatedExecute`, with their help texts; docs/configuration.md has a row for each."""

from textwrap import dedent

from traitlets import Bool, Dict, Enum, Float, HasTraits, Integer, List, Unicode, default

from isolate.policy import TIERS, Limits, SandboxError, parse_size
from nbgrader_aalto.written import WRITTEN_SUFFIX

_DEFAULT = Limits()

LIMITS = {
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

LOCAL_SETTINGS = frozenset({"environment", "read_only", "tier", "warm", "warm_imports"})
"""About this machine: of no effect where a service executes."""


class SandboxSettings(HasTraits):
    """A mixin for a `Configurable`, so that its name is the only one in a configuration."""

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
    jobs = Integer(
        0,
        min=0,
        help=dedent(
            """
            How many notebooks are executed at a time while several students are autograded: the next students'
            sandboxes already run. 0: one for each core, as far as `memory` for each is available. 1: none ahead.
            """
        ),
    ).tag(config=True)
    warm = Bool(
        True,
        help=dedent(
            """
            Whether kernels are forked from one that has imported what the assignment imports, which takes a tenth of
            the time to start. False: each kernel is started afresh, with a hash() seed and addresses of its own.
            """
        ),
    ).tag(config=True)
    warm_imports = List(
        Unicode(),
        default_value=None,
        allow_none=True,
        help=dedent(
            """
            Modules that are imported before kernels are forked. None: what the assignment's source notebooks import.
            Nothing is, whatever this says, where they look at sys.modules: tests forbid packages so.
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
    service_plain_http = Bool(
        False,
        help=dedent(
            """
            Whether the token and submissions may travel over http:// to another machine, where whoever is in between
            can read and change them. For a network that carries nobody else's traffic.
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

    def limits(self) -> Limits:
        """Raises `SandboxError` for settings that are none."""
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

    def configured(self) -> set[str]:
        """Names of the settings that a configuration file or the command line set."""
        sections = [self.config.get(cls.__name__, {}) for cls in type(self).mro()]
        return {name for section in sections for name in section}
