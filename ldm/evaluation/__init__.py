"""Evaluation: the score of pictures, the autoencoder's fidelity, and tables of both."""

from ldm.evaluation.features import EfficientNetLite0, Features
from ldm.evaluation.model import evaluate_model, evaluate_pairs
from ldm.evaluation.pairs import PairScorer
from ldm.evaluation.reconstruction import evaluate_autoencoder
from ldm.evaluation.scores import PairScores

__all__ = [
    "EfficientNetLite0",
    "Features",
    "PairScorer",
    "PairScores",
    "evaluate_autoencoder",
    "evaluate_model",
    "evaluate_pairs",
]
