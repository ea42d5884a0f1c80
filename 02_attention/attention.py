"""Attention, from the formula to what runs in production, each form beside the one it must equal.

What this stage teaches: how a token collects what it needs from the tokens before it; what that
costs in time, in memory and in the cache that decoding keeps; and the four ways in which models in
the field pay less: share keys among heads (GQA, MQA), keep a compressed latent instead of keys and
values (MLA), look back only so far (sliding window, with sinks), and never write down the (T, T)
matrix of weights (flash attention), which alone changes nothing in the result.

Parent: none
New: everything

Read in this order: softmax, attention_weights, scaled_dot_product_attention; the masks; positions
(sinusoidal, learned, rotary); SingleHeadAttention, worked by hand; MultiHeadAttention and Cache;
GroupedQueryAttention; MultiHeadLatentAttention; SlidingWindowAttention; flash_attention, then its
Triton kernel; fused_attention and flex_attention, PyTorch's own.

A module is causal: `module(x)` takes x (B, T, C) to (B, T, C). `module(x, cache)` takes the next
tokens of a text, one or more, whose past is in the cache, and gives the same as the whole would.
`kernel` chooses how the same result is computed: "plain" (the formula), "flash" (ours, in tiles) or
"fused" (PyTorch's).

Papers
- Attention, several heads, sinusoids: Vaswani et al. 2017, arXiv 1706.03762
- Rotary positions: Su et al. 2021, arXiv 2104.09864
- Multi-query: Shazeer 2019, arXiv 1911.02150; grouped-query: Ainslie et al. 2023, arXiv 2305.13245
- Multi-head latent attention: DeepSeek-AI 2024 (DeepSeek-V2), arXiv 2405.04434, section 2.1
- Sliding window: Beltagy et al. 2020 (Longformer), arXiv 2004.05150; Jiang et al. 2023 (Mistral),
  arXiv 2310.06825; attention sinks: Xiao et al. 2023, arXiv 2309.17453
- Softmax in one pass: Milakov and Gimelshein 2018, arXiv 1805.02867
- Flash attention: Dao et al. 2022, arXiv 2205.14135; Dao 2023, arXiv 2307.08691

Shapes: B batch, T time (tokens; T_q queries, T_k keys), C = d_model, H heads, G key heads
(n_kv_heads), D = head dim; in MLA L latent width (kv_rank), R rotary dim.
"""

import functools
import math

import torch
from einops import rearrange, repeat
from torch import nn
from torch.nn import functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # comes with PyTorch for CUDA on Linux; without it the tiles run in PyTorch
    triton = None

KERNELS = ("plain", "flash", "fused")
TILE = 256  # rows and columns of a tile of flash attention in PyTorch: the fastest (README)


# ---- the formula


def softmax(x, dim):
    """exp(x) / sum(exp(x)) along dim, however large: the largest (finite, and without a gradient:
    it cancels) is subtracted first, so that exp never overflows. Where all of x is -inf: zeros."""
    largest = x.detach().amax(dim, keepdim=True).clamp(min=torch.finfo(x.dtype).min)
    x = (x - largest).exp_()  # in place, and x given up: two large tensors alive, not four
    total = x.sum(dim, keepdim=True)
    return x / total.masked_fill(total == 0, 1)


def attention_weights(q, k, mask=None, scale=None):
    """How much each query takes from each key: q (..., T_q, D), k (..., T_k, D) to (..., T_q, T_k).

    A row sums to 1. mask: boolean, broadcasts to the result, True where a query may look; a row
    without True gives zeros. scale: 1 / sqrt(D), without which the scores of random vectors would
    have variance D and the softmax pick just one. Raises ValueError for a mask that is not boolean
    or does not fit."""
    shape = (*torch.broadcast_shapes(q.shape[:-2], k.shape[:-2]), q.shape[-2], k.shape[-2])
    if mask is not None and (mask.dtype != torch.bool or not fits(mask.shape, shape)):
        how = f"{mask.dtype} of shape {tuple(mask.shape)}"
        raise ValueError(f"mask is {how}: it must be torch.bool and broadcast to {shape}")
    q = q * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if mask is None:
        return softmax(q @ k.mT, dim=-1)
    return softmax((q @ k.mT).masked_fill(~mask, -math.inf), dim=-1)


def fits(shape, target):
    """Whether `shape` broadcasts to `target` and not beyond it."""
    try:
        return torch.broadcast_shapes(shape, target) == torch.Size(target)
    except RuntimeError:
        return False


