"""What studies 1 and 2 measure on held-out lines, each beside its baseline.

Parent: none
New: everything

Read in this order: pick, bits, written, speed (study 1); neighbours, echoes, thoughts (study 2).
"""

import math
import re
import time
from collections import Counter

import torch
from blocks import KVCache, sample_next
from torch.nn import functional as F

CHOICES = 32  # next lines to pick from, the true one among them
SURE = 16.0  # weight of the decoder's certainty, mean nats per token, in choosing a thought


def places(m, n, seed):
    """n of the lines that have a whole context before them and a line behind, int64 (N,)."""
    first, last = m.config.context_lines - 1, len(m.held) - 1
    generator = torch.Generator().manual_seed(seed)
    return first + torch.randperm(last - first, generator=generator)[:n]


def share(hits):
    """Hits (N,) as (share, its standard error)."""
    p = hits.float().mean().item()
    return round(p, 4), round(math.sqrt(p * (1 - p) / len(hits)), 4)


@torch.no_grad()
def pick(m, concepts, o):
    """How often each model puts the true next line before 31 drawn from all held-out lines:
    {way: (share, standard error)}; by chance 1/32."""
    at = places(m, o.queries, o.seed)
    generator = torch.Generator().manual_seed(o.seed + 1)
    others = torch.randint(len(m.held), (len(at), CHOICES - 1), generator=generator)
    candidates = torch.cat([at[:, None] + 1, others], dim=1)  # (N, 32), the true one first
    near = concepts[candidates]  # (N, 32, D)
    scores = {"shared words": shared_words(m, at, candidates)}
    mean = m.expected(m.regression, concepts, at)[:, None]
    scores["regression, by distance"] = -(near - mean).norm(dim=-1)
    scores["regression, by angle"] = F.cosine_similarity(near, mean, dim=-1)
    hoped = m.expected(m.codes.expected, concepts, at).repeat_interleave(CHOICES, 0)
    codes = m.books.encode(near.flatten(0, 1))
    given = m.codes.log_probs(hoped, codes)
    free = m.codes.log_probs(m.codes.unexpecting().expand_as(hoped), codes)
    scores["codes, likelihood"] = given.view(near.shape[:2])
    scores["codes, gain"] = (given - free).view(near.shape[:2])
    scores["contrast"] = m.lm.scores(m.expected(m.lm, concepts, at), near)
    given, free = m.token_scores(at, candidates)
    lengths = (m.held_ids[candidates] >= 0).sum(-1)
    scores["tokens, likelihood"] = given
    scores["tokens, likelihood per token"] = given / lengths
    scores["tokens, gain"] = given - free
    # A candidate with the very words of the true line is as right as that one.
    text = [re.sub(r"\W+", " ", line).lower() for line in m.held.text]
    same = torch.tensor([[text[i] == text[row[0]] for i in row] for row in candidates.tolist()])
    return {
        name: share(same.gather(1, s.argmax(1, keepdim=True))[:, 0]) for name, s in scores.items()
    }


def shared_words(m, at, candidates):
    """The baseline that reads nothing: words of a candidate that its context has, the rare ones
    counting more, as a share of its words: (N, n)."""
    words = [set(re.findall(r"[a-z']+", line.lower())) for line in m.held.text]
    counts = Counter(
        word for line in m.lines.text for word in set(re.findall(r"[a-z']+", line.lower()))
    )
    rare = {word: math.log(len(m.lines) / (1 + counts[word])) for word in set().union(*words)}
    found = torch.zeros(candidates.shape)
    for n, (place, row) in enumerate(zip(at.tolist(), candidates.tolist())):
        before = set().union(*words[place + 1 - m.config.context_lines : place + 1])
        for i, line in enumerate(row):
            common = sum(rare[word] for word in words[line] & before)
            found[n, i] = common / (1 + sum(rare[word] for word in words[line]))
    return found


def n_bytes(m, ids):
    """Bytes of each line (N, T), the end among them: float32 (N,)."""
    lengths = torch.zeros(m.tokenizer.vocab_size + 1)
    for i, token in m.tokenizer.tokens.items():
        lengths[i] = len(token)
    return lengths[ids].sum(1)  # -1 is the last, 0


