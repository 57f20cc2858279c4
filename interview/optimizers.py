"""Optimizers by hand: SGD with momentum, Adagrad, RMSprop, Adam, AdamW (手撕优化器).

    python -m interview.optimizers               tables and pictures into figures/interview/, 2 min
    python -m interview.optimizers --out DIR     the same into DIR

Read `SGD` and `Adam` first. An optimizer is its `update`: what a step does to one parameter w with
gradient g. Everything that it remembers of a parameter starts at 0.

    SGD        v = μ v + g                                            w = w − lr v
    Adagrad    s = s + g²                                             w = w − lr g / (√s + ε)
    RMSprop    s = α s + (1 − α) g²                                   w = w − lr g / (√s + ε)
    Adam       m = β₁ m + (1 − β₁) g,   s = β₂ s + (1 − β₂) g²        w = w − lr m̂ / (√ŝ + ε)
               m̂ = m / (1 − β₁ᵗ),   ŝ = s / (1 − β₂ᵗ)
    AdamW      w = (1 − lr λ) w, then Adam's step by the gradient alone

1. SGD and momentum (随机梯度下降、动量)
   Asked     "Batch, stochastic and mini-batch descent: which, and why? What does momentum do?"
             「批量、随机、小批量梯度下降的区别？动量起什么作用？」
   Idea      Go against the gradient of a few examples. Momentum steps by a sum of past gradients:
             across a ravine they cancel, along it they add up, to 1 / (1 − μ) times one gradient.
   Cost      O(P) a step for P parameters. Memory: nothing; with momentum one copy of them.
   追问      How large may lr be? 2 / L for the largest curvature L, else it diverges; with momentum
             2 (1 + μ) / L. Nesterov? The gradient a step ahead. Why mini-batches? The noise of the
             mean falls with √B only, while one product serves B images.
   Mistakes  v = μ v + (1 − μ) g: another lr. lr inside v or outside: the same until lr changes.
             Gradients not set to zero: they add up.

2. Adagrad, RMSprop
   Asked     "Why does each parameter want its own rate? What is wrong with Adagrad's?"
             「为什么要自适应学习率？Adagrad 有什么缺点，RMSprop 怎么改？」
   Idea      Divide by the root of the squared gradients: steep directions slow down, rare features
             step far. Adagrad sums them, so its steps only shrink. RMSprop averages the recent
             ones.
   Cost      O(P) a step; one copy of the parameters.
   追问      Which problems suit Adagrad? Sparse ones (words, clicks). Does RMSprop come to rest?
             Its steps are about lr long however small the gradient: lr must fall. Is the rate of
             each weight always a gain? Only where the ravine lies along the axes: turned, Adagrad
             is as slow as the others (the table shows it); SGD does not see the difference.
   Mistakes  ε inside the root (it is outside, in torch). α for 1 − α.

3. Adam, AdamW
   Asked     "Write Adam. Why the bias correction? AdamW against Adam with L2?"
             「手写 Adam。为什么要偏差修正？AdamW 和 Adam + L2 有什么区别？」
   Idea      Momentum's direction over RMSprop's length. m and s start at 0, so they are too small
             by 1 − βᵗ at step t; dividing by that mends it. The first step is lr · sign(g)
             (RMSprop, uncorrected: lr / √(1 − α), ten times as long).
   Cost      O(P) a step; two copies of the parameters (with weight and gradient: 16 bytes each in
             float32).
   追问      L2 goes into g, and is divided by √ŝ: weights with large gradients decay least. AdamW
             takes lr λ off every weight alike. Why warm-up? Early ŝ stands on few gradients. Why
             does Adam fail to converge at times? AMSGrad's example: s forgets.
   Mistakes  "AdamW is Adam plus L2." t counts from 0: division by 0. √ŝ + ε as √(ŝ + ε). m̂ of the
             step before.
"""

import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import torch
import tyro
from torch import Tensor, nn

import metrics
import stage1_mlp
from stage1_mlp import Split

ROOT = Path(__file__).resolve().parent.parent


# ---- What all five share --------------------------------------------------------------------


def check_not_negative(**values: float) -> None:
    """ValueError for the first named value that is no finite number of at least 0."""
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and at least 0, not {value!r}")


