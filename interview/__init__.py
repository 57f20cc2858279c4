"""Algorithms that interviews ask to write by hand (手撕), one subject a file."""

import numbers

import torch

import metrics  # noqa: F401 - before matplotlib: pictures go to files, whatever a notebook set


def check_whole(least: int = 1, /, **values) -> None:
    """ValueError for the first named value that is no whole number of at least `least`."""
    for name, value in values.items():
        is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not is_whole or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")


def cuda_or_cpu(device: str) -> str:
    """What "auto" stands for where float64 is needed, which Apple's GPUs do not have."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device
