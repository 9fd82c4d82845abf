"""What makes a training fast or small and changes its numbers by no more than their rounding (docs/scale.md)."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ldm import precision
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.diffusion import DiffusionTraining

_LIGHTNING = {"bfloat16": "bf16-mixed", "float16": "16-mixed"}  # names of ldm.precision → of Lightning


def resolve_precision(name: str, accelerator: str) -> str:
    """Lightning's name of a number format; ``auto`` is the faster one here, measured once for all processes."""
    if name != "auto":
        return name
    if "LDM_PRECISION" not in os.environ:  # which the processes that Lightning starts later inherit
        device = torch.device("cuda" if on_gpu(accelerator) else "cpu")
        os.environ["LDM_PRECISION"] = _LIGHTNING.get(precision.choose("auto", device), "32-true")
    return os.environ["LDM_PRECISION"]


def on_gpu(accelerator: str) -> bool:
    """Whether a training on Lightning's ``accelerator`` computes on a GPU."""
    return accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())


def num_devices(trainer: Mapping[str, Any], check: bool = False) -> int:
    """Processes of a training; where asked to ``check``, ValueError for GPUs that this machine has not."""
    devices, gpu = trainer.get("devices", 1), on_gpu(trainer["accelerator"])
    here = torch.cuda.device_count() if gpu else 1
    count = len(devices) if isinstance(devices, Sequence) and not isinstance(devices, str) else (
        max(1, here) if str(devices) in ("auto", "-1") else int(devices))  # fmt: skip
    if check and gpu and count > here:
        rule = "take trainer=cpu, fewer trainer.devices, or for a plan on=a100"
        raise ValueError(
            f"trainer.devices={devices} of accelerator {trainer['accelerator']}: torch sees {here} GPUs; {rule}"
        )
    return count * int(trainer.get("num_nodes", 1))


@dataclass(frozen=True)
class Layout:
    """How the trained network is run: memory format of the UNet, its blocks computed twice to save memory, compiled."""

    channels_last: bool
    checkpointing: bool
    compile: bool

    @staticmethod
    def of(trainer: Mapping[str, Any], unet: bool = True) -> "Layout":
        """What the settings of a trainer ask for; ``auto`` is what was the fastest, docs/scale.md says where.

        A CPU's group norm in bfloat16 takes ten times as long over channels-last; compilation brings a CPU 2 %.

        Raises:
            ValueError: for a value that is none of true, false, auto; for channels-last of a sharded UNet; and for what
                an autoencoder (``unet=False``), which is compiled at most, has not.
        """
        gpu, sharded = on_gpu(trainer["accelerator"]), trainer.get("strategy") == "fsdp"
        full = trainer["precision"] == "32-true"
        auto = {
            "channels_last": (gpu or full) and not sharded and unet,
            "checkpointing": False,
            "compile": gpu and not sharded,
        }
        asked = {key: trainer.get(key, "auto") for key in auto}
        for key, value in asked.items():
            if value not in (True, False, "auto"):
                raise ValueError(f"trainer.{key}={value} is unknown; choose true, false or auto")
        if sharded and asked["channels_last"] is True:
            raise ValueError("trainer.channels_last=true: FSDP shards plain memory alone; leave it at auto")
        for key in ("channels_last", "checkpointing"):
            if asked[key] is True and not unet:
                raise ValueError(f"trainer.{key}=true is for the UNet of stage two; leave it out")
        return Layout(**{key: auto[key] if value == "auto" else value for key, value in asked.items()})

    def __str__(self) -> str:
        return " and ".join(name.replace("_", "-") for name, on in vars(self).items() if on) or "plain layout"

    def apply(self, module: AutoencoderTraining | DiffusionTraining) -> None:
        """Prepare a module for training."""
        if isinstance(module, AutoencoderTraining):
            parts: list[torch.nn.Module] = [module.autoencoder.encoder, module.autoencoder.decoder]
        else:
            layout = torch.channels_last if self.channels_last else torch.contiguous_format
            for network in (module.unet, module.ema.average):
                network.to(memory_format=layout)  # type: ignore[call-overload]
            module.unet.gradient_checkpointing = self.checkpointing
            parts = [module.unet]
        for part in parts if self.compile else []:
            part.compile()
