"""A modern language model: what Llama, Mistral and Qwen changed in GPT-2, and fast generation.

What this stage teaches: the few changes between GPT-2 and the open models of today (RMSNorm for
LayerNorm, rotary positions for a table, SwiGLU for GELU, shared keys and values, no biases), and
what generation needs: a cache of keys and values, one of constant size for streams without end,
prompts of different lengths in one batch, sampling, a small model that drafts for a large one. It
runs real weights (llama, mistral, qwen2, qwen3). Training is the parent's, unchanged.

Parent: 03_gpt/gpt.py; 02_attention/attention.py (apply_rope)
New: check_window, RMSNorm, SwiGLU, rope_frequencies, attention_mask, sink_attention, KVCache,
    RollingKVCache, CompiledStep, View, next_probs, pad, check_length, speculate, stream_text
Changed: GPTConfig -> TransformerConfig, GPT -> TransformerLM, Attention, Block, sample_next

Read in this order: TransformerConfig; RMSNorm to Block; the caches; TransformerLM from hidden to
stream; next_probs, speculate, stream_text; the training half, which is gpt.py's. Beside it,
weights.py reads and writes checkpoints and quantises.

Papers
- RMSNorm: Zhang and Sennrich 2019, arXiv 1910.07467; SwiGLU: Shazeer 2020, arXiv 2002.05202
- Rotary positions: Su et al. 2021, 2104.09864; stretched: Grattafiori et al. 2024, 2407.21783
- Keys and values shared by groups of heads: Ainslie et al. 2023, arXiv 2305.13245
- Norms on queries and keys: Henry et al. 2020, 2010.04245; in Qwen3: Yang et al. 2025, 2505.09388
- Sliding window: Jiang et al. 2023 (Mistral), 2310.06825; sinks: Xiao et al. 2023, 2309.17453
- Speculative decoding: Leviathan et al. 2022, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318
- min-p: Nguyen et al. 2024, 2407.01082; repetition penalty: Keskar et al. 2019, 1909.05858

Shapes: B batch, T time (tokens), S keys, C = d_model, H heads, K heads of keys and values, D = head
dim, V vocab.
"""

import codecs
import json
import math
import shutil
import signal
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import weights
from torch import nn
from torch.nn import functional as F

from common import atomic

# ---- the model


@dataclass
class TransformerConfig:
    """The shape of the model; the defaults are SmolLM2 with 135M parameters."""

    vocab_size: int = 49152  # number of token ids
    context_length: int = 2048  # longest input, tokens
    d_model: int = 576  # width of the residual stream
    n_layers: int = 30  # number of blocks
    n_heads: int = 9  # heads of queries in each block
    n_kv_heads: int | None = None  # heads of keys and values; None: as many as n_heads
    head_dim: int | None = None  # width of a head; None is d_model / n_heads
    d_ff: int | None = None  # width inside the MLP; None is 8/3 d_model, up to a multiple of 32
    dropout: float = 0.0  # share of activations set to 0 in training
    rope_theta: float = 10_000.0  # pair i of a head turns theta^(-2i / head_dim) radians a token
    rope_factor: float = 1.0  # Llama 3's stretching of slow rotations; 1 is none
    rope_low_freq_factor: float = 1.0  # pairs with fewer turns in rope_original are stretched
    rope_high_freq_factor: float = 4.0  # pairs with more turns in rope_original stay as they are
    rope_original: int = 8192  # context before it was stretched, tokens
    norm_eps: float = 1e-5  # added to the mean square in RMSNorm
    tie_embeddings: bool = True  # use the token embedding as the output layer, too
    qkv_bias: bool = False  # biases on queries, keys and values, as in Qwen2
    qk_norm: bool = False  # RMSNorm on each query and key, as in Qwen3
    window: int | None = None  # a token sees this many, itself the last; None: all before it
    full_layers: str = ""  # layers without the window, such as "0,5"
    sinks: int = 0  # first tokens that stay in sight of every window

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        self.d_ff = self.d_ff or -(-8 * self.d_model // 3 // 32) * 32
        sizes = "vocab_size context_length d_model n_layers n_heads n_kv_heads d_ff rope_original"
        for name in sizes.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not divisible by n_heads {self.n_heads}")
        self.head_dim = self.head_dim or self.d_model // self.n_heads
        if self.head_dim % 2 or self.head_dim < 2:
            raise ValueError(f"head_dim {self.head_dim} is odd or below 2: positions rotate pairs")
        if self.n_heads % self.n_kv_heads:
            heads = f"n_heads {self.n_heads} is not divisible by n_kv_heads"
            raise ValueError(f"{heads} {self.n_kv_heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not in [0, 1)")
        check_window(self.window, self.sinks)
        # Of initial weights. GPT-2's 0.02 is this at a width of 1,225; at 128 it learns far slower.
        self.std = 0.7 / math.sqrt(self.d_model)
        self.windows = [self.window] * self.n_layers  # that of each layer
        for layer in filter(None, self.full_layers.split(",")):
            if not layer.strip().isdigit() or int(layer) >= self.n_layers:
                raise ValueError(f"full_layers {self.full_layers!r}: there is no layer {layer}")
            self.windows[int(layer)] = None


def check_window(window, sinks):
    """Raises ValueError where a window and its sinks make no sense."""
    if window is not None and window < 1:
        raise ValueError(f"window {window} is less than 1: a token sees at least itself")
    if sinks < 0 or sinks > (window or 0):
        raise ValueError(f"sinks {sinks} is not between 0 and the window, {window}")


class Linear(nn.Module):
    """y = x Wᵀ + b, (..., d_in) to (..., d_out). W is drawn from a normal cut at 3 std."""

    def __init__(self, d_in, d_out, bias=True, std=0.02):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None
        nn.init.trunc_normal_(self.weight, std=std, a=-3 * std, b=3 * std)

    def forward(self, x):
        # One fused product and sum; x @ self.weight.T + self.bias is the same in two passes.
        return F.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """A learned vector for each id: (...) int64 to (..., d_model)."""

    def __init__(self, n_ids, d_model, std=0.02):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_ids, d_model))
        nn.init.trunc_normal_(self.weight, std=std, a=-3 * std, b=3 * std)

    def forward(self, ids):
        return self.weight[ids]


