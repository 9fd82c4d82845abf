"""FSDP: weights, gradients, Adam's moments and the average of a UNet shared out over the processes."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning.strategies import DDPStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from ldm.checkpoint import Contents
from ldm.training.lora import factors
from ldm.unet import UNet
from ldm.unet.unet import Block


class Sharded(DDPStrategy):
    """Lightning's DDP with torch's ``fully_shard`` (FSDP2) in the place of its wrapper.

    Lightning's own FSDP strategies refuse CPUs, or write past a ``CheckpointIO``. From here checkpoints are gathered:
    they are those of one process, open anywhere, and go on with any number of devices.
    """

    def configure_ddp(self) -> None:
        """Shard what is trained; the frozen parts stay whole on each device."""
        module: Any = self.lightning_module
        trained = getattr(module, "unet", None)
        if not isinstance(trained, UNet):
            raise ValueError("trainer=fsdp is for the UNet of stage two; train the autoencoder with trainer=ddp")
        if module.ema.power or module.alignment or any(factors(trained)):
            raise ValueError("trainer=fsdp does not go with ema.power, repa and lora.rank; take trainer=ddp for them")
        for unet in (trained, module.ema.average):
            for block in (m for m in unet.modules() if isinstance(m, Block)):
                fully_shard(block)
            fully_shard(unet, reshard_after_forward=True)  # the average has no backward pass, which would do it

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return whole(super().lightning_module_state_dict())

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return whole(super().optimizer_state(optimizer))

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Share out what was gathered."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            owners = [p for group in optimizer.param_groups for p in group["params"]]
            shared = {i: {k: _like(v, owners[i]) for k, v in one.items()} for i, one in state["state"].items()}
            optimizer.load_state_dict({**state, "state": shared})

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """All ranks gather; the first one writes."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath)


def whole(tree: Any) -> Any:
    """A tree of tensors with every sharded one gathered; all ranks must call it."""
    return tree_map(lambda leaf: leaf.full_tensor().detach() if isinstance(leaf, DTensor) else leaf, tree)


def gathered(contents: Contents) -> Contents:
    """What a checkpoint holds, as it would be in one process; all ranks must call it."""
    for name, module in contents.components.items():
        if isinstance(module, UNet) and type(module) is not UNet:  # fully_shard has put a class of its own over it
            with torch.device("meta"):
                contents.components[name] = UNet(**module.arguments)
            contents.components[name].load_state_dict(whole(dict(module.state_dict())), assign=True)
    contents.raw = {name: whole(dict(weights)) for name, weights in contents.raw.items()}
    return contents


def _like(value: Any, owner: torch.Tensor) -> Any:
    if isinstance(owner, DTensor) and isinstance(value, torch.Tensor) and value.shape == owner.shape:
        return distribute_tensor(value.to(owner.device), owner.device_mesh, owner.placements)
    return value
