"""Diffusion by hand: DDPM, DDIM, guidance and the U-Net (手撕扩散模型与 U-Net).

    python -m interview.diffusion               ten digits from the weights, and the tables: 1 min
    python -m interview.diffusion --train       trains first what is not saved yet
    python -m interview.diffusion --evaluate    measures the digits that the network draws
    python -m interview.diffusion --out DIR     the same into and from DIR

What is committed was trained and measured on an NVIDIA H100: 4 minutes with --workers 5, and a
minute and a half. Two idle cores need hours for the training (--threads 2), in as many starts as
you like, and one core most of an hour for a quarter of the digits.

Read `add_noise`, `noise_loss` and `ddim_step` first: they are the whole idea. Then `UNet.forward`.
Axis letters in shape comments: B batch, C channels, H × W pixels, D condition. Times are those of
the paper: x_0 is the image, x_T noise, T = 1,000, and tables of the schedule begin with t = 0.

1. Noising and its closed form (前向加噪)
   Asked     "Write the forward process of DDPM. Why can any x_t be drawn in one step?"
             「手写 DDPM 的前向过程。为什么可以一步得到任意时刻的 x_t？」
   Idea      Shrink the image a little and add a little noise, T times:
             x_t = √(1 − β_t) x_{t−1} + √β_t ε. Independent normal numbers add up to one, so
             x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε  with  ᾱ_t = Π_{s ≤ t} (1 − β_s).
   Cost      O(pixels), whatever t is. Step by step it would be t times that.
   追问      Why the √(1 − β)? It keeps a variance of 1 at 1. What must ᾱ_T be? Nearly 0: sampling
             starts from pure noise, so training must end there. Linear or cosine schedule? The
             cosine one (Nichol 2021) destroys small images more slowly.
   Mistakes  β instead of √β. An index off by one, which shows only at t = 1. Pixels of 0 … 1 where
             the noise has mean 0: scale them to −1 … 1.

2. The loss (训练目标)
   Asked     "What does the network predict, and what is the loss?"
             「网络预测什么？损失是什么？」
   Idea      Draw an image, a time and noise; predict the noise: L = ‖ε − ε_θ(x_t, t)‖². It is the
             variational bound (变分下界) with the weights of its terms left out.
   Cost      One pass of the network a batch; no sampling in training.
   追问      Why the noise and not x_0? Each follows from the other and x_t; the choice weighs the
             times differently. What is the best possible prediction? The mean of ε given x_t.
             Link to the score function (得分函数)? ε_θ = −√(1 − ᾱ_t) ∇ log p(x_t).
   Mistakes  One t for the whole batch. Weights of the last step for sampling: take their moving
             average (指数滑动平均, EMA).

3. Sampling: DDPM and DDIM (采样)
   Asked     "Write both samplers. Why may DDIM skip steps?"
             「手写 DDPM 与 DDIM 采样。DDIM 为什么可以跳步？」
   Idea      The noise tells x_0: x̂_0 = (x_t − √(1 − ᾱ_t) ε_θ) / √ᾱ_t. DDPM draws x_{t−1} from
             q(x_{t−1} | x_t, x̂_0). DDIM goes from t to any s < t:
             x_s = √ᾱ_s x̂_0 + √(1 − ᾱ_s − σ²) ε_θ + σ z  with
             σ² = η² (1 − ᾱ_s)/(1 − ᾱ_t) · (1 − ᾱ_t/ᾱ_s). The loss knows only q(x_t | x_0), and
             that is the same for every η, so one network serves all of them.
   Cost      One pass of the network a step, two with guidance.
   追问      η = 0? No noise: the same x_T gives the same image, and two can be interpolated. η = 1
             and all steps? DDPM. Which variance has DDPM? β_t or β̃_t; here β̃_t, the posterior's.
   Mistakes  Noise in the last step, where β̃_1 = 0. x̂_0 clipped, but ε not computed again from it.

4. Classifier-free guidance (无分类器引导)
   Asked     "How is a diffusion model told what to draw?"  「怎样让扩散模型按条件生成？」
   Idea      Train with labels, and without them one time in ten. Then go further in the direction
             that the label points to: ε = ε_∅ + w (ε_c − ε_∅). w = 0 ignores the label, w = 1 is
             the plain conditional model.
   Cost      Two passes of the network, as one batch.
   追问      What does a large w cost? Diversity: digits become alike; `--evaluate` measures it.
             Papers write 1 + w where we write w: ask which. Classifier guidance (Dhariwal 2021)?
             The gradient of a classifier that was trained on noisy images instead.
   Mistakes  The empty label is class 0. Labels dropped for whole batches, not image by image.

5. U-Net
   Asked     "Draw and write a U-Net. What are its skip connections for?"
             「画出并手写 U-Net。跳跃连接有什么用？」
   Idea      Going down, maps shrink and each place sees more of the image. Going up, they grow
             again, and the maps of the same size from the way down are concatenated (拼接): the
             way up knows *what*, the skip connection knows *where*.

             x ── block ─────────────────────── concat ── block ── out      28 × 28
                    └ shrink ── block ── concat ── block ── enlarge ┘       14 × 14
                                  └ shrink ─ blocks ─ enlarge ┘              7 × 7
   Cost      Sides halve and channels double: every level takes about as many multiplications,
             but the largest maps take most of the memory, the smallest most of the weights.
   追问      Concatenate or add? Adding saves channels, concatenating lets the next layer choose.
             Where does the time enter? In each block, a number for each channel. Where attention?
             On the smallest map: it costs (H·W)². Odd sizes? Pad: here they are refused.
   Mistakes  Skips taken in the wrong order (first in, last out). Transposed convolutions whose
             kernel is no multiple of the stride: checkerboards.

6. IoU and Dice (分割指标)
   Asked     "How is a segmentation judged? Write both, and a Dice loss."
             「分割怎么评价？手写 IoU、Dice 和 Dice 损失。」
   Idea      IoU = |A ∩ B| / |A ∪ B|, Dice = 2 |A ∩ B| / (|A| + |B|) = 2 IoU / (1 + IoU), which is
             F1 of the pixels. The loss puts probabilities into Dice: 1 − 2 Σpy / (Σp + Σy).
   Cost      O(pixels).
   追问      Why not accuracy? All-background is right on most pixels. Why cross-entropy too? Dice
             has a weak gradient where prediction and target do not meet.
   Mistakes  0 / 0 for two empty masks: they agree, 1. A mean over the batch's pixels when each
             image was meant.
"""

import copy
import itertools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import pandas as pd
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

import metrics
import stage1_mlp
from interview import check_whole, convolution, cuda_or_cpu, training
from stage1_mlp import Data, Split
from stage3_attention import MultiHeadAttention

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "figures" / "interview"
CHECKPOINTS = ROOT / "out" / "interview"


# ---- 1. Noising -----------------------------------------------------------------------------


class Schedule(NamedTuple):
    """How much noise each step adds: (T + 1,) float64 each; place t is time t, and β_0 = 0."""

    betas: Tensor
    alphas: Tensor  # 1 − β_t
    alpha_bars: Tensor  # Π_{s ≤ t} α_s: the share of the image's variance that is left at t


