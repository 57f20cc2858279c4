"""Classification metrics by hand (评估指标), the tables of finished runs, and the pictures the three stages share.

Everything in part 1 follows from the confusion matrix (混淆矩阵): its row is the true class, its column the predicted one.

                 predicted c      predicted other
    true c       TP  真正例        FN  假反例            precision 精确率 = TP / (TP + FP)
    true other   FP  假正例        TN  真反例            recall    召回率 = TP / (TP + FN)

    accuracy 准确率 = (TP + TN) / (TP + TN + FP + FN) for two classes; for C classes the share of the diagonal
    F1值 = 2 · precision · recall / (precision + recall) = 2 TP / (2 TP + FP + FN)

    1. Metrics   2. Tables   3. Pictures
"""

import contextlib
import math
import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

os.environ["MPLBACKEND"] = (
    "agg"  # pictures go to files; a notebook's own setting must not reach a script
)

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from scipy import stats

# -------- 1. Metrics ------------------------------------------------------------------------------


class Counts(NamedTuple):
    """How often each class was rightly named, wrongly named, missed, rightly left alone: (C,) int64."""

    tp: torch.Tensor  # true positives, 真正例
    fp: torch.Tensor  # false positives, 假正例
    fn: torch.Tensor  # false negatives, 假反例
    tn: torch.Tensor  # true negatives, 真反例


