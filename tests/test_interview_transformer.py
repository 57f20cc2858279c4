"""interview/transformer.py against torch's own layers, and against itself by other routes."""

import itertools
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT, assert_equal
from torch import nn
from torch.nn import functional as F

import metrics
import stage1_mlp
from interview import decoding, transformer
from interview.transformer import BEGIN, END, Recipe, Transformer

D, H, D_FF = 12, 3, 20
S, T, B = 7, 5, 4


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def shaken(module, seed=1):
    """The module in float64 with no parameter at its neutral start."""
    module = module.double()
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.add_(0.3 * draw(*parameter.shape, seed=100 * seed + i))
    return module


def copy_attention(theirs, ours):
    """Our four projections into nn.MultiheadAttention, which keeps three of them in one."""
    inputs = (ours.W_q, ours.W_k, ours.W_v)
    theirs.in_proj_weight.data = torch.cat([layer.weight.data for layer in inputs])
    theirs.in_proj_bias.data = torch.cat([layer.bias.data for layer in inputs])
    theirs.out_proj.load_state_dict(ours.W_o.state_dict())


def copy_rest(theirs, ours, n_norms):
    theirs.linear1.load_state_dict(ours.feed_forward.W_1.state_dict())
    theirs.linear2.load_state_dict(ours.feed_forward.W_2.state_dict())
    for i in range(1, n_norms + 1):
        getattr(theirs, f"norm{i}").load_state_dict(getattr(ours, f"norm_{i}").state_dict())


SIZES = {"d_model": D, "nhead": H, "dim_feedforward": D_FF, "dropout": 0.0, "batch_first": True}


def encoder_pair(norm_first):
    torch.manual_seed(0)
    ours = shaken(transformer.EncoderLayer(D, H, D_FF, norm_first))
    theirs = nn.TransformerEncoderLayer(**SIZES, norm_first=norm_first).double()
    copy_attention(theirs.self_attn, ours.attention)
    copy_rest(theirs, ours, 2)
    return ours, theirs


def decoder_pair(norm_first):
    torch.manual_seed(0)
    ours = shaken(transformer.DecoderLayer(D, H, D_FF, norm_first))
    theirs = nn.TransformerDecoderLayer(**SIZES, norm_first=norm_first).double()
    copy_attention(theirs.self_attn, ours.self_attention)
    copy_attention(theirs.multihead_attn, ours.cross_attention)
    copy_rest(theirs, ours, 3)
    return ours, theirs


def in_our_order(theirs):
    """Gradients of torch's layer as those of ours: {norms, feed-forward, output projections}."""
    return [p.grad for name, p in theirs.named_parameters() if "in_proj" not in name]


def parts_in_torchs_order(ours, attentions, n_norms):
    """Our parameters that are a parameter of torch's layer, in its order."""
    found = []
    for attention in attentions:
        found += [attention.W_o.weight, attention.W_o.bias]
    found += [*ours.feed_forward.W_1.parameters(), *ours.feed_forward.W_2.parameters()]
    for i in range(1, n_norms + 1):
        found += list(getattr(ours, f"norm_{i}").parameters())
    return found


def assert_same_gradients(ours, theirs, attentions, n_norms):
    """After a backward pass of both: every parameter's gradient."""
    mine = parts_in_torchs_order(ours, [own for own, _ in attentions], n_norms)
    assert_equal([p.grad for p in mine], in_our_order(theirs), 1e-10)
    for own, other in attentions:
        inputs = (own.W_q, own.W_k, own.W_v)
        weight = torch.cat([layer.weight.grad for layer in inputs])
        bias = torch.cat([layer.bias.grad for layer in inputs])
        assert_equal([weight, bias], [other.in_proj_weight.grad, other.in_proj_bias.grad], 1e-10)


CAUSAL = nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64).isinf()
LENGTHS = torch.tensor([7, 1, 4, 6])


# ---- masks ----


