"""Pictures of what the routers do: their load over time, and which expert takes which token.

What it teaches: a falling loss hides a router that has given up most of its experts; look at it.

Parent: none
New: everything
"""

import json

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from common import atomic


def routing_lines(path):
    """The lines of a metrics.jsonl that tell of routers, by step; of those logged again after a
    resume the last."""
    lines = {}
    for line in map(json.loads, open(path)):
        if "load" in line:
            lines[line["step"]] = line
    return [lines[step] for step in sorted(lines)]


def summary(line):
    """A line of text for each mixture: its experts' shares of the load, entropy, balance loss; and
    one for what was dropped."""
    columns = zip(line.get("load", []), line.get("entropy", []), line.get("balance_loss", []))
    for layer, (load, entropy, balance) in enumerate(columns):
        shares = " ".join(f"{100 * share:3.0f}" for share in load[:16])
        more = f" and {len(load) - 16} more" if len(load) > 16 else ""
        idle = f", {sum(share == 0 for share in load)} idle, entropy {entropy:.2f} nats"
        yield f"mixture {layer}: load {shares}{more} %{idle}, balance loss {balance:.2f}"
    if line.get("dropped"):
        yield f"dropped: {line['dropped']:.1%} of the assignments"


def smooth(values, width):
    """Means over windows of `width` along the first axis."""
    values = np.asarray(values, dtype=float)
    n = len(values) // width * width
    return values[:n].reshape(-1, width, *values.shape[1:]).mean(1)


def plot_routing(directory, name="routing.png"):
    """The load of each expert over the steps, one heat map a mixture, and below them entropy,
    balance loss and dropped tokens; from metrics.jsonl."""
    lines = routing_lines(directory / "metrics.jsonl")
    if not lines:
        return
    width = max(1, len(lines) // 200)
    steps = smooth([line["step"] for line in lines], width)
    load = smooth([line["load"] for line in lines], width)  # (steps, mixtures, E)
    _, n, E = load.shape
    figure = Figure(figsize=(8, 1.3 * min(n, 12) + 2.6), layout="constrained")
    grid = figure.add_gridspec(min(n, 12) + 1, 3, height_ratios=[1.0] * min(n, 12) + [1.8])
    for i in range(min(n, 12)):
        axes = figure.add_subplot(grid[i, :])
        extent = (steps[0] - 0.5, steps[-1] + 0.5, E - 0.5, -0.5)
        settings = dict(aspect="auto", extent=extent, vmin=0, vmax=2, interpolation="nearest")
        image = axes.imshow(E * load[:, i].T, cmap="viridis", **settings)
        axes.set_ylabel(f"mixture {i}\nexpert")
        figure.colorbar(image, ax=axes, label="load, 1: even" if i == 0 else None, pad=0.02)
        if i + 1 < min(n, 12):
            axes.set_xticklabels([])
    for column, (key, title) in enumerate(
        (
            ("entropy", "entropy of a token's router, nats"),
            ("balance_loss", "balance loss (1: even)"),
            ("dropped", "tokens dropped, %"),
        )
    ):
        axes = figure.add_subplot(grid[-1, column])
        values = smooth([line[key] for line in lines], width)
        axes.plot(steps, 100 * values if key == "dropped" else values)
        if key == "dropped":
            axes.set_ylim(0, max(1, 105 * values.max()))
        axes.set_title(title, fontsize=8)
        axes.set_xlabel("step")
        if key == "entropy":
            axes.axhline(np.log(E), color="gray", linestyle=":")
            axes.legend([f"mixture {i}" for i in range(min(n, 6))], fontsize=6)
    with atomic(directory / name) as file:
        figure.savefig(file, format="png", dpi=120)
    return figure


def colour(e, E):
    return colormaps["tab10"](e) if E <= 10 else colormaps["gist_rainbow"](e / E)


@torch.no_grad()
def first_choices(model, ids):
    """The expert that each token's router likes best: ids (T,) to (mixtures, T)."""
    training = model.training
    model.eval()
    model(ids[None])
    model.train(training)
    return torch.stack([mixture.routing.experts[:, 0] for mixture in model.mixtures()])


def draw_map(model, tokenizer, ids, path, longest=76):
    """The text of ids (T,), once for each mixture, every token on the colour of the expert that its
    router likes best."""
    choices = first_choices(model, ids).tolist()
    texts = [tokenizer.decode([i]) for i in ids.tolist()]
    places, row, column = [], 0, 0
    for text in texts:
        if column + len(text.replace("\n", "")) > longest:
            row, column = row + 1, 0
        shown = text.replace("\n", "¶")
        places.append((row, column, shown))
        column += len(shown)
        if "\n" in text:
            row, column = row + 1, 0
    rows, E = row + 1, model.config.n_experts
    columns = max(column + len(text) for _, column, text in places)
    size = (0.115 * columns + 0.5, len(choices) * (0.19 * rows + 0.45))
    figure = Figure(figsize=size, layout="constrained")
    for axes, chosen, i in zip(
        figure.subplots(len(choices), squeeze=False)[:, 0], choices, range(99)
    ):
        for (row, column, text), e in zip(places, chosen):
            box = Rectangle((column, row), len(text), 1, color=colour(e, E), alpha=0.45, lw=0)
            axes.add_patch(box)
            style = dict(family="monospace", fontsize=8, va="center", parse_math=False)
            for j, letter in enumerate(text):  # one by one: fonts differ in width
                axes.text(column + j + 0.5, row + 0.5, letter, ha="center", **style)
        axes.set(xlim=(0, columns), ylim=(rows, 0), xticks=[], yticks=[])
        axes.set_title(f"mixture {i}: each token's first expert", fontsize=9, loc="left")
    boxes = [Rectangle((0, 0), 1, 1, color=colour(e, E), alpha=0.45) for e in range(min(E, 20))]
    style = dict(loc="outside lower left", ncols=10, fontsize=8, handlelength=1, columnspacing=1)
    figure.legend(boxes, range(len(boxes)), title="expert", **style)
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=120)
    return figure