@torch.no_grad()
def bits(m, concepts, o):
    """Bits per byte of held-out lines, and the share told back exactly: {name: number}."""
    at = places(m, 1500, o.seed) + 1
    ids, near, size = m.held_ids[at], concepts[at], n_bytes(m, m.held_ids[at]).sum().item()
    codes = m.books.encode(near)
    coded, mean = m.books.decode(codes), m.expected(m.regression, concepts, at - 1)

    def per_byte(nats):
        return round(-nats.sum().item() / math.log(2) / size, 4)

    def told(vectors, teller=None):
        return torch.cat(
            [m.told(v, i, teller)[0] for v, i in zip(vectors.split(512), ids.split(512))]
        )

    hoped = m.expected(m.codes.expected, concepts, at - 1)
    drawn = m.codes.log_probs(hoped, codes)
    found = dict(from_concept=per_byte(told(near)), from_codes=per_byte(told(coded, m.teller)))
    found["codes"] = per_byte(drawn)
    found["codes_and_text"] = per_byte(drawn + told(coded, m.teller))
    found["from_regression"] = per_byte(told(mean))
    for name, vectors, teller in (("exact", near, m.ae), ("exact_codes", coded, m.teller)):
        written = [teller.write(v, m.end)[0].tolist() for v in vectors.split(512)]
        right = [
            [i for i in row if i >= 0] == [i for i in line if i >= 0]
            for row, line in zip(sum(written, []), ids.tolist())
        ]
        found[name] = round(sum(right) / len(right), 4)
    stream, T = m.held_ids[m.held_ids >= 0], m.tokens.config.context_length
    rows = stream.unfold(0, T + 1, T)  # windows that do not overlap
    nats = sum(m.tokens(x[:, :-1], x[:, 1:]).item() * len(x) for x in rows.split(16)) / len(rows)
    size = n_bytes(m, rows[:, 1:]).sum().item() / rows[:, 1:].numel()
    found["tokens"] = round(nats / math.log(2) / size, 4)
    return found


@torch.no_grad()
def drawn_lines(m, kind, concepts, at, n, generator):
    """n next concepts drawn after each line of `at` and told: ids (N, n, T), and how sure the
    decoder was, mean nats per token (N, n).

    kind "codes" draws a code after the other; "lines" draws one of the lines that were trained on,
    each a code of its own, with the contrast as its log-odds."""
    if kind == "codes":
        hoped = m.expected(m.codes.expected, concepts, at).repeat_interleave(n, 0)
        told = m.teller.write(m.books.decode(m.codes.draw(hoped, generator=generator)), m.end)
    else:
        scores = m.lm.scores(m.expected(m.lm, concepts, at), m.lines_read)  # (N, lines)
        rows = torch.multinomial(scores.softmax(-1), n, generator=generator)
        told = m.ae.write(m.lines_read[rows.flatten()], m.end)
    return [x.view(len(at), n, *x.shape[1:]) for x in told]


@torch.no_grad()
def token_lines(m, at, generator):
    """The line after each of `at` as the token model draws it: ids (N, T), -1 behind the end."""
    T, longest = m.tokens.config.context_length, m.config.line_tokens
    contexts = []
    for place in at.tolist():
        context = m.held_ids[max(0, place - T) : place + 1].flatten()
        contexts.append(context[context >= 0][longest - T :])
    S = max(map(len, contexts))
    pads = torch.tensor([S - len(context) for context in contexts])
    ids = torch.stack([F.pad(context, (S - len(context), 0)) for context in contexts])
    cache = KVCache(m.tokens.config, len(at), T, pads=pads)
    out, done = [], torch.zeros(len(at), dtype=torch.bool)
    while len(out) < longest and not done.all():
        chosen = sample_next(m.tokens(ids, cache=cache)[:, -1], generator=generator)
        if len(out) == longest - 1:
            chosen = torch.full_like(chosen, m.end)
        out.append(chosen.masked_fill(done, -1))
        done, ids = done | (chosen == m.end), chosen[:, None]
    return torch.stack(out, dim=1)


