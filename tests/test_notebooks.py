"""Test that the committed notebooks are complete; `.ci/notebooks` executes them."""

import importlib.util
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nothing_is_wrong_with_what_is_committed(path, program):
    assert list(program.complaints(path, nbformat.read(path, as_version=4))) == []


def cell(count, *outputs):
    return nbformat.v4.new_code_cell("pass", execution_count=count, outputs=list(outputs))


OUTPUT = nbformat.v4.new_output
FAULTS = {
    "was not executed": [cell(1), cell(None)],
    "from its first cell to its last": [cell(2), cell(1)],
    "bytes": [cell(1, OUTPUT("stream", name="stdout", text="x" * 1_000_000))],
    "a folder of the machine": [cell(1, OUTPUT("stream", name="stdout", text=str(FOLDER.parent / "file")))],
    "an error": [cell(1, OUTPUT("error", ename="ValueError", evalue="", traceback=[]))],
    "a warning": [cell(1, OUTPUT("stream", name="stderr", text="careful"))],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault, program, tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title"), *FAULTS[fault]])
    nbformat.write(notebook, tmp_path / "faulty.ipynb")
    (complaint,) = program.complaints(tmp_path / "faulty.ipynb", notebook)
    assert fault in complaint
