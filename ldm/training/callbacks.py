"""What watches a training: speed, and pictures as files."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.callbacks import TQDMProgressBar

from ldm.data import FixedSet
from ldm.provenance import write_png
from ldm.samples import Samples
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.diffusion import DiffusionTraining


class Speed(pl.Callback):
    """Logs images/s over all devices, time for reading, validation and saving left out."""

    def __init__(self, batch_size: int, every: int = 10) -> None:
        self.batch_size, self.every = batch_size, every
        self._spent, self._steps, self._start = 0.0, 0, 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Stop it, and log now and then."""
        self._spent += time.perf_counter() - self._start
        self._steps += 1
        if self._steps == self.every:
            images = self.batch_size / trainer.accumulate_grad_batches * self._steps
            pl_module.log("images/s", images / self._spent, prog_bar=True)
            self._spent, self._steps = 0.0, 0


class Progress(TQDMProgressBar):
    """Micro-batches of the whole training; Lightning's bar counts epochs, and a resumed run has no total in it."""

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Set where it starts and ends; the rate is of what this process does."""
        super().on_train_start(trainer, *args)
        bar, a_step = self.train_progress_bar, trainer.accumulate_grad_batches
        bar.total = trainer.max_steps * a_step
        bar.initial = bar.n = trainer.global_step * a_step
        bar.refresh()

    def on_train_epoch_start(self, *args: Any) -> None:
        """Lightning's would begin at 0."""


class Pictures(pl.Callback):
    """Writes ``samples/step-….png`` every so many steps: drawn from prompts, or originals above reconstructions."""

    def __init__(self, folder: Path, every: int, prompts: Sequence[str], images: FixedSet, steps: int = 20) -> None:
        self.folder, self.every, self.prompts, self.images, self.steps = folder, every, list(prompts), images, steps
        self._done = -1

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Every so many optimiser steps."""
        step = trainer.global_step
        if self.every and step and step % self.every == 0 and step != self._done:
            self._done = step
            picture = self.draw(pl_module)  # on all ranks: none has all of a sharded model
            if trainer.is_global_zero:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_png(self.folder / f"step-{step:08d}.png", picture, {"step": step})

    @torch.no_grad()
    def draw(self, module: pl.LightningModule) -> Image.Image:
        """The picture."""
        if isinstance(module, DiffusionTraining):
            height, width = self.images.height, self.images.width
            return module.averaged_model().sample(self.prompts, steps=self.steps, height=height, width=width).grid()
        assert isinstance(module, AutoencoderTraining)
        x = torch.stack([self.images[i]["image"] for i in range(min(8, len(self.images)))]).to(module.device)
        model = module.ema.average
        shown = model.decode_raw(model.posterior(x).mode()).clamp(-1.0, 1.0)  # type: ignore[operator]
        both = torch.cat([x, shown]).float().cpu()
        none = torch.zeros(len(both), dtype=torch.bool)
        return Samples(both, both, [], [], none, none).grid(columns=len(x))
