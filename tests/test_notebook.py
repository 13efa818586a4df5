"""The notebook of the documentation runs as it is."""

import json
import pathlib

import pytest

NOTEBOOK = pathlib.Path(__file__).parents[1] / "docs" / "tour.ipynb"


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_was_run_whole():
    cells = code_cells(json.loads(NOTEBOOK.read_text()))
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    assert sum("image/png" in str(cell["outputs"]) for cell in cells) == 4
    assert not any(out["output_type"] == "error" for cell in cells for out in cell["outputs"])


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    """In an empty folder: it trains the small model first. Needs the extra [notebook]."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, 4)
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=900, resources=where).execute()  # raises on an error
    assert (tmp_path / "runs/demo-quick/static_tokens/grid.json").exists()
    written = json.dumps(code_cells(notebook))
    assert written.count("image/png") == 4 and "R@1" in written
