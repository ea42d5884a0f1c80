"""Checks of 05_scaling/exercises.py."""

import numpy as np
import scaling
import torch
from check import Differs, measured, same
from scaling import IGNORE

SHIPPED = "18f4a690"  # train_step as it came, which is no try yet


def _model(seed=0, **changes):
    torch.manual_seed(seed)
    shape = dict(vocab_size=64, context_length=16, d_model=32, n_layers=2, n_heads=2)
    return scaling.TransformerLM(scaling.TransformerConfig(**shape | changes))


def _batch(rows, T=16):
    windows = torch.randint(64, (rows, T + 1), generator=torch.Generator().manual_seed(1))
    return windows[:, :-1], windows[:, 1:].clone()


def _gradient(model, ids, targets):
    """The gradient of the mean loss as one vector, from logits and torch's own cross-entropy."""
    logits = model(ids).flatten(0, 1)  # (B T, V)
    loss = torch.nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE)
    found = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.flatten() for g in found])


def bytes_held(answer):
    model = _model(
        vocab_size=1000, context_length=64, d_model=64, n_heads=4, n_kv_heads=2, d_ff=192,
        qk_norm=False,
    )  # fmt: skip
    settings = scaling.TrainConfig(optimizer="muon", state_dtype="bfloat16")
    loader = scaling.TokenLoader([np.arange(100)], 64, 1)
    trainer = scaling.Trainer(model, loader, None, settings, None, None)
    states = [x for named in trainer.tensors()["optimizer"].values() for x in named.values()]
    wanted = sum(x.nbytes for x in states) + 2 * sum(p.nbytes for p in model.parameters())
    hint = "a weight and its gradient are 4 bytes each; a state is 2, and who has one state and "
    hint += "who two is said in make_optimizer. The output layer is the embedding"
    same(answer, wanted, hint)


def orthogonalise(answer):
    torch.manual_seed(0)
    wide = torch.randn(3, 6, 10)

    def compare(matrices, hint, steps=5, tolerance=1e-3):
        given = matrices.clone()
        got = answer(given, steps)
        if not torch.is_tensor(got):
            raise Differs(f"got a {type(got).__name__}, not a tensor. Hint: {hint}")
        if not torch.equal(given, matrices):
            raise Differs(
                "the input has changed, and it is the momentum. Hint: float() of a float32 tensor "
                "is the tensor itself, so that nothing may be done in place"
            )
        if got.dtype != matrices.dtype:
            raise Differs(f"{matrices.dtype} came and {got.dtype} goes: return what came")
        same(got, scaling.orthogonalise(matrices, steps), hint, tolerance)

    compare(wide, "with no steps it is each matrix over its own norm", steps=0)
    compare(wide, "a step: X = a X + b (X Xᵀ) X + c (X Xᵀ)² X, on the normalised X", steps=1)
    compare(wide, "each step begins with what the last one made, its X Xᵀ, too")
    compare(wide.mT.contiguous(), "a tall matrix is the transposed of a wide one, there and back")
    compare(wide[:, :, :6].contiguous(), "a square matrix is neither tall nor wide")
    scales = torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    compare(wide * scales, "each matrix has a norm of its own: over rows and columns, not over n")
    some = torch.cat([torch.zeros(1, 6, 10), wide])
    compare(some, "zeros are to stay zeros: what is added to the norm keeps 0 / 0 away")
    compare(wide.bfloat16(), "in bfloat16 the steps lose digits: first float()", tolerance=6e-3)
    compare(wide.double(), "float64 in, float64 out")
    largest = _largest(lambda: answer(torch.randn(1, 300, 3)))
    if largest > 300 * 3 * 4:
        raise Differs(
            f"a tensor of {largest:,} numbers for a matrix of 300 x 3. Hint: with rows and columns "
            "swapped X Xᵀ is 3 x 3, and at the end they are swapped back"
        )


