"""``ldm doctor``: names what will go wrong in a training before its first step. ``train.py`` runs the quick part."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm import randomness
from ldm.data import FixedSet, PositionSampler
from ldm.data.shards import index_path
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.data import DataModule
from ldm.training.diffusion import DiffusionTraining
from ldm.training.run import Intervals
from ldm.training.speed import num_devices

Module = AutoencoderTraining | DiffusionTraining
IMAGES = 64  # from which the scale of the latents is measured
STEPS = 4  # whose samples and noise are compared over ranks
TERMINAL = 0.02  # √ᾱ of the last timestep above which sampling from pure noise is seen in the pictures: SD's is 0.068


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: ``warning`` (it trains, and disappoints) or ``error`` (it fails)."""

    level: str
    what: str

    def __str__(self) -> str:
        return f"{self.level}: {self.what}"


def quick(
    module: Module, data: DataModule, trainer: dict[str, Any], intervals: Intervals, output: Path
) -> Iterator[Finding]:
    """What can be told from a training's settings alone, in milliseconds.

    ``trainer`` holds arguments of Lightning's Trainer, ``output`` is the run folder.
    """
    devices, accumulation = num_devices(trainer), trainer.get("accumulate_grad_batches", 1)
    batch, samples, rate = data.batch_size, data.count, module.optimizer.learning_rate
    if batch % (devices * accumulation):
        rule = f"{devices} devices × {accumulation} accumulation steps; take a multiple of {devices * accumulation}"
        yield Finding("error", f"data.batch_size={batch} is not divided by {rule}")
    if samples is not None and batch > samples:
        why = f"more than the {samples} samples there are: every batch repeats some; lower it"
        yield Finding("warning", f"data.batch_size={batch} is {why}")
    readers, there = devices * max(1, data.num_workers), data.train.shards
    if samples is None and readers > len(there):
        rule = f"at least one a reader: lower data.num_workers={data.num_workers} on {devices} devices"
        yield Finding("error", f"data.train.urls are {len(there)} shards for {readers} readers; the rule is {rule}")
    usual = 1e-3 * batch**0.5  # Adam's rate goes with the root of the batch (Malladi et al., 2205.10287)
    if rate > usual:
        why = f"a batch of {batch}, which is the same on any number of devices; {usual:.1e} is the most that is usual"
        yield Finding("warning", f"optimizer.learning_rate={rate:g} is high for {why}")
    if isinstance(module, DiffusionTraining):
        yield from _diffusion(module)
    need = checkpoint_bytes(module)
    free = shutil.disk_usage(next(p for p in (output, *output.absolute().parents) if p.is_dir())).free
    kept = intervals.keep + 2  # one is written beside the others, and the best may be a third
    if free < kept * need:
        left, each, all_of_them = (f"{size / 1e9:.2f}" for size in (free, need, kept * need))
        why = f"{left} GB left; {kept} checkpoints of {each} GB need {all_of_them}"
        said = f"the disk of {output} has {why}; lower checkpoint.keep, or name another output"
        yield Finding("warning" if free > 2 * need else "error", said)


def _diffusion(module: DiffusionTraining) -> Iterator[Finding]:
    if module.caption_dropout == 0.0:
        yield Finding("warning", "caption_dropout=0: the model never learns the null context, guidance will not work")
    alpha = float(module.model.schedule.alpha_bar[-1]) ** 0.5
    if alpha > TERMINAL:
        why = f"keeps {alpha:.3f} of the image (√ᾱ): sampling begins from pure noise, which training never shows"
        remedy = "use diffusion=linear, or diffusion.schedule.zero_terminal=true with diffusion.prediction=v"
        yield Finding("warning", f"the last timestep {why}; {remedy}")


def thorough(module: Module, data: DataModule, trainer: dict[str, Any]) -> Iterator[Finding]:
    """What must be read or computed to be told: seconds to minutes."""
    yield from _shards(data)
    yield from _ranks(module, data, num_devices(trainer))
    if isinstance(module, DiffusionTraining):
        null = module.model.text_encoder([""])[0]
        worst = float((module.model.null_context.to(null) - null).abs().max())
        if worst > 1e-3 * float(null.abs().max()):
            why = f"by up to {worst:.2g}: guidance would push away from something else"
            remedy = "train with the text tower that the weights had"
            yield Finding("error", f"the null context of the weights differs from the text tower's {why}; {remedy}")
        yield from _latents(module, data)


def _shards(data: DataModule) -> Iterator[Finding]:
    """Indexes that are no longer those of their shards, and images that are there twice."""
    samples = data.indexed
    shards = {*samples.shards, *data.validation.shards}
    for shard in sorted(shards, key=str):
        if isinstance(shard, Path) and index_path(shard).is_file():
            with open(shard, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if json.loads(index_path(shard).read_bytes())["sha256"] != digest:
                yield Finding("error", f"{shard} is not what its index describes: stale; run: ldm index {shard}")
    if twice := len(samples) - len({samples.image_digest(number) for number in range(len(samples))}):
        yield Finding("warning", f"{twice} of {len(samples)} images are there twice under other keys")


def _ranks(module: Module, data: DataModule, devices: int) -> Iterator[Finding]:
    """The samples and the noise that the ranks of a training draw must differ."""
    devices = max(2, devices)
    batch = -(-data.batch_size // devices) * devices
    positions = [list(PositionSampler(batch, 0, STEPS, rank, devices)) for rank in range(devices)]
    flat = [p for each in positions for p in each]
    if len(set(flat)) < len(flat):
        yield Finding("error", f"{len(flat) - len(set(flat))} of {len(flat)} positions are read by more than one rank")
    like = torch.zeros(1, 4, 4, 4)
    noise = [randomness.normals(module.seed, "noise", [p], like).numpy().tobytes() for p in flat]
    if len(set(noise)) < len(set(flat)):
        yield Finding("error", f"{len(noise) - len(set(noise))} of {len(noise)} samples get the noise of another one")


@torch.no_grad()
def _latents(module: DiffusionTraining, data: DataModule) -> Iterator[Finding]:
    """The latents that the UNet will see: of zero mean and unit variance a channel?"""
    items, encode = FixedSet(data.indexed, data.height, data.width), module.model.autoencoder.encode
    chosen = range(0, len(items), max(1, len(items) // IMAGES))
    z = torch.cat([encode(items[i]["image"][None]).transpose(0, 1).flatten(1) for i in chosen], dim=1)
    for channel, (mean, std) in enumerate(zip(z.mean(1).tolist(), z.std(1).tolist(), strict=True)):
        if not 0.7 < std < 1.4 or abs(mean) > 0.5:
            found = f"mean {mean:.2f} and std {std:.2f} over {len(chosen)} images, not 0 and 1"
            why = "this autoencoder's scale is not for these data; train one on them"
            yield Finding("error", f"channel {channel} of the latents has {found}: {why}")


def checkpoint_bytes(module: Module) -> int:
    """Of a checkpoint: the network in float32 raw, averaged and an ``ema.power``; the moments; what is frozen."""
    trained, frozen = sum(p.numel() for p in module.parameters() if p.requires_grad), 0
    network: torch.nn.Module
    if isinstance(module, DiffusionTraining):
        network, parts = module.model.unet, (module.model.autoencoder, module.model.text_encoder)
        frozen = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    else:
        network = module.autoencoder
    whole = sum(p.numel() for p in network.parameters())
    return 4 * (2 + len(module.ema.power)) * whole + 8 * trained + frozen
