"""The three ways to a size that is not the model's, side by side.

python -m tests.benchmarks.resize        writes docs/images/resize.png; about a minute
"""

from __future__ import annotations

from PIL import Image

import ldm
from ldm.request import RESIZE
from tests.benchmarks.common import DOCS

PROMPTS = (
    "a red apple, noto style",
    "a cat, twemoji style",
    "a penguin, fluent flat style",
    "a rocket, fluent 3D style",
)
SIZES = (96, 128, 192)


def main() -> None:
    """Rows: the ways; columns: four prompts at each size."""
    model = ldm.load("emoji", device="cpu")
    rows = []
    for way in RESIZE:
        parts = [model.sample(list(PROMPTS), height=s, width=s, resize=way).grid(columns=4) for s in SIZES]
        row = Image.new("RGB", (sum(part.width + 16 for part in parts), max(SIZES)), "white")
        left = 0
        for part in parts:
            row.paste(part, (left, 0))
            left += part.width + 16
        rows.append(row)
    sheet = Image.new("RGB", (rows[0].width, len(rows) * (max(SIZES) + 12)), "white")
    for i, row in enumerate(rows):
        sheet.paste(row, (0, i * (max(SIZES) + 12)))
    (DOCS / "images").mkdir(exist_ok=True)
    sheet.save(DOCS / "images" / "resize.png")


if __name__ == "__main__":
    main()
