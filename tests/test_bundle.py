"""What holds for every stage alike: data, commands, resuming, signals, messages. Stage by stage."""

import gzip
import importlib
import importlib.util
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from PIL import Image

import metrics

STAGES = ["stage1_mlp", "stage2_rnn", "stage3_attention"]
DATASETS = {  # a stage's own set, and the other
    "stage1_mlp": ("MNIST", "FashionMNIST"),
    "stage2_rnn": ("FashionMNIST", "MNIST"),
    "stage3_attention": ("FashionMNIST", "MNIST"),
}
QUICK = {  # an experiment of several short runs
    "stage1_mlp": "activation",
    "stage2_rnn": "init",
    "stage3_attention": "position",
}
OWN_FLAGS = {
    "stage1_mlp": ["--hidden", "6", "5"],
    "stage2_rnn": ["--n-hidden", "6", "--cell", "gru", "--both-views"],
    "stage3_attention": ["--n-kv-heads", "2", "--d-model", "16"],
}
OWN_NAME = {
    "stage1_mlp": "hidden 6-5, steps 8, n train 300, n logs 2",
    "stage2_rnn": "cell gru, n hidden 6, both views True, steps 8, n train 300, n logs 2",
    "stage3_attention": "n kv heads 2, d model 16, steps 8, n train 300, n logs 2",
}
BAD_FLAGS = {
    "stage1_mlp": [
        (["train", "--hidden", "128", "0"], "hidden must be at least 1, not 0"),
        (["train", "--hidden", "9" * 20], "hidden must be at most"),
        (["train", "--dropout", "1"], "dropout must be at most 0.99, not 1.0"),
        (["train", "--loss", "naive"], "label_smoothing must be 0 for the naive loss"),
        (["train", "--activation", "swish"], "swish"),
    ],
    "stage2_rnn": [
        (["train", "--n-hidden", "0"], "n_hidden must be at least 1, not 0 (--n-hidden)"),
        (["train", "--n-hidden", "9" * 20], "n_hidden must be at most"),
        (["train", "--shift", "28"], "shift must be at most 27, not 28"),
        (["train", "--cell", "elman"], "elman"),
    ],
    "stage3_attention": [
        (["train", "--position", "rotary", "--d-model", "24"], "must be even, not 3"),
        (["train", "--n-kv-heads", "3"], "n_heads must be a multiple of n_kv_heads, 3, not 8"),
        (["train", "--d-model", "97"], "d_model must be a multiple of n_heads, 8, not 97"),
        (["train", "--task", "recall"], 'readout must be "last" for recall'),
        (["train", "--dropout", "1"], "dropout must be at most 0.99, not 1.0"),
        (["train", "--position", "absolute"], "absolute"),
        (["demo", "--n-kv-heads", "3"], "n_heads must be a multiple of n_kv_heads, 3, not 8"),
    ],
}


@pytest.fixture(scope="module", params=STAGES)
def stage(request):
    return importlib.import_module(request.param)


@pytest.fixture
def folder_of(stage):
    return lambda out: out / stage.__name__.split("_")[0]


MATPLOTLIBRC = "figure.dpi: 7\nfont.size: 50\n"
HOSTILE = {  # what a notebook, a launcher and a small terminal leave in the environment
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "RANK": "1",
    "WORLD_SIZE": "2",
    "PYTHONIOENCODING": "ascii",
    "DISPLAY": "",
    "LOKY_MAX_CPU_COUNT": "2",  # pictures are drawn two at a time, in this process one by one
}


def rows_of(folder, table="runs"):
    return metrics.load_rows(folder / f"{table}.csv", as_text=True)


