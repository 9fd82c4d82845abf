"""The loss of stage two: squared error an image, with a weight that may hang on the signal-to-noise ratio."""

import torch
from torch import Tensor

from ldm.diffusion.prediction import Prediction, check_prediction


def per_sample_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each image in float32: (n, ...), (n, ...) → (n,) (DDPM, 2006.11239, eq. 14)."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def min_snr_weight(
    log_snr: Tensor,  # log SNR of each image, (n,)
    kind: Prediction,  # what the network predicts
    gamma: float | None,  # the cap, > 0; None weighs all alike
) -> Tensor:  # (n,), in the type of log_snr
    """Weight of an image: min(SNR, γ) on the error of x0 (Hang et al., 2303.09556, eq. 8), as seen by the prediction.

    The error of x0 is that of ε divided by SNR, that of v divided by SNR + 1, and that of the flow by (√SNR + 1)².
    """
    check_prediction(kind)
    if gamma is None:
        return torch.ones_like(log_snr)
    if not gamma > 0:
        raise ValueError(f"min_snr={gamma} must be above 0, or null for no weighting")
    snr = log_snr.exp()
    capped = snr.clamp(max=gamma)
    if kind == "flow":
        return capped / (snr.sqrt() + 1.0) ** 2
    return capped if kind == "x0" else capped / snr if kind == "epsilon" else capped / (snr + 1.0)
