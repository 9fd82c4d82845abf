"""From a composed config to the objects of a training: module, data, and what Lightning takes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.targets import check_targets

if TYPE_CHECKING:
    from ldm.training.autoencoder import AutoencoderTraining
    from ldm.training.diffusion import DiffusionTraining

_NUMBERS = ("seed", "repa", "latent_noise", "lora.rank", "caption_dropout", "ema_decay", "clip", "checkpoint.every",
            "checkpoint.keep", "validation.every", "validation.images", "samples.every")  # fmt: skip
_WHOLE = {"trainer.max_steps": 1, "trainer.accumulate_grad_batches": 1, "data.batch_size": 1, "data.num_workers": 0,
          "data.height": 8, "data.width": 8}  # and the least, of which those above 1 are multiples  # fmt: skip


class OtherPrediction(UserWarning):
    """The weights of ``init=`` predict something else."""


def build(cfg: Any, cached: bool = True) -> tuple[Any, Any, dict[str, Any]]:
    """The module, the data and what else a training takes, from its config."""
    import torch
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from ldm.diffusion import Objective
    from ldm.training.guard import Limits
    from ldm.training.run import Intervals, check_wandb

    _check(cfg)
    check_wandb(OmegaConf.to_container(cfg.logger, resolve=True))
    intervals = Intervals(cfg.checkpoint.every, cfg.checkpoint.keep, cfg.validation.every, cfg.samples.every)
    optimizer = instantiate(cfg.optimizer, _convert_="all")
    data = instantiate(cfg.data, _convert_="all")
    folder = Path(cfg.cache) if isinstance(cfg.cache, str) else None
    loss = instantiate(cfg.loss, _convert_="all")
    if isinstance(loss, Objective) != (cfg.stage == "diffusion"):
        rule = "loss=diffusion" if cfg.stage == "diffusion" else "loss=gaussian or loss=laplace"
        raise ValueError(f"stage={cfg.stage} with a loss of the other stage, {cfg.loss._target_}; choose {rule}")
    module: AutoencoderTraining | DiffusionTraining
    frozen = None  # what makes the cache
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)  # of the initial weights, and of nothing else
        if cfg.stage == "autoencoder":
            module = _stage_one(cfg, loss, optimizer, data)
        else:
            module = _stage_two(cfg, loss, optimizer, data)
            if folder or (cfg.cache and cached):
                frozen = (module.model.autoencoder, module.model.text_encoder)
    data.prepare(cfg.seed, frozen, cfg.validation.images, folder)
    options = {
        "trainer": OmegaConf.to_container(cfg.trainer, resolve=True),
        "intervals": intervals,
        "prompts": list(cfg.samples.prompts),
        "loggers": [instantiate(logger, _convert_="all") for logger in cfg.logger.loggers],
        "clip": cfg.clip,
        "limits": Limits(**cfg.get("guard", {})),
        "shards": cfg.checkpoint.sharded,
    }
    return module, data, options


def check_numbers(cfg: Any) -> None:
    """ValueError for what is no number, or no whole one, of a training's config."""
    from omegaconf import OmegaConf

    for key in (*_NUMBERS, *_WHOLE):
        value, least = OmegaConf.select(cfg, key, default=_WHOLE.get(key)), _WHOLE.get(key)
        if isinstance(value, bool | str | Sequence | Mapping):
            raise ValueError(f"{key}={value} must be a number")
        if least is not None and not (isinstance(value, int) and value >= least and value % (least or 1) == 0):
            more = f", and a multiple of {least}" if least > 1 else ""
            raise ValueError(f"{key}={value}: the rule is a whole number, at least {least}{more}")


def _check(cfg: Any) -> None:
    """ValueError for what can be told from the config alone."""
    from omegaconf import OmegaConf

    check_targets(OmegaConf.to_container(cfg, resolve=True), resolved=True)
    check_numbers(cfg)
    for key in ("ema.power", "lora.targets"):
        if OmegaConf.select(cfg, key) is not None and not OmegaConf.is_list(OmegaConf.select(cfg, key)):
            raise ValueError(f"{key}={OmegaConf.select(cfg, key)} must be a list in brackets")
    if cfg.stage not in ("autoencoder", "diffusion"):
        raise ValueError(f"stage={cfg.stage} is unknown; choose autoencoder or diffusion")
    if (shards := cfg.checkpoint.sharded) not in (False, True) or (shards and cfg.trainer.strategy != "fsdp"):
        rule = "true or false, and true with trainer.strategy=fsdp alone; set checkpoint.sharded=false"
        raise ValueError(f"checkpoint.sharded={shards}, trainer.strategy={cfg.trainer.strategy}: the rule is {rule}")
    if cfg.optimizer.get("method") == "muon" and cfg.trainer.strategy == "fsdp":
        rule = "matrices, which fsdp shares out; take optimizer=adamw or trainer.strategy=ddp"
        raise ValueError(f"optimizer=muon with trainer.strategy=fsdp: Muon needs whole {rule}")
    stage_one = ("adversarial", "perceptual", "decoder_only", "latent_noise")
    for key in ("lora.rank", "ema.power", "repa") if cfg.stage == "autoencoder" else stage_one:
        if OmegaConf.select(cfg, key):
            raise ValueError(f"{key} is not for stage={cfg.stage}; leave it out, or choose an experiment of the other")


