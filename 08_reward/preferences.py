"""Comparisons made of the plays: the speech that follows, and one that does not.

What it teaches: a reward model learns whatever tells the chosen from the rejected, so the wrong
replies have to be wrong in ways that matter, of several kinds, and alike in the rest: here they are
about as long as the right ones, and begin and end as they do, wherever their kind allows it. (Words
in another order seldom begin with a capital and end in a stop, and to look for that is easier than
to read.) The six held-out plays are for testing; nothing of them is trained on.

Parent: none
New: everything

Read in this order: the four corruptions, contexts, dataset.
"""

import bisect
import itertools
import random
import re

import common

PHRASES = (
    "Continue the scene.", "What comes next?", "Go on with this scene.", "Write what follows.",
)  # fmt: skip


def as_lines(words, text):
    """Words on lines as long, in words, as those of the text."""
    lines, words = [], list(words)
    for line in text.split("\n"):
        n = len(line.split())
        lines.append(" ".join(words[:n]))
        words = words[n:]
    return "\n".join(filter(None, lines))


def taken_apart(text):
    """(first word, the other words, the marks at the end) of a text."""
    body = re.sub(r"\W+$", "", text)
    first, *words = body.split()
    return first, words, text[len(body) :]


def shuffled(text, draw):
    """Its words in another order, but for the first, and for the marks at its end."""
    first, words, marks = taken_apart(text)
    order = words
    while order == words and len(set(words)) > 1:
        order = draw.sample(words, len(words))
    return re.sub(r"\W+$", "", as_lines([first, *order], text)) + marks


def misspelt(text, draw):
    """A quarter of its longer words, at least two, with two letters exchanged and one replaced."""
    words = re.split(r"(\s+)", text)
    places = [i for i, word in enumerate(words) if len(re.findall("[a-zA-Z]", word)) > 3]
    for i in draw.sample(places, min(len(places), max(2, len(places) // 4))):
        letters = list(words[i])
        spots = [n for n, c in enumerate(letters) if c.isalpha()]
        n = draw.randrange(len(spots) - 1)
        a, b = spots[n : n + 2]
        letters[a], letters[b] = letters[b], letters[a]
        letters[draw.choice(spots)] = draw.choice("bcdfghjklmnpqrstvwxz")
        words[i] = "".join(letters)
    return "".join(words)


def repeated(text, draw):
    """Two to five of its words three times or more, behind its first word and before the marks at
    its end, about as many letters as it has."""
    (first, words, marks), found = taken_apart(text), []
    for _ in range(8):
        n = draw.randint(2, max(2, min(5, len(words) // 3)))
        start = draw.randrange(len(words) - n + 1)
        phrase = words[start : start + n] * len(words)
        one = as_lines([first, *phrase[: len(words)]], text)
        found.append(re.sub(r"\W+$", "", one) + marks)
    return min(found, key=lambda one: abs(len(one) - len(text)))


def cut_off(text, draw):
    """Its first part, without a stop at the end."""
    words = text.split()
    n = draw.randint(max(2, len(words) // 3), max(2, 3 * len(words) // 4))
    return re.sub(r"\W+$", "", as_lines(words[:n], text))


CORRUPTED = {"shuffled": shuffled, "misspelt": misspelt, "repeated": repeated, "cut off": cut_off}
KINDS = ("another play", "another speaker", *CORRUPTED)


def contexts(items, longest):
    """[(speeches before, speaker, speech), ...] of a play, as common.plays gives it: at most four
    speeches before, of the same scene, together at most `longest` characters."""
    found, scene = [], []
    for kind, speaker, text in items:
        if kind in ("act", "scene"):
            scene = []
        elif kind == "speech" and text.strip():
            before = scene[-4:]
            while before and len(render(before)) > longest:
                before = before[1:]
            if before:
                found.append((before, speaker, text.strip()))
            scene.append((speaker, text.strip()))
    return found


def render(speeches):
    return "\n\n".join(f"{name}:\n{text}" for name, text in speeches)


def like(text, candidates, lengths, draw, fits):
    """One of candidates, (play, speaker, text) in order of their `lengths`, about as long as the
    text, for which `fits` holds; None where there is none nearby."""
    middle = bisect.bisect_left(lengths, len(text))
    nearby = candidates[max(0, middle - 60) : middle + 60]
    draw.shuffle(nearby)
    return next((one for one in nearby if one[2] != text and fits(one)), None)


def dataset(seed=1, longest=240, shortest_reply=40, longest_reply=200):
    """(training, held-out) pairs {"prompt", "chosen", "rejected", "kind"}, those of a passage next
    to one another, passages in an order by chance; the same seed gives the same. Of each passage
    some: the speech that follows, with its speaker's name, against one of another play, against
    another speaker's of the same play, and corrupted, in four ways by turns: two of them to learn
    from, as they are many things to learn, and one held out, so that a third is of each sort."""
    draw, parts = random.Random(seed), [[], []]
    found = {name: contexts(items, longest) for name, items in sorted(common.plays().items())}
    for held_out in (False, True):
        names = [name for name in found if (name in common.HELD_OUT) == held_out]
        speeches = [(name, who, text) for name in names for _, who, text in found[name]]
        speeches.sort(key=lambda speech: len(speech[2]))
        lengths = [len(speech[2]) for speech in speeches]
        of_play = {name: [s for s in speeches if s[0] == name] for name in names}
        in_play = {name: [len(s[2]) for s in of_play[name]] for name in names}
        turns = itertools.cycle(CORRUPTED)
        for name in names:
            for before, speaker, text in found[name]:
                if not shortest_reply <= len(text) <= longest_reply or len(text.split()) < 6:
                    continue
                other = like(text, speeches, lengths, draw, lambda s, n=name: s[0] != n)
                mine = (text, of_play[name], in_play[name], draw)
                another = like(*mine, lambda s, who=speaker: s[1] != who)
                if not other or not another:
                    continue
                ways = [next(turns) for _ in range(1 if held_out else 2)]
                spoilt = [(speaker, CORRUPTED[way](text, draw)) for way in ways]
                if (speaker, text) in spoilt:
                    continue
                asked = f"{render(before)}\n\n{draw.choice(PHRASES)}"
                pair = dict(prompt=[dict(role="user", content=asked)])
                pair["chosen"] = render([(speaker, text)])
                wrong = (other[1:], another[1:], *spoilt)
                named = zip((*KINDS[:2], *ways), (render([one]) for one in wrong))
                parts[held_out].append([pair | dict(rejected=r, kind=k) for k, r in named])
        draw.shuffle(parts[held_out])
    return [sum(part, []) for part in parts]
