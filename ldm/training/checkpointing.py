"""Lightning's checkpoints in our format: a :class:`CheckpointIO` over ``ldm.checkpoint``."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import CheckpointIO

from ldm import checkpoint
from ldm.checkpoint import Contents
from ldm.training.ema import AVERAGE

WEIGHTS = "state_dict"  # Lightning's name for the module's weights


class FolderIO(CheckpointIO):
    """Writes the model as a checkpoint folder, and what only a training needs to its ``state.pt``."""

    def __init__(self, contents: Callable[[], Contents], cursor: dict[str, Any]) -> None:
        super().__init__()
        self.contents, self.cursor = contents, cursor
        self._last: Path | None = None

    def save_checkpoint(self, checkpoint_dict: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Called by Lightning on the first rank."""
        contents = self.contents()
        contents.settings["cursor"] = {**self.cursor, "step": checkpoint_dict["global_step"]}
        state = {key: value for key, value in checkpoint_dict.items() if key != WEIGHTS}
        prefixes = tuple(f"{name}." for name in contents.raw)
        state["rest"] = {k: v for k, v in checkpoint_dict[WEIGHTS].items() if not k.startswith(prefixes)}
        checkpoint.save(Path(path), contents, state, share=self._last)
        self._last = Path(path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        """Called by Lightning on every rank; every file is checked against its hash."""
        root, manifest = Path(path), checkpoint.read_manifest(path)
        state = checkpoint.read_state(root)
        weights = state.pop("rest")
        average = {}
        for name in manifest["components"]:
            if f"{name}.raw.safetensors" in manifest["files"]:
                raw = checkpoint.read_tensors(root, manifest, f"{name}.raw.safetensors")
                weights |= {f"{name}.{key}": value for key, value in raw.items()}
                average = checkpoint.read_tensors(root, manifest, f"{name}.safetensors")
        self._last = root
        return {**state, WEIGHTS: weights, AVERAGE: average}

    def remove_checkpoint(self, path: Any) -> None:
        """Called by Lightning for checkpoints that are no longer kept."""
        shutil.rmtree(path, ignore_errors=True)


class Folders(ModelCheckpoint):
    """Keeps the last k checkpoints as folders named by step."""

    FILE_EXTENSION = ""

    def __init__(self, run: Path, every: int, keep: int) -> None:
        super().__init__(
            dirpath=run / "checkpoints",
            filename="step-{step:08d}",
            auto_insert_metric_name=False,
            monitor="step",
            mode="max",
            save_top_k=keep,
            every_n_train_steps=every,
            enable_version_counter=False,
        )

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The last step is kept too, however the training ended."""
        if self._last_global_step_saved != trainer.global_step and trainer.global_step > 0:
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
        super().on_train_end(trainer, pl_module)


def no_pickle(kind: type, *arguments: Any, **named: Any) -> Any:
    """Stands where Lightning has ``load_from_checkpoint``, which unpickles a file or an address: ValueError."""
    raise ValueError(f"{kind.__name__}.load_from_checkpoint is refused: it would run a pickle; use ldm.load(RUN_DIR)")
