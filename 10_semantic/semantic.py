"""Models of meaning: text as concepts, trees as hyperbolic space, bytes without a tokenizer.

A language model need not predict tokens. Here the blocks of 04 predict the concept of the next
line, a vector from which its words can be told; the same lines get vectors that depend on what was
said before; a hierarchy is embedded where there is room for it; and a byte model decides for itself
what belongs together.

Parent: 04_modern/modern.py
New: ConceptConfig, Autoencoder, ConceptLM, contrast_loss, Regression, Codebooks, CodeLM

Papers
- Large concept models, regression and quantised: Barrault et al. 2024, arXiv 2412.08821
- Vectors added after turning them by their places: holographic reduced representations, Plate 1995;
  turning as RoPE does, Su et al. 2021, arXiv 2104.09864
- Telling the next from others, InfoNCE: van den Oord et al. 2018, arXiv 1807.03748
- Residual quantisation: Juang and Gray 1982; for vectors of sound, 2107.03312

Shapes: N lines, T time (tokens of a line), d = d_model, L lines in a row, D = d_concept,
K = d_context, M codes of a line with S values each, V vocab.
"""

import math
from dataclasses import dataclass

import torch
from blocks import (
    Embedding,
    KVCache,
    Linear,
    RMSNorm,
    TransformerConfig,
    Trunk,
    apply_rope,
    sample_next,
)
from torch import nn
from torch.nn import functional as F

# ---- concepts: a line to a vector and back


@dataclass
class ConceptConfig:
    """The shape of a concept model; the defaults learn the plays in two minutes on one core."""

    vocab_size: int = 257  # number of token ids
    line_tokens: int = 40  # longest line, tokens with the one that ends it
    d_model: int = 128  # width of the encoder and the decoder of lines
    n_heads: int = 4  # heads of attention everywhere
    n_layers: int = 1  # blocks of the encoder, and of the decoder
    d_concept: int = 512  # width of a concept
    context_lines: int = 32  # lines in sight of the model of concepts
    d_context: int = 256  # its width
    context_layers: int = 1  # its blocks
    n_codes: int = 8  # codes of a quantised concept
    code_size: int = 256  # values of each code

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")
        if self.d_concept % 2:
            raise ValueError(f"d_concept {self.d_concept} is odd: positions rotate pairs")
        self.line = TransformerConfig(
            vocab_size=self.vocab_size,
            context_length=self.line_tokens,
            d_model=self.d_model,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
        )
        self.context = TransformerConfig(
            vocab_size=1,  # it reads concepts, not ids
            context_length=self.context_lines,
            d_model=self.d_context,
            n_layers=self.context_layers,
            n_heads=self.n_heads,
        )


class Autoencoder(nn.Module):
    """A line to one vector, its concept, and back.

    The vector of each token is turned by its place, as RoPE turns queries, and all are added.
    Turned back by j, the token at j stands out and the others are noise (Plate 1995). Pairs that
    turn fast keep the order; those that hardly turn add up to a bag of words, and so to a topic.

    Lines are int64 ids (N, T) that end with a token of their own, `end`; -1 fills up behind it."""

    def __init__(self, config):
        super().__init__()
        self.config, d, D = config, config.d_model, config.d_concept
        self.token_embedding = Embedding(config.vocab_size, d, config.line.std)
        self.encoder, self.decoder = Trunk(config.line), Trunk(config.line)
        self.bind = Linear(d, D, False, 0.25 / math.sqrt(d))
        self.unbind = Linear(D, d, False, 1 / math.sqrt(D))
        turns = 0.9 * math.pi * torch.logspace(0, -2.5, D // 2)  # radians a place, (D/2,)
        self.register_buffer("turns", turns, persistent=False)

    def turn(self, x, places):
        """x (..., T, D), each vector turned by its place, (T,)."""
        angles = places[:, None] * self.turns  # (T, D/2)
        cos, sin = angles.cos(), angles.sin()
        return apply_rope(x, torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))

    def encode(self, ids):
        """Lines (N, T) to concepts (N, D)."""
        live, T = ids >= 0, ids.shape[1]
        x = self.token_embedding(ids.clamp(min=0))  # (N, T, d)
        x = x + self.encoder(x, live[:, None, None, :].expand(-1, 1, T, T))
        bound = self.turn(self.bind(x), torch.arange(T, device=ids.device))  # (N, T, D)
        return (bound * live[..., None]).sum(1)

    def decode(self, concepts, before, cache=None):
        """Logits (N, T, V) of tokens, from concepts (N, D) and the token before each, int64 (N, T).
        With a cache they follow what it holds."""
        start, T = 0 if cache is None else cache.length, before.shape[1]
        places = torch.arange(start, start + T, device=before.device)
        x = self.turn(concepts[:, None].expand(-1, T, -1), -places)  # (N, T, D)
        # Halved: or the token before, which is given, drowns the one to be told at the beginning.
        x = self.unbind(x) + 0.5 * self.token_embedding(before)  # (N, T, d)
        x = x + self.decoder(x, cache=cache)
        return F.linear(x, self.token_embedding.weight)

    def log_probs(self, concepts, ids, end):
        """Of each line (N, T) told from its concept (N, D), in nats, (N,)."""
        before = F.pad(ids[:, :-1].clamp(min=0), (1, 0), value=end)
        logits = self.decode(concepts, before)
        losses = F.cross_entropy(logits.mT, ids, ignore_index=-1, reduction="none")  # (N, T)
        return -losses.sum(1)

    @torch.no_grad()
    def write(self, concepts, end, temperature=0.0, generator=None):
        """The lines told from concepts (N, D), int64 (N, T), and the mean log-prob of their tokens,
        (N,). A line that does not end by itself ends at line_tokens."""
        N, longest = len(concepts), self.config.line_tokens
        cache = KVCache(self.config.line, N, longest, device=concepts.device)
        ids = torch.full((N, 1), end, device=concepts.device)
        done, nats, lines = ids[:, 0] < 0, torch.zeros(N, device=concepts.device), []
        while not done.all() and len(lines) < longest:
            logits = self.decode(concepts, ids, cache)[:, -1]  # (N, V)
            chosen = sample_next(logits, temperature, generator=generator)  # (N,)
            if len(lines) == longest - 1:
                chosen = torch.full_like(chosen, end)
            said = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
            nats += said.masked_fill(done, 0.0)
            lines.append(chosen.masked_fill(done, -1))
            done, ids = done | (chosen == end), chosen[:, None]
        ids = torch.stack(lines, dim=1)
        return ids, nats / (ids >= 0).sum(1)


