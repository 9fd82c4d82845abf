"""Moving averages of the trained weights, kept apart: nothing is ever swapped in place."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm import averages
from ldm.averages import Profile

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
        means, values = zip(*((a, p.detach()) for a, p in pairs), strict=True)
        torch._foreach_lerp_(means, values, 1.0 - decay)
        for average, value in zip(self.average.buffers(), self.source.buffers(), strict=True):
            average.copy_(value)


class PowerEMA(pl.Callback):
    """Power-function averages of several lengths (``ldm.averages``), written into the run beside each checkpoint."""

    def __init__(self, module: nn.Module, lengths: Sequence[float], run: Path) -> None:
        if len({f"{sigma:.3f}" for sigma in lengths}) < len(lengths):
            raise ValueError(f"ema.power={list(lengths)}: the rule is lengths that differ in three decimals")
        self.exponents = {round(sigma, 3): averages.exponent(sigma) for sigma in lengths}
        self.source, self.folder, self._step = module, run / averages.FOLDER, -1
        self.means: dict[float, dict[str, Tensor]] = {
            sigma: {name: value.detach().clone() for name, value in module.state_dict().items()}
            for sigma in self.exponents
        }

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """They go where the model is; see :meth:`EMA.on_train_start`."""
        self._step, device = trainer.global_step, trainer.strategy.root_device
        self.means = {sigma: {k: v.to(device) for k, v in mean.items()} for sigma, mean in self.means.items()}

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Average once an optimiser step."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self.update(self._step)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights of optimiser step ``step`` (1 is the first) into the averages."""
        values = list(self.source.state_dict().values())
        for sigma, gamma in self.exponents.items():
            torch._foreach_lerp_(list(self.means[sigma].values()), values, 1.0 - averages.decay(gamma, step))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """A snapshot in half precision; the checkpoint itself takes them whole, for a resume."""
        if trainer.is_global_zero:
            for sigma, mean in self.means.items():
                averages.write(self.folder, Profile(sigma, trainer.global_step), mean)

    def state_dict(self) -> dict[str, Any]:
        """By length."""
        return {str(sigma): mean for sigma, mean in self.means.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See :meth:`state_dict`."""
        self.means = {float(sigma): mean for sigma, mean in state_dict.items()}
