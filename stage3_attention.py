"""Stage 3: multi-head (多头), grouped-query and multi-query attention (注意力), and a cache.

Fashion-MNIST, test accuracy with 8, 4, 2, 1 key/value heads:
91.22 ± 0.10, 91.15 ± 0.15, 91.18 ± 0.10, 91.10 ± 0.10 %.

    python stage3_attention.py             all but gqa4, gqa2 and mqa, which are long
    python stage3_attention.py demo        a random matrix through MHA, GQA, MQA: who shares what
    python stage3_attention.py train       a classifier with 8 key/value heads, 5 seeds
    python stage3_attention.py gqa4        the same with 4 key/value heads; also: gqa2, mqa
    python stage3_attention.py sweep --only kv_heads position --seeds 3
    python stage3_attention.py faults      what goes wrong: provoked, measured, mended
    python stage3_attention.py benchmark   decoding from a cache, training steps; also of torch
    python stage3_attention.py plot        draw figures/stage3/ again from its saved rows

Axis letters: B batch, T tokens or queries, S keys, F features, D width, H heads, G key/value heads,
d width of a head.
"""

import functools
import itertools
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import metrics
import runner
from runner import Data, Fault, Run, Split, batches, one_cycle, parameter_groups

# -------- 2. Config -------------------------------------------------------------------------------

CLASSES = [
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
]
MEAN, STD = 0.2860, 0.3530  # of the training pixels, 0 … 1
# of Fashion-MNIST's 60,000 training images; its 10,000 test images stay whole
N_TRAIN, N_VAL = 55_000, 5_000
OPTIMIZERS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
CHOICES = {
    "position": ["none", "learned", "sinusoidal", "relative", "rotary"],
    "tokens": ["rows", "patches"],
    "readout": ["all", "mean"],
    "optimizer": list(OPTIMIZERS),
}
LIMITS = {  # each value is at least the first and less than the second
    **dict.fromkeys(
        ("n_heads", "n_kv_heads", "d_model", "n_blocks", "batch_size", "epochs", "n_logs"),
        (1, math.inf),
    ),
    **dict.fromkeys(("padding", "weight_decay", "clip", "steps"), (0, math.inf)),
    **dict.fromkeys(("dropout", "label_smoothing", "warmup"), (0, 1)),
    **{"n_train": (1, N_TRAIN + 1), "seed": (0, 2**32), "lr": (1e-12, math.inf)},
}


@dataclass(frozen=True)
class Config:
    n_heads: int = 8  # query heads of a block
    # key/value heads: as many is multi-head, 1 multi-query, between them grouped-query attention
    n_kv_heads: int = 8
    d_model: int = 96  # width of a token inside the network
    n_blocks: int = 2
    position: str = "learned"  # how the network knows where a token stands
    scaled: bool = True  # scores over √d
    causal: bool = False  # a token attends to those up to itself alone
    tokens: str = "rows"  # how an image becomes tokens, see tokens_of
    # what is classified: the states of all tokens side by side, or their mean, for any number T
    readout: str = "all"
    padding: int = 0  # tokens of zeros after each image's own
    masked: bool = True  # hide the padding
    # share of the features of what a block adds that are zeroed for a whole image in training
    dropout: float = 0.2
    label_smoothing: float = 0.1  # share of the target that is spread evenly over all classes
    # train with products in bfloat16, on a device that has instructions for them
    bfloat16: bool = True
    optimizer: str = "adamw"
    lr: float = 3e-3  # the highest learning rate of the schedule
    weight_decay: float = 0.3  # of weights, not of biases
    # share of the run in which the learning rate rises; it falls along a cosine after
    warmup: float = 0.2
    clip: float = 1.0  # largest gradient norm; 0 switches clipping off
    batch_size: int = 256
    epochs: int = 14  # passes over the training images
    steps: int = 0  # number of updates, whatever epochs says; 0 leaves it to epochs
    n_train: int = N_TRAIN  # training images used
    n_logs: int = 14  # evaluations on the validation images during a run
    seed: int = 0  # of weights, batch order and dropout; never of the validation split

    def __post_init__(self):
        runner.check_config(self, CHOICES, LIMITS)
        if (
            self.d_model % (self.n_heads * (2 if self.position == "rotary" else 1))
            or self.n_heads % self.n_kv_heads
        ):
            raise ValueError(
                f"{self.d_model=}, {self.n_heads=}, {self.n_kv_heads=}: no multiples of each other"
            )

    @property
    def n_steps(self) -> int:
        return self.steps or self.epochs * math.ceil(self.n_train / self.batch_size)


