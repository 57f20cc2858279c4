"""Stage 2: an RNN (循环神经网络), a GRU and an LSTM made of nn.Linear read images row by row.

Fashion-MNIST, test accuracy: a plain layer 90.69 ± 0.15 %, two of a GRU 91.73 ± 0.05 %, an LSTM
90.20 ± 0.11 %; 5 seeds, 2 CPU cores.

    python stage2_rnn.py             train, sweep, faults, benchmark, pictures: all but gru and lstm
    python stage2_rnn.py train       one plain layer of 256 units, 5 seeds, with a report per class
    python stage2_rnn.py gru         the same, two layers of a GRU; lstm: one of an LSTM
    python stage2_rnn.py sweep --only cell reading --seeds 3
    python stage2_rnn.py faults      what goes wrong: provoked, measured, mended; what cells forget
    python stage2_rnn.py benchmark   speed of a training step, against nn.RNN, nn.GRU and nn.LSTM
    python stage2_rnn.py plot        draw figures/stage2/ again from its saved rows

Axis letters in shape comments: B batch, T steps, F features of a step, H hidden units, G gates of a
cell, C cells.
"""

import functools
import itertools
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import metrics
import runner
from runner import Data, Fault, Run, Split, batches, one_cycle, parameter_groups

# -------- 2. Config -------------------------------------------------------------------------------

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
# mean, std of training pixels of 0 … 1
SCALES = {"fashion_mnist": (0.2860, 0.3530), "mnist": (0.1307, 0.3081)}
# of Fashion-MNIST's 60,000 training images; its 10,000 test images stay whole
N_TRAIN, N_VAL = 55_000, 5_000
OPTIMIZERS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
CHOICES = {
    "cell": ["rnn", "rnn_relu", "gru", "lstm"],
    "init": ["default", "orthogonal", "identity", "large"],
    "reading": ["rows", "columns", "two_rows", "patches"],
    "readout": ["last", "mean"],
    "normalise": list(SCALES),
    "optimizer": list(OPTIMIZERS),
}
LIMITS = {  # each value is at least the first and less than the second
    **dict.fromkeys(("n_hidden", "n_layers", "batch_size", "epochs", "n_logs"), (1, math.inf)),
    **dict.fromkeys(("padding", "shift", "weight_decay", "clip", "steps"), (0, math.inf)),
    **dict.fromkeys(("dropout", "label_smoothing", "warmup"), (0, 1)),
    **{"n_train": (1, N_TRAIN + 1), "seed": (0, 2**32), "lr": (1e-12, math.inf)},
}


@dataclass(frozen=True)
class Config:
    cell: str = "rnn_relu"  # the plain RNN's, with tanh or ReLU, or a gated one
    n_hidden: int = 256  # units of a layer, in each direction
    n_layers: int = 1
    bidirectional: bool = False  # read each sequence backwards as well
    init: str = "identity"  # of W_hh, see initialise; what suits each cell: SUITED
    reading: str = "two_rows"  # how an image becomes a sequence, see sequences
    # what is classified: the state after the last step, or the mean of all steps' outputs
    readout: str = "last"
    padding: int = 0  # steps of zeros, which is an even grey, after each sequence
    crop: bool = False  # only the rows that show the garment: sequences of unequal length
    lengths: bool = False  # tell the network where each sequence ends
    normalise: str = "fashion_mnist"  # the data set whose mean and std scale the pixels
    flip: bool = True  # mirror every other training image, at random, left to right
    shift: int = 0  # move every training image by up to that many pixels each way, at random
    # evaluate on every image and on its mirror image: the mean of the logits
    both_views: bool = False
    # share zeroed, while training, of what a layer hands to the next and of what is classified
    dropout: float = 0.0
    label_smoothing: float = 0.1  # share of the target that is spread evenly over all classes
    optimizer: str = "adamw"
    lr: float = 2e-3  # the highest learning rate of the schedule
    weight_decay: float = 0.3  # of weights, not of biases
    # share of the run in which the learning rate rises; it falls along a cosine after
    warmup: float = 0.3
    clip: float = 1.0  # largest gradient norm; 0 switches clipping off
    batch_size: int = 256
    epochs: int = 40  # passes over the training images
    steps: int = 0  # number of updates, whatever epochs says; 0 leaves it to epochs
    n_train: int = N_TRAIN  # training images used
    n_logs: int = 30  # evaluations on the validation images during a run
    seed: int = 0  # of weights, batch order and mirroring; never of the validation split

    def __post_init__(self):
        runner.check_config(self, CHOICES, LIMITS)

    @property
    def n_steps(self) -> int:
        return self.steps or self.epochs * math.ceil(self.n_train / self.batch_size)


