# ruff: noqa: F405, F403, RUF100
# ps1/text of mallory-escapes: kill whatever can be reached. Signals are sent only inside a PID namespace.
from common import *


# %% the parent
@attempt("kill the parent")
def _() -> str:
    if not boxed():
        return "failed: not tried outside a sandbox"
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(0.2)
    return f"sent; the parent is now {os.getppid()}"


# %% process 1
@attempt("kill process 1")
def _() -> str:
    if not boxed():
        return "failed: not tried outside a sandbox"
    os.kill(1, signal.SIGKILL)
    time.sleep(0.2)
    return "sent; this process lives on"


# %% everything
@attempt("kill everything")
def _() -> str:
    if not boxed():
        return "failed: not tried outside a sandbox"
    os.kill(-1, signal.SIGKILL)
    time.sleep(0.2)
    return "sent; this process lives on"
