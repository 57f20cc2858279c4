"""Small programs that interviews ask for at the end (手撕小题): a tree, a sort, a turn, a knapsack.

    python -m interview.puzzles               tables and pictures into figures/interview/
    python -m interview.puzzles --out DIR     the same into DIR; seconds

1. Paths to a tree (路径字符串转树)
   Asked     "Build a tree from strings like a/b/c, and print it as the command tree does."
             「给一组形如 a/b/c 的路径，构造一棵树并打印出来。」
   Idea      A node is the dict of its children, a leaf is {}. Walk each path from the root;
             `setdefault` steps into a child and makes it if it is not there.
   Cost      Time and memory O(number of names in all paths). Drawing: O(nodes · depth) characters.
   追问      Delete a path, or count the files below each node? Walk the tree after its children.
             Very deep? A stack of one's own, as `draw` has, where recursion ends at 1,000.
             Many words with common beginnings? The same structure is a trie (前缀树).
   Mistakes  A new dict where there is one already: the earlier children are lost.
             "a/b" and "b" taken for the same node because only the name is the key.

2. Quicksort (快速排序)
   Asked     "Write quicksort. What is its worst case, and how do you avoid it?"
             「手写快排。最坏情况是什么？怎么避免？」
   Idea      A pivot splits the values into smaller, equal and larger ones (三路划分, the Dutch
             national flag); both outer parts are sorted the same way.
   Cost      Time O(n log n) on average, for every input, as the pivot is random; O(n²) only by bad
             luck. Depth at most log2 n: the larger part is a loop, only the smaller one a call.
   追问      Stable? No: equal values may change places; merge sort keeps them.
             The k-th smallest? Go on in one part only (quickselect): O(n) on average.
             Against merge sort, heap sort? Both O(n log n) always; the first needs O(n) memory.
   Mistakes  The first value as the pivot: sorted input takes O(n²). Two parts, not three: equal
             input takes O(n²). Recursion into both parts: up to n calls deep.

3. Two matrices equal up to a rotation (两个矩阵旋转后是否相同)
   Asked     "Is one square matrix the other, turned by 0, 90, 180 or 270 degrees?"
             「判断一个方阵旋转 0、90、180、270 度后能否与另一个相同。」
   Idea      A quarter turn clockwise is the transpose with its rows reversed. Compare, turn, four
             times.
   Cost      Time O(n²), memory O(n²).
   追问      In place? Swap across the diagonal, then reverse each row: O(1) memory.
             Mirrored as well? Four turns of the transpose: eight cases in all.
             Not square? A quarter turn then changes the shape, and only two cases can match.
   Mistakes  The transpose alone: that is a mirror image. B turned and A turned: once is enough.

4. The knapsack filled exactly (完全背包，恰好装满)
   Asked     "Items of given sizes, as many of each as you like: fill the bag exactly with the
             fewest. In how many ways can it be filled?"
             「物品可以无限次取用，恰好装满背包最少要几件？有多少种装法？」
   Idea      fewest[c] = 1 + min over items of fewest[c − item], and fewest[0] = 0.
             ways[c] += ways[c − item], one item after the other, and ways[0] = 1.
   Cost      Time O(number of items · capacity), memory O(capacity).
   追问      Each item once (0/1 背包)? Run through the capacities downwards.
             Which items? Remember the last item at each capacity, and walk back.
             Why not the largest first (贪心)? With 30, 24, 12 and 6, 48 = 24 + 24 is fewest,
             and the greedy way takes 30 + 12 + 6.
   Mistakes  In `ways`, capacities outside and items inside: that counts orders, not combinations.
             0 as the start of what cannot be filled: it must be infinity. capacity 0 forgotten.
"""

import math
import numbers
import random
import reprlib
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from sklearn import datasets

import metrics

FIGURES = Path(__file__).resolve().parent.parent / "figures" / "interview"


# ---- 1. Paths to a tree ---------------------------------------------------------------------


def names_of(path) -> list[str]:
    """The names in "a/b/c"; ValueError for anything but names with a / between them."""
    if not isinstance(path, str):
        raise ValueError(f"a path must be a string such as 'a/b/c', not {path!r}")
    names = path.split("/")
    if "" in names:
        raise ValueError(f"a path must be names with one / between them, as 'a/b/c', not {path!r}")
    return names