def linear_schedule(n_steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Schedule:
    """β from `first` at t = 1 to `last` at t = T, evenly spaced (Ho 2020)."""
    check_whole(n_steps=n_steps)
    if not 0 < first <= last < 1:
        raise ValueError(f"0 < first <= last < 1 expected, not {first=} and {last=}")
    betas = torch.zeros(n_steps + 1, dtype=torch.float64)
    betas[1:] = torch.linspace(first, last, n_steps, dtype=torch.float64)
    alphas = 1 - betas
    return Schedule(betas, alphas, alphas.cumprod(0))


def at_times(table: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """table[t] of each image of x, so that it multiplies x: (B,) -> (B, 1, …, 1)."""
    if t.shape != x.shape[:1]:
        raise ValueError(f"a time for each of {len(x)} images expected, not {tuple(t.shape)}")
    return table[t].to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def noise_step(x: Tensor, t: Tensor, noise: Tensor, betas: Tensor) -> Tensor:
    """One step of q(x_t | x_{t−1}): x_t = √(1 − β_t) x_{t−1} + √β_t ε. x (B, …), t (B,)."""
    beta = at_times(betas, t, x)
    return (1 - beta).sqrt() * x + beta.sqrt() * noise


def add_noise(x_0: Tensor, t: Tensor, noise: Tensor, alpha_bars: Tensor) -> Tensor:
    """All t steps at once: x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε. x_0 and noise (B, …), t (B,)."""
    if noise.shape != x_0.shape:
        shapes = f"{tuple(x_0.shape)} and {tuple(noise.shape)}"
        raise ValueError(f"x_0 and noise of one shape expected, not {shapes}")
    alpha_bar = at_times(alpha_bars, t, x_0)
    return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise


# ---- 2. The loss ----------------------------------------------------------------------------


def noise_loss(predict: Callable, x_0: Tensor, t: Tensor, noise: Tensor, alpha_bars) -> Tensor:
    """Mean squared error of the predicted noise, a number; predict(x_t, t) -> noise (B, …)."""
    x_t = add_noise(x_0, t, noise, alpha_bars)
    return (predict(x_t, t).float() - noise).square().mean()


# ---- 3. Sampling ----------------------------------------------------------------------------


def clean_image(x_t: Tensor, noise: Tensor, alpha_bar: float, clip: bool = False) -> Tensor:
    """The x_0 (B, …) from which this noise leads to x_t; with clip, no pixel leaves −1 … 1."""
    x_0 = (x_t - math.sqrt(1 - alpha_bar) * noise) / math.sqrt(alpha_bar)
    return x_0.clamp(-1, 1) if clip else x_0


def posterior(x_t: Tensor, x_0: Tensor, t: int, schedule: Schedule) -> tuple[Tensor, float]:
    """Mean and variance of q(x_{t−1} | x_t, x_0), by Bayes' rule (Ho 2020, eq. 7)."""
    if not 1 <= t < len(schedule.betas):
        raise ValueError(f"t must be a time of 1 … {len(schedule.betas) - 1}, not {t}")
    beta = schedule.betas[t].item()
    alpha = schedule.alphas[t].item()
    alpha_bar = schedule.alpha_bars[t].item()
    alpha_bar_before = schedule.alpha_bars[t - 1].item()
    weight_0 = math.sqrt(alpha_bar_before) * beta / (1 - alpha_bar)
    weight_t = math.sqrt(alpha) * (1 - alpha_bar_before) / (1 - alpha_bar)
    variance = (1 - alpha_bar_before) / (1 - alpha_bar) * beta
    return weight_0 * x_0 + weight_t * x_t, variance


def ddpm_step(
    x_t: Tensor, noise: Tensor, t: int, schedule: Schedule, z: Tensor, clip: bool = False
) -> Tensor:
    """x_{t−1} from x_t, its predicted noise and fresh noise z, all (B, …)."""
    x_0 = clean_image(x_t, noise, schedule.alpha_bars[t].item(), clip)
    mean, variance = posterior(x_t, x_0, t, schedule)
    return mean + math.sqrt(variance) * z


def ddim_step(
    x_t: Tensor,
    noise: Tensor,
    alpha_bar: float,
    alpha_bar_next: float,
    eta: float = 0.0,
    z: Tensor | float = 0.0,
    clip: bool = False,
) -> Tensor:
    """x_s from x_t and its predicted noise, both (B, …), for any s < t (Song 2021, eq. 12, 16).

    alpha_bar is ᾱ_t, alpha_bar_next ᾱ_s. z is fresh noise, which is used only if eta > 0.
    """
    if not 0 < alpha_bar < alpha_bar_next <= 1 or not 0 <= eta <= 1:
        wanted = "0 < alpha_bar < alpha_bar_next <= 1 and an eta of 0 … 1 expected"
        raise ValueError(f"{wanted}, not {alpha_bar=}, {alpha_bar_next=} and {eta=}")
    x_0 = clean_image(x_t, noise, alpha_bar, clip)
    if clip:  # the noise that leads from the clipped image to x_t
        noise = (x_t - math.sqrt(alpha_bar) * x_0) / math.sqrt(1 - alpha_bar)
    variance = (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)
    sigma = eta * math.sqrt(variance)
    direction = math.sqrt(max(1 - alpha_bar_next - sigma**2, 0.0)) * noise
    return math.sqrt(alpha_bar_next) * x_0 + direction + sigma * z


@torch.inference_mode()
def ddpm_sample(
    predict: Callable,
    x_T: Tensor,
    schedule: Schedule,
    clip: bool = False,
    generator: torch.Generator | None = None,
    on_step: Callable | None = None,
) -> Tensor:
    """Images from noise x_T (B, …) in T steps. predict(x_t, t) -> noise, t (B,) whole numbers.

    on_step(t, x_t) is called with every x_t, from x_T to x_0.
    """
    x = x_T
    for t in range(len(schedule.betas) - 1, 0, -1):
        if on_step is not None:
            on_step(t, x)
        noise = predict(x, times_like(x, t)).to(x.dtype)
        z = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        x = ddpm_step(x, noise, t, schedule, z, clip)
    if on_step is not None:
        on_step(0, x)
    return x


@torch.inference_mode()
def ddim_sample(
    predict: Callable,
    x_T: Tensor,
    schedule: Schedule,
    n_steps: int = 50,
    eta: float = 0.0,
    clip: bool = False,
    generator: torch.Generator | None = None,
    on_step: Callable | None = None,
) -> Tensor:
    """As `ddpm_sample`, but in n_steps steps, evenly spaced from T to 0; eta 0 draws no noise."""
    times = ddim_times(len(schedule.betas) - 1, n_steps)
    x = x_T
    for t, t_next in itertools.pairwise(times):
        if on_step is not None:
            on_step(t, x)
        noise = predict(x, times_like(x, t)).to(x.dtype)
        z = 0.0
        if eta > 0:
            z = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        alpha_bar = schedule.alpha_bars[t].item()
        x = ddim_step(x, noise, alpha_bar, schedule.alpha_bars[t_next].item(), eta, z, clip)
    if on_step is not None:
        on_step(0, x)
    return x


def ddim_times(T: int, n_steps: int) -> list[int]:
    """n_steps + 1 whole numbers from T down to 0; ValueError if there are more steps than times."""
    check_whole(n_steps=n_steps)
    if n_steps > T:
        raise ValueError(f"n_steps must be at most T = {T}, not {n_steps}")
    return torch.linspace(T, 0, n_steps + 1, dtype=torch.float64).round().long().tolist()


def times_like(x: Tensor, t: int) -> Tensor:
    """The time t for each image of x: (B,) int64."""
    return torch.full((len(x),), t, device=x.device)


# ---- 4. Guidance ----------------------------------------------------------------------------


def guidance(conditional: Tensor, unconditional: Tensor, weight: float) -> Tensor:
    """ε_∅ + w (ε_c − ε_∅): 0 ignores the label, 1 is the conditional model, more exaggerates it."""
    return unconditional + weight * (conditional - unconditional)


def guided(model: "UNet", labels: Tensor, weight: float) -> Callable:
    """The function predict(x_t, t) of the samplers, for digits of the labels (B,)."""
    no_label = torch.full_like(labels, model.n_classes)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        if weight in (0, 1):  # one of the two is not needed
            return model(x, t, labels if weight == 1 else no_label)
        both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, no_label]))
        conditional, unconditional = both.chunk(2)
        return guidance(conditional, unconditional, weight)

    return predict


# ---- 5. U-Net -------------------------------------------------------------------------------


