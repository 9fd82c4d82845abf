"""What each module of ours is called in CompVis files and in diffusers folders: facts about files, as tables.

A row is (ours, CompVis, diffusers). Parameters keep their last word, ``weight`` or ``bias``. Text towers have the names
of transformers; OpenCLIP's are brought to these where they are read.
"""

from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from typing import Any

import yaml
from torch import nn

from ldm.autoencoder import Autoencoder
from ldm.unet import UNet

Row = tuple[str, str, str]
COMPVIS, DIFFUSERS = 1, 2  # columns


def facts(name: str) -> dict[str, Any]:
    """What is known of a format of others, from ``ldm/assets``."""
    return yaml.safe_load((files("ldm") / "assets" / f"{name}.yaml").read_text(encoding="utf-8"))


_TABLES: dict[str, list[Row]] = facts("names")


def _under(ours: str, compvis: str, diffusers: str, table: str) -> list[Row]:
    """The rows of a table, each word behind its column's prefix."""
    return [(ours + a, compvis + b, diffusers + c) for a, b, c in _TABLES[table]]


def _walk(way: str, num_levels: int, num_blocks: int) -> Iterator[tuple[int, str, int | None]]:
    """A way down or up, as it runs: (level, diffusers' name of it, number of a block or None for a change of size)."""
    for place in range(num_levels):
        level = place if way == "down" else num_levels - 1 - place
        blocks = range(num_blocks if way == "down" else num_blocks + 1)
        for i in (*blocks, None) if place < num_levels - 1 else blocks:
            yield level, f"{way}_blocks.{place}", i


def _unet(num_levels: int, num_blocks: int, attention: Sequence[bool]) -> list[Row]:
    """Modules of a UNet, through its input, middle and output blocks, as :class:`ldm.unet.UNet` makes them."""
    rows = _under("", "", "", "unet_ends")
    for k, (part, table) in enumerate((("resnets.0", "res"), ("attentions.0", "transformer"), ("resnets.1", "res"))):
        rows += _under(f"middle_blocks.{k}.", f"middle_block.{k}.", f"mid_block.{part}.", f"unet_{table}")
    for way, side, k in (("down", "input_blocks", 0), ("up", "output_blocks", -1)):
        for level, theirs, i in _walk(way, num_levels, num_blocks):
            k += i is not None or way == "down"  # an upsampling is the end of the block before it
            here = f"{side}.{k}"
            if i is not None:
                rows += _under(f"{here}.res.", f"{here}.0.", f"{theirs}.resnets.{i}.", "unet_res")
                if attention[level]:
                    attends = f"{here}.transformer.", f"{here}.1.", f"{theirs}.attentions.{i}."
                    rows += _under(*attends, "unet_transformer")
            else:
                up = ("upsample.conv", "2.conv" if attention[level] else "1.conv")
                ours, compvis = up if way == "up" else ("conv", "0.op")
                rows.append((f"{here}.{ours}", f"{here}.{compvis}", f"{theirs}.{way}samplers.0.conv"))
    return rows


def _autoencoder(num_levels: int, num_blocks: int) -> list[Row]:
    """Modules of an autoencoder: ours are numbered in the order that they run."""
    rows = _under("", "", "", "vae_ends")
    for side, way in (("encoder", "down"), ("decoder", "up")):
        modules: list[Row] = []  # CompVis, diffusers, table
        for level, theirs, i in _walk(way, num_levels, num_blocks):
            block = (f"{way}.{level}.block.{i}", f"{theirs}.resnets.{i}", "vae_res")
            change = (f"{way}.{level}.{way}sample", f"{theirs}.{way}samplers.0", "vae_resize")
            modules.append(change if i is None else block)
        middle = _TABLES["vae_middle"]
        for k, (compvis, diffusers, table) in enumerate(modules + middle if way == "down" else middle + modules, 1):
            rows += _under(f"{side}.{k}.", f"{side}.{compvis}.", f"{side}.{diffusers}.", table)
        last = len(modules + middle) + 3  # between the last norm and the last convolution is the activation
        numbers, compvis_ends = (0, last - 2, last), ("conv_in", "norm_out", "conv_out")
        ends = zip(numbers, compvis_ends, ("conv_in", "conv_norm_out", "conv_out"), strict=True)
        rows += [(f"{side}.{k}", f"{side}.{compvis}", f"{side}.{diffusers}") for k, compvis, diffusers in ends]
    return rows


def naming(module: nn.Module, column: int) -> Callable[[str], str]:
    """Our name of a parameter of a UNet, an autoencoder or CLIP's tower → theirs, of one column."""
    if isinstance(module, UNet):
        rows = _unet(len(module.arguments["widths"]), module.arguments["num_blocks"], module.arguments["attention"])
    elif isinstance(module, Autoencoder):
        rows = _autoencoder(len(module.arguments["widths"]), module.arguments["num_blocks"])
    else:
        return lambda name: name.removeprefix("tower.")  # as in transformers, without the text_model. of most files
    table = {row[0]: row[column] for row in rows}

    def theirs(name: str) -> str:
        module, _, last = name.rpartition(".")
        return f"{table[module]}.{last}"

    return theirs
