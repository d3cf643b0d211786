"""The `isolate` command."""

import argparse
import contextlib
import dataclasses
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from isolate import doctor, shell
from isolate.arguments import seconds
from isolate.environment import environment_policy
from isolate.kernels import INTERACTIVE, kernel_policy
from isolate.policy import TIERS, WORK, Bind, Limits, Policy, Report, SandboxError, parse_size, system_policy
from isolate.sandbox import Command, Sandbox

WALL_LIMIT, NOT_BUILT = 124, 125
"""Exit codes, after timeout(1)."""

_EPILOG = """\
The command sees the system's programs and libraries, the paths that you name, and writable places in memory
(its work directory, HOME, /tmp, /dev/shm). It sees no other file, no process, no network and no variable of
yours.

exit code: the command's own; 128 + N if signal N ended it; 124 the wall limit; 125 the sandbox could not be
built; 126 the command cannot be executed; 127 it was not found.

examples:
  isolate run -- python3 -c 'print(open("/etc/shadow").read())'
  isolate run --memory 500M --wall 10 --ro ~/course/data -- python3 ~/course/data/check.py
  isolate run --rw ./out:/out -- sh -c 'date > /out/when'
"""

_KERNEL_EPILOG = """\
A kernelspec whose argv called a wrapper calls this instead:

  "argv": ["isolate", "kernel", "-f", "{connection_file}", "--", "python", "-m", "ipykernel_launcher",
           "-f", "{connection_file}"]

The kernel has no network: what the client sends to the ports in FILE is copied to the kernel's unix sockets, and
back. Where CMD names FILE, or {connection_file}, it is given a file of its own. SIGINT interrupts the kernel, SIGTERM
asks it to end. Clients that know kernel provisioners need none of this: see docs/kernels.md.
"""


def size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def count(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _absolute(text: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(text)))


def read_only_path(text: str) -> Bind:
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    return Bind(_absolute(text))


def writable_path(text: str) -> Bind:
    """`PATH` or `PATH:AT`; a path that holds a colon itself is taken whole when it exists."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    source, _, at = text.rpartition(":")
    if not source or not at.startswith("/") or os.path.exists(text):
        return Bind(_absolute(text))
    if ".." in Path(at).parts:
        raise argparse.ArgumentTypeError(f"{at!r} must not contain '..'")
    return Bind(_absolute(source), Path(at))


def variable(text: str) -> tuple[str, str]:
    """`K=V`, or `K` to pass on one's own."""
    name, equals, value = text.partition("=")
    if not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    if not equals and name not in os.environ:
        raise argparse.ArgumentTypeError(f"{name} is not set here; write {name}=VALUE")
    return name, value if equals else os.environ[name]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="isolate", description="Run code that nobody has read in a sandbox.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    one = commands.add_parser(
        "run",
        help="run a command in a sandbox",
        usage="isolate run [options] -- CMD...",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_policy_options(one, Limits())
    one.add_argument(
        "--report", metavar="FILE", type=Path, help="write a JSON report: how it ended, time, memory, layers"
    )
    one.add_argument("cmd", nargs=argparse.REMAINDER, metavar="CMD")
    one.set_defaults(handler=run)
    _add_kernel(commands)
    _add_shell(commands)
    check = commands.add_parser(
        "doctor",
        help="try every layer of a sandbox on this host, and say what is missing, why, and what to do",
        epilog="exit code: 0 if the full sandbox can be built here by this user, 1 if not",
    )
    check.add_argument("--json", action="store_true", help="write JSON for programs")
    check.set_defaults(handler=doctor.run)
    return parser


