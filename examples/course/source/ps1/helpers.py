"""Small helpers that the notebooks of this problem set share."""

from collections.abc import Iterable
from pathlib import Path


def close(a: float, b: float, tolerance: float = 1e-9) -> bool:
    """Are two numbers equal, but for rounding?"""
    return abs(a - b) <= tolerance * max(1.0, abs(a), abs(b))


def same_items(a: Iterable[object], b: Iterable[object]) -> bool:
    """Do two collections hold the same items, in whatever order?"""
    return sorted(map(repr, a)) == sorted(map(repr, b))


def read_lines(name: str) -> list[str]:
    """The lines of a text file beside the notebook, without the ends of line."""
    return Path(name).read_text(encoding="utf-8").splitlines()
