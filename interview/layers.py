"""Layers by hand: activations, softmax, SwiGLU, normalisations, dropout (手撕网络层).

    python -m interview.layers               tables and pictures into figures/interview/, 5 min
    python -m interview.layers --out DIR     the same into DIR

Read `LayerNorm` and `layer_norm_backward` first: they are asked most often. The normalisations
differ in the axes that mean and variance are taken over, and in little else:

    batch norm     over batch and pixels, for each channel            (B, C, H, W) -> (C,)
    layer norm     over the features of one token                     (B, T, D) -> (B, T)
    instance norm  over the pixels of one channel of one image        (B, C, H, W) -> (B, C)
    group norm     over the pixels of a group of channels             (B, C, H, W) -> (B, G)
    RMS norm       as layer norm, by the mean square, no mean         (B, T, D) -> (B, T)

Axis letters in shape comments: B batch, T tokens, C channels, H × W pixels, G groups, D or d
features. What needs squares or sums computes float16 and bfloat16 in float32, then rounds.

1. Activations (激活函数)
   Asked     "Write sigmoid, tanh, ReLU, GELU, SiLU. Which saturate? Why did ReLU replace sigmoid?"
             「手写常见激活函数。哪些会饱和？ReLU 为什么取代了 sigmoid？」
   Idea      A function saturates where it becomes flat. Its slope is a factor of every gradient
             that passes through: sigmoid's is 0.25 at most, so ten layers of it leave 1e-6 (times
             what the weights do). ReLU's is 1 wherever it is on. GELU and SiLU are smooth ReLUs:
             x times a gate between 0 and 1.
   Cost      O(1) a value. Backward needs the input or the output: as much memory again.
   追问      Zero-centred? tanh is. sigmoid's outputs are all positive, so for one image the
             gradients of a neuron's weights all have the same sign. A dead ReLU? Off for every
             image, slope 0: it never returns. Lower rate, or leaky ReLU. GELU against SiLU? Φ(x)
             against σ(x), and Φ(x) ≈ σ(1.702 x).
   Mistakes  exp(−x) at x = −1000: the value is right, the gradient is NaN. max(slope · x, x) for
             slopes above 1. "ReLU solved vanishing gradients": the weights still multiply.

2. Softmax and log-softmax
   Asked     "Write a softmax that does not overflow. Why may the maximum be subtracted?"
             「手写 softmax，怎样防止溢出？为什么可以减去最大值？」
   Idea      softmax(x) = softmax(x − c) for any c. With c = max x no exp exceeds 1, and the sum is
             at least 1. log softmax is x − c − log Σ e^(x − c), never the log of a softmax.
   Cost      O(C) in three passes: maximum, sum, division. Online softmax joins the first two.
   追问      Its slope? ∂p_i/∂x_j = p_i ([i = j] − p_j). With cross-entropy? p − onehot.
             Temperature? On the logits: softmax(x / T). A row of −∞ alone? 0/0, NaN, as in torch.
   Mistakes  The maximum of the whole tensor in place of the one along dim. The wrong dim. Softmax
             before CrossEntropyLoss.

3. SwiGLU (门控前馈层)
   Asked     "Write LLaMA's feed-forward layer. Why three matrices, and how wide?"
             「手写 SwiGLU。为什么有三个矩阵？隐藏层维度怎么定？」
   Idea      w2(silu(w1 x) ⊙ w3 x): one branch is the gate of the other.
   Cost      3 · d · hidden weights, 6 · d · hidden operations a token. The usual two matrices of
             4 d have 8 d² weights; hidden = 8 d / 3 has as many.
   追问      Why is it better? Measured, not proven (Shazeer 2020). GEGLU? GELU in place of SiLU.
   Mistakes  silu on both branches. w2 and w3 exchanged. hidden = 4 d: 12 d² weights.

4. Batch norm, BN (批归一化)
   Asked     "Write batch norm. What differs between training and inference? Small batches?"
             「手写 BN。训练和推理有什么区别？batch 很小时怎么办？」
   Idea      In training by the batch's mean and variance; in inference by running averages of
             them, because a result must not depend on who else is in the batch. γ and β let the
             network undo it.
   Cost      O(B C H W), bound by memory; 2 C weights, 2 C running values.
   追问      Which variance? Biased (/ N) to normalise, unbiased (/ (N − 1)) for the running one.
             Several GPUs? SyncBatchNorm. Why does it help? "Internal covariate shift" is disputed
             (Santurkar et al. 2018: a smoother loss). eval() or no_grad()? eval() changes what is
             computed, no_grad() what is remembered. A batch of two? x̂ is +1 or −1, whatever the
             images: it says only which is larger. Measured after training on pairs: 46 % right in
             training mode, 65 % in inference, 92 % with layer norm. So layer or group norm then.
   Mistakes  Statistics of shape (B,). No eval() in inference. momentum is the new batch's share in
             torch, the old one's in TensorFlow. A bias in the layer before: the mean takes it off.

5. Layer norm, RMS norm (层归一化)
   Asked     "Write layer norm and its backward pass. Why do Transformers not use batch norm?"
             「手写 LN 及其反向传播。Transformer 为什么用 LN 不用 BN？」
   Idea      Each token by itself: no batch, no running values, the same in training and inference,
             whatever the lengths. Backward: dx = (g − mean(g) − x̂ mean(g ⊙ x̂)) / s.
   Cost      O(B T D); backward keeps x̂ (or x), and one s a token.
   追问      RMS norm? No mean and no β: one reduction in place of two. Pre or post? Pre-norm keeps
             the residual path free and is easier to train; post-norm often ends better.
   Mistakes  The unbiased variance, which is torch.var's default. eps outside the root. Mean and s
             taken for constants in the backward pass. x² in float16: 256² is inf.

6. Dropout (随机失活)
   Asked     "Write dropout. Why divide by 1 − p, and what happens in inference?"
             「手写 dropout。为什么要除以 1 − p？推理时做什么？」
   Idea      A share p of the values becomes 0. The rest is scaled up, so that the mean stays, and
             inference does nothing.
   Cost      O(N); backward keeps the mask, a byte a value.
   追问      An ensemble? About the mean of all thinned networks. Beside batch norm? Dropout changes
             the variance in training alone, so the running one is wrong: after the last BN only.
   Mistakes  p as the share that is kept. Scaling in inference too. One mask for the whole batch.
"""

