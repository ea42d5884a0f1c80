"""Two hierarchies to embed: the plays down to their speeches, and Python's own classes.

A tree is a list of labels and, for each node, the list of its parents (none for the root). Classes
are read from the source of the standard library with ast: nothing is imported and nothing runs.

Parent: none
New: everything

Read in this order: closure, play_tree, read, find, class_tree.
"""

import ast
import builtins
import re
import sysconfig
import warnings
from pathlib import Path

import torch

import common

SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3"}
SKIP |= {"turtledemo", "ensurepip", "lib-dynload", "__pycache__"}
TYPES = {name: kind for name, kind in vars(builtins).items() if isinstance(kind, type)}
TYPES.pop("__loader__", None)


def closure(parents):
    """Every node with each of its ancestors: (E, 2) int64 pairs (node, ancestor), in order.

    parents: of each node the list of its parents; an ancestor that is reached by several ways
    counts once. Raises ValueError where a node is its own ancestor or a parent is no node."""
    found = {}

    def above(node, path):
        if node in path or not 0 <= node < len(parents):
            raise ValueError(f"node {node} is its own ancestor, or not one of {len(parents)} nodes")
        if node not in found:
            over = [above(parent, path | {node}) for parent in parents[node]]
            found[node] = set(parents[node]).union(*over)
        return found[node]

    pairs = [(n, ancestor) for n in range(len(parents)) for ancestor in sorted(above(n, set()))]
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


def play_tree(names=None):
    """(labels, parents): the root "plays", then play, act, scene and speech in the order read.

    names: which of common.plays(); None is all 38. A speech is labelled with its speaker. A scene
    before the first heading of an act, mostly a prologue, hangs on the play. Raises ValueError for
    a play that is not there."""
    plays, labels, parents = common.plays(), ["plays"], [[]]
    if unknown := set(names or ()) - set(plays):
        raise ValueError(f"there is no play {min(unknown)}: there are {', '.join(plays)}")

    def add(label, parent):
        labels.append(label)
        parents.append([parent])
        return len(labels) - 1

    for name in plays if names is None else names:
        play = act = scene = add(name, 0)
        for kind, speaker, text in plays[name]:
            if kind == "act":
                act = scene = add(text, play)
            elif kind == "scene":
                scene = add(text, act)
            elif kind == "speech":
                add(speaker, scene)
    return labels, parents


def read(body, package, scope, outer=""):
    """Collect from the statements of a module, or of a class `outer`, into scope what find needs:
    {qualified class: list of dotted bases, imported or assigned name: (module, name there), "*":
    modules all of whose names are imported}. package: where relative imports begin. Functions are
    not entered: their classes come and go."""
    for node in body:
        if isinstance(node, ast.ClassDef):  # Generic[T] is Generic, namedtuple(...) its own base
            bases = [re.split(r"[\[(]", ast.unparse(base))[0] for base in node.bases]
            scope[outer + node.name] = [b for b in bases if b.replace(".", "").isidentifier()]
            read(node.body, package, scope, f"{outer}{node.name}.")
        elif isinstance(node, ast.Import) and not outer:
            for a in node.names:  # import a.b binds a; import a.b as c binds c to a.b
                there = a.name if a.asname else a.name.split(".")[0]
                scope.setdefault(a.asname or there, (there, ""))
        elif isinstance(node, ast.ImportFrom) and not outer:
            up = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*up, *filter(None, [node.module])])
            scope["*"] += [source for a in node.names if a.name == "*"]
            for a in node.names:
                scope.setdefault(a.asname or a.name, (source, a.name))
        elif isinstance(node, ast.Assign) and isinstance(node.value, (ast.Name, ast.Attribute)):
            for target in node.targets:
                scope.setdefault(outer + ast.unparse(target), ("", ast.unparse(node.value)))  # here
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
            for part in ("body", "handlers", "orelse", "finalbody"):
                read(getattr(node, part, []), package, scope, outer)


def find(modules, module, name, seen=frozenset()):
    """The label of the class that a dotted `name` means in `module`; None if it means none. seen:
    the (module, name) on the way here, for an alias may lead back to itself."""
    while (cut := name.partition("."))[2] and f"{module}.{cut[0]}" in modules:
        module, name = f"{module}.{cut[0]}", cut[2]
    if module not in modules:  # written in C: known by its name alone
        return name if module == "builtins" else f"{module}.{name}"
    scope, (head, _, tail) = modules[module], name.partition(".")
    if isinstance(scope.get(name), list) and name != "*":
        return f"{module}.{name}"
    ways = [(star, name) for star in scope["*"] if star in modules]
    if isinstance(scope.get(head), tuple):
        source, there = scope[head]
        ways = [(source or module, ".".join(filter(None, [there, tail])))]
    for way in (way for way in ways if way not in seen):
        if label := find(modules, *way, seen | {(module, name)}):
            return label
    return TYPES[name].__name__ if name in TYPES else None  # OSError for IOError


def class_tree(directory=None):
    """(labels, parents) of the classes in the source under a directory, and of the builtin ones.

    directory: None is the standard library of this Python. Node 0 is object; a label is
    "module.Class" where the class is defined, or the bare name of a builtin. A base without source
    here (written in C, or made by a call) hangs on object. Several bases make a DAG. A file that
    cannot be read or parsed is left out."""
    directory, modules = Path(directory or sysconfig.get_paths()["stdlib"]), {}
    for path in sorted(directory.rglob("*.py")):
        parts = path.relative_to(directory).with_suffix("").parts
        if SKIP.isdisjoint(parts):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # about escapes in strings
                    body = ast.parse(path.read_bytes()).body
            except (OSError, SyntaxError, ValueError, RecursionError):
                continue
            scope = modules[".".join(parts).removesuffix(".__init__")] = {"*": []}
            read(body, parts[:-1], scope)
    bases = {kind.__name__: [b.__name__ for b in kind.__bases__] for kind in TYPES.values()}
    for module, scope in modules.items():
        for name, some in scope.items():
            if isinstance(some, list) and name != "*":
                outer = name.rpartition(".")[0]  # the base of a nested class may be nested, too
                found = [
                    find(modules, module, f"{outer}.{base}".strip("."))
                    or find(modules, module, base)
                    or f"{module}.{base}"
                    for base in some
                ]
                bases[f"{module}.{name}"] = [b for b in found if b != f"{module}.{name}"]
    labels = ["object", *sorted({*bases, *sum(bases.values(), [])} - {"object"})]
    index = {label: i for i, label in enumerate(labels)}
    rest = [sorted({index[base] for base in bases.get(label, ())}) or [0] for label in labels[1:]]
    return labels, [[], *rest]
