"""The doctor on this host, and on hosts made worse for real: a filter, masks, a sysctl, a chroot, no library."""

import contextlib
import errno
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from attacks.harness import Person, Stage
from isolate import landlock
from isolate.doctor import IN_FORCE, MISSING, WEAKER, Examination, Finding, as_text, ask_helper
from isolate.evidence import GUIDE
from isolate.policy import LANDLOCK_GAPS
from isolate.probes import PROBES

# What a worse host does before the doctor is executed on it. Arguments: a JSON object with the keys below, then the
# command. Runs as whoever runs the tests; `uid` says who the command is.
WORSE_HOST = r"""
import ctypes, errno, json, os, platform, sys
from isolate import room, syscalls

worse, command = json.loads(sys.argv[1]), sys.argv[2:]
libc = ctypes.CDLL(None, use_errno=True)
uid, gid = worse["uid"], worse["gid"]
is_root = os.geteuid() == 0

def become():
    if is_root and uid:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        syscalls.set_dumpable(True)

def own_namespaces(flags):
    '''A user namespace that maps everybody (root) or only ourselves.'''
    ready, ready_end = os.pipe()
    done_end, done = os.pipe()
    parent, count = os.getpid(), 65536 if is_root else 1
    first = 0 if is_root else uid
    helper = os.fork()
    if helper == 0:
        os.read(ready, 1)
        if not is_root:
            open(f"/proc/{parent}/setgroups", "w").write("deny")
        open(f"/proc/{parent}/uid_map", "w").write(f"{first} {first} {count}")
        open(f"/proc/{parent}/gid_map", "w").write(f"{first if is_root else gid} {first if is_root else gid} {count}")
        os._exit(0)
    syscalls.unshare(syscalls.CLONE_NEWUSER | flags)
    os.write(ready_end, b"x")
    assert os.waitpid(helper, 0)[1] == 0

if worse.get("max_user_namespaces") is not None:
    own_namespaces(0)
    with open("/proc/sys/user/max_user_namespaces", "w") as file:
        file.write(str(worse["max_user_namespaces"]))
if worse.get("masks"):
    syscalls.unshare(syscalls.CLONE_NEWNS) if is_root else own_namespaces(syscalls.CLONE_NEWNS)
    syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    for source, target in worse["masks"]:
        if source == "tmpfs":
            syscalls.mount("tmpfs", target, "tmpfs", 1)
        else:
            syscalls.mount(source, target, None, syscalls.MS_BIND)
if worse.get("chroot"):
    syscalls.unshare(syscalls.CLONE_NEWNS) if is_root else own_namespaces(syscalls.CLONE_NEWNS)
    syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    for entry in list(os.scandir("/")):
        there = worse["chroot"] + entry.path
        if entry.is_symlink():
            os.symlink(os.readlink(entry.path), there)
        elif entry.is_dir():
            os.mkdir(there)
            syscalls.mount(entry.path, there, None, syscalls.MS_BIND | syscalls.MS_REC)
    os.chroot(worse["chroot"])
    os.chdir("/")
if worse.get("profile"):
    import pyseccomp as lib
    profile, caps = worse["profile"], set(worse["capabilities"])
    arch = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
    actions = {"SCMP_ACT_ALLOW": lambda number: lib.ALLOW, "SCMP_ACT_ERRNO": lib.ERRNO}
    operators = {"SCMP_CMP_EQ": lib.EQ, "SCMP_CMP_NE": lib.NE, "SCMP_CMP_MASKED_EQ": lib.MASKED_EQ}
    default = profile.get("defaultErrnoRet", errno.EPERM)
    rules = lib.SyscallFilter(actions[profile["defaultAction"]](default))
    rules.set_attr(lib.Attr.CTL_NNP, 0 if is_root else 1)
    kernel = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])
    for rule in profile["syscalls"]:
        includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
        minimum = tuple(int(part) for part in includes.get("minKernel", "0.0").split("."))
        if (
            not set(includes.get("caps", ())) <= caps
            or (includes.get("arches") and arch not in includes["arches"])
            or set(excludes.get("caps", ())) & caps
            or arch in excludes.get("arches", ())
            or kernel < minimum
        ):
            continue
        action = actions[rule["action"]](rule.get("errnoRet", errno.EPERM))
        arguments = [
            lib.Arg(arg["index"], operators[arg["op"]], arg["value"], arg.get("valueTwo", 0))
            for arg in rule.get("args") or ()
        ]
        for name in rule["names"]:
            try:
                number = lib.resolve_syscall(lib.Arch.NATIVE, name)
            except (OSError, ValueError):
                continue
            if number >= 0:
                rules.add_rule(action, number, *arguments)
    if is_root:
        numbers = {"CHOWN": 0, "DAC_OVERRIDE": 1, "FOWNER": 3, "FSETID": 4, "KILL": 5, "SETGID": 6, "SETUID": 7,
                   "SETPCAP": 8, "NET_BIND_SERVICE": 10, "NET_RAW": 13, "SYS_CHROOT": 18, "SYS_ADMIN": 21, "MKNOD": 27,
                   "AUDIT_WRITE": 29, "SETFCAP": 31}
        kept = {numbers[name.removeprefix("CAP_")] for name in caps}
        for number in range(41):
            if number not in kept:
                libc.prctl(24, number, 0, 0, 0)  # PR_CAPBSET_DROP
    rules.load()
become()
os.execv(command[0], command)
"""