def launch(script, *arguments, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("env", {})
    command = [sys.executable, script, *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen(command, env=environment, **options)


def finish(process):
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


# ---- data ----


def unpacked(name, raw):
    with gzip.open(ROOT / "data" / raw / "raw" / f"{name}.gz") as file:
        return file.read()


@pytest.fixture
def data_dir(stage, tmp_path):
    """A data folder with the stage's four archives, as links."""
    own = DATASETS[stage.__name__][0]
    raw = tmp_path / "data" / own / "raw"
    raw.mkdir(parents=True)
    for archive in (ROOT / "data" / own / "raw").glob("*.gz"):
        os.link(archive, raw / archive.name) if os.stat(raw).st_dev == os.stat(
            archive
        ).st_dev else shutil.copy(archive, raw)
    return tmp_path / "data"


def test_data_is_the_whole_set_split_by_class(stage):
    data = stage.load_data()
    assert [len(split.labels) for split in data] == [55_000, 5_000, 10_000]
    own = DATASETS[stage.__name__][0]
    labels = np.frombuffer(unpacked("train-labels-idx1-ubyte", own), np.uint8, offset=8)
    ours = torch.cat([data.train.labels, data.val.labels])
    np.testing.assert_array_equal(np.bincount(ours), np.bincount(labels))
    share = data.val.labels.bincount() / torch.bincount(torch.tensor(labels))
    torch.testing.assert_close(share, torch.full((10,), 1 / 12), rtol=0, atol=2e-4)
    # every image stands once in one of the two splits, with its own label
    pixels = np.frombuffer(unpacked("train-images-idx3-ubyte", own), np.uint8, offset=16)
    # a number for each image; sums below 2^53 are exact, and float64 is multiplied fast
    weights = np.random.default_rng(0).integers(1, 1 << 34, 784).astype(float)
    theirs = pixels.reshape(-1, 784).astype(float) @ weights
    images = torch.cat([data.train.images, data.val.images]).flatten(1)
    mean, std = pixels.mean() / 255, pixels.std() / 255
    mine = ((images * std + mean) * 255).round().double().numpy() @ weights
    np.testing.assert_array_equal(np.sort(mine), np.sort(theirs))
    pairs = set(zip(theirs.tolist(), labels.tolist(), strict=True))
    assert set(zip(mine.tolist(), ours.tolist(), strict=True)) == pairs


def test_unpacked_files_are_read_first_and_nothing_is_written(stage, data_dir):
    own = DATASETS[stage.__name__][0]
    raw = data_dir / own / "raw"
    packed = stage.load_data(data_dir)
    before = sorted(raw.iterdir())
    (raw / "t10k-labels-idx1-ubyte").write_bytes(unpacked("t10k-labels-idx1-ubyte", own))
    (raw / "t10k-labels-idx1-ubyte.gz").unlink()
    again = stage.load_data(data_dir)
    assert torch.equal(packed.test.labels, again.test.labels)
    names = {path.name for path in before} - {"t10k-labels-idx1-ubyte.gz"}
    assert {path.name for path in raw.iterdir()} == names | {"t10k-labels-idx1-ubyte"}


def other_sets(own, other, name):
    return unpacked(name, other)


def cut_short(own, other, name):
    return unpacked(name, own)[:-784]


def blacked_out(own, other, name):
    content = unpacked(name, own)
    return content[:16] + bytes(6000) + content[6016:]


def wrong_label(own, other, name):
    return unpacked(name, own)[:-1] + bytes([200])


def wrong_type(own, other, name):
    content = unpacked(name, own)
    return content[:2] + bytes([9]) + content[3:]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("t10k-images-idx3-ubyte", other_sets),
        ("t10k-labels-idx1-ubyte", other_sets),
        ("train-labels-idx1-ubyte", other_sets),
        ("train-images-idx3-ubyte", other_sets),
        ("t10k-images-idx3-ubyte", cut_short),
        ("t10k-images-idx3-ubyte", blacked_out),
        ("t10k-labels-idx1-ubyte", wrong_label),
        ("train-labels-idx1-ubyte", wrong_type),
    ],
)
def test_each_wrong_part_is_named_before_anything_is_trained(
    stage, data_dir, tmp_path, capsys, name, damage
):
    own, other = DATASETS[stage.__name__]
    path = data_dir / own / "raw" / name
    path.write_bytes(damage(own, other, name))
    command = ["--smoke", "--data-dir", str(data_dir), "--out", str(tmp_path / "out")]
    assert stage.main(command) == 1
    error = capsys.readouterr().err
    assert str(path) in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "out").rglob("*.csv"))


