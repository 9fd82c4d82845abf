"""A diffusers folder of SD 1.x or 2.x → our parts.

Sizes and settings come from its ``config.json`` files. A setting that this code does not know, or knows only at another
value, is refused: what it would change is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.autoencoder import Autoencoder
from ldm.checkpoint import Contents
from ldm.convert.compvis import latent_scale
from ldm.convert.names import OLD_ATTENTION, autoencoder_names, renaming, tower, unet_names
from ldm.convert.tensors import PICKLES, Source, fill, open_safetensors, open_shards, read_json
from ldm.convert.tokenizer import has_tokenizer, read_tokenizer
from ldm.convert.unpickle import open_pickle
from ldm.diffusion import Schedule
from ldm.text import TextEncoder, clip_tokenizer
from ldm.unet import UNet

INDEX = "model_index.json"
_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_IGNORED_PARTS = ("safety_checker", "feature_extractor", "requires_safety_checker")
_CLIP_LEFTOVERS = r"embeddings\.position_ids"

# Settings of which the code holds one value; those of the next table are read, those of the third change nothing here.
_UNET_FIXED: dict[str, Any] = {
    "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1,
    "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn", "act_fn": "silu", "norm_num_groups": 32,
    "norm_eps": 1e-5, "transformer_layers_per_block": 1, "resnet_time_scale_shift": "default",
    "resnet_out_scale_factor": 1.0, "time_embedding_type": "positional", "conv_in_kernel": 3, "conv_out_kernel": 3,
    "attention_type": "default",
}  # fmt: skip
_UNET_READ = ("sample_size", "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels",
              "layers_per_block", "cross_attention_dim", "attention_head_dim", "num_attention_heads",
              "use_linear_projection", "dropout")  # fmt: skip
_UNET_FREE = ("upcast_attention", "addition_embed_type_num_heads")
_VAE_FIXED: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "act_fn": "silu", "norm_num_groups": 32, "use_quant_conv": True,
    "use_post_quant_conv": True, "mid_block_add_attention": True,
}  # fmt: skip
_VAE_READ = ("down_block_types", "up_block_types", "block_out_channels", "layers_per_block", "latent_channels",
             "scaling_factor")  # fmt: skip
_VAE_FREE = ("sample_size", "force_upcast")
_TEXT_READ = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
              "max_position_embeddings", "hidden_act", "layer_norm_eps")  # fmt: skip
_SCHEDULER_FIXED: dict[str, Any] = {
    "trained_betas": None, "thresholding": False, "use_flow_sigmas": False,
    "shift_terminal": None, "use_dynamic_shifting": False, "timestep_type": "discrete",
}  # fmt: skip
_SCHEDULER_READ = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps", "prediction_type",
                   "timestep_spacing", "steps_offset", "set_alpha_to_one", "clip_sample",
                   "rescale_betas_zero_snr")  # fmt: skip
# Of one sampler's way, not of the weights: our samplers have their own.
_SCHEDULER_FREE = (
    "skip_prk_steps", "sample_max_value", "clip_sample_range", "dynamic_thresholding_ratio", "use_karras_sigmas",
    "use_exponential_sigmas", "use_beta_sigmas", "interpolation_type", "sigma_min", "sigma_max", "final_sigmas_type",
    "solver_order", "solver_type", "algorithm_type", "lower_order_final", "euler_at_final", "lambda_min_clipped",
    "predict_x0", "disable_corrector", "solver_p", "use_lu_lambdas", "flow_shift", "time_shift_type",
    "variance_type", "original_inference_steps", "timestep_scaling",
)  # fmt: skip
_BEGIN_AT_LINSPACE = ("Euler", "LMS", "Heun", "DPM", "KDPM", "UniPC", "DEIS")  # where a config is silent
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}


def read(
    folder: Path, weights: str, only: tuple[str, ...] | None, pickles: bool = False
) -> tuple[Contents, tuple[Path, ...]]:
    """The parts and settings of a folder, and the files they came from.

    Args:
        folder: with ``model_index.json``.
        weights: ``"raw"`` takes the UNet's ``non_ema`` variant where there is one.
        only: names of components; None takes all.
        pickles: read ``.bin`` files too.

    Raises:
        ValueError: for another family of models, unknown settings, and tensors that do not fit.
    """
    index = read_json(folder / INDEX)
    for name, part in index.items():
        there = isinstance(part, list) and part[:1] not in ([None], [])
        if there and name not in (*_PARTS, *_IGNORED_PARTS):
            raise ValueError(
                f"{folder} is a {index.get('_class_name')}, by its part {name!r}; SD 1.x and 2.x are what can be loaded"
            )
    variants = ("", ".non_ema") if weights == "ema" else (".non_ema", "")
    sources = {"unet": lambda: _weights(folder / "unet", "diffusion_pytorch_model", pickles, variants),
               "autoencoder": lambda: _weights(folder / "vae", "diffusion_pytorch_model", pickles),
               "text_encoder": lambda: _weights(folder / "text_encoder", "model", pickles)}  # fmt: skip
    components: dict[str, nn.Module] = {}
    files: list[Path] = []
    for name, open_source in sources.items():
        if only is not None and name not in only:
            continue
        source = open_source()
        if name == "unet":
            components[name] = _unet(read_json(folder / "unet/config.json"), source)
        elif name == "autoencoder":
            components[name] = _autoencoder(read_json(folder / "vae/config.json"), source)
        else:
            components[name] = _text(read_json(folder / "text_encoder/config.json"), source, folder / "tokenizer")
        files += source.files
    if only is not None:
        return Contents(components), tuple(files)
    size = read_json(folder / "unet/config.json").get("sample_size") or 64
    height, width = (8 * side for side in (size if isinstance(size, list) else (size, size)))
    scheduler = folder / "scheduler/scheduler_config.json"
    settings = scheduler_settings(read_json(scheduler), str(scheduler))
    settings |= {"guidance_scale": 7.5, "height": height, "width": width}
    return Contents(components, settings=settings), (*files, scheduler)


def read_autoencoder(folder: Path, pickles: bool = False) -> Autoencoder:
    """An autoencoder from its own folder."""
    return _autoencoder(read_json(folder / "config.json"), _weights(folder, "diffusion_pytorch_model", pickles))


def read_text_encoder(folder: Path, pickles: bool = False) -> TextEncoder:
    """CLIP's text tower from a folder of transformers, or from one of a whole CLIP."""
    config = read_json(folder / "config.json")
    beside = [place for place in (folder, folder.parent / "tokenizer") if has_tokenizer(place)]
    return _text(config, _weights(folder, "model", pickles), beside[0] if beside else None)


