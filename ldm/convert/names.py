"""What each module of ours is called in CompVis files and in diffusers folders: facts about files, as tables.

A row is (ours, CompVis, diffusers). Parameters keep their last word: ``weight`` and ``bias``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Row = tuple[str, str, str]


def _row(ours: str, theirs: str) -> Row:
    """A row of what both others call the same."""
    return ours, theirs, theirs


_RES: list[Row] = [
    ("norm1", "in_layers.0", "norm1"),
    ("conv1", "in_layers.2", "conv1"),
    ("embedding", "emb_layers.1", "time_emb_proj"),
    ("norm2", "out_layers.0", "norm2"),
    ("conv2", "out_layers.3", "conv2"),
    ("skip", "skip_connection", "conv_shortcut"),
]
_TRANSFORMER: list[Row] = [
    ("norm", "norm", "norm"),
    ("proj_in", "proj_in", "proj_in"),
    ("proj_out", "proj_out", "proj_out"),
    *(_row(name, f"transformer_blocks.0.{name}") for name in ("norm1", "norm2", "norm3")),
    *(
        _row(f"{ours}.{part}", f"transformer_blocks.0.{their}.{part}{'.0' if part == 'to_out' else ''}")
        for ours, their in (("self_attention", "attn1"), ("cross_attention", "attn2"))
        for part in ("to_q", "to_k", "to_v", "to_out")
    ),
    _row("feed_forward.proj_in", "transformer_blocks.0.ff.net.0.proj"),
    _row("feed_forward.proj_out", "transformer_blocks.0.ff.net.2"),
]
_VAE_RES: list[Row] = [
    *((name, name, name) for name in ("norm1", "conv1", "norm2", "conv2")),
    ("skip", "nin_shortcut", "conv_shortcut"),
]
_VAE_ATTENTION: list[Row] = [
    ("norm", "norm", "group_norm"),
    ("to_q", "q", "to_q"),
    ("to_k", "k", "to_k"),
    ("to_v", "v", "to_v"),
    ("to_out", "proj_out", "to_out.0"),
]
# Before 0.13, diffusers named the parts of the autoencoder's attention so.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

_CLIP_LAYER: list[tuple[str, str]] = [  # (transformers, OpenCLIP)
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("self_attn.out_proj", "attn.out_proj"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
]


def _under(prefix: Row, rows: Sequence[Row]) -> list[Row]:
    ours, compvis, diffusers = prefix
    return [(f"{ours}.{a}", f"{compvis}.{b}", f"{diffusers}.{c}") for a, b, c in rows]


def unet_names(num_levels: int, num_blocks: int, attention: Sequence[bool]) -> list[Row]:
    """Modules of a UNet: the walk through its 12 + 3 + 12 blocks, as :class:`ldm.unet.UNet` takes it."""
    rows: list[Row] = [
        ("time_embedding.0", "time_embed.0", "time_embedding.linear_1"),
        ("time_embedding.2", "time_embed.2", "time_embedding.linear_2"),
        ("input_blocks.0", "input_blocks.0.0", "conv_in"),
        ("norm_out", "out.0", "conv_norm_out"),
        ("conv_out", "out.2", "conv_out"),
    ]

    def block(side: str, k: int, down_or_up: str, i: int, attends: bool) -> None:
        here = f"{side}.{k}"
        rows.extend(_under((f"{here}.res", f"{here}.0", f"{down_or_up}.resnets.{i}"), _RES))
        if attends:
            rows.extend(_under((f"{here}.transformer", f"{here}.1", f"{down_or_up}.attentions.{i}"), _TRANSFORMER))

    k = 1
    for level in range(num_levels):
        for i in range(num_blocks):
            block("input_blocks", k, f"down_blocks.{level}", i, attention[level])
            k += 1
        if level < num_levels - 1:
            here = f"input_blocks.{k}"
            rows.append((f"{here}.conv", f"{here}.0.op", f"down_blocks.{level}.downsamplers.0.conv"))
            k += 1
    rows += _under(("middle_blocks.0", "middle_block.0", "mid_block.resnets.0"), _RES)
    rows += _under(("middle_blocks.1", "middle_block.1", "mid_block.attentions.0"), _TRANSFORMER)
    rows += _under(("middle_blocks.2", "middle_block.2", "mid_block.resnets.1"), _RES)
    k = 0
    for up, level in enumerate(reversed(range(num_levels))):
        for i in range(num_blocks + 1):
            block("output_blocks", k, f"up_blocks.{up}", i, attention[level])
            if i == num_blocks and level > 0:
                here = f"output_blocks.{k}"
                compvis = f"{here}.{2 if attention[level] else 1}.conv"
                rows.append((f"{here}.upsample.conv", compvis, f"up_blocks.{up}.upsamplers.0.conv"))
            k += 1
    return rows


def autoencoder_names(num_levels: int, num_blocks: int) -> list[Row]:
    """Modules of an autoencoder: ours are numbered in the order that they run."""
    rows = [_row("to_moments", "quant_conv"), _row("from_latents", "post_quant_conv")]

    def middle(side: str, k: int) -> int:
        parts = [("block_1", "resnets.0", _VAE_RES), ("attn_1", "attentions.0", _VAE_ATTENTION)]
        for compvis, diffusers, names in [*parts, ("block_2", "resnets.1", _VAE_RES)]:
            rows.extend(_under((f"{side}.{k}", f"{side}.mid.{compvis}", f"{side}.mid_block.{diffusers}"), names))
            k += 1
        return k

    def level_of(side: str, k: int, level: int, place: int, blocks: int, resize: bool) -> int:
        way = "down" if side == "encoder" else "up"
        compvis, diffusers = f"{side}.{way}.{level}", f"{side}.{way}_blocks.{place}"
        for i in range(blocks):
            rows.extend(_under((f"{side}.{k}", f"{compvis}.block.{i}", f"{diffusers}.resnets.{i}"), _VAE_RES))
            k += 1
        if resize:
            rows.append((f"{side}.{k}.conv", f"{compvis}.{way}sample.conv", f"{diffusers}.{way}samplers.0.conv"))
            k += 1
        return k

    def ends(side: str, k: int) -> None:
        rows.append(_row(f"{side}.0", f"{side}.conv_in"))
        rows.append((f"{side}.{k}", f"{side}.norm_out", f"{side}.conv_norm_out"))
        rows.append(_row(f"{side}.{k + 2}", f"{side}.conv_out"))  # between them the activation

    k = 1
    for level in range(num_levels):
        k = level_of("encoder", k, level, level, num_blocks, level < num_levels - 1)
    ends("encoder", middle("encoder", k))
    k = middle("decoder", 1)
    for place, level in enumerate(reversed(range(num_levels))):
        k = level_of("decoder", k, level, place, num_blocks + 1, level > 0)
    ends("decoder", k)
    return rows


def renaming(rows: Sequence[Row], column: int) -> Callable[[str], str]:
    """Our name of a parameter → theirs; column 1 is CompVis, 2 is diffusers."""
    table = {row[0]: row[column] for row in rows}

    def theirs(name: str) -> str:
        module, _, last = name.rpartition(".")
        return f"{table[module]}.{last}"

    return theirs


def tower(name: str) -> str:
    """Our name of a parameter of the tower → transformers', without the ``text_model.`` that most files put first."""
    return name.removeprefix("tower.")


def from_open_clip(name: str) -> list[str]:
    """OpenCLIP's name of a parameter → transformers' name, or three where query, key and value are held in one."""
    whole = {
        "token_embedding.weight": "embeddings.token_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_final.weight": "final_layer_norm.weight",
        "ln_final.bias": "final_layer_norm.bias",
    }
    if name in whole:
        return [whole[name]]
    _, _, layer, rest = name.split(".", 3)
    here = f"encoder.layers.{layer}"
    if rest.startswith("attn.in_proj_"):
        return [f"{here}.self_attn.{part}_proj.{rest.removeprefix('attn.in_proj_')}" for part in "qkv"]
    module, _, last = rest.rpartition(".")
    theirs = {b: a for a, b in _CLIP_LAYER}
    return [f"{here}.{theirs[module]}.{last}"] if module in theirs else [f"unexpected {name}"]