DOCKER_CAPABILITIES = [
    f"CAP_{name}"
    for name in (
        "CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP NET_BIND_SERVICE SYS_CHROOT KILL "
        "AUDIT_WRITE"
    ).split()
]
"""What Docker leaves to a container's root by default."""
NEEDED_CALLS = "unshare mount umount2 pivot_root open_tree move_mount mount_setattr sethostname keyctl".split()
"""What docs/hosts.md adds to a container's profile."""
DOCKER_PACKAGE = "golang-github-docker-docker-dev"
DOCKER_PROFILE = Path("usr/share/gocode/src/github.com/docker/docker/profiles/seccomp/default.json")
"""In that package, below the root."""

Look = Callable[..., tuple[int, dict[str, Any], dict[str, dict[str, str]]]]


@pytest.fixture
def on_worse_host(stage: Stage, person: Person) -> Look:
    """Run `isolate doctor --json` as this person on a host made worse: (exit code, document, findings by layer)."""

    def look(**worse: Any) -> tuple[int, dict[str, Any], dict[str, dict[str, str]]]:
        python = str(stage.environment())
        worse = {"uid": person.uid, "gid": person.gid, "capabilities": [], **worse}
        done = subprocess.run(
            [python, "-c", WORSE_HOST, json.dumps(worse), python, "-m", "isolate.cli", "doctor", "--json"],
            cwd="/",
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode in {0, 1}, done.stderr
        assert done.stdout, done.stderr
        document = json.loads(done.stdout)
        assert document["ok"] is (done.returncode == 0)
        return done.returncode, document, {finding["layer"]: finding for finding in document["findings"]}

    return look


@pytest.fixture(scope="session")
def docker_profile(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """Docker's published default seccomp profile.

    Looked for in this order: the file that the variable DOCKER_SECCOMP_PROFILE names; where Debian's package of
    Docker's sources (`DOCKER_PACKAGE`) puts it, /usr/share/gocode/src/...; that package, as `apt-get download` gets
    it from the distribution's mirror, unpacked below pytest's temporary directory (nothing is installed). Skips else.
    """
    if named := os.environ.get("DOCKER_SECCOMP_PROFILE"):
        return _read_profile(Path(named))
    if (installed := Path("/") / DOCKER_PROFILE).exists():
        return _read_profile(installed)
    directory = tmp_path_factory.mktemp("docker")
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # no apt-get, no network
        quiet: dict[str, Any] = {"check": True, "capture_output": True, "timeout": 60}
        subprocess.run(["apt-get", "download", DOCKER_PACKAGE], cwd=directory, **quiet)
        subprocess.run(["dpkg-deb", "-x", next(directory.glob("*.deb")), directory], **quiet)
        return _read_profile(directory / DOCKER_PROFILE)
    pytest.skip(
        f"Docker's profile is not here. To get it: apt-get install {DOCKER_PACKAGE}; or download seccomp/default.json "
        "of github.com/moby/profiles and name the file in DOCKER_SECCOMP_PROFILE"
    )


def _read_profile(path: Path) -> Mapping[str, Any]:
    profile: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return profile


def allow_all_but(*names: str, number: int = errno.EPERM) -> dict[str, Any]:
    """A profile of one rule, in Docker's format."""
    rule = {"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": number}
    return {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}


class TestThisHost:
    def test_the_full_sandbox_can_be_built(self, on_worse_host: Look) -> None:
        code, document, layers = on_worse_host()
        assert code == 0, [finding for finding in layers.values() if finding["state"] != IN_FORCE]
        assert document["tier"] == "namespaces"
        assert document["kernel"].startswith(f"Linux {platform.release()}")
        assert {finding["state"] for finding in layers.values()} <= {IN_FORCE, WEAKER}
        assert layers["the whole sandbox"]["state"] == IN_FORCE
        assert all(finding["detail"] for finding in layers.values())

    def test_no_mount_is_left(self, on_worse_host: Look) -> None:
        before = Path("/proc/self/mountinfo").read_text()
        on_worse_host()
        assert Path("/proc/self/mountinfo").read_text() == before

    def test_the_command_for_people(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "isolate.cli", "doctor"], capture_output=True, text=True, check=False, timeout=100
        )
        assert done.returncode == 0, done.stdout
        assert done.stderr == ""
        assert max(map(len, done.stdout.splitlines())) <= 100
        assert "The full sandbox can be built on this host." in done.stdout
        assert "the whole sandbox   in force" in done.stdout

    def test_the_help_tells_the_exit_code(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "isolate.cli", "doctor", "--help"], capture_output=True, text=True, check=True
        )
        assert "--json" in done.stdout
        assert "exit code: 0" in done.stdout


