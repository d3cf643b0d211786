"""Types of arguments that the project's commands have in common, for argparse."""

import argparse


def seconds(text: str) -> float:
    """A positive number, below thirty years. Raises `argparse.ArgumentTypeError`."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value
