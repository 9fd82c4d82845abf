"""What a training and an evaluation read: samples as tensors, each a pure function of (seed, position)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset, Sampler

from ldm import randomness
from ldm.data.buckets import Buckets
from ldm.data.dataset import Sample, ShardDataset
from ldm.data.order import Order, WindowedOrder
from ldm.data.transforms import BadSample, decode_image, fit, to_tensor

TRIES = 4  # samples that are tried for one position; where a quarter of all is bad, one position in 256 finds none
POLICIES = ("error", "skip")  # what becomes of a training that meets a bad sample: it ends, or another stands in


@dataclass(frozen=True)
class Choice:
    """What is made of the sample at a position: caption variant, flip, and crop in [0, 1] down and across."""

    variant: int = 0
    flip: bool = False
    crop: tuple[float, float] = (0.5, 0.5)


def captions(sample: Sample) -> list[str]:
    """The caption variants of a sample: ``captions`` of its .json, else its .txt alone."""
    return list(sample.meta.get("captions") or [sample.caption])


def chosen(seed: int, position: int, num_variants: int, flip: bool, random_crop: bool) -> Choice:
    """What is made, at a position, of a sample with so many caption variants."""
    u = randomness.uniform(seed, "choice", position, 4)
    crop = (float(u[2]), float(u[3])) if random_crop else (0.5, 0.5)
    return Choice(int(u[0] * num_variants), flip and bool(u[1] < 0.5), crop)


def made(sample: Sample, choice: Choice, position: int, height: int, width: int) -> dict[str, Any]:
    """``image`` float32 (3, h, w) in [-1, 1], ``caption``, ``key``, ``position``; BadSample if it is no picture."""
    image = to_tensor(fit(decode_image(sample.image, sample.key), height, width, *choice.crop))
    image = image.flip(-1) if choice.flip else image
    return {"image": image, "caption": captions(sample)[choice.variant], "key": sample.key, "position": position}


def check_policy(on_bad: str) -> None:
    """Raise ValueError unless it is one of POLICIES."""
    if on_bad not in POLICIES:
        raise ValueError(f"data.on_bad={on_bad} is unknown; choose one of {', '.join(POLICIES)}")


def candidates(number: int, seed: int, position: int, n: int, on_bad: str) -> list[int]:
    """The sample that stands at a position, and with ``on_bad="skip"`` those that stand in for it, one after the other.

    They are drawn by (seed, position) alone, so that ranks, workers, restarts and a cache agree about them.
    """
    check_policy(on_bad)
    stand_ins = range(1, TRIES if on_bad == "skip" else 1)
    return [number, *(randomness.integer(seed, f"substitute {i}", position, n) for i in stand_ins)]


def first_good(numbers: Sequence[int], read: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    """The item of the first number whose sample can be read; ``substituted`` is 1 if that is not the first number.

    Raises:
        BadSample: if none can be read.
    """
    faults: list[BadSample] = []
    for number in numbers:
        try:
            return {**read(number), "substituted": min(len(faults), 1)}
        except BadSample as error:
            faults.append(error)
    if len(faults) == 1:
        raise faults[0]
    raise BadSample(f"{len(faults)} samples in a row cannot be read, the first: {faults[0]}") from faults[0]


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
        on_bad: str = "error",  # a sample that cannot be read ends the training; "skip": another stands in for it
        window: int | None = None,  # shards whose samples stand together; None mixes all
        buckets: Sequence[Sequence[int]] | None = None,  # sizes, a step's batch of one; None: all of height × width
        batch_size: int = 0,  # per optimiser step; buckets need it
    ) -> None:
        self.samples, self.seed, self.height, self.width = samples, seed, height, width
        self.flip, self.random_crop, self.on_bad = flip, random_crop, on_bad
        self.order: Order | WindowedOrder | Buckets = Order(len(samples), seed)
        if buckets is not None:
            if window is not None:
                raise ValueError(f"data.window={window} with data.buckets: two orders; set one of them to null")
            self.order = Buckets(buckets, samples, batch_size, seed)
        elif window is not None:
            if samples.counts is None:
                raise ValueError(f"data.window={window} needs a folder with a catalogue; run: ldm index FOLDER")
            self.order = WindowedOrder(samples.counts, window, seed)
            samples.indices_kept = max(samples.indices_kept, 2 * window)  # a batch may lie across two windows

    def candidates(self, position: int) -> list[int]:
        """The samples that may stand at a position; see :func:`candidates`."""
        if isinstance(self.order, Buckets):
            _, members, place = self.order.at(position)
            return [int(members[i]) for i in candidates(place, self.seed, position, len(members), self.on_bad)]
        return candidates(self.order[position], self.seed, position, self.order.n, self.on_bad)

    def choose(self, position: int, num_variants: int) -> Choice:
        """What is made, at a position, of a sample with so many caption variants."""
        return chosen(self.seed, position, num_variants, self.flip, self.random_crop)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """``image`` float32 (3, h, w) in [-1, 1], ``caption``, ``key``, ``position``, ``substituted``."""
        height, width = self.order.at(position)[0] if isinstance(self.order, Buckets) else (self.height, self.width)
        return _item(self, position, height, width)


class FixedSet(Dataset[dict[str, Any]]):
    """Samples in the order of their keys, first caption, centre crop: what evaluation reads."""

    def __init__(self, samples: ShardDataset, height: int, width: int, on_bad: str = "error") -> None:
        self.samples, self.height, self.width, self.on_bad = samples, height, width, on_bad

    def __len__(self) -> int:
        return len(self.samples)

    def candidates(self, number: int) -> list[int]:
        """The samples that may stand at a position; see :func:`candidates`."""
        return candidates(number, 0, number, len(self), self.on_bad)

    def choose(self, number: int, num_variants: int) -> Choice:
        """The first caption and the centre, of every sample."""
        return Choice()

    def __getitem__(self, number: int) -> dict[str, Any]:
        """``image`` float32 (3, h, w) in [-1, 1], ``caption``, ``key``, ``position``, ``substituted``."""
        return _item(self, number, self.height, self.width)


def _item(items: TrainingSet | FixedSet, position: int, height: int, width: int) -> dict[str, Any]:
    def read(number: int) -> dict[str, Any]:
        sample = items.samples[number]
        return made(sample, items.choose(position, len(captions(sample))), position, height, width)

    return first_good(items.candidates(position), read)


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
