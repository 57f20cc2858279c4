"""The exercises of interview/practice.py: what to write, three hints, and the cases (手撕题).

An entry is one function with a decorator. The decorator says where the real one stands, its topic
and difficulty, how it is asked, and three hints: the idea, the formula, the first line. The
function yields the cases. A case gives what is expected by a second route: torch, scikit-learn or
brute force, never by the code that is to be written. `practice check` and the tests run the same
cases, so a new exercise is one entry here.

The sizes in a case all differ, so that a wrong axis cannot pass by luck. Bad input is not asked
here; it is tested with the real ones.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

METRICS = "Metrics (评估指标)"
LOSSES = "Networks and losses (网络与损失)"
LAYERS = "Layers (网络层)"
CONVOLUTION = "Convolution (卷积)"
RECURRENT = "Recurrent networks (循环神经网络)"
ATTENTION = "Attention (注意力)"
TRANSFORMER = "Encoder and decoder (编码器与解码器)"
DECODING = "Decoding and language models (解码与语言模型)"
OPTIMIZERS = "Optimizers (优化器)"
PARALLEL = "Parallel training (并行训练)"
DIFFUSION = "Diffusion and U-Net (扩散模型与 U-Net)"
CLASSICAL = "Classical machine learning (经典机器学习)"
PUZZLES = "Small programs (小题)"
TOPICS = (
    METRICS,
    LOSSES,
    LAYERS,
    CONVOLUTION,
    RECURRENT,
    ATTENTION,
    TRANSFORMER,
    DECODING,
    OPTIMIZERS,
    PARALLEL,
    DIFFUSION,
    CLASSICAL,
    PUZZLES,
)


# ---- What an exercise and a case are --------------------------------------------------------


class Mismatch(Exception):
    """A version cannot be compared at all; the message says why, as a sentence for its author."""


def called(solution, **inputs):
    """The usual case: one call with the inputs by name."""
    return solution(**inputs)


class Case(NamedTuple):
    """One thing that a version must do."""

    what: str  # it tests, in a few words
    inputs: dict  # name -> value: what is shown when the case fails
    expected: object  # by a second route
    use: Callable = called  # (solution, **inputs) -> what is compared with `expected`
    tolerance: float = 1e-9


class Exercise(NamedTuple):
    """One function or class to write alone."""

    path: str  # of the real one's file
    name: str  # of the real one in it, and of the exercise
    topic: str
    stars: int  # difficulty: 1 a few lines, 2 a formula to know, 3 a quarter of an hour
    asked: str
    asked_zh: str
    hints: tuple[str, str, str]
    cases: Callable[[], Iterator[Case]]
    names: str  # what the cases set or read in a class
    methods: tuple[str, ...]  # that a class must have


EXERCISES: dict[str, Exercise] = {}


def exercise(
    path: str,
    name: str,
    topic: str,
    stars: int,
    asked: str,
    asked_zh: str,
    hints: tuple[str, str, str],
    names: str = "",
    methods: tuple[str, ...] = ("__init__", "forward"),
):
    """Put the decorated generator of cases into EXERCISES, under the real one's name."""

    def enter(cases):
        EXERCISES[name] = Exercise(
            path, name, topic, stars, asked, asked_zh, hints, cases, names, methods
        )
        return cases

    return enter


def against(what: str, oracle, use=called, tolerance: float = 1e-9, **inputs) -> Case:
    """A case whose expected result is what `oracle` gives in the same use."""
    return Case(what, inputs, use(oracle, **inputs), use, tolerance)


# ---- Inputs, and ways to use a version ------------------------------------------------------


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal random numbers with two decimals, float64, so that a shown input can be copied."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (scale * numbers).mul(100).round().div(100)


