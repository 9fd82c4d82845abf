"""What a network may predict, and how each follows from the others: ε, v, x0 and the flow of z = α x0 + σ ε."""

from typing import Literal, get_args

from torch import Tensor

Prediction = Literal["epsilon", "v", "x0", "flow"]
PREDICTIONS: tuple[str, ...] = get_args(Prediction)


def check_prediction(kind: str) -> None:
    """Raise ValueError unless ``kind`` is one of :data:`PREDICTIONS`."""
    if kind not in PREDICTIONS:
        raise ValueError(f"prediction={kind!r} is unknown; choose one of {', '.join(PREDICTIONS)}")


def target(kind: Prediction, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What the network shall return: ε, x0, v = α ε - σ x0 (Salimans & Ho, 2202.00512, §4), or the flow.

    The flow is dz/dτ = ε - x0 of the straight path (Liu et al., 2209.03003, eq. 1); any other path may predict it too.

    Args:
        kind: which.
        x0: clean latents, shape (n, ...).
        eps: noise, same shape.
        alpha: α_t, broadcastable to x0.
        sigma: σ_t, broadcastable to x0.
    """
    check_prediction(kind)
    if kind == "flow":
        return eps - x0
    return eps if kind == "epsilon" else x0 if kind == "x0" else alpha * eps - sigma * x0


def to_x0(kind: Prediction, prediction: Tensor, z: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """The clean latents: (z - σ ε) / α (DDIM, 2010.02502, eq. 12), α z - σ v, or of the flow u (z - σ u) / (α + σ).

    It estimates z_0, not the next latents: a sampler adds noise to it again.
    """
    check_prediction(kind)
    if kind == "x0":
        return prediction
    if kind == "flow":
        return (z - sigma * prediction) / (alpha + sigma)
    return (z - sigma * prediction) / alpha if kind == "epsilon" else alpha * z - sigma * prediction


def to_eps(kind: Prediction, prediction: Tensor, z: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """The estimate of the noise: (z - α x0) / σ, or α v + σ z, or of the flow u (z + α u) / (α + σ)."""
    check_prediction(kind)
    if kind == "epsilon":
        return prediction
    if kind == "flow":
        return (z + alpha * prediction) / (alpha + sigma)
    return (z - alpha * prediction) / sigma if kind == "x0" else alpha * prediction + sigma * z
