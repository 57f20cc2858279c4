"""Stage 3: attention (注意力) in which heads share keys and values, and the cache that gains by it.

    python stage3_attention.py demo                   a random matrix through MHA, GQA and MQA
    python stage3_attention.py                        the brief's questions, one seed each
    python stage3_attention.py --only recall heads    some experiments; --only all: every one
    python stage3_attention.py train --n-kv-heads 2   one network of your own
    python stage3_attention.py predict shirt.png      what the trained network makes of your images
    python stage3_attention.py benchmark              speed, beside what a user would take instead
    python stage3_attention.py plot                   draw figures/stage3/ again from its saved rows

Read `attention` and `MultiHeadAttention` (多头) first: they are the whole idea. Then read
`GroupedQueryAttention` (分组查询), of which `MultiQueryAttention` (多查询) is the other end, and
`KVCache` (键值缓存). `EXPERIMENTS` is the table of everything that was tried.

Config, Data, Model, Training and Experiments are the assignment; Pictures, Commands, predict,
benchmark and demo are what surrounds it.

Axis letters in shape comments: B batch, T queries or tokens, S keys, D width of a token, H query
heads, G key/value heads, d width of a head, F features of an input token, C classes, N images.
"""

import gzip
import hashlib
import io
import itertools
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Union, get_args, get_origin

import joblib
import numpy as np
import pandas as pd
import torch
import tyro
from filelock import FileLock, Timeout
from joblib.externals.loky import get_reusable_executor
from PIL import Image, ImageFilter, ImageOps
from scipy import ndimage, stats
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import metrics

HERE = Path(__file__).resolve().parent
SCRIPT = Path(__file__).name

# -------- Config ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """All that a run depends on; each field is a flag of `train`."""

    # clothes: which class is the image? recall: which label does the asked garment get?
    task: Literal["clothes", "recall"] = "clothes"
    # query heads of a block
    n_heads: int = 8
    # key/value heads: as many as n_heads is multi-head, 1 multi-query, between them grouped-query
    n_kv_heads: int = 8
    # width of a token inside the network
    d_model: int = 96
    # neurons of a block's feed-forward part; 0 is twice d_model
    d_ff: int = 0
    # blocks of attention and feed-forward part
    n_blocks: int = 2
    # how the network knows where a token stands
    position: Literal["none", "learned", "sinusoidal", "relative", "rotary"] = "learned"
    # weights from queries and keys; or, as a control, the same weight for all, or itself alone, or
    # no attention at all
    attends: Literal["learned", "uniform", "itself", "nothing"] = "learned"
    # divide scores by √d
    scaled: bool = True
    # a token attends to those up to itself alone
    causal: bool = False
    # how an image is cut into tokens: 28 rows of 28 pixels, or 49 patches of 4 × 4
    tokens: Literal["rows", "patches"] = "rows"
    # what is classified: the states of all tokens side by side, their mean, or the last one
    readout: Literal["all", "mean", "last"] = "all"
    # tokens of zeros after an image's own
    padding: int = 0
    # hide the padding from attention and readout
    masked: bool = True
    # of recall: garments before the asked one, drawn for each batch from fewest … 8
    fewest: int = 2
    # share of the features of what a block adds that are zeroed while training
    dropout: float = 0.2
    # share of the target that is spread evenly over all classes
    label_smoothing: float = 0.1
    # highest learning rate of the schedule
    lr: float = 3e-3
    # AdamW's, of weights, not of biases
    weight_decay: float = 0.3
    # share of the run in which the learning rate rises; then it falls along a cosine
    warmup: float = 0.2
    # largest gradient norm; 0 switches clipping off
    clip: float = 1.0
    # images, or sequences of recall, of one update
    batch_size: int = 256
    # passes over the training images
    epochs: int = 14
    # number of updates, whatever epochs says; 0 leaves it to epochs
    steps: int = 0
    # training images used
    n_train: int = 55_000
    # how often a run is evaluated on its way
    n_logs: int = 14
    # of weights, batch order, dropout, sequences; never of the validation split
    seed: int = 0

    @property
    def n_steps(self) -> int:
        return self.steps or self.epochs * math.ceil(self.n_train / self.batch_size)

    def check(self) -> None:
        """ValueError that names the field and the value, and says what would be right."""
        limits = {
            "n_heads": (1, 1024),
            "n_kv_heads": (1, 1024),
            "d_model": (1, 8192),
            "d_ff": (0, 32_768),
            "n_blocks": (1, 100),
            "padding": (0, 1000),
            "fewest": (1, N_GARMENTS),
            "dropout": (0, 0.99),
            "label_smoothing": (0, 1),
            "lr": (1e-12, 1e32),
            "weight_decay": (0, 1e6),
            "warmup": (0, 0.99),
            "clip": (0, 1e12),
            "batch_size": (1, 60_000),
            "epochs": (1, 10_000),
            "steps": (0, 10_000_000),
            "n_train": (1 if self.task == "clothes" else 500, N_TRAIN),
            "n_logs": (1, 10_000),
            "seed": (0, 2**32 - 1),
        }
        for name, (low, high) in limits.items():
            check_range(name, getattr(self, name), low, high)
        for field in fields(self):
            choices = get_args(field.type)
            value = getattr(self, field.name)
            if get_origin(field.type) is Literal and value not in choices:
                raise ValueError(f"{field.name} must be one of {', '.join(choices)}, not {value!r}")
        if self.d_model % self.n_heads:
            wanted = f"d_model must be a multiple of n_heads, {self.n_heads}"
            raise ValueError(f"{wanted}, not {self.d_model} (--d-model, --n-heads)")
        if self.n_heads % self.n_kv_heads:
            wanted = f"n_heads must be a multiple of n_kv_heads, {self.n_kv_heads}"
            raise ValueError(f"{wanted}, not {self.n_heads} (--n-heads, --n-kv-heads)")
        d_head = self.d_model // self.n_heads
        if self.position == "rotary" and d_head % 2:
            wanted = "a rotary head's width, d_model / n_heads, must be even"
            raise ValueError(f"{wanted}, not {d_head} (--position, --d-model, --n-heads)")
        if self.task == "recall" and self.readout != "last":
            wanted = 'readout must be "last" for recall, which asks for the last token'
            raise ValueError(f"{wanted}, not {self.readout!r} (--readout)")
        if self.task == "recall" and self.padding:
            raise ValueError(f"padding must be 0 for recall, not {self.padding} (--padding)")


