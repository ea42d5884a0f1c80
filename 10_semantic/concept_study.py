"""Studies 1 and 2: a model of the next concept beside one of the next token; meaning in context.

Parent: none
New: everything

Read in this order: ConceptOptions, Concepts: its fits, then what stands before a line. What is
measured is in concept_scores.py.
"""

import time
from dataclasses import dataclass

import fitting
import lines
import torch
from blocks import KVCache, TransformerConfig, TransformerLM
from patches import lm_flops, trunk_flops
from semantic import (
    Autoencoder,
    Codebooks,
    CodeLM,
    ConceptConfig,
    ConceptLM,
    Regression,
    contrast_loss,
)
from torch import nn
from torch.nn import functional as F

TOKEN_MODEL = dict(context_length=256, d_model=128, n_layers=3, n_heads=4, n_kv_heads=2)
RATES = dict(contrast=3e-3, regression=3e-3, codes=3e-3, decoder=2e-3, tokens=5e-3)
ROWS, TOKEN_ROWS = 8, 2  # windows in a batch, of lines and of tokens
RETOLD = 0.15  # share of a batch's lines that the decoder tells
NOISE = 0.1  # added to their concepts, in standard deviations: drawn concepts are not exact
ROUNDS = 4  # of k-means
ALONE = 0.15  # share of windows from which the codes are learned without a context


@dataclass
class ConceptOptions:
    data: str = "plays"  # plays, a file, a directory, a glob or a URL
    tokenizer: str | None = None  # directory with tokenizer.json; None: newest of 01, else bytes
    flops: float = 4.5e12  # of training the concepts; the token model gets as many as all together
    queries: int = 1000  # held-out places at which the next line is picked
    thoughts: int = 8  # next concepts to draw for a thought unit
    seed: int = 0  # of weights, of batches and of what is drawn

    def __post_init__(self):
        for name in "flops queries thoughts".split():
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: it must be at least 1")