def check_share(**values: float) -> None:
    """ValueError for the first named value, a share of the past, that is not in [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must lie in [0, 1), not {value!r}")


def check_parameters(params: Iterable[Tensor]) -> list[Tensor]:
    """The parameters as a list; ValueError unless they are distinct leaf tensors."""
    if isinstance(params, Tensor):
        raise ValueError(f"params must be several tensors, not one of shape {tuple(params.shape)}")
    params = list(params)  # a generator, as model.parameters(), can be read once only
    if not params:
        raise ValueError("params must hold one tensor or more, not none")
    for parameter in params:
        if not isinstance(parameter, Tensor):
            raise ValueError(f"params must hold tensors, not {type(parameter).__name__}")
        if not parameter.is_leaf:
            shape = tuple(parameter.shape)
            raise ValueError(f"params must be leaves, not results: one of shape {shape} is not")
    if len({id(parameter) for parameter in params}) < len(params):
        raise ValueError(f"params holds the same tensor twice, among {len(params)}")
    return params


class Optimizer:
    """What the optimizers share: the parameters, what is remembered of each, zero_grad and step.

    params are tensors, or a generator of them, that the optimizer changes in place. ValueError on a
    negative lr or weight_decay, and on params that cannot be trained.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float = 0.0):
        check_not_negative(lr=lr, weight_decay=weight_decay)
        self.params = check_parameters(params)
        self.lr = lr
        self.weight_decay = weight_decay
        self.state = [defaultdict(float) for _ in self.params]  # every sum and average starts at 0

    def zero_grad(self) -> None:
        """Forget the gradients, which backward() would otherwise add to."""
        for parameter in self.params:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient; the others stay as they are."""
        for parameter, state in zip(self.params, self.state, strict=True):
            if parameter.grad is not None:
                self.update(parameter, parameter.grad, state)

    def update(self, w: Tensor, g: Tensor, state: dict) -> None:
        """Change w in place, by its gradient g of the same shape."""
        raise NotImplementedError


# ---- The five -------------------------------------------------------------------------------


class SGD(Optimizer):
    """v = μ v + g, w = w − lr v; without momentum w = w − lr g (Polyak 1964, in torch's form).

    As torch.optim.SGD(params, lr, momentum, weight_decay=…). weight_decay λ adds λ w to the
    gradient: the gradient of ½ λ |w|² (L2). ValueError unless momentum μ is in [0, 1).
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, lr, weight_decay)
        check_share(momentum=momentum)
        self.momentum = momentum

    def update(self, w: Tensor, g: Tensor, state: dict) -> None:
        g = g + self.weight_decay * w
        state["v"] = self.momentum * state["v"] + g  # velocity
        w -= self.lr * state["v"]  # in place: w is the model's own tensor


class Adagrad(Optimizer):
    """s = s + g², w = w − lr g / (√s + ε): a rate of its own for each weight (Duchi et al. 2011).

    As torch.optim.Adagrad. weight_decay is L2, as in SGD.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.01,
        weight_decay: float = 0.0,
        eps: float = 1e-10,
    ):
        super().__init__(params, lr, weight_decay)
        check_not_negative(eps=eps)
        self.eps = eps

    def update(self, w: Tensor, g: Tensor, state: dict) -> None:
        g = g + self.weight_decay * w
        state["s"] = state["s"] + g.square()  # never falls
        w -= self.lr * g / (state["s"].sqrt() + self.eps)


class RMSprop(Optimizer):
    """s = α s + (1 − α) g², w = w − lr g / (√s + ε) (Tieleman and Hinton 2012, lecture 6.5).

    As torch.optim.RMSprop without momentum. weight_decay is L2, as in SGD. ValueError unless alpha
    is in [0, 1).
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.01,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, lr, weight_decay)
        check_share(alpha=alpha)
        check_not_negative(eps=eps)
        self.alpha = alpha
        self.eps = eps

    def update(self, w: Tensor, g: Tensor, state: dict) -> None:
        g = g + self.weight_decay * w
        state["s"] = self.alpha * state["s"] + (1 - self.alpha) * g.square()  # mean of recent g²
        w -= self.lr * g / (state["s"].sqrt() + self.eps)


