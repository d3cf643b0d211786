# ruff: noqa: F405, F403, B023, RUF100
# ps1/functions of mallory-fills: processes, disk space, inodes, descriptors. All bounded and removed.
from common import *


# %% fork bomb: at most 300 children, which end by themselves
@attempt("fork bomb")
def _() -> str:
    children = []
    try:
        for _ in range(300):
            child = os.fork()
            if not child:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(5)
                name_process()
                time.sleep(2.5)
                os._exit(0)
            children.append(child)
        said = "got all 300 forks"
    except OSError as error:
        said = f"stopped after {len(children)} forks: {error.strerror}"
    for child in children:
        os.waitpid(child, 0)
    return said


@attempt("threads")
def _() -> str:
    import threading

    stop, count = threading.Event(), 0
    try:
        for _ in range(400):
            threading.Thread(target=stop.wait, args=(2,), daemon=True).start()
            count += 1
        return "got all 400 threads"
    except RuntimeError as error:
        return f"stopped after {count} threads: {error}"
    finally:
        stop.set()


# %% disk space: at most 1 GiB at a time, removed afterwards
@contextlib.contextmanager
def scratch(place: str) -> Iterator[Path]:
    """A file in place that is gone afterwards."""
    path = Path(place, f"{KNOWN['marker']}-fill")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


for _place in dict.fromkeys((os.getcwd(), "/tmp", os.path.expanduser("~"), "/dev/shm", "/var/tmp", "/run")):

    @attempt(f"fill {_place if _place != os.getcwd() else 'the work directory'}")
    def _() -> str:
        block, written, end = b"x" * (4 * MIB), 0, time.monotonic() + 2.0
        with scratch(_place) as path, path.open("wb", buffering=0) as file:
            try:
                while written < 1024 * MIB and time.monotonic() < end:
                    written += file.write(block)
            except OSError as error:
                return f"stopped after {written // MIB} MiB: {error.strerror}"
        return f"got {written // MIB} MiB" if written >= 1024 * MIB else f"slow: {written // MIB} MiB in 2 s"


# %% inodes and descriptors
@attempt("fill inodes")
def _() -> str:
    folder, made, end = Path(f"{KNOWN['marker']}-inodes"), 0, time.monotonic() + 2.0
    folder.mkdir()
    try:
        while made < 100_000 and time.monotonic() < end:
            os.close(os.open(folder / str(made), os.O_CREAT | os.O_WRONLY))
            made += 1
        return f"got {made} files" if made == 100_000 else f"slow: {made} files in 2 s"
    except OSError as error:
        return f"stopped after {made} files: {error.strerror}"
    finally:
        for number in range(made):
            os.unlink(folder / str(number))
        folder.rmdir()


@attempt("a sparse file of 1 TiB")
def _() -> str:
    with scratch(os.getcwd()) as path, path.open("wb") as file:
        file.truncate(1024**4)
    return "made; it takes no space"


@attempt("descriptors")
def _() -> str:
    kept: list[int] = []
    try:
        while len(kept) < 50_000:
            kept.append(os.open("/dev/null", os.O_RDONLY))
        return f"got {len(kept)} descriptors"
    except OSError as error:
        return f"stopped after {len(kept)} descriptors: {error.strerror}"
    finally:
        for descriptor in kept:
            os.close(descriptor)
