"""Stage 2: an RNN (循环神经网络), a GRU and an LSTM of nn.Linear read Fashion-MNIST as rows.

    python stage2_rnn.py                              the brief's questions, one seed each
    python stage2_rnn.py --only cell units --seeds 3  some experiments; --only all: every one
    python stage2_rnn.py train --cell gru --init orthogonal   one network of your own
    python stage2_rnn.py predict shirt.png            what the trained network makes of your images
    python stage2_rnn.py benchmark                    speed, beside nn.RNN, nn.GRU and nn.LSTM
    python stage2_rnn.py plot                         draw figures/stage2/ again from its saved rows

Results go to figures/stage2/. Runs that are found finished there, as the committed ones are, are
not trained again: `--out out` trains them into out/.

Read `RNNCell`, `read` and `train` first: they are the whole idea. `GRUCell` and `LSTMCell` change
one step of it. `bptt` is what `loss.backward()` does, by hand. `EXPERIMENTS` is the table of
everything that was tried.

Config, Data, Model, Training and Experiments are the assignment; Pictures, Commands, predict and
benchmark are what surrounds it.

Axis letters in shape comments: B batch, C classes, F values of a step, G gates of a cell, its
candidate among them, H hidden units, L cells (layers · directions), N images, T steps.
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

    # the plain RNN with tanh or with ReLU, or one with gates
    cell: Literal["rnn", "rnn_relu", "gru", "lstm"] = "rnn_relu"
    # hidden units of a layer, in each direction
    n_hidden: int = 256
    # layers, each reads the outputs of the one below
    n_layers: int = 1
    # read each sequence backwards as well
    bidirectional: bool = False
    # how W_hh is drawn, see initialise
    init: Literal["default", "orthogonal", "identity", "large"] = "identity"
    # of an LSTM: the bias of its forget gate at the start; 0 leaves it as init draws it
    forget_bias: float = 0.0
    # how an image becomes a sequence, see sequences
    reading: Literal["rows", "columns", "two_rows", "patches"] = "two_rows"
    # what is classified: the state after the last step, or the mean of all steps' outputs
    readout: Literal["last", "mean"] = "last"
    # steps of zeros, an even grey, after each sequence
    padding: int = 0
    # only the rows that show the garment: sequences of unequal length
    crop: bool = False
    # tell the network where each sequence ends
    lengths: bool = False
    # whose mean and std scale the pixels; none leaves them at 0 … 1
    normalise: Literal["fashion_mnist", "mnist", "none"] = "fashion_mnist"
    # mirror each training image with probability ½, left to right; --no-flip: never
    flip: bool = True
    # move each training image by up to that many pixels, sideways and up or down, at random
    shift: int = 0
    # evaluate on every image and on its mirror image: the mean of the logits
    both_views: bool = False
    # share zeroed, while training, of what a layer hands to the next and of what is classified
    dropout: float = 0.0
    # share of the target that is spread evenly over all classes
    label_smoothing: float = 0.1
    # update rule
    optimizer: Literal["sgd", "adamw"] = "adamw"
    # highest learning rate of the schedule
    lr: float = 2e-3
    # of weights, not of biases; made for adamw, with sgd it is an L2 penalty: give 0
    weight_decay: float = 0.3
    # share of the run in which the learning rate rises; then it falls along a cosine
    warmup: float = 0.3
    # largest gradient norm; 0 switches clipping off
    clip: float = 1.0
    # a new random order of the images in every epoch; --no-shuffle: class by class, a fault
    shuffle: bool = True
    # images of one update
    batch_size: int = 256
    # passes over the training images
    epochs: int = 40
    # number of updates, whatever epochs says; 0 leaves it to epochs
    steps: int = 0
    # training images used
    n_train: int = 55_000
    # how often a run is evaluated on its way
    n_logs: int = 20
    # of weights, batch order, mirroring, shifting, dropout; never of the validation split
    seed: int = 0

    @property
    def n_steps(self) -> int:
        return self.steps or self.epochs * math.ceil(self.n_train / self.batch_size)

    def check(self) -> None:
        """ValueError that names the field and the value, and says what would be right."""
        limits = {
            "n_hidden": (1, 16_384),
            "n_layers": (1, 100),
            "forget_bias": (-100, 100),
            "padding": (0, 100_000),
            "shift": (0, 27),
            "dropout": (0, 0.99),
            "label_smoothing": (0, 1),
            "lr": (1e-12, 1e32),
            "weight_decay": (0, 1e6),
            "warmup": (0, 0.99),
            "clip": (0, 1e12),
            "batch_size": (1, 60_000),
            "epochs": (1, 10_000),
            "steps": (0, 10_000_000),
            "n_train": (1, N_TRAIN),
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


def check_range(name: str, value: float, low: float, high: float) -> None:
    """ValueError unless low <= value <= high; a nan is refused too."""
    flag = "--" + name.replace("_", "-")
    if not low <= value:
        raise ValueError(f"{name} must be at least {low:,}, not {value:,} ({flag})")
    if not value <= high:
        raise ValueError(f"{name} must be at most {high:,}, not {value:,} ({flag})")


# -------- Data ------------------------------------------------------------------------------------

SCALES = {  # mean and std of the training pixels scaled to 0 … 1
    "fashion_mnist": (0.2860, 0.3530),
    "mnist": (0.1307, 0.3081),
    "none": (0.0, 1.0),
}
MEAN, STD = SCALES["fashion_mnist"]
N_TRAIN, N_VAL = 55_000, 5_000  # of the 60,000 training images; the 10,000 test images stay whole
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
DATASET = "FashionMNIST"  # MNIST's files have the same names: only checksums tell them apart
SHA256 = {  # of the unpacked files
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


class Split(NamedTuple):
    images: Tensor  # (N, 28, 28) float32
    labels: Tensor  # (N,) int64


class Data(NamedTuple):
    train: Split  # in a random order, so that the first n of them are a fair sample
    val: Split  # class by class, 500 of each
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
    """Fashion-MNIST whole: 55,000 / 5,000 / 10,000 images, normalised; DataError names a bad file.

    The validation images are stratified, of every class a twelfth, and always the same.
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


def scaled_as(config: Config, data: Data) -> Data:
    """The same images with the mean and std that the Config names."""
    if config.normalise == "fashion_mnist":
        return data
    mean, std = SCALES[config.normalise]
    return Data(*(Split((split.images * STD + MEAN - mean) / std, split.labels) for split in data))


def blank_pixel(config: Config) -> float:
    """The value of the empty background, once it is normalised."""
    mean, std = SCALES[config.normalise]
    return -mean / std


def augmented(images: Tensor, flip: bool, shift: int, blank: float) -> Tensor:
    """Images (B, 28, 28), each mirrored with probability ½ if `flip`, and moved by up to `shift`
    pixels, sideways and up or down; what moves in from outside is `blank`."""
    B = len(images)
    device = images.device
    if flip:
        is_mirrored = torch.rand(B, 1, 1, device=device) < 0.5
        images = torch.where(is_mirrored, images.flip(2), images)
    if shift > 0:
        wide = F.pad(images, (shift,) * 4, value=blank)  # (B, 28 + 2 shift, 28 + 2 shift)
        corner = torch.randint(2 * shift + 1, (2, B, 1), device=device)
        down, right = corner + torch.arange(28, device=device)  # (B, 28) each
        image = torch.arange(B, device=device)
        images = wide[image[:, None, None], down[:, :, None], right[:, None, :]]
    return images


def sequences(images: Tensor, config: Config) -> tuple[Tensor, Tensor | None]:
    """Images (B, 28, 28) as the Config reads them: x (B, T, F), and lengths (B,) or None.

    "rows" from top to bottom; "columns" from left to right; "two_rows" at a step, T = 14; "patches"
    of 7 × 4 pixels, 28 of them, row by row. A cropped sequence begins with the garment's first row
    (or column, …) and ends with its last; what is empty follows.
    """
    if config.reading == "rows":
        x = images
    elif config.reading == "columns":
        x = images.mT
    elif config.reading == "two_rows":
        x = images.reshape(-1, 14, 56)
    else:
        patches = images.reshape(-1, 4, 7, 7, 4).transpose(2, 3)  # (B, 4 down, 7 right, 7, 4)
        x = patches.reshape(-1, 28, 28)
    B, T, _ = x.shape
    lengths = torch.full((B,), T, device=x.device)
    if config.crop:
        is_shown = (x > blank_pixel(config) + 1e-4).any(2).int()  # (B, T)
        first = is_shown.argmax(1)
        after_last = T - is_shown.flip(1).argmax(1)
        lengths = after_last - first
        order = (first[:, None] + torch.arange(T, device=x.device)) % T
        x = x.take_along_dim(order[:, :, None], 1)  # empty steps all at the end
    x = F.pad(x, (0, 0, 0, config.padding))
    return x, lengths if config.lengths else None


