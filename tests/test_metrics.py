"""The arithmetic of metrics.py against scikit-learn."""

import warnings

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics

import metrics

NAN = float("nan")


def random_labels(seed):
    """Predicted and true labels of 1 to 20 classes, often with classes that are never true or never
    predicted.
    """
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
    np.testing.assert_array_equal(
        matrix, sklearn_metrics.confusion_matrix(target, predicted, labels=labels)
    )
    assert metrics.accuracy(matrix) == pytest.approx(
        sklearn_metrics.accuracy_score(target, predicted), abs=1e-12
    )
    for average in (None, "macro", "micro", "weighted"):
        for zero_division in (0.0, 1.0, NAN):
            with warnings.catch_warnings():
                # scikit-learn warns of empty classes, which are the point here
                warnings.simplefilter("ignore")
                theirs = sklearn_metrics.precision_recall_fscore_support(
                    target, predicted, labels=labels, average=average, zero_division=zero_division
                )
            for ours, expected in zip(
                (metrics.precision, metrics.recall, metrics.f1), theirs, strict=False
            ):
                value = ours(matrix, average, zero_division)
                assert (
                    (value.dtype == torch.float64) if average is None else isinstance(value, float)
                )
                np.testing.assert_allclose(
                    value, expected, rtol=0, atol=1e-12, err_msg=f"{ours.__name__} {average}"
                )


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


@pytest.mark.parametrize(
    "kind", ["int32 tensor", "uint8 tensor", "int16 array", "list", "read-only array", "mixed"]
)
def test_labels_of_every_kind(kind):
    predicted, target = [0, 2, 1, 1], [0, 1, 1, 2]
    expected = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 1, 0]])
    frozen = np.array(predicted)
    frozen.flags.writeable = False
    kinds = {
        "int32 tensor": (
            torch.tensor(predicted, dtype=torch.int32),
            torch.tensor(target, dtype=torch.int32),
        ),
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
    lines = {
        line.split()[0]: line.split()[1:]
        for line in metrics.report(matrix, names).splitlines()
        if line.strip()
    }
    values = zip(
        names, metrics.precision(matrix), metrics.recall(matrix), metrics.f1(matrix), strict=True
    )
    for c, (name, p, r, f) in enumerate(values):
        assert lines[name] == [f"{p:.4f}", f"{r:.4f}", f"{f:.4f}", str(int((target == c).sum()))]
    assert lines["accuracy"] == [f"{metrics.accuracy(matrix):.4f}", str(len(target))]
    for average in ("macro", "weighted"):
        p, r, f = (
            score(matrix, average) for score in (metrics.precision, metrics.recall, metrics.f1)
        )
        assert lines[average] == [f"{p:.4f}", f"{r:.4f}", f"{f:.4f}", str(len(target))]
