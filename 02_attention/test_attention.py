"""Tests of attention.py: each form against the plain formula, PyTorch and transformers."""

import doctest
import importlib.util
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import attention
import pytest
import torch
from attention import (
    Cache,
    GroupedQueryAttention,
    LearnedPositions,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    SingleHeadAttention,
    SlidingWindowAttention,
    apply_rope,
    attention_weights,
    causal_mask,
    flash_attention,
    fused_attention,
    grouped_attention,
    rope_table,
    scaled_dot_product_attention,
    sliding_window_attention,
    softmax,
    window_mask,
)
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(ours, theirs, tolerance=1e-10):
    assert not ours.isnan().any()
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# ---- the plain formulas, written another way


def formula(q, k, v, see):
    """One query after the other, over the keys that it sees and no others; no largest score is
    subtracted. q (..., T_q, D), k (..., T_k, D), see (T_q, T_k) boolean."""
    rows = []
    for i in range(q.shape[-2]):
        j = see[i].nonzero()[:, 0]
        scores = (q[..., i, None, :] * k[..., j, :]).sum(-1) / math.sqrt(q.shape[-1])
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        rows.append((weights[..., None] * v[..., j, :]).sum(-2))
    return torch.stack(rows, dim=-2)


def lower_right(T_q, T_k):
    return torch.tensor([[j <= i + T_k - T_q for j in range(T_k)] for i in range(T_q)])


def windowed(T, window, sinks):
    return torch.tensor(
        [[j <= i and (i - j < window or j < sinks) for j in range(T)] for i in range(T)]
    )


def turned(x, theta=10_000.0):
    """Rotary positions as a product of complex numbers; x (..., T, D) from position 0 on."""
    T, D = x.shape[-2:]
    angle = torch.arange(T)[:, None].double() / theta ** (torch.arange(D // 2).double() * 2 / D)
    z = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * torch.polar(angle * 0 + 1, angle)
    return torch.cat([z.real, z.imag], dim=-1)


def split(x, n_heads):
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)  # (B, H, T, D)


def plain(module, x, see=None):
    """What a module must give, from its weights: one head at a time, its key head repeated."""
    see = lower_right(x.shape[1], x.shape[1]) if see is None else see
    if isinstance(module, MultiHeadLatentAttention):
        D, R, L = module.head_dim, module.rope_dim, module.kv_rank
        q = split(module.q_up(module.q_down(x)), module.n_heads)
        q = torch.cat([q[..., :D], turned(q[..., D:])], dim=-1)
        c = module.kv_down(x)
        kv = split(module.kv_up(module.kv_norm(c[..., :L])), module.n_heads)
        r = turned(c[..., L:])[:, None].expand(-1, module.n_heads, -1, -1)
        assert r.shape[-1] == R
        y = formula(q, torch.cat([kv[..., :D], r], dim=-1), kv[..., D:], see)
    else:
        module = getattr(module, "heads", module)
        n_kv_heads = getattr(module, "n_kv_heads", module.n_heads)
        q, k, v = module.q(x), module.k(x), module.v(x)
        q, k, v = split(q, module.n_heads), split(k, n_kv_heads), split(v, n_kv_heads)
        if module.theta is not None:
            q, k = turned(q, module.theta), turned(k, module.theta)
        heads = []
        for h in range(module.n_heads):
            g = h * n_kv_heads // module.n_heads
            heads.append(formula(q[:, h], k[:, g], v[:, g], see))
        y = torch.stack(heads, dim=1)
    return module.out(y.transpose(1, 2).flatten(2))


def drawn(module):
    """float64, with weights large enough for attention to be far from even."""
    for p in module.parameters():
        torch.nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.3)
    return module.double()


