"""Representation alignment (REPA: Yu et al., 2410.06940, §3): the UNet's middle told what a frozen network sees."""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.evaluation.features import EfficientNetLite0
from ldm.unet import UNet


class Alignment(nn.Module):
    """λ (1 - mean over places of cos(y, head(h))): h from the noisy latents, y the features of the clean image.

    h is what the UNet's middle blocks gave in its last pass, y the last block's map of EfficientNet-Lite0, which comes
    with the package, brought to the size of h. The head is trained along, and is no part of the model.
    """

    def __init__(self, unet: UNet, weight: float) -> None:
        super().__init__()
        if not weight > 0.0:
            raise ValueError(f"repa={weight}: the rule is above 0, or 0 for no alignment; 0.5 is usual")
        self.weight, width, channels = weight, 512, unet.arguments["widths"][-1]
        self._network = [EfficientNetLite0()]  # in a list, so that no checkpoint keeps the frozen network
        features = self._network[0].network._conv_head.in_channels
        self.head = nn.Sequential(
            nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, features)
        )
        self._h: list[Tensor] = []
        unet.middle_blocks[-1].register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, inputs: Any, h: Tensor) -> None:
        self._h = [h]

    def forward(self, images: Tensor) -> Tensor:
        """The loss of the UNet's last pass, a scalar, from its clean images (n, 3, h, w) in [-1, 1]."""
        h = rearrange(self._h.pop(), "n c h w -> n h w c")
        with torch.no_grad():
            *_, y = self._network[0].to(images.device).maps((images.float() + 1.0) * 127.5)
            y = rearrange(F.adaptive_avg_pool2d(y, (h.shape[1], h.shape[2])), "n c h w -> n h w c")
        return self.weight * (1.0 - F.cosine_similarity(self.head(h).float(), y.float(), dim=-1)).mean()
