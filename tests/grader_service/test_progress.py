"""Progress records: fixed in size, read on from where one was, and nothing but numbers."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from grader_service.progress import ProgressWriter, read


def test_what_is_written_is_read_on_from_where_one_was(tmp_path: Path) -> None:
    path = tmp_path / "progress"
    assert read(path, 0) == ([], 0)
    writer = ProgressWriter(path)
    writer(0, "started")
    events, offset = read(path, 0)
    assert (events, offset) == ([(0, "started")], 8)
    writer(0, "finished")
    writer(7, "started")
    writer(8, "a state that nobody knows")
    assert read(path, offset) == ([(0, "finished"), (7, "started")], 24)
    writer.close()
    assert path.stat().st_mode & 0o777 == 0o600


def test_half_a_record_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "progress"
    writer = ProgressWriter(path)
    writer(1, "started")
    writer.close()
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:5])
    assert read(path, 0) == ([(1, "started")], 8)
    assert read(path, 8) == ([], 8)


@given(st.binary(max_size=100))
def test_any_bytes_are_numbers_and_states_or_nothing(data: bytes) -> None:
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        events, offset = read(Path(file.name), 0)
    assert offset == len(data) // 8 * 8
    assert all(state in {"started", "finished"} and 0 <= index < 1 << 32 for index, state in events)