def labels(n: int, n_classes: int, seed: int = 0) -> Tensor:
    """n random whole numbers below n_classes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(n_classes, (n,), generator=generator)


def gradients_of(result, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients in the leaves, of a sum in which every number of the result has another weight."""
    if not isinstance(result, Tensor):
        raise Mismatch(f"a tensor must come back, not {type(result).__name__}")
    if not result.requires_grad:
        raise Mismatch("the result has no gradient: was it detached, or made by torch.tensor?")
    weighted = (draw(*result.shape, seed=99) * result).sum()
    found = torch.autograd.grad(weighted, list(leaves.values()), allow_unused=True)
    gradients = {}
    for (name, leaf), gradient in zip(leaves.items(), found, strict=True):
        gradients[f"gradient in {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return gradients


def with_gradients(solution, **inputs) -> dict:
    """The result of a function, and its gradients in every tensor of real numbers.

    Tensors go by position, options by name.
    """
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    options = {name: value for name, value in inputs.items() if name not in tensors}
    leaves = {}
    for name, value in tensors.items():
        if value.is_floating_point():
            leaves[name] = value.clone().requires_grad_()
    result = solution(*(tensors | leaves).values(), **options)
    return {"result": result} | gradients_of(result, leaves)


def built(module, parameters: dict[str, Tensor]) -> nn.Module:
    """The module in float64 with these parameters; Mismatch if it has others."""
    if not isinstance(module, nn.Module):
        raise Mismatch(f"the class must be an nn.Module, not {type(module).__name__}")
    module = module.double()
    own = dict(module.named_parameters())
    if set(own) != set(parameters):
        wanted = ", ".join(parameters) or "none"
        raise Mismatch(f"its parameters must be {wanted}; yours are {', '.join(own) or 'none'}")
    for name, values in parameters.items():
        if own[name].shape != values.shape:
            shapes = f"{tuple(values.shape)}, not {tuple(own[name].shape)}"
            raise Mismatch(f"its parameter {name} must have shape {shapes}")
        own[name].data = values.clone()
    return module


def module_with_gradients(solution, sizes, parameters, x, training=True, **options) -> dict:
    """What a module makes of x, and the gradients in x and in its parameters."""
    module = built(solution(*sizes), parameters).train(training)
    leaves = {"x": x.clone().requires_grad_()} | dict(module.named_parameters())
    result = module(leaves["x"], **options)
    return {"result": result} | gradients_of(result, leaves)


def weight_and_bias(n: int) -> dict[str, Tensor]:
    """Parameters of a normalisation, none of them neutral."""
    return {"weight": draw(n, seed=11), "bias": draw(n, seed=12)}


# ---- Metrics --------------------------------------------------------------------------------


def label_pairs(n: int, n_classes: int) -> dict:
    """Predicted and true labels; the last class is never predicted, the last but one never true."""
    target = labels(n, n_classes, seed=1)
    target[target == n_classes - 2] = 0
    return {"predicted": labels(n, n_classes - 1, seed=2), "target": target}


@exercise(
    "metrics.py",
    "confusion_matrix",
    METRICS,
    1,
    "Count true against predicted classes: the confusion matrix, without a loop over samples.",
    "手写混淆矩阵，不对样本循环。",
    (
        "A pair (true, predicted) is one cell: number the cells, and count the numbers. "
        "(给格子编号，再计数)",
        "cell = target · n_classes + predicted; count the cells 0 … n_classes² − 1",
        "cells = torch.bincount(target * n_classes + predicted, minlength=n_classes**2)",
    ),
)
def confusion_matrix_cases():
    from sklearn.metrics import confusion_matrix

    for n, n_classes in ((7, 3), (60, 5)):
        inputs = label_pairs(n, n_classes) | {"n_classes": n_classes}
        theirs = confusion_matrix(
            inputs["target"], inputs["predicted"], labels=list(range(n_classes))
        )
        yield Case(f"{n} samples of {n_classes} classes", inputs, torch.from_numpy(theirs))
    inputs = {"predicted": [0, 0], "target": [2, 0], "n_classes": 4}
    expected = torch.zeros(4, 4, dtype=torch.int64)
    expected[2, 0] = 1
    expected[0, 0] = 1
    yield Case("lists, and classes that never occur", inputs, expected)


def score_cases(position: int) -> Iterator[Case]:
    """Cases of precision (0), recall (1) and F1 (2), by scikit-learn."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    for n_classes, average, zero_division in (
        (3, None, 0.0),
        (5, "macro", 0.0),
        (5, "micro", 0.0),
        (4, "weighted", 0.0),
        (4, None, 1.0),
        (4, "macro", math.nan),
    ):
        pairs = label_pairs(12 * n_classes, n_classes)
        classes = list(range(n_classes))
        matrix = confusion_matrix(pairs["target"], pairs["predicted"], labels=classes)
        theirs = precision_recall_fscore_support(
            pairs["target"],
            pairs["predicted"],
            labels=classes,
            average=average,
            zero_division=zero_division,
        )[position]
        inputs = {
            "matrix": torch.from_numpy(matrix),
            "average": average,
            "zero_division": zero_division,
        }
        what = "every class" if average is None else f'"{average}"'
        expected = torch.from_numpy(theirs) if average is None else float(theirs)
        yield Case(f"{what}, 0 / 0 is {zero_division:g}", inputs, expected)


@exercise(
    "metrics.py",
    "precision",
    METRICS,
    1,
    "Precision of each class from the confusion matrix; macro, micro and weighted means.",
    "由混淆矩阵计算精确率；宏平均、微平均、加权平均有什么区别？",
    (
        "Of the samples named c, how many are c? That is a column. (看列)",
        "TP / (TP + FP); macro: mean over classes; micro: ΣTP / Σ(TP + FP); weighted: by support",
        "tp = matrix.diagonal(); named = matrix.sum(0)",
    ),
)
def precision_cases():
    yield from score_cases(0)


@exercise(
    "metrics.py",
    "recall",
    METRICS,
    1,
    "Recall of each class from the confusion matrix, and its means.",
    "由混淆矩阵计算召回率。",
    (
        "Of the samples that are c, how many were named c? That is a row. (看行)",
        "TP / (TP + FN)",
        "tp = matrix.diagonal(); support = matrix.sum(1)",
    ),
)
def recall_cases():
    yield from score_cases(1)


@exercise(
    "metrics.py",
    "f1",
    METRICS,
    2,
    "F1 of each class. Why is macro-F1 not the F1 of the mean precision and recall?",
    "计算 F1。为什么宏平均 F1 不等于平均精确率与平均召回率的 F1？",
    (
        "The harmonic mean of precision and recall, first for each class, then averaged. "
        "(先逐类，再平均)",
        "F1 = 2 TP / (2 TP + FP + FN)",
        "tp = matrix.diagonal(); denominator = matrix.sum(0) + matrix.sum(1)  # 2 TP + FP + FN",
    ),
)
def f1_cases():
    yield from score_cases(2)


# ---- Networks and losses --------------------------------------------------------------------


@exercise(
    "stage1_mlp.py",
    "cross_entropy",
    LOSSES,
    2,
    "Write cross-entropy from logits, stable for large ones, with label smoothing.",
    "由 logits 手写交叉熵，数值要稳定，并支持标签平滑。",
    (
        "−log softmax is a difference: log Σ exp(z) less the true class's logit. "
        "Subtract the maximum first. (先减最大值)",
        "loss = mean(log Σ exp(z) − z[t]); smoothing s: (1 − s) z[t] + s · mean(z) for z[t]",
        "z = logits - logits.amax(1, keepdim=True)",
    ),
)
def cross_entropy_cases():
    target = labels(6, 4)
    for what, logits, smoothing in (
        ("6 rows of 4 classes", draw(6, 4), 0.0),
        ("logits of ±1000", draw(6, 4, scale=1000), 0.0),
        ("label smoothing 0.1", draw(6, 4, seed=1), 0.1),
    ):
        inputs = {"logits": logits, "target": target, "label_smoothing": smoothing}
        yield against(what, F.cross_entropy, with_gradients, **inputs)


def network_with_gradients(solution, options, parameters, images) -> dict:
    """Logits of an MLP whose parameters, in their order, are set; and the gradients in them."""
    model = solution(**options)
    if not isinstance(model, nn.Module):
        raise Mismatch(f"the class must be an nn.Module, not {type(model).__name__}")
    model = model.double().eval()
    own = list(model.parameters())
    shapes = [tuple(parameter.shape) for parameter in own]
    wanted = [tuple(values.shape) for values in parameters]
    if shapes != wanted:
        raise Mismatch(f"its parameters must have the shapes {wanted}, in this order, not {shapes}")
    for parameter, values in zip(own, parameters, strict=True):
        parameter.data = values.clone()
    logits = model(images)
    leaves = {f"parameter {i}": parameter for i, parameter in enumerate(own)}
    return {"logits": logits} | gradients_of(logits, leaves)


def layer_sizes(sizes: tuple[int, ...]) -> list[Tensor]:
    """Weight and bias of each linear layer between these sizes."""
    parameters = []
    for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        parameters.append(draw(n_out, n_in, seed=2 * i))
        parameters.append(draw(n_out, seed=2 * i + 1))
    return parameters


@exercise(
    "stage1_mlp.py",
    "MLP",
    LOSSES,
    1,
    "Write a fully connected network; with no hidden layer it is softmax regression.",
    "手写全连接网络；没有隐藏层时就是 softmax 回归。",
    (
        "Linear layers, an activation between them, none after the last. (最后一层不激活)",
        "a_0 = x flattened; a_(i+1) = act(a_i W_iᵀ + b_i); logits = a_last Wᵀ + b",
        "sizes = (n_in, *hidden, n_classes)",
    ),
    names="nn.Linear layers in their order and no other parameters; logits, not probabilities",
)
def mlp_cases():
    for hidden, activation in (((), "relu"), ((5,), "tanh"), ((4, 3), "relu")):
        images = draw(3, 2, 4, seed=7)
        parameters = layer_sizes((8, *hidden, 6))
        leaves = [values.clone().requires_grad_() for values in parameters]
        x = images.flatten(1)
        for i in range(0, len(leaves), 2):
            x = F.linear(x, leaves[i], leaves[i + 1])
            if i + 2 < len(leaves):
                x = getattr(torch, activation)(x)
        expected = {"logits": x} | gradients_of(
            x, {f"parameter {i}": leaf for i, leaf in enumerate(leaves)}
        )
        options = {"hidden": hidden, "n_in": 8, "n_classes": 6, "activation": activation}
        inputs = {"options": options, "parameters": parameters, "images": images}
        yield Case(f"{hidden=}, {activation}", inputs, expected, network_with_gradients)


def stage1_network(hidden, parameters) -> nn.Module:
    """The MLP of stage 1 for 8 values and 6 classes, with these parameters."""
    from stage1_mlp import MLP

    model = MLP(hidden, n_in=8, n_classes=6).double()
    for parameter, values in zip(model.parameters(), parameters, strict=True):
        parameter.data = values.clone()
    return model


def backprop_by_hand(solution, hidden, parameters, images, target) -> dict:
    """What the version gives for stage 1's network; its gradients without their graph."""
    found = solution(stage1_network(hidden, parameters), images, target)
    if not isinstance(found, dict):
        raise Mismatch(f"a dict {{parameter name: gradient}} expected, not {type(found).__name__}")
    return found


@exercise(
    "stage1_mlp.py",
    "backprop",
    LOSSES,
    3,
    "Back-propagation by hand through a ReLU network with cross-entropy.",
    "手写反向传播：ReLU 网络加交叉熵。",
    (
        "From the last layer down, δ = ∂L/∂z: the weights' slope is δ against the layer's input, "
        "and δ goes back through W and through the ReLU. (从后往前)",
        "δ_last = (softmax(z) − onehot) / B; dW_i = δ_iᵀ a_i; db_i = Σ_B δ_i; "
        "δ_(i−1) = (δ_i W_i) ⊙ [z_(i−1) > 0]",
        "*inputs, logits = model.activations(images)  # what each layer reads, and the logits",
    ),
    names="model.layers is a list of nn.Linear, model.activations(images) gives the input, what "
    "each hidden layer makes of it, and the logits",
)
def backprop_cases():
    for hidden in ((), (5,), (4, 3)):
        inputs = {
            "hidden": hidden,
            "parameters": layer_sizes((8, *hidden, 6)),
            "images": draw(7, 8, seed=8),
            "target": labels(7, 6),
        }
        model = stage1_network(hidden, inputs["parameters"])
        F.cross_entropy(model(inputs["images"]), inputs["target"]).backward()
        expected = {name: parameter.grad for name, parameter in model.named_parameters()}
        yield Case(f"{hidden=}, against autograd", inputs, expected, backprop_by_hand)


@exercise(
    "interview/classical.py",
    "binary_cross_entropy",
    LOSSES,
    1,
    "Binary cross-entropy of probabilities, finite at 0 and 1.",
    "手写二元交叉熵，p 为 0 或 1 时结果也必须有限。",
    (
        "−log of the probability that was given to what happened; keep p off 0 and 1. (先截断)",
        "−mean[y log p + (1 − y) log(1 − p)], p clipped to eps … 1 − eps, eps = 2.2e-16",
        "eps = np.finfo(np.float64).eps",
    ),
)
def binary_cross_entropy_cases():
    from sklearn.metrics import log_loss

    p = np.array([0.1, 0.8, 0.35, 0.99, 0.5])
    y = np.array([0.0, 1.0, 1.0, 1.0, 0.0])
    expected = F.binary_cross_entropy(torch.from_numpy(p), torch.from_numpy(y)).item()
    yield Case("five rows", {"p": p, "y": y}, expected)
    certain = np.array([0.0, 1.0, 1.0])
    right = np.array([0.0, 1.0, 0.0])
    expected = float(log_loss(right, certain))
    yield Case("certain, and once wrong", {"p": certain, "y": right}, expected, tolerance=1e-6)
    soft = np.array([0.3, 0.9])
    expected = F.binary_cross_entropy(torch.from_numpy(p[:2]), torch.from_numpy(soft)).item()
    yield Case("soft labels", {"p": p[:2], "y": soft}, expected)


# ---- Layers ---------------------------------------------------------------------------------


def elementwise_cases(oracle) -> Iterator[Case]:
    """Cases of an activation: values and slopes, and that both stay finite."""
    yield against("values and slopes", oracle, with_gradients, x=draw(2, 3))
    x = torch.tensor([-1000.0, -40.0, 40.0, 1000.0], dtype=torch.float64)
    yield against("values and slopes at ±1000", oracle, with_gradients, x=x)


@exercise(
    "interview/layers.py",
    "sigmoid",
    LAYERS,
    1,
    "Write sigmoid so that neither value nor slope overflows.",
    "手写 sigmoid，数值和梯度都不能溢出。",
    (
        "Never take the exponential of a large positive number; for x < 0 use the other form. "
        "(分正负两种写法)",
        "1 / (1 + e^−x) for x ≥ 0, e^x / (1 + e^x) for x < 0",
        "exp = torch.where(x >= 0, -x, x).exp()  # at most 1",
    ),
)
def sigmoid_cases():
    yield from elementwise_cases(torch.sigmoid)


@exercise(
    "interview/layers.py",
    "tanh",
    LAYERS,
    1,
    "Write tanh, exact near 0 too.",
    "手写 tanh，0 附近也要精确。",
    (
        "It is a sigmoid between −1 and 1; e^z − 1 near 0 is expm1's work. (用 expm1)",
        "tanh x = (1 − e^−2x) / (1 + e^−2x), with e^−2|x| alone",
        "t = torch.where(x >= 0, -2 * x, 2 * x).expm1()  # e^-2|x| − 1",
    ),
)
def tanh_cases():
    yield from elementwise_cases(torch.tanh)
    x = torch.tensor([1e-12, -3e-10], dtype=torch.float64)
    yield against("keeps the digits of 1e-12", torch.tanh, x=x, tolerance=1e-20)


@exercise(
    "interview/layers.py",
    "relu",
    LAYERS,
    1,
    "Write ReLU. Which slope has it at 0?",
    "手写 ReLU。它在 0 处的梯度是多少？",
    (
        "What is negative becomes 0. (负数变 0)",
        "max(x, 0); slope 1 above 0, 0 below and at 0",
        "return torch.where(x <= 0, 0, x)",
    ),
)
def relu_cases():
    yield from elementwise_cases(F.relu)
    yield against("0 has slope 0", F.relu, with_gradients, x=torch.zeros(2, dtype=torch.float64))


@exercise(
    "interview/layers.py",
    "leaky_relu",
    LAYERS,
    1,
    "Write leaky ReLU for any slope.",
    "手写 leaky ReLU，斜率可以任意。",
    (
        "As ReLU, but what is negative keeps a small share. (负半轴保留小斜率)",
        "x for x > 0, slope · x else; not max(x, slope · x): that is wrong for slopes above 1",
        "return torch.where(x > 0, x, ...)",
    ),
)
def leaky_relu_cases():
    for slope in (0.01, 0.2, 3.0):
        yield against(f"slope {slope:g}", F.leaky_relu, with_slope, x=draw(2, 5), slope=slope)


def with_slope(solution, x, slope) -> dict:
    """Values and gradients of a leaky ReLU; its slope goes by position."""

    def leaky(x):
        return solution(x, slope)

    return with_gradients(leaky, x=x)


@exercise(
    "interview/layers.py",
    "gelu",
    LAYERS,
    1,
    "Write the exact GELU.",
    "手写精确的 GELU（不是 tanh 近似）。",
    (
        "x times the probability that a standard normal number is below x. (乘标准正态分布函数)",
        "x · Φ(x), Φ(x) = ½ (1 + erf(x / √2))",
        "cdf = 0.5 * (1 + torch.erf(x / math.sqrt(2)))",
    ),
)
def gelu_cases():
    yield from elementwise_cases(F.gelu)


@exercise(
    "interview/layers.py",
    "silu",
    LAYERS,
    1,
    "Write SiLU (Swish).",
    "手写 SiLU（Swish）。",
    (
        "x, let through by a sigmoid gate of itself. (自门控)",
        "x · σ(x), with a σ that does not overflow",
        "gate = torch.sigmoid(x)  # or your own",
    ),
)
def silu_cases():
    yield from elementwise_cases(F.silu)


def along_an_axis_cases(oracle) -> Iterator[Case]:
    """Cases of softmax and log-softmax."""
    yield against("the last axis", oracle, with_gradients, x=draw(2, 3), dim=-1)
    yield against("the first axis", oracle, with_gradients, x=draw(2, 3), dim=0)
    yield against("the middle one of three", oracle, with_gradients, x=draw(2, 4, 3), dim=1)
    large = torch.tensor([[1000.0, 999.0, -1000.0], [-1000.0, 0.0, 1000.0]], dtype=torch.float64)
    yield against("values of ±1000", oracle, with_gradients, x=large, dim=-1)
    small = torch.tensor([[-1000.0, -1001.0, -999.0], [1000.0, 1001.0, 999.5]]).double()
    yield against("rows far below and far above 0", oracle, with_gradients, x=small, dim=-1)


@exercise(
    "interview/layers.py",
    "softmax",
    LAYERS,
    2,
    "Write a softmax that does not overflow. Why may the maximum be subtracted?",
    "手写 softmax，怎样防止溢出？为什么可以减去最大值？",
    (
        "Subtract the maximum along dim first: numerator and denominator shrink by the same "
        "factor. (先减去最大值)",
        "softmax(x)_i = e^(x_i − m) / Σ_j e^(x_j − m), m = max_j x_j along dim",
        "z = x - x.amax(dim, keepdim=True)",
    ),
)
def softmax_cases():
    yield from along_an_axis_cases(torch.softmax)


@exercise(
    "interview/layers.py",
    "log_softmax",
    LAYERS,
    2,
    "Write log-softmax. Why not the log of a softmax?",
    "手写 log-softmax。为什么不能先 softmax 再取对数？",
    (
        "A logarithm of a quotient is a difference, and no logarithm of 0 is left. (商的对数是差)",
        "x − m − log Σ_j e^(x_j − m), m the maximum along dim",
        "z = x - x.amax(dim, keepdim=True)",
    ),
)
def log_softmax_cases():
    yield from along_an_axis_cases(torch.log_softmax)


class PlainSwiGLU(nn.Module):
    """The second route: w2(F.silu(w1(x)) · w3(x)) from F.linear."""

    def __init__(self, d, hidden):
        super().__init__()
        self.w1 = nn.Linear(d, hidden, bias=False)
        self.w2 = nn.Linear(hidden, d, bias=False)
        self.w3 = nn.Linear(d, hidden, bias=False)

    def forward(self, x):
        inner = F.silu(x @ self.w1.weight.T) * (x @ self.w3.weight.T)
        return inner @ self.w2.weight.T


@exercise(
    "interview/layers.py",
    "SwiGLU",
    LAYERS,
    1,
    "Write LLaMA's feed-forward layer. Why three matrices?",
    "手写 SwiGLU。为什么有三个矩阵？",
    (
        "Two branches of the input: one, through SiLU, is the gate of the other. (一路作门控)",
        "w2(silu(w1 x) ⊙ w3 x), no biases",
        "self.w1 = nn.Linear(d, hidden, bias=False)",
    ),
    names="w1, w2, w3: nn.Linear without bias",
)
def swiglu_cases():
    weights = {
        "w1.weight": draw(5, 3, seed=1),
        "w2.weight": draw(3, 5, seed=2),
        "w3.weight": draw(5, 3, seed=3),
    }
    for what, x in (("two rows", draw(2, 3)), ("a batch of tokens (B, T, d)", draw(2, 4, 3))):
        inputs = {"sizes": (3, 5), "parameters": weights, "x": x}
        yield against(what, PlainSwiGLU, module_with_gradients, **inputs)


def running_statistics(solution, parameters, batches, x) -> dict:
    """Train a batch norm on several batches, then use it in eval mode."""
    norm = built(solution(len(parameters["weight"])), parameters).train()
    for batch in batches:
        norm(batch)
    norm.eval()
    statistics = {"running_mean": norm.running_mean, "running_var": norm.running_var}
    return {"result in eval": norm(x)} | statistics


@exercise(
    "interview/layers.py",
    "BatchNorm",
    LAYERS,
    3,
    "Write batch norm. What differs between training and inference?",
    "手写 BN。训练和推理有什么区别？",
    (
        "Statistics of each channel over the batch and its pixels in training, running averages "
        "of them in inference. (训练用批统计量，推理用滑动平均)",
        "y = γ (x − μ) / √(σ² + eps) + β with the biased variance; "
        "running ← 0.9 running + 0.1 new, there with the unbiased variance",
        "axes = [0, *range(2, x.ndim)]  # all but the channels",
    ),
    names="parameters weight and bias (n,), buffers running_mean and running_var (n,)",
)
def batch_norm_cases():
    parameters = weight_and_bias(3)
    for what, oracle, shape in (
        ("rows (B, C) in training", nn.BatchNorm1d, (5, 3)),
        ("images (B, C, H, W) in training", nn.BatchNorm2d, (4, 3, 2, 5)),
    ):
        inputs = {"sizes": (3,), "parameters": parameters, "x": draw(*shape)}
        yield against(what, oracle, module_with_gradients, **inputs)
    batches = [2 + draw(4, 3, seed=seed, scale=3) for seed in range(3)]
    inputs = {"parameters": parameters, "batches": batches, "x": draw(2, 3, seed=9)}
    yield against("eval after three batches", nn.BatchNorm1d, running_statistics, **inputs)


def norm_cases(oracle, sizes, parameters, shapes, training=True) -> Iterator[Case]:
    """Cases of a normalisation that is the same in training and in eval."""
    for shape in shapes:
        inputs = {"sizes": sizes, "parameters": parameters, "x": 1 + draw(*shape, scale=2)}
        yield against(f"x of shape {shape}", oracle, module_with_gradients, **inputs)
    inputs = {"sizes": sizes, "parameters": parameters, "x": draw(*shapes[0]), "training": False}
    yield against("the same in eval", oracle, module_with_gradients, **inputs)


@exercise(
    "interview/layers.py",
    "LayerNorm",
    LAYERS,
    2,
    "Write layer norm. Why do Transformers not use batch norm?",
    "手写 LN。Transformer 为什么用 LN 不用 BN？",
    (
        "Each row by itself, over its last axis; nothing depends on the batch. (逐行归一化)",
        "y = γ (x − μ) / √(σ² + eps) + β, biased variance (/ d), eps = 1e-5",
        "centred = x - x.mean(-1, keepdim=True)",
    ),
    names="parameters weight and bias, each (d,)",
)
def layer_norm_cases():
    yield from norm_cases(nn.LayerNorm, (4,), weight_and_bias(4), [(3, 4), (2, 5, 4)])


@exercise(
    "interview/layers.py",
    "GroupNorm",
    LAYERS,
    2,
    "Write group norm. Which two other norms are its ends?",
    "手写 GN。它的两个极端是哪两种归一化？",
    (
        "As layer norm, but over a group of an image's channels and all its pixels. (按组归一化)",
        "x (B, C, …) -> (B, G, C/G, …); mean and variance over all axes from the third on",
        "groups = x.unflatten(1, (self.groups, -1))  # (B, G, C/G, ...)",
    ),
    names="parameters weight and bias, each (n,)",
)
def group_norm_cases():
    yield from norm_cases(nn.GroupNorm, (2, 6), weight_and_bias(6), [(4, 6), (3, 6, 2, 5)])


@exercise(
    "interview/layers.py",
    "InstanceNorm",
    LAYERS,
    2,
    "Write instance norm. Where is it used?",
    "手写 IN。它用在哪里？",
    (
        "Each channel of each image by itself, over its pixels. (逐图逐通道)",
        "(x − μ) / √(σ² + eps) over the axes from the third on; no γ, β unless affine",
        "axes = list(range(2, x.ndim))  # the pixels alone",
    ),
    names="no parameters unless affine=True, then weight and bias (n,)",
)
def instance_norm_cases():
    yield from norm_cases(nn.InstanceNorm2d, (3,), {}, [(2, 3, 4, 5)])
    inputs = {"sizes": (3,), "parameters": weight_and_bias(3), "x": draw(2, 3, 7)}
    yield against(
        "affine, x of shape (2, 3, 7)", nn.InstanceNorm1d, affine_with_gradients, **inputs
    )


def affine_with_gradients(solution, sizes, parameters, x) -> dict:
    """As module_with_gradients, of a class that is made with affine=True."""
    return module_with_gradients(partial(solution, affine=True), sizes, parameters, x)


@exercise(
    "interview/layers.py",
    "RMSNorm",
    LAYERS,
    1,
    "Write RMS norm. What does it save against layer norm?",
    "手写 RMSNorm。它比 LN 省了什么？",
    (
        "Divide by the root of the mean square; no mean is taken off, there is no β. "
        "(只除以均方根)",
        "y = γ x / √(mean(x²) + eps); eps None is torch.finfo(x.dtype).eps",
        "mean_square = x.square().mean(-1, keepdim=True)",
    ),
    names="one parameter, weight (d,)",
)
def rms_norm_cases():
    weight = {"weight": draw(4, seed=11)}
    yield from norm_cases(nn.RMSNorm, (4,), weight, [(3, 4), (2, 5, 4)])


def numbers_of(result, names: tuple[str, ...]) -> dict:
    """The parts of a tuple under their names; Mismatch if there are more or fewer."""
    if not isinstance(result, tuple | list) or len(result) != len(names):
        found = type(result).__name__
        if isinstance(result, tuple | list):
            found += f" of {len(result)}"
        raise Mismatch(f"{', '.join(names)} must come back, not {found}")
    return dict(zip(names, result, strict=True))


def backward_by_hand(solution, **inputs) -> dict:
    return numbers_of(solution(**inputs), ("dx", "dweight", "dbias"))


def backward_cases(normalise, shapes) -> Iterator[Case]:
    """Cases of a backward pass, by autograd; `normalise` is (x, weight, bias, eps) -> y."""
    for shape, eps in shapes:
        n = shape[-1]
        grad = draw(*shape, seed=1)
        x = (1 + draw(*shape, seed=2, scale=2)).requires_grad_()
        weight = draw(n, seed=3).requires_grad_()
        bias = draw(n, seed=4).requires_grad_()
        y = normalise(x, weight, bias, eps)
        theirs = torch.autograd.grad(y, (x, weight, bias), grad)
        expected = dict(zip(("dx", "dweight", "dbias"), theirs, strict=True))
        inputs = {"grad": grad, "x": x.detach(), "weight": weight.detach(), "eps": eps}
        yield Case(f"x of shape {shape}, eps {eps:g}", inputs, expected, backward_by_hand)


@exercise(
    "interview/layers.py",
    "layer_norm_backward",
    LAYERS,
    3,
    "Derive and write the backward pass of layer norm.",
    "推导并手写 LN 的反向传播。",
    (
        "x acts directly, through the mean and through the deviation: three terms. (三条路径)",
        "g = γ ⊙ grad; dx = (g − mean(g) − x̂ mean(g ⊙ x̂)) / s; dγ = Σ grad ⊙ x̂; dβ = Σ grad",
        "centred = x - x.mean(-1, keepdim=True)",
    ),
)
def layer_norm_backward_cases():
    def normalise(x, weight, bias, eps):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    yield from backward_cases(normalise, [((3, 4), 1e-5), ((3, 5), 0.1), ((2, 3, 4), 1e-5)])


@exercise(
    "interview/layers.py",
    "batch_norm_backward",
    LAYERS,
    3,
    "Derive and write the backward pass of batch norm in training.",
    "推导并手写 BN 训练时的反向传播。",
    (
        "As layer norm's, with the means over the batch; γ is the same in a column. (沿批取均值)",
        "dx = γ / s ⊙ (grad − mean_B(grad) − x̂ mean_B(grad ⊙ x̂)); dγ = Σ_B grad ⊙ x̂; dβ = Σ_B grad",
        "centred = x - x.mean(0)",
    ),
)
def batch_norm_backward_cases():
    def normalise(x, weight, bias, eps):
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)

    yield from backward_cases(normalise, [((5, 3), 1e-5), ((4, 2), 0.1)])