class TestContainerFilter:
    """A filter that was loaded before the doctor."""

    def test_docker(self, on_worse_host: Look, docker_profile: Mapping[str, Any]) -> None:
        code, document, layers = on_worse_host(profile=docker_profile, capabilities=DOCKER_CAPABILITIES)
        assert code == 1
        assert document["tier"] != "namespaces"
        self.check_refused(layers)

    def test_any_filter_that_refuses_namespaces(self, on_worse_host: Look) -> None:
        code, document, layers = on_worse_host(
            profile=allow_all_but("unshare", "mount"), capabilities=DOCKER_CAPABILITIES
        )
        assert code == 1
        self.check_refused(layers)
        assert document["landlock_tier"]["gaps"] == list(LANDLOCK_GAPS)
        if landlock.abi() >= landlock.SCOPES_SINCE:
            assert document["tier"] == "landlock", document["landlock_tier"]

    @staticmethod
    def check_refused(layers: Mapping[str, Mapping[str, str]]) -> None:
        user = layers["user namespace"]
        assert user["state"] == MISSING
        assert "Operation not permitted" in user["detail"]
        assert "seccomp profile" in user["cause"]
        assert "docs/hosts.md" in user["remedy"]
        assert layers["pivot_root"]["state"] == MISSING
        assert layers["pivot_root"]["detail"] == "not tried: it needs user namespace"
        assert layers["the whole sandbox"]["state"] == MISSING
        assert layers["the whole sandbox"]["cause"] == "see the first layer above that is missing"
        for independent in ("no_new_privs", "seccomp", "rlimits", "counting processes", "unprivileged user"):
            assert layers[independent]["state"] == IN_FORCE, layers[independent]

    def test_the_remedy_heals_for_root_without_capabilities_and_for_an_ordinary_user(
        self, on_worse_host: Look, docker_profile: Mapping[str, Any], person: Person
    ) -> None:
        more = {"names": NEEDED_CALLS, "action": "SCMP_ACT_ALLOW"}
        profile = {**docker_profile, "syscalls": [*docker_profile["syscalls"], more]}
        code, _, layers = on_worse_host(profile=profile, capabilities=DOCKER_CAPABILITIES)
        assert code == 0, [finding for finding in layers.values() if finding["state"] != IN_FORCE]

    def test_one_missing_call_hides_only_what_needs_it(self, on_worse_host: Look) -> None:
        capabilities = [*DOCKER_CAPABILITIES, "CAP_SYS_ADMIN"]
        profile = allow_all_but("mount_setattr", number=errno.ENOSYS)
        code, _, layers = on_worse_host(profile=profile, capabilities=capabilities)
        assert code == 1
        missing = {layer for layer, finding in layers.items() if finding["state"] == MISSING}
        assert missing == {"new mount calls", "read-only view", "locked mounts", "the whole sandbox"}
        assert "not implemented" in layers["read-only view"]["detail"]

    def test_no_filter_of_our_own(self, on_worse_host: Look) -> None:
        """prctl(PR_SET_SECCOMP) cannot be refused without prctl itself; mkfifo refused before says the same."""
        _, _, layers = on_worse_host(profile=allow_all_but("mknod", "mknodat"), capabilities=DOCKER_CAPABILITIES)
        assert layers["seccomp"]["state"] == MISSING


