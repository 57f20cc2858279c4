"""Stage 1 against torch's own modules, and its command line as a user meets it."""

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from torch import nn
from torch.nn import functional as F
from torchvision.datasets import MNIST

import metrics
import stage1_mlp as stage

ROOT = Path(stage.__file__).parent
SMALL = stage.Config(hidden=(9, 7), n_train=300, batch_size=32, steps=12, n_logs=3)


@pytest.fixture(scope="session")
def data():
    return stage.load_data(stage.Config())


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """A smoke run of everything, as a user starts it: from another folder, without a display."""
    folder = tmp_path_factory.mktemp("smoke")
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MPLBACKEND")}
    command = [sys.executable, str(ROOT / "stage1_mlp.py"), "--smoke", "--figures-dir", str(folder / "out")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "out" / "stage1", done.stdout


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


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


def test_data_is_mnist_split_by_class(data):
    assert [len(split.labels) for split in data] == [55_000, 5_000, 10_000]
    whole = MNIST(str(ROOT / "data"), train=True)
    assert torch.equal(data.train.labels.bincount() + data.val.labels.bincount(), whole.targets.bincount())
    share = data.val.labels.bincount() / whole.targets.bincount()
    torch.testing.assert_close(share, torch.full((10,), 1 / 12), rtol=0, atol=2e-4)
    # together, the two splits are the 60,000 images, each once
    ours = torch.cat([data.train.images, data.val.images]).mul(0.3081).add(0.1307).mul(255).round().byte()
    mixed = torch.randint(1, 1 << 40, (784,), generator=torch.Generator().manual_seed(0))
    ours, theirs = ((pixels.long() * mixed).sum(1) for pixels in (ours, whole.data.flatten(1)))
    assert torch.equal(ours.sort().values, theirs.sort().values)
    # and image and label still belong together
    labels = dict(zip(theirs.tolist(), whole.targets.tolist(), strict=True))
    assert [labels[key] for key in ours[:55_000].tolist()] == data.train.labels.tolist()


def test_the_split_does_not_depend_on_the_run(data):
    torch.manual_seed(123)
    again = stage.load_data(stage.Config(seed=9, batch_size=3))
    assert all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in zip(data, again, strict=True)
    )


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


def test_one_batch_is_learned_by_heart(data):
    config = replace(SMALL, hidden=(128, 256), n_train=64, batch_size=64, steps=150, label_smoothing=0.0)
    model, history = stage.train(config, data)
    assert history[-1]["train_loss"] < 1e-3
    assert stage.evaluate(model, stage.Split(*(part[:64] for part in data.train)))["accuracy"] == 1


@pytest.mark.parametrize("optimizer", stage.CHOICES["optimizer"])
def test_every_optimizer_learns(data, optimizer):
    change = next(c for c in stage.SWEEPS["optimizer"] if c["optimizer"] == optimizer)
    _, history = stage.train(replace(SMALL, hidden=(32,), n_train=2000, steps=100, **change), data)
    assert history[-1]["val_accuracy"] > 0.7


def test_the_same_seed_gives_the_same_history(data):
    config = replace(SMALL, dropout=0.2, deform=1.0, clip=1.0)
    histories = [stage.train(replace(config, seed=seed), data)[1] for seed in (3, 3, 4)]
    first, second, other = ([{k: v for k, v in row.items() if k != "seconds"} for row in h] for h in histories)
    assert first == second != other
    assert list(histories[0][0]) == [
        "step",
        "epoch",
        "train_loss",
        "val_loss",
        "val_accuracy",
        "val_macro_f1",
        "grad_norm",
        "seconds",
    ]
    assert [row["step"] for row in first] == [4, 8, 12]
    assert [row["epoch"] for row in first] == [0.4, 0.8, 1.2]  # 300 images are 10 batches of 32 at most


