"""Checks of 10_semantic/exercises.py."""

import math

import hyperbolic
import semantic
import torch
from check import Differs, measured, same

SHIPPED = "9a934c91"  # descend as it came, which is no try yet


def choices(answer):
    config = semantic.ConceptConfig(d_concept=8, d_context=8, n_heads=2, context_lines=32)
    lm = semantic.ConceptLM(config)
    with torch.no_grad():
        for p in lm.parameters():
            p.zero_()  # it scores all lines alike: the loss is the log of how many there are
        rows = torch.randn(8, 32, 8, generator=torch.Generator().manual_seed(0))
        loss = semantic.contrast_loss(lm, lm(rows[:, :-1]), rows).item()
    hint = "nothing is expected before a window's first line; and what does contrast_loss mask?"
    same(answer, round(math.exp(loss)), hint)


def _tensor(got, shape, where):
    """Differs unless `got` is a finite tensor of this shape."""
    if not isinstance(got, torch.Tensor):
        raise Differs(f"{where}: got a {type(got).__name__}, not a tensor")
    if got.shape != shape:
        raise Differs(f"{where}: the shape is {tuple(got.shape)}, not {tuple(shape)}")
    if not got.isfinite().all():
        raise Differs(f"{where}: {got.tolist()} is not finite")
    return got


