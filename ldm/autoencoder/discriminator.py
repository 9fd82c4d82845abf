"""The adversarial term of stage one: a discriminator of patches, and how much its opinion weighs."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


class Adversarial(nn.Module):
    """Hinge losses of a patch discriminator D (Isola et al., 1611.07004) and of the autoencoder against it.

    Both are terms of one sum: D sees a detached reconstruction, the autoencoder a detached D, so one backward pass
    and one optimiser serve both, and a step is a step. The weight of the autoencoder's term is
    λ = ‖∇ NLL‖ / ‖∇ G‖ at the decoder's last layer (VQGAN, 2012.09841, eq. 7), so that both pull alike.
    """

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 256),  # channels; each layer halves the size; multiples of 32
        weight: float = 0.5,  # of the adversarial term, beside λ
        start: int = 1000,  # step at which the autoencoder begins to hear D; D learns from the first
        adaptive: bool = True,  # weigh by λ; it is measured a micro-batch, so it changes a little with accumulation
    ) -> None:
        super().__init__()
        if any(width % 32 for width in widths) or not widths:
            raise ValueError(f"widths={tuple(widths)}: each must be a multiple of 32 (group normalisation)")
        if not 0.0 <= weight < math.inf or start < 0:
            raise ValueError(f"weight={weight}, start={start}: the rule is a finite weight >= 0, start >= 0")
        self.weight, self.start, self.adaptive = weight, start, adaptive
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for narrow, wide in pairwise(widths):
            # Normalised a sample, not a batch: what D says of an image does not hang on its neighbours.
            layers += [nn.Conv2d(narrow, wide, 4, 2, 1), nn.GroupNorm(32, wide), nn.LeakyReLU(0.2)]
        self.network = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(
        self,
        x: Tensor,  # images in [-1, 1], (n, 3, h, w)
        reconstruction: Tensor,  # of x, same shape
        nll: Tensor,  # the likelihood term, a scalar
        last: Tensor,  # weight of the decoder's last layer
        step: int,  # of the optimiser
        mean: Callable[[Tensor], Tensor] = lambda gradient: gradient,  # over the ranks: λ is that of the whole batch
    ) -> dict[str, Tensor]:
        """``discriminator`` and ``generator`` (0 before ``start``), for the loss; ``lambda``; all scalars."""
        real, fake = self.network(torch.cat([x, reconstruction.detach()])).chunk(2)
        discriminator = 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
        if step < self.start:
            return {"discriminator": discriminator, "generator": nll.new_zeros(()), "lambda": nll.new_zeros(())}
        frozen = {name: parameter.detach() for name, parameter in self.network.named_parameters()}
        generator = -functional_call(self.network, frozen, (reconstruction,)).mean()
        factor = nll.new_ones(())
        if self.adaptive:
            pulls = [mean(torch.autograd.grad(term, last, retain_graph=True)[0]).norm() for term in (nll, generator)]
            factor = (pulls[0] / (pulls[1] + 1e-4)).clamp(max=1e4)
        return {"discriminator": discriminator, "generator": self.weight * factor * generator, "lambda": factor}
