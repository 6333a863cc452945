"""Executes the notebooks beside this file, each in a kernel of its own.

    python notebooks/execute.py                execute all and write their outputs
    python notebooks/execute.py PATH...        only these
    python notebooks/execute.py --check        what CI does: look at the committed outputs, then execute with small
                                               settings (HARDKV_NOTEBOOK_QUICK=1) and write nothing

Needs the extra `notebooks`: pip install -e '.[notebooks]'.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).resolve().parent
MOST_BYTES = 1_000_000
MOST_SECONDS = 240  # of a cell, on a busy machine; a whole notebook should take two minutes at most on an idle one


def complaints(path: Path, notebook: Any) -> Iterator[str]:
    """What is wrong with a committed notebook."""
    if path.stat().st_size >= MOST_BYTES:
        yield f"has {path.stat().st_size:,} bytes; {MOST_BYTES:,} are allowed: draw less, or with a lower dpi"
    text = path.read_text(encoding="utf-8")
    folders = [folder for folder in (HERE.parent, Path.home()) if folder != Path(folder.anchor)]
    if any(f"{folder}{os.sep}" in text for folder in folders):
        yield "names a folder of the machine it was executed on"
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        yield "was not executed from its first cell to its last"
    outputs = [output for cell in cells for output in cell.outputs]
    if any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs):
        yield "shows an error or a warning"


def execute(path: Path, notebook: Any) -> float:
    """Execute a notebook in place, as if it was opened in its folder; the seconds it took."""
    start = time.perf_counter()
    client = NotebookClient(
        notebook,
        timeout=MOST_SECONDS,
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all")
    parser.add_argument("--check", action="store_true", help="write nothing, use small settings")
    args = parser.parse_args()
    # no bars, nor what tqdm says of kernels without ipywidgets
    os.environ |= {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}
    if args.check:
        os.environ["HARDKV_NOTEBOOK_QUICK"] = "1"
    failed = False
    for path in args.notebooks or sorted(HERE.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        found = list(complaints(path, notebook)) if args.check else []
        try:
            seconds = execute(path, notebook)
        except CellExecutionError as error:
            print(f"{path.name}: {error}", file=sys.stderr)
            failed = True
            continue
        if not args.check:
            nbformat.write(notebook, path)
            found = list(complaints(path, notebook))
        print(f"{path.name}: {seconds:.0f} s, {path.stat().st_size / 1000:,.0f} kB")
        for complaint in found:
            print(f"{path.name} {complaint}", file=sys.stderr)
        failed |= bool(found)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