MODULES = {
    "multi-head": lambda: MultiHeadAttention(24, 4),
    "multi-head with RoPE": lambda: MultiHeadAttention(24, 4, theta=10_000.0),
    "grouped-query": lambda: GroupedQueryAttention(24, 6, 2),
    "grouped-query without RoPE": lambda: GroupedQueryAttention(24, 6, 3, theta=None),
    "multi-query": lambda: GroupedQueryAttention(24, 6, 1, theta=500.0),
    "latent": lambda: MultiHeadLatentAttention(24, 4),
    "latent, all sizes given": lambda: MultiHeadLatentAttention(24, 4, 10, 7, 6, 4, 5),
    "window": lambda: SlidingWindowAttention(24, 4, window=5),
    "window 1": lambda: SlidingWindowAttention(24, 4, window=1),
    "window and sinks": lambda: SlidingWindowAttention(24, 6, 7, sinks=3, n_kv_heads=2),
    "longer window": lambda: SlidingWindowAttention(24, 4, window=70, sinks=70),
}
every_module = pytest.mark.parametrize("name", MODULES)


def seen_by(module, T):
    window = isinstance(module, SlidingWindowAttention)
    return windowed(T, module.window, module.sinks) if window else None


# ---- softmax, the formula, masks


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_softmax_is_torchs_also_for_huge_values(dim):
    x = 1000 * random(5, 4, 7)  # exp overflows beyond 709
    close(softmax(x, dim), x.softmax(dim))
    x = random(5, 4, 7)
    close(softmax(x, dim), x.exp() / x.exp().sum(dim, keepdim=True))
    assert torch.autograd.gradcheck(lambda x: softmax(x, dim), x.requires_grad_())


def test_softmax_of_minus_infinity_alone_is_zero():
    x = torch.full((2, 3), -math.inf)
    x[0, 1] = 5.0
    assert softmax(x, -1).tolist() == [[0, 1, 0], [0, 0, 0]]


SHAPES = [
    # leading dimensions of q, of k and v, T_q, T_k, D, D_v
    ((), (), 1, 1, 1, 1),
    ((3,), (3,), 7, 7, 4, 4),
    ((2, 3), (2, 3), 1, 9, 5, 3),
    ((2, 3), (1, 3), 8, 5, 6, 6),  # they broadcast
    ((2, 1, 4), (3, 1), 3, 11, 2, 7),
    ((), (2,), 33, 33, 8, 8),
]


@pytest.mark.parametrize("lead, lead_k, T_q, T_k, D, D_v", SHAPES)
def test_scaled_dot_product_attention_is_the_formula(lead, lead_k, T_q, T_k, D, D_v):
    q, k, v = random(*lead, T_q, D), random(*lead_k, T_k, D), random(*lead_k, T_k, D_v)
    mask = torch.rand(T_q, T_k) < 0.6
    mask[:, 0] = True  # PyTorch's formula needs a key for each row; none at all is tested below
    every, row = torch.ones(T_q, T_k).bool(), mask[:1].expand(T_q, T_k)
    for see, given in ((every, None), (mask, mask), (row, mask[0])):
        close(scaled_dot_product_attention(q, k, v, given), formula(q, k, v, see))
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    close(scaled_dot_product_attention(q, k, v, mask), theirs)
    weights = attention_weights(q, k, mask)
    close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert (weights.masked_select(~mask) == 0).all()


def test_a_row_that_may_see_nothing_gives_zeros_and_zero_gradients():
    q, k, v = (random(2, 5, 4).requires_grad_() for _ in range(3))
    mask = torch.rand(5, 5) < 0.5
    mask[2] = False
    y = scaled_dot_product_attention(q, k, v, mask)
    y.sum().backward()
    assert (y[:, 2] == 0).all() and (q.grad[:, 2] == 0).all()
    assert not any(x.isnan().any() for x in (y, q.grad, k.grad, v.grad))
    assert (scaled_dot_product_attention(q, k, v, mask & False) == 0).all()


@pytest.mark.parametrize(
    "mask",
    [torch.ones(4, 6).bool(), torch.ones(6, 6), torch.ones(2, 5, 6).bool(), torch.ones(7).bool()],
)
def test_a_mask_that_does_not_fit_is_refused(mask):
    q, k = random(3, 5, 2), random(3, 6, 2)
    with pytest.raises(ValueError, match=r"mask is torch.* of shape .* broadcast to \(3, 5, 6\)"):
        scaled_dot_product_attention(q, k, k, mask)


