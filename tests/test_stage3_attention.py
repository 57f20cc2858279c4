"""Stage 3 against torch's own attention with copied weights, in float64, and cached against
uncached.
"""

import ast
import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_equal, gradients
from PIL import Image
from torch import nn
from torch.nn import functional as F

import metrics
import stage3_attention as stage
from stage3_attention import (
    GroupedQueryAttention,
    KVCache,
    MultiHeadAttention,
    MultiQueryAttention,
    attention,
)

# every axis another size; two query heads share a key/value head
B, H, G, T, S, D = 2, 6, 3, 5, 7, 24
SMALL = stage.Config(
    readout="mean",
    d_model=24,
    n_heads=H,
    n_kv_heads=G,
    n_train=300,
    batch_size=32,
    steps=12,
    n_logs=3,
)
POSITIONS = ["none", "learned", "sinusoidal", "relative", "rotary"]


@pytest.fixture(scope="module")
def data():
    torch.set_num_threads(1)
    return stage.load_data()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def qkv(heads=H, groups=G, queries=T, keys=S, d=4, d_v=4, dtype=torch.float64):
    return [
        randn(B, heads, queries, d, dtype=dtype),
        randn(B, groups, keys, d, dtype=dtype),
        randn(B, groups, keys, d_v, dtype=dtype),
    ]


# ---- the formula ----


def by_loops(q, k, v, allowed):
    """One query head and one query at a time, as the paper's equation reads."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    weights = torch.zeros(*q.shape[:3], k.shape[2], dtype=q.dtype)
    for b, h, t in itertools.product(*map(range, q.shape[:3])):
        g = h // (q.shape[1] // k.shape[1])
        seen = [s for s in range(k.shape[2]) if allowed[t][s]]
        if not seen:
            continue
        scores = [
            sum(q[b, h, t, i].item() * k[b, g, s, i].item() for i in range(q.shape[3]))
            for s in seen
        ]
        powers = [math.exp(score / math.sqrt(q.shape[3])) for score in scores]
        for s, power in zip(seen, powers, strict=True):
            weights[b, h, t, s] = power / sum(powers)
            out[b, h, t] += weights[b, h, t, s] * v[b, g, s]
    return out, weights


def bottom_right(queries, keys):
    return [[s <= keys - queries + t for s in range(keys)] for t in range(queries)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [1, T, S, S + 2])
def test_attention_is_the_equation(queries, causal):
    q, k, v = (x.detach() for x in qkv(queries=queries, d_v=3))
    allowed = bottom_right(queries, S) if causal else [[True] * S] * queries
    assert_equal(attention(q, k, v, causal=causal), by_loops(q, k, v, allowed))


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("masked", [None, "bool", "float"])
def test_attention_equals_torchs_grouped_attention(groups, masked):
    inputs = qkv(groups=groups)
    mask = {None: None, "bool": torch.rand(B, 1, T, S) < 0.6, "float": randn(B, H, T, S)}[masked]
    if masked == "bool":
        mask[..., 0] = True  # torch's would be nan where there is no key
    ours, _ = attention(*inputs, mask=mask)
    theirs = F.scaled_dot_product_attention(*inputs, attn_mask=mask, enable_gqa=True)
    inputs += [mask] if masked == "float" else []
    assert_equal([ours, *gradients([ours], inputs)], [theirs, *gradients([theirs], inputs)])


def test_heads_are_interleaved_not_tiled():
    """Query heads 0 and 1 read key/value head 0; tiling would give head 1 to query head 1."""
    q, k, v = qkv()
    ours, _ = attention(q, k, v)
    right = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    tiled = F.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))
    assert_equal([ours], [right])
    assert (ours - tiled).abs().max() > 0.1


def test_the_gradient_of_a_shared_head_is_the_sum_over_its_group():
    q, k, v = qkv()
    apart = [x.detach().repeat_interleave(H // G, 1).requires_grad_() for x in (k, v)]
    shared, own = gradients(attention(q, k, v), (k, v)), gradients(attention(q, *apart), apart)
    assert_equal(shared, [x.unflatten(1, (G, H // G)).sum(2) for x in own])


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal):
    mask = torch.rand(B, 1, T, S) < 0.7
    mask[0, 0, 1] = False  # a query with no key
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention(q, k, v, mask, causal), qkv(d=2, d_v=3)
    )
    assert torch.autograd.gradcheck(
        lambda q, k, v, m: attention(q, k, v, m, causal), [*qkv(d=2), randn(1, H, 1, S)]
    )


MASKS = {
    "all": (B, H, T, S),
    "per query": (T, S),
    "per batch": (B, 1, T, S),
    "per head": (H, 1, 1),
    "key padding": (B, 1, 1, S),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", list(MASKS))
def test_every_mask_hides_what_it_says_and_joins_with_causal(name, causal):
    q, k, v = qkv()
    mask = torch.rand(MASKS[name]) < 0.6
    allowed = mask.expand(B, H, T, S) & (torch.tensor(bottom_right(T, S)) | (not causal))
    before = mask.clone()
    out, weights = attention(q, k, v, mask, causal)
    assert torch.equal(weights == 0, ~allowed)
    torch.testing.assert_close(weights.sum(3), allowed.any(3).double(), rtol=1e-12, atol=1e-12)
    added = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    assert_equal(attention(q, k, v, added, causal), (out, weights))
    assert torch.equal(mask, before)  # and the mask is as it was
    assert torch.equal(out[~allowed.any(3)], torch.zeros_like(out[~allowed.any(3)]))


def test_nothing_to_attend_to_is_zero_with_zero_gradients():
    for mask in (torch.zeros(T, S, dtype=torch.bool), torch.full((T, S), -math.inf)):
        inputs = qkv()
        out, weights = attention(*inputs, mask)
        assert not out.any()
        assert not weights.any()
        assert not any(g.any() for g in gradients([out, weights], inputs))
    q, k, v = qkv(queries=S + 2)  # causal, with two queries before the first key
    out, _ = attention(q, k, v, causal=True)
    assert not out[:, :, :2].any()
    assert all(g.isfinite().all() for g in gradients([out], (q, k, v)))


@pytest.mark.parametrize("groups", [1, 3, 6])
def test_a_change_of_the_future_leaves_the_past_bit_for_bit(groups):
    q, k, v = (x.detach().float() for x in qkv(groups=groups, queries=S))
    before = attention(q, k, v, causal=True)
    k[:, :, 4:], v[:, :, 4:], q[:, :, 4:] = 99.0, -99.0, 7.0
    for one, two in zip(before, attention(q, k, v, causal=True), strict=True):
        assert torch.equal(one[:, :, :4], two[:, :, :4])
        assert not torch.equal(one[:, :, 4:], two[:, :, 4:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype_and_stays_finite(dtype):
    q, k, v = (x.detach() for x in qkv(d=64))
    # scores of some ±1e4, and products beyond float16 before the division by √d
    q, k = q * 40, k * 40
    assert (q @ k.repeat_interleave(2, 1).mT).abs().max() > 65_504 / 8
    q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
    scores = q.double() @ k.double().repeat_interleave(2, 1).mT / 8
    assert scores.abs().max() > 4000
    mask = torch.rand(T, S) < 0.6
    mask[2] = False
    for options in ({}, {"mask": mask}, {"mask": mask.float() * 1e9 - 1e9}, {"causal": True}):
        out, weights = attention(q, k, v, **options)
        assert out.dtype == weights.dtype == dtype
        assert out.isfinite().all()
        assert weights.isfinite().all()
        assert all(g.isfinite().all() for g in gradients([out.float()], (q, k, v)))
    torch.testing.assert_close(
        attention(q, k, v)[1].double(),
        attention(q.double(), k.double(), v.double())[1],
        rtol=0,
        atol=0.15,
    )  # a score of 1e4 is only known to some units in half precision
    q, k = q.detach() / 40, k.detach() / 40
    found, exact = attention(q, k, v)[0].double(), attention(q.double(), k.double(), v.double())[0]
    torch.testing.assert_close(found, exact, rtol=0, atol=0.05)


def test_a_float32_mask_is_added_before_anything_is_rounded():
    q = torch.zeros(1, 1, 1, 4, dtype=torch.bfloat16)  # bfloat16 makes 256 of 257
    k = torch.zeros(1, 1, 2, 4, dtype=torch.bfloat16)
    _, weights = attention(q, k, k, torch.tensor([[256.0, 257.0]]))
    expected = torch.tensor([1 / (1 + math.e), math.e / (1 + math.e)], dtype=torch.bfloat16)
    assert weights.flatten().tolist() == expected.tolist()
    assert expected.tolist() == pytest.approx([0.269, 0.731], abs=0.002)


def test_float16_scores_beyond_its_range_are_float32s_rounded():
    """q · k / √d = 60,000 · √64 for the first key: more than 65,504."""
    q = torch.full((1, 2, 3, 64), 300.0, dtype=torch.float16)
    k = torch.full((1, 1, 5, 64), 100.0, dtype=torch.float16)
    k[:, :, 1:] = torch.randn(1, 1, 4, 64).half()
    v = torch.randn(1, 1, 5, 6).half()
    assert (q.float() @ k.float().mT / 8).max() > 65_504
    out, weights = attention(q, k, v)
    expected = attention(q.float(), k.float(), v.float())
    assert torch.equal(weights, expected[1].half())
    torch.testing.assert_close(out, expected[0].half())


def test_a_float16_product_beyond_its_range_is_divided_first():
    q = torch.full((1, 1, 3, 64), 40.0, dtype=torch.float16)  # q · k = 102,400
    out, weights = attention(q, q, torch.ones_like(q))
    assert torch.equal(out, torch.ones_like(q))
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 3))


@pytest.mark.parametrize("position", ["none", "relative", "rotary"])
def test_autocast_rounds_nothing_in_the_formula(position):
    """It would make bfloat16 of the factors of a product, and so of all places beyond 256."""
    inputs = [x.detach() * 4 for x in qkv(d=64, dtype=torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(*inputs)
        found_causal = attention(*inputs, causal=True)
        assert (inputs[0] @ inputs[0].mT).dtype == torch.bfloat16  # it is at work
    assert [part.dtype for part in (*found, *found_causal)] == [torch.float32] * 4
    assert_equal(found, attention(*inputs), tolerance=1e-6)
    assert_equal(found_causal, attention(*inputs, causal=True), tolerance=1e-6)
    layer = GroupedQueryAttention(D, H, G, position)
    x = torch.randn(B, T, D)
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = layer(x)
    assert_equal((out.float(), weights.float()), layer(x), tolerance=0.03)
    if position == "relative":
        q = torch.randn(B, H, T, D // H)
        with torch.autocast("cpu", torch.bfloat16):
            bias = layer.relative_bias(q, T)
        assert_equal([bias], [layer.relative_bias(q, T)], tolerance=1e-6)


# ---- the modules ----


def copied(theirs, n_heads):
    """Ours with the weights of torch's."""
    D = theirs.embed_dim
    ours = MultiHeadAttention(D, n_heads).double()
    with torch.no_grad():
        for i, W in enumerate((ours.W_q, ours.W_k, ours.W_v)):
            W.weight.copy_(theirs.in_proj_weight[i * D : (i + 1) * D])
            W.bias.copy_(theirs.in_proj_bias[i * D : (i + 1) * D])
        ours.W_o.load_state_dict(theirs.out_proj.state_dict())
    return ours


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("masked", [None, "causal", "bool", "float", "key padding"])
def test_multi_head_equals_torchs(cross, masked):
    theirs = nn.MultiheadAttention(D, H, batch_first=True).double()
    nn.init.normal_(theirs.in_proj_bias)
    nn.init.normal_(theirs.out_proj.bias)
    ours, x, c = copied(theirs, H), randn(B, T, D), randn(B, S, D) if cross else None
    keys = S if cross else T
    source = c if cross else x
    if masked == "causal" and cross:
        pytest.skip("torch has no causal mask for another length")
    hidden = torch.rand(T, keys) < 0.4  # torch's bool masks are True where ours are False
    hidden[:, 0] = False
    padding = torch.arange(keys) >= torch.tensor([[keys], [keys - 2]])  # (B, keys)
    added = torch.randn(T, keys).double()
    mine, others = {
        None: ({}, {}),
        "causal": ({"causal": True}, {"attn_mask": torch.ones(T, keys, dtype=torch.bool).triu(1)}),
        "bool": ({"mask": ~hidden}, {"attn_mask": hidden}),
        "float": ({"mask": added}, {"attn_mask": added}),
        "key padding": ({"mask": ~padding[:, None, None]}, {"key_padding_mask": padding}),
    }[masked]
    results = ours(x, c, **mine)
    expected = theirs(x, source, source, average_attn_weights=False, **others)
    inputs = [x, c] if cross else [x]
    assert_equal([*results, *gradients(results, inputs)], [*expected, *gradients(expected, inputs)])
    dW = gradients(ours(x, c, **mine), [ours.W_q.weight, ours.W_k.weight, ours.W_v.weight])
    whole = gradients(
        theirs(x, source, source, average_attn_weights=False, **others), [theirs.in_proj_weight]
    )
    assert_equal([torch.cat(dW)], whole)


