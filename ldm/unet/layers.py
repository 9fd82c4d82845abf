"""Convolutional parts of the UNet: timestep embedding, residual block, resampling.

Shapes: n images, c channels, h × w latents, e width of the time embedding.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_GROUPS = 32  # group normalisation, as in SD 1.x: widths are multiples of 32


def timestep_embedding(
    t: Tensor,  # timesteps, real numbers are welcome, (n,)
    dim: int,  # width of the embedding, even
    max_period: float = 10_000.0,  # the longest period / 2π
) -> Tensor:  # float32 (n, dim)
    """Sinusoids of t: γ_i = t · max_period^(-i / (dim/2)), cosines first (DDPM, 2006.11239, §B; SD 1.x order)."""
    half = dim // 2
    frequency = torch.exp(-math.log(max_period) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angle = t.float()[:, None] * frequency[None]  # (n, dim / 2)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class ResBlock(nn.Module):
    """h ← skip(h) + conv(silu(norm(conv(silu(norm(h))) + linear(silu(emb))))); the last convolution starts at zero."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_dim: int,  # width of the time embedding
        dropout: float = 0.0,  # before the last convolution
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(NUM_GROUPS, in_channels, eps=1e-5)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.embedding = nn.Linear(embedding_dim, out_channels)
        self.norm2 = nn.GroupNorm(NUM_GROUPS, out_channels, eps=1e-5)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (n, c_in, h, w), embedding (n, e) → (n, c_out, h, w)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.embedding(F.silu(embedding))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.skip(x) + h


class Downsample(nn.Module):
    """Half the size by a convolution of stride 2; an odd size rounds up (63 → 32)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) → (n, c, ceil(h / 2), ceil(w / 2))."""
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest neighbours to a given size, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(n, c, h, w) → (n, c, *size): the size of the skip that comes next, so that odd sizes fit."""
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