def scaled_dot_product_attention(q, k, v, mask=None, scale=None):
    """softmax(q kᵀ / sqrt(D)) v: for each query the mean of the values, weighted by how well their
    keys fit it (Vaswani et al. 2017). q (..., T_q, D), k (..., T_k, D), v (..., T_k, D_v) to
    (..., T_q, D_v); the leading dimensions broadcast. mask and scale as in attention_weights."""
    return attention_weights(q, k, mask, scale) @ v


def causal_mask(T_q, T_k, device=None):
    """(T_q, T_k), True where a query may look: the queries are the last T_q of T_k tokens, each
    sees itself and what is before. The diagonal ends at the lower right; drawn from the upper left,
    it would hide most of what a cache holds."""
    return torch.ones(T_q, T_k, dtype=torch.bool, device=device).tril(T_k - T_q)


def window_mask(q_positions, k_positions, window, sinks=0):
    """(T_q, T_k), True for the last `window` tokens up to the query and for the first `sinks`."""
    i, j = q_positions[:, None], k_positions[None, :]
    return (j <= i) & ((j > i - window) | (j < sinks))


# ---- positions: attention itself does not see the order of its keys


def sinusoidal_positions(context_length, d_model):
    """The fixed table of Vaswani et al. 2017, (T, C): sines in even columns, cosines in odd ones,
    wavelengths rising from 2 pi to 10,000 times 2 pi."""
    position = torch.arange(context_length)[:, None]
    rate = torch.exp(-math.log(10_000) * torch.arange(0, d_model, 2) / d_model)
    table = torch.zeros(context_length, d_model)
    table[:, 0::2] = torch.sin(position * rate)
    table[:, 1::2] = torch.cos(position * rate[: d_model // 2])
    return table


class Embedding(nn.Module):
    """A learned vector for each id: (...) int64 to (..., d_model)."""

    def __init__(self, n_ids, d_model, std=0.02):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_ids, d_model))
        nn.init.trunc_normal_(self.weight, std=std, a=-3 * std, b=3 * std)

    def forward(self, ids):
        return self.weight[ids]


class LearnedPositions(nn.Module):
    """Adds a learned vector to each token for its place in the context: (B, T, C) to (B, T, C).
    Raises ValueError beyond the context_length, where no vector was learned."""

    def __init__(self, context_length, d_model):
        super().__init__()
        self.embedding = Embedding(context_length, d_model)

    def forward(self, x, start=0):
        known, end = len(self.embedding.weight), start + x.shape[1]
        if end > known:
            raise ValueError(f"{end} tokens do not fit into {known} learned positions: crop them")
        return x + self.embedding(torch.arange(start, end, device=x.device))


