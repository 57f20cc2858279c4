"""Convolution and pooling by hand, and a CNN for MNIST and Fashion-MNIST (手撕卷积).

    python -m interview.convolution              tables and pictures from what is saved, 1 min
    python -m interview.convolution --train      trains first what is not saved yet: 2 hours, half
                                                 of that with --workers 2 on two free cores
    python -m interview.convolution --out DIR    the same into and from DIR

Read `patches` and `conv2d` first: everything else here is a variation of them.
Axis letters in shape comments: B batch, C channels in, O channels out, H × W pixels, OH × OW pixels
of the output, kh × kw kernel, G groups.

1. 2-d convolution (二维卷积)
   Asked     "Write a 2-d convolution without the framework's. How large is the output?"
             「不用框架手写二维卷积。输出尺寸怎么算？」
   Idea      Slide the kernel over the image, and sum products. With stride s, padding p and
             dilation d (步幅、填充、空洞率):
             Y[o, i, j] = b[o] + Σ_{c,u,v} W[o, c, u, v] · X[c, s·i + d·u − p, s·j + d·v − p]
             OH = ⌊(H + 2p − d(kh − 1) − 1) / s⌋ + 1
             im2col: lay each patch out as a column of C·kh·kw numbers, each kernel as a row. Then
             all of it is one matrix product, which is what processors do best.
   Cost      Time O(B · O · C/G · kh·kw · OH·OW). Memory: im2col holds each pixel up to kh·kw times.
   追问      Convolution or cross-correlation (互相关)? Mathematics turns the kernel by 180°;
             networks do not, as they learn it anyway. Backward? dW is the correlation of X with
             dY, dX the transposed convolution of dY. Receptive field (感受野)? A layer adds
             d(k − 1) times the product of the strides before it; two 3 × 3 see 5 × 5 with 18
             weights instead of 25. What is 1 × 1 for? It mixes channels. Depthwise (深度可分离)?
             groups = C, then 1 × 1: the cost falls to 1/O + 1/k². Faster ways? Winograd for 3 × 3,
             FFT for large kernels, im2col on the fly (implicit GEMM).
   Mistakes  The dilation forgotten in the output's size. Patches flattened in another order than
             the weights. With groups, O must be divided too. A bias before batch norm does nothing.

2. Transposed convolution (转置卷积)
   Asked     "What does a transposed convolution do? Is it the inverse of a convolution?"
             「转置卷积做什么？它是卷积的逆运算吗？」
   Idea      Each pixel stamps the kernel, times its value, onto the output. Stamps are s apart, and
             overlaps add up; padding cuts the border off. A convolution is linear, y = A x; this
             is Aᵀ y. So the shape comes back, the values do not. OH = s(H − 1) + kh − 2p.
   Cost      That of the convolution it belongs to.
   追问      Where is it used? U-Net, the generator of a GAN, the gradient of every convolution.
             Checkerboards (棋盘效应)? If k is no multiple of s, pixels get different numbers of
             stamps. Choose such a k, or enlarge first and then convolve. output_padding? A stride
             of 2 maps 7 and 8 pixels to the same size; it says which one comes back.
   Mistakes  The weight is (C, O, kh, kw), the other way round. Padding makes the output smaller.

3. Pooling (池化)
   Asked     "Write max and average pooling. Where do their gradients go?"
             「手写最大池化和平均池化。梯度怎样回传？」
   Idea      One number for each k × k window: its largest, or its mean. Windows do not overlap, and
             what does not fill one is dropped.
   Cost      O(B C H W) in time; max pooling keeps a position for each window.
   追问      Gradients? Of max, all to the largest (of equal ones, the first); of the mean, 1/k² to
             each. Pooling or a stride of 2? The stride learns how to shrink. Global average pooling
             (全局平均池化)? It replaces the large linear layer at the end, for images of any size.
   Mistakes  Zeros as the padding of max pooling: it must be −∞. Gradients to every one of several
             equal values: after a ReLU many are 0.

4. Why does a convolution do better? (为什么卷积更适合图像)
   Asked     "Why does a CNN beat a fully connected network on images?"
             「为什么图像任务上 CNN 比全连接网络好？」
   Idea      It knows two things about images before it sees one. Near pixels belong together
             (局部连接), and a shape is the same wherever it stands (权值共享、平移等变). A fully
             connected layer must learn each shape at each place anew. Shuffle the pixels of all
             images in the same way, and it learns just as well; a CNN does not.
   Cost      Not fewer weights here, but each one is used at every position: about 100 times as many
             multiplications as stage 1's network.
   追问      Equivariant or invariant (等变、不变)? A convolution moves with its input; pooling and
             the mean over positions forget where it was. Fully invariant? No: strides and borders
             break it. The picture of shifted digits measures it. ViT? It has fewer such
             assumptions and needs more data.
   Mistakes  "A CNN has fewer weights." "Pooling makes it invariant": to a few pixels at most.
"""

import itertools
import math
import numbers
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

