"""``ldm train``: from a config to objects, and the only place where Hydra and OmegaConf work."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.cli.help import TRAIN_HELP
from ldm.cli.settings import OVERRIDE, configs, stamp, value_of

_SETTINGS_OF_SPEED = ("trainer.max_steps", "trainer.devices", "trainer.accelerator", "trainer.num_nodes",
                      "trainer.accumulate_grad_batches", "data.num_workers", "checkpoint.", "validation.",
                      "samples.")  # fmt: skip
_TARGETS = ("ldm.", "pytorch_lightning.loggers.")  # the only classes that a config may name


def train(arguments: list[str]) -> None:
    """``ldm train``."""
    from omegaconf import OmegaConf

    if {"-h", "--help"} & set(arguments):
        names = sorted(str(p.relative_to(configs() / "experiment").with_suffix(""))
                       for p in (configs() / "experiment").rglob("*.yaml"))  # fmt: skip
        sys.stdout.write(TRAIN_HELP.format(experiments=" ".join(names)))
        return
    bare = [argument for argument in arguments if not OVERRIDE.match(argument)]
    if bare:
        raise ValueError(f"{bare[0]!r} is no setting; write key=value, see --help")
    cfg, resume = compose(arguments)
    check_targets(OmegaConf.to_container(cfg, resolve=False))
    output = Path(cfg.output)
    if resume is None and (output / "checkpoints").exists():
        raise ValueError(f"output={output} holds a run already; go on with it by resume={output}, or name another")

    from ldm import checkpoint
    from ldm.provenance import environment
    from ldm.training.run import fit

    module, data, options = build(cfg)
    output.mkdir(parents=True, exist_ok=True)
    saved = output / "config.yaml"
    OmegaConf.save(cfg, saved)  # not resolved: what an interpolation draws from the environment stays there
    origin = {**environment(), "index": data.train.index_hash}
    (output / "environment.json").write_text(json.dumps(origin, indent=1))
    parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)
    sys.stdout.write(
        f"stage {cfg.stage}: {parameters:,} parameters, {len(data.train):,} training images, "
        f"{cfg.trainer.max_steps} steps of {cfg.data.batch_size} on {cfg.trainer.accelerator}\n"
        f"results in {output}: checkpoints/ samples/ metrics.csv config.yaml. Ctrl-C saves and stops.\n"
    )
    sys.stdout.flush()
    folder = None if resume is None else checkpoint.newest(resume)
    step = fit(module, data, output, resume=folder, **options)
    if cfg.stage == "diffusion":
        prompt = cfg.samples.prompts[0] if cfg.samples.prompts else "a red apple"
        sys.stdout.write(f'ended at step {step}; sample it with: python sample.py model={output} "{prompt}"\n')
    else:
        sys.stdout.write(
            f"ended at step {step}; train on its latents with: python train.py autoencoder.weights={output}\n"
        )


def compose(arguments: Sequence[str]) -> tuple[Any, Path | None]:
    """The config of a training, and the run it goes on with."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    given = dict(argument.split("=", 1) for argument in arguments)
    if given.get("resume") in (None, "null", ""):
        with initialize_config_dir(str(configs()), version_base=None):
            cfg = hydra_compose("train", overrides=list(arguments))
        if cfg.output is None:
            cfg.output = f"outputs/{given.get('experiment', 'emoji/diffusion')}/{stamp()}"
        return cfg, None
    run = Path(given.pop("resume"))
    if not (run / "config.yaml").is_file():
        raise FileNotFoundError(f"resume={run}: no run there (it holds no config.yaml); give the folder of a training")
    cfg: Any = OmegaConf.load(run / "config.yaml")  # type: ignore[no-redef]
    cfg.output = str(run)  # it may have been moved
    OmegaConf.set_struct(cfg, True)
    for key, value in given.items():
        if not key.startswith(_SETTINGS_OF_SPEED):
            raise ValueError(
                f"{key}={value} beside resume=: a resumed run keeps its own config; only speed and length may change "
                f"({', '.join(_SETTINGS_OF_SPEED)}); start a new run from its weights with init={run}"
            )
        OmegaConf.update(cfg, key, value_of(key, value))
    return cfg, run


def check_targets(node: Any) -> None:
    """Refuse a config that names a class or function outside this package and Lightning's loggers."""
    if isinstance(node, dict):
        target = node.get("_target_")
        if target is not None and not str(target).startswith(_TARGETS):
            raise ValueError(f"_target_={target} is refused; a config may name only {', '.join(_TARGETS)}*")
        for value in node.values():
            check_targets(value)
    elif isinstance(node, list):
        for value in node:
            check_targets(value)


def build(cfg: Any) -> tuple[Any, Any, dict[str, Any]]:
    """The module, the data and what else a training takes, from its config."""
    import torch
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from ldm.loading import load_autoencoder, load_text_encoder
    from ldm.pipeline import Defaults, LatentDiffusion
    from ldm.training.autoencoder import AutoencoderTraining
    from ldm.training.diffusion import DiffusionTraining
    from ldm.training.loggers import check_wandb
    from ldm.training.run import Intervals

    check_targets(OmegaConf.to_container(cfg, resolve=True))
    if cfg.stage not in ("autoencoder", "diffusion"):
        raise ValueError(f"stage={cfg.stage} is unknown; choose autoencoder or diffusion")
    check_wandb(OmegaConf.to_container(cfg.logger, resolve=True))
    intervals = Intervals(cfg.checkpoint.every, cfg.checkpoint.keep, cfg.validation.every, cfg.samples.every)
    optimizer = instantiate(cfg.optimizer, _convert_="all")
    data = instantiate(cfg.data, _convert_="all")
    module: AutoencoderTraining | DiffusionTraining
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)  # of the initial weights, and of nothing else
        if cfg.stage == "autoencoder":
            autoencoder = instantiate(cfg.autoencoder, _convert_="all")
            if cfg.init is not None:
                autoencoder.load_state_dict(load_autoencoder(cfg.init).state_dict())
            loss = instantiate(cfg.loss, _convert_="all")
            module = AutoencoderTraining(autoencoder, loss, optimizer, data.train, cfg.ema_decay, cfg.seed)
            encoders = None
        else:
            unet = instantiate(cfg.unet, _convert_="all")
            autoencoder = load_autoencoder(cfg.autoencoder.weights)
            text_encoder = load_text_encoder(cfg.text.weights)
            defaults = Defaults(cfg.diffusion.grid, cfg.diffusion.guidance_scale, data.height, data.width)
            schedule = instantiate(cfg.diffusion.schedule, _convert_="all")
            model = LatentDiffusion(unet, autoencoder, text_encoder, schedule, cfg.diffusion.prediction, defaults)
            if cfg.init is not None:
                from ldm.loading import load

                unet.load_state_dict(load(cfg.init, device="cpu").unet.float().state_dict())
            module = DiffusionTraining(model, optimizer, cfg.caption_dropout, cfg.min_snr, cfg.ema_decay, cfg.seed)
            encoders = (autoencoder, text_encoder) if cfg.cache else None
    data.prepare(cfg.seed, encoders, cfg.validation.images)
    options = {
        "trainer": OmegaConf.to_container(cfg.trainer, resolve=True),
        "intervals": intervals,
        "prompts": list(cfg.samples.prompts),
        "loggers": [instantiate(logger, _convert_="all") for logger in cfg.logger.loggers],
        "clip": cfg.clip,
    }
    return module, data, options
