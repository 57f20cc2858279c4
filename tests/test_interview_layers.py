"""interview/layers.py against torch's own functions and modules, in values and gradients."""

import copy
import math

import pandas as pd
import pytest
import torch
from conftest import ROOT, assert_equal
from torch import nn
from torch.nn import functional as F

from interview import layers

ELEMENTWISE = {
    "sigmoid": (layers.sigmoid, torch.sigmoid),
    "tanh": (layers.tanh, torch.tanh),
    "relu": (layers.relu, F.relu),
    "leaky_relu": (layers.leaky_relu, F.leaky_relu),
    "gelu": (layers.gelu, F.gelu),
    "silu": (layers.silu, F.silu),
}
ALONG_AN_AXIS = {
    "softmax": (layers.softmax, F.softmax),
    "log_softmax": (layers.log_softmax, F.log_softmax),
}
HALVES = [torch.float16, torch.bfloat16]


def draw(*shape, seed=0, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64) + shift


def value_and_gradients(function, inputs, grad):
    """function(*inputs) and the gradients of Σ grad · function(*inputs) in every input."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


def module_and_gradients(module, x, grad):
    """module(x) and the gradients in x and in every parameter, in the order of their names."""
    parameters = [parameter for _, parameter in sorted(module.named_parameters())]
    x = x.detach().clone().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], grad)]


def randomised(module, seed=3):
    """The module in float64, each parameter another random number, so that none is neutral."""
    module = module.double()
    for i, (_, parameter) in enumerate(sorted(module.named_parameters())):
        parameter.data = draw(*parameter.shape, seed=seed + i, shift=0.5)
    return module


# ---- activations ----


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("scale", [0.0, 1e-9, 1.0, 30.0, 1000.0])
def test_activations_equal_torch_in_value_and_gradient(name, scale):
    ours, theirs = ELEMENTWISE[name]
    x = draw(3, 5, 7, scale=scale)
    grad = draw(3, 5, 7, seed=1)
    mine = value_and_gradients(ours, [x], grad)
    assert_equal(mine, value_and_gradients(theirs, [x], grad), 1e-13)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_activations_pass_gradcheck_and_gradgradcheck(name):
    ours, _ = ELEMENTWISE[name]
    x = draw(11).requires_grad_()  # no 0 among them, where relu bends
    assert torch.autograd.gradcheck(ours, x)
    assert torch.autograd.gradgradcheck(ours, x)


@pytest.mark.parametrize("slope", [-0.5, 0.0, 0.01, 1.0, 3.0])
def test_leaky_relu_is_right_for_any_slope(slope):
    x = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0], dtype=torch.float64)
    grad = draw(5)
    mine = value_and_gradients(lambda x: layers.leaky_relu(x, slope), [x], grad)
    theirs = value_and_gradients(lambda x: F.leaky_relu(x, slope), [x], grad)
    assert_equal(mine, theirs, 0)


@pytest.mark.parametrize("name", [*ELEMENTWISE, *ALONG_AN_AXIS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_values_and_gradients_stay_finite_at_1000(name, dtype):
    ours, theirs = (ELEMENTWISE | ALONG_AN_AXIS)[name]
    options = {"dim": -1} if name in ALONG_AN_AXIS else {}
    x = torch.tensor([-1000.0, -100.0, -20.0, 0.0, 20.0, 100.0, 1000.0])
    x = x.to(dtype).requires_grad_()
    y = ours(x, **options)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.dtype == gradient.dtype == dtype
    assert y.isfinite().all()
    assert gradient.isfinite().all()
    torch.testing.assert_close(y, theirs(x, **options))


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("dtype", HALVES)
def test_activations_in_half_precision_are_right_to_their_last_digits(name, dtype):
    ours, theirs = ELEMENTWISE[name]
    x = draw(501, scale=2.0).to(dtype)
    exact = theirs(x.double())
    error = (ours(x).double() - exact).abs()
    assert (error <= 4 * torch.finfo(dtype).eps * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_activations_keep_nan_and_take_infinity(name):
    ours, theirs = ELEMENTWISE[name]
    x = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), equal_nan=True)


def test_tanh_keeps_small_values_in_bfloat16():
    x = torch.tensor([1e-3, -1e-5], dtype=torch.bfloat16)
    torch.testing.assert_close(layers.tanh(x), x)


@pytest.mark.parametrize("slope", [math.nan, math.inf])
def test_leaky_relu_refuses_a_slope_that_is_no_number(slope):
    with pytest.raises(ValueError, match=f"finite number, not {slope}"):
        layers.leaky_relu(torch.ones(2), slope)


# ---- softmax ----


@pytest.mark.parametrize("name", ALONG_AN_AXIS)
@pytest.mark.parametrize("dim", [-3, -2, -1, 0, 1, 2])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_softmax_equals_torch_along_every_axis(name, dim, scale):
    ours, theirs = ALONG_AN_AXIS[name]
    x = draw(3, 4, 6, scale=scale)
    grad = draw(3, 4, 6, seed=1)
    mine = value_and_gradients(lambda x: ours(x, dim), [x], grad)
    assert_equal(mine, value_and_gradients(lambda x: theirs(x, dim), [x], grad), 1e-12)


@pytest.mark.parametrize("name", ALONG_AN_AXIS)
def test_softmax_passes_gradcheck_and_gradgradcheck(name):
    ours, _ = ALONG_AN_AXIS[name]
    x = draw(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(ours, x)
    assert torch.autograd.gradgradcheck(ours, x)


def test_softmax_gives_a_masked_value_nothing():
    x = torch.tensor([1.0, -math.inf, 2.0], dtype=torch.float64)
    grad = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    mine = value_and_gradients(layers.softmax, [x], grad)
    assert_equal(mine, value_and_gradients(lambda x: F.softmax(x, -1), [x], grad), 1e-14)
    assert mine[0][1] == mine[1][1] == 0


def test_softmax_of_more_values_than_float16_can_count():
    p = layers.softmax(torch.zeros(70_000, dtype=torch.float16))
    torch.testing.assert_close(p, F.softmax(torch.zeros(70_000, dtype=torch.float16), -1))
    assert p[0] > 0


@pytest.mark.parametrize("name", ALONG_AN_AXIS)
def test_softmax_refuses_an_axis_that_is_not_there(name):
    ours, _ = ALONG_AN_AXIS[name]
    with pytest.raises(ValueError, match=r"dim must lie in -2 … 1, not 2"):
        ours(torch.ones(3, 4), 2)
    with pytest.raises(ValueError, match=r"axis -1 of shape \(3, 0\) is empty"):
        ours(torch.ones(3, 0))
    with pytest.raises(ValueError, match=r"floating-point values expected, not torch.int64"):
        ours(torch.tensor([1, 2]))


# ---- SwiGLU ----


def test_swiglu_is_llamas():
    ours = randomised(layers.SwiGLU(5, 7))
    shapes = {name: tuple(p.shape) for name, p in ours.named_parameters()}
    assert shapes == {"w1.weight": (7, 5), "w2.weight": (5, 7), "w3.weight": (7, 5)}
    w1, w2, w3 = ours.w1.weight, ours.w2.weight, ours.w3.weight
    x = draw(2, 3, 5)
    grad = draw(2, 3, 5, seed=1)

    def theirs(x, w1, w2, w3):
        hidden = F.silu(torch.einsum("bti,hi->bth", x, w1)) * torch.einsum("bti,hi->bth", x, w3)
        return torch.einsum("bth,oh->bto", hidden, w2)

    mine = module_and_gradients(ours, x, grad)
    assert_equal(mine, value_and_gradients(theirs, [x, w1, w2, w3], grad), 1e-12)


def test_swiglu_refuses_other_sizes():
    with pytest.raises(ValueError, match=r"shape \(..., 5\) expected, not \(2, 4\)"):
        layers.SwiGLU(5, 7)(torch.ones(2, 4))
    with pytest.raises(ValueError, match="hidden must be a whole number of at least 1, not 0"):
        layers.SwiGLU(5, 0)
    with pytest.raises(ValueError, match="d must be a whole number of at least 1, not 2"):
        layers.SwiGLU(2.0, 3)


# ---- normalisations ----

NORMS = {  # ours, torch's, shape of the input
    "batch norm": (lambda: layers.BatchNorm(5), lambda: nn.BatchNorm1d(5), (7, 5)),
    "batch norm, sequences": (lambda: layers.BatchNorm(5), lambda: nn.BatchNorm1d(5), (7, 5, 3)),
    "batch norm, images": (lambda: layers.BatchNorm(3), lambda: nn.BatchNorm2d(3), (2, 3, 4, 5)),
    "batch norm, one image": (lambda: layers.BatchNorm(3), lambda: nn.BatchNorm2d(3), (1, 3, 4, 5)),
    "batch norm, eps": (lambda: layers.BatchNorm(5, 0.3), lambda: nn.BatchNorm1d(5, 0.3), (7, 5)),
    "layer norm": (lambda: layers.LayerNorm(5), lambda: nn.LayerNorm(5), (7, 3, 5)),
    "layer norm, a row": (lambda: layers.LayerNorm(5), lambda: nn.LayerNorm(5), (5,)),
    "layer norm, eps": (lambda: layers.LayerNorm(5, 0.3), lambda: nn.LayerNorm(5, 0.3), (7, 5)),
    "group norm": (lambda: layers.GroupNorm(2, 6), lambda: nn.GroupNorm(2, 6), (3, 6)),
    "group norm, images": (
        lambda: layers.GroupNorm(2, 6),
        lambda: nn.GroupNorm(2, 6),
        (3, 6, 4, 5),
    ),
    "group norm, 1": (lambda: layers.GroupNorm(1, 6), lambda: nn.GroupNorm(1, 6), (3, 6, 4)),
    "group norm, 6": (lambda: layers.GroupNorm(6, 6), lambda: nn.GroupNorm(6, 6), (3, 6, 4)),
    "instance norm": (lambda: layers.InstanceNorm(3), lambda: nn.InstanceNorm2d(3), (2, 3, 4, 5)),
    "instance norm, affine": (
        lambda: layers.InstanceNorm(3, affine=True),
        lambda: nn.InstanceNorm1d(3, affine=True),
        (2, 3, 4),
    ),
    "RMS norm": (lambda: layers.RMSNorm(5), lambda: nn.RMSNorm(5), (7, 3, 5)),
    "RMS norm, eps": (lambda: layers.RMSNorm(5, 0.3), lambda: nn.RMSNorm(5, 0.3), (7, 5)),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.5), (1000.0, -300.0), (0.0, 1.0)])
def test_norms_equal_torch_in_value_and_gradients(name, training, scale, shift):
    make_ours, make_theirs, shape = NORMS[name]
    theirs = randomised(make_theirs())
    ours = make_ours().double()
    ours.load_state_dict(theirs.state_dict())
    x = draw(*shape, scale=scale, shift=shift)
    grad = draw(*shape, seed=1)
    mine = module_and_gradients(ours.train(training), x, grad)
    other = module_and_gradients(theirs.train(training), x, grad)
    assert_equal(mine, other, 1e-10)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", HALVES)
def test_norms_of_large_values_in_half_precision(name, dtype):
    make_ours, make_theirs, shape = NORMS[name]
    theirs = make_theirs().double()
    ours = make_ours()
    x = draw(*shape, scale=1000.0).to(dtype)
    exact = theirs(x.double())
    y = ours(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    torch.testing.assert_close(ours.to(dtype)(x), y)


@pytest.mark.parametrize("name", NORMS)
def test_norms_pass_gradcheck(name):
    make_ours, _, shape = NORMS[name]
    assert torch.autograd.gradcheck(randomised(make_ours()), draw(*shape).requires_grad_())


@pytest.mark.parametrize(
    ("theirs", "shape"), [(nn.BatchNorm1d(5), (7, 5)), (nn.BatchNorm2d(5), (2, 5, 3, 4))]
)
def test_running_statistics_equal_torchs_over_ten_batches(theirs, shape):
    theirs = randomised(copy.deepcopy(theirs))
    ours = layers.BatchNorm(5).double()
    ours.load_state_dict(theirs.state_dict())
    for i in range(10):
        x = draw(*shape, seed=i, scale=1.0 + i, shift=float(i))
        assert_equal([ours(x)], [theirs(x)], 1e-12)
    assert_equal(ours.state_dict().values(), theirs.state_dict().values(), 1e-12)
    assert ours.num_batches_tracked == 10
    ours.eval()
    theirs.eval()
    x = draw(*shape, seed=11)
    assert_equal([ours(x)], [theirs(x)], 1e-12)
    assert_equal([ours(x[:1])], [theirs(x[:1])], 1e-12)  # one image alone is fine in eval
    assert ours.num_batches_tracked == 10  # and nothing moves
    assert_equal(ours.state_dict().values(), theirs.state_dict().values(), 1e-12)


def test_another_momentum_of_batch_norm():
    ours = layers.BatchNorm(5, momentum=0.4).double()
    theirs = nn.BatchNorm1d(5, momentum=0.4).double()
    for i in range(3):
        ours(draw(7, 5, seed=i))
        theirs(draw(7, 5, seed=i))
    assert_equal(ours.state_dict().values(), theirs.state_dict().values(), 1e-12)


def test_running_statistics_move_in_place_and_outside_the_graph():
    ours = layers.BatchNorm(5)
    before = ours.running_mean
    ours(torch.ones(4, 5, requires_grad=True))
    assert ours.running_mean is before
    assert not ours.running_mean.requires_grad
    assert ours.running_mean[0] == pytest.approx(0.1)


def test_batch_norm_refuses_one_value_a_channel_in_training_and_stays_as_it_was():
    ours = layers.BatchNorm(5)
    with pytest.raises(ValueError, match="two values a channel or more, not 1"):
        ours(torch.ones(1, 5))
    with pytest.raises(ValueError, match="two values a channel or more, not 1"):
        ours(torch.ones(1, 5, 1, 1))
    assert ours.num_batches_tracked == 0
    assert ours.running_mean.eq(0).all()
    assert ours.eval()(torch.ones(1, 5)).shape == (1, 5)


def test_norms_take_a_batch_of_no_images():
    assert layers.LayerNorm(5)(torch.ones(0, 5)).shape == (0, 5)
    assert layers.RMSNorm(5)(torch.ones(0, 5)).shape == (0, 5)
    assert layers.GroupNorm(2, 4)(torch.ones(0, 4, 3, 3)).shape == (0, 4, 3, 3)
    assert layers.InstanceNorm(4)(torch.ones(0, 4, 3, 3)).shape == (0, 4, 3, 3)
    assert layers.BatchNorm(4).eval()(torch.ones(0, 4, 3, 3)).shape == (0, 4, 3, 3)


def test_parameters_are_named_as_torchs():
    assert layers.InstanceNorm(3).weight is None  # torch's default
    assert layers.InstanceNorm(3).bias is None
    assert list(layers.RMSNorm(3).state_dict()) == ["weight"]
    assert layers.RMSNorm(3).eps is None
    assert layers.LayerNorm(3).eps == layers.BatchNorm(3).eps == layers.GroupNorm(3, 3).eps == 1e-5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: layers.BatchNorm(0), "n must be a whole number of at least 1, not 0"),
        (lambda: layers.BatchNorm(3, momentum=1.5), "must lie in 0 … 1, not 1.5"),
        (lambda: layers.LayerNorm(-1), "d must be a whole number of at least 1, not -1"),
        (lambda: layers.LayerNorm(3, eps=-1.0), "eps must be finite and at least 0, not -1.0"),
        (lambda: layers.RMSNorm(3, eps=math.nan), "eps must be finite and at least 0, not nan"),
        (lambda: layers.RMSNorm(True), "d must be a whole number of at least 1, not True"),
        (lambda: layers.GroupNorm(4, 6), "n=6 channels must be a multiple of groups=4"),
        (lambda: layers.GroupNorm(0, 6), "groups must be a whole number of at least 1, not 0"),
        (lambda: layers.InstanceNorm(1.0), "n must be a whole number of at least 1, not 1.0"),
        (
            lambda: layers.LayerNorm(3)(torch.ones(3, 4)),
            r"shape \(..., 3\) expected, not \(3, 4\)",
        ),
        (
            lambda: layers.RMSNorm(3)(torch.tensor(1.0)),
            r"shape \(..., 3\) expected, not \(\)",
        ),
        (
            lambda: layers.BatchNorm(3)(torch.ones(3, 4)),
            r"shape \(B, 3\) or \(B, 3, ...\) expected, not \(3, 4\)",
        ),
        (
            lambda: layers.GroupNorm(1, 3)(torch.ones(3)),
            r"shape \(B, 3\) or \(B, 3, ...\) expected, not \(3,\)",
        ),
        (
            lambda: layers.InstanceNorm(3)(torch.ones(2, 3)),
            r"shape \(B, 3, L\) or \(B, 3, H, W\) expected, not \(2, 3\)",
        ),
        (
            lambda: layers.InstanceNorm(3)(torch.ones(2, 3, 1, 1)),
            r"two pixels or more a channel expected, not shape \(2, 3, 1, 1\)",
        ),
        (
            lambda: layers.LayerNorm(2)(torch.ones(3, 2, dtype=torch.int64)),
            "floating-point values expected, not torch.int64",
        ),
    ],
)
def test_norms_refuse_what_they_cannot_take(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- backward passes ----


class OursBackward(torch.autograd.Function):
    """y from torch's own norm, gradients from the hand-written backward pass: for gradcheck."""

    @staticmethod
    def forward(ctx, x, weight, bias, norm, backward):
        ctx.save_for_backward(x, weight)
        ctx.backward_by_hand = backward
        return norm(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        return (*ctx.backward_by_hand(grad, *ctx.saved_tensors), None, None)


def torch_layer_norm(x, weight, bias, eps=1e-5):
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def torch_batch_norm(x, weight, bias, eps=1e-5):
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)