import metrics
import stage1_mlp
import stage2_rnn
from interview import check_whole, training
from stage1_mlp import Data, Split

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "figures" / "interview"


# ---- Checks of the input --------------------------------------------------------------------


def pair(name: str, value, least: int) -> tuple[int, int]:
    """A whole number n as (n, n), a pair as it is; ValueError for anything else, or below least."""
    values = tuple(value) if isinstance(value, tuple | list) else (value, value)
    whole = [isinstance(n, numbers.Integral) and not isinstance(n, bool) for n in values]
    if len(values) != 2 or not all(whole) or min(values) < least:
        wanted = f"a whole number of at least {least}, or a pair of them"
        raise ValueError(f"{name} must be {wanted}, not {value!r}")
    return values


def check_images(x: Tensor, weight: Tensor) -> None:
    """ValueError unless x and weight have four axes each and the same kind of numbers."""
    if x.ndim != 4 or weight.ndim != 4:
        found = f"{tuple(x.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"x (B, C, H, W) and a weight of four axes expected, not {found}")
    if x.dtype != weight.dtype:
        raise ValueError(f"x and weight must be of one dtype, not {x.dtype} and {weight.dtype}")


def check_bias(bias: Tensor | None, n_channels: int) -> None:
    """ValueError unless there is no bias, or one number for each channel of the output."""
    if bias is not None and bias.shape != (n_channels,):
        raise ValueError(f"bias must have shape ({n_channels},), not {tuple(bias.shape)}")


# ---- 1. Convolution -------------------------------------------------------------------------


def corr2d(X: Tensor, K: Tensor) -> Tensor:
    """Two-dimensional cross-correlation (二维互相关) of an image X (H, W) with a kernel K (kh, kw).

    Y[i, j] = Σ_uv K[u, v] · X[i + u, j + v]: (H − kh + 1, W − kw + 1). The sum over the kernel is
    outside: each of its numbers meets a whole slice of the image at once. ValueError on shapes.
    """
    if X.ndim != 2 or K.ndim != 2 or not K.numel():
        raise ValueError(f"X (H, W) and K (kh, kw) expected, not {(*X.shape,)} and {(*K.shape,)}")
    H, W = X.shape
    kh, kw = K.shape
    if kh > H or kw > W:
        raise ValueError(f"the kernel {(kh, kw)} does not fit into the image {(H, W)}")
    OH = H - kh + 1
    OW = W - kw + 1
    Y = 0
    for u in range(kh):
        for v in range(kw):
            Y = Y + K[u, v] * X[u : u + OH, v : v + OW]  # (OH, OW)
    return Y


def patches(x: Tensor, kernel, stride=1, padding=0, dilation=1) -> Tensor:
    """Every patch that a kernel (kh, kw) meets: (..., H, W) -> (..., kh, kw, OH, OW).

    Output pixel i meets the rows s·i + d·u of the padded image, u = 0 … kh − 1; columns likewise.
    ValueError if not one patch fits.
    """
    if x.ndim < 2:
        raise ValueError(f"images (..., H, W) expected, not {tuple(x.shape)}")
    kh, kw = pair("kernel", kernel, 1)
    sh, sw = pair("stride", stride, 1)
    ph, pw = pair("padding", padding, 0)
    dh, dw = pair("dilation", dilation, 1)
    padded = F.pad(x, (pw, pw, ph, ph))  # zeros; the last axis comes first
    H, W = padded.shape[-2:]
    OH = (H - dh * (kh - 1) - 1) // sh + 1
    OW = (W - dw * (kw - 1) - 1) // sw + 1
    if OH < 1 or OW < 1:
        wide = f"a kernel of {(kh, kw)} with {dilation=}"
        raise ValueError(f"{wide} does not fit into the padded image {(H, W)}")
    rows = dh * torch.arange(kh)[:, None] + sh * torch.arange(OH)  # (kh, OH)
    columns = dw * torch.arange(kw)[:, None] + sw * torch.arange(OW)  # (kw, OW)
    return padded[..., rows[:, None, :, None], columns[None, :, None, :]]


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
) -> Tensor:
    """2-d convolution (二维卷积) as F.conv2d, by im2col: one matrix product over all patches.

    x (B, C, H, W), weight (O, C / groups, kh, kw), bias (O,) -> (B, O, OH, OW). stride, padding and
    dilation are numbers or pairs (down, across). With groups, kernels of a group see its channels
    alone. ValueError for what does not fit.
    """
    check_images(x, weight)
    check_whole(groups=groups)
    B, C = x.shape[:2]
    n_out, n_seen, kh, kw = weight.shape
    if n_seen * groups != C or n_out % groups:
        found = f"x has {C} channels, weight has shape {tuple(weight.shape)}"
        raise ValueError(f"weight (O, C / groups, kh, kw) with {groups=} expected, but {found}")
    check_bias(bias, n_out)
    found = patches(x, (kh, kw), stride, padding, dilation)  # (B, C, kh, kw, OH, OW)
    OH, OW = found.shape[-2:]
    columns = found.reshape(B, groups, n_seen * kh * kw, OH * OW)
    kernels = weight.reshape(groups, n_out // groups, n_seen * kh * kw)
    out = (kernels @ columns).reshape(B, n_out, OH, OW)
    return out if bias is None else out + bias[:, None, None]


# ---- 2. Transposed convolution --------------------------------------------------------------


def conv_transpose2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride=1, padding=0
) -> Tensor:
    """Transposed convolution (转置卷积) as F.conv_transpose2d: each pixel stamps the kernel.

    x (B, C, H, W), weight (C, O, kh, kw), bias (O,) -> (B, O, OH, OW) with
    OH = s(H − 1) + kh − 2p. It is the gradient of `conv2d` with the same weight in its input.
    ValueError for what does not fit.
    """
    check_images(x, weight)
    B, C, H, W = x.shape
    n_in, n_out, kh, kw = weight.shape
    if n_in != C:
        found = f"x has {C} channels, weight has shape {tuple(weight.shape)}"
        raise ValueError(f"weight (C, O, kh, kw) expected, but {found}")
    check_bias(bias, n_out)
    sh, sw = pair("stride", stride, 1)
    ph, pw = pair("padding", padding, 0)
    height = sh * (H - 1) + kh
    width = sw * (W - 1) + kw
    if height <= 2 * ph or width <= 2 * pw:
        raise ValueError(f"{padding=} cuts off all of the {height} × {width} pixels")
    stamps = torch.einsum("bchw,couv->uvbohw", x, weight)
    out = x.new_zeros(B, n_out, height, width)
    for u in range(kh):
        for v in range(kw):
            out[:, :, u : u + sh * H : sh, v : v + sw * W : sw] += stamps[u, v]  # (B, O, H, W)
    out = out[:, :, ph : height - ph, pw : width - pw]
    return out if bias is None else out + bias[:, None, None]


