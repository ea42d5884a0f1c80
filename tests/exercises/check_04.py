"""Checks of 04_modern/exercises.py."""

import modern
import torch
from check import Differs, measured, same

SHIPPED = "b6d36dc2"  # attend as it came, which is no try yet


def cache_bytes(answer):
    if not isinstance(answer, (tuple, list)) or len(answer) != 2:
        raise Differs(f"got {answer!r}. Hint: a tuple of two ints, (KVCache's, RollingKVCache's)")
    config = modern.TransformerConfig(
        vocab_size=151_936, context_length=40_960, d_model=1024, n_layers=28, n_heads=16,
        n_kv_heads=8, head_dim=128, d_ff=3072,
    )  # fmt: skip
    how = dict(batch_size=8, device="meta", dtype=torch.bfloat16)  # meta: takes no memory
    full = modern.KVCache(config, capacity=4096, **how)
    rolling = modern.RollingKVCache(config, window=1024, sinks=4, **how)
    found = [
        sum(t.numel() * t.element_size() for t in cache.k + cache.v) for cache in (full, rolling)
    ]
    hint = (
        "KVCache: k and v are two tensors a layer, of head_dim numbers of two bytes for each row, "
    )
    hint += "head of keys and token. How many heads have keys, and is head_dim d_model / n_heads?"
    same(answer[0], found[0], hint)
    hint = "RollingKVCache: as the other, with fewer slots. Sinks and window, and what else is in "
    hint += "`ring`? When a chunk enters, its first token still sees a window"
    same(answer[1], found[1], hint)


def rms_norm(answer):
    torch.manual_seed(0)
    truth = modern.RMSNorm(8)
    weight = torch.randn(8)

    def wanted(x, w, eps):
        truth.weight.data, truth.eps = w, eps
        return truth(x).detach()

    def check(x, hint, w=weight, eps=1e-5, tolerance=1e-5):
        w, before = w.to(x.dtype), x.clone()
        got = answer(x, w, eps)
        same(got, wanted(before, w, eps), hint, tolerance)
        if got.dtype != x.dtype:
            raise Differs(f"{x.dtype} in, {got.dtype} out. Hint: back to x's dtype at the end")
        same(x, before, "x is to stay as it was: work on a copy")

    x = torch.randn(2, 3, 8) + 0.5
    hint = "a weight of ones: x over the root of (the mean of its squares, plus eps)"
    check(x, hint, torch.ones(8))
    check(x, "the weight scales each channel")
    check(x / 100, "the eps is added to the mean square, before the root", eps=1e-2)
    check(x[0, 0], "one vector, without batch and time")
    check(torch.zeros(2, 8), "a vector of zeros stays one: the eps keeps 0 / 0 away")
    hint = "a late digit is wrong: x in float64 is to stay float64 on the way"
    check(x.double(), hint, tolerance=1e-12)
    hint = "in float16 a square above 65,504 is infinite, and one below 6e-8 is 0: not in float32"
    check(1000 * x.half(), hint, tolerance=4e-3)
    check((x / 1000).half(), hint, eps=1e-8, tolerance=4e-3)
    x = torch.randn(64, 256).bfloat16()
    got = answer(x, torch.ones(256).bfloat16(), 1e-5)
    exact = wanted(x.double(), torch.ones(256).double(), 1e-5)
    same(got, exact, "x in bfloat16", 0.05)
    off = ((got.double() - exact) / exact).abs().mean().item()  # rounded once: 0.0014
    if got.dtype != torch.bfloat16:
        raise Differs(f"bfloat16 in, {got.dtype} out. Hint: back to x's dtype at the end")
    if off > 0.0017:
        raise Differs(
            f"in bfloat16 it is off by {off:.2%} on average; 0.14% cannot be avoided. Hint: all "
            "between what comes in and what goes out is float32"
        )


