"""interview/diffusion.py against Bayes' rule, closed forms of normal data, and plain loops."""

import itertools
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import ROOT, assert_equal
from scipy import linalg
from sklearn.metrics import f1_score, jaccard_score
from torch.nn import functional as F

import stage1_mlp
import stage3_attention
from interview import convolution, diffusion, training


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# ---- noising ----


def test_the_schedule_is_the_papers_and_ends_in_noise():
    schedule = diffusion.linear_schedule()
    assert [len(table) for table in schedule] == [1001] * 3
    assert schedule.betas[[0, 1, 1000]].tolist() == pytest.approx([0, 1e-4, 0.02])
    assert schedule.betas[501].item() == pytest.approx(1e-4 + 500 / 999 * 0.0199)
    product = 1.0
    for t in range(1001):
        product *= 1 - schedule.betas[t].item()
        assert schedule.alpha_bars[t].item() == pytest.approx(product, rel=1e-12)
    assert schedule.alpha_bars[0] == 1
    assert schedule.alpha_bars[1000] < 5e-5  # x_T is noise


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_steps": 0}, "n_steps must be a whole number of at least 1, not 0"),
        ({"n_steps": 2.5}, "n_steps must be .*, not 2.5"),
        ({"first": 0.0}, "expected, not first=0.0 and last=0.02"),
        ({"first": 0.1}, "expected, not first=0.1 and last=0.02"),
        ({"last": 1.0}, "expected, not first=0.0001 and last=1.0"),
    ],
)
def test_the_schedule_refuses_what_is_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        diffusion.linear_schedule(**arguments)


def test_noising_at_once_is_noising_step_by_step():
    """The same noise, added step by step, has the weights of one normal number."""
    schedule = diffusion.linear_schedule(7, 0.05, 0.4)
    x_0 = draw(3, 2, 4, 5)
    step_noise = draw(7, 3, 2, 4, 5, seed=1)
    x = x_0
    for t in range(1, 8):
        x = diffusion.noise_step(x, torch.full((3,), t), step_noise[t - 1], schedule.betas)
    total = torch.zeros_like(x_0)  # the sum of what was added, each shrunk by all later steps
    for t in range(1, 8):
        later = math.prod(1 - schedule.betas[s].item() for s in range(t + 1, 8))
        total += math.sqrt(schedule.betas[t].item() * later) * step_noise[t - 1]
    noise = total / math.sqrt(1 - schedule.alpha_bars[7].item())
    assert_equal(
        [diffusion.add_noise(x_0, torch.full((3,), 7), noise, schedule.alpha_bars)], [x], 1e-12
    )
    square = sum(  # and that sum is normal noise: its weights have the square sum 1 − ᾱ
        schedule.betas[t].item() * math.prod(1 - schedule.betas[s].item() for s in range(t + 1, 8))
        for t in range(1, 8)
    )
    assert square == pytest.approx(1 - schedule.alpha_bars[7].item())


def test_every_image_has_a_time_of_its_own():
    schedule = diffusion.linear_schedule(5, 0.1, 0.3)
    x, noise = draw(3, 4), draw(3, 4, seed=1)
    t = torch.tensor([5, 0, 2])
    found = diffusion.add_noise(x, t, noise, schedule.alpha_bars)
    for i, time in enumerate(t.tolist()):
        a = schedule.alpha_bars[time].item()
        assert_equal([found[i]], [math.sqrt(a) * x[i] + math.sqrt(1 - a) * noise[i]], 1e-12)
    assert torch.equal(found[1], x[1])  # at time 0 there is no noise
    with pytest.raises(ValueError, match=r"each of 3 images expected, not \(2,\)"):
        diffusion.add_noise(x, t[:2], noise, schedule.alpha_bars)
    with pytest.raises(ValueError, match=r"one shape expected, not \(3, 4\) and \(3, 1\)"):
        diffusion.add_noise(x, t, noise[:, :1], schedule.alpha_bars)


