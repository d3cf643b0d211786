"""Rows 60 to 62: what one job leaves for the next, or tells one that runs beside it."""

import secrets

import pytest

from attacks.harness import Attacker

_LEAVE = """
left = {}
for place in ("/tmp", "/dev/shm", "/home/student", "/home/student/work", "/var/tmp", "/run", "/dev/mqueue"):
    def write():
        with open(f"{place}/{sys.argv[1]}", "w") as file:
            file.write(sys.argv[1])
    left[place] = attempt(write)
say(**left)
"""
_FIND = """
say(found=[p for p in ("/tmp", "/dev/shm", "/home/student", "/home/student/work", "/var/tmp", "/run", "/dev/mqueue")
    if os.path.exists(f"{p}/{sys.argv[1]}")])
"""


@pytest.mark.threat(60)
def test_files_are_gone_for_the_next_job_and_for_the_host(attacker: Attacker) -> None:
    name = "left-" + secrets.token_hex(8)
    left = attacker.run(_LEAVE, name).said
    assert (left["/tmp"], left["/dev/shm"], left["/home/student/work"]) == ("ok", "ok", "ok")
    assert attacker.run(_FIND, name).said["found"] == []
    assert attacker.control(_FIND, name)["found"] == []


@pytest.mark.threat(60)
def test_jobs_at_the_same_time_share_no_place(attacker: Attacker) -> None:
    name = "left-" + secrets.token_hex(8)
    running = attacker.start_code(_LEAVE + "time.sleep(30)", name)
    running.hear("said")
    assert attacker.run(_FIND, name).said["found"] == []
    assert attacker.control(_FIND, name)["found"] == []


@pytest.mark.threat(61)
def test_kernel_objects_with_names_cannot_be_made(attacker: Attacker) -> None:
    said = attacker.run("""
say(shm=syscall(native(29, 194), 4242, 4096, 0o1666), sem=syscall(native(64, 190), 4242, 1, 0o1666),
    msg=syscall(native(68, 186), 4242, 0o1666), mq=syscall(native(240, 180), b"left", 0o102, 0o666, None),
    key=syscall(native(248, 217), b"user", b"left", b"x", 1, -4), join=syscall(native(250, 219), 1, b"shared"),
    session=syscall(native(250, 219), 0, -3, 0))
""").said
    assert set(said.values()) <= {"EPERM", "ENOSYS"}, said


@pytest.mark.threat(61)
def test_abstract_sockets_do_not_join_two_jobs(attacker: Attacker) -> None:
    name = secrets.token_hex(8)
    running = attacker.start_code(
        "import socket; s = socket.socket(socket.AF_UNIX); s.bind('\\0' + sys.argv[1]); s.listen()\n"
        "print('up', flush=True); time.sleep(30)",
        name,
    )
    running.hear("up")
    probe = "import socket; say(it=attempt(socket.socket(socket.AF_UNIX).connect, '\\0' + sys.argv[1]))"
    assert attacker.run(probe, name).said["it"] == "ECONNREFUSED"
    assert attacker.control(probe, name)["it"] == "ECONNREFUSED"


@pytest.mark.threat(62)
def test_shared_files_carry_no_marks(attacker: Attacker) -> None:
    """Times, attributes and leases of a read-only file that all jobs see. Locks are a known, slow channel."""
    data, unseen = attacker.elsewhere("data"), attacker.elsewhere("unseen")
    for number in range(5):
        path, twin = attacker.write(data / str(number), "1"), attacker.write(unseen / str(number), "1")
        for one in (path, twin):
            one.chmod(0o666)
        before, twin_before = path.stat(), twin.stat()
        said = attacker.run(
            """
import fcntl
path = sys.argv[1]
fd = os.open(path, os.O_RDONLY)
os.read(fd, 1)
say(utime=attempt(os.utime, path), xattr=attempt(os.setxattr, path, "user.x", b"1"), write=attempt(open, path, "r+"),
    chmod=attempt(os.chmod, path, 0o600), lock=attempt(fcntl.lockf, fd, fcntl.LOCK_EX | fcntl.LOCK_NB))
""",
            str(path),
            ro=[str(data)],
        ).said
        assert "ok" not in said.values(), said
        after = path.stat()
        if twin.stat().st_atime_ns == twin_before.st_atime_ns:
            break  # else somebody on the host read everything: another test's control, say
    assert (after.st_atime_ns, after.st_mtime_ns, after.st_mode) == (
        before.st_atime_ns,
        before.st_mtime_ns,
        before.st_mode,
    )
