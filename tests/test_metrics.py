"""metrics.py against scikit-learn, and its rows against loss, interruption and half-written files."""

import csv
import json
import math
import warnings

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics

import metrics

NAN = float("nan")


def random_labels(seed):
    """Predicted and true labels of 1 to 20 classes, often with classes that are never true or never predicted."""
    rng = np.random.default_rng(seed)
    n_classes = int(rng.integers(1, 21))
    true_classes = rng.choice(n_classes, size=rng.integers(1, n_classes + 1), replace=False)
    named_classes = rng.choice(n_classes, size=rng.integers(1, n_classes + 1), replace=False)
    n = int(rng.integers(1, 300))
    return rng.choice(named_classes, n), rng.choice(true_classes, n), n_classes


@pytest.mark.parametrize("seed", range(60))
def test_every_average_equals_scikit_learn(seed):
    predicted, target, n_classes = random_labels(seed)
    labels = list(range(n_classes))
    matrix = metrics.confusion_matrix(predicted, target, n_classes)
    assert matrix.dtype == torch.int64
    np.testing.assert_array_equal(matrix, sklearn_metrics.confusion_matrix(target, predicted, labels=labels))
    assert metrics.accuracy(matrix) == pytest.approx(sklearn_metrics.accuracy_score(target, predicted), abs=1e-12)
    for average in (None, "macro", "micro", "weighted"):
        for zero_division in (0.0, 1.0, NAN):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # scikit-learn warns of empty classes, which are the point here
                theirs = sklearn_metrics.precision_recall_fscore_support(
                    target, predicted, labels=labels, average=average, zero_division=zero_division
                )
            for ours, expected in zip((metrics.precision, metrics.recall, metrics.f1), theirs, strict=False):
                value = ours(matrix, average, zero_division)
                assert (value.dtype == torch.float64) if average is None else isinstance(value, float)
                np.testing.assert_allclose(value, expected, rtol=0, atol=1e-12, err_msg=f"{ours.__name__} {average}")


def test_counts_by_the_definition():
    predicted, target, n_classes = [0, 2, 2, 1, 0, 2, 2], [0, 2, 1, 1, 2, 2, 0], 4
    tp, fp, fn, tn = metrics.counts(metrics.confusion_matrix(predicted, target, n_classes))
    pairs = list(zip(predicted, target, strict=True))
    for c in range(n_classes):
        assert tp[c] == sum(p == c and t == c for p, t in pairs)
        assert fp[c] == sum(p == c and t != c for p, t in pairs)
        assert fn[c] == sum(p != c and t == c for p, t in pairs)
        assert tn[c] == sum(p != c and t != c for p, t in pairs)


def test_macro_f1_is_the_mean_of_f1_not_the_f1_of_means():
    matrix = torch.tensor([[90, 10, 0], [5, 5, 0], [0, 9, 1]])
    p, r = metrics.precision(matrix, "macro"), metrics.recall(matrix, "macro")
    assert metrics.f1(matrix, "macro") == pytest.approx(metrics.f1(matrix).mean().item(), abs=1e-15)
    assert abs(metrics.f1(matrix, "macro") - 2 * p * r / (p + r)) > 0.01


def test_micro_averages_are_the_accuracy():
    matrix = metrics.confusion_matrix(*random_labels(3))
    for score in (metrics.precision, metrics.recall, metrics.f1):
        assert score(matrix, "micro") == pytest.approx(metrics.accuracy(matrix), abs=1e-15)


def test_matrices_of_batches_add_up():
    predicted, target, n_classes = random_labels(8)
    parts = zip(np.array_split(predicted, 3), np.array_split(target, 3), strict=True)
    total = sum(metrics.confusion_matrix(p, t, n_classes) for p, t in parts if len(p))
    assert torch.equal(total, metrics.confusion_matrix(predicted, target, n_classes))