@torch.no_grad()
def judge(m, at, written):
    """Bits per byte of lines under the token model, which reads the true lines before them: one
    float32 (N,) for each of `written`, ids (N, T) with a line after each line of `at`."""
    T, longest = m.tokens.config.context_length, m.config.line_tokens
    lines = torch.stack([F.pad(rows, (0, longest - rows.shape[1]), value=-1) for rows in written])
    nats = torch.zeros(lines.shape[:2])
    for i, place in enumerate(at.tolist()):
        context = m.held_ids[max(0, place - T) : place + 1].flatten()
        context = context[context >= 0][longest - T :]
        ids = lines[:, i]  # (len(written), longest), the context is read once for all
        nats[:, i] = m.line_nats(context[None], ids[:, : int((ids >= 0).sum(1).max())])
    return [-nats[k] / math.log(2) / n_bytes(m, rows) for k, rows in enumerate(written)]


@torch.no_grad()
def speed(m, concepts, streams=16, n_lines=6):
    """Bytes a second that each model writes, `streams` texts at once, n_lines each, the context
    read beforehand: {name: bytes per second}."""
    at, found = places(m, streams, 3), {}
    generator = torch.Generator().manual_seed(3)
    L = m.config.context_lines
    rows = concepts[at[:, None] + torch.arange(1 - L, 1)]  # (N, L, D)
    begin, written = time.perf_counter(), 0
    for _ in range(n_lines):
        hoped = m.codes.expected(rows)[:, -1]
        ids, _ = m.teller.write(m.books.decode(m.codes.draw(hoped, generator=generator)), m.end)
        rows = torch.cat([rows[:, 1:], m.ae.encode(ids)[:, None]], dim=1)
        written += n_bytes(m, ids).sum().item()
    found["concepts"] = round(written / (time.perf_counter() - begin))
    T, longest = m.tokens.config.context_length, m.config.line_tokens
    cache = KVCache(m.tokens.config, streams, T)
    past = m.held_ids[m.held_ids >= 0]
    ids = past.unfold(0, T // 2, T)[at % (len(past) // T - 1)]
    ids = m.tokens(ids, cache=cache)[:, -1].argmax(-1, keepdim=True)
    begin, written = time.perf_counter(), 0
    for _ in range(min(T // 2 - 1, n_lines * longest // 2)):
        ids = sample_next(m.tokens(ids, cache=cache)[:, -1], generator=generator)[:, None]
        written += n_bytes(m, ids).sum().item()
    found["tokens"] = round(written / (time.perf_counter() - begin))
    return found


# ---- study 2: meaning in context


@torch.no_grad()
def readings(m, concepts):
    """Vectors of each held-out line, its own and in context: {name: (N, ...)}, for the N lines with
    a whole context before them."""
    L = m.config.context_lines
    at = torch.arange(L - 1, len(concepts))
    return {
        "the line alone, its concept": concepts[at],
        "the line alone, what it leads to": m.lm(concepts[:, None])[at, 0],
        "mean of the last 8 concepts": concepts.unfold(0, 8, 1).mean(-1)[at - 7],
        "in context, what it leads to": m.expected(m.lm, concepts, at),
    }


@torch.no_grad()
def neighbours(m, vectors, what, n=1000, top=10, seed=0):
    """Do lines of the same scene or speaker (`what`, a number for each) have like vectors? For n
    lines, all others by cosine, those within the context of each other left out, and so are lines
    whose `what` has fewer than `top` left: (precision at 10, MAP, by chance)."""
    L = m.config.context_lines
    at = torch.arange(L - 1, len(m.held))
    label, unit = torch.tensor(what)[at], F.normalize(vectors - vectors.mean(0), dim=-1)
    order = torch.randperm(len(at), generator=torch.Generator().manual_seed(seed))[: 2 * n]
    precisions, maps, chance = [], [], []
    for some in order.split(100):
        scores = unit[some] @ unit.T  # (n, N)
        near = (some[:, None] - torch.arange(len(at))).abs() <= L
        right = (label[some, None] == label) & ~near
        enough = right.sum(1) >= top
        ranked = scores.masked_fill(near, -math.inf)[enough].argsort(1, descending=True)
        hits = right[enough].gather(1, ranked).double()  # (n, N), best first
        rank = torch.arange(1, len(at) + 1)
        precisions.append(hits[:, :top].mean(1))
        maps.append((hits.cumsum(1) / rank * hits).sum(1) / hits.sum(1))
        chance.append(hits.sum(1) / (~near)[enough].sum(1))
    precision, score, by_chance = (
        torch.cat(x)[:n].mean().item() for x in (precisions, maps, chance)
    )
    return round(precision, 4), round(score, 4), round(by_chance, 4)


@torch.no_grad()
def moved(m, vectors):
    """How far a line that is said in several scenes moves between them: the mean cosine of what it
    leads to for the same words in two scenes, for two lines of one scene, for any two lines; and up
    to 3 examples, (line, cosine, scene, scene)."""
    L = m.config.context_lines
    at = torch.arange(L - 1, len(m.held)).tolist()
    unit = F.normalize(vectors - vectors.mean(0), dim=-1)
    groups = {}
    for row, i in enumerate(at):
        groups.setdefault(re.sub(r"\W+", " ", m.held.text[i]).strip().lower(), []).append(row)
    scene = [m.held.scene[i] for i in at]
    same = [(a, b) for rows in groups.values() for a in rows for b in rows if scene[a] < scene[b]]
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(len(at), (2, 20_000), generator=generator)
    scenes = torch.tensor(scene)
    within = (scenes[a] == scenes[b]) & ((a - b).abs() > L)

    def mean(rows):
        cosines = (unit[rows[:, 0]] * unit[rows[:, 1]]).sum(1)
        return round(cosines.mean().item(), 4) if len(rows) else None

    pairs = torch.tensor(same, dtype=torch.int64).view(-1, 2)
    any_two = torch.stack([a, b], dim=1)
    found = dict(same_words=mean(pairs), one_scene=mean(any_two[within]), any_two=mean(any_two))
    return found | dict(pairs=len(pairs), lines=len({a for pair in same for a in pair}))


@torch.no_grad()
def thoughts(m, concepts, o, n_places=400):
    """Plain decoding against thought units: draw o.thoughts next concepts after each of n_places
    lines, tell each, read it again, keep the one the concept model itself finds likeliest.

    A win is fewer bits per byte under the token model, which neither draws nor chooses; the plain
    line is the first one drawn, and where both are the same words it is half a win. Returns
    {kind: dict(win_rate, its error)}, {who wrote: dict(bits per byte, bytes a line)} and samples,
    [(lines before, {who wrote: line})]."""
    at = places(m, n_places, o.seed + 2)
    generator = torch.Generator().manual_seed(o.seed)
    written = {"the play": m.held_ids[at + 1], "tokens": token_lines(m, at, generator)}
    written["regression"] = m.ae.write(m.expected(m.regression, concepts, at), m.end)[0]
    hoped, wins = m.expected(m.lm, concepts, at), {}
    for kind in ("codes", "lines"):
        ids, sure = drawn_lines(m, kind, concepts, at, o.thoughts, generator)
        again = m.encode(ids.flatten(0, 1))[0].view(*ids.shape[:2], -1)  # (N, n, D)
        best = (m.lm.scores(hoped, again) + SURE * sure).argmax(1)
        written[f"{kind}, plain"] = ids[:, 0]
        written[f"{kind}, thought unit"] = ids[torch.arange(len(at)), best]
    costs = dict(zip(written, judge(m, at, list(written.values()))))
    for kind in ("codes", "lines"):
        names = f"{kind}, plain", f"{kind}, thought unit"
        won = (costs[names[1]] < costs[names[0]]).float()
        won[(written[names[0]] == written[names[1]]).all(1)] = 0.5
        error = won.std().item() / math.sqrt(len(at))
        wins[kind] = dict(win_rate=round(won.mean().item(), 4), error=round(error, 4))
    table = {
        name: dict(
            bits=round(cost.mean().item(), 4),
            bytes=round(n_bytes(m, written[name]).mean().item(), 1),
        )
        for name, cost in costs.items()
    }

    def text(row):
        return m.tokenizer.decode([i for i in row.tolist() if i >= 0]).strip()

    samples = [
        (
            m.held.text[at[i] - 2 : at[i] + 1],
            {name: text(rows[i]) for name, rows in written.items()},
        )
        for i in range(min(8, len(at)))
    ]
    return wins, table, samples
