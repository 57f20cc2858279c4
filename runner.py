"""The shared code of stages 2 and 3, transitional: it keeps the rows of finished runs safe, draws
tables and pictures from saved rows alone, reads data sets, runs jobs, times works against each
other and parses the command line. It goes when these stages are standalone, as stage 1 is.
"""

import argparse
import atexit
import contextlib
import csv
import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from tqdm import tqdm

from metrics import check_matrix, report, written_aside

HERE = Path(__file__).resolve().parent

# -------- 1. Rows: what a run measured, saved so that nothing is lost and nothing is half-written -


@contextlib.contextmanager
def claimed(folder: Path):
    """Make the folder, and keep other jobs' hands off it until the block ends: OSError if one is at
    work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.parent / f".{folder.name}.lock", timeout=0):
            yield
    except Timeout:
        raise OSError(
            f"another job is at work in {folder}: wait for its end, or name another --figures-dir"
        ) from None


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a saved table as text, none if there is no such file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict]) -> None:
    """Save rows as CSV; columns in order of first appearance, floats to 6 significant digits."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )


class Journal:
    """The finished runs of one job, on disk as they end, published into the result tables when the
    job is complete.

    One line of JSON a run: {"key": what identifies the run, "tables": {"runs": [row], "history":
    [rows], …}}. A run is in the journal whole or not at all, and is taken up again only by the
    code, versions, device and threads that made it. Without `resume`, an unfinished journal of the
    same job is set aside as .bak. Where several processes share a job, each has a file of its own;
    the first, rank 0, begins before the others, and merges their files at the end.
    """

    def __init__(
        self, folder: Path, job: str, environment: dict, resume: bool = False, rank: int = 0
    ):
        self.folder, self.environment, self.job = folder, environment, job
        self.path = folder / f"{job}.{f'{rank}.' if rank else ''}unfinished.jsonl"
        self.records = self._finished() if resume else {}
        self.used: dict[str, None] = {}  # the keys this job asked for, in its order
        if rank:
            return
        files = self._files()
        if resume and files:
            self.merge()
        elif resume:
            print(f"no unfinished {job} in {folder}: it starts from the beginning", file=sys.stderr)
        else:
            for file in files:
                aside = next(
                    p for n in itertools.count(1) if not (p := Path(f"{file}.{n}.bak")).exists()
                )
                os.replace(file, aside)
                print(
                    f"unfinished {job} set aside as {aside}; it would have gone on with --resume",
                    file=sys.stderr,
                )

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.job}.*unfinished.jsonl"))

    def _finished(self) -> dict[str, dict]:
        lines = [
            line
            for file in self._files()
            for line in file.read_text(encoding="utf-8").splitlines(True)
        ]
        # a process that died in mid-line leaves none behind it
        whole = [line for line in lines if line.endswith("\n")]
        return {record["key"]: record["tables"] for record in map(json.loads, whole)}

    def merge(self) -> None:
        """Take over what all processes have finished, into this one's file; nothing is asked for
        yet.
        """
        others = [file for file in self._files() if file != self.path]
        self.records, self.used = self._finished(), {}
        self._write(self.records)
        for file in others:
            file.unlink()

    def _write(self, names: Iterable[str]) -> None:
        with written_aside(self.path) as aside:
            aside.write_text("".join(map(self._line, names)), encoding="utf-8")

    def _line(self, name: str) -> str:
        return json.dumps({"key": name, "tables": self.records[name]}) + "\n"

    def run(self, key: dict, work) -> dict[str, list[dict]]:
        """The tables of the run that `key` names: from the journal if it is there, else from
        `work()`.
        """
        made_by = {
            part: self.environment.get(part) for part in ("code", "torch", "device", "threads")
        }
        name = json.dumps(key | made_by, sort_keys=True)
        if name not in self.records:
            self.records[name] = work()
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(self._line(name))
        self.used[name] = None
        return self.records[name]

    def publish(self) -> list[Path]:
        """Replace the rows of this job's experiments in the folder's tables, leave all others, and
        end the journal.

        Finished runs that this job did not ask for, of other settings before a resume, stay in the
        journal.
        """
        tables: dict[str, list[dict]] = {}
        for name in self.used:
            for table, rows in self.records[name].items():
                tables.setdefault(table, []).extend(rows)
        replaced = {row["experiment"] for rows in tables.values() for row in rows}
        # every table is complete on disk before the first is renamed
        with contextlib.ExitStack() as renames:
            paths = [self.folder / f"{table}.csv" for table in tables]
            for path, rows in zip(paths, tables.values(), strict=True):
                kept = [row for row in read_rows(path) if row["experiment"] not in replaced]
                write_rows(renames.enter_context(written_aside(path)), kept + rows)
            jobs = self.folder / "environment.json"
            known = json.loads(jobs.read_text(encoding="utf-8")) if jobs.exists() else {}
            text = json.dumps(
                known | dict.fromkeys(sorted(replaced), self.environment),
                indent=2,
                ensure_ascii=False,
            )
            renames.enter_context(written_aside(jobs)).write_text(text + "\n", encoding="utf-8")
        left = [name for name in self.records if name not in self.used]
        if left:
            self._write(left)
        else:
            self.path.unlink(missing_ok=True)
        return [*paths, jobs]


def environment(command: str, device: torch.device) -> dict:
    """What a run's numbers depend on besides its Config: versions, device, threads, commit,
    command.
    """
    packages = ("torch", "torchvision", "numpy", "matplotlib")
    versions = {
        name: str(getattr(sys.modules.get(name), "__version__", "not loaded")) for name in packages
    }

    def git(*words):
        return subprocess.run(
            ["git", *words], cwd=HERE, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":(glob)*.py")
        commit = git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        commit = "no git repository"
    cuda = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "command": command,
        "commit": commit,
        "code": hashlib.sha256(
            b"".join(path.read_bytes() for path in sorted(HERE.glob("*.py")))
        ).hexdigest()[:12],
        "python": platform.python_version(),
        **versions,
        "device": cuda
        or f"{device.type}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "platform": platform.platform(terse=True),
    }


# -------- 2. Tables: mean ± std over seeds, in Markdown -------------------------------------------


class Mean(NamedTuple):
    """Mean and sample standard deviation over n seeds; std is nan for one seed."""

    mean: float
    std: float
    n: int

    def text(self, form: str = ".2f", scale: float = 1.0) -> str:
        if not math.isfinite(self.mean):
            return "not finite"
        spread = f" ± {self.std * scale:{form.lstrip('+')}}" if self.n > 1 else ""
        return f"{self.mean * scale:{form}}{spread}"

    def percent(self) -> str:
        return self.text(".2f", 100)


def mean(values) -> Mean:
    """Mean ± sample standard deviation (n - 1) of numbers or their texts."""
    values = [float(v or math.nan) if isinstance(v, str) else float(v) for v in values]
    if not values or not all(map(math.isfinite, values)):
        return Mean(math.nan, math.nan, len(values))
    return Mean(
        statistics.fmean(values),
        statistics.stdev(values) if len(values) > 1 else math.nan,
        len(values),
    )


