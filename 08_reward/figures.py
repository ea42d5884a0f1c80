"""How good a reward model is: accuracy by kind, calibration, what margins and lengths do; pictures.

What it teaches: an accuracy says how often the better reply is ahead; whether a lead of one means
the 73% it claims, calibration; and whether the longer reply is ahead for being longer, a probe.

Parent: 07_sft/scores.py (interval)
New: ahead, groups, accuracy, calibration, by_margin, length_bias, shared_words,
    last_stop, lines, plot, examples

Expected calibration error: Guo et al. 2017, arXiv 1706.04599.
"""

import math
import re
from collections import Counter

import numpy as np
import preferences
from matplotlib.figure import Figure

from common import atomic

# What a model trained on the plays for three minutes should reach.
GOALS = {"all": 0.75, "another play": 0.7, "another speaker": 0.6, "corrupted": 0.95}


def interval(values, weights=None, draws=1000, seed=1):
    """(mean, low, high): the middle 95% of the means of `draws` samples with replacement. With
    weights, sum of values over sum of weights."""
    values = np.asarray(values, float)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, float)
    picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    means = values[picks].sum(1) / weights[picks].sum(1)
    return values.sum() / weights.sum(), *np.quantile(means, (0.025, 0.975))


def ahead(rows):
    """Reward of the chosen reply less that of the rejected one, (P,)."""
    return np.array([row["chosen"] - row["rejected"] for row in rows])


def groups(rows):
    """{name: rows}: all, and where pairs have kinds each of them, the corrupted ones together."""
    found = {"all": rows}
    spoilt = [row for row in rows if row["kind"] in preferences.CORRUPTED]
    for kind in ("another play", "another speaker"):
        found[kind] = [row for row in rows if row["kind"] == kind]
    found["corrupted"] = spoilt
    found |= {kind: [r for r in spoilt if r["kind"] == kind] for kind in preferences.CORRUPTED}
    return {name: rows for name, rows in found.items() if rows}


def accuracy(rows):
    """(share, low, high) of pairs whose better reply is ahead; equal rewards are half right."""
    return interval((np.sign(ahead(rows)) + 1) / 2)


def calibration(rows, bins=10):
    """(claimed, found, how many) of each bin of pairs, and the expected calibration error.

    Of each pair the reply with the higher reward: the probability that the model gives it to be the
    better one, from 1/2 to 1, against how often it is. Bins have about as many pairs each."""
    lead = ahead(rows)
    claimed, right = 1 / (1 + np.exp(-np.abs(lead))), (np.sign(lead) + 1) / 2
    parts = np.array_split(np.argsort(claimed, kind="stable"), min(bins, len(rows)))
    table = [(claimed[part].mean(), right[part].mean(), len(part)) for part in parts]
    error = sum(abs(c - f) * n for c, f, n in table) / len(rows)
    return table, error


def by_margin(rows, bins=8):
    """(mean size of the lead, accuracy, how many) of pairs whose replies are ever further apart."""
    lead = ahead(rows)
    parts = np.array_split(np.argsort(np.abs(lead), kind="stable"), min(bins, len(rows)))
    right = (np.sign(lead) + 1) / 2
    return [(np.abs(lead[part]).mean(), right[part].mean(), len(part)) for part in parts]


def length_bias(rows):
    """What length does: share of pairs that "the longer one is better" gets right; accuracy where
    the chosen is longer and where it is shorter; correlation of reward and length differences."""
    lead, longer = ahead(rows), np.array([np.subtract(*row["lengths"]) for row in rows])
    right = (np.sign(lead) + 1) / 2
    found = dict(longer_is_better=float(((np.sign(longer) + 1) / 2).mean()))
    for name, part in (("chosen_longer", longer > 0), ("chosen_shorter", longer < 0)):
        found[name] = float(right[part].mean()) if part.any() else None
    spread = lead.std() * longer.std()
    found["correlation"] = float(np.corrcoef(lead, longer)[0, 1]) if spread else 0.0
    return found


def shared_words(rows, pairs, learned):
    """The same rows with the judge that needs no model: how many words a reply shares with its
    prompt, rare ones counting more (their idf in `learned` pairs), over the root of its length."""

    def words(text):
        return set(re.findall(r"\w+", text.lower()))

    documents = {pair["chosen"] for pair in learned}
    counts = Counter(word for text in documents for word in words(text))

    def score(pair, reply):
        shared = words(pair["prompt"][-1]["content"]) & words(pair[reply])
        found = sum(math.log((len(documents) + 1) / (counts[word] + 1)) for word in shared)
        return found / math.sqrt(1 + len(pair[reply].split()))

    return [
        row | {reply: score(pairs[row["pair"]], reply) for reply in ("chosen", "rejected")}
        for row in rows
    ]