# a sweep is a list of changes to its base Config; to add one, add its list here and what it varies
# below
SWEEPS: dict[str, list[dict]] = {
    "kv_heads": [{"n_kv_heads": n} for n in (8, 4, 2, 1)],
    "heads": [{"n_heads": n, "n_kv_heads": n} for n in (1, 2, 4, 8, 16)],
    "width": [{"d_model": n} for n in (16, 32, 64, 128)],
    "blocks": [{"n_blocks": n} for n in (1, 2, 3, 4)],
    "position": [{"position": position, "readout": "mean"} for position in CHOICES["position"]],
    "steps": [{"steps": n} for n in (100, 300, 1000)],
    **{name: [{name: value} for value in CHOICES[name]] for name in ("tokens", "readout")},
}
# runs of `faults` that are compared with each other: what becomes of the softmax as heads grow
# wider?
ONE_HEAD = {"n_heads": 1, "n_kv_heads": 1, "dropout": 0.0, "padding": 0, "steps": 150}
PROBES = {
    "scale": [ONE_HEAD | {"scaled": s, "d_model": n} for s in (True, False) for n in (16, 64, 256)]
}
AXES = {
    "kv_heads": "key/value heads for 8 query heads",
    "heads": "heads of the same total width",
    "width": "width",
    "blocks": "blocks",
    "position": "position, mean of the states",
    "steps": "training steps, each its own run",
    "tokens": "how the image is cut",
    "readout": "states classified",
    "scale": "scores over √d, width of the one head",
}
# what a job changes in the Config before the user's flags do, and how many seeds it runs
JOBS: dict[str, tuple[dict, int]] = {
    "train": ({}, 5),
    **{name: ({"n_kv_heads": n}, 5) for name, n in (("gqa4", 4), ("gqa2", 2), ("mqa", 1))},
    **dict.fromkeys(
        ("sweep", "faults"), ({"d_model": 64, "batch_size": 128, "steps": 300, "n_logs": 6}, 1)
    ),
}
# jobs that see the test images, and as what
SELECTED = {"train": "mha", "gqa4": "gqa4", "gqa2": "gqa2", "mqa": "mqa"}
# jobs that `all` leaves out, its minutes, repeats of works
LONG, MINUTES, REPEATS = ["gqa4", "gqa2", "mqa"], 13, 5
SMOKE = {"d_model": 16, "n_train": 640, "batch_size": 128, "steps": 2, "n_logs": 2}


# -------- 3. Data ---------------------------------------------------------------------------------


def load_data(
    config: Config, device: torch.device | str = "cpu", data_dir: Path = runner.HERE / "data"
) -> Data:
    """Fashion-MNIST whole on the device: 55,000 / 5,000 / 10,000 images, mean 0 and std 1 over the
    training pixels.

    The split is always the same, see runner.stratified. runner.DataError if the images cannot be
    had, or are others.
    """
    (pixels, labels), test = runner.read_images("FashionMNIST", data_dir, MEAN, STD)
    kept, val = runner.stratified(labels, N_VAL, seed=2017)
    parts = ((pixels[kept], labels[kept]), (pixels[val], labels[val]), test)
    return Data(
        *(Split(((p.float() / 255 - MEAN) / STD).to(device), y.to(device)) for p, y in parts)
    )


def tokens_of(images: Tensor, config: Config) -> tuple[Tensor, Tensor | None]:
    """Images (B, 28, 28) as tokens (B, T, F), rows or 4 × 4 patches; and which are no padding, (1,
    1, 1, T).
    """
    x = (
        images
        if config.tokens == "rows"
        else images.reshape(-1, 7, 4, 7, 4).transpose(2, 3).reshape(-1, 49, 16)
    )
    x = F.pad(x, (0, 0, 0, config.padding))
    true = torch.arange(x.shape[1], device=x.device) < x.shape[1] - config.padding
    return x, true[None, None, None] if config.padding and config.masked else None