def test_padding_mask_is_true_where_a_token_is():
    mask = transformer.padding_mask(torch.tensor([2, 0, 3]), 3)
    expected = [[True, True, False], [False] * 3, [True] * 3]
    assert mask.tolist() == [[[row]] for row in expected]
    assert transformer.padding_mask(torch.ones(0, dtype=torch.int32), 3).shape == (0, 1, 1, 3)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (torch.tensor([1.0]), r"whole numbers \(B,\) expected, not torch.float32 \(1,\)"),
        (torch.tensor([[1]]), r"not torch.int64 \(1, 1\)"),
        (torch.tensor([True]), "not torch.bool"),
        (torch.tensor([2, 5]), "must lie in 0 … 4, not in 2 … 5"),
        (torch.tensor([-1, 2]), "must lie in 0 … 4, not in -1 … 2"),
    ],
)
def test_padding_mask_refuses_what_does_not_fit(lengths, message):
    with pytest.raises(ValueError, match=message):
        transformer.padding_mask(lengths, 4)


# ---- the layers beside torch's ----


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("masked", ["nothing", "padding", "causal", "both"])
def test_the_encoder_layer_is_torchs_in_value_and_gradients(norm_first, masked):
    ours, theirs = encoder_pair(norm_first)
    mask = torch.ones(1, 1, S, S, dtype=torch.bool)
    options = {}
    if masked in ("padding", "both"):
        mask = mask & transformer.padding_mask(LENGTHS, S)
        options["src_key_padding_mask"] = torch.arange(S) >= LENGTHS[:, None]
    if masked in ("causal", "both"):
        hidden = torch.ones(S, S, dtype=torch.bool).triu(1)
        mask = mask & ~hidden
        options["src_mask"] = hidden
    x = draw(B, S, D).requires_grad_()
    y = draw(B, S, D).requires_grad_()
    out, other = ours(x, mask), theirs(y, **options)
    assert_equal([out], [other], 1e-11)
    weight = draw(B, S, D, seed=3)
    (out * weight).sum().backward()
    (other * weight).sum().backward()
    assert_equal([x.grad], [y.grad], 1e-10)
    assert_same_gradients(ours, theirs, [(ours.attention, theirs.self_attn)], 2)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("masked", ["causal alone", "memory", "both"])
def test_the_decoder_layer_is_torchs_in_value_and_gradients(norm_first, masked):
    ours, theirs = decoder_pair(norm_first)
    mask = memory_mask = None
    options = {"tgt_mask": CAUSAL}
    if masked in ("memory", "both"):
        memory_mask = transformer.padding_mask(LENGTHS, S)
        options["memory_key_padding_mask"] = ~memory_mask[:, 0, 0]
    if masked == "both":
        lengths = torch.tensor([5, 2, 3, 1])
        mask = transformer.padding_mask(lengths, T)
        options["tgt_key_padding_mask"] = ~mask[:, 0, 0]
    inputs = [draw(B, T, D).requires_grad_(), draw(B, S, D, seed=1).requires_grad_()]
    others = [x.detach().clone().requires_grad_() for x in inputs]
    out, weights = ours(*inputs, mask=mask, memory_mask=memory_mask)
    other = theirs(*others, **options)
    assert_equal([out], [other], 1e-11)
    grad = draw(B, T, D, seed=3)
    (out * grad).sum().backward()
    (other * grad).sum().backward()
    assert_equal([x.grad for x in inputs], [x.grad for x in others], 1e-10)
    pairs = [
        (ours.self_attention, theirs.self_attn),
        (ours.cross_attention, theirs.multihead_attn),
    ]
    assert_same_gradients(ours, theirs, pairs, 3)
    assert weights.shape == (B, H, T, S)
    assert_equal([weights.sum(3)], [torch.ones(B, H, T, dtype=torch.float64)], 1e-12)


def test_the_decoders_weights_are_torchs():
    ours, theirs = decoder_pair(norm_first=True)
    x, memory = draw(B, T, D), draw(B, S, D, seed=1)
    _, weights = ours(x, memory, memory_mask=transformer.padding_mask(LENGTHS, S))
    query = x + ours.attend(ours.norm_1(x), None, None)
    hidden = torch.arange(S) >= LENGTHS[:, None]
    options = {"key_padding_mask": hidden, "average_attn_weights": False}
    _, expected = theirs.multihead_attn(ours.norm_2(query), memory, memory, **options)
    assert_equal([weights], [expected], 1e-12)


