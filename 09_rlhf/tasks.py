"""What is asked: sums, passages of the plays to go on with, GSM8K's questions, or a file's prompts.

What it teaches: a policy has to be tested on prompts it has not been rewarded for. The sums held
out are those that 07 holds out, and no prompt for training is of the six held-out plays.

Parent: 07_sft/questions.py (sums, passages, render); 08_reward/pairs.py (records, by_prompt,
    hold_out)
New: asked, of_sums, of_plays, messages_of, of_files, of_prompts, of_pairs

Read in this order: sums, of_sums, of_plays, of_prompts, of_pairs.
"""

import csv
import glob
import io
import json
import random
import re
from pathlib import Path

import common

GO_ON = ("Continue the scene.", "What comes next?", "Go on with this scene.", "Write what follows.")


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


def asked(text):
    return [dict(role="user", content=text)]


def of_sums(seed=1):
    """(training, held-out) prompts, lists of messages, in a phrase each. Held out are those that 07
    holds out; a reward needs no answers, so the others are all other sums of such numbers, those
    that 07 has trained on among them, and as there about half with a number of one digit."""
    draw, (_, held_out) = random.Random(seed), sums()
    held_out = [draw.choice(phrased)[0] for phrased in held_out]
    kept = {tuple(sorted(re.findall(r"\d+", text))) for text in held_out}  # 5 + 17 is 17 + 5
    phrases = [re.sub(r"\d+", "{}", question) for question, _ in sums()[0][0]]
    found = [
        asked(phrase.format(a, b))
        for a in range(100)
        for b in range(100)
        if tuple(sorted((str(a), str(b)))) not in kept
        for phrase in (phrases if min(a, b) < 10 else draw.sample(phrases, 1))
    ]
    draw.shuffle(found)
    return found, [asked(text) for text in held_out]


def of_plays(seed=1, longest=160):
    """(training, held-out) prompts: passages of the plays, of at most `longest` characters, to go
    on with."""
    parts, draw = ([], []), random.Random(seed)
    for name, items in sorted(common.plays().items()):
        for speeches, following in passages(items, longest):
            if following is not None:
                text = f"{render(speeches)}\n\n{draw.choice(GO_ON)}"
                parts[name in common.HELD_OUT].append(asked(text))
    for part in parts:
        draw.shuffle(part)
    return parts


def records(path):
    """[(where, record), ...] of a .json, .jsonl or .csv file: `where` names file and line. Raises
    ValueError for what is not to be read."""
    path, kind = Path(path), Path(path).suffix
    if kind not in (".json", ".jsonl", ".csv"):
        raise ValueError(f"{path}: .json, .jsonl and .csv are read")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    found = []
    if kind == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(f"{path}, line {reader.line_num}: not as many fields as names")
                found.append((f"{path}, line {reader.line_num}", row))
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    elif kind == ".json":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from None
        if not isinstance(rows, list):
            raise ValueError(f"{path}: a list of records is wanted; one on each line is .jsonl")
        found = [(f"{path}, record {n}", row) for n, row in enumerate(rows, 1)]
    else:
        for n, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    found.append((f"{path}, line {n}", json.loads(line)))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {n}: not JSON: {error.msg}") from None
    if not found:
        raise ValueError(f"{path} holds no record")
    for where, row in found:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a record is an object with named fields")
    return found


def messages_of(where, record):
    """The conversation that a record asks to go on with: prompt (text or messages), question, or
    instruction with its input."""
    prompt = record.get("prompt", record.get("question"))
    if prompt is None and isinstance(record.get("instruction"), str):
        prompt = "\n\n".join(str(x) for x in (record["instruction"], record.get("input")) if x)
    if isinstance(prompt, list):
        good = all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in prompt)
        if good and prompt and prompt[-1].get("role") == "user":
            return [dict(role=m.get("role"), content=m["content"]) for m in prompt]
    elif isinstance(prompt, str) and prompt.strip():
        return asked(prompt)
    raise ValueError(
        f"{where} lacks a prompt (or question, or instruction) that asks for something"
    )


def of_files(source):
    """Records of a file, a glob, a directory or a URL: (where, record, its conversation) of each.
    ValueError where there is none."""
    paths = [common.download(source)] if "://" in source else sorted(glob.glob(source))
    if len(paths) == 1 and Path(paths[0]).is_dir():
        kinds = (".json", ".jsonl", ".csv")
        paths = sorted(path for path in Path(paths[0]).rglob("*") if path.suffix in kinds)
    if not paths:
        raise ValueError(f"--data {source}: there is no such file, nor a directory with any")
    found = [one for path in paths for one in records(path)]
    return [(where, record, messages_of(where, record)) for where, record in found]


def by_prompt(pairs):
    """[pairs of one prompt, of the next, ...]."""
    found = {}
    for pair in pairs:
        found.setdefault(json.dumps(pair["prompt"]), []).append(pair)
    return list(found.values())


def hold_out(pairs, most=2000, seed=1):
    """(training, held-out): the pairs of a tenth of the prompts, of at most `most`, by chance. No
    prompt is in both. Raises ValueError where fewer than two prompts would be held out."""
    found = by_prompt(pairs)
    random.Random(seed).shuffle(found)
    n = min(most, len(found) // 10)
    if n < 2:
        raise ValueError(f"pairs on {len(found)} prompts: 20 are needed, to hold a tenth out")
    return sum(found[n:], []), sum(found[:n], [])


def of_prompts(source):
    """(training prompts, held-out prompts, {question: answer} of those that have one)."""
    found, answers = [], {}
    for _, record, messages in of_files(source):
        found.append(dict(prompt=messages))
        if isinstance(record.get("answer"), str):
            answers[messages[-1]["content"]] = record["answer"]
    parts = hold_out([group[0] for group in by_prompt(found)])
    return *([one["prompt"] for one in part] for part in parts), answers


def of_pairs(source):
    """(training, held-out) pairs (messages, chosen, rejected) for DPO, of records with prompt,
    chosen and rejected. ValueError names the record that lacks one; where both replies are the
    same there is nothing to learn, and it is left out."""
    found = []
    for where, record, messages in of_files(source):
        replies = [record.get(name) for name in ("chosen", "rejected")]
        if not all(isinstance(reply, str) and reply.strip() for reply in replies):
            raise ValueError(f"{where} lacks 'chosen' or 'rejected'")
        if replies[0].strip() != replies[1].strip():
            found.append(dict(prompt=messages, replies=replies))
    return [[(x["prompt"], *x["replies"]) for x in part] for part in hold_out(found)]
