"""Puts a finished ablation into the docs: its table between the page's markers, its pictures into docs/images.

    ldm ablate ablation=recipes seeds=2 limit=40 steps=10 output=RUN && python -m tests.tools.ablation_pages recipes RUN
    ldm ablate ablation=beta output=RUN && python -m tests.tools.ablation_pages beta RUN
    ldm ablate ablation=openmoji output=RUN && python -m tests.tools.ablation_pages openmoji RUN
    ldm ablate ablation=prediction seeds=2 output=RUN && python -m tests.tools.ablation_pages prediction RUN

Likewise ``caption_dropout`` and ``min_snr``.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import ldm
from ldm.data import FixedSet, emoji_dataset, to_tensor
from ldm.evaluation.figures import Figure
from tests.benchmarks.common import DOCS, machine, write
from tests.tools.gallery import Sheet

COLUMNS = {
    "recipes": ("denoising MSE", "KID-EffNet"),
    "beta": ("PSNR, mode (dB)", "PSNR, sample (dB)", "SSIM", "KL a unit (nats)", "active units", "rKID-EffNet"),
}
DIFFERENCES = {"recipes": ("denoising MSE", "KID-EffNet"), "beta": ()}
DRAWN = ("red apple", "fox", "penguin", "pizza", "sunflower", "sailboat", "cat", "umbrella")


def figure(found: dict[str, Any] | None, verdict: bool = False) -> str:
    """A figure of ``result.json``, with its interval and, of a difference, what it resolves."""
    if found is None:
        return ""
    one = Figure(**found)
    return f"{one}, {one.verdict.split(' at ')[0]}" if verdict else f"{one}"


def table(name: str, cells: list[dict[str, Any]]) -> list[str]:
    """A row a cell: its figures, and their differences to the first cell."""
    shown = COLUMNS.get(name, ("denoising MSE", "KID-EffNet") if name != "openmoji" else ("denoising MSE",))
    less, first = DIFFERENCES.get(name, ("denoising MSE",)), cells[0]["cell"]
    head = ["cell", *shown, *(f"{what} less that of {first}" for what in less)]
    rows = [
        [
            f"`{each['cell']}`" if each["settings"] else "base",
            *(figure(each["figures"].get(what)) for what in shown),
            *(figure(each.get("less the first", {}).get(what), verdict=True) for what in less),
        ]
        for each in cells
    ]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def openmoji(run: Path, cells: list[dict[str, Any]]) -> None:
    """Eight things as the data have them, as the bundled model draws them, and as each cell's first seed does."""
    prompts = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}, openmoji style" for name in DRAWN]
    own: dict[str, torch.Tensor] = {}
    for split in ("train", "heldout_pairs"):
        data = emoji_dataset("openmoji", split)
        images = FixedSet(data, 128, 128)
        numbers = {data[i].meta["concept"]: i for i in range(len(data))}
        own |= {name: images[numbers[name]]["image"] for name in DRAWN if name in numbers}
    real = torch.stack([own[name] for name in DRAWN])
    sheet = Sheet()
    sheet.add("OpenMoji's own", real)
    sheet.add("before", ldm.load("emoji").sample(prompts, seed=0, steps=30).images)
    for each, folder in zip(cells, folders(run, cells), strict=True):
        rank = " ".join(s.removeprefix("lora.") for s in each["settings"] if "lora" in s) or "all weights"
        sheet.add(rank, ldm.load(folder).sample(prompts, seed=0, steps=30).images)
    sheet.write(DOCS / "images" / "openmoji.jpg")


def folders(run: Path, cells: list[dict[str, Any]]) -> list[Path]:
    """The training of each cell's first seed: folders end on a hash of the cell's name."""
    marks = [hashlib.sha256(" ".join(each["settings"]).encode()).hexdigest()[:6] for each in cells]
    return [next((run / "runs").glob(f"*-{mark}")) / f"seed-{cells[0]['seeds'][0]}" for mark in marks]


def main(name: str, run: str) -> None:
    """Write the table, and for ``beta`` and ``openmoji`` the pictures."""
    result = json.loads((Path(run) / "result.json").read_text())
    cells: list[dict[str, Any]] = result["cells"]
    page = "training.md" if name in ("recipes", "beta", "openmoji") else "ablations.md"
    here = re.sub(r"\d+ threads", "1 thread a training", machine())
    where = f"{here}; seeds {cells[0]['seeds']}."
    write(page, name, [where, "", *table(name, cells)])
    if name == "beta":
        sheet = Sheet()
        for each, folder in zip(cells, folders(Path(run), cells), strict=True):
            files = sorted((folder / "pictures").glob("*.png"))
            for which, some in (("mode", files[:8]), ("sample", files[8:])):
                images = [to_tensor(Image.open(path).convert("RGB")) for path in some]
                sheet.add(f"{each['cell']}, {which}", torch.stack(images))
        sheet.write(DOCS / "images" / "beta.jpg")
    if name == "openmoji":
        openmoji(Path(run), cells)


if __name__ == "__main__":
    main(*sys.argv[1:])
