"""Numbers in the documents, each tied to the table that it comes from.

    python tests/documents.py                 every number that is not its table's
    python tests/documents.py --fill FILE …   write the tables' numbers into the documents,
                                              and make a list of contents anew

A number in prose is followed by a comment that a reader does not see, and that says what it is:

    98.61 ± 0.08 % <!-- stage1/test_metrics.csv; baseline; 100 * accuracy -->
    97.90 % <!-- stage1/runs.csv; depth = 1 and seed == 0; 100 * val_accuracy -->
    0.65 <!-- ; ; 1 - 0.9 ** 10 -->
    98.4 % <!-- source: Simard, Steinkraus and Platt 2003, table 1 -->

The parts are a table under figures/, a pandas query that chooses rows (none: all of them) and an
expression in which each column has its name. A query may begin with `EXPERIMENT` or
`EXPERIMENT = VALUE`, without quotation marks, the names of a row in our tables. Of several rows it
gives mean ± standard deviation; where a single number stands in the text, their mean.
`paired(a, b)` and `welch(a, b)` give a difference and half its 95 % t interval. Without a table it
is arithmetic. A number has as many decimals as are written; `?` and `?.??` and `?.?? ± ?.??` ask
for so many from --fill.
"""

import argparse
import functools
import math
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import metrics  # noqa: E402

FIGURES = ROOT / "figures"
DOCUMENTS = [
    name
    for name in ("README.md", "README.zh.md", "LEARNING_LOG.md", "interview/README.md")
    if (ROOT / name).exists()
]
NUMBER = r"[+−-]?(?:\d[\d,]*|\?)(?:\.[\d?]+)?"
MARKED = re.compile(
    rf"(?P<text>{NUMBER}(?: ± {NUMBER})?)(?P<between>[^\d<;?]{{0,24}})"
    r"<!-- (?P<meaning>[^;>]*;[^;]*;.*?) -->",
    re.DOTALL,
)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
# what may hold a number that nobody measured: code, formulas, links and their targets
NOT_PROSE = re.compile(r"```.*?```|`[^`\n]*`|\$[^$\n]*\$|\]\([^)]*\)|https?://\S+", re.DOTALL)
MEASURED_LIKE = re.compile(r"(?<![\w.,])[+−-]?\d[\d,]*(?:\.\d+ ?%?| ?%)(?![\w])")


@functools.cache
def cached_table(path: Path) -> pd.DataFrame:
    if not path.exists():
        raise ValueError(f"figures/{path.relative_to(FIGURES)} is missing")
    # the stages' tables name runs, whose values are texts; the others are plain tables
    of_runs = path.parent.name.startswith("stage")
    return metrics.load_rows(path) if of_runs else pd.read_csv(path)


def half(values) -> float:
    """Half the width of the 95 % t interval of the mean."""
    return metrics.summarise(values).half


def difference(first, second) -> pd.Series:
    """First minus second, row by row: of the same seeds in the same order."""
    return pd.Series(np.asarray(first) - np.asarray(second))


def paired(first, second) -> tuple[float, float]:
    """Mean of first minus second, seed by seed, and half its 95 % t interval."""
    found = metrics.summarise(difference(first, second))
    return found.mean, found.half


def welch(first, second) -> tuple[float, float]:
    """Mean of first minus mean of second, and half its 95 % interval by Welch's t."""
    one, two = metrics.summarise(first), metrics.summarise(second)
    squares = one.std**2 / one.n, two.std**2 / two.n  # of the standard errors
    freedom = sum(squares) ** 2 / (squares[0] ** 2 / (one.n - 1) + squares[1] ** 2 / (two.n - 1))
    return one.mean - two.mean, stats.t.ppf(0.975, freedom) * math.sqrt(sum(squares))


def typical(values) -> float:
    """The geometric mean: of numbers that lie powers of ten apart."""
    return float(np.exp(np.log(values).mean()))


FUNCTIONS = {
    "abs": abs,
    "difference": difference,
    "exp": math.exp,
    "half": half,
    "len": len,
    "log": np.log,
    "max": max,
    "min": min,
    "paired": paired,
    "round": round,
    "sqrt": math.sqrt,
    "typical": typical,
    "welch": welch,
}


@functools.cache
def rows_of(table: str, query: str) -> pd.DataFrame:
    """The rows of a table that a query chooses; ValueError if there is none."""
    rows = cached_table(FIGURES / table)
    condition = query
    first, _, rest = query.partition(" and ")
    if query and not re.search('[=!<>]=|[<>"]', first):  # EXPERIMENT or EXPERIMENT = VALUE
        experiment, _, value = first.partition(" = ")
        rows = rows[rows["experiment"] == experiment]
        if value:
            rows = rows[rows["value"].astype(str) == value]
        condition = rest
    if condition:
        rows = rows.query(condition)
    if rows.empty:
        raise ValueError(f"no row of {table} has {query}")
    return rows


