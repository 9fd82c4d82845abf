"""A diffusers folder of SD 1.x or 2.x ↔ our parts.

Sizes and settings come from its ``config.json`` files. A setting that this code does not know, or knows only at another
value, is refused: what it would change is unknown.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from ldm.autoencoder import Autoencoder
from ldm.checkpoint import Contents, check_finite
from ldm.convert.names import DIFFUSERS, facts, naming
from ldm.convert.tensors import PICKLES, SD_SCALE, Source, build, open_pickle, open_safetensors, read_json
from ldm.convert.tokenizer import has_tokenizer, read_tokenizer, write_tokenizer
from ldm.diffusion import Flow, Schedule
from ldm.pipeline import LatentDiffusion
from ldm.text import TextEncoder, clip_tokenizer
from ldm.unet import UNet

INDEX = "model_index.json"
_FOLDERS = {"unet": "unet", "autoencoder": "vae", "text_encoder": "text_encoder"}
_FACTS = facts("diffusers")
_STEMS, _CLASSES, _PREDICTIONS = _FACTS["stems"], _FACTS["classes"], _FACTS["predictions"]
_BEGIN_AT_LINSPACE = ("Euler", "LMS", "Heun", "DPM", "KDPM", "UniPC", "DEIS")  # where a config is silent


def _fixed(part: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a part that have one value here, some of them by our arguments."""
    fixed: dict[str, Any] = _FACTS[part]["fixed"]
    if part == "text_encoder":
        return fixed | {"intermediate_size": 4 * arguments["width"]}
    if part == "scheduler":
        return fixed
    if part == "unet":
        downs = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in arguments["attention"]]
    else:
        downs = ["DownEncoderBlock2D" for _ in arguments["widths"]]
    ups = [kind.replace("Down", "Up").replace("Encoder", "Decoder") for kind in reversed(downs)]
    return fixed | {"down_block_types": downs, "up_block_types": ups}


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