def dropped(solution, p, x, training) -> dict:
    """What dropout makes of x, over x: which factors occur, and how large the dropped share is."""
    torch.manual_seed(0)
    layer = solution(p)
    if not isinstance(layer, nn.Module):
        raise Mismatch(f"the class must be an nn.Module, not {type(layer).__name__}")
    factors = layer.train(training)(x) / x
    near = ((factors == 0).double().mean() - (p if training else 0)).abs() < 0.02
    columns = factors.unique(dim=1).shape[1]
    return {
        "factors that occur": factors.unique().tolist(),
        "a share p is 0": bool(near),
        "rows have masks of their own": columns > 2 if training and p > 0 else columns == 1,
    }


@exercise(
    "interview/layers.py",
    "Dropout",
    LAYERS,
    1,
    "Write dropout. Why divide by 1 − p, and what happens in inference?",
    "手写 dropout。为什么要除以 1 − p？推理时做什么？",
    (
        "In training a share p becomes 0 and the rest is scaled up; in eval nothing happens. "
        "(训练时缩放，推理时不变)",
        "y = x · keep / (1 − p), keep = [u ≥ p], u uniform",
        "keep = torch.rand_like(x) >= self.p",
    ),
    names="the share that is dropped is p; self.training says which mode it is",
)
def dropout_cases():
    x = torch.ones(8, 2500, dtype=torch.float64)
    for p, training in ((0.2, True), (0.75, True), (0.0, True), (0.4, False)):
        factors = [0.0, 1 / (1 - p)] if training and p > 0 else [1.0]
        expected = {
            "factors that occur": factors,
            "a share p is 0": True,
            "rows have masks of their own": True,
        }
        mode = "training" if training else "eval"
        yield Case(f"{p=} in {mode}", {"p": p, "x": x, "training": training}, expected, dropped)


# ---- Convolution ----------------------------------------------------------------------------


@exercise(
    "interview/convolution.py",
    "corr2d",
    CONVOLUTION,
    1,
    "Write a two-dimensional cross-correlation of one image with one kernel.",
    "手写二维互相关。",
    (
        "Slide the kernel over the image and sum products. (滑动求和)",
        "Y[i, j] = Σ_uv K[u, v] X[i + u, j + v]; Y is (H − kh + 1, W − kw + 1)",
        "kh, kw = K.shape",
    ),
)
def corr2d_cases():
    def oracle(X, K):
        return F.conv2d(X[None, None], K[None, None])[0, 0]

    yield against("a 2 × 3 kernel", oracle, with_gradients, X=draw(4, 5), K=draw(2, 3, seed=1))
    yield against("one row", oracle, with_gradients, X=draw(3, 4), K=draw(1, 2, seed=1))
    yield against("as large as the image", oracle, with_gradients, X=draw(3, 2), K=draw(3, 2))


def convolution_case(what, oracle, x, weight, n_out, **options) -> Case:
    """A case with values and gradients in x, weight and bias."""
    inputs = {"x": draw(*x), "weight": draw(*weight, seed=1), "bias": draw(n_out, seed=2)}
    return against(what, oracle, with_gradients, **inputs, **options)


@exercise(
    "interview/convolution.py",
    "conv2d",
    CONVOLUTION,
    3,
    "Write a 2-d convolution without the framework's. How large is the output?",
    "不用框架手写二维卷积。输出尺寸怎么算？",
    (
        "Lay out each patch as a column (im2col): all of it is then one matrix product. "
        "(展开成列，一次矩阵乘法)",
        "OH = ⌊(H + 2p − d(kh − 1) − 1) / s⌋ + 1; "
        "Y[o, i, j] = b[o] + Σ_cuv W[o, c, u, v] X[c, s·i + d·u − p, s·j + d·v − p]",
        "x = F.pad(x, (p_w, p_w, p_h, p_h))  # the last axis comes first",
    ),
)
def conv2d_cases():
    case = convolution_case
    small = {"x": draw(1, 1, 3, 3), "weight": draw(1, 1, 2, 2, seed=1)}
    yield against("one channel, no bias", F.conv2d, with_gradients, **small)
    yield case("channels and a bias", F.conv2d, (2, 3, 5, 6), (4, 3, 2, 3), 4)
    yield case("stride (2, 3)", F.conv2d, (2, 3, 7, 8), (4, 3, 2, 3), 4, stride=(2, 3))
    yield case("padding (2, 1)", F.conv2d, (2, 3, 4, 5), (2, 3, 3, 2), 2, padding=(2, 1))
    yield case("dilation 2", F.conv2d, (1, 2, 7, 6), (3, 2, 3, 2), 3, dilation=2)
    yield case("groups 2", F.conv2d, (2, 4, 4, 5), (6, 2, 2, 3), 6, groups=2)
    every = {"stride": 2, "padding": 1, "dilation": (1, 2), "groups": 3}
    yield case("all at once", F.conv2d, (2, 6, 5, 7), (3, 2, 2, 3), 3, **every)


@exercise(
    "interview/convolution.py",
    "conv_transpose2d",
    CONVOLUTION,
    3,
    "Write a transposed convolution. Is it the inverse of a convolution?",
    "手写转置卷积。它是卷积的逆运算吗？",
    (
        "Each pixel stamps the kernel, times its value, onto the output; stamps add up. "
        "(每个像素盖一次章)",
        "OH = s(H − 1) + kh − 2p; the weight is (C, O, kh, kw); padding cuts the border off",
        "out = x.new_zeros(B, O, stride * (H - 1) + kh, stride * (W - 1) + kw)",
    ),
)
def conv_transpose2d_cases():
    case = partial(convolution_case, oracle=F.conv_transpose2d)
    small = {"x": draw(1, 1, 2, 2), "weight": draw(1, 1, 2, 3, seed=1)}
    yield against("one channel, no bias", F.conv_transpose2d, with_gradients, **small)
    yield case("channels and a bias", x=(2, 3, 4, 5), weight=(3, 4, 2, 3), n_out=4)
    yield case("stride 2: overlaps", x=(2, 3, 4, 2), weight=(3, 2, 3, 4), n_out=2, stride=2)
    yield case("stride 3: gaps", x=(1, 2, 3, 4), weight=(2, 3, 2, 1), n_out=3, stride=3)
    yield case(
        "stride 2, padding 1", x=(2, 2, 4, 5), weight=(2, 3, 3, 4), n_out=3, stride=2, padding=1
    )


def pooled(solution, x, k) -> dict:
    """Values and gradients; the size of the window goes by position."""

    def pool(x):
        return solution(x, k)

    return with_gradients(pool, x=x)


def pooling_cases(oracle) -> Iterator[Case]:
    for what, shape, k in (
        ("windows of 2", (1, 1, 4, 6), 2),
        ("channels, and a rest that is dropped", (2, 3, 5, 7), 2),
        ("windows of 3", (2, 1, 7, 9), 3),
    ):
        yield against(what, oracle, pooled, x=draw(*shape, scale=10), k=k)


@exercise(
    "interview/convolution.py",
    "max_pool2d",
    CONVOLUTION,
    1,
    "Write max pooling. Where does its gradient go?",
    "手写最大池化。梯度怎样回传？",
    (
        "Windows side by side; what does not fill one is dropped. (窗口不重叠，余数丢弃)",
        "Y[i, j] = max of X[k·i … k·i + k − 1, k·j … k·j + k − 1]; ⌊H / k⌋ rows",
        "x = x[..., : H // k * k, : W // k * k]",
    ),
)
def max_pool2d_cases():
    yield from pooling_cases(F.max_pool2d)


@exercise(
    "interview/convolution.py",
    "avg_pool2d",
    CONVOLUTION,
    1,
    "Write average pooling.",
    "手写平均池化。",
    (
        "Windows side by side; what does not fill one is dropped. (窗口不重叠，余数丢弃)",
        "the mean of each k × k window; ⌊H / k⌋ rows",
        "x = x[..., : H // k * k, : W // k * k]",
    ),
)
def avg_pool2d_cases():
    yield from pooling_cases(F.avg_pool2d)


# ---- Recurrent networks ---------------------------------------------------------------------

TORCH_CELLS = {"rnn": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}
N_GATES = {"rnn": 1, "gru": 3, "lstm": 4}


def cell_parameters(kind: str, n_in: int, n_hidden: int) -> dict[str, Tensor]:
    """W_xh and W_hh of a cell; W_hh has a bias in the GRU alone."""
    n_rows = N_GATES[kind] * n_hidden
    parameters = {
        "W_xh.weight": draw(n_rows, n_in, seed=21),
        "W_xh.bias": draw(n_rows, seed=22),
        "W_hh.weight": draw(n_rows, n_hidden, seed=23, scale=0.7),
    }
    if kind == "gru":
        parameters["W_hh.bias"] = draw(n_rows, seed=24)
    return parameters


class TorchCell(nn.Module):
    """The second route: torch's own cell, called with the weights of W_xh and W_hh."""

    def __init__(self, n_in, n_hidden, kind, activation="tanh"):
        super().__init__()
        n_rows = N_GATES[kind] * n_hidden
        self.W_xh = nn.Linear(n_in, n_rows)
        self.W_hh = nn.Linear(n_hidden, n_rows, bias=kind == "gru")
        self.kind = kind
        self.options = {"nonlinearity": activation} if kind == "rnn" else {}

    def forward(self, x, state=None):
        cell = TORCH_CELLS[self.kind](x.shape[1], self.W_hh.in_features, **self.options)
        bias = self.W_hh.bias
        weights = {
            "weight_ih": self.W_xh.weight,
            "bias_ih": self.W_xh.bias,
            "weight_hh": self.W_hh.weight,
            "bias_hh": torch.zeros_like(self.W_xh.bias) if bias is None else bias,
        }
        return functional_call(cell, weights, (x, state))


def three_steps(solution, sizes, parameters, x, state) -> dict:
    """The states of a cell that reads x (T, B, n_in) from a state; gradients of the last h."""
    cell = built(solution(*sizes), parameters)
    leaves = {"x": x.clone().requires_grad_()} | dict(cell.named_parameters())
    states = {}
    for t, x_t in enumerate(leaves["x"]):
        state = cell(x_t, state)
        if isinstance(state, tuple):
            states[f"h after step {t + 1}"] = state[0]
            states[f"c after step {t + 1}"] = state[1]
        else:
            states[f"h after step {t + 1}"] = state
    last = state[0] if isinstance(state, tuple) else state
    return states | gradients_of(last, leaves)


def cell_cases(kind: str, n_in: int = 4, n_hidden: int = 3) -> Iterator[Case]:
    """Three steps of a cell, from no state and from a given one."""
    oracle = partial(TorchCell, kind=kind)
    h = draw(2, n_hidden, seed=25)
    given = (h, draw(2, n_hidden, seed=26)) if kind == "lstm" else h
    for what, state in (("three steps from no state", None), ("from a given state", given)):
        inputs = {
            "sizes": (n_in, n_hidden),
            "parameters": cell_parameters(kind, n_in, n_hidden),
            "x": draw(3, 2, n_in),
            "state": state,
        }
        yield against(what, oracle, three_steps, **inputs)


def relu_three_steps(solution, **inputs) -> dict:
    """As three_steps, of a cell with ReLU."""
    return three_steps(partial(solution, activation="relu"), **inputs)


CELL_NAMES = "W_xh = nn.Linear(n_in, …) with a bias, W_hh = nn.Linear(n_hidden, …, bias=False)"


@exercise(
    "stage2_rnn.py",
    "RNNCell",
    RECURRENT,
    1,
    "Write a step of a plain RNN from nn.Linear.",
    "用 nn.Linear 手写 RNN 的单步计算。",
    (
        "The new state is a layer of the input and the state before. (新状态 = 输入 + 旧状态)",
        "h' = tanh(W_xh x + b + W_hh h); no state is zeros",
        "self.W_xh = nn.Linear(n_in, n_hidden)",
    ),
    names=CELL_NAMES,
)
def rnn_cell_cases():
    yield from cell_cases("rnn")
    inputs = {
        "sizes": (4, 3),
        "parameters": cell_parameters("rnn", 4, 3),
        "x": draw(3, 2, 4),
        "state": None,
    }
    oracle = partial(TorchCell, kind="rnn")
    yield against('activation="relu"', oracle, relu_three_steps, **inputs)


@exercise(
    "stage2_rnn.py",
    "GRUCell",
    RECURRENT,
    2,
    "Write a GRU cell. What do its two gates do?",
    "手写 GRU。两个门各起什么作用？",
    (
        "z mixes the old state with a candidate; r says how much of the past the candidate sees. "
        "(更新门决定保留多少旧状态，重置门决定候选状态看到多少旧状态)",
        "r, z = σ(W_x x + W_h h); n = tanh(W_xn x + b + r ⊙ (W_hn h + b)); "
        "h' = (1 − z) ⊙ n + z ⊙ h",
        "x_r, x_z, x_n = self.W_xh(x).chunk(3, dim=1)",
    ),
    names="W_xh = nn.Linear(n_in, 3 n_hidden), W_hh = nn.Linear(n_hidden, 3 n_hidden), both with "
    "a bias; rows in the order r, z, n",
)
def gru_cell_cases():
    yield from cell_cases("gru")


@exercise(
    "stage2_rnn.py",
    "LSTMCell",
    RECURRENT,
    2,
    "Write an LSTM cell. Why does it forget less than a plain RNN?",
    "手写 LSTM。为什么它比 RNN 记得更久？",
    (
        "The memory c is only scaled by a gate and added to, so gradients pass it. "
        "(记忆只做加法和门控)",
        "i, f, o = σ(…), g = tanh(…); c' = f ⊙ c + i ⊙ g; h' = o ⊙ tanh(c')",
        "i, f, g, o = (self.W_xh(x) + self.W_hh(h)).chunk(4, dim=1)",
    ),
    names=CELL_NAMES + "; rows in the order i, f, g, o; the state is (h, c)",
)
def lstm_cell_cases():
    yield from cell_cases("lstm")


def torchs_recurrent(kind, n_in, n_hidden, n_layers, bidirectional, parameters) -> nn.Module:
    """nn.RNN, nn.GRU or nn.LSTM with the weights of our cells."""
    kinds = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
    options = {"bidirectional": bidirectional, "batch_first": True}
    theirs = kinds[kind](n_in, n_hidden, n_layers, **options).double()
    n_directions = 2 if bidirectional else 1
    for i in range(n_layers * n_directions):
        end = f"_l{i // n_directions}" + ("_reverse" if i % n_directions else "")
        cell = f"cells.{i}."
        weights = {
            "weight_ih": parameters[f"{cell}W_xh.weight"],
            "bias_ih": parameters[f"{cell}W_xh.bias"],
            "weight_hh": parameters[f"{cell}W_hh.weight"],
        }
        no_bias = torch.zeros_like(weights["bias_ih"])
        weights["bias_hh"] = parameters.get(f"{cell}W_hh.bias", no_bias)
        for name, values in weights.items():
            getattr(theirs, name + end).data = values
    return theirs


def read_sequences(solution, options, parameters, x, lengths) -> dict:
    """Outputs and last state of the layers, and the gradient in x."""
    model = built(solution(**options), parameters)
    x = x.clone().requires_grad_()
    outputs, state = model(x, lengths)
    parts = dict(zip(("h", "c"), state, strict=True)) if isinstance(state, tuple) else {"h": state}
    return {"outputs": outputs} | parts | gradients_of(outputs, {"x": x})


def read_one_by_one(theirs, x, lengths) -> dict:
    """The second route: torch's layers read each sequence alone, as far as it goes."""
    x = x.clone().requires_grad_()
    outputs = []
    states = []
    for row, length in zip(x, lengths or [x.shape[1]] * len(x), strict=True):
        output, state = theirs(row[None, :length])
        outputs.append(F.pad(output[0], (0, 0, 0, x.shape[1] - length)))
        states.append(state if isinstance(state, tuple) else (state,))
    parts = {}
    for name, found in zip("hc", zip(*states, strict=True), strict=False):
        parts[name] = torch.cat(found, 1)
    outputs = torch.stack(outputs)
    return {"outputs": outputs} | parts | gradients_of(outputs, {"x": x})


@exercise(
    "stage2_rnn.py",
    "Recurrent",
    RECURRENT,
    3,
    "Layers of cells over sequences of different lengths, in one direction or both.",
    "手写多层、双向、变长序列的循环网络。",
    (
        "A layer reads the outputs of the layer below; a sequence's state stands still past its "
        "end; backwards, each one is turned about its own end. (按各自的长度翻转)",
        "outputs[t] = h_t for t < length, else 0; the last state is h at t = length − 1",
        "x = x.transpose(0, 1)  # (T, B, F): step by step",
    ),
    names="self.cells: an nn.ModuleList of RNNCell, GRUCell, LSTMCell (from stage2_rnn import …), "
    "layer by layer, forwards before backwards",
)
def recurrent_cases():
    for kind, n_layers, bidirectional, lengths in (
        ("rnn", 1, False, None),
        ("lstm", 2, False, None),
        ("gru", 1, False, [5, 2, 4]),
        ("rnn", 2, True, [3, 5, 1]),
    ):
        options = {
            "cell": kind,
            "n_in": 4,
            "n_hidden": 2,
            "n_layers": n_layers,
            "bidirectional": bidirectional,
        }
        n_directions = 2 if bidirectional else 1
        parameters = {}
        for i in range(n_layers * n_directions):
            n_in = 4 if i < n_directions else 2 * n_directions
            for name, values in cell_parameters(kind, n_in, 2).items():
                parameters[f"cells.{i}.{name}"] = values + 0.1 * i
        x = draw(3, 5, 4)
        inputs = {"options": options, "parameters": parameters, "x": x, "lengths": lengths}
        theirs = torchs_recurrent(kind, 4, 2, n_layers, bidirectional, parameters)
        expected = read_one_by_one(theirs, x, lengths)
        directions = "both directions" if bidirectional else "forwards"
        what = f"{kind}, {n_layers} layer(s), {directions}, {lengths=}"
        yield Case(what, inputs, expected, read_sequences)


