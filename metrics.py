"""Classification metrics by hand (评估指标); tables, pictures, progress: what the stages share.

Everything in part 1 follows from the confusion matrix (混淆矩阵), whose row is the true class and
whose column the predicted one.

                 predicted c      predicted other
    true c       TP  真正例        FN  假反例            precision 精确率 = TP / (TP + FP)
    true other   FP  假正例        TN  真反例            recall    召回率 = TP / (TP + FN)

    accuracy 准确率 = (TP + TN) / (TP + TN + FP + FN); of C classes, the share of the diagonal
    F1值 = 2 · precision · recall / (precision + recall) = 2 TP / (2 TP + FP + FN)

    1. Metrics   2. Tables   3. Pictures   4. Progress on a screen
"""

import contextlib
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
import unicodedata
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

os.environ["MPLBACKEND"] = (
    "agg"  # pictures go to files; a notebook's own setting must not reach a script
)

import joblib
import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterMathtext, LogLocator, MaxNLocator, NullLocator
from scipy import stats

# -------- 1. Metrics ------------------------------------------------------------------------------


class Counts(NamedTuple):
    """Of each class: rightly named, wrongly named, missed, rightly left alone; (C,) int64."""

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
    # a pair (true, predicted) is one cell of the matrix laid out flat: no loop over samples
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
    """准确率: sum of TP over all samples; every sample is the TP or the FN of its own class.

    With two classes this is (TP + TN) / (TP + TN + FP + FN) of either.
    """
    c = counts(matrix)
    return c.tp.sum().item() / (c.tp + c.fn).sum().item()


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
    """召回率 TP / (TP + FN): of the samples that are c, the share named c; else as `precision`."""
    c = counts(matrix)
    return average_ratio(c.tp, c.tp + c.fn, c.tp + c.fn, average, zero_division)


def f1(matrix, average: str | None = None, zero_division: float = 0.0):
    """F1值 2 TP / (2 TP + FP + FN), the harmonic mean of precision and recall; else as `precision`.

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
    """What every run is judged by: accuracy, and macro precision, recall and F1."""
    return {
        "accuracy": accuracy(matrix),
        "macro_precision": precision(matrix, "macro"),
        "macro_recall": recall(matrix, "macro"),
        "macro_f1": f1(matrix, "macro"),
    }


def report(matrix, class_names=None) -> str:
    """A table to read: precision, recall, F1 and support of every class, then the averages."""
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
        raise ValueError(f"{name} must be a non-empty list of labels, (N,), not of shape {shape}")
    if values.is_floating_point() or values.is_complex():
        raise ValueError(f"{wanted}, not {values.dtype} such as {values[0].item()}")
    labels = values.to(device, torch.int64)
    for extreme in labels.aminmax():
        if not 0 <= extreme < n_classes:
            raise ValueError(f"{name} has the label {extreme.item()}, outside 0 … {n_classes - 1}")
    return labels


def check_matrix(matrix) -> torch.Tensor:
    """A confusion matrix as int64 (C, C) on the CPU, where float64 exists; else ValueError."""
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
    """A saved table, or an empty one if there is no such file; ValueError names a damaged one.

    as_text leaves every cell as it was written, so that saving it again changes nothing.
    """
    if not path.exists():
        return pd.DataFrame(columns=RUN)
    kinds = {"dtype": str, "keep_default_na": False} if as_text else {"dtype": {"value": str}}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # Excel begins with a mark
            rows = pd.read_csv(file, **kinds)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, or bring it back") from None
    if "experiment" not in rows or not rows["experiment"].astype(bool).all():
        raise ValueError(f"{path} is damaged: not every row names its experiment")
    return rows


@contextlib.contextmanager
def written_aside(path: Path):
    """Give a path to write to, and rename it once it is complete: nobody ever meets half a file."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.aside")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def save_rows(path: Path, rows: pd.DataFrame) -> None:
    with written_aside(path) as aside, open(aside, "w", encoding="utf-8", newline="") as file:
        rows.to_csv(file, index=False, lineterminator="\n")


