"""Training on several GPUs and machines by hand: ring, data, ZeRO, tensor, pipeline (并行训练).

    torchrun --nproc-per-node=2 -m interview.parallel    trains stage 1's network each way, 1 min
    python -m interview.parallel                         tables and pictures of what is saved
    torchrun … -m interview.parallel --out DIR           the same into DIR

On several machines (多机多卡) the same line is started on each, here on two with eight GPUs:

    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-id=7 \\
        --rdzv-endpoint=first-machine:29500 -m interview.parallel

Read `ring_all_reduce` first, then `DataParallel.step` and `Zero1.update`: two halves of one ring.
nccl carries the numbers where every rank has a GPU of its own, else gloo on the CPU. Over gloo two
and three ranks were run, over nccl one rank only: two over nccl never were. Two ranks on two cores
show that the results are right. They show nothing about speed: no time here is a claim.
Letters: p ranks (进程), N parameters, B images in a batch, m micro-batches, D features.

What a rank holds of N parameters with Adam, and the numbers it sends in a step:

              parameters  gradients  optimizer  sends
    data      N           N          2 N        2 (p − 1)/p · N
    ZeRO-1    N           N          2 N / p    2 (p − 1)/p · N
    tensor    ≈ N / p     ≈ N / p    ≈ 2 N / p  2 (p − 1)/p · B D for every all-reduce
    pipeline  ≈ N / p     ≈ N / p    ≈ 2 N / p  B D to each neighbour

1. Ring all-reduce (环形 all-reduce)
   Asked     "Every rank has a vector, every rank wants the sum. How, and how many bytes?"
             「每个进程有一个向量，都要得到总和。怎么做？通信量是多少？」
   Idea      Cut the vector into p chunks, and pass chunks around a ring. Reduce-scatter: p − 1
             times send a chunk to the next rank, and add what comes; then rank r has the whole sum
             of chunk r. All-gather: p − 1 times pass the finished chunks on.
   Cost      Each rank sends 2 (p − 1)/p · N numbers, less than 2 N for any p, in 2 (p − 1) steps.
   追问      Why not to one rank and back? That rank would receive (p − 1) N. When is a ring bad?
             Short vectors and many ranks: latency grows with p; a tree has log p steps. Do all
             ranks get the same bits? Yes: each chunk is added up once, and then copied.
   Mistakes  Everyone sends, then receives: with blocking calls that is a deadlock (死锁). In which
             step which chunk: write the table for p = 3. Vectors that p does not divide.

2. Data parallel (数据并行)
   Asked     "How does DistributedDataParallel work? What differs from one large batch?"
             「DDP 是怎样工作的？和单卡大 batch 有什么区别？」
   Idea      Every rank has the whole network and a part of the batch. Gradients are linear in the
             examples: sum them over the ranks, and every rank takes the same step.
   Cost      Memory as on one device but for the activations: B / p. Sends 2 (p − 1)/p · N.
   追问      Why buckets (分桶)? One call for many small tensors, and the last layers' bucket can
             travel while earlier layers still go backward. Nothing differs from one large batch?
             Batch norm (each rank its own statistics) and dropout do. Gradient accumulation? No
             all-reduce before the last part (no_sync). Learning rate? The batch is p times as
             large; so often is the rate with SGD (with Adam rather √p), after a warm-up.
   Mistakes  The mean of means where parts differ in size. Other initial weights on each rank: DDP
             sends rank 0's. The same images on every rank (DistributedSampler without set_epoch).

3. ZeRO: sharded optimizer state (优化器状态分片)
   Asked     "What do ZeRO-1, 2 and 3 shard? What does each cost in communication?"
             「ZeRO 三个阶段分别切分什么？通信量各是多少？」
   Idea      Adam's two averages are the same on every rank: let each keep 1/p of them. Stop the
             ring half-way: after the reduce-scatter rank r has the gradient of its part, updates
             that part, and the all-gather carries the new parameters instead of gradients.
   Cost      Sends what data parallel sends. Optimizer state 2 N / p.
   追问      Stage 2 keeps 1/p of the gradients too, for the same traffic; stage 3 (FSDP) 1/p of the
             parameters, gathered for each layer forward and backward: 3/2 of the traffic. Bytes a
             parameter in mixed precision? 2 + 2 + 12 (weight, gradient, float32 copy and two
             averages); ZeRO-1: 4 + 12/p. What breaks? All that needs the whole gradient, such as
             clipping by its norm: sum the squares over the ranks.
   Mistakes  "ZeRO shards activations." "ZeRO-1 costs more traffic."

4. Tensor parallel (张量并行)
   Asked     "Split an MLP and an attention layer over ranks. Where must they communicate?"
             「把 MLP 和注意力切到多张卡上。哪里需要通信？」
   Idea      y = relu(x W₁) W₂. W₁ by columns: each rank computes some neurons, and relu needs no
             others. W₂ by rows: each rank's product is a summand of y, and one all-reduce adds
             them. Backward the sum is where x came in. Attention: heads are the columns of W_q,
             W_k, W_v and the rows of W_o.
   Cost      Of a Transformer's block two all-reduces of (B, T, D) forward, two backward, and
             nothing can be computed meanwhile: it wants the fastest wire.
   追问      Why not W₁ by rows? relu(a + b) ≠ relu(a) + relu(b): it would need a sum in between.
             Fewer key/value heads than ranks (GQA)? They are copied. Norms and dropout? On every
             rank the same; sequence parallel splits them by tokens. Embedding and loss? By
             vocabulary; the softmax needs the maximum and the sum over ranks.
   Mistakes  nn.Linear holds (out, in): its columns are the *rows* of weight. The second layer's
             bias on every rank before the sum counts p times. No sum of the gradient in x.

5. Pipeline parallel (流水线并行)
   Asked     "What is the bubble of a pipeline, and how does one make it smaller?"
             「流水线的气泡是什么？怎样减小？」
   Idea      Rank s has some layers. It receives activations from s − 1 and sends to s + 1; backward
             the gradients go the other way. Micro-batches keep the stages busy: GPipe does all
             forwards, then all backwards, and steps once. Gradients add up over micro-batches.
   Cost      Idle share (p − 1)/(m + p − 1). GPipe keeps the activations of m micro-batches. Sends
             B D each way, however many layers a stage has.
   追问      1F1B? The same bubble, but stage s keeps p − s micro-batches instead of m. Interleaved
             stages: v parts a rank, bubble / v, traffic · v. Why not m = B? Small products are
             slow. Recompute activations (重计算)? A third more arithmetic, far less memory.
   Mistakes  A step after every micro-batch. The mean of means of unequal micro-batches. Batch norm
             sees micro-batches.

6. Several machines (多机多卡)
   Asked     "64 machines with 8 GPUs each and a network too large for one. What goes where?"
             「64 台机器，每台 8 卡，模型单卡放不下。怎样切分？」
   Idea      The more a way talks, the faster its wire. Tensor parallel (every layer) inside a
             machine, over NVLink; pipeline (every stage) between machines; data parallel or ZeRO
             outermost: once a step, while the backward pass still runs. 8 · 8 · 8 = 512 ranks.
   Cost      The slowest rank sets the pace of all.
   追问      RANK, LOCAL_RANK, WORLD_SIZE? Of all, in the machine, how many. What does rendezvous
             do? It gives ranks and finds the address of rank 0. A rank dies? All are started again
             from a checkpoint; torchrun does it (--max-restarts).
   Mistakes  Every rank writes the checkpoint. cuda:RANK instead of cuda:LOCAL_RANK. A collective
             that one rank does not reach: all wait.
"""

