"""A service whose jobs are short: everything is real but the sandbox, in whose place is a pause of milliseconds.

    python short.py CONFIG

For tests and benchmarks of the queue, where a thousand sandboxes would take too long. Each execution leaves one line
in `<data directory>/executed`, written at once, so that whoever counts sees what ran twice.
"""

import os
import sys
import time
from pathlib import Path

from grader_service.bundles import NOTEBOOK, Bundles
from grader_service.database import open_engine, retrying
from grader_service.jobs import JobStore
from grader_service.worker import Task


def run(task: Task) -> None:
    """What `worker.run` does, without the sandbox."""
    store, bundles = JobStore(open_engine(task.database_url)), Bundles(task.data_directory)
    if not retrying(lambda: store.holds(task.job_id, task.lease)):
        return
    line = f"{task.job_id} {task.lease}\n".encode()
    descriptor = os.open(task.data_directory / "executed", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(descriptor, line)
    os.close(descriptor)
    time.sleep(0.01)
    with bundles.make_result(task.job_id, task.lease) as result:
        (result / NOTEBOOK).write_bytes(bundles.bundle(task.job_id)[0].read_bytes())
    retrying(lambda: store.finish(task.job_id, task.lease, "done", "", result=True))


if __name__ == "__main__":
    from grader_service import serve  # not in every worker, which imports this file, too

    sys.exit(serve.serve(Path(sys.argv[1]), level="warning", run=run))
