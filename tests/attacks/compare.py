"""The same attacks against our sandbox, plain `bwrap --unshare-all` and chroot under unshare: a table, measured.

`make compare` runs it, as root. A row is stopped where its tests pass. Tests that need our notebooks or our
report are left out for the others, and so is what could hurt the host without our wall: see the lists here.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))  # executed as a program: for the package `attacks`

from attacks import rows

OTHERS = ("bwrap", "chroot")
WALLS = ("isolate", *OTHERS)
HEADINGS = {"isolate": "isolate", "bwrap": "`bwrap --unshare-all`", "chroot": "chroot under unshare"}
_PROGRAMS = {"isolate": (), "bwrap": ("bwrap", "unshare", "setpriv"), "chroot": ("unshare", "chroot", "setpriv")}
_MODULES = ("files", "processes", "network", "resources", "kernel_surface", "between_jobs", "notebook")

_OURS = "what our own policy, report or init promises"
_NOT_COMPARED: Mapping[str, str] = {
    "test_hidden_wins_over_every_way_to_it": _OURS,
    "test_a_bind_at_another_place_does_not_name_its_source": _OURS,
    "test_a_prefix_whose_pyvenv_points_elsewhere_does_not_show_it": _OURS,
    "test_the_own_root_is_read_only": _OURS,
    "test_a_writable_directory_leads_nowhere_else": _OURS,
    "test_what_is_shown_below_a_writable_place_stays_read_only": _OURS,
    "test_root_may_use_an_interpreter_in_a_closed_home_with_an_odd_name": _OURS,
    "test_the_whole_file_system_cannot_be_shown": _OURS,
    "test_proc_shows_the_room_alone": _OURS,
    "test_nothing_is_left_in_temporary_directories": _OURS,
    "test_init_of_the_room_does_not_care_for_signals": _OURS,
    "test_the_limits_of_init_cannot_be_lowered": _OURS,
    "test_every_end_has_its_report": _OURS,
    "test_a_segfault_starts_no_core_dump_helper": _OURS,
    "test_killed_helpers_take_the_sandbox_with_them": _OURS,
    "test_killed_at_any_moment_of_the_building": _OURS,
    "test_no_process_of_the_launcher_survives_a_failed_build": _OURS,
    "test_many_unreaped_and_reparented_processes_do_not_confuse_the_end": _OURS,
    "test_the_filter_holds_in_every_descendant": _OURS,
    "test_socketpair_gives_unix_sockets_only": _OURS,
    "test_network_cannot_be_configured": "it would take down the host's loopback, where a wall leaves that",
    "test_odd_inet_protocols_load_no_module": "it would have the host load modules",
    "test_a_full_file_system_does_not_hide_the_end": _OURS,
    "test_whatever_is_left_in_the_work_directory_is_no_fault_of_the_host": _OURS,
    "test_one_greedy_job_leaves_time_for_another": "the safety net's share would be measured, not the wall's",
}
_SAMPLES: Mapping[str, str] = {
    "test_processor_time_is_counted_in_total": "at once",
    "test_memory_is_counted_in_every_form": "many processes",
    "test_inodes_are_capped": "files",
}
"""Of attacks in many variants, the one that is tried: without a limit each costs a hog that runs to its end."""

_WITH_THE_HOSTS_NETWORK: Mapping[str, str] = {
    "test_the_world_is_unreachable": "it would send packets out of this host",
}
# chroot by root leaves all of root's power over the kernel. What may be run there is listed, not what may not.
_SAFE_AS_ROOT_IN_CHROOT = frozenset("""
test_host_accounts_and_homes_are_absent test_a_token_of_the_supervisor_is_nowhere test_dots_lead_to_the_own_root_only
test_no_process_of_the_host_is_visible test_another_running_sandbox_is_invisible
test_the_environment_and_the_descriptors_are_the_listed_ones test_global_kernel_files_are_absent
test_core_pattern_cannot_be_opened test_cgroup_and_mounts_name_no_slice test_configuration_in_the_prefix_is_hidden
test_sockets_and_courses_of_the_host_are_absent test_programs_and_the_environment_cannot_be_written
test_mounts_cannot_be_changed test_all_writable_places_together_are_capped test_double_chroot_is_refused
test_no_set_uid_file_is_left_for_the_host test_fork_bomb_is_capped test_a_daemon_is_gone_when_the_job_ends
test_reaching_into_other_processes_is_denied test_namespaces_are_denied test_no_capability_and_no_new_privileges
test_host_uid_zero_is_never_ours test_limits_and_priorities_cannot_be_raised
test_kill_everything_reaches_the_own_job_only test_ignored_signals_end_at_the_wall_limit
test_kill_9_of_the_supervisor_leaves_no_process test_services_of_the_host_are_out_of_reach
test_abstract_sockets_of_the_host_are_out_of_reach test_socket_families_and_raw_sockets_are_denied
test_two_rooms_have_two_loopbacks test_a_loop_ends_at_the_cpu_limit test_processor_time_is_counted_in_total
test_one_allocation_above_the_limit_fails test_memory_is_counted_in_every_form
test_sparse_and_large_files_end_at_the_file_limit test_inodes_are_capped
test_memory_outside_of_the_limits_cannot_be_had test_descriptors_and_threads_are_capped
test_sleeping_for_ever_ends_at_the_wall_limit test_a_full_stdout_that_nobody_reads_does_not_hold_the_end
test_host_wide_tables_are_not_used_up test_files_are_gone_for_the_next_job_and_for_the_host
test_jobs_at_the_same_time_share_no_place test_kernel_objects_with_names_cannot_be_made
test_abstract_sockets_do_not_join_two_jobs test_shared_files_carry_no_marks
test_typing_into_a_terminal_is_refused test_foreign_system_calls_kill test_personality_cannot_be_changed
""".split())  # fmt: skip
_SAFE_CALLS = {51, 52, 53, 54, 55}
"""Rows of `test_calls_are_refused` for root in a chroot: not kexec, modules, swap, reboot, clocks, names."""


def leave_out(wall: str, items: Iterable[pytest.Item]) -> None:
    """Skip what is not compared; and a hole that is known of ours says nothing about another wall."""
    if wall == "isolate":
        return
    for item in items:
        item.own_markers = [mark for mark in item.own_markers if mark.name != "xfail"]
        if reason := _why_not(wall, item):
            item.add_marker(pytest.mark.skip(reason=f"n/a: {reason}"))


def _why_not(wall: str, item: pytest.Item) -> str:
    """Why a test is not run behind this wall; empty if it is."""
    name = getattr(item, "originalname", item.name)
    parameters: Mapping[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    if "person" not in parameters:
        return "does not run probes as somebody"
    if name in _NOT_COMPARED:
        return _NOT_COMPARED[name]
    if name in _SAMPLES and _SAMPLES[name] not in parameters.values():
        return "one variant stands for all"
    if wall != "chroot":
        return ""
    if name in _WITH_THE_HOSTS_NETWORK:
        return _WITH_THE_HOSTS_NETWORK[name]
    safe = name in _SAFE_AS_ROOT_IN_CHROOT or parameters.get("row") in _SAFE_CALLS
    return "" if parameters["person"] == "user" or safe else "root without a wall could harm the host"


def verdict(outcomes: Sequence[str]) -> str:
    """What the tests of one row say of one wall, for one person."""
    tried = [outcome for outcome in outcomes if outcome != "skipped"]
    stopped = tried.count("ok")
    if not tried:
        return "n/a"
    if stopped == len(tried):
        return "stopped"
    return f"{stopped} of {len(tried)} stopped" if stopped else "not stopped"


def cell(results: Iterable[Mapping[str, Any]]) -> str:
    """One cell of the table; persons apart only where they differ."""
    outcomes: dict[str, list[str]] = {"root": [], "user": []}
    for result in results:
        outcomes[result["person"]].append(result["outcome"])
    words = {person: verdict(found) for person, found in outcomes.items()}
    if words["root"] == words["user"]:
        return words["root"]
    if "n/a" in words.values():
        return next(f"{word} ({person})" for person, word in words.items() if word != "n/a")
    return "; ".join(f"{person}: {word}" for person, word in words.items())


def table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """The table in Markdown, one column for each wall that was run."""
    walls = [wall for wall in WALLS if wall in found]
    written = [
        "| row | threat | " + " | ".join(HEADINGS[wall] for wall in walls) + " |",
        "| --- " * (len(walls) + 2) + "|",
    ]
    for row in rows.of_the_sandbox():
        cells = [cell(result for result in found[wall] if row in result["rows"]) for wall in walls]
        written.append(f"| {row} | {rows.TITLES[row]} | " + " | ".join(cells) + " |")
    return written


def missing_programs(wall: str) -> list[str]:
    """What a wall needs and this host lacks."""
    return [program for program in _PROGRAMS[wall] if shutil.which(program) is None]


def stands(wall: str) -> bool:
    """Whether honest code runs behind this wall: one that cannot be built must not look like one that stops nothing."""
    if wall == "isolate":
        return True
    test = Path(__file__).with_name("test_table.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test), "-k", f"honest and {wall}"]
    return subprocess.run(command, check=False, stdout=sys.stderr).returncode == 0


def run(wall: str, more: Sequence[str]) -> list[dict[str, Any]]:
    """The attack tests behind one wall; how each went."""
    here = Path(__file__).resolve().parent
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "results.json")
        command = [sys.executable, "-m", "pytest", "-q", "-r", "N", "--tb=no", "-p", "no:cacheprovider", "-m", "threat"]
        command += ["-n", "2", "--dist", "loadfile", f"--wall={wall}", f"--threat-json={path}", *more]
        command += [str(here / f"test_{module}.py") for module in _MODULES]
        subprocess.run(command, check=False, stdout=sys.stderr, cwd=here.parent.parent)
        found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def versions() -> list[str]:
    """What was measured, on what, when."""
    said = [
        f"{datetime.date.today()}, Linux {platform.release()} {platform.machine()}, Python {platform.python_version()}"
    ]
    for program in ("bwrap", "unshare"):
        if shutil.which(program):
            done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
            said.append(done.stdout.strip())
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--walls", nargs="*", choices=WALLS, default=list(WALLS))
    parser.add_argument("-k", dest="only", default="", help="as for pytest")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        print("The other walls are tried within a control group, which only root can make.", file=sys.stderr)
        return 2
    found = {}
    for wall in arguments.walls:
        if missing := missing_programs(wall):
            print(f"{HEADINGS[wall]}: left out, not installed: {', '.join(missing)}", file=sys.stderr)
        elif not stands(wall):
            print(f"{HEADINGS[wall]}: left out, it cannot be built on this host", file=sys.stderr)
        else:
            found[wall] = run(wall, ["-k", arguments.only] if arguments.only else [])
    print("; ".join(versions()), "\n")
    print("\n".join(table(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
