"""Which system calls a room may make: an allow-list, compiled here and loaded as bytes in the room.

Two programs, because a reader can check them apart: the first allows by name (and refuses namespaces and
socket families), the second refuses by argument. The kernel runs both and the stricter answer wins.

Compiled with libseccomp (through pyseccomp) in the supervisor's process, because inside a sandbox the
library could not be found. What is not named below answers ENOSYS, so that a C library falls back to an older
call; what is refused on purpose and tells the caller so is in `_REFUSED`. Foreign architectures kill.
Sources: syscalls(2), seccomp(2), the published default profile of Docker (moby/profiles/seccomp).
"""

import errno
import functools
import os
import socket
import stat
from typing import Any

from isolate import syscalls
from isolate.policy import SandboxError

# A reviewed list: for each group why it is harmless inside the namespaces, and how it compares with the profile
# that Docker publishes (moby, profiles/seccomp/default.json). docs/surface.md tells the same to administrators.

# Files. What they reach is the room's own tmpfs and mounts that are locked read-only.
# Stricter than Docker: no mknod (a device node is a way out where a mount lacks nodev), no name_to_handle_at and
# open_by_handle_at (files by number, past every mount), no openat2, fchmodat2 and kin (arguments in memory, which the
# filter for set-uid bits could not read), no fanotify and no inotify: a watch on a shared read-only file
# tells what other jobs and the host itself open. `tail -f` and watchdog fall back to looking again and again.
_FILES = """access chdir chmod close close_range copy_file_range creat dup dup2 dup3 faccessat faccessat2 fadvise64
fallocate fchdir fchmod fchmodat fchown fchownat chown lchown fcntl fdatasync fgetxattr flistxattr flock
fremovexattr fsetxattr fstat fstatfs fsync ftruncate futimesat getcwd getdents getdents64 getxattr lgetxattr
link linkat listxattr llistxattr lremovexattr lseek lsetxattr lstat mkdir mkdirat newfstatat open openat pread64
preadv preadv2 pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv removexattr rename renameat
renameat2 rmdir sendfile setxattr splice stat statfs statx symlink symlinkat sync_file_range
tee truncate umask unlink unlinkat utime utimensat utimes vmsplice write writev"""

# Memory. Bounded by RLIMIT_DATA, the tmpfs and the sum over all processes.
# Stricter: no memfd_create and memfd_secret (files that no tmpfs counts), no remap_file_pages (emulated, unused),
# no modify_ldt, no process_madvise and process_mrelease. More than Docker gives without CAP_SYS_NICE: the memory
# policy calls, which numerical libraries ask for and which bind only the caller's own pages.
_MEMORY = """brk get_mempolicy madvise mincore mlock mlock2 mlockall mmap mprotect mremap msync munlock munlockall
munmap pkey_alloc pkey_free pkey_mprotect mbind set_mempolicy map_shadow_stack mseal"""

# Processes, threads, signals. They reach no further than the PID namespace; `clone` is allowed below without
# namespaces, prlimit64 for the caller alone, prctl without core scheduling.
# Stricter: no ptrace, process_vm_readv and process_vm_writev, which Docker allows since Linux 4.8; no pidfd_getfd and
# kcmp; no ioprio_set; no set_thread_area and other remains of 32 bits.
_PROCESSES = """execve execveat exit exit_group fork vfork wait4 waitid getpgid getpgrp getpid getppid getpriority
getrlimit getrusage getsid gettid prlimit64 setrlimit setpgid setpriority setsid set_robust_list get_robust_list
set_tid_address arch_prctl prctl rseq futex futex_waitv futex_wake futex_wait futex_requeue membarrier
sched_setattr sched_setparam sched_setscheduler sched_get_priority_max sched_get_priority_min
sched_getaffinity sched_getattr sched_getparam sched_getscheduler
sched_rr_get_interval sched_setaffinity sched_yield getcpu capget capset restart_syscall kill tgkill tkill
rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait
rt_tgsigqueueinfo sigaltstack signalfd signalfd4 pause alarm getitimer setitimer pidfd_open pidfd_send_signal
ioprio_get seccomp landlock_create_ruleset landlock_add_rule landlock_restrict_self"""

# Identity. One uid and one gid are mapped, setgroups is denied and no capability is held: there is nobody to become.
_IDENTITY = """getegid geteuid getgid getgroups getresgid getresuid getuid setfsgid setfsuid setgid setgroups setregid
setresgid setresuid setreuid setuid"""

# Time. Stricter: none that could set a clock, and so not adjtimex and clock_adjtime either, with which Docker lets ask.
_TIME = """clock_getres clock_gettime clock_nanosleep gettimeofday nanosleep time times timer_create timer_delete
timer_getoverrun timer_gettime timer_settime timerfd_create timerfd_gettime timerfd_settime"""

