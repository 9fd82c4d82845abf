"""Metrics with torchmetrics' interface: they add up over batches and over ranks, and compute values with intervals.

    ImageMetric(features, set_distances)    FD, KID, precision and recall of generated images against real ones
    ImageMetric(features, diversity)        distances among the images of one prompt
    ImageMetric(score, means(names))        pair accuracy, R@k, text alignment, PSNR: what is said of each image

Features are any callable from images to (n, d). Figures over EfficientNet-Lite0's are named so, and never FID, whose
features are Inception's. Shapes: N real and n generated images, d features, B resamplings.
"""

import hashlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from ldm.evaluation.figures import Figure, mean, resamplings

Reduce = Callable[[Tensor, np.ndarray], list[Figure]]  # (n, columns) float64 and the group of each row → figures
NEIGHBOURS = 3  # k of precision and recall
REAL = -1  # the group of real images
# Images below which a figure is labelled, and how. KID has no bias, and its interval says the rest.
LEAST = {"FD": (2048, "biased upwards"), **dict.fromkeys(("precision", "recall"), (1000, "compare at equal n alone"))}
_ENDS = ("", "_low", "_high", "_n")  # of a scalar's name: value, 95 % interval, number of images
PUBLISHED = {
    "FID": ("image.fid", "FrechetInceptionDistance", {"normalize": True}),
    "IS": ("image.inception", "InceptionScore", {"normalize": True}),
    "CLIPScore": ("multimodal.clip_score", "CLIPScore", {}),
}


class ImageMetric(Metric):
    """Keeps a row an image, and makes figures of all rows."""

    full_state_update = False

    def __init__(
        self,
        score: Callable[..., Tensor],  # what update is given, groups apart → a row an image: features, or values
        reduce: Reduce,
        over_ranks: bool = True,  # compute over what all processes saw; False: each saw everything already
    ) -> None:
        super().__init__(sync_on_compute=over_ranks)
        self.score: Callable[..., Tensor]
        self.rows: list[Tensor]
        self.groups: list[Tensor]
        self.score, self.reduce = score, reduce
        self.add_state("rows", [], dist_reduce_fx="cat")
        self.add_state("groups", [], dist_reduce_fx="cat")

    def update(self, *args: Any, groups: Sequence[str] | None) -> None:
        """A batch and the group of each image, its prompt as a rule: images of one are not independent; None: real."""
        rows = self.score(*args).double()
        digests = [hashlib.sha256(name.encode()).digest()[:7] for name in groups or ()]
        numbers = [int.from_bytes(digest, "big") for digest in digests] if groups else [REAL] * len(rows)
        self.rows.append(rows)
        self.groups.append(torch.tensor(numbers, device=rows.device))

    def compute(self) -> dict[str, Tensor]:
        """Scalars: ``name``, ``name_low`` and ``name_high`` (95 %), ``name_n`` (images), as ``log_dict`` takes them."""
        rows, groups = dim_zero_cat(self.rows).cpu(), dim_zero_cat(self.groups).cpu().numpy()
        order = np.lexsort((rows[:, 0].numpy(), groups))  # ranks and batches bring them in any
        found = self.reduce(rows[torch.from_numpy(order)], groups[order])
        parts = [(f.name, (f.value, f.low, f.high, f.n)) for f in found]
        return {name + end: torch.tensor(float(value), dtype=torch.float64)
                for name, values in parts for end, value in zip(_ENDS, values, strict=True)}  # fmt: skip


def figures(metric: Metric, fingerprint: Mapping[str, Any] | None = None) -> dict[str, Figure]:
    """What an :class:`ImageMetric` computes, over all ranks, as figures with their reservations."""
    values, found = metric.compute(), {}
    for name in [key.removesuffix("_n") for key in values if key.endswith("_n")]:
        value, low, high, n = (values[name + end].item() for end in _ENDS)
        enough, lack = LEAST.get(name.split("-")[0], (0, ""))
        note = f"n={n:.0f} < {enough}: {lack}" if n < enough else ""
        found[name] = Figure(name, value, low, high, int(n), note, {**(fingerprint or {}), "n": int(n)})
    return found


def published(name: str) -> Metric:
    """FID, IS or CLIPScore: torchmetrics' own class, under the name that its weights give it the right to.

    Raises:
        ValueError: an unknown name, or its packages or weights are not there.
    """
    if name not in PUBLISHED:
        raise ValueError(f"metric {name!r} is unknown; choose one of {', '.join(PUBLISHED)}")
    module, kind, arguments = PUBLISHED[name]
    try:
        metric: Metric = getattr(importlib.import_module(f"torchmetrics.{module}"), kind)(**arguments)
    except Exception as error:  # of a package, a hub or a file system: each means that it cannot be had here
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise ValueError(f"{name} cannot be had here ({reason}); FD-EffNet and KID-EffNet need nothing") from error
    return metric


# ---------------------------------------------------------------------------------------------- what is made of rows


def means(names: Sequence[str]) -> Reduce:
    """The mean of each column."""
    return lambda rows, groups: [mean(name, c, groups) for name, c in zip(names, rows.numpy().T, strict=True)]