class TestMaskedProc:
    def test_is_weaker_and_no_more(self, on_worse_host: Look) -> None:
        file, directory = "/proc/interrupts", "/proc/irq"  # Docker masks others, which not every kernel has
        code, _, layers = on_worse_host(masks=[("/dev/null", file), ("tmpfs", directory)])
        proc = layers["own /proc"]
        assert proc["state"] == WEAKER
        assert f"masked ({file}, {directory})" in proc["cause"]
        assert "systempaths=unconfined" in proc["remedy"]
        assert code == 0, [finding for finding in layers.values() if finding["state"] != IN_FORCE]
        assert layers["the whole sandbox"]["state"] == IN_FORCE


class TestSysctl:
    def test_no_user_namespaces(self, on_worse_host: Look) -> None:
        code, _, layers = on_worse_host(max_user_namespaces=0)
        assert code == 1
        user = layers["user namespace"]
        assert user["state"] == MISSING
        assert "user.max_user_namespaces is 0" in user["cause"]
        assert "sysctl -w user.max_user_namespaces=" in user["remedy"]

    def test_too_few_for_a_room_in_a_base(self, on_worse_host: Look) -> None:
        """Which probe comes to the end of them first depends on how soon the kernel frees those of the ones before."""
        code, _, layers = on_worse_host(max_user_namespaces=1)
        assert code == 1
        assert layers["the whole sandbox"]["state"] == MISSING
        assert any("user.max_" in finding["cause"] for finding in layers.values())


class TestChroot:
    def test_is_told(self, on_worse_host: Look, tmp_path: Path) -> None:
        tmp_path.chmod(0o755)
        code, _, layers = on_worse_host(chroot=str(tmp_path))
        assert code == 1
        user = layers["user namespace"]
        assert user["state"] == MISSING
        assert "we run in a chroot" in user["cause"]
        assert "outside" in user["remedy"]