# W_hh of each cell
SUITED = {"rnn": "orthogonal", "rnn_relu": "identity", "gru": "orthogonal", "lstm": "orthogonal"}
# where gradients are followed from the last state back to the first
LAST = {"bidirectional": False, "readout": "last"}
# a sweep is a list of changes to its base Config; to add one, add its list here and what it varies
# below
SWEEPS: dict[str, list[dict]] = {
    "cell": [{"cell": cell, "init": init} for cell, init in SUITED.items()],
    "hidden": [{"n_hidden": n} for n in (16, 32, 64, 128, 256)],
    "layers": [{"n_layers": n} for n in (1, 2, 3)],
    "direction": [{"bidirectional": b} for b in (False, True)],
    "steps": [{"steps": n} for n in (100, 300, 1000, 3000)],
    "lr": [{"lr": lr, "clip": clip} for lr in (3e-4, 1e-3, 3e-3, 1e-2) for clip in (0.0, 1.0)],
    "init": [
        {"cell": cell, "init": init} for cell in ("rnn", "rnn_relu") for init in CHOICES["init"][:3]
    ],
    "reading": [{"reading": r} for r in CHOICES["reading"]],
    "readout": [{"readout": r} for r in CHOICES["readout"]],
}
# runs of `faults` that are compared with each other: who remembers the image that many empty steps
# after it?
PROBES = {
    "memory": [
        {"cell": c, "init": i, "padding": n} | LAST
        for c, i in SUITED.items()
        for n in (0, 28, 112, 448)
    ]
}
AXES = {
    "cell": "cell",
    "hidden": "hidden units",
    "layers": "layers",
    "direction": "both directions",
    "steps": "training steps, each its own run",
    "lr": "learning rate and clipping",
    "init": "cell and W_hh",
    "reading": "how the image is read",
    "readout": "what is classified",
    "memory": "cell, and empty steps at the end",
}
# of the two with gates
GATED = {"init": "orthogonal", "shift": 1, "both_views": True, "weight_decay": 0.1}
# what a job changes in the Config before the user's flags do, and how many seeds it runs
JOBS: dict[str, tuple[dict, int]] = {
    "train": ({}, 5),
    "gru": (GATED | {"cell": "gru", "n_layers": 2, "dropout": 0.3}, 5),
    "lstm": (GATED | {"cell": "lstm", "lr": 3e-3, "epochs": 15}, 5),
    "sweep": ({"n_hidden": 128, "steps": 600, "n_logs": 10}, 1),
    "faults": ({"reading": "rows", "n_hidden": 64, "steps": 200, "n_logs": 10}, 1),
}
# jobs whose models see the test images, and as what
SELECTED = {"train": "rnn", "gru": "gru", "lstm": "lstm"}
# jobs that `all` leaves out, its minutes, repeats of the benchmark
LONG, MINUTES, REPEATS = ["gru", "lstm"], 12, 5
SMOKE = {"n_hidden": 8, "n_train": 640, "batch_size": 128, "steps": 2, "n_logs": 2}


# -------- 3. Data ---------------------------------------------------------------------------------


def load_data(
    config: Config, device: torch.device | str = "cpu", data_dir: Path = runner.HERE / "data"
) -> Data:
    """Fashion-MNIST whole on the device: 55,000 / 5,000 / 10,000 images, scaled as the Config says.

    The split is always the same, see runner.stratified. runner.DataError if the images cannot be
    had, or are others.
    """
    (pixels, labels), test = runner.read_images("FashionMNIST", data_dir, *SCALES["fashion_mnist"])
    kept, val = runner.stratified(labels, N_VAL, seed=2017)
    mean, std = SCALES[config.normalise]
    parts = ((pixels[kept], labels[kept]), (pixels[val], labels[val]), test)
    return Data(
        *(Split(((p.float() / 255 - mean) / std).to(device), y.to(device)) for p, y in parts)
    )