@pytest.mark.parametrize("T_q, T_k", [(1, 1), (4, 4), (1, 6), (3, 8), (5, 2)])
def test_masks(T_q, T_k):
    assert causal_mask(T_q, T_k).equal(lower_right(T_q, T_k))
    at = torch.arange(9)
    assert window_mask(at, at, 3, 2).equal(windowed(9, 3, 2))
    assert window_mask(at, at, 9).equal(lower_right(9, 9))


def test_the_example_by_hand():
    result = doctest.testmod(attention)
    assert result.attempted >= 4 and result.failed == 0


# ---- positions


def test_sinusoidal_positions():
    table = attention.sinusoidal_positions(40, 8)
    for t, i in ((0, 0), (7, 2), (39, 3)):
        angle = t / 10_000 ** (2 * i / 8)
        expected = torch.tensor([math.sin(angle), math.cos(angle)])
        close(table[t, 2 * i : 2 * i + 2], expected, 1e-5)
    assert attention.sinusoidal_positions(5, 7).shape == (5, 7)


def test_learned_positions():
    positions = LearnedPositions(10, 4)
    x = torch.randn(2, 3, 4)
    close(positions(x, start=7), x + positions.embedding.weight[7:10])
    with pytest.raises(ValueError, match="11 tokens do not fit into 10"):
        positions(x, start=8)


def test_attention_does_not_see_order_but_for_positions():
    x, order = random(1, 6, 24), [3, 1, 0, 4, 2, 5]  # the last token stays the last
    module = drawn(MultiHeadAttention(24, 4))
    close(module(x)[:, -1], module(x[:, order])[:, -1])
    rotary = drawn(MultiHeadAttention(24, 4, theta=10_000.0))
    assert (rotary(x)[:, -1] - rotary(x[:, order])[:, -1]).abs().max() > 1e-3


def test_rope_is_a_complex_product_and_depends_on_distance_alone():
    x, y = random(2, 3, 20, 8)
    cos, sin = rope_table(torch.arange(20), 8)
    close(apply_rope(x, cos, sin), turned(x))
    close(apply_rope(x, cos, sin).norm(dim=-1), x.norm(dim=-1))
    q, k = x[0, 0], y[0, 0]
    products = []
    for start in (0, 5, 70_000):
        cos, sin = rope_table(torch.tensor([start, start + 11]), 8)
        products.append(apply_rope(q, cos[1], sin[1]) @ apply_rope(k, cos[0], sin[0]))
    close(torch.stack(products), products[0].expand(3), 1e-9)


# ---- the modules


@pytest.mark.parametrize("T", [1, 2, 13, 75])
@every_module
def test_module_is_its_plain_formula(name, T):
    module, x = drawn(MODULES[name]()), random(2, T, 24)
    close(module(x), plain(module, x, seen_by(module, T)))


@pytest.mark.parametrize("kernel", ["flash", "fused"])
@every_module
def test_kernels_agree(name, kernel):
    module, x = drawn(MODULES[name]()), random(2, 37, 24)
    owner = getattr(module, "heads", module)
    if kernel == "flash" and owner is not module:
        with pytest.raises(ValueError, match="flash has no window"):
            SlidingWindowAttention(24, 4, 5, kernel="flash")
        return
    expected = module(x)
    owner.kernel = kernel
    close(module(x), expected)
    cache = Cache()  # in pieces, so that there are more keys than queries
    close(torch.cat([module(piece, cache) for piece in x.split(10, dim=1)], dim=1), expected)


@pytest.mark.parametrize("piece", [1, 4, 11])
@every_module
def test_cached_decoding_is_the_whole(name, piece):
    """A window that crops its keys but draws the diagonal from the upper left fails here."""
    module, x, cache = drawn(MODULES[name]()), random(2, 29, 24), Cache()
    parts = [module(part, cache) for part in x.split(piece, dim=1)]
    close(torch.cat(parts, dim=1), module(x))
    tokens = 29
    if isinstance(module, SlidingWindowAttention):
        tokens = min(29, module.sinks + module.window)
    assert cache.length == 29
    assert cache.nbytes() == 2 * tokens * module.cache_numbers * 8


