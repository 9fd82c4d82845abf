"""A CompVis single file of SD 1.x or 2.x → our parts. What the file does not say is in the rules named below.

A single file holds tensors and no settings. Sizes are read from the shapes; the rest is the family's convention: SD 1.x
has 1×1 convolutions around its attention and 8 heads, SD 2.x linear maps and heads of 64. A ``.yaml`` of the same name
beside the file overrides what it says.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch import Tensor, nn

from ldm.autoencoder import Autoencoder
from ldm.checkpoint import Contents
from ldm.convert.names import COMPVIS, facts
from ldm.convert.tensors import SD_SCALE, Source, build
from ldm.diffusion import Schedule
from ldm.text import TextEncoder, clip_tokenizer
from ldm.unet import UNet

UNET, VAE, EMA, TEXT = "model.diffusion_model.", "first_stage_model.", "model_ema.", "cond_stage_model."
CLIP, OPEN_CLIP = f"{TEXT}transformer.", f"{TEXT}model."
SD_SCHEDULE = {"name": "scaled_linear", "num_steps": 1000, "beta_start": 0.00085, "beta_end": 0.012}
HEAD_DIM = 64  # of CLIP's towers, and of SD 2.x's UNet

_FACTS = facts("compvis")
_FAMILIES, _OPEN_CLIP_NAMES = _FACTS["other_families"], _FACTS["open_clip"]
_LEFTOVERS = {part: "|".join(patterns) for part, patterns in _FACTS["leftovers"].items()}
_TOKENS = "embeddings.token_embedding.weight"


def read(source: Source, weights: str, prediction: str | None, only: tuple[str, ...] | None) -> Contents:
    """The parts and settings of a single file."""
    for name in source.shapes:
        for prefix, family in _FAMILIES.items():
            if name.removeprefix(UNET).startswith(prefix):
                raise ValueError(f"{source.label} is {family}, by its {name}; SD 1.x and 2.x are what can be loaded")
    config = _yaml(source.files[0].with_suffix(".yaml"))
    whole = any(name.startswith(UNET) for name in source.shapes)
    if not whole and only is None:
        raise ValueError(f"{source.label} holds no {UNET}*, so it is no whole model; for a part of one use "
                         "ldm.load_autoencoder or ldm.load_text_encoder")  # fmt: skip
    readers: dict[str, Callable[[], nn.Module]] = {
        "unet": lambda: _unet(source, weights, config),
        "autoencoder": lambda: _autoencoder(source.under(VAE) if whole else source, config),
        "text_encoder": lambda: _text_encoder(source),
    }
    components = {name: readers[name]() for name in only or readers}
    if only is not None:
        return Contents(components)
    odd = [name for name in source.shapes if not name.startswith((UNET, VAE, EMA, CLIP, OPEN_CLIP))]
    if odd := sorted(name for name in odd if not re.fullmatch(_LEFTOVERS["whole"], name)):
        raise ValueError(f"{source.label} holds what no SD 1.x or 2.x has: unexpected {'; '.join(odd[:20])}")
    linear = len(source.shapes[f"{UNET}middle_block.1.proj_in.weight"]) == 2  # SD 2.x
    kind = prediction or _prediction(source, config, linear)
    size = 768 if linear and kind == "v" else 512
    settings = {"prediction": kind, "schedule": _schedule(source, config), "grid": "leading"}
    return Contents(components, settings=settings | {"guidance_scale": 7.5, "height": size, "width": size})


def _part(source: Source, what: str, needed: str) -> Source:
    if needed not in source.shapes:
        raise ValueError(f"{source.label} holds no {what} of SD 1.x or 2.x: {needed} is missing")
    return source


def _numbers(pattern: str, source: Source) -> list[int]:
    """What stands for the group of a pattern at the beginning of names."""
    return sorted({int(found[1]) for name in source.shapes if (found := re.match(pattern, name))})


def _unet(source: Source, weights: str, config: Mapping[str, Any]) -> UNet:
    raw, averaged = _part(source.under(UNET), "UNet", "input_blocks.0.0.weight"), source.under(EMA)
    shapes, numbers = raw.shapes, _numbers(r"input_blocks\.(\d+)\.", raw)
    downs = [k for k in numbers if f"input_blocks.{k}.0.op.weight" in shapes]
    firsts = [1, *(k + 1 for k in downs)]  # block of each level
    widths = [shapes[f"input_blocks.{k}.0.in_layers.2.weight"][0] for k in firsts]
    linear = len(shapes["middle_block.1.proj_in.weight"]) == 2
    said = config.get("unet_config", {}).get("params", {})
    head_dim = said.get("num_head_channels", HEAD_DIM if linear and "num_heads" not in said else -1)
    arguments = {
        "widths": widths,
        "attention": [f"input_blocks.{k}.1.proj_in.weight" in shapes for k in firsts],
        "num_blocks": (downs[0] if downs else len(numbers)) - 1,
        "num_heads": said.get("num_heads", 8) if head_dim == -1 else [width // head_dim for width in widths],
        "context_dim": shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "linear_projections": linear,
    }
    if weights == "raw" or not averaged.shapes:
        return build(UNet, arguments, raw, COMPVIS)
    # CompVis' averages are buffers, whose names may hold no dots.
    dotted = {f"diffusion_model{name.replace('.', '')}": name for name in shapes}
    return build(UNet, arguments, averaged.renamed(lambda n: dotted.get(n, n)), COMPVIS, _LEFTOVERS["ema"])


def _autoencoder(source: Source, config: Mapping[str, Any]) -> Autoencoder:
    """From tensors named as CompVis names a whole one: ``encoder.*``, ``quant_conv.*``."""
    _part(source, "autoencoder", "post_quant_conv.weight")
    firsts = [f"encoder.down.{level}.block.0.conv1.weight" for level in _numbers(r"encoder\.down\.(\d+)\.", source)]
    arguments = {
        "widths": [source.shapes[name][0] for name in firsts],
        "num_blocks": len(_numbers(r"encoder\.down\.0\.block\.(\d+)\.", source)),
        "latent_channels": source.shapes["post_quant_conv.weight"][0],
    }
    return build(Autoencoder, arguments, source, COMPVIS, _LEFTOVERS["vae"], config.get("scale_factor", SD_SCALE))


def _text_encoder(source: Source) -> TextEncoder:
    """CLIP's tower as SD 1.x holds it, or OpenCLIP's as SD 2.x does, with the vocabulary that comes with us."""
    clip, open_clip = source.under(CLIP).renamed(lambda name: name.removeprefix("text_model.")), source.under(OPEN_CLIP)
    tower = _part(_from_open_clip(open_clip) if open_clip.shapes else clip, "text tower", _TOKENS)
    vocab_size, width = tower.shapes[_TOKENS]
    if width % HEAD_DIM:
        raise ValueError(f"{source.label}: its text tower is {width} wide; the rule is a multiple of {HEAD_DIM}")
    layers = _numbers(r"encoder\.layers\.(\d+)\.", tower)
    sizes = {"width": width, "num_layers": len(layers), "num_heads": width // HEAD_DIM, "vocab_size": vocab_size}
    others = {"activation": "gelu", "pad_token": 0} if open_clip.shapes else {}
    arguments = {"family": "clip", "tokenizer": clip_tokenizer(), **sizes, **others}
    return build(TextEncoder, arguments, tower, COMPVIS, _LEFTOVERS["clip"])


def _from_open_clip(source: Source) -> Source:
    """OpenCLIP's tensors under transformers' names, without the last layer, which SD 2.x does not run."""
    unused = f"transformer.resblocks.{max(_numbers(r'transformer.resblocks.([0-9]+)', source), default=0)}."
    words = re.compile(rf"\b({'|'.join(map(re.escape, _OPEN_CLIP_NAMES))})\b")
    tensors: dict[str, Tensor] = {}
    for name in [name for name in source.shapes if not name.startswith(unused)]:
        theirs, tensor = words.sub(lambda found: _OPEN_CLIP_NAMES[found[1]], name), source.read(name)
        head, fused, end = theirs.partition("in_proj_")  # query, key and value in one
        if fused and tensor.ndim:  # copies, which share no memory, so that they can be saved apart
            tensors |= {f"{head}{part}_proj.{end}": t.clone() for part, t in zip("qkv", tensor.chunk(3), strict=False)}
        else:
            tensors[theirs] = tensor
    return replace(source, shapes={name: tuple(t.shape) for name, t in tensors.items()}, read=tensors.__getitem__)


def _yaml(path: Path) -> dict[str, Any]:
    """Settings from the ``.yaml`` beside a file, under CompVis' keys; none if there is no such file."""
    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["params"]) if path.is_file() else {}
    except (yaml.YAMLError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{path} is no config of a CompVis model ({reason}); mend it or take it away") from error


def _prediction(source: Source, config: Mapping[str, Any], linear: bool) -> str:
    """What the UNet predicts; ValueError for SD 2.x where nothing says so: its ε and v models have the same shapes."""
    # An empty tensor v_pred is how some programs mark a file; all of SD 1.x, without linear maps, predicts ε.
    guess = "v" if "v_pred" in source.shapes else None if linear else "epsilon"
    said = config.get("parameterization") or source.notes.get("modelspec.prediction_type") or guess
    if said is None:
        raise ValueError(
            f"{source.label} is of the SD 2.x family, whose epsilon and v models look the same; put its .yaml beside "
            f"it, or say which: ldm convert {source.label} OUT prediction=v (768 pixels) or prediction=epsilon (512)"
        )
    kinds = {"eps": "epsilon", "epsilon": "epsilon", "v": "v", "x0": "x0"}
    if said not in kinds:
        raise ValueError(f"{source.label}: its prediction is said to be {said!r}; known are {', '.join(kinds)}")
    return kinds[said]


def _schedule(source: Source, config: Mapping[str, Any]) -> dict[str, Any]:
    """The noise schedule: that of the yaml, or of the file's own betas, or SD's."""
    if (said := config.get("beta_schedule", "linear")) != "linear":
        raise ValueError(f"{source.label}: its .yaml says beta_schedule={said}, which is unknown; the rule is linear")
    # What CompVis calls linear is linear in √β.
    names = {"timesteps": "num_steps", "linear_start": "beta_start", "linear_end": "beta_end"}
    schedule = SD_SCHEDULE | {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    if "ztsnr" in source.shapes:  # how some programs mark a model that was trained with no image left at the end
        return schedule | {"zero_terminal": True}
    if "betas" not in source.shapes:
        return schedule
    betas = source.read("betas").double().flatten().numpy()
    ends = {"num_steps": len(betas), "beta_start": float(f"{betas[0]:.6g}"), "beta_end": float(f"{betas[-1]:.6g}")}
    possible = 0.0 < betas[0] <= betas[-1] < 1.0  # no schedule falls
    for known in (schedule, SD_SCHEDULE | ends, {"name": "linear"} | ends) if possible else ():
        alpha_bar = Schedule(**known).alpha_bar.numpy()
        expected = 1.0 - alpha_bar / np.concatenate([[1.0], alpha_bar[:-1]])
        # Half precision keeps three digits of a beta.
        if len(expected) == len(betas) and np.allclose(betas, expected, rtol=2e-3, atol=0.0):
            return known
    raise ValueError(f"{source.label}: its betas, {betas[0]:.3g} to {betas[-1]:.3g}, are no schedule known here")
