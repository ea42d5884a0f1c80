"""Five exercises on scaling.py. Fill in what is open, then: make exercise-05

Each stands for something that large runs get wrong without stopping: memory that was not planned, a
gradient that is not the one of the batch, digits that are not there. Read scaling.py first; nothing
here needs more than is in it. The checks say what differs and give a hint.
"""

import torch
from scaling import IGNORE, TransformerConfig, TransformerLM, clip_gradients

# ---- 1. Predict

bytes_held = None
"""How many bytes do weights, gradients and optimizer states take together, in a run of
TransformerConfig(vocab_size=1000, context_length=64, d_model=64, n_layers=2, n_heads=4,
n_kv_heads=2, d_ff=192, qk_norm=False), whose output layer is tied to the embedding, with
TrainConfig(optimizer="muon", state_dtype="bfloat16")?

An int, worked out on paper for the Trainer of this stage on one CPU: weights and gradients are
float32. Count tensors only, and all of them: those that Muon moves, and those that it leaves to
AdamW. It is what neither smaller micro-batches nor checkpointed activations make less; when it does
not fit, nothing else has to be tried."""


# ---- 2. Fill in


def orthogonalise(matrices, steps=5):
    """Roughly U Vᵀ of each matrix U S Vᵀ: (n, rows, columns) to the same shape and dtype.

    Divide each matrix by its own Frobenius norm + 1e-7, then `steps` times
    X = a X + b (X Xᵀ) X + c (X Xᵀ)² X with a, b, c = 3.4445, -4.7750, 2.0315.

    Compute in float32 whatever comes in, leave the input as it is, and form the product X Xᵀ of
    the smaller side: a matrix of 3 columns and 300 rows needs no 300 x 300. A matrix of zeros gives
    zeros. This is all that makes Muon differ from SGD with momentum, so that one matrix scaled by
    another's norm, or a NaN from an unused layer, spoils the run."""
    ...


# ---- 3. Find the planted bug


def train_step(model, optimizer, scaler, ids, targets, micro_batch, max_norm):
    """One step on a batch of (B, T) ids and targets, `micro_batch` rows at once, with the loss
    scaled for float16. Returns the norm that the gradient had before clipping, a scalar tensor.

    In float32 and bfloat16, where the scaler is off, it is right. In float16 SGD hardly moves any
    more, while AdamW, which divides a gradient by its own size, hides most of it. And the norm that
    is returned is in the ten thousands and doubles all at once, at steps at which nothing happens
    in the text."""
    count = (targets != IGNORE).sum()
    for x, y in zip(ids.split(micro_batch), targets.split(micro_batch)):
        loss = model(x, y) * (y != IGNORE).sum() / count
        scaler.scale(loss).backward()
    norm = clip_gradients(model.parameters(), max_norm)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return norm


# ---- 4. Extend


def to_8_bits(x, block=256):
    """Optimizer states in a byte a number, in blocks (Dettmers et al. 2021, arXiv 2110.02861; here
    with even steps in place of their finer ones near 0): returns (codes, scales).

    x: a float32 tensor of any shape. Flattened, each `block` numbers, the last block what is left,
    share a scale: their largest absolute value / 127. codes: int8, x's shape, from -127 to 127.
    scales: float32, 1-D, one for each block. codes[i] * scales[i // block] of the flat tensors is
    the number nearest to x[i] that its block can say. A block of zeros has codes 0 and gives zeros.

    AdamW's m and v then take 2 bytes a parameter in place of 8. Blocks, because one outlier
    coarsens all that share its scale."""
    ...


# ---- 5. Measure and explain


def average_of_averages():
    """How far is the mean of the micro-batches' gradients from the gradient of the whole batch?

    8 rows go in 4 micro-batches of 2. In some rows most targets are IGNORE, as they are after short
    answers or where documents end. Take the gradient of model(ids, targets), and the mean of the 4
    gradients of model(part of ids, part of targets), each as one vector of all parameters. Return
    (distance, letter): the norm of their difference over the norm of the first, a float, and what
    explains it:

    a. float32 adds in another order, and over so many parameters these errors sum up
    b. a target counts by how many there are in its micro-batch, not in the batch
    c. a smaller batch has a noisier gradient, which the mean of four does not mend

    Do it with targets that are all counted, too, before you choose. The loss curve shows none of
    it: in 2024 it was found in trainers that thousands had used for years."""
    random = torch.Generator().manual_seed(1)
    windows = torch.randint(64, (8, 17), generator=random)
    ids, targets = windows[:, :-1], windows[:, 1:].clone()  # (B, T)
    targets[2:5, 2:] = IGNORE
    torch.manual_seed(0)
    model = TransformerLM(TransformerConfig(64, 16, d_model=32, n_layers=2, n_heads=2))
    distance, letter = None, None  # yours: use model, ids and targets
    return distance, letter
