"""FSDP: weights, gradients, Adam's moments and the average of a UNet shared out over the processes."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import keystr, tree_map, tree_map_with_path

from ldm import checkpoint
from ldm.checkpoint import Contents
from ldm.training.lora import factors
from ldm.unet import UNet
from ldm.unet.unet import Block


class Sharded(DDPStrategy):
    """Lightning's DDP with torch's ``fully_shard`` (FSDP2) in the place of its wrapper.

    Lightning's own FSDP strategies refuse CPUs, or write past a ``CheckpointIO``. From here checkpoints are gathered,
    or written by each process for itself (:func:`save`): they open anywhere, and go on with any number of devices.
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

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Share out what was gathered."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            owners = [p for group in optimizer.param_groups for p in group["params"]]
            shared = {i: {k: _like(v, owners[i]) for k, v in one.items()} for i, one in state["state"].items()}
            optimizer.load_state_dict({**state, "state": shared})

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Called on all ranks: they gather and the first one writes, or each writes its own."""
        try:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath)
        except (OSError, ValueError) as error:
            if self.is_global_zero:
                raise
            sys.stderr.write(f"error: {error}\n")
            raise SystemExit(0) from error  # a code would make the launcher kill the first, which is to report


def whole(tree: Any) -> Any:
    """A tree of tensors with every sharded one gathered; all ranks must call it."""
    return tree_map(lambda leaf: leaf.full_tensor().detach() if isinstance(leaf, DTensor) else leaf, tree)


def gathered(contents: Contents) -> Contents:
    """What a checkpoint holds, as it would be in one process; all ranks must call it."""
    for name, module in _shared_out(contents).items():
        contents.components[name].load_state_dict(whole(dict(module.state_dict())), assign=True)
    contents.raw = {name: whole(dict(weights)) for name, weights in contents.raw.items()}
    return contents


def _shared_out(contents: Contents) -> dict[str, UNet]:
    """The modules that are shared out; one without memory takes the place of each."""
    found = {name: m for name, m in contents.components.items() if isinstance(m, UNet) and type(m) is not UNet}
    for name, module in found.items():  # fully_shard has put a class of its own over UNet
        with torch.device("meta"):
            contents.components[name] = UNet(**module.arguments)
    return found


def save(target: Path, contents: Contents, state: dict[str, Any], share: Path | None = None) -> None:
    """``checkpoint.save`` by all ranks: each writes its own part of what is shared out, and the first one the rest.

    The chunks (n / R, ...) that rank r of R holds of tensors (n, ...) go to ``unet.shard-0000r-of-0000R.safetensors``,
    those of Adam's moments to ``state.shard-...``; in ``state.pt`` their names stand for them.

    Raises:
        ValueError, OSError: on all ranks, what is wrong on any of them; nothing of it is left then.
    """
    rank, moments = dist.get_rank(), {}

    def take(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, DTensor):
            return leaf
        moments[keystr(path)] = leaf
        return keystr(path)

    state = tree_map_with_path(take, state)
    shared: dict[str, Any] = {name: module.state_dict() for name, module in _shared_out(contents).items()}
    shared |= {f"{name}.raw": weights for name, weights in contents.raw.items()} | {"state": moments}
    contents.raw = {}
    ending = f"shard-{rank:05d}-of-{dist.get_world_size():05d}.safetensors"
    own = {f"{name}.{ending}": _own(weights, rank) for name, weights in shared.items()}

    def begin() -> None:
        for file, weights in own.items():
            checkpoint.check_finite(weights, f"{target}/{file}")
        if rank == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)

    with checkpoint.writing(target) as part:
        _together(begin)
        every = _together(lambda: {file: checkpoint.put(part / file, weights, {}) for file, weights in own.items()})
        shards = {file: entry for files in every for file, entry in files.items()}
        _together(lambda: rank or checkpoint.save(target, contents, state, share, shards))  # type: ignore[func-returns-value]


def _own(weights: Mapping[str, Any], rank: int) -> dict[str, torch.Tensor]:
    """The chunks of a rank that are not empty; the first one has all, and the tensors that every rank has whole."""
    local = {k: v.to_local() if isinstance(v, DTensor) else v for k, v in weights.items()}
    return {k: v for k, v in local.items() if rank == 0 or (v.numel() and v.shape != weights[k].shape)}


def _together(work: Callable[[], Any]) -> list[Any]:
    """What the work of each rank returns; if it fails on one, its error is raised on all."""
    try:
        own = work()
    except Exception as error:
        own = error
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    for result in every:
        if isinstance(result, Exception):
            raise result from own if isinstance(own, Exception) else None
    return every


def joined(folder: Path, manifest: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """The state of a training with the tensors in it that lie in shards."""
    if not checkpoint.listed(manifest["files"], "state.safetensors"):
        return state
    found = checkpoint.read_tensors(folder, manifest, "state.safetensors")
    return tree_map(lambda leaf: found.get(leaf, leaf) if isinstance(leaf, str) else leaf, state)


def _like(value: Any, owner: torch.Tensor) -> Any:
    if isinstance(owner, DTensor) and isinstance(value, torch.Tensor) and value.shape == owner.shape:
        return distribute_tensor(value.to(owner.device), owner.device_mesh, owner.placements)
    return value
