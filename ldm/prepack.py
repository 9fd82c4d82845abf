"""Convolutions and linear maps whose weights lie as the CPU's kernels read them, for sampling in bfloat16.

oneDNN brings a layer's weights into blocks of its own at every call. For SD 1.x that is 1.7 GB to read and to write a
step, as long as the products themselves take in the smaller layers. Here it is done once. The results are the same to
the bit. The operators are those that torch's compiler emits for frozen weights; a torch without them keeps its layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

_M = TypeVar("_M", bound=nn.Module)


class PackedConv2d(nn.Module):
    """A convolution with prepacked weights."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.shape = (list(conv.padding), list(conv.stride), list(conv.dilation), 1)
        # The size is a hint: the blocks of a 3×3 convolution serve all sizes (those of 1×1 do not: see PackedLinear).
        hint = [1, conv.in_channels, 32, 32]
        reorder: Callable[..., Tensor] = torch._C._nn.mkldnn_reorder_conv2d_weight
        self.bias, self.packed = conv.bias, reorder(conv.weight.detach().to_mkldnn(), *self.shape, hint)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) → (n, o, h, w), channels-last."""
        x = x.contiguous(memory_format=torch.channels_last)
        return torch.ops.mkldnn._convolution_pointwise(x, self.packed, self.bias, *self.shape, "none", [], "")


class PackedLinear(nn.Module):
    """A linear map, or a 1×1 convolution, with prepacked weights."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.is_convolution, self.bias = isinstance(layer, nn.Conv2d), layer.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().flatten(1), None)

    def forward(self, x: Tensor) -> Tensor:
        """(…, c) → (…, o), or (n, c, h, w) → (n, o, h, w), channels-last."""
        x = x.movedim(1, -1) if self.is_convolution else x
        y = torch.ops.mkldnn._linear_pointwise(x.contiguous(), self.packed, self.bias, "none", [], "")
        return y.movedim(-1, 1) if self.is_convolution else y


class PackedUpsample(nn.Module):
    """Twice the size by nearest neighbours and a 3×3 convolution, as one convolution before it: 4/9 of the products.

    Each of the four pixels that a place becomes sees 2×2 places; weights that meet the same place are added up.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        taps = torch.tensor(
            [[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]]
        )  # which weights meet, by pixel and place
        w = torch.einsum("iay,jbx,ocyx->ijocab", taps, taps, conv.weight.detach().float()).flatten(0, 2)
        four = nn.Conv2d(conv.in_channels, 4 * conv.out_channels, 2, padding=1, bias=conv.bias is not None)
        four.weight = nn.Parameter(w.to(conv.weight), requires_grad=False)
        if conv.bias is not None:
            four.bias = nn.Parameter(conv.bias.detach().repeat(4), requires_grad=False)
        self.conv = PackedConv2d(four)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) → (n, o, 2 h, 2 w)."""
        n, _, h, w = x.shape
        four = self.conv(x).unflatten(1, (4, -1))  # (n, 4, o, h + 1, w + 1)
        out = four.new_empty(n, 2 * h, 2 * w, four.shape[2]).permute(0, 3, 1, 2)
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            out[:, :, i::2, j::2] = four[:, 2 * i + j, :, i : i + h, j : j + w]
        return out


def prepack(module: _M, upsample: type[nn.Module] | None = None) -> _M:
    """Replace the layers of a bfloat16 module on the CPU, in place: the plain weights are gone afterwards.

    Args:
        module: in bfloat16.
        upsample: the class of its layers that double the size, if they are nearest neighbours and a convolution.
    """
    if not torch.backends.mkldnn.is_available():
        return module
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if upsample is not None and isinstance(child, upsample):
                setattr(parent, name, PackedUpsample(child.conv))  # type: ignore[arg-type]
            elif isinstance(child, nn.Linear) or (isinstance(child, nn.Conv2d) and _is_pointwise(child)):
                setattr(parent, name, PackedLinear(child))
            elif isinstance(child, nn.Conv2d) and child.groups == 1 and child.padding_mode == "zeros":
                setattr(parent, name, PackedConv2d(child))
    return module


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((1, 1), (1, 1), (0, 0), 1)
