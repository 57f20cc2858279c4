"""interview/training.py: rows that are found again, checkpoints, lines that say how far it is."""

from dataclasses import dataclass, replace

import pytest
import torch
from conftest import assert_equal

import metrics
from interview import training


@dataclass(frozen=True)
class Recipe:
    channels: tuple[int, ...] = (8, 16)
    lr: float = 1e-3
    seed: int = 0


def test_a_row_is_found_by_all_that_its_key_names(tmp_path):
    path = tmp_path / "runs.csv"
    key = {"experiment": "digits", "value": "U-Net", "seed": 0}
    key |= training.recipe_columns(Recipe())
    assert not training.has_row(path, key)
    metrics.replace_rows(tmp_path, {"runs": [key | {"loss": 0.5}]}, [])
    assert training.has_row(path, key)
    assert not training.has_row(path, key | training.recipe_columns(Recipe(lr=1e-2)))
    assert not training.has_row(path, key | {"seed": 1})
    assert not training.has_row(path, key | {"column": "of a later program"})


def test_rows_of_other_weights_are_forgotten(tmp_path):
    rows = [{"experiment": "digits", "value": value, "weights": value[0]} for value in ("a1", "b1")]
    path = tmp_path / "nats.csv"
    training.forget_rows(path, "a")  # no such file: nothing to do
    for kept, left in (("a", ["a1"]), (None, [])):
        metrics.replace_rows(tmp_path, {"nats": rows}, [])
        training.forget_rows(path, kept)
        assert metrics.load_rows(path)["value"].tolist() == left


def test_a_digest_names_what_a_file_holds(tmp_path):
    one, same, other = (tmp_path / name for name in ("one", "same", "other"))
    one.write_bytes(b"weights")
    same.write_bytes(b"weights")
    other.write_bytes(b"weightz")
    assert training.digest_of(one) == training.digest_of(same) != training.digest_of(other)


def test_calls_in_parallel_give_what_they_give_alone():
    calls = [(2, 3), (3, 2), (5, 1)]
    assert list(training.in_parallel(pow, calls, 1)) == [8, 9, 5]
    assert sorted(training.in_parallel(pow, calls, 2)) == [5, 8, 9]
    assert list(training.in_parallel(pow, [], 4)) == []


def test_a_checkpoint_is_of_one_recipe_and_seed(tmp_path):
    path = tmp_path / "new" / "run.pt"
    model, other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    assert training.load_checkpoint(path, Recipe(), "cpu", model=other) == (0, [])
    training.save_checkpoint(path, Recipe(), 4, [{"step": 4}], model=model)
    for recipe in (replace(Recipe(), lr=0.5), replace(Recipe(), seed=1)):
        assert training.load_checkpoint(path, recipe, "cpu", model=other) == (0, [])
    assert training.load_checkpoint(path, Recipe(), "cpu", model=other) == (4, [{"step": 4}])
    assert_equal(list(other.parameters()), list(model.parameters()), 0)


def test_rounding_halves_weights_and_leaves_counters():
    state = training.rounded(torch.nn.BatchNorm1d(3))
    assert state["weight"].dtype == state["running_var"].dtype == torch.float16
    assert state["num_batches_tracked"].dtype == torch.int64


def test_each_minute_a_line_says_how_far_it_is(capsys, monkeypatch):
    seconds = iter([0, 0, 59, 61, 100, 130])  # the start, then before each item
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(seconds))
    assert list(training.every_minute("abcde", "letters")) == list("abcde")
    assert capsys.readouterr().out.splitlines() == [
        "  letters: 2 of 5, 1.0 min",
        "  letters: 4 of 5, 2.2 min",
    ]


@pytest.mark.parametrize("n_items", [0, 1])
def test_few_items_say_nothing(n_items, capsys):
    assert len(list(training.every_minute(range(n_items), "few"))) == n_items
    assert capsys.readouterr().out == ""
