"""Stage 1: a multilayer perceptron (全连接网络) reads MNIST: what layers, neurons, steps do to it.

    python stage1_mlp.py                              the brief's questions, one seed each
    python stage1_mlp.py --only depth --seeds 3       some experiments; --only all: every one
    python stage1_mlp.py train --hidden 64 --lr 0.01  one network of your own
    python stage1_mlp.py predict digit.png            what the trained network makes of your images
    python stage1_mlp.py benchmark                    speed, beside what a user would take instead
    python stage1_mlp.py plot                         draw figures/stage1/ again from its saved rows

Results go to figures/stage1/. Runs that are found finished there, as the committed ones are, are
not trained again: `--out out` trains them into out/.

Read `MLP`, `cross_entropy` and `train` first: they are the whole idea. `backprop` is what
`loss.backward()` does, by hand. `EXPERIMENTS` is the table of everything that was tried.

Config, Data, Model, Training and Experiments are the assignment; Pictures, Commands, predict and
benchmark are what surrounds it.

Axis letters in shape comments: B batch, C classes, N images, P = 784 pixels, D neurons of a layer.
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
from PIL import Image, ImageOps
from scipy import ndimage
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

    # neurons of each hidden layer; none is softmax regression
    hidden: tuple[int, ...] = (128, 256)
    # between the layers
    activation: Literal["sigmoid", "tanh", "relu", "leaky_relu", "gelu", "silu"] = "relu"
    # how the weights are drawn
    init: Literal["zeros", "small", "default", "xavier", "kaiming"] = "kaiming"
    # share of hidden values zeroed while training
    dropout: float = 0.0
    # pixels to mean 0, std 1; --no-normalise: as stored, 0 … 255
    normalise: bool = True
    # strength of the random image deformation: 0 none, 1 full; in the last 30 % of a run 0.3 of it
    deform: float = 0.0
    # the last two are there to go wrong
    loss: Literal["cross_entropy", "softmax_twice", "naive"] = "cross_entropy"
    # share of the target that is spread evenly over all classes
    label_smoothing: float = 0.1
    # update rule
    optimizer: Literal["sgd", "momentum", "adagrad", "rmsprop", "adam", "adamw"] = "adamw"
    # highest learning rate of the schedule
    lr: float = 3e-3
    # of weights, not of biases; made for adamw, with other optimizers it is an L2 penalty: give 0
    weight_decay: float = 0.3
    # share of the run in which the learning rate rises; then it falls along a cosine
    warmup: float = 0.3
    # largest gradient norm; 0 switches clipping off
    clip: float = 0.0
    # images of one update
    batch_size: int = 128
    # passes over the training images
    epochs: int = 15
    # number of updates, whatever epochs says; 0 leaves it to epochs
    steps: int = 0
    # training images used
    n_train: int = 55_000
    # how often a run is evaluated on its way
    n_logs: int = 30
    # of weights, batch order, dropout, deformation; never of the validation split
    seed: int = 0

    @property
    def n_steps(self) -> int:
        return self.steps or self.epochs * math.ceil(self.n_train / self.batch_size)

    def check(self) -> None:
        """ValueError that names the field and the value, and says what would be right."""
        if self.loss == "naive" and self.label_smoothing > 0:
            found = f"not {self.label_smoothing} (--label-smoothing)"
            raise ValueError(
                f"label_smoothing must be 0 for the naive loss, which has none, {found}"
            )
        limits = {
            "dropout": (0, 0.99),
            "deform": (0, 10),
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
        for neurons in self.hidden:
            check_range("hidden", neurons, 1, 16_384)
        if len(self.hidden) > 100:
            raise ValueError(f"hidden may have 100 layers, not {len(self.hidden)} (--hidden)")
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

MEAN, STD = 0.1307, 0.3081  # of MNIST's training pixels scaled to 0 … 1
N_TRAIN, N_VAL = 55_000, 5_000  # of the 60,000 training images; the 10,000 test images stay whole
CLASSES = [str(digit) for digit in range(10)]
DATASET = "MNIST"  # Fashion-MNIST's files have the same names: only checksums tell them apart
SHA256 = {  # of the unpacked files
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


class Split(NamedTuple):
    images: Tensor  # (N, 784) float32
    labels: Tensor  # (N,) int64


class Data(NamedTuple):
    train: Split  # in a random order, so that the first n of them are a fair sample
    val: Split  # class by class
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
    """MNIST whole: 55,000 / 5,000 / 10,000 images, normalised; DataError names a wrong file.

    The validation images are stratified, of every class a twelfth, and always the same.
    """
    folder = Path(data_dir) / DATASET / "raw"
    if download:
        fetch(Path(data_dir))
    parts = [read_part(folder, name) for name in SHA256]
    train_images, train_labels, test_images, test_labels = (torch.tensor(part) for part in parts)

    generator = torch.Generator().manual_seed(1998)  # of the split alone: no run's seed changes it
    order = torch.randperm(len(train_labels), generator=generator)
    by_class = order[train_labels[order].argsort(stable=True)]
    is_val = torch.arange(len(by_class)) % 12 == 0  # every 12th, class by class
    val = by_class[is_val]
    train = by_class[~is_val]
    train = train[torch.randperm(len(train), generator=generator)]

    def split(images: Tensor, labels: Tensor) -> Split:
        return Split(normalised(images.flatten(1)), labels.long())

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
            datasets.MNIST(str(data_dir), download=True)
    except (ImportError, RuntimeError, OSError, ValueError) as error:
        pair = "pip install --force-reinstall torch torchvision"
        hint = (
            f"; torch and torchvision must be a matched pair: {pair}" if "nms" in str(error) else ""
        )
        raise DataError(f"{DATASET} cannot be downloaded into {data_dir}: {error}{hint}") from error


def normalised(pixels: Tensor) -> Tensor:
    """Pixels of 0 … 255 to the mean 0 and standard deviation 1 of the training images, float32."""
    return (pixels.float() / 255 - MEAN) / STD


def as_stored(split: Split) -> Split:
    """The same images with pixels of 0 … 255 again, for the runs that do not normalise."""
    return Split((split.images * STD + MEAN) * 255, split.labels)


def deform(images: Tensor, strength: float = 1.0) -> Tensor:
    """Turn, scale, shear, shift and bend every image (B, P) at random, differently each time.

    At strength 1: up to 15°, 15 % and 1.5 pixels, then a smooth displacement of 1.2 pixels (std),
    white noise under a Gaussian of 5 pixels: the elastic deformation of Simard, Steinkraus and
    Platt (2003, section 2).
    """
    B = len(images)
    device = images.device
    half = 13.5  # grid_sample counts from -1 to 1: half an image is 13.5 pixels
    amounts = strength * (2 * torch.rand(6, B, device=device) - 1)
    turn, wide, high, shear, right, down = amounts
    turn = turn * math.radians(15)
    wide = (0.15 * wide).exp()
    high = (0.15 * high).exp()
    zero = torch.zeros_like(turn)
    # where a pixel is read from: x' = x_from · (1, x, y, xy), likewise y'
    x_from = [right * 1.5 / half, turn.cos() * wide, 0.15 * shear - turn.sin() * high, zero]
    y_from = [down * 1.5 / half, turn.sin() * wide, turn.cos() * high, zero]
    # the same as a sum over basis functions, Σ_ij basis_i(y) weight_ij basis_j(x): 1 and the
    # coordinate make the affine part, Gaussian bumps on every 4th pixel the elastic part
    pixel = torch.arange(28.0, device=device)[:, None]
    centre = torch.arange(-4.0, 33.0, 4.0, device=device)
    bumps = torch.exp(-((pixel - centre) ** 2) / (2 * 5.0**2))  # (28, 10)
    bumps = F.normalize(bumps, dim=1)  # so that white noise keeps its variance
    basis = torch.cat([torch.ones_like(pixel), pixel / half - 1, bumps], 1)  # (28, 12)
    weight = torch.zeros(B, 2, 12, 12, device=device)
    weight[:, :, :2, :2] = torch.stack(x_from + y_from, 1).view(B, 2, 2, 2)
    weight[:, :, 2:, 2:] = torch.randn(B, 2, 10, 10, device=device) * (1.2 * strength / half)
    grid = (weight @ basis.mT).mT @ basis.mT  # (B, 2, x 28, y 28)
    # an image's edge is background, so whatever lies outside is read from the edge
    grid = grid.permute(0, 3, 2, 1).clamp(-1, 1)  # (B, y 28, x 28, 2)
    return F.grid_sample(images.view(B, 1, 28, 28), grid, align_corners=True).view(B, 784)


# -------- Model -----------------------------------------------------------------------------------


class MLP(nn.Module):
    """Linear layers with an activation after each but the last; hidden=() is softmax regression.

    forward(x): images (B, …) of n_in values each -> logits (B, n_classes). ValueError on images of
    another size.
    """

    def __init__(self, hidden=(128, 256), n_in=784, n_classes=10, activation="relu", dropout=0.0):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}"
            )
        sizes = (n_in, *hidden, n_classes)
        if min(sizes) < 1:
            raise ValueError(f"every layer needs at least one neuron: {sizes}")
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.activation = activation
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.activations(x)[-1]

    def activations(self, x: Tensor) -> list[Tensor]:
        """The input, what every hidden layer makes of it, and the logits, each (B, D)."""
        n_in = self.layers[0].in_features
        if x.flatten(1).shape[1] != n_in:
            raise ValueError(f"images of {n_in} values expected, not shape {tuple(x.shape)}")
        act = ACTIVATIONS[self.activation]
        values = [x.flatten(1)]  # (B, n_in)
        for layer in self.layers[:-1]:
            z = layer(values[-1])  # z = x Wᵀ + b, (B, D)
            values.append(self.dropout(act(z)))
        logits = self.layers[-1](values[-1])  # (B, n_classes)
        return [*values, logits]


ACTIVATIONS = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "silu": F.silu,
}


def initialise(model: MLP, init: str) -> None:
    """Draw the weights anew: Kaiming's and Xavier's keep signals or gradients from growing or dying
    from layer to layer, "small" and "zeros" do not.

    "kaiming": N(0, 2 / n_in), for ReLU (He 2015, eq. 10); "xavier": U(±√(6 / (n_in + n_out))), for
    tanh (Glorot 2010, eq. 16); "small": N(0, 0.001²); "zeros"; all four with zero biases.
    "default" keeps nn.Linear's own: U(±1 / √n_in), biases too.
    """
    if init == "default":
        return
    for layer in model.layers:
        nn.init.zeros_(layer.bias)
        if init == "kaiming":
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        elif init == "xavier":
            nn.init.xavier_uniform_(layer.weight)
        elif init == "small":
            nn.init.normal_(layer.weight, std=1e-3)
        elif init == "zeros":
            nn.init.zeros_(layer.weight)


def cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean of -log softmax(logits)[target] over the batch: (B, C), (B,) int64 -> scalar, in nats.

    -log softmax(z)[t] = log Σ exp(z) - z[t], and log Σ exp(z) = m + log Σ exp(z - m) with
    m = max z, where no exp can overflow. With smoothing s the target is 1 - s on t plus s / C on
    every class (Szegedy 2016, eq. 7 on). ValueError on shapes or an s that do not fit.
    """
    if logits.ndim != 2 or target.shape != logits.shape[:1]:
        found = f"{tuple(logits.shape)}, {tuple(target.shape)}"
        raise ValueError(f"logits (B, C) and target (B,) expected, not {found}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in 0 … 1, not {label_smoothing}")
    z = logits - logits.detach().amax(1, keepdim=True)  # (B, C), none above 0
    log_sum = z.exp().sum(1).log()  # (B,)
    expected = z.gather(1, target[:, None]).squeeze(1)  # (B,) Σ target · z: the true class's logit
    if label_smoothing > 0:
        expected = (1 - label_smoothing) * expected + label_smoothing * z.mean(1)
    return (log_sum - expected).mean()


