"""The administrator's TOML file: which courses there are, and how the service runs.

`load` reads and examines it on the machine where the service is to run; what is wrong with it is said all at once,
each with its line. The values can also be made without a file, and then nothing is looked for on the disk. They are
frozen: whoever holds them holds them as they were when they were read. docs/service-configuration.md is the reference.

The file is the one source. pydantic-settings would also take values from the environment and from `.env`, where a
PORT or a MEMORY that was meant for something else may lie; that is switched off.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import sqlalchemy
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from grader_service import configuration, examination, machine
from grader_service.configuration import ConfigurationError, Faults, Mistake
from grader_service.values import AbsolutePath, CourseName, Duration, Name, Seconds, Size, Text, Variable, is_loopback
from isolate.policy import Limits

DAY = 86_400.0


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class LimitsTable(_Table):
    """Fields of `isolate.policy.Limits`, as far as they are given."""

    wall_seconds: Seconds | None = None
    cpu_seconds: Seconds | None = None
    memory_bytes: Size | None = None
    processes: Annotated[int, Field(gt=0)] | None = None
    files_bytes: Size | None = None
    files_count: Annotated[int, Field(gt=0)] | None = None
    open_files: Annotated[int, Field(gt=0)] | None = None
    cell_output_bytes: Size | None = None
    output_bytes: Size | None = None

    def over(self, base: Limits) -> Limits:
        """`base` with what is given here in its place."""
        return dataclasses.replace(base, **self.model_dump(exclude_none=True))


class GradersTable(_Table):
    """Who may grade a course."""

    users: list[Name] = Field(default_factory=list)
    hub_groups: list[Name] = Field(default_factory=list)
    unix_groups: list[Name] = Field(default_factory=list)
    tokens_only: bool = False

    @model_validator(mode="after")
    def _somebody(self) -> "GradersTable":
        named = bool(self.users or self.hub_groups or self.unix_groups)
        if not named and not self.tokens_only:
            raise ValueError("name users, hub_groups or unix_groups, or set tokens_only = true")
        if named and self.tokens_only:
            raise ValueError("tokens_only = true, and yet users or groups are named; keep one of the two")
        return self


class CourseSettings(_Table):
    """One course: what its students' code runs in, and who may have it run."""

    image_root: AbsolutePath | None = None
    environment: AbsolutePath
    """A prefix on the host; inside of the image if there is an `image_root`."""
    kernels: dict[Name, Annotated[list[Text], Field(min_length=1)]] = Field(default_factory=dict)
    """Kernels that the environment has no kernelspec for, or another one: name -> argv."""
    read_only: list[AbsolutePath] = Field(default_factory=list)
    environment_variables: dict[Variable, Text] = Field(default_factory=dict)
    tier: Literal["namespaces", "landlock"] = "namespaces"
    limits: LimitsTable = LimitsTable()
    maximum: LimitsTable = LimitsTable()
    graders: GradersTable
    concurrent_jobs: Annotated[int, Field(ge=0)] = 0
    daily_quota: Annotated[int, Field(ge=0)] = 0
    retention: Duration = 7 * DAY
    """Seconds that results are kept."""

    @property
    def default_limits(self) -> Limits:
        """What a job gets that asks for nothing."""
        return self.limits.over(Limits())

    @property
    def maximum_limits(self) -> Limits:
        """What a job may ask for."""
        return self.maximum.over(self.default_limits)

    @field_validator("image_root")
    @classmethod
    def _examine_image(cls, value: Path | None) -> Path | None:
        if value is not None and examination.current():
            examination.image_root(value)
        return value

    @field_validator("environment")
    @classmethod
    def _examine_environment(cls, value: Path, info: ValidationInfo) -> Path:
        if examination.current() and "image_root" in info.data:
            examination.environment(value, info.data["image_root"])
        return value

    @field_validator("kernels")
    @classmethod
    def _examine_kernels(cls, value: dict[str, list[str]], info: ValidationInfo) -> dict[str, list[str]]:
        if examination.current() and {"image_root", "environment"} <= info.data.keys():
            Faults.check(examination.kernels(value, info.data["environment"], info.data["image_root"]))
        return value

    @field_validator("read_only")
    @classmethod
    def _examine_read_only(cls, value: list[Path], info: ValidationInfo) -> list[Path]:
        if examination.current() and "image_root" in info.data:
            Faults.check(examination.read_only(value, info.data["image_root"]))
        return value

    @field_validator("tier")
    @classmethod
    def _fits_image(cls, value: str, info: ValidationInfo) -> str:
        if value == "landlock" and info.data.get("image_root") is not None:
            raise ValueError("the landlock tier has no mounts and cannot show an image; use 'namespaces'")
        return value

    @field_validator("maximum")
    @classmethod
    def _not_below_default(cls, value: LimitsTable, info: ValidationInfo) -> LimitsTable:
        if "limits" in info.data:
            default = dataclasses.asdict(info.data["limits"].over(Limits()))
            Faults.check(
                ((name,), f"is {_amount(name, most)}, below the course's default of {_amount(name, default[name])}")
                for name, most in value.model_dump(exclude_none=True).items()
                if most < default[name]
            )
        return value

    @model_validator(mode="after")
    def _examine_whole(self) -> "CourseSettings":
        if examination.current():
            table = "limits" if self.maximum.memory_bytes is None else "maximum"
            faults = [
                *examination.visible(self.environment, self.image_root, self.read_only),
                *examination.memory((table, "memory_bytes"), self.maximum_limits.memory_bytes),
            ]
            Faults.check(faults)
        return self


