"""The first process of a virtual machine: makes a small ordinary host of it, runs the tests as each person, powers off.

The root file system is the outer host's, read-only. Everything that is written to lies on a disk of the machine's
own (ext4, as on an ordinary host). Control groups are version 2 alone, laid out as systemd does.
What to do stands in /mnt/plan.json; what was found goes to /mnt/results. Standard library only.
"""

import ctypes
import json
import os
import pwd
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))
from isolate import room

_CGROUPS = Path("/sys/fs/cgroup")
_SHARE = Path("/mnt")
_WANTED = "+cpu +memory +pids"
_USER = "grader"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_POWER_OFF = 0x4321FEDC
"""LINUX_REBOOT_CMD_POWER_OFF, reboot(2)"""

_PROBE = """
import json
from isolate import landlock
from isolate.policy import system_policy
from isolate.sandbox import Command, Sandbox
with Sandbox(system_policy(), Command(["true"])) as sandbox:
    report = sandbox.wait()
print(json.dumps({"abi": landlock.abi(), "ended": report.ended, "layers": list(report.layers)}))
"""


def _mount(kind: str, source: str, target: str, options: str = "") -> None:
    subprocess.run(
        ["mount", "-t", kind, *(["-o", options] if options else []), source, target],
        check=True,
        stdin=subprocess.DEVNULL,
    )


def _make_host() -> None:
    print("guest: up", flush=True)
    os.makedirs("/dev/pts", exist_ok=True)
    os.makedirs("/dev/shm", exist_ok=True)
    _mount("devpts", "devpts", "/dev/pts", "gid=5,mode=620,ptmxmode=666")
    _mount("tmpfs", "tmpfs", "/dev/shm", "nosuid,nodev")
    for name, number in {"fd": "", "stdin": "/0", "stdout": "/1", "stderr": "/2"}.items():
        os.symlink(f"/proc/self/fd{number}", f"/dev/{name}")
    _mount("9p", "share", str(_SHARE), "trans=virtio,version=9p2000.L,msize=262144")
    _mount("tmpfs", "tmpfs", "/run", "nosuid,nodev,mode=755")
    _mount("ext4", "/dev/vda", "/srv", "relatime")
    for name in ("etc", "tmp", "home", "opt", "var"):
        subprocess.run(["mount", "--bind", f"/srv/{name}", f"/{name}"], check=True)
    subprocess.run(["umount", "--lazy", "/srv"], check=True)
    _mount("securityfs", "securityfs", "/sys/kernel/security")
    _mount("cgroup2", "cgroup2", str(_CGROUPS), "nsdelegate")
    room.bring_up_loopback()


