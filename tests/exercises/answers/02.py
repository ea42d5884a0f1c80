"""Answers to 02_attention/exercises.py, and in WRONG what the checks must not let pass."""

import math

import attention
import torch
from attention import MultiHeadAttention
from torch.nn import functional as F

# The queries are tokens 700 to 999, in rows of 64: the rows end with 764, 828, 892, 956 and 1,000
# keys, which take 12, 13, 14, 15 and 16 tiles.
tiles = sum(math.ceil(min(1000, 700 + 64 * (row + 1)) / 64) for row in range(5))


def scaled_dot_product_attention(q, k, v, mask=None, scale=None):
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = (q * scale) @ k.transpose(-1, -2)  # (..., T_q, T_k)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    largest = scores.detach().amax(-1, keepdim=True)
    weights = torch.exp(scores - largest.masked_fill(largest == -math.inf, 0))
    total = weights.sum(-1, keepdim=True)
    return (weights / torch.where(total == 0, 1, total)) @ v


def window_attention(q, k, v, window):
    at = torch.arange(q.shape[-2], device=q.device)
    mask = attention.window_mask(at, at, window)
    return attention.scaled_dot_product_attention(q, k, v, mask)


def alibi_attention(q, k, v):
    H, T_q, T_k = q.shape[1], q.shape[2], k.shape[2]
    slopes = 2.0 ** (-8 * torch.arange(1, H + 1, dtype=q.dtype) / H)
    at = torch.arange(T_k - T_q, T_k)
    distance = at[:, None] - torch.arange(T_k)  # (T_q, T_k)
    scores = q @ k.mT / math.sqrt(q.shape[-1]) - slopes[:, None, None] * distance
    scores = scores.masked_fill(distance < 0, -math.inf)
    return attention.softmax(scores, dim=-1) @ v


def order_seen():
    torch.manual_seed(0)
    layers = [MultiHeadAttention(16, n_heads=2, theta=None).double() for _ in range(2)]
    for layer in layers:
        for weight in layer.parameters():
            weight.data *= 20
    x = torch.randn(1, 8, 16, dtype=torch.float64)
    swapped = x[:, [1, 0, *range(2, 8)]]
    y, other = (layers[1](layers[0](z))[0, -1] for z in (x, swapped))
    return ((y - other).norm() / y.norm()).item(), "b"


# ---- what goes wrong


def formula(hide=None, shift=None, scaled=None, dim=-1, rows=None):
    """The formula with a part replaced: how it hides, what it takes off, how it scales."""

    def wrong(q, k, v, mask=None, scale=None):
        D = q.shape[-1]
        scale = scaled(scale, D, v) if scaled else 1 / math.sqrt(D) if scale is None else scale
        scores = (q @ k.mT) * scale
        all_scores = scores
        if mask is not None:
            scores = hide(scores, mask) if hide else scores.masked_fill(~mask, -math.inf)
        scores = scores - shift(scores, all_scores) if shift else scores
        weights = scores.softmax(dim) if not shift else scores.exp()
        if shift:
            total = weights.sum(dim, keepdim=True)
            weights = weights / total.masked_fill(total == 0, 1)
        return (rows(weights) if rows else weights) @ v

    return wrong


def in_place(q, k, v, mask=None, scale=None):
    q.mul_(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    return scaled_dot_product_attention(q, k, v, mask, 1.0)


def largest_of(scores):
    return scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)


def without_the_blind(q, k, v, mask=None, scale=None):
    """NaN out of the result and not out of the gradient."""
    y = formula()(q, k, v, mask, scale)
    return torch.where(y.isnan(), 0.0, y)


def windowed(mask_of, keys=lambda x, window: x):
    def wrong(q, k, v, window):
        k, v = keys(k, window), keys(v, window)
        mask = mask_of(q.shape[-2], k.shape[-2], window)
        return attention.scaled_dot_product_attention(q, k, v, mask)

    return wrong


def last(x, window):
    return x[..., -window:, :]


def in_the_text(T, T_k, window, more=0):
    """Right positions: but what was cut off is missed by the first queries."""
    at = torch.arange(T)
    return attention.window_mask(at, at[T - T_k :], window + more)


def alibi(slope=None, bias=None, mask=None):
    def wrong(q, k, v):
        H, T_q, T_k, D = q.shape[1], q.shape[2], k.shape[2], q.shape[3]
        h = torch.arange(H, dtype=q.dtype)
        m = slope(h, H) if slope else 2.0 ** (-8 * (h + 1) / H)
        i, j = torch.arange(T_k - T_q, T_k)[:, None], torch.arange(T_k)
        scores = q @ k.mT / math.sqrt(D)
        b = -m[:, None, None] * (i - j)
        scores = scores + (bias(b, i, j, m[:, None, None], D) if bias else b)
        see = mask(T_q, T_k) if mask else j <= i
        return attention.softmax(scores.masked_fill(~see, -math.inf), -1) @ v

    return wrong


