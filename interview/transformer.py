"""Encoder and decoder by hand, and a transformer that reads strips of digits (手撕 Transformer).

    python -m interview.transformer              tables and pictures from what is saved, 1 min
    python -m interview.transformer --train --device cuda --workers 6
                                                 trains first what is not saved yet
    python -m interview.transformer --evaluate   measures the saved networks again, 15 min
    python -m interview.transformer --out DIR    the same into and from DIR

Read `EncoderLayer`, `DecoderLayer` and `Transformer` first. Attention itself, its masks and the KV
cache are stage 3's. Axis letters in shape comments: B batch, S tokens of the source, T tokens of
the target, D width of the model, H heads, V vocabulary; L decoder layers; of a strip 28 × W pixels,
N digits.

1. The encoder layer (编码器层)
   Asked     "Write a transformer's encoder layer. What does each part do?"
             「手写 Transformer 编码器层。每个部分起什么作用？」
   Idea      Attention mixes tokens, the feed-forward network (前馈网络) works on each token alone.
             Around both a residual (残差) and a layer norm:
             x = x + attention(norm(x)),   x = x + W₂ relu(W₁ norm(x) + b₁) + b₂
   Cost      Weights: 4 D² in attention, 2 D · d_ff in the feed-forward network; 12 D² at
             d_ff = 4 D. Multiplications: 12 S D² with weights and 2 S² D for scores and averages,
             so attention's own part is the larger one only from S = 6 D on.
   追问      Why the residual? The gradient reaches every layer undamped. Why a feed-forward
             network? Attention only averages values; this network computes something new
             from each token, and holds two thirds of the weights at d_ff = 4 D. What if tokens
             are shuffled? The outputs are shuffled in the same way: without positions (位置编码)
             the order does not count. What is BERT? A stack of such layers, post-norm.
   Mistakes  No last norm after a pre-norm stack. Dropout on x itself and not on what is added to
             it. The padding mask forgotten: padding then takes part in every average.

2. The decoder layer: cross-attention, teacher forcing (解码器层, 交叉注意力, 教师强制)
   Asked     "How does a decoder layer differ from an encoder layer? Which masks does it need?"
             「解码器层和编码器层有什么不同？需要哪些掩码？」
   Idea      It attends to its own past (causal mask, 因果掩码), then to the encoder's output, the
             memory: queries from the decoder, keys and values from the memory (padding mask,
             填充掩码). In training the inputs are the right tokens, shifted by one:
             inputs   begin 4 0 7
             targets  4     0 7 end
             With the causal mask one pass gives all T predictions.
   Cost      O(T D² + T² D) for itself, O(S D² + T S D) for the memory.
   追问      Why is training parallel and generation is not? The inputs of training are known. What
             is exposure bias (曝光偏差)? In use the model reads its own mistakes, which it never
             saw. Do greedy decoding and teacher forcing agree? On a sequence that is right at every
             step, yes: greedy then writes the inputs itself. So the share of sequences without an
             error can be measured in one pass. Does the target need a padding mask? Not if the
             padding stands behind: the causal mask hides it, and the loss leaves it out.
   Mistakes  Inputs and targets not shifted: the model copies. The memory masked causally. Padding
             counted in the loss. True means "may look" here and in F.scaled_dot_product_attention,
             but "is hidden" in nn.MultiheadAttention.

3. Pre-norm and post-norm (前置与后置归一化)
   Asked     "Norm before or after? Why do deep models take pre-norm?"
             「pre-norm 和 post-norm 有什么区别？为什么深层模型多用 pre-norm？」
   Idea      post-norm (Vaswani 2017):  x = norm(x + f(x))
             pre-norm:                  x = x + f(norm(x)), and one norm after the last layer
   Cost      The same, but for that norm.
   追问      Why is pre-norm easier to train? Its residual path is the identity from end to end;
             post-norm puts a norm across it in every layer, and gradients near the output are
             large at the start (Xiong 2020), so it needs a warm-up (预热). What is wrong with
             pre-norm? x grows from layer to layer, and late layers change it little.
   Mistakes  Keys and values from x, queries from norm(x). The memory normed once more in each
             decoder layer: the encoder's last norm did that.

4. Decoding with caches (带缓存的解码)
   Asked     "What is cached when a decoder generates? Is it exact?"
             「生成时缓存什么？结果是否完全一致？」
   Idea      Keys and values of the past do not change, as no token sees its future. Each layer has
             two caches: its own tokens', which grows, and the memory's, which is filled once.
   Cost      A token reads T + S keys a layer, instead of all T tokens being computed again.
   追问      Can an encoder be cached so? No: each of its tokens sees all others. In beam search?
             Rows of the caches must follow their hypotheses; here beams go without. Positions? The
             new token's place is the length of the cache, not 0.
   Mistakes  The memory's keys computed at every step. A cache used on for the next input.

5. Positions and longer inputs (位置编码与长度外推)
   Asked     "What happens on inputs longer than those of training? Do rotary positions help?"
             「推理长度超过训练长度会怎样？旋转位置编码有帮助吗？」
   Idea      Sinusoids are added to the tokens: places beyond the training's are vectors never seen.
             Rotary and relative positions enter the scores as distances. A longer strip has longer
             distances: for rotary positions these are angles never seen; relative ones are clipped
             at FAR tokens, so no distance is new.
   Cost      Sinusoids nothing a layer; rotary O(S D); relative O(S² D), with (2 · FAR + 1) vectors.
   追问      Then why do relative positions fail, too (transformer_tables.md)? The reader must know
             which digit is next. Cross-attention has no positions here, so the encoder has to
             number the digits. A likely reason, not tested: training never showed a seventh.
   Mistakes  "Rotary positions extrapolate." On longer inputs only a mean loss is measured: most of
             it comes from places that training had.
"""

import functools
import itertools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import pandas as pd
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

import metrics
import stage1_mlp
from interview import check_whole, convolution, decoding, training
from stage1_mlp import Data, Split
from stage3_attention import (
    GroupedQueryAttention,
    KVCache,
    MultiHeadAttention,
    projected_dtype,
    sinusoids,
    unchanged_if_it_fails,
)

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "figures" / "interview"


# ---- 1. The encoder layer -------------------------------------------------------------------


def padding_mask(lengths: Tensor, S: int) -> Tensor:
    """True where a token is, False where padding is (填充掩码): lengths (B,) -> (B, 1, 1, S).

    It broadcasts to scores (B, H, T, S). ValueError unless each length is a whole number 0 … S.
    """
    if lengths.ndim != 1 or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(f"whole numbers (B,) expected, not {lengths.dtype} {(*lengths.shape,)}")
    if len(lengths) and not 0 <= lengths.min() <= lengths.max() <= S:
        found = f"{lengths.min().item()} … {lengths.max().item()}"
        raise ValueError(f"lengths must lie in 0 … {S}, not in {found}")
    places = torch.arange(S, device=lengths.device)
    return (places < lengths[:, None])[:, None, None, :]