# ---- the next concept: told from others, regressed, or drawn as codes


class ConceptLM(nn.Module):
    """What is expected after each line: concepts (B, L, D) to vectors (B, L, 2 K), K = d_context.

    One half comes from a transformer over the last lines, the other is a fading sum of them through
    the very matrix that the next line is compared through: words come back within a few lines, and
    a narrow transformer would first have to learn to let all of them pass."""

    def __init__(self, config):
        super().__init__()
        self.config, D, K = config, config.d_concept, config.d_context
        self.norm = RMSNorm(D)
        self.enter = Linear(D, K, True, 1 / math.sqrt(D))
        self.trunk = Trunk(config.context)
        self.ask = Linear(K, K, True, 1 / math.sqrt(K))
        self.fading = nn.Parameter(-0.2 * torch.arange(config.context_lines).float())  # logs, (L,)
        self.answer = Linear(D, K, True, 1 / math.sqrt(D))
        self.echo = Linear(D, K, False, 1 / math.sqrt(D))

    def forward(self, concepts):
        L = concepts.shape[1]
        if L > self.config.context_lines:
            raise ValueError(f"{L} lines do not fit into {self.config.context_lines}")
        x = self.norm(concepts)
        place = torch.arange(L, device=x.device)
        ago = place[:, None] - place  # (L, L)
        weights = self.fading[ago.clamp(min=0)].exp().masked_fill(ago < 0, 0.0)
        return torch.cat([self.ask(self.trunk(self.enter(x))), weights @ self.echo(x)], dim=-1)

    def scores(self, expected, concepts):
        """How well concepts (N, D) meet what is expected, (B, 2 K): (B, N), or of (B, N, D) each
        row its own. With contrast_loss, the log of how much likelier each is here than anywhere."""
        x = self.norm(concepts)
        keys = torch.cat([self.answer(x), self.echo(x)], dim=-1)  # (..., N, 2 K)
        keys = keys / math.sqrt(self.config.d_context)
        return (keys @ expected[..., None])[..., 0] if keys.ndim == 3 else expected @ keys.T


def contrast_loss(lm, expected, concepts):
    """Mean nats of telling each next line from those of other places: InfoNCE.

    concepts (B, L, D) and what is expected after all but the last of each row, (B, L - 1, 2 K). The
    others are the lines of the other rows: those of the same row are on the same topic, and to tell
    them apart would teach to forget it."""
    B, n, _ = expected.shape  # n = L - 1
    scores = lm.scores(expected.flatten(0, 1), concepts[:, 1:].flatten(0, 1))  # (B n, B n)
    row = torch.arange(B, device=scores.device).repeat_interleave(n)
    beside = (row[:, None] == row).fill_diagonal_(False)  # other lines of the same row
    targets = torch.arange(B * n, device=scores.device)
    return F.cross_entropy(scores.masked_fill(beside, -math.inf), targets)