def test_the_loss_and_its_gradient():
    schedule = diffusion.linear_schedule(9, 0.1, 0.3)
    x_0, noise = draw(4, 1, 3, 2), draw(4, 1, 3, 2, seed=1)
    t = torch.tensor([1, 4, 9, 2])
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def predict(x, t):
        return weight.float() * x.float() * t.view(-1, 1, 1, 1)

    loss = diffusion.noise_loss(predict, x_0, t, noise, schedule.alpha_bars)
    expected, slope = 0.0, 0.0
    for i in range(4):
        a = schedule.alpha_bars[t[i]].item()
        scaled = (math.sqrt(a) * x_0[i] + math.sqrt(1 - a) * noise[i]) * t[i]
        expected += (0.7 * scaled - noise[i]).square().sum().item() / x_0.numel()
        slope += (2 * (0.7 * scaled - noise[i]) * scaled).sum().item() / x_0.numel()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    (found,) = torch.autograd.grad(loss, weight)
    assert found.item() == pytest.approx(slope, rel=1e-5)


# ---- the posterior, and sampling normal data ----


@pytest.mark.parametrize("t", [1, 2, 5, 9])
def test_the_posterior_is_bayes_rule_on_a_grid(t):
    """q(x_{t−1} | x_t, x_0) ∝ q(x_t | x_{t−1}) q(x_{t−1} | x_0), by numerical integration."""
    schedule = diffusion.linear_schedule(9, 0.1, 0.3)
    x_0, x_t = 0.7, -0.4
    mean, variance = diffusion.posterior(
        torch.tensor(x_t, dtype=torch.float64), torch.tensor(x_0), t, schedule
    )
    if t == 1:  # x_0 is known
        assert (mean.item(), variance) == (pytest.approx(x_0), 0)
        return
    grid = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    beta = schedule.betas[t].item()
    before = schedule.alpha_bars[t - 1].item()
    log_likelihood = -((x_t - math.sqrt(1 - beta) * grid) ** 2) / (2 * beta)
    log_prior = -((grid - math.sqrt(before) * x_0) ** 2) / (2 * (1 - before))
    weights = (log_likelihood + log_prior).softmax(0)
    expected = (weights * grid).sum()
    assert mean.item() == pytest.approx(expected.item(), abs=1e-6)
    spread = (weights * (grid - expected).square()).sum().item()
    assert variance == pytest.approx(spread, abs=1e-6)


M, S = 0.8, 0.6  # the data: N(0.8, 0.6²)


def best_predictor(schedule):
    """The mean of the noise given x_t, for data N(M, S²): noise and x_t are normal together."""

    def predict(x, t):
        a = schedule.alpha_bars[t].view(-1, *[1] * (x.ndim - 1))
        return (1 - a).sqrt() * (x - a.sqrt() * M) / (a * S**2 + 1 - a)

    return predict


@pytest.mark.parametrize("sampler", ["DDPM", "DDIM", "DDIM, η = 1", "DDIM, 50 steps"])
def test_sampling_with_the_best_predictor_gives_the_data_back(sampler):
    schedule = diffusion.linear_schedule()
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(4_000, 2, generator=generator, dtype=torch.float64)
    predict = best_predictor(schedule)
    if sampler == "DDPM":
        x = diffusion.ddpm_sample(predict, x_T, schedule, generator=generator)
    else:
        options = {"DDIM": (1000, 0), "DDIM, η = 1": (1000, 1), "DDIM, 50 steps": (50, 0)}
        n_steps, eta = options[sampler]
        x = diffusion.ddim_sample(predict, x_T, schedule, n_steps, eta, generator=generator)
    assert x.mean().item() == pytest.approx(M, abs=0.02)
    # long steps without noise come out a little narrow
    assert x.std().item() == pytest.approx(S, abs=0.04 if sampler == "DDIM, 50 steps" else 0.02)


def test_ddim_without_noise_is_a_straight_line_for_normal_data():
    """Its exact solution keeps each image's place among the others: (x − mean_t) / std_t."""
    schedule = diffusion.linear_schedule()
    x_T = draw(5, 3)
    x = diffusion.ddim_sample(best_predictor(schedule), x_T, schedule, 1000)
    a = schedule.alpha_bars[-1].item()
    place = (x_T - math.sqrt(a) * M) / math.sqrt(a * S**2 + 1 - a)
    assert_equal([x], [M + S * place], 2e-2)


