"""The tables of the service: jobs, and the tokens of courses.

Times are seconds since the epoch (UTC), of the clock of the host that wrote them. What makes these tables in a real
database are the migrations; a test holds the two equal. Refuses to know in which order jobs run: see `jobs` for that.
"""

from typing import Any, Literal, cast, get_args

from sqlalchemy import JSON, BigInteger, CheckConstraint, Double, Index, Integer, MetaData, Table, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

Kind = Literal["interactive", "batch"]
State = Literal["queued", "running", "done", "failed", "cancelled"]
KINDS: tuple[Kind, ...] = get_args(Kind)
STATES: tuple[State, ...] = get_args(State)
ENDED: tuple[State, ...] = ("done", "failed", "cancelled")

_NAMES = {
    "pk": "pk_%(table_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
}
_Sequence = BigInteger().with_variant(Integer, "sqlite")
"""SQLite numbers rows only where the type is exactly INTEGER: sqlite.org/autoinc.html."""


def _one_of(column: str, words: tuple[str, ...]) -> CheckConstraint:
    return CheckConstraint(f"{column} IN ({', '.join(repr(word) for word in words)})", name=f"{column}_known")


class Base(DeclarativeBase):
    """The registry of the tables; `Base.metadata` is what the migrations arrive at."""

    metadata = MetaData(naming_convention=_NAMES)


class Job(Base):
    """One notebook to execute. The row is the truth; the files beside it are found by `id`.

    Read it, do not write to it: all changes go through `jobs.JobStore`.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        _one_of("kind", KINDS),
        _one_of("state", STATES),
        Index(None, "course", "idempotency_key", unique=True),
        # the head of each queue, running jobs of a course, and counts
        Index(None, "state", "course", "kind", "sequence"),
        # a course's newest jobs, for lists and quotas
        Index(None, "course", "sequence"),
        # when a course was served last, and what was started last
        Index(None, "course", "turn"),
        Index(None, "turn"),
        Index(None, "student"),
        Index(None, "keep_until"),
        {"sqlite_autoincrement": True},  # a number never comes back, so pages of a list stay what they are
    )

    sequence: Mapped[int] = mapped_column(_Sequence, primary_key=True, autoincrement=True)
    """Order of arrival."""
    id: Mapped[str] = mapped_column(Text, unique=True)
    """A random UUID."""
    course: Mapped[str] = mapped_column(Text)
    assignment: Mapped[str] = mapped_column(Text)
    student: Mapped[str] = mapped_column(Text)
    notebook: Mapped[str] = mapped_column(Text)
    kind: Mapped[Kind] = mapped_column(Text)
    submitter: Mapped[str] = mapped_column(Text)
    """A hub user's id, or `token:<id>`."""
    idempotency_key: Mapped[str | None] = mapped_column(Text)
    """Chosen by the client; unique in its course."""
    digest: Mapped[str] = mapped_column(Text)
    """SHA-256 of the request, hexadecimal."""
    asked: Mapped[dict[str, Any]] = mapped_column(JSON)
    """What the client asked for: kernel, limits, settings, cells to skip, timeouts."""
    memory_bytes: Mapped[int] = mapped_column(BigInteger)
    """What its sandboxes may take at most."""
    bundle_bytes: Mapped[int] = mapped_column(BigInteger)
    retention_seconds: Mapped[float] = mapped_column(Double)
    """How long it is kept after its end."""

    state: Mapped[State] = mapped_column(Text)
    reason: Mapped[str | None] = mapped_column(Text)
    """For people: why it failed, was cancelled, or is in the queue again."""
    attempts: Mapped[int] = mapped_column(Integer)
    """How often it was started."""
    turn: Mapped[int | None] = mapped_column(BigInteger)
    """The number of its last start, counted over all courses."""
    lease: Mapped[str | None] = mapped_column(Text)
    """Who runs it, or ended it: a random word of one attempt."""
    lease_until: Mapped[float | None] = mapped_column(Double)
    result: Mapped[str | None] = mapped_column(Text)
    """The lease whose files are the result."""
    submitted_at: Mapped[float] = mapped_column(Double)
    started_at: Mapped[float | None] = mapped_column(Double)
    """Its last start; of a queued job: of an attempt that came to nothing."""
    ended_at: Mapped[float | None] = mapped_column(Double)
    keep_until: Mapped[float | None] = mapped_column(Double)
    """When retention ends; set at the end of the job."""


class Token(Base):
    """A course's token. Only its digest is kept."""

    __tablename__ = "tokens"
    __table_args__ = (Index(None, "course"),)

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    course: Mapped[str] = mapped_column(Text)
    digest: Mapped[str] = mapped_column(Text)
    """SHA-256 of the secret, hexadecimal."""
    created_at: Mapped[float] = mapped_column(Double)
    expires_at: Mapped[float] = mapped_column(Double)
    revoked_at: Mapped[float | None] = mapped_column(Double)
    note: Mapped[str] = mapped_column(Text)
    created_by: Mapped[str] = mapped_column(Text)


JOBS, TOKENS = cast(Table, Job.__table__), cast(Table, Token.__table__)
"""The tables of the two, for statements that need no objects."""