def cell_text(value) -> str:
    """A cell as it is saved: floats to 6 significant digits."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def names_of(rows: pd.DataFrame) -> pd.Series:
    """The run that each row belongs to, or its experiment where rows are of no run, as one text."""
    names = rows["experiment"].astype(str)
    for column in RUN[1:]:
        if column in rows:
            names = names + "\t" + rows[column].astype(str)
    return names


def replace_rows(folder: Path, tables: dict[str, list[dict]], order: list[tuple]) -> None:
    """Put rows {table: [row]} into the folder's tables, in place of those of the same runs.

    Rows stand in the `order` of their (experiment, value), then by seed. runs.csv comes last: a
    kill before it leaves rows of no run, which `drop_rows_of_no_run` removes.
    """
    place = {name: i for i, name in enumerate(order)}
    for table in sorted(tables, key=lambda table: table == "runs"):
        path = folder / f"{table}.csv"
        rows = pd.DataFrame(tables[table]).map(cell_text)
        kept = load_rows(path, as_text=True)
        kept = kept[~names_of(kept).isin(names_of(rows))]
        if len(kept):
            rows = pd.concat([kept, rows], ignore_index=True).fillna("")
        if "seed" in rows:
            keys = zip(rows["experiment"], rows["value"], strict=True)
            places = [place.get(key, len(place)) for key in keys]
            rows = rows.iloc[np.lexsort((rows["seed"].astype(int), places))]  # stable within a run
        save_rows(path, rows)


def remove_runs(folder: Path, is_removed) -> None:
    """Forget the rows of runs.csv where is_removed (n,) is true, and all that is known of them."""
    runs = load_rows(folder / "runs.csv", as_text=True)
    if np.any(is_removed):
        save_rows(folder / "runs.csv", runs[~np.asarray(is_removed)])
        drop_rows_of_no_run(folder)


def drop_rows_of_no_run(folder: Path) -> None:
    """Remove what a killed job left: half-written files, and rows whose run is not in runs.csv."""
    for aside in folder.glob("*.aside"):
        aside.unlink(missing_ok=True)
    runs = names_of(load_rows(folder / "runs.csv", as_text=True))
    for path in folder.glob("*.csv"):
        rows = load_rows(path, as_text=True)
        if "seed" in rows and not names_of(rows).isin(runs).all():
            save_rows(path, rows[names_of(rows).isin(runs)])


class Summary(NamedTuple):
    """Mean of n values, standard deviation (n - 1), half the width of the 95 % t interval."""

    mean: float
    std: float  # nan for one value
    half: float  # nan for one value
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.std:.2f}" if self.n > 1 else f"{self.mean:.2f}"


def summarise(values: Iterable[float]) -> Summary:
    """What n seeds gave; not finite as soon as one of them is not."""
    values = np.asarray(list(values), dtype=float)
    n = len(values)
    if n < 2:
        return Summary(values[0] if n else math.nan, math.nan, math.nan, n)
    with np.errstate(invalid="ignore"):
        std = values.std(ddof=1)
    half = stats.t.ppf(0.975, n - 1) * std / math.sqrt(n)
    return Summary(values.mean(), std, half, n)


def markdown(rows: list[dict] | pd.DataFrame) -> str:
    """A Markdown table of rows {column: cell}, the first column left, the others right."""
    cells = pd.DataFrame(rows).map(cell_text)
    sides = ("left", *["right"] * (cells.shape[1] - 1))
    return cells.to_markdown(index=False, disable_numparse=True, colalign=sides)


def score_table(
    runs: pd.DataFrame, prefix: str, by: str = "value", heading: str = "", all_scores: bool = False
) -> str:
    """Markdown, a line for every value of column `by`: accuracy, its t interval and the loss.

    `prefix` is "val_" or "test_". `all_scores` adds macro precision, recall and F1, which on
    classes of nearly equal size say what accuracy says. Scores in %, mean ± standard deviation over
    n seeds; the loss is a mean, in nats.
    """
    table = []
    for value, found in runs.groupby(by, sort=False):
        accuracy = summarise(100 * found[f"{prefix}accuracy"])
        n_diverged = (found["status"] == "diverged").sum()
        low = max(accuracy.mean - accuracy.half, 0.0)
        high = min(accuracy.mean + accuracy.half, 100.0)
        line = {heading or by: value, "accuracy %": str(accuracy)}
        line["95 % t interval"] = f"{low:.2f} … {high:.2f}" if accuracy.n > 1 else "–"
        for score in ("precision", "recall", "F1") if all_scores else ():
            column = f"{prefix}macro_{score.lower()}"
            line[f"macro {score} %"] = str(summarise(100 * found[column]))
        line["loss (nats)"] = f"{found[f'{prefix}loss'].mean(skipna=False):.4f}"
        line["parameters"] = f"{found['parameters'].iloc[0]:,.0f}"
        line["n"] = f"{accuracy.n}, {n_diverged} diverged" if n_diverged else str(accuracy.n)
        table.append(line)
    return markdown(table)


def ratio_table(rows: pd.DataFrame) -> str:
    """Markdown of benchmark.csv: both times to three digits, and the first over the second."""
    columns = ["name", "first", "second", "unit", "ratio", "device", "threads"]
    digits = {"first": "{:.3g}", "second": "{:.3g}", "ratio": "{:.2f}"}
    texts = {column: rows[column].map(form.format) for column, form in digits.items()}
    return markdown(rows.assign(**texts)[columns])


def spans_powers_of_ten(numbers: pd.Series) -> bool:
    """Whether the numbers (all above 0) differ a thousandfold: then only their logarithms compare,
    and their mean is the geometric one."""
    return numbers.min() > 0 and numbers.max() > 1000 * numbers.min()


def fault_table(faults: pd.DataFrame, symptoms: dict[str, str]) -> str:
    """Markdown, a line a fault: its sign, what is measured, and the number broken and mended."""
    table = []
    for name, rows in faults.groupby("fault", sort=False):
        row = {"fault": name, "sign": symptoms[name], "measured": rows["measured"].iloc[0]}
        geometric = spans_powers_of_ten(rows["number"])
        for variant in ("broken", "mended"):
            found = rows[rows["variant"] == variant]
            value = found["value"].iloc[0] if len(found) else "–"
            if geometric:
                mean = stats.gmean(found["number"])
                low = found["number"].min()
                high = found["number"].max()
                row[variant] = (
                    f"{value}: {mean:.2g} ({low:.2g} … {high:.2g}; geometric mean, range)"
                )
            else:
                number = summarise(found["number"])
                spread = f" ± {number.std:.2g}" if number.n > 1 else ""
                row[variant] = f"{value}: {number.mean:.3g}{spread}"
        table.append(row | {"n": rows["seed"].nunique()})
    return markdown(table)


def write_sections(path: Path, title: str, sections: dict[str, list[str]]) -> None:
    """A Markdown file: title, what ± means, contents, and the sections {heading: paragraphs}."""
    note = "Mean ± sample standard deviation over n seeds, and the 95 % t interval of the mean."
    contents = "\n".join(f"- [{heading}](#{anchor_of(heading)})" for heading in sections)
    parts = [f"# {title}", note, contents]
    for heading, paragraphs in sections.items():
        parts += [f"## {heading}", *paragraphs]
    with written_aside(path) as aside:
        aside.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def anchor_of(heading: str) -> str:
    """What GitHub makes of a heading for links: small letters, no signs, "-" for a space."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# -------- 3. Pictures -----------------------------------------------------------------------------

