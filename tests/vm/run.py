"""Boots stock kernels of distributions in virtual machines and runs tests of the sandbox in them: `make test-vm`.

Theory of operation
-------------------
    run.py       this process, on the host: packages, an initramfs, a disk, one machine after the other, the table
      qemu       one kernel with one command line; no network; KVM, else emulated; ended after a fixed time or with us
        guest.py process 1 of the machine; the host's root file system, read-only; runs the tests as each person

Everything lies in one temporary directory, which is removed at the end. What is missing on this host (qemu, a
package) is said, and is no failure: exit code 0 with "skipped". Exit code 1: a test failed, or a boot did not end well.

    run.py                                  Debian's kernels, as apt knows them here
    run.py --kernel linux-image-6.12-amd64  this one; a name for apt, or files of packages: a.deb,b.deb
    run.py --boot 'lsm=lockdown,yama'       with these words on the kernel's command line
    run.py --only-look                      the doctor and one sandbox, no tests
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import kernels
from kernels import Unavailable

_REPOSITORY = Path(__file__).resolve().parents[2]
_PEOPLE = ("root", "user, subtree delegated", "user, only its own group delegated", "user, nothing delegated")
_TESTS = (
    "tests/isolate/test_cgroups.py",
    "tests/isolate/test_confined.py",
    "tests/isolate/test_sandbox.py",
    "tests/attacks/test_resources.py",
)
_TESTS_EMULATED = _TESTS[:1]
"""Where the processor's own virtualisation cannot be had, everything takes many times longer."""
_REQUIREMENTS = ("nbclient", "jupyter_client", "nbformat", "ipykernel", "traitlets", "pyseccomp", "pytest")
_KERNELS = ("linux-image-amd64", "linux-image-6.12-amd64")
_WITHOUT_LANDLOCK = "lsm=lockdown,yama,integrity,bpf"
_MACHINES = {
    "kvm": ("-accel kvm -cpu host", ""),
    # A busy host delays an emulated clock; changing clocks then has crashed emulated kernels.
    "tcg": ("-accel tcg,thread=multi -cpu max,la57=off,pku=off", "no_timer_check tsc=reliable"),
}
"""What qemu and the kernel are told for each."""


@dataclasses.dataclass(frozen=True)
class Boot:
    """One start of a machine: which kernel, with which words, and who does what in it."""

    kernel: str
    words: str = ""
    commands: tuple[str, ...] = ()
    tests: tuple[str, ...] = _TESTS
    people: tuple[str, ...] = _PEOPLE


def _boots(options: argparse.Namespace) -> list[Boot]:
    tests = (
        ()
        if options.only_look
        else tuple(options.tests or (_TESTS if options.accelerator == "kvm" else _TESTS_EMULATED))
    )
    people = tuple(options.who or _PEOPLE)
    if options.kernel or options.boot or options.command:
        names = options.kernel or _KERNELS[:1]
        return [Boot(name, options.boot, tuple(options.command), tests, people) for name in names]
    return [
        *(Boot(name, tests=tests, people=people) for name in _KERNELS),
        Boot(_KERNELS[0], _WITHOUT_LANDLOCK, tests=tests, people=people),
    ]


