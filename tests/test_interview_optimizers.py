"""interview/optimizers.py: every step equal to torch.optim's."""

import math

import pandas as pd
import pytest
import torch
from conftest import ROOT
from torch import nn

from interview import optimizers

CASES = {  # ours and torch's name, arguments
    "SGD": ("SGD", {"lr": 0.1}),
    "SGD, momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "SGD, decay": ("SGD", {"lr": 0.1, "weight_decay": 0.3}),
    "SGD, momentum and decay": ("SGD", {"lr": 0.1, "momentum": 0.7, "weight_decay": 0.3}),
    "Adagrad": ("Adagrad", {}),
    "Adagrad, all": ("Adagrad", {"lr": 0.2, "weight_decay": 0.3, "eps": 1e-3}),
    "RMSprop": ("RMSprop", {}),
    "RMSprop, all": ("RMSprop", {"lr": 0.2, "alpha": 0.7, "eps": 1e-3, "weight_decay": 0.3}),
    "Adam": ("Adam", {}),
    "Adam, all": ("Adam", {"lr": 0.2, "betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.3}),
    "Adam, no memory": ("Adam", {"betas": (0.0, 0.0)}),
    "AdamW": ("AdamW", {}),
    "AdamW, all": ("AdamW", {"lr": 0.2, "betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.3}),
    "AdamW, no decay": ("AdamW", {"weight_decay": 0.0}),
}
SHAPES = [(3, 5), (7,), (), (2, 4, 6)]


def draw(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def two_sets():
    """The same parameters twice, of shapes that all differ; the last never gets a gradient."""
    return [
        [nn.Parameter(draw(shape, i)) for i, shape in enumerate([*SHAPES, (9,)])] for _ in range(2)
    ]


def give_gradients(params, step):
    """Other gradients each step, of scales from 1e-3 to 1e3; some steps leave a parameter out."""
    for i, parameter in enumerate(params[:-1]):
        scale = 10.0 ** (step % 7 - 3)
        parameter.grad = scale * draw(parameter.shape, 100 * step + i)
    if step % 3 == 1:
        params[0].grad = None


@pytest.mark.parametrize("name", CASES)
def test_every_step_equals_torch(name):
    kind, arguments = CASES[name]
    ours, theirs = two_sets()
    mine = getattr(optimizers, kind)((p for p in ours), **arguments)
    other = getattr(torch.optim, kind)(theirs, **arguments)
    before = ours[-1].detach().clone()
    for step in range(25):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        mine.step()
        other.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert torch.equal(ours[-1], before)  # never had a gradient: not even decay moves it


@pytest.mark.parametrize("name", CASES)
def test_a_network_trains_as_with_torch(name):
    kind, arguments = CASES[name]
    x, y = draw((11, 5), 1), draw((11, 3), 2)
    results = []
    for package in (optimizers, torch.optim):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
        optimizer = getattr(package, kind)(model.parameters(), **arguments)
        for _ in range(20):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        results.append(nn.utils.parameters_to_vector(model.parameters()))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["SGD", "Adagrad", "RMSprop", "Adam", "AdamW"])
def test_a_gradient_of_zero_moves_nothing(kind):
    parameter = nn.Parameter(draw((4,), 0))
    before = parameter.detach().clone()
    optimizer = getattr(optimizers, kind)([parameter], lr=0.1, weight_decay=0.0)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(parameter, before)


def test_adams_first_step_is_lr_times_the_sign():
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    parameter.grad = torch.tensor([1e-3, -5.0, 200.0], dtype=torch.float64)
    optimizers.Adam([parameter], lr=0.1, eps=0.0).step()
    torch.testing.assert_close(
        parameter.detach(), torch.tensor([-0.1, 0.1, -0.1], dtype=torch.float64)
    )


def test_step_changes_the_models_own_tensors_outside_the_graph():
    parameter = nn.Parameter(torch.ones(3))
    address = parameter.data_ptr()
    optimizer = optimizers.SGD([parameter], 0.5)
    parameter.sum().backward()
    gradient = parameter.grad
    optimizer.step()
    assert parameter.data_ptr() == address
    assert parameter.requires_grad
    assert parameter.tolist() == [0.5, 0.5, 0.5]
    assert gradient.tolist() == [1.0, 1.0, 1.0]  # a step leaves the gradient as it is
    optimizer.zero_grad()
    assert parameter.grad is None


def test_a_frozen_parameter_stays_as_it_is():
    frozen, trained = torch.ones(3), parameter()
    optimizer = optimizers.AdamW([frozen, trained], 0.1)
    (frozen * trained).sum().backward()
    optimizer.step()
    assert frozen.tolist() == [1.0, 1.0, 1.0]
    assert trained.tolist() != [1.0, 1.0, 1.0]


def parameter():
    return nn.Parameter(torch.ones(3))


@pytest.mark.parametrize("kind", ["SGD", "Adagrad", "RMSprop", "Adam", "AdamW"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -0.1}, "lr must be finite and at least 0, not -0.1"),
        ({"lr": math.nan}, "lr must be finite and at least 0, not nan"),
        ({"lr": math.inf}, "lr must be finite and at least 0, not inf"),
        ({"lr": 0.1, "weight_decay": -1}, "weight_decay must be finite and at least 0, not -1"),
    ],
)
def test_bad_rates_and_decays_are_refused(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(optimizers, kind)([parameter()], **arguments)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("SGD", {"lr": 0.1, "momentum": -0.5}, r"momentum must lie in \[0, 1\), not -0.5"),
        ("SGD", {"lr": 0.1, "momentum": 1.0}, r"momentum must lie in \[0, 1\), not 1.0"),
        ("RMSprop", {"alpha": 1.5}, r"alpha must lie in \[0, 1\), not 1.5"),
        ("RMSprop", {"eps": -1.0}, r"eps must be finite and at least 0, not -1.0"),
        ("Adagrad", {"eps": -1.0}, r"eps must be finite and at least 0, not -1.0"),
        ("Adam", {"betas": (1.0, 0.999)}, r"betas\[0\] must lie in \[0, 1\), not 1.0"),
        ("Adam", {"betas": (0.9, -0.1)}, r"betas\[1\] must lie in \[0, 1\), not -0.1"),
        ("AdamW", {"betas": (0.9, math.nan)}, r"betas\[1\] must lie in \[0, 1\), not nan"),
        ("AdamW", {"betas": (0.9,)}, r"betas must be two numbers, not \(0.9,\)"),
        ("AdamW", {"eps": math.nan}, r"eps must be finite and at least 0, not nan"),
    ],
)
def test_other_bad_arguments_are_refused(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(optimizers, kind)([parameter()], **arguments)


def test_parameters_that_cannot_be_trained_are_refused():
    with pytest.raises(ValueError, match="one tensor or more, not none"):
        optimizers.SGD([], 0.1)
    with pytest.raises(ValueError, match=r"several tensors, not one of shape \(3,\)"):
        optimizers.SGD(parameter(), 0.1)
    with pytest.raises(ValueError, match="params must hold tensors, not dict"):
        optimizers.SGD([{"params": [parameter()]}], 0.1)
    with pytest.raises(ValueError, match=r"leaves, not results: one of shape \(3,\) is not"):
        optimizers.SGD([2 * parameter()], 0.1)
    shared = parameter()
    with pytest.raises(ValueError, match="the same tensor twice, among 3"):
        optimizers.SGD([shared, parameter(), shared], 0.1)


# ---- the demonstration ----


@pytest.mark.parametrize(
    ("losses", "steps"),
    [
        ([1.0, 0.5, 0.001, 0.002], 2),
        ([1.0, 0.001, 0.5, 0.002], 3),  # close, away again, back
        ([1.0, 0.5, 0.4, 0.3], math.inf),
        ([1.0, 0.001, math.nan, math.nan], math.inf),
        ([1.0, 1.1, 0.001, 0.002], math.inf),  # thrown out of the ravine first
        ([0.0, 0.0, 0.0, 0.0], 0),
    ],
)
def test_steps_to_stay_close(losses, steps):
    assert optimizers.steps_to_stay_close(torch.tensor(losses)) == steps


def test_descent_by_sgd_follows_its_closed_form():
    lr, degrees = 0.05, 30
    points, losses = optimizers.descend("SGD", lr, degrees)
    factors = (1 - lr * optimizers.CURVATURE) ** torch.arange(optimizers.N_STEPS + 1)[:, None]
    along = factors * optimizers.START  # (steps, 2), in the ravine's own axes
    torch.testing.assert_close(points @ optimizers.rotation(degrees), along, rtol=1e-9, atol=1e-9)
    expected = 0.5 * (along[:, 0] ** 2 + 25 * along[:, 1] ** 2)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-12)


def test_main_saves_its_tables_and_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(optimizers, "RAVINE_RATES", [0.05, 0.2])
    monkeypatch.setattr(optimizers, "N_STEPS", 20)
    monkeypatch.setattr(optimizers, "TRAIN_STEPS", 5)
    monkeypatch.setattr(optimizers, "LOG_EVERY", 2)
    monkeypatch.setattr(optimizers, "SEEDS", [0, 1])
    optimizers.main(out=tmp_path / "new" / "folder", data_dir=ROOT / "data")
    names = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert names == {
        *("optimizers_ravine.csv", "optimizers_ravine.png"),
        *("optimizers_runs.csv", "optimizers_history.csv", "optimizers_mnist.png"),
    }
    rows = pd.read_csv(tmp_path / "new" / "folder" / "optimizers_runs.csv")
    assert len(rows) == 6 * 4 * 2  # optimizers, rates, seeds
    history = pd.read_csv(tmp_path / "new" / "folder" / "optimizers_history.csv")
    assert len(history) == 6 * 2 * 3  # of the best rate alone, at steps 2, 4 and 5
    assert set(history["step"]) == {2, 4, 5}
    assert "±" in capsys.readouterr().out