def test_a_damaged_archive_and_a_missing_folder_are_one_line(stage, data_dir, tmp_path, capsys):
    own = DATASETS[stage.__name__][0]
    archive = data_dir / own / "raw" / "t10k-images-idx3-ubyte.gz"
    content = bytearray(archive.read_bytes())
    content[5000] ^= 1
    archive.unlink()
    archive.write_bytes(content)
    nowhere = tmp_path / "nowhere"
    for folder, quoted in ((data_dir, str(archive)), (nowhere, "--download")):
        assert stage.main(["--smoke", "--data-dir", str(folder), "--out", str(tmp_path)]) == 1
        printed = capsys.readouterr()
        assert quoted in printed.err
        assert printed.err.count("\n") == 1
        assert printed.out == ""  # not a word of runs before it
    assert not nowhere.exists()


def test_torchvisions_older_layout_is_not_read(stage, data_dir):
    own = DATASETS[stage.__name__][0]
    (data_dir / own / "processed").mkdir()
    (data_dir / own / "processed" / "training.pt").write_bytes(b"")
    assert len(stage.load_data(data_dir).train.labels) == 55_000


# ---- run ----


@pytest.fixture(scope="module")
def smoke(stage, tmp_path_factory):
    """A smoke run of everything as a user starts it: elsewhere, in a hostile environment."""
    folder = tmp_path_factory.mktemp("smoke")
    (folder / "matplotlibrc").write_text(MATPLOTLIBRC)
    words = ("--smoke", "--out", folder / "out")
    process = launch(stage.__file__, *words, cwd=folder, env=HOSTILE)
    code, out, error = finish(process)
    assert code == 0, error
    return folder / "out" / stage.__name__.split("_")[0], out


@pytest.fixture(scope="module")
def quick(stage, tmp_path_factory):
    """The folder of a smoke run of one experiment: two runs."""
    out = tmp_path_factory.mktemp("quick")
    assert stage.main(["--smoke", "--only", QUICK[stage.__name__], "--out", str(out)]) == 0
    return out / stage.__name__.split("_")[0]


def test_smoke_makes_every_table_and_picture(stage, smoke):
    folder, printed = smoke
    runs = rows_of(folder)
    assert set(runs["experiment"]) == set(stage.EXPERIMENTS)
    assert set(runs["seed"]) == {"0"}
    for experiment in stage.SELECTED:
        for name in (f"curves_{experiment}.png", f"confusion_{experiment}.png", f"{experiment}.pt"):
            assert (folder / name).stat().st_size > 1000
    for experiment in set(stage.EXPERIMENTS) - {*stage.SELECTED, "faults"}:
        assert (folder / f"sweep_{experiment}.png").stat().st_size > 1000
    summary = (folder / "summary.md").read_text(encoding="utf-8")
    pictures = {path.name for path in folder.glob("*.png")}
    assert all(f"({name})" in summary for name in pictures - {"mistakes.png"})
    last = printed.rstrip().splitlines()[-1]
    assert str(folder / "summary.md") in last


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_what_a_gpu_trained_is_judged_alike_on_the_cpu(stage, tmp_path, folder_of):
    weights = tmp_path / "own.pt"
    command = ["train", "--steps", "5", "--n-train", "640", "--device", "cuda"]
    assert stage.main([*command, "--save", str(weights), "--out", str(tmp_path)]) == 0
    row = metrics.load_rows(folder_of(tmp_path) / "runs.csv").iloc[0]
    assert row["device"] == torch.cuda.get_device_name()
    loaded = stage.load_weights(weights)
    val = stage.load_data().val
    if stage.__name__ == "stage1_mlp":
        found = stage.evaluate(loaded[0], val)
    elif stage.__name__ == "stage2_rnn":
        found = stage.evaluate(loaded[0], val, loaded[1])
    else:
        found = stage.evaluate(loaded, stage.evaluation_set(val, loaded.config, len(val.labels)))
    assert found["loss"] == pytest.approx(row["val_loss"], rel=1e-4)


def test_every_run_has_history_and_says_where_it_comes_from(stage, smoke):
    runs, history = rows_of(smoke[0]), rows_of(smoke[0], "history")
    key = ["experiment", "value", "seed"]
    assert set(map(tuple, runs[key].values)) == set(map(tuple, history[key].values))
    for column in ("status", "val_accuracy", "seconds", "parameters", "commit", "torch", "device"):
        assert (runs[column] != "").all()
    assert set(runs["threads"]) == {"1"}
    for column in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
        assert history[column].astype(float).notna().any()


