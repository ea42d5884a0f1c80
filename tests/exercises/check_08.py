"""Checks of 08_reward/exercises.py."""

import reward
import torch
from check import Differs, measured, same

SHIPPED = "c0e529a8"  # shaped as it came, which is no try yet


def tokens_read(answer):
    hint = "shared, the prompt stands there once; else once before each reply. Every reply follows "
    same(answer, (90, 170, 40), hint + "the prompt directly, wherever its tokens lie")


def _pairs():
    torch.manual_seed(0)
    return torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)


def preference_loss(answer):
    chosen, rejected = _pairs()
    wanted = reward.bradley_terry_loss
    hint = "-log sigmoid(x) of x = chosen - rejected is log(1 + exp(-x)), the mean over pairs"
    same(answer(chosen, rejected), wanted(chosen, rejected), hint)
    margin = torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    hint = "a margin is taken off the lead: a pair that leads by just the margin is at log 2"
    same(answer(chosen, rejected, margin), wanted(chosen, rejected, margin), hint)
    label = torch.tensor([1.0, 0.5, 0.9, 0.0, 0.7], dtype=torch.float64)
    hint = "with probability 1 - label the other is the better one: its -log P counts by that"
    same(answer(chosen, rejected, label=label), wanted(chosen, rejected, label=label), hint)
    both = dict(margin=0.3, label=0.8)
    hint = "the margin stands in both terms of the cross-entropy alike"
    same(answer(chosen, rejected, **both), wanted(chosen, rejected, **both), hint)
    hint = "centre times (chosen + rejected) squared, once a pair"
    same(answer(chosen, rejected, centre=0.1), wanted(chosen, rejected, centre=0.1), hint)
    far = torch.tensor([-1000.0, 1000.0, 90.0, -90.0])
    hint = "exp overflows for large numbers and 1 + exp(-90) is 1: look at what logaddexp does"
    for label in (1.0, 0.25):
        got, right = (f(far, torch.zeros(4), label=label) for f in (answer, wanted))
        same(got, right, hint)
    for x in (-1000.0, 1000.0, 0.3, 0.0):
        x = torch.tensor([x], requires_grad=True)
        loss = answer(x, torch.zeros(1))
        if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
            raise Differs("no gradient comes back. Hint: stay with tensors, without .item()")
        (got,) = torch.autograd.grad(loss, x)
        (right,) = torch.autograd.grad(wanted(x, torch.zeros(1)), x)
        hint = "the gradient is sigmoid(x) - 1: finite where the loss is large, and -1/2 at a tie, "
        same(got, right, hint + "where training begins (a clamp at 0 cuts it there)")


def shaped(answer):
    torch.manual_seed(0)
    rewards, potentials = torch.randn(4).double(), torch.randn(4, 6).double()
    lengths = torch.tensor([6, 1, 3, 5])
    given = (rewards.clone(), lengths.clone(), potentials.clone())
    for gamma in (1.0, 0.9):
        got = answer(rewards, lengths, potentials, gamma)
        if not isinstance(got, torch.Tensor) or got.shape != (4, 6):
            raise Differs("it is to return a tensor (B, T)")
        discount = gamma ** torch.arange(6).double()
        total = (discount * got).sum(1)
        plain = rewards * gamma ** (lengths - 1)
        hint = (
            "over a whole reply the potentials telescope to minus the first: what is after the end?"
        )
        same(total - plain, -potentials[:, 0], hint)
        wanted = reward.shape_reward(rewards, lengths, potentials=potentials, gamma=gamma)
        same(got, wanted, "each token has its own share, and tokens after the end have 0")
    if any(not torch.equal(a, b) for a, b in zip(given, (rewards, lengths, potentials))):
        raise Differs("it has changed what it was given. Hint: torch.where makes a new tensor")


def ranking_loss(answer):
    torch.manual_seed(0)
    rewards = torch.randn(7, 2)
    two = reward.bradley_terry_loss(*rewards.T)
    same(
        answer(rewards), two, "with two replies it is the Bradley-Terry loss, the mean over prompts"
    )
    hint = "equal rewards make every ranking equally likely: 1/24 for four replies"
    same(answer(torch.zeros(3, 4)), torch.tensor(24.0).log(), hint)
    rewards = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]]).log1p()  # weights 3 2 1, then 1 2 4
    wanted = -torch.tensor([3 / 6 * 2 / 3, 1 / 7 * 2 / 6]).log().mean()
    hint = "whoever has a place is no longer among those left: a softmax over one fewer each time"
    same(answer(rewards), wanted, hint)
    same(
        answer(rewards + 1000), wanted, "a number added to all must change nothing: logsumexp", 1e-3
    )
    far = torch.tensor([[-1000.0, 0.0, 1000.0]])
    same(answer(far), torch.tensor(3000.0), "it has to be finite: logsumexp, not exp")
    leaf = rewards.clone().requires_grad_()
    loss = answer(leaf)
    if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
        raise Differs("no gradient comes back. Hint: stay with tensors, without .item() and detach")
    (slope,) = torch.autograd.grad(loss, leaf)
    same(slope.sum(1), torch.zeros(2), "the gradient of each ranking sums to 0", 1e-4)


def across_prompts(answer):
    share, letter = measured(answer(), "share", "better[:, None] > worse[None], less i == j")
    hint = "all 400 x 399 ordered pairs of different prompts, and of those the share"
    same(share, _share(), hint, tolerance=1e-4)
    same(
        letter, "c", "how does the loss change when a number is added to both rewards of a prompt?"
    )


def _share():
    random = torch.Generator().manual_seed(0)
    chosen, rejected = torch.zeros(400), torch.zeros(400)
    prompt = 3 * torch.randn(400, generator=random)
    for _ in range(300):
        slope = -torch.sigmoid(rejected - chosen) / 400  # of the loss, by chosen
        chosen, rejected = chosen - 10 * slope, rejected + 10 * slope
    ahead = (chosen + prompt)[:, None] > (rejected + prompt)[None]  # (400, 400)
    return ahead[~torch.eye(400, dtype=torch.bool)].float().mean().item()
