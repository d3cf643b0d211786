"""Kinds of values in the configuration, from what an administrator writes to what the service uses."""

import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from isolate.policy import parse_size

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 7 * 86_400.0}


def _size(value: Any) -> Any:
    if isinstance(value, str):
        return parse_size(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("should be a size, such as '500M' or '2G', or a number of bytes")
    return value


def _duration(value: Any) -> Any:
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw])", value.strip())
        if match is None:
            raise ValueError(f"{value!r} is not a duration; write for example '30d', '12h' or '90s'")
        return float(match[1]) * _UNITS[match[2]]
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError("should be a duration, such as '30d' or '12h', or a number of seconds")
    return float(value)


def _absolute(value: Any) -> Any:
    if not isinstance(value, str | os.PathLike):
        raise ValueError("should be a path")
    path = Path(value)
    if not path.is_absolute() or ".." in path.parts or "\0" in str(path):
        raise ValueError("should be an absolute path without '..'")
    return path


Size = Annotated[int, BeforeValidator(_size), Field(gt=0, lt=1 << 62)]
"""Bytes."""
Duration = Annotated[float, BeforeValidator(_duration), Field(gt=0, allow_inf_nan=False)]
"""Seconds."""
AbsolutePath = Annotated[Path, BeforeValidator(_absolute)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
"""A name of an environment variable."""
Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]
Name = Annotated[str, Field(pattern=r"^[^\x00-\x20\x7f:,/]+$")]
"""Of a user or a group."""
CourseName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches this address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
