"""What the style probe hears: real pictures after slight changes, and what an autoencoder leaves of them.

    python -m tests.benchmarks.probe                  # 90 seconds on two cores

The pictures of emoji200 that the probe never learns from are changed, and the probe is asked for their style: the one
of the score, fitted on pictures as they are, and one that is fitted on a changed copy of each beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from io import BytesIO

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import ldm
from ldm.data import STYLES, captions, emoji_dataset, to_tensor
from ldm.data.emoji import splits
from ldm.evaluation.features import image_batches
from ldm.evaluation.model import pairs_of
from ldm.evaluation.pairs import PairScorer, StyleProbe
from ldm.evaluation.report import table
from ldm.randomness import normal
from tests.benchmarks.common import machine, write

Change = Callable[[Tensor], Tensor]  # images in [-1, 1], (n, 3, h, w), to such


def eight_bits(images: Tensor) -> Tensor:
    """As a PNG keeps them."""
    return ((images.clamp(-1.0, 1.0) + 1.0) * 127.5).round() / 127.5 - 1.0


def noisy(levels: float) -> Change:
    """White noise of so many grey levels."""
    return lambda x: eight_bits(x + normal(0, "probe", 0, tuple(x.shape)) * levels / 127.5)


def rescaled(factor: float) -> Change:
    """Made smaller by bicubic interpolation, and as large as it was again."""

    def change(x: Tensor) -> Tensor:
        small = F.interpolate(x, scale_factor=factor, mode="bicubic", antialias=True)
        return eight_bits(F.interpolate(small, x.shape[-2:], mode="bicubic"))

    return change


def blurred(sigma: float) -> Change:
    """Under a Gaussian of so many pixels."""
    line = torch.exp(-(torch.arange(-4.0, 5.0) ** 2) / (2 * sigma**2))
    kernel = (line[:, None] * line / line.sum() ** 2).expand(3, 1, 9, 9)
    return lambda x: eight_bits(F.conv2d(F.pad(x, (4,) * 4, mode="replicate"), kernel, groups=3))


def packed(kind: str, quality: int) -> Change:
    """Through a file that loses something."""

    def one(image: Tensor) -> Tensor:
        file, pixels = BytesIO(), ((image + 1.0) * 127.5).round().to(torch.uint8)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, kind, quality=quality)
        return to_tensor(Image.open(file).convert("RGB"))

    return lambda x: torch.stack([one(image) for image in x])


LEARNT: dict[str, Change] = {  # of these each copy has one, in turn
    "noise of 1 grey level": noisy(1),
    "noise of 4 grey levels": noisy(4),
    "halved and doubled": rescaled(0.5),
    "blurred by 0.7 pixels": blurred(0.7),
    "JPEG 75": packed("JPEG", 75),
}
NEW: dict[str, Change] = {
    "as they are": lambda x: x,
    "noise of half a grey level": noisy(0.5),
    "noise of 2 grey levels": noisy(2),
    "three quarters and back": rescaled(0.75),
    "blurred by 1.2 pixels": blurred(1.2),
    "JPEG 95": packed("JPEG", 95),
    "WebP 80": packed("WEBP", 80),
}


def main(models: list[str]) -> None:
    """Measure with the autoencoders of some models, and write docs/results.md for the bundled one."""
    scorer = PairScorer("emoji200")
    network, real = scorer.network, scorer.real
    label = torch.tensor([STYLES.index(style) for style in real.styles])
    batches = [batch for split in splits()["emoji200"] for batch in image_batches(emoji_dataset("emoji200", split), 64)]
    images, learns = torch.cat([x for _, x in batches]), real.in_probe.nonzero()[:, 0]
    rows = [learns[k :: len(LEARNT)] for k in range(len(LEARNT))]
    copies = [network(change(images[some])).texture for change, some in zip(LEARNT.values(), rows, strict=True)]
    texture = torch.cat([real.features.texture[learns], *copies])
    probes = {
        "the score's": scorer.probe,
        "with copies": StyleProbe(texture, label[torch.cat([learns, *rows])], len(STYLES)),
    }
    asked, style, pairs = images[~real.in_probe], label[~real.in_probe], pairs_of("emoji200", "heldout_pairs")
    styles = torch.tensor([STYLES.index(s.meta["style"]) for s in pairs])
    seen = {title: (change(asked), style) for title, change in (NEW | LEARNT).items()}
    for name in models:
        model = ldm.load(name)
        with torch.no_grad():
            left = [model.autoencoder.decode_raw(model.autoencoder.posterior(x).mean) for x in asked.split(16)]
        seen[f"autoencoder of {name}"] = torch.cat(left), style
        drawn = model.sample([captions(s)[0] for s in pairs], seed=list(range(len(pairs))), steps=10)
        seen[f"held-out pairs as {name} draws them"] = drawn.images, styles
    lines = []
    for title, (pictures, true) in seen.items():
        heard = network(pictures).texture
        lines.append([title, *(said(probe, heard, true) for probe in probes.values())])
    where = (
        f"{machine()}. {len(asked)} real pictures of emoji200 that neither probe learnt from, and one drawn "
        "picture a held-out pair, 10 DDIM steps. Share whose style is heard, and by style: "
        f"{', '.join(STYLES)}."
    )
    content = [where, "", table(["changed how", *probes], lines)]
    sys.stdout.write("\n".join(content) + "\n")
    if models == ["emoji"]:
        write("results.md", "probe", content)


def said(probe: StyleProbe, seen: Tensor, style: Tensor) -> str:
    """How often a probe says the style: of all, and by style."""
    right = (probe(seen) == style).float()
    each = " ".join(f"{right[style == k].mean():.2f}" for k in range(len(STYLES)))
    return f"{right.mean():.3f} ({each})"


if __name__ == "__main__":
    main(sys.argv[1:] or ["emoji"])
