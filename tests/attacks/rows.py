"""The rows of the threat catalogue in a few words each, and why a row has no test."""

from collections.abc import Iterator

TITLES = {
    "1": "host accounts and their passwords",
    "2": "/root and other homes",
    "3": "course tree, source/, gradebook.db",
    "4": "`../..` out of the work directory",
    "5": "/proc of other processes",
    "6": "another student's submission",
    "7": "processes of the host",
    "8": "secrets in the grader's environment",
    "9": "kernel-wide files in /proc",
    "10": "host paths in mountinfo and cgroup",
    "11": "inherited descriptors",
    "12": "configuration in the environment's prefix",
    "13": "the notebook with hidden tests",
    "14": "exchange, container and database sockets",
    "15": "write programs or packages",
    "16": "remount, umount, mount, overlay",
    "17": "write core_pattern",
    "18": "write /proc/self/exe",
    "19": "device nodes",
    "20": "fill every writable place",
    "21": "double chroot",
    "22": "leave a set-uid file",
    "23": "fork bomb",
    "24": "daemon that outlives the job",
    "25": "ptrace and other processes' memory",
    "26": "setns, nested namespaces, clone3",
    "27": "raise limits or priority",
    "28": "kill(-1)",
    "29": "ignore SIGINT and SIGTERM",
    "30": "os._exit or segfault in a cell",
    "30a": "kill the parent process",
    "31": "kill -9 of the supervisor",
    "32": "TCP, UDP, DNS, metadata service",
    "33": "services on the host's loopback",
    "34": "abstract sockets, raw, netlink, other families",
    "35": "unix sockets of the host by path",
    "36": "processor time without end",
    "37": "3 GiB of memory",
    "38": "many small processes",
    "39": "bytes of files",
    "40": "number of files",
    "41": "1 TB sparse file",
    "42": "memfd hoard",
    "43": "SysV shared memory",
    "44": "descriptors",
    "45": "threads",
    "46": "sleep for ever",
    "47": "flood of prints",
    "48": "flood of displays",
    "49": "one 300 MB message",
    "50": "one job starves another",
    "51": "keyctl",
    "52": "bpf",
    "53": "perf_event_open",
    "54": "io_uring",
    "55": "userfaultfd",
    "56": "typing into a terminal (TIOCSTI)",
    "57": "i386 and x32 calls",
    "58": "personality",
    "59": "kexec, modules, swap, reboot, clocks",
    "60": "files left in /tmp and /dev/shm",
    "61": "SysV ids, queues, keyrings left",
    "62": "locks and watches on shared files",
    "63": "state in a warm template",
    "64": "input transformer drops the asserts",
    "65": "patched kernel functions",
    "66": "objects equal to everything",
    "67": "fake modules beside the notebook",
    "67a": "cell tags and metadata on test cells",
    "67b": "a result displayed before the assert",
    "68": "forged messages",
    "69": "late output of a thread",
    "70": "edited points, ids, checksums",
    "70a": "odd schema version, timestamp, id",
    "70b": "a row written into gradebook.db",
    "71": "hidden tests in the feedback",
    "72": "pickles in results",
    "73": "scripts in outputs and Markdown",
    "74": "symlinks in a submission",
    "74a": "symlinks made while it runs",
    "75": "notebook that is a FIFO",
    "76": "hard links, devices, sockets in a submission",
    "77": "`../` and absolute names",
    "78": "zip bomb, giant metadata, a million files",
    "79": "broken, deep or non-UTF-8 JSON",
    "80": "odd file names",
    "81": "list inbound",
    "82": "read a submission by its name",
    "83": "overwrite, delete, rename another's submission",
    "84": "submit as somebody else, or with a forged time",
    "84a": "links, plain files, broken names and times in inbound",
    "84b": "move the course's directory away",
    "85": "change a submission after the deadline",
    "86": "another's feedback",
    "87": "fill the exchange",
    "88": "swap a directory for a link while it is collected",
    "89": "two instructors at the same moment",
    "90": "files that only one instructor can write to",
    "91": "no token, a wrong one, another course's, a student's",
    "92": "a host path, or more than the policy allows",
    "93": "a giant body, 100,000 parts, slow bytes",
    "94": "SQL, paths and headers injected",
    "95": "kill -9 of service, worker, database",
}

NOT_TRIED: dict[str, str] = {}
"""A row of this project's sandbox that no test carries, and why. Goes when a test comes."""

LAST, OTHERS = 63, range(81, 96)
"""Up to the first, and within the second (exchange and service), each row must be tried or be in `NOT_TRIED`."""


def sort_key(row: str) -> tuple[int, str]:
    """Rows in the catalogue's order: 30, 30a, 31."""
    number = row.rstrip("abcdefgh")
    return int(number), row[len(number) :]


def of_the_sandbox() -> Iterator[str]:
    """The rows that another wall can be tried with, too."""
    return (row for row in TITLES if sort_key(row)[0] <= LAST)


def required() -> Iterator[str]:
    """The rows that must be accounted for."""
    return (row for row in TITLES if sort_key(row)[0] <= LAST or sort_key(row)[0] in OTHERS)
