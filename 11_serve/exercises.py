"""Five exercises on engine.py. Fill in what is open, then: make exercise-11

A server is a model, and everything that goes wrong when many use it at once: what one stream may
see of another, what can be told already, whose turn it is. Read engine.py first; nothing here needs
more than is in it.
"""

import queue

import torch
from engine import Engine, Sampling, TransformerConfig, TransformerLM

from common import Tokenizer

# ---- 1. Predict

reused = None
"""An Engine with pages of 16 tokens has answered a prompt of 100 tokens. How many tokens of the
next prompt does it find in its cache (Request.reused)? A tuple of three ints, for a prompt of 90
tokens of which the first 70 are those of the first prompt; for one that is just the first 64 tokens
of the first prompt; and for the first prompt once more with another first token. This is what makes
the tenth turn of a chat begin as fast as the first, and why the answer has to be exact: a page too
many is another text's past."""


# ---- 2. Fill in


def penalise(logits, sampling, prompt, answer):
    """What a Sampling takes from tokens that were seen: changes logits (V,) in place, returns
    nothing. prompt and answer are lists of ids.

    repetition_penalty: each token seen, the prompt's too, becomes less likely, however often it was
    there (Keskar et al. 2019): careful, logits have signs. presence_penalty comes off the logit of
    each token of the answer, frequency_penalty off it once for each time it stands there.
    logit_bias, {id: number}, is added last."""
    ...


# ---- 3. Find the planted bug


def until_stop(pieces, stop):
    """Yield the text of pieces, an iterable of str, as soon as it can be told, and end before
    `stop`.

    What may be the beginning of `stop` is held back until it is known not to be, and no piece is
    taken after it. With most stop strings this does what it should. A user has noticed that "aab"
    sometimes does not stop."""
    held = ""
    for piece in pieces:
        held += piece
        if stop in held:
            yield held[: held.index(stop)]
            return
        begun = min((n for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        told, held = held[: len(held) - begun], held[len(held) - begun :]
        if told:
            yield told
    yield held


# ---- 4. Extend


def typical_probs(logits, mass):
    """Locally typical sampling (Meister et al. 2022, arXiv 2202.00666): the distribution to draw
    from, (V,), for logits (V,).

    People seldom say what is likeliest, nor what is unlikely: the information of a word, -log p, is
    close to what is to be expected, the entropy. Keep the tokens for which | -log p - entropy | is
    smallest, nearest first, the fewest that together have a probability of at least `mass`, and
    renormalise; all others have 0. At least one token is kept. Tokens of probability 0 (a logit of
    -inf) are never kept and must not make anything NaN."""
    ...


# ---- 5. Measure and explain


def passes_saved():
    """How many passes of the model does it save to answer eight at once, and why is that worth it?

    Eight prompts of 10 tokens, each answered with 20 tokens. Return (ratio, letter): the passes
    that the Engine takes to answer them one after the other over those for all at once, a float,
    and why the server gains nearly as much in time where memory is slower than arithmetic:

    a. a pass over eight streams does an eighth of the arithmetic, as streams share their tokens
    b. the eight prompts share pages of the cache, so that seven of them need not be read
    c. a pass reads all weights once, for one stream or for eight, and reading them is most of its
       time

    `answer` answers prompts that are all there before the first pass; counts["passes"] counts."""
    torch.manual_seed(0)
    shape = dict(vocab_size=257, context_length=64, d_model=32, n_layers=1, n_heads=2)
    model = TransformerLM(TransformerConfig(**shape)).eval().requires_grad_(False)
    prompts = torch.randint(256, (8, 10)).tolist()
    one = Engine(model, Tokenizer(), cache_bytes=2**22, reuse=False)

    def answer(prompts):
        pieces = [queue.SimpleQueue() for _ in prompts]
        with one.changed:  # the engine looks at its queue when this is done
            for ids, piece in zip(prompts, pieces):
                one.submit(ids, Sampling(max_tokens=20, temperature=0), piece.put)
        for piece in pieces:
            while not piece.get().finish:
                pass

    ratio, letter = None, None  # yours: answer, one.counts["passes"]
    one.close()
    return ratio, letter
