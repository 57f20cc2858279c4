"""interview/gpt.py against sums over all sequences, plain loops, and itself without a cache."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.nn import functional as F

import stage1_mlp
from interview import gpt
from interview.gpt import GPT, Config, Digits

TINY = Config(d_model=24, n_heads=4, n_kv_heads=2, n_blocks=2, d_ff=10, dropout=0.0, n_tokens=5)


def model_of(config=TINY, seed=0):
    """In float64, its weights large enough that everything matters."""
    torch.manual_seed(seed)
    model = GPT(config).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def patches(*shape, seed=0):
    return torch.randint(gpt.V, shape, generator=torch.Generator().manual_seed(seed))


# ---- images as tokens ----


def test_patches_are_read_row_by_row_and_go_back():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(3, 784, generator=generator) < 0.4
    tokens = gpt.tokens_of(pixels)
    images = pixels.view(3, 28, 28).int().tolist()
    for n, row, column in itertools.product(range(3), range(14), range(14)):
        y, x = 2 * row, 2 * column
        bits = [*images[n][y][x : x + 2], *images[n][y + 1][x : x + 2]]
        assert tokens[n, 14 * row + column] == int("".join(map(str, bits)), 2)
    assert torch.equal(gpt.pixels_of(tokens), pixels.view(3, 28, 28).float())
    assert torch.equal(gpt.patches_of([gpt.hex_of(row) for row in tokens]), tokens)


def test_a_letter_shows_its_pixels():
    tokens = torch.zeros(2, 196, dtype=torch.long)
    tokens[0, :3] = torch.tensor([8, 1, 12])  # above left; below right; above
    lines = gpt.as_text(tokens).split("\n")
    assert len(lines) == 14
    assert lines[0] == "▘▗▀" + " " * 27
    assert len(set(gpt.LETTERS)) == 16


def test_pixels_are_drawn_with_their_grey_value():
    grey = torch.tensor([0.0, 1.0, 0.25]).repeat(20_000, 1)
    drawn = gpt.binarised(grey, torch.Generator().manual_seed(0)).float().mean(0)
    assert drawn[:2].tolist() == [0, 1]
    assert drawn[2].item() == pytest.approx(0.25, abs=0.015)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gpt.tokens_of(torch.zeros(3, 28, 28)), r"\(N, 784\) expected, not \(3, 28, 28\)"),
        (lambda: gpt.pixels_of(torch.zeros(3, 195)), r"\(N, 196\) expected, not \(3, 195\)"),
        (lambda: gpt.check_classes(torch.tensor([3, 10])), "in 0 … 9, not 3 … 10"),
        (lambda: gpt.check_classes(torch.tensor([1.0])), "int64 expected, not torch.float32"),
        (lambda: model_of()(patches(2, 6)), r"at most 5 in all, expected, not \(2, 6\)"),
        (lambda: GPT(replace(TINY, n_kv_heads=3)), "n_heads=4 is not a multiple of n_kv_heads=3"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- the network ----


def plain_forward(model, tokens):
    """One sequence (T,), one position and one head at a time: logits (T, V)."""
    w = dict(model.named_parameters())
    c = model.config
    d = c.d_model // c.n_heads
    eps = torch.finfo(torch.float64).eps

    def norm(x, name):
        return w[name] * x / (x.square().mean() + eps).sqrt()

    def turned(x, place):
        pairs = x.view(-1, 2)
        a = place * 10_000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
        turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(a), a)
        return torch.view_as_real(turned).flatten()

    xs = [w["embedding.weight"][token] + w["places"][t] for t, token in enumerate(tokens)]
    for i in range(c.n_blocks):
        name = f"blocks.{i}."
        projected = {}
        for part in "qkv":
            weight, bias = (w[f"{name}attention.W_{part}.{kind}"] for kind in ("weight", "bias"))
            projected[part] = [(weight @ norm(x, name + "norm_1.weight") + bias) for x in xs]
        attended = []
        for t in range(len(xs)):
            out = []
            for h in range(c.n_heads):
                g = h // (c.n_heads // c.n_kv_heads)
                q = turned(projected["q"][t][h * d : (h + 1) * d], t)
                cut = slice(g * d, (g + 1) * d)
                scores = [q @ turned(projected["k"][s][cut], s) for s in range(t + 1)]
                shares = (torch.stack(scores) / math.sqrt(d)).softmax(0)
                out.append(sum(shares[s] * projected["v"][s][cut] for s in range(t + 1)))
            attended.append(torch.cat(out))
        weight, bias = w[name + "attention.W_o.weight"], w[name + "attention.W_o.bias"]
        xs = [x + weight @ a + bias for x, a in zip(xs, attended, strict=True)]
        w1, w2, w3 = (w[f"{name}mlp.w{j}.weight"] for j in (1, 2, 3))
        ys = [norm(x, name + "norm_2.weight") for x in xs]
        xs = [x + w2 @ (F.silu(w1 @ y) * (w3 @ y)) for x, y in zip(xs, ys, strict=True)]
    states = [norm(x, "norm.weight") for x in xs]
    return torch.stack([w["head.weight"] @ s + w["head.bias"] for s in states])


def test_the_network_is_its_equations_in_value_and_gradients():
    model = model_of()
    tokens = torch.cat([torch.tensor([[19], [25]]), patches(2, 4)], 1)
    logits = model(tokens)
    plain = torch.stack([plain_forward(model, row) for row in tokens])
    torch.testing.assert_close(logits, plain, rtol=1e-9, atol=1e-9)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).double()
    parameters = list(model.parameters())
    ours = torch.autograd.grad((weight * logits).sum(), parameters)
    theirs = torch.autograd.grad((weight * plain).sum(), parameters)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_with_a_cache_it_says_the_same(n_kv_heads):
    model = model_of(replace(TINY, n_kv_heads=n_kv_heads)).eval()
    tokens = torch.cat([torch.tensor([[16], [21], [20]]), patches(3, 4)], 1)
    caches = model.caches(3)
    with torch.no_grad():
        parts = [model(part, caches) for part in tokens.split([2, 1, 2], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=1e-10, atol=1e-10)
        with pytest.raises(ValueError, match="after 5 in the caches"):
            model(tokens[:, :1], caches)
    assert caches[0].length == 5
    cached = gpt.CachedStep(model, 3)
    uncached = gpt.UncachedStep(model)
    for T in (1, 2, 5):
        torch.testing.assert_close(cached(tokens[:, :T]), uncached(tokens[:, :T]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_a_cache_it_says_the_same_under_autocast(dtype):
    """Which makes bfloat16 of float32's keys and values, and leaves float64's alone."""
    model = model_of(TINY).to(dtype).eval()
    tokens = torch.cat([torch.tensor([[16], [21], [20]]), patches(3, 4)], 1)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        caches = model.caches(3)
        parts = [model(part, caches) for part in tokens.split([2, 1, 2], 1)]
    assert caches[0].k.dtype == (torch.bfloat16 if dtype == torch.float32 else dtype)
    tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.float32 else {}
    found = torch.cat(parts, 1).to(dtype)
    torch.testing.assert_close(found, model(tokens), **tolerance)


# ---- likelihood ----


def test_the_probabilities_of_all_images_sum_to_1():
    model = model_of(replace(TINY, n_tokens=3))
    every = torch.tensor(list(itertools.product(range(16), repeat=3)))
    for c in (0, 7):
        log_p = gpt.log_likelihood(model, every, torch.full((len(every),), c), size=1000)
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-10)


def test_loss_and_likelihood_are_one_sum():
    model = model_of().train()
    tokens, labels = patches(7, 5, seed=2), torch.tensor([0, 9, 3, 3, 5, 1, 8])
    log_p = gpt.log_likelihood(model, tokens, labels, size=3)
    assert model.training
    loss = gpt.next_patch_loss(model, tokens, labels)
    assert loss.item() == pytest.approx(-log_p.mean().item() / 5, rel=1e-6)
    by_class = gpt.log_likelihood_of_classes(model, tokens)
    torch.testing.assert_close(by_class[torch.arange(7), labels], log_p)


def test_nats_sum_over_the_classes():
    log_p = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).double() - 3
    labels = torch.tensor([0, 9, 3, 3, 5, 1])
    prior = gpt.class_shares(torch.arange(25) % 10)
    found = gpt.nats(log_p, labels, prior)
    joint = log_p.exp() * prior
    marginal = -joint.sum(1).log()
    assert prior.tolist() == pytest.approx([3 / 25] * 5 + [2 / 25] * 5)
    assert found["nats"] == pytest.approx(marginal.mean().item())
    assert found["standard_error"] == pytest.approx(marginal.std().item() / math.sqrt(6))
    assert found["nats_given_class"] == pytest.approx(-log_p[range(6), labels].mean().item())
    assert found["bound"] == pytest.approx(-joint[range(6), labels].log().mean().item())
    too_high = -(joint[range(6), labels] / joint.sum(1)).log().mean()  # −log p(c | x)
    assert found["bound"] - found["nats"] == pytest.approx(too_high.item())
    right = [joint[i].argmax().item() == labels[i].item() for i in range(6)]
    assert found["bayes_accuracy"] == pytest.approx(sum(right) / 6)


def test_diversity_is_the_mean_over_all_pairs():
    digits = Digits(patches(7, 196, seed=4), torch.tensor([0, 1, 0, 1, 1, 0, 1]))
    images = gpt.pixels_of(digits.images)
    shares = []
    for label in (0, 1):
        pairs = itertools.combinations(images[digits.labels == label], 2)
        differing = [(a != b).double().mean().item() for a, b in pairs]
        shares.append(sum(differing) / len(differing))
    assert gpt.diversity(digits) == pytest.approx(sum(shares) / 2)
    assert math.isnan(gpt.diversity(Digits(digits.images[:2], digits.labels[:2])))


# ---- training and the program ----


@pytest.fixture(scope="module")
def raw():
    """Stage 1's splits."""
    return stage1_mlp.load_data(ROOT / "data")