def sequences(images: Tensor, config: Config) -> tuple[Tensor, Tensor | None]:
    """Images (B, 28, 28) as the Config reads them: sequences (B, T, F), and their lengths (B,) if
    it tells them.

    "rows" from top to bottom; "columns" from left to right; "two_rows" at a step, T = 14; "patches"
    of 7 × 4 pixels, 28 of them, row by row. Cropped sequences begin with the garment's first row
    (or column, …) and end with its last.
    """
    x = {
        "rows": lambda: images,
        "columns": lambda: images.mT,
        "two_rows": lambda: images.reshape(-1, 14, 56),
        "patches": lambda: images.reshape(-1, 4, 7, 7, 4).transpose(2, 3).reshape(-1, 28, 28),
    }[config.reading]()
    B, T, _ = x.shape
    lengths = torch.full((B,), T, device=x.device)
    if config.crop:
        # (B, T): does the step show anything of the garment?
        shown = (x > images.min()).any(2).int()
        first, lengths = shown.argmax(1), T - shown.flip(1).argmax(1) - shown.argmax(1)
        turned = (first[:, None] + torch.arange(T, device=x.device)) % T
        x = x.take_along_dim(turned[:, :, None], 1)  # empty steps all at the end
    return F.pad(x, (0, 0, 0, config.padding)), lengths if config.lengths else None


# -------- 4. Model --------------------------------------------------------------------------------

# a private name, so it may be gone one day
ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
# (g, y): of outputs y
sigmoid_backward, tanh_backward = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward


def product(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ: (M, K), (N, K) -> (M, N); on the CPU by oneDNN, which uses an AMD's AVX-512; torch's
    default does not.
    """
    fast = ONEDNN is not None and a.device.type == "cpu" and a.dtype == torch.float32
    return ONEDNN(a, b, None, "none", [], "") if fast else a @ b.mT


def tanh_(x: Tensor) -> Tensor:
    """tanh in place; on the CPU as 2σ(2x) − 1, to 1e-7 in float32: torch's sigmoid is far faster
    there than tanh.
    """
    return x.mul_(2.0).sigmoid_().mul_(2.0).sub_(1.0) if x.device.type == "cpu" else x.tanh_()


class Cell(nn.Module):
    """What the cells share. forward(x, state): x (B, n_in), state (B, n_hidden) or None, zeros ->
    the next state.

    Two nn.Linear hold the weights; Scan applies them. In it a column is a sequence, as in the
    equations. matrix(): both layers and their biases in one, H + F + 1 columns: p = W [h; x; 1] is
    all that a step needs. step(p, old, new): makes blocks p the gates, fills the next state `new`,
    returns what `back` needs besides states. back(grad, old, new, d, …): from grad = ∂L/∂new fills
    d = ∂L/∂p, returns what of ∂L/∂old does not pass W.
    """

    n_gates, n_parts, recurrent_bias = 1, 1, False  # n_parts: an LSTM's state is a pair

    def __init__(self, n_in: int, n_hidden: int):
        super().__init__()
        if min(n_in, n_hidden) < 1:
            raise ValueError(
                f"a cell needs at least one input and one unit, not {n_in=}, {n_hidden=}"
            )
        self.W_xh = nn.Linear(n_in, self.n_gates * n_hidden)
        self.W_hh = nn.Linear(n_hidden, self.n_gates * n_hidden, bias=self.recurrent_bias)

    def forward(self, x: Tensor, state=None):
        if x.ndim != 2 or x.shape[1] != self.W_xh.in_features:
            raise ValueError(
                f"a step (B, {self.W_xh.in_features}) expected, not shape {tuple(x.shape)}"
            )
        _, *new = self.scan(x.mT[None], self.parts(state, (len(x), self.W_hh.in_features), x))
        return tuple(new) if self.n_parts > 1 else new[0]

    def scan(self, x: Tensor, state, valid: Tensor | None = None) -> tuple[Tensor, ...]:
        """All steps: x (T, F, B), each part of the state (B, H) -> outputs (T, H, B), each part of
        the last (B, H).
        """
        outputs, *last = Scan.apply(self, x, valid, self.matrix(), *(part.mT for part in state))
        return outputs, *(part.mT for part in last)

    def parts(self, state, shape: tuple[int, ...], x: Tensor) -> tuple[Tensor, ...]:
        """The parts of a state, each of that shape; zeros if there is none."""
        parts = (x.new_zeros(shape),) * self.n_parts if state is None else state
        parts = tuple(parts) if isinstance(parts, tuple | list) else (parts,)
        if (shapes := [tuple(part.shape) for part in parts]) != [shape] * self.n_parts:
            raise ValueError(
                f"a state of {self.n_parts} × {shape} expected, not of shapes {shapes}"
            )
        return parts

    def matrix(self) -> Tensor:
        return torch.cat([self.W_hh.weight, self.W_xh.weight, self.W_xh.bias[:, None]], 1)


class RNNCell(Cell):
    """h' = act(W_xh x + b + W_hh h), act tanh or relu (Elman 1990). b is the sum of nn.RNN's
    bias_ih and bias_hh.
    """

    def __init__(self, n_in: int, n_hidden: int, activation: str = "tanh"):
        super().__init__(n_in, n_hidden)
        if activation not in ("tanh", "relu"):
            raise ValueError(f"activation must be tanh or relu, not {activation!r}")
        self.act = tanh_ if activation == "tanh" else torch.relu_

    def step(self, p, old, new):
        self.act(new[0].copy_(p))
        return ()

    def back(self, grad, old, new, d):
        torch.mul(grad[0], 1 - new[0] ** 2 if self.act is tanh_ else new[0] > 0, out=d)
        return [None]


class GRUCell(Cell):
    """The gated recurrent unit (Cho 2014), with nn.GRU's conventions: the reset gate comes after
    the product.

        r = σ(W_xr x + b_r + W_hr h)        z = σ(W_xz x + b_z + W_hz h)
        n = tanh(W_xn x + b_n + r ⊙ (W_hn h + b_hn))        h' = (1 − z) ⊙ n + z ⊙ h

    Rows of W_xh and W_hh, and of their biases: r, z, n, as in nn.GRU's weight_ih and weight_hh.
    """

    n_gates, recurrent_bias = 3, True

    def matrix(self):
        """Rows r, z, W_hn h + b_hn, W_xn x + b_n: the reset gate keeps the last two apart."""
        h, x, two = self.W_hh, self.W_xh, 2 * self.W_hh.in_features
        r_z, q_n = (
            torch.cat([h.weight, x.weight], 1)[:two],
            torch.block_diag(h.weight[two:], x.weight[two:]),
        )
        b = torch.cat([h.bias[:two] + x.bias[:two], h.bias[two:], x.bias[two:]])
        return torch.cat([torch.cat([r_z, q_n]), b[:, None]], 1)

    def step(self, p, old, new):
        q_n, n = p[len(p) // 2 :].chunk(2)
        r, z = p[: len(p) // 2].sigmoid_().chunk(2)
        torch.lerp(tanh_(n.addcmul_(r, q_n)), old[0], z, out=new[0])
        return (p,)

    def back(self, grad, old, new, d, p):
        (grad,), (h,), two = grad, old, 2 * len(old[0])
        (r, z, q_n, n), (d_r, d_z, d_q, d_n) = p.chunk(4), d.chunk(4)
        direct = grad * z
        tanh_backward.grad_input(grad - direct, n, grad_input=d_n)
        torch.mul(d_n, r, out=d_q)
        torch.mul(d_n, q_n, out=d_r)
        torch.mul(grad, h - n, out=d_z)
        sigmoid_backward.grad_input(d[:two], p[:two], grad_input=d[:two])
        return [direct]


class LSTMCell(Cell):
    """Long short-term memory (Hochreiter and Schmidhuber 1997; the forget gate: Gers 2000). A state
    is a pair (h, c).

        i, f, o = σ(W_x x + b + W_h h), each with its own weights
        g = tanh(W_xg x + b_g + W_hg h)
        c' = f ⊙ c + i ⊙ g        h' = o ⊙ tanh(c')

    Rows of W_xh and W_hh: i, f, g, o, as in nn.LSTM's; b is the sum of its two biases.
    """

    n_gates, n_parts = 4, 2

    def step(self, p, old, new):
        p.chunk(4)[2].mul_(2.0)  # tanh(g) = 2σ(2g) − 1: one call serves all gates
        i, f, g, o = p.sigmoid_().chunk(4)
        g.mul_(2.0).sub_(1.0)
        tanh_c = tanh_(torch.mul(f, old[1], out=new[1]).addcmul_(i, g).clone())
        torch.mul(o, tanh_c, out=new[0])
        return p, tanh_c

    def back(self, grad, old, new, d, p, tanh_c):
        (grad_h, grad_c), two = grad, 2 * len(tanh_c)
        (i, f, g, o), (d_i, d_f, d_g, d_o) = p.chunk(4), d.chunk(4)
        grad_c = tanh_backward(grad_h * o, tanh_c).add_(grad_c)
        torch.mul(grad_c, g, out=d_i)
        torch.mul(grad_c, old[1], out=d_f)
        sigmoid_backward.grad_input(d[:two], p[:two], grad_input=d[:two])
        tanh_backward.grad_input(grad_c * i, g, grad_input=d_g)
        sigmoid_backward.grad_input(grad_h * tanh_c, o, grad_input=d_o)
        return [None, grad_c.mul_(f)]


class Scan(torch.autograd.Function):
    """A cell over all steps, and back-propagation through time (BPTT, 随时间反向传播; Werbos 1990)
    by hand.

    A step is one product, W [h; x; 1], and two on the way back, and what lies between stays in the
    CPU's cache. Where valid (T, 1, B) is False, past its end, a sequence's state and gradient
    stand. First derivatives only.
    """

    @staticmethod
    def forward(ctx, cell, x, valid, W, *state):
        (T, n_in, B), H = x.shape, len(state[0])
        # [h; x; 1] of each step, and the state after the last
        z = x.new_empty(T + 1, H + n_in + 1, B)
        z[0, :H], z[:T, H:-1], z[:, -1] = state[0], x, 1
        states = [
            z[:, :H],
            *(torch.cat([part[None], part.new_empty(T, *part.shape)]) for part in state[1:]),
        ]
        at, kept = list(zip(*states, strict=True)), []  # at[t]: the state before step t
        for t in range(T):
            kept.append(cell.step(product(W, z[t].mT), at[t], at[t + 1]))
            for old, new in zip(at[t], at[t + 1], strict=True) if valid is not None else ():
                torch.where(valid[t], new, old, out=new)
        ctx.cell, ctx.kept = cell, kept
        ctx.save_for_backward(valid, W, z, *states)
        # what the loss does not use has no gradient, rather than one of zeros
        ctx.set_materialize_grads(False)
        return states[0][1:], *(part[-1].clone() for part in states)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_outputs, *grad):
        valid, W, z, *states = ctx.saved_tensors
        at, H = list(zip(*states, strict=True)), states[0].shape[1]
        grad = [
            torch.zeros_like(part[0]) if g is None else g
            for g, part in zip(grad, states, strict=True)
        ]
        # h's columns, and x's if they are wanted
        W_back = W[:, : -1 if ctx.needs_input_grad[1] else H].mT.contiguous()
        d, dx, dW = (
            W.new_empty(len(W), z.shape[2]),
            torch.empty_like(z[1:, H : len(W_back)]),
            torch.zeros_like(W),
        )
        for t in reversed(range(len(dx))):
            grad[0] = grad[0] if grad_outputs is None else grad[0] + grad_outputs[t]
            direct, *rest = ctx.cell.back(grad, at[t], at[t + 1], d, *ctx.kept[t])
            if valid is not None:
                d.mul_(valid[t])
            dz = product(W_back, d.mT)
            dx[t] = dz[H:]
            dW += product(d, z[t])
            new = [dz[:H] if direct is None else direct.add_(dz[:H]), *rest]
            grad = (
                new
                if valid is None
                else [torch.where(valid[t], *pair) for pair in zip(new, grad, strict=True)]
            )
        return None, dx if ctx.needs_input_grad[1] else None, None, dW, *grad


class Recurrent(nn.Module):
    """Layers of cells over whole sequences, of any length, in one direction or both; nn.RNN, nn.GRU
    or nn.LSTM by hand.

    forward(x, lengths, state): x (B, T, n_in); lengths (B,) of 1 … T, None is T; state (C, B,
    n_hidden), layer by layer and forwards before backwards, None is zeros, for an LSTM a pair ->
    outputs (B, T, n_hidden · directions), zero past a sequence's end, where x has no influence, and
    the state after each one's last step. ValueError on other shapes.
    """

    def __init__(
        self, cell="rnn", n_in=28, n_hidden=128, n_layers=1, bidirectional=False, dropout=0.0
    ):
        super().__init__()
        if cell not in CELLS or n_layers < 1:
            raise ValueError(
                f"at least one layer of {', '.join(CELLS)} expected, not {n_layers=}, {cell=}"
            )
        # of what a layer hands to the next
        self.n_directions, self.dropout = 2 if bidirectional else 1, dropout
        sizes = [n_in] + [self.n_directions * n_hidden] * (n_layers - 1)
        self.cells = nn.ModuleList(
            CELLS[cell](size, n_hidden) for size in sizes for _ in range(self.n_directions)
        )

    def forward(self, x: Tensor, lengths=None, state=None):
        cell, n, valid, last = self.cells[0], self.n_directions, None, []
        if x.ndim != 3 or x.shape[1] == 0 or x.shape[2] != cell.W_xh.in_features:
            raise ValueError(
                f"sequences (B, T, {cell.W_xh.in_features}), T >= 1, expected, not {tuple(x.shape)}"
            )
        B, T, _ = x.shape
        parts = cell.parts(state, (len(self.cells), B, cell.W_hh.in_features), x)
        x, reverse = x.permute(1, 2, 0), functools.partial(torch.flip, dims=(0,))  # (T, F, B)
        if lengths is not None:
            lengths = torch.as_tensor(lengths, device=x.device)
            if (
                lengths.shape != (B,)
                or lengths.is_floating_point()
                or ((lengths < 1) | (lengths > T)).any()
            ):
                raise ValueError(
                    f"lengths must be {B} whole numbers in 1 … {T}, not {lengths.tolist()}"
                )
            valid = (step := torch.arange(T, device=x.device)[:, None, None]) < lengths  # (T, 1, B)
            x = x.masked_fill(~valid, 0)
            # padding stays behind, where nothing reads it
            order = torch.where(valid, lengths - 1 - step, step)
            reverse = functools.partial(torch.take_along_dim, indices=order, dim=0)
        for layer in range(0, len(self.cells), n):
            x, outputs = F.dropout(x, self.dropout, self.training and layer > 0), []
            for i in range(layer, layer + n):
                y, *end = self.cells[i].scan(
                    reverse(x) if i > layer else x, [part[i] for part in parts], valid
                )
                outputs.append(reverse(y) if i > layer else y)
                last.append(end)
            x = torch.cat(outputs, 1) if n > 1 else outputs[0]  # (T, n·H, B)
            x = x if valid is None else x.masked_fill(~valid, 0)
        state = tuple(torch.stack(part) for part in zip(*last, strict=True))
        return x.permute(2, 0, 1), state if len(state) > 1 else state[0]


CELLS = {
    "rnn": RNNCell,
    "rnn_relu": functools.partial(RNNCell, activation="relu"),
    "gru": GRUCell,
    "lstm": LSTMCell,
}


class RecurrentClassifier(nn.Module):
    """Recurrent layers, then one linear layer on the last state ("last") or on the mean of the
    outputs ("mean").

    forward(x, lengths): sequences (B, T, n_in), their lengths as for Recurrent -> logits (B,
    n_classes).
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
        if readout not in CHOICES["readout"]:
            raise ValueError(
                f"readout must be one of {', '.join(CHOICES['readout'])}, not {readout!r}"
            )
        self.recurrent = Recurrent(cell, n_in, n_hidden, n_layers, bidirectional, dropout)
        self.out = nn.Linear(n_hidden * self.recurrent.n_directions, n_classes)
        self.readout, self.dropout = readout, nn.Dropout(dropout)

    def forward(self, x: Tensor, lengths=None) -> Tensor:
        outputs, state = self.recurrent(x, lengths)
        if self.readout == "mean":
            steps = (
                x.shape[1]
                if lengths is None
                else torch.as_tensor(lengths, device=x.device)[:, None]
            )
            return self.out(self.dropout(outputs.sum(1) / steps))
        return self.of_state(state)

    def of_state(self, state) -> Tensor:
        h = state[0] if isinstance(state, tuple) else state
        # top layer, each direction
        return self.out(self.dropout(torch.cat([*h[-self.recurrent.n_directions :]], 1)))


@torch.no_grad()
def initialise(model: RecurrentClassifier, init: str) -> None:
    """Draw W_hh anew, gate by gate, and set b_xh to 0; "default" keeps nn.Linear's U(±1 /
    √n_hidden), as in nn.RNN.

    "orthogonal" keeps the length of what passes (Saxe 2014), "large" doubles it, "identity" is for
    ReLU (Le 2015).
    """
    for cell in model.recurrent.cells if init != "default" else ():
        nn.init.zeros_(cell.W_xh.bias)
        for gate in cell.W_hh.weight.chunk(cell.n_gates):
            nn.init.eye_(gate) if init == "identity" else nn.init.orthogonal_(
                gate, 2.0 if init == "large" else 1.0
            )


# -------- 5. Training -----------------------------------------------------------------------------


@runner.inference
def evaluate(model: nn.Module, split: Split) -> dict:
    """Loss (nats), accuracy, macro precision, recall and F1 (0 … 1), and the confusion matrix, with
    dropout off.
    """
    # (N, 28, 28) each
    views = (split.images, split.images.flip(2)) if model.both_views else (split.images,)
    logits = sum(torch.cat([model(images) for images in view.split(1000)]) for view in views) / len(
        views
    )
    matrix = metrics.confusion_matrix(logits.argmax(1), split.labels, logits.shape[1])
    return metrics.scores(matrix) | {
        "loss": F.cross_entropy(logits, split.labels).item(),
        "confusion": matrix,
    }


def build(config: Config, device: torch.device) -> RecurrentClassifier:
    """The Config's network, on the device, with weights drawn from the Config's seed: images (B,
    28, 28) -> logits.
    """
    torch.manual_seed(config.seed)
    sizes = (
        sequences(torch.zeros(1, 28, 28), config)[0].shape[2],
        config.n_hidden,
        config.n_layers,
        len(CLASSES),
    )
    model = RecurrentClassifier(
        config.cell, *sizes, config.bidirectional, config.readout, config.dropout
    )
    # it is called with images
    model.register_forward_pre_hook(lambda model, args: sequences(*args, config))
    initialise(model, config.init)
    model.both_views = config.both_views
    return model.to(device)


def train(
    config: Config, data: Data, bar: tqdm | None = None
) -> tuple[RecurrentClassifier, list[dict]]:
    """Train the Config's network: the model, and a history row for each of n_logs evenly spaced
    steps.

    A row's train_loss is the mean since the row before. Between rows nothing waits for the device,
    but for the check of lengths, where they are told. A loss that is not finite ends the run at the
    next row, which then holds it.
    """
    images, labels = (part[: config.n_train] for part in data.train)
    device = images.device
    model = build(config, device)
    optimizer = OPTIMIZERS[config.optimizer](
        parameter_groups(model, config.weight_decay), lr=config.lr, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(one_cycle, config))
    logged = {math.ceil(config.n_steps * (i + 1) / config.n_logs) for i in range(config.n_logs)}
    history, since, loss_sum, start = [], 0, torch.zeros((), device=device), time.perf_counter()

    for step, batch in zip(
        range(1, config.n_steps + 1), batches(len(images), config, device), strict=False
    ):
        # (B, 28, 28)
        x = runner.augmented(images.index_select(0, batch), config.flip, config.shift)
        # stage 1 writes it out
        loss = F.cross_entropy(model(x), labels[batch], label_smoothing=config.label_smoothing)
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
            history.append(runner.history_row(config, step, train_loss, val, grad_norm, start))
            if bar is not None:
                bar.update(step - since)
            since = step
            loss_sum.zero_()
            if runner.status(history) == "diverged":
                break
    return model, history


# -------- 6. Experiments --------------------------------------------------------------------------


def execute(run: Run, data: Data, bar: tqdm) -> dict[str, list[dict]]:
    """Train and measure one run: its rows for every table. Only the selected models ever see the
    test images.
    """
    model, history = train(run.config, data, bar)
    model.eval()
    tables = runner.tables_of(
        run, model, history, evaluate(model, data.val), data.val.images.device
    )
    if run.experiment in SELECTED.values():
        tables |= runner.test_tables(run, evaluate(model, data.test))
        tables["reading"] = [
            run.name | line for line in read_step_by_step(model, run.config, data.test)
        ]
    if run.experiment == "faults":
        tables |= runner.fault_tables(run, FAULTS, model, history, data)
    if run.experiment == "memory" and run.config.padding == 0:
        models = {
            "before training": build(run.config, data.val.images.device),
            "after training": model,
        }
        norms = [
            (w, *row)
            for w, m in models.items()
            for row in enumerate(state_gradients(m, run.config, data), 1)
        ]
        tables["gradients"] = [
            run.name | {"when": when, "step": t, "grad_norm": norm} for when, t, norm in norms
        ]
    return tables


def state_gradients(model: RecurrentClassifier, config: Config, data: Data) -> list[float]:
    """Norm of the loss's gradient with respect to the state after each of T steps, on 500
    validation images.
    """
    x, state, states = sequences(data.val.images[::10], config)[0], None, []
    for step in x.split(1, 1):  # one at a time, so that each state is a tensor of its own
        _, state = model.recurrent(step, state=state)
        states.append(state if isinstance(state, tuple) else (state,))
        for part in states[-1]:
            part.retain_grad()
    F.cross_entropy(model.of_state(state), data.val.labels[::10]).backward()
    return [
        torch.stack([part.grad for part in parts if part.grad is not None]).norm().item()
        for parts in states
    ]


@torch.no_grad()
def read_step_by_step(model: RecurrentClassifier, config: Config, split: Split) -> list[dict]:
    """The class probabilities of a few images after every step: the same model on ever longer
    beginnings of them.
    """
    x, rows = sequences(split.images[:8], config)[0], []  # (B, T, F)
    for t in range(1, x.shape[1] + 1):
        # forward itself takes sequences
        for i, shares in enumerate(model.forward(x[:, :t]).softmax(1).tolist()):
            row = {"image": i, "true": split.labels[i].item(), "step": t} | {
                f"p{c}": p for c, p in enumerate(shares)
            }
            rows.append(
                row | {"pixels": " ".join(f"{pixel:.2f}" for pixel in x[i, t - 1].tolist())}
            )
    return rows


ACCURACY = ("validation accuracy (%)", lambda model, history, *_: 100 * history[-1]["val_accuracy"])
EXPLODING = {"cell": "rnn_relu", "init": "large", "optimizer": "sgd", "lr": 0.1}
PADDED = {"cell": "gru", "init": "orthogonal", "crop": True, "padding": 28}
FAULTS = {
    "vanishing gradient": Fault(
        "the first rows teach nothing",
        "∂ loss / ∂ state: first step / last, at the start",
        lambda _, __, c, data: (
            (g := state_gradients(build(c, data.val.labels.device), c, data))[0] / g[-1]
        ),
        LAST | {"cell": "rnn", "init": "default"},
        "ReLU, identity",
        LAST | {"cell": "rnn_relu", "init": "identity"},
    ),
    "exploding gradient": Fault(
        "W_hh doubles what passes: updates throw the weights away",
        *ACCURACY,
        EXPLODING | {"clip": 0.0},
        "gradient norm clipped at 1",
        EXPLODING | {"clip": 1.0},
    ),
    "last output of padded sequences": Fault(
        "read after the padding, which wipes the state",
        *ACCURACY,
        PADDED,
        "lengths given: the state after the last true step",
        PADDED | {"lengths": True},
    ),
    "another data set's normalisation": Fault(
        "MNIST's mean and std: pixels not centred",
        *ACCURACY,
        {"normalise": "mnist"},
        "Fashion-MNIST's own",
        {"normalise": "fashion_mnist"},
    ),
}


def benchmark(config: Config, data: Data, data_dir: Path, repeats: int) -> dict[str, list[dict]]:
    """A training step of ours against torch's own modules, and against a step's matrix products
    alone: steps/s.
    """
    device, n, works = data.train.images.device, config.steps or 5, {}
    for cell, H, B in itertools.product(("rnn", "gru", "lstm"), (64, 128, 256), (128, 512)):
        x, y = data.train.images[:B], data.train.labels[:B]
        ours = RecurrentClassifier(cell, 28, H).to(device)
        theirs = nn.ModuleList(
            [getattr(nn, cell.upper())(28, H, batch_first=True), nn.Linear(H, 10)]
        ).to(device)
        W, z = ours.recurrent.cells[0].matrix().detach(), torch.randn(H + 28 + 1, B, device=device)
        W_back, d = W[:, :H].mT.contiguous(), torch.randn(len(W), B, device=device)
        # to the gates, back to the state, to the weights
        pairs = [(W, z.mT), (W_back, d.mT), (d, z)]
        group, timed = f"steps/s, {cell}, hidden {H}, batch {B}", runner.training_steps
        works[group, f"nn.{cell.upper()}"] = (
            n,
            timed(lambda m=theirs, x=x: m[1](m[0](x)[0][:, -1]), theirs, y, n),
        )
        works[group, "ours"] = (n, timed(functools.partial(ours, x), ours, y, n))
        works[group, "products alone"] = (
            n,
            lambda p=pairs: [product(*pair) for _ in range(28 * n) for pair in p],
        )
    return {"benchmark": runner.interleaved(works, repeats, device)}


# -------- 7. Pictures -----------------------------------------------------------------------------


def plot(figures: Path) -> list[Path]:
    """Draw every picture and summary.md from the saved rows; gives their paths. FileNotFoundError
    if there are none.
    """
    album = runner.Album(figures, "RNN on Fashion-MNIST")
    album.selected(CLASSES)
    album.reading(CLASSES)
    album.sweeps(AXES)
    memory = {"who remembers the image?": album.runs.get("memory", [])}
    album.lines(
        "memory", memory, "cell", "padding", "val_accuracy", "validation accuracy (%)", percent=True
    )
    album.faults()
    gradients = runner.group(runner.read_rows(figures / "gradients.csv"), "when")
    album.lines(
        "state_gradients", gradients, "value", "step", "grad_norm", "norm of ∂ loss / ∂ state"
    )
    album.benchmark()
    return album.close()


# -------- 8. Command line -------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    return runner.run_stage(sys.modules[__name__], {"benchmark": benchmark}, argv)


if __name__ == "__main__":
    sys.exit(main())