def _add_kernel(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    two = commands.add_parser(
        "kernel",
        help="run a Jupyter kernel in a sandbox, for kernelspecs that call a wrapper",
        usage="isolate kernel -f FILE [options] -- CMD...",
        epilog=_KERNEL_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    two.add_argument(
        "-f", dest="connection_file", metavar="FILE", type=Path, required=True, help="the client's connection file"
    )
    _add_policy_options(two, INTERACTIVE)
    two.add_argument("cmd", nargs=argparse.REMAINDER, metavar="CMD")
    two.set_defaults(handler=kernel)


def _add_shell(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    three = commands.add_parser(
        "shell", help="a shell in a sandbox, for looking around", usage="isolate shell [options]"
    )
    _add_policy_options(three, INTERACTIVE)
    three.set_defaults(handler=look_around)


def _add_policy_options(parser: argparse.ArgumentParser, defaults: Limits) -> None:
    """What every subcommand that makes a sandbox takes; read by `_policy`."""
    add = parser.add_argument
    add("--ro", metavar="PATH", action="append", default=[], type=read_only_path, help="show PATH, read-only")
    add(
        "--rw",
        metavar="PATH[:AT]",
        action="append",
        default=[],
        type=writable_path,
        help="show PATH, writable, at AT; what the command does there is done to the real files. Root: files"
        " of the directory's owner are the command's own, there only",
    )
    add(
        "--env",
        metavar="K=V",
        action="append",
        default=[],
        type=variable,
        help="set a variable (K alone: pass on yours)",
    )
    add("--cwd", metavar="DIR", default=WORK, help="start in this directory of the sandbox (%(default)s)")
    add("--memory", metavar="SIZE", type=size, default=defaults.memory_bytes, help="of all processes together (2G)")
    add("--cpu", metavar="SECONDS", type=seconds, default=defaults.cpu_seconds, help="processor time (%(default)g)")
    add("--wall", metavar="SECONDS", type=seconds, default=defaults.wall_seconds, help="time (%(default)g)")
    add("--processes", metavar="N", type=count, default=defaults.processes, help="and threads (128)")
    add("--files", metavar="SIZE", type=size, default=defaults.files_bytes, help="of all files that it writes (256M)")
    add(
        "--tier",
        choices=TIERS,
        default=TIERS[0],
        help="landlock: a weaker wall for hosts without namespaces; `isolate doctor` says what it does not stop",
    )


def _limits(options: argparse.Namespace) -> Limits:
    return Limits(
        wall_seconds=options.wall,
        cpu_seconds=options.cpu,
        memory_bytes=options.memory,
        processes=options.processes,
        files_bytes=options.files,
    )


def _policy(options: argparse.Namespace, program_name: str) -> Policy:
    """The system, the environment of this program if it is named by path, and what the options add."""
    limits = _limits(options)
    program = shutil.which(program_name) if os.path.isabs(program_name) else None
    base = environment_policy([Path(program)], limits=limits) if program else system_policy(limits=limits)
    return _with_options(base, options)


def _with_options(base: Policy, options: argparse.Namespace) -> Policy:
    return dataclasses.replace(
        base,
        read_only=(*base.read_only, *options.ro),
        writable=tuple(options.rw),
        environment={**base.environment, **dict(options.env)},
        tier=options.tier,
    )


def exit_code(report: Report) -> int:
    """What a shell expects of a command that ended like this."""
    if report.ended == "exited" and report.exit_code is not None:
        return report.exit_code
    if report.limit == "wall":
        return WALL_LIMIT
    return 128 + (report.signal or signal.SIGKILL)


def run(options: argparse.Namespace) -> int:
    """`isolate run`."""
    command = Command(options.cmd, cwd=options.cwd, stdin=None)
    with contextlib.ExitStack() as stack:
        report_file = stack.enter_context(options.report.open("w", encoding="utf-8")) if options.report else None
        sandbox = Sandbox(_policy(options, options.cmd[0]), command)
        early: list[str] = []
        built = False

        def forward(number: int, _: FrameType | None) -> None:
            word = "interrupt" if number == signal.SIGINT else "terminate"
            if built:
                sandbox.send(word)
            else:
                early.append(word)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, forward)
        stack.enter_context(sandbox)
        built = True
        for word in early:
            sandbox.send(word)
        report = sandbox.wait()
        if report_file:
            report_file.write(report.to_json() + "\n")
    if report.ended in {"limit", "signal"}:
        print(f"isolate: {report.message}", file=sys.stderr)
    return exit_code(report)


def kernel(options: argparse.Namespace) -> int:
    """`isolate kernel`."""
    from isolate import relay  # and with it asyncio

    def policy_for(executable: Path) -> Policy:
        return _with_options(kernel_policy(executable, _limits(options)), options)

    ending = relay.run(options.connection_file, options.cmd, policy_for, options.cwd)
    if ending.problem:
        print(f"isolate: the kernel: {ending.problem}", file=sys.stderr)
    return exit_code(ending.report) if ending.report else NOT_BUILT


def look_around(options: argparse.Namespace) -> int:
    """`isolate shell`."""
    base = system_policy(shell.variables(), _limits(options))
    print(shell.banner(options.ro, options.rw, options.files), file=sys.stderr, flush=True)
    report = shell.run(_with_options(base, options), options.cwd)
    if report.ended == "limit":
        print(f"isolate: {report.message}", file=sys.stderr)
    return exit_code(report)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if "cmd" in options:
        if options.cmd[:1] == ["--"]:
            del options.cmd[0]
        if not options.cmd:
            parser.error(f"a command is missing: isolate {options.command} [options] -- CMD...")
    try:
        code: int = options.handler(options)
    except SandboxError as error:
        print(f"isolate: the sandbox could not be built: {error}", file=sys.stderr)
        return NOT_BUILT
    except OSError as error:
        print(f"isolate: {error}", file=sys.stderr)
        return NOT_BUILT
    return code


if __name__ == "__main__":
    sys.exit(main())
