"""Answers to 01_tokenizer/exercises.py, and in WRONG what the checks must not let pass."""

import codecs
import functools
from collections import Counter

import bpe
from bpe import GPT2_PATTERN, Splitter, Tokenizer

# Pre-tokens: "no", " one" twice, " on", " online". (b" ", b"o") occurs 4 times as well, but o is
# greater than a space; at the end all pairs occur once: (n, e), (n, o) begin greatest, and o > e.
first_merges = [(b"o", b"n"), (b" ", b"on"), (b" on", b"e"), (b"n", b"o")]


def merge_words(counts, n_merges):
    words = [([bytes([b]) for b in word.encode()], n) for word, n in counts.items()]
    merges = []
    while len(merges) < n_merges:
        pairs = Counter()
        for word, n in words:
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        words = [(joined(word, best), n) for word, n in words]
    return merges


def joined(word, pair):
    out, i = [], 0
    while i < len(word):
        if tuple(word[i : i + 2]) == pair:
            out.append(word[i] + word[i + 1])
            i += 2
        else:
            out.append(word[i])
            i += 1
    return out


def stream(tokenizer, ids):
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for i in ids:
        yield decoder.decode(tokenizer.vocab[i])
    yield decoder.decode(b"", final=True)


def fewest_tokens(word, vocab):
    id_of = {token: i for i, token in vocab.items()}
    longest = max(map(len, id_of), default=0)
    best = [(0, None)]  # of the first n bytes: how many tokens, and the last of them
    for end in range(1, len(word) + 1):
        ways = []
        for size in range(1, min(longest, end) + 1):
            token = word[end - size : end]
            if token in id_of and best[end - size]:
                ways.append((best[end - size][0] + 1, token))
        best.append(min(ways, default=None))
    if best[-1] is None:
        raise ValueError(f"the vocabulary has no way to write {word}")
    ids, end = [], len(word)
    while end:
        token = best[end][1]
        ids.append(id_of[token])
        end -= len(token)
    return ids[::-1]


def never_used():
    text = bpe.__doc__
    counts = Counter(Splitter(GPT2_PATTERN).split(text))
    merges = bpe.merge_words(counts, 400)
    tokens = [bytes([b]) for b in range(256)] + [a + b for a, b in merges]
    tokenizer = Tokenizer(dict(enumerate(tokens)), merges)
    used = set(tokenizer.encode(text))
    return sum(i not in used for i in range(256, tokenizer.vocab_size)), "b"


# ---- what goes wrong


def variant(best=None, start=None, join=joined, spent=True):
    """merge_words with one part replaced."""

    def wrong(counts, n_merges):
        words = [([bytes([b]) for b in word.encode()], n) for word, n in counts.items()]
        words = start(words) if start else words
        merges = []
        while len(merges) < n_merges:
            pairs = Counter()
            for word, n in words:
                for pair in zip(word, word[1:]):
                    pairs[pair] += n
            if not pairs and spent:
                break
            order = best or (lambda pair, pairs, merges: (pairs[pair], pair))
            merges.append(max(pairs, key=lambda pair: order(pair, pairs, merges)))
            words = [(join(word, merges[-1]), n) for word, n in words]
        return merges

    return wrong


def by_id(pair, pairs, merges):
    tokens = [bytes([b]) for b in range(256)] + [a + b for a, b in merges]
    return pairs[pair], *map(tokens.index, pair)


def joined_from_the_right(word, pair):
    return joined([t[::-1] for t in word[::-1]], tuple(t[::-1] for t in pair[::-1]))[::-1]


def right_to_left(word, pair):
    out, i = [], len(word)
    while i:
        size = 2 if tuple(word[i - 2 : i]) == pair else 1
        out.insert(0, b"".join(word[i - size : i]))
        i -= size
    return out


def touching_counts_once(counts, n_merges):
    words = [([bytes([b]) for b in word.encode()], n) for word, n in counts.items()]
    merges = []
    while len(merges) < n_merges:
        pairs = Counter()
        for word, n in words:
            last = None
            for i, pair in enumerate(zip(word, word[1:])):
                if last == (pair, i - 1):
                    last = None
                    continue
                pairs[pair] += n
                last = (pair, i)
        if not pairs:
            break
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        words = [(joined(word, merges[-1]), n) for word, n in words]
    return merges


def as_text(counts, n_merges):
    found = merge_words({w.encode().decode("latin-1"): n for w, n in counts.items()}, n_merges)
    return found


def each_alone(tokenizer, ids):
    for i in ids:
        yield tokenizer.decode([i])


def without_the_rest(tokenizer, ids):
    held = []
    for i in ids:
        held.append(i)
        if not (text := tokenizer.decode(held)).endswith("\ufffd"):
            yield text
            held = []


