"""One model, many callers: continuous batching over a paged cache of keys and values.

What this stage teaches: a token of one stream costs a pass over all weights, and so does one token
of each of thirty streams; so a server lays the tokens of all its streams behind one another and
feeds them together. There is no phase of reading prompts and phase of writing: a stream has tokens,
of which so many are in the cache, and each pass takes one of every stream that is writing and as
much of the new prompts as the pass has room for. Streams come and go between two passes. The cache
is pages of 16 tokens that belong to no one in particular, so memory is used as it is needed, and
what two streams begin with, such as all earlier turns of a chat, is kept and computed once.

Parent: 04_modern/modern.py
New: Pass, record, Graph, PagedKVCache, Sampling, TextStream, Request, Busy, Engine, Piece,
    penalise, sample_rows, load
Changed: Attention, Block, TransformerLM

Read in this order: PagedKVCache and Pass (Graph is for GPUs); Attention; TransformerLM;
sample_rows; TextStream; Engine from submit to step. Beside it: gpt2.py is 03's model with the same
cache, loading.py reads checkpoints, prompts.py writes a chat down as its model wants it, serve.py
is the API.

Papers
- Iteration-level scheduling: Yu et al. 2022 (Orca), OSDI; pages: Kwon et al. 2023, arXiv 2309.06180
- Prefixes found again: Zheng et al. 2023 (SGLang), 2312.07104; prompts in chunks beside tokens:
  Agrawal et al. 2023 (Sarathi), 2308.16369
- The model's are in 04_modern/modern.py.

Shapes: N tokens of a pass, of all streams, T of one of them, S keys, B streams with one token,
C = d_model, H heads, K heads of keys and values, D = head dim, V vocab.
"""

import codecs
import math
import queue
import random
import threading
import time
import traceback
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import gpt2
import loading
import torch
from torch import nn
from torch.nn import functional as F

# ---- the cache


class PagedKVCache:
    """Keys and values of every layer in n_pages pages of page_size tokens each (Kwon et al. 2023).

    A stream holds a list of pages; `users` counts the streams that hold one. A full page is known
    by `key`, a digest of its tokens and all tokens before, and is found by it as long as nobody
    needs the place, also when its stream has ended. `free` are the pages without a user, the one
    that was given back first in front."""

    def __init__(self, config, n_pages, page_size=16, device="cpu", dtype=torch.float32):
        if n_pages < 1:
            raise ValueError(f"a cache of {n_pages} pages holds nothing: give it more memory")
        self.page_size, self.n_pages = page_size, n_pages
        # Zeros: what is left over in memory could be NaN, and 0 times NaN is not 0. The last page
        # is nobody's: a Graph writes there for the streams that it lacks.
        shape = (n_pages + 1, page_size, config.n_kv_heads, config.head_dim)
        layers = range(config.n_layers)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.free, self.users = OrderedDict.fromkeys(range(n_pages)), [0] * n_pages
        self.key, self.found = [None] * n_pages, {}

    @staticmethod
    def bytes_per_page(config, page_size=16, dtype=torch.float32):
        row = config.n_kv_heads * config.head_dim * dtype.itemsize
        return 2 * config.n_layers * page_size * row

    def take(self):
        """A page for a new user; what it held is forgotten. None where there is no free one."""
        if not self.free:
            return None
        page, _ = self.free.popitem(last=False)
        self.found.pop(self.key[page], None)
        self.key[page], self.users[page] = None, 1
        return page

    def share(self, key):
        """The full page with this key, for one more user; None where it is not known."""
        page = self.found.get(key)
        if page is not None:
            self.free.pop(page, None)
            self.users[page] += 1
        return page

    def release(self, pages):
        """Give a stream's pages back, the last first: what is shared more often stays longer."""
        for page in reversed(pages):
            self.users[page] -= 1
            if not self.users[page]:
                self.free[page] = None

    def remember(self, page, key):
        """A page is full: it can be found from now on, unless one with the same tokens can."""
        if key not in self.found:
            self.key[page], self.found[key] = key, page

    @staticmethod
    def page_key(before, tokens):
        """Of a page of tokens behind one whose key is `before`. A digest, not Python's hash: two
        prompts made to collide would else read each other's past."""
        return sha256(before + b"".join(t.to_bytes(4, "little") for t in tokens)).digest()