# -------- 4. Model --------------------------------------------------------------------------------


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal=False
) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ / √d) v (Vaswani et al. 2017, equation 1), for query heads that share keys and
    values in groups.

        query heads         0 1 2 3   4 5 6 7        H = 8
                            └─┴┬┴─┘   └─┴┬┴─┘
        key/value heads        0         1     G = 2: head h reads key/value head h // (H / G)

    q (B, H, T, d), k (B, G, S, d), v (B, G, S, d_v), H a multiple of G -> out (B, H, T, d_v),
    weights (B, H, T, S), whose rows sum to 1, in q's dtype. mask: bool, True where a query may
    attend, or float, added to the scores; broadcastable to (B, H, T, S). causal: query t of T sees
    keys up to S − T + t, so the last sees them all. What may attend to nothing gets zeros, and zero
    gradients. ValueError on shapes and masks that do not fit.
    """
    if (
        not q.ndim == k.ndim == v.ndim == 4
        or k.shape[:3] != v.shape[:3]
        or q.shape[::3] != k.shape[::3]
    ):
        shapes = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        raise ValueError(
            f"q (B, H, T, d), k (B, G, S, d) and v (B, G, S, d_v) expected, not shapes {shapes}"
        )
    (B, H, T, d), (G, S) = q.shape, k.shape[1:3]
    if G == 0 or H % G:
        raise ValueError(f"{H} query heads are not a multiple of {G} key/value heads")
    # the queries of a group are the rows of one product with the keys they share: nothing is copied
    # to H heads
    rows = (q / math.sqrt(d)).reshape(B, G, H // G * T, d)
    scores = (rows @ k.mT).view(B, H, T, S)
    if mask is not None:
        scores = with_mask(scores, mask)
    if causal and T > 1:
        scores = scores.masked_fill(
            torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1), -math.inf
        )
    # half precision is too coarse for a sum of S exponentials
    exact = torch.promote_types(q.dtype, torch.float32)
    if mask is None and not (causal and T > S):
        weights = scores.softmax(-1, dtype=exact).to(q.dtype)
    else:  # a row of nothing but −inf would be nan, and so would its gradient
        nothing = (scores == -math.inf).all(-1, keepdim=True)
        weights = (
            scores.masked_fill(nothing, 0)
            .softmax(-1, dtype=exact)
            .masked_fill(nothing, 0)
            .to(q.dtype)
        )
    return (weights.view(B, G, H // G * T, S) @ v).view(B, H, T, v.shape[3]), weights


def with_mask(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores (B, H, T, S) with −inf where a bool mask is False, or with a float mask added."""
    fits = mask.ndim <= 4 and all(
        a in (1, b) for a, b in zip(mask.shape[::-1], scores.shape[::-1], strict=False)
    )
    if not fits or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(
            f"{mask.dtype} {tuple(mask.shape)}: "
            f"no bool or float mask for scores {tuple(scores.shape)}"
        )
    return (
        scores.masked_fill(~mask, -math.inf)
        if mask.dtype == torch.bool
        else scores + mask.to(scores.dtype)
    )