def test_saved_test_scores_follow_from_the_saved_confusion(stage, smoke):
    from sklearn.metrics import f1_score, precision_score

    cells = metrics.load_rows(smoke[0] / "confusion.csv")
    tests = metrics.load_rows(smoke[0] / "test_metrics.csv")
    runs = metrics.load_rows(smoke[0] / "runs.csv").set_index("experiment")
    assert set(tests["experiment"]) == set(stage.SELECTED)
    for row in tests.to_dict("records"):
        mine = cells[cells["experiment"] == row["experiment"]]
        target = np.repeat(mine["true"], mine["count"])
        predicted = np.repeat(mine["predicted"], mine["count"])
        assert row["accuracy"] == pytest.approx((target == predicted).mean(), rel=1e-5)
        options = {"average": "macro", "zero_division": 0}
        assert row["macro_f1"] == pytest.approx(f1_score(target, predicted, **options), rel=1e-5)
        theirs = precision_score(target, predicted, **options)
        assert row["macro_precision"] == pytest.approx(theirs, rel=1e-5)
        assert runs.loc[row["experiment"], "test_accuracy"] == pytest.approx(row["accuracy"])


def test_what_is_finished_is_found_and_what_is_outdated_is_trained_again(
    stage, quick, tmp_path, folder_of, capsys, monkeypatch
):
    folder = folder_of(tmp_path)
    shutil.copytree(quick, folder)
    experiment = QUICK[stage.__name__]
    command = ["--smoke", "--only", experiment, "--out", str(tmp_path)]
    before = rows_of(folder)
    trained = []
    train = stage.train

    def counted(config, *args):
        trained.append(config)
        return train(config, *args)

    monkeypatch.setattr(stage, "train", counted)
    assert stage.main(command) == 0
    assert trained == []
    assert "2 of 2 runs found there, 0 to do" in capsys.readouterr().out

    table = stage.EXPERIMENTS[experiment]
    value = next(iter(table))
    changed = stage.replace(table[value], lr=0.5)
    monkeypatch.setitem(table, value, changed)
    assert stage.main(command) == 0
    assert [config.lr for config in trained] == [0.5]
    assert "1 were made with other settings" in capsys.readouterr().out
    after = rows_of(folder)
    assert len(after) == len(before)
    is_it = (after["experiment"] == experiment) & (after["value"] == value)
    assert after.loc[is_it, "lr"].tolist() == ["0.5"]
    columns = [column for column in before if column not in ("seconds", "commit")]
    pd.testing.assert_frame_equal(after.loc[~is_it, columns], before.loc[~is_it, columns])

    with monkeypatch.context() as on_a_screen:
        screen = io.StringIO()
        screen.isatty = lambda: True
        on_a_screen.setattr(sys, "stderr", screen)
        assert stage.main([*command, "--fresh"]) == 0
    assert len(trained) == 3
    before_a_run_ended = screen.getvalue().split("1/2")[0]
    assert f"training, longest first: {experiment} " in before_a_run_ended
    # of another seed, with settings that are no longer the table's, or of a value that is gone
    rows = rows_of(folder)
    old = [rows.head(1).assign(seed="1", lr="0.25"), rows.head(1).assign(value="gone")]
    metrics.save_rows(folder / "runs.csv", pd.concat([rows, *old]))
    capsys.readouterr()
    assert stage.main(command) == 0
    assert "2 saved rows removed" in capsys.readouterr().out
    pd.testing.assert_frame_equal(rows_of(folder), rows)


def test_an_experiment_of_ones_own_is_one_entry_of_the_table(
    stage, tmp_path, folder_of, monkeypatch
):
    values = {"slow": stage.replace(stage.BASE, lr=1e-4), "fast": stage.BASE}
    monkeypatch.setitem(stage.EXPERIMENTS, "my_rates", values)
    assert stage.main(["--smoke", "--only", "my_rates", "--out", str(tmp_path)]) == 0
    folder = folder_of(tmp_path)
    assert rows_of(folder)["value"].tolist() == ["slow", "fast"]
    assert (folder / "sweep_my_rates.png").exists()
    summary = (folder / "summary.md").read_text(encoding="utf-8")
    section = summary.split("\n## Sweep: my")[1]
    assert "| slow " in section and "| fast " in section


