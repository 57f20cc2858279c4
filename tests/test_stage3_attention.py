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
            assert node.name == "benchmark"


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
    fails = [
        (caches[:1], {}),
        ([*caches, KVCache(B, G, 9, 4)], {}),
        (small, {}),  # the second block has no room after the first has appended
        (caches, {"mask": torch.ones(2, 2, dtype=torch.bool)}),
        (caches, {"mask": torch.ones(4, 6)[None, None, None]}),
        ([caches[0], KVCache(B, G, 9, 4)], {}),  # float32
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
