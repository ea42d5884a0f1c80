"""The rule of copies: a class or function with its parent's name is its parent's, to the letter.

A stage's module docstring says what it copies and changes:

    Parent: 04_modern/modern.py; 05_scaling/scaling.py (Muon, TokenLoader)
    New: Router, Experts
    Changed: Block, TransformerLM -> MoETransformerLM

Where a parent names some of its classes in brackets, only those are taken from it. `make copies`
runs this file: it carries each definition down the line to its copies. `make diff-04` shows a stage
beside its first parent.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def stages(root=ROOT):
    """The implementation files of the numbered folders: those whose docstring has a Parent line."""
    files = sorted(root.glob("[0-9][0-9]_*/*.py"))
    return [path for path in files if field(path, "Parent")]


def field(path, name):
    """The text behind `Parent:`, `New:` or `Changed:` in a module docstring, over several lines."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    match = re.search(rf"^{name}: (.+(?:\n[ \t]+.+)*)", text, re.M)
    return " ".join(match[1].split()) if match else ""


def parents(path, root=ROOT):
    """[(file, names or None), ...]; a parent whose folder is not there (a fork) is left out."""
    found = []
    for part in field(path, "Parent").split(";"):
        match = re.match(r"\s*(\d\d_\w+/\w+\.py)(?:\s*\((.+)\))?", part)
        if match and (root / match[1]).exists():
            names = re.findall(r"\w+", match[2]) if match[2] else None
            found.append((root / match[1], names))
    return found


def definitions(path):
    """{name: (first line, last line, text)} of the classes and functions at the top of a file."""
    source = path.read_text()
    lines, result = source.splitlines(keepends=True), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
            result[node.name] = (first, node.end_lineno, "".join(lines[first : node.end_lineno]))
    return result


def shared(path, root=ROOT):
    """How many definitions a file has in common with its first parent, changed or not."""
    first = parents(path, root)[:1]
    return len(definitions(path).keys() & definitions(first[0][0]).keys()) if first else 0


def drifted(path, root=ROOT):
    """[(name, the parent's file)] of copies that are not their parent's any more."""
    changed = set(re.findall(r"\w+", field(path, "Changed")))
    own, wrong = definitions(path), []
    for parent, names in parents(path, root):
        for name, (_, _, text) in definitions(parent).items():
            copied = name in own and name not in changed and (names is None or name in names)
            if copied and own[name][2] != text:
                wrong.append((name, parent))
    return wrong


def misstated(path, root=ROOT):
    """Names under New or Changed that are not there, or not what the docstring says."""
    own = set(definitions(path))
    inherited = {name for parent, _ in parents(path, root) for name in definitions(parent)}
    new = set(re.findall(r"\w+", field(path, "New"))) & (own | inherited)
    wrong = [f"{name} is under New but has a parent" for name in sorted(new & inherited & own)]
    for name in re.findall(r"\w+", field(path, "Changed")):
        if name not in own | inherited:
            wrong.append(f"{name} is under Changed but nowhere defined")
    return wrong


def carry(root=ROOT):
    """Replace each drifted copy by its parent's text, parents first; returns what was replaced."""
    done = []
    for path in stages(root):
        for name, parent in drifted(path, root):
            first, last, _ = definitions(path)[name]
            lines = path.read_text().splitlines(keepends=True)
            lines[first:last] = [definitions(parent)[name][2]]
            path.write_text("".join(lines))
            done.append(f"{name}: {parent.relative_to(root)} -> {path.relative_to(root)}")
    return done


def main():
    if sys.argv[1:2] == ["diff"]:
        # First the file that has most of its parent in it: the diff of another says little.
        for path in sorted(stages(), key=lambda path: -shared(path)):
            if path.parent.name.startswith(sys.argv[2] + "_") and parents(path):
                sys.stdout.flush()
                return subprocess.run(["diff", "-u", parents(path)[0][0], path]).returncode > 1
        print(f"error: no stage {sys.argv[2]} with a parent here", file=sys.stderr)
        return 2
    print("\n".join(carry()) or "every copy is its parent's")
    return 0


if __name__ == "__main__":
    sys.exit(main())
