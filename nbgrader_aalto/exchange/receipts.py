"""Receipts: what a student handed in, when, and whether the course has it.

A receipt is given at submit, *unconfirmed*: the student's own word. Whoever takes the submission into the vault puts
a *confirmed* one into the student's box, with the time of the file server. What makes it more than a text is its
owner: in a box nobody but the student and the course's instructors can make a file, and students cannot give
files away. It is no signature: the students' machine holds no key that they could not use themselves. The
vault decides.
"""

import dataclasses
import json
from typing import Any

from nbgrader_aalto.trees import FileEntry, digest_of

UNCONFIRMED, CONFIRMED = "unconfirmed", "confirmed"
FILE = "receipt.json"
"""Its name in the student's local record of a submission."""

MAX_BYTES = 4_000_000


class ReceiptError(ValueError):
    """Not a receipt."""


@dataclasses.dataclass(frozen=True)
class Receipt:
    """`name` is the submission's in inbound; `time` is a timestamp as nbgrader writes them; `digest` is of `files`."""

    status: str
    course: str
    assignment: str
    student: str
    name: str
    time: str
    digest: str
    files: tuple[FileEntry, ...]
    confirmed_by: str = ""
    note: str = ""

    def to_json(self) -> bytes:
        """As it lies in a file."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=True).encode() + b"\n"


def parse_receipt(raw: bytes) -> Receipt:
    """Raises `ReceiptError` for anything but a receipt whose digest is that of its list of files."""
    try:
        fields: dict[str, Any] = json.loads(raw)
        files = tuple(FileEntry(str(f["path"]), int(f["size"]), str(f["sha256"])) for f in fields.pop("files"))
        known = {field.name for field in dataclasses.fields(Receipt)}
        receipt = Receipt(files=files, **{key: str(value) for key, value in fields.items() if key in known})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ReceiptError(f"this is not a receipt ({type(error).__name__}: {error})") from error
    if receipt.status not in (UNCONFIRMED, CONFIRMED) or digest_of(receipt.files) != receipt.digest:
        raise ReceiptError("this receipt has been changed: its digest is not that of its list of files")
    return receipt


def differences(receipt: Receipt, files: tuple[FileEntry, ...]) -> list[str]:
    """How these files differ from those of the receipt, a line each; empty if they are the same."""
    told, found = {f.path: f for f in receipt.files}, {f.path: f for f in files}
    return (
        [f"{path}: missing" for path in sorted(told.keys() - found.keys())]
        + [f"{path}: not in the receipt" for path in sorted(found.keys() - told.keys())]
        + [f"{p}: has changed" for p in sorted(told.keys() & found.keys()) if told[p].sha256 != found[p].sha256]
    )