import copy
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from pathlib import Path

import pandas as pd
import seaborn as sns
import torch
import tyro
from matplotlib.patches import Patch
from torch import Tensor, nn

import metrics
import stage1_mlp
from interview import check_whole
from stage1_mlp import Split

ROOT = Path(__file__).resolve().parent.parent


# ---- Checks of the input --------------------------------------------------------------------


def check_eps(eps: float) -> None:
    """ValueError unless eps is a finite number of at least 0."""
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and at least 0, not {eps!r}")


def check_axis(x: Tensor, dim: int) -> None:
    """ValueError unless x has an axis dim with at least one value in it."""
    n_axes = max(x.ndim, 1)  # a single number counts as a row of one, as in torch
    if not -n_axes <= dim < n_axes:
        raise ValueError(f"dim must lie in {-n_axes} … {n_axes - 1}, not {dim}")
    if x.ndim and x.shape[dim] == 0:
        raise ValueError(f"softmax over no values: axis {dim} of shape {tuple(x.shape)} is empty")


def check_last(x: Tensor, d: int) -> None:
    """ValueError unless x (..., d) has d values in its last axis."""
    if x.ndim < 1 or x.shape[-1] != d:
        raise ValueError(f"shape (..., {d}) expected, not {tuple(x.shape)}")


def check_channels(x: Tensor, n: int, least_axes: int) -> None:
    """ValueError unless x is (B, n, ...) with at least so many axes."""
    if x.ndim < least_axes or x.shape[1] != n:
        shapes = {2: f"(B, {n}) or (B, {n}, ...)", 3: f"(B, {n}, L) or (B, {n}, H, W)"}
        raise ValueError(f"shape {shapes[least_axes]} expected, not {tuple(x.shape)}")


def check_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    """ValueError unless grad has x's shape, and weight one value for each of x's last axis."""
    check_eps(eps)
    if grad.shape != x.shape:
        raise ValueError(f"grad {tuple(grad.shape)} must have the shape of x {tuple(x.shape)}")
    if x.ndim < 1 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight {tuple(weight.shape)} must match x {tuple(x.shape)} in its last axis"
        )


def at_least_float32(x: Tensor) -> Tensor:
    """float16 and bfloat16 as float32, so that squares and sums keep range and digits."""
    if not x.is_floating_point():
        raise ValueError(f"floating-point values expected, not {x.dtype}")
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# ---- Activations ----------------------------------------------------------------------------


def sigmoid(x: Tensor) -> Tensor:
    """σ(x) = 1 / (1 + e^-x), between 0 and 1: any shape -> the same shape.

    For x < 0 it is e^x / (1 + e^x), the same value; so no exponent is positive, and no exp
    overflows. Slope σ (1 − σ).
    """
    exp = torch.where(x >= 0, -x, x).exp()  # e^-|x|, at most 1
    return torch.where(x >= 0, 1, exp) / (1 + exp)


def tanh(x: Tensor) -> Tensor:
    """tanh(x) = (1 − e^-2x) / (1 + e^-2x), between −1 and 1: any shape -> the same shape.

    With expm1(z) = e^z − 1, which keeps its digits near 0; 2σ(2x) − 1 is the same, but cancels
    there. Slope 1 − tanh².
    """
    t = torch.where(x >= 0, -2 * x, 2 * x).expm1()  # e^-2|x| − 1, in −1 … 0
    return torch.where(x >= 0, -t, t) / (t + 2)