def test_dropout_acts_on_what_is_added_and_not_in_evaluation():
    x, memory = draw(B, T, D), draw(B, S, D, seed=1)
    encoder = shaken(transformer.EncoderLayer(D, H, D_FF, dropout=1.0))
    decoder = shaken(transformer.DecoderLayer(D, H, D_FF, dropout=1.0))
    assert_equal([encoder(x), decoder(x, memory)[0]], [x, x], 0)
    encoder.eval()
    without = shaken(transformer.EncoderLayer(D, H, D_FF))
    without.load_state_dict(encoder.state_dict())
    assert_equal([encoder(x)], [without(x)], 0)


# ---- the whole model beside torch's ----


def small(norm_first=True, position="sinusoids", n_tokens=9):
    torch.manual_seed(0)
    model = Transformer(D, H, D_FF, 2, 3, n_tokens, norm_first, position)
    return shaken(model, seed=2)


def test_pre_norm_stacks_are_torchs_with_their_last_norms():
    model = small(position="none")
    encoder_layer, decoder_layer = encoder_pair(True)[1], decoder_pair(True)[1]
    encoder = nn.TransformerEncoder(encoder_layer, 2, nn.LayerNorm(D).double(), False)
    decoder = nn.TransformerDecoder(decoder_layer, 3, nn.LayerNorm(D).double())
    for theirs, ours in zip(encoder.layers, model.encoder, strict=True):
        copy_attention(theirs.self_attn, ours.attention)
        copy_rest(theirs, ours, 2)
    for theirs, ours in zip(decoder.layers, model.decoder, strict=True):
        copy_attention(theirs.self_attn, ours.self_attention)
        copy_attention(theirs.multihead_attn, ours.cross_attention)
        copy_rest(theirs, ours, 3)
    encoder.norm.load_state_dict(model.encoder_norm.state_dict())
    decoder.norm.load_state_dict(model.decoder_norm.state_dict())
    x = draw(B, S, D)
    tokens = torch.randint(9, (B, T), generator=torch.Generator().manual_seed(0))
    mask = transformer.padding_mask(LENGTHS, S)
    hidden = ~mask[:, 0, 0]
    memory = encoder(x, src_key_padding_mask=hidden)
    embedded = model.embedding(tokens)
    out = decoder(embedded, memory, tgt_mask=CAUSAL, memory_key_padding_mask=hidden)
    assert_equal([model(x, tokens, mask)], [model.output(out)], 1e-10)


@pytest.mark.parametrize("position", transformer.POSITIONS)
@pytest.mark.parametrize("norm_first", [True, False])
def test_padding_changes_nothing_of_what_is_read(position, norm_first):
    model = small(norm_first, position)
    tokens = torch.tensor([[1, 2, 0, 8]])
    x = draw(1, 5, D)
    padded = torch.cat([x, 9 * draw(1, 3, D, seed=5)], 1)
    mask = transformer.padding_mask(torch.tensor([5]), 8)
    assert_equal([model(padded, tokens, mask)], [model(x, tokens)], 1e-11)


@pytest.mark.parametrize("position", transformer.POSITIONS)
def test_no_token_sees_its_future(position):
    model = small(position=position)
    x = draw(2, S, D)
    tokens = torch.tensor([[1, 2, 0, 8, 3], [4, 4, 7, 6, 5]])
    whole = model(x, tokens)
    for n in range(1, T):
        assert_equal([model(x, tokens[:, :n])], [whole[:, :n]], 1e-11)


def test_only_positions_tell_shuffled_tokens_apart():
    order = torch.tensor([4, 2, 0, 6, 5, 1, 3])
    x = draw(2, S, D)
    tokens = torch.tensor([[1, 2, 0], [4, 4, 7]])
    for position in transformer.POSITIONS:
        model = small(position=position)
        difference = (model(x[:, order], tokens) - model(x, tokens)).abs().max()
        assert (difference < 1e-10) == (position == "none")


