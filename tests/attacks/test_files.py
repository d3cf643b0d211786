"""Rows 1 to 22: what can be read and written of the host's files."""

import os
import secrets
import shutil
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from attacks.harness import Attacker, Outcome, known_hole

# Reads what can be read, everywhere but in the operating system's programs, and looks for a word in contents,
# names and link targets. Arguments: the word, where to begin, what to leave out.
_SEARCH = """
word, start, leave_out = sys.argv[1].encode()[::-1], sys.argv[2], tuple(sys.argv[3:])
found, files = [], 0
for where, directories, names in os.walk(os.fsencode(start)):
    text = os.fsdecode(where)
    if text.startswith(leave_out):
        directories[:] = []
        continue
    for name in directories + names:
        path = os.path.join(where, name)
        if word in name:
            found.append(repr(path))
        try:
            if os.path.islink(path):
                if word in os.readlink(path):
                    found.append(repr(path))
                continue
            if os.path.isdir(path) or not os.path.isfile(path):
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            content = os.read(descriptor, 1 << 20)
            files += 1
        except OSError:
            content = b""
        os.close(descriptor)
        if word in content:
            found.append(repr(path))
say(found=found, files=files)
"""


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _search(attacker: Attacker, token: str, **job: object) -> Outcome:
    # Reversed, so that the search does not find its own command line.
    return attacker.run(_SEARCH, token[::-1], "/", "/usr", str(attacker.python.parent.parent), **job)


@pytest.mark.threat(1, 2)
def test_host_accounts_and_homes_are_absent(attacker: Attacker) -> None:
    said = attacker.run("""
passwd = open("/etc/passwd").read() if os.path.exists("/etc/passwd") else ""
say(shadow=attempt(open, "/etc/shadow"), passwd=passwd,
    root=os.path.exists("/root") and os.listdir("/root"),
    home=os.listdir("/home"), root_dir=sorted(os.listdir("/")))
""").said
    assert said["shadow"] == "ENOENT"
    assert attacker.person.name == "root" or attacker.person.name not in said["passwd"]
    assert said["passwd"].startswith("student:") or not attacker.is_ours
    assert not said["root"]
    assert said["home"] == ["student"]
    assert not {"srv", "mnt", "media", "boot", "sys", "opt", "course"} & set(said["root_dir"])


_PLACES = {"environment": (5, 8), "course": (3, 13), "submission": (6, 10), "open file": (3, 11)}


@pytest.mark.parametrize("place", [pytest.param(p, marks=pytest.mark.threat(*rows)) for p, rows in _PLACES.items()])
def test_a_token_of_the_supervisor_is_nowhere(attacker: Attacker, place: str) -> None:
    """In its environment, a course tree named after it, its working directory, its open files."""
    token = attacker.token if place == "environment" else "canary" + secrets.token_hex(12)
    course = attacker.elsewhere(f"course-{token if place == 'course' else ''}")
    source = course / "source"
    source.mkdir()
    attacker.write(source / "gradebook.db", token)
    if place == "submission":
        attacker.write(attacker.temporary / f"submission-{token}", token)
    attacker.give(source)
    opened = [str(source / "gradebook.db")] if place == "open file" else []

    control = attacker.control(_SEARCH, token[::-1], str(course.parent))
    assert any("gradebook.db" in path for path in control["found"])
    said = _search(attacker, token, open_before=opened).said
    assert said["files"] > 20  # it did read, among others /proc
    assert said["found"] == []


@pytest.mark.threat(10)
@known_hole("mountinfo shows the root of a bind inside its file system")
def test_a_bind_at_another_place_does_not_name_its_source(attacker: Attacker) -> None:
    data = attacker.elsewhere(f"data-{attacker.token}")
    attacker.write(data / "weather.csv", "1,2")
    outcome = _search(attacker, attacker.token, ro=[[str(data), "/coursedata"]])
    assert outcome.said["found"] == []  # mountinfo shows the root of a bind inside its file system


