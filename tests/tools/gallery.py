"""The gallery of the README and the model card: what the bundled model draws, beside what it was shown.

python -m tests.tools.gallery          # docs/images/gallery.jpg; 10 minutes on two cores
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import ldm
from ldm.data import STYLES, captions, emoji_dataset
from ldm.data.emoji import splits
from ldm.evaluation.features import EfficientNetLite0, image_batches
from ldm.evaluation.pairs import hash_order
from ldm.pipeline import LatentDiffusion

OUT = Path(__file__).resolve().parents[2] / "docs" / "images"
LABEL = 16
THINGS = ("red apple", "sunflower", "penguin", "pizza", "sailboat", "rocket", "crown", "mushroom")


class Sheet:
    """Rows of pictures under a line each."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, Tensor]] = []

    def add(self, label: str, images: Tensor) -> None:
        """Pictures in [-1, 1], (n, 3, h, w)."""
        self.rows.append((label, images.clamp(-1.0, 1.0)))

    def write(self, path: Path) -> None:
        """As a JPEG: a palette would draw steps into what is smooth."""
        heights = [LABEL + images.shape[2] for _, images in self.rows]
        width = max(len(images) * images.shape[3] for _, images in self.rows)
        sheet = Image.new("RGB", (width, sum(heights)), "white")
        draw, top = ImageDraw.Draw(sheet), 0
        for (label, images), height in zip(self.rows, heights, strict=True):
            fonts = [ImageFont.load_default(size) for size in (12, 11, 10, 9, 8, 7)]
            font = next((font for font in fonts if draw.textlength(label, font) < width - 8), fonts[-1])
            draw.text((4, top + 1), label, fill="black", font=font)
            pixels = ((images + 1.0) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
            for i, picture in enumerate(pixels):
                sheet.paste(Image.fromarray(picture), (i * picture.shape[1], top + LABEL))
            top += height
        sheet.save(path, quality=88, subsampling=0)


def main() -> None:
    """Draw it."""
    model, network = ldm.load("emoji"), EfficientNetLite0()
    train = emoji_dataset("emoji", "train")
    seen = [(images, network(images).pooled) for _, images in image_batches([train[i] for i in range(len(train))], 64)]
    known, features = torch.cat([images for images, _ in seen]), torch.cat([pooled for _, pooled in seen])
    centre = features.mean(0)

    def nearest(images: Tensor) -> Tensor:
        """The training image that is nearest by features, of each picture."""
        own = torch.nn.functional.normalize(network(images).pooled - centre, dim=1)
        return known[(own @ torch.nn.functional.normalize(features - centre, dim=1).T).argmax(1)]

    sheet = Sheet()
    for style in STYLES:
        sheet.add(f"{', '.join(THINGS)}: {style} style", draw(model, [f"a {thing}, {style} style" for thing in THINGS]))
    for split, said in (("heldout_pairs", "pairs never seen"), ("heldout_concepts", "things never seen")):
        name = "emoji200" if split == "heldout_pairs" else "emoji"
        keys, data = hash_order(splits()[name][split])[:8], emoji_dataset(name, split)
        number = {key: i for i, key in enumerate(data.keys)}
        samples = [data[number[key]] for key in keys]
        images = draw(model, [captions(sample)[0] for sample in samples])
        sheet.add(f"{said}: {'; '.join(captions(sample)[0] for sample in samples)}", images)
        sheet.add("the nearest picture of the training set", nearest(images))
    for scale in (1.0, 2.0, 4.0, 8.0):
        prompts = [f"a {thing}, noto style" for thing in THINGS]
        sheet.add(f"guidance {scale:g}, noto style", draw(model, prompts, scale))
    negative = ["yellow"] * len(THINGS)
    out = model.sample([f"a {thing}, noto style" for thing in THINGS], negative, seed=0, guidance_scale=4.0)
    sheet.add('guidance 4, negative prompt "yellow"', out.images)
    start, end = (torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    angles = torch.linspace(0.0, torch.pi / 2, 8)
    between = torch.cat([angle.cos() * start + angle.sin() * end for angle in angles])
    out = model.sample(["a rocket, fluent 3D style"] * 8, latents=between)
    sheet.add("from one noise to another: a rocket, fluent 3D style", out.images)
    large = model.sample([f"a {thing}, twemoji style" for thing in THINGS[:5]], seed=0, height=192, width=192)
    sheet.add("192 x 192 pixels, twemoji style", large.images)
    sheet.write(OUT / "gallery.jpg")


def draw(model: LatentDiffusion, prompts: Sequence[str], guidance_scale: float | None = None) -> Tensor:
    """Pictures of seed 0 and on."""
    return model.sample(list(prompts), seed=0, guidance_scale=guidance_scale).images


if __name__ == "__main__":
    main()
