"""Text as people type it: words with a typo, and letters in the wrong case.

Parent: none
New: everything
"""

import random
import re

KEYS = "qwertyuiop", "asdfghjkl", "zxcvbnm"  # a slip of the finger lands one key to the side
BESIDE = {
    row[i]: row[max(0, i - 1) : i] + row[i + 1 : i + 2] for row in KEYS for i in range(len(row))
}
KINDS = "swap drop double replace".split()
CASES = "lower upper random".split()


def misspell(word, rng):
    """A word of at least two letters with one typo, never the word itself: two neighbouring letters
    swapped, one dropped, one doubled, or one replaced by its neighbour on the keyboard."""
    kind, i = rng.choice(KINDS), rng.randrange(len(word))
    if kind == "swap":
        places = [k for k in range(len(word) - 1) if word[k] != word[k + 1]]
        if places:
            i = rng.choice(places)
            return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
        kind = "double"  # "oo" has nothing to swap
    if kind == "drop":
        return word[:i] + word[i + 1 :]
    if kind == "double":
        return word[: i + 1] + word[i:]
    key = rng.choice(BESIDE[word[i].lower()])
    return word[:i] + (key.upper() if word[i].isupper() else key) + word[i + 1 :]


def typos(text, rate, seed):
    """The text in which each word of two or more letters a-z has, with probability `rate`, one
    typo. The same seed gives the same text. Raises ValueError for a rate outside 0 to 1."""
    if not 0 <= rate <= 1:
        raise ValueError(f"a rate of {rate} typos a word: it must be between 0 and 1")
    rng = random.Random(seed)

    def word(match):
        return misspell(match[0], rng) if rng.random() < rate else match[0]

    return re.sub(r"[A-Za-z]{2,}", word, text)


def recase(text, how, seed=0):
    """The text in lower case, in upper case, or with each letter's case drawn with a fair coin.

    Raises ValueError for any other `how`."""
    if how not in CASES:
        raise ValueError(f"case {how!r} is not one of {', '.join(CASES)}")
    rng = random.Random(seed)
    if how == "random":
        return "".join(c.upper() if rng.random() < 0.5 else c.lower() for c in text)
    return text.lower() if how == "lower" else text.upper()