@pytest.mark.parametrize("t", [1, 2, 7])
def test_ddim_with_eta_1_is_ddpm(t):
    schedule = diffusion.linear_schedule(9, 0.1, 0.3)
    x, noise, z = draw(2, 3), draw(2, 3, seed=1), draw(2, 3, seed=2)
    alpha_bar, before = schedule.alpha_bars[t].item(), schedule.alpha_bars[t - 1].item()
    for clip in (False, True):
        ddpm = diffusion.ddpm_step(x, noise, t, schedule, z, clip)
        ddim = diffusion.ddim_step(x, noise, alpha_bar, before, 1.0, z, clip)
        assert_equal([ddim], [ddpm], 1e-10)
    # and Ho's algorithm 2, which does not speak of x_0
    beta = schedule.betas[t].item()
    mean = (x - beta / math.sqrt(1 - alpha_bar) * noise) / math.sqrt(1 - beta)
    sigma = math.sqrt(beta * (1 - before) / (1 - alpha_bar))
    assert_equal([diffusion.ddpm_step(x, noise, t, schedule, z)], [mean + sigma * z], 1e-10)


def test_ddim_finds_the_image_at_once_if_the_noise_is_known():
    schedule = diffusion.linear_schedule()
    x_0, noise = draw(2, 3, 4).clamp(-1, 1), draw(2, 3, 4, seed=1)
    x_T = diffusion.add_noise(x_0, torch.tensor([1000, 1000]), noise, schedule.alpha_bars)
    for n_steps, clip in ((1, False), (3, True)):
        found = diffusion.ddim_sample(lambda x, t: noise, x_T, schedule, n_steps, clip=clip)
        assert_equal([found], [x_0], 1e-9)


@pytest.mark.parametrize(("T", "n_steps"), [(1000, 50), (1000, 7), (10, 10), (9, 1)])
def test_the_times_of_ddim_fall_from_T_to_0(T, n_steps):
    times = diffusion.ddim_times(T, n_steps)
    assert (times[0], times[-1], len(times)) == (T, 0, n_steps + 1)
    gaps = [a - b for a, b in itertools.pairwise(times)]
    assert max(gaps) - min(gaps) <= 1
    assert min(gaps) >= 1


def test_too_many_steps_are_refused():
    with pytest.raises(ValueError, match="n_steps must be at most T = 9, not 10"):
        diffusion.ddim_times(9, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.5, 0.4), r"not alpha_bar=0\.5, alpha_bar_next=0\.4 and eta=0\.0"),  # to more noise
        ((1.0, 1.0), r"not alpha_bar=1\.0, alpha_bar_next=1\.0"),
        ((0.5, 0.6, 1.5), r"eta of 0 … 1 expected, .* eta=1\.5"),
    ],
)
def test_steps_that_are_none_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        diffusion.ddim_step(torch.ones(2), torch.ones(2), *arguments)


@pytest.mark.parametrize("t", [0, 10, -1])
def test_the_posterior_has_times_1_to_T(t):
    schedule = diffusion.linear_schedule(9, 0.1, 0.3)
    with pytest.raises(ValueError, match=rf"t must be a time of 1 … 9, not {t}"):
        diffusion.posterior(torch.ones(2), torch.ones(2), t, schedule)


def test_samplers_show_every_state():
    schedule = diffusion.linear_schedule(6, 0.1, 0.3)
    for sample in (diffusion.ddpm_sample, diffusion.ddim_sample):
        seen = []
        options = {"n_steps": 6} if sample is diffusion.ddim_sample else {}
        x_T = draw(2, 3)
        x_0 = sample(
            lambda x, t: 0 * x,
            x_T,
            schedule,
            on_step=lambda t, x, seen=seen: seen.append((t, x)),
            **options,
        )
        assert [t for t, _ in seen] == [6, 5, 4, 3, 2, 1, 0]
        assert torch.equal(seen[0][1], x_T)
        assert torch.equal(seen[-1][1], x_0)


# ---- guidance ----


def awake(model):
    """The last layer begins with zeros; with other weights, everything before it matters."""
    torch.nn.init.normal_(model.last.weight, std=0.3)
    return model.double()


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return awake(diffusion.UNet(channels=(8, 16, 24), n_classes=5, n_heads=2))