def diversity(rows: Tensor, groups: np.ndarray, name: str = "diversity-EffNet") -> list[Figure]:
    """Mean distance, 1 - cosine, between two images of a prompt, and the mean over prompts; none without two."""
    parts = [F.normalize(rows[torch.from_numpy(groups == one)], dim=1) for one in np.unique(groups)]
    parts = [x for x in parts if len(x) > 1]
    spread = np.array([1.0 - ((x @ x.T).sum() - len(x)).item() / (len(x) * (len(x) - 1)) for x in parts])
    return [mean(name, spread, range(len(spread)))._replace(n=sum(map(len, parts)))] if parts else []


def set_distances(rows: Tensor, groups: np.ndarray, suffix: str = "EffNet", bootstrap: int = 100) -> list[Figure]:
    """Fréchet distance, KID, precision and recall.

    Intervals are those of other generated images against the same real ones (of recall: of other real ones).

    Raises:
        ValueError: fewer images of either kind than the neighbours of precision and recall, and one.
    """
    fake = torch.from_numpy(groups != REAL)
    real, generated = rows[~fake], rows[fake]
    n = min(len(real), len(generated))
    if n <= NEIGHBOURS:
        raise ValueError(f"{len(generated)} images against {len(real)} real ones: at least {NEIGHBOURS + 1} of each")
    drawn, number = resamplings(groups[groups != REAL], bootstrap)
    often = np.stack([np.bincount(row, minlength=drawn.shape[1]) for row in drawn])
    # How often each image counts: once, then as drawn; (1 + B, n).
    weights = torch.from_numpy(np.concatenate([np.ones((1, len(number))), often[:, number]]))
    found = []
    for name, values in {
        "FD": frechet_distance(real, generated, weights),
        "KID": kernel_distance(real, generated, weights),
        "precision": weights @ inside(real, generated) / weights.sum(1),
    }.items():
        # A resampling repeats images, which biases a Fréchet distance: its spread is taken, not its place.
        spread = np.quantile(values[1:] - values[1:].mean(), [0.025, 0.975])
        value = values[0].item()
        found.append(Figure(f"{name}-{suffix}", value, value + spread[0], value + spread[1], n))
    recall = mean(f"recall-{suffix}", inside(generated, real).numpy(), range(len(real)))
    return [*found, recall._replace(n=n)]


def frechet_distance(
    real: Tensor,  # float64 (N, d)
    generated: Tensor,  # float64 (n, d)
    weights: Tensor,  # rows of how often each generated image counts, float64 (B, n)
) -> Tensor:  # (B,)
    """|μ - μ'|² + tr(Σ + Σ' - 2 (Σ Σ')^½) of two Gaussians (Dowson & Landau, 1982; Heusel et al., 1706.08500, eq. 6).

    With Σ = LᵀL and Σ' = YᵀY the last trace is the sum of the singular values of Y Lᵀ: exact where images are fewer
    than features, and without a matrix root.
    """
    centre, centred = real.mean(0), (real - real.mean(0)) / (len(real) - 1) ** 0.5
    root = centred if len(real) <= real.shape[1] else torch.linalg.qr(centred, mode="r").R  # L, (min(N, d), d)
    trace, projected, squares = centred.square().sum(), generated @ root.T, generated.square().sum(1)
    found = []
    for w in weights:
        total, some = w.sum(), w > 0
        own = w @ generated / total
        own_trace = (w @ squares - total * own.square().sum()) / (total - 1)
        y = (projected - w @ projected / total)[some] * (w[some] / (total - 1)).sqrt()[:, None]
        found.append((centre - own).square().sum() + trace + own_trace - 2 * torch.linalg.svdvals(y).sum())
    return torch.stack(found)


def kernel_distance(real: Tensor, generated: Tensor, weights: Tensor) -> Tensor:
    """Unbiased MMD² under k(x, y) = (xᵀy / d + 1)³ over all pairs (Bińkowski et al., 1801.01401, eq. 4); as above."""
    pairs = ((real, real), (real, generated), (generated, generated))
    k_rr, k_rg, k_gg = ((x @ y.T / x.shape[1] + 1) ** 3 for x, y in pairs)
    total, k_gg = weights.sum(1), k_gg - k_gg.diag().diag()
    among = total**2 - weights.square().sum(1)  # an image is no pair with its own copy
    among_real = (k_rr.sum() - k_rr.trace()) / (len(real) * (len(real) - 1))
    return among_real + ((weights @ k_gg) * weights).sum(1) / among - 2 * weights @ k_rg.mean(0) / total


def inside(these: Tensor, others: Tensor) -> Tensor:
    """Whether each of ``others`` lies in a ball around one of ``these`` that reaches its k-th neighbour: float64 (n,).

    Its mean is precision with real images for ``these``, recall with generated ones (Kynkäänniemi, 1904.06991, eq. 1).
    """
    radius = torch.cdist(these, these).kthvalue(NEIGHBOURS + 1, dim=1).values  # the nearest is itself
    return (torch.cdist(others, these) <= radius).any(1).double()
