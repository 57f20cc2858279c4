"""interview/practice.py: its cases hold for the real ones, and catch what is wrong; its commands.

The cases of interview/exercises.py are run here on every function that they are about.
"""

import functools
import importlib
import inspect
import json
import math
import re
import textwrap

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.nn import functional as F

from interview import exercises, practice
from interview.exercises import EXERCISES
from interview.practice import main, problem_of, shown, solution_in, stub_of


@functools.cache
def cases_of(name):
    return list(EXERCISES[name].cases())


def real(name):
    module = EXERCISES[name].path.removesuffix(".py").replace("/", ".")
    return getattr(importlib.import_module(module), name)


def problems(name, solution):
    """{what a case tests: what is wrong} for the cases that fail."""
    found = {case.what: problem_of(case, solution) for case in cases_of(name)}
    return {what: problem for what, problem in found.items() if problem}


def run(*arguments):
    """A command's exit code."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code


# ---- The cases ----


@pytest.mark.parametrize("name", EXERCISES)
def test_the_real_one_holds_every_case(name):
    assert len(cases_of(name)) >= 2
    assert problems(name, real(name)) == {}
    assert len({case.what for case in cases_of(name)}) == len(cases_of(name))


def nothing(*arguments, **options):
    return "nothing"


@pytest.mark.parametrize("name", EXERCISES)
def test_a_version_that_gives_nothing_fails_every_case(name):
    assert len(problems(name, nothing)) == len(cases_of(name))


# ---- Wrong versions: each is a mistake that the files' 'Mistakes' name or that is often made ----


def softmax_without_maximum(x, dim=-1):
    return x.exp() / x.exp().sum(dim, keepdim=True)


def softmax_of_the_whole_maximum(x, dim=-1):
    z = (x - x.max()).exp()
    return z / z.sum(dim, keepdim=True)


def softmax_along_the_last_axis(x, dim=-1):
    return torch.softmax(x, -1)


def softmax_detached(x, dim=-1):
    return torch.softmax(x.detach(), dim)


def softmax_in_float32(x, dim=-1):
    return torch.softmax(x.float(), dim)


def log_of_softmax(x, dim=-1):
    return torch.softmax(x, dim).log()


def sigmoid_as_written(x):
    return 1 / (1 + (-x).exp())


def leaky_by_maximum(x, slope=0.01):
    return torch.maximum(x, slope * x)


def gelu_by_tanh(x):
    return F.gelu(x, approximate="tanh")


def cross_entropy_summed(logits, target, label_smoothing=0.0):
    return F.cross_entropy(logits, target, label_smoothing=label_smoothing, reduction="sum")


def precision_by_rows(matrix, average=None, zero_division=0.0):
    return real("recall")(matrix, average, zero_division)


def f1_of_means(matrix, average=None, zero_division=0.0):
    p = real("precision")(matrix, average, zero_division)
    r = real("recall")(matrix, average, zero_division)
    return 2 * p * r / (p + r)


def transposed_confusion(predicted, target, n_classes):
    return real("confusion_matrix")(target, predicted, n_classes)


def backprop_without_relu(model, images, target):
    *inputs, logits = model.activations(images)
    delta = (logits.softmax(1) - F.one_hot(target, 6)) / len(images)
    gradients = {}
    for i in reversed(range(len(model.layers))):
        gradients[f"layers.{i}.weight"] = delta.mT @ inputs[i]
        gradients[f"layers.{i}.bias"] = delta.sum(0)
        delta = delta @ model.layers[i].weight
    return gradients


class UnbiasedLayerNorm(nn.LayerNorm):
    def forward(self, x):
        std = torch.sqrt(x.var(-1, keepdim=True) + self.eps)
        return self.weight * (x - x.mean(-1, keepdim=True)) / std + self.bias


class NormOfConstants(nn.LayerNorm):
    def forward(self, x):
        mean = x.mean(-1, keepdim=True).detach()
        std = torch.sqrt(x.var(-1, correction=0, keepdim=True) + self.eps).detach()
        return self.weight * (x - mean) / std + self.bias


class BatchNormByBiasedRunning(nn.BatchNorm1d):
    def forward(self, x):
        if self.training and x.ndim == 2:
            mean = 0.9 * self.running_mean + 0.1 * x.mean(0).detach()
            var = 0.9 * self.running_var + 0.1 * x.var(0, correction=0).detach()
            y = F.batch_norm(x, None, None, self.weight, self.bias, training=True)
            self.running_mean, self.running_var = mean, var
            return y
        if x.ndim == 4:
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True)
        return super().forward(x)


class BatchNormWithoutEval(nn.BatchNorm2d):
    def _check_input_dim(self, x):
        pass

    def eval(self):
        return self


class DropoutUnscaled(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        return x * (torch.rand_like(x) >= self.p) if self.training else x


class DropoutInEval(DropoutUnscaled):
    def forward(self, x):
        return F.dropout(x, self.p, training=True)


class DropoutOfColumns(DropoutUnscaled):
    def forward(self, x):
        keep = torch.rand(x.shape[1], dtype=x.dtype) >= self.p
        return x * keep / (1 - self.p) if self.training else x


class AdamUncorrected(torch.optim.RMSprop):
    def __init__(self, params, lr, **options):
        super().__init__(params, lr)


class AdamWithCoupledDecay(torch.optim.Adam):
    def __init__(self, params, lr, weight_decay=0.01, **options):
        super().__init__(params, lr, weight_decay=weight_decay, **options)


def conv2d_turned(x, weight, bias=None, **options):
    return F.conv2d(x, weight.flip(2, 3), bias, **options)


def conv2d_without_dilation(x, weight, bias=None, dilation=1, **options):
    return F.conv2d(x, weight, bias, **options)


def conv_transpose2d_overwriting(x, weight, bias=None, stride=1, padding=0):
    kh, kw = weight.shape[2:]
    if stride < min(kh, kw):
        x = x.clone()
        x[..., 1:, :] = 0
    return F.conv_transpose2d(x, weight, bias, stride, padding)


def attention_unscaled(q, k, v, mask=None, causal=False):
    return real("attention")(q * math.sqrt(q.shape[-1]), k, v, mask, causal)


def attention_of_repeated_heads(q, k, v, mask=None, causal=False):
    n_times = q.shape[1] // k.shape[1]
    return real("attention")(
        q, k.repeat(1, n_times, 1, 1), v.repeat(1, n_times, 1, 1), mask, causal
    )


def attention_causal_from_the_top(q, k, v, mask=None, causal=False):
    T = q.shape[2]
    S = k.shape[2]
    visible = torch.ones(T, S, dtype=torch.bool).tril()
    if causal and T != S and mask is None:
        return real("attention")(q, k, v, visible)
    return real("attention")(q, k, v, mask, causal)


def attention_with_nan_rows(q, k, v, mask=None, causal=False):
    out, weights = real("attention")(q, k, v, mask, causal)
    hidden = weights.sum(-1, keepdim=True) == 0
    return out.masked_fill(hidden, math.nan), weights.masked_fill(hidden, math.nan)


class CacheThatKeepsItsLength:
    def __init__(self, *arguments, **options):
        self.inner = real("KVCache")(*arguments, **options)
        self.nbytes = self.inner.nbytes

    @property
    def length(self):
        return self.inner.length

    def append(self, k, v):
        return self.inner.append(k, v)

    def reset(self):
        pass


def bptt_of_one_step(cell, x, grad_outputs):
    found = {name: torch.zeros_like(value) for name, value in cell.named_parameters()}
    state = None
    for t in range(x.shape[1]):
        with torch.enable_grad():
            new = cell(x[:, t], state)
            slopes = torch.autograd.grad(new, list(cell.parameters()), grad_outputs[:, t])
        for name, slope in zip(found, slopes, strict=True):
            found[name] += slope
        state = new.detach()
    return found


def first_pivot(values):
    if len(values) < 2:
        return list(values)
    pivot, *rest = values
    smaller = [value for value in rest if value < pivot]
    larger = [value for value in rest if value >= pivot]
    return [*first_pivot(smaller), pivot, *first_pivot(larger)]


def sorted_in_place(values):
    values.sort()
    return values


def greedy(items, capacity):
    n = 0
    for item in sorted(items, reverse=True):
        n += capacity // item
        capacity %= item
    return None if capacity else n


def ways_in_order(items, capacity):
    count = [1] + [0] * capacity
    for c in range(1, capacity + 1):
        count[c] = sum(count[c - item] for item in items if item <= c)
    return count[capacity]


def tree_anew(paths):
    root = {}
    for path in paths:
        node = root
        for name in path.split("/"):
            node[name] = {}
            node = node[name]
    return root


def mirror_only(A, B):
    return bool(np.array_equal(A, B) or np.array_equal(np.transpose(A), B))


def regression_on_sums(X, y, lr, epochs, batch_size=1, seed=0):
    return real("linear_regression")(X, y, lr * batch_size, epochs, batch_size, seed)


def ridge_with_penalised_intercept(X, y, alpha):
    ones = np.column_stack([X, np.ones(len(X))])
    theta = np.linalg.solve(ones.T @ ones + alpha * np.eye(ones.shape[1]), ones.T @ y)
    return theta[:-1], theta[-1]


def lasso_of_sums(X, y, alpha):
    return real("lasso")(X, y, alpha / len(X))


class GRUWithEarlyReset(exercises.TorchCell):
    def __init__(self, n_in, n_hidden):
        super().__init__(n_in, n_hidden, "gru")

    def forward(self, x, h=None):
        h = torch.zeros(len(x), self.W_hh.in_features, dtype=x.dtype) if h is None else h
        x_r, x_z, x_n = self.W_xh(x).chunk(3, 1)
        h_r, h_z, _ = self.W_hh(h).chunk(3, 1)
        r = torch.sigmoid(x_r + h_r)
        z = torch.sigmoid(x_z + h_z)
        W_n = self.W_hh.weight.chunk(3)[2]
        n = torch.tanh(x_n + F.linear(r * h, W_n, self.W_hh.bias.chunk(3)[2]))
        return (1 - z) * n + z * h


class LSTMWithoutForgetting(exercises.TorchCell):
    def __init__(self, n_in, n_hidden):
        super().__init__(n_in, n_hidden, "lstm")

    def forward(self, x, state=None):
        h, c = super().forward(x, state)
        return (h, c) if state is None else (h, c + state[1])


class RNNWithoutPast(exercises.TorchCell):
    def __init__(self, n_in, n_hidden, activation="tanh"):
        super().__init__(n_in, n_hidden, "rnn", activation)

    def forward(self, x, state=None):
        return super().forward(x, None if state is None else 0 * state)


def recurrent_past_the_end(**options):
    model = real("Recurrent")(**options)
    forward = model.forward
    model.forward = lambda x, lengths: forward(x)
    return model


class HeadsInTurn(exercises.TorchAttention):
    """Query head h reads key/value head h mod G."""

    def repeated(self, shared):
        n_times = self.n_heads // self.n_kv_heads
        return torch.cat([shared] * n_times)

    def forward(self, *arguments, cache=None, **options):
        return super().forward(*arguments, **options)


class WithoutOutput(exercises.TorchAttention):
    def __init__(self, d_model, n_heads):
        super().__init__(d_model, n_heads, n_heads)

    def forward(self, x, context=None, mask=None, causal=False, cache=None):
        out, weights = super().forward(x, context, mask, causal)
        return (out - self.W_o.bias) @ torch.linalg.inv(self.W_o.weight).T, weights


class MeanWeights(WithoutOutput):
    def forward(self, x, context=None, mask=None, causal=False, cache=None):
        out, weights = exercises.TorchAttention.forward(self, x, context, mask, causal)
        return out, weights.mean(1)


class SwiGLUExchanged(exercises.PlainSwiGLU):
    def forward(self, x):
        return self.w2(F.silu(self.w3(x)) * self.w1(x))


class GroupsOfAllPixels(nn.GroupNorm):
    def __init__(self, groups, n):
        super().__init__(1, n)


class RMSNormCentred(nn.RMSNorm):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


def layer_norm_backward_of_constants(grad, x, weight, eps=1e-5):
    _, dweight, dbias = real("layer_norm_backward")(grad, x, weight, eps)
    return grad * weight / torch.sqrt(x.var(-1, correction=0, keepdim=True) + eps), dweight, dbias


def batch_norm_backward_in_two(grad, x, weight, eps=1e-5):
    return real("batch_norm_backward")(grad, x, weight, eps)[:2]


class DampedSGD(torch.optim.SGD):
    def __init__(self, params, lr, momentum=0.0, weight_decay=0.0):
        super().__init__(params, lr * (1 - momentum), momentum, weight_decay=weight_decay)


def corr2d_turned(X, K):
    return F.conv2d(X[None, None], K.flip(0, 1)[None, None])[0, 0]


def max_pool2d_of_the_rest(x, k):
    return F.max_pool2d(x, k, ceil_mode=True)


def penalised_bias(X, y, lr, epochs, batch_size=1, l2=0.0, seed=0):
    ones = np.column_stack([X, np.ones(len(X))])
    theta = np.zeros(ones.shape[1])
    for _ in range(epochs):
        error = 1 / (1 + np.exp(-ones @ theta)) - y
        theta -= lr * (ones.T @ error / len(X) + l2 * theta)
    return theta[:-1], theta[-1]


def bce_without_clipping(p, y):
    with np.errstate(all="ignore"):
        return float(-np.mean(y * np.log(p) + (1 - y) * np.log(1 - p)))


def k_means_from_the_first_rows(X, k, n_init=10, max_iter=300, seed=0):
    from interview.classical import lloyd

    return lloyd(X, X[:k], max_iter)


class PairsTwice(real("FactorizationMachine")):
    def predict(self, X):
        linear = self.w0 + X @ self.w
        return linear + 2 * (super().predict(X) - linear)


def draw_without_corners(tree):
    return real("draw")(tree).replace("└", "├")


GRU_CASE = "gru, 1 layer(s), forwards, lengths=[5, 2, 4]"
WRONG = [  # a version, the exercise, a case that it fails, and what is said
    (softmax_without_maximum, "softmax", "values of ±1000", "nan"),
    (softmax_of_the_whole_maximum, "softmax", "rows far below and far above 0", "nan at [0, 0]"),
    (softmax_along_the_last_axis, "softmax", "the first axis", "largest difference"),
    (softmax_detached, "softmax", "the last axis", "no gradient: was it detached"),
    (softmax_in_float32, "softmax", "the last axis", "yours became float32"),
    (log_of_softmax, "log_softmax", "values of ±1000", "-inf"),
    (sigmoid_as_written, "sigmoid", "values and slopes at ±1000", "nan at [0]"),
    (leaky_by_maximum, "leaky_relu", "slope 3", "largest difference"),
    (gelu_by_tanh, "gelu", "values and slopes", "largest difference"),
    (cross_entropy_summed, "cross_entropy", "6 rows of 4 classes", "yours     result"),
    (transposed_confusion, "confusion_matrix", "7 samples of 3 classes", "largest difference"),
    (precision_by_rows, "precision", "every class, 0 / 0 is 0", "largest difference"),
    (f1_of_means, "f1", '"macro", 0 / 0 is 0', "largest difference"),
    (backprop_without_relu, "backprop", "hidden=(5,), against autograd", "layers.0.weight"),
    (UnbiasedLayerNorm, "LayerNorm", "x of shape (3, 4)", "result = shape (3, 4)"),
    (NormOfConstants, "LayerNorm", "x of shape (3, 4)", "gradient in x"),
    (BatchNormByBiasedRunning, "BatchNorm", "eval after three batches", "result in eval"),
    (BatchNormWithoutEval, "BatchNorm", "eval after three batches", "result in eval"),
    (DropoutUnscaled, "Dropout", "p=0.2 in training", "factors that occur = [0.0, 1.0]"),
    (DropoutInEval, "Dropout", "p=0.4 in eval", "factors that occur"),
    (DropoutOfColumns, "Dropout", "p=0.2 in training", "rows have masks of their own = False"),
    (AdamUncorrected, "Adam", "lr 0.1", "parameter 0 after step 1"),
    (AdamWithCoupledDecay, "AdamW", "lr 0.1", "parameter 0 after step"),
    (conv2d_turned, "conv2d", "one channel, no bias", "result"),
    (conv2d_without_dilation, "conv2d", "dilation 2", "the shape must be"),
    (conv_transpose2d_overwriting, "conv_transpose2d", "stride 2: overlaps", "result"),
    (attention_unscaled, "attention", "one head", "out"),
    (attention_of_repeated_heads, "attention", "6 query heads share 2 of keys and values", "out"),
    (
        attention_causal_from_the_top,
        "attention",
        "causal, with more keys than queries",
        "largest difference",
    ),
    (attention_with_nan_rows, "attention", "a query that may see nothing gets zeros", "nan at"),
    (CacheThatKeepsItsLength, "KVCache", "four tokens, then one, with room left", "reset = 5"),
    (bptt_of_one_step, "bptt", "tanh, 5 step(s)", "W_xh.weight"),
    (GRUWithEarlyReset, "GRUCell", "from a given state", "h after step 1"),
    (LSTMWithoutForgetting, "LSTMCell", "from a given state", "c after step 1"),
    (RNNWithoutPast, "RNNCell", "three steps from no state", "h after step 2"),
    (recurrent_past_the_end, "Recurrent", GRU_CASE, "outputs"),
    (HeadsInTurn, "GroupedQueryAttention", "a sequence attends to itself", "out"),
    (WithoutOutput, "MultiHeadAttention", "a sequence attends to itself", "out"),
    (MeanWeights, "MultiHeadAttention", "causal", "the shape must be (3, 3, 5, 5), not (3, 5, 5)"),
    (SwiGLUExchanged, "SwiGLU", "two rows", "result"),
    (GroupsOfAllPixels, "GroupNorm", "x of shape (4, 6)", "result"),
    (RMSNormCentred, "RMSNorm", "x of shape (3, 4)", "result"),
    (
        layer_norm_backward_of_constants,
        "layer_norm_backward",
        "x of shape (3, 4), eps 1e-05",
        "yours     dx",
    ),
    (
        batch_norm_backward_in_two,
        "batch_norm_backward",
        "x of shape (4, 2), eps 0.1",
        "dx, dweight, dbias must come back, not tuple of 2",
    ),
    (DampedSGD, "SGD", "lr 0.1, momentum 0.9", "parameter 0 after step 1"),
    (corr2d_turned, "corr2d", "a 2 × 3 kernel", "result"),
    (max_pool2d_of_the_rest, "max_pool2d", "channels, and a rest that is dropped", "the shape"),
    (penalised_bias, "logistic_regression", "to the end: scikit-learn's minimum", "yours"),
    (bce_without_clipping, "binary_cross_entropy", "certain, and once wrong", "nan"),
    (k_means_from_the_first_rows, "k_means", "four clusters far apart", "centers, in order"),
    (PairsTwice, "FactorizationMachine", "predicts the double sum", "largest difference"),
    (draw_without_corners, "draw", "one leaf", "├── one"),
    (first_pivot, "quicksort", "5,000 sorted already", "RecursionError"),
    (sorted_in_place, "quicksort", "a few values, some equal", "a new list = False"),
    (greedy, "fewest", "48 pence: greedy takes three", "yours     3"),
    (ways_in_order, "ways", "(2, 5) into 9", "yours     3"),
    (tree_anew, "tree", "four paths", "yours     {'a': {'b': {'f': {}}}, 'e': {}}"),
    (mirror_only, "rotations_match", "transposed", "yours     True"),
    (regression_on_sums, "linear_regression", "full batch, 1 epoch(s)", "largest difference"),
    (ridge_with_penalised_intercept, "ridge", "alpha 10", "largest difference"),
    (lasso_of_sums, "lasso", "alpha 0.5: 1 of 4 weights are 0", "largest difference"),
]


@pytest.mark.parametrize(("solution", "name", "case", "said"), WRONG)
def test_a_wrong_version_fails_with_its_message(solution, name, case, said):
    found = problems(name, solution)
    assert case in found
    assert said in found[case]
    lines = found[case].splitlines()
    assert lines[0].startswith("  input     ")
    assert len(lines) < 40
    assert max(map(len, lines)) < 250


# ---- What is said of a file that cannot be compared ----


def written(folder, text, name="softmax"):
    path = folder / f"{name}.py"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def softmax(x, dim=-1)\n    return x\n", ["SyntaxError: expected ':'", "line 1: def s"]),
        ("import torch\nx = 1 / 0\n", ["ZeroDivisionError: division by zero", "line 2: x = 1 / 0"]),
        ("def other():\n    pass\n", ["softmax.py defines no softmax"]),
        ("import sys\nsys.exit(3)\n", ["SystemExit: 3", "line 2: sys.exit(3)"]),
        ("from torch import sofmax\n", ["ImportError: cannot import name 'sofmax'", "line 1: "]),
    ],
)
def test_a_file_that_cannot_be_read_is_said_in_two_lines(tmp_path, text, said):
    path = written(tmp_path, text)
    with pytest.raises(exercises.Mismatch) as error:
        solution_in(path, "softmax")
    lines = str(error.value).splitlines()
    assert len(lines) <= 2
    assert all(part in line for part, line in zip(said, lines, strict=True))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return y", ["NameError: name 'y' is not defined", "line 4: return y"]),
        ("return x + torch.ones(7)", ["RuntimeError: The size of tensor a (3)", "line 4: return"]),
        ("return x.tolist()", ["a tensor must come back, not list"]),
        ("x", ["a tensor must come back, not NoneType"]),
        ("return x.sum(dim)", ["the shape must be (2, 3), not (2,)"]),
        ("return torch.tensor(x.tolist())", ["has no gradient: was it detached"]),
        ("quit()", ["SystemExit: None", "line 4: quit()"]),
        ("raise NotImplementedError", ["nothing is written here yet", "line 4: raise"]),
        ("return softmax(x)", ["RecursionError: maximum recursion depth", "line 4: return softm"]),
        ("return x + numbers", ["NameError: name 'numbers' is not defined", "line 4: "]),
    ],
)
def test_an_error_of_ones_own_is_said_with_its_line(tmp_path, body, said):
    path = written(tmp_path, f"import torch\n\ndef softmax(x, dim=-1):\n    {body}\n")
    problem = problem_of(cases_of("softmax")[0], solution_in(path, "softmax"), path)
    assert "Traceback" not in problem
    for part in said:
        assert part in problem


def test_a_class_with_other_parameters_is_told_which(tmp_path):
    class Renamed(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(d))

    class Transposed(nn.Module):
        def __init__(self, d, hidden):
            super().__init__()
            self.w1 = nn.Linear(hidden, d, bias=False)
            self.w2 = nn.Linear(d, hidden, bias=False)
            self.w3 = nn.Linear(hidden, d, bias=False)

    def no_class(d):
        return d

    for name, version, said in (
        ("RMSNorm", Renamed, "its parameters must be weight; yours are gamma"),
        ("SwiGLU", Transposed, "its parameter w1.weight must have shape (5, 3), not (3, 5)"),
        ("LayerNorm", no_class, "the class must be an nn.Module, not int"),
        ("MLP", Renamed, "unexpected keyword argument"),
    ):
        assert said in problem_of(cases_of(name)[0], version)


def test_a_version_may_change_what_it_is_given():
    def in_place(x, dim=-1):
        y = torch.softmax(x, dim)
        x.data.zero_()
        return y

    assert problems("softmax", in_place) == {}
    assert problems("softmax", torch.softmax) == {}


def test_values_are_shown_short():
    assert shown(torch.tensor([1.0, 0.5])) == "[1. , 0.5]"
    assert shown(torch.zeros(2, 3), "x").splitlines()[0] == "x = shape (2, 3)"
    assert shown(torch.zeros(3, 4, 5), "x") == "x = [0., 0., 0., 0., 0., 0., …, shape (3, 4, 5)"
    assert shown(torch.tensor(2.5), "x") == "x = 2.5"
    assert shown({"a": torch.zeros(2), "b": [torch.ones(1)]}, "p").splitlines() == [
        "p['a'] = [0., 0.]",
        "p['b'][0] = [1.]",
    ]
    assert len(shown(list(range(5000)), "values")) < 60
    assert len(shown("x" * 5000)) < 300
    assert shown("a\nb") == "a\nb"


# ---- The files that are handed out ----


@pytest.mark.parametrize("name", EXERCISES)
def test_a_stub_has_signature_and_docstring_of_the_real_one_and_no_body(name, tmp_path):
    text = stub_of(EXERCISES[name])
    path = written(tmp_path, text, name)
    stub = solution_in(path, name)
    own = real(name)
    assert inspect.getdoc(stub) == inspect.getdoc(own)
    assert all(len(line) <= 100 for line in text.splitlines())
    names = EXERCISES[name].methods if inspect.isclass(own) else ()
    for method in names:
        if callable(getattr(own, method)):
            signatures = inspect.signature(getattr(stub, method))
            assert str(signatures) == str(inspect.signature(getattr(own, method)))
    if not names:
        assert str(inspect.signature(stub)) == str(inspect.signature(own))
    body = [line.strip() for line in text.splitlines() if "NotImplementedError" in line]
    assert len(body) == max(1, len(names))
    problem = problem_of(cases_of(name)[0], stub, path)
    assert practice.NOTHING_YET in problem
    assert len(problem.splitlines()) == 2


def test_every_exercise_says_what_is_asked_and_has_three_hints():
    for exercise in EXERCISES.values():
        assert exercise.stars in (1, 2, 3)
        assert exercise.topic in exercises.TOPICS
        assert re.search("[\u4e00-\u9fff]", exercise.asked_zh)
        assert len(exercise.hints) == 3
        assert all(1 < len(hint) < 200 for hint in exercise.hints)


# ---- Commands ----


def test_start_never_overwrites(tmp_path, capsys):
    assert run("start", "ridge", "--folder", tmp_path / "own") == 0
    path = tmp_path / "own" / "ridge.py"
    assert "check ridge" in capsys.readouterr().out
    path.write_text("mine")
    assert run("start", "ridge", "--folder", tmp_path / "own") == 1
    assert path.read_text() == "mine"
    assert "is there already" in capsys.readouterr().err


def test_names_in_any_case_and_misspelt_ones(tmp_path, capsys):
    assert run("hint", "layernorm", "--folder", tmp_path) == 0
    assert run("hint", "atention", "--folder", tmp_path) == 2
    assert "did you mean attention" in capsys.readouterr().err
    assert run("check", "zzzz", "--folder", tmp_path) == 2
    error = capsys.readouterr().err
    assert "no exercise is called 'zzzz': All names" in error
    assert error.count("\n") == 1
    assert run("finish") == 2
    assert run("check", "softmax", "--seconds", "0", "--folder", tmp_path) == 2
    assert "--seconds must be above 0" in capsys.readouterr().err


def test_check_and_show_before_start(tmp_path, capsys):
    assert run("check", "softmax", "--folder", tmp_path) == 1
    assert "start softmax" in capsys.readouterr().err
    assert run("show", "softmax", "--folder", tmp_path) == 0
    assert "z.exp()" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_hints_come_one_at_a_call(tmp_path, capsys):
    for expected in EXERCISES["attention"].hints:
        assert run("hint", "attention", "--folder", tmp_path) == 0
        printed = capsys.readouterr().out
        assert expected in printed
        assert sum(text in printed for text in EXERCISES["attention"].hints) == 1
    assert run("hint", "attention", "--folder", tmp_path) == 0
    assert "these are all" in capsys.readouterr().out


def test_a_damaged_state_is_named(tmp_path, capsys):
    (tmp_path / "state.json").write_text("{")
    assert run("list", "--folder", tmp_path) == 1
    error = capsys.readouterr().err
    assert "state.json cannot be read" in error
    assert error.count("\n") == 1


def test_show_stands_side_by_side_on_a_wide_screen(tmp_path, capsys, monkeypatch):
    written(tmp_path, 'def relu(x):\n    """Mine."""\n    return 0 * x  # 错\n', "relu")
    monkeypatch.setenv("COLUMNS", "200")
    assert run("show", "relu", "--folder", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len({line.index(" | ") for line in lines if " | " in line}) == 1
    assert any("torch.where" in line and "return 0 * x" in line for line in lines)
    monkeypatch.setenv("COLUMNS", "60")
    assert run("show", "relu", "--folder", tmp_path) == 0
    printed = capsys.readouterr().out
    assert " | " not in printed
    assert "Mine" not in printed
    assert printed.index("torch.where") < printed.index("return 0 * x")


def in_this_process(name, path, seconds):
    """As practice.judged, without its process: for the speed of the tests."""
    solution = solution_in(path, name)
    found = [(case.what, problem_of(case, solution, path)) for case in cases_of(name)]
    holding = [what for what, problem in found if not problem]
    return practice.Verdict(len(found), holding, [row for row in found if row[1]])


def filled_in(path, body):
    """Write a body where the stub has none."""
    text = path.read_text(encoding="utf-8")
    empty = re.search(r" +raise NotImplementedError.*\n", text)
    path.write_text(text.replace(empty[0], textwrap.indent(textwrap.dedent(body), "    ")), "utf-8")


ATTENTION = """
    group_size = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group_size, 1)
    v = v.repeat_interleave(group_size, 1)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    T, S = scores.shape[2:]
    if causal:
        scores = scores.masked_fill(torch.ones(T, S).triu(S - T + 1).bool(), -math.inf)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask
    empty = (scores == -math.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    return weights @ v, weights
"""
CONV2D = """
    sh, sw = stride if isinstance(stride, tuple) else (stride, stride)
    ph, pw = padding if isinstance(padding, tuple) else (padding, padding)
    d = dilation if isinstance(dilation, tuple) else (dilation, dilation)
    B, C, H, W = x.shape
    O, n_in, kh, kw = weight.shape
    columns = F.unfold(x, (kh, kw), d, (ph, pw), (sh, sw)).unflatten(1, (groups, -1))
    out = weight.reshape(groups, O // groups, -1) @ columns
    OH = (H + 2 * ph - d[0] * (kh - 1) - 1) // sh + 1
    out = out.reshape(B, O, OH, -1)
    return out if bias is None else out + bias[:, None, None]
"""


@pytest.mark.parametrize(("name", "body"), [("attention", ATTENTION), ("conv2d", CONV2D)])
def test_a_stranger_gets_through(name, body, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(practice, "judged", in_this_process)
    where = ["--folder", tmp_path]
    assert run("start", name, *where) == 0
    assert run("check", name, *where) == 1
    assert practice.NOTHING_YET in capsys.readouterr().out
    for _ in range(3):
        assert run("hint", name, *where) == 0
    filled_in(tmp_path / f"{name}.py", body)
    assert run("check", name, *where) == 0
    n = len(cases_of(name))
    assert f"{n} of {n} cases hold" in capsys.readouterr().out
    assert run("list", *where) == 0
    assert re.search(rf"{name} +★+ +passed, 0 min", capsys.readouterr().out)
    assert run("show", name, *where) == 0


def test_a_newcomer_writes_softmax(tmp_path, capfd, monkeypatch):
    """From the list to the pass, with the processes that a user meets, from another folder."""
    monkeypatch.chdir(tmp_path)
    where = ["--folder", "own"]
    assert run("list", *where) == 0
    assert "0 of" in capfd.readouterr().out
    assert run("start", "softmax", *where) == 0
    path = tmp_path / "own" / "softmax.py"
    filled_in(path, "print('looking at', x.shape)\nreturn x.exp() / x.exp().sum(dim, keepdim=True)")
    assert run("check", "softmax", *where) == 1
    printed = capfd.readouterr().out
    assert "looking at torch.Size([2, 3])" in printed
    assert "3 of 5 cases hold" in printed
    assert "fails     values of ±1000" in printed
    assert "fail too  rows far below and far above 0" in printed
    assert run("list", *where) == 0
    assert re.search(r" softmax +★★ +failing", capfd.readouterr().out)
    state = json.loads((tmp_path / "own" / "state.json").read_text())
    state["softmax"]["started"] -= 12 * 60
    (tmp_path / "own" / "state.json").write_text(json.dumps(state))
    path.write_text(path.read_text("utf-8").replace("x.exp()", "(x - x.amax(dim, True)).exp()"))
    assert run("check", "softmax", *where) == 0
    assert "5 of 5 cases hold" in capfd.readouterr().out
    assert run("list", *where) == 0
    printed = capfd.readouterr().out
    assert re.search(r" softmax +★★ +passed, 1[2-5] min", printed)
    assert f"1 of {len(EXERCISES)} passed, 0 failing" in printed


ENDLESS = """
import torch

def softmax(x, dim=-1):
    y = torch.softmax(x, dim)
    while dim == 0:
        y = y
    return y
"""


def test_an_endless_loop_is_ended_and_what_held_before_is_said(tmp_path, capfd):
    written(tmp_path, ENDLESS)
    assert run("check", "softmax", "--seconds", "2", "--folder", tmp_path) == 1
    printed = capfd.readouterr().out
    assert "1 of 5 cases hold" in printed
    assert "holds     the last axis" in printed
    assert re.search("still at work after 2 seconds, at line [67]: ended", printed)


def test_code_that_ends_the_process_is_said(tmp_path, capfd):
    written(tmp_path, "import os\n\ndef softmax(x, dim=-1):\n    os._exit(7)\n")
    assert run("check", "softmax", "--folder", tmp_path) == 1
    printed = capfd.readouterr().out
    assert "it ended the whole process (exit code 7)" in printed
    assert "0 of 5 cases hold" in printed


# ---- The folder's front page ----


def test_the_front_page_has_a_row_for_every_exercise():
    text = (ROOT / "interview" / "README.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    for exercise in EXERCISES.values():
        own = [row for row in rows if row.endswith(f"| `{exercise.name}` {'★' * exercise.stars} |")]
        assert len(own) == 1, exercise.name
        file = exercise.path.split("/")[-1]
        tests = f"test_{exercise.path.replace('/', '_')}"
        for part in (exercise.asked, exercise.asked_zh, f"`{exercise.name}`", file, tests):
            assert part in own[0]


def test_every_function_that_the_front_page_names_is_there():
    text = (ROOT / "interview" / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"\]\(([\w./]+\.py)\)((?: ?,? `\w+`)+)", text)
    assert len(named) > 50
    for link, functions in named:
        path = (ROOT / "interview" / link).resolve().relative_to(ROOT)
        module = importlib.import_module(str(path.with_suffix("")).replace("/", "."))
        for function in re.findall(r"`(\w+)`", functions):
            assert hasattr(module, function), (link, function)
