"""Stage 1: a multilayer perceptron (全连接网络) reads MNIST, and shows what depth, width and training time do to it.

Test accuracy 98.61 ± 0.08 % after 15 epochs, 99.30 ± 0.07 % with deformed images: 5 seeds each, 2 CPU cores.

    python stage1_mlp.py                 train, sweep, faults, benchmark, pictures: all but deformed and scale_out
    python stage1_mlp.py train           the 784-128-256-10 baseline, 5 seeds, with a report per class
    python stage1_mlp.py deformed        the same network on images deformed anew at every step
    python stage1_mlp.py sweep --only depth width --seeds 3
    python stage1_mlp.py faults          what goes wrong in training: provoked, measured, mended
    python stage1_mlp.py benchmark       speed, against a DataLoader pipeline and the machine's own matrix product
    python stage1_mlp.py scale_out       a sweep by one process, and by several under torchrun: runs a minute
    python stage1_mlp.py plot            draw figures/stage1/ again from its saved rows

Axis letters in shape comments: B batch, C classes, N images, P = 784 pixels of an image, D neurons of a layer.
"""

import functools
import itertools
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import metrics
from metrics import Data, Fault, Run, Split, batches, one_cycle

# -------- 2. Config --------------------------------------------------------------------------------------------------

MEAN, STD = 0.1307, 0.3081  # of MNIST's training pixels scaled to 0 … 1
N_TRAIN, N_VAL = 55_000, 5_000  # of MNIST's 60,000 training images; its 10,000 test images stay whole
OPTIMIZERS = {  # class and its arguments; fused is one pass over all parameters a step
    "sgd": (torch.optim.SGD, {"fused": True}),
    "momentum": (torch.optim.SGD, {"fused": True, "momentum": 0.9}),
    "adagrad": (torch.optim.Adagrad, {}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "adam": (torch.optim.Adam, {"fused": True}),
    "adamw": (torch.optim.AdamW, {"fused": True}),
}
CHOICES = {
    "activation": ["sigmoid", "tanh", "relu", "leaky_relu", "gelu", "silu"],
    "init": ["zeros", "small", "default", "xavier", "kaiming"],
    "loss": ["cross_entropy", "softmax_twice", "naive"],
    "optimizer": list(OPTIMIZERS),
}
LIMITS = {  # each value is at least the first and less than the second
    **dict.fromkeys(("hidden", "batch_size", "epochs", "n_logs"), (1, math.inf)),
    **dict.fromkeys(("deform", "weight_decay", "clip", "steps"), (0, math.inf)),
    **dict.fromkeys(("dropout", "label_smoothing", "warmup"), (0, 1)),
    "n_train": (1, N_TRAIN + 1),
    "seed": (0, 2**32),
    "lr": (1e-12, math.inf),
}


@dataclass(frozen=True)
class Config:
    hidden: tuple[int, ...] = (128, 256)  # neurons of each hidden layer; none is softmax regression
    activation: str = "relu"
    init: str = "kaiming"  # of the weights, see initialise
    dropout: float = 0.0  # share of hidden values zeroed while training
    normalise: bool = True  # pixels to mean 0, std 1; otherwise as stored, 0 … 255
    deform: float = 0.0  # strength of the random image deformation: 0 none, 1 full
    loss: str = "cross_entropy"  # the other two are there to go wrong; naive knows no label smoothing
    label_smoothing: float = 0.1  # share of the target that is spread evenly over all classes
    optimizer: str = "adamw"
    lr: float = 3e-3  # the highest learning rate of the schedule
    weight_decay: float = 0.3  # of weights, not of biases
    warmup: float = 0.3  # share of the run in which the learning rate rises; it falls along a cosine after
    clip: float = 0.0  # largest gradient norm; 0 switches clipping off
    batch_size: int = 128
    epochs: int = 15  # passes over the training images
    steps: int = 0  # number of updates, whatever epochs says; 0 leaves it to epochs
    n_train: int = N_TRAIN  # training images used
    n_logs: int = 30  # evaluations on the validation images during a run
    seed: int = 0  # of weights, batch order, dropout and deformation; never of the validation split

    def __post_init__(self):
        metrics.check_config(self, CHOICES, LIMITS)

    @property
    def n_steps(self) -> int:
        return self.steps or self.epochs * math.ceil(self.n_train / self.batch_size)


# a sweep is a list of changes to its base Config; to add one, add its list here and what it varies below
SWEEPS: dict[str, list[dict]] = {
    "depth": [{"hidden": (128,) * n} for n in range(6)],
    "width": [{"hidden": (n, n)} for n in (16, 32, 64, 128, 256, 512, 1024)],
    "steps": [{"steps": n} for n in (100, 300, 1000, 3000, 10_000)],
    "lr": [{"lr": lr} for lr in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 1.0, 10.0)],
    "batch_size": [{"batch_size": n} for n in (16, 32, 64, 128, 256, 512, 1024)],
    "activation": [{"activation": name} for name in CHOICES["activation"]],
    "optimizer": [  # each at a learning rate of its own; weight decay is AdamW's, elsewhere it would be an L2 penalty
        {"optimizer": name, "lr": lr, "weight_decay": 0.3 if name == "adamw" else 0.0}
        for name, lr in zip(CHOICES["optimizer"], (0.3, 0.05, 0.03, 1e-3, 3e-3, 3e-3), strict=True)
    ],
    "init": [{"init": name} for name in CHOICES["init"]],
    "regularisation": [  # where there is something to overfit: 5,000 images
        {"n_train": 5000, "weight_decay": 0.0, "label_smoothing": 0.0} | change
        for change in ({}, {"weight_decay": 0.3}, {"dropout": 0.2}, {"label_smoothing": 0.1}, {"deform": 1.0})
    ],
}
# fmt: off
AXES = {
    "depth": "hidden layers × neurons", "width": "hidden layers × neurons", "steps": "training steps, each its own run",
    "lr": "learning rate", "batch_size": "batch size, equal steps", "activation": "activation",
    "optimizer": "optimizer", "init": "initialisation", "regularisation": "regularisation, on 5,000 images",
}
# fmt: on
PROBES: dict[str, list[dict]] = {}  # runs of `faults` that are compared with each other
# what a job changes in the Config before the user's flags do, and how many seeds it runs
JOBS: dict[str, tuple[dict, int]] = {
    "train": ({}, 5),
    "deformed": ({"deform": 1.0, "epochs": 120, "weight_decay": 0.05, "label_smoothing": 0.0}, 5),
    "sweep": ({"steps": 600, "n_logs": 10}, 1),
    "faults": ({"steps": 500, "n_logs": 20, "weight_decay": 0.0, "label_smoothing": 0.0}, 1),
}
SELECTED = {"train": "baseline", "deformed": "deformed"}  # jobs whose models are scored on the test images, and as what
LONG, MINUTES, REPEATS = ["deformed", "scale_out"], 3, 3  # what `all` leaves out, its minutes, repeats of works
SMOKE = {"hidden": (16, 12), "n_train": 640, "steps": 6, "n_logs": 2}


