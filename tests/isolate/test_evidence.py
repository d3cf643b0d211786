"""What evidence is read, and what follows from it.

AppArmor's restriction, gVisor, SELinux and old kernels cannot be made here: for those, the explanation is tested
from evidence as such hosts are known to give it.
"""

import errno
from pathlib import Path

import pytest

from isolate.evidence import Evidence, diagnose, diagnose_library, gather_evidence
from isolate.policy import SandboxError

UBUNTU = Evidence(release="6.8.0-45-generic", apparmor_restricts=True, apparmor_profile="unconfined")
PLAIN = Evidence(release="6.12.0")


class TestDiagnose:
    @pytest.mark.parametrize(
        ("layer", "number", "seen", "cause", "remedy"),
        [
            ("id maps", errno.EACCES, UBUNTU, "Ubuntu", "userns,"),
            ("id maps", errno.EPERM, UBUNTU, "Ubuntu", "userns,"),
            ("mount namespace", errno.EACCES, UBUNTU, "AppArmor", "userns,"),
            ("user namespace", errno.EPERM, UBUNTU, "AppArmor", "userns,"),
            (
                "mount namespace",
                errno.EACCES,
                Evidence(seccomp=True, apparmor_profile="docker-default (enforce)"),
                "docker-default",
                "apparmor=",
            ),
            ("user namespace", errno.EPERM, Evidence(seccomp=True, container="Docker"), "Docker's", "docker run"),
            (
                "user namespace",
                errno.EPERM,
                Evidence(seccomp=True, container="Kubernetes"),
                "Kubernetes's",
                "hostUsers",
            ),
            ("user namespace", errno.EPERM, Evidence(seccomp=True), "service's", "RestrictNamespaces"),
            ("user namespace", errno.EPERM, Evidence(unprivileged_userns_clone=0), "Debian", "sysctl"),
            ("user namespace", errno.EPERM, Evidence(chrooted=True), "chroot", "outside"),
            ("user namespace", errno.EPERM, Evidence(selinux=True), "cannot be told", "ausearch"),
            ("user namespace", errno.EPERM, PLAIN, "cannot be told", "dmesg"),
            ("user namespace", errno.ENOSPC, Evidence(max_user_namespaces=0), "is 0", "sysctl -w"),
            ("user namespace", errno.ENOSPC, Evidence(max_user_namespaces=9), "in use", "sysctl"),
            ("user namespace", errno.EINVAL, PLAIN, "built without", "stock kernel"),
            ("read-only view", errno.ENOSYS, Evidence(release="5.10.0-30-amd64"), "older than 5.12", "update"),
            ("read-only view", errno.ENOSYS, Evidence(release="6.1", seccomp=True), "seccomp profile", "mount calls"),
            ("read-only view", errno.ENOSYS, Evidence(release="4.19.0-gvisor"), "gVisor", "runtimeClassName"),
            (
                "locked mounts",
                0,
                Evidence(release="4.4.0", version="#1 SMP Sun Jan 10 15:06:54 PST 2016"),
                "gVisor",
                "runtimeClassName",
            ),
            ("own /proc", 0, Evidence(proc_masks=("/proc/acpi",)), "/proc/acpi", "procMount: Unmasked"),
            ("own /proc", 0, PLAIN, "cannot be told", "dmesg"),
            ("unprivileged user", errno.EPERM, Evidence(root=True, mapped_ids=1), "1 ids", "ordinary user"),
            ("unprivileged user", errno.EPERM, Evidence(root=True), "may not change", "CAP_SETUID"),
            ("counting processes", errno.ENOENT, PLAIN, "CONFIG_PROC_CHILDREN", "stock kernel"),
            ("limits in total", 0, PLAIN, "delegated", "Delegate=yes"),
            ("seccomp", errno.EINVAL, PLAIN, "CONFIG_SECCOMP_FILTER", "stock kernel"),
            ("pivot_root", errno.ENOSYS, Evidence(machine="riscv64"), "riscv64", "x86_64"),
        ],
    )
    def test_cause_and_remedy(self, layer: str, number: int, seen: Evidence, cause: str, remedy: str) -> None:
        told = diagnose(layer, number, seen)
        assert cause in told[0]
        assert remedy in told[1]

    @pytest.mark.parametrize(("remedy", "cause"), [("install it", "is not installed"), ("", "too old or broken")])
    def test_library(self, remedy: str, cause: str) -> None:
        assert cause in diagnose_library(SandboxError("seccomp", "cannot be loaded", remedy))[0]


class TestGather:
    def test_a_pod_on_ubuntu(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        files = {
            "proc/self/status": "Name:\tpython\nCapEff:\t00000000a80425fb\nNoNewPrivs:\t0\nSeccomp:\t2\n",
            "proc/self/mountinfo": (
                "1 0 0:1 / / rw - overlay overlay rw\n2 1 0:2 / /proc rw - proc proc rw\n"
                "3 2 0:3 / /proc/acpi ro - tmpfs tmpfs ro\n4 2 0:4 /null /proc/kcore rw - tmpfs tmpfs rw\n"
            ),
            "proc/self/uid_map": "         0     100000      65536\n",
            "proc/self/cgroup": "0::/kubepods.slice/pod1/container\n",
            "proc/self/attr/current": "cri-containerd.apparmor.d (enforce)\n",
            "proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1\n",
            "proc/sys/user/max_user_namespaces": "62000\n",
        }
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        seen = gather_evidence(tmp_path)
        assert seen.container == "Kubernetes"
        assert seen.seccomp
        assert seen.apparmor_restricts
        assert seen.apparmor_profile == "cri-containerd.apparmor.d (enforce)"
        assert seen.proc_masks == ("/proc/acpi", "/proc/kcore")
        assert seen.mapped_ids == 65_536
        assert seen.max_user_namespaces == 62_000
        assert seen.unprivileged_userns_clone is None
        assert not seen.chrooted

    @pytest.mark.parametrize(
        ("place", "name"), [(".dockerenv", "Docker"), ("run/.containerenv", "Podman"), ("nothing", "")]
    )
    def test_whose_container(self, tmp_path: Path, place: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).touch()
        assert gather_evidence(tmp_path).container == name

    def test_a_host_without_proc(self, tmp_path: Path) -> None:
        seen = gather_evidence(tmp_path)
        assert (seen.seccomp, seen.proc_masks, seen.chrooted) == (False, (), False)
