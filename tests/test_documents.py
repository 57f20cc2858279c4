"""The documents: their links lead somewhere, their numbers are those of the committed tables."""

import itertools
import re

import documents
import pandas as pd
import pytest
from documents import ROOT
from scipy import stats

import metrics

SUMMARIES = [f"figures/stage{stage}/summary.md" for stage in (1, 2, 3)]


@pytest.mark.parametrize("document", [*documents.DOCUMENTS, *SUMMARIES])
def test_every_link_leads_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    assert links
    for link in links:
        assert ((ROOT / document).parent / link).exists(), link


def anchor_of(heading: str) -> str:
    """The name by which GitHub links a heading: small letters, hyphens, no other marks."""
    shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", shown).replace(" ", "-")


@pytest.mark.parametrize("document", documents.DOCUMENTS)
def test_every_anchor_is_a_heading(document):
    path = ROOT / document
    links = re.findall(r"\]\(([^)#]*)#([^)]+)\)", path.read_text(encoding="utf-8"))
    for file, anchor in links:
        if "://" in file:
            continue
        target = path.parent / file if file else path
        prose = re.sub(r"```.*?```", "", target.read_text(encoding="utf-8"), flags=re.DOTALL)
        anchors = [anchor_of(heading) for heading in re.findall(r"^#+ (.*)$", prose, re.MULTILINE)]
        assert anchor in anchors, f"{file}#{anchor}"


def stray_stars(text: str) -> list[str]:
    """Lines in which ** is shown as stars: after a mark such as 。 and before a letter, say."""
    prose = re.sub(r"```.*?```|<!--.*?-->", "", text, flags=re.DOTALL)
    found = []
    for line in re.sub(r"`[^`\n]*`", "x", prose).splitlines():
        parts = line.split("**")
        for index, (before, after) in enumerate(itertools.pairwise(parts)):
            inner, outer = (before[-1:], after[:1]) if index % 2 else (after[:1], before[-1:])
            if outer.isalnum() and inner and not inner.isalnum():
                found.append(line)
    return found


