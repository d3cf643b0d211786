"""The `grader-service` command. Knows words and exit codes; what takes long to import is imported where it is used."""

import argparse
import datetime
import getpass
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from grader_service.settings import Settings
    from grader_service.tokens import TokenInfo

REFUSED = 2
"""Exit code when nothing was done."""

_DEFAULT_CONFIG = "/etc/grader-service.toml"

_EPILOG = """\
A first start:
  grader-service config check            is every course's environment there? prints each mistake with its line
  grader-service db upgrade              makes or updates the tables
  grader-service token create --course python26 --expires 180d
  grader-service serve

The configuration is --config, or $GRADER_SERVICE_CONFIG, or /etc/grader-service.toml.
exit code: 0 done; 1 done, and something is wrong; 2 nothing was done, see what was printed.
"""


class Refusal(Exception):
    """Nothing was done; the text says why and what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    from grader_service.settings import ConfigurationError

    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except (Refusal, ConfigurationError) as error:
        print(f"grader-service: {error}", file=sys.stderr)
        return REFUSED
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="grader-service",
        description="Queues and runs grading jobs of many courses in sandboxes.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=Path(os.environ.get("GRADER_SERVICE_CONFIG", _DEFAULT_CONFIG)),
        help="the TOML file [%(default)s]",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="accept and run jobs until told to end; SIGHUP reads the file again")
    serve.add_argument("--log-level", choices=["debug", "info", "warning", "error"], default="info")
    serve.add_argument("--log-format", choices=["json", "text"], default="json")
    serve.add_argument(
        "--upgrade", action="store_true", help="bring the database up to date first, like `db upgrade` by hand"
    )
    serve.set_defaults(run=_serve)

    _add_token_commands(commands)
    _add_job_commands(commands)

    purge = commands.add_parser("purge", help="delete everything of one student in this service, and say what it was")
    purge.add_argument("--student", required=True, help="the student's id in nbgrader")
    purge.add_argument("--yes", action="store_true", help="do it; without, only say what there is")
    purge.set_defaults(run=_purge)

    config = commands.add_parser("config", help="the configuration file").add_subparsers(required=True)
    check = config.add_parser("check", help="print every mistake with its line, or what each course may do")
    check.set_defaults(run=_config_check)

    hub = commands.add_parser("hub-config", help="print what belongs into jupyterhub_config.py")
    hub.set_defaults(run=_hub_config)

    database = commands.add_parser("db", help="the database").add_subparsers(required=True)
    upgrade = database.add_parser("upgrade", help="make the tables, or bring them up to date; safe to run again")
    upgrade.set_defaults(run=_db_upgrade)
    return parser


def _add_token_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    token = commands.add_parser("token", help="tokens of courses, for sites without a hub").add_subparsers(
        required=True
    )
    create = token.add_parser("create", help="make one; it is printed once and kept as a digest only")
    create.add_argument("--course", required=True)
    create.add_argument("--expires", default="180d", help="30d, 12h ... [%(default)s]")
    create.add_argument("--note", default="", help="for `token list`: whose it is, where it lies")
    create.set_defaults(run=_token_create)
    listing = token.add_parser("list", help="all that were made; not the tokens themselves")
    listing.set_defaults(run=_token_list)
    revoke = token.add_parser("revoke", help="make one invalid, at once")
    revoke.add_argument("id")
    revoke.set_defaults(run=_token_revoke)


def _add_job_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    jobs = commands.add_parser("jobs", help="what is queued, runs, and ended").add_subparsers(required=True)
    listing = jobs.add_parser("list", help="newest first, without students' names")
    listing.add_argument("--course")
    listing.add_argument("--state", action="append", choices=["queued", "running", "done", "failed", "cancelled"])
    listing.add_argument("--limit", type=int, default=50)
    listing.set_defaults(run=_jobs_list)
    cancel = jobs.add_parser("cancel", help="cancel one by its id")
    cancel.add_argument("id")
    cancel.set_defaults(run=_jobs_cancel)


def _settings(arguments: argparse.Namespace) -> "Settings":
    from grader_service.settings import load

    return load(arguments.config)


def _database(settings: "Settings") -> "Engine":
    """Of the right revision."""
    from grader_service.database import DatabaseError, check_revision, open_engine

    engine = open_engine(settings.database_url)
    try:
        check_revision(engine)
    except DatabaseError as error:
        raise Refusal(str(error)) from error
    return engine


def _serve(arguments: argparse.Namespace) -> int:
    from grader_service import serve

    return serve.serve(
        arguments.config,
        level=arguments.log_level,
        as_json=arguments.log_format == "json",
        upgrade_first=arguments.upgrade,
    )


def _token_create(arguments: argparse.Namespace) -> int:
    from pydantic import TypeAdapter, ValidationError

    from grader_service.tokens import TokenStore
    from grader_service.values import Duration

    settings = _settings(arguments)
    if arguments.course not in settings.courses:
        raise Refusal(f"there is no course '{arguments.course}' in {arguments.config}")
    try:
        seconds = TypeAdapter(Duration).validate_python(arguments.expires)
    except ValidationError as error:
        raise Refusal(f"--expires: {error.errors()[0]['msg']}") from None
    store = TokenStore(_database(settings))
    try:
        token_id, secret = store.create(arguments.course, seconds, arguments.note, getpass.getuser())
    except ValueError as error:
        raise Refusal(str(error)) from None
    print(secret)
    print(
        f"Token {token_id} for course '{arguments.course}'; it is not shown again. Put it into a file that only the "
        "course's instructors can read (0640, the course's group) that c.IsolatedExecute.service_token_file names.",
        file=sys.stderr,
    )
    return 0


def _token_list(arguments: argparse.Namespace) -> int:
    from grader_service.tokens import TokenStore

    for token in TokenStore(_database(_settings(arguments))).list():
        print(f"{token.id}  {token.course:20}  expires {_day(token.expires_at)}  {_status(token):8}  {token.note}")
    return 0


def _token_revoke(arguments: argparse.Namespace) -> int:
    from grader_service.tokens import TokenStore

    if not TokenStore(_database(_settings(arguments))).revoke(arguments.id):
        raise Refusal(f"there is no token '{arguments.id}'; see grader-service token list")
    print(f"Token {arguments.id} is no longer valid.")
    return 0


def _jobs_list(arguments: argparse.Namespace) -> int:
    from grader_service.jobs import JobStore

    settings = _settings(arguments)
    store = JobStore(_database(settings))
    names = [arguments.course] if arguments.course else sorted(settings.courses)
    for name in names:
        jobs, _ = store.find(name, states=arguments.state or [], limit=min(arguments.limit, 200))
        for job in jobs:
            print(
                f"{job.id}  {job.course:16} {job.state:10} {_day(job.submitted_at)} {job.kind:12}"
                f" attempts {job.attempts}  {job.reason or ''}"
            )
    return 0


def _jobs_cancel(arguments: argparse.Namespace) -> int:
    from grader_service.bundles import is_job_id
    from grader_service.jobs import JobStore

    job = JobStore(_database(_settings(arguments))).cancel(arguments.id) if is_job_id(arguments.id) else None
    if job is None:
        raise Refusal(f"there is no job '{arguments.id}'; see grader-service jobs list")
    print(f"The job is {job.state}.")
    return 0


def _purge(arguments: argparse.Namespace) -> int:
    from grader_service.bundles import Bundles
    from grader_service.database import erase
    from grader_service.housekeeping import purge_student
    from grader_service.jobs import JobStore

    settings = _settings(arguments)
    database = _database(settings)
    store = JobStore(database)
    if not arguments.yes:
        jobs = list(store.of_student(arguments.student))
        print(f"{len(jobs)} jobs would be deleted, with their notebooks, files and results. Run again with --yes.")
        return 0
    found = purge_student(store, Bundles(settings.data_directory), arguments.student)
    for course, count in sorted(found.items()):
        print(f"{course}: {count} jobs deleted, with their notebooks, files, results and rows")
    print(f"{sum(found.values())} jobs in {len(found)} courses. Logs of the service name no student.")
    if not erase(database):
        print("The database is busy, and its log may hold deleted rows for a while; run this again.", file=sys.stderr)
        return 1
    return 0


def _config_check(arguments: argparse.Namespace) -> int:
    from grader_service import policies

    settings = _settings(arguments)
    print(
        f"{arguments.config}: {len(settings.courses)} courses; sandboxes: {settings.slots} at once, "
        f"{settings.memory_bytes >> 20} MiB together; data in {settings.data_directory}"
    )
    bad = 0
    for name, course in sorted(settings.courses.items()):
        try:
            kernel, _ = policies.plan(name, course, policies.Asked())
            print(f"  {name}: {kernel.argv[0]}")
        except Exception as error:  # noqa: BLE001  # whatever is wrong with one course, the others are checked, too
            bad += 1
            print(f"  {name}: WRONG: {error}")
    return int(bad > 0)


def _hub_config(arguments: argparse.Namespace) -> int:
    from grader_service.hub import hub_config

    try:
        print(hub_config(_settings(arguments)))
    except ValueError as error:
        raise Refusal(str(error)) from None
    return 0


def _db_upgrade(arguments: argparse.Namespace) -> int:
    from grader_service.database import DatabaseError, open_engine, upgrade

    try:
        upgrade(open_engine(_settings(arguments).database_url))
    except DatabaseError as error:
        raise Refusal(str(error)) from error
    print("The database is up to date.")
    return 0


def _status(token: "TokenInfo") -> str:
    if token.revoked_at is not None:
        return "revoked"
    return "expired" if token.expires_at <= time.time() else "valid"


def _day(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M")


if __name__ == "__main__":
    sys.exit(main())