class Adam(Optimizer):
    """Momentum and RMSprop, both corrected for their start at 0 (Kingma and Ba 2015, algorithm 1).

    As torch.optim.Adam. weight_decay is L2, as in SGD, and so is divided by √ŝ too. ValueError
    unless both betas are in [0, 1).
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, lr, weight_decay)
        if len(betas) != 2:
            raise ValueError(f"betas must be two numbers, not {betas!r}")
        check_share(**{"betas[0]": betas[0], "betas[1]": betas[1]})
        check_not_negative(eps=eps)
        self.betas = betas
        self.eps = eps

    def update(self, w: Tensor, g: Tensor, state: dict) -> None:
        self.move(w, g + self.weight_decay * w, state)

    def move(self, w: Tensor, g: Tensor, state: dict) -> None:
        """Adam's own step, without weight decay."""
        beta1, beta2 = self.betas
        state["t"] += 1
        state["m"] = beta1 * state["m"] + (1 - beta1) * g  # mean of recent g
        state["s"] = beta2 * state["s"] + (1 - beta2) * g.square()  # mean of recent g²
        m_hat = state["m"] / (1 - beta1 ** state["t"])
        s_hat = state["s"] / (1 - beta2 ** state["t"])
        w -= self.lr * m_hat / (s_hat.sqrt() + self.eps)


