"""`nbgrader-aalto receipt verify`: is a receipt confirmed, and are the files still those that were handed in?"""

import contextlib
import enum
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nbgrader_aalto import trees
from nbgrader_aalto.exchange.boxes import OwnBoxes
from nbgrader_aalto.exchange.people import People
from nbgrader_aalto.exchange.receipts import CONFIRMED, FILE, Receipt, ReceiptError, differences, parse_receipt
from nbgrader_aalto.exchange.vault import Vault

_NO_LIMITS = trees.TreeLimits(1 << 62, 1 << 62, 1 << 62, 256)


class State(enum.Enum):
    """What can be said of a receipt."""

    CONFIRMED = "confirmed"
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


def verify(path: Path, boxes: OwnBoxes | None, vault: Vault | None, people: People) -> Verdict:
    """Judge a receipt (a file), or a local record of a submission (a directory with a receipt and the files).

    A student's `boxes` hold confirmed receipts, which count by their owner; an instructor has the `vault` instead.
    """
    file = path / FILE if path.is_dir() else path
    try:
        receipt = parse_receipt(file.read_bytes())
    except OSError as error:
        return Verdict(State.WRONG, f"{path}: {error.strerror}")
    except ReceiptError as error:
        return Verdict(State.WRONG, f"{file}: {error}")
    name = f"{receipt.course} {receipt.assignment} {receipt.time}"
    changed = differences(receipt, _files(path)) if path.is_dir() else []
    if changed:
        return Verdict(State.WRONG, f"{name}: the files are not those of the receipt: {'; '.join(changed[:10])}")
    found = _in_vault(receipt, vault) if vault else _in_boxes(receipt, boxes, people)
    return Verdict(found.state, f"{name}: {found.words}")


def _files(directory: Path) -> tuple[trees.FileEntry, ...]:
    with trees.opened(directory) as opened:
        entries = trees.list_files(opened, _NO_LIMITS)
    return tuple(entry for entry in entries if entry.path != FILE)


def _in_vault(receipt: Receipt, vault: Vault) -> Verdict:
    records = [record for record in vault.records(receipt.assignment) if record.name == receipt.name]
    for record in records:
        if record.digest == receipt.digest and record.student == receipt.student:
            return Verdict(State.CONFIRMED, f"confirmed: it is in {record.directory}")
    if records:
        return Verdict(State.WRONG, f"the course has other files under this name, in {records[-1].directory}")
    return Verdict(State.UNCONFIRMED, "unconfirmed: the vault has no such submission")


def _in_boxes(receipt: Receipt, boxes: OwnBoxes | None, people: People) -> Verdict:
    uid, raw = (boxes.receipts() if boxes else {}).get(receipt.name, (os.geteuid(), b""))
    if not raw:
        return Verdict(State.UNCONFIRMED, "unconfirmed: not collected yet, or the receipt has not arrived in your box")
    if uid != 0 and not people.is_instructor(uid):
        return Verdict(State.WRONG, f"the confirmation was not written by an instructor, but by uid {uid}")
    try:
        confirmed = parse_receipt(raw)
    except ReceiptError as error:
        return Verdict(State.WRONG, f"the confirmation in your box: {error}")
    if confirmed.status != CONFIRMED or confirmed.digest != receipt.digest:
        lines = differences(receipt, confirmed.files)
        return Verdict(State.WRONG, f"what was collected at {confirmed.time} differs: {'; '.join(lines[:10])}")
    note = f" ({confirmed.note})" if confirmed.note else ""
    return Verdict(State.CONFIRMED, f"confirmed by {confirmed.confirmed_by}, time {confirmed.time}{note}")


def worst(verdicts: Iterable[Verdict]) -> State:
    """Wrong before unconfirmed before confirmed."""
    states = {verdict.state for verdict in verdicts}
    return next((state for state in (State.WRONG, State.UNCONFIRMED) if state in states), State.CONFIRMED)
