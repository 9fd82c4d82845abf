"""Lightning's checkpoints in our format: a :class:`CheckpointIO` over ``ldm.checkpoint``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.plugins.io import CheckpointIO

from ldm import checkpoint
from ldm.checkpoint import Contents
from ldm.data.shards import write_atomically
from ldm.training import sharded
from ldm.training.ema import AVERAGE, PARTS

WEIGHTS = "state_dict"  # Lightning's name for the module's weights
SCORES = "scores.json"


class FolderIO(CheckpointIO):
    """Writes the model as a checkpoint folder, and what only a training needs to its ``state.pt``."""

    def __init__(self, contents: Callable[[], Contents], cursor: dict[str, Any], shards: bool = False) -> None:
        super().__init__()
        self.contents, self.cursor, self.shards = contents, cursor, shards
        self._last: Path | None = None
        self.ending = False  # what cannot be saved at the very end is noted, so that the reason of the end is told
        self.refused: str | None = None

    def save_checkpoint(self, checkpoint_dict: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Called by Lightning on the first rank; by FSDP on all, of which the first one writes, or each its shards."""
        try:
            self._save(checkpoint_dict, Path(path))
        except ValueError as error:  # weights that are not finite
            if not self.ending:
                raise
            self.refused = str(error)

    def _save(self, checkpoint_dict: dict[str, Any], path: Path) -> None:
        contents, save = self.contents(), sharded.save if self.shards else checkpoint.save
        state = {key: value for key, value in checkpoint_dict.items() if key != WEIGHTS}
        held = {f"{name}.{key}" for name, weights in contents.raw.items() for key in weights}
        state["rest"] = {k: v for k, v in checkpoint_dict[WEIGHTS].items() if k not in held}
        if not self.shards:
            contents, state = sharded.gathered(contents), sharded.whole(state)
            if dist.is_initialized() and dist.get_rank():
                return
        contents.settings["cursor"] = {**self.cursor, "step": checkpoint_dict["global_step"]}
        save(path, contents, state, share=self._last)
        self._last = path

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        """Called by Lightning on every rank; every file is checked against its hash."""
        root, manifest = Path(path), checkpoint.read_manifest(path)
        state = sharded.joined(root, manifest, checkpoint.read_state(root))
        weights = state.pop("rest")
        average = {}
        for name in manifest["components"]:
            if checkpoint.listed(manifest["files"], f"{name}.raw.safetensors"):
                raw = checkpoint.read_tensors(root, manifest, f"{name}.raw.safetensors")
                # Of a weight with factors (LoRA) the rest holds the parts, and the file what they make together.
                parted = {f"{name}.{key}" for key in raw} & {k.replace(PARTS, ".").removesuffix(".original")
                          for k in weights}  # fmt: skip
                weights |= {f"{name}.{key}": value for key, value in raw.items() if f"{name}.{key}" not in parted}
                average = checkpoint.read_tensors(root, manifest, f"{name}.safetensors")
        self._last = root
        return {**state, WEIGHTS: weights, AVERAGE: average}

    def remove_checkpoint(self, path: Any) -> None:
        """Called by Lightning for checkpoints that are no longer kept."""
        shutil.rmtree(path, ignore_errors=True)


class Folders(pl.Callback):
    """Saves every so many steps and at the end, as folders named by step; keeps the last k, and the best.

    The best is the one of the best validation among those that were validated at their own step; the run's
    ``scores.json`` keeps what each scored.
    """

    def __init__(self, run: Path, io: FolderIO, every: int, keep: int, metric: str, higher_is_better: bool) -> None:
        self.run, self.io, self.folder, self.every, self.keep = run, io, run / "checkpoints", every, keep
        self.metric, self.sign = metric, 1.0 if higher_is_better else -1.0
        self._saved = -1

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Clear away what a killed process left half-written."""
        self._saved = trainer.global_step
        if trainer.is_global_zero:
            for left in self.folder.glob(".step-*"):
                shutil.rmtree(left, ignore_errors=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lay Adam's moments as the weights lie: fused, it goes by memory, and the run may have had another layout."""
        for optimizer in trainer.optimizers:
            for weight, state in optimizer.state.items():
                state |= {k: torch.empty_like(weight).copy_(v) for k, v in state.items() if v.shape == weight.shape}

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Every so many optimiser steps."""
        if trainer.global_step % self.every == 0:
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last step is kept too, however the training ended."""
        self.io.ending = True
        self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Save this step, once; called on every rank."""
        if self._saved != trainer.global_step:
            self._saved = trainer.global_step
            trainer.save_checkpoint(self.folder / f"step-{trainer.global_step:08d}")
            self._prune(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note what the checkpoint of this step scored."""
        name = f"step-{trainer.global_step:08d}"
        if trainer.is_global_zero and (self.folder / name).is_dir() and self.metric in trainer.callback_metrics:
            scores = self.scores() | {name: float(trainer.callback_metrics[self.metric])}
            write_atomically(self.run / SCORES, json.dumps(scores, indent=1).encode())
            self._prune(trainer)

    def scores(self) -> dict[str, float]:
        """What each checkpoint that was validated scored."""
        file = self.run / SCORES
        scores: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}
        return {name: score for name, score in scores.items() if (self.folder / name).is_dir()}

    def best(self) -> str | None:
        """The name of the best one that was validated."""
        scores = self.scores()
        return max(scores, key=lambda name: self.sign * scores[name], default=None)

    def _prune(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero:
            names = sorted(path.name for path in self.folder.glob("step-*"))
            for name in set(names[: -self.keep]) - {self.best()}:
                shutil.rmtree(self.folder / name, ignore_errors=True)


def no_pickle(kind: type, *arguments: Any, **named: Any) -> Any:
    """Stands where Lightning has ``load_from_checkpoint``, which unpickles a file or an address: ValueError."""
    raise ValueError(f"{kind.__name__}.load_from_checkpoint is refused: it would run a pickle; use ldm.load(RUN_DIR)")