# -------- 3. Data ----------------------------------------------------------------------------------------------------


def load_data(config: Config, device: torch.device | str = "cpu", data_dir: Path = metrics.HERE / "data") -> Data:
    """MNIST whole on the device: 55,000 / 5,000 / 10,000 images, normalised or raw as the Config says.

    The validation split is stratified and always the same; the training images lie in a random order, so that the first
    n of them are a fair sample. metrics.DataError if the images cannot be had or are another data set's.
    """
    (pixels, labels), test = metrics.read_images("MNIST", data_dir, MEAN, STD)
    kept, val = metrics.stratified(labels, N_VAL, seed=1998)

    def split(pixels: Tensor, labels: Tensor) -> Split:
        images = pixels.flatten(1).float()
        images = (images / 255 - MEAN) / STD if config.normalise else images
        return Split(images.to(device), labels.to(device))

    return Data(split(pixels[kept], labels[kept]), split(pixels[val], labels[val]), split(*test))


def deform(images: Tensor, strength: float = 1.0) -> Tensor:
    """Turn, scale, shear, shift and bend every image (B, P) at random, differently each time.

    At strength 1: up to 15° and 15 % and 1.5 pixels, then a smooth displacement of 1.2 pixels (std), white noise under
    a Gaussian of 5 pixels: the elastic deformation of Simard, Steinkraus and Platt (2003, section 2).
    """
    B, device, half = len(images), images.device, 13.5  # grid_sample counts from -1 to 1: half an image is 13.5 pixels
    turn, wide, high, shear, right, down = strength * (2 * torch.rand(6, B, device=device) - 1)
    turn, wide, high = turn * math.radians(15), (0.15 * wide).exp(), (0.15 * high).exp()
    x_from = [right * 1.5 / half, turn.cos() * wide, 0.15 * shear - turn.sin() * high, 0 * turn]  # times 1, x, y, xy
    y_from = [down * 1.5 / half, turn.sin() * wide, turn.cos() * high, 0 * turn]
    # where a pixel is read from: Σ_ij basis_i(y) weight_ij basis_j(x); the basis functions 1 and the coordinate itself
    # make the affine part, Gaussian bumps on every 4th pixel the elastic one
    pixel = torch.arange(28.0, device=device)[:, None]
    bumps = torch.exp(-((pixel - torch.arange(-4.0, 33.0, 4.0, device=device)) ** 2) / (2 * 5.0**2))  # (28, 10)
    basis = torch.cat([torch.ones_like(pixel), pixel / half - 1, F.normalize(bumps, dim=1)], 1)  # (28, 12)
    weight = torch.zeros(B, 2, 12, 12, device=device)
    weight[:, :, :2, :2] = torch.stack(x_from + y_from, 1).view(B, 2, 2, 2)
    weight[:, :, 2:, 2:] = torch.randn(B, 2, 10, 10, device=device) * (1.2 * strength / half)
    grid = (weight @ basis.mT).mT @ basis.mT  # (B, 2, x 28, y 28)
    # an image's edge is background, so whatever lies outside is read from the edge
    grid = grid.permute(0, 3, 2, 1).clamp(-1, 1)
    return F.grid_sample(images.view(B, 1, 28, 28), grid, align_corners=True).view(B, 784)


