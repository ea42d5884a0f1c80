"""make readme: write the results tables of the READMEs from results.jsonl.

A table stands between <!-- results --> and <!-- /results -->: in a stage's README a row for each
recorded run, in the main README one row a stage, the last recorded run of each.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARKS = re.compile(r"(<!-- results -->\n).*?(<!-- /results -->)", re.S)
# Not a column: what is the same in all rows, or too long for one.
HIDDEN = {"command", "machine", "commit"}
SHARED = {"minutes", "peak_gib"}  # what most stages record


def results(folder):
    path = folder / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def cell(value):
    return (
        f"{value:,.4g}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )


def table(rows):
    """A Markdown table with a column for each key that is in any row."""
    keys = list(dict.fromkeys(key for row in rows for key in row if key not in HIDDEN))
    if not rows:
        return "No recorded run yet: `--record` adds one.\n"
    lines = ["| " + " | ".join(keys) + " | command, commit, machine |"]
    lines.append("|" + " --- |" * (len(keys) + 1))
    for row in rows:
        how = f"`{row.get('command', '')}`, {row.get('commit', '')}, {row.get('machine', '')}"
        lines.append("| " + " | ".join(cell(row.get(key, "")) for key in keys) + f" | {how} |")
    return "\n".join(lines) + "\n"


def rendered(path):
    """The README's text with its table as results.jsonl gives it."""
    if path.parent == ROOT:  # stages have little in common, and a column for each is too many
        rows = []
        for folder in sorted(ROOT.glob("[0-9][0-9]_*")):
            if last := results(folder)[-1:]:
                own = {k: v for k, v in last[0].items() if k not in HIDDEN | SHARED}
                said = ", ".join(f"{key} {cell(value)}" for key, value in own.items())
                row = {"stage": folder.name, "reached": said}
                rows.append(row | {k: v for k, v in last[0].items() if k in HIDDEN | SHARED})
    else:
        rows = results(path.parent)
    return MARKS.sub(lambda match: match[1] + table(rows) + match[2], path.read_text())


def readmes():
    return [ROOT / "README.md", *sorted(ROOT.glob("[0-9][0-9]_*/README.md"))]


if __name__ == "__main__":
    for readme in readmes():
        if (text := rendered(readme)) != readme.read_text():
            readme.write_text(text)
            print(f"wrote {readme.relative_to(ROOT)}")
