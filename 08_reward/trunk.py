"""The model of 07 with branches: replies that share one prompt and are blind to one another.

A prompt with its replies is one document. The prompt's tokens are branch 0, those of the replies
branch 1, 2, ...; a token sees its own document's branch 0 and its own branch, and counts positions
as if nothing else were there, so that the prompt is read once and each reply sees what it would see
alone. `causal` off makes an encoder of it: a token sees what follows it, too. What only generation
needs is left out.

Parent: 07_sft/transformer.py
New: Layout, together
Changed: TransformerLM

Shapes: B batch, T time (tokens), S keys, C = d_model, H heads, K heads of keys and values, D = head
dim, V vocab.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import formats
import torch
from torch import nn
from torch.nn import functional as F


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


class View(NamedTuple):
    """What the tokens of a forward pass see in a layer."""

    rope: tuple  # cos and sin of their positions, (B or 1, 1, T, D)
    mask: torch.Tensor | None  # (B or 1, 1, T, S); None: all before it
    sink_rope: tuple | None = None  # of their positions as sinks have them; None: no sinks
    is_sink: torch.Tensor | None = None  # which keys are sinks, (B or 1, 1, 1, S)


class Layout(NamedTuple):
    """Where the tokens of rows that hold several texts belong, int64 (B, T) each."""

    positions: torch.Tensor  # of a token in its own text, prompt and reply
    documents: torch.Tensor  # number of the document in its row; -1: padding
    branches: torch.Tensor  # 0: the prompt; of the replies 1, 2, ...


def together(layout):
    """True where a query sees a key's text, (B, 1, T, T): a prompt is part of each of its replies'
    texts, they are not part of its."""
    documents, branches = layout.documents[:, None], layout.branches[:, None]  # (B, 1, T)
    same = documents[..., :, None] == documents[..., None, :]
    keys = branches[..., None, :]
    return same & ((keys == 0) | (keys == branches[..., :, None]))


class TransformerLM(nn.Module):
    """`model(ids)`: logits (B, T, V). `model(ids, targets)`: the mean loss in nats, a scalar.

    ids and targets: int64 (B, T) with T up to context_length. `causal` False: an encoder.
    `tokenizer_files`, {name: text}, are written beside the weights by save_pretrained; `token_ids`
    holds eos_token_id and the like."""

    causal = True

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

    def view(self, positions, window, sinks, layout=None):
        """The View of tokens at `positions`, (B or 1, T), on one another."""
        T = positions.shape[1]
        rope = self.rope(positions)
        if layout is None and (window is None or T <= window):
            return View(rope, None)
        mask = attention_mask(positions, positions, window, sinks)
        if layout is not None:
            mask = together(layout) & mask if self.causal else together(layout)
        if window is None or not sinks:
            return View(rope, mask)
        is_sink = positions < sinks
        near = positions.clamp(max=window - 1 + sinks)  # no further from a sink than that
        return View(rope, mask, self.rope(near), is_sink[:, None, None])

    def hidden(self, ids, layout=None):
        """What the output layer sees: (B, T) to (B, T, C). Without a layout a row is one text, and
        no encoder's."""
        if ids.shape[1] > self.config.context_length:
            raise ValueError(
                f"{ids.shape[1]} tokens do not fit into {self.config.context_length}: crop them"
            )
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        if layout is not None:
            positions = layout.positions
        x, views = self.dropout(self.token_embedding(ids)), {}  # (B, T, C)
        for block in self.blocks:
            window = block.attention.window
            if window not in views:
                views[window] = self.view(positions, window, self.config.sinks, layout)
            x = block(x, views[window])
        return self.norm(x)

    def forward(self, ids, targets=None):
        logits = self.output(self.hidden(ids))  # (B, T, V)
        return logits if targets is None else cross_entropy(logits, targets)

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=torch.float32):
        """A llama, mistral, qwen2 or qwen3 in Hugging Face's layout (a directory with config.json
        and *.safetensors), or a .gguf file of such a model, dequantised.

        Raises ValueError where a file is missing or unreadable, the architecture or quantisation is
        another, or tensors are missing, misshapen or unknown: all of them are named."""
        return cls.build(*formats.read(Path(path)), path, device, dtype)

    @classmethod
    def build(cls, fields, tensors, files, token_ids, path, device, dtype):
        config = TransformerConfig(**fields)
        with torch.device("meta"):  # nothing is drawn that would be overwritten
            model = cls(config)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        state = formats.assemble(tensors, shapes, config, path)
        model.load_state_dict(state, strict=False, assign=True)
        if config.tie_embeddings:
            model.output.weight = model.token_embedding.weight
        model.to(dtype).frequencies = rope_frequencies(config)  # float32 in any case
        model.tokenizer_files, model.token_ids = files, token_ids
        return model.to(device)

    def save_pretrained(self, path):
        """Write config.json, model.safetensors (float32) and the tokenizer, if it is known, from
        which `transformers` gives these logits. Each file appears whole or not at all.

        Raises ValueError for what no layout of theirs holds: sinks."""
        formats.write(Path(path), self)


def cross_entropy(logits, targets):
    """Mean of -log softmax(logits)[target] in nats: logits (..., V), targets int64 (...).

    log-sum-exp subtracts the largest logit first, so that nothing overflows."""
    logits = logits.to(
        torch.promote_types(logits.dtype, torch.float32)
    )  # bfloat16 would lose digits
    chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)  # (...)
    return (logits.logsumexp(-1) - chosen).mean()
