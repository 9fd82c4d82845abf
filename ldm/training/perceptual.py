"""The perceptual term of stage one: how far apart two images are to a frozen network."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from ldm.evaluation.features import EfficientNetLite0


class Perceptual(nn.Module):
    """A distance between activations, as LPIPS takes it (Zhang et al., 1801.03924).

    Raises:
        ValueError: for an unknown network, or one whose packages are not installed.
    """

    def __init__(
        self,
        network: Literal["effnet", "vgg"] = "effnet",  # EfficientNet-Lite0; or LPIPS-VGG, where torchvision is
        weight: float = 1.0,  # beside the likelihood, in nats a pixel value
    ) -> None:
        super().__init__()
        if network not in ("effnet", "vgg") or not 0.0 <= weight < math.inf:
            raise ValueError(f"perceptual.network={network} weight={weight}: effnet or vgg, and a finite weight >= 0")
        self.weight = weight
        try:  # torchmetrics has LPIPS' learned w; torchvision fetches the weights of VGG
            self.distance = LiteDistance() if network == "effnet" else LearnedPerceptualImagePatchSimilarity("vgg").net
        except ModuleNotFoundError as error:
            raise ValueError(f"perceptual.network={network} is not to be had: {error}") from None

    def forward(self, x: Tensor, reconstruction: Tensor) -> Tensor:
        """The weighted mean distance of a batch, a scalar; x in [-1, 1], both (n, 3, h, w)."""
        return self.weight * self.distance(reconstruction.float(), x).mean()


class LiteDistance(nn.Module):
    """LPIPS, eq. 1 with w = 1, over six blocks of EfficientNet-Lite0 and its last.

    d(x, x0) = Σ_l 1/(H_l W_l) Σ_hw ‖y_l - y0_l‖², the activations y of unit length over channels at each place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = EfficientNetLite0()

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        """(n,), with gradients; images (n, 3, h, w) in [-1, 1] at their own size, not clamped."""
        ours, real = (self.network.maps((image + 1.0) * 127.5) for image in (x, x0))
        units = [[F.normalize(y.float(), eps=1e-6) for y in pair] for pair in zip(ours, real, strict=True)]
        return torch.stack([(y - y0).square().sum(1).mean((1, 2)) for y, y0 in units]).sum(0)