BACKWARD = {
    "layer norm": (layers.layer_norm_backward, torch_layer_norm),
    "batch norm": (layers.batch_norm_backward, torch_batch_norm),
}


@pytest.mark.parametrize("name", BACKWARD)
@pytest.mark.parametrize("eps", [1e-5, 0.3])
@pytest.mark.parametrize("scale", [1.0, 1000.0, 1e-3])
def test_backward_by_hand_equals_autograd(name, eps, scale):
    ours, theirs = BACKWARD[name]
    x, weight, bias = draw(7, 5, scale=scale), draw(5, seed=1), draw(5, seed=2)
    grad = draw(7, 5, seed=3)
    inputs = [x, weight, bias]
    _, *expected = value_and_gradients(lambda *inputs: theirs(*inputs, eps), inputs, grad)
    assert_equal(ours(grad, x, weight, eps), expected, 1e-10)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (7, 3, 5), (2, 3, 4, 5), (0, 5)])
def test_layer_norm_backward_sums_over_all_leading_axes(shape):
    x, grad, weight, bias = draw(*shape), draw(*shape, seed=3), draw(5, seed=1), draw(5, seed=2)
    _, *expected = value_and_gradients(torch_layer_norm, [x, weight, bias], grad)
    assert_equal(layers.layer_norm_backward(grad, x, weight), expected, 1e-12)


