# ruff: noqa: F405, F403, B023, RUF100
# ps1/text of mallory-fills: memory, from most to least polite. At most 4 GiB each, given back at once.
import mmap

from common import *


def hoard(total: int, seconds: float) -> int:
    """Write to new memory until total bytes or the end of the time; return the bytes written."""
    kept, block, end = [], b"x" * (32 * MIB), time.monotonic() + seconds
    while len(kept) * 32 * MIB < total and time.monotonic() < end:
        area = mmap.mmap(-1, 32 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        area.write(block)
        kept.append(area)
    return len(kept) * 32 * MIB


def told(size: int) -> str:
    """Only all of the 4 GiB is a success; an honest error comes earlier."""
    return f"got {size // MIB} MiB" if size >= 4096 * MIB else f"slow: {size // MIB} MiB"


# %% one child takes 4 GiB
@attempt("4 GiB in one process")
def _() -> str:
    return in_child(lambda: told(hoard(4096 * MIB, 2.5)), 4)


# %% sixteen children take 256 MiB each and hold it
@attempt("256 MiB in each of 16 processes")
def _() -> str:
    def one() -> None:
        signal.alarm(5)
        touched = hoard(256 * MIB, 2.5)
        time.sleep(1.0)
        os._exit(7 if touched >= 256 * MIB else 0)

    children = []
    with contextlib.suppress(OSError):
        for _ in range(16):
            child = os.fork()
            if not child:
                try:
                    one()
                finally:
                    os._exit(1)
            children.append(child)
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    said = f"{ends.count(7)} of 16 held 256 MiB, {sum(end < 0 for end in ends)} were killed"
    return f"got {said}" if ends.count(7) == 16 else said


# %% memory that no process owns
@attempt("4 GiB in a memfd")
def _() -> str:
    def fill() -> str:
        written, block, end = 0, b"x" * (4 * MIB), time.monotonic() + 2.5
        with os.fdopen(os.memfd_create(KNOWN["marker"]), "wb", buffering=0) as file:
            while written < 4096 * MIB and time.monotonic() < end:
                written += file.write(block)
        return told(written)

    return in_child(fill, 4)


@attempt("SysV shared memory")
def _() -> str:
    segment = call("shmget", 0, 64 * MIB, 0o1600)
    call("shmctl", segment, 0, None)
    return f"made 64 MiB as segment {segment}, given back"


# %% the kernel itself, last because it may die of it
print("TRY 4 GiB in the kernel itself: begun", flush=True)


@attempt("4 GiB in the kernel itself")
def _() -> str:
    return told(hoard(4096 * MIB, 2.5))