def _largest(function):
    """Numbers in the largest tensor that is made while function runs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = [0]

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, called, types, args=(), kwargs=None):
            out = called(*args, **(kwargs or {}))
            sizes.append(out.numel() if torch.is_tensor(out) else 0)
            return out

    with Sizes():
        function()
    return max(sizes)


def train_step(answer):
    ids, targets = _batch(6)
    targets[:3, 2:] = IGNORE
    for max_norm, enabled, scale in ((0.1, False, 1.0), (0.1, True, 2.0**14), (50.0, True, 512.0)):
        model = _model()
        whole = _gradient(model, ids, targets)
        before = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler("cpu", scale, enabled=enabled)
        norm = answer(model, optimizer, scaler, ids, targets, 4, max_norm)
        case = f"with a scale of {scale:g} and max_norm {max_norm:g} " if enabled else "unscaled "
        hint = case + "the norm is to be that of the gradient of the mean loss: when is it that?"
        same(norm, whole.norm(), hint, tolerance=1e-4)
        moved = before - torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        wanted = whole * min(1.0, max_norm / whole.norm().item())
        if not torch.allclose(moved, wanted, atol=1e-5 * wanted.abs().max().item(), rtol=1e-3):
            raise Differs(
                f"{case}the optimizer was given a gradient of norm {moved.norm():.3g}, not "
                f"{wanted.norm():.3g}, or of another direction. Hint: in what unit is max_norm, "
                "and in what unit are the gradients when they are compared with it?"
            )
        if any(p.grad is not None and p.grad.any() for p in model.parameters()):
            raise Differs("gradients are left over: the next step would add to them")
    model = _model()
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    scaler = torch.amp.GradScaler("cpu", 2.0**127)  # a loss of 4 overflows
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    answer(model, optimizer, scaler, ids, targets, 4, 1.0)
    after = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    if not torch.equal(before, after) or scaler.get_scale() != 2.0**126:
        raise Differs(
            "a gradient overflowed: the step is to be left out and the scale halved. Hint: "
            "scaler.step and scaler.update do both, where unscale_ saw the gradient as it came"
        )


def to_8_bits(answer):
    def back(x, block, hint):
        """What codes and scales say, after a look at their form."""
        given = x.clone()
        found = answer(given, block)
        pair = isinstance(found, (tuple, list)) and len(found) == 2
        if not pair or not all(map(torch.is_tensor, found)):
            raise Differs("it is to return two tensors, (codes, scales)")
        codes, scales = found
        if not torch.equal(given, x):
            raise Differs("the input has changed")
        if codes.dtype != torch.int8 or scales.dtype != torch.float32:
            raise Differs(f"codes are int8, scales float32, not {codes.dtype} and {scales.dtype}")
        blocks = -(-x.numel() // block)
        if codes.shape != x.shape or scales.shape != (blocks,):
            shapes = f"{tuple(codes.shape)} and {tuple(scales.shape)}"
            wanted = f"{tuple(x.shape)} and {(blocks,)}"
            raise Differs(f"codes and scales are {shapes}, not {wanted}. Hint: {hint}")
        if codes.numel() and codes.min() < -127:
            raise Differs("a code is -128: with 127 on both sides 0 and the signs stay exact")
        largest = torch.stack([part.abs().max() for part in x.flatten().split(block)])
        some = largest > 0  # a block of zeros can have any scale
        if not torch.allclose(scales[some], largest[some] / 127, rtol=1e-5, atol=0):
            ours, theirs = (", ".join(f"{v:.3g}" for v in s[:4]) for s in (largest / 127, scales))
            raise Differs(f"the first scales are {theirs}, not {ours}. Hint: {hint}")
        wide = scales.repeat_interleave(block)[: x.numel()].view(x.shape)
        return codes.float() * wide, wide

    torch.manual_seed(0)
    x = torch.randn(4, 64)
    got, scales = back(x, 64, "each block's largest number has the code 127 or -127")
    error = ((got - x).abs() / scales).max()
    if not error <= 0.5001:
        raise Differs(
            f"a number is off by {error:.2f} steps, more than half a one. Hint: int8 cuts off what "
            "is behind the point"
        )
    for shape, block in (((5, 7), 8), ((3,), 256), ((2, 3, 4), 5), ((12,), 4), ((1,), 1)):
        x = torch.randn(shape)
        got, scales = back(x, block, "the last block may be short; what fills it up is cut off")
        if not ((got - x).abs() <= 0.5001 * scales).all():
            raise Differs(f"{shape} in blocks of {block} comes back further off than half a step")
    x = torch.cat([torch.randn(8), torch.tensor([1e4]), torch.randn(7)])
    got, _ = back(x, 8, "an outlier in another block is no business of this one")
    if not torch.allclose(got[:8], x[:8], atol=0.02):
        raise Differs("an outlier in another block coarsens this one: each has its own scale")
    x = torch.cat([torch.zeros(8), 1e-20 * torch.randn(8), torch.randn(4)])
    got, scales = back(
        x, 8, "second moments of 1e-20 are normal: only what is exactly 0 needs care"
    )
    if not torch.equal(got[:8], x[:8]):
        raise Differs("a block of zeros does not give zeros. Hint: 0 / 0 is NaN")
    if not ((got - x).abs() <= 0.5001 * scales)[8:].all():
        raise Differs("numbers of 1e-20 come back further off than half a step")
    got, _ = back(torch.tensor([-2.0, 1.0, 0.5, -0.25]), 4, "the largest in absolute value")
    same(got[:1], torch.tensor([-2.0]), "the largest has the code 127 or -127, here -127")


def average_of_averages(answer):
    distance, letter = measured(answer(), "distance", "torch.autograd.grad, or .grad after each")
    model, (ids, targets) = _model().double(), _batch(8)
    targets[2:5, 2:] = IGNORE
    whole = _gradient(model, ids, targets)
    parts = [_gradient(model, *pair) for pair in zip(ids.split(2), targets.split(2))]
    wanted = ((torch.stack(parts).mean(0) - whole).norm() / whole.norm()).item()
    hint = "both gradients as one vector; the mean of four; |mean - whole| / |whole|"
    same(distance, wanted, hint, tolerance=2e-3)
    same(letter, "b", "with all targets counted the distance is 1e-6: what changed, and what not?")
