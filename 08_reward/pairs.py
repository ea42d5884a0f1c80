"""Reading comparisons: prompt, chosen, rejected; transcripts; instructions with two answers.

What it teaches: the same comparison is written down in several ways, so the form is recognised by
its fields and named, what is wrong is said with file and line, and pairs that say nothing (two
equal replies, an empty one) are counted and left out.

Parent: 07_sft/forms.py (records, form_of)
New: turns, comparison, read_pairs, by_prompt, hold_out
Changed: form_of

HH-RLHF: Bai et al. 2022, arXiv 2204.05862.

Read in this order: records, form_of, turns, comparison, read_pairs, hold_out.
"""

import csv
import glob
import io
import json
import math
import random
from pathlib import Path

import common

ROLES = {"Human": "user", "Assistant": "assistant"}  # of HH-RLHF


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


def form_of(record, where):
    """The form that a record's fields show; ValueError where they show none."""
    lacking = [name for name in ("chosen", "rejected") if name not in record]
    if lacking:
        raise ValueError(
            f"{where}: {lacking[0]!r} is missing, it has {', '.join(record) or 'none'}"
        )
    if "prompt" in record:
        return "prompt, chosen, rejected"
    if "instruction" in record:
        return "instruction, chosen, rejected"
    if isinstance(record["chosen"], str) and record["chosen"].startswith("\n\nHuman:"):
        return "HH-RLHF transcripts"
    raise ValueError(
        f"{where}: there is no 'prompt' nor 'instruction', and 'chosen' is no transcript, which "
        "begins with an empty line and 'Human:'"
    )


def turns(transcript, where):
    """The messages of a transcript: "\\n\\nHuman: Hi\\n\\nAssistant: Ho" ->
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]."""
    messages = []
    for part in transcript.split("\n\n")[1:]:
        name, colon, text = part.partition(":")
        if colon and name in ROLES:
            messages.append(dict(role=ROLES[name], content=text.strip()))
        elif messages:  # a paragraph of the turn before
            messages[-1]["content"] = f"{messages[-1]['content']}\n\n{part}".strip()
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError(f"{where}: the transcript does not end with 'Assistant:'")
    return messages


def comparison(record, form, where):
    """{"prompt": messages, "chosen", "rejected", "margin", "label"} of a record; None where its two
    transcripts differ before the last answer. ValueError where something is missing or wrong. Where
    the label says that the rejected reply is rather the better one, they change places."""

    def text(name, default=None):
        value = default if record.get(name) is None else record[name]
        if isinstance(value, list) and value and name in ("chosen", "rejected"):
            value = value[-1].get("content") if isinstance(value[-1], dict) else None
        if not isinstance(value, str):
            raise ValueError(f"{where} ({form}): {name!r} is no text")
        return value

    def number(name, default, high):
        value = default if record.get(name) in (None, "") else record[name]
        try:
            value = float(value)
        except (TypeError, ValueError):
            value = math.nan
        if not 0 <= value <= high:
            raise ValueError(f"{where}: {name!r} is {record[name]!r}, not from 0 to {high:g}")
        return value

    if form == "HH-RLHF transcripts":
        (*asked, chosen), (*other, rejected) = (
            turns(text(name), where) for name in ("chosen", "rejected")
        )
        if asked != other:
            return None
        chosen, rejected = chosen["content"], rejected["content"]
    else:
        chosen, rejected = text("chosen").strip(), text("rejected").strip()
        if form == "instruction, chosen, rejected":
            asked = "\n\n".join(filter(None, (text("instruction"), text("input", ""))))
        else:
            asked = record["prompt"] if isinstance(record["prompt"], list) else text("prompt")
    prompt = [dict(role="user", content=asked)] if isinstance(asked, str) else asked
    for message in prompt or [None]:
        known = isinstance(message, dict) and isinstance(message.get("content"), str)
        if not known or message.get("role") not in ("system", "user", "assistant"):
            raise ValueError(f"{where} ({form}): 'prompt' is no text and no list of messages")
    margin, label = number("margin", 0.0, 1e6), number("label", 1.0, 1.0)
    if label < 0.5:
        chosen, rejected, label = rejected, chosen, 1 - label
    return dict(prompt=prompt, chosen=chosen, rejected=rejected, margin=margin, label=label)


def read_pairs(source, sha256=None):
    """(form, pairs, {why: how many were left out}) of a file, a glob, a directory or a URL."""
    paths = [common.download(source, sha256)] if "://" in source else sorted(glob.glob(source))
    if len(paths) == 1 and Path(paths[0]).is_dir():
        kinds = (".json", ".jsonl", ".csv")
        paths = sorted(path for path in Path(paths[0]).rglob("*") if path.suffix in kinds)
    if not paths:
        raise ValueError(f"--data {source}: there is no such file, nor a directory with any")
    forms, found, out = set(), [], {}
    for path in paths:
        for where, record in records(path):
            form = form_of(record, where)
            forms.add(form)
            pair = comparison(record, form, where)
            why = "prompts differ" if pair is None else None
            if pair and not (pair["chosen"] and pair["rejected"]):
                why = "a reply is empty"
            elif pair and pair["chosen"] == pair["rejected"]:
                why = "replies are equal"
            elif pair and pair["label"] == 0.5:
                why = "neither reply is the better one"
            if why:
                out[why] = out.get(why, 0) + 1
            else:
                found.append(pair)
    if not found:
        raise ValueError(f"--data {source}: no pair is left: {out}")
    return ", ".join(sorted(forms)), found, out


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
