"""The doors: ``ldm``, ``train.py`` and ``sample.py``. Hydra and OmegaConf stop here; what lies behind gets objects."""

from __future__ import annotations

import difflib
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

_OVERRIDE = re.compile(r"[+~]{0,2}[A-Za-z_][A-Za-z0-9_]*([./@:][A-Za-z0-9_]+)*=")
_SETTINGS_OF_SPEED = ("trainer.max_steps", "trainer.devices", "trainer.accelerator", "trainer.num_nodes",
                      "trainer.accumulate_grad_batches", "data.num_workers", "checkpoint.", "validation.",
                      "samples.")  # fmt: skip
_TARGETS = ("ldm.", "pytorch_lightning.loggers.")  # the only classes that a config may name

TRAIN_HELP = """\
python train.py [experiment=NAME] [key=value ...]        (ldm train is the same)

Trains one stage. Alone it trains experiment=emoji/diffusion on the data that come with the package.

experiments   {experiments}
data          emoji48 emoji200 emoji shards (data.train.paths=DIR data.validation.paths=DIR)
trainer       cpu gpu          logger  csv tensorboard wandb
autoencoder   emoji sd         unet    emoji sd15         diffusion  linear scaled_linear

output=RUN_DIR                 where everything goes           (outputs/EXPERIMENT/DATE-TIME)
resume=RUN_DIR                 go on with a run, in place
init=PATH                      start from the weights of a run or checkpoint
seed=0                         decides weights, order, noise
trainer.max_steps=N            optimiser steps
trainer.devices=2 trainer.accelerator=cpu data.num_workers=2 data.batch_size=32
optimizer.learning_rate=1e-3   optimizer.decay=constant|cosine|linear
diffusion.prediction=epsilon|v|x0   min_snr=5   caption_dropout=0.1   loss.beta=0.18
autoencoder.weights=emoji|PATH stage two: the frozen autoencoder
checkpoint.every=N             validation.every=N             samples.every=N

A run folder holds checkpoints/ samples/ metrics.csv config.yaml. Ctrl-C finishes the step and saves.
All settings with their comments: configs/train.yaml and the folders beside it.
"""

SAMPLE_HELP = """\
python sample.py PROMPT [PROMPT ...] [key=value ...]      (ldm sample is the same)

Draws pictures of prompts. A bare argument is a prompt, to the letter; it is a setting exactly if it
begins with key=

model=emoji             bundled: {models}; a run, checkpoint or diffusers folder, a .safetensors, a hub id
prompt= prompts_file=   a prompt; a text file with one prompt a line
negative_prompt=        what to push away from
num_images=1            pictures a prompt
steps=50                1 to 1000                        (12 for sampler=auto)
guidance_scale=         1 is no guidance                 (what the model recommends)
sampler=ddim            {samplers}
grid=                   {grids}                  (the model's own)
seed=0                  of the first picture; null draws one; [3,7] gives one each
height= width=          multiples of 8                   (the model's own)
eta=0                   ddim's η
guidance_interval=[200,800]  guidance between these timesteps alone      guidance_rescale=0
init_image=FILE         start from a picture             strength=0.8   part of the steps that change it
mask=FILE               with init_image: white is painted anew, black is kept
resize=native           interpolate, refine: begin at the model's own size
batch_size=16 tile=     pictures at a time; latents a side to decode at a time
precision=              float32 float32_winograd bfloat16 float16 auto       (that of the weights)
safety=                 nsfw blurs what Open NSFW flags  (off)
weights=ema             ema or raw
device= devices=1       cpu, cuda; processes that share the work (torchrun does as well)
output=DIR              (outputs/samples/DATE-TIME); a stopped run goes on with what is missing

  python sample.py "a red apple, noto style" num_images=4
  python sample.py prompts_file=prompts.txt output=pictures guidance_scale=4
"""

MAIN_HELP = """\
ldm train      train a stage                    ldm train --help
ldm sample     draw pictures of prompts         ldm sample --help
ldm evaluate   score a model or an autoencoder  ldm evaluate --help
ldm pack       make shards of your own data     ldm pack --help
ldm index      check a shard and index it       ldm index --help
ldm convert    weights of others to ours        ldm convert --help
"""