def _truth(q, k, v, frequencies, window):
    """Attention of a whole text, (B, H, T, D), written out."""
    T, group = q.shape[2], q.shape[1] // k.shape[1]
    angles = torch.arange(T)[:, None] * frequencies
    turn = torch.polar(torch.ones_like(angles), angles)  # (T, D/2)
    half = q.shape[-1] // 2

    def rotate(x):
        pairs = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    scores = rotate(q) @ rotate(k).repeat_interleave(group, 1).mT / q.shape[-1] ** 0.5
    ages = torch.arange(T)[:, None] - torch.arange(T)  # (T, T)
    scores = scores.masked_fill((ages < 0) | (ages >= window), -torch.inf)
    return scores.softmax(-1) @ v.repeat_interleave(group, 1)


def attend(answer):
    torch.manual_seed(0)
    B, H, K, T, D = 2, 4, 2, 40, 8
    text = [torch.randn(B, n, T, D, dtype=torch.float64) for n in (H, K, K)]
    other = [x.flip(2) for x in text]
    frequencies = 10.0 ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)

    def feed(cache, start, size, window, qkv=text):
        pieces = [x[:, :, start : start + size].clone() for x in qkv]
        try:
            got = answer(*pieces, cache, frequencies, window)
        except RuntimeError as error:
            raise Differs(
                f"{error}. Hint: the mask needs how many slots the cache has, the angles need "
                "another number"
            ) from None
        if not isinstance(got, torch.Tensor) or got.shape != pieces[0].shape:
            shape = tuple(got.shape) if isinstance(got, torch.Tensor) else type(got).__name__
            raise Differs(f"the result is {shape}, not {tuple(pieces[0].shape)} as q has it")
        return got

    def check(sizes, window, hint):
        wanted, cache, start = _truth(*text, frequencies, window), {}, 0
        for size in sizes:
            got = feed(cache, start, size, window)
            right = torch.isclose(got.double(), wanted[:, :, start : start + size], 1e-6, 1e-6)
            right = right.all(-1).all(1).all(0)  # (T,)
            if not right.all():
                token = start + int((~right).nonzero()[0, 0])
                pieces = (
                    f"in pieces of {', '.join(map(str, sizes[:5]))}{', ...' * (len(sizes) > 5)}"
                )
                raise Differs(
                    f"window {window}, fed {pieces}: the first wrong token is {token} (the first "
                    f"of all is 0). Hint: {hint}"
                )
            start += size
        return cache

    check([T], 8, "in one piece it was right before: what was changed?")
    check([1] * 8, 8, "the first `window` tokens, one by one, were right before")
    hint = "the distance to a key must be what it is in the text. What does `past` count, and what "
    hint += "are all the things that it is used for?"
    check([1] * T, 8, hint)
    hint += " And here pieces differ in length"
    for sizes in ([5, 1, 9, 1, 1, 3, 12, 2, 1, 5], [10, 10, 10, 10], [3, 30, 1, 1, 1, 1, 3]):
        check(sizes, 8, hint)
    check([1] * 30, 1, "with a window of 1 each token sees itself alone")
    cache = check([4] * 10, 3, hint)
    held = sum(x.numel() for x in cache.values() if isinstance(x, torch.Tensor))
    if held > 2 * B * K * D * 3 + 2 * T:
        raise Differs(
            f"after {T} tokens with a window of 3 the cache holds {held} numbers: keys and values "
            f"of 3 tokens are {2 * B * K * D * 3}. Hint: a window is there so that memory does not "
            "grow with the text"
        )
    one, two = {}, {}  # two texts in turn
    for start in range(20):
        for cache, qkv in ((one, text), (two, other)):
            got = feed(cache, start, 1, 8, qkv)
            whole = _truth(*(x[:, :, : start + 1] for x in qkv), frequencies, 8)
            hint = "two texts were fed in turn: all that is known about one belongs into its cache"
            same(got, whole[:, :, -1:], hint)


def _fed(text, start, ngram, draft_tokens, first):
    """How many tokens each pass feeds that gives text[start:]; `first`: the first has a draft."""
    fed, lacks = [], start
    while start < len(text):
        draft = []
        for i in range(start - ngram) if first or fed else ():
            if text[i : i + ngram] == text[start - ngram : start]:
                draft = text[i + ngram : min(start, i + ngram + draft_tokens)]
        kept = 0
        while kept < len(draft) and draft[kept : kept + 1] == text[start + kept : start + kept + 1]:
            kept += 1
        fed.append(lacks + len(draft))
        start, lacks = start + kept + 1, 1
    return fed