def time_embedding(t: Tensor, d: int) -> Tensor:
    """Times (B,) as waves of d / 2 frequencies: (B, d), sines and cosines in turn (时间编码).

    Wave i has the angle t / 10,000^(2i / d), as for positions in a transformer: the first turns
    fastest.
    """
    if d < 2 or d % 2:
        raise ValueError(f"d must be an even number of at least 2, not {d}")
    exponents = torch.arange(0, d, 2, device=t.device) / d  # (d / 2,)
    angles = t[:, None] / 10_000**exponents  # (B, d / 2)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)  # (B, d)


class ResidualBlock(nn.Module):
    """Two 3 × 3 convolutions around the condition: (B, n_in, H, W), (B, D) -> (B, n_out, H, W)."""

    def __init__(self, n_in: int, n_out: int, d_condition: int):
        super().__init__()
        self.norm_1 = nn.GroupNorm(8, n_in)
        self.conv_1 = nn.Conv2d(n_in, n_out, 3, padding=1)
        self.condition = nn.Linear(d_condition, n_out)
        self.norm_2 = nn.GroupNorm(8, n_out)
        self.conv_2 = nn.Conv2d(n_out, n_out, 3, padding=1)
        self.straight = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.conv_1(F.silu(self.norm_1(x)))
        h = h + self.condition(F.silu(condition))[:, :, None, None]  # a number for each channel
        h = self.conv_2(F.silu(self.norm_2(h)))
        return self.straight(x) + h


class SpatialAttention(nn.Module):
    """Every place attends to every other: (B, C, H, W) -> (B, C, H, W), with a residual."""

    def __init__(self, n_channels: int, n_heads: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, n_channels)
        self.attention = MultiHeadAttention(n_channels, n_heads)

    def forward(self, x: Tensor) -> Tensor:
        places = self.norm(x).flatten(2).mT  # (B, H · W, C)
        out, _ = self.attention(places)
        return x + out.mT.reshape(x.shape)


class UNet(nn.Module):
    """Down, across and up again, with the maps of the way down concatenated (Ronneberger 2015).

    forward: x (B, n_in, H, W), t (B,) or None, labels (B,) or None -> (B, n_out, H, W). Level i has
    channels[i] maps, each side half as long as the level before, so H and W must be multiples of
    2^(levels − 1). Channels are multiples of 8. The label n_classes, or None, means "no label".
    n_heads: of the attention on the smallest maps; 0 leaves it out. timed False: no t is taken.
    skips False leaves the skip connections out, to see what they do.
    """

    def __init__(
        self,
        n_in: int = 1,
        n_out: int = 1,
        channels: tuple[int, ...] = (48, 96, 120),
        n_classes: int = 10,
        n_heads: int = 4,
        timed: bool = True,
        skips: bool = True,
    ):
        super().__init__()
        check_whole(n_in=n_in, n_out=n_out)
        check_whole(0, n_classes=n_classes, n_heads=n_heads)
        if not channels or any(n < 8 or n % 8 for n in channels):
            raise ValueError(f"channels must be multiples of 8, one for each level, not {channels}")
        self.n_classes = n_classes
        self.skips = skips
        self.n_first = channels[0]
        D = 4 * channels[0]
        self.label = nn.Embedding(n_classes + 1, D)  # the last one: no label
        self.time = None
        if timed:
            self.time = nn.Sequential(nn.Linear(channels[0], D), nn.SiLU(), nn.Linear(D, D))
        self.first = nn.Conv2d(n_in, channels[0], 3, padding=1)
        before = (channels[0], *channels)
        self.down = nn.ModuleList()
        self.shrink = nn.ModuleList()
        self.up = nn.ModuleList()
        self.enlarge = nn.ModuleList()
        for level, n in enumerate(channels):
            self.down.append(ResidualBlock(before[level], n, D))
            self.up.append(ResidualBlock(2 * n if skips else n, n, D))
            if level > 0:  # between this level and the one above it
                above = channels[level - 1]
                self.shrink.append(nn.Conv2d(above, above, 3, stride=2, padding=1))
                self.enlarge.append(nn.Conv2d(n, above, 3, padding=1))
        n = channels[-1]
        self.middle = ResidualBlock(n, n, D)
        self.attention = SpatialAttention(n, n_heads) if n_heads else nn.Identity()
        self.norm = nn.GroupNorm(8, channels[0])
        self.last = nn.Conv2d(channels[0], n_out, 3, padding=1)
        nn.init.zeros_(self.last.weight)  # it begins with the prediction 0
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, t: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        self.check(x, t)
        if labels is None:
            labels = torch.full((len(x),), self.n_classes, device=x.device)
        condition = self.label(labels)  # (B, D)
        if self.time is not None:
            waves = time_embedding(t, self.n_first).to(condition.dtype)
            condition = condition + self.time(waves)

        h = self.first(x)
        maps = []  # of each level, for the way up
        for level, block in enumerate(self.down):
            if level > 0:
                h = self.shrink[level - 1](h)  # (B, C, H, W) -> (B, C, H / 2, W / 2)
            h = block(h, condition)
            maps.append(h)

        h = self.attention(self.middle(h, condition))

        for level in reversed(range(len(self.up))):
            if self.skips:
                h = torch.cat([h, maps[level]], 1)  # (B, 2 C, H, W)
            h = self.up[level](h, condition)
            if level > 0:
                h = F.interpolate(h, scale_factor=2.0, mode="nearest")
                h = self.enlarge[level - 1](h)
        return self.last(F.silu(self.norm(h)))

    def check(self, x: Tensor, t: Tensor | None) -> None:
        """ValueError unless x is a batch of images of a size that can be halved so often."""
        multiple = 2 ** (len(self.down) - 1)
        n_in = self.first.in_channels
        if x.ndim != 4 or x.shape[1] != n_in:
            raise ValueError(f"images (B, {n_in}, H, W) expected, not {tuple(x.shape)}")
        H, W = x.shape[2:]
        if H % multiple or W % multiple:
            raise ValueError(f"height and width must be multiples of {multiple}, not {(H, W)}")
        if (t is None) != (self.time is None):
            wanted = "no times" if self.time is None else "a time for each image"
            raise ValueError(f"{wanted} expected, not {t}")


# ---- 6. IoU and Dice ------------------------------------------------------------------------


