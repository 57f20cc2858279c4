"""interview/puzzles.py against numpy, sorted() and brute force."""

import itertools
import random
import sys

import numpy as np
import pytest

from interview import puzzles
from interview.puzzles import draw, fewest, quicksort, rotations_match, tree, ways

NAN = float("nan")

# ---- Paths to a tree ------------------------------------------------------------------------


def paths_of(tree):
    """Every path to a leaf: the way back."""
    for name, children in tree.items():
        if not children:
            yield name
        for path in paths_of(children):
            yield f"{name}/{path}"


def test_tree_of_paths():
    assert tree(["a/b/c", "a/d", "e", "a/b/f"]) == {
        "a": {"b": {"c": {}, "f": {}}, "d": {}},
        "e": {},
    }
    assert tree([]) == {}
    assert tree(["a", "a/b", "a"]) == {"a": {"b": {}}}
    assert tree(["a/b", "b/a", "b"]) == {"a": {"b": {}}, "b": {"a": {}}}
    assert tree(path for path in ("一/二", "一/ 三.txt")) == {"一": {"二": {}, " 三.txt": {}}}


def test_tree_gives_back_the_paths_it_was_made_of():
    rng = random.Random(0)
    leaves = {"/".join([*rng.choices("abc", k=rng.randint(0, 5)), f"leaf{n}"]) for n in range(60)}
    leaves = list(leaves)
    rng.shuffle(leaves)
    assert sorted(paths_of(tree(leaves))) == sorted(leaves)


def test_tree_keeps_the_order_of_the_paths():
    assert list(tree(["z", "a", "m/y", "m/b"])) == ["z", "a", "m"]
    assert list(tree(["z", "a", "m/y", "m/b"])["m"]) == ["y", "b"]


def test_draw_is_what_the_command_tree_draws():
    expected = """\
├── a
│   ├── b
│   │   ├── c
│   │   └── f
│   └── d
│       └── g
├── e
└── h
    └── i"""
    assert draw(tree(["a/b/c", "a/b/f", "a/d/g", "e", "h/i"])) == expected
    assert draw({}) == ""
    assert draw({"one": {}}) == "└── one"