# ---- decoding with caches ----


@pytest.mark.parametrize("position", transformer.POSITIONS)
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("pieces", [(1, 1, 1, 1, 1), (2, 3), (4, 1), (5,)])
def test_decoding_with_caches_is_decoding_without(position, norm_first, pieces):
    model = small(norm_first, position)
    mask = transformer.padding_mask(LENGTHS, S)
    memory = model.encode(draw(B, S, D), mask)
    tokens = torch.randint(9, (B, T), generator=torch.Generator().manual_seed(1))
    expected, expected_weights = model.decode(tokens, memory, mask)
    caches = model.caches(B, T, S)
    with torch.no_grad():
        parts = [model.decode(piece, memory, mask, caches) for piece in tokens.split(pieces, 1)]
    assert_equal([torch.cat([logits for logits, _ in parts], 1)], [expected], 1e-11)
    for layer, weights in enumerate(expected_weights):
        found = torch.cat([each[layer] for _, each in parts], 2)
        assert_equal([found], [weights], 1e-11)
    assert [(own.length, of_memory.length) for own, of_memory in caches] == [(T, S)] * 3


def test_decoding_with_caches_works_under_autocast():
    model = small(True, "rotary").float()
    memory = model.encode(draw(B, S, D).float())
    tokens = torch.randint(9, (B, T), generator=torch.Generator().manual_seed(1))
    expected, _ = model.decode(tokens, memory)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        caches = model.caches(B, T, S)
        parts = [model.decode(token, memory, caches=caches)[0] for token in tokens.split(1, 1)]
    assert caches[0][0].k.dtype == torch.bfloat16
    torch.testing.assert_close(torch.cat(parts, 1).float(), expected, rtol=0.05, atol=0.05)


@torch.no_grad()
def test_greedy_and_a_beam_of_one_and_caches_write_the_same():
    model = small()
    mask = transformer.padding_mask(LENGTHS, S)
    memory = model.encode(draw(B, S, D), mask)
    start = torch.zeros(B, 1, dtype=torch.int64)
    plain = decoding.greedy(transformer.whole_step(model, memory, mask), start, 6, eos=8)
    cached = transformer.cached_step(model, memory, mask, n_tokens=7)
    assert torch.equal(decoding.greedy(cached, start, 6, eos=8), plain)
    for b in range(B):
        step = transformer.whole_step(model, memory[b : b + 1], mask[b : b + 1])
        found, _ = decoding.beam_search(step, start[:1], 6, 1, eos=8)
        assert torch.equal(found[0], plain[b])


@torch.no_grad()
def test_a_wide_beam_finds_the_likeliest_of_all_sequences():
    model = small(n_tokens=3)
    memory = model.encode(draw(1, S, D))
    start = torch.zeros(1, 1, dtype=torch.int64)
    step = transformer.whole_step(model, memory)
    found, scores = decoding.beam_search(step, start, 3, 27, eos=2)
    sums = {}
    for rest in itertools.product(range(3), repeat=3):
        tokens = torch.tensor([[0, *rest]])
        logits, _ = model.decode(tokens[:, :-1], memory)
        log_p = logits[0].log_softmax(1)[range(3), rest]
        length = rest.index(2) + 1 if 2 in rest else 3
        written = (0, *rest[:length], *[2] * (3 - length))
        sums[written] = log_p[:length].sum().item()
    order = sorted(sums, key=sums.get, reverse=True)
    assert len(order) == 15
    assert [tuple(row) for row in found.tolist()] == order
    assert scores.tolist() == pytest.approx([sums[written] for written in order], rel=1e-9)


