"""Which layers of a sandbox this host gives, found out by doing each step for real, and what to do about the rest.

Theory of operation
-------------------
    doctor      `examine`: gathers evidence, compiles the filter, explains, builds one whole sandbox at the end
      helper    `probes.main`: executed afresh, single-threaded, the standard library alone; forks the probes
        probe   one for each layer; does the step and what it needs, looks whether it holds, says so, is killed

What could not be done is explained from the evidence (`isolate.evidence`). The whole sandbox is built by the same
door as everybody's and looked at from inside, since steps that hold one by one may not hold together.
"""

import argparse
import base64
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import isolate
from isolate import seccomp, uids
from isolate.evidence import NOT_TOLD, Evidence, diagnose, diagnose_library, gather_evidence
from isolate.policy import LANDLOCK_GAPS, MIB, Limits, Policy, Report, SandboxError, system_policy
from isolate.probes import PROBES, Answer, Plan, Probe
from isolate.sandbox import Command, Sandbox

IN_FORCE, MISSING, WEAKER = "in force", "missing", "weaker"
_HELPER_SECONDS = 120.0
_WIDTH = 100


@dataclasses.dataclass(frozen=True)
class Finding:
    """One layer: whether it is `in force`, `missing`, or `weaker` than it could be; what was seen, why, what to do."""

    layer: str
    state: str
    detail: str
    cause: str = ""
    remedy: str = ""


@dataclasses.dataclass(frozen=True)
class Examination:
    """What the doctor found out about this host for this user."""

    kernel: str
    user: str
    findings: tuple[Finding, ...]
    full: Finding
    """The whole sandbox, built as for any command."""
    landlock_tier: Finding
    """The weaker sandbox, which stands only where an administrator asks for it by name: `policy.LANDLOCK_GAPS`."""

    @property
    def first_missing(self) -> Finding | None:
        return next((finding for finding in (*self.findings, self.full) if finding.state == MISSING), None)

    @property
    def ok(self) -> bool:
        return self.first_missing is None

    @property
    def tier(self) -> str | None:
        """The best tier that can be had, one of `policy.TIERS`, or None."""
        if self.ok:
            return "namespaces"
        return "landlock" if self.landlock_tier.state == IN_FORCE else None

    def as_dict(self) -> dict[str, Any]:
        return {
            "version": _version(),
            "kernel": self.kernel,
            "user": self.user,
            "ok": self.ok,
            "tier": self.tier,
            "findings": [dataclasses.asdict(finding) for finding in (*self.findings, self.full)],
            "landlock_tier": {**dataclasses.asdict(self.landlock_tier), "gaps": list(LANDLOCK_GAPS)},
        }


def _version() -> str:
    try:
        return importlib.metadata.version("nbgrader-aalto")
    except importlib.metadata.PackageNotFoundError:  # run from a copy of the sources
        return "unknown"


_INSIDE = """
fail() { echo "$1"; exit 1; }
[ "$(id -u)" = 1000 ] || fail "the uid inside is $(id -u)"
[ ! -e /root ] && [ ! -e /etc/shadow ] || fail "files of the host are visible inside"
(: > /usr/.isolate) 2>/dev/null && fail "/usr is writable inside"
(: > "$HOME/file" && : > /tmp/file) || fail "HOME and /tmp are not writable inside"
mkfifo /tmp/fifo 2>/dev/null && fail "mknod is not refused inside"
if [ -r /proc/self/status ]; then
    while read -r name value; do
        case "$name $value" in
            CapEff:*[1-9a-f]*|CapBnd:*[1-9a-f]*|CapPrm:*[1-9a-f]*) fail "there are capabilities inside" ;;
            "NoNewPrivs: 0") fail "no_new_privs is not set inside" ;;
            "Seccomp: 0") fail "no seccomp filter is in force inside" ;;
        esac
    done < /proc/self/status
fi
exit 0
"""
"""A shell script that fails where something does not hold; its last line says what."""