# colours that people with any colour vision tell apart (Okabe and Ito 2008), for unordered things
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
        figure = Figure(figsize=(width, height), dpi=120)
        figure.suptitle(title, fontsize=15)
        yield figure.subplots(n_rows, n_columns, **subplots)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside, open(aside, "wb") as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # a name in Chinese
            FigureCanvasAgg(figure).print_png(file)  # savefig would lay it out and draw it twice


class Pictures:
    """Calls that draw a picture each, put off so that several are drawn at a time."""

    def __init__(self):
        self.calls = []

    def add(self, draw, path: Path, *arguments, **options) -> None:
        """Put off draw(path, …), which writes the picture to the path."""
        self.calls.append(joblib.delayed(draw)(path, *arguments, **options))

    def draw(self) -> None:
        """Carry out the calls: on Linux by forked copies of this process, one a core, which have
        nothing to import or load; elsewhere one after the other."""
        n_jobs = max(1, min(joblib.cpu_count(), len(self.calls)))
        options = {"initializer": leave_signals, "max_nbytes": None, "batch_size": 1}
        if sys.platform == "linux":
            parallel = joblib.Parallel(n_jobs, multiprocessing.get_context("fork"), **options)
        else:
            parallel = joblib.Parallel(1)
        try:
            parallel(self.calls)
        except BaseException:  # the copies were ended, perhaps while they wrote
            for _, (path, *_), _ in self.calls:
                for aside in path.parent.glob(f"{path.name}.*.aside"):
                    aside.unlink(missing_ok=True)
            raise


