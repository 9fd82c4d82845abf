"""Decoding in tiles: the memory of one tile, and no seams.

The part of the decoder at the size of the latents runs on the whole picture, its attention included. Only the growing
part runs tile by tile, each with a margin as wide as that part can see; its group norms take their mean and variance
from one pass over all tiles, so that neighbours are normalised alike and agree where they meet. What remains of the
difference to decoding in one piece are those statistics: they are pooled from tiles that each used their own.

Shapes: n images, c channels, h × w latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

MARGIN = 8  # latents; the growing part of SD's decoder sees 6.25 to each side
_Window = tuple[int, int, int, int]  # top, bottom, left, right


def windows(height: int, width: int, tile: int) -> Iterator[tuple[_Window, _Window]]:
    """Tiles that cover height × width, and each with its margin."""
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            bottom, right = min(top + tile, height), min(left + tile, width)
            outer = (
                max(top - MARGIN, 0),
                min(bottom + MARGIN, height),
                max(left - MARGIN, 0),
                min(right + MARGIN, width),
            )
            yield (top, bottom, left, right), outer


@dataclass
class _Pool:
    """Running sums of a group norm's input by image and group, over the tiles: count, sum, sum of squares, (n, g)."""

    count: int
    total: Tensor
    squares: Tensor

    def moments(self, eps: float) -> tuple[Tensor, Tensor]:
        """Mean and 1 / std, each (n, g, 1)."""
        mean = self.total / self.count
        variance = self.squares / self.count - mean.square()
        return mean[..., None].float(), (variance + eps).rsqrt()[..., None].float()


def decode_tiled(decoder: nn.Sequential, first_growing: int, m: Tensor, tile: int) -> Tensor:
    """What ``decoder(m)`` gives, to the statistics of its group norms, tile by tile.

    Args:
        decoder: layers in a row.
        first_growing: index of the first layer that changes the size.
        m: input, shape (n, c, h, w).
        tile: latents a side, >= 16.

    Raises:
        ValueError: for a tile that is too small.
    """
    if tile < 2 * MARGIN:
        raise ValueError(f"tile={tile}: the rule is at least {2 * MARGIN} latents a side; 64 is usual")
    layers = list(decoder)
    h, grow = nn.Sequential(*layers[:first_growing])(m), nn.Sequential(*layers[first_growing:])
    if tile >= max(h.shape[2:]):
        return grow(h)
    plan = list(windows(h.shape[2], h.shape[3], tile))
    pools: dict[nn.Module, _Pool] = {}
    with _hooks(grow, lambda norm, x: _gather(pools, norm, x)):
        for inner, _ in plan:  # without margins: every pixel counts once
            grow(_cut(h, inner))
    image: Tensor | None = None
    with _hooks(grow, lambda norm, x: _normalise(norm, x, pools[norm])):
        for inner, outer in plan:
            part = grow(_cut(h, outer))
            factor = part.shape[2] // (outer[1] - outer[0])
            if image is None:
                image = part.new_empty(len(h), part.shape[1], h.shape[2] * factor, h.shape[3] * factor)
            own = [factor * (a - b) for a, b in zip(inner, (outer[0], outer[0], outer[2], outer[2]), strict=True)]
            top, bottom, left, right = (factor * edge for edge in inner)
            image[..., top:bottom, left:right] = part[..., own[0] : own[1], own[2] : own[3]]
    assert image is not None
    return image


def _cut(h: Tensor, window: _Window) -> Tensor:
    return h[..., window[0] : window[1], window[2] : window[3]]


@contextmanager
def _hooks(module: nn.Module, replace: Callable[[nn.GroupNorm, Tensor], Tensor | None]) -> Iterator[None]:
    """Let ``replace(norm, x)`` see each group norm's input; what it returns, if anything, becomes the output."""
    norms = [part for part in module.modules() if isinstance(part, nn.GroupNorm)]
    handles = [norm.register_forward_hook(lambda norm, x, y: replace(norm, x[0])) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gather(pools: dict[nn.Module, _Pool], norm: nn.GroupNorm, x: Tensor) -> None:
    groups = x.double().reshape(len(x), norm.num_groups, -1)
    sums = _Pool(groups.shape[2], groups.sum(2), groups.square().sum(2))
    if norm in pools:
        old = pools[norm]
        sums = _Pool(old.count + sums.count, old.total + sums.total, old.squares + sums.squares)
    pools[norm] = sums


def _normalise(norm: nn.GroupNorm, x: Tensor, pool: _Pool) -> Tensor:
    mean, scale = pool.moments(norm.eps)
    y = ((x.float().reshape(len(x), norm.num_groups, -1) - mean) * scale).reshape(x.shape)
    return (y * norm.weight[:, None, None] + norm.bias[:, None, None]).to(x.dtype)
