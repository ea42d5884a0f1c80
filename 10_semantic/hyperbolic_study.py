"""Two hierarchies in flat and in hyperbolic space: how many dimensions does a tree need?

Every tree is embedded in Euclidean space, in Poincaré's ball and on Lorentz' hyperboloid, for as
many epochs in each, and its closure read off the distances again. Each has its own best settings.

Parent: none
New: everything
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from hyperbolic import SETTINGS, embed, reconstruction
from trees import class_tree, closure, play_tree

DEEPEST = 200  # levels in a tree file: every node is paired with all that is above it
DISC = dict(epochs=300, settings=(1.0, 1.0, 0.5))  # rate, sharpness, longest step of the picture


@dataclass
class HyperbolicOptions:
    dims: str = "2,5,10,50"  # dimensions to embed in, parted by commas
    epochs: int = 60  # passes over the nodes, the same for every geometry
    plays: str = "macbeth,hamlet,king-lear"  # plays of the first tree, parted by commas
    tree: str | None = None  # a file of lines child<TAB>parent; None: plays, and Python's classes
    seed: int = 0  # of the first points and of the nodes drawn

    def __post_init__(self):
        if not all(dim.strip().isdecimal() and int(dim) > 0 for dim in self.dims.split(",")):
            raise ValueError(f"dims {self.dims!r}: give whole numbers above 0, as in 2,5,10")
        if self.epochs < 1:
            raise ValueError(f"epochs is {self.epochs}: it must be at least 1")
        if not all(name.strip() for name in self.plays.split(",")):
            raise ValueError(f"plays {self.plays!r}: give names, as in macbeth,hamlet")


def levels(parents):
    """Of each node the longest way up to a root, a list of int; parents as in play_tree. A node on
    a cycle, or below one, has None."""
    found, waiting = [None] * len(parents), range(len(parents))
    while ready := [n for n in waiting if all(found[p] is not None for p in parents[n])]:
        for n in ready:
            found[n] = 1 + max((found[p] for p in parents[n]), default=-1)
        waiting = [n for n in waiting if found[n] is None]
    return found


def read_tree(path):
    """(labels, parents) of a UTF-8 file of lines child<TAB>parent; lines for one child make a DAG.

    What is no child of anything is a root; empty lines are passed over. Raises ValueError, with the
    file and the line, for a line that is not two names, a cycle, or a tree of too many levels."""
    index, parents, lines = {}, [], {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            pair = [part.strip() for part in line.decode("utf-8-sig").split("\t")]
        except UnicodeDecodeError:
            raise ValueError(f"{path}, line {number}: this is not UTF-8 text") from None
        if pair == [""]:
            continue
        if len(pair) != 2 or not all(pair):
            why = "a name is missing" if len(pair) == 2 else f"{len(pair) - 1} tabs"
            raise ValueError(f"{path}, line {number}: {why}, where child<TAB>parent is wanted")
        for label in pair:
            if index.setdefault(label, len(parents)) == len(parents):
                parents.append([])
        child, parent = (index[label] for label in pair)
        if lines.setdefault((child, parent), number) == number:
            parents[child].append(parent)
    if not parents:
        raise ValueError(f"{path}, line 1: the file is empty, no line is child<TAB>parent")
    labels, found = list(index), levels(parents)
    if None in found:  # the way up from such a node ends on the cycle
        child, seen = found.index(None), set()
        while child not in seen:
            seen.add(child)
            before, child = child, next(p for p in parents[child] if found[p] is None)
        number = lines[before, child]
        raise ValueError(f"{path}, line {number}: {labels[child]!r} is its own ancestor")
    if max(found) > DEEPEST:
        number = lines[(child := found.index(DEEPEST + 1)), parents[child][0]]
        raise ValueError(f"{path}, line {number}: the tree has more than {DEEPEST} levels")
    return labels, parents


def below(labels, parents, top):
    """(labels, parents) of the node labelled `top`, now the first, and of all below it."""
    edges, first = closure(parents), labels.index(top)
    index = {n: i for i, n in enumerate([first, *edges[edges[:, 1] == first, 0].tolist()])}
    return [labels[n] for n in index], [[index[p] for p in parents[n] if p in index] for n in index]


def read_trees(o):
    """{name: (labels, parents)}: of the tree file, or of plays and Python's classes. Raises
    ValueError for a play that is not there and as read_tree does."""
    if o.tree is not None:
        return {Path(o.tree).stem: read_tree(o.tree)}
    plays = play_tree([name.strip() for name in o.plays.split(",")])
    return {"plays": plays, "classes": class_tree()}


def compare(found, options=None, say=print, path=None):
    """Embed {name: (labels, parents)} and measure: dict(results, trees, disc). `path` keeps the
    rows that are done, one JSON a line: those are not done again.

    results: rows of dict(tree, geometry, dim, mean_rank, map, seconds); trees: {name: dict(nodes,
    pairs, depth)}; disc: (points (N, 2) of the ball, labels, parents), as draw_disc takes it, of
    Python's exceptions where these are there, else of the first tree. say is called with a line
    for each row."""
    o, results, trees = options or HyperbolicOptions(), [], {}
    kept = [json.loads(line) for line in open(path)] if path and path.exists() else []
    kept = {(row["tree"], row["geometry"], row["dim"]): row for row in kept}
    disc = next(iter(found.values()))
    if "classes" in found:
        labels, parents = below(*found["classes"], "BaseException")
        disc = [label.rpartition(".")[2] for label in labels], parents
    for name, (labels, parents) in found.items():
        edges = closure(parents)
        trees[name] = dict(nodes=len(labels), pairs=len(edges), depth=max(levels(parents)))
        for dim in sorted({int(dim) for dim in o.dims.split(",")}):
            for geometry in SETTINGS:
                if (name, geometry, dim) in kept:
                    results.append(kept[name, geometry, dim])
                    continue
                begin = time.perf_counter()
                points = embed(edges, len(labels), dim, geometry, o.epochs, seed=o.seed)
                rank, precision = reconstruction(points, edges, geometry)
                row = dict(tree=name, geometry=geometry, dim=dim, mean_rank=round(rank, 2))
                row |= dict(map=round(precision, 4), seconds=round(time.perf_counter() - begin, 1))
                results.append(row)
                if path:
                    with open(path, "a") as file:
                        file.write(json.dumps(row) + "\n")
                text = f"mean rank {rank:8.2f}, MAP {precision:.4f}, {row['seconds']} s"
                say(f"{name:10} {geometry:9} {dim:4} dimensions: {text}")
    points = embed(closure(disc[1]), len(disc[0]), 2, "poincare", seed=o.seed, **DISC)
    return dict(results=results, trees=trees, disc=(points, *disc))