def stage2_cell(activation: str, parameters) -> nn.Module:
    from stage2_rnn import RNNCell

    return built(RNNCell(4, 3, activation), parameters)


def bptt_by_hand(solution, activation, parameters, x, grad_outputs) -> dict:
    with torch.no_grad():
        found = solution(stage2_cell(activation, parameters), x, grad_outputs)
    if not isinstance(found, dict):
        raise Mismatch(f"a dict {{parameter name: gradient}} expected, not {type(found).__name__}")
    return found


@exercise(
    "stage2_rnn.py",
    "bptt",
    RECURRENT,
    3,
    "Back-propagation through time by hand, for the plain RNN.",
    "手写 RNN 的随时间反向传播（BPTT）。",
    (
        "From the last step back: a state acts on its own output and on all that come later. "
        "(从最后一步往回)",
        "γ_t = grad_outputs_t + W_hhᵀ δ_(t+1); δ_t = γ_t ⊙ act'(a_t); "
        "dW_xh = Σ δ_t x_tᵀ; dW_hh = Σ δ_t h_(t−1)ᵀ; db = Σ δ_t",
        "hs = [torch.zeros(B, H)]; then hs.append(cell(x[:, t], hs[-1])) for every t",
    ),
    names="cell.W_xh and cell.W_hh are nn.Linear, cell.activation is tanh or relu; the result's "
    "keys are W_xh.weight, W_xh.bias, W_hh.weight",
)
def bptt_cases():
    parameters = cell_parameters("rnn", 4, 3)
    for activation, n_steps in (("tanh", 1), ("tanh", 5), ("relu", 4)):
        x = draw(2, n_steps, 4)
        grad_outputs = draw(2, n_steps, 3, seed=5)
        leaves = {name: values.clone().requires_grad_() for name, values in parameters.items()}
        act = getattr(torch, activation)
        h = torch.zeros(2, 3, dtype=torch.float64)
        loss = 0
        for t in range(n_steps):
            a = F.linear(x[:, t], leaves["W_xh.weight"], leaves["W_xh.bias"])
            h = act(a + F.linear(h, leaves["W_hh.weight"]))
            loss = loss + (grad_outputs[:, t] * h).sum()
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        inputs = {
            "activation": activation,
            "parameters": parameters,
            "x": x,
            "grad_outputs": grad_outputs,
        }
        expected = dict(zip(leaves, gradients, strict=True))
        yield Case(f"{activation}, {n_steps} step(s)", inputs, expected, bptt_by_hand)


# ---- Attention ------------------------------------------------------------------------------


def one_query_at_a_time(q, k, v, mask=None, causal=False) -> tuple[Tensor, Tensor]:
    """Attention by three loops: the second route of `attention`."""
    B, H, T, d = q.shape
    G, S = k.shape[1:3]
    if mask is not None:
        mask = mask.expand(B, H, T, S)
    out = []
    weights = []
    for b, h, t in itertools.product(range(B), range(H), range(T)):
        g = h // (H // G)
        scores = k[b, g] @ q[b, h, t] / math.sqrt(d)  # (S,)
        hidden = torch.zeros(S, dtype=torch.bool)
        if causal:
            hidden = torch.arange(S) > S - T + t
        if mask is not None and mask.dtype == torch.bool:
            hidden = hidden | ~mask[b, h, t]
        elif mask is not None:
            scores = scores + mask[b, h, t]
        row = 0 * scores if hidden.all() else scores.masked_fill(hidden, -math.inf).softmax(0)
        weights.append(row)
        out.append(row @ v[b, g])
    return torch.stack(out).view(B, H, T, v.shape[3]), torch.stack(weights).view(B, H, T, S)


def attention_with_gradients(solution, q, k, v, **options) -> dict:
    """Output, weights, and the gradients of the output in q, k and v."""
    leaves = {"q": q.clone(), "k": k.clone(), "v": v.clone()}
    for leaf in leaves.values():
        leaf.requires_grad_()
    parts = numbers_of(solution(**leaves, **options), ("out", "weights"))
    return parts | gradients_of(parts["out"], leaves)


def heads(B, H, G, T, S, d, d_v) -> dict[str, Tensor]:
    """Queries, keys and values."""
    return {
        "q": draw(B, H, T, d, seed=31, scale=2),
        "k": draw(B, G, S, d, seed=32),
        "v": draw(B, G, S, d_v, seed=33),
    }


@exercise(
    "stage3_attention.py",
    "attention",
    ATTENTION,
    2,
    "Write attention with masks, for query heads that share keys. Why √d?",
    "手写注意力：支持掩码，支持多个查询头共享键值。为什么除以 √d？",
    (
        "Every query is compared with every key; softmax makes shares of the scores; the output "
        "is the values' mean by these shares. (打分、归一、加权平均)",
        "weights = softmax(q kᵀ / √d), out = weights · v; −∞ where a query may not look; "
        "query head h reads key/value head h // (H / G)",
        "scores = q @ k.mT / math.sqrt(q.shape[-1])  # (B, H, T, S), where G = H",
    ),
)
def attention_cases():
    some = torch.tensor([[True, True, False, True], [False, True, True, False]])
    added = draw(1, 2, 2, 4, seed=34)
    nothing = torch.tensor([[True, False, True, True], [False, False, False, False]])
    shared = heads(2, 6, 2, 2, 4, 3, 5)
    own = heads(1, 2, 2, 2, 4, 3, 3)
    use = attention_with_gradients
    oracle = one_query_at_a_time
    yield against("one head", oracle, use, **heads(1, 1, 1, 2, 3, 4, 2))
    yield against("heads with keys of their own", oracle, use, **heads(2, 3, 3, 4, 5, 2, 2))
    yield against("6 query heads share 2 of keys and values", oracle, use, **shared)
    yield against("a bool mask (T, S)", oracle, use, **own, mask=some)
    yield against("a float mask, added to the scores", oracle, use, **own, mask=added)
    square = heads(1, 2, 1, 4, 4, 3, 2)
    yield against("causal", oracle, use, **square, causal=True)
    yield against("causal, with more keys than queries", oracle, use, **shared, causal=True)
    yield against("causal and a mask", oracle, use, **own, mask=some, causal=True)
    yield against("a query that may see nothing gets zeros", oracle, use, **own, mask=nothing)


