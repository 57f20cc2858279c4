"""interview/convolution.py against torch's own functions, in values and gradients."""

import itertools
import math

import pandas as pd
import pytest
import torch
from conftest import ROOT, assert_equal
from torch import nn
from torch.nn import functional as F

import stage1_mlp
from interview import convolution


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def value_and_gradients(function, inputs):
    """function(*inputs), and the gradients of a weighted sum of it in every input."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, draw(*y.shape, seed=9))]


def assert_as_torch(ours, theirs, inputs, **options):
    mine = value_and_gradients(lambda *x: ours(*x, **options), inputs)
    others = value_and_gradients(lambda *x: theirs(*x, **options), inputs)
    assert_equal(mine, others, 1e-11)


# ---- corr2d ----


@pytest.mark.parametrize("kernel", [(1, 1), (2, 3), (3, 2), (5, 7), (1, 7)])
def test_corr2d_is_torchs_in_value_and_gradients(kernel):
    def theirs(X, K):
        return F.conv2d(X[None, None], K[None, None])[0, 0]

    assert_as_torch(convolution.corr2d, theirs, [draw(5, 7), draw(*kernel, seed=1)])


def test_corr2d_does_not_turn_the_kernel():
    X = torch.arange(9.0).view(3, 3)
    K = torch.arange(4.0).view(2, 2)
    expected = torch.tensor([[19.0, 25], [37, 43]])  # a convolution would give 5, 11, 23, 29
    assert_equal([convolution.corr2d(X, K)], [expected], 0)


@pytest.mark.parametrize(
    ("shape", "kernel", "message"),
    [
        ((5, 7), (6, 2), r"kernel \(6, 2\) does not fit into the image \(5, 7\)"),
        ((5, 7), (2, 8), r"kernel \(2, 8\) does not fit into the image \(5, 7\)"),
        ((5, 7), (3,), r"K \(kh, kw\) expected, not \(5, 7\) and \(3,\)"),
        ((1, 5, 7), (3, 2), r"expected, not \(1, 5, 7\) and \(3, 2\)"),
        ((5, 7), (0, 2), r"expected, not \(5, 7\) and \(0, 2\)"),
    ],
)
def test_corr2d_refuses_what_does_not_fit(shape, kernel, message):
    with pytest.raises(ValueError, match=message):
        convolution.corr2d(torch.ones(shape), torch.ones(kernel))


# ---- conv2d ----

OPTIONS = [
    {},
    {"stride": 2},
    {"stride": (3, 2)},
    {"padding": 1},
    {"padding": (0, 4)},
    {"dilation": 2},
    {"dilation": (1, 3)},
    {"stride": (2, 1), "padding": (3, 2), "dilation": (2, 3)},
    {"stride": [1, 2], "padding": [2, 1]},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_conv2d_is_torchs_in_value_and_gradients(options, with_bias, groups):
    inputs = [draw(3, 6, 9, 11), draw(12, 6 // groups, 3, 2, seed=1)]
    if with_bias:
        inputs.append(draw(12, seed=2))
    assert_as_torch(convolution.conv2d, F.conv2d, inputs, groups=groups, **options)


@pytest.mark.parametrize("kernel", [(1, 1), (1, 4), (5, 7), (2, 2)])
def test_conv2d_with_kernels_of_many_sizes(kernel):
    inputs = [draw(2, 3, 5, 7), draw(4, 3, *kernel, seed=1), draw(4, seed=2)]
    assert_as_torch(convolution.conv2d, F.conv2d, inputs)


def test_conv2d_passes_gradcheck_and_gradgradcheck():
    inputs = [draw(2, 4, 5, 4), draw(2, 2, 2, 3, seed=1), draw(2, seed=2)]
    inputs = [x.requires_grad_() for x in inputs]

    def function(*x):
        return convolution.conv2d(*x, stride=(2, 1), padding=1, groups=2)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_conv2d_takes_no_images_and_views_and_float32():
    weight = draw(4, 3, 3, 2).float()
    assert convolution.conv2d(torch.ones(0, 3, 5, 7), weight).shape == (0, 4, 3, 6)
    x = draw(2, 7, 5, 3).float().permute(0, 3, 2, 1)  # not contiguous
    y = convolution.conv2d(x, weight)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, F.conv2d(x, weight))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stride": 0}, "stride must be a whole number of at least 1, or a pair .*, not 0"),
        ({"stride": 1.5}, "stride must be .*, not 1.5"),
        ({"stride": (1, 2, 3)}, r"stride must be .*, not \(1, 2, 3\)"),
        ({"stride": True}, "stride must be .*, not True"),
        ({"padding": -1}, "padding must be a whole number of at least 0, .*, not -1"),
        ({"padding": (1, -2)}, r"padding must be .*, not \(1, -2\)"),
        ({"padding": "same"}, "padding must be .*, not 'same'"),
        ({"dilation": (0, 1)}, r"dilation must be .*, not \(0, 1\)"),
        ({"groups": 0}, "groups must be a whole number of at least 1, not 0"),
        ({"groups": 2}, r"with groups=2 expected, but x has 4 channels, .* shape \(6, 4, 3, 2\)"),
        ({"dilation": 4}, r"kernel of \(3, 2\) with dilation=4 does not fit into .* \(5, 7\)"),
        ({"bias": torch.ones(5)}, r"bias must have shape \(6,\), not \(5,\)"),
        ({"bias": torch.ones(6, 1)}, r"bias must have shape \(6,\), not \(6, 1\)"),
        ({"weight": torch.ones(6, 3, 3, 2)}, r"x has 4 channels, .* shape \(6, 3, 3, 2\)"),
        ({"weight": torch.ones(6, 4, 3)}, r"expected, not \(2, 4, 5, 7\) and \(6, 4, 3\)"),
        ({"weight": torch.ones(6, 4, 6, 2)}, r"kernel of \(6, 2\) .* image \(5, 7\)"),
        ({"weight": torch.ones(6, 4, 3, 0)}, r"kernel must be .*, not \(3, 0\)"),
        ({"weight": torch.ones(6, 4, 3, 2).double()}, "not torch.float32 and torch.float64"),
        ({"x": torch.ones(4, 5, 7)}, r"x \(B, C, H, W\) .* not \(4, 5, 7\) and \(6, 4, 3, 2\)"),
        (
            {"weight": torch.ones(5, 2, 3, 2), "groups": 2},
            r"groups=2 expected, but x has 4 channels, weight has shape \(5, 2, 3, 2\)",
        ),
    ],
)
def test_conv2d_refuses_what_does_not_fit(arguments, message):
    usual = {"x": torch.ones(2, 4, 5, 7), "weight": torch.ones(6, 4, 3, 2)}
    with pytest.raises(ValueError, match=message):
        convolution.conv2d(**(usual | arguments))


# ---- conv_transpose2d ----


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2},
        {"stride": (3, 2)},
        {"padding": 1},
        {"padding": (2, 0)},
        {"stride": (1, 4), "padding": (0, 1)},
        {"stride": [2, 5], "padding": [1, 2]},
    ],
)
@pytest.mark.parametrize("with_bias", [True, False])
def test_conv_transpose2d_is_torchs_in_value_and_gradients(options, with_bias):
    inputs = [draw(2, 3, 5, 4), draw(3, 6, 4, 3, seed=1)]
    if with_bias:
        inputs.append(draw(6, seed=2))
    assert_as_torch(convolution.conv_transpose2d, F.conv_transpose2d, inputs, **options)


def test_conv_transpose2d_is_the_gradient_of_conv2d():
    x = draw(2, 3, 7, 10).requires_grad_()
    weight = draw(5, 3, 3, 4, seed=1)
    y = convolution.conv2d(x, weight, stride=(2, 3), padding=1)
    grad = draw(*y.shape, seed=2)
    (expected,) = torch.autograd.grad(y, x, grad)
    found = convolution.conv_transpose2d(grad, weight, stride=(2, 3), padding=1)
    assert_equal([found], [expected[:, :, : found.shape[2], : found.shape[3]]], 1e-11)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stride": 0}, "stride must be .*, not 0"),
        ({"padding": -1}, "padding must be .*, not -1"),
        ({"padding": 4}, "padding=4 cuts off all of the 7 × 8 pixels"),
        ({"padding": (1, 4)}, r"padding=\(1, 4\) cuts off all of the 7 × 8 pixels"),
        ({"weight": torch.ones(6, 4, 3, 2)}, r"x has 4 channels, .* shape \(6, 4, 3, 2\)"),
        ({"weight": torch.ones(4, 6, 3)}, r"expected, not \(2, 4, 5, 7\) and \(4, 6, 3\)"),
        ({"bias": torch.ones(4)}, r"bias must have shape \(6,\), not \(4,\)"),
    ],
)
def test_conv_transpose2d_refuses_what_does_not_fit(arguments, message):
    usual = {"x": torch.ones(2, 4, 5, 7), "weight": torch.ones(4, 6, 3, 2)}
    with pytest.raises(ValueError, match=message):
        convolution.conv_transpose2d(**(usual | arguments))


# ---- pooling ----

POOLS = {
    "max": (convolution.max_pool2d, F.max_pool2d),
    "avg": (convolution.avg_pool2d, F.avg_pool2d),
}


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("k", [1, 2, 3, (2, 3), (5, 1), [1, 4]])
@pytest.mark.parametrize("shape", [(2, 3, 6, 7), (3, 5, 9)])
def test_pooling_is_torchs_in_value_and_gradients(name, k, shape):
    ours, theirs = POOLS[name]
    assert_as_torch(lambda x: ours(x, k), lambda x: theirs(x, k), [draw(*shape)])


@pytest.mark.parametrize("name", POOLS)
def test_pooling_of_equal_values_sends_the_gradient_where_torch_sends_it(name):
    ours, theirs = POOLS[name]
    x = draw(2, 3, 6, 8).relu().round()  # many zeros, and other ties
    assert_as_torch(lambda x: ours(x, (3, 2)), lambda x: theirs(x, (3, 2)), [x])


@pytest.mark.parametrize("name", POOLS)
def test_pooling_keeps_nan_and_infinity(name):
    ours, theirs = POOLS[name]
    x = draw(1, 1, 4, 6)
    x[0, 0, 1, 1] = math.nan
    x[0, 0, 2, 3] = -math.inf
    torch.testing.assert_close(ours(x, 2), theirs(x, 2), equal_nan=True)


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize(
    ("k", "message"),
    [
        (0, "kernel must be a whole number of at least 1, or a pair .*, not 0"),
        (2.0, "kernel must be .*, not 2.0"),
        ((2,), r"kernel must be .*, not \(2,\)"),
        (6, r"kernel of \(6, 6\) .* does not fit into .* \(5, 7\)"),
    ],
)
def test_pooling_refuses_what_does_not_fit(name, k, message):
    ours, _ = POOLS[name]
    with pytest.raises(ValueError, match=message):
        ours(torch.ones(2, 3, 5, 7), k)
    with pytest.raises(ValueError, match=r"floating-point .* not torch.int64"):
        ours(torch.ones(2, 3, 5, 7, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match=r"\(..., H, W\) expected, not \(7,\)"):
        ours(torch.ones(7), 2)


# ---- the network ----


def with_our_convolutions(model, x):
    """CNN.forward, with our conv2d and max_pool2d in place of nn.Conv2d and nn.MaxPool2d."""
    x = x.reshape(-1, 1, 28, 28)
    for block in model.blocks:
        x = convolution.conv2d(x, block.conv.weight, padding=1)
        if isinstance(block.pool, nn.MaxPool2d):
            x = convolution.max_pool2d(x, 2)
        x = F.relu(block.norm(x))
    return model.linear(x.mean((-2, -1)))


@pytest.mark.parametrize("training", [True, False])
def test_the_network_trains_with_what_equals_our_convolution(training):
    torch.manual_seed(0)
    model = convolution.CNN(n_classes=7).double().train(training)
    x = draw(4, 28, 28).requires_grad_()
    inputs = [x, *model.parameters()]
    theirs = model(x)
    ours = with_our_convolutions(model, x)
    grad = draw(4, 7, seed=1)
    assert_equal([ours], [theirs], 1e-11)
    assert_equal(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad), 1e-9
    )


def test_the_network_takes_images_in_three_shapes_and_no_others():
    model = convolution.CNN().eval()
    x = draw(2, 784).float()
    assert_equal([model(x)], [model(x.view(2, 28, 28))], 0)
    assert_equal([model(x)], [model(x.view(2, 1, 28, 28))], 0)
    with pytest.raises(ValueError, match=r"28 × 28 pixels expected, not shape \(2, 27, 28\)"):
        model(torch.ones(2, 27, 28))


def test_the_network_multiplies_about_a_hundred_times_as_often_as_stage_1s():
    counts = []

    def count(module, inputs, output):
        counts.append(module.weight.numel() * output[0].numel() // output.shape[1])

    model = convolution.CNN().eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    model(torch.ones(1, 784))
    mlp = stage1_mlp.MLP()
    n_mlp = sum(layer.weight.numel() for layer in mlp.layers)
    assert 85 <= sum(counts) / n_mlp <= 125
    n_parameters = sum(p.numel() for p in model.parameters())
    assert n_parameters > sum(p.numel() for p in mlp.parameters())  # "not fewer weights here"


def test_in_parts_and_mirrored():
    torch.manual_seed(0)
    model = convolution.CNN().eval()
    x = draw(510, 28, 28).float()
    with torch.no_grad():
        whole = model(x)
        torch.testing.assert_close(convolution.InParts(model)(x), whole)
        mean = (whole.softmax(1) + model(x.flip(-1)).softmax(1)) / 2
        both = convolution.InParts(model, mirrored=True)(x)
        torch.testing.assert_close(both, mean.log(), rtol=1e-4, atol=1e-5)
        rows = x[:9].flatten(1)
        torch.testing.assert_close(convolution.InParts(model, mirrored=True)(rows), both[:9])


# ---- data ----


def test_shift_and_mirror_moves_and_mirrors():
    x = torch.zeros(400, 28, 28)
    x[:, 10:12, 10] = 1.0  # a mark left of the middle
    x[:, 20, 8] = 2.0
    torch.manual_seed(0)
    moved = convolution.shift_and_mirror(x, far=2)
    expected = {}
    for down, right in itertools.product(range(-2, 3), repeat=2):
        image = x[0].roll((down, right), (0, 1))
        expected[down, right, False] = image
        expected[down, right, True] = image.flip(-1)
    found = [key for image in moved for key in expected if torch.equal(image, expected[key])]
    assert len(found) == 400
    assert set(found) == set(expected)


def test_shifted_images_lose_what_leaves_and_get_background():
    x = draw(3, 28, 28).float()
    moved = convolution.shifted(x, down=2, right=-3)
    assert torch.equal(moved[:, 2:, :25], x[:, :26, 3:])
    assert moved[:, :2].eq(x.min()).all()
    assert moved[:, :, 25:].eq(x.min()).all()
    assert torch.equal(convolution.shifted(x, 0, 0), x)


# ---- the program ----


def few(data):
    """A few images of each split, of all classes: (40, 50, 20)."""
    train = stage1_mlp.Split(data.train.images[:40], data.train.labels[:40])
    val = stage1_mlp.Split(data.val.images[::100], data.val.labels[::100])  # they stand by class
    test = stage1_mlp.Split(data.test.images[:20], data.test.labels[:20])
    return stage1_mlp.Data(train, val, test)


@pytest.fixture(scope="module")
def few_images():
    return {name: few(load(ROOT / "data")) for name, load in convolution.LOAD.items()}


@pytest.fixture
def small(few_images, monkeypatch):
    """Few images, two runs of two epochs each."""
    load = {name: lambda data_dir, name=name: few_images[name] for name in few_images}
    monkeypatch.setattr(convolution, "LOAD", load)
    recipes = {
        name: convolution.replace(recipe, epochs=2, n_train=40, batch_size=16)
        for name, recipe in convolution.RECIPES.items()
    }
    monkeypatch.setattr(convolution, "RECIPES", recipes)
    monkeypatch.setattr(convolution, "SEEDS", [0])
    return recipes


def test_without_trained_networks_the_rest_is_shown(tmp_path, small, capsys):
    assert convolution.main(out=tmp_path / "new") == 0
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"convolution_functions.csv", "convolution_kernels.png"}
    assert "python -m interview.convolution --train" in capsys.readouterr().out


def test_training_saves_rows_weights_tables_and_pictures(tmp_path, small, capsys):
    assert convolution.main(train=True, out=tmp_path) == 0
    assert "0 of 2 runs found, 2 to do" in capsys.readouterr().out
    sets = ("mnist", "fashion_mnist")
    assert {path.name for path in tmp_path.iterdir()} == {
        *("convolution_functions.csv", "convolution_kernels.png"),
        *("convolution_runs.csv", "convolution_history.csv"),
        *(f"convolution_cnn_{name}.pt" for name in sets),
        *(f"convolution_curves_{name}.png" for name in sets),
        *(f"convolution_learned_{name}.png" for name in sets),
        *("convolution_shift.csv", "convolution_shift.png"),
        *("convolution_networks.md", "convolution_networks.png"),
    }
    runs = pd.read_csv(tmp_path / "convolution_runs.csv")
    assert runs["experiment"].tolist() == ["MNIST", "Fashion-MNIST"]
    assert runs["test_accuracy"].between(0, 1).all()
    assert (runs["threads"] == 1).all()
    history = pd.read_csv(tmp_path / "convolution_history.csv")
    assert history["step"].tolist() == [3, 6, 3, 6]

    row = runs.iloc[1]  # Fashion-MNIST, judged by both views
    model = convolution.load_cnn(tmp_path / "convolution_cnn_fashion_mnist.pt")
    test = convolution.LOAD["Fashion-MNIST"](None).test
    found = stage1_mlp.evaluate(convolution.InParts(model, mirrored=True), test)
    assert found["accuracy"] == pytest.approx(row["test_accuracy"])
    assert found["loss"] == pytest.approx(row["test_loss"], rel=1e-4)


def test_a_second_start_goes_on_with_what_is_missing(tmp_path, small, monkeypatch, capsys):
    convolution.train_missing(tmp_path, None, 1, "cpu")
    before = (tmp_path / "convolution_runs.csv").read_bytes()
    convolution.train_missing(tmp_path, None, 1, "cpu")
    assert "2 of 2 runs found, 0 to do" in capsys.readouterr().out
    assert (tmp_path / "convolution_runs.csv").read_bytes() == before

    monkeypatch.setattr(convolution, "SEEDS", [0, 1])  # two more; and one recipe is another now
    small["MNIST"] = convolution.replace(small["MNIST"], lr=0.001)
    missing = convolution.missing_runs(tmp_path)
    assert [(name, recipe.seed) for name, recipe in missing] == [
        ("MNIST", 0),
        ("MNIST", 1),
        ("Fashion-MNIST", 1),
    ]
    (tmp_path / "convolution_cnn_fashion_mnist.pt").unlink()
    assert len(convolution.missing_runs(tmp_path)) == 4
    convolution.train_missing(tmp_path, None, 1, "cpu")
    runs = pd.read_csv(tmp_path / "convolution_runs.csv")
    assert runs["experiment"].tolist() == ["MNIST"] * 2 + ["Fashion-MNIST"] * 2
    assert runs["seed"].tolist() == [0, 1, 0, 1]
    assert runs["lr"].tolist() == [0.001, 0.001, 0.1, 0.1]


def test_missing_data_is_said_in_one_line(tmp_path, capsys):
    assert convolution.main(out=tmp_path / "out", data_dir=tmp_path) == 1
    assert "train-images-idx3-ubyte.gz is missing" in capsys.readouterr().err


def test_the_table_reads_stage_1_and_2_from_their_own_rows(tmp_path):
    runs = pd.DataFrame(
        {
            "experiment": ["MNIST", "MNIST"],
            "seed": [0, 1],
            "seconds": [60.0, 120.0],
            "parameters": [1234, 1234],
            "device": ["a card", "a card"],
            "test_accuracy": [0.99, 0.98],
        }
    )
    scores = convolution.scores_of_all(ROOT / "figures", runs)
    table = convolution.comparison_table(scores)
    assert any(
        all(word in line for word in ("CNN", "1,234", "a card", "98.50 ± 0.71"))
        for line in table.split("\n")
    )
    baseline = pd.read_csv(ROOT / "figures" / "stage1" / "test_metrics.csv")
    mean = 100 * baseline.loc[baseline["experiment"] == "baseline", "accuracy"].mean()
    assert f"{mean:.2f} ±" in table