@pytest.fixture(scope="module")
def data(raw):
    """All images."""
    with pytest.MonkeyPatch.context() as patch:  # read once
        patch.setattr(stage1_mlp, "load_data", lambda data_dir: raw)
        return gpt.load_digits(ROOT / "data")


def test_the_images_are_drawn_once_and_keep_their_classes(data, raw):
    assert data["val"].images.shape == (5000, 196)
    assert data["test"].images.shape == (10_000, 196)
    shown = data["train"].images[:50] * 255
    assert torch.equal(shown.round(), stage1_mlp.as_stored(raw.train).images[:50].round())
    assert torch.bincount(data["val"].labels).tolist() == torch.bincount(raw.val.labels).tolist()
    ink = gpt.pixels_of(data["test"].images).mean().item()
    grey = stage1_mlp.as_stored(raw.test).images.mean().item() / 255
    assert ink == pytest.approx(grey, abs=0.002)


def test_a_run_that_was_stopped_ends_as_one_that_was_not(data, tmp_path, monkeypatch):
    config = replace(gpt.smoke_config(gpt.MAIN), epochs=3)
    whole, history = gpt.train(config, data, "whole", tmp_path / "whole.pt")
    progress = gpt.progress

    def stop_in_the_second_epoch(name, config, row):
        if row["step"] == 3:
            raise KeyboardInterrupt
        return progress(name, config, row)

    monkeypatch.setattr(gpt, "progress", stop_in_the_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        gpt.train(config, data, "stopped", tmp_path / "stopped.pt")
    monkeypatch.setattr(gpt, "progress", progress)
    resumed, again = gpt.train(config, data, "resumed", tmp_path / "stopped.pt")
    assert [row["step"] for row in again] == [1, 2, 3, 4, 5, 6]
    assert [row["train_nats"] for row in again] == [row["train_nats"] for row in history]
    for name, weights in whole.state_dict().items():
        assert torch.equal(weights, resumed.state_dict()[name]), name


def test_the_loss_falls_below_that_of_independent_pixels(data, tmp_path):
    sizes = {"d_model": 32, "n_blocks": 1, "d_ff": 32, "n_train": 256, "batch_size": 16}
    config = replace(gpt.MAIN, **sizes, epochs=2, n_judged=50, dropout=0.0, lr=1e-2)
    _, history = gpt.train(config, data, "short", tmp_path / "short.pt")
    pixels = gpt.pixels_of(data["val"].images[:50]).flatten(1)
    means = data["train"].images.mean(0).clamp(1e-4, 1 - 1e-4)
    independent = F.binary_cross_entropy(means.expand_as(pixels), pixels, reduction="sum") / 50
    assert history[-1]["val_nats"] < independent.item()


def test_the_program_trains_measures_and_shows(raw, tmp_path, capsys, monkeypatch):
    few = stage1_mlp.Data(*(stage1_mlp.Split(*(a[::50] for a in split)) for split in raw))
    monkeypatch.setattr(stage1_mlp, "load_data", lambda data_dir: few)
    data = gpt.load_digits(ROOT / "data")
    places = {"out": tmp_path / "out", "checkpoints": tmp_path / "checkpoints", "device": "cpu"}
    assert gpt.main(**places) == 0
    assert "python -m interview.gpt --train" in capsys.readouterr().out
    nobody = places["out"] / "none.pt"
    assert gpt.main(train=True, evaluate=True, smoke=True, cnn=nobody, **places) == 0
    printed = capsys.readouterr().out
    assert "0 of 3 runs found, 3 to do" in printed
    assert "no CNN at" in printed
    out = places["out"]
    rows = {name: pd.read_csv(out / f"gpt_{name}.csv") for name in ("runs", "nats", "speed")}
    assert rows["runs"]["value"].tolist() == ["gpt", "8", "1"]
    assert rows["speed"]["value"].tolist() == ["MHA", "GQA", "MQA"]
    model = gpt.load_weights(out / "gpt_digits.pt")
    judged = data["val"].first(20)
    found = -gpt.log_likelihood(model, *judged).mean().item()
    assert rows["runs"].loc[0, "val_nats_given_class"] == pytest.approx(found, rel=1e-4)
    assert rows["nats"]["value"].tolist() == ["bound", "sum"]
    judged = data["test"].first(10)
    found = -gpt.log_likelihood(model, *judged).mean().item()
    assert rows["nats"].loc[1, "nats_given_class"] == pytest.approx(found, rel=1e-4)
    before = (out / "gpt_nats.csv").read_bytes()
    gpt.evaluate_all(out, ROOT / "data", nobody, "cpu", smoke=True)
    assert "saved:" not in capsys.readouterr().out
    assert (out / "gpt_nats.csv").read_bytes() == before
    digits = pd.read_csv(out / "gpt_digits.csv", dtype={"patches": str})
    assert gpt.patches_of(digits["patches"].tolist()).shape[1] == 196
    pictures = ("course", "kv_heads", "digits")
    assert all((out / f"gpt_{name}.png").exists() for name in pictures)
    gpt.train_missing(out, ROOT / "data", 1, "cpu", places["checkpoints"], smoke=True)
    assert "3 of 3 runs found, 0 to do" in capsys.readouterr().out


def test_a_smoke_run_does_not_write_over_the_figures(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    for options in ({}, {"out": Path("figures/interview")}):
        assert gpt.main(train=True, smoke=True, **options) == 1
        assert "--smoke would write over" in capsys.readouterr().err


def test_flags_are_checked(tmp_path, capsys):
    assert gpt.main(train=True, workers=0, out=tmp_path) == 1
    assert "workers must be a whole number of at least 1, not 0" in capsys.readouterr().err
    assert gpt.main(fresh=True, out=tmp_path) == 1
    assert "--fresh measures all again: it needs --evaluate" in capsys.readouterr().err