# ---- 3. Pooling -----------------------------------------------------------------------------


def windows(x: Tensor, k) -> Tensor:
    """Windows of k (a number or a pair) side by side: (..., H, W) -> (..., kh · kw, OH, OW)."""
    if not x.is_floating_point():
        raise ValueError(f"floating-point values expected, not {x.dtype}")
    return patches(x, k, stride=k).flatten(-4, -3)


def max_pool2d(x: Tensor, k) -> Tensor:
    """The largest number of each window (最大池化): (..., H, W) -> (..., ⌊H / kh⌋, ⌊W / kw⌋).

    As F.max_pool2d(x, k): windows side by side, k a number or a pair. ValueError if none fits.
    """
    return windows(x, k).max(-3).values


def avg_pool2d(x: Tensor, k) -> Tensor:
    """The mean of each window (平均池化): (..., H, W) -> (..., ⌊H / kh⌋, ⌊W / kw⌋).

    As F.avg_pool2d(x, k): windows side by side, k a number or a pair. ValueError if none fits.
    """
    return windows(x, k).mean(-3)


# ---- 4. A network for 28 × 28 images --------------------------------------------------------


class Block(nn.Module):
    """3 × 3 convolution, 2 × 2 max pooling where asked for, batch norm, ReLU: (B, C, H, W)."""

    def __init__(self, n_in: int, n_out: int, pool: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(n_in, n_out, 3, padding=1, bias=False)  # the norm has a bias
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()
        self.norm = nn.BatchNorm2d(n_out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.conv(x))  # before the norm, which then has a quarter of the work
        return F.relu(self.norm(x))


class CNN(nn.Module):
    """Five 3 × 3 convolutions, the mean over positions, one linear layer (卷积神经网络).

    forward(x): (B, 784), (B, 28, 28) or (B, 1, 28, 28) -> logits (B, n_classes). ValueError on
    images of another size.
    """

    def __init__(self, n_classes: int = 10):
        super().__init__()
        self.blocks = nn.Sequential(
            Block(1, 32, pool=True),  # (B, 32, 14, 14)
            Block(32, 48),  # (B, 48, 14, 14)
            Block(48, 64, pool=True),  # (B, 64, 7, 7)
            Block(64, 128, pool=True),  # (B, 128, 3, 3)
            Block(128, 256),  # (B, 256, 3, 3)
        )
        self.linear = nn.Linear(256, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1:].numel() != 28 * 28:
            raise ValueError(f"images of 28 × 28 pixels expected, not shape {tuple(x.shape)}")
        maps = self.blocks(x.reshape(-1, 1, 28, 28))  # (B, 256, 3, 3)
        features = maps.mean((-2, -1))  # (B, 256): global average pooling
        return self.linear(features)


class InParts(nn.Module):
    """The network on 500 images at a time: the maps of 10,000 would take gigabytes.

    mirrored: of an image and its mirror image the mean probability, as a logarithm.
    """

    def __init__(self, model: nn.Module, mirrored: bool = False):
        super().__init__()
        self.model = model
        self.mirrored = mirrored

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([self.read(part) for part in images.split(500)])

    def read(self, images: Tensor) -> Tensor:
        if not self.mirrored:
            return self.model(images)
        mirror_images = images.reshape(-1, 28, 28).flip(-1)
        views = [self.model(images).log_softmax(1), self.model(mirror_images).log_softmax(1)]
        return torch.stack(views).logsumexp(0) - math.log(2)  # (B, n_classes)


# ---- Data -----------------------------------------------------------------------------------


def shift_and_mirror(images: Tensor, far: int = 2) -> Tensor:
    """Move each image by up to `far` pixels, mirror one in two: (B, …) -> (B, 28, 28).

    What comes in at an edge continues the edge.
    """
    B = len(images)
    on = {"device": images.device}
    padded = F.pad(images.reshape(B, 1, 28, 28), (far, far, far, far), mode="replicate")[:, 0]
    places = torch.arange(28, **on)
    rows = places + torch.randint(2 * far + 1, (B, 1), **on)  # (B, 28)
    columns = places + torch.randint(2 * far + 1, (B, 1), **on)  # (B, 28)
    is_mirrored = torch.rand(B, 1, **on) < 0.5
    columns = torch.where(is_mirrored, columns.flip(1), columns)
    return padded[torch.arange(B, **on)[:, None, None], rows[:, :, None], columns[:, None, :]]


# ---- Training -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """All that a run depends on; chosen on the validation images."""

    # what is done to the training images: "deformed" as in stage 1, "shifted and mirrored"
    augmentation: Literal["deformed", "shifted and mirrored"]
    # judge an image and its mirror image, and take the mean
    mirrored: bool
    # highest rate of SGD with Nesterov's momentum 0.9; it rises and falls as in stage 1
    lr: float = 0.1
    weight_decay: float = 5e-4
    warmup: float = 0.25
    label_smoothing: float = 0.1
    batch_size: int = 128
    epochs: int = 10
    # training images used
    n_train: int = stage1_mlp.N_TRAIN
    # of weights, batch order and augmentation; never of the validation split
    seed: int = 0

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.n_train / self.batch_size)

    @property
    def n_steps(self) -> int:
        return self.epochs * self.steps_per_epoch


