"""The autoencoder's loss: a calibrated likelihood and a weighted KL divergence."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ldm.autoencoder.posterior import Posterior


class CalibratedLoss(nn.Module):
    """Negative ELBO of a β-VAE whose likelihood has a learned scale, divided by the number of pixel values.

    Gaussian: -log p(x | z) = Σ [(x - x̂)² / 2σ² + log σ + ½ log 2π]; Laplace: Σ [|x - x̂| / b + log 2b].
    The scale is what makes β mean the same for every data set (σ-VAE, 2006.13202, eq. 4; β-VAE, Higgins et al. 2017):
    without it, the weight of the KL term hangs on the pixel range.
    """

    def __init__(
        self,
        beta: float = 0.18,  # weight of the KL divergence
        likelihood: Literal["gaussian", "laplace"] = "gaussian",  # laplace is the L1 error
        log_scale: float = -1.0,  # log σ or log b to begin with, in units of pixels in [-1, 1]
    ) -> None:
        super().__init__()
        if not 0.0 <= beta < math.inf or not math.isfinite(log_scale):
            raise ValueError(f"beta={beta} must be a finite number >= 0, log_scale={log_scale} a finite one")
        if likelihood not in ("gaussian", "laplace"):
            raise ValueError(f"likelihood={likelihood!r} is unknown; choose gaussian or laplace")
        self.beta, self.likelihood = beta, likelihood
        self.log_scale = nn.Parameter(torch.tensor(float(log_scale)))

    def forward(
        self,
        x: Tensor,  # images in [-1, 1], (n, 3, h, w)
        reconstruction: Tensor,  # of x from a posterior sample, same shape
        posterior: Posterior,  # of x
    ) -> dict[str, Tensor]:
        """``loss``, ``nll`` and ``kl`` in nats a pixel value, ``scale`` (σ or b); all scalars."""
        error = (x - reconstruction).float()
        if self.likelihood == "gaussian":
            nll = 0.5 * (error * torch.exp(-self.log_scale)).square() + self.log_scale + 0.5 * math.log(2 * math.pi)
        else:
            nll = error.abs() * torch.exp(-self.log_scale) + self.log_scale + math.log(2.0)
        pixels = x[0].numel()
        kl = posterior.kl().mean() / pixels
        nll = nll.mean()
        return {"loss": nll + self.beta * kl, "nll": nll, "kl": kl, "scale": self.log_scale.detach().exp()}