@pytest.mark.parametrize("kind", ["int32 tensor", "uint8 tensor", "int16 array", "list", "read-only array", "mixed"])
def test_labels_of_every_kind(kind):
    predicted, target = [0, 2, 1, 1], [0, 1, 1, 2]
    expected = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 1, 0]])
    frozen = np.array(predicted)
    frozen.flags.writeable = False
    kinds = {
        "int32 tensor": (torch.tensor(predicted, dtype=torch.int32), torch.tensor(target, dtype=torch.int32)),
        "uint8 tensor": (torch.tensor(predicted, dtype=torch.uint8), torch.tensor(target)),
        "int16 array": (np.array(predicted, np.int16), np.array(target, np.int16)),
        "list": (predicted, target),
        "read-only array": (frozen, target),
        "mixed": (torch.tensor(predicted), target),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(metrics.confusion_matrix(*kinds[kind], 3), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_matrix_lies_where_the_labels_lie():
    predicted, target, n_classes = random_labels(5)
    on_gpu = metrics.confusion_matrix(torch.tensor(predicted).cuda(), target.tolist(), n_classes)
    assert on_gpu.is_cuda
    assert torch.equal(on_gpu.cpu(), metrics.confusion_matrix(predicted, target, n_classes))
    assert metrics.scores(on_gpu) == metrics.scores(on_gpu.cpu())


@pytest.mark.parametrize(
    ("predicted", "target", "n_classes", "quoted"),
    [
        ([0, 1, 2], [0, 1], 3, "3 predicted labels for 2"),
        ([0, 3], [0, 1], 3, "label 3"),
        ([0, 1], [-1, 1], 3, "label -1"),
        ([], [], 3, r"\(0,\)"),
        ([0.0, 1.5], [0, 1], 3, "float64"),
        (torch.tensor([0.25, 1.0]), [0, 1], 3, "0.25"),
        (["a"], [0], 3, "a"),
        ([[0, 1]], [[0, 1]], 3, r"\(1, 2\)"),
        ([0], [0], 0, "not 0"),
        ([0], [0], 2.5, "2.5"),
        ([0], [0], True, "True"),
    ],
)
def test_bad_labels_are_quoted(predicted, target, n_classes, quoted):
    with pytest.raises(ValueError, match=quoted):
        metrics.confusion_matrix(predicted, target, n_classes)


@pytest.mark.parametrize(
    ("call", "quoted"),
    [
        (lambda m: metrics.precision(m, "marco"), "marco"),
        (lambda m: metrics.f1(m, zero_division=0.5), "0.5"),
        (lambda m: metrics.recall(m, zero_division="warn"), "warn"),
        (lambda m: metrics.accuracy(m[:1]), r"\(1, 2\)"),
        (lambda m: metrics.counts(m.double()), "float64"),
        (lambda m: metrics.accuracy(m * 0), "at least one sample"),
        (lambda m: metrics.accuracy(-m), "-1"),
        (lambda m: metrics.report(m, ["only one"]), "1 class names for 2"),
    ],
)
def test_bad_arguments_are_quoted(call, quoted):
    with pytest.raises(ValueError, match=quoted):
        call(torch.tensor([[1, 2], [0, 3]]))


def test_report_holds_every_number():
    predicted, target, n_classes = random_labels(12)
    matrix = metrics.confusion_matrix(predicted, target, n_classes)
    names = [f"class-{c}" for c in range(n_classes)]
    lines = {line.split()[0]: line.split()[1:] for line in metrics.report(matrix, names).splitlines() if line.strip()}
    values = zip(names, metrics.precision(matrix), metrics.recall(matrix), metrics.f1(matrix), strict=True)
    for c, (name, p, r, f) in enumerate(values):
        assert lines[name] == [f"{p:.4f}", f"{r:.4f}", f"{f:.4f}", str(int((target == c).sum()))]
    assert lines["accuracy"] == [f"{metrics.accuracy(matrix):.4f}", str(len(target))]
    for average in ("macro", "weighted"):
        p, r, f = (score(matrix, average) for score in (metrics.precision, metrics.recall, metrics.f1))
        assert lines[average] == [f"{p:.4f}", f"{r:.4f}", f"{f:.4f}", str(len(target))]


# ---- rows ----

HERE = {"code": "abc", "torch": "2", "device": "cpu", "threads": 2}


def run_of(experiment, seed, accuracy=0.5):
    return {"runs": [{"experiment": experiment, "seed": seed, "val_accuracy": accuracy}]}


def published(folder):
    with open(folder / "runs.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_job_replaces_its_own_experiments_alone(tmp_path):
    first = metrics.Journal(tmp_path, "sweep", {"command": "first"})
    first.run({"n": 1}, lambda: run_of("depth", 0, 0.1))
    first.run({"n": 2}, lambda: run_of("width", 0, 0.2))
    first.publish()
    second = metrics.Journal(tmp_path, "sweep", {"command": "second"})
    second.run({"n": 3}, lambda: run_of("depth", 7, 1 / 3))
    second.publish()
    rows = [(r["experiment"], r["seed"], r["val_accuracy"]) for r in published(tmp_path)]
    assert rows == [("width", "0", "0.2"), ("depth", "7", "0.333333")]
    commands = json.loads((tmp_path / "environment.json").read_text())
    assert {name: job["command"] for name, job in commands.items()} == {"depth": "second", "width": "first"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["environment.json", "runs.csv"]


def test_resume_goes_on_after_a_torn_line(tmp_path):
    journal = metrics.Journal(tmp_path, "train", HERE)
    journal.run({"seed": 0}, lambda: run_of("baseline", 0))
    with open(journal.path, "a") as file:
        file.write('{"key": "half a li')  # the process dies in mid-write
    assert not (tmp_path / "runs.csv").exists()

    again = metrics.Journal(tmp_path, "train", HERE, resume=True)
    again.run({"seed": 0}, lambda: pytest.fail("a finished run was repeated"))
    again.run({"seed": 1}, lambda: run_of("baseline", 1))
    third = metrics.Journal(tmp_path, "train", HERE, resume=True)  # what follows the torn line is whole again
    for seed in (0, 1):
        third.run({"seed": seed}, lambda: pytest.fail("a finished run was repeated"))
    third.publish()
    assert [r["seed"] for r in published(tmp_path)] == ["0", "1"]


def test_an_unfinished_job_is_never_thrown_away(tmp_path, capsys):
    for seed in range(3):
        metrics.Journal(tmp_path, "train", HERE).run({"seed": seed}, lambda seed=seed: run_of("baseline", seed))
    for seed in range(2):
        assert f'"seed": {seed}' in (tmp_path / f"train.unfinished.jsonl.{seed + 1}.bak").read_text()
    assert "set aside as" in capsys.readouterr().err


def test_runs_that_a_resumed_job_does_not_ask_for_stay_in_the_journal(tmp_path):
    journal = metrics.Journal(tmp_path, "sweep", HERE)
    journal.run({"seed": 0}, lambda: run_of("depth", 0))
    journal.run({"seed": 1}, lambda: run_of("depth", 1))
    other = metrics.Journal(tmp_path, "sweep", HERE, resume=True)
    other.run({"seed": 1}, lambda: pytest.fail("a finished run was repeated"))
    other.publish()
    assert [r["seed"] for r in published(tmp_path)] == ["1"]
    last = metrics.Journal(tmp_path, "sweep", HERE, resume=True)
    last.run({"seed": 0}, lambda: pytest.fail("a finished run was repeated"))
    last.publish()
    assert not last.path.exists()


@pytest.mark.parametrize("part", ["code", "torch", "device", "threads"])
def test_rows_of_another_code_or_machine_are_not_taken_up(tmp_path, part):
    metrics.Journal(tmp_path, "train", HERE).run({"seed": 0}, lambda: run_of("baseline", 0, 0.1))
    again = metrics.Journal(tmp_path, "train", HERE | {part: "other"}, resume=True)
    assert again.run({"seed": 0}, lambda: run_of("baseline", 0, 0.2))["runs"][0]["val_accuracy"] == 0.2


def test_a_run_asked_for_twice_counts_once(tmp_path):
    journal = metrics.Journal(tmp_path, "sweep", HERE)
    for _ in range(2):
        journal.run({"seed": 0}, lambda: run_of("depth", 0))
    journal.publish()
    assert len(published(tmp_path)) == 1


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(RuntimeError), metrics.written_aside(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]


def test_a_failed_publish_changes_no_table(tmp_path):
    old = metrics.Journal(tmp_path, "train", HERE)
    old.run({}, lambda: run_of("baseline", 0))
    old.publish()
    new = metrics.Journal(tmp_path, "train", HERE | {"not JSON": object()})
    new.run({}, lambda: run_of("baseline", 1))
    with pytest.raises(TypeError):
        new.publish()
    assert [r["seed"] for r in published(tmp_path)] == ["0"]
    assert new.path.exists()


# ---- tables ----


def test_mean_and_standard_deviation():
    values = ["0.9", "0.92", "0.97"]
    m = metrics.mean(values)
    numbers = np.array(values, float)
    assert (m.mean, m.std, m.n) == (pytest.approx(numbers.mean()), pytest.approx(numbers.std(ddof=1)), 3)
    assert m.percent() == "93.00 ± 3.61"
    assert metrics.mean([0.5]).text() == "0.50"
    assert math.isnan(metrics.mean([1.0, NAN]).mean)
    assert metrics.mean([1.0, float("inf")]).text() == "not finite"


def test_finding_says_what_the_rows_say():
    rows = [
        {"value": value, "seed": seed, "val_accuracy": accuracy, "status": status}
        for value, accuracies, status in [
            ("1", (0.90, 0.92), "ok"),
            ("2", (0.97, 0.98), "ok"),
            ("3", (0.96, 0.98), "ok"),
            ("9", (0.1, 0.1), "diverged"),
        ]
        for seed, accuracy in enumerate(accuracies)
    ]
    text = metrics.finding(rows, "depth")
    assert text.startswith("Best at depth = 2 (97.50 ± 0.71 %), worst at 9 (10.00 ± 0.00 %)")
    assert "within two standard errors of the best: 3;" in text
    assert text.endswith("diverged at 9.")


def test_rates_are_amount_over_time(monkeypatch):
    clock = iter(np.cumsum([0, 1, 0, 9, 0, 2, 0, 4, 0, 2, 0, 8]).tolist())
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    works = {("g", "slow"): (10, lambda: None), ("g", "fast"): (30, lambda: None)}
    slow, fast = metrics.interleaved(works, 2, torch.device("cpu"))
    # the first round is the warm-up: its 1 and 9 seconds do not count
    assert (slow["seconds"], fast["seconds"]) == (2, 6)
    assert (slow["rate"], slow["ratio"]) == (5, 1)
    assert (fast["rate"], fast["ratio"]) == (5, 1)


# ---- pictures ----


def history_of(value, seed, losses):
    return [
        {"value": value, "seed": str(seed), "step": str(10 * i), "train_loss": str(loss), "val_loss": str(loss)}
        | {"val_accuracy": "0.1", "val_macro_f1": "0.1"}
        for i, loss in enumerate(losses, 1)
    ]


@pytest.mark.parametrize("n_lost", [1, 2])
def test_pictures_of_runs_that_diverged_at_once(tmp_path, n_lost):
    """Of two seeds, one or both have no finite loss at all."""
    history = history_of("1", 0, ["nan"]) + history_of("1", 1, ["inf"] if n_lost == 2 else [2.0, 1.0])
    rows = [
        {"value": "1", "seed": str(s), "val_accuracy": "0.1", "val_macro_f1": "0.1", "status": "ok"} for s in range(2)
    ]
    metrics.plot_curves(tmp_path / "curves.png", history, "title")
    metrics.plot_sweep(tmp_path / "sweep.png", rows, history, "title", "axis")
    assert {path.name for path in tmp_path.iterdir()} == {"curves.png", "sweep.png"}


def test_a_seed_that_diverged_does_not_hide_the_others():
    axes = metrics.Figure().subplots()
    metrics.draw_history(axes, history_of("1", 0, ["inf"]) + history_of("1", 1, [2.0, 1.0, 0.5]), "val_loss", "loss")
    (line,) = axes.get_lines()
    np.testing.assert_array_equal(line.get_xdata(), [10, 20, 30])
    np.testing.assert_array_equal(line.get_ydata(), [2.0, 1.0, 0.5])


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ([{"dropout": 0.1}, {"smoothing": 0.1}, {}], ["dropout 0.1", "smoothing 0.1", "nothing"]),
        ([{"hidden": (256, 128)}, {"hidden": (256, 64)}, {"hidden": (256, 256)}], ["256-128", "256-64", "2×256"]),
        ([{"clip": 1.0}], ["1.0"]),
        ([{"hidden": ()}, {"hidden": (5,)}], ["0", "1×5"]),
        ([{}, {"clip": 0.0}, {"clip": 2.0}], ["nothing", "0.0", "2.0"]),
        ([{"heads": n, "kv_heads": n, "width": 8} for n in (1, 4)], ["1", "4"]),  # two fields that always agree
    ],
)
def test_labels_tell_values_apart(changes, labels):
    assert [metrics.label(change, changes) for change in changes] == labels