# -------- 4. Model ---------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """Linear layers with an activation after each but the last; hidden=() is softmax regression.

    forward(x): images (B, …) of n_in values each -> logits (B, n_classes). ValueError on images of another size.
    """

    def __init__(self, hidden=(128, 256), n_in=784, n_classes=10, activation="relu", dropout=0.0):
        super().__init__()
        if activation not in CHOICES["activation"]:
            raise ValueError(f"activation must be one of {', '.join(CHOICES['activation'])}, not {activation!r}")
        sizes = (n_in, *hidden, n_classes)
        if min(sizes) < 1:
            raise ValueError(f"every layer needs at least one neuron: {sizes}")
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.activation = activation
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.activations(x)[-1]

    def activations(self, x: Tensor) -> list[Tensor]:
        """The input, what every hidden layer makes of it, and the logits: n_layers + 1 tensors (B, D)."""
        values = [x.flatten(1)]
        if values[0].shape[1] != self.layers[0].in_features:
            raise ValueError(f"images of {self.layers[0].in_features} values expected, not shape {tuple(x.shape)}")
        *hidden, last = self.layers
        for layer in hidden:
            values.append(self.dropout(getattr(F, self.activation)(layer(values[-1]))))
        return [*values, last(values[-1])]


def initialise(model: MLP, init: str) -> None:
    """Draw the weights anew: by what each method takes to keep signals, or gradients, from growing and dying.

    "kaiming" N(0, 2 / n_in), for ReLU (He 2015); "xavier" U(±√(6 / (n_in + n_out))), for tanh (Glorot 2010); "small"
    N(0, 0.001²); "zeros"; all four with zero biases. "default" keeps nn.Linear's own: U(±1 / √n_in), biases too.
    """
    draw = {
        "zeros": nn.init.zeros_,
        "small": functools.partial(nn.init.normal_, std=1e-3),
        "xavier": nn.init.xavier_uniform_,
        "kaiming": functools.partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    }
    if init != "default":
        for layer in model.layers:
            draw[init](layer.weight)
            nn.init.zeros_(layer.bias)


def cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean of -log softmax(logits)[target] over the batch: logits (B, C), target (B,) int64 -> scalar, in nats.

    -log softmax(z)[t] = log Σ exp(z) - z[t], and log Σ exp(z) = m + log Σ exp(z - m) with m = max z, where no exp can
    overflow. With smoothing s the target is 1 - s on t plus s / C on every class (Szegedy 2016, eq. 7 on).
    """
    if logits.ndim != 2 or target.shape != logits.shape[:1]:
        raise ValueError(f"logits (B, C) and target (B,) expected, not {tuple(logits.shape)}, {tuple(target.shape)}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in 0 … 1, not {label_smoothing}")
    logits = logits - logits.detach().amax(1, keepdim=True)
    log_sum = logits.exp().sum(1).log()
    right = logits.gather(1, target[:, None]).squeeze(1)
    if label_smoothing:
        right = (1 - label_smoothing) * right + label_smoothing * logits.mean(1)
    return (log_sum - right).mean()