def relu(x: Tensor) -> Tensor:
    """max(x, 0): any shape -> the same shape. Slope 1 above 0, 0 below, and 0 at 0 as in torch."""
    return torch.where(x <= 0, 0, x)  # NaN is not <= 0: it stays


def leaky_relu(x: Tensor, slope: float = 0.01) -> Tensor:
    """x above 0, slope · x below: any shape -> the same shape (Maas, Hannun and Ng 2013).

    max(slope · x, x) is the same for slope <= 1 only; above 1 it bends the other way. ValueError
    unless slope is finite.
    """
    if not math.isfinite(slope):
        raise ValueError(f"slope must be a finite number, not {slope!r}")
    return torch.where(x > 0, x, slope * x)


def gelu(x: Tensor) -> Tensor:
    """x · Φ(x), Φ the standard normal's distribution function: any shape -> the same shape.

    The exact one by erf (Hendrycks and Gimpel 2016, section 2), not the approximation by tanh.
    Slope Φ(x) + x φ(x).
    """
    z = at_least_float32(x)
    cdf = 0.5 * (1 + torch.erf(z / math.sqrt(2)))  # Φ(z)
    return (z * cdf).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """x · σ(x), also called Swish: any shape -> the same shape (Ramachandran, Zoph and Le 2017).

    Slope σ + x σ (1 − σ).
    """
    return x * sigmoid(x)


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """e^x / Σ e^x along dim: any shape -> the same shape, from 0 to 1, sum 1 along dim.

    Minus the maximum first: numerator and denominator shrink by the same factor, and no exp
    overflows. ValueError if x has no axis dim, or nothing in it.
    """
    check_axis(x, dim)
    z = at_least_float32(x)
    z = z - z.amax(dim, keepdim=True).detach()  # at most 0; a shift changes nothing: no gradient
    exp = z.exp()
    return (exp / exp.sum(dim, keepdim=True)).to(x.dtype)


def log_softmax(x: Tensor, dim: int = -1) -> Tensor:
    """x − log Σ e^x along dim: any shape -> the same shape, at most 0.

    Not log(softmax(x)), which is log 0 = −∞ as soon as a probability underflows. ValueError as for
    softmax.
    """
    check_axis(x, dim)
    z = at_least_float32(x)
    z = z - z.amax(dim, keepdim=True).detach()
    log_sum = z.exp().sum(dim, keepdim=True).log()  # the sum is at least 1
    return (z - log_sum).to(x.dtype)


