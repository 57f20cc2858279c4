"""A GPT that writes digits: a causal transformer over the patches of MNIST images (手撕 GPT).

    python -m interview.gpt                  digits and tables from what is saved, half a minute
    python -m interview.gpt --train          trains first what is not saved yet: minutes on a
                                             large GPU (--workers 4), days on a CPU core
    python -m interview.gpt --evaluate       measures the tables: minutes on a large GPU, an hour
                                             or more on a CPU core; goes on where it was stopped
    python -m interview.gpt --out DIR        the same into and from DIR
    python -m interview.gpt --smoke ...      tiny networks and few images: does everything run?

Read `tokens_of` and `GPT` first. An image of 28 × 28 black and white pixels is cut into 196 patches
of 2 × 2; a patch is one of 16 tokens. Before them stands the class, as a token of its own:

    class 3 │ ▗ │ ▄ │ ▟ │ … 196 patches, row by row

Axis letters in shape comments: B batch, N images, T tokens, D width of the model, V the 16 kinds of
patch. H is the number of query heads, G of key/value heads, d = D / H the width of one.

1. GPT (因果语言模型)
   Asked     "Write a decoder-only transformer. What does it learn from one sequence?"
             「手写 decoder-only 的 Transformer。模型从一条序列里能学到什么？」
   Idea      Each token is predicted from those before it. The causal mask (因果掩码) lets one pass
             over T tokens answer T questions at once:
             log p(x) = Σ_t log p(x_t | x_1 … x_{t−1})
             A block is x + attention(norm(x)), then x + mlp(norm(x)). As in LLaMA: RMSNorm,
             SwiGLU, rotary positions; what they are stands in layers.py and stage 3. Not as in
             LLaMA: each place also has a learned vector, since the same place is the same spot of
             every image; and the projections of attention have biases.
   Cost      For a token, forward and backward, about 6 floating-point operations a parameter;
             forward alone 2. Attention adds O(T D) a token and block. About 12 D² parameters a
             block: 4 D² in attention, 8 D² in the MLP.
   追问      Why does the norm come first? The sum x is never normalised, so gradients reach every
             block. Encoder or decoder? A decoder has the causal mask; this one reads no encoder, so
             it has no cross-attention. Why can it write what it has never seen? It learns p, not
             the list of images. Does it need positions? The mask alone tells tokens apart: a token
             sees how many stand before it. So it learns without, too (Haviv 2022); not tried here.
   Mistakes  The target is the input, not shifted by one: the loss goes to 0. The mask hides the
             token itself: the first one sees nothing. Dropout while measuring.

2. Nats, perplexity (似然, 困惑度)
   Asked     "How do you compare two language models? What if their tokens differ?"
             「怎样比较两个语言模型？词表不同怎么办？」
   Idea      −log p of unseen data, lower is better. The sum over a whole image does not depend on
             how it was cut into tokens; the mean over tokens does. So texts are compared by bits a
             byte, not by perplexity. This model knows the class, others do not. To compare,
             log p(x) = log Σ_c p(c) p(x | c): ten passes. One term of the sum gives a bound:
             −log p(x) ≤ −log p(c) − log p(x | c), too high by −log p(c | x).
   Cost      One pass for the bound; ten for the sum over classes.
   追问      What is perplexity? exp(nats a token): the model is as unsure as between that many
             tokens, all equally likely. Bits are nats / ln 2. Does a better likelihood mean better
             samples? Neither follows from the other (Theis 2016). Is the likeliest image the best?
             No: what greedy and beam search write is likelier than real digits, and most of it is
             not read as asked (gpt_decoding.md). A classifier for free? argmax_c p(c) p(x | c).
   Mistakes  Grey pixels, another binarisation, or another number of bits: other data, so numbers
             that must not stand side by side. exp of a sum of 196 logs underflows: logsumexp.

3. Writing with a cache (KV cache, 自回归生成)
   Asked     "How do you make generation fast? What do GQA and MQA change?"
             「怎样加速生成？GQA、MQA 改变了什么？」
   Idea      Keys and values of old tokens never change, as no token sees a later one. Keep them,
             and each token is read once. GQA and MQA keep fewer: query heads share them.
   Cost      To write T tokens, 1 + 2 + … + T = O(T²) are read without a cache, T with it. The cache
             holds 2 · blocks · T · G · d numbers a sequence: G = H for multi-head, 1 for
             multi-query. Attention still reads O(T) keys for a token.
   追问      Why is reading a prompt fast and writing slow? One is a matrix product of T rows, the
             other T products of one row, each of which waits for the weights and the cache to come
             from memory. When does sharing pay? When reading the cache takes most of that time:
             long sequences, large batches. Not here: 196 patches are too few (gpt_speed.md).
   Mistakes  Positions that start from 0 again at each new token. A cache that is kept for the next
             batch.
"""

import itertools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
import tyro
from torch import Tensor, nn

import metrics
import stage1_mlp
from interview import check_whole, cuda_or_cpu, decoding, training
from interview.convolution import InParts, load_cnn, reader_of
from interview.layers import RMSNorm, SwiGLU, log_softmax
from stage1_mlp import Split
from stage3_attention import (
    GroupedQueryAttention,
    KVCache,
    projected_dtype,
    unchanged_if_it_fails,
)

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "figures" / "interview"
CHECKPOINTS = ROOT / "out" / "interview"

SIDE = 28  # pixels
GRID = SIDE // 2  # patches a row
N_TOKENS = GRID * GRID
V = 16  # different patches
N_CLASSES = 10


# ---- Images as tokens -----------------------------------------------------------------------


