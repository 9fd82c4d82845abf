"""What makes a training fast or small and changes its numbers by no more than their rounding (docs/scale.md)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ldm import precision
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.diffusion import DiffusionTraining

_PRECISIONS = {"bfloat16": "bf16-mixed", "float16": "16-mixed"}  # of ldm.precision → Lightning's


def resolve_precision(name: str, accelerator: str) -> str:
    """Lightning's name of a number format. ``auto`` is half the width where that is the faster one here.

    On a CPU that takes a bfloat16 product 1.5 times as fast as a float32 one, which is measured; the processes that a
    first one starts take over what it has measured.
    """
    if name != "auto":
        return name
    if "LDM_PRECISION" not in os.environ:
        device = torch.device("cuda" if on_gpu(accelerator) else "cpu")
        os.environ["LDM_PRECISION"] = _PRECISIONS.get(precision.choose("auto", device), "32-true")
    return os.environ["LDM_PRECISION"]


def on_gpu(accelerator: str) -> bool:
    """Whether a training on Lightning's ``accelerator`` computes on a GPU."""
    return accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())


@dataclass(frozen=True)
class Layout:
    """How the trained network is laid out and run.

    Attributes:
        channels_last: memory format of the UNet.
        checkpointing: its blocks compute their inner values again in the backward pass: a third more work.
        compile: by ``torch.compile``.
    """

    channels_last: bool
    checkpointing: bool
    compile: bool

    @staticmethod
    def of(trainer: Mapping[str, Any]) -> Layout:
        """What the settings of a trainer ask for; ``auto`` is what was the fastest, docs/scale.md says where.

        In bfloat16 a CPU's group norm takes ten times as long over channels-last as over plain memory. Compilation
        brings a CPU 2 % for minutes of waiting.

        Raises:
            ValueError: for a value that is none of true, false, auto, and for channels-last of a sharded UNet.
        """
        gpu, sharded = on_gpu(trainer["accelerator"]), trainer.get("strategy") == "fsdp"
        automatic = {
            "channels_last": (gpu or trainer["precision"] == "32-true") and not sharded,
            "checkpointing": False,
            "compile": gpu and not sharded,
        }
        chosen = {}
        for key, best in automatic.items():
            value = trainer.get(key, "auto")
            if value not in (True, False, "auto"):
                raise ValueError(f"trainer.{key}={value} is unknown; choose true, false or auto")
            chosen[key] = best if value == "auto" else value
        if chosen["channels_last"] and sharded:
            raise ValueError("trainer.channels_last=true: FSDP shards plain memory alone; leave it at auto")
        return Layout(**chosen)

    def __str__(self) -> str:
        names = [name.replace("_", "-") for name, on in vars(self).items() if on]
        return " and ".join(names) or "plain layout"

    def apply(self, module: AutoencoderTraining | DiffusionTraining) -> None:
        """Prepare a module for training. The autoencoder keeps its layout, and is no more than compiled.

        Raises:
            ValueError: if checkpointing is asked for in stage one.
        """
        if isinstance(module, DiffusionTraining):
            layout = torch.channels_last if self.channels_last else torch.contiguous_format
            for network in (module.unet, module.ema.average):
                network.to(memory_format=layout)  # type: ignore[call-overload]
            module.unet.gradient_checkpointing = self.checkpointing
            parts: list[torch.nn.Module] = [module.unet]
        else:
            if self.checkpointing:
                raise ValueError("trainer.checkpointing=true is for the UNet of stage two; leave it out")
            parts = [module.autoencoder.encoder, module.autoencoder.decoder]
        for part in parts if self.compile else []:
            part.compile()