def confusion_matrix(predicted, target, n_classes: int) -> torch.Tensor:
    """Count every (true, predicted) pair: int64 (C, C), row = true class, column = predicted class.

    `predicted` and `target` are N labels in 0 … n_classes - 1: tensors on any device, numpy arrays
    or lists. The matrix lies on the tensors' device. Matrices add: the sum over batches is the
    matrix of all. ValueError on labels that are no whole numbers, are out of range, are none at
    all, or differ in number.
    """
    if isinstance(n_classes, bool) or not isinstance(n_classes, int | np.integer) or n_classes < 1:
        raise ValueError(f"n_classes must be a whole number of at least 1, not {n_classes!r}")
    tensors = [labels for labels in (predicted, target) if isinstance(labels, torch.Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    predicted = check_labels("predicted", predicted, n_classes, device)
    target = check_labels("target", target, n_classes, device)
    if len(predicted) != len(target):
        raise ValueError(f"{len(predicted)} predicted labels for {len(target)} targets")
    # a pair (true, predicted) is one cell of the matrix laid out flat: one count, no loop over samples
    cells = torch.bincount(target * n_classes + predicted, minlength=n_classes * n_classes)
    return cells.view(n_classes, n_classes)


def counts(matrix) -> Counts:
    """TP, FP, FN, TN of every class, read off the confusion matrix (C, C): each (C,) int64."""
    matrix = check_matrix(matrix)
    tp = matrix.diagonal()
    fp = matrix.sum(0) - tp  # the rest of the column: named c, but were another
    fn = matrix.sum(1) - tp  # the rest of the row: were c, but named another
    tn = matrix.sum() - tp - fp - fn
    return Counts(tp, fp, fn, tn)


def accuracy(matrix) -> float:
    """准确率: the share of samples on the diagonal, sum of TP / number of samples."""
    matrix = check_matrix(matrix)
    return matrix.diagonal().sum().item() / matrix.sum().item()


def precision(matrix, average: str | None = None, zero_division: float = 0.0):
    """精确率 TP / (TP + FP): of the samples named c, the share that are c.

    average None gives every class, (C,) float64; "macro" their mean, "weighted" their mean by
    support, "micro" the ratio of the summed counts. A class never predicted has 0 / 0 =
    `zero_division` (0, 1 or nan; nan is left out of averages), as in scikit-learn's
    precision_recall_fscore_support over labels 0 … C - 1. ValueError on anything else.
    """
    c = counts(matrix)
    return average_ratio(c.tp, c.tp + c.fp, c.tp + c.fn, average, zero_division)


def recall(matrix, average: str | None = None, zero_division: float = 0.0):
    """召回率 TP / (TP + FN): of the samples that are c, the share named c. Arguments as `precision`."""
    c = counts(matrix)
    return average_ratio(c.tp, c.tp + c.fn, c.tp + c.fn, average, zero_division)


def f1(matrix, average: str | None = None, zero_division: float = 0.0):
    """F1值 2 TP / (2 TP + FP + FN), the harmonic mean of precision and recall. Arguments as `precision`.

    Macro-F1 is the mean of the classes' F1, not the F1 of the mean precision and mean recall.
    """
    c = counts(matrix)
    return average_ratio(2 * c.tp, 2 * c.tp + c.fp + c.fn, c.tp + c.fn, average, zero_division)


def average_ratio(numerator, denominator, support, average, zero_division):
    """numerator / denominator of every class (C,), with 0 / 0 replaced, then averaged as asked."""
    if average not in (None, "macro", "micro", "weighted"):
        raise ValueError(f'average must be None, "macro", "micro" or "weighted", not {average!r}')
    is_nan = isinstance(zero_division, float) and math.isnan(zero_division)
    if zero_division not in (0, 1) and not is_nan:
        raise ValueError(f"zero_division must be 0, 1 or nan, not {zero_division!r}")
    if average == "micro":
        numerator = numerator.sum()
        denominator = denominator.sum()
    ratio = torch.where(denominator > 0, numerator.double() / denominator, float(zero_division))
    if average is None:
        return ratio
    if average == "weighted":
        weight = support * ~ratio.isnan()
        if weight.sum() > 0:
            return ((ratio.nan_to_num() * weight).sum() / weight.sum()).item()
    return ratio.nanmean().item()


def scores(matrix) -> dict[str, float]:
    """The four figures every run is judged by: accuracy, macro precision, macro recall, macro F1."""
    return {
        "accuracy": accuracy(matrix),
        "macro_precision": precision(matrix, "macro"),
        "macro_recall": recall(matrix, "macro"),
        "macro_f1": f1(matrix, "macro"),
    }


def report(matrix, class_names=None) -> str:
    """A table to read: precision, recall, F1, support of every class, then accuracy and averages."""
    matrix = check_matrix(matrix)
    names = [str(name) for name in (range(len(matrix)) if class_names is None else class_names)]
    if len(names) != len(matrix):
        raise ValueError(f"{len(names)} class names for {len(matrix)} classes")
    width = max(terminal_width(name) for name in [*names, "weighted"])

    def line(name, p, r, f, support) -> str:
        indent = " " * (width - terminal_width(name))
        return f"{indent}{name}  {p:<9.4f}  {r:<6.4f}  {f:<6.4f}  {support:>7d}"

    support = matrix.sum(1)
    per_class = zip(names, precision(matrix), recall(matrix), f1(matrix), support, strict=True)
    lines = [f"{'':>{width}}  precision  recall  F1      support"]
    lines += [line(*numbers) for numbers in per_class]
    lines += ["", f"{'accuracy':>{width}}  {'':17}  {accuracy(matrix):<6.4f}  {support.sum():>7d}"]
    for average in ("macro", "weighted"):
        means = [score(matrix, average) for score in (precision, recall, f1)]
        lines.append(line(average, *means, support.sum()))
    return "\n".join(lines)


def terminal_width(text: str) -> int:
    """Cells that a text takes on a terminal: a wide character, as every Chinese one, takes two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def check_labels(name: str, values, n_classes: int, device) -> torch.Tensor:
    """A list, numpy array or tensor of class labels as int64 (N,) on `device`; else ValueError."""
    wanted = f"{name} must hold whole-number class labels"
    if not isinstance(values, torch.Tensor):
        array = np.asarray(values)
        if array.size and array.dtype.kind not in "iub":
            raise ValueError(f"{wanted}, not {array.dtype} such as {array.flat[0]!r}")
        values = torch.from_numpy(array.astype(np.int64))
    if values.ndim != 1 or len(values) == 0:
        shape = tuple(values.shape)
        raise ValueError(
            f"{name} must be a non-empty list of labels, shape (N,), not shape {shape}"
        )
    if values.is_floating_point() or values.is_complex():
        raise ValueError(f"{wanted}, not {values.dtype} such as {values[0].item()}")
    labels = values.to(device, torch.int64)
    for extreme in labels.aminmax():
        if not 0 <= extreme < n_classes:
            raise ValueError(f"{name} has the label {extreme.item()}, outside 0 … {n_classes - 1}")
    return labels


def check_matrix(matrix) -> torch.Tensor:
    """A confusion matrix as int64 (C, C) on the CPU, where float64 exists everywhere; else ValueError."""
    if not isinstance(matrix, torch.Tensor):
        matrix = torch.as_tensor(np.asarray(matrix))
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"a confusion matrix is square, not of shape {tuple(matrix.shape)}")
    if matrix.is_floating_point() or matrix.is_complex():
        raise ValueError(f"a confusion matrix holds whole-number counts, not {matrix.dtype}")
    matrix = matrix.to("cpu", torch.int64)
    if matrix.numel() == 0 or matrix.min() < 0 or matrix.sum() == 0:
        wanted = "a confusion matrix holds counts >= 0 of at least one sample"
        raise ValueError(f"{wanted}, not {matrix.tolist()}")
    return matrix


# -------- 2. Tables -------------------------------------------------------------------------------

RUN = ["experiment", "value", "seed"]  # the columns that name a run


def load_rows(path: Path, as_text: bool = False) -> pd.DataFrame:
    """A saved table, or an empty one if there is no such file. ValueError names a file that is no table.

    as_text leaves every cell as it was written, so that what is saved again stays the same.
    """
    if not path.exists():
        return pd.DataFrame(columns=RUN)
    text = {"dtype": str, "keep_default_na": False} if as_text else {"dtype": {"value": str}}
    try:
        with open(
            path, encoding="utf-8-sig", newline=""
        ) as file:  # Excel puts a mark before the first
            rows = pd.read_csv(file, on_bad_lines="error", **text)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}; delete it, or bring it back") from None
    if "experiment" not in rows or rows["experiment"].isna().any():
        raise ValueError(f"{path} is damaged: not every row names its experiment")
    return rows


@contextlib.contextmanager
def written_aside(path: Path):
    """Give a path to write to and rename it when it is complete: nobody ever meets half a file."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.aside")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def save_rows(path: Path, rows: pd.DataFrame) -> None:
    """Save a table as CSV, aside and renamed."""
    with written_aside(path) as aside, open(aside, "w", encoding="utf-8", newline="") as file:
        rows.to_csv(file, index=False, lineterminator="\n")


def cell_text(value) -> str:
    """A cell as it is saved: floats to 6 significant digits."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def names_of(rows: pd.DataFrame, columns: list[str]) -> pd.Series:
    """Of every row the given columns as one text, to find rows of the same run."""
    return rows[columns].astype(str).agg("\t".join, axis=1) if len(rows) else pd.Series(dtype=str)


def replace_rows(
    folder: Path, tables: dict[str, list[dict]], by: list[str], order: list[str]
) -> None:
    """Put rows into the folder's tables {name: rows}, in place of those that agree with them in `by`.

    Rows stand in the order of their names (experiment, value) in `order`, then by seed. runs.csv is
    written last: a kill in between leaves rows of no run, which `drop_rows_of_no_run` removes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in sorted(tables, key=lambda name: name == "runs"):
        path = folder / f"{name}.csv"
        old = load_rows(path, as_text=True)
        new = pd.DataFrame(tables[name]).map(cell_text)
        kept = old[~names_of(old, by).isin(names_of(new, by))] if len(old) else old
        rows = pd.concat([kept, new], ignore_index=True) if len(kept) else new
        if set(RUN) <= set(rows):
            place = {key: i for i, key in enumerate(order)}
            places = names_of(rows, RUN[:2]).map(place).fillna(len(place))
            seeds = rows["seed"].astype(int)
            rows = rows.iloc[np.lexsort((seeds, places))]  # stable: steps stay in their order
        save_rows(path, rows)


def drop_rows_of_no_run(folder: Path) -> None:
    """Remove what a killed job left behind: half-written files, and rows whose run is not in runs.csv."""
    for aside in folder.glob("*.aside"):
        aside.unlink(missing_ok=True)
    known = names_of(load_rows(folder / "runs.csv", as_text=True), RUN)
    for path in folder.glob("*.csv"):
        rows = load_rows(path, as_text=True)
        if path.name == "runs.csv" or not set(RUN) <= set(rows) or rows.empty:
            continue
        has_run = names_of(rows, RUN).isin(known)
        if not has_run.all():
            save_rows(path, rows[has_run])


class Summary(NamedTuple):
    """Mean of n values, sample standard deviation, and half the width of the 95 % t interval."""

    mean: float
    std: float  # nan for one value
    half: float  # nan for one value
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.std:.2f}" if self.n > 1 else f"{self.mean:.2f}"


