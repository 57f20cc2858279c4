"""Stage 3: multi-head attention (多头注意力), heads that share keys and values, and the cache
that this makes smaller.

    python stage3_attention.py demo                   a random matrix through MHA, GQA and MQA
    python stage3_attention.py                        the demo's pictures; MHA and MQA trained
    python stage3_attention.py --only recall heads    some experiments; --only all: every one
    python stage3_attention.py train --n-kv-heads 2   one network of your own
    python stage3_attention.py predict shirt.png      what the trained network makes of your images
    python stage3_attention.py benchmark              speed, beside what a user would take instead
    python stage3_attention.py plot                   draw figures/stage3/ again from its saved rows

Results go to figures/stage3/. Runs that are found finished there, as the committed ones are, are
not trained again: `--out out` trains them into out/.

Read `attention` and `MultiHeadAttention` first: they are the whole idea. Then read
`GroupedQueryAttention` (分组查询), of which `MultiQueryAttention` (多查询) is the other end, and
`KVCache` (键值缓存). `EXPERIMENTS` is the table of everything that was tried.

Config, Data, Model, Training, Experiments, benchmark and demo are the assignment; Pictures,
Commands and predict are what surrounds it.

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
import warnings
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
    # what a token attends to. learned: all tokens, by queries and keys. The others are controls:
    # uniform: all tokens alike; itself: itself alone; nothing: there is no attention
    attends: Literal["learned", "uniform", "itself", "nothing"] = "learned"
    # divide scores by √d; --no-scaled: do not
    scaled: bool = True
    # a token attends to itself and to those before it, not to those after it
    causal: bool = False
    # how an image is cut into tokens: 28 rows of 28 pixels, or 49 patches of 4 × 4
    tokens: Literal["rows", "patches"] = "rows"
    # what is classified: the states of all tokens side by side, their mean, or the last one
    readout: Literal["all", "mean", "last"] = "all"
    # tokens of zeros after an image's own
    padding: int = 0
    # hide the padding from attention and readout; --no-masked: show it
    masked: bool = True
    # recall: the smallest number of labelled garments of a training sequence; the number is drawn
    # anew for each batch, from this one to 8
    fewest: int = 2
    # share of the features of what a block adds that are zeroed while training
    dropout: float = 0.2
    # share of the target that is spread evenly over all classes
    label_smoothing: float = 0.1
    # highest learning rate of the schedule
    lr: float = 3e-3
    # how strongly AdamW pulls weights towards 0; biases and norms are left alone
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
            "n_train": (1 if self.task == "clothes" else 200, N_TRAIN),  # some of every class
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
    """One of the four files as uint8 (N, …): the unpacked file if there is one, else the .gz.

    Nothing is written. The checksum proves number, shape, values and the right data set at once.
    """
    path = folder / name
    packed = folder / f"{name}.gz"
    if not path.exists() and not packed.exists():
        advice = f"name by --data-dir what holds {DATASET}/raw, or add --download"
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
# A label is one number, and the 784 pixels beside it, of standard deviation 1, are a vector of
# length 28. The number is 10 and not 1, so that the label is not lost among the pixels
LABEL_SIZE = 10.0


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


def sample_sequences(wardrobe: Wardrobe, B: int, n: int, generator=None) -> tuple[Tensor, Tensor]:
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
    # The last garment must be another image than the asked one. It stands 1 … size - 1 places
    # behind it in their class, where the end is followed by the beginning
    apart = 1 + (random(B, 1) * (sizes[:, -1:] - 1)).long()  # (B, 1)
    place[:, -1:] = (place.gather(1, asked) + apart) % sizes[:, -1:]
    images = wardrobe.images[wardrobe.order[wardrobe.starts[classes] + place]]  # (B, n + 1, 784)

    label_part = LABEL_SIZE * F.one_hot(labels, N_GARMENTS)  # (B, n, 8)
    label_part = F.pad(label_part, (0, 0, 0, 1))  # the last one has none
    tokens = torch.cat([images, label_part], 2)  # (B, n + 1, 792)
    return tokens, labels.gather(1, asked).squeeze(1)


def sequences_of(split: Split, n_sequences: int) -> Split:
    """Sequences of eight garments to judge by, the same ones for the same split on every device."""
    on_cpu = Split(split.images.cpu(), split.labels.cpu())
    generator = torch.Generator().manual_seed(2017)
    tokens, y = sample_sequences(wardrobe_of(on_cpu), n_sequences, N_GARMENTS, generator)
    return Split(tokens.to(split.images.device), y.to(split.labels.device))


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
    score_dtype = torch.promote_types(q.dtype, torch.float32)

    # [Q0 … Q3 | Q4 … Q7] meets [K0 | K1]: the queries of a group, one below the other, are
    # multiplied by the one head of keys they share, which is not copied for each of them; but keys
    # in half precision are widened to float32 for the product, and that is a copy of these G heads
    n_queries = H // G * T  # of a group
    scaled_q = q.to(score_dtype) * scale  # rather than the scores: d numbers a query, not S
    queries = scaled_q.reshape(B, G, n_queries, d)  # (B, G, H/G · T, d)
    with torch.autocast(q.device.type, enabled=False):  # it would round both products' factors
        scores = queries @ k.to(score_dtype).mT  # (B, G, H/G · T, S)
        scores = scores.reshape(B, H, T, S)
        if mask is None and not causal:  # no row can be empty, and the plain softmax is faster
            weights = scores.softmax(-1)
        else:
            scores = masked_scores(scores, mask, causal)  # -∞ where a query may not look
            weights = softmax_or_zeros(scores)
        weights = weights.to(q.dtype)  # (B, H, T, S)
        out = weights.reshape(B, G, n_queries, S) @ v  # (B, G, H/G · T, d_v)
    return out.reshape(B, H, T, d_v), weights


def masked_scores(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Scores (B, H, T, S) with -∞ where a query may not look, or with a float mask added."""
    T, S = scores.shape[2:]
    if mask is not None:
        check_mask(mask, scores)
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -math.inf)
        else:
            scores = scores + mask.to(scores.dtype)
    if causal and T > 1:  # one query is the last, and that sees every key
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
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        found = f"{q.dtype}, {k.dtype}, {v.dtype}"
        raise ValueError(f"q, k and v of one floating-point dtype expected, not {found}")
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
    (B, H, T, S). mask and causal as in `attention`; with a cache, the keys and values join it (a
    context given twice joins it twice), and x attends to all that it then holds. ValueError on
    sizes that do not fit.
    """

    def __init__(self, d_model: int, n_heads: int):
        super().__init__()
        check_sizes(d_model, n_heads, n_heads)
        self.n_heads = n_heads
        self.n_kv_heads = n_heads
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
        with unchanged_if_it_fails(cache):  # a mask that does not fit must leave no keys in it
            if cache is not None:
                keys, values = cache.append(keys, values)  # (B, H, all S so far, d)
            out, weights = attention(queries, keys, values, mask, causal)  # (B, H, T, d)
            return self.W_o(join_heads(out)), weights


class GroupedQueryAttention(nn.Module):
    """n_heads query heads share n_kv_heads heads of keys and values (分组查询; Ainslie 2023).

    As MultiHeadAttention, which it equals at n_kv_heads = n_heads, but W_k and W_v are smaller.
    position "rotary" turns queries and keys by their place; "relative" gives every distance a
    learned vector, see `relative_bias`; both compare places in one sequence, so there can be no
    context. scaled=False leaves the 1 / √d out. ValueError on sizes that do not fit.
    """

    FAR = 16  # tokens farther away use the vector of this distance (the paper's k)

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
            # (2 · FAR + 1, d)
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
            if self.position == "relative":  # a float mask, which `attention` adds to the scores
                bias = self.relative_bias(queries, keys.shape[2])  # (B, H, T, S)
                mask = masked_scores(bias, mask, causal=False)  # -∞ where a key is hidden
            out, weights = attention(queries, keys, values, mask, causal, self.scale)
            return self.W_o(join_heads(out)), weights

    def relative_bias(self, queries: Tensor, S: int) -> Tensor:
        """q_i · a_(j - i) / √d, to be added to the scores (Shaw 2018, eq. 5): (B, H, T, S).

        a_distance is a row of `distances`, the same for all heads. Shaw has such vectors for keys
        (eq. 4) and for values (eq. 3); only those for keys are used here.
        """
        T = queries.shape[2]
        score_dtype = torch.promote_types(queries.dtype, torch.float32)
        scaled_queries = queries.to(score_dtype) * self.scale  # (B, H, T, d)
        with torch.autocast(queries.device.type, enabled=False):
            products = scaled_queries @ self.distances.to(score_dtype).mT  # (B, H, T, 2·FAR + 1)
        j = torch.arange(S, device=queries.device)  # (S,) places of the keys
        i = j[S - T :, None]  # (T, 1): the queries are the last T of them
        row = (j - i).clamp(-self.FAR, self.FAR) + self.FAR  # (T, S)
        return products.take_along_dim(row[None, None], 3)  # (B, H, T, S)


class MultiQueryAttention(GroupedQueryAttention):
    """All query heads share one head of keys and values (多查询; Shazeer 2019)."""

    def __init__(self, d_model, n_heads, position="none", scaled=True):
        super().__init__(d_model, n_heads, 1, position, scaled)


class KVCache:
    """Keys and values of the tokens so far, for decoding token by token (键值缓存).

    It holds 2 · B · G · capacity · d numbers, allocated once: of G heads, not H, and that is what
    sharing buys. For inference: `append` writes in place, so a backward pass through an earlier
    call raises, and gives views, which change when they are overwritten after a `reset`.
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
        self.k = self.k.detach()  # what was written may hang on a graph
        self.v = self.v.detach()
        self.length = 0


