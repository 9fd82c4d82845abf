"""What sampling returns: pictures, and all that made them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm import provenance


def sheet(images: Sequence[Image.Image], columns: int | None = None, gap: int = 4) -> Image.Image:
    """Pictures of one size in one, row by row, on white; ``columns`` None makes it about square."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    rows = math.ceil(len(images) / columns)
    whole = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        whole.paste(image, (i % columns * (width + gap), i // columns * (height + gap)))
    return whole


@dataclass(frozen=True)
class Samples:
    """Pictures, prompt-major: image i has the i-th seed."""

    images: Tensor  # float32 (n, 3, h, w) in [-1, 1]
    latents: Tensor  # what they were decoded from, scaled to unit variance, float32 (n, 4, h/8, w/8)
    seeds: list[int]  # one an image
    prompts: list[str]  # one an image
    truncated: Tensor  # whether an image's prompt was cut to 77 tokens, bool (n,)
    flagged: Tensor  # whether a safety checker flagged and blurred it, bool (n,); all false where none was asked for
    settings: dict[str, Any] = field(default_factory=dict)  # everything else that made them

    def pil(self) -> list[Image.Image]:
        """The pictures as PIL images, 8 bits."""
        pixels = ((self.images + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in pixels]

    def grid(self, columns: int | None = None, gap: int = 4) -> Image.Image:
        """All pictures in one, row by row, on white."""
        return sheet(self.pil(), columns, gap)

    def capsule(self, i: int) -> dict[str, Any]:
        """What made image i: its prompt, seed and settings, and its place in a batch of a size, which sets rounding."""
        first = i - i % self.settings["batch_size"]
        batch = [i - first, min(self.settings["batch_size"], len(self.images) - first)]
        own = {"negative_prompt": self.settings["negative_prompts"][i], "batch": batch}
        rest = {name: value for name, value in self.settings.items() if name not in ("negative_prompts", "batch_size")}
        return {"prompt": self.prompts[i], **own, "seed": self.seeds[i], **rest}

    def save(self, folder: str | Path) -> list[Path]:
        """Write 00000.png, … and grid.png (of several), each whole or not at all, with its capsule; their paths."""
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        paths = [root / f"{i:05d}.png" for i in range(len(self.images))]
        for i, (path, image) in enumerate(zip(paths, self.pil(), strict=True)):
            provenance.write_png(path, image, self.capsule(i))
        if len(paths) > 1:
            paths.append(root / "grid.png")
            provenance.write_png(paths[-1], self.grid(), {"images": [self.capsule(i) for i in range(len(self.images))]})
        return paths