def value_of(meaning: str):
    """What a comment's three parts, `table; query; expression`, come to: numbers."""
    name, query, expression = (part.strip() for part in meaning.split(";", 2))
    names = dict(FUNCTIONS)
    if name:
        rows = rows_of(name, query)
        names |= {str(column): rows[column] for column in rows.columns}
        # of("query", "column"): of other rows, to compare with; a third part names another table
        names["of"] = lambda wanted, column, table=name: rows_of(table, wanted)[column]
    return eval(expression, {"__builtins__": {}}, names)  # the repository's own documents


def decimals(number: str) -> int:
    return len(number.partition(".")[2])


def written(value: float, like: str) -> str:
    """A value with the decimals, sign and minus of a number as it stands in a text."""
    commas = "," if "," in like or ("?" in like and abs(value) >= 1000) else ""
    sign = "+" if like.startswith("+") else ""
    text = f"{value:{sign}{commas}.{decimals(like)}f}"
    return text.replace("-", "−") if "−" in like or "?" in like else text


def expected(text: str, meaning: str) -> str:
    """What the number in the text should be."""
    value = value_of(meaning)
    first, _, spread = text.partition(" ± ")
    if isinstance(value, pd.Series):
        found = metrics.summarise(value)
        if spread and found.n < 2:
            raise ValueError(f"a spread of one row: {meaning}")
        mean, std = found.mean, found.std
    else:
        mean, std = value if isinstance(value, tuple) else (value, math.nan)
    if not spread:
        return written(float(mean), first)
    return f"{written(float(mean), first)} ± {written(float(std), spread)}"


def wrong_numbers(text: str) -> list[str]:
    """A line for each number that is not what its comment says, or whose comment says nothing."""
    found = []
    for match in MARKED.finditer(text):
        try:
            right = expected(match["text"], match["meaning"])
        except Exception as error:
            found.append(f"{match['text']} <!-- {match['meaning']} -->: {error}")
            continue
        if match["text"] != right:
            found.append(f"{match['text']} should be {right}: <!-- {match['meaning']} -->")
    for comment in COMMENT.finditer(MARKED.sub("", text)):
        if ";" in comment[0]:
            found.append(f"no number stands before {comment[0]}")
    return found


def unmarked_numbers(text: str) -> list[str]:
    """Numbers with decimals or in percent that no comment explains, with what is around them."""
    text = re.sub(
        rf"{NUMBER}(?: ± {NUMBER})?[^\d<;?]{{0,24}}<!--.*?-->", " ", text, flags=re.DOTALL
    )
    text = NOT_PROSE.sub(" ", COMMENT.sub(" ", text))
    return [
        " ".join(text[max(0, match.start() - 40) : match.end() + 20].split())
        for match in MEASURED_LIKE.finditer(text)
    ]


def filled(text: str) -> str:
    """The text with every marked number as its table has it."""

    def number(match: re.Match) -> str:
        try:
            right = expected(match["text"], match["meaning"])
        except Exception as error:
            print(f"left as it is: <!-- {match['meaning']} -->: {error}", file=sys.stderr)
            return match[0]
        return match[0].replace(match["text"], right, 1)

    return MARKED.sub(number, text)


# a heading of the log that starts so begins a line of its contents; the others follow on that line
CHAPTERS = (
    "How to read the numbers",
    "The record",
    "How to read the course",
    "Questions and answers",
    "What commonly",
    "Two evenings",
)


def with_contents(text: str) -> str:
    """The text with its section "Contents", if it has one, made anew from the headings below."""
    match = re.search(r"^## Contents.*\n(?P<old>(?s:.*?))^## ", text, flags=re.MULTILINE)
    if match is None:
        return text
    lines = []
    for heading in re.findall(r"^## (.+)$", text[match.end() - 3 :], flags=re.MULTILINE):
        link = f"[{heading}](#{metrics.anchor_of(heading)})"
        if heading.startswith(CHAPTERS):
            lines.append(f"- **{link}**")
        else:
            lines[-1] += f" · {link}"
    contents = "\n" + "\n".join(lines) + "\n\n"
    return text[: match.start("old")] + contents + text[match.end("old") :]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("documents", nargs="*", default=DOCUMENTS)
    parser.add_argument("--fill", action="store_true", help="write the tables' numbers")
    arguments = parser.parse_args()
    n_wrong = 0
    for name in arguments.documents:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        if arguments.fill:
            text = with_contents(filled(text))
            path.write_text(text, encoding="utf-8")
        wrong = wrong_numbers(text)
        unmarked = unmarked_numbers(text)
        n_wrong += len(wrong) + len(unmarked)
        print(f"{name}: {len(MARKED.findall(text))} numbers tied to tables")
        for line in wrong:
            print(f"  wrong: {line}")
        for line in unmarked:
            print(f"  not tied to anything: … {line} …")
    return 1 if n_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
