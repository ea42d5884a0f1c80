"""Learning from rewards: REINFORCE, RLOO, PPO, GRPO and DPO on a small language model.

What this stage teaches: a model can learn from its own replies when something says how good they
are. Each round draws replies (a prompt is read once for a group of them), has them judged, and
makes what was better than expected likelier. The methods differ in what is expected: the batch's
mean (REINFORCE), the mean of the others in the group (RLOO), a value learned for each token (PPO),
the group's mean and spread (GRPO). Two things keep it from falling over: a limit on how far a
token's probability may move in a round, and a price on the distance to the model it began as.
DPO comes without rewards and without drawing: pairs of replies are enough.

Parent: 08_reward/reward.py (Whitening, shape_reward)
New: Rollout, rollout, select, token_log_probs, entropy, masked_mean, lay_out, Scores, kl_estimates,
    reinforce_loss, rloo_advantages, masked_var, whiten, gae, ppo_loss, value_loss, KLController,
    group_advantages, grpo_loss, dpo_loss, ActorCritic, RLConfig, batch_of, score_all,
    advantages_of, learn, judge_pairs, learn_pairs
Changed: score, evaluate, train

Read in this order: rollout and what it draws with; score, which says what a policy thinks of a
reply; the KL estimates; then an advantage and a loss for each method, from REINFORCE to DPO; last
one round and the loop around it. shape_reward is 08's. Beside it: policy.py is the model,
rewards.py and tasks.py say what is wanted and what is asked, curves.py draws; begin.py, turns.py,
descent.py and exchange.py are 08's inputs, chats, optim and formats.

Papers
- REINFORCE: Williams 1992, doi 10.1007/BF00992696; RLOO: Kool et al. 2019 (ICLR workshop), for
  language models Ahmadian et al. 2024, arXiv 2402.14740
- PPO: Schulman et al. 2017, arXiv 1707.06347; GAE: 2015, 1506.02438; on language models with a KL
  penalty and its controller: Ziegler et al. 2019, 1909.08593
- GRPO: Shao et al. 2024, arXiv 2402.03300; Dr. GRPO: Liu et al. 2025, 2503.20783; DAPO: Yu et al.
  2025, 2503.14476
- DPO: Rafailov et al. 2023, arXiv 2305.18290; IPO: Azar et al. 2023, 2310.12036
- KL estimates: Schulman 2020, joschu.net/blog/kl-approx.html
- Over-optimisation: Gao, Schulman and Hilton 2022, arXiv 2210.10760

Shapes: P prompts, B replies (P groups of G next to one another), N tokens of the longest reply, R
rows and T tokens of a batch, C = d_model, V vocab.
"""

import math
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from descent import clip_gradients, load_state, lr_schedule, optimizers_of, save_state
from policy import KVCache, Layout, check_length, next_probs, pad
from torch import nn
from torch.nn import functional as F

# ---- drawing replies


class Rollout(NamedTuple):
    """Replies to prompts, groups of them next to one another, padded on the right."""

    prompts: list  # of ids, a list for each group
    ids: torch.Tensor  # int64 (B, N), the replies
    mask: torch.Tensor  # bool (B, N): their tokens, one at least; what ends a reply is one
    log_probs: torch.Tensor  # float32 (B, N), of the distribution that drew them; else 0
    ended: torch.Tensor  # bool (B,): the reply ended by itself

    def groups(self, numbers):
        """The Rollout of these groups, int64 (n,), and the rows of their replies, (n * G,)."""
        G = len(self.ids) // len(self.prompts)
        rows = (numbers[:, None] * G + torch.arange(G)).flatten()
        return Rollout([self.prompts[i] for i in numbers], *(x[rows] for x in self[1:])), rows


def select(cache, rows):
    """Keep these rows of a KVCache, int64 (n,), in this order; one may be kept several times."""
    cache.k, cache.v = ([x[rows] for x in part] for part in (cache.k, cache.v))
    if cache.pads is not None:
        cache.pads = cache.pads[rows]


@torch.no_grad()
def rollout(
    model, prompts, max_new_tokens, stop_tokens, group_size=1, temperature=1.0, top_k=None,
    top_p=None, generator=None,
):  # fmt: skip
    """Draw group_size replies to each of prompts, lists of ids: a Rollout. Temperature 0 takes the
    likeliest tokens.

    A prompt is read once for its group, and replies that have ended leave the batch: nothing is
    computed that is not used. Raises ValueError where prompt and reply do not fit the context."""
    weight, training = model.token_embedding.weight, model.training
    ids, pads = pad(prompts, weight.device)  # (P, T), on the left
    total = check_length(ids.shape[1], max_new_tokens, model.config)
    low, kind = weight.dtype, weight.device.type
    if torch.is_autocast_enabled(kind):  # in which keys and values come
        low = torch.get_autocast_dtype(kind)
    cache = KVCache(model.config, len(ids), total, pads, weight.device, low)
    model.eval()
    logits = model.prefill(ids, cache)  # (P, V)
    rows = torch.arange(len(ids), device=ids.device).repeat_interleave(group_size)  # (B,)
    select(cache, rows)
    logits, stops = logits[rows], torch.tensor(sorted(stop_tokens), device=ids.device)
    drawn = torch.zeros(len(rows), max_new_tokens, dtype=torch.int64, device=ids.device)
    log_probs = torch.zeros(drawn.shape, device=ids.device)
    lengths = torch.full((len(rows),), max_new_tokens, device=ids.device)
    ended = torch.zeros(len(rows), dtype=torch.bool, device=ids.device)
    alive = torch.arange(len(rows), device=ids.device)  # replies that are still being written
    for n in range(max_new_tokens):
        probs = next_probs(logits, temperature, top_k, top_p)  # (alive, V)
        below = probs.cumsum(-1)  # one number a row decides; multinomial would draw V of them
        point = torch.rand(len(probs), 1, device=ids.device, generator=generator) * below[:, -1:]
        new = torch.searchsorted(below, point, right=True)  # (alive, 1), never of probability 0
        drawn[alive, n], log_probs[alive, n] = new[:, 0], probs.gather(1, new)[:, 0].log()
        over = torch.isin(new[:, 0], stops)
        ended[alive[over]], lengths[alive[over]] = True, n + 1
        if over.all() or n + 1 == max_new_tokens:
            break
        if over.any():
            going = (~over).nonzero()[:, 0]
            alive, new = alive[going], new[going]
            select(cache, going)
        logits = model.prefill(new, cache)
    model.train(training)
    N = int(lengths.max())
    mask = torch.arange(N, device=ids.device) < lengths[:, None]  # (B, N)
    return Rollout(list(prompts), drawn[:, :N], mask, log_probs[:, :N], ended)


