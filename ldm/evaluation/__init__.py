"""Evaluation: metrics with their intervals, the score of pictures, losses, comparisons, curves, and their reports."""

from ldm.evaluation.features import EfficientNetLite0, Features
from ldm.evaluation.figures import Figure, compare, mean, over_seeds, paired
from ldm.evaluation.metrics import ImageMetric, diversity, figures, means, published, set_distances
from ldm.evaluation.model import Drawing, Judge, evaluate_pairs
from ldm.evaluation.pairs import PairScorer
from ldm.evaluation.reconstruction import evaluate_autoencoder
from ldm.evaluation.studies import compare_losses, score, sweep

__all__ = [
    "Drawing", "EfficientNetLite0", "Features", "Figure", "ImageMetric", "Judge", "PairScorer", "compare",
    "compare_losses", "diversity", "evaluate_autoencoder", "evaluate_pairs", "figures", "mean", "means", "over_seeds",
    "paired", "published", "score", "set_distances", "sweep",
]  # fmt: skip
