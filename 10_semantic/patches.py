"""Bytes without a tokenizer: a large model that steps once a patch, between two light byte models.

A tokenizer decides once, by frequency, which bytes belong together. Here a patch ends where the
next byte is hard to guess, as a small byte model measures it, so the large model steps where there
is something to decide and the light ones spell out the rest.

Parent: blocks.py
New: next_byte_entropy, entropy_patches, fixed_patches, threshold_for, hash_ngrams, PatchConfig,
    PatchLM, take, generate_bytes, text_to_ids, ids_to_text, trunk_flops, lm_flops, patch_flops

Papers
- Byte latent transformer, entropy patches, hashed n-grams: Pagnoni et al. 2024, arXiv 2412.09871
- A patch is the vector of one byte, gathered: SpaceByte, Slagle 2024, arXiv 2404.14408
- Fixed patches: MegaByte, Yu et al. 2023, arXiv 2305.07185

Shapes: B batch, T time (bytes), P patches, c = d_local, C = d_model, V vocab.
"""

from dataclasses import dataclass

import torch
from blocks import (
    Embedding,
    Linear,
    TransformerConfig,
    Trunk,
    cross_entropy,
    sample_next,
)
from torch import nn
from torch.nn import functional as F

MODULUS = 2**31 - 1  # of the rolling hash: a prime, its products fit into int64


def text_to_ids(text):
    """The UTF-8 bytes of a str, int64 (T,)."""
    return torch.tensor(list(text.encode()), dtype=torch.int64)


def ids_to_text(ids):
    """The str of a list or tensor of bytes; those that are not UTF-8 become U+FFFD."""
    return bytes(int(i) for i in ids).decode(errors="replace")


# ---- where patches end


@torch.no_grad()
def next_byte_entropy(model, ids):
    """How uncertain a byte model is of what follows each byte, in nats: int64 (B, T) to (B, T).

    The value at t depends on bytes 0 to t, and is about byte t + 1."""
    log_probs = model(ids).log_softmax(-1)  # (B, T, V)
    return -(log_probs.exp() * log_probs).sum(-1)


def entropy_patches(entropy, threshold, rule="global"):
    """True at each byte that ends a patch: entropy (..., T) in nats to bool (..., T).

    rule "global": where the entropy of the byte that follows is above the threshold; "rise": where
    it is that much above the one before (Pagnoni et al. 2024, section 2.3). What ends with byte t
    depends on bytes 0 to t, so a boundary is known before the first byte behind it."""
    if rule == "rise":
        entropy = entropy.diff(dim=-1, prepend=entropy[..., :1])
    elif rule != "global":
        raise ValueError(f"rule {rule!r} is neither global nor rise")
    return entropy > threshold


def fixed_patches(T, size):
    """True at the last byte of every `size`, bool (T,). Raises ValueError for a size below 1."""
    if size < 1:
        raise ValueError(f"patches of {size} bytes: the size must be at least 1")
    return torch.arange(1, T + 1) % size == 0


def threshold_for(entropy, size, rule="global"):
    """The threshold with which patches of text like that measured have `size` bytes on average."""
    if size <= 1:
        raise ValueError(f"patches of {size} bytes on average: the size must be above 1")
    if rule == "rise":
        entropy = entropy.diff(dim=-1, prepend=entropy[..., :1])
    ordered = entropy.flatten().sort().values
    return ordered[len(ordered) - max(1, round(len(ordered) / size)) - 1].item()


# ---- the model


def hash_ngrams(ids, sizes, rows):
    """A row of a table for the n bytes that end at each byte, for each n of `sizes`.

    int64 (B, T) to (B, T, len(sizes)) in [0, len(sizes) * rows): each n has `rows` of its own, and
    two n-grams may share one. Before the first byte stands padding, which no byte looks like."""
    hashed = []
    for i, n in enumerate(sizes):
        padded = F.pad(ids + 1, (n - 1, 0))  # (B, T + n - 1), padding 0
        value = torch.zeros_like(ids)
        for k in range(n):
            value = (value * 1_000_003 + padded[:, k : k + ids.shape[1]]) % MODULUS
        hashed.append(value % rows + i * rows)
    return torch.stack(hashed, dim=-1)


@dataclass
class PatchConfig:
    """The shape of a patch model: light over bytes, large over patches."""

    vocab_size: int = 256  # number of byte values
    context_length: int = 256  # longest input, bytes
    d_local: int = 48  # width of the two models over bytes
    encoder_layers: int = 1  # blocks over bytes before the patches
    decoder_layers: int = 1  # blocks over bytes behind them
    local_heads: int = 2  # heads of the models over bytes
    window: int = 16  # a byte sees this many, itself the last
    d_model: int = 96  # width of the model over patches
    n_layers: int = 2  # blocks over patches
    n_heads: int = 2  # heads over patches
    ngrams: tuple = (2, 3, 4, 5, 6)  # lengths of hashed n-grams, bytes; (): none
    ngram_rows: int = 8192  # rows of the table for each length

    def __post_init__(self):
        if self.ngram_rows < 1:
            raise ValueError(f"ngram_rows is {self.ngram_rows}: it must be at least 1")
        if any(n < 2 for n in self.ngrams):
            raise ValueError(f"ngrams {self.ngrams}: each must be at least 2 bytes long")
        bytes_model = dict(d_model=self.d_local, n_heads=self.local_heads, window=self.window)
        shared = dict(vocab_size=self.vocab_size, context_length=self.context_length)
        try:  # these check what is theirs
            self.encoder = TransformerConfig(n_layers=self.encoder_layers, **bytes_model, **shared)
            self.decoder = TransformerConfig(n_layers=self.decoder_layers, **bytes_model, **shared)
        except ValueError as error:
            raise ValueError(f"encoder or decoder: {error}") from None
        self.large = TransformerConfig(
            d_model=self.d_model, n_layers=self.n_layers, n_heads=self.n_heads, **shared
        )