@pytest.mark.threat(4)
def test_dots_lead_to_the_own_root_only(attacker: Attacker) -> None:
    said = attacker.run("""
os.chdir("/home/student/work")
os.chdir("../" * 60)
here = os.stat(".")
os.chdir("/")
fd = os.open("/proc/self/root", os.O_RDONLY)
say(same=os.path.samestat(here, os.stat("/")), up=os.path.samestat(os.stat("..", dir_fd=fd), os.stat("/")),
    shadow=attempt(open, "../" * 60 + "etc/shadow"), listing=os.listdir("/"))
""").said
    assert said["same"]
    assert said["up"]
    assert said["shadow"] == "ENOENT"
    assert "boot" not in said["listing"]


@pytest.mark.threat(7)
def test_no_process_of_the_host_is_visible(attacker: Attacker) -> None:
    probe = "say(pids=[int(name) for name in os.listdir('/proc') if name.isdecimal()])"
    assert os.getpid() in attacker.control(probe)["pids"]
    assert len(attacker.run(probe).said["pids"]) <= 3


@pytest.mark.threat(5, 7)
def test_proc_shows_the_room_alone(attacker: Attacker) -> None:
    said = attacker.run("""
pids = sorted(int(name) for name in os.listdir("/proc") if name.isdecimal())
of_init = {name: attempt(open, f"/proc/1/{name}", "rb") for name in ("environ", "mem", "maps", "auxv", "stack")}
of_init |= {name: attempt(os.readlink, f"/proc/1/{name}") for name in ("root", "cwd", "exe", "ns/mnt", "ns/user")}
of_init |= {name: attempt(os.listdir, f"/proc/1/{name}") for name in ("fd", "fdinfo", "map_files")}
say(pids=pids, of_init=of_init, cmdline=open("/proc/1/cmdline").read(), ppid=os.getppid(),
    beyond=[attempt(os.stat, f"/proc/1/root{p}") for p in ("/etc/shadow", "/../etc/shadow")])
""").said
    assert len(said["pids"]) <= 3
    assert said["ppid"] == 1
    assert set(said["of_init"].values()) <= {"EACCES", "EPERM", "ENOENT"}, said["of_init"]
    assert set(said["beyond"]) <= {"EACCES", "EPERM", "ENOENT"}
    assert said["cmdline"].strip("\0") == "isolate"


@pytest.mark.threat(6)
def test_another_running_sandbox_is_invisible(attacker: Attacker) -> None:
    """The same person grades two submissions at once; the second looks for the first, as Unix sees the same uid."""
    secret = "other" + attacker.token
    first = attacker.start_code(
        "for place in ('/tmp', '/dev/shm', os.getcwd()): open(place + '/' + sys.argv[1], 'w').write(sys.argv[1])\n"
        "print('up', flush=True)\ntime.sleep(60)",
        secret,
    )
    first.hear("up")
    said = _search(attacker, secret).said
    assert said["found"] == []
    assert said["files"] > 20


@pytest.mark.threat(8, 11)
def test_the_environment_and_the_descriptors_are_the_listed_ones(attacker: Attacker) -> None:
    path = attacker.write(attacker.directory / "opened", attacker.token)
    said = attacker.run(
        """
open_now = {}
for fd in range(4096):
    try:
        open_now[fd] = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        pass
say(environment=dict(os.environ), open=open_now)
""",
        open_before=[str(path)] * 3,
    ).said
    assert set(said["open"]) == {"0", "1", "2"}
    assert said["open"]["0"] == "/dev/null"
    assert "JUPYTERHUB_API_TOKEN" not in said["environment"]
    assert attacker.token not in str(said["environment"])


@pytest.mark.threat(17)
def test_core_pattern_cannot_be_opened(attacker: Attacker) -> None:
    """For writing; nothing is written. Also where a second proc could be mounted over the first."""
    said = attacker.run("""
names = ["core_pattern", "modprobe", "hotplug", "poweroff_cmd"]
tried = {n: attempt(open, "/proc/sys/kernel/" + n, "r+b", 0) for n in names}
syscall(native(165, 40), b"proc", b"/tmp", b"proc", 0, None)
say(**tried, again=attempt(open, "/tmp/sys/kernel/core_pattern", "r+b", 0))
""").said
    assert "ok" not in said.values(), said