def projected_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of keys and values that this weight gives: under autocast not the weight's own."""
    device_type = weight.device.type
    if torch.is_autocast_enabled(device_type) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return weight.dtype


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
    # bfloat16 cannot tell place 256 from 257
    angle_dtype = torch.promote_types(dtype, torch.float32)
    place = torch.arange(start, start + T, dtype=angle_dtype, device=device)
    frequency = 10_000.0 ** (-torch.arange(0, d, 2, dtype=angle_dtype, device=device) / d)
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
        # one class for all: n_kv_heads = n_heads is multi-head, 1 multi-query
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
        if self.attends == "itself":  # a mask that shows itself alone takes the given one's place
            start = 0 if cache is None else cache.length
            place = torch.arange(start + x.shape[1], device=x.device)
            mask = place[start:, None] == place  # (T, S)
        if self.attends != "nothing":
            out, weights = self.attention(self.norm_1(x), mask=mask, causal=causal, cache=cache)
            x = x + self.drop(out)  # (B, T, D)
        x = x + self.drop(self.mlp(self.norm_2(x)))  # (B, T, D)
        return x, weights

    def drop(self, x: Tensor) -> Tensor:
        """Dropout of the same features for all T tokens of an image (variational dropout, Gal
        2016). It also takes T times fewer random numbers."""
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
            self.places = nn.Parameter(0.02 * torch.randn(T + config.padding, D))  # one a token
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_blocks))
        self.norm = nn.LayerNorm(D)
        self.out = nn.Linear(D * self.n_read if config.readout == "all" else D, n_classes)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        states, _ = self.states(tokens, mask)  # (B, T, D)
        return self.read(states, mask)  # (B, C)

    def states(self, tokens: Tensor, mask=None, caches: list[KVCache] | None = None):
        """States (B, T, D) of the tokens (B, T, F), and each block's attention weights, a list.

        With a cache for every block, all of one length, the tokens follow those that they hold.
        """
        n_in = self.W_in.in_features
        if tokens.ndim != 3 or tokens.shape[2] != n_in:
            raise ValueError(f"tokens (B, T, {n_in}) expected, not {tuple(tokens.shape)}")
        if tokens.shape[1] == 0:
            raise ValueError(f"at least one token expected, not {tuple(tokens.shape)}")
        if caches is not None:
            self.check_caches(caches)
        T = tokens.shape[1]
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

    def check_caches(self, caches: list[KVCache]) -> None:
        if self.config.attends == "nothing":
            reason = "a network without attention keeps no cache"
            raise ValueError(f"{reason}, so its tokens cannot be read in parts (caches given)")
        if len(caches) != len(self.blocks):
            raise ValueError(f"{len(self.blocks)} blocks need as many caches, not {len(caches)}")
        lengths = [cache.length for cache in caches]
        if len(set(lengths)) != 1:
            raise ValueError(f"all caches must hold as many tokens, not {lengths}")

    def read(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, C) of the states (B, T, D), of those tokens alone that the mask shows.

        mask: bool (1, 1, 1, T), the same for the whole batch.
        """
        if mask is not None:
            T = states.shape[1]
            if mask.shape != (1, 1, 1, T) or mask.dtype != torch.bool:
                wanted = f"one bool mask (1, 1, 1, {T}) for the whole batch expected"
                raise ValueError(f"{wanted}, not {mask.dtype} {tuple(mask.shape)}")
            states = states[:, mask[0, 0, 0]]  # (B, tokens shown, D)
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
        """An empty cache for every block; without attention there is nothing to keep."""
        if self.config.attends == "nothing":
            return []
        d_head = self.config.d_model // self.config.n_heads
        sizes = (batch, self.config.n_kv_heads, capacity, d_head)
        weight = self.W_in.weight
        return [KVCache(*sizes, projected_dtype(weight), weight.device) for _ in self.blocks]


def sizes_of(config: Config) -> tuple[int, int, int]:
    """Tokens of an image (at most, in recall), features of a token, and classes."""
    if config.task == "recall":
        return N_GARMENTS + 1, 784 + N_GARMENTS, N_GARMENTS
    return (28, 28, len(CLASSES)) if config.tokens == "rows" else (49, 16, len(CLASSES))


# -------- Training --------------------------------------------------------------------------------

SCORES = ("loss", "accuracy", "macro_precision", "macro_recall", "macro_f1")
N_TEST = 10_000  # test images, or sequences of them
N_EVALUATED = {"clothes": N_VAL, "recall": 2_000}  # images, or sequences, to judge training by


def logits_of(model: AttentionClassifier, images: Tensor) -> Tensor:
    """Images (B, 28, 28), or sequences of recall -> tokens -> logits (B, C)."""
    tokens, mask = tokens_of(images, model.config)
    return model(tokens, mask)


def evaluate(model: AttentionClassifier, split: Split) -> dict:
    """Loss (nats), accuracy, macro precision, recall and F1 (0 … 1), the confusion matrix, and
    the predicted classes (N,).

    Without gradients and with dropout off; every module gets its own training flag back.
    """
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():  # in parts: the scores of all images at once are many numbers
            logits = torch.cat([logits_of(model, part) for part in split.images.split(250)])
    finally:
        for module, flag in was_training.items():
            module.training = flag
    predicted = logits.argmax(1)  # (N,)
    matrix = metrics.confusion_matrix(predicted, split.labels, logits.shape[1])
    loss = F.cross_entropy(logits, split.labels).item()  # by hand in stage 1
    return {**metrics.scores(matrix), "loss": loss, "confusion": matrix, "predicted": predicted}


def build(config: Config, device: torch.device | str = "cpu") -> AttentionClassifier:
    """The Config's network on the device.

    Seeds torch: the weights here, then batch order, dropout and sequences of what trains it.
    """
    torch.manual_seed(config.seed)
    return AttentionClassifier(config).to(device)


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW; weights and learned positions decay, biases and the norms' factors do not."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": weights, "weight_decay": config.weight_decay},
        {"params": biases, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, config.lr, fused=True)


def learning_rate(config: Config, step: int) -> float:
    """The rate of update `step`, 1 … n_steps: a line up (warm-up), then half a cosine down."""
    share = (step - 0.5) / config.n_steps  # of the run, to the middle of the update: never 0
    if share < config.warmup:
        return config.lr * share / config.warmup
    falling = (share - config.warmup) / (1 - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * falling))


def image_batches(split: Split, config: Config) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """All images in a new random order, again and again: tokens (B, T, F), mask, labels (B,)."""
    n = len(split.labels)
    while True:
        for batch in torch.randperm(n, device=split.labels.device).split(config.batch_size):
            tokens, mask = tokens_of(split.images[batch], config)
            yield tokens, mask, split.labels[batch]


def recall_batches(split: Split, config: Config) -> Iterator[tuple[Tensor, None, Tensor]]:
    """Sequences that are always new: tokens (B, n + 1, F), no mask, answers (B,)."""
    wardrobe = wardrobe_of(split)
    rng = np.random.default_rng(config.seed)  # on the CPU: no number has to wait for the device
    while True:
        n = int(rng.integers(config.fewest, N_GARMENTS + 1))
        tokens, answers = sample_sequences(wardrobe, config.batch_size, n)
        yield tokens, None, answers


def evaluation_set(split: Split, config: Config, n_most: int) -> Split:
    """The first n_most images of a split; of recall as many sequences made of all its images."""
    n = min(n_most, len(split.labels))
    if config.task == "recall":
        return sequences_of(split, n)
    return Split(split.images[:n], split.labels[:n])


def train(
    config: Config,
    data: Data,
    on_row: Callable[[dict], None] | None = None,
    model: AttentionClassifier | None = None,
) -> tuple[AttentionClassifier, list[dict]]:
    """Train the Config's network: the model, and a history row at n_logs evenly spaced steps.

    `objective` is the mean of the minimised loss since the row before. The other numbers are plain
    cross-entropy and accuracy in evaluation mode, on the first 5,000 of the training images in use
    and on the validation images (of recall, on 2,000 sequences of each), so that the two compare.
    `epoch` is the number of updates over those of one pass over the images; recall draws new
    sequences instead of passes, and for it this is no more than a count of updates.
    `on_row` is given each row as it comes. A `model` that is given is trained further; without
    one a new one is built. Between rows nothing waits for the device. A loss that is not finite
    ends the run at the next row, which then holds it.
    """
    config.check()
    used = Split(data.train.images[: config.n_train], data.train.labels[: config.n_train])
    device = used.images.device
    train_sample = evaluation_set(used, config, N_EVALUATED[config.task])
    val = evaluation_set(data.val, config, N_EVALUATED[config.task])

    if model is None:
        model = build(config, device)
    else:
        torch.manual_seed(config.seed)  # of batch order, dropout and sequences, as `build` does
    model.train()
    optimizer = make_optimizer(model, config)
    n_steps = config.n_steps
    steps_per_epoch = math.ceil(len(used.labels) / config.batch_size)
    log_steps = {math.ceil(n_steps * (i + 1) / config.n_logs) for i in range(config.n_logs)}
    history = []
    loss_sum = torch.zeros((), device=device)
    last_log = 0
    start = time.perf_counter()

    batches = image_batches if config.task == "clothes" else recall_batches
    endless = batches(used, config)
    # tokens (B, T, F), mask (1, 1, 1, T) or None, y (B,)
    for step, (tokens, mask, y) in enumerate(itertools.islice(endless, n_steps), 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)

        logits = model(tokens, mask)  # (B, C)
        loss = F.cross_entropy(logits, y, label_smoothing=config.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        if config.clip > 0:
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)  # before clipping
        elif step in log_steps:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            grad_norm = nn.utils.get_total_norm(gradients)
        optimizer.step()
        loss_sum += loss.detach()

        if step in log_steps:
            row = {"step": step, "epoch": step / steps_per_epoch}
            row["objective"] = loss_sum.item() / (step - last_log)
            training = evaluate(model, train_sample)
            validation = evaluate(model, val)
            row |= {"train_loss": training["loss"], "train_accuracy": training["accuracy"]}
            row |= {f"val_{name}": validation[name] for name in SCORES}
            row["grad_norm"] = grad_norm.item()
            row["seconds"] = time.perf_counter() - start
            history.append(row)
            if on_row is not None:
                on_row(row)
            if status(history) == "diverged":
                break
            last_log = step
            loss_sum.zero_()
    return model, history


def status(history: list[dict]) -> str:
    """Whether a run's last losses are finite: "ok" or "diverged"."""
    is_finite = math.isfinite(history[-1]["objective"]) and math.isfinite(history[-1]["val_loss"])
    return "ok" if is_finite else "diverged"


# -------- Experiments -----------------------------------------------------------------------------

BASE = Config()  # 14 epochs, 3,010 steps
SHORT = replace(BASE, d_model=64, batch_size=128, steps=300, n_logs=4)  # side questions
MEAN_OF_ROWS = replace(SHORT, readout="mean")  # the same in whatever order the rows stand
PADDED = replace(MEAN_OF_ROWS, position="none", padding=28)  # as many zeros as rows
STEEP = replace(SHORT, lr=0.02, clip=0.0, n_blocks=4)
ONE_HEAD = replace(SHORT, n_heads=1, n_kv_heads=1, dropout=0.0, steps=150)
RECALL = replace(
    BASE,
    task="recall",
    position="none",  # the garments are a set
    readout="last",
    d_ff=384,  # four times the width
    dropout=0.0,
    label_smoothing=0.0,
    lr=2e-3,
    weight_decay=0.1,
    warmup=0.1,
    batch_size=128,
    steps=10_000,
)
RECALL_SHORT = replace(RECALL, steps=400, warmup=0.3)
# What fewer key/value heads save goes into the feed-forward part: parameters within 1 %. A head
# less saves 2 · 96 · 12 weights of a block, in W_k and W_v; a neuron more costs 2 · 96, one row
# of weights in and one column out. So 12 neurons more for each of the 8 - G heads left out
WIDER = {G: replace(RECALL, n_kv_heads=G, d_ff=384 + 12 * (8 - G)) for G in (4, 2, 1)}
WITHOUT = "no attention"

# experiment -> what is varied -> the whole Config of its runs; every run is repeated for each seed
EXPERIMENTS: dict[str, dict[str, Config]] = {
    # selected models: whole trainings, scored on the test images at their end
    "mha": {"8 K/V heads": BASE},
    "gqa4": {"4 K/V heads": replace(BASE, n_kv_heads=4)},
    "gqa2": {"2 K/V heads": replace(BASE, n_kv_heads=2)},
    "mqa": {"1 K/V head": replace(BASE, n_kv_heads=1)},
    # the control: does attention do the work? `mha` with less of it, whole trainings
    "control": {
        "all alike": replace(BASE, attends="uniform"),
        "itself alone": replace(BASE, attends="itself"),
        "nothing": replace(BASE, attends="nothing"),
        # the same with another readout, which does not tell one token from another by itself
        "learned weights, mean read": replace(BASE, readout="mean"),
        "nothing, mean read": replace(BASE, readout="mean", attends="nothing"),
    },
    # a task that needs attention: which label does the asked garment have in this sequence?
    "recall": {
        "8 K/V heads": RECALL,
        "4 K/V heads": replace(RECALL, n_kv_heads=4),
        "2 K/V heads": replace(RECALL, n_kv_heads=2),
        "1 K/V head": replace(RECALL, n_kv_heads=1),
        WITHOUT: replace(RECALL, attends="nothing"),
    },
    "recall_equal_parameters": {
        "4 K/V heads": WIDER[4],
        "2 K/V heads": WIDER[2],
        "1 K/V head": WIDER[1],
    },
    # whole trainings
    "heads": {str(n): replace(BASE, n_heads=n, n_kv_heads=n) for n in (1, 2, 4, 8, 16)},
    "steps": {f"{n:,}": replace(BASE, steps=n) for n in (100, 300, 1000, 3000)},
    # side questions: 300 steps, width 64
    "width": {str(n): replace(SHORT, d_model=n) for n in (16, 32, 64, 128)},
    "blocks": {str(n): replace(SHORT, n_blocks=n) for n in (1, 2, 3, 4)},
    "position": {
        name: replace(MEAN_OF_ROWS, position=name)
        for name in ("none", "learned", "sinusoidal", "relative", "rotary")
    },
    "tokens": {
        "rows, all read": replace(SHORT, tokens="rows", readout="all"),
        "rows, mean read": replace(SHORT, tokens="rows", readout="mean"),
        "patches, all read": replace(SHORT, tokens="patches", readout="all"),
        "patches, mean read": replace(SHORT, tokens="patches", readout="mean"),
    },
    # what becomes of the softmax as heads grow wider? one head, 150 steps
    "scale": {
        f"{name}, width {n}": replace(ONE_HEAD, scaled=scaled, d_model=n)
        for n in (16, 64, 256)
        for name, scaled in (("divided by √d", True), ("not divided", False))
    },
    # what goes wrong, and what mends it; 300 steps, of recall 400: see FAULTS
    "faults": {
        "no positions": replace(MEAN_OF_ROWS, position="none"),
        "learned positions": replace(MEAN_OF_ROWS, position="learned"),
        "no causal mask": replace(MEAN_OF_ROWS, causal=False),
        "causal mask": replace(MEAN_OF_ROWS, causal=True),
        "padding takes part": replace(PADDED, masked=False),
        "padding masked": replace(PADDED, masked=True),
        "rate 0.02 at once": replace(STEEP, warmup=0.0),
        "rate 0.02, warm-up": replace(STEEP, warmup=0.3),
        "eight garments at once": replace(RECALL_SHORT, fewest=8),
        "two to eight garments": replace(RECALL_SHORT, fewest=2),
    },
}
# What a bare `run` trains, beside the demo of all three layers: the two ends of sharing, one a core
# where there are two. `--only gqa4 gqa2` trains what lies between them
THE_BRIEF = ("mha", "mqa")
# judged on the test images too, class by class; the weights of seed 0 are kept
SELECTED = ("mha", "gqa4", "gqa2", "mqa")
# judged on sequences of test images too
RECALLS = ("recall", "recall_equal_parameters")


class Run(NamedTuple):
    """One training: its experiment, what is varied in it, and the Config with its seed."""

    experiment: str  # a key of EXPERIMENTS, or the name of a network of one's own
    value: str  # a key of EXPERIMENTS[experiment], or that name again
    config: Config

    @property
    def key(self) -> dict:
        """The columns that say which run a row belongs to."""
        return {"experiment": self.experiment, "value": self.value, "seed": self.config.seed}


def runs_of(experiments: list[str], n_seeds: int, smoke: bool = False) -> list[Run]:
    """Every value with every seed; in a smoke run the two ends of each experiment, made small."""
    runs = []
    for experiment in experiments:
        values = EXPERIMENTS[experiment]
        if smoke:
            names = list(values)
            n = 2 if experiment == "faults" else 1  # a fault is a pair: what broke, what mends it
            values = {name: values[name] for name in (*names[:n], *names[-n:])}
        for value, config in values.items():
            config = smoke_config(config) if smoke else config
            runs += [Run(experiment, value, replace(config, seed=seed)) for seed in range(n_seeds)]
    return runs


def smoke_config(config: Config) -> Config:
    """The Config of a smoke run: a narrower network, few images, 2 steps."""
    n_train = 64 if config.task == "clothes" else 200  # recall needs some of every class
    small = {"d_model": 16, "d_ff": 0, "n_train": n_train, "batch_size": 32}
    return replace(config, **small, steps=2, n_logs=2)


def execute(
    run: Run, arrays: tuple, device: str, origin: dict, read_test=False, on_row=None
) -> tuple[dict, dict]:
    """Train and measure one run on one thread: (the rows of every table, the weights).

    `arrays` are the three splits as numpy arrays, which joblib maps into a worker's memory.
    `origin` is what the row says of machine, commit and versions. `on_row` is given each history
    row; without it a line a minute is printed, unless somebody sits at a terminal.
    """
    torch.set_num_threads(1)
    data = Data(*(Split(*(torch.from_numpy(a).to(device) for a in split)) for split in arrays))
    config = run.config
    model, history = train(config, data, on_row or line_a_minute(run))
    model.eval()

    row = run.key | config_columns(config) | {"status": status(history)}
    for name in ("train_loss", "train_accuracy", *(f"val_{score}" for score in SCORES), "seconds"):
        row[name] = history[-1][name]
    row["parameters"] = sum(p.numel() for p in model.parameters())
    n_tokens, _, _ = sizes_of(config)
    row["cache_bytes"] = sum(cache.nbytes for cache in model.caches(1, n_tokens))
    row |= origin | {"threads": torch.get_num_threads()}
    of_test = {}
    if read_test:
        test_images = evaluation_set(data.test, config, N_TEST)
        test = evaluate(model, test_images)
        row |= {f"test_{name}": test[name] for name in test if name in SCORES}
        if config.task == "clothes":
            of_test = test_tables(run, test, test_images.labels)
    tables = {"runs": [row], "history": [run.key | logged for logged in history]}
    tables |= of_test | side_tables(run, model, data)
    return tables, {name: value.cpu() for name, value in model.state_dict().items()}


