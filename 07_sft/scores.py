"""How good an answer is: exact match, token F1, ROUGE-L, intervals; and questions with choices.

What it teaches: an exact match is plain but strict, the overlap of words is lenient, and a mean of
300 answers has an error of several percent, so an interval belongs beside it.

Parent: none
New: everything

Papers
- F1 of tokens: Rajpurkar et al. 2016, arXiv 1606.05250; ROUGE-L: Lin 2004, aclanthology W04-1013
- Bootstrap: Efron 1979, doi 10.1214/aos/1176344552
- Choices by likelihood: Brown et al. 2020, arXiv 2005.14165; MMLU: Hendrycks et al., 2009.03300
"""

import math
import re
from collections import Counter

import numpy as np


def words(text):
    """Lower case, without punctuation: what F1 and ROUGE-L compare."""
    return re.findall(r"\w+", text.lower())


def f1(answer, gold):
    """Harmonic mean of the share of the answer's words that are gold and of gold's that are found,
    each word as often as it is there. Two texts without a word are alike."""
    a, b = words(answer), words(gold)
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b)) if a or b else 1.0


def rouge_l(answer, gold):
    """The same with the words of the longest common subsequence: their order counts."""
    a, b = words(answer), words(gold)
    lengths = [0] * (len(b) + 1)  # of the longest for a so far and the first words of b
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            longest = diagonal + 1 if word == other else max(lengths[j], lengths[j - 1])
            diagonal, lengths[j] = lengths[j], longest
    return 2 * lengths[-1] / (len(a) + len(b)) if a or b else 1.0


def of(answer, gold):
    """The scores of one answer. exact: alike but for white space."""
    exact = float(answer.split() == gold.split())
    return dict(exact=exact, f1=f1(answer, gold), rouge_l=rouge_l(answer, gold))


def interval(values, weights=None, draws=1000, seed=1):
    """(mean, low, high): the middle 95% of the means of `draws` samples with replacement. With
    weights, sum of values over sum of weights."""
    values = np.asarray(values, float)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, float)
    picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    means = values[picks].sum(1) / weights[picks].sum(1)
    return values.sum() / weights.sum(), *np.quantile(means, (0.025, 0.975))


def summarise(rows):
    """{score: (mean, low, high)} of what sft.evaluate gives."""
    found = {k: interval([r[k] for r in rows]) for k in ("exact", "f1", "rouge_l", "stopped")}
    nats, sizes = [row["nats"] / math.log(2) for row in rows], [row["bytes"] for row in rows]
    return found | dict(bpb=interval(nats, sizes))


def confusion(gold, found, n):
    """How often class i was taken for j, int64 (n, n)."""
    table = np.zeros((n, n), np.int64)
    np.add.at(table, (np.asarray(gold), np.asarray(found)), 1)
    return table


def accuracy_and_f1(table):
    """Of a confusion table: the share that is right, and the mean over classes of their F1 (0 for a
    class that is never found)."""
    right, both = np.diag(table), table.sum(0) + table.sum(1)
    per_class = 2 * right / np.maximum(both, 1)
    return right.sum() / table.sum(), per_class[both > 0].mean()
