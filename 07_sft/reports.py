"""What fine-tuning changed: a table, its picture, transcripts, a confusion matrix; and trackers.

Parent: none
New: everything
"""

from collections import Counter
from dataclasses import asdict

import numpy as np
import questions
import scores
from matplotlib.figure import Figure

from common import atomic

SHOWN = ("exact", "f1", "rouge_l", "stopped", "bpb")


def plain_guess(row):
    """The speaker who speaks most often in a passage: what one can say without the question."""
    names = [part.split(":\n")[0] for part in row["prompt"].split("\n\n") if ":\n" in part]
    return Counter(names).most_common(1)[0][0] if names else ""


def compare(before, after):
    """{group: {"n", "before", "after": {score: (mean, low, high)}, "guess": share}}: of the plays
    the questions that a passage answers, then each kind of question; else all."""
    groups = {"all": lambda row: True}
    kinds = [kind for kind in questions.KINDS if any(row["kind"] == kind for row in after)]
    if kinds:
        answerable = {"answerable": lambda row: row["kind"] in questions.ANSWERABLE}
        groups = answerable | groups
        groups |= {kind: lambda row, kind=kind: row["kind"] == kind for kind in kinds}
    table = {}
    for name, inside in groups.items():
        rows = [[row for row in part if inside(row)] for part in (before, after)]
        if rows[1]:
            found = dict(n=len(rows[1]), guess=None)
            found |= {k: scores.summarise(r) for k, r in zip(("before", "after"), rows)}
            if name in ("answerable", *questions.ANSWERABLE):
                guesses = [scores.of(plain_guess(row), row["gold"])["exact"] for row in rows[1]]
                found["guess"] = float(np.mean(guesses))
            table[name] = found
    return table


def lines(table, compared=True):
    """The table as text: each score before, where that was measured, and after, with the interval
    of 95% of the latter."""
    heads = f"{'before':>8}{'after':>8}" if compared else f"{'':8}{'now':>8}"
    found = [f"{'':11}{'n':>5}  {'':8}{heads}   95%{'':12}guess"]
    for name, row in table.items():
        for score in SHOWN if name in ("all", "answerable") else ("exact",):
            old, (new, low, high) = row["before"][score][0], row["after"][score]
            guess = f"{row['guess']:.3f}" if score == "exact" and row["guess"] is not None else ""
            span = f"{low:.3f} to {high:.3f}"
            first = f"{old:8.3f}" if compared else f"{'':8}"
            found.append(f"{name:11}{row['n']:5}  {score:8}{first}{new:8.3f}   {span:15}{guess}")
    return found


def plot(table, path):
    """Bars of exact matches, before and after, by kind of question, with intervals."""
    axes = (figure := Figure(figsize=(10, 4))).subplots()
    x = np.arange(len(table))
    for shift, when, colour in ((-0.2, "before", "0.7"), (0.2, "after", "tab:blue")):
        mean, low, high = np.array([row[when]["exact"] for row in table.values()]).T
        reach = np.maximum([mean - low, high - mean], 0)
        axes.bar(x + shift, mean, 0.4, yerr=reach, label=when, color=colour, capsize=3)
    guesses = [
        (i, row["guess"]) for i, row in enumerate(table.values()) if row["guess"] is not None
    ]
    if guesses:
        axes.plot(*zip(*guesses), "k_", markersize=24, label="most frequent speaker")
    axes.set_xticks(x, [f"{name}\n({row['n']})" for name, row in table.items()])
    axes.set(ylabel="share of answers that match exactly", ylim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def transcripts(before, after, path, most=5):
    """transcripts.md: some questions of each kind with the answers before and after."""
    text, seen = ["# Before and after fine-tuning", ""], Counter()
    for old, new in zip(before, after):
        seen[new["kind"]] += 1
        if seen[new["kind"]] > most:
            continue
        text += [f"## {new['kind'] or 'question'} {seen[new['kind']]}", ""]
        for name, words in (
            ("asked", new["prompt"]), ("gold", new["gold"]), ("before", old["answer"]),
            ("after", new["answer"]),
        ):  # fmt: skip
            row = dict(before=old, after=new).get(name)
            note = ""
            if row:
                note = " (exact)" if row["exact"] else ""
                note += "" if row["stopped"] else " (did not stop)"
            text += [f"**{name}**{note}", "", *(f"    {line}" for line in words.split("\n")), ""]
    with atomic(path, "w") as file:
        file.write("\n".join(text))


def plot_confusion(table, labels, title, path):
    """A confusion matrix: rows are what a text is, columns what it was taken for."""
    axes = (figure := Figure(figsize=(6.5, 5.5))).subplots()
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i in range(len(labels)):
        for j in range(len(labels)):
            colour = "white" if share[i, j] > 0.6 else "black"
            axes.text(j, i, str(table[i, j]), ha="center", va="center", color=colour)
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="taken for", ylabel="is", title=title)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def trackers(run, how):
    """A function that sends a line of metrics to TensorBoard and Weights & Biases, where wanted."""
    found = []
    if how.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(run.dir / "tensorboard"))
        found.append(
            lambda line: [
                board.add_scalar(k, v, line["step"]) for k, v in line.items() if v is not None
            ]
        )
    if how.wandb:
        import wandb

        settings = dict(config=asdict(how), dir=run.dir, name=run.dir.name, id=run.dir.name)
        tracked = wandb.init(project="llm-from-nothing", resume="allow", **settings)
        found.append(lambda line: tracked.log(line, step=line["step"]))
    return lambda line: [write(line) for write in found]
