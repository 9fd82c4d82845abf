"""One training from set-up to last checkpoint: what ``train.py`` calls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LearningRateMonitor, ModelSummary, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, Logger

from ldm import checkpoint
from ldm.data import FixedSet
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.callbacks import GracefulStop, Pictures, Speed
from ldm.training.checkpointing import FolderIO, Folders
from ldm.training.data import DataModule
from ldm.training.diffusion import DiffusionTraining


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


class Clip(pl.Callback):
    """Gradient clipping with its norm logged, and a refusal to go on from a gradient that is not finite."""

    def __init__(self, norm: float | None) -> None:
        self.clip = norm

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Clip by the global norm (which is also what is logged)."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip if self.clip else math.inf)
        if not torch.isfinite(norm):
            raise ValueError(
                f"the gradient became {norm.item()} at step {trainer.global_step}; lower optimizer.learning_rate, "
                "and resume from the last checkpoint"
            )
        pl_module.log("train/grad_norm", norm)


def fit(
    module: AutoencoderTraining | DiffusionTraining,
    data: DataModule,
    output: Path,
    trainer: dict[str, Any],  # arguments of Lightning's Trainer
    intervals: Intervals,
    prompts: Sequence[str] = (),  # of the sample grids
    loggers: Sequence[Logger] = (),
    resume: Path | None = None,  # a checkpoint folder
    clip: float | None = 1.0,  # of the gradient's global norm
) -> int:
    """Train to ``trainer['max_steps']``; returns the step it ended at, smaller if it was asked to stop.

    Raises:
        ValueError: if a resumed run's data, seed or batch are not those of its checkpoint.
    """
    cursor = {
        "seed": module.seed,
        "batch_size": data.batch_size,
        "samples": len(data.train),
        "index": data.train.index_hash,
    }
    if resume is not None:
        _check_cursor(checkpoint.read_manifest(resume)["settings"]["cursor"], cursor, resume)
    assert data.validation_set is not None
    fixed = data.validation_set if isinstance(data.validation_set, FixedSet) else data.validation_set.items  # type: ignore[attr-defined]
    stop = GracefulStop()
    accumulation = trainer.get("accumulate_grad_batches", 1)
    engine = pl.Trainer(
        **trainer,
        logger=[_csv(output, resume is not None), *loggers],
        callbacks=[
            module.ema,
            Clip(clip),
            Speed(data.batch_size),
            stop,
            Pictures(output / "samples", intervals.pictures, prompts, fixed),
            Folders(output, intervals.checkpoint, intervals.keep),
            LearningRateMonitor("step"),
            TQDMProgressBar(refresh_rate=10),
            ModelSummary(max_depth=1),
        ],
        plugins=[FolderIO(module.contents, cursor)],
        max_epochs=-1,
        val_check_interval=intervals.validation * accumulation,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        use_distributed_sampler=False,
        default_root_dir=str(output),
    )
    engine.fit(module, datamodule=data, ckpt_path=None if resume is None else str(resume))
    if stop.signal is not None:
        raise KeyboardInterrupt(f"stopped at step {engine.global_step}; go on with: resume={output}")
    return engine.global_step


def _csv(output: Path, resumed: bool) -> CSVLogger:
    """``metrics.csv`` in the run folder; Lightning's logger would delete that of the run which is resumed."""
    file = output / "metrics.csv"
    before = file.read_bytes() if resumed and file.is_file() else None
    logger = CSVLogger(output.parent, name=output.name, version="", flush_logs_every_n_steps=10)
    writer = logger.experiment
    if before is not None:
        file.write_bytes(before)
        writer.metrics_keys = before.split(b"\n", 1)[0].decode().strip().split(",")
    return logger


def _check_cursor(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    """A resumed run must read what it would have read."""
    different = [f"{name} was {old.get(name)}, now {new[name]}" for name in new if old.get(name) != new[name]]
    if different:
        raise ValueError(f"cannot resume from {folder}: {'; '.join(different)}; start a new run with init= instead")