def test_a_call_that_fails_leaves_the_caches_as_they_were():
    model = small()
    memory = model.encode(draw(B, S, D)).detach()
    caches = model.caches(B, 4, S)
    caches[2] = transformer.LayerCaches(model.caches(B, 1, S)[0].own, caches[2].memory)
    tokens = torch.ones(B, 2, dtype=torch.int64)
    with torch.no_grad(), pytest.raises(ValueError, match="no room for 2 more"):
        model.decode(tokens, memory, caches=caches)
    assert all(cache.length == 0 for pair in caches for cache in pair)
    logits, _ = model.decode(tokens[:, :1], memory, caches=caches)
    assert_equal([logits], [model.decode(tokens[:, :1], memory)[0]], 1e-11)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_model": 10}, "d_model=10 is not a multiple of n_heads=3"),
        ({"d_ff": 0}, "d_ff must be a whole number of at least 1, not 0"),
        ({"n_encoder": 0}, "n_encoder must be .* at least 1, not 0"),
        ({"n_decoder": 1.5}, "n_decoder must be .*, not 1.5"),
        ({"n_tokens": -2}, "n_tokens must be .*, not -2"),
        ({"position": "absolute"}, "one of none, sinusoids, rotary, relative, not 'absolute'"),
        ({"position": "rotary", "d_model": 9}, "must be even, not d_head=3"),
    ],
)
def test_the_model_refuses_sizes_that_do_not_fit(arguments, message):
    usual = {"d_model": D, "n_heads": H, "d_ff": D_FF, "n_encoder": 1, "n_decoder": 1}
    with pytest.raises(ValueError, match=message):
        Transformer(**(usual | {"n_tokens": 5} | arguments))


def test_the_model_refuses_inputs_that_do_not_fit():
    model = small()
    memory = draw(2, S, D)
    with pytest.raises(ValueError, match=r"not \(3, 4\) and \(2, 7, 12\)"):
        model.decode(torch.zeros(3, 4, dtype=torch.int64), memory)
    with pytest.raises(ValueError, match=r"not \(4,\) and \(2, 7, 12\)"):
        model.decode(torch.zeros(4, dtype=torch.int64), memory)
    with pytest.raises(ValueError, match="2 caches for 3 decoder layers"):
        tokens = torch.zeros(2, 4, dtype=torch.int64)
        model.decode(tokens, memory, caches=model.caches(2, 4, S)[:2])
    with pytest.raises(ValueError, match=r"x \(B, T, 12\) .* not \(2, 7, 11\)"):
        model.encoder[0](draw(2, S, 11))


# ---- strips ----


@pytest.fixture(scope="module")
def data():
    """A few images of each split: train 300, val 50 of all classes, test 40."""
    data = transformer.data_on("cpu", ROOT / "data")
    train = stage1_mlp.Split(data.train.images[:300], data.train.labels[:300])
    val = stage1_mlp.Split(data.val.images[::100], data.val.labels[::100])
    test = stage1_mlp.Split(data.test.images[:40], data.test.labels[:40])
    return stage1_mlp.Data(train, val, test)


def test_strips_are_their_digits_side_by_side(data):
    """Each strip built again with a loop, from images told apart by their label alone."""
    one_each = [int((data.val.labels == label).nonzero()[0]) for label in range(10)]
    split = stage1_mlp.Split(data.val.images[one_each], data.val.labels[one_each])
    strips = transformer.draw_strips(split, 60, 2, 5, torch.Generator().manual_seed(3))
    background = split.images.min()
    assert set(strips.lengths.tolist()) == {2, 3, 4, 5}
    for b in range(60):
        n = int(strips.lengths[b])
        expected = torch.zeros(28, strips.images.shape[2])
        for digit, place in zip(strips.numbers[b, :n], strips.places[b, :n], strict=True):
            image = split.images[int(digit)].view(28, 28) - background
            part = expected[:, place : place + 28]
            part.copy_(torch.maximum(part, image))
        assert_equal([strips.images[b]], [expected], 1e-6)
        assert strips.numbers[b, n:].eq(END).all()
        assert strips.widths[b] == strips.places[b, n - 1] + 28 <= strips.images.shape[2]
        gaps = strips.places[b].diff()
        assert 0 <= strips.places[b, 0] <= transformer.FARTHEST - transformer.NEAREST
        assert gaps.min() >= transformer.NEAREST
        assert gaps.max() <= transformer.FARTHEST
    assert strips.images.shape[2] % transformer.COLUMNS == 0
    assert len(strips.places.diff().unique()) == 13  # all distances occur


