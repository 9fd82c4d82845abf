"""What the guidance scale does to the bundled model: adherence against diversity, as a table and a grid of pictures.

python -m tests.benchmarks.guidance      # into docs/sampling.md and docs/images/guidance.png; about 10 minutes
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

import ldm
from ldm.data import captions
from ldm.evaluation import Drawing, Judge, PairScorer, evaluate_pairs
from ldm.evaluation.model import pairs_of
from ldm.evaluation.report import table
from ldm.pipeline import LatentDiffusion
from tests.benchmarks.common import DOCS, machine, write

SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.5)
SEEDS, LIMIT = 1, 40  # pictures a pair, pairs a split
FAST: dict[str, Any] = {"sampler": "auto", "steps": 12}
SHOWN = ("a red apple, noto style", "a cat, twemoji style", "a penguin, fluent flat style", "a rocket, fluent 3D style")


def diversity(model: LatentDiffusion, scorer: PairScorer, scale: float, prompts: list[str]) -> float:
    """Mean cosine distance, over features, between four pictures of one prompt that differ in their seed alone."""
    images = model.sample(prompts, num_images=4, guidance_scale=scale, seed=1000, **FAST).images
    x = F.normalize(scorer.network(images).pooled - scorer.real.features.pooled.mean(0), dim=1).reshape(-1, 4, 1280)
    similarity = x @ x.transpose(1, 2)  # (prompts, 4, 4)
    off = ~torch.eye(4, dtype=torch.bool)
    return float(1.0 - similarity[:, off].mean())


def main() -> None:
    """Score every scale, and draw the same four prompts at each."""
    model = ldm.load("emoji", device="cpu")
    judge = Judge("emoji200")
    prompts = [captions(sample)[0] for sample in pairs_of("emoji200", "train", 16)]
    rows, pictures = [], []
    for scale in SCALES:
        cells: list[str] = []
        for split in ("heldout_pairs", "train"):
            drawing = Drawing(SEEDS, guidance_scale=scale, **FAST)
            scores = evaluate_pairs(model, "emoji200", split, LIMIT, drawing, judge).scores
            cells += [f"{figure.value:.3f}" for figure in scores.figures().values()]
        rows.append([f"{scale:g}", *cells, f"{diversity(model, judge.scorer, scale, prompts):.3f}"])
        sys.stdout.write(f"{rows[-1]}\n")
        sys.stdout.flush()
        pictures.append(model.sample(list(SHOWN), guidance_scale=scale, num_images=2, seed=0, **FAST).grid(columns=8))
    heads = ["s", *(f"{what}, {split}" for split in ("held out", "train") for what in ("R@1", "R@5", "style", "pair"))]
    said = f"{LIMIT} pairs of emoji200 a split, 12 steps of sampler=auto; diversity over 16 of them. {machine()}"
    write("sampling.md", "table", [said, "", table([*heads, "diversity"], rows)])
    sheet = Image.new("RGB", (pictures[0].width, sum(p.height + 4 for p in pictures)), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (0, i * (picture.height + 4)))
    path = Path(DOCS / "images" / "guidance.png")
    path.parent.mkdir(exist_ok=True)
    sheet.save(path)


if __name__ == "__main__":
    main()
