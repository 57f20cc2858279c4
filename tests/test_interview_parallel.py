"""interview/parallel.py in two and three processes, against torch's own network and optimizer."""

import itertools
import multiprocessing
import os
import socket
import sys
from datetime import timedelta
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import torch.distributed as dist
from conftest import assert_equal
from torch import nn
from torch.nn import functional as F

from interview import parallel
from stage3_attention import GroupedQueryAttention, MultiHeadAttention

RECIPE = parallel.Recipe(n_steps=2, batch_size=7, n_micro=3, lr=0.01, bucket_bytes=40_000)
LENGTHS = (0, 1, 2, 3, 7, 12, 101)
LAYERS = {"attention": (MultiHeadAttention, 5, 5), "grouped": (GroupedQueryAttention, 6, 3)}


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# ---- What a process does: everything is saved, and compared below ----


def ring_results(ranks):
    found = {}
    for n in LENGTHS:
        x = draw(n, seed=ranks.rank)
        before = ranks.bytes_sent
        found[n] = {"sum": ranks.all_reduce(x), "sent": ranks.bytes_sent - before, "x": x.clone()}
        vector = x.clone()
        ranks.reduce_scatter(vector)
        start, stop = parallel.partition(n, ranks.size)[ranks.rank]
        found[n]["part"] = vector[start:stop].clone()
        gathered = torch.full_like(vector, torch.nan)
        gathered[start:stop] = vector[start:stop]
        ranks.all_gather(gathered)
        found[n]["gathered"] = gathered
        dist.all_reduce(x)
        found[n]["torch"] = x
    return found


def training_results(ranks):
    """Of every way: gradients and parameters of this rank after one step and after two."""
    images = draw(2, 7, 784, seed=50)
    labels = torch.arange(14).view(2, 7) % 10
    found = {}
    for way, kind in parallel.WAYS.items():
        model = parallel.start_model(RECIPE, torch.device("cpu"))
        trainer = kind(model, ranks, RECIPE)
        found[way] = []
        for x, y in zip(images, labels, strict=True):
            before = ranks.bytes_sent
            loss = trainer.step(x, y)
            record = {"sent a step": ranks.bytes_sent - before} | trainer.memory()
            dist.all_reduce(loss)
            parameters = list(trainer.module.parameters())
            gradients = [parameter.grad.clone() for parameter in parameters]
            if way == "ZeRO-1":  # those of the others are not summed
                gradients = [trainer.own.grad.clone()]
            values = [parameter.detach().clone() for parameter in parameters]
            found[way].append(record | {"loss": loss, "grad": gradients, "values": values})
    return found


def attention_layer(name):
    kind, n_heads, n_kv_heads = LAYERS[name]
    torch.manual_seed(3)
    sizes = (n_heads,) if kind is MultiHeadAttention else (n_heads, n_kv_heads)
    return kind(4 * n_heads, *sizes).double()


def attention_run(layer):
    """Output, and gradients in x, in the context and in what is whole on every rank."""
    D = layer.W_q.in_features
    x = draw(2, 3, D, seed=60).requires_grad_()
    context = draw(2, 7, D, seed=61).requires_grad_()
    mask = draw(2, 1, 3, 7, seed=62)
    out, _ = layer(x, context, mask=mask)
    inputs = [x, context, layer.W_o.bias]
    return [out.detach(), *torch.autograd.grad(out, inputs, draw(*out.shape, seed=63))]


def attention_results(ranks):
    found = {}
    for name in LAYERS:
        whole = attention_layer(name)
        found[name] = attention_run(parallel.parallel_attention(whole, ranks))
    return found