class TorchAttention(nn.Module):
    """The second route of the layers: torch's multi-head attention, shared heads repeated."""

    def __init__(self, d_model, n_heads, n_kv_heads):
        super().__init__()
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        n_shared = d_model // n_heads * n_kv_heads
        self.W_q = nn.Linear(d_model, d_model)
        self.W_k = nn.Linear(d_model, n_shared)
        self.W_v = nn.Linear(d_model, n_shared)
        self.W_o = nn.Linear(d_model, d_model)

    def repeated(self, shared: Tensor) -> Tensor:
        """Rows of a shared head, once for each query head that reads it."""
        parts = shared.unflatten(0, (self.n_kv_heads, -1))
        return parts.repeat_interleave(self.n_heads // self.n_kv_heads, 0).flatten(0, 1)

    def forward(self, x, context=None, mask=None, causal=False):
        context = x if context is None else context
        D = x.shape[2]
        layer = nn.MultiheadAttention(D, self.n_heads, batch_first=True).double()
        weights = [self.W_q.weight, self.repeated(self.W_k.weight), self.repeated(self.W_v.weight)]
        biases = [self.W_q.bias, self.repeated(self.W_k.bias), self.repeated(self.W_v.bias)]
        parameters = {
            "in_proj_weight": torch.cat(weights),
            "in_proj_bias": torch.cat(biases),
            "out_proj.weight": self.W_o.weight,
            "out_proj.bias": self.W_o.bias,
        }
        hidden = None if mask is None else ~mask
        if causal:
            hidden = torch.ones(x.shape[1], context.shape[1], dtype=torch.bool).triu(1)
        options = {"attn_mask": hidden, "average_attn_weights": False}
        return functional_call(layer, parameters, (x, context, context), options)


def attend_with_gradients(solution, sizes, parameters, x, **options) -> dict:
    """Output, weights, and the gradients of the output in x and in the parameters."""
    layer = built(solution(*sizes), parameters)
    leaves = {"x": x.clone().requires_grad_()} | dict(layer.named_parameters())
    parts = numbers_of(layer(leaves["x"], **options), ("out", "weights"))
    return parts | gradients_of(parts["out"], leaves)


def decoded(solution, sizes, n_kv_heads, parameters, x) -> Tensor:
    """The output for x (B, T, D), three tokens first, then one at a time, from stage 3's cache."""
    from stage3_attention import KVCache

    layer = built(solution(*sizes), parameters)
    B, T, D = x.shape
    cache = KVCache(B, n_kv_heads, T, D // sizes[1], dtype=x.dtype)
    outs = []
    with torch.no_grad():
        for tokens in (x[:, :3], *x[:, 3:].split(1, 1)):
            parts = numbers_of(layer(tokens, causal=True, cache=cache), ("out", "weights"))
            outs.append(parts["out"])
    return torch.cat(outs, 1)


def projections(D: int, n_shared: int) -> dict[str, Tensor]:
    """Weights and biases of W_q, W_k, W_v, W_o; keys and values have n_shared numbers."""
    parameters = {}
    for i, (name, n_out) in enumerate((("q", D), ("k", n_shared), ("v", n_shared), ("o", D))):
        parameters[f"W_{name}.weight"] = draw(n_out, D, seed=40 + i)
        parameters[f"W_{name}.bias"] = draw(n_out, seed=50 + i)
    return parameters


def layer_cases(n_heads: int, n_kv_heads: int, sizes: tuple[int, ...]) -> Iterator[Case]:
    """Cases of a layer with so many heads, 2 numbers each; sizes are its arguments."""
    D = 2 * n_heads
    oracle = partial(oracle_layer, n_kv_heads=n_kv_heads)
    parameters = projections(D, 2 * n_kv_heads)
    common = {"sizes": sizes, "parameters": parameters, "x": draw(3, 5, D)}
    use = attend_with_gradients
    mask = torch.rand(5, 5, generator=torch.Generator().manual_seed(3)) < 0.6
    mask |= torch.eye(5, dtype=torch.bool)
    yield against("a sequence attends to itself", oracle, use, **common)
    yield against("to another sequence", oracle, use, **common, context=draw(3, 7, D, seed=2))
    yield against("causal", oracle, use, **common, causal=True)
    yield against("a bool mask", oracle, use, **common, mask=mask)
    theirs = built(oracle(*sizes), parameters)
    expected, _ = theirs(common["x"], causal=True)
    inputs = common | {"n_kv_heads": n_kv_heads}
    yield Case("token by token from a cache", inputs, expected.detach(), decoded)


def oracle_layer(d_model, n_heads, *rest, n_kv_heads) -> nn.Module:
    """TorchAttention, whatever arguments the layer beside it takes."""
    return TorchAttention(d_model, n_heads, n_kv_heads)


ATTENTION_NAMES = (
    "W_q, W_k, W_v, W_o: nn.Linear with a bias; `cache.append(k, v)` gives all keys and values "
    "so far, each (B, heads, S, d); `from stage3_attention import attention` is allowed"
)


@exercise(
    "stage3_attention.py",
    "MultiHeadAttention",
    ATTENTION,
    2,
    "Write multi-head attention as a layer. Why several heads?",
    "手写多头注意力。为什么要多个头？",
    (
        "Project, cut the width into heads, attend in each, put them side by side, project. "
        "(投影、分头、注意力、拼接、投影)",
        "W_o [head_1 … head_H], head_h = attention(x W_q, c W_k, c W_v), each cut to d = D / H",
        "queries = self.W_q(x).unflatten(2, (self.n_heads, -1)).transpose(1, 2)  # (B, H, T, d)",
    ),
    names=ATTENTION_NAMES,
)
def multi_head_cases():
    yield from layer_cases(3, 3, (6, 3))


@exercise(
    "stage3_attention.py",
    "GroupedQueryAttention",
    ATTENTION,
    3,
    "Write grouped-query attention. What does it save, and where?",
    "手写 GQA。它省在哪里？",
    (
        "Fewer heads of keys and values than of queries; each serves a group. (一组查询共享键值)",
        "W_k, W_v: D -> G · d; query head h reads key/value head h // (H / G)",
        "keys = self.W_k(context).unflatten(2, (self.n_kv_heads, -1)).transpose(1, 2)",
    ),
    names=ATTENTION_NAMES + "; the cases keep position 'none' and scaled True",
)
def grouped_query_cases():
    yield from layer_cases(6, 2, (12, 6, 2))
    parameters = projections(8, 8)
    inputs = {"sizes": (8, 4, 4), "parameters": parameters, "x": draw(2, 3, 8)}
    oracle = partial(oracle_layer, n_kv_heads=4)
    yield against("as many groups as heads", oracle, attend_with_gradients, **inputs)


@exercise(
    "stage3_attention.py",
    "MultiQueryAttention",
    ATTENTION,
    2,
    "Write multi-query attention. What is lost, what is won?",
    "手写 MQA。得到什么，失去什么？",
    (
        "All query heads read one head of keys and values: the cache shrinks to 1 / H. "
        "(所有查询头共享一组键值)",
        "W_k, W_v: D -> d; keys and values (B, 1, S, d)",
        "keys = self.W_k(context)[:, None]  # (B, 1, S, d)",
    ),
    names=ATTENTION_NAMES + "; the cases keep position 'none' and scaled True",
)
def multi_query_cases():
    yield from layer_cases(4, 1, (8, 4))


def appended(solution, sizes, capacity, tokens) -> dict:
    """What a cache gives back, append by append, and what it says of itself."""
    B, G, d = sizes
    cache = solution(B, G, capacity, d, dtype=torch.float64)
    found = {"length at first": cache.length, "nbytes": cache.nbytes}
    for i, (k, v) in enumerate(tokens, start=1):
        parts = numbers_of(cache.append(k, v), ("keys", "values"))
        for name, part in parts.items():
            found[f"{name} after append {i}"] = part.clone()
        found[f"length after append {i}"] = cache.length
    cache.reset()
    found["length after reset"] = cache.length
    parts = numbers_of(cache.append(*tokens[0]), ("keys", "values"))
    return found | {"keys of an append after reset": parts["keys"]}


@exercise(
    "stage3_attention.py",
    "KVCache",
    ATTENTION,
    2,
    "Write a KV cache. How large is it, and what does it save?",
    "手写 KV 缓存。它多大？省了什么计算？",
    (
        "Keys and values of past tokens do not change: allocate them once, write each new one "
        "behind the last. (一次分配，逐个写入)",
        "2 · B · G · capacity · d numbers; append returns views of the first `length` tokens",
        "self.k = torch.zeros(batch, n_kv_heads, capacity, d_head, dtype=dtype, device=device)",
    ),
    names="k and v are (B, G, t, d); length and nbytes are attributes or properties",
    methods=("__init__", "nbytes", "append", "reset"),
)
def kv_cache_cases():
    for what, pieces, capacity in (
        ("one token at a time", (1, 1, 1), 3),
        ("four tokens, then one, with room left", (4, 1), 9),
    ):
        B, G, d = 2, 3, 4
        tokens = []
        for i, t in enumerate(pieces):
            tokens.append((draw(B, G, t, d, seed=60 + i), draw(B, G, t, d, seed=70 + i)))
        expected = {"length at first": 0, "nbytes": 2 * B * G * capacity * d * 8}
        for i in range(1, len(pieces) + 1):
            expected[f"keys after append {i}"] = torch.cat([k for k, _ in tokens[:i]], 2)
            expected[f"values after append {i}"] = torch.cat([v for _, v in tokens[:i]], 2)
            expected[f"length after append {i}"] = sum(pieces[:i])
        expected["length after reset"] = 0
        expected["keys of an append after reset"] = tokens[0][0]
        inputs = {"sizes": (B, G, d), "capacity": capacity, "tokens": tokens}
        yield Case(what, inputs, expected, appended)


# ---- Transformer ----------------------------------------------------------------------------


@exercise(
    "interview/transformer.py",
    "padding_mask",
    TRANSFORMER,
    1,
    "The mask that hides the padding of a batch, for scores (B, H, T, S).",
    "手写填充掩码，能广播到 (B, H, T, S) 的分数上。",
    (
        "A place is a token's if it is below the length. (位置小于长度)",
        "mask[b, 0, 0, s] = s < lengths[b]",
        "places = torch.arange(S, device=lengths.device)",
    ),
)
def padding_mask_cases():
    for lengths, S in (([2, 0, 3], 3), ([1], 4), ([5, 5], 5)):
        expected = torch.zeros(len(lengths), 1, 1, S, dtype=torch.bool)
        for b, length in enumerate(lengths):
            expected[b, 0, 0, :length] = True
        inputs = {"lengths": torch.tensor(lengths), "S": S}
        yield Case(f"lengths {lengths} of {S}", inputs, expected)


@exercise(
    "interview/transformer.py",
    "teacher_forced",
    TRANSFORMER,
    1,
    "Teacher forcing: the decoder's inputs and targets from the right tokens.",
    "教师强制：由目标序列得到解码器的输入和预测目标。",
    (
        "The same tokens twice: once behind a begin, once before an end. (错开一位)",
        "inputs = begin, x_1 … x_N; targets = x_1 … x_N, end",
        "inputs = F.pad(numbers, (1, 0), value=10)",
    ),
    names="10 is the begin and 11 the end; behind a shorter number stand ends already",
)
def teacher_forced_cases():
    def row_by_row(numbers: list[list[int]]) -> dict:
        inputs = torch.tensor([[10, *row] for row in numbers])
        return {"inputs": inputs, "targets": torch.tensor([[*row, 11] for row in numbers])}

    def use(solution, numbers) -> dict:
        return numbers_of(solution(numbers), ("inputs", "targets"))

    for what, numbers in (
        ("one number", [[4, 0, 7]]),
        ("two of different lengths", [[4, 0, 7], [9, 11, 11]]),
    ):
        inputs = {"numbers": torch.tensor(numbers)}
        yield Case(what, inputs, row_by_row(numbers), use)


class TorchTransformerLayer(nn.Module):
    """The second route: torch's encoder or decoder layer, its parameters under our names."""

    def __init__(self, d_model, n_heads, d_ff, norm_first, kind, attentions):
        super().__init__()
        self.options = {"dropout": 0.0, "batch_first": True, "norm_first": norm_first}
        self.sizes = (d_model, n_heads, d_ff)
        self.kind = kind
        self.attentions = attentions  # our name -> torch's
        for name in attentions:
            self.add_module(name, TorchAttention(d_model, n_heads, n_heads))
        W_1, W_2 = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)
        self.feed_forward = nn.ModuleDict({"W_1": W_1, "W_2": W_2})
        for i in range(len(attentions) + 1):
            self.add_module(f"norm_{i + 1}", nn.LayerNorm(d_model))

    def in_torchs_names(self) -> dict[str, Tensor]:
        found = {}
        for name, theirs in self.attentions.items():
            own = self.get_submodule(name)
            inputs = (own.W_q, own.W_k, own.W_v)
            found[f"{theirs}.in_proj_weight"] = torch.cat([layer.weight for layer in inputs])
            found[f"{theirs}.in_proj_bias"] = torch.cat([layer.bias for layer in inputs])
            found[f"{theirs}.out_proj.weight"] = own.W_o.weight
            found[f"{theirs}.out_proj.bias"] = own.W_o.bias
        for name, parameter in self.named_parameters():
            for ours, theirs in (("feed_forward.W_", "linear"), ("norm_", "norm")):
                if name.startswith(ours):
                    found[name.replace(ours, theirs)] = parameter
        return found

    def called(self, *inputs, **options):
        """What torch's layer makes of the inputs, and the weights of its cross-attention."""
        layer = self.kind(*self.sizes, **self.options).double()
        weights = []

        def keep(module, arguments, named):
            named = named | {"need_weights": True, "average_attn_weights": False}
            weights.append(module.forward(*arguments, **named)[1])

        if hasattr(layer, "multihead_attn"):
            layer.multihead_attn.register_forward_pre_hook(keep, with_kwargs=True)
        return functional_call(layer, self.in_torchs_names(), inputs, options), *weights


class TorchEncoderLayer(TorchTransformerLayer):
    def __init__(self, *sizes):
        super().__init__(*sizes, nn.TransformerEncoderLayer, {"attention": "self_attn"})

    def forward(self, x, mask=None):
        hidden = None if mask is None else ~mask[:, 0, 0]
        out, *_ = self.called(x, src_key_padding_mask=hidden)
        return out


class TorchDecoderLayer(TorchTransformerLayer):
    def __init__(self, *sizes):
        names = {"self_attention": "self_attn", "cross_attention": "multihead_attn"}
        super().__init__(*sizes, nn.TransformerDecoderLayer, names)

    def forward(self, x, memory, memory_mask=None):
        T = x.shape[1]
        causal = torch.ones(T, T, dtype=torch.bool).triu(1)
        hidden = None if memory_mask is None else ~memory_mask[:, 0, 0]
        return self.called(x, memory, tgt_mask=causal, memory_key_padding_mask=hidden)


def parameters_of(layer: nn.Module) -> dict[str, Tensor]:
    """Random values for all parameters of a layer."""
    named = layer.named_parameters()
    return {name: draw(*p.shape, seed=200 + i) for i, (name, p) in enumerate(named)}


def decode_with_gradients(solution, sizes, parameters, x, memory, **options) -> dict:
    """Output, weights, and the gradients of the output in x, memory and the parameters."""
    layer = built(solution(*sizes), parameters)
    leaves = {"x": x.clone().requires_grad_(), "memory": memory.clone().requires_grad_()}
    found = layer(leaves["x"], leaves["memory"], **options)
    parts = numbers_of(found, ("out", "weights"))
    return parts | gradients_of(parts["out"], leaves | dict(layer.named_parameters()))


ORDERS = (("pre-norm", True), ("post-norm", False))
LAYER_NAMES = (
    "FeedForward(d_model, d_ff) of interview.transformer as `feed_forward`; `norm_1`, `norm_2` … "
    "in the order of use; the cases keep position 'none' and dropout 0"
)


@exercise(
    "interview/transformer.py",
    "EncoderLayer",
    TRANSFORMER,
    2,
    "Write a transformer's encoder layer. What does each part do?",
    "手写 Transformer 编码器层。每个部分起什么作用？",
    (
        "Attention and feed-forward network, around each a residual and a norm. (残差与归一化)",
        "pre-norm x + f(norm(x)); post-norm norm(x + f(x)); f is attention, then W₂ relu(W₁ x)",
        "x = x + self.attention(self.norm_1(x), mask=mask)[0]  # pre-norm",
    ),
    names="MultiHeadAttention(d_model, n_heads) of stage3_attention as `attention`; " + LAYER_NAMES,
)
def encoder_layer_cases():
    mask = torch.tensor([[True] * 5, [True, True, False, False, False], [True] * 4 + [False]])
    for what, norm_first in ORDERS:
        sizes = (6, 3, 8, norm_first)
        inputs = {"sizes": sizes, "parameters": parameters_of(TorchEncoderLayer(*sizes))}
        inputs["x"] = draw(3, 5, 6, seed=80)
        use = module_with_gradients
        yield against(what, TorchEncoderLayer, use, **inputs)
        padded = inputs | {"mask": mask[:, None, None]}
        yield against(f"{what}, with padding", TorchEncoderLayer, use, **padded)


@exercise(
    "interview/transformer.py",
    "DecoderLayer",
    TRANSFORMER,
    3,
    "Write a transformer's decoder layer. Which masks does it need?",
    "手写 Transformer 解码器层。需要哪些掩码？",
    (
        "Attend to the past, then to the memory; then each token alone. (先自注意力，再交叉)",
        "pre-norm: x + self(norm_1 x), causal; x + cross(norm_2 x, memory); x + ff(norm_3 x)",
        "x = x + self.self_attention(self.norm_1(x), mask=mask, causal=True)[0]  # pre-norm",
    ),
    names="MultiHeadAttention(d_model, n_heads) of stage3_attention, called (x, context, mask=…, "
    "causal=…) -> (out, weights), as `self_attention` and `cross_attention`; "
    + LAYER_NAMES
    + "; caches are not asked for",
)
def decoder_layer_cases():
    mask = torch.tensor([[True] * 7, [True, True] + [False] * 5])
    for what, norm_first in ORDERS:
        sizes = (6, 3, 8, norm_first)
        inputs = {"sizes": sizes, "parameters": parameters_of(TorchDecoderLayer(*sizes))}
        inputs |= {"x": draw(2, 4, 6, seed=81), "memory": draw(2, 7, 6, seed=82)}
        use = decode_with_gradients
        yield against(what, TorchDecoderLayer, use, **inputs)
        padded = inputs | {"memory_mask": mask[:, None, None]}
        yield against(f"{what}, the memory padded", TorchDecoderLayer, use, **padded)


# ---- Decoding -------------------------------------------------------------------------------


def table_step(V: int, seed: int = 0):
    """A step(tokens (B, T)) -> logits (B, V) that knows the last two tokens, at random."""
    table = draw(V, V, V, seed=seed, scale=2)

    def step(tokens: Tensor) -> Tensor:
        before = tokens[:, -2] if tokens.shape[1] > 1 else torch.zeros_like(tokens[:, -1])
        return table[before, tokens[:, -1]]

    return step


def scored_continuations(step, start: Tensor, n: int, eos=None, length_penalty=0.0):
    """Every continuation of start (1, T) by n tokens with its score, best first: brute force.

    After eos only eos follows; length counts up to the first eos.
    """
    V = step(start).shape[1]
    found = []
    for tokens in itertools.product(range(V), repeat=n):
        sequence = start
        score = 0.0
        length = 0
        for token in tokens:
            is_over = eos is not None and sequence[0, -1].item() == eos
            if is_over and token != eos:
                break
            if not is_over:
                score += F.log_softmax(step(sequence).double(), 1)[0, token].item()
                length += 1
            sequence = torch.cat([sequence, torch.tensor([[token]])], 1)
        else:
            found.append((score / max(length, 1) ** length_penalty, score, sequence[0]))
    found.sort(key=lambda entry: -entry[0])
    sequences = torch.stack([sequence for _, _, sequence in found])
    return sequences, torch.tensor([score for _, score, _ in found], dtype=torch.float64)


@exercise(
    "interview/decoding.py",
    "temperature",
    DECODING,
    1,
    "Write temperature. What do `0.5` and `2` do to a distribution?",
    "手写温度缩放（作用于 logits）。`0.5` 和 `2` 分别怎样改变分布？",
    (
        "Stretch or shrink all differences between the logits. (拉大或缩小 logits 之差)",
        "p_i ∝ exp(z_i / t): below 1 the likely ones gain, above 1 the others",
        "return logits / t",
    ),
)
def temperature_cases():
    logits = draw(3, 5, seed=1)
    for t in (0.5, 1.0, 3.0):
        yield Case(f"t = {t}", {"logits": logits, "t": t}, logits.div(t))


@exercise(
    "interview/decoding.py",
    "top_k",
    DECODING,
    1,
    "Write top-k: only the k likeliest tokens may be drawn.",
    "手写 top-k：只保留概率最大的 k 个词元。",
    (
        "What may not be drawn gets −∞, which softmax makes 0. (置为 −∞)",
        "keep exactly k of each row; of equal logits the first; all if k ≥ V",
        "order = logits.argsort(dim=-1, descending=True, stable=True)",
    ),
)
def top_k_cases():
    def kept(logits: Tensor, k: int) -> Tensor:
        rows = []
        for row in logits.tolist():
            order = sorted(range(len(row)), key=lambda i: -row[i])[:k]  # stable
            rows.append([z if i in order else -math.inf for i, z in enumerate(row)])
        return torch.tensor(rows, dtype=logits.dtype)

    logits = draw(3, 5, seed=1)
    ties = torch.tensor([[1.0, 2.0, 1.0, 1.0], [0.0, 0.0, 0.0, -math.inf]], dtype=torch.float64)
    yield Case("k = 2", {"logits": logits, "k": 2}, kept(logits, 2))
    yield Case("k = 1", {"logits": logits, "k": 1}, kept(logits, 1))
    yield Case("k above V", {"logits": logits, "k": 9}, logits.clone())
    yield Case("equal logits", {"logits": ties, "k": 2}, kept(ties, 2))


@exercise(
    "interview/decoding.py",
    "top_p",
    DECODING,
    2,
    "Write top-p (nucleus): only the smallest set that reaches probability p may be drawn.",
    "手写 top-p（核采样）：只保留累计概率达到 p 的最小集合。",
    (
        "Sort, add up, and stop with the token that crosses p: it belongs to the set. "
        "(越过 p 的那个词元要保留)",
        "a token stays if the sum of all likelier ones is below p",
        "order = logits.argsort(dim=-1, descending=True, stable=True)",
    ),
)
def top_p_cases():
    def kept(logits: Tensor, p: float) -> Tensor:
        result = torch.full_like(logits, -math.inf)
        for row, out in zip(logits, result, strict=True):
            probabilities = F.softmax(row, 0).tolist()
            total = 0.0
            for i in sorted(range(len(row)), key=lambda i: -probabilities[i]):
                if total >= p:
                    break
                out[i] = row[i]
                total += probabilities[i]
        return result

    logits = draw(4, 6, seed=1, scale=2)
    sure = torch.tensor([[0.0, 5.0, 1.0]], dtype=torch.float64)
    for p in (0.3, 0.75):
        yield Case(f"p = {p}", {"logits": logits, "p": p}, kept(logits, p))
    yield Case("p = 1 keeps all", {"logits": logits, "p": 1.0}, logits.clone())
    yield Case("never empty", {"logits": sure, "p": 0.5}, kept(sure, 0.5))


def frequencies(solution, logits, **options) -> Tensor:
    """How often each token comes in 20,000 draws from one row (V,)."""
    torch.manual_seed(0)
    drawn = solution(logits.expand(20_000, -1), **options)
    if not isinstance(drawn, Tensor) or drawn.shape != (20_000,):
        raise Mismatch("a tensor (B,) must come back")
    return torch.bincount(drawn, minlength=len(logits)).double() / 20_000


@exercise(
    "interview/decoding.py",
    "sample",
    DECODING,
    2,
    "Draw a token from logits, with temperature, top-k and top-p.",
    "由 logits 采样一个词元，支持温度、top-k、top-p。",
    (
        "Filter the logits, then softmax, then draw: the filters before, never after. "
        "(先过滤，再 softmax)",
        "temperature, top-k, top-p in this order; argmax(p / E) with E ~ Exp(1) draws from p",
        "logits = logits / temperature",
    ),
)
def sample_cases():
    logits = torch.tensor([0.3, -0.5, 1.2, 0.9, -2.0], dtype=torch.float64)
    likely = torch.tensor([0, 0, 1, 1, 0], dtype=torch.bool)
    use = frequencies
    near = {"tolerance": 0.02}  # of 20,000 draws a share is within 0.014, but once in 10,000
    for what, options, expected in (
        ("as the model says", {}, F.softmax(logits, 0)),
        ("temperature 0.5", {"temperature": 0.5}, F.softmax(logits / 0.5, 0)),
        ("top-k, k = 2", {"top_k": 2}, F.softmax(logits.masked_fill(~likely, -math.inf), 0)),
        ("top-p, p = 0.6", {"top_p": 0.6}, F.softmax(logits.masked_fill(~likely, -math.inf), 0)),
    ):
        yield Case(what, {"logits": logits} | options, expected, use, **near)


@exercise(
    "interview/decoding.py",
    "greedy",
    DECODING,
    1,
    "Write greedy decoding of a batch, with an end token. When is it good enough?",
    "手写批量贪心解码，支持结束符。什么时候够用？",
    (
        "Take the likeliest, append it, ask again; what has ended gets only eos. (结束后只补 eos)",
        "next = argmax step(tokens), or eos where the last token is eos",
        "following = step(tokens).argmax(-1)",
    ),
)
def greedy_cases():
    def one_by_one(step, start, n, eos=None) -> Tensor:
        rows = []
        for row in start:
            row = row.tolist()
            for _ in range(n):
                is_over = eos is not None and row[-1] == eos
                logits = step(torch.tensor([row]))[0].tolist()
                row.append(eos if is_over else logits.index(max(logits)))
            rows.append(row)
        return torch.tensor(rows)

    start = torch.tensor([[0, 1], [2, 3], [4, 4]])
    for what, n, eos in (("no end token", 7, None), ("token 1 ends", 7, 1), ("no step", 0, None)):
        inputs = {"step": table_step(5), "start": start, "n": n, "eos": eos}
        yield Case(what, inputs, one_by_one(**inputs))


def beam_found(solution, **inputs) -> dict:
    return numbers_of(solution(**inputs), ("sequences", "scores"))


@exercise(
    "interview/decoding.py",
    "beam_search",
    DECODING,
    3,
    "Write beam search. What is the length penalty for?",
    "手写束搜索。长度惩罚有什么用？",
    (
        "Keep the best beginnings, extend each by every token, keep the best again. "
        "(每步保留最好的 width 个)",
        "score = Σ log p; rank by score / length^α; a hypothesis that ended adds eos for nothing",
        "candidates = scores[:, None] + F.log_softmax(step(sequences).double(), 1)  # (W, V)",
    ),
)
def beam_search_cases():
    start = torch.tensor([[2, 1]])
    for what, options in (
        ("full width finds the best of all", {}),
        ("full width, token 0 ends", {"eos": 0}),
        ("full width, token 0 ends, length penalty 1", {"eos": 0, "length_penalty": 1.0}),
    ):
        inputs = {"step": table_step(4, seed=3), "start": start, "n": 3} | options
        sequences, scores = scored_continuations(**inputs)
        expected = {"sequences": sequences, "scores": scores}
        yield Case(what, inputs | {"width": 64}, expected, beam_found)
    step = table_step(5, seed=4)
    sequence = start
    total = 0.0
    for _ in range(6):
        log_p = F.log_softmax(step(sequence), 1)[0]
        total += log_p.max().item()
        sequence = torch.cat([sequence, log_p.argmax().view(1, 1)], 1)
    expected = {"sequences": sequence, "scores": torch.tensor([total], dtype=torch.float64)}
    inputs = {"step": step, "start": start, "n": 6, "width": 1}
    yield Case("width 1 is greedy", inputs, expected, beam_found)


@exercise(
    "interview/gpt.py",
    "tokens_of",
    DECODING,
    1,
    "Cut binary images into patches of 2 × 2, each a token of 0 … 15.",
    "把二值图像切成 2 × 2 的小块，每块是 0 … 15 的一个词元。",
    (
        "Split both axes into (patch, pixel in it); a patch's pixels are the digits of a binary "
        "number. (二进制)",
        "a patch [a b / c d] is 8a + 4b + 2c + d; patches row by row",
        "rows = pixels.long().view(-1, 14, 2, 14, 2)",
    ),
)
def tokens_of_cases():
    def patch_by_patch(pixels: Tensor) -> Tensor:
        images = pixels.view(-1, 28, 28).int().tolist()
        found = []
        for image in images:
            for y, x in itertools.product(range(0, 28, 2), repeat=2):
                bits = [*image[y][x : x + 2], *image[y + 1][x : x + 2]]
                found.append(int("".join(map(str, bits)), 2))
        return torch.tensor(found).view(len(images), 196)

    pixels = (draw(3, 784, seed=5) > 0.3).double()
    yield Case("three images", {"pixels": pixels}, patch_by_patch(pixels))
    yield Case("of bool", {"pixels": pixels[:2].bool()}, patch_by_patch(pixels[:2]))


@exercise(
    "interview/gpt.py",
    "next_patch_loss",
    DECODING,
    2,
    "The loss of a causal language model: what is read, and what is the target?",
    "因果语言模型的损失：输入是什么，目标是什么？",
    (
        "Read the start and all tokens but the last; the targets are all tokens. (错开一位)",
        "mean over B and t of −log p(x_t | class, x_1 … x_{t−1}); class c is token 16 + c",
        "read = torch.cat([16 + labels[:, None], tokens[:, :-1]], 1)",
    ),
)
def next_patch_loss_cases():
    table = draw(26, 26, 16, seed=6).float()  # of the first token and of the last one read

    def model(read: Tensor) -> Tensor:
        return table[read[:, :1], read]

    for B, T in ((1, 1), (2, 5), (3, 4)):
        tokens = labels(B * T, 16, seed=7).view(B, T)
        classes = labels(B, 10, seed=8)
        total = 0.0
        for row, c in zip(tokens.tolist(), classes.tolist(), strict=True):
            last = 16 + c
            for token in row:
                total -= F.log_softmax(table[16 + c, last], 0)[token].item()
                last = token
        inputs = {"model": model, "tokens": tokens, "labels": classes}
        yield Case(f"{B} sequences of {T}", inputs, total / (B * T), scalar, 1e-5)


def scalar(solution, **inputs) -> float:
    return float(solution(**inputs))


# ---- Optimizers -----------------------------------------------------------------------------


def updates(solution, options, start, gradients) -> dict:
    """The parameters after every step; the second has no gradient in the first step."""
    params = [values.clone().requires_grad_() for values in start]
    optimizer = solution(params, **options)
    found = {}
    for step, slopes in enumerate(gradients, start=1):
        for parameter, slope in zip(params, slopes, strict=True):
            parameter.grad = None if slope is None else slope.clone()
        optimizer.step()
        for i, parameter in enumerate(params):
            found[f"parameter {i} after step {step}"] = parameter.detach().clone()
    return found


def optimizer_cases(theirs, *all_options: dict) -> Iterator[Case]:
    """Four steps beside torch.optim's, with each of these options."""
    start = [draw(2, 3, seed=81), draw(4, seed=82)]
    gradients = []
    for step in range(4):
        gradients.append([draw(2, 3, seed=83 + step), draw(4, seed=90 + step, scale=0.1)])
    gradients[0][1] = None
    for options in all_options:
        what = ", ".join(f"{name} {value}" for name, value in options.items())
        inputs = {"options": options, "start": start, "gradients": gradients}
        yield against(what, theirs, updates, tolerance=1e-12, **inputs)


OPTIMIZER_METHODS = ("__init__", "update")
OPTIMIZER_NAMES = (
    "Optimizer keeps params and one dict of state for each, whose values start at 0, and calls "
    "`update(w, g, state)` for each that has a gradient; w is changed in place"
)


@exercise(
    "interview/optimizers.py",
    "SGD",
    OPTIMIZERS,
    1,
    "Write SGD with momentum and weight decay.",
    "手写带动量和权重衰减的 SGD。",
    (
        "Step by a sum of past gradients that fades. (历史梯度的衰减和)",
        "g = g + λ w; v = μ v + g; w = w − lr v",
        "g = g + self.weight_decay * w",
    ),
    names=OPTIMIZER_NAMES,
    methods=OPTIMIZER_METHODS,
)
def sgd_cases():
    every = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.3}
    yield from optimizer_cases(torch.optim.SGD, {"lr": 0.1}, {"lr": 0.1, "momentum": 0.9}, every)