def check_range(name: str, value: float, low: float, high: float) -> None:
    """ValueError unless low <= value <= high; a nan is refused too."""
    flag = "--" + name.replace("_", "-")
    if not low <= value:
        raise ValueError(f"{name} must be at least {low:,}, not {value:,} ({flag})")
    if not value <= high:
        raise ValueError(f"{name} must be at most {high:,}, not {value:,} ({flag})")


# -------- Data ------------------------------------------------------------------------------------

MEAN, STD = 0.2860, 0.3530  # of Fashion-MNIST's training pixels scaled to 0 … 1
N_TRAIN, N_VAL = 55_000, 5_000  # of the 60,000 training images; the 10,000 test images stay whole
CLASSES = ["T-shirt", "trouser", "pullover", "dress", "coat"]
CLASSES += ["sandal", "shirt", "sneaker", "bag", "ankle boot"]
DATASET = "FashionMNIST"  # MNIST's files have the same names: only checksums tell them apart
SHA256 = {  # of the unpacked files
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


class Split(NamedTuple):
    images: Tensor  # (N, 28, 28) float32; of recall sequences of tokens (N, T, F)
    labels: Tensor  # (N,) int64


class Data(NamedTuple):
    train: Split  # in a random order, so that the first n of them are a fair sample
    val: Split
    test: Split


class DataError(Exception):
    """A data file is missing, damaged, or another set's."""


def read_part(folder: Path, name: str) -> np.ndarray:
    """One of the four files, unpacked if it lies there so, else from its .gz: uint8 (N, …).

    Nothing is written. The checksum proves number, shape, values and the right data set at once.
    """
    path = folder / name
    packed = folder / f"{name}.gz"
    if not path.exists() and not packed.exists():
        advice = "give its folder by --data-dir, or add --download"
        raise DataError(f"{packed} is missing: {advice}")
    source = path if path.exists() else packed
    try:
        content = source.read_bytes() if source == path else gzip.decompress(source.read_bytes())
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{source} cannot be read ({error}): replace it") from error
    if hashlib.sha256(content).hexdigest() != SHA256[name]:
        advice = f"delete it, so that {packed.name} is read" if source == path else "replace it"
        raise DataError(f"{source} is damaged or not {DATASET}'s (checksum): {advice}")
    # an idx file: 4 bytes of type, 4 bytes for the length of each axis, then the values
    if "images" in name:
        return np.frombuffer(content, np.uint8, offset=16).reshape(-1, 28, 28)
    return np.frombuffer(content, np.uint8, offset=8)


def load_data(data_dir: Path = HERE / "data", download: bool = False) -> Data:
    """Fashion-MNIST whole: 55,000 / 5,000 / 10,000 images; DataError names a wrong file.

    Pixels have mean 0 and standard deviation 1 over the training images. The validation
    images are stratified, of every class a twelfth, and always the same.
    """
    folder = Path(data_dir) / DATASET / "raw"
    if download:
        fetch(Path(data_dir))
    parts = [read_part(folder, name) for name in SHA256]
    train_images, train_labels, test_images, test_labels = (torch.tensor(part) for part in parts)

    generator = torch.Generator().manual_seed(2017)  # of the split alone: no run's seed changes it
    order = torch.randperm(len(train_labels), generator=generator)
    by_class = order[train_labels[order].argsort(stable=True)]
    is_val = torch.arange(len(by_class)) % 12 == 0  # every 12th, class by class
    val = by_class[is_val]
    train = by_class[~is_val]
    train = train[torch.randperm(len(train), generator=generator)]

    def split(images: Tensor, labels: Tensor) -> Split:
        return Split(normalised(images), labels.long())

    return Data(
        split(train_images[train], train_labels[train]),
        split(train_images[val], train_labels[val]),
        split(test_images, test_labels),
    )


def fetch(data_dir: Path) -> None:
    """Let torchvision download the set; two stages that start at once do it one after the other."""
    try:
        from torchvision import datasets

        data_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(data_dir / f".{DATASET}.lock"):
            datasets.FashionMNIST(str(data_dir), download=True)
    except (ImportError, RuntimeError, OSError, ValueError) as error:
        pair = "pip install --force-reinstall torch torchvision"
        hint = (
            f"; torch and torchvision must be a matched pair: {pair}" if "nms" in str(error) else ""
        )
        raise DataError(f"{DATASET} cannot be downloaded into {data_dir}: {error}{hint}") from error


def normalised(pixels: Tensor) -> Tensor:
    """Pixels of 0 … 255 to the mean 0 and standard deviation 1 of the training images, float32."""
    return (pixels.float() / 255 - MEAN) / STD


def as_stored(images: Tensor) -> Tensor:
    """The same images with pixels of 0 … 255 again."""
    return (images * STD + MEAN) * 255


def tokens_of(images: Tensor, config: Config) -> tuple[Tensor, Tensor | None]:
    """Images (B, 28, 28) as tokens (B, T, F), and a mask (1, 1, 1, T) that hides the padding.

    The mask is True at an image's own tokens, and None if nothing is to be hidden. Sequences of
    recall are tokens already.
    """
    if config.task == "recall":
        return images, None
    tokens = images  # (B, 28 rows, 28 pixels)
    if config.tokens == "patches":
        patches = images.reshape(-1, 7, 4, 7, 4).transpose(2, 3)  # (B, 7, 7, 4, 4)
        tokens = patches.reshape(-1, 49, 16)
    if config.padding == 0:
        return tokens, None
    n_true = tokens.shape[1]
    tokens = F.pad(tokens, (0, 0, 0, config.padding))
    is_true = torch.arange(tokens.shape[1], device=images.device) < n_true
    return tokens, is_true[None, None, None] if config.masked else None


# The recall task (in-context, few-shot, 少样本): garments with labels, then one without

N_GARMENTS = 8  # at most, and so the number of labels


class Wardrobe(NamedTuple):
    """The images of a split, so that one of a wanted class is found at once."""

    images: Tensor  # (N, 784)
    order: Tensor  # (N,) indices of the images, class by class
    starts: Tensor  # (10,) where each class begins in `order`
    sizes: Tensor  # (10,) images of each class


def wardrobe_of(split: Split) -> Wardrobe:
    sizes = split.labels.bincount(minlength=len(CLASSES))
    order = split.labels.argsort(stable=True)
    return Wardrobe(split.images.flatten(1), order, sizes.cumsum(0) - sizes, sizes)


def draw_sequences(wardrobe: Wardrobe, B: int, n: int, generator=None) -> tuple[Tensor, Tensor]:
    """B sequences of n labelled garments and one without: tokens (B, n + 1, 792), answers (B,).

    The n garments are of n different classes. Their labels, 0 … 7, are drawn anew for every
    sequence, so a label means nothing outside of it. The last garment is another image of one of
    the n classes; the answer is that class's label here. A token is 784 pixels and the label as 8
    numbers of which one is not 0: the first linear layer makes of these a vector that it adds.
    """
    random = partial(torch.rand, generator=generator, device=wardrobe.images.device)
    classes = random(B, len(CLASSES)).argsort(1)[:, :n]  # (B, n) in a random order
    labels = random(B, N_GARMENTS).argsort(1)[:, :n]  # (B, n)
    asked = (random(B, 1) * n).long()  # (B, 1) which of the n garments is asked for
    classes = torch.cat([classes, classes.gather(1, asked)], 1)  # (B, n + 1)

    sizes = wardrobe.sizes[classes]  # (B, n + 1)
    place = (random(B, n + 1) * sizes).long()  # of each image among those of its class
    apart = 1 + (random(B, 1) * (sizes[:, -1:] - 1)).long()  # the last is not the one asked for
    place[:, -1:] = (place.gather(1, asked) + apart) % sizes[:, -1:]
    images = wardrobe.images[wardrobe.order[wardrobe.starts[classes] + place]]  # (B, n + 1, 784)

    label_part = LABEL_SIZE * F.one_hot(labels, N_GARMENTS)  # (B, n, 8)
    label_part = F.pad(label_part, (0, 0, 0, 1))  # the last one has none
    tokens = torch.cat([images, label_part], 2)  # (B, n + 1, 792)
    return tokens, labels.gather(1, asked).squeeze(1)


LABEL_SIZE = 10.0  # of the label's number in a token, whose 784 pixels have the length 28


def sequences_of(split: Split, n_sequences: int) -> Split:
    """Sequences of eight garments to judge by, always the same ones for the same split."""
    generator = torch.Generator(split.images.device).manual_seed(2017)
    return Split(*draw_sequences(wardrobe_of(split), n_sequences, N_GARMENTS, generator))


# -------- Model -----------------------------------------------------------------------------------


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ / √d) v (Vaswani 2017, eq. 1), for query heads that share keys in groups.

        query heads        Q0 Q1 Q2 Q3   Q4 Q5 Q6 Q7        H = 8
                           └──┴┬─┴──┘    └──┴┬─┴──┘
        key/value heads        K0            K1             G = 2: head h reads h // (H / G)

    q (B, H, T, d), k (B, G, S, d), v (B, G, S, d_v), H a multiple of G -> out (B, H, T, d_v) and
    weights (B, H, T, S), whose rows sum to 1. mask: bool, True where a query may attend, or float,
    added to the scores; it broadcasts to (B, H, T, S). causal: the last query sees all S keys, the
    one before it S - 1, and so on. A query that may attend to nothing gets zeros. scale None is
    1 / √d. ValueError on shapes and masks that do not fit.
    """
    check_heads(q, k, v)
    B, H, T, d = q.shape
    G, S, d_v = v.shape[1:]
    if scale is None:
        scale = 1 / math.sqrt(d)
    # half precision is too coarse for scores and their softmax, and float16 ends at 65,504
    exact = torch.promote_types(q.dtype, torch.float32)

    # [Q0 Q1 | Q2 Q3] meets [K0 | K1]: the queries of a group, one below the other, are multiplied
    # by the one head of keys they share. Nothing is copied to [K0 K0 | K1 K1]
    queries = (q.to(exact) * scale).reshape(B, G, H // G * T, d)
    scores = queries @ k.to(exact).mT  # (B, G, H/G · T, S)
    scores = scores.reshape(B, H, T, S)
    if mask is None and not causal:
        weights = scores.softmax(-1)
    else:
        scores = hide(scores, mask, causal)  # (B, H, T, S), -∞ where a query may not look
        weights = softmax_or_zeros(scores)
    weights = weights.to(q.dtype)  # (B, H, T, S)
    context_vec = weights.reshape(B, G, H // G * T, S) @ v  # (B, G, H/G · T, d_v)
    return context_vec.reshape(B, H, T, d_v), weights


def hide(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Scores (B, H, T, S) with -∞ where a query may not look, or with a float mask added."""
    T, S = scores.shape[2:]
    if mask is not None:
        check_mask(mask, scores)
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -math.inf)
        else:
            scores = scores + mask.to(scores.dtype)
    if causal and T > 1:  # the last query sees every key
        is_future = torch.ones(T, S, dtype=torch.bool, device=scores.device).triu(S - T + 1)
        scores = scores.masked_fill(is_future, -math.inf)
    return scores