def leave_signals() -> None:
    """In a copy: the first process answers Ctrl-C and SIGTERM, and ends its copies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def colors_of(values: list, ordered: bool) -> dict:
    """A colour for every value: a ramp where they have an order, else colours that look unlike."""
    palette = sns.color_palette("crest", len(values)) if ordered else COLORS
    return {value: palette[i % len(palette)] for i, value in enumerate(values)}


def t_interval(values) -> tuple[float, float]:
    """Ends of the 95 % t interval of the mean, for seaborn; of one value, the value itself."""
    found = summarise(values)
    half = 0.0 if math.isnan(found.half) else found.half
    return found.mean - half, found.mean + half


def bands_of(rows: pd.DataFrame) -> str:
    """What the bands and bars of these rows are, for a title."""
    n_seeds = rows["seed"].nunique()
    return f"(mean, lowest and highest of {n_seeds} seeds)" if n_seeds > 1 else "(1 seed)"


def log_scale(axis, numbers: pd.Series) -> None:
    """Make the axis of these numbers logarithmic, with ticks at 1, 2, 5 …; tiny ones at 10⁻⁵ …"""
    positive = numbers[np.isfinite(numbers) & (numbers > 0)]
    if positive.empty:
        return
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    decades = math.log10(positive.max() / positive.min())
    if decades < 0.35:
        steps = (1, 1.2, 1.4, 1.6, 1.8, 2, 2.2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9)
    elif decades < 1:
        steps = (1, 1.5, 2, 3, 4, 5, 7)
    else:
        steps = (1, 2, 5) if decades < 3 else (1,)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter("{x:g}" if positive.min() > 5e-5 else LogFormatterMathtext())
    axis.set_minor_locator(NullLocator())


def legend_beside(axes: Axes, title: str | None = None) -> None:
    """Put the legend to the right of the panel, where it covers no data."""
    if axes.get_legend_handles_labels()[0]:
        title = textwrap.fill(title, 18) if title else None  # a long one would press the panel
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), title=title, fontsize=10)


def draw_line(axes: Axes, rows: pd.DataFrame, x: str, y: str, **style) -> None:
    """seaborn's line of the mean of y over x with its band; what is not finite is left out."""
    finite = rows[np.isfinite(rows[y])]
    if len(finite):
        estimator = "mean" if finite[x].duplicated().any() else None  # of one seed, no mean
        sns.lineplot(finite, x=x, y=y, ax=axes, estimator=estimator, legend=False, **style)


def draw_curves(
    path: Path, history: pd.DataFrame, title: str, beside: pd.DataFrame | None = None
) -> None:
    """The course of training: loss and accuracy, of training and of validation images alike.

    Lines are means over seeds, bands go from the lowest to the highest seed. Both losses are the
    plain cross-entropy in evaluation mode, so that the gap between them means something. `beside`
    is the history of all models whose pictures are laid side by side: they share their scales.
    """
    percent = history.copy()
    percent[["train_accuracy", "val_accuracy"]] *= 100
    of_all = history if beside is None else beside
    losses = pd.concat([of_all["train_loss"], of_all["val_loss"]])
    losses = losses[np.isfinite(losses)]
    with picture(path, f"{title}\n{bands_of(history)}", n_columns=2) as (left, right):
        for part, name, color in (
            ("train", "training images", COLORS[0]),
            ("val", "validation images", COLORS[1]),
        ):
            style = {"errorbar": ("pi", 100), "color": color, "label": name}
            draw_line(left, percent, "step", f"{part}_loss", **style)
            draw_line(right, percent, "step", f"{part}_accuracy", **style)
        log_scale(left.yaxis, losses)
        left.set(xlabel="training step", ylabel="loss (nats, log scale)")
        right.set(xlabel="training step", ylabel="accuracy (%)")
        if beside is not None and len(losses):
            left.set_ylim(0.95 * losses.min(), 1.05 * losses.max())
            lowest = 100 * of_all[["train_accuracy", "val_accuracy"]].min(axis=None)
            right.set_ylim(lowest - 0.5, 100.1)
        if left.lines:  # nothing is drawn of a run that diverged at once
            left.legend()
            right.legend(loc="lower right")