class TestLibrary:
    def test_no_libseccomp(self, on_worse_host: Look, tmp_path: Path) -> None:
        found = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=True, env={"PATH": "/sbin"})
        (library, *_) = [line.split(" => ")[1] for line in found.stdout.splitlines() if "libseccomp.so.2" in line]
        empty = tmp_path / "empty"
        empty.touch()
        code, _, layers = on_worse_host(masks=[(str(empty), os.path.realpath(library))])
        assert code == 1
        assert layers["libseccomp"]["state"] == MISSING
        assert "apt-get install libseccomp2" in layers["libseccomp"]["remedy"]
        assert layers["seccomp"]["detail"] == "not tried: it needs libseccomp"
        assert layers["user namespace"]["state"] == IN_FORCE
        assert layers["the whole sandbox"]["state"] == MISSING


class TestHelper:
    def test_one_that_cannot_work(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "executable", "/bin/false")
        asked = list(ask_helper({}))
        assert [probe for probe, _ in asked] == list(PROBES)
        assert {answer["refused"] for _, answer in asked} == {"the helper ended without a word"}

    def test_one_that_cannot_be_started(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "executable", "/nowhere/at/all")
        assert all("cannot be started" in answer["refused"] for _, answer in ask_helper({}))


class TestGuide:
    """docs/hosts.md, held true."""

    TEXT = (Path(__file__).parents[2] / GUIDE).read_text(encoding="utf-8")

    def test_the_calls_that_it_lets_through_are_those_that_heal(self) -> None:
        names = self.TEXT.split('"names": [', 1)[1].split("]", 1)[0]
        assert [name.strip().strip('"') for name in names.split(",")] == NEEDED_CALLS

    def test_every_layer_that_it_names_is_one(self) -> None:
        layers = {probe.layer for probe in PROBES} | {"libseccomp", "the whole sandbox"}
        named = {"id maps", "user namespace", "own /proc", "new mount calls", "locked mounts"}
        assert all(f"`{name}`" in self.TEXT or f"`{name}  " in self.TEXT for name in named)
        assert named <= layers


class TestText:
    TIER = Finding("landlock tier", IN_FORCE, "seccomp")

    def test_remedies_stand_below_their_row_and_the_first_is_next(self) -> None:
        long = "a cause of many words " * 12
        findings = (
            Finding("one", IN_FORCE, "fine"),
            Finding("two", MISSING, "refused", long, "mend it"),
            Finding("three", WEAKER, "so so", "why", "how"),
        )
        text = as_text(Examination("Linux 6", "root", findings, Finding("full", MISSING, "no"), self.TIER))
        lines = text.splitlines()
        assert max(map(len, lines)) <= 100
        row = next(number for number, line in enumerate(lines) if line.startswith("two"))
        assert "MISSING" in lines[row]
        assert lines[row + 1].strip().startswith("cause:")
        assert any(line.strip() == "remedy: mend it" for line in lines)
        assert "can NOT be built" in text
        assert "Next:   two: mend it" in text
        assert "can be built, for policies that ask for it by name" in text
        assert " ".join(LANDLOCK_GAPS[0].split()) in " ".join(text.split())

    def test_a_weaker_layer_does_not_fail(self) -> None:
        findings = (Finding("three", WEAKER, "so so", "why", "how"),)
        examination = Examination("Linux 6", "root", findings, Finding("full", IN_FORCE, "yes"), self.TIER)
        assert examination.ok
        assert examination.tier == "namespaces"
        assert "1 of the layers could be better" in as_text(examination)

    def test_a_missing_layer_fails_even_if_a_sandbox_was_built(self) -> None:
        findings = (Finding("locked mounts", MISSING, "no"),)
        examination = Examination("Linux 6", "root", findings, Finding("full", IN_FORCE, "yes"), self.TIER)
        assert not examination.ok
        assert examination.tier == "landlock"

    def test_neither(self) -> None:
        no = Finding("any", MISSING, "no")
        examination = Examination("Linux 6", "root", (), no, no)
        assert examination.tier is None
        assert "cannot be built here either" in as_text(examination)