# Waiting. Stricter: no asynchronous input/output (io_setup and kin share one table of the whole host), no io_uring.
_WAITING = """epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old
eventfd eventfd2 pipe pipe2 poll ppoll pselect6 select"""

# Sockets of the room's own network namespace. Stricter: Docker allows every family but vsock, we allow three (below).
_SOCKETS = """accept accept4 bind connect getpeername getsockname getsockopt listen recv recvfrom recvmmsg recvmsg
send sendmmsg sendmsg sendto setsockopt shutdown"""

# The rest. sysinfo tells the host's memory and load, which C libraries report as the machine's; no ioctl reaches a
# device but the terminals and the random device, and those need capabilities for more than reading.
_SYSTEM = """getrandom sysinfo uname ioctl"""
_ALLOWED = " ".join((_FILES, _MEMORY, _PROCESSES, _IDENTITY, _TIME, _WAITING, _SOCKETS, _SYSTEM)).split()

# Answered with success and not made: nothing in a room is on a disk, and sync(2) would have the host write all of its
# own. Docker allows both.
_NOTHING_TO_DO = ("sync", "syncfs")

# Answered with EPERM: the programs that call these should see a plain refusal. SysV memory and queues, keys and the
# clocks among them are allowed by Docker, where an IPC namespace or a capability decides.
_REFUSED = """
acct add_key adjtimex bpf chroot clock_adjtime clock_settime delete_module fanotify_init finit_module fsconfig
fsmount fsopen fspick get_kernel_syms init_module io_uring_enter io_uring_register io_uring_setup ioperm iopl
ioprio_set kcmp kexec_file_load kexec_load keyctl lookup_dcookie memfd_secret migrate_pages mknod mknodat
mount mount_setattr move_mount move_pages name_to_handle_at nfsservctl open_by_handle_at open_tree
perf_event_open pidfd_getfd pivot_root process_madvise process_mrelease process_vm_readv process_vm_writev
ptrace query_module quotactl quotactl_fd reboot request_key sethostname setdomainname setns settimeofday shmat
shmctl shmdt shmget msgctl msgget msgrcv msgsnd semctl semget semop semtimedop stime swapoff swapon syslog
umount umount2 unshare uselib userfaultfd ustat vhangup
""".split()

_SOCKET_FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
_ODD_SOCKET_TYPES = (socket.SOCK_RDM, socket.SOCK_SEQPACKET, 6, 10)  # the last two: DCCP, PACKET
# ioctl_tty(2): typing into a terminal, the console's selection.
_TERMINAL_INJECTION = (0x5412, 0x541C)
_RLIMIT_CORE = 4
_PR_SCHED_CORE = 62
_F_NOTIFY, _F_SETLEASE = 1026, 1024
_SUID_BITS = (stat.S_ISUID, stat.S_ISGID)
_MODE_ARGUMENT = {"chmod": 1, "fchmod": 1, "fchmodat": 2, "creat": 1}
_OPEN_ARGUMENTS = {"open": (1, 2), "openat": (2, 3)}  # name: (index of flags, index of mode)
_TMPFILE = os.O_TMPFILE & ~os.O_DIRECTORY
_ALLOWED_BY_ARGUMENT = ("clone", "personality", "socket", "socketpair")
_PERSONALITIES = (0x0, 0xFFFFFFFF)
"""PER_LINUX and 'tell me': what a libc or a runtime asks. Turning address randomisation off is refused."""


def allowed_names() -> frozenset[str]:
    """The calls that may succeed, some of them with certain arguments only."""
    return frozenset((*_ALLOWED, *_NOTHING_TO_DO, *_ALLOWED_BY_ARGUMENT))


def refused_names() -> frozenset[str]:
    """The calls that answer EPERM; all that neither list names answer ENOSYS."""
    return frozenset(_REFUSED)


@functools.cache
def compiled_filters() -> tuple[bytes, ...]:
    """The filters as classic BPF for this machine, to be loaded in order. Raises `SandboxError`."""
    try:
        import pyseccomp  # loads libseccomp.so.2, which a host may lack
    except (ImportError, RuntimeError, OSError) as error:
        raise SandboxError(
            "seccomp",
            f"libseccomp cannot be loaded: {error}",
            "install it: apt-get install libseccomp2, or dnf install libseccomp",
        ) from error
    try:
        # The last one loaded must come last because it is the first that forbids loading more.
        return (_refuse_by_argument(pyseccomp), _allow_by_name(pyseccomp))
    except (OSError, ValueError, RuntimeError) as error:
        raise SandboxError("seccomp", f"the filter cannot be compiled: {error}") from error