def test_tables(run: Run, test: dict, labels: Tensor) -> dict[str, list[dict]]:
    """What `evaluate` found on the test images: scores, confusion matrix, and each image."""
    cells = [
        {"true": true, "predicted": predicted, "count": count}
        for true, counts in enumerate(test["confusion"].tolist())
        for predicted, count in enumerate(counts)
    ]
    is_right = (test["predicted"] == labels).tolist()
    digits = "".join("1" if right else "0" for right in is_right)
    return {
        "test_metrics": [run.key | {name: test[name] for name in test if name in SCORES}],
        "confusion": [run.key | cell for cell in cells],
        "predictions": [run.key | {"right": digits}],  # to compare networks image by image
    }


def side_tables(run: Run, model: AttentionClassifier, data: Data) -> dict[str, list[dict]]:
    """The rows that an experiment has beside its scores: maps, upcycling, scale, faults."""
    config = run.config
    is_multi_head = config.n_kv_heads == config.n_heads and config.attends == "learned"
    tables = {}
    if run.experiment in ("mha", "mqa") and config.seed == 0:
        tables["maps"] = attention_maps(model, data.test)
    if run.experiment == "recall" and is_multi_head and config.seed == 0:
        tables["recall_maps"] = recall_maps(model, data.test)
    # Upcycling trains on from these weights, inside the runs of `mha` and `recall`, so they take
    # longer than their own steps
    if run.experiment in ("mha", "recall") and is_multi_head:
        tables["upcycling"] = upcycling(model, config, data)
    if run.experiment == "scale":
        tables["scale"] = softmax_states(model, config, data)
    if run.experiment == "faults":
        tables["faults"] = fault_rows(run.value, model, data)
    return {name: [run.key | row for row in rows] for name, rows in tables.items()}


def config_columns(config: Config) -> dict[str, str]:
    """The Config's fields but the seed, as a row holds them and as rows are compared."""
    columns = {field.name: str(getattr(config, field.name)) for field in fields(config)}
    del columns["seed"]
    return columns


def progress(row: dict) -> str:
    return f"loss {row['val_loss']:.4f}, validation accuracy {100 * row['val_accuracy']:.2f} %"


def line_a_minute(run: Run) -> Callable[[dict], None]:
    """An `on_row` for `train` that prints a line a minute: a bar shows no more than whole runs."""
    last_line = time.monotonic()

    def on_row(row: dict) -> None:
        nonlocal last_line
        if time.monotonic() - last_line >= 60:
            last_line = time.monotonic()
            where = f"{run.experiment} {run.value}, seed {run.config.seed}: step {row['step']:,}"
            line = f"  {where} of {run.config.n_steps:,}, {progress(row)}"
            metrics.print_beside_bar(line)

    return on_row


def text_of(weights: Tensor) -> str:
    """Attention weights (S,) as a table holds them: three digits, a space between."""
    return " ".join(f"{weight:.3f}" for weight in weights.tolist())


@torch.no_grad()
def attention_maps(model: AttentionClassifier, split: Split) -> list[dict]:
    """What each head of the last block attends to in three images: a row for each query."""
    tokens, mask = tokens_of(split.images[:3], model.config)
    weights = model.states(tokens, mask)[1][-1]  # (3, H, 28, 28)
    pixels = as_stored(split.images[:3]).round().byte().cpu().numpy()  # (3, 28, 28)
    n_images, H, T, _ = weights.shape
    rows = []
    for i, head, t in itertools.product(range(n_images), range(H), range(T)):
        row = {"image": i, "class": CLASSES[split.labels[i]], "head": head, "query": t}
        row["kv_head"] = head // (H // model.config.n_kv_heads)
        rows.append(
            row | {"weights": text_of(weights[i, head, t]), "pixels": pixels[i, t].tobytes().hex()}
        )
    return rows


@torch.no_grad()
def recall_maps(model: AttentionClassifier, split: Split) -> list[dict]:
    """Of three sequences, a row for each token: what it is, and what the last one gives it."""
    sequences = sequences_of(split, 3)
    states, weights = model.states(sequences.images)
    predicted = model.read(states).argmax(1).tolist()
    images = as_stored(sequences.images[:, :, :784]).round().byte().cpu().numpy()  # (3, 9, 784)
    labels = sequences.images[:, :, 784:].argmax(2).tolist()
    rows = []
    for i, place in itertools.product(range(3), range(N_GARMENTS + 1)):
        row = {"sequence": i, "place": place, "pixels": images[i, place].tobytes().hex()}
        row["label"] = labels[i][place] if place < N_GARMENTS else -1
        row |= {"answer": sequences.labels[i].item(), "predicted": predicted[i]}
        for number, of_block in enumerate(weights, 1):  # (3, H, 9, 9) each
            row[f"block_{number}"] = text_of(of_block[i, :, -1, place])  # of every head
        rows.append(row)
    return rows


# Upcycling (Ainslie 2023, section 2.1): fewer key/value heads from a trained multi-head model


def with_shared_heads(model: AttentionClassifier, n_kv_heads: int) -> AttentionClassifier:
    """The model with the key/value heads of each group averaged into one."""
    config = replace(model.config, n_kv_heads=n_kv_heads)
    fewer = build(config, model.W_in.weight.device)
    weights = model.state_dict()
    for name, value in weights.items():
        if ".W_k." in name or ".W_v." in name:
            group_size = model.config.n_kv_heads // n_kv_heads
            heads = value.unflatten(0, (n_kv_heads, group_size, -1))  # (G, H / G, d, …)
            weights[name] = heads.mean(1).flatten(0, 1)  # (G · d, …)
    fewer.load_state_dict(weights)
    return fewer


def upcycling(model: AttentionClassifier, config: Config, data: Data) -> list[dict]:
    """Validation accuracy of the trained model with 4, 2, 1 key/value heads, averaged from its 8.

    At once, and after 5 % of its training's steps more: then it has had 105 % of the steps of a
    network that is trained from scratch. At a third of its learning rate, because its weights are
    good already: they have to fit the averaged heads, and large steps would spoil them first.
    """
    val = evaluation_set(data.val, config, N_EVALUATED[config.task])
    rows = []
    for G in (4, 2, 1):
        fewer = with_shared_heads(model, G)
        at_once = evaluate(fewer, val)["accuracy"]
        n_more = max(1, round(0.05 * config.n_steps))
        further = replace(config, n_kv_heads=G, steps=n_more, lr=config.lr / 3, n_logs=1)
        _, history = train(further, data, model=fewer)
        rows.append({"n_kv_heads": G, "steps": 0, "val_accuracy": at_once})
        rows.append({"n_kv_heads": G, "steps": n_more, "val_accuracy": history[-1]["val_accuracy"]})
    return rows


# What is measured of scores with and without 1 / √d


def probe_images(data: Data) -> Tensor:
    """Every tenth validation image, 500 of them, for what is measured beside the scores."""
    return data.val.images[::10]


def softmax_states(model: AttentionClassifier, config: Config, data: Data) -> list[dict]:
    """Entropy of the weights and gradient of W_q and W_k, before the first and after the last step.

    On 500 validation images: the mean entropy (nats) of the last block's weights, ln 28 at most,
    and the norm of the gradient of the loss for all W_q and W_k.
    """
    tokens, _ = tokens_of(probe_images(data), config)
    labels = data.val.labels[::10]
    rows = []
    models = {"at the start": build(config, tokens.device).eval(), "at the end": model}
    for when, network in models.items():
        states, weights = network.states(tokens)
        entropy = torch.special.entr(weights[-1]).sum(-1).mean().item()
        loss = F.cross_entropy(network.read(states), labels)
        layers = [block.attention for block in network.blocks]
        scoring = [W.weight for layer in layers for W in (layer.W_q, layer.W_k)]
        norm = nn.utils.get_total_norm(torch.autograd.grad(loss, scoring)).item()
        scores = "divided by √d" if config.scaled else "not divided"
        row = {"scores": scores, "d": config.d_model, "when": when}
        rows.append(row | {"entropy": entropy, "grad_norm": norm})
    return rows


# What is measured of a fault


@torch.no_grad()
def decode(model: AttentionClassifier, tokens: Tensor) -> Tensor:
    """Logits of tokens (B, T, F) read one by one: each joins the caches before the next exists."""
    caches = model.caches(*tokens.shape[:2])
    states = [model.states(token, caches=caches)[0] for token in tokens.split(1, 1)]
    return model.read(torch.cat(states, 1))


def percent_changed(logits: Tensor, others: Tensor) -> float:
    return 100 * (logits.argmax(1) != others.argmax(1)).double().mean().item()


@torch.no_grad()
def changed_by_order(model: AttentionClassifier, data: Data) -> float:
    """Percent of 500 validation images that get another class once their rows are shuffled."""
    images = probe_images(data)
    order = torch.randperm(28, generator=torch.Generator().manual_seed(0))
    return percent_changed(logits_of(model, images), logits_of(model, images[:, order]))


@torch.no_grad()
def changed_by_decoding(model: AttentionClassifier, data: Data) -> float:
    """Percent of 500 validation images that get another class when they are read row by row."""
    images = probe_images(data)
    tokens, _ = tokens_of(images, model.config)
    return percent_changed(logits_of(model, images), decode(model, tokens))


@torch.no_grad()
def changed_by_padding(model: AttentionClassifier, data: Data) -> float:
    """Percent of 500 validation images that get another class by 28 more tokens of padding."""
    images = probe_images(data)
    longer = replace(model.config, padding=model.config.padding + 28)
    tokens, mask = tokens_of(images, longer)
    return percent_changed(logits_of(model, images), model(tokens, mask))


def percent_right(model: AttentionClassifier, data: Data) -> float:
    """Percent of the validation images, or sequences, that are named rightly."""
    val = evaluation_set(data.val, model.config, N_EVALUATED[model.config.task])
    return 100 * evaluate(model, val)["accuracy"]


class Fault(NamedTuple):
    """Something that goes wrong in training, shown by a number of two runs of `faults`."""

    broken: str  # the runs' names in EXPERIMENTS["faults"]
    mended: str
    symptom: str
    measured: str
    measure: Callable[[AttentionClassifier, Data], float]


FAULTS = {
    "no positions": Fault(
        broken="no positions",
        mended="learned positions",
        symptom="tokens are a set: no row knows its place",
        measured="predictions changed by shuffling rows (%); 0: order is not seen",
        measure=changed_by_order,
    ),
    "no causal mask": Fault(
        broken="no causal mask",
        mended="causal mask",
        symptom="trained on rows that decoding does not have yet",
        measured="predictions changed by decoding (%)",
        measure=changed_by_decoding,
    ),
    "padding not masked": Fault(
        broken="padding takes part",
        mended="padding masked",
        symptom="the answer depends on how long the batch is",
        measured="predictions changed by 28 more padding tokens (%)",
        measure=changed_by_padding,
    ),
    "no warm-up": Fault(
        broken="rate 0.02 at once",
        mended="rate 0.02, warm-up",
        symptom="after equally many steps the accuracy is lower",
        measured="validation accuracy (%)",
        measure=percent_right,
    ),
    "recall stays at chance": Fault(
        broken="eight garments at once",
        mended="two to eight garments",
        symptom="for hundreds of steps the loss stays at ln 8 = 2.08, though nothing is broken",
        measured="sequences answered rightly (%), chance is 12.5",
        measure=percent_right,
    ),
}


def fault_rows(value: str, model: AttentionClassifier, data: Data) -> list[dict]:
    """The numbers of the faults that the run of this name shows, broken or mended."""
    rows = []
    for name, fault in FAULTS.items():
        for variant in ("broken", "mended"):
            if value == getattr(fault, variant):
                row = {"fault": name, "variant": variant, "measured": fault.measured}
                rows.append(row | {"number": fault.measure(model, data)})
    return rows