LOAD = {"MNIST": stage1_mlp.load_data, "Fashion-MNIST": stage2_rnn.load_data}
RECIPES = {
    "MNIST": Recipe("deformed", mirrored=False, epochs=10),
    "Fashion-MNIST": Recipe("shifted and mirrored", mirrored=True, epochs=15),
}
SEEDS = [0, 1, 2]


def augmented(images: Tensor, recipe: Recipe, progress: float) -> Tensor:
    """The images of a batch, changed at random; gently in the last 30 % of the run, as in stage 1.

    progress is the share of the run that is over.
    """
    gentle = progress > 0.7
    if recipe.augmentation == "deformed":
        return stage1_mlp.deform(images, 0.3 if gentle else 0.8)
    return shift_and_mirror(images, 1 if gentle else 2)


def train(recipe: Recipe, data: Data, name: str) -> tuple[CNN, list[dict]]:
    """Train a CNN by the recipe: the model, and a history row an epoch, printed with the name."""
    torch.manual_seed(recipe.seed)
    model = CNN().to(data.train.images.device, memory_format=torch.channels_last)  # faster
    kind = {"momentum": 0.9, "nesterov": True, "weight_decay": recipe.weight_decay}
    optimizer = torch.optim.SGD(model.parameters(), recipe.lr, **kind)
    images = data.train.images[: recipe.n_train]
    labels = data.train.labels[: recipe.n_train]
    sample = Split(images[:5000], labels[:5000])  # of the training images, to evaluate on
    batches = stage1_mlp.batches(len(images), recipe.batch_size, images.device)
    history = []
    losses = []
    start = time.perf_counter()
    for step, batch in enumerate(itertools.islice(batches, recipe.n_steps), 1):
        x = augmented(images[batch], recipe, step / recipe.n_steps)
        for group in optimizer.param_groups:
            group["lr"] = stage1_mlp.learning_rate(recipe, step)
        loss = stage1_mlp.cross_entropy(model(x), labels[batch], recipe.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step % recipe.steps_per_epoch == 0:
            row = {"step": step, "epoch": step // recipe.steps_per_epoch}
            row["objective"] = torch.stack(losses).mean().item()
            for part, split in (("train", sample), ("val", data.val)):
                found = stage1_mlp.evaluate(InParts(model), split)
                row |= {f"{part}_{score}": found[score] for score in ("loss", "accuracy")}
            row["seconds"] = time.perf_counter() - start
            history.append(row)
            losses = []
            where = f"  {name}: epoch {row['epoch']} of {recipe.epochs}, {row['seconds']:.0f} s"
            print(f"{where}, {stage1_mlp.progress(row)}", flush=True)
            if stage1_mlp.status(history) == "diverged":
                break
    return model, history


def execute(dataset: str, recipe: Recipe, data_dir: Path, device: str) -> tuple[dict, dict]:
    """Train and measure one run on one thread: (its rows {table: [row]}, its weights).

    The test images are read once, at the end.
    """
    torch.set_num_threads(1)
    data = Data(*(Split(*(a.to(device) for a in split)) for split in LOAD[dataset](data_dir)))
    model, history = train(recipe, data, f"{dataset}, seed {recipe.seed}")
    key = {"experiment": dataset, "value": "CNN", "seed": recipe.seed}
    row = key | training.recipe_columns(recipe) | {"status": stage1_mlp.status(history)}
    row |= {name: history[-1][name] for name in ("train_loss", "train_accuracy", "seconds")}
    row["val_accuracy_one_view"] = history[-1]["val_accuracy"]
    judge = InParts(model, recipe.mirrored)
    for part, split in (("val", data.val), ("test", data.test)):
        found = stage1_mlp.evaluate(judge, split)
        row |= {f"{part}_{score}": found[score] for score in stage1_mlp.SCORES}
    row["parameters"] = sum(p.numel() for p in model.parameters())
    row |= stage1_mlp.origin_of_rows(device) | {"threads": torch.get_num_threads()}
    tables = {
        "convolution_history": [key | logged for logged in history],
        "convolution_runs": [row],  # last: a run is finished when its row stands here
    }
    return tables, {name: weights.cpu() for name, weights in model.state_dict().items()}


def missing_runs(out: Path) -> list[tuple[str, Recipe]]:
    """The runs that convolution_runs.csv does not hold, or holds with another recipe."""
    missing = []
    for seed in SEEDS:
        for dataset, recipe in RECIPES.items():
            key = {"experiment": dataset, "seed": seed} | training.recipe_columns(recipe)
            no_weights = seed == 0 and not file_of(out, "cnn", dataset, ".pt").exists()
            if no_weights or not training.has_row(out / "convolution_runs.csv", key):
                missing.append((dataset, replace(recipe, seed=seed)))
    return missing


def train_missing(out: Path, data_dir: Path, workers: int, device: str) -> None:
    """Train what is missing, each run on one thread; save each as it ends, and seed 0's weights."""
    todo = missing_runs(out)
    n_runs = len(RECIPES) * len(SEEDS)
    print(f"training: {n_runs - len(todo)} of {n_runs} runs found, {len(todo)} to do", flush=True)
    calls = [(dataset, recipe, data_dir, device) for dataset, recipe in todo]
    for tables, weights in training.in_parallel(execute, calls, workers):
        row = tables["convolution_runs"][0]
        if row["seed"] == 0:
            path = file_of(out, "cnn", row["experiment"], ".pt")
            with metrics.written_aside(path) as aside:
                torch.save(weights, aside)
        metrics.replace_rows(out, tables, [(dataset, "CNN") for dataset in RECIPES])
        words = f"{row['experiment']}, seed {row['seed']}: {row['seconds'] / 60:.1f} minutes"
        print(f"saved: {words}, test accuracy {100 * row['test_accuracy']:.2f} %", flush=True)


def file_of(out: Path, kind: str, dataset: str, suffix: str) -> Path:
    """Such as convolution_cnn_fashion_mnist.pt."""
    return out / f"convolution_{kind}_{dataset.lower().replace('-', '_')}{suffix}"


def reader_of(out: Path) -> Path:
    """Weights of the CNN that reads what gpt and diffusion draw: in `out`, else the committed."""
    own = file_of(out, "cnn", "MNIST", ".pt")
    return own if own.exists() else file_of(FIGURES, "cnn", "MNIST", ".pt")


def load_cnn(path: Path) -> CNN:
    """The network of saved weights, ready to read images."""
    model = CNN()
    model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    return model.eval()


# ---- Shown at work: the functions beside torch's --------------------------------------------


def median_milliseconds(function: Callable, repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - start))
    return float(np.median(times))


def compare_with_torch(images: Tensor) -> pd.DataFrame:
    """Rows of convolution_functions.csv: the largest difference from torch's, and both times.

    images (B, 28, 28); the weights are random, 32 channels in and 64 out.
    """
    generator = torch.Generator().manual_seed(0)
    x = F.conv2d(images[:, None], torch.randn(32, 1, 3, 3, generator=generator) / 3)
    weight = torch.randn(64, 32, 3, 3, generator=generator) / 17
    back = torch.randn(32, 64, 3, 3, generator=generator) / 17
    grouped = torch.randn(64, 8, 3, 3, generator=generator) / 8
    calls = {
        "conv2d": (conv2d, F.conv2d, (x, weight), {}),
        "conv2d, stride 2": (conv2d, F.conv2d, (x, weight), {"stride": 2, "padding": 1}),
        "conv2d, 4 groups": (conv2d, F.conv2d, (x, grouped), {"groups": 4}),
        "conv_transpose2d": (conv_transpose2d, F.conv_transpose2d, (x, back), {"stride": 2}),
        "max_pool2d": (max_pool2d, F.max_pool2d, (x, 2), {}),
        "avg_pool2d": (avg_pool2d, F.avg_pool2d, (x, 2), {}),
    }
    rows = []
    for name, (ours, theirs, arguments, options) in calls.items():
        difference = (ours(*arguments, **options) - theirs(*arguments, **options)).abs().max()
        row = {"function": name, "largest_difference": difference.item()}
        row["ours_ms"] = median_milliseconds(partial(ours, *arguments, **options))
        row["torch_ms"] = median_milliseconds(partial(theirs, *arguments, **options))
        rows.append(row)
    return pd.DataFrame(rows)


# ---- Shown at work: what kernels see --------------------------------------------------------

KERNELS = {  # made by hand
    "left − right\n(Sobel)": torch.tensor([[1, 0, -1], [2, 0, -2], [1, 0, -1]]) / 4,
    "top − bottom\n(Sobel)": torch.tensor([[1, 2, 1], [0, 0, 0], [-1, -2, -1]]) / 4,
    "pixel − mean\nof the 8 around": torch.tensor([[-1, -1, -1], [-1, 8, -1], [-1, -1, -1]]) / 8,
    "mean of 9": torch.ones(3, 3) / 9,
}


def learned_kernels(model: CNN, n: int = 6) -> dict[str, Tensor]:
    """The n kernels (3, 3) of the first layer with the largest norms, each scaled to norm 1."""
    kernels = model.blocks[0].conv.weight.detach()[:, 0]  # (32, 3, 3)
    norms = kernels.flatten(1).norm(dim=1)
    largest = norms.argsort(descending=True)[:n].tolist()
    return {f"kernel {i}": kernels[i] / norms[i] for i in largest}


def draw_kernels(
    path: Path, kernels: dict[str, Tensor], images: dict[str, Tensor], title: str
) -> None:
    """Above the kernels, below what `corr2d` makes of each image with each of them.

    One scale for all maps, symmetric about 0, and one for all kernels, whose numbers stand in them.
    """
    columns = ["image", *kernels]
    pairs = itertools.product(images, kernels)
    maps = {(name, kernel): corr2d(images[name], kernels[kernel]) for name, kernel in pairs}
    limit = max(found.abs().max().item() for found in maps.values())
    largest = max(kernel.abs().max().item() for kernel in kernels.values())
    size = {"width": 1.5 * len(columns) + 1.2, "height": 1.4 * (len(images) + 1) + 1}
    with metrics.picture(path, title, len(images) + 1, len(columns), **size) as panels:
        for axes in panels.flat:
            axes.set(xticks=[], yticks=[])
            axes.grid(False)
        panels[0, 0].axis("off")
        for axes, (name, kernel) in zip(panels[0, 1:], kernels.items(), strict=True):
            axes.imshow(kernel.numpy(), cmap="RdBu_r", vmin=-2 * largest, vmax=2 * largest)
            for row, column in itertools.product(range(3), range(3)):
                number = round(kernel[row, column].item(), 2) + 0.0  # no −0
                axes.text(column, row, f"{number:.2f}", ha="center", va="center", fontsize=10)
            axes.set_title(name, fontsize=11)
        for row, (name, image) in zip(panels[1:], images.items(), strict=True):
            row[0].imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=1)
            row[0].set_ylabel(name)
            for axes, kernel in zip(row[1:], kernels, strict=True):
                found = maps[name, kernel].numpy()
                drawn = axes.imshow(found, cmap="RdBu_r", vmin=-limit, vmax=limit)
        label = "output of the kernel\n(pixels are 0 … 1)"
        axes.figure.colorbar(drawn, ax=panels[1:, :], label=label, shrink=0.8)