def rope_table(positions, head_dim, theta=10_000.0):
    """Cosines and sines of the angles by which apply_rope rotates: positions (T,) to twice (T, D),
    float64, as float32 is off by 0.004 radians at 100,000. Pair i turns by theta^(-2i/D) a token:
    the first by a radian, the last by theta^(2/D)/theta. ValueError: head_dim is odd."""
    if head_dim % 2:
        raise ValueError(f"rotary dim {head_dim} is odd: it is rotated in pairs")
    rate = theta ** (-torch.arange(0, head_dim, 2, device=positions.device).double() / head_dim)
    angle = positions.double()[:, None] * rate
    cos, sin = angle.cos(), angle.sin()  # (T, D/2)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def apply_rope(x, cos, sin):
    """Rotate each pair (x[i], x[i + D/2]) of a head by the angle of its position (Su et al. 2021).

    x (..., T, D); cos and sin (..., T, D), as they broadcast: those of the D/2 angles twice over,
    the first half of the sines negative. The product of two vectors so rotated depends on how far
    apart they are and on nothing else."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def rotated(x, start, theta):
    """x (..., T, D), whose first vector is at position `start`, through apply_rope."""
    positions = torch.arange(start, start + x.shape[-2], device=x.device)
    return apply_rope(x, *(y.to(x.dtype) for y in rope_table(positions, x.shape[-1], theta)))


# ---- one head, several heads


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


class Cache:
    """What one layer keeps of the tokens before: named tensors that grow along their next to last
    dimension, and `length`, the tokens seen so far. Growing by concatenation copies all of it for
    each token; 04 allocates once."""

    def __init__(self):
        self.kept, self.length = {}, 0

    def append(self, **new):
        """Add what the next tokens bring; returns all that is kept, in the order given."""
        for name, tensor in new.items():
            past = [self.kept[name]] if name in self.kept else []
            self.kept[name] = torch.cat([*past, tensor], dim=-2)
        self.length += tensor.shape[-2]
        return tuple(self.kept[name] for name in new)

    def crop(self, first, last):
        """Keep the `first` tokens and the `last` ones, where there are more."""
        for name, x in self.kept.items():
            if x.shape[-2] > first + last:
                self.kept[name] = torch.cat([x[..., :first, :], x[..., -last:, :]], dim=-2)

    def nbytes(self):
        return sum(tensor.nbytes for tensor in self.kept.values())


class SingleHeadAttention(nn.Module):
    """One causal head: (B, T, C) to (B, T, D), where D is C unless head_dim says otherwise.

    By hand, three tokens of width 2, with q = k = v = x:

        x = (1, 0), (0, 1), (1, 1)         1 / sqrt(D) = 0.707
        q kᵀ     scaled                 exp, up to itself       weights
        1 0 1    0.707 0     0.707      2.028                   1
        0 1 1    0     0.707 0.707      1     2.028             0.3302 0.6698
        1 1 2    0.707 0.707 1.414      2.028 2.028 4.113       0.2483 0.2483 0.5035

    The first token sees itself alone and stays (1, 0). The second becomes 0.3302 (1, 0) +
    0.6698 (0, 1), the third 0.2483 (1, 0) + 0.2483 (0, 1) + 0.5035 (1, 1):

    >>> head = SingleHeadAttention(2)
    >>> for projection in (head.q, head.k, head.v):
    ...     projection.weight.data = torch.eye(2)
    >>> y = head(torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]]))
    >>> [[round(value, 3) for value in token] for token in y[0].tolist()]
    [[1.0, 0.0], [0.33, 0.67], [0.752, 0.752]]
    """

    def __init__(self, d_model, head_dim=None):
        super().__init__()
        self.head_dim = head_dim or d_model
        self.q, self.k, self.v = (Linear(d_model, self.head_dim, False) for _ in range(3))

    def forward(self, x, cache=None):
        q, k, v = self.q(x), self.k(x), self.v(x)  # (B, T, D)
        if cache is not None:
            k, v = cache.append(k=k, v=v)  # (B, T_k, D)
        mask = causal_mask(q.shape[-2], k.shape[-2], q.device)
        return scaled_dot_product_attention(q, k, v, mask)


def check_heads(d_model, n_heads, n_kv_heads, theta, kernel):
    """The door of all modules below."""
    if min(d_model, n_heads, n_kv_heads) < 1:
        raise ValueError(f"d_model {d_model}, n_heads {n_heads}, n_kv_heads {n_kv_heads}: under 1")
    if d_model % n_heads:
        raise ValueError(f"d_model {d_model} is not divisible by n_heads {n_heads}")
    if n_heads % n_kv_heads:
        raise ValueError(f"n_heads {n_heads} is not divisible by n_kv_heads {n_kv_heads}")
    if theta is not None and d_model // n_heads % 2:
        raise ValueError(f"head dim {d_model // n_heads} is odd: rotary positions take pairs")
    if kernel not in KERNELS:
        raise ValueError(f"kernel {kernel} is none of {', '.join(KERNELS)}")


class MultiHeadAttention(nn.Module):
    """H heads side by side, each on its own projection of the tokens (Vaswani et al. 2017).

    theta: None for no rotation, or the base of rotary positions, in Llama's first version 10,000.
    The cache holds k and v: 2 C numbers a token."""

    def __init__(self, d_model, n_heads, theta=None, kernel="plain"):
        super().__init__()
        check_heads(d_model, n_heads, n_heads, theta, kernel)
        self.n_heads, self.theta, self.kernel = n_heads, theta, kernel
        self.cache_numbers = 2 * d_model  # a token
        self.q, self.k, self.v, self.out = (Linear(d_model, d_model, False) for _ in range(4))

    def project(self, x, start=0):
        """Queries, keys and values of tokens from position `start` on, each (B, H, T, D)."""
        q, k, v = self.q(x), self.k(x), self.v(x)  # (B, T, C)
        q, k, v = (rearrange(y, "B T (H D) -> B H T D", H=self.n_heads) for y in (q, k, v))
        if self.theta is not None:  # a rotated key never changes: it is cached as it is
            q, k = rotated(q, start, self.theta), rotated(k, start, self.theta)
        return q, k, v

    def forward(self, x, cache=None):
        q, k, v = self.project(x, cache.length if cache else 0)  # (B, H, T, D)
        if cache is not None:
            k, v = cache.append(k=k, v=v)  # (B, H, T_k, D)
        y = causal_attention(q, k, v, self.kernel)
        return self.out(rearrange(y, "B H T D -> B T (H D)"))


def causal_attention(q, k, v, kernel="plain", scale=None):
    """q (B, H, T_q, D), the last T_q of T_k tokens; k and v (B, G, T_k, D), G a divisor of H."""
    if kernel == "fused":
        return fused_attention(q, k, v, causal=True, scale=scale)
    if kernel == "flash":
        times = q.shape[1] // k.shape[1]
        k, v = (repeat(y, "B G T D -> B (G n) T D", n=times) if times > 1 else y for y in (k, v))
        return flash_attention(q, k, v, causal=True, scale=scale)
    mask = causal_mask(q.shape[-2], k.shape[-2], q.device) if q.shape[-2] > 1 else None
    return grouped_attention(q, k, v, mask, scale)


# ---- fewer key heads


def grouped_attention(q, k, v, mask=None, scale=None):
    """scaled_dot_product_attention in which n = H / G neighbouring query heads share a key head.

    q (B, H, T_q, D), k and v (B, G, T_k, D), mask (T_q, T_k). Heads become rows of one matrix, so
    that k and v need not be repeated n times in memory."""
    if q.shape[1] == k.shape[1]:
        return scaled_dot_product_attention(q, k, v, mask, scale)
    n, T = q.shape[1] // k.shape[1], q.shape[2]
    q = rearrange(q, "B (G n) T D -> B G (n T) D", n=n)
    mask = mask if mask is None else repeat(mask, "Tq Tk -> (n Tq) Tk", n=n)
    y = scaled_dot_product_attention(q, k, v, mask, scale)
    return rearrange(y, "B G (n T) D -> B (G n) T D", T=T)


class GroupedQueryAttention(nn.Module):
    """Several query heads for each of n_kv_heads key and value heads (Ainslie et al. 2023).

    The cache holds 2 G D numbers a token, G / H of those of MultiHeadAttention. With n_kv_heads 1
    it is multi-query attention (Shazeer 2019), with n_heads multi-head attention, rotated."""

    def __init__(self, d_model, n_heads, n_kv_heads, theta=10_000.0, kernel="plain"):
        super().__init__()
        check_heads(d_model, n_heads, n_kv_heads, theta, kernel)
        head_dim = d_model // n_heads
        self.n_heads, self.n_kv_heads, self.theta = n_heads, n_kv_heads, theta
        self.kernel, self.cache_numbers = kernel, 2 * n_kv_heads * head_dim
        self.q = Linear(d_model, d_model, bias=False)
        self.k = Linear(d_model, n_kv_heads * head_dim, bias=False)
        self.v = Linear(d_model, n_kv_heads * head_dim, bias=False)
        self.out = Linear(d_model, d_model, bias=False)

    def project(self, x, start=0):
        """q (B, H, T, D), k and v (B, G, T, D) of tokens from position `start` on."""
        q = rearrange(self.q(x), "B T (H D) -> B H T D", H=self.n_heads)
        k = rearrange(self.k(x), "B T (G D) -> B G T D", G=self.n_kv_heads)
        v = rearrange(self.v(x), "B T (G D) -> B G T D", G=self.n_kv_heads)
        if self.theta is not None:
            q, k = rotated(q, start, self.theta), rotated(k, start, self.theta)
        return q, k, v

    def forward(self, x, cache=None):
        q, k, v = self.project(x, cache.length if cache else 0)
        if cache is not None:
            k, v = cache.append(k=k, v=v)  # (B, G, T_k, D)
        y = causal_attention(q, k, v, self.kernel)  # (B, H, T, D)
        return self.out(rearrange(y, "B H T D -> B T (H D)"))


# ---- a latent instead of keys and values


class MultiHeadLatentAttention(nn.Module):
    """Keys and values of all heads from one latent of width kv_rank a token (DeepSeek-V2 2024).

    kv_down: C to the latent c (L numbers) and a key r (R numbers), rotated and shared by all heads.
    kv_up: c to each head's key k = W_k c (D numbers) and value v = W_v c (v_dim numbers).
    A head's score is q·k + q_r·r. The rotation is kept apart from c because it depends on the
    position: between W_k and q it would stand in the way of the following.

    Expanded, k and v are written out for all tokens: one product with kv_up, best for a whole text.
    Absorbed, for decoding: q·(W_k c) = (W_kᵀ q)·c, and sum_j p_j W_v c_j = W_v sum_j p_j c_j, so
    the weights go to the one query, and the heads attend straight to the cached (c, r), as
    multi-query attention with a key of width L + R whose first L numbers are the value, too.

    The cache holds L + R numbers a token, whatever the number of heads. q_rank: queries through a
    latent as well, which saves activations in training. By default head_dim is d_model / n_heads,
    v_dim head_dim and, as in the paper, kv_rank 4 head_dim, rope_dim head_dim / 2."""

    def __init__(
        self, d_model, n_heads, kv_rank=None, q_rank=None, head_dim=None, rope_dim=None, v_dim=None,
        theta=10_000.0, kernel="plain",
    ):  # fmt: skip
        super().__init__()
        check_heads(d_model if head_dim is None else n_heads, n_heads, n_heads, None, kernel)
        D = self.head_dim = head_dim or d_model // n_heads
        self.rope_dim = rope_dim or max(2, D // 4 * 2)  # about half of D, and even
        self.v_dim, self.kv_rank = v_dim or D, kv_rank or 4 * D
        if min(D, self.v_dim, self.kv_rank, self.rope_dim, q_rank or 1) < 1:
            raise ValueError(f"a width of latent attention is under 1: {D=}, {kv_rank=}, {q_rank=}")
        rope_table(torch.zeros(1), self.rope_dim)  # raises where it is odd
        self.n_heads, self.theta, self.kernel = n_heads, theta, kernel
        self.cache_numbers = self.kv_rank + self.rope_dim
        self.scale = 1 / math.sqrt(D + self.rope_dim)
        down = (Linear(d_model, q_rank, bias=False), nn.RMSNorm(q_rank, 1e-6)) if q_rank else ()
        self.q_down = nn.Sequential(*down)
        self.q_up = Linear(q_rank or d_model, n_heads * (D + self.rope_dim), bias=False)
        self.kv_down = Linear(d_model, self.kv_rank + self.rope_dim, bias=False)
        self.kv_norm = nn.RMSNorm(self.kv_rank, 1e-6)
        self.kv_up = Linear(self.kv_rank, n_heads * (D + self.v_dim), bias=False)
        self.out = Linear(n_heads * self.v_dim, d_model, bias=False)

    def project(self, x, start=0):
        """q (B, H, T, D + R) and what is cached, c and r side by side, (B, T, L + R)."""
        q = self.q_up(self.q_down(x))
        q = rearrange(q, "B T (H D) -> B H T D", H=self.n_heads)
        q, q_r = q.split([self.head_dim, self.rope_dim], dim=-1)
        c, r = self.kv_down(x).split([self.kv_rank, self.rope_dim], dim=-1)
        q = torch.cat([q, rotated(q_r, start, self.theta)], dim=-1)
        return q, torch.cat([self.kv_norm(c), rotated(r, start, self.theta)], dim=-1)

    def expand(self, latent):
        """(B, T, L + R) to every head's keys (B, H, T, D + R) and values (B, H, T, v_dim)."""
        c, r = latent.split([self.kv_rank, self.rope_dim], dim=-1)
        kv = rearrange(self.kv_up(c), "B T (H D) -> B H T D", H=self.n_heads)
        k, v = kv.split([self.head_dim, self.v_dim], dim=-1)
        return torch.cat([k, repeat(r, "B T R -> B H T R", H=self.n_heads)], dim=-1), v

    def absorbed(self, q, latent):
        """What causal_attention(q, *expand(latent)) gives, (B, H, T, v_dim), without expanding."""
        up = rearrange(self.kv_up.weight, "(H D) L -> H D L", H=self.n_heads)
        w_k, w_v = up.split([self.head_dim, self.v_dim], dim=1)  # (H, D, L), (H, v_dim, L)
        q, q_r = q.split([self.head_dim, self.rope_dim], dim=-1)
        q = torch.cat([q @ w_k, q_r], dim=-1)  # (B, H, T, L + R)
        k = latent[:, None]  # (B, 1, T_k, L + R), one key head
        y = causal_attention(q, k, k[..., : self.kv_rank], "plain", self.scale)  # (B, H, T, L)
        return y @ w_v.mT

    def forward(self, x, cache=None):
        q, latent = self.project(x, cache.length if cache else 0)
        if cache is None:
            y = causal_attention(q, *self.expand(latent), self.kernel, self.scale)
        else:
            y = self.absorbed(q, *cache.append(latent=latent))
        return self.out(rearrange(y, "B H T D -> B T (H D)"))


