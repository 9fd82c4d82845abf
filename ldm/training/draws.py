"""What each sample draws by (seed, position) alone, added to a batch where it is read.

Made by the processes that read data, so that no GPU waits for it (docs/scale.md).
"""

from typing import Any

import torch
from torch import Tensor

from ldm import randomness
from ldm.autoencoder.autoencoder import DOWNSAMPLING
from ldm.diffusion import Objective


def _latents(batch: dict[str, Any], channels: int) -> Tensor:
    """Something shaped as the latents of a batch."""
    if "moments" in batch:
        return batch["moments"][:, 0]
    n, _, height, width = batch["image"].shape
    return torch.empty(n, channels, height // DOWNSAMPLING, width // DOWNSAMPLING)


def stage_one(seed: int, channels: int, latent_noise: bool, batch: dict[str, Any]) -> dict[str, Any]:
    """The posterior's noise, (n, channels, h/8, w/8); with ``latent_noise`` its level (n, 1, 1, 1) and direction."""
    z, positions = _latents(batch, channels), batch["position"]
    drawn = {"posterior": randomness.normals(seed, "posterior", positions, z)}
    if latent_noise:
        drawn["level"] = randomness.normals(seed, "latent_noise_level", positions, z[:, :1, :1, :1])
        drawn["latent_noise"] = randomness.normals(seed, "latent_noise", positions, z)
    return batch | drawn


def stage_two(
    seed: int, channels: int, objective: Objective, num_steps: int, caption_dropout: float, batch: dict[str, Any]
) -> dict[str, Any]:
    """The posterior's noise, which captions are dropped (n,), and times and noise as far as no latents decide them."""
    z, positions = _latents(batch, channels), batch["position"]
    rows = [randomness.uniform(seed, "caption dropout", p)[0] < caption_dropout for p in positions.tolist()]
    drawn = {"posterior": randomness.normals(seed, "posterior", positions, z), "dropped": torch.tensor(rows)}
    if objective.immiscible is None:
        drawn["t"], drawn["eps"], drawn["added"] = objective.draw(seed, positions, z, num_steps)
    return batch | drawn
