"""``train.py`` with faults planted in it, for tests that need real processes: python harness.py PLANT.json key=value …

The plant is a JSON object: ``keys`` (folder for what each rank read), ``slow`` (seconds a step), ``nan`` ([rank, step,
…]: steps whose loss is NaN on that rank), ``losses`` (file for loss and learning rate of each step).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ldm.cli import door, train
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.diffusion import DiffusionTraining
from ldm.training.guard import Guard


def plant(faults: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    begin = Guard.on_train_batch_start

    def on_train_batch_start(self: Guard, trainer: Any, module: Any, batch: Any, *args: Any) -> None:
        if "keys" in faults:
            with open(Path(faults["keys"]) / f"rank{trainer.global_rank}.jsonl", "a") as file:
                file.write(json.dumps([trainer.global_step, list(batch["key"])]) + "\n")
        time.sleep(faults.get("slow", 0))
        begin(self, trainer, module, batch, *args)

    Guard.on_train_batch_start = on_train_batch_start  # type: ignore[method-assign]
    watch = Guard._watch

    def _watch(self: Guard, trainer: Any, loss: float) -> None:
        if "losses" in faults and trainer.is_global_zero:
            with open(faults["losses"], "a") as file:
                file.write(json.dumps([loss, trainer.optimizers[0].param_groups[0]["lr"]]) + "\n")
        watch(self, trainer, loss)

    Guard._watch = _watch  # type: ignore[method-assign]
    rank, *steps = faults.get("nan", [-1])
    for kind in (AutoencoderTraining, DiffusionTraining):
        kind.training_step = _with_nan(kind.training_step, rank, steps)  # type: ignore[method-assign]


def _with_nan(original: Any, rank: int, steps: list[int]) -> Any:
    def training_step(self: Any, batch: Any) -> Any:  # Lightning looks at the names of the arguments
        loss = original(self, batch)
        return loss * float("nan") if self.global_rank == rank and self.global_step in steps else loss

    return training_step


if __name__ == "__main__":
    plant(json.loads(Path(sys.argv[1]).read_text()))
    sys.exit(door(train, sys.argv[2:]))
