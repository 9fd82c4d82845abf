"""Classifier-free guidance (Ho & Salimans, 2207.12598), over a network as a plain callable."""

from collections.abc import Callable

import torch
from torch import Tensor

Network = Callable[[Tensor, Tensor, Tensor], Tensor]


def guided(
    unet: Network,  # (z, t, context) → prediction
    positive: Tensor,  # context of the prompts, (n, m, d)
    negative: Tensor | None,  # context of the negative prompts, same shape; None where s = 1
    scale: float,  # s >= 0; at s = 1 the negative prompt has no effect, and one pass is made
    rescale: float = 0.0,  # φ in [0, 1], see below
) -> Callable[[Tensor, Tensor], Tensor]:  # (z (n, ...), t (n,)) → prediction (n, ...)
    """Prediction for the prompt, pushed away from the negative prompt: ε_neg + s (ε_pos - ε_neg) (eq. 6, s = 1 + w).

    It holds for ε, v and x0 alike, since each is affine in the others at fixed z and t. φ says how far the guided
    prediction takes the standard deviation of the one for the prompt, which guidance had raised (2305.08891, §3.4).
    """
    if scale == 1.0 or negative is None:
        return lambda z, t: unet(z, t, positive)
    both = torch.cat([negative, positive])

    def predict(z: Tensor, t: Tensor) -> Tensor:
        prediction_neg, prediction_pos = unet(torch.cat([z, z]), torch.cat([t, t]), both).chunk(2)
        prediction = prediction_neg + scale * (prediction_pos - prediction_neg)
        if rescale > 0.0:
            own, of_prompt = (y.flatten(1).std(dim=1) for y in (prediction, prediction_pos))
            factor = rescale * (of_prompt / own) + (1.0 - rescale)
            prediction = prediction * factor.reshape(-1, *[1] * (z.ndim - 1))
        return prediction

    return predict
