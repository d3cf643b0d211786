# ruff: noqa: F405, F403, B023, RUF100
# ps1/functions of mallory-reads: look for other people's work, secrets, and a way out by the network.
from common import *

# %% other people's files
for _name, _path in KNOWN["read"].items():

    @attempt(f"read {_name}")
    def _() -> str:
        return loot(Path(_path).read_bytes())


@attempt("list the course")
def _() -> str:
    return f"got {os.listdir(KNOWN['course'])}"


@attempt("list submissions")
def _() -> str:
    return f"got {os.listdir(KNOWN['submitted'])}"


# %% hidden tests in the work directory
@attempt("hidden tests beside the notebook")
def _() -> str:
    files = [path for path in Path.cwd().rglob("*") if path.is_file()]
    return loot(b"".join(path.read_bytes() for path in files)) + f" in {len(files)} files"


@attempt("hidden tests in the tree above")
def _() -> str:
    above = Path("../../../../../../../..").resolve()
    found = [str(path) for path in above.glob("*/*/source")] + [str(path) for path in above.glob("*/*/*/source")]
    return f"got {found}" if found else f"nothing under {above} with {len(os.listdir(above))} entries"


# %% environments
@attempt("own environment")
def _() -> str:
    return loot("\n".join(os.environ.values()).encode())


@attempt("environments of other processes")
def _() -> str:
    data, denied = b"", 0
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                data += Path("/proc", entry, "environ").read_bytes()
            except OSError:
                denied += 1
    return f"{loot(data)} ({denied} denied)"


@attempt("initial environment of process 1 and of the parent")
def _() -> str:
    return loot(Path("/proc/1/environ").read_bytes() + Path(f"/proc/{os.getppid()}/environ").read_bytes())


@attempt("process list")
def _() -> str:
    lines = [Path("/proc", entry, "cmdline").read_bytes() for entry in os.listdir("/proc") if entry.isdigit()]
    if any(b"demo.py" in line or b"autograde" in line for line in lines):
        return f"got the grader's processes among {len(lines)}"
    return f"saw {len(lines)} processes, none of the grader's"


@attempt("root of process 1")
def _() -> str:
    return loot(Path("/proc/1/root", KNOWN["read"]["home file"].lstrip("/")).read_bytes())


# %% the machine
@attempt("/etc/shadow")
def _() -> str:
    import hashlib

    return f"got sha256:{hashlib.sha256(Path('/etc/shadow').read_bytes()).hexdigest()}"


@attempt("home directories")
def _() -> str:
    names = [f"{place}/{name}" for place in ("/root", "/home") if os.path.isdir(place) for name in os.listdir(place)]
    return f"saw {len(names)} entries"


@attempt("walk for tokens")
def _() -> str:
    data, end = b"", time.monotonic() + 1.5
    for place in ("/tmp", "/var/tmp", "/dev/shm", "/run", "/srv", "/home", "/root", "/mnt", "/opt"):
        for folder, _, files in os.walk(place):
            for name in files:
                if time.monotonic() > end or len(data) > 64 * MIB:
                    return loot(data) + " (stopped)"
                with contextlib.suppress(OSError), open(os.path.join(folder, name), "rb") as file:
                    if os.path.isfile(file.name):
                        data += file.read(20_000)
    return loot(data)


@attempt("mount table names the course")
def _() -> str:
    text = Path("/proc/self/mountinfo").read_text()
    return "got the path of the course" if KNOWN["secret_name"] in text else f"{len(text.splitlines())} mounts, no path"


# %% the network
@attempt("TCP to the host's loopback")
def _() -> str:
    with socket.create_connection(("127.0.0.1", KNOWN["tcp"]), timeout=0.5) as link:
        link.sendall(b"hello from the sandbox")
    return "got through"


@attempt("UDP to the host's loopback")
def _() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
        sent = link.sendto(b"hello from the sandbox", ("127.0.0.1", KNOWN["udp"]))
    return f"sent {sent} bytes into the dark"


@attempt("abstract Unix socket")
def _() -> str:
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(0.5)
        link.connect("\0" + KNOWN["abstract"])
    return "got through"


@attempt("Unix socket by path")
def _() -> str:
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(0.5)
        link.connect(KNOWN["unix"])
    return "got through"


@attempt("name lookup (DNS)")
def _() -> str:
    def look() -> str:
        return f"got {socket.getaddrinfo('example.org', 80)[0][4]}"

    return in_child(look, 2)


@attempt("cloud metadata service")
def _() -> str:
    with socket.create_connection(("169.254.169.254", 80), timeout=0.5):
        return "got through"


# %% print the hidden tests while they run
@attempt("hook that prints each test")
def _() -> str:
    get_ipython().events.register("pre_run_cell", lambda info: print("SEEN", info.raw_cell))  # noqa: F821
    return "hooked; the tests are printed when they run"
