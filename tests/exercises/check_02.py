"""Checks of 02_attention/exercises.py."""

import math

import attention
import torch
from check import Differs, measured, same

SHIPPED = "1fd56e6d"  # window_attention as it came, which is no try yet


def tiles(answer):
    q, k, calls = torch.zeros(1, 1, 300, 4), torch.zeros(1, 1, 1000, 4), []
    original = attention.tile_scores

    def counting(*args):
        calls.append(args[2:4])
        return original(*args)

    attention.tile_scores = counting
    try:
        attention.flash_attention(q, k, k, causal=True, tile=64)
    finally:
        attention.tile_scores = original
    hints = {15: "the first query is token 700, not token 0: the diagonal ends at the lower right"}
    hints[65] = "a tile that the diagonal crosses is computed, too: some of its scores are seen"
    hint = "the queries make 5 rows of tiles, and the last row has all 16. The last query of the "
    hint += "first row is the token with index 700 + 63: which keys has it?"
    same(answer, len(calls), hints.get(answer, hint))


def _call(answer, inputs, case, hint):
    """What answer gives, after a look at its form and at whether the inputs have changed."""
    kept = [None if x is None else x.detach().clone() for x in inputs]
    got = answer(*inputs)
    for name, x, before in zip(("q", "k", "v", "mask"), inputs, kept):
        if x is not None and not torch.equal(x, before):
            raise Differs(f"{case}: {name} has changed. Hint: what ends in _ works in place")
    if not isinstance(got, torch.Tensor):
        raise Differs(f"{case}: got a {type(got).__name__}, not a tensor")
    if not got.isfinite().all():
        raise Differs(f"{case}: the result is not finite. Hint: {hint}")
    return got


def scaled_dot_product_attention(answer):
    torch.manual_seed(0)

    def random(*shape, size=1.0):
        return size * torch.randn(shape)

    def compare(case, inputs, hint, tolerance=1e-4, **options):
        wanted = attention.scaled_dot_product_attention(*inputs, **options)
        got = _call(lambda *x: answer(*x, **options), inputs, case, hint)
        same(got, wanted, f"{case}: {hint}", tolerance)

    q, k, v = random(2, 3, 5, 16), random(2, 3, 5, 16), random(2, 3, 5, 16)
    compare("no mask", (q, k, v), "softmax(q kᵀ / sqrt(D)) v, with D the width of a key")
    compare("T_q 2, T_k 5", (q[..., :2, :], k, v), "a softmax goes over the keys")
    compare("values of width 7", (q, k, v[..., :7]), "D is the width of q and k, not of v")
    compare("no leading dimensions", (q[0, 0], k[0, 0], v[0, 0]), "T and D are the last two")
    compare("one key head for 3", (q, k[:, :1], v[:, :1]), "leading dimensions broadcast")
    compare("scale 0.5", (q, k, v), "scale stands in for 1 / sqrt(D)", scale=0.5)
    compare("scale 0", (q, k, v), "0 is a scale, and all weights are equal then", scale=0.0)

    causal = attention.causal_mask(5, 5)
    compare("a causal mask", (q, k, v, causal), "True is where a query may look")
    several = torch.rand(2, 1, 5, 5) < 0.7
    compare("a mask for each text", (q, k, v, several | causal), "a mask broadcasts")
    compare("a mask of keys alone", (q, k, v, torch.arange(5) < 3), "a mask broadcasts")

    hint = "take the row's largest score off before exp: it cancels in the fraction"
    compare("scores of 10,000", (random(2, 3, 5, 16, size=100), 100 * k, v), hint, 1e-2)
    compare("the same, masked", (random(2, 3, 5, 16, size=100), 100 * k, v, causal), hint, 1e-2)
    hint = (
        "what is hidden must score -inf: any number, however low, can be beaten. And what is taken "
    )
    hint += (
        "off is the row's own largest score, and the sum is divided by afterwards: beside 10^12 "
    )
    hint += "the logarithm of a sum is lost"
    ones = torch.ones(1, 1, 5, 16)
    compare("scores of -10^12, masked", (-1e6 * ones, 1e6 * ones, v[:1, :1], causal), hint)
    hint = "beside a hidden key with a score of 10,000 all that may be seen must not round to 0: "
    hint += "which keys are in the maximum that is taken off?"
    high = 100 * ones.clone()
    high[..., 0, :] *= 100
    compare("a high score, hidden", (ones, high, v[:1, :1], torch.arange(5) > 0), hint)

    blind = causal.clone()
    blind[2] = False
    hint = "hidden by a finite number, such a row becomes the mean of all values, by -inf 0 / 0. "
    hint += "Make the largest, which is taken off, finite, and the sum that is divided by not 0"
    compare("a row that may see nothing", (q, k, v, blind), hint)
    compare("nobody may see", (q, k, v, blind & ~blind), hint)
    ours, theirs = ([x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2))
    out = random(2, 3, 5, 16)
    answer(*ours, blind).backward(out)
    attention.scaled_dot_product_attention(*theirs, blind).backward(out)
    for name, x, y in zip("qkv", ours, theirs):
        if x.grad is None or not x.grad.isfinite().all():
            raise Differs(
                f"a row that may see nothing: the gradient of {name} is missing or NaN. Hint: "
                "where the weights are NaN on the way there, they may be on the way back, even if "
                "the result was mended"
            )
        same(x.grad, y.grad, f"the gradient of {name}, with a row that may see nothing", 1e-4)


