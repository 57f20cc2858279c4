"""Decoding: how a language model's numbers become text (手撕解码).

    python -m interview.decoding                 a table and a picture into figures/interview/, 25 s
    python -m interview.decoding --out DIR       the same into DIR

Read `top_p` and `beam_search` first. A language model is a function step(tokens (B, T)) -> logits
(B, V): for each of V tokens, how likely it comes next. All here is what one does with it.
Axis letters in shape comments: B batch, T tokens so far, V vocabulary, W hypotheses of a beam.

1. Temperature, top-k, top-p (温度、top-k、top-p 采样)
   Asked     "Write sampling with temperature, top-k and top-p. What does each do?"
             「手写带温度、top-k、top-p 的采样。它们各起什么作用？」
   Idea      Temperature: p_i ∝ exp(z_i / t). Below 1 the likely ones gain, above 1 the others. The
             order never changes. top-k: only the k likeliest may be drawn. top-p (nucleus, 核采样):
             only the smallest set whose probability reaches p: few tokens where the model is sure,
             many where it is not. What may not be drawn gets z = −∞, so that softmax gives it 0.
             A draw: argmax of p_i / E_i with E_i ~ Exp(1) is token i with probability p_i (the
             Gumbel-max trick, as log p_i − log E_i is log p_i plus Gumbel noise).
   Cost      O(V) a token; O(V log V) where the tokens are sorted, as here.
   追问      In which order? Temperature, top-k, top-p, as here: top-p then sees the flattened or
             sharpened probabilities. Why not top-k alone? One k is too many after "once upon a"
             and too few after "my name is". t → 0? Greedy. t → ∞? Every token alike. Why filter at
             all? The tail: a thousand tokens of 0.01 % are drawn once in ten times.
   Mistakes  The token that crosses p is left out: with p = 0.5 and a token of 0.6 nothing remains.
             Zeros instead of −∞ in the logits. Probabilities not divided by their sum again.
             Ties: "all logits ≥ the k-th" keeps more than k.

2. Greedy (贪心)
   Asked     "Write greedy decoding. When is it good enough?"
             「手写贪心解码。什么时候够用？」
   Idea      Take the likeliest token, append it, ask again. After eos nothing but eos follows.
   Cost      n calls of the model; with a KV cache each reads one token (stage 3).
   追问      Is it the likeliest text? No: a good first word may have bad successors. Why does it
             repeat itself? Its own words make the same words likely again. Batches? Rows end at
             different times: those that did are filled with eos, and all stop when all have ended.
   Mistakes  Rows that ended go on. The loop runs on when every row has ended.

3. Beam search (束搜索)
   Asked     "Write beam search. What is the length penalty for?"
             「手写束搜索。长度惩罚有什么用？」
   Idea      Keep the `width` best beginnings. Extend each by all V tokens, and keep the best of
             the width · V. A score is a sum of log-probabilities.
             Each word makes the sum lower, so short texts win. Rank by score / length^α instead
             (Wu et al. 2016, eq. 14, have ((5 + length) / 6)^α): α = 0 is the plain sum, α = 1
             the mean a token.
   Cost      n calls of the model with `width` rows; O(width · V log(width · V)) to sort.
   追问      Does it find the best text? Only if the width is V^n; width 1 is greedy. Is wider
             better? The score never falls by much, the text often gets worse: the likeliest text is
             dull, or empty (Stahlberg and Byrne 2019). When to stop? Here after n tokens, or when
             all hypotheses have ended. With a KV cache? Its rows must follow their hypotheses.
   Mistakes  Products of probabilities underflow: add logarithms. A hypothesis that ended is
             dropped, or pays for the eos that fill it. At the first step `width` copies of the
             start: all hypotheses are then the same.
"""

import math
import numbers
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

import metrics
import stage1_mlp
from interview import check_whole
from interview.layers import at_least_float32, log_softmax, softmax

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "figures" / "interview"


# ---- Checks of the input --------------------------------------------------------------------