def specialities(model, tokenizer, tokens, n=6, least=5):
    """For each mixture and expert, its share of the tokens and the n tokens (seen at least `least`
    times) of which it takes the largest share: [[(share, [text, ...]), ...], ...]."""
    T, found = model.config.context_length, []
    windows = torch.as_tensor(np.asarray(tokens, dtype=np.int64)).split(T)
    device = model.token_embedding.weight.device
    chosen = torch.cat([first_choices(model, w.to(device)).cpu() for w in windows], 1)
    ids, E = torch.cat(windows), model.config.n_experts
    seen = torch.bincount(ids, minlength=model.config.vocab_size)
    for row in chosen:
        pairs = torch.bincount(row * len(seen) + ids, minlength=E * len(seen)).view(E, -1)
        share = pairs / seen.clamp(min=1) * (seen >= least)
        best = share.topk(min(n, share.shape[1]))
        found.append(
            [
                (
                    (pairs[e].sum() / len(ids)).item(),
                    [
                        repr(tokenizer.decode([i]))
                        for i, s in zip(best.indices[e].tolist(), best.values[e].tolist())
                        if s > 0
                    ],
                )
                for e in range(E)
            ]
        )
    return found


def plot_collapse(home, variants):
    """collapse.png: for each variant, {folder: title}, the load of every mixture's experts over the
    steps, as bands that fill the height; below, the training loss of all."""
    figure = Figure(figsize=(9, 8), layout="constrained")
    runs = {folder: routing_lines(home / folder / "metrics.jsonl") for folder in variants}
    n = len(next(iter(runs.values()))[0]["load"])
    axes = figure.subplots(n + 1, len(variants), squeeze=False, sharex=True)
    for column, (folder, title) in enumerate(variants.items()):
        lines = runs[folder]
        width = max(1, len(lines) // 100)
        steps = smooth([line["step"] for line in lines], width)
        load = smooth([line["load"] for line in lines], width)  # (steps, mixtures, E)
        E = load.shape[2]
        for i in range(n):
            colours = [colour(e, E) for e in range(E)]
            axes[i, column].stackplot(steps, load[:, i].T, colors=colours)
            axes[i, column].set(ylim=(0, 1), xlim=(steps[0], max(steps[-1], steps[0] + 1)))
            if column == 0:
                axes[i, column].set_ylabel(f"mixture {i}: share\nof each expert")
        axes[0, column].set_title(f"balanced by {title}")
        losses = smooth([line["train_loss"] for line in lines], width)
        for other in range(len(variants)):
            strong = dict(label=title, linewidth=2) if other == column else dict(alpha=0.25)
            axes[n, other].plot(steps, losses, color=f"C{column}", **strong)
        axes[n, column].set_xlabel("step")
    for column in range(len(variants)):
        axes[n, column].legend()
    axes[n, 0].set_ylabel("training loss, nats")
    with atomic(home / "collapse.png") as file:
        figure.savefig(file, format="png", dpi=120)
