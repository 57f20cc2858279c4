"""metrics.py: its arithmetic against scikit-learn; its tables against loss and halves."""

import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn import metrics as sklearn_metrics

import metrics

NAN = float("nan")


def random_labels(seed):
    """Predicted and true labels of 1 to 20 classes; some are never true or never predicted."""
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


def test_report_lines_up_under_chinese_names():
    lines = metrics.report([[5, 1], [2, 7]], ["猫", "狗"]).splitlines()
    table = [line for line in lines[1:] if line]
    assert {metrics.terminal_width(line) for line in table} == {len(lines[-1])}
    assert metrics.terminal_width("猫a") == 3


# ---- tables ----

ORDER = [("depth", "0"), ("depth", "1"), ("width", "16")]


def run_rows(experiment, value, seed, number):
    name = {"experiment": experiment, "value": value, "seed": seed}
    return {"history": [name | {"step": i, "x": number + i} for i in (1, 2)], "runs": [name]}


def test_rows_are_replaced_run_by_run_and_stand_in_the_tables_order(tmp_path):
    for seed in (1, 0):
        for experiment, value in reversed(ORDER):
            metrics.replace_rows(tmp_path, run_rows(experiment, value, seed, 0.5), ORDER)
    metrics.replace_rows(tmp_path, run_rows("depth", "1", 0, 1 / 3), ORDER)
    metrics.replace_rows(tmp_path, run_rows("own", "lr 3", 0, 7), ORDER)
    runs = metrics.load_rows(tmp_path / "runs.csv", as_text=True)
    expected = [(*name, seed) for name in ORDER for seed in ("0", "1")] + [("own", "lr 3", "0")]
    assert [tuple(row) for row in runs.to_numpy()] == expected
    history = metrics.load_rows(tmp_path / "history.csv", as_text=True)
    assert history["step"].tolist() == ["1", "2"] * 7
    is_it = (history["value"] == "1") & (history["seed"] == "0")
    assert history.loc[is_it, "x"].tolist() == ["1.33333", "2.33333"]


