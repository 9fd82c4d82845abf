"""A CompVis single file of SD 1.x or 2.x → our parts. What the file does not say is in the rules named below.

A single file holds tensors and no settings. Sizes are read from the shapes; the rest is the family's convention: SD 1.x
has 1×1 convolutions around its attention and 8 heads, SD 2.x linear maps and heads of 64. A ``.yaml`` of the same name
beside the file overrides what it says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from ldm.autoencoder import Autoencoder
from ldm.checkpoint import Contents
from ldm.convert.names import autoencoder_names, from_open_clip, renaming, tower, unet_names
from ldm.convert.tensors import Shape, Source, fill
from ldm.diffusion import Schedule
from ldm.text import TextEncoder, clip_tokenizer
from ldm.unet import UNet

UNET, VAE, TEXT, EMA = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "model_ema."
CLIP, OPEN_CLIP = "transformer.", "model."  # under TEXT
SD_SCHEDULE = {"name": "scaled_linear", "num_steps": 1000, "beta_start": 0.00085, "beta_end": 0.012}
SD_SCALE = 0.18215  # 1 / standard deviation of SD's raw latents
HEAD_DIM = 64  # of CLIP's towers, and of SD 2.x's UNet

# What training leaves in a file and no model needs; a closed list, everything else is refused.
_LEFTOVERS = (
    r"betas|(log_one_minus_|sqrt_|sqrt_one_minus_|sqrt_recip_|sqrt_recipm1_)?alphas_cumprod(_prev)?|logvar|lvlb_weights"
    r"|posterior_(variance|log_variance_clipped|mean_coef[12])|v_pred|ztsnr|scale_factor"
)
_EMA_LEFTOVERS = r"decay|num_updates"
_VAE_LEFTOVERS = r"loss\..*|model_ema\..*"
_CLIP_LEFTOVERS = r"embeddings\.position_ids|text_projection(\.weight)?|logit_scale"
_OPEN_CLIP_LEFTOVERS = r"text_projection|logit_scale|attn_mask"
_OTHER_FAMILIES = {  # the beginning of a name → whose it is
    "conditioner.embedders.": "SDXL",
    "model.diffusion_model.label_emb.": "a class-conditional model (SDXL, unCLIP)",
    "model.diffusion_model.joint_blocks.": "SD 3",
    "model.diffusion_model.double_blocks.": "Flux",
    "double_blocks.": "Flux",
    "joint_blocks.": "SD 3",
    "control_model.": "ControlNet",
    "lora_": "a LoRA",
    "noise_estimator.": "an upscaler",
    "depth_model.": "SD 2 depth",
}


def read(source: Source, weights: str, prediction: str | None, only: tuple[str, ...] | None) -> Contents:
    """The parts and settings of a single file.

    Args:
        source: its tensors.
        weights: ``"ema"`` takes the UNet's averaged weights where there are some, ``"raw"`` never.
        prediction: ``"epsilon"``, ``"v"`` or ``"x0"`` where the caller knows.
        only: names of components; None takes all.

    Raises:
        ValueError: for another family of models, and for tensors that do not fit.
    """
    for prefix, family in _OTHER_FAMILIES.items():
        if any(name.startswith(prefix) for name in source.shapes):
            raise ValueError(f"{source.label} is {family}, by its {prefix}*; SD 1.x and 2.x are what can be loaded")
    config = _yaml(source)
    whole = any(name.startswith(UNET) for name in source.shapes)
    if not whole and only is None:
        raise ValueError(f"{source.label} holds no {UNET}*, so it is no whole model; for a part of one use "
                         "ldm.load_autoencoder or ldm.load_text_encoder")  # fmt: skip
    components: dict[str, nn.Module] = {}
    if only is None or "unet" in only:
        components["unet"] = read_unet(source, weights, config)
    if only is None or "autoencoder" in only:
        components["autoencoder"] = read_autoencoder(source.under(VAE) if whole else source, config)
    if only is None or "text_encoder" in only:
        components["text_encoder"] = read_text_encoder(source)
    if only is not None:
        return Contents(components)
    parts = (UNET, VAE, f"{TEXT}{CLIP}", f"{TEXT}{OPEN_CLIP}", EMA)
    ignored = re.compile(rf"{_LEFTOVERS}|{TEXT}(logit_scale|text_projection)")
    odd = sorted(name for name in source.shapes if not name.startswith(parts) and not ignored.fullmatch(name))
    if odd:
        raise ValueError(f"{source.label} holds what no SD 1.x or 2.x has: unexpected {'; '.join(odd[:20])}")
    unet = components["unet"]
    assert isinstance(unet, UNet)
    kind = prediction or _prediction(source, config, unet)
    size = 768 if unet.arguments["linear_projections"] and kind == "v" else 512
    settings = {
        "prediction": kind,
        "schedule": _schedule(source, config),
        "grid": "leading",
        "guidance_scale": 7.5,
        "height": size,
        "width": size,
    }
    return Contents(components, settings=settings)


def read_unet(source: Source, weights: str, config: Mapping[str, Any]) -> UNet:
    """The UNet, whose sizes are those of its tensors."""
    raw = source.under(UNET)
    arguments = _sized("UNet", source, lambda: _unet_arguments(raw.shapes, config))
    with torch.device("meta"):
        unet = UNet(**arguments)
    names = renaming(unet_names(len(arguments["widths"]), arguments["num_blocks"], arguments["attention"]), 1)
    averaged = source.under(EMA)
    if weights == "ema" and averaged.shapes:
        # CompVis' averages are buffers, whose names may hold no dots.
        flat = "diffusion_model{}".format
        fill(unet, averaged, lambda name: flat(names(name).replace(".", "")), ignored=_EMA_LEFTOVERS)
    else:
        fill(unet, raw, names)
    return unet


def read_autoencoder(source: Source, config: Mapping[str, Any] | None = None) -> Autoencoder:
    """The autoencoder, from tensors named as CompVis names a whole one (``encoder.*``, ``quant_conv.*``)."""
    arguments = _sized("autoencoder", source, lambda: _autoencoder_arguments(source.shapes))
    with torch.device("meta"):
        autoencoder = Autoencoder(**arguments)
    names = renaming(autoencoder_names(len(arguments["widths"]), arguments["num_blocks"]), 1)
    scale = float((config or {}).get("scale_factor", SD_SCALE))
    own = latent_scale(arguments["latent_channels"], scale)
    fill(autoencoder, source, names, own, _VAE_LEFTOVERS, pointwise=True)  # its attention is one
    return autoencoder


def latent_scale(channels: int, scale: float) -> dict[str, Tensor]:
    """Our buffers for a scale that all channels share, z = scale · m."""
    return {"latent_mean": torch.zeros(channels), "latent_std": torch.full((channels,), 1.0 / scale)}


def read_text_encoder(source: Source) -> TextEncoder:
    """CLIP's tower as SD 1.x holds it, or OpenCLIP's as SD 2.x does, with the vocabulary that comes with us."""
    tensors, open_clip = source.under(f"{TEXT}{CLIP}"), source.under(f"{TEXT}{OPEN_CLIP}")
    if open_clip.shapes:
        tensors = _sized("text tower", source, lambda: _from_open_clip(open_clip))
    tensors = tensors.renamed(lambda name: name.removeprefix("text_model."))
    arguments = _sized("text tower", source, lambda: _text_arguments(tensors.shapes))
    if open_clip.shapes:
        arguments |= {"activation": "gelu", "pad_token": 0}
    with torch.device("meta"):
        text = TextEncoder("clip", clip_tokenizer(), **arguments)
    fill(text, tensors, tower, ignored=_CLIP_LEFTOVERS)
    return text


# ------------------------------------------------------------------------------------------------- what tensors tell


def _sized(what: str, source: Source, read_sizes: Callable[[], Any]) -> Any:
    try:
        return read_sizes()
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{source.label} holds no {what} of SD 1.x or 2.x ({error} is missing or odd)") from error


def _unet_arguments(shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {int(match[1]) for name in shapes if (match := re.match(r"input_blocks\.(\d+)\.", name))}
    downs = sorted(k for k in numbers if f"input_blocks.{k}.0.op.weight" in shapes)
    num_levels = len(downs) + 1
    num_blocks = (downs[0] if downs else len(numbers)) - 1
    firsts = [1 + level * (num_blocks + 1) for level in range(num_levels)]
    widths = [shapes[f"input_blocks.{k}.0.in_layers.2.weight"][0] for k in firsts]
    linear = len(shapes["middle_block.1.proj_in.weight"]) == 2
    heads: int | list[int] = [width // HEAD_DIM for width in widths] if linear else 8
    settings = config.get("unet", {})
    if settings.get("num_head_channels", -1) != -1:
        heads = [width // int(settings["num_head_channels"]) for width in widths]
    elif settings.get("num_heads", -1) != -1:
        heads = int(settings["num_heads"])
    return {
        "widths": widths,
        "attention": [f"input_blocks.{k}.1.proj_in.weight" in shapes for k in firsts],
        "num_blocks": num_blocks,
        "num_heads": heads,
        "context_dim": shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "linear_projections": linear,
    }


def _autoencoder_arguments(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    levels = {int(match[1]) for name in shapes if (match := re.match(r"encoder\.down\.(\d+)\.", name))}
    blocks = {int(match[1]) for name in shapes if (match := re.match(r"encoder\.down\.0\.block\.(\d+)\.", name))}
    return {
        "widths": [shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in sorted(levels)],
        "num_blocks": len(blocks),
        "latent_channels": shapes["post_quant_conv.weight"][0],
    }


def _text_arguments(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    layers = {int(match[1]) for name in shapes if (match := re.match(r"encoder\.layers\.(\d+)\.", name))}
    vocab_size, width = shapes["embeddings.token_embedding.weight"]
    if width % HEAD_DIM:
        raise ValueError(f"a width of {width}")
    return {
        "width": width,
        "num_layers": len(layers),
        "num_heads": width // HEAD_DIM,
        "vocab_size": vocab_size,
    }


def _from_open_clip(source: Source) -> Source:
    """OpenCLIP's tensors under transformers' names, without the last layer, which SD 2.x does not run."""
    numbers = {int(match[1]) for name in source.shapes if (match := re.match(r"transformer\.resblocks\.(\d+)\.", name))}
    unused = f"transformer.resblocks.{max(numbers)}."
    places: dict[str, tuple[str, int, int]] = {}  # their name, which part of it, of how many
    for name in source.shapes:
        if name.startswith(unused) or re.fullmatch(_OPEN_CLIP_LEFTOVERS, name):
            continue
        parts = from_open_clip(name)
        places |= {part: (name, i, len(parts)) for i, part in enumerate(parts)}
    shapes = {}
    for part, (name, _, count) in places.items():
        first, *rest = source.shapes[name]
        shapes[part] = (first // count, *rest)

    def read(part: str) -> Tensor:
        name, i, count = places[part]
        # A copy of its own: the three must not share memory, or they could not be saved apart.
        return source.read(name).chunk(count)[i].clone() if count > 1 else source.read(name)

    return replace(source, shapes=shapes, read=read)


# ------------------------------------------------------------------------------------------- what is beside the tensors


def _yaml(source: Source) -> dict[str, Any]:
    """Settings from the ``.yaml`` of the same name, if there is one; CompVis' keys, made flat."""
    path = Path(source.label).with_suffix(".yaml")
    if not path.is_file():
        return {}
    try:
        params = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["params"]
        unet = params.get("unet_config", {}).get("params", {})
        keys = ("parameterization", "linear_start", "linear_end", "timesteps", "scale_factor", "beta_schedule")
        return {"path": path, "unet": unet} | {key: params[key] for key in keys if key in params}
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no config of a CompVis model ({type(error).__name__}: {error})") from error


