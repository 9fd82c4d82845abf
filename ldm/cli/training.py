"""``ldm train``, ``plan``, ``doctor`` and ``precompute``, and how their configs are composed."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.cli.building import build, check_numbers, encoders
from ldm.cli.commands import launch
from ldm.cli.settings import OVERRIDE, configs, stamp, value_of
from ldm.cli.targets import check_targets
from ldm.data.shards import write_atomically

_SETTINGS_OF_SPEED = ("trainer.max_steps", "trainer.devices", "trainer.accelerator", "trainer.num_nodes",
                      "trainer.timeout", "trainer.accumulate_grad_batches", "trainer.strategy", "trainer.channels_last",
                      "trainer.checkpointing", "trainer.compile", "data.num_workers", "checkpoint.", "validation.",
                      "samples.")  # fmt: skip
_EXTRAS = ("adversarial", "perceptual", "repa", "ema.power", "lora.rank", "stage_one")  # of which a plan knows nothing
STOPPED_ITSELF = 3  # the exit code of a training that stopped for a fault of its own


def train(arguments: list[str]) -> int:
    """``ldm train``; returns the exit code, as docs/trust.md lists them."""
    from omegaconf import OmegaConf

    cfg, resume = compose(arguments)
    check_targets(OmegaConf.to_container(cfg, resolve=False))
    output, first = Path(cfg.output), rank() == 0
    if first and resume is None and (output / "checkpoints").exists():
        raise ValueError(f"output={output} holds a run already; go on with it by resume={output}, or name another")

    if cfg.trainer.get("slurm") is not None and "SLURM_JOB_ID" not in os.environ:
        return submit(cfg, arguments)

    from ldm import checkpoint
    from ldm.experiments.doctor import quick
    from ldm.provenance import environment
    from ldm.training.run import fit
    from ldm.training.speed import Layout, num_devices, resolve_precision

    num_devices(cfg.trainer, check=True)
    cfg.trainer.precision = resolve_precision(cfg.trainer.precision, cfg.trainer.accelerator)
    if cfg.get("stage_one") and (code := _autoencoder_first(cfg)):
        return code
    module, data, options = build(cfg)
    found = list(quick(module, data, options["trainer"], options["intervals"], output))
    for finding in found:
        if finding.level == "error":
            raise ValueError(finding.what)
    if first:
        output.mkdir(parents=True, exist_ok=True)
        # Not resolved: what an interpolation draws from the environment stays there.
        write_atomically(output / "config.yaml", OmegaConf.to_yaml(cfg).encode())
        origin = {**environment(), "index": data.train.index_hash}
        write_atomically(output / "environment.json", json.dumps(origin, indent=1).encode())
        sys.stderr.write("".join(f"{finding}\n" for finding in found))
        parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)
        sys.stdout.write(
            f"stage {cfg.stage}: {parameters:,} parameters, {data.amount}, "
            f"{cfg.trainer.max_steps} steps of {cfg.data.batch_size} on {cfg.trainer.accelerator} in "
            f"{cfg.trainer.precision}, {Layout.of(options['trainer'], cfg.stage == 'diffusion')}\n"
            f"results in {output}: checkpoints/ samples/ metrics.csv config.yaml. Ctrl-C saves and stops.\n"
        )
        sys.stdout.flush()
    new = resume is None or (cfg.get("stage_one") and not (output / "checkpoints").exists())
    folder = None if new else checkpoint.newest(output)
    outcome = fit(module, data, output, resume=folder, **options)
    # A launcher takes a process that ends with another code than 0 for a failure, and kills the first, which reports.
    return _report(cfg, output, outcome) if first else 0


def _autoencoder_first(cfg: Any) -> int:
    """Train ``stage_one``, or go on with it, into the run's own folder, for stage two; returns its exit code."""
    from omegaconf import OmegaConf

    from ldm.training.speed import num_devices

    if (devices := num_devices(cfg.trainer)) > 1 or isinstance(cfg.cache, str):
        rule = f"one device and no cache of its own (here {devices} and cache={cfg.cache}); set stage_one=null"
        raise ValueError(f"stage_one={cfg.stage_one} trains both stages on {rule}, autoencoder.weights=RUN")
    build(cfg, cached=False)  # over the autoencoder that it names, so that what is wrong with stage two is said at once
    run = Path(cfg.output) / "autoencoder"
    begun = (run / "checkpoints").exists()
    given = [f"resume={run}"] if begun else [f"experiment={cfg.stage_one}", f"seed={cfg.seed}", f"output={run}"]
    build(compose(given)[0])
    run.mkdir(parents=True, exist_ok=True)
    write_atomically(run.parent / "config.yaml", OmegaConf.to_yaml(cfg).encode())
    if code := train(given):
        sys.stderr.write(f"both stages go on with: resume={run.parent}\n")
    cfg.autoencoder.weights = str(run)
    return code


