"""Our model → a diffusers folder that ``StableDiffusionPipeline.from_pretrained`` opens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ldm.checkpoint import check_finite
from ldm.convert.names import autoencoder_names, renaming, tower, unet_names
from ldm.convert.tokenizer import write_tokenizer
from ldm.pipeline import LatentDiffusion
from ldm.text import TextEncoder

_VERSION = "0.42.1"  # of diffusers, whose settings these are
_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}


def export_diffusers(model: LatentDiffusion, path: str | Path) -> None:
    """Write a diffusers folder beside its target, and rename it when it is whole.

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
    part = target.with_name(f".{target.name}.partial")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        u, a = model.unet.arguments, model.autoencoder.arguments
        tensors = _tensors(model.unet, unet_names(len(u["widths"]), u["num_blocks"], u["attention"]))
        _write_part(part / "unet", "diffusion_pytorch_model", _unet(model), tensors)
        tensors = _tensors(model.autoencoder, autoencoder_names(len(a["widths"]), a["num_blocks"]))
        _write_part(part / "vae", "diffusion_pytorch_model", _vae(model), tensors)
        # Older releases of transformers ask for the prefix, newer ones take it.
        tensors = {f"text_model.{tower(name)}": t for name, t in model.text_encoder.state_dict().items()}
        _write_part(part / "text_encoder", "model", _text(model.text_encoder), tensors)
        write_tokenizer(part / "tokenizer", model.text_encoder.tokenizer_json, model.text_encoder.pad_token)
        _json(part / "scheduler/scheduler_config.json", _scheduler(model))
        _json(part / "model_index.json", _index(model))
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@torch.no_grad()
def _check(model: LatentDiffusion) -> None:
    """Refuse what the format cannot hold."""
    autoencoder, text = model.autoencoder, model.text_encoder
    std = autoencoder.latent_std
    faults = []
    if text.family != "clip":
        faults.append(f"its text tower is {text.family}, and the format's is CLIP")
    if autoencoder.stem != 1:
        faults.append(f"its autoencoder has a stem of {autoencoder.stem}, and the format's has 1")
    if autoencoder.latent_mean.any() or (std != std[0]).any():
        faults.append("its latents are shifted or scaled a channel, and the format has one scale and no shift")
    if text.family == "clip":
        empty = text([""])[0]
        error = (model.null_context.to(empty) - empty).abs().max()
        # Half precision rounds a hidden state by about 0.002.
        if error > 1e-2 * empty.abs().max():
            faults.append("the empty prompt of its training is not that of its text tower, and the format keeps none")
    if faults:
        raise ValueError(f"a diffusers folder cannot hold this model: {'; '.join(faults)}; model.save keeps all of it")


def _write_part(folder: Path, stem: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    check_finite(tensors, str(folder.name))
    folder.mkdir()
    _json(folder / "config.json", config)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(plain, folder / f"{stem}.safetensors", {"format": "pt"})


def _json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _tensors(module: nn.Module, rows: list[tuple[str, str, str]]) -> dict[str, Tensor]:
    names = renaming(rows, 2)
    held = module.state_dict().items()
    return {names(name): tensor for name, tensor in held if name not in ("latent_mean", "latent_std")}


def _unet(model: LatentDiffusion) -> dict[str, Any]:
    """What the format leaves out is as SD has it."""
    a, heads = model.unet.arguments, model.unet.arguments["num_heads"]
    size = [model.defaults.height // 8, model.defaults.width // 8]
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": _VERSION,
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else heads,  # the number of heads, in spite of its name
        "block_out_channels": a["widths"],
        "cross_attention_dim": a["context_dim"],
        "down_block_types": ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in a["attention"]],
        "dropout": a["dropout"],
        "in_channels": a["in_channels"],
        "layers_per_block": a["num_blocks"],
        "out_channels": a["out_channels"],
        "sample_size": size[0] if size[0] == size[1] else size,
        "up_block_types": ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(a["attention"])],
        "use_linear_projection": a["linear_projections"],
    }


def _vae(model: LatentDiffusion) -> dict[str, Any]:
    a = model.autoencoder.arguments
    levels = len(a["widths"])
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": _VERSION,
        "block_out_channels": a["widths"],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "latent_channels": a["latent_channels"],
        "layers_per_block": a["num_blocks"],
        "sample_size": model.defaults.height,
        "scaling_factor": _scale(model.autoencoder.latent_std[0]),
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def _scale(std: Tensor) -> float:
    """1 / std as the shortest decimal that gives the same std again: 0.18215, not 0.18214999."""
    exact = 1.0 / std.double().item()
    short = (float(f"{exact:.{digits}g}") for digits in range(1, 17))
    return next((s for s in short if torch.tensor(1.0 / s, dtype=std.dtype) == std.cpu()), exact)


def _text(text: TextEncoder) -> dict[str, Any]:
    a = text.arguments
    return {
        "architectures": ["CLIPTextModel"],
        "bos_token_id": text.tokenizer.token_to_id("<|startoftext|>"),
        "eos_token_id": text.tokenizer.token_to_id("<|endoftext|>"),
        "hidden_act": a["activation"],
        "hidden_size": a["width"],
        "intermediate_size": 4 * a["width"],
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": a["num_heads"],
        "num_hidden_layers": a["num_layers"],
        "pad_token_id": a["pad_token"],
        "projection_dim": a["width"],
        "vocab_size": a["vocab_size"],
    }


def _scheduler(model: LatentDiffusion) -> dict[str, Any]:
    schedule, grid = model.schedule.arguments, model.defaults.grid
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": _VERSION,
        "beta_end": schedule["beta_end"],
        "beta_schedule": schedule["name"],
        "beta_start": schedule["beta_start"],
        "clip_sample": False,
        "num_train_timesteps": schedule["num_steps"],
        "prediction_type": _PREDICTIONS[model.prediction],
        "rescale_betas_zero_snr": schedule["zero_terminal"],
        "set_alpha_to_one": grid != "leading",
        "steps_offset": 1,
        "timestep_spacing": grid,
    }


def _index(model: LatentDiffusion) -> dict[str, Any]:
    inpaints = model.unet.in_channels != model.autoencoder.latent_channels
    return {
        "_class_name": "StableDiffusionInpaintPipeline" if inpaints else "StableDiffusionPipeline",
        "_diffusers_version": _VERSION,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