def summarise(values: Iterable[float]) -> Summary:
    """Mean, standard deviation (n - 1) and t interval of some seeds' values; not finite if one is not."""
    values = np.asarray(list(values), dtype=float)
    n = len(values)
    if n < 2:
        return Summary(values.mean() if n else math.nan, math.nan, math.nan, n)
    std = values.std(ddof=1)
    return Summary(values.mean(), std, stats.t.ppf(0.975, n - 1) * std / math.sqrt(n), n)


def markdown(rows: list[dict]) -> str:
    """A Markdown table of rows {column: cell}; cells stand as they are, numbers to the right."""
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)


def score_table(runs: pd.DataFrame, prefix: str, by: str = "value", name: str = "") -> list[dict]:
    """A row for every value of column `by`: accuracy, its interval, F1 and loss over the seeds.

    `prefix` is "val_" or "test_" or "", as the columns of `runs` begin. Accuracy and F1 in %.
    """
    table = []
    for value, found in runs.groupby(by, sort=False):
        accuracies = summarise(100 * found[f"{prefix}accuracy"])
        row = {name or by: value, "accuracy %": str(accuracies)}
        low, high = accuracies.mean - accuracies.half, accuracies.mean + accuracies.half
        row["95 % interval"] = f"{low:.2f} … {high:.2f}" if accuracies.n > 1 else "–"
        row["macro F1 %"] = str(summarise(100 * found[f"{prefix}macro_f1"]))
        losses = found[f"{prefix}loss"]
        row["loss (nats)"] = f"{losses.mean():.4f}" if np.isfinite(losses).all() else "not finite"
        row["n"] = accuracies.n
        if "status" in found and (found["status"] == "diverged").any():
            row["n"] = f"{accuracies.n}, {(found['status'] == 'diverged').sum()} diverged"
        table.append(row)
    return table