def window_attention(answer):
    torch.manual_seed(0)
    for T, window in ((1, 4), (3, 4), (4, 4), (5, 4), (12, 4), (9, 1), (17, 5), (6, 8)):
        q, k, v = torch.randn(3, 2, 2, T, 8)  # each (B, H, T, D)
        case = f"{T} tokens, window {window}"
        hint = "every token sees itself at least"
        got = _call(lambda q, k, v: answer(q, k, v, window), (q, k, v), case, hint)  # noqa: B023
        if got.shape != q.shape:
            raise Differs(f"{case}: the shape is {tuple(got.shape)}, not {tuple(q.shape)}")
        other_k, other_v = k.clone(), v.clone()
        other_k[..., -1, :], other_v[..., -1, :] = 3, 3
        other = answer(q, other_k, other_v, window)
        if not torch.allclose(other[..., :-1, :], got[..., :-1, :], atol=1e-6):
            raise Differs(
                f"{case}: tokens see the future, as the last key and value change what others get. "
                "Hint: which token's key is in column 0 of the mask?"
            )
        at = torch.arange(T)
        mask = attention.window_mask(at, at, window)
        wanted = attention.scaled_dot_product_attention(q, k, v, mask)
        hint = (
            "token i sees i - window + 1 to i. If keys are cropped, column j of the mask is key j "
        )
        hint += "of what was kept, and the first queries lack keys that the last ones do without"
        same(got, wanted, f"{case}: {hint}")