def softmax_or_zeros(scores: Tensor) -> Tensor:
    """softmax over the last axis; a row of -∞ alone gives zeros, where softmax would give nan."""
    is_empty = (scores == -math.inf).all(-1, keepdim=True)
    return scores.masked_fill(is_empty, 0.0).softmax(-1).masked_fill(is_empty, 0.0)


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    is_right = q.ndim == k.ndim == v.ndim == 4 and k.shape[:3] == v.shape[:3]
    if not is_right or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        wanted = "q (B, H, T, d), k (B, G, S, d) and v (B, G, S, d_v) expected"
        raise ValueError(f"{wanted}, not {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    H = q.shape[1]
    G = k.shape[1]
    if G == 0 or H % G:
        raise ValueError(f"{H} query heads are not a multiple of {G} key/value heads")


def check_mask(mask: Tensor, scores: Tensor) -> None:
    sizes = zip(mask.shape[::-1], scores.shape[::-1], strict=False)  # the last axis first
    fits = mask.ndim <= 4 and all(size in (1, wanted) for size, wanted in sizes)
    if not fits or not (mask.dtype == torch.bool or mask.is_floating_point()):
        wanted = f"a bool or float mask must broadcast to {tuple(scores.shape)}"
        raise ValueError(f"{wanted}, not {mask.dtype} {tuple(mask.shape)}")


def split_heads(x: Tensor, n_heads: int) -> Tensor:
    return x.unflatten(2, (n_heads, -1)).transpose(1, 2)  # (B, T, H · d) -> (B, H, T, d)


def join_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # (B, H, T, d) -> (B, T, H · d)


class MultiHeadAttention(nn.Module):
    """Every query head has keys and values of its own (多头注意力; Vaswani 2017, section 3.2.2).

    forward: x (B, T, D) attends to context (B, S, D), or to itself -> out (B, T, D) and weights
    (B, H, T, S). mask and causal as in `attention`; with a cache, the keys and values join it, and
    x attends to all that it then holds. ValueError on sizes that do not fit.
    """

    def __init__(self, d_model: int, n_heads: int):
        super().__init__()
        check_sizes(d_model, n_heads, n_heads)
        self.n_heads = n_heads
        self.W_q = nn.Linear(d_model, d_model)
        self.W_k = nn.Linear(d_model, d_model)
        self.W_v = nn.Linear(d_model, d_model)
        self.W_o = nn.Linear(d_model, d_model)

    def forward(self, x, context=None, mask=None, causal=False, cache=None):
        context = x if context is None else context
        check_inputs(x, context, self.W_q.in_features)
        queries = split_heads(self.W_q(x), self.n_heads)  # (B, H, T, d)
        keys = split_heads(self.W_k(context), self.n_heads)  # (B, H, S, d)
        values = split_heads(self.W_v(context), self.n_heads)  # (B, H, S, d)
        with unchanged_if_it_fails(cache):
            if cache is not None:
                keys, values = cache.append(keys, values)  # (B, H, all S so far, d)
            context_vec, weights = attention(queries, keys, values, mask, causal)  # (B, H, T, d)
        return self.W_o(join_heads(context_vec)), weights


class GroupedQueryAttention(nn.Module):
    """n_heads query heads share n_kv_heads heads of keys and values (分组查询; Ainslie 2023).

    As MultiHeadAttention, which it equals at n_kv_heads = n_heads, but W_k and W_v are smaller.
    position "rotary" turns queries and keys by their place; "relative" gives every distance a
    learned vector, see `relative_scores`; both compare places in one sequence, so there can be no
    context. scaled=False leaves the 1 / √d out. ValueError on sizes that do not fit.
    """

    FAR = 16  # distances beyond it count as it

    def __init__(self, d_model, n_heads, n_kv_heads, position="none", scaled=True):
        super().__init__()
        check_sizes(d_model, n_heads, n_kv_heads)
        d_head = d_model // n_heads
        check_position(position, d_head)
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.position = position
        self.scale = 1 / math.sqrt(d_head) if scaled else 1.0
        self.W_q = nn.Linear(d_model, d_model)
        self.W_k = nn.Linear(d_model, n_kv_heads * d_head)
        self.W_v = nn.Linear(d_model, n_kv_heads * d_head)
        self.W_o = nn.Linear(d_model, d_model)
        if position == "relative":
            self.distances = nn.Parameter(0.02 * torch.randn(2 * self.FAR + 1, d_head))

    def forward(self, x, context=None, mask=None, causal=False, cache=None):
        if context is not None and self.position != "none":
            reason = "compare places in one sequence, so there can be no context"
            raise ValueError(f"{self.position} positions {reason}")
        context = x if context is None else context
        check_inputs(x, context, self.W_q.in_features)
        queries = split_heads(self.W_q(x), self.n_heads)  # (B, H, T, d)
        keys = split_heads(self.W_k(context), self.n_kv_heads)  # (B, G, S, d)
        values = split_heads(self.W_v(context), self.n_kv_heads)  # (B, G, S, d)
        if self.position == "rotary":
            start = 0 if cache is None else cache.length
            queries = rotated(queries, start)
            keys = rotated(keys, start)  # once, before they are cached
        with unchanged_if_it_fails(cache):
            if cache is not None:
                keys, values = cache.append(keys, values)  # (B, G, all S so far, d)
            if self.position == "relative":
                mask = self.relative_scores(queries, keys.shape[2], mask)
            context_vec, weights = attention(queries, keys, values, mask, causal, self.scale)
        return self.W_o(join_heads(context_vec)), weights

    def relative_scores(self, queries: Tensor, S: int, mask: Tensor | None) -> Tensor:
        """q_i · a_(j - i) / √d, to be added to the scores (Shaw 2018, eq. 5): (B, H, T, S).

        a_distance is a row of `distances`, the same for all heads; a mask is put on top.
        """
        T = queries.shape[2]
        exact = torch.promote_types(queries.dtype, torch.float32)
        products = (queries.to(exact) * self.scale) @ self.distances.to(exact).mT
        j = torch.arange(S, device=queries.device)  # places of the keys
        i = j[S - T :, None]  # the queries are the last T of them
        row = (j - i).clamp(-self.FAR, self.FAR) + self.FAR  # (T, S)
        scores = products.take_along_dim(row[None, None], 3)  # (B, H, T, S)
        return hide(scores, mask, causal=False)


class MultiQueryAttention(GroupedQueryAttention):
    """All query heads share one head of keys and values (多查询; Shazeer 2019)."""

    def __init__(self, d_model, n_heads, position="none", scaled=True):
        super().__init__(d_model, n_heads, 1, position, scaled)


class KVCache:
    """Keys and values of the tokens so far, for decoding token by token (键值缓存).

    It holds 2 · B · G · capacity · d numbers, allocated once: of G heads, not H, and that is what
    sharing buys. For inference: autograd refuses to go back past a later append.
    """

    def __init__(self, batch, n_kv_heads, capacity, d_head, dtype=torch.float32, device="cpu"):
        if min(batch, n_kv_heads, capacity, d_head) < 1:
            sizes = f"{batch=}, {n_kv_heads=}, {capacity=}, {d_head=}"
            raise ValueError(f"all sizes of a cache must be at least 1, not {sizes}")
        self.k = torch.zeros(batch, n_kv_heads, capacity, d_head, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.length = 0  # tokens held

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of t tokens, (B, G, t, d) each: views of all so far."""
        self.check(k, v)
        end = self.length + k.shape[2]
        self.k[:, :, self.length : end] = k
        self.v[:, :, self.length : end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]  # (B, G, length, d)

    def check(self, k: Tensor, v: Tensor) -> None:
        B, G, capacity, d = self.k.shape
        is_right = k.ndim == 4 and k.shape == v.shape == (B, G, k.shape[2], d)
        if not is_right or k.dtype != self.k.dtype or v.dtype != self.k.dtype:
            found = f"{tuple(k.shape)} {k.dtype}, {tuple(v.shape)} {v.dtype}"
            wanted = f"keys and values ({B}, {G}, t, {d}) {self.k.dtype} expected"
            raise ValueError(f"{wanted}, not {found}")
        if self.length + k.shape[2] > capacity:
            held = f"a cache with {self.length} of {capacity} tokens"
            raise ValueError(f"{held} has no room for {k.shape[2]} more")

    def reset(self) -> None:
        self.k = self.k.detach()
        self.v = self.v.detach()
        self.length = 0


@contextmanager
def unchanged_if_it_fails(*caches: KVCache | None):
    """Whatever fails in the block leaves every cache as long as it was: what counts is `length`."""
    found = [cache for cache in caches if cache is not None]
    lengths = [cache.length for cache in found]
    try:
        yield
    except BaseException:
        for cache, length in zip(found, lengths, strict=True):
            cache.length = length
        raise


def check_sizes(d_model: int, n_heads: int, n_kv_heads: int) -> None:
    if min(d_model, n_heads, n_kv_heads) < 1:
        found = f"{d_model=}, {n_heads=}, {n_kv_heads=}"
        raise ValueError(f"all sizes must be at least 1, not {found}")
    if d_model % n_heads:
        raise ValueError(f"{d_model=} is not a multiple of {n_heads=}")
    if n_heads % n_kv_heads:
        raise ValueError(f"{n_heads=} is not a multiple of {n_kv_heads=}")


def check_position(position: str, d_head: int) -> None:
    if position not in ("none", "relative", "rotary"):
        raise ValueError(f"position must be none, relative or rotary, not {position!r}")
    if position == "rotary" and d_head % 2:
        raise ValueError(f"a rotary head's width must be even, not {d_head=}")


def check_inputs(x: Tensor, context: Tensor, D: int) -> None:
    is_right = x.ndim == context.ndim == 3 and x.shape[2] == context.shape[2] == D
    if not is_right or len(x) != len(context):
        found = f"{tuple(x.shape)}, {tuple(context.shape)}"
        raise ValueError(f"x (B, T, {D}) and context (B, S, {D}) expected, not {found}")


# Where a token stands: angles of its place, as in both papers below


def angles(start: int, T: int, d: int, dtype: torch.dtype, device) -> Tensor:
    """place · 10000^(-2i / d) for T places from `start` on: (T, ⌈d / 2⌉), float64 for float64."""
    exact = torch.promote_types(dtype, torch.float32)  # bfloat16 cannot tell place 256 from 257
    place = torch.arange(start, start + T, dtype=exact, device=device)
    frequency = 10_000.0 ** (-torch.arange(0, d, 2, dtype=exact, device=device) / d)
    return torch.outer(place, frequency)


def sinusoids(start: int, T: int, d: int, dtype: torch.dtype, device) -> Tensor:
    """Sines and cosines in turn, of ever longer periods (Vaswani 2017, section 3.5): (T, d)."""
    a = angles(start, T, d, dtype, device)  # (T, ⌈d / 2⌉)
    return torch.stack([a.sin(), a.cos()], 2).flatten(1)[:, :d].to(dtype)


def rotated(x: Tensor, start: int) -> Tensor:
    """x (B, H, T, d) with each pair of numbers turned by its place's angle (RoPE; Su 2021, eq. 34).

    q · k then depends on the distance between their places alone.
    """
    T, d = x.shape[2:]
    a = angles(start, T, d, x.dtype, x.device)  # (T, d / 2)
    even, odd = x.to(a.dtype).unflatten(3, (-1, 2)).unbind(4)  # (B, H, T, d / 2) each
    turned_even = even * a.cos() - odd * a.sin()
    turned_odd = even * a.sin() + odd * a.cos()
    return torch.stack([turned_even, turned_odd], 4).flatten(3).to(x.dtype)  # (B, H, T, d)


# The classifier


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): a transformer's block, pre-norm."""

    def __init__(self, config: Config):
        super().__init__()
        D = config.d_model
        d_ff = config.d_ff or 2 * D
        position = config.position if config.position in ("relative", "rotary") else "none"
        heads = (config.n_heads, config.n_kv_heads)
        self.attends = config.attends
        if self.attends != "nothing":
            self.norm_1 = nn.LayerNorm(D)
            self.attention = GroupedQueryAttention(D, *heads, position, config.scaled)
        if self.attends == "uniform":  # queries that stay 0: all scores are 0, all weights alike
            for parameter in self.attention.W_q.parameters():
                nn.init.zeros_(parameter).requires_grad_(False)
        self.norm_2 = nn.LayerNorm(D)
        self.mlp = nn.Sequential(nn.Linear(D, d_ff), nn.GELU(), nn.Linear(d_ff, D))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask=None, causal=False, cache=None):
        """x (B, T, D) -> the same, and the attention weights (B, H, T, S), if there are any."""
        weights = None
        if self.attends == "itself":
            start = 0 if cache is None else cache.length
            place = torch.arange(start + x.shape[1], device=x.device)
            mask = place[start:, None] == place  # (T, S)
        if self.attends != "nothing":
            out, weights = self.attention(self.norm_1(x), mask=mask, causal=causal, cache=cache)
            x = x + self.drop(out)  # (B, T, D)
        x = x + self.drop(self.mlp(self.norm_2(x)))  # (B, T, D)
        return x, weights

    def drop(self, x: Tensor) -> Tensor:
        """Dropout of the same features for all T tokens of an image (Gal 2016).

        One draw of (B, 1, D) instead of (B, T, D): a CPU draws random numbers one by one.
        """
        return x * self.dropout(torch.ones_like(x[:, :1]))


class AttentionClassifier(nn.Module):
    """The Config's network: tokens -> blocks -> the tokens' states -> logits.

    forward: tokens (B, T, F) of `tokens_of` and its mask -> logits (B, C).
    """

    def __init__(self, config: Config):
        super().__init__()
        D = config.d_model
        T, n_in, n_classes = sizes_of(config)
        self.config = config
        self.n_read = T if config.masked else T + config.padding  # tokens that are classified
        self.W_in = nn.Linear(n_in, D)
        if config.position == "learned":
            self.places = nn.Parameter(0.02 * torch.randn(T + config.padding, D))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_blocks))
        self.norm = nn.LayerNorm(D)
        self.out = nn.Linear(D * self.n_read if config.readout == "all" else D, n_classes)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        states, _ = self.states(tokens, mask)  # (B, T, D)
        return self.read(states, mask)  # (B, C)

    def states(self, tokens: Tensor, mask=None, caches: list[KVCache] | None = None):
        """States (B, T, D) of the tokens (B, T, F), and each block's attention weights, a list.

        With a cache for every block, the tokens follow those that the caches hold.
        """
        T = tokens.shape[1]
        if caches is not None and len(caches) != len(self.blocks):
            found = f"{len(self.blocks)} blocks need as many caches, not {len(caches)}"
            raise ValueError(found)
        start = caches[0].length if caches else 0
        x = self.W_in(tokens)  # (B, T, D)
        if self.config.position == "learned":
            if start + T > len(self.places):
                known = f"{len(self.places)} were learned"
                raise ValueError(f"token {start + T} has no position: {known}")
            x = x + self.places[start : start + T]
        elif self.config.position == "sinusoidal":
            x = x + sinusoids(start, T, x.shape[2], x.dtype, x.device)
        weights = []
        with unchanged_if_it_fails(*(caches or [])):
            for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
                x, of_block = block(x, mask, self.config.causal, cache)
                weights.append(of_block)
        return self.norm(x), weights

    def read(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, C) of the states (B, T, D), of those tokens alone that the mask shows."""
        if mask is not None:
            states = states[:, mask[0, 0, 0]]
        if self.config.readout == "mean":
            return self.out(states.mean(1))
        if self.config.readout == "last":
            return self.out(states[:, -1])
        T = states.shape[1]
        if self.n_read != T:
            raise ValueError(
                f"the states of {self.n_read} tokens are read side by side, not of {T}"
            )
        return self.out(states.flatten(1))

    def caches(self, batch: int, capacity: int) -> list[KVCache]:
        """An empty cache for every block."""
        sizes = (
            batch,
            self.config.n_kv_heads,
            capacity,
            self.config.d_model // self.config.n_heads,
        )
        weight = self.W_in.weight
        return [KVCache(*sizes, weight.dtype, weight.device) for _ in self.blocks]


def sizes_of(config: Config) -> tuple[int, int, int]:
    """Tokens of an image (at most, in recall), features of a token, and classes."""
    if config.task == "recall":
        return N_GARMENTS + 1, 784 + N_GARMENTS, N_GARMENTS
    return (28, 28, len(CLASSES)) if config.tokens == "rows" else (49, 16, len(CLASSES))


# -------- Training --------------------------------------------------------------------------------


def build(config: Config, device: torch.device | str = "cpu") -> AttentionClassifier:
    """The Config's network on the device.

    Seeds torch: the weights here, then batch order, dropout and sequences of what trains it.
    """
    torch.manual_seed(config.seed)
    return AttentionClassifier(config).to(device)
