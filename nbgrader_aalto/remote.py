"""Notebooks executed by a grading service instead of on this machine: the same bundle in, the same execution out.

The service's answer is not believed further than it has to be: outputs are taken into the notebook that was sent,
cell by cell, and nothing else of it.
"""

import copy
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import httpx
import nbformat
from nbformat import NotebookNode
from pydantic import ValidationError

from grader_service.client import GraderClient, ServiceError
from grader_service.schemas import JobView, Submission
from grader_service.token_file import TokenFileError, read_token_file
from isolate import outputs
from isolate.notebook import Execution, ExecutionReport, to_bytes
from isolate.policy import SandboxError
from nbgrader_aalto.orders import Stop

LAYER = "service"
"""Of the `SandboxError`s here."""
PATIENCE_SECONDS = 300.0
"""How long to try while the service does not answer, as when it is restarted."""


def connect(url: str, token_file: str, course_group: int | None, plain_http: bool) -> GraderClient:
    """A client with the token of this file, or else of this JupyterHub server.

    `course_group` is the group that may read the file besides its owner, None if the course has none. Raises
    `SandboxError`.
    """
    try:
        token = (
            read_token_file(Path(token_file), group=course_group)
            if token_file
            else os.environ.get("JUPYTERHUB_API_TOKEN", "")
        )
        if not token:
            raise ValueError("c.IsolatedExecute.service_token_file is not set, and this is no server of a JupyterHub")
        return GraderClient(url, token, patience_seconds=PATIENCE_SECONDS, plain_http_beyond_loopback=plain_http)
    except (TokenFileError, ValueError) as error:
        raise SandboxError(LAYER, str(error), "see docs/service-identity.md") from error


def execute(
    client: GraderClient,
    course: str,
    asked: Mapping[str, Any],
    notebook: NotebookNode,
    files: IO[bytes] | None,
    keep: IO[bytes] | None,
    tell: Callable[[JobView], None],
    stop: Stop | None = None,
) -> Execution:
    """Submit, wait, fetch; `tell` is called when the job changes. `asked` has the fields of a `Submission`.

    `keep` receives the work directory when the submission asks for it. A job that is given up (Ctrl-C, `stop`) is
    cancelled. Raises `SandboxError` whenever the service gives no score.
    """
    try:
        submission = Submission.model_validate(asked)
    except ValidationError as error:
        raise SandboxError("policy", f"the service takes no such job: {error}") from error
    try:
        job = client.submit(course, submission, to_bytes(notebook), files)
        try:
            with (stop or Stop()).by(lambda: _give_up(client, job.id)):
                job = client.wait(job.id, progress=tell)
        except BaseException:
            _give_up(client, job.id)
            raise
        if job.state != "done":
            raise SandboxError(LAYER, f"the job is {job.state}: {job.reason or 'no reason was given'} (job {job.id})")
        executed, report = client.notebook(job.id), client.report(job.id)
        if keep is not None and submission.keep_files:
            _fetch_files(client, job.id, keep)
    except ServiceError as error:
        raise SandboxError(LAYER, str(error), _REMEDIES.get(error.kind, "")) from error
    except (ValueError, httpx.HTTPError) as error:  # its words may hold the answer
        what = f"what answers at the service's address is no grading service: {type(error).__name__}"
        raise SandboxError(LAYER, what, _REMEDIES["unreachable"]) from error
    try:
        return Execution(_merged(notebook, executed), ExecutionReport.from_dict(report))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, nbformat.ValidationError) as error:
        raise SandboxError(LAYER, f"what job {job.id} gave is not the notebook that was sent: {error}") from error


_REMEDIES = {
    "unreachable": "check c.IsolatedExecute.service_url, and whether the service runs",
    "token": "make a new token with `grader-service token create`, or log in to the hub anew",
    "course": "check c.IsolatedExecute.service_course, and ask the service's administrator who may grade it",
    "policy": "ask for less in nbgrader_config.py, or the service's administrator for more",
    "quota": "wait, or ask the service's administrator",
}


_CANCEL_SECONDS = 5.0
"""Somebody pressed Ctrl-C, or the service has not answered for a long time already."""


def _give_up(client: GraderClient, job_id: str) -> None:
    try:
        client.cancel(job_id, patience_seconds=_CANCEL_SECONDS)
    except ServiceError:
        return  # it runs to its end, and nobody fetches it


def _fetch_files(client: GraderClient, job_id: str, keep: IO[bytes]) -> None:
    try:
        client.save_files(job_id, keep)
    except ServiceError as error:
        if error.status != 404:
            raise
        keep.seek(0)  # more than may be kept: the next notebook starts from what was submitted, as it does locally
        keep.truncate()


def _merged(sent: NotebookNode, answer: bytes) -> NotebookNode:
    """The notebook that was sent, with the outputs of the one that came back. Raises `ValueError`."""
    executed = nbformat.reads(answer.decode(), as_version=4)
    nbformat.validate(executed)
    if [_content(cell) for cell in executed.cells] != [_content(cell) for cell in sent.cells]:
        raise ValueError("its cells are others")
    merged = copy.deepcopy(sent)
    for cell, done in zip(merged.cells, executed.cells, strict=True):
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = done.outputs, done.execution_count
            if "execution" in done.metadata:
                cell.metadata["execution"] = done.metadata["execution"]
    if "language_info" in executed.metadata:
        merged.metadata["language_info"] = executed.metadata["language_info"]
    if outputs.is_widget_state(executed.metadata.get("widgets")):
        merged.metadata["widgets"] = executed.metadata["widgets"]
    return merged


def _content(cell: NotebookNode) -> tuple[str, str]:
    return cell.cell_type, cell.source


def words_of(job: JobView) -> str:
    """What a job is doing, for a log."""
    details: dict[str, Any] = {"queued": job.waiting, "running": f"attempt {job.attempts}" if job.attempts > 1 else ""}
    detail = details.get(job.state) or job.reason
    return f"{job.state}: {detail}" if detail else job.state
