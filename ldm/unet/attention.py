"""Attention parts of the UNet: how the picture looks at itself and at the text.

Shapes: n images, c channels, h × w latents, l queries (h·w), m keys (l, or 77 text tokens), d width of the context.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.unet.layers import NUM_GROUPS

# On a CPU, plain batched products beat the fused kernel while the weights of a head stay in its caches: all l × m of
# them in float32, or a block of queries at a time in bfloat16, where the products are twice as fast.
PLAIN_LIMIT = 512 * 512
BLOCK = 2**19
TOGETHER = 2**20  # weights of all heads of some images: a batch goes through in parts of so many, which stay cached
# See _fused: it brings keys and values into oneDNN's blocks first, which pays from LONG of them on.
LONG, FUSED_BLOCK, SHIFT = 2048, 2**21, 77.0


def without_padding(context: Tensor) -> tuple[Tensor, int]:
    """Text (n, m, d) up to the last token that is not zero in all of it, and how many are left out.

    MiniLM's contexts are padded to 77 by zeros, whose keys and values are zero too: attention needs their number
    alone. On a CPU only, since a GPU would have to wait for the length; never under a compiler, for which it is new.
    """
    if context.device.type != "cpu" or context.requires_grad or torch.compiler.is_compiling():
        return context, 0
    used = context.any(-1).any(0).nonzero()
    length = int(used[-1]) + 1 if len(used) else 1
    return context[:, :length].contiguous(), context.shape[1] - length


def attend(q: Tensor, k: Tensor, v: Tensor, padding: int = 0) -> Tensor:
    """Softmax(q kᵀ / √d) v (Vaswani et al., 1706.03762, eq. 1), (n, heads, l, d), 2 × (n, heads, m, d) → as q.

    ``padding`` more keys and values are zero.
    """
    if q.device.type == "cpu" and q.shape[-2] * (k.shape[-2] + padding) <= PLAIN_LIMIT:
        parts = (y.split(max(1, TOGETHER // (q[0, ..., 0].numel() * k.shape[-2]))) for y in (q, k, v))
        return torch.cat([_plain(a, b, c, padding) for a, b, c in zip(*parts, strict=True)])
    k, v = (F.pad(y, (0, 0, 0, padding)) if padding else y for y in (k, v))
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and not any(y.requires_grad for y in (q, k, v)):
        return _in_blocks(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def _plain(q: Tensor, k: Tensor, v: Tensor, padding: int = 0) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if padding:  # so many scores of 0 are one of log(padding), whose value is zero
        scores = F.pad(scores, (0, 1), value=math.log(padding))
    return scores.softmax(dim=-1, dtype=scores.dtype)[..., : k.shape[-2]] @ v


def _in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A head and BLOCK weights at a time."""
    out, rows = torch.empty(q.shape, dtype=q.dtype), max(1, BLOCK // k.shape[-2])
    long = min(q.shape[-2], k.shape[-2]) >= LONG and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    q, k, v, heads = (y.reshape(-1, *y.shape[2:]) for y in (q, k, v, out))
    for i in range(len(q)):
        y = _fused(q[i], k[i], v[i]) if long else None
        heads[i] = torch.cat([_plain(part, k[i], v[i]) for part in q[i].split(rows)]) if y is None else y
    return out


def _fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """One head with no pass over its scores, (l, d), (m, d), (m, d) → (l, d); None if the scores are too large for it.

    oneDNN applies σ to a product before it rounds and stores it, and σ(s - SHIFT) is exp(s - SHIFT) where it is small.
    Softmax does not see what all keys have in common; without it, the exponentials of a query's scores add up to the
    number of keys at least (Jensen), so those that are lost below e^-87 are 4e-5 of the sum at most. A column of ones
    takes the sum, and shows the rest: no term is larger than it. ``unit`` keeps products with v from getting lost.
    """
    d, unit = v.shape[-1], 2.0**40
    k = (k - k.mean(0, dtype=torch.float32)).to(k.dtype)
    v = F.pad(F.pad(v, (0, 1), value=1.0) * unit, (0, -(d + 1) % 16))  # the products come in sixteens
    pack, product = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
    keys, values, shift = pack(k, None), pack(v.T.contiguous(), None), k.new_full((len(k),), -SHIFT)
    parts = []
    for part in (q * d**-0.5).split(max(1, FUSED_BLOCK // len(k))):
        weights = product(part, keys, shift, "sigmoid", [], "")
        y, total = product(weights, values, None, "none", [], "")[:, : d + 1].split((d, 1), dim=-1)
        low, high = (float(sum_) / unit for sum_ in total.aminmax())
        if not (low > 1e-31 and high < 5e-4):  # float32 ends at 1e-38; σ(x) is below exp(x) by the part σ(x); NaN
            return None
        parts.append(y / total)
    return torch.cat(parts)


class Attention(nn.Module):
    """Multi-head attention from x to ``context`` (to x itself where none is given)."""

    def __init__(self, channels: int, num_heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide the width {channels}; choose a divisor")
        context_dim = channels if context_dim is None else context_dim
        self.num_heads = num_heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor | None = None, padding: int = 0) -> Tensor:
        """x (n, l, c), context (n, m, d) → (n, l, c); ``padding`` more tokens of the context are zero."""
        context = x if context is None else context
        q, k, v = (
            rearrange(y, "n l (heads c) -> n heads l c", heads=self.num_heads)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(rearrange(attend(q, k, v, padding), "n heads l c -> n l (heads c)"))


class FeedForward(nn.Module):
    """GEGLU (Shazeer, 2002.05202): (x W ⊙ gelu(x V)) U, four times as wide inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(channels, 8 * channels)
        self.proj_out = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(n, l, c) → (n, l, c)."""
        value, gate = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(value * F.gelu(gate))


class Transformer(nn.Module):
    """One block over the latents as tokens: self-attention, cross-attention to the text, feed-forward.

    Its last projection starts at zero, so that a fresh UNet is a plain convolutional one. SD 1.x keeps its projections
    as 1×1 convolutions, SD 2.x as linear maps: the same function, other shapes on disk.
    """

    def __init__(self, channels: int, num_heads: int, context_dim: int, linear_projections: bool = False) -> None:
        super().__init__()
        self.linear_projections = linear_projections
        self.norm = nn.GroupNorm(NUM_GROUPS, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear_projections else nn.Conv2d(channels, channels, 1)
        self.norm1 = nn.LayerNorm(channels)
        self.self_attention = Attention(channels, num_heads)
        self.norm2 = nn.LayerNorm(channels)
        self.cross_attention = Attention(channels, num_heads, context_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels)
        self.proj_out = nn.Linear(channels, channels) if linear_projections else nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, context: Tensor, padding: int = 0) -> Tensor:
        """x (n, c, h, w), context (n, m, d) and ``padding`` tokens of zeros → (n, c, h, w)."""
        height, width = x.shape[-2:]
        y = self.norm(x) if self.linear_projections else self.proj_in(self.norm(x))
        y = rearrange(y, "n c h w -> n (h w) c")
        y = self.proj_in(y) if self.linear_projections else y
        y = y + self.self_attention(self.norm1(y))
        y = y + self.cross_attention(self.norm2(y), context, padding)
        y = y + self.feed_forward(self.norm3(y))
        if self.linear_projections:
            return x + rearrange(self.proj_out(y), "n (h w) c -> n c h w", h=height, w=width)
        return x + self.proj_out(rearrange(y, "n (h w) c -> n c h w", h=height, w=width))