class AdamW(Adam):
    """w = (1 − lr λ) w, then Adam's step by g alone (Loshchilov and Hutter 2019, alg. 2).

    As torch.optim.AdamW: the decay never meets √ŝ, so every weight decays by the same share.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        super().__init__(params, lr, betas, eps, weight_decay)

    def update(self, w: Tensor, g: Tensor, state: dict) -> None:
        w *= 1 - self.lr * self.weight_decay
        self.move(w, g, state)


# ---- Shown at work: a ravine ----------------------------------------------------------------

CURVATURE = torch.tensor([1.0, 25.0], dtype=torch.float64)  # f(x, y) = ½ (x² + 25 y²)
START = torch.tensor([-9.0, 2.0], dtype=torch.float64)
TURN = 30  # degrees, of the second ravine: it no longer lies along the axes
N_STEPS = 300
CLOSE = 0.01  # of 90.5 at the start; the minimum is 0
RAVINE_RATES = [factor * power for power in (0.01, 0.1, 1.0) for factor in (1, 2, 3, 5, 7)]
RAVINE_RATES += [10.0, 20.0]
RAVINE = {  # name -> class, arguments; not AdamW: the minimum is at 0, where decay alone leads
    "SGD": (SGD, {}),
    "momentum 0.7": (SGD, {"momentum": 0.7}),
    "momentum 0.9": (SGD, {"momentum": 0.9}),
    "Adagrad": (Adagrad, {}),
    "RMSprop": (RMSprop, {}),
    "Adam": (Adam, {}),
}


def rotation(degrees: float) -> Tensor:
    """The (2, 2) matrix that turns a point to the left."""
    angle = math.radians(degrees)
    rows = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    return torch.tensor(rows, dtype=torch.float64)


def descend(name: str, lr: float, degrees: float) -> tuple[Tensor, Tensor]:
    """The points (N_STEPS + 1, 2) and their losses (N_STEPS + 1,) on the ravine turned so far."""
    turn = rotation(degrees)
    w = nn.Parameter(turn @ START)
    kind, arguments = RAVINE[name]
    optimizer = kind([w], lr, **arguments)
    points, losses = [], []
    for _ in range(N_STEPS + 1):
        loss = 0.5 * (CURVATURE * (turn.T @ w).square()).sum()
        points.append(w.detach().clone())
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.stack(points), torch.stack(losses)


def steps_to_stay_close(losses: Tensor) -> float:
    """The step from which on the loss stays below CLOSE.

    Infinite if there is none, or if the loss ever rises above its start: a rate that first throws
    the point out of the ravine is not what one wants.
    """
    far = (~(losses < CLOSE)).nonzero()  # NaN is far, too
    if len(far) == 0:
        return 0
    last = far[-1].item()
    if last == len(losses) - 1 or losses.max() > losses[0]:
        return math.inf
    return last + 1


def compare_on_the_ravine() -> pd.DataFrame:
    """Rows of optimizers_ravine.csv: (optimizer, degrees, lr, steps) for every rate."""
    rows = []
    for name in RAVINE:
        for degrees in (0, TURN):
            for lr in RAVINE_RATES:
                _, losses = descend(name, lr, degrees)
                row = {"optimizer": name, "degrees": degrees, "lr": lr}
                rows.append(row | {"steps": steps_to_stay_close(losses)})
    return pd.DataFrame(rows)


def best_on_the_ravine(rows: pd.DataFrame) -> pd.DataFrame:
    """The row with the fewest steps for each optimizer and ravine."""
    best = rows.groupby(["optimizer", "degrees"], sort=False)["steps"].idxmin()
    return rows.loc[best]


def draw_ravine(path: Path, best: pd.DataFrame) -> None:
    """A panel for each optimizer: its path over the level lines, at its best rate."""
    title = f"How many steps until f(x, y) = ½ (x² + 25 y²) stays below {CLOSE}?"
    explained = f"each at its best rate; in brackets: on the ravine turned by {TURN}°"
    x, y = torch.meshgrid(torch.linspace(-10, 4, 141), torch.linspace(-3, 3, 121), indexing="xy")
    level = (0.5 * (x.square() + 25 * y.square())).numpy()
    size = {"n_rows": 2, "n_columns": 3, "height": 7.0, "sharex": True, "sharey": True}
    with metrics.picture(path, f"{title}\n({explained})", **size) as panels:
        by_optimizer = best.groupby("optimizer", sort=False)
        for axes, (name, rows) in zip(panels.flat, by_optimizer, strict=True):
            straight, turned = rows.to_dict("records")
            points, _ = descend(name, straight["lr"], 0)
            lines = {"levels": [0.5, 2, 8, 20, 45, 90], "colors": "0.8", "linewidths": 1}
            axes.contour(x.numpy(), y.numpy(), level, **lines)
            style = {"color": metrics.COLORS[0], "marker": "o", "markersize": 3, "linewidth": 1.2}
            axes.plot(points[:, 0], points[:, 1], **style)
            axes.plot(0, 0, color=metrics.COLORS[1], marker="*", markersize=11)
            steps = f"{straight['steps']:.0f} steps ({turned['steps']:.0f})"
            axes.set_title(f"{name}, rate {straight['lr']:g}:\n{steps}")
            axes.set(xlim=(-10, 4), ylim=(-3, 3), xticks=range(-8, 5, 4), yticks=(-2, 0, 2))
            axes.grid(False)
        for axes in panels[1]:
            axes.set_xlabel("x (curvature 1)")
        for axes in panels[:, 0]:
            axes.set_ylabel("y (curvature 25)")


def show_ravine(out: Path) -> None:
    """optimizers_ravine.csv and .png, and the table of the best rates."""
    rows = compare_on_the_ravine()
    rows.to_csv(out / "optimizers_ravine.csv", index=False, float_format="%.6g")
    best = best_on_the_ravine(rows)
    draw_ravine(out / "optimizers_ravine.png", best)
    print(f"\nRavine (峡谷), best of {len(RAVINE_RATES)} rates: steps until f stays below {CLOSE}")
    table = best.pivot(index="optimizer", columns="degrees")
    table.columns = [f"{column}, turned {degrees}°" for column, degrees in table.columns]
    print(table.loc[list(RAVINE)].to_string(float_format="{:g}".format))


# ---- Shown at work: stage 1's network on MNIST ----------------------------------------------

BATCH_SIZE = 128
TRAIN_STEPS = 300
LOG_EVERY = 20  # steps; a row of the history is the mean loss of so many
SEEDS = [0, 1, 2]
MNIST_OPTIMIZERS = {  # name -> class, arguments, rates tried
    "SGD": (SGD, {}, [0.03, 0.1, 0.3, 1.0]),
    "momentum 0.9": (SGD, {"momentum": 0.9}, [0.01, 0.03, 0.1, 0.3]),
    "Adagrad": (Adagrad, {}, [0.003, 0.01, 0.03, 0.1]),
    "RMSprop": (RMSprop, {}, [0.0003, 0.001, 0.003, 0.01]),
    "Adam": (Adam, {}, [0.001, 0.003, 0.01, 0.03]),
    "AdamW": (AdamW, {}, [0.001, 0.003, 0.01, 0.03]),
}


def train(name: str, lr: float, seed: int, split: Split) -> tuple[nn.Module, list[float]]:
    """The 784-128-256-10 network after TRAIN_STEPS steps, and the mean loss of each LOG_EVERY."""
    torch.manual_seed(seed)
    model = stage1_mlp.MLP((128, 256))
    kind, arguments, _ = MNIST_OPTIMIZERS[name]
    optimizer = kind(model.parameters(), lr, **arguments)
    losses = []
    for batch in torch.randperm(len(split.labels)).split(BATCH_SIZE)[:TRAIN_STEPS]:
        loss = stage1_mlp.cross_entropy(model(split.images[batch]), split.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    means = [part.mean().item() for part in torch.stack(losses).split(LOG_EVERY)]
    return model, means


def compare_on_mnist(data: stage1_mlp.Data) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of optimizers_runs.csv, one a run, and of optimizers_history.csv, one a logged step."""
    runs, history = [], []
    for name, (_, _, rates) in MNIST_OPTIMIZERS.items():
        start = time.perf_counter()
        for lr in rates:
            for seed in SEEDS:
                model, losses = train(name, lr, seed, data.train)
                row = {"optimizer": name, "lr": lr, "seed": seed}
                validation = stage1_mlp.evaluate(model, data.val)
                runs.append(row | {"val_accuracy": 100 * validation["accuracy"]})
                steps = [min(LOG_EVERY * i, TRAIN_STEPS) for i in range(1, len(losses) + 1)]
                for step, loss in zip(steps, losses, strict=True):
                    history.append(row | {"step": step, "train_loss": loss})
        print(f"  {name}: {time.perf_counter() - start:.0f} s", flush=True)
    return pd.DataFrame(runs), pd.DataFrame(history)