def formula_as_first_written(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """A common mistake: right in float32 as long as every query has a key."""
    scores = q @ k.mT / math.sqrt(q.shape[3])
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ v


def arithmetic_faults() -> list[dict]:
    """How many of 768 numbers, outputs and gradients, are nan: as first written, and by ours."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(3, 1, 1, 3, 64, generator=generator)
    large = torch.full((3, 1, 1, 3, 64), 40.0, dtype=torch.float16)
    nothing_to_see = torch.tensor([[True], [False], [True]])
    all_to_see = torch.ones(3, 1, dtype=torch.bool)
    cases = {
        "a query that may attend to nothing": (random, nothing_to_see),
        "float16, q · k = 102,400 (more than 65,504)": (large, all_to_see),
    }
    rows = []
    for case, (numbers, mask) in cases.items():
        q, k, v = (part.clone().requires_grad_() for part in numbers)
        outputs = {
            "as first written": formula_as_first_written(q, k, v, mask),
            "`attention`": attention(q, k, v, mask)[0],
        }
        row = {"experiment": "arithmetic", "case": case}
        for name, out in outputs.items():
            found = [out, *torch.autograd.grad(out.sum(), (q, k, v))]
            row[f"nan {name}"] = sum(part.isnan().sum().item() for part in found)
        rows.append(row)
    return rows


# -------- Pictures: from saved rows alone ---------------------------------------------------------

# experiment -> what its picture asks, what is varied, whether the values have an order
SWEEPS = {
    "control": ("Does attention do the work on clothes?", "what a row attends to", False),
    "recall": ("What does sharing cost in recall?", "key/value heads of 8 query heads", True),
    "recall_equal_parameters": (
        "Recall at equal parameters: a wider feed-forward part",
        "key/value heads of 8 query heads",
        True,
    ),
    "heads": ("What do more heads of the same total width do?", "heads", True),
    "steps": ("What does longer training do?", "training steps of the whole run", True),
    "width": ("What does a wider token do?", "width of a token", True),
    "blocks": ("What do more blocks do?", "blocks", True),
    "position": (
        "How should a row know its place? The mean of all states is read",
        "code of the position",
        False,
    ),
    "tokens": (
        "Rows or patches? Should all states be read, or their mean?",
        "tokens, what is read",
        False,
    ),
    "scale": ("Scores with and without 1/√d", "scores, width of the one head", False),
}
# names of the ways to decode, in table and picture
OURS = "this file's attention"
COPIED = "keys and values copied to 16 heads"
TORCHS = "torch's enable_gqa"
READ_LIMIT = "reading every number once (sum)"
CHANGED = 1e-6  # of the demo: a smaller change of a head's output would be rounding


def sweep_of(name: str) -> tuple[str, str, bool]:
    """An experiment's entry of SWEEPS; one of the user's own, without entry, goes by its name."""
    return SWEEPS.get(name, (name, "value", False))


def draw_all(folder: Path) -> None:
    """Every picture and summary.md of the folder's rows; DataError if there are none."""
    runs = metrics.load_rows(folder / "runs.csv")
    if runs.empty:
        raise DataError(f"{folder / 'runs.csv'} holds no rows: train something first")
    history = metrics.load_rows(folder / "history.csv")
    of_selected = history[history["experiment"].isin(SELECTED)]
    pictures = metrics.Pictures()
    for name in SELECTED:
        rows = runs[runs["experiment"] == name]
        if len(rows):
            own = history[history["experiment"] == name]
            title = f"{title_of(name)} on Fashion-MNIST: training"
            pictures.add(
                metrics.draw_curves, folder / f"curves_{name}.png", own, title, of_selected
            )
            n_seeds = rows["seed"].nunique()
            title = f"{title_of(name)}\n10,000 test images, sum over {n_seeds} seeds"
            matrix = confusion_of(folder, name)
            pictures.add(
                metrics.draw_confusion, folder / f"confusion_{name}.png", matrix, CLASSES, title
            )
    selected = runs[runs["experiment"].isin(SELECTED)]
    if len(selected):
        title = f"Do shared keys and values cost accuracy on clothes? {duration_of(selected)}"
        varied = "key/value heads of 8 query heads"
        pictures.add(
            metrics.draw_sweep, folder / "sweep_kv_heads.png", selected, of_selected, title, varied
        )
    for name in EXPERIMENTS:
        if name in (*SELECTED, "faults"):
            continue
        question, varied, ordered = sweep_of(name)
        rows = rows_to_compare(runs, name)
        own = rows_to_compare(history, name)
        title = f"{question} {duration_of(rows)}"
        if name == "recall":  # one at chance would press the others together
            without = rows.loc[rows["value"] == WITHOUT, "val_accuracy"]
            title += "\nchance is 12.5 %"
            if len(without):
                title += f", {WITHOUT}: {100 * without.mean():.1f} %"
            rows = rows[rows["value"] != WITHOUT]
            own = own[own["value"] != WITHOUT]
        if len(rows) and name != "scale":
            path = folder / f"sweep_{name}.png"
            pictures.add(metrics.draw_sweep, path, rows, own, title, varied, ordered)
    plateau = plateau_of(history)
    if len(plateau):
        pictures.add(draw_plateau, folder / "recall_plateau.png", plateau)
    add_side_tables(pictures, folder)
    pictures.draw()
    write_summary(folder, runs)


def title_of(name: str) -> str:
    """A selected model's name for a title."""
    names = {"mha": "Multi-head attention", "mqa": "Multi-query attention (1 key/value head)"}
    return names.get(name, f"Grouped-query attention ({name[3:]} key/value heads)")


def rows_to_compare(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """An experiment's rows of a table, behind the rows of another that they are compared with."""
    rows = table[table["experiment"] == name]
    if rows.empty:
        return rows
    if name == "control":
        first = table[table["experiment"] == "mha"].assign(value="learned weights")
        return pd.concat([first, rows])
    if name == "recall_equal_parameters":
        is_first = (table["experiment"] == "recall") & (table["value"] == "8 K/V heads")
        return pd.concat([table[is_first], rows])
    return rows


def add_side_tables(pictures: metrics.Pictures, folder: Path) -> None:
    """The pictures of demo, maps, faults and speed, of those that have rows."""
    add_demo(pictures, folder)
    maps = metrics.load_rows(folder / "maps.csv", as_text=True)
    if len(maps):
        largest = max(numbers_of(text).max() for text in maps["weights"])  # one scale for all
        for name, rows in maps.groupby("experiment", sort=False):
            pictures.add(
                draw_maps,
                folder / f"maps_{name}.png",
                rows,
                f"{title_of(name)}, last block",
                largest,
            )
    recall = metrics.load_rows(folder / "recall_maps.csv", as_text=True)
    if len(recall):
        pictures.add(draw_recall, folder / "recall_maps.png", recall)
    found = metrics.load_rows(folder / "upcycling.csv")
    if len(found):
        pictures.add(
            draw_upcycling, folder / "upcycling.png", found, metrics.load_rows(folder / "runs.csv")
        )
    scale = metrics.load_rows(folder / "scale.csv")
    if len(scale):
        pictures.add(draw_scale, folder / "sweep_scale.png", scale)
    faults = metrics.load_rows(folder / "faults.csv")
    if len(faults):
        title = "What goes wrong in training (orange), and what mends it (blue)"
        pictures.add(metrics.draw_faults, folder / "faults.png", faults, title)
    add_speed(pictures, folder)


def add_demo(pictures: metrics.Pictures, folder: Path) -> None:
    weights = metrics.load_rows(folder / "demo.csv")
    if len(weights):
        pictures.add(draw_demo, folder / "demo_weights.png", weights)
        pictures.add(
            draw_sharing, folder / "demo_sharing.png", metrics.load_rows(folder / "sharing.csv")
        )


def add_speed(pictures: metrics.Pictures, folder: Path) -> None:
    times = metrics.load_rows(folder / "decode.csv")
    if len(times):
        pictures.add(draw_decode, folder / "decode.png", times)
    benchmarks = metrics.load_rows(folder / "benchmark.csv")
    if len(benchmarks):
        title = "How long does it take, beside what one would compare it with?"
        pictures.add(metrics.draw_ratios, folder / "benchmark.png", benchmarks, title)


def renew_summary(folder: Path) -> None:
    """Write summary.md again if there is one, after a table of it has changed."""
    runs = metrics.load_rows(folder / "runs.csv")
    if (folder / "summary.md").exists() and len(runs):
        write_summary(folder, runs)


def numbers_of(text: str) -> np.ndarray:
    """A cell of several numbers, or of one: (n,) float."""
    return np.array(str(text).split(), dtype=float)


def pixels_of(rows: pd.DataFrame) -> np.ndarray:
    """The column `pixels` of hexadecimal bytes: a row of grey values for each."""
    return np.array([list(bytes.fromhex(text)) for text in rows["pixels"]])


def draw_demo(path: Path, rows: pd.DataFrame) -> None:
    """The weights of up to four heads of each layer, with numbers, all on one scale."""
    title = "Attention weights of one random matrix of six tokens: every row sums to 1 (rounded)"
    layers = list(rows["layer"].unique())
    H = rows["head"].max() + 1
    heads = sorted({0, min(1, H - 1), H // 2, min(H // 2 + 1, H - 1)})  # of two groups
    largest = max(numbers_of(text).max() for text in rows["weights"])
    size = {"width": 15, "height": 3.5 * len(layers) + 0.6, "squeeze": False}
    with metrics.picture(path, title, len(layers), len(heads), **size) as panels:
        cells = itertools.product(layers, heads)
        for (layer, head), axes in zip(cells, panels.flat, strict=True):
            own = rows[(rows["layer"] == layer) & (rows["head"] == head)]
            table = np.stack([numbers_of(text) for text in own["weights"]])  # (6, 6)
            shown = axes.imshow(table, cmap="Blues", vmin=0, vmax=largest)
            for (query, key), weight in np.ndenumerate(table):
                style = {"color": "white" if weight > largest / 2 else "black", "fontsize": 10}
                style |= {"ha": "center", "va": "center", "in_layout": False}
                axes.text(key, query, f"{weight:.2f}", **style)
            axes.set_title(f"{layer}, query head {head}\nreads {own['reads'].iloc[0]}")
            axes.set(xlabel="key (token)", ylabel="query (token)", xticks=range(6), yticks=range(6))
            axes.grid(False)
        bar = {"label": "attention weight", "shrink": 0.6}
        panels[0, 0].figure.colorbar(shown, ax=panels, **bar)


def links_of(rows: pd.DataFrame) -> pd.DataFrame:
    """Of the table `sharing`: the query heads that change with a head's keys and with its values,
    a row for each pair of heads."""
    pair = ["layer", "kv_head", "query_head"]
    least = rows.groupby(pair, sort=False, as_index=False)["change"].min()  # of keys and of values
    return least[least["change"] > CHANGED]


def draw_sharing(path: Path, rows: pd.DataFrame) -> None:
    """A line from each query head to the key/value head that it changes with."""
    layers = list(rows["layer"].unique())
    title = "Who shares what: a line joins a query head to the keys and values it depends on"
    names = {
        "MHA": "Multi-head attention (MHA)",
        "GQA": "Grouped-query attention (GQA)",
        "MQA": "Multi-query attention (MQA)",
    }
    links = links_of(rows)
    label = {"ha": "center", "va": "center", "fontsize": 12}
    with metrics.picture(path, title, len(layers), 1, width=11, height=8, squeeze=False) as panels:
        for layer, axes in zip(layers, panels.flat, strict=True):
            own = links[links["layer"] == layer]
            n_heads = rows.loc[rows["layer"] == layer, "query_head"].max() + 1
            n_kv_heads = rows.loc[rows["layer"] == layer, "kv_head"].max() + 1
            for kv_head, of_head in own.groupby("kv_head"):
                color = metrics.COLORS[kv_head % len(metrics.COLORS)]
                is_light = metrics.sns.utils.relative_luminance(color) > 0.3
                label["color"] = "black" if is_light else "white"
                across = (kv_head + 0.5) * n_heads / n_kv_heads - 0.5  # under its group
                for query_head in of_head["query_head"]:
                    axes.plot([query_head, across], [1, 0], color=color, zorder=1)
                    axes.scatter(query_head, 1, s=700, marker="o", color=color, zorder=2)
                    axes.text(query_head, 1, f"Q{query_head}", **label)
                axes.scatter(across, 0, s=1100, marker="s", color=color, zorder=2)
                axes.text(across, 0, f"K{kv_head}\nV{kv_head}", **label)
            heads = "head" if n_kv_heads == 1 else "heads"
            axes.set_title(f"{names[layer]}: {n_kv_heads} key/value {heads}", loc="left")
            axes.set_ylim(-0.55, 1.45)
            axes.axis("off")
        hollow = {"s": 150, "color": "white", "edgecolor": "black"}
        panels[0, 0].scatter([], [], marker="o", label="query head", **hollow)
        panels[0, 0].scatter([], [], marker="s", label="head of keys and values", **hollow)
        metrics.legend_beside(panels[0, 0])


def draw_maps(path: Path, rows: pd.DataFrame, title: str, largest: float) -> None:
    """What every head attends to in three images; frames in one colour share a key/value head."""
    rows = rows.astype({"image": int, "head": int, "kv_head": int})
    n_heads = rows["head"].max() + 1
    title += ": what each row of an image attends to (query row down, key row across)"
    with metrics.picture(path, title, 3, 1, width=16, height=6.6, squeeze=False) as panels:
        for i, axes in enumerate(panels.flat):
            of_image = rows[rows["image"] == i]
            image = pixels_of(of_image[of_image["head"] == 0])
            axes.imshow(image, cmap="gray_r", extent=(0, 28, 28, 0))
            for head in range(n_heads):
                own = of_image[of_image["head"] == head]
                table = np.stack([numbers_of(text) for text in own["weights"]])  # (28, 28)
                left = 32 * (head + 1)
                # a scale of square roots: small weights, too, are to be seen
                scale = metrics.matplotlib.colors.PowerNorm(0.5, vmin=0, vmax=largest)
                shown = axes.imshow(
                    table, cmap="magma", norm=scale, extent=(left, left + 28, 28, 0)
                )
                kv_head = own["kv_head"].iloc[0]
                across = [left, left + 28, left + 28, left, left]  # a frame
                color = metrics.COLORS[kv_head % len(metrics.COLORS)]
                axes.plot(across, [0, 0, 28, 28, 0], color=color, linewidth=3)
                if i == 0:
                    names = f"query head {head}\nK/V head {kv_head}"
                    axes.text(left + 14, -2, names, ha="center", fontsize=13)
            axes.set(xlim=(-0.5, 32 * (n_heads + 1) - 3), xticks=[], yticks=[0, 14, 28])
            axes.set_ylim(28.5, -0.5)
            axes.set_title(of_image["class"].iloc[0], loc="left")
            axes.spines["bottom"].set_visible(False)
            axes.grid(False)
        bar = {"label": "attention weight (square-root scale)", "shrink": 0.7}
        panels[0, 0].figure.colorbar(shown, ax=panels, ticks=[0, 0.01, 0.1, 0.3, 0.6, 0.9], **bar)


def draw_recall(path: Path, rows: pd.DataFrame) -> None:
    """Three sequences: garments with labels, the answer given, the heads' weights of the last."""
    rows = rows.astype({"sequence": int, "label": int, "answer": int, "predicted": int})
    blocks = [column for column in rows if column.startswith("block_")]
    title = "Recall: what the ninth garment, which has no label, attends to\n"
    title += "below each its label, ← where the class is the same; last: the answer that was given"
    size = {"width": 15, "height": 11, "height_ratios": [1, 1.2] * 3, "squeeze": False}
    with metrics.picture(path, title, 6, len(blocks), **size) as panels:
        for i, block in itertools.product(range(3), range(len(blocks))):
            own = rows[rows["sequence"] == i]
            garments = panels[2 * i, block]
            heads = panels[2 * i + 1, block]
            strip = np.concatenate([p.reshape(28, 28) for p in pixels_of(own)], axis=1)
            garments.imshow(strip, cmap="gray_r", extent=(0, len(own), 0, 1), aspect="auto")
            answer = own["answer"].iloc[0]
            names = [f"{n} ←" if n == answer else str(n) for n in own["label"]]
            names[-1] = f"? {own['predicted'].iloc[0]}"
            garments.set_xticks(np.arange(len(own)) + 0.5, names, fontsize=14)
            garments.set_yticks([])
            garments.set_title(f"sequence {i}, block {block + 1}", loc="left")
            table = np.stack([numbers_of(text) for text in own[blocks[block]]], axis=1)  # (H, T)
            shown = heads.imshow(
                table,
                cmap="magma",
                vmin=0,
                vmax=1,
                aspect="auto",
                extent=(0, len(own), len(table), 0),
            )
            heads.set_xticks([])
            every_second = np.arange(0, len(table), 2)
            heads.set_yticks(every_second + 0.5, every_second)
            heads.set_ylabel("head")
            garments.grid(False)
            heads.grid(False)
        bar = {"label": "attention weight of the ninth token", "shrink": 0.6}
        panels[0, 0].figure.colorbar(shown, ax=panels, **bar)


def upcycled_rows(found: pd.DataFrame, runs: pd.DataFrame, task: str) -> pd.DataFrame:
    """Accuracy (%) by key/value heads and by how they came to be, of one task ("mha" or "recall").

    Rows: seed, n_kv_heads, percent, origin.
    """
    names = SELECTED if task == "mha" else ("recall",)
    scratch = runs[runs["experiment"].isin(names) & (runs["value"] != WITHOUT)]
    scratch = scratch.assign(origin="trained from scratch")
    own = found[found["experiment"] == task]
    own = own.assign(origin=np.where(own["steps"] > 0, "averaged, 5 % more steps", "averaged"))
    rows = pd.concat([scratch, own])[["seed", "n_kv_heads", "val_accuracy", "origin"]]
    return rows.assign(percent=100 * rows["val_accuracy"])


def draw_upcycling(path: Path, found: pd.DataFrame, runs: pd.DataFrame) -> None:
    """A panel for clothes and one for recall: the three ways to fewer key/value heads."""
    title = "Upcycling: the key/value heads of a trained model, averaged in groups\n"
    title += metrics.bands_of(found)
    tasks = {"mha": "clothes", "recall": "recall"}
    tasks = {name: task for name, task in tasks.items() if (found["experiment"] == name).any()}
    with metrics.picture(path, title, 1, len(tasks), width=13, squeeze=False) as panels:
        for (name, task), axes in zip(tasks.items(), panels.flat, strict=True):
            rows = upcycled_rows(found, runs, name)
            colors = metrics.colors_of(list(rows["origin"].unique()), ordered=False)
            for origin, own in rows.groupby("origin", sort=False):
                style = {"errorbar": ("pi", 100), "err_style": "bars", "err_kws": {"capsize": 4}}
                style |= {"color": colors[origin], "label": origin, "marker": "o"}
                metrics.draw_line(axes, own, "n_kv_heads", "percent", **style)
            metrics.log_scale(axes.xaxis, rows["n_kv_heads"])
            axes.set_xticks([1, 2, 4, 8])
            axes.set_title(task)
            axes.set(xlabel="key/value heads of 8 query heads", ylabel="validation accuracy (%)")
        metrics.legend_beside(panels[0, -1])


def draw_scale(path: Path, rows: pd.DataFrame) -> None:
    """Entropy of the weights and gradient of W_q and W_k over the width of the one head."""
    title = "What becomes of the softmax as a head grows wider, with and without 1/√d?"
    n_seeds = rows["seed"].nunique()
    bars = f"(bars: lowest and highest of {n_seeds} seeds)" if n_seeds > 1 else "(1 seed)"
    with metrics.picture(path, f"{title}\n{bars}", n_columns=2, width=13, height=5) as panels:
        colors = metrics.colors_of(list(rows["scores"].unique()), ordered=False)
        for axes, number in zip(panels, ("entropy", "grad_norm"), strict=True):
            for (scores, when), own in rows.groupby(["scores", "when"], sort=False):
                style = {"errorbar": ("pi", 100), "err_style": "bars", "err_kws": {"capsize": 4}}
                style |= {"linestyle": "--" if when == "at the start" else "-", "marker": "o"}
                label = f"scores {scores}, {when}"
                metrics.draw_line(
                    axes, own, "d", number, color=colors[scores], label=label, **style
                )
            metrics.log_scale(axes.xaxis, rows["d"])
            axes.set_xticks(sorted(rows["d"].unique()))
            axes.set_xlabel("width of the head, d (log scale)")
        left, right = panels
        left.axhline(math.log(28), color="grey", linestyle=":", label="ln 28: all keys alike")
        left.set(ylabel="entropy of the attention weights (nats)", ylim=(0, 3.6))
        right.set(ylabel="gradient norm of W_q and W_k (log scale)")
        metrics.log_scale(right.yaxis, rows["grad_norm"])
        handles, labels = left.get_legend_handles_labels()
        place = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "fontsize": 10}
        right.legend(handles, labels, **place)


def plateau_of(history: pd.DataFrame) -> pd.DataFrame:
    """The history of the two runs of recall that are a fault: all garments at once, or not."""
    fault = FAULTS["recall stays at chance"]
    names = [fault.broken, fault.mended]
    return history[(history["experiment"] == "faults") & history["value"].isin(names)]


def draw_plateau(path: Path, rows: pd.DataFrame) -> None:
    """The loss of recall over the steps of training, beside that of a guess."""
    title = "Recall: how long does the loss stay at that of a guess?"
    fault = FAULTS["recall stays at chance"]
    colors = {fault.broken: metrics.COLORS[1], fault.mended: metrics.COLORS[0]}  # as in the faults
    with metrics.picture(path, f"{title}\n{metrics.bands_of(rows)}", width=12) as axes:
        for value, own in rows.groupby("value", sort=False):
            style = {"color": colors[value], "label": value, "errorbar": ("pi", 100)}
            metrics.draw_line(axes, own, "step", "val_loss", marker="o", **style)
        guess = {"color": "grey", "linestyle": ":", "label": "a guess: ln 8 = 2.08"}
        axes.axhline(math.log(N_GARMENTS), **guess)
        axes.set(xlabel="training step", ylabel="validation loss (nats)", ylim=(0, None))
        metrics.legend_beside(axes)


def draw_decode(path: Path, rows: pd.DataFrame) -> None:
    """A panel for every number of key/value heads: time of a token over the tokens cached."""
    title = "Decoding one token: time over the tokens cached (4 sequences, 16 query heads)"
    groups = sorted(rows["n_kv_heads"].unique(), reverse=True)
    colors = metrics.colors_of(list(WAYS), ordered=False)
    n_columns = math.ceil((len(groups) + 1) / 2)
    size = {"width": 14, "height": 8, "sharex": True, "sharey": True, "squeeze": False}
    with metrics.picture(path, title, 2, n_columns, **size) as panels:
        for G, axes in zip(groups, panels.flat, strict=False):
            for way, own in rows[rows["n_kv_heads"] == G].groupby("way", sort=False):
                style = {"color": colors[way], "marker": "o", "label": way}
                axes.plot(own["cached"], own["milliseconds"], **style)
            axes.set_title(f"{G} key/value head{'s' if G > 1 else ''}")
            axes.set(xlabel="cached tokens (log scale)", ylabel="ms per token (log scale)")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.tick_params(labelbottom=True, labelleft=True)
        rest = panels.flat[len(groups) :]
        last = panels.flat[len(groups) - 1]  # of one head: all ways are in it
        handles, labels = last.get_legend_handles_labels()
        for axes in rest:
            axes.axis("off")
        rest[0].legend(handles, labels, loc="center", fontsize=12)


def duration_of(rows: pd.DataFrame) -> str:
    """How long the runs of these rows are: "(14 epochs each)", "(300 steps each)", or nothing."""
    lengths = {
        f"({row['steps']:,} steps each)" if row["steps"] else f"({row['epochs']} epochs each)"
        for row in rows.to_dict("records")
    }
    return lengths.pop() if len(lengths) == 1 else ""


def confusion_of(folder: Path, experiment: str) -> np.ndarray:
    """The saved confusion matrix (C, C), summed over seeds."""
    cells = metrics.load_rows(folder / "confusion.csv")
    cells = cells[cells["experiment"] == experiment]
    return cells.pivot_table("count", "true", "predicted", aggfunc="sum").to_numpy().astype(int)


def write_summary(folder: Path, runs: pd.DataFrame) -> None:
    """summary.md: the tables a person reads; each says on which images it was measured."""
    sections = demo_section(folder)
    selected = runs[runs["experiment"].isin(SELECTED)]
    if len(selected):
        sections |= selected_sections(folder, selected)
    if (runs["experiment"] == "control").any():
        rows = rows_to_compare(runs, "control")
        sections["Control: does attention do the work?"] = [
            "**Validation images.** `mha` (learned weights) beside the same network whose tokens "
            "attend to all alike, to themselves alone, or not at all. *All alike* and *itself "
            "alone* have as many parameters as `mha`, but their queries and keys decide nothing; "
            "*nothing* has fewer, and does not do worse than *itself alone*. The first four "
            "read the states of all tokens side by side, the last two their mean.",
            metrics.score_table(rows, "val_", "value", "what a row attends to"),
            "![control](sweep_control.png)",
        ]
    for name, heading in (
        ("recall", "Recall, a task that needs attention: at equal steps"),
        ("recall_equal_parameters", "Recall at equal steps and parameters"),
    ):
        rows = rows_to_compare(runs, name)
        if len(rows):
            note = "sequences (in a smoke run fewer) of eight labelled garments and one without"
            parts = [f"**Test**: {N_TEST:,} {note} {duration_of(rows)}. Chance is 12.5 %."]
            parts.append(metrics.score_table(rows, "test_", "value", "key/value heads"))
            n_val = N_EVALUATED["recall"]
            parts.append(f"**Validation**: {n_val:,} sequences, by which the settings were chosen.")
            parts.append(metrics.score_table(rows, "val_", "value", "key/value heads"))
            parts.append(f"![{name}](sweep_{name}.png)")
            if name == "recall" and (folder / "recall_maps.png").exists():
                parts.append("![what the ninth garment attends to](recall_maps.png)")
            sections[heading] = parts
    for name in EXPERIMENTS:
        rows = runs[runs["experiment"] == name]
        if len(rows) and name not in (*SELECTED, "control", *RECALLS, "faults"):
            varied = sweep_of(name)[1]
            parts = [f"**Validation images** {duration_of(rows)}".strip()]
            parts.append(metrics.score_table(rows, "val_", "value", varied))
            if name == "scale":
                parts += scale_parts(folder)
            parts.append(f"![{name}](sweep_{name}.png)")
            sections[f"Sweep: {name}"] = parts
    sections |= fault_section(folder) | upcycling_section(folder, runs)
    own = runs[~runs["experiment"].isin(EXPERIMENTS)]
    if len(own):
        table = metrics.score_table(own, "val_", "experiment", "network")
        sections["Networks of your own"] = ["**Validation images**", table]
    sections |= speed_section(folder)
    metrics.write_sections(folder / "summary.md", "Stage 3: attention on Fashion-MNIST", sections)


def demo_section(folder: Path) -> dict[str, list[str]]:
    rows = metrics.load_rows(folder / "demo.csv")
    if rows.empty:
        return {}
    largest = rows["row_error"].abs().max()
    own = rows[(rows["layer"] == rows["layer"].iloc[0]) & (rows["head"] == 0)]
    matrix = "\n".join(own["weights"])
    return {
        "Attention weights of a random matrix (随机矩阵的注意力权重)": [
            f"Multi-head attention, head 0, a row for each of the six queries. Over all heads and "
            f"layers a row's sum differs from 1 by {largest:.1e} at most.",
            f"```\n{matrix}\n```",
            "![weights](demo_weights.png)",
            "![who shares what](demo_sharing.png)",
        ]
    }


def selected_sections(folder: Path, selected: pd.DataFrame) -> dict[str, list[str]]:
    """The four selected models: their scores, how they differ, what sharing saves, their Config."""
    names = list(dict.fromkeys(selected["experiment"]))
    sections = {
        "Selected models, test images": [
            "**Test images**, read once for each run, at its end; earlier networks were scored on "
            "them before those of this table were chosen. The loss is plain cross-entropy, without "
            "the label smoothing of training.",
            metrics.score_table(selected, "test_", "experiment", all_scores=True),
        ]
    }
    tests = mcnemar_rows(folder, selected)
    if tests:
        sections["Are they different? McNemar's test"] = [
            "**The same test images**, named by `mha` and by another model of the same seed. Of n "
            "seeds: the mean difference with its 95 % t interval, the images that one of the two "
            "alone names rightly (means), and each seed's p (exact, two-sided). The interval is of "
            "paired differences; the README's is Welch's, unpaired. A small p says that these two "
            "trained networks differ, not that the methods do: that is what the interval is for.",
            metrics.markdown(tests),
        ]
    first = selected.drop_duplicates("experiment")
    saved = [
        {
            "model": row["experiment"],
            "key/value heads": row["n_kv_heads"],
            "parameters": f"{row['parameters']:,}",
            "cache of 28 tokens, decoded causally (KiB)": f"{row['cache_bytes'] / 1024:.1f}",
        }
        for row in first.to_dict("records")
    ]
    sections["What sharing saves"] = [metrics.markdown(saved)]
    note = "**Validation images**, on which the settings were chosen."
    table = metrics.score_table(selected, "val_", "experiment")
    pictures = "![the four side by side](sweep_kv_heads.png)"
    maps = [name for name in ("mha", "mqa") if (folder / f"maps_{name}.png").exists()]
    maps = [f"![attention maps of {name}](maps_{name}.png)" for name in maps]
    sections["Selected models, validation images"] = [note, table, pictures, *maps]
    settings = first.set_index("experiment")[list(config_columns(BASE))].T
    settings = settings.rename_axis("field").reset_index()
    sections["Config of the selected models"] = [metrics.markdown(settings)]
    for name in names:
        report = metrics.report(confusion_of(folder, name), CLASSES)
        pictures = f"![curves](curves_{name}.png) ![confusion](confusion_{name}.png)"
        note = "**Test images**, summed over seeds."
        sections[f"{name}, class by class"] = [note, f"```\n{report}\n```", pictures]
    return sections


def mcnemar_rows(folder: Path, selected: pd.DataFrame) -> list[dict]:
    """Each model beside `mha`: a line with the difference and McNemar's test of every seed (1947).

    Of b images that mha alone names rightly and c that the other does, b would be binomial with
    1/2 if both were equally good.
    """
    rows = metrics.load_rows(folder / "predictions.csv", as_text=True)
    right = {
        (row["experiment"], row["seed"]): np.array(list(row["right"])) == "1"
        for row in rows.to_dict("records")
    }
    table = []
    for name in SELECTED[1:]:
        seeds = [seed for model, seed in right if model == name and ("mha", seed) in right]
        if not seeds:
            continue
        differences = []
        lost = []
        won = []
        p_values = []
        for seed in seeds:
            mha = right["mha", seed]
            other = right[name, seed]
            differences.append(100 * (other.mean() - mha.mean()))
            lost.append(int((mha & ~other).sum()))
            won.append(int((other & ~mha).sum()))
            n_different = lost[-1] + won[-1]
            p_values.append(stats.binomtest(lost[-1], n_different).pvalue if n_different else 1.0)
        difference = metrics.summarise(differences)
        interval = f" ± {difference.half:.2f}" if difference.n > 1 else ""
        table.append(
            {
                "model": name,
                "minus mha (points)": f"{difference.mean:+.2f}{interval}",
                "mha alone right": f"{np.mean(lost):.0f}",
                "it alone right": f"{np.mean(won):.0f}",
                "p of each seed": ", ".join(f"{p:.2g}" for p in p_values),
                "n": len(seeds),
            }
        )
    return table


def scale_parts(folder: Path) -> list[str]:
    """The table of what becomes of the softmax with and without 1 / √d."""
    rows = metrics.load_rows(folder / "scale.csv")
    if rows.empty:
        return []
    table = []
    for (scores, d, when), own in rows.groupby(["scores", "d", "when"], sort=False):
        line = {"scores": scores, "width of the head": d, "when": when}
        line["entropy of the weights (nats)"] = str(metrics.summarise(own["entropy"]))
        norm = metrics.summarise(own["grad_norm"])
        spread = f" ± {norm.std:.2g}" if norm.n > 1 else ""
        line["gradient norm of W_q and W_k"] = f"{norm.mean:.3g}{spread}"
        table.append(line | {"n": norm.n})
    note = (
        "**500 validation images**, before the first step and after the last. Entropy is ln 28 = "
        "3.33 where all keys weigh alike, and 0 where one key has all the weight."
    )
    return [note, metrics.markdown(table)]


def fault_section(folder: Path) -> dict[str, list[str]]:
    faults = metrics.load_rows(folder / "faults.csv")
    if faults.empty:
        return {}
    symptoms = {name: fault.symptom for name, fault in FAULTS.items()}
    parts = [metrics.fault_table(faults, symptoms), "![faults](faults.png)"]
    if (folder / "recall_plateau.png").exists():
        parts.append("![the loss of recall at ln 8](recall_plateau.png)")
    arithmetic = metrics.load_rows(folder / "arithmetic.csv")
    if len(arithmetic):
        parts.append("Of 768 numbers, outputs and gradients, so many are nan:")
        parts.append(metrics.markdown(arithmetic.drop(columns="experiment")))
    return {"Faults: provoked, measured, mended": parts}


def upcycling_section(folder: Path, runs: pd.DataFrame) -> dict[str, list[str]]:
    found = metrics.load_rows(folder / "upcycling.csv")
    table = []
    for task in found["experiment"].unique() if len(found) else ():
        rows = upcycled_rows(found, runs, task)
        for G in (8, 4, 2, 1):
            own = rows[rows["n_kv_heads"] == G]
            line = {"task": "clothes" if task == "mha" else "recall", "key/value heads": G}
            for origin in rows["origin"].unique():
                percent = own.loc[own["origin"] == origin, "percent"]
                line[origin] = str(metrics.summarise(percent)) if len(percent) else "–"
            table.append(line | {"n": own["seed"].nunique()})
    if not table:
        return {}
    note = (
        "**Validation accuracy (%).** The 8 key/value heads of a trained model, averaged in "
        "groups. With 5 % more steps a model has had 105 % of the steps of one from scratch."
    )
    return {
        "Upcycling: from multi-head to fewer key/value heads": [
            note,
            metrics.markdown(table),
            "![upcycling](upcycling.png)",
        ]
    }


def speed_section(folder: Path) -> dict[str, list[str]]:
    parts = []
    benchmarks = metrics.load_rows(folder / "benchmark.csv")
    if len(benchmarks):
        parts.append(
            "Medians of times taken in turn. Ratio: first / second, below 1 the first is faster. "
            "A layer's batch: 256 at width 96, 32 for 28 tokens of width 512, else 4."
        )
        parts.append(metrics.ratio_table(benchmarks))
        parts.append("![speed](benchmark.png)")
    times = metrics.load_rows(folder / "decode.csv")
    if len(times):
        parts.append(
            "Decoding one token of 4 sequences, 16 query heads of width 64, float32: time of "
            "`attention` in ms, and over the time of three others (lower is better). The last "
            "reads every number of the cache once, to sum it: no way to decode can read less."
        )
        parts += [metrics.markdown(decode_table(times)), "![decoding](decode.png)"]
    return {"Speed": parts} if parts else {}


def decode_table(times: pd.DataFrame) -> list[dict]:
    """A line for every length and number of key/value heads, with the three ratios."""
    table = []
    for (cached, G), own in times.groupby(["cached", "n_kv_heads"], sort=False):
        by_way = own.set_index("way")["milliseconds"]
        ours = by_way[OURS]
        line = {"cached tokens": f"{cached:,}", "key/value heads": G}
        line["cache (MiB)"] = f"{own['cache_bytes'].iloc[0] / 2**20:.1f}"
        line["ms"] = f"{ours:.3f}"
        for way in (COPIED, TORCHS, READ_LIMIT):
            line[f"/ {way}"] = f"{ours / by_way[way]:.2f}" if way in by_way else "–"
        table.append(line)
    return table


# -------- Commands --------------------------------------------------------------------------------


class Command:
    def check(self) -> None:
        """ValueError if a flag's value is out of range."""


@dataclass(frozen=True)
class Common(Command):
    """Flags of every command that computes."""

    out: Path | None = None  # results go to OUT/stage3; default: figures/, for train out/
    data_dir: Path = HERE / "data"  # holds FashionMNIST/raw with its four files, packed or not
    download: bool = False  # let torchvision fetch the data first
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto takes a GPU if there is one


@dataclass(frozen=True)
class RunCommand(Common):
    """Train experiments; what is finished is found and not trained again."""

    only: Annotated[
        tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]],
        tyro.conf.arg(metavar="NAME …", help=f"of: all {' '.join(EXPERIMENTS)}"),
    ] = ()
    seeds: int = 1  # runs of every value, with seeds 0, 1, …
    workers: int = 0  # processes of one thread each; 0 is one per core, or one per GPU
    dask: str | None = None  # address of a Dask scheduler, such as tcp://scheduler:8786
    fresh: bool = False  # remove the rows of these experiments first
    smoke: bool = False  # a tiny run of everything; without --out into a temporary folder

    def check(self) -> None:
        for name in itertools.chain(*self.only):
            check_name("experiment", name, ["all", *EXPERIMENTS])
        check_range("seeds", self.seeds, 1, 1000)
        check_range("workers", self.workers, 0, 1024)
        check_smoke(self)

    @property
    def experiments(self) -> list[str]:
        named = list(dict.fromkeys(itertools.chain(*self.only)))
        if "all" in named or (self.smoke and not named):
            return list(EXPERIMENTS)
        return named or list(THE_BRIEF)


@dataclass(frozen=True)
class TrainCommand(Common):
    """Train one network of your own; it is judged on the validation images."""

    config: tyro.conf.OmitArgPrefixes[Config] = Config()
    test: bool = False  # judge it on the test images too
    save: Path | None = None  # write weights and Config to this file

    def check(self) -> None:
        self.config.check()


@dataclass(frozen=True)
class PredictCommand(Command):
    """Say which garment is on each image file: a product photo, a scan or a drawing."""

    images: tyro.conf.Positional[tuple[Path, ...]]  # image files
    weights: Path = HERE / "figures" / "stage3" / "mha.pt"  # the network that reads them
    save_picture: Path | None = None  # write what the network saw to this PNG file

    def check(self) -> None:
        if not self.images:
            raise ValueError("predict needs at least one image file")


@dataclass(frozen=True)
class BenchmarkCommand(Common):
    """Time decoding, and a layer's forward and backward, beside what a user would take instead."""

    smoke: bool = False  # as short as it goes; without --out into a temporary folder

    def check(self) -> None:
        check_smoke(self)


@dataclass(frozen=True)
class PlotCommand(Command):
    """Draw the pictures and summary.md again from saved rows."""

    out: Path | None = None  # the folder that holds stage3; else figures/


@dataclass(frozen=True)
class DemoCommand(Command):
    """Attention weights of a random matrix by MHA, GQA and MQA, and who shares what."""

    out: Path | None = None  # pictures go to OUT/stage3; else to figures/
    d_model: int = 96  # width of the six tokens
    n_heads: int = 8  # query heads
    n_kv_heads: int = 2  # key/value heads of the grouped-query layer
    seed: int = 0  # of the matrix and of the weights

    def check(self) -> None:
        config = replace(BASE, d_model=self.d_model, n_heads=self.n_heads, seed=self.seed)
        replace(config, n_kv_heads=self.n_kv_heads).check()


COMMANDS = {
    "demo": DemoCommand,
    "run": RunCommand,
    "train": TrainCommand,
    "predict": PredictCommand,
    "benchmark": BenchmarkCommand,
    "plot": PlotCommand,
}


def main(argv: list[str] | None = None) -> int:
    """The program; its exit code: 0 done, 1 data or files that are wrong, 2 bad flags, 130 Ctrl-C,
    143 SIGTERM."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without Chinese still shows the rest
            stream.reconfigure(errors="backslashreplace")
    command = parse(arguments)
    before = signal.signal(signal.SIGTERM, raise_terminated)
    try:
        match command:
            case RunCommand():
                run_experiments(command)
            case TrainCommand():
                train_one(command)
            case PredictCommand():
                return predict(command)
            case BenchmarkCommand():
                benchmark(command)
            case DemoCommand():
                demo(command)
            case PlotCommand():
                folder = folder_of(command.out or HERE / "figures")
                if not folder.exists():
                    raise DataError(f"{folder} does not exist: train something first")
                with claimed(folder):
                    draw_all(folder)
                print(f"drawn: {folder / 'summary.md'}")
        sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        again = shlex.join(["python", sys.argv[0] if argv is None else __file__, *arguments])
        if isinstance(command, RunCommand) and (command.out or not command.smoke):
            print(f"\nstopped; finished runs are saved, go on with: {again}", file=sys.stderr)
        else:
            print(f"\nstopped, nothing was saved; to start anew: {again}", file=sys.stderr)
        return 143 if isinstance(interrupt, Terminated) else 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (DataError, ValueError, OSError) as error:
        print(f"{SCRIPT}: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


class Terminated(KeyboardInterrupt):
    """SIGTERM came; whatever ends on Ctrl-C ends."""


def raise_terminated(number, frame) -> None:
    raise Terminated


def parse(arguments: list[str]):
    """The command that the arguments ask for; what is wrong is said, and ends with exit 2."""
    first = arguments[0] if arguments else ""
    options = {"config": (tyro.conf.FlagCreatePairsOff,)}
    try:
        if first in ("-h", "--help"):  # of all commands; with it the program ends
            kinds = [Annotated[kind, tyro.conf.subcommand(name)] for name, kind in COMMANDS.items()]
            of_any = Union[tuple(kinds)]  # noqa: UP007
            tyro.cli(of_any, prog=SCRIPT, description=__doc__, args=arguments, **options)
        if not first or first.startswith("-"):
            first = "run"
        else:
            check_name("command", first, list(COMMANDS))
            arguments = arguments[1:]
        # of this command alone: to build the flags of all takes a noticeable time
        command = tyro.cli(COMMANDS[first], prog=f"{SCRIPT} {first}", args=arguments, **options)
        command.check()
        if isinstance(command, Common):
            device_of(command.device)  # ValueError if this machine has none
    except ValueError as error:
        print(f"{SCRIPT}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return command


def check_name(kind: str, name: str, names: list[str]) -> None:
    """ValueError that suggests the nearest of the names, unless it is one of them."""
    if name not in names:
        near = get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"no {kind} {name!r}, there are {', '.join(names)}{hint}")


def device_of(device: str) -> str:
    is_there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        return next(name for name, found in is_there.items() if found)
    if not is_there[device]:
        raise ValueError(f"--device {device}: torch finds none on this machine")
    return device


def check_smoke(command: RunCommand | BenchmarkCommand) -> None:
    """ValueError if a smoke run's toy rows would take the place of the committed ones."""
    if command.smoke and command.out and command.out.resolve() == HERE / "figures":
        raise ValueError(f"--smoke must not write to {HERE / 'figures'}: name another --out")


def folder_of(out: Path) -> Path:
    return Path(out).resolve() / "stage3"


@contextmanager
def claimed(folder: Path):
    """Make the folder and keep other jobs out until the block ends; DataError if one is there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        advice = "name another folder by --out"
        raise DataError(f"{folder} cannot be made, a file is in its way: {advice}") from None
    try:
        with FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0):
            yield
    except Timeout:
        advice = "wait for its end, or name another folder by --out"
        raise DataError(f"another job is at work in {folder}: {advice}") from None


def run_experiments(command: RunCommand) -> None:
    """Train what is not finished yet, save each run as it ends, draw, print the result."""
    device = device_of(command.device)
    out = command.out or (tempfile.mkdtemp() if command.smoke else HERE / "figures")
    folder = folder_of(out)
    experiments = command.experiments
    runs = runs_of(experiments, 1 if command.smoke else command.seeds, command.smoke)
    with claimed(folder):
        metrics.drop_rows_of_no_run(folder)
        todo = runs
        n_outdated = 0
        if not command.fresh:
            todo, n_outdated = unfinished(runs, folder)
        if todo:  # before --fresh removes rows: a missing data file ends the command here
            data = load_data(command.data_dir, command.download)
        if command.fresh:
            saved = metrics.load_rows(folder / "runs.csv", as_text=True)
            metrics.remove_runs(folder, saved["experiment"].isin(experiments))
        workers = 1 if command.smoke else command.workers or default_workers(device)
        workers = min(workers, max(1, len(todo)))
        where = f"Dask's workers at {command.dask}" if command.dask else f"{workers} worker(s)"
        print(f"stage 3 on {device_name(device)}, {where} of 1 thread, results in {folder}")
        n_found = len(runs) - len(todo)
        print(f"{n_found} of {len(runs)} runs found there, {len(todo)} to do", flush=True)
        if n_outdated:
            print(f"{n_outdated} were made with other settings: trained again and replaced")
        if todo:
            data = smoke_data(data) if command.smoke else data
            train_and_save(todo, data, device, workers, command.dask, folder)
        if not (command.only or command.smoke):
            metrics.replace_rows(folder, demo_tables(*demo_layers(DemoCommand())), [])
        if "faults" in experiments:
            metrics.replace_rows(folder, {"arithmetic": arithmetic_faults()}, [])
        drop_outdated(runs, folder)
        print("drawing …", flush=True)
        draw_all(folder)
    if command.smoke:
        print("a smoke run: everything in miniature, so that its numbers mean nothing")
    print_result(folder, experiments)


def unfinished(runs: list[Run], folder: Path) -> tuple[list[Run], int]:
    """The runs that the folder does not hold, and how many of them it holds with another Config."""
    rows = metrics.load_rows(folder / "runs.csv", as_text=True).to_dict("records")
    found = {(row["experiment"], row["value"], row["seed"]): row for row in rows}
    todo = []
    n_outdated = 0
    for run in runs:
        row = found.get((run.experiment, run.value, str(run.config.seed)))
        if row is None:
            todo.append(run)
        elif not has_config(row, run.config):
            todo.append(run)
            n_outdated += 1
    return todo, n_outdated


def has_config(row: dict, config: Config) -> bool:
    """Whether a saved row is of this Config, but for the seed."""
    return all(row.get(name) == text for name, text in config_columns(config).items())


def drop_outdated(runs: list[Run], folder: Path) -> None:
    """Remove saved rows of these experiments whose value or Config is no longer in the table."""
    table = {(run.experiment, run.value): run.config for run in runs}
    rows = metrics.load_rows(folder / "runs.csv", as_text=True)
    is_outdated = []
    for row in rows.to_dict("records"):
        config = table.get((row["experiment"], row["value"]))
        is_named = row["experiment"] in {run.experiment for run in runs}
        is_gone = is_named and row["value"] not in EXPERIMENTS[row["experiment"]]
        is_outdated.append(is_gone or (config is not None and not has_config(row, config)))
    if any(is_outdated):
        reason = "EXPERIMENTS no longer has their value or settings"
        print(f"{sum(is_outdated)} saved rows removed: {reason}")
        metrics.remove_runs(folder, np.array(is_outdated))


def smoke_data(data: Data) -> Data:
    """What a smoke run sees: the first 200 training images, every 100th of the others."""
    first = Split(data.train.images[:200], data.train.labels[:200])
    return Data(first, every_nth(data.val, 100), every_nth(data.test, 100))


def every_nth(split: Split, n: int) -> Split:
    return Split(split.images[::n], split.labels[::n])


def default_workers(device: str) -> int:
    return {"cuda": torch.cuda.device_count(), "mps": 1}.get(device, joblib.cpu_count())


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{device} ({torch.backends.cpu.get_cpu_capability()})"


def origin_of_rows(device: str) -> dict:
    """What a row says of where it comes from: commit, version, machine."""
    try:
        git = partial(subprocess.run, cwd=HERE, capture_output=True, text=True, check=True)
        commit = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
        if git(["git", "status", "--porcelain", "--", Path(__file__).name, "metrics.py"]).stdout:
            commit += "-dirty"
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {"commit": commit, "torch": torch.__version__, "device": device_name(device)}


def train_and_save(
    todo: list[Run], data: Data, device: str, workers: int, dask: str | None, folder: Path
) -> None:
    """Train the runs, the longest first so that no worker waits for one; save each as it ends."""
    todo = sorted(todo, key=cost, reverse=True)
    is_terminal = sys.stderr.isatty()
    # no guess of what remains: the first runs are the longest
    style = {"bar_format": "{n_fmt} of {total_fmt} runs |{bar:20}| {elapsed}{postfix}"}
    with (
        tqdm(total=len(todo), disable=not is_terminal, **style) as bar,
        metrics.ticking(bar),
        closing(results_of(todo, data, device, workers, dask)) as results,
    ):
        bar.set_postfix_str(f"training, longest first: {todo[0].experiment} {todo[0].value}")
        for number, (tables, weights) in enumerate(results, 1):
            row = tables["runs"][0]
            if row["experiment"] in SELECTED and row["seed"] == 0:
                config = next(run.config for run in todo if run.experiment == row["experiment"])
                save_weights(folder / f"{row['experiment']}.pt", replace(config, seed=0), weights)
            metrics.replace_rows(folder, tables, order_of_rows())
            words = f"{row['experiment']} {row['value']}, seed {row['seed']}: {progress(row)}"
            bar.set_postfix_str(words, refresh=False)
            bar.update()
            if not is_terminal:
                seconds = f"{row['status']}, {row['seconds']:.0f} s"
                print(f"[{number}/{len(todo)}] {words}, {seconds}", flush=True)


def cost(run: Run) -> float:
    """About how long a run takes: its steps, times the work of one."""
    config = run.config
    T, n_in, _ = sizes_of(config)
    D = config.d_model
    of_block = 4 * D * D + 2 * D * (config.d_ff or 2 * D)
    per_token = n_in * D + config.n_blocks * of_block
    return config.n_steps * config.batch_size * (T + config.padding) * per_token


def order_of_rows() -> list[tuple[str, str]]:
    return [(name, value) for name, values in EXPERIMENTS.items() for value in values]


def results_of(
    runs: list[Run], data: Data, device: str, workers: int, dask: str | None
) -> Iterator[tuple[dict, dict]]:
    """What `execute` gives for each run, as it ends: in this process, in workers, or on Dask's."""
    arrays = tuple(tuple(part.numpy() for part in split) for split in data)
    origin = origin_of_rows(device)
    jobs = []
    for number, run in enumerate(runs):
        device_of_run = device
        if device == "cuda":
            device_of_run = f"cuda:{number % torch.cuda.device_count()}"
        read_test = run.experiment in (*SELECTED, *RECALLS)
        jobs.append(joblib.delayed(execute)(run, arrays, device_of_run, origin, read_test))
    if dask is not None:
        from dask.distributed import Client  # pip install "dask[distributed]"

        with Client(dask) as client:
            client.upload_file(metrics.__file__)  # this file's functions travel by value
            with joblib.parallel_config("dask"):
                yield from joblib.Parallel(return_as="generator_unordered", batch_size=1)(jobs)
    elif workers == 1:
        for function, args, kwargs in jobs:
            yield function(*args, **kwargs)
    else:
        # mmap_mode "c": the workers share the images' memory, and torch takes it as writable
        options = {"return_as": "generator_unordered", "batch_size": 1, "mmap_mode": "c"}
        options |= {"initializer": end_with_parent, "initargs": (os.getpid(),)}
        # loky replaces a worker that has grown by 300 MB between two runs, and loses nothing by it
        warnings.filterwarnings("ignore", "A worker stopped while some jobs")
        # of a job that is stopped: what was in the making is trained again when it goes on
        warnings.filterwarnings("ignore", r"\d+ tasks (which|have)")
        try:
            yield from joblib.Parallel(workers, **options)(jobs)
        finally:  # also when it is stopped: leave no worker and no mapped file behind
            get_reusable_executor().shutdown(kill_workers=True)


def end_with_parent(parent: int) -> None:
    """In a worker: end it once its parent is gone, so that a killed job leaves none behind.

    Ctrl-C in a terminal reaches the workers, too: they leave it to the parent, which ends them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def print_result(folder: Path, experiments: list[str]) -> None:
    """At most ten lines: the selected models' test scores, recall's and the control's values, and
    of each other sweep the lowest and the highest."""
    runs = metrics.load_rows(folder / "runs.csv")
    lines = []
    for name in experiments:
        rows = runs[runs["experiment"] == name]
        if name in SELECTED:
            scores = metrics.summarise(100 * rows["test_accuracy"])
            lines.append(f"{name}: test accuracy {scores} % (n = {scores.n})")
        elif name != "faults":
            means = 100 * rows.groupby("value", sort=False)["val_accuracy"].mean()
            if name in ("recall", "control"):
                for value, mean in means.items():
                    lines.append(f"{name}, {value}: validation accuracy {mean:.2f} %")
                continue
            low = f"{means.min():.2f} % ({means.idxmin()})"
            high = f"{means.max():.2f} % ({means.idxmax()})"
            lines.append(f"{name}: validation accuracy from {low} to {high}")
    if len(lines) > 9:
        lines = [*lines[:8], f"and {len(lines) - 8} more results"]
    print("\n".join([*lines, f"tables and pictures: {folder / 'summary.md'}"]))


def train_one(command: TrainCommand) -> None:
    """Train the user's network, save its rows named by what was changed, print its scores."""
    device = device_of(command.device)
    config = command.config
    name = name_of_changes(config)
    run = Run(name, name, config)
    folder = folder_of(command.out or HERE / "out")
    data = load_data(command.data_dir, command.download)
    with claimed(folder):
        metrics.drop_rows_of_no_run(folder)
        print(f"stage 3 on {device_name(device)}: 1 thread, results in {folder}")
        print(f"{name}: {config}", flush=True)
        arrays = tuple(tuple(part.numpy() for part in split) for split in data)
        is_terminal = sys.stderr.isatty()
        with tqdm(total=config.n_steps, unit="step", disable=not is_terminal) as bar:

            def on_row(row: dict) -> None:
                bar.set_postfix_str(progress(row), refresh=False)
                bar.update(row["step"] - bar.n)
                if not is_terminal:
                    print(
                        f"step {row['step']:,} of {config.n_steps:,}: {progress(row)}", flush=True
                    )

            origin = origin_of_rows(device)
            tables, weights = execute(run, arrays, device, origin, command.test, on_row)
        if command.save is not None:
            save_weights(command.save, config, weights)
        metrics.replace_rows(folder, tables, order_of_rows())
        curves = folder / f"curves_{name.replace(', ', '_').replace(' ', '-')[:100]}.png"
        metrics.draw_curves(curves, pd.DataFrame(tables["history"]), f"Attention, {name}")
        draw_all(folder)
    row = tables["runs"][0]
    for part, images in (("val", "validation images"), ("test", "test images, because of --test")):
        if f"{part}_loss" in row:
            numbers = [
                f"{s.replace('_', ' ')} {100 * row[f'{part}_{s}']:.2f} %" for s in SCORES[1:]
            ]
            print(f"{images}: {', '.join(numbers)}, loss {row[f'{part}_loss']:.4f}")
    print(f"{row['status']}; tables in {folder / 'summary.md'}, curves in {curves}")
    if command.save is not None:
        print(f"weights in {command.save}, for predict --weights")


def name_of_changes(config: Config) -> str:
    """What differs from the defaults, as "n kv heads 2, lr 0.01"; the seed is named by itself."""
    words = []
    for name, text in config_columns(config).items():
        if text != config_columns(BASE)[name]:
            words.append(f"{name.replace('_', ' ')} {text}")
    return ", ".join(words) or "defaults"


# -------- predict: images of one's own ------------------------------------------------------------


def read_garment(path: Path) -> np.ndarray:
    """An image file made into what Fashion-MNIST's images are: (28, 28) float32, bright on black.

    As Fashion-MNIST was made of product photos (Xiao 2017, section 2): what has the background's
    grey is trimmed away, the longest edge becomes 28 pixels, the image is sharpened and put into
    the middle of 28 × 28; a light background is negated. ValueError if the file is no image or
    nothing stands out in it.
    """
    grey = read_grey(path)
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    background = np.median(border)
    if background > (grey.min() + grey.max()) / 2:  # a garment on light ground
        shown = (background - grey) / background
    else:
        shown = (grey - background) / max(1 - background, 0.1)
    shown = shown.clip(0, 1)
    if shown.max() < 0.1:
        raise ValueError(f"{path}: no garment to be seen, the image is nearly even")

    pieces, n_pieces = ndimage.label(shown > 0.05, np.ones((3, 3)))
    sizes = ndimage.sum_labels(shown, pieces, range(1, n_pieces + 1))
    is_garment = np.isin(pieces, 1 + np.flatnonzero(sizes > 0.05 * sizes.max()))  # no dirt
    rows = np.flatnonzero(is_garment.any(1))
    columns = np.flatnonzero(is_garment.any(0))
    shown = np.where(is_garment, shown, 0)[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]

    height, width = (max(1, round(28 * side / max(shown.shape))) for side in shown.shape)
    shrunk = Image.fromarray(shown.astype(np.float32)).resize((width, height), Image.Resampling.BOX)
    eight_bits = Image.fromarray((255 * np.asarray(shrunk)).round().astype(np.uint8))
    sharp = eight_bits.filter(ImageFilter.UnsharpMask(radius=1, percent=50, threshold=0))
    top = (28 - height) // 2
    left = (28 - width) // 2
    image = np.zeros((28, 28), np.float32)
    image[top : top + height, left : left + width] = np.asarray(sharp) / 255
    return image


def read_grey(path: Path) -> np.ndarray:
    """An image file of any size and mode as grey values 0 … 1, (H, W), each at most 400."""
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):  # more than 8 bits
                grey = np.asarray(picture, dtype=np.float32)
            else:
                layers = np.asarray(picture.convert("RGBA"), dtype=np.float32)
                grey = layers[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32)
                opacity = layers[..., 3] / 255
                ink = (grey * opacity).sum() / max(opacity.sum(), 1)
                paper = 255.0 if ink < 128 else 0.0  # what shows the ink where it is transparent
                grey = grey * opacity + paper * (1 - opacity)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not an image that can be read ({error})") from None
    white = 255.0 if grey.max() <= 255 else grey.max()
    shrunk = Image.fromarray((grey / white).astype(np.float32))
    shrunk.thumbnail((400, 400), Image.Resampling.BOX)
    return np.asarray(shrunk)