@pytest.mark.threat(9)
def test_global_kernel_files_are_absent(attacker: Attacker) -> None:
    names = [
        "keys", "key-users", "cmdline", "kcore", "kmsg", "sys", "sys/kernel/core_pattern", "sysrq-trigger",
        "config.gz", "partitions", "mounts/../../sys", "interrupts", "modules", "kallsyms", "meminfo", "timer_list",
        "../sys/kernel", "../sys/fs/cgroup",
    ]  # fmt: skip
    said = attacker.run(
        "say(**{n: [attempt(os.stat, '/proc/' + n), attempt(open, '/proc/' + n, 'r+')] for n in sys.argv[1:]})", *names
    ).said
    assert {error for errors in said.values() for error in errors} <= {"ENOENT", "EACCES", "ENOTDIR"}


@pytest.mark.threat(10)
def test_cgroup_and_mounts_name_no_slice(attacker: Attacker) -> None:
    said = attacker.run("say(cgroup=open('/proc/self/cgroup').read(), mounts=open('/proc/self/mountinfo').read())").said
    assert {line.split(":", 2)[2] for line in said["cgroup"].splitlines()} <= {"/"}
    if attacker.is_ours:  # a number and no name, but why tell it
        assert "shared:" not in said["mounts"]
        assert "master:" not in said["mounts"]


@pytest.mark.threat(12)
@pytest.mark.parametrize("alias", ["plain", "etc is a link", "prefix is a link", "space and ä"])
def test_configuration_in_the_prefix_is_hidden(attacker: Attacker, alias: str) -> None:
    """However the prefix is reached, and wherever it lies."""
    top = attacker.elsewhere("prefix ä" if alias == "space and ä" else "prefix")
    prefix = top / "real"
    configuration = prefix / ("config" if alias == "etc is a link" else "etc") / "jupyter"
    (prefix / "bin").mkdir(parents=True)
    configuration.mkdir(parents=True)
    (configuration / "nbgrader_config.py").write_text(attacker.token)
    (prefix / "pyvenv.cfg").write_text("home = /usr/bin\n")
    if alias == "etc is a link":
        (prefix / "etc").symlink_to("config")
    if alias == "prefix is a link":
        (top / "link").symlink_to("real")
        prefix = top / "link"
    # The name of the second link does not matter: Python follows them one by one.
    (prefix / "bin/python").symlink_to("/usr/bin/python3")
    probe = (
        "say(found=[attempt(open, f'{p}/{e}/jupyter/nbgrader_config.py') for p in sys.argv[1:] "
        "for e in ('etc', 'config')], seen=os.path.lexists(sys.argv[1] + '/bin/python'))"
    )
    arguments = [str(prefix), str(top / "real")]
    assert "ok" in attacker.control(probe, *arguments)["found"]
    argv = [str(prefix / "bin/python"), *attacker.python_argv(probe, *arguments)[1:]]
    said = attacker.run_argv(argv, python=str(prefix / "bin/python")).said
    assert said["seen"]
    assert "ok" not in said["found"]


@pytest.mark.threat(12)
def test_hidden_wins_over_every_way_to_it(attacker: Attacker) -> None:
    """A path that the policy hides, seen through a symlinked parent and shown a second time elsewhere."""
    top = attacker.elsewhere("data")
    (top / "real/secret").mkdir(parents=True)
    (top / "real/secret/file").write_text(attacker.token)
    (top / "real/single").write_text(attacker.token)
    (top / "alias").symlink_to("real")
    said = attacker.run(
        """
top = sys.argv[1]
ways = (top + "/real", top + "/alias", "/again", "/again/../again")
paths = [f"{p}/{n}" for p in ways for n in ("secret/file", "single")]
say(found=[p for p in paths if os.path.exists(p) and os.path.isfile(p) and open(p).read()], seen=os.listdir("/again"))
""",
        str(top),
        ro=[str(top), [str(top / "real"), "/again"]],
        hidden=[str(top / "alias/secret"), str(top / "alias/single")],
    ).said
    assert said["seen"]
    assert said["found"] == []