def tree(paths) -> dict:
    """Nested dict of "a/b/c" strings: a name -> the dict of its children; a leaf is {}.

    Children stand in the order in which the paths name them. ValueError for a path with an empty
    name (a / at an end, or two in a row), and for one string in place of a list of them.
    """
    if isinstance(paths, str):
        raise ValueError(f"paths must be a list of strings, not the one string {paths!r}")
    root = {}
    for path in paths:
        node = root
        for name in names_of(path):
            node = node.setdefault(name, {})
    return root


def draw(tree) -> str:
    """A line for each name, children below their parent, as the command `tree` draws them.

    `tree` is a nested dict, as from the function of that name. ValueError if a value is no dict.
    """
    lines = []
    todo = [("", "", tree)]  # line of the node, what stands before its children, children
    while todo:
        line, margin, children = todo.pop()
        lines.append(line)
        if not isinstance(children, dict):
            raise ValueError(f"a tree must be dicts down to its leaves {{}}, not {children!r}")
        below = [(f"{margin}├── {name}", f"{margin}│   ", children[name]) for name in children]
        if below:
            name = list(children)[-1]
            below[-1] = (f"{margin}└── {name}", f"{margin}    ", children[name])
        todo.extend(reversed(below))  # the first child is popped next
    return "\n".join(lines[1:])  # the root has no name


# ---- 2. Quicksort ---------------------------------------------------------------------------


def partition(values: list, low: int, high: int) -> tuple[int, int]:
    """Sort values[low … high], ends included, into < pivot, = pivot, > pivot: the middle's ends."""
    pivot = values[random.randint(low, high)]
    first, last = low, high  # values[first … last] will be the equal ones
    here = low
    while here <= last:
        if values[here] < pivot:
            values[first], values[here] = values[here], values[first]
            first += 1
            here += 1
        elif pivot < values[here]:
            values[last], values[here] = values[here], values[last]
            last -= 1  # what came from there was not looked at yet: here stays
        else:
            here += 1
    return first, last


def sort_between(values: list, low: int, high: int) -> None:
    """Sort values[low … high] in place: a call for the smaller part, the loop for the larger."""
    while low < high:
        first, last = partition(values, low, high)
        if first - low < high - last:
            sort_between(values, low, first - 1)
            low = last + 1
        else:
            sort_between(values, last + 1, high)
            high = first - 1


def quicksort(values) -> list:
    """The values in rising order, as a new list (快速排序; Hoare 1962, three-way by Dijkstra 1976).

    O(n log n) on average for every input, log2 n calls deep at most. Not stable. ValueError for a
    value that has no place in an order: nan, or one that < cannot compare with the others.
    """
    values = list(values)
    for value in values:
        if value != value:
            raise ValueError(f"values must have an order, and {value!r} has no place in one")
    try:
        sort_between(values, 0, len(values) - 1)
    except TypeError as error:
        raise ValueError(f"values must all compare by <: {reprlib.repr(values)}: {error}") from None
    return values


# ---- 3. Two matrices equal up to a rotation -------------------------------------------------


def square_matrix(name: str, matrix) -> np.ndarray:
    """The matrix as an array (n, n) of whatever it holds; ValueError if it is not square."""
    array = np.array(matrix, dtype=object)
    if array.ndim != 2 or array.shape[0] != array.shape[1]:
        raise ValueError(f"{name} must be a square matrix, not {reprlib.repr(matrix)}")
    return array


def rotations_match(A, B) -> bool:
    """Whether B is A turned by 0, 90, 180 or 270 degrees; both square, arrays or nested lists.

    Matrices of two sizes do not match. ValueError for one that is not square.
    """
    A = square_matrix("A", A)
    B = square_matrix("B", B)
    for _ in range(4):
        if np.array_equal(A, B):
            return True
        A = A.T[:, ::-1]  # a quarter turn clockwise
    return False


# ---- 4. The knapsack filled exactly ---------------------------------------------------------