# ---- what a policy thinks of replies


def token_log_probs(logits, ids, temperature=1.0, top_k=None, top_p=None):
    """Log-probabilities, float32 (...), of ids (...) under the distribution that these settings
    draw from, for logits (..., V) of what comes before them.

    A token that was drawn stays among the top_k or top_p where the policy has moved on and would
    not draw it any more: with probability 0 it could not be learned from."""
    scaled = logits.float() if temperature == 1 else logits.float() / temperature
    if top_k is not None or top_p is not None:
        with torch.no_grad():
            kept = next_probs(logits.reshape(-1, logits.shape[-1]), temperature, top_k, top_p) > 0
            kept = kept.view(logits.shape).scatter(-1, ids[..., None], True)
        scaled = scaled.masked_fill(~kept, -math.inf)
    flat = scaled.reshape(-1, scaled.shape[-1])
    return -F.cross_entropy(flat, ids.reshape(-1), reduction="none").view(ids.shape)


def entropy(logits):
    """Entropy in nats of softmax(logits), (..., V) to (...)."""
    log_probs = logits.float().log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def masked_mean(x, mask, dim=None):
    """Mean of x where mask is True, over all or one dimension; 0 where it is True nowhere."""
    kept = torch.where(mask, x, 0.0)
    total, count = (kept.sum(), mask.sum()) if dim is None else (kept.sum(dim), mask.sum(dim))
    return total / count.clamp(min=1)


def lay_out(rollout, row_tokens):
    """(ids, layout, rows, before): rows (R, T) of a prompt with replies to it as branches, as many
    as fit into row_tokens; the row of each reply, (B,), and the column of what stands before each
    of their tokens, (B, N): there it is predicted. The last token of a reply predicts nothing and
    is left out."""
    lengths, replies = rollout.mask.sum(1).tolist(), rollout.ids.tolist()
    G, texts, rows = len(lengths) // len(rollout.prompts), [], []
    before = np.zeros(rollout.ids.shape, np.int64)
    for b, n in enumerate(lengths):
        prompt = rollout.prompts[b // G]
        if b % G == 0 or len(texts[-1][0]) + n > row_tokens:
            texts.append(([*prompt], [*range(len(prompt))], [0] * len(prompt)))
        ids, positions, branches = texts[-1]
        before[b, 0], before[b, 1:n] = len(prompt) - 1, range(len(ids), len(ids) + n - 1)
        ids += replies[b][: n - 1]
        positions += range(len(prompt), len(prompt) + n - 1)
        branches += [b + 1] * (n - 1)
        rows.append(len(texts) - 1)
    arrays = np.zeros((4, len(texts), max(len(ids) for ids, _, _ in texts)), np.int64)
    arrays[3] = -1  # padding is no document's
    for r, text in enumerate(texts):
        arrays[:3, r, : len(text[0])], arrays[3, r, : len(text[0])] = text, 0
    device = rollout.ids.device
    ids, positions, branches, documents = torch.from_numpy(arrays).to(device)
    rows, before = torch.tensor(rows, device=device), torch.from_numpy(before).to(device)
    return ids, Layout(positions, documents, branches), rows, before


class Scores(NamedTuple):
    """What a policy thinks of the tokens of a Rollout, float32 (B, N) each, 0 where there is none;
    None what was not asked for. entropies are in nats, of the whole distribution."""

    log_probs: torch.Tensor | None = None
    values: torch.Tensor | None = None
    entropies: torch.Tensor | None = None


def score(
    model, rollout, temperature=1.0, top_k=None, top_p=None, value=None, log_probs=True,
    entropies=False,
):  # fmt: skip
    """The Scores of a Rollout by a TransformerLM and, where given, a value head (C to 1): its
    log_probs are those of the settings that drew it."""
    ids, layout, rows, before = lay_out(rollout, model.config.context_length)
    mask = rollout.mask
    x = model.hidden(ids, layout=layout)[rows[:, None], before][mask]  # (tokens, C)

    def place(found):
        return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, found.float())

    values = None if value is None else place(value(x)[:, 0])
    if not log_probs:
        return Scores(values=values)
    logits, drawn = model.output(x), rollout.ids[mask]  # (tokens, V), (tokens,)
    found = place(token_log_probs(logits, drawn, temperature, top_k, top_p))
    return Scores(found, values, place(entropy(logits)) if entropies else None)


