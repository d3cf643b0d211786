"""What goes over the wire: jobs as clients ask for them and as they see them."""

import datetime
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

State = Literal["queued", "running", "done", "failed", "cancelled"]
ENDED: frozenset[str] = frozenset({"done", "failed", "cancelled"})
Kind = Literal["interactive", "batch"]

Name = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f/]+$")]
"""An assignment, a student, a notebook: any text without a slash or a control character."""
KernelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,100}$")]
_Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,99}$")]
_Word = Annotated[str, StringConstraints(max_length=4096, pattern=r"^[^\x00]*$")]
_Seconds = Annotated[float, Field(gt=0, le=7 * 86400)]
_CellIndex = Annotated[int, Field(ge=0, lt=100_000)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SettingsAsked(_Strict):
    """nbclient's settings of the same names; see `isolate.notebook.Settings`. Seconds."""

    timeout: _Seconds | None = 30
    interrupt_on_timeout: bool = True
    error_on_timeout: dict[str, Any] | None = Field(
        default=None, description="The error that a cell gets which did not end in time; not given: a CellTimeoutError."
    )
    iopub_timeout: Annotated[int, Field(ge=1, le=3600)] = 4
    startup_timeout: _Seconds = 60
    allow_errors: bool = True
    allow_error_names: Annotated[list[_Word], Field(max_length=100)] = Field(default_factory=list)
    force_raise_errors: bool = False
    store_widget_state: bool = True
    record_timing: bool = True
    coalesce_streams: bool = False

    @field_validator("error_on_timeout")
    @classmethod
    def _is_json(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        """NaN and Infinity, which parsers take, are no JSON, and PostgreSQL stores none. RFC 8259, 6"""
        json.dumps(value, allow_nan=False)
        return value


class Submission(_Strict):
    """The part `job` of a submission."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={
            "examples": [{"assignment": "ps1", "student": "aino", "notebook": "functions", "kind": "batch"}]
        },
    )

    assignment: Name
    student: Name
    notebook: Name
    kind: Kind = Field("interactive", description="Single re-grades go before batches; nothing waits for ever.")
    kernel: KernelName = Field("python3", description="A kernelspec of the course's environment.")
    kernel_arguments: Annotated[list[_Word], Field(max_length=64)] = Field(
        default_factory=list, description="Words that follow those of the kernelspec."
    )
    environment: Annotated[dict[_Variable, _Word], Field(max_length=64)] = Field(
        default_factory=dict, description="Variables for student code; those of the course's table win."
    )
    limits: Annotated[dict[str, float], Field(max_length=32)] = Field(
        default_factory=dict,
        description="Limits by name (memory_bytes, wall_seconds, ...); at most the course's maximum.",
        examples=[{"memory_bytes": 1073741824, "wall_seconds": 600}],
    )
    settings: SettingsAsked = SettingsAsked()
    skip: Annotated[list[_CellIndex], Field(max_length=10_000)] = Field(
        default_factory=list, description="Cells that are not executed, by index from 0."
    )
    timeouts: Annotated[dict[_CellIndex, _Seconds | None], Field(max_length=10_000)] = Field(
        default_factory=dict, description="Timeouts of single cells, by index."
    )
    keep_files: bool = Field(
        False, description="Whether the work directory is kept, for the assignment's next notebook."
    )

    @field_validator("limits")
    @classmethod
    def _finite(cls, value: dict[str, float]) -> dict[str, float]:
        for name, number in value.items():
            if not (math.isfinite(number) and 0 < number < 1 << 62):
                raise ValueError(f"the limit {name[:50]!r} must be a positive number")
        return value


class JobView(BaseModel):
    """A job as its course's graders see it."""

    id: str = Field(examples=["0b8ba1de-9d1c-4c2a-9f0c-3f0c1f7c1d11"])
    course: str
    assignment: str
    student: str
    notebook: str
    kind: Kind
    submitter: str
    state: State
    reason: str = Field(description="Why it failed, was cancelled, or goes around once more.")
    waiting: str = Field("", description="Why a queued job does not run yet.")
    attempts: int
    submitted_at: datetime.datetime
    started_at: datetime.datetime | None
    ended_at: datetime.datetime | None

    @classmethod
    def of(cls, job: Any, waiting: str = "") -> "JobView":
        """From a row."""
        names = ("id", "course", "assignment", "student", "notebook", "kind", "submitter", "state", "attempts")
        times = {name: _time(getattr(job, name)) for name in ("submitted_at", "started_at", "ended_at")}
        values = {name: getattr(job, name) for name in names}
        return cls.model_validate({**values, **times, "reason": job.reason or "", "waiting": waiting})


class JobPage(BaseModel):
    """Some jobs, newest first; `next` goes into `after` of the next request."""

    jobs: list[JobView]
    next: str | None


class CourseView(BaseModel):
    """A course that the caller may grade, and the most that a job of it may ask for."""

    name: str
    limits: Mapping[str, float]
    maximum: Mapping[str, float]


def _time(seconds: float | None) -> datetime.datetime | None:
    return None if seconds is None else datetime.datetime.fromtimestamp(seconds, datetime.UTC)
