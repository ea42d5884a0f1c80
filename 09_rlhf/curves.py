"""What a run did, drawn: reward, KL, entropy, clip fraction, length, value, with bands over seeds.

Parent: none
New: everything

Read in this order: read, plot, hack, samples.
"""

import json

import numpy as np
from matplotlib.figure import Figure

from common import atomic

PANELS = {
    "val_reward": "held-out reward, likeliest reply",
    "val_drawn": "held-out reward, drawn reply",
    "reward": "reward in training",
    "val_kl": "KL to the reference (nats a reply)",
    "val_entropy": "entropy (nats a token)",
    "clip_fraction": "share of tokens clipped",
    "length": "length (tokens)",
    "explained_variance": "variance explained by the value",
    "no_variance": "share of groups without variance",
    "val_in_order": "held-out pairs in order",
}


def read(directory):
    """The lines of a run's metrics in order; of a step that was logged again, the last."""
    with open(directory / "metrics.jsonl") as file:
        lines = {line["step"]: line for line in map(json.loads, file)}
    return [lines[step] for step in sorted(lines)]


def series(runs, name):
    """Steps, and mean, lowest and highest over runs of what they all have at these."""
    found = [
        {line["step"]: line[name] for line in run if line.get(name) is not None} for run in runs
    ]
    steps = sorted(set.intersection(*map(set, found)))
    values = np.array([[one[step] for step in steps] for one in found])  # (runs, steps)
    if name in (
        "reward",
        "clip_fraction",
        "length",
        "explained_variance",
        "no_variance",
        "entropy",
    ):
        width = max(1, len(steps) // 20)  # smoothed: a round is few prompts
        kernel = np.ones(width) / width
        values = np.array([np.convolve(row, kernel, "valid") for row in values])
        steps = steps[width - 1 :]
    return steps, values.mean(0), values.min(0), values.max(0)


def plot(groups, path, goal=None):
    """{label: runs}, each the lines of read: a panel for what any of them has, with a band from the
    lowest to the highest run. goal: a line across the held-out reward."""
    has = {name for runs in groups.values() for run in runs for line in run for name in line}
    panels = [name for name in PANELS if name in has]
    columns = min(3, len(panels))
    shape = (-(-len(panels) // columns), columns)
    figure = Figure(figsize=(4.2 * shape[1], 3.1 * shape[0]))
    axes = np.ravel(figure.subplots(*shape))
    for ax, name in zip(axes, panels):
        for color, (label, runs) in enumerate(groups.items()):
            if not all(any(line.get(name) is not None for line in run) for run in runs):
                continue
            steps, mean, low, high = series(runs, name)
            ax.plot(steps, mean, color=f"C{color}", label=label)
            ax.fill_between(steps, low, high, color=f"C{color}", alpha=0.2, linewidth=0)
        ax.set(xlabel="step", title=PANELS[name])
        ax.title.set_fontsize(10)
        if goal is not None and name == "val_reward":
            ax.axhline(goal, color="0.6", linestyle=":", linewidth=1)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def hack(groups, path):
    """{label: lines}: the reward that is learned from and the true one, against KL and step."""
    figure = Figure(figsize=(9, 7))
    axes = dict(zip(("proxy", "true"), figure.subplots(2, 2)))
    for color, (label, lines) in enumerate(groups.items()):
        some = [line for line in lines if "val_drawn_watched" in line]
        for name, style, what in (("val_drawn", "--", "proxy"), ("val_drawn_watched", "-", "true")):
            values = [line[name] for line in some]
            for ax, key in zip(axes[what], ("val_kl", "step")):
                x = [line[key] for line in some]
                ax.plot(x, values, style, color=f"C{color}", label=label)
                ax.set(xlabel=dict(val_kl="KL (nats a reply)", step="step")[key])
                ax.set(ylabel=f"{what} reward, drawn")
    axes["true"][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def samples(rows, before, after, path):
    """The same held-out prompts answered before and after, as Markdown."""
    parts = ["# Replies to held-out prompts, before and after\n"]
    for messages, *both in zip(rows, before, after):
        parts.append("```text\n" + messages[-1]["content"] + "\n```\n")
        for name, reply in zip(("before", "after"), both):
            parts.append(
                f"{name}, reward {reply['reward']:.3f}:\n\n```text\n{reply['reply']}\n```\n"
            )
    with atomic(path, "w") as file:
        file.write("\n".join(parts))