def _weights(folder: Path, stem: str, pickles: bool, variants: tuple[str, ...] = ("",)) -> Source:
    """The tensors of a part: whole precision before half; one file before shards."""
    for variant in (*variants, ".fp16"):
        if (folder / f"{stem}{variant}.safetensors").is_file():
            return open_safetensors(folder / f"{stem}{variant}.safetensors")
        # Both orders of the words are in use.
        for name in (f"{stem}{variant}.safetensors.index.json", f"{stem}.safetensors.index{variant}.json"):
            if (folder / name).is_file():
                return open_shards(folder / name)
    names = [path for path in sorted(folder.glob("*")) if path.suffix in PICKLES] if folder.is_dir() else []
    if pickles and names:
        whole = {"diffusion_pytorch_model": "diffusion_pytorch_model", "model": "pytorch_model"}[stem]
        return open_pickle(next((path for path in names if path.name == f"{whole}.bin"), names[0]))
    remedy = f"it holds pickles ({names[0].name}); use ldm convert" if names else "the folder is incomplete"
    raise ValueError(f"{folder} holds no {stem}.safetensors, nor its fp16 variant or shards: {remedy}")


def _check(config: Mapping[str, Any], where: str, fixed: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Refuse settings that are unknown, or known at one value alone and set to another."""
    for key, value in config.items():
        if key.startswith("_") or key in known:
            continue
        expected = fixed.get(key)
        if value != expected and not (key not in fixed and value in (None, False)):
            rule = f"the rule is {expected}" if key in fixed else "that setting is unknown here"
            raise ValueError(f"{where}: {key}={value!r}, {rule}; this model cannot be loaded")


def _unet(config: Mapping[str, Any], source: Source) -> UNet:
    _check(config, source.label, _UNET_FIXED, (*_UNET_READ, *_UNET_FREE))
    widths = config["block_out_channels"]
    kinds = {"CrossAttnDownBlock2D": True, "DownBlock2D": False, "CrossAttnUpBlock2D": True, "UpBlock2D": False}
    downs, ups = config["down_block_types"], config["up_block_types"]
    attention = [kinds.get(kind) for kind in downs]
    if None in attention or attention != [kinds.get(kind) for kind in reversed(ups)]:
        raise ValueError(f"{source.label}: blocks {downs} and {ups}; the rule is plain or cross-attending, up as down")
    # diffusers' attention_head_dim means the number of heads.
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    for key in ("layers_per_block", "cross_attention_dim"):
        if not isinstance(config[key], int):
            raise ValueError(f"{source.label}: {key}={config[key]}; the rule is one number for all levels")
    arguments = {
        "widths": widths,
        "attention": attention,
        "num_blocks": config["layers_per_block"],
        "num_heads": heads,
        "context_dim": config["cross_attention_dim"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "dropout": config.get("dropout", 0.0),
        "linear_projections": config.get("use_linear_projection", False),
    }
    with torch.device("meta"):
        unet = UNet(**arguments)
    fill(unet, source, renaming(unet_names(len(widths), arguments["num_blocks"], arguments["attention"]), 2))
    return unet


def _autoencoder(config: Mapping[str, Any], source: Source) -> Autoencoder:
    _check(config, source.label, _VAE_FIXED, (*_VAE_READ, *_VAE_FREE))
    kinds = {*config["down_block_types"], *config["up_block_types"]}
    if kinds != {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
        raise ValueError(f"{source.label}: blocks {sorted(kinds)}; the rule is DownEncoderBlock2D and UpDecoderBlock2D")
    widths, num_blocks = config["block_out_channels"], config["layers_per_block"]
    with torch.device("meta"):
        autoencoder = Autoencoder(widths, num_blocks, config["latent_channels"])

    def current(name: str) -> str:
        head, _, rest = name.rpartition(".attentions.0.")
        old, _, last = rest.rpartition(".")
        return f"{head}.attentions.0.{OLD_ATTENTION[old]}.{last}" if head and old in OLD_ATTENTION else name

    scale = latent_scale(config["latent_channels"], config.get("scaling_factor", 0.18215))
    names = renaming(autoencoder_names(len(widths), num_blocks), 2)
    fill(autoencoder, source.renamed(current), names, scale, pointwise=True)  # in old folders its attention is one
    return autoencoder


def _text(config: Mapping[str, Any], source: Source, tokenizer: Path | None) -> TextEncoder:
    """The tower; a whole CLIP's pictures half is left where it is."""
    ignored = _CLIP_LEFTOVERS
    if config.get("model_type") == "clip":
        config = config.get("text_config") or {}
        ignored += r"|vision_model\..*|(text|visual)_projection\.weight|logit_scale"
    if missing := [key for key in _TEXT_READ[:5] if key not in config]:
        raise ValueError(f"{source.label}: its config is none of CLIP's text tower, it lacks {', '.join(missing)}")
    rules = {"intermediate_size": 4 * config["hidden_size"], "max_position_embeddings": 77, "layer_norm_eps": 1e-5}
    for key, value in rules.items():
        if config.get(key, value) != value:
            raise ValueError(f"{source.label}: {key}={config[key]}, the rule is {value}; this tower cannot be loaded")
    text, pad_token = read_tokenizer(tokenizer) if tokenizer else (clip_tokenizer(), 49407)
    with torch.device("meta"):
        encoder = TextEncoder(
            "clip",
            text,
            config["hidden_size"],
            config["num_hidden_layers"],
            config["num_attention_heads"],
            config["vocab_size"],
            pad_token,
            config.get("hidden_act", "quick_gelu"),
        )
    bare = source.renamed(lambda name: name.removeprefix("text_model."))
    fill(encoder, bare, tower, ignored=ignored)
    return encoder


def scheduler_settings(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Schedule, prediction and grid from ``scheduler_config.json``.

    Raises:
        ValueError: for settings that no schedule or grid of ours has.
    """
    _check(config, where, _SCHEDULER_FIXED, (*_SCHEDULER_READ, *_SCHEDULER_FREE))
    kind = str(config.get("_class_name"))
    if config.get("prediction_type", "epsilon") not in _PREDICTIONS:
        raise ValueError(f"{where}: prediction_type={config['prediction_type']}; known are {', '.join(_PREDICTIONS)}")
    schedule = Schedule(
        config.get("beta_schedule", "linear"),
        config.get("num_train_timesteps", 1000),
        config.get("beta_start", 1e-4),
        config.get("beta_end", 0.02),
        config.get("rescale_betas_zero_snr", False),
    )
    grid = config.get("timestep_spacing", "linspace" if kind.startswith(_BEGIN_AT_LINSPACE) else "leading")
    if grid not in ("leading", "trailing", "linspace"):
        raise ValueError(f"{where}: timestep_spacing={grid} is unknown; the rule is leading, trailing or linspace")
    ends_clean = config.get("set_alpha_to_one", kind == "DDIMScheduler")
    if kind in ("DDIMScheduler", "PNDMScheduler") and ends_clean != (grid != "leading"):
        raise ValueError(
            f"{where}: set_alpha_to_one={ends_clean} with timestep_spacing={grid}; leading grids end at the first step "
            "here and others at a clean image: set it so in that file"
        )
    # StableDiffusionPipeline takes an offset of 0 for 1 and clip_sample=true for false, and so do we: both are known
    # faults of old folders, and mean nothing for latents.
    if config.get("steps_offset", 0) not in (0, 1):
        raise ValueError(f"{where}: steps_offset={config['steps_offset']}; the rule is 1")
    prediction = _PREDICTIONS[config.get("prediction_type", "epsilon")]
    return {"prediction": prediction, "schedule": schedule.arguments, "grid": grid}
