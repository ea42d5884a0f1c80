"""Answers to 08_reward/exercises.py, and in WRONG what the checks must not let pass."""

import torch
from reward import bradley_terry_loss
from torch.nn import functional as F

tokens_read = (40 + 10 + 25 + 15, 3 * 40 + 10 + 25 + 15, 40)


def preference_loss(chosen, rejected, margin=0.0, label=1.0, centre=0.0):
    ahead = chosen - rejected - margin
    zero = torch.zeros_like(ahead)
    right, wrong = torch.logaddexp(zero, -ahead), torch.logaddexp(zero, ahead)  # -log sigmoid
    return (label * right + (1 - label) * wrong + centre * (chosen + rejected) ** 2).mean()


def shaped(rewards, lengths, potentials, gamma=1.0):
    steps = torch.arange(potentials.shape[1])  # (T,)
    inside, last = steps < lengths[:, None], steps == lengths[:, None] - 1  # (B, T)
    before = torch.where(inside, potentials, 0.0)  # so that the one after the end is 0
    after = torch.cat([before[:, 1:], torch.zeros_like(before[:, :1])], dim=1)
    return gamma * after - before + torch.where(last, rewards[:, None], 0.0)


def ranking_loss(rewards):
    left = rewards.flip(1).logcumsumexp(1).flip(1)  # (P, K), of those from each place on
    return (left - rewards).sum(1).mean()


def pairs_of_400():
    random = torch.Generator().manual_seed(0)
    chosen = torch.zeros(400, requires_grad=True)
    rejected = torch.zeros(400, requires_grad=True)
    prompt = 3 * torch.randn(400, generator=random)
    for _ in range(300):
        loss = bradley_terry_loss(chosen + prompt, rejected + prompt)
        for x, slope in zip((chosen, rejected), torch.autograd.grad(loss, (chosen, rejected))):
            x.data -= 10 * slope
    return (chosen + prompt).detach(), (rejected + prompt).detach()


def across_prompts():
    better, worse = pairs_of_400()
    ahead = better[:, None] > worse[None]  # (400, 400)
    return ahead[~torch.eye(400, dtype=torch.bool)].float().mean().item(), "c"


def within():
    better, worse = pairs_of_400()
    return (better > worse).float().mean().item(), "c"


def with_themselves():
    better, worse = pairs_of_400()
    return (better[:, None] > worse[None]).float().mean().item(), "c"


def naive(chosen, rejected, margin=0.0, label=1.0, centre=0.0):
    p = torch.sigmoid(chosen - rejected - margin)
    loss = -(label * p.log() + (1 - label) * (1 - p).log())
    return (loss + centre * (chosen + rejected) ** 2).mean()


def added(chosen, rejected, margin=0.0, label=1.0, centre=0.0):
    return preference_loss(chosen, rejected, -margin, label, centre)


def unlabelled(chosen, rejected, margin=0.0, label=1.0, centre=0.0):
    return preference_loss(chosen, rejected, margin, 1.0, centre) * label


def weighted(chosen, rejected, margin=0.0, label=1.0, centre=0.0):
    ahead = chosen - rejected - margin
    right = torch.logaddexp(torch.zeros_like(ahead), -ahead)
    return (label * right + centre * (chosen + rejected) ** 2).mean()


def margin_both_ways(chosen, rejected, margin=0.0, label=1.0, centre=0.0):
    zero, lead = torch.zeros_like(chosen), chosen - rejected
    right, wrong = torch.logaddexp(zero, margin - lead), torch.logaddexp(zero, lead + margin)
    return (label * right + (1 - label) * wrong + centre * (chosen + rejected) ** 2).mean()


def clamped(chosen, rejected, margin=0.0, label=1.0, centre=0.0):
    p = torch.sigmoid(chosen - rejected - margin).clamp(1e-7, 1 - 1e-7)
    loss = -(label * p.log() + (1 - label) * (1 - p).log())
    return (loss + centre * (chosen + rejected) ** 2).mean()


def kinked(chosen, rejected, margin=0.0, label=1.0, centre=0.0):
    """Exact but for its gradient at a tie, -1 for -1/2."""
    x = chosen - rejected - margin

    def cost(x):
        return x.clamp(min=0) + (-x.abs()).exp().log1p()

    loss = label * cost(-x) + (1 - label) * cost(x)
    return (loss + centre * (chosen + rejected) ** 2).mean()


def uncentred(chosen, rejected, margin=0.0, label=1.0, centre=0.0):
    plain = bradley_terry_loss(chosen, rejected, margin, label)
    return plain + centre * (chosen**2 + rejected**2).mean()


def no_shift(rewards, lengths, potentials, gamma=1.0):
    """The half-fix: what comes after the last token is 0, but pads keep their own."""
    steps = torch.arange(potentials.shape[1])
    last = steps == lengths[:, None] - 1
    after = torch.cat([potentials[:, 1:], torch.zeros_like(potentials[:, :1])], dim=1)
    after = torch.where(last, 0.0, after)
    return gamma * after - potentials + torch.where(last, rewards[:, None], 0.0)


def keeps_first(rewards, lengths, potentials, gamma=1.0):
    """Masks the sum, not the potential after the last token."""
    out = shaped(rewards, lengths, potentials, gamma)
    last = torch.arange(potentials.shape[1]) == lengths[:, None] - 1
    return out + torch.where(last, potentials, 0.0)


def every_pair(rewards):
    K = rewards.shape[1]
    losses = [
        bradley_terry_loss(rewards[:, i], rewards[:, j]) for i in range(K) for j in range(i + 1, K)
    ]
    return sum(losses)


def all_left(rewards):
    return -rewards.log_softmax(1)[:, :-1].sum(1).mean()


def mean_of_places(rewards):
    return ranking_loss(rewards) / (rewards.shape[1] - 1)


def from_the_back(rewards):
    return ranking_loss(-rewards.flip(1))  # the worst is drawn first: another model


def without_gradient(rewards):
    return ranking_loss(rewards).detach()


def overflowing(rewards):
    left = rewards.exp().flip(1).cumsum(1).flip(1).log()
    return (left - rewards).sum(1).mean()


def first_only(rewards):
    return F.cross_entropy(rewards, torch.zeros(len(rewards), dtype=torch.long))


WRONG = {
    "tokens_read": [(90, 170, 75), (90, 130, 40), (170, 90, 40), (90, 170)],
    "preference_loss": [
        naive,
        added,
        unlabelled,
        weighted,
        margin_both_ways,
        clamped,
        kinked,
        uncentred,
    ],
    "shaped": [no_shift, keeps_first],
    "ranking_loss": [
        every_pair,
        all_left,
        overflowing,
        first_only,
        mean_of_places,
        from_the_back,
        without_gradient,
        lambda rewards: ranking_loss(rewards.flip(1)),
    ],
    "across_prompts": [
        within,
        with_themselves,
        lambda: (across_prompts()[0], "a"),
        lambda: ("most", "c"),
    ],
}