def examine() -> Examination:
    """Perform every step on this host, as the user who runs this. Takes about a second; leaves nothing."""
    seen = gather_evidence()
    policy = system_policy(limits=Limits(wall_seconds=30, cpu_seconds=30, memory_bytes=256 * MIB, files_bytes=16 * MIB))
    library, programs = _compile_filters()
    findings: list[Finding] = []
    with contextlib.ExitStack() as stack:
        plan = {"limits": dataclasses.asdict(policy.limits), "seccomp": programs, **_lease_uid(stack)}
        for probe, answer in ask_helper(plan):
            if probe.needs == library.layer:
                findings.append(library)
            findings.append(_judge(probe, answer, seen))
    return Examination(
        kernel=f"{platform.system()} {seen.release} {seen.machine}",
        user="root" if seen.root else f"uid {os.getuid()}",
        findings=tuple(findings),
        full=_try_sandbox(policy, findings),
        landlock_tier=_try_landlock_tier(dataclasses.replace(policy, tier="landlock")),
    )


def _compile_filters() -> tuple[Finding, list[str]]:
    layer = "libseccomp"
    try:
        programs = [base64.b64encode(program).decode() for program in seccomp.compiled_filters()]
    except SandboxError as error:
        return Finding(layer, MISSING, error.cause, *diagnose_library(error)), []
    return Finding(layer, IN_FORCE, "loaded, and the filter compiles"), programs


def _lease_uid(stack: contextlib.ExitStack) -> Plan:
    """Whom root gives way to, as long as the stack stands."""
    try:
        lease = stack.enter_context(uids.lease())
    except SandboxError as error:
        return {"uid": None, "gid": None, "no_uid": error.cause}
    uid = lease.uid if lease else None
    return {"uid": uid, "gid": uid}