def draw_sweep(
    path: Path, runs: pd.DataFrame, history: pd.DataFrame, title: str, varied: str, ordered=True
) -> None:
    """What one setting does: each value's validation accuracy, and its loss during training.

    Bars are the 95 % t interval of the mean, bands go from the lowest to the highest seed.
    """
    n_seeds = runs["seed"].nunique()
    left_shows = "left: every seed, mean and 95 % t interval"
    bars = f"{n_seeds} seeds; {left_shows}; right: mean, lowest and highest"
    bars = bars if n_seeds > 1 else "1 seed"
    colors = colors_of(list(dict.fromkeys(runs["value"])), ordered)
    runs = runs.assign(percent=100 * runs["val_accuracy"])
    with picture(path, f"{title}\n({bars})", n_columns=2, width=13, height=5) as (left, right):
        draw_points(left, runs, "value", "percent", colors, highest=101)
        low, high = left.get_ylim()
        widen = max(0, 2 - (high - low)) / 2  # 2 points at least: what is alike shall look alike
        low = max(low - widen, 0)
        high = min(high + widen, 102)  # an interval of few seeds may reach beyond
        left.set_ylim(low, high)
        left.set_yticks([tick for tick in left.get_yticks() if low <= tick <= min(high, 100)])
        left.set(xlabel=varied, ylabel="validation accuracy (%)")
        for value, rows in history.groupby("value", sort=False):
            style = {"color": colors[value], "label": value, "errorbar": ("pi", 100)}
            style |= {"marker": "o", "markersize": 3, "markeredgewidth": 0}
            draw_line(right, rows, "step", "val_loss", **style)
        well = history["value"].isin(runs.loc[runs["status"] == "ok", "value"])
        losses = history.loc[well & np.isfinite(history["val_loss"]), "val_loss"]
        log_scale(right.yaxis, losses)
        if len(losses):  # a run that diverged leaves the picture at the top
            right.set_ylim(0.9 * losses.min(), 1.1 * losses.max())
        lengths = history.groupby("value")["step"].max()
        if lengths.max() > 10 * lengths.min():
            log_scale(right.xaxis, history["step"])
        right.set(xlabel="training step", ylabel="validation loss (nats, log scale)")
        legend_beside(right, varied)