import copy
import itertools
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import metrics
import stage1_mlp
from interview import check_whole
from interview.optimizers import Adam
from stage1_mlp import MLP, Split
from stage3_attention import GroupedQueryAttention, MultiHeadAttention

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "figures" / "interview"
COMMAND = "torchrun --nproc-per-node=2 -m interview.parallel"


# ---- Parts ----------------------------------------------------------------------------------


def partition(n: int, n_parts: int) -> list[tuple[int, int]]:
    """Where each of n_parts parts of n things starts and stops; the first n % n_parts get one more.

    7 in 3 parts: (0, 3), (3, 5), (5, 7). Some are empty if n < n_parts.
    """
    check_whole(0, n=n)
    check_whole(n_parts=n_parts)
    size, n_larger = divmod(n, n_parts)
    bounds = []
    start = 0
    for part in range(n_parts):
        stop = start + size + (part < n_larger)
        bounds.append((start, stop))
        start = stop
    return bounds


def check_enough(n: int, what: str, n_ranks: int) -> None:
    """ValueError if not every rank can have one of these n things."""
    if n < n_ranks:
        raise ValueError(f"{n} {what} cannot be split over {n_ranks} ranks")


# ---- 1. Ring all-reduce ---------------------------------------------------------------------
# A step is one message: rank r sends a chunk to rank r + 1 and receives another from rank r − 1.


def reduce_scatter_chunks(rank: int, step: int, n_ranks: int) -> tuple[int, int]:
    """Numbers of the chunks that a rank sends and receives; after p − 1 steps it has chunk `rank`.

    p = 3      step 0           step 1
    rank 0     sends 2, adds 1  sends 1, adds 0: the sum of all
    rank 1     sends 0, adds 2  sends 2, adds 1
    rank 2     sends 1, adds 0  sends 0, adds 2
    """
    return (rank - step - 1) % n_ranks, (rank - step - 2) % n_ranks


def all_gather_chunks(rank: int, step: int, n_ranks: int) -> tuple[int, int]:
    """The same for the second half, which starts with chunk `rank` finished on each rank."""
    return (rank - step) % n_ranks, (rank - step - 1) % n_ranks


def ring_all_reduce(tensors: list[Tensor]) -> list[Tensor]:
    """The sum of p tensors of one shape, for each of p ranks, by messages around a ring.

    The whiteboard's version, in one process: list entry r is what rank r has. `Ranks` does the
    same with real messages. The tensors given stay as they are. ValueError if shapes differ.
    """
    n_ranks = len(tensors)
    shapes = [tuple(x.shape) for x in tensors]
    if len(set(shapes)) != 1:
        raise ValueError(f"tensors of one shape expected, not {shapes}")
    vectors = [x.flatten().clone() for x in tensors]
    chunks = [x.tensor_split(n_ranks) for x in vectors]  # chunks[rank][i] is a view

    for step in range(n_ranks - 1):  # reduce-scatter
        messages = []
        for rank in range(n_ranks):
            sent, _ = reduce_scatter_chunks(rank, step, n_ranks)
            messages.append(chunks[rank][sent].clone())
        for rank in range(n_ranks):
            _, received = reduce_scatter_chunks(rank, step, n_ranks)
            chunks[rank][received].add_(messages[rank - 1])

    for step in range(n_ranks - 1):  # all-gather
        for rank in range(n_ranks):
            _, received = all_gather_chunks(rank, step, n_ranks)
            chunks[rank][received].copy_(chunks[rank - 1][received])
    return [x.view(shape) for x, shape in zip(vectors, shapes, strict=True)]