@pytest.mark.threat(12)
@pytest.mark.parametrize("where", ["home", "etc"])
def test_a_prefix_whose_pyvenv_points_elsewhere_does_not_show_it(attacker: Attacker, where: str) -> None:
    base, file = {
        "home": (attacker.person.home, attacker.person.home),
        "etc": (Path("/etc"), Path("/etc/shadow")),
    }[where]
    prefix = attacker.elsewhere("prefix")
    (prefix / "bin").mkdir()
    (prefix / "bin/python").symlink_to("/usr/bin/python3")
    (prefix / "pyvenv.cfg").write_text(f"home = {base}/bin\n")
    argv = ["/usr/bin/python3", *attacker.python_argv(f"say(found=attempt(os.stat, {str(file)!r}))")[1:]]
    outcome = attacker.run_argv(argv, python=str(prefix / "bin/python"))
    assert outcome.error is None
    assert outcome.said["found"] == "ENOENT"


@pytest.mark.threat(14, 35)
def test_sockets_and_courses_of_the_host_are_absent(attacker: Attacker) -> None:
    outside = attacker.elsewhere("service")
    path = str(outside / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        os.chmod(path, 0o777)
        listener.listen()
        probe = """
import socket
paths = [sys.argv[1], "/course", "/srv/nbgrader/exchange", "/var/run/docker.sock", "/run/docker.sock",
    "/run/podman/podman.sock", "/var/run/postgresql/.s.PGSQL.5432", "/run/dbus/system_bus_socket", "/run/systemd"]
say(paths=[attempt(os.stat, p) for p in paths], connect=attempt(socket.socket(socket.AF_UNIX).connect, sys.argv[1]))
"""
        assert attacker.control(probe, path)["connect"] == "ok"
        said = attacker.run(probe, path).said
    assert set(said["paths"]) == {"ENOENT"}
    assert said["connect"] == "ENOENT"


@pytest.mark.threat(15, 18)
def test_programs_and_the_environment_cannot_be_written(attacker: Attacker) -> None:
    """Also when the person who grades owns the environment."""
    prefix = attacker.elsewhere("prefix")
    site = prefix / "lib/python3.11/site-packages"
    site.mkdir(parents=True)
    (prefix / "bin").mkdir()
    (prefix / "bin/python").symlink_to("/usr/bin/python3")
    (prefix / "pyvenv.cfg").write_text("home = /usr/bin\n")
    attacker.write(site / "module.py", "1\n")
    subprocess.run(["chmod", "-R", "a+rwX", prefix], check=True)
    probe = """
site = sys.argv[1]
tries = {
    "new": lambda: open(site + "/evil.pth", "w"),
    "append": lambda: open(site + "/module.py", "a"),
    "truncate": lambda: os.truncate(site + "/module.py", 0),
    "chmod": lambda: os.chmod(site + "/module.py", 0o777),
    "utime": lambda: os.utime(site + "/module.py"),
    "xattr": lambda: os.setxattr(site + "/module.py", "user.x", b"1"),
    "unlink": lambda: os.unlink(site + "/module.py"),
    "rename": lambda: os.rename(site, site + "2"),
    "link": lambda: os.link(site + "/module.py", "/tmp/module.py"),
    "usr": lambda: open("/usr/evil", "w"),
    "exe": lambda: open("/proc/self/exe", "r+b"),
    "python": lambda: open("/usr/bin/python3", "r+b"),
}
say(**{name: attempt(call) for name, call in tries.items()})
"""
    argv = [str(prefix / "bin/python"), *attacker.python_argv(probe, str(site))[1:]]
    said = attacker.run_argv(argv, python=argv[0]).said
    assert set(said.values()) <= {"EROFS", "EACCES", "EPERM", "EXDEV", "ETXTBSY"}, said
    assert os.listdir(site) == ["module.py"]
    assert (site / "module.py").read_text() == "1\n"
    assert stat.S_IMODE((site / "module.py").stat().st_mode) != 0o777


@pytest.mark.threat(15)
def test_the_own_root_is_read_only(attacker: Attacker) -> None:
    said = attacker.run("""
places = ("/evil", "/etc/passwd", "/etc/evil", "/dev/evil", "/run/evil", "/var/evil", "/home/evil", "/proc/evil")
say(**{place: attempt(open, place, "a") for place in places}, null=attempt(open, "/dev/null", "a"))
""").said
    assert said.pop("null") == "ok"
    assert set(said.values()) <= {"EROFS", "EACCES", "ENOENT"}, said


@pytest.mark.threat(16)
def test_mounts_cannot_be_changed(attacker: Attacker) -> None:
    """By the old calls and the new ones, with and without a user namespace of one's own."""
    said = attacker.run("""
mount, umount, unshare = native(165, 40), native(166, 39), native(272, 97)
REMOUNT, BIND = 32, 4096
tries = {
    "remount": syscall(mount, b"none", b"/usr", None, REMOUNT | BIND, None),
    "remount root": syscall(mount, b"none", b"/", None, REMOUNT | BIND, None),
    "umount": syscall(umount, b"/usr", 2), "umount mask": syscall(umount, b"/usr/src", 2),
    "tmpfs": syscall(mount, b"tmpfs", b"/tmp", b"tmpfs", 0, None),
    "overlay": syscall(mount, b"o", b"/tmp", b"overlay", 0, b"lowerdir=/usr,upperdir=/tmp,workdir=/tmp"),
    "bind": syscall(mount, b"/usr", b"/tmp", None, BIND, None),
    "fsopen": syscall(430, b"tmpfs", 0), "open_tree": syscall(428, -100, b"/usr", 1),
    "open_tree plain": syscall(428, -100, b"/usr", 0), "fspick": syscall(433, -100, b"/", 0),
    "mount_setattr": syscall(442, -100, b"/usr", 0, None, 0),
    "move_mount": syscall(429, -100, b"/usr", -100, b"/tmp", 0),
    "pivot": syscall(native(155, 41), b"/", b"/tmp"), "statmount": syscall(457, None, None, 0, 0),
    "listmount": syscall(458, None, None, 0, 0), "open_tree_attr": syscall(467, -100, b"/usr", 1, None, 0),
    "unshare": syscall(unshare, 0x10020000), "unshare mnt": syscall(unshare, 0x20000),
}
say(**tries)
""").said
    if attacker.is_ours:
        assert set(said.values()) <= {"EPERM", "ENOSYS"}, said
    for harmless in ("open_tree plain", "unshare", "unshare mnt"):
        said.pop(harmless)
    assert "ok" not in said.values(), said


@pytest.mark.threat(19)
def test_device_nodes_cannot_be_made_and_the_given_ones_are_harmless(attacker: Attacker) -> None:
    said = attacker.run("""
import stat
kinds = {"block": stat.S_IFBLK, "char": stat.S_IFCHR}
made = {name: attempt(os.mknod, "/tmp/node", kind | 0o666, os.makedev(1, 1)) for name, kind in kinds.items()}
white_out = attempt(os.mknod, "/tmp/node", stat.S_IFCHR, 0)
say(made=made, white_out=white_out, devices=sorted(os.listdir("/dev")), memory=attempt(open, "/dev/mem", "rb"))
""").said
    assert set(said["made"].values()) == {"EPERM"}
    assert said["white_out"] == "EPERM" or not attacker.is_ours  # a device that no driver has
    devices = {"null", "zero", "full", "random", "urandom", "pts", "ptmx", "shm", "fd", "stdin", "stdout", "stderr"}
    assert set(said["devices"]) <= devices or not attacker.is_ours
    assert said["memory"] == "ENOENT"


_FILL = """
block, total = b"x" * 65536, 0
for index, place in enumerate(sys.argv[1:]):
    for number in range(100000):
        try:
            with open(f"{place}/{index}-{number}", "wb") as file:
                total += file.write(block)
        except OSError:
            break
say(total=total)
"""


@pytest.mark.threat(20)
def test_all_writable_places_together_are_capped(attacker: Attacker) -> None:
    places = ["/tmp", "/home/student", "/dev/shm", "/home/student/work", "/var/tmp", "/run", "/root", "/dev", "/etc"]
    outcome = attacker.run(_FILL, *places, limits={"files_bytes": 8 << 20, "files_count": 500})
    assert 4 << 20 < outcome.said["total"] <= 8 << 20
    assert outcome.report is not None
    assert outcome.report["ended"] == "exited"


@pytest.mark.threat(21)
def test_double_chroot_is_refused(attacker: Attacker) -> None:
    probe = """
os.makedirs("/tmp/jail", exist_ok=True)
chroot = attempt(os.chroot, "/tmp/jail")
if chroot == "ok":
    os.chdir("../" * 60)
    attempt(os.chroot, ".")
say(chroot=chroot, shadow=attempt(os.stat, "/etc/shadow"))
"""
    said = attacker.run(probe).said
    assert said["shadow"] == "ENOENT"
    assert said["chroot"] == "EPERM" or not attacker.is_ours


# Every way we know to set a set-uid or set-gid bit, at any path. The high half of a mode is ignored by the kernel.
_SET_UID = """
import ctypes, socket, stat
os.chdir(sys.argv[1])
name = b"tool"
open(name, "w").close()
fd = os.open(name, os.O_RDONLY)
bits = (0o4755, 0o2755, 0o6755, 0o4755 | 1 << 31, 0o4755 | 1 << 40)
tried = {}
for mode in bits:
    tried[f"chmod {mode:o}"] = syscall(native(90, -1), name, mode) if native(1, 0) else "ENOSYS"
    tried[f"fchmod {mode:o}"] = syscall(native(91, 52), fd, mode)
    tried[f"fchmodat {mode:o}"] = syscall(native(268, 53), -100, name, mode)
    tried[f"fchmodat2 {mode:o}"] = syscall(452, -100, name, mode, 0)
    tried[f"fchmodat2 empty {mode:o}"] = syscall(452, fd, b"", mode, 0x1000)
    tried[f"openat {mode:o}"] = syscall(native(257, 56), -100, b"made%o" % mode, os.O_CREAT | os.O_WRONLY, mode)
    tried[f"openat high {mode:o}"] = syscall(native(257, 56), -100, b"high%o" % mode, os.O_CREAT | 1 << 40, mode)
    tried[f"tmpfile {mode:o}"] = syscall(native(257, 56), -100, b".", os.O_TMPFILE | os.O_RDWR, mode)
    how = (ctypes.c_uint64 * 3)(os.O_CREAT | os.O_WRONLY, mode & 0o7777, 0)
    tried[f"openat2 {mode:o}"] = syscall(437, -100, b"two%o" % mode, ctypes.byref(how), 24)
    tried[f"mknodat {mode:o}"] = syscall(native(259, 33), -100, b"node%o" % mode, stat.S_IFREG | mode, 0)
    tried[f"file_setattr {mode:o}"] = syscall(469, -100, name, None, 0, 0)
unix = socket.socket(socket.AF_UNIX)
tried["socket fchmod"] = attempt(os.fchmod, unix.fileno(), 0o4755)
tried["socket bind"] = attempt(unix.bind, "sock")
tried["capability"] = attempt(os.setxattr, name, "security.capability", bytes.fromhex("0100000200040000" + "00" * 12))
tried["mkdir"] = syscall(native(258, 34), -100, b"folder", 0o6777)
say(set=[n for n in os.listdir(".") if os.lstat(n).st_mode & 0o6000], tried=tried)
"""


@pytest.mark.threat(22)
def test_no_set_uid_file_is_left_for_the_host(attacker: Attacker) -> None:
    shared = attacker.elsewhere("shared")
    if not attacker.person.is_root:
        control = attacker.elsewhere("control")
        assert attacker.control(_SET_UID, str(control))["set"]
    said = attacker.run(_SET_UID, "/out", rw=[[str(shared), "/out"]]).said
    assert said["set"] == []
    assert said["tried"]["capability"] != "ok"
    names = os.listdir(shared)
    assert "tool" in names  # it could write
    assert [name for name in names if os.lstat(shared / name).st_mode & 0o6000] == []
    assert all(os.lstat(shared / name).st_uid == attacker.person.uid for name in names)


@pytest.mark.threat(15, 22)
def test_a_writable_directory_leads_nowhere_else(attacker: Attacker) -> None:
    """Links, hard links, devices and `..` in it; for root it is id-mapped and root stays unmapped elsewhere."""
    top = attacker.elsewhere("top")
    shared = top / "shared"
    shared.mkdir()
    attacker.give(shared)
    attacker.write(top / "secret", attacker.token, 0o600)
    (shared / "link").symlink_to(top / "secret")
    (shared / "up").symlink_to("..")
    said = attacker.run(
        """
top = sys.argv[1]
tries = {
    "link": attempt(open, "/out/link"),
    "up": attempt(open, "/out/../secret"), "up link": attempt(open, "/out/up/secret"),
    "hard": attempt(os.link, "/etc/passwd", "/out/hard"), "out": attempt(os.link, "/out/own", "/tmp/own"),
    "device": attempt(os.mknod, "/out/device", 0o20666, os.makedev(1, 1)),
    "chown": attempt(os.chown, "/out", 0, 0), "chroot": attempt(os.chroot, "/out"),
    "direct": attempt(open, top + "/secret"),
}
open("/out/own", "w").write("1")
say(**tries)
""",
        str(top),
        rw=[[str(shared), "/out"]],
    ).said
    assert "ok" not in said.values(), said
    assert (shared / "own").stat().st_uid == attacker.person.uid
    assert sorted(os.listdir(shared)) == ["link", "own", "up"]


@pytest.mark.threat(15)
@pytest.mark.parametrize("place", ["/home/student/env", "/dev/shm/env", "/tmp/a b ä/env", "/home/student/work/data"])
def test_what_is_shown_below_a_writable_place_stays_read_only(attacker: Attacker, place: str) -> None:
    data = attacker.elsewhere("data")
    attacker.write(data / "file", "1")
    (data / "secret").mkdir()
    attacker.write(data / "secret/file", attacker.token)
    os.chmod(data, 0o777)
    said = attacker.run(
        "p = sys.argv[1]; say(read=open(p + '/file').read(), write=attempt(open, p + '/new', 'w'), "
        "remove=attempt(os.unlink, p + '/file'), move=attempt(os.rename, p, p + '2'), "
        "hidden=os.listdir(p + '/secret'))",
        place,
        ro=[[str(data), place]],
        hidden=[str(data / "secret")],
    ).said
    assert said["read"] == "1"
    assert {said["write"], said["remove"]} == {"EROFS"}
    assert said["move"] in {"EBUSY", "EROFS"}
    assert said["hidden"] == []
    assert sorted(os.listdir(data)) == ["file", "secret"]


@pytest.mark.threat(2, 15)
def test_root_may_use_an_interpreter_in_a_closed_home_with_an_odd_name(attacker: Attacker) -> None:
    """Spaces and letters beyond ASCII; nothing beside the prefix is shown, and sandboxed code cannot read 0600."""
    home = attacker.elsewhere("home of å ä")
    prefix = home / "my env ö"
    shutil.copytree(attacker.python.parent.parent, prefix, symlinks=True, copy_function=_link_or_copy)
    attacker.write(home / "secret", attacker.token, 0o600)
    attacker.write(prefix / "secret", attacker.token, 0o600)
    os.chown(home, 0 if attacker.person.is_root else attacker.person.uid, -1)
    home.chmod(0o700)
    argv = attacker.python_argv(
        "say(beside=attempt(open, sys.argv[1]), inside=attempt(open, sys.argv[2]), prefix=sys.prefix)",
        str(home / "secret"),
        str(prefix / "secret"),
    )
    python = prefix / "bin/python"
    said = attacker.run_argv([str(python), *argv[1:]], python=str(python), supervisor=str(python)).said
    assert said["prefix"] == str(prefix)
    assert said["beside"] == "ENOENT"
    if attacker.person.is_root:
        assert said["inside"] == "EACCES"


@pytest.mark.threat(3)
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be asked")
def test_the_whole_file_system_cannot_be_shown(attacker: Attacker) -> None:
    outcome = attacker.run("say()", ro=["/"])
    assert outcome.error is not None
    assert outcome.error["layer"] == "policy"


@pytest.mark.threat(22, 31)
def test_nothing_is_left_in_temporary_directories(attacker: Attacker) -> None:
    file, directory = (f"left-{secrets.token_hex(8)}" for _ in range(2))
    code = f"open('/tmp/{file}', 'w').write('x' * 99); os.makedirs('/tmp/{directory}/b'); say(x=1)"
    assert attacker.run(code).said == {"x": 1}
    assert os.listdir(attacker.temporary) == []
    assert not {file, directory} & set(os.listdir("/tmp"))