EVALUATE_HELP = """\
ldm evaluate [model=emoji] [key=value ...]

Scores a model on the emoji data: pair accuracy (concept and style together) on held-out pairs and on as many
training pairs, beside real images, chance and a model that ignores the style; and its autoencoder's PSNR.

model=emoji           bundled name, run folder or checkpoint folder; a stage-one run scores the autoencoder alone
data=emoji48          emoji48 (what the bundled model draws), emoji200 or emoji
seeds=3               pictures a pair
limit=                at most so many pairs a split              (all)
steps=50 guidance_scale= sampler=ddim batch_size=16
output=DIR            (outputs/evaluation/DATE-TIME)
"""

PACK_HELP = """\
ldm pack SOURCE OUT [size=PIXELS]

Makes shards with an index from SOURCE: a folder of images with captions in .txt files of the same name, or a .csv or
.parquet with columns for the image (path or bytes) and the caption. OUT must not exist. size= shrinks the images.
"""

INDEX_HELP = """\
ldm index TAR [TAR ...]

Checks WebDataset tars member by member and writes an index beside each.
"""

CONVERT_HELP = """\
ldm convert SOURCE OUT [key=value ...]

Writes a checkpoint folder OUT, which must not exist, from Stable Diffusion 1.x or 2.x weights: a diffusers folder, a
CompVis single file (.safetensors, or a pickle: .ckpt .pt .pth .bin), a hub id (owner/name), or the folder of an
autoencoder or a CLIP text tower alone. A pickle is read by a closed list of names: nothing in it is run, and a name
that no weights need is reported.

half=false              true: float16, half the size
prediction=             epsilon or v, where the source does not say: single files of SD 2.x
weights=ema             ema: averaged weights where the source holds both; raw: the others

  ldm convert v1-5-pruned.ckpt models/sd15 half=true
  python sample.py "a red apple" model=models/sd15
"""


def main(argv: Sequence[str] | None = None) -> int:
    """``ldm COMMAND …``; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], None]] = {
        "train": train,
        "sample": sample,
        "evaluate": evaluate,
        "pack": pack,
        "index": index,
        "convert": convert,
    }
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(MAIN_HELP)
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in commands:
        return _fail(f"unknown command {name!r}; choose one of {', '.join(commands)}")
    return door(commands[name], rest)


def door(command: Callable[[list[str]], None], arguments: list[str]) -> int:
    """Run a command; an invalid request becomes one line on stderr and exit code 2, Ctrl-C becomes 130."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        command(arguments)
        return 0
    except (HydraException, OmegaConfBaseException) as error:
        return _fail(_hydra_message(error))
    except (ValueError, OSError) as error:
        if os.environ.get("LDM_TRACEBACK"):
            raise
        return _fail(str(error))
    except KeyboardInterrupt as error:
        sys.stderr.write(f"{error or 'stopped'}\n")
        return 130


def _fail(message: str) -> int:
    line = re.sub(r"\s*\n\s*", " ", message.strip())
    sys.stderr.write(f"error: {line}\n")
    return 2


def _hydra_message(error: Exception) -> str:
    """Hydra's words, the first sentence, and what to do."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(error).split("\n")[0].rstrip(".")
    detail = str(cause).split("\n")[0].rstrip(".")
    return f"{text}{'' if detail in text else f': {detail}'}; see --help, or configs/train.yaml for all settings"


def configs() -> Path:
    """Where the YAML files are: in the installed package, or at the root of the repository."""
    package = Path(__file__).resolve().parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


# ---------------------------------------------------------------------------------------------------- flat settings


def parse(arguments: Sequence[str], defaults: dict[str, Any], texts: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Settings ``key=value`` over ``defaults``, and the bare arguments; ``texts`` are kept to the letter.

    Raises:
        ValueError: for a key that is not in ``defaults``.
    """
    settings, bare = dict(defaults), []
    for argument in arguments:
        if not _OVERRIDE.match(argument):
            bare.append(argument)
            continue
        key, value = argument.split("=", 1)
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1)
            hint = f"did you mean {near[0]}=?" if near else f"the settings are {', '.join(defaults)}"
            raise ValueError(f"unknown setting {key}=; {hint} (a prompt that begins so is given as prompt=...)")
        settings[key] = value if key in texts else _value(key, value)
    return settings, bare


def _value(key: str, value: str) -> Any:
    try:
        parsed = yaml.safe_load(value) if value else None
    except yaml.YAMLError as error:
        raise ValueError(f"{key}={value}: not a value ({str(error).splitlines()[0]})") from error
    if isinstance(parsed, str):
        try:  # YAML 1.1 takes 1e-3 for text
            return float(parsed)
        except ValueError:
            return parsed
    return parsed


def _stamp() -> str:
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