# ---- looking back only so far


def sliding_window_attention(q, k, v, window, sinks=0, length=None, kernel="plain"):
    """grouped_attention under window_mask, in time and memory linear in T.

    q (B, H, T_q, D), the last T_q of `length` tokens (None: T_k); k and v (B, G, T_k, D), those of
    all tokens or, from a cache, of the sinks and the last ones. Queries go in blocks of about a
    window, each with the keys that one of its queries may see and no others."""
    T_q, T_k = q.shape[-2], k.shape[-2]
    length, block = length or T_k, max(window, 64)
    # Where a cache has dropped keys, those behind the sinks end at the last token all the same.
    positions = torch.arange(length - T_k, length, device=q.device)
    positions[:sinks] = torch.arange(min(sinks, T_k), device=q.device)
    blocks = []
    for i in range(0, T_q, block):
        q_block = q[..., i : i + block, :]
        end = T_k - T_q + i + q_block.shape[-2]
        first = max(0, T_k - T_q + i - window + 1)
        seen = torch.tensor([*range(min(sinks, first)), *range(first, end)], device=q.device)
        keys, values = k[..., seen, :], v[..., seen, :]  # at most sinks + window + block of them
        mask = window_mask(positions[T_k - T_q + i : end], positions[seen], window, sinks)
        attend = fused_attention if kernel == "fused" else grouped_attention
        blocks.append(attend(q_block, keys, values, mask))
    return torch.cat(blocks, dim=-2)  # (B, H, T_q, D)


