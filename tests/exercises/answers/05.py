"""Answers to 05_scaling/exercises.py, and in WRONG what the checks must not let pass."""

import math

import torch
from scaling import IGNORE, TransformerConfig, TransformerLM, clip_gradients

# Of a block: queries and 2 x 2 heads of keys and values, out, gate and up, down; two norms.
matrices = 2 * ((64 + 2 * 32) * 64 + 64 * 64 + 2 * 192 * 64 + 64 * 192)
others = 1000 * 64 + 2 * 2 * 64 + 64  # the embedding, which is the output layer; norms
# A weight and its gradient; Muon's one state, AdamW's two, in bfloat16.
bytes_held = (4 + 4) * (matrices + others) + 2 * matrices + 2 * 2 * others


def orthogonalise(matrices, steps=5):
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.float().mT if tall else matrices.float()
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # (n, small, small)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def train_step(model, optimizer, scaler, ids, targets, micro_batch, max_norm):
    count = (targets != IGNORE).sum()
    for x, y in zip(ids.split(micro_batch), targets.split(micro_batch)):
        loss = model(x, y) * (y != IGNORE).sum() / count
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    norm = clip_gradients(model.parameters(), max_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return norm


def to_8_bits(x, block=256):
    blocks = math.ceil(x.numel() / block)
    filled = torch.zeros(blocks * block)
    filled[: x.numel()] = x.flatten()
    filled = filled.view(blocks, block)
    scales = filled.abs().amax(1) / 127
    steps = torch.where(scales > 0, scales, 1.0)  # 0 / 1 is 0
    codes = (filled / steps[:, None]).round().to(torch.int8)
    return codes.flatten()[: x.numel()].view(x.shape), scales


def average_of_averages(micro=2, weigh=False):
    random = torch.Generator().manual_seed(1)
    windows = torch.randint(64, (8, 17), generator=random)
    ids, targets = windows[:, :-1], windows[:, 1:].clone()
    targets[2:5, 2:] = IGNORE
    torch.manual_seed(0)
    model = TransformerLM(TransformerConfig(64, 16, d_model=32, n_layers=2, n_heads=2))

    def gradient(ids, targets):
        found = torch.autograd.grad(model(ids, targets), list(model.parameters()))
        return torch.cat([g.flatten() for g in found])

    whole, mean = gradient(ids, targets), 0
    for x, y in zip(ids.split(micro), targets.split(micro)):
        share = (y != IGNORE).sum() / (targets != IGNORE).sum() if weigh else micro / len(ids)
        mean = mean + share * gradient(x, y)
    return ((mean - whole).norm() / whole.norm()).item(), "b"


# ---- near misses


def as_one_stack(matrices, steps=5):
    """All matrices over one norm."""
    scale = matrices.norm()
    return orthogonalise(matrices, steps) if len(matrices) < 2 else stepped(matrices / scale, steps)


def stepped(x, steps):
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def in_place(matrices, steps=5):
    x = matrices.float()
    x /= x.norm(dim=(-2, -1), keepdim=True) + 1e-7
    return orthogonalise(x, steps).to(matrices.dtype)


def in_its_dtype(matrices, steps=5):
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = stepped(x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7), steps)
    return x.mT if tall else x


def never_swaps(matrices, steps=5):
    x = matrices.float()
    x = stepped(x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7), steps)
    return x.to(matrices.dtype)


def no_epsilon(matrices, steps=5):
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.float().mT if tall else matrices.float()
    x = stepped(x / x.norm(dim=(-2, -1), keepdim=True), steps)
    return (x.mT if tall else x).to(matrices.dtype)


def by_svd(matrices, steps=5):
    u, _, v = torch.linalg.svd(matrices.float(), full_matrices=False)
    return (u @ v).to(matrices.dtype)


def accumulate(model, scaler, ids, targets, micro_batch):
    count = (targets != IGNORE).sum()
    for x, y in zip(ids.split(micro_batch), targets.split(micro_batch)):
        scaler.scale(model(x, y) * (y != IGNORE).sum() / count).backward()


def limit_scaled(model, optimizer, scaler, ids, targets, micro_batch, max_norm):
    """The right gradient, but the norm is still that of the scaled one."""
    accumulate(model, scaler, ids, targets, micro_batch)
    norm = clip_gradients(model.parameters(), max_norm * scaler.get_scale())
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return norm


