"""Pictures of the study of hierarchies: curves over dimensions, and the disc with its tree.

Parent: none
New: everything
"""

import cmath
import math

from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.patheffects import withStroke

COLOURS = {"euclidean": "#c44e52", "poincare": "#1f5fa8", "lorentz": "#e0a100"}
LABELS = {"euclidean": "Euclidean", "poincare": "Poincaré ball", "lorentz": "Lorentz"}
STYLES = {"euclidean": "o-", "poincare": "o-", "lorentz": "x--"}  # the last two mostly coincide
BRANCHES = "#1f5fa8 #e07b00 #2e8b57 #b0307a #7a5cc4 #8c564b #008b9a #9a8b00 #c44e52 #3f51b5".split()
GREY = "#777777"


def draw_curves(results, path):
    """MAP and mean rank against the dimension, a column for each tree; results: rows of dict(tree,
    geometry, dim, mean_rank, map). Writes a PNG."""
    names = list(dict.fromkeys(row["tree"] for row in results))
    dims = sorted({row["dim"] for row in results})
    figure = Figure(figsize=(4.5 * len(names), 6))
    grid = figure.subplots(2, len(names), squeeze=False, sharex=True)
    for column, name in enumerate(names):
        for axes, key in zip(grid[:, column], ("map", "mean_rank")):
            for geometry, colour in COLOURS.items():
                rows = [r for r in results if (r["tree"], r["geometry"]) == (name, geometry)]
                x, y = [row["dim"] for row in rows], [row[key] for row in rows]
                axes.plot(x, y, STYLES[geometry], color=colour, label=LABELS[geometry])
            axes.set_xscale("log")
            axes.set_xticks(dims, dims)
            axes.minorticks_off()
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        grid[0, column].set(ylim=(0, 1.03), title=name)
        grid[1, column].set(yscale="log", xlabel="dimensions")
    grid[0, 0].set_ylabel("MAP (higher is better)")
    grid[1, 0].set_ylabel("mean rank (lower is better)")
    grid[0, 0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=140, bbox_inches="tight")


def arc(p, q, steps=100):
    """Points (x, y) of the geodesic between two of the disc, complex numbers: a straight line once
    p is moved to the centre, by a map that takes circles to circles, and moved back."""
    distance = math.atanh(min(abs(moved := (q - p) / (1 - p.conjugate() * q)), 1 - 1e-15))
    line = [cmath.rect(math.tanh(distance * k / steps), cmath.phase(moved)) for k in range(steps)]
    return [(z.real, z.imag) for z in [*((z + p) / (1 + p.conjugate() * z) for z in line), q]]


def branches(parents):
    """(hub, heads, branch of each node): down from the root while a single subtree holds half of
    all nodes; where that ends is the hub, and each of its children, largest first, the head of a
    branch. Nodes outside have the branch None. A node with several parents follows its first."""
    children, tops = [[] for _ in parents], [n for n, above in enumerate(parents) if not above]
    for node, above in enumerate(parents):
        if above:
            children[above[0]].append(node)

    def under(node):
        way = [node]
        for n in way:  # grows meanwhile
            way += children[n]
        return way

    hub = max(tops, key=lambda n: len(under(n)))
    while deeper := [n for n in children[hub] if 2 * len(under(n)) >= len(parents)]:
        hub = deeper[0]
    heads = sorted(children[hub], key=lambda n: -len(under(n)))
    found = {n: number for number, head in enumerate(heads) for n in under(head)}
    return hub, heads, [found.get(n) for n in range(len(parents))]


def draw_disc(points, labels, parents, path, most=48):
    """The disc with the points, tensor (N, 2), and the way from each to its parents along geodesics
    (circles that meet the rim at a right angle). The ten largest branches have a colour each; up to
    `most` of their heads are labelled, largest first, where there is room. Writes a PNG."""
    axes = (figure := Figure(figsize=(9, 9))).subplots()
    spots = [complex(*xy) for xy in points.tolist()]
    hub, heads, branch = branches(parents)
    colours = [GREY if b is None or b >= len(BRANCHES) else BRANCHES[b] for b in branch]
    edges = [(n, p) for n, above in enumerate(parents) for p in above]
    lines = [arc(spots[p], spots[n]) for n, p in edges]
    widths = [1.0 if p == hub else 0.6 for _, p in edges]
    shown = dict(colors=[colours[n] for n, _ in edges], linewidths=widths)
    axes.add_collection(LineCollection(lines, alpha=0.6, zorder=2, **shown))
    sizes = [30 if n in heads or n == hub or not parents[n] else 7 for n in range(len(labels))]
    axes.scatter(*points.T.tolist(), s=sizes, c=colours, zorder=3, lw=0)
    axes.add_patch(Circle((0, 0), 1, fill=False, color="#bbbbbb", lw=0.8))
    taken = []  # angles of the labels outside the rim
    for node in [n for n in heads if abs(spots[n]) > 0.8][:most]:
        angle = math.degrees(cmath.phase(spots[node]))
        if all(abs((angle - other + 180) % 360 - 180) > 2.6 for other in taken):
            taken.append(angle)
            at, left = cmath.rect(1.02, math.radians(angle)), abs(angle) > 90
            style = dict(rotation=angle + 180 * left, ha="right" if left else "left", va="center")
            style |= dict(rotation_mode="anchor", color=colours[node], fontsize=8)
            axes.text(at.real, at.imag, labels[node][:24], **style)
    for node in {hub, *(n for n, above in enumerate(parents) if not above)}:
        style = dict(ha="left" if node == hub else "right", va="bottom", fontsize=10, zorder=4)
        text = axes.text(spots[node].real, spots[node].imag + 0.02, labels[node][:24], **style)
        text.set_path_effects([withStroke(linewidth=3, foreground="white")])
    axes.set(xlim=(-1.02, 1.02), ylim=(-1.02, 1.02), aspect="equal")
    axes.axis("off")
    figure.savefig(path, dpi=130, bbox_inches="tight")
