"""Samplers: pure functions over a denoiser. A new one is one function and one line in the table at the end.

``denoise(z, i)`` returns the estimate x̂0 of the clean latents at step i of the grid; ``noise(i)`` returns the standard
normal noise of step i. No sampler knows what the network predicts, of guidance, or of seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from torch import Tensor

from ldm.diffusion.grids import Grid

Denoise = Callable[[Tensor, int], Tensor]
Noise = Callable[[int], Tensor]


class Sampler(Protocol):
    """From the noise at the first time of the grid to latents at its last; shape (n, ...) throughout."""

    def __call__(self, denoise: Denoise, z: Tensor, grid: Grid, noise: Noise, eta: float = 0.0) -> Tensor: ...


def ddim(denoise: Denoise, z: Tensor, grid: Grid, noise: Noise, eta: float = 0.0) -> Tensor:
    """DDIM (Song et al., 2010.02502, eq. 12 and 16); first order in the step.

    z_s = α_s x̂0 + √(σ_s² - c²) ε̂ + c ε,  c = η (σ_s / σ_t) √(1 - α_t² / α_s²).

    Args:
        denoise: (z, i) → x̂0.
        z: noise, shape (n, ...).
        grid: times.
        noise: i → fresh noise, same shape as z; called only where c > 0.
        eta: η >= 0: 0 follows the probability-flow ODE, 1 is DDPM's ancestral sampling.
    """
    for i in range(grid.steps):
        alpha_t, sigma_t = grid.alpha[i], grid.sigma[i]
        alpha_s, sigma_s = grid.alpha[i + 1], grid.sigma[i + 1]
        x0 = denoise(z, i)
        eps = (z - alpha_t * x0) / sigma_t
        # At η > 1 the fresh noise may not exceed all the noise of the next time.
        c = min(eta * sigma_s / sigma_t * max(1.0 - (alpha_t / alpha_s) ** 2, 0.0) ** 0.5, sigma_s)
        z = alpha_s * x0 + (sigma_s**2 - c**2) ** 0.5 * eps
        if c > 0.0:
            z = z + c * noise(i)
    return z


# DDPM's reverse process with the variance β̃ (2006.11239, eq. 6 and 7) is DDIM's at η = 1 (2010.02502, §4.1).
SAMPLERS: dict[str, Sampler] = {"ddim": ddim, "ddpm": partial(ddim, eta=1.0)}
