"""What stage two is trained on: which times and which noise a sample gets, and how its error is weighed.

Each recipe is one field, off by itself. Every draw is a pure function of (seed, position), and with ``immiscible`` of
the sample's own latents: none hangs on the rest of the batch, so ranks and micro-batches change nothing.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ldm import randomness
from ldm.diffusion.loss import min_snr_weight


class Draw(NamedTuple):
    """Times and noise of n samples."""

    t: Tensor  # whole times, (n,)
    eps: Tensor  # ε of the target, shaped as z
    added: Tensor  # the noise in z_t: ε, or ε and a little more


@dataclass(frozen=True)
class Objective:
    """The loss of stage two, as a recipe."""

    min_snr: float | None = None  # γ of min-SNR weighting (2303.09556); null weighs all timesteps alike
    timesteps: Literal["uniform", "logit_normal"] = "uniform"  # or a normal logit of t / num_steps (2403.03206, §3.1)
    logit_mean: float = 0.0  # of logit_normal; above 0 trains more on noisy times
    logit_std: float = 1.0  # of logit_normal, above 0
    offset_noise: float = 0.0  # s: ε gets s·N(0, 1) more, one number a channel: the mean is learnt (Guttenberg, 2023)
    input_perturbation: float = 0.0  # γ: z_t has ε + γ ξ, the target keeps ε (2301.11706, algorithm 1)
    immiscible: int | None = None  # k: ε is the nearest to z of k draws (2505.18521, after 2406.12303); null draws one

    def __post_init__(self) -> None:
        min_snr_weight(torch.zeros(0), "v", self.min_snr)  # which says what γ may be
        if self.timesteps not in ("uniform", "logit_normal"):
            raise ValueError(f"loss.timesteps={self.timesteps!r} is unknown; choose uniform or logit_normal")
        if self.logit_std <= 0.0 or min(self.offset_noise, self.input_perturbation) < 0.0:
            raise ValueError(f"{self}: logit_std must be above 0, offset_noise and input_perturbation at least 0")
        if self.immiscible is not None and self.immiscible < 2:
            raise ValueError(f"loss.immiscible={self.immiscible}: the nearest of 2 draws or more, or null for one draw")

    def draw(self, seed: int, positions: Tensor, z: Tensor, num_steps: int) -> Draw:
        """Times in [0, num_steps) and noise for the samples at some positions, whose latents are z (n, c, h, w)."""
        t = torch.tensor([self.time(seed, p, num_steps) for p in positions.tolist()], device=z.device)
        eps = randomness.normals(seed, "noise", positions, z)
        if self.immiscible is not None:
            others = [randomness.normals(seed, f"noise {k}", positions, z) for k in range(1, self.immiscible)]
            each = torch.stack([eps, *others], dim=1)  # (n, k, c, h, w)
            nearest = (each - z[:, None]).flatten(2).square().sum(2).argmin(1)
            eps = each[torch.arange(len(z), device=z.device), nearest]
        if self.offset_noise:
            eps = eps + self.offset_noise * randomness.normals(seed, "offset noise", positions, z[:, :, :1, :1])
        if not self.input_perturbation:
            return Draw(t, eps, eps)
        return Draw(t, eps, eps + self.input_perturbation * randomness.normals(seed, "perturbation", positions, z))

    def time(self, seed: int, position: int, num_steps: int) -> int:
        """The time of the sample at a position, in [0, num_steps)."""
        if self.timesteps == "uniform":
            return randomness.integer(seed, "timestep", position, num_steps)
        logit = self.logit_mean + self.logit_std * randomness.normal(seed, "logit timestep", position, (1,)).item()
        return min(int(num_steps / (1.0 + math.exp(-logit))), num_steps - 1)