def best_rates(runs: pd.DataFrame) -> pd.DataFrame:
    """The rate with the best mean accuracy for each optimizer: (optimizer, lr, mean, std)."""
    groups = runs.groupby(["optimizer", "lr"], sort=False)["val_accuracy"]
    means = groups.agg(["mean", "std"]).reset_index()
    return means.loc[means.groupby("optimizer", sort=False)["mean"].idxmax()]


def draw_mnist(path: Path, runs: pd.DataFrame, history: pd.DataFrame) -> None:
    """Left: error over the rate. Right: training loss over the steps, each at its best rate."""
    runs = runs.assign(error=100 - runs["val_accuracy"])
    colors = metrics.colors_of(list(MNIST_OPTIMIZERS), ordered=False)
    title = f"Which learning rate does each optimizer need? {metrics.bands_of(runs)}"
    with metrics.picture(path, title, n_columns=2, width=12, height=5.6) as (left, right):
        for name, color in colors.items():
            style = {"color": color, "label": name, "errorbar": ("pi", 100)}
            bars = {"err_style": "bars", "err_kws": {"capsize": 4}, "marker": "o"}
            rows = runs[runs["optimizer"] == name]
            metrics.draw_line(left, rows, "lr", "error", **style, **bars)
            rows = history[history["optimizer"] == name]
            metrics.draw_line(right, rows, "step", "train_loss", **style)
        metrics.log_scale(left.xaxis, runs["lr"])
        metrics.log_scale(left.yaxis, runs["error"])
        metrics.log_scale(right.yaxis, history["train_loss"])
        left.set_title(f"after {TRAIN_STEPS} steps of {BATCH_SIZE} images")
        left.set(xlabel="learning rate, constant", ylabel="validation error (%), lower is better")
        right.set_title("each at its best rate of those on the left")
        right.set(xlabel="step", ylabel=f"training loss (nats), mean of {LOG_EVERY} steps")
        lines, names = right.get_legend_handles_labels()
        left.figure.legend(lines, names, loc="outside lower center", ncols=6)


def show_mnist(out: Path, data_dir: Path) -> None:
    """Train, save the two tables and the picture, print the best rates."""
    print(f"\nMNIST, {TRAIN_STEPS} steps of {BATCH_SIZE} images: training", flush=True)
    data = stage1_mlp.load_data(data_dir)
    runs, history = compare_on_mnist(data)
    best = best_rates(runs)
    chosen = history.merge(best[["optimizer", "lr"]])
    runs.to_csv(out / "optimizers_runs.csv", index=False, float_format="%.6g")
    chosen.to_csv(out / "optimizers_history.csv", index=False, float_format="%.6g")
    draw_mnist(out / "optimizers_mnist.png", runs, chosen)
    print(f"Validation accuracy (%), mean ± std of {len(SEEDS)} seeds, at the best rate tried:")
    for row in best.to_dict("records"):
        print(f"  {row['optimizer']:14}{row['lr']:<8g}{row['mean']:.2f} ± {row['std']:.2f}")


def main(out: Path = ROOT / "figures" / "interview", data_dir: Path = ROOT / "data") -> None:
    """Show the optimizers at work: paths through a ravine, and stage 1's network on MNIST.

    Args:
        out: the folder that the tables and pictures go to.
        data_dir: the folder that holds MNIST/raw.
    """
    print("Optimizers (优化器): paths through a ravine at 17 rates each, and stage 1's network on")
    print("MNIST at 4 rates each; 72 short trainings, about 2 minutes")
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    show_ravine(out)
    show_mnist(out, data_dir)
    print(f"\ntables and pictures: {out}/optimizers_*")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except stage1_mlp.DataError as error:
        sys.exit(f"interview.optimizers: {error}")