def check_logits(logits: Tensor) -> None:
    """ValueError unless each row (..., V) is a distribution: no nan, no +∞, not −∞ alone."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        found = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"logits must be a tensor of floating-point numbers, not {found}")
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits (..., V) with V ≥ 1 expected, not {tuple(logits.shape)}")
    largest = logits.amax(-1)  # of a row with a nan it is nan
    is_bad = ~largest.isfinite()
    if is_bad.any():
        found = largest[is_bad][0].item()
        raise ValueError(f"a row's largest logit must be finite, not {found}")


def check_number(name: str, value, low: float, high: float) -> None:
    """ValueError unless low < value ≤ high, and finite."""
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_real or not low < value <= high or not math.isfinite(value):
        wanted = f"a number above {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
        raise ValueError(f"{name} must be {wanted}, not {value!r}")


def check_search(start: Tensor, n: int, eos: int | None) -> None:
    """ValueError unless start (B, T) holds whole numbers, n ≥ 0, and eos is a token or None."""
    is_whole = isinstance(start, Tensor) and start.dtype in (torch.int64, torch.int32)
    if not is_whole or start.ndim != 2:
        is_tensor = isinstance(start, Tensor)
        found = f"{start.dtype} {tuple(start.shape)}" if is_tensor else type(start).__name__
        raise ValueError(f"start must hold whole numbers (B, T), not {found}")
    check_whole(0, n=n)
    if eos is not None:
        check_whole(0, eos=eos)


def next_logits(step: Callable, tokens: Tensor, eos: int | None) -> Tensor:
    """What step(tokens (B, T)) gives, (B, V); ValueError if it does not fit the tokens or eos."""
    logits = step(tokens)
    B = len(tokens)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != B:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"step must give logits ({B}, V), not {found}")
    if eos is not None and eos >= logits.shape[1]:
        raise ValueError(f"{eos=} is no token of a vocabulary of {logits.shape[1]}")
    return logits


def ended(tokens: Tensor, eos: int | None) -> Tensor:
    """Which rows of (B, T) end in eos: (B,) bool."""
    if eos is None:
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    return (tokens[:, -1:] == eos).any(1)  # of no tokens at all, False


# ---- 1. Temperature, top-k, top-p -----------------------------------------------------------


def temperature(logits: Tensor, t: float) -> Tensor:
    """logits / t (温度): any shape (..., V) -> the same shape.

    float16 and bfloat16 come back as float32: 1000 / 0.01 is more than float16 can hold.
    ValueError for t ≤ 0 and for rows that are no distribution.
    """
    check_number("t", t, 0, math.inf)
    check_logits(logits)
    return at_least_float32(logits) / t


def top_k(logits: Tensor, k: int) -> Tensor:
    """All but the k largest become −∞: any shape (..., V) -> the same shape.

    Exactly k remain, of equal logits the first ones; with k ≥ V all remain. ValueError for k < 1
    and for rows that are no distribution.
    """
    check_whole(k=k)
    check_logits(logits)
    order = logits.argsort(
        dim=-1, descending=True, stable=True
    )  # of equal ones the first comes first
    is_kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order[..., :k], True)
    return logits.masked_fill(~is_kept, -math.inf)


def top_p(logits: Tensor, p: float) -> Tensor:
    """All but the smallest set with probability p become −∞ (核采样): (..., V) -> the same shape.

    A token remains if those that are likelier do not reach p together: so the likeliest always
    remains. Of equal logits the first ones remain. Holtzman et al. 2020, eq. 2. ValueError unless
    0 < p ≤ 1, and for rows that are no distribution.
    """
    check_number("p", p, 0, 1)
    check_logits(logits)
    if p == 1:  # a sum that is rounded may reach 1 too early
        return logits
    probabilities = softmax(at_least_float32(logits))
    order = logits.argsort(dim=-1, descending=True, stable=True)
    sums = probabilities.gather(-1, order).cumsum(-1)
    before = F.pad(sums[..., :-1], (1, 0))  # the sum of all that are likelier
    rounding = 8 * torch.finfo(sums.dtype).eps  # 0.5 + 0.3 reaches 0.8, whatever the last bit says
    is_kept_in_order = before < p * (1 - rounding)
    is_kept = torch.zeros_like(is_kept_in_order).scatter(-1, order, is_kept_in_order)
    return logits.masked_fill(~is_kept, -math.inf)


def filtered(logits: Tensor, t: float = 1.0, k: int | None = None, p: float | None = None):
    """Temperature, then top-k, then top-p, as far as they are given: (..., V) -> (..., V)."""
    logits = temperature(logits, t)
    if k is not None:
        logits = top_k(logits, k)
    if p is not None:
        logits = top_p(logits, p)
    return logits


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A token drawn from each row's distribution after the three filters: (B, V) -> (B,) int64.

    ValueError as in `temperature`, `top_k`, `top_p`.
    """
    check_logits(logits)
    if logits.ndim != 2:
        raise ValueError(f"logits (B, V) expected, not {tuple(logits.shape)}")
    logits = at_least_float32(logits)
    logits = logits - logits.amax(-1, keepdim=True)  # at most 0: no temperature makes it overflow
    probabilities = softmax(filtered(logits, temperature, top_k, top_p))  # (B, V)
    noise = torch.empty_like(probabilities).exponential_(generator=generator)  # E ~ Exp(1)
    return (probabilities / noise).argmax(-1)


