"""runner.py, and what holds for stages 2 and 3 alike: data, training, command line, saved rows,
pictures.
"""

import csv
import importlib
import inspect
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, read
from sklearn import metrics as sklearn_metrics
from torch.nn import functional as F
from torchvision import datasets

import runner

NAMES = ["stage2_rnn", "stage3_attention"]
CPU = torch.device("cpu")
OWN, OTHER = "FashionMNIST", "MNIST"
NAN = float("nan")
SMALL = {  # a Config that trains in a moment
    "stage2_rnn": {
        "n_hidden": 9,
        "cell": "gru",
        "n_layers": 2,
        "bidirectional": True,
        "dropout": 0.2,
    },
    "stage3_attention": {"d_model": 12, "n_heads": 6, "n_kv_heads": 3, "dropout": 0.2},
}
BY_HEART = {
    "stage2_rnn": {"n_hidden": 128, "steps": 400, "flip": False},
    "stage3_attention": {"d_model": 64, "steps": 400, "dropout": 0.0},
}
OWN_TABLES = {
    "stage2_rnn": ["gradients", "reading"],
    "stage3_attention": ["arithmetic", "decode", "demo", "maps", "scale", "sharing"],
}
OWN_PICTURES = {
    "stage2_rnn": ["memory", "state_gradients", "reading_rnn", "reading_gru", "reading_lstm"],
    "stage3_attention": [
        *("demo_weights", "demo_sharing", "sweep_scale", "scale", "decode"),
        *(f"maps_{name}" for name in ("mha", "gqa4", "gqa2", "mqa")),
    ],
}
TWO_SWEEPS = {
    "stage2_rnn": ["hidden", "init"],
    "stage3_attention": ["kv_heads", "position"],
}


@pytest.fixture(scope="module", params=NAMES)
def stage(request):
    return importlib.import_module(request.param)


@pytest.fixture(scope="module")
def data(stage):
    return stage.load_data(stage.Config())


@pytest.fixture
def small(stage):
    return stage.Config(n_train=300, batch_size=32, steps=12, n_logs=3, **SMALL[stage.__name__])


@pytest.fixture(scope="module")
def smoke(stage, tmp_path_factory):
    """A smoke run of everything, as a user starts it: from another folder, without a display."""
    folder = tmp_path_factory.mktemp("smoke")
    environment = {
        name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MPLBACKEND")
    }
    command = [sys.executable, stage.__file__, "--smoke", "--figures-dir", str(folder / "out")]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / "out" / stage.__name__.split("_")[0], done.stdout


def without_seconds(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_public_names_and_signatures_are_the_same(stage):
    signatures = {
        name: str(inspect.signature(getattr(stage, name))) for name in ("evaluate", "plot", "main")
    }
    assert (
        signatures["evaluate"]
        == "(model: torch.nn.modules.module.Module, split: runner.Split) -> dict"
    )
    assert signatures["plot"] == "(figures: pathlib.Path) -> list[pathlib.Path]"
    assert signatures["main"] == "(argv: list[str] | None = None) -> int"
    assert list(inspect.signature(stage.load_data).parameters) == ["config", "device", "data_dir"]
    assert list(inspect.signature(stage.train).parameters) == ["config", "data", "bar"]
    assert list(stage.AXES) == [*stage.SWEEPS, *stage.PROBES]


def test_data_is_the_whole_set_split_by_class(stage, data):
    assert [len(split.labels) for split in data] == [55_000, 5_000, 10_000]
    whole = datasets.FashionMNIST(str(ROOT / "data"), train=True)
    assert torch.equal(
        data.train.labels.bincount() + data.val.labels.bincount(), whole.targets.bincount()
    )
    share = data.val.labels.bincount() / whole.targets.bincount()
    torch.testing.assert_close(share, torch.full((10,), 1 / 12), rtol=0, atol=2e-4)
    # together, the two splits are the 60,000 images, each once
    mean, std = (round(measure(whole.data / 255).item(), 4) for measure in (torch.mean, torch.std))
    ours = (
        torch.cat([data.train.images, data.val.images])
        .flatten(1)
        .mul(std)
        .add(mean)
        .mul(255)
        .round()
        .byte()
    )
    mixed = torch.randint(1, 1 << 40, (784,), generator=torch.Generator().manual_seed(0))
    ours, theirs = ((pixels.long() * mixed).sum(1) for pixels in (ours, whole.data.flatten(1)))
    assert torch.equal(ours.sort().values, theirs.sort().values)
    # and image and label still belong together
    labels = dict(zip(theirs.tolist(), whole.targets.tolist(), strict=True))
    wrong = sum(
        labels[key] != label
        for key, label in zip(ours.tolist(), data.train.labels.tolist(), strict=False)
    )
    # but for images that the set has twice, under two labels
    assert wrong <= 2 * (len(ours) - len(labels))


def test_the_split_does_not_depend_on_the_run(stage, data):
    torch.manual_seed(123)
    again = stage.load_data(stage.Config(seed=9, batch_size=3))
    assert all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        for a, b in zip(data, again, strict=True)
    )