class RMSNorm(nn.Module):
    """Scale each vector to a mean square of 1, then by a learned weight: LayerNorm without the mean
    and the bias (Zhang and Sennrich 2019)."""

    def __init__(self, d_model, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # bfloat16 would lose digits
        scale = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + self.eps)
        return (wide * scale).type_as(x) * self.weight


def rope_frequencies(config):
    """Radians that each pair of a head turns per token: theta^(-2i/D), float32 (D/2,).

    With rope_factor > 1 pairs that turn less than rope_low_freq_factor times in the original
    context turn slower by that factor, the fast ones stay, those between are mixed (Llama 3)."""
    i = torch.arange(0, config.head_dim, 2, device="cpu").float()
    frequencies = config.rope_theta ** (-i / config.head_dim)
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    turns = frequencies * config.rope_original / (2 * math.pi)
    fast = ((turns - low) / (high - low)).clamp(0, 1)  # 0 slow, 1 fast
    return frequencies * (fast + (1 - fast) / config.rope_factor)


def apply_rope(x, cos, sin):
    """Rotate each pair (x[i], x[i + D/2]) of a head by the angle of its position (Su et al. 2021).

    x (..., T, D); cos and sin (..., T, D), as they broadcast: those of the D/2 angles twice over,
    the first half of the sines negative. The product of two vectors so rotated depends on how far
    apart they are and on nothing else."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def attention_mask(queries, keys, window=None, sinks=0):
    """True where a query sees a key: positions (B or 1, T) and (B or 1, S) to (B or 1, 1, T, S).

    A key at a negative position is padding or an empty slot; a query there sees only itself."""
    q, k = queries[:, None, :, None], keys[:, None, None, :]
    seen = (k >= 0) & (k <= q)
    if window is not None:
        seen &= (q - k < window) | (k < sinks)
    return seen | (k == q)


def sink_attention(q, q_sink, k, v, mask, is_sink):
    """Attention in which the first tokens stay in sight as if they stood right before the window.

    q (B, H, T, D) is rotated by its position, q_sink by what its position is to a sink: less than
    window + sinks away, or a long stream would show the model distances it was not trained on
    (Xiao et al. 2023). k, v (B, K, S, D), mask (B or 1, 1, T, S), is_sink (B or 1, 1, 1, S)."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))  # (B, H, S, D)
    scores = torch.where(is_sink, q_sink @ k.mT, q @ k.mT) / math.sqrt(q.shape[-1])  # (B, H, T, S)
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ v  # (B, H, T, D)


class Attention(nn.Module):
    """Causal self-attention in which groups of query heads share keys and values."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.window, self.dropout = layer, config.windows[layer], config.dropout
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        D = self.head_dim = config.head_dim
        rows, width = (config.n_heads + 2 * config.n_kv_heads) * D, config.n_heads * D
        self.qkv = Linear(config.d_model, rows, config.qkv_bias, config.std)
        # 2 n_layers sublayers add to the residual stream: scaled so, its variance does not grow.
        self.out = Linear(width, config.d_model, False, config.std / math.sqrt(2 * config.n_layers))
        norms = [RMSNorm(self.head_dim, config.norm_eps) for _ in "qk" if config.qk_norm]
        self.q_norm, self.k_norm = norms or (None, None)

    def forward(self, x, view, cache=None):
        """x (B, T, C) to the same; `view` is what TransformerLM.view makes for this layer."""
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H + 2 K, T, D)
        qk, v = qkv.split([self.n_heads + self.n_kv_heads, self.n_kv_heads], dim=1)
        if self.q_norm is not None:
            q, k = qk.split([self.n_heads, self.n_kv_heads], dim=1)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=1)
        rotated = apply_rope(qk, *view.rope).type_as(v)  # both at once: half as many operations
        q, k = rotated.split([self.n_heads, self.n_kv_heads], dim=1)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, K, S, D)
        if view.sink_rope is not None:
            q_sink = apply_rope(qk[:, : self.n_heads], *view.sink_rope).type_as(v)
            y = sink_attention(q, q_sink, k, v, view.mask, view.is_sink)
        else:
            grouped = dict(enable_gqa=True) if self.n_heads != self.n_kv_heads else {}
            dropout = self.dropout if self.training else 0.0
            causal = view.mask is None and T > 1
            y = F.scaled_dot_product_attention(q, k, v, view.mask, dropout, causal, **grouped)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


class SwiGLU(nn.Module):
    """Each token alone: wider, one half gating the other through SiLU, back (Shazeer 2020)."""

    def __init__(self, config):
        super().__init__()
        self.gate_up = Linear(config.d_model, 2 * config.d_ff, False, config.std)
        std = config.std / math.sqrt(2 * config.n_layers)
        self.down = Linear(config.d_ff, config.d_model, False, std)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # (B, T, d_ff)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Attention, then MLP, each on the normalised stream and added back to it."""

    def __init__(self, config, layer):
        super().__init__()
        self.norm1 = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, layer)
        self.norm2 = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, x, view, cache=None):
        x = x + self.dropout(self.attention(self.norm1(x), view, cache))
        return x + self.dropout(self.mlp(self.norm2(x)))


