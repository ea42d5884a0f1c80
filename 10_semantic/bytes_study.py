"""Models of the same text at the same training FLOPs: BPE, bytes, fixed and entropy patches.

A fifth is the patch model without patches, so that what n-grams do is told from what patches do.
Each is trained on the plays that are not held out until its budget is spent, forward and backward
and whatever it needs besides, then measured in bits per byte on the held-out ones: as printed, with
typos, and in the wrong case. Nothing but the text that is read changes between the conditions.

Parent: none
New: everything
"""

import math
import time
from dataclasses import dataclass

import patches
import torch
from blocks import TransformerConfig, TransformerLM
from fitting import fit
from torch.nn import functional as F
from typos import recase, typos

import common

# The best found of each at 8e11 FLOPs. Patches owe their lead to the tables of n-grams, look-ups
# that cost no FLOPs here: without them they do no better than plain bytes.
SHAPES = {
    "bpe": dict(d_model=32, n_layers=3, n_heads=2, tie_embeddings=False),
    "bytes": dict(d_model=24, n_layers=4, n_heads=2, tie_embeddings=False),
    "patches": dict(d_local=32, d_model=64, n_layers=2),
    "guesser": dict(d_model=32, n_layers=1, n_heads=2, window=32, tie_embeddings=True),
}
FITS = {  # windows in a batch, learning rate
    "bpe": (8, 1e-2),
    "bytes": (4, 2e-2),
    "ngrams": (4, 1e-2),
    "fixed": (4, 1e-2),
    "entropy": (4, 1e-2),
    "guesser": (4, 1e-2),
}
PASSAGES = "Is this a dagger which", "To-morrow, and to-morrow", "If music be the food of love"


@dataclass
class BytesOptions:
    flops: float = 6e11  # of training, for each of the models
    context_length: int = 256  # bytes that a model sees; BPE gets as many tokens as make these up
    patch_size: float = 6.0  # bytes in an entropy patch, on average
    fixed_size: int = 6  # bytes in a fixed patch
    entropy_share: float = 0.04  # of the FLOPs, for training the model that finds the patches
    sample: int = 20_000  # bytes from the start of each held-out text that get typos
    seed: int = 0  # of weights, of the windows drawn and of the typos

    def __post_init__(self):
        least = dict(flops=1, context_length=16, patch_size=1.01, fixed_size=1, sample=1)
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {bound}")
        if not 0 < self.entropy_share < 1:
            raise ValueError(f"entropy_share {self.entropy_share} is not between 0 and 1")


class Contender:
    """A model and how it reads text: as ids, some number of bytes each, in patches or not.

    encode(text): int64 (N,); lengths: bytes of each id, int64 (V,); find_ends(ids): which bytes end
    a patch, at a cost of `finding` FLOPs a window; None: no patches."""

    def __init__(self, model, encode, lengths, find_ends=None, finding=0):
        self.model, self.encode, self.lengths = model, encode, lengths
        self.find_ends, self.finding = find_ends, finding

    def train(self, text, budget, name, seed, batch_size, lr, home=None):
        """Spend `budget` FLOPs on random windows of the text; returns what fit does, and the bytes
        seen."""
        ids, T = self.encode(text), self.model.config.context_length
        if len(ids) <= T:
            raise ValueError(f"the text to train on has {len(ids)} ids, not more than {T}")

        def step(generator):
            starts = torch.randint(len(ids) - T, (batch_size, 1), generator=generator)
            rows = ids[starts + torch.arange(T + 1)]  # (B, T + 1)
            x, y = rows[:, :-1], rows[:, 1:]
            if self.find_ends is None:
                return self.model(x, y), batch_size * 3 * patches.lm_flops(self.model.config, T)
            ends = self.find_ends(x)
            P = max(1, int(ends.sum(1).max()))  # rows with fewer are padded, which costs as well
            flops = 3 * patches.patch_flops(self.model.config, T, P) + self.finding
            return self.model(x, ends, y), batch_size * flops

        cost = fit(name, self.model, step, budget, lr, home, seed)
        seen = cost["steps"] * batch_size * T * len(text.encode()) / len(ids)
        return cost | dict(seen=round(seen))

    @torch.no_grad()
    def score(self, text, batch_size=16):
        """Bits per byte of a text in non-overlapping windows; its first id is not predicted."""
        ids, T, nats = self.encode(text), self.model.config.context_length, 0.0
        if len(ids) < 2:
            raise ValueError("a text to score has at least two bytes")
        whole = (len(ids) - 1) // T * T
        chunks = [*ids.unfold(0, T + 1, T).split(batch_size)] if whole else []
        if whole < len(ids) - 1:
            chunks.append(ids[None, whole:])  # the tail
        for rows in chunks:
            x, y = rows[:, :-1], rows[:, 1:]
            args = (x, y) if self.find_ends is None else (x, self.find_ends(x), y)
            nats += self.model(*args).item() * y.numel()
        return nats / math.log(2) / self.lengths[ids[1:]].sum().item()


