"""Five exercises on modern.py. Fill in what is open, then: make exercise-04

Each stands for something that goes wrong, or that people get wrong, when they write a model of
today or decode with one. Read modern.py first; nothing here needs more than is in it. The checks
say what differs and give a hint.
"""

import torch
from modern import TransformerConfig, TransformerLM, apply_rope, attention_mask
from torch.nn import functional as F

# ---- 1. Predict

cache_bytes = None
"""How many bytes do the keys and values of these two caches take? A tuple of two ints, worked out
on paper, for a model of the shape of Qwen3-0.6B:

    config = TransformerConfig(vocab_size=151_936, context_length=40_960, d_model=1024, n_layers=28,
                               n_heads=16, n_kv_heads=8, head_dim=128, d_ff=3072)
    KVCache(config, batch_size=8, capacity=4096, dtype=torch.bfloat16)
    RollingKVCache(config, batch_size=8, window=1024, sinks=4, dtype=torch.bfloat16)

The weights of this model in bfloat16 take 1.2 GB, however many use it. These numbers grow with the
texts that are open, and decide how many people can be served at once. Only the tensors in `k` and
`v` count; `chunk` is what it is by default."""


# ---- 2. Fill in


def rms_norm(x, weight, eps):
    """What RMSNorm.forward does: each vector over the root of its mean square plus eps (the eps is
    under the root), times weight. x (..., C) and weight (C,) of one dtype to the same shape and
    dtype; x is not changed.

    The mean square is computed in float32 where x is narrower (float16 ends at 65,504: from 256 on
    a square is infinite there, and bfloat16 has 3 digits), in float64 where x is float64. Without
    nn.RMSNorm, F.rms_norm and modern.RMSNorm, and with modern.py closed. It runs twice in each
    block: a digit lost here is lost 60 times in a model of 30 layers."""
    ...


# ---- 3. Find the planted bug


def attend(q, k, v, cache, frequencies, window):
    """Causal attention of T new tokens that keeps the keys and values of the last `window` tokens.

    q (B, H, T, D), k and v (B, K, T, D), none of them rotated yet; to (B, H, T, D). A token sees
    `window` tokens, itself the last. cache is {} for a new text and is given again with each next
    piece of it; frequencies (D/2,) are those of rope_frequencies. T may be more than `window`.

    It runs, and a text fed in one piece comes out right. Fed token by token the first tokens are
    right, too, and a short test would pass. But a long text falls apart, and never recovers."""
    T, past = q.shape[2], cache["k"].shape[2] if cache else 0
    angles = (past + torch.arange(T))[:, None] * frequencies  # (T, D/2)
    cos, sin = angles.cos(), angles.sin()
    cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)  # (T, D)
    q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    if cache:
        k, v = torch.cat([cache["k"], k], dim=2), torch.cat([cache["v"], v], dim=2)  # (B, K, S, D)
    slots = torch.arange(past + T)[None]  # (1, S)
    mask = attention_mask(slots[:, past:], slots, window)  # (1, 1, T, S)
    cache.update(k=k[:, :, -window:], v=v[:, :, -window:])
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # (B, H, S, D)
    return F.scaled_dot_product_attention(q, k, v, mask)


# ---- 4. Extend


def lookup_generate(model, ids, max_new_tokens, ngram=2, draft_tokens=4):
    """Speculative decoding without a draft model: the text itself is the draft (Yang et al. 2023,
    arXiv 2304.04487; also known as prompt lookup). ids, a list of at least one id, to the list of
    max_new_tokens (at least 1) ids that follow: those that model.generate(..., temperature=0) has.

    Before a pass, the first one too, take the last `ngram` ids of the text so far, prompt and new
    ids, and find the latest place where they stand earlier (it may overlap them). The draft is what
    follows there, up to draft_tokens ids, fewer where the text ends; there is none without such a
    place. One pass over what a modern.KVCache lacks and the draft gives the model's own choice
    after each of them: the new ids are the draft's as far as they are the model's choices, and then
    the model's own, in place of the first that differs or after the last. So each pass gives at
    least one id.

    Feed each token once: what the cache holds and is kept is not fed again, what was not kept is
    forgotten. The first pass feeds the whole prompt (and a draft, if there is one). The cache needs
    room for a draft that is not kept. The text may fill the context to its last token, or end in
    the middle of a draft. Where text repeats (code, quotes, summaries) this takes a fraction of the
    passes, and not one id is different."""
    ...


# ---- 5. Measure and explain


def tokens_reached():
    """With a window of 8, how far does what a token says reach?

    Below is a model of 3 layers in which each token sees 8, itself the last. Change the first token
    of `ids` to any other id and count the positions at which any logit changes (the first one
    included; what does not change stays the same to the last digit). Return (number, letter): the
    count, and why it is not 8.

    a. The keys are counted from the start of the text: as long as fewer than 3 windows have been
       read, the first tokens stay in sight, as sinks do
    b. Each layer looks back 7 tokens, at vectors into which the layer below has already gathered 7
       tokens more
    c. The mask is right, but rotary positions repeat: the fastest pair turns once in 2 pi tokens,
       so that tokens beyond the window come back into sight

    Before you choose, try n_layers=1 and 2, and change token 20 in place of the first."""
    torch.manual_seed(0)
    shape = dict(vocab_size=64, context_length=64, d_model=32, n_layers=3, n_heads=2, window=8)
    model = TransformerLM(TransformerConfig(**shape))
    ids = torch.randint(64, (1, 64))  # (B, T)
    number, letter = None, None  # yours: use model and ids
    return number, letter