def test_strips_are_deformed_by_strength_alone(data):
    def strips(strength):
        generator = torch.Generator().manual_seed(3)
        return transformer.draw_strips(data.train, 9, 1, 3, generator, strength)

    plain, changed = strips(0.0), strips(0.8)
    assert torch.equal(plain.numbers, changed.numbers)
    assert torch.equal(plain.places, changed.places)
    difference = (plain.images - changed.images).abs().mean()
    assert 0.01 < difference < plain.images.abs().mean() + 0.1


def test_fixed_strips_are_fixed(data):
    torch.manual_seed(1)
    first = transformer.fixed_strips(data.val, 7, 1, 6, seed=4)
    torch.manual_seed(2)
    again = transformer.fixed_strips(data.val, 7, 1, 6, seed=4)
    other = transformer.fixed_strips(data.val, 7, 1, 6, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.images, other.images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 2), "n_strips must be .*, not 0"),
        ((3, 0, 2), "shortest must be .*, not 0"),
        ((3, 4, 2), "shortest=4 must be at most longest=2"),
    ],
)
def test_strips_refuse_what_does_not_fit(data, arguments, message):
    with pytest.raises(ValueError, match=message):
        transformer.draw_strips(data.val, *arguments)


def test_teacher_forcing_moves_the_digits_by_one():
    numbers = torch.tensor([[4, 0, 7], [9, END, END]])
    inputs, targets = transformer.teacher_forced(numbers)
    assert inputs.tolist() == [[BEGIN, 4, 0, 7], [BEGIN, 9, END, END]]
    assert targets.tolist() == [[4, 0, 7, END], [9, END, END, END]]


# ---- training ----

TINY = Recipe(
    channels=6, d_model=8, n_heads=2, d_ff=12, n_encoder=1, n_decoder=1, batch_size=8,
    n_steps=6, n_logs=3, n_judged=10, n_measured=20,
)  # fmt: skip


@pytest.fixture
def reader():
    torch.manual_seed(0)
    return transformer.StripReader(TINY).eval()


def test_the_loss_is_torchs_and_leaves_out_what_follows_the_end(reader, data):
    strips = transformer.fixed_strips(data.train, 9, 1, 5, seed=0)
    inputs, targets = transformer.teacher_forced(strips.numbers)
    logits = reader(strips.images, strips.widths, inputs)
    for b, length in enumerate(strips.lengths):
        targets[b, length + 1 :] = -100  # what F.cross_entropy leaves out
    for smoothing in (0.0, 0.1):
        expected = F.cross_entropy(logits.mT, targets, label_smoothing=smoothing)
        loss = transformer.loss_of(reader, strips, smoothing)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_judging_in_one_pass_is_reading_digit_by_digit(data):
    """On a reader that is right on some strips: greedy and teacher forcing agree on which."""
    torch.manual_seed(0)
    model = transformer.StripReader(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), 0.02)
    one = stage1_mlp.Split(data.train.images[:1], data.train.labels[:1])  # so only length counts
    for _ in range(40):
        strips = transformer.draw_strips(one, 16, 1, 3)
        optimizer.zero_grad()
        transformer.loss_of(model, strips, 0.0).backward()
        optimizer.step()
    strips = transformer.fixed_strips(one, 100, 1, 6, seed=0)
    found = transformer.judge(model, strips)
    written = transformer.written_by(model, strips)
    _, targets = transformer.teacher_forced(strips.numbers)
    is_right = (written == targets).all(1)
    assert 0.1 < found["val_accuracy"] < 0.9
    assert found["val_accuracy"] == pytest.approx(is_right.float().mean().item())


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(data, tmp_path, capsys):
    whole, history = transformer.train(TINY, data, "whole")
    path = tmp_path / "new" / "run.pt"
    transformer.train(TINY, data, "stopped", path, n_most=5)  # the last checkpoint is at 4
    torch.manual_seed(99)
    model, again = transformer.train(TINY, data, "goes on", path)
    assert "goes on: step 6 of 6" in capsys.readouterr().out
    assert [row["step"] for row in again] == [2, 4, 6]
    for row, other in zip(history, again, strict=True):
        assert row | {"seconds": 0} == other | {"seconds": 0}
    for name, values in whole.state_dict().items():
        assert torch.equal(values, model.state_dict()[name])
    assert not list(path.parent.glob("*.aside"))
    # of another recipe nothing is taken
    other = transformer.replace(TINY, lr=0.002)
    _, history = transformer.train(other, data, "other", path, n_most=2)
    assert [row["step"] for row in history] == [2]


