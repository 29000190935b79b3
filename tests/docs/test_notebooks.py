"""The notebooks run from top to bottom as they are, and what they are kept with is what they show."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("nbclient")

from tests.docs.notebooks import PATHS, code_cells, executed, figures, read, verdicts

FIGURES = {"quickstart": 1, "stability_ratio_curves": 5}
each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def test_all_of_them_are_here() -> None:
    assert {path.stem for path in PATHS} == FIGURES.keys()


@pytest.mark.slow
@each_notebook
def test_notebook_runs_and_what_is_kept_is_what_it_shows(path: Path) -> None:
    """Figures by cell, and printed words up to numbers. Slow: trains a dozen small networks from start to end."""
    fresh = executed(path)  # the notebook's own asserts hold, or this raises
    for kept, now in zip(code_cells(read(path)), code_cells(fresh), strict=True):
        assert figures(kept) == figures(now)
        assert verdicts(kept) == verdicts(now)
    assert sum(map(figures, code_cells(fresh))) == FIGURES[path.stem]


@each_notebook
def test_notebook_is_kept_with_outputs_and_without_noise(path: Path) -> None:
    notebook = read(path)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(map(figures, cells)) == FIGURES[path.stem]
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert not any(cell.metadata for cell in notebook.cells)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert set(notebook.metadata.language_info) == {"name"}