def test_one_batch_is_learned_by_heart(stage, data):
    own = BY_HEART[stage.__name__]
    config = stage.Config(n_train=64, batch_size=64, n_logs=3, lr=3e-3, label_smoothing=0.0, **own)
    model, history = stage.train(config, data)
    assert history[-1]["train_loss"] < 1e-3
    seen = stage.evaluate(model, runner.Split(*(part[:64] for part in data.train)))
    assert seen["accuracy"] == 1
    assert seen["loss"] < 1e-3


def test_the_same_seed_gives_the_same_history(stage, data, small):
    histories = [stage.train(replace(small, clip=1.0, seed=seed), data)[1] for seed in (3, 3, 4)]
    first, second, other = map(without_seconds, histories)
    assert first == second != other
    keys = [
        "step",
        "epoch",
        "train_loss",
        "val_loss",
        "val_accuracy",
        "val_macro_f1",
        "grad_norm",
        "seconds",
    ]
    assert list(histories[0][0]) == keys
    assert [row["step"] for row in first] == [4, 8, 12]
    # 300 images are 10 batches of 32 at most
    assert [row["epoch"] for row in first] == [0.4, 0.8, 1.2]


def test_nothing_waits_for_the_device_between_log_rows(stage, data, small, monkeypatch):
    reads = []
    for name in ("item", "__bool__", "__float__", "tolist", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda t, *a, original=original, **k: (reads.append(1), original(t, *a, **k))[1],
        )
    counted = []
    for steps in (10, 50):
        reads.clear()
        stage.train(replace(small, steps=steps, n_logs=1), data)
        counted.append(len(reads))
    assert counted[0] == counted[1] > 0


def test_a_loss_that_is_not_finite_ends_the_run_and_is_named(stage, data, small):
    config = replace(small, optimizer="sgd", lr=1e30, warmup=0.0, steps=100, n_logs=10, clip=0.0)
    _, history = stage.train(config, data)
    assert runner.status(history) == "diverged"
    assert len(history) < 10
    tables = stage.execute(runner.Run("lr", "1e30", config), data, bar=None)
    assert tables["runs"][0]["status"] == "diverged"


def test_evaluate_equals_scikit_learn_and_leaves_the_model_as_it_was(stage, data, small):
    model = stage.build(small, CPU)
    split = runner.Split(*(part[::3] for part in data.val))
    result, again = stage.evaluate(model, split), stage.evaluate(model, split)
    assert model.training
    assert torch.equal(result.pop("confusion"), again.pop("confusion"))
    assert result == again  # dropout is off
    with torch.no_grad():
        logits = model.eval()(split.images)
    p, r, f, _ = sklearn_metrics.precision_recall_fscore_support(
        split.labels, logits.argmax(1), labels=range(10), average="macro", zero_division=0
    )
    expected = {
        "accuracy": (logits.argmax(1) == split.labels).double().mean().item(),
        "macro_precision": p,
    }
    expected |= {
        "macro_recall": r,
        "macro_f1": f,
        "loss": F.cross_entropy(logits, split.labels).item(),
    }
    assert result == pytest.approx(expected, rel=1e-6)


