"""The KL autoencoder of SD 1.x (Rombach et al., 2112.10752, §3.1): images ↔ latents, eight times smaller a side.

Shapes: n images, c channels, h × w pixels.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.autoencoder.posterior import Posterior
from ldm.autoencoder.tiling import decode_tiled

NUM_GROUPS = 32  # group normalisation, as in SD 1.x
DOWNSAMPLING = 8  # pixels a latent, each side
QUERIES = 4096  # of attention at a time: all of 512×512 pixels


class ResBlock(nn.Module):
    """x ← skip(x) + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(NUM_GROUPS, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(NUM_GROUPS, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c_in, h, w) → (n, c_out, h, w)."""
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class AttentionBlock(nn.Module):
    """Self-attention over all places, one head, as in the middle of SD's autoencoder."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(NUM_GROUPS, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) → (n, c, h, w)."""
        n, c, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (n, h w, c)
        q, k, v = (linear(tokens)[:, None] for linear in (self.to_q, self.to_k, self.to_v))
        # One head as wide as the channels has no fused kernel on a GPU: in blocks, its weights stay small.
        blocks = [F.scaled_dot_product_attention(block, k, v)[:, 0] for block in q.split(QUERIES, dim=2)]
        y = self.to_out(torch.cat(blocks, dim=1))
        return x + y.transpose(1, 2).reshape(n, c, height, width)


class Downsample(nn.Module):
    """Half the size; padded on the right and below alone, as SD's weights expect."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) → (n, c, h / 2, w / 2), h and w even."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the size: nearest neighbours, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) → (n, c, 2 h, 2 w)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _middle(channels: int) -> nn.Sequential:
    return nn.Sequential(ResBlock(channels, channels), AttentionBlock(channels), ResBlock(channels, channels))


class Encoder(nn.Sequential):
    """Images (n, 3·stem², h/stem, w/stem) → moments (n, 2·latent_channels, h/8, w/8)."""

    def __init__(self, widths: Sequence[int], num_blocks: int, latent_channels: int, stem: int) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3 * stem**2, widths[0], 3, padding=1)]
        channels = widths[0]
        for level, width in enumerate(widths):
            for _ in range(num_blocks):
                layers.append(ResBlock(channels, width))
                channels = width
            if level < len(widths) - 1:
                layers.append(Downsample(channels))
        layers += [*_middle(channels), nn.GroupNorm(NUM_GROUPS, channels, eps=1e-6), nn.SiLU()]
        layers.append(nn.Conv2d(channels, 2 * latent_channels, 3, padding=1))
        super().__init__(*layers)


class Decoder(nn.Sequential):
    """Raw latents (n, latent_channels, h/8, w/8) → images (n, 3·stem², h/stem, w/stem)."""

    def __init__(self, widths: Sequence[int], num_blocks: int, latent_channels: int, stem: int) -> None:
        channels = widths[-1]
        layers: list[nn.Module] = [nn.Conv2d(latent_channels, channels, 3, padding=1), *_middle(channels)]
        for level in reversed(range(len(widths))):
            for _ in range(num_blocks + 1):
                layers.append(ResBlock(channels, widths[level]))
                channels = widths[level]
            if level > 0:
                layers.append(Upsample(channels))
        layers += [nn.GroupNorm(NUM_GROUPS, channels, eps=1e-6), nn.SiLU()]
        layers.append(nn.Conv2d(channels, 3 * stem**2, 3, padding=1))
        super().__init__(*layers)
        # Up to here everything has the size of the latents; stem = 8 would leave nothing that grows.
        self.first_growing = next((i for i, layer in enumerate(layers) if isinstance(layer, Upsample)), len(layers))


class Autoencoder(nn.Module):
    """KL autoencoder with f = 8.

    It owns the latent scale: ``encode`` returns z = (m - latent_mean) / latent_std a channel, of zero mean and unit
    variance over the training data, and ``decode`` takes the same z. SD 1.x has mean 0 and std 1 / 0.18215.

    Raises:
        ValueError: if the settings do not give a downsampling of eight.
    """

    def __init__(
        self,
        widths: Sequence[int] = (128, 256, 512, 512),  # channels by level, multiples of 32
        num_blocks: int = 2,  # residual blocks a level in the encoder; one more in the decoder
        latent_channels: int = 4,
        stem: int = 1,  # 2, 4: leave full resolution at once, by folding stem × stem pixels into channels
    ) -> None:
        super().__init__()
        if (shrinks := stem * 2 ** (len(widths) - 1)) != DOWNSAMPLING:
            rule = f"the rule is stem · 2^(len(widths) - 1) = {DOWNSAMPLING}"
            raise ValueError(f"stem={stem} with {len(widths)} widths shrinks by {shrinks}; {rule}")
        if any(width % NUM_GROUPS for width in widths):
            raise ValueError(f"widths={tuple(widths)}: each must be a multiple of {NUM_GROUPS} (group normalisation)")
        depths = {"widths": list(widths), "num_blocks": num_blocks}
        # Plain, for the manifest of a checkpoint.
        self.arguments: dict[str, Any] = {**depths, "latent_channels": latent_channels, "stem": stem}
        self.latent_channels, self.stem = latent_channels, stem
        self.encoder = Encoder(widths, num_blocks, latent_channels, stem)
        self.to_moments = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.from_latents = nn.Conv2d(latent_channels, latent_channels, 1)
        self.decoder = Decoder(widths, num_blocks, latent_channels, stem)
        self.latent_mean: Tensor
        self.latent_std: Tensor
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))

    def posterior(self, x: Tensor) -> Posterior:
        """q(m | x) over raw latents m (n, 4, h/8, w/8) of images x in [-1, 1], (n, 3, h, w), h and w multiples of 8.

        Raises:
            ValueError: if the shape does not fit.
        """
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] % DOWNSAMPLING or x.shape[3] % DOWNSAMPLING:
            raise ValueError(
                f"images of shape {tuple(x.shape)}: the rule is (n, 3, h, w), h and w multiples of {DOWNSAMPLING}"
            )
        h = F.pixel_unshuffle(x, self.stem) if self.stem > 1 else x
        mean, logvar = self.to_moments(self.encoder(h)).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents of zero mean and unit variance: images x in [-1, 1], (n, 3, h, w) → z (n, 4, h/8, w/8).

        It is the posterior's mode, or a sample if a generator is given, on the device of x.
        """
        posterior = self.posterior(x)
        return self.normalise(posterior.mode() if generator is None else posterior.sample(generator))

    def decode(self, z: Tensor, tile: int | None = None) -> Tensor:
        """Images from scaled latents: z (n, 4, h/8, w/8) → about [-1, 1], not clamped, (n, 3, h, w).

        ``tile`` latents a side decode at a time, for less memory at twice the work: see :mod:`ldm.autoencoder.tiling`.
        """
        m = z.float() * self._column(self.latent_std) + self._column(self.latent_mean)
        return self.decode_raw(m.to(z.dtype), tile)

    def decode_raw(self, m: Tensor, tile: int | None = None) -> Tensor:
        """Images from raw latents, as the posterior gives them: (n, 4, h/8, w/8) → (n, 3, h, w)."""
        m = self.from_latents(m)
        x = self.decoder(m) if tile is None else decode_tiled(self.decoder, self.decoder.first_growing, m, tile)
        return F.pixel_shuffle(x, self.stem) if self.stem > 1 else x

    def normalise(self, m: Tensor) -> Tensor:
        """Raw latents → z = (m - latent_mean) / latent_std, a channel; any shape (n, 4, ...)."""
        return ((m.float() - self._column(self.latent_mean)) / self._column(self.latent_std)).to(m.dtype)

    def set_latent_scale(self, mean: Tensor, std: Tensor) -> None:
        """Keep the measured mean and standard deviation of raw latents, each of shape (latent_channels,)."""
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
            raise ValueError(f"latent mean {mean.tolist()} and std {std.tolist()} must be finite, the std above 0")
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts as any module, but for the latent scale: it stays in float32, exact in every precision."""
        mean, std = self.latent_mean, self.latent_std
        super()._apply(fn, recurse)
        if not (mean.is_meta or self.latent_mean.is_meta):
            self.latent_mean, self.latent_std = (x.float().to(self.latent_mean.device) for x in (mean, std))
        return self

    def _column(self, value: Tensor) -> Tensor:
        return value[:, None, None]