def binarised(grey: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Each pixel drawn from its grey value: grey 0 … 1 of any shape -> bool, True is ink."""
    return torch.rand(grey.shape, generator=generator, device=grey.device) < grey


def tokens_of(pixels: Tensor) -> Tensor:
    """Images of 0 and 1, (N, 784) -> patches (N, 196) in 0 … 15, row by row.

    A patch [a b / c d] is the number 8a + 4b + 2c + d. ValueError on another shape.
    """
    if pixels.ndim != 2 or pixels.shape[1] != SIDE * SIDE:
        raise ValueError(f"pixels (N, {SIDE * SIDE}) expected, not {tuple(pixels.shape)}")
    rows = pixels.long().view(-1, GRID, 2, GRID, 2)  # patch row, row in it, column, column in it
    a, b = rows[:, :, 0, :, 0], rows[:, :, 0, :, 1]
    c, d = rows[:, :, 1, :, 0], rows[:, :, 1, :, 1]
    return (8 * a + 4 * b + 2 * c + d).flatten(1)


def pixels_of(tokens: Tensor) -> Tensor:
    """Patches (N, 196) -> images (N, 28, 28) of 0 and 1, float32: `tokens_of` backwards."""
    if tokens.ndim != 2 or tokens.shape[1] != N_TOKENS:
        raise ValueError(f"patches (N, {N_TOKENS}) expected, not {tuple(tokens.shape)}")
    grid = tokens.view(-1, GRID, GRID)
    bits = torch.stack([grid // 8, grid // 4, grid // 2, grid], -1) % 2  # (N, 14, 14, 4)
    patches = bits.unflatten(-1, (2, 2))  # (N, 14, 14, 2, 2)
    return patches.transpose(2, 3).reshape(-1, SIDE, SIDE).float()


def class_tokens(labels: Tensor) -> Tensor:
    """The first token of each sequence, 16 + class: (N,) -> (N, 1)."""
    return V + labels[:, None]


def check_classes(labels: Tensor) -> None:
    """ValueError unless labels (N,) are whole numbers of 0 … 9; on a GPU it waits for them."""
    if labels.ndim != 1 or labels.dtype != torch.int64:
        raise ValueError(f"labels (N,) int64 expected, not {labels.dtype} {tuple(labels.shape)}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < N_CLASSES:
        found = f"{labels.min().item()} … {labels.max().item()}"
        raise ValueError(f"labels must lie in 0 … {N_CLASSES - 1}, not {found}")


# ---- The network ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """All that a run depends on."""

    d_model: int = 160
    n_heads: int = 4
    # heads of keys and values: n_heads is multi-head attention, 1 is multi-query
    n_kv_heads: int = 4
    n_blocks: int = 6
    # width of SwiGLU's hidden layer; 8 / 3 of d_model has as many weights as the usual 4 · d_model
    d_ff: int = 432
    dropout: float = 0.1
    n_tokens: int = N_TOKENS
    # highest rate of AdamW; it rises and falls as in stage 1
    lr: float = 2e-3
    weight_decay: float = 0.1
    warmup: float = 0.05
    # gradients are scaled down to this norm
    clip: float = 1.0
    batch_size: int = 128
    epochs: int = 25
    # training images
    n_train: int = stage1_mlp.N_TRAIN
    # validation images at the end, or all if there are fewer; the first 1,000 judge it on its way
    n_judged: int = 10_000
    # training steps from one row of the history to the next
    log_every: int = 215
    # of weights, batch order, drawn training pixels and dropout; others' pixels are always the same
    seed: int = 0

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.n_train / self.batch_size)

    @property
    def n_steps(self) -> int:
        return self.epochs * self.steps_per_epoch


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), causal: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: Config):
        super().__init__()
        D = config.d_model
        self.norm_1 = RMSNorm(D)
        self.attention = GroupedQueryAttention(D, config.n_heads, config.n_kv_heads, "rotary")
        self.norm_2 = RMSNorm(D)
        self.mlp = SwiGLU(D, config.d_ff)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        attended, _ = self.attention(self.norm_1(x), causal=True, cache=cache)
        x = x + self.dropout(attended)
        return x + self.dropout(self.mlp(self.norm_2(x)))


class GPT(nn.Module):
    """Tokens -> for each of them, logits of the patch that comes next (因果 Transformer).

    forward: (B, T) int64, a class token and patches -> (B, T, 16). With a cache for every block the
    tokens follow those that the caches hold. ValueError on other shapes, or more than
    config.n_tokens in all.
    """

    def __init__(self, config: Config):
        super().__init__()
        D = config.d_model
        self.config = config
        self.embedding = nn.Embedding(V + N_CLASSES, D)
        # a learned vector for each place, beside the rotary positions in attention
        self.places = nn.Parameter(0.02 * torch.randn(config.n_tokens, D))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_blocks))
        self.norm = RMSNorm(D)
        self.head = nn.Linear(D, V)
        self.initialise()

    def initialise(self) -> None:
        """As GPT-2: weights of standard deviation 0.02, and zero biases.

        2 n_blocks layers add to the sum x: the last weights of each are smaller by √(2 n_blocks),
        so that x does not grow with the depth.
        """
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Embedding):
                nn.init.normal_(layer.weight, std=0.02)
            if isinstance(layer, nn.Linear) and layer.bias is not None:
                nn.init.zeros_(layer.bias)
        for block in self.blocks:
            for last in (block.attention.W_o, block.mlp.w2):
                nn.init.normal_(last.weight, std=0.02 / math.sqrt(2 * len(self.blocks)))

    def forward(self, tokens: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        start = caches[0].length if caches else 0
        self.check_tokens(tokens, start)
        T = tokens.shape[1]
        x = self.embedding(tokens) + self.places[start : start + T]  # (B, T, D)
        with unchanged_if_it_fails(*(caches or [])):
            for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
                x = block(x, cache)
        return self.head(self.norm(x))  # (B, T, V)

    def check_tokens(self, tokens: Tensor, start: int) -> None:
        """ValueError unless tokens are (B, T) and have places behind `start` others."""
        if tokens.ndim != 2 or start + tokens.shape[1] > len(self.places):
            wanted = f"tokens (B, T), at most {len(self.places)} in all, expected"
            after = f" after {start} in the caches" if start else ""
            raise ValueError(f"{wanted}, not {tuple(tokens.shape)}{after}")

    def caches(self, batch: int) -> list[KVCache]:
        """An empty cache for every block, for sequences of n_tokens."""
        config = self.config
        sizes = (batch, config.n_kv_heads, config.n_tokens, config.d_model // config.n_heads)
        kind = {"dtype": projected_dtype(self.places), "device": self.places.device}
        return [KVCache(*sizes, **kind) for _ in self.blocks]


def n_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# ---- Likelihood -----------------------------------------------------------------------------


def next_patch_loss(model: GPT, tokens: Tensor, labels: Tensor) -> Tensor:
    """Mean −log p(next patch) in nats, of patches (B, T) and classes (B,): the training's loss.

    The model reads the class and all patches but the last; its targets are all patches.
    """
    read = torch.cat([class_tokens(labels), tokens[:, :-1]], 1)  # (B, T): shifted by one
    logits = model(read).float()  # (B, T, V)
    return stage1_mlp.cross_entropy(logits.flatten(0, 1), tokens.flatten())


@torch.inference_mode()
def log_likelihood(model: GPT, tokens: Tensor, labels: Tensor, size: int | None = None) -> Tensor:
    """log p(x | c) in nats of whole images (N, T) with classes (N,): (N,) float64.

    Dropout is off; `size` images at a time. If not given: 200 on a GPU, and 8 on a CPU, where the
    scores of more images (B, H, T, T) would not stay in its cache.
    """
    check_classes(labels)
    if size is None:
        size = 8 if tokens.device.type == "cpu" else 200
    was_training = model.training
    model.eval()
    found = []
    for x, c in zip(tokens.split(size), labels.split(size), strict=True):
        read = torch.cat([class_tokens(c), x[:, :-1]], 1)  # (B, T)
        log_p = log_softmax(model(read).double())  # (B, T, V)
        of_patches = log_p.gather(2, x[:, :, None]).squeeze(2)  # (B, T)
        found.append(of_patches.sum(1))
    model.train(was_training)
    return torch.cat(found)


def log_likelihood_of_classes(model: GPT, tokens: Tensor) -> Tensor:
    """log p(x | c) for every class c: (N, T) -> (N, 10) float64."""
    columns = []
    for c in range(N_CLASSES):
        labels = torch.full((len(tokens),), c, device=tokens.device)
        columns.append(log_likelihood(model, tokens, labels))
    return torch.stack(columns, 1)


def bound(own: Tensor, labels: Tensor, prior: Tensor) -> Tensor:
    """−log p(c) − log p(x | c) ≥ −log p(x), as p(x) is a sum over classes and this one term of it.

    own (N,) is log p(x | c) of the images' own classes (N,), prior (10,) is p(c). It is too high by
    −log p(c | x): by little where the digit leaves no doubt of its class. One pass, not ten.
    """
    return -own - prior.log()[labels]


def nats(log_p: Tensor, labels: Tensor, prior: Tensor) -> dict[str, float]:
    """What log p(x | c) (N, 10) says of images with classes (N,), where p(c) is the prior (10,).

    Means of −log p(x | its class), of the bound, and of −log p(x) = −log Σ_c p(c) p(x | c) with its
    standard error; and the share of images whose class Bayes' rule finds.
    """
    joint = log_p + prior.log()  # (N, 10): log p(x, c)
    own = log_p.gather(1, labels[:, None])[:, 0]
    marginal = -joint.logsumexp(1)  # (N,)
    return {
        "nats_given_class": -own.mean().item(),
        "bound": bound(own, labels, prior).mean().item(),
        "nats": marginal.mean().item(),
        "standard_error": standard_error(marginal),
        "bayes_accuracy": (joint.argmax(1) == labels).double().mean().item(),
    }


def standard_error(values: Tensor) -> float:
    return (values.std() / math.sqrt(len(values))).item()


# ---- Data -----------------------------------------------------------------------------------


class Digits(NamedTuple):
    """Images of one split; grey for those that are drawn anew, else patches."""

    images: Tensor  # (N, 784) grey float32, or patches (N, 196) int64
    labels: Tensor  # (N,) int64

    def first(self, n: int) -> "Digits":
        return Digits(self.images[:n], self.labels[:n])


def grey(split: Split) -> Digits:
    """Stage 1's normalised images as grey values 0 … 1, exact multiples of 1 / 255."""
    return Digits(stage1_mlp.as_stored(split).images.round() / 255, split.labels)


def load_digits(data_dir: Path, device: str = "cpu") -> dict[str, Digits]:
    """Training images in grey; validation and test images as patches, drawn once and shuffled.

    Drawn on the CPU with a fixed seed: the same pixels on every device.
    """
    data = stage1_mlp.load_data(data_dir)
    digits = {"train": grey(data.train)}
    for seed, (name, split) in enumerate({"val": data.val, "test": data.test}.items()):
        generator = torch.Generator().manual_seed(2016 + seed)
        images, labels = grey(split)
        tokens = tokens_of(binarised(images, generator))
        order = torch.randperm(len(labels), generator=generator)  # validation stands by class
        digits[name] = Digits(tokens[order], labels[order])
    return {name: Digits(*(part.to(device) for part in found)) for name, found in digits.items()}


def class_shares(labels: Tensor) -> Tensor:
    """p(c) as the training images have it: (N,) -> (10,) float64."""
    return torch.bincount(labels, minlength=N_CLASSES).double() / len(labels)


# ---- Training -------------------------------------------------------------------------------


def make_optimizer(model: GPT, config: Config) -> torch.optim.Optimizer:
    """AdamW; matrices decay (embeddings and places too), biases and the norms' weights do not."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, config.lr, betas=(0.9, 0.95), fused=True)


def train(
    config: Config, digits: dict[str, Digits], name: str, checkpoint: Path
) -> tuple[GPT, list[dict]]:
    """Train by the config: the model, and its history, a row each log_every steps.

    After each epoch all that is needed to go on is written to the checkpoint, and a run that finds
    one with its own config goes on from there. An epoch draws from a seed of its own, so a run
    that was stopped ends exactly as one that was not. On a GPU in bfloat16 (混合精度).
    """
    train_digits = digits["train"].first(config.n_train)
    judged = digits["val"].first(min(1000, config.n_judged))
    device = train_digits.images.device
    torch.manual_seed(config.seed)
    model = GPT(config).to(device)
    optimizer = make_optimizer(model, config)
    parts = {"model": model, "optimizer": optimizer}
    first_epoch, history = training.load_checkpoint(checkpoint, config, device, **parts)
    start = time.perf_counter() - (history[-1]["seconds"] if history else 0.0)
    bfloat16 = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    losses = []
    step = first_epoch * config.steps_per_epoch
    for epoch in range(first_epoch, config.epochs):
        torch.manual_seed(1000 * config.seed + epoch + 1)
        batches = stage1_mlp.batches(config.n_train, config.batch_size, device)
        for batch in itertools.islice(batches, config.steps_per_epoch):
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = stage1_mlp.learning_rate(config, step)
            tokens = tokens_of(binarised(train_digits.images[batch]))  # (B, T)
            with bfloat16:
                loss = next_patch_loss(model, tokens, train_digits.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            losses.append(loss.detach())
            if step % config.log_every == 0 or step == config.n_steps:
                row = {"step": step, "epoch": step / config.steps_per_epoch}
                row["train_nats"] = config.n_tokens * torch.stack(losses).mean().item()
                row["val_nats"] = -log_likelihood(model, *judged).mean().item()
                row["seconds"] = time.perf_counter() - start
                history.append(row)
                losses = []
                print(progress(name, config, row), flush=True)
        training.save_checkpoint(checkpoint, config, epoch + 1, history, **parts)
    return model, history


def progress(name: str, config: Config, row: dict) -> str:
    where = f"  {name}: step {row['step']:,} of {config.n_steps:,}, {row['seconds'] / 60:.1f} min"
    nats_of = f"{row['train_nats']:.2f} nats an image in training, {row['val_nats']:.2f} validation"
    return f"{where}, {nats_of}"


def save_weights(path: Path, model: GPT) -> None:
    """As float16, half the size; `load_weights` gives what is measured."""
    found = {"config": vars(model.config), "weights": training.rounded(model)}
    with metrics.written_aside(path) as aside:
        torch.save(found, aside)


def load_weights(path: Path, device: str = "cpu") -> GPT:
    """The network of saved weights in float32, dropout off."""
    saved = torch.load(path, weights_only=True, map_location=device)
    model = GPT(Config(**saved["config"])).to(device)
    model.load_state_dict(saved["weights"])
    return model.eval()


# ---- The runs -------------------------------------------------------------------------------


class Run(NamedTuple):
    experiment: str
    value: str
    config: Config

    @property
    def name(self) -> str:
        return f"{self.experiment} {self.value}, seed {self.config.seed}"

    @property
    def key(self) -> dict:
        return {"experiment": self.experiment, "value": self.value, "seed": self.config.seed}

    @property
    def checkpoint(self) -> str:
        """Such as gpt_key_value_heads_8_0.pt."""
        experiment = self.experiment.replace("/", "_").replace(" ", "_")
        return f"gpt_{experiment}_{self.value}_{self.config.seed}.pt"


MAIN = Config()
# what sharing keys and values costs: smaller networks, each training image once
SHORT = Config(d_model=128, n_heads=8, n_blocks=3, d_ff=344, dropout=0.0, batch_size=64, epochs=1)
KV_HEADS = [8, 4, 2, 1]
SEEDS = [0, 1, 2]


def runs_of(smoke: bool = False) -> list[Run]:
    """The one that writes, then those with fewer key/value heads."""
    runs = [Run("digits", "gpt", MAIN)]
    for seed, n_kv_heads in itertools.product(SEEDS, KV_HEADS):
        config = replace(SHORT, n_kv_heads=n_kv_heads, seed=seed)
        runs.append(Run("key/value heads", str(n_kv_heads), config))
    if not smoke:
        return runs
    ends = [run for run in runs if run.config.seed == 0 and run.value in ("gpt", "8", "1")]
    return [run._replace(config=smoke_config(run.config)) for run in ends]


def smoke_config(config: Config) -> Config:
    """As this one, but tiny."""
    sizes = {"d_model": 16, "n_blocks": 1, "d_ff": 8, "log_every": 1}
    return replace(config, **sizes, batch_size=8, epochs=2, n_train=12, n_judged=20)


def execute(
    run: Run, data_dir: Path, device: str, checkpoints: Path, out: Path
) -> dict[str, list[dict]]:
    """Train one run and judge it on validation images: its rows {table: [row]}.

    The weights of the one that writes are saved.
    """
    torch.set_num_threads(1)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, in training alone
    config = run.config
    digits = load_digits(data_dir, device)
    model, history = train(config, digits, run.name, checkpoints / run.checkpoint)
    torch.set_float32_matmul_precision(precision)

    if run.experiment == "digits":
        save_weights(out / "gpt_digits.pt", model)
        model = load_weights(out / "gpt_digits.pt", device)  # rounded: these are judged
    row = run.key | training.recipe_columns(config)
    row |= {name: history[-1][name] for name in ("train_nats", "seconds")}
    row["parameters"] = n_parameters(model)
    row["cache_bytes"] = sum(cache.nbytes for cache in model.caches(1))
    val = digits["val"].first(config.n_judged)
    row["val_nats_given_class"] = -log_likelihood(model, *val).mean().item()
    row |= stage1_mlp.origin_of_rows(device) | {"threads": torch.get_num_threads()}
    return {
        "gpt_history": [run.key | logged for logged in history],
        "gpt_runs": [row],  # last: a run is finished when its row stands here
    }


def missing_runs(out: Path, smoke: bool = False) -> list[Run]:
    """The runs that gpt_runs.csv does not hold, or holds with another config."""
    missing = []
    for run in runs_of(smoke):
        key = run.key | training.recipe_columns(run.config)
        no_weights = run.experiment == "digits" and not (out / "gpt_digits.pt").exists()
        if no_weights or not training.has_row(out / "gpt_runs.csv", key):
            missing.append(run)
    return missing


def train_missing(
    out: Path, data_dir: Path, workers: int, device: str, checkpoints: Path, smoke: bool
) -> None:
    """Train what is missing, `workers` runs at a time; save each as it ends."""
    todo = missing_runs(out, smoke)
    n_runs = len(runs_of(smoke))
    print(f"training: {n_runs - len(todo)} of {n_runs} runs found, {len(todo)} to do", flush=True)
    calls = [(run, data_dir, device, checkpoints, out) for run in todo]
    order = list(dict.fromkeys((run.experiment, run.value) for run in runs_of(smoke)))
    for tables in training.in_parallel(execute, calls, workers):
        metrics.replace_rows(out, tables, order)
        row = tables["gpt_runs"][0]
        name = f"{row['experiment']} {row['value']}, seed {row['seed']}"
        found = f"{row['val_nats_given_class']:.2f} nats an image given its class (validation)"
        print(f"saved: {name}, {row['seconds'] / 60:.1f} minutes, {found}", flush=True)


# ---- Writing --------------------------------------------------------------------------------


class CachedStep:
    """A `step` for interview.decoding that reads each token once: tokens (B, T) -> (B, 16).

    Each call must continue the sequences of the call before, row by row. Beam search drops some and
    doubles others, so it takes `UncachedStep`.
    """

    def __init__(self, model: GPT, batch: int):
        self.model = model
        self.caches = model.caches(batch)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        n_read = self.caches[0].length
        return self.model(tokens[:, n_read:], self.caches)[:, -1]


class UncachedStep:
    """The same logits, but every call reads all tokens again: (B, T) -> (B, 16)."""

    def __init__(self, model: GPT):
        self.model = model

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)[:, -1]


def write(model: GPT, labels: Tensor, choose: Callable) -> Tensor:
    """Digits of these classes (B,), each patch by choose(logits (B, 16)) -> (B,): (B, 196)."""
    check_classes(labels)
    step = CachedStep(model, len(labels))
    return decoding.generate(step, class_tokens(labels), model.config.n_tokens, choose)[:, 1:]


def sampled(model: GPT, labels: Tensor, seed: int = 0, **options) -> Tensor:
    """`write` by decoding.sample with its options: (B, 196)."""
    generator = torch.Generator(labels.device).manual_seed(seed)

    def choose(logits: Tensor) -> Tensor:
        return decoding.sample(logits, generator=generator, **options)

    return write(model, labels, choose)


def best_of_beam(model: GPT, label: int, width: int) -> Tensor:
    """The hypotheses that a beam search of this width ends with, best first: (width, 196)."""
    start = class_tokens(torch.tensor([label], device=model.places.device))
    step = UncachedStep(model)
    sequences, _ = decoding.beam_search(step, start, model.config.n_tokens, width)
    return sequences[:, 1:]


# ---- Measured: the likelihood beside published ones ------------------------------------------

PUBLISHED = {  # −log p(x) of binarised MNIST's test images, as van den Oord et al. 2016 list them
    "NADE (Larochelle and Murray 2011)": 88.33,
    "MADE (Germain et al. 2015)": 86.64,
    "EoNADE, 2 hidden layers, 128 orderings (Uria et al. 2014)": 85.10,
    "PixelCNN (van den Oord et al. 2016)": 81.30,
    "Diagonal BiLSTM, 7 layers (van den Oord et al. 2016)": 79.20,
}


def parts_of(digits: Digits, size: int = 40) -> list[Digits]:
    """The digits in parts of `size`: after each part the program can say how far it is."""
    parts = zip(digits.images.split(size), digits.labels.split(size), strict=True)
    return [Digits(images, labels) for images, labels in parts]


def measure_bound(model: GPT, test: Digits, prior: Tensor) -> dict[str, float]:
    """`bound` of these images: one pass."""
    parts = training.every_minute(parts_of(test), "bound, parts of 40 images")
    own = torch.cat([log_likelihood(model, *part) for part in parts])
    found = bound(own, test.labels, prior)
    return {
        "nats_given_class": -own.mean().item(),
        "bound": found.mean().item(),
        "nats": "",
        "standard_error": standard_error(found),
        "bayes_accuracy": "",
    }


def measure_sum(model: GPT, test: Digits, prior: Tensor) -> dict[str, float]:
    """The sum over the classes, exact, and the bound of the same images beside it: ten passes."""
    parts = training.every_minute(parts_of(test), "sum over classes, parts of 40 images")
    log_p = torch.cat([log_likelihood_of_classes(model, images) for images, _ in parts])
    return nats(log_p, test.labels, prior)


def nats_table(rows: pd.DataFrame, parameters: int) -> str:
    """Markdown: this model's test images beside the published numbers."""
    lines = []
    for name, number in PUBLISHED.items():
        line = {"model": name, "nats an image": f"{number:.2f}", "what it is": "−log p(x)"}
        lines.append(line | {"test images": "10,000", "binarisation": "fixed"})
    of = {row["value"]: row for row in rows.to_dict("records")}
    ours = {"model": f"this GPT, {parameters:,} parameters"}
    for value, column, name in (
        ("bound", "bound", "−log p(c) − log p(x \\| c) ≥ −log p(x)"),
        ("sum", "bound", "the same bound"),
        ("sum", "nats", "−log p(x), summed over the classes"),
    ):
        if value not in of:
            continue
        row = of[value]
        number = f"{float(row[column]):.2f}"
        if (value, column) != ("sum", "bound"):
            number += f" ± {row['standard_error']:.2f}"
        line = ours | {"nats an image": number, "what it is": name}
        lines.append(line | {"test images": f"{row['images']:,}", "binarisation": "drawn once"})
    return metrics.markdown(lines)


# ---- Measured: what each way of choosing gives and takes --------------------------------------


@dataclass(frozen=True)
class Measures:
    """How much --evaluate measures; sized for one core."""

    n_bound: int = 10_000  # test images of the bound
    n_sum: int = 1000  # of the sum over the classes, ten times the work
    n_digits: int = 50  # written of each class
    width: int = 5  # of the beam
    n_beam_classes: int = 10  # classes that are written by beam search
    n_timed: int = 512  # digits written at a time, on a GPU
    n_timed_on_cpu: int = 8
    repeats: int = 2


SMOKE = Measures(
    n_bound=20,
    n_sum=10,
    n_digits=2,
    width=2,
    n_beam_classes=1,
    n_timed=2,
    n_timed_on_cpu=2,
    repeats=1,
)
STRATEGIES = {  # name -> options of decoding.sample
    "temperature 1": {},
    "temperature 0.7": {"temperature": 0.7},
    "top-k, k = 3": {"top_k": 3},
    "top-p, p = 0.9": {"top_p": 0.9},
}


def written_by(name: str, model: GPT, measures: Measures) -> Digits:
    """What one strategy writes, the classes in turn: patches (N, 196) and classes (N,).

    Greedy has one digit a class to give; of a beam search all hypotheses of its end are taken.
    """
    classes = torch.arange(N_CLASSES, device=model.places.device)
    if name == "greedy":
        return Digits(write(model, classes, decoding.likeliest), classes)
    if name == "beam search":
        labels = training.every_minute(range(measures.n_beam_classes), "classes by beam search")
        beams = [best_of_beam(model, label, measures.width) for label in labels]
        labels = classes[: measures.n_beam_classes].repeat(measures.width)
        return Digits(torch.stack(beams, 1).flatten(0, 1), labels)
    seed = list(STRATEGIES).index(name)
    parts = classes.repeat(measures.n_digits).split(100)  # each needs a cache of its own
    written = []
    for number, labels in enumerate(training.every_minute(parts, f"hundreds by {name}")):
        images = sampled(model, labels, seed=1000 * seed + number, **STRATEGIES[name])
        written.append(Digits(images, labels))
    images, labels = (torch.cat(column) for column in zip(*written, strict=True))
    return Digits(images, labels)


def diversity(digits: Digits) -> float:
    """Mean share of pixels in which two digits of a class differ, over all pairs of the class.

    Of n images a pixel is ink in a share m. Then of the n² ordered pairs a share 2 m (1 − m)
    differs there, of the n (n − 1) with two different images n / (n − 1) times as many. nan if a
    class has one image alone.
    """
    shares = []
    for label in digits.labels.unique():
        pixels = pixels_of(digits.images[digits.labels == label])  # (n, 28, 28)
        n = len(pixels)
        if n < 2:
            return math.nan
        m = pixels.double().mean(0)
        shares.append((2 * m * (1 - m)).mean().item() * n / (n - 1))
    return float(np.mean(shares))


def read_as_asked(cnn: nn.Module | None, digits: Digits) -> float:
    """Share of digits that the CNN reads as the class they were asked for; nan without a CNN."""
    if cnn is None:
        return math.nan
    images = stage1_mlp.normalised(255 * pixels_of(digits.images).cpu())
    with torch.no_grad():
        read = InParts(cnn)(images).argmax(1)
    return (read == digits.labels.cpu()).double().mean().item()


def measure_digits(
    model: GPT, digits: Digits, cnn: nn.Module | None
) -> tuple[dict[str, float], list[dict]]:
    """What is measured of digits, and as examples the first ten of each class."""
    parts = training.every_minute(parts_of(digits), "likelihood, parts of 40 digits")
    log_p = torch.cat([log_likelihood(model, *part) for part in parts])
    found = {
        "read_as_asked": read_as_asked(cnn, digits),
        "diversity": diversity(digits),
        "nats_given_class": -log_p.mean().item(),
    }
    examples = []
    for label in range(N_CLASSES):
        of_class = digits.images[digits.labels == label]
        examples += [{"label": label, "patches": hex_of(patches)} for patches in of_class[:10]]
    return found, examples


def hex_of(patches: Tensor) -> str:
    """Patches (196,) as text, a digit of 0 … f each."""
    return "".join(f"{patch:x}" for patch in patches.tolist())


def patches_of(texts: list[str]) -> Tensor:
    """`hex_of` backwards: (N, 196)."""
    return torch.tensor([[int(letter, 16) for letter in text] for text in texts])


# ---- Measured: the cache --------------------------------------------------------------------


def measure_speed(measures: Measures, device: str, smoke: bool) -> list[dict]:
    """Rows of gpt_speed.csv: tokens a second with a cache and without, for 8, 2 and 1 heads of it.

    Median seconds of `repeats` writings. The weights are random, as the time does not depend on
    them. All are timed in turn, so that what else the machine does falls on all alike. On a CPU it
    is the processor's time that counts.
    """
    config = replace(MAIN, n_heads=8)
    config = replace(smoke_config(config), n_tokens=10) if smoke else config
    batch = measures.n_timed_on_cpu if device == "cpu" else measures.n_timed
    labels = torch.arange(batch, device=device) % N_CLASSES
    models = {n: GPT(replace(config, n_kv_heads=n)).to(device).eval() for n in (8, 2, 1)}
    calls = list(itertools.product(models, (True, False)))
    for n, cached in calls:
        write_greedily(models[n], labels, cached, 2)  # the first call of a size is slow
    clock = time.process_time if device == "cpu" else time.perf_counter
    times = {call: [] for call in calls}
    for n, cached in training.every_minute(calls * measures.repeats, "writings timed"):
        start = clock()
        write_greedily(models[n], labels, cached, config.n_tokens)
        times[n, cached].append(clock() - start)
    rows = []
    for n, name in ((8, "MHA"), (2, "GQA"), (1, "MQA")):
        row = {"experiment": "speed", "value": name, "n_kv_heads": n, "batch": batch}
        row["clock"] = clock.__name__
        tokens = batch * config.n_tokens
        seconds_cached = float(np.median(times[n, True]))
        seconds_uncached = float(np.median(times[n, False]))
        row["cached_tokens_a_second"] = tokens / seconds_cached
        row["uncached_tokens_a_second"] = tokens / seconds_uncached
        row["ratio"] = seconds_uncached / seconds_cached
        row["cache_megabytes"] = sum(cache.nbytes for cache in models[n].caches(batch)) / 1e6
        row["weight_megabytes"] = 4 * n_parameters(models[n]) / 1e6
        rows.append(row | stage1_mlp.origin_of_rows(device))
    return rows


def write_greedily(model: GPT, labels: Tensor, cached: bool, n_patches: int) -> None:
    """The first patches of digits of these classes (B,), for the clock; .cpu() waits for a GPU."""
    step = CachedStep(model, len(labels)) if cached else UncachedStep(model)
    decoding.greedy(step, class_tokens(labels), n_patches).cpu()


def evaluate_all(
    out: Path, data_dir: Path, cnn_path: Path, device: str, fresh: bool = False, smoke: bool = False
) -> None:
    """Measure gpt_nats.csv, gpt_decoding.csv, gpt_digits.csv and gpt_speed.csv, row by row.

    A row is saved at once, and not measured again for the same weights; with fresh all are.
    """
    measures = SMOKE if smoke else Measures()
    weights = training.digest_of(out / "gpt_digits.pt")
    for table in ("gpt_nats", "gpt_decoding", "gpt_digits"):
        training.forget_rows(out / f"{table}.csv", None if fresh else weights)
    if fresh:
        training.forget_rows(out / "gpt_speed.csv")
    print(f"measuring on {stage1_mlp.device_name(device)}", flush=True)
    model = load_weights(out / "gpt_digits.pt", device)
    digits = load_digits(data_dir, device)
    prior = class_shares(digits["train"].labels)
    evaluate_likelihood(out, model, digits["test"], prior, measures, weights)
    evaluate_strategies(out, model, digits["test"], cnn_path, measures, weights)
    evaluate_speed(out, measures, device, smoke)


def evaluate_likelihood(
    out: Path, model: GPT, test: Digits, prior: Tensor, measures: Measures, weights: str
) -> None:
    """Two rows of gpt_nats.csv: the bound for many images, the sum over the classes for few."""
    for value, measure, n in (
        ("bound", measure_bound, measures.n_bound),
        ("sum", measure_sum, measures.n_sum),
    ):
        key = {"experiment": "digits", "value": value, "weights": weights, "images": n}
        if training.has_row(out / "gpt_nats.csv", key):
            continue
        row = key | measure(model, test.first(n), prior)
        row |= stage1_mlp.origin_of_rows(model.places.device.type)
        metrics.replace_rows(out, {"gpt_nats": [row]}, [])
        print(f"  saved: {value}, {n:,} images, bound {row['bound']:.2f} nats", flush=True)


def evaluate_strategies(
    out: Path, model: GPT, test: Digits, cnn_path: Path, measures: Measures, weights: str
) -> None:
    """A row of gpt_decoding.csv for real digits and each strategy, and of gpt_digits.csv many."""
    cnn = None
    if cnn_path.exists():
        cnn = load_cnn(cnn_path)
    else:
        hint = "python -m interview.convolution --train, or name one by --cnn"
        print(f"  no CNN at {cnn_path}, so nobody reads the digits: {hint}", flush=True)
    for name in ("real test digits", "greedy", "beam search", *STRATEGIES):
        sizes = {"n_digits": measures.n_digits, "width": measures.width}
        key = {"experiment": "digits", "value": name, "weights": weights} | sizes
        if training.has_row(out / "gpt_decoding.csv", key):
            continue
        if name == "real test digits":
            digits = test.first(N_CLASSES * measures.n_digits)
        else:
            digits = written_by(name, model, measures)
        found, examples = measure_digits(model, digits, cnn)
        row = key | {"digits": len(digits.labels)} | found
        row |= stage1_mlp.origin_of_rows(model.places.device.type)
        of_name = {"experiment": "digits", "value": name, "weights": weights}
        examples = [of_name | example for example in examples]
        metrics.replace_rows(out, {"gpt_digits": examples, "gpt_decoding": [row]}, [])
        print(f"  saved: {name}, {found['nats_given_class']:.2f} nats", flush=True)


def evaluate_speed(out: Path, measures: Measures, device: str, smoke: bool) -> None:
    """The rows of gpt_speed.csv, all or none, as they are timed in turn."""
    key = {"experiment": "speed", "device": stage1_mlp.device_name(device)}
    if not training.has_row(out / "gpt_speed.csv", key):
        rows = measure_speed(measures, device, smoke)
        metrics.replace_rows(out, {"gpt_speed": rows}, [])
        print("  saved: speed", flush=True)


# ---- Shown ----------------------------------------------------------------------------------

# a patch [a b / c d] as a letter, in the order of its number 8a + 4b + 2c + d
LETTERS = " ▗▖▄▝▐▞▟▘▚▌▙▀▜▛█"


def as_text(patches: Tensor) -> str:
    """Digits (N, 196) side by side in a terminal: 14 lines, a letter a patch."""
    grids = patches.view(-1, GRID, GRID).tolist()
    lines = []
    for row in range(GRID):
        lines.append("  ".join("".join(LETTERS[patch] for patch in grid[row]) for grid in grids))
    return "\n".join(lines)


def draw_digits(path: Path, rows: pd.DataFrame, n_each: int = 1) -> None:
    """A row of images for each strategy: n_each digits of every class, as greedy has one alone."""
    strategies = list(dict.fromkeys(rows["value"]))
    title = "Digits as each strategy writes them, and real ones (blank: nothing was written)"
    height = 0.8 * len(strategies) + 0.8
    with metrics.picture(path, title, len(strategies), width=11.5, height=height) as panels:
        for axes, name in zip(panels, strategies, strict=True):
            found = rows[rows["value"] == name].groupby("label").head(n_each)
            found = found.sort_values("label", kind="stable")
            images = pixels_of(patches_of(found["patches"].tolist()))  # (N, 28, 28)
            strip = torch.nn.functional.pad(images, (2, 2, 2, 2)).permute(1, 0, 2).flatten(1)
            axes.imshow(strip.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.grid(False)
            axes.spines[:].set_visible(False)
            axes.set_ylabel(name, rotation=0, ha="right", va="center")


def draw_course(path: Path, history: pd.DataFrame) -> None:
    """Nats an image during training."""
    title = "The GPT learns to write: nats an image, given its class"
    with metrics.picture(path, f"{title}\n(1 seed; lower is better)", width=10) as axes:
        names = {"train_nats": "training images, dropout on", "val_nats": "1,000 validation images"}
        for (column, name), color in zip(names.items(), metrics.COLORS, strict=False):
            metrics.draw_line(axes, history, "epoch", column, color=color, label=name)
        axes.set(xlabel="epochs", ylabel="−log p(x | class) (nats)")
        last = history["val_nats"].iloc[-1]
        axes.set_ylim(last - 5, last + 45)  # the end is what matters, not the first fall
        metrics.legend_beside(axes)


def kv_heads_table(runs: pd.DataFrame) -> str:
    """Markdown: a line a number of key/value heads; differences are of runs with the same seed."""
    nats_of = runs.pivot_table("val_nats_given_class", "seed", "value")
    lines = []
    for value, rows in runs.groupby("value", sort=False):
        found = metrics.summarise(rows["val_nats_given_class"])
        more = metrics.summarise((nats_of[value] - nats_of["8"]).dropna())
        line = {"key/value heads": value, "nats an image": str(found)}
        interval = f" ± {more.half:.2f}" if more.n > 1 else ""
        line["more than 8 heads"] = "–" if value == "8" else f"{more.mean:.2f}{interval}"
        line["parameters"] = f"{rows['parameters'].iloc[0]:,.0f}"
        line["cache, kB an image"] = f"{rows['cache_bytes'].iloc[0] / 1000:.0f}"
        lines.append(line | {"n": str(found.n)})
    return metrics.markdown(lines)


def draw_kv_heads(path: Path, runs: pd.DataFrame, history: pd.DataFrame) -> None:
    """Validation nats of each number of key/value heads, at the end and during training."""
    colors = metrics.colors_of(list(dict.fromkeys(runs["value"])), ordered=True)
    steps = history["step"].max()
    title = f"What does sharing keys and values cost? 8 query heads, {steps:,} steps"
    left_shows = "left: every seed, mean and 95 % t interval"
    spread = f"{runs['seed'].nunique()} seeds; {left_shows}; right: mean, lowest and highest"
    size = {"n_columns": 2, "width": 13, "height": 5}
    with metrics.picture(path, f"{title}\n({spread})", **size) as (left, right):
        metrics.draw_points(left, runs, "value", "val_nats_given_class", colors)
        left.set(xlabel="key/value heads", ylabel="validation nats an image, given its class")
        for value, rows in history.groupby("value", sort=False):
            style = {"color": colors[value], "label": value, "errorbar": ("pi", 100)}
            metrics.draw_line(right, rows, "step", "val_nats", marker="o", **style)
        right.set(xlabel="training step", ylabel="nats of 1,000 validation images")
        metrics.log_scale(right.yaxis, history["val_nats"])
        metrics.legend_beside(right, "key/value heads")


def strategies_table(rows: pd.DataFrame) -> str:
    """Markdown: what each strategy gives and takes."""
    lines = []
    for row in rows.to_dict("records"):
        line = {"digits of": row["value"], "n": f"{row['digits']:,}"}
        line["read as asked %"] = percent(row["read_as_asked"])
        line["pixels in which two differ %"] = percent(row["diversity"])
        lines.append(line | {"nats given the class": f"{row['nats_given_class']:.2f}"})
    return metrics.markdown(lines)


def percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.1f}"


def speed_table(rows: pd.DataFrame) -> str:
    """Markdown: tokens a second with and without a cache."""
    lines = []
    for row in rows.to_dict("records"):
        line = {"attention": f"{row['value']}, {row['n_kv_heads']} key/value heads of 8"}
        line["with cache, tokens/s"] = f"{row['cached_tokens_a_second']:,.0f}"
        line["without, tokens/s"] = f"{row['uncached_tokens_a_second']:,.0f}"
        line["times as fast"] = f"{row['ratio']:.1f}"
        lines.append(line | {"cache, MB": f"{row['cache_megabytes']:.0f}"})
    return metrics.markdown(lines)


def show_runs(out: Path) -> None:
    """Tables and pictures of the trainings."""
    runs = metrics.load_rows(out / "gpt_runs.csv")
    history = metrics.load_rows(out / "gpt_history.csv")
    main_history = history[history["experiment"] == "digits"]
    if len(main_history):
        draw_course(out / "gpt_course.png", main_history)
    shared = runs[runs["experiment"] == "key/value heads"]
    if len(shared):
        shared_history = history[history["experiment"] == "key/value heads"]
        draw_kv_heads(out / "gpt_kv_heads.png", shared, shared_history)
        table = kv_heads_table(shared)
        (out / "gpt_kv_heads.md").write_text(table + "\n", encoding="utf-8")
        steps = shared_history["step"].max()
        print(f"\nFewer key/value heads, {steps:,} steps; validation nats given the class, mean ±")
        print("std of n seeds; differences with their 95 % t interval, of equal seeds:")
        print(table)
        print("It does not show what sharing costs at equal size (fewer heads are fewer weights),")
        print("in a longer training, or in a large model.")


ABOUT_NATS = """\
The bound takes one pass, the sum ten. So the sum is of fewer images; the bound of the same images
says how tight it is. The binarisation is not the same: the published models were trained and judged
on one fixed draw of all pixels. Here training images are drawn anew in each epoch, which is more
data, and test images once, with other pixels than theirs. So the rows say of what order the numbers
are, not which model is better."""


def show_measures(out: Path, parameters: int) -> None:
    """Tables and pictures of what --evaluate measured."""
    found = metrics.load_rows(out / "gpt_nats.csv")
    tables = {}
    if len(found):
        tables["nats"] = nats_table(found, parameters)
        print("\nTest images of binarised MNIST, −log p(x), lower is better:")
        print(tables["nats"])
        print(ABOUT_NATS)
    strategies = metrics.load_rows(out / "gpt_decoding.csv")
    if len(strategies):
        tables["decoding"] = strategies_table(strategies)
        print("\nWhat each strategy gives and takes (the CNN of convolution.py reads):")
        print(tables["decoding"])
        draw_digits(out / "gpt_digits.png", metrics.load_rows(out / "gpt_digits.csv"))
    speed = metrics.load_rows(out / "gpt_speed.csv")
    if len(speed):
        tables["speed"] = speed_table(speed)
        row = speed.iloc[0]
        batch = f"{row['batch']} digits at a time, {row['device']}"
        print(f"\nWritten with the cache and without, {batch}:")
        print(tables["speed"])
    for name, table in tables.items():
        (out / f"gpt_{name}.md").write_text(table + "\n", encoding="utf-8")
    if not tables:
        print("\nNothing is measured yet: python -m interview.gpt --evaluate")


def main(
    train: bool = False,
    evaluate: bool = False,
    fresh: bool = False,
    workers: int = 1,
    smoke: bool = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    out: Path = FIGURES,
    cnn: Path | None = None,
    checkpoints: Path = CHECKPOINTS,
    data_dir: Path = ROOT / "data",
) -> int:
    """Show a GPT write digits: what it learned, how it is decoded, what its cache saves.

    Args:
        train: train first what is not saved yet; a command started again goes on.
        evaluate: measure what the tables do not hold of these weights; goes on where it stopped.
        fresh: with evaluate, measure all again.
        workers: runs that are trained at the same time, each on one thread.
        smoke: tiny networks and few images, to see that everything runs.
        device: what trains and measures; auto takes a GPU if there is one.
        out: the folder that tables, pictures and weights go to and are read from.
        cnn: weights of convolution.py's network for MNIST, which reads the digits; if not named,
            those in `out`, else the committed ones.
        checkpoints: the folder for what an unfinished run needs to go on.
        data_dir: the folder that holds MNIST/raw.
    """
    print("A GPT writes digits, patch by patch (逐块生成): half a minute from what is saved;")
    print("--evaluate and --train take minutes on a large GPU, hours and days on a CPU core")
    torch.set_num_threads(1)
    weights = out / "gpt_digits.pt"
    try:
        check_whole(workers=workers)
        if fresh and not evaluate:
            raise ValueError("--fresh measures all again: it needs --evaluate")
        if smoke and out.resolve() == FIGURES:
            raise ValueError(f"--smoke would write over {out}: name another folder by --out")
        with stage1_mlp.claimed(out):
            device = stage1_mlp.device_of(cuda_or_cpu(device))
            if train:
                train_missing(out, data_dir, workers, device, checkpoints, smoke)
            if not weights.exists():
                print("\nNo trained network yet: python -m interview.gpt --train")
                return 0
            if evaluate:
                cnn_path = cnn or reader_of(out)
                evaluate_all(out, data_dir, cnn_path, device, fresh, smoke)
            model = load_weights(weights)
            print("\nFive digits, written now at temperature 1:")
            print(as_text(sampled(model, torch.tensor([3, 1, 4, 1, 5]))))
            show_runs(out)
            show_measures(out, n_parameters(model))
    except (stage1_mlp.DataError, ValueError, OSError) as error:
        print(f"interview.gpt: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; finished runs are saved, the same command goes on", file=sys.stderr)
        return 130
    print(f"\ntables and pictures: {out}/gpt_*")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
