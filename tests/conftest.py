"""Lets the tests import the stages however pytest is started; and what several of them need."""

import csv
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["LOKY_MAX_CPU_COUNT"] = "1"  # for joblib: pytest-xdist's workers fill the cores


def pytest_configure(config):
    """The longest groups, test_bundle.py's, begin: pytest-xdist would begin with the largest."""
    config.option.loadscopereorder = False


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items):
    """Of pytest-xdist's workers one takes a file whole, and of test_bundle.py a stage."""
    for item in items:
        stage = item.callspec.params.get("stage", "") if hasattr(item, "callspec") else ""
        item.add_marker(pytest.mark.xdist_group(f"{item.path.name} {stage}"))


def read(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def gradients(results, inputs):
    """Gradients of a sum in which every number of the results has another weight."""
    generator = torch.Generator().manual_seed(5)
    total = sum(
        (r * torch.randn(r.shape, generator=generator, dtype=r.dtype)).sum() for r in results
    )
    return torch.autograd.grad(total, inputs)


def assert_equal(ours, theirs, tolerance=1e-11):
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)