class ListenSettings(_Table):
    """Where the service answers."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8970
    unix_socket: AbsolutePath | None = None
    tls_certificate: AbsolutePath | None = None
    tls_key: AbsolutePath | None = None
    plain_http_beyond_loopback: bool = False

    @model_validator(mode="after")
    def _closed(self) -> "ListenSettings":
        Faults.check(self._faults())
        return self

    def _faults(self) -> list[examination.Fault]:
        found: list[examination.Fault] = []
        tls = self.tls_certificate is not None and self.tls_key is not None
        if (self.tls_certificate is None) != (self.tls_key is None):
            given = "tls_key" if self.tls_certificate is None else "tls_certificate"
            found.append(((given,), "tls_certificate and tls_key are only of use together"))
        elif not (tls or self.unix_socket or is_loopback(self.host) or self.plain_http_beyond_loopback):
            reason = f"{self.host} is not loopback, where tokens and grades would travel in the open"
            found.append((("host",), f"{reason}; set tls_certificate and tls_key, or plain_http_beyond_loopback"))
        if examination.current():
            found += examination.listening(self.unix_socket, self.tls_certificate, self.tls_key)
        return found


class HubSettings(_Table):
    """The JupyterHub whose users grade here."""

    api_url: str
    token_file: AbsolutePath
    cache_seconds: Annotated[float, Field(ge=0, le=60)] = 30
    """How long an answer of the hub is believed. A removed instructor stops working within it."""

    @field_validator("api_url")
    @classmethod
    def _url(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment:
            raise ValueError("should be the URL of the hub's API, such as http://127.0.0.1:8081/hub/api")
        if parts.username is not None:
            raise ValueError("should not hold a password; the token goes into token_file")
        return value.rstrip("/")

    @field_validator("token_file")
    @classmethod
    def _examine_token(cls, value: Path) -> Path:
        if examination.current():
            examination.keep_secret(value, "hub.token_file")
            examination.secret_file(value)
        return value


class Settings(BaseSettings):
    """Everything that the administrator decides."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", strict=True, case_sensitive=True)

    data_directory: AbsolutePath
    database_url: str = ""
    listen: ListenSettings = ListenSettings()
    cores: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(default_factory=machine.processors)
    memory: Size = Field(default_factory=lambda: machine.memory_bytes() * 8 // 10)
    """Bytes, for all sandboxes together."""
    max_attempts: Annotated[int, Field(ge=1)] = 3
    lease_seconds: Seconds = 30
    ageing_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 600
    max_bundle: Size = 256 << 20
    max_notebook: Size = 16 << 20
    hub: HubSettings | None = None
    courses: dict[CourseName, CourseSettings] = Field(default_factory=dict)

    @property
    def memory_bytes(self) -> int:
        """Of all sandboxes together."""
        return self.memory

    @property
    def slots(self) -> int:
        """How many jobs may run at a time."""
        return max(1, int(self.cores))

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what is given, and so only the file."""
        return (init_settings,)

    @field_validator("data_directory")
    @classmethod
    def _examine_data(cls, value: Path) -> Path:
        if examination.current():
            examination.keep_secret(value, "data_directory")
            examination.data_directory(value)
        return value

    @field_validator("memory")
    @classmethod
    def _for_courses(cls, value: int) -> int:
        if examined := examination.current():
            examined.memory_bytes = value
        return value

    @field_validator("database_url")
    @classmethod
    def _database(cls, value: str, info: ValidationInfo) -> str:
        if not value:
            directory = info.data.get("data_directory", Path("/"))
            url = sqlalchemy.URL.create("sqlite", database=str(directory / "service.db"))
        else:
            url = _database_url(value)
        if (examined := examination.current()) and url.password and examined.readable_by_all:
            raise ValueError("holds a password, and everybody may read this file; chmod o-r")
        if url.drivername == "sqlite":
            examination.keep_secret(Path(url.database or "/"), "the database")
        return url.render_as_string(hide_password=False)

    @field_validator("max_notebook")
    @classmethod
    def _fits_bundle(cls, value: int, info: ValidationInfo) -> int:
        if value > info.data.get("max_bundle", value):
            raise ValueError("is more than max_bundle, of which the notebook is a part")
        return value

    @field_validator("hub")
    @classmethod
    def _encrypted(cls, value: HubSettings | None, info: ValidationInfo) -> HubSettings | None:
        if value is not None and "listen" in info.data and not info.data["listen"].plain_http_beyond_loopback:
            parts = urlsplit(value.api_url)
            if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
                reason = "is plain HTTP beyond loopback, where the service's token would travel in the open"
                raise Faults([(("api_url",), f"{reason}; use https, or set listen.plain_http_beyond_loopback")])
        return value


def _amount(limit: str, value: float) -> str:
    return f"{value / 2**20:g} MiB" if limit.endswith("_bytes") else f"{value:g}"


def _database_url(text: str) -> sqlalchemy.URL:
    """Errors do not repeat the text, which may hold a password."""
    try:
        url = sqlalchemy.make_url(text)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise ValueError("should be a URL, such as postgresql+psycopg://grader@/grader") from None
    if url.drivername not in {"sqlite", "postgresql+psycopg"}:
        raise ValueError(f"the database should be sqlite or postgresql+psycopg, not {url.drivername}")
    if url.drivername == "sqlite" and not (url.database or "").startswith("/"):
        raise ValueError("jobs must outlive the service: name a file, as in sqlite:////var/lib/grader/service.db")
    return url


def load(path: Path) -> Settings:
    """The settings in this file, examined on this machine. Raises `ConfigurationError` with all that is wrong."""
    text = configuration.read(path)
    values = text.parse()
    # pydantic-settings takes names with an underscore in front for arguments of its own.
    odd = [name for name in values if name.startswith("_")]
    mistakes = [text.unknown((name,), Settings) for name in odd]
    settings = None
    with examination.examining(path, readable_by_all=text.readable_by_all):
        try:
            settings = Settings(**{name: value for name, value in values.items() if name not in odd})
        except ValidationError as error:
            mistakes += text.mistakes(error, Settings)
    if settings is None or mistakes:
        raise ConfigurationError(mistakes)
    return settings


__all__ = [
    "ConfigurationError",
    "CourseSettings",
    "GradersTable",
    "HubSettings",
    "LimitsTable",
    "ListenSettings",
    "Mistake",
    "Settings",
    "load",
]