def example_images(data: dict[str, Data]) -> dict[str, Tensor]:
    """A validation image of each set with its name, pixels 0 … 1: {name: (28, 28)}."""
    wanted = {"MNIST": ("digit 5", 5), "Fashion-MNIST": ("sandal", 5)}
    images = {}
    for dataset, (name, label) in wanted.items():
        split = data[dataset].val
        image = split.images[split.labels == label][0].reshape(28, 28)
        images[name] = (image - image.min()) / (image.max() - image.min())
    return images


# ---- Shown at work: shifted digits ----------------------------------------------------------

FAR = 6  # pixels; most digits have a margin of 4, and beyond it they are cut


def shifted(images: Tensor, down: int, right: int) -> Tensor:
    """Every image (N, 28, 28) moved; what comes in is background, the image's smallest number."""
    far = max(abs(down), abs(right))
    padded = F.pad(images, (far, far, far, far), value=images.min().item())
    top = far - down
    left = far - right
    return padded[:, top : top + 28, left : left + 28]


def compare_shifted(models: dict[str, nn.Module], split: Split) -> pd.DataFrame:
    """Rows of convolution_shift.csv: accuracy on digits moved by 0 … FAR pixels, four ways."""
    rows = []
    images = split.images.reshape(-1, 28, 28)
    for name, model in models.items():
        for pixels in range(FAR + 1):
            for down, right in ((pixels, 0), (-pixels, 0), (0, pixels), (0, -pixels)):
                moved = Split(shifted(images, down, right), split.labels)
                found = stage1_mlp.evaluate(InParts(model), moved)
                row = {"network": name, "pixels": pixels, "down": down, "right": right}
                rows.append(row | {"val_accuracy": found["accuracy"]})
    return pd.DataFrame(rows)