def train_all(text, tokenizer, o, home=None):
    """Train the five; returns {name: (Contender, cost)}, and the model and the threshold, in nats,
    that find entropy patches: the cost of both is part of what entropy patches cost."""
    T, one, found = o.context_length, torch.ones(256, dtype=torch.int64), {}

    def encode(text):
        return torch.tensor(tokenizer.encode(text, special=False), dtype=torch.int64)

    def every_few(ids):
        return patches.fixed_patches(ids.shape[1], o.fixed_size).expand(ids.shape)

    def never(ids):
        return torch.zeros_like(ids, dtype=torch.bool)

    def where_hard(ids):
        return patches.entropy_patches(patches.next_byte_entropy(guesser, ids), threshold)

    def make(kind, vocab_size=256, length=T):
        torch.manual_seed(o.seed)
        shape = dict(vocab_size=vocab_size, context_length=length) | SHAPES[kind]
        if kind == "patches":
            return patches.PatchLM(patches.PatchConfig(**shape))
        return TransformerLM(TransformerConfig(**shape))

    def add(name, contender, spent=0, seconds=0.0):
        how = o.flops - spent, name, o.seed, *FITS[name], home
        found[name] = contender, contender.train(text, *how)
        found[name][1]["flops"] += spent
        found[name][1]["seconds"] += seconds

    lengths = torch.zeros(tokenizer.vocab_size, dtype=torch.int64)
    for i, token in tokenizer.tokens.items():
        lengths[i] = len(token)
    tokens = round(T * len(encode(text[:200_000])) / len(text[:200_000].encode()))  # in T bytes
    add("bpe", Contender(make("bpe", tokenizer.vocab_size, tokens), encode, lengths))
    add("bytes", Contender(make("bytes"), patches.text_to_ids, one))
    add("ngrams", Contender(make("patches"), patches.text_to_ids, one, never))
    add("fixed", Contender(make("patches"), patches.text_to_ids, one, every_few))

    guesser = make("guesser")
    finding = patches.lm_flops(guesser.config, T)
    how = o.flops * o.entropy_share, "guesser", o.seed, *FITS["guesser"], home
    cost = Contender(guesser, patches.text_to_ids, one).train(text, *how)
    windows = patches.text_to_ids(text[:100_000]).unfold(0, T, T)  # (N, T)
    threshold = patches.threshold_for(patches.next_byte_entropy(guesser, windows), o.patch_size)
    spent = cost["flops"] + len(windows) * finding
    entropy = Contender(make("patches"), patches.text_to_ids, one, where_hard, finding)
    add("entropy", entropy, spent, cost["seconds"])
    return found, guesser, threshold


def passages(text, guesser, threshold, longest=100):
    """Held-out lines for the picture: [(bytes, entropy of the guess of each byte in bits, ends)],
    each line with as much text before it as the model sees."""
    found, data, T = [], text.encode(), guesser.config.context_length
    places = [place for p in PASSAGES if (place := data.find(p.encode())) >= 0] or [0]
    for begin in places:
        for line in data[begin : begin + 4 * longest].splitlines(keepends=True)[:2]:
            line = line[: min(longest, T)]
            first = max(0, begin + len(line) - T)
            ids = torch.tensor([list(data[first : begin + len(line)])])
            entropy = patches.next_byte_entropy(guesser, ids)[0]
            ends = patches.entropy_patches(entropy, threshold)[begin - first :].tolist()
            # The value at t is about byte t + 1, so that of a byte is found one earlier.
            of = F.pad(entropy, (1, -1), value=math.nan)[begin - first :] / math.log(2)
            found.append((line, of.tolist(), ends))
            begin += len(line)
    return found


def compare(train_text, held_text, tokenizer, options=None, home=None):
    """Train and measure the five; returns dict(results, threshold, mean_patch, lines):

    results {model: {condition: bits per byte}, with its parameters, looked_up (those of them in
    tables), flops, steps, seen (bytes), seconds and score_seconds}, mean_patch in bytes of held-out
    text, threshold in bits and lines as draw_patches takes them.
    Both texts are str, documents parted by common.EOT; tokenizer is a common.Tokenizer. Raises
    ValueError for a text too short for one window or a budget too small for one step."""
    o = options or BytesOptions()
    documents = [d for d in held_text.split(common.EOT) if d.strip()]
    held, sample = "".join(documents), "".join(d[: o.sample] for d in documents)
    train_text, T = train_text.replace(common.EOT, ""), o.context_length
    if min(len(train_text.encode()), len(sample.encode())) <= T:
        raise ValueError(f"the text is too short: more than {T} bytes to train on and to hold out")
    conditions = {"clean": held, "sample": sample}
    conditions |= {f"typos {rate}%": typos(sample, rate / 100, o.seed) for rate in (10, 30)}
    conditions |= {how: recase(sample, how, o.seed) for how in ("lower", "upper", "random")}
    found, guesser, threshold = train_all(train_text, tokenizer, o, home)
    results = {}
    for name, (contender, cost) in found.items():
        begin, model = time.perf_counter(), contender.model
        row = {key: round(contender.score(text), 4) for key, text in conditions.items()}
        models = [model, guesser] if name == "entropy" else [model]
        sizes = {(m, n): p.numel() for m in models for n, p in m.named_parameters()}
        row["parameters"] = sum(sizes.values())
        row["looked_up"] = sum(size for (_, n), size in sizes.items() if "embedding" in n)
        results[name] = row | cost | dict(score_seconds=round(time.perf_counter() - begin, 1))
    ends = found["entropy"][0].find_ends(patches.text_to_ids(sample).unfold(0, T, T))
    mean_patch = round(ends.numel() / max(1, ends.sum().item()), 2)
    lines, threshold = passages(held, guesser, threshold), threshold / math.log(2)
    return dict(results=results, threshold=threshold, mean_patch=mean_patch, lines=lines)