def test_guidance_of_0_1_and_more(unet):
    x, t = draw(3, 1, 8, 12), torch.tensor([1, 500, 1000])
    labels = torch.tensor([4, 0, 2])
    conditional = unet(x, t, labels)
    unconditional = unet(x, t)
    assert not torch.allclose(conditional, unconditional)
    for weight in (0, 1, 2.5):
        expected = (1 - weight) * unconditional + weight * conditional
        assert_equal([diffusion.guided(unet, labels, weight)(x, t)], [expected], 1e-10)
        found = diffusion.guidance(conditional, unconditional, weight)
        assert_equal([found], [expected], 1e-10)


# ---- U-Net ----


def test_the_time_embedding_is_that_of_positions():
    table = stage3_attention.sinusoids(0, 1001, 12, torch.float64, "cpu")
    t = torch.tensor([1000, 0, 3, 77])
    found = diffusion.time_embedding(t.double(), 12)
    assert_equal([found], [table[t]], 1e-4)  # exponents are float32
    with pytest.raises(ValueError, match="d must be an even number of at least 2, not 7"):
        diffusion.time_embedding(t, 7)


def by_hand(model, x, t, labels):
    """UNet.forward, written out for three levels with torch's functions."""

    def block(b, h):
        y = F.conv2d(F.silu(b.norm_1(h)), b.conv_1.weight, b.conv_1.bias, padding=1)
        y = y + F.linear(F.silu(d), b.condition.weight, b.condition.bias)[..., None, None]
        y = F.conv2d(F.silu(b.norm_2(y)), b.conv_2.weight, b.conv_2.bias, padding=1)
        return b.straight(h) + y

    def attended(a, h):
        q, k, v = (
            layer(a.norm(h).flatten(2).transpose(1, 2)).unflatten(2, (2, -1)).transpose(1, 2)
            for layer in (a.attention.W_q, a.attention.W_k, a.attention.W_v)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return h + a.attention.W_o(y).transpose(1, 2).unflatten(2, h.shape[2:])

    def enlarged(conv, h):
        return conv(h.repeat_interleave(2, 2).repeat_interleave(2, 3))

    d = model.label.weight[labels] + model.time(diffusion.time_embedding(t, 8).double())
    fine = block(model.down[0], model.first(x))
    middle = block(model.down[1], model.shrink[0](fine))
    coarse = block(model.down[2], model.shrink[1](middle))
    h = attended(model.attention, block(model.middle, coarse))
    h = block(model.up[2], torch.cat((h, coarse), 1))
    h = block(model.up[1], torch.cat((enlarged(model.enlarge[1], h), middle), 1))
    h = block(model.up[0], torch.cat((enlarged(model.enlarge[0], h), fine), 1))
    return model.last(F.silu(model.norm(h)))


def test_the_unet_in_values_and_gradients(unet):
    x = draw(3, 1, 8, 20).requires_grad_()
    t, labels = torch.tensor([1, 30, 1000]), torch.tensor([5, 0, 3])
    inputs = [x, *unet.parameters()]
    results = []
    for forward in (unet, lambda *a: by_hand(unet, *a)):
        y = forward(x, t, labels)
        results.append([y, *torch.autograd.grad(y, inputs, draw(*y.shape, seed=1))])
    assert_equal(results[0], results[1], 1e-9)
    assert all(gradient.abs().sum() > 0 for gradient in results[0])  # every weight is used


@pytest.mark.parametrize("size", [(28, 28), (32, 20), (4, 12)])
def test_the_unet_takes_images_of_many_sizes(unet, size):
    x, t = draw(2, 1, *size), torch.tensor([3, 4])
    y = unet(x, t)
    assert y.shape == x.shape
    assert_equal([y[1:]], [unet(x[1:], t[1:])], 1e-10)  # images do not mix


def test_without_skips_the_fine_maps_are_lost():
    """Noise on the finest scale reaches the output by a skip connection alone."""
    torch.manual_seed(0)
    with_skips = awake(diffusion.UNet(2, 3, (8, 16), 0, 0, timed=False))
    without = awake(diffusion.UNet(2, 3, (8, 16), 0, 0, timed=False, skips=False))
    x = draw(2, 2, 4, 6)
    assert with_skips(x).shape == without(x).shape == (2, 3, 4, 6)
    n_with, n_without = (sum(p.numel() for p in m.parameters()) for m in (with_skips, without))
    assert n_with > n_without
    for model, same in ((with_skips, False), (without, True)):
        for layer in model.shrink:  # nothing passes below the first level
            torch.nn.init.zeros_(layer.weight)
        assert torch.allclose(model(x), model(draw(2, 2, 4, 6, seed=1))) == same


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 1, 27, 28), torch.ones(2)), r"multiples of 4, not \(27, 28\)"),
        ((torch.ones(2, 1, 28, 30), torch.ones(2)), r"multiples of 4, not \(28, 30\)"),
        ((torch.ones(2, 3, 28, 28), torch.ones(2)), r"\(B, 1, H, W\) .* not \(2, 3, 28, 28\)"),
        ((torch.ones(28, 28), torch.ones(2)), r"\(B, 1, H, W\) expected, not \(28, 28\)"),
        ((torch.ones(2, 1, 28, 28),), "a time for each image expected, not None"),
    ],
)
def test_the_unet_refuses_what_does_not_fit(unet, arguments, message):
    with pytest.raises(ValueError, match=message):
        unet(*arguments)