# ---- caches of keys and values


class KVCache:
    """Keys and values of every layer for up to `capacity` tokens, allocated once.

    `length` is the number of tokens held; setting it lower forgets the last ones. pads, int64 (B,):
    how many of a row's first tokens are padding."""

    window = None  # each layer's own

    def __init__(
        self, config, batch_size=1, capacity=None, pads=None, device="cpu", dtype=torch.float32
    ):
        self.capacity, self.pads, self.length = capacity or config.context_length, pads, 0
        self.sinks = config.sinks
        shape = (batch_size, config.n_kv_heads, self.capacity, config.head_dim)
        # Zeros, as what is left over in memory could be NaN, and 0 times NaN is not 0.
        layers = range(config.n_layers)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]

    def begin(self, T, device):
        """Make room for T tokens: their positions (B or 1, T), those of all keys (B or 1, S), and
        whether the keys are all tokens so far and nothing else.

        Raises ValueError where they do not fit."""
        if self.length + T > self.capacity:
            raise ValueError(
                f"{self.length} + {T} tokens do not fit into the cache, {self.capacity}"
            )
        self.length += T
        slots = torch.arange(self.length - T, self.length, device=device)
        return self.place(slots, self.length, exact=True)

    def place(self, slots, span, exact=False):
        """As begin, with the slots to write to, int64 (T,), and how many to look at: these may be
        more than there are tokens, unless `exact`."""
        self.slots, self.span = slots, span
        keys = torch.arange(span, device=slots.device)
        pads = 0 if self.pads is None else self.pads[:, None]
        return slots[None] - pads, keys[None] - pads, exact and self.pads is None

    def update(self, layer, k, v):
        """Store k and v (B, K, T, D) of the new tokens; returns those of all, (B, K, S, D)."""
        self.k[layer].index_copy_(2, self.slots, k)
        self.v[layer].index_copy_(2, self.slots, v)
        return self.k[layer][:, :, : self.span], self.v[layer][:, :, : self.span]


class RollingKVCache(KVCache):
    """Keys and values of the first `sinks` tokens and of a window: a stream of any length in
    constant memory (Xiao et al. 2023).

    Every layer sees only these, whatever the model's windows. Up to `chunk` tokens enter at once:
    chunk - 1 more are kept, and `length` can go back by as many. ValueError: no window."""

    def __init__(
        self, config, batch_size=1, window=None, sinks=None, chunk=128, device="cpu",
        dtype=torch.float32,
    ):  # fmt: skip
        self.window = config.window if window is None else window
        sinks = config.sinks if sinks is None else sinks
        if self.window is None:
            raise ValueError("this model has no window: give the RollingKVCache one")
        if window is None and None in config.windows:
            raise ValueError("some layers see everything: give the RollingKVCache a window for all")
        check_window(self.window, sinks)
        if chunk < 1:
            raise ValueError(f"chunk {chunk} is less than 1")
        self.chunk, self.ring = chunk, self.window + chunk - 1
        super().__init__(config, batch_size, sinks + self.ring, None, device, dtype)
        self.sinks = sinks
        # Which token is in a slot; a large negative number: none.
        self.held = torch.full((self.capacity,), -(2**40), device=device)

    def begin(self, T, device):
        if T > self.chunk:
            raise ValueError(f"{T} tokens at once: a RollingKVCache takes {self.chunk}")
        tokens = torch.arange(self.length, self.length + T, device=device)
        self.length += T
        ring = self.sinks + (tokens - self.sinks) % self.ring
        self.slots, self.span = torch.where(tokens < self.sinks, tokens, ring), self.capacity
        self.held[self.slots] = tokens
        return tokens[None], self.held[None], False


