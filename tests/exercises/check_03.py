"""Checks of 03_gpt/exercises.py."""

import gpt
import torch
from check import Differs, measured, same

SHIPPED = "916669f7"  # next_batch as it came, which is no try yet


def parameters(answer):
    config = gpt.GPTConfig(vocab_size=1000, context_length=64, d_model=32, n_layers=2, n_heads=4)
    wanted = sum(p.numel() for p in gpt.GPT(config).parameters())  # tied: counted once
    hint = "two embeddings; a block has 12 d² in matrices, 13 d in biases and LayerNorms; one more"
    same(answer, wanted, f"{hint} LayerNorm at the end, and the output layer costs nothing")


def cross_entropy(answer):
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    hint = "the loss of a token is logsumexp of its logits less the logit of its target"
    same(answer(logits, targets), gpt.cross_entropy(logits, targets), hint)
    hint = "take the largest logit off before exp and add it afterwards, as logsumexp does"
    same(answer(1000 * logits, targets), gpt.cross_entropy(1000 * logits, targets), hint)
    same(answer(-1000 * logits, targets), gpt.cross_entropy(-1000 * logits, targets), hint)
    half = logits.bfloat16()
    hint = "in 16 bits the sum loses digits: first float()"
    same(answer(half, targets).float(), gpt.cross_entropy(half, targets), hint)


def next_batch(answer):
    tokens = torch.arange(100)
    for _ in range(5):
        ids, targets = answer(tokens, 4, 8)
        if ids.shape != (4, 8) or targets.shape != (4, 8):
            shapes = f"{tuple(ids.shape)} and {tuple(targets.shape)}"
            raise Differs(
                f"the shapes are {shapes}. Hint: a window has context_length + 1 tokens: all but "
                "the last, and all but the first"
            )
        if torch.equal(ids, targets):
            raise Differs(
                "ids and targets are equal: the model learns to copy its input. Hint: "
                "what should it have seen when it guesses targets[0]?"
            )
        same(targets, ids + 1, "a target is the token that follows its id in the text")
    starts = torch.cat([answer(tokens[:10], 64, 8)[0][:, 0] for _ in range(3)])
    if set(starts.tolist()) != {0, 1}:
        raise Differs("10 tokens hold two windows of 8 and a target, and both are to be drawn")


def wsd_schedule(answer):
    marks = {0: 0.0, 5: 0.5, 10: 1.0, 40: 1.0, 80: 1.0, 90: 0.55, 100: 0.1, 150: 0.1}
    for step in (90, 5, 150, 40, 0, 10, 100, 80):  # in no order: it must not remember
        got = answer(step, 1.0, 0.1, 10, 100)
        hint = f"at step {step} of 100, with 10 of warm-up and 20 of decay from 1 to 0.1, it is "
        same(got, marks[step], hint + f"{marks[step]}")
    same(answer(75, 2.0, 0.0, 10, 100, decay_share=0.5), 1.0, "decay_share moves where it falls")
    same(answer(0, 1.0, 0.1, 0, 100), 1.0, "without warm-up it begins at max_lr")


def loss_before_training(answer):
    loss, letter = measured(answer(), "loss", "model(ids, targets).item()")
    same(
        loss.item() if torch.is_tensor(loss) else loss,
        6.25,
        "model(ids, targets) is the mean loss in nats",
        tolerance=0.02,
    )
    same(letter, "a", "compare the loss with log(64), log(512) and half of that")