def test_the_unet_refuses_sizes_that_are_none():
    with pytest.raises(ValueError, match=r"multiples of 8, .* not \(8, 12\)"):
        diffusion.UNet(channels=(8, 12))
    with pytest.raises(ValueError, match=r"not \(\)"):
        diffusion.UNet(channels=())
    with pytest.raises(ValueError, match=r"n_classes must be .*, not -1"):
        diffusion.UNet(n_classes=-1)
    untimed = diffusion.UNet(channels=(8,), timed=False)
    with pytest.raises(ValueError, match="no times expected"):
        untimed(torch.ones(1, 1, 3, 5), torch.ones(1))


# ---- IoU and Dice ----


def test_iou_and_dice_are_scikit_learns():
    predicted, target = draw(6, 3, 5) > 0.3, draw(6, 3, 5, seed=1) > 0
    pairs = [(a.flatten(), b.flatten()) for a, b in zip(predicted, target, strict=True)]
    ious = torch.tensor([jaccard_score(b, a) for a, b in pairs])
    dices = torch.tensor([f1_score(b, a) for a, b in pairs])
    assert_equal([diffusion.iou(predicted, target).double()], [ious.double()], 1e-6)
    assert_equal([diffusion.dice(predicted, target).double()], [dices.double()], 1e-6)
    empty = torch.zeros(2, 4, dtype=torch.bool)
    full = torch.tensor([[True] * 4, [False] * 4])
    assert diffusion.iou(empty, full).tolist() == [0, 1]
    assert diffusion.dice(empty, full).tolist() == [0, 1]


@pytest.mark.parametrize("score", [diffusion.iou, diffusion.dice])
def test_masks_must_be_masks_of_one_shape(score):
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"one shape expected, not \(2, 3\) and \(2, 1\)"):
        score(mask, mask[:, :1])
    with pytest.raises(ValueError, match=r"masks must be bool, not torch\.float32"):
        score(mask.float(), mask)


def test_the_dice_loss_is_that_of_soft_masks_and_its_gradient_is_right():
    logits = draw(3, 2, 4).requires_grad_()
    target = draw(3, 2, 4, seed=1) > 0
    expected = 0
    for z, y in zip(logits, target.double(), strict=True):
        p = 1 / (1 + (-z).exp())
        expected = expected + (1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)) / 3
    found = diffusion.dice_loss(logits, target)
    assert found.item() == pytest.approx(expected.item())
    assert torch.autograd.gradcheck(lambda z: diffusion.dice_loss(z, target), [logits])
    sure = torch.where(target, 50.0, -50.0).double()  # masks that are right: Dice is 1
    assert diffusion.dice_loss(sure, target, smooth=0).item() == pytest.approx(0)
    with pytest.raises(ValueError, match=r"not \(3, 2, 4\) and \(3, 2, 1\)"):
        diffusion.dice_loss(logits, target[..., :1])
    wrong = 1 - diffusion.dice(~target, target).mean()
    assert diffusion.dice_loss(-sure, target, smooth=0).item() == pytest.approx(wrong.item())


# ---- scenes ----


