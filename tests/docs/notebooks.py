"""Notebooks, run from top to bottom. As a command: run them all and save them with their outputs.

python -m tests.docs.notebooks
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbclient
import nbformat

FOLDER = Path(__file__).parents[2] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
NUMBER = re.compile(r"[-+]?\d+(\.\d+)?([eE][-+]?\d+)?%?")


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def executed(path: Path) -> Any:
    """The notebook with fresh outputs. Raises what a cell raises."""
    notebook = read(path)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", record_timing=False).execute(cwd=str(FOLDER))
    notebook.metadata = read(path).metadata  # without the versions of this machine
    return notebook


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def figures(cell: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def verdicts(cell: Any) -> set[str]:
    """What a cell printed, line by line, with every number replaced by #."""
    text = "".join(output.get("text", "") for output in cell.outputs)
    return {" ".join(NUMBER.sub("#", line).split()) for line in text.splitlines()}


if __name__ == "__main__":
    for notebook_path in PATHS:
        nbformat.write(executed(notebook_path), notebook_path)
        print(f"wrote {notebook_path}")