# -------- Model -----------------------------------------------------------------------------------


class RNNCell(nn.Module):
    """The plain recurrent cell (Elman 1990): h' = act(W_xh x + b + W_hh h), act is tanh or relu.

    forward(x, state): x (B, n_in), state (B, H) or None, which is zeros -> the next state (B, H).
    The one bias stands for the sum of the two that nn.RNN has.
    """

    def __init__(self, n_in: int, n_hidden: int, activation: str = "tanh"):
        super().__init__()
        check_sizes(n_in, n_hidden)
        if activation not in ("tanh", "relu"):
            raise ValueError(f"activation must be tanh or relu, not {activation!r}")
        self.W_xh = nn.Linear(n_in, n_hidden)
        self.W_hh = nn.Linear(n_hidden, n_hidden, bias=False)
        self.activation = activation

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        check_step(self, x)
        projected = self.W_xh(x)
        return self.step(projected, start_state(self, state, x, projected))

    def step(self, projected: Tensor, h: Tensor) -> Tensor:
        """The next state, from projected = W_xh(x) (B, H) and the state before, h (B, H)."""
        act = torch.tanh if self.activation == "tanh" else torch.relu
        return act(projected + self.W_hh(h))


class GRUCell(nn.Module):
    """The gated recurrent unit (Cho 2014), with the conventions of nn.GRU.

        r = σ(W_xr x + b_xr + W_hr h + b_hr)           reset gate 重置门
        z = σ(W_xz x + b_xz + W_hz h + b_hz)           update gate 更新门
        n = tanh(W_xn x + b_xn + r ⊙ (W_hn h + b_hn))  candidate 候选状态
        h' = (1 - z) ⊙ n + z ⊙ h

    The paper, and d2l, have W_hn (r ⊙ h) in n: the reset gate comes before the product there.
    forward(x, state) as RNNCell's. Rows of W_xh and W_hh: r, z, n, as in nn.GRU's weights.
    """

    def __init__(self, n_in: int, n_hidden: int):
        super().__init__()
        check_sizes(n_in, n_hidden)
        self.W_xh = nn.Linear(n_in, 3 * n_hidden)
        self.W_hh = nn.Linear(n_hidden, 3 * n_hidden)

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        check_step(self, x)
        projected = self.W_xh(x)
        return self.step(projected, start_state(self, state, x, projected))

    def step(self, projected: Tensor, h: Tensor) -> Tensor:
        """The next state, from projected = W_xh(x) (B, 3H) and the state before, h (B, H)."""
        x_r, x_z, x_n = projected.chunk(3, dim=1)  # x_r = W_xr x + b_xr
        h_r, h_z, h_n = self.W_hh(h).chunk(3, dim=1)  # h_r = W_hr h + b_hr
        r = torch.sigmoid(x_r + h_r)
        z = torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + r * h_n)
        return torch.lerp(n, h, z)  # (1 - z) ⊙ n + z ⊙ h in one operation