def test_scenes_hold_the_digit_that_is_asked_for_where_the_target_says(monkeypatch):
    """Digits of class k are squares of 4 + k pixels, so that a class can be read from its size."""
    images = torch.zeros(10, 28, 28)
    for label in range(10):
        images[label, 10 : 14 + label, 8 : 12 + label] = 0.8
    digits = diffusion.Split(images, torch.arange(10))
    monkeypatch.setattr(diffusion, "SCENE_NOISE", 0.0)
    scenes = diffusion.draw_scenes(digits, 300, torch.Generator().manual_seed(0))
    assert scenes.images.shape == scenes.targets.shape == (300, 1, 40, 64)
    assert scenes.images.min() >= 0
    assert scenes.images.max() <= 1
    sizes = scenes.targets.flatten(1).sum(1)
    assert torch.equal(sizes, (4 + scenes.labels) ** 2)
    assert (scenes.images[scenes.targets] >= 0.8 - 1e-6).all()  # seen, whatever lies over it
    assert set(scenes.labels.tolist()) == set(range(10))
    columns = scenes.targets[:, 0].any(1).float().argmax(1)  # where it begins
    assert columns.min() == 8
    assert columns.max() == 8 + 36
    assert 0.4 < (columns < 22).float().mean() < 0.6  # asked for on both sides alike


def test_strokes_are_those_of_a_plain_loop():
    generator = torch.Generator().manual_seed(3)
    found = diffusion.draw_strokes(2, "cpu", generator)
    generator = torch.Generator().manual_seed(3)
    start = torch.rand(2, 6, 2, generator=generator) * torch.tensor([40, 64])
    angle = torch.rand(2, 6, generator=generator) * 2 * math.pi
    length = 6 + 14 * torch.rand(2, 6, generator=generator)
    along = torch.linspace(0, 1, 400)[:, None]
    for image, row, column in [
        (0, 3, 50),
        (1, 20, 20),
        (0, 0, 0),
        *((1, r, 33) for r in range(40)),
    ]:
        nearest = math.inf
        for stroke in range(6):
            direction = torch.stack([angle[image, stroke].sin(), angle[image, stroke].cos()])
            points = start[image, stroke] + along * length[image, stroke] * direction
            distances = (points - torch.tensor([row, column])).norm(dim=1)
            nearest = min(nearest, distances.min().item())
        expected = min(max(2.0 - nearest, 0), 1)
        assert found[image, row, column].item() == pytest.approx(expected, abs=0.02)


# ---- how good digits are ----


def test_the_frechet_distance_is_scipys_and_the_closed_form():
    a, b = draw(40, 5), 1.5 * draw(60, 5, seed=1) @ draw(5, 5, seed=2) + 0.3
    cov_a, cov_b = (torch.cov(x.T).numpy() for x in (a, b))
    root = linalg.sqrtm(cov_a @ cov_b).real
    expected = (a.mean(0) - b.mean(0)).square().sum().item()
    expected += (cov_a + cov_b - 2 * root).trace()
    assert diffusion.frechet_distance(a, b) == pytest.approx(expected)
    assert diffusion.frechet_distance(b, a) == pytest.approx(expected)
    assert diffusion.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert diffusion.frechet_distance(a, a + 2) == pytest.approx(20)  # moved by 2 in 5 axes
    one, other = a[:, :1], 3 * a[:, :1]  # in one axis: the difference of the deviations, squared
    gap = (other.mean() - one.mean()) ** 2 + (other.std() - one.std()) ** 2
    assert diffusion.frechet_distance(one, other) == pytest.approx(gap.item())
    with pytest.raises(ValueError, match=r"expected, not \(40, 5\) and \(60, 4\)"):
        diffusion.frechet_distance(a, b[:, :4])


def test_diversity_is_the_mean_over_pairs_of_a_class():
    digits, labels = draw(7, 2, 3), torch.tensor([0, 1, 0, 1, 1, 0, 0])
    means = []
    for label in (0, 1):
        of_class = [digits[i] for i in range(7) if labels[i] == label]
        pairs = list(itertools.combinations(of_class, 2))
        means.append(sum((a - b).norm().item() for a, b in pairs) / len(pairs))
    assert diffusion.diversity(digits, labels) == pytest.approx(sum(means) / 2)
    with pytest.raises(ValueError, match="two digits of class 1 expected, not 1"):
        diffusion.diversity(digits[:3], labels[:3])


