"""Batches for Lightning: global positions in, this rank's slices out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader, Dataset

from ldm.autoencoder import Autoencoder
from ldm.data import FixedSet, PositionSampler, ShardDataset, TrainingSet
from ldm.data.buckets import check_sizes
from ldm.data.sets import check_policy
from ldm.data.stream import StreamedSet, WebStream
from ldm.text import TextEncoder
from ldm.training.cache import CachedSet, Encoding, collate
from ldm.training.checkpointing import no_pickle
from ldm.training.guard import ignore_signals

STREAMED = "data=stream is read as it comes: the rule is cache=false, data.window=null and data.buckets=null"


def drawn(draws: Callable[[dict[str, Any]], dict[str, Any]], items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch with what its samples draw, made by the process that reads them."""
    return draws(collate(items))


class DataModule(pl.LightningDataModule):
    """Training and validation batches of a data set; which sample stands where hangs on (seed, position) alone."""

    load_from_checkpoint: Any = classmethod(no_pickle)

    def __init__(
        self,
        train: ShardDataset | WebStream,
        validation: ShardDataset,
        height: int = 128,  # pixels
        width: int = 128,  # pixels
        batch_size: int = 32,  # per optimiser step, over all devices and micro-batches
        num_workers: int = 0,  # processes that read data, a device
        flip: bool = False,  # mirror half of the images
        random_crop: bool = False,  # else the centre
        on_bad: str = "error",  # a sample that cannot be read ends the training; "skip": another stands in for it
        window: int | None = None,  # shards whose samples stand together, of a set with a catalogue; None mixes all
        buckets: Sequence[Sequence[int]] | None = None,  # sizes, a step's batch of one; None: all of height × width
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"data.batch_size={batch_size} must be at least 1")
        check_policy(on_bad)
        self.train, self.validation = train, validation
        self.height, self.width, self.batch_size, self.num_workers = height, width, batch_size, num_workers
        self.flip, self.random_crop, self.on_bad, self.window = flip, random_crop, on_bad, window
        self.buckets = None if buckets is None else check_sizes(buckets)
        self.seed = 0
        self.train_set: Dataset[dict[str, Any]] | None = None
        self.validation_set: Dataset[dict[str, Any]] | None = None

    def prepare(
        self,
        seed: int,
        encoders: tuple[Autoencoder, TextEncoder] | None = None,  # the frozen models: train from what they make
        limit: int = 64,  # validation images
        folder: Path | None = None,  # of ``ldm precompute``; None computes it now, into memory
    ) -> None:
        """Fix the seed, and with ``encoders`` take the place of images and captions by the cache.

        Raises:
            ValueError: if a cache is asked for with random crops, buckets or a stream, or is stale; for buckets with a
                window, and a stream with either.
            OSError: if it is not complete, or damaged.
        """
        self.seed = seed
        size = (self.height, self.width)
        fixed = FixedSet(self._held_out(limit), *size, self.on_bad)
        self.validation_set = fixed
        if isinstance(self.train, WebStream):
            if encoders is not None or self.window is not None or self.buckets is not None:
                raise ValueError(STREAMED)
            return
        train = TrainingSet(
            self.train, seed, *size, self.flip, self.random_crop, self.on_bad,
            window=self.window, buckets=self.buckets, batch_size=self.batch_size,
        )  # fmt: skip
        self.train_set = train
        if encoders is not None:
            made = {
                name: encoding.in_memory() if folder is None else encoding.open(folder / name)
                for name, encoding in self.encodings(encoders, limit).items()
            }
            self.train_set, self.validation_set = CachedSet(train, made["train"]), CachedSet(fixed, made["validation"])

    def encodings(self, encoders: tuple[Autoencoder, TextEncoder], limit: int) -> dict[str, Encoding]:
        """What makes the cache of each of the two sets."""
        if isinstance(self.train, WebStream):
            raise ValueError(STREAMED)
        if self.random_crop:
            raise ValueError("data.random_crop=true needs images: set cache=false, or random_crop=false")
        if self.buckets is not None:
            raise ValueError("data.buckets needs images, the cache is of one size: set cache=false, or buckets=null")
        sets = (("train", self.train, self.flip), ("validation", self._held_out(limit), False))
        how = (self.on_bad, self.num_workers)
        return {name: Encoding(each, *encoders, self.height, self.width, flip, *how) for name, each, flip in sets}

    @property
    def indexed(self) -> ShardDataset:
        """The training samples by number, or in the place of a stream the validation samples."""
        return self.validation if isinstance(self.train, WebStream) else self.train

    @property
    def count(self) -> int | None:
        """Training samples; None where a stream does not know."""
        return None if isinstance(self.train, WebStream) else len(self.train)

    @property
    def amount(self) -> str:
        """How much there is to train on, in words."""
        if isinstance(self.train, WebStream):
            return f"a stream of {len(self.train.shards):,} shards, not exactly resumable"
        return f"{self.count:,} training images"

    def _held_out(self, limit: int) -> ShardDataset:
        every = max(1, len(self.validation) // limit)
        return self.validation.subset(range(0, len(self.validation), every)[:limit])

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """From the trainer's own step on, so that a resumed run goes on where it stopped."""
        trainer = self.trainer
        assert trainer is not None
        module: Any = trainer.lightning_module
        first, rank, world = trainer.global_step, trainer.global_rank, trainer.world_size
        accumulation = trainer.accumulate_grad_batches
        positions = PositionSampler(self.batch_size, first, trainer.max_steps, rank, world, accumulation)
        items: Any = self.train_set
        if isinstance(self.train, WebStream):
            how = (self.flip, self.random_crop, self.on_bad)
            items = StreamedSet(self.train, self.height, self.width, self.seed, first, None, *how, rank, world)
        return DataLoader(
            items,
            batch_size=positions.micro,
            sampler=None if isinstance(self.train, WebStream) else positions,
            collate_fn=partial(drawn, module.draws),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=ignore_signals,
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The fixed validation images, in order."""
        assert self.validation_set is not None
        return DataLoader(self.validation_set, batch_size=16, collate_fn=collate)

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Positions stay on the CPU: who asks a GPU for them waits for all that it has been given to do."""
        positions = batch.pop("position")
        return {**super().transfer_batch_to_device(batch, device, dataloader_idx), "position": positions}