def overlap(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Of each image, pixels in both masks, and the sum of the pixels of each: (B,) twice."""
    if predicted.shape != target.shape or predicted.ndim < 2:
        shapes = f"{tuple(predicted.shape)} and {tuple(target.shape)}"
        raise ValueError(f"two masks (B, …) of one shape expected, not {shapes}")
    for mask in (predicted, target):
        if mask.dtype != torch.bool:
            raise ValueError(f"masks must be bool, not {mask.dtype}: compare with a threshold")
    both = (predicted & target).flatten(1).sum(1)
    return both, predicted.flatten(1).sum(1) + target.flatten(1).sum(1)


def iou(predicted: Tensor, target: Tensor) -> Tensor:
    """Intersection over union (交并比) of bool masks (B, …): (B,); of two empty masks 1."""
    both, total = overlap(predicted, target)
    union = total - both
    return torch.where(union > 0, both / union, 1.0)


def dice(predicted: Tensor, target: Tensor) -> Tensor:
    """2 |A ∩ B| / (|A| + |B|) of bool masks (B, …): (B,); of two empty masks 1."""
    both, total = overlap(predicted, target)
    return torch.where(total > 0, 2 * both / total, 1.0)


def dice_loss(logits: Tensor, target: Tensor, smooth: float = 1.0) -> Tensor:
    """1 − the mean Dice of probabilities: logits and target (B, …) -> a number.

    `smooth` is added above and below, so that empty masks have a loss and a gradient.
    """
    if logits.shape != target.shape:
        shapes = f"{tuple(logits.shape)} and {tuple(target.shape)}"
        raise ValueError(f"logits and target of one shape expected, not {shapes}")
    probabilities = logits.sigmoid().flatten(1)
    target = target.to(logits.dtype).flatten(1)
    both = (probabilities * target).sum(1)
    total = probabilities.sum(1) + target.sum(1)
    return 1 - ((2 * both + smooth) / (total + smooth)).mean()


# ---- Data: digits, and digits in clutter ----------------------------------------------------

N_CLASSES = 10


def digits_of(split: Split) -> Split:
    """The images as pixels of 0 … 1, (N, 28, 28), with their labels."""
    stored = stage1_mlp.as_stored(split)
    return Split(stored.images.view(-1, 28, 28) / 255, stored.labels)


SCENE = (40, 64)  # height and width
N_STROKES = 6
SCENE_NOISE = 0.25  # standard deviation; pixels are 0 … 1


class Scenes(NamedTuple):
    images: Tensor  # (B, 1, 40, 64)
    labels: Tensor  # (B,): the class that is asked for
    targets: Tensor  # (B, 1, 40, 64) bool: the ink of the digit of that class


def draw_scenes(digits: Split, n: int, generator: torch.Generator | None = None) -> Scenes:
    """n images of two digits of different classes, six strokes and noise: which pixels are the 3?

    One digit stands left, one right, each moved at random, and they may touch. Strokes are as
    thick and as bright as digits. The class asked is that of one of the two, by chance. Its pixels
    brighter than 0.5 are the target, also where something else lies over them.
    """
    device = digits.images.device
    on = {"device": device, "generator": generator}
    first = torch.randint(len(digits.labels), (n,), **on)
    # the first of eight others that has another class; all equal happens once in 10⁸
    candidates = torch.randint(len(digits.labels), (n, 8), **on)
    differs = digits.labels[candidates] != digits.labels[first][:, None]
    chosen = differs.int().argmax(1, keepdim=True)
    second = candidates.gather(1, chosen)[:, 0]

    H, W = SCENE
    is_left = torch.rand(n, **on) < 0.5
    near = torch.randint(13, (n,), **on)  # columns 0 … 12
    far = torch.randint(24, W - 27, (n,), **on)  # columns 24 … 36
    asked = placed(digits.images[first], torch.where(is_left, near, far), **on)
    other = placed(digits.images[second], torch.where(is_left, far, near), **on)
    ink = torch.stack([asked, other, draw_strokes(n, **on)]).amax(0)
    noise = torch.randn(n, H, W, **on)
    images = ink + SCENE_NOISE * noise
    return Scenes(images[:, None], digits.labels[first], (asked > 0.5)[:, None])


def placed(images: Tensor, left: Tensor, device, generator) -> Tensor:
    """Images (n, 28, 28) in empty scenes, at column `left` (n,) and a random row: (n, 40, 64)."""
    n = len(images)
    H, W = SCENE
    top = torch.randint(H - 27, (n,), device=device, generator=generator)
    places = torch.arange(28, device=device)
    rows = (top[:, None] + places)[:, :, None]  # (n, 28, 1)
    columns = (left[:, None] + places)[:, None, :]  # (n, 1, 28)
    scenes = images.new_zeros(n, H, W)
    scenes[torch.arange(n, device=device)[:, None, None], rows, columns] = images
    return scenes


def draw_strokes(n: int, device, generator) -> Tensor:
    """Straight strokes, six in each image, with soft edges: (n, 40, 64), 0 … 1."""
    on = {"device": device, "generator": generator}
    H, W = SCENE
    size = torch.tensor([H, W], device=device)
    start = torch.rand(n, N_STROKES, 2, **on) * size  # row, column
    angle = torch.rand(n, N_STROKES, **on) * 2 * math.pi
    length = 6 + 14 * torch.rand(n, N_STROKES, **on)
    direction = torch.stack([angle.sin(), angle.cos()], -1)  # (n, S, 2)
    rows = torch.arange(H, device=device)[:, None].expand(H, W)
    columns = torch.arange(W, device=device).expand(H, W)
    pixels = torch.stack([rows, columns], -1)  # (H, W, 2)
    from_start = pixels - start[:, :, None, None, :]  # (n, S, H, W, 2)
    along = (from_start * direction[:, :, None, None, :]).sum(-1)  # (n, S, H, W)
    along = along.clamp(min=0).minimum(length[:, :, None, None])
    nearest = along[..., None] * direction[:, :, None, None, :]
    distance = (from_start - nearest).norm(dim=-1)  # of each pixel from each stroke
    return (2.0 - distance).clamp(0, 1).amax(1)


# ---- Training -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """All that a run depends on."""

    # "digits": noise prediction; "scenes": segmentation
    task: Literal["digits", "scenes"]
    channels: tuple[int, ...]
    skips: bool = True
    n_heads: int = 0
    # highest rate of AdamW; it rises and falls as in stage 1
    lr: float = 1e-3
    warmup: float = 0.05
    batch_size: int = 128
    n_steps: int = 1000
    # share of digits without their label, for guidance
    unlabelled: float = 0.1
    # of the weights' exponential moving average, which is what is kept and judged
    ema: float = 0.99
    # history rows; after each the run can go on if it was stopped
    n_rounds: int = 20
    # validation digits, or scenes of validation digits and in the end of test digits
    n_judged: int = 1000
    # of weights and of everything that is drawn in training
    seed: int = 0


class Run(NamedTuple):
    experiment: str
    value: str
    recipe: Recipe

    @property
    def name(self) -> str:
        return f"{self.experiment}, {self.value}, seed {self.recipe.seed}"

    @property
    def key(self) -> dict:
        return {"experiment": self.experiment, "value": self.value, "seed": self.recipe.seed}


# sized for two cores: few channels for the maps of 28 × 28, since each costs 784 places
DIGITS = Recipe("digits", (24, 48, 96), n_heads=4, n_steps=6000, ema=0.999, n_rounds=30)
SHORT = {"batch_size": 32, "n_rounds": 10, "n_judged": 500}
SEGMENTERS = {
    "U-Net": Recipe("scenes", (16, 32, 64), lr=3e-3, **SHORT),
    "without skip connections": Recipe("scenes", (16, 32, 64), lr=3e-3, skips=False, **SHORT),
    # never shrinks: sharp, but it sees little
    "one level": Recipe("scenes", (16,), lr=3e-3, **SHORT),
}
SEEDS = (0, 1, 2)


def all_runs(smoke: bool = False) -> list[Run]:
    """The longest first, so that no worker waits for it; smoke: tiny ones, of seed 0."""
    runs = [Run("digits", "U-Net", DIGITS)]
    for seed in SEEDS:
        for value, recipe in SEGMENTERS.items():
            runs.append(Run("segmentation", value, replace(recipe, seed=seed)))
    if not smoke:
        return runs
    return [run._replace(recipe=tiny(run.recipe)) for run in runs if run.recipe.seed == 0]


def tiny(recipe: Recipe) -> Recipe:
    """The same task for two levels at most of 8 and 16 channels, and four steps."""
    channels = (8, 16)[: len(recipe.channels)]
    sizes = {"n_steps": 4, "batch_size": 6, "n_rounds": 2, "n_judged": 5}
    return replace(recipe, channels=channels, **sizes)


def build(recipe: Recipe) -> UNet:
    timed = recipe.task == "digits"
    kind = {"n_classes": N_CLASSES, "n_heads": recipe.n_heads, "timed": timed}
    return UNet(channels=recipe.channels, skips=recipe.skips, **kind)


def half_on_gpu(device: str) -> torch.autocast:
    """bfloat16 for the products on a GPU; on a CPU float32 as it is."""
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def digits_loss(model: UNet, x: Tensor, labels: Tensor, t: Tensor, noise: Tensor, alpha_bars):
    """`noise_loss` of digits (B, 28, 28) with pixels of 0 … 1, their labels and times (B,)."""

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        return model(x_t, t, labels)

    x_0 = 2 * x[:, None] - 1  # (B, 1, 28, 28), −1 … 1
    return noise_loss(predict, x_0, t, noise, alpha_bars)


def scenes_loss(model: UNet, scenes: Scenes) -> Tensor:
    """Cross-entropy of the pixels plus the Dice loss."""
    logits = model(scenes.images, labels=scenes.labels).float()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, scenes.targets.float())
    return cross_entropy + dice_loss(logits, scenes.targets)


def loss_of_batch(recipe: Recipe, model: UNet, digits: Split, alpha_bars: Tensor) -> Tensor:
    """The loss of a batch drawn now."""
    B = recipe.batch_size
    if recipe.task == "scenes":
        return scenes_loss(model, draw_scenes(digits, B))
    on = {"device": digits.images.device}
    batch = torch.randint(len(digits.labels), (B,), **on)
    has_label = torch.rand(B, **on) >= recipe.unlabelled
    labels = torch.where(has_label, digits.labels[batch], N_CLASSES)
    t = torch.randint(1, len(alpha_bars), (B,), **on)
    noise = torch.randn(B, 1, 28, 28, **on)
    return digits_loss(model, digits.images[batch], labels, t, noise, alpha_bars)


@torch.no_grad()
def judge(recipe: Recipe, model: UNet, digits: Split, alpha_bars: Tensor) -> dict[str, float]:
    """What a network is judged by: the noise loss, or IoU and Dice; always on the same draws."""
    device = digits.images.device
    generator = torch.Generator(device).manual_seed(0)
    on = {"device": device, "generator": generator}
    n = recipe.n_judged
    if recipe.task == "digits":
        chosen = torch.randperm(len(digits.labels), **on)[:n]
        t = torch.randint(1, len(alpha_bars), (len(chosen),), **on)
        noise = torch.randn(len(chosen), 1, 28, 28, **on)
        losses = []
        for part in torch.arange(len(chosen), device=device).split(500):
            x, labels = digits.images[chosen[part]], digits.labels[chosen[part]]
            loss = digits_loss(model, x, labels, t[part], noise[part], alpha_bars)
            losses.append(loss * len(part))
        return {"loss": torch.stack(losses).sum().item() / len(chosen)}
    scenes = draw_scenes(digits, n, generator)
    predicted = segmented(model, scenes)
    return {
        "iou": iou(predicted, scenes.targets).mean().item(),
        "dice": dice(predicted, scenes.targets).mean().item(),
    }


@torch.no_grad()
def segmented(model: UNet, scenes: Scenes) -> Tensor:
    """The pixels with a probability above 1/2: (B, 1, H, W) bool."""
    parts = zip(scenes.images.split(200), scenes.labels.split(200), strict=True)
    return torch.cat([model(images, labels=labels) > 0 for images, labels in parts])


def train(run: Run, data: Data, checkpoint: Path) -> tuple[UNet, list[dict]]:
    """Train a network: the moving average of its weights, and a history row a round.

    Every round has random numbers of its own, so that a run which was stopped and goes on from the
    checkpoint ends as if it had not been.
    """
    recipe = run.recipe
    device = data.train.images.device
    alpha_bars = linear_schedule().alpha_bars.float().to(device)
    torch.manual_seed(recipe.seed)
    model = build(recipe).to(device)
    average = copy.deepcopy(model).requires_grad_(False)
    fused = device.type == "cuda"  # one launch instead of hundreds
    optimizer = torch.optim.AdamW(model.parameters(), recipe.lr, weight_decay=0.01, fused=fused)
    parts = {"model": model, "average": average, "optimizer": optimizer}
    n_done, history = training.load_checkpoint(checkpoint, recipe, device, **parts)
    seconds_before = history[-1]["seconds"] if history else 0.0
    start = time.perf_counter()
    steps_per_round = recipe.n_steps // recipe.n_rounds
    for number in range(n_done, recipe.n_rounds):
        torch.manual_seed(1000 * recipe.seed + number)
        losses = []
        for step in range(number * steps_per_round + 1, (number + 1) * steps_per_round + 1):
            for group in optimizer.param_groups:
                group["lr"] = stage1_mlp.learning_rate(recipe, step)
            with half_on_gpu(device.type):
                loss = loss_of_batch(recipe, model, data.train, alpha_bars)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            update_average(average, model, min(recipe.ema, step / (step + 10)))
            losses.append(loss.detach())
        row = {"step": step, "train_loss": torch.stack(losses).mean().item()}
        found = judge(recipe, average, data.val, alpha_bars)
        row |= {f"val_{score}": value for score, value in found.items()}
        row["seconds"] = seconds_before + time.perf_counter() - start
        history.append(row)
        training.save_checkpoint(checkpoint, recipe, number + 1, history, **parts)
        words = ", ".join(f"{name} {row[name]:.4f}" for name in row if name.startswith("val_"))
        where = f"step {step} of {recipe.n_steps}, {row['seconds'] / 60:.2f} minutes"
        print(f"  {run.name}: {where}, loss {row['train_loss']:.4f}, {words}", flush=True)
    return average, history


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """θ̄ ← decay · θ̄ + (1 − decay) · θ, the moving average of the weights."""
    for kept, new in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)


# ---- Weights and runs -----------------------------------------------------------------------


def weights_file(out: Path, run: Run) -> Path:
    """Such as diffusion_segmentation_one_level.pt."""
    value = run.value.lower().replace("-", "").replace(" ", "_")
    return out / f"diffusion_{run.experiment}_{value}.pt"


def save_weights(path: Path, model: UNet, recipe: Recipe) -> None:
    """As float16: half the size. What is measured is measured after this rounding."""
    found = {"recipe": asdict(recipe), "weights": training.rounded(model)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with metrics.written_aside(path) as aside:
        torch.save(found, aside)


def load_weights(path: Path, device: str = "cpu") -> UNet:
    """The network of saved weights, in float32."""
    saved = torch.load(path, weights_only=True, map_location="cpu")
    model = build(Recipe(**saved["recipe"]))
    model.load_state_dict(saved["weights"])
    return model.requires_grad_(False).to(device).eval()


def load_digits(data_dir: Path, device: str = "cpu") -> Data:
    """MNIST with pixels of 0 … 1, on the device."""
    splits = [digits_of(split) for split in stage1_mlp.load_data(data_dir)]
    return Data(*(Split(split.images.to(device), split.labels.to(device)) for split in splits))


def execute(
    run: Run, data_dir: Path, device: str, checkpoints: Path, out: Path, threads: int = 1
) -> dict[str, list[dict]]:
    """Train one run and measure it; its weights are saved if its seed is 0. Rows {table: [row]}.

    Scenes of test digits are drawn once, at the end; the digits are measured by --evaluate.
    """
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU
    data = load_digits(data_dir, device)
    path = weights_file(out, run)
    checkpoint = checkpoints / f"{path.stem}_seed_{run.recipe.seed}.pt"
    average, history = train(run, data, checkpoint)
    if run.recipe.seed != 0:
        path = checkpoint.with_name(f"{checkpoint.stem}_weights.pt")
    save_weights(path, average, run.recipe)
    model = load_weights(path, device)  # rounded
    alpha_bars = linear_schedule().alpha_bars.float().to(device)
    row = run.key | training.recipe_columns(run.recipe)
    row |= {name: history[-1][name] for name in ("train_loss", "seconds")}
    for part, split in (("val", data.val), ("test", data.test)):
        if part == "val" or run.recipe.task == "scenes":
            found = judge(run.recipe, model, split, alpha_bars)
            row |= {f"{part}_{score}": value for score, value in found.items()}
    row["parameters"] = sum(p.numel() for p in model.parameters())
    row |= stage1_mlp.origin_of_rows(device) | {"threads": threads}
    return {
        "diffusion_history": [run.key | logged for logged in history],
        "diffusion_runs": [row],  # last: a run is finished when its row stands here
    }


def missing_runs(out: Path, smoke: bool = False) -> list[Run]:
    """The runs that diffusion_runs.csv does not hold, or holds with another recipe."""
    missing = []
    for run in all_runs(smoke):
        key = run.key | training.recipe_columns(run.recipe)
        no_weights = run.recipe.seed == 0 and not weights_file(out, run).exists()
        if no_weights or not training.has_row(out / "diffusion_runs.csv", key):
            missing.append(run)
    return missing


def train_missing(
    out: Path,
    data_dir: Path,
    workers: int,
    threads: int,
    device: str,
    checkpoints: Path,
    smoke: bool,
) -> None:
    """Train what is missing; save each run as it ends."""
    todo = missing_runs(out, smoke)
    n_runs = len(all_runs(smoke))
    print(f"training: {n_runs - len(todo)} of {n_runs} runs found, {len(todo)} to do", flush=True)
    order = list(dict.fromkeys((run.experiment, run.value) for run in all_runs(smoke)))
    calls = [(run, data_dir, device, checkpoints, out, threads) for run in todo]
    for tables in training.in_parallel(execute, calls, workers):
        metrics.replace_rows(out, tables, order)
        row = tables["diffusion_runs"][0]
        words = f"{row['experiment']}, {row['value']}, seed {row['seed']}"
        print(f"saved: {words}, {row['seconds'] / 60:.2f} minutes", flush=True)


# ---- Measured: the digits that are drawn ----------------------------------------------------

GUIDANCE = 2.0  # where only the steps differ
N_STEPS = 50  # where only the guidance differs
GUIDANCES = (1.0, 1.5, 2.0, 3.0, 5.0)
STEPS = (5, 10, 20, 50)
N_DRAWN = {"cpu": 500, "cuda": 2000}  # digits of each setting
N_DRAWN_DDPM = {"cpu": 100, "cuda": 2000}  # a digit by DDPM takes 1,000 steps
N_FRECHET = 500  # digits that a Fréchet distance takes: few would look worse than they are


class Setting(NamedTuple):
    """How digits are drawn."""

    sampler: Literal["DDIM", "DDPM", ""]
    n_steps: int
    guidance: float


REAL = Setting("", 0, 0.0)  # test images, which are measured beside what is drawn


def all_settings() -> list[Setting]:
    """Each guidance with 50 steps, each number of steps with guidance 2, and DDPM: the longest."""
    settings = [Setting("DDIM", N_STEPS, weight) for weight in GUIDANCES]
    settings += [Setting("DDIM", n_steps, GUIDANCE) for n_steps in STEPS if n_steps != N_STEPS]
    return [*settings, Setting("DDPM", 1000, GUIDANCE)]


def name_of(setting: Setting) -> str:
    """Such as "DDIM, 50 steps, w = 2"."""
    if setting == REAL:
        return "test images"
    return f"{setting.sampler}, {setting.n_steps} steps, w = {setting.guidance:g}"


def draw_digits(
    model: UNet,
    labels: Tensor,
    setting: Setting,
    seed: int = 0,
    schedule: Schedule | None = None,
    at_once: int = 50,
    on_step: Callable | None = None,
) -> Tensor:
    """A digit of each label (N,), drawn on the labels' device: pixels of 0 … 1, (N, 28, 28).

    The same seed begins with the same noise in every setting. at_once limits the memory. Not in
    bfloat16: near t = T, x̂_0 is a small difference divided by √ᾱ_t, and rounding would show.
    """
    schedule = linear_schedule() if schedule is None else schedule
    generator = torch.Generator(labels.device).manual_seed(seed)
    x_T = torch.randn(len(labels), 1, 28, 28, generator=generator, device=labels.device)
    options = {"clip": True, "generator": generator, "on_step": on_step}
    drawn = []
    parts = list(zip(labels.split(at_once), x_T.split(at_once), strict=True))
    for part, noise in training.every_minute(parts, f"{name_of(setting)}, parts of {at_once}"):
        predict = guided(model, part, setting.guidance)
        if setting.sampler == "DDPM":
            x_0 = ddpm_sample(predict, noise, schedule, **options)
        else:
            x_0 = ddim_sample(predict, noise, schedule, setting.n_steps, **options)
        drawn.append((x_0[:, 0] + 1) / 2)
    return torch.cat(drawn).clamp(0, 1)


def features_of(cnn: convolution.CNN, digits: Tensor) -> tuple[Tensor, Tensor]:
    """What the CNN sees in digits (N, 28, 28) of 0 … 1: features (N, 256) and classes (N,)."""
    images = stage1_mlp.normalised(255 * digits)
    with torch.no_grad():
        parts = [cnn.blocks(part[:, None]).mean((-2, -1)) for part in images.split(500)]
        features = torch.cat(parts)
        return features, cnn.linear(features).argmax(1)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between two sets of features (N, d) and (M, d), each taken as normal (Heusel 2017, FID).

    ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½). 0 for equal means and covariances; it is larger
    for smaller samples of the same digits, so compare equal N only.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"features (N, d) and (M, d) with N, M ≥ 2 expected, not {shapes}")
    a, b = a.double().cpu(), b.double().cpu()
    cov_a, cov_b = torch.atleast_2d(a.mT.cov()), torch.atleast_2d(b.mT.cov())
    # (Σ_a Σ_b)^½ has the trace of (R Σ_b R)^½ with R = Σ_a^½, which is symmetric
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
    trace_of_root = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return (means + cov_a.trace() + cov_b.trace() - 2 * trace_of_root).item()


def diversity(digits: Tensor, labels: Tensor) -> float:
    """Mean distance ‖a − b‖ between two digits of one class, mean over classes.

    digits (N, …) with pixels of 0 … 1; every pair of different digits counts.
    """
    means = []
    for label in labels.unique():
        of_class = digits[labels == label].flatten(1)
        if len(of_class) < 2:
            raise ValueError(f"two digits of class {label.item()} expected, not {len(of_class)}")
        means.append(torch.pdist(of_class).mean())
    return torch.stack(means).mean().item()


def first_of_each_class(split: Split, n: int) -> Split:
    """n images with as many of every class, in the order 0, 1, … 9, 0, 1 …"""
    places = [(split.labels == label).nonzero()[: n // N_CLASSES, 0] for label in range(N_CLASSES)]
    chosen = torch.stack(places, 1).flatten()
    return Split(split.images[chosen], split.labels[chosen])


def load_cnn(path: Path, device: str) -> convolution.CNN:
    """The CNN that reads the digits; ValueError says how to get it."""
    if not path.exists():
        ways = "python -m interview.convolution --train makes it; --cnn FILE names another"
        raise ValueError(f"the CNN that reads the digits is missing, {path}: {ways}")
    return convolution.load_cnn(path).to(device)


def measures(digits: Split, cnn: convolution.CNN, reference: Tensor) -> dict[str, float]:
    """How good digits are, beside features (M, 256) of real ones.

    No Fréchet distance of fewer than N_FRECHET digits.
    """
    features, classes = features_of(cnn, digits.images)
    frechet = math.nan
    if len(digits.labels) >= N_FRECHET:
        frechet = frechet_distance(features, reference)
    return {
        "read_as_asked": (classes == digits.labels).double().mean().item(),
        "frechet": frechet,
        "diversity": diversity(digits.images, digits.labels),
    }


def evaluate_all(
    out: Path, data_dir: Path, cnn: convolution.CNN, device: str, fresh: bool, smoke: bool
) -> None:
    """Draw digits in every setting, and measure each beside real ones: diffusion_samples.csv.

    The reference are all validation images; real test images, as many, say what is possible. A row
    is saved at once, and not measured again for the same weights; with fresh all are.
    """
    torch.set_float32_matmul_precision("high")
    data = load_digits(data_dir, device)
    path = weights_file(out, all_runs()[0])
    model = load_weights(path, device)
    settings = all_settings()
    n_drawn, n_drawn_ddpm = N_DRAWN[device], N_DRAWN_DDPM[device]
    schedule = linear_schedule()
    if smoke:
        settings = [Setting("DDIM", 2, 2.0), Setting("DDIM", 3, 1.0), Setting("DDPM", 10, 2.0)]
        n_drawn = n_drawn_ddpm = 20
        schedule = linear_schedule(10, 0.1, 0.5)

    table = out / "diffusion_samples.csv"
    pictures = out / "diffusion_drawn.pt"
    weights = training.digest_of(path)
    training.forget_rows(table, None if fresh else weights)
    drawn = {}  # setting -> its first digits
    if len(metrics.load_rows(table)):
        drawn = torch.load(pictures, weights_only=True)
    origin = stage1_mlp.origin_of_rows(device)
    # on a CPU the processor's time, so that what else the machine does hardly matters
    clock = time.process_time if device == "cpu" else time.perf_counter
    reference, _ = features_of(cnn, data.val.images)
    order = [("real", name_of(REAL)), *(("drawn", name_of(setting)) for setting in settings)]
    print(f"\nmeasuring {len(settings)} settings on {device}", flush=True)
    for setting in (REAL, *settings):
        n = n_drawn_ddpm if setting.sampler == "DDPM" else n_drawn
        key = {"experiment": "real" if setting == REAL else "drawn", "value": name_of(setting)}
        key |= {"seed": 0, "weights": weights}
        if training.has_row(table, key):
            continue
        start = clock()
        if setting == REAL:
            digits = first_of_each_class(data.test, n)
        else:
            labels = torch.arange(n, device=device) % N_CLASSES
            at_once = 1000 if device == "cuda" else 50
            digits = Split(draw_digits(model, labels, setting, 0, schedule, at_once), labels)
        row = key | {"n": n} | setting._asdict()
        row |= measures(digits, cnn, reference)  # waits for the GPU
        row |= {"seconds": clock() - start, "clock": clock.__name__} | origin
        drawn[key["value"]] = (255 * digits.images[:20]).round().byte().cpu()
        with metrics.written_aside(pictures) as aside:
            torch.save(drawn, aside)
        metrics.replace_rows(out, {table.stem: [row]}, order)
        words = f"{100 * row['read_as_asked']:.1f} % read as asked, {row['seconds']:.1f} s"
        print(f"  saved: {key['value']}, {words}", flush=True)


def samples_table(rows: pd.DataFrame) -> str:
    """Markdown, a line a setting: higher is better for reading, lower for the distance."""
    lines = []
    for row in rows.to_dict("records"):
        line = {"digits": row["value"], "read as asked %": f"{100 * row['read_as_asked']:.1f}"}
        frechet = row["frechet"]
        line["Fréchet distance"] = "–" if math.isnan(frechet) else f"{frechet:.3f}"
        line["diversity"] = f"{row['diversity']:.2f}"
        milliseconds = f"{1000 * row['seconds'] / row['n']:.2f}"
        line["ms a digit"] = milliseconds if row["experiment"] == "drawn" else "–"
        lines.append(line | {"n": str(row["n"])})
    return metrics.markdown(lines)


def segmentation_table(runs: pd.DataFrame) -> str:
    """Markdown, a line a network: IoU and Dice on scenes of test digits, over seeds."""
    lines = []
    for value, rows in runs.groupby("value", sort=False):
        score = metrics.summarise(100 * rows["test_iou"])
        line = {"network": value, "IoU %": str(score)}
        low, high = metrics.t_interval(100 * rows["test_iou"])
        line["95 % t interval"] = f"{low:.2f} … {high:.2f}" if score.n > 1 else "–"
        line["Dice %"] = str(metrics.summarise(100 * rows["test_dice"]))
        line["parameters"] = f"{rows['parameters'].iloc[0]:,.0f}"
        lines.append(line | {"n": str(score.n)})
    return metrics.markdown(lines)


# ---- Pictures -------------------------------------------------------------------------------


def draw_image(axes, image: Tensor, title: str = "") -> None:
    """One image (H, W), 0 is white and 1 black, without ticks."""
    axes.imshow(image.cpu().numpy(), cmap="gray_r", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set(visible=True, color="0.85")
    if title:
        axes.set_title(title, fontsize=11)


def draw_drawn(path: Path, drawn: dict[str, Tensor]) -> None:
    """A row of digits for each setting {name: (N, 28, 28)}, pixels of 0 … 255."""
    title = "Real digits, and below them digits that all begin with the same noise (w: guidance)"
    size = {"width": 12, "height": 0.72 * len(drawn) + 0.8, "squeeze": False}
    with metrics.picture(path, title, len(drawn), 1, **size) as panels:
        for axes, (name, images) in zip(panels[:, 0], drawn.items(), strict=True):
            draw_image(axes, torch.cat(list(images / 255), 1))  # (28, 28 · N)
            axes.set_ylabel(name, rotation=0, ha="right", va="center")


SHOWN = (1000, 800, 600, 400, 200, 100, 0)  # times in the picture of the way


def draw_way(path: Path, model: UNet, digits: Split) -> Tensor:
    """Three digits become noise, and noise becomes digits of their classes; gives ten new digits.

    digits: three real ones, pixels of 0 … 1. The new ones have the classes 0 … 9.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(digits.images.shape, generator=generator)
    alpha_bars = linear_schedule().alpha_bars
    states = {}  # time -> x_t of all ten

    def keep(t: int, x_t: Tensor) -> None:
        states[t] = x_t[:, 0]

    setting = Setting("DDIM", N_STEPS, GUIDANCE)
    drawn = draw_digits(model, torch.arange(N_CLASSES), setting, on_step=keep)
    title = "Above: digits become noise. Below: noise becomes the digits asked for (DDIM, 50 steps)"
    n = len(digits.labels)
    with metrics.picture(path, title, 2 * n, len(SHOWN), width=11, height=10) as panels:
        for column, t in enumerate(SHOWN):
            to_noise = panels[:n, -1 - column]  # time runs to the right, here upwards
            to_digit = panels[n:, column]
            times = torch.full((n,), t)
            noised = add_noise(2 * digits.images - 1, times, noise, alpha_bars)  # (n, 28, 28)
            for i, label in enumerate(digits.labels.tolist()):
                draw_image(to_noise[i], (noised[i] + 1) / 2, f"t = {t}" if i == 0 else "")
                draw_image(to_digit[i], (states[t][label] + 1) / 2, f"t = {t}" if i == 0 else "")
        for i, label in enumerate(digits.labels.tolist()):
            panels[i, 0].set_ylabel(f"a real {label}")
            panels[n + i, 0].set_ylabel(f"asked: {label}")
    return drawn


MEASURED = {  # column of diffusion_samples.csv: its name and unit
    "read_as_asked": "read as asked (%,\nhigher is better)",
    "frechet": "Fréchet distance\n(log scale, lower is better)",
    "diversity": "distance between two digits\nof a class (higher: more varied)",
}


def draw_samples(path: Path, rows: pd.DataFrame) -> None:
    """Above: what guidance changes. Below: what the number of steps changes."""
    rows = rows.assign(read_as_asked=100 * rows["read_as_asked"])
    real = rows[rows["experiment"] == "real"].iloc[0]
    ddim = rows[rows["sampler"] == "DDIM"]
    ddpm = rows[rows["sampler"] == "DDPM"]
    by_guidance = ddim[ddim["n_steps"] == N_STEPS].sort_values("guidance")
    by_steps = ddim[ddim["guidance"] == GUIDANCE].sort_values("n_steps")
    number = f"{real['n']:,} digits a point"
    if (ddpm["n"] != real["n"]).any():
        number += f", {ddpm['n'].iloc[0]:,} by DDPM"
    title = f"Digits from noise: guidance and steps ({number}, seed 0)"
    size = {"width": 13, "height": 7.5, "sharey": "col"}
    line = {"marker": "o", "color": metrics.COLORS[0], "label": "DDIM"}
    point = {"marker": "s", "color": metrics.COLORS[1], "label": "DDPM", "linestyle": "none"}
    with metrics.picture(path, title, 2, len(MEASURED), **size) as panels:
        for (above, below), (score, label) in zip(panels.T, MEASURED.items(), strict=True):
            above.plot(by_guidance["guidance"], by_guidance[score], **line)
            below.plot(by_steps["n_steps"], by_steps[score], **line)
            below.plot(ddpm["n_steps"], ddpm[score], **point)
            metrics.log_scale(below.xaxis, rows["n_steps"])
            below.set_xticks([5, 10, 20, 50, 1000])
            above.set(xlabel="guidance w", ylabel=label, title=f"DDIM, {N_STEPS} steps")
            below.set(xlabel="steps (log scale)", ylabel=label, title=f"guidance w = {GUIDANCE:g}")
            for axes in (above, below):
                axes.axhline(real[score], color="0.4", linestyle=":", label="real test digits")
                if score == "frechet":
                    metrics.log_scale(axes.yaxis, rows[score])
        metrics.legend_beside(panels[1, -1])


def draw_history(path: Path, history: pd.DataFrame) -> None:
    """How the noise loss of the digits falls, and how the IoU of the three networks rises."""
    title = "The course of training\n(IoU: mean, lowest and highest of the seeds)"
    with metrics.picture(path, title, n_columns=2, width=14) as (left, right):
        digits = history[history["experiment"] == "digits"]
        for column, name, color in (
            ("train_loss", "training digits", metrics.COLORS[0]),
            ("val_loss", "validation digits,\naveraged weights", metrics.COLORS[1]),
        ):
            left.plot(digits["step"], digits[column], color=color, label=name)
        metrics.log_scale(left.yaxis, digits["train_loss"])
        left.set(xlabel="training step", ylabel="squared error of the noise (log scale)")
        left.legend()
        scenes = history[history["experiment"] == "segmentation"]
        colors = metrics.colors_of(list(SEGMENTERS), ordered=False)
        for value, rows in scenes.groupby("value", sort=False):
            rows = rows.assign(percent=100 * rows["val_iou"])
            style = {"errorbar": ("pi", 100), "color": colors[value], "label": value}
            metrics.draw_line(right, rows, "step", "percent", **style)
        right.set(xlabel="training step", ylabel="IoU on validation scenes (%)")
        metrics.legend_beside(right)


def draw_segmented(path: Path, models: dict[str, UNet], scenes: Scenes) -> None:
    """A row an image: what is seen, what is asked for, and what each network marks, with IoU."""
    n = len(scenes.labels)
    title = "Which pixels belong to the digit that is asked for? (seed 0, validation digits)"
    columns = 2 + len(models)
    with metrics.picture(
        path, title, n, columns, width=2.6 * columns, height=1.9 * n + 0.8
    ) as panels:
        for i, label in enumerate(scenes.labels.tolist()):
            draw_image(panels[i, 0], scenes.images[i, 0], "image" if i == 0 else "")
            draw_image(panels[i, 1], scenes.targets[i, 0], "target" if i == 0 else "")
            panels[i, 0].set_ylabel(f"asked: {label}")
        for column, (name, model) in enumerate(models.items(), 2):
            predicted = segmented(model, scenes)
            scores = iou(predicted, scenes.targets).tolist()
            for i, score in enumerate(scores):
                draw_image(panels[i, column], predicted[i, 0], name if i == 0 else "")
                panels[i, column].set_xlabel(f"IoU {100 * score:.0f} %", fontsize=11)


# ---- The program ----------------------------------------------------------------------------


def show(out: Path, data_dir: Path) -> None:
    """The tables that are saved, and pictures of what the saved networks do."""
    data = load_digits(data_dir)
    show_segmenters(out, data.val)
    runs = metrics.load_rows(out / "diffusion_runs.csv")
    scenes = runs[runs["experiment"] == "segmentation"]
    if len(scenes):
        table = segmentation_table(scenes)
        (out / "diffusion_segmentation.md").write_text(table + "\n", encoding="utf-8")
        print(f"\nThe digit that is asked for, in scenes of test digits, n seeds:\n{table}")
    history = metrics.load_rows(out / "diffusion_history.csv")
    if {"digits", "segmentation"} <= set(history["experiment"]):
        draw_history(out / "diffusion_history.png", history)
    samples = metrics.load_rows(out / "diffusion_samples.csv")
    if len(samples):
        table = samples_table(samples)
        (out / "diffusion_samples.md").write_text(table + "\n", encoding="utf-8")
        print(f"\nDigits from noise, seed 0:\n{table}")
        draw_samples(out / "diffusion_samples.png", samples)
    if (out / "diffusion_drawn.pt").exists():
        drawn = torch.load(out / "diffusion_drawn.pt", weights_only=True)
        draw_drawn(out / "diffusion_digits.png", drawn)
    model = load_weights(weights_file(out, all_runs()[0]))
    mixed = first_of_each_class(data.val, 10)
    ten = draw_way(out / "diffusion_way.png", model, Split(mixed.images[2:5], mixed.labels[2:5]))
    print("\nTen digits, drawn now (DDIM, 50 steps):")
    print(as_text(ten[:5]))
    print(as_text(ten[5:]))


def show_segmenters(out: Path, digits: Split) -> None:
    """The picture of what the segmenting networks of seed 0 mark in six scenes."""
    models = {}
    for run in all_runs():
        path = weights_file(out, run)
        if run.experiment == "segmentation" and run.recipe.seed == 0 and path.exists():
            models[run.value] = load_weights(path)
    if models:
        scenes = draw_scenes(digits, 6, torch.Generator().manual_seed(1))
        draw_segmented(out / "diffusion_segmented.png", models, scenes)


def as_text(images: Tensor) -> str:
    """Images (N, 28, 28) of 0 … 1 side by side as text, two pixels' mean a letter."""
    rows = torch.cat(list(images), 1)  # (28, 28 · N)
    rows = F.avg_pool2d(rows[None], (2, 1))[0]
    letters = " .:-=+*#%@"
    return "\n".join("".join(letters[int(9.99 * p)] for p in row) for row in rows.tolist())


def main(
    train: bool = False,
    evaluate: bool = False,
    fresh: bool = False,
    workers: int = 1,
    threads: int = 1,
    smoke: bool = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    out: Path = FIGURES,
    cnn: Path | None = None,
    checkpoints: Path = CHECKPOINTS,
    data_dir: Path = ROOT / "data",
) -> int:
    """Show a diffusion model draw digits, and a U-Net find them in clutter.

    Args:
        train: train first what is not saved yet; a command started again goes on.
        evaluate: measure what the table does not hold of these weights; goes on where it stopped.
        fresh: with evaluate, measure all again.
        workers: runs that are trained at the same time.
        threads: of each run on a CPU; more than 1 helps only where cores are idle.
        smoke: tiny networks and few images, to see that everything runs.
        device: what trains and measures; auto takes a GPU if there is one. Pictures take the CPU.
        out: the folder that tables, pictures and weights go to and are read from.
        cnn: weights of convolution.py's network for MNIST, which reads the digits; if not named,
            those in `out`, else the committed ones.
        checkpoints: the folder for what an unfinished run needs to go on.
        data_dir: the folder that holds MNIST/raw.
    """
    print("Diffusion (扩散模型): digits from noise, and a U-Net that finds digits in clutter; a")
    print("minute from what is saved; --train and --evaluate take minutes on a GPU, hours on a CPU")
    torch.set_num_threads(1)
    weights = weights_file(out, all_runs()[0])
    try:
        check_whole(workers=workers, threads=threads)
        if fresh and not evaluate:
            raise ValueError("--fresh measures all again: it needs --evaluate")
        if smoke and out.resolve() == FIGURES:
            raise ValueError(f"--smoke would write over {out}: name another folder by --out")
        with stage1_mlp.claimed(out):
            device = stage1_mlp.device_of(cuda_or_cpu(device))
            if evaluate:  # before hours of training: a missing file is said at once
                reader = load_cnn(cnn or convolution.reader_of(out), device)
            if train:
                train_missing(out, data_dir, workers, threads, device, checkpoints, smoke)
            if not weights.exists():
                print("\nNo trained network yet: python -m interview.diffusion --train")
                return 0
            if evaluate:
                evaluate_all(out, data_dir, reader, device, fresh, smoke)
            show(out, data_dir)
    except (stage1_mlp.DataError, ValueError, OSError) as error:
        print(f"interview.diffusion: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; finished runs are saved, the same command goes on", file=sys.stderr)
        return 130
    print(f"\ntables and pictures: {out}/diffusion_*")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
