"""An exponential moving average of the trained weights, kept apart: nothing is ever swapped in place."""

from __future__ import annotations

import copy
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

AVERAGE = "ldm_average"  # where the average travels inside the dictionary that Lightning hands about


class EMA(pl.Callback):
    """θ̄ ← θ̄ + (1 - d)(θ - θ̄) after every optimiser step, d = min(decay, (1 + k) / (10 + k)) at step k.

    Attributes:
        average: a copy of the module with the averaged weights, in float32.
    """

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"ema_decay={decay}: the rule is 0 <= decay < 1")
        self.decay, self.source = decay, module
        self.average = copy.deepcopy(module).eval().requires_grad_(False)
        self._step = -1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The copy goes where the model goes."""
        self.average.to(trainer.strategy.root_device)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What was averaged before a resume is not averaged again with the first micro-batch after it."""
        self._step = trainer.global_step

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The average goes on from where it was saved."""
        self.average.load_state_dict(checkpoint[AVERAGE])

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Average once an optimiser step, however many micro-batches it has."""
        step = trainer.global_step
        if step == self._step:
            return
        self._step = step
        self.update(step)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights of optimiser step ``step`` (1 is the first) into the average."""
        decay = min(self.decay, (1 + step) / (10 + step))
        pairs = zip(self.average.parameters(), self.source.parameters(), strict=True)
        averages, values = zip(*((a, p.detach()) for a, p in pairs), strict=True)
        torch._foreach_lerp_(averages, values, 1.0 - decay)
        for average, value in zip(self.average.buffers(), self.source.buffers(), strict=True):
            average.copy_(value)
