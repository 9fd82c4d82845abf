"""Pair scores of pictures: their means with intervals, and what to hold them against. No image comes here."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.data import STYLES
from ldm.evaluation.figures import Figure, mean

METRICS = ("concept R@1", "concept R@5", "style accuracy", "pair accuracy")


@dataclass(frozen=True)
class PairScores:
    """What the scorer said of n pictures."""

    concepts: list[str]  # asked for
    styles: list[str]  # asked for
    nearest: list[str]  # concept of the nearest real image by another hand
    predicted_styles: list[str]  # by the probe
    # Of the concept among its candidates, had the picture been asked for in each style (whose hand the gallery then
    # leaves out); 1 is first, int64 (n, 4) in the order of ldm.data.STYLES.
    ranks: Tensor
    num_candidates: Tensor  # int64 (n,)

    def rank(self) -> Tensor:
        """Of the concept asked for in the style asked for, (n,)."""
        return self.ranks.gather(1, torch.tensor([[STYLES.index(style)] for style in self.styles]))[:, 0]

    def columns(self) -> Tensor:
        """0 or 1 a picture for each of METRICS, float64 (n, 4)."""
        rank = self.rank()
        style = torch.tensor([a == b for a, b in zip(self.styles, self.predicted_styles, strict=True)])
        return torch.stack([rank <= 1, rank <= 5, style, (rank <= 1) & style], 1).double()

    def figures(self, style: str | None = None) -> dict[str, Figure]:
        """METRICS, of all or of what was asked for in a style; concepts resampled: pictures of one hang together."""
        rows = [i for i, asked in enumerate(self.styles) if style in (None, asked)]
        columns, concepts = self.columns()[rows].numpy().T, [self.concepts[i] for i in rows]
        return {name: mean(name, values, concepts) for name, values in zip(METRICS, columns, strict=True)}

    def ignoring_style(self) -> list[float]:
        """METRICS had the style words been dealt out among the pictures at random: expectations, not a draw.

        With π(s) the share of style s among what was asked for, picture i, whose style the probe calls p_i, gets
        Σ_s π(s)·[rank_i(s) = 1] for its concept, π(p_i) for its style and π(p_i)·[rank_i(p_i) = 1] for both. A model
        that draws the concept and ignores the word cannot do better; one that listens does.
        """
        share = torch.tensor([self.styles.count(style) / len(self.styles) for style in STYLES], dtype=torch.float64)
        said = torch.tensor([STYLES.index(style) for style in self.predicted_styles])
        first = (self.ranks <= 1).double()
        pair = share[said] * first.gather(1, said[:, None])[:, 0]
        columns = (first @ share, (self.ranks <= 5).double() @ share, share[said], pair)
        return [column.mean().item() for column in columns]

    def chance(self) -> list[float]:
        """METRICS of guessing concept and style at random."""
        k = self.num_candidates.double()
        r1, r5, style = (1 / k).mean().item(), (5 / k).clamp(max=1).mean().item(), 1 / len(STYLES)
        return [r1, r5, style, r1 * style]

    def table(self) -> list[dict[str, Any]]:
        """One row a picture."""
        names = ("concept", "style", "nearest", "predicted_style", "rank")
        columns = (self.concepts, self.styles, self.nearest, self.predicted_styles, self.rank().tolist())
        rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
        scored = self.columns().tolist()
        return [row | dict(zip(METRICS, values, strict=True)) for row, values in zip(rows, scored, strict=True)]