def test_rows_that_get_a_new_column_keep_their_text(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("experiment,value,seed,lr\na,007,0,1e-3\n")
    metrics.replace_rows(tmp_path, {"t": [{"experiment": "b", "value": "1", "seed": 2}]}, [])
    assert path.read_text() == "experiment,value,seed,lr\na,007,0,1e-3\nb,1,2,\n"


def test_runs_are_forgotten_with_all_that_is_known_of_them(tmp_path):
    for experiment, value in ORDER:
        metrics.replace_rows(tmp_path, run_rows(experiment, value, 0, 0.5), ORDER)
    runs = metrics.load_rows(tmp_path / "runs.csv", as_text=True)
    metrics.remove_runs(tmp_path, runs["experiment"] == "depth")
    for table in ("runs", "history"):
        rows = metrics.load_rows(tmp_path / f"{table}.csv")
        assert set(rows["experiment"]) == {"width"}


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(RuntimeError), metrics.written_aside(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]


def test_mean_deviation_and_t_interval():
    values = [0.9, 0.92, 0.97]
    found = metrics.summarise(values)
    assert (found.mean, found.std, found.n) == (np.mean(values), np.std(values, ddof=1), 3)
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert metrics.t_interval(values) == (pytest.approx(low), pytest.approx(high))
    assert str(metrics.summarise([90, 92, 97])) == "93.00 ± 3.61"
    assert str(metrics.summarise([0.5])) == "0.50"
    assert math.isnan(metrics.summarise([1.0, NAN]).mean)
    assert math.isinf(metrics.summarise([1.0, float("inf")]).mean)


def test_score_table_holds_means_intervals_and_what_diverged():
    rows = pd.DataFrame(
        {
            "value": ["a", "a", "b", "b"],
            "val_accuracy": [0.90, 0.92, 0.5, 0.1],
            "val_macro_precision": [0.7, 0.9, 0.1, 0.1],
            "val_macro_recall": [0.9, 0.94, 0.1, 0.1],
            "val_macro_f1": [0.8, 0.9, 0.1, 0.1],
            "val_loss": [0.25, 0.75, NAN, 1.0],
            "parameters": [1234] * 4,
            "status": ["ok", "ok", "diverged", "ok"],
        }
    )
    lines = metrics.score_table(rows, "val_").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    low, high = stats.t.interval(0.95, 1, 91, stats.sem([90, 92]))
    interval = f"{low:.2f} … {min(high, 100):.2f}"
    assert cells[0] == ["a", "91.00 ± 1.41", interval, "0.5000", "1,234", "2"]
    assert cells[1][3:] == ["nan", "1,234", "2, 1 diverged"]
    lines = metrics.score_table(rows, "val_", all_scores=True).splitlines()
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells[3:6] == ["80.00 ± 14.14", "92.00 ± 2.83", "85.00 ± 7.07"]


def history_of(value, seed, losses):
    name = {"experiment": "e", "value": value, "seed": seed}
    numbers = {"train_accuracy": 0.1, "val_accuracy": 0.1}
    return [
        name | numbers | {"step": 10 * i, "train_loss": loss, "val_loss": loss}
        for i, loss in enumerate(losses, 1)
    ]


@pytest.mark.parametrize("lost", [[NAN], [float("inf"), 3.0]])
def test_pictures_of_runs_that_diverged(tmp_path, lost):
    history = pd.DataFrame(history_of("1", 0, lost) + history_of("2", 0, [2.0, 1.0, 0.5]))
    runs = pd.DataFrame(
        {"value": ["1", "2"], "seed": [0, 0], "val_accuracy": [NAN, 0.9], "status": ["ok", "ok"]}
    )
    metrics.draw_curves(tmp_path / "curves.png", history[history["value"] == "1"], "title")
    metrics.draw_sweep(tmp_path / "sweep.png", runs, history, "title", "axis")
    for name in ("curves", "sweep"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_faults_that_differ_a_thousandfold_are_averaged_as_powers_of_ten():
    rows = [
        {"fault": "a", "measured": "share", "variant": variant, "value": variant, "seed": seed}
        | {"number": number}
        for variant, numbers in (("broken", (1e-8, 1e-4)), ("mended", (0.25, 0.25)))
        for seed, number in enumerate(numbers)
    ]
    table = metrics.fault_table(pd.DataFrame(rows), {"a": "sign"})
    assert "broken: 1e-06 (1e-08 … 0.0001; geometric mean, range)" in table
    for row in rows:
        row["number"] += 1
    table = metrics.fault_table(pd.DataFrame(rows), {"a": "sign"})
    assert "mended: 1.25 ± 0" in table


def test_contents_of_a_summary_lead_to_its_headings(tmp_path):
    sections = {"Selected models, test images": ["a"], "Recall: at 2 steps (召回)": ["b"]}
    metrics.write_sections(tmp_path / "summary.md", "title", sections)
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "- [Selected models, test images](#selected-models-test-images)\n" in text
    assert "(#recall-at-2-steps-召回)" in text


def test_ratios_and_their_table(tmp_path):
    rows = pd.DataFrame(
        {"name": ["ours / theirs", "a / b"], "first": [0.394307, 191.219], "second": [3.128, 100]}
        | {"unit": "s", "ratio": [0.126054, 1.91219], "device": "cpu", "threads": 1}
    )
    metrics.draw_ratios(tmp_path / "ratios.png", rows, "title")
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")
    cells = [cell.strip() for cell in metrics.ratio_table(rows).splitlines()[2].split("|")]
    assert cells[1:6] == ["ours / theirs", "0.394", "3.13", "s", "0.13"]


def break_off(path):
    """As a drawing that fails after half a file."""
    with metrics.written_aside(path) as aside:
        aside.write_text("half")
        raise ValueError(f"no {path.name}, in process {os.getpid()}")


def test_a_picture_that_cannot_be_drawn_is_told_by_the_first_process(tmp_path, monkeypatch):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "2")
    pictures = metrics.Pictures()
    for name in ("a.png", "b.png"):
        pictures.add(break_off, tmp_path / name)
    with pytest.raises(ValueError, match=r"no [ab]\.png, in process") as told:
        pictures.draw()
    if sys.platform == "linux":
        assert f"process {os.getpid()}" not in str(told.value)  # it was a copy that drew
    assert not list(tmp_path.iterdir())


def wait_in_the_middle(path, writer):
    with metrics.written_aside(path) as aside:
        aside.write_text("half")
        os.write(writer, b".")
        time.sleep(300)


def draw_until_stopped(folder, writer):
    """As a program that somebody stops by Ctrl-C while two of its pictures are drawn."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["LOKY_MAX_CPU_COUNT"] = "2"
    pictures = metrics.Pictures()
    for name in ("a.png", "b.png"):
        pictures.add(wait_in_the_middle, folder / name, writer)
    try:
        pictures.draw()
    except KeyboardInterrupt:
        os._exit(130)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no process is forked")
def test_ctrl_c_ends_what_is_being_drawn_and_leaves_no_half_file(tmp_path, capfd):
    reader, writer = os.pipe()
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=draw_until_stopped, args=(tmp_path, writer))
    process.start()
    assert [os.read(reader, 1) for _ in range(2)] == [b"."] * 2
    assert len(list(tmp_path.iterdir())) == 2
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the copies get it, too
    process.join(60)
    assert process.exitcode == 130
    assert capfd.readouterr().err == ""
    assert not list(tmp_path.iterdir())


class Bar:
    def __init__(self):
        self.was_refreshed = threading.Event()

    def refresh(self):
        self.was_refreshed.set()


def test_a_bar_ticks_while_nothing_ends_and_stops_with_its_block():
    n_threads = threading.active_count()
    bar = Bar()
    with pytest.raises(KeyboardInterrupt), metrics.ticking(bar):
        assert bar.was_refreshed.wait(60)
        raise KeyboardInterrupt
    assert threading.active_count() == n_threads


@pytest.mark.parametrize("on_screen", [True, False])
def test_a_line_covers_the_bar_on_a_screen_and_is_bare_in_a_file(monkeypatch, capsys, on_screen):
    monkeypatch.setenv("COLUMNS", "20")
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: on_screen)
    metrics.print_beside_bar("step 860")
    printed = capsys.readouterr().out
    assert printed == ("\rstep 860" + " " * 11 + "\n" if on_screen else "step 860\n")