def test_features_are_what_the_cnns_last_layer_reads():
    torch.manual_seed(0)
    cnn = convolution.CNN().eval()
    digits = torch.rand(6, 28, 28)
    features, classes = diffusion.features_of(cnn, digits)
    with torch.no_grad():
        logits = cnn(stage1_mlp.normalised(255 * digits))
        assert_equal([cnn.linear(features)], [logits], 1e-5)
    assert torch.equal(classes, logits.argmax(1))
    asked = torch.full((6,), classes[0].item())
    few = diffusion.measures(diffusion.Split(digits, asked), cnn, features)
    assert few["read_as_asked"] == pytest.approx((classes == classes[0]).double().mean().item())
    assert math.isnan(few["frechet"])  # of so few it would mean nothing


def test_digits_are_drawn_the_same_in_parts_or_at_once(unet):
    torch.manual_seed(0)
    model = awake(diffusion.UNet(channels=(8, 16), n_heads=2)).float()
    labels = torch.tensor([3, 0, 9])
    setting = diffusion.Setting("DDIM", 3, 2.0)
    whole = diffusion.draw_digits(model, labels, setting)
    parts = diffusion.draw_digits(model, labels, setting, at_once=2)
    assert whole.shape == (3, 28, 28)
    assert whole.min() >= 0
    assert whole.max() <= 1
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    other = diffusion.draw_digits(model, labels, setting, seed=1)
    assert not torch.allclose(other, whole, atol=1e-2)


# ---- the program ----


def test_the_moving_average_of_weights():
    average, model = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    expected = [
        0.9 * a + 0.1 * b for a, b in zip(average.parameters(), model.parameters(), strict=True)
    ]
    diffusion.update_average(average, model, 0.9)
    assert_equal(list(average.parameters()), expected, 1e-6)


@pytest.fixture(scope="module")
def few_images():
    """Every 50th image of each split, so that every class is there, in place of all of MNIST."""
    data = stage1_mlp.load_data(ROOT / "data")
    few = stage1_mlp.Data(*(stage1_mlp.Split(*(a[::50] for a in split)) for split in data))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage1_mlp, "load_data", lambda data_dir: few)
        yield


@pytest.fixture(scope="module")
def smoke(few_images, tmp_path_factory):
    """A folder in which a tiny configuration was trained and measured."""
    out = tmp_path_factory.mktemp("diffusion")
    torch.manual_seed(0)
    torch.save(convolution.CNN().state_dict(), out / "cnn.pt")
    options = {"smoke": True, "device": "cpu", "out": out, "checkpoints": out / "checkpoints"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusion, "N_FRECHET", 20)  # so many have a Fréchet distance
        patch.setattr(diffusion, "N_STEPS", 10)  # in the picture of the way
        assert diffusion.main(train=True, evaluate=True, cnn=out / "cnn.pt", **options) == 0
    return out


def test_training_and_measuring_save_rows_weights_and_pictures(smoke):
    runs = pd.read_csv(smoke / "diffusion_runs.csv")
    assert runs["value"].tolist() == ["U-Net", *diffusion.SEGMENTERS]
    assert runs.loc[runs["experiment"] == "segmentation", "test_iou"].between(0, 1).all()
    history = pd.read_csv(smoke / "diffusion_history.csv")
    assert history["step"].tolist() == [2, 4] * 4
    samples = pd.read_csv(smoke / "diffusion_samples.csv")
    assert samples["experiment"].tolist() == ["real", "drawn", "drawn", "drawn"]
    assert (samples["n"] == 20).all()
    assert (samples["frechet"] > 0).all()
    weights = ["digits_unet", "segmentation_unet", "segmentation_one_level"]
    weights.append("segmentation_without_skip_connections")
    pictures = ["digits", "history", "samples", "segmented", "way"]
    names = [f"diffusion_{name}.pt" for name in weights]
    names += [f"diffusion_{name}.png" for name in pictures]
    for name in [*names, "diffusion_samples.md", "diffusion_segmentation.md"]:
        assert (smoke / name).stat().st_size > 0


