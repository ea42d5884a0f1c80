"""Answers to 03_gpt/exercises.py, and in WRONG what the checks must not let pass."""

import torch
from gpt import GPT, GPTConfig, get_batch, lr_schedule

# Embeddings, 2 blocks of qkv, out, up, down with biases and two norms, the last norm.
parameters = 1000 * 32 + 64 * 32 + 2 * (12 * 32 * 32 + 13 * 32) + 2 * 32


def cross_entropy(logits, targets):
    logits = logits.float()  # bfloat16 would lose digits
    logits = logits - logits.max(-1, keepdim=True).values  # (B, T, V)
    chosen = logits.gather(-1, targets[..., None]).squeeze(-1)  # (B, T)
    return (logits.exp().sum(-1).log() - chosen).mean()


def next_batch(tokens, batch_size, context_length):
    starts = torch.randint(len(tokens) - context_length, (batch_size,))
    windows = torch.stack([tokens[start : start + context_length + 1] for start in starts])
    return windows[:, :-1], windows[:, 1:]


def wsd_schedule(step, max_lr, min_lr, warmup_steps, total_steps, decay_share=0.2):
    if step < warmup_steps:
        return max_lr * step / warmup_steps
    decay_steps = decay_share * total_steps
    left = min(1.0, max(0.0, (total_steps - step) / decay_steps))
    return min_lr + (max_lr - min_lr) * left


def loss_before_training():
    tokens = torch.randint(512, (10_000,), generator=torch.Generator().manual_seed(1)).numpy()
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=512, context_length=32, d_model=64, n_layers=2, n_heads=2))
    ids, targets = get_batch(tokens, 16, 32)
    return model(ids, targets).item(), "a"


def overflows(logits, targets):
    chosen = logits.gather(-1, targets[..., None]).squeeze(-1)
    return (logits.exp().sum(-1).log() - chosen).mean()


def in_half_precision(logits, targets):
    logits = logits - logits.max(-1, keepdim=True).values
    chosen = logits.gather(-1, targets[..., None]).squeeze(-1)
    return (logits.exp().sum(-1).log() - chosen).mean()


def never_the_last(tokens, batch_size, context_length):
    starts = torch.randint(len(tokens) - context_length - 1, (batch_size,))
    windows = torch.stack([tokens[start : start + context_length + 1] for start in starts])
    return windows[:, :-1], windows[:, 1:]


WRONG = {
    "parameters": [parameters + 1000 * 32, parameters - 64 * 32, float(parameters)],
    "cross_entropy": [
        overflows,
        in_half_precision,
        lambda logits, targets: cross_entropy(logits, targets) * 6,
    ],
    "next_batch": [never_the_last],
    "wsd_schedule": [
        lambda *args, decay_share=0.2: lr_schedule(*args),
        lambda *args, decay_share=0.2: wsd_schedule(*args),
    ],
    "loss_before_training": [lambda: (6.25, "b"), lambda: (4.16, "a")],
}
