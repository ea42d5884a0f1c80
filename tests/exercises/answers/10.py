"""Answers to 10_semantic/exercises.py, and in WRONG what the checks must not let pass."""

import torch
from hyperbolic import TINY, poincare_exp, poincare_factor, poincare_gradient, poincare_project
from semantic import Autoencoder, ConceptConfig
from torch.nn import functional as F

# The true line, and the 31 that are expected in each of the 7 other rows.
choices = 1 + 7 * 31


def poincare_distance(x, y):
    square = (x - y).square().sum(-1)
    t = square / ((1 - x.square().sum(-1)) * (1 - y.square().sum(-1)))
    return 2 * torch.asinh(t.clamp(min=TINY).sqrt())


def descend(x, grad, rate, longest):
    factor = poincare_factor(x)  # (N, 1)
    v = -rate * grad / factor**2  # (N, D)
    length = v.norm(dim=1, keepdim=True) * factor  # (N, 1)
    v = v * (longest / length.clamp(min=TINY)).clamp(max=1)
    return poincare_project(poincare_exp(x, v))


def spacelike(ids):
    digit, upper, lower = ((ids >= ord(a)) & (ids <= ord(b)) for a, b in ("09", "AZ", "az"))
    return ~(digit | upper | lower | ((ids >= 0x80) & (ids < 0xC0)))


def space_patches(ids):
    space = spacelike(ids)
    return space & ~F.pad(space[..., :-1], (1, 0), value=False)


def order_kept():
    words = torch.randn(12, 512, generator=torch.Generator().manual_seed(0))
    autoencoder = Autoencoder(ConceptConfig(d_concept=512))
    places = torch.arange(12)
    one = autoencoder.turn(words, places).sum(0).view(2, 256)  # (2, 256), a pair a column
    other = autoencoder.turn(words.flip(0), places).sum(0).view(2, 256)
    slow = autoencoder.turns.argsort()[:64]
    return F.cosine_similarity(one[:, slow].flatten(), other[:, slow].flatten(), 0).item(), "b"


# ---- what must not pass


def parts(x, y):
    return (x - y).square().sum(-1), 1 - x.square().sum(-1), 1 - y.square().sum(-1)


def as_in_the_paper(x, y):
    square, at_x, at_y = parts(x, y)
    return torch.acosh(1 + 2 * square / (at_x * at_y))


def clamped_arcosh(x, y):
    square, at_x, at_y = parts(x, y)
    return torch.acosh((1 + 2 * square / (at_x * at_y)).clamp(min=1 + 1e-15))


def without_a_clamp(x, y):
    square, at_x, at_y = parts(x, y)
    return 2 * torch.asinh((square / (at_x * at_y)).sqrt())


def clamped_too_late(x, y):
    square, at_x, at_y = parts(x, y)
    return 2 * torch.asinh((square / (at_x * at_y)).sqrt().clamp(min=1e-15))


def clamped_too_much(x, y):
    square, at_x, at_y = parts(x, y)
    return 2 * torch.asinh((square / (at_x * at_y)).clamp(min=1e-15).sqrt())


def safe_from_the_rim(x, y):
    square, at_x, at_y = parts(x, y)
    return 2 * torch.asinh((square / (at_x * at_y).clamp(min=1e-5)).clamp(min=TINY).sqrt())


def expanded(x, y):
    square = x.square().sum(-1) + y.square().sum(-1) - 2 * (x * y).sum(-1)
    _, at_x, at_y = parts(x, y)
    return 2 * torch.asinh((square / (at_x * at_y)).clamp(min=TINY).sqrt())


def moved_to_the_centre(x, y):
    square, at_x, at_y = parts(x, y)
    return 2 * torch.atanh((square / (square + at_x * at_y)).clamp(min=TINY).sqrt())


def divided(power, measure=1, inside=True):
    """A descent with other powers of the factor, or without the pull back into the ball."""

    def answer(x, grad, rate, longest):
        v = -rate * grad / poincare_factor(x) ** power
        length = v.norm(dim=1, keepdim=True) * poincare_factor(x) ** measure
        v = v * (longest / length.clamp(min=TINY)).clamp(max=1)
        moved = poincare_exp(x, v)
        return poincare_project(moved) if inside else moved

    return answer


def without_four(x, grad, rate, longest):
    return divided(2)(x, 4 * grad, rate, longest)


def cut_before_the_rate(x, grad, rate, longest):
    v = poincare_gradient(x, grad)
    length = v.norm(dim=1, keepdim=True) * poincare_factor(x)
    v = v * (longest / length.clamp(min=TINY)).clamp(max=1)
    return poincare_project(poincare_exp(x, -rate * v))


def straight(x, grad, rate, longest):
    v = -rate * poincare_gradient(x, grad)
    length = v.norm(dim=1, keepdim=True) * poincare_factor(x)
    return poincare_project(x + v * (longest / length.clamp(min=TINY)).clamp(max=1))


def last_letters(ids):
    space = spacelike(ids)
    return ~space & F.pad(space[..., 1:], (0, 1), value=True)


def every_space(ids):
    return spacelike(ids)


def last_of_a_run(ids):
    space = spacelike(ids)
    return space & ~F.pad(space[..., 1:], (0, 1), value=False)


def only_blanks(ids):
    space = (ids == 32) | (ids == 10)
    return space & ~F.pad(space[..., :-1], (1, 0), value=False)


def beyond_ascii_is_letters(ids):
    space = spacelike(ids) & (ids < 128)
    return space & ~F.pad(space[..., :-1], (1, 0), value=False)


def rolled(ids):
    space = spacelike(ids)
    return space & ~space.roll(1, -1)


def never_at_the_start(ids):
    space = spacelike(ids)
    return space & ~F.pad(space[..., :-1], (1, 0), value=True)


def last_channels():
    words = torch.randn(12, 512, generator=torch.Generator().manual_seed(0))
    autoencoder = Autoencoder(ConceptConfig(d_concept=512))
    one, other = (
        autoencoder.turn(x, torch.arange(12)).sum(0)[-128:] for x in (words, words.flip(0))
    )
    return F.cosine_similarity(one, other, 0).item(), "b"


WRONG = {
    "choices": [1 + 8 * 31, 7 * 31, 8 * 31, 8 * 32, 1 + 7 * 32, 32, float(choices)],
    "poincare_distance": [
        as_in_the_paper,
        clamped_arcosh,
        without_a_clamp,
        clamped_too_late,
        clamped_too_much,
        safe_from_the_rim,
        expanded,
        moved_to_the_centre,
        lambda x, y: poincare_distance(x, y) / 2,
        lambda x, y: poincare_distance(x, y)[..., None],
    ],
    "descend": [
        divided(0),
        divided(1, measure=0),
        divided(2, measure=0),
        divided(2, inside=False),
        without_four,
        cut_before_the_rate,
        straight,
    ],
    "space_patches": [
        last_letters,
        every_space,
        last_of_a_run,
        only_blanks,
        beyond_ascii_is_letters,
        rolled,
        never_at_the_start,
        lambda ids: space_patches(ids).long(),
    ],
    "order_kept": [
        lambda: (order_kept()[0], "a"),
        lambda: (order_kept()[0], "c"),
        last_channels,
        lambda: (1.0, "b"),
    ],
}
