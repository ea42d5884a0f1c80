"""Answers to 09_rlhf/exercises.py, and in WRONG what the checks must not let pass."""

import math

import torch
from rlhf import group_advantages as ours
from rlhf import grpo_loss, kl_estimates, masked_mean

# The derivative is ratio times advantage, or 0 where a good token is above 1.28 or a bad one below
# 0.8; at ratio 1, in the first step, nothing is clipped.
pushes = (-2.0, 1.25, -1.25, 0.0, -1.5, 0.75, 0.0)


def group_advantages(rewards, group_size, eps=1e-6, normalize_by_std=True):
    if group_size < 2:
        raise ValueError(f"group_size {group_size}: nothing to compare")
    found = torch.zeros_like(rewards)
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        known = ~group.isnan()
        judged = group[known]
        if len(judged) < 2 or (judged == judged[0]).all():
            continue
        ahead = judged - judged.mean()
        found[start : start + group_size][known] = (
            ahead / (judged.std() + eps) if normalize_by_std else ahead
        )
    return found


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    values = torch.where(mask, values, 0.0)  # what stands behind the end is not to be expected
    after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)  # (B, N)
    deltas = torch.where(mask, rewards + gamma * after - values, 0.0)
    advantages, ahead = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        ahead = deltas[:, t] + gamma * lam * ahead
        advantages[:, t] = ahead
    return advantages, advantages + values


def gspo_loss(log_probs, old_log_probs, advantages, mask, clip=3e-4, clip_high=4e-4):
    judged = mask.any(1)  # (B,)
    ratio = masked_mean(log_probs - old_log_probs, mask, 1).exp()  # (B,)
    clipped = ratio.clamp(1 - clip, 1 + clip_high)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    beyond = clipped * advantages < ratio * advantages
    return -masked_mean(gain, judged), masked_mean(beyond.float(), judged)


def setup():
    torch.manual_seed(0)
    logits = torch.randn(8, dtype=torch.float64, requires_grad=True)
    return logits, (logits.detach() + torch.randn(8, dtype=torch.float64)).log_softmax(0)


def distance(constant=True, which=2, cosine=False):
    logits, reference = setup()
    log_probs = logits.log_softmax(0)
    weights = log_probs.exp().detach() if constant else log_probs.exp()
    loss = (weights * kl_estimates(log_probs, reference)[which]).sum()
    got = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    kl = (log_probs.exp() * (log_probs - reference)).sum()
    wanted = torch.autograd.grad(kl, logits)[0]
    if cosine:
        return torch.cosine_similarity(got, wanted, dim=0).item()
    return ((got - wanted).norm() / wanted.norm()).item()


def kl_as_a_loss():
    return distance(), "b"


# ---- wrong answers


def by_position(rewards, group_size, eps=1e-6, normalize_by_std=True):
    """Groups of what is group_size apart: as if the prompts had been repeated all in a row."""
    if group_size < 2:
        raise ValueError
    columns = rewards.view(group_size, -1).T.reshape(-1)
    return ours(columns, group_size, eps, normalize_by_std).view(-1, group_size).T.reshape(-1)