class _Rules:
    """A filter under construction; calls that this architecture or libseccomp does not know are left out."""

    def __init__(self, lib: Any, default: int) -> None:
        self._lib = lib
        self._filter = lib.SyscallFilter(default)
        self._filter.set_attr(lib.Attr.ACT_BADARCH, lib.KILL_PROCESS)

    def add(self, action: int, name: str, *conditions: Any) -> None:
        try:
            known = self._lib.resolve_syscall(self._lib.Arch.NATIVE, name) >= 0
        except (ValueError, OSError):
            known = False
        if known:
            self._filter.add_rule(action, name, *conditions)

    def export(self) -> bytes:
        with open(os.memfd_create("seccomp"), "w+b") as file:
            self._filter.export_bpf(file)
            file.seek(0)
            return file.read()


def _allow_by_name(lib: Any) -> bytes:
    rules = _Rules(lib, lib.ERRNO(errno.ENOSYS))
    for name in _ALLOWED:
        rules.add(lib.ALLOW, name)
    for name in _REFUSED:
        rules.add(lib.ERRNO(errno.EPERM), name)
    for name in _NOTHING_TO_DO:
        rules.add(lib.ERRNO(0), name)
    for persona in _PERSONALITIES:
        rules.add(lib.ALLOW, "personality", lib.Arg(0, lib.EQ, persona))
    # No new namespaces; clone3, whose flags no filter can see, answers ENOSYS and glibc falls back to clone.
    rules.add(lib.ALLOW, "clone", lib.Arg(0, lib.MASKED_EQ, syscalls.ALL_NAMESPACES, 0))
    for family in range(64):
        if family in _SOCKET_FAMILIES:
            answer = lib.ALLOW
        elif family == socket.AF_NETLINK:
            answer = lib.ERRNO(errno.EINVAL)  # libzmq aborts on EAFNOSUPPORT here
        else:
            answer = lib.ERRNO(errno.EAFNOSUPPORT)
        rules.add(answer, "socket", lib.Arg(0, lib.EQ, family))
        pair = lib.ALLOW if family == socket.AF_UNIX else lib.ERRNO(errno.EAFNOSUPPORT)
        rules.add(pair, "socketpair", lib.Arg(0, lib.EQ, family))
    return rules.export()


def _refuse_by_argument(lib: Any) -> bytes:
    rules = _Rules(lib, lib.ALLOW)
    refuse = lib.ERRNO(errno.EPERM)
    low_word = 0xFFFFFFFF  # ioctl(2) ignores the upper half of its request, so the filter must too
    for request in _TERMINAL_INJECTION:
        rules.add(refuse, "ioctl", lib.Arg(1, lib.MASKED_EQ, low_word, request))
    # A core limit of 1 keeps the host's crash handler out (see room); 0 would let it in again. core(5)
    rules.add(refuse, "setrlimit", lib.Arg(0, lib.MASKED_EQ, low_word, _RLIMIT_CORE))
    rules.add(refuse, "prlimit64", lib.Arg(1, lib.MASKED_EQ, low_word, _RLIMIT_CORE), lib.Arg(2, lib.NE, 0))
    # A core that one job keeps for itself has the other half of a processor idle for everybody. core-scheduling.rst
    rules.add(lib.ERRNO(errno.EINVAL), "prctl", lib.Arg(0, lib.MASKED_EQ, low_word, _PR_SCHED_CORE))
    # Like inotify, an older watch on a directory that others share. fcntl(2)
    rules.add(lib.ERRNO(errno.EINVAL), "fcntl", lib.Arg(1, lib.MASKED_EQ, low_word, _F_NOTIFY))
    # A lease on a file that others read stops them for /proc/sys/fs/lease-break-time, and tells who reads. fcntl(2)
    rules.add(lib.ERRNO(errno.EINVAL), "fcntl", lib.Arg(1, lib.MASKED_EQ, low_word, _F_SETLEASE))
    # Nobody sets the limits of the room's init, which has to report and to pack.
    rules.add(refuse, "prlimit64", lib.Arg(0, lib.NE, 0))
    # TCP and UDP are all that a loopback needs; other protocols would have the host load modules. ip(7)
    for family in (socket.AF_INET, socket.AF_INET6):
        rules.add(refuse, "socket", lib.Arg(0, lib.EQ, family), lib.Arg(2, lib.GT, socket.IPPROTO_UDP))
        for kind in _ODD_SOCKET_TYPES:
            rules.add(refuse, "socket", lib.Arg(0, lib.EQ, family), lib.Arg(1, lib.MASKED_EQ, 0xF, kind))
    # A set-uid file has no use in here, and a host directory that is writable must not receive one.
    for bit in _SUID_BITS:
        for name, index in _MODE_ARGUMENT.items():
            rules.add(refuse, name, lib.Arg(index, lib.MASKED_EQ, bit, bit))
        for name, (flags, mode) in _OPEN_ARGUMENTS.items():
            for creating in (os.O_CREAT, _TMPFILE):
                rules.add(
                    refuse,
                    name,
                    lib.Arg(flags, lib.MASKED_EQ, creating, creating),
                    lib.Arg(mode, lib.MASKED_EQ, bit, bit),
                )
    return rules.export()