def test_multi_head_by_itself_is_the_grouped_one_at_its_end():
    x, c = randn(B, T, D), randn(B, S, D)
    plain, general = MultiHeadAttention(D, H).double(), GroupedQueryAttention(D, H, H).double()
    general.load_state_dict(plain.state_dict())
    assert not isinstance(plain, GroupedQueryAttention)
    for context, options in (
        (None, {}),
        (None, {"causal": True}),
        (c, {"mask": torch.rand(T, S) < 0.6}),
    ):
        assert_equal(plain(x, context, **options), general(x, context, **options), tolerance=0)
    caches = [KVCache(B, H, 9, D // H, dtype=torch.float64) for _ in range(2)]
    for part in x.split([2, 3], 1):
        mine = plain(part, causal=True, cache=caches[0])
        assert_equal(mine, general(part, causal=True, cache=caches[1]), tolerance=0)


def test_the_two_ends_are_the_general_one():
    x = randn(B, T, D)
    for end, groups in ((MultiHeadAttention(D, H), H), (MultiQueryAttention(D, H), 1)):
        general = GroupedQueryAttention(D, H, groups)
        general.load_state_dict(end.state_dict())
        assert_equal(end.double()(x), general.double()(x), tolerance=0)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_grouped_equals_multi_head_with_copied_heads(groups):
    """Another route: each key/value head's rows of the weights written out once for every query
    head that reads it.
    """
    ours, d, n = GroupedQueryAttention(D, H, groups).double(), D // H, H // groups
    theirs = nn.MultiheadAttention(D, H, batch_first=True).double()
    with torch.no_grad():
        wide = [
            [
                x.unflatten(0, (groups, d)).repeat_interleave(n, 0).flatten(0, 1)
                for x in (W.weight, W.bias)
            ]
            for W in (ours.W_k, ours.W_v)
        ]
        theirs.in_proj_weight.copy_(torch.cat([ours.W_q.weight, *(weight for weight, _ in wide)]))
        theirs.in_proj_bias.copy_(torch.cat([ours.W_q.bias, *(bias for _, bias in wide)]))
        theirs.out_proj.load_state_dict(ours.W_o.state_dict())
    x = randn(B, T, D)
    assert_equal(ours(x), theirs(x, x, x, average_attn_weights=False))


def test_parameters_and_no_ready_made_attention():
    count = {
        g: sum(p.numel() for p in GroupedQueryAttention(D, H, g).parameters()) for g in (1, 3, 6)
    }
    assert count == {g: 2 * D * (D + 1) + 2 * g * (D // H) * (D + 1) for g in count}
    model = stage.build(SMALL)
    own = (stage.AttentionClassifier, stage.Block, GroupedQueryAttention)
    plain = (nn.Linear, nn.LayerNorm, nn.GELU, nn.Dropout, nn.Sequential, nn.ModuleList)
    assert all(isinstance(m, own + plain) for m in model.modules())
    tree = ast.parse(Path(stage.__file__).read_text(encoding="utf-8"))
    # torch's own attention is what the benchmark compares with, and nothing else
    for node in tree.body:
        names = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
        if {"MultiheadAttention", "scaled_dot_product_attention"} & names:
            assert node.name in ("copied_to_every_head", "torchs_grouped", "time_steps")


def test_the_scale_is_an_argument_as_torchs():
    q, k, v = qkv()
    ours, _ = attention(q, k, v, scale=0.3)
    assert_equal([ours], [F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)])


def test_unscaled_scores_are_sqrt_d_times_as_large():
    plain, x = GroupedQueryAttention(D, H, G, scaled=False).double(), randn(B, T, D)
    q, k = (W(x).unflatten(2, (-1, D // H)).transpose(1, 2) for W in (plain.W_q, plain.W_k))
    expected = (q @ k.repeat_interleave(2, 1).mT).softmax(-1)
    assert_equal([plain(x)[1]], [expected])


# ---- positions ----


def test_rotary_turns_pairs_by_the_papers_angles():
    x = torch.randn(1, 1, 3, 6, dtype=torch.float64)
    turned = stage.rotated(x, 5)
    for t, i in itertools.product(range(3), range(3)):
        angle = (5 + t) * 10_000 ** (-2 * i / 6)
        a, b = x[0, 0, t, 2 * i].item(), x[0, 0, t, 2 * i + 1].item()
        expected = [
            a * math.cos(angle) - b * math.sin(angle),
            a * math.sin(angle) + b * math.cos(angle),
        ]
        assert turned[0, 0, t, 2 * i : 2 * i + 2].tolist() == pytest.approx(
            expected, rel=1e-12, abs=1e-12
        )


def test_rotary_scores_depend_on_the_distance_alone():
    x = torch.randn(1, 1, 1, 8, dtype=torch.float64).expand(1, 1, 9, 8)
    y = torch.randn(1, 1, 1, 8, dtype=torch.float64).expand(1, 1, 9, 8)
    scores = (stage.rotated(x, 3) @ stage.rotated(y, 3).mT)[0, 0]
    for distance in range(-8, 9):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(
            diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-11, atol=1e-11
        )
    assert scores[0].std() > 0.1


def test_sinusoids_are_the_papers():
    table = stage.sinusoids(4, 3, 7, torch.float64, "cpu")
    for t, i in itertools.product(range(3), range(7)):
        angle = (4 + t) / 10_000 ** (2 * (i // 2) / 7)
        assert table[t, i].item() == pytest.approx(
            math.cos(angle) if i % 2 else math.sin(angle), abs=1e-12
        )


def test_relative_positions_add_the_product_with_the_distances_vector():
    layer, n = GroupedQueryAttention(D, H, G, position="relative").double(), 40  # further than FAR
    nn.init.normal_(layer.distances)
    x = torch.randn(B, n, D, dtype=torch.float64)
    q = layer.W_q(x).unflatten(2, (H, -1)).transpose(1, 2)
    k = layer.W_k(x).unflatten(2, (G, -1)).transpose(1, 2).repeat_interleave(H // G, 1)
    scores = torch.empty(B, H, n, n, dtype=torch.float64)
    for i, j in itertools.product(range(n), range(n)):
        a = layer.distances[max(-layer.FAR, min(layer.FAR, j - i)) + layer.FAR]
        scores[:, :, i, j] = (q[:, :, i] * (k[:, :, j] + a)).sum(-1) / math.sqrt(D // H)
    assert_equal([layer(x)[1]], [scores.softmax(-1)])
    mask = torch.rand(n, n) < 0.8
    assert_equal([layer(x, mask=mask)[1]], [scores.masked_fill(~mask, -math.inf).softmax(-1)])


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_angles_do_not_depend_on_the_default_dtype(default):
    x = torch.randn(1, 2, 5, 8)
    before = stage.rotated(x, 254), stage.sinusoids(254, 5, 8, torch.float32, "cpu")
    usual = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        after = stage.rotated(x, 254), stage.sinusoids(254, 5, 8, torch.float32, "cpu")
        half = stage.angles(254, 5, 8, torch.bfloat16, "cpu")
    finally:
        torch.set_default_dtype(usual)
    assert_equal(before, after, tolerance=0)
    assert half.dtype == torch.float32
    assert half[:, 0].tolist() == [254, 255, 256, 257, 258]


@pytest.mark.parametrize("position", POSITIONS)
def test_only_a_network_with_positions_notices_the_order(position):
    model = stage.build(replace(SMALL, position=position)).double().eval()
    images, order = torch.randn(3, 28, 28, dtype=torch.float64), torch.randperm(28)
    difference = (model(images) - model(images[:, order])).abs().max()
    assert difference < 1e-12 if position == "none" else difference > 1e-4


def test_dropout_takes_the_same_features_of_all_tokens_and_only_in_training():
    block = stage.Block(replace(SMALL, dropout=0.4)).double()
    x, mask = torch.randn(B, T, D, dtype=torch.float64), torch.ones(T, T, dtype=torch.bool).tril()
    torch.manual_seed(1)
    # as the block will draw them
    kept = [F.dropout(torch.ones(B, 1, D, dtype=torch.float64), 0.4) for _ in range(2)]
    torch.manual_seed(1)
    out, _ = block(x, mask)
    middle = x + block.attention(block.norm_1(x), mask=mask)[0] * kept[0]
    assert_equal([out], [middle + block.mlp(block.norm_2(middle)) * kept[1]])
    assert 0 < (kept[0] == 0).sum() < B * D
    block.eval()
    middle = x + block.attention(block.norm_1(x), mask=mask)[0]
    assert_equal([block(x, mask)[0]], [middle + block.mlp(block.norm_2(middle))])


# ---- the cache ----


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("chunks", [[28], [1] * 28, [5, 1, 1, 9, 12], [27, 1]])
def test_cached_equals_uncached(position, chunks):
    model = stage.build(replace(SMALL, position=position, causal=True)).double().eval()
    x = torch.randn(3, 28, 28, dtype=torch.float64)
    whole, weights = model.states(x)
    caches = model.caches(3, 28)
    for _ in range(2):  # a cache that was reset is as good as new
        parts = [model.states(part, caches=caches) for part in x.split(chunks, 1)]
        assert_equal([torch.cat([states for states, _ in parts], 1)], [whole], tolerance=1e-9)
        for part, own in zip(parts[-1][1], weights, strict=True):  # of every block
            assert_equal([part], [own[:, :, -chunks[-1] :]], tolerance=1e-9)
        assert [cache.length for cache in caches] == [28, 28]
        for cache in caches:
            cache.reset()
            assert cache.length == 0


@pytest.mark.parametrize("groups", [1, 3, 6])
def test_a_layer_reads_what_the_cache_holds_also_of_another_context(groups):
    layer = GroupedQueryAttention(D, H, groups).double()
    cache = KVCache(B, groups, 9, D // H, dtype=torch.float64)
    x, c = torch.randn(B, T, D, dtype=torch.float64), torch.randn(B, S, D, dtype=torch.float64)
    layer(x[:, :2], c[:, :4], cache=cache)
    assert_equal(layer(x, c[:, 4:], cache=cache), layer(x, c))


def test_a_cache_counts_its_bytes_and_hands_out_views():
    for groups, dtype in ((1, torch.float32), (3, torch.float16), (16, torch.float64)):
        cache = KVCache(4, groups, 100, 8, dtype=dtype)
        assert cache.nbytes == 2 * 4 * groups * 100 * 8 * dtype.itemsize
        # and no more is held
        assert cache.nbytes == sum(x.untyped_storage().nbytes() for x in (cache.k, cache.v))
        k, v = (torch.randn(4, groups, 3, 8).to(dtype) for _ in range(2))
        kept = cache.append(k, v)
        assert torch.equal(kept[0], k)
        assert torch.equal(kept[1], v)
        assert kept[0].data_ptr() == cache.k.data_ptr()
        assert cache.append(v, k)[0].data_ptr() == cache.k.data_ptr()
        assert torch.equal(cache.append(k, v)[0], torch.cat([k, v, k], 2))
        assert cache.length == 9


def test_a_full_cache_refuses_and_keeps_what_it_holds():
    cache = KVCache(B, G, 5, 4)
    k = torch.randn(B, G, 3, 4)
    cache.append(k, k)
    with pytest.raises(ValueError, match="3 of 5 tokens has no room for 3 more"):
        cache.append(k, k)
    assert cache.length == 3
    assert torch.equal(cache.append(k[:, :, :2], k[:, :, :2])[0], torch.cat([k, k[:, :, :2]], 2))


@pytest.mark.parametrize("position", ["none", "relative"])
def test_a_mask_that_does_not_fit_is_refused_before_the_cache_takes_anything_up(position):
    layer, cache = GroupedQueryAttention(D, H, G, position=position), KVCache(B, G, 9, D // H)
    x = torch.randn(B, T, D)
    layer(x[:, :3], cache=cache)
    for mask in (
        torch.ones(2, 2, dtype=torch.bool),
        torch.ones(B, H, 2, 3),
        torch.ones(2, T, dtype=torch.int64),
    ):
        with pytest.raises(ValueError, match="a bool or float mask must broadcast"):
            layer(x[:, 3:], mask=mask, cache=cache)
        assert cache.length == 3
    fits = torch.ones(2, T, dtype=torch.bool)
    assert_equal(
        layer(x[:, 3:], mask=fits, cache=cache),
        [part[..., -2:, :] for part in layer(x)],
        tolerance=1e-5,
    )


def test_a_failed_call_leaves_every_cache_of_every_block_as_it_was():
    model = stage.build(replace(SMALL, causal=True, position="rotary")).double().eval()
    x = torch.randn(B, 6, 28, dtype=torch.float64)
    caches = model.caches(B, 9)
    model.states(x[:, :2], caches=caches)
    small = [caches[0], KVCache(B, G, 3, 4, dtype=torch.float64)]
    small[1].append(*torch.randn(2, B, G, 2, 4, dtype=torch.float64))
    narrow = [caches[0], KVCache(B, G, 9, 4)]  # float32
    narrow[1].append(*torch.randn(2, B, G, 2, 4))
    fails = [
        (caches[:1], {}),
        ([*caches, KVCache(B, G, 9, 4)], {}),
        (small, {}),  # the second block has no room after the first has appended
        (caches, {"mask": torch.ones(2, 2, dtype=torch.bool)}),
        (caches, {"mask": torch.ones(4, 6)[None, None, None]}),
        (narrow, {}),
        ([caches[0], KVCache(B, G, 9, 4, dtype=torch.float64)], {}),  # of unequal length
    ]
    for given, options in fails:
        before = [cache.length for cache in given]
        with pytest.raises(ValueError):
            model.states(x[:, 2:], caches=given, **options)
        assert [cache.length for cache in given] == before
    after, _ = model.states(x[:, 2:], caches=caches)
    assert_equal([after], [model.states(x)[0][:, 2:]], tolerance=1e-9)


def test_an_end_that_fails_after_the_append_leaves_the_cache_too(monkeypatch):
    for layer in (MultiHeadAttention(D, H), GroupedQueryAttention(D, H, H)):
        cache = KVCache(B, H, 9, D // H)
        layer(torch.randn(B, 2, D), cache=cache)
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(stage, "attention", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            layer(torch.randn(B, 2, D), cache=cache)
        assert cache.length == 2


def test_an_output_or_a_norm_that_fails_leaves_every_cache_too():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("broken")

    for layer in (MultiHeadAttention(D, H), GroupedQueryAttention(D, H, H)):
        cache = KVCache(B, H, 9, D // H)
        layer(torch.randn(B, 2, D), cache=cache)
        layer.W_o = Broken()
        with pytest.raises(RuntimeError, match="broken"):
            layer(torch.randn(B, 2, D), cache=cache)
        assert cache.length == 2
    model = stage.build(SMALL).eval()
    caches = model.caches(B, 9)
    model.states(torch.randn(B, 2, 28), caches=caches)
    model.norm = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        model.states(torch.randn(B, 2, 28), caches=caches)
    assert [cache.length for cache in caches] == [2, 2]


def test_caches_of_unequal_length_are_refused():
    model = stage.build(SMALL).eval()
    caches = model.caches(B, 9)
    caches[1].append(*torch.randn(2, B, G, 3, D // H))
    with pytest.raises(ValueError, match=r"as many tokens, not \[0, 3\]"):
        model.states(torch.randn(B, 2, 28), caches=caches)


def test_autograd_refuses_to_go_back_past_a_later_append():
    layer, cache = GroupedQueryAttention(D, H, G), KVCache(B, G, 9, D // H)
    x = torch.randn(B, 2, D)
    layer(x, cache=cache)[0].sum().backward()
    cache.reset()
    out, _ = layer(x, cache=cache)
    layer(x, cache=cache)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    cache.reset()
    layer(x, cache=cache)[0].sum().backward()  # and forgets with it what went before


# ---- what is wrong is quoted ----


def test_what_is_wrong_is_quoted():
    q, k, v = (torch.randn(*shape) for shape in ((B, H, T, 4), (B, G, S, 4), (B, G, S, 4)))
    wrong = [
        (lambda: attention(q[0], k, v), "(6, 5, 4)"),
        (lambda: attention(q, k[..., :3], v), "(2, 3, 7, 3)"),
        (lambda: attention(q, k, v[:, :, 1:]), "(2, 3, 6, 4)"),
        (lambda: attention(q[:1], k, v), "(1, 6, 5, 4)"),
        (lambda: attention(q[:, :5], k, v), "5 query heads are not a multiple of 3"),
        (lambda: attention(q, k, v, torch.ones(T, S - 1, dtype=torch.bool)), "(5, 6)"),
        (lambda: attention(q, k, v, torch.ones(1, B, H, T, S)), "(1, 2, 6, 5, 7)"),
        (lambda: attention(q, k, v, torch.ones(2, B, H, T, S)), "(2, 2, 6, 5, 7)"),
        (lambda: attention(q, k, v, torch.ones(T, S, dtype=torch.int64)), "torch.int64"),
        (lambda: GroupedQueryAttention(D, 5, 5), "n_heads=5"),
        (lambda: GroupedQueryAttention(D, H, 4), "n_kv_heads=4"),
        (lambda: GroupedQueryAttention(D, H, 0), "n_kv_heads=0"),
        (lambda: MultiHeadAttention(D, 0), "n_heads=0"),
        (lambda: MultiQueryAttention(D, H, position="absolute"), "absolute"),
        (lambda: GroupedQueryAttention(18, H, G, "rotary"), "even, not d_head=3"),
        (lambda: MultiHeadAttention(D, H)(torch.randn(B, T, D + 1)), "(2, 5, 25)"),
        (lambda: MultiHeadAttention(D, H)(torch.randn(T, D)), "(5, 24)"),
        (
            lambda: MultiHeadAttention(D, H)(torch.randn(B, T, D), torch.randn(B + 1, S, D)),
            "(3, 7, 24)",
        ),
        (lambda: GroupedQueryAttention(D, H, G, "rotary")(*torch.randn(2, B, T, D)), "rotary"),
        (lambda: KVCache(B, G, 0, 4), "capacity=0"),
        (lambda: KVCache(B, G, 9, 4).append(k[:, :2], v[:, :2]), "(2, 2, 7, 4)"),
        (lambda: KVCache(B, G, 9, 4).append(k, v[:, :, 1:]), "(2, 3, 6, 4)"),
        (lambda: KVCache(B, G, 9, 4).append(k[0], v[0]), "(3, 7, 4)"),
        (lambda: KVCache(B, G, 9, 4).append(k.double(), v.double()), "torch.float64"),
        (lambda: stage.build(SMALL).states(torch.randn(B, 29, 28)), "29"),
        (
            lambda: stage.build(SMALL)(torch.randn(B, 28, 27)),
            "(B, T, 28) expected, not (2, 28, 27)",
        ),
        (lambda: stage.build(SMALL)(torch.randn(B, 0, 28)), "at least one token"),
        (lambda: attention(q.long(), k.long(), v.long()), "torch.int64"),
        (lambda: attention(q, k, v.double()), "torch.float32, torch.float32, torch.float64"),
    ]
    for call, quoted in wrong:
        with pytest.raises(ValueError) as raised:
            call()
        assert quoted in str(raised.value)


def test_inputs_and_masks_are_never_changed():
    for dtype, position in itertools.product(
        (torch.float32, torch.bfloat16), ("none", "rotary", "relative")
    ):
        layer = GroupedQueryAttention(D, H, G, position).to(dtype)
        x, mask = torch.randn(B, T, D).to(dtype), torch.randn(B, 1, T, T)
        before = x.clone(), mask.clone()
        layer(x, mask=mask, causal=True)
        assert torch.equal(x, before[0])
        assert torch.equal(mask, before[1])


# ---- tokens and the classifier ----


def test_tokens():
    images = torch.arange(2 * 784).reshape(2, 28, 28).float()
    rows, mask = stage.tokens_of(images, SMALL)
    assert torch.equal(rows, images)
    assert mask is None
    patches, _ = stage.tokens_of(images, replace(SMALL, tokens="patches"))
    assert patches.shape == (2, 49, 16)
    for i, j in itertools.product(range(7), range(7)):
        assert torch.equal(
            patches[:, 7 * i + j].view(2, 4, 4), images[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
        )
    padded, mask = stage.tokens_of(images, replace(SMALL, padding=3))
    assert torch.equal(padded[:, :28], images)
    assert not padded[:, 28:].any()
    assert mask[0, 0, 0].tolist() == [True] * 28 + [False] * 3
    assert stage.tokens_of(images, replace(SMALL, padding=3, masked=False))[1] is None


@pytest.mark.parametrize("position", POSITIONS[1:])
def test_masked_padding_changes_nothing(position):
    model = stage.build(replace(SMALL, position=position, padding=5)).double().eval()
    x, mask = stage.tokens_of(torch.randn(3, 28, 28, dtype=torch.float64), model.config)
    other = x.clone()
    other[:, 28:] = 1e6 * torch.randn(3, 5, 28, dtype=torch.float64)
    assert_equal([model(other, mask)], [model(x, mask)], tolerance=0)
    assert_equal([model(x[:, :28])], [model(x, mask)], tolerance=1e-9)
    assert (model(x) - model(x, mask)).abs().max() > 1e-4


def test_the_readout_is_of_all_states_side_by_side_their_mean_or_the_last():
    x = torch.randn(3, 28, 28)
    ways = {
        "all": lambda states: states.reshape(3, 28 * 24),
        "mean": lambda states: states.sum(1) / 28,
        "last": lambda states: states[:, 27],
    }
    for readout, way in ways.items():
        model = stage.build(replace(SMALL, readout=readout)).eval()
        assert_equal([model(x)], [model.out(way(model.states(x)[0]))], tolerance=1e-5)
    differing = torch.ones(3, 1, 1, 28, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"not torch.bool \(3, 1, 1, 28\)"):
        model(x, differing)  # `attention` takes it, a readout of one mask would not
    with pytest.raises(ValueError, match="28 tokens are read side by side, not of 27"):
        stage.build(replace(SMALL, readout="all"))(x[:, :27])
    for masked in (True, False):  # with padding, of the true tokens or of all
        model = stage.build(replace(SMALL, readout="all", padding=4, masked=masked))
        assert stage.logits_of(model, x).shape == (3, 10)
        assert model.out.in_features == (28 if masked else 32) * 24


# ---- the controls: less than attention ----


def test_uniform_weights_are_and_stay_uniform(data):
    small = data._replace(val=stage.every_nth(data.val, 50))
    model, _ = stage.train(replace(SMALL, attends="uniform"), small)
    _, weights = model.eval().states(data.val.images[:4])
    for of_block in weights:
        torch.testing.assert_close(of_block, torch.full_like(of_block, 1 / 28))


@pytest.mark.parametrize("attends", ["itself", "nothing"])
def test_a_token_alone_knows_nothing_of_the_others(attends):
    model = stage.build(replace(SMALL, attends=attends)).double().eval()
    x = torch.randn(2, 28, 28, dtype=torch.float64)
    other = x.clone()
    other[:, 5:] += 1
    before, after = model.states(x)[0], model.states(other)[0]
    assert_equal([before[:, :5]], [after[:, :5]])
    assert (before[:, 5:] - after[:, 5:]).abs().amin((0, 2)).min() > 1e-6
    if attends == "nothing":
        assert not any("W_" in name for name in model.state_dict() if name.startswith("blocks"))
        assert model.caches(2, 28) == []
        for caches in ([], stage.build(SMALL).caches(2, 28)):  # else all stood at place 0
            with pytest.raises(ValueError, match="without attention keeps no cache"):
                model.states(x[:, :1], caches=caches)
    else:  # decoded from a cache, too
        caches = model.caches(2, 28)
        parts = [model.states(part, caches=caches)[0] for part in x.split([3, 1, 24], 1)]
        assert_equal([torch.cat(parts, 1)], [before], tolerance=1e-9)


# ---- recall ----

RECALL = replace(
    stage.RECALL, d_model=24, n_heads=H, n_kv_heads=G, d_ff=0, n_train=2000, steps=6, n_logs=2
)


def test_sequences_are_what_they_say(data):
    split = stage.Split(data.val.images[::7], data.val.labels[::7])
    wardrobe = stage.wardrobe_of(split)
    class_of = {image.numpy().tobytes(): c.item() for image, c in zip(*split, strict=True)}
    torch.manual_seed(3)
    for n in (1, 2, 5, 8):
        tokens, answers = stage.sample_sequences(wardrobe, 200, n)
        assert tokens.shape == (200, n + 1, 792)
        asked = torch.zeros(8)
        for sequence, answer in zip(tokens, answers.tolist(), strict=True):
            images = [image.numpy().tobytes() for image in sequence[:, :784]]
            classes = [class_of[image] for image in images]
            labels = sequence[:, 784:]
            assert len(set(classes[:-1])) == n
            assert not labels[-1].any()
            assert (labels[:-1] != 0).sum(1).tolist() == [1] * n
            names = labels[:-1].argmax(1).tolist()
            assert len(set(names)) == n
            place = classes.index(classes[-1])  # the one before it of the same class
            assert place < n
            assert names[place] == answer
            assert images[place] != images[-1]  # but another image
            asked[place] += 1
        assert asked[:n].min() > 0
    again = stage.sample_sequences(wardrobe, 200, 8)[0]
    assert not torch.equal(again, tokens)
    one, two = stage.sequences_of(split, 50), stage.sequences_of(split, 50)
    assert torch.equal(one.images, two.images)
    assert torch.equal(one.labels, two.labels)


def test_every_label_is_drawn_alike_for_every_class(data):
    """Else a label would mean something outside of its sequence."""
    tokens, answers = stage.sample_sequences(stage.wardrobe_of(data.val), 20_000, 8)
    torch.manual_seed(0)
    share = answers.bincount(minlength=8) / len(answers)
    assert (share - 1 / 8).abs().max() < 0.01
    place_of_label = tokens[:, :8, 784:].argmax(2)  # (N, 8)
    pairs = place_of_label + 8 * torch.arange(8)
    assert (pairs.flatten().bincount() / len(answers) - 1 / 8).abs().max() < 0.012


@pytest.mark.parametrize("attends", ["nothing", "itself"])
def test_who_does_not_look_back_stays_at_chance(data, attends):
    """The answer is the same whatever the first eight are: right for an eighth of all orders."""
    small = data._replace(val=stage.every_nth(data.val, 50))
    model, _ = stage.train(replace(RECALL, attends=attends), small)
    sequences = stage.sequences_of(data.val, 400)
    changed = sequences.images.clone()
    changed[:, :8] = torch.randn(400, 8, 792)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(sequences.images), model(changed))
    assert stage.evaluate(model, sequences)["accuracy"] == pytest.approx(1 / 8, abs=0.05)


def test_recall_learns_from_what_it_looks_back_at(data):
    """Of two garments, more than half are answered rightly: not only which labels there are."""
    config = replace(stage.RECALL, d_model=64, d_ff=0, batch_size=64, n_train=20_000, fewest=1)
    config = replace(config, warmup=0.5, steps=200, n_logs=1)
    model, _ = stage.train(config, data._replace(val=stage.every_nth(data.val, 50)))
    torch.manual_seed(1)
    tokens, answers = stage.sample_sequences(stage.wardrobe_of(data.val), 500, 2)
    assert stage.evaluate(model, stage.Split(tokens, answers))["accuracy"] > 0.65


def test_equal_parameters_are_equal_within_a_percent():
    count = {}
    for config in (stage.RECALL, *stage.WIDER.values()):
        model = stage.build(config)
        count[config.n_kv_heads] = sum(p.numel() for p in model.parameters())
    assert set(count) == {8, 4, 2, 1}
    for number in count.values():
        assert number == pytest.approx(count[8], rel=0.01)
    for G, config in stage.WIDER.items():
        shared = stage.EXPERIMENTS["recall"][f"{G} K/V head{'s' if G > 1 else ''}"]
        assert replace(config, d_ff=shared.d_ff) == shared


# ---- upcycling ----


def test_shared_heads_are_the_means_of_their_groups():
    model = stage.build(replace(SMALL, n_kv_heads=H)).double()
    for G_new in (3, 2, 1):
        fewer = stage.with_shared_heads(model, G_new).double()
        assert fewer.config.n_kv_heads == G_new
        for name, value in fewer.state_dict().items():
            old = model.state_dict()[name]
            if ".W_k." in name or ".W_v." in name:
                size = H // G_new
                for g, own in enumerate(value.chunk(G_new)):
                    parts = old.chunk(H)[g * size : (g + 1) * size]
                    torch.testing.assert_close(own, sum(parts) / size, rtol=1e-6, atol=1e-7)
            else:
                torch.testing.assert_close(value, old, rtol=1e-6, atol=1e-7)


def test_sharing_heads_that_are_equal_changes_nothing():
    """Another route: with equal heads in every group, the function stays the same."""
    model = stage.build(replace(SMALL, n_kv_heads=H)).eval()
    with torch.no_grad():
        for block in model.blocks:
            for W in (block.attention.W_k, block.attention.W_v):
                for parameter in (W.weight, W.bias):
                    heads = parameter.unflatten(0, (G, H // G, -1))
                    heads[:, 1:] = heads[:, :1]
    x = torch.randn(3, 28, 28)
    assert_equal([stage.with_shared_heads(model, G).eval()(x)], [model(x)], tolerance=1e-5)


def test_upcycling_goes_on_from_the_averaged_weights(data):
    data = data._replace(val=stage.every_nth(data.val, 50))
    config = replace(SMALL, d_model=16, n_heads=8, n_kv_heads=8, steps=40, n_logs=1)
    model, _ = stage.train(config, data)
    rows = stage.upcycling(model, config, data)
    assert [(row["n_kv_heads"], row["steps"]) for row in rows] == [
        (G, steps) for G in (4, 2, 1) for steps in (0, 2)
    ]
    at_once = stage.evaluate(stage.with_shared_heads(model, 2), data.val)["accuracy"]
    assert rows[2]["val_accuracy"] == at_once


# ---- training ----


def test_a_training_step_equals_torchs(data):
    """The same step with torch's encoder layers, written out, from the same weights and the same
    batch.
    """
    config = replace(
        SMALL, n_kv_heads=H, steps=1, n_logs=1, dropout=0.0, warmup=0.0, position="learned"
    )
    start, end = stage.build(config), stage.train(config, data)[0]
    layers = [
        nn.TransformerEncoderLayer(24, H, 48, 0.0, F.gelu, batch_first=True, norm_first=True)
        for _ in range(2)
    ]
    for layer, block in zip(layers, start.blocks, strict=True):
        own = block.attention
        with torch.no_grad():
            layer.self_attn.in_proj_weight.copy_(
                torch.cat([W.weight for W in (own.W_q, own.W_k, own.W_v)])
            )
            layer.self_attn.in_proj_bias.copy_(
                torch.cat([W.bias for W in (own.W_q, own.W_k, own.W_v)])
            )
        layer.self_attn.out_proj.load_state_dict(own.W_o.state_dict())
        layer.linear1.load_state_dict(block.mlp[0].state_dict())
        layer.linear2.load_state_dict(block.mlp[2].state_dict())
        layer.norm1.load_state_dict(block.norm_1.state_dict())
        layer.norm2.load_state_dict(block.norm_2.state_dict())
    net = nn.ModuleList([start.W_in, start.norm, start.out, *layers])
    parameters = [*net.parameters(), start.places]
    groups = [[p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim == 1]]
    groups = [
        {"params": g, "weight_decay": w}
        for g, w in zip(groups, (config.weight_decay, 0.0), strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=stage.learning_rate(config, 1))
    stage.build(config)  # leaves the generator where training begins to draw
    batch = torch.randperm(config.n_train)[: config.batch_size]
    x = start.W_in(data.train.images[batch]) + start.places
    for layer in layers:
        x = layer(x)
    logits = start.out(start.norm(x).mean(1))
    F.cross_entropy(
        logits, data.train.labels[batch], label_smoothing=config.label_smoothing
    ).backward()
    nn.utils.clip_grad_norm_(parameters, config.clip)
    optimizer.step()
    trained = [
        end.W_in.weight,
        end.places,
        end.out.bias,
        end.blocks[1].mlp[0].weight,
        end.blocks[0].norm_1.weight,
    ]
    expected = [
        start.W_in.weight,
        start.places,
        start.out.bias,
        layers[1].linear1.weight,
        layers[0].norm1.weight,
    ]
    expected += [*layers[0].self_attn.in_proj_weight.chunk(3), layers[1].self_attn.out_proj.weight]
    attentions = [block.attention for block in end.blocks]
    trained += [
        W.weight
        for W in (attentions[0].W_q, attentions[0].W_k, attentions[0].W_v, attentions[1].W_o)
    ]
    # Adam's first step is ±lr wherever the gradient is not tiny, so the sign of a rounding error
    # shows: but for few
    for mine, other in zip(trained, expected, strict=True):
        assert ((mine - other).abs() < 1e-6).double().mean() > 0.99


def test_the_learning_rate_rises_and_falls():
    config = replace(SMALL, lr=2.0, warmup=0.25, steps=8)
    rates = [stage.learning_rate(config, step) for step in range(1, 9)]
    assert rates[:2] == [pytest.approx(0.5), pytest.approx(1.5)]
    assert rates[2] == pytest.approx(1 + math.cos(math.pi / 12))
    assert rates[7] == pytest.approx(1 + math.cos(math.pi * 11 / 12))


def test_history_holds_what_evaluate_gives_on_the_images_that_were_used(data):
    data = data._replace(val=stage.every_nth(data.val, 50))
    model, history = stage.train(replace(SMALL, dropout=0.3), data)
    seen = stage.evaluate(model, stage.Split(*(part[:300] for part in data.train)))
    val = stage.evaluate(model, data.val)
    row = history[-1]
    assert (row["train_loss"], row["train_accuracy"]) == (seen["loss"], seen["accuracy"])
    assert [row[f"val_{name}"] for name in stage.SCORES] == [val[name] for name in stage.SCORES]
    assert [row["step"] for row in history] == [4, 8, 12]


@pytest.mark.parametrize("config", [replace(SMALL, dropout=0.2), RECALL])
def test_the_same_seed_gives_the_same_history(data, config):
    small = data._replace(val=stage.every_nth(data.val, 50))

    def history_of(seed):
        _, history = stage.train(replace(config, steps=4, seed=seed), small)
        return [{k: v for k, v in row.items() if k != "seconds"} for row in history]

    assert history_of(3) == history_of(3) != history_of(4)


@pytest.mark.parametrize("config", [SMALL, RECALL])
def test_nothing_waits_for_the_device_between_log_rows(data, monkeypatch, config):
    small = data._replace(val=stage.every_nth(data.val, 50))
    reads = []
    for name in ("item", "__bool__", "__float__", "__int__", "tolist", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def counted(tensor, *args, original=original, **kwargs):
            reads.append(1)
            return original(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    numbers = []
    for steps in (4, 12):
        reads.clear()
        stage.train(replace(config, steps=steps, n_logs=1, batch_size=16), small)
        numbers.append(len(reads))
    assert numbers[0] == numbers[1] > 0


def test_evaluate_restores_every_flag_and_equals_torch(data):
    model = stage.build(replace(SMALL, dropout=0.5))
    model.train()
    model.blocks[0].eval()
    before = [module.training for module in model.modules()]
    split = stage.Split(*(part[::9] for part in data.val))
    found, again = stage.evaluate(model, split), stage.evaluate(model, split)
    assert [module.training for module in model.modules()] == before
    assert found["loss"] == again["loss"]  # dropout is off
    with torch.no_grad():
        logits = model.eval()(split.images)
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, split.labels).item(), rel=1e-5)
    right = (logits.argmax(1) == split.labels).double().mean().item()
    assert found["accuracy"] == pytest.approx(right)
    assert torch.equal(found["predicted"], logits.argmax(1))


def test_a_model_that_is_given_is_trained_alike_whatever_was_drawn_before(data):
    small = data._replace(val=stage.every_nth(data.val, 50))
    config = replace(SMALL, dropout=0.3, steps=4)
    found = []
    for n_drawn, is_training in ((1, True), (7, False)):
        given = stage.build(config).train(is_training)
        torch.rand(n_drawn)
        trained, history = stage.train(config, small, model=given)
        assert trained is given
        assert given.training
        found.append((history[-1]["objective"], history[-1]["val_loss"]))
    assert found[0] == found[1]


def test_every_batch_of_recall_is_whole_and_of_the_numbers_drawn(data):
    used = stage.Split(data.train.images[:200], data.train.labels[:200])
    config = replace(RECALL, batch_size=32, fewest=3)  # 200 is no multiple of 32
    lengths = set()
    for tokens, mask, answers in itertools.islice(stage.recall_batches(used, config), 40):
        assert mask is None
        assert (len(tokens), len(answers)) == (32, 32)
        lengths.add(tokens.shape[1])
    assert lengths == {4, 5, 6, 7, 8, 9}  # 3 … 8 labelled garments and one more
    seen = [y for _, _, y in itertools.islice(stage.image_batches(used, SMALL), 7)]
    assert [len(y) for y in seen] == [32] * 6 + [8]
    assert torch.equal(torch.cat(seen).bincount(), used.labels.bincount())


def test_a_loss_that_is_not_finite_ends_the_run_as_diverged(data):
    small = data._replace(val=stage.every_nth(data.val, 50))
    config = replace(SMALL, lr=1e30, warmup=0.0, clip=0.0, steps=40, n_logs=10)
    _, history = stage.train(config, small)
    assert stage.status(history) == "diverged"
    assert len(history) < 10


def test_a_config_that_cannot_be_is_refused_by_name():
    for change, quoted in (
        ({"position": "rotary", "d_model": 24, "n_heads": 8, "n_kv_heads": 8}, "must be even"),
        ({"n_kv_heads": 4}, "n_heads must be a multiple of n_kv_heads, 4, not 6"),
        ({"d_model": 25}, "d_model must be a multiple of n_heads, 6, not 25"),
        ({"task": "recall"}, 'readout must be "last" for recall'),
        ({"lr": float("nan")}, "nan"),
        ({"n_train": 55_001}, "n_train must be at most 55,000, not 55,001"),
    ):
        with pytest.raises(ValueError, match=quoted):
            replace(SMALL, **change).check()


# ---- experiments ----


def test_every_config_of_the_table_is_right():
    for values in stage.EXPERIMENTS.values():
        for config in values.values():
            config.check()
            stage.smoke_config(config).check()


def test_every_fault_names_two_runs_and_every_run_belongs_to_one():
    named = {name for fault in stage.FAULTS.values() for name in (fault.broken, fault.mended)}
    assert named == set(stage.EXPERIMENTS["faults"])


@pytest.mark.parametrize("heads", [(6, 2), (8, 2), (4, 4)])
def test_the_demo_finds_who_shares_what(heads):
    H, G = heads
    command = stage.DemoCommand(d_model=24, n_heads=H, n_kv_heads=G)
    tables = stage.demo_tables(*stage.demo_layers(command))
    for layer, n_kv_heads in (("MHA", H), ("GQA", G), ("MQA", 1)):
        links = [row for row in tables["sharing"] if row["layer"] == layer]
        assert len(links) == 2 * H * n_kv_heads  # by the keys, and by the values
        for link in links:
            reads = link["query_head"] // (H // n_kv_heads) == link["kv_head"]
            assert (link["change"] > stage.CHANGED) == reads
        rows = [row for row in tables["demo"] if row["layer"] == layer]
        assert len(rows) == H * 6
        for row in rows:
            assert row["reads"] == f"key/value head {row['head'] // (H // n_kv_heads)}"
            assert sum(float(w) for w in row["weights"].split()) == pytest.approx(1, abs=0.004)
            assert abs(row["row_error"]) < 1e-6
    assert stage.demo_tables(*stage.demo_layers(command)) == tables


def test_the_five_lines_of_the_demo_run_as_they_stand(capsys):
    """They stand indented in its docstring, and print what it prints."""
    lines = [line[8:] for line in stage.demo.__doc__.splitlines() if line.startswith(" " * 8)]
    assert len(lines) == 5
    exec("\n".join(lines), {})
    printed = capsys.readouterr().out
    tables = stage.demo_tables(*stage.demo_layers(stage.DemoCommand()))
    first = tables["demo"][0]["weights"].split()[0]
    assert f"[[{first[:4]}" in printed


def test_the_demo_renews_a_summary_that_is_there(tmp_path):
    folder = tmp_path / "stage3"
    folder.mkdir()
    (folder / "summary.md").write_text("old")
    row = {"experiment": "own", "value": "own", "seed": 0, "status": "ok", "parameters": 1}
    row |= {f"val_{score}": 0.5 for score in stage.SCORES} | stage.config_columns(SMALL)
    metrics.replace_rows(folder, {"runs": [row]}, [])
    assert stage.main(["demo", "--out", str(tmp_path)]) == 0
    summary = (folder / "summary.md").read_text(encoding="utf-8")
    assert "Attention weights of a random matrix" in summary
    assert "old" not in summary


def test_the_ratios_of_decoding_begin_with_what_sharing_gains():
    times = [
        {"cached": S, "n_kv_heads": G, "way": way, "milliseconds": S * G + place}
        for S in (4, 1024)
        for G in (16, 8, 4, 2, 1)
        for place, way in enumerate(stage.WAYS)
        if G < 16 or way != stage.COPIED  # which is not timed
    ]
    rows = stage.decode_ratios(times)
    assert [row["name"] for row in rows[:2]] == [
        f"decoding, 1,024 cached tokens, {G} / 16 key/value heads" for G in (4, 1)
    ]
    assert [row["ratio"] for row in rows[:2]] == [1 / 4, 1 / 16]
    assert len(rows) == 2 + 2 + 3 + 3


def test_the_demo_prints_and_draws(tmp_path, capsys):
    assert stage.main(["demo", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "GQA: key/value head 1 is read by the query heads 4, 5, 6, 7" in printed
    for name in ("demo_weights.png", "demo_sharing.png"):
        assert (tmp_path / "stage3" / name).stat().st_size > 10_000
    rows = metrics.load_rows(tmp_path / "stage3" / "demo.csv")
    first = rows["weights"].iloc[0].split()[0]
    assert f"[[{first[:4]}" in printed  # the five lines print the matrix that is drawn


def test_the_formula_as_first_written_fails_where_ours_does_not():
    rows = stage.arithmetic_faults()
    assert [row["nan as first written"] > 0 for row in rows] == [True, True]
    assert [row["nan `attention`"] for row in rows] == [0, 0]


@pytest.mark.parametrize("position", ["learned", "relative", "rotary"])
def test_decoding_under_autocast_gives_the_causal_models_logits_too(position):
    """Its keys and values are bfloat16, and so must be what holds them."""
    model = stage.build(replace(SMALL, causal=True, position=position)).eval()
    tokens = torch.randn(B, 28, 28)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = stage.decode(model, tokens)
        assert found.dtype == torch.bfloat16
        assert model.caches(B, 28)[0].k.dtype == torch.bfloat16
    assert model.caches(B, 28)[0].k.dtype == torch.float32
    wanted = model(tokens)
    torch.testing.assert_close(found.float(), wanted, atol=0.02, rtol=0.05)


def test_decoding_gives_the_causal_models_logits_and_not_the_others(data):
    images = data.val.images[::500]
    for causal in (True, False):
        model = stage.build(replace(SMALL, causal=causal)).eval()
        decoded = stage.decode(model, images)
        difference = (decoded - model(images)).abs().max().item()
        assert difference < 1e-5 if causal else difference > 1e-3
        if causal:
            again = stage.decode_without_cache(model, images)
            assert_equal([again], [decoded], tolerance=1e-5)


def test_what_is_measured_of_faults(data):
    blind = stage.build(replace(SMALL, position="none")).eval()
    assert stage.changed_by_order(blind, data) == 0
    config = replace(SMALL, position="none", padding=28)
    for masked in (True, False):
        model = stage.build(replace(config, masked=masked)).eval()
        nn.init.normal_(model.out.weight)
        changed = stage.changed_by_padding(model, data)
        assert changed == 0 if masked else changed > 0
    assert stage.percent_right(blind, data) == 100 * stage.evaluate(blind, data.val)["accuracy"]


def test_softmax_states_are_of_the_last_blocks_weights_and_all_score_weights(data):
    config = replace(SMALL, dropout=0.0)
    model = stage.build(replace(config, seed=1))
    found = stage.softmax_states(model, config, data)
    assert [row["when"] for row in found] == ["at the start", "at the end"]
    images, labels = data.val.images[::10], data.val.labels[::10]
    F.cross_entropy(model(images), labels).backward()
    squares = [
        W.weight.grad.square().sum()
        for b in model.blocks
        for W in (b.attention.W_q, b.attention.W_k)
    ]
    assert found[1]["grad_norm"] == pytest.approx(sum(squares).sqrt().item(), rel=1e-5)
    weights = model.states(images)[1][-1]
    own = -(weights * weights.clamp_min(1e-38).log()).sum(-1).mean().item()
    assert found[1]["entropy"] == pytest.approx(own, rel=1e-5)
    assert found[0]["entropy"] != found[1]["entropy"]


def test_maps_hold_the_weights_of_the_last_block(data):
    model = stage.build(SMALL).eval()
    rows = stage.attention_maps(model, data.test)
    weights = model.states(data.test.images[:3])[1][-1]
    assert len(rows) == 3 * H * 28
    for row in rows[:: 3 * 28 + 5]:
        expected = weights[row["image"], row["head"], row["query"]].tolist()
        assert [float(w) for w in row["weights"].split()] == pytest.approx(expected, abs=6e-4)
        assert row["kv_head"] == row["head"] // 2
        pixels = torch.tensor(list(bytes.fromhex(row["pixels"]))).float()
        own = data.test.images[row["image"], row["query"]]
        torch.testing.assert_close(stage.normalised(pixels), own, rtol=0, atol=1e-4)


def test_recall_maps_hold_what_the_last_token_attends_to(data):
    model = stage.build(RECALL).eval()
    rows = stage.recall_maps(model, data.test)
    sequences = stage.sequences_of(data.test, 3)
    _, weights = model.states(sequences.images)
    assert len(rows) == 27
    for row in rows:
        for number, of_block in enumerate(weights, 1):
            expected = of_block[row["sequence"], :, -1, row["place"]].tolist()
            found = [float(w) for w in row[f"block_{number}"].split()]
            assert found == pytest.approx(expected, abs=6e-4)
        assert row["answer"] == sequences.labels[row["sequence"]]
    of_first = [row["label"] for row in rows[:9]]
    assert sorted(of_first) == [-1, *range(8)]


def test_mcnemar_equals_the_binomial_by_hand(tmp_path):
    right = {"mha": "1110010100", "mqa": "1001001000"}
    rows = [
        {"experiment": name, "value": "", "seed": 0, "right": digits}
        for name, digits in right.items()
    ]
    metrics.replace_rows(tmp_path, {"predictions": rows}, [])
    (found,) = stage.mcnemar_rows(tmp_path, None)
    assert (found["mha alone right"], found["it alone right"]) == ("4", "2")
    # two or fewer of six, on both sides
    p = 2 * sum(math.comb(6, i) for i in range(3)) / 2**6
    assert found["p of each seed"] == f"{p:.2g}"
    assert found["minus mha (points)"] == "-20.00"


def test_the_rows_of_a_run_hold_numbers_and_of_no_attention_no_cache(data):
    few = stage.Data(*(stage.every_nth(split, 50) for split in data))
    arrays = tuple(tuple(part.numpy() for part in split) for split in few)
    for attends, cache_bytes in (("learned", 2 * 2 * G * 28 * 4 * 4), ("nothing", 0)):
        config = replace(SMALL, attends=attends, steps=2, n_logs=1)
        run = stage.Run("gqa2", "own", config)
        tables, _ = stage.execute(run, arrays, "cpu", {}, True, lambda row: None)
        (row,) = tables["runs"]
        assert row["cache_bytes"] == cache_bytes
        assert all(isinstance(cell, (str, int, float)) for cell in row.values())
        (scores,) = tables["test_metrics"]
        assert set(scores) == {"experiment", "value", "seed", *stage.SCORES}
        (digits,) = tables["predictions"]
        right = digits["right"].count("1") / len(digits["right"])
        assert right == pytest.approx(row["test_accuracy"])
        assert len(digits["right"]) == sum(cell["count"] for cell in tables["confusion"]) == 200


def test_weights_with_a_config_that_cannot_be_are_refused(tmp_path):
    model = stage.build(SMALL)
    stage.save_weights(tmp_path / "own.pt", SMALL, model.state_dict())
    assert stage.load_weights(tmp_path / "own.pt").config == SMALL
    stage.save_weights(tmp_path / "bad.pt", replace(SMALL, lr=-1.0), model.state_dict())
    with pytest.raises(ValueError, match=r"bad.pt: not weights of this stage \(lr must be"):
        stage.load_weights(tmp_path / "bad.pt")


def test_the_cache_bytes_of_a_run_are_those_of_its_caches():
    for groups in (1, 3, 6):
        caches = stage.build(replace(SMALL, n_kv_heads=groups)).caches(1, 28)
        # blocks, k and v, G, S, d, bytes
        assert sum(cache.nbytes for cache in caches) == 2 * 2 * groups * 28 * 4 * 4


# ---- images of one's own ----


@pytest.mark.parametrize("light", [True, False])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "I;16"])
def test_a_photo_of_a_test_image_is_made_into_the_test_image(data, tmp_path, light, mode):
    rng = np.random.default_rng(3)
    differences = []
    for image in stage.as_stored(data.test.images[:12]):
        garment = (image / 255).numpy().clip(0, 1)
        large = Image.fromarray((255 * garment).astype(np.uint8)).resize((140, 140), Image.BICUBIC)
        photo = np.pad(np.asarray(large) / 255, [(40, 25), (30, 60)])
        if light:
            photo = 0.97 * (1 - photo) + rng.normal(0, 0.005, photo.shape)
        photo = Image.fromarray((255 * photo.clip(0, 1)).astype(np.uint8))
        path = tmp_path / ("photo.tiff" if mode == "I;16" else "photo.png")
        if mode == "I;16":
            photo = Image.fromarray(np.asarray(photo).astype(np.uint16) * 257)
        else:
            photo = photo.convert(mode)
        photo.save(path)
        found = stage.read_garment(path)
        assert found.shape == (28, 28)
        assert 0 <= found.min() <= found.max() <= 1
        box = [np.flatnonzero(found.max(axis) > 0) for axis in (0, 1)]
        assert max(np.ptp(places) + 1 for places in box) == 28  # the longest edge
        for places in box:
            assert abs((places[0] + places[-1]) / 2 - 13.5) <= 1  # placed in the middle
        differences.append(np.abs(found - garment).mean() / garment.mean())
    assert np.median(differences) < 0.3


def test_dirt_does_not_move_the_garment(tmp_path):
    paper = np.full((120, 120), 250, np.uint8)
    paper[30:90, 45:75] = 30
    Image.fromarray(paper).save(tmp_path / "clean.png")
    paper[5, 5] = 60
    Image.fromarray(paper).save(tmp_path / "dirty.png")
    clean, dirty = (stage.read_garment(tmp_path / f"{name}.png") for name in ("clean", "dirty"))
    np.testing.assert_allclose(clean, dirty, atol=0.01)


# ---- committed evidence ----

EVIDENCE = stage.HERE / "figures" / "stage3"
needs_evidence = pytest.mark.skipif(
    not (EVIDENCE / "mha.pt").exists(), reason="nothing was trained with this table yet"
)


@needs_evidence
def test_the_committed_weights_are_those_of_the_committed_rows(data):
    """Image by image, on every fourth."""
    tests = metrics.load_rows(EVIDENCE / "test_metrics.csv").query("seed == 0")
    accuracies = tests.set_index("experiment")["accuracy"]
    predictions = metrics.load_rows(EVIDENCE / "predictions.csv", as_text=True)
    rights = predictions[predictions["seed"] == "0"].set_index("experiment")["right"]
    test = stage.Split(data.test.images[::4], data.test.labels[::4])
    for name in stage.SELECTED:
        saved = torch.tensor([digit == "1" for digit in rights[name]])
        assert saved.float().mean().item() == pytest.approx(accuracies[name], abs=1e-6)
        found = stage.evaluate(stage.load_weights(EVIDENCE / f"{name}.pt"), test)
        differ = (found["predicted"] == test.labels) != saved[::4]
        assert differ.sum() <= 1  # other processors round


@needs_evidence
def test_the_committed_rows_are_those_of_the_table():
    runs = stage.runs_of(list(stage.EXPERIMENTS), 1)
    todo, n_outdated = stage.unfinished(runs, EVIDENCE)
    assert (todo, n_outdated) == ([], 0)