# ---- the command line ----


def test_smoke_makes_every_promised_file(stage, smoke):
    folder, printed = smoke
    selected = stage.SELECTED.values()
    tables = [
        "runs",
        "history",
        "test_metrics",
        "confusion",
        "faults",
        "benchmark",
        *OWN_TABLES[stage.__name__],
    ]
    pictures = [f"{kind}_{name}" for kind in ("curves", "confusion") for name in selected]
    pictures += [f"sweep_{name}" for name in stage.SWEEPS] + [
        "faults",
        "benchmark",
        *OWN_PICTURES[stage.__name__],
    ]
    promised = {f"{name}.csv" for name in tables} | {f"{name}.png" for name in pictures}
    assert {path.name for path in folder.iterdir()} == promised | {"summary.md", "environment.json"}
    for name in pictures:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"wrote {folder / name}.png" in printed
    summary = (folder / "summary.md").read_text(encoding="utf-8")
    assert all(f"({name}.png)" in summary for name in pictures)
    runs = read(folder / "runs.csv")
    assert {row["experiment"] for row in runs} == {*selected, "faults", *stage.AXES}
    assert {row["n_train"] for row in runs if row["experiment"] in selected} == {
        str(stage.SMOKE["n_train"])
    }
    jobs = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    first = next(iter(selected))
    assert jobs[first]["command"].startswith(f"python {stage.__name__}.py --smoke")


def test_saved_test_scores_follow_from_the_saved_confusion(smoke):
    folder, _ = smoke
    cells = read(folder / "confusion.csv")
    for row in read(folder / "test_metrics.csv"):
        mine = [
            c for c in cells if (c["experiment"], c["seed"]) == (row["experiment"], row["seed"])
        ]
        target = np.repeat([int(c["true"]) for c in mine], [int(c["count"]) for c in mine])
        predicted = np.repeat([int(c["predicted"]) for c in mine], [int(c["count"]) for c in mine])
        assert len(target) == 10_000
        assert float(row["accuracy"]) == pytest.approx((target == predicted).mean(), rel=1e-5)
        macro_f1 = sklearn_metrics.f1_score(target, predicted, average="macro")
        assert float(row["macro_f1"]) == pytest.approx(macro_f1, rel=1e-5)


def test_plot_draws_the_same_summary_again(stage, smoke, tmp_path):
    folder = tmp_path / smoke[0].name
    shutil.copytree(smoke[0], folder)
    (folder / "summary.md").unlink()
    assert stage.main(["plot", "--figures-dir", str(tmp_path)]) == 0
    assert (folder / "summary.md").read_bytes() == (smoke[0] / "summary.md").read_bytes()