def _write(path: Path | str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def _make_group(path: str, *, delegate_at: str | None, uid: int) -> Path:
    """A group as systemd makes them: controllers for all but the last. From `delegate_at` on it is the user's."""
    place, owned = _CGROUPS, False
    for name in path.split("/"):
        _write(place / "cgroup.subtree_control", _WANTED)
        place = place / name
        place.mkdir(exist_ok=True)
        owned = owned or name == delegate_at
        if owned:  # Documentation/admin-guide/cgroup-v2.rst, "Model of Delegation"
            for file in ("", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control"):
                os.chown(place / file, uid, uid)
    return place


class Person:
    """Who runs the tests, and in which control group."""

    def __init__(self, name: str) -> None:
        self.name = name
        entry = pwd.getpwnam("root" if name == "root" else _USER)
        self.uid, self.gid, self.home = entry.pw_uid, entry.pw_gid, entry.pw_dir
        user = f"user.slice/user-{self.uid}.slice"
        self.group = {
            "root": lambda: _make_group("system.slice/grader.service", delegate_at=None, uid=0),
            "user, subtree delegated": lambda: _make_group(
                f"{user}/delegated/leaf", delegate_at="delegated", uid=self.uid
            ),
            "user, only its own group delegated": lambda: _make_group(
                "system.slice/one.service", delegate_at="one.service", uid=self.uid
            ),
            "user, nothing delegated": lambda: _make_group(f"{user}/session", delegate_at=None, uid=self.uid),
        }[name]()

    def run(self, argv: list[str], seconds: float, **env: str) -> subprocess.CompletedProcess[str]:
        """Run something as this person in this group; what is left of it is killed."""
        environment = {
            "PATH": _PATH,
            "HOME": self.home,
            "LANG": "C.UTF-8",
            "PYTHONDONTWRITEBYTECODE": "1",
            **env,
        }
        script = (
            'g=$0; u=$1; shift; echo 0 > "$g/cgroup.procs" && exec setpriv --reuid $u --regid $u --clear-groups "$@"'
        )
        inside = ["sh", "-c", script]
        try:
            return subprocess.run(
                [*inside, str(self.group), str(self.uid), *argv],
                env=environment,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=seconds,
                check=False,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired as error:
            return subprocess.CompletedProcess(argv, 124, str(error.stdout or ""), f"not finished after {seconds} s")
        finally:
            self._empty()

    def _empty(self) -> None:
        if (self.group / "cgroup.kill").exists():  # Linux 5.14
            _write(self.group / "cgroup.kill", "1")


def _look(person: Person, python: str, plan: dict[str, Any]) -> dict[str, Any]:
    """What the doctor and a first sandbox say."""
    env = {"PYTHONPATH": plan["repository"]}
    doctor = person.run([python, "-m", "isolate.cli", "doctor", "--json"], 120, **env)
    probe = person.run([python, "-c", _PROBE], 60, **env)
    return {
        "doctor": {"code": doctor.returncode, "out": doctor.stdout, "err": doctor.stderr[-2000:]},
        "probe": {"code": probe.returncode, "out": probe.stdout, "err": probe.stderr[-2000:]},
        "left": [str(path) for path in _CGROUPS.glob("**/isolate-*")],
    }


def _test(person: Person, python: str, plan: dict[str, Any], tests: list[str], junit: Path) -> dict[str, Any]:
    in_time = ["timeout", "--signal=INT", str(plan["seconds"])]  # pytest then still says what it has found
    argv = [*in_time, python, "-m", "pytest", "-q", "-rfEs", "-p", "no:cacheprovider"]
    began = time.monotonic()
    local = Path("/tmp") / f"{junit.stem}-{os.getpid()}.xml"
    done = person.run(
        [*argv, f"--junitxml={local}", *(f"{plan['repository']}/{test}" for test in tests)],
        plan["seconds"] + 60,
        ISOLATE_TEST_ENVIRONMENT="/opt/grader",
        PYTHONPATH=plan["repository"],
    )
    if local.exists():
        shutil.copyfile(local, junit)
    return {
        "code": done.returncode,
        "seconds": round(time.monotonic() - began, 1),
        "out": done.stdout[-60000:],
        "err": done.stderr[-4000:],
        "left": [str(path) for path in _CGROUPS.glob("**/isolate-*")],
    }


def _host_facts() -> dict[str, Any]:
    def text(path: str) -> str:
        try:
            return Path(path).read_text(encoding="utf-8").strip()
        except OSError as error:
            return f"({error.strerror})"

    return {
        "release": os.uname().release,
        "version": text("/proc/version"),
        "lsm": text("/sys/kernel/security/lsm"),
        "controllers": text("/sys/fs/cgroup/cgroup.controllers"),
        "apparmor": text("/sys/module/apparmor/parameters/enabled"),
        "apparmor_restrict_unprivileged_userns": text("/proc/sys/kernel/apparmor_restrict_unprivileged_userns"),
        "unprivileged_userns_clone": text("/proc/sys/kernel/unprivileged_userns_clone"),
    }


def _work() -> None:
    _make_host()
    print("guest: the host is made", flush=True)
    plan = json.loads((_SHARE / "plan.json").read_text(encoding="utf-8"))
    results = _SHARE / "results"
    subprocess.run(["useradd", "--user-group", "--create-home", "--shell", "/bin/sh", _USER], check=True)
    refused = []
    for command in plan["commands"]:
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            refused.append(f"{command}: exit code {done.returncode}: {done.stderr.strip()}\n")
    _write(results / "host.json", json.dumps({**_host_facts(), "refused": refused}))
    for number, name in enumerate(plan["people"]):
        print("guest: as", name, flush=True)
        person = Person(name)
        python = plan["python"] if name == "root" else "/opt/grader/bin/python"
        found: dict[str, Any] = {"who": name, **_look(person, python, plan)}
        if plan["tests"]:
            found["tests"] = _test(person, python, plan, plan["tests"], results / f"{number}.xml")
        _write(results / f"{number}.json", json.dumps(found))


def main() -> None:
    """As process 1: have the work done by another process, reap whatever is orphaned meanwhile, power off."""
    worker = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, "-B", __file__, "work"])
    while os.wait()[0] != worker:
        pass
    os.sync()
    ctypes.CDLL(None).reboot(_POWER_OFF)


if __name__ == "__main__":
    os.environ["PATH"] = _PATH
    _work() if sys.argv[1:] == ["work"] else main()
