"""Answers to 04_modern/exercises.py, and in WRONG what the checks must not let pass."""

import torch
from modern import KVCache, TransformerConfig, TransformerLM, apply_rope, attention_mask
from torch.nn import functional as F

# Keys and values, layers, rows, heads of keys, slots, head_dim, bytes. The ring holds the window
# and what the first of a chunk of 128 still sees when the last has entered.
cache_bytes = (
    2 * 28 * 8 * 8 * 4096 * 128 * 2,
    2 * 28 * 8 * 8 * (4 + 1024 + 128 - 1) * 128 * 2,
)


def rms_norm(x, weight, eps):
    wide = x.double() if x.dtype == torch.float64 else x.float()
    return (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype) * weight


def attend(q, k, v, cache, frequencies, window, count=lambda seen, T: seen + T, keep=None):
    T, past = q.shape[2], cache["k"].shape[2] if cache else 0
    seen = cache.get("seen", 0)
    angles = (seen + torch.arange(T))[:, None] * frequencies  # (T, D/2)
    cos, sin = angles.cos(), angles.sin()
    cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)  # (T, D)
    q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    if cache:
        k, v = torch.cat([cache["k"], k], dim=2), torch.cat([cache["v"], v], dim=2)  # (B, K, S, D)
    slots = torch.arange(past + T)[None]  # (1, S)
    mask = attention_mask(slots[:, past:], slots, window)  # (1, 1, T, S)
    last = keep or window
    cache.update(k=k[:, :, -last:], v=v[:, :, -last:], seen=count(seen, T))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # (B, H, S, D)
    return F.scaled_dot_product_attention(q, k, v, mask)


def find(text, ngram, draft_tokens):
    for i in range(len(text) - ngram - 1, -1, -1):
        if text[i : i + ngram] == text[-ngram:]:
            return text[i + ngram : i + ngram + draft_tokens]
    return []


@torch.no_grad()
def lookup_generate(model, ids, max_new_tokens, ngram=2, draft_tokens=4, find=find, wrong=None):
    text, end = list(ids), len(ids) + max_new_tokens
    cache = KVCache(model.config, dtype=model.token_embedding.weight.dtype)
    while len(text) < end:
        draft = find(text, ngram, draft_tokens)
        if wrong != "overflows":
            draft = draft[: end - len(text) - 1]
        if wrong == "fed again":
            cache.length = 0
        lacking = text[-1:] if wrong == "not forgotten" and cache.length else text[cache.length :]
        logits = model(torch.tensor([lacking + draft]), cache=cache)  # (1, T, V)
        chosen = logits[0, -len(draft) - 1 :].argmax(-1).tolist()
        kept = 0
        while kept < len(draft) and (draft[kept] == chosen[kept] or wrong == "believed"):
            kept += 1
        own = [] if kept and wrong == "nothing of its own" else chosen[kept : kept + 1]
        text += draft[:kept] + own
        if wrong != "not forgotten":
            cache.length = len(text) - {"last but one": 2, "all": 0}.get(wrong, 1)
        if wrong == "draft forgotten":
            cache.length = max(1, cache.length - kept)
    return text[len(ids) : end]


def tokens_reached():
    torch.manual_seed(0)
    shape = dict(vocab_size=64, context_length=64, d_model=32, n_layers=3, n_heads=2, window=8)
    model = TransformerLM(TransformerConfig(**shape))
    ids = torch.randint(64, (1, 64))  # (B, T)
    other = ids.clone()
    other[0, 0] = (ids[0, 0] + 1) % 64
    with torch.no_grad():
        changed = (model(ids) != model(other)).any(-1)  # (B, T)
    return changed.sum().item(), "b"


def wrong_rms_norm(wide=torch.float32, add=lambda mean, eps: (mean + eps).sqrt(), out=None):
    """rms_norm with something else: the dtype inside, where the eps goes, the dtype that leaves."""

    def norm(x, weight, eps):
        inside = x.to(wide or x.dtype)
        root = add(inside.square().mean(-1, keepdim=True), eps)
        return (inside / root).to(out or x.dtype) * weight

    return norm