def test_resume_gives_the_rows_of_an_uninterrupted_run(stage, tmp_path, monkeypatch, capsys):
    sweeps, name = TWO_SWEEPS[stage.__name__], stage.__name__.split("_")[0]
    command = ["sweep", "--smoke", "--only", *sweeps, "--seeds", "2", "--quiet", "--figures-dir"]
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
    assert not (broken / name / "runs.csv").exists()
    assert stage.main([*command, str(broken), "--resume"]) == 0
    assert len(calls) == 4 + 5  # the three runs that had ended were not repeated
    for table in ("runs", "history"):
        rows = [without_seconds(read(folder / name / f"{table}.csv")) for folder in (whole, broken)]
        assert rows[0] == rows[1]
        assert len(rows[0]) == (8 if table == "runs" else 16)
    assert not list((broken / name).glob("*unfinished*"))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A sweep of stage 2 in one process with half of the threads: the command without its folder,
    and the rows.
    """
    command = [
        "stage2_rnn.py",
        "sweep",
        "--smoke",
        "--only",
        "init",
        "--seeds",
        "3",
        "--figures-dir",
    ]
    folder = tmp_path_factory.mktemp("one")
    done = launch([sys.executable, *command, str(folder)])
    assert done.returncode == 0, done.stderr
    return command, rows_without_seconds(folder)


def launch(command, **environment):
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // 2))} | environment
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def rows_without_seconds(folder):
    return [
        without_seconds(read(folder / "stage2" / f"{table}.csv")) for table in ("runs", "history")
    ]


TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def test_two_processes_under_torchrun_give_the_rows_of_one(one_process, tmp_path):
    command, rows = one_process
    done = launch([*TWO, *command, str(tmp_path)])
    assert done.returncode == 0, done.stderr
    assert rows_without_seconds(tmp_path) == rows
    assert not list((tmp_path / "stage2").glob("*unfinished*"))
    jobs = json.loads((tmp_path / "stage2" / "environment.json").read_text(encoding="utf-8"))
    assert jobs["init"]["command"].startswith("torchrun --nproc-per-node=2 stage2_rnn.py sweep")
    assert done.stdout.count("# RNN on Fashion-MNIST") == 1  # one of the two speaks


def test_a_killed_process_loses_only_its_run_and_resume_completes_it(one_process, tmp_path):
    command, rows = one_process
    # in process 1, the third run kills the process, as a full memory would
    killer = tmp_path / "sitecustomize.py"
    killer.write_text(
        "import os, signal\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import json\n"
        "    dumps, seen = json.dumps, []\n"
        "    def count(value, **options):\n"
        "        if isinstance(value, dict) and 'tables' in value:\n"
        "            seen.append(1)\n"
        "            if len(seen) == 3:\n"
        "                os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return dumps(value, **options)\n"
        "    json.dumps = count\n"
    )
    out = tmp_path / "out"
    done = launch([*TWO, *command, str(out)], PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert not (out / "stage2" / "runs.csv").exists()
    journals = {p.name: len(p.read_text().splitlines()) for p in (out / "stage2").glob("*.jsonl")}
    assert journals["sweep.1.unfinished.jsonl"] == 2
    assert journals.get("sweep.unfinished.jsonl", 0) <= 3
    done = launch([sys.executable, *command, str(out), "--resume"])
    assert done.returncode == 0, done.stderr
    assert rows_without_seconds(out) == rows
    assert not list((out / "stage2").glob("*unfinished*"))


BAD_FLAGS = [
    (["trian"], "trian"),
    (["--bogus"], "--bogus"),
    (["--epochs", "0"], "epochs must be at least 1 and less than inf, not 0"),
    (["--epochs", "two"], "two"),
    (["--lr", "-1"], "not -1.0"),
    (["--lr", "nan"], "not nan"),
    (["--n-train", "55001"], "55001"),
    (["--optimizer", "lion"], "lion"),
    (["--seeds", "0"], "--seeds must be at least 1, not 0"),
    (["--only", "colour"], "colour"),
    (["train", "--only", "init"], "init"),
    (["--device", "tpu"], "tpu"),
]
OWN_BAD_FLAGS = {
    "stage2_rnn": [
        (["--n-hidden", "0"], "n_hidden must be at least 1 and less than inf, not 0"),
        (["--cell", "elman"], "elman"),
        (["--reading", "spiral"], "spiral"),
        (["--padding", "-1"], "not -1"),
    ],
    "stage3_attention": [
        (["--n-heads", "0"], "n_heads must be at least 1 and less than inf, not 0"),
        (["--n-heads", "6", "--n-kv-heads", "4"], "n_heads=6"),
        (["--d-model", "33"], "d_model=33"),
        (["--position", "spiral"], "spiral"),
    ],
}


def test_a_bad_flag_is_one_line_and_exit_2(stage, capsys):
    for flags, quoted in BAD_FLAGS + OWN_BAD_FLAGS[stage.__name__]:
        with pytest.raises(SystemExit) as stopped:
            stage.main(flags)
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert quoted in error
        assert error.count("\n") == 1


def test_flags_that_do_not_fit_each_other_are_one_line_and_those_that_do_are_taken(capsys):
    stage = importlib.import_module("stage3_attention")
    for command in (
        ["benchmark", "--n-heads", "32"],
        ["plot", "--n-heads", "7"],
        ["mqa", "--n-heads", "7"],
    ):
        with pytest.raises(SystemExit) as stopped:
            stage.main([*command, "--smoke"])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert f"n_heads={command[2]}" in error
        assert error.count("\n") == 1
    # 12 is no multiple of train's 8
    _, given = runner.parse_command_line(stage, [], ["gqa4", "--n-heads", "12"])
    (run,) = runner.plan(stage, "gqa4", {}, given, [], 1)
    assert (run.config.n_heads, run.config.n_kv_heads) == (12, 4)


def test_ctrl_c_says_how_to_go_on_wherever_it_comes(stage, tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    command = ["benchmark", "--smoke", "--quiet", "--figures-dir", str(tmp_path)]
    script = f"{stage.__name__}.py"
    with monkeypatch.context() as patched:
        patched.setattr(stage, "load_data", stop)  # before anything is saved
        assert stage.main(command) == 130
    assert capsys.readouterr().err.endswith(
        f"go on with: python {script} {' '.join(command)} --resume\n"
    )
    with monkeypatch.context() as patched:
        patched.setattr(stage, "plot", stop)  # when all is saved
        assert stage.main(command) == 130
    assert capsys.readouterr().err.endswith(
        f"go on with: python {script} plot --figures-dir {tmp_path}\n"
    )


def test_the_users_epochs_win_over_a_jobs_steps(stage):
    args, given = runner.parse_command_line(stage, ["benchmark"], ["sweep", "--epochs", "2"])
    runs = runner.plan(stage, "sweep", {}, given, [TWO_SWEEPS[stage.__name__][1]], None)
    assert all(run.config.n_steps == 2 * math.ceil(55_000 / run.config.batch_size) for run in runs)
    assert len(runs) == len(stage.SWEEPS[TWO_SWEEPS[stage.__name__][1]])
    assert args.only == list(stage.SWEEPS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there(stage, capsys):
    with pytest.raises(SystemExit) as stopped:
        stage.main(["--device", "cuda"])
    assert stopped.value.code == 2
    assert "cuda" in capsys.readouterr().err


@pytest.fixture
def run_on(stage, tmp_path, capsys):
    """Start a smoke run on a data folder that has something wrong: its exit status and its one
    line.
    """

    def run(data_dir):
        figures = tmp_path / "out"
        code = stage.main(
            [
                "train",
                "--smoke",
                "--quiet",
                "--data-dir",
                str(data_dir),
                "--figures-dir",
                str(figures),
            ]
        )
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert not figures.exists()  # nothing was begun
        return code, error

    return run


def test_a_damaged_archive_is_named(stage, tmp_path, run_on):
    shutil.copytree(ROOT / "data" / OWN, tmp_path / OWN)
    archive = tmp_path / OWN / "raw" / "t10k-images-idx3-ubyte.gz"
    damaged = bytearray(archive.read_bytes())
    damaged[5000] ^= 1
    archive.write_bytes(damaged)
    code, error = run_on(tmp_path)
    assert code == 1
    assert str(archive) in error
    assert dict(datasets.FashionMNIST.resources)["t10k-images-idx3-ubyte.gz"] in error


def test_the_other_set_in_its_place_is_refused(stage, tmp_path, run_on):
    shutil.copytree(ROOT / "data" / OTHER, tmp_path / OWN)
    code, error = run_on(tmp_path)
    assert code == 1
    assert f"not {OWN}'s" in error


def test_the_other_sets_unpacked_files_are_refused(stage, tmp_path, run_on):
    shutil.copytree(ROOT / "data" / OTHER, tmp_path / OTHER)
    datasets.MNIST(str(tmp_path), download=True)
    (tmp_path / OWN / "raw").mkdir(parents=True)
    for path in (tmp_path / OTHER / "raw").glob("*-ubyte"):
        shutil.copy(path, tmp_path / OWN / "raw")
    code, error = run_on(tmp_path)
    assert code == 1
    assert "0.286" in error
    assert "0.1307" in error


def test_a_truncated_unpacked_file_is_one_line(stage, tmp_path, run_on):
    shutil.copytree(ROOT / "data" / OWN, tmp_path / OWN)
    datasets.FashionMNIST(str(tmp_path), download=True)
    path = tmp_path / OWN / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:1000])
    code, error = run_on(tmp_path)
    assert code == 1
    assert "-ubyte" in error


def test_a_read_only_data_folder_is_read_and_left_as_it_is(stage, tmp_path, monkeypatch):
    access = os.access
    raw = tmp_path / "data" / OWN / "raw"
    raw.mkdir(parents=True)
    archives = [archive for archive, _ in datasets.FashionMNIST.resources]
    for archive in archives:
        shutil.copy(ROOT / "data" / OWN / "raw" / archive, raw)
    # root may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: path != raw and access(path, mode))
    command = ["benchmark", "--smoke", "--quiet", "--data-dir", str(tmp_path / "data")]
    assert stage.main([*command, "--figures-dir", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in raw.iterdir()) == sorted(archives)


def test_a_folder_that_cannot_be_made_is_one_line(stage, tmp_path, capsys):
    (tmp_path / "taken").write_text("a file")
    assert (
        stage.main(["train", "--smoke", "--quiet", "--figures-dir", str(tmp_path / "taken")]) == 1
    )
    error = capsys.readouterr().err
    assert str(tmp_path / "taken") in error
    assert error.count("\n") == 1


def test_a_second_job_in_the_same_folder_is_refused_and_spoils_nothing(stage, tmp_path, capsys):
    command = ["benchmark", "--smoke", "--quiet", "--figures-dir", str(tmp_path)]
    folder = tmp_path / stage.__name__.split("_")[0]
    with runner.claimed(folder):  # as the first job holds it
        (folder / "train.unfinished.jsonl").write_text("")
        before = sorted(folder.iterdir())
        assert stage.main(command) == 1
        error = capsys.readouterr().err
        assert f"another job is at work in {folder}" in error
        assert error.count("\n") == 1
        assert sorted(folder.iterdir()) == before
    assert stage.main(command) == 0


def test_plot_without_rows_is_one_line(stage, tmp_path, capsys):
    assert stage.main(["plot", "--figures-dir", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err


# ---- rows ----

HERE = {"code": "abc", "torch": "2", "device": "cpu", "threads": 2}


def run_of(experiment, seed, accuracy=0.5):
    return {"runs": [{"experiment": experiment, "seed": seed, "val_accuracy": accuracy}]}


def published(folder):
    with open(folder / "runs.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_job_replaces_its_own_experiments_alone(tmp_path):
    first = runner.Journal(tmp_path, "sweep", {"command": "first"})
    first.run({"n": 1}, lambda: run_of("depth", 0, 0.1))
    first.run({"n": 2}, lambda: run_of("width", 0, 0.2))
    first.publish()
    second = runner.Journal(tmp_path, "sweep", {"command": "second"})
    second.run({"n": 3}, lambda: run_of("depth", 7, 1 / 3))
    second.publish()
    rows = [(r["experiment"], r["seed"], r["val_accuracy"]) for r in published(tmp_path)]
    assert rows == [("width", "0", "0.2"), ("depth", "7", "0.333333")]
    commands = json.loads((tmp_path / "environment.json").read_text())
    assert {name: job["command"] for name, job in commands.items()} == {
        "depth": "second",
        "width": "first",
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["environment.json", "runs.csv"]


def test_resume_goes_on_after_a_torn_line(tmp_path):
    journal = runner.Journal(tmp_path, "train", HERE)
    journal.run({"seed": 0}, lambda: run_of("baseline", 0))
    with open(journal.path, "a") as file:
        file.write('{"key": "half a li')  # the process dies in mid-write
    assert not (tmp_path / "runs.csv").exists()

    again = runner.Journal(tmp_path, "train", HERE, resume=True)
    again.run({"seed": 0}, lambda: pytest.fail("a finished run was repeated"))
    again.run({"seed": 1}, lambda: run_of("baseline", 1))
    # what follows the torn line is whole again
    third = runner.Journal(tmp_path, "train", HERE, resume=True)
    for seed in (0, 1):
        third.run({"seed": seed}, lambda: pytest.fail("a finished run was repeated"))
    third.publish()
    assert [r["seed"] for r in published(tmp_path)] == ["0", "1"]


def test_an_unfinished_job_is_never_thrown_away(tmp_path, capsys):
    for seed in range(3):
        runner.Journal(tmp_path, "train", HERE).run(
            {"seed": seed}, lambda seed=seed: run_of("baseline", seed)
        )
    for seed in range(2):
        assert (
            f'"seed": {seed}' in (tmp_path / f"train.unfinished.jsonl.{seed + 1}.bak").read_text()
        )
    assert "set aside as" in capsys.readouterr().err


def test_runs_that_a_resumed_job_does_not_ask_for_stay_in_the_journal(tmp_path):
    journal = runner.Journal(tmp_path, "sweep", HERE)
    journal.run({"seed": 0}, lambda: run_of("depth", 0))
    journal.run({"seed": 1}, lambda: run_of("depth", 1))
    other = runner.Journal(tmp_path, "sweep", HERE, resume=True)
    other.run({"seed": 1}, lambda: pytest.fail("a finished run was repeated"))
    other.publish()
    assert [r["seed"] for r in published(tmp_path)] == ["1"]
    last = runner.Journal(tmp_path, "sweep", HERE, resume=True)
    last.run({"seed": 0}, lambda: pytest.fail("a finished run was repeated"))
    last.publish()
    assert not last.path.exists()


@pytest.mark.parametrize("part", ["code", "torch", "device", "threads"])
def test_rows_of_another_code_or_machine_are_not_taken_up(tmp_path, part):
    runner.Journal(tmp_path, "train", HERE).run({"seed": 0}, lambda: run_of("baseline", 0, 0.1))
    again = runner.Journal(tmp_path, "train", HERE | {part: "other"}, resume=True)
    assert (
        again.run({"seed": 0}, lambda: run_of("baseline", 0, 0.2))["runs"][0]["val_accuracy"] == 0.2
    )


def test_a_run_asked_for_twice_counts_once(tmp_path):
    journal = runner.Journal(tmp_path, "sweep", HERE)
    for _ in range(2):
        journal.run({"seed": 0}, lambda: run_of("depth", 0))
    journal.publish()
    assert len(published(tmp_path)) == 1


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(RuntimeError), runner.written_aside(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]


def test_a_failed_publish_changes_no_table(tmp_path):
    old = runner.Journal(tmp_path, "train", HERE)
    old.run({}, lambda: run_of("baseline", 0))
    old.publish()
    new = runner.Journal(tmp_path, "train", HERE | {"not JSON": object()})
    new.run({}, lambda: run_of("baseline", 1))
    with pytest.raises(TypeError):
        new.publish()
    assert [r["seed"] for r in published(tmp_path)] == ["0"]
    assert new.path.exists()


# ---- tables ----


def test_mean_and_standard_deviation():
    values = ["0.9", "0.92", "0.97"]
    m = runner.mean(values)
    numbers = np.array(values, float)
    assert (m.mean, m.std, m.n) == (
        pytest.approx(numbers.mean()),
        pytest.approx(numbers.std(ddof=1)),
        3,
    )
    assert m.percent() == "93.00 ± 3.61"
    assert runner.mean([0.5]).text() == "0.50"
    assert math.isnan(runner.mean([1.0, NAN]).mean)
    assert runner.mean([1.0, float("inf")]).text() == "not finite"


def test_finding_says_what_the_rows_say():
    rows = [
        {"value": value, "seed": seed, "val_accuracy": accuracy, "status": status}
        for value, accuracies, status in [
            ("1", (0.90, 0.92), "ok"),
            ("2", (0.97, 0.98), "ok"),
            ("3", (0.96, 0.98), "ok"),
            ("9", (0.1, 0.1), "diverged"),
        ]
        for seed, accuracy in enumerate(accuracies)
    ]
    text = runner.finding(rows, "depth")
    assert text.startswith("Best at depth = 2 (97.50 ± 0.71 %), worst at 9 (10.00 ± 0.00 %)")
    assert "within two standard errors of the best: 3;" in text
    assert text.endswith("diverged at 9.")


def test_rates_are_amount_over_time(monkeypatch):
    clock = iter(np.cumsum([0, 1, 0, 9, 0, 2, 0, 4, 0, 2, 0, 8]).tolist())
    monkeypatch.setattr(runner.time, "perf_counter", lambda: next(clock))
    works = {("g", "slow"): (10, lambda: None), ("g", "fast"): (30, lambda: None)}
    slow, fast = runner.interleaved(works, 2, torch.device("cpu"))
    # the first round is the warm-up: its 1 and 9 seconds do not count
    assert (slow["seconds"], fast["seconds"]) == (2, 6)
    assert (slow["rate"], slow["ratio"]) == (5, 1)
    assert (fast["rate"], fast["ratio"]) == (5, 1)


# ---- pictures ----


def history_of(value, seed, losses):
    return [
        {
            "value": value,
            "seed": str(seed),
            "step": str(10 * i),
            "train_loss": str(loss),
            "val_loss": str(loss),
        }
        | {"val_accuracy": "0.1", "val_macro_f1": "0.1"}
        for i, loss in enumerate(losses, 1)
    ]


@pytest.mark.parametrize("n_lost", [1, 2])
def test_pictures_of_runs_that_diverged_at_once(tmp_path, n_lost):
    """Of two seeds, one or both have no finite loss at all."""
    history = history_of("1", 0, ["nan"]) + history_of(
        "1", 1, ["inf"] if n_lost == 2 else [2.0, 1.0]
    )
    rows = [
        {"value": "1", "seed": str(s), "val_accuracy": "0.1", "val_macro_f1": "0.1", "status": "ok"}
        for s in range(2)
    ]
    runner.plot_curves(tmp_path / "curves.png", history, "title")
    runner.plot_sweep(tmp_path / "sweep.png", rows, history, "title", "axis")
    assert {path.name for path in tmp_path.iterdir()} == {"curves.png", "sweep.png"}


def test_a_seed_that_diverged_does_not_hide_the_others():
    axes = runner.Figure().subplots()
    runner.draw_history(
        axes, history_of("1", 0, ["inf"]) + history_of("1", 1, [2.0, 1.0, 0.5]), "val_loss", "loss"
    )
    (line,) = axes.get_lines()
    np.testing.assert_array_equal(line.get_xdata(), [10, 20, 30])
    np.testing.assert_array_equal(line.get_ydata(), [2.0, 1.0, 0.5])


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ([{"dropout": 0.1}, {"smoothing": 0.1}, {}], ["dropout 0.1", "smoothing 0.1", "nothing"]),
        ([{"clip": 1.0}], ["1.0"]),
        ([{}, {"clip": 0.0}, {"clip": 2.0}], ["nothing", "0.0", "2.0"]),
        # two fields that always agree
        ([{"heads": n, "kv_heads": n, "width": 8} for n in (1, 4)], ["1", "4"]),
    ],
)
def test_labels_tell_values_apart(changes, labels):
    assert [runner.label(change, changes) for change in changes] == labels
