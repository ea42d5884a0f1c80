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
}  # fmt: skip
ANSWERABLE = ("speaks", "answers", "list", "quote", "count")
OPEN = ("continue", "next")
KINDS = (*PHRASES, "sum")


def passages(items, longest=360):
    """Runs of two to six speeches of a scene that do not overlap: [(speeches, the next one or
    None), ...], a speech (speaker, text). Each has at least two speakers, none is longer than
    `longest` characters as rendered. items: a play, as common.plays gives it."""
    found, scene, size = [], [], 2
    for kind, speaker, text in [*items, ["scene", "", ""]]:
        if kind == "speech" and text.strip():
            scene.append((speaker, text.strip()))
        if kind not in ("act", "scene"):
            continue
        start = 0
        while start < len(scene):
            stop = start + 1
            while (
                stop < min(start + size, len(scene))
                and len(render(scene[start : stop + 1])) <= longest
            ):
                stop += 1
            run = scene[start:stop]
            if len({name for name, _ in run}) >= 2 and len(render(run)) <= longest:
                found.append((run, scene[stop] if stop < len(scene) else None))
                size = 2 + (size + 1) % 5  # of the next one: their number is asked for
            start = stop
        scene = []
    return found


def render(speeches):
    return "\n\n".join(f"{name}:\n{text}" for name, text in speeches)


def ask(kind, speeches, following, draw):
    """(question, answer) on a passage, or None where it does not fit the kind: there has to be one
    right answer. draw: a random.Random."""
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
        answer = render([following])
    else:
        asked["speaker"], answer = following
    return draw.choice(PHRASES[kind]).format(**asked), answer


def conversation(turns, kind):
    """{"messages", "kind"} of [(question, answer), ...]."""
    pairs = [dict(user=question, assistant=answer) for question, answer in turns]
    messages = [dict(role=r, content=text) for pair in pairs for r, text in pair.items()]
    return dict(messages=messages, kind=kind)


def sums(seed=1):
    """(training, held-out) sums of numbers of one and two digits, 2,000 and 200: each a list of
    (question, answer) in four phrases."""
    draw = random.Random(seed)
    numbers = [(a, b) for a in range(100) for b in range(a + 1)]  # 5 + 17 is not new after 17 + 5
    pairs = [(a, b) for a, b in numbers if b < 10]
    pairs += draw.sample([(a, b) for a, b in numbers if b >= 10], 2200 - len(pairs))
    pairs = [draw.sample(pair, 2) for pair in pairs]
    draw.shuffle(pairs)
    phrases = ("What is {} + {}?", "{} + {} =", "Add {} and {}.", "How much is {} plus {}?")
    found = [[(phrase.format(a, b), str(a + b)) for phrase in phrases] for a, b in pairs]
    return found[200:], found[:200]


def dataset(kinds=KINDS, seed=1, n_repeats=12000):
    """(training, held-out) conversations of some kinds, shuffled; the same seed gives the same.

    In training a passage is asked several things in a row, held out it is a conversation for each:
    two of the answerable kinds and, of a quarter of the passages, an open one. Lines to repeat are
    the short way to learn to copy. Sums come five in a conversation, each in all phrases and twice;
    which are held out depends on the seed alone."""
    parts, lines, draw = [[], []], [[], []], random.Random(seed)
    for name, items in sorted(common.plays().items()):
        here = name in common.HELD_OUT
        for speeches, following in passages(items):
            lines[here] += [line for _, text in speeches for line in text.splitlines()]
            order = draw.sample(ANSWERABLE, 4)
            order += [draw.choice(OPEN)] * (draw.random() < 0.25)
            turns = [(k, ask(k, speeches, following, draw)) for k in order if k in kinds]
            turns = [(k, (question, answer)) for k, (question, answer) in filter(all, turns)]
            if here:
                single = [t for t in turns if t[0] in ANSWERABLE][:2]
                single += [t for t in turns if t[0] in OPEN]
                for k, (question, answer) in single:
                    asked = f"{render(speeches)}\n\n{question}"
                    parts[1].append(conversation([(asked, answer)], k))
            elif turns:
                (first, answer), *rest = (turn for _, turn in turns)
                asked = f"{render(speeches)}\n\n{first}"
                parts[0].append(conversation([(asked, answer), *rest], "passage"))
    for here, some in enumerate(sums(seed)):
        kept = draw.sample([line for line in lines[here] if 12 < len(line) < 60], n_repeats)
        single = [
            ("repeat", draw.choice(PHRASES["repeat"]).format(line=line), line) for line in kept
        ]
        turns = []
        if here:
            single += [("sum", *draw.choice(phrased)) for phrased in some]
        else:
            turns = [turn for phrased in some for turn in phrased]
        found = [([(question, answer)], kind) for kind, question, answer in single]
        for _ in range(2):  # a pass over each sum once, alone and early, teaches nothing
            draw.shuffle(turns)
            found += [(turns[i : i + 5], "sum") for i in range(0, len(turns), 5)]
        parts[here] += [conversation(turns, kind) for turns, kind in found if kind in kinds]
        draw.shuffle(parts[here])
        n_repeats //= 10
    return parts