def test_numbers_in_the_cache():
    assert MultiHeadAttention(64, 8).cache_numbers == 2 * 64
    assert GroupedQueryAttention(64, 8, 2).cache_numbers == 2 * 2 * 8
    assert GroupedQueryAttention(64, 8, 1).cache_numbers == 2 * 8
    assert MultiHeadLatentAttention(64, 8).cache_numbers == 4 * 8 + 4
    deepseek = MultiHeadLatentAttention(64, 128, 512, head_dim=128, rope_dim=64)
    assert deepseek.cache_numbers == 576
    assert SlidingWindowAttention(64, 8, 16, 4, n_kv_heads=2).cache_numbers == 2 * 2 * 8


def test_single_head():
    head, x, cache = drawn(SingleHeadAttention(8, 5)), random(2, 9, 8), Cache()
    expected = formula(head.q(x), head.k(x), head.v(x), lower_right(9, 9))
    close(head(x), expected)
    close(torch.cat([head(part, cache) for part in x.split(2, dim=1)], dim=1), expected)
    assert SingleHeadAttention(8)(torch.randn(1, 3, 8)).shape == (1, 3, 8)


@pytest.mark.parametrize("cached", [False, True])
@every_module
def test_no_token_sees_the_future(name, cached):
    module, x = drawn(MODULES[name]()), random(1, 24, 24)
    changed = x.clone()
    changed[:, 17:] += 1

    def run(x):
        cache = Cache()
        return torch.cat([module(p, cache) for p in x.split(6, 1)], 1) if cached else module(x)

    difference = (run(x) - run(changed)).abs().amax(-1)[0]
    assert (difference[:17] == 0).all() and (difference[17:] > 1e-6).all()


def test_a_window_and_its_sinks_are_all_that_is_seen():
    module, x = drawn(SlidingWindowAttention(24, 4, window=5, sinks=2)), random(1, 200, 24)
    before = module(x)
    for t in (1, 2, 100):
        changed = x.clone()
        changed[:, t] += 1
        moved = ((module(changed) - before).abs().amax(-1)[0] > 1e-9).nonzero()[:, 0].tolist()
        assert moved == list(range(t, 200 if t < 2 else t + 5))


def test_absorbed_decoding_never_expands_the_latent():
    module, T = drawn(MultiHeadLatentAttention(24, 4, kv_rank=9)), 200
    cache = Cache()
    module(random(1, T, 24), cache)
    with Sizes() as sizes:
        module(random(1, 1, 24), cache)
    # Weights (H, T) and the cache itself, grown by one; keys of all heads would be H D T = 6 * 4 T.
    assert max(sizes.seen) <= (T + 1) * (9 + 2)
    with Sizes() as sizes:
        module(random(1, T, 24))
    assert max(sizes.seen) >= 4 * T * (6 + 6)


@every_module
def test_module_gradients(name):
    module, x = drawn(MODULES[name]()), random(1, 6, 24).requires_grad_()
    names, weights = zip(*module.named_parameters())

    def f(x, *weights):
        return torch.func.functional_call(module, dict(zip(names, weights)), x)

    assert torch.autograd.gradcheck(f, (x, *weights), fast_mode=True)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MultiHeadAttention(30, 4), "d_model 30 is not divisible by n_heads 4"),
        (lambda: MultiHeadAttention(12, 4, theta=1e4), "head dim 3 is odd"),
        (lambda: MultiHeadAttention(12, 0), "under 1"),
        (lambda: MultiHeadAttention(12, 4, kernel="fast"), "kernel fast is none of plain"),
        (lambda: GroupedQueryAttention(24, 6, 4), "n_heads 6 is not divisible by n_kv_heads 4"),
        (lambda: GroupedQueryAttention(30, 4, 2), "d_model 30 is not divisible"),
        (lambda: MultiHeadLatentAttention(30, 4), "d_model 30 is not divisible"),
        (lambda: MultiHeadLatentAttention(24, 4, rope_dim=5), "rotary dim 5 is odd"),
        (lambda: MultiHeadLatentAttention(24, 4, kv_rank=-3), "width of latent .* kv_rank=-3"),
        (lambda: SlidingWindowAttention(24, 4, window=0), "window 0 is under 1"),
        (lambda: SlidingWindowAttention(24, 4, 4, sinks=-1), "sinks -1 not in 0 to 4"),
        (lambda: SlidingWindowAttention(24, 4, 4, sinks=5), "sinks 5 not in 0 to 4"),
        (lambda: flash_attention(random(2, 3, 4), *random(2, 3, 3, 4)), "do not fit each other"),
        (lambda: attention.flex_attention(*random(3, 1, 2, 3, 4)), "flex_attention is for CUDA"),
    ],
)
def test_bad_shapes_are_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


