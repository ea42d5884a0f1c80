"""Answers to 11_serve/exercises.py, and in WRONG what the checks must not let pass."""

import queue
from collections import Counter

import torch
from engine import Engine, Sampling, TransformerConfig, TransformerLM

from common import Tokenizer

reused = (4 * 16, 3 * 16, 0)


def penalise(logits, sampling, prompt, answer):
    for token in {*prompt, *answer}:
        x = logits[token].item()
        by = sampling.repetition_penalty
        logits[token] = x / by if x > 0 else x * by
    for token, n in Counter(answer).items():
        logits[token] -= sampling.presence_penalty + sampling.frequency_penalty * n
    for token, bias in sampling.logit_bias.items():
        logits[token] += bias


def until_stop(pieces, stop, choose=max):
    held = ""
    for piece in pieces:
        held += piece
        if stop in held:
            yield held[: held.index(stop)]
            return
        begun = choose((n for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        told, held = held[: len(held) - begun], held[len(held) - begun :]
        if told:
            yield told
    yield held


def typical_probs(logits, mass):
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    information = torch.where(probs > 0, -log_probs, 0.0)
    off = (information - (probs * information).sum()).abs()
    off[probs == 0] = torch.inf
    order = off.argsort(stable=True)
    before = probs[order].cumsum(0) - probs[order]
    inside = before < mass - 1e-6
    inside[0] = True
    keep = order[inside]
    kept = torch.zeros_like(probs)
    kept[keep] = probs[keep]
    return kept / kept.sum()


def counted(together, alone):
    torch.manual_seed(0)
    shape = dict(vocab_size=257, context_length=64, d_model=32, n_layers=1, n_heads=2)
    model = TransformerLM(TransformerConfig(**shape)).eval().requires_grad_(False)
    prompts = torch.randint(256, (8, 10)).tolist()
    one = Engine(model, Tokenizer(), cache_bytes=2**22, reuse=False)

    def answer(prompts):
        pieces = [queue.SimpleQueue() for _ in prompts]
        with one.changed:
            for ids, piece in zip(prompts, pieces):
                one.submit(ids, Sampling(max_tokens=20, temperature=0), piece.put)
        for piece in pieces:
            while not piece.get().finish:
                pass

    found = []
    for groups in (alone(prompts), together(prompts)):
        before = one.counts["passes"]
        for group in groups:
            answer(group)
        found.append(one.counts["passes"] - before)
    one.close()
    return found[0] / found[1]


def passes_saved():
    return counted(lambda prompts: [prompts], lambda prompts: [[p] for p in prompts]), "c"


def by_sign(logits, sampling, prompt, answer):
    seen = [*{*prompt, *answer}]
    logits[seen] /= sampling.repetition_penalty
    penalise(logits, Sampling(logit_bias=sampling.logit_bias), [], [])
    for token, n in Counter(answer).items():
        logits[token] -= sampling.presence_penalty + sampling.frequency_penalty * n


def each_time(logits, sampling, prompt, answer):
    for token in [*prompt, *answer]:
        by = sampling.repetition_penalty
        logits[token] = torch.where(logits[token] > 0, logits[token] / by, logits[token] * by)
    penalise(logits, without_repetition(sampling), [], answer)


def without_repetition(sampling):
    return Sampling(
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=sampling.logit_bias,
    )


def prompt_too(logits, sampling, prompt, answer):
    penalise(logits, sampling, [], [*prompt, *answer])


def copied(logits, sampling, prompt, answer):
    logits = logits.clone()
    penalise(logits, sampling, prompt, answer)
    return logits


def in_each_piece(pieces, stop):
    for piece in pieces:
        if stop in piece:
            yield piece[: piece.index(stop)]
            return
        yield piece


def all_at_the_end(pieces, stop):
    yield "".join(pieces).split(stop)[0]


def holds_too_much(pieces, stop):
    held = ""
    for piece in pieces:
        held += piece
        if stop in held:
            yield held[: held.index(stop)]
            return
        keep = len(stop) - 1
        told, held = held[: max(0, len(held) - keep)], held[max(0, len(held) - keep) :]
        yield told
    yield held


def forgets_the_rest(pieces, stop):
    told = [*until_stop(pieces, stop)]
    yield from told[:-1]


def from_the_right(pieces, stop):
    told = ""
    for piece in pieces:
        told += piece
        if stop in told:
            yield told[: told.rindex(stop)]
            return
        n = max((n for n in range(1, len(stop)) if told.endswith(stop[:n])), default=0)
        yield told[: len(told) - n]
        told = told[len(told) - n :]
    yield told


def reads_on(pieces, stop):
    pieces = iter(pieces)
    yield from until_stop(pieces, stop)
    for _ in pieces:
        pass


def none_kept(logits, mass):
    return typical_probs(logits, mass) / (mass > 1e-6)


def nucleus(logits, mass):
    probs, order = logits.softmax(-1).sort(descending=True)
    kept = probs * (probs.cumsum(0) - probs < mass - 1e-6)
    return torch.zeros_like(probs).scatter(0, order, kept / kept.sum())


def with_nan(logits, mass):
    probs = logits.softmax(-1)
    off = (-probs.log() + (probs * probs.log()).sum()).abs()
    order = off.argsort()
    kept = torch.zeros_like(probs)
    keep = order[probs[order].cumsum(0) - probs[order] < mass - 1e-6]
    kept[keep] = probs[keep]
    return kept / kept.sum()


def one_too_few(logits, mass):
    full = typical_probs(logits, 1.0)
    off = (-full.clamp(min=1e-9).log() + (full * full.clamp(min=1e-9).log()).sum()).abs()
    order = off.argsort()
    keep = order[full[order].cumsum(0) <= mass]
    kept = torch.zeros_like(full)
    kept[keep] = full[keep]
    return kept / kept.sum().clamp(min=1e-9)


def not_renormalised(logits, mass):
    return typical_probs(logits, mass) * mass


WRONG = {
    "reused": [(64, 64, 0), (70, 63, 0), (64, 48, 96), (80, 48, 0), [64, 48, 0]],
    "penalise": [by_sign, each_time, prompt_too, copied],
    "until_stop": [
        in_each_piece, all_at_the_end, holds_too_much, forgets_the_rest, from_the_right, reads_on,
    ],
    "typical_probs": [nucleus, with_nan, one_too_few, not_renormalised, none_kept],
    "passes_saved": [
        lambda: (8.0, "a"),
        lambda: (8.0, "b"),
        lambda: (1.0, "c"),
        lambda: (7.5, "c"),
    ],
}  # fmt: skip