def test_clipping_bounds_the_update(data):
    config = replace(SMALL, optimizer="sgd", lr=1.0, weight_decay=0.0, warmup=0.0, steps=1, n_logs=1, clip=0.01)
    before = nn.utils.parameters_to_vector(stage.build(config, torch.device("cpu")).parameters())
    model, history = stage.train(config, data)
    moved = (nn.utils.parameters_to_vector(model.parameters()) - before).norm().item()
    assert history[0]["grad_norm"] > 0.1
    assert moved == pytest.approx(0.01 * stage.one_cycle(config, 0), rel=1e-3)


def test_nothing_waits_for_the_device_between_log_rows(data, monkeypatch):
    reads = []
    for name in ("item", "__bool__", "__float__", "tolist", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda t, *a, original=original, **k: (reads.append(1), original(t, *a, **k))[1]
        )
    counted = []
    for steps in (10, 50):
        reads.clear()
        stage.train(replace(SMALL, steps=steps, n_logs=1, deform=1.0), data)
        counted.append(len(reads))
    assert counted[0] == counted[1] > 0


def test_a_loss_that_is_not_finite_ends_the_run_and_is_named(data):
    config = replace(SMALL, optimizer="sgd", lr=1e30, warmup=0.0, steps=100, n_logs=10)
    _, history = stage.train(config, data)
    assert metrics.status(history) == "diverged"
    assert len(history) < 10
    tables = stage.execute(stage.Run("lr", "1e30", config), data, bar=None)
    assert tables["runs"][0]["status"] == "diverged"


def test_evaluate_equals_scikit_learn_and_leaves_the_model_as_it_was(data):
    model = stage.build(stage.Config(dropout=0.5), torch.device("cpu"))
    split = stage.Split(*(part[:700] for part in data.val))
    result, again = stage.evaluate(model, split), stage.evaluate(model, split)
    assert model.training
    assert torch.equal(result.pop("confusion"), again.pop("confusion"))
    assert result == again  # dropout is off
    logits = model.eval()(split.images)
    p, r, f, _ = sklearn_metrics.precision_recall_fscore_support(
        split.labels, logits.argmax(1), labels=range(10), average="macro", zero_division=0
    )
    expected = {"accuracy": (logits.argmax(1) == split.labels).double().mean().item(), "macro_precision": p}
    expected |= {"macro_recall": r, "macro_f1": f, "loss": F.cross_entropy(logits, split.labels).item()}
    assert result == pytest.approx(expected, rel=1e-6)


# ---- the command line ----


def test_a_sweeps_values_are_called_by_what_tells_them_apart():
    labels = {name: [metrics.label(c, changes) for c in changes] for name, changes in stage.SWEEPS.items()}
    assert labels["depth"] == ["0", "1×128", "2×128", "3×128", "4×128", "5×128"]
    assert labels["lr"][:2] == ["0.0001", "0.0003"]
    assert labels["optimizer"][0] == "sgd, lr 0.3"
    assert labels["regularisation"][:3] == ["nothing", "weight decay 0.3", "dropout 0.2"]
    assert all(len(set(names)) == len(names) for names in labels.values())


def test_smoke_makes_every_promised_file(smoke):
    folder, printed = smoke
    tables = ["runs", "history", "test_metrics", "confusion", "faults", "gradients", "benchmark"]
    pictures = [f"{kind}_{name}" for kind in ("curves", "confusion") for name in ("baseline", "deformed")]
    pictures += [f"sweep_{name}" for name in stage.SWEEPS] + ["faults", "fault_gradients", "benchmark"]
    promised = {f"{name}.csv" for name in tables} | {f"{name}.png" for name in pictures}
    assert {path.name for path in folder.iterdir()} == promised | {"summary.md", "environment.json"}
    for name in pictures:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"wrote {folder / name}.png" in printed
    summary = (folder / "summary.md").read_text(encoding="utf-8")
    assert all(f"({name}.png)" in summary for name in pictures)
    runs = read(folder / "runs.csv")
    assert {row["experiment"] for row in runs} == {"baseline", "deformed", "faults", *stage.SWEEPS}
    assert {row["n_train"] for row in runs if row["experiment"] == "baseline"} == {str(stage.SMOKE["n_train"])}
    jobs = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    assert jobs["baseline"]["command"].startswith("python stage1_mlp.py --smoke")