def poincare_distance(answer):
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.rand(n, generator=generator, dtype=torch.float64) - 0.5 for n in ((5, 1, 3), (4, 3))
    )
    got = _tensor(answer(x, y), (5, 4), "x of (5, 1, 3) and y of (4, 3)")
    same(got, hyperbolic.poincare_distance(x, y), "start from the formula of the paper", 1e-9)

    # A short way is its Euclidean length times the factor; 2 artanh r from the centre to norm r.
    at = torch.tensor([0.6, 0.0], dtype=torch.float64)
    for gap in (1e-4, 1e-7, 1e-10):
        near = at + torch.tensor([0.0, gap], dtype=torch.float64)
        got = _tensor(answer(at, near), (), f"two points {gap} apart")
        hint = (
            f"these points are {gap} apart, and the distance is in units of that. In 1 + 2t the 1"
        )
        hint += " swallows a small t: what else has a cosh of 1 + 2t? And |x - y|^2 keeps digits"
        same(got / gap, torch.tensor(3.125), hint + " that its expansion loses", 1e-5)
    for norm in (0.5, 0.999, 1 - 1e-6):
        far = torch.tensor([[norm, 0.0], [-norm, 0.0]], dtype=torch.float64)
        got = _tensor(answer(far[0], far[1]), (), f"points at a norm of {norm}, opposite")
        hint = f"these are at a norm of {norm} on opposite sides of the centre"
        same(got, torch.tensor(4 * math.atanh(norm)), hint, 1e-5)
    rim = torch.tensor([[1 - 1e-10, 0.0], [1e-10 - 1, 0.0]], dtype=torch.float64)
    got = _tensor(answer(rim[0], rim[1]), (), "points 1e-10 from the rim, opposite")
    hint = "artanh of the moved point rounds to that of 1 here: work with 1 - |x|^2 of each"
    same(got, torch.tensor(2 * math.log((2 - 1e-10) / 1e-10)), hint, 1e-5)

    x = torch.tensor([[0.6, 0.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    got = _tensor(answer(x, x.detach().clone()), (2,), "points and themselves")
    if got.abs().max() > 1e-12:
        raise Differs(f"a point is {got.abs().max():.3g} from itself")
    (grad,) = torch.autograd.grad(got.sum(), x)
    if not grad.isfinite().all():
        raise Differs(
            "the gradient of the distance of a point to itself is not finite. Hint: the root has "
            "an infinite slope at 0, and what a clamp in front of it holds has none"
        )


def descend(answer):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    norms = torch.tensor([0.0, 0.1, 0.5, 0.9, 0.999, 1 - 1e-8], dtype=torch.float64)[:, None]
    x = x / x.norm(dim=1, keepdim=True) * norms  # (6, 3)
    towards = torch.zeros(6, 3, dtype=torch.float64) + 0.3

    # The gradient of a distance is 1 long anywhere, as the ball measures it: so is the step, times
    # the rate.
    moving = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(hyperbolic.poincare_distance(moving, towards).sum(), moving)
    for rate in (0.3, 0.01):
        got = _tensor(answer(x, grad, rate, 0.5), (6, 3), "points (6, 3)")
        gone = hyperbolic.poincare_distance(x[:5], got[:5])
        hint = "a distance's Riemannian gradient has length 1 everywhere, so with a rate of "
        hint += (
            f"{rate}, and longest 0.5, each point goes {rate}: by what is the Euclidean one to be"
        )
        hint += " divided?"
        same(gone, torch.full((5,), rate), hint, 1e-4)
        if not (got.norm(dim=1) < 1).all():
            raise Differs("a point has left the ball")
    got = answer(x, grad, 3.0, 0.5)
    gone = hyperbolic.poincare_distance(x[:5], got[:5])
    same(
        gone, torch.full((5,), 0.5), "a step is at most `longest` long, as the ball measures", 1e-4
    )

    grad = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    for rate, longest in ((0.1, 0.5), (1.0, math.inf), (2.0, 0.01)):
        wanted = hyperbolic.step(x, grad, rate, "poincare", longest)
        got = _tensor(answer(x, grad, rate, longest), (6, 3), "points (6, 3)")
        same(got, wanted, f"as step does with a rate of {rate}, at most {longest}", 1e-8)
    same(answer(x, 0 * grad, 1.0, 0.5), x, "where the gradient is 0 a point stays", 1e-12)
    outwards = -1e12 * x
    got = _tensor(answer(x, outwards, 1.0, 100.0), (6, 3), "a step far outwards")
    if not (got.norm(dim=1) < 1).all():
        raise Differs("a point left the ball by rounding. Hint: poincare_project pulls it back")


def _shown(data, ends):
    """Bytes with a | behind each that ends a patch."""
    shown = [chr(b) if b < 128 else f"<{b:x}>" for b in data]
    return "".join(text + "|" * bool(end) for text, end in zip(shown, ends))


def space_patches(answer):
    # Written by hand: ^ below each byte that ends a patch.
    before = "a byte is compared with the one before it, never with the one behind"
    cases = (
        (b"to be, or not", "  ^  ^   ^   ", before),
        (b" a  b\n\nc.", "^ ^  ^  ^", "before the first byte is none: a space there ends a patch"),
        (b"'Tis 3pm: I, 9", "^   ^   ^  ^  ", "digits are no spacelike bytes, and ' is one"),
        (
            "caf\u00e9s \u2014 \u00e9t\u00e9.".encode(),
            "   ^  ^   ^   ^ ^",
            "0x80 to 0xBF go on with a character, 0xC0 and above begin one and are spacelike",
        ),
        (b"@A[Z`a{z/0:9_", "^ ^ ^ ^ ^ ^ ^", "ASCII letters and digits only, with their limits"),
        (b"word", "    ", before),
    )
    for data, marks, hint in cases:
        wanted = [mark == "^" for mark in marks]
        ids = torch.tensor(list(data))
        got = _ends(answer, ids)
        if got.tolist() != wanted:
            raise Differs(
                f"{_shown(data, got.tolist())!r}, not {_shown(data, wanted)!r} (bytes, | behind "
                f"the last of a patch). Hint: {hint}"
            )
        for t in range(1, len(data)):
            if _ends(answer, ids[:t]).tolist() != wanted[:t]:
                raise Differs(
                    f"what is said of the first {t} bytes of {data!r} changes with those behind "
                    "them. Hint: nothing may look ahead, not even at where the text ends"
                )
    rows = torch.stack([torch.tensor(list(text)) for text in (b"ab c.", b". a b")])
    for shape in ((2, 5), (2, 1, 5)):
        got = _ends(answer, rows.view(shape))
        wanted = torch.stack([_ends(answer, row) for row in rows]).view(shape)
        if not torch.equal(got, wanted):
            raise Differs(f"ids of {shape}: not what each row alone gives")
    if not torch.equal(rows, torch.stack([torch.tensor(list(t)) for t in (b"ab c.", b". a b")])):
        raise Differs("it has changed the ids that it was given")


def _ends(answer, ids):
    got = answer(ids)
    if not isinstance(got, torch.Tensor) or got.dtype != torch.bool or got.shape != ids.shape:
        what = f"{got.dtype} {tuple(got.shape)}" if isinstance(got, torch.Tensor) else repr(got)
        raise Differs(f"got {what}, where a bool tensor of {tuple(ids.shape)} is wanted")
    return got


def order_kept(answer):
    cosine, letter = measured(answer(), "cosine", "autoencoder.turn(words, torch.arange(12))")
    # With complex numbers, a pair each: channel i and channel i + 256.
    words = torch.randn(12, 512, generator=torch.Generator().manual_seed(0)).double()
    pairs = torch.complex(words[:, 192:256], words[:, 448:])  # (12, 64), the slowest last
    turns = 0.9 * math.pi * torch.logspace(0, -2.5, 256, dtype=torch.float64)[192:]
    turned = torch.exp(1j * torch.arange(12)[:, None] * turns)
    one, other = (pairs * turned).sum(0), (pairs.flip(0) * turned).sum(0)
    wanted = ((one.conj() * other).real.sum() / one.abs().norm() / other.abs().norm()).item()
    hint = "channel i and channel i + 256 are a pair, and the pairs are in order of their turns"
    if float(cosine) > 0.9999:
        hint = "the words change places and are turned by the new ones: to reverse what is turned "
        hint += "already changes no sum"
    same(cosine, wanted, hint, tolerance=1e-4)
    hint = "compare how far such a pair has turned after 11 places with how far a fast one has"
    same(letter, "b", hint)
