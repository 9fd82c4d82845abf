"""Moving averages of the trained weights, kept apart: nothing is ever swapped in place."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from ldm import averages
from ldm.training.lora import export_lora, factors
from ldm.unet import UNet

AVERAGE = "ldm_average"  # where the average travels inside the dictionary that Lightning hands about
BESIDE = "ldm_beside_average"  # and what of it a checkpoint's files do not hold
PARTS = ".parametrizations."  # in the names of what a weight is made of (LoRA)


class EMA(pl.Callback):
    """θ̄ ← θ̄ + (1 - d)(θ - θ̄) after every optimiser step, d = min(decay, (1 + k) / (10 + k)) at step k."""

    def __init__(self, module: nn.Module, decay: float = 0.999, power: Sequence[float] = ()) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"ema_decay={decay}: the rule is 0 <= decay < 1")
        self.decay, self.source = decay, module
        self.average = copy.deepcopy(module).eval().requires_grad_(False)  # with the averaged weights, in float32
        # Power-function averages by σ_rel (ldm.averages), written into the run beside each checkpoint.
        self.power = {round(sigma, 3): copy.deepcopy(self.average) for sigma in power if averages.exponent(sigma)}
        self._step = -1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The copies go where the model goes."""
        for average in (self.average, *self.power.values()):
            average.to(trainer.strategy.root_device)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What was averaged before a resume is not averaged again with the first micro-batch after it."""
        self._step = trainer.global_step

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The averages go on from where they were saved."""
        beside = checkpoint.get(BESIDE, {"parts": {}})
        saved, own = checkpoint[AVERAGE] | beside["parts"], self.average.state_dict()
        self.average.load_state_dict({name: value for name, value in saved.items() if name in own})
        for sigma, average in self.power.items():
            average.load_state_dict(beside[str(sigma)])

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """What a resume needs goes into the checkpoint; snapshots, and a LoRA for diffusers, into the run's folder."""
        parts = {name: value for name, value in self.average.state_dict().items() if PARTS in name}
        checkpoint[BESIDE] = {"parts": parts} | {str(s): average.state_dict() for s, average in self.power.items()}
        lora = self.average if isinstance(self.average, UNet) and any(factors(self.average)) else None
        # What is not finite is refused by the checkpoint, which says why.
        wanted = trainer.is_global_zero and (self.power or lora is not None)
        if wanted and all(p.isfinite().all() for p in self.average.parameters()):
            run = Path(trainer.default_root_dir)
            for sigma, average in self.power.items():
                profile = averages.Profile(sigma, trainer.global_step)
                averages.write(run / averages.FOLDER, profile, average.state_dict())
            if lora is not None:
                export_lora(lora, run / "pytorch_lora_weights.safetensors")

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Average once an optimiser step, however many micro-batches it has."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self.update(self._step)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights of optimiser step ``step`` (1 is the first) into the average."""
        values = [p.detach() for p in self.source.parameters()]
        decays = [min(self.decay, (1 + step) / (10 + step)), *(averages.decay(sigma, step) for sigma in self.power)]
        for average, decay in zip((self.average, *self.power.values()), decays, strict=True):
            torch._foreach_lerp_(list(average.parameters()), values, 1.0 - decay)
            for kept, value in zip(average.buffers(), self.source.buffers(), strict=True):
                kept.copy_(value)