class Pass:
    """One pass of the model over new tokens of many streams, laid behind one another: (1, N).

    rows: [(pages, start, n), ...], a stream's pages, how many of its tokens are in the cache, and
    how many come now; streams with one token come first. `positions` (1, N); `ends`, where each
    stream's last token is."""

    def __init__(self, cache, rows, device):
        size, places, slots = cache.page_size, [], []
        for pages, start, n in rows:
            places += range(start, start + n)
            slots += [pages[p // size] * size + p % size for p in range(start, start + n)]
        self.cache, self.masks = cache, {}
        self.positions = torch.tensor([places], device=device)  # (1, N)
        self.slots = torch.tensor(slots, device=device)  # (N,), the place of each in the cache
        self.ends = torch.tensor([n for _, _, n in rows], device=device).cumsum(0) - 1
        ones = [(pages[: start // size + 1]) for pages, start, n in rows if n == 1]
        self.B, most = len(ones), max(map(len, ones), default=0)
        # Short streams are filled up with page 0, out of sight behind the mask.
        self.tables = torch.tensor([p + [0] * (most - len(p)) for p in ones], device=device)
        self.chunks, at = [], self.B
        for pages, start, n in rows[self.B :]:
            held = torch.tensor(pages[: -(-(start + n) // size)], device=device)
            self.chunks.append((at, at + n, held, start + n))
            at += n

    def mask(self, window, first, last, S):
        """Of the tokens first to last on S keys, made once for all layers with this window."""
        if (window, first) not in self.masks:
            positions = self.positions[0, first:last]  # (T,), or (B,) of streams with one token
            positions = positions[:, None] if first < self.B else positions[None]
            keys = torch.arange(S, device=positions.device)
            mask = attention_mask(positions, keys[None], window)
            self.masks[window, first] = mask  # (B, 1, 1, S) or (1, 1, T, S)
        return self.masks[window, first]

    def attend(self, layer, q, k, v, window=None):
        """Store k and v (1, K, N, D) of the new tokens, then attend: q (1, H, N, D) to the same."""
        keys, values = self.cache.k[layer], self.cache.v[layer]  # (pages, page_size, K, D)
        keys.view(-1, *keys.shape[2:])[self.slots] = k[0].transpose(0, 1)
        values.view(-1, *values.shape[2:])[self.slots] = v[0].transpose(0, 1)
        K, done = k.shape[1], []
        if self.B:
            k, v = (x[self.tables].flatten(1, 2).transpose(1, 2) for x in (keys, values))
            mask = self.mask(window, 0, self.B, k.shape[2])  # k, v (B, K, S, D)
            # The queries of a group share their keys, so they can stand where tokens would.
            ones = q[0, :, : self.B].transpose(0, 1).unflatten(1, (K, -1))  # (B, K, H/K, D)
            y = F.scaled_dot_product_attention(ones, k, v, mask)
            done.append(y.flatten(1, 2).transpose(0, 1))  # (H, B, D)
        for first, last, pages, S in self.chunks:
            k, v = (x[pages].flatten(0, 1)[None, :S].transpose(1, 2) for x in (keys, values))
            mask = self.mask(window, first, last, S)  # k, v (1, K, S, D)
            grouped = dict(enable_gqa=True) if K != q.shape[1] else {}
            y = F.scaled_dot_product_attention(q[:, :, first:last], k, v, mask, **grouped)
            done.append(y[0])  # (H, T, D)
        return torch.cat(done, dim=1)[None]  # (1, H, N, D)


def record(run, pool):
    """`run` as a CUDA graph: returns a function that runs the same kernels on the same memory with
    one launch, and returns the same tensor with its new values."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # what a first run sets up cannot be recorded
        run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # thread_local: another model's engine may be at work in its own thread.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        x = run()
    return lambda: (graph.replay(), x)[1]


class Graph:
    """The pass of up to B streams with one token each, in up to `most` pages, recorded once: the
    thousand kernels of a small model take several times as long to launch as to run."""

    def __init__(self, model, cache, B, most, pool=None):
        device, self.spare = cache.k[0].device, cache.n_pages * cache.page_size
        row = ([cache.n_pages] * most, most * cache.page_size - 1, 1)
        self.batch = Pass(cache, [row] * B, device)
        self.ids = torch.zeros(1, B, dtype=torch.long, device=device)

        def run():
            self.batch.masks = {}  # of the positions that are there by then
            return model.hidden(self.ids, self.batch)

        self.replay = record(run, pool)

    def __call__(self, ids, batch):
        """ids (1, N) of a Pass of N <= B streams to (1, N, C), as model.hidden(ids, batch)."""
        n, most = batch.tables.shape
        self.ids[:, :n] = ids
        self.batch.positions[:, :n] = batch.positions
        self.batch.tables[:n, :most] = batch.tables  # what stands behind is out of sight
        self.batch.slots.fill_(self.spare)
        self.batch.slots[:n] = batch.slots
        return self.replay()[:, :n]


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


class Attention(nn.Module):
    """Causal self-attention in which groups of query heads share keys and values."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.window = layer, config.windows[layer]
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        D = self.head_dim = config.head_dim
        rows, width = (config.n_heads + 2 * config.n_kv_heads) * D, config.n_heads * D
        self.qkv = Linear(config.d_model, rows, config.qkv_bias, config.std)
        # 2 n_layers sublayers add to the residual stream: scaled so, its variance does not grow.
        self.out = Linear(width, config.d_model, False, config.std / math.sqrt(2 * config.n_layers))
        norms = [RMSNorm(self.head_dim, config.norm_eps) for _ in "qk" if config.qk_norm]
        self.q_norm, self.k_norm = norms or (None, None)

    def forward(self, x, rope, cache):
        """x (B, T, C) to the same; rope: cos and sin of the positions; cache: a Pass, or of whole
        texts the mask (1, 1, T, T)."""
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H + 2 K, T, D)
        qk, v = qkv.split([self.n_heads + self.n_kv_heads, self.n_kv_heads], dim=1)
        if self.q_norm is not None:
            q, k = qk.split([self.n_heads, self.n_kv_heads], dim=1)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=1)
        rotated = apply_rope(qk, *rope).type_as(v)  # both at once: half as many operations
        q, k = rotated.split([self.n_heads, self.n_kv_heads], dim=1)
        if isinstance(cache, Pass):
            y = cache.attend(self.layer, q, k, v, self.window)
        else:
            grouped = dict(enable_gqa=True) if self.n_heads != self.n_kv_heads else {}
            mask = cache[self.window]
            y = F.scaled_dot_product_attention(q, k, v, mask, **grouped)
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

    def forward(self, x, rope, cache):
        x = x + self.attention(self.norm1(x), rope, cache)
        return x + self.mlp(self.norm2(x))


class TransformerLM(nn.Module):
    """`model(ids)`: logits (B, T, V). `model(ids, targets)`: the mean loss in nats, a scalar.

    ids and targets: int64 (B, T) with T up to context_length. Only for reading and writing text:
    there is no dropout."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token_embedding = Embedding(config.vocab_size, config.d_model, config.std)
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)
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

    def hidden(self, ids, cache):
        """What the output layer sees: ids (1, N) of a Pass to (1, N, C)."""
        x, rope = self.token_embedding(ids), self.rope(cache.positions)
        for block in self.blocks:
            x = block(x, rope, cache)
        return self.norm(x)

    def forward(self, ids, targets=None):
        T = ids.shape[1]
        if T > self.config.context_length:
            raise ValueError(f"{T} tokens do not fit into {self.config.context_length}: crop them")
        positions = torch.arange(T, device=ids.device)[None]
        masks = {w: attention_mask(positions, positions, w) for w in set(self.config.windows)}
        x, rope = self.token_embedding(ids), self.rope(positions)
        for block in self.blocks:
            x = block(x, rope, masks)
        logits = self.output(self.norm(x))  # (B, T, V)
        return logits if targets is None else cross_entropy(logits, targets)

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=torch.float32):
        """A llama, mistral, qwen2 or qwen3 in Hugging Face's layout (a directory with config.json
        and *.safetensors), or a .gguf file of such a model, dequantised.

        Raises ValueError where a file is missing or unreadable, the architecture or quantisation is
        another, or tensors are missing, misshapen or unknown: all of them are named."""
        return cls.from_tensors(path, *loading.read(Path(path))[:2], device, dtype)

    @classmethod
    def from_tensors(cls, path, hf, tensors, device="cpu", dtype=torch.float32):
        """As from_pretrained, of what loading.read gives."""
        try:
            config = TransformerConfig(**loading.config_from_hf(hf, path))
        except KeyError as error:
            raise ValueError(f"{path}: its config lacks {error}") from None
        with torch.device("meta"):  # nothing is drawn that would be overwritten
            model = cls(config)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        state = loading.assemble(tensors, shapes, config, path)
        model.load_state_dict(state, strict=False, assign=True)
        if config.tie_embeddings:
            model.output.weight = model.token_embedding.weight
        model.to(dtype).frequencies = rope_frequencies(config)  # float32 in any case
        return model.to(device)


def cross_entropy(logits, targets):
    """Mean of -log softmax(logits)[target] in nats: logits (..., V), targets int64 (...).

    log-sum-exp subtracts the largest logit first, so that nothing overflows."""
    logits = logits.to(
        torch.promote_types(logits.dtype, torch.float32)
    )  # bfloat16 would lose digits
    chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)  # (...)
    return (logits.logsumexp(-1) - chosen).mean()


def load(path, device="cpu", dtype=torch.float32):
    """(model, tokenizer) of a model directory, dense, or a .gguf file: the files say which kind.

    Raises ValueError as from_pretrained does."""
    hf, tensors, files = loading.read(Path(path))
    kind = gpt2.GPT if hf.get("model_type") == "gpt2" else TransformerLM
    model = kind.from_tensors(path, hf, tensors, device, dtype).eval().requires_grad_(False)
    if torch.device(device).type == "cpu":
        loading.store_by_column(model)
    return model, files


# ---- from logits to a token


@dataclass
class Sampling:
    """How the next token is drawn; the names are the API's."""

    max_tokens: int = 256  # longest answer
    temperature: float = 1.0  # divides the logits; 0 always takes the likeliest token
    top_k: int | None = None  # draw from the k likeliest tokens
    top_p: float = 1.0  # draw from the likeliest tokens that make up this probability
    min_p: float = 0.0  # draw from tokens with this share of the likeliest probability
    repetition_penalty: float = 1.0  # above 1: what was seen, the prompt too, is less likely
    presence_penalty: float = 0.0  # off the logit of each token that the answer has
    frequency_penalty: float = 0.0  # off it for each time that the answer has it
    logit_bias: dict = field(default_factory=dict)  # {id: what is added to its logit}
    seed: int | None = None  # of the draw
    stop: tuple = ()  # the answer ends before one of these strings
    stop_tokens: frozenset = frozenset()  # or with one of these ids
    top_logprobs: int | None = None  # tell log-probabilities, and those of so many others

    def __post_init__(self):
        def inside(name, low, high):
            value = getattr(self, name)
            if not low <= value <= high:  # NaN is not
                raise ValueError(f"{name} {value} is not between {low} and {high}")

        inside("temperature", 0, 2)
        inside("top_p", 0, 1)
        inside("min_p", 0, 1)
        inside("presence_penalty", -2, 2)
        inside("frequency_penalty", -2, 2)
        inside("repetition_penalty", 0.1, 10)
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens {self.max_tokens} is below 1")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k {self.top_k} is below 1")

    def plain(self):
        """Whether the model's distribution is drawn from as it is."""
        return self.top_k is None and self.top_p == 1 and not self.min_p


def penalise(logits, sampling, prompt, answer):
    """logits (V,) less what the settings take from tokens that were seen, in place."""
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *answer}), dtype=torch.int64, device=logits.device)
        values, by = logits[seen], sampling.repetition_penalty
        logits[seen] = torch.where(values > 0, values / by, values * by)
    if answer and (sampling.presence_penalty or sampling.frequency_penalty):
        counts = Counter(answer)
        ids = torch.tensor(list(counts), device=logits.device)
        often = torch.tensor(list(counts.values()), device=logits.device)
        logits[ids] -= sampling.presence_penalty + sampling.frequency_penalty * often
    for token, bias in sampling.logit_bias.items():
        logits[token] += bias


def sample_rows(logits, samplings, chances, wide=1024):
    """The next id of each row of logits (B, V), a list. chances: a number in [0, 1) for each row,
    which says where in the distribution the draw falls, so that no row depends on its neighbours.

    Each distribution is next_probs of 04_modern/modern.py: top_k and min_p, then the likeliest that
    make up top_p of what these leave. A nucleus seldom has more than `wide` tokens, so no more are
    sorted unless one does."""
    ids = logits.argmax(-1).tolist()
    drawn = [i for i, s in enumerate(samplings) if s.temperature > 0]
    if not drawn:
        return ids
    device = logits.device
    temperature = torch.tensor([samplings[i].temperature for i in drawn], device=device)
    probs = (logits[drawn].float() / temperature[:, None]).softmax(-1)  # (rows, V)
    rows = [n for n, i in enumerate(drawn) if not samplings[i].plain()]
    if rows:
        V = probs.shape[-1]
        settings = [samplings[drawn[n]] for n in rows]
        top_k = torch.tensor([s.top_k or V for s in settings], device=device)[:, None]
        top_p, min_p = (
            torch.tensor([getattr(s, name) for s in settings], device=device)[:, None]
            for name in ("top_p", "min_p")
        )
        for width in (min(wide, V), V):
            ordered, order = probs[rows].topk(width)  # (rows, width), the likeliest first
            rank = torch.arange(width, device=device)
            kept = ordered * ((rank < top_k) & (ordered >= min_p * ordered[:, :1]))
            # Whether some token beyond these passes the first two filters, and may so the third.
            more = (top_k > width) & (ordered[:, -1:] >= min_p * ordered[:, :1])
            total = torch.where(more, 1.0, kept.sum(-1, keepdim=True))
            if width == V or not (more & (kept.sum(-1, keepdim=True) < top_p)).any():
                break
        before = kept.cumsum(-1) - kept  # the first is always kept
        kept = kept * ((before < top_p * total) | (rank == 0))
        probs[rows] = torch.zeros_like(probs[rows]).scatter(-1, order, kept)
    sums = probs.double().cumsum(-1)
    marks = torch.tensor([chances[i] for i in drawn], dtype=torch.double, device=device)
    picks = torch.searchsorted(sums, marks[:, None] * sums[:, -1:], right=True)[:, 0]
    for i, pick in zip(drawn, picks.tolist()):
        ids[i] = pick
    return ids


class Piece(NamedTuple):
    """What a caller gets of its answer, piece by piece."""

    text: str  # whole characters
    tokens: list  # those that text came from: (id, log-probability, [(id, log-probability), ...])
    finish: str | None = None  # stop, length, cancelled or error; None: there is more
    error: str | None = None


class TextStream:
    """Tokens to text: no character in halves, nothing of a stop string; `stopped` at one."""

    def __init__(self, tokenizer, stop=()):
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.tokenizer, self.stop, self.stopped = tokenizer, stop, False
        self.held = ""  # text that is not told yet, as it may begin a stop string
        self.waiting, self.ahead = [], 0  # [(token, characters)], and how many of these are told

    def push(self, token):
        """(text, tokens) that can be told now, one more token being there: (id, ...)."""
        new = self.decoder.decode(self.tokenizer.tokens.get(token[0], b""))
        self.waiting.append((token, len(new)))
        self.held += new
        cuts = [self.held.index(s) for s in self.stop if s in self.held]
        if cuts:
            self.stopped = True
            return self.tell(min(cuts))
        begun = (n for s in self.stop for n in range(1, len(s)) if self.held.endswith(s[:n]))
        return self.tell(len(self.held) - max(begun, default=0))

    def tell(self, end):
        """The held text up to `end`, and the tokens of which all characters are told by then. One
        that is part of a character goes with the one that completes it."""
        text, self.held = self.held[:end], self.held[end:]
        self.ahead += len(text)
        n = reached = length = 0
        for i, (_, characters) in enumerate(self.waiting, 1):
            length += characters
            if length > self.ahead:
                break
            if characters:
                n, reached = i, length
        tokens, self.waiting = [token for token, _ in self.waiting[:n]], self.waiting[n:]
        self.ahead -= reached
        return text, tokens

    def close(self):
        """What is left at the end: half a character becomes U+FFFD."""
        text, self.held = self.held + self.decoder.decode(b"", final=True), ""
        return text, [token for token, _ in self.waiting]


# ---- the engine

COUNTERS = {
    "requests": "Requests taken.",
    "refused": "Requests refused as the queue was full.",
    "tokens": "Tokens written.",
    "passes": "Passes of the model.",
    "pass_tokens": "Tokens fed in passes, of prompts and answers.",
    "reused_tokens": "Tokens of prompts that were found in the cache.",
    "preemptions": "Streams put back for want of memory.",
    "failures": "Passes that failed.",
    "first_tokens": "Answers begun.",
    "first_token_seconds": "Time to the first token, of all answers together.",
    "finished_stop": "Answers that came to an end.",
    "finished_length": "Answers as long as allowed.",
    "finished_cancelled": "Answers nobody waited for any more.",
    "finished_error": "Answers that failed.",
}


class Busy(Exception):
    """The queue is full; `seconds` until there may be room."""

    def __init__(self, waiting, seconds):
        super().__init__(f"{waiting} requests are waiting already: try again in {seconds} seconds")
        self.seconds = seconds


class Request:
    """A prompt, its answer so far, and where its keys and values are."""

    def __init__(self, ids, sampling, emit, text):
        self.tokens, self.n_prompt = list(ids), len(ids)
        self.sampling, self.emit, self.text = sampling, emit, text
        self.random = random.Random(sampling.seed)
        self.pages, self.cached, self.keys = [], 0, [b""]  # keys of its full pages, after an empty
        self.reused = 0  # tokens of the prompt that were found in the cache
        self.cancelled, self.submitted, self.first = False, time.perf_counter(), None

    @property
    def answer(self):
        return self.tokens[self.n_prompt :]


class Engine:
    """Writes the answers of many requests to one model at the same time, in a thread of its own.

    max_running: streams in a pass; max_waiting: requests in the queue; step_tokens: tokens of a
    pass; seconds: the longest that a request may take; cache_bytes: memory of the cache."""

    def __init__(
        self, model, tokenizer, cache_bytes=2**30, max_running=32, max_waiting=64, step_tokens=512,
        seconds=600, page_size=16, reuse=True,
    ):  # fmt: skip
        self.model, self.tokenizer = model, tokenizer
        weight = model.token_embedding.weight
        self.device, size = weight.device, page_size
        most = max_running * -(-model.config.context_length // size)  # more could never be used
        n = cache_bytes // PagedKVCache.bytes_per_page(model.config, size, weight.dtype)
        self.cache = PagedKVCache(model.config, min(n, most), size, weight.device, weight.dtype)
        self.max_running, self.max_waiting, self.step_tokens = max_running, max_waiting, step_tokens
        self.seconds, self.reuse = seconds, reuse
        self.waiting, self.running, self.closed = deque(), [], False
        self.changed = threading.Condition()  # guards `waiting` and `closed`
        self.counts = Counter()
        self.graphs, self.pool = None, None
        if self.device.type == "cuda":
            self.graphs, self.pool = {}, torch.cuda.graph_pool_handle()
        self.pace = 1.0  # seconds that a request takes, a running mean
        self.thread = threading.Thread(target=self.loop, daemon=True, name="engine")
        self.thread.start()

    def submit(self, ids, sampling, emit):
        """Queue a prompt, a list of ids; emit(Piece) is called from the engine's thread until one
        has `finish`. Returns the Request.

        Raises ValueError where the prompt is empty, has unknown ids or does not fit with its
        answer, and Busy where too many wait."""
        config, room = self.model.config, self.cache.n_pages * self.cache.page_size
        context = min(config.context_length, room)
        if not ids:
            raise ValueError("a prompt without a token: give at least one")
        if not all(0 <= i < config.vocab_size for i in ids):
            raise ValueError(f"the prompt has ids outside the vocabulary of {config.vocab_size}")
        if not all(0 <= i < config.vocab_size for i in sampling.logit_bias):
            raise ValueError(f"logit_bias has ids outside the vocabulary of {config.vocab_size}")
        if len(ids) + sampling.max_tokens > context:
            raise ValueError(
                f"{len(ids)} tokens and {sampling.max_tokens} new ones do not fit into a context "
                f"of {context}: shorten the prompt or lower max_tokens"
            )
        request = Request(ids, sampling, emit, TextStream(self.tokenizer, sampling.stop))
        with self.changed:
            if self.closed:
                raise ValueError("this model is being unloaded")
            if len(self.waiting) >= self.max_waiting:
                self.counts["refused"] += 1
                n = len(self.waiting) + len(self.running)
                raise Busy(len(self.waiting), max(1, math.ceil(self.pace * n / self.max_running)))
            self.waiting.append(request)
            self.counts["requests"] += 1
            self.changed.notify()
        return request

    def cancel(self, request):
        """Nobody wants the answer any more: its place is free after the pass under way."""
        request.cancelled = True

    def generate(self, ids, sampling=None):
        """Yield the Pieces of one answer, for callers without an event loop."""
        pieces = queue.SimpleQueue()
        request = self.submit(ids, sampling or Sampling(), pieces.put)
        try:
            while True:
                yield (piece := pieces.get())
                if piece.finish:
                    return
        finally:
            self.cancel(request)

    def close(self):
        """End all requests, and the thread."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()

    def loop(self):
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.running or self.closed)
                if self.closed:
                    break
            try:
                self.step()
            except Exception as error:  # such as no memory: the requests fail, the engine goes on
                self.counts["failures"] += 1
                traceback.print_exc()
                self.fail(self.running or self.waiting, f"{type(error).__name__} in the engine")
        self.fail(self.running, "this model is being unloaded")
        self.fail(self.waiting, "this model is being unloaded")

    def fail(self, requests, why):
        for request in [*requests]:
            self.finish(request, "error", why)

    # ---- a pass: who takes part, the model, what comes of it

    @torch.inference_mode()
    def step(self):
        """One pass: every stream that is writing gets a token, and prompts are read on."""
        self.end_early()
        self.admit()
        rows = self.schedule()
        if not rows:
            return
        batch = Pass(self.cache, [(r.pages, r.cached, n) for r, n in rows], self.device)
        ids = [i for r, n in rows for i in r.tokens[r.cached : r.cached + n]]
        x = self.hidden(torch.tensor([ids], device=self.device), batch)  # (1, N, C)
        self.counts["passes"] += 1
        self.counts["pass_tokens"] += len(ids)
        last = []  # streams whose tokens are all in the cache now: they get a new one
        for place, (request, n) in enumerate(rows):
            request.cached += n
            self.remember(request)
            if request.cached == len(request.tokens):
                last.append((request, place))
        if last:
            ends = batch.ends[[place for _, place in last]]
            self.draw([r for r, _ in last], self.model.output(x[0, ends]).float())  # (B, V)

    def hidden(self, ids, batch):
        """model.hidden(ids, batch), on CUDA by a Graph where each stream has one token."""
        if self.graphs is None or batch.chunks:
            return self.model.hidden(ids, batch)
        size = tuple(1 << (n - 1).bit_length() for n in batch.tables.shape)  # powers of 2: few
        if size not in self.graphs:
            self.graphs[size] = Graph(self.model, self.cache, *size, self.pool)
        return self.graphs[size](ids, batch)

    def end_early(self):
        """Requests that were cancelled or took too long."""
        now = time.perf_counter()
        with self.changed:
            requests = [*self.running, *self.waiting]
        for request in requests:
            if request.cancelled:
                self.finish(request, "cancelled")
            elif now - request.submitted > self.seconds:
                self.finish(request, "error", f"it took longer than {self.seconds} seconds")

    def admit(self):
        """Let waiting requests in while there is a place, and memory for their prompts."""
        while self.waiting and len(self.running) < self.max_running:
            request, size = self.waiting[0], self.cache.page_size
            self.find_prefix(request)
            if -(-(len(request.tokens) + 1) // size) - len(request.pages) > len(self.cache.free):
                self.cache.release(request.pages)
                request.pages, request.cached, request.keys = [], 0, [b""]
                break  # nobody overtakes it
            with self.changed:
                self.waiting.popleft()
            self.running.append(request)

    def find_prefix(self, request):
        """Share the pages that hold what the request begins with. At least one token stays to be
        fed, as its logits give the first of the answer."""
        size = self.cache.page_size
        for start in range(0, len(request.tokens) - size, size):
            key = self.cache.page_key(request.keys[-1], request.tokens[start : start + size])
            page = self.cache.share(key) if self.reuse else None
            if page is None:
                break
            request.pages.append(page)
            request.keys.append(key)
        request.cached = len(request.pages) * size
        if request.cached > request.reused:
            self.counts["reused_tokens"] += request.cached - request.reused
            request.reused = request.cached

    def schedule(self):
        """[(request, n tokens), ...] of the next pass, those with one token first."""
        rows, room = [], self.step_tokens
        for request in sorted(self.running, key=lambda r: len(r.tokens) - r.cached > 1):
            n = min(len(request.tokens) - request.cached, room)
            if request in self.running and n and self.reserve(request, request.cached + n, rows):
                rows.append((request, n))
                room -= n
        return sorted(rows, key=lambda row: row[1] > 1)

    def reserve(self, request, length, rows):
        """Give the request pages for so many tokens. Where none is free the youngest stream that is
        not in this pass yet has to give its own back, and waits to be computed again."""
        while len(request.pages) * self.cache.page_size < length:
            if (page := self.cache.take()) is not None:
                request.pages.append(page)
                continue
            taken = [r for r, _ in rows]
            victim = next(r for r in reversed(self.running) if r not in taken)
            self.counts["preemptions"] += 1
            self.running.remove(victim)
            self.cache.release(victim.pages)
            victim.pages, victim.cached, victim.keys = [], 0, [b""]
            with self.changed:
                self.waiting.appendleft(victim)
            if victim is request:
                return False
        return True

    def remember(self, request):
        """Make the pages that are full now known to others."""
        size = self.cache.page_size
        while len(request.keys) <= request.cached // size:
            n = len(request.keys) - 1
            tokens = request.tokens[n * size : (n + 1) * size]
            request.keys.append(self.cache.page_key(request.keys[-1], tokens))
            self.cache.remember(request.pages[n], request.keys[-1])

    def draw(self, requests, logits):
        """A token for each request from its row of logits, float32 (B, V), and on to the caller."""
        wanted = [i for i, r in enumerate(requests) if r.sampling.top_logprobs is not None]
        if wanted:  # the model's own, before penalties and temperature
            log_probs = logits[wanted].log_softmax(-1)
        for row, request in zip(logits, requests):
            n = request.n_prompt
            penalise(row, request.sampling, request.tokens[:n], request.tokens[n:])
        chances = [r.random.random() for r in requests]
        ids = sample_rows(logits, [r.sampling for r in requests], chances)
        now = time.perf_counter()
        for i, (request, token) in enumerate(zip(requests, ids)):
            told = (token, None, [])
            if i in wanted:
                row, n = log_probs[wanted.index(i)], request.sampling.top_logprobs
                values, others = row.topk(n) if n else (torch.empty(0), torch.empty(0))
                told = (token, row[token].item(), list(zip(others.tolist(), values.tolist())))
            if request.first is None:
                request.first = now
                self.counts["first_tokens"] += 1
                self.counts["first_token_seconds"] += now - request.submitted
            self.counts["tokens"] += 1
            request.tokens.append(token)
            if token in request.sampling.stop_tokens:
                self.finish(request, "stop")
                continue
            text, tokens = request.text.push(told)
            if request.text.stopped:
                request.emit(Piece(text, tokens))
                self.finish(request, "stop")
            elif len(request.answer) >= request.sampling.max_tokens:
                request.emit(Piece(text, tokens))
                self.finish(request, "length")
            elif text or tokens:
                request.emit(Piece(text, tokens))

    def finish(self, request, reason, error=None):
        """The last piece; the pages stay findable until others need their place."""
        self.cache.release(request.pages)
        request.pages = []
        with self.changed:
            if request in self.running:
                self.running.remove(request)
            elif request in self.waiting:
                self.waiting.remove(request)
        took = time.perf_counter() - request.submitted
        self.pace += 0.1 * (took - self.pace)
        self.counts[f"finished_{reason}"] += 1
        text, tokens = ("", []) if request.text.stopped else request.text.close()
        request.emit(Piece(text, tokens, reason, error))
