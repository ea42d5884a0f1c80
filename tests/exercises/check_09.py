"""Checks of 09_rlhf/exercises.py."""

import math

import rlhf
import torch
from check import Differs, measured, same

NAN = math.nan

SHIPPED = "fbbb5840"  # gae as it came, which is no try yet


def pushes(answer):
    ratios = torch.tensor([1.0, 1.25, 1.25, 1.5, 1.5, 0.75, 0.75])
    advantages = torch.tensor([-2.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    if not isinstance(answer, (tuple, list)) or len(answer) != 7:
        raise Differs(f"got {answer!r}. Hint: a tuple of seven numbers")
    old = torch.zeros(1, 7)
    log_probs = ratios.log()[None].requires_grad_()
    mask = torch.ones(1, 7, dtype=torch.bool)
    loss, _ = rlhf.ppo_loss(log_probs, old, advantages[None], mask, 0.2, 0.28, total=1)
    wanted = -torch.autograd.grad(loss, log_probs)[0][0]
    hints = (
        "in the first step nothing is clipped; the derivative of the ratio by log_prob is the "
        "ratio, and the advantage stands before it",
        "1.25 is above 1 + clip, but clip_high bounds a good token: nothing is clipped, and "
        "the push is ratio times advantage (the derivative of the ratio by log_prob is the ratio)",
        "1.25 is too high for a bad token: the smaller of the two is the one that is not clipped",
        "beyond the bound in the direction in which it is pushed",
        "a token that has gone the wrong way is never left there: min, not clamp",
        "a good token that has become less likely: is it beyond a bound that holds it back?",
        "1 - clip is the bound of bad tokens; clip_high has nothing to do with it",
    )
    for got, one, ratio, advantage, hint in zip(answer, wanted, ratios, advantages, hints):
        where = f"at ratio {ratio:g} and advantage {advantage:g}: {hint}"
        same(got, one.item(), where)


def _advantages(answer, rewards, *args, **kwargs):
    """What the answer gives, as a tensor of rewards' shape, and rewards as they were."""
    given = torch.tensor(rewards) if isinstance(rewards, list) else rewards
    before = given.clone()
    got = answer(given, *args, **kwargs)
    if not torch.equal(given.nan_to_num(9.0), before.nan_to_num(9.0)):
        raise Differs("`rewards` has changed. Hint: work on a copy")
    if not isinstance(got, torch.Tensor) or got.shape != given.shape:
        shape = tuple(got.shape) if isinstance(got, torch.Tensor) else type(got).__name__
        raise Differs(f"got {shape}, not a tensor of {tuple(given.shape)}")
    if not torch.isfinite(got).all():
        raise Differs(f"{got.tolist()} for rewards {before.tolist()}. Hint: they are all finite")
    return got


def group_advantages(answer):
    torch.manual_seed(0)
    # By hand: mean 2, deviation 1; mean 5, squares 16 + 1 + 25 over 2.
    got = _advantages(answer, [1.0, 2.0, 3.0, 1.0, 4.0, 10.0], 3, eps=0.0)
    root = math.sqrt(21)
    hint = "neighbours are a group, and the squares are divided by n - 1"
    same(got, torch.tensor([-1.0, 0.0, 1.0, -4 / root, -1 / root, 5 / root]), hint)
    rewards = torch.randn(24)
    for group_size in (2, 4, 6):
        for options in ({}, dict(normalize_by_std=False), dict(eps=0.5)):
            got = _advantages(answer, rewards, group_size, **options)
            wanted = rlhf.group_advantages(rewards, group_size, **options)
            how = f"group_size {group_size} and {options or 'the defaults'}"
            same(got, wanted, f"{how}; eps is added to the deviation, not under the root")
    equal = torch.cat([torch.rand(50).repeat_interleave(7), torch.tensor([0.1] * 7 + [5.0] * 7)])
    if (off := _advantages(answer, equal, 7).abs().max()) != 0:
        why = "a mean of seven equal floats is not always quite their value"
        raise Differs(f"in groups of equal rewards up to {off:.2g}. Hint: {why}")
    same(_advantages(answer, [0.0] * 4, 4), torch.zeros(4), "equal rewards: 0 over eps is 0")
    hint = "a small spread is a spread: only equal rewards leave nothing to choose"
    got = _advantages(answer, [0.5, 0.5001, 0.5002], 3, eps=0.0)
    same(got, torch.tensor([-1.0, 0.0, 1.0]), hint, 1e-2)
    for rewards, hint in (
        ([1.0, 0.0, NAN, 1.0, 3.0, 5.0], "a NaN is in none of mean and deviation, n is without it"),
        ([NAN, NAN, 4.0, 2.0, 0.0, 1.0], "one reply alone in its group: 0"),
        ([NAN, NAN, NAN, 2.0, 0.0, 1.0], "nobody in the group was judged: 0"),
        ([0.3, NAN, 0.3, 0.3, 0.3, 0.3], "equal ones with a NaN between: 0"),
    ):
        for by_std in (True, False):
            got = _advantages(answer, rewards, 3, normalize_by_std=by_std)
            wanted = rlhf.group_advantages(torch.tensor(rewards), 3, normalize_by_std=by_std)
            said = f"rewards {rewards} in groups of 3, normalize_by_std {by_std}: {hint}"
            same(got, wanted, said)
            if (got[torch.tensor(rewards).isnan()] != 0).any():
                raise Differs(f"a reply without a reward does not get 0: {got.tolist()}")
    for group_size in (1, 0):
        try:
            answer(torch.ones(4), group_size)
        except ValueError:
            continue
        except Exception as error:
            name = type(error).__name__
            raise Differs(f"group_size {group_size} raises {name}, not ValueError") from None
        raise Differs(f"group_size {group_size} raises nothing: a ValueError is wanted")


def gae(answer):
    torch.manual_seed(0)
    lengths, N = [7, 1, 4, 0, 6], 7
    rewards, values = torch.randn(2, len(lengths), N, dtype=torch.float64)
    mask = torch.arange(N) < torch.tensor(lengths)[:, None]
    for gamma, lam in ((1.0, 0.95), (1.0, 1.0), (1.0, 0.0), (0.9, 0.7)):
        wanted = torch.zeros(2, len(lengths), N, dtype=torch.float64)
        for b, n in enumerate(lengths):
            v = [*values[b, :n].tolist(), 0.0]
            deltas = [rewards[b, t].item() + gamma * v[t + 1] - v[t] for t in range(n)]
            for t in range(n):
                a = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n))
                wanted[0, b, t], wanted[1, b, t] = a, a + v[t]
        for noise in (0.0, 9.0):
            given = [torch.where(mask, x, noise) for x in (rewards, values)]
            before = [x.clone() for x in given]
            found = answer(*given, mask.clone(), gamma, lam)
            if not isinstance(found, (tuple, list)) or len(found) != 2:
                raise Differs(f"got a {type(found).__name__}. Hint: advantages, returns")
            if not all(map(torch.equal, given, before)):
                raise Differs("rewards or values have changed. Hint: work on copies")
            for name, got, one in zip(("advantages", "returns"), found, wanted):
                if isinstance(got, torch.Tensor) and got.shape == mask.shape:
                    if (got[~mask] != 0).any():
                        raise Differs(f"{name} in the padding are not 0, as they were")
                    off = (~torch.isclose(got, one, 1e-5, 1e-5)).nonzero().tolist()
                    if off and noise:
                        b, t = off[-1]
                        raise Differs(
                            f"{name} with {noise:g} as every value in the padding: "
                            f"{got[b, t].item():.4g} and not {one[b, t].item():.4g} at token {t} "
                            f"of a reply of {lengths[b]}. Hint: what does the last token of a "
                            "reply expect to come after it, and what of that is there?"
                        )
                hint = f"{name} with gamma {gamma} and lam {lam}, nothing but 0 in the padding"
                same(got, one, hint)


