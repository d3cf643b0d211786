"""The `nbgrader-aalto` command. Knows words and exit codes; each subcommand names its handler."""

import argparse
import grp
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from isolate.arguments import seconds
from nbgrader_aalto import course, upkeep
from nbgrader_aalto.create import create as create_course

FOUND, REFUSED, UNCONFIRMED = 1, 2, 3
"""Exit codes: something is left to do, or wrong; nothing was done; a receipt is not confirmed."""

_CREATE_EPILOG = """\
Makes what is missing, and can be run again: what is there is kept, modes of your own directories are mended. A member
of the group runs it, where he or she may write; what is missing then is listed with the command that an administrator
runs. Or root runs all of it.

  COURSE DIR   2770, GROUP: source/ and all that follows from it, gradebook.db, git, nbgrader_config.py, logs/
  ROOT         the exchange of all courses; made (0755) if it is missing, otherwise left alone
  ROOT/SLUG    2775, GROUP: outbound/ (2775); inbound/ and feedback/ (3773: students put in, and see nothing)

Each instructor, once, since git does not trust a colleague's repository by itself:
  git config --global --add safe.directory DIR

exit code: 0 all is there; 1 something is missing, see what was printed; 2 nothing was made

examples:
  nbgrader-aalto course create python26 --group jupyter-python26 \\
      --course-dir /courses/python26 --exchange /srv/nbgrader/exchange
  nbgrader-aalto course create python27 --group jupyter-python27 \\
      --course-dir /courses/python27 --exchange /srv/nbgrader/exchange --from /courses/python26
"""
_CHECK_EPILOG = """\
Looks at owners, groups and modes in the course directory, at the gradebook and its journal, and in the exchange at the
course's directory, at outbound with all that was released, and at the modes of inbound and feedback themselves. What
students handed in is never looked at. Each finding comes with what is wrong and who runs what.

Without --exchange it is the one of nbgrader_config.py. Root does not run that file, which instructors may change, and
names SLUG and --exchange, or only the course directory is looked at. With SLUG and all options it is run for nobody.

exit code: 0 nothing found; 1 something; 2 the course was not found, or is not yours

examples:
  nbgrader-aalto course check
  nbgrader-aalto course check python26 --course-dir /courses/python26
"""
_REPAIR_EPILOG = """\
Your own files and directories get the group and the modes. Files of others that you can read are replaced by a copy
where their directory lets you, with content and time as they were; a gradebook or a log never, since somebody may have
it open. For the rest the owner's name and command is printed; quickest, the owner runs `nbgrader-aalto course repair`.
What commands left that were killed is put right as their next run would: an earlier version is back, half made things
go. Nothing else is removed, links are not followed, inbound is not touched. Root mends all modes, and nothing else.

exit code: 0 all is well now; 1 something is left; 2 the course was not found, or is not yours

examples:
  nbgrader-aalto course repair
  sudo nbgrader-aalto course repair python26 --course-dir /courses/python26 --exchange /srv/nbgrader/exchange
"""
_WATCH_EPILOG = """\
Copies what students hand in into the course's vault, soon after: what they change or destroy afterwards changes nothing
about it, and they get confirmed receipts. `nbgrader collect` then chooses from the vault. Any instructor runs it in the
course directory, where nbgrader_config.py is; several may run, and they take turns. SIGTERM or ^C ends it after the
pass at hand; a second one at once. Root does not run it: instructors may change that file.

exit code: 0 ended as told; 1 it could not be done; 2 the course was not found

examples:
  nbgrader-aalto exchange watch python26
  nbgrader-aalto exchange watch python26 --once       (for a timer)
  systemd-run --user --working-directory=/courses/python26 nbgrader-aalto exchange watch python26
"""
_SIZES_EPILOG = """\
Counts all that lies in the course's inbound by owner, the largest first. Only a quota of the file system can bound it;
this says for whom one is due. An instructor runs it in the course directory, or names it.

exit code: 0 counted; 2 the course was not found

examples:
  nbgrader-aalto exchange sizes python26
"""
_VERIFY_EPILOG = """\
A receipt is given at submit, unconfirmed. When the course has the submission, an instructor's process puts a confirmed
one into the student's box, where nobody else can. This says which it is, and whether the files in the student's own
record are still those of the receipt. PATH is such a record, or a receipt; without it, all records of one's own.
For instructors the course's vault decides instead: they run it in the course directory. Where everybody has one uid
(identity 'shared'), a confirmation in a box is "unproved": anybody could have written it. Only the vault confirms.

exit code: 0 all confirmed; 1 one is wrong: its files, or its confirmation; 2 no answer; 3 one is unconfirmed, unproved

examples:
  nbgrader-aalto receipt verify
  nbgrader-aalto receipt verify --course python26
  nbgrader-aalto receipt verify mail/receipt.json     (an instructor, of what a student sent)
"""