# -------- 3. Pictures -----------------------------------------------------------------------------

# eight colours that people with any colour vision tell apart (Okabe and Ito 2008), for unordered things
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]
STYLE = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


@contextlib.contextmanager
def picture(path: Path, title: str, n_rows=1, n_columns=1, width=11.0, height=4.6, **subplots):
    """A figure in the common style: gives its axes, and saves it as PNG when the block ends.

    Sizes in inches, 120 pixels each; the user's own matplotlib settings have no influence.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(width, height))
        figure.suptitle(title, fontsize=15)
        yield figure.subplots(n_rows, n_columns, **subplots)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside, open(aside, "wb") as file:
            figure.savefig(file, dpi=120, format="png")


def colors_of(values: list, ordered: bool) -> dict:
    """A colour for every value: a ramp where they have an order, else colours that look unlike."""
    palette = sns.color_palette("crest", len(values)) if ordered else COLORS
    return {value: palette[i % len(palette)] for i, value in enumerate(values)}


def t_interval(values) -> tuple[float, float]:
    """Ends of the 95 % t interval of the mean, for seaborn's error bars; the value itself if alone."""
    found = summarise(values)
    half = 0.0 if math.isnan(found.half) else found.half
    return found.mean - half, found.mean + half


def log_scale(axis, low: float, high: float) -> None:
    """Make an axis logarithmic, with plain numbers at 1, 2, 5 … or, within a decade, more of them."""
    axes = axis.axes
    (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
    decades = math.log10(high / low) if 0 < low < high else 1.0
    steps = (1, 1.5, 2, 3, 4, 5, 7) if decades < 1 else (1, 2, 5) if decades < 3 else (1,)
    axis.set_major_locator(matplotlib.ticker.LogLocator(subs=steps))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def legend_beside(axes: Axes, title: str | None = None) -> None:
    """Put the legend to the right of the panel, where it covers no data."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), title=title, fontsize=10)


def draw_curves(path: Path, history: pd.DataFrame, title: str) -> None:
    """The course of training: loss and accuracy, of training and of validation images alike.

    Lines are means over seeds, bands go from the lowest to the highest seed. Both losses are the
    plain cross-entropy in evaluation mode, so that the gap between them means something.
    """
    n_seeds = history["seed"].nunique()
    names = {"train": "training images", "val": "validation images"}
    bands = f"mean, lowest and highest of {n_seeds} seeds" if n_seeds > 1 else "1 seed"
    with picture(path, f"{title} ({bands})", n_columns=2) as (left, right):
        for (part, name), color in zip(names.items(), COLORS, strict=False):
            style = {"errorbar": ("pi", 100), "color": color, "label": name}
            draw_line(left, history, "step", f"{part}_loss", **style)
            percent = history.assign(**{f"{part}_accuracy": 100 * history[f"{part}_accuracy"]})
            draw_line(right, percent, "step", f"{part}_accuracy", **style)
        losses = history[["train_loss", "val_loss"]].to_numpy()
        losses = losses[np.isfinite(losses)]
        if len(losses) and losses.min() > 0:
            log_scale(left.yaxis, losses.min(), losses.max())
        left.set(xlabel="training step", ylabel="loss (nats, log scale)")
        right.set(xlabel="training step", ylabel="accuracy (%)")
        accuracies = 100 * history[["train_accuracy", "val_accuracy"]].to_numpy()
        if accuracies.max() > 80:  # the last points are what matters
            right.set_ylim(max(accuracies.min(), 2 * np.median(accuracies) - 100), 100.1)
        left.legend()
        right.legend(loc="lower right")


def draw_line(axes: Axes, rows: pd.DataFrame, x: str, y: str, **style) -> None:
    """seaborn's line of the mean of y over x, with its band; rows that are not finite are left out."""
    finite = rows[np.isfinite(rows[y])]
    if len(finite):
        sns.lineplot(finite, x=x, y=y, ax=axes, legend=False, **style)


def draw_sweep(
    path: Path, runs: pd.DataFrame, history: pd.DataFrame, title: str, varied: str, ordered=True
) -> None:
    """What one setting does: validation accuracy of every value, and its loss in the course of training.

    Bars are the 95 % t interval of the mean over seeds, bands go from the lowest to the highest seed.
    """
    values = list(dict.fromkeys(runs["value"]))
    n_seeds = runs["seed"].nunique()
    colors = colors_of(values, ordered)
    bars = f"{n_seeds} seeds: 95 % t interval left, range right" if n_seeds > 1 else "1 seed"
    with picture(path, f"{title}\n({bars})", n_columns=2, width=13, height=5) as (left, right):
        draw_points(
            left, runs.assign(percent=100 * runs["val_accuracy"]), "value", "percent", colors
        )
        left.set(xlabel=varied, ylabel="validation accuracy (%)")
        kept = history[history["value"].isin(runs.loc[runs["status"] == "ok", "value"])]
        for value, rows in history.groupby("value", sort=False):
            style = {"color": colors[value], "label": value, "errorbar": ("pi", 100)}
            draw_line(right, rows, "step", "val_loss", marker="o", markersize=4, **style)
        losses = kept.loc[np.isfinite(kept["val_loss"]) & (kept["val_loss"] > 0), "val_loss"]
        if len(losses):  # a run that diverged leaves the picture at the top
            log_scale(right.yaxis, losses.min(), losses.max())
            right.set_ylim(0.9 * losses.min(), 1.1 * losses.max())
        lengths = history.groupby("value")["step"].max()
        if lengths.max() > 10 * lengths.min():
            log_scale(right.xaxis, history["step"].min(), lengths.max())
        right.set(xlabel="training step", ylabel="validation loss (nats, log scale)")
        legend_beside(right, varied)


def draw_points(axes: Axes, rows: pd.DataFrame, x: str, y: str, colors: dict) -> None:
    """A point for every value of x, with its t interval and, above it, the mean."""
    sns.pointplot(
        rows,
        x=x,
        y=y,
        hue=x,
        palette=colors,
        errorbar=t_interval,
        capsize=0.15,
        ax=axes,
        legend=False,
    )
    means = rows.groupby(x, sort=False)[y].mean()
    for place, mean in enumerate(means):
        offset = {"xytext": (6, 6), "textcoords": "offset points", "fontsize": 10}
        axes.annotate(f"{mean:.2f}", (place, mean), **offset)
    longest = max(len(str(value)) for value in means.index)
    if longest * len(means) > 48:
        axes.tick_params("x", rotation=40)
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right")


def draw_lines(
    path: Path, rows: pd.DataFrame, x: str, y: str, by: str, title: str, **labels
) -> None:
    """One line for each value of column `by`: the mean of y over x with its 95 % t interval.

    `labels` are matplotlib's: xlabel, ylabel, and xscale="log", yscale="log" for plain log axes.
    """
    scales = {name: labels.pop(name, "linear") for name in ("xscale", "yscale")}
    with picture(path, title, width=9.5) as axes:
        colors = colors_of(list(dict.fromkeys(rows[by])), ordered=False)
        for name, found in rows.groupby(by, sort=False):
            style = {"errorbar": t_interval, "err_style": "bars", "err_kws": {"capsize": 4}}
            draw_line(axes, found, x, y, marker="o", color=colors[name], label=name, **style)
        for axis, column, scale in (
            (axes.xaxis, x, scales["xscale"]),
            (axes.yaxis, y, scales["yscale"]),
        ):
            positive = rows.loc[np.isfinite(rows[column]) & (rows[column] > 0), column]
            if scale == "log" and len(positive):
                log_scale(axis, positive.min(), positive.max())
        axes.set(**labels)
        legend_beside(axes)


def draw_heatmap(
    path: Path, rows: pd.DataFrame, index: str, columns: str, y: str, title: str, **labels
) -> None:
    """A cell for every pair of index and column: the mean of y and, below it, its lowest and highest."""
    table = rows.pivot_table(y, index, columns, aggfunc=["mean", "min", "max"])
    mean, low, high = table["mean"], table["min"], table["max"]
    cells = mean.map("{:.2f}".format)
    if rows.groupby([index, columns]).size().max() > 1:
        cells = cells + "\n" + low.map("{:.2f}".format) + " … " + high.map("{:.2f}".format)
    with picture(path, title, width=10, height=5.5) as axes:
        label = {"label": labels.pop("colorbar")}
        sns.heatmap(
            mean,
            annot=cells,
            fmt="",
            cmap="crest",
            ax=axes,
            cbar_kws=label,
            annot_kws={"fontsize": 10},
        )
        axes.set(**labels)


def draw_confusion(path: Path, matrix, class_names, title: str) -> None:
    """The confusion matrix: counts in the cells, colour by share of the true class (log: errors show)."""
    matrix = check_matrix(matrix).numpy()
    share = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    counts_or_dot = np.where(matrix > 0, np.char.mod("%d", matrix), "·")
    norm = matplotlib.colors.LogNorm(vmin=0.05, vmax=100)
    names = {"xticklabels": class_names, "yticklabels": class_names}
    with picture(path, title, width=8.5, height=7.5) as axes:
        sns.heatmap(
            np.maximum(share, 0.05), annot=counts_or_dot, fmt="", cmap="Blues", norm=norm, square=True, ax=axes,
            cbar_kws={"label": "share of the true class (%, log scale)", "format": "%g"}, **names,
        )  # fmt: skip
        axes.set(xlabel="predicted class", ylabel="true class")
        axes.tick_params("y", rotation=0)


def draw_faults(path: Path, rows: pd.DataFrame, title: str) -> None:
    """A panel for each fault: the number that was measured, broken and mended, each by its own name.

    `rows`: fault, measured (what the number is), variant "broken" or "mended", value, number.
    """
    faults = list(dict.fromkeys(rows["fault"]))
    n_rows = math.ceil(len(faults) / 2)
    with picture(
        path, title, n_rows, 2, width=13, height=1.75 * n_rows + 0.8, squeeze=False
    ) as panels:
        for axes, fault in zip(panels.flat, faults, strict=False):
            found = rows[rows["fault"] == fault]
            colors = {"broken": COLORS[1], "mended": COLORS[0]}
            variants = list(zip(found["value"], found["variant"], strict=True))
            palette = {value: colors[variant] for value, variant in variants}
            sns.barplot(
                found, y="value", x="number", hue="value", palette=palette, errorbar=t_interval, ax=axes,
                legend=False, width=0.6, err_kws={"linewidth": 1.5}, capsize=0.2,
            )  # fmt: skip
            means = found.groupby("value", sort=False)["number"].mean()
            for place, mean in enumerate(means):
                label = f"{mean:.3g}" if np.isfinite(mean) else "not finite"
                at = max(mean, 0) if np.isfinite(mean) else 0
                box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
                offset = {"xytext": (8, 9), "textcoords": "offset points"}
                axes.annotate(
                    f" {label}", (at, place), va="center", fontsize=11, bbox=box, **offset
                )
            axes.set_title(fault, loc="left")
            axes.set(xlabel=found["measured"].iloc[0], ylabel="")
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.margins(x=0.18)
        for axes in panels.flat[len(faults) :]:
            axes.remove()


def draw_ratios(path: Path, rows: pd.DataFrame, title: str) -> None:
    """A bar for every comparison: our time over the peer's, lower is better, 1 is equal.

    `rows`: name (of the comparison), ratio; several rows of a name are repeats, whose range is shown.
    """
    height = 0.55 * rows["name"].nunique() + 1.6
    with picture(path, title, width=11, height=height) as axes:
        sns.barplot(
            rows, y="name", x="ratio", color=COLORS[0], errorbar=("pi", 100), ax=axes, capsize=0.2
        )
        for place, ratio in enumerate(rows.groupby("name", sort=False)["ratio"].median()):
            axes.annotate(
                f" {ratio:.2f}", (0, place), va="center", color="white", fontweight="bold"
            )
        axes.axvline(1, color=COLORS[1], linestyle="--")
        axes.set(xlabel="our time / the other's (lower is better, 1 is equal)", ylabel="")