# ----------------------------------------------------------------------------------------------------------- sample


def sample(arguments: list[str]) -> None:
    """``ldm sample``."""
    import torch

    from ldm import precision, request
    from ldm.batch import draw, ranks, shared
    from ldm.diffusion import GRIDS, SAMPLERS
    from ldm.loading import BUNDLED, load

    if {"-h", "--help"} & set(arguments):
        names = {"models": " ".join(BUNDLED), "samplers": " ".join((*SAMPLERS, "auto")), "grids": " ".join(GRIDS)}
        sys.stdout.write(SAMPLE_HELP.format(**names))
        return
    defaults = {
        "model": "emoji", "prompt": None, "prompts_file": None, "negative_prompt": "", "num_images": 1, "steps": None,
        "guidance_scale": None, "sampler": "ddim", "grid": None, "seed": 0, "height": None, "width": None, "eta": 0.0,
        "guidance_interval": None, "guidance_rescale": 0.0, "init_image": None, "strength": None, "mask": None,
        "resize": "native", "batch_size": 16, "tile": None, "precision": None, "safety": None, "weights": "ema",
        "device": None, "devices": 1, "output": None,
    }  # fmt: skip
    texts = ("model", "prompt", "prompts_file", "negative_prompt", "output", "sampler", "grid", "weights", "device",
             "init_image", "mask", "resize", "precision", "safety")  # fmt: skip
    settings, prompts = parse(arguments, defaults, texts)
    if settings["prompt"] is not None:
        prompts.append(settings["prompt"])
    if settings["prompts_file"] is not None:
        prompts += _lines(Path(settings["prompts_file"]))
    if not prompts:
        raise ValueError('no prompt came; give one: python sample.py "a red apple, noto style"')
    if request.count("devices", settings["devices"]) > 1 and ranks()[1] == 1:
        _launch(settings["devices"], arguments)
        return
    if ranks()[1] > 1 and settings["device"] is None and torch.cuda.is_available():
        settings["device"] = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    model = load(settings["model"], settings["weights"], settings["device"])
    if settings["precision"] is not None:
        settings["precision"] = shared(precision.choose(settings["precision"], model.device))
    output = Path(shared(settings["output"] or f"outputs/samples/{_stamp()}"))
    seed = shared(secrets.randbelow(2**31) if settings["seed"] is None else settings["seed"])
    own = ("model", "prompt", "prompts_file", "weights", "device", "devices", "output", "seed")
    given = ("negative_prompt", "num_images", "batch_size")
    options = {key: value for key, value in settings.items() if key not in own + given}

    from tqdm import tqdm

    start = time.perf_counter()
    quiet = ranks()[0] > 0 or not sys.stderr.isatty()
    with tqdm(desc="sampling", unit="picture", disable=quiet, bar_format=_BAR) as bar:

        def progress(done: float) -> None:
            bar.total = len(prompts) * settings["num_images"]
            bar.n = done
            bar.refresh()

        drawn = draw(model, prompts, output, seed=seed, progress=progress, options=options,
                     **{key: settings[key] for key in given})  # fmt: skip
    for note in drawn.notes:
        sys.stderr.write(f"note: {note}\n")
    if ranks()[0] == 0:
        sys.stdout.write(_account(drawn, time.perf_counter() - start))


_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total_fmt} pictures [{elapsed}<{remaining}]"


def _account(drawn: Any, seconds: float) -> str:
    """What was drawn, how long it took, and where it is."""
    there = len(drawn.paths) - drawn.fresh
    where = drawn.paths[0].parent / "grid.png" if len(drawn.paths) > 1 else drawn.paths[0]
    if not drawn.fresh:
        return f"all {there} pictures were there → {where}\n"
    said = drawn.settings
    a_step = seconds / (drawn.fresh * said["steps"])
    return (
        f"{drawn.fresh} pictures in {seconds:.1f} s ({a_step:.3f} s a step and picture)"
        f"{f', {there} were there' if there else ''}; {said['sampler']} on the grid {said['grid']}, "
        f"{said['steps']} steps, guidance {said['guidance_scale']:g}, {said['precision']} → {where}\n"
    )


def _launch(devices: int, arguments: Sequence[str]) -> None:
    """The same command in several processes, which share its pictures."""
    rest = [argument for argument in arguments if not argument.startswith("devices=")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}",
               "-m", "ldm.cli", "sample", *rest]  # fmt: skip
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise ValueError(f"one of {devices} processes failed; what they said is above")


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"no prompts file at {path}; give a text file with one prompt a line")
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not lines:
        raise ValueError(f"{path} holds no prompt; write one a line")
    return lines