def layer_norm(x, weight, eps):
    return rms_norm(x - x.mean(-1, keepdim=True), weight, eps)


def summed(x, weight, eps):
    wide = x.double() if x.dtype == torch.float64 else x.float()
    return (wide / (wide.square().sum(-1, keepdim=True) + eps).sqrt()).to(x.dtype) * weight


def from_0(q, k, v, cache, frequencies, window):
    """Each piece starts at position 0 again."""
    cache.pop("seen", None)
    return attend(q, k, v, cache, frequencies, window)


def true_positions_in_the_mask(q, k, v, cache, frequencies, window):
    """The half-fix: the new tokens are counted on, but the keys in the mask begin at 0."""
    seen, past = cache.get("seen", 0), cache["k"].shape[2] if cache else 0
    T = q.shape[2]
    angles = (seen + torch.arange(T))[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
    q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    if cache:
        k, v = torch.cat([cache["k"], k], dim=2), torch.cat([cache["v"], v], dim=2)
    mask = attention_mask(seen + torch.arange(T)[None], torch.arange(past + T)[None], window)
    cache.update(k=k[:, :, -window:], v=v[:, :, -window:], seen=seen + T)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    return F.scaled_dot_product_attention(q, k, v, mask)


def attend_wrong(**how):
    return lambda *args: attend(*args, **how)


def lookup_wrong(**how):
    return lambda *args, **settings: lookup_generate(*args, **settings, **how)


def undrafted(model, ids, max_new_tokens, ngram=2, draft_tokens=4):
    out = model.generate(torch.tensor([ids]), max_new_tokens, temperature=0)
    return out[0, len(ids) :].tolist()


def first_place(text, ngram, draft_tokens):
    places = [i for i in range(len(text) - ngram) if text[i : i + ngram] == text[-ngram:]]
    return text[places[0] + ngram :][:draft_tokens] if places else []


full, rolling = cache_bytes
WRONG = {
    "cache_bytes": [
        (2 * full, 2 * rolling),  # all heads, or float32
        (full // 2, rolling // 2),  # d_model / n_heads, or keys alone
        (full, full * 1028 // 4096),  # no room for a chunk
        (full, full * 1156 // 4096),
        (full / 2**30, rolling / 2**30),
        full,
    ],
    "rms_norm": [
        wrong_rms_norm(wide=None),
        wrong_rms_norm(),  # float64 loses digits
        wrong_rms_norm(wide=torch.float64, add=lambda mean, eps: mean.sqrt() + eps),
        wrong_rms_norm(wide=torch.float64, add=lambda mean, eps: mean.sqrt()),
        wrong_rms_norm(wide=torch.float64, out=torch.float32),
        layer_norm,
        summed,
        lambda x, weight, eps: rms_norm(x, torch.ones_like(weight), eps),
    ],
    "attend": [
        from_0,
        true_positions_in_the_mask,
        attend_wrong(count=lambda seen, T: seen + 1),  # calls, not tokens
        attend_wrong(keep=10_000),  # right, but it keeps everything
        lambda q, k, v, cache, frequencies, window: attend(
            q, k, v, cache, frequencies, window + 1, keep=window
        ),
        lambda q, k, v, cache, frequencies, window: attend(
            q, k, v, cache, frequencies, max(1, window - 1), keep=window
        ),
    ],
    "lookup_generate": [
        undrafted,
        lookup_wrong(find=first_place),
        lookup_wrong(find=lambda text, ngram, draft_tokens: find(text, ngram, 1 + draft_tokens)),
        lookup_wrong(find=lambda text, ngram, draft_tokens: find(text, ngram, 2 * draft_tokens)),
        lambda model, ids, *args, **settings: ids + lookup_generate(model, ids, *args, **settings),
        *(
            lookup_wrong(wrong=wrong)
            for wrong in (
                "believed", "not forgotten", "nothing of its own", "fed again", "overflows",
                "last but one", "all", "draft forgotten",
            )
        ),
    ],
    "tokens_reached": [lambda: (22, "a"), lambda: (22, "c"), lambda: (8, "b"), lambda: (24, "b")],
}  # fmt: skip