class SlidingWindowAttention(nn.Module):
    """Each token sees the last `window` tokens, itself among them (Mistral 7B), and the first
    `sinks` of the text, to which models send the attention that nothing in the window deserves
    (Xiao et al. 2023). Through n layers news goes n (window - 1) tokens far.

    The cache stays at sinks + window tokens of 2 G D numbers, however long the text. Rotary
    positions are those in the text; Xiao et al. count them within the cache, to go on beyond the
    lengths seen in training. Raises ValueError where window < 1 or sinks is not in 0 to window."""

    def __init__(
        self, d_model, n_heads, window, sinks=0, n_kv_heads=None, theta=10_000.0, kernel="plain"
    ):
        super().__init__()
        if window < 1 or not 0 <= sinks <= window:
            raise ValueError(f"window {window} is under 1, or sinks {sinks} not in 0 to {window}")
        if kernel == "flash":
            raise ValueError("kernel flash has no window: use plain or fused")
        self.heads = GroupedQueryAttention(d_model, n_heads, n_kv_heads or n_heads, theta, kernel)
        self.window, self.sinks, self.cache_numbers = window, sinks, self.heads.cache_numbers

    def forward(self, x, cache=None):
        q, k, v = self.heads.project(x, cache.length if cache else 0)
        if cache is not None:
            k, v = cache.append(k=k, v=v)
            cache.crop(self.sinks, self.window)  # k and v, as used below, are still whole
        shape = (self.window, self.sinks, cache.length if cache else None, self.heads.kernel)
        y = sliding_window_attention(q, k, v, *shape)  # (B, H, T, D)
        return self.heads.out(rearrange(y, "B H T D -> B T (H D)"))