@exercise(
    "interview/optimizers.py",
    "Adagrad",
    OPTIMIZERS,
    1,
    "Write Adagrad. What is wrong with its rate?",
    "手写 Adagrad。它的学习率有什么问题？",
    (
        "Divide by the root of the sum of all squared gradients so far. (累积平方)",
        "s = s + g²; w = w − lr g / (√s + ε)",
        'state["s"] = state["s"] + g.square()',
    ),
    names=OPTIMIZER_NAMES,
    methods=OPTIMIZER_METHODS,
)
def adagrad_cases():
    yield from optimizer_cases(
        torch.optim.Adagrad, {"lr": 0.1}, {"lr": 0.2, "weight_decay": 0.3, "eps": 0.1}
    )


@exercise(
    "interview/optimizers.py",
    "RMSprop",
    OPTIMIZERS,
    1,
    "Write RMSprop. How does it mend Adagrad?",
    "手写 RMSprop。它怎样改进 Adagrad？",
    (
        "Average the squared gradients in place of summing them. (滑动平均代替累加)",
        "s = α s + (1 − α) g²; w = w − lr g / (√s + ε)",
        'state["s"] = self.alpha * state["s"] + (1 - self.alpha) * g.square()',
    ),
    names=OPTIMIZER_NAMES,
    methods=OPTIMIZER_METHODS,
)
def rmsprop_cases():
    other = {"lr": 0.1, "alpha": 0.7, "eps": 0.1, "weight_decay": 0.3}
    yield from optimizer_cases(torch.optim.RMSprop, {"lr": 0.1}, other)


@exercise(
    "interview/optimizers.py",
    "Adam",
    OPTIMIZERS,
    2,
    "Write Adam. Why the bias correction?",
    "手写 Adam。为什么要偏差修正？",
    (
        "Momentum's direction over RMSprop's length, both corrected for their start at 0. "
        "(动量 + RMSprop + 偏差修正)",
        "m = β₁ m + (1 − β₁) g; s = β₂ s + (1 − β₂) g²; "
        "w = w − lr · m / (1 − β₁ᵗ) / (√(s / (1 − β₂ᵗ)) + ε)",
        'state["t"] += 1  # it counts from 1',
    ),
    names=OPTIMIZER_NAMES,
    methods=OPTIMIZER_METHODS,
)
def adam_cases():
    other = {"lr": 0.1, "betas": (0.5, 0.8), "eps": 0.1, "weight_decay": 0.3}
    yield from optimizer_cases(torch.optim.Adam, {"lr": 0.1}, other)


@exercise(
    "interview/optimizers.py",
    "AdamW",
    OPTIMIZERS,
    2,
    "Write AdamW. How does it differ from Adam with L2?",
    "手写 AdamW。它和 Adam + L2 有什么区别？",
    (
        "The decay goes to the weight itself and never meets √ŝ. (解耦的权重衰减)",
        "w = (1 − lr λ) w, then Adam's step by g alone",
        "w *= 1 - self.lr * self.weight_decay",
    ),
    names=OPTIMIZER_NAMES,
    methods=OPTIMIZER_METHODS,
)
def adamw_cases():
    other = {"lr": 0.1, "betas": (0.5, 0.8), "eps": 0.1, "weight_decay": 0.3}
    yield from optimizer_cases(torch.optim.AdamW, {"lr": 0.1}, other)


# ---- Parallel training ----------------------------------------------------------------------


@exercise(
    "interview/parallel.py",
    "partition",
    PARALLEL,
    1,
    "Where does each rank's part of n numbers start and stop, if n is no multiple of the ranks?",
    "n 个参数分给多个进程，除不尽时每份从哪里到哪里？",
    (
        "Everyone gets the quotient, the first few one more. (前几份各多一个)",
        "n // p each; one more for the parts below n % p",
        "size, n_larger = divmod(n, n_parts)",
    ),
)
def partition_cases():
    for n, n_parts in ((7, 3), (12, 4), (2, 5), (0, 2)):
        places = np.cumsum([0, *(len(part) for part in np.array_split(np.arange(n), n_parts))])
        expected = [(int(start), int(stop)) for start, stop in itertools.pairwise(places)]
        yield Case(f"{n} in {n_parts} parts", {"n": n, "n_parts": n_parts}, expected)


def ring_of_list(solution, tensors) -> dict:
    """What each rank gets, and whether what it had is still there."""
    before = [x.clone() for x in tensors]
    found = list(solution(tensors))
    kept = all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    return {"result": found, "the tensors given are unchanged": kept}


@exercise(
    "interview/parallel.py",
    "ring_all_reduce",
    PARALLEL,
    3,
    "Simulate a ring all-reduce: each of p ranks has a tensor and gets the sum. How many bytes?",
    "模拟环形 all-reduce：p 个进程各有一个张量，都要得到总和。通信量是多少？",
    (
        "Cut into p chunks; pass sums on p − 1 times, then finished chunks p − 1 times. "
        "(先 reduce-scatter，再 all-gather)",
        "step t: rank r sends chunk r − t − 1 and adds what comes; then sends chunk r − t, and "
        "overwrites; 2 (p − 1)/p · N numbers in all",
        "chunks = [x.flatten().clone().tensor_split(n_ranks) for x in tensors]",
    ),
)
def ring_all_reduce_cases():
    for n_ranks, shape in ((2, (4,)), (3, (7,)), (4, (2, 3)), (1, (5,))):
        tensors = [draw(*shape, seed=rank) for rank in range(n_ranks)]
        total = torch.stack(tensors).sum(0)
        expected = {"result": [total] * n_ranks, "the tensors given are unchanged": True}
        yield Case(f"{n_ranks} ranks, {shape}", {"tensors": tensors}, expected, ring_of_list)


@exercise(
    "interview/parallel.py",
    "buckets",
    PARALLEL,
    1,
    "Put gradients into buckets of a limited size, the last layer first. Why buckets?",
    "把梯度按大小上限分桶，最后一层在前。为什么要分桶？",
    (
        "Walk backwards; open a new bucket when the tensor does not fit. (从后往前，装不下就换桶)",
        "new bucket if there is none or filled + size > limit",
        "for index in reversed(range(len(sizes))):",
    ),
)
def buckets_cases():
    for what, sizes, limit, expected in (
        ("two fit", [3, 4, 2, 5], 7, [[3, 2], [1, 0]]),
        ("one is above the limit", [1, 9, 1, 1], 3, [[3, 2], [1], [0]]),
        ("each alone", [2, 2, 2], 3, [[2], [1], [0]]),
        ("all in one", [1, 2, 3], 6, [[2, 1, 0]]),
    ):
        yield Case(what, {"sizes": sizes, "limit": limit}, expected)


def side_by_side(solution, weight, bias, n_ranks, unit) -> dict:
    """Outputs of the ranks' layers, joined; and how many each rank has."""
    x = draw(3, weight.shape[1], seed=5)
    outputs = [F.linear(x, *part) for part in solution(weight, bias, n_ranks, unit)]
    return {"outputs": torch.cat(outputs, 1), "of each rank": [y.shape[1] for y in outputs]}


def added_up(solution, weight, n_ranks, unit) -> dict:
    """The sum of what the ranks' layers make of their inputs; and how many inputs each has."""
    x = draw(3, weight.shape[1], seed=5)
    parts = list(solution(weight, n_ranks, unit))
    sizes = [part.shape[1] for part in parts]
    summands = [F.linear(own, part) for own, part in zip(x.split(sizes, 1), parts, strict=True)]
    return {"sum": sum(summands), "of each rank": sizes}


SPLITS = (  # features, ranks, unit, features of each rank
    (6, 2, 1, [3, 3]),
    (7, 3, 1, [3, 2, 2]),
    (12, 2, 4, [8, 4]),
)


@exercise(
    "interview/parallel.py",
    "column_split",
    PARALLEL,
    2,
    "Split a linear layer's outputs over ranks. Which axis of nn.Linear's weight is that?",
    "张量并行：按列切分线性层（切输出）。对应 nn.Linear 的 weight 的哪一维？",
    (
        "Each rank computes some outputs from all inputs; heads stay together. (每卡算一部分输出)",
        "y = x Wᵀ + b: output o needs row o of weight (O, I) and b[o]",
        "bounds = partition(len(weight) // unit, n_ranks)",
    ),
)
def column_split_cases():
    for n, n_ranks, unit, sizes in SPLITS:
        weight, bias = draw(n, 5, seed=1), draw(n, seed=2)
        expected = {"outputs": draw(3, 5, seed=5) @ weight.T + bias, "of each rank": sizes}
        inputs = {"weight": weight, "bias": bias, "n_ranks": n_ranks, "unit": unit}
        yield Case(f"{n} outputs, {n_ranks} ranks, {unit=}", inputs, expected, side_by_side)


@exercise(
    "interview/parallel.py",
    "row_split",
    PARALLEL,
    2,
    "Split a linear layer's inputs over ranks. What must follow, and where is the bias added?",
    "张量并行：按行切分线性层（切输入）。之后要做什么通信？偏置在哪里加？",
    (
        "Each rank has some inputs: its product is a summand, so an all-reduce follows, and then "
        "the bias, once. (先求和，再加一次偏置)",
        "x Wᵀ = Σ_r x[:, r] W[:, r]ᵀ",
        "bounds = partition(weight.shape[1] // unit, n_ranks)",
    ),
)
def row_split_cases():
    for n, n_ranks, unit, sizes in SPLITS:
        weight = draw(4, n, seed=1)
        expected = {"sum": draw(3, n, seed=5) @ weight.T, "of each rank": sizes}
        inputs = {"weight": weight, "n_ranks": n_ranks, "unit": unit}
        yield Case(f"{n} inputs, {n_ranks} ranks, {unit=}", inputs, expected, added_up)


@exercise(
    "interview/parallel.py",
    "gpipe",
    PARALLEL,
    1,
    "In which order does a stage of GPipe do the forwards and backwards of its micro-batches?",
    "GPipe 的一个 stage 按什么顺序做各个 micro-batch 的前向和反向？",
    (
        "All forwards, then all backwards, the last forward first. (先全部前向，再反序反向)",
        "F0 … F(m − 1), B(m − 1) … B0",
        'forwards = [("F", micro) for micro in range(n_micro)]',
    ),
)
def gpipe_cases():
    yield Case("one", {"n_micro": 1}, [("F", 0), ("B", 0)])
    three = [("F", 0), ("F", 1), ("F", 2), ("B", 2), ("B", 1), ("B", 0)]
    yield Case("three", {"n_micro": 3}, three)


@exercise(
    "interview/parallel.py",
    "one_forward_one_backward",
    PARALLEL,
    2,
    "The order of a stage's work in a 1F1B pipeline. What does it save against GPipe?",
    "1F1B 流水线中一个 stage 的执行顺序。和 GPipe 相比省了什么？",
    (
        "Some forwards to fill the pipe, then one of each in turn. (先热身，再一前一后)",
        "p − 1 − stage forwards first (at most m), F and B in turn, then the backwards left",
        "n_first = min(n_stages - 1 - stage, n_micro)",
    ),
)
def one_forward_one_backward_cases():
    for stage, n_stages, n_micro, words in (
        (0, 3, 4, "F0 F1 F2 B0 F3 B1 B2 B3"),
        (1, 3, 4, "F0 F1 B0 F2 B1 F3 B2 B3"),
        (2, 3, 4, "F0 B0 F1 B1 F2 B2 F3 B3"),
        (0, 4, 2, "F0 F1 B0 B1"),
    ):
        inputs = {"stage": stage, "n_stages": n_stages, "n_micro": n_micro}
        expected = [(word[0], int(word[1:])) for word in words.split()]
        yield Case(f"stage {stage} of {n_stages}, {n_micro} micro-batches", inputs, expected)