def check_tokens(d_model: int, **inputs: Tensor) -> None:
    """ValueError unless each input is (B, T, D) with D = d_model."""
    for name, x in inputs.items():
        if x.ndim != 3 or x.shape[2] != d_model:
            raise ValueError(f"{name} (B, T, {d_model}) expected, not {tuple(x.shape)}")


class FeedForward(nn.Module):
    """W₂ relu(W₁ x + b₁) + b₂, the same for every token (前馈网络): (B, S, D) -> (B, S, D)."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        check_whole(d_model=d_model, d_ff=d_ff)
        self.W_1 = nn.Linear(d_model, d_ff)
        self.W_2 = nn.Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.W_2(F.relu(self.W_1(x)))


class EncoderLayer(nn.Module):
    """Attention among all tokens, then each token alone (编码器层; Vaswani 2017, section 3.1).

    forward: x (B, S, D) -> (B, S, D). mask as in stage 3's `attention`: True where a token may
    look. norm_first: pre-norm; without it post-norm, as in the paper. position "rotary" or
    "relative" acts in the scores, as in GroupedQueryAttention.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_ff: int,
        norm_first: bool = True,
        position: str = "none",
        dropout: float = 0.0,
    ):
        super().__init__()
        self.d_model = d_model
        self.norm_first = norm_first
        self.attention = GroupedQueryAttention(d_model, n_heads, n_heads, position)
        self.feed_forward = FeedForward(d_model, d_ff)
        self.norm_1 = nn.LayerNorm(d_model)
        self.norm_2 = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        check_tokens(self.d_model, x=x)
        if self.norm_first:
            x = x + self.attend(self.norm_1(x), mask)
            x = x + self.dropout(self.feed_forward(self.norm_2(x)))
        else:
            x = self.norm_1(x + self.attend(x, mask))
            x = self.norm_2(x + self.dropout(self.feed_forward(x)))
        return x  # (B, S, D)

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Self-attention (自注意力), without its weights."""
        out, _ = self.attention(x, mask=mask)
        return self.dropout(out)


# ---- 2. The decoder layer -------------------------------------------------------------------


class LayerCaches(NamedTuple):
    """Keys and values that a decoder layer keeps while a sequence is written."""

    own: KVCache  # of the tokens written so far: grows
    memory: KVCache  # of the memory: filled at the first call


class DecoderLayer(nn.Module):
    """Attention to its past, then to the memory; then each token alone (解码器层; Vaswani 2017).

    forward: x (B, T, D), memory (B, S, D) -> out (B, T, D), and the weights of cross-attention
    (B, H, T, S). mask hides tokens of the target in addition to the causal mask, memory_mask those
    of the memory; True where a token may look. With caches, x holds only the tokens that come next,
    and memory must be the same each time.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_ff: int,
        norm_first: bool = True,
        position: str = "none",
        dropout: float = 0.0,
    ):
        super().__init__()
        self.d_model = d_model
        self.norm_first = norm_first
        self.self_attention = GroupedQueryAttention(d_model, n_heads, n_heads, position)
        self.cross_attention = MultiHeadAttention(d_model, n_heads)
        self.feed_forward = FeedForward(d_model, d_ff)
        self.norm_1 = nn.LayerNorm(d_model)
        self.norm_2 = nn.LayerNorm(d_model)
        self.norm_3 = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        caches: LayerCaches | None = None,
    ) -> tuple[Tensor, Tensor]:
        check_tokens(self.d_model, x=x, memory=memory)
        own, of_memory = caches or (None, None)
        with unchanged_if_it_fails(own, of_memory):
            if self.norm_first:
                x = x + self.attend(self.norm_1(x), mask, own)
                out, weights = self.cross_attend(self.norm_2(x), memory, memory_mask, of_memory)
                x = x + out
                x = x + self.dropout(self.feed_forward(self.norm_3(x)))
            else:
                x = self.norm_1(x + self.attend(x, mask, own))
                out, weights = self.cross_attend(x, memory, memory_mask, of_memory)
                x = self.norm_2(x + out)
                x = self.norm_3(x + self.dropout(self.feed_forward(x)))
        return x, weights  # (B, T, D), (B, H, T, S)

    def attend(self, x: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        """Causal self-attention (自注意力), without its weights."""
        out, _ = self.self_attention(x, mask=mask, causal=True, cache=cache)
        return self.dropout(out)

    def cross_attend(
        self, x: Tensor, memory: Tensor, mask: Tensor | None, cache: KVCache | None
    ) -> tuple[Tensor, Tensor]:
        """Cross-attention (交叉注意力): queries from x, keys and values from the memory."""
        if cache is not None and cache.length > 0:
            memory = memory[:, :0]  # the cache holds its keys and values already: add no more
        out, weights = self.cross_attention(x, memory, mask=mask, cache=cache)
        return self.dropout(out), weights


# ---- 3. The transformer ---------------------------------------------------------------------

POSITIONS = ("none", "sinusoids", "rotary", "relative")


class Transformer(nn.Module):
    """Encoder and decoder: vectors in, tokens out (Vaswani 2017, figure 1).

    forward: x (B, S, D), tokens (B, T) int64 and the mask of x -> logits (B, T, n_tokens): what
    comes after each of the tokens. position "sinusoids" are added to x and to the embedded tokens;
    "rotary" and "relative" act in self-attention. ValueError on sizes that do not fit.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_ff: int,
        n_encoder: int,
        n_decoder: int,
        n_tokens: int,
        norm_first: bool = True,
        position: str = "sinusoids",
        dropout: float = 0.0,
    ):
        super().__init__()
        check_whole(n_encoder=n_encoder, n_decoder=n_decoder, n_tokens=n_tokens)
        if position not in POSITIONS:
            raise ValueError(f"position must be one of {', '.join(POSITIONS)}, not {position!r}")
        self.position = position
        in_scores = position if position in ("rotary", "relative") else "none"
        sizes = (d_model, n_heads, d_ff, norm_first, in_scores, dropout)
        self.encoder = nn.ModuleList(EncoderLayer(*sizes) for _ in range(n_encoder))
        self.decoder = nn.ModuleList(DecoderLayer(*sizes) for _ in range(n_decoder))
        # a pre-norm stack never norms its sum, so a norm follows; a post-norm layer ends with one
        self.encoder_norm = nn.LayerNorm(d_model) if norm_first else nn.Identity()
        self.decoder_norm = nn.LayerNorm(d_model) if norm_first else nn.Identity()
        # starts with standard deviation 1, about as large as sinusoids: so without Vaswani's √D
        self.embedding = nn.Embedding(n_tokens, d_model)
        self.output = nn.Linear(d_model, n_tokens)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        logits, _ = self.decode(tokens, self.encode(x, mask), mask)
        return logits

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, S, D) -> the memory (B, S, D)."""
        x = self.with_places(x, start=0)
        for layer in self.encoder:
            x = layer(x, mask)
        return self.encoder_norm(x)

    def decode(
        self,
        tokens: Tensor,
        memory: Tensor,
        memory_mask: Tensor | None = None,
        caches: list[LayerCaches] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, T, V) after each token, and each layer's cross-attention (B, H, T, S).

        With caches (made by `caches`) tokens holds only those that come next.
        """
        if tokens.ndim != 2 or len(tokens) != len(memory):
            found = f"{tuple(tokens.shape)} and {tuple(memory.shape)}"
            raise ValueError(f"tokens (B, T) and memory (B, S, D) expected, not {found}")
        if caches is not None and len(caches) != len(self.decoder):
            raise ValueError(f"{len(caches)} caches for {len(self.decoder)} decoder layers")
        start = caches[0].own.length if caches else 0
        weights = []
        with unchanged_if_it_fails(*itertools.chain.from_iterable(caches or [])):
            x = self.with_places(self.embedding(tokens), start)  # (B, T, D)
            each_layers = caches or [None] * len(self.decoder)
            for layer, layer_caches in zip(self.decoder, each_layers, strict=True):
                x, found = layer(x, memory, memory_mask=memory_mask, caches=layer_caches)
                weights.append(found)
            return self.output(self.decoder_norm(x)), weights

    def with_places(self, x: Tensor, start: int) -> Tensor:
        """x (B, T, D) plus the sinusoids of places start, start + 1, …, if the model has them."""
        if self.position != "sinusoids":
            return x
        return x + sinusoids(start, x.shape[1], x.shape[2], x.dtype, x.device)

    def caches(self, batch: int, n_tokens: int, n_memory: int) -> list[LayerCaches]:
        """Empty caches for `decode`, with room for n_tokens, and for a memory of n_memory."""
        D = self.embedding.embedding_dim
        H = self.decoder[0].cross_attention.n_heads
        weight = self.output.weight
        kind = {"dtype": projected_dtype(weight), "device": weight.device}
        found = []
        for _ in self.decoder:
            own = KVCache(batch, H, n_tokens, D // H, **kind)
            found.append(LayerCaches(own, KVCache(batch, H, n_memory, D // H, **kind)))
        return found


# ---- 4. Decoding ----------------------------------------------------------------------------


def whole_step(model: Transformer, memory: Tensor, mask: Tensor | None = None) -> Callable:
    """A `step` for interview.decoding that reads all tokens each time: (B, T) -> (B, V).

    Its logits are of what comes next. A memory of one row serves every row of the tokens.
    """

    def step(tokens: Tensor) -> Tensor:
        shared = memory.expand(len(tokens), -1, -1)
        logits, _ = model.decode(tokens, shared, mask)
        return logits[:, -1]

    return step


def cached_step(
    model: Transformer, memory: Tensor, mask: Tensor | None = None, n_tokens: int = 64
) -> Callable:
    """The same logits from the new tokens alone: each call must continue the one before."""
    caches = model.caches(len(memory), n_tokens, memory.shape[1])

    def step(tokens: Tensor) -> Tensor:
        new = tokens[:, caches[0].own.length :]
        logits, _ = model.decode(new, memory, mask, caches)
        return logits[:, -1]

    return step


# ---- 5. Strips of digits --------------------------------------------------------------------

BEGIN = 10  # tokens 0 … 9 are the digits
END = 11
N_TOKENS = 12
NEAREST = 22  # pixels from a digit's left edge to the next one's; a digit's ink is up to 20 wide
FARTHEST = 34
COLUMNS = 4  # pixels across of a token
SEEN = 6  # digits of the longest strip in training
LONGEST = 8


class Strips(NamedTuple):
    """B strips of up to N digits, as wide as the widest could be."""

    images: Tensor  # (B, 28, W), the background 0
    widths: Tensor  # (B,) pixels up to the last digit's end; behind it is padding
    numbers: Tensor  # (B, N) the digits, then END
    lengths: Tensor  # (B,) how many digits
    places: Tensor  # (B, N) the digits' left edges in pixels

    def to(self, device: str) -> "Strips":
        return Strips(*(part.to(device) for part in self))

    def parts(self, size: int) -> list["Strips"]:
        """The same in parts of `size` strips."""
        return [Strips(*part) for part in zip(*(t.split(size) for t in self), strict=True)]


def draw_strips(
    split: Split,
    n_strips: int,
    shortest: int,
    longest: int,
    generator: torch.Generator | None = None,
    strength: float = 0.0,
) -> Strips:
    """Strips of random digits of the split at random distances, each length as likely as another.

    Where two digits meet, the darker pixel counts. strength is that of stage 1's `deform`, which
    changes each digit. ValueError unless 1 ≤ shortest ≤ longest.
    """
    check_whole(n_strips=n_strips, shortest=shortest, longest=longest)
    if shortest > longest:
        raise ValueError(f"{shortest=} must be at most {longest=}")
    B, N = n_strips, longest
    device = split.images.device
    on = {"device": device, "generator": generator}
    lengths = torch.randint(shortest, longest + 1, (B,), **on)
    chosen = torch.randint(len(split.labels), (B, N), **on)
    distances = torch.randint(NEAREST, FARTHEST + 1, (B, N), **on)
    places = distances.cumsum(1) - NEAREST  # the first stands 0 … 12 pixels from the edge
    widths = places.gather(1, lengths[:, None] - 1).squeeze(1) + 28  # (B,)
    exists = torch.arange(N, device=device) < lengths[:, None]  # (B, N)

    images = split.images[chosen.flatten()]  # (B · N, 784)
    if strength > 0:
        images = stage1_mlp.deform(images, strength)
    ink = images - stage1_mlp.normalised(torch.zeros((), device=device))  # 0 is the background
    ink = ink.view(B, N, 28, 28) * exists[:, :, None, None]
    W = math.ceil((N * FARTHEST - NEAREST + 28) / COLUMNS) * COLUMNS
    columns = places[:, :, None] + torch.arange(28, device=device)  # (B, N, 28)
    index = columns.flatten(1)[:, None].expand(-1, 28, -1)  # (B, 28, N · 28)
    source = ink.transpose(1, 2).flatten(2)  # (B, 28, N · 28)
    strips = torch.zeros(B, 28, W, device=device).scatter_reduce(2, index, source, "amax")
    numbers = split.labels[chosen].where(exists, END)
    return Strips(strips, widths, numbers, lengths, places)


def teacher_forced(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets of the decoder (教师强制): numbers (B, N) -> (B, N + 1) each.

    inputs begin 4 0 7 and targets 4 0 7 end: each target is what comes after its input.
    """
    inputs = F.pad(numbers, (1, 0), value=BEGIN)
    targets = F.pad(numbers, (0, 1), value=END)
    return inputs, targets


class StripReader(nn.Module):
    """Four convolutions make tokens of 4 columns each; a transformer reads them.

    forward: strips (B, 28, W), their widths (B,) and tokens (B, T) -> logits (B, T, N_TOKENS).
    A token sees 26 columns, about a digit; which digits there are is up to the encoder.
    """

    def __init__(self, recipe: "Recipe"):
        super().__init__()
        C = recipe.channels
        self.columns = nn.Sequential(
            convolution.Block(1, C // 3, pool=True),  # (B, C / 3, 14, W / 2)
            convolution.Block(C // 3, 2 * C // 3, pool=True),  # (B, 2 C / 3, 7, W / 4)
            convolution.Block(2 * C // 3, C),  # (B, C, 7, W / 4)
            convolution.Block(C, C),  # (B, C, 7, W / 4)
        )
        self.project = nn.Linear(7 * C, recipe.d_model)
        self.transformer = Transformer(
            recipe.d_model,
            recipe.n_heads,
            recipe.d_ff,
            recipe.n_encoder,
            recipe.n_decoder,
            N_TOKENS,
            recipe.norm_first,
            recipe.position,
            recipe.dropout,
        )

    def forward(self, strips: Tensor, widths: Tensor, tokens: Tensor) -> Tensor:
        memory, mask = self.encode(strips, widths)
        logits, _ = self.transformer.decode(tokens, memory, mask)
        return logits

    def encode(self, strips: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
        """The memory (B, S, D), a token for 4 columns, and the mask that hides the padding."""
        if strips.ndim != 3 or strips.shape[1] != 28 or strips.shape[2] % COLUMNS:
            found = tuple(strips.shape)
            raise ValueError(f"strips (B, 28, a multiple of {COLUMNS}) expected, not {found}")
        maps = self.columns(strips[:, None])  # (B, C, 7, S)
        x = self.project(maps.flatten(1, 2).mT)  # (B, S, D)
        n_columns = (widths + COLUMNS - 1) // COLUMNS  # (B,)
        mask = padding_mask(n_columns, x.shape[1])
        return self.transformer.encode(x, mask), mask


def read(model: StripReader, strips: Strips) -> Tensor:
    """What the model writes for each strip, greedily and with caches: (B, N + 1), END behind."""
    memory, mask = model.encode(strips.images, strips.widths)
    B, N = strips.numbers.shape
    start = torch.full((B, 1), BEGIN, device=memory.device)
    step = cached_step(model.transformer, memory, mask, n_tokens=N + 1)
    return decoding.greedy(step, start, N + 1, eos=END)[:, 1:]


# ---- Training -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """All that a run depends on; chosen on the validation images."""

    # norm before or after attention and feed-forward network
    norm_first: bool = True
    # how the network knows places
    position: Literal["sinusoids", "rotary", "relative"] = "sinusoids"
    # maps of the last two convolutions; the first has a third, the second two thirds
    channels: int = 96
    d_model: int = 128
    n_heads: int = 4
    d_ff: int = 256
    n_encoder: int = 3
    n_decoder: int = 2
    dropout: float = 0.0
    # strips of an update
    batch_size: int = 256
    # updates
    n_steps: int = 2500
    # highest rate of AdamW; it rises and falls as in stage 1
    lr: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.05
    # largest gradient norm
    clip: float = 1.0
    label_smoothing: float = 0.1
    # of stage 1's deformation of each digit; in the last 30 % of a run 0.3 of it
    deform: float = 0.8
    # how often a run is judged and saved on its way
    n_logs: int = 25
    # validation strips that judge it on its way, and on which attention is measured at the end
    n_judged: int = 1000
    # strips, of validation and of test images alike, that are read at the end
    n_measured: int = 5000
    # of weights, strips and deformation; never of the strips that it is judged on
    seed: int = 0


RECIPES = {
    "pre-norm, sinusoids": Recipe(),
    "post-norm, sinusoids": Recipe(norm_first=False),
    "pre-norm, rotary": Recipe(position="rotary"),
    "pre-norm, relative": Recipe(position="relative"),
}
MAIN = "pre-norm, sinusoids"  # whose tables are shown in full
BEAM_WIDTH = 4


def recipes(smoke: bool) -> dict[str, Recipe]:
    """The recipes by name; for smoke with few strips and steps and small networks."""
    if not smoke:
        return RECIPES
    few = {"batch_size": 8, "n_steps": 4, "n_logs": 2, "n_judged": 10, "n_measured": 20}
    small = {"channels": 6, "d_model": 8, "n_heads": 2, "d_ff": 12, "n_encoder": 1}
    return {name: replace(recipe, **few, **small) for name, recipe in RECIPES.items()}


def train(
    recipe: Recipe, data: Data, name: str, checkpoint: Path | None = None, n_most: int | None = None
) -> tuple[StripReader, list[dict]]:
    """Train a reader by the recipe: the model, and a history row at n_logs even steps.

    Each step has a seed of its own. So a run that was stopped goes on from its checkpoint exactly
    as if it had not been. n_most ends it after so many steps.
    """
    device = data.train.images.device
    torch.manual_seed(recipe.seed)
    model = StripReader(recipe).to(device)
    kind = {"weight_decay": recipe.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(model.parameters(), recipe.lr, **kind)
    judged = fixed_strips(data.val, recipe.n_judged, 1, SEEN, seed=0)
    every = max(1, recipe.n_steps // recipe.n_logs)
    n_done, history = 0, []
    parts = {"model": model, "optimizer": optimizer}
    if checkpoint is not None:
        n_done, history = training.load_checkpoint(checkpoint, recipe, device, **parts)
    start = time.perf_counter() - (history[-1]["seconds"] if history else 0.0)
    losses = []
    for step in range(n_done + 1, min(recipe.n_steps, n_most or recipe.n_steps) + 1):
        torch.manual_seed(1_000_003 * (recipe.seed + 1) + step)
        strength = recipe.deform if step < 0.7 * recipe.n_steps else 0.3 * recipe.deform
        strips = draw_strips(data.train, recipe.batch_size, 1, SEEN, strength=strength)
        for group in optimizer.param_groups:
            group["lr"] = stage1_mlp.learning_rate(recipe, step)

        loss = loss_of(model, strips, recipe.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        losses.append(loss.detach())

        if step % every == 0 or step == recipe.n_steps:
            row = {"step": step, "objective": torch.stack(losses).mean().item()}
            row |= judge(model, judged)
            row["seconds"] = time.perf_counter() - start
            history.append(row)
            losses = []
            if checkpoint is not None:
                training.save_checkpoint(checkpoint, recipe, step, history, **parts)
            print(progress(name, recipe, row), flush=True)
            if stage1_mlp.status(history) == "diverged":
                break
    return model, history


def progress(name: str, recipe: Recipe, row: dict) -> str:
    where = f"  {name}: step {row['step']} of {recipe.n_steps}, {row['seconds'] / 60:.1f} min"
    right = f"{100 * row['val_accuracy']:.1f} % of strips right"
    return f"{where}, loss {row['objective']:.3f}, {right}"


def loss_of(model: StripReader, strips: Strips, label_smoothing: float) -> Tensor:
    """Mean cross-entropy of the digits and of the end behind each number, in nats."""
    inputs, targets = teacher_forced(strips.numbers)  # (B, N + 1)
    logits = model(strips.images, strips.widths, inputs)  # (B, N + 1, V)
    counts = up_to_the_end(targets, strips.lengths)
    return stage1_mlp.cross_entropy(logits[counts], targets[counts], label_smoothing)


def up_to_the_end(targets: Tensor, lengths: Tensor) -> Tensor:
    """Which targets (B, N + 1) count: the digits and one END; what follows it does not."""
    places = torch.arange(targets.shape[1], device=targets.device)
    return places <= lengths[:, None]


def fixed_strips(split: Split, n_strips: int, shortest: int, longest: int, seed: int) -> Strips:
    """Strips that are the same on every machine, on the split's device."""
    device = split.images.device
    on_cpu = Split(*(part.cpu() for part in split))
    generator = torch.Generator().manual_seed(seed)
    return draw_strips(on_cpu, n_strips, shortest, longest, generator).to(device)


@torch.no_grad()
def judge(model: StripReader, strips: Strips) -> dict:
    """Loss and share of strips without an error, in one pass and in evaluation mode.

    A strip that is right at every step of teacher forcing is read so by greedy decoding as well.
    """
    model.eval()
    losses = []
    is_right = []
    for part in strips.parts(500):
        inputs, targets = teacher_forced(part.numbers)
        logits = model(part.images, part.widths, inputs)
        counts = up_to_the_end(targets, part.lengths)
        is_right.append((logits.argmax(2).eq(targets) | ~counts).all(1))
        loss = stage1_mlp.cross_entropy(logits[counts], targets[counts])
        losses.append(len(part.lengths) * loss)
    model.train()
    n_strips = len(strips.lengths)
    loss = torch.stack(losses).sum().item() / n_strips
    return {"val_loss": loss, "val_accuracy": torch.cat(is_right).float().mean().item()}


# ---- What is measured of a trained reader ---------------------------------------------------


@torch.no_grad()
def written_by(model: StripReader, strips: Strips) -> Tensor:
    """`read` in parts of 500 strips, in evaluation mode: (B, N + 1)."""
    model.eval()
    return torch.cat([read(model, part) for part in strips.parts(500)])


def length_rows(strips: Strips, written: Tensor) -> list[dict]:
    """A row for each length: strips, and how many are right, whole and in their first 6 digits."""
    _, targets = teacher_forced(strips.numbers)  # (B, N + 1)
    is_same = written == targets
    table = {
        "length": strips.lengths,
        "right": is_same.all(1),
        "first_6_right": is_same[:, :SEEN].all(1),
        "digits_written": (written != END).sum(1),
    }
    table = pd.DataFrame({name: values.cpu().numpy() for name, values in table.items()})
    by_length = table.groupby("length")
    rows = by_length[["right", "first_6_right"]].sum()
    rows.insert(0, "strips", by_length.size())
    rows["digits_written"] = by_length["digits_written"].mean()
    return rows.reset_index().to_dict("records")


def measure_lengths(model: StripReader, n_strips: int, data: Data) -> list[dict]:
    """Rows of transformer_lengths.csv: greedy reading of validation strips and of test strips.

    n_strips of 1 to 6 digits as in training, and a fifth as many of each length beyond.
    """
    kinds = [(1, SEEN, n_strips)]
    kinds += [(length, length, math.ceil(n_strips / 5)) for length in range(SEEN + 1, LONGEST + 1)]
    rows = []
    for part, split in (("val", data.val), ("test", data.test)):
        for shortest, longest, n in kinds:
            strips = fixed_strips(split, n, shortest, longest, seed=1)
            found = length_rows(strips, written_by(model, strips))
            rows += [{"part": part} | row for row in found]
    return rows


@torch.no_grad()
def measure_beams(model: StripReader, n_strips: int, data: Data) -> list[dict]:
    """Rows of transformer_beams.csv: the same test strips greedily and by beam search.

    log_probability is the mean over strips, of what was written, in nats.
    """
    model.eval()
    strips = fixed_strips(data.test, n_strips, 1, SEEN, seed=1)
    rows = []
    for width, read_by in ((1, greedily), (BEAM_WIDTH, by_beam)):
        n_right = 0
        log_probability = 0.0
        for part in strips.parts(100):
            _, targets = teacher_forced(part.numbers)
            written, scores = read_by(model, part)
            n_right += int((written == targets).all(1).sum())
            log_probability += scores.sum().item() / n_strips
        row = {"part": "test", "width": width, "strips": n_strips, "right": n_right}
        rows.append(row | {"log_probability": log_probability})
    return rows


def greedily(model: StripReader, strips: Strips) -> tuple[Tensor, Tensor]:
    """What greedy decoding writes (B, N + 1), and its log-probability (B,)."""
    written = read(model, strips)
    inputs = F.pad(written, (1, 0), value=BEGIN)[:, :-1]  # what was written before each token
    log_p = model(strips.images, strips.widths, inputs).double().log_softmax(2)  # (B, N + 1, V)
    found = log_p.gather(2, written[:, :, None]).squeeze(2)  # (B, N + 1)
    return written, found.where(inputs != END, 0.0).sum(1)


def by_beam(model: StripReader, strips: Strips) -> tuple[Tensor, Tensor]:
    """The likeliest that a beam of BEAM_WIDTH finds (B, N + 1), and its log-probability (B,)."""
    memory, mask = model.encode(strips.images, strips.widths)
    start = torch.full((1, 1), BEGIN, device=memory.device)
    written = []
    scores = []
    for b in range(len(memory)):
        step = whole_step(model.transformer, memory[b : b + 1], mask[b : b + 1])
        found, log_p = decoding.beam_search(
            step, start, strips.numbers.shape[1] + 1, BEAM_WIDTH, END
        )
        written.append(found[0, 1:])
        scores.append(log_p[0])
    return torch.stack(written), torch.stack(scores)


@torch.no_grad()
def cross_attention(model: StripReader, strips: Strips) -> Tensor:
    """Weights (L, B, H, N + 1, S): where each layer looks as it is asked for a digit or the end.

    By teacher forcing: before each of them the model has read the right ones.
    """
    model.eval()
    inputs, _ = teacher_forced(strips.numbers)
    memory, mask = model.encode(strips.images, strips.widths)
    _, weights = model.transformer.decode(inputs, memory, mask)
    return torch.stack(weights)


def measure_attention(model: StripReader, n_strips: int, data: Data) -> list[dict]:
    """Rows of transformer_attention.csv: how much of the attention lies on the digit's own ink.

    Of each head of each layer the mean over digits of validation strips. Ink stands in the middle
    20 of a digit's 28 columns. even_share is what attention to all columns alike would give.
    """
    strips = fixed_strips(data.val, n_strips, 1, SEEN, seed=0)
    own = []
    even = []
    for part in strips.parts(500):
        weights = cross_attention(model, part)[:, :, :, :-1]  # (L, B, H, N, S)
        middle = COLUMNS * (torch.arange(weights.shape[4], device=weights.device) + 0.5)  # (S,)
        left = part.places[:, :, None] + 4  # (B, N, 1)
        is_own = (left <= middle) & (middle < left + 20)  # (B, N, S)
        exists = part.numbers != END  # (B, N)
        share = (weights * is_own[:, None]).sum(4)  # (L, B, H, N)
        own.append(share.transpose(2, 3)[:, exists])  # (L, digits, H)
        even.append((is_own.sum(2) * COLUMNS / part.widths[:, None])[exists])
    shares = torch.cat(own, 1).mean(1).tolist()
    even_share = torch.cat(even).mean().item()
    rows = []
    for layer, heads in enumerate(shares):
        for head, share in enumerate(heads):
            row = {"part": "val", "layer": layer, "head": head, "share": share}
            rows.append(row | {"even_share": even_share})
    return rows


def measure(name: str, model: StripReader, recipe: Recipe, data: Data) -> dict[str, list[dict]]:
    """The tables of a trained reader {table: [row]}; of the main one, beams and attention too."""
    device = data.test.images.device.type
    key = run_key(name, recipe.seed)
    origin = stage1_mlp.origin_of_rows(device)
    tables = {"transformer_lengths": measure_lengths(model, recipe.n_measured, data)}
    if name == MAIN and recipe.seed == 0:
        tables["transformer_attention"] = measure_attention(model, recipe.n_judged, data)
        n_strips = math.ceil(recipe.n_measured / 5)  # beam search reads one at a time: slow
        tables["transformer_beams"] = measure_beams(model, n_strips, data)
    return {table: [key | row | origin for row in rows] for table, rows in tables.items()}


def run_key(name: str, seed: int) -> dict:
    return {"experiment": "strips", "value": name, "seed": seed}


# ---- All runs -------------------------------------------------------------------------------


@functools.cache
def data_on(device: str, data_dir: Path) -> Data:
    """MNIST on the device; a process reads it once."""
    data = stage1_mlp.load_data(data_dir)
    return Data(*(Split(*(part.to(device) for part in split)) for split in data))


def execute(
    name: str, recipe: Recipe, data_dir: Path, device: str, checkpoint: Path
) -> tuple[dict, dict]:
    """Train and measure one run on one thread: (its rows {table: [row]}, its weights in float16).

    What is measured are the rounded weights. The test images are read once, at the end.
    """
    torch.set_num_threads(1)
    data = data_on(device, data_dir)
    torch.set_float32_matmul_precision("high")  # TF32 where the device has it
    model, history = train(recipe, data, f"{name}, seed {recipe.seed}", checkpoint)
    torch.set_float32_matmul_precision("highest")
    weights = training.rounded(model)
    model.load_state_dict(weights)
    key = run_key(name, recipe.seed)
    row = key | training.recipe_columns(recipe) | {"status": stage1_mlp.status(history)}
    row |= {score: history[-1][score] for score in ("objective", "val_loss", "val_accuracy")}
    row |= {"seconds": history[-1]["seconds"]}
    row["parameters"] = sum(p.numel() for p in model.parameters())
    row |= stage1_mlp.origin_of_rows(device)
    tables = {"transformer_history": [key | logged for logged in history]}
    if row["status"] == "ok":
        tables |= measure(name, model, recipe, data)
    tables["transformer_runs"] = [row]  # last: a run is finished when its row stands here
    return tables, weights


def file_of(folder: Path, name: str, suffix: str) -> Path:
    """Such as transformer_pre_norm_sinusoids.pt."""
    return folder / f"transformer_{name.replace(', ', '_').replace('-', '_')}{suffix}"


def missing_runs(out: Path, wanted: dict[str, Recipe], seeds: int) -> list[tuple[str, Recipe]]:
    """The runs that transformer_runs.csv does not hold, or holds with another recipe.

    The main network's come first, then seed by seed.
    """
    missing = []
    runs = sorted(itertools.product(range(seeds), wanted), key=lambda run: run[1] != MAIN)
    for seed, name in runs:
        recipe = replace(wanted[name], seed=seed)
        key = run_key(name, seed) | training.recipe_columns(recipe)
        no_weights = seed == 0 and not file_of(out, name, ".pt").exists()
        if no_weights or not training.has_row(out / "transformer_runs.csv", key):
            missing.append((name, recipe))
    return missing


def train_missing(
    out: Path,
    wanted: dict[str, Recipe],
    seeds: int,
    data_dir: Path,
    workers: int,
    device: str,
    checkpoints: Path,
) -> None:
    """Train what is missing, each run on one thread; save each as it ends, and seed 0's weights."""
    todo = missing_runs(out, wanted, seeds)
    n_runs = len(wanted) * seeds
    print(f"training: {n_runs - len(todo)} of {n_runs} runs found, {len(todo)} to do", flush=True)
    calls = []
    for name, recipe in todo:
        checkpoint = file_of(checkpoints, f"{name}, {recipe.seed}", ".pt")
        calls.append((name, recipe, data_dir, device, checkpoint))
    for tables, weights in training.in_parallel(execute, calls, workers):
        row = tables["transformer_runs"][0]
        name = row["value"]
        if row["seed"] == 0:
            save_reader(file_of(out, name, ".pt"), wanted[name], weights)
        metrics.replace_rows(out, tables, order_of_rows())
        file_of(checkpoints, f"{name}, {row['seed']}", ".pt").unlink(missing_ok=True)
        found = f"{100 * row['val_accuracy']:.2f} % of validation strips right"
        words = f"{name}, seed {row['seed']}: {row['seconds'] / 60:.1f} minutes"
        print(f"saved: {words}, {found}", flush=True)


def order_of_rows() -> list[tuple[str, str]]:
    return [("strips", name) for name in RECIPES]


def save_reader(path: Path, recipe: Recipe, weights: dict[str, Tensor]) -> None:
    found = {"recipe": training.recipe_columns(recipe), "weights": weights}
    with metrics.written_aside(path) as aside:
        torch.save(found, aside)


def load_reader(path: Path, recipe: Recipe) -> StripReader:
    """The network of saved weights, ready to read; ValueError if they are of another recipe."""
    found = torch.load(path, weights_only=True, map_location="cpu")
    if found["recipe"] != training.recipe_columns(recipe):
        raise ValueError(f"{path} holds another recipe's network: --train trains this one")
    model = StripReader(recipe)
    model.load_state_dict(found["weights"])
    return model.eval()


def evaluate_saved(out: Path, wanted: dict[str, Recipe], data_dir: Path, device: str) -> None:
    """Measure again every network whose weights are saved, and put its rows into the tables."""
    data = data_on(device, data_dir)
    for name, recipe in wanted.items():
        path = file_of(out, name, ".pt")
        if path.exists():
            start = time.perf_counter()
            tables = measure(name, load_reader(path, recipe).to(device), recipe, data)
            metrics.replace_rows(out, tables, order_of_rows())
            seconds = time.perf_counter() - start
            print(f"measured: {name}, seed {recipe.seed}, in {seconds:.0f} s", flush=True)


# ---- Tables and pictures --------------------------------------------------------------------


def right_table(rows: pd.DataFrame) -> str:
    """Markdown, a line a network: percent of test strips without an error, by length."""
    test = rows[rows["part"] == "test"]
    lines = []
    for name, found in test.groupby("value", sort=False):
        line = {"network": name, "n": str(found["seed"].nunique())}
        seen = found[found["length"] <= SEEN]
        line[f"1 … {SEEN} digits"] = str(percent_right(seen))
        for length, of_length in found.groupby("length"):
            line[str(length)] = str(percent_right(of_length))
        lines.append(line)
    return metrics.markdown(lines)


def percent_right(rows: pd.DataFrame) -> metrics.Summary:
    """Percent of strips that are right, over seeds."""
    sums = rows.groupby("seed")[["right", "strips"]].sum()
    return metrics.summarise(100 * sums["right"] / sums["strips"])


def beyond_table(rows: pd.DataFrame) -> str:
    """Markdown: what is written for strips longer than any of training, over seeds."""
    test = rows[(rows["part"] == "test") & (rows["length"] > SEEN)]
    lines = []
    for (name, length), found in test.groupby(["value", "length"], sort=False):
        line = {"network": name, "digits there": str(length)}
        line["digits written"] = str(metrics.summarise(found["digits_written"]))
        beginning = 100 * found["first_6_right"] / found["strips"]
        line[f"first {SEEN} right %"] = str(metrics.summarise(beginning))
        line["all right %"] = str(percent_right(found))
        line["n"] = str(found["seed"].nunique())
        lines.append(line)
    return metrics.markdown(lines)


def attention_table(rows: pd.DataFrame) -> str:
    """Markdown, a line a layer: percent of each head's attention that lies on the digit's ink."""
    lines = []
    for layer, found in rows.groupby("layer"):
        line = {"decoder layer": str(layer + 1)}
        for head, share in zip(found["head"], found["share"], strict=True):
            line[f"head {head + 1}"] = f"{100 * share:.1f}"
        line["all columns alike"] = f"{100 * found['even_share'].iloc[0]:.1f}"
        lines.append(line)
    return metrics.markdown(lines)


def draw_lengths(path: Path, rows: pd.DataFrame) -> None:
    """Share of test strips without an error over their length, a line a network."""
    test = rows[rows["part"] == "test"]
    test = test.assign(percent=100 * test["right"] / test["strips"])
    title = "Longer strips than in training: does the transformer read them?"
    with metrics.picture(path, f"{title}\n{metrics.bands_of(test)}", width=10) as axes:
        colors = metrics.colors_of(list(dict.fromkeys(test["value"])), ordered=False)
        for name, found in test.groupby("value", sort=False):
            style = {"errorbar": ("pi", 100), "marker": "o", "color": colors[name], "label": name}
            metrics.draw_line(axes, found, "length", "percent", **style)
        axes.axvspan(SEEN + 0.5, LONGEST + 0.5, color="0.9", zorder=0, label="never in training")
        labels = {"xlabel": "digits in the strip", "ylabel": "strips without an error (%)"}
        axes.set(ylim=(-2, 102), xlim=(0.5, LONGEST + 0.5), **labels)
        metrics.legend_beside(axes)


def draw_maps(path: Path, model: StripReader, examples: dict[str, tuple[Strips, Tensor]]) -> None:
    """Each strip, and below it on the same axis where the last layer looks for each digit.

    examples: {name: (one strip, what the model wrote for it (1, N + 1))}.
    """
    size = {"width": 11, "height": 4 * len(examples) + 1, "squeeze": False}
    title = "Where the decoder looks when it writes a digit"
    what = "cross-attention of the last layer, mean of its heads; each row sums to 1"
    with metrics.picture(path, f"{title}\n({what})", 2 * len(examples), 1, **size) as panels:
        panels = panels[:, 0]
        for i, (name, (strip, written)) in enumerate(examples.items()):
            digits = text_of(written[0])
            n_rows = min(len(digits) + 1, written.shape[1])
            W = math.ceil(int(strip.widths) / COLUMNS) * COLUMNS
            own_past = strip._replace(numbers=written[:, :-1])
            weights = cross_attention(model, own_past)[-1].mean(1)[0, :n_rows, : W // COLUMNS]
            above, below = panels[2 * i : 2 * i + 2]
            extent = {"extent": (0, W, 28, 0), "aspect": "auto", "cmap": "gray_r"}
            above.imshow(strip.images[0, :, :W].numpy(), **extent)
            there = text_of(strip.numbers[0])
            above.set(yticks=[], xticks=[], title=f"{name}: {there}, read as {digits}")
            extent = {"extent": (0, W, n_rows, 0), "aspect": "auto", "cmap": "Blues"}
            drawn = below.imshow(weights.numpy(), vmin=0, vmax=0.5, **extent)
            names = [*digits, "end"][:n_rows]
            below.set_yticks([row + 0.5 for row in range(n_rows)], names)
            below.set(ylabel="written", xlim=(0, W))
            for axes in (above, below):
                axes.grid(False)
        below.set_xlabel("column of the strip (pixels)")
        bar = {"label": "attention weight (0.5 and more: darkest)", "shrink": 0.5}
        below.figure.colorbar(drawn, ax=list(panels), **bar)


def draw_misread(path: Path, strips: Strips, written: Tensor, title: str) -> None:
    """The strips one below the other in three columns, with what is there and what was written."""
    n_rows = max(1, math.ceil(min(len(written), 12) / 3))
    size = {"width": 13, "height": 1.5 * n_rows + 0.8, "squeeze": False}
    with metrics.picture(path, title, n_rows, 3, **size) as panels:
        for axes in panels.flat:
            axes.axis("off")
        n = min(len(written), panels.size)
        for i, axes in zip(range(n), panels.flat, strict=False):
            W = int(strips.widths[i])
            axes.imshow(strips.images[i, :, :W].numpy(), cmap="gray_r")
            words = f"{text_of(strips.numbers[i])}, written: {text_of(written[i])}"
            axes.set_title(words, fontsize=14)


def text_of(numbers: Tensor) -> str:
    """The digits before the end: (N,) -> such as 407."""
    digits = itertools.takewhile(lambda token: token != END, numbers.tolist())
    return "".join(str(token) if token < BEGIN else "?" for token in digits)


# ---- The program ----------------------------------------------------------------------------


def show_tables(out: Path, rows: pd.DataFrame, wanted: dict[str, Recipe]) -> None:
    """The tables that are saved, printed and drawn."""
    table = right_table(rows)
    beyond = beyond_table(rows)
    print(f"\nTest strips without an error (%), by digits, mean ± std over n seeds:\n{table}")
    print(f"\nStrips longer than any of training (1 … {SEEN} digits):\n{beyond}")
    text = f"{table}\n\n{beyond}\n"
    beams = metrics.load_rows(out / "transformer_beams.csv")
    if len(beams):
        named = beams.assign(
            reading=[f"beam of {w}" if w > 1 else "greedy" for w in beams["width"]]
        )
        lines = named[["reading", "strips", "right", "log_probability"]]
        print(f"\nGreedy and beam search on the same test strips ({MAIN}, seed 0):")
        print(metrics.markdown(lines))
        text += f"\n{metrics.markdown(lines)}\n"
    looks = metrics.load_rows(out / "transformer_attention.csv")
    if len(looks):
        table = attention_table(looks)
        print(f"\nCross-attention on the ink of the digit that is written (%), {MAIN}, seed 0:")
        print(table)
        text += f"\n{table}\n"
    (out / "transformer_tables.md").write_text(text, encoding="utf-8")
    draw_lengths(out / "transformer_lengths.png", rows)
    history = metrics.load_rows(out / "transformer_history.csv")
    runs = metrics.load_rows(out / "transformer_runs.csv")
    title = "Share of validation strips without an error, and their loss"
    metrics.draw_sweep(
        out / "transformer_training.png", runs, history, title, "network", ordered=False
    )


def show_reading(out: Path, model: StripReader, n_strips: int, data: Data) -> None:
    """Validation strips: some of each length, where the network looks, and what it misreads."""
    print("\nValidation strips: what is there, and what the network writes")
    examples = {}
    for length in range(1, LONGEST + 1):
        strips = fixed_strips(data.val, 3, length, length, seed=length)
        written = written_by(model, strips)
        pairs = zip(strips.numbers, written, strict=True)
        words = [f"{text_of(there)} {text_of(found)}" for there, found in pairs]
        print("  " + "     ".join(words))
        if length in (3, SEEN, LONGEST):
            name = f"{length} digits" + (", never in training" if length > SEEN else "")
            examples[name] = (strips.parts(1)[0], written[:1])
    draw_maps(out / "transformer_maps.png", model, examples)

    strips = fixed_strips(data.val, n_strips, 1, SEEN, seed=0)
    written = written_by(model, strips)
    _, targets = teacher_forced(strips.numbers)
    is_wrong = (written != targets).any(1)
    wrong = Strips(*(part[is_wrong] for part in strips))
    n_wrong = int(is_wrong.sum())
    title = f"{n_wrong} of {n_strips:,} validation strips are misread ({MAIN}, seed 0)"
    shown = "; the first 12" if n_wrong > 12 else ""
    draw_misread(out / "transformer_misread.png", wrong, written[is_wrong], title + shown)


def main(
    train: bool = False,
    evaluate: bool = False,
    smoke: bool = False,
    seeds: int = 3,
    workers: int = 1,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    out: Path = FIGURES,
    data_dir: Path = ROOT / "data",
    checkpoints: Path = ROOT / "out" / "interview",
) -> int:
    """Show a transformer at work: it reads strips of handwritten digits, number by number.

    Args:
        train: train first what is not saved yet; a command started again goes on.
        evaluate: measure the saved networks again.
        smoke: everything with small networks and few strips and steps, to see that it runs.
        seeds: runs of each recipe; those of more seeds join the tables later.
        workers: runs that are trained at the same time, each on one thread.
        device: what trains and evaluates; auto takes a GPU if there is one.
        out: the folder that tables, pictures and weights go to and are read from.
        data_dir: the folder that holds MNIST/raw.
        checkpoints: the folder for what a run needs to go on if it is stopped.
    """
    print("A transformer reads strips of MNIST digits (识别数字串): a minute from what is saved;")
    print("--train takes minutes on a GPU and hours without, --evaluate 15 minutes without")
    torch.set_num_threads(1)
    wanted = recipes(smoke)
    try:
        check_whole(seeds=seeds, workers=workers)
        if smoke and out.resolve() == FIGURES:
            raise ValueError("--smoke would overwrite the saved tables: give it a folder by --out")
        with stage1_mlp.claimed(out):
            if train:
                on = stage1_mlp.device_of(device)
                train_missing(out, wanted, seeds, data_dir, workers, on, checkpoints)
            if evaluate:
                evaluate_saved(out, wanted, data_dir, stage1_mlp.device_of(device))
            rows = metrics.load_rows(out / "transformer_lengths.csv")
            path = file_of(out, MAIN, ".pt")
            if rows.empty or not path.exists():
                print("\nNo trained network yet: python -m interview.transformer --train")
                return 0
            show_tables(out, rows, wanted)
            model = load_reader(path, wanted[MAIN])
            show_reading(out, model, wanted[MAIN].n_judged, data_on("cpu", data_dir))
    except (stage1_mlp.DataError, ValueError, OSError) as error:
        print(f"interview.transformer: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; what was reached is saved, the same command goes on", file=sys.stderr)
        return 130
    print(f"\ntables and pictures: {out}/transformer_*")
    return 0


if __name__ == "__main__":
    # workers look functions up by their module, and __main__ is another one there
    from interview import transformer

    sys.exit(tyro.cli(transformer.main))