def alibi_attention(answer):
    for H, T_q, T_k in ((8, 6, 6), (4, 5, 5), (1, 4, 4), (2, 1, 7), (16, 3, 5)):
        # Equal scores: the weights are those of the biases alone, and values of 1 show them.
        q, k, v = torch.zeros(1, H, T_q, 16), torch.ones(1, H, T_k, 16), torch.eye(T_k)
        v = v.expand(1, H, T_k, T_k)
        case = f"H {H}, T_q {T_q}, T_k {T_k}, equal scores (query 0 is token {T_k - T_q})"
        got = _call(answer, (q, k, v), case, "a row sees its own token at least")
        if got.shape != (1, H, T_q, T_k):
            raise Differs(f"{case}: the shape is {tuple(got.shape)}, not {(1, H, T_q, T_k)}")
        wanted = torch.zeros(1, H, T_q, T_k)
        for h in range(H):
            slope = 2.0 ** (-8 * (h + 1) / H)
            for i in range(T_q):
                own = T_k - T_q + i
                row = [math.exp(-slope * (own - j)) if j <= own else 0.0 for j in range(T_k)]
                wanted[0, h, i] = torch.tensor(row) / sum(row)
        seen = got.abs() > 0
        if (seen & (wanted == 0)).any():
            raise Differs(
                f"{case}: a query sees a key after it. Hint: causal_mask(T_q, T_k) is for queries "
                "that are the last; and the bias goes onto the scores, before mask and softmax"
            )
        hint = f"{case}; the weights of head 0 for the last query are "
        hint += " ".join(f"{w:.3f}" for w in wanted[0, 0, -1].tolist())
        same(got, wanted, f"{hint}: from key to key a factor of exp(-m), the nearest the heaviest")
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 6, 8, dtype=torch.float64)
    got = _call(answer, (q, k, v), "random q, k and v", "it is a mean of values")
    wanted = torch.empty_like(q)
    for h in range(4):
        for i in range(6):
            distance = i - torch.arange(i + 1)
            scores = (k[:, h, : i + 1] @ q[:, h, i, :, None])[..., 0] / math.sqrt(8)
            weights = torch.softmax(scores - distance * 4.0 ** -(h + 1), -1)  # 2^(-8 (h + 1) / 4)
            wanted[:, h, i] = (weights[..., None] * v[:, h, : i + 1]).sum(1)
    same(got, wanted, "q·k is divided by sqrt(D), the bias is not", 1e-5)
    last = _call(answer, (q[..., 4:, :], k, v), "the last 2 queries of 6", "as above")
    same(last, wanted[..., 4:, :], "a query is as far from its keys as in the whole text", 1e-5)
    big = (100 * q.float(), 100 * k.float(), v.float())
    got = _call(answer, big, "scores of 10,000", "use the stage's softmax, or take the largest off")
    wide = answer(*(x.double() for x in big)).float()
    same(got, wide, "scores of 10,000: not what float64 gives", 1e-2)
    q, k, v = torch.ones(1, 8, 1, 4), torch.zeros(1, 8, 600, 4), torch.randn(1, 8, 600, 4)
    k[..., 0, :] = 75  # a score of 150, of which head 0 takes 300 off
    hint = "the bias goes onto the scores: a weight times exp(-m n) may be 0 for all keys"
    got = _call(answer, (q, k, v), "600 keys, the first scores 150", hint)
    wide = answer(q.double(), k.double(), v.double()).float()
    same(got, wide, f"600 keys, the first scores 150: {hint}", 1e-3)


def order_seen(answer):
    change, letter = measured(answer(), "change", "layers[1](layers[0](x))[0, -1]")
    torch.manual_seed(0)
    layers = [attention.MultiHeadAttention(16, n_heads=2, theta=None).double() for _ in range(2)]
    x = torch.randn(1, 8, 16, dtype=torch.float64)
    ends = []
    for y in (x, x[:, [1, 0, *range(2, 8)]]):
        for layer in layers:
            with torch.no_grad():
                q, k, v = (
                    (y @ (20 * w.weight).T).unflatten(-1, (2, 8)).transpose(1, 2)
                    for w in (layer.q, layer.k, layer.v)
                )
                scores = q @ k.mT / math.sqrt(8)
                hidden = torch.ones(8, 8, dtype=torch.bool).triu(1)
                y = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v
                y = y.transpose(1, 2).flatten(2) @ (20 * layer.out.weight).T
        ends.append(y[0, -1])
    wanted = ((ends[0] - ends[1]).norm() / ends[0].norm()).item()
    if isinstance(change, torch.Tensor) and change.numel() == 1:
        change = change.item()
    hint = (
        "the last token's vector alone, after both layers: the length of the difference over that "
    )
    hint += "of the vector of the text not swapped, with four digits or more"
    same(change, wanted, hint, tolerance=1e-4)
    hint = (
        "print the change after layers[0] alone, then what layers[0] gives tokens 0 and 1 of each"
    )
    same(letter, "b", hint)
