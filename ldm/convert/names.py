"""What each module of ours is called in CompVis files and in diffusers folders: facts about files, as tables.

A row is (ours, CompVis, diffusers). Parameters keep their last word, ``weight`` or ``bias``. Text towers have the names
of transformers; OpenCLIP's are brought to these where they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import nn

from ldm.autoencoder import Autoencoder
from ldm.unet import UNet

Row = tuple[str, str, str]
COMPVIS, DIFFUSERS = 1, 2  # columns


def _under(prefixes: Row, table: str) -> list[Row]:
    """Rows written with commas, each word behind its column's prefix; the last word counts for columns left out."""
    ours, compvis, diffusers = prefixes
    rows = ((words + words[-1:] * 2)[:3] for words in map(str.split, table.split(",")))
    return [(ours + a, compvis + b, diffusers + c) for a, b, c in rows]


_RES = """
    norm1 in_layers.0 norm1, conv1 in_layers.2 conv1, embedding emb_layers.1 time_emb_proj,
    norm2 out_layers.0 norm2, conv2 out_layers.3 conv2, skip skip_connection conv_shortcut"""
_TRANSFORMER = """
    norm, proj_in, proj_out, norm1 @norm1, norm2 @norm2, norm3 @norm3,
    self_attention.to_q @attn1.to_q, self_attention.to_k @attn1.to_k,
    self_attention.to_v @attn1.to_v, self_attention.to_out @attn1.to_out.0,
    cross_attention.to_q @attn2.to_q, cross_attention.to_k @attn2.to_k,
    cross_attention.to_v @attn2.to_v, cross_attention.to_out @attn2.to_out.0,
    feed_forward.proj_in @ff.net.0.proj, feed_forward.proj_out @ff.net.2""".replace("@", "transformer_blocks.0.")
_UNET_ENDS = """
    time_embedding.0 time_embed.0 time_embedding.linear_1, time_embedding.2 time_embed.2 time_embedding.linear_2,
    input_blocks.0 input_blocks.0.0 conv_in, norm_out out.0 conv_norm_out, conv_out out.2 conv_out"""
_VAE_RES = "norm1, conv1, norm2, conv2, skip nin_shortcut conv_shortcut"
_VAE_ATTENTION = "norm norm group_norm, to_q q to_q, to_k k to_k, to_v v to_v, to_out proj_out to_out.0"
_VAE_MIDDLE = [
    ("mid.block_1", "mid_block.resnets.0", _VAE_RES),
    ("mid.attn_1", "mid_block.attentions.0", _VAE_ATTENTION),
    ("mid.block_2", "mid_block.resnets.1", _VAE_RES),
]


def _walk(way: str, num_levels: int, num_blocks: int) -> Iterator[tuple[int, str, int | None]]:
    """A way down or up, as it runs: (level, diffusers' name of it, number of a block or None for a change of size)."""
    for place in range(num_levels):
        level = place if way == "down" else num_levels - 1 - place
        blocks = range(num_blocks if way == "down" else num_blocks + 1)
        for i in (*blocks, None) if place < num_levels - 1 else blocks:
            yield level, f"{way}_blocks.{place}", i


def unet_names(num_levels: int, num_blocks: int, attention: Sequence[bool]) -> list[Row]:
    """Modules of a UNet, through its input, middle and output blocks, as :class:`ldm.unet.UNet` makes them."""
    rows = _under(("", "", ""), _UNET_ENDS)
    for k, (part, table) in enumerate((("resnets.0", _RES), ("attentions.0", _TRANSFORMER), ("resnets.1", _RES))):
        rows += _under((f"middle_blocks.{k}.", f"middle_block.{k}.", f"mid_block.{part}."), table)
    for way, side, k in (("down", "input_blocks", 0), ("up", "output_blocks", -1)):
        for level, theirs, i in _walk(way, num_levels, num_blocks):
            k += i is not None or way == "down"  # an upsampling is the end of the block before it
            here = f"{side}.{k}"
            if i is not None:
                rows += _under((f"{here}.res.", f"{here}.0.", f"{theirs}.resnets.{i}."), _RES)
                if attention[level]:
                    rows += _under((f"{here}.transformer.", f"{here}.1.", f"{theirs}.attentions.{i}."), _TRANSFORMER)
            else:
                up = ("upsample.conv", "2.conv" if attention[level] else "1.conv")
                ours, compvis = up if way == "up" else ("conv", "0.op")
                rows.append((f"{here}.{ours}", f"{here}.{compvis}", f"{theirs}.{way}samplers.0.conv"))
    return rows


def autoencoder_names(num_levels: int, num_blocks: int) -> list[Row]:
    """Modules of an autoencoder: ours are numbered in the order that they run."""
    rows = [("to_moments", "quant_conv", "quant_conv"), ("from_latents", "post_quant_conv", "post_quant_conv")]
    for side, way in (("encoder", "down"), ("decoder", "up")):
        modules = [
            (f"{way}.{level}.{way}sample", f"{theirs}.{way}samplers.0", "conv")
            if i is None
            else (f"{way}.{level}.block.{i}", f"{theirs}.resnets.{i}", _VAE_RES)
            for level, theirs, i in _walk(way, num_levels, num_blocks)
        ]
        modules = modules + _VAE_MIDDLE if way == "down" else _VAE_MIDDLE + modules
        for k, (compvis, diffusers, table) in enumerate(modules, 1):
            rows += _under((f"{side}.{k}.", f"{side}.{compvis}.", f"{side}.{diffusers}."), table)
        # Between the last norm and the last convolution is the activation.
        ends = f"0 conv_in, {len(modules) + 1} norm_out conv_norm_out, {len(modules) + 3} conv_out"
        rows += _under((f"{side}.", f"{side}.", f"{side}."), ends)
    return rows


def renaming(rows: Sequence[Row], column: int) -> Callable[[str], str]:
    """Our name of a parameter → theirs, of one column."""
    table = {row[0]: row[column] for row in rows}

    def theirs(name: str) -> str:
        module, _, last = name.rpartition(".")
        return f"{table[module]}.{last}"

    return theirs


def naming(module: nn.Module, column: int) -> Callable[[str], str]:
    """Our name of a parameter of a UNet, an autoencoder or CLIP's tower → theirs, of one column."""
    if isinstance(module, UNet):
        a = module.arguments
        return renaming(unet_names(len(a["widths"]), a["num_blocks"], a["attention"]), column)
    if isinstance(module, Autoencoder):
        return renaming(autoencoder_names(len(module.arguments["widths"]), module.arguments["num_blocks"]), column)
    return lambda name: name.removeprefix("tower.")  # as in transformers, without the text_model. of most files
