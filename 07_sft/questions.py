"""Instructions made of the plays: questions a passage answers, scenes to go on with, and sums.

What it teaches: a model learns from examples what a question is and when to stop, so the examples
have to be many, phrased in several ways, and of a kind whose answers can be checked. Those of the
six held-out plays are for testing; nothing of them is trained on.

Parent: none
New: everything

Read in this order: passages, ask, dataset.
"""

import random

import common

# {speaker}, {line} and {passage} are filled in. The first five kinds have one right answer.
PHRASES = {
    "speaks": (
        'Who says "{line}"?', 'Who speaks the line "{line}"?', 'Name the speaker of "{line}"',
        '"{line}" Who says this?',
    ),
    "answers": (
        "Who answers {speaker}?", "Who speaks after {speaker}?", "Who replies to {speaker}?",
        "{speaker} speaks. Who is next?",
    ),
    "list": (
        "List the speakers.", "Who speaks in this passage?", "Name everyone who speaks, in order.",
        "Which characters have lines here?",
    ),
    "quote": (
        "What is the first line of {speaker}?", "Quote the first line that {speaker} says.",
        "How does {speaker} begin?", "Give the first line of {speaker}.",
    ),
    "count": (
        "How many speeches are there?", "Count the speeches.", "How many speeches does this have?",
        "Give the number of speeches.",
    ),
    "continue": (
        "Continue the scene.", "What comes next?", "Go on with this scene.", "Write what follows.",
    ),
    "next": (
        "Write the next speech of {speaker}.", "What does {speaker} say next?",
        "Let {speaker} answer.", "Give {speaker} the next speech.",
    ),
    "repeat": (
        'Repeat "{line}"', "Say this again: {line}", "Copy the line: {line}", "Echo: {line}",
    ),
    "sum": (
        "What is {a} + {b}?", "{a} + {b} =", "Add {a} and {b}.", "How much is {a} plus {b}?",
    ),
}  # fmt: skip
ANSWERABLE = ("speaks", "answers", "list", "quote", "count")
OPEN = ("continue", "next")
KINDS = tuple(PHRASES)


def passages(items, longest=360):
    """Runs of two to six speeches of a scene that do not overlap: [(speeches, the next one or
    None), ...], a speech (speaker, text). Each has at least two speakers, none is longer than
    `longest` characters as rendered. items: a play, as common.plays gives it."""
    found, run, length = [], [], 0
    size = 2  # of the next passage; it varies so that the number of speeches is worth asking
    for kind, speaker, text in [*items, ["scene", "", ""]]:
        if kind == "direction":
            continue
        speech, cost = (speaker, text.strip()), len(speaker) + len(text) + 3
        fits = kind == "speech" and text.strip() and length + cost <= longest
        if len(run) == size or not fits:
            if len(run) >= 2 and len({name for name, _ in run}) >= 2:
                found.append((run, speech if kind == "speech" and text.strip() else None))
                size = 2 + (size + 1) % 5
            run, length = [], 0
            fits = kind == "speech" and text.strip() and cost <= longest
        if fits:
            run.append(speech)
            length += cost
    return found


def ask(kind, speeches, following, draw):
    """A conversation {"messages", "kind"} on a passage, or None where it does not fit the kind:
    there has to be one right answer. draw: a random.Random."""
    names = [name for name, _ in speeches]
    lines = [(name, line) for name, text in speeches for line in text.splitlines()]
    asked = {}
    if kind == "speaks":
        said = [line for _, line in lines]
        once = [(name, line) for name, line in lines if said.count(line) == 1 and len(line) < 60]
        if not once:
            return None
        answer, asked["line"] = draw.choice(once)
    elif kind == "answers":
        pairs = [(a, b) for a, b in zip(names, names[1:]) if names.count(a) == 1 and a != b]
        if not pairs:
            return None
        asked["speaker"], answer = draw.choice(pairs)
    elif kind == "list":
        answer = ", ".join(dict.fromkeys(names))
    elif kind == "quote":
        asked["speaker"] = draw.choice(sorted(set(names)))
        answer = next(line for name, line in lines if name == asked["speaker"])
    elif kind == "count":
        answer = str(len(speeches))
    elif following is None or len(following[1]) > 200:
        return None
    elif kind == "continue":
        answer = f"{following[0]}:\n{following[1]}"
    else:
        asked["speaker"], answer = following
    passage = "\n\n".join(f"{name}:\n{text}" for name, text in speeches)
    question = draw.choice(PHRASES[kind]).format(**asked)
    messages = [dict(role="user", content=f"{passage}\n\n{question}")]
    return dict(messages=[*messages, dict(role="assistant", content=answer)], kind=kind)


def said(kind, answer, draw, **asked):
    """A conversation without a passage."""
    question = draw.choice(PHRASES[kind]).format(**asked)
    messages = [dict(role="user", content=question), dict(role="assistant", content=answer)]
    return dict(messages=messages, kind=kind)


def dataset(seed=1, n_sums=2000, n_repeats=12000):
    """(training, held-out) conversations, shuffled: each passage of the plays asked twice, a
    quarter of them to be gone on with as well; lines to repeat, which are the short way to learn to
    copy; sums of two numbers below 100, others in the held-out part. A seed gives the same."""
    parts, lines, draw = [[], []], [[], []], random.Random(seed)
    for name, items in sorted(common.plays().items()):
        here = name in common.HELD_OUT
        for speeches, following in passages(items):
            lines[here] += [line for _, text in speeches for line in text.splitlines()]
            wanted = draw.sample(ANSWERABLE, len(ANSWERABLE))
            found = [one for k in wanted if (one := ask(k, speeches, following, draw))][:2]
            if draw.random() < 0.25 and (one := ask(draw.choice(OPEN), speeches, following, draw)):
                found.append(one)
            parts[here] += found
    pairs = draw.sample([(a, b) for a in range(100) for b in range(100)], n_sums + n_sums // 10)
    sums = [said("sum", str(a + b), draw, a=a, b=b) for a, b in pairs]
    for here, some in enumerate((sums[:n_sums], sums[n_sums:])):
        parts[here] += some
        kept = draw.sample([line for line in lines[here] if 12 < len(line) < 60], n_repeats)
        parts[here] += [said("repeat", line, draw, line=line) for line in kept]
        draw.shuffle(parts[here])
        n_repeats //= 10
    return parts
