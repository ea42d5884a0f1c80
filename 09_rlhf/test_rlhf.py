"""Rollouts, log-probabilities, advantages, losses, rewards, training and commands."""

import math
from pathlib import Path

import numpy as np
import pytest
import rlhf
import torch
from policy import TransformerConfig, TransformerLM
from rlhf import (
    KLController,
    Rollout,
    dpo_loss,
    gae,
    group_advantages,
    grpo_loss,
    masked_mean,
    ppo_loss,
    reinforce_loss,
    replay,
    rloo_advantages,
    rollout,
    token_log_probs,
    value_loss,
)

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
    ratio = (replay(lm, found, **settings).log_probs - found.log_probs).exp()
    assert found.mask.sum() > 30 and found.log_probs[found.mask].min() < -1
    assert (ratio - 1).abs().max() < 1e-5
    if settings.get("top_k") or settings.get("top_p"):  # the full softmax disagrees
        off = (replay(lm, found).log_probs - found.log_probs).exp() - 1
        assert off[found.mask].abs().max() > 0.05


@pytest.mark.parametrize("row_tokens", [6, 12, 1000])
def test_replies_in_one_row_are_as_alone(row_tokens, monkeypatch):
    lm = new_lm(dtype=torch.float64)
    found = drawn_from(lm, group_size=4)
    lay_out = rlhf.lay_out
    monkeypatch.setattr(rlhf, "lay_out", lambda drawn, _: lay_out(drawn, row_tokens))
    torch.manual_seed(1)
    head = torch.nn.Linear(16, 1).double()
    seen = replay(lm, found, value=head, entropies=True)
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
    last = found.ids[torch.arange(len(found.ids)), found.mask.sum(1) - 1]
    assert torch.equal(torch.isin(last, torch.arange(5)), found.ended)
    seen = replay(lm, found)
    reinforce_loss(seen.log_probs, torch.ones(seen.log_probs.shape), found.mask).backward()
    of_last = replay(lm, found).log_probs[torch.arange(len(last)), found.mask.sum(1) - 1]
    assert (of_last[found.ended] < 0).all()


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
    ahead = group_advantages(found, 3, eps=0.0).nan_to_num(0.0).view(4, 3)
    assert ahead[0].tolist() == [0, 0, 0] and ahead[2].tolist() == [0, 0, 0]
    torch.testing.assert_close(ahead[1, :2], group_advantages(found[3:5], 2, eps=0.0))
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
        reinforce_loss(replay(lm, every).log_probs, weights, mask, total=1).backward()
        for p, grad in zip(lm.parameters(), wanted):
            torch.testing.assert_close(-p.grad, grad, atol=1e-6, rtol=1e-4)


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
