"""Pair scores of pictures: a table, its means with intervals, and what to hold them against. No image comes here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm import randomness
from ldm.data import STYLES

METRICS = ("concept_r1", "concept_r5", "style", "pair")


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

    def metrics(self) -> dict[str, np.ndarray]:
        """0 or 1 a picture for each of METRICS, float64 (n,)."""
        asked = torch.tensor([STYLES.index(style) for style in self.styles])
        rank = self.ranks.gather(1, asked[:, None])[:, 0]
        style = torch.tensor([a == b for a, b in zip(self.styles, self.predicted_styles, strict=True)])
        return _as_numpy(rank <= 1, rank <= 5, style, (rank <= 1) & style)

    def ignoring_style(self) -> dict[str, np.ndarray]:
        """The same had the style words been dealt out among the pictures at random: expectations, not a draw.

        With π(s) the share of style s among what was asked for, picture i, whose style the probe calls p_i, gets
        Σ_s π(s)·[rank_i(s) = 1] for its concept, π(p_i) for its style and π(p_i)·[rank_i(p_i) = 1] for both. A model
        that draws the concept and ignores the word cannot do better; one that listens does.
        """
        share = torch.tensor([self.styles.count(style) / len(self.styles) for style in STYLES], dtype=torch.float64)
        said = torch.tensor([STYLES.index(style) for style in self.predicted_styles])
        first = (self.ranks <= 1).double()
        pair = share[said] * first.gather(1, said[:, None])[:, 0]
        return _as_numpy(first @ share, (self.ranks <= 5).double() @ share, share[said], pair)

    def chance(self) -> dict[str, float]:
        """What guessing concept and style at random scores."""
        k = self.num_candidates.double()
        r1, r5, style = (1 / k).mean().item(), (5 / k).clamp(max=1).mean().item(), 1 / len(STYLES)
        return dict(zip(METRICS, (r1, r5, style, r1 * style), strict=True))

    def table(self) -> list[dict[str, Any]]:
        """One row a picture."""
        metrics = self.metrics()
        asked = [STYLES.index(style) for style in self.styles]
        return [
            {
                "concept": self.concepts[i],
                "style": self.styles[i],
                "nearest": self.nearest[i],
                "rank": int(self.ranks[i, asked[i]]),
                "predicted_style": self.predicted_styles[i],
                "pair": bool(metrics["pair"][i]),
            }
            for i in range(len(self.concepts))
        ]

    def summary(self, bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
        """Means with 95 % intervals by a bootstrap that resamples concepts: the pictures of one are not independent.

        Args:
            bootstrap: number of resamplings.
            seed: of the resamplings.

        Returns:
            ``num_pictures``, ``num_concepts``; each of METRICS as ``{"value", "low", "high"}``; ``by_style`` the same
            by style; ``ignores_style`` and ``chance``, values alone.
        """
        metrics, ignoring = self.metrics(), self.ignoring_style()
        result = _summarise(metrics, self.concepts, bootstrap, seed)
        result["by_style"] = {}
        for style in STYLES:
            rows = [i for i, asked in enumerate(self.styles) if asked == style]
            if rows:
                part = {name: values[rows] for name, values in metrics.items()}
                result["by_style"][style] = _summarise(part, [self.concepts[i] for i in rows], bootstrap, seed)
        result["ignores_style"] = {name: float(values.mean()) for name, values in ignoring.items()}
        result["chance"] = self.chance()
        return result


def _as_numpy(*columns: Tensor) -> dict[str, np.ndarray]:
    return {name: column.double().numpy() for name, column in zip(METRICS, columns, strict=True)}


def _summarise(metrics: dict[str, np.ndarray], concepts: list[str], bootstrap: int, seed: int) -> dict[str, Any]:
    groups = sorted(set(concepts))
    result: dict[str, Any] = {"num_pictures": len(concepts), "num_concepts": len(groups)}
    return result | {name: interval(values, concepts, bootstrap, seed) for name, values in metrics.items()}


def interval(values: np.ndarray, groups: Sequence[str], bootstrap: int = 1000, seed: int = 0) -> dict[str, float]:
    """Mean and its 95 % percentile interval, whole groups resampled (Efron & Tibshirani, 1993, §8.3, §13.3).

    Args:
        values: float64 (n,).
        groups: of each value, n.
        bootstrap: number of resamplings.
        seed: of the resamplings.

    Returns:
        ``value``, ``low``, ``high``.
    """
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    total, count = np.bincount(group, values), np.bincount(group)  # (m,)
    m = len(names)
    drawn = (randomness.uniform(seed, "bootstrap", 0, bootstrap * m) * m).astype(np.int64).reshape(bootstrap, m)
    low, high = np.quantile(total[drawn].sum(1) / count[drawn].sum(1), [0.025, 0.975])
    return {"value": float(values.mean()), "low": float(low), "high": float(high)}