@pytest.mark.parametrize("document", documents.DOCUMENTS)
def test_bold_beside_chinese_is_bold(document):
    assert stray_stars("**盲测：**阶段") == ["**盲测：**阶段"]
    assert stray_stars("**盲测**：阶段，**好。** 再来") == []
    assert stray_stars((ROOT / document).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("document", documents.DOCUMENTS)
def test_every_number_is_that_of_the_table_that_it_names(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    assert documents.wrong_numbers(text) == []


@pytest.mark.parametrize("document", documents.DOCUMENTS)
def test_no_measured_number_stands_there_without_its_table(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    assert documents.unmarked_numbers(text) == []


@pytest.fixture
def rows():
    return metrics.load_rows(ROOT / "figures" / "stage1" / "test_metrics.csv")


MEANING = '<!-- stage1/test_metrics.csv; experiment == "baseline"; 100 * accuracy -->'


def test_a_number_is_compared_in_its_own_decimals(rows):
    accuracy = 100 * rows.loc[rows["experiment"] == "baseline", "accuracy"]
    right = f"{accuracy.mean():.2f} ± {accuracy.std(ddof=1):.2f}"
    assert (
        documents.wrong_numbers(
            f"It has {right} % {MEANING} of all, or {accuracy.mean():.1f} % {MEANING}"
        )
        == []
    )
    (line,) = documents.wrong_numbers(f"It has {accuracy.mean() + 0.1:.2f} %{MEANING} of all.")
    assert f"should be {accuracy.mean():.2f}" in line


def test_numbers_are_filled_in_with_sign_and_commas(rows):
    scores = dict(list(rows.groupby("experiment")["accuracy"]))
    gain = 100 * (scores["deformed"].to_numpy() - scores["baseline"].to_numpy()).mean()
    text = '+?.??<!-- stage1/test_metrics.csv; experiment == "deformed"; '
    text += "100 * difference(accuracy, of('experiment == \"baseline\"', 'accuracy')) --> more; "
    text += "?<!-- ; ; 784 * 128 --> weights, ?.?<!-- ; ; 1 - 3.55 -->"
    shown = documents.COMMENT.sub("", documents.filled(text))
    assert shown == f"+{gain:.2f} more; 100,352 weights, −2.5"


@pytest.mark.parametrize(
    "short, query",
    [
        ("baseline", 'experiment == "baseline"'),
        ("depth = 2", 'experiment == "depth" and value == "2"'),
        ("depth = 2 and seed == 1", 'experiment == "depth" and value == "2" and seed == 1'),
        ("seed == 1 and experiment in ('depth', 'width')", 'seed == 1 and layers == "whole"'),
    ],
)
def test_a_query_may_name_experiment_and_value(short, query, monkeypatch):
    rows = pd.DataFrame({"experiment": ["baseline", "depth", "depth", "width", "depth"]})
    rows["value"] = ["784-128", "2", "2", "2", "3"]
    rows["seed"] = [0, 0, 1, 1, 1]
    rows["layers"] = ["", "", "whole", "whole", "whole"]
    monkeypatch.setattr(documents, "cached_table", lambda path: rows)
    pd.testing.assert_frame_equal(documents.rows_of("any.csv", short), rows.query(query))


@pytest.mark.parametrize(
    "text, said",
    [
        ("1.0<!-- stage1/none.csv; ; accuracy -->", "figures/stage1/none.csv is missing"),
        ("1.0<!-- stage1/runs.csv; experiment == 'x'; seed -->", "no row of stage1/runs.csv"),
        ("1.0 ± 0.1<!-- ; ; 1.0 -->", "should be 1.0 ± nan"),
        ("nothing <!-- ; ; 1.0 -->", "no number stands before"),
    ],
)
def test_a_comment_that_says_nothing_is_found(text, said):
    (line,) = documents.wrong_numbers(text)
    assert said in line


def test_measured_numbers_that_nothing_explains_are_found():
    text = f"It gets 98.61 %{MEANING}, 98.4 %<!-- source: a paper --> there; `lr=0.1`, $0.5^2$, 3"
    assert documents.unmarked_numbers(text) == []
    assert len(documents.unmarked_numbers(f"{text}, 12 % more, 0.71 of the time")) == 2


def test_differences_have_the_interval_that_is_named(rows):
    """Against scipy's: of the seeds' differences, and Welch's, for unequal numbers of seeds."""
    first = 100 * rows.loc[rows["experiment"] == "deformed", "accuracy"].to_numpy()
    second = 100 * rows.loc[rows["experiment"] == "baseline", "accuracy"].to_numpy()

    def as_scipy(result):
        low, high = result.confidence_interval(0.95)
        return pytest.approx(((low + high) / 2, (high - low) / 2))

    assert documents.paired(first, second) == as_scipy(stats.ttest_rel(first, second))
    fewer = second[:-1]
    result = stats.ttest_ind(first, fewer, equal_var=False)
    assert documents.welch(first, fewer) == as_scipy(result)


def test_a_number_may_be_compared_with_one_of_another_table():
    text = '+?.??<!-- stage1/test_metrics.csv; experiment == "baseline"; 100 * accuracy.mean() - '
    text += "100 * of('experiment == \"baseline\"', 'test_accuracy', 'stage1/runs.csv').mean() -->"
    assert documents.COMMENT.sub("", documents.filled(text)) in ("+0.00", "−0.00")


def test_the_log_lists_each_of_its_sections():
    text = (ROOT / "LEARNING_LOG.md").read_text(encoding="utf-8")
    assert "## Contents" in text
    assert documents.with_contents(text) == text, "python tests/documents.py --fill LEARNING_LOG.md"


def test_contents_are_made_of_the_headings_below_them():
    text = "# T\n\n## Contents (目录)\n\nold [x](#x)\n\n## The record (a, b)\n\n## It's: √d?\n"
    assert documents.with_contents(text) == (
        "# T\n\n## Contents (目录)\n\n- **[The record (a, b)](#the-record-a-b)** · "
        "[It's: √d?](#its-d)\n\n## The record (a, b)\n\n## It's: √d?\n"
    )
    assert documents.with_contents("# no contents") == "# no contents"
