"""The notebooks run from top to bottom, say nothing on stderr, write nowhere else, and show what their code gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools.notebooks import NOTEBOOKS, ROOT, code_hash, execute, read

LARGEST = 400_000  # bytes; a forge shows no larger ones


def tree() -> dict[str, int]:
    """When each file of the repository was last written, caches left out."""
    left_out = {".git", ".venv", "__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis"}
    files = (path for path in ROOT.rglob("*") if path.is_file() and not left_out & set(path.parts))
    return {str(path): path.stat().st_mtime_ns for path in files}


def said_on_stderr(notebook: object) -> str:
    """What the cells wrote there."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]  # type: ignore[attr-defined]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stderr")


def test_the_notebooks_are_there() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]


# The last two train: more than half of the time of all.
TRAINING = ("05", "06")
MARKED = [
    pytest.param(path, marks=[pytest.mark.slow] * path.name.startswith(TRAINING), id=path.stem) for path in NOTEBOOKS
]


@pytest.mark.parametrize("path", MARKED)
def test_a_notebook_runs_clean_and_writes_nowhere_else(path: Path, tmp_path: Path) -> None:
    notebook, before = read(path), tree()
    execute(notebook, tmp_path)
    assert said_on_stderr(notebook) == ""
    assert tree() == before
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_small_with_the_outputs_of_its_code(path: Path) -> None:
    notebook = read(path)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert path.stat().st_size < LARGEST
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any("image/" in kind for cell in cells for output in cell.outputs for kind in output.get("data", {}))
    assert said_on_stderr(notebook) == ""
    assert notebook.metadata["code_hash"] == code_hash(notebook), f"run: python -m tests.tools.notebooks {path}"


def test_a_changed_cell_would_be_seen() -> None:
    notebook = read(NOTEBOOKS[0])
    before = code_hash(notebook)
    next(cell for cell in notebook.cells if cell.cell_type == "code").source += "\n"
    assert code_hash(notebook) != before