LOSSES = {
    "cross_entropy": cross_entropy,
    # two common mistakes: probabilities where logits belong, which differ by 1 at most, so it stays above ln(1 + 9/e);
    # and -log(exp(z) / Σ exp(z)) as it is written, where in float32 exp(89) is infinite
    "softmax_twice": lambda z, target, smoothing: cross_entropy(z.softmax(1), target, smoothing),
    "naive": lambda z, target, _: -(z.exp().gather(1, target[:, None]) / z.exp().sum(1, keepdim=True)).log().mean(),
}


@torch.no_grad()
def backprop(model: MLP, images: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Gradients of cross_entropy(model(images), target) by the chain rule, by hand: {parameter name: gradient}.

    With a_0 = x, z_i = a_i W_iᵀ + b_i, a_(i+1) = relu(z_i) and δ_i = ∂L/∂z_i (B, D_i), from the last layer to the first
    (Rumelhart, Hinton and Williams 1986):
        δ_last = (softmax(z_last) - onehot(target)) / B        ∂L/∂W_i = δ_iᵀ a_i        ∂L/∂b_i = Σ_B δ_i
        δ_(i-1) = (δ_i W_i) ⊙ [z_(i-1) > 0]
    ValueError for another activation than ReLU, or with dropout at work.
    """
    if model.activation != "relu" or (model.training and model.dropout.p > 0):
        raise ValueError(f"by hand for ReLU without dropout only, not {model.activation}, dropout {model.dropout.p}")
    *inputs, logits = model.activations(images)
    B, C = logits.shape
    delta = (logits.softmax(1) - F.one_hot(target, C)) / B  # (B, C)
    gradients = {}
    for i in reversed(range(len(model.layers))):
        gradients[f"layers.{i}.weight"] = delta.mT @ inputs[i]  # (D_out, D_in)
        gradients[f"layers.{i}.bias"] = delta.sum(0)  # (D_out,)
        if i > 0:
            delta = delta @ model.layers[i].weight * (inputs[i] > 0)  # (B, D_in); a ReLU that is off passes nothing
    return gradients


# -------- 5. Training ------------------------------------------------------------------------------------------------


@metrics.inference
def evaluate(model: nn.Module, split: Split) -> dict:
    """Loss (nats), accuracy, macro precision, recall and F1 (0 … 1), and the confusion matrix, with dropout off."""
    logits = model(split.images)
    matrix = metrics.confusion_matrix(logits.argmax(1), split.labels, logits.shape[1])
    loss = cross_entropy(logits, split.labels).item()
    return {**metrics.scores(matrix), "loss": loss, "confusion": matrix}


def build(config: Config, device: torch.device) -> MLP:
    """The Config's network with weights drawn from the Config's seed, on the device."""
    torch.manual_seed(config.seed)
    model = MLP(config.hidden, activation=config.activation, dropout=config.dropout)
    initialise(model, config.init)
    return model.to(device)


def train(config: Config, data: Data, bar: tqdm | None = None) -> tuple[MLP, list[dict]]:
    """Train the Config's network: the model, and a history row for each of n_logs evenly spaced steps.

    A row's train_loss is the mean since the row before. Between rows nothing waits for the device. A loss that is not
    finite ends the run at the next row, which then holds it. The bar, if any, moves by one a step.
    """
    images, labels = (part[: config.n_train] for part in data.train)
    device = images.device
    model = build(config, device)
    kind, arguments = OPTIMIZERS[config.optimizer]
    optimizer = kind(metrics.parameter_groups(model, config.weight_decay), lr=config.lr, **arguments)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(one_cycle, config))
    n_steps, loss_function = config.n_steps, LOSSES[config.loss]
    logged = {math.ceil(n_steps * (i + 1) / config.n_logs) for i in range(config.n_logs)}
    history, since, loss_sum, start = [], 0, torch.zeros((), device=device), time.perf_counter()

    for step, batch in zip(range(1, n_steps + 1), batches(len(images), config, device), strict=False):
        x, y = images.index_select(0, batch), labels.index_select(0, batch)  # (B, P), (B,)
        if config.deform:  # gentler at the end, when the network settles on what the true images look like
            x = deform(x, config.deform * (1.0 if step < 0.7 * n_steps else 0.3))

        loss = loss_function(model(x), y, config.label_smoothing)
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
            history.append(metrics.history_row(config, step, train_loss, val, grad_norm, start))
            if bar is not None:
                bar.update(step - since)
            since = step
            loss_sum.zero_()
            if metrics.status(history) == "diverged":
                break
    return model, history


# -------- 6. Experiments ---------------------------------------------------------------------------------------------


def execute(run: Run, data: Data, bar: tqdm) -> dict[str, list[dict]]:
    """Train and measure one run: its rows for every table. Only the selected models ever see the test images."""
    model, history = train(run.config, data, bar)
    tables = metrics.tables_of(run, model, history, evaluate(model, data.val), data.val.images.device)
    if run.experiment in SELECTED.values():
        tables |= metrics.test_tables(run, evaluate(model, data.test))
    if run.experiment == "faults":
        tables |= metrics.fault_tables(run, FAULTS, model, history, data)
        name = run.name | dict(zip(("fault", "variant"), run.value.split(": "), strict=True))
        norms = layer_gradients(run.config, data)
        tables["gradients"] = [name | {"layer": i, "grad_norm": norm} for i, norm in enumerate(norms, 1)]
    return tables


def layer_gradients(config: Config, data: Data) -> list[float]:
    """Norm of the loss's gradient with respect to each layer's weights, before the first update, on 1,000 images."""
    model = build(config, data.train.images.device)
    cross_entropy(model(data.train.images[:1000]), data.train.labels[:1000]).backward()
    return [layer.weight.grad.norm().item() for layer in model.layers]


def generalisation_gap(model: MLP, history: list[dict], config: Config, data: Data) -> float:
    seen = evaluate(model, Split(*(part[: config.n_train] for part in data.train)))
    return 100 * (seen["accuracy"] - history[-1]["val_accuracy"])


@torch.no_grad()
def dead_share(model: MLP, history: list[dict], config: Config, data: Data) -> float:
    """Percent of the hidden neurons that are 0 for every validation image: such an image sends no gradient through."""
    dead = [(values == 0).all(0) for values in model.eval().activations(data.val.images)[1:-1]]  # of each layer, (D,)
    return 100 * torch.cat(dead).float().mean().item() if dead else math.nan


ACCURACY = ("validation accuracy (%)", lambda model, history, *_: 100 * history[-1]["val_accuracy"])
# fmt: off
FAULTS = {
    "learning rate too high": Fault("the loss grows until it is no number", *ACCURACY,
        {"optimizer": "sgd", "lr": 30.0}, "learning rate / 100", {"optimizer": "sgd", "lr": 0.3}),
    "all-zero weights": Fault("a layer's neurons stay alike: only output biases learn", "different neurons in layer 1",
        lambda model, *_: len(model.layers[0].weight.detach().unique(dim=0)),
        {"init": "zeros"}, "random weights (Kaiming)", {"init": "kaiming"}),
    "sigmoid in a deep net": Fault("the gradient vanishes on its way down", "first gradient norm, first layer / last",
        lambda model, history, config, data: (norms := layer_gradients(config, data))[0] / norms[-1],
        {"hidden": (128,) * 6, "activation": "sigmoid", "init": "default"}, "ReLU, Kaiming's weights",
        {"hidden": (128,) * 6, "activation": "relu", "init": "kaiming"}),
    "softmax before cross-entropy": Fault("stays above ln(1 + 9/e) = 1.4612", "training loss at the end (nats)",
        lambda model, history, *_: history[-1]["train_loss"],
        {"loss": "softmax_twice"}, "logits into the loss", {"loss": "cross_entropy"}),
    "overfitting on 1,000 images": Fault("right on what it saw", "training minus validation accuracy (points)",
        generalisation_gap, {"n_train": 1000, "steps": 1500}, "images deformed anew each step",
        {"n_train": 1000, "steps": 1500, "deform": 1.0}),
    "dead ReLUs": Fault("huge first updates: neurons never fire again", "neurons dead on all validation images (%)",
        dead_share, {"optimizer": "adam", "lr": 0.1, "warmup": 0.0}, "lower rate and warm-up", {"optimizer": "adam"}),
    "inputs not normalised": Fault("pixels of 0 … 255 make every step too long", *ACCURACY,
        {"optimizer": "sgd", "lr": 0.3, "normalise": False}, "pixels to mean 0, std 1",
        {"optimizer": "sgd", "lr": 0.3, "normalise": True}),
    "-log(softmax) overflows": Fault("exp(z) is infinite from z = 89 on", *ACCURACY,
        {"loss": "naive", "normalise": False}, "log-sum-exp, on the same inputs",
        {"loss": "cross_entropy", "normalise": False}),
}
# fmt: on


def dataloader_epoch(config: Config, images: torch.utils.data.Dataset, device: torch.device, workers: int) -> None:
    """The epoch a user would otherwise write: a DataLoader over torchvision's images, torch's own loss and defaults."""
    model, criterion = build(config, device), nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay)
    for x, y in torch.utils.data.DataLoader(images, config.batch_size, shuffle=True, num_workers=workers):
        loss = criterion(model(x.to(device)), y.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def benchmark(config: Config, data: Data, data_dir: Path, repeats: int) -> dict[str, list[dict]]:
    """An epoch against the DataLoader's; a training step against its products; a report against scikit-learn's matrix.

    Of a training step only the matrix products count: forward, gradients of the weights, and of the hidden layers.
    """
    from sklearn.metrics import confusion_matrix as theirs
    from torchvision import datasets, transforms

    device = data.train.images.device
    few = data._replace(val=Split(*(part[:10] for part in data.val)))  # the evaluation at the end takes no time
    n_steps = config.steps or 100
    epoch = replace(config, epochs=1, steps=0, n_logs=1, n_train=min(config.n_train, 11_000))  # a fifth of the images
    works: dict[tuple[str, str], tuple[float, Callable]] = {}  # (group, name) -> (how much work, doing it)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))])
    images = datasets.MNIST(str(metrics.unpacked("MNIST", data_dir)), transform=transform)
    images = torch.utils.data.Subset(images, range(epoch.n_train))
    for n in (0, 2):
        work = functools.partial(dataloader_epoch, epoch, images, device, n)
        works["images/s", f"DataLoader, {n} workers"] = (epoch.n_train, work)
    works["images/s", "ours"] = (epoch.n_train, functools.partial(train, epoch, few))
    square = torch.randn(1024, 1024, device=device)
    layers = list(itertools.pairwise((784, *config.hidden, 10)))
    for B in sorted({min(B, config.n_train) for B in (128, 512, 2048)}):
        shapes = [(B, a, b) for a, b in layers] + [(b, B, a) for a, b in layers] + [(B, b, a) for a, b in layers[1:]]
        pairs = [(torch.randn(m, k, device=device), torch.randn(k, n, device=device)) for m, k, n in shapes]
        gflop = n_steps * sum(2 * m * k * n for m, k, n in shapes) / 1e9
        group, steps = f"GFLOP/s, batch {B}", replace(config, steps=n_steps, n_logs=1, batch_size=B)
        works[group, "1024 × 1024 product"] = (10 * 1.024**3, lambda: [square @ square for _ in range(5)])
        works[group, "a step's products"] = (gflop, lambda p=pairs: [x @ y for _ in range(n_steps) for x, y in p])
        works[group, "a training step"] = (gflop, functools.partial(train, steps, few))
    predicted, target = np.random.default_rng(0).integers(0, 10, (2, 1_000_000))
    group = "reports/s, a million predictions"
    works[group, "scikit-learn's matrix"] = (1, lambda: theirs(target, predicted))
    works[group, "our matrix and report"] = (1, lambda: metrics.report(metrics.confusion_matrix(predicted, target, 10)))
    return {"benchmark": metrics.interleaved(works, repeats, device)}


def scale_out(config: Config, data: Data, data_dir: Path, repeats: int) -> dict[str, list[dict]]:
    """The same sweep by one process with every thread, and by torchrun's processes, one for each thread or GPU."""
    device = data.train.images.device
    n = torch.cuda.device_count() if device.type == "cuda" else torch.get_num_threads()
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}")
    launchers, names, works = {"one process": (), f"{n} processes": torchrun}, ("depth", "width"), {}
    with tempfile.TemporaryDirectory() as folder:
        job = [__file__, "sweep", "--quiet", "--only", *names, "--steps", str(config.steps or 600)]
        job += ["--device", device.type, "--data-dir", str(data_dir), "--figures-dir", folder]
        own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}  # no team's
        for name, launcher in launchers.items():
            command = [sys.executable, *launcher, *job]
            start = functools.partial(subprocess.run, command, check=True, stdout=subprocess.DEVNULL, env=own)
            works["runs/min, from start to pictures", name] = (60 * sum(len(SWEEPS[name]) for name in names), start)
        rows = metrics.interleaved(works, repeats, device)
    return {"benchmark": [row | {"experiment": "scale_out"} for row in rows]}


# -------- 7. Pictures ------------------------------------------------------------------------------------------------


def plot(figures: Path) -> list[Path]:
    """Draw every picture and summary.md from the saved rows; gives their paths. FileNotFoundError if there are none."""
    album = metrics.Album(figures, "MLP on MNIST")
    album.selected(list("0123456789"))
    album.sweeps(AXES)
    album.faults()
    rows = [row for row in metrics.read_rows(figures / "gradients.csv") if row["fault"] == "sigmoid in a deep net"]
    ylabel = "norm of its weights' gradient at the start"
    album.lines("fault_gradients", {"sigmoid in a deep net": rows}, "variant", "layer", "grad_norm", ylabel)
    album.benchmark()
    return album.close()


# -------- 8. Command line --------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    return metrics.run_stage(sys.modules[__name__], {"benchmark": benchmark, "scale_out": scale_out}, argv)


if __name__ == "__main__":
    sys.exit(main())