def test_the_loss_falls(data):
    recipe = transformer.replace(
        TINY, channels=6, d_model=16, n_steps=30, n_logs=2, batch_size=16, lr=0.01, deform=0.0
    )
    _, history = transformer.train(recipe, data, "longer")
    assert history[-1]["val_loss"] < history[0]["val_loss"] < math.log(12)


# ---- what is measured ----


def test_length_rows_count(data):
    numbers = torch.tensor([[4, 0, END], [1, END, END], [2, 2, END], [5, 6, 7]])
    lengths = torch.tensor([2, 1, 2, 3])
    strips = transformer.Strips(None, None, numbers, lengths, None)
    written = torch.tensor([[4, 0, END, END], [1, 1, END, END], [2, 3, END, END], [5, 6, 7, 7]])
    rows = pd.DataFrame(transformer.length_rows(strips, written))
    assert rows["length"].tolist() == [1, 2, 3]
    assert rows["strips"].tolist() == [1, 2, 1]
    assert rows["right"].tolist() == [0, 1, 0]
    assert rows["first_6_right"].tolist() == [0, 1, 0]
    assert rows["digits_written"].tolist() == [2, 2, 4]


def test_attention_is_measured_on_the_digits_own_columns(reader, data):
    rows = pd.DataFrame(transformer.measure_attention(reader, 30, data))
    assert rows[["layer", "head"]].values.tolist() == [[0, 0], [0, 1]]
    strips = transformer.fixed_strips(data.val, 30, 1, transformer.SEEN, seed=0)
    weights = transformer.cross_attention(reader, strips)
    shares, even = [], []
    for b, n in itertools.product(range(30), range(transformer.SEEN)):
        if n < strips.lengths[b]:
            left = int(strips.places[b, n]) + 4
            own = [s for s in range(weights.shape[4]) if left <= 4 * s + 2 < left + 20]
            shares.append(weights[0, b, :, n, own].sum(1))
            even.append(4 * len(own) / int(strips.widths[b]))
    assert_equal([torch.tensor(rows["share"])], [torch.stack(shares).mean(0).double()], 1e-5)
    assert rows["even_share"].iloc[0] == pytest.approx(sum(even) / len(even))


def test_beams_and_greedy_are_measured_on_the_same_strips(reader, data):
    greedy, beam = transformer.measure_beams(reader, 12, data)
    strips = transformer.fixed_strips(data.test, 12, 1, transformer.SEEN, seed=1)
    written = transformer.written_by(reader, strips)
    _, targets = transformer.teacher_forced(strips.numbers)
    assert greedy["right"] == int((written == targets).all(1).sum())
    assert beam["log_probability"] >= greedy["log_probability"] - 1e-9
    assert (greedy["width"], beam["width"]) == (1, transformer.BEAM_WIDTH)


