"""Lets the tests import the stages however pytest is started, and reads what the README quotes."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def read(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def gradients(results, inputs):
    """Gradients of a sum in which every number of the results has another weight."""
    generator = torch.Generator().manual_seed(5)
    total = sum((r * torch.randn(r.shape, generator=generator, dtype=r.dtype)).sum() for r in results)
    return torch.autograd.grad(total, inputs)


def assert_equal(ours, theirs, tolerance=1e-11):
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


@pytest.fixture
def quoted_rows():
    """(folder of a stage, table, experiment) -> the committed rows and the README; skips if figures/ has later ones."""

    def rows_of(stage: str, table: str, experiment: str):
        folder = ROOT / "figures" / stage
        commit = json.loads((folder / "environment.json").read_text(encoding="utf-8"))[experiment]["commit"]
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        if f"`{commit}`" not in readme:
            pytest.skip(f"figures/{stage} holds a run of {commit}, which the README does not quote")
        return [row for row in read(folder / f"{table}.csv") if row["experiment"] == experiment], readme

    return rows_of