def work(rank, n_ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=n_ranks,
        timeout=timedelta(seconds=60),
    )
    ranks = parallel.Ranks()
    results = {
        "ring": ring_results(ranks),
        "training": training_results(ranks),
        "attention": attention_results(ranks),
        "checks": [
            parallel.ring_difference(ranks, torch.device("cpu")),
            parallel.attention_difference(ranks, torch.device("cpu")),
        ],
    }
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def run_processes(target, n_ranks, *arguments):
    """target(rank, n_ranks, *arguments) in as many processes, which must all end well."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["interview.parallel"])
    jobs = [
        context.Process(target=target, args=(rank, n_ranks, *arguments), daemon=True)
        for rank in range(n_ranks)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(90)
        if job.is_alive():
            job.kill()
    assert [job.exitcode for job in jobs] == [0] * n_ranks


@pytest.fixture(scope="module", params=[2, 3])
def by_rank(request, tmp_path_factory):
    """What each of so many processes saved."""
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    run_processes(work, request.param, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


# ---- The ring ----


def test_the_ring_sums_as_torch_does_and_as_a_sum(by_rank):
    p = len(by_rank)
    for n in LENGTHS:
        expected = sum(draw(n, seed=rank) for rank in range(p))
        parts = expected.tensor_split(p)
        for rank, results in enumerate(by_rank):
            found = results["ring"][n]
            assert_equal([found["sum"], found["torch"]], [expected, expected], 1e-12)
            assert torch.equal(found["x"], draw(n, seed=rank))
            assert_equal([found["part"], found["gathered"]], [parts[rank], expected], 1e-12)
            assert torch.equal(found["sum"], by_rank[0]["ring"][n]["sum"])  # to the bit


def test_a_ring_sends_all_chunks_but_two_twice(by_rank):
    p = len(by_rank)
    for n in LENGTHS:
        lengths = [len(part) for part in torch.arange(n).tensor_split(p)]
        for rank, results in enumerate(by_rank):
            expected = 2 * n - lengths[rank] - lengths[(rank + 1) % p]
            assert results["ring"][n]["sent"] == 8 * expected
    assert by_rank[0]["ring"][12]["sent"] == 8 * 12 * 2 * (p - 1) / p


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(7,), (2, 3), (1,), (0,)])
def test_the_ring_of_a_list_is_the_sum(n_ranks, shape):
    tensors = [draw(*shape, seed=rank) for rank in range(n_ranks)]
    before = [x.clone() for x in tensors]
    found = parallel.ring_all_reduce(tensors)
    assert_equal(found, [sum(before)] * n_ranks, 1e-12)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("shapes", [[(2,), (3,)], []])
def test_the_ring_of_a_list_refuses_shapes_that_differ(shapes):
    with pytest.raises(ValueError, match="tensors of one shape expected, not "):
        parallel.ring_all_reduce([torch.ones(shape) for shape in shapes])


# ---- Training ----


def reference():
    """The same two steps with torch's layers, loss and Adam: [(loss, gradients, values)]."""
    start = parallel.start_model(RECIPE, torch.device("cpu"))
    model = nn.Sequential(
        nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10)
    ).double()
    for ours, theirs in zip(model.parameters(), start.parameters(), strict=True):
        ours.data = theirs.data.clone()
    optimizer = torch.optim.Adam(model.parameters(), RECIPE.lr)
    images = draw(2, 7, 784, seed=50)
    labels = torch.arange(14).view(2, 7) % 10
    found = []
    for x, y in zip(images, labels, strict=True):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        values = [parameter.detach().clone() for parameter in model.parameters()]
        found.append((loss.detach(), gradients, values))
    return found


def part_of(way, rank, p, tensors):
    """What a rank has of six tensors (weights and biases, or their gradients), by torch's split."""
    if way == "tensor parallel":
        W1, b1, W2, b2, W3, b3 = tensors
        rows, neurons = W1.tensor_split(p)[rank], b1.tensor_split(p)[rank]
        return [rows, neurons, W2.tensor_split(p, dim=1)[rank], b2, W3, b3]
    if way == "pipeline":
        layers = torch.arange(3).tensor_split(p)[rank].tolist()
        return [tensors[2 * layer + i] for layer in layers for i in (0, 1)]
    return tensors


@pytest.mark.parametrize("way", parallel.WAYS)
def test_every_way_has_the_gradients_and_weights_of_one_large_batch(by_rank, way):
    p = len(by_rank)
    for step, (loss, gradients, values) in enumerate(reference()):
        for rank, results in enumerate(by_rank):
            found = results["training"][way][step]
            expected = part_of(way, rank, p, gradients)
            if way == "ZeRO-1":
                whole = torch.cat([gradient.flatten() for gradient in gradients])
                expected = [whole.tensor_split(p)[rank]]
            assert_equal([found["loss"]], [loss], 1e-12)
            assert_equal(found["grad"], expected, 1e-9)
            assert_equal(found["values"], part_of(way, rank, p, values), 1e-8)


