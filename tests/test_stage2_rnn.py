"""Stage 2 against torch's own recurrent modules with copied weights, in float64."""

import copy
import gzip
import itertools
import math
import pickle
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import assert_equal, gradients
from PIL import Image
from sklearn.metrics import precision_recall_fscore_support
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import metrics
import stage2_rnn as stage

SMALL = stage.Config(
    reading="rows", flip=False, n_hidden=9, n_train=300, batch_size=32, steps=12, n_logs=3
)
BLANK = stage.blank_pixel(SMALL)
THEIRS = {"rnn": nn.RNN, "rnn_relu": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
KINDS = list(THEIRS)
LENGTHS = [3, 7, 1, 5, 2]  # not sorted, with the longest and the shortest there can be


@pytest.fixture(scope="session")
def data():
    return stage.load_data()


def parameters_of(theirs, i, directions):
    """W_ih, W_hh, b_ih, b_hh of torch's module for our cell i."""
    suffix = f"_l{i // directions}" + ("_reverse" if i % directions else "")
    return [
        getattr(theirs, name + suffix) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    ]


def pair(kind, n_in, n_hidden, n_layers=1, bidirectional=False, dtype=torch.float64):
    """Our layers and torch's, with the same weights: where ours have one bias, it is the sum of
    torch's two.
    """
    torch.manual_seed(n_layers + 3 * bidirectional)
    arguments = {"nonlinearity": "relu"} if kind == "rnn_relu" else {}
    theirs = THEIRS[kind](
        n_in, n_hidden, n_layers, batch_first=True, bidirectional=bidirectional, **arguments
    ).to(dtype)
    ours = stage.Recurrent(kind, n_in, n_hidden, n_layers, bidirectional).to(dtype)
    with torch.no_grad():
        for i, cell in enumerate(ours.cells):
            W_ih, W_hh, b_ih, b_hh = parameters_of(theirs, i, 1 + bidirectional)
            cell.W_xh.weight.copy_(W_ih)
            cell.W_hh.weight.copy_(W_hh)
            cell.W_xh.bias.copy_(b_ih if kind == "gru" else b_ih + b_hh)
            if kind == "gru":
                cell.W_hh.bias.copy_(b_hh)
    return ours, theirs


def parts(state):
    return list(state) if isinstance(state, tuple) else [state]


def states(kind, shape):
    made = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for _ in range(2 if kind == "lstm" else 1)
    ]
    return tuple(made) if kind == "lstm" else made[0]


# ---- the cells ----


@pytest.mark.parametrize(
    ("kind", "module"),
    list(zip(KINDS, [nn.RNNCell, nn.RNNCell, nn.GRUCell, nn.LSTMCell], strict=True)),
)
def test_a_cell_is_one_step_of_torchs_cell(kind, module):
    torch.manual_seed(0)
    arguments = {"nonlinearity": "relu"} if kind == "rnn_relu" else {}
    theirs, ours = module(3, 4, **arguments).double(), stage.CELLS[kind](3, 4).double()
    with torch.no_grad():
        ours.W_xh.weight.copy_(theirs.weight_ih)
        ours.W_hh.weight.copy_(theirs.weight_hh)
        ours.W_xh.bias.copy_(theirs.bias_ih if kind == "gru" else theirs.bias_ih + theirs.bias_hh)
        if kind == "gru":
            ours.W_hh.bias.copy_(theirs.bias_hh)
    x, state = torch.randn(5, 3, dtype=torch.float64), states(kind, (5, 4))
    assert_equal(parts(ours(x, state)), parts(theirs(x, state)))
    assert_equal(parts(ours(x)), parts(theirs(x)))