@pytest.mark.parametrize("name", BACKWARD)
def test_backward_by_hand_passes_gradcheck_and_gradgradcheck(name):
    backward, norm = BACKWARD[name]
    inputs = [draw(4, 3), draw(3, seed=1), draw(3, seed=2)]
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: OursBackward.apply(*x, norm, backward), inputs)
    assert torch.autograd.gradcheck(lambda g: backward(g, *inputs[:2]), draw(4, 3).requires_grad_())


@pytest.mark.parametrize("name", BACKWARD)
def test_backward_by_hand_in_half_precision(name):
    ours, _ = BACKWARD[name]
    x, weight, grad = draw(7, 5, scale=1000.0).half(), draw(5, seed=1).half(), draw(7, 5).half()
    exact = ours(grad.double(), x.double(), weight.double())
    results = ours(grad, x, weight)
    assert {result.dtype for result in results} == {torch.float32}
    assert_equal([result.double() for result in results], exact, 1e-5)


@pytest.mark.parametrize("name", BACKWARD)
def test_backward_by_hand_refuses_shapes_that_do_not_match(name):
    ours, _ = BACKWARD[name]
    x = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"grad \(4, 1\) must have the shape of x \(4, 3\)"):
        ours(torch.ones(4, 1), x, torch.ones(3))
    with pytest.raises(ValueError, match=r"weight \(4,\) must match x \(4, 3\) in its last axis"):
        ours(x, x, torch.ones(4))
    with pytest.raises(ValueError, match=r"eps must be finite and at least 0, not -1"):
        ours(x, x, torch.ones(3), -1)