def test_what_is_held_and_sent_is_what_the_formulas_say(by_rank):
    p = len(by_rank)
    for way in parallel.WAYS:
        if way == "DistributedDataParallel":
            continue
        found = [results["training"][way][0] for results in by_rank]
        expected = [parallel.by_formula(way, rank, p, RECIPE) for rank in range(p)]
        for quantity in parallel.QUANTITIES:
            measured = sum(record[quantity] for record in found)
            formula = sum(bytes_of[quantity] for bytes_of in expected)
            assert measured == pytest.approx(formula, rel=1e-9), (way, quantity)
            for record, bytes_of in zip(found, expected, strict=True):  # p need not divide it
                near = {"rel": 0.02, "abs": 784 * 8}
                if way != "data parallel" or quantity != "activations":
                    assert record[quantity] == pytest.approx(bytes_of[quantity], **near)


def test_attention_over_ranks_is_the_whole_layer(by_rank):
    for name in LAYERS:
        expected = attention_run(attention_layer(name))
        for results in by_rank:
            assert_equal(results["attention"][name], expected, 1e-12)


def test_the_programs_own_checks_agree(by_rank):
    for results in by_rank:
        assert max(results["checks"]) < 1e-12


def alone(size=1, rank=0):
    return SimpleNamespace(rank=rank, size=size)


def test_what_cannot_be_split_is_said():
    model = parallel.start_model(RECIPE, torch.device("cpu"))
    with pytest.raises(ValueError, match="3 layers cannot be split over 4 ranks"):
        parallel.Pipeline(model, alone(4), RECIPE)
    with pytest.raises(ValueError, match="7 images cannot be split over 8 ranks"):
        parallel.DataParallel(model, alone(8), RECIPE).step(draw(7, 784), torch.arange(7))
    with pytest.raises(ValueError, match=r"128 units of 1 output\(s\) .* over 129 ranks"):
        parallel.TensorParallel(model, alone(129), RECIPE)
    with pytest.raises(ValueError, match=r"3 units of 8 output\(s\) cannot be split over 4"):
        parallel.parallel_attention(attention_layer("grouped"), alone(4))
    relative = GroupedQueryAttention(12, 3, 3, position="relative")
    with pytest.raises(ValueError, match="position='relative': they are not split"):
        parallel.parallel_attention(relative, alone(2))
    with pytest.raises(ValueError, match=r"7 images do not make 8 micro-batches"):
        parallel.Recipe(batch_size=7, n_micro=8).check()
    with pytest.raises(ValueError, match=r"n_steps must be .* not 0"):
        parallel.Recipe(n_steps=0).check()


# ---- The short functions ----


@pytest.mark.parametrize(("n", "n_parts"), [(7, 3), (6, 3), (2, 5), (0, 2), (11, 1)])
def test_partition_is_tensor_splits(n, n_parts):
    parts = torch.arange(n).tensor_split(n_parts)
    found = [torch.arange(start, stop) for start, stop in parallel.partition(n, n_parts)]
    assert_equal(found, parts, 0)


def test_partition_refuses_other_numbers():
    with pytest.raises(ValueError, match=r"n_parts must be .* not 0"):
        parallel.partition(3, 0)
    with pytest.raises(ValueError, match="n must be a whole number of at least 0, not -1"):
        parallel.partition(-1, 2)


def test_buckets_hold_everything_once_backwards_and_no_more_than_the_limit():
    sizes = [5, 3, 9, 1, 1, 4, 2]
    for limit in range(1, 30):
        found = parallel.buckets(sizes, limit)
        assert list(itertools.chain(*found)) == [6, 5, 4, 3, 2, 1, 0]
        for bucket in found:
            assert sum(sizes[i] for i in bucket) <= limit or len(bucket) == 1
        for one, two in itertools.pairwise(found):  # none was closed too early
            assert sum(sizes[i] for i in one) + sizes[two[0]] > limit
    assert parallel.buckets([], 5) == []


@pytest.mark.parametrize(("n_ranks", "unit"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 1)])
def test_columns_lie_side_by_side_and_rows_add_up(n_ranks, unit):
    x = draw(3, 5)
    W1, b1 = draw(8, 5, seed=1), draw(8, seed=2)
    W2, b2 = draw(7, 8, seed=3), draw(7, seed=4)
    hidden = [F.linear(x, *part) for part in parallel.column_split(W1, b1, n_ranks, unit)]
    assert_equal([torch.cat(hidden, 1)], [F.linear(x, W1, b1)], 1e-12)
    assert all(part.shape[1] % unit == 0 for part in hidden)
    rows = parallel.row_split(W2, n_ranks, unit)
    y = sum(part.relu() @ row.T for part, row in zip(hidden, rows, strict=True)) + b2
    assert_equal([y], [F.linear(F.linear(x, W1, b1).relu(), W2, b2)], 1e-12)