# ---- the same result without the matrix of weights


def flash_attention(q, k, v, causal=True, scale=None, tile=TILE):
    """scaled_dot_product_attention in tiles, in memory linear in T (Dao et al. 2022, Dao 2023).

    q (..., T_q, D), k (..., T_k, D), v (..., T_k, D_v) to (..., T_q, D_v), the leading dimensions
    equal. causal: as causal_mask. On CUDA, with Triton and heads up to 128 wide, the forward pass
    is one kernel. Raises ValueError where the shapes do not fit."""
    if q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1] or k.shape[:-1] != v.shape[:-1]:
        shapes = " and ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k and v of shapes {shapes} do not fit each other")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    flat = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))  # (N, T, D)
    return FlashAttention.apply(*flat, causal, scale, tile).reshape(*q.shape[:-1], v.shape[-1])


class FlashAttention(torch.autograd.Function):
    """Softmax without seeing the whole row: keep the largest score so far, m, the sum of
    exp(score - m), and the equally scaled sum of values. When a tile brings a larger score, what
    there is shrinks by exp(old m - new m) (Milakov and Gimelshein 2018). For the backward pass
    nothing of size (T, T) is kept but each row's log-sum-exp, from which any tile's weights come
    back as exp(score - lse)."""

    @staticmethod
    def forward(ctx, q, k, v, causal, scale, tile):
        on_gpu = triton and q.is_cuda and q.dtype != torch.float64
        if on_gpu and max(q.shape[-1], v.shape[-1]) <= 128:
            o, lse = triton_forward(q, k, v, causal, scale)
        else:
            o, lse = tiled_forward(q, k, v, causal, scale, tile)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.causal, ctx.scale, ctx.tile = causal, scale, tile
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        return *tiled_backward(q, k, v, o, lse, do, ctx.causal, ctx.scale, ctx.tile), *[None] * 3