class LSTMCell(nn.Module):
    """Long short-term memory (Hochreiter 1997; the forget gate: Gers 2000); its state is (h, c).

        i = σ(W_xi x + b_i + W_hi h)        input gate 输入门
        f = σ(W_xf x + b_f + W_hf h)        forget gate 遗忘门
        g = tanh(W_xg x + b_g + W_hg h)     candidate 候选记忆
        o = σ(W_xo x + b_o + W_ho h)        output gate 输出门
        c' = f ⊙ c + i ⊙ g                  memory 记忆单元
        h' = o ⊙ tanh(c')

    forward(x, state): x (B, n_in), state (h, c), each (B, H), or None -> the next (h, c). Rows of
    W_xh and W_hh: i, f, g, o, as in nn.LSTM's weights; b is the sum of its two biases.
    """

    def __init__(self, n_in: int, n_hidden: int):
        super().__init__()
        check_sizes(n_in, n_hidden)
        self.W_xh = nn.Linear(n_in, 4 * n_hidden)
        self.W_hh = nn.Linear(n_hidden, 4 * n_hidden, bias=False)

    def forward(self, x: Tensor, state=None) -> tuple[Tensor, Tensor]:
        check_step(self, x)
        projected = self.W_xh(x)
        return self.step(projected, start_state(self, state, x, projected))

    def step(self, projected: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The next (h, c), from projected = W_xh(x) (B, 4H) and the (h, c) before."""
        h, c = state
        a_i, a_f, a_g, a_o = (projected + self.W_hh(h)).chunk(4, dim=1)
        i = torch.sigmoid(a_i)
        f = torch.sigmoid(a_f)
        g = torch.tanh(a_g)
        o = torch.sigmoid(a_o)
        c = f * c + i * g
        h = o * torch.tanh(c)
        return h, c


def read(cell: nn.Module, x: Tensor, state=None, is_inside: Tensor | None = None):
    """Let a cell read sequences: x (T, B, F) -> the outputs h of all steps (T, B, H), last state.

    Where is_inside (T, B, 1) is False, past its end, a sequence's state stands still.
    """
    projected = cell.W_xh(x)  # (T, B, G·H): the inputs' part of all steps in one product
    state = start_state(cell, state, x[0], projected[0])
    outputs = []
    for t, projected_t in enumerate(projected.unbind(0)):
        new_state = cell.step(projected_t, state)
        state = new_state if is_inside is None else kept(is_inside[t], new_state, state)
        outputs.append(hidden_of(state))
    return torch.stack(outputs), state


def start_state(cell: nn.Module, state, x: Tensor, projected: Tensor):
    """The state before the first step x (B, F): the given one, or zeros; ValueError on another
    shape or dtype. Under autocast the products' dtype is not x's; both are welcome."""
    shape = (len(x), cell.W_hh.in_features)
    if state is None:
        zeros = projected.new_zeros(shape)
        return (zeros, zeros) if isinstance(cell, LSTMCell) else zeros
    parts = parts_of(state, cell, shape)
    for part in parts:
        if part.dtype not in (x.dtype, projected.dtype):
            raise ValueError(f"a state of the input's {x.dtype} expected, not of {part.dtype}")
    parts = [part.to(projected.dtype) for part in parts]
    return tuple(parts) if isinstance(cell, LSTMCell) else parts[0]


def hidden_of(state) -> Tensor:
    """The h of a state: of an LSTM's (h, c) the first."""
    return state[0] if isinstance(state, tuple) else state


def kept(is_inside: Tensor, new_state, state):
    """The new state of the sequences that go on, the old one of those that have ended."""
    if isinstance(state, tuple):
        return tuple(kept(is_inside, *parts) for parts in zip(new_state, state, strict=True))
    return torch.where(is_inside, new_state, state)


@torch.no_grad()
def bptt(cell: RNNCell, x: Tensor, grad_outputs: Tensor) -> dict[str, Tensor]:
    """Gradients of a plain RNN's parameters by hand: {parameter name: its gradient}.

    Back-propagation through time (随时间反向传播; Werbos 1990), to be read; the tests hold it equal
    to autograd, which trains. x (B, T, n_in); grad_outputs (B, T, H): the part of ∂L/∂h_t that
    comes to h_t directly from the loss. With a_t = W_xh x_t + b + W_hh h_(t-1), h_t = act(a_t) and
    h_0 = 0, from the last step back:
        ∂L/∂h_t = grad_outputs_t + W_hhᵀ δ_(t+1)      directly, and through the step after it
        δ_t = ∂L/∂a_t = ∂L/∂h_t ⊙ act'(a_t)           tanh' = 1 - h_t², relu' = [h_t > 0]
        ∂L/∂W_xh = Σ_t δ_t x_tᵀ       ∂L/∂W_hh = Σ_t δ_t h_(t-1)ᵀ       ∂L/∂b = Σ_t δ_t
    Vectors are columns here. In the code they are rows, one for each sequence of the batch, so
    W_hhᵀ δ is `delta @ W_hh`.
    """
    outputs, _ = read(cell, x.transpose(0, 1))  # (T, B, H)
    grad_W_xh = torch.zeros_like(cell.W_xh.weight)
    grad_W_hh = torch.zeros_like(cell.W_hh.weight)
    grad_b = torch.zeros_like(cell.W_xh.bias)
    delta = torch.zeros_like(outputs[0])  # (B, H): nothing comes after the last step
    for t in reversed(range(len(outputs))):
        h = outputs[t]
        h_before = outputs[t - 1] if t > 0 else torch.zeros_like(h)
        grad_h = grad_outputs[:, t] + delta @ cell.W_hh.weight
        slope = 1 - h**2 if cell.activation == "tanh" else (h > 0).to(h.dtype)
        delta = grad_h * slope
        grad_W_xh += delta.mT @ x[:, t]
        grad_W_hh += delta.mT @ h_before
        grad_b += delta.sum(0)
    return {"W_xh.weight": grad_W_xh, "W_xh.bias": grad_b, "W_hh.weight": grad_W_hh}


CELLS = {
    "rnn": RNNCell,
    "rnn_relu": partial(RNNCell, activation="relu"),
    "gru": GRUCell,
    "lstm": LSTMCell,
}


class Recurrent(nn.Module):
    """Layers of cells over whole sequences: what nn.RNN, nn.GRU and nn.LSTM do, batch first.

    forward(x, lengths, state) -> (outputs, last state)
        x           (B, T, n_in); what it holds past a sequence's end, NaN too, has no influence
        lengths     (B,) whole numbers in 1 … T; None: all are T steps long
        state       (L, B, H) of the L = layers · directions cells, forwards before backwards;
                    of LSTMs a pair (h, c) of these; None: zeros
        outputs     (B, T, H · directions), 0 past a sequence's end
        last state  as state: after each sequence's own last step
    ValueError on other shapes or lengths, and on a state of another dtype than x.
    """

    def __init__(
        self, cell="rnn", n_in=28, n_hidden=128, n_layers=1, bidirectional=False, dropout=0.0
    ):
        super().__init__()
        if cell not in CELLS:
            raise ValueError(f"cell must be one of {', '.join(CELLS)}, not {cell!r}")
        if n_layers < 1:
            raise ValueError(f"at least one layer is needed, not {n_layers=}")
        self.n_layers = n_layers
        self.n_directions = 2 if bidirectional else 1
        self.dropout = dropout  # between layers
        self.cells = nn.ModuleList()
        for layer in range(n_layers):
            n_inputs = n_in if layer == 0 else self.n_directions * n_hidden
            for _ in range(self.n_directions):
                self.cells.append(CELLS[cell](n_inputs, n_hidden))

    def forward(self, x: Tensor, lengths=None, state=None):
        check_sequences(self.cells[0], x)
        x = x.transpose(0, 1)  # (T, B, F): step by step
        T, B, _ = x.shape
        is_inside = None
        if lengths is not None:
            lengths = check_lengths(lengths, B, T, x.device)
            step = torch.arange(T, device=x.device)[:, None]  # (T, 1)
            is_inside = (step < lengths)[:, :, None]  # (T, B, 1)
            x = x.masked_fill(~is_inside, 0)
        start_states = states_of_cells(state, self.cells, B)
        last_states = []
        for layer in range(self.n_layers):
            if layer > 0:
                x = F.dropout(x, self.dropout, self.training)
            outputs = []
            for direction in range(self.n_directions):  # 0 reads forwards, 1 backwards
                i = layer * self.n_directions + direction
                inputs = x if direction == 0 else backwards(x, lengths)
                of_cell, last = read(self.cells[i], inputs, start_states[i], is_inside)
                outputs.append(of_cell if direction == 0 else backwards(of_cell, lengths))
                last_states.append(last)
            x = torch.cat(outputs, 2)  # (T, B, H · directions)
        if is_inside is not None:  # what stands past an end is the state that stood still
            x = x.masked_fill(~is_inside, 0)
        return x.transpose(0, 1), stacked(last_states)


def backwards(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Each sequence of (T, B, F) from its last step to its first; what is past its end stays."""
    if lengths is None:
        return x.flip(0)
    step = torch.arange(len(x), device=x.device)[:, None]  # (T, 1)
    source = torch.where(step < lengths, lengths - 1 - step, step)  # (T, B)
    return x.take_along_dim(source[:, :, None], 0)


class RecurrentClassifier(nn.Module):
    """Recurrent layers, then one nn.Linear on the last state, or on the mean of the outputs.

    forward(x, lengths): sequences (B, T, n_in), lengths as for Recurrent -> logits (B, n_classes).
    """

    def __init__(
        self,
        cell="rnn",
        n_in=28,
        n_hidden=128,
        n_layers=1,
        n_classes=10,
        bidirectional=False,
        readout="last",
        dropout=0.0,
    ):
        super().__init__()
        if readout not in ("last", "mean"):
            raise ValueError(f"readout must be last or mean, not {readout!r}")
        self.recurrent = Recurrent(cell, n_in, n_hidden, n_layers, bidirectional, dropout)
        self.out = nn.Linear(n_hidden * self.recurrent.n_directions, n_classes)
        self.readout = readout
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, lengths=None) -> Tensor:
        outputs, state = self.recurrent(x, lengths)
        if self.readout == "last":
            return self.classify(state)
        n_steps = x.shape[1] if lengths is None else torch.as_tensor(lengths).to(x.device)[:, None]
        return self.out(self.dropout(outputs.sum(1) / n_steps))

    def classify(self, state) -> Tensor:
        """The logits (B, n_classes) of a state of the recurrent layers."""
        of_top_layer = hidden_of(state)[-self.recurrent.n_directions :]  # (directions, B, H)
        return self.out(self.dropout(of_top_layer.transpose(0, 1).flatten(1)))


@torch.no_grad()
def initialise(model: RecurrentClassifier, init: str, forget_bias: float = 0.0) -> None:
    """How W_hh starts, gate by gate; all but "default" set b_xh to 0.

    "default": as nn.Linear draws it, U(±1 / √H), which a GRU's b_hh always is. "orthogonal":
    W_hh h is as long as h (Saxe 2014). "large": twice as long. "identity": for ReLU (Le 2015). An
    LSTM's forget gate gets its own bias: 1 keeps it open at the start (Jozefowicz 2015), ln T for T
    steps (Tallec 2018).
    """
    for cell in model.recurrent.cells:
        H = cell.W_hh.in_features
        if init != "default":
            nn.init.zeros_(cell.W_xh.bias)
            for gate in cell.W_hh.weight.split(H):  # (H, H)
                if init == "identity":
                    nn.init.eye_(gate)
                else:
                    nn.init.orthogonal_(gate, gain=2.0 if init == "large" else 1.0)
        if isinstance(cell, LSTMCell) and forget_bias != 0:
            cell.W_xh.bias[H : 2 * H] = forget_bias


# States, of one cell and of all; checks


def parts_of(state, cell: nn.Module, shape: tuple[int, ...]) -> list[Tensor]:
    """The tensors of a state, an LSTM's two or the one; ValueError unless each has the shape."""
    n_parts = 2 if isinstance(cell, LSTMCell) else 1
    parts = list(state) if isinstance(state, tuple | list) else [state]
    found = [tuple(part.shape) for part in parts]
    if found != [shape] * n_parts:
        raise ValueError(f"a state of {n_parts} × {shape} expected, not of shapes {found}")
    return parts


def states_of_cells(state, cells: nn.ModuleList, B: int) -> list:
    """A state of all cells, (L, B, H) or a pair of these, as a list of each cell's own."""
    if state is None:
        return [None] * len(cells)
    parts = parts_of(state, cells[0], (len(cells), B, cells[0].W_hh.in_features))
    of_cells = zip(*(part.unbind(0) for part in parts), strict=True)
    return [of_cell if len(of_cell) == 2 else of_cell[0] for of_cell in of_cells]


def stacked(states: list):
    """The cells' states as one, (L, B, H), or of LSTMs a pair of these."""
    if isinstance(states[0], tuple):
        return tuple(torch.stack(parts) for parts in zip(*states, strict=True))
    return torch.stack(states)


def check_sizes(n_in: int, n_hidden: int) -> None:
    if min(n_in, n_hidden) < 1:
        raise ValueError(f"a cell needs at least one input and one unit, not {n_in=}, {n_hidden=}")


def check_step(cell: nn.Module, x: Tensor) -> None:
    n_in = cell.W_xh.in_features
    if x.ndim != 2 or x.shape[1] != n_in:
        raise ValueError(f"a step x must be (B, {n_in}), not {tuple(x.shape)}")


def check_sequences(cell: nn.Module, x: Tensor) -> None:
    n_in = cell.W_xh.in_features
    if x.ndim != 3 or x.shape[2] != n_in or x.shape[1] == 0:
        raise ValueError(f"x must be (B, T, {n_in}) with T >= 1, not {tuple(x.shape)}")


def check_lengths(lengths, B: int, T: int, device: torch.device) -> Tensor:
    """Lengths of B sequences as int64 (B,) on the device; ValueError unless each is in 1 … T."""
    given = torch.as_tensor(lengths).to(device)
    if B == 0 and given.numel() == 0:
        return given.long()
    is_whole = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
    found = given.long()  # before it is compared: T may be beyond a small dtype's range
    if not is_whole or found.shape != (B,) or ((found < 1) | (found > T)).any():
        raise ValueError(f"lengths must be {B} whole numbers in 1 … {T}, not {given.tolist()}")
    return found


# -------- Training --------------------------------------------------------------------------------

ROWS = Config(reading="rows")  # for who calls `evaluate` without a Config: row by row


def evaluate(model: nn.Module, split: Split, config: Config = ROWS) -> dict:
    """Loss (nats), accuracy, macro precision, recall and F1 (0 … 1) and the confusion matrix.

    The images are read as the Config says. Without gradients and with dropout off; every module
    gets its own training flag back.
    """
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        logits = logits_of(model, split.images, config)  # (N, C)
    finally:
        for module, flag in was_training.items():
            module.training = flag
    matrix = metrics.confusion_matrix(logits.argmax(1), split.labels, logits.shape[1])
    loss = F.cross_entropy(logits, split.labels).item()  # by hand in stage 1
    return {**metrics.scores(matrix), "loss": loss, "confusion": matrix}


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor, config: Config) -> Tensor:
    """Images (N, 28, 28) -> logits (N, C); if the Config wants both views, the mean of the two."""
    views = [images, images.flip(2)] if config.both_views else [images]
    logits = []
    for view in views:
        chunks = [model(*sequences(chunk, config)) for chunk in view.split(1000)]
        logits.append(torch.cat(chunks))
    return torch.stack(logits).mean(0)


SCORES = ("loss", "accuracy", "macro_precision", "macro_recall", "macro_f1")


def build(config: Config, device: torch.device | str = "cpu") -> RecurrentClassifier:
    """The Config's network on the device.

    It also seeds torch: batch order, mirroring, shifting and dropout that follow are fixed too.
    """
    torch.manual_seed(config.seed)
    n_in = {"rows": 28, "columns": 28, "two_rows": 56, "patches": 28}[config.reading]
    model = RecurrentClassifier(
        config.cell,
        n_in,
        config.n_hidden,
        config.n_layers,
        len(CLASSES),
        config.bidirectional,
        config.readout,
        config.dropout,
    )
    initialise(model, config.init, config.forget_bias)
    return model.to(device)


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The Config's update rule; weights decay, biases do not."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": weights, "weight_decay": config.weight_decay},
        {"params": biases, "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, config.lr, fused=True)
    return torch.optim.AdamW(groups, config.lr, fused=True)


def learning_rate(config: Config, step: int) -> float:
    """The rate of update `step`, 1 … n_steps: a line up (warm-up), then half a cosine down."""
    share = (step - 0.5) / config.n_steps  # of the run, to the middle of the update: never 0
    if share < config.warmup:
        return config.lr * share / config.warmup
    falling = (share - config.warmup) / (1 - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * falling))


def batches(labels: Tensor, config: Config) -> Iterator[Tensor]:
    """Indices (B,) of the batches: all images in a new random order, again and again."""
    while True:
        if config.shuffle:
            order = torch.randperm(len(labels), device=labels.device)
        else:  # a mistake, to be seen: first all of class 0, then all of class 1
            order = labels.argsort(stable=True)
        yield from order.split(config.batch_size)


def train(
    config: Config, data: Data, on_row: Callable[[dict], None] | None = None
) -> tuple[RecurrentClassifier, list[dict]]:
    """Train the Config's network: the model, and a history row at n_logs evenly spaced steps.

    `objective` is the mean of the minimised loss since the row before. The other numbers are plain
    cross-entropy and accuracy in evaluation mode, on the first 5,000 of the training images in use
    and on the validation images, so that the two compare. `on_row` is given each row as it comes.
    If the loss becomes inf or nan, training stops at the next row, which then holds it.
    """
    config.check()
    data = scaled_as(config, data)
    images = data.train.images[: config.n_train]
    labels = data.train.labels[: config.n_train]
    device = images.device
    train_sample = Split(images[:N_VAL], labels[:N_VAL])  # to evaluate on

    model = build(config, device)
    optimizer = make_optimizer(model, config)
    n_steps = config.n_steps
    log_steps = {math.ceil(n_steps * (i + 1) / config.n_logs) for i in range(config.n_logs)}
    history = []
    loss_sum = torch.zeros((), device=device)
    last_log = 0
    start = time.perf_counter()

    endless = batches(labels, config)
    for step, batch in enumerate(itertools.islice(endless, n_steps), 1):
        shown = augmented(images[batch], config.flip, config.shift, blank_pixel(config))
        x, lengths = sequences(shown, config)  # (B, T, F), (B,) or None
        y = labels[batch]  # (B,)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)

        loss = F.cross_entropy(model(x, lengths), y, label_smoothing=config.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        if config.clip > 0:
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)  # before clipping
        elif step in log_steps:
            grad_norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        optimizer.step()
        loss_sum += loss.detach()

        if step in log_steps:
            row = {"step": step, "epoch": step / math.ceil(len(images) / config.batch_size)}
            row["objective"] = loss_sum.item() / (step - last_log)
            training = evaluate(model, train_sample, config)
            validation = evaluate(model, data.val, config)
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

BASE = Config()  # 40 epochs, 8,600 steps
GATED = replace(
    BASE,
    init="orthogonal",
    n_layers=2,
    shift=1,
    both_views=True,
    dropout=0.3,
    weight_decay=0.1,
    epochs=30,
    n_logs=15,
)
WHOLE = replace(BASE, n_hidden=128, epochs=20)
SHORT = replace(BASE, n_hidden=128, steps=600, n_logs=10)  # 2.8 epochs: side questions
PROBE = replace(BASE, reading="rows", n_hidden=64, steps=300, n_logs=10)  # row by row: T = 28
SUITED_INIT = {
    "rnn": "orthogonal",
    "rnn_relu": "identity",
    "gru": "orthogonal",
    "lstm": "orthogonal",
}
CELL_NAMES = {"rnn": "RNN, tanh", "rnn_relu": "RNN, ReLU", "gru": "GRU", "lstm": "LSTM"}
EXPLODING = replace(PROBE, init="large", optimizer="sgd", lr=0.1, weight_decay=0.0)
PADDED = replace(PROBE, cell="gru", init="orthogonal", crop=True, padding=28)

# experiment -> what is varied -> the whole Config of its runs; every run is repeated for each seed
EXPERIMENTS: dict[str, dict[str, Config]] = {
    # selected models: whole trainings, scored on the test images at their end
    "rnn": {"1 layer of 256": BASE},
    "gru": {"2 layers of 256": replace(GATED, cell="gru")},
    "lstm": {"2 layers of 256": replace(GATED, cell="lstm", forget_bias=1.0)},
    # whole trainings, 20 epochs; the LSTM's forget bias starts at 0 here, nn.LSTM's around 0
    "cell": {
        name: replace(WHOLE, cell=cell, init=SUITED_INIT[cell]) for cell, name in CELL_NAMES.items()
    },
    "units": {str(n): replace(WHOLE, n_hidden=n) for n in (16, 32, 64, 128, 256)},
    # side questions about the plain RNN with ReLU, 128 units: 600 steps, but in `steps`
    "layers": {str(n): replace(SHORT, n_layers=n) for n in (1, 2, 3)},
    "steps": {f"{n:,}": replace(SHORT, steps=n) for n in (100, 300, 1000, 3000, 10_000)},
    "learning_rate": {
        f"{lr:g}, {clipping}": replace(SHORT, lr=lr, clip=clip)
        for lr in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
        for clipping, clip in (("not clipped", 0.0), ("clipped at norm 1", 1.0))
    },
    "init": {
        f"{CELL_NAMES[cell]}, {init}": replace(SHORT, cell=cell, init=init)
        for cell in ("rnn", "rnn_relu")
        for init in ("default", "orthogonal", "identity")
    },
    "reading": {
        "rows, 28 steps": replace(SHORT, reading="rows"),
        "columns, 28 steps": replace(SHORT, reading="columns"),
        "two rows, 14 steps": replace(SHORT, reading="two_rows"),
        "7 × 4 patches, 28 steps": replace(SHORT, reading="patches"),
    },
    "direction_readout": {
        "forwards, last state": SHORT,
        "forwards, mean output": replace(SHORT, readout="mean"),
        "both ways, last state": replace(SHORT, bidirectional=True),
        "both ways, mean output": replace(SHORT, bidirectional=True, readout="mean"),
    },
    "normalisation": {
        "Fashion-MNIST's mean, std": SHORT,
        "MNIST's mean, std": replace(SHORT, normalise="mnist"),
        "none: 0 … 1": replace(SHORT, normalise="none"),
    },
    # who remembers the image that many empty steps after it? 300 steps, 64 units, row by row
    "memory": {
        f"{name}, {n} empty steps": replace(PROBE, cell=cell, init=SUITED_INIT[cell], padding=n)
        for cell, name in CELL_NAMES.items()
        for n in (0, 28, 112, 448)
    },
    "forget_bias": {
        name: replace(PROBE, cell="lstm", init="orthogonal", padding=112, forget_bias=bias)
        for name, bias in (("0", 0.0), ("1", 1.0), ("ln 140", math.log(140)))  # 28 + 112 steps
    },
    # what goes wrong, and what mends it: see FAULTS
    "faults": {
        "tanh, default weights": replace(PROBE, cell="rnn", init="default"),
        "tanh, orthogonal W_hh": replace(PROBE, cell="rnn", init="orthogonal"),
        "W_hh doubles, not clipped": replace(EXPLODING, clip=0.0),
        "W_hh doubles, norm clipped at 1": replace(EXPLODING, clip=1.0),
        "answer after the padding": PADDED,
        "answer at the garment's last row": replace(PADDED, lengths=True),
        "sorted by class": replace(PROBE, shuffle=False),
        "in random order": replace(PROBE, shuffle=True),
    },
}
THE_BRIEF = ("rnn", "cell", "units")  # what a bare `run` trains
# chosen on the validation images; only these are judged on the test images, and their weights kept
SELECTED = ("rnn", "gru", "lstm")


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
    """The Config of a smoke run: a narrower network, 640 images, 3 steps, little padding."""
    n_hidden = max(4, config.n_hidden // 16)
    padding = min(config.padding, 28)
    small = {"n_hidden": n_hidden, "padding": padding, "batch_size": 128, "steps": 3, "n_logs": 2}
    return replace(config, n_train=640, **small)


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
    data = scaled_as(config, data)

    row = run.key | config_columns(config) | {"status": status(history)}
    for name in ("train_loss", "train_accuracy", *(f"val_{score}" for score in SCORES), "seconds"):
        row[name] = history[-1][name]
    row["parameters"] = sum(p.numel() for p in model.parameters())
    row |= origin | {"threads": torch.get_num_threads()}
    of_test = {}
    if read_test:
        test = evaluate(model, data.test, config)
        row |= {f"test_{name}": test[name] for name in test if name in SCORES}
        of_test = test_tables(run, test)
    tables = {"runs": [row], "history": [run.key | logged for logged in history]}
    tables |= of_test | side_tables(run, model, history, data)
    return tables, {name: value.cpu() for name, value in model.state_dict().items()}


def test_tables(run: Run, test: dict) -> dict[str, list[dict]]:
    """What `evaluate` found on the test images: scores and confusion matrix."""
    cells = [
        {"true": true, "predicted": predicted, "count": count}
        for true, counts in enumerate(test["confusion"].tolist())
        for predicted, count in enumerate(counts)
    ]
    return {
        "test_metrics": [run.key | {name: test[name] for name in test if name in SCORES}],
        "confusion": [run.key | cell for cell in cells],
    }


def side_tables(
    run: Run, model: RecurrentClassifier, history: list[dict], data: Data
) -> dict[str, list[dict]]:
    """The rows that an experiment has beside its scores: reading, gradients, shares, faults."""
    config = run.config
    tables = {}
    if run.experiment in ("rnn", "gru") and config.seed == 0:  # one without gates, one with
        tables["reading"] = read_step_by_step(model, config, data.test)
    if run.experiment == "init":
        as_probe = replace(config, reading=PROBE.reading, n_hidden=PROBE.n_hidden)
        row = {"cell": config.cell, "init": config.init}
        tables["shares"] = [row | {"share": gradient_ratio(as_probe, history, data)}]
    if run.experiment == "memory" and config.padding == 0:
        tables["gradients"] = gradients_before_and_after(model, config, data)
    if run.experiment == "faults":
        tables["faults"] = fault_rows(run, history, data)
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


def state_gradients(model: RecurrentClassifier, config: Config, data: Data) -> list[float]:
    """Norm of the loss's gradient with respect to the state after each of T steps, (T,).

    On 500 validation images; of an LSTM the norm of both parts of its state.
    """
    x, _ = sequences(data.val.images[::10], config)
    state = None
    parts_of_steps = []
    for step in x.split(1, dim=1):  # one at a time, so that each state is a tensor of its own
        _, state = model.recurrent(step, state=state)
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            part.retain_grad()
        parts_of_steps.append(parts)
    F.cross_entropy(model.classify(state), data.val.labels[::10]).backward()
    norms = []
    for parts in parts_of_steps:
        squares = [part.grad.square().sum() for part in parts if part.grad is not None]
        norms.append(sum(squares).sqrt().item())
    return norms


def gradients_before_and_after(
    model: RecurrentClassifier, config: Config, data: Data
) -> list[dict]:
    """A row a step: the norm of its state's gradient in the new network and in the trained one."""
    networks = {"before training": build(config, data.val.images.device), "after training": model}
    rows = []
    for when, network in networks.items():
        for step, norm in enumerate(state_gradients(network, config, data), 1):
            rows.append({"when": when, "cell": config.cell, "step": step, "norm": norm})
    return rows


def read_step_by_step(model: RecurrentClassifier, config: Config, split: Split) -> list[dict]:
    """The class probabilities of eight images after every step: of ever longer beginnings."""
    x, _ = sequences(split.images[:8], config)  # (8, T, F)
    model.eval()
    rows = []
    for t in range(1, x.shape[1] + 1):
        with torch.no_grad():
            probabilities = model(x[:, :t]).softmax(1).tolist()
        for image, shares in enumerate(probabilities):
            row = {"image": image, "true": split.labels[image].item(), "step": t}
            row |= {f"p{c}": share for c, share in enumerate(shares)}
            row["pixels"] = " ".join(f"{pixel:.2f}" for pixel in x[image, t - 1].tolist())
            rows.append(row)
    return rows


# What is measured of a fault


def last_accuracy(config: Config, history: list[dict], data: Data) -> float:
    return 100 * history[-1]["val_accuracy"]


def gradient_ratio(config: Config, history: list[dict], data: Data) -> float:
    """What reaches the first step's state of the gradient at the last, before training."""
    norms = state_gradients(build(config, data.val.images.device), config, data)
    return norms[0] / norms[-1]


class Fault(NamedTuple):
    """Something that goes wrong in training, shown by a number of two runs of `faults`."""

    broken: str  # the runs' names in EXPERIMENTS["faults"]
    mended: str
    symptom: str
    measured: str
    measure: Callable[[Config, list[dict], Data], float]


FAULTS = {
    "vanishing gradient": Fault(
        broken="tanh, default weights",
        mended="tanh, orthogonal W_hh",
        symptom="almost no gradient reaches the first rows",
        measured="gradient at the start, first state / last",
        measure=gradient_ratio,
    ),
    "exploding gradient": Fault(
        broken="W_hh doubles, not clipped",
        mended="W_hh doubles, norm clipped at 1",
        symptom="one update can throw the weights away: some seeds end at chance",
        measured="validation accuracy (%)",
        measure=last_accuracy,
    ),
    "reading the padding": Fault(
        broken="answer after the padding",
        mended="answer at the garment's last row",
        symptom="empty steps wipe the state before it is read",
        measured="validation accuracy (%)",
        measure=last_accuracy,
    ),
    "training images not shuffled": Fault(
        broken="sorted by class",
        mended="in random order",
        symptom="nearly every batch is of one class, and earlier classes are forgotten",
        measured="validation accuracy (%)",
        measure=last_accuracy,
    ),
}


def fault_rows(run: Run, history: list[dict], data: Data) -> list[dict]:
    """The numbers of the faults that this run shows, broken or mended."""
    rows = []
    for name, fault in FAULTS.items():
        for variant in ("broken", "mended"):
            if run.value == getattr(fault, variant):
                row = {"fault": name, "variant": variant, "measured": fault.measured}
                row["number"] = fault.measure(run.config, history, data)
                rows.append(row)
    return rows


# -------- Pictures: from saved rows alone ---------------------------------------------------------

# experiment -> what its picture asks, what is varied, whether the values have an order
SWEEPS = {
    "cell": ("Which cell, at 128 units?", "cell", False),
    "units": ("What do more hidden units do?", "hidden units", True),
    "layers": ("What do more layers do?", "layers of 128 units", True),
    "steps": ("What does longer training do?", "training steps of the whole run", True),
    "reading": ("How is an image best read?", "a step of the sequence", False),
    "normalisation": ("Does it matter whose mean and std?", "pixels scaled by", False),
    "forget_bias": (
        "Does an open forget gate remember over 112 empty steps? Chance is 10 %",
        "the LSTM's forget bias",
        True,
    ),
}
# what is varied in the other experiments, for their tables
VARIED = {
    "learning_rate": "highest rate, clipping",
    "init": "cell, W_hh at the start",
    "direction_readout": "direction, what is classified",
    "memory": "cell, empty steps before the answer",
}


def sweep_of(name: str) -> tuple[str, str, bool]:
    """An experiment's entry of SWEEPS; one of the user's own, without entry, goes by its name."""
    return SWEEPS.get(name, (name, "value", False))


def draw_all(folder: Path) -> None:
    """Every picture and summary.md of the folder's rows; DataError if there are none."""
    runs = metrics.load_rows(folder / "runs.csv")
    if runs.empty:
        raise DataError(f"{folder / 'runs.csv'} holds no rows: train something first")
    runs["percent"] = 100 * runs["val_accuracy"]
    runs["error"] = 100 - runs["percent"]
    history = metrics.load_rows(folder / "history.csv")
    by_experiment = dict(list(runs.groupby("experiment", sort=False)))
    logged = dict(list(history.groupby("experiment", sort=False)))

    selected = history[history["experiment"].isin(SELECTED)]
    pictures = metrics.Pictures()
    for name in SELECTED:
        if name in by_experiment:
            title = f"{name.upper()} on Fashion-MNIST: training"
            pictures.add(
                metrics.draw_curves, folder / f"curves_{name}.png", logged[name], title, selected
            )
            n_seeds = by_experiment[name]["seed"].nunique()
            title = f"{name.upper()}: 10,000 test images, sum over {n_seeds} seeds"
            matrix = confusion_of(folder, name)
            pictures.add(
                metrics.draw_confusion, folder / f"confusion_{name}.png", matrix, CLASSES, title
            )
    for name in EXPERIMENTS:
        if name in by_experiment and name not in (*SELECTED, *VARIED, "faults"):
            question, varied, ordered = sweep_of(name)
            rows = by_experiment[name]
            title = f"{question} {duration_of(rows)}"
            path = folder / f"sweep_{name}.png"
            pictures.add(metrics.draw_sweep, path, rows, logged[name], title, varied, ordered)
    if "learning_rate" in by_experiment:
        rows = by_experiment["learning_rate"]
        pictures.add(
            metrics.draw_lines,
            folder / "sweep_learning_rate.png",
            rows.assign(clipping=rows["value"].str.split(", ").str[1]),
            ("lr", "error", "clipping"),
            f"Which learning rate, with and without clipping? {duration_of(rows)}",
            xlabel="highest learning rate (log scale)",
            ylabel="validation error (%, log scale)",
        )
    if "init" in by_experiment:
        rows = by_experiment["init"]
        pictures.add(
            metrics.draw_heatmap,
            folder / "sweep_init.png",
            rows.assign(network=rows["cell"].map(CELL_NAMES)),
            ("network", "init", "percent"),
            f"Which initialisation of W_hh? {duration_of(rows)}",
            xlabel="W_hh at the start",
            ylabel="cell",
            colorbar="validation accuracy (%)",
        )
    if "direction_readout" in by_experiment:
        rows = by_experiment["direction_readout"]
        parts = rows["value"].str.split(", ")
        pictures.add(
            metrics.draw_heatmap,
            folder / "sweep_direction_readout.png",
            rows.assign(direction=parts.str[0], classified=parts.str[1]),
            ("direction", "classified", "percent"),
            f"Read both ways? Classify the last state or the mean? {duration_of(rows)}",
            xlabel="what is classified",
            ylabel="reading direction",
            colorbar="validation accuracy (%)",
        )
    if "memory" in by_experiment:
        pictures.add(draw_memory, folder / "sweep_memory.png", by_experiment["memory"])
    add_side_tables(pictures, folder)
    pictures.draw()
    write_summary(folder, runs)


def draw_memory(path: Path, rows: pd.DataFrame) -> None:
    """Accuracy over the number of empty steps, a line a cell, beside the level of mere chance."""
    rows = rows.assign(name=rows["cell"].map(CELL_NAMES))
    lengths = list(rows["padding"].unique())
    colors = metrics.colors_of(list(CELL_NAMES.values()), ordered=False)
    title = f"Who still knows the image after many empty steps? {duration_of(rows)}\n"
    with metrics.picture(path, title + metrics.bands_of(rows), width=10) as axes:
        for i, (name, found) in enumerate(rows.groupby("name", sort=False)):
            beside = found["padding"].map(lengths.index) + 0.05 * (i - 1.5)  # none hides another
            label = f"{name}, {found['init'].iloc[0]} W_hh"
            style = {"errorbar": ("pi", 100), "err_style": "bars", "err_kws": {"capsize": 5}}
            style |= {"color": colors[name], "marker": "o", "label": label}
            metrics.draw_line(axes, found.assign(place=beside), "place", "percent", **style)
        axes.axhline(10, color="black", linestyle=":", label="chance")
        axes.set_xticks(range(len(lengths)), lengths)
        axes.set(xlabel="empty steps between image and answer", ylabel="validation accuracy (%)")
        axes.set_ylim(0, 100)
        metrics.legend_beside(axes)


def add_side_tables(pictures: metrics.Pictures, folder: Path) -> None:
    """The pictures of faults, gradients, readings and speed, of those that have rows."""
    faults = metrics.load_rows(folder / "faults.csv")
    if len(faults):
        title = "What goes wrong in training (orange), and what mends it (blue)"
        pictures.add(metrics.draw_faults, folder / "faults.png", faults, title)
    gradients = metrics.load_rows(folder / "gradients.csv")
    if len(gradients):
        pictures.add(draw_state_gradients, folder / "state_gradients.png", gradients)
    reading = metrics.load_rows(folder / "reading.csv")
    for name, rows in reading.groupby("experiment", sort=False):
        pictures.add(draw_reading, folder / f"reading_{name}.png", rows, name)
    benchmarks = metrics.load_rows(folder / "benchmark.csv")
    if len(benchmarks):
        pictures.add(draw_benchmark, folder / "benchmark.png", benchmarks)


def draw_state_gradients(path: Path, rows: pd.DataFrame) -> None:
    """How much of the gradient reaches each step's state; before and after, on one scale."""
    rows = rows.assign(name=rows["cell"].map(CELL_NAMES))
    colors = metrics.colors_of(list(CELL_NAMES.values()), ordered=False)
    title = f"How far back does the gradient reach, with 64 units?\n{metrics.bands_of(rows)}"
    with metrics.picture(path, title, n_columns=2, width=13, sharey=True) as panels:
        for axes, (when, found) in zip(panels, rows.groupby("when", sort=False), strict=False):
            for name, line in found.groupby("name", sort=False):
                style = {"errorbar": ("pi", 100), "color": colors[name], "label": name}
                metrics.draw_line(axes, line, "step", "norm", **style)
            axes.set_title(when)
            axes.set(xlabel="step (the rows of the image, from the top)")
        metrics.log_scale(panels[0].yaxis, rows["norm"])
        panels[0].set_ylabel("norm of ∂ loss / ∂ state (log scale)")
        metrics.legend_beside(panels[1])


def draw_reading(path: Path, rows: pd.DataFrame, name: str) -> None:
    """Eight images, and below each the probability of every class after every step.

    The right class is marked by a frame; one scale from 0 to 1 for all.
    """
    columns = [f"p{c}" for c in range(len(CLASSES))]
    title = f"{name.upper()} (seed 0): how sure it is of each class while it reads on\n"
    title += "the first eight test images; frame: the right class; above: the answer at the end"
    with metrics.picture(path, title, 4, 4, width=13, height=13) as panels:
        for image, found in rows.groupby("image"):
            top = panels[2 * (image // 4), image % 4]
            below = panels[2 * (image // 4) + 1, image % 4]
            pixels = np.array([list(map(float, line.split())) for line in found["pixels"]])
            top.imshow(pixels.reshape(28, 28), cmap="gray_r")
            top.axis("off")
            true = found["true"].iloc[0]
            probabilities = found[columns].to_numpy().T  # (C, T)
            answer = CLASSES[probabilities[:, -1].argmax()]
            sure = 100 * probabilities[:, -1].max()
            top.set_title(f"{CLASSES[true]}, read as\n{answer} ({sure:.0f} %)", fontsize=14)
            n_steps = probabilities.shape[1]
            place = (0.5, n_steps + 0.5, len(CLASSES) - 0.5, -0.5)  # steps count from 1
            style = {"cmap": "Blues", "vmin": 0, "vmax": 1, "aspect": "auto", "extent": place}
            shown = below.imshow(probabilities, **style)
            below.axhspan(true - 0.5, true + 0.5, fill=False, edgecolor="#D55E00", linewidth=2)
            below.grid(False)
            below.set_xlabel("step (two rows each)" if n_steps == 14 else "step", fontsize=13)
            if image % 4 == 0:
                below.set_yticks(range(len(CLASSES)), CLASSES, fontsize=13)
            else:
                below.set_yticks([])
        panels[0, 0].figure.colorbar(shown, ax=panels, shrink=0.5, label="probability of the class")


def draw_benchmark(path: Path, rows: pd.DataFrame) -> None:
    """A bar for every cell and size: our training step's time over that of torch's module."""
    n_repeats = rows["repeat"].nunique()
    title = "How long does a training step of ours take, beside torch's own module?"
    title += f"\n(mean, lowest and highest of {n_repeats} repeats)" if n_repeats > 1 else ""
    with metrics.picture(path, title, width=12, height=5) as axes:
        for i, (cell, found) in enumerate(rows.groupby("cell", sort=False)):
            ratios = found.groupby("size", sort=False)["ratio"].agg(["mean", "min", "max"])
            place = np.arange(len(ratios)) + 0.27 * (i - 1)
            spread = [ratios["mean"] - ratios["min"], ratios["max"] - ratios["mean"]]
            style = {"color": metrics.COLORS[i], "label": cell, "capsize": 4}
            axes.bar(place, ratios["mean"], 0.25, yerr=spread, **style)
        axes.set_xticks(range(len(ratios)), ratios.index)
        axes.axhline(1, color="black", linestyle="--", label="equal")
        axes.set(xlabel="hidden units, batch size", ylabel="time of ours / of torch's")
        metrics.legend_beside(axes)


def duration_of(rows: pd.DataFrame) -> str:
    """How long the runs of these rows are: "(20 epochs each)", "(600 steps each)", or nothing."""
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
    sections = {}
    selected = runs[runs["experiment"].isin(SELECTED)]
    if len(selected):
        names = list(dict.fromkeys(selected["experiment"]))
        sections["Selected models, test images"] = [
            "**Test images**, read once for each run, at its end; earlier networks were scored on "
            "them before those of this table were chosen. The loss is plain cross-entropy, without "
            "the label smoothing of training.",
            metrics.score_table(selected, "test_", "experiment", all_scores=True),
        ]
        sections["Selected models, validation images"] = [
            "**Validation images**, on which these models were chosen.",
            metrics.score_table(selected, "val_", "experiment"),
        ]
        first = selected.drop_duplicates("experiment").set_index("experiment")
        settings = first[list(config_columns(BASE))].T.rename_axis("field").reset_index()
        sections["Config of the selected models"] = [metrics.markdown(settings)]
        for name in names:
            report = metrics.report(confusion_of(folder, name), CLASSES)
            pictures = f"![curves](curves_{name}.png) ![confusion](confusion_{name}.png)"
            note = "**Test images**, summed over seeds."
            sections[f"{name}, class by class"] = [note, f"```\n{report}\n```", pictures]
    for name in EXPERIMENTS:
        rows = runs[runs["experiment"] == name]
        if len(rows) and name not in (*SELECTED, "faults"):
            note = f"**Validation images** {duration_of(rows)}".strip()
            varied = VARIED.get(name, sweep_of(name)[1])
            table = metrics.score_table(rows, "val_", "value", varied)
            picture = f"![{name}](sweep_{name}.png)"
            sections[f"Sweep: {name.replace('_', ' ')}"] = [note, table, picture]
    shares = metrics.load_rows(folder / "shares.csv")
    if len(shares):
        note = (
            "Of new networks with 64 units on 500 validation images: the norm of the gradient "
            "that reaches the first of 28 states, over that at the last. 1 would be all of it. "
            "Geometric means, as the numbers differ by powers of ten."
        )
        sections["How much of the gradient reaches the first row?"] = [note, share_table(shares)]
    faults = metrics.load_rows(folder / "faults.csv")
    if len(faults):
        symptoms = {name: fault.symptom for name, fault in FAULTS.items()}
        table = metrics.fault_table(faults, symptoms)
        sections["Faults: provoked, measured, mended"] = [table, "![faults](faults.png)"]
    if (folder / "gradients.csv").exists():
        note = "Of the runs of `memory` without empty steps, before and after their 300 steps."
        sections["Gradients through time"] = [note, "![gradients](state_gradients.png)"]
    if (folder / "reading.csv").exists():
        names = metrics.load_rows(folder / "reading.csv")["experiment"].unique()
        note = "The probability of every class after every step, on the first eight test images."
        pictures = " ".join(f"![{name}](reading_{name}.png)" for name in names)
        sections["Reading step by step"] = [note, pictures]
    own = runs[~runs["experiment"].isin(EXPERIMENTS)]
    if len(own):
        table = metrics.score_table(own, "val_", "experiment", "network")
        sections["Networks of your own"] = ["**Validation images**", table]
    benchmarks = metrics.load_rows(folder / "benchmark.csv")
    if len(benchmarks):
        sections["Speed"] = [benchmark_note(benchmarks), benchmark_table(benchmarks)]
        sections["Speed"].append("![speed](benchmark.png)")
    metrics.write_sections(folder / "summary.md", "Stage 2: RNN on Fashion-MNIST", sections)


def share_table(rows: pd.DataFrame) -> str:
    """Markdown: a line a cell and init, the geometric mean of its shares and their range."""
    table = []
    for (cell, init), found in rows.groupby(["cell", "init"], sort=False):
        shares = found["share"]
        line = {"cell": CELL_NAMES[cell], "W_hh at the start": init}
        line["share (geometric mean)"] = f"{stats.gmean(shares):.1e}"
        line["lowest … highest"] = f"{shares.min():.1e} … {shares.max():.1e}"
        table.append(line | {"n": str(len(shares))})
    return metrics.markdown(table)


def benchmark_note(rows: pd.DataFrame) -> str:
    device, threads = rows[["device", "threads"]].iloc[0]
    return (
        "Time of a training step of ours over that of torch's own module, with the same last "
        f"layer; 28 steps; {device}, {threads} threads. Lower is better. Lowest and highest of "
        f"{rows['repeat'].nunique()} repeats of the whole table, in which the two took turns."
    )


def benchmark_table(rows: pd.DataFrame) -> str:
    """Markdown: a line a cell, a column a size, in each the mean and the range of the repeats."""
    table = []
    for cell, of_cell in rows.groupby("cell", sort=False):
        line = {"units, batch": cell}
        for size, found in of_cell.groupby("size", sort=False):
            ratios = found["ratio"]
            line[size] = f"{ratios.mean():.2f} ({ratios.min():.2f} … {ratios.max():.2f})"
        table.append(line)
    return metrics.markdown(table)


# -------- Commands --------------------------------------------------------------------------------


class Command:
    def check(self) -> None:
        """ValueError if a flag's value is out of range."""


@dataclass(frozen=True)
class Common(Command):
    """Flags of every command that computes."""

    out: Path | None = None  # results go to OUT/stage2; default: figures/, for train out/
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
    """Say which garment is on each image file: photo or drawing."""

    images: tyro.conf.Positional[tuple[Path, ...]]  # image files
    weights: Path = HERE / "figures" / "stage2" / "gru.pt"  # the network that reads them
    save_picture: Path | None = None  # write what the network saw to this PNG file

    def check(self) -> None:
        if not self.images:
            raise ValueError("predict needs at least one image file")


@dataclass(frozen=True)
class BenchmarkCommand(Common):
    """Time a training step beside torch's own modules: about 10 minutes."""

    smoke: bool = False  # as short as it goes; without --out into a temporary folder

    def check(self) -> None:
        check_smoke(self)


@dataclass(frozen=True)
class PlotCommand(Command):
    """Draw the pictures and summary.md again from saved rows."""

    out: Path | None = None  # the folder that holds stage2; else figures/


COMMANDS = {
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
    return Path(out).resolve() / "stage2"


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
        print(f"stage 2 on {device_name(device)}, {where} of 1 thread, results in {folder}")
        n_found = len(runs) - len(todo)
        print(f"{n_found} of {len(runs)} runs found there, {len(todo)} to do", flush=True)
        if n_outdated:
            print(f"{n_outdated} were made with other settings: trained again and replaced")
        if todo:
            data = smoke_data(data) if command.smoke else data
            train_and_save(todo, data, device, workers, command.dask, folder)
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
    """What a smoke run sees: the first 1,000 training images, every 20th of the others."""
    first = Split(data.train.images[:1000], data.train.labels[:1000])
    return Data(first, every_20th(data.val), every_20th(data.test))


def every_20th(split: Split) -> Split:
    return Split(split.images[::20], split.labels[::20])


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
    n_gates = {"gru": 3, "lstm": 4}.get(config.cell, 1)
    n_states = (14 if config.reading == "two_rows" else 28) + config.padding
    n_cells = config.n_layers * (2 if config.bidirectional else 1)
    # a state's products, and beside them work that grows with its width alone
    work_of_a_state = n_gates * config.n_hidden * (100 + config.n_hidden)
    return config.n_steps * n_states * n_cells * work_of_a_state


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
        read_test = run.experiment in SELECTED
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
    """At most ten lines: the selected models' test scores, and each sweep's lowest and highest."""
    runs = metrics.load_rows(folder / "runs.csv")
    lines = []
    for name in experiments:
        rows = runs[runs["experiment"] == name]
        if name in SELECTED:
            scores = metrics.summarise(100 * rows["test_accuracy"])
            lines.append(f"{name}: test accuracy {scores} % (n = {scores.n})")
        elif name != "faults":
            means = 100 * rows.groupby("value", sort=False)["val_accuracy"].mean()
            low = f"{means.min():.2f} % ({means.idxmin()})"
            high = f"{means.max():.2f} % ({means.idxmax()})"
            lines.append(f"{name}: validation accuracy from {low} to {high}")
    if len(lines) > 9:
        lines = [*lines[:8], f"and {len(lines) - 8} more experiments"]
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
        print(f"stage 2 on {device_name(device)}: 1 thread, results in {folder}")
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
        metrics.draw_curves(curves, pd.DataFrame(tables["history"]), f"Fashion-MNIST, {name}")
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
    """What differs from the defaults, as "n hidden 64, lr 0.01"; the seed is named by itself."""
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


def load_weights(path: Path) -> tuple[RecurrentClassifier, Config]:
    """Network and Config of a file of `save_weights`; ValueError says what is wrong with it."""
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
        config = Config(**saved["config"])
        config.check()
        model = build(config)
        model.load_state_dict(saved["weights"])
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file; train --save writes one") from None
    except Exception as error:  # a damaged file makes torch.load raise nearly anything
        reason = f" ({error})" if isinstance(error, ValueError) else ""  # what Config's check says
        wanted = "train --save writes such a file"
        raise ValueError(f"{path}: not weights of this stage{reason}; {wanted}") from None
    return model.eval(), config


def predict(command: PredictCommand) -> int:
    """A line for each image with the two likeliest classes; 1 if one of them could not be read."""
    model, config = load_weights(command.weights)
    seen = []
    for path in command.images:
        try:
            image = read_garment(path)
        except ValueError as error:
            print(f"{SCRIPT}: {error}", file=sys.stderr)
            continue
        mean, std = SCALES[config.normalise]
        pixels = (torch.from_numpy(image) - mean) / std  # (28, 28)
        probabilities, classes = logits_of(model, pixels[None], config).softmax(1)[0].topk(2)
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
    """Times taken in turn, saved to benchmark.csv, drawn, printed as ratios (lower is better)."""
    device = device_of(command.device)
    folder = folder_of(command.out or (tempfile.mkdtemp() if command.smoke else HERE / "figures"))
    with claimed(folder):
        print(f"benchmark of stage 2 on {device_name(device)}, results in {folder}", flush=True)
        data = load_data(command.data_dir, command.download)
        images = data.train.images[:512].to(device)
        labels = data.train.labels[:512].to(device)
        origin = origin_of_rows(device) | {"threads": torch.get_num_threads()}
        sizes = list(itertools.product((64, 128, 256), (128, 512)))  # units, batch
        rows = []
        for repeat in range(1 if command.smoke else 3):
            for cell in ("rnn", "gru", "lstm"):
                for H, B in [(64, 128)] if command.smoke else sizes:
                    n_steps = 1 if command.smoke else 10
                    ours, theirs = time_steps(cell, H, images[:B], labels[:B], n_steps)
                    row = {"experiment": "benchmark", "repeat": repeat, "cell": cell.upper()}
                    row |= {"size": f"{H}, {B}", "first": ours, "second": theirs, "unit": "ms"}
                    rows.append(row | {"ratio": ours / theirs} | origin)
                    print(f"{ours / theirs:.2f}  {cell.upper()}, {H} units, batch {B}", flush=True)
        metrics.replace_rows(folder, {"benchmark": rows}, [])
        if (folder / "runs.csv").exists():
            draw_all(folder)
        else:
            pictures = metrics.Pictures()
            add_side_tables(pictures, folder)
            pictures.draw()
    print(f"table and picture: {folder / 'benchmark.png'}")


def time_steps(
    cell: str, H: int, images: Tensor, labels: Tensor, n_steps: int
) -> tuple[float, float]:
    """Milliseconds of a training step of ours and of torch's module, medians of five turns each."""
    from torch.utils.benchmark import Timer

    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent = getattr(nn, cell.upper())(28, H, batch_first=True)
            self.out = nn.Linear(H, len(CLASSES))

        def forward(self, x: Tensor) -> Tensor:
            outputs, _ = self.recurrent(x)
            return self.out(outputs[:, -1])

    def train_steps(model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(n_steps):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        loss.item()  # wait for the device

    threads = torch.get_num_threads()
    models = [RecurrentClassifier(cell, 28, H), Theirs()]
    milliseconds = [[], []]
    for _ in range(5):
        for model, times in zip(models, milliseconds, strict=True):
            call = partial(train_steps, model.to(images.device))
            timer = Timer("call()", globals={"call": call}, num_threads=threads)
            times.append(1000 * timer.timeit(1).mean / n_steps)  # which warms up by itself
    ours, theirs = (float(np.median(times)) for times in milliseconds)
    return ours, theirs


if __name__ == "__main__":
    sys.exit(main())
