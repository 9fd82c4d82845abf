"""``train.py`` with faults planted in it, for tests that need real processes: python harness.py PLANT.json key=value …

The plant is a JSON object: ``keys`` (folder for what each rank read), ``slow`` (seconds a step), ``nan`` ([rank, step,
…]: steps whose loss is NaN on that rank), ``losses`` (file for loss and learning rate of each step), ``spoil`` ([rank,
step]: its weights hold NaN when they are saved), ``limit`` ([rank, step]: no file of its may then be longer than 1 kB),
``apart`` (true: a tensor that is gathered while a checkpoint is written is an error).
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ldm.cli import door, train
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.checkpointing import Folders
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
    save, full_tensor = Folders.save, DTensor.full_tensor

    def _save(self: Folders, trainer: Any) -> None:
        here = [trainer.global_rank, trainer.global_step]
        if faults.get("spoil") == here:
            with torch.no_grad():
                next(trainer.lightning_module.unet.parameters()).to_local().view(-1)[0] = float("nan")
        if faults.get("limit") == here:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        if "apart" in faults:
            DTensor.full_tensor = _refuse  # type: ignore[method-assign]
        save(self, trainer)
        DTensor.full_tensor = full_tensor  # type: ignore[method-assign]

    Folders.save = _save  # type: ignore[method-assign]


def _refuse(tensor: DTensor) -> torch.Tensor:
    raise AssertionError("a tensor was gathered")


def _with_nan(original: Any, rank: int, steps: list[int]) -> Any:
    def training_step(self: Any, batch: Any) -> Any:  # Lightning looks at the names of the arguments
        loss = original(self, batch)
        return loss * float("nan") if self.global_rank == rank and self.global_step in steps else loss

    return training_step


if __name__ == "__main__":
    plant(json.loads(Path(sys.argv[1]).read_text()))
    sys.exit(door(train, sys.argv[2:]))