def overflowing(q, k, v):
    H, T_q, T_k = q.shape[1], q.shape[2], k.shape[2]
    slopes = 2.0 ** (-8 * torch.arange(1, H + 1, dtype=q.dtype) / H)
    distance = torch.arange(T_k - T_q, T_k)[:, None] - torch.arange(T_k)
    scores = q @ k.mT / math.sqrt(q.shape[-1]) - slopes[:, None, None] * distance
    weights = scores.exp() * (distance >= 0)
    return weights / weights.sum(-1, keepdim=True) @ v


def underflowing(q, k, v):
    """Weights times exp(-m n): right, until all that is heavy is far away."""
    H, T_q, T_k = q.shape[1], q.shape[2], k.shape[2]
    slopes = 2.0 ** (-8 * torch.arange(1, H + 1, dtype=q.dtype) / H)
    distance = torch.arange(T_k - T_q, T_k)[:, None] - torch.arange(T_k)
    weights = attention.attention_weights(q, k, attention.causal_mask(T_q, T_k))
    weights = weights * (-slopes[:, None, None] * distance.clamp(min=0)).exp()
    return weights / weights.sum(-1, keepdim=True) @ v


def change_of(layers_used):
    torch.manual_seed(0)
    layers = [MultiHeadAttention(16, n_heads=2, theta=None).double() for _ in range(2)]
    for layer in layers:
        for weight in layer.parameters():
            weight.data *= 20
    x = torch.randn(1, 8, 16, dtype=torch.float64)
    y, other = x, x[:, [1, 0, *range(2, 8)]]
    for layer in layers[:layers_used]:
        y, other = layer(y), layer(other)
    return y, other


def of_all_tokens():
    y, other = change_of(2)
    return ((y - other).norm() / y.norm()).item(), "b"


def after_one_layer():
    y, other = change_of(1)
    return ((y - other)[0, -1].norm() / y[0, -1].norm()).item(), "a"


WRONG = {
    "tiles": [
        5 * 16,  # all
        1 + 2 + 3 + 4 + 5,  # with the diagonal from the upper left
        tiles - 5,  # without those that the diagonal goes through
        16 * 17 // 2,  # 1,000 queries
        11 + 12 + 13 + 14 + 16,  # rounded down
        float(tiles),
    ],
    "scaled_dot_product_attention": [
        formula(),  # NaN for a row that may see nothing
        formula(hide=lambda s, mask: s.masked_fill(~mask, -1e9)),
        formula(hide=lambda s, mask: s.masked_fill(mask, -math.inf), rows=torch.nan_to_num),
        formula(shift=lambda s, everything: 0),
        formula(shift=lambda s, everything: largest_of(everything)),  # of hidden keys as well
        formula(scaled=lambda scale, D, v: 1.0 if scale is None else scale),
        formula(scaled=lambda scale, D, v: scale or 1 / math.sqrt(D)),
        formula(scaled=lambda scale, D, v: scale or 1 / math.sqrt(v.shape[-1])),
        formula(dim=-2, rows=torch.nan_to_num),
        without_the_blind,
        in_place,
        lambda q, k, v, mask=None, scale=None: F.scaled_dot_product_attention(q, k, v, scale=scale),
    ],
    "window_attention": [
        windowed(lambda T, T_k, window: attention.causal_mask(T, T_k), last),
        windowed(in_the_text, last),
        windowed(lambda T, T_k, window: attention.causal_mask(T, T_k)),  # no window at all
        windowed(lambda T, T_k, window: in_the_text(T, T_k, window, 1)),
        windowed(lambda T, T_k, window: in_the_text(T, T_k, window, -1)),
        windowed(lambda T, T_k, window: None, last),
    ],
    "alibi_attention": [
        alibi(slope=lambda h, H: 2.0 ** (-8 * h / H)),
        alibi(slope=lambda h, H: 2.0 ** -(h + 1)),
        alibi(slope=lambda h, H: 2.0 ** (-8 * (H - h) / H)),  # the heads in reverse order
        alibi(bias=lambda b, i, j, m, D: -b),
        alibi(bias=lambda b, i, j, m, D: b / math.sqrt(D)),
        alibi(bias=lambda b, i, j, m, D: -m * (i - j).abs().clamp(max=3)),
        alibi(mask=lambda T_q, T_k: torch.ones(T_q, T_k, dtype=torch.bool)),
        alibi(mask=lambda T_q, T_k: torch.ones(T_q, T_k, dtype=torch.bool).tril()),
        alibi(bias=lambda b, i, j, m, D: 0 * b),
        overflowing,
        underflowing,
    ],
    "order_seen": [
        lambda: (order_seen()[0], "a"),
        lambda: (order_seen()[0], "c"),
        of_all_tokens,
        after_one_layer,
    ],
}