class Concepts:
    """The models of both studies with the lines they are trained on and measured with."""

    def __init__(self, options, tokenizer, home=None):
        self.options, self.tokenizer, self.home = options, tokenizer, home
        self.end = tokenizer.encode("\n")[-1]
        self.lines, self.held = lines.read(options.data)
        self.ids, self.held_ids = (
            lines.table(part.text, tokenizer, self.end) for part in (self.lines, self.held)
        )
        longest = max(self.ids.shape[1], self.held_ids.shape[1])
        self.config = c = ConceptConfig(vocab_size=tokenizer.vocab_size, line_tokens=longest)
        for part, what in ((self.ids, "train on"), (self.held_ids, "hold out")):
            if len(part) < 4 * c.context_lines:
                raise ValueError(
                    f"--data {options.data}: {len(part)} lines to {what} are too few, "
                    f"{4 * c.context_lines} are wanted"
                )
        torch.manual_seed(options.seed)
        self.ae, self.lm, self.regression = Autoencoder(c), ConceptLM(c), Regression(c)
        self.books, self.codes, self.teller = Codebooks(c), CodeLM(c), Autoencoder(c)
        shape = TOKEN_MODEL | dict(vocab_size=tokenizer.vocab_size)
        shape["context_length"] = max(shape["context_length"], 4 * longest)
        self.tokens = TransformerLM(TransformerConfig(**shape))
        for part, what in ((self.ids, "train on"), (self.held_ids, "hold out")):
            n, least = int((part >= 0).sum()), 4 * shape["context_length"]
            if n < least:
                raise ValueError(
                    f"--data {options.data}: {n} tokens to {what} are too few, {least} are wanted"
                )
        self.costs = {}

    def models(self):
        """{name: model} of all that are trained."""
        names = "ae lm regression codes teller tokens".split()
        return {name: getattr(self, name) for name in names}

    def fit(self, name, modules, step, budget):
        """Train a list of modules, or load them where that is done; their cost goes to costs."""
        model, rate = nn.ModuleList(modules), RATES[name]
        self.costs[name] = fitting.fit(
            name, model, step, budget, rate, self.home, self.options.seed
        )

    def encode(self, ids, groups=4):
        """Concepts of lines (N, T), and the FLOPs. Lines of like length go together, as each group
        is padded to its longest."""
        order, flops, found, c = (ids >= 0).sum(1).argsort(), 0, [], self.config
        for some in order.chunk(groups):
            T = int((ids[some] >= 0).sum(1).max())
            found.append(self.ae.encode(ids[some, :T]))
            # A token of the encoder sees those behind it, too: as many pairs again.
            flops += len(some) * (trunk_flops(c.line, T) + 2 * T * c.d_model * c.d_concept)
            flops += len(some) * 2 * T * (T - 1) * c.d_model * c.n_layers
        return torch.cat(found)[order.argsort()], flops

    def told(self, concepts, ids, teller=None, groups=2):
        """Log-probs of lines (N, T) told from their concepts, nats (N,), and the FLOPs."""
        teller = teller or self.ae
        order, flops, found, c = (ids >= 0).sum(1).argsort(), 0, [], self.config
        for some in order.chunk(groups):
            T = int((ids[some] >= 0).sum(1).max())
            found.append(teller.log_probs(concepts[some], ids[some, :T], self.end))
            each = trunk_flops(c.line, T) + 2 * T * c.d_model * (c.d_concept + c.vocab_size)
            flops += len(some) * each
        return torch.cat(found)[order.argsort()], flops

    @torch.no_grad()
    def encode_all(self, ids):
        """Concepts of any number of lines (N, T), and the FLOPs."""
        parts = [self.encode(some) for some in ids.split(1024)]
        return torch.cat([found for found, _ in parts]), sum(flops for _, flops in parts)

    def windows(self, generator, n_lines):
        """Starts of ROWS windows of lines, as indices (ROWS, context_lines)."""
        L = self.config.context_lines
        starts = torch.randint(n_lines - L, (ROWS, 1), generator=generator)
        return starts + torch.arange(L)

    def train(self):
        """All of it; what is done already is loaded."""
        self.train_concepts()
        self.lines_read, self.read_flops = self.encode_all(self.ids)
        self.train_next()
        self.train_tokens()
        for model in self.models().values():
            model.eval()

    def train_concepts(self):
        """Autoencoder and contrast together: what tells the next line shapes the concept."""
        c = self.config
        lm_cost = 2 * c.d_context * (4 * c.d_concept + c.d_context)  # its matrices, for a line

        def step(generator):
            at = self.windows(generator, len(self.ids))
            B, L = at.shape
            ids = self.ids[at.flatten()]
            concepts, flops = self.encode(ids)
            rows = concepts.view(B, L, -1)
            contrast = contrast_loss(self.lm, self.lm(rows[:, :-1]), rows)
            flops += B * (trunk_flops(c.context, L) + L * lm_cost) + 4 * (B * L) ** 2 * c.d_context
            some = torch.randperm(B * L, generator=generator)[: max(1, round(RETOLD * B * L))]
            noise = torch.randn(len(some), c.d_concept, generator=generator)
            noisy = concepts[some] + NOISE * concepts.detach().std() * noise
            nats, more = self.told(noisy, ids[some])
            retold = -nats.sum() / (ids[some] >= 0).sum()
            return contrast + retold, 3 * (flops + more)

        self.fit("contrast", [self.ae, self.lm], step, self.options.flops)

    def train_next(self):
        """On concepts as they are now: the regression, the codes, and a decoder that can tell a
        line from its codes as well."""
        begin = time.perf_counter()
        c, concepts, flops, N = self.config, self.lines_read, self.read_flops, len(self.ids)
        scale = concepts.std()
        lm_cost = trunk_flops(c.context, c.context_lines) / c.context_lines
        lm_cost += 2 * c.d_context * (2 * c.d_concept + c.d_context)
        generator = torch.Generator().manual_seed(self.options.seed)
        some = concepts[torch.randperm(N, generator=generator)[:20_000]]
        self.books.fit(some, ROUNDS, self.options.seed)
        codes = torch.cat([self.books.encode(part) for part in concepts.split(4096)])
        comparing = 2 * c.d_concept * c.n_codes * c.code_size  # a concept with all codes
        flops += ((ROUNDS + 1) * len(some) + N) * comparing
        seconds = time.perf_counter() - begin
        self.costs["codes of lines"] = dict(steps=ROUNDS, flops=flops, seconds=seconds)

        def regress(generator):
            rows = concepts[self.windows(generator, len(concepts))]  # (B, L, D)
            error = (self.regression(rows[:, :-1]) - rows[:, 1:]) / scale
            each = lm_cost + 4 * c.d_context * c.d_concept
            return error.square().mean(), round(3 * rows.shape[0] * rows.shape[1] * each)

        def code(generator):
            at = self.windows(generator, len(concepts))
            expected = self.codes.expected(concepts[at[:, :-1]])  # (B, L - 1, K)
            alone = torch.rand(len(at), generator=generator) < ALONE
            expected = torch.where(alone[:, None, None], self.codes.unexpecting(), expected)
            nats = self.codes.log_probs(expected.flatten(0, 1), codes[at[:, 1:].flatten()])
            K, M = c.d_context, c.n_codes
            each = lm_cost + 4 * K * K + M * (4 * K * K + 4 * K * c.code_size)
            return -nats.mean() / M, round(3 * at.numel() * each)

        def tell(generator):
            at = torch.randint(len(concepts), (ROWS * 16,), generator=generator)
            ids = self.ids[at]
            nats, flops = self.told(self.books.decode(codes[at]), ids, self.teller)
            return -nats.sum() / (ids >= 0).sum(), 3 * flops

        budget = self.options.flops
        self.fit("regression", [self.regression], regress, 0.08 * budget)
        self.fit("codes", [self.codes], code, 0.15 * budget)
        # A decoder of its own: codes are vague, and who learns to tell from them forgets the words.
        self.teller.load_state_dict(self.ae.state_dict())
        self.fit("decoder", [self.teller.decoder, self.teller.unbind], tell, 0.15 * budget)

    def train_tokens(self):
        """04's model on the same lines, one behind the other, with the FLOPs of all that the codes
        need."""
        stream, T = self.ids[self.ids >= 0], self.tokens.config.context_length
        names = ("contrast", "codes of lines", "codes", "decoder")
        budget = sum(self.costs[name]["flops"] for name in names)

        def step(generator):
            starts = torch.randint(len(stream) - T, (TOKEN_ROWS, 1), generator=generator)
            rows = stream[starts + torch.arange(T + 1)]
            loss = self.tokens(rows[:, :-1], rows[:, 1:])
            return loss, TOKEN_ROWS * 3 * lm_flops(self.tokens.config, T)

        self.fit("tokens", [self.tokens], step, budget)

    # ---- what stands before a line

    @torch.no_grad()
    def expected(self, model, concepts, at):
        """What `model` (ConceptLM, Regression or CodeLM.expected) makes of the last line of each
        context, the context_lines lines that end with line `at`, int64 (N,): (N, ...)."""
        rows = at[:, None] + torch.arange(1 - self.config.context_lines, 1)
        return torch.cat([model(concepts[some])[:, -1] for some in rows.split(256)])

    @torch.no_grad()
    def token_scores(self, at, candidates):
        """Nats of each candidate line after the lines up to `at`, given these and given nothing but
        the end of a line: two (N, n), for at (N,) and candidates (N, n), indices of lines."""
        T, longest, end = self.tokens.config.context_length, self.held_ids.shape[1], self.end
        unique, where = candidates.unique(return_inverse=True)
        order, free = (self.held_ids[unique] >= 0).sum(1).argsort(), torch.zeros(len(unique))
        for some in order.split(256):
            ids = self.held_ids[unique[some]]
            ids = ids[:, : int((ids >= 0).sum(1).max())]
            free[some] = self.line_nats(torch.full((len(ids), 1), end), ids)
        found = torch.zeros(candidates.shape)
        for i, (place, row) in enumerate(zip(at.tolist(), candidates)):
            context = self.held_ids[max(0, place - T) : place + 1].flatten()
            context = context[context >= 0][longest - T :]
            ids = self.held_ids[row]
            found[i] = self.line_nats(context[None], ids[:, : int((ids >= 0).sum(1).max())])
        return found, free[where]

    @torch.no_grad()
    def line_nats(self, context, ids):
        """Log-probs of lines (N, T) under the token model after a context (1 or N, S), (N,)."""
        cache, N = KVCache(self.tokens.config, len(context)), len(ids)
        first = self.tokens(context, cache=cache)[:, -1:]
        if len(context) < N:  # the context is read once, for all lines
            cache.k, cache.v = (
                [x.expand(N, -1, -1, -1).clone() for x in part] for part in (cache.k, cache.v)
            )
        logits = [first.expand(N, -1, -1)]
        if ids.shape[1] > 1:
            logits.append(self.tokens(ids[:, :-1].clamp(min=0), cache=cache))
        logits = torch.cat(logits, dim=1)  # (N, T, V)
        losses = F.cross_entropy(logits.mT, ids, ignore_index=-1, reduction="none")
        return -losses.sum(1)
