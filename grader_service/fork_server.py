"""Imported by multiprocessing's fork server and by nobody else: clears up after a service that was killed.

The server's socket lies in a temporary directory, which the service removes at its end if it has one. The fork server
outlives a killed service by a moment: multiprocessing/forkserver.py, `main`.
"""

import atexit
import os
import shutil
from multiprocessing import forkserver


@atexit.register
def _remove_directory() -> None:
    address = getattr(forkserver._forkserver, "_forkserver_address", None)
    directory = os.path.dirname(address) if isinstance(address, str) else ""
    if os.path.basename(directory).startswith("pymp-"):
        shutil.rmtree(directory, ignore_errors=True)