# ---- grouped, windowed and flash attention as functions


@pytest.mark.parametrize("T, G, n", [(1, 2, 3), (7, 1, 4), (10, 3, 1)])
def test_grouped_attention_is_attention_with_repeated_keys(T, G, n):
    q, k, v = random(2, G * n, T, 4), random(2, G, T + 3, 4), random(2, G, T + 3, 5)
    mask = torch.rand(T, T + 3) < 0.5
    wide = (x.repeat_interleave(n, dim=1) for x in (k, v))
    close(grouped_attention(q, k, v, mask), scaled_dot_product_attention(q, *wide, mask))


class Sizes(TorchDispatchMode):
    """The number of elements of every tensor that any operation gives."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.seen.append(x.numel())
        return out


@pytest.mark.parametrize("kernel", ["plain", "fused"])
def test_a_sliding_window_is_linear_in_memory(kernel):
    largest = []
    for T in (512, 1024, 2048):
        q, k, v = (torch.randn(1, 2, T, 8, requires_grad=True) for _ in range(3))
        with Sizes() as sizes:
            sliding_window_attention(q, k, v, 16, 4, kernel=kernel).sum().backward()
        largest.append(max(sizes.seen))
    assert largest[0] < 512 * 512 and largest[2] <= 2048 * 2 * 8  # no more than q itself
    close(
        sliding_window_attention(q, k, v, 16, 4, kernel=kernel),
        grouped_attention(q, k, v, windowed(2048, 16, 4)),
        1e-5,
    )


FLASH = [
    # leading dimensions, T_q, T_k, D, D_v, tile
    ((), 1, 1, 1, 1, 4),
    ((2, 3), 8, 8, 4, 4, 4),
    ((2,), 13, 13, 5, 3, 4),  # not a multiple of the tile
    ((1, 2), 9, 9, 4, 4, 100),  # less than a tile
    ((2,), 5, 14, 4, 6, 3),
    ((2,), 1, 10, 4, 4, 4),
    ((2,), 11, 6, 4, 4, 4),  # causal, the first five rows see nothing
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lead, T_q, T_k, D, D_v, tile", FLASH)
def test_flash_attention_is_the_formula_forward_and_backward(lead, T_q, T_k, D, D_v, tile, causal):
    inputs = [4 * random(*lead, T_q, D), random(*lead, T_k, D), random(*lead, T_k, D_v)]
    for x in inputs:
        x.requires_grad_()
    mask = lower_right(T_q, T_k) if causal else None
    ours = flash_attention(*inputs, causal, tile=tile)
    theirs = scaled_dot_product_attention(*inputs, mask)
    close(ours, theirs)
    direction = torch.randn_like(ours)
    grads = torch.autograd.grad((ours * direction).sum(), inputs)
    for a, b in zip(grads, torch.autograd.grad((theirs * direction).sum(), inputs)):
        close(a, b)
    assert torch.autograd.gradcheck(
        lambda *x: flash_attention(*x, causal, tile=tile), inputs, fast_mode=True
    )


def test_flash_attention_survives_huge_scores():
    q, k, v = 300 * random(3, 2, 40, 4)
    mask = lower_right(40, 40)
    close(flash_attention(q, k, v, tile=8), scaled_dot_product_attention(q, k, v, mask))
    ordered = torch.arange(40.0).double()[None, :, None].expand(2, 40, 4)  # each tile is larger
    ours = flash_attention(q.abs(), ordered, v, tile=8)
    close(ours, scaled_dot_product_attention(q.abs(), ordered, v, mask))


@pytest.mark.parametrize("causal", [True, False])
def test_flash_attention_never_holds_the_matrix_of_weights(causal):
    T, D, tile = 256, 4, 16
    q, k, v = (torch.randn(T, D, requires_grad=True) for _ in range(3))
    with Sizes() as sizes:
        flash_attention(q, k, v, causal, tile=tile).sum().backward()
    assert len(sizes.seen) > 1000 and max(sizes.seen) == max(T * D, tile * tile)
    with Sizes() as sizes:  # the same watch over the formula sees it
        scaled_dot_product_attention(q, k, v).sum().backward()
    assert max(sizes.seen) == T * T


def test_flash_attention_visits_no_tile_above_the_diagonal():
    q = torch.randn(64, 4)
    products = {}
    for causal in (True, False):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            flash_attention(q, q, q, causal, tile=8)
        counts = {event.key: event.count for event in profile.key_averages()}
        products[causal] = counts["aten::bmm"]
    assert products == {True: 2 * (8 * 9 // 2), False: 2 * 8 * 8}


def test_flash_attention_in_half_precision():
    q, k, v = torch.randn(3, 2, 50, 8)
    mask = lower_right(50, 50)
    ours = flash_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), tile=16)
    assert ours.dtype == torch.bfloat16
    close(ours.float(), scaled_dot_product_attention(q, k, v, mask), 0.05)


def test_fused_attention_draws_the_diagonal_from_the_lower_right():
    q, k, v = random(1, 4, 3, 8), random(1, 2, 7, 8), random(1, 2, 7, 5)
    expected = grouped_attention(q, k, v, lower_right(3, 7))
    close(fused_attention(q, k, v, causal=True), expected)
    close(fused_attention(q, k, v, mask=lower_right(3, 7)), expected)
    nothing = torch.zeros(3, 7).bool()
    assert (fused_attention(q, k, v, mask=nothing) == 0).all()


def test_flex_mask_and_flex_attention_in_eager_mode():
    """On a CPU PyTorch runs FlexAttention as the formula: enough to see that the mask is right."""
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    for window, sinks in ((None, 0), (5, 0), (5, 2)):
        see = lower_right(40, 40) if window is None else windowed(40, window, sinks)
        mask = attention.flex_mask(window, sinks)
        at = torch.arange(40)
        assert mask(0, 0, at[:, None], at[None, :]).equal(see)
        q, k, v = torch.randn(3, 1, 2, 40, 16)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is slow without torch.compile, says PyTorch
            blocks = flex.create_block_mask(mask, None, None, 40, 40, device="cpu")
            theirs = flex.flex_attention(q, k, v, block_mask=blocks)
        close(scaled_dot_product_attention(q, k, v, see), theirs, 1e-5)


INTERPRETED = """
import torch, attention
torch.set_num_threads(1)
for N, T_q, T_k, D, D_v, causal in ((2, 5, 5, 8, 8, True), (1, 150, 150, 32, 32, True),
                                    (1, 70, 130, 20, 12, True), (1, 130, 70, 16, 16, True),
                                    (2, 40, 90, 16, 16, False)):
    torch.manual_seed(0)
    q, k, v = torch.randn(N, T_q, D), torch.randn(N, T_k, D), torch.randn(N, T_k, D_v)
    ours = attention.triton_forward(q, k, v, causal, 0.3)
    theirs = attention.tiled_forward(q, k, v, causal, 0.3, 64)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)
    print("same")
