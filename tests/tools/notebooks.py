"""Executes the notebooks from top to bottom, each in a fresh kernel and an empty folder.

    python -m tests.tools.notebooks                         # all of them, and keep what they show
    python -m tests.tools.notebooks notebooks/02_guidance.ipynb

A notebook is kept with what it showed, so that it can be read where nothing runs. Pictures are kept small, and a hash
of the code says of which code the outputs are. tests/test_notebooks.py runs them all and keeps nothing.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS = 300  # at most, a cell


def read(path: Path) -> Any:
    """A notebook."""
    return nbformat.read(path, as_version=4)


def code_hash(notebook: Any) -> str:
    """What the outputs hang on: the sources of the code cells."""
    return hashlib.sha256("\0".join(c.source for c in notebook.cells if c.cell_type == "code").encode()).hexdigest()


def execute(notebook: Any, folder: Path) -> None:
    """Run all cells in a fresh kernel that starts in ``folder`` and imports this tree; outputs go into the notebook.

    Raises:
        CellExecutionError: from the first cell that fails.
    """
    settings = {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder), "TOKENIZERS_PARALLELISM": "false"}
    settings["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm, where no widgets are installed
    settings |= {name: str(folder) for name in ("IPYTHONDIR", "MPLCONFIGDIR", "JUPYTER_RUNTIME_DIR")}
    work = folder / "work"
    work.mkdir()
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(work)}},
        extra_arguments=["--IPKernelApp.log_level=40"],  # its remarks on its own connection
    )
    client.execute(env={**os.environ, **settings})


def tidy(notebook: Any) -> None:
    """Leave out what changes from run to run, and make the pictures small."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "code_hash": code_hash(notebook),
    }
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number:02d}", {}
        for output in cell.get("outputs", []):
            output.get("metadata", {}).clear()
            if "image/png" in output.get("data", {}):
                kind, data = shrunk(base64.b64decode(output.data.pop("image/png")))
                output.data[kind] = base64.b64encode(data).decode()
                output.data.pop("text/plain", None)


def shrunk(png: bytes) -> tuple[str, bytes]:
    """A PNG in 256 colours, which drawings are small in, or else a JPEG: (media type, bytes)."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    palette, jpeg = io.BytesIO(), io.BytesIO()
    image.quantize(256, dither=Image.Dither.NONE).save(palette, "PNG", optimize=True)
    image.save(jpeg, "JPEG", quality=82, optimize=True)
    drawing = len(palette.getvalue()) < 1.2 * len(jpeg.getvalue())
    return ("image/png", palette.getvalue()) if drawing else ("image/jpeg", jpeg.getvalue())


def main(paths: list[Path]) -> None:
    """Execute notebooks in place."""
    for path in paths:
        notebook = read(path)
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, Path(folder))
        tidy(notebook)
        nbformat.validate(notebook)
        nbformat.write(notebook, path)
        sys.stdout.write(f"{path.name}: {path.stat().st_size / 1000:.0f} kB\n")


if __name__ == "__main__":
    main([Path(path) for path in sys.argv[1:]] or NOTEBOOKS)
