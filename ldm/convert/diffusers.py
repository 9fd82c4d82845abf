"""A diffusers folder of SD 1.x or 2.x ↔ our parts.

Sizes and settings come from its ``config.json`` files. A setting that this code does not know, or knows only at another
value, is refused: what it would change is unknown.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Mapping
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from torch import nn

from ldm.autoencoder import Autoencoder
from ldm.checkpoint import Contents, check_finite
from ldm.convert.names import DIFFUSERS, naming
from ldm.convert.tensors import PICKLES, SD_SCALE, Source, build, open_safetensors, read_json
from ldm.convert.tokenizer import has_tokenizer, read_tokenizer, write_tokenizer
from ldm.convert.unpickle import open_pickle
from ldm.diffusion import Schedule
from ldm.pipeline import LatentDiffusion
from ldm.text import TextEncoder, clip_tokenizer
from ldm.unet import UNet

INDEX = "model_index.json"
_FOLDERS = {"unet": "unet", "autoencoder": "vae", "text_encoder": "text_encoder"}
# Facts of the format, and what each setting of theirs is here.
_FACTS: dict[str, Any] = yaml.safe_load((resources("ldm") / "assets" / "diffusers.yaml").read_text())
_STEMS, _CLASSES, _PREDICTIONS = _FACTS["stems"], _FACTS["classes"], _FACTS["predictions"]
_UNET, _VAE, _TEXT, _SCHEDULE = _FACTS["unet"], _FACTS["vae"], _FACTS["text"], _FACTS["schedule"]
_BEGIN_AT_LINSPACE = ("Euler", "LMS", "Heun", "DPM", "KDPM", "UniPC", "DEIS")  # where a config is silent
# A config may leave these out: what our constructors take then is what theirs do.
_OPTIONAL = {*_SCHEDULE, "attention_head_dim", "dropout", "use_linear_projection", "hidden_act"}


def _unet_fixed(attention: list[bool]) -> dict[str, Any]:
    downs = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in attention]
    ups = [kind.replace("Down", "Up") for kind in reversed(downs)]
    return _UNET["fixed"] | {"down_block_types": downs, "up_block_types": ups}


def _vae_fixed(levels: int) -> dict[str, Any]:
    downs, ups = ["DownEncoderBlock2D"] * levels, ["UpDecoderBlock2D"] * levels
    return _VAE["fixed"] | {"down_block_types": downs, "up_block_types": ups}


def _text_fixed(width: int) -> dict[str, Any]:
    return {"intermediate_size": 4 * width, "max_position_embeddings": 77, "layer_norm_eps": 1e-5}


# ------------------------------------------------------------------------------------------------------ theirs → ours


def read(folder: Path, weights: str, only: tuple[str, ...] | None, pickles: bool) -> tuple[Contents, tuple[Path, ...]]:
    """The parts and settings of a folder with a ``model_index.json``, and the files they came from."""
    index = read_json(folder / INDEX)
    for name, part in index.items():
        if isinstance(part, list) and any(part) and name not in (*_CLASSES, "safety_checker", "feature_extractor"):
            family = f"{folder} is a {index.get('_class_name')}, by its part {name!r}"
            raise ValueError(f"{family}; SD 1.x and 2.x are what can be loaded")
    components: dict[str, nn.Module] = {}
    files: tuple[Path, ...] = ()
    for name in only or _FOLDERS:
        components[name], found = read_part(folder / _FOLDERS[name], name, weights, pickles)
        files += found
    if only is not None:
        return Contents(components), files
    scheduler = folder / "scheduler/scheduler_config.json"
    size = read_json(folder / "unet/config.json").get("sample_size") or 64
    height, width = (8 * side for side in (size if isinstance(size, list) else (size, size)))
    settings = _scheduler(scheduler) | {"guidance_scale": 7.5, "height": height, "width": width}
    return Contents(components, settings=settings), (*files, scheduler)


def read_part(folder: Path, name: str, weights: str, pickles: bool) -> tuple[nn.Module, tuple[Path, ...]]:
    """One component from its own folder, and the files it came from."""
    config = read_json(folder / "config.json")
    source = _weights(folder, _STEMS[_FOLDERS[name]], weights, pickles)
    reader = {"unet": _unet, "autoencoder": _autoencoder, "text_encoder": _text_encoder}[name]
    return reader(folder, config, source), source.files


def _weights(folder: Path, stem: str, weights: str, pickles: bool) -> Source:
    """The tensors of a part: whole precision before half; one file before shards."""
    for variant in (*(("", ".non_ema") if weights == "ema" else (".non_ema", "")), ".fp16"):
        if (path := folder / f"{stem}{variant}.safetensors").is_file():
            return open_safetensors(path)
        # Both orders of the words are in use.
        for name in (f"{stem}{variant}.safetensors.index.json", f"{stem}.safetensors.index{variant}.json"):
            if (folder / name).is_file():
                listed = sorted({Path(shard).name for shard in read_json(folder / name)["weight_map"].values()})
                if missing := [shard for shard in listed if not (folder / shard).is_file()]:
                    raise ValueError(f"{folder / missing[0]} is missing, though {name} lists it; fetch it again")
                return open_safetensors(*(folder / shard for shard in listed))
    whole = "pytorch_model.bin" if stem == "model" else f"{stem}.bin"
    found = sorted(path for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles and found:
        return open_pickle(folder / whole if folder / whole in found else found[0])
    remedy = f"it holds pickles ({found[0].name}); use ldm convert" if found else "the folder is incomplete"
    raise ValueError(f"{folder} holds no {stem}.safetensors, nor its fp16 variant or shards: {remedy}")


def _arguments(
    folder: Path, config: Mapping[str, Any], names: Mapping[str, str], fixed: Mapping[str, Any], free: Collection[str]
) -> dict[str, Any]:
    """Arguments of ours; settings that are unknown, or known at one value alone and set to another, are refused."""
    for key, value in config.items():
        known = value == fixed[key] if key in fixed else key in names or key in free or value in (None, False)
        if not known and not key.startswith("_"):
            rule = f"the rule is {fixed[key]}" if key in fixed else "that setting is unknown here"
            raise ValueError(f"{folder}: {key}={value!r}, {rule}; this model cannot be loaded")
    return {ours: config[key] for key, ours in names.items() if key in config or key not in _OPTIONAL}


def _unet(folder: Path, config: Mapping[str, Any], source: Source) -> UNet:
    attention = [kind == "CrossAttnDownBlock2D" for kind in config["down_block_types"]]
    arguments = _arguments(folder, config, _UNET["renamed"], _unet_fixed(attention), _UNET["free"])
    return build(UNet, arguments | {"attention": attention}, source, DIFFUSERS)


def _autoencoder(folder: Path, config: Mapping[str, Any], source: Source) -> Autoencoder:
    arguments = _arguments(folder, config, _VAE["renamed"], _vae_fixed(len(config["block_out_channels"])), _VAE["free"])
    old = re.compile(r"(?<=\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)")
    source = source.renamed(lambda name: old.sub(lambda found: _FACTS["old_attention"][found[0]], name))
    return build(Autoencoder, arguments, source, DIFFUSERS, scale=config.get("scaling_factor", SD_SCALE))


def _text_encoder(folder: Path, config: Mapping[str, Any], source: Source) -> TextEncoder:
    """CLIP's tower; a whole CLIP's pictures half is left where it is."""
    ignored = r"embeddings\.position_ids"
    if config.get("model_type") == "clip":
        config = config["text_config"]
        ignored += r"|vision_model\..*|(text|visual)_projection\.weight|logit_scale"
    # transformers keeps many a setting here that a tower does not have: all others are free.
    arguments = _arguments(folder, config, _TEXT, _text_fixed(config["hidden_size"]), config.keys())
    beside = folder if has_tokenizer(folder) else folder.parent / "tokenizer"
    arguments |= {"family": "clip", "tokenizer": clip_tokenizer()}
    if has_tokenizer(beside) or (folder.parent / INDEX).is_file():  # a tower alone may come without one
        arguments["tokenizer"], arguments["pad_token"] = read_tokenizer(beside)
    bare = source.renamed(lambda name: name.removeprefix("text_model."))
    return build(TextEncoder, arguments, bare, DIFFUSERS, ignored=ignored)


def _scheduler(path: Path) -> dict[str, Any]:
    """Schedule, prediction and grid."""
    config = read_json(path)
    schedule = Schedule(**_arguments(path, config, _SCHEDULE, {"timestep_type": "discrete"}, _FACTS["scheduler_free"]))
    kind, said = str(config.get("_class_name")), config.get("prediction_type", "epsilon")
    grid = config.get("timestep_spacing", "linspace" if kind.startswith(_BEGIN_AT_LINSPACE) else "leading")
    # StableDiffusionPipeline takes an offset of 0 for 1 and clip_sample=true for false, and so do we: both are known
    # faults of old folders, and mean nothing for latents.
    offset, grids = str(config.get("steps_offset", 0)), ("leading", "trailing", "linspace")
    known = {"prediction_type": (said, _PREDICTIONS), "timestep_spacing": (grid, grids), "steps_offset": (offset, "01")}
    for key, (value, values) in known.items():
        if value not in values:
            raise ValueError(f"{path}: {key}={value}; known are {', '.join(values)}")
    clean = config.get("set_alpha_to_one", kind == "DDIMScheduler")
    if kind in ("DDIMScheduler", "PNDMScheduler") and clean != (grid != "leading"):
        came = f"set_alpha_to_one={clean} with timestep_spacing={grid}"
        raise ValueError(f"{path}: {came}; leading grids end at the first step here, others at a clean image: say so")
    return {"prediction": _PREDICTIONS[said], "schedule": schedule.arguments, "grid": grid}


# ------------------------------------------------------------------------------------------------------ ours → theirs


def export_diffusers(model: LatentDiffusion, path: str | Path) -> None:
    """Write a folder that ``StableDiffusionPipeline.from_pretrained`` opens, and rename it when it is whole.

    Args:
        model: with CLIP's text tower and an autoencoder like SD's.
        path: of a folder that does not exist yet.

    Raises:
        ValueError: if the folder exists, a weight is not finite, or the format cannot hold the model.
    """
    target = Path(path)
    if target.exists():
        raise ValueError(f"{target} exists; name a folder that does not")
    _check(model)
    text, part = model.text_encoder, target.with_name(f".{target.name}.partial")
    shutil.rmtree(part, ignore_errors=True)
    try:
        for file, config in _configs(model).items():
            (part / file).parent.mkdir(parents=True, exist_ok=True)
            (part / file).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name, folder in _FOLDERS.items():
            module = getattr(model, name)
            theirs, prefix = naming(module, DIFFUSERS), "text_model." if module is text else ""
            tensors = {prefix + theirs(key): value.detach().cpu().contiguous()
                       for key, value in module.state_dict().items() if not key.startswith("latent_")}  # fmt: skip
            check_finite(tensors, folder)
            safetensors.torch.save_file(tensors, part / folder / f"{_STEMS[folder]}.safetensors", {"format": "pt"})
        write_tokenizer(part / "tokenizer", text.tokenizer_json, text.pad_token)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@torch.no_grad()
def _check(model: LatentDiffusion) -> None:
    """Refuse what the format cannot hold."""
    autoencoder, text, faults = model.autoencoder, model.text_encoder, []
    if text.family != "clip":
        faults.append(f"its text tower is {text.family}, and the format's is CLIP")
    if autoencoder.stem != 1:
        faults.append(f"its autoencoder has a stem of {autoencoder.stem}, and the format's has 1")
    if autoencoder.latent_mean.any() or (autoencoder.latent_std != autoencoder.latent_std[0]).any():
        faults.append("its latents are shifted or scaled a channel, and the format has one scale and no shift")
    if text.family == "clip":
        empty = text([""])[0]
        # Half precision rounds a hidden state by about 0.002.
        if (model.null_context.to(empty) - empty).abs().max() > 1e-2 * empty.abs().max():
            faults.append("the empty prompt of its training is not that of its text tower, and the format keeps none")
    if faults:
        raise ValueError(f"a diffusers folder cannot hold this model: {'; '.join(faults)}; model.save keeps all of it")


def _configs(model: LatentDiffusion) -> dict[str, dict[str, Any]]:
    """The files of settings and what they hold."""
    unet, vae, text = model.unet.arguments, model.autoencoder.arguments, model.text_encoder.arguments
    schedule, defaults, heads = model.schedule.arguments, model.defaults, unet["num_heads"]
    height, width = defaults.height // 8, defaults.width // 8
    std = model.autoencoder.latent_std[0].cpu()
    # The shortest decimal that gives the same standard deviation again: 0.18215, not 0.18214999.
    decimals = (float(f"{1.0 / std.item():.{digits}g}") for digits in range(1, 18))
    parts: dict[str, tuple[dict[str, Any], dict[str, str], dict[str, Any]]] = {
        "unet": (unet, _UNET["renamed"], _unet_fixed(unet["attention"]) | {
            "attention_head_dim": heads[0] if len({*heads}) == 1 else heads,
            "sample_size": height if height == width else [height, width],
        }),
        "vae": (vae, _VAE["renamed"], _vae_fixed(len(vae["widths"])) | {
            "scaling_factor": next(scale for scale in decimals if torch.tensor(1.0 / scale, dtype=std.dtype) == std),
            "sample_size": defaults.height,
        }),
        "text_encoder": (text, _TEXT, _text_fixed(text["width"]) | {"model_type": "clip_text_model"}),
        "scheduler": (schedule, _SCHEDULE, {
            "prediction_type": {ours: theirs for theirs, ours in _PREDICTIONS.items()}[model.prediction],
            "timestep_spacing": defaults.grid,
            "set_alpha_to_one": defaults.grid != "leading",
            "steps_offset": 1,
            "clip_sample": False,
        }),
    }  # fmt: skip
    inpaints = model.unet.in_channels != model.autoencoder.latent_channels
    kind = "StableDiffusionInpaintPipeline" if inpaints else "StableDiffusionPipeline"
    none = {name: [None, None] for name in ("safety_checker", "feature_extractor", "image_encoder")}
    version = {"_diffusers_version": "0.42.1"}  # whose settings these are
    files = {INDEX: {"_class_name": kind, "requires_safety_checker": False, **version, **_CLASSES, **none}}
    for folder, (arguments, names, others) in parts.items():
        library, kind = _CLASSES[folder]
        head = {"_class_name": kind, **version} if library == "diffusers" else {"architectures": [kind]}
        file = f"{folder}/{'scheduler_' if folder == 'scheduler' else ''}config.json"
        files[file] = head | {theirs: arguments[ours] for theirs, ours in names.items()} | others
    return files