def never_again(tokenizer, ids):
    """Holds back while there is any U+FFFD in what was held, and not only at its end."""
    held = []
    for i in ids:
        held.append(i)
        if "\ufffd" not in (text := tokenizer.decode(held)):
            yield text
            held = []
    yield tokenizer.decode(held).rstrip("\ufffd")


def silenced(tokenizer, ids):
    """Waits while there is a U+FFFD in what is new: after a bad byte for ever."""
    seen, shown = [], ""
    for i in ids:
        seen.append(i)
        text = tokenizer.decode(seen)
        if "\ufffd" not in text[len(shown) :]:
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(seen)[len(shown) :]


def strict(tokenizer, ids):
    """Tells what is whole UTF-8 only: after a bad byte nothing is."""
    held = b""
    for i in ids:
        held += tokenizer.vocab[i]
        try:
            text = held.decode()
        except UnicodeDecodeError:
            continue
        held = b""
        yield text
    yield held.decode(errors="replace")


def ignoring(tokenizer, ids):
    decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")
    for i in ids:
        yield decoder.decode(tokenizer.vocab[i])


def at_the_end(tokenizer, ids):
    yield tokenizer.decode(list(ids))


def by_lines(tokenizer, ids):
    held = []
    for i in ids:
        held.append(i)
        if tokenizer.decode(held).endswith((" ", "\n")):
            yield tokenizer.decode(held)
            held = []
    yield tokenizer.decode(held)


def longest_first(word, vocab):
    id_of, ids = {token: i for i, token in vocab.items()}, []
    while word:
        fits = [token for token in id_of if word.startswith(token)]
        if not fits:
            raise ValueError(word)
        ids.append(id_of[max(fits, key=len)])
        word = word[len(vocab[ids[-1]]) :]
    return ids


def longest_last(word, vocab):
    id_of, ids = {token: i for i, token in vocab.items()}, []
    while word:
        fits = [token for token in id_of if word.endswith(token)]
        if not fits:
            raise ValueError(word)
        ids.append(id_of[max(fits, key=len)])
        word = word[: -len(vocab[ids[-1]])]
    return ids[::-1]


def all_ways(word, vocab):
    if not word:
        return []
    ways = []
    for i, token in vocab.items():
        if word.startswith(token):
            try:
                ways.append([i, *all_ways(word[len(token) :], vocab)])
            except ValueError:
                continue
    if not ways:
        raise ValueError(word)
    return min(ways, key=len)


def remembers_but_nests(word, vocab):
    @functools.cache
    def rest(at):
        if at == len(word):
            return ()
        ways = []
        for i, token in vocab.items():
            if word.startswith(token, at) and (way := rest(at + len(token))) is not None:
                ways.append((i, *way))
        return min(ways, key=len, default=None)

    def deeper(n):  # as in a program where more calls stand around it
        return deeper(n - 1) if n else rest(0)

    ids = deeper(500)
    if ids is None:
        raise ValueError(word)
    return list(ids)


def no_error(word, vocab):
    try:
        return fewest_tokens(word, vocab)
    except ValueError:
        return []


def the_tokens(word, vocab):
    return [vocab[i] for i in fewest_tokens(word, vocab)]


def indices(word, vocab):
    return [list(vocab).index(i) for i in fewest_tokens(word, vocab)]


o_n, on, one = first_merges[:3]
WRONG = {
    "first_merges": [
        [(b" ", b"o"), (b" o", b"n"), (b" on", b"e"), (b"n", b"o")],
        [o_n, on, (b"e", b" on"), (b"n", b"o")],  # across a border
        [o_n, on, one, (b" on", b"l")],
        [o_n, on, one],
        [("o", "n"), (" ", "on"), (" on", "e"), ("n", "o")],
        b"on",
    ],
    "merge_words": [
        variant(lambda pair, pairs, merges: pairs[pair]),  # the one met first
        variant(lambda pair, pairs, merges: (pairs[pair], pair[0] + pair[1])),
        variant(by_id),
        variant(start=lambda words: [(word, 1) for word, _ in words]),
        variant(start=lambda words: [(sum((w for w, _ in words), []), 1)]),  # across words
        variant(join=right_to_left),
        variant(spent=False, best=lambda pair, pairs, merges: (pairs[pair], pair)),
        touching_counts_once,
        as_text,
        lambda counts, n_merges: [a + b for a, b in merge_words(counts, n_merges)],
    ],
    "stream": [
        each_alone,
        without_the_rest,
        never_again,
        silenced,
        strict,
        ignoring,
        at_the_end,
        by_lines,
        lambda tokenizer, ids: [tokenizer.decode(list(ids))],
    ],
    "fewest_tokens": [
        longest_first,
        longest_last,
        all_ways,
        remembers_but_nests,
        no_error,
        the_tokens,
        indices,
    ],
    "never_used": [
        lambda: (never_used()[0], "a"),
        lambda: (400 - never_used()[0], "b"),
        lambda: (float(never_used()[0]), "b"),
        lambda: (never_used()[0] / 400, "b"),
    ],
}