class Ranks:
    """This process among all: its messages, counted, and the collectives made of them (集合通信).

    torch.distributed must be initialised. `bytes_sent` is what this rank has sent so far.
    """

    def __init__(self):
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.bytes_sent = 0

    def send(self, x: Tensor, rank: int) -> None:
        dist.send(x.contiguous(), rank)
        self.bytes_sent += x.nbytes

    def receive(self, x: Tensor, rank: int) -> Tensor:
        """x, overwritten by what the other rank sends."""
        dist.recv(x, rank)
        return x

    def pass_on(self, sent: Tensor, received: Tensor) -> None:
        """Send to the next rank of the ring, and receive from the one before, at the same time."""
        next_rank = (self.rank + 1) % self.size
        rank_before = (self.rank - 1) % self.size
        messages = []
        if sent.numel():  # a vector shorter than p has empty chunks
            messages.append(dist.P2POp(dist.isend, sent, next_rank))
        if received.numel():
            messages.append(dist.P2POp(dist.irecv, received, rank_before))
        for work in dist.batch_isend_irecv(messages) if messages else []:
            work.wait()
        self.bytes_sent += sent.nbytes

    def reduce_scatter(self, vector: Tensor) -> None:
        """Leave the sum over ranks in this rank's part of the vector (N,), partial sums elsewhere.

        Parts are those of `partition`, as tensor_split has them.
        """
        chunks = vector.tensor_split(self.size)  # views
        for step in range(self.size - 1):
            sent, received = reduce_scatter_chunks(self.rank, step, self.size)
            summand = torch.empty_like(chunks[received])
            self.pass_on(chunks[sent], summand)
            chunks[received].add_(summand)

    def all_gather(self, vector: Tensor) -> None:
        """Overwrite the vector (N,), but for this rank's part, by the parts of the others."""
        chunks = vector.tensor_split(self.size)
        for step in range(self.size - 1):
            sent, received = all_gather_chunks(self.rank, step, self.size)
            self.pass_on(chunks[sent], chunks[received])

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, a new tensor; as dist.all_reduce, which overwrites x."""
        vector = x.detach().flatten().clone()
        self.reduce_scatter(vector)
        self.all_gather(vector)
        return vector.view(x.shape)


# ---- What all ways to train share -----------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """All that the trainings depend on; the same for every way."""

    n_steps: int = 300
    # images in a step, over all ranks together
    batch_size: int = 128
    # micro-batches in a step of the pipeline
    n_micro: int = 4
    # of Adam
    lr: float = 1e-3
    # gradients are summed in buckets of at most so many bytes
    bucket_bytes: int = 2**19
    # of weights and batch order
    seed: int = 0

    def check(self) -> None:
        check_whole(n_steps=self.n_steps, batch_size=self.batch_size, n_micro=self.n_micro)
        check_whole(bucket_bytes=self.bucket_bytes)
        if self.n_micro > self.batch_size:
            few = f"{self.batch_size} images do not make {self.n_micro} micro-batches"
            raise ValueError(few)


class Trainer:
    """One process that trains alone: what the others are compared with.

    `module` is what this rank holds of the network, `optimizer` changes it, and `step` trains on a
    batch that every rank knows whole.
    """

    def __init__(self, model: MLP, ranks: Ranks, recipe: Recipe):
        self.ranks = ranks
        self.recipe = recipe
        self.module = self.part_of(model, ranks)
        self.optimizer = Adam(self.module.parameters(), recipe.lr)
        self.kept = {}  # address -> bytes of what autograd kept in the last step

    @staticmethod
    def part_of(model: MLP, ranks: Ranks) -> nn.Module:
        """What a rank holds of a network."""
        return model

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Train on one batch; this rank's share of its loss, so that the ranks' add up to it."""
        self.clear()
        loss = part_of_loss(self.forward(images), labels, len(images))
        loss.backward()
        self.optimizer.step()
        return loss.detach() / self.ranks.size  # every rank has all of it

    def clear(self) -> None:
        self.kept.clear()
        self.module.zero_grad()

    def forward(self, x: Tensor) -> Tensor:
        """What the module makes of x, with a note of all that autograd keeps for the way back."""
        with torch.autograd.graph.saved_tensors_hooks(self.keep, lambda kept: kept):
            return self.module(x)

    def keep(self, tensor: Tensor) -> Tensor:
        self.kept[tensor.data_ptr()] = tensor.nbytes
        return tensor.detach()

    def memory(self) -> dict[str, int]:
        """Bytes on this rank after a step, of the tensors that are there."""
        parameters = list(self.module.parameters())
        addresses = {parameter.data_ptr() for parameter in parameters}
        states = [value for state in self.optimizer.state for value in state.values()]
        activations = [n for address, n in self.kept.items() if address not in addresses]
        return {
            "parameters": sum(parameter.nbytes for parameter in parameters),
            "gradients": sum(parameter.grad.nbytes for parameter in parameters),
            "optimizer state": sum(value.nbytes for value in states if isinstance(value, Tensor)),
            "activations": sum(activations),
        }


def part_of_loss(logits: Tensor, labels: Tensor, batch_size: int) -> Tensor:
    """What these images add to the mean cross-entropy of a batch of batch_size.

    Not the mean of means: the parts add up to the batch's loss whatever their sizes.
    """
    return stage1_mlp.cross_entropy(logits, labels) * len(labels) / batch_size


# ---- 2. Data parallel -----------------------------------------------------------------------


def buckets(sizes: list[int], limit: int) -> list[list[int]]:
    """Indices of tensors of these sizes, in buckets of at most `limit` in all, the last one first.

    The last layer's gradients are the first to be known. A tensor above the limit is alone.
    """
    found = []
    filled = 0
    for index in reversed(range(len(sizes))):
        if not found or filled + sizes[index] > limit:
            found.append([])
            filled = 0
        found[-1].append(index)
        filled += sizes[index]
    return found


def sum_gradients(parameters: list[nn.Parameter], ranks: Ranks, bucket_bytes: int) -> None:
    """Replace every gradient by its sum over the ranks, a bucket at a time."""
    sizes = [parameter.grad.nbytes for parameter in parameters]
    for bucket in buckets(sizes, bucket_bytes):
        gradients = [parameters[index].grad for index in bucket]
        vector = torch.cat([gradient.flatten() for gradient in gradients])
        vector = ranks.all_reduce(vector)
        pieces = vector.split([gradient.numel() for gradient in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))


