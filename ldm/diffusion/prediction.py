"""What a network may predict, and how each follows from the others: ε, v and x0 of z = α x0 + σ ε."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

Prediction = Literal["epsilon", "v", "x0"]
PREDICTIONS: tuple[str, ...] = get_args(Prediction)


def check_prediction(kind: str) -> None:
    """Raise ValueError unless ``kind`` is one of :data:`PREDICTIONS`."""
    if kind not in PREDICTIONS:
        raise ValueError(f"prediction={kind!r} is unknown; choose one of {', '.join(PREDICTIONS)}")


def target(kind: Prediction, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What the network shall return: ε, x0, or v = α ε - σ x0 (Salimans & Ho, 2202.00512, §4).

    Args:
        kind: which.
        x0: clean latents, shape (n, ...).
        eps: noise, same shape.
        alpha: α_t, broadcastable to x0.
        sigma: σ_t, broadcastable to x0.
    """
    check_prediction(kind)
    return eps if kind == "epsilon" else x0 if kind == "x0" else alpha * eps - sigma * x0


def to_x0(kind: Prediction, prediction: Tensor, z: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """The estimate of the clean latents: (z - σ ε) / α (DDIM, 2010.02502, eq. 12), or α z - σ v.

    It estimates z_0, not the next latents: a sampler adds noise to it again.
    """
    check_prediction(kind)
    if kind == "x0":
        return prediction
    return (z - sigma * prediction) / alpha if kind == "epsilon" else alpha * z - sigma * prediction


def to_eps(kind: Prediction, prediction: Tensor, z: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """The estimate of the noise: (z - α x0) / σ, or α v + σ z."""
    check_prediction(kind)
    if kind == "epsilon":
        return prediction
    return (z - alpha * prediction) / sigma if kind == "x0" else alpha * prediction + sigma * z
