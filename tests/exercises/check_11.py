"""Checks of 11_serve/exercises.py."""

import engine
import torch
from check import Differs, measured, same

SHIPPED = "54c517bd"  # until_stop as it came, which is no try yet


def reused(answer):
    hint = "whole pages only, from the start on; and one token has to be fed, or where would the "
    hint += "logits of the first new one come from? A page is known by its tokens and all before"
    same(answer, (64, 48, 0), hint)


def penalise(answer):
    logits = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, 3.0])
    before = logits.clone()
    answer(logits, engine.Sampling(presence_penalty=0.5), [0, 1, 1], [1, 2, 2, 2])
    if torch.equal(logits, before):
        raise Differs("the logits are what they were. Hint: they are to be changed in place")
    once = "each token seen, of prompt and answer, once: a positive logit is divided, a negative "
    cases = [
        (dict(repetition_penalty=2.0), once + "one multiplied"),
        (
            dict(presence_penalty=0.5),
            "presence counts a token of the answer once, the prompt never",
        ),
        (dict(frequency_penalty=0.25), "frequency counts a token as often as the answer has it"),
        (dict(logit_bias={3: 5.0, 0: -100.0}), "logit_bias is added to the logits of its ids"),
        (
            dict(repetition_penalty=1.5, presence_penalty=-0.5, frequency_penalty=1.0),
            "repetition first, on the logits as they are, then what is taken off",
        ),
        (
            dict(repetition_penalty=0.5, logit_bias={1: 1.0}),
            "a repetition_penalty below 1 makes what was seen likelier; the bias comes last",
        ),
    ]
    told = "with the prompt {} and the answer {}: {}"
    for settings, hint in cases:
        sampling = engine.Sampling(**settings)
        for prompt, said in (([0, 1, 1], [1, 2, 2, 2]), ([4, 4], []), ([], [3])):
            logits = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, 3.0])
            wanted = logits.clone()
            engine.penalise(wanted, sampling, prompt, said)
            got = logits.clone()
            answer(got, sampling, list(prompt), list(said))
            same(got, wanted, told.format(prompt, said, hint))


def until_stop(answer):
    which = "which part of what is held can still become the stop string, and which is the longest?"

    def run(pieces, stop):
        """(text, the most characters that were held back behind what could be told)."""
        text, fed, lag = "", "", [0]

        def feed():
            nonlocal fed
            for piece in pieces:
                fed += piece
                yield piece
                if stop in fed and len(text) > fed.index(stop):
                    raise Differs(
                        f"pieces {pieces} with stop {stop!r}: it tells {text!r}, part of the stop "
                        f"string, too. Hint: {which}"
                    )
                if stop in fed:
                    raise Differs(
                        f"pieces {pieces} with stop {stop!r}: another piece is taken when the stop "
                        "string is there. Hint: each one is a pass of the model for nobody"
                    )
                begun = [n for n in range(1, len(stop)) if fed.endswith(stop[:n])]
                want = fed[: len(fed) - max(begun, default=0)]
                lag.append(len(want) - len(text))

        for told in answer(feed(), stop):
            text += told
        return text, max(lag)

    cases = [
        (["Hel", "lo\n", "\nUser"], "\n\n", "Hello"),
        (list("xaaab rest"), "aab", "xa"),
        (["xa", "aa", "b", "y"], "aab", "xa"),
        (list("no abcabd here"), "abcabd", "no "),
        (list("ababac tail"), "abac", "ab"),
        (["end<", "|", "user"], "<|end|>", "end<|user"),
        (["abc", "", "def"], "x", "abcdef"),
        (["one STOP two"], "STOP", "one "),
        (["STOP"], "STOP", ""),
        (["one STOP two STOP three"], "STOP", "one "),
        (["a", "a"], "aab", "aa"),
    ]
    for pieces, stop, wanted in cases:
        text, late = run(pieces, stop)
        if text != wanted:
            raise Differs(
                f"pieces {pieces} with stop {stop!r} give {text!r}, not {wanted!r}. Hint: {which}"
            )
        if late > 0:
            raise Differs(
                f"pieces {pieces} with stop {stop!r}: text is held back that cannot be its "
                "beginning any more. Hint: tell at once what can be told"
            )


def typical_probs(answer):
    probs = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])  # entropy 1.875 bits; 1 2 3 4 4 bits
    hint = "the nearest to 1.875 bits are 2 bits (off by 0.125), then 1 (0.875), 3 (1.125), 4, 4"
    for mass, kept in ((0.2, [1]), (0.3, [0, 1]), (0.7, [0, 1]), (0.8, [0, 1, 2])):
        wanted = torch.zeros(5)
        wanted[kept] = probs[kept] / probs[kept].sum()
        same(answer(probs.log(), mass), wanted, f"mass {mass}: {hint}")
    for mass in (0.0, 1e-9):
        wanted = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0])
        same(answer(probs.log(), mass), wanted, f"mass {mass}: at least one token is kept")
    same(answer(probs.log() + 50, 0.999), probs, "logits need not be normalised")
    holes = torch.tensor([0.0, -torch.inf, 0.0, -torch.inf])
    wanted = torch.tensor([0.5, 0.0, 0.5, 0.0])
    hint = "0 times -inf is NaN: leave out what has probability 0"
    same(answer(holes, 0.9), wanted, hint)
    holes = torch.tensor([0.6, 0.0, 0.3, 0.1]).log()  # entropy 0.90 nats, and 1.20 are nearest
    same(answer(holes, 0.25), torch.tensor([0.0, 0.0, 1.0, 0.0]), hint)
    peak = torch.tensor([100.0, 0.0, 0.0])
    got = answer(peak, 0.5)
    same(got, torch.tensor([1.0, 0.0, 0.0]), "where one token is certain it alone is typical")
    before = probs.log()
    answer(before, 0.5)
    same(before, probs.log(), "the logits given are to stay as they are")


def passes_saved(answer):
    ratio, letter = measured(answer(), "ratio", "read the counter before and after")
    same(float(ratio), 8.0, "each answer of 20 tokens takes 20 passes, alone or with others")
    same(letter, "c", "what does a pass have to read, however many tokens are in it?")