def draw_shifted(path: Path, rows: pd.DataFrame, n_images: int) -> None:
    """Accuracy over the shift, a line a network, a band from the worst to the best direction."""
    rows = rows.assign(percent=100 * rows["val_accuracy"])
    title = "How far may a digit move before it is misread?"
    spread = f"mean and range of 4 directions, {n_images:,} validation images, seed 0"
    with metrics.picture(path, f"{title}\n({spread})", width=10) as axes:
        colors = metrics.colors_of(list(dict.fromkeys(rows["network"])), ordered=False)
        for name, found in rows.groupby("network", sort=False):
            style = {"errorbar": ("pi", 100), "marker": "o", "color": colors[name], "label": name}
            metrics.draw_line(axes, found, "pixels", "percent", **style)
        axes.axhline(10, color="0.5", linestyle=":", label="chance")
        axes.set(xlabel="shift (pixels)", ylabel="accuracy (%)", ylim=(0, 102))
        metrics.legend_beside(axes)


# ---- Shown at work: the networks of all stages ----------------------------------------------

OTHERS = [  # data set, network, where its rows are: stage and experiment
    ("MNIST", "MLP", "stage1", "baseline"),
    ("MNIST", "MLP,\ndeformed", "stage1", "deformed"),
    ("Fashion-MNIST", "RNN", "stage2", "rnn"),
    ("Fashion-MNIST", "GRU", "stage2", "gru"),
    ("Fashion-MNIST", "LSTM", "stage2", "lstm"),
]


