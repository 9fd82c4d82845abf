"""What a training and an evaluation read: samples as tensors, each a pure function of (seed, position)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset, Sampler

from ldm import randomness
from ldm.data.order import Order
from ldm.data.shards import Sample, ShardDataset
from ldm.data.transforms import decode_image, fit, to_tensor


@dataclass(frozen=True)
class Choice:
    """What stands at a position: the sample's number, its caption variant, flip, and crop in [0, 1] down and across."""

    number: int
    variant: int
    flip: bool
    crop: tuple[float, float]


def captions(sample: Sample) -> list[str]:
    """The caption variants of a sample: ``captions`` of its .json, else its .txt alone."""
    return list(sample.meta.get("captions") or [sample.caption])


class TrainingSet(Dataset[dict[str, Any]]):
    """Items by global position, from 0 without end: sample, caption variant, crop and flip hang on (seed, p) alone."""

    def __init__(
        self,
        samples: ShardDataset,
        seed: int,
        height: int,  # pixels
        width: int,  # pixels
        flip: bool = False,  # mirror half of the images
        random_crop: bool = False,  # else the centre
    ) -> None:
        self.samples, self.seed, self.height, self.width = samples, seed, height, width
        self.flip, self.random_crop = flip, random_crop
        self.order = Order(len(samples), seed)

    def choose(self, position: int, num_variants: int) -> Choice:
        """What stands at a position, of a sample with so many caption variants."""
        u = randomness.uniform(self.seed, "choice", position, 4)
        crop = (float(u[2]), float(u[3])) if self.random_crop else (0.5, 0.5)
        return Choice(self.order[position], int(u[0] * num_variants), self.flip and bool(u[1] < 0.5), crop)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """``image`` float32 (3, h, w) in [-1, 1], ``caption``, ``key``, ``position``."""
        sample = self.samples[self.order[position]]
        variants = captions(sample)
        choice = self.choose(position, len(variants))
        image = to_tensor(fit(decode_image(sample.image, sample.key), self.height, self.width, *choice.crop))
        return {
            "image": image.flip(-1) if choice.flip else image,
            "caption": variants[choice.variant],
            "key": sample.key,
            "position": position,
        }


class FixedSet(Dataset[dict[str, Any]]):
    """Samples in the order of their keys, first caption, centre crop: what evaluation reads."""

    def __init__(self, samples: ShardDataset, height: int, width: int) -> None:
        self.samples, self.height, self.width = samples, height, width

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """``image`` float32 (3, h, w) in [-1, 1], ``caption``, ``key``, ``position``."""
        sample = self.samples[number]
        image = to_tensor(fit(decode_image(sample.image, sample.key), self.height, self.width))
        return {"image": image, "caption": captions(sample)[0], "key": sample.key, "position": number}


class PositionSampler(Sampler[int]):
    """This rank's positions from optimiser step ``start`` to ``stop``: a contiguous slice of every micro-batch.

    A global batch is the positions [step · batch_size, (step + 1) · batch_size); with accumulation it is cut into
    micro-batches first, so that the sum over ranks and micro-batches is the same whatever their number.

    Raises:
        ValueError: if ranks × accumulation do not divide the batch.
    """

    def __init__(
        self,
        batch_size: int,  # per optimiser step, over all ranks
        start: int,  # first step
        stop: int,  # step after the last
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,  # micro-batches an optimiser step
    ) -> None:
        if batch_size < 1 or batch_size % (world_size * accumulation):
            raise ValueError(
                f"data.batch_size={batch_size} is not divided by {world_size} ranks × {accumulation} accumulation "
                f"steps; take a multiple of {world_size * accumulation}"
            )
        self.batch_size, self.start, self.stop = batch_size, start, stop
        self.rank, self.micro = rank, batch_size // (world_size * accumulation)
        self.world_size, self.accumulation = world_size, accumulation

    def __len__(self) -> int:
        """Positions from step 0 to the last, the ones before ``start`` counted too.

        A trainer that resumes counts the batches it has done against this length; were it the rest alone, it would
        take the end for near and begin anew.
        """
        return self.stop * self.accumulation * self.micro

    def __iter__(self) -> Iterator[int]:
        for step in range(self.start, self.stop):
            for part in range(self.accumulation):
                first = step * self.batch_size + (part * self.world_size + self.rank) * self.micro
                yield from range(first, first + self.micro)
