"""Answers to 06_moe/exercises.py, and in WRONG what the checks must not let pass."""

import torch
from moe import MoE, MoEConfig, count
from torch.nn import functional as F

# In each block attention (q, k, v, out and the norms of q and k) and two norms; a dense MLP and a
# mixture (router, shared expert, experts); the embedding and the last norm.
attention = 4 * 32 * 32 + 2 * 8
mlp, router, expert = 3 * 32 * 96, 8 * 32, 3 * 32 * 48
active = 1000 * 32 + 2 * (attention + 2 * 32) + mlp + router + (1 + 2) * expert + 32
parameters = (active + 6 * expert, active)


def loop(experts, x, chosen, weights):
    y = torch.zeros_like(x)
    for e in range(len(experts.gate)):
        for j in range(chosen.shape[1]):  # a token is in chosen[:, j] once
            rows = (chosen[:, j] == e).nonzero()[:, 0]  # (n,)
            h = F.silu(x[rows] @ experts.gate[e].T) * (x[rows] @ experts.up[e].T)  # (n, F)
            out = (h @ experts.down[e].T) * weights[rows, j, None]  # (n, C)
            y = y.index_add(0, rows, out.to(y.dtype))
    return y


def balance_loss(logits, top_k):
    E = logits.shape[1]
    probs = logits.softmax(-1)  # (N, E)
    chosen = probs.topk(top_k).indices  # (N, k)
    share = count(chosen, E) / chosen.numel()  # (E,)
    return E * (share * probs.mean(0)).sum()


def expert_choice(logits, capacity):
    N, E = logits.shape
    scores = logits.softmax(-1)  # (N, E)
    tokens = scores.topk(min(capacity, N), dim=0).indices  # (capacity, E)
    taken = torch.zeros(N, E, dtype=torch.bool).scatter(0, tokens, True)
    return torch.where(taken, torch.arange(E), E), scores * taken


def measure(**changes):
    torch.manual_seed(0)
    shape = dict(vocab_size=64, d_model=32, n_layers=1, n_heads=2, d_expert=32)
    layer = MoE(MoEConfig(**shape | dict(n_experts=8, top_k=2) | changes))
    x = torch.randn(4, 16, 32) + 4 * torch.randn(32)
    gradient = torch.autograd.grad(layer(x).square().mean(), layer.router.weight)[0].abs()
    return (gradient.amax(1) > gradient.max() / 1000).sum().item()


def experts_that_learn():
    return measure(), "b"


# ---- what goes wrong


def one_expert(experts, rows, e):
    return F.linear(F.silu(F.linear(rows, experts.gate[e])) * F.linear(rows, experts.up[e]),
                    experts.down[e])  # fmt: skip


def overwrites(experts, x, chosen, weights):
    y = torch.zeros_like(x)
    for e in range(len(experts.gate)):
        rows, j = torch.where(chosen == e)
        y[rows] = (one_expert(experts, x[rows], e) * weights[rows, j, None]).to(y.dtype)
    return y


def adds_in_place(experts, x, chosen, weights):
    """Right but for a token that names an expert twice."""
    y = torch.zeros_like(x)
    for e in range(len(experts.gate)):
        rows, j = torch.where(chosen == e)
        y[rows] += (one_expert(experts, x[rows], e) * weights[rows, j, None]).to(y.dtype)
    return y


def first_weight_for_all(experts, x, chosen, weights):
    return loop(experts, x, chosen, weights[:, :1].expand_as(weights))


def last_takes_the_dropped(experts, x, chosen, weights):
    return loop(experts, x, chosen.clamp(max=len(experts.gate) - 1), weights)


def past_the_end(experts, x, chosen, weights):
    rows = [
        sum(one_expert(experts, x[n], e) * w for e, w in zip(chosen[n].tolist(), weights[n]))
        for n in range(len(x))
    ]
    return torch.stack(rows) if rows else torch.zeros_like(x)


def stacked(experts, x, chosen, weights):
    """Fails without a token."""
    chosen = chosen.tolist()
    rows = [
        sum(
            (one_expert(experts, x[n], e) * w for e, w in zip(chosen[n], weights[n]) if e < 4),
            0 * x[n],
        )
        for n in range(len(x))
    ]
    return torch.stack(rows).to(x.dtype)


def promotes(experts, x, chosen, weights):
    return loop(experts, x, chosen, weights).to(weights.dtype)


