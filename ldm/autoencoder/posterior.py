"""The posterior q(m | x) of the autoencoder: a diagonal normal distribution over raw latents m."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Posterior:
    """N(mean, exp(logvar)) over raw latents, before they are shifted and scaled to unit variance."""

    mean: Tensor  # (n, 4, h/8, w/8)
    logvar: Tensor  # logarithm of the variance, clamped to [-30, 20], same shape

    @property
    def std(self) -> Tensor:
        """Standard deviation, shape (n, 4, h/8, w/8)."""
        return torch.exp(0.5 * self.logvar)

    def mode(self) -> Tensor:
        """The most likely raw latents, shape (n, 4, h/8, w/8)."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One draw, mean + std · ε, shape (n, 4, h/8, w/8); the generator must live on the latents' device."""
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """KL(q || N(0, 1)) in nats, summed over the units of an image, shape (n,) (Kingma & Welling, 1312.6114, B)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).flatten(1).sum(1)