@exercise(
    "interview/parallel.py",
    "bubble",
    PARALLEL,
    1,
    "Which share of the time does a stage of a pipeline wait?",
    "流水线并行的气泡占多少时间？",
    (
        "Stage s starts s clocks late and ends as early; its work takes m. (填充和排空)",
        "(p − 1) / (m + p − 1)",
        "clocks = n_micro + n_stages - 1",
    ),
)
def bubble_cases():
    for n_stages, n_micro in ((4, 8), (3, 1), (1, 5)):
        ends = np.zeros((n_stages + 1, n_micro + 1))  # of the forwards, by their two conditions
        for stage, micro in itertools.product(range(n_stages), range(n_micro)):
            ends[stage, micro] = 1 + max(ends[stage - 1, micro], ends[stage, micro - 1])
        clocks = ends.max()
        inputs = {"n_stages": n_stages, "n_micro": n_micro}
        what = f"{n_stages} stages, {n_micro} micro-batches"
        yield Case(what, inputs, float((clocks - n_micro) / clocks))


# ---- Diffusion and U-Net --------------------------------------------------------------------

ALPHA_BARS = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.1, 0.02], dtype=torch.float64)


def noised_one_by_one(x_0, t, noise, alpha_bars):
    images = []
    for image, time, of_image in zip(x_0, t.tolist(), noise, strict=True):
        left = alpha_bars[time]
        images.append(left**0.5 * image + (1 - left) ** 0.5 * of_image)
    return torch.stack(images)


@exercise(
    "interview/diffusion.py",
    "add_noise",
    DIFFUSION,
    1,
    "Draw x_t of a diffusion model in one step. Why is that possible?",
    "手写扩散模型的前向加噪：由 x_0 直接得到 x_t。为什么可以一步完成？",
    (
        "Sums of normal numbers are normal: all steps are one. (正态之和仍是正态)",
        "x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε, every image with its own t",
        "alpha_bar = alpha_bars[t].view(-1, *[1] * (x_0.ndim - 1))",
    ),
)
def add_noise_cases():
    for what, shape, times in (
        ("numbers", (3,), [1, 5, 3]),
        ("images, each with its own time", (2, 1, 3, 4), [4, 2]),
        ("time 0: nothing is added", (2, 3), [0, 5]),
    ):
        inputs = {"x_0": draw(*shape), "t": torch.tensor(times), "noise": draw(*shape, seed=1)}
        inputs["alpha_bars"] = ALPHA_BARS
        yield against(what, noised_one_by_one, **inputs)


def loss_and_gradient(solution, factor, **inputs) -> dict:
    """The loss of the predictor x_t · factor · t, and its gradient in the factor."""
    factor = factor.clone().requires_grad_()

    def predict(x_t, t):
        return x_t * factor * t.view(-1, *[1] * (x_t.ndim - 1))

    loss = solution(predict, **inputs)
    return {"loss": loss} | gradients_of(loss, {"what it predicts": factor})


@exercise(
    "interview/diffusion.py",
    "noise_loss",
    DIFFUSION,
    2,
    "What does the network of DDPM predict, and what is its loss?",
    "DDPM 的网络预测什么？损失是什么？",
    (
        "Hide the image under noise, and let the network say which noise. (预测噪声)",
        "x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε; L = mean of (ε − ε_θ(x_t, t))²",
        "x_t = add_noise(x_0, t, noise, alpha_bars)",
    ),
)
def noise_loss_cases():
    def oracle(predict, x_0, t, noise, alpha_bars):
        x_t = noised_one_by_one(x_0, t, noise, alpha_bars)
        return F.mse_loss(predict(x_t, t), noise)

    for shape, times in (((2, 3), [1, 4]), ((3, 1, 2, 4), [5, 2, 3])):
        inputs = {"x_0": draw(*shape), "t": torch.tensor(times), "noise": draw(*shape, seed=1)}
        inputs |= {"alpha_bars": ALPHA_BARS, "factor": draw(1, seed=2)}
        yield against(f"shape {shape}", oracle, loss_and_gradient, tolerance=1e-5, **inputs)


def before_by_bayes(x_t, x_0, left, left_before):
    """Mean and variance of x_s given x_t and x_0: precisions add, means are weighed by them."""
    alpha = left / left_before
    from_x_0 = 1 / (1 - left_before)
    from_x_t = alpha / (1 - alpha)
    weighed = from_x_0 * left_before**0.5 * x_0 + from_x_t * x_t / alpha**0.5
    return weighed / (from_x_0 + from_x_t), 1 / (from_x_0 + from_x_t)


def stepped(solution, z, **inputs):
    """The result and its gradients; the fresh noise goes by name."""
    if z is None:
        return with_gradients(solution, **inputs)
    return with_gradients(partial(solution, z=z), **inputs)


@exercise(
    "interview/diffusion.py",
    "ddim_step",
    DIFFUSION,
    2,
    "Write a step of DDIM. What do η = 0 and η = 1 mean?",
    "手写 DDIM 的一步采样。η = 0 和 η = 1 各表示什么？",
    (
        "The noise tells x_0; then add noise again, but less: the same, or in part fresh. "
        "(先估计 x_0，再加回较少的噪声)",
        "x_0 = (x_t − √(1 − ᾱ_t) ε) / √ᾱ_t; x_s = √ᾱ_s x_0 + √(1 − ᾱ_s − σ²) ε + σ z; "
        "σ² = η² (1 − ᾱ_s)/(1 − ᾱ_t) (1 − ᾱ_t/ᾱ_s)",
        "x_0 = (x_t - math.sqrt(1 - alpha_bar) * noise) / math.sqrt(alpha_bar)",
    ),
)
def ddim_step_cases():
    def straight(x_t, noise, alpha_bar, alpha_bar_next, **_):
        x_0 = (x_t - (1 - alpha_bar) ** 0.5 * noise) / alpha_bar**0.5
        t = torch.zeros(len(x_0), dtype=torch.long)
        left = torch.tensor([alpha_bar_next], dtype=torch.float64)
        return noised_one_by_one(x_0, t, noise, left)

    def with_fresh_noise(x_t, noise, alpha_bar, alpha_bar_next, eta, z):
        x_0 = (x_t - (1 - alpha_bar) ** 0.5 * noise) / alpha_bar**0.5
        mean, variance = before_by_bayes(x_t, x_0, alpha_bar, alpha_bar_next)
        return mean + variance**0.5 * z

    def clipped(x_t, noise, alpha_bar, alpha_bar_next, clip):
        x_0 = ((x_t - (1 - alpha_bar) ** 0.5 * noise) / alpha_bar**0.5).clamp(-1, 1)
        rest = x_t - alpha_bar**0.5 * x_0
        return alpha_bar_next**0.5 * x_0 + ((1 - alpha_bar_next) / (1 - alpha_bar)) ** 0.5 * rest

    images = {"x_t": draw(2, 1, 3, 4), "noise": draw(2, 1, 3, 4, seed=1)}
    near = {"alpha_bar": 0.4, "alpha_bar_next": 0.7}
    far = {"alpha_bar": 0.02, "alpha_bar_next": 0.9}
    last = {"alpha_bar": 0.9, "alpha_bar_next": 1.0}
    yield against("η = 0", straight, stepped, z=None, **images, **near)
    yield against("η = 0, many steps at once", straight, stepped, z=None, **images, **far)
    yield against("the last step gives x_0", straight, stepped, z=None, **images, **last)
    z = draw(2, 1, 3, 4, seed=2)
    yield against("η = 1 is DDPM", with_fresh_noise, stepped, z=z, **images, **near, eta=1.0)
    yield against("x_0 clipped to −1 … 1", clipped, stepped, z=None, **images, **near, clip=True)


@exercise(
    "interview/diffusion.py",
    "guidance",
    DIFFUSION,
    1,
    "Write classifier-free guidance. What does a large weight cost?",
    "手写无分类器引导。权重太大有什么代价？",
    (
        "Go further in the direction that the label points to. (沿条件方向外推)",
        "ε = ε_∅ + w (ε_c − ε_∅): w = 0 no label, w = 1 the conditional model",
        "difference = conditional - unconditional",
    ),
)
def guidance_cases():
    def oracle(conditional, unconditional, weight):
        return weight * conditional + (1 - weight) * unconditional

    for weight in (0.0, 1.0, 3.5):
        inputs = {"conditional": draw(2, 3), "unconditional": draw(2, 3, seed=1)}
        yield against(f"w = {weight:g}", oracle, with_gradients, **inputs, weight=weight)