def _prediction(source: Source, config: Mapping[str, Any], unet: UNet) -> str:
    """What the UNet predicts, as far as anything says so.

    Raises:
        ValueError: for SD 2.x where nothing does: its ε and its v models differ in no tensor's shape.
    """
    said = config.get("parameterization") or source.notes.get("modelspec.prediction_type")
    if said is None and "v_pred" in source.shapes:
        said = "v"  # an empty tensor of this name is how some programs mark such a file
    if said is not None:
        kinds = {"eps": "epsilon", "epsilon": "epsilon", "v": "v", "x0": "x0"}
        if said not in kinds:
            raise ValueError(f"{source.label}: its prediction is said to be {said!r}; known are {', '.join(kinds)}")
        return kinds[said]
    if not unet.arguments["linear_projections"]:
        return "epsilon"  # all of SD 1.x
    raise ValueError(
        f"{source.label} is of the family of SD 2.x, whose epsilon and v models look the same; put its .yaml beside "
        f"it, or say which: ldm convert {source.label} OUT prediction=v (768 pixels) or prediction=epsilon (512)"
    )


def _schedule(source: Source, config: Mapping[str, Any]) -> dict[str, Any]:
    """The noise schedule: that of the yaml, or of the file's own betas, or SD's."""
    if config.get("beta_schedule", "linear") != "linear":
        raise ValueError(f"{config['path']}: beta_schedule={config['beta_schedule']} is unknown; the rule is linear")
    # What CompVis calls linear is linear in √β.
    schedule = SD_SCHEDULE | {
        ours: config[theirs]
        for ours, theirs in (("num_steps", "timesteps"), ("beta_start", "linear_start"), ("beta_end", "linear_end"))
        if theirs in config
    }
    if "ztsnr" in source.shapes:  # how some programs mark a model that was trained with no image left at the end
        return schedule | {"zero_terminal": True}
    if "betas" not in source.shapes:
        return schedule
    betas = source.read("betas").double().flatten().numpy()
    ends = {"num_steps": len(betas), "beta_start": float(f"{betas[0]:.6g}"), "beta_end": float(f"{betas[-1]:.6g}")}
    for known in (schedule, SD_SCHEDULE | ends, SD_SCHEDULE | ends | {"name": "linear"}):
        alpha_bar = Schedule(**known).alpha_bar.numpy()  # type: ignore[arg-type]
        expected = 1.0 - alpha_bar / np.concatenate([[1.0], alpha_bar[:-1]])
        # Half precision keeps three digits of a beta.
        if len(expected) == len(betas) and np.allclose(betas, expected, rtol=2e-3, atol=0.0):
            return known
    raise ValueError(f"{source.label}: its betas, {betas[0]:.3g} to {betas[-1]:.3g}, are no schedule known here")