def directory(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    return Path(os.path.abspath(os.path.expanduser(text)))


def group(text: str) -> int:
    """The gid of a group's name, or of a number."""
    try:
        return grp.getgrnam(text).gr_gid
    except KeyError:
        pass
    if text.isdecimal() and len(text) < 10:
        return int(text)
    raise argparse.ArgumentTypeError(
        f"there is no group {text!r} here. An administrator makes it (groupadd {text}) and puts each instructor into "
        f"it (usermod -a -G {text} USER); or name another one with --group"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nbgrader-aalto", description="nbgrader for several instructors, safely.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_course(commands)
    _add_exchange(commands)
    _add_receipt(commands)
    return parser


def _add_course(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    one = commands.add_parser("course", help="make a course for several instructors; check and repair it")
    actions = one.add_subparsers(dest="action", required=True, metavar="ACTION")
    make = _action(actions, "create", "make a course's directories, gradebook, git and configuration", _CREATE_EPILOG)
    make.add_argument("slug", metavar="SLUG", help="the course's name: c.CourseDirectory.course_id")
    make.add_argument("--group", type=group, help="the Unix group of its instructors (jupyter-SLUG)")
    make.add_argument("--course-dir", metavar="DIR", type=directory, required=True, help="the instructors' directory")
    make.add_argument("--exchange", metavar="ROOT", type=directory, required=True, help="the exchange of all courses")
    make.add_argument(
        "--from",
        dest="old",
        metavar="OLD",
        type=directory,
        help="an earlier course's directory: take over source/, *.md and settings, as committed in its git;"
        " nothing of students",
    )
    make.set_defaults(handler=create)
    for name, words, epilog, handler in (
        ("check", "find what instructors cannot all use; changes nothing", _CHECK_EPILOG, check),
        ("repair", "mend what check finds, as far as you may", _REPAIR_EPILOG, repair),
    ):
        each = _action(actions, name, words, epilog)
        each.add_argument("slug", metavar="SLUG", nargs="?", help="the course's name, if it is not configured")
        each.add_argument("--course-dir", metavar="DIR", type=directory, help="(as configured, or here)")
        each.add_argument("--exchange", metavar="ROOT", type=directory, help="(as configured)")
        each.add_argument("--group", type=group, help="of the instructors (that of the course directory)")
        each.set_defaults(handler=handler)


def _add_exchange(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    two = commands.add_parser("exchange", help="look after what students hand in")
    actions = two.add_subparsers(dest="action", required=True, metavar="ACTION")
    each = _action(actions, "watch", "take submissions into the course's vault as they come", _WATCH_EPILOG)
    each.add_argument("course", metavar="COURSE", help="the course's name: c.CourseDirectory.course_id")
    each.add_argument("--course-dir", metavar="DIR", type=directory, help="(as configured, or here)")
    each.add_argument("--once", action="store_true", help="one pass, then end")
    each.add_argument("--interval", metavar="SECONDS", type=seconds, default=2.0, help="between passes (%(default)g)")
    each.set_defaults(handler=watch)
    each = _action(actions, "sizes", "who uses how much of the exchange", _SIZES_EPILOG)
    each.add_argument("course", metavar="COURSE", help="the course's name: c.CourseDirectory.course_id")
    each.add_argument("--course-dir", metavar="DIR", type=directory, help="(as configured, or here)")
    each.set_defaults(handler=sizes)


def _add_receipt(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    three = commands.add_parser("receipt", help="of what was handed in")
    actions = three.add_subparsers(dest="action", required=True, metavar="ACTION")
    each = _action(actions, "verify", "say whether receipts are confirmed, and files still the same", _VERIFY_EPILOG)
    each.add_argument("paths", metavar="PATH", nargs="*", type=directory, help="a receipt, or a record (all)")
    each.add_argument("--course", metavar="COURSE", help="(as configured, or all)")
    each.set_defaults(handler=verify)


def _action(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, words: str, epilog: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name, help=words, description=words, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def create(options: argparse.Namespace) -> int:
    """`nbgrader-aalto course create`."""
    try:
        gid = group(f"jupyter-{options.slug}") if options.group is None else options.group
    except argparse.ArgumentTypeError as error:
        raise course.CourseError(str(error)) from error
    made = create_course(course.Course(options.slug, options.course_dir, options.exchange, gid), options.old)
    for line in made.done:
        print(line)
    for line in made.missing:
        print(f"missing: {line}", file=sys.stderr)
    if made.missing:
        return FOUND
    print(f"The course {options.slug} is there. Students are configured with")
    print(f"  c.CourseDirectory.course_id = {options.slug!r}\n  c.Exchange.root = {str(options.exchange)!r}")
    return 0


def check(options: argparse.Namespace) -> int:
    """`nbgrader-aalto course check`."""
    return _tell(upkeep.check(_found(options)))


def repair(options: argparse.Namespace) -> int:
    """`nbgrader-aalto course repair`."""
    return _tell(upkeep.repair(_found(options), print))


def _found(options: argparse.Namespace) -> course.Course:
    told = all((options.slug, options.course_dir, options.exchange, options.group is not None))
    found = course.find(
        options.slug,
        options.course_dir,
        exchange=options.exchange,
        group=options.group,
        run_configuration=os.geteuid() != 0 and not told,
    )
    if not found.in_exchange:
        print(
            "nbgrader-aalto: only the course directory is looked at: SLUG or --exchange are not known", file=sys.stderr
        )
    return found


def _tell(findings: Sequence[course.Finding]) -> int:
    for finding in findings:
        print(finding)
    if not findings:
        return 0
    owners = sorted({finding.owner for finding in findings})
    print(f"nbgrader-aalto: {len(findings)} found; owners: {', '.join(owners)}", file=sys.stderr)
    return FOUND


def watch(options: argparse.Namespace) -> int:
    """`nbgrader-aalto exchange watch`."""
    if os.geteuid() == 0:
        raise course.CourseError(
            "root does not watch: it would run the course's nbgrader_config.py, and own what it takes in. As an "
            "instructor: runuser -u USER -- nbgrader-aalto exchange watch ..."
        )
    if problem := course.slug_problem(options.course):
        raise course.CourseError(f"{options.course!r} cannot be a course: {problem}")
    app = _nbgrader(options.course, options.course_dir)
    from nbgrader.exchange import ExchangeError

    from nbgrader_aalto.exchange.collect import ExchangeCollect
    from nbgrader_aalto.exchange.watch import watch

    stop = threading.Event()

    def end(number: int, _: FrameType | None) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)

    class Watcher(ExchangeCollect):
        """Checks all that collect checks, then takes in and does not choose."""

        def copy_files(self) -> None:
            self.log.info("Watching %s", self.inbound_path)
            watch(self, self.log.info, once=options.once, interval_seconds=options.interval, stop=stop)

    try:
        Watcher(coursedir=app.coursedir, authenticator=app.authenticator, parent=app).start()
    except ExchangeError:
        return FOUND  # the log says why
    return 0


def sizes(options: argparse.Namespace) -> int:
    """`nbgrader-aalto exchange sizes`."""
    if os.geteuid() == 0:
        raise course.CourseError("root does not run the course's nbgrader_config.py; an instructor does this")
    if problem := course.slug_problem(options.course):
        raise course.CourseError(f"{options.course!r} cannot be a course: {problem}")
    app = _nbgrader(options.course, options.course_dir)
    from nbgrader_aalto.exchange.collect import ExchangeCollect
    from nbgrader_aalto.exchange.usage import readable, usage

    exchange = ExchangeCollect(coursedir=app.coursedir, authenticator=app.authenticator, parent=app)
    print(f"{'bytes':>10} {'files':>8} {'entries':>8}  owner")
    for one in usage(exchange.places.inbound, exchange.people()):
        print(f"{readable(one.bytes):>10} {one.files:>8} {one.entries:>8}  {course.printable(one.owner)}")
    return 0


def verify(options: argparse.Namespace) -> int:
    """`nbgrader-aalto receipt verify`."""
    if options.course and (problem := course.slug_problem(options.course)):
        raise course.CourseError(f"{options.course!r} cannot be a course: {problem}")
    app = _nbgrader()
    configured = app.coursedir.course_id
    from nbgrader_aalto.exchange.collect import ExchangeCollect
    from nbgrader_aalto.exchange.verify import Judges, State, Verdict, worst
    from nbgrader_aalto.exchange.verify import verify as judge
    from nbgrader_aalto.trees import Unfit

    exchange = ExchangeCollect(coursedir=app.coursedir, authenticator=app.authenticator, parent=app)
    verdicts = []
    for name, path in _receipts(options.paths, options.course or configured, Path(exchange.cache)):
        app.coursedir.course_id = name
        vault = None
        if name == configured and exchange.is_member() and os.access(exchange.open_vault().path, os.R_OK):
            vault = exchange.open_vault()
        try:
            judges = Judges(
                *(exchange.own_boxes(), vault, exchange.people(), lambda record: exchange.label(record, None)),
                by_owner=exchange.identity == "unix",
            )
            verdict = judge(path, judges)
        except (OSError, Unfit) as error:
            verdict = Verdict(State.WRONG, f"{path}: {error}")
        verdicts.append(verdict)
        print(f"{verdict.state.value}: {course.printable(verdict.words)}")
    if not verdicts:
        print(f"nbgrader-aalto: nothing was handed in from here: no records in {exchange.cache}", file=sys.stderr)
        return UNCONFIRMED
    return {State.CONFIRMED: 0, State.WRONG: FOUND}.get(worst(verdicts), UNCONFIRMED)


def _receipts(paths: Sequence[Path], wanted: str, cache: Path) -> Iterator[tuple[str, Path]]:
    """Course and place of each. Where no course is wanted, a receipt says itself of which it is."""
    from nbgrader_aalto.exchange.receipts import FILE, ReceiptError, parse_receipt
    from nbgrader_aalto.exchange.verify import own_records

    for path in paths:
        name = wanted
        if not name:
            try:
                name = parse_receipt((path / FILE if path.is_dir() else path).read_bytes()).course
            except (OSError, ReceiptError):
                name = ""  # `verify` will say so
        yield "" if course.slug_problem(name) else name, path
    if not paths:
        names = [wanted] if wanted else sorted(os.listdir(cache)) if cache.is_dir() else []
        for name in names:
            if not course.slug_problem(name):
                yield from ((name, path) for path in own_records(cache, name))


def _nbgrader(name: str | None = None, root: Path | None = None) -> Any:
    """nbgrader's application, as its own commands have it: configuration loaded, and a log on stderr."""
    from nbgrader.apps.baseapp import NbGrader
    from nbgrader.auth import Authenticator

    app = NbGrader(raise_config_file_errors=True)
    try:
        app.initialize([], root=str(root) if root else "")
    except Exception as error:
        raise course.CourseError(f"nbgrader_config.py cannot be used: {type(error).__name__}: {error}") from error
    configured = app.coursedir.course_id
    if name and configured and name != configured:
        raise course.CourseError(f"{app.coursedir.root} is the course {configured!r}, not {name!r}: see --course-dir")
    if name:
        app.coursedir.course_id = name
    app.authenticator = Authenticator(parent=app)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        code: int = options.handler(options)
    except (course.CourseError, OSError) as error:
        print(f"nbgrader-aalto: {error}", file=sys.stderr)
        return REFUSED
    return code


if __name__ == "__main__":
    sys.exit(main())