@exercise(
    "interview/diffusion.py",
    "time_embedding",
    DIFFUSION,
    2,
    "Tell a network the time as sines and cosines.",
    "手写时间步的正弦编码。",
    (
        "Waves of many lengths, as the hands of a clock. (许多不同频率的正弦和余弦)",
        "angle_i = t / 10,000^(2i / d); sin and cos of each in turn, (B, d)",
        "exponents = torch.arange(0, d, 2) / d",
    ),
)
def time_embedding_cases():
    for d, times in ((2, [0, 1, 5]), (6, [3, 1000]), (8, [10, 20, 30, 40, 50])):
        rows = []
        for t in times:
            angles = [t / 10_000 ** (2 * i / d) for i in range(d // 2)]
            rows.append([wave(angle) for angle in angles for wave in (math.sin, math.cos)])
        inputs = {"t": torch.tensor(times), "d": d}
        yield Case(f"{d = }", inputs, torch.tensor(rows), tolerance=1e-3)


def mask_cases(score) -> Iterator[Case]:
    """Masks of several images, and where nothing is predicted or nothing is there."""
    for what, shape in (("one image", (1, 3, 4)), ("images", (4, 1, 5, 3))):
        predicted, target = draw(*shape) > 0, draw(*shape, seed=1) > 0.3
        pairs = zip(predicted.flatten(1), target.flatten(1), strict=True)
        expected = torch.tensor([score(true, found) for found, true in pairs])
        inputs = {"predicted": predicted, "target": target}
        yield Case(what, inputs, expected, tolerance=1e-6)
    ends = torch.tensor([[True] * 3, [False] * 3, [False] * 3])
    inputs = {"predicted": torch.zeros(3, 3, dtype=torch.bool), "target": ends}
    yield Case("nothing predicted; two empty masks agree", inputs, torch.tensor([0.0, 1.0, 1.0]))


@exercise(
    "interview/diffusion.py",
    "iou",
    DIFFUSION,
    1,
    "Intersection over union of masks, one number an image.",
    "手写分割的 IoU，每张图返回一个数。",
    (
        "Pixels in both, over pixels in at least one. (交集除以并集)",
        "IoU = |A ∩ B| / (|A| + |B| − |A ∩ B|); of two empty masks 1",
        "both = (predicted & target).flatten(1).sum(1)",
    ),
)
def iou_cases():
    from sklearn.metrics import jaccard_score

    yield from mask_cases(jaccard_score)


@exercise(
    "interview/diffusion.py",
    "dice",
    DIFFUSION,
    1,
    "The Dice score of masks. How does it follow from IoU?",
    "手写 Dice 系数。它与 IoU 是什么关系？",
    (
        "It is F1 of the pixels: 2 IoU / (1 + IoU). (像素的 F1)",
        "Dice = 2 |A ∩ B| / (|A| + |B|); of two empty masks 1",
        "both = (predicted & target).flatten(1).sum(1)",
    ),
)
def dice_cases():
    from sklearn.metrics import f1_score

    yield from mask_cases(f1_score)


@exercise(
    "interview/diffusion.py",
    "dice_loss",
    DIFFUSION,
    2,
    "Write a Dice loss from logits. Why is cross-entropy added to it?",
    "由 logits 手写 Dice 损失。为什么还要加上交叉熵？",
    (
        "Probabilities in place of masks make Dice smooth. (用概率代替掩码)",
        "1 − mean over images of (2 Σ p y + smooth) / (Σ p + Σ y + smooth)",
        "probabilities = logits.sigmoid().flatten(1)",
    ),
)
def dice_loss_cases():
    def oracle(logits, target, smooth=1.0):
        losses = []
        for scores, truth in zip(logits, target, strict=True):
            p = 1 / (1 + torch.exp(-scores))
            both = p[truth].sum()
            losses.append((p.sum() + truth.sum() - 2 * both) / (p.sum() + truth.sum() + smooth))
        return torch.stack(losses).mean()

    for what, shape, options in (
        ("one image", (1, 2, 3), {}),
        ("images", (3, 1, 2, 4), {}),
        ("smooth 0.5", (2, 5), {"smooth": 0.5}),
    ):
        inputs = {"logits": draw(*shape), "target": draw(*shape, seed=1) > 0}
        yield against(what, oracle, with_gradients, **inputs, **options)


@exercise(
    "interview/diffusion.py",
    "frechet_distance",
    DIFFUSION,
    2,
    "How good are generated images? Write the Fréchet distance of features (FID).",
    "怎样评价生成的图像？手写特征的 Fréchet 距离（FID）。",
    (
        "Take both sets of features as normal, and compare means and covariances. "
        "(比较两个正态分布)",
        "‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½); the trace of the root is the sum of the "
        "roots of the eigenvalues of Σ_a Σ_b",
        "cov_a, cov_b = a.mT.cov(), b.mT.cov()",
    ),
)
def frechet_distance_cases():
    from scipy import linalg

    for what, a, b in (
        ("the same features", draw(6, 2), draw(6, 2)),
        ("moved by 1", draw(7, 3), draw(7, 3) + 1),
        ("other covariances", draw(9, 3), 2 * draw(8, 3, seed=1) @ draw(3, 3, seed=2)),
    ):
        cov_a, cov_b = np.cov(a.numpy().T), np.cov(b.numpy().T)
        root = linalg.sqrtm(cov_a @ cov_b).real
        expected = (a.mean(0) - b.mean(0)).square().sum().item()
        expected += np.trace(cov_a + cov_b - 2 * root)
        yield Case(what, {"a": a, "b": b}, float(expected), tolerance=1e-6)


# ---- Classical machine learning -------------------------------------------------------------


def rows_and_targets(n: int, d: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """X (n, d) and y = a linear function of X plus noise."""
    X = draw(n, d, seed=100).numpy()
    w = np.arange(1, d + 1)
    y = X @ w - 1.5 + noise * draw(n, seed=101).numpy()
    return X, np.round(y, 2)


def weights_and_bias(solution, **inputs) -> dict:
    return numbers_of(solution(**inputs), ("w", "b"))


def descent_in_closed_form(X, y, lr, epochs) -> dict:
    """Where full-batch gradient descent on the mean square stands: θ* + (I − lr H)^t (θ_0 − θ*)."""
    with_ones = np.column_stack([X, np.ones(len(X))])
    minimum = np.linalg.lstsq(with_ones, y, rcond=None)[0]
    hessian = 2 * with_ones.T @ with_ones / len(X)
    shrinking = np.linalg.matrix_power(np.eye(len(hessian)) - lr * hessian, epochs)
    theta = minimum + shrinking @ (0 - minimum)
    return {"w": theta[:-1], "b": float(theta[-1])}


@exercise(
    "interview/classical.py",
    "linear_regression",
    CLASSICAL,
    2,
    "Linear regression by stochastic gradient descent, without a library.",
    "不用框架，手写线性回归的随机梯度下降。",
    (
        "A batch at a time, in a new random order each epoch, against the slope of the mean "
        "squared error. (逐个小批量更新)",
        "error = Xw + b − y of B rows; dw = 2/B · Xᵀ error; db = 2/B · Σ error; all start at 0",
        "order = np.random.default_rng(seed).permutation(len(X))  # anew in each epoch",
    ),
)
def linear_regression_cases():
    X, y = rows_and_targets(7, 3, noise=1)
    for epochs in (1, 25):
        inputs = {"X": X, "y": y, "lr": 0.05, "epochs": epochs, "batch_size": 7}
        expected = descent_in_closed_form(X, y, 0.05, epochs)
        yield Case(f"full batch, {epochs} epoch(s)", inputs, expected, weights_and_bias)
    X, _ = rows_and_targets(7, 3, noise=0)
    y = X @ [1.0, 2.0, 3.0] - 1.5
    expected = {"w": np.array([1.0, 2.0, 3.0]), "b": -1.5}
    for batch_size in (1, 3):
        inputs = {"X": X, "y": y, "lr": 0.05, "epochs": 1500, "batch_size": batch_size}
        what = f"batches of {batch_size}, no noise: the exact weights"
        yield Case(what, inputs, expected, weights_and_bias, tolerance=1e-5)


def right_sides(solution, X, y, **options) -> list[bool]:
    """On which side of the plane that the version finds each row lies."""
    parts = weights_and_bias(solution, X=X, y=y, **options)
    return [bool(side) for side in X @ parts["w"] + parts["b"] > 0]


@exercise(
    "interview/classical.py",
    "logistic_regression",
    CLASSICAL,
    2,
    "Derive and write logistic regression by SGD, with an L2 penalty.",
    "推导并手写逻辑回归（随机梯度下降，L2 正则）。",
    (
        "The slope of a row's loss in its logit is p − y; all else as before. (梯度是 p − y)",
        "p = σ(Xw + b); dw = 1/B · Xᵀ(p − y) + l2 · w; db = mean(p − y); the bias is not penalised",
        "error = 1 / (1 + np.exp(-(X @ w + b))) - y",
    ),
)
def logistic_regression_cases():
    from sklearn.linear_model import LogisticRegression

    X = draw(12, 3, seed=102).numpy()
    y = (X[:, 0] + draw(12, seed=103).numpy() > -0.8).astype(float)  # the bias matters
    leaves = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    theta = leaves
    for _ in range(2):
        logits = torch.from_numpy(X) @ theta[:3] + theta[3]
        loss = F.binary_cross_entropy_with_logits(logits, torch.from_numpy(y))
        loss = loss + 0.3 / 2 * theta[:3].square().sum()
        theta = theta - 0.5 * torch.autograd.grad(loss, theta)[0]
    inputs = {"X": X, "y": y, "lr": 0.5, "epochs": 2, "batch_size": 12, "l2": 0.3}
    expected = {"w": theta[:3].detach().numpy(), "b": theta[3].item()}
    yield Case("two steps of the full batch, l2 0.3", inputs, expected, weights_and_bias)
    theirs = LogisticRegression(C=1 / (0.3 * 12), tol=1e-10, max_iter=10_000).fit(X, y)
    expected = {"w": theirs.coef_[0], "b": float(theirs.intercept_[0])}
    inputs = inputs | {"epochs": 500}
    what = "to the end: scikit-learn's minimum"
    yield Case(what, inputs, expected, weights_and_bias, tolerance=1e-5)
    apart = X.copy()
    apart[:, 1] += np.where(y == 1, 4, -4)
    inputs = {"X": apart, "y": y, "lr": 0.3, "epochs": 50, "batch_size": 5}
    what = "batches of 5: separates what a plane can separate"
    yield Case(what, inputs, [bool(label) for label in y], right_sides)


@exercise(
    "interview/classical.py",
    "ridge",
    CLASSICAL,
    1,
    "Ridge regression (L2) in closed form. Why is the intercept left out of the penalty?",
    "手写岭回归的闭式解。为什么不惩罚截距？",
    (
        "Centre X and y, solve the normal equations with alpha on the diagonal. (先中心化)",
        "w = (XᵀX + alpha I)⁻¹ Xᵀy on centred data; b = mean y − mean x · w",
        "Xc = X - X.mean(axis=0)",
    ),
)
def ridge_cases():
    from sklearn.linear_model import LinearRegression, Ridge

    X, y = rows_and_targets(7, 3, noise=1)
    X = X + 5
    for alpha in (0.1, 10.0):
        theirs = Ridge(alpha).fit(X, y)
        expected = {"w": theirs.coef_, "b": float(theirs.intercept_)}
        inputs = {"X": X, "y": y, "alpha": alpha}
        yield Case(f"alpha {alpha:g}", inputs, expected, weights_and_bias)
    theirs = LinearRegression().fit(X, y)
    expected = {"w": theirs.coef_, "b": float(theirs.intercept_)}
    inputs = {"X": X, "y": y, "alpha": 0}
    yield Case("alpha 0: least squares", inputs, expected, weights_and_bias)


@exercise(
    "interview/classical.py",
    "lasso",
    CLASSICAL,
    3,
    "Lasso (L1) by coordinate descent. Why is L1 sparse?",
    "手写 lasso 的坐标下降。为什么 L1 产生稀疏解？",
    (
        "Solve one weight exactly while the others are held, in turn, until none moves. "
        "(逐个坐标求解)",
        "rho = mean(x_j (residual + x_j w_j)); w_j = sign(rho) max(|rho| − alpha, 0) / mean x_j²",
        "residual = y - y.mean()  # w starts at 0; X is centred too",
    ),
)
def lasso_cases():
    from sklearn.linear_model import Lasso

    X, y = rows_and_targets(9, 4, noise=1)
    X = X + 3
    for alpha in (0.01, 0.5, 2.0, 20.0):
        theirs = Lasso(alpha, tol=1e-14, max_iter=100_000).fit(X, y)
        expected = {"w": theirs.coef_, "b": float(theirs.intercept_)}
        inputs = {"X": X, "y": y, "alpha": alpha}
        n_zeros = int((theirs.coef_ == 0).sum())
        what = f"alpha {alpha:g}: {n_zeros} of 4 weights are 0"
        yield Case(what, inputs, expected, weights_and_bias, tolerance=1e-7)


def clusters(solution, X, k) -> dict:
    """A clustering without the order of its clusters."""
    parts = numbers_of(solution(X, k), ("centers", "labels", "inertia"))
    centers = np.asarray(parts["centers"])
    order = np.lexsort(centers.T[::-1])
    return {
        "centers, in order": centers[order],
        "centre of each row": centers[np.asarray(parts["labels"])],
        "inertia": float(parts["inertia"]),
    }


def best_grouping(X, k) -> dict:
    """The least inertia of all k^n groupings, by trying each."""
    best = None
    for grouping in itertools.product(range(k), repeat=len(X)):
        chosen = np.array(grouping)
        if len(set(grouping)) == k:
            centers = np.stack([X[chosen == j].mean(axis=0) for j in range(k)])
            inertia = float(((X - centers[chosen]) ** 2).sum())
            if best is None or inertia < best[2]:
                best = centers, chosen, inertia
    return clusters(partial(returned, best), X, k)


def returned(result, *arguments):
    """Give this result, whatever is asked."""
    return result


@exercise(
    "interview/classical.py",
    "k_means",
    CLASSICAL,
    3,
    "Write k-means with k-means++. How does it stop, and what if a cluster is empty?",
    "手写 k-means 和 k-means++。何时停止？出现空簇怎么办？",
    (
        "In turn: rows to the nearest centre, centres to the mean of their rows, until no row "
        "moves; the best of n_init starts. (交替更新，多次初始化)",
        "k-means++: each new centre is a row, drawn in proportion to its squared distance to the "
        "nearest centre so far",
        "distances = ((X[:, None] - centers) ** 2).sum(axis=2)  # (n, k)",
    ),
)
def k_means_cases():
    X = draw(7, 2, seed=104, scale=3).numpy()
    expected = best_grouping(X, 3)
    yield Case("the best of all groupings of 7 rows", {"X": X, "k": 3}, expected, clusters)
    middles = np.array([[0.0, 0.0], [50.0, 0.0], [0.0, 70.0], [90.0, 90.0]])
    blobs = np.repeat(middles, 5, axis=0) + draw(20, 2, seed=105).numpy()
    centers = blobs.reshape(4, 5, 2).mean(axis=1)
    rows = np.repeat(centers, 5, axis=0)
    expected = {
        "centers, in order": centers[np.lexsort(centers.T[::-1])],
        "centre of each row": rows,
        "inertia": float(((blobs - rows) ** 2).sum()),
    }
    yield Case("four clusters far apart", {"X": blobs, "k": 4}, expected, clusters)
    few = np.array([[1.0, 2.0], [3.0, 5.0], [8.0, 1.0]])
    expected = {"centers, in order": few, "centre of each row": few, "inertia": 0.0}
    yield Case("as many clusters as rows", {"X": few, "k": 3}, expected, clusters)


def sum_over_pairs(X, w0, w, V) -> Tensor:
    """What a factorisation machine predicts, by the double sum."""
    X, w, V = map(torch.as_tensor, (X, w, V))
    predictions = w0 + X @ w
    for i, j in itertools.combinations(range(X.shape[1]), 2):
        predictions = predictions + (V[i] @ V[j]) * X[:, i] * X[:, j]
    return predictions


def machine(solution, w0, w, V):
    """A factorisation machine with these parameters."""
    found = solution(*V.shape)
    found.w0 = w0
    found.w = w.copy()
    found.V = V.copy()
    return found


def predicted(solution, w0, w, V, X):
    return machine(solution, w0, w, V).predict(X)


def fitted(solution, w0, w, V, X, y, lr) -> dict:
    found = machine(solution, w0, w, V)
    found.fit(X, y, lr, 1)
    return {"w0": float(found.w0), "w": found.w, "V": found.V}


@exercise(
    "interview/classical.py",
    "FactorizationMachine",
    CLASSICAL,
    3,
    "Write a factorisation machine whose pairs cost O(kn).",
    "手写因子分解机，二阶项复杂度 O(kn)。",
    (
        "A pair's weight is the product of two short vectors; the sum over pairs is half the "
        "square of the sum less the sum of squares. (和的平方减平方和)",
        "ŷ = w0 + x·w + ½ Σ_f [(Σ_i V_if x_i)² − Σ_i V_if² x_i²]; "
        "dV_if = 2 (ŷ − y) (x_i Σ_j V_jf x_j − V_if x_i²)",
        "square_of_sum = (X @ self.V) ** 2  # (n, k)",
    ),
    names="w0 a number, w (n_features,), V (n_features, k); fit goes a row a step",
    methods=("__init__", "predict", "fit"),
)
def factorization_machine_cases():
    w = draw(4, seed=106).numpy()
    V = draw(4, 3, seed=107).numpy()
    X = draw(5, 4, seed=108).numpy()
    parameters = {"w0": 0.5, "w": w, "V": V}
    expected = sum_over_pairs(X, **parameters).numpy()
    yield Case("predicts the double sum", parameters | {"X": X}, expected, predicted)
    leaves = []
    for value in parameters.values():
        leaves.append(torch.tensor(value, dtype=torch.float64, requires_grad=True))
    loss = (sum_over_pairs(X[:1], *leaves)[0] - 2.0) ** 2
    moved = []
    for leaf, slope in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
        moved.append((leaf - 0.1 * slope).detach().numpy())
    expected = {"w0": float(moved[0]), "w": moved[1], "V": moved[2]}
    inputs = parameters | {"X": X[:1], "y": np.array([2.0]), "lr": 0.1}
    yield Case("a step on one row, against autograd", inputs, expected, fitted)


# ---- Small programs -------------------------------------------------------------------------


@exercise(
    "interview/puzzles.py",
    "tree",
    PUZZLES,
    1,
    "Build a nested dict from paths such as a/b/c.",
    "给一组形如 a/b/c 的路径，构造一棵树。",
    (
        "A node is the dict of its children; walk each path from the root. (逐级进入子字典)",
        "node[name] if it is there, else a new {}; a leaf is {}",
        "node = node.setdefault(name, {})",
    ),
)
def tree_cases():
    paths = ["a/b/c", "a/d", "e", "a/b/f"]
    expected = {"a": {"b": {"c": {}, "f": {}}, "d": {}}, "e": {}}
    yield Case("four paths", {"paths": paths}, expected)
    yield Case("none", {"paths": []}, {})
    yield Case("one path twice", {"paths": ["a", "a/b", "a"]}, {"a": {"b": {}}})
    again = ["a/b", "b/a", "b"]
    yield Case("one name at two places", {"paths": again}, {"a": {"b": {}}, "b": {"a": {}}})
    deep = "/".join("x" * 40)
    expected = {}
    for _ in range(40):
        expected = {"x": expected}
    yield Case("forty levels", {"paths": [deep]}, expected)


DRAWN = """\
├── a
│   ├── b
│   │   ├── c
│   │   └── f
│   └── d
│       └── g
├── e
└── h
    └── i"""


@exercise(
    "interview/puzzles.py",
    "draw",
    PUZZLES,
    2,
    "Print such a tree as the command `tree` does.",
    "像 tree 命令那样打印一棵树。",
    (
        "A child's line is its parent's margin and a branch; the last child gets the corner. "
        "(最后一个孩子用 └──)",
        "margin + '├── ' or '└── '; below it the margin grows by '│   ' or '    '",
        "last = list(tree)[-1]",
    ),
)
def draw_cases():
    nested = {"a": {"b": {"c": {}, "f": {}}, "d": {"g": {}}}, "e": {}, "h": {"i": {}}}
    yield Case("three levels", {"tree": nested}, DRAWN)
    yield Case("one leaf", {"tree": {"one": {}}}, "└── one")
    yield Case("nothing", {"tree": {}}, "")


def sorted_anew(solution, values) -> dict:
    """The result, and what became of the values that were handed over."""
    found = solution(values)
    return {"result": list(found), "a new list": found is not values, "the input after": values}


@exercise(
    "interview/puzzles.py",
    "quicksort",
    PUZZLES,
    2,
    "Write quicksort. What is its worst case, and how do you avoid it?",
    "手写快排。最坏情况是什么？怎么避免？",
    (
        "A random pivot splits into smaller, equal and larger; sort the outer two. (三路划分)",
        "sort(smaller) + equal + sort(larger); O(n log n) on average, also for equal values",
        "pivot = values[random.randrange(len(values))]",
    ),
)
def quicksort_cases():
    generator = random.Random(0)
    rising = list(range(5000))
    for what, values in (
        ("a few values, some equal", [3, 1, 2, 3, 0, 1]),
        ("none", []),
        ("words", ["pear", "fig", "apple", "fig"]),
        ("5,000 in random order", generator.sample(rising, 5000)),
        ("5,000 sorted already", rising),
        ("5,000 in reverse", rising[::-1]),
        ("5,000 equal ones", [7] * 5000),
    ):
        expected = {"result": sorted(values), "a new list": True, "the input after": values}
        yield Case(what, {"values": values}, expected, sorted_anew)


@exercise(
    "interview/puzzles.py",
    "rotations_match",
    PUZZLES,
    1,
    "Is one square matrix the other, turned by 0, 90, 180 or 270 degrees?",
    "判断一个方阵旋转 0、90、180、270 度后能否与另一个相同。",
    (
        "Compare, turn by a quarter, four times. (转四次，比四次)",
        "a quarter turn clockwise is the transpose with each row reversed",
        "A = [list(row)[::-1] for row in zip(*A, strict=True)]",
    ),
)
def rotations_match_cases():
    A = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    others = {f"turned by {90 * k}°": np.rot90(A, -k) for k in range(4)}
    others["mirrored"] = np.fliplr(A)
    others["transposed"] = np.transpose(A)
    others["one number differs"] = np.rot90([[1, 2, 3], [4, 5, 6], [7, 8, 0]])
    for what, B in others.items():
        expected = any(np.array_equal(np.rot90(A, k), B) for k in range(4))
        yield Case(what, {"A": A, "B": B.tolist()}, expected)
    yield Case("another size", {"A": A, "B": [[1, 2], [3, 4]]}, False)


def sizes_that_fill(items, capacity) -> list[tuple]:
    """Every combination of items that fills the capacity, by trying all up to its length."""
    found = []
    for n in range(capacity + 1):
        for chosen in itertools.combinations_with_replacement(items, n):
            if sum(chosen) == capacity:
                found.append(chosen)
    return found


KNAPSACKS = (((2, 5), 9), ((2, 5), 3), ((1, 5, 8), 10), ((3, 4, 7), 12), ((4, 6), 0))


@exercise(
    "interview/puzzles.py",
    "fewest",
    PUZZLES,
    2,
    "The complete knapsack, filled exactly with the fewest items.",
    "完全背包：恰好装满，最少要几件？",
    (
        "The fewest for c is one more than the fewest for c − item, over all items. (动态规划)",
        "least[0] = 0; least[c] = 1 + min over items of least[c − item], ∞ if none fits",
        "least = [0] + [math.inf] * capacity",
    ),
)
def fewest_cases():
    for items, capacity in KNAPSACKS:
        numbers = [len(chosen) for chosen in sizes_that_fill(items, capacity)]
        expected = min(numbers, default=None)
        yield Case(f"{items} into {capacity}", {"items": items, "capacity": capacity}, expected)
    coins = (1, 3, 6, 12, 24, 30)
    inputs = {"items": coins, "capacity": 4800}
    yield Case("4,800 pence: the largest coin is not all", inputs, 160)
    yield Case("48 pence: greedy takes three", {"items": coins, "capacity": 48}, 2)


@exercise(
    "interview/puzzles.py",
    "ways",
    PUZZLES,
    2,
    "In how many ways can the knapsack be filled exactly?",
    "恰好装满背包有多少种装法？",
    (
        "One item after the other: each adds the ways that use it. (物品在外层，容量在内层)",
        "count[0] = 1; for each item, for c upwards: count[c] += count[c − item]",
        "count = [1] + [0] * capacity",
    ),
)
def ways_cases():
    for items, capacity in KNAPSACKS:
        expected = len(sizes_that_fill(items, capacity))
        yield Case(f"{items} into {capacity}", {"items": items, "capacity": capacity}, expected)
    factors = [1]
    for item in (1, 2, 5, 10, 20, 50):  # the product of 1 / (1 − x^item), up to x^200
        series = np.zeros(201, dtype=object)
        series[::item] = 1
        factors = np.convolve(factors, series)[:201]
    inputs = {"items": (1, 2, 5, 10, 20, 50), "capacity": 200}
    yield Case("200 by six coins", inputs, int(factors[200]))
