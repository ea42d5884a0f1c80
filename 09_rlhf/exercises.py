"""Five exercises on rlhf.py. Fill in what is open, then: make exercise-09

Each stands for something that goes wrong, or that people get wrong, when they teach a model by
rewards. Read rlhf.py first; nothing here needs more than is in it. The checks say what differs and
give a hint.
"""

import torch
from rlhf import kl_estimates

# ---- 1. Predict

pushes = None
"""How hard does PPO push each of these seven tokens? ratio is what a token has by now, its
probability over the one that it was drawn with; clip is 0.2 and clip_high is 0.28.

    ratio        1.0   1.25   1.25   1.5   1.5   0.75   0.75
    advantage   -2.0    1.0   -1.0   1.0  -1.0    1.0   -1.0

A tuple of seven numbers, worked out on paper: for each token the derivative of what ppo_loss gives,
with the sign turned and a total of 1, by the token's log_prob. Above 0 it is made likelier, below 0
less likely, 0 leaves it alone. In the first step of a round every ratio is 1: what does the clip
do there?"""


# ---- 2. Fill in


def group_advantages(rewards, group_size, eps=1e-6, normalize_by_std=True):
    """What GRPO learns from: each of rewards, float (B,), less the mean of its group, over the
    group's standard deviation (that with n - 1) plus eps. (B,), and every one of them finite.

    The first group_size rewards are of replies to one prompt, the next group_size to another.
    Without normalize_by_std it is the reward less the mean and no more. A reward that is NaN is of
    a reply that could not be judged: it counts in neither mean nor deviation and gets 0; a reply
    whose group has no other that was judged gets 0, too. A group of equal rewards gets 0 exactly:
    there is nothing to choose, and a rounding error over eps is no small number. ValueError for a
    group_size below 2: nothing can be compared there. `rewards` stays as it is."""
    ...


# ---- 3. Find the planted bug


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimates and returns, (B, N) each, as in rlhf.py: rewards and values
    float (B, N), mask bool (B, N), True for the tokens of a reply from the first to the last, which
    ends it: what comes after is worth 0. values are from a head that has gone over the padding,
    too: what stands in there is finite, and nothing else can be said of it. (rlhf.py's `score` puts
    0 there; not everybody's does.) rewards and values stay as they are.

    It runs, the longest reply gets what it should, padding gets 0, PPO learns. But a short reply
    is worth more or less depending on what stands behind its end, the last token most of all."""
    rewards = torch.where(mask, rewards, 0.0)
    after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)  # (B, N)
    deltas = torch.where(mask, rewards + gamma * after - values, 0.0)
    advantages, ahead = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        ahead = deltas[:, t] + gamma * lam * ahead
        advantages[:, t] = ahead
    return advantages, torch.where(mask, advantages + values, 0.0)


# ---- 4. Extend


def gspo_loss(log_probs, old_log_probs, advantages, mask, clip=3e-4, clip_high=4e-4):
    """(loss, clip fraction) of GSPO (Zheng et al. 2025, arXiv 2507.18071), scalars.

    GRPO's advantage is of a whole reply, its ratio of a token. Here a reply has one ratio: the
    geometric mean of those of its tokens, exp of the mean of log_probs - old_log_probs over the
    tokens of the reply. That counts down to 1 - clip and up to 1 + clip_high as in PPO, by the
    sign of the advantage. The loss is minus the mean over replies of ratio times advantage; the
    clip fraction, which carries no gradient, the share of replies that are beyond: their gradient
    is 0.

    log_probs, old_log_probs float (B, N), mask bool (B, N), advantages float (B,). What stands
    where mask is False is finite and does not count. A reply without a token, one that could not be
    judged, is none of the replies of both means; where there is no other, both are 0.

    Why: a token's ratio is a sample of one, and in a mixture of experts it jumps when the router
    sends the token elsewhere. The mean over a reply is calm, so its clip is so narrow."""
    ...


# ---- 5. Measure and explain


def kl_as_a_loss():
    """Three estimates of the KL, each with about the right mean. And their gradients in a loss?

    Tokens are drawn from the policy, softmax of `logits`, and the mean of an estimate over them is
    the loss. Over very many draws its gradient by logits comes to the mean over all ids of the
    gradient of an id's estimate, weighted by how likely the id is drawn. A draw passes no gradient
    on: as far as backward() knows the weights are constants.

    Return (distance, letter). distance: how far the gradient so made of k3, the estimate that
    grpo_loss uses, is from that of the exact KL(policy || reference), the sum over ids of
    p (log p - log q): the length of their difference over the length of the latter, a float. And
    the letter of what is true of k2 (measure the other two as well):

    a. k2's is that of KL(policy || reference) but off a little, as the mean of k2 is
    b. k2's is that of KL(policy || reference), although the mean of k2 is off
    c. k2's is half of that of KL(policy || reference), as k2 is half a square

    What is right as a number is not yet right as a loss."""
    torch.manual_seed(0)
    logits = torch.randn(8, dtype=torch.float64, requires_grad=True)  # (V,)
    reference = (logits.detach() + torch.randn(8, dtype=torch.float64)).log_softmax(0)  # log q
    k1, k2, k3 = kl_estimates(logits.log_softmax(0), reference)  # (V,) each
    distance, letter = None, None  # yours: torch.autograd.grad(loss, logits, retain_graph=True)
    return distance, letter