def save_weights(path: Path, config: Config, weights: dict[str, Tensor]) -> None:
    """Weights and Config in one file, which `load_weights` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with metrics.written_aside(path) as aside, open(aside, "wb") as file:
        torch.save({"config": asdict(config), "weights": weights}, file)


def load_weights(path: Path) -> AttentionClassifier:
    """The network of a file of `save_weights`; ValueError says what is wrong with another file."""
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
        config = Config(**saved["config"])
        config.check()
        model = AttentionClassifier(config)
        model.load_state_dict(saved["weights"])
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file; train --save writes one") from None
    except Exception as error:  # a damaged file makes torch.load raise nearly anything
        reason = f" ({error})" if isinstance(error, ValueError) else ""  # what Config's check says
        wanted = "train --save writes such a file"
        raise ValueError(f"{path}: not weights of this stage{reason}; {wanted}") from None
    return model.eval()


def predict(command: PredictCommand) -> int:
    """A line for each image with the two likeliest classes; 1 if one of them could not be read."""
    model = load_weights(command.weights)
    if model.config.task != "clothes":
        raise ValueError(f"{command.weights}: weights of recall, which name no classes")
    seen = []
    for path in command.images:
        try:
            image = read_garment(path)
        except ValueError as error:
            print(f"{SCRIPT}: {error}", file=sys.stderr)
            continue
        pixels = normalised(torch.from_numpy(255 * image))  # (28, 28)
        with torch.no_grad():
            probabilities, classes = logits_of(model, pixels[None]).softmax(1)[0].topk(2)
            likeliest = zip(probabilities, classes, strict=True)
            answers = [f"{CLASSES[c]} {100 * p:.1f} %" for p, c in likeliest]
        print(f"{path}: {', '.join(answers)}")
        seen.append((f"{path.name[-18:]}\n{answers[0]}", image))
    if command.save_picture is not None and seen:
        n_columns = min(len(seen), 8)
        n_rows = math.ceil(len(seen) / n_columns)
        size = {"width": 1.7 * n_columns + 1, "height": 2.2 * n_rows + 0.6, "squeeze": False}
        title = "What the network saw"
        with metrics.picture(command.save_picture, title, n_rows, n_columns, **size) as panels:
            for axes in panels.flat:
                axes.axis("off")
            for axes, (label, image) in zip(panels.flat, seen, strict=False):
                axes.imshow(image, cmap="gray", vmin=0, vmax=1)
                axes.set_title(label, fontsize=10)
    return 0 if len(seen) == len(command.images) else 1


# -------- benchmark -------------------------------------------------------------------------------


def benchmark(command: BenchmarkCommand) -> None:
    """Times taken in turn, saved, drawn, printed as ratios (lower is better)."""
    device = device_of(command.device)
    folder = folder_of(command.out or (tempfile.mkdtemp() if command.smoke else HERE / "figures"))
    repeats = 1 if command.smoke else 7
    with claimed(folder):
        print(f"benchmark of stage 3 on {device_name(device)}, results in {folder}", flush=True)
        print("decoding, beside copied heads, torch and one reading of the cache …", flush=True)
        lengths = (256,) if command.smoke else (256, 1024, 4096, 16_384)
        times = time_decoding(lengths, device, repeats)
        rows = decode_ratios(times)
        print("forward and backward of a layer, beside nn.MultiheadAttention …", flush=True)
        shapes = ((28, 96, 256), (28, 512, 32), (512, 64, 4), (512, 512, 4))
        n_steps = 1 if command.smoke else 10
        rows += time_steps(shapes[: 1 if command.smoke else 4], device, repeats, n_steps)
        print("decoding from the cache, beside computing everything again …", flush=True)
        rows += time_cache((16,) if command.smoke else (16, 64, 256), device, repeats)
        origin = origin_of_rows(device) | {"threads": torch.get_num_threads()}
        tables = {"decode": times, "benchmark": rows}
        for name, found in tables.items():
            tables[name] = [{"experiment": "benchmark"} | row | origin for row in found]
        metrics.replace_rows(folder, tables, [])
        pictures = metrics.Pictures()
        add_speed(pictures, folder)
        pictures.draw()
        renew_summary(folder)
    for row in rows:
        print(f"{row['ratio']:.2f}  {row['name']}")


def seconds_in_turn(calls: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median seconds of each call, in turn: what else the machine does falls on all alike."""
    from torch.utils.benchmark import Timer

    threads = torch.get_num_threads()
    seconds = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            timer = Timer("call()", globals={"call": call}, num_threads=threads)
            seconds[name].append(timer.timeit(1).mean)  # which warms up by itself
    return {name: float(np.median(values)) for name, values in seconds.items()}


