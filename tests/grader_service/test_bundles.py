"""Files of jobs: complete under their final names, private, and gone when they should be."""

import contextlib
import os
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from attacks.harness import eventually
from grader_service.bundles import Bundles, is_job_id

LEASE = "0123456789abcdef"
KNOWN = "0b8ba1de-9d1c-4c2a-9f0c-3f0c1f7c1d11"
"""A name that is one, for tests that change it; names of tests are the same in every worker."""


@pytest.fixture
def bundles(tmp_path: Path) -> Bundles:
    return Bundles(tmp_path / "data ä")


def admitted(bundles: Bundles) -> str:
    job_id = str(uuid.uuid4())
    with bundles.upload() as received:
        (received / "notebook").write_bytes(b"{}")
        (received / "files").write_bytes(b"tar")
        bundles.admit(received, job_id)
    return job_id


def everything(bundles: Bundles, tmp_path: Path) -> list[str]:
    return sorted(str(path.relative_to(tmp_path / "data ä")) for path in (tmp_path / "data ä").rglob("*"))


def test_what_was_received_becomes_a_bundle(bundles: Bundles, tmp_path: Path) -> None:
    job_id = admitted(bundles)
    notebook, files = bundles.bundle(job_id)
    assert notebook.read_bytes() == b"{}"
    assert files is not None
    assert files.read_bytes() == b"tar"
    assert bundles.ids() == [job_id]
    assert os.listdir(tmp_path / "data ä/incoming") == []


def test_only_the_service_may_look(bundles: Bundles, tmp_path: Path) -> None:
    job_id = admitted(bundles)
    with bundles.make_result(job_id, LEASE) as result:
        (result / "notebook.ipynb").write_bytes(b"{}")
    for path in (tmp_path / "data ä").rglob("*"):
        if path.is_dir():
            assert path.stat().st_mode & 0o077 == 0, path


def test_an_upload_that_fails_leaves_nothing(bundles: Bundles, tmp_path: Path) -> None:
    def fails() -> None:
        with bundles.upload() as received:
            (received / "notebook").write_bytes(b"{}")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert everything(bundles, tmp_path) == ["incoming", "jobs"]


def test_a_result_is_complete_or_absent(bundles: Bundles, tmp_path: Path) -> None:
    job_id = admitted(bundles)

    def fails() -> None:
        with bundles.make_result(job_id, LEASE) as result:
            (result / "notebook.ipynb").write_bytes(b"half")
            assert not bundles.result(job_id, LEASE).exists()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert not bundles.result(job_id, LEASE).exists()
    with bundles.make_result(job_id, LEASE) as result:
        (result / "notebook.ipynb").write_bytes(b"whole")
    assert (bundles.result(job_id, LEASE) / "notebook.ipynb").read_bytes() == b"whole"


def test_after_the_end_only_the_result_stays(bundles: Bundles) -> None:
    job_id = admitted(bundles)
    for lease in (LEASE, "fedcba9876543210"):
        bundles.progress(job_id, lease).write_bytes(b"")
        with bundles.make_result(job_id, lease):
            pass
    bundles.forget_all_but(job_id, LEASE)
    directory = bundles.result(job_id, LEASE).parent
    assert sorted(os.listdir(directory)) == [f"progress-{LEASE}", f"result-{LEASE}"]
    bundles.forget_all_but(job_id, None)
    assert os.listdir(directory) == []
    assert bundles.remove(job_id)
    assert not bundles.remove(job_id)
    bundles.forget_all_but(job_id, None)  # of a job that is gone, nothing


def test_the_sweep_takes_what_nobody_knows_and_is_old(bundles: Bundles, tmp_path: Path) -> None:
    known, forgotten, fresh = (admitted(bundles) for _ in range(3))
    left = tmp_path / "data ä/incoming" / ("0" * 32)
    left.mkdir()
    for path in (left, *(bundles.bundle(job_id)[0].parent for job_id in (known, forgotten))):
        os.utime(path, (1, 1))
    assert bundles.sweep([known], older_than_seconds=3600) == 2
    assert sorted(bundles.ids()) == sorted([known, fresh])
    assert not left.exists()


def test_an_upload_of_hours_is_no_orphan(bundles: Bundles, tmp_path: Path) -> None:
    """Neither while it comes, nor before its row is there: the directory is older than its last byte."""
    job_id = str(uuid.uuid4())
    with bundles.upload() as received:
        (received / "notebook").write_bytes(b"{}")
        os.utime(received, (1, 1))
        assert bundles.sweep([], older_than_seconds=3600) == 0
        bundles.admit(received, job_id)
    assert bundles.sweep([], older_than_seconds=3600) == 0
    assert bundles.bundle(job_id)[0].read_bytes() == b"{}"


def test_removing_is_not_kept_from_it_by_a_worker_that_still_writes(bundles: Bundles) -> None:
    stop = threading.Event()

    def write(directory: Path) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            with contextlib.suppress(FileNotFoundError, FileExistsError):
                directory.mkdir(exist_ok=True)
                (directory / str(number)).write_bytes(b"")

    ids = [admitted(bundles) for _ in range(30)]
    for job_id in ids:
        stop.clear()
        result = bundles.result(job_id, LEASE)
        writer = threading.Thread(target=write, args=(result,))
        writer.start()
        try:
            assert eventually(result.exists, 30)
            assert bundles.remove(job_id)
        finally:
            stop.set()
            writer.join()
    assert bundles.ids() == []


def test_of_two_who_remove_one_does(bundles: Bundles) -> None:
    ids = [admitted(bundles) for _ in range(300)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: [bundles.remove(job_id) for job_id in ids], range(2)))
    assert [one + other for one, other in zip(*found, strict=True)] == [1] * len(ids)


@pytest.mark.threat(94)
@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "/etc", KNOWN.upper(), f"{KNOWN}\n", "٣" * 36])
def test_no_other_text_is_the_name_of_a_directory(bundles: Bundles, name: str) -> None:
    assert not is_job_id(name)
    for call in (bundles.remove, bundles.bundle):
        with pytest.raises(ValueError):
            call(name)
    with pytest.raises(ValueError):
        bundles.result(str(uuid.uuid4()), f"{name}/../../x")