def scores_of_all(figures: Path, runs: pd.DataFrame) -> pd.DataFrame:
    """A row a run of stages 1 and 2 and of the CNN.

    Columns: dataset, network, seed, parameters, minutes, device (that it was trained on), percent
    (right on the test images).
    """
    columns = ["seed", "seconds", "parameters", "device"]
    tables = []
    for dataset, network, stage, experiment in OTHERS:
        rows = metrics.load_rows(figures / stage / "runs.csv")
        scores = metrics.load_rows(figures / stage / "test_metrics.csv")
        if rows.empty or scores.empty:
            continue
        rows = rows.loc[rows["experiment"] == experiment, columns]
        scores = scores.loc[scores["experiment"] == experiment, ["seed", "accuracy"]]
        tables.append(rows.merge(scores, on="seed").assign(dataset=dataset, network=network))
    for dataset, rows in runs.groupby("experiment", sort=False):
        rows = rows[[*columns, "test_accuracy"]]
        rows = rows.rename(columns={"test_accuracy": "accuracy"})
        tables.append(rows.assign(dataset=dataset, network="CNN"))
    table = pd.concat(tables, ignore_index=True)
    table["percent"] = 100 * table["accuracy"]
    table["minutes"] = table["seconds"] / 60
    return table.sort_values("dataset", ascending=False, kind="stable")


def comparison_table(scores: pd.DataFrame) -> str:
    """Markdown: a line a network, its parameters, minutes and test accuracy over seeds."""
    lines = []
    for (dataset, network), rows in scores.groupby(["dataset", "network"], sort=False):
        accuracy = metrics.summarise(rows["percent"])
        line = {"images": dataset, "network": network.replace("\n", " ")}
        line["parameters"] = f"{rows['parameters'].iloc[0]:,.0f}"
        line["minutes a run"] = f"{rows['minutes'].mean():.1f}"
        line["trained on"] = ", ".join(rows["device"].unique())
        line["test accuracy %"] = str(accuracy)
        line["n"] = str(accuracy.n)
        lines.append(line)
    return metrics.markdown(lines)


def draw_networks(path: Path, scores: pd.DataFrame) -> None:
    """A panel a data set: test accuracy of each network, with its t interval."""
    title = "Test accuracy of the networks of stages 1 and 2 and of the CNN"
    spread = "every seed, their mean and its 95 % t interval"
    size = {"n_columns": 2, "width": 12, "height": 4.8}
    color_of = metrics.colors_of(list(dict.fromkeys(scores["network"])), ordered=False)
    with metrics.picture(path, f"{title}\n({spread})", **size) as panels:
        groups = scores.groupby("dataset", sort=False)
        for axes, (dataset, rows) in zip(panels, groups, strict=False):
            n_seeds = rows.groupby("network")["seed"].nunique()
            named = rows.assign(name=[f"{name}\nn = {n_seeds[name]}" for name in rows["network"]])
            colors = {name: color_of[name.rsplit("\n", 1)[0]] for name in named["name"]}
            metrics.draw_points(axes, named, "name", "percent", colors, highest=100)
            changed = RECIPES[dataset].augmentation
            axes.set_title(f"{dataset}; images {changed} for the CNN")
            axes.set(xlabel="", ylabel="test accuracy (%)")
            axes.margins(x=0.2, y=0.2)