def test_saved_test_scores_follow_from_the_saved_confusion(smoke):
    folder, _ = smoke
    cells = read(folder / "confusion.csv")
    for row in read(folder / "test_metrics.csv"):
        mine = [c for c in cells if (c["experiment"], c["seed"]) == (row["experiment"], row["seed"])]
        target = np.repeat([int(c["true"]) for c in mine], [int(c["count"]) for c in mine])
        predicted = np.repeat([int(c["predicted"]) for c in mine], [int(c["count"]) for c in mine])
        assert len(target) == 10_000
        assert float(row["accuracy"]) == pytest.approx((target == predicted).mean(), rel=1e-5)
        macro_f1 = sklearn_metrics.f1_score(target, predicted, average="macro")
        assert float(row["macro_f1"]) == pytest.approx(macro_f1, rel=1e-5)


def test_plot_draws_the_same_summary_again(smoke, tmp_path):
    shutil.copytree(smoke[0], tmp_path / "stage1")
    (tmp_path / "stage1" / "summary.md").unlink()
    assert stage.main(["plot", "--figures-dir", str(tmp_path)]) == 0
    assert (tmp_path / "stage1" / "summary.md").read_bytes() == (smoke[0] / "summary.md").read_bytes()


def test_resume_gives_the_rows_of_an_uninterrupted_run(tmp_path, monkeypatch, capsys):
    command = ["sweep", "--smoke", "--only", "depth", "init", "--seeds", "2", "--quiet", "--figures-dir"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert stage.main([*command, str(whole)]) == 0

    calls, train = [], stage.train

    def interrupted(config, data, bar=None):
        calls.append(config)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train(config, data, bar)

    monkeypatch.setattr(stage, "train", interrupted)
    assert stage.main([*command, str(broken)]) == 130
    assert "--resume" in capsys.readouterr().err
    assert not (broken / "stage1" / "runs.csv").exists()
    assert stage.main([*command, str(broken), "--resume"]) == 0
    assert len(calls) == 4 + 5  # the three runs that had ended were not repeated
    for table in ("runs", "history"):
        rows = [
            [{k: v for k, v in r.items() if k != "seconds"} for r in read(f / "stage1" / f"{table}.csv")]
            for f in (whole, broken)
        ]
        assert rows[0] == rows[1]
        assert len(rows[0]) == (8 if table == "runs" else 16)
    assert not list((broken / "stage1").glob("*unfinished*"))


@pytest.mark.parametrize(
    ("flags", "quoted"),
    [
        (["trian"], "trian"),
        (["--bogus"], "--bogus"),
        (["--epochs", "0"], "epochs must be at least 1 and less than inf, not 0"),
        (["--epochs", "two"], "two"),
        (["--lr", "-1"], "not -1.0"),
        (["--lr", "nan"], "not nan"),
        (["--hidden", "128", "0"], "(128, 0)"),
        (["--dropout", "1"], "1.0"),
        (["--n-train", "55001"], "55001"),
        (["--activation", "swish"], "swish"),
        (["--optimizer", "lion"], "lion"),
        (["--seeds", "0"], "--seeds must be at least 1, not 0"),
        (["--only", "colour"], "colour"),
        (["train", "--only", "depth"], "depth"),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_a_bad_flag_is_one_line_and_exit_2(flags, quoted, capsys):
    with pytest.raises(SystemExit) as stopped:
        stage.main(flags)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert quoted in error
    assert error.count("\n") == 1


def test_the_users_epochs_win_over_a_jobs_steps():
    args, given = metrics.parse_command_line(
        ["sweep", "--epochs", "2"], stage.__file__, "", stage.JOBS, stage.SWEEPS, stage.Config, stage.CHOICES
    )
    runs = stage.plan("sweep", {}, given, ["depth"], None)
    assert {run.config.n_steps for run in runs} == {2 * math.ceil(55_000 / 128)}
    assert args.only == list(stage.SWEEPS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as stopped:
        stage.main(["--device", "cuda"])
    assert stopped.value.code == 2
    assert "cuda" in capsys.readouterr().err


def run_on(data_dir, figures, capsys):
    code = stage.main(["train", "--smoke", "--quiet", "--data-dir", str(data_dir), "--figures-dir", str(figures)])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert not figures.exists()  # nothing was begun
    return code, error


def test_a_damaged_archive_is_named(tmp_path, capsys):
    shutil.copytree(ROOT / "data" / "MNIST", tmp_path / "MNIST")
    archive = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    damaged = bytearray(archive.read_bytes())
    damaged[5000] ^= 1
    archive.write_bytes(damaged)
    code, error = run_on(tmp_path, tmp_path / "out", capsys)
    assert code == 1
    assert str(archive) in error
    assert "9fb629c4189551a2d022fa330f9573f3" in error


def test_fashion_mnist_in_mnists_place_is_refused(tmp_path, capsys):
    shutil.copytree(ROOT / "data" / "FashionMNIST", tmp_path / "MNIST")
    code, error = run_on(tmp_path, tmp_path / "out", capsys)
    assert code == 1
    assert "not MNIST's" in error


def test_fashion_mnists_unpacked_files_are_refused(tmp_path, capsys):
    from torchvision.datasets import FashionMNIST

    shutil.copytree(ROOT / "data" / "FashionMNIST", tmp_path / "FashionMNIST")
    FashionMNIST(str(tmp_path), download=True)
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    for path in (tmp_path / "FashionMNIST" / "raw").glob("*-ubyte"):
        shutil.copy(path, tmp_path / "MNIST" / "raw")
    code, error = run_on(tmp_path, tmp_path / "out", capsys)
    assert code == 1
    assert "0.286" in error
    assert "0.1307" in error


def test_a_truncated_unpacked_file_is_one_line(tmp_path, capsys):
    shutil.copytree(ROOT / "data" / "MNIST", tmp_path / "MNIST")
    MNIST(str(tmp_path), download=True)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:1000])
    code, error = run_on(tmp_path, tmp_path / "out", capsys)
    assert code == 1
    assert "-ubyte" in error


def test_plot_without_rows_is_one_line(tmp_path, capsys):
    assert stage.main(["plot", "--figures-dir", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err


# ---- the prose ----


def quoted_rows(table, experiment):
    """The committed rows of an experiment and the README; skips if a later run than the README's lies in figures/."""
    folder = ROOT / "figures" / "stage1"
    commit = json.loads((folder / "environment.json").read_text(encoding="utf-8"))[experiment]["commit"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    if f"`{commit}`" not in readme:
        pytest.skip(f"figures/ holds a run of {commit}, which the README does not quote")
    return [row for row in read(folder / f"{table}.csv") if row["experiment"] == experiment], readme


@pytest.mark.parametrize("experiment", ["baseline", "deformed"])
def test_the_scores_in_the_prose_are_those_of_the_committed_rows(experiment):
    rows, readme = quoted_rows("test_metrics", experiment)
    assert len(rows) >= 5
    for column in ("accuracy", "macro_f1"):
        assert metrics.mean(row[column] for row in rows).percent() in readme
    assert metrics.mean(row["accuracy"] for row in rows).percent() in stage.__doc__


@pytest.mark.parametrize("experiment", stage.AXES)
def test_what_the_prose_says_of_a_sweep_is_what_its_rows_show(experiment):
    rows, readme = quoted_rows("runs", experiment)
    assert f": {metrics.finding(rows, stage.AXES[experiment])}" in readme


def test_the_speeds_in_the_prose_are_those_of_the_committed_rows():
    rows, readme = quoted_rows("benchmark", "benchmark")
    ratio = {(row["group"], row["name"]): float(row["ratio"]) for row in rows}
    assert f"{ratio['images/s', 'ours']:.1f} times as fast as through `ToTensor`" in readme
    report = ratio["reports/s, a million predictions", "our matrix and report"]
    assert f"{report:.1f} times as fast as scikit-learn's confusion matrix" in readme
    for batch_size in (128, 512, 2048):
        share = ratio[f"GFLOP/s, batch {batch_size}", "a training step"]
        assert f"{share:.2f} at batch {batch_size}" in readme