def _arguments(path: Path, config: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Arguments of ours; settings that are unknown, or known at one value alone and set to another, are refused."""
    names, free = _FACTS[part]["renamed"], _FACTS[part].get("free", config)
    arguments = {ours: config[key] for key, ours in names.items() if key in config or key not in _FACTS["optional"]}
    if part == "unet":
        arguments["attention"] = [kind == "CrossAttnDownBlock2D" for kind in config["down_block_types"]]
    fixed = _fixed(part, arguments)
    for key, value in config.items():
        known = value == fixed[key] if key in fixed else key in names or key in free or value in (None, False)
        if not known and not key.startswith("_"):
            rule = f"the rule is {fixed[key]}" if key in fixed else "that setting is unknown here"
            raise ValueError(f"{path}: {key}={value!r}, {rule}; this model cannot be loaded")
    return arguments


def _unet(folder: Path, config: Mapping[str, Any], source: Source) -> UNet:
    return build(UNet, _arguments(folder, config, "unet"), source, DIFFUSERS)


def _autoencoder(folder: Path, config: Mapping[str, Any], source: Source) -> Autoencoder:
    old = re.compile(r"(?<=\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)")
    source = source.renamed(lambda name: old.sub(lambda found: _FACTS["old_attention"][found[0]], name))
    scale = config.get("scaling_factor", SD_SCALE)
    return build(Autoencoder, _arguments(folder, config, "vae"), source, DIFFUSERS, scale=scale)


def _text_encoder(folder: Path, config: Mapping[str, Any], source: Source) -> TextEncoder:
    """CLIP's tower; a whole CLIP's pictures half is left where it is."""
    ignored = r"embeddings\.position_ids"
    if config.get("model_type") == "clip":
        config = config["text_config"]
        ignored += r"|vision_model\..*|(text|visual)_projection\.weight|logit_scale"
    arguments = _arguments(folder, config, "text_encoder") | {"family": "clip", "tokenizer": clip_tokenizer()}
    beside = folder if has_tokenizer(folder) else folder.parent / "tokenizer"
    if has_tokenizer(beside) or (folder.parent / INDEX).is_file():  # a tower alone may come without one
        arguments["tokenizer"], arguments["pad_token"] = read_tokenizer(beside)
    bare = source.renamed(lambda name: name.removeprefix("text_model."))
    return build(TextEncoder, arguments, bare, DIFFUSERS, ignored=ignored)


def _scheduler(path: Path) -> dict[str, Any]:
    """Schedule, prediction and grid."""
    config = read_json(path)
    schedule = Schedule(**_arguments(path, config, "scheduler"))
    kind, said = str(config.get("_class_name")), config.get("prediction_type", "epsilon")
    grid = config.get("timestep_spacing", "linspace" if kind.startswith(_BEGIN_AT_LINSPACE) else "leading")
    # StableDiffusionPipeline takes an offset of 0 for 1 and clip_sample=true for false, and so do we: both are known
    # faults of old folders, and mean nothing for latents.
    for key, value, known in (
        ("prediction_type", said, _PREDICTIONS),
        ("timestep_spacing", grid, ("leading", "trailing", "linspace")),
        ("timestep_type", config.get("timestep_type", "discrete"), ("discrete",)),
        ("steps_offset", str(config.get("steps_offset", 0)), ("0", "1")),
    ):
        if value not in known:
            raise ValueError(f"{path}: {key}={value}; known are {', '.join(known)}")
    clean = config.get("set_alpha_to_one", kind == "DDIMScheduler")
    if kind in ("DDIMScheduler", "PNDMScheduler") and clean != (grid != "leading"):
        came = f"set_alpha_to_one={clean} with timestep_spacing={grid}"
        raise ValueError(f"{path}: {came}; leading grids end at the first step here, others at a clean image: say so")
    return {"prediction": _PREDICTIONS[said], "schedule": schedule.arguments, "grid": grid}


# ------------------------------------------------------------------------------------------------------ ours → theirs


def export_diffusers(model: LatentDiffusion, path: str | Path) -> None:
    """Write a folder that ``StableDiffusionPipeline.from_pretrained`` opens, and rename it when it is whole.

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
    if model.prediction == "flow" or isinstance(model.schedule, Flow):
        faults.append("it was trained by flow matching, and the format's schedules are variance-preserving")
    if model.unet.arguments["pooled_text"]:
        faults.append("its UNet embeds the pooled text (pooled_text), and the format's pipeline gives it none")
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
    parts = {folder: getattr(model, name) for name, folder in _FOLDERS.items()} | {"scheduler": model.schedule}
    defaults, heads = model.defaults, model.unet.arguments["num_heads"]
    height, width = defaults.height // 8, defaults.width // 8
    std = model.autoencoder.latent_std[0].cpu()
    # The shortest decimal that gives the same standard deviation again: 0.18215, not 0.18214999.
    decimals = (float(f"{1.0 / std.item():.{digits}g}") for digits in range(1, 18))
    others: dict[str, dict[str, Any]] = {  # what is no argument of ours
        "unet": {
            "attention_head_dim": heads[0] if len({*heads}) == 1 else heads,
            "sample_size": height if height == width else [height, width],
        },
        "vae": {
            "scaling_factor": next(scale for scale in decimals if torch.tensor(1.0 / scale, dtype=std.dtype) == std),
            "sample_size": defaults.height,
        },
        "text_encoder": {"model_type": "clip_text_model"},
        "scheduler": {
            "prediction_type": {ours: theirs for theirs, ours in _PREDICTIONS.items()}[model.prediction],
            "timestep_spacing": defaults.grid,
            "set_alpha_to_one": defaults.grid != "leading",
            "steps_offset": 1,
            "clip_sample": False,
        },
    }
    inpaints = model.unet.in_channels != model.autoencoder.latent_channels
    kind = "StableDiffusionInpaintPipeline" if inpaints else "StableDiffusionPipeline"
    files = {INDEX: {"_class_name": kind, **_FACTS["index"], **_CLASSES}}
    for part, ours in parts.items():
        library, kind = _CLASSES[part]
        version = {"_diffusers_version": _FACTS["index"]["_diffusers_version"]}
        head = {"_class_name": kind, **version} if library == "diffusers" else {"architectures": [kind]}
        said = {theirs: ours.arguments[name] for theirs, name in _FACTS[part]["renamed"].items()}
        file = f"{part}/{'scheduler_' if part == 'scheduler' else ''}config.json"
        files[file] = head | said | _fixed(part, ours.arguments) | others[part]
    return files