def check_whole(name: str, value, least: int) -> None:
    """ValueError unless the value is a whole number of at least `least`."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")


def check_knapsack(items, capacity) -> None:
    """ValueError for a size below 1 or a capacity below 0."""
    for item in items:
        check_whole("an item's size", item, 1)
    check_whole("capacity", capacity, 0)


def fewest(items, capacity) -> int | None:
    """The fewest items whose sizes add up to capacity exactly (完全背包), None if none do.

    Each size may be taken any number of times. Capacity 0 takes 0 items. ValueError for sizes below
    1, a capacity below 0, and numbers that are not whole.
    """
    items = list(items)
    check_knapsack(items, capacity)
    least = [0] + [math.inf] * capacity  # least[c]: fewest items that fill c
    for c in range(1, capacity + 1):
        for item in items:
            if item <= c:
                least[c] = min(least[c], least[c - item] + 1)
    return None if least[capacity] == math.inf else least[capacity]


def ways(items, capacity) -> int:
    """In how many ways sizes add up to capacity: combinations, whatever their order.

    Each size may be taken any number of times; two items of one size are two kinds. Capacity 0 has
    1 way, to take nothing. ValueError as in `fewest`.
    """
    items = list(items)
    check_knapsack(items, capacity)
    count = [1] + [0] * capacity  # count[c]: ways to fill c with the items so far
    for item in items:
        for c in range(item, capacity + 1):
            count[c] += count[c - item]
    return count[capacity]


# ---- Shown on real data ---------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent.parent
PENCE = (1, 3, 6, 12, 24, 30)  # British coins up to 1967: penny, threepence … florin, half-crown


class Counted:
    """A number that counts how often it is compared."""

    comparisons = 0

    def __init__(self, number):
        self.number = number

    def __lt__(self, other) -> bool:
        Counted.comparisons += 1
        return self.number < other.number


def show_tree(out: Path) -> None:
    """The Python files of this repository as a tree."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("interview/*.py"), *ROOT.glob("tests/*.py")]
    text = draw(tree(quicksort(path.relative_to(ROOT).as_posix() for path in paths)))
    (out / "puzzles_tree.txt").write_text(text + "\n", encoding="utf-8")
    print(f"tree: the Python files of this repository\n{text}")


def quicksort_rows() -> list[dict]:
    """A row for each input and its length: the comparisons that sorting it took."""
    random.seed(0)
    pixels = datasets.load_digits().data.ravel().tolist()
    rows = []
    for n in (500, 1000, 2000, 5000, 10_000):
        rising = list(range(n))
        inputs = {
            "random order": random.sample(rising, n),
            "sorted": rising,
            "reversed": rising[::-1],
            "pixels of digits, 17 values": pixels[:n],
            "all equal": [7] * n,
        }
        for name, values in inputs.items():
            Counted.comparisons = 0
            quicksort([Counted(value) for value in values])
            rows.append({"input": name, "n": n, "comparisons": Counted.comparisons})
    return rows


def draw_quicksort(table: pd.DataFrame, path: Path) -> None:
    """Comparisons over the number of values, a line for each input."""
    title = "How many comparisons does quicksort need?"
    explained = "one run each; random, sorted and reversed input lie on one another"
    with metrics.picture(path, f"{title}\n({explained})", width=10, height=5) as axes:
        for color, (name, rows) in zip(
            metrics.COLORS, table.groupby("input", sort=False), strict=False
        ):
            axes.plot(rows["n"], rows["comparisons"], marker="o", color=color, label=name)
        n = np.sort(table["n"].unique())
        quadratic = "n² / 2: sorted input,\nfirst value as pivot"
        axes.plot(n, n**2 / 2, ":", color="black", label=quadratic)
        axes.plot(n, n * np.log2(n), "--", color="black", label="n log₂ n")
        metrics.log_scale(axes.xaxis, table["n"])
        metrics.log_scale(axes.yaxis, pd.Series([*table["comparisons"], n.max() ** 2 / 2]))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set(xlabel="values to sort", ylabel="comparisons")
        metrics.legend_beside(axes)


def show_quicksort(out: Path) -> None:
    """How many comparisons quicksort takes, by input."""
    table = pd.DataFrame(quicksort_rows())
    table.to_csv(out / "puzzles_quicksort.csv", index=False)
    draw_quicksort(table, out / "puzzles_quicksort.png")
    print("\nquicksort: comparisons, by the number of values")
    print(table.pivot(index="input", columns="n", values="comparisons").to_string())


def draw_rotations(path: Path, others: dict[str, np.ndarray], rows: list[dict]) -> None:
    """The digits beside one another, and below each whether it matches the first."""
    title = "Which of these is the first digit, turned?"
    size = {"n_columns": len(rows), "width": 11, "height": 3}
    with metrics.picture(path, title, **size) as panels:
        for axes, row in zip(panels, rows, strict=True):
            axes.imshow(others[row["other"]], cmap="gray_r")
            axes.grid(False)
            axes.set(xticks=[], yticks=[], title=row["other"])
            axes.set_xlabel("match" if row["match"] else "no match")


def show_rotations(out: Path) -> None:
    """A digit, turned and mirrored, beside itself."""
    digit = datasets.load_digits().images[2]
    others = {
        "itself": digit,
        "turned by 90°": np.rot90(digit, -1),
        "by 180°": np.rot90(digit, 2),
        "by 270°": np.rot90(digit, 1),
        "mirrored": digit[:, ::-1],
        "transposed": digit.T,
    }
    rows = [{"other": name, "match": rotations_match(digit, B)} for name, B in others.items()]
    pd.DataFrame(rows).to_csv(out / "puzzles_rotations.csv", index=False)
    draw_rotations(out / "puzzles_rotations.png", others, rows)
    print("\nrotations: " + ", ".join(f"{row['other']}: {row['match']}" for row in rows))


def largest_first(items, capacity) -> int:
    """How many items the greedy way takes: the largest that fits, again and again (贪心)."""
    taken = 0
    for item in quicksort(items)[::-1]:
        taken += capacity // item
        capacity %= item
    return taken


def draw_knapsack(path: Path, table: pd.DataFrame) -> None:
    """Coins over the amount, the greedy way and the fewest."""
    title = "How many coins does an amount take? Coins of 1, 3, 6, 12, 24 and 30 pence"
    explained = "where one line is to be seen, both are equal"
    ways_to_pay = {
        "largest_first": ("largest coin first (greedy)", metrics.COLORS[1]),
        "fewest": ("fewest (dynamic programming)", metrics.COLORS[0]),
    }
    with metrics.picture(path, f"{title}\n({explained})") as axes:
        for column, (label, color) in ways_to_pay.items():
            axes.step(table["pence"], table[column], where="mid", color=color, label=label)
        axes.set(xlabel="amount (pence)", ylabel="number of coins", xticks=range(0, 121, 12))
        axes.set_ylim(bottom=0)
        axes.figure.legend(loc="outside lower center", ncols=2)


def show_knapsack(out: Path) -> None:
    """Amounts of money in old British coins: the fewest coins, the greedy way, and all ways."""
    rows = []
    for amount in range(1, 121):
        row = {
            "pence": amount,
            "fewest": fewest(PENCE, amount),
            "largest_first": largest_first(PENCE, amount),
            "ways": ways(PENCE, amount),
        }
        rows.append(row)
    table = pd.DataFrame(rows)
    table.to_csv(out / "puzzles_knapsack.csv", index=False)
    draw_knapsack(out / "puzzles_knapsack.png", table)
    worse = (table["largest_first"] > table["fewest"]).sum()
    print(f"\nknapsack: largest first takes too many coins for {worse} of {len(table)} amounts")
    print(table[table["pence"].isin((6, 12, 48, 54, 120))].to_string(index=False))


def main(out: Path = FIGURES) -> None:
    """Show the small programs at work: tables and pictures.

    Args:
        out: the folder that the tables and pictures go to.
    """
    print("Small programs (小题): a tree of this repository's files, quicksort's comparisons,")
    print("turned digits and old coins; seconds\n")
    out.mkdir(parents=True, exist_ok=True)
    show_tree(out)
    show_quicksort(out)
    show_rotations(out)
    show_knapsack(out)
    print(f"\ntables and pictures: {out}/puzzles_*")


if __name__ == "__main__":
    tyro.cli(main)