def test_draw_can_be_read_back():
    """Depth from the indent, and order from the lines, give the tree again."""
    rng = random.Random(1)
    original = tree("/".join(rng.choices("abcd", k=rng.randint(1, 6))) for _ in range(40))
    read, above = {}, []
    for line in draw(original).splitlines():
        margin, name = line[:-1], line[-1]
        assert len(margin) % 4 == 0
        above = above[: len(margin) // 4 - 1]
        node = read
        for step in above:
            node = node[step]
        node[name] = {}
        above.append(name)
    assert read == original
    assert list(paths_of(read)) == list(paths_of(original))


def test_a_tree_deeper_than_pythons_recursion():
    deep = tree(["/".join(["a"] * 1500)])
    assert draw(deep).count("\n") == 1499


@pytest.mark.parametrize("path", ["", "/a", "a/", "a//b", 7, None, b"a/b"])
def test_a_path_that_is_none_is_refused(path):
    with pytest.raises(ValueError, match=r"a path must be .*'a/b/c', not ") as error:
        tree(["a", path])
    assert repr(path) in str(error.value)


def test_what_is_no_list_of_paths_or_no_tree_is_refused():
    with pytest.raises(ValueError, match="not the one string 'a/b'"):
        tree("a/b")
    with pytest.raises(ValueError, match="not None"):
        draw({"a": {"b": None}})
    with pytest.raises(ValueError, match=r"not \['a'\]"):
        draw(["a"])


# ---- Quicksort ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_quicksort_sorts_random_values_with_repeats(seed):
    rng = random.Random(seed)
    values = [rng.randint(-9, rng.choice((0, 9, 99))) for _ in range(rng.randint(0, 120))]
    before = list(values)
    result = quicksort(values)
    assert result == sorted(values)
    assert values == before
    assert result is not values


def test_quicksort_sorts_every_order_of_few_values():
    for values in itertools.product(range(4), repeat=5):
        assert quicksort(values) == sorted(values)


def test_quicksort_takes_what_can_be_ordered():
    assert quicksort([]) == []
    assert quicksort("pivot") == sorted("pivot")
    assert quicksort([(2, "a"), (1, "z"), (2, "A")]) == [(1, "z"), (2, "A"), (2, "a")]
    assert quicksort(np.array([2.5, -np.inf, np.inf, 0.0])) == [-np.inf, 0.0, 2.5, np.inf]
    assert quicksort(value for value in (3, 1, 2)) == [1, 2, 3]


N = 5000
ORDERS = {
    "sorted": list(range(N)),
    "reversed": list(range(N, 0, -1)),
    "equal": [3] * N,
    "two values": [0, 1] * (N // 2),
    "organ pipe": [*range(N // 2), *range(N // 2, 0, -1)],
    "random": random.Random(2).sample(range(N), N),
}


@pytest.mark.parametrize("name", ORDERS)
def test_quicksort_is_neither_quadratic_nor_deep(name, monkeypatch):
    """At most 4 n log2 n comparisons, where n² / 2 is 50 times as many, and log2 n calls deep."""
    depth = deepest = 0
    inner = puzzles.sort_between

    def watched(values, low, high):
        nonlocal depth, deepest
        depth += 1
        deepest = max(deepest, depth)
        inner(values, low, high)
        depth -= 1

    monkeypatch.setattr(puzzles, "sort_between", watched)
    monkeypatch.setattr(puzzles.Counted, "comparisons", 0)
    result = quicksort([puzzles.Counted(value) for value in ORDERS[name]])
    assert [value.number for value in result] == sorted(ORDERS[name])
    assert puzzles.Counted.comparisons < 4 * N * np.log2(N)
    assert deepest <= np.log2(N) + 1


def test_quicksort_needs_little_of_the_stack():
    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(150)
        assert all(quicksort(values) == sorted(values) for values in ORDERS.values())
    finally:
        sys.setrecursionlimit(limit)


def test_partition_by_its_definition():
    rng = random.Random(3)
    for _ in range(200):
        values = [rng.randint(0, 6) for _ in range(rng.randint(1, 30))]
        low = rng.randrange(len(values))
        high = rng.randrange(low, len(values))
        before = list(values)
        first, last = puzzles.partition(values, low, high)
        pivot = values[first]
        assert low <= first <= last <= high
        assert all(value < pivot for value in values[low:first])
        assert all(value == pivot for value in values[first : last + 1])
        assert all(value > pivot for value in values[last + 1 : high + 1])
        assert sorted(values[low : high + 1]) == sorted(before[low : high + 1])
        assert values[:low] + values[high + 1 :] == before[:low] + before[high + 1 :]


def test_values_without_an_order_are_refused():
    with pytest.raises(ValueError, match="nan has no place"):
        quicksort([1.0, NAN, 0.0])
    with pytest.raises(ValueError, match=r"must all compare by <: \[1, 'a', 2\]"):
        quicksort([1, "a", 2])
    with pytest.raises(ValueError, match="None"):
        quicksort([None, 3])


# ---- Rotations ------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_the_four_turns_match_and_mirrors_do_not(n):
    A = np.random.default_rng(n).permutation(n * n).reshape(n, n)
    for turns in range(4):
        B = np.rot90(A, turns)
        assert rotations_match(A, B) is True
        assert rotations_match(A.tolist(), B.tolist()) is True
        assert rotations_match(A, B.tolist()) is True
        assert rotations_match(A, B[:, ::-1]) is (n == 1)
        changed = B.copy()
        changed[n // 2, 0] += n * n
        assert rotations_match(A, changed) is False


def test_rotations_agree_with_brute_force_on_all_small_matrices():
    squares = [np.array(values).reshape(2, 2) for values in itertools.product(range(2), repeat=4)]
    for A, B in itertools.product(squares, repeat=2):
        expected = any(np.array_equal(np.rot90(A, turns), B) for turns in range(4))
        assert rotations_match(A, B) is expected


def test_rotations_of_other_contents_and_sizes():
    assert rotations_match([["a", "b"], ["c", "d"]], [["c", "a"], ["d", "b"]])
    assert rotations_match(np.float32([[1, 2], [3, 4]]), [[3, 1], [4, 2]])
    assert not rotations_match([[1, 2], [3, 4]], [[1]])
    assert not rotations_match([[NAN]], [[NAN]])
    A = [[1, 2], [3, 4]]
    rotations_match(A, [[3, 1], [4, 2]])
    assert A == [[1, 2], [3, 4]]


@pytest.mark.parametrize("bad", [[[1, 2]], [1, 2], [[1, 2], [3]], 5, [], np.zeros((2, 2, 2))])
def test_what_is_not_square_is_refused(bad):
    with pytest.raises(ValueError, match="A must be a square matrix, not"):
        rotations_match(bad, [[1]])
    with pytest.raises(ValueError, match="B must be a square matrix, not"):
        rotations_match([[1]], bad)
    if not isinstance(bad, np.ndarray):
        with pytest.raises(ValueError) as error:
            rotations_match(bad, [[1]])
        assert repr(bad) in str(error.value)


# ---- Knapsack -------------------------------------------------------------------------------


def all_fillings(items, capacity):
    """How many of each item, for every combination that fills the capacity exactly."""
    counts = itertools.product(*(range(capacity // item + 1) for item in items))
    for count in counts:
        if sum(n * item for n, item in zip(count, items, strict=True)) == capacity:
            yield count


@pytest.mark.parametrize("items", [(1, 3, 4), (2, 5), (3, 7, 8), (4, 6), (5,), (9, 2, 6, 5), ()])
def test_knapsack_equals_brute_force(items):
    for capacity in range(26):
        fillings = list(all_fillings(items, capacity))
        expected = min((sum(count) for count in fillings), default=None)
        assert fewest(items, capacity) == expected
        assert ways(items, capacity) == len(fillings)


def test_knapsack_by_hand():
    assert fewest([1, 3, 4], 6) == 2  # 3 + 3, where the greedy way takes 4 + 1 + 1
    assert ways([1, 2], 3) == 2  # 1 + 1 + 1 and 1 + 2; 2 + 1 is the same
    assert fewest([2, 4], 7) is None
    assert ways([2, 4], 7) == 0
    assert (fewest([5], 0), ways([5], 0)) == (0, 1)
    assert (fewest([], 0), ways([], 0)) == (0, 1)
    assert (fewest([], 3), ways([], 3)) == (None, 0)
    assert ways([1, 2, 5, 10, 20, 50, 100, 200], 200) == 73682  # Project Euler 31
    assert ways([1, 1], 2) == 3  # two kinds of one size


def test_knapsack_takes_numpy_numbers_and_any_iterable():
    result = fewest(np.array([2, 5]), np.int64(11)), ways(np.array([2, 5]), np.int64(10))
    assert result == (4, 2)
    assert [type(number) for number in result] == [int, int]
    assert fewest(iter([4, 3]), 10) == 3


def test_the_order_of_the_items_does_not_matter():
    for items in itertools.permutations((2, 3, 7)):
        assert [fewest(items, c) for c in range(20)] == [fewest((2, 3, 7), c) for c in range(20)]
        assert [ways(items, c) for c in range(20)] == [ways((2, 3, 7), c) for c in range(20)]


@pytest.mark.parametrize("function", [fewest, ways])
@pytest.mark.parametrize(
    ("items", "capacity", "message"),
    [
        ([2, 0], 4, "an item's size must be a whole number of at least 1, not 0"),
        ([-3], 4, "an item's size must be a whole number of at least 1, not -3"),
        ([1.5], 3, "an item's size must be a whole number of at least 1, not 1.5"),
        ([True], 3, "an item's size must be a whole number of at least 1, not True"),
        (["2"], 4, "an item's size must be a whole number of at least 1, not '2'"),
        ([2], -1, "capacity must be a whole number of at least 0, not -1"),
        ([2], 4.0, "capacity must be a whole number of at least 0, not 4.0"),
    ],
)
def test_bad_sizes_and_capacities_are_refused(function, items, capacity, message):
    with pytest.raises(ValueError, match=message):
        function(items, capacity)


# ---- Shown on real data ---------------------------------------------------------------------


def test_largest_first_is_the_greedy_way():
    assert puzzles.largest_first(puzzles.PENCE, 48) == 3
    assert fewest(puzzles.PENCE, 48) == 2
    assert all(
        puzzles.largest_first(puzzles.PENCE, c) >= fewest(puzzles.PENCE, c) for c in range(200)
    )


def test_main_saves_tables_and_pictures(tmp_path, capsys):
    puzzles.main(tmp_path / "new" / "folder")
    names = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert names == [
        "puzzles_knapsack.csv",
        "puzzles_knapsack.png",
        "puzzles_quicksort.csv",
        "puzzles_quicksort.png",
        "puzzles_rotations.csv",
        "puzzles_rotations.png",
        "puzzles_tree.txt",
    ]
    assert "largest first takes too many coins for 18 of 120 amounts" in capsys.readouterr().out