def norm_divided(model, optimizer, scaler, ids, targets, micro_batch, max_norm):
    """The right norm, but the scaled gradient was clipped."""
    accumulate(model, scaler, ids, targets, micro_batch)
    norm = clip_gradients(model.parameters(), max_norm) / scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return norm


def unscaled_twice(model, optimizer, scaler, ids, targets, micro_batch, max_norm):
    """By hand, and then by scaler.step, which knows nothing of it."""
    accumulate(model, scaler, ids, targets, micro_batch)
    for p in model.parameters():
        p.grad /= scaler.get_scale()
    norm = clip_gradients(model.parameters(), max_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return norm


def scaler_unused(model, optimizer, scaler, ids, targets, micro_batch, max_norm):
    off = torch.amp.GradScaler("cpu", enabled=False)
    return train_step(model, optimizer, off, ids, targets, micro_batch, max_norm)


def averages(model, optimizer, scaler, ids, targets, micro_batch, max_norm):
    """In the right order, but with the mean of the micro-batches."""
    parts = list(zip(ids.split(micro_batch), targets.split(micro_batch)))
    for x, y in parts:
        scaler.scale(model(x, y) / len(parts)).backward()
    scaler.unscale_(optimizer)
    norm = clip_gradients(model.parameters(), max_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return norm


def steps_regardless(model, optimizer, scaler, ids, targets, micro_batch, max_norm):
    """Overflows are not left out."""
    accumulate(model, scaler, ids, targets, micro_batch)
    scaler.unscale_(optimizer)
    norm = clip_gradients(model.parameters(), max_norm)
    optimizer.step()
    scaler.update()
    optimizer.zero_grad()
    return norm


def one_scale(x, block=256):
    """The scale of the largest block for all."""
    scales = torch.full((math.ceil(x.numel() / block),), x.abs().max() / 127)
    return (x / scales[0]).round().to(torch.int8), scales


def cut_off(x, block=256):
    _, scales = to_8_bits(x, block)
    wide = scales.repeat_interleave(block)[: x.numel()].view(x.shape)
    return (x / wide.clamp(min=1e-30)).to(torch.int8), scales


def divides_by_zero(x, block=256):
    _, scales = to_8_bits(x, block)
    wide = scales.repeat_interleave(block)[: x.numel()].view(x.shape)
    return (x / wide).round().nan_to_num(9).to(torch.int8), scales + (scales == 0)


def clamps(x, block=256):
    """A floor under the scale, which is above what second moments are."""
    _, scales = to_8_bits(x, block)
    scales = scales.clamp(min=1e-12)
    wide = scales.repeat_interleave(block)[: x.numel()].view(x.shape)
    return (x / wide).round().to(torch.int8), scales


def without_sign(x, block=256):
    """The largest number, not the largest absolute value."""
    filled = torch.zeros(math.ceil(x.numel() / block) * block)
    filled[: x.numel()] = x.flatten()
    scales = filled.view(-1, block).amax(1) / 127
    wide = scales.repeat_interleave(block)[: x.numel()].view(x.shape)
    return (x / wide).round().clamp(-127, 127).nan_to_num(0).to(torch.int8), scales


WRONG = {
    "bytes_held": [
        bytes_held + 8 * 64_000,  # an output layer of its own
        bytes_held + 2 * matrices,  # two states for matrices, too
        bytes_held + 2 * matrices + 4 * others,  # states in float32
        bytes_held - 2 * 64_000,  # the embedding is Muon's
        bytes_held - 4 * (matrices + others),  # no gradients
        float(bytes_held),
    ],
    "orthogonalise": [
        as_one_stack,
        in_place,
        in_its_dtype,
        never_swaps,
        no_epsilon,
        by_svd,
        lambda matrices, steps=5: orthogonalise(matrices),
        lambda matrices, steps=5: orthogonalise(matrices, steps).float(),
    ],
    "train_step": [
        limit_scaled,
        norm_divided,
        unscaled_twice,
        scaler_unused,
        averages,
        steps_regardless,
    ],
    "to_8_bits": [
        one_scale,
        cut_off,
        divides_by_zero,
        clamps,
        without_sign,
        lambda x, block=256: to_8_bits(x),
        lambda x, block=256: to_8_bits(x, block)[0],
    ],
    "average_of_averages": [
        lambda: (average_of_averages()[0], "a"),
        lambda: (average_of_averages(weigh=True)[0], "b"),
        lambda: (average_of_averages(micro=4)[0], "b"),
    ],
}