def ratio_row(name: str, first: float, second: float, unit: str) -> dict:
    return {"name": name, "first": first, "second": second, "unit": unit, "ratio": first / second}


def repeated(call: Callable, times: int) -> None:
    for _ in range(times):
        result = call()
    result[0].sum().item()  # wait for the device


def copied_to_every_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    """What one writes first: the shared heads copied, so that each query head has its own."""
    group_size = q.shape[1] // k.shape[1]
    if group_size > 1:
        k = k.repeat_interleave(group_size, 1)
        v = v.repeat_interleave(group_size, 1)
    return (F.scaled_dot_product_attention(q, k, v),)


def torchs_grouped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    return (F.scaled_dot_product_attention(q, k, v, enable_gqa=True),)


def read_once(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return k.sum(), v.sum()


WAYS = {
    OURS: attention,
    COPIED: copied_to_every_head,
    TORCHS: torchs_grouped,
    READ_LIMIT: read_once,
}


@torch.no_grad()
def time_decoding(lengths: tuple[int, ...], device: str, repeats: int) -> list[dict]:
    """One query against a cache of S tokens: a row for each number of key/value heads and way,
    but that nothing is copied where there are as many of them as query heads.

    For all ways the cache has room for 256 tokens more, as in the midst of decoding.
    """
    torch.manual_seed(0)
    B = 4
    H = 16
    d = 64
    rows = []
    for S, G in itertools.product(lengths, (16, 8, 4, 2, 1)):
        cache = KVCache(B, G, S + 256, d, device=device)
        q = torch.randn(B, H, 1, d, device=device)
        k, v = cache.append(*torch.randn(2, B, G, S, d, device=device))
        times = max(1, 2**14 // (S * G))  # a short way often, so that a clock can time it
        ways = {name: partial(repeated, partial(way, q, k, v), times) for name, way in WAYS.items()}
        if G == H:
            del ways[COPIED]  # there is nothing to copy
        row = {"cached": S, "n_kv_heads": G, "cache_bytes": k.nbytes + v.nbytes}  # of S tokens
        for way, seconds in seconds_in_turn(ways, repeats).items():
            rows.append(row | {"way": way, "milliseconds": 1000 * seconds / times})
    return rows


def decode_ratios(times: list[dict]) -> list[dict]:
    """At the longest cache: ours with 4 and 1 key/value heads over ours with 16, which is what
    sharing gains; then ours over each other way."""
    longest = max(row["cached"] for row in times)
    at_longest = [row for row in times if row["cached"] == longest]
    ours = {row["n_kv_heads"]: row["milliseconds"] for row in at_longest if row["way"] == OURS}
    rows = []
    for G in (4, 1):
        name = f"decoding, {longest:,} cached tokens, {G} / 16 key/value heads"
        rows.append(ratio_row(name, ours[G], ours[16], "ms"))
    for G in (16, 4, 1):
        found = [row for row in at_longest if row["n_kv_heads"] == G]
        by_way = {row["way"]: row["milliseconds"] for row in found}
        for way in (COPIED, TORCHS, READ_LIMIT):
            if way not in by_way:  # at 16 heads nothing is copied
                continue
            name = f"decoding, {longest:,} cached tokens, {G} key/value head{'s' if G > 1 else ''}"
            rows.append(ratio_row(f"{name} / {way}", by_way[OURS], by_way[way], "ms"))
    return rows


def forward_and_backward(layer: nn.Module, inputs: tuple, options: dict) -> tuple[Tensor]:
    """Forward and backward of one layer, without an optimizer's update."""
    for parameter in layer.parameters():
        parameter.grad = None
    loss = layer(*inputs, **options)[0].square().mean()
    loss.backward()
    return (loss.detach(),)


def time_steps(shapes: tuple, device: str, repeats: int, n_steps: int) -> list[dict]:
    """Forward and backward of a layer of 8 heads, beside nn.MultiheadAttention's.

    `shapes`: (tokens, width, batch) of the inputs.
    """
    torch.manual_seed(0)
    rows = []
    for T, D, B in shapes:
        x = torch.randn(B, T, D, device=device)
        theirs = nn.MultiheadAttention(D, 8, batch_first=True).to(device)
        with_weights = {"average_attn_weights": False}
        steps = {
            "ours": partial(forward_and_backward, MultiHeadAttention(D, 8).to(device), (x,), {}),
            "shared": partial(forward_and_backward, MultiQueryAttention(D, 8).to(device), (x,), {}),
            "weights": partial(forward_and_backward, theirs, (x, x, x), with_weights),
            "none": partial(forward_and_backward, theirs, (x, x, x), {"need_weights": False}),
        }
        ways = {name: partial(repeated, step, n_steps) for name, step in steps.items()}
        ms = {name: 1000 * s / n_steps for name, s in seconds_in_turn(ways, repeats).items()}
        name = f"layer forward and backward, {T} tokens of width {D}"
        torchs = "nn.MultiheadAttention"
        rows.append(ratio_row(f"{name} / {torchs}'s", ms["ours"], ms["weights"], "ms"))
        without = f"{name} / {torchs}'s, no weights given"
        rows.append(ratio_row(without, ms["ours"], ms["none"], "ms"))
        shared = f"{name}, 1 key/value head / 8 key/value heads"
        rows.append(ratio_row(shared, ms["shared"], ms["ours"], "ms"))
    return rows


@torch.no_grad()
def time_cache(lengths: tuple[int, ...], device: str, repeats: int) -> list[dict]:
    """A sequence decoded token by token: from the cache, and with everything computed again."""
    config = replace(BASE, causal=True, position="sinusoidal", readout="mean")
    model = build(config, device).eval()
    rows = []
    for n in lengths:
        tokens = torch.randn(1, n, 28, device=device)
        ways = {
            "cached": partial(decode, model, tokens),
            "again": partial(decode_without_cache, model, tokens),
        }
        ms = {name: 1000 * seconds for name, seconds in seconds_in_turn(ways, repeats).items()}
        name = f"decoding {n} tokens from the cache / computing all again"
        rows.append(ratio_row(name, ms["cached"], ms["again"], "ms"))
    return rows


def decode_without_cache(model: AttentionClassifier, tokens: Tensor) -> Tensor:
    """The logits of a causal model: for every new token, all so far are computed again."""
    lengths = range(1, tokens.shape[1] + 1)
    states = [model.states(tokens[:, :length])[0][:, -1:] for length in lengths]
    return model.read(torch.cat(states, 1))


# -------- demo ------------------------------------------------------------------------------------


def demo(command: DemoCommand) -> None:
    """A random matrix through the three layers: its weights, and who shares what.

    All that it takes, to be copied as it stands; run in this file's folder:

        import torch, stage3_attention
        torch.manual_seed(0)
        x = 2 * torch.randn(1, 6, 96)  # a random matrix: six tokens of width 96
        layer = stage3_attention.MultiHeadAttention(d_model=96, n_heads=8)
        print(layer(x)[1][0, 0].detach())  # weights of head 0: a row a query, which sums to 1

    The factor 2 makes the scores four times as large. Without it a layer that is not trained
    gives all six tokens nearly the same weight, 1/6, and there is nothing to see.
    """
    x, layers = demo_layers(command)
    _, weights = layers["MHA"](x)  # the output (1, 6, D), and the weights (1, H, 6, 6)
    print("attention weights of multi-head attention, head 0: a row for each of the six tokens")
    print(weights[0, 0].detach())
    sums = [f"{number:.6f}" for number in weights[0, 0].sum(-1).tolist()]
    print(f"its rows sum to {', '.join(sums)}; drawing …", flush=True)
    tables = demo_tables(x, layers)
    folder = folder_of(command.out or HERE / "figures")
    with claimed(folder):
        metrics.replace_rows(folder, tables, [])
        pictures = metrics.Pictures()
        add_demo(pictures, folder)
        pictures.draw()
        renew_summary(folder)
    links = links_of(pd.DataFrame(tables["sharing"]))
    for (name, kv_head), own in links.groupby(["layer", "kv_head"], sort=False):
        readers = ", ".join(map(str, own["query_head"]))
        print(f"{name}: key/value head {kv_head} is read by the query heads {readers}")
    print(f"pictures: {folder / 'demo_weights.png'}, {folder / 'demo_sharing.png'}")


def demo_layers(command: DemoCommand) -> tuple[Tensor, dict[str, nn.Module]]:
    """The random matrix x (1, 6, D), and a layer of each kind with random weights of its own."""
    D = command.d_model
    H = command.n_heads
    torch.manual_seed(command.seed)
    x = 2 * torch.randn(1, 6, D)
    layers = {
        "MHA": MultiHeadAttention(D, H),
        "GQA": GroupedQueryAttention(D, H, command.n_kv_heads),
        "MQA": MultiQueryAttention(D, H),
    }
    return x, layers


@torch.no_grad()
def demo_tables(x: Tensor, layers: dict[str, nn.Module]) -> dict[str, list[dict]]:
    """The weights of each layer's heads, a row for each query, and who shares what."""
    tables = {"demo": [], "sharing": []}
    for name, layer in layers.items():
        H = layer.n_heads
        G = layer.n_kv_heads
        _, weights = layer(x)  # (1, H, 6, 6)
        for head, query in itertools.product(range(H), range(6)):
            own = weights[0, head, query]
            row = {"experiment": "demo", "layer": name, "head": head, "query": query}
            row["reads"] = f"key/value head {head // (H // G)}"
            row |= {"weights": text_of(own), "row_error": own.sum().item() - 1}
            tables["demo"].append(row)
        tables["sharing"] += sharing_rows(name, layer, x)
    return tables


def sharing_rows(name: str, layer: nn.Module, x: Tensor) -> list[dict]:
    """Disturb the keys, then the values, of one key/value head after the other: which query heads
    give something else? The layer itself stays as it is."""
    G = layer.n_kv_heads
    q = split_heads(layer.W_q(x), layer.n_heads)  # (1, H, 6, d)
    k = split_heads(layer.W_k(x), G)  # (1, G, 6, d)
    v = split_heads(layer.W_v(x), G)  # (1, G, 6, d)
    before, _ = attention(q, k, v)  # (1, H, 6, d)
    rows = []
    for kv_head in range(G):
        other_k = k.clone()
        other_k[:, kv_head, 0] += 1  # of one token: one shift of all keys cancels in the softmax
        other_v = v.clone()
        other_v[:, kv_head] += 1
        for part, after in (
            ("keys", attention(q, other_k, v)[0]),
            ("values", attention(q, k, other_v)[0]),
        ):
            change = (after - before).abs().amax((0, 2, 3))  # (H,)
            for head, amount in enumerate(change.tolist()):
                row = {"experiment": "demo", "layer": name, "kv_head": kv_head, "disturbed": part}
                rows.append(row | {"query_head": head, "change": amount})
    return rows


if __name__ == "__main__":
    sys.exit(main())
