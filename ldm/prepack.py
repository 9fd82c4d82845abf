"""Convolutions and linear maps whose weights lie as the CPU's kernels read them, for sampling in bfloat16.

oneDNN brings a layer's weights into blocks of its own at every call. For SD 1.x that is 1.7 GB to read and to write a
step, as long as the products themselves take in the smaller layers. Here it is done once. The results are the same to
the bit, but for layers that have a faster form (PackedUpsample, PackedFeedForward): these round elsewhere. The
operators are those that torch's compiler emits for frozen weights; a torch without them keeps its layers.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PackedConv2d(nn.Module):
    """A convolution with prepacked weights."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.shape = (list(conv.padding), list(conv.stride), list(conv.dilation), 1)
        # The size is a hint: the blocks of a 3×3 convolution serve all sizes (of 1×1 not: PackedLinear; see pack).
        hint = [1, conv.in_channels, 32, 32]
        reorder: Callable[..., Tensor] = torch._C._nn.mkldnn_reorder_conv2d_weight
        self.bias, self.packed = conv.bias, reorder(conv.weight.detach().to_mkldnn(), *self.shape, hint)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) → (n, o, h, w), channels-last."""
        x = x.contiguous(memory_format=torch.channels_last)
        return torch.ops.mkldnn._convolution_pointwise(x, self.packed, self.bias, *self.shape, "none", [], "")


def pack(conv: nn.Conv2d) -> nn.Module:
    """The convolution with prepacked weights, but for multiples of 48 channels: their blocks fit one size alone.

    At 8×8, 192 channels would take 14 ms for 0.4 (torch 2.13).
    """
    return conv if conv.out_channels % 48 == 0 else PackedConv2d(conv)


class PackedLinear(nn.Module):
    """A linear map, or a 1×1 convolution; or some of its outputs, perhaps with a "gelu" before they are rounded."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rows: slice = slice(None), activation: str = "none") -> None:
        super().__init__()
        self.is_convolution, self.activation = isinstance(layer, nn.Conv2d), activation
        self.bias = None if layer.bias is None else layer.bias.detach()[rows]
        self.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().flatten(1)[rows], None)

    def forward(self, x: Tensor) -> Tensor:
        """(…, c) → (…, o), or (n, c, h, w) → (n, o, h, w), channels-last."""
        x = x.movedim(1, -1) if self.is_convolution else x
        y = torch.ops.mkldnn._linear_pointwise(x.contiguous(), self.packed, self.bias, self.activation, [], "none")
        return y.movedim(-1, 1) if self.is_convolution else y


class PackedFeedForward(nn.Module):
    """(x W ⊙ gelu(x V)) U of a ``proj_in`` (W beside V) and a ``proj_out``, with gelu inside its product."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        half, self.proj_out = layer.proj_in.out_features // 2, PackedLinear(layer.proj_out)
        self.value = PackedLinear(layer.proj_in, slice(half))
        self.gate = PackedLinear(layer.proj_in, slice(half, None), "gelu")

    def forward(self, x: Tensor) -> Tensor:
        """(n, l, c) → (n, l, c)."""
        return self.proj_out(self.value(x).mul_(self.gate(x)))


class PackedUpsample(nn.Module):
    """Twice the size by nearest neighbours and a 3×3 convolution, as one convolution before it: 4/9 of the products.

    Each of the four pixels that a place becomes sees 2×2 places; weights that meet the same place are added up.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        taps = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # weights that meet, by pixel, place
        w = torch.einsum("iay,jbx,ocyx->ijocab", taps, taps, layer.conv.weight.detach().float()).flatten(0, 2)
        four = nn.Conv2d(w.shape[1], len(w), 2, padding=1)
        four.weight.data, four.bias.data = w.to(layer.conv.weight), layer.conv.bias.detach().repeat(4)  # type: ignore[union-attr]
        self.conv, self.plain = pack(four), pack(layer.conv)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(n, c, h, w) → (n, o, *size), (2 h, 2 w) if none is given; an odd size takes the plain way."""
        n, _, h, w = x.shape
        if size not in (None, (2 * h, 2 * w)):
            return self.plain(F.interpolate(x, size=size, mode="nearest"))
        four = self.conv(x).unflatten(1, (4, -1))  # (n, 4, o, h + 1, w + 1)
        out = four.new_empty(n, 2 * h, 2 * w, four.shape[2]).permute(0, 3, 1, 2)
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            out[:, :, i::2, j::2] = four[:, 2 * i + j, :, i : i + h, j : j + w]
        return out


def prepack(module: Any) -> Any:
    """Replace the layers of a bfloat16 module on the CPU, in place: the plain weights are gone afterwards."""
    if not torch.backends.mkldnn.is_available():
        return module
    whole = {"FeedForward": PackedFeedForward, "Upsample": PackedUpsample}  # by name: this room imports no model
    for name, child in module.named_children():
        if type(child).__name__ in whole:
            setattr(module, name, whole[type(child).__name__](child))
        elif isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear(child))
        elif isinstance(child, nn.Conv2d) and child.groups == 1 and child.padding_mode == "zeros":
            pointwise = (child.kernel_size, child.stride, child.padding) == ((1, 1), (1, 1), (0, 0))
            setattr(module, name, PackedLinear(child) if pointwise else pack(child))
        else:
            prepack(child)
    return module