class KVCache:
    """The keys and values of the tokens so far, for decoding: 2 · B · G · capacity · d numbers,
    allocated once.

    Of G heads, not H: that is what sharing buys. For inference: autograd refuses to go back past a
    later append.
    """

    def __init__(self, batch, n_kv_heads, capacity, d_head, dtype=torch.float32, device="cpu"):
        if min(batch, n_kv_heads, capacity, d_head) < 1:
            raise ValueError(
                f"a cache has no room: {batch=}, {n_kv_heads=}, {capacity=}, {d_head=}"
            )
        self.k = torch.zeros(batch, n_kv_heads, capacity, d_head, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.length = 0  # tokens held

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of t ≥ 1 tokens, (B, G, t, d) each: all so far, (B, G, length, d)
        each, as views.
        """
        (B, G, capacity, d), start = self.k.shape, self.length
        if (
            k.ndim != 4
            or not k.shape == v.shape == (B, G, k.shape[2], d)
            or {k.dtype, v.dtype} != {self.k.dtype}
        ):
            found = f"{tuple(k.shape)} {k.dtype}, {tuple(v.shape)} {v.dtype}"
            raise ValueError(
                f"keys and values ({B}, {G}, t, {d}) {self.k.dtype} expected, not {found}"
            )
        if (end := start + k.shape[2]) > capacity:
            raise ValueError(
                f"a cache with {start} of {capacity} tokens has no room for {k.shape[2]} more"
            )
        self.k[:, :, start:end], self.v[:, :, start:end], self.length = k, v, end
        return self.k[:, :, :end], self.v[:, :, :end]

    def reset(self) -> None:
        self.k, self.v, self.length = self.k.detach(), self.v.detach(), 0


def angles(start: int, T: int, d: int, device) -> Tensor:
    """(T, ⌈d / 2⌉): position · 10000^(−2i / d) for positions from `start` on, as in both papers
    below.
    """
    frequency = 10_000.0 ** (-torch.arange(0, d, 2, device=device) / d)
    return torch.outer(torch.arange(start, start + T, device=device), frequency)


def sinusoids(start: int, T: int, d: int, device) -> Tensor:
    """(T, d): sines and cosines in turn, of ever longer periods (Vaswani et al. 2017, 3.5)."""
    a = angles(start, T, d, device)
    return torch.stack([a.sin(), a.cos()], 2).flatten(1)[:, :d]


def rotated(x: Tensor, start: int) -> Tensor:
    """x (B, H, T, d), each pair of numbers turned by its position's angle (RoPE; Su et al. 2021,
    equation 34).
    """
    a = angles(start, *x.shape[2:], x.device)
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(3, (-1, 2)).contiguous()
    return (
        torch.view_as_real(torch.view_as_complex(pairs) * torch.polar(torch.ones_like(a), a))
        .flatten(3)
        .to(x.dtype)
    )


class GroupedQueryAttention(nn.Module):
    """n_heads query heads over n_kv_heads key/value heads (Ainslie et al. 2023), each d_head =
    d_model / n_heads wide.

        q, k, v = W_q x, W_k c, W_v c, each cut into its heads
        out = W_o [what the heads attend to, side by side]

    forward: x (B, T, D) attends to context c (B, S, D), or to itself -> out (B, T, D), weights (B,
    H, T, S); mask and causal as in `attention`. With a cache, keys and values join it, and x
    attends to all it then holds. position "rotary" turns queries and keys; "relative" gives every
    distance j − i, up to FAR, a vector a whose score q · a / √d is added (Shaw et al. 2018,
    equation 5; one table for all heads). ValueError on sizes that do not fit.
    """

    FAR = 16  # distances beyond it count as it

    def __init__(self, d_model, n_heads, n_kv_heads, position="none", scaled=True):
        super().__init__()
        if min(d_model, n_heads, n_kv_heads) < 1 or d_model % n_heads or n_heads % n_kv_heads:
            raise ValueError(
                f"{d_model=} must be a multiple of {n_heads=}, and that of {n_kv_heads=}, "
                "all at least 1"
            )
        self.d_head = d_model // n_heads
        if position not in ("none", "relative", "rotary") or (
            position == "rotary" and self.d_head % 2
        ):
            raise ValueError(
                f"{position=} with {self.d_head=}: "
                "none, relative, or rotary if d_head is even, expected"
            )
        self.n_heads, self.n_kv_heads, self.position = n_heads, n_kv_heads, position
        self.factor = 1.0 if scaled else math.sqrt(self.d_head)  # which undoes the 1 / √d
        self.W_q, self.W_o = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
        self.W_k, self.W_v = (nn.Linear(d_model, n_kv_heads * self.d_head) for _ in range(2))
        if position == "relative":
            self.distances = nn.Parameter(0.02 * torch.randn(2 * self.FAR + 1, self.d_head))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask=None,
        causal=False,
        cache: KVCache | None = None,
    ):
        c, D, start = (
            (x if context is None else context),
            self.W_q.in_features,
            (cache.length if cache else 0),
        )
        if not x.ndim == c.ndim == 3 or not x.shape[2] == c.shape[2] == D or len(x) != len(c):
            raise ValueError(
                f"x (B, T, {D}) and context (B, S, {D}) expected, "
                f"not {tuple(x.shape)}, {tuple(c.shape)}"
            )
        if context is not None and self.position != "none":
            raise ValueError(
                f"{self.position} positions compare places in one sequence: "
                "there can be no other context"
            )
        T, S = x.shape[1], c.shape[1] + start
        # one that does not fit is refused before the cache takes x up
        if cache is not None and mask is not None:
            # shapes alone
            with_mask(torch.empty(len(x), self.n_heads, T, S, device="meta"), mask.to("meta"))
        # (B, H, T, d)
        q = self.W_q(x).unflatten(2, (self.n_heads, -1)).transpose(1, 2) * self.factor
        # (B, G, S, d)
        k, v = (
            W(c).unflatten(2, (self.n_kv_heads, -1)).transpose(1, 2) for W in (self.W_k, self.W_v)
        )
        if self.position == "rotary":
            q, k = rotated(q, start), rotated(k, start)  # a key is turned once, before it is cached
        if cache is not None:
            k, v = cache.append(k, v)
        if self.position == "relative":
            distance = (
                torch.arange(S, device=x.device) - torch.arange(S - T, S, device=x.device)[:, None]
            )
            column = distance.clamp(-self.FAR, self.FAR)[None, None] + self.FAR  # (1, 1, T, S)
            bias = (q / math.sqrt(self.d_head) @ self.distances.mT).take_along_dim(column, 3)
            mask = bias if mask is None else with_mask(bias, mask)
        out, weights = attention(q, k, v, mask, causal)
        return self.W_o(out.transpose(1, 2).flatten(2)), weights


class MultiHeadAttention(GroupedQueryAttention):
    """Every query head has keys and values of its own (多头; Vaswani et al. 2017)."""

    def __init__(self, d_model, n_heads, **options):
        super().__init__(d_model, n_heads, n_heads, **options)


class MultiQueryAttention(GroupedQueryAttention):
    """All query heads share one head of keys and values (多查询; Shazeer 2019)."""

    def __init__(self, d_model, n_heads, **options):
        super().__init__(d_model, n_heads, 1, **options)


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)); the same features of all tokens drop
    out (Gal 2016).
    """

    def __init__(self, config: Config):
        super().__init__()
        D, position = (
            config.d_model,
            config.position if config.position in ("relative", "rotary") else "none",
        )
        self.attention = GroupedQueryAttention(
            D, config.n_heads, config.n_kv_heads, position, config.scaled
        )
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))
        self.norm_1, self.norm_2, self.dropout = (
            nn.LayerNorm(D),
            nn.LayerNorm(D),
            nn.Dropout(config.dropout),
        )

    def forward(self, x: Tensor, mask=None, causal=False, cache=None) -> tuple[Tensor, Tensor]:
        out, weights = self.attention(self.norm_1(x), mask=mask, causal=causal, cache=cache)
        # (B, 1, D): T times fewer numbers to draw, which a CPU does one by one
        every = torch.ones_like(x[:, :1])
        x = x + out * self.dropout(every)
        return x + self.mlp(self.norm_2(x)) * self.dropout(every), weights


