"""The first stage of a sandbox: namespaces of its own and a read-only view of what the policy shows.

The steps stand in the order in which they run. `run_outer` gives up what root has, leaves the host's
namespaces and forks; `_run_init` is PID 1 of the base, lays the view and starts the room (`isolate.room`),
whose own user namespace then *locks* every mount made here: mount_namespaces(7), "Restrictions".

Standard library only. Nothing here returns to its caller: each function that forks ends its process.
"""

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import stat
from typing import Any, NoReturn

from isolate import room, syscalls
from isolate.room import step

Plan = dict[str, Any]
Trees = list[int | None]

READ_ONLY = syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV
_TEMPLATE_BYTES = 64 << 20
_WRITABLE = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV


def open_trees(plan: Plan) -> Trees:
    """Copies of the mounts that will be visible, as descriptors, in the order of the plan's mounts and devices.

    Root does this before it gives up its uid, because a path may lead through directories that only their
    owner may enter; others do it inside the new user namespace. None stands for a symlink.
    """
    trees: Trees = []
    for entry in plan["mounts"]:
        if entry["kind"] == "hidden" or os.path.islink(entry["source"]):
            trees.append(None)
            continue
        with step("read-only view", f"open {entry['source']}"):
            tree = syscalls.open_tree(entry["source"])
            if entry["kind"] == "read-only":
                syscalls.mount_setattr(tree, READ_ONLY, recursive=True)
            else:
                _make_writable(plan, entry, tree)
        trees.append(tree)
    for device in room.DEVICES:
        with step("devices", f"open /dev/{device}"):
            trees.append(syscalls.open_tree(f"/dev/{device}"))
    return trees


def open_trees_as_root(plan: Plan) -> Trees | None:
    """Before root is given up; None where that is not possible or not needed, and the sandbox's user opens them.

    A root without CAP_SYS_ADMIN, as in most containers, is refused with EPERM. Raises `BuildError`.
    """
    if plan["uid"] is None:
        return None
    try:
        return open_trees(plan)
    except room.BuildError as error:
        if error.error_number != errno.EPERM:
            raise
        if any(entry["kind"] == "writable" for entry in plan["mounts"]):
            remedy = "run it as an ordinary user, or show nothing writable"
            raise room.BuildError("writable paths", "root without CAP_SYS_ADMIN cannot show any", remedy) from error
        return None


def _make_writable(plan: Plan, entry: dict[str, Any], tree: int) -> None:
    """A writable directory; root maps its owner to the sandbox's uid, on this mount only."""
    syscalls.mount_setattr(tree, _WRITABLE, recursive=True)
    if plan["uid"] is None:
        return
    owner = os.stat(entry["source"])
    namespace = _id_map_namespace((owner.st_uid, plan["uid"]), (owner.st_gid, plan["gid"]))
    try:
        syscalls.mount_setattr(tree, syscalls.MOUNT_ATTR_IDMAP, recursive=True, userns_fd=namespace)
    finally:
        os.close(namespace)


def _id_map_namespace(uids: tuple[int, int], gids: tuple[int, int]) -> int:
    """A user namespace that exists only to carry a map from an id on disk to an id on the mount."""
    ready, ready_end = os.pipe()
    hold_end, hold = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            syscalls.unshare(syscalls.CLONE_NEWUSER)
            os.write(ready_end, b"x")
            os.close(hold)
            os.read(hold_end, 1)
        finally:
            os._exit(0)
    try:
        os.close(ready_end)
        os.read(ready, 1)
        for name, (inside, outside) in (("uid_map", uids), ("gid_map", gids)):
            room.write_file(f"/proc/{pid}/{name}", f"{inside} {outside} 1")
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        for descriptor in (ready, hold, hold_end):
            os.close(descriptor)
        os.waitpid(pid, 0)


