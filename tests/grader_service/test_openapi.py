"""schemathesis against the OpenAPI document of a running service: no 5xx, no hang, answers as described."""

import subprocess
import sys
from pathlib import Path

import pytest

from service_host import COURSE, Host, free_port, hosting, notebook, submission

pytestmark = pytest.mark.slow

CHECKS = "not_a_server_error,content_type_conformance,response_schema_conformance,status_code_conformance,ignored_auth"
HOOKS = f"""
import schemathesis

@schemathesis.hook
def map_path_parameters(context, path_parameters):
    # Half of the requests are about things that exist; nobody would guess them.
    if path_parameters and "course" in path_parameters and len(path_parameters["course"]) % 2:
        path_parameters["course"] = {COURSE!r}
    if path_parameters and "job_id" in path_parameters and len(path_parameters["job_id"]) % 2:
        path_parameters["job_id"] = JOB
    return path_parameters
"""


def attack(host: Host, directory: Path, token: str | None, job_id: str) -> str:
    """Run it; its report. Fails if it finds anything."""
    here = str(directory)
    (directory / "hooks.py").write_text(HOOKS.replace("JOB", repr(job_id)))
    words = ["--url", host.url, "--checks", CHECKS, "--max-examples", "25", "--seed", "26", "--no-color"]
    words += ["--request-timeout", "90", "--phases", "examples,coverage,fuzzing", "--workers", "2"]
    words += ["--exclude-path-regex", "/events$"]  # a stream has no one body; test_service.py reads it
    words += ["--header", f"Authorization: Bearer {token}"] if token else []
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{host.url}/v1/openapi.json", *words]
    done = subprocess.run(
        command,
        cwd=directory,
        env={"SCHEMATHESIS_HOOKS": "hooks", "PATH": "/usr/bin:/bin", "HOME": here, "PYTHONPATH": here},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.threat(91, 94)
def test_whatever_is_sent_is_answered_as_described(tmp_path: Path) -> None:
    with hosting(port=free_port(), max_notebook="1M", max_bundle="2M") as host:
        host.start()
        token = host.token()
        with host.client(token) as client:
            job = client.wait(client.submit(COURSE, submission(), notebook("1")).id)
        said = attack(host, tmp_path, token, job.id)
        assert "Unresolvable" not in said, said
        with host.raw(token) as raw:
            assert raw.get("/v1/ready").status_code == 200
        assert '"level": "error"' not in host.log, host.log[-3000:]