class AttentionClassifier(nn.Module):
    """The Config's network: images (B, 28, 28) -> tokens -> blocks -> the tokens' states -> logits
    (B, 10).
    """

    def __init__(self, config: Config):
        super().__init__()
        x, mask = tokens_of(torch.zeros(1, 28, 28), config)
        (self.n_tokens, n_in), self.n_read = (
            x.shape[1:],
            x.shape[1] if mask is None else int(mask.sum()),
        )
        self.config, self.W_in = config, nn.Linear(n_in, config.d_model)
        if config.position == "learned":
            self.places = nn.Parameter(0.02 * torch.randn(self.n_tokens, config.d_model))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_blocks))
        n_out = config.d_model * (self.n_read if config.readout == "all" else 1)
        self.norm, self.out = nn.LayerNorm(config.d_model), nn.Linear(n_out, len(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(*tokens_of(images, self.config))

    def classify(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits of tokens x, of which mask (1, 1, 1, T) tells the true ones, None is all."""
        return self.read(
            self.states(x, mask)[0] if mask is None else self.states(x, mask)[0][:, mask[0, 0, 0]]
        )

    def read(self, states: Tensor) -> Tensor:
        if self.config.readout == "all" and states.shape[1] != self.n_read:
            raise ValueError(
                f"the states of {self.n_read} tokens are read side by side, "
                f"not of {states.shape[1]}"
            )
        return self.out(states.flatten(1) if self.config.readout == "all" else states.mean(1))

    def states(self, x: Tensor, mask: Tensor | None = None, caches: list[KVCache] | None = None):
        """Of tokens (B, T, F), after those in caches: the last block's states (B, T, D) and weights
        (B, H, T, S).
        """
        T, start, x = x.shape[1], (caches[0].length if caches else 0), self.W_in(x).to(x.dtype)
        if self.config.position == "learned":
            if start + T > len(self.places):
                raise ValueError(
                    f"token {start + T} has no position: {len(self.places)} were learned"
                )
            x = x + self.places[start : start + T]
        if self.config.position == "sinusoidal":
            x = x + sinusoids(start, T, x.shape[2], x.device).to(x.dtype)
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x, weights = block(x, mask, self.config.causal, cache)
        return self.norm(x), weights

    def caches(self, batch: int, capacity: int) -> list[KVCache]:
        sizes = (
            batch,
            self.config.n_kv_heads,
            capacity,
            self.config.d_model // self.config.n_heads,
        )
        return [
            KVCache(*sizes, self.W_in.weight.dtype, self.W_in.weight.device) for _ in self.blocks
        ]


# -------- 5. Training -----------------------------------------------------------------------------


@runner.inference
def evaluate(model: nn.Module, split: Split) -> dict:
    """Loss (nats), accuracy, macro precision, recall and F1 (0 … 1), and the confusion matrix, with
    dropout off.
    """
    logits = torch.cat([model(images) for images in split.images.split(250)])
    matrix = metrics.confusion_matrix(logits.argmax(1), split.labels, logits.shape[1])
    return metrics.scores(matrix) | {
        "loss": F.cross_entropy(logits, split.labels).item(),
        "confusion": matrix,
    }


def build(config: Config, device: torch.device) -> AttentionClassifier:
    """The Config's network, on the device, with weights drawn from the Config's seed."""
    torch.manual_seed(config.seed)
    return AttentionClassifier(config).to(device)


def train(
    config: Config, data: Data, bar: tqdm | None = None
) -> tuple[AttentionClassifier, list[dict]]:
    """Train the Config's network: the model, and a history row for each of n_logs evenly spaced
    steps.

    A row's train_loss is the mean since the row before. Between rows nothing waits for the device.
    A loss that is not finite ends the run at the next row, which then holds it.
    """
    images, labels = (part[: config.n_train] for part in data.train)
    device = images.device
    model, mixed = build(config, device), config.bfloat16 and runner.has_bfloat16(device)
    optimizer = OPTIMIZERS[config.optimizer](
        parameter_groups(model, config.weight_decay), lr=config.lr, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(one_cycle, config))
    logged = {math.ceil(config.n_steps * (i + 1) / config.n_logs) for i in range(config.n_logs)}
    history, since, loss_sum, start = [], 0, torch.zeros((), device=device), time.perf_counter()

    for step, batch in zip(
        range(1, config.n_steps + 1), batches(len(images), config, device), strict=False
    ):
        x, y = images.index_select(0, batch), labels.index_select(0, batch)  # (B, 28, 28), (B,)
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            # stage 1 writes it out
            loss = F.cross_entropy(model(x), y, label_smoothing=config.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        if config.clip:
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        elif step in logged:
            grad_norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        optimizer.step()
        schedule.step()
        loss_sum += loss.detach()

        if step in logged:
            val, train_loss = evaluate(model, data.val), loss_sum.item() / (step - since)
            history.append(runner.history_row(config, step, train_loss, val, grad_norm, start))
            if bar is not None:
                bar.update(step - since)
            since = step
            loss_sum.zero_()
            if runner.status(history) == "diverged":
                break
    return model, history


# -------- 6. Experiments --------------------------------------------------------------------------


def execute(run: Run, data: Data, bar: tqdm) -> dict[str, list[dict]]:
    """Train and measure one run: its rows for every table. Only the selected models ever see the
    test images.
    """
    model, history = train(run.config, data, bar)
    tables = runner.tables_of(
        run, model, history, evaluate(model, data.val), data.val.images.device
    )
    tables["runs"][0]["cache_bytes"] = sum(
        cache.nbytes for cache in model.caches(1, model.n_tokens)
    )
    if run.experiment in SELECTED.values():
        tables |= runner.test_tables(run, evaluate(model, data.test))
        tables["maps"] = [run.name | row for row in attention_maps(model, data.test)]
    if run.experiment == "faults":
        tables |= runner.fault_tables(run, FAULTS, model, history, data)
    if run.experiment == "scale":
        models = {"at the start": build(run.config, data.val.images.device), "at the end": model}
        found = [
            (f"{what}, {when}", x)
            for when, m in models.items()
            for what, x in softmax_state(m, data).items()
        ]
        row = run.name | {
            "scores": "over √d" if run.config.scaled else "as they are",
            "d": run.config.d_model,
        }
        tables["scale"] = [row | {"measured": what, "number": number} for what, number in found]
    return tables


@runner.inference
def attention_maps(model: AttentionClassifier, split: Split) -> list[dict]:
    """What each head of the last block attends to in three images: a row for each query, with the
    token itself.
    """
    x, mask = tokens_of(split.images[:3], model.config)
    return runner.map_rows(x, model.states(x, mask)[1], split.labels)


def softmax_state(model: AttentionClassifier, data: Data) -> dict[str, float]:
    """Of 500 images: mean entropy (nats) of the last block's weights, norm of ∂ loss / ∂ (all W_q
    and W_k).
    """
    states, weights = model.states(*tokens_of(data.val.images[::10], model.config))
    W = [W.weight for block in model.blocks for W in (block.attention.W_q, block.attention.W_k)]
    grads = torch.autograd.grad(F.cross_entropy(model.read(states), data.val.labels[::10]), W)
    return {
        "entropy (nats)": torch.special.entr(weights).sum(-1).mean().item(),
        "gradient norm": nn.utils.get_total_norm(grads).item(),
    }


@runner.inference
def decode(model: AttentionClassifier, x: Tensor) -> Tensor:
    """Logits of x (B, T, F) read token by token: each joins the caches before the next exists."""
    caches = model.caches(*x.shape[:2])
    return model.read(
        torch.cat([model.states(token, caches=caches)[0] for token in x.split(1, 1)], 1)
    )


@runner.inference
def changed(model: AttentionClassifier, data: Data, other) -> float:
    """Share (%) of 500 validation images that `other`, a function to logits too, names otherwise
    than the model.
    """
    images = data.val.images[::10]
    return 100 * (model(images).argmax(1) != other(images).argmax(1)).double().mean().item()


PLAIN = {"readout": "mean", "tokens": "rows", "causal": False, "padding": 0}
PADDED, STEEP = (
    PLAIN | {"padding": 28, "position": "none"},
    {"lr": 0.02, "clip": 0.0, "n_blocks": 4},
)
FAULTS = {
    "no positions": Fault(
        "a set: no row knows its place",
        "predictions changed by shuffled rows (%), 0: blind",
        lambda model, _, __, data: changed(model, data, lambda x: model(x[:, torch.randperm(28)])),
        PLAIN | {"position": "none"},
        "learned positions",
        PLAIN | {"position": "learned"},
    ),
    "no causal mask": Fault(
        "trained on what decoding has not yet",
        "predictions changed by decoding (%)",
        lambda model, _, c, data: changed(model, data, lambda x: decode(model, tokens_of(x, c)[0])),
        PLAIN,
        "each token attends to those up to itself",
        PLAIN | {"causal": True},
    ),
    "padding not masked": Fault(
        "28 zero tokens take part",
        "predictions changed by 28 more of them (%)",
        lambda model, _, c, data: changed(
            model, data, lambda x: model.classify(*tokens_of(x, replace(c, padding=56)))
        ),
        PADDED | {"masked": False},
        "a mask, and the mean of the true tokens alone",
        PADDED | {"masked": True},
    ),
    "no warm-up": Fault(
        "rate 0.02 at once",
        "validation accuracy (%)",
        lambda _, h, *__: 100 * h[-1]["val_accuracy"],
        STEEP | {"warmup": 0.0},
        "the same rate, warmed up",
        STEEP | {"warmup": 0.3},
    ),
}


def arithmetic(config: Config, data: Data, data_dir: Path, repeats: int) -> dict[str, list[dict]]:
    """How many of 768 numbers, outputs and gradients, the formula as one first writes it makes nan;
    and `attention`.
    """
    random, big = (
        torch.randn(3, 1, 1, 3, 64),
        torch.full((3, 1, 1, 3, 64), 40.0, dtype=torch.float16),
    )
    hidden, rows = torch.tensor([[False], [True], [False]]), []
    cases = {
        "a query with no key": (random, hidden),
        "float16, q · k = 102,400": (big, torch.zeros_like(hidden)),
    }
    for case, (inputs, hidden) in cases.items():
        q, k, v = inputs = [x.requires_grad_() for x in inputs]
        plain = (q @ k.mT / math.sqrt(64)).masked_fill(hidden, -math.inf).softmax(-1) @ v
        rows.append({"experiment": "arithmetic", "case": case})
        for name, out in (("plain", plain), ("ours", attention(q, k, v, ~hidden)[0])):
            found = (out, *torch.autograd.grad(out.sum(), inputs))
            rows[-1][name] = sum(numbers.isnan().sum().item() for numbers in found)
    return {"arithmetic": rows}


@torch.no_grad()
def demo(config: Config, data: Data, data_dir: Path, repeats: int) -> dict[str, list[dict]]:
    """A random matrix of six tokens through MHA, GQA and MQA: the weights, their entropy, and who
    shares what.
    """
    torch.manual_seed(config.seed)
    D, H, rows, links = config.d_model, config.n_heads, [], []
    x, middle = torch.randn(1, 6, D), max(n for n in range(1, H + 1) if H % n == 0 and n * n <= H)
    for name, G in {"MHA": H, "GQA": middle, "MQA": 1}.items():
        layer = GroupedQueryAttention(D, H, G)
        for W in (layer.W_q, layer.W_k):
            # numbers of variance 1 in q and k: products of variance d
            nn.init.normal_(W.weight, std=D**-0.5)
        # over √d, and then as they are
        weights, layer.factor = layer(x)[1], math.sqrt(layer.d_head)
        sharp, layer.factor = layer(x)[1], 1.0
        entropies = {
            k: torch.special.entr(w).sum(-1) for k, w in (("entropy", weights), ("unscaled", sharp))
        }
        for h, t in itertools.product(range(H), range(6)):
            w, row = (
                weights[0, h, t],
                {"experiment": "demo", "variant": name, "head": h, "query": t},
            )
            row |= {"weights": runner.digits(w), "row_error": abs(w.sum().item() - 1)}
            rows.append(row | {key: values[0, h, t].item() for key, values in entropies.items()})
        layer.W_o = nn.Identity()  # what the heads give, side by side
        given = layer(x)[0]
        for g in range(G):
            # disturb one key/value head: which query heads change?
            for W in (layer.W_k, layer.W_v):
                W.weight.unflatten(0, (G, -1))[g] += torch.randn(layer.d_head, D)
            before, given = given, layer(x)[0]
            for h, change in enumerate(
                (given - before).unflatten(2, (H, -1)).abs().amax((0, 1, 3)).tolist()
            ):
                links.append(
                    {
                        "experiment": "demo",
                        "variant": name,
                        "kv_head": g,
                        "query_head": h,
                        "change": change,
                    }
                )
    return {"demo": rows, "sharing": links}


def benchmark(config: Config, data: Data, data_dir: Path, repeats: int) -> dict[str, list[dict]]:
    """Training steps against nn.MultiheadAttention; decoding from a cache against copies, torch,
    and reading alone.
    """
    device, n, works, reads = data.train.images.device, config.steps or 3, {}, {}
    for T, D, B in ((28, 64, 128), (28, 512, 32), (512, 64, 4), (512, 512, 4)):
        x, y, group = (
            torch.randn(B, T, D, device=device),
            data.train.labels[:B],
            f"steps/s, {T} tokens, width {D}",
        )
        theirs, ours = (
            nn.MultiheadAttention(D, 8, batch_first=True).to(device),
            MultiHeadAttention(D, 8).to(device),
        )
        for name, layer, inputs, options in (
            ("torch's, weights", theirs, (x, x, x), {"average_attn_weights": False}),
            ("torch's, no weights", theirs, (x, x, x), {"need_weights": False}),
            ("ours, weights", ours, (x,), {}),
            ("ours, 1 key/value head", MultiQueryAttention(D, 8).to(device), (x,), {}),
        ):
            forward = functools.partial(layer, *inputs, **options)
            works[group, name] = (
                n,
                runner.training_steps(lambda f=forward: f()[0].mean(1), layer, y, n),
            )
    model = build(replace(config, causal=True, position="sinusoidal", readout="mean"), device)
    model.eval().requires_grad_(False)
    for N in (16, 64, 256):
        x, group = torch.randn(1, N, 28, device=device), f"tokens/s, {N} tokens decoded"
        works[group, "everything again"] = (
            N,
            lambda x=x: [model.states(x[:, :t]) for t in range(1, x.shape[1] + 1)],
        )
        works[group, "from the cache"] = N, functools.partial(decode, model, x)

    B, H, d, sdpa = 4, 16, 64, F.scaled_dot_product_attention
    # one length in a smoke run
    for S, G in itertools.product((256, 1024, 4096, 16_384)[:repeats], (16, 8, 4, 2, 1)):
        q, cache, n = (
            torch.randn(B, H, 1, d, device=device),
            KVCache(B, G, S, d, device=device),
            H // G,
        )
        k, v = cache.append(*torch.randn(2, B, G, S, d, device=device))
        ways = {
            "copied to 16 heads": lambda q, *kv, n=n: sdpa(
                q, *(x.repeat_interleave(n, 1) if n > 1 else x for x in kv)
            ),
            "torch's enable_gqa": functools.partial(sdpa, enable_gqa=True),
            "ours": attention,
            "reading alone": lambda _, k, v: (k.sum(), v.sum()),
        }
        for name, way in ways.items():
            reads[S, G, cache.nbytes, name] = cache.nbytes, functools.partial(way, q, k, v)
    rows = runner.interleaved(reads, repeats, device, ("S", "G", "cache_bytes"))
    return {"benchmark": runner.interleaved(works, repeats, device), "decode": rows}


# -------- 7. Pictures -----------------------------------------------------------------------------


def plot(figures: Path) -> list[Path]:
    """Draw every picture and summary.md from the saved rows; gives their paths. FileNotFoundError
    if there are none.
    """
    album = runner.Album(figures, "attention on Fashion-MNIST")
    album.demo()
    album.selected(CLASSES)
    album.compared("mha")
    album.maps(CLASSES)
    album.sweeps(AXES)
    album.lines(
        "scale",
        runner.group(runner.read_rows(figures / "scale.csv"), "measured"),
        "scores",
        "d",
        "number",
    )
    album.faults()
    album.arithmetic()
    album.decode()
    album.benchmark()
    return album.close()


# -------- 8. Command line -------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    return runner.run_stage(
        sys.modules[__name__], {"faults": arithmetic, "demo": demo, "benchmark": benchmark}, argv
    )


if __name__ == "__main__":
    sys.exit(main())