def kl_estimates(log_probs, reference):
    """Three estimates of KL(policy || reference) at tokens that the policy drew, each as log_probs
    and reference, their log-probabilities under both (Schulman 2020).

    k1 = log p - log q has the right mean and is often negative; k2 = k1^2 / 2 never is, and is off
    a little; k3 = q/p - 1 + k1 never is and has the right mean. In a loss their gradients
    count: k1's mean is 0, it belongs into the reward; k3's is that of KL(reference || policy)."""
    k1 = log_probs - reference
    return k1, k1**2 / 2, (-k1).exp() - 1 + k1


# ---- REINFORCE and RLOO


def reinforce_loss(log_probs, advantages, mask, total=None):
    """Minus the sum of log_probs times advantages, (B, N) each, where mask is True, over `total`:
    the number of tokens in all micro-batches (None: in this). Its gradient is that of the expected
    reward (Williams 1992)."""
    total = mask.sum().clamp(min=1) if total is None else total
    return -(log_probs * advantages * mask).sum() / total


def rloo_advantages(rewards, group_size):
    """Each reward less the mean of the others in its group: (B,) to (B,) (Kool et al. 2019). A
    reward that is NaN, of a reply that could not be judged, is no other's and gets 0."""
    if group_size < 2:
        raise ValueError(f"group_size {group_size}: a group needs 2 replies, one and its others")
    groups = rewards.view(-1, group_size)
    n = (~groups.isnan()).sum(1, keepdim=True)
    others = (groups.nansum(1, keepdim=True) - groups) / (n - 1).clamp(min=1)
    return torch.where(n > 1, groups - others, 0.0).nan_to_num(0.0).flatten()


# ---- PPO


def masked_var(x, mask):
    """Variance of x where mask is True."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def whiten(x, mask):
    """x less its mean where mask is True, over its standard deviation there; 0 elsewhere."""
    ahead = x - masked_mean(x, mask)
    return torch.where(mask, ahead / (masked_var(x, mask).sqrt() + 1e-8), 0.0)


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimates and returns, (B, N) each (Schulman et al. 2015).

    rewards and values (B, N) of tokens where mask is True, from the first on; after the last the
    value is 0. advantage[t] = delta[t] + gamma lam advantage[t + 1], delta[t] = reward[t] + gamma
    value[t + 1] - value[t]; returns are advantages plus values: what the values should be."""
    values = torch.where(mask, values, 0.0)
    after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = torch.where(mask, rewards + gamma * after - values, 0.0)
    advantages, ahead = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        ahead = deltas[:, t] + gamma * lam * ahead
        advantages[:, t] = ahead
    return advantages, advantages + values


def ppo_loss(log_probs, old_log_probs, advantages, mask, clip=0.2, clip_high=None, total=None):
    """(loss, clip fraction) of PPO's clipped objective (Schulman et al. 2017), scalars.

    log_probs under the policy as it is now, old_log_probs under the one that drew, advantages:
    (B, N) each, where mask is True. Their ratio counts up to 1 + clip_high (None: clip) where the
    advantage is positive and down to 1 - clip where it is negative: what is beyond has no gradient.
    The sum is divided by `total`, the tokens of all micro-batches (None: of this). clip fraction:
    how many of the tokens are beyond."""
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    total = mask.sum().clamp(min=1) if total is None else total
    beyond = (clipped * advantages < ratio * advantages) & mask
    return -(gain * mask).sum() / total, beyond.sum().detach() / total