SHRINK = """
for values in EXPERIMENTS.values():
    values.update({name: smoke_config(config) for name, config in values.items()})
load_all = load_data


def load_data(*arguments):
    return smoke_data(load_all(*arguments))
"""


@pytest.fixture(scope="module")
def small_script(stage, tmp_path_factory):
    """The stage's file in a folder of its own, with every run of its table as small as in a smoke
    run: many runs of a moment each, which start as a user's do."""
    folder = tmp_path_factory.mktemp("small")
    shutil.copy(ROOT / "metrics.py", folder)
    program, start = Path(stage.__file__).read_text(encoding="utf-8").rsplit("\n\nif __name__", 1)
    script = folder / Path(stage.__file__).name
    script.write_text(f"{program}\n\n{SHRINK}\n\nif __name__{start}", encoding="utf-8")
    return script


def on_data(*words):
    return [*words, "--data-dir", str(ROOT / "data")]


CLUSTER = """
import sys, distributed
if __name__ == "__main__":
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()
"""


def test_toy_rows_never_take_the_place_of_committed_ones(stage, capsys):
    for command in ("run", "benchmark"):
        with pytest.raises(SystemExit) as stopped:
            stage.main([command, "--smoke", "--out", str(ROOT / "figures")])
        assert stopped.value.code == 2
        assert "name another --out" in capsys.readouterr().err


def test_fresh_removes_nothing_while_data_is_missing(stage, quick, tmp_path, folder_of, capsys):
    shutil.copytree(quick, folder_of(tmp_path))
    words = ["--only", QUICK[stage.__name__], "--fresh", "--out", str(tmp_path)]
    assert stage.main([*words, "--data-dir", str(tmp_path / "none")]) == 1
    assert "none" in capsys.readouterr().err
    pd.testing.assert_frame_equal(rows_of(folder_of(tmp_path)), rows_of(quick))


@pytest.mark.parametrize("stage", ["stage1_mlp"], indirect=True)  # 20 seconds each
def test_dask_gives_the_rows_of_one_process(stage, quick, tmp_path, folder_of):
    pytest.importorskip("distributed")
    script = tmp_path / "cluster.py"
    script.write_text(CLUSTER)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, script], cwd=tmp_path, **pipes) as cluster:
        address = cluster.stdout.readline().strip()
        words = ["--smoke", "--only", QUICK[stage.__name__], "--dask", address]
        code, _, error = finish(launch(stage.__file__, *words, "--out", tmp_path / "dask"))
        cluster.stdin.close()
    assert code == 0, error
    for table in ("runs", "history"):
        one, two = (rows_of(folder, table) for folder in (quick, folder_of(tmp_path / "dask")))
        pd.testing.assert_frame_equal(one.drop(columns="seconds"), two.drop(columns="seconds"))


def is_running(process):
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")")[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_for_rows(folder, process):
    deadline = time.monotonic() + 200
    while not (folder / "runs.csv").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)