def tile_scores(q, k, i, j, shift, causal, dtype):
    """Scores of rows i, i + 1, ... and columns j, j + 1, ...: (N, rows, columns), -inf where the
    column comes after row + shift, the last that the row sees. q is scaled already."""
    s = (q @ k.mT).to(dtype)
    if causal and j + k.shape[1] - 1 > i + shift:  # the others lie wholly in the past
        hidden = torch.ones_like(s[0], dtype=torch.bool).triu(i + shift - j + 1)
        s.masked_fill_(hidden, -math.inf)
    return s


def tiled_forward(q, k, v, causal, scale, tile):
    """Returns o (N, T_q, D_v) and the log of each row's sum of exponentials, (N, T_q, 1)."""
    (N, T_q, _), T_k = q.shape, k.shape[1]
    shift, wide = T_k - T_q, torch.promote_types(q.dtype, torch.float32)
    o, lse = q.new_empty(N, T_q, v.shape[-1]), q.new_empty(N, T_q, 1, dtype=wide)
    for i in range(0, T_q, tile):
        q_tile = q[:, i : i + tile] * scale
        rows = slice(i, i + q_tile.shape[1])
        m = torch.full_like(lse[:, rows], torch.finfo(wide).min)  # finite: inf - inf is no number
        total, sums = torch.zeros_like(m), torch.zeros_like(o[:, rows], dtype=wide)
        end = min(T_k, rows.stop + shift) if causal else T_k
        for j in range(0, end, tile):  # tiles above the diagonal are not visited
            columns = slice(j, min(j + tile, end))
            s = tile_scores(q_tile, k[:, columns], i, j, shift, causal, wide)
            larger = torch.maximum(m, s.amax(-1, keepdim=True))  # (N, tile, 1)
            p = s.sub_(larger).exp_()  # (N, tile, tile)
            shrink = m.sub_(larger).exp_()
            total.mul_(shrink).add_(p.sum(-1, keepdim=True))
            sums.mul_(shrink).add_(p.to(v.dtype) @ v[:, columns])  # (N, tile, D_v)
            m = larger
        none = total == 0  # a row that sees no key: zeros, and no gradient as exp(s - inf) is 0
        o[:, rows] = sums / total.masked_fill(none, 1)
        lse[:, rows] = (m + total.log()).masked_fill(none, math.inf)
    return o, lse


def tiled_backward(q, k, v, o, lse, do, causal, scale, tile):
    """Gradients of q, k and v.

    With weights p = softmax(s) and o = p v: dv = pᵀ do, dp = do vᵀ, and the softmax gives
    ds = p (dp - delta), where delta = sum_j p_j dp_j = do·o, one number a row."""
    shift, wide = k.shape[1] - q.shape[1], lse.dtype
    dq, dk, dv = torch.zeros_like(q, dtype=wide), torch.empty_like(k), torch.empty_like(v)
    delta = (do * o).sum(-1, keepdim=True, dtype=wide)  # (N, T_q, 1)
    for j in range(0, k.shape[1], tile):
        columns = slice(j, j + tile)
        k_tile, v_tile = k[:, columns], v[:, columns]
        dk_tile, dv_tile = (torch.zeros_like(x, dtype=wide) for x in (k_tile, v_tile))
        start = max(0, j - shift) // tile * tile if causal else 0  # rows before see none of these
        for i in range(start, q.shape[1], tile):
            rows = slice(i, i + tile)
            q_tile, do_tile = q[:, rows] * scale, do[:, rows]
            s = tile_scores(q_tile, k_tile, i, j, shift, causal, wide)
            p = s.sub_(lse[:, rows]).exp_()  # (N, tile, tile)
            dv_tile += p.to(do.dtype).mT @ do_tile
            dp = (do_tile @ v_tile.mT).to(wide)
            ds = dp.sub_(delta[:, rows]).mul_(p).to(q.dtype)
            dk_tile += ds.mT @ q_tile
            dq[:, rows] += ds @ k_tile
        dk[:, columns], dv[:, columns] = dk_tile, dv_tile
    return (dq * scale).to(q.dtype), dk, dv