def value_loss(values, old_values, returns, mask, clip=0.2, total=None):
    """Half the squared distance of values from returns, (B, N) each, or of what is within clip of
    old_values, those at the time of the draw, where that is larger; over `total` as in ppo_loss."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    worst = torch.maximum((values - returns) ** 2, (near - returns) ** 2)
    total = mask.sum().clamp(min=1) if total is None else total
    return 0.5 * (worst * mask).sum() / total


class KLController:
    """`value`, the price of KL, moved so that the KL comes near to `target`, nats a reply: by up to
    a fifth of n / horizon for n replies (Ziegler et al. 2019). Without a target it stays."""

    def __init__(self, value, target=None, horizon=10_000):
        self.value, self.target, self.horizon = value, target, horizon

    def update(self, kl, n):
        """Note the mean KL, nats a reply, of n replies."""
        if self.target is not None:
            error = max(-0.2, min(0.2, kl / self.target - 1))
            self.value *= 1 + error * n / self.horizon


# ---- GRPO


def group_advantages(rewards, group_size, eps=1e-6, normalize_by_std=True):
    """Each reward less its group's mean, over its group's standard deviation plus eps: (B,) to
    (B,), groups of neighbours (Shao et al. 2024). Not so divided as in Dr. GRPO (Liu et al. 2025),
    prompts count by how much there is to gain.

    A reward that is NaN, of a reply that could not be judged, counts in neither and gets 0. A group
    whose rewards are equal gets zeros. Raises ValueError for groups of one."""
    if group_size < 2:
        raise ValueError(f"group_size {group_size}: a group needs 2 replies to compare")
    groups = rewards.view(-1, group_size)
    known = ~groups.isnan()
    n = known.sum(1, keepdim=True)
    groups = groups - groups.nan_to_num(math.inf).amin(1, keepdim=True)  # equal ones: exactly 0
    ahead = torch.where(known, groups - groups.nansum(1, keepdim=True) / n.clamp(min=1), 0.0)
    if normalize_by_std:
        ahead = ahead / ((ahead**2).sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt().add(eps)
    return ahead.flatten()


def grpo_loss(
    log_probs, old_log_probs, advantages, mask, reference=None, beta=0.0, clip=0.2, clip_high=None,
    length_normalised=True, total=None,
):  # fmt: skip
    """(loss, clip fraction) of GRPO (Shao et al. 2024), scalars: PPO's objective with one advantage
    a reply, (B,), and beta times the k3 estimate of the KL to `reference` (B, N) in the loss.

    length_normalised: a mean over a reply's tokens, then over replies, by which a long wrong reply
    costs no more than a short one; else all tokens count alike (DAPO). total: replies, or else
    tokens, in all micro-batches (None: in this). clip_high above clip leaves unlikely tokens
    room to grow (DAPO, Yu et al. 2025)."""
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    worth = advantages[:, None]
    gain = torch.minimum(ratio * worth, clipped * worth)
    if beta:
        gain = gain - beta * kl_estimates(log_probs, reference)[2]
    share = mask.to(gain.dtype)  # of each token in the mean
    if length_normalised:
        share = share / mask.sum(1, keepdim=True).clamp(min=1)
    total = share.sum().clamp(min=1) if total is None else total
    beyond = (clipped * worth < ratio * worth) & mask
    return -(gain * share).sum() / total, (beyond * share).sum().detach() / total


# ---- DPO


def dpo_loss(
    chosen, rejected, reference_chosen, reference_rejected, beta=0.1, ipo=False, smoothing=0.0
):
    """(loss, rewards (pairs,) of the chosen, of the rejected) of DPO (Rafailov et al. 2023): from
    log-probabilities of whole replies, (pairs,) each, under the policy and under the reference.

    What a policy has come to prefer is worth beta log(policy / reference); the loss is Bradley and
    Terry's on that, with the label `smoothing` likely to be wrong. ipo: the squared distance of the
    two log-ratios' difference from 1 / (2 beta), which stops growing where DPO does not (Azar et
    al. 2023)."""
    gains = [chosen - reference_chosen, rejected - reference_rejected]
    ahead = gains[0] - gains[1]
    if ipo:
        loss = (ahead - 1 / (2 * beta)) ** 2
    else:
        right, wrong = F.logsigmoid(beta * ahead), F.logsigmoid(-beta * ahead)
        loss = -(1 - smoothing) * right - smoothing * wrong
    return loss.mean(), *(beta * gain.detach() for gain in gains)


# ---- from a reward to what is learned from


class Whitening:
    """Running mean and standard deviation of rewards, over all that it has seen, in Chan's way of
    joining two sets (Chan et al. 1979). `state` is all there is to keep for a resume."""

    def __init__(self, state=(0, 0.0, 0.0)):
        self.state = tuple(state)  # number, mean, sum of squared distances from it

    def __call__(self, rewards):
        """Rewards (B,) less the mean, over the standard deviation, of all so far and these."""
        n, mean, squares = self.state
        m, new = len(rewards), rewards.double().mean().item()
        squares += ((rewards.double() - new) ** 2).sum().item() + (new - mean) ** 2 * n * m / (
            n + m
        )
        self.state = (n + m, mean + (new - mean) * m / (n + m), squares)
        return (rewards - self.state[1]) / (math.sqrt(squares / (n + m)) + 1e-6)


def shape_reward(
    rewards, lengths=None, ended=None, length_penalty=0.0, missing_end_penalty=0.0, clip=None,
    whitening=None, potentials=None, gamma=1.0,
):  # fmt: skip
    """What a policy is trained on in place of rewards (B,), float: in this order whitened (a
    Whitening), clipped to [-clip, clip], less length_penalty for each of `lengths` (B,) tokens,
    less missing_end_penalty where not `ended`, bool (B,).

    With potentials (B, T), a number for the text before each token, the rewards of tokens instead,
    (B, T): of the last one what comes of the above, and of each gamma * potential after it minus
    potential before it, with 0 after the end. Such sums telescope: whatever the policy does, the
    discounted sum changes by minus the first potential, which is that of the prompt alone and the
    same for all of its replies, so the best policy stays the best (Ng, Harada and Russell 1999).
    Penalties change it, that is their use, and so does clipping, where the best reward is beyond.
    `lengths` says where texts end, all tokens after have 0. Raises ValueError for rewards that are
    not finite, for penalties without lengths or ended, for negative ones, and for lengths that are
    not from 1 to T."""
    if not torch.isfinite(rewards).all():
        raise ValueError(f"rewards are not finite: {rewards.tolist()}")
    if length_penalty < 0 or missing_end_penalty < 0 or (clip is not None and clip <= 0):
        raise ValueError("length_penalty, missing_end_penalty are not below 0, clip is above")
    if (length_penalty or potentials is not None) and lengths is None:
        raise ValueError("length_penalty and potentials need the lengths of the replies")
    if missing_end_penalty and ended is None:
        raise ValueError("missing_end_penalty needs to know which replies have ended")
    if whitening is not None:
        rewards = whitening(rewards)
    if clip is not None:
        rewards = rewards.clamp(-clip, clip)
    if length_penalty:
        rewards = rewards - length_penalty * lengths
    if missing_end_penalty:
        rewards = rewards - missing_end_penalty * (~ended).to(rewards.dtype)
    if potentials is None:
        return rewards
    T = potentials.shape[1]
    if lengths.min() < 1 or lengths.max() > T:
        raise ValueError(f"lengths {lengths.tolist()} are not from 1 to {T}")
    steps = torch.arange(T, device=rewards.device)  # (T,)
    inside, last = steps < lengths[:, None], steps == lengths[:, None] - 1  # (B, T)
    before = torch.where(inside, potentials, 0.0)
    after = torch.cat([before[:, 1:], torch.zeros_like(before[:, :1])], dim=1)  # 0 at the end
    return gamma * after - before + torch.where(last, rewards[:, None], 0.0)


# ---- training


class ActorCritic(nn.Module):
    """A TransformerLM, `lm`, and a head, `value`, for what reward is still to be expected at each
    token, (..., C) to (..., 1). It begins at 0: knowing nothing it moves nothing."""

    def __init__(self, lm):
        super().__init__()
        self.lm, self.config = lm, lm.config
        self.value = nn.Linear(lm.config.d_model, 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)
        self.value.to(lm.token_embedding.weight)


@dataclass
class RLConfig:
    """How to learn; run.py chooses the values for the reward."""

    algorithm: str = "grpo"  # reinforce, rloo, ppo, grpo or dpo
    steps: int = 100  # rounds: replies are drawn, judged and learned from; dpo: optimizer steps
    prompts_per_step: int = 32  # prompts in a round; dpo: pairs
    group_size: int = 8  # replies drawn to each prompt
    max_new_tokens: int = 16  # longest reply, tokens
    temperature: float = 1.0  # of the draw
    top_k: int | None = None  # draw from this many likeliest tokens
    top_p: float | None = None  # draw from the likeliest tokens that make up this probability
    epochs: int = 1  # passes over a round's replies
    minibatches: int | None = None  # optimizer steps in a pass; None: 2, of reinforce and rloo 1
    micro_prompts: int | None = None  # prompts at once, the rest is accumulated; None: all
    clip: float = 0.2  # how far a token's ratio counts, down and up
    clip_high: float | None = None  # how far up, where that differs (DAPO: 0.28)
    kl_coef: float = 0.02  # price of a nat of KL: of a reply; of grpo, in its loss, of a token
    kl_target: float | None = None  # KL, nats a reply, that moves the price; None: it stays
    kl_horizon: int = 10_000  # replies in which the price can move by a fifth
    max_kl: float = 30.0  # KL, nats a reply, at which the run stops
    gamma: float = 1.0  # discount of rewards a token later, of ppo
    lam: float = 0.95  # how far ahead ppo's advantages look: 0 a token, 1 to the end
    value_coef: float = 0.1  # weight of ppo's value loss
    value_clip: float = 0.2  # how far a value counts as moved in a round, of ppo
    normalize_by_std: bool = True  # divide grpo's advantages by their group's deviation
    skip_equal: bool = True  # leave out grpo's groups whose rewards are equal
    length_normalised: bool = True  # in grpo replies count alike; without, tokens do
    beta: float = 0.1  # what dpo takes a nat of log-ratio to be worth
    ipo: bool = False  # IPO's squared loss in place of dpo's
    smoothing: float = 0.0  # probability that a pair is the wrong way round, of dpo
    length_penalty: float = 0.0  # taken off the reward for each token
    missing_end_penalty: float = 0.0  # taken off where the reply does not end by itself
    reward_clip: float | None = None  # rewards are kept within this distance of 0
    whiten_rewards: bool = False  # take the running mean off rewards, divide by their deviation
    max_failed: float = 0.1  # share of a round's replies without a reward at which the run stops
    optimizer: str = "adamw"  # adamw or muon
    max_lr: float = 1e-3  # learning rate after the warm-up
    min_lr: float = 0.0  # learning rate at the end
    warmup_steps: int = 5  # steps of rising learning rate
    schedule: str = "linear"  # cosine, linear or wsd (level, then down in a line)
    weight_decay: float = 0.0  # on matrices
    beta1: float = 0.9  # AdamW's memory of gradients
    beta2: float = 0.99  # AdamW's memory of squared gradients
    max_norm: float = 1.0  # gradients are clipped to this norm
    eval_every: int = 10  # steps between evaluations and checkpoints
    eval_prompts: int = 200  # held-out prompts in an evaluation
    seed: int = 1  # of prompts and draws

    def __post_init__(self):
        once = self.algorithm in ("reinforce", "rloo")
        if self.minibatches is None:
            self.minibatches = 1 if once or self.prompts_per_step == 1 else 2
        names = "steps prompts_per_step max_new_tokens epochs minibatches eval_every eval_prompts"
        for name in [*names.split(), "kl_horizon"]:
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: it must be at least 1")
        for name, known in (
            ("algorithm", ("reinforce", "rloo", "ppo", "grpo", "dpo")),
            ("optimizer", ("adamw", "muon")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} {getattr(self, name)} is none of {', '.join(known)}")
        if self.group_size < 1 + (self.algorithm in ("rloo", "grpo")):
            raise ValueError(
                f"--group_size {self.group_size}: {self.algorithm} compares the replies to one "
                "prompt, give at least 2"
            )
        if once and self.epochs * self.minibatches > 1:
            raise ValueError(
                f"--epochs {self.epochs} --minibatches {self.minibatches}: {self.algorithm} learns "
                "once from what was just drawn; ppo and grpo know how far they have moved"
            )
        if self.temperature <= 0:
            raise ValueError(f"--temperature {self.temperature}: replies are drawn, so above 0")
        next_probs(torch.zeros(1, 2), self.temperature, self.top_k, self.top_p)  # says what is off
        if self.minibatches > self.prompts_per_step:
            raise ValueError("--minibatches are made of whole prompts: at most --prompts_per_step")
        if self.micro_prompts is not None and self.micro_prompts < 1:
            raise ValueError(f"--micro_prompts {self.micro_prompts}: it must be at least 1")
        if not 0 < self.clip < 1 or (self.clip_high is not None and self.clip_high <= 0):
            raise ValueError("--clip is between 0 and 1, --clip_high above 0")
        if min(self.kl_coef, self.value_coef) < 0 or self.beta <= 0 or self.max_kl <= 0:
            raise ValueError("--kl_coef, --value_coef are not below 0; --beta, --max_kl are above")
        if self.kl_target is not None and not (self.kl_target > 0 and self.kl_coef > 0):
            raise ValueError(f"--kl_target {self.kl_target} and --kl_coef have to be above 0")
        if not (0 <= self.gamma <= 1 and 0 <= self.lam <= 1 and 0 <= self.smoothing < 0.5):
            raise ValueError("--gamma and --lam are from 0 to 1, --smoothing from 0 to below 0.5")
        if min(self.length_penalty, self.missing_end_penalty, self.weight_decay, self.seed) < 0:
            raise ValueError("penalties, --weight_decay and --seed are not below 0")
        clip = self.max_norm if self.reward_clip is None else self.reward_clip
        if min(self.max_norm, self.value_clip, clip) <= 0:
            raise ValueError("--max_norm, --value_clip and --reward_clip are above 0")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError("--beta1 and --beta2 are from 0 to below 1")
        if not 0 <= self.max_failed <= 1:
            raise ValueError(f"--max_failed {self.max_failed} is not from 0 to 1")
        lr_schedule(0, self.max_lr, self.min_lr, 1, 1, self.schedule)  # says if it is unknown

    @property
    def draw(self):
        return dict(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


def batch_of(n, size, seed, step):
    """Which of n things are step's (from 1) `size`: each comes once, by chance, before any comes
    again. It depends on nothing else, so a resume needs no state."""
    places = np.arange((step - 1) * size, step * size)
    orders = {e: np.random.default_rng((seed, e)).permutation(n) for e in set(places // n)}
    return [int(orders[place // n][place % n]) for place in places]


@torch.no_grad()
def score_all(model, rollout, config, **wanted):
    """The Scores of a whole Rollout, as many prompts at once as config says."""
    numbers = torch.arange(len(rollout.prompts)).split(config.micro_prompts or len(rollout.ids))
    parts = [score(model, rollout.groups(n)[0], **config.draw, **wanted) for n in numbers]
    return Scores(*(None if x[0] is None else torch.cat(x) for x in zip(*parts)))


def advantages_of(rollout, rewards, mask, log_ratio, values, config, price):
    """(advantages (B, N), or of grpo (B,); returns (B, N) of ppo, else None).

    rewards (B,), NaN where there is none; mask (B, N): the tokens that count; log_ratio (B, N) of
    policy and reference, whose KL costs `price` a nat in all but grpo, which has it in the loss."""
    if config.algorithm == "grpo":
        return group_advantages(
            rewards, config.group_size, normalize_by_std=config.normalize_by_std
        ), None
    if config.algorithm == "ppo":
        last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))  # (B, N)
        of_tokens = torch.where(last, rewards[:, None], 0.0) - price * log_ratio
        advantages, returns = gae(of_tokens, values, mask, config.gamma, config.lam)
        return whiten(advantages, mask), returns
    total = rewards - price * (log_ratio * mask).sum(1)
    if config.algorithm == "rloo":
        ahead = rloo_advantages(total, config.group_size)
    else:
        ahead = (total - total.nanmean()).nan_to_num(0.0)
    return ahead[:, None] * mask, None


def learn(policy, reference, rollout, rewards, config, price, step_with, autocast):
    """What one round teaches: several passes over a Rollout with its rewards (B,), NaN where there
    is none. step_with() clips gradients and takes an optimizer step. Returns metrics."""
    mask = rollout.mask & ~rewards.isnan()[:, None]
    value = policy.value if config.algorithm == "ppo" else None
    P, metrics = len(rollout.prompts), {}
    with autocast:
        theirs, values = score_all(reference, rollout, config).log_probs, None
        if value is not None:
            values = score_all(policy.lm, rollout, config, value=value, log_probs=False).values
    log_ratio, _, k3 = kl_estimates(rollout.log_probs, theirs)
    metrics["kl"] = (log_ratio * rollout.mask).sum(1).mean().item()  # nats a reply
    metrics["kl_k3"] = (k3 * rollout.mask).sum(1).mean().item()
    if metrics["kl"] > config.max_kl:
        return metrics
    advantages, returns = advantages_of(rollout, rewards, mask, log_ratio, values, config, price)
    groups = torch.arange(P)
    if config.algorithm == "grpo":
        equal = (advantages.view(P, -1) == 0).all(1).cpu()  # nothing to learn but to stay
        metrics["no_variance"] = equal.float().mean().item()
        groups = groups[~equal] if config.skip_equal else groups
    if returns is not None:
        off, spread = masked_var(returns - values, mask), masked_var(returns, mask)
        metrics["explained_variance"] = (1 - off / spread.clamp(min=1e-12)).item()
    sums, steps = torch.zeros(3), 0
    by_reply = config.algorithm == "grpo" and config.length_normalised
    for _ in range(config.epochs):
        for minibatch in groups[torch.randperm(len(groups))].tensor_split(config.minibatches):
            if not len(minibatch):
                continue
            _, rows = rollout.groups(minibatch)
            total = (mask[rows].any(1) if by_reply else mask[rows]).sum().clamp(min=1)
            for numbers in minibatch.split(config.micro_prompts or P):
                some, rows = rollout.groups(numbers)
                with autocast:
                    new = score(policy.lm, some, **config.draw, value=value)
                old, counted = some.log_probs, mask[rows]
                clipped = torch.zeros(())
                if config.algorithm in ("reinforce", "rloo"):
                    loss = reinforce_loss(new.log_probs, advantages[rows], counted, total)
                elif config.algorithm == "grpo":
                    loss, clipped = grpo_loss(
                        new.log_probs, old, advantages[rows], counted, theirs[rows], price,
                        config.clip, config.clip_high, config.length_normalised, total,
                    )  # fmt: skip
                else:
                    clips = (counted, config.clip, config.clip_high, total)
                    loss, clipped = ppo_loss(new.log_probs, old, advantages[rows], *clips)
                    moved = (values[rows], returns[rows], counted, config.value_clip, total)
                    loss = loss + config.value_coef * value_loss(new.values, *moved)
                loss.backward()
                sums += torch.tensor([loss.item(), clipped.item(), 0.0])
            sums[2] += step_with()
            steps += 1
    names = ("train_loss", "clip_fraction", "grad_norm")
    return metrics | dict(zip(names, (sums / max(steps, 1)).tolist()))


def judge_pairs(policy, reference, pairs, config):
    """(loss, rewards (pairs,) of the chosen, of the rejected) of DPO, as config says, on pairs
    (prompt, chosen, rejected), lists of ids."""
    device = policy.value.weight.device
    texts = [ids for pair in pairs for ids in pair[1:]]
    shape = (2, len(texts), max(map(len, texts)))
    ids, mask = torch.zeros(shape, dtype=torch.int64, device=device)  # (2 pairs, N) each
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = torch.tensor(text, device=device), 1
    nothing = torch.zeros(ids.shape, device=device)
    both = Rollout([prompt for prompt, *_ in pairs], ids, mask.bool(), nothing, mask[:, 0].bool())
    mine = score(policy.lm, both).log_probs.sum(1)  # (2 pairs,)
    with torch.no_grad():
        theirs = score(reference, both).log_probs.sum(1)
    four = (*mine.view(-1, 2).T, *theirs.view(-1, 2).T)
    return dpo_loss(*four, config.beta, config.ipo, config.smoothing)


def learn_pairs(policy, reference, pairs, config, step_with, autocast):
    """One step of DPO on pairs (prompt, chosen, rejected), lists of ids. Returns metrics."""
    size, metrics, found = config.micro_prompts or len(pairs), dict(train_loss=0.0), []
    for start in range(0, len(pairs), size):
        some = pairs[start : start + size]
        with autocast:
            loss, chosen, rejected = judge_pairs(policy, reference, some, config)
        loss = loss * (len(some) / len(pairs))
        loss.backward()
        metrics["train_loss"] += loss.item()
        found.append(chosen - rejected)
    ahead = torch.cat(found)
    metrics |= dict(in_order=(ahead > 0).float().mean().item(), margin=ahead.mean().item())
    return metrics | dict(grad_norm=step_with())


@torch.no_grad()
def evaluate(policy, reference, prompts, stops, judge, config):
    """How a policy does on prompts, lists of ids: mean reward of the likeliest replies (val_reward)
    and of drawn ones (val_drawn), and of the drawn ones the KL to the reference, nats a reply,
    entropy, length in tokens and how many end by themselves. judge(rollout): {name: rewards (B,)},
    NaN where there is none; of "" come the two above, another name's have it at their end."""
    length = (config.max_new_tokens, stops)
    likeliest = rollout(policy.lm, prompts, *length, temperature=0)
    drawn = rollout(policy.lm, prompts, *length, **config.draw)
    theirs = score_all(reference, drawn, config)
    mine = score_all(policy.lm, drawn, config, entropies=True)
    found = {}
    for which, replies in (("reward", likeliest), ("drawn", drawn)):
        for name, rewards in judge(replies).items():
            found[f"val_{which}{name}"] = rewards.nanmean().item()
    kl = kl_estimates(drawn.log_probs, theirs.log_probs)[0]
    found["val_kl"] = (kl * drawn.mask).sum(1).mean().item()
    found["val_entropy"] = masked_mean(mine.entropies, drawn.mask).item()
    found["val_length"] = drawn.mask.sum(1).float().mean().item()
    return found | dict(val_ended=drawn.ended.float().mean().item())