def draw_points(
    axes: Axes, rows: pd.DataFrame, x: str, y: str, colors: dict, highest: float = math.inf
) -> None:
    """For every value of x its seeds as small dots, their mean with its t interval and as a number.

    No text stands higher than `highest`, whatever the interval of few seeds may reach.
    """
    style = {"hue": x, "palette": colors, "errorbar": t_interval, "capsize": 0.15}
    sns.pointplot(rows, x=x, y=y, ax=axes, legend=False, **style)
    groups = rows.groupby(x, sort=False)[y]
    for place, (value, found) in enumerate(groups):
        across = np.full(len(found), place - 0.2)
        axes.plot(across, found, "o", color=colors[value], markersize=4, alpha=0.6)
        top = min(t_interval(found)[1], highest)
        text = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center", "fontsize": 10}
        axes.annotate(f"{found.mean():.2f}", (place, top), **text)
    axes.margins(y=0.12)  # room for the numbers
    width = max(8, 45 // groups.ngroups)  # letters in a line below a point
    names = [wrapped(str(value), width) for value, _ in groups]
    longest = max(len(line) for name in names for line in name.splitlines())
    fits = longest * len(names) <= 45
    axes.set_xticks(range(len(names)), names, fontsize=12 if fits else 9)


def wrapped(text: str, width: int) -> str:
    """The text in lines of `width` letters, broken at spaces alone; its own breaks are kept."""
    style = {"break_long_words": False, "break_on_hyphens": False}
    return "\n".join(textwrap.fill(line, width, **style) for line in text.splitlines())


def draw_lines(
    path: Path,
    rows: pd.DataFrame,
    columns: tuple[str, str, str],
    title: str,
    logarithmic="xy",
    **labels,
) -> None:
    """Columns (x, y, by): for each `by` the mean of y over x, with lowest and highest seed.

    `logarithmic` names the axes that are; `labels` are matplotlib's xlabel and ylabel.
    """
    x, y, by = columns
    rows = rows[np.isfinite(rows[y])]
    colors = colors_of(list(dict.fromkeys(rows[by])), ordered=False)
    with picture(path, f"{title}\n{bands_of(rows)}", width=10) as axes:
        for name, found in rows.groupby(by, sort=False):
            style = {"errorbar": ("pi", 100), "err_style": "bars", "err_kws": {"capsize": 4}}
            draw_line(axes, found, x, y, marker="o", color=colors[name], label=name, **style)
        if "x" in logarithmic:
            log_scale(axes.xaxis, rows[x])
        if rows[x].nunique() <= 8:  # a tick for each value that was tried, and no other
            axes.set_xticks(sorted(rows[x].unique()))
        if "y" in logarithmic:
            log_scale(axes.yaxis, rows[y])
        axes.set(**labels)
        legend_beside(axes)


def annotated_cells(axes: Axes, numbers, cells, **style) -> None:
    """seaborn's heatmap with a text in each cell; the texts need no room outside the panel."""
    sns.heatmap(numbers, annot=cells, fmt="", ax=axes, **style)
    for text in axes.texts:
        text.set_in_layout(False)  # or each is measured, twice, to lay the picture out
    axes.tick_params("y", rotation=0)
    axes.grid(False)


def draw_heatmap(
    path: Path,
    rows: pd.DataFrame,
    columns: tuple[str, str, str],
    title: str,
    colorbar: str,
    lowest: float | None = None,
    **labels,
) -> None:
    """Columns (down, across, number): in a cell the mean and, below, lowest and highest seed.

    Means below `lowest` have the colour of the colour bar's end.
    """
    down, across, number = columns
    order = {"index": rows[down].unique(), "columns": rows[across].unique()}
    table = rows.pivot_table(number, down, across, aggfunc=["mean", "min", "max"])
    mean, low, high = (table[name].reindex(**order) for name in ("mean", "min", "max"))
    cells = mean.map("{:.2f}".format)
    if rows["seed"].nunique() > 1:
        cells += "\n" + low.map("{:.2f}".format) + " … " + high.map("{:.2f}".format)
    height = 2 + 0.75 * len(mean)
    with picture(path, f"{title}\n{bands_of(rows)}", width=10, height=height) as axes:
        bar = {"label": colorbar, "extend": "neither" if lowest is None else "min"}
        annotated_cells(axes, mean, cells, cmap="crest", vmin=lowest, cbar_kws=bar)
        axes.set(**labels)


def draw_confusion(path: Path, matrix, class_names, title: str) -> None:
    """The confusion matrix: counts in the cells, colour by share of the true class (log scale)."""
    matrix = check_matrix(matrix).numpy()
    share = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    cells = np.where(matrix > 0, np.char.mod("%d", matrix), "·")
    style = {
        "norm": matplotlib.colors.LogNorm(vmin=0.05, vmax=100),  # so that errors show
        "cbar_kws": {"label": "share of the true class (%, log scale)", "format": "%g"},
        "xticklabels": class_names,
        "yticklabels": class_names,
    }
    with picture(path, title, width=8.5, height=7.5) as axes:
        annotated_cells(axes, np.maximum(share, 0.05), cells, cmap="Blues", square=True, **style)
        axes.set(xlabel="predicted class", ylabel="true class")


def draw_faults(path: Path, rows: pd.DataFrame, title: str) -> None:
    """A panel a fault: the number that was measured, broken and mended, each by its own name.

    `rows`: fault, measured (what the number is), variant "broken" or "mended", value, number.
    """
    colors = {"broken": COLORS[1], "mended": COLORS[0]}
    by_fault = dict(list(rows.groupby("fault", sort=False)))
    n_rows = math.ceil(len(by_fault) / 2)
    size = {"width": 13, "height": 2 * n_rows + 0.8, "squeeze": False}
    with picture(path, f"{title}\n{bands_of(rows)}", n_rows, 2, **size) as panels:
        panels[0, 0].figure.get_layout_engine().set(wspace=0.05, hspace=0.08)
        for axes, (fault, found) in zip(panels.flat, by_fault.items(), strict=False):
            found = found.sort_values("variant", kind="stable")  # broken above mended
            names = found.drop_duplicates("value")
            palette = dict(zip(names["value"], names["variant"].map(colors), strict=True))
            geometric = spans_powers_of_ten(found["number"])
            mean_of = stats.gmean if geometric else np.mean
            style = {"hue": "value", "palette": palette, "errorbar": ("pi", 100), "capsize": 0.2}
            style |= {"estimator": mean_of, "legend": False, "width": 0.6}
            sns.barplot(found, y="value", x="number", ax=axes, **style)
            means = found.groupby("value", sort=False)["number"].agg(mean_of)
            largest = means.max()
            for place, mean in enumerate(means):
                label = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 12}
                axes.text(1.01, place, f"{mean:.3g}", **label)
            axes.set_title(fault, loc="left")
            axes.set(xlabel=found["measured"].iloc[0], ylabel="")
            if geometric:
                axes.set(xscale="log", xlim=(found["number"].min() / 10, found["number"].max() * 3))
                axes.set_xlabel(f"{found['measured'].iloc[0]} (log scale, geometric mean)")
            else:
                axes.xaxis.set_major_locator(MaxNLocator(5))
                if largest > 0:
                    axes.set_xlim(left=min(0, means.min()))
        for axes in panels.flat[len(by_fault) :]:
            axes.remove()


