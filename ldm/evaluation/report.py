"""Results as a table for people and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.data.shards import write_atomically

_COLUMNS = {"concept_r1": "concept R@1", "concept_r5": "R@5", "style": "style", "pair": "pair accuracy"}


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table as Markdown, its columns aligned; ends with a newline.

    Args:
        columns: their heads.
        rows: of as many cells; floats are written with three decimals.

    Raises:
        ValueError: a row with another number of cells.
    """
    cells = [list(columns), *([f"{c:.3f}" if isinstance(c, float) else str(c) for c in row] for row in rows)]
    if odd := [row for row in cells if len(row) != len(columns)]:
        raise ValueError(f"row {odd[0]} has {len(odd[0])} cells, the table {len(columns)} columns; give one a column")
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]) + "\n"


def pairs_table(result: Mapping[str, Any]) -> str:
    """What ldm.evaluation.evaluate_pairs returned, as Markdown: the model, its styles, and what to hold it against."""
    generated = result["generated"]
    rows = [[f"model, {result['seeds']} a pair", *_cells(generated)]]
    rows += [[f"– asked for {style}", *_cells(part)] for style, part in generated["by_style"].items()]
    rows.append(["real images of these pairs", *_cells(result["reference"])])
    rows.append(["model, its style words dealt out at random", *_cells(generated["ignores_style"])])
    rows.append(["chance", *_cells(generated["chance"])])
    head = f"{result['dataset']}, {result['split']}: {result['num_pairs']} pairs (95 % intervals over concepts)"
    left_out = result["num_left_out"]
    note = f"\n{left_out} more were left out: no other hand drew their concept.\n" if left_out else ""
    return f"{head}\n\n{table(['', *_COLUMNS.values()], rows)}{note}"


def autoencoder_table(result: Mapping[str, Mapping[str, Any]]) -> str:
    """What ldm.evaluation.evaluate_autoencoder returned, as Markdown, a row a split."""
    columns = ["split", "images", "PSNR, mode (dB)", "PSNR, sample", "SSIM", "KL a unit", "active units", "std of z"]
    rows = [
        [
            split,
            r["num_images"],
            f"{r['psnr']:.2f}",
            f"{r['psnr_sample']:.2f}",
            r["ssim"],
            r["kl_per_unit"],
            r["active_units"],
            ", ".join(f"{std:.2f}" for std in r["latent_std"]),
        ]
        for split, r in result.items()
    ]
    return table(columns, rows)


def write_json(path: str | Path, value: object) -> None:
    """Write JSON, whole or not at all; folders are made.

    Raises:
        ValueError: NaN or infinity in it, which JSON does not have.
    """
    path = Path(path)
    try:
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path.name}: a result is NaN or infinite; look at what was measured") from error
    write_text(path, text + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a text as UTF-8, whole or not at all; folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())


def _cells(summary: Mapping[str, Any]) -> list[str]:
    cells = []
    for name in _COLUMNS:
        part = summary[name]
        if isinstance(part, Mapping):
            cells.append(f"{part['value']:.3f} ({part['low']:.3f} to {part['high']:.3f})")
        else:
            cells.append(f"{part:.3f}" if part >= 0.01 else f"{part:.4f}")
    return cells