def train(
    policy, reference, prompts, judge, validate, save, config, run, stops, device="cpu",
    dtype=torch.float32, on_step=None,
):  # fmt: skip
    """Teach an ActorCritic for config.steps rounds; returns the last line of metrics.

    reference: the TransformerLM it began as. prompts: lists of ids; of dpo (prompt, chosen,
    rejected). judge(step, numbers, rollout): (rewards (B,), NaN where there is none, and a text for
    each of these) of replies to prompts of these numbers. validate(): metrics, as evaluate gives
    them. save(directory): writes the model. `run` has `dir`, `resume` and `log(**metrics)`, as
    common.Run. In run.dir: the model and state.pt of the last evaluation, from which a resume goes
    on to the bit. Ctrl-C and SIGTERM save, then exit with 130 and 0; a second one ends at once.

    Raises ValueError on a gradient that is not finite, where the KL to the reference passes max_kl
    and where more than max_failed of a round's replies have no reward; run.dir then holds the last
    good."""
    policy.value.requires_grad_(config.algorithm == "ppo")
    optimizers, path = optimizers_of(policy, config), run.dir / "state.pt"
    learned = [p for p in policy.parameters() if p.requires_grad]
    low = dtype != torch.float32
    autocast = torch.autocast(torch.device(device).type, dtype) if low else nullcontext()
    state = dict(step=0, seconds=0.0, tokens=0, price=config.kl_coef, whitening=[0, 0.0, 0.0])
    kept, signals, line = f"{run.dir} holds the last good model", [], {}
    if run.resume and path.exists():
        found = load_state(path, policy, optimizers)
        state = {name: found[name] for name in state}
    controller = KLController(state["price"], config.kl_target, config.kl_horizon)
    whitening = Whitening(state["whitening"]) if config.whiten_rewards else None

    def stop(number, _):
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)

    def step_with():
        norm = clip_gradients(learned, config.max_norm).item()
        if not math.isfinite(norm):
            raise ValueError(f"step {step}: the gradient's norm is {norm}: stopped; {kept}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return norm

    def keep(line):
        with autocast:
            line |= validate()
        save(run.dir)
        return line

    before = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
    start = time.perf_counter() - state["seconds"]
    policy.train()
    if state["step"] == 0:
        line = keep(dict(step=0, time=0.0, tokens=0))
        run.log(**line)
        if on_step:
            on_step(line)
    while state["step"] < config.steps and not signals:
        began, step = time.perf_counter(), state["step"] + 1
        args = (config.max_lr, config.min_lr, config.warmup_steps, config.steps, config.schedule)
        lr = lr_schedule(step, *args)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr
        size = min(config.prompts_per_step, len(prompts))
        numbers = batch_of(len(prompts), size, config.seed, step)
        some = [prompts[i] for i in numbers]
        line = dict(step=step, time=0.0, lr=lr, val_loss=None, val_bpb=None, mfu=None)
        if config.algorithm == "dpo":
            line |= learn_pairs(policy, reference, some, config, step_with, autocast)
            tokens = sum(len(ids) for pair in some for ids in pair)
        else:
            length = (config.max_new_tokens, stops, config.group_size)
            with autocast:
                drawn = rollout(policy.lm, some, *length, **config.draw)
            line["draw_seconds"] = time.perf_counter() - began
            scores, failures = judge(step, numbers, drawn)
            good, lengths = ~scores.isnan(), drawn.mask.sum(1)
            if len(failures) > config.max_failed * len(scores):
                raise ValueError(
                    f"step {step}: {len(failures)} of {len(scores)} replies have no reward, more "
                    f"than --max_failed {config.max_failed}: stopped; {kept}. The first: "
                    f"{failures[0]}"
                )
            rewards = scores.clone()
            rewards[good] = shape_reward(
                scores[good], lengths[good], drawn.ended[good], config.length_penalty,
                config.missing_end_penalty, config.reward_clip, whitening,
            )  # fmt: skip
            line |= dict(reward=scores.nanmean().item(), failed=len(failures))
            line |= dict(length=lengths.float().mean().item())
            line |= dict(ended=drawn.ended.float().mean().item(), price=controller.value)
            how = (config, controller.value, step_with, autocast)
            line |= learn(policy, reference, drawn, rewards, *how)
            if line["kl"] > config.max_kl:
                raise ValueError(
                    f"step {step}: the KL to the reference is {line['kl']:.1f} nats a reply, above "
                    f"--max_kl {config.max_kl}: stopped; {kept}; lower --max_lr or raise --kl_coef"
                )
            controller.update(line["kl"], len(scores))
            line["replies_per_s"] = len(scores) / (time.perf_counter() - began)
            tokens = int(lengths.sum()) + config.group_size * sum(map(len, some))
        state |= dict(step=step, price=controller.value, tokens=state["tokens"] + tokens)
        state["whitening"] = list(whitening.state) if whitening else state["whitening"]
        line |= dict(tokens=state["tokens"], tokens_per_s=tokens / (time.perf_counter() - began))
        if evaluated := (step % config.eval_every == 0 or step == config.steps):
            line = keep(line)
        line["time"] = state["seconds"] = round(time.perf_counter() - start, 3)
        run.log(**line)
        if evaluated:
            save_state(policy, optimizers, state, path)
        if on_step:
            on_step(line)
    for number, handler in before.items():
        signal.signal(number, handler)
    if signals:
        save_state(policy, optimizers, state, path)
        save(run.dir)
        print(f"stopped after step {state['step']} and saved: the same command goes on from there")
        sys.exit(130 if signals[0] == signal.SIGINT else 0)
    return line
