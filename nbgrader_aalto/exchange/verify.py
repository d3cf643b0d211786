"""`nbgrader-aalto receipt verify`: is a receipt confirmed, and are the files still those that were handed in?"""

import contextlib
import enum
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from nbgrader_aalto import trees
from nbgrader_aalto.exchange.boxes import OwnBoxes
from nbgrader_aalto.exchange.names import assignment_problem, student_problem
from nbgrader_aalto.exchange.people import People
from nbgrader_aalto.exchange.receipts import CONFIRMED, FILE, Receipt, ReceiptError, differences, parse_receipt
from nbgrader_aalto.exchange.stamps import parse_time
from nbgrader_aalto.exchange.vault import Record, Vault

_NO_LIMITS = trees.TreeLimits(1 << 62, 1 << 62, 1 << 62, 256)


class State(enum.Enum):
    """What can be said of a receipt."""

    CONFIRMED = "confirmed"
    UNPROVED = "unproved"
    """Confirmed, if that can be believed where everybody has one uid."""
    UNCONFIRMED = "unconfirmed"
    WRONG = "wrong"


@dataclass(frozen=True)
class Verdict:
    """About one receipt, in words."""

    state: State
    words: str


def own_records(cache: Path, course: str) -> list[Path]:
    """The local records of what one submitted to a course, oldest first."""
    with contextlib.suppress(OSError):
        return sorted(path for path in (cache / course).iterdir() if (path / FILE).is_file())
    return []


@dataclass(frozen=True)
class Judges:
    """What a receipt is compared with.

    A student's `boxes` hold confirmed receipts, which count by their owner; an instructor has the `vault` instead, and
    `label`, the official timestamp of a record. With `by_owner` False, everybody has one uid.
    """

    boxes: OwnBoxes
    vault: Vault | None
    people: People
    label: Callable[[Record], str]
    by_owner: bool = True


def verify(path: Path, judges: Judges) -> Verdict:
    """Judge a receipt (a file), or a local record of a submission (a directory with a receipt and the files).

    A receipt may come from a student: of what stands in it, nothing is repeated as true but what was compared.
    """
    file = path / FILE if path.is_dir() else path
    try:
        receipt = parse_receipt(file.read_bytes())
    except OSError as error:
        return Verdict(State.WRONG, f"{path}: {error.strerror}")
    except ReceiptError as error:
        return Verdict(State.WRONG, f"{file}: {error}")
    name = f"{receipt.course} {receipt.assignment}"
    if problem := assignment_problem(receipt.assignment) or student_problem(receipt.student):
        return Verdict(State.WRONG, f"{name}: no such receipt was ever given: {problem}")
    changed = differences(receipt, _files(path)) if path.is_dir() else []
    if changed:
        return Verdict(State.WRONG, f"{name}: the files are not those of the receipt: {'; '.join(changed[:10])}")
    found = _in_vault(receipt, judges.vault, judges) if judges.vault else _in_boxes(receipt, judges)
    return Verdict(found.state, f"{name}: {found.words}")


def _files(directory: Path) -> tuple[trees.FileEntry, ...]:
    with trees.opened(directory) as opened:
        entries = trees.list_files(opened, _NO_LIMITS)
    return tuple(entry for entry in entries if entry.path != FILE)


def _in_vault(receipt: Receipt, vault: Vault, judges: Judges) -> Verdict:
    records = [record for record in vault.records(receipt.assignment) if record.name == receipt.name]
    for record in records:
        if record.digest == receipt.digest and record.student == receipt.student:
            time = judges.label(record)
            if receipt.status == CONFIRMED and not _is_same_moment(receipt.time, time):
                return Verdict(State.WRONG, f"the receipt says {receipt.time}, but the course has it from {time}")
            return Verdict(State.CONFIRMED, f"confirmed: time {time}, it is in {record.directory}")
    if records:
        return Verdict(State.WRONG, f"the course has other files under this name, in {records[-1].directory}")
    return Verdict(
        State.UNCONFIRMED, f"unconfirmed: the vault has no such submission (the receipt says {receipt.time})"
    )


def _is_same_moment(one: str, other: str) -> bool:
    try:
        return parse_time(one) == parse_time(other)
    except (ValueError, OverflowError):
        return False


def _in_boxes(receipt: Receipt, judges: Judges) -> Verdict:
    uid, raw = judges.boxes.receipts().get(receipt.name, (os.geteuid(), b""))
    if not raw:
        return Verdict(
            State.UNCONFIRMED,
            f"unconfirmed, handed in at {receipt.time}: not collected yet, or the receipt has not arrived in your box",
        )
    if judges.by_owner and uid != 0 and not judges.people.is_instructor(uid):
        return Verdict(State.WRONG, f"the confirmation was not written by an instructor, but by uid {uid}")
    try:
        confirmed = parse_receipt(raw)
    except ReceiptError as error:
        return Verdict(State.WRONG, f"the confirmation in your box: {error}")
    if confirmed.status != CONFIRMED or _submission(confirmed) != _submission(receipt):
        return Verdict(State.WRONG, "the confirmation in your box is of another submission")
    if confirmed.digest != receipt.digest:
        lines = differences(receipt, confirmed.files)
        return Verdict(State.WRONG, f"what was collected at {confirmed.time} differs: {'; '.join(lines[:10])}")
    words = f"confirmed by {confirmed.confirmed_by}, time {confirmed.time}"
    words += f" ({confirmed.note})" if confirmed.note else ""
    if judges.by_owner:
        return Verdict(State.CONFIRMED, words)
    return Verdict(
        State.UNPROVED,
        f"{words}, says the confirmation in your box; but everybody has one uid here, and could have written it. The "
        "course's vault decides: an instructor runs this of your receipt",
    )


def _submission(receipt: Receipt) -> tuple[str, str, str, str]:
    return receipt.course, receipt.assignment, receipt.student, receipt.name


def worst(verdicts: Iterable[Verdict]) -> State:
    """Wrong before unconfirmed before unproved before confirmed."""
    states = {verdict.state for verdict in verdicts}
    order = (State.WRONG, State.UNCONFIRMED, State.UNPROVED)
    return next((state for state in order if state in states), State.CONFIRMED)
