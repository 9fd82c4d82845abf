"""Decoding in tiles: the memory of one tile, and no seams.

The part of the decoder at the size of the latents runs on the whole picture, its attention included. Only the growing
part runs tile by tile, each with a margin as wide as that part can see; its group norms take their mean and variance
from one pass over all tiles, so that neighbours are normalised alike and agree where they meet. What remains of the
difference to decoding in one piece are those statistics: they are pooled from tiles that each used their own.

Shapes: n images, c channels, h × w latents.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

MARGIN = 8  # latents; the growing part of SD's decoder sees 6.25 to each side
_Sums = tuple[int, Tensor, Tensor]  # of a norm's input by image and group: count, sum, sum of squares, (n, g)


def decode_tiled(
    decoder: nn.Sequential,
    first_growing: int,  # index of the first layer that changes the size
    m: Tensor,  # (n, c, h, w)
    tile: int,  # latents a side, >= 16
) -> Tensor:
    """What ``decoder(m)`` gives, to the statistics of its group norms, tile by tile.

    Raises:
        ValueError: for a tile that is too small.
    """
    if tile < 2 * MARGIN:
        raise ValueError(f"tile={tile}: the rule is at least {2 * MARGIN} latents a side; 64 is usual")
    layers = list(decoder)
    h, grow = nn.Sequential(*layers[:first_growing])(m), nn.Sequential(*layers[first_growing:])
    height, width = h.shape[2:]
    if tile >= max(height, width):
        return grow(h)
    tiles = [
        (slice(top, min(top + tile, height)), slice(left, min(left + tile, width)))
        for top in range(0, height, tile)
        for left in range(0, width, tile)
    ]
    sums: dict[nn.Module, _Sums] = {}
    with _hooks(grow, lambda norm, x: _gather(sums, norm, x)):
        for rows, columns in tiles:  # without margins: every pixel counts once
            part = grow(h[..., rows, columns])
    factor = part.shape[2] // (rows.stop - rows.start)
    image = part.new_empty(len(h), part.shape[1], height * factor, width * factor)
    with _hooks(grow, lambda norm, x: _normalise(norm, x, sums[norm])):
        for rows, columns in tiles:
            # A slice stops at the border by itself, but a start below 0 would count from the end.
            top, left = max(rows.start - MARGIN, 0), max(columns.start - MARGIN, 0)
            part = grow(h[..., top : rows.stop + MARGIN, left : columns.stop + MARGIN])
            own = part[..., _scaled(rows, factor, top), _scaled(columns, factor, left)]
            image[..., _scaled(rows, factor), _scaled(columns, factor)] = own
    return image


def _scaled(part: slice, factor: int, origin: int = 0) -> slice:
    """Latents → pixels, counted from ``origin``."""
    return slice(factor * (part.start - origin), factor * (part.stop - origin))


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


def _gather(sums: dict[nn.Module, _Sums], norm: nn.GroupNorm, x: Tensor) -> None:
    groups = x.double().reshape(len(x), norm.num_groups, -1)
    count, total, squares = sums.get(norm, (0, 0, 0))
    sums[norm] = count + groups.shape[2], total + groups.sum(2), squares + groups.square().sum(2)


def _normalise(norm: nn.GroupNorm, x: Tensor, sums: _Sums) -> Tensor:
    count, total, squares = sums
    mean = total / count
    scale = (squares / count - mean.square() + norm.eps).rsqrt()
    groups = x.float().reshape(len(x), norm.num_groups, -1)
    y = ((groups - mean[..., None].float()) * scale[..., None].float()).reshape(x.shape)
    return (y * norm.weight[:, None, None] + norm.bias[:, None, None]).to(x.dtype)
