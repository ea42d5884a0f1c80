"""The cache, how the next token is drawn, and the loss: what moe.py takes from 04 with less in it.

Parent: 04_modern/modern.py
Changed: KVCache, check_length
"""

import codecs

import torch
from torch.nn import functional as F


def cross_entropy(logits, targets):
    """Mean of -log softmax(logits)[target] in nats: logits (..., V), targets int64 (...).

    log-sum-exp subtracts the largest logit first, so that nothing overflows."""
    logits = logits.to(
        torch.promote_types(logits.dtype, torch.float32)
    )  # bfloat16 would lose digits
    chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)  # (...)
    return (logits.logsumexp(-1) - chosen).mean()


class KVCache:
    """Keys and values of every layer for up to `capacity` tokens, allocated once.

    `length` is the number of tokens held; setting it lower forgets the last ones. pads, int64 (B,):
    how many of a row's first tokens are padding."""

    def __init__(
        self, config, batch_size=1, capacity=None, pads=None, device="cpu", dtype=torch.float32
    ):
        self.capacity, self.pads, self.length = capacity or config.context_length, pads, 0
        shape = (batch_size, config.n_kv_heads, self.capacity, config.head_dim)
        # Zeros, as what is left over in memory could be NaN, and 0 times NaN is not 0.
        layers = range(config.n_layers)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]

    def begin(self, T, device):
        """Make room for T tokens: their positions (B or 1, T), and the mask (B or 1, 1, T, S) of
        what they see, None where causal attention does. ValueError where they do not fit."""
        if self.length + T > self.capacity:
            raise ValueError(
                f"{self.length} + {T} tokens do not fit into the cache, {self.capacity}"
            )
        self.start, self.length = self.length, self.length + T
        keys = torch.arange(self.length, device=device)[None]  # (1, S)
        keys = keys if self.pads is None else keys - self.pads[:, None]  # (B, S): pads below 0
        positions = keys[:, self.start :]
        if self.pads is None and T in (1, self.length):
            return positions, None
        q, k = positions[:, None, :, None], keys[:, None, None, :]
        return positions, ((k >= 0) & (k <= q)) | (k == q)  # a pad sees itself: no row is empty

    def update(self, layer, k, v):
        """Store k and v (B, K, T, D) of the new tokens; returns those of all, (B, K, S, D)."""
        self.k[layer][:, :, self.start : self.length] = k
        self.v[layer][:, :, self.start : self.length] = v
        return self.k[layer][:, :, : self.length], self.v[layer][:, :, : self.length]


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
            f"{config.context_length}: give fewer"
        )
    return n_prompt + n_new


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