def naive(rewards, group_size, eps=1e-6, normalize_by_std=True):
    """Right but for rounding in groups of equal rewards."""
    if group_size < 2:
        raise ValueError
    groups = rewards.view(-1, group_size)
    known = ~groups.isnan()
    n = known.sum(1, keepdim=True)
    mean = groups.nansum(1, keepdim=True) / n.clamp(min=1)
    ahead = torch.where(known, groups - mean, 0.0)
    if normalize_by_std:
        ahead = ahead / ((ahead**2).sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt().add(eps)
    return ahead.flatten()


def without_nan(rewards, group_size, eps=1e-6, normalize_by_std=True):
    if group_size < 2:
        raise ValueError
    groups = rewards.view(-1, group_size)
    ahead = groups - groups.mean(1, keepdim=True)
    if normalize_by_std:
        ahead = ahead / (groups.std(1, keepdim=True) + eps)
    return torch.where(groups.amax(1, True) == groups.amin(1, True), 0.0, ahead).flatten()


def nan_is_zero(rewards, group_size, eps=1e-6, normalize_by_std=True):
    return ours(rewards.nan_to_num(0.0), group_size, eps, normalize_by_std)


def nan_is_no_worse(rewards, group_size, eps=1e-6, normalize_by_std=True):
    """What was not judged counts as the mean: 0 for it, but the deviation comes out too small."""
    if group_size < 2:
        raise ValueError
    groups = rewards.view(-1, group_size)
    mean = groups.nanmean(1, keepdim=True)
    filled = torch.where(groups.isnan(), mean, groups).nan_to_num(0.0)
    return ours(filled.flatten(), group_size, eps, normalize_by_std)


def by_n(rewards, group_size, eps=1e-6, normalize_by_std=True):
    """The deviation with n."""
    found = ours(rewards, group_size, 0.0, normalize_by_std).nan_to_num(0.0)
    return found * math.sqrt(group_size / (group_size - 1)) if normalize_by_std else found


def eps_inside(rewards, group_size, eps=1e-6, normalize_by_std=True):
    ahead = ours(rewards, group_size, normalize_by_std=False).view(-1, group_size)
    spread = ((ahead**2).sum(1, keepdim=True) / (group_size - 1) + eps).sqrt()
    return (ahead / spread if normalize_by_std else ahead).flatten()


def in_place(rewards, group_size, eps=1e-6, normalize_by_std=True):
    rewards.copy_(group_advantages(rewards, group_size, eps, normalize_by_std))
    return rewards


def no_refusal(rewards, group_size, eps=1e-6, normalize_by_std=True):
    return torch.zeros(4) if group_size < 2 else ours(rewards, group_size, eps, normalize_by_std)


def late_mask(change):
    """The planted one with `after`, (B, N), changed: half-fixes of where the mask should be."""

    def gae(rewards, values, mask, gamma=1.0, lam=0.95):
        after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
        after = change(after, values, mask)
        deltas = torch.where(mask, rewards + gamma * after - values, 0.0)
        advantages, ahead = torch.zeros_like(values), torch.zeros_like(values[:, 0])
        for t in reversed(range(values.shape[1])):
            ahead = (deltas[:, t] + gamma * lam * ahead) * mask[:, t]
            advantages[:, t] = ahead
        return advantages, torch.where(mask, advantages + values, 0.0)

    return gae


def the_last_itself(after, values, mask):
    """After the last token its own value again."""
    following = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    return torch.where(following, after, values)


def returns_of_padding(rewards, values, mask, gamma=1.0, lam=0.95):
    advantages, _ = gae(rewards, values, mask, gamma, lam)
    return advantages, advantages + values


def no_lam(rewards, values, mask, gamma=1.0, lam=0.95):
    return gae(rewards, values, mask, gamma, gamma)


def gspo(reduce=None, gain=None, count=None, beyond=None):
    """gspo_loss with a part changed."""

    def loss(log_probs, old_log_probs, advantages, mask, clip=3e-4, clip_high=4e-4):
        judged = mask.any(1)
        ratio = (
            reduce(log_probs - old_log_probs, mask)
            if reduce
            else masked_mean(log_probs - old_log_probs, mask, 1).exp()
        )
        clipped = ratio.clamp(1 - clip, 1 + clip_high)
        worth = torch.minimum(ratio * advantages, clipped * advantages)
        worth = gain(ratio, clipped, advantages) if gain else worth
        over = clipped * advantages < ratio * advantages
        over = beyond(ratio, clipped) if beyond else over
        if count:
            return -(worth * judged).sum() / count(mask), (over & judged).sum() / count(mask)
        return -masked_mean(worth, judged), masked_mean(over.float(), judged)

    return loss


def by_token(log_probs, old_log_probs, advantages, mask, clip=3e-4, clip_high=4e-4):
    return grpo_loss(log_probs, old_log_probs, advantages, mask, clip=clip, clip_high=clip_high)


def nan_where_nobody(log_probs, old_log_probs, advantages, mask, clip=3e-4, clip_high=4e-4):
    rows = [x[mask.any(1)] for x in (log_probs, old_log_probs, advantages, mask)]
    ratio = masked_mean(rows[0] - rows[1], rows[3], 1).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip_high)
    gain = torch.minimum(ratio * rows[2], clipped * rows[2])
    return -gain.mean(), (clipped * rows[2] < ratio * rows[2]).double().mean()


WRONG = {
    "pushes": [
        (-2.0, 1.25, 0.0, 0.0, 0.0, 0.0, 0.0),  # clamp alone, without min
        (-2.0, 0.0, -1.25, 0.0, -1.5, 0.75, 0.0),  # clip in both directions
        (-2.0, 1.25, -1.25, 0.0, -1.5, 0.75, -0.75),  # clip_high in both
        (0.0, 1.25, -1.25, 0.0, -1.5, 0.75, 0.0),
        (-2.0, 1.0, -1.0, 0.0, -1.0, 1.0, 0.0),  # without the ratio
        (2.0, -1.25, 1.25, 0.0, 1.5, -0.75, 0.0),  # of the loss
        (-2.0, 1.25, -1.25, 1.28, -1.5, 0.75, -0.8),  # the objective, not its derivative
        7,
    ],
    "group_advantages": [
        by_position, naive, without_nan, nan_is_zero, nan_is_no_worse, by_n, eps_inside, in_place,
        no_refusal,
    ],
    "gae": [
        late_mask(lambda after, values, mask: torch.where(mask, after, 0.0)),
        late_mask(the_last_itself),
        late_mask(lambda after, values, mask: after * 0),
        returns_of_padding,
        no_lam,
    ],
    "gspo_loss": [
        by_token,
        gspo(lambda gap, mask: (gap * mask).sum(1).exp()),  # not the root
        gspo(lambda gap, mask: gap.mean(1).exp()),  # with padding
        gspo(lambda gap, mask: masked_mean(gap.exp(), mask, 1)),  # arithmetic mean
        gspo(lambda gap, mask: masked_mean(gap, mask, 1).exp().detach()),
        gspo(gain=lambda ratio, clipped, advantages: clipped * advantages),
        gspo(gain=lambda ratio, clipped, advantages: torch.maximum(ratio, clipped) * advantages),
        gspo(beyond=lambda ratio, clipped: ratio != clipped),
        gspo(count=lambda mask: len(mask)),
        gspo(count=lambda mask: mask.sum().clamp(min=1)),
        nan_where_nobody,
    ],
    "kl_as_a_loss": [
        lambda: (distance(), "a"),
        lambda: (distance(), "c"),
        lambda: (distance(constant=False), "b"),
        lambda: (distance(which=0), "b"),
        lambda: (distance(cosine=True), "b"),
    ],
}  # fmt: skip
