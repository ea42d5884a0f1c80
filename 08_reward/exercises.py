"""Five exercises on reward.py. Fill in what is open, then: make exercise-08

A reward model learns from comparisons alone. What can go wrong is quiet: the loss falls all the
same. Read reward.py first; nothing here needs more than is in it.
"""

import torch
from reward import bradley_terry_loss

# ---- 1. Predict

tokens_read = None
"""A prompt of 40 tokens has three replies of 10, 25 and 15 tokens, ends included, each compared
with each. A tuple of three ints: how many tokens the example of encode_all holds with shared=True,
how many with shared=False, and, shared, the position (not the column) of the first token of the
third reply. Reading the prompt once is most of what makes this stage fast; positions are why it
changes nothing."""


# ---- 2. Fill in


def preference_loss(chosen, rejected, margin=0.0, label=1.0, centre=0.0):
    """The mean over pairs of -log P(chosen is preferred) in nats, a scalar: rewards (P,) each,
    where P = sigmoid(chosen - rejected - margin).

    margin, (P,) or a number: by how much the one has to be better. label, (P,) or a number: the
    probability that it is the better one; where it is not 1 the loss is the cross-entropy with it.
    centre times the squared sum of both rewards is added to each pair's loss. Without torch's
    logsigmoid and softplus. At differences of -1000 it must be exact: log(sigmoid(x)) is not."""
    ...


# ---- 3. Find the planted bug


def shaped(rewards, lengths, potentials, gamma=1.0):
    """Rewards of tokens, (B, T), from rewards (B,) of whole replies of `lengths` (B,) tokens and
    potentials (B, T), a number for the text before each token: the last token's is the reply's, and
    each gets gamma * potential after it minus potential before it (Ng, Harada and Russell 1999).

    Whatever the potentials are, the best policy should stay the best. With this one a policy learns
    to end wherever the potential happens to be high, though where every reply fills its row nothing
    is wrong."""
    steps = torch.arange(potentials.shape[1])  # (T,)
    inside, last = steps < lengths[:, None], steps == lengths[:, None] - 1  # (B, T)
    after = torch.cat([potentials[:, 1:], torch.zeros_like(potentials[:, :1])], dim=1)
    gained = torch.where(inside, gamma * after - potentials, 0.0)
    return gained + torch.where(last, rewards[:, None], 0.0)


# ---- 4. Extend


def ranking_loss(rewards):
    """The Plackett-Luce loss of whole rankings (Plackett 1975, doi 10.2307/2346567), a scalar.

    rewards (P, K): of K replies to each of P prompts, from the best to the worst as people ranked
    them. The ranking is drawn from the front: each place goes to one of the replies that are left,
    with the probability that a softmax over the rewards of those left gives it. The loss is -log of
    the ranking's probability in nats, mean over prompts. For K = 2 it is Bradley and Terry's. Four
    ranked replies make six pairs, but these are not independent: this counts a ranking once. It
    must be finite for rewards of 1000."""
    ...


# ---- 5. Measure and explain


def across_prompts():
    """How well does a reward model compare replies to different prompts?

    Rewards of 400 pairs are given, of a model that has learned them well: it orders the two replies
    to one prompt right nearly always. Return (share, letter): for all ordered pairs of different
    prompts (i, j), i not j, the share in which the chosen reply of i has a higher reward than the
    rejected reply of j, a float, and why it is what it is:

    a. it has seen too few pairs: more of them would bring it up to the accuracy within prompts
    b. the head has no bias, so rewards of long prompts are larger
    c. a number added to both rewards of a prompt changes no loss, so nothing fixes it (without
       centre)

    Who ranks prompts by reward, or puts one threshold on all, relies on what was never learned."""
    random = torch.Generator().manual_seed(0)
    chosen = torch.zeros(400, requires_grad=True)
    rejected = torch.zeros(400, requires_grad=True)
    prompt = 3 * torch.randn(400, generator=random)  # what the model has come to add for each
    for _ in range(300):
        loss = bradley_terry_loss(chosen + prompt, rejected + prompt)
        for x, slope in zip((chosen, rejected), torch.autograd.grad(loss, (chosen, rejected))):
            x.data -= 10 * slope
    better, worse = (chosen + prompt).detach(), (rejected + prompt).detach()  # (400,)
    share, letter = None, None  # yours: use better and worse
    return share, letter