# --------------------------------------------------------------------------------------------- evaluate, pack, index


def evaluate(arguments: list[str]) -> None:
    """``ldm evaluate``."""
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(EVALUATE_HELP)
        return
    defaults = {
        "model": "emoji", "data": "emoji48", "seeds": 3, "limit": None, "steps": 50, "guidance_scale": None,
        "sampler": "ddim", "batch_size": 16, "output": None,
    }  # fmt: skip
    settings, bare = parse(arguments, defaults, ("model", "data", "sampler", "output"))
    if bare:
        raise ValueError(f"{bare[0]!r} is no setting; write key=value, see ldm evaluate --help")
    from ldm.evaluation import evaluate_model

    output = Path(settings.pop("output") or f"outputs/evaluation/{_stamp()}")
    sys.stdout.write(evaluate_model(**settings, output=output))
    sys.stdout.write(f"\nwritten to {output}\n")


def pack(arguments: list[str]) -> None:
    """``ldm pack``."""
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(PACK_HELP)
        return
    from ldm.data.pack import pack as pack_shards

    settings, bare = parse(arguments, {"size": None}, ())
    if len(bare) != 2:
        raise ValueError(f"{len(bare)} paths came; the rule is: ldm pack SOURCE OUT [size=PIXELS]")
    pack_shards(Path(bare[0]), Path(bare[1]), size=settings["size"])
    sys.stdout.write(f"shards in {bare[1]}; train on them with: data=shards data.train.paths={bare[1]}\n")


def index(arguments: list[str]) -> None:
    """``ldm index``."""
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(INDEX_HELP)
        return
    from ldm.data import build_index

    if not arguments:
        raise ValueError("no shard came; the rule is: ldm index TAR [TAR ...]")
    for shard in arguments:
        built = build_index(Path(shard))
        sys.stdout.write(f"{shard}: {len(built['samples'])} samples\n")


def convert(arguments: list[str]) -> None:
    """``ldm convert``."""
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(CONVERT_HELP)
        return
    defaults = {"half": False, "prediction": None, "weights": "ema"}
    settings, bare = parse(arguments, defaults, ("prediction", "weights"))
    if len(bare) != 2:
        raise ValueError(f"{len(bare)} paths came; the rule is: ldm convert SOURCE OUT [half=true] [prediction=v]")
    if not isinstance(settings["half"], bool):
        raise ValueError(f"half={settings['half']}: the rule is true or false")
    from ldm.convert import convert as convert_weights

    contents = convert_weights(bare[0], bare[1], **settings)
    sizes = [f"{name} {sum(p.numel() for p in part.parameters()):,}" for name, part in contents.components.items()]
    said = contents.settings
    detail = f"; {said['schedule']['name']}, {said['prediction']}, {said['height']}×{said['width']}" if said else ""
    sys.stdout.write(f"{bare[1]}: {', '.join(sizes)} parameters{detail}\n")


# ------------------------------------------------------------------------------------------------------------ train


def train(arguments: list[str]) -> None:
    """``ldm train``."""
    from omegaconf import OmegaConf

    if {"-h", "--help"} & set(arguments):
        names = sorted(str(p.relative_to(configs() / "experiment").with_suffix(""))
                       for p in (configs() / "experiment").rglob("*.yaml"))  # fmt: skip
        sys.stdout.write(TRAIN_HELP.format(experiments=" ".join(names)))
        return
    bare = [argument for argument in arguments if not _OVERRIDE.match(argument)]
    if bare:
        raise ValueError(f"{bare[0]!r} is no setting; write key=value, see --help")
    cfg, resume = compose(arguments)
    check_targets(OmegaConf.to_container(cfg, resolve=False))
    output = Path(cfg.output)
    if resume is None and (output / "checkpoints").exists():
        raise ValueError(f"output={output} holds a run already; go on with it by resume={output}, or name another")

    from ldm import checkpoint
    from ldm.training.run import fit

    module, data, options = build(cfg)
    output.mkdir(parents=True, exist_ok=True)
    saved = output / "config.yaml"
    OmegaConf.save(cfg, saved)  # not resolved: what an interpolation draws from the environment stays there
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
            cfg.output = f"outputs/{given.get('experiment', 'emoji/diffusion')}/{_stamp()}"
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
        OmegaConf.update(cfg, key, _value(key, value))
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


if __name__ == "__main__":
    sys.exit(main())