class Regression(nn.Module):
    """The next concept as a mean: concepts (B, L, D) to predictions (B, L, D). The base of Barrault
    et al.: where several lines could follow, it points between them, where no line is."""

    def __init__(self, config):
        super().__init__()
        self.lm = ConceptLM(config)
        self.out = Linear(2 * config.d_context, config.d_concept, True, 0.01)

    def forward(self, concepts):
        return self.out(self.lm(concepts))


class Codebooks(nn.Module):
    """Concepts as M codes each: what one code leaves over is coded by the next (Juang and Gray
    1982)."""

    def __init__(self, config):
        super().__init__()
        shape = config.n_codes, config.code_size, config.d_concept
        self.register_buffer("books", torch.zeros(shape))  # (M, S, D)

    @torch.no_grad()
    def fit(self, concepts, rounds=8, seed=0):
        """k-means of concepts (N, D), then of what is left over, M times. Raises ValueError for
        fewer concepts than a code has values."""
        if len(concepts) < self.books.shape[1]:
            n, size = len(concepts), self.books.shape[1]
            raise ValueError(f"{n} concepts are too few for codes of {size} values")
        generator, rest = torch.Generator().manual_seed(seed), concepts
        for book in self.books:
            book.copy_(rest[torch.randperm(len(rest), generator=generator)[: len(book)]])
            for _ in range(rounds):
                nearest = self.nearest(book, rest)
                counts = nearest.bincount(minlength=len(book))
                sums = torch.zeros_like(book).index_add_(0, nearest, rest)
                book.copy_(torch.where(counts[:, None] > 0, sums / counts[:, None], book))
            rest = rest - book[self.nearest(book, rest)]

    def nearest(self, book, x):
        """The row of book (S, D) next to each x (N, D): int64 (N,)."""
        return (book.square().sum(1) / 2 - x @ book.T).argmin(1)

    def encode(self, concepts):
        """Concepts (N, D) to codes, int64 (N, M)."""
        codes = []
        for book in self.books:
            codes.append(self.nearest(book, concepts))
            concepts = concepts - book[codes[-1]]
        return torch.stack(codes, dim=1)

    def decode(self, codes):
        """Codes (N, M) to concepts (N, D)."""
        return sum(book[codes[:, m]] for m, book in enumerate(self.books))


class CodeLM(nn.Module):
    """The next concept as codes, each given those before it: a distribution that can be drawn from,
    so that several lines may follow and the mean of them need not."""

    def __init__(self, config):
        super().__init__()
        self.config, K, S = config, config.d_context, config.code_size
        M = config.n_codes
        self.lm = ConceptLM(config)
        self.norm = RMSNorm(2 * K)
        self.nothing = nn.Parameter(torch.zeros(2 * K))  # what is expected without a context
        self.enter = Linear(2 * K, K, True, 1 / math.sqrt(2 * K))
        self.places = Embedding(M, K, 0.1)
        self.codes = Embedding(M * S, K, 0.5)
        self.hidden = Linear(K, 2 * K, True, 1 / math.sqrt(K))
        self.out = nn.Parameter(torch.randn(M, 2 * K, S) * 0.02)

    def expected(self, concepts):
        """What is expected after each line, for logits: (B, L, D) to (B, L, K)."""
        return self.enter(self.norm(self.lm(concepts)))

    def unexpecting(self):
        """The same without a context, (K,)."""
        return self.enter(self.nothing)

    def logits(self, expected, codes):
        """Of each code given those before it, (N, M', S) for expected (N, K) and the first codes,
        int64 (N, M' - 1)."""
        N, given = codes.shape
        offsets = torch.arange(given, device=codes.device) * self.config.code_size
        before = F.pad(self.codes(codes + offsets).cumsum(1), (0, 0, 1, 0))  # (N, M', K)
        x = expected[:, None] + self.places.weight[: given + 1] + before
        x = F.silu(self.hidden(x))  # (N, M', 2 K)
        return torch.einsum("nmk,mks->nms", x, self.out[: given + 1])

    def log_probs(self, expected, codes):
        """Of codes (N, M) given what is expected, (N, K): nats, (N,)."""
        logits = self.logits(expected, codes[:, :-1])
        return logits.log_softmax(-1).gather(2, codes[..., None])[..., 0].sum(1)

    @torch.no_grad()
    def draw(self, expected, temperature=1.0, generator=None):
        """Codes, int64 (N, M), drawn for each row of expected (N, K)."""
        codes = torch.zeros(len(expected), 0, dtype=torch.int64, device=expected.device)
        for _ in range(self.config.n_codes):
            logits = self.logits(expected, codes)[:, -1]  # (N, S)
            drawn = sample_next(logits, temperature, generator=generator)
            codes = torch.cat([codes, drawn[:, None]], dim=1)
        return codes