def test_batch_norm_backward_needs_a_batch():
    with pytest.raises(ValueError, match=r"B of at least 2 expected, not \(1, 3\)"):
        layers.batch_norm_backward(torch.ones(1, 3), torch.ones(1, 3), torch.ones(3))
    with pytest.raises(ValueError, match=r"B of at least 2 expected, not \(2, 4, 3\)"):
        layers.batch_norm_backward(torch.ones(2, 4, 3), torch.ones(2, 4, 3), torch.ones(3))


# ---- dropout ----


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_dropout_drops_a_share_p_and_keeps_the_mean(p):
    torch.manual_seed(0)
    x = torch.full((300, 400), 3.0, dtype=torch.float64, requires_grad=True)
    y = layers.Dropout(p)(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    dropped = y == 0
    share = dropped.double().mean().item()
    assert share == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / x.numel()))
    torch.testing.assert_close(y[~dropped], x[~dropped] / (1 - p), rtol=1e-14, atol=0)
    torch.testing.assert_close(gradient, (~dropped).double() / (1 - p), rtol=1e-14, atol=0)
    rows = dropped.double().mean(1)  # each value on its own: rows spread as a binomial's do
    assert rows.std().item() == pytest.approx(math.sqrt(p * (1 - p) / 400), rel=0.3)