def last_stop(rows, pairs):
    """The same rows with the judge that looks at the last character: 1 for a mark, 0 for a letter.
    A defect that any text shows at its end is learned from there, and nothing else of it."""
    return [
        row
        | {r: float(bool(re.search(r"\W$", pairs[row["pair"]][r]))) for r in ("chosen", "rejected")}
        for row in rows
    ]


def lines(rows, others):
    """Accuracy by kind as text, beside {name: rows} of judges that were not trained for it."""
    widths = [len(name) + 3 for name in others]
    head = "".join(f"{name:>{width}}" for name, width in zip(others, widths))
    found = [f"{'held-out pairs':16}{'n':>6}{head}   by reward   95%"]
    for name, part in groups(rows).items():
        share, low, high = accuracy(part)
        goal = GOALS.get(name) if rows[0]["kind"] else None
        shares = [accuracy(groups(other)[name])[0] for other in others.values()]
        found.append(
            f"{name:16}{len(part):6}"
            + "".join(f"{x:{width}.1%}" for x, width in zip(shares, widths))
            + f"{share:12.1%}   {low:.1%} to {high:.1%}"
            + (f"   goal {goal:.0%}: {'met' if share >= goal else 'missed'}" if goal else "")
        )
    return found


def plot(rows, before, path):
    """scores.png: accuracy by kind, calibration, accuracy by lead, reward against length."""
    figure = Figure(figsize=(11, 8.5))
    ((kinds, reliability), (margins, lengths)) = figure.subplots(2, 2)
    parts, others = groups(rows), groups(before)
    y = np.arange(len(parts))[::-1]
    for shift, found, label, colour in (
        (0.2, others, "by likelihood, before", "0.7"), (-0.2, parts, "by reward", "tab:blue"),
    ):  # fmt: skip
        mean, low, high = np.array([accuracy(part) for part in found.values()]).T
        reach = np.maximum([mean - low, high - mean], 0)
        kinds.barh(y + shift, mean, 0.4, xerr=reach, label=label, color=colour, capsize=3)
    kinds.axvline(0.5, color="black", linewidth=0.8)
    kinds.set_yticks(y, [f"{name} ({len(part)})" for name, part in parts.items()])
    kinds.set(xlabel="share of pairs in the right order", xlim=(0, 1))
    kinds.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    table, error = calibration(rows)
    claimed, right, _ = np.array(table).T
    reliability.plot([0.5, 1], [0.5, 1], color="black", linewidth=0.8)
    reliability.plot(claimed, right, "o-", color="tab:blue")
    reliability.set(xlabel="probability that the model gives", ylabel="share that is right")
    reliability.set_title(f"expected calibration error {error:.3f}", fontsize=10)
    lead, right, _ = np.array(by_margin(rows)).T
    margins.plot(lead, right, "o-", color="tab:blue")
    margins.plot(lead, 1 / (1 + np.exp(-lead)), color="black", linewidth=0.8, label="as claimed")
    margins.set(xlabel="how far apart the two rewards are", ylabel="share that is right")
    margins.legend(loc="lower right")
    longer = [np.subtract(*row["lengths"]) for row in rows]
    lengths.scatter(longer, ahead(rows), s=4, alpha=0.4, color="tab:blue")
    lengths.axhline(0, color="black", linewidth=0.8)
    lengths.set(xlabel="chosen longer than rejected by (characters)")
    lengths.set(ylabel="chosen ahead by (reward)")
    lengths.set_title(f"correlation {length_bias(rows)['correlation']:.2f}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def examples(rows, before, pairs, path, most=3):
    """examples.md: some pairs of each kind with both replies and who is ahead, before and after."""
    text = ["# Which reply is ahead, before training and after", ""]
    for name, part in groups(rows).items():
        if name in ("all", "corrupted") and len(groups(rows)) > 1:
            continue
        for n, row in enumerate(part[:most], 1):
            pair = pairs[row["pair"]]
            old = next(other for other in before if other["pair"] == row["pair"])
            text += [f"## {name} {n}", "", "**asked**", ""]
            text += [f"    {line}" for line in pair["prompt"][-1]["content"].split("\n")]
            for reply in ("chosen", "rejected"):
                said = f"{old[reply]:.2f} nats a token before, reward {row[reply]:.2f} after"
                text += ["", f"**{reply}** ({said})", ""]
                text += [f"    {line}" for line in pair[reply].split("\n")]
            text += [""]
    with atomic(path, "w") as file:
        file.write("\n".join(text))
