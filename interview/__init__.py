"""Algorithms that interviews ask to write by hand (手撕), one subject a file."""

import numbers

import metrics  # noqa: F401 - before matplotlib: pictures go to files, whatever a notebook set


def check_whole(**values) -> None:
    """ValueError for the first named value that is no whole number of at least 1."""
    for name, value in values.items():
        is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not is_whole or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