_F_SETOWN, _F_SETOWN_EX = 8, 15
_FALLOC_FL_KEEP_SIZE = 1
_IOCTL_KIND, _IOCTL_KIND_OF_TERMINALS = range(8, 16), ord("T")
_PR_SET_DUMPABLE = 4


@functools.cache
def landlock_tier_filter(*, connects: bool, truncates: bool, signals: bool, shared_user: bool) -> bytes:
    """What the landlock tier refuses besides: what a namespace would have kept apart and Landlock does not see.

    `connects`: may use sockets of others. `truncates`, `signals`: this Landlock keeps these two apart by itself.
    `shared_user`: the sandbox's user has other processes, whose priority, and files, whose modes, times and
    attributes Landlock leaves open.
    """
    import pyseccomp as lib

    rules = _Rules(lib, lib.ALLOW)
    refuse, low_word = lib.ERRNO(errno.EPERM), 0xFFFFFFFF
    for family in (socket.AF_INET, socket.AF_INET6):
        rules.add(lib.ERRNO(errno.EAFNOSUPPORT), "socket", lib.Arg(0, lib.EQ, family))
    # Whoever may write a file by its mode may mark it, whatever Landlock says; and read its marks.
    refused = "inotify_add_watch inotify_init inotify_init1"
    refused += " setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr"
    for name in "getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr".split():
        rules.add(lib.ERRNO(errno.EOPNOTSUPP), name)
    # Terminals, pipes and what every descriptor knows (FIONREAD, FIONBIO). Others change files through a descriptor
    # for reading (FS_IOC_SETFLAGS, those of btrfs), and those of sockets tell the host's interfaces. ioctl(2)
    for bit in _IOCTL_KIND:
        wanted = _IOCTL_KIND_OF_TERMINALS << 8 & 1 << bit
        rules.add(lib.ERRNO(errno.ENOTTY), "ioctl", lib.Arg(1, lib.MASKED_EQ, 1 << bit, wanted ^ 1 << bit))
    # Space beyond a file's end, which no RLIMIT_FSIZE bounds. fallocate(2)
    keep = _FALLOC_FL_KEEP_SIZE
    rules.add(lib.ERRNO(errno.EOPNOTSUPP), "fallocate", lib.Arg(1, lib.MASKED_EQ, keep, keep))
    # The launcher looks into the sandbox's processes for what they hold.
    rules.add(refuse, "prctl", lib.Arg(0, lib.MASKED_EQ, low_word, _PR_SET_DUMPABLE), lib.Arg(1, lib.EQ, 0))
    for name in "utime utimes utimensat futimesat".split():
        rules.add(lib.ERRNO(0), name)  # answered as done: unpacking and copying end with these calls
    if not connects:
        refused += " connect"
        for kind in (socket.SOCK_DGRAM, socket.SOCK_RAW):  # to unix(7) both are datagrams, sent without connecting
            for name in ("socket", "socketpair"):
                rules.add(refuse, name, lib.Arg(0, lib.EQ, socket.AF_UNIX), lib.Arg(1, lib.MASKED_EQ, 0xF, kind))
    if not truncates:
        refused += " truncate"
    if not signals:
        refused += " tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_send_signal"
        rules.add(refuse, "kill", lib.Arg(0, lib.NE, 0))
        for command in (_F_SETOWN, _F_SETOWN_EX):
            rules.add(refuse, "fcntl", lib.Arg(1, lib.MASKED_EQ, low_word, command))
    if shared_user:
        refused += " chown fchown fchownat lchown"
        # Answered as done, too; libzmq aborts without the last one.
        for name in "chmod fchmod fchmodat".split():
            rules.add(lib.ERRNO(0), name)
        for name in "sched_setaffinity sched_setattr sched_setparam sched_setscheduler".split():
            rules.add(lib.ERRNO(0), name, lib.Arg(0, lib.NE, 0))
        rules.add(refuse, "setpriority", lib.Arg(1, lib.NE, 0))
        rules.add(refuse, "setpriority", lib.Arg(0, lib.NE, os.PRIO_PROCESS))
    for name in refused.split():
        rules.add(refuse, name)
    return rules.export()
