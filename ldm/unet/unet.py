"""The UNet of SD 1.x (Rombach et al., 2112.10752, §3.3): (z_t, t, context) → prediction.

As SD 1.x it has 12 input, 3 middle and 12 output blocks: a first convolution, then per level ``num_blocks`` residual
blocks and a downsampling; the mirror image of it; each input block hands its output across to an output block.

Shapes: n images, c channels, h × w latents, m text tokens, d width of the context.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.unet.attention import Transformer, without_padding
from ldm.unet.layers import NUM_GROUPS, Downsample, ResBlock, Upsample, timestep_embedding


class Block(nn.Module):
    """One residual block, the transformer of a level that attends, and the upsampling that ends an output level."""

    def __init__(self, res: ResBlock, transformer: Transformer | None, upsample: Upsample | None = None) -> None:
        super().__init__()
        self.res, self.transformer, self.upsample = res, transformer, upsample

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor, padding: int, size: tuple[int, int]) -> Tensor:
        """(n, c_in, h, w) → (n, c_out, *size), where size is (h, w) but for an upsampling block."""
        x = self.res(x, embedding)
        if self.transformer is not None:
            x = self.transformer(x, context, padding)
        return x if self.upsample is None else self.upsample(x, size)


class UNet(nn.Module):
    """Predicts noise, velocity or image from noisy latents, at any height and width.

    Raises:
        ValueError: if the settings do not fit together.
    """

    def __init__(
        self,
        widths: Sequence[int] = (320, 640, 1280, 1280),  # channels by level, multiples of 32
        attention: Sequence[bool] = (True, True, True, False),  # by level; the middle always attends
        num_blocks: int = 2,  # residual blocks a level on the way down; one more on the way up
        num_heads: int | Sequence[int] = 8,  # of attention; a number, or one by level
        context_dim: int = 768,  # d, the width of the text tower
        in_channels: int = 4,  # latent channels; 9 for the inpainting UNet
        out_channels: int = 4,  # latent channels
        dropout: float = 0.0,  # in residual blocks
        linear_projections: bool = False,  # around attention: linear maps, as in SD 2.x, for 1×1 convolutions
        pooled_text: bool = False,  # embed the sum of the tokens, too, and add it to the time's (2204.06125, §2.1)
    ) -> None:
        super().__init__()
        heads = [num_heads] * len(widths) if isinstance(num_heads, int) else list(num_heads)
        if not len(widths) == len(attention) == len(heads):
            raise ValueError(
                f"widths has {len(widths)} levels, attention {len(attention)}, num_heads {len(heads)}; give one a level"
            )
        if any(width % NUM_GROUPS for width in widths):
            raise ValueError(f"widths={tuple(widths)}: each must be a multiple of {NUM_GROUPS} (group normalisation)")
        self.arguments: dict[str, Any] = {  # plain, for the manifest of a checkpoint
            "widths": list(widths), "attention": list(attention), "num_blocks": num_blocks, "num_heads": heads,
            "context_dim": context_dim, "in_channels": in_channels, "out_channels": out_channels, "dropout": dropout,
            "linear_projections": linear_projections, "pooled_text": pooled_text,
        }  # fmt: skip
        self.in_channels, self.context_dim = in_channels, context_dim
        self.gradient_checkpointing = False
        self.time_dim, embedding_dim = widths[0], 4 * widths[0]

        res = partial(ResBlock, embedding_dim=embedding_dim, dropout=dropout)

        def attend(level: int) -> Transformer:
            return Transformer(widths[level], heads[level], context_dim, linear_projections)

        def block(c_in: int, level: int, upsample: bool = False) -> Block:
            c = widths[level]
            transformer = attend(level) if attention[level] else None
            return Block(res(c_in, c), transformer, Upsample(c) if upsample else None)

        def embed(*first: nn.Module) -> nn.Sequential:
            return nn.Sequential(*first, nn.SiLU(), nn.Linear(embedding_dim, embedding_dim))

        self.time_embedding = embed(nn.Linear(self.time_dim, embedding_dim))
        self.text_embedding: nn.Module | None = None
        if pooled_text:
            self.text_embedding = embed(nn.LayerNorm(context_dim), nn.Linear(context_dim, embedding_dim))
        self.input_blocks = nn.ModuleList([nn.Conv2d(in_channels, widths[0], 3, padding=1)])
        channels, skips = widths[0], [widths[0]]
        for level, width in enumerate(widths):
            for _ in range(num_blocks):
                self.input_blocks.append(block(channels, level))
                skips.append(channels := width)
            if level < len(widths) - 1:
                self.input_blocks.append(Downsample(channels))
                skips.append(channels)
        self.middle_blocks = nn.ModuleList([res(channels, channels), attend(-1), res(channels, channels)])
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for i in range(num_blocks + 1):
                last = i == num_blocks and level > 0
                self.output_blocks.append(block(channels + skips.pop(), level, upsample=last))
                channels = widths[level]
        self.norm_out = nn.GroupNorm(NUM_GROUPS, channels, eps=1e-5)
        self.conv_out = nn.Conv2d(channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]

    def forward(
        self,
        z: Tensor,  # noisy latents, (n, in_channels, h, w)
        t: Tensor,  # timesteps in [0, 1000), real, (n,)
        context: Tensor,  # text, (n, m, d)
    ) -> Tensor:
        """The prediction from noisy latents, (n, out_channels, h, w), in the type of z."""
        embedding = self.time_embedding(timestep_embedding(t, self.time_dim).to(z.dtype))
        if self.text_embedding is not None:
            embedding = embedding + self.text_embedding(context.sum(1))  # normalised first: padding adds nothing
        # In training alone: a picture must not hang, by its roundings, on how long the other prompts of its batch are.
        context, padding = without_padding(context) if self.training else (context, 0)
        h, skips = z, []
        for module in self.input_blocks:
            if isinstance(module, Block):
                h = self._run(module, h, embedding, context, padding, h.shape[-2:])
            else:
                h = module(h)
            skips.append(h)
        first, transformer, last = self.middle_blocks
        h = last(transformer(first(h, embedding), context, padding), embedding)
        for module in self.output_blocks:
            x = torch.cat([h, skips.pop()], dim=1)
            size = skips[-1].shape[-2:] if skips else h.shape[-2:]
            h = self._run(module, x, embedding, context, padding, size)
        return self.conv_out(F.silu(self.norm_out(h)))

    def _run(self, block: nn.Module, *inputs: object) -> Tensor:
        """A block, or a block whose inner values are computed again in the backward pass to save memory."""
        if self.gradient_checkpointing and self.training:
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)