def submit(cfg: Any, arguments: Sequence[str]) -> int:
    """Hand the same command to SLURM, which runs it once a device; ``trainer.slurm`` are options of ``sbatch``."""
    output = Path(cfg.output)
    output.mkdir(parents=True, exist_ok=True)
    own = [] if any(argument.startswith(("resume=", "output=")) for argument in arguments) else [f"output={output}"]
    options = {"nodes": cfg.trainer.num_nodes, "ntasks-per-node": cfg.trainer.devices, **cfg.trainer.slurm}
    # SIGUSR1, two minutes before its time is over: save, and be queued again (ldm.training.guard).
    order = ["sbatch", "--parsable", "--requeue", "--signal=USR1@120", f"--output={output}/slurm-%j.log",
             "--open-mode=append", *(f"--{key}={value}" for key, value in options.items() if value is not None),
             f"--wrap=srun {shlex.join([sys.executable, '-m', 'ldm.cli', 'train', *arguments, *own])}"]  # fmt: skip
    done = subprocess.run(order, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"trainer=slurm: sbatch said {done.stderr.strip()!r}; see the options in trainer.slurm")
    sys.stdout.write(f"job {done.stdout.strip()} will train into {output}; its words: {output}/slurm-*.log\n")
    return 0


def doctor(arguments: list[str]) -> int:
    """``ldm doctor``; the exit code is 2 if something is wrong that makes the training fail."""
    from ldm.experiments.doctor import quick, thorough

    cfg, _ = compose(arguments)
    module, data, options = build(cfg, cached=False)
    found = [*quick(module, data, options["trainer"], options["intervals"], Path(cfg.output))]
    found += thorough(module, data, options["trainer"])
    epochs = f"{cfg.trainer.max_steps * cfg.data.batch_size / data.count:.1f} epochs, " if data.count else ""
    sys.stdout.write(
        "".join(f"{finding}\n" for finding in found)
        + f"{len(found)} findings; {data.amount}, {cfg.data.batch_size} a step on any number of devices, "
        f"{epochs}learning rate {cfg.optimizer.learning_rate:g}\n"
    )
    return 2 if any(finding.level == "error" for finding in found) else 0


def plan(arguments: list[str]) -> None:
    """``ldm plan``."""
    import torch
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from ldm.experiments import plan as planning
    from ldm.training.speed import Layout, num_devices, on_gpu, resolve_precision

    own = {"on": "here", "price": "0", **dict(a.split("=", 1) for a in arguments if a.startswith(("price=", "on=")))}
    arguments = [f"trainer.{a}" if a.startswith("devices=") else a for a in arguments]
    cfg, _ = compose([argument for argument in arguments if not argument.startswith(("price=", "on="))])
    check_targets(OmegaConf.to_container(cfg))
    check_numbers(cfg)
    price, here, size = value_of("price", own["price"]), own["on"] == "here", (cfg.data.height, cfg.data.width)
    if not isinstance(price, int | float) or not price >= 0:
        raise ValueError(f"price={price} must be a number, at least 0: of a device an hour")
    trainer: dict[str, Any] = OmegaConf.to_container(cfg.trainer, resolve=True)  # type: ignore[assignment]
    devices = num_devices(trainer, check=here)
    trainer["precision"] = resolve_precision(trainer["precision"], trainer["accelerator"]) if here else "bf16-mixed"
    layout, frozen, encode = Layout.of(trainer, cfg.stage == "diffusion"), 0, 0.0
    with torch.device("meta"):
        network = instantiate({k: cfg.autoencoder[k] for k in cfg.autoencoder if k != "weights"}, _convert_="all")
        if cfg.stage == "diffusion":
            frozen = sum(p.numel() for p in network.parameters()) + planning.TOWERS.get(cfg.unet.context_dim, 0)
            if not cfg.cache:
                encode = planning.flops(lambda: network.posterior(torch.randn(1, 3, *size)))
            network = instantiate(cfg.unet, _convert_="all")
            network.gradient_checkpointing = layout.checkpointing
    device = planning.published(own["on"], *size) if not here else planning.probe(
        cfg.stage, trainer["precision"], layout, torch.device("cuda" if on_gpu(trainer["accelerator"]) else "cpu")
    )  # fmt: skip
    steps, batch = trainer["max_steps"], cfg.data.batch_size
    work, memory, seconds = planning.Training(
        network, frozen, encode, size, batch, devices, trainer["accumulate_grad_batches"], trainer["strategy"] == "fsdp"
    ).on(device)
    muon = ["optimizer=muon"] if cfg.optimizer.get("method") == "muon" else []
    extras = ", ".join([*(key for key in _EXTRAS if OmegaConf.select(cfg, key)), *muon])
    uncounted = f"not counted: {extras}\n" if extras else ""
    hours, parts = steps * seconds / 3600, ", ".join(f"{name} {part / 1e9:.2f}" for name, part in memory.items())
    sys.stdout.write(
        f"{sum(p.numel() for p in network.parameters()):,} parameters, {work / 1e9:,.1f} GFLOP an image\n"
        f"memory a device: {sum(memory.values()) / 1e9:.2f} GB ({parts})\n"
        f"speed: {batch / seconds:,.1f} images/s on {devices} devices in {trainer['precision']}, {device.source}\n"
        f"{uncounted}{steps:,} steps of {batch:,}: {hours:,.1f} hours ({hours / 24:,.1f} days), "
        f"{hours * devices:,.1f} of devices"
        f"{f', cost {price * hours * devices:,.2f}' if price else ''}\n"
    )


