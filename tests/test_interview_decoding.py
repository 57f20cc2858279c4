"""interview/decoding.py against brute force, closed forms and the shares of 20,000 draws."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from interview import decoding
from interview.exercises import scored_continuations, table_step

INF = math.inf


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, generator=generator, dtype=dtype)


def kept(logits):
    """Which tokens of each row may be drawn."""
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


# ---- the filters ----


def test_temperature_of_half_precision_is_float32_and_finite():
    for dtype in (torch.float16, torch.bfloat16):
        found = decoding.temperature(torch.tensor([1000.0, -1000.0], dtype=dtype), 0.01)
        assert found.dtype == torch.float32
        assert found.isfinite().all()
    assert decoding.temperature(draw(2, 3), np.float32(2)).dtype == torch.float64


@pytest.mark.parametrize("k", [1, 3, 7, 99, np.int64(2)])
def test_top_k_keeps_the_k_largest(k):
    logits = draw(2, 3, 7)
    found = decoding.top_k(logits, k)
    smallest = logits.topk(min(int(k), 7)).values[..., -1:]
    assert torch.equal(found, logits.masked_fill(logits < smallest, -INF))


def test_of_equal_logits_the_first_ones_remain():
    logits = torch.zeros(1, 5)
    assert kept(decoding.top_k(logits, 2)) == [[0, 1]]
    assert kept(decoding.top_p(logits, 0.4)) == [[0, 1]]
    assert kept(decoding.top_p(logits, 0.41)) == [[0, 1, 2]]


@pytest.mark.parametrize("p", [1e-9, 0.2, 0.5, 0.9, 0.999, 1.0, 1])
def test_top_p_is_the_smallest_set_that_reaches_p(p):
    logits = draw(40, 6, seed=1)
    probabilities = F.softmax(logits, 1)
    for row, shares in zip(kept(decoding.top_p(logits, p)), probabilities, strict=True):
        assert shares[row].sum() >= p - 1e-12
        without = shares[row].sum() - shares[row].min()
        assert without < p
        assert shares[row].min() >= shares.topk(len(row)).values.min()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_p_on_the_edge_ignores_the_last_bit(dtype):
    logits = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.2, 0.7]], dtype=dtype).log()
    assert kept(decoding.top_p(logits, 0.8)) == [[1, 2], [1, 2]]
    assert kept(decoding.top_p(logits, 0.5)) == [[1], [2]]


def test_what_may_not_be_drawn_already_stays_so():
    logits = torch.tensor([[-INF, 1.0, -INF, 0.0]])
    assert kept(decoding.top_k(logits, 3)) == [[1, 3]]
    assert kept(decoding.top_p(logits, 0.999)) == [[1, 3]]
    assert kept(decoding.temperature(logits, 0.5)) == [[1, 3]]
    assert decoding.top_p(torch.zeros(0, 4), 0.5).shape == (0, 4)


BAD_ROWS = [[0.0, math.nan], [-INF, -INF], [0.0, INF]]


@pytest.mark.parametrize("row", BAD_ROWS)
@pytest.mark.parametrize(
    "call",
    [
        lambda z: decoding.temperature(z, 1.0),
        lambda z: decoding.top_k(z, 1),
        lambda z: decoding.top_p(z, 0.5),
        lambda z: decoding.top_p(z, 1.0),
        decoding.sample,
        lambda z: decoding.greedy(lambda tokens: z, torch.zeros(1, 1, dtype=torch.long), 2),
        lambda z: decoding.beam_search(lambda tokens: z, torch.zeros(1, 1, dtype=torch.long), 2, 2),
    ],
)
def test_rows_that_are_no_distribution_are_refused(call, row):
    with pytest.raises(ValueError, match=r"largest logit must be finite, not (nan|-inf|inf)"):
        call(torch.tensor([row]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "t must be a number above 0, not 0"),
        ({"temperature": -1.0}, "not -1.0"),
        ({"temperature": math.nan}, "not nan"),
        ({"temperature": INF}, "not inf"),
        ({"temperature": True}, "not True"),
        ({"temperature": "1"}, "not '1'"),
        ({"top_p": 0.0}, "p must be a number above 0 and at most 1, not 0.0"),
        ({"top_p": 1.01}, "not 1.01"),
        ({"top_p": True}, "not True"),
        ({"top_k": 0}, "k must be a whole number of at least 1, not 0"),
        ({"top_k": 2.0}, "not 2.0"),
        ({"top_k": True}, "not True"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        decoding.sample(draw(2, 3), **options)


def test_logits_of_another_kind_are_refused():
    for bad in (torch.zeros(2, 3, dtype=torch.long), [[1.0]], torch.zeros(2, 0), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="logits"):
            decoding.top_k(bad, 1)
    with pytest.raises(ValueError, match=r"\(B, V\) expected, not \(3,\)"):
        decoding.sample(torch.zeros(3))


# ---- sample ----


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_p": 0.7},
        {"temperature": 3.0, "top_k": 4, "top_p": 0.8},
    ],
)
def test_20_000_draws_have_the_shares_of_the_filtered_distribution(options):
    logits = draw(6, seed=2)
    generator = torch.Generator().manual_seed(3)
    drawn = decoding.sample(logits.expand(20_000, -1), generator=generator, **options)
    z = logits / options.get("temperature", 1.0)
    order = z.argsort(descending=True)
    z[order[options.get("top_k", 6) :]] = -INF
    sums = F.softmax(z, 0)[order].cumsum(0)
    n_kept = int((sums < options.get("top_p", 1.0) - 1e-12).sum()) + 1
    z[order[n_kept:]] = -INF
    shares = F.softmax(z, 0)
    counts = torch.bincount(drawn, minlength=6)
    assert counts[shares == 0].sum() == 0
    possible = shares > 0
    expected = 20_000 * shares[possible]
    chi_squared = ((counts[possible] - expected) ** 2 / expected).sum()
    assert chi_squared < 25  # of at most 5 degrees of freedom: once in 7,000


def test_a_draw_depends_on_the_generator_alone():
    logits = draw(500, 4)
    first = decoding.sample(logits, generator=torch.Generator().manual_seed(1))
    torch.rand(3)
    assert torch.equal(first, decoding.sample(logits, generator=torch.Generator().manual_seed(1)))
    other = decoding.sample(logits, generator=torch.Generator().manual_seed(2))
    assert not torch.equal(first, other)


def test_extreme_draws():
    logits = draw(50, 7)
    assert torch.equal(decoding.sample(logits, temperature=1e-300), logits.argmax(1))
    assert torch.equal(decoding.sample(logits, top_k=1), logits.argmax(1))
    assert torch.equal(decoding.sample(1e30 * logits), logits.argmax(1))
    assert torch.equal(decoding.sample(logits.bfloat16(), top_k=1), logits.bfloat16().argmax(1))
    assert decoding.sample(torch.zeros(0, 4)).shape == (0,)
    only = torch.full((9, 5), -INF)
    only[:, 3] = -1e30
    assert decoding.sample(only).eq(3).all()


# ---- greedy ----


def test_rows_that_have_ended_get_eos_and_the_model_is_asked_no_more():
    calls = []

    def step(tokens):
        calls.append(tokens.shape)
        logits = torch.zeros(len(tokens), 4)
        logits[:, 2 if tokens.shape[1] == 3 else 1] = 1.0  # 1, then 2, which ends
        logits[tokens[:, -1] == 2] = math.nan  # of what has ended nobody looks at the logits
        return logits

    start = torch.tensor([[0, 2], [0, 0]])
    found = decoding.greedy(step, start, 6, eos=np.int64(2))
    assert found.tolist() == [[0, 2, *[2] * 6], [0, 0, 1, 2, 2, 2, 2, 2]]
    assert calls == [(2, 2), (2, 3)]


def test_nothing_to_write():
    step = table_step(4)
    start = torch.tensor([[1, 2], [0, 3]])
    assert torch.equal(decoding.greedy(step, start, 0), start)
    assert decoding.greedy(step, start[:0], 3).shape == (0, 5)
    sequences, scores = decoding.beam_search(step, start[:1], 0, 3)
    assert torch.equal(sequences, start[:1])
    assert scores.tolist() == [0.0]


def test_greedy_takes_the_first_of_equal_ones():
    start = torch.zeros(2, 1, dtype=torch.long)
    found = decoding.greedy(lambda tokens: torch.zeros(len(tokens), 3), start, 2)
    assert found.tolist() == [[0, 0, 0]] * 2


# ---- beam search ----


@pytest.mark.parametrize("eos", [None, 1])
@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_full_width_is_brute_force(eos, alpha, dtype):
    table = table_step(3, seed=5)

    def step(tokens):
        return table(tokens).to(dtype)

    start = torch.tensor([[2, 0]])
    sequences, scores = decoding.beam_search(step, start, 4, 500, eos, alpha)
    expected, log_p = scored_continuations(step, start, 4, eos, alpha)
    torch.testing.assert_close(scores, log_p)
    assert {tuple(row) for row in sequences.tolist()} == {tuple(row) for row in expected.tolist()}
    assert torch.equal(sequences[0], expected[0])


@pytest.mark.parametrize("eos", [None, 1])
def test_width_1_is_greedy(eos):
    for seed in range(8):
        step = table_step(5, seed=seed)
        start = torch.tensor([[3, 0]])
        sequences, _ = decoding.beam_search(step, start, 9, 1, eos)
        assert torch.equal(sequences, decoding.greedy(step, start, 9, eos))


def test_each_step_keeps_the_best_of_all_extensions():
    step = table_step(5, seed=2)
    beam = [((4,), 0.0)]
    for _ in range(5):
        extended = []
        for tokens, score in beam:
            log_p = F.log_softmax(step(torch.tensor([tokens])), 1)[0]
            extended += [((*tokens, i), score + log_p[i].item()) for i in range(5)]
        beam = sorted(extended, key=lambda entry: -entry[1])[:3]
    sequences, scores = decoding.beam_search(step, torch.tensor([[4]]), 5, 3)
    assert [tuple(row) for row in sequences.tolist()] == [tokens for tokens, _ in beam]
    assert scores.tolist() == pytest.approx([score for _, score in beam])


def test_fewer_sequences_than_the_width():
    def step(tokens):
        return torch.tensor([[0.0, -INF, 0.0]]).repeat(len(tokens), 1)

    sequences, scores = decoding.beam_search(step, torch.tensor([[1]]), 2, 9)
    assert sequences.tolist() == [[1, 0, 0], [1, 0, 2], [1, 2, 0], [1, 2, 2]]
    assert scores.tolist() == pytest.approx([-2 * math.log(2)] * 4)


def test_a_start_that_has_ended_costs_nothing():
    sequences, scores = decoding.beam_search(table_step(4), torch.tensor([[0, 3]]), 5, 4, eos=3)
    assert sequences.tolist() == [[0, 3, *[3] * 5]]
    assert scores.tolist() == [0.0]


def test_the_penalty_prefers_the_longer_text():
    """Ending at once has probability 0.4, going on 0.6 and then 0.6: 0.36 in all."""

    def step(tokens):
        return torch.tensor([[0.6, 0.4]]).log().repeat(len(tokens), 1)

    start = torch.tensor([[0]])
    plain, scores = decoding.beam_search(step, start, 2, 4, eos=1)
    assert plain[0].tolist() == [0, 1, 1]
    assert scores[0].item() == pytest.approx(math.log(0.4))
    long, scores = decoding.beam_search(step, start, 2, 4, eos=1, length_penalty=1.0)
    assert long[0].tolist() == [0, 0, 0]
    assert scores[0].item() == pytest.approx(math.log(0.36))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"start": torch.zeros(2, 3, dtype=torch.long)}, r"start \(1, T\) expected, not \(2, 3\)"),
        ({"start": torch.zeros(3, dtype=torch.long)}, r"start must .*\(B, T\), not .*\(3,\)"),
        ({"start": torch.zeros(1, 3)}, "start must hold whole numbers .*float32"),
        ({"n": -1}, "n must be a whole number of at least 0, not -1"),
        ({"n": True}, "n must be .*, not True"),
        ({"width": 0}, "width must be a whole number of at least 1, not 0"),
        ({"width": 1.5}, "width must be .*, not 1.5"),
        ({"eos": -1}, "eos must be a whole number of at least 0, not -1"),
        ({"eos": 4}, "eos=4 is no token of a vocabulary of 4"),
        ({"length_penalty": math.nan}, "length_penalty must be .*, not nan"),
        ({"step": lambda tokens: torch.zeros(4)}, r"step must give logits \(1, V\), not \(4,\)"),
    ],
)
def test_what_does_not_fit_a_search_is_refused(changed, message):
    arguments = {"step": table_step(4), "start": torch.tensor([[0, 1]]), "n": 2, "width": 2}
    with pytest.raises(ValueError, match=message):
        decoding.beam_search(**(arguments | changed))


# ---- the program ----


def test_trigrams_count_what_follows():
    model = decoding.Trigrams(list("abcabd.abc"))
    logits = model(model.start("a b"))
    shares = dict(zip(model.words, F.softmax(logits, 1)[0].tolist(), strict=True))
    assert shares == pytest.approx({"a": 0, "b": 0, "c": 2 / 3, "d": 1 / 3, ".": 0})
    after_b = F.softmax(model(model.start("d b")), 1)  # never seen together: all that follows b
    assert after_b[0, model.token_of["c"]].item() == pytest.approx(2 / 3)


def test_the_program_saves_its_table_and_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        decoding, "manual", lambda: ("in the red house . in the blue sea . " * 9).split()
    )
    monkeypatch.setattr(decoding, "N_TEXTS", 5)
    monkeypatch.setattr(decoding, "draw_filters", lambda path, model: path.write_bytes(b""))
    assert decoding.main(tmp_path) == 0
    rows = pd.read_csv(tmp_path / "decoding_texts.csv").set_index("value")
    assert rows.loc["greedy", "log_probability"] == pytest.approx(math.log(0.5))
    assert rows.loc["greedy", "words"] == 3
    assert "in the blue sea" in capsys.readouterr().out