# ---- 2. Greedy, and any other choice token by token ------------------------------------------


def generate(
    step: Callable, start: Tensor, n: int, choose: Callable, eos: int | None = None
) -> Tensor:
    """start (B, T) and n tokens more, each by choose(logits (B, V)) -> (B,): (B, T + n).

    A row whose last token is eos, in start already or later, gets nothing but eos. Once all rows
    have ended, step is called no more. ValueError for what does not fit.
    """
    check_search(start, n, eos)
    tokens = start
    if len(start) == 0:
        return F.pad(start, (0, n))
    for _ in range(n):
        is_over = ended(tokens, eos)  # (B,)
        if is_over.all():
            n_left = start.shape[1] + n - tokens.shape[1]
            return F.pad(tokens, (0, n_left), value=int(eos))
        logits = next_logits(step, tokens, eos)  # (B, V)
        following = tokens.new_full((len(tokens),), 0 if eos is None else int(eos))
        check_logits(logits[~is_over])
        following[~is_over] = choose(logits[~is_over]).to(tokens.dtype)
        tokens = torch.cat([tokens, following[:, None]], 1)
    return tokens


def greedy(step: Callable, start: Tensor, n: int, eos: int | None = None) -> Tensor:
    """start (B, T) and n tokens more, each the likeliest one (贪心): (B, T + n).

    Of equal ones it is the first. eos and ValueError as in `generate`.
    """
    return generate(step, start, n, likeliest, eos)


def likeliest(logits: Tensor) -> Tensor:
    """The first of the largest: (B, V) -> (B,)."""
    return logits.argmax(-1)


# ---- 3. Beam search -------------------------------------------------------------------------