def ask_helper(plan: Plan) -> Iterator[tuple[Probe, Answer]]:
    """Each probe and its answer, also when the helper came to grief."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(isolate.__file__)))
    start = f"import sys; sys.path.append({package!r}); from isolate.probes import main; sys.exit(main())"
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-B", "-c", start],
            input=json.dumps(plan).encode(),
            capture_output=True,
            env={},
            cwd="/",
            timeout=_HELPER_SECONDS,
            start_new_session=True,
            check=False,
        )
        output, errors = done.stdout, done.stderr.decode("utf-8", "replace")
    except subprocess.TimeoutExpired as error:
        output, errors = error.stdout or b"", "the helper took too long"
    except OSError as error:
        output, errors = b"", f"the helper cannot be started: {error}"
    answers = {answer["layer"]: answer for answer in map(json.loads, output.splitlines())}
    trouble = (errors.strip().splitlines() or ["the helper ended without a word"])[-1]
    for probe in PROBES:
        yield probe, answers.get(probe.layer) or {"refused": trouble, "errno": 0}


def _judge(probe: Probe, answer: Answer, seen: Evidence) -> Finding:
    if "detail" in answer:
        return Finding(probe.layer, IN_FORCE, answer["detail"])
    state = MISSING if probe.required else WEAKER
    if "untried" in answer:
        return Finding(probe.layer, state, f"not tried: it needs {answer['untried']}")
    return Finding(probe.layer, state, answer["refused"], *diagnose(probe.layer, answer["errno"], seen))


def _try_sandbox(policy: Policy, findings: Sequence[Finding]) -> Finding:
    layer = "the whole sandbox"
    end, said = _run_in_sandbox(policy, "/bin/sh", "-c", _INSIDE)
    if isinstance(end, SandboxError):
        detail = f"{end.layer}: {end.cause}" + (f" ({said})" if said else "")
        if any(finding.state == MISSING for finding in findings):
            return Finding(layer, MISSING, detail, "see the first layer above that is missing")
        return Finding(layer, MISSING, detail, NOT_TOLD, end.remedy)
    if end.exit_code != 0:
        return Finding(layer, MISSING, said or end.message, "it was built, and does not hold", "please report it")
    return Finding(layer, IN_FORCE, f"built and looked at from inside, in {end.wall_seconds:.2f} s")


def _try_landlock_tier(policy: Policy) -> Finding:
    layer = "landlock tier"
    end, _ = _run_in_sandbox(policy, "/bin/true")
    if isinstance(end, SandboxError):
        return Finding(layer, MISSING, f"{end.layer}: {end.cause}", "", end.remedy)
    if end.exit_code != 0:
        return Finding(layer, MISSING, end.message or f"/bin/true ended with exit code {end.exit_code}")
    return Finding(layer, IN_FORCE, ", ".join(end.layers))


def _run_in_sandbox(policy: Policy, *argv: str) -> tuple[Report | SandboxError, str]:
    """How the command ended, or why there was no sandbox; and the last line that was written."""
    with tempfile.TemporaryFile() as output:
        try:
            with Sandbox(policy, Command(argv, stdout=output, stderr=subprocess.STDOUT)) as sandbox:
                end: Report | SandboxError = sandbox.wait()
        except SandboxError as error:
            end = error
        output.seek(0)
        lines = output.read(20_000).decode("utf-8", "replace").strip().splitlines()
    return end, lines[-1] if lines else ""


# What a person reads


def as_text(examination: Examination) -> str:
    """A table for 100 columns, and what to do next."""
    findings = (*examination.findings, examination.full)
    first = max(len(finding.layer) for finding in findings)
    lines = [f"isolate doctor: {examination.kernel}, as {examination.user}", ""]
    lines.append(f"{'layer':{first}}  {'state':8}  what was seen")
    lines.append(f"{'-' * first}  {'-' * 8}  {'-' * (_WIDTH - first - 12)}")
    for finding in findings:
        lines += _row(finding, first)
    return "\n".join([*lines, "", *_verdict(examination), "", *_about_the_weaker_tier(examination)]) + "\n"


def _row(finding: Finding, first: int) -> list[str]:
    state = finding.state.upper() if finding.state == MISSING else finding.state
    start = f"{finding.layer:{first}}  {state:8}  "
    lines = _wrapped(start, finding.detail)
    margin = " " * len(start)
    if finding.cause:
        lines += _wrapped(f"{margin}cause:  ", finding.cause)
    if finding.remedy:
        lines += _wrapped(f"{margin}remedy: ", finding.remedy)
    return lines


def _wrapped(start: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_on_hyphens=False,
    ) or [start.rstrip()]


def _verdict(examination: Examination) -> list[str]:
    if examination.ok:
        weaker = sum(finding.state == WEAKER for finding in examination.findings)
        also = f" {weaker} of the layers could be better; none of those is needed." if weaker else ""
        return _wrapped("", f"The full sandbox can be built on this host.{also}")
    lines = _wrapped("", "The full sandbox can NOT be built on this host, so nothing will be graded in it.")
    missing = examination.first_missing
    if missing and missing.remedy:
        lines += _wrapped("Next:   ", f"{missing.layer}: {missing.remedy}")
        lines += _wrapped("Then:   ", "run `isolate doctor` again, as the user who will grade.")
    return lines


def _about_the_weaker_tier(examination: Examination) -> list[str]:
    tier = examination.landlock_tier
    if tier.state != IN_FORCE:
        ending = ", which is not needed here, cannot be built" if examination.ok else " cannot be built here either"
        return _wrapped("", f"The weaker landlock tier{ending}: {tier.detail}.")
    beginning = "could be built, too" if examination.ok else "can be built, for policies that ask for it by name"
    lines = _wrapped("", f"The weaker landlock tier {beginning}. It does not stop this:")
    for gap in LANDLOCK_GAPS:
        lines += _wrapped("  - ", gap)
    return lines


def run(options: argparse.Namespace) -> int:
    """`isolate doctor`: exit code 0 if the full sandbox can be built, 1 if not."""
    examination = examine()
    if options.json:
        print(json.dumps(examination.as_dict(), indent=2))
    else:
        print(as_text(examination), end="")
    return 0 if examination.ok else 1