def gate_and_up_swapped(experts, x, chosen, weights):
    y = torch.zeros_like(x)
    for e in range(len(experts.gate)):
        rows, j = torch.where(chosen == e)
        h = F.linear(x[rows], experts.gate[e]) * F.silu(F.linear(x[rows], experts.up[e]))
        out = F.linear(h, experts.down[e]) * weights[rows, j, None]
        y = y.index_add(0, rows, out.to(y.dtype))
    return y


def still_cut_off(logits, top_k):
    """A leaf that has a gradient of its own, which goes nowhere."""
    return balance_loss(logits.detach(), top_k).requires_grad_()


def over_the_tokens(logits, top_k):
    probs, chosen = logits.softmax(0), logits.topk(top_k).indices
    share = count(chosen, logits.shape[1]) / chosen.numel()
    return logits.shape[1] * (share * probs.mean(0)).sum()


def soft_twice(logits, top_k):
    probs = logits.softmax(-1).mean(0)
    return logits.shape[1] * probs.square().sum()


def right_value_wrong_gradient(logits, top_k):
    """Counts stand in for themselves, and the gradient is that of the soft square."""
    soft = soft_twice(logits, top_k)
    return balance_loss(logits, top_k).detach() + soft - soft.detach()


def only_the_chosen(logits, top_k):
    E, probs = logits.shape[1], logits.softmax(-1)
    chosen = probs.topk(top_k).indices
    share = count(chosen, E) / chosen.numel()
    kept = torch.zeros_like(probs).scatter(1, chosen, probs.gather(1, chosen))
    return E * (share * kept.mean(0)).sum()


def by(scores, taken):
    return torch.where(taken, torch.arange(scores.shape[1]), scores.shape[1]), scores * taken


def best(scores, capacity):
    tokens = scores.topk(min(capacity, len(scores)), dim=0).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(0, tokens, True)


def by_logits(logits, capacity):
    return by(logits.softmax(-1), best(logits, capacity))


def softmax_over_tokens(logits, capacity):
    return by(logits.softmax(0), best(logits.softmax(0), capacity))


def more_than_there_are(logits, capacity):
    scores = logits.softmax(-1)
    tokens = scores.topk(capacity, dim=0).indices
    return by(scores, torch.zeros_like(scores, dtype=torch.bool).scatter(0, tokens, True))


def renormalised(logits, capacity):
    chosen, weights = expert_choice(logits, capacity)
    return chosen, weights / (weights.sum(1, keepdim=True) + 1e-20)


def tokens_choose(logits, capacity):
    scores = logits.softmax(-1)
    chosen = scores.topk(min(capacity, scores.shape[1])).indices
    return by(scores, torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True))


def detached(logits, capacity):
    chosen, weights = expert_choice(logits, capacity)
    return chosen, weights.detach()


def forgets_to_say_none(logits, capacity):
    chosen, weights = expert_choice(logits, capacity)
    return torch.arange(logits.shape[1]).expand_as(chosen), weights


WRONG = {
    "parameters": [
        91_328,
        (parameters[0] + 32_000, parameters[1]),  # an output layer of its own
        (parameters[0], parameters[1] - expert),  # without the shared expert
        (parameters[0], parameters[0] // 4),
        (parameters[0] - 32, parameters[1] - 32),  # qk_norm left out
        (parameters[0] + 8, parameters[1] + 8),  # the router's bias, a buffer
    ],
    "loop": [
        overwrites,
        adds_in_place,
        first_weight_for_all,
        last_takes_the_dropped,
        past_the_end,
        stacked,
        promotes,
        gate_and_up_swapped,
        lambda *args: loop(*args).detach(),
        lambda experts, x, chosen, weights: loop(experts, x, chosen, weights.detach()),
        lambda experts, x, chosen, weights: loop(experts, x, chosen, torch.ones_like(weights)),
    ],
    "balance_loss": [
        still_cut_off,
        over_the_tokens,
        soft_twice,
        right_value_wrong_gradient,
        only_the_chosen,
        lambda logits, top_k: balance_loss(logits, top_k) * top_k,
    ],
    "expert_choice": [
        by_logits,
        softmax_over_tokens,
        more_than_there_are,
        renormalised,
        tokens_choose,
        detached,
        forgets_to_say_none,
        lambda logits, capacity: expert_choice(logits, capacity)[::-1],
        lambda logits, capacity: expert_choice(logits, capacity)[0],
    ],
    "experts_that_learn": [
        lambda: (measure(), "a"),
        lambda: (measure(), "c"),
        lambda: (8, "b"),
        lambda: (measure(renormalize=False), "b"),
    ],
}