def _report(cfg: Any, output: Path, outcome: Any) -> int:
    """Say how a training ended; returns the exit code."""
    if outcome.fault is not None:
        saved = f"not saved ({outcome.refused})" if outcome.refused else f"saved in {output}"
        sys.stderr.write(f"error: stopped at step {outcome.step}, {saved}: {outcome.fault}\n")
        return STOPPED_ITSELF
    if outcome.signal is not None:
        name = signal.Signals(outcome.signal).name
        sys.stderr.write(f"stopped by {name} at step {outcome.step}; go on with: resume={output}\n")
        return 128 + outcome.signal
    if cfg.stage == "diffusion":
        prompt = cfg.samples.prompts[0] if cfg.samples.prompts else "a red apple"
        then = f'sample it with: python sample.py model={output} "{prompt}"'
    else:
        then = f"train on its latents with: python train.py autoencoder.weights={output}"
    best = f" (best by validation: {outcome.best})" if outcome.best else ""
    sys.stdout.write(f"ended at step {outcome.step}{best}; {then}\n")
    return 0


def precompute(arguments: list[str]) -> None:
    """``ldm precompute``; a process of several takes its share of the parts."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    cfg, resume = compose(arguments)
    if resume is not None or cfg.stage != "diffusion" or not any(each.startswith("output=") for each in arguments):
        raise ValueError("the rule is: ldm precompute [experiment=NAME] [key=value ...] output=CACHE, of a stage two")
    if cfg.stage_one is not None:
        raise ValueError(f"stage_one={cfg.stage_one} is not trained yet; give autoencoder.weights=RUN stage_one=null")
    for resolve in (False, True):
        check_targets(OmegaConf.to_container(cfg, resolve=resolve), resolved=resolve)
    check_numbers(cfg)

    from ldm.batch import ranks
    from ldm.training.speed import num_devices

    rank, world = ranks()
    data, folder = instantiate(cfg.data, _convert_="all"), Path(cfg.output)
    if world == 1 and (devices := num_devices(dict(cfg.trainer))) > 1:
        return launch("precompute", devices, arguments)
    for name, encoding in data.encodings(encoders(cfg), cfg.validation.images).items():
        written, count = encoding.write(folder / name, rank, world), len(encoding.samples)
        sys.stdout.write(f"process {rank}: {written} parts of {folder / name} made ({count:,} samples in all)\n")
    if rank == 0:
        sys.stdout.write(f"train from it with: cache={folder}\n")


def rank() -> int:
    """This process's number among those of the training, as its launcher says: torchrun, SLURM, Lightning."""
    return int(next((os.environ[name] for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), "0"))


def compose(arguments: Sequence[str]) -> tuple[Any, Path | None]:
    """The config of a training, and the run it goes on with."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    bare = [argument for argument in arguments if not OVERRIDE.match(argument)]
    if bare:
        raise ValueError(f"{bare[0]!r} is no setting; write key=value, see --help")
    given = dict(argument.split("=", 1) for argument in arguments)
    if given.get("resume") in (None, "null", ""):
        with initialize_config_dir(str(configs()), version_base=None):
            cfg = hydra_compose("train", overrides=list(arguments))
        if cfg.output is None:
            name = f"outputs/{given.get('experiment', 'emoji/diffusion')}/{stamp()}"
            # The processes that Lightning starts later must not read another time from the clock.
            cfg.output = os.environ.get("LDM_OUTPUT", name) if rank() else name
            os.environ["LDM_OUTPUT"] = cfg.output
        requeued = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0 and (Path(cfg.output) / "checkpoints").is_dir()
        if not requeued:
            return cfg, None
        given = {"resume": cfg.output, **{k: v for k, v in given.items() if k.startswith(_SETTINGS_OF_SPEED)}}
    run = Path(given.pop("resume"))
    if not (run / "config.yaml").is_file():
        raise FileNotFoundError(f"resume={run}: no run there (it holds no config.yaml); give the folder of a training")
    cfg: Any = OmegaConf.load(run / "config.yaml")  # type: ignore[no-redef]
    cfg.output = str(run)  # it may have been moved
    cfg.checkpoint.setdefault("sharded", False)
    OmegaConf.set_struct(cfg, True)
    for key, value in given.items():
        if not key.startswith(_SETTINGS_OF_SPEED):
            raise ValueError(
                f"{key}={value} beside resume=: a resumed run keeps its own config; only speed and length may change "
                f"({', '.join(_SETTINGS_OF_SPEED)}); start a new run from its weights with init={run}"
            )
        OmegaConf.update(cfg, key, value_of(key, value))
    return cfg, run