class PatchLM(nn.Module):
    """`model(ids, ends)`: logits (B, T, V). `model(ids, ends, targets)`: the mean loss in nats.

    ids and targets: int64 (B, T), bytes, with T up to context_length. ends: bool (B, T), the bytes
    that end a patch; what it says of byte t may depend on bytes 0 to t and on none behind them.

    A patch is the vector that the encoder has for its last byte, gathered as in SpaceByte: through
    its window that byte has seen the patch. Every byte from there to the end of the next patch
    gets the patch's vector added, so the first of them, the one that was hard to guess, is guessed
    with the large model's answer."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        c, C, std = config.d_local, config.d_model, config.encoder.std
        # One table: a row for each byte, then those of the n-grams.
        rows = config.vocab_size + len(config.ngrams) * config.ngram_rows
        self.embedding = Embedding(rows, c, std)
        self.encoder = Trunk(config.encoder)
        self.widen = Linear(c, C, False, std)
        self.trunk = Trunk(config.large)
        self.narrow = Linear(C, c, False, config.large.std)
        self.decoder = Trunk(config.decoder)
        self.output = Linear(c, config.vocab_size, False, std)

    def forward(self, ids, ends, targets=None):
        B, T = ids.shape
        if T > self.config.context_length:
            raise ValueError(f"{T} bytes do not fit into {self.config.context_length}")
        if ends.shape != ids.shape or ends.dtype != torch.bool:
            raise ValueError(f"ends {ends.dtype} {tuple(ends.shape)}: bool {B, T} is wanted")
        rows = ids[..., None]  # (B, T, 1)
        if self.config.ngrams:
            hashed = hash_ngrams(ids, self.config.ngrams, self.config.ngram_rows)
            rows = torch.cat([rows, hashed + self.config.vocab_size], dim=-1)  # (B, T, 1 + n-grams)
        # The sum of the rows, without a tensor of them all; its gradient is faster than indexing's.
        x = F.embedding_bag(rows.flatten(0, 1), self.embedding.weight, mode="sum")  # (B T, c)
        x = x.view(B, T, -1)
        x = x + self.encoder(x)  # (B, T, c)

        ended = ends.cumsum(1)  # (B, T), patches that have ended by then
        P = max(1, int(ended[:, -1].max()))
        last = ids.new_zeros(B, P)  # each patch's last byte; rows with fewer are padded at the end
        row, t = ends.nonzero(as_tuple=True)
        last[row, ended[row, t] - 1] = t
        patches = take(x, last)  # (B, P, c)
        patches = self.narrow(self.trunk(self.widen(patches)))  # (B, P, c), by way of (B, P, C)

        patches = F.pad(patches, (0, 0, 1, 0))  # (B, 1 + P, c), zeros until the first has ended
        logits = self.output(self.decoder(x + take(patches, ended)))  # (B, T, V)
        return logits if targets is None else cross_entropy(logits, targets)


def take(x, places):
    """Vectors of x (B, T, C) at places, int64 (B, N): (B, N, C)."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


@torch.no_grad()
def generate_bytes(model, find_ends, ids, count, temperature=0.0, generator=None):
    """Continue ids, int64 (B, T) with T at least 1, by `count` bytes; returns int64 (B, T + count).

    find_ends(ids) gives the bool (B, T) of bytes that end a patch. The model sees the last
    context_length bytes, and finds their patches anew for each byte: plain, and the same as in
    training, where a window also begins without a past."""
    if ids.shape[1] < 1:
        raise ValueError("there is nothing to continue: give at least one byte")
    for _ in range(count):
        seen = ids[:, -model.config.context_length :]
        logits = model(seen, find_ends(seen))[:, -1]  # (B, V)
        ids = torch.cat([ids, sample_next(logits, temperature, generator=generator)[:, None]], 1)
    return ids


# ---- what it costs


def trunk_flops(config, T):
    """FLOPs of a Trunk's forward pass over T vectors: 2 for each product and sum in its matrices,
    and in attention for the keys in sight, window and all. Norms, activations and look-ups are
    left out; a backward pass costs twice as much again."""
    C, width = config.d_model, config.n_heads * config.head_dim
    rows = width + 2 * config.n_kv_heads * config.head_dim
    total = 2 * T * config.n_layers * (C * rows + width * C + 3 * C * config.d_ff)
    for window in config.windows:
        W = min(window or T, T)
        pairs = W * (W + 1) // 2 + (T - W) * W  # of a query and a key
        total += 2 * 2 * pairs * width  # the score, and the weighted sum of values
    return total


def lm_flops(config, T):
    """FLOPs of a TransformerLM's forward pass over T tokens."""
    return trunk_flops(config, T) + 2 * T * config.d_model * config.vocab_size


def patch_flops(config, T, P):
    """FLOPs of a PatchLM's forward pass over T bytes in P patches. Hashing and summing n-grams are
    look-ups and count as none: they hold most of the parameters and next to none of the work."""
    total = trunk_flops(config.encoder, T) + trunk_flops(config.decoder, T)
    total += trunk_flops(config.large, P) + 2 * 2 * P * config.d_local * config.d_model
    return total + 2 * T * config.d_local * config.vocab_size