class DataParallel(Trainer):
    """Every rank has the whole network and a part of the batch (数据并行)."""

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        own_images, own_labels = self.own_part(images, labels)
        self.clear()
        loss = part_of_loss(self.forward(own_images), own_labels, len(images))
        loss.backward()
        self.update()
        return loss.detach()

    def own_part(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        check_enough(len(images), "images", self.ranks.size)
        start, stop = partition(len(images), self.ranks.size)[self.ranks.rank]
        return images[start:stop], labels[start:stop]

    def update(self) -> None:
        sum_gradients(list(self.module.parameters()), self.ranks, self.recipe.bucket_bytes)
        self.optimizer.step()


class TorchDataParallel(DataParallel):
    """The same with torch's DistributedDataParallel, to compare with."""

    @staticmethod
    def part_of(model: MLP, ranks: Ranks) -> nn.Module:
        return DistributedDataParallel(model)

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        own_images, own_labels = self.own_part(images, labels)
        self.clear()
        loss = part_of_loss(self.module(own_images), own_labels, len(images))
        (loss * self.ranks.size).backward()  # it takes the mean over ranks, where a sum is meant
        self.optimizer.step()
        return loss.detach()


# ---- 3. ZeRO-1 ------------------------------------------------------------------------------


def flattened(parameters: list[nn.Parameter]) -> Tensor:
    """All parameters in one vector (N,), of which they become views: both change together."""
    vector = torch.cat([parameter.detach().flatten() for parameter in parameters])
    pieces = vector.split([parameter.numel() for parameter in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.data = piece.view_as(parameter)
    return vector


class Zero1(DataParallel):
    """Data parallel, but each rank keeps the optimizer state of its part of the parameters alone.

    (ZeRO stage 1; Rajbhandari et al. 2020, section 5.1)
    """

    def __init__(self, model: MLP, ranks: Ranks, recipe: Recipe):
        super().__init__(model, ranks, recipe)
        self.vector = flattened(list(self.module.parameters()))  # (N,)
        self.start, self.stop = partition(len(self.vector), ranks.size)[ranks.rank]
        self.own = self.vector[self.start : self.stop]  # (N / p,), a view
        self.optimizer = Adam([self.own], recipe.lr)

    def update(self) -> None:
        gradient = torch.cat([parameter.grad.flatten() for parameter in self.module.parameters()])
        self.ranks.reduce_scatter(gradient)  # (N,), of which the own part is the sum
        self.own.grad = gradient[self.start : self.stop]
        self.optimizer.step()
        self.ranks.all_gather(self.vector)  # the other ranks' new parameters


# ---- 4. Tensor parallel ---------------------------------------------------------------------


def column_split(
    weight: Tensor, bias: Tensor, n_ranks: int, unit: int = 1
) -> list[tuple[Tensor, Tensor]]:
    """Split the outputs of a linear layer over ranks: a (weight, bias) for each.

    weight (O, I) as nn.Linear holds it, bias (O,). The paper's columns are the rows of this weight.
    `unit` outputs stay together, such as those of a head. ValueError if some rank would get none.
    """
    check_enough(len(weight) // unit, f"units of {unit} output(s)", n_ranks)
    bounds = partition(len(weight) // unit, n_ranks)
    places = [slice(start * unit, stop * unit) for start, stop in bounds]
    return [(weight[place], bias[place]) for place in places]


def row_split(weight: Tensor, n_ranks: int, unit: int = 1) -> list[Tensor]:
    """Split the inputs of a linear layer over ranks: a weight for each, (O, I) -> (O, I / p).

    The bias is nobody's part: it is added once, after the sum of the ranks' products.
    """
    check_enough(weight.shape[1] // unit, f"units of {unit} input(s)", n_ranks)
    bounds = partition(weight.shape[1] // unit, n_ranks)
    return [weight[:, start * unit : stop * unit] for start, stop in bounds]


class CopyToRanks(torch.autograd.Function):
    """Forward x; backward the sum of the ranks' gradients, as each used x (Megatron's f)."""

    @staticmethod
    def forward(ctx, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.all_reduce(gradient), None


class SumOverRanks(torch.autograd.Function):
    """Forward the sum of the ranks' x; backward the gradient as it comes (Megatron's g)."""

    @staticmethod
    def forward(ctx, x: Tensor, ranks: Ranks) -> Tensor:
        return ranks.all_reduce(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class ColumnParallelLinear(nn.Module):
    """This rank's outputs of a linear layer: x (…, I), the same on all ranks -> (…, O / p)."""

    def __init__(self, layer: nn.Linear, ranks: Ranks, unit: int = 1):
        super().__init__()
        parts = column_split(layer.weight.detach(), layer.bias.detach(), ranks.size, unit)
        weight, bias = parts[ranks.rank]
        self.weight = nn.Parameter(weight.clone())
        self.bias = nn.Parameter(bias.clone())
        self.in_features = layer.in_features
        self.ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(CopyToRanks.apply(x, self.ranks), self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """A linear layer whose inputs lie on the ranks: x (…, I / p) -> (…, O), the same on all."""

    def __init__(self, layer: nn.Linear, ranks: Ranks, unit: int = 1):
        super().__init__()
        parts = row_split(layer.weight.detach(), ranks.size, unit)
        self.weight = nn.Parameter(parts[ranks.rank].clone())
        self.bias = nn.Parameter(layer.bias.detach().clone())
        self.ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        summand = F.linear(x, self.weight)  # (…, O)
        return SumOverRanks.apply(summand, self.ranks) + self.bias


def parallel_attention(
    layer: MultiHeadAttention | GroupedQueryAttention, ranks: Ranks
) -> MultiHeadAttention | GroupedQueryAttention:
    """Stage 3's layer with the heads split over the ranks: x and the output are whole on each.

    Only its four linear layers and its numbers of heads change. A key/value head stays together
    with the query heads that read it. ValueError if there are fewer of them than ranks.
    """
    n_kv_heads = getattr(layer, "n_kv_heads", layer.n_heads)
    if getattr(layer, "position", "none") == "relative":
        raise ValueError("all heads share the vectors of position='relative': they are not split")
    d_head = layer.W_q.in_features // layer.n_heads
    n_readers = layer.n_heads // n_kv_heads  # query heads of a key/value head
    part = copy.copy(layer)
    part._modules = {}  # the copy's own
    part.W_q = ColumnParallelLinear(layer.W_q, ranks, unit=n_readers * d_head)
    part.W_k = ColumnParallelLinear(layer.W_k, ranks, unit=d_head)
    part.W_v = ColumnParallelLinear(layer.W_v, ranks, unit=d_head)
    part.W_o = RowParallelLinear(layer.W_o, ranks, unit=n_readers * d_head)
    start, stop = partition(n_kv_heads, ranks.size)[ranks.rank]
    part.n_kv_heads = stop - start
    part.n_heads = part.n_kv_heads * n_readers
    return part


class TensorParallel(Trainer):
    """Every rank has some neurons of the first hidden layer, and sees the whole batch (张量并行).

    The second layer is split by its inputs; the last, a small one, is whole on every rank. All
    that differs from one process is the layers: the step is the same.
    """

    @staticmethod
    def part_of(model: MLP, ranks: Ranks) -> nn.Module:
        part = copy.deepcopy(model)
        part.layers[0] = ColumnParallelLinear(model.layers[0], ranks)
        part.layers[1] = RowParallelLinear(model.layers[1], ranks)
        return part


# ---- 5. Pipeline parallel -------------------------------------------------------------------


def gpipe(n_micro: int) -> list[tuple[str, int]]:
    """What every stage does in a step: all forwards ("F", i), then all backwards ("B", i).

    (GPipe; Huang et al. 2019) The last forward comes back first.
    """
    forwards = [("F", micro) for micro in range(n_micro)]
    backwards = [("B", micro) for micro in reversed(range(n_micro))]
    return forwards + backwards


def one_forward_one_backward(stage: int, n_stages: int, n_micro: int) -> list[tuple[str, int]]:
    """What a stage does in a step by 1F1B: backward as soon as it can, so that little is kept.

    p − 1 − stage forwards first, then a forward and a backward in turn, then the backwards that
    are left. (Narayanan et al. 2019, 2021)
    """
    n_first = min(n_stages - 1 - stage, n_micro)
    order = [("F", micro) for micro in range(n_first)]
    for micro in range(n_first, n_micro):
        order.append(("F", micro))
        order.append(("B", micro - n_first))
    order += [("B", micro) for micro in range(n_micro - n_first, n_micro)]
    return order


def timetable(orders: list[list[tuple[str, int]]]) -> list[list[tuple[str, int] | None]]:
    """What each stage does at each clock, None where it waits; all operations take one clock.

    A forward needs that of the stage before, a backward that of the stage behind, at an earlier
    clock. ValueError if stages would wait for one another forever.
    """
    queues = [deque(order) for order in orders]
    rows = [[] for _ in orders]
    done = set()
    while any(queues):
        started = []
        for stage, queue in enumerate(queues):
            operation = None
            if queue:
                kind, micro = queue[0]
                neighbour = stage - 1 if kind == "F" else stage + 1
                needed = (neighbour, kind, micro)
                if needed in done or neighbour in (-1, len(orders)):
                    operation = queue.popleft()
                    started.append((stage, kind, micro))
            rows[stage].append(operation)
        if not started:
            waiting = {stage: queue[0] for stage, queue in enumerate(queues) if queue}
            raise ValueError(f"these wait forever, stage by stage: {waiting}")
        done.update(started)
    return rows


def bubble(n_stages: int, n_micro: int) -> float:
    """The share of its time that a stage waits, with GPipe and with 1F1B (气泡率)."""
    return (n_stages - 1) / (n_micro + n_stages - 1)


def most_kept(order: list[tuple[str, int]]) -> int:
    """The largest number of micro-batches whose activations a stage holds at one time."""
    changes = [1 if kind == "F" else -1 for kind, _ in order]
    return max(itertools.accumulate(changes))


class Stage(nn.Module):
    """Some neighbouring layers of an MLP, with ReLU after each but the network's last."""

    def __init__(self, model: MLP, start: int, stop: int):
        super().__init__()
        self.layers = model.layers[start:stop]
        self.is_last = stop == len(model.layers)

    @property
    def n_in(self) -> int:
        return self.layers[0].in_features

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        x = self.layers[-1](x)
        return x if self.is_last else F.relu(x)


class Pipeline(Trainer):
    """Every rank has some layers, and micro-batches go through all ranks (流水线并行)."""

    @staticmethod
    def part_of(model: MLP, ranks: Ranks) -> nn.Module:
        check_enough(len(model.layers), "layers", ranks.size)
        start, stop = partition(len(model.layers), ranks.size)[ranks.rank]
        return Stage(model, start, stop)

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        bounds = partition(len(images), self.recipe.n_micro)
        self.clear()
        inputs = {}  # micro -> what came from the stage before
        outputs = {}  # micro -> what went to the stage behind; of the last stage, the loss
        for kind, micro in gpipe(self.recipe.n_micro):
            own = slice(*bounds[micro])
            if kind == "F":
                inputs[micro] = self.input_of(images[own])
                outputs[micro] = self.forward(inputs[micro])
                if self.module.is_last:
                    outputs[micro] = part_of_loss(outputs[micro], labels[own], len(images))
                else:
                    self.ranks.send(outputs[micro].detach(), self.ranks.rank + 1)
            else:
                self.backward(inputs.pop(micro), outputs[micro])
        self.optimizer.step()
        losses = outputs.values() if self.module.is_last else [images.new_zeros(())]
        return torch.stack([loss.detach() for loss in losses]).sum()

    def input_of(self, images: Tensor) -> Tensor:
        """The images on the first rank, elsewhere what the rank before makes of them."""
        if self.ranks.rank == 0:
            return images
        x = self.ranks.receive(images.new_empty(len(images), self.module.n_in), self.ranks.rank - 1)
        return x.requires_grad_()

    def backward(self, x: Tensor, output: Tensor) -> None:
        """Add to the gradients of the own layers, and hand the gradient in x to the rank before."""
        gradient = None  # of the loss in itself
        if not self.module.is_last:
            gradient = self.ranks.receive(torch.empty_like(output), self.ranks.rank + 1)
        output.backward(gradient)
        if self.ranks.rank > 0:
            self.ranks.send(x.grad, self.ranks.rank - 1)


# ---- By formula -----------------------------------------------------------------------------

WIDTHS = (784, 128, 256, 10)  # of stage 1's network
N_BYTES = 8  # of a number in float64
QUANTITIES = ("parameters", "gradients", "optimizer state", "activations", "sent a step")


def n_parameters(widths: tuple[int, ...]) -> int:
    return sum((n_in + 1) * n_out for n_in, n_out in itertools.pairwise(widths))


def by_formula(way: str, rank: int, p: int, recipe: Recipe) -> dict[str, float]:
    """Bytes that a rank holds and sends in a step, without a look at any tensor.

    Kept for the way back: the input of every layer, of ReLU its output, which is the next input.
    p need not divide anything: then this is a mean over ranks.
    """
    B = recipe.batch_size
    D_in, D_1, D_2, n_classes = WIDTHS
    N = n_parameters(WIDTHS)
    n_optimizer = 2 * N  # Adam's m and s
    n_activations = B * (D_in + D_1 + D_2)
    n_sent = 0
    ring = 2 * (p - 1) / p
    if way in ("data parallel", "ZeRO-1"):
        n_activations /= p
        n_sent = ring * N
    if way == "ZeRO-1":
        n_optimizer /= p
    if way == "tensor parallel":
        N = (D_in + 1) * D_1 / p + D_1 / p * D_2 + D_2 + (D_2 + 1) * n_classes
        n_optimizer = 2 * N
        n_activations = B * (D_in + D_1 / p + D_2)
        n_sent = ring * B * D_2  # the gradient in the images is not needed
    if way == "pipeline":
        start, stop = partition(len(WIDTHS) - 1, p)[rank]
        N = n_parameters(WIDTHS[start : stop + 1])
        n_optimizer = 2 * N
        n_activations = B * sum(WIDTHS[:-1][start : stop + 1])
        n_sent = B * (WIDTHS[start] if rank > 0 else 0)  # gradients
        n_sent += B * (WIDTHS[stop] if rank < p - 1 else 0)  # activations
    numbers = (N, N, n_optimizer, n_activations, n_sent)
    return {name: N_BYTES * n for name, n in zip(QUANTITIES, numbers, strict=True)}


# ---- Shown at work: training each way -------------------------------------------------------

WAYS = {
    "one process": Trainer,
    "data parallel": DataParallel,
    "DistributedDataParallel": TorchDataParallel,
    "ZeRO-1": Zero1,
    "tensor parallel": TensorParallel,
    "pipeline": Pipeline,
}
ORDER = [*WAYS, "ring all-reduce", "attention, heads over ranks"]


def start_model(recipe: Recipe, device: torch.device) -> MLP:
    """Stage 1's network in float64, with the same weights on every rank."""
    torch.manual_seed(recipe.seed)
    model = MLP(WIDTHS[1:-1])
    stage1_mlp.initialise(model, "kaiming")
    return model.to(device, torch.float64)


def train(trainer: Trainer, split: Split, recipe: Recipe) -> tuple[list[dict], dict[str, int]]:
    """Train by the recipe: rows of the loss, and the bytes held and sent in the first step.

    Every rank draws the same batches.
    """
    torch.manual_seed(recipe.seed)
    history = []
    batches = stage1_mlp.batches(len(split.images), recipe.batch_size, torch.device("cpu"))
    for step, batch in enumerate(itertools.islice(batches, recipe.n_steps), 1):
        batch = batch.to(split.images.device)
        sent_before = trainer.ranks.bytes_sent
        loss = trainer.step(split.images[batch].double(), split.labels[batch])
        if step == 1:
            measured = trainer.memory()
            measured["sent a step"] = trainer.ranks.bytes_sent - sent_before
        if step % math.ceil(recipe.n_steps / 12) == 0 or step == recipe.n_steps:
            dist.all_reduce(loss)
            history.append({"step": step, "train_loss": loss.item()})
    return history, measured


def largest_difference(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> float:
    """Of all numbers of two lists of tensors, on all ranks."""
    differences = [(a - b).abs().max() for a, b in zip(ours, theirs, strict=True)]
    largest = torch.stack(differences).max().detach()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


def ring_difference(ranks: Ranks, device: torch.device) -> float:
    """How far Ranks.all_reduce is from dist.all_reduce, on numbers that differ on every rank."""
    generator = torch.Generator().manual_seed(ranks.rank)
    x = torch.randn(10_007, generator=generator, dtype=torch.float64).to(device)  # a prime
    ours = ranks.all_reduce(x)
    dist.all_reduce(x)
    return largest_difference([ours], [x])


def attention_difference(ranks: Ranks, device: torch.device) -> float:
    """How far attention with its heads over ranks is from the whole layer.

    Output, gradient in x, and the weights after a step of gradient descent.
    """
    torch.manual_seed(0)
    n_heads = max(6, ranks.size)
    whole = MultiHeadAttention(8 * n_heads, n_heads).to(device, torch.float64)
    part = parallel_attention(whole, ranks)
    x = torch.randn(3, 7, 8 * n_heads, dtype=torch.float64).to(device)  # (B, T, D)
    results = []
    for layer in (part, whole):
        own_x = x.clone().requires_grad_()
        out, _ = layer(own_x, causal=True)
        out.square().sum().backward()
        torch.optim.SGD(layer.parameters(), lr=0.01).step()
        results.append([out, own_x.grad])
    ours, theirs = results
    ours += part.parameters()
    theirs += parallel_attention(whole, ranks).parameters()
    return largest_difference(ours, theirs)


def run_row(
    name: str, compared_with: str, difference: float | str, ranks: Ranks, **numbers
) -> dict:
    """A row of parallel_runs.csv; rank 0 prints what it says."""
    if ranks.rank == 0 and compared_with:
        print(f"  {name}: {difference:.1e} from {compared_with}", flush=True)
    row = {"compared_with": compared_with, "largest_difference": difference}
    return row | dict.fromkeys(("train_loss", "val_accuracy", "seconds"), "") | numbers


def measure(
    ranks: Ranks, data: stage1_mlp.Data, recipe: Recipe, device: torch.device
) -> dict[str, list[dict]]:
    """Train every way, and compare: rows {table: [row]}, the same on all ranks."""
    difference = ring_difference(ranks, device)
    runs = {"ring all-reduce": run_row("ring all-reduce", "dist.all_reduce", difference, ranks)}
    name = "attention, heads over ranks"
    difference = attention_difference(ranks, device)
    runs[name] = run_row(name, "the whole layer", difference, ranks)

    modules = {}
    history = []
    costs = []
    for way, kind in WAYS.items():
        try:
            trainer = kind(start_model(recipe, device), ranks, recipe)
        except ValueError as error:  # the same one on every rank
            if ranks.rank == 0:
                print(f"  {way} is left out: {error}", flush=True)
            continue
        start = time.perf_counter()
        logged, measured = train(trainer, data.train, recipe)
        numbers = {"train_loss": logged[-1]["train_loss"], "seconds": time.perf_counter() - start}
        modules[way] = trainer.module
        if way == "one process":
            compared_with = difference = ""
            val = Split(data.val.images.double(), data.val.labels)
            numbers["val_accuracy"] = stage1_mlp.evaluate(trainer.module, val)["accuracy"]
        else:
            is_torchs = way == "DistributedDataParallel"
            compared_with = "data parallel" if is_torchs else "one process"
            own_part = kind.part_of(modules[compared_with], ranks)
            difference = largest_difference(trainer.module.parameters(), own_part.parameters())
        runs[way] = run_row(way, compared_with, difference, ranks, **numbers)
        key = key_of(way, ranks, recipe)
        history += [key | row for row in logged]
        if way != "DistributedDataParallel":  # its messages are not counted
            costs += costs_of(key, measured, ranks, recipe)

    settings = {name: getattr(recipe, name) for name in ("n_steps", "batch_size", "n_micro", "lr")}
    settings |= {"parameters": n_parameters(WIDTHS), "backend": dist.get_backend()}
    settings |= stage1_mlp.origin_of_rows(device.type)
    rows = [key_of(name, ranks, recipe) | row | settings for name, row in runs.items()]
    return {"parallel_history": history, "parallel_costs": costs, "parallel_runs": rows}


def key_of(name: str, ranks: Ranks, recipe: Recipe) -> dict:
    return {"experiment": name, "value": ranks_of(ranks.size), "seed": recipe.seed}


def ranks_of(n_ranks: int) -> str:
    """How the tables name a number of ranks."""
    return "1 rank" if n_ranks == 1 else f"{n_ranks} ranks"


def costs_of(key: dict, measured: dict[str, int], ranks: Ranks, recipe: Recipe) -> list[dict]:
    """A row for every rank and quantity: bytes by formula, and bytes measured."""
    of_all_ranks = [None] * ranks.size
    dist.all_gather_object(of_all_ranks, measured)
    if key["experiment"] == "one process":  # they were all alike
        of_all_ranks = of_all_ranks[:1]
    rows = []
    for rank, found in enumerate(of_all_ranks):
        expected = by_formula(key["experiment"], rank, ranks.size, recipe)
        for quantity in QUANTITIES:
            row = key | {"rank": rank, "quantity": quantity}
            rows.append(row | {"formula": expected[quantity], "measured": found[quantity]})
    return rows


# ---- Tables and pictures --------------------------------------------------------------------


def costs_table(costs: pd.DataFrame) -> str:
    """Markdown: a line a rank of each way, in KiB what was measured and what the formula says."""
    lines = []
    for (way, rank), rows in costs.groupby(["experiment", "rank"], sort=False):
        line = {"way": way, "rank": rank}
        for row in rows.itertuples():
            line[row.quantity] = f"{row.measured / 1024:,.1f} / {row.formula / 1024:,.1f}"
        lines.append(line)
    return metrics.markdown(lines)


def runs_table(runs: pd.DataFrame) -> str:
    """Markdown: a line for everything that was compared, with the largest difference."""
    lines = []
    for row in runs.itertuples():
        if isinstance(row.compared_with, str):
            line = {"what": row.experiment, "compared with": row.compared_with}
            lines.append(line | {"largest difference": f"{row.largest_difference:.1e}"})
    return metrics.markdown(lines)


def draw_memory(path: Path, costs: pd.DataFrame, setting: str) -> None:
    """A bar for every rank of each way: what it holds, in MiB."""
    held = costs[costs["quantity"] != "sent a step"]
    ranks = list(held.groupby(["experiment", "rank"], sort=False))
    colors = metrics.colors_of(list(QUANTITIES[:-1]), ordered=False)
    title = "Who holds what of the 784-128-256-10 network with Adam?"
    note = f"{setting}, float64; measured"
    size = {"width": 11, "height": 0.42 * len(ranks) + 1.6}
    with metrics.picture(path, f"{title}\n({note})", **size) as axes:
        for place, (_, rows) in enumerate(ranks):
            left = 0.0
            for row in rows.itertuples():
                width = row.measured / 2**20
                label = row.quantity if place == 0 else None
                axes.barh(place, width, left=left, color=colors[row.quantity], label=label)
                left += width
            axes.text(left, place, f" {left:.2f}", va="center", fontsize=10)
        names = [f"{way}, rank {rank}" for (way, rank), _ in ranks]
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.margins(x=0.08)
        axes.set(xlabel="MiB on a rank: lower is better")
        metrics.legend_beside(axes)


def draw_schedules(path: Path, n_stages: int = 4, n_micro: int = 8) -> None:
    """What each stage does at each clock, with GPipe and with 1F1B."""
    schedules = {
        "GPipe: all forwards, then all backwards": [gpipe(n_micro)] * n_stages,
        "1F1B: a backward as soon as it can": [
            one_forward_one_backward(stage, n_stages, n_micro) for stage in range(n_stages)
        ],
    }
    colors = {"F": metrics.COLORS[5], "B": metrics.COLORS[4]}
    share = f"each stage waits {100 * bubble(n_stages, n_micro):.0f} % of the time"
    title = f"{n_stages} stages, {n_micro} micro-batches: {share}, with both"
    with metrics.picture(path, title, 2, 1, width=13, height=5.6, sharex=True) as panels:
        for axes, (name, orders) in zip(panels, schedules.items(), strict=True):
            for stage, row in enumerate(timetable(orders)):
                for clock, operation in enumerate(row):
                    if operation is not None:
                        kind, micro = operation
                        axes.barh(stage, 1, left=clock, color=colors[kind], edgecolor="white")
                        style = {"ha": "center", "va": "center", "fontsize": 10}
                        axes.text(clock + 0.5, stage, micro, **style)
            kept = [str(most_kept(order)) for order in orders]
            axes.set_title(f"{name}; at most {', '.join(kept)} micro-batches kept", loc="left")
            axes.set_yticks(range(n_stages), [f"stage {stage}" for stage in range(n_stages)])
            axes.invert_yaxis()
            axes.grid(False)
        n_clocks = 2 * (n_micro + n_stages - 1)
        panels[0].set(xlim=(0, n_clocks), xticks=range(0, n_clocks + 1, 2))
        panels[1].set(xlabel="clock (a forward and a backward take one each); white: waiting")
        for kind, name in (("F", "forward"), ("B", "backward")):
            panels[0].bar(0, 0, color=colors[kind], label=name)
        metrics.legend_beside(panels[0])


def show(out: Path) -> None:
    """Print the saved tables, and draw the pictures."""
    draw_schedules(out / "parallel_schedule.png")
    runs = metrics.load_rows(out / "parallel_runs.csv")
    if runs.empty:
        print(f"\nNothing trained yet: {COMMAND}")
        return
    costs = metrics.load_rows(out / "parallel_costs.csv")
    for n_ranks, rows in runs.groupby("value", sort=False):
        own_costs = costs[costs["value"] == n_ranks]
        trained = rows[rows["experiment"] == "one process"].iloc[0]
        print(f"\n{n_ranks}, {trained['backend']}, float64, {trained['n_steps']} steps")
        print(f"one process reads {100 * trained['val_accuracy']:.2f} % of the validation images")
        print(f"\n{runs_table(rows)}")
        print(f"\nKiB of a rank, measured / by formula:\n{costs_table(own_costs)}")
        path = out / f"parallel_memory_{n_ranks.replace(' ', '_')}.png"
        draw_memory(path, own_costs, f"{n_ranks}, {trained['batch_size']} images a step")


# ---- The program ----------------------------------------------------------------------------


def connect(device: str) -> torch.device:
    """Join the processes that torchrun started: nccl if each has a GPU of its own, else gloo."""
    n_local = int(os.environ["LOCAL_WORLD_SIZE"])
    n_gpus = torch.cuda.device_count()
    if device == "cuda" and n_gpus < n_local:
        raise ValueError(f"--device cuda: {n_gpus} GPUs for {n_local} ranks on this machine")
    wait = timedelta(minutes=2)
    if device == "cpu" or n_gpus < n_local:
        dist.init_process_group("gloo", timeout=wait)
        return torch.device("cpu")
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(own)
    dist.init_process_group("nccl", timeout=wait, device_id=own)
    return own


def train_each_way(recipe: Recipe, device: str, out: Path, data_dir: Path) -> None:
    """What each process of torchrun does; rank 0 alone prints and writes."""
    recipe.check()
    data = stage1_mlp.load_data(data_dir)
    on = connect(device)
    try:
        ranks = Ranks()
        data = stage1_mlp.Data(*(Split(*(a.to(on) for a in split)) for split in data))
        if ranks.rank > 0:
            measure(ranks, data, recipe, on)
            return
        print(f"{ranks_of(ranks.size)}, {dist.get_backend()}, {on.type}", flush=True)
        with stage1_mlp.claimed(out):
            tables = measure(ranks, data, recipe, on)
            order = [(name, ranks_of(n)) for n in range(1, 1 + ranks.size) for name in ORDER]
            metrics.replace_rows(out, tables, order)
            show(out)
    finally:
        dist.destroy_process_group()


def main(
    steps: int = Recipe.n_steps,
    batch_size: int = Recipe.batch_size,
    micro_batches: int = Recipe.n_micro,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    out: Path = FIGURES,
    data_dir: Path = ROOT / "data",
) -> int:
    """Train stage 1's network over several processes, started by torchrun; else show what is saved.

    Args:
        steps: of each training.
        batch_size: images in a step, over all ranks together.
        micro_batches: parts of a batch in the pipeline.
        device: cuda is one GPU a rank, by nccl (run with one rank so far); auto takes it where
            there are enough.
        out: the folder that tables and pictures go to and are read from.
        data_dir: the folder that holds MNIST/raw.
    """
    torch.set_num_threads(1)
    started_by_torchrun = "LOCAL_WORLD_SIZE" in os.environ
    try:
        if started_by_torchrun:
            recipe = Recipe(steps, batch_size, micro_batches)
            train_each_way(recipe, device, out, data_dir)
            return 0
        print("Parallel training (并行训练): differences from one process, memory and bytes sent")
        print(f"from what is saved; trained anew, in a minute, by\n    {COMMAND}")
        with stage1_mlp.claimed(out):
            show(out)
    except (stage1_mlp.DataError, ValueError, OSError) as error:
        print(f"interview.parallel: {error}", file=sys.stderr)
        return 1
    print(f"\ntables and pictures: {out}/parallel_*")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