def group(rows: list[dict], column: str) -> dict[str, list[dict]]:
    """Rows by the value of a column, in order of first appearance."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row[column], []).append(row)
    return groups


def label(change: dict, changes: list[dict]) -> str:
    """A change's name in its sweep, by what tells it from the others: "128", "sgd, lr 0.3"."""
    columns = {key: tuple(c.get(key) for c in changes) for key in itertools.chain(*changes)}
    varied: dict[tuple, str] = {}  # what tells them apart; of fields that always agree, the first
    for key, values in columns.items():
        if len(set(values)) > 1 or len(columns) == 1:
            varied.setdefault(values, key)
    words = []
    for key in (key for key in varied.values() if key in change):
        value = change[key]
        if isinstance(value, str) or len(varied) == 1:
            words.append(str(value))
        elif value or value is False:
            words.append(f"{key.replace('_', ' ')} {value}")
    return ", ".join(words) or "nothing"


def markdown(header: list[str], rows: list[list]) -> str:
    """A Markdown table; the first column left, the others right."""
    lines = [header, [":--"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


SCORES = {
    "accuracy": "accuracy %",
    "macro_precision": "macro precision %",
    "macro_recall": "macro recall %",
}
# columns of saved rows, and how tables head them
SCORES |= {"macro_f1": "macro F1 %", "loss": "loss"}


def scored(rows: list[dict], prefix: str = "") -> list[str]:
    """The cells under SCORES, mean ± std over the rows; prefix "val_" for validation metrics."""
    means = {name: mean(row[prefix + name] for row in rows) for name in SCORES}
    return [m.text(".4f") if name == "loss" else m.percent() for name, m in means.items()]


def sweep_table(rows: list[dict], axis: str) -> str:
    """One line a value of the sweep: the validation metrics in % (mean ± std over seeds), loss,
    size and time.
    """
    sizes = [column for column in ("parameters", "cache_bytes") if column in rows[0]]
    header = [
        axis,
        *SCORES.values(),
        *(column.replace("_", " ") for column in sizes),
        "seconds",
        "n",
        "diverged",
    ]
    lines = []
    for value, runs in group(rows, "value").items():
        seconds = statistics.median(float(r["seconds"]) for r in runs)
        lines.append(
            [value, *scored(runs, "val_"), *(f"{int(runs[0][column]):,}" for column in sizes)]
        )
        lines[-1] += [f"{seconds:.1f}", len(runs), sum(r["status"] == "diverged" for r in runs)]
    return markdown(header, lines)


def finding(rows: list[dict], axis: str) -> str:
    """What a sweep shows, in a sentence made from its own numbers."""
    values = group(rows, "value")
    points = {value: mean(r["val_accuracy"] for r in runs) for value, runs in values.items()}
    best, worst = (pick(points, key=lambda value: points[value].mean) for pick in (max, min))
    top, low = points[best], points[worst]
    text = f"Best at {axis} = {best} ({top.percent()} %), worst at {worst} ({low.percent()} %)"
    if top.n > 1:  # a difference of less than two of its standard errors may well be chance
        chance = {
            value: 2 * math.sqrt((top.std**2 + p.std**2) / top.n) for value, p in points.items()
        }
        alike = [
            value
            for value, p in points.items()
            if value != best and top.mean - p.mean <= chance[value]
        ]
        text += f"; within two standard errors of the best: {', '.join(alike) or 'no other'}"
    else:
        text += "; of one seed, so small differences may be chance"
    diverged = [
        value for value, runs in values.items() if any(r["status"] == "diverged" for r in runs)
    ]
    return text + (f"; diverged at {', '.join(diverged)}." if diverged else ".")


# -------- 3. Pictures: from saved rows, in one style, without a display ---------------------------

# Okabe and Ito's colours, which people with any colour vision tell apart; markers repeat what
# colours say
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "osD^vPX"
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": matplotlib.cycler(color=COLORS),
    "legend.framealpha": 0.8,
    "legend.edgecolor": "white",
    "lines.linewidth": 1.8,
}


@contextlib.contextmanager
def picture(
    path: Path,
    panels: tuple[int, int],
    title: str,
    width=10.0,
    height=4.0,
    left=0.8,
    bottom=0.6,
    top=0.5,
):
    """A figure in the common style: gives its axes, rows × columns of them, and saves it as PNG
    when the block ends.

    Sizes in inches; left, bottom and top leave room for the labels, which saves a search for the
    layout.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        figure.suptitle(title, fontsize=13, y=1 - 0.1 / height, va="top")
        axes = figure.subplots(*panels)
        panel_height = (height - top - bottom) / panels[0] - 0.45
        panel_width = (width - 0.2 - left) / panels[1] - left / 2
        margins = {
            "left": left / width,
            "right": 1 - 0.2 / width,
            "bottom": bottom / height,
            "top": 1 - top / height,
        }
        figure.subplots_adjust(
            **margins, hspace=(bottom + 0.4) / panel_height, wspace=left / panel_width
        )
        yield axes
        with written_aside(path) as aside:
            figure.savefig(aside, dpi=140, format="png")


def draw_history(
    axes, rows: list[dict], column: str, label: str, scale: float = 1.0, **style
) -> None:
    """One line over training steps: the mean over seeds, in a band from the lowest to the highest
    seed.
    """
    by_seed = [
        {int(r["step"]): float(r[column]) for r in run} for run in group(rows, "seed").values()
    ]
    steps = sorted(set().union(*by_seed))  # a run that diverged ends early; the others go on
    values = scale * np.ma.masked_invalid(
        [[run.get(step, np.nan) for step in steps] for run in by_seed]
    )
    if values.mask.all():
        return  # nothing finite to draw
    (line,) = axes.plot(steps, values.mean(0), label=label, **style)
    axes.fill_between(
        steps, values.min(0), values.max(0), alpha=0.2, color=line.get_color(), linewidth=0
    )
    axes.set_xlabel("training step")


def plot_curves(path: Path, rows: list[dict], title: str) -> None:
    """The course of training from one experiment's history rows: losses left, validation metrics
    right.
    """
    n_seeds = len(group(rows, "seed"))
    with picture(path, (1, 2), f"{title} (mean and range, n = {n_seeds})") as (left, right):
        draw_history(left, rows, "train_loss", "train (the loss that is minimised)")
        draw_history(left, rows, "val_loss", "validation (cross-entropy)", linestyle="--")
        left.set_ylabel("loss (nats)")
        log_y(left)
        draw_history(right, rows, "val_accuracy", "accuracy", 100)
        draw_history(right, rows, "val_macro_f1", "macro F1", 100, linestyle="--")
        right.set_ylabel("validation (%)")
        accuracies = [100 * float(r["val_accuracy"]) for r in rows]
        if max(accuracies) > 95:
            right.set_ylim(max(min(accuracies) - 0.5, 90), 100)  # the last points are what matters
        if left.lines:
            left.legend()
        right.legend(loc="lower right")


def log_y(axes, top: float = math.inf) -> None:
    """Make the y axis of a finished drawing logarithmic, up to `top`, with plain numbers even in a
    single decade.
    """
    if not math.isfinite(axes.dataLim.minposy):
        return  # nothing positive was drawn
    axes.set_yscale("log")
    axis = axes.yaxis
    low, high = axis.get_view_interval()
    low, high = axes.set_ylim(low, min(high, top))
    decades = math.log10(high / low)
    axis.set_major_locator(
        MaxNLocator(5) if decades < 1 else LogLocator(subs=(1, 2, 5) if decades < 3 else (1,))
    )
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def plot_sweep(path: Path, rows: list[dict], history: list[dict], title: str, axis: str) -> None:
    """A sweep: validation accuracy and macro F1 per value with error bars, and the loss of each
    value over its run.
    """
    values = group(rows, "value")
    n_seeds = len(group(rows, "seed"))
    long = sum(map(len, values)) > 40
    room = {"bottom": 1.2 if long else 0.6, "top": 0.8}
    with picture(path, (1, 2), f"{title} (mean ± std, n = {n_seeds})", **room) as (left, right):
        positions = np.arange(len(values))
        series = (("accuracy", "100 − accuracy", -0.08), ("macro_f1", "100 − macro F1", 0.08))
        for (column, label, shift), marker in zip(series, MARKERS, strict=False):
            points = [mean(r[f"val_{column}"] for r in runs) for runs in values.values()]
            errors = [100 * p.std if p.n > 1 else 0 for p in points]
            where = positions + shift
            left.errorbar(
                where,
                [100 - 100 * p.mean for p in points],
                errors,
                fmt=marker,
                capsize=4,
                label=label,
            )
        names = [textwrap.fill(value, 10) for value in values] if long else values
        left.set_xticks(positions, names, fontsize=8.5 if len(names) < 8 else 7)
        left.set(xlabel=axis, ylabel="validation error (%)")
        log_y(left)
        # above, where no point can be
        left.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
        curves = group(history, "value")
        colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(curves)))
        for i, (value, runs) in enumerate(curves.items()):
            marker = MARKERS[i % len(MARKERS)]
            draw_history(
                right,
                runs,
                "val_loss",
                value,
                color=colors[i],
                marker=marker,
                markersize=4,
                markevery=0.2,
            )
        lengths = [max(int(r["step"]) for r in runs) for runs in curves.values()]
        right.set(
            ylabel="validation loss (nats)",
            xscale="log" if max(lengths) > 10 * min(lengths) else "linear",
        )
        # a run that diverged leaves the picture at the top, and the others their room
        kept = [run for run in history if all(r["status"] == "ok" for r in values[run["value"]])]
        log_y(right, top=1.3 * max((float(run["val_loss"]) for run in kept), default=math.inf))
        if right.lines:
            right.legend(title=axis, fontsize=9, title_fontsize=9, ncols=1 if long else 2)


def plot_confusion(path: Path, matrix, class_names, title: str) -> None:
    """The confusion matrix: counts in every cell, colour by the share of the true class (log, so
    that errors show).
    """
    matrix = check_matrix(matrix).numpy()
    share = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    long = max(map(len, map(str, class_names))) > 3
    room = {"left": 1.3, "bottom": 1.0} if long else {}
    with picture(path, (1, 1), title, width=8.0, height=7.0, **room) as axes:
        norm = matplotlib.colors.LogNorm(vmin=0.05, vmax=100)
        image = axes.imshow(np.maximum(share, 0.05), cmap="Blues", norm=norm)
        for (row, column), count in np.ndenumerate(matrix):
            color = "white" if share[row, column] > 10 else "black"
            axes.text(
                column,
                row,
                f"{count:,}" if count else "·",
                ha="center",
                va="center",
                color=color,
                fontsize=10,
            )
        ticks = range(len(matrix))
        axes.set_xticks(ticks, class_names, rotation=45 if long else 0)
        axes.set_yticks(ticks, class_names)
        axes.set(xlabel="predicted class", ylabel="true class")
        axes.grid(False)
        axes.figure.colorbar(image, label="share of the true class (%)", format="%g", shrink=0.8)


class Album:
    """All pictures of a stage, drawn from the rows in its folder, and summary.md with tables."""

    def __init__(self, folder: Path, subject: str):
        self.folder, self.subject = folder, subject
        self.runs, self.history = (
            group(read_rows(folder / f"{t}.csv"), "experiment") for t in ("runs", "history")
        )
        self.paths: list[Path] = []
        self.text = [f"# {subject}", "", "Mean ± sample standard deviation over n seeds."]

    def add(self, name: str, draw, *what, **how) -> None:
        self.paths.append(self.folder / f"{name}.png")
        draw(self.paths[-1], *what, **how)
        self.text += ["", f"![{name}]({name}.png)"]

    def selected(self, class_names) -> None:
        """The models that were scored on the test images: table, report per class, course of
        training, confusion.
        """
        tests = group(read_rows(self.folder / "test_metrics.csv"), "experiment")
        cells = group(read_rows(self.folder / "confusion.csv"), "experiment")
        if not tests:
            return
        lines = [[name, *scored(rows), len(rows)] for name, rows in tests.items()]
        title = "Test images: the selected models, scored at the end of their runs"
        self.section(title, markdown(["test images", *SCORES.values(), "n"], lines))
        for name, rows in tests.items():
            matrix = torch.zeros(len(class_names), len(class_names), dtype=torch.int64)
            for cell in cells[name]:
                matrix[int(cell["true"]), int(cell["predicted"])] += int(cell["count"])
            title, sums = f"{self.subject}, {name}", f"sum over seeds, n = {len(rows)}"
            self.text += ["", f"### {name}: test images per class, {sums}", ""]
            self.text += ["```", report(matrix, class_names), "```"]
            self.add(f"curves_{name}", plot_curves, self.history[name], title)
            self.add(
                f"confusion_{name}", plot_confusion, matrix, class_names, f"{title}: test, {sums}"
            )

    def reading(self, class_names) -> None:
        """How each selected model makes up its mind, step by step."""
        for name, rows in group(read_rows(self.folder / "reading.csv"), "experiment").items():
            title = (
                f"{self.subject}, {name}: class probabilities after every step, eight test images"
            )
            self.add(f"reading_{name}", plot_reading, rows, class_names, title)

    def sweeps(self, axes: dict[str, str]) -> None:
        """Of each sweep that has rows, its table, what it shows in a sentence, and its picture."""
        for name, axis in axes.items():
            if name in self.runs:
                rows, title = self.runs[name], f"{self.subject}, sweep: {name}"
                self.section(f"Sweep: {name}", sweep_table(rows, axis), finding(rows, axis))
                if len(group(rows, "value")) <= 10:  # more values do not fit side by side
                    self.add(f"sweep_{name}", plot_sweep, rows, self.history[name], title, axis)

    def section(self, title: str, *paragraphs: str) -> None:
        self.text += [
            "",
            f"## {title}",
            *(line for paragraph in paragraphs for line in ("", paragraph)),
        ]

    def demo(self) -> None:
        """A random matrix through the variants of attention: weights, their entropy, and which
        heads share what.
        """
        variants = group(read_rows(self.folder / "demo.csv"), "variant")
        if not variants:
            return
        lines, weights = [], {}
        for name, rows in variants.items():
            entropies = [
                mean(row[column] for row in rows).mean for column in ("entropy", "unscaled")
            ]
            off = max(float(row["row_error"]) for row in rows)
            lines.append([name, *(f"{entropy:.3f}" for entropy in entropies), f"{off:.0e}"])
            weights[name] = {
                f"head {h}": numbers(found, "weights") for h, found in group(rows, "head").items()
            }
        header = [
            "variant",
            "entropy, scores over √d (nats)",
            "entropy, scores as they are",
            "largest error of a row sum",
        ]
        name, rows = next(iter(variants.items()))
        first = "\n".join(row["weights"] for row in rows if row["head"] == "0")
        title, note = (
            "Attention weights of a random matrix",
            f"{name}, head 0, a row for each of the six queries:",
        )
        self.section(title, markdown(header, lines), note, f"```\n{first}\n```")
        self.add("demo_weights", plot_maps, weights, f"{title}: every row sums to 1")
        links = group(read_rows(self.folder / "sharing.csv"), "variant")
        self.add(
            "demo_sharing",
            plot_sharing,
            links,
            "A disturbed key/value head changes the outputs of these query heads",
        )

    def compared(self, first: str) -> None:
        """The selected models beside the first, seed by seed: accuracy, size, and what their caches
        hold.
        """
        tests = group(read_rows(self.folder / "test_metrics.csv"), "experiment")
        if first not in tests:
            return
        own = {row["seed"]: 100 * float(row["accuracy"]) for row in tests[first]}
        lines = []
        for name, rows in tests.items():
            apart = mean(
                100 * float(r["accuracy"]) - own[r["seed"]] for r in rows if r["seed"] in own
            )
            run = self.runs[name][0]
            sizes = [
                run["n_kv_heads"],
                *(f"{int(run[column]):,}" for column in ("parameters", "cache_bytes")),
            ]
            lines.append(
                [
                    name,
                    mean(r["accuracy"] for r in rows).percent(),
                    apart.text("+.2f") if apart.n else "–",
                    apart.n,
                    *sizes,
                ]
            )
        header = [
            "test images",
            "accuracy %",
            f"points above {first}, seed by seed",
            "n",
            "key/value heads",
        ]
        table = markdown([*header, "parameters", "cache bytes of an image"], lines)
        self.section("What sharing keys and values costs and saves", table)

    def maps(self, class_names) -> None:
        """What each head of the selected models attends to."""
        for name, rows in group(read_rows(self.folder / "maps.csv"), "experiment").items():
            grid = {}
            for found in group(next(iter(group(rows, "seed").values())), "image").values():
                heads = group(found, "head")
                image = {class_names[int(found[0]["true"])]: numbers(heads["0"], "token")}
                grid[f"image {len(grid)}"] = image | {
                    f"head {h}": numbers(w, "weights") for h, w in heads.items()
                }
            title = (
                f"{self.subject}, {name}: what the last block's queries (rows) attend to (columns)"
            )
            self.add(f"maps_{name}", plot_maps, grid, title)

    def arithmetic(self) -> None:
        """What becomes of the formula of attention where it is written without care."""
        rows = read_rows(self.folder / "arithmetic.csv")
        if rows:
            columns = ["case", "plain", "ours"]
            table = markdown(columns, [[row[column] for column in columns] for row in rows])
            self.section(
                "Faults of the formula: outputs and gradients that are nan, of 768 numbers", table
            )

    def decode(self) -> None:
        """What the next token costs after S cached ones, for every number of key/value heads."""
        rows = read_rows(self.folder / "decode.csv")
        if not rows:
            return
        whole = [
            r for r in read_rows(self.folder / "benchmark.csv") if r["group"].startswith("tokens/s")
        ]
        rows = [r | {"tokens": r["S"], "ms": 1000 * float(r["seconds"])} for r in rows]
        whole = [
            r | {"tokens": r["group"].split()[1], "ms": 1000 * float(r["seconds"])} for r in whole
        ]
        names, lines = list(group(rows, "name")), []
        for at in group([r | {"at": (r["S"], r["G"])} for r in rows], "at").values():
            ms = {r["name"]: r["ms"] for r in at}
            ratios = [f"{ms[name] / ms['ours']:.2f}" for name in names if name != "ours"]
            lines.append(
                [
                    at[0]["S"],
                    at[0]["G"],
                    f"{int(at[0]['cache_bytes']):,}",
                    *(f"{t:.3g}" for t in ms.values()),
                ]
            )
            lines[-1] += ratios
        header = [
            "cached tokens",
            "key/value heads",
            "cache bytes",
            *(f"{name}, ms" for name in names),
        ]
        table = markdown([*header, *(f"{name} / ours" for name in names if name != "ours")], lines)
        self.section(
            f"Decoding on {rows[0]['device']}: one token attends to the cached ones", table
        )
        ours = [r | {"name": f"{r['G']} key/value heads"} for r in rows if r["name"] == "ours"]
        few = [r for r in rows if r["G"] == "4"]
        panels = {
            "ours, one token": ours,
            "4 key/value heads, one token": few,
            "a whole sequence": whole,
        }
        self.lines("decode", panels, "name", "tokens", "ms", "milliseconds", log_x=True)

    def faults(self) -> None:
        """What was provoked and mended: the table, and the losses of each pair of runs."""
        faults = group(read_rows(self.folder / "faults.csv"), "fault")
        if not faults:
            return
        lines = []
        for name, rows in faults.items():
            variants = group(rows, "variant")
            broken, mended = (
                mean(r["number"] for r in variants[v]).text(".3g") for v in ("broken", "mended")
            )
            n, diverged = (
                len(variants["broken"]),
                sum(r["status"] == "diverged" for r in variants["broken"]),
            )
            broken += f" ({diverged} of {n} diverged)" if diverged else ""
            lines.append(
                [
                    name,
                    rows[0]["symptom"],
                    rows[0]["measured"],
                    broken,
                    rows[0]["remedy"],
                    mended,
                    n,
                ]
            )
        header = ["fault", "symptom", "measured", "broken", "remedy", "mended", "n"]
        note = (
            "Solid: the loss that is minimised. "
            "Dashed: the validation images' cross-entropy, of the logits."
        )
        self.section("Faults: provoked, measured, mended", markdown(header, lines), note)
        self.add("faults", plot_faults, self.history["faults"], list(faults))

    def lines(self, name: str, panels: dict[str, list[dict]], *what, **how) -> None:
        """What tables and losses do not show: see plot_lines; nothing where no panel has rows."""
        panels = {title: rows for title, rows in panels.items() if rows}
        if panels:
            self.add(name, plot_lines, panels, *what, **how)

    def benchmark(self) -> None:
        """The works that were timed against each other, group by group."""
        rows = read_rows(self.folder / "benchmark.csv")
        if rows:
            numbers = ("seconds", "rate", "ratio")
            lines = [
                [r["group"], r["name"], *(f"{float(r[c]):.3g}" for c in numbers)] for r in rows
            ]
            title = "Benchmark on {device}: medians of {repeats} interleaved repeats".format(
                **rows[0]
            )
            note = "The ratio is that of the rate to the first of its kind."
            self.section(title, markdown(["rate in", "of", *numbers], lines), note)
            self.add("benchmark", plot_bars, rows, f"{self.subject}: speed")

    def close(self) -> list[Path]:
        """Write summary.md; the paths of all that was made. FileNotFoundError if there was nothing
        to draw.
        """
        if not self.paths:
            raise FileNotFoundError(f"no saved rows in {self.folder}: there is nothing to draw")
        summary = self.folder / "summary.md"
        with written_aside(summary) as aside:
            aside.write_text("\n".join(self.text) + "\n", encoding="utf-8")
        return [*self.paths, summary]


def plot_faults(path: Path, history: list[dict], names: list[str]) -> None:
    """One panel a fault, broken and mended: the loss that is minimised, and the validation logits'
    cross-entropy.
    """
    runs = group(history, "value")
    height, title = -(-len(names) // 2), "What goes wrong in training, and what mends it"
    with picture(path, (height, 2), title, height=3.6 * height, left=1.0, top=0.8) as axes:
        for panel, name in zip(axes.flat, names, strict=False):
            for variant, color in zip(("broken", "mended"), COLORS[1::-1], strict=True):
                rows = runs[f"{name}: {variant}"]
                draw_history(panel, rows, "train_loss", f"{variant}, training", color=color)
                draw_history(
                    panel, rows, "val_loss", f"{variant}, validation", color=color, linestyle="--"
                )
                lost = [int(r["step"]) for r in rows if not math.isfinite(float(r["train_loss"]))]
                if lost:
                    n_seeds = len(group(rows, "seed"))
                    words = f"{len(lost)} of {n_seeds} not finite from step {min(lost)}"
                    panel.axvline(min(lost), color=color, linestyle=":", label=words)
            panel.set(title=name, ylabel="loss (nats)")
            log_y(panel)
            panel.legend(fontsize=9)


def plot_bars(path: Path, rows: list[dict], title: str) -> None:
    """A panel for each group of benchmark rows: every rate in units of the group's first."""
    groups = group(rows, "group")
    columns = 2 if len(groups) <= 8 else 3
    height = -(-len(groups) // columns)
    with picture(
        path, (height, columns), title, 5.0 * columns, 2.4 * height, left=1.9, top=0.8
    ) as axes:
        for panel, (name, found) in zip(axes.flat, groups.items(), strict=False):
            ratios = [float(r["ratio"]) for r in found]
            bars = panel.barh([r["name"] for r in found], ratios, color=COLORS)
            panel.bar_label(bars, fmt="%.2f", padding=3)
            panel.set(
                title=name,
                xlabel=f"{name.split(',')[0]}, {found[0]['name']} = 1",
                xlim=(0, 1.2 * max(ratios)),
            )
            panel.invert_yaxis()
        for panel in axes.flat[len(groups) :]:
            panel.remove()


def plot_lines(
    path: Path,
    panels: dict[str, list[dict]],
    series: str,
    x: str,
    y: str,
    ylabel="",
    percent=False,
    log_x=False,
) -> None:
    """A panel for each title's rows: the mean of column y over column x, one line for each value of
    column `series`.

    On a logarithmic y axis, or in percent on a linear one.
    """
    columns = len(panels) if len(panels) < 4 else 2
    height = -(-len(panels) // columns)
    with picture(
        path, (height, columns), "", width=2 + 5.0 * columns, height=4.0 * height, left=1.1
    ) as axes:
        for panel, (title, rows) in zip(np.ravel(axes), panels.items(), strict=True):
            for i, (name, found) in enumerate(group(rows, series).items()):
                points = {
                    int(at): mean(r[y] for r in runs).mean for at, runs in group(found, x).items()
                }
                color = COLORS[i]
                values = [(100 if percent else 1) * value for value in points.values()]
                panel.plot(
                    list(points), values, color=color, marker=MARKERS[i], markersize=4, label=name
                )
            panel.set(title=title, xlabel=x.replace("_", " "), ylabel=ylabel)
            if log_x:
                panel.set_xscale("log")
                panel.set_xticks(list(points), list(points))
                panel.xaxis.set_minor_locator(NullLocator())
            if not percent:
                log_y(panel)
            panel.legend(fontsize=9)


def numbers(rows: list[dict], column: str) -> np.ndarray:
    """A column of rows of numbers, as `digits` writes them."""
    return np.array([[float(number) for number in row[column].split()] for row in rows])


def plot_maps(path: Path, grid: dict[str, dict[str, np.ndarray]], title: str) -> None:
    """Matrices, a line of them for each name; colours run from the lowest number of each to its
    highest.
    """
    columns = max(map(len, grid.values()))
    sizes = {
        "width": 1.55 * columns + 0.8,
        "height": 1.75 * len(grid) + 0.6,
        "left": 0.5,
        "bottom": 0.1,
        "top": 0.7,
    }
    with picture(path, (len(grid), columns), title, **sizes) as axes:
        for line, (name, matrices) in zip(np.atleast_2d(axes), grid.items(), strict=True):
            for panel, (label, numbers) in zip(line, matrices.items(), strict=False):
                panel.imshow(numbers, "Blues", aspect="auto")
                panel.set_title(label, fontsize=10)
            for panel in line:
                panel.set(xticks=[], yticks=[])
            line[0].set_ylabel(name)


def plot_sharing(path: Path, panels: dict[str, list[dict]], title: str) -> None:
    """Query heads above, key/value heads below, and a line wherever a change of the lower one
    changed the upper one.
    """
    with picture(
        path,
        (1, len(panels)),
        title,
        width=4.5 * len(panels),
        height=2.4,
        left=0.3,
        bottom=0.1,
        top=0.8,
    ) as axes:
        for panel, (name, links) in zip(np.atleast_1d(axes), panels.items(), strict=True):
            heads = {
                end: sorted({int(link[end]) for link in links}) for end in ("query_head", "kv_head")
            }
            H, G = len(heads["query_head"]), len(heads["kv_head"])
            for link in links:
                h, g = int(link["query_head"]), int(link["kv_head"])
                # under the middle of its share
                at, color = (g + 0.5) * H / G - 0.5, COLORS[g % len(COLORS)]
                if float(link["change"]) > 0:
                    panel.plot([h, at], [1, 0], color=color, zorder=1)
                    panel.scatter(h, 1, s=230, color=color, zorder=2)
                    panel.annotate(h, (h, 1), ha="center", va="center", color="white")
                panel.scatter(at, 0, s=230, marker="s", color=color, zorder=2)
                panel.annotate(g, (at, 0), ha="center", va="center", color="white")
            panel.set(
                title=f"{name}: {H} query heads, {G} key/value heads",
                xlim=(-0.7, H - 0.3),
                ylim=(-0.4, 1.4),
            )
            panel.axis("off")


def plot_reading(path: Path, rows: list[dict], class_names, title: str) -> None:
    """Eight sequences of the first seed, step by step downwards: what is read, and the class
    probabilities after it.
    """
    images = group(next(iter(group(rows, "seed").values())), "image")
    with picture(
        path, (2, 8), title, width=16.0, height=8.5, left=0.6, bottom=1.0, top=0.8
    ) as axes:
        for (pixels, probabilities), steps in zip(
            axes.reshape(8, 2), images.values(), strict=False
        ):
            # 28 pixels wide, also where a step is two rows
            image = numbers(steps, "pixels").reshape(-1, 28)
            # T × C
            shares = [[float(step[f"p{c}"]) for c in range(len(class_names))] for step in steps]
            ends = (len(steps) + 0.5, 0.5)  # steps count from 1, downwards
            pixels.imshow(image, cmap="gray", aspect="auto", extent=(-0.5, 27.5, *ends))
            probabilities.imshow(
                shares,
                "Blues",
                aspect="auto",
                extent=(-0.5, len(class_names) - 0.5, *ends),
                vmin=0,
                vmax=1,
            )
            pixels.set(title=class_names[int(steps[0]["true"])], xticks=[])
            probabilities.set(yticks=[])
            probabilities.set_xticks(range(len(class_names)), class_names, rotation=90, fontsize=8)
            pixels.grid(False)
            probabilities.grid(False)
        for row in axes:
            row[0].set_ylabel("step")


# -------- 4. Jobs ---------------------------------------------------------------------------------


class DataError(Exception):
    """A data set is missing, damaged, or another one than expected."""


@functools.cache
def unpacked(name: str, folder: Path) -> Path:
    """Where torchvision may unpack the archives of data set `name`: `folder`, or if that is
    read-only a copy of it.
    """
    raw = Path(folder) / name / "raw"
    if not raw.is_dir() or os.access(raw, os.W_OK):
        return folder
    copy = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    shutil.copytree(raw, Path(copy) / name / "raw")
    return Path(copy)


@functools.cache
def read_images(
    name: str, folder: Path, mean: float, std: float
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Training and test part of torchvision's data set `name`: images (N, 28, 28) uint8 and labels
    (N,) int64.

    torchvision finds, checks and unpacks the archives under `folder`. Its check ends with the
    archives, and MNIST and Fashion-MNIST name their files alike: so the training pixels must also
    have that mean and std (of 0 … 1). DataError says which file is wrong and what was expected.
    """
    try:
        from torchvision import datasets
        from torchvision.datasets.utils import check_integrity
    # "operator torchvision::nms does not exist": two different builds
    except (ImportError, RuntimeError) as error:
        remedy = "install a matched pair: pip install --force-reinstall torch torchvision"
        raise DataError(
            f"torchvision does not work with torch {torch.__version__} ({error}); {remedy}"
        ) from error
    dataset, raw = getattr(datasets, name), Path(folder) / name / "raw"
    for archive, md5 in dataset.resources:
        if (raw / archive).exists() and not check_integrity(str(raw / archive), md5):
            raise DataError(
                f"{raw / archive} is damaged or not {name}'s: an MD5 sum of {md5} was expected"
            )
    try:
        parts = [
            dataset(str(unpacked(name, folder)), train=train, download=True)
            for train in (True, False)
        ]
        parts = [(part.data, part.targets) for part in parts]
        pixels = parts[0][0].float() / 255
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        remedy = f"put the four archives of {name} there, and delete the unpacked *-ubyte files"
        raise DataError(
            f"no readable {name} in {raw} ({' '.join(str(error).split())}): {remedy}"
        ) from error
    found = (len(pixels), round(pixels.mean().item(), 4), round(pixels.std().item(), 4))
    if found != (60_000, mean, std):
        remedy = "delete the unpacked *-ubyte files there"
        raise DataError(
            f"{raw} is not {name}: (images, mean, std) are {found}, "
            f"not {(60_000, mean, std)}; {remedy}"
        )
    return parts


def interleaved(
    works: dict[tuple, tuple[float, Callable]], repeats: int, device, columns=("group",)
) -> list[dict]:
    """Time works against each other: {(group, name): (amount, function)} -> a row each, its rate
    and ratio.

    A group has as many parts as there are columns for it. All in turn, after one round as warm-up
    if there are several, so that whatever else the machine does falls on all alike. The rate is the
    amount over the median seconds; the ratio is to the rate of the group's first.
    """
    seconds: dict[tuple, list[float]] = {key: [] for key in works}
    for _ in range(repeats + (repeats > 1)):
        for key, (_, work) in works.items():
            start = time.perf_counter()
            work()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            seconds[key].append(time.perf_counter() - start)
    rows, first = [], {}
    for key, (amount, _) in works.items():
        *parts, name = key
        median = statistics.median(seconds[key][-repeats:])
        rate = amount / median
        ratio = rate / first.setdefault(tuple(parts), rate)
        row = {
            "experiment": "benchmark",
            **dict(zip(columns, parts, strict=True)),
            "name": name,
            "seconds": median,
        }
        rows.append(row | {"rate": rate, "ratio": ratio, "repeats": repeats, "device": device.type})
    return rows


def training_steps(
    forward: Callable, model: torch.nn.Module, labels: torch.Tensor, n: int
) -> Callable[[], None]:
    """For `interleaved`: n times forward, backward and update; forward() gives the model's logits
    (B, C).
    """
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def work():
        for _ in range(n):
            loss = torch.nn.functional.cross_entropy(forward(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return work


def map_rows(tokens: torch.Tensor, weights: torch.Tensor, labels: torch.Tensor) -> list[dict]:
    """Attention weights (B, H, T, S) of tokens (B, T, F) as rows for a table: a row for each image,
    head and query.
    """
    rows = []
    for i, h, t in np.ndindex(*weights.shape[:3]):
        row = {"image": i, "true": labels[i].item(), "head": h, "query": t}
        rows.append(row | {"weights": digits(weights[i, h, t]), "token": digits(tokens[i, t])})
    return rows


def digits(values: torch.Tensor) -> str:
    """Numbers (N,) as one text for a table."""
    return " ".join(f"{value:.3f}" for value in values.tolist())


def check_config(
    config, choices: dict[str, list[str]], limits: dict[str, tuple[float, float]]
) -> None:
    """ValueError, with the value, unless each field is one of its choices, or lies in its limits:
    low <= … < high.
    """
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ValueError(
                f"{name} must be one of {', '.join(allowed)}, not {getattr(config, name)!r}"
            )
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if not low <= value < high:
            raise ValueError(f"{name} must be at least {low} and less than {high}, not {value}")


class Split(NamedTuple):
    images: torch.Tensor  # (N, …) float32
    labels: torch.Tensor  # (N,) int64


class Data(NamedTuple):
    train: Split
    val: Split
    test: Split


def stratified(labels: torch.Tensor, n_val: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the images to train on, in a random order, and of n_val to validate on: every
    class in its share.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    by_class = order[labels[order].argsort(stable=True)]
    # every 12th of 60,000: of every class a twelfth
    held_out = torch.arange(len(labels)) % (len(labels) // n_val) == 0
    kept = by_class[~held_out]
    return kept[torch.randperm(len(kept), generator=generator)], by_class[held_out]


class Fault(NamedTuple):
    """Something that goes wrong in training: its sign, the Config that provokes it, and the Config
    that mends it.
    """

    symptom: str
    measured: str  # the number that shows it, with its unit
    measure: Callable  # (model, history, config, data) -> float
    broken: dict
    remedy: str
    mended: dict


class Run(NamedTuple):
    """One call of a stage's `train`: the experiment it belongs to, where in it, and the Config."""

    experiment: str
    value: str
    config: object

    @property
    def name(self) -> dict:
        """The columns that every row of this run begins with."""
        return {"experiment": self.experiment, "value": self.value, "seed": self.config.seed}


def plan(
    stage, job: str, small: dict, given: dict, only: list[str], n_seeds: int | None, most=math.inf
) -> list[Run]:
    """The runs of a stage's job, each with every seed: its base Config, smaller in a smoke run,
    under the user's.

    n_seeds is the user's; without it there are as many as the job says, or `most` if that is less.
    """
    changes, seeds = stage.JOBS[job]
    base = stage.Config(**(changes | small | given))
    # also where a fault or probe says otherwise
    smaller = {field: getattr(base, field) for field in small}
    if job == "sweep":
        few = 2 if small else None  # values of each sweep
        runs = [
            (name, label(c, stage.SWEEPS[name]), c)
            for name in only
            for c in stage.SWEEPS[name][:few]
        ]
    elif job == "faults":
        variants = ("broken", "mended")
        runs = [
            (job, f"{name}: {v}", getattr(f, v) | smaller)
            for name, f in stage.FAULTS.items()
            for v in variants
        ]
        runs += [
            (name, label(c, changes), c | smaller)
            for name, changes in stage.PROBES.items()
            for c in changes
        ]
    else:
        runs = [(stage.SELECTED[job], "", {})]
    seeds = range(base.seed, base.seed + (n_seeds or min(seeds, most)))
    return [
        Run(e, value, dataclasses.replace(base, **c, seed=seed))
        for e, value, c in runs
        for seed in seeds
    ]


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """For an optimizer: weights decay, biases and other vectors do not."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return [
        {"params": weights, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def one_cycle(config, step: int) -> float:
    """Share of the highest learning rate: up a line over the warm-up, down a half cosine to 0
    (Smith 2018).
    """
    progress = (step + 0.5) / config.n_steps
    if progress < config.warmup:
        return progress / config.warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - config.warmup) / (1 - config.warmup)))


def batches(n: int, config, device: torch.device) -> Iterator[torch.Tensor]:
    """Indices (B,) of the batches: all n images in a new random order, again and again."""
    while True:
        yield from torch.randperm(n, device=device).split(config.batch_size)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies matrices in bfloat16 by instructions of its own; elsewhere that
    is slow.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def inference(measure: Callable) -> Callable:
    """Of a function of a model: run it without gradients and with dropout off, and leave the model
    as it was.
    """

    @functools.wraps(measure)
    def wrapped(model: torch.nn.Module, *args, **kwargs):
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                return measure(model, *args, **kwargs)
        finally:
            model.train(was_training)

    return wrapped


def augmented(images: torch.Tensor, flip: bool, shift: int) -> torch.Tensor:
    """Images (B, 28, 28), each mirrored with probability ½ if `flip`, moved by up to `shift` pixels
    down and right.

    What moves in from outside is as blank as the blankest pixel there is.
    """
    B, device = len(images), images.device
    if flip:
        images = torch.where(torch.rand(B, 1, 1, device=device) < 0.5, images.flip(2), images)
    if shift:
        wide = images.amin().repeat(B, 28 + 2 * shift, 28 + 2 * shift)
        wide[:, shift:-shift, shift:-shift] = images
        moved = torch.randint(2 * shift + 1, (2, B, 1), device=device)
        down, right = moved + torch.arange(28, device=device)  # (B, 28) each
        images = wide[
            torch.arange(B, device=device)[:, None, None], down[:, :, None], right[:, None, :]
        ]
    return images


def status(history: list[dict]) -> str:
    """Whether a run's last losses are finite: "ok" or "diverged"."""
    return (
        "ok"
        if all(math.isfinite(history[-1][loss]) for loss in ("train_loss", "val_loss"))
        else "diverged"
    )


def history_row(
    config, step: int, train_loss: float, val: dict, grad_norm: torch.Tensor, start: float
) -> dict:
    """What is logged of a step: train_loss since the row before, val as a stage's `evaluate` gives
    it, seconds.
    """
    row = {
        "step": step,
        "epoch": step / math.ceil(config.n_train / config.batch_size),
        "train_loss": train_loss,
    }
    row |= {
        "val_loss": val["loss"],
        "val_accuracy": val["accuracy"],
        "val_macro_f1": val["macro_f1"],
    }
    return row | {"grad_norm": grad_norm.item(), "seconds": time.perf_counter() - start}


def tables_of(
    run: Run, model: torch.nn.Module, history: list[dict], val: dict, device: torch.device
) -> dict:
    """A finished run's rows for the tables that every run has, runs and history; val as a stage's
    `evaluate` gives.
    """
    row = (
        run.name
        | vars(run.config)
        | {"device": device.type, "threads": torch.get_num_threads(), "status": status(history)}
    )
    row |= {f"val_{key}": score for key, score in val.items() if key != "confusion"}
    row |= {
        "seconds": history[-1]["seconds"],
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    return {"runs": [row], "history": [run.name | line for line in history]}


def test_tables(run: Run, test: dict) -> dict:
    """The rows of a selected model's test scores, as a stage's `evaluate` gives them: test_metrics
    and confusion.
    """
    numbers = {key: score for key, score in test.items() if key != "confusion"}
    counts = np.ndenumerate(test["confusion"].tolist())
    cells = [run.name | {"true": t, "predicted": p, "count": int(n)} for (t, p), n in counts]
    return {
        "confusion": cells,
        "test_metrics": [{"experiment": run.experiment, "seed": run.config.seed} | numbers],
    }


def fault_tables(
    run: Run, faults: dict[str, Fault], model, history: list[dict], data: Data
) -> dict:
    """The row of a fault's broken or mended run: what its number came to."""
    name, variant = run.value.split(": ")
    fault = faults[name]
    row = run.name | {"fault": name, "variant": variant}
    row |= {column: getattr(fault, column) for column in ("symptom", "measured", "remedy")}
    number = fault.measure(model, history, run.config, data)
    return {"faults": [row | {"number": number, "status": status(history)}]}


def sweep(stage, runs: list[Run], load: Callable, journal: Journal, quiet: bool) -> None:
    """Every run through the stage's `execute`, its rows into the journal as it ends; runs found
    there are skipped.
    """
    with tqdm(
        total=sum(run.config.n_steps for run in runs), unit="step", disable=quiet or None
    ) as bar:
        for i, run in enumerate(runs, 1):
            begun = bar.n
            work = functools.partial(stage.execute, run, load(run.config), bar)
            tables = journal.run(run.name | vars(run.config), work)
            # all of them, even where it diverged or was found
            bar.update(run.config.n_steps - (bar.n - begun))
            if not quiet:
                row = tables["runs"][0]
                line = f"[{i}/{len(runs)}] {run.experiment} {run.value} seed {run.config.seed}: "
                line += f"{row['status']}, "
                bar.write(
                    line + f"val accuracy {100 * row['val_accuracy']:.2f} %, {row['seconds']:.1f} s"
                )


def team() -> tuple[int, int]:
    """This process's number and how many there are, where torchrun started several, else 0 and 1.

    Each has its share of the processor's threads and a GPU of its own, if there are any; they only
    wait for each other.
    """
    rank, n = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if n > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))
        # torchrun's own choice where the user made none
        if os.environ.get("OMP_NUM_THREADS") == "1":
            torch.set_num_threads(max(1, os.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"])))
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return rank, n


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def parse_command_line(
    stage, works: Iterable[str], argv: list[str] | None
) -> tuple[argparse.Namespace, dict]:
    """The command line that the stages share, whose WHAT is a job or a work: its flags, and the
    Config fields given.

    Every field of the stage's Config is a flag: its type that of its default. A flag or value that
    is off is one line on stderr and exit status 2; so is what the caller hands to args.refuse, once
    it knows which Configs the flags make.
    """
    if hasattr(sys.stdout, "reconfigure"):
        # a console without Chinese letters still shows the rest
        sys.stdout.reconfigure(errors="replace")
    script, sweeps, fields = (
        Path(stage.__file__).name,
        stage.SWEEPS,
        dataclasses.fields(stage.Config),
    )
    name = script.split("_")[0]
    parser = _Parser(
        prog=script,
        description=stage.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    whats = ["all", *dict.fromkeys([*stage.JOBS, *works]), "plot"]
    parser.add_argument(
        "what", nargs="?", default="all", choices=whats, metavar="WHAT", help=", ".join(whats)
    )
    parser.add_argument("--seeds", type=int, help="runs of every Config, each with the next seed")
    parser.add_argument(
        "--only", nargs="+", choices=sweeps, metavar="SWEEP", help=f"of {', '.join(sweeps)}"
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--data-dir", type=Path, default=HERE / "data")
    parser.add_argument(
        "--figures-dir", type=Path, help=f"results go to its folder {name} (default: figures)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the same job where it was interrupted"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny run of everything, into a temporary folder"
    )
    parser.add_argument(
        "--quiet", action="store_true", help="no progress, only the results and the paths"
    )
    knobs = parser.add_argument_group(
        "Config",
        "each sets the field of this name, except where a sweep or fault sets it; "
        "jobs have defaults of their own",
    )
    for field in fields:
        kind = type(field.default)
        how = {"type": kind, "choices": stage.CHOICES.get(field.name)}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        flag = "--" + field.name.replace("_", "-")
        knobs.add_argument(
            flag, dest=field.name, default=argparse.SUPPRESS, help=f"default {field.default}", **how
        )
    args = parser.parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in fields if hasattr(args, f.name)}
    args.refuse = parser.error
    if "epochs" in given:
        given.setdefault("steps", 0)  # a job's own number of steps gives way to the user's epochs
    if args.only and args.what not in ("all", "sweep"):
        parser.error(f"--only {' '.join(args.only)}: belongs to sweep, not to {args.what}")
    args.only = list(dict.fromkeys(args.only or sweeps))
    if args.seeds is not None and args.seeds < 1:
        parser.error(f"--seeds must be at least 1, not {args.seeds}")
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if args.device == "auto":
        args.device = next(name for name in present if present[name])
    if not present[args.device]:
        parser.error(f"--device {args.device}: torch finds none on this machine")
    words = sys.argv[1:] if argv is None else list(argv)
    if args.smoke and not args.figures_dir:
        args.figures_dir = Path(tempfile.mkdtemp())
        words += ["--figures-dir", str(args.figures_dir)]
    n = os.environ.get("LOCAL_WORLD_SIZE", "1")
    args.script, start = script, ["python"] if n == "1" else ["torchrun", f"--nproc-per-node={n}"]
    args.command = shlex.join([*start, script, *words])
    args.figures = (args.figures_dir or HERE / "figures") / name
    return args, given


def run_stage(stage, works: dict[str, Callable], argv: list[str] | None) -> int:
    """A stage's command line, the same in both: parse, train, publish the rows, draw; gives the
    exit status.

    works are what needs no trained model, by the WHAT that asks for it: (config, data, data_dir,
    repeats) -> tables. 0 is done; 1 data that cannot be had or a file that cannot be written; 130
    Ctrl-C; bad flags exit with 2. Where torchrun started several processes, each takes its share of
    the runs, and the first does all else.
    """
    args, given = parse_command_line(stage, works, argv)
    rank, n_processes = team()
    meet = torch.distributed.barrier if n_processes > 1 else lambda: None
    if n_processes > 1:
        torch.distributed.broadcast_object_list(shared := [args.figures, args.command])
        (args.figures, args.command), args.quiet = shared, args.quiet or rank > 0
    device, small = torch.device(args.device), stage.SMOKE if args.smoke else {}
    most = 1 if args.smoke else 3 if args.what == "all" else math.inf  # seeds
    skipped = stage.LONG if args.what == "all" else ()  # but a smoke run leaves out no training
    jobs = [
        job
        for job in stage.JOBS
        if args.what in ("all", job) and (args.smoke or job not in skipped)
    ]
    works = {
        job: work for job, work in works.items() if args.what in ("all", job) and job not in skipped
    }
    if args.what == "all" and not (args.smoke or args.quiet or given or args.seeds):
        left_out, minutes = " and ".join(stage.LONG), stage.MINUTES
        print(
            f"all but {left_out}: about {minutes} minutes on 2 CPU cores, "
            f"with {most} seeds and 1 a sweep"
        )

    loaded: dict[object, Data] = {}

    def load(config):
        how = getattr(config, "normalise", None)  # only this changes what is loaded
        if how not in loaded:
            data = stage.load_data(config, device, args.data_dir)
            loaded[how] = (
                data._replace(val=Split(*(part[::20] for part in data.val))) if args.smoke else data
            )
        return loaded[how]

    try:
        runs = [
            run
            for job in jobs
            for run in plan(stage, job, small, given, args.only, args.seeds, most)
        ]
        config = stage.Config(**(small | given)) if works or not runs else None
    except ValueError as error:
        args.refuse(str(error))
    published, saved = args.what == "plot", []
    try:
        if not published:
            if rank > 0:
                meet()  # the first has unpacked the data and opened the journal
            load(stage.Config())  # what is wrong with the data is said before anything is trained
            with claimed(args.figures) if rank == 0 else contextlib.nullcontext():
                journal = Journal(
                    args.figures, args.what, environment(args.command, device), args.resume, rank
                )
                if rank == 0:
                    meet()
                sweep(stage, runs[rank::n_processes], load, journal, args.quiet)
                meet()
                if rank > 0:
                    return 0
                if n_processes > 1:
                    journal.merge()
                    # finds them all, and puts them into their order
                    sweep(stage, runs, load, journal, quiet=True)
                for name, work in works.items():
                    repeats = 1 if args.smoke else stage.REPEATS
                    measure = functools.partial(work, config, load(config), args.data_dir, repeats)
                    journal.run({name: str(config)}, measure)
                saved = journal.publish()
            published = True
        paths = stage.plot(args.figures)
    except KeyboardInterrupt:
        how = args.command + ("" if args.resume else " --resume")
        if published:  # only pictures are missing
            how = shlex.join(
                ["python", args.script, "plot", "--figures-dir", str(args.figures.parent)]
            )
        print(
            f"interrupted; what has ended is saved in {args.figures}, go on with: {how}",
            file=sys.stderr,
        )
        return 130
    except (DataError, OSError, subprocess.SubprocessError) as error:
        print(f"{args.script}: {error}", file=sys.stderr)
        return 1
    print((args.figures / "summary.md").read_text(encoding="utf-8"))
    print(*(f"wrote {path}" for path in [*saved, *paths]), sep="\n")
    return 0