def test_dropout_draws_anew_at_each_call():
    dropout = layers.Dropout(0.5)
    x = torch.ones(100)
    assert not torch.equal(dropout(x), dropout(x))


def test_dropout_is_the_identity_in_eval_and_at_0():
    x = draw(3, 5)
    assert torch.equal(layers.Dropout(0.7).eval()(x), x)
    assert torch.equal(layers.Dropout(0.0)(x), x)


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, math.nan])
def test_dropout_refuses_another_p(p):
    with pytest.raises(ValueError, match=rf"must lie in \[0, 1\), not {p}"):
        layers.Dropout(p)


# ---- the demonstration ----


def test_main_saves_its_tables_and_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(layers, "N_IMAGES", 64)
    monkeypatch.setattr(layers, "BATCH_SIZES", [2, 32])
    monkeypatch.setattr(layers, "RATES", {2: [0.01], 32: [0.03, 0.1]})
    monkeypatch.setattr(layers, "SEEDS", [1, 2])
    monkeypatch.setattr(layers, "N_VAL", 500)
    layers.main(out=tmp_path / "new" / "folder", data_dir=ROOT / "data")
    names = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert names == {
        *("layers_activations.csv", "layers_activations.png"),
        *("layers_runs.csv", "layers_normalisations.png"),
        *("layers_batch_norm_modes.csv", "layers_batch_norm_modes.png"),
        "layers_batch_norm_values.csv",
    }
    rows = pd.read_csv(tmp_path / "new" / "folder" / "layers_runs.csv")
    assert len(rows) == 5 * (1 + 2) + 5 * (2 + 2)  # five norms: rates tried and seeds
    assert rows["val_accuracy"].between(0, 100).all()
    assert "±" in capsys.readouterr().out


def test_the_percentages_of_the_docstring_stand_in_the_committed_tables():
    folder = ROOT / "figures" / "interview"
    modes = pd.read_csv(folder / "layers_batch_norm_modes.csv").query("batch_size == 2")
    means = modes.groupby("statistics")["val_accuracy"].mean()
    training, _, inference = (means[name] for name in layers.STATISTICS)
    runs = pd.read_csv(folder / "layers_runs.csv")
    chosen = runs.query("norm == 'layer norm' and batch_size == 2 and used_for == 'result'")
    layer_norm = chosen["val_accuracy"].mean()
    text = " ".join(layers.__doc__.split())
    assert (
        f"{training:.0f} % right in training mode, {inference:.0f} % in inference, "
        f"{layer_norm:.0f} % with layer norm" in text
    )