def draw_ratios(path: Path, rows: pd.DataFrame, title: str) -> None:
    """A bar from 1 for every comparison: to the left the first is faster, to the right the second.

    `rows`: name ("first / second"), ratio of their times. On a log scale half and double the time
    are equally far from 1.
    """
    with picture(path, title, width=12, height=0.62 * len(rows) + 1.6) as axes:
        names = [name.replace(" / ", "\n/ ") for name in rows["name"]]
        colors = np.where(rows["ratio"] < 1, COLORS[0], COLORS[1])
        axes.barh(range(len(rows)), rows["ratio"] - 1, left=1, height=0.6, color=colors)
        for place, ratio in enumerate(rows["ratio"]):
            text = {"va": "center", "fontsize": 12, "transform": axes.get_yaxis_transform()}
            axes.text(1.01, place, f"{ratio:.2f}", **text)
        log_scale(axes.xaxis, pd.concat([rows["ratio"], pd.Series([1.0])]))
        axes.axvline(1, color="black")
        axes.set_yticks(range(len(rows)), names, fontsize=11)
        axes.set_ylim(len(rows) - 0.5, -0.5)  # the first on top
        axes.grid(False, axis="y")
        axes.set_xlabel(
            "time of the first / of the second (log scale); below 1: the first is faster"
        )


# -------- 4. Progress on a screen -----------------------------------------------------------------


@contextlib.contextmanager
def ticking(bar):
    """Draw a tqdm bar anew every second, so that its clock goes on while nothing ends."""
    is_over = threading.Event()

    def tick() -> None:
        while not is_over.wait(1):
            bar.refresh()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def print_beside_bar(line: str) -> None:
    """Print a line over a bar that another process may have drawn; the bar comes again below."""
    if sys.stdout.isatty() and sys.stderr.isatty():
        line = "\r" + line.ljust(shutil.get_terminal_size().columns - 1)
    print(line, flush=True)