class CompiledStep:
    """One token of decoding with torch.compile; on CUDA a graph, too, which spends no time on
    launching kernels. A version looks at 256, 512, ... slots, and a mask hides the empty ones."""

    def __init__(self, model, cache):
        self.model, self.cache, self.versions = model, cache, {}
        batch, device = cache.k[0].shape[0], cache.k[0].device
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)

    def __call__(self, ids):
        """ids (B, 1) to logits (B, V), valid until the next call."""
        length, capacity = self.cache.length, self.cache.capacity
        if length >= capacity:
            raise ValueError(f"the cache of {capacity} tokens is full")
        span = min(capacity, 256 << (length // 256).bit_length())
        self.ids.copy_(ids)
        self.slot.fill_(length)
        if span not in self.versions:
            run = compiled(self.run, wanted=True)
            self.versions[span] = self.record(run, span) if ids.is_cuda else lambda: run(span)
        logits = self.versions[span]()
        self.cache.length += 1
        return logits

    def run(self, span):
        x = self.model.run(self.ids, *self.cache.place(self.slot, span), self.cache)
        return self.model.output(x[:, -1])  # (B, V)

    def record(self, run, span):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, and warms up what a graph cannot record
            for _ in range(3):
                run(span)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
            logits = run(span)

        def replay():
            graph.replay()
            return logits

        return replay


class View(NamedTuple):
    """What the tokens of a forward pass see in a layer."""

    rope: tuple  # cos and sin of their positions, (B or 1, 1, T, D)
    mask: torch.Tensor | None  # (B or 1, 1, T, S); None: all before it
    sink_rope: tuple | None = None  # of their positions as sinks have them; None: no sinks
    is_sink: torch.Tensor | None = None  # which keys are sinks, (B or 1, 1, 1, S)


class TransformerLM(nn.Module):
    """`model(ids)`: logits (B, T, V). `model(ids, targets)`: the mean loss in nats, a scalar.

    ids and targets: int64 (B, T) with T up to context_length. `tokenizer_files`, {name: text}, are
    written beside the weights by save_pretrained; `token_ids` holds eos_token_id and the like."""

    def __init__(self, config):
        super().__init__()
        self.config, self.tokenizer_files, self.token_ids = config, {}, {}
        self.token_embedding = Embedding(config.vocab_size, config.d_model, config.std)
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.output = Linear(config.d_model, config.vocab_size, False, config.std)
        if config.tie_embeddings:
            self.output.weight = self.token_embedding.weight

    def rope(self, positions):
        """cos and sin for apply_rope, float32 (B or 1, 1, T, D), at positions (B or 1, T)."""
        angles = positions[:, None, :, None] * self.frequencies  # (B or 1, 1, T, D/2)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)

    def view(self, positions, keys, exact, window, sinks):
        """The View of tokens at `positions` (B or 1, T) on keys at `keys` (B or 1, S). exact: the
        keys are all tokens so far and nothing else."""
        T, S = positions.shape[1], keys.shape[1]
        rope = self.rope(positions)
        if exact and T in (1, S) and (window is None or S <= window):
            return View(rope, None)
        mask = attention_mask(positions, keys, window, sinks)
        if window is None or not sinks:
            return View(rope, mask)
        is_sink = (keys >= 0) & (keys < sinks)
        near = positions.clamp(max=window - 1 + sinks)  # no further from a sink than that
        return View(rope, mask, self.rope(near), is_sink[:, None, None])

    def run(self, ids, positions, keys, exact=True, cache=None):
        """The blocks: ids (B, T), positions and keys as in view; returns (B, T, C)."""
        x, views = self.dropout(self.token_embedding(ids)), {}  # (B, T, C)
        sinks = self.config.sinks if cache is None else cache.sinks
        for block in self.blocks:
            window = getattr(cache, "window", None) or block.attention.window
            if window not in views:
                views[window] = self.view(positions, keys, exact, window, sinks)
            x = block(x, views[window], cache)
        return self.norm(x)

    def hidden(self, ids, cache=None):
        """What the output layer sees: (B, T) to (B, T, C). With a cache, ids are the tokens that
        follow those in it."""
        T = ids.shape[1]
        if cache is not None:
            return self.run(ids, *cache.begin(T, ids.device), cache)
        if T > self.config.context_length:
            raise ValueError(f"{T} tokens do not fit into {self.config.context_length}: crop them")
        positions = torch.arange(T, device=ids.device)[None]
        return self.run(ids, positions, positions)

    def forward(self, ids, targets=None, cache=None):
        logits = self.output(self.hidden(ids, cache))  # (B, T, V)
        return logits if targets is None else cross_entropy(logits, targets)

    def matrix_parameters(self):
        """Number of parameters in matrix products: the output layer counts, look-ups do not."""
        blocks = sum(p.numel() for p in self.blocks.parameters() if p.ndim == 2)
        return blocks + self.output.weight.numel()

    def flops_per_token(self):
        """Forward and backward pass at full context (Chowdhery et al. 2022)."""
        c = self.config
        attention = 12 * c.n_layers * c.n_heads * c.head_dim * c.context_length
        return 6 * self.matrix_parameters() + attention

    def prefill(self, ids, cache, chunk=1024):
        """Feed ids (B, T) to the cache in chunks, so that memory does not grow with T; returns the
        logits after the last token, (B, V)."""
        chunk = min(chunk, getattr(cache, "chunk", chunk))
        for piece in ids.split(chunk, dim=1):
            x = self.hidden(piece, cache)  # (B, chunk, C)
        return self.output(x[:, -1])

    @torch.inference_mode()
    def stream(
        self, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=None, min_p=None,
        repetition_penalty=1.0, seed=None, cache=None, compile=None,
    ):  # fmt: skip
        """Yield the next ids and their log-probabilities, int64 and float32 (B,), token by token.

        prompts: int64 (B, T) or lists of ids of any lengths. The log-probabilities are the model's
        own, before penalty, temperature and filters. With a cache, prompts follow what it holds;
        after the last token drawn it holds all but that one. compile: use CompiledStep; None: on
        CUDA (on a CPU it takes a minute). Raises ValueError where prompt and new tokens do not fit
        into the context (a RollingKVCache has none), and for prompts of different lengths with a
        cache of the caller's."""
        if repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty {repetition_penalty} is not above 0")
        weight = self.token_embedding.weight
        ids, pads = (prompts, None) if torch.is_tensor(prompts) else pad(prompts, weight.device)
        if ids.numel() == 0 or (cache is not None and pads is not None):
            raise ValueError("a prompt without a token, or of different lengths after one cache")
        if cache is None:
            total = check_length(ids.shape[1], max_new_tokens, self.config)
            cache = KVCache(self.config, len(ids), total, pads, weight.device, weight.dtype)
        self.eval()
        generator = None if seed is None else torch.Generator(ids.device).manual_seed(seed)
        seen = torch.zeros(len(ids), self.config.vocab_size, dtype=torch.bool, device=ids.device)
        compile = (ids.is_cuda if compile is None else compile) and type(cache) is KVCache
        step = CompiledStep(self, cache) if compile else lambda ids: self.prefill(ids, cache)
        logits = self.prefill(ids, cache).float()  # (B, V)
        for n in range(max_new_tokens):
            chosen = logits
            if repetition_penalty != 1.0:
                seen.scatter_(1, ids, True)
                penalty = torch.where(logits > 0, 1 / repetition_penalty, repetition_penalty)
                chosen = torch.where(seen, logits * penalty, logits)
            next_ids = sample_next(chosen, temperature, top_k, top_p, generator, min_p)  # (B,)
            log_probs = logits.gather(1, next_ids[:, None])[:, 0] - logits.logsumexp(1)
            yield next_ids, log_probs
            if n + 1 < max_new_tokens:
                ids = next_ids[:, None]
                logits = step(ids).float()

    def generate(self, prompts, max_new_tokens, stop_tokens=(), **settings):
        """Continue each prompt by up to max_new_tokens: int64 (B, T) gives (B, T + new), where a
        row that has drawn one of stop_tokens repeats it; lists of ids give lists of the new ids,
        the stop token their last. `settings` are those of stream."""
        training, new = self.training, []
        stops = torch.tensor(list(stop_tokens), device=self.token_embedding.weight.device)
        try:
            for next_ids, _ in self.stream(prompts, max_new_tokens, **settings):
                stopped = torch.isin(new[-1], stops) if new else torch.zeros_like(next_ids).bool()
                new.append(torch.where(stopped, new[-1], next_ids) if new else next_ids)
                if torch.isin(new[-1], stops).all():
                    break
        finally:
            self.train(training)
        if torch.is_tensor(prompts):
            return torch.cat([prompts, *(ids[:, None] for ids in new)], dim=1)
        rows = [[ids[i].item() for ids in new] for i in range(len(prompts))]
        ends = [[n for n, token in enumerate(row, 1) if token in stop_tokens] for row in rows]
        return [row[: end[0]] if end else row for row, end in zip(rows, ends)]

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=torch.float32):
        """A llama, mistral, qwen2 or qwen3 in Hugging Face's layout (a directory with config.json
        and *.safetensors), or a .gguf file of such a model, dequantised.

        Raises ValueError where a file is missing or unreadable, the architecture or quantisation is
        another, or tensors are missing, misshapen or unknown: all of them are named."""
        fields, tensors, files, token_ids = weights.read(Path(path))
        config = TransformerConfig(**fields)
        with torch.device("meta"):  # nothing is drawn that would be overwritten
            model = cls(config)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        state = weights.assemble(tensors, shapes, config, path)
        model.load_state_dict(state, strict=False, assign=True)
        if config.tie_embeddings:
            model.output.weight = model.token_embedding.weight
        model.to(dtype).frequencies = rope_frequencies(config)  # float32 in any case
        model.tokenizer_files, model.token_ids = files, token_ids
        return model.to(device)

    def save_pretrained(self, path):
        """Write config.json, model.safetensors (float32) and the tokenizer, if it is known, from
        which `transformers` gives these logits. Each file appears whole or not at all.

        Raises ValueError for what no layout of theirs holds: sinks, quantised weights."""
        weights.write(Path(path), self)


# ---- sampling


def next_probs(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """The distribution to draw the next id from, float32 (B, V), for logits (B, V).

    temperature divides the logits; 0 puts all on the likeliest id. top_k keeps the k likeliest ids,
    min_p those with at least this share of the likeliest one's probability, top_p the fewest whose
    probabilities reach p, counted after the other two. Raises ValueError for what none can be."""
    if temperature < 0:
        raise ValueError(f"temperature {temperature} is below 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k {top_k} is below 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} is not in (0, 1]")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p {min_p} is not in [0, 1]")
    logits = logits.float()
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    probs = (logits / temperature).softmax(-1)
    if top_k is not None and top_k < probs.shape[-1]:
        probs = probs * (probs >= probs.topk(top_k).values[:, -1:])
    if min_p is not None:
        probs = probs * (probs >= min_p * probs.amax(-1, keepdim=True))
    if top_p is not None:
        ordered, order = probs.sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # the first is always kept
        keep = before < top_p * ordered.sum(-1, keepdim=True)
        probs = torch.zeros_like(probs).scatter(-1, order, ordered * keep)
    return probs / probs.sum(-1, keepdim=True)


def sample_next(logits, temperature=1.0, top_k=None, top_p=None, generator=None, min_p=None):
    """Draw the next id for each row from next_probs: logits (B, V) to int64 (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = next_probs(logits, temperature, top_k, top_p, min_p)
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1)


def pad(prompts, device="cpu"):
    """Lists of ids to one int64 (B, T), padded on the left with their first ids so that all end
    together, and the number of pads of each row, int64 (B,), or None where there are none.

    Raises ValueError for an empty prompt."""
    if not prompts or not all(prompts):
        raise ValueError("a prompt without a token: give at least one, such as the end of text")
    T = max(map(len, prompts))
    ids = [[row[0]] * (T - len(row)) + list(row) for row in prompts]
    pads = torch.tensor([T - len(row) for row in prompts], device=device)
    return torch.tensor(ids, device=device), pads if pads.any() else None


def check_length(n_prompt, n_new, config):
    """The tokens in all; ValueError where they do not fit into the context."""
    if n_prompt + n_new > config.context_length:
        raise ValueError(
            f"{n_prompt} tokens and {n_new} new ones do not fit into a context of "
            f"{config.context_length}: give fewer, or a RollingKVCache"
        )
    return n_prompt + n_new


@torch.inference_mode()
def speculate(
    model, draft, ids, max_new_tokens, draft_tokens=4, stop_tokens=(), seed=None, **settings
):
    """Yield the next ids of one prompt, a list of ids: drawn as by `model` alone, in fewer of its
    passes (Leviathan et al. 2022). settings: temperature, top_k, top_p, min_p.

    The draft proposes draft_tokens ids, one by one; the model scores all of them in one pass. A
    proposal x is kept with probability min(1, p(x) / q(x)), p the model's and q the draft's; at the
    first that is not, one is drawn from max(0, p - q). So each id is drawn from p, whatever q is.
    Raises ValueError where the vocabularies differ, and as TransformerLM.stream does."""
    if model.config.vocab_size != draft.config.vocab_size:
        raise ValueError("model and draft have different vocabularies: they cannot share tokens")
    weight, caches = model.token_embedding.weight, []
    device = pad([ids], weight.device)[0].device  # a prompt without a token is refused
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    tokens, end = list(ids), len(ids) + max_new_tokens
    for which in (model.eval(), draft.eval()):
        capacity = check_length(len(ids), max_new_tokens, which.config) + draft_tokens
        caches.append(KVCache(which.config, 1, capacity, None, device, weight.dtype))

    def distributions(which, cache, ids, last):
        """Of the id after each of the last ones, (last, V); feeds what the cache lacks."""
        new = torch.tensor([ids[cache.length :]], device=device)
        return next_probs(which.output(which.hidden(new, cache)[0, -last:]), **settings)

    def draw(probs):
        return torch.multinomial(probs, 1, generator=generator).item()

    while len(tokens) < end:
        proposed, q = list(tokens), []
        for _ in range(draft_tokens):
            q.append(distributions(draft, caches[1], proposed, 1)[0])  # (V,)
            proposed.append(draw(q[-1]))
        p = distributions(model, caches[0], proposed, draft_tokens + 1)  # (draft_tokens + 1, V)
        new = []
        for x, p_x, q_x in zip(proposed[len(tokens) :], p, q):
            if torch.rand((), generator=generator, device=device) * q_x[x] >= p_x[x]:
                rest = (p_x - q_x).clamp(min=0)
                new.append(draw(rest / rest.sum()))
                break
            new.append(x)
        else:
            new.append(draw(p[-1]))
        for token in new[: end - len(tokens)]:
            yield token
            if token in stop_tokens:
                return
        tokens += new
        for cache in caches:  # forget proposals that were not kept
            cache.length = min(cache.length, len(tokens) - 1)


def stream_text(
    model, tokenizer, ids, max_new_tokens, stop=(), stop_tokens=(), on_token=None, **settings
):
    """Yield the text that follows ids, a list, piece by piece; it ends before one of the strings in
    `stop` or one of stop_tokens. No character is yielded in halves, nor the start of a stop string.

    on_token(id) is called for each token drawn; `settings` are those of TransformerLM.stream."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    held = ""
    prompt = torch.tensor([ids], device=model.token_embedding.weight.device)
    for next_ids, _ in model.stream(prompt, max_new_tokens, **settings):
        token = next_ids.item()
        if on_token:
            on_token(token)
        if token in stop_tokens:
            break
        held += decoder.decode(tokenizer.tokens.get(token, b""))
        cuts = [held.index(s) for s in stop if s in held]
        if cuts:
            yield held[: min(cuts)]
            return
        kept = max((n for s in stop for n in range(1, len(s)) if held.endswith(s[:n])), default=0)
        if len(held) > kept:
            yield held[: len(held) - kept]
            held = held[len(held) - kept :]
    yield held + decoder.decode(b"", final=True)


# ---- training, as in 03_gpt/gpt.py


def cross_entropy(logits, targets):
    """Mean of -log softmax(logits)[target] in nats: logits (..., V), targets int64 (...).

    log-sum-exp subtracts the largest logit first, so that nothing overflows."""
    logits = logits.to(
        torch.promote_types(logits.dtype, torch.float32)
    )  # bfloat16 would lose digits
    chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)  # (...)
    return (logits.logsumexp(-1) - chosen).mean()


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay, on matrices only (Loshchilov and Hutter 2017).

    m and v are running means of the gradient and its square; dividing by 1 - beta^t undoes their
    start from 0. The base class gives zero_grad, param_groups and state_dict."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, eps, (beta1, beta2) = group["lr"], group["eps"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                state["step"] += 1
                m, v, t = state["m"], state["v"], state["step"]
                m.lerp_(p.grad, 1 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                if p.ndim >= 2:
                    p.mul_(1 - lr * group["weight_decay"])
                # p -= lr m' / (sqrt(v') + eps), with m' = m / (1 - beta1^t), v' = v / (1 - beta2^t)
                root = math.sqrt(1 - beta2**t)
                p.addcdiv_(m, v.sqrt().add_(eps * root), value=-lr * root / (1 - beta1**t))


def lr_schedule(step, max_lr, min_lr, warmup_steps, total_steps):
    """Learning rate: up in a line to max_lr at warmup_steps, down a half cosine to min_lr at
    total_steps, then min_lr. It depends on nothing but `step`: a resume cannot restart it."""
    if step < warmup_steps:
        return max_lr * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_lr + (max_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def clip_gradients(params, max_norm):
    """Scale all gradients together so that their joint 2-norm is at most max_norm; returns the norm
    before."""
    grads = [p.grad for p in params if p.grad is not None]
    norm = torch.stack([g.norm() for g in grads]).norm()
    if norm > max_norm:
        scale = max_norm / (norm + 1e-6)
        for g in grads:
            g.mul_(scale)
    return norm


def get_batch(tokens, batch_size, context_length, device="cpu"):
    """Random windows of `tokens`, a 1-D array (a memory map stays one): ids and targets, both int64
    (B, T), the targets one token further on. Raises ValueError if there is no whole window."""
    if len(tokens) <= context_length:
        raise ValueError(
            f"the text has {len(tokens)} tokens: context_length {context_length} needs one more "
            "than that; take more text or a shorter context"
        )
    starts = torch.randint(len(tokens) - context_length, (batch_size,)).numpy()
    windows = tokens[starts[:, None] + np.arange(context_length + 1)]  # (B, T + 1)
    windows = torch.from_numpy(np.asarray(windows, dtype=np.int64))
    if torch.device(device).type == "cuda":  # pinned, so that the copy need not be waited for
        windows = windows.pin_memory().to(device, non_blocking=True)
    return windows[:, :-1], windows[:, 1:]


@torch.no_grad()
def evaluate(model, tokens, context_length, max_tokens=None, batch_size=32, device="cpu"):
    """Mean loss in nats over non-overlapping windows of context_length from the start of `tokens`
    up to max_tokens (all, the last window shorter, where it is None)."""
    if len(tokens) < 2:
        raise ValueError(f"{len(tokens)} held-out tokens are too few: take more text")
    training = model.training
    model.eval()
    ids = torch.from_numpy(np.asarray(tokens[: max_tokens and max_tokens + 1], dtype=np.int64))
    n = len(ids) - 1  # targets
    whole = n // context_length * context_length
    windows = list(ids[:whole].view(-1, context_length).split(batch_size)) if whole else []
    targets = list(ids[1 : whole + 1].view(-1, context_length).split(batch_size)) if whole else []
    if whole < n:
        windows.append(ids[None, whole:n])
        targets.append(ids[None, whole + 1 : n + 1])
    total = 0.0
    for x, y in zip(windows, targets):
        total += model(x.to(device), y.to(device)).item() * y.numel()
    model.train(training)
    return total / n


def save_checkpoint(model, optimizer, step, out):
    """Weights, optimizer, random state, step; to a path (whole or not at all) or an open file."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    if hasattr(out, "write"):
        torch.save(state, out)
    else:
        with atomic(out) as file:
            torch.save(state, file)


def load_checkpoint(src, model, optimizer):
    """Restore what save_checkpoint wrote, into model, optimizer and torch's random state; returns
    the step. Raises ValueError where the file is unreadable, truncated or of another model."""
    try:
        state = torch.load(src, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except Exception as error:  # torch.load raises a dozen kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(
            f"checkpoint {src} cannot be read ({reason}): remove it, or start again with --fresh"
        ) from None
    torch.set_rng_state(state["rng"])
    if torch.cuda.is_available() and state["cuda_rng"]:
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    return state["step"]


@dataclass
class TrainConfig:
    """How to train; run.py chooses the values for the machine and preset."""

    steps: int = 1000  # optimizer steps
    tokens_per_step: int = 8192  # batch size, tokens
    micro_batch: int | None = None  # sequences at once, the rest is accumulated; None: what fits
    max_lr: float = 1e-3  # learning rate after the warm-up
    min_lr: float = 1e-4  # learning rate at the end
    warmup_steps: int = 100  # steps of rising learning rate
    weight_decay: float = 0.1  # AdamW's, on matrices
    beta1: float = 0.9  # AdamW's memory of gradients
    beta2: float = 0.99  # AdamW's memory of squared gradients
    max_norm: float = 1.0  # gradients are clipped to this norm
    eval_every: int = 100  # steps between evaluations and checkpoints
    eval_tokens: int = 50_000  # held-out tokens in an evaluation
    patience: int = 10  # evaluations without a better loss before it stops early
    seed: int = 1  # of initialisation, batches and dropout
    compile: bool | None = None  # torch.compile; None: on CUDA (on a CPU it takes half a minute)

    def __post_init__(self):
        for name in ("steps", "tokens_per_step", "eval_every", "eval_tokens", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")


def micro_batch_size(config, context_length, sequences, device):
    """Sequences at once on a CUDA device: what fits in two thirds of the free memory. A token keeps
    about 36 bytes a layer and channel and 10 a vocabulary entry until the backward pass."""
    if torch.device(device).type != "cuda":
        return sequences
    per_token = 36 * config.n_layers * config.d_model + 10 * config.vocab_size
    fits = int(0.66 * torch.cuda.mem_get_info(device)[0] / (per_token * context_length))
    return max(1, min(sequences, fits))


def compiled(model, wanted):
    """torch.compile, where it is wanted and a C compiler is there; otherwise the model as it is."""
    if wanted and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        warnings.warn("no C compiler here: training without torch.compile, slower", stacklevel=2)
        wanted = False
    return torch.compile(model) if wanted else model


def train(model, train_tokens, val_tokens, config, run, device="cpu", dtype=torch.float32, **hooks):
    """Train `model` in place; returns the last line of metrics.

    train_tokens, val_tokens: 1-D integer arrays. `run` has `dir`, `resume` and `log(**metrics)`, as
    common.Run. In run.dir: state.pt, the newest state, after each evaluation and when stopped; and
    the model of the lowest validation loss as save_pretrained writes it.
    hooks: val_bytes, the size of the held-out text, for bits per byte; peak_flops, of the machine,
    for MFU; on_step(metrics). Ctrl-C and SIGTERM save, then exit with 130 and 0; a second one ends
    at once. Raises ValueError on a loss that is not finite; state.pt is then the last good one."""
    context_length = model.config.context_length
    sequences = max(1, config.tokens_per_step // context_length)
    micro = config.micro_batch or micro_batch_size(model.config, context_length, sequences, device)
    chunks = [min(micro, sequences - i) for i in range(0, sequences, micro)]
    betas = (config.beta1, config.beta2)
    optimizer = AdamW(model.parameters(), config.max_lr, betas, weight_decay=config.weight_decay)
    kind, wanted = torch.device(device).type, config.compile
    forward = compiled(model, kind == "cuda" if wanted is None else wanted)
    autocast = torch.autocast(kind, dtype) if dtype != torch.float32 else nullcontext()
    bits_per_byte = len(val_tokens) / hooks.get("val_bytes", math.inf) / math.log(2)  # times nats
    state, step, best, since_best, trained, line = run.dir / "state.pt", 0, math.inf, 0, 0.0, {}
    if run.resume and state.exists():
        step = load_checkpoint(state, model, optimizer)
        for line in map(json.loads, open(run.dir / "metrics.jsonl")):
            if line["step"] <= step:
                trained = line["time"]
                if line.get("val_loss") is not None:
                    since_best = 0 if line["val_loss"] < best else since_best + 1
                    best = min(best, line["val_loss"])
    signals = []

    def stop(number, _):
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    start = time.perf_counter() - trained
    model.train()
    while step < config.steps and since_best < config.patience and not signals:
        began = time.perf_counter()
        step += 1
        args = (config.max_lr, config.min_lr, config.warmup_steps, config.steps)
        lr = optimizer.param_groups[0]["lr"] = lr_schedule(step, *args)
        loss = 0.0
        for n in chunks:  # each chunk's mean counts by its share, as if it were one batch
            ids, targets = get_batch(train_tokens, n, context_length, device)
            with autocast:
                part = forward(ids, targets) * (n / sequences)
            part.backward()
            loss += part.item()
        norm = clip_gradients(model.parameters(), config.max_norm).item()
        if not math.isfinite(loss + norm):
            raise ValueError(
                f"step {step}: the loss is {loss}, the gradient norm {norm}: stopped; {state} "
                "holds the last good state; lower --max_lr or look at the text around there"
            )
        optimizer.step()
        optimizer.zero_grad()
        rate = sequences * context_length / (time.perf_counter() - began)
        mfu = (
            rate * model.flops_per_token() / hooks["peak_flops"] if "peak_flops" in hooks else None
        )
        line = dict(step=step, time=round(time.perf_counter() - start, 3), train_loss=loss, lr=lr)
        line |= dict(tokens=step * sequences * context_length, grad_norm=norm, tokens_per_s=rate)
        line |= dict(mfu=mfu, val_loss=None, val_bpb=None)
        if step % config.eval_every == 0 or step == config.steps:
            size = max(1, 16384 // context_length)
            with autocast:
                val_loss = evaluate(
                    model, val_tokens, context_length, config.eval_tokens, size, device
                )
            line |= dict(val_loss=val_loss, val_bpb=val_loss * bits_per_byte)
            since_best = 0 if val_loss < best else since_best + 1
            if val_loss < best:
                best = val_loss
                model.save_pretrained(run.dir)
        run.log(**line)
        if line["val_loss"] is not None:
            save_checkpoint(model, optimizer, step, state)
        if "on_step" in hooks:
            hooks["on_step"](line)
    if signals:
        save_checkpoint(model, optimizer, step, state)
        if best == math.inf:  # no evaluation yet: this model is the best there is
            model.save_pretrained(run.dir)
        print(
            f"stopped after step {step} and saved in {run.dir}: the same command goes on from there"
        )
        sys.exit(130 if signals[0] == signal.SIGINT else 0)
    return line