@pytest.mark.parametrize("kind", ["rnn", "rnn_relu"])
def test_layers_equal_the_plain_loop_over_linear_layers(kind):
    """The RNN as a first course writes it, under autograd."""
    layers, x = (
        stage.Recurrent(kind, 3, 4).double(),
        torch.randn(5, 7, 3, dtype=torch.float64, requires_grad=True),
    )
    cell, act = layers.cells[0], {"rnn": torch.tanh, "rnn_relu": torch.relu}[kind]
    h, outputs = torch.zeros(5, 4, dtype=torch.float64), []
    for t in range(7):
        h = act(cell.W_xh(x[:, t]) + cell.W_hh(h))
        outputs.append(h)
    mine, plain, inputs = layers(x)[0], torch.stack(outputs, 1), [x, *layers.parameters()]
    assert_equal([mine, *gradients([mine], inputs)], [plain, *gradients([plain], inputs)])


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    torch.manual_seed(1)
    layers = stage.Recurrent(kind, 2, 3).double()
    x = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    state = states(kind, (1, 4, 3))

    def run(x, *rest):
        given = rest[: len(parts(state))]
        outputs, last = layers(x, [2, 3, 1, 3], given if kind == "lstm" else given[0])
        return outputs, *parts(last)

    assert torch.autograd.gradcheck(run, (x, *parts(state), *layers.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_are_those_of_torchs_cell(kind):
    """Gradients of |∂ output / ∂ x|², the penalty of a Wasserstein GAN, through two steps."""
    ours, theirs = pair(kind, 3, 4)
    cell = {"gru": nn.GRUCell, "lstm": nn.LSTMCell}.get(kind, nn.RNNCell)
    arguments = {"nonlinearity": "relu"} if kind == "rnn_relu" else {}
    torchs = cell(3, 4, **arguments).double()
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    torchs.load_state_dict({name: getattr(theirs, f"{name}_l0") for name in names})
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    penalties = []
    for step in (ours.cells[0], torchs):
        state = step(x[:, 1], step(x[:, 0]))
        (slope,) = torch.autograd.grad(parts(state)[0].sum(), x, create_graph=True)
        penalties.append(slope.square().sum())
    mine = torch.autograd.grad(penalties[0], ours.cells[0].W_hh.weight)
    assert_equal(mine, torch.autograd.grad(penalties[1], torchs.weight_hh))


def test_a_gradient_penalty_is_not_dropped():
    """y = tanh(w x), x = 1, w = 0.5: of y + (dy/dx)² the derivative by w, written out."""
    cell = stage.RNNCell(1, 1).double()
    for parameter in cell.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        cell.W_xh.weight.fill_(0.5)
    x = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    y = cell(x).sum()
    (slope,) = torch.autograd.grad(y, x, create_graph=True)
    (y + slope.pow(2).sum()).backward()
    s = 1 - math.tanh(0.5) ** 2  # tanh' = s, s' = -2 tanh s; dy/dx = w s
    expected = s + 2 * 0.5 * s * (s + 0.5 * -2 * math.tanh(0.5) * s)
    assert cell.W_xh.weight.grad.item() == pytest.approx(expected, rel=1e-12)
    assert expected == pytest.approx(1.11913, abs=1e-5)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_back_propagation_through_time_by_hand_is_autograds(activation):
    torch.manual_seed(2)
    for B, T, n_in, H in [(5, 7, 3, 4), (1, 1, 2, 3), (3, 2, 5, 1)]:
        cell = stage.RNNCell(n_in, H, activation).double()
        x = torch.randn(B, T, n_in, dtype=torch.float64)
        grad_outputs = torch.randn(B, T, H, dtype=torch.float64)
        outputs, _ = stage.read(cell, x.transpose(0, 1))
        loss = (outputs.transpose(0, 1) * grad_outputs).sum()
        expected = torch.autograd.grad(loss, list(cell.parameters()))
        found = stage.bptt(cell, x, grad_outputs)
        names = [name for name, _ in cell.named_parameters()]
        assert sorted(found) == sorted(names)
        assert_equal([found[name] for name in names], expected)


def test_the_reset_gate_comes_after_the_product():
    """With W_hn = 0 and b_hn = 1, only a gate that multiplies the product and its bias leaves r ⊙
    b_hn.
    """
    cell = stage.GRUCell(1, 1).double()
    for parameter in cell.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        cell.W_xh.bias.copy_(torch.tensor([-2.0, -50.0, 0.0]))  # r = σ(-2), z = 0
        cell.W_hh.bias[2] = 1.0
    h = cell(torch.zeros(1, 1, dtype=torch.float64), torch.full((1, 1), 0.7, dtype=torch.float64))
    assert h.item() == pytest.approx(math.tanh(1 / (1 + math.exp(2))), rel=1e-12)


# ---- whole sequences ----

SHAPES = [(1, 1, 3, 4), (5, 7, 3, 4), (5, 7, 4, 3)]  # B, T, F, H


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("n_layers", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_equal_torchs(kind, n_layers, bidirectional, given):
    for (B, T, n_in, H), lengths in [*((shape, None) for shape in SHAPES), ((5, 7, 3, 4), LENGTHS)]:
        ours, theirs = pair(kind, n_in, H, n_layers, bidirectional)
        x = torch.randn(B, T, n_in, dtype=torch.float64, requires_grad=True)
        state = states(kind, (n_layers * (1 + bidirectional), B, H)) if given else None
        mine, mine_last = ours(x, lengths, state)
        if lengths is None:
            other, other_last = theirs(x, state)
        else:
            packed = pack_padded_sequence(
                x, torch.tensor(lengths), batch_first=True, enforce_sorted=False
            )
            other, other_last = theirs(packed, state)
            other, _ = pad_packed_sequence(other, batch_first=True, total_length=T)
        mine, other = [mine, *parts(mine_last)], [other, *parts(other_last)]
        assert_equal(mine, other)

        inputs = [x, *(parts(state) if given else [])]
        my_parameters, their_parameters = [], []
        for i, cell in enumerate(ours.cells):
            W_ih, W_hh, b_ih, b_hh = parameters_of(theirs, i, 1 + bidirectional)
            my_parameters += [cell.W_xh.weight, cell.W_hh.weight, cell.W_xh.bias]
            their_parameters += [W_ih, W_hh, b_ih]
            if kind == "gru":
                my_parameters.append(cell.W_hh.bias)
                their_parameters.append(b_hh)
        assert_equal(
            gradients(mine, inputs + my_parameters), gradients(other, inputs + their_parameters)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_float32_too(kind):
    ours, theirs = pair(kind, 28, 33, dtype=torch.float32)
    x = torch.randn(17, 28, 28, requires_grad=True)
    mine, other = ours(x), theirs(x)
    torch.testing.assert_close(mine[0], other[0], rtol=1e-4, atol=1e-5)
    mine, other = ([outputs, *parts(last)] for outputs, last in (mine, other))
    cell = ours.cells[0]
    found = gradients(mine, [x, cell.W_xh.weight, cell.W_hh.weight])
    expected = gradients(other, [x, theirs.weight_ih_l0, theirs.weight_hh_l0])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_no_sequences_at_all(kind):
    """B = 0: as torch's modules, empty outputs and zero gradients."""
    layers = stage.Recurrent(kind, 3, 4, 2)
    for lengths in (None, []):
        outputs, last = layers(torch.zeros(0, 5, 3), lengths)
        assert outputs.shape == (0, 5, 4)
        assert [part.shape for part in parts(last)] == [(2, 0, 4)] * len(parts(last))
        layers.zero_grad()
        outputs.sum().backward()
        assert all(not p.grad.any() for p in layers.parameters())
    assert parts(layers.cells[0](torch.zeros(0, 3)))[0].shape == (0, 4)


@pytest.mark.parametrize(("dtype", "T"), [("uint8", 256), ("int8", 128), ("int16", 32_768)])
def test_lengths_of_a_small_dtype_that_cannot_hold_the_number_of_steps(dtype, T):
    layers = stage.Recurrent("rnn", 1, 1)
    with torch.no_grad():
        outputs, last = layers(torch.ones(1, T, 1), torch.tensor([1], dtype=getattr(torch, dtype)))
        expected = layers.cells[0](torch.ones(1, 1))
    assert_equal([last[0], outputs[:, 0]], [expected, expected], 1e-6)
    assert not outputs[:, 1:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_another_dtype_is_refused(kind):
    layers = stage.Recurrent(kind, 3, 4)
    state = torch.zeros(1, 5, 4, dtype=torch.float16)
    state = (torch.zeros(1, 5, 4), state) if kind == "lstm" else state
    with pytest.raises(ValueError, match="float32 expected, not of torch"):
        layers(torch.zeros(5, 7, 3), state=state)


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_as_in_float32_but_for_rounding(kind):
    torch.manual_seed(3)
    layers = stage.Recurrent(kind, 3, 4, 2, True)
    x = torch.randn(5, 7, 3)
    for lengths in (None, LENGTHS):
        expected, expected_last = layers(x, lengths)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs, last = layers(x, lengths)
            again, _ = layers(x, lengths, last)  # a state of the outputs' dtype goes on
        torch.testing.assert_close(outputs.float(), expected, rtol=0, atol=0.03)
        for part, exact in zip(parts(last), parts(expected_last), strict=True):
            torch.testing.assert_close(part.float(), exact, rtol=0, atol=0.06)
        exact, _ = layers(x, lengths, expected_last)
        torch.testing.assert_close(again.float(), exact, rtol=0, atol=0.06)
    outputs.sum().backward()
    assert all(p.grad.isfinite().all() for p in layers.parameters())


@pytest.mark.parametrize("kind", ["rnn", "lstm"])
def test_compiled_copied_and_pickled_it_gives_the_same(kind):
    model = stage.RecurrentClassifier(kind, 3, 4, 1, 6, True).double()
    x = torch.randn(5, 7, 3, dtype=torch.float64)
    expected = model(x, LENGTHS)
    compiled = torch.compile(model, backend="aot_eager")
    for other in (compiled, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal([other(x, LENGTHS)], [expected])
    found = torch.autograd.grad(compiled(x).sum(), list(model.parameters()))
    assert_equal(found, torch.autograd.grad(model(x).sum(), list(model.parameters())))


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_may_be_changed_in_place(kind):
    layers = stage.Recurrent(kind, 3, 4)
    x = torch.randn(2, 5, 3)
    outputs, _ = layers(x)
    expected = torch.autograd.grad(outputs.sum(), list(layers.parameters()))
    outputs, _ = layers(x)
    outputs.add_(1)
    assert_equal(torch.autograd.grad(outputs.sum(), list(layers.parameters())), expected, 1e-6)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_padding_holds_changes_nothing(kind, bidirectional):
    ours, _ = pair(kind, 3, 4, 2, bidirectional)
    x = torch.randn(5, 7, 3, dtype=torch.float64)
    padding = torch.arange(7) >= torch.tensor(LENGTHS)[:, None]
    results = []
    for filling in (0.0, 1e30, math.inf, math.nan):
        filled = x.masked_fill(padding[:, :, None], filling).requires_grad_()
        outputs, last = ours(filled, LENGTHS)
        found = gradients([outputs, *parts(last)], [filled, *ours.parameters()])
        results.append([outputs, *parts(last), *found])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert not results[0][0][padding].any()
    assert not found[0][padding].any()


def test_a_state_past_its_end_stands_still_however_long_the_padding():
    """A ReLU state that doubles at every step would be infinite after 2,000 more."""
    layers = stage.Recurrent("rnn_relu", 1, 1)
    with torch.no_grad():
        # W_xh, b, W_hh
        for parameter, value in zip(layers.parameters(), (1.0, 1.0, 2.0), strict=True):
            parameter.fill_(value)
    outputs, last = layers(torch.ones(1, 2000, 1), [2])
    assert (last.item(), outputs.sum().item()) == (6.0, 8.0)  # 1·1 + 1 = 2, then 2 + 2·2 = 6
    last.sum().backward()
    assert [p.grad.item() for p in layers.parameters()] == [3.0, 3.0, 2.0]


@pytest.mark.parametrize("kind", KINDS)
def test_two_halves_equal_the_whole(kind):
    ours, _ = pair(kind, 3, 4, 2)
    x = torch.randn(5, 9, 3, dtype=torch.float64)
    whole, last = ours(x)
    first, state = ours(x[:, :4])
    second, after = ours(x[:, 4:], state=state)
    assert_equal([torch.cat([first, second], 1), *parts(after)], [whole, *parts(last)], 1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_any_length_goes_through_the_same_model(kind):
    classifier = stage.RecurrentClassifier(kind, 5, 6, n_classes=3)
    for T in (1, 10, 1000):
        logits = classifier(torch.randn(2, T, 5))
        assert logits.shape == (2, 3)
        assert logits.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_does_not_depend_on_the_one_before_nor_on_its_neighbours(kind):
    ours, _ = pair(kind, 3, 4)
    x = torch.randn(6, 5, 3, dtype=torch.float64)
    before = ours(x)[0]
    ours(torch.randn(6, 5, 3, dtype=torch.float64))
    assert torch.equal(ours(x)[0], before)
    assert_equal([ours(x[2:3])[0]], [before[2:3]], 1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_steps_matters(kind):
    ours, _ = pair(kind, 3, 4)
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    assert (ours(x)[0][:, -1] - ours(x.flip(1))[0][:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_classifier_reads_out_the_last_state_or_the_mean(kind, bidirectional):
    ours, _ = pair(kind, 3, 4, 2, bidirectional)
    x, valid = (
        torch.randn(5, 7, 3, dtype=torch.float64),
        torch.arange(7) < torch.tensor(LENGTHS)[:, None],
    )
    outputs, last = ours(x, LENGTHS)
    tops = parts(last)[0].unflatten(0, (2, -1))[1]  # (directions, B, H)
    means = torch.stack([o[v].mean(0) for o, v in zip(outputs, valid, strict=True)])
    for readout, expected in (("last", torch.cat(list(tops), 1)), ("mean", means)):
        classifier = stage.RecurrentClassifier(kind, 3, 4, 2, 6, bidirectional, readout).double()
        classifier.recurrent.load_state_dict(ours.state_dict())
        assert_equal([classifier(x, LENGTHS)], [classifier.out(expected)], 1e-13)
        assert_equal([classifier(x)], [classifier(x, [7] * 5)], 1e-13)


def test_dropout_falls_between_the_layers_and_on_what_is_classified(monkeypatch):
    """With a dropout that doubles, whatever it is given, the result is that of the layers with
    these doublings.
    """
    torch.manual_seed(0)
    model, x = (
        stage.RecurrentClassifier("gru", 3, 4, 2, 6, True, dropout=0.5).double(),
        torch.randn(5, 7, 3).double(),
    )
    lower, upper = (stage.Recurrent("gru", size, 4, 1, True).double() for size in (3, 8))
    for layer, cells in ((lower, model.recurrent.cells[:2]), (upper, model.recurrent.cells[2:])):
        layer.cells.load_state_dict(cells.state_dict())
    last = upper(lower(x)[0])[1]
    assert_equal([model.eval()(x)], [model.out(torch.cat([*last], 1))])
    last = upper(2 * lower(x)[0])[1]
    monkeypatch.setattr(
        F, "dropout", lambda x, p, training, inplace=False: 2 * x if training and p == 0.5 else x
    )
    assert_equal([model.train()(x)], [model.out(2 * torch.cat([*last], 1))])


def test_what_is_wrong_is_quoted():
    layers = stage.Recurrent("gru", 3, 4, 2)
    x = torch.zeros(5, 7, 3)
    for bad, quoted in [
        (torch.zeros(5, 7), r"\(5, 7\)"),
        (torch.zeros(5, 7, 2), r"\(B, T, 3\).*\(5, 7, 2\)"),
        (torch.zeros(5, 0, 3), r"\(5, 0, 3\)"),
        (torch.zeros(1, 5, 7, 3), r"\(1, 5, 7, 3\)"),
    ]:
        with pytest.raises(ValueError, match=quoted):
            layers(bad)
    for lengths in (
        [3, 7, 0, 5, 2],
        [3, 8, 1, 5, 2],
        [3, 7, 1],
        [3.0, 7.0, 1.0, 5.0, 2.0],
        [[3, 7, 1, 5, 2]],
    ):
        with pytest.raises(ValueError, match=r"5 whole numbers in 1 … 7, not \["):
            layers(x, lengths)
    with pytest.raises(ValueError, match=r"\(2, 5, 4\).*\(1, 5, 4\)"):
        layers(x, state=torch.zeros(1, 5, 4))
    with pytest.raises(ValueError, match=r"2 × \(1, 5, 4\)"):
        stage.Recurrent("lstm", 3, 4)(x, state=torch.zeros(1, 5, 4))
    with pytest.raises(ValueError, match="elman"):
        stage.Recurrent("elman")
    with pytest.raises(ValueError, match="n_layers=0"):
        stage.Recurrent(n_layers=0)
    with pytest.raises(ValueError, match="n_hidden=0"):
        stage.LSTMCell(3, 0)
    with pytest.raises(ValueError, match="sigmoid"):
        stage.RNNCell(3, 4, "sigmoid")
    with pytest.raises(ValueError, match=r"\(B, 3\).*\(2, 4\)"):
        stage.RNNCell(3, 4)(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(2, 5\)"):
        stage.RNNCell(3, 4)(torch.zeros(2, 3), torch.zeros(2, 5))
    with pytest.raises(ValueError, match="max"):
        stage.RecurrentClassifier(readout="max")


def test_parameters_are_those_of_torch_but_for_the_second_bias():
    for kind in KINDS:
        ours, theirs = (sum(p.numel() for p in m.parameters()) for m in pair(kind, 28, 128))
        second = {"gru": 0, "lstm": 4 * 128}.get(kind, 128)
        assert ours == theirs - second


# ---- from images to sequences ----


def test_readings():
    images = torch.arange(2 * 784.0).view(2, 28, 28)
    ways = ("rows", "columns", "two_rows", "patches")
    read = {way: stage.sequences(images, replace(SMALL, reading=way))[0] for way in ways}
    assert torch.equal(read["rows"], images)
    for t in range(28):
        assert torch.equal(read["columns"][1, t], images[1, :, t])
        down, right = 7 * (t // 7), 4 * (t % 7)
        assert torch.equal(
            read["patches"][1, t], images[1, down : down + 7, right : right + 4].flatten()
        )
    for t in range(14):
        assert torch.equal(
            read["two_rows"][1, t], torch.cat([images[1, 2 * t], images[1, 2 * t + 1]])
        )


def test_cropping_keeps_the_garment_and_its_length(data):
    images = data.val.images[::25]  # of every class
    x, lengths = stage.sequences(images, replace(SMALL, crop=True, padding=3, lengths=True))
    assert x.shape == (200, 31, 28)
    assert lengths.min() < 15
    assert lengths.max() == 28
    assert images.min().item() == pytest.approx(BLANK, abs=1e-6)
    for image, rows, n in zip(images, x, lengths, strict=True):
        shown = [row for row in range(28) if (image[row] > images.min()).any()]
        assert n == shown[-1] - shown[0] + 1
        assert torch.equal(rows[:n], image[shown[0] : shown[-1] + 1])
        assert (rows[n:28] == images.min()).all()
    assert not x[:, 28:].any()


def test_lengths_are_told_only_when_asked(data):
    assert stage.sequences(data.val.images[:2], SMALL)[1] is None
    x, lengths = stage.sequences(data.val.images[:2], replace(SMALL, padding=5, lengths=True))
    assert (x.shape[1], lengths.tolist()) == (33, [28, 28])


def test_padding_with_lengths_is_no_padding(data):
    images = data.val.images[:20]
    config = replace(SMALL, cell="gru")
    model = stage.build(config)
    expected = stage.logits_of(model, images, config)
    told = stage.logits_of(model, images, replace(config, padding=9, lengths=True))
    blind = stage.logits_of(model, images, replace(config, padding=9))
    torch.testing.assert_close(told, expected)
    assert (blind - expected).abs().max() > 1e-2


def test_the_scales_are_the_data_sets_own(data):
    assert data.train.images.mean().item() == pytest.approx(0, abs=1e-2)
    assert data.train.images.std().item() == pytest.approx(1, abs=1e-2)
    pixels = data.val.images * 0.3530 + 0.2860
    mnists = stage.scaled_as(replace(SMALL, normalise="mnist"), data)
    torch.testing.assert_close(mnists.val.images * 0.3081 + 0.1307, pixels)
    unscaled = stage.scaled_as(replace(SMALL, normalise="none"), data)
    torch.testing.assert_close(unscaled.val.images, pixels)
    assert torch.equal(unscaled.val.labels, data.val.labels)


def test_two_images_of_the_archives_are_where_the_split_puts_them(data):
    """By torchvision's own reader: the test set in its order, the other two a partition."""
    from torchvision.datasets.mnist import read_image_file, read_label_file

    raw = stage.HERE / "data" / "FashionMNIST" / "raw"
    with TemporaryDirectory() as folder:
        unpacked = {}
        for name in stage.SHA256:
            unpacked[name] = Path(folder) / name
            unpacked[name].write_bytes(gzip.decompress((raw / f"{name}.gz").read_bytes()))
        images, _, test_images, test_labels = (
            (read_image_file if "images" in name else read_label_file)(str(path))
            for name, path in unpacked.items()
        )
    assert torch.equal(data.test.labels, test_labels.long())
    pixels = (data.test.images * 0.3530 + 0.2860) * 255
    torch.testing.assert_close(pixels, test_images.float(), rtol=0, atol=1e-3)
    assert (len(data.train.images), len(data.val.images)) == (55_000, 5_000)
    sums = torch.cat([data.train.images, data.val.images]).double().sum((1, 2))
    expected = ((images.double() / 255 - 0.2860) / 0.3530).sum((1, 2))
    torch.testing.assert_close(sums.sort().values, expected.sort().values, rtol=0, atol=1e-2)
    assert data.val.labels.bincount().tolist() == [500] * 10


# ---- initialisation, training, what is measured ----


def test_initialisations():
    inits = ("default", "orthogonal", "identity", "large")
    for cell, init in itertools.product(KINDS, inits):
        model = stage.build(stage.Config(cell=cell, init=init, n_hidden=32))
        found = model.recurrent.cells[0]
        for gate in found.W_hh.weight.split(32):
            if init == "default":
                assert 0.9 / math.sqrt(32) < gate.abs().max() <= 1 / math.sqrt(32)
            else:
                expected = {"orthogonal": 1, "identity": 1, "large": 4}[init] * torch.eye(32)
                torch.testing.assert_close(gate @ gate.mT, expected, rtol=0, atol=1e-5)
        assert bool(found.W_xh.bias.any()) == (init == "default")
        assert found.W_hh.bias is None or found.W_hh.bias.any()
    assert torch.equal(stage.build(SMALL).recurrent.cells[0].W_hh.weight, torch.eye(9))


def test_the_forget_bias_holds_the_memory_and_touches_nothing_else():
    """With all weights 0, c' = σ(b_f) c: of 1 remains σ(b_f) to the power of the steps."""
    model = stage.build(stage.Config(cell="lstm", n_hidden=3, forget_bias=2.0))
    cell = model.recurrent.cells[0]
    assert cell.W_xh.bias.tolist() == [0.0] * 3 + [2.0] * 3 + [0.0] * 6
    with torch.no_grad():
        cell.W_xh.weight.zero_()
        cell.W_hh.weight.zero_()
        _, (_, c) = model.recurrent(
            torch.ones(1, 20, 56), state=(torch.zeros(1, 1, 3), torch.ones(1, 1, 3))
        )
    assert c.flatten().tolist() == pytest.approx([(1 / (1 + math.exp(-2))) ** 20] * 3, rel=1e-5)


def test_a_training_step_equals_torchs(data):
    """Three steps of SGD, clipped, through nn.RNN from the same weights."""
    config = replace(
        SMALL,
        optimizer="sgd",
        lr=0.5,
        weight_decay=0.01,
        batch_size=300,
        steps=3,
        warmup=0.4,
        clip=0.5,
    )
    trained, history = stage.train(config, data)
    start = stage.build(config)
    theirs, out = nn.RNN(28, 9, nonlinearity="relu", batch_first=True), start.out
    cell = start.recurrent.cells[0]
    with torch.no_grad():
        for copy, value in zip(
            theirs.parameters(),
            (cell.W_xh.weight, cell.W_hh.weight, 0 * cell.W_xh.bias),
            strict=False,
        ):
            copy.copy_(value)
    theirs.bias_ih_l0.data.copy_(cell.W_xh.bias)
    theirs.bias_hh_l0.data.zero_()
    theirs.bias_hh_l0.requires_grad_(False)
    parameters = [*(p for p in theirs.parameters() if p.requires_grad), *out.parameters()]
    images, labels = (part[:300] for part in data.train)
    for step in range(3):
        loss = F.cross_entropy(out(theirs(images)[0][:, -1]), labels, label_smoothing=0.1)
        found = torch.autograd.grad(loss, parameters)
        norm = math.sqrt(sum(g.square().sum().item() for g in found))
        at = (step + 0.5) / 3  # of the run; the rate rises for the first 40 %
        lr = 0.5 * (at / 0.4 if at < 0.4 else (1 + math.cos(math.pi * (at - 0.4) / 0.6)) / 2)
        with torch.no_grad():
            for p, g in zip(parameters, found, strict=True):
                p -= lr * (min(1, 0.5 / norm) * g + 0.01 * (p.ndim > 1) * p)
    assert history[-1]["grad_norm"] == pytest.approx(norm, rel=1e-3)
    torch.testing.assert_close(
        trained.recurrent.cells[0].W_hh.weight, theirs.weight_hh_l0, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        trained.recurrent.cells[0].W_xh.weight, theirs.weight_ih_l0, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(trained.out.weight, out.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_cell_learns(data, kind):
    config = replace(
        SMALL,
        cell=kind,
        init=stage.SUITED_INIT[kind],
        n_hidden=32,
        n_train=2000,
        steps=200,
        lr=3e-3,
    )
    assert stage.train(config, data)[1][-1]["val_accuracy"] > 0.5


def test_one_batch_is_learned_by_heart(data):
    config = replace(SMALL, n_hidden=128, n_train=64, batch_size=64, steps=300, lr=3e-3)
    model, history = stage.train(replace(config, label_smoothing=0.0), data)
    assert history[-1]["objective"] < 1e-3
    assert history[-1]["train_accuracy"] == 1
    seen = stage.evaluate(model, stage.Split(*(part[:64] for part in data.train)))
    assert (seen["accuracy"], seen["loss"] < 1e-3) == (1, True)


def test_history_holds_what_evaluate_gives_on_the_images_that_were_used(data):
    config = replace(SMALL, cell="gru", n_layers=2, dropout=0.3, both_views=True, shift=1)
    model, history = stage.train(config, data)
    seen = stage.evaluate(model, stage.Split(*(part[:300] for part in data.train)), config)
    val = stage.evaluate(model, data.val, config)
    row = history[-1]
    assert (row["train_loss"], row["train_accuracy"]) == (seen["loss"], seen["accuracy"])
    assert [row[f"val_{name}"] for name in stage.SCORES] == [val[name] for name in stage.SCORES]
    assert [row["step"] for row in history] == [4, 8, 12]
    assert [row["epoch"] for row in history] == [0.4, 0.8, 1.2]  # 300 images are 10 batches of 32


def test_the_same_seed_gives_the_same_history(data):
    config = replace(SMALL, cell="lstm", bidirectional=True, n_layers=2, dropout=0.2, flip=True)

    def history_of(seed):
        _, history = stage.train(replace(config, seed=seed), data)
        return [{k: v for k, v in row.items() if k != "seconds"} for row in history]

    assert history_of(3) == history_of(3) != history_of(4)


def test_nothing_waits_for_the_device_between_log_rows(data, monkeypatch):
    reads = []
    for name in ("item", "__bool__", "__float__", "tolist", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def counted(tensor, *args, original=original, **kwargs):
            reads.append(1)
            return original(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    numbers = []
    for steps in (10, 50):
        reads.clear()
        stage.train(replace(SMALL, steps=steps, n_logs=1, flip=True, shift=1), data)
        numbers.append(len(reads))
    assert numbers[0] == numbers[1] > 0


def test_a_loss_that_is_not_finite_ends_the_run_as_diverged(data):
    config = replace(SMALL, optimizer="sgd", lr=1e30, warmup=0.0, clip=0.0, steps=100, n_logs=10)
    _, history = stage.train(config, data)
    assert stage.status(history) == "diverged"
    assert len(history) < 10


def test_flipping_mirrors_about_half_of_the_images_left_to_right(data):
    torch.manual_seed(0)
    images = data.train.images[:400]
    flipped = stage.augmented(images, True, 0, BLANK)
    is_same = (flipped == images).all(2).all(1)
    is_mirrored = (flipped == images.flip(2)).all(2).all(1)
    assert (is_same | is_mirrored).all()
    assert 150 < is_mirrored.sum() < 250


def test_shifting_moves_each_image_by_itself_and_fills_up_with_blank():
    torch.manual_seed(0)
    images = 1 + torch.rand(300, 28, 28)
    moved = stage.augmented(images, False, 2, -1.0)
    seen = set()
    for before, after in zip(images, moved, strict=True):
        wide = F.pad(before, (2, 2, 2, 2), value=-1.0)
        places = itertools.product(range(5), range(5))
        seen |= {(i, j) for i, j in places if torch.equal(wide[i : i + 28, j : j + 28], after)}
    assert len(seen) == 25
    assert torch.equal(stage.augmented(images, False, 0, -1.0), images)


def test_batches_hold_every_image_once_an_epoch_and_classes_in_turn_only_when_not_shuffled():
    labels = torch.tensor([2, 0, 1, 0, 2, 1, 1])
    config = replace(SMALL, batch_size=3)
    endless = stage.batches(labels, config)
    first, second = ([next(endless) for _ in range(3)] for _ in range(2))
    assert [len(batch) for batch in first] == [3, 3, 1]
    assert sorted(torch.cat(first).tolist()) == sorted(torch.cat(second).tolist()) == [*range(7)]
    in_turn = stage.batches(labels, replace(config, shuffle=False))
    assert torch.cat([next(in_turn) for _ in range(3)]).tolist() == [1, 3, 2, 5, 6, 0, 4]


def test_both_views_are_the_mean_of_an_image_and_its_mirror_image(data):
    config = replace(SMALL, both_views=True)
    model = stage.build(config)
    split = stage.Split(*(part[::9] for part in data.val))
    with torch.no_grad():
        logits = (model(split.images) + model(split.images.flip(2))) / 2
    result = stage.evaluate(model, split, config)
    assert result["accuracy"] == (logits.argmax(1) == split.labels).double().mean().item()
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, split.labels).item(), rel=1e-6)
    assert stage.evaluate(model, split)["loss"] != result["loss"]


def test_any_model_is_evaluated_and_every_module_gets_its_own_flag_back(data):
    split = stage.Split(*(part[::50] for part in data.val))
    model = stage.RecurrentClassifier("lstm", 28, 5, 2, dropout=0.5)
    model.train()
    model.recurrent.cells[1].eval()
    flags = [module.training for module in model.modules()]
    found, again = stage.evaluate(model, split), stage.evaluate(model, split)
    assert [module.training for module in model.modules()] == flags
    assert found["loss"] == again["loss"]  # dropout is off
    with torch.no_grad():
        logits = model.eval()(split.images)
    options = {"labels": range(10), "average": "macro", "zero_division": 0}
    p, r, f, _ = precision_recall_fscore_support(split.labels, logits.argmax(1), **options)
    scores = [found[f"macro_{name}"] for name in ("precision", "recall", "f1")]
    assert scores == pytest.approx([p, r, f])
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, split.labels).item(), rel=1e-6)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))

    class OfSequences(nn.Module):
        def forward(self, x, lengths=None):
            return plain(x)

    with torch.no_grad():
        expected = F.cross_entropy(plain(split.images), split.labels).item()
    assert stage.evaluate(OfSequences(), split)["loss"] == pytest.approx(expected, rel=1e-6)


def test_state_gradients_of_an_lstm_are_those_of_torchs_cell(data):
    config = replace(SMALL, cell="lstm", init="default")
    model = stage.build(config)
    cell, theirs = model.recurrent.cells[0], nn.LSTMCell(28, 9)
    with torch.no_grad():
        theirs.weight_ih.copy_(cell.W_xh.weight)
        theirs.weight_hh.copy_(cell.W_hh.weight)
        theirs.bias_ih.copy_(cell.W_xh.bias)
        theirs.bias_hh.zero_()
    x, state, seen = data.val.images[::10], None, []
    for t in range(28):
        # what the next step is given: c apart from h
        state = tuple(part.clone() for part in theirs(x[:, t], state))
        for part in state:
            part.retain_grad()
        seen.append(state)
    F.cross_entropy(model.out(state[0]), data.val.labels[::10]).backward()
    norms = [
        math.hypot(*(part.grad.norm().item() for part in state if part.grad is not None))
        for state in seen
    ]
    assert stage.state_gradients(model, config, data) == pytest.approx(norms, rel=1e-3)


def test_shares_are_averaged_as_powers_of_ten():
    rows = pd.DataFrame({"cell": "rnn", "init": "default", "share": [1e-2, 1e-6]})
    line = stage.share_table(rows).splitlines()[-1]
    assert [cell.strip() for cell in line.split("|")[1:-1]] == [
        *("RNN, tanh", "default", "1.0e-04", "1.0e-06 … 1.0e-02", "2")
    ]


def test_state_gradients_of_an_rnn_are_those_of_the_written_out_loop(data):
    config = replace(SMALL, cell="rnn", init="default")
    model = stage.build(config)
    cell, x = model.recurrent.cells[0], data.val.images[::10]
    h, seen = torch.zeros(500, 9), []
    for t in range(28):
        h = torch.tanh(cell.W_xh(x[:, t]) + cell.W_hh(h))
        h.retain_grad()
        seen.append(h)
    F.cross_entropy(model.out(h), data.val.labels[::10]).backward()
    expected = [state.grad.norm().item() for state in seen]
    assert stage.state_gradients(model, config, data) == pytest.approx(expected, rel=1e-3)
    assert expected[0] < 0.1 * expected[-1]
    ratio = stage.gradient_ratio(config, [], data)
    assert ratio == pytest.approx(expected[0] / expected[-1], rel=1e-3)


def test_the_last_probabilities_of_a_reading_are_the_models_own(data):
    model = stage.build(SMALL)
    rows = stage.read_step_by_step(model, SMALL, data.test)
    assert len(rows) == 8 * 28
    last = torch.tensor([[row[f"p{c}"] for c in range(10)] for row in rows if row["step"] == 28])
    torch.testing.assert_close(last, model(data.test.images[:8]).softmax(1).detach())
    assert [row["true"] for row in rows[:8]] == data.test.labels[:8].tolist()
    pixels = torch.tensor(
        [[float(v) for v in row["pixels"].split()] for row in rows if row["image"] == 3]
    )
    torch.testing.assert_close(pixels, data.test.images[3], rtol=0, atol=0.0051)


# ---- the experiments ----


def test_every_config_of_the_table_is_sound_and_every_fault_names_two_of_its_runs():
    for values in stage.EXPERIMENTS.values():
        for config in values.values():
            config.check()
    named = [name for fault in stage.FAULTS.values() for name in (fault.broken, fault.mended)]
    assert sorted(named) == sorted(stage.EXPERIMENTS["faults"])


def test_the_gated_networks_are_compared_at_equal_budget():
    (gru,) = stage.EXPERIMENTS["gru"].values()
    (lstm,) = stage.EXPERIMENTS["lstm"].values()
    assert replace(gru, cell="lstm", forget_bias=lstm.forget_bias) == lstm


@pytest.mark.parametrize(
    ("changes", "quoted"),
    [
        ({"n_hidden": 0}, r"n_hidden must be at least 1, not 0 \(--n-hidden\)"),
        ({"shift": 28}, r"shift must be at most 27, not 28 \(--shift\)"),
        ({"lr": math.nan}, r"lr must be .* not nan \(--lr\)"),
        ({"cell": "elman"}, "cell must be one of rnn, rnn_relu, gru, lstm, not 'elman'"),
    ],
)
def test_what_is_wrong_in_a_config_is_quoted_with_its_flag(changes, quoted):
    with pytest.raises(ValueError, match=quoted):
        replace(SMALL, **changes).check()


# ---- images of one's own ----


def photo_of(image, size, where, paper, noise=0.0):
    """A garment (28, 28) of 0 … 1, light on black, as a photo on light paper of `size` pixels."""
    height, width = size
    side, top, left = where
    big = Image.fromarray((255 * image).astype(np.uint8)).resize((side, side))
    photo = np.full((height, width), float(paper))
    photo[top : top + side, left : left + side] -= np.asarray(big) * (paper / 255)
    rng = np.random.default_rng(0)
    return Image.fromarray((photo + noise * rng.standard_normal(size)).clip(0, 255).astype("uint8"))


def test_a_photo_of_a_garment_becomes_what_the_network_was_trained_on(data, tmp_path):
    """Twelve test images as photos on white paper, of many sizes, come back as they were."""
    for i in range(12):
        image = (data.test.images[i] * 0.3530 + 0.2860).clamp(0, 1).numpy()
        photo_of(image, (200 + i, 300), (112, 40, 20 + 9 * i), 250).save(tmp_path / "photo.png")
        found = stage.read_garment(tmp_path / "photo.png")
        assert found.shape == (28, 28)
        assert 0.8 < found.max() <= 1
        shown = np.flatnonzero((image > 0.1).any(1))
        seen = np.flatnonzero((found > 0.1).any(1))
        wide = np.flatnonzero((image > 0.1).any(0))
        if len(shown) >= len(wide) and len(shown) >= 26:  # its longest edge fills the image
            assert abs(len(seen) - len(shown)) <= 2
            assert np.abs(found - image / image.max()).mean() < 0.12


def test_what_is_no_garment_is_refused(tmp_path):
    Image.new("L", (50, 60), 200).save(tmp_path / "even.png")
    (tmp_path / "text.png").write_text("no image")
    for name, words in (("even", "nearly even"), ("text", "not an image"), ("none", "no such")):
        with pytest.raises(ValueError, match=words):
            stage.read_garment(tmp_path / f"{name}.png")


# ---- committed evidence ----

EVIDENCE = stage.HERE / "figures" / "stage2"


@pytest.mark.skipif(
    not all((EVIDENCE / f"{name}.pt").exists() for name in stage.SELECTED),
    reason="not all were trained with this table yet",
)
def test_the_committed_weights_are_those_of_the_committed_rows(data):
    tests = metrics.load_rows(EVIDENCE / "test_metrics.csv")
    for name in stage.SELECTED:
        row = tests[(tests["experiment"] == name) & (tests["seed"] == 0)].iloc[0]
        model, config = stage.load_weights(EVIDENCE / f"{name}.pt")
        found = stage.evaluate(model, data.test, config)
        assert found["accuracy"] == pytest.approx(row["accuracy"], abs=2e-4)  # processors round
