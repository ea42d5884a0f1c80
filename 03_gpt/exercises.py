"""Five exercises on gpt.py. Fill in what is open, then: make exercise-03

Each stands for something that goes wrong, or that people get wrong, when they write a GPT. Read
gpt.py first; nothing here needs more than is in it. The checks say what differs and give a hint.
"""

import torch
from gpt import GPT, GPTConfig, get_batch

# ---- 1. Predict

parameters = None
"""How many parameters has GPT(GPTConfig(vocab_size=1000, context_length=64, d_model=32, n_layers=2,
n_heads=4))? An int, worked out on paper: a GPT is small enough to be counted, and who can count it
knows where its memory goes. Biases are on, the output layer is tied to the embedding."""


# ---- 2. Fill in


def cross_entropy(logits, targets):
    """The mean loss in nats: logits (B, T, V) float, targets (B, T) int64 to a scalar.

    From exp, log and sums: without torch's cross_entropy, log_softmax and logsumexp. With logits of
    1,000 it must be exact and finite, which exp(1000) is not, and with logits in bfloat16 as exact
    as with the same ones in float32."""
    ...


# ---- 3. Find the planted bug


def next_batch(tokens, batch_size, context_length):
    """Random windows of `tokens` (1-D int64): ids and targets, both (B, T).

    It runs, shapes and dtypes are right, the loss falls faster than ever before. And what was
    trained on it writes nonsense."""
    starts = torch.randint(len(tokens) - context_length, (batch_size,))
    windows = torch.stack([tokens[start : start + context_length + 1] for start in starts])
    return windows[:, 1:], windows[:, 1:]


# ---- 4. Extend


def wsd_schedule(step, max_lr, min_lr, warmup_steps, total_steps, decay_share=0.2):
    """Warm-up, stable, decay (Hu et al. 2024, MiniCPM, arXiv 2404.06395): the learning rate rises
    in a line from 0 to max_lr at warmup_steps, stays there, and falls in a line over the last
    decay_share of total_steps to min_lr, where it stays.

    A cosine has to know its end from the first step; this one can decide late, so that one run
    gives models of several budgets. Like lr_schedule it may depend on nothing but its arguments:
    a schedule with a memory of its own starts its warm-up again on each resume."""
    ...


# ---- 5. Measure and explain


def loss_before_training():
    """What does a GPT lose before its first step, and why that?

    Make GPT(GPTConfig(vocab_size=512, context_length=32, d_model=64, n_layers=2, n_heads=2)) after
    torch.manual_seed(0), take get_batch of 16 windows from tokens that are drawn evenly from all
    ids, and return (loss, letter): the loss in nats as a float and the letter that explains it.

    a. log(vocab_size): small weights make small logits, so that every id is about as likely
    b. log(d_model): each channel guesses for itself
    c. half of log(vocab_size): the tied embedding recognises half of the ids

    A first loss far above this says that the initialisation is wrong, before an hour is spent."""
    tokens = torch.randint(512, (10_000,), generator=torch.Generator().manual_seed(1)).numpy()
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=512, context_length=32, d_model=64, n_layers=2, n_heads=2))
    ids, targets = get_batch(tokens, 16, 32)
    loss, letter = None, None  # yours: use model, ids and targets
    return loss, letter