class SwiGLU(nn.Module):
    """w2(silu(w1(x)) ⊙ w3(x)), the gated feed-forward layer of LLaMA (Shazeer 2020, eq. 6).

    forward: x (..., d) -> (..., d). The names, and linear layers without bias, are LLaMA's. w1 and
    w3 go from d to hidden, w2 back. hidden = 8 d / 3 has as many weights as the usual layer of 4 d.
    ValueError on other sizes.
    """

    def __init__(self, d: int, hidden: int):
        super().__init__()
        check_whole(d=d, hidden=hidden)
        self.w1 = nn.Linear(d, hidden, bias=False)
        self.w2 = nn.Linear(hidden, d, bias=False)
        self.w3 = nn.Linear(d, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        check_last(x, self.w1.in_features)
        gate = silu(self.w1(x))  # (..., hidden)
        return self.w2(gate * self.w3(x))  # (..., d)


# ---- Normalisations -------------------------------------------------------------------------


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """(C,) -> (C, 1, 1) for x (B, C, H, W), (C,) for x (B, C): each channel meets its own value."""
    return values.view(-1, *[1] * (x.ndim - 2))


class BatchNorm(nn.Module):
    """Each channel to mean 0, variance 1 over the batch and its pixels, then γ x̂ + β (批归一化).

    Ioffe and Szegedy 2015, algorithms 1 and 2.

    forward: x (B, n) or (B, n, ...), as (B, n, H, W) -> the same shape. As nn.BatchNorm1d and
    nn.BatchNorm2d, whose state_dict it loads: `weight` (γ), `bias` (β), `running_mean`,
    `running_var` (n,) and `num_batches_tracked`. In training the batch's own mean and biased
    variance (/ N) are used, and the running ones move a share `momentum` towards its mean and
    unbiased variance (/ (N − 1)). In eval the running ones are used. ValueError on another n, and
    in training on one value a channel, whose variance says nothing.
    """

    def __init__(self, n: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        check_whole(n=n)
        check_eps(eps)
        if not 0 <= momentum <= 1:
            raise ValueError(
                f"momentum, the new batch's share, must lie in 0 … 1, not {momentum!r}"
            )
        self.eps = eps
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(n))
        self.bias = nn.Parameter(torch.zeros(n))
        self.register_buffer("running_mean", torch.zeros(n))
        self.register_buffer("running_var", torch.ones(n))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        check_channels(x, len(self.weight), least_axes=2)
        z = at_least_float32(x)
        if self.training:
            count = x.numel() // x.shape[1]  # values a channel
            if count < 2:
                raise ValueError(f"training needs two values a channel or more, not {count}")
            axes = [0, *range(2, x.ndim)]  # all but the channels
            mean = z.mean(axes)  # (C,)
            var = z.var(axes, correction=0)  # (C,)
            self.track(mean, var, count)
        else:
            mean = self.running_mean  # (C,)
            var = self.running_var  # (C,)
        std = torch.sqrt(var + self.eps)  # (C,)
        x_hat = (z - per_channel(mean, x)) / per_channel(std, x)  # (B, C, ...)
        y = per_channel(self.weight, x) * x_hat + per_channel(self.bias, x)
        return y.to(x.dtype)

    @torch.no_grad()
    def track(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Move the running statistics towards those of a batch with `count` values a channel."""
        keep = 1 - self.momentum
        unbiased = var * count / (count - 1)
        self.running_mean.copy_(keep * self.running_mean + self.momentum * mean)
        self.running_var.copy_(keep * self.running_var + self.momentum * unbiased)
        self.num_batches_tracked += 1


class LayerNorm(nn.Module):
    """Each row to mean 0, variance 1 over its last axis, then γ x̂ + β (层归一化).

    Ba, Kiros and Hinton 2016, eq. 3.

    forward: x (..., d) -> the same shape, by the same rule in training and in eval. As
    nn.LayerNorm(d), whose state_dict it loads: `weight` (γ) and `bias` (β) of shape (d,).
    ValueError on another d.
    """

    def __init__(self, d: int, eps: float = 1e-5):
        super().__init__()
        check_whole(d=d)
        check_eps(eps)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d))
        self.bias = nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor) -> Tensor:
        check_last(x, len(self.weight))
        z = at_least_float32(x)
        centred = z - z.mean(-1, keepdim=True)  # (..., d)
        var = centred.square().mean(-1, keepdim=True)  # (..., 1)
        x_hat = centred / torch.sqrt(var + self.eps)  # (..., d)
        return (self.weight * x_hat + self.bias).to(x.dtype)


class GroupNorm(nn.Module):
    """Each group of an image's channels to mean 0, variance 1, then γ x̂ + β (组归一化).

    Wu and He 2018, eq. 1, 2, 6 and 7.

    forward: x (B, n) or (B, n, ...), as (B, n, H, W) -> the same shape. One group is layer norm
    over C, H and W, n groups are instance norm. As nn.GroupNorm(groups, n), whose state_dict it
    loads: `weight` and `bias` (n,), one for each channel. ValueError if n is no multiple of groups,
    or on another n.
    """

    def __init__(self, groups: int, n: int, eps: float = 1e-5):
        super().__init__()
        check_whole(groups=groups, n=n)
        check_eps(eps)
        if n % groups:
            raise ValueError(f"{n=} channels must be a multiple of {groups=}")
        self.groups = groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(n))
        self.bias = nn.Parameter(torch.zeros(n))

    def forward(self, x: Tensor) -> Tensor:
        check_channels(x, len(self.weight), least_axes=2)
        groups = at_least_float32(x).unflatten(1, (self.groups, -1))  # (B, G, C/G, ...)
        axes = list(range(2, groups.ndim))  # all but image and group
        centred = groups - groups.mean(axes, keepdim=True)  # (B, G, C/G, ...)
        var = centred.square().mean(axes, keepdim=True)  # (B, G, 1, ...)
        x_hat = (centred / torch.sqrt(var + self.eps)).flatten(1, 2)  # (B, C, ...)
        y = per_channel(self.weight, x) * x_hat + per_channel(self.bias, x)
        return y.to(x.dtype)


class InstanceNorm(nn.Module):
    """Each channel of each image to mean 0, variance 1 over its pixels (实例归一化).

    Ulyanov, Vedaldi and Lempitsky 2016, section 2.

    forward: x (B, n, L) or (B, n, H, W) -> the same shape. As nn.InstanceNorm1d and
    nn.InstanceNorm2d, whose default it keeps: without `weight` and `bias` (they are None) unless
    affine=True, and without running statistics. ValueError on another n, and on one pixel a
    channel, which would always become 0.
    """

    def __init__(self, n: int, eps: float = 1e-5, affine: bool = False):
        super().__init__()
        check_whole(n=n)
        check_eps(eps)
        self.n = n
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(n)) if affine else None
        self.bias = nn.Parameter(torch.zeros(n)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        check_channels(x, self.n, least_axes=3)
        if math.prod(x.shape[2:]) < 2:
            raise ValueError(f"two pixels or more a channel expected, not shape {tuple(x.shape)}")
        z = at_least_float32(x)
        axes = list(range(2, x.ndim))  # the pixels alone
        centred = z - z.mean(axes, keepdim=True)  # (B, C, ...)
        var = centred.square().mean(axes, keepdim=True)  # (B, C, 1, ...)
        y = centred / torch.sqrt(var + self.eps)  # (B, C, ...)
        if self.weight is not None:
            y = per_channel(self.weight, x) * y + per_channel(self.bias, x)
        return y.to(x.dtype)


class RMSNorm(nn.Module):
    """x over the root of its mean square along the last axis, times γ: no mean taken off, no β.

    Zhang and Sennrich 2019, eq. 4.

    forward: x (..., d) -> the same shape. As nn.RMSNorm(d), whose state_dict it loads: `weight` (γ)
    of shape (d,). eps None is torch's default: the machine epsilon of the dtype it computes in,
    1.2e-7 for float32 and all that is narrower, 2.2e-16 for float64; LLaMA has 1e-5 or 1e-6.
    ValueError on another d.
    """

    def __init__(self, d: int, eps: float | None = None):
        super().__init__()
        check_whole(d=d)
        if eps is not None:
            check_eps(eps)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        check_last(x, len(self.weight))
        z = at_least_float32(x)
        eps = torch.finfo(z.dtype).eps if self.eps is None else self.eps
        mean_square = z.square().mean(-1, keepdim=True)  # (..., 1)
        return (self.weight * z / torch.sqrt(mean_square + eps)).to(x.dtype)


# ---- Backward passes of two normalisations ------------------------------------------------------


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y = γ x̂ + β, x̂ = (x − μ) / s, s = √(σ² + eps), μ and σ² over the last axis.

    grad is ∂L/∂y, of x's shape (..., d), weight is γ (d,) -> (dx (..., d), dweight (d,), dbias
    (d,)). γ and β serve every row, so their gradients are sums over rows:
        ∂L/∂γ = Σ grad ⊙ x̂        ∂L/∂β = Σ grad
    With g = ∂L/∂x̂ = γ ⊙ grad, x reaches the loss in three ways: directly, through μ and through s.
    Within a row, ∂μ/∂x_i = 1/d and ∂s/∂x_i = x̂_i / d (from s² = mean((x − μ)²) + eps), so
        ∂x̂_j/∂x_i = ([i = j] − 1/d − x̂_j x̂_i / d) / s
    and, summed over j with g_j,
        dx = (g − mean(g) − x̂ mean(g ⊙ x̂)) / s
    that is, g less its parts along 1 and along x̂: the two directions in which x cannot change y
    (for eps = 0). float16 and bfloat16 give float32 gradients. ValueError if the shapes do not
    match. Equals autograd's of LayerNorm.
    """
    check_backward(grad, x, weight, eps)
    grad = at_least_float32(grad)
    x = at_least_float32(x)
    centred = x - x.mean(-1, keepdim=True)  # (..., d)
    std = torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)  # (..., 1)
    x_hat = centred / std  # (..., d)
    dweight = (grad * x_hat).reshape(-1, len(weight)).sum(0)  # (d,)
    dbias = grad.reshape(-1, len(weight)).sum(0)  # (d,)
    g = weight * grad  # (..., d)
    along_x_hat = x_hat * (g * x_hat).mean(-1, keepdim=True)  # (..., d)
    dx = (g - g.mean(-1, keepdim=True) - along_x_hat) / std  # (..., d)
    return dx, dweight, dbias


def batch_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of batch norm in training: as layer_norm_backward, with μ and s over the batch.

    Ioffe and Szegedy 2015, section 3.

    grad is ∂L/∂y (B, C), x (B, C), weight γ (C,) -> (dx (B, C), dweight (C,), dbias (C,)).
        ∂L/∂γ = Σ_B grad ⊙ x̂        ∂L/∂β = Σ_B grad ∂x̂_b/∂x_a = ([a = b] − 1/B − x̂_b x̂_a / B) /
        s   for two images a, b of the batch, in each channel dx = γ / s ⊙ (grad − mean_B(grad) − x̂
        mean_B(grad ⊙ x̂))
    γ is one number in each mean, so it moves out. An image's gradient depends on the whole batch.
    In eval μ and s are constants: there dx = γ / s ⊙ grad. float16 and bfloat16 give float32
    gradients. ValueError if the shapes do not match, or there are fewer than two images. Equals
    autograd's of BatchNorm.
    """
    check_backward(grad, x, weight, eps)
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"x (B, C) with B of at least 2 expected, not {tuple(x.shape)}")
    grad = at_least_float32(grad)
    x = at_least_float32(x)
    centred = x - x.mean(0)  # (B, C)
    std = torch.sqrt(centred.square().mean(0) + eps)  # (C,)
    x_hat = centred / std  # (B, C)
    dweight = (grad * x_hat).sum(0)  # (C,)
    dbias = grad.sum(0)  # (C,)
    along_x_hat = x_hat * (grad * x_hat).mean(0)  # (B, C)
    dx = weight / std * (grad - grad.mean(0) - along_x_hat)  # (B, C)
    return dx, dweight, dbias


# ---- Dropout --------------------------------------------------------------------------------


class Dropout(nn.Module):
    """In training each value is 0 with probability p, else divided by 1 − p (随机失活).

    forward: x of any shape -> the same shape; in eval x itself. p is the share that is dropped
    (some texts mean the share that is kept), in [0, 1). Divided in training ("inverted",
    Srivastava et al. 2014, section 10), so that the mean stays what it is in eval. ValueError on
    another p.
    """

    def __init__(self, p: float = 0.5):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"p, the share that is dropped, must lie in [0, 1), not {p!r}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = torch.rand(x.shape, device=x.device) >= self.p
        return x * keep / (1 - self.p)


# ---- Shown at work: the activations ---------------------------------------------------------

LEAKY_SLOPE = (
    0.1  # in the picture; with the usual 0.01 the line below 0 cannot be told from the axis
)
ACTIVATIONS = {
    "sigmoid": sigmoid,
    "tanh": tanh,
    "ReLU": relu,
    f"leaky ReLU ({LEAKY_SLOPE})": partial(leaky_relu, slope=LEAKY_SLOPE),
    "GELU": gelu,
    "SiLU (Swish)": silu,
}
REMARKS = [
    "slope at most 0.25",
    "slope 1 at 0 alone",
    "slope 0 or 1",
    "slope never 0",
    "dips below 0",
    "dips below 0",
]


def value_and_slope(function: Callable, x: Tensor) -> tuple[Tensor, Tensor]:
    """f(x) and f'(x) at every x, the slope by autograd."""
    x = x.clone().requires_grad_()
    y = function(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), slope


def activation_table() -> pd.DataFrame:
    """Values and slopes in float32 at a few x, ±1000 among them: (function, x, value, slope)."""
    x = torch.tensor([-1000.0, -4.0, -1.0, 0.0, 1.0, 4.0, 1000.0])
    tables = []
    for name, function in ACTIVATIONS.items():
        y, slope = value_and_slope(function, x)
        tables.append(pd.DataFrame({"function": name, "x": x, "value": y, "slope": slope}))
    return pd.concat(tables)


def draw_activations(path: Path) -> None:
    """A panel for each function: its value and its slope, all on the same axes."""
    x = torch.linspace(-5, 5, 1001)
    size = {"n_rows": 2, "n_columns": 3, "height": 7.0, "sharex": True, "sharey": True}
    with metrics.picture(path, "Activation functions and their slopes", **size) as panels:
        for axes, name, remark in zip(panels.flat, ACTIVATIONS, REMARKS, strict=True):
            y, slope = value_and_slope(ACTIVATIONS[name], x)
            axes.plot(x, y, color=metrics.COLORS[0], label="value f(x)")
            axes.plot(x, slope, color=metrics.COLORS[1], linestyle="--", label="slope f′(x)")
            axes.set(title=f"{name}: {remark}", ylim=(-1.2, 3.2))
        for axes in panels[1]:
            axes.set_xlabel("x")
        for axes in panels[:, 0]:
            axes.set_ylabel("f(x) and f′(x)")
        lines, names = axes.get_legend_handles_labels()
        axes.figure.legend(lines, names, loc="outside lower center", ncols=2)


def show_activations(out: Path) -> None:
    """layers_activations.csv and .png; and what the formula as it is written gives at 1000."""
    table = activation_table()
    table.to_csv(out / "layers_activations.csv", index=False, float_format="%.6g")
    draw_activations(out / "layers_activations.png")
    print("\nSlope of each activation (激活函数的斜率), at x =")
    slopes = table.pivot(index="function", columns="x", values="slope")
    print(slopes.loc[list(ACTIVATIONS)].round(4).to_string())
    x = torch.tensor([1000.0, 999.0, -1000.0])
    print(f"\nsoftmax of {x.tolist()}: {[round(p, 4) for p in softmax(x).tolist()]}", end="; ")
    print(f"as exp(x) / sum(exp(x)): {(x.exp() / x.exp().sum()).tolist()}")


# ---- Shown at work: normalisations in the 128-256 network on MNIST ------------------------------

BATCH_SIZES = [2, 8, 32, 128]
N_IMAGES = 5_120  # seen in training, whatever the batch size: 40 batches of 128, 2,560 of 2
SEEDS = [1, 2, 3]  # of the results; seed 0 chooses the rate
N_VAL = stage1_mlp.N_VAL  # of the 60,000 training images; the test images stay closed
RATES = {  # tried at each batch size; fewer and less noisy steps allow, and need, longer ones
    2: [0.003, 0.01, 0.03, 0.1],
    8: [0.01, 0.03, 0.1, 0.3],
    32: [0.03, 0.1, 0.3, 1.0],
    128: [0.1, 0.3, 1.0],
}
NORMS = {
    "none": nn.Identity,
    "batch norm": BatchNorm,
    "layer norm": LayerNorm,
    "RMS norm": RMSNorm,
    "group norm, 8 groups": partial(GroupNorm, 8),
}
STATISTICS = ["of a batch as in training", "of a batch of 500", "running ones (inference)"]


def load_splits(data_dir: Path) -> tuple[Split, Split]:
    """MNIST's training and validation images; the latter shuffled, as they stand class by class.

    A batch of one class would have another mean and variance than a batch in training.
    """
    data = stage1_mlp.load_data(data_dir)
    order = torch.randperm(N_VAL, generator=torch.Generator().manual_seed(0))
    return data.train, Split(data.val.images[order], data.val.labels[order])


class Network(nn.Module):
    """784-128-256-10 with a normalisation before each ReLU: images (B, 784) -> logits (B, 10)."""

    def __init__(self, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.linear1 = nn.Linear(784, 128)
        self.norm1 = norm(128)
        self.linear2 = nn.Linear(128, 256)
        self.norm2 = norm(256)
        self.linear3 = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.norm1(self.linear1(x)))  # (B, 128)
        x = relu(self.norm2(self.linear2(x)))  # (B, 256)
        return self.linear3(x)  # (B, 10)


def train(norm, batch_size: int, lr: float, seed: int, split: Split) -> Network:
    """The network after plain SGD on N_IMAGES images, each once; the rate falls linearly to 0."""
    torch.manual_seed(seed)
    model = Network(norm)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    batches = torch.randperm(len(split.labels))[:N_IMAGES].split(batch_size)
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / len(batches))
        loss = stage1_mlp.cross_entropy(model(split.images[batch]), split.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def accuracy(model: nn.Module, split: Split) -> float:
    """Percent right in inference mode."""
    return 100 * stage1_mlp.evaluate(model, split)["accuracy"]


@torch.no_grad()
def accuracy_in_training_mode(model: Network, split: Split, size: int) -> float:
    """Percent right when each batch of `size` is normalised by its own mean and variance."""
    model = copy.deepcopy(model).train()  # a copy: in training mode the running statistics move
    predicted = [model(batch).argmax(1) for batch in split.images.split(size)]
    matrix = metrics.confusion_matrix(torch.cat(predicted), split.labels, n_classes=10)
    return 100 * metrics.accuracy(matrix)


def run(name: str, batch_size: int, lr: float, seed: int, data) -> tuple[dict, Network]:
    """Train once: a row of layers_runs.csv, and the network."""
    training, validation = data
    start = time.perf_counter()
    model = train(NORMS[name], batch_size, lr, seed, training)
    seconds = time.perf_counter() - start
    row = {"norm": name, "batch_size": batch_size, "lr": lr, "seed": seed}
    row["val_accuracy"] = accuracy(model, validation)
    row["seconds"] = round(seconds, 2)
    return row, model


def compare_normalisations(data) -> tuple[pd.DataFrame, dict[tuple[int, int], Network]]:
    """Every normalisation at every batch size: seed 0 chooses its rate, SEEDS give its results.

    Gives the rows of layers_runs.csv and the networks with batch norm, {(batch size, seed):
    network}.
    """
    rows, batch_norms = [], {}
    for batch_size in BATCH_SIZES:
        for name in NORMS:
            tried = [run(name, batch_size, lr, 0, data)[0] for lr in RATES[batch_size]]
            best = max(tried, key=itemgetter("val_accuracy"))
            rows += [row | {"used_for": "choice of the rate"} for row in tried]
            for seed in SEEDS:
                row, model = run(name, batch_size, best["lr"], seed, data)
                rows.append(row | {"used_for": "result"})
                if name == "batch norm":
                    batch_norms[batch_size, seed] = model
            print(f"  batch size {batch_size}, {name}, rate {best['lr']:g}: done", flush=True)
    return pd.DataFrame(rows), batch_norms


def compare_modes(batch_norms: dict[tuple[int, int], Network], data) -> pd.DataFrame:
    """Rows of layers_batch_norm_modes.csv: the same weights, normalised in three ways."""
    _, validation = data
    rows = []
    for (batch_size, seed), model in batch_norms.items():
        results = [
            accuracy_in_training_mode(model, validation, batch_size),
            accuracy_in_training_mode(model, validation, 500),
            accuracy(model, validation),
        ]
        for name, result in zip(STATISTICS, results, strict=True):
            row = {"batch_size": batch_size, "seed": seed, "statistics": name}
            rows.append(row | {"val_accuracy": result})
    return pd.DataFrame(rows)


def print_table(rows: pd.DataFrame, index: str) -> None:
    """Validation accuracy, 93.12 ± 0.10 over seeds in each cell; columns are batch sizes."""
    groups = rows.groupby([index, "batch_size"], sort=False)["val_accuracy"]
    cells = groups.agg(lambda values: str(metrics.summarise(values)))
    print(cells.unstack().to_string())


def draw_normalisations(path: Path, rows: pd.DataFrame) -> None:
    """Validation error over the batch size, a line for each normalisation."""
    rows = rows.assign(error=100 - rows["val_accuracy"])
    title = f"Which normalisation helps at which batch size? {N_IMAGES:,} images seen"
    labels = {"xlabel": "images a step", "ylabel": "validation error (%), lower is better"}
    metrics.draw_lines(path, rows, ("batch_size", "error", "norm"), title, **labels)


def normalised_values(model: Network, images: Tensor) -> pd.DataFrame:
    """How the first batch norm's x̂ is spread: (statistics, x_hat, percent), bins of 0.1."""
    norm = copy.deepcopy(model.norm1)
    nn.init.ones_(norm.weight)  # γ and β out of the way
    nn.init.zeros_(norm.bias)
    with torch.no_grad():
        z = model.linear1(images)  # (N, 128)
        by_running = norm.eval()(z)
        by_pair = torch.cat([norm.train()(pair) for pair in z.split(2)])
    tables = []
    for name, x_hat in [(STATISTICS[0], by_pair), (STATISTICS[2], by_running)]:
        counts, edges = x_hat.histogram(81, range=(-4.05, 4.05))  # −1 and 1 are middles
        table = pd.DataFrame({"x_hat": (edges[:-1] + edges[1:]) / 2, "percent": counts})
        table["percent"] *= 100 / x_hat.numel()
        table.insert(0, "statistics", name)
        tables.append(table)
    return pd.concat(tables)


def draw_modes(path: Path, modes: pd.DataFrame, values: pd.DataFrame) -> None:
    """Left: accuracy by what batch norm normalises with. Right: what it hands on, from pairs."""
    colors = metrics.colors_of(STATISTICS, ordered=False)
    title = "Which mean and variance should batch norm use?"
    with metrics.picture(path, title, n_columns=2, width=12, height=5.6) as (left, right):
        style = {"hue": "statistics", "palette": colors, "saturation": 1, "legend": False}
        spread = {"errorbar": ("pi", 100), "capsize": 0.2}
        sns.barplot(modes, x="batch_size", y="val_accuracy", ax=left, **style, **spread)
        left.set_title(f"accuracy {metrics.bands_of(modes)}")
        left.set(xlabel="images a step in training", ylabel="validation accuracy (%)")
        left.set_ylim(0, 100)
        for name, rows in values.groupby("statistics"):
            right.step(rows["x_hat"], rows["percent"], where="mid", color=colors[name])
        right.set_title("x̂ in the first layer, trained with 2 images a step, seed 1")
        right.set(xlabel="x̂ = (x − mean) / std", ylabel="share of the values (%), bins of 0.1")
        bars = [Patch(color=colors[name]) for name in STATISTICS]
        style = {"loc": "outside lower center", "ncols": 3}
        left.figure.legend(bars, STATISTICS, title="mean and variance", **style)


def show_normalisations(out: Path, data_dir: Path) -> None:
    """Train, save the three tables and two pictures, print the results."""
    print(f"\nNormalisations (归一化) on MNIST, {N_IMAGES:,} images seen: training", flush=True)
    data = load_splits(data_dir)
    runs, batch_norms = compare_normalisations(data)
    modes = compare_modes(batch_norms, data)
    values = normalised_values(batch_norms[BATCH_SIZES[0], SEEDS[0]], data[1].images)
    runs.to_csv(out / "layers_runs.csv", index=False, float_format="%.6g")
    modes.to_csv(out / "layers_batch_norm_modes.csv", index=False, float_format="%.6g")
    values.to_csv(out / "layers_batch_norm_values.csv", index=False, float_format="%.6g")
    results = runs[runs["used_for"] == "result"]
    draw_normalisations(out / "layers_normalisations.png", results)
    draw_modes(out / "layers_batch_norm_modes.png", modes, values)
    print(f"Validation accuracy (%), mean ± std of {len(SEEDS)} seeds, by images a step:")
    print_table(results, "norm")
    print("Batch norm, the same weights, normalised by the mean and variance:")
    print_table(modes, "statistics")


def main(out: Path = ROOT / "figures" / "interview", data_dir: Path = ROOT / "data") -> None:
    """Show the layers at work: activations and their slopes, normalisations on MNIST.

    Args:
        out: the folder that the tables and pictures go to.
        data_dir: the folder that holds MNIST/raw.
    """
    print("Layers (网络层): activations and their slopes, and which normalisation helps stage 1's")
    print("network at which batch size; 135 short trainings, about 5 minutes")
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    show_activations(out)
    show_normalisations(out, data_dir)
    print(f"\ntables and pictures: {out}/layers_*")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except stage1_mlp.DataError as error:
        sys.exit(f"interview.layers: {error}")