class Workshop:
    """The temporary directory and what is made in it once: busybox, kernels, an environment for ordinary users."""

    def __init__(self, directory: Path, prepared: Path | None) -> None:
        self.directory, self._prepared = directory, prepared
        self._kernels: dict[str, kernels.Kernel] = {}
        (debs := directory / "debs").mkdir()
        debs.chmod(0o777)  # apt downloads as a user of its own
        self._debs = debs
        kernels_busybox = directory / "busybox"
        for deb in kernels.fetch([kernels.BUSYBOX], debs):
            subprocess.run(["dpkg-deb", "-x", deb, kernels_busybox], check=True)
        self.busybox = next(kernels_busybox.glob("**/bin/busybox"))

    def kernel(self, name: str) -> kernels.Kernel:
        if name not in self._kernels:
            debs = kernels.fetch(kernels.kernel_packages(name), self._debs)
            place = self.directory / f"kernel-{len(self._kernels)}"
            self._kernels[name] = kernels.unpack(debs, place)
            for deb in debs:
                if deb.parent == self._debs:
                    deb.unlink()
        return self._kernels[name]

    def environment(self) -> Path:
        """Python packages that any user may read: the interpreter of this environment may be out of their reach."""
        place = self.directory / "env"
        if place.exists():
            return place
        if self._prepared is not None:
            shutil.copytree(self._prepared, place, symlinks=True)
            return place
        quiet: dict[str, Any] = {"check": True, "umask": 0o022, "capture_output": True, "text": True}
        virtualenv = [sys.executable, "-m", "virtualenv", "-q", "--no-periodic-update", "-p", "/usr/bin/python3"]
        pip = [str(place / "bin/python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        try:
            subprocess.run([*virtualenv, "--app-data", self.directory / "app-data", place], **quiet)
            subprocess.run([*pip, *_REQUIREMENTS], **quiet)
        except subprocess.CalledProcessError as error:
            raise Unavailable(f"no environment for ordinary users: {error.stderr.strip()[-300:]}") from error
        return place


def _write_disk(directory: Path, environment: Path, disk: Path) -> None:
    """A disk with the places that are written to: this host's /etc, an environment for ordinary users, empty ones."""
    shutil.copytree("/etc", directory / "etc", symlinks=True, ignore_dangling_symlinks=True)
    for name, mode in {"tmp": 0o1777, "home": 0o755, "opt": 0o755, "var": 0o755, "var/tmp": 0o1777}.items():
        (directory / name).mkdir()
        (directory / name).chmod(mode)
    for name in ("lib", "log", "cache"):
        (directory / "var" / name).mkdir()
    environment.rename(directory / "opt/grader")
    try:
        with disk.open("wb") as file:
            file.truncate(6 << 30)
        subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", directory, disk], check=True)
    finally:
        (directory / "opt/grader").rename(environment)


def _qemu(kernel: kernels.Kernel, initramfs: Path, share: Path, boot: Boot, accelerator: str) -> list[str]:
    place = share.parent
    machine, words = _MACHINES[accelerator]
    shared = "security_model=none,multidevs=remap"
    return [
        *("setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64"),
        *"-smp 2 -m 3072 -nodefaults -no-user-config -display none -vga none -no-reboot".split(),
        *machine.split(),
        *("-serial", f"file:{place}/console", "-kernel", str(kernel.image), "-initrd", str(initramfs)),
        *("-append", f"console=ttyS0 panic=-1 loglevel=4 cgroup_no_v1=all {words} {boot.words}"),
        *("-drive", f"file={place}/disk.img,format=raw,if=virtio,cache=unsafe"),
        *("-fsdev", f"local,id=host,path=/,readonly=on,{shared}", "-device", "virtio-9p-pci,fsdev=host,mount_tag=host"),
        *("-fsdev", f"local,id=share,path={share},{shared}", "-device", "virtio-9p-pci,fsdev=share,mount_tag=share"),
    ]


def _accelerator() -> str:
    """Whether this processor can run a kernel as it is. A /dev/kvm alone is no proof: some run changed kernels only."""
    flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    return "kvm" if flags & {"vmx", "svm"} and os.access("/dev/kvm", os.R_OK | os.W_OK) else "tcg"


def _boot(boot: Boot, workshop: Workshop, options: argparse.Namespace) -> dict[str, Any]:
    """Start, wait, gather. {"host": facts, "people": [what each found], "console": the end of what was printed}"""
    kernel = workshop.kernel(boot.kernel)
    environment = workshop.environment()
    with tempfile.TemporaryDirectory(dir=workshop.directory) as name:
        share = Path(name) / "share"
        (share / "results").mkdir(parents=True)
        _write_disk(Path(name) / "disk", environment, Path(name) / "disk.img")
        plan = {
            "repository": str(_REPOSITORY),
            "python": str(Path(sys.prefix) / "bin/python"),
            "people": boot.people,
            "tests": boot.tests,
            "commands": boot.commands,
            "seconds": options.seconds / len(boot.people),
        }
        (share / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        initramfs = Path(name) / "initramfs"
        kernels.write_initramfs(kernel, workshop.busybox, Path(__file__).with_name("guest.py"), initramfs)
        _run_machine(_qemu(kernel, initramfs, share, boot, options.accelerator), options.seconds + 900)
        console = (share.parent / "console").read_text(encoding="utf-8", errors="replace")
        return {"console": console, **_gather(share / "results")}


def _run_machine(argv: Sequence[str], seconds: float) -> None:
    """Until it powers off. It ends after this time at the latest, and with us however we end (setpriv --pdeathsig)."""
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL) as process:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            print(f"the machine did not end within {seconds:.0f} s", flush=True)
        finally:
            process.kill()


def _gather(results: Path) -> dict[str, Any]:
    host = results / "host.json"
    people = []
    for file in sorted(results.glob("[0-9].json")):
        person = json.loads(file.read_text(encoding="utf-8"))
        junit = file.with_suffix(".xml")
        if junit.exists():
            person["counts"], person["failed"] = _read_junit(junit)
        people.append(person)
    return {"host": json.loads(host.read_text(encoding="utf-8")) if host.exists() else {}, "people": people}


def _read_junit(file: Path) -> tuple[dict[str, int], list[str]]:
    suite = next(xml.parse(file).getroot().iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    bad = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return counts, bad


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: who saw what on one boot."""

    kernel: str
    cgroups: str
    landlock: str
    who: str
    result: str
    good: bool

    def __str__(self) -> str:
        return f"| {self.kernel} | {self.cgroups} | {self.landlock} | {self.who} | {self.result} |"


def _row(boot: Boot, host: dict[str, Any], person: dict[str, Any]) -> Row:
    probe = json.loads(person["probe"]["out"]) if person["probe"]["code"] == 0 else None
    counted = [layer for layer in (probe or {}).get("layers", ()) if layer.startswith("limits in total: ")]
    kernel = " ".join(
        filter(None, [host["release"], boot.words and f"`{boot.words}`", *map("`{}`".format, boot.commands)])
    )
    said = _doctor_words(person["doctor"])
    parts = [said if probe else f"no sandbox; {said}"]
    good = True
    if boot.tests:
        counts = person.get("counts")
        good = bool(counts) and person["tests"]["code"] == 0 and not person["tests"]["left"]
        parts.append(_count_words(counts) if counts else f"tests did not end: {person['tests']['err'][-200:]}")
    cgroups = counted[0].removeprefix("limits in total: ") if counted else "-"
    return Row(kernel, cgroups, f"ABI {probe['abi']}" if probe else "-", person["who"], "; ".join(parts), good)


def _doctor_words(doctor: dict[str, Any]) -> str:
    """What the doctor found that is not in force."""
    try:
        layers = json.loads(doctor["out"])["findings"]
    except (ValueError, KeyError):
        return f"doctor: exit code {doctor['code']}: {doctor['err'][-200:]}"
    lacking = [f"{layer['layer']} {layer['state']}" for layer in layers if layer["state"] in {"missing", "weaker"}]
    return f"doctor: {', '.join(lacking) or 'all in force'}"


def _count_words(counts: dict[str, int]) -> str:
    bad = counts["failures"] + counts["errors"]
    passed = counts["tests"] - bad - counts["skipped"]
    return f"{passed} passed, {bad} failed, {counts['skipped']} skipped"


def _check_host() -> None:
    for program in ("qemu-system-x86_64", "apt-get", "dpkg-deb", "mke2fs", "setpriv"):
        if shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin:/sbin") is None:
            raise Unavailable(f"{program} is not installed")


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A signal that would end us becomes an exception, so that everything is cleaned up."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(143))
    yield


def _run_all(options: argparse.Namespace, directory: Path) -> int:
    if options.accelerator == "tcg":
        print("This host's KVM runs no stock kernel, or there is none: machines are emulated, few tests are run.")
    workshop = Workshop(directory, options.environment)
    rows: list[Row] = []
    complete = True
    for boot in _boots(options):
        began = time.monotonic()
        try:
            found = _boot(boot, workshop, options)
        except Unavailable as error:
            print(f"skipped: {boot.kernel}: {error}", flush=True)
            continue
        new = [_row(boot, found["host"], person) for person in found["people"]]
        rows += new
        print(*found["host"].get("refused", ()), sep="\n", end="", flush=True)
        if len(new) < len(boot.people):
            complete = False
            print(f"{boot.kernel} {boot.words}: did not finish:\n{found['console'][-3000:]}", flush=True)
        for row, person in zip(new, found["people"], strict=True):
            print(row, *(f"    FAILED {name}" for name in person.get("failed", [])), sep="\n", flush=True)
        if options.details:
            name = re.sub(r"\W+", "-", f"{found['host'].get('release', boot.kernel)}-{time.time():.0f}")
            (options.details / f"{name}.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        print(f"({time.monotonic() - began:.0f} s)", flush=True)
    print("\n| kernel | cgroups | Landlock | who | result |\n| --- | --- | --- | --- | --- |", *rows, sep="\n")
    return 0 if complete and all(row.good for row in rows) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--kernel", action="append", default=[], help="a kernel package for apt, or package files: a.deb,b.deb")
    add("--boot", default="", metavar="WORDS", help="more words for the kernel's command line")
    add("--command", action="append", default=[], help="a shell command that root runs in the machine first")
    add("--who", action="append", choices=_PEOPLE, help="only as these people")
    add("--only-look", action="store_true", help="no tests: the doctor and one sandbox")
    add("--seconds", type=float, default=1200.0, help="for all tests of one boot (%(default)s)")
    add("--accelerator", choices=("kvm", "tcg"), default=_accelerator(), help="tcg emulates: slow (%(default)s)")
    add("--details", type=Path, metavar="DIRECTORY", help="write everything that was found there, as JSON")
    add("--environment", type=Path, help="a copy of this is used instead of a new one for ordinary users")
    add("tests", nargs="*", help="other tests than the usual ones")
    return parser.parse_args()


def main() -> int:
    """Exit code 0 also where nothing could be tried; the reason is said."""
    options = _options()
    try:
        _check_host()
        with _ended_by_signals(), tempfile.TemporaryDirectory(prefix="isolate-vm-", ignore_cleanup_errors=True) as name:
            os.chmod(name, 0o755)
            return _run_all(options, Path(name))
    except Unavailable as error:
        print(f"skipped: {error}")
        return 0


if __name__ == "__main__":
    sys.exit(main())