def test_the_tables_are_percent_over_seeds():
    columns = ("part", "value", "seed", "length", "strips", "right", "first_6_right")
    rows = [
        ("test", "a", 0, 1, 10, 9, 9),
        ("test", "a", 0, 2, 30, 30, 30),
        ("test", "a", 0, 7, 20, 1, 10),
        ("test", "a", 1, 1, 20, 20, 20),
        ("test", "a", 1, 2, 20, 20, 20),
        ("test", "a", 1, 7, 20, 3, 12),
        ("val", "a", 0, 1, 10, 0, 0),
    ]
    rows = pd.DataFrame(rows, columns=columns).assign(digits_written=5.5)
    # of 1 … 6 digits seed 0 has 39 of 40 right and seed 1 all: 97.5 and 100
    line = transformer.right_table(rows).splitlines()[2]
    expected = ["a", "2", "98.75 ± 1.77", "95.00 ± 7.07", "100.00 ± 0.00", "10.00 ± 7.07"]
    assert [cell.strip() for cell in line.split("|")[1:-1]] == expected
    line = transformer.beyond_table(rows).splitlines()[2]
    expected = ["a", "7", "5.50 ± 0.00", "55.00 ± 7.07", "10.00 ± 7.07", "2"]
    assert [cell.strip() for cell in line.split("|")[1:-1]] == expected


# ---- the program ----


def start(out, **options):
    return transformer.main(out=out / "tables", checkpoints=out / "stopped", **options)


def test_without_trained_networks_it_says_what_to_run(tmp_path, capsys):
    assert start(tmp_path) == 0
    assert "python -m interview.transformer --train" in capsys.readouterr().out


def test_a_small_training_saves_rows_weights_tables_and_pictures(tmp_path, capsys):
    assert start(tmp_path, train=True, smoke=True, seeds=1, device="cpu") == 0
    out = tmp_path / "tables"
    names = ("pre_norm_sinusoids", "post_norm_sinusoids", "pre_norm_rotary", "pre_norm_relative")
    tables = ("runs", "history", "lengths", "beams", "attention")
    assert {path.name for path in out.iterdir()} == {
        *(f"transformer_{name}.pt" for name in names),
        *(f"transformer_{name}.csv" for name in tables),
        *(f"transformer_{name}.png" for name in ("lengths", "training", "maps", "misread")),
        "transformer_tables.md",
    }
    assert not list((tmp_path / "stopped").iterdir())  # finished runs need no checkpoint
    rows = metrics.load_rows(out / "transformer_lengths.csv")
    strips = rows.groupby(["value", "part"])["strips"].sum()
    assert strips.tolist() == [20 + 4 + 4] * 8
    before = {path: path.read_bytes() for path in out.glob("*.csv")}
    capsys.readouterr()
    small = transformer.recipes(smoke=True)
    transformer.train_missing(out, small, 1, ROOT / "data", 1, "cpu", tmp_path / "stopped")
    transformer.evaluate_saved(out, small, ROOT / "data", "cpu")
    assert "4 of 4 runs found, 0 to do" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in out.glob("*.csv")} == before
    (out / "transformer_pre_norm_rotary.pt").unlink()
    missing = transformer.missing_runs(out, small, 2)
    assert [(name, recipe.seed) for name, recipe in missing] == [
        ("pre-norm, sinusoids", 1),
        ("pre-norm, rotary", 0),
        ("post-norm, sinusoids", 1),
        ("pre-norm, rotary", 1),
        ("pre-norm, relative", 1),
    ]
    capsys.readouterr()
    assert start(tmp_path) == 1  # these are the small networks, not the real ones
    assert "holds another recipe's network" in capsys.readouterr().err


def test_a_small_training_does_not_touch_the_saved_tables(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    for options in ({}, {"out": Path("figures/interview")}):
        assert transformer.main(train=True, smoke=True, **options) == 1
        assert "--smoke would overwrite the saved tables" in capsys.readouterr().err


def test_numbers_of_runs_and_workers_are_checked(tmp_path, capsys):
    assert start(tmp_path, seeds=0) == 1
    assert "seeds must be a whole number of at least 1, not 0" in capsys.readouterr().err


def test_missing_data_is_said_in_one_line(tmp_path, capsys):
    assert start(tmp_path, train=True, smoke=True, data_dir=tmp_path, device="cpu") == 1
    assert "train-images-idx3-ubyte.gz is missing" in capsys.readouterr().err