def _gspo(answer, *args, **kwargs):
    """(loss, clip fraction, gradient of log_probs) as the answer gives them."""
    log_probs = args[0].clone().requires_grad_()
    found = answer(log_probs, *args[1:], **kwargs)
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        raise Differs(f"got a {type(found).__name__}. Hint: return loss, clip fraction")
    loss, beyond = found
    if not isinstance(loss, torch.Tensor) or loss.ndim:
        raise Differs(f"the loss is {loss!r}. Hint: a tensor without dimensions")
    if isinstance(beyond, torch.Tensor) and beyond.requires_grad:
        raise Differs("the clip fraction carries a gradient. Hint: count what is beyond")
    gradient = torch.zeros_like(log_probs)
    if loss.requires_grad:
        found = torch.autograd.grad(loss, log_probs, allow_unused=True)[0]
        gradient = gradient if found is None else found
    return loss.item(), float(beyond), gradient


def gspo_loss(answer):
    # Mean log-ratios 0.1, 0.4, 0.4, -0.3, -0.3 by rows; tokens of a row count 2, 3, 3, 1, 2.
    ratios = torch.tensor(
        [[0.3, -0.1, 9.0], [0.5, 0.3, 0.4], [0.9, 0.0, 0.3], [-0.3, 9.0, -9.0], [-0.8, 0.2, 90.0]]
    ).double()
    advantages = torch.tensor([1.5, 1.0, -1.0, 2.0, -2.0]).double()
    counts = torch.tensor([2, 3, 3, 1, 2])
    mask = torch.arange(3) < counts[:, None]
    old = -torch.tensor([[1.0, 2.0, 0.5]]).double().expand(5, 3)
    e = [math.exp(x) for x in (0.1, 0.4, 0.4, -0.3, -0.3)]
    gains = [1.5 * e[0], 1.3, -e[2], 2 * e[3], -2 * 0.8]  # the second and the last are beyond
    loss, beyond, gradient = _gspo(answer, ratios + old, old, advantages, mask, 0.2, 0.3)
    hint = (
        "the ratio of a reply is exp of the mean of its tokens' log-ratios; the smaller of ratio "
    )
    same(loss, -sum(gains) / 5, hint + "times advantage clipped and not; the mean over replies")
    hint = "beyond: above 1 + clip_high with an advantage above 0, below 1 - clip with one below 0"
    same(beyond, 2 / 5, "this is the clip fraction, of replies; " + hint)
    wanted = torch.zeros(5, 3).double()
    for b, push in ((0, 1.5 * e[0]), (2, -e[2]), (3, 2 * e[3])):
        wanted[b, : counts[b]] = -push / counts[b] / 5
    hint = "this is the gradient of log_probs: a reply's push is shared evenly by its tokens, "
    same(gradient, wanted, hint + "and beyond the clip there is none")
    # One token at a time it is PPO, and GRPO.
    torch.manual_seed(0)
    one, before, worth = torch.randn(3, 40, dtype=torch.float64)
    only = torch.ones(40, 1, dtype=torch.bool)
    loss, beyond, _ = _gspo(answer, one[:, None], before[:, None], worth, only, 0.2, 0.3)
    other, share = rlhf.grpo_loss(
        one[:, None], before[:, None], worth, only, clip=0.2, clip_high=0.3
    )
    same(loss, other.item(), "for replies of one token it is grpo_loss")
    same(beyond, share.item(), "for replies of one token its clip fraction is that of grpo_loss")
    # The defaults, and a row without a token.
    steps = torch.tensor([[2e-4, 5e-4], [7e-4, 3e-4], [-5e-4, 0.0], [-9e-4, 0.0], [5.0, 5.0]])
    mask = torch.tensor([[True, True]] * 4 + [[False, False]])
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 7.0]).double()
    start = torch.zeros(5, 2).double()
    loss, beyond, gradient = _gspo(answer, steps.double(), start, advantages, mask)
    gains = [math.exp(3.5e-4), 1 + 4e-4, -math.exp(-2.5e-4), -(1 - 3e-4)]
    hint = "four replies and one without a token: it counts in neither mean (the clips are the "
    hint += "defaults"
    same(1e4 * loss, -1e4 * sum(gains) / 4, f"{hint}; these are 10,000 times the loss)", 1e-6)
    same(beyond, 0.5, f"{hint}; this is the clip fraction)")
    if gradient[4].any() or not torch.isfinite(gradient).all():
        raise Differs("a reply without a token has a gradient, or there is one that is not finite")
    for nobody in (mask[4:], mask[4:].expand(3, 2)):
        n = len(nobody)
        loss, beyond, gradient = _gspo(answer, start[:n] - 1, start[:n], advantages[:n], nobody)
        if loss != 0 or beyond != 0 or gradient.any():
            raise Differs(
                f"no reply has a token: {loss} and {beyond}, not 0 and 0. Hint: clamp the count"
            )


def kl_as_a_loss(answer):
    distance, letter = measured(answer(), "distance", "(weights * k3).sum() is a loss")
    torch.manual_seed(0)
    logits = torch.randn(8, dtype=torch.float64, requires_grad=True)
    reference = (logits.detach() + torch.randn(8, dtype=torch.float64)).log_softmax(0)
    log_probs = logits.log_softmax(0)
    weights, k3 = log_probs.exp().detach(), rlhf.kl_estimates(log_probs, reference)[2]
    found = torch.autograd.grad((weights * k3).sum(), logits, retain_graph=True)[0]
    exact = (log_probs.exp() * (log_probs - reference)).sum()
    exact = torch.autograd.grad(exact, logits)[0]
    wanted = ((found - exact).norm() / exact.norm()).item()
    hint = "the weights are constants, detach() makes them so; the exact KL has none: there p is "
    same(float(distance), wanted, hint + "differentiated, too", tolerance=1e-4)
    hint = (
        "measure all three, against the gradients of KL(policy || reference) and of KL(reference "
    )
    same(letter, "b", hint + "|| policy)")
