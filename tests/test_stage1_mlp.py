"""Stage 1 against torch's own modules."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import read
from torch import nn
from torch.nn import functional as F

import metrics
import stage1_mlp as stage

SMALL = stage.Config(hidden=(9, 7), n_train=300, batch_size=32, steps=12, n_logs=3)


@pytest.fixture(scope="session")
def data():
    return stage.load_data(stage.Config())


def double_mlp(**sizes):
    torch.manual_seed(0)
    return stage.MLP(**sizes).double()


# ---- the loss ----


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_cross_entropy_equals_torch(smoothing, scale):
    torch.manual_seed(1)
    ours = (scale * torch.randn(5, 7, dtype=torch.float64)).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    target = torch.tensor([0, 6, 3, 3, 1])
    loss, expected = (
        stage.cross_entropy(ours, target, smoothing),
        F.cross_entropy(theirs, target, label_smoothing=smoothing),
    )
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)


def test_cross_entropy_stays_finite_where_the_formula_overflows():
    logits = torch.tensor([[3e38, 0.0, -3e38], [1000.0, 999.0, -1000.0]], requires_grad=True)
    loss = stage.cross_entropy(logits, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * math.log1p(math.e), rel=1e-6)
    assert logits.grad.isfinite().all()
    assert not stage.LOSSES["naive"](logits, torch.tensor([0, 1]), 0.0).isfinite()


def test_cross_entropy_passes_gradcheck():
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([2, 0, 1, 2])
    assert torch.autograd.gradcheck(lambda z: stage.cross_entropy(z, target, 0.2), logits)


def test_softmax_twice_cannot_fall_below_its_floor():
    certain = torch.full((1, 10), -1e4).index_fill(1, torch.tensor([4]), 1e4)
    floor = stage.LOSSES["softmax_twice"](certain, torch.tensor([4]), 0.0).item()
    assert floor == pytest.approx(math.log(1 + 9 / math.e), abs=1e-6)
    assert floor == pytest.approx(1.4612, abs=1e-4)


@pytest.mark.parametrize(("shape", "n"), [((4, 3), 5), ((4,), 4), ((2, 3, 5), 2)])
def test_cross_entropy_quotes_bad_shapes(shape, n):
    with pytest.raises(ValueError, match=rf"\({shape[0]},.*\({n},\)"):
        stage.cross_entropy(torch.zeros(shape), torch.zeros(n, dtype=torch.int64))


# ---- the network and its gradient ----


def test_the_default_network_has_the_parameters_of_the_brief():
    model = stage.MLP()
    assert [tuple(layer.weight.shape) for layer in model.layers] == [(128, 784), (256, 128), (10, 256)]
    assert sum(p.numel() for p in model.parameters()) == 136_074


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("sigmoid", nn.Sigmoid),
        ("tanh", nn.Tanh),
        ("relu", nn.ReLU),
        ("leaky_relu", nn.LeakyReLU),
        ("gelu", nn.GELU),
        ("silu", nn.SiLU),
    ],
)
def test_forward_equals_torch_sequential(name, module):
    model = double_mlp(hidden=(7, 5), n_in=12, n_classes=3, activation=name)
    theirs = nn.Sequential(nn.Linear(12, 7), module(), nn.Linear(7, 5), module(), nn.Linear(5, 3)).double()
    for ours, copy in zip(model.parameters(), theirs.parameters(), strict=True):
        copy.data.copy_(ours)
    images = torch.randn(4, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(model(images), theirs(images.flatten(1)), rtol=0, atol=0)


@pytest.mark.parametrize("hidden", [(), (6,), (7, 5), (8, 3, 9)])
def test_backprop_equals_autograd(hidden):
    model = double_mlp(hidden=hidden, n_in=11, n_classes=4)
    images, target = torch.randn(5, 11, dtype=torch.float64), torch.tensor([3, 0, 0, 2, 1])
    by_hand = stage.backprop(model, images, target)
    F.cross_entropy(model(images), target).backward()
    assert by_hand.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(by_hand[name], parameter.grad, rtol=1e-12, atol=1e-14, msg=name)


def test_backprop_refuses_what_it_does_not_derive():
    images, target = torch.zeros(2, 784), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="tanh"):
        stage.backprop(stage.MLP(activation="tanh"), images, target)
    with pytest.raises(ValueError, match=r"0\.3"):
        stage.backprop(stage.MLP(dropout=0.3), images, target)
    stage.backprop(stage.MLP(dropout=0.3).eval(), images, target)


def test_model_quotes_bad_sizes():
    with pytest.raises(ValueError, match=r"784.*\(2, 27, 28\)"):
        stage.MLP()(torch.zeros(2, 27, 28))
    with pytest.raises(ValueError, match="swish"):
        stage.MLP(activation="swish")
    with pytest.raises(ValueError, match=r"\(784, 3, 0, 10\)"):
        stage.MLP(hidden=(3, 0))


def test_initialisations():
    std = {}
    for init in stage.CHOICES["init"]:
        model = stage.build(stage.Config(init=init, hidden=(512, 256)), torch.device("cpu"))
        std[init] = [layer.weight.std().item() for layer in model.layers]
        assert (init == "default") == any(layer.bias.any() for layer in model.layers)
    assert std["zeros"] == [0, 0, 0]
    assert std["small"] == pytest.approx([1e-3] * 3, rel=0.05)
    assert std["kaiming"] == pytest.approx([math.sqrt(2 / n) for n in (784, 512, 256)], rel=0.05)
    assert std["xavier"] == pytest.approx(
        [math.sqrt(2 / (a + b)) for a, b in ((784, 512), (512, 256), (256, 10))], rel=0.05
    )
    assert std["default"] == pytest.approx([1 / math.sqrt(3 * n) for n in (784, 512, 256)], rel=0.05)


# ---- data ----


def test_raw_pixels(data):
    raw = stage.load_data(stage.Config(normalise=False))
    assert (raw.train.images.min(), raw.train.images.max()) == (0, 255)
    torch.testing.assert_close((raw.val.images / 255 - 0.1307) / 0.3081, data.val.images)


def test_deform_at_strength_0_changes_nothing(data):
    images = data.val.images[:9]
    torch.testing.assert_close(stage.deform(images, 0.0), images, rtol=0, atol=1e-4)


def test_deform_differs_by_image_and_call(data):
    twice = data.val.images[:1].expand(2, -1)
    first, second = stage.deform(twice), stage.deform(twice)
    assert len(torch.cat([first, second]).unique(dim=0)) == 4


def test_the_affine_part_of_deform_equals_torchs_affine_grid(data, monkeypatch):
    images = data.val.images[:5]
    draws = torch.rand(6, 5, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(torch, "rand", lambda *size, **_: draws)
    monkeypatch.setattr(torch, "randn", lambda *size, **_: torch.zeros(*size))
    ours = stage.deform(images, 0.7)

    turn, wide, high, shear, right, down = 0.7 * (2 * draws - 1)
    turn, wide, high = turn * math.radians(15), (0.15 * wide).exp(), (0.15 * high).exp()
    rows = [
        [
            [math.cos(a) * w, 0.15 * s - math.sin(a) * h, r * 1.5 / 13.5],
            [math.sin(a) * w, math.cos(a) * h, d * 1.5 / 13.5],
        ]
        for a, w, h, s, r, d in torch.stack([turn, wide, high, shear, right, down], 1).tolist()
    ]
    grid = F.affine_grid(torch.tensor(rows), [5, 1, 28, 28], align_corners=True)
    theirs = F.grid_sample(images.view(5, 1, 28, 28), grid, padding_mode="border", align_corners=True)
    torch.testing.assert_close(ours, theirs.view(5, 784), rtol=0, atol=1e-4)
    assert (ours - images).abs().max() > 0.5


def test_the_elastic_part_of_deform_has_the_strength_it_says(monkeypatch):
    """Read off a ramp whose pixels say where they come from, far from the border."""
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, 0.5))  # no affine part
    torch.manual_seed(0)
    ramp = torch.arange(28.0).repeat(28, 1).view(1, 784).expand(400, -1)
    moved = (stage.deform(ramp) - ramp).view(400, 28, 28)[:, 8:20, 8:20]
    assert moved.std().item() == pytest.approx(1.2, rel=0.1)
    assert (moved[:, :, 1:] - moved[:, :, :-1]).std() < 0.3  # and is smooth


# ---- training ----


def test_three_full_batch_steps_equal_gradient_descent_by_hand(data):
    config = replace(
        SMALL, optimizer="sgd", lr=0.5, weight_decay=0.0, label_smoothing=0.0, batch_size=300, steps=3, warmup=0.4
    )
    trained, _ = stage.train(config, data)
    model = stage.build(config, torch.device("cpu"))
    images, labels = (part[:300] for part in data.train)
    for share in (
        1 / 6 / 0.4,
        0.5 * (1 + math.cos(math.pi * (0.5 - 0.4) / 0.6)),
        0.5 * (1 + math.cos(math.pi * (5 / 6 - 0.4) / 0.6)),
    ):
        gradients = stage.backprop(model, images, labels)
        for name, parameter in model.named_parameters():
            parameter.data -= 0.5 * share * gradients[name]
    for (name, ours), theirs in zip(trained.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("optimizer", stage.CHOICES["optimizer"])
def test_every_optimizer_learns(data, optimizer):
    change = next(c for c in stage.SWEEPS["optimizer"] if c["optimizer"] == optimizer)
    _, history = stage.train(replace(SMALL, hidden=(32,), n_train=2000, steps=100, **change), data)
    assert history[-1]["val_accuracy"] > 0.7


def test_clipping_bounds_the_update(data):
    config = replace(SMALL, optimizer="sgd", lr=1.0, weight_decay=0.0, warmup=0.0, steps=1, n_logs=1, clip=0.01)
    before = nn.utils.parameters_to_vector(stage.build(config, torch.device("cpu")).parameters())
    model, history = stage.train(config, data)
    moved = (nn.utils.parameters_to_vector(model.parameters()) - before).norm().item()
    assert history[0]["grad_norm"] > 0.1
    assert moved == pytest.approx(0.01 * stage.one_cycle(config, 0), rel=1e-3)


def test_scale_out_runs_the_sweep_in_one_process_and_in_several(tmp_path):
    assert stage.main(["scale_out", "--smoke", "--quiet", "--figures-dir", str(tmp_path)]) == 0
    rows = read(tmp_path / "stage1" / "benchmark.csv")
    assert [row["name"] for row in rows] == ["one process", f"{torch.get_num_threads()} processes"]
    n_runs = len(stage.SWEEPS["depth"]) + len(stage.SWEEPS["width"])
    for row in rows:
        assert row["experiment"] == "scale_out"
        assert float(row["rate"]) == pytest.approx(60 * n_runs / float(row["seconds"]), rel=1e-4)
        assert float(row["ratio"]) == pytest.approx(float(row["rate"]) / float(rows[0]["rate"]), rel=1e-4)


# ---- names and prose ----


def test_a_sweeps_values_are_called_by_what_tells_them_apart():
    labels = {name: [metrics.label(c, changes) for c in changes] for name, changes in stage.SWEEPS.items()}
    assert labels["depth"] == ["0", "1×128", "2×128", "3×128", "4×128", "5×128"]
    assert labels["lr"][:2] == ["0.0001", "0.0003"]
    assert labels["optimizer"][0] == "sgd, lr 0.3"
    assert labels["regularisation"][:3] == ["nothing", "weight decay 0.3", "dropout 0.2"]
    assert all(len(set(names)) == len(names) for names in labels.values())


def test_the_speeds_in_the_prose_are_those_of_the_committed_rows(quoted_rows):
    rows, readme = quoted_rows("stage1", "benchmark", "benchmark")
    ratio = {(row["group"], row["name"]): float(row["ratio"]) for row in rows}
    assert f"{ratio['images/s', 'ours']:.1f} times as fast as through `ToTensor`" in readme
    report = ratio["reports/s, a million predictions", "our matrix and report"]
    assert f"{report:.1f} times as fast as scikit-learn's confusion matrix" in readme
    one, several = quoted_rows("stage1", "benchmark", "scale_out")[0]
    assert f"{float(one['rate']):.3g} runs a minute in one process" in readme
    assert f"{float(several['rate']):.3g} in two processes" in readme
    for batch_size in (128, 512, 2048):
        share = ratio[f"GFLOP/s, batch {batch_size}", "a training step"]
        assert f"{share:.2f} at batch {batch_size}" in readme
