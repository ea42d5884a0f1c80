"""make fork STAGE=03 TO=../mine: one stage as the start of a project of its own.

Copies the folder, common/, the requirements, pyproject.toml, LICENSE and, where it is there, the
newest tokenizer, into a directory that is new or empty.
"""

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = (
    "requirements.txt requirements-dev.txt requirements-data.txt requirements-weights.txt "
    "requirements-bench.txt "
    "pyproject.toml LICENSE .gitignore"
)


def fork(stage, to):
    """Returns the new folder of the stage; raises ValueError where there is no such stage, or where
    `to` is not empty."""
    folders = [p for p in ROOT.glob("[0-9][0-9]_*") if stage and p.name.startswith(stage)]
    if len(folders) != 1:
        names = " ".join(sorted(p.name for p in ROOT.glob("[0-9][0-9]_*")))
        raise ValueError(f"STAGE={stage} is none of {names}: give one of these numbers")
    if not str(to):
        raise ValueError("TO= is missing: give a new directory")
    to = Path(to)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"TO={to} is there and not empty: give a new directory")
    skip = shutil.ignore_patterns(
        "__pycache__", "results.jsonl", ".*_cache", "node_modules", "exercises.py", "walkthrough.*"
    )
    for folder in (folders[0], ROOT / "common"):
        shutil.copytree(folder, to / folder.name, ignore=skip)
    for name in FILES.split():
        shutil.copy(ROOT / name, to)
    tokenizer = ROOT / "out" / "01_tokenizer" / "latest"
    if (tokenizer / "tokenizer.json").exists():
        target = to / "out" / "01_tokenizer" / tokenizer.resolve().name
        target.mkdir(parents=True)
        for path in tokenizer.glob("tokenizer*.json"):
            shutil.copy(path, target)
        (target.parent / "latest").symlink_to(target.name)
    return to / folders[0].name


if __name__ == "__main__":
    try:
        stage, to = (sys.argv[1:] + ["", ""])[:2]
        folder = fork(stage, to)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"cd {folder.parent}; python {folder.name}/run.py --help; python -m pytest {folder.name}")
