"""Five exercises on bpe.py. Fill in what is open, then: make exercise-01

Each stands for something that goes wrong, or that people get wrong, when they write a tokenizer.
Read bpe.py first; nothing here needs more than is in it. The checks say what differs and give a
hint.
"""

from collections import Counter

import bpe
from bpe import GPT2_PATTERN, Splitter, Tokenizer

# ---- 1. Predict

first_merges = None
"""What are the first four merges that train_bpe learns from the text "no one on one online" with
GPT2_PATTERN? A list of four pairs of byte strings in the order learned, [(b"o", b"m"), ...], worked
out on paper. Two things decide that are easily forgotten: between which neighbours a pair is
counted at all, and which of two pairs goes first that are equally frequent. Whoever settles the
second by the order in which pairs happen to be met gets another tokenizer from the same text on
another day, and other ids with it."""


# ---- 2. Fill in


def merge_words(counts, n_merges):
    """The first n_merges merges of words that occur counts[word] times: {str: int} and int to a
    list of pairs of bytes, in the order learned. Neither argument changes.

    A word begins as the bytes of its UTF-8. A pair counts once for each place where it stands,
    times the count of the word; the places may overlap, so aaa holds the pair (a, a) twice. The
    most frequent pair goes first, of equally frequent ones the greater as a tuple of bytes. It is
    then joined in every word from left to right, so that aaa becomes aa, a. Where no pair is left
    anywhere, the list is shorter than n_merges.

    It need not be fast: bpe.py says why its own is, and begins with a plain one of nearly this
    kind. Close it first."""
    ...


# ---- 3. Find the planted bug


def stream(tokenizer, ids):
    """Yields the text of ids (an iterable, perhaps of a model that still generates) in pieces, as
    they come.

    In a row the pieces (empty ones may be among them) are to be tokenizer.decode of all ids,
    whatever the ids are. And whenever the bytes so far end with a whole character, but for a U+FFFD
    of the text itself, all are out before the next id is asked for: after bytes that are no UTF-8,
    too, or one bad byte would silence a model for the rest of its answer.

    With English it does just that. But of an emoji or of Chinese it shows the replacement character
    U+FFFD and goes on, although decode of all ids at once shows them well."""
    seen, shown = [], ""
    for i in ids:
        seen.append(i)
        text = tokenizer.decode(seen)
        yield text[len(shown) :]
        shown = text


# ---- 4. Extend


def fewest_tokens(word, vocab):
    """The ids of a word in as few tokens as there can be: bytes and {id: bytes}, as Tokenizer.vocab
    has it, to a list of ids (PathPiece: Schmidt et al. 2024, arXiv 2402.18376).

    The bytes of the ids in a row must be the word. Of several shortest ways any will do. Merges do
    not matter here: only what is in vocab, every entry of which is a token of one byte or more.
    Raises ValueError where vocab has no way to write the word. A word of 600 bytes must be no
    trouble: a search whose work doubles with each byte is too slow, and one that calls itself once
    for each is too deep.

    Merges in the order learned often end in more tokens than needed, and to take the longest token
    first does too. Fewer tokens are cheaper; whether they are better the paper doubts."""
    ...


# ---- 5. Measure and explain


def never_used():
    """How many of the tokens that were learned are never used, not even in the text that they were
    learned from, and why?

    Below, 400 merges are learned from the docstring of bpe.py. Encode that same text with the
    tokenizer and return (number, letter): how many of the ids from 256 on do not occur in it, an
    int, and the letter that explains it.

    a. encode takes the longest token that fits, while training merged the most frequent pair
    b. they were steps: wherever such a token stood, a later merge made it part of a longer one
    c. they reach across the border of two pre-tokens, where encode never merges

    A row of the embedding that no text reaches is never trained. Published models have such tokens,
    and behave oddly when they meet one (Land and Bartolo 2024, arXiv 2405.05417)."""
    text = bpe.__doc__
    counts = Counter(Splitter(GPT2_PATTERN).split(text))
    merges = bpe.merge_words(counts, 400)
    tokens = [bytes([b]) for b in range(256)] + [a + b for a, b in merges]
    tokenizer = Tokenizer(dict(enumerate(tokens)), merges)
    number, letter = None, None  # yours: use tokenizer and text
    return number, letter