def wait_until(is_true):
    deadline = time.monotonic() + 30
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("stage", "number", "code"),
    [
        ("stage1_mlp", signal.SIGINT, 130),
        ("stage2_rnn", signal.SIGTERM, 143),
        ("stage3_attention", signal.SIGKILL, -signal.SIGKILL),
    ],
    indirect=["stage"],
)
def test_a_job_of_two_workers_that_is_ended_goes_on_and_its_rows_are_those_of_one(
    stage, small_script, quick, tmp_path, folder_of, capsys, number, code
):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = {"TMPDIR": str(temporary), "JOBLIB_TEMP_FOLDER": str(temporary)}
    out = tmp_path / "o o"
    folder = folder_of(out)
    words = on_data("--only", QUICK[stage.__name__], "--out", str(out))
    # a shell's background job is deaf to SIGINT, and so would be what it starts
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    options = {"env": environment, "cwd": tmp_path, "start_new_session": True}
    process = launch(small_script, *words, "--seeds", "200", "--workers", "2", **options)
    signal.signal(signal.SIGINT, before)
    wait_for_rows(folder, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # Ctrl-C in a terminal reaches the workers, too
    else:
        process.send_signal(number)
    returned, _, error = finish(process)
    assert returned == code
    wait_until(lambda: not any(is_running(child) for child in children))  # workers end with it
    if number != signal.SIGKILL:
        assert "Warning" not in error and "resource_tracker" not in error
        last = error.strip().splitlines()[-1]
        assert f"python {small_script} --only" in last
        assert "'" in last  # the folder with a space is quoted
        # joblib's tracker removes its folder when all have gone
        wait_until(lambda: not any(path.is_file() for path in temporary.rglob("*")))

    finished = rows_of(folder)
    assert len(finished) >= 1
    extra = finished.head(1).assign(seed="777")  # as if it was killed between two files
    history = rows_of(folder, "history")
    metrics.save_rows(folder / "history.csv", pd.concat([history, extra[["experiment", "seed"]]]))
    (folder / "runs.csv.123.aside").write_text("half a li")
    metrics.drop_rows_of_no_run(folder)
    assert "777" not in set(rows_of(folder, "history")["seed"])
    assert not list(folder.glob("*.aside"))
    pd.testing.assert_frame_equal(rows_of(folder), finished)

    spec = importlib.util.spec_from_file_location(f"small_{stage.__name__}", small_script)
    small = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = small
    spec.loader.exec_module(small)
    assert small.main([*words, "--workers", "1"]) == 0  # goes on, with the first seed of each value
    n_values = len(stage.EXPERIMENTS[QUICK[stage.__name__]])
    n_found = (finished["seed"] == "0").sum()
    assert f"{n_found} of {n_values} runs found there" in capsys.readouterr().out
    after = rows_of(folder)
    assert (after["seed"] == "0").sum() == n_values
    key = ["experiment", "value", "seed"]
    pd.testing.assert_frame_equal(after.merge(finished[key], on=key), finished)

    differ = ["seconds", "commit"]  # small_script lies in no repository
    for table in ("runs", "history"):  # a smoke run is all of it in one process
        rows = (rows_of(path, table) for path in (quick, folder))
        one, two = (found.drop(columns=differ, errors="ignore") for found in rows)
        two = two[(two["seed"] == "0") & two["value"].isin(one["value"])]
        pd.testing.assert_frame_equal(one[list(two.columns)], two.reset_index(drop=True))


# ---- train ----


@pytest.fixture
def few_images(stage, monkeypatch):
    """Every 20th image in place of all, read once for all commands of a test."""
    data = stage.Data(*(stage.Split(*(part[::20] for part in s)) for s in stage.load_data()))
    monkeypatch.setattr(stage, "load_data", lambda *_: data)


def test_train_names_its_run_by_what_was_changed_and_always_trains(
    stage, few_images, tmp_path, folder_of, capsys
):
    short = ["--steps", "8", "--n-train", "300", "--n-logs", "2"]
    command = ["train", *OWN_FLAGS[stage.__name__], *short, "--out", str(tmp_path)]
    weights = tmp_path / "deep" / "own.pt"
    assert stage.main(command) == 0
    printed = capsys.readouterr().out
    assert "validation images: accuracy" in printed
    assert "test images" not in printed
    assert stage.main([*command, "--seed", "3", "--test", "--save", str(weights)]) == 0
    printed = capsys.readouterr().out
    assert "n_train=300" in printed
    assert "test images, because of --test: accuracy" in printed
    assert stage.main(command) == 0
    runs = rows_of(folder_of(tmp_path))
    assert runs["experiment"].tolist() == [OWN_NAME[stage.__name__]] * 2
    assert sorted(runs["seed"]) == ["0", "3"]
    tests = runs.set_index("seed")["test_accuracy"]
    assert tests["0"] == ""
    loaded = stage.load_weights(weights)  # of stages 1 and 2 the model and its Config
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    config = loaded[1:] if stage.__name__ == "stage2_rnn" else ()
    found = stage.evaluate(model, stage.load_data().test, *config)
    assert found["accuracy"] == pytest.approx(float(tests["3"]), abs=1e-5)


# ---- predict ----


def test_predict_names_what_is_no_image_and_reads_the_others(stage, smoke, tmp_path, capsys):
    image = tmp_path / "图.png"
    picture = np.full((60, 50), 240, np.uint8)
    picture[10:50, 22:28] = 20
    Image.fromarray(picture).save(image)
    text = tmp_path / "text.png"
    text.write_text("no image")
    even = tmp_path / "even.png"
    Image.new("L", (30, 30), 128).save(even)
    weights = next(iter(smoke[0].glob("*.pt")))
    words = [str(text), str(image), str(tmp_path / "none.png"), str(even)]
    seen = tmp_path / "seen.png"
    command = ["predict", *words, "--weights", str(weights), "--save-picture", str(seen)]
    assert stage.main(command) == 1
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{image}: ")
    assert printed.out.count("\n") == 1
    assert [str(name) in printed.err for name in (text, tmp_path / "none.png", even)] == [True] * 3
    assert printed.err.count("\n") == 3
    assert Image.open(seen).size[0] > 100


def test_weights_that_are_none_are_one_line(stage, tmp_path, capsys):
    image = tmp_path / "i.png"
    Image.new("L", (30, 30), 128).save(image)
    wrong = tmp_path / "wrong.pt"
    wrong.write_bytes(b"nothing")
    for weights in (wrong, tmp_path / "none.pt"):
        assert stage.main(["predict", str(image), "--weights", str(weights)]) == 1
        error = capsys.readouterr().err
        assert str(weights) in error
        assert "train --save writes" in error  # what would be right, and none of torch's advice
        assert error.count("\n") == 1


# ---- flags ----

COMMON_BAD_FLAGS = [
    (["trian"], "did you mean train?"),
    (["--bogus"], "--bogus"),
    (["train", "--epochs", "0"], "epochs must be at least 1, not 0"),
    (["train", "--epochs", "two"], "two"),
    (["train", "--batchsize", "8"], "--batch-size"),
    (["train", "--batch-size", "99999999999999999999"], "--batch-size"),
    (["train", "--lr", "-1"], "-1.0"),
    (["train", "--lr", "nan"], "nan"),
    (["train", "--n-train", "55001"], "55,001"),
    (["train", "--n-logs", "2000000000"], "2,000,000,000"),
    (["--seeds", "0"], "seeds must be at least 1, not 0"),
    (["--seeds", "20240601"], "20,240,601"),
    (["--only", "colour"], "colour"),
    (["--only", "all", "step"], "did you mean steps?"),
    (["--device", "tpu"], "tpu"),
    (["predict"], "at least one image"),
]


def test_a_bad_flag_names_itself_and_exits_with_2_before_anything_is_loaded(
    stage, capsys, monkeypatch
):
    monkeypatch.setattr(stage, "load_data", lambda *_: pytest.fail("data was loaded"))
    for flags, quoted in COMMON_BAD_FLAGS + BAD_FLAGS[stage.__name__]:
        with pytest.raises(SystemExit) as stopped:
            stage.main(flags)
        assert stopped.value.code == 2, flags
        printed = capsys.readouterr()
        error = " ".join((printed.err + printed.out).replace("│", " ").split())
        assert quoted in error
        assert "dummy" not in error and "self." not in error


def test_only_takes_several_names_and_may_be_repeated(stage):
    names = list(stage.EXPERIMENTS)
    once = stage.parse(["--only", names[0], names[1]])
    twice = stage.parse(["run", "--only", names[0], "--only", names[1]])
    assert once.experiments == twice.experiments == names[:2]
    assert stage.parse(["--only", "all"]).experiments == names
    assert stage.parse([]).experiments == list(stage.THE_BRIEF)


def test_every_flag_has_its_meaning_in_the_help(stage, capsys):
    for command in stage.COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            stage.main([command, "-h"])
        assert stopped.value.code == 0
        text = capsys.readouterr().out
        flags = re.split(r"--(?=[a-z])", " ".join(text.replace("│", " ").split()))[1:]
        meanings = {
            flag.split()[0]: re.sub(r"\(default.*|[{\[].*?[}\]]+", "", flag) for flag in flags
        }
        for flag, meaning in meanings.items():
            words = [word for word in meaning.split()[1:] if word != word.upper()]
            assert words, f"{command}: --{flag} says nothing"
        if command == "train":
            names = {field.name.replace("_", "-") for field in stage.fields(stage.Config)}
            assert names <= {flag.removeprefix("no-") for flag in meanings}


# ---- folders and streams ----


def test_a_second_job_in_a_folder_is_refused_also_through_a_link(
    stage, tmp_path, folder_of, capsys
):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with stage.claimed(folder_of(tmp_path / "real")):
        command = ["--smoke", "--only", QUICK[stage.__name__], "--out", str(tmp_path / "link")]
        assert stage.main(command) == 1
    error = capsys.readouterr().err
    assert "another job is at work in" in error
    assert error.count("\n") == 1
    assert not list(folder_of(tmp_path / "real").iterdir())


def test_plot_draws_the_same_again_wherever_it_is_and_whatever_its_stream(
    stage, quick, tmp_path, folder_of
):
    """From rows alone, with settings of the user's own, onto a stream that is full or closed; in a
    folder in Chinese, and in it one whose bytes are no UTF-8."""
    out = tmp_path / "结果" / b"\xbd\xe1".decode("utf-8", "surrogateescape")
    shutil.copytree(quick, folder_of(out))
    drawn = [*quick.glob("*.png"), quick / "summary.md"]
    assert len(drawn) > 1
    for path in drawn:
        (folder_of(out) / path.name).unlink()
    (tmp_path / "matplotlibrc").write_text(MATPLOTLIBRC)
    is_closed = stage.__name__ == "stage2_rnn"
    if is_closed:
        reader, stream = os.pipe()
        os.close(reader)
    else:
        stream = os.open("/dev/full", os.O_WRONLY)
    environment = HOSTILE | {"LC_ALL": "C", "PYTHONUTF8": "0"}
    words = (stage.__file__, "plot", "--out", out)
    process = launch(*words, cwd=tmp_path, env=environment, stdout=stream)
    os.close(stream)
    code, _, error = finish(process)
    for path in drawn:
        assert (folder_of(out) / path.name).read_bytes() == path.read_bytes(), path.name
    if is_closed:
        assert "Traceback" not in error
    else:
        assert code == 1
        assert error.count("\n") == 1


def test_a_table_from_a_spreadsheet_is_read_and_a_damaged_one_is_named(
    stage, quick, tmp_path, folder_of, capsys
):
    folder = folder_of(tmp_path)
    shutil.copytree(quick, folder)
    path = folder / "runs.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    command = ["--smoke", "--only", QUICK[stage.__name__], "--out", str(tmp_path)]
    assert stage.main(command) == 0
    assert "2 of 2 runs found" in capsys.readouterr().out
    for damage in (b"", b'experiment,value\n"open', b"\xff\xfe\x00", b"PK\x03\x04,2\n1,2,3\n"):
        path.write_bytes(damage)
        assert stage.main(command) == 1
        error = capsys.readouterr().err
        assert str(path) in error
        assert error.count("\n") == 1


def test_a_folder_that_cannot_be_made_and_plot_without_rows_are_one_line(stage, tmp_path, capsys):
    (tmp_path / "taken").write_text("a file")
    for command, quoted in (
        (["--smoke", "--out", str(tmp_path / "taken")], "a file is in its way"),
        (["plot", "--out", str(tmp_path / "empty")], "train something first"),
    ):
        assert stage.main(command) == 1
        error = capsys.readouterr().err
        assert str(tmp_path) in error
        assert quoted in error
        assert error.count("\n") == 1


def test_benchmark_writes_ratios_of_what_it_timed(
    stage, few_images, tmp_path, folder_of, capsys, monkeypatch
):
    run = subprocess.run

    def in_this_process(command, **options):  # stage 1 times whole commands of its own
        if command[0] != sys.executable:
            return run(command, **options)
        assert command[1] == stage.__file__
        assert stage.main(command[2:]) == 0

    monkeypatch.setattr(subprocess, "run", in_this_process)
    assert stage.main(["benchmark", "--smoke", "--out", str(tmp_path)]) == 0
    rows = metrics.load_rows(folder_of(tmp_path) / "benchmark.csv")
    assert len(rows) >= 3
    np.testing.assert_allclose(rows["ratio"], rows["first"] / rows["second"], rtol=1e-4)
    assert (folder_of(tmp_path) / "benchmark.png").exists()
    assert (rows["device"] != "").all()


def test_the_eight_archives_are_committed_and_nothing_unpacked_is():
    done = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("not a git repository")
    data = [path for path in done.stdout.split() if path.startswith("data/") and "ubyte" in path]
    assert len(data) == 8
    assert all(path.endswith("-ubyte.gz") for path in data)