"""


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
def test_triton_kernel_in_the_interpreter():
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["same"] * 5, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_kernels_on_a_gpu():
    q, k, v = torch.randn(3, 2, 4, 300, 64, device="cuda")
    expected = scaled_dot_product_attention(q, k, v, causal_mask(300, 300, "cuda"))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    close(flash_attention(*inputs), expected, 1e-4)
    close(fused_attention(*inputs, causal=True), expected, 1e-4)
    grads = torch.autograd.grad(flash_attention(*inputs).square().sum(), inputs)
    theirs = fused_attention(*inputs, causal=True).square().sum()
    for a, b in zip(grads, torch.autograd.grad(theirs, inputs)):
        close(a, b, 1e-3)
    at = torch.arange(300, device="cuda")
    expected = scaled_dot_product_attention(q, k, v, window_mask(at, at, 40, 4))
    close(attention.flex_attention(q, k, v, 40, 4), expected, 1e-2)


# ---- the attention modules of transformers, with the same weights


def additive(see):
    return torch.zeros(see.shape).masked_fill(~see, -math.inf)[None, None]


def copied(ours, theirs):
    """Weights of a Llama or Mistral attention into ours."""
    for name in ("q", "k", "v"):
        getattr(ours, name).weight.data = getattr(theirs, f"{name}_proj").weight.data
    ours.out.weight.data = theirs.o_proj.weight.data


@pytest.mark.parametrize("kernel", ["plain", "flash", "fused"])
def test_transformers_llama(kernel):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.llama import modeling_llama as llama

    shape = dict(hidden_size=64, num_attention_heads=8, num_key_value_heads=2)
    config = llama.LlamaConfig(**shape, attn_implementation="eager")
    theirs, x = llama.LlamaAttention(config, 0), torch.randn(2, 19, 64)
    ours = GroupedQueryAttention(64, 8, 2, kernel=kernel)
    copied(ours, theirs)
    tables = llama.LlamaRotaryEmbedding(config)(x, torch.arange(19)[None])
    expected = theirs(x, tables, additive(lower_right(19, 19)))[0]
    close(ours(x), expected, 1e-5)
    cache = Cache()
    close(torch.cat([ours(part, cache) for part in x.split(4, 1)], 1), expected, 1e-5)


def test_transformers_mistral():
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.masking_utils import create_sliding_window_causal_mask
    from transformers.models.mistral import modeling_mistral as mistral

    shape = dict(hidden_size=64, num_attention_heads=8, num_key_value_heads=2, sliding_window=6)
    config = mistral.MistralConfig(**shape, attn_implementation="eager")
    theirs, x = mistral.MistralAttention(config, 0), torch.randn(2, 90, 64)
    ours = SlidingWindowAttention(64, 8, 6, n_kv_heads=2)
    copied(ours.heads, theirs)
    positions = torch.arange(90)[None]
    tables = mistral.MistralRotaryEmbedding(config)(x, positions)
    mask = create_sliding_window_causal_mask(config, x, None, None, position_ids=positions)
    expected = theirs(x, tables, mask)[0]
    close(ours(x), expected, 1e-5)
    cache = Cache()
    close(torch.cat([ours(part, cache) for part in x.split(7, 1)], 1), expected, 1e-5)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("q_rank", [None, 24])
def test_transformers_deepseek(version, q_rank):
    pytest.importorskip("transformers", reason="transformers is not installed")
    module = pytest.importorskip(
        f"transformers.models.deepseek_v{version}.modeling_deepseek_v{version}"
    )
    sizes = dict(q_lora_rank=q_rank, kv_lora_rank=20, qk_nope_head_dim=16, qk_rope_head_dim=8)
    sizes |= dict(v_head_dim=12, hidden_size=64, num_attention_heads=4, num_key_value_heads=4)
    name = f"DeepseekV{version}"
    config = getattr(module, f"{name}Config")(**sizes, attn_implementation="eager")
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10_000.0}  # no YaRN
    theirs, x = getattr(module, f"{name}Attention")(config, 0), torch.randn(2, 17, 64)
    ours = MultiHeadLatentAttention(64, 4, 20, q_rank, head_dim=16, rope_dim=8, v_dim=12)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.2)
    # They rotate neighbours (2i, 2i + 1), we i and i + R/2: the rows that make them are reordered.
    order = torch.tensor([*range(0, 8, 2), *range(1, 8, 2)])
    q = (theirs.q_proj if q_rank is None else theirs.q_b_proj).weight.data.view(4, 24, -1).clone()
    q[:, 16:] = q[:, 16 + order]
    ours.q_up.weight.data = q.flatten(0, 1)
    if q_rank:
        ours.q_down[0].weight.data = theirs.q_a_proj.weight.data
        ours.q_down[1].weight.data = theirs.q_a_layernorm.weight.data
    down = theirs.kv_a_proj_with_mqa.weight.data.clone()
    down[20:] = down[20 + order]
    ours.kv_down.weight.data = down
    ours.kv_norm.weight.data = theirs.kv_a_layernorm.weight.data
    ours.kv_up.weight.data = theirs.kv_b_proj.weight.data
    ours.out.weight.data = theirs.o_proj.weight.data
    tables = getattr(module, f"{name}RotaryEmbedding")(config)(x, torch.arange(17)[None])
    mask = additive(lower_right(17, 17))
    expected = theirs(x, position_embeddings=tables, attention_mask=mask)[0]
    assert expected.abs().max() > 0.5
    close(ours(x), expected, 1e-5)
    cache = Cache()  # the absorbed form
    close(torch.cat([ours(part, cache) for part in x.split(1, 1)], 1), expected, 1e-5)


# ---- the command line


def start(out, *words):
    env = os.environ | {"OUT": str(out), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--sinks 300 --window 256", "sinks 300 not in 0 to 256"),
        ("--min_context 512 --max_context 256", "--min_context 512 is not in 1 to 256"),
        ("quality --variants mha,mhb", "--variants mha,mhb: choose from mha-learned,"),
        ("heat --model {}", "is not a whole model directory"),
    ],
)
def test_bad_input_ends_in_one_line(tmp_path, words, message):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"')
    done = start(tmp_path / "out", "run.py", *words.format(tmp_path).split())
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_measure_on_a_small_scale(tmp_path):
    sizes = "--d_model 32 --n_heads 4 --min_context 32 --max_context 64 --window 16 --sinks 2"
    done = start(tmp_path, "run.py", "measure", *sizes.split(), "--repeats", "1")
    assert done.returncode == 0, done.stderr
    assert "a small random one" in done.stdout
    home = tmp_path / "02_attention"
    rows = json.loads((home / "measure.json").read_text())["rows"]
    assert rows["gqa"]["contexts"]["64"]["cache_bytes"] == 4 * 64 * 2 * 2 * 8
    assert rows["window"]["contexts"]["64"]["cache_bytes"] == 4 * (16 + 2) * 2 * 32
    # The scores of 4 heads, twice at once; the fused kernel has none of them.
    assert rows["mha plain"]["contexts"]["64"]["peak_bytes"] > 2 * 4 * 4 * 64 * 64
    assert all(0 < row["difference"] < 1e-5 for row in rows.values())
    assert {"measure.png", "heat.png"} <= {path.name for path in home.iterdir()}


def test_quality_on_a_small_scale(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A small text about nothing much,\nrepeated until it will do.\n" * 100)
    sizes = "--d_model 16 --n_layers 1 --n_heads 2 --n_kv_heads 1 --context_length 32 --window 8"
    more = f"--steps 60 --max_lr 1e-2 --tokens_per_step 256 --seeds 1 --sinks 2 --data {text}"
    done = start(tmp_path, "run.py", "quality", *sizes.split(), *more.split())
    assert done.returncode == 0, done.stderr
    assert "working on bytes" in done.stdout
    home = tmp_path / "02_attention" / "latest"
    rows = json.loads((home / "quality.json").read_text())["rows"]
    assert len(rows) == 7 and rows["mqa"]["cache_bytes_per_token"] == 4 * 2 * 8
    assert all(0.5 < row["val_bpb"] < 5 for row in rows.values())  # 8 bits without training
    again = start(tmp_path, "run.py", "quality", *sizes.split(), *more.split())
    assert "7 of 7 are in" in again.stdout and len(open(home / "metrics.jsonl").readlines()) == 7


def test_heat_maps_show_what_transformers_computes(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    shape = dict(vocab_size=257, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    config = transformers.GPT2Config(**shape, initializer_range=0.5, attn_implementation="eager")
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path)
    ids = torch.randint(257, (1, 20))
    code = "import sys, pathlib, torch, run; path = pathlib.Path(sys.argv[1]); "
    code += f"torch.save(run.gpt2_weights(path, {ids[0].tolist()}), path / 'weights.pt')"
    done = start(tmp_path, "-c", code, str(tmp_path))
    assert done.returncode == 0, done.stderr
    theirs = model(ids, output_attentions=True).attentions
    for a, b in zip(torch.load(tmp_path / "weights.pt"), theirs):
        close(a, b[0], 1e-5)
