"""One training from set-up to last checkpoint: what ``train.py`` calls."""

import logging
import os
import signal
import subprocess
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import wandb
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import CSVLogger, Logger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.strategies import DDPStrategy

from ldm import checkpoint
from ldm.data import FixedSet
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.callbacks import Pictures, Progress, Speed
from ldm.training.checkpointing import FolderIO, Folders
from ldm.training.data import DataModule
from ldm.training.diffusion import DiffusionTraining
from ldm.training.guard import Guard, Limits
from ldm.training.sharded import Sharded
from ldm.training.speed import Layout

OWN = ("timeout", "channels_last", "checkpointing", "compile", "slurm")  # settings that are not Lightning's


@dataclass(frozen=True)
class Intervals:
    """How often what happens, in optimiser steps."""

    checkpoint: int = 1000  # between checkpoints
    keep: int = 2  # how many of them are kept
    validation: int = 500  # between validations
    pictures: int = 1000  # between sample grids; 0 draws none

    def __post_init__(self) -> None:
        if min(self.checkpoint, self.keep, self.validation) < 1 or self.pictures < 0:
            raise ValueError(f"{self}: intervals and keep must be at least 1, pictures at least 0")


@dataclass(frozen=True)
class Outcome:
    """How a training ended."""

    step: int  # optimiser steps done
    best: str | None  # name of the checkpoint that scored best, of those that were validated
    signal: int | None = None  # that stopped it
    fault: str | None = None  # why it stopped by itself
    refused: str | None = None  # why its last step is not saved


def fit(
    module: AutoencoderTraining | DiffusionTraining,
    data: DataModule,
    output: Path,
    trainer: dict[str, Any],  # arguments of Lightning's Trainer, and OWN
    intervals: Intervals,
    prompts: Sequence[str] = (),  # of the sample grids
    loggers: Sequence[Logger] = (),
    resume: Path | None = None,  # a checkpoint folder
    clip: float | None = 1.0,  # of the gradient's global norm
    limits: Limits | None = None,
    shards: bool = False,  # each rank writes its own part of a checkpoint; under FSDP alone
) -> Outcome:
    """Train to ``trainer['max_steps']``, or until a signal or a fault stops it; the last step is saved either way.

    Raises:
        ValueError: if a resumed run's data, seed or batch are not those of its checkpoint.
    """
    cursor = {
        "seed": module.seed,
        "batch_size": data.batch_size,
        "samples": data.count,
        "index": data.train.index_hash,
        "window": data.window,
        "buckets": data.buckets,
        "on_bad": data.on_bad,
    }
    if resume is not None:
        _check_cursor(checkpoint.read_manifest(resume)["settings"]["cursor"], cursor, resume)
    assert data.validation_set is not None
    fixed = data.validation_set if isinstance(data.validation_set, FixedSet) else data.validation_set.items  # type: ignore[attr-defined]
    stage_one = isinstance(module, AutoencoderTraining)
    Layout.of(trainer, unet=not stage_one).apply(module)
    guard = Guard(limits or Limits(), output, clip)
    metric = "val/psnr_ema" if stage_one else "val/mse_ema"
    io = FolderIO(module.contents, cursor, shards)
    folders = Folders(output, io, intervals.checkpoint, intervals.keep, metric, higher_is_better=stage_one)
    # Advertisements, a remark on every run folder, which holds its config before its metrics, one on what Lightning
    # does to torch, and one that is not true here: the trainer's step alone says what is read next.
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", r"Experiment logs dir|`isinstance\(treespec|You're resuming from a")
    accumulation = trainer.get("accumulate_grad_batches", 1)
    slurm = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []  # Guard does the requeueing
    engine = pl.Trainer(
        **_strategy(trainer),
        logger=[_csv(output, resume is not None), *loggers],
        callbacks=[
            module.ema,
            guard,
            Speed(data.batch_size),
            Pictures(output / "samples", intervals.pictures, prompts, fixed),
            folders,
            LearningRateMonitor("step"),
            Progress(refresh_rate=10),
        ],
        plugins=[io, *slurm],
        max_epochs=-1,
        val_check_interval=intervals.validation * accumulation,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        use_distributed_sampler=False,
        enable_checkpointing=False,  # Folders does it
        enable_model_summary=False,
        default_root_dir=str(output),
    )
    engine.fit(module, datamodule=data, ckpt_path=None if resume is None else str(resume))
    if guard.signal == signal.SIGUSR1 and slurm and engine.is_global_zero:
        _requeue()
    if io.refused is not None and guard.fault is None and engine.is_global_zero:
        raise ValueError(io.refused)
    return Outcome(engine.global_step, folders.best(), guard.signal, guard.fault, io.refused)


def _requeue() -> None:
    """Ask SLURM to run this job again; ``train.py`` then goes on by itself."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        warnings.warn(f"job {job} is saved, but was not requeued ({error}); submit it again", stacklevel=2)


def _strategy(trainer: dict[str, Any]) -> dict[str, Any]:
    """Several processes by DDP or FSDP, which wait ``timeout`` seconds for each other: a lost rank ends the run."""
    arguments = {key: value for key, value in trainer.items() if key not in OWN}
    devices, nodes = arguments.get("devices", 1), arguments.get("num_nodes", 1)
    strategy, limit = arguments.pop("strategy", "ddp"), timedelta(seconds=trainer.get("timeout", 600))
    if strategy not in ("ddp", "fsdp"):
        raise ValueError(f"trainer.strategy={strategy} is unknown; choose ddp or fsdp")
    if strategy == "fsdp":
        arguments["strategy"] = Sharded(timeout=limit)
    elif (devices, nodes) != (1, 1):
        arguments["strategy"] = DDPStrategy(timeout=limit, gradient_as_bucket_view=True)
    return arguments


def _csv(output: Path, resumed: bool) -> CSVLogger:
    """``metrics.csv`` in the run folder; Lightning's logger would delete that of the run which is resumed."""
    file = output / "metrics.csv"
    before = file.read_bytes() if resumed and file.is_file() else None
    logger = CSVLogger(output.parent, name=output.name, version="", flush_logs_every_n_steps=10)
    writer = logger.experiment
    if before is not None and isinstance(writer, ExperimentWriter):  # a dummy on the other ranks
        file.write_bytes(before)
        writer.metrics_keys = before.split(b"\n", 1)[0].decode().strip().split(",")
    return logger


def check_wandb(node: Any) -> None:
    """ValueError if a config asks for wandb online and no key is there: in the first second, not after an epoch."""
    online = any(logger.get("mode") == "online" for logger in node["loggers"])
    if online and not wandb.api.api_key:
        raise ValueError(
            "logger=wandb: no API key; run `wandb login`, set WANDB_API_KEY, or log offline with logger.mode=offline"
        )


def _check_cursor(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    """A resumed run must read what it would have read."""
    different = [f"{name} was {old[name]}, now {new[name]}" for name in new.keys() & old if old[name] != new[name]]
    if different:
        listed = "; ".join(sorted(different))
        raise ValueError(f"cannot resume from {folder}: {listed}; start a new run with init= instead")