# ---- The program ----------------------------------------------------------------------------


def show_functions(out: Path, data: dict[str, Data]) -> None:
    """What our functions and torch's make of the same images; and what kernels made by hand see."""
    images = data["Fashion-MNIST"].val.images[::50]
    table = compare_with_torch(images)
    table.to_csv(out / "convolution_functions.csv", index=False, float_format="%.3g")
    print(f"\n{len(images)} images, float32; both times in milliseconds, one thread:")
    print(table.to_string(index=False, float_format="{:.3g}".format))
    title = "What four 3 × 3 kernels made by hand see"
    draw_kernels(out / "convolution_kernels.png", KERNELS, example_images(data), title)


def show_networks(out: Path, data: dict[str, Data], runs: pd.DataFrame) -> None:
    """Curves, learned kernels, shifted digits and the table, of the runs that are saved."""
    history = metrics.load_rows(out / "convolution_history.csv")
    for dataset, rows in history.groupby("experiment", sort=False):
        path = file_of(out, "curves", dataset, ".png")
        metrics.draw_curves(path, rows, f"The CNN on {dataset}: loss and accuracy in training")
    for dataset in runs["experiment"].unique():
        kernels = learned_kernels(load_cnn(file_of(out, "cnn", dataset, ".pt")))
        path = file_of(out, "learned", dataset, ".png")
        title = f"What six kernels see that the first layer learned on {dataset}"
        draw_kernels(path, kernels, example_images(data), title)
    if "MNIST" in set(runs["experiment"]):
        show_shifted(out, data["MNIST"].val)
    scores = scores_of_all(ROOT / "figures", runs)
    draw_networks(out / "convolution_networks.png", scores)
    table = comparison_table(scores)
    (out / "convolution_networks.md").write_text(table + "\n", encoding="utf-8")
    print(f"\nTest accuracy, mean ± std over n seeds:\n{table}")


def show_shifted(out: Path, val: Split) -> None:
    """Stage 1's networks and the CNN, all of seed 0, on digits that were moved."""
    split = Split(val.images[::5], val.labels[::5])  # they stand class by class
    stage1 = ROOT / "figures" / "stage1"
    models = {
        "CNN, deformed images": load_cnn(file_of(out, "cnn", "MNIST", ".pt")),
        "MLP, deformed images": stage1_mlp.load_weights(stage1 / "deformed.pt")[0],
        "MLP": stage1_mlp.load_weights(stage1 / "baseline.pt")[0],
    }
    rows = compare_shifted(models, split)
    rows.to_csv(out / "convolution_shift.csv", index=False, float_format="%.6g")
    draw_shifted(out / "convolution_shift.png", rows, len(split.labels))
    means = 100 * rows.groupby(["network", "pixels"], sort=False)["val_accuracy"].mean()
    print("\nAccuracy (%) on validation digits moved by so many pixels, mean of 4 directions:")
    print(means.unstack().round(1).to_string())


def main(
    train: bool = False,
    workers: int = 1,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    out: Path = FIGURES,
    data_dir: Path = ROOT / "data",
) -> int:
    """Show convolutions at work: our functions beside torch's, kernels, and a CNN's results.

    Args:
        train: train first what is not saved yet; a command started again goes on.
        workers: runs that are trained at the same time, each on one thread.
        device: what trains; auto takes a GPU if there is one. Everything else takes the CPU.
        out: the folder that tables, pictures and weights go to and are read from.
        data_dir: the folder that holds MNIST/raw and FashionMNIST/raw.
    """
    print("Convolution (卷积): our functions beside torch's, what kernels see, and a CNN beside")
    print("the networks of stages 1 and 2; a minute from what is saved, --train takes 2 hours")
    torch.set_num_threads(1)
    try:
        with stage1_mlp.claimed(out):
            if train:
                train_missing(out, data_dir, workers, stage1_mlp.device_of(device))
            data = {dataset: load(data_dir) for dataset, load in LOAD.items()}
            show_functions(out, data)
            runs = metrics.load_rows(out / "convolution_runs.csv")
            if runs.empty:
                print("\nNo trained network yet: python -m interview.convolution --train")
            else:
                show_networks(out, data, runs)
    except (stage1_mlp.DataError, stage2_rnn.DataError, ValueError, OSError) as error:
        print(f"interview.convolution: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; finished runs are saved, the same command goes on", file=sys.stderr)
        return 130
    print(f"\ntables and pictures: {out}/convolution_*")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