def softmax_twice(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """A common mistake: probabilities where logits belong. They differ by 1 at most, so the loss of
    ten classes stays above ln(1 + 9/e) = 1.4612."""
    return cross_entropy(logits.softmax(1), target, label_smoothing)


def naive_cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """A common mistake: -log(exp(z) / Σ exp(z)) as written; in float32 exp(89) is infinite.

    It knows no label smoothing.
    """
    probabilities = logits.exp() / logits.exp().sum(1, keepdim=True)
    return -probabilities.gather(1, target[:, None]).log().mean()


LOSSES = {
    "cross_entropy": cross_entropy,
    "softmax_twice": softmax_twice,
    "naive": naive_cross_entropy,
}


@torch.no_grad()
def backprop(model: MLP, images: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Gradients of cross_entropy(model(images), target) by hand: {parameter name: its gradient}.

    The chain rule (反向传播; Rumelhart, Hinton and Williams 1986). With a_0 = x,
    z_i = a_i W_iᵀ + b_i, a_(i+1) = relu(z_i), δ_i = ∂L/∂z_i (B, D_i), from the last layer down:
        δ_last = (softmax(z_last) - onehot(target)) / B
        ∂L/∂W_i = δ_iᵀ a_i            ∂L/∂b_i = Σ_B δ_i
        δ_(i-1) = (δ_i W_i) ⊙ [z_(i-1) > 0]
    ValueError for another activation than ReLU, or with dropout at work.
    """
    if model.activation != "relu" or (model.training and model.dropout.p > 0):
        found = f"{model.activation}, dropout {model.dropout.p}"
        raise ValueError(f"back-propagation by hand is for ReLU without dropout, not {found}")
    *inputs, logits = model.activations(images)
    B, C = logits.shape
    delta = (logits.softmax(1) - F.one_hot(target, C)) / B  # (B, C)
    gradients = {}
    for i in reversed(range(len(model.layers))):
        gradients[f"layers.{i}.weight"] = delta.mT @ inputs[i]  # (D_out, D_in)
        gradients[f"layers.{i}.bias"] = delta.sum(0)  # (D_out,)
        if i > 0:
            is_on = inputs[i] > 0  # (B, D_in): a ReLU that is off passes nothing
            delta = (delta @ model.layers[i].weight) * is_on
    return gradients


# -------- Training --------------------------------------------------------------------------------


def evaluate(model: nn.Module, split: Split) -> dict:
    """Loss (nats), accuracy, macro precision, recall and F1 (0 … 1) and the confusion matrix.

    Without gradients and with dropout off; every module gets its own training flag back.
    """
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            logits = model(split.images)  # (N, C)
    finally:
        for module, flag in was_training.items():
            module.training = flag
    matrix = metrics.confusion_matrix(logits.argmax(1), split.labels, logits.shape[1])
    loss = cross_entropy(logits, split.labels).item()
    return {**metrics.scores(matrix), "loss": loss, "confusion": matrix}


SCORES = ("loss", "accuracy", "macro_precision", "macro_recall", "macro_f1")


def build(config: Config, device: torch.device | str = "cpu") -> MLP:
    """The Config's network on the device.

    Seeds torch: the weights here, then batch order, dropout and deformation of what trains it.
    """
    torch.manual_seed(config.seed)
    model = MLP(config.hidden, activation=config.activation, dropout=config.dropout)
    initialise(model, config.init)
    return model.to(device)


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The Config's update rule; weights decay, biases do not."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": weights, "weight_decay": config.weight_decay},
        {"params": biases, "weight_decay": 0.0},
    ]
    match config.optimizer:
        case "sgd":
            return torch.optim.SGD(groups, config.lr, fused=True)
        case "momentum":
            return torch.optim.SGD(groups, config.lr, momentum=0.9, fused=True)
        case "adagrad":
            return torch.optim.Adagrad(groups, config.lr)
        case "rmsprop":
            return torch.optim.RMSprop(groups, config.lr)
        case "adam":
            return torch.optim.Adam(groups, config.lr, fused=True)
        case "adamw":
            return torch.optim.AdamW(groups, config.lr, fused=True)


def learning_rate(config: Config, step: int) -> float:
    """The rate of update `step`, 1 … n_steps: a line up (warm-up), then half a cosine down."""
    share = (step - 0.5) / config.n_steps  # of the run, to the middle of the update: never 0
    if share < config.warmup:
        return config.lr * share / config.warmup
    falling = (share - config.warmup) / (1 - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * falling))


def batches(n: int, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    """Indices (B,) of the batches: all n images in a new random order, again and again."""
    while True:
        yield from torch.randperm(n, device=device).split(batch_size)


def train(
    config: Config, data: Data, on_row: Callable[[dict], None] | None = None
) -> tuple[MLP, list[dict]]:
    """Train the Config's network: the model, and a history row at n_logs evenly spaced steps.

    `objective` is the mean of the minimised loss since the row before. The other numbers are plain
    cross-entropy and accuracy in evaluation mode, on the first 5,000 of the training images in use
    and on the validation images, so that the two compare. `on_row` is given each row as it comes.
    Between rows nothing waits for the device. A loss that is not finite ends the run at the next
    row, which then holds it.
    """
    config.check()
    if not config.normalise:
        data = Data(*(as_stored(split) for split in data))
    images = data.train.images[: config.n_train]
    labels = data.train.labels[: config.n_train]
    device = images.device
    train_sample = Split(images[:N_VAL], labels[:N_VAL])  # to evaluate on

    model = build(config, device)
    optimizer = make_optimizer(model, config)
    loss_function = LOSSES[config.loss]
    n_steps = config.n_steps
    log_steps = {math.ceil(n_steps * (i + 1) / config.n_logs) for i in range(config.n_logs)}
    history = []
    loss_sum = torch.zeros((), device=device)
    last_log = 0
    start = time.perf_counter()

    endless = batches(len(images), config.batch_size, device)
    for step, batch in enumerate(itertools.islice(endless, n_steps), 1):
        x = images[batch]  # (B, P)
        y = labels[batch]  # (B,)
        if config.deform > 0:  # gentler at the end, when the network settles on the true images
            x = deform(x, config.deform if step < 0.7 * n_steps else 0.3 * config.deform)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)

        loss = loss_function(model(x), y, config.label_smoothing)
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
            training = evaluate(model, train_sample)
            validation = evaluate(model, data.val)
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

BASE = Config()  # 15 epochs, 6,450 steps
SHORT = replace(BASE, steps=600, n_logs=10)  # 1.4 epochs: side questions
HEALTHY = replace(BASE, steps=500, n_logs=20, weight_decay=0.0, label_smoothing=0.0)
# 15 epochs of 5,000 images
FEW_IMAGES = replace(SHORT, n_train=5000, weight_decay=0.0, label_smoothing=0.0)
THOUSAND = replace(HEALTHY, n_train=1000, steps=1500)  # 188 epochs of 1,000
SIX_LAYERS = replace(HEALTHY, hidden=(128,) * 6)
SGD = replace(HEALTHY, optimizer="sgd", lr=0.3)
RATES = {  # of every optimizer, a factor of about 3 apart
    "sgd": (0.03, 0.1, 0.3, 1.0, 3.0),
    "momentum": (0.003, 0.01, 0.03, 0.1, 0.3),
    "adagrad": (0.003, 0.01, 0.03, 0.1, 0.3),
    "rmsprop": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "adam": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "adamw": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
}

# experiment -> what is varied -> the whole Config of its runs; every run is repeated for each seed
EXPERIMENTS: dict[str, dict[str, Config]] = {
    # selected models: whole trainings, scored on the test images at their end
    "baseline": {"784-128-256-10": BASE},
    "deformed": {
        "784-128-256-10": replace(
            BASE, deform=1.0, epochs=120, weight_decay=0.05, label_smoothing=0.0
        )
    },
    # the brief's three questions: whole trainings with the baseline's recipe
    "depth": {str(n): replace(BASE, hidden=(128,) * n) for n in range(6)},
    "width": {str(n): replace(BASE, hidden=(n, n)) for n in (16, 32, 64, 128, 256, 512, 1024)},
    "steps": {f"{n:,}": replace(BASE, steps=n) for n in (100, 300, 1000, 3000, 10_000, 20_000)},
    "grid": {
        f"{depth} × {width}": replace(BASE, hidden=(width,) * depth)
        for depth in (1, 2, 3, 4, 5)
        for width in (16, 32, 64, 128, 256)
    },
    # side questions: 600 steps, but in batch_size at equal images
    "learning_rate": {
        f"{name}, {lr:g}": replace(
            # weight decay is AdamW's own; with the others it would be an L2 penalty
            SHORT,
            optimizer=name,
            lr=lr,
            weight_decay=0.3 if name == "adamw" else 0.0,
        )
        for name, rates in RATES.items()
        for lr in rates
    },
    "batch_size": {
        f"{n}, {equal}": replace(SHORT, batch_size=n, steps=steps)
        for n in (16, 32, 64, 128, 256, 512, 1024)
        for equal, steps in (("equal steps", 600), ("equal images", 600 * 128 // n))
    },
    "activation": {
        name: replace(SHORT, activation=name)
        for name in ("sigmoid", "tanh", "relu", "leaky_relu", "gelu", "silu")
    },
    "init": {
        f"{name}, {len(hidden)} layers": replace(SHORT, init=name, hidden=hidden)
        for name in ("zeros", "small", "default", "xavier", "kaiming")
        for hidden in ((128, 256), (128,) * 6)
    },
    "regularisation": {
        "nothing": FEW_IMAGES,
        "weight decay 0.3": replace(FEW_IMAGES, weight_decay=0.3),
        "weight decay 1": replace(FEW_IMAGES, weight_decay=1.0),
        "dropout 0.2": replace(FEW_IMAGES, dropout=0.2),
        "dropout 0.5": replace(FEW_IMAGES, dropout=0.5),
        "label smoothing 0.1": replace(FEW_IMAGES, label_smoothing=0.1),
        "deformed images": replace(FEW_IMAGES, deform=1.0),
        "all 55,000 images": replace(FEW_IMAGES, n_train=N_TRAIN),
    },
    # what goes wrong, and what mends it; 500 steps, or 1,500 on 1,000 images: see FAULTS
    "faults": {
        "SGD, rate 30": replace(SGD, lr=30.0),
        "SGD, rate 0.3": SGD,
        "all weights 0": replace(HEALTHY, init="zeros"),
        "Kaiming's weights": HEALTHY,
        "6 sigmoid layers": replace(SIX_LAYERS, activation="sigmoid", init="default"),
        "6 ReLU layers, Kaiming": SIX_LAYERS,
        "softmax, then the loss": replace(HEALTHY, loss="softmax_twice"),
        "logits into the loss": replace(HEALTHY, loss="cross_entropy"),
        "the same 1,000 images": THOUSAND,
        "deformed anew each step": replace(THOUSAND, deform=1.0),
        "Adam, rate 0.1 at once": replace(HEALTHY, optimizer="adam", lr=0.1, warmup=0.0),
        "rate 0.003, warm-up": replace(HEALTHY, optimizer="adam"),
        "pixels 0 … 255": replace(SGD, normalise=False),
        "mean 0, std 1": replace(SGD, normalise=True),
        "-log(exp z / Σ exp z)": replace(HEALTHY, loss="naive", normalise=False),
        "log-sum-exp": replace(HEALTHY, normalise=False),
    },
}
THE_BRIEF = ("baseline", "depth", "width", "steps")  # what a bare `run` trains
# chosen on the validation images; only these are judged on the test images, and their weights kept
SELECTED = ("baseline", "deformed")


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
    """The Config of a smoke run: a narrower network, 640 images at most, 6 steps."""
    hidden = tuple(max(4, neurons // 8) for neurons in config.hidden)
    return replace(config, hidden=hidden, n_train=min(config.n_train, 640), steps=6, n_logs=2)


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
    model, history = train(run.config, data, on_row or line_a_minute(run))
    if not run.config.normalise:
        data = Data(*(as_stored(split) for split in data))

    row = run.key | config_columns(run.config) | {"status": status(history)}
    for name in ("train_loss", "train_accuracy", *(f"val_{score}" for score in SCORES), "seconds"):
        row[name] = history[-1][name]
    row["parameters"] = sum(p.numel() for p in model.parameters())
    row |= origin | {"threads": torch.get_num_threads()}
    of_test = {}
    if read_test:
        test = evaluate(model, data.test)
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


def side_tables(run: Run, model: MLP, history: list[dict], data: Data) -> dict[str, list[dict]]:
    """The rows that an experiment has beside its scores: mistakes, faults, gradients."""
    tables = {}
    if run.experiment == "baseline" and run.config.seed == 0:
        tables["mistakes"] = surest_mistakes(model, data.test)
    if run.experiment == "faults":
        tables["faults"] = fault_rows(run, model, history, data)
        vanishing = FAULTS["vanishing gradient"]
        if run.value in (vanishing.broken, vanishing.mended):
            norms = enumerate(layer_gradients(run.config, data), 1)
            tables["gradients"] = [{"layer": i, "grad_norm": norm} for i, norm in norms]
    return {name: [run.key | row for row in rows] for name, rows in tables.items()}


def config_columns(config: Config) -> dict[str, str]:
    """The Config's fields but the seed, as a row holds them and as rows are compared."""
    columns = {}
    for field in fields(config):
        value = getattr(config, field.name)
        columns[field.name] = " ".join(map(str, value)) if field.name == "hidden" else str(value)
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


def surest_mistakes(model: MLP, split: Split, n: int = 24) -> list[dict]:
    """The n wrongly read images that got the highest probabilities, with their pixels."""
    with torch.no_grad():
        probabilities = model.eval()(split.images).softmax(1)  # (N, C)
    probability, predicted = probabilities.max(1)
    wrong = (predicted != split.labels).nonzero().squeeze(1)
    surest = wrong[probability[wrong].argsort(descending=True)][:n]
    pixels = as_stored(split).images[surest].round().byte().cpu().numpy()  # (n, P)
    rows = []
    for i, image in zip(surest.tolist(), pixels, strict=True):
        row = {"image": i, "true": split.labels[i].item(), "predicted": predicted[i].item()}
        rows.append(row | {"probability": probability[i].item(), "pixels": image.tobytes().hex()})
    return rows


# What is measured of a fault


def last_accuracy(model: MLP, history: list[dict], config: Config, data: Data) -> float:
    return 100 * history[-1]["val_accuracy"]


def last_objective(model: MLP, history: list[dict], config: Config, data: Data) -> float:
    return history[-1]["objective"]


def distinct_neurons(model: MLP, history: list[dict], config: Config, data: Data) -> float:
    return len(model.layers[0].weight.detach().unique(dim=0))


def generalisation_gap(model: MLP, history: list[dict], config: Config, data: Data) -> float:
    return 100 * (history[-1]["train_accuracy"] - history[-1]["val_accuracy"])


def dead_neurons(model: MLP, history: list[dict], config: Config, data: Data) -> float:
    """Percent of hidden neurons that are 0 for every validation image: they send no gradient."""
    with torch.no_grad():
        hidden = model.eval().activations(data.val.images)[1:-1]
    is_dead = torch.cat([(values == 0).all(0) for values in hidden])  # (all neurons,)
    return 100 * is_dead.float().mean().item()


def gradient_ratio(model: MLP, history: list[dict], config: Config, data: Data) -> float:
    norms = layer_gradients(config, data)
    return norms[0] / norms[-1]


def layer_gradients(config: Config, data: Data) -> list[float]:
    """Norm of the gradient of each layer's weights before the first update, on 1,000 images."""
    model = build(config, data.train.images.device)
    cross_entropy(model(data.train.images[:1000]), data.train.labels[:1000]).backward()
    return [layer.weight.grad.norm().item() for layer in model.layers]


class Fault(NamedTuple):
    """Something that goes wrong in training, shown by a number of two runs of `faults`."""

    broken: str  # the runs' names in EXPERIMENTS["faults"]
    mended: str
    symptom: str
    measured: str
    measure: Callable[[MLP, list[dict], Config, Data], float]


FAULTS = {
    "learning rate too high": Fault(
        broken="SGD, rate 30",
        mended="SGD, rate 0.3",
        symptom="the loss grows until it is no number",
        measured="validation accuracy (%)",
        measure=last_accuracy,
    ),
    "all-zero weights": Fault(
        broken="all weights 0",
        mended="Kaiming's weights",
        symptom="a layer's neurons stay alike, only output biases learn",
        measured="neurons of layer 1 that differ (of 128)",
        measure=distinct_neurons,
    ),
    "vanishing gradient": Fault(
        broken="6 sigmoid layers",
        mended="6 ReLU layers, Kaiming",
        symptom="the first layers hardly learn",
        measured="gradient norm at the start, first layer / last",
        measure=gradient_ratio,
    ),
    "softmax before cross-entropy": Fault(
        broken="softmax, then the loss",
        mended="logits into the loss",
        symptom="the loss stays above ln(1 + 9/e) = 1.4612",
        measured="training loss at the end (nats)",
        measure=last_objective,
    ),
    "overfitting on 1,000 images": Fault(
        broken="the same 1,000 images",
        mended="deformed anew each step",
        symptom="right on what it saw, worse on the rest",
        measured="training minus validation accuracy (points)",
        measure=generalisation_gap,
    ),
    "dead ReLUs": Fault(
        broken="Adam, rate 0.1 at once",
        mended="rate 0.003, warm-up",
        symptom="huge first updates: neurons never fire again",
        measured="hidden neurons dead on all validation images (%)",
        measure=dead_neurons,
    ),
    "inputs not normalised": Fault(
        broken="pixels 0 … 255",
        mended="mean 0, std 1",
        symptom="large inputs make every step too long",
        measured="validation accuracy (%)",
        measure=last_accuracy,
    ),
    "-log(softmax) overflows": Fault(
        broken="-log(exp z / Σ exp z)",
        mended="log-sum-exp",
        symptom="exp(z) is infinite from z = 89 on; large inputs get there",
        measured="validation accuracy (%)",
        measure=last_accuracy,
    ),
}


def fault_rows(run: Run, model: MLP, history: list[dict], data: Data) -> list[dict]:
    """The numbers of the faults that this run shows, broken or mended."""
    rows = []
    for name, fault in FAULTS.items():
        for variant in ("broken", "mended"):
            if run.value == getattr(fault, variant):
                row = {"fault": name, "variant": variant, "measured": fault.measured}
                row["number"] = fault.measure(model, history, run.config, data)
                rows.append(row)
    return rows


# -------- Pictures: from saved rows alone ---------------------------------------------------------

# how the pictures write what a Config's field holds
NAMES = {"sgd": "SGD", "momentum": "SGD with momentum", "adagrad": "Adagrad", "rmsprop": "RMSprop"}
NAMES |= {"adam": "Adam", "adamw": "AdamW"}
NAMES |= {"relu": "ReLU", "leaky_relu": "leaky ReLU", "gelu": "GELU", "silu": "SiLU"}
NAMES |= {"xavier": "Xavier", "kaiming": "Kaiming", "default": "PyTorch's default"}
# experiment -> what its picture asks, what is varied, whether the values have an order
SWEEPS = {
    "depth": ("What do more hidden layers do?", "hidden layers of 128 neurons", True),
    "width": ("What do more neurons do?", "neurons in each of two hidden layers", True),
    "steps": ("What does longer training do?", "training steps of the whole run", True),
    "activation": ("Which activation?", "activation", False),
    "regularisation": (
        "What helps on 5,000 images? Smoothed labels raise the loss at the same accuracy",
        "added to the plain run",
        False,
    ),
}
# what is varied in the other experiments, for their tables
VARIED = {
    "grid": "layers × neurons",
    "learning_rate": "optimizer, highest rate",
    "batch_size": "batch size",
    "init": "initialisation",
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

    pictures = metrics.Pictures()
    for name in SELECTED:
        if name in by_experiment:
            title = f"MLP on MNIST, {name}: training"
            if by_experiment[name]["deform"].iloc[0] > 0:
                title += "\ntraining images are deformed, in the last 30 % of the steps less"
            pictures.add(metrics.draw_curves, folder / f"curves_{name}.png", logged[name], title)
            n_seeds = by_experiment[name]["seed"].nunique()
            title = f"{name}: 10,000 test images, sum over {n_seeds} seeds"
            pictures.add(
                metrics.draw_confusion,
                folder / f"confusion_{name}.png",
                confusion_of(folder, name),
                CLASSES,
                title,
            )
    for name in EXPERIMENTS:
        if name in by_experiment and name not in (*SELECTED, *VARIED, "faults"):
            question, varied, ordered = sweep_of(name)
            rows = by_experiment[name].replace({"value": NAMES})
            own = logged[name].replace({"value": NAMES})
            title = f"{question} {duration_of(rows)}"
            if name == "depth":
                # what is reached without a layer would press the others together: a number says it
                without = rows.loc[rows["value"] == "0", "percent"]
                if 0 < len(without) < len(rows):
                    title += f"\nwithout a hidden layer: {without.mean():.2f} %"
                    rows = rows[rows["value"] != "0"]
                    own = own[own["value"] != "0"]
            path = folder / f"sweep_{name}.png"
            pictures.add(metrics.draw_sweep, path, rows, own, title, varied, ordered)
    if "grid" in by_experiment:
        pictures.add(draw_grid, folder / "sweep_grid.png", by_experiment["grid"])
    if "learning_rate" in by_experiment:
        rows = by_experiment["learning_rate"]
        pictures.add(
            metrics.draw_lines,
            folder / "sweep_learning_rate.png",
            rows.replace({"optimizer": NAMES}),
            ("lr", "error", "optimizer"),
            f"Which learning rate for which optimizer? {duration_of(rows)}",
            xlabel="highest learning rate (log scale)",
            ylabel="validation error (%, log scale)",
        )
    if "batch_size" in by_experiment:
        rows = by_experiment["batch_size"]
        n_images = (rows["batch_size"] * rows["steps"])[rows["value"].str.endswith("images")].max()
        n_steps = rows.loc[rows["value"].str.endswith("steps"), "steps"].max()
        equal = {"equal steps": f"{n_steps:,} steps", "equal images": f"{n_images:,.0f} images"}
        pictures.add(
            metrics.draw_lines,
            folder / "sweep_batch_size.png",
            rows.assign(equal=rows["value"].str.split(", ").str[1].map(equal)),
            ("batch_size", "error", "equal"),
            "Which batch size, at equal steps and at equal images?",
            xlabel="batch size (log scale)",
            ylabel="validation error (%, log scale)",
        )
    if "init" in by_experiment:
        rows = by_experiment["init"].replace({"init": NAMES})
        pictures.add(
            metrics.draw_heatmap,
            folder / "sweep_init.png",
            rows.assign(layers=rows["hidden"].str.split().str.len()),
            ("init", "layers", "percent"),
            f"Which initialisation, in two and in six layers? {duration_of(rows)}",
            xlabel="hidden layers",
            ylabel="initialisation",
            colorbar="validation accuracy (%)",
            lowest=84,  # zeros, at chance, would leave one colour to all the others
        )
    add_side_tables(pictures, folder)
    pictures.draw()
    write_summary(folder, runs)


def draw_grid(path: Path, rows: pd.DataFrame) -> None:
    sizes = rows["value"].str.split(" × ", expand=True).astype(int)
    metrics.draw_heatmap(
        path,
        rows.assign(depth=sizes[0], width=sizes[1]),
        ("depth", "width", "percent"),
        f"What do layers and neurons do together? {duration_of(rows)}",
        xlabel="neurons in each layer",
        ylabel="hidden layers",
        colorbar="validation accuracy (%)",
    )


def add_side_tables(pictures: metrics.Pictures, folder: Path) -> None:
    """The pictures of faults, gradients, mistakes and speed, of those that have rows."""
    faults = metrics.load_rows(folder / "faults.csv")
    if len(faults):
        title = "What goes wrong in training (orange), and what mends it (blue)"
        pictures.add(metrics.draw_faults, folder / "faults.png", faults, title)
    gradients = metrics.load_rows(folder / "gradients.csv")
    if len(gradients):
        pictures.add(
            metrics.draw_lines,
            folder / "fault_gradients.png",
            gradients.iloc[::-1],  # the mended one in blue
            ("layer", "grad_norm", "value"),
            "How much of the gradient reaches the first layer, before training?",
            logarithmic="y",
            xlabel="layer (1 is next to the image)",
            ylabel="gradient norm of its weights (log scale)",
        )
    mistakes = metrics.load_rows(folder / "mistakes.csv")
    if len(mistakes):
        pictures.add(draw_mistakes, folder / "mistakes.png", mistakes)
    benchmarks = metrics.load_rows(folder / "benchmark.csv")
    if len(benchmarks):
        title = "How long does it take, beside what one would compare it with?"
        pictures.add(metrics.draw_ratios, folder / "benchmark.png", benchmarks, title)


def draw_mistakes(path: Path, rows: pd.DataFrame) -> None:
    title = "The 24 surest mistakes among 10,000 test images (baseline, seed 0)\n"
    title += "in brackets the probability that the network gave its answer"
    with metrics.picture(path, title, 3, 8, width=13, height=6.6) as panels:
        for axes in panels.flat:
            axes.axis("off")
        for axes, row in zip(panels.flat, rows.to_dict("records"), strict=False):
            pixels = np.frombuffer(bytes.fromhex(row["pixels"]), np.uint8).reshape(28, 28)
            axes.imshow(pixels, cmap="gray_r")
            answer = f"read as {row['predicted']} ({100 * row['probability']:.0f} %)"
            axes.set_title(f"a {row['true']}\n{answer}", fontsize=12)


def duration_of(rows: pd.DataFrame) -> str:
    """How long the runs of these rows are: "(15 epochs each)", "(600 steps each)", or nothing."""
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
            "**Test images**, read once for each run, at its end. The loss is plain cross-entropy: "
            "label smoothing in training (`baseline`) makes it larger at the same accuracy.",
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
            all_scores = name in THE_BRIEF  # which asks for all metrics under every condition
            table = metrics.score_table(rows, "val_", "value", varied, all_scores)
            picture = f"![{name}](sweep_{name}.png)"
            sections[f"Sweep: {name.replace('_', ' ')}"] = [note, table, picture]
    faults = metrics.load_rows(folder / "faults.csv")
    if len(faults):
        symptoms = {name: fault.symptom for name, fault in FAULTS.items()}
        sections["Faults: provoked, measured, mended"] = [
            metrics.fault_table(faults, symptoms),
            "![faults](faults.png) ![gradients](fault_gradients.png)",
        ]
    own = runs[~runs["experiment"].isin(EXPERIMENTS)]
    if len(own):
        table = metrics.score_table(own, "val_", "experiment", "network")
        sections["Networks of your own"] = ["**Validation images**", table]
    benchmarks = metrics.load_rows(folder / "benchmark.csv")
    if len(benchmarks):
        note = "Medians of times taken in turn. Ratio: first / second, below 1 the first is faster."
        table = metrics.ratio_table(benchmarks)
        sections["Speed"] = [note, table, "![speed](benchmark.png)"]
    metrics.write_sections(folder / "summary.md", "Stage 1: MLP on MNIST", sections)


# -------- Commands --------------------------------------------------------------------------------


class Command:
    def check(self) -> None:
        """ValueError if a flag's value is out of range."""


@dataclass(frozen=True)
class Common(Command):
    """Flags of every command that computes."""

    out: Path | None = None  # results go to OUT/stage1; default: figures/, for train out/
    data_dir: Path = HERE / "data"  # holds MNIST/raw with its four files, packed or not
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
    """Say which digit is on each image file: photo, scan or drawing."""

    images: tyro.conf.Positional[tuple[Path, ...]]  # image files
    weights: Path = HERE / "figures" / "stage1" / "deformed.pt"  # the network that reads them
    save_picture: Path | None = None  # write what the network saw to this PNG file

    def check(self) -> None:
        if not self.images:
            raise ValueError("predict needs at least one image file")


@dataclass(frozen=True)
class BenchmarkCommand(Common):
    """Time training and metrics beside what a user would take instead: about 15 minutes."""

    smoke: bool = False  # as short as it goes; without --out into a temporary folder

    def check(self) -> None:
        check_smoke(self)


@dataclass(frozen=True)
class PlotCommand(Command):
    """Draw the pictures and summary.md again from saved rows."""

    out: Path | None = None  # the folder that holds stage1; else figures/


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
    return Path(out).resolve() / "stage1"


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
        print(f"stage 1 on {device_name(device)}, {where} of 1 thread, results in {folder}")
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
    sizes = (784, *run.config.hidden, 10)
    products = sum(a * b for a, b in itertools.pairwise(sizes))
    # 1e7: what a step costs beside its products
    return run.config.n_steps * (1e7 + products * run.config.batch_size)


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
        print(f"stage 1 on {device_name(device)}: 1 thread, results in {folder}")
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
        metrics.draw_curves(curves, pd.DataFrame(tables["history"]), f"MLP on MNIST, {name}")
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
    """What differs from the defaults, as "hidden 64, lr 0.01"; the seed is named by itself."""
    words = []
    for name, text in config_columns(config).items():
        if text != config_columns(BASE)[name]:
            words.append(f"{name.replace('_', ' ')} {text.replace(' ', '-') or 'none'}")
    return ", ".join(words) or "defaults"


# -------- predict: images of one's own ------------------------------------------------------------


def read_digit(path: Path) -> np.ndarray:
    """An image file made into what MNIST's images are: (28, 28) float32 of 0 … 1, white on black.

    As MNIST was made (LeCun 1998): the digit is fitted into 20 × 20 pixels, and its centre of mass
    is put into the middle of 28 × 28. Before that a light background is inverted, and what differs
    little from the background around it, paper and shadow, is taken away. ValueError if the file
    is no image or nothing stands out in it.
    """
    grey = read_grey(path)
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    if np.median(border) > (grey.min() + grey.max()) / 2:  # dark ink on light paper
        grey = grey.max() - grey
    # strokes are narrow and bright: an opening by a wide square leaves the background alone
    square = max(3, max(grey.shape) // 3)
    background = ndimage.grey_opening(grey, (square, square), mode="nearest")
    ink = (grey - ndimage.gaussian_filter(background, square / 6, mode="nearest")).clip(0)
    if ink.max() < 0.1:
        raise ValueError(f"{path}: no digit to be seen, the image is nearly even")
    ink = (ink / np.median(ink[ink > ink.max() / 2])).clip(0, 1)

    pieces, n_pieces = ndimage.label(ink > 0.2, np.ones((3, 3)))
    sizes = ndimage.sum_labels(ink, pieces, range(1, n_pieces + 1))
    is_digit = np.isin(pieces, 1 + np.flatnonzero(sizes > 0.05 * sizes.max()))  # no specks of dirt
    rows = np.flatnonzero(is_digit.any(1))
    columns = np.flatnonzero(is_digit.any(0))
    ink = np.where(is_digit, ink, 0)[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    ink = thickened(ink)

    height, width = (max(1, round(20 * side / max(ink.shape))) for side in ink.shape)
    shrunk = Image.fromarray(ink.astype(np.float32)).resize((width, height), Image.Resampling.BOX)
    digit = np.asarray(shrunk) / np.asarray(shrunk).max()
    centre = ndimage.center_of_mass(digit)
    top = int(np.clip(round(14 - centre[0]), 0, 28 - height))
    left = int(np.clip(round(14 - centre[1]), 0, 28 - width))
    image = np.zeros((28, 28), np.float32)
    image[top : top + height, left : left + width] = digit
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


def thickened(ink: np.ndarray) -> np.ndarray:
    """Strokes of a thin pen made about as wide as MNIST's: a tenth of the digit's size."""
    depth = ndimage.distance_transform_edt(np.pad(ink > 0.5, 1))
    width = 2 * np.percentile(depth[depth > 0], 90)
    missing = int(max(ink.shape) / 10 - width)
    if missing < 1:
        return ink
    return ndimage.grey_dilation(np.pad(ink, missing // 2 + 1), (missing + 1, missing + 1))


def save_weights(path: Path, config: Config, weights: dict[str, Tensor]) -> None:
    """Weights and Config in one file, which `load_weights` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with metrics.written_aside(path) as aside, open(aside, "wb") as file:
        torch.save({"config": asdict(config), "weights": weights}, file)


def load_weights(path: Path) -> tuple[MLP, Config]:
    """The network of a file of `save_weights` and its Config; ValueError says what is wrong with
    another file."""
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
        config = Config(**saved["config"])
        config.check()
        model = MLP(config.hidden, activation=config.activation, dropout=config.dropout)
        model.load_state_dict(saved["weights"])
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file; train --save writes one") from None
    except Exception as error:  # a damaged file makes torch.load raise nearly anything
        reason = f" ({error})" if isinstance(error, ValueError) else ""  # what Config's check says
        wanted = "train --save writes such a file"
        raise ValueError(f"{path}: not weights of this stage{reason}; {wanted}") from None
    return model.eval(), config


def predict(command: PredictCommand) -> int:
    """A line for each image with the two likeliest digits; 1 if one of them could not be read."""
    model, config = load_weights(command.weights)
    seen = []
    for path in command.images:
        try:
            image = read_digit(path)
        except ValueError as error:
            print(f"{SCRIPT}: {error}", file=sys.stderr)
            continue
        stored = torch.from_numpy(255 * image)
        pixels = (normalised(stored) if config.normalise else stored).flatten()
        with torch.no_grad():
            probabilities, digits = model(pixels[None]).softmax(1)[0].topk(2)
        likeliest = zip(probabilities, digits, strict=True)
        answers = [f"{CLASSES[d]} {100 * p:.1f} %" for p, d in likeliest]
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
    repeats = 1 if command.smoke else 5
    with claimed(folder):
        print(f"benchmark of stage 1 on {device_name(device)}, results in {folder}", flush=True)
        data = load_data(command.data_dir, command.download)
        data = Data(*(Split(*(part.to(device) for part in split)) for split in data))
        # ours judges, too, within its time: 5,000 training images and these 250
        data = data._replace(val=every_20th(data.val))
        rows = []
        print("an epoch, beside a DataLoader's …", flush=True)
        rows += time_epoch(data, device, repeats, n_train=640 if command.smoke else 11_000)
        print("training steps, beside their matrix products …", flush=True)
        rows += time_steps(data, device, repeats, n_steps=3 if command.smoke else 100)
        print("a report of a million predictions, beside scikit-learn's matrix …", flush=True)
        rows += time_report(repeats)
        print("a sweep by two workers, beside one …", flush=True)
        rows += time_sweep(command.data_dir, device, command.smoke)
        origin = origin_of_rows(device) | {"threads": torch.get_num_threads()}
        rows = [{"experiment": "benchmark"} | row | origin for row in rows]
        metrics.replace_rows(folder, {"benchmark": rows}, [])
        if (folder / "runs.csv").exists():
            draw_all(folder)
        else:
            pictures = metrics.Pictures()
            add_side_tables(pictures, folder)
            pictures.draw()
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


def time_epoch(data: Data, device: str, repeats: int, n_train: int) -> list[dict]:
    """Our epoch beside the one a user would write: images through transforms and a DataLoader."""
    from torchvision import transforms

    config = replace(BASE, epochs=1, n_logs=1, n_train=n_train)
    pixels = as_stored(data.train).images[:n_train].round().byte().view(-1, 28, 28).cpu().numpy()
    labels = data.train.labels[:n_train].tolist()
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))])

    class Images(torch.utils.data.Dataset):  # as torchvision.datasets.MNIST gives its images
        def __len__(self) -> int:
            return n_train

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return transform(Image.fromarray(pixels[index])), labels[index]

    def through_dataloader(n_workers: int) -> None:
        model = build(config, device)
        criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        optimizer = torch.optim.AdamW(model.parameters(), config.lr)
        loader = torch.utils.data.DataLoader(Images(), 128, shuffle=True, num_workers=n_workers)
        for x, y in loader:
            loss = criterion(model(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    calls = {"ours": partial(train, config, data)}
    calls |= {n: partial(through_dataloader, n) for n in (0, 2)}
    seconds = seconds_in_turn(calls, repeats)
    name = f"an epoch of {n_train:,} images / through a DataLoader,"
    return [ratio_row(f"{name} {n} workers", seconds["ours"], seconds[n], "s") for n in (0, 2)]


def time_steps(data: Data, device: str, repeats: int, n_steps: int) -> list[dict]:
    """A training step beside its matrix products, and these beside a 1024 × 1024 product's rate."""
    square = torch.randn(1024, 1024, device=device)
    calls = {"square": partial(multiply_all, [(square, square)], n_steps)}
    layers = list(itertools.pairwise((784, *BASE.hidden, 10)))
    gflop = {}
    for B in (128, 512, 2048):
        shapes = [(B, a, b) for a, b in layers]  # forward
        shapes += [(b, B, a) for a, b in layers]  # gradients of the weights
        shapes += [(B, b, a) for a, b in layers[1:]]  # gradients of the hidden layers
        gflop[B] = sum(2 * m * k * n for m, k, n in shapes) / 1e9
        pairs = [
            (torch.randn(m, k, device=device), torch.randn(k, n, device=device))
            for m, k, n in shapes
        ]
        calls[f"products {B}"] = partial(multiply_all, pairs, n_steps)
        calls[f"steps {B}"] = partial(
            train, replace(BASE, steps=n_steps, n_logs=1, batch_size=B), data
        )
    milliseconds = {k: 1000 * v / n_steps for k, v in seconds_in_turn(calls, repeats).items()}
    rows = []
    for B in gflop:
        products = milliseconds[f"products {B}"]
        name = f"a training step, batch {B} / its matrix products"
        rows.append(ratio_row(name, milliseconds[f"steps {B}"], products, "ms"))
        at_full_rate = milliseconds["square"] * gflop[B] / (2 * 1.024**3)
        name = f"these products, batch {B} / at a 1024 × 1024 product's rate"
        rows.append(ratio_row(name, products, at_full_rate, "ms"))
    return rows


def multiply_all(pairs: list[tuple[Tensor, Tensor]], times: int) -> None:
    for _ in range(times):
        for left, right in pairs:
            product = left @ right
    product.sum().item()  # wait for the device


def time_report(repeats: int) -> list[dict]:
    """Our matrix and report beside scikit-learn's matrix alone."""
    from sklearn.metrics import confusion_matrix as theirs

    predicted, target = np.random.default_rng(0).integers(0, 10, (2, 1_000_000))

    def ours() -> str:
        return metrics.report(metrics.confusion_matrix(predicted, target, 10))

    calls = {"ours": ours, "theirs": partial(theirs, target, predicted)}
    seconds = seconds_in_turn(calls, repeats)
    name = "matrix and report of a million predictions / scikit-learn's matrix alone"
    return [ratio_row(name, 1000 * seconds["ours"], 1000 * seconds["theirs"], "ms")]


def time_sweep(data_dir: Path, device: str, smoke: bool) -> list[dict]:
    """A sweep of some five minutes by two workers beside one: whole commands, start to pictures."""
    words = ["--only", "steps", "--smoke"] if smoke else ["--only", "learning_rate", "--seeds", "4"]
    words += ["--data-dir", str(data_dir), "--device", device]
    seconds = {}
    for workers in (1, 2):
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, __file__, "run", "--out", out, "--workers", str(workers)]
            start = time.perf_counter()
            subprocess.run([*command, *words], check=True, stdout=subprocess.DEVNULL)
            seconds[workers] = time.perf_counter() - start
            runs = metrics.load_rows(Path(out) / "stage1" / "runs.csv")
            training = runs["seconds"].sum() / workers
    name = f"a sweep of {len(runs)} runs: 2 workers / 1 worker"
    rows = [ratio_row(name, seconds[2], seconds[1], "s")]
    name = "its start, loading, saving and drawing with 2 workers / the whole of it"
    return [*rows, ratio_row(name, seconds[2] - training, seconds[2], "s")]


if __name__ == "__main__":
    sys.exit(main())