def _counted(answer, model, ids, new, ngram, draft_tokens):
    """What the answer gives, and how many tokens it fed in each pass."""
    fed = []

    def count(module, inputs):
        fed.append(inputs[0].shape[1])
        if len(fed) > 2 * new + 2:
            raise Differs(f"{len(fed)} passes and no end. Hint: each gives at least one id")

    def some(module, inputs):
        if inputs[0].numel() == 0:
            raise Differs(
                "a pass without an id. Hint: the newest id is not in the cache yet, and what was "
                "not kept has to leave it: how long may the cache be, at most, after a pass?"
            )

    model.token_embedding.register_forward_pre_hook(some)
    hook = model.blocks[0].register_forward_pre_hook(count)
    try:
        return answer(model, list(ids), new, ngram=ngram, draft_tokens=draft_tokens), fed
    except ValueError as error:
        raise Differs(
            f"ValueError: {error}. Hint: prompt and new ids fit. Does the cache forget what is not "
            "kept, and is a draft cut off that goes on beyond the last id that is wanted?"
        ) from None
    finally:
        hook.remove()


def lookup_generate(answer):
    for seed, V, n_prompt, new, ngram, draft_tokens in CASES:
        torch.manual_seed(seed)
        shape = dict(vocab_size=V, context_length=66, d_model=16, n_layers=2, n_heads=2)
        config = modern.TransformerConfig(**shape, n_kv_heads=1, tie_embeddings=False)
        model = modern.TransformerLM(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data.mul_(3)  # far from even, so that one choice is clear
        ids = torch.randint(V, (n_prompt,)).tolist()
        text = model.generate(torch.tensor([ids]), new, temperature=0)[0].tolist()
        wanted = [_fed(text, n_prompt, ngram, draft_tokens, first) for first in (True, False)]
        many = max(map(len, wanted))
        case = (
            f"({n_prompt} ids, {new} new, context 66, ngram {ngram}, draft_tokens {draft_tokens})"
        )
        got, fed = _counted(answer, model, ids, new, ngram, draft_tokens)
        if not isinstance(got, list) or len(got) != new:
            what = f"{len(got)} ids" if isinstance(got, list) else f"a {type(got).__name__}"
            raise Differs(f"got {what} {case}. Hint: a list of max_new_tokens ids, not the prompt")
        wrong = [n for n in range(new) if got[n] != text[n_prompt + n]]
        if wrong:
            n = wrong[0]
            raise Differs(
                f"new id {n} is {got[n]!r}, and model.generate draws {text[n_prompt + n]} {case}. "
                "Hint: a draft counts as far as the model would have chosen the same, and the "
                "cache must forget the rest: its length can be set"
            )
        if len(fed) > many:
            raise Differs(
                f"{len(fed)} passes, {many} are enough {case}. Hint: is the draft what follows the "
                "latest place where the last ids stand, up to the end of the text, and does a pass "
                "give the model's own choice after the ids that it agrees with, too?"
            )
        if not any(all(f <= w for f, w in zip(fed, most)) for most in wanted):
            raise Differs(
                f"{sum(fed)} tokens were fed in {len(fed)} passes {case}. Hint: the cache holds "
                "what was fed before; feed what it lacks, and a draft of at most draft_tokens ids"
            )


# seed, vocab_size, ids in the prompt, new ids, ngram, draft_tokens
CASES = [
    (7, 5, 6, 24, 2, 4),
    (7, 5, 6, 60, 2, 4),
    (5, 8, 6, 60, 2, 4),
    (2, 5, 1, 65, 2, 3),
    (3, 5, 20, 46, 1, 8),
    (7, 5, 12, 20, 3, 2),
    (6, 5, 3, 1, 1, 4),
]


def tokens_reached(answer):
    number, letter = measured(answer(), "number", "(model(ids) != model(other)).any(-1).sum()")
    if isinstance(number, torch.Tensor) and number.numel() == 1:
        number = number.item()
    hint = "two passes, over ids that differ in the first one only; count positions, not logits"
    same(number, 22.0, hint)
    same(letter, "b", "how does the count grow with n_layers, and is it as large from token 20 on?")
