"""Stage 1 against torch's own modules."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics as sklearn_metrics
from torch import nn
from torch.nn import functional as F

import metrics
import stage1_mlp as stage

SMALL = stage.Config(hidden=(9, 7), n_train=300, batch_size=32, steps=12, n_logs=3)
TENSOR_READS = ("item", "__bool__", "__float__", "tolist", "cpu", "numpy")


@pytest.fixture(scope="module")
def data():
    torch.set_num_threads(1)
    return stage.load_data()


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
    assert [tuple(layer.weight.shape) for layer in model.layers] == [
        (128, 784),
        (256, 128),
        (10, 256),
    ]
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
    theirs = nn.Sequential(
        nn.Linear(12, 7), module(), nn.Linear(7, 5), module(), nn.Linear(5, 3)
    ).double()
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
    for init in ("zeros", "small", "default", "xavier", "kaiming"):
        model = stage.build(stage.Config(init=init, hidden=(512, 256)))
        std[init] = [layer.weight.std().item() for layer in model.layers]
        assert (init == "default") == any(layer.bias.any() for layer in model.layers)
    assert std["zeros"] == [0, 0, 0]
    assert std["small"] == pytest.approx([1e-3] * 3, rel=0.05)
    assert std["kaiming"] == pytest.approx([math.sqrt(2 / n) for n in (784, 512, 256)], rel=0.05)
    assert std["xavier"] == pytest.approx(
        [math.sqrt(2 / (a + b)) for a, b in ((784, 512), (512, 256), (256, 10))], rel=0.05
    )
    assert std["default"] == pytest.approx(
        [1 / math.sqrt(3 * n) for n in (784, 512, 256)], rel=0.05
    )


# ---- data ----


def test_raw_pixels_are_those_of_the_file(data):
    raw = stage.as_stored(data.val).images
    assert (raw.min().item(), raw.max().item()) == (pytest.approx(0, abs=1e-4), pytest.approx(255))
    torch.testing.assert_close(raw, raw.round(), rtol=0, atol=1e-3)
    torch.testing.assert_close(stage.normalised(raw), data.val.images, rtol=0, atol=1e-5)


def test_deform_at_strength_0_changes_nothing(data):
    images = data.val.images[:9]
    torch.testing.assert_close(stage.deform(images, 0.0), images, rtol=0, atol=1e-4)


def test_deform_differs_by_image_and_call(data):
    twice = data.val.images[:1].expand(2, -1)
    first = stage.deform(twice)
    second = stage.deform(twice)
    assert len(torch.cat([first, second]).unique(dim=0)) == 4


def test_the_affine_part_of_deform_equals_torchs_affine_grid(data, monkeypatch):
    images = data.val.images[:5]
    draws = torch.rand(6, 5, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(torch, "rand", lambda *size, **_: draws)
    monkeypatch.setattr(torch, "randn", lambda *size, **_: torch.zeros(*size))
    ours = stage.deform(images, 0.7)

    rows = []
    for turn, wide, high, shear, right, down in (0.7 * (2 * draws - 1)).T.tolist():
        angle = math.radians(15) * turn
        wide = math.exp(0.15 * wide)
        high = math.exp(0.15 * high)
        across = [math.cos(angle) * wide, 0.15 * shear - math.sin(angle) * high, right * 1.5 / 13.5]
        along = [math.sin(angle) * wide, math.cos(angle) * high, down * 1.5 / 13.5]
        rows.append([across, along])
    grid = F.affine_grid(torch.tensor(rows), [5, 1, 28, 28], align_corners=True)
    pictures = images.view(5, 1, 28, 28)
    theirs = F.grid_sample(pictures, grid, padding_mode="border", align_corners=True)
    torch.testing.assert_close(ours, theirs.view(5, 784), rtol=0, atol=1e-4)
    assert (ours - images).abs().max() > 0.5


def test_the_elastic_part_of_deform_has_the_strength_it_says(monkeypatch):
    """Read off a ramp whose pixels say where they come from, far from the border."""
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, 0.5))  # nothing affine
    torch.manual_seed(0)
    ramp = torch.arange(28.0).repeat(28, 1).view(1, 784).expand(400, -1)
    moved = (stage.deform(ramp) - ramp).view(400, 28, 28)[:, 8:20, 8:20]
    assert moved.std().item() == pytest.approx(1.2, rel=0.1)
    assert (moved[:, :, 1:] - moved[:, :, :-1]).std() < 0.3  # and is smooth


# ---- training ----


def test_three_full_batch_steps_equal_gradient_descent_by_hand(data):
    config = replace(
        SMALL,
        optimizer="sgd",
        lr=0.5,
        weight_decay=0.0,
        label_smoothing=0.0,
        batch_size=300,
        steps=3,
        warmup=0.4,
    )
    trained, _ = stage.train(config, data)
    model = stage.build(config)
    images, labels = (part[:300] for part in data.train)
    rising = 1 / 6 / 0.4
    falling = [0.5 * (1 + math.cos(math.pi * (at - 0.4) / 0.6)) for at in (0.5, 5 / 6)]
    for share in (rising, *falling):
        gradients = stage.backprop(model, images, labels)
        for name, parameter in model.named_parameters():
            parameter.data -= 0.5 * share * gradients[name]
    for (name, ours), theirs in zip(trained.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("optimizer", stage.RATES)
def test_every_optimizer_learns(data, optimizer):
    lr = stage.RATES[optimizer][2]
    config = replace(SMALL, hidden=(32,), n_train=2000, steps=100, optimizer=optimizer, lr=lr)
    _, history = stage.train(replace(config, weight_decay=0.0), data)
    assert history[-1]["val_accuracy"] > 0.7


def test_weights_decay_and_biases_do_not(data):
    config = replace(SMALL, lr=0.1, weight_decay=0.5, steps=1, n_logs=1, warmup=0.0)
    with_decay = dict(stage.train(config, data)[0].named_parameters())
    without = dict(stage.train(replace(config, weight_decay=0.0), data)[0].named_parameters())
    before = dict(stage.build(config).named_parameters())
    lr = stage.learning_rate(config, 1)
    for name, parameter in before.items():
        decayed = lr * 0.5 * parameter if name.endswith("weight") else torch.zeros(())
        moved = without[name] - with_decay[name]
        torch.testing.assert_close(moved, decayed.expand_as(moved), rtol=1e-4, atol=1e-6)


def test_clipping_bounds_the_update(data):
    config = replace(
        SMALL, optimizer="sgd", lr=1.0, weight_decay=0.0, warmup=0.0, steps=1, n_logs=1, clip=0.01
    )
    before = nn.utils.parameters_to_vector(stage.build(config).parameters())
    model, history = stage.train(config, data)
    moved = (nn.utils.parameters_to_vector(model.parameters()) - before).norm().item()
    assert history[0]["grad_norm"] > 0.1  # what was measured before clipping
    assert moved == pytest.approx(0.01 * stage.learning_rate(config, 1), rel=1e-3)


def test_the_learning_rate_rises_and_falls():
    config = replace(SMALL, lr=2.0, warmup=0.25, steps=8)
    rates = [stage.learning_rate(config, step) for step in range(1, 9)]
    assert rates[:2] == [pytest.approx(0.5), pytest.approx(1.5)]
    assert rates[2] == pytest.approx(1 + math.cos(math.pi / 12))
    assert rates[7] == pytest.approx(1 + math.cos(math.pi * 11 / 12))


def test_one_batch_is_learned_by_heart(data):
    config = stage.Config(
        hidden=(128, 256), n_train=64, batch_size=64, steps=150, n_logs=3, label_smoothing=0.0
    )
    model, history = stage.train(config, data)
    assert history[-1]["objective"] < 1e-3
    assert history[-1]["train_accuracy"] == 1
    seen = stage.evaluate(model, stage.Split(*(part[:64] for part in data.train)))
    assert (seen["accuracy"], seen["loss"] < 1e-3) == (1, True)


def test_history_holds_what_evaluate_gives_on_the_images_that_were_used(data):
    model, history = stage.train(replace(SMALL, dropout=0.3, deform=1.0), data)
    seen = stage.evaluate(model, stage.Split(*(part[:300] for part in data.train)))
    val = stage.evaluate(model, data.val)
    row = history[-1]
    assert (row["train_loss"], row["train_accuracy"]) == (seen["loss"], seen["accuracy"])
    assert [row[f"val_{name}"] for name in stage.SCORES] == [val[name] for name in stage.SCORES]
    assert [row["step"] for row in history] == [4, 8, 12]
    assert [row["epoch"] for row in history] == [0.4, 0.8, 1.2]  # 300 images are 10 batches of 32


def test_the_same_seed_gives_the_same_history(data):
    config = replace(SMALL, dropout=0.2, deform=1.0, clip=1.0)

    def history_of(seed):
        _, history = stage.train(replace(config, seed=seed), data)
        return [{k: v for k, v in row.items() if k != "seconds"} for row in history]

    assert history_of(3) == history_of(3) != history_of(4)


def test_nothing_waits_for_the_device_between_log_rows(data, monkeypatch):
    reads = []
    for name in TENSOR_READS:
        original = getattr(torch.Tensor, name)

        def counted(tensor, *args, original=original, **kwargs):
            reads.append(1)
            return original(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    numbers = []
    for steps in (10, 50):
        reads.clear()
        stage.train(replace(SMALL, steps=steps, n_logs=1, deform=1.0), data)
        numbers.append(len(reads))
    assert numbers[0] == numbers[1] > 0


def test_a_loss_that_is_not_finite_ends_the_run_as_diverged(data):
    config = replace(SMALL, optimizer="sgd", lr=1e30, warmup=0.0, steps=100, n_logs=10)
    _, history = stage.train(config, data)
    assert stage.status(history) == "diverged"
    assert len(history) < 10


def test_evaluate_equals_scikit_learn_for_any_model_and_restores_every_flag(data):
    model = nn.Sequential(nn.Linear(784, 6), nn.Dropout(0.5), nn.Sequential(nn.Linear(6, 10)))
    model.train()
    model[2].eval()
    split = stage.Split(*(part[::3] for part in data.val))
    found, again = stage.evaluate(model, split), stage.evaluate(model, split)
    assert [module.training for module in model.modules()] == [True, True, True, False, False]
    assert found["loss"] == again["loss"]  # dropout is off
    with torch.no_grad():
        logits = model.eval()(split.images)
    options = {"labels": range(10), "average": "macro", "zero_division": 0}
    p, r, f, _ = sklearn_metrics.precision_recall_fscore_support(
        split.labels, logits.argmax(1), **options
    )
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == split.labels).double().mean())
    assert found["macro_precision"] == pytest.approx(p)
    assert (found["macro_recall"], found["macro_f1"]) == (pytest.approx(r), pytest.approx(f))
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, split.labels).item(), rel=1e-6)


# ---- what is measured of faults and mistakes ----


def test_a_config_that_cannot_be_is_refused_by_name():
    for change, quoted in (
        ({"init": "kaimng"}, "kaimng"),
        ({"hidden": (9,) * 101}, "101"),
        ({"lr": float("nan")}, "nan"),
        ({"n_train": 55_001}, "n_train must be at most 55,000, not 55,001"),
    ):
        with pytest.raises(ValueError, match=quoted):
            replace(SMALL, **change).check()


def test_every_fault_names_two_runs_and_every_run_belongs_to_one():
    named = {name for fault in stage.FAULTS.values() for name in (fault.broken, fault.mended)}
    assert named == set(stage.EXPERIMENTS["faults"])


def test_dead_and_distinct_neurons_are_counted(data):
    model = stage.MLP(hidden=(8, 4))
    for layer in model.layers[:-1]:
        nn.init.normal_(layer.weight)
        nn.init.constant_(layer.bias, 50.0)
    model.layers[0].bias.data[:3] = -1e6  # three neurons that no image wakes
    model.layers[1].weight.data.clamp_(min=0)
    assert stage.dead_neurons(model, [], SMALL, data) == pytest.approx(100 * 3 / 12)
    model.layers[0].weight.data[5] = model.layers[0].weight.data[6]
    assert stage.distinct_neurons(model, [], SMALL, data) == 7


def test_layer_gradients_are_those_of_back_propagation_by_hand(data):
    config = replace(SMALL, hidden=(9, 7, 5))
    by_hand = stage.backprop(
        stage.build(config), data.train.images[:1000], data.train.labels[:1000]
    )
    expected = [by_hand[f"layers.{i}.weight"].norm().item() for i in range(4)]
    assert stage.layer_gradients(config, data) == pytest.approx(expected, rel=1e-4)
    assert stage.gradient_ratio(None, [], config, data) == pytest.approx(
        expected[0] / expected[-1], rel=1e-4
    )


def test_the_surest_mistakes_are_the_surest(data):
    model, _ = stage.train(replace(SMALL, hidden=(16,), n_train=2000, steps=60), data)
    rows = stage.surest_mistakes(model, data.test, n=5)
    with torch.no_grad():
        probabilities = model(data.test.images).softmax(1)
    wrong = [i for i in range(10_000) if probabilities[i].argmax() != data.test.labels[i]]
    expected = sorted(wrong, key=lambda i: -probabilities[i].max().item())[:5]
    assert [row["image"] for row in rows] == expected
    pixels = torch.tensor(list(bytes.fromhex(rows[0]["pixels"]))).float()
    torch.testing.assert_close(
        stage.normalised(pixels), data.test.images[expected[0]], rtol=0, atol=1e-4
    )
    assert rows[0]["true"] == data.test.labels[expected[0]].item() != rows[0]["predicted"]


# ---- images of one's own ----


def photo_of(digit: np.ndarray, size: int, light: bool, rng) -> Image.Image:
    """A digit (28, 28) of 0 … 1 as a photo: on paper with a shadow and noise, or white on black."""
    large = Image.fromarray((255 * digit).astype(np.uint8)).resize((size, size), Image.BICUBIC)
    ink = np.pad(np.asarray(large) / 255, [(size // 3, size // 5), (size // 4, size // 2)])
    if not light:
        return Image.fromarray((255 * ink).astype(np.uint8))
    height, width = ink.shape
    shadow = 0.95 - 0.4 * np.linspace(0, 1, width)[None] * np.linspace(0.5, 1, height)[:, None]
    paper = shadow * (1 - 0.8 * ink) + rng.normal(0, 0.015, ink.shape)
    return Image.fromarray((255 * paper.clip(0, 1)).astype(np.uint8))


@pytest.mark.parametrize("light", [True, False])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "I;16", "F"])
def test_a_photo_of_a_test_image_is_made_into_the_test_image(data, tmp_path, light, mode):
    rng = np.random.default_rng(3)
    differences = []
    for image in stage.as_stored(data.test).images[:12]:
        digit = (image / 255).view(28, 28).numpy()
        photo = photo_of(digit, 140, light, rng)
        path = tmp_path / ("photo.tiff" if mode in ("I;16", "F") else "photo.png")
        if mode == "I;16":
            photo = Image.fromarray(np.asarray(photo).astype(np.uint16) * 257)
        photo.convert(mode).save(path) if mode != "I;16" else photo.save(path)
        found = stage.read_digit(path)
        assert found.shape == (28, 28)
        assert (found.min(), found.max()) == (0, 1)
        differences.append(np.abs(found - digit).mean() / digit.mean())
    assert np.median(differences) < 0.35


def test_a_digit_drawn_on_transparency_is_seen(tmp_path):
    layers = np.zeros((50, 40, 4), np.uint8)
    layers[10:40, 18:23, 3] = 255
    for ink in (0, 255):  # black ink, white ink
        layers[..., :3] = ink
        Image.fromarray(layers).save(tmp_path / "drawn.png")
        found = stage.read_digit(tmp_path / "drawn.png")
        rows = np.flatnonzero(found.max(1) > 0.5)
        assert len(rows) == 20  # fitted into 20 pixels, whatever its size was
        assert found[14, 14] > 0.5


def test_images_are_centred_by_mass_as_mnists_are(data, tmp_path):
    for image in stage.as_stored(data.test).images[20:30]:
        digit = (image / 255).view(28, 28).numpy()
        Image.fromarray((255 * digit).astype(np.uint8)).save(tmp_path / "image.png")
        found = stage.read_digit(tmp_path / "image.png")
        for axis in (0, 1):
            places = np.arange(28)
            centre = (found.sum(1 - axis) * places).sum() / found.sum()
            assert abs(centre - 14) < 0.75
        box = max(np.ptp(np.flatnonzero(found.max(axis))) + 1 for axis in (0, 1))
        assert box == 20


def test_specks_and_a_faint_shadow_do_not_move_the_digit(tmp_path):
    paper = np.full((120, 120), 235, np.uint8)
    paper[30:90, 55:65] = 30
    Image.fromarray(paper).save(tmp_path / "clean.png")
    paper[:, 90:] = 215  # the shadow of a hand
    paper[5, 5] = 60  # dirt
    Image.fromarray(paper).save(tmp_path / "dirty.png")
    clean, dirty = (stage.read_digit(tmp_path / f"{name}.png") for name in ("clean", "dirty"))
    np.testing.assert_allclose(clean, dirty, atol=0.15)


def test_a_network_of_raw_pixels_is_given_raw_pixels(tmp_path, capsys):
    """`predict` gives a network what it was trained on: here its logits are the pixels' mean."""
    config = replace(stage.BASE, hidden=(), normalise=False)
    weights = {"layers.0.weight": torch.full((10, 784), 1 / 784), "layers.0.bias": torch.zeros(10)}
    weights["layers.0.weight"][3] *= 1.02  # the digit that is named, by how much tells the scale
    stage.save_weights(tmp_path / "raw.pt", config, weights)
    digit = np.zeros((28, 28), np.uint8)
    digit[4:24, 12:17] = 255
    Image.fromarray(digit).save(tmp_path / "one.png")
    mean = 255 * stage.read_digit(tmp_path / "one.png").mean()
    words = ["predict", str(tmp_path / "one.png"), "--weights", str(tmp_path / "raw.pt")]
    assert stage.main(words) == 0
    share = 1 / (1 + 9 * math.exp(-0.02 * mean))
    assert f"one.png: 3 {100 * share:.1f} %" in capsys.readouterr().out


# ---- committed evidence ----


def test_the_committed_weights_are_those_of_the_committed_rows(data):
    folder = stage.HERE / "figures" / "stage1"
    tests = metrics.load_rows(folder / "test_metrics.csv")
    for name in stage.SELECTED:
        row = tests[(tests["experiment"] == name) & (tests["seed"] == 0)].iloc[0]
        model, _ = stage.load_weights(folder / f"{name}.pt")
        found = stage.evaluate(model, data.test)
        assert found["accuracy"] == pytest.approx(
            row["accuracy"], abs=2e-4
        )  # other processors round


def test_the_committed_rows_are_those_of_the_table():
    folder = stage.HERE / "figures" / "stage1"
    runs = stage.runs_of(list(stage.EXPERIMENTS), 1)
    todo, n_outdated = stage.unfinished(runs, folder)
    assert (todo, n_outdated) == ([], 0)