def _stage_one(cfg: Any, loss: Any, optimizer: Any, data: Any) -> AutoencoderTraining:
    from hydra.utils import instantiate

    from ldm.loading import load_autoencoder
    from ldm.training.autoencoder import AutoencoderTraining

    autoencoder = instantiate(cfg.autoencoder, _convert_="all")
    decoder_only = cfg.get("decoder_only", False)
    if not 0.0 <= (tau := cfg.get("latent_noise", 0.0)) < 10.0:
        raise ValueError(f"latent_noise={tau} must be a number from 0 to 10, in standard deviations of the latents")
    if decoder_only and cfg.init is None:
        raise ValueError("decoder_only=true keeps the encoder of init=MODEL: give one")
    if cfg.init is not None:
        _start(autoencoder, load_autoencoder(cfg.init), "autoencoder", cfg.init)
    adversarial = instantiate(cfg.get("adversarial"), _convert_="all")
    perceptual = instantiate(cfg.get("perceptual"), _convert_="all")
    terms = (cfg.ema_decay, cfg.seed, adversarial, perceptual, decoder_only, tau)
    return AutoencoderTraining(autoencoder, loss, optimizer, data.indexed, *terms)


def _stage_two(cfg: Any, loss: Any, optimizer: Any, data: Any) -> DiffusionTraining:
    from hydra.utils import instantiate

    from ldm.loading import load
    from ldm.pipeline import Defaults, LatentDiffusion
    from ldm.training.diffusion import DiffusionTraining
    from ldm.training.lora import adapt

    unet = instantiate(cfg.unet, _convert_="all")
    defaults = Defaults(cfg.diffusion.grid, cfg.diffusion.guidance_scale, data.height, data.width)
    schedule = instantiate(cfg.diffusion.schedule, _convert_="all")
    prediction: Any = "epsilon" if cfg.diffusion.prediction == "eps" else cfg.diffusion.prediction
    model = LatentDiffusion(unet, *encoders(cfg), schedule, prediction, defaults)
    start = None if cfg.init is None else load(cfg.init, device="cpu")
    if start is not None:
        _start(unet, start.unet.float(), "unet", cfg.init)
    rank, power = cfg.get("lora", {}).get("rank"), list(cfg.get("ema", {}).get("power", []))
    if rank is not None:
        if start is None or power:
            raise ValueError("lora.rank adapts the weights of init=MODEL: give one, and no ema.power")
        adapt(unet, rank, list(cfg.lora.targets))
    if (repa := cfg.get("repa", 0.0)) and cfg.cache:
        raise ValueError(f"repa={repa} needs images, which the cache of latents has not; set cache=false")
    averaging = (cfg.ema_decay, cfg.seed, power)
    module = DiffusionTraining(model, optimizer, loss, cfg.caption_dropout, *averaging, repa)
    if start is not None:
        its, own = ((m.prediction, m.schedule.arguments["name"]) for m in (start, model))
        if its != own:  # it may be meant: a network can learn another prediction
            said = f"init={cfg.init} predicts {its[0]} on the path {its[1]}, here {own[0]} on {own[1]}"
            warnings.warn(f"{said}; diffusion=flow goes on with the bundled one", OtherPrediction, stacklevel=1)
    return module


def encoders(cfg: Any) -> tuple[Any, Any]:
    """The frozen models of stage two, where the training will be, so that a cache is made there."""
    import torch

    from ldm.loading import load_autoencoder, load_text_encoder

    gpu = cfg.trainer.accelerator != "cpu" and torch.cuda.is_available()
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if gpu else "cpu"
    return load_autoencoder(cfg.autoencoder.weights).to(device), load_text_encoder(cfg.text.weights).to(device)


def _start(network: Any, other: Any, name: str, init: str) -> None:
    """Take over another network's weights; ValueError if the two are not of one size."""
    own, its = ({k: v for k, v in each.arguments.items() if k != "dropout"} for each in (network, other))
    if different := [f"{k} {v}, here {own[k]}" for k, v in its.items() if own[k] != v]:
        size = f"give its size, which is {name}=emoji for the bundled one"
        raise ValueError(f"init={init} has another {name}: {'; '.join(different)}; {size}")
    network.load_state_dict(other.state_dict())