def beam_search(
    step: Callable,
    start: Tensor,
    n: int,
    width: int,
    eos: int | None = None,
    length_penalty: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The best of the `width` hypotheses that are kept at each step (束搜索), best first.

    start (1, T) -> sequences (W, T + n) and scores (W,) float64, sums of log-probabilities. W is
    the width, or less where fewer sequences have a probability above 0. Hypotheses are ranked,
    when they are kept and in the end, by score / length^length_penalty, where length counts the
    tokens after start up to the first eos, itself included; of equal ones the one that comes from
    a better hypothesis is first, then the one with the smaller token. After eos only eos follows,
    and costs nothing. ValueError for what does not fit.
    """
    check_search(start, n, eos)
    check_whole(width=width)
    check_number("length_penalty", length_penalty, -math.inf, math.inf)
    if len(start) != 1:
        raise ValueError(f"start (1, T) expected, not {tuple(start.shape)}")
    sequences = start
    on = {"device": start.device}
    scores = torch.zeros(1, dtype=torch.float64, **on)
    lengths = torch.zeros(1, dtype=torch.float64, **on)
    for _ in range(n):
        is_over = ended(sequences, eos)  # (W,)
        if is_over.all():
            n_left = start.shape[1] + n - sequences.shape[1]
            return F.pad(sequences, (0, n_left), value=int(eos)), scores
        logits = next_logits(step, sequences, eos).double()  # (W, V)
        check_logits(logits[~is_over])
        V = logits.shape[1]
        if eos is not None:  # of a hypothesis that is over only eos follows, with probability 1
            only_eos = torch.full((V,), -math.inf, dtype=torch.float64, **on)
            only_eos[eos] = 0.0
            logits = torch.where(is_over[:, None], only_eos, logits)
        lengths = lengths + (~is_over).double()
        candidates = scores[:, None] + log_softmax(logits)  # (W, V)
        ranks = candidates / lengths.clamp(min=1)[:, None] ** length_penalty
        best = ranks.flatten().argsort(dim=0, descending=True, stable=True)[:width]
        best = best[candidates.flatten()[best] > -math.inf]
        parent = best // V  # (W,), of the new W
        following = (best % V).to(sequences.dtype)
        sequences = torch.cat([sequences[parent], following[:, None]], 1)
        scores = candidates.flatten()[best]
        lengths = lengths[parent]
    return sequences, scores


# ---- Shown at work: a trigram model of Python's own manual -----------------------------------


class Trigrams:
    """How often each word follows the two before it, in a text (三元语法模型).

    __call__(tokens (B, T)) -> logits (B, V): log of the counts after the last two words; where
    these two were never seen, after the last one. −∞ for what never followed.
    """

    def __init__(self, words: list[str]):
        self.words = sorted(set(words))
        self.token_of = {word: token for token, word in enumerate(self.words)}
        tokens = [self.token_of[word] for word in words]
        tokens += tokens[:2]  # the text as a ring: something follows every word
        self.following = defaultdict(Counter)
        for first, second, third in zip(tokens, tokens[1:], tokens[2:], strict=False):
            self.following[first, second][third] += 1
            self.following[second,][third] += 1

    def __call__(self, tokens: Tensor) -> Tensor:
        logits = torch.full((len(tokens), len(self.words)), -math.inf)
        for row, (first, second) in zip(logits, tokens[:, -2:].tolist(), strict=True):
            counts = self.following.get((first, second), self.following[second,])
            row[list(counts)] = torch.tensor(list(counts.values())).log()
        return logits

    def start(self, words: str) -> Tensor:
        """(1, T)."""
        return torch.tensor([[self.token_of[word] for word in words.split()]])

    def text(self, tokens: Tensor) -> str:
        """Of one row (T,) of tokens, up to the first full stop."""
        words = [self.words[token] for token in tokens.tolist()]
        return " ".join(words).partition(" .")[0]


def manual() -> list[str]:
    """The words of Python's language reference, as its help() shows it; a full stop is a word."""
    from pydoc_data.topics import topics

    return re.findall(r"[a-z]+|\.", "\n".join(topics.values()).lower())


START = "in the"
EOS = "."
N_WORDS = 30
N_TEXTS = 200
CHOICES = {  # name -> arguments of `sample`, as of `filtered`
    "temperature 0.5": {"t": 0.5},
    "temperature 1": {},
    "temperature 2": {"t": 2.0},
    "top-k, k = 5": {"k": 5},
    "top-p, p = 0.5": {"p": 0.5},
    "top-p, p = 0.9": {"p": 0.9},
}
BEAMS = {  # name -> arguments of `beam_search`
    "beam of 10": {"width": 10},
    "beam of 10, α = 1": {"width": 10, "length_penalty": 1.0},
    "beam of 200": {"width": 200},
    "beam of 200, α = 1": {"width": 200, "length_penalty": 1.0},
}


def log_probabilities(step: Callable, tokens: Tensor, n_start: int, eos: int):
    """Of what follows the first n_start of tokens (B, T), up to the first eos: sums and lengths.

    Both (B,) float64; the plain model's sums, whatever drew the tokens.
    """
    sums = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
    lengths = torch.zeros_like(sums)
    for place in range(n_start, tokens.shape[1]):
        counts = tokens[:, place - 1] != eos  # (B,) else the text is over
        log_p = log_softmax(step(tokens[:, :place]).double())  # (B, V)
        found = log_p.gather(1, tokens[:, place, None])[:, 0]  # (B,)
        sums += found.where(counts, 0.0)
        lengths += counts
    return sums, lengths


def texts_of(model: Trigrams) -> dict[str, Tensor]:
    """What each strategy writes after START: {name: (N, T)}."""
    eos = model.token_of[EOS]
    start = model.start(START)
    found = {"greedy": greedy(model, start, N_WORDS, eos)}
    for name, arguments in BEAMS.items():
        found[name] = beam_search(model, start, N_WORDS, eos=eos, **arguments)[0][:1]
    for seed, (name, options) in enumerate(CHOICES.items()):
        generator = torch.Generator().manual_seed(seed)

        def choose(logits: Tensor, options=options, generator=generator) -> Tensor:
            return sample(filtered(logits, **options), generator=generator)

        found[name] = generate(model, start.expand(N_TEXTS, -1), N_WORDS, choose, eos)
    return found


def measure(model: Trigrams, found: dict[str, Tensor]) -> pd.DataFrame:
    """Rows of decoding_texts.csv: a strategy, its texts in numbers, and its first text."""
    n_start = len(START.split())
    rows = []
    for name, texts in found.items():
        log_p, lengths = log_probabilities(model, texts, n_start, model.token_of[EOS])
        row = {"experiment": "trigrams", "value": name, "texts": len(texts)}
        row["distinct_texts"] = len({model.text(tokens) for tokens in texts})
        row["log_probability"] = log_p.mean().item()
        row["per_word"] = (log_p.sum() / lengths.sum()).item()
        row["words"] = lengths.mean().item()
        rows.append(row | {"python": sys.version.split()[0], "first": model.text(texts[0])})
    return pd.DataFrame(rows)


def draw_filters(path: Path, model: Trigrams, n_shown: int = 20) -> None:
    """The next word's probability after START: as the model gives it, and after each filter."""
    logits = model(model.start(START))[0]  # (V,)
    likely = logits.argsort(dim=-1, descending=True, stable=True)[:n_shown]
    n_others = int(logits.isfinite().sum()) - n_shown
    names = [model.words[token] for token in likely] + [f"{n_others} others"]
    title = f"Which word follows “{START}”? What may be drawn, and how probably"
    size = {"width": 14, "height": 9, "sharex": True, "sharey": True}
    with metrics.picture(path, f"{title}\n(trigrams of Python's manual)", 2, 3, **size) as panels:
        for axes, (name, options) in zip(panels.flat, CHOICES.items(), strict=True):
            probabilities = softmax(filtered(logits, **options))
            percent = 100 * torch.cat([probabilities[likely], probabilities.sum()[None]])
            percent[-1] -= percent[:-1].sum()
            axes.bar(names, percent.numpy(), color=[metrics.COLORS[0]] * n_shown + ["0.6"])
            n_possible = int((probabilities > 0).sum())
            axes.set_title(f"{name}: {n_possible} words possible")
            axes.tick_params("x", rotation=90)
            axes.grid(False, axis="x")
        for axes in panels[:, 0]:
            axes.set_ylabel("probability (%)")


# ---- The program ----------------------------------------------------------------------------


def main(out: Path = FIGURES) -> int:
    """Show decoding at work: a trigram model of Python's manual, decoded in eleven ways.

    Args:
        out: the folder that the table and the picture go to.
    """
    print("Decoding (解码): what temperature, top-k, top-p, greedy and beam search make of one")
    print("model, trigrams of the words of Python's manual; half a minute")
    torch.set_num_threads(1)
    try:
        with stage1_mlp.claimed(out):
            model = Trigrams(manual())
            rows = measure(model, texts_of(model))
            metrics.save_rows(out / "decoding_texts.csv", rows.map(metrics.cell_text))
            draw_filters(out / "decoding_filters.png", model)
    except (stage1_mlp.DataError, ImportError, ValueError, OSError) as error:
        print(f"interview.decoding: {error}", file=sys.stderr)
        return 1
    print(f"\nAfter “{START}”, up to {N_WORDS} words or a full stop; log-probabilities in nats:")
    print(rows.drop(columns=["experiment", "python", "first"]).round(2).to_string(index=False))
    print("\nThe first text of each:")
    for row in rows.to_dict("records"):
        print(f"  {row['value']:20}{row['first']}")
    print(f"\ntables and pictures: {out}/decoding_*")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