def test_the_table_of_segmenters_is_over_seeds():
    runs = pd.DataFrame({"value": ["U-Net"] * 3, "parameters": [1234] * 3})
    table = diffusion.segmentation_table(
        runs.assign(test_iou=[0.80, 0.82, 0.84], test_dice=[0.88, 0.9, 0.92])
    )
    half = 4.3027 * 2 / math.sqrt(3)  # the t value of 2 degrees of freedom
    for cell in ("82.00 ± 2.00", f"{82 - half:.2f} … {82 + half:.2f}", "90.00 ± 2.00", "1,234"):
        assert cell in table


def test_what_is_trained_is_not_trained_again(smoke, capsys):
    assert diffusion.missing_runs(smoke, smoke=True) == []
    (smoke / "diffusion_segmentation_one_level.pt").unlink()
    (run,) = diffusion.missing_runs(smoke, smoke=True)
    assert (run.value, run.recipe.seed) == ("one level", 0)
    before = pd.read_csv(smoke / "diffusion_runs.csv")
    diffusion.train_missing(smoke, ROOT / "data", 1, 1, "cpu", smoke / "checkpoints", True)
    after = pd.read_csv(smoke / "diffusion_runs.csv")  # from the checkpoint: the same numbers
    pd.testing.assert_frame_equal(before, after)
    assert "3 of 4 runs found, 1 to do" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["digits", "scenes"])
def test_a_stopped_run_ends_as_if_it_had_not_been_stopped(task, tmp_path, monkeypatch):
    images = torch.rand(60, 28, 28, generator=torch.Generator().manual_seed(0))
    split = diffusion.Split(images, torch.arange(60) % 10)
    data = diffusion.Data(split, split, split)
    recipe = diffusion.Recipe(task, (8,), batch_size=3, n_steps=6, n_rounds=3, n_judged=4)
    run = diffusion.Run(task, "tiny", recipe)
    whole, rows = diffusion.train(run, data, tmp_path / "whole.pt")
    save = training.save_checkpoint

    def save_and_stop(path, recipe, done, history, **parts):
        save(path, recipe, done, history, **parts)
        if done == 2:  # rounds
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_checkpoint", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        diffusion.train(run, data, tmp_path / "stopped.pt")
    monkeypatch.undo()
    again, rows_again = diffusion.train(run, data, tmp_path / "stopped.pt")
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [row["train_loss"] for row in rows] == [row["train_loss"] for row in rows_again]
    for other in (replace(recipe, lr=0.5), replace(recipe, seed=1)):  # begins anew
        assert training.load_checkpoint(tmp_path / "whole.pt", other, "cpu") == (0, [])


def test_what_is_missing_is_said_in_a_line(tmp_path, capsys):
    assert diffusion.main(out=tmp_path / "new", device="cpu") == 0
    assert "python -m interview.diffusion --train" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"is missing, .*cnn\.pt: python -m interview\.convolution"
    ):
        diffusion.load_cnn(tmp_path / "cnn.pt", "cpu")
    assert diffusion.main(smoke=True, device="cpu") == 1
    assert "name another folder by --out" in capsys.readouterr().err
    assert diffusion.main(workers=0, out=tmp_path, device="cpu") == 1
    assert "workers must be a whole number of at least 1, not 0" in capsys.readouterr().err
    assert diffusion.main(fresh=True, out=tmp_path, device="cpu") == 1
    assert "--fresh measures all again: it needs --evaluate" in capsys.readouterr().err


def test_digits_are_read_by_the_folders_own_cnn_or_the_committed_one(tmp_path):
    committed = convolution.reader_of(tmp_path)
    assert committed.parent == diffusion.FIGURES
    assert committed.exists()
    own = tmp_path / committed.name
    own.touch()
    assert convolution.reader_of(tmp_path) == own


def test_the_table_counts_milliseconds_of_digits_that_were_drawn():
    row = {"value": "test images", "experiment": "real", "seconds": 1.0, "n": 500}
    row |= {"read_as_asked": 0.99, "frechet": 0.1, "diversity": 8.0}
    rows = pd.DataFrame([row, row | {"value": "DDIM", "experiment": "drawn", "seconds": 0.21}])
    real, drawn = diffusion.samples_table(rows).splitlines()[-2:]
    assert "0.42" in drawn
    assert " – " in real