if triton:

    @triton.jit
    def flash_kernel(
        Q, K, V, Out, LSE, T_q, T_k, D, scale,
        CAUSAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """One program holds ROWS queries of one head in registers and walks over the key tiles.

        Q and Out (N, T_q, D), K and V (N, T_k, D), LSE (N, T_q), all contiguous. WIDTH is D rounded
        up to a power of two; what is beyond reads as 0."""
        head = tl.program_id(0).to(tl.int64)  # N * T_k * D may pass 2^31
        rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        wide, shift = tl.arange(0, WIDTH), T_k - T_q
        at = head * T_q * D + rows[:, None] * D + wide[None, :]  # (ROWS, WIDTH)
        there = (rows[:, None] < T_q) & (wide[None, :] < D)
        q = tl.load(Q + at, mask=there, other=0.0)
        m = tl.full([ROWS], -1e30, tl.float32)  # finite: -inf less -inf is no number
        total = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, WIDTH], tl.float32)
        end = T_k
        if CAUSAL:
            end = tl.minimum(T_k, (tl.program_id(1) + 1) * ROWS + shift)
        for j in range(0, end, COLUMNS):
            columns = j + tl.arange(0, COLUMNS)
            k_at = head * T_k * D + columns[:, None] * D + wide[None, :]  # (COLUMNS, WIDTH)
            k_there = (columns[:, None] < T_k) & (wide[None, :] < D)
            k = tl.load(K + k_at, mask=k_there, other=0.0)
            v = tl.load(V + k_at, mask=k_there, other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # TF32 would lose 1e-3
            seen = columns[None, :] < T_k
            if CAUSAL:
                seen = seen & (columns[None, :] <= rows[:, None] + shift)
            s = tl.where(seen, s, float("-inf"))
            larger = tl.maximum(m, tl.max(s, 1))
            p = tl.exp(s - larger[:, None])
            shrink = tl.exp(m - larger)
            total = total * shrink + tl.sum(p, 1)
            sums = sums * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
            m = larger
        none = total == 0
        o = sums / tl.where(none, 1.0, total)[:, None]
        tl.store(Out + at, o.to(Out.dtype.element_ty), mask=there)
        lse = tl.where(none, float("inf"), m + tl.log(tl.where(none, 1.0, total)))
        tl.store(LSE + head * T_q + rows, lse, mask=rows < T_q)


def triton_forward(q, k, v, causal, scale):
    """tiled_forward as one kernel on a GPU, heads up to 128 wide."""
    (N, T_q, D), (_, T_k, D_v) = q.shape, v.shape
    q, k, v = (F.pad(x, (0, max(D, D_v) - x.shape[-1])).contiguous() for x in (q, k, v))
    o, lse = torch.empty_like(q), q.new_empty(N, T_q, 1, dtype=torch.float32)
    width = max(16, triton.next_power_of_2(q.shape[-1]))  # tl.dot takes no less
    rows, columns = (64, 2048 // width) if q.dtype == torch.float32 else (128, 64)
    shape = (T_q, T_k, q.shape[-1], scale, causal, rows, min(columns, 64), width)
    flash_kernel[(N, triton.cdiv(T_q, rows))](q, k, v, o, lse, *shape)
    return o[..., :D_v], lse


# ---- PyTorch's own


def fused_attention(q, k, v, mask=None, causal=False, scale=None):
    """PyTorch's fused kernel: q (B, H, T_q, D), k and v (B, G, T_k, D), G a divisor of H; causal as
    causal_mask, mask (T_q, T_k) boolean. A row without a key: zeros."""
    T_q, T_k = q.shape[-2], k.shape[-2]
    if causal and T_q != T_k:  # PyTorch's is_causal draws the diagonal from the upper left
        causal, mask = False, causal_mask(T_q, T_k, q.device) if T_q > 1 else None
    grouped, D_v = q.shape[1] != k.shape[1], v.shape[-1]
    if D_v < q.shape[-1]:  # kernels want one width, else PyTorch falls back to the formula
        v = F.pad(v, (0, q.shape[-1] - D_v))
    options = dict(attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return F.scaled_dot_product_attention(q, k, v, **options)[..., :D_v]


def flex_mask(window=None, sinks=0):
    """window_mask (None: causal_mask) as a function of indices, as FlexAttention wants it."""

    def mask(batch, head, i, j):
        return (j <= i) if window is None else (j <= i) & ((j > i - window) | (j < sinks))

    return mask


compile_once = functools.cache(torch.compile)


def flex_attention(q, k, v, window=None, sinks=0):
    """FlexAttention on CUDA: PyTorch compiles a flash kernel for the mask and skips tiles that it
    hides. q (B, H, T, D), k and v (B, G, T, D). Raises ValueError on a CPU."""
    if not q.is_cuda:
        raise ValueError("flex_attention is for CUDA: use fused_attention or flash_attention")
    from torch.nn.attention import flex_attention as flex

    size = (None, None, q.shape[-2], k.shape[-2])
    blocks = compile_once(flex.create_block_mask)(flex_mask(window, sinks), *size, device=q.device)
    attention, grouped = compile_once(flex.flex_attention), q.shape[1] != k.shape[1]
    return attention(q, k, v, block_mask=blocks, enable_gqa=grouped)
