"""3×3 convolutions by Winograd's minimal filtering, for sampling on a CPU in float32.

F(m × m, 3 × 3) takes (m + 2)² products for m² outputs instead of 9 m² (Lavin & Gray, 1509.09308, §4): 2.25
times fewer for m = 2, 4 times fewer for m = 4. What is left are (m + 2)² matrix products, which run at the machine's
peak. In float32 the result differs from the direct sum by 1e-6 (m = 2) or 4e-6 (m = 4), relative. The price is memory:
the transformed weights are 1.8 or 4 times the size of the weights, which stay beside them.

Shapes: n images, c and o channels, h × w places, k = m + 2, p tiles.
"""

import copy
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILES = 256  # at a time, so that what a block computes stays in the caches
# A convolution needs some work to be worth its transforms; measured on two cores with AVX-512.
LEAST_CHANNELS = 128
LEAST_FLOP = 2e8
# The machine as the choice of m sees it; only the ratio counts: FLOP a second, bytes a second.
_FLOPS, _BYTES = 300e9, 10e9
_M = TypeVar("_M", bound=nn.Module)

# Bᵀ, G and Aᵀ of the paper (§4.1 and §4.3) by m.
_MATRICES: dict[int, tuple[list[list[float]], list[list[float]], list[list[float]]]] = {
    2: (
        [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
        [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
        [[1, 1, 1, 0], [0, 1, -1, -1]],
    ),
    4: (
        [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
         [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]],
        [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6],
         [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]],
        [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
    ),
}  # fmt: skip


def _kron(m: int, which: int) -> Tensor:
    """M ⊗ M of a matrix of the paper: it acts on both sides of a tile at once."""
    matrix = torch.tensor(_MATRICES[m][which], dtype=torch.float64)
    return torch.kron(matrix, matrix).float()


def transform_weight(weight: Tensor, m: int) -> Tensor:
    """U = G g Gᵀ: (o, c, 3, 3) → (k², c, o)."""
    o, c = weight.shape[:2]
    return (_kron(m, 1) @ weight.detach().reshape(o * c, 9).T).reshape(-1, o, c).transpose(1, 2).contiguous()


def convolve(x: Tensor, u: Tensor, bias: Tensor | None, m: int) -> Tensor:
    """The convolution with padding 1 whose weights were transformed to u, (k², c, o): (n, c, h, w) → (n, o, h, w).

    x is float32 and best in channels-last order, in which the result is.
    """
    n, c, h, w = x.shape
    k, o = m + 2, u.shape[2]
    high, wide = -(-h // m), -(-w // m)  # tiles
    padded = F.pad(x, (1, 1 + wide * m - w, 1, 1 + high * m - h)).contiguous(memory_format=torch.channels_last)
    tiles = padded.unfold(2, k, m).unfold(3, k, m).permute(0, 2, 3, 4, 5, 1)  # (n, high, wide, k, k, c)
    b, a = _kron(m, 0), _kron(m, 2)
    out = x.new_empty(n, high, m, wide, m, o)
    rows = max(1, TILES // wide)
    for i in range(n):
        for top in range(0, high, rows):
            part = slice(top, top + rows)
            v = torch.matmul(b, tiles[i, part].reshape(-1, k * k, c))  # Bᵀ d B, (p, k², c)
            y = torch.bmm(v.transpose(0, 1), u)  # (k², p, o)
            y = torch.matmul(a, y.transpose(0, 1))  # Aᵀ y A, (p, m², o)
            if bias is not None:
                y += bias
            out[i, part] = y.view(-1, wide, m, m, o).transpose(1, 2)
    return out.view(n, high * m, wide * m, o)[:, :h, :w].permute(0, 3, 1, 2)


def best_m(n: int, c: int, o: int, h: int, w: int) -> int:
    """2 or 4, whichever should take less time: m = 4 computes less, and reads more weights."""
    tiles = {m: n * -(-h // m) * -(-w // m) for m in (2, 4)}
    return min(tiles, key=lambda m: (m + 2) ** 2 * c * o * (2 * tiles[m] / _FLOPS + 4 / _BYTES))


class WinogradConv2d(nn.Module):
    """A 3×3 convolution of stride 1 and padding 1 that runs by Winograd's filtering; weights are those of ``conv``."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self._transformed: dict[int, Tensor] = {}  # u by m, made when first needed

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) → (n, o, h, w)."""
        if 18.0 * x.numel() * self.conv.out_channels < LEAST_FLOP:
            return self.conv(x)
        n, c, h, w = x.shape
        m = best_m(n, c, self.conv.out_channels, h, w)
        if m not in self._transformed:
            self._transformed[m] = transform_weight(self.conv.weight, m)
        return convolve(x, self._transformed[m], self.conv.bias, m)


def accelerated(module: _M) -> _M:
    """A twin of a float32 module that shares its weights, its wide 3×3 convolutions by Winograd's filtering."""
    weights = [*module.parameters(), *module.buffers()]
    twin = copy.deepcopy(module, {id(weight): weight for weight in weights})
    for parent in list(twin.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv2d) and _fits(child):
                setattr(parent, name, WinogradConv2d(child))
    return twin


def _fits(conv: nn.Conv2d) -> bool:
    """Whether a convolution is of the kind, and wide enough to gain."""
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    plain = shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and conv.padding_mode == "zeros"
    return plain and min(conv.in_channels, conv.out_channels) >= LEAST_CHANNELS
