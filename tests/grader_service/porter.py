"""An `Authenticator` at work, with a clock that the test turns."""

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import Engine

from grader_service.auth import Authenticator, Identity, Unauthorized
from grader_service.hub import Hub
from grader_service.settings import CourseSettings, GradersTable, HubSettings, Settings
from grader_service.tokens import TokenStore


class StillClock:
    """Seconds of a clock that stands still unless the test turns it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Porter:
    """Asks one authenticator, in one event loop."""

    def __init__(self, settings: Settings, engine: Engine) -> None:
        self.runner = asyncio.Runner()
        self.clock = StillClock()
        self.tokens = TokenStore(engine)
        self.hub = Hub(settings.hub, deadline_seconds=20) if settings.hub else None
        self.authenticator = Authenticator(settings, self.tokens, self.hub, self.clock)

    @classmethod
    @contextlib.contextmanager
    def open(cls, settings: Settings, engine: Engine) -> Iterator["Porter"]:
        """Until the block ends."""
        porter = cls(settings, engine)
        with porter.runner:
            try:
                yield porter
            finally:
                if porter.hub is not None:
                    porter.runner.run(porter.hub.close())

    def who(self, token: str) -> Identity:
        """Whoever shows this token. Raises `Unauthorized`, `HubUnavailable`."""
        return self.runner.run(self.authenticator.identify(f"Bearer {token}"))

    def may(self, token: str, course: str) -> bool:
        """Whether who shows this token may grade this course; False also if the token is no good."""
        try:
            identity = self.who(token)
        except Unauthorized:
            return False
        return self.runner.run(self.authenticator.may_grade(identity, course))

    def courses(self, token: str) -> list[str]:
        """The courses that who shows this token may grade."""
        return self.runner.run(self.authenticator.courses_of(self.who(token)))


def settings_with(directory: Path, hub: HubSettings | None, courses: dict[str, GradersTable]) -> Settings:
    """Courses that differ in who may grade them."""
    return Settings(
        data_directory=directory,
        hub=hub,
        courses={name: CourseSettings(environment=Path("/usr"), graders=graders) for name, graders in courses.items()},
    )