@pytest.mark.parametrize(("p", "m"), [(1, 1), (1, 4), (2, 3), (3, 2), (4, 8), (5, 5), (4, 1)])
def test_schedules_wait_as_long_as_the_formula_says(p, m):
    one_by_one = [parallel.one_forward_one_backward(stage, p, m) for stage in range(p)]
    for orders in ([parallel.gpipe(m)] * p, one_by_one):
        rows = parallel.timetable(orders)
        clock = {}
        for stage, row in enumerate(rows):
            assert [operation for operation in row if operation] == orders[stage]
            assert sorted(orders[stage]) == [(kind, i) for kind in "BF" for i in range(m)]
            assert row.count(None) / len(row) == pytest.approx(parallel.bubble(p, m))
            clock |= {(stage, *operation): i for i, operation in enumerate(row) if operation}
        for stage, micro in itertools.product(range(p), range(m)):
            assert clock[stage, "F", micro] < clock[stage, "B", micro]
            if stage:
                assert clock[stage - 1, "F", micro] < clock[stage, "F", micro]
                assert clock[stage, "B", micro] < clock[stage - 1, "B", micro]
    assert parallel.most_kept(parallel.gpipe(m)) == m
    assert [parallel.most_kept(order) for order in one_by_one] == [
        min(m, p - stage) for stage in range(p)
    ]


def test_a_timetable_that_would_wait_forever_is_refused():
    with pytest.raises(ValueError, match=r"wait forever.*\{0: \('B', 0\), 1: \('F', 1\)\}"):
        parallel.timetable([[("F", 0), ("B", 0), ("F", 1)], [("F", 1), ("F", 0), ("B", 0)]])


# ---- The program ----


def start_as_torchrun_does(rank, n_ranks, port, out):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"WORLD_SIZE": str(n_ranks), "LOCAL_WORLD_SIZE": str(n_ranks)}
    os.environ["MASTER_PORT"] = str(port)
    sys.exit(parallel.main(steps=3, batch_size=9, device="cpu", out=out))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_train_and_a_plain_start_shows_it(tmp_path, capsys):
    run_processes(start_as_torchrun_does, 2, free_port(), tmp_path)
    runs = pd.read_csv(tmp_path / "parallel_runs.csv")
    assert runs["experiment"].tolist() == parallel.ORDER
    compared = runs["compared_with"].notna()
    assert compared.sum() == len(parallel.ORDER) - 1
    assert (runs.loc[compared, "largest_difference"] < 1e-9).all()
    assert (runs["value"] == "2 ranks").all()
    assert (runs["backend"] == "gloo").all()
    history = pd.read_csv(tmp_path / "parallel_history.csv")
    for _, rows in history.groupby("step"):
        assert len(rows) == len(parallel.WAYS)
        assert rows["train_loss"].max() == pytest.approx(rows["train_loss"].min())

    assert parallel.main(out=tmp_path) == 0
    printed = capsys.readouterr().out
    assert parallel.COMMAND in printed
    assert printed.count("| pipeline") == 3  # one difference, two ranks
    assert {path.name for path in tmp_path.iterdir()} == {
        *(f"parallel_{table}.csv" for table in ("runs", "costs", "history")),
        *("parallel_schedule.png", "parallel_memory_2_ranks.png"),
    }


def test_before_the_first_training_the_command_is_said(tmp_path, capsys):
    assert parallel.main(out=tmp_path) == 0
    assert f"Nothing trained yet: {parallel.COMMAND}" in capsys.readouterr().out


def test_a_gpu_that_is_not_there_and_bad_sizes_are_said_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "99")
    with pytest.raises(ValueError, match=r"--device cuda: .* GPUs for 99 ranks"):
        parallel.connect("cuda")
    assert parallel.main(batch_size=2, micro_batches=3, out=tmp_path) == 1
    assert "2 images do not make 3 micro-batches" in capsys.readouterr().err
