"""make notebooks: each NN_name/walkthrough.py as a notebook beside it, run, with its outputs.

The .py file, in percent format, is what is edited; the notebook is made from it by jupytext and run
by nbclient, so that it can be read without running anything. Numbers given make only those.
"""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def sources():
    return sorted(ROOT.glob("[0-9][0-9]_*/walkthrough.py"))


def notebook(path):
    """The notebook of a percent file, not run: the same file gives the same notebook."""
    import jupytext

    made = jupytext.read(path, fmt="py:percent")
    made.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for number, cell in enumerate(made.cells):
        cell.id, cell.metadata = f"cell-{number:02d}", {}
    return made


def run(made, folder, timeout=300):
    """Run all cells in `folder`; their outputs are in the notebook then. Raises on an error."""
    from nbclient import NotebookClient

    place = {"metadata": {"path": str(folder)}}
    NotebookClient(made, timeout=timeout, resources=place, record_timing=False).execute()
    made.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    return made


if __name__ == "__main__":
    import nbformat

    found = {path.parent.name[:2]: path for path in sources()}
    if unknown := set(sys.argv[1:]) - found.keys():
        sys.exit(f"error: there is no notebook {min(unknown)}: give some of {' '.join(found)}")
    for path in [found[number] for number in sys.argv[1:] or found]:
        began = time.perf_counter()
        made = run(notebook(path), path.parent)
        nbformat.write(made, path.with_suffix(".ipynb"))
        size = path.with_suffix(".ipynb").stat().st_size
        seconds = time.perf_counter() - began
        print(f"{path.parent.name}/walkthrough.ipynb: {seconds:.0f} s, {size / 1024:,.0f} KiB")