def leave_launcher(plan: Plan, launcher_pid: int, death_signal: int) -> None:
    """What a sandbox's first process does: stop being the launcher's image, be killed early, give up root."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    with contextlib.suppress(OSError):  # a host's filter may refuse it, to the command as well
        syscalls.reset_personality()
    # Under memory pressure the host ends a sandbox first. Written by root, it cannot be lowered. proc(5)
    with contextlib.suppress(OSError):
        room.write_file("/proc/self/oom_score_adj", "800")
    if plan["uid"] is not None:
        with step("unprivileged user", "give up root"):
            os.setgroups([])
            os.setresgid(plan["gid"], plan["gid"], plan["gid"])
            os.setresuid(plan["uid"], plan["uid"], plan["uid"])
            # Else /proc/self belongs to root and the id maps cannot be written.
            syscalls.set_dumpable(True)
    # After the uid: a change of credentials clears it. prctl(2)
    syscalls.set_parent_death_signal(death_signal)
    if os.getppid() != launcher_pid:
        os._exit(1)


def map_range(pid: int, first: int, count: int) -> None:
    """Let a user namespace's processes be these unprivileged users of the host, by the same numbers. Root only.

    user_namespaces(7): who has CAP_SETUID in the parent namespace may map any of its ids.
    """
    for name in ("uid_map", "gid_map"):
        room.write_file(f"/proc/{pid}/{name}", f"{first} {first} {count}")


def run_outer(
    plan: Plan,
    box: socket.socket,
    trees: Trees | None,
    launcher_pid: int,
    jobs: socket.socket | None,
    launcher: socket.socket,
) -> NoReturn:
    """Drop to the sandbox's uid, unshare, map one id, fork PID 1 of the base and wait for it.

    A template's base has a whole range of ids, since each of its rooms has one of its own: the launcher maps it.
    """
    with room.report_failures(box):
        leave_launcher(plan, launcher_pid, signal.SIGKILL)
        uid, gid = os.getuid(), os.getgid()
        # Kept through both stages because a host that masks parts of /proc lets nobody mount another one.
        host_proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with step("namespaces", "unshare user, mount, pid, net, ipc, uts, cgroup"):
            syscalls.unshare(syscalls.ALL_NAMESPACES)
        with step("user namespace", "map one user and one group"):
            if plan["template"] and plan["template"]["ids"]:
                launcher.send(b"map")
                launcher.recv(16)
                if os.getuid() != uid:
                    raise room.BuildError("user namespace", "a range of users cannot be mapped here")
            else:
                room.write_id_maps(host_proc, uid, gid)
        launcher.close()
        pid = os.fork()
        if pid == 0:
            _run_init(plan, box, trees, host_proc, jobs)
        os.close(host_proc)
        room.close_all_but(box.fileno())
        room.wait_and_exit(pid)
    os._exit(1)


def _run_init(
    plan: Plan, box: socket.socket, trees: Trees | None, host_proc: int, jobs: socket.socket | None
) -> NoReturn:
    """PID 1 of the base: lay the view, lock it by starting the room, wait for the room."""
    with room.report_failures(box):
        syscalls.set_parent_death_signal(signal.SIGKILL)
        os.umask(0o022)
        with step("mount namespace", "stop mounts from spreading"):
            syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        if trees is None:
            trees = open_trees(plan)
        layers = ["user, mount, pid, net, ipc, uts and cgroup namespaces"]
        if plan["uid"] is not None:
            layers.insert(0, "unprivileged uid of its own")
        if _enter_empty_root(plan):
            layers.append("proc of its own, process directories only")
        _lay_devices(trees[len(plan["mounts"]) :])
        _lay_mounts(plan, trees)
        _lay_files(plan)
        if jobs is not None:
            _make_template_places(plan)
        with step("read-only view", "make the root read-only"):
            syscalls.mount_setattr("/", READ_ONLY)
        layers.append("read-only view, locked")
        pid = os.fork()
        if pid == 0:
            if jobs is not None:
                _execute_template(plan, box, host_proc, jobs, layers)
            room.run_outer(plan, box, host_proc, layers)
        os.close(host_proc)
        room.close_all_but(box.fileno())
        room.wait_and_exit(pid)
    os._exit(1)


def _make_template_places(plan: Plan) -> None:
    """What is imported may want a HOME and a place for temporary files. Every room covers them with its own."""
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV
    covered = room.open_what_will_be_covered(plan)
    with step("files", "mount writable places for the template"):
        for place in room.WRITABLE_PLACES:
            syscalls.mount("tmpfs", place, "tmpfs", flags, f"size={_TEMPLATE_BYTES},nr_inodes=4096,mode=755")
    room.show_again(covered)
    for path, text in plan["template"]["files"].items():
        with step("files", f"write {path}"):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            room.write_file(path, text)


def _execute_template(plan: Plan, box: socket.socket, host_proc: int, jobs: socket.socket, layers: list[str]) -> None:
    """Become the interpreter that `isolate.template` describes."""
    template = plan["template"]
    state = {**template["state"], "layers": layers, "changes_uid": template["ids"] is not None}
    with open(os.memfd_create("isolate-state"), "w+b") as file:
        file.write(json.dumps(state).encode())
        file.seek(0)
        found = (template["source_fd"], file.fileno(), jobs.fileno(), host_proc, box.fileno())
        high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 64) for descriptor in found]
        for number, descriptor in enumerate(high, start=3):
            os.dup2(descriptor, number)
        room.close_all_but(*range(3, 3 + len(high)))
        keep = (syscalls.CAP_SETGID, syscalls.CAP_SETUID) if state["changes_uid"] else ()
        with step("capabilities", "keep what a change of user needs"):
            syscalls.drop_bounding_capabilities(*keep)
            syscalls.hold_capabilities(*keep, effective=True, across_exec=True)
        syscalls.set_no_new_privs()
        with step("template", f"start {state['argv'][0]}"):
            os.execvpe(state["argv"][0], state["argv"], state["environment"])


def _enter_empty_root(plan: Plan) -> bool:
    """Make an empty tmpfs the root and let the host's tree go. Whether a proc could be mounted. pivot_root(2).

    The view is laid only afterwards, so that no symlink in it can lead back into the host's tree.
    """
    staging = "/tmp" if os.path.isdir("/tmp") else "/usr"
    with step("mount namespace", "mount an empty root"):
        flags = syscalls.MS_NOSUID | syscalls.MS_NODEV
        syscalls.mount("tmpfs", staging, "tmpfs", flags, f"size=4m,nr_inodes={plan['root_inodes']},mode=755")
        os.chdir(staging)
        os.mkdir("proc")
    has_proc = room.mount_proc("proc")
    with step("mount namespace", "pivot_root"):
        syscalls.pivot_root(".", ".")
        syscalls.umount_detached(".")
        os.chdir("/")
    return has_proc


def _lay_devices(trees: Trees) -> None:
    os.makedirs("/dev/pts")
    os.mkdir("/dev/shm")
    for device, tree in zip(room.DEVICES, trees, strict=True):
        assert tree is not None
        with step("devices", f"bind /dev/{device}"):
            _touch(f"/dev/{device}")
            syscalls.move_mount(tree, f"/dev/{device}")
            os.close(tree)
    links = {
        "ptmx": "pts/ptmx",
        "fd": "/proc/self/fd",
        "stdin": "/proc/self/fd/0",
        "stdout": "/proc/self/fd/1",
        "stderr": "/proc/self/fd/2",
    }
    for name, target in links.items():
        os.symlink(target, f"/dev/{name}")


def _lay_mounts(plan: Plan, trees: Trees) -> None:
    """Parents before children; a mask stays writable until all is laid, since something may be shown below it."""
    masks: list[str] = []
    for entry, tree in zip(plan["mounts"], trees, strict=False):
        if entry["kind"] == "hidden":
            with step("hidden paths", f"mask {entry['target']}"):
                masks.extend(_mask(entry["target"]))
            continue
        with step("read-only view", f"show {entry['target']}"):
            os.makedirs(os.path.dirname(entry["target"]), exist_ok=True)
            if tree is None:
                if not os.path.lexists(entry["target"]):
                    os.symlink(entry["link"], entry["target"])
                continue
            if entry["directory"]:
                os.makedirs(entry["target"], exist_ok=True)
            elif not os.path.exists(entry["target"]):
                _touch(entry["target"])
            syscalls.move_mount(tree, entry["target"])
            os.close(tree)
    for mask in masks:
        with step("hidden paths", f"make the mask of {mask} read-only"):
            syscalls.mount_setattr(mask, READ_ONLY)


def _mask(target: str) -> list[str]:
    """Cover what lies at the end of this path, links followed, with something empty. The masked directory, if any."""
    path = os.path.realpath(target)
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return []
    if stat.S_ISDIR(mode):
        flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
        syscalls.mount("tmpfs", path, "tmpfs", flags, "size=64k,nr_inodes=64,mode=555")
        return [path]
    syscalls.mount("/dev/null", path, None, syscalls.MS_BIND)
    return []


def _lay_files(plan: Plan) -> None:
    with step("read-only view", "write /etc"):
        for path, text in plan["files"].items():
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if not os.path.lexists(path):
                room.write_file(path, text)
        for path in plan["directories"]:
            os.makedirs(path, exist_ok=True)
        if not os.path.lexists("/var/tmp"):
            os.makedirs("/var", exist_ok=True)
            os.symlink("/tmp", "/var/tmp")


def _touch(path: str) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o444))
