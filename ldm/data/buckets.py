"""Aspect-ratio buckets: images of several sizes, one size a step, as a pure function of (seed, position)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ldm.data.dataset import ShardDataset
from ldm.data.order import permute


def check_sizes(sizes: Any) -> list[list[int]]:
    """Sizes [height, width], wide ones first; ValueError for what is no list of such, or of which two are one shape."""
    try:
        found = sorted(([height, width] for height, width in sizes), key=lambda size: size[0] / size[1])
        good = bool(found) and all(type(side) is int and side > 0 and side % 8 == 0 for size in found for side in size)
    except (TypeError, ValueError, ZeroDivisionError):
        good = False
    if not good:
        raise ValueError(
            f"data.buckets={sizes}: the rule is a list of [height, width] in pixels, each a multiple of 8, such as "
            "[[512,512],[384,640],[640,384]]; null has no buckets"
        )
    if len({height / width for height, width in found}) < len(found):
        raise ValueError(f"data.buckets={sizes}: two are of one shape, and all images would fall to one; leave one out")
    return found


class Buckets:
    """An order whose every step takes samples of one bucket: those whose shape is nearest to its size's.

    Nearest is by log(height / width). Bucket b of n_b samples has an endless order of its own, epoch after epoch
    permuted afresh (as :class:`ldm.data.order.Order`), which is cut into batches of B; ⌊E n_b / B⌋ of them are taken in
    the first E epochs, those of an epoch in a permuted order. So what does not fill a batch waits for the next epoch:
    after E epochs no sample was taken more than E times, and each bucket is behind by less than a batch.

    Raises:
        ValueError: for what :func:`check_sizes` refuses, and if an index does not tell the sizes of its images.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[int]],  # [height, width] in pixels
        samples: ShardDataset,  # all of its indices are read, and kept
        batch_size: int,  # per optimiser step
        seed: int,
    ) -> None:
        self.sizes, self.batch_size, self.seed = check_sizes(sizes), batch_size, seed
        if batch_size < 1:
            raise ValueError(f"buckets of batch_size={batch_size}: it must be at least 1")
        samples.indices_kept = len(samples.shards)
        images = samples.image_sizes().astype(float)
        images[(images == 0).any(1)] = 1.0  # a header that cannot be read: data.on_bad says what becomes of it
        shapes = np.array([height / width for height, width in self.sizes])
        # Halfway in the logarithm is the geometric mean. IEEE rounds / and √ alike everywhere, and not log.
        nearest = np.searchsorted(np.sqrt(shapes[1:] * shapes[:-1]), images[:, 0] / images[:, 1])
        self.counts = np.bincount(nearest, minlength=len(shapes))
        self.members = np.split(np.argsort(nearest, kind="stable"), np.cumsum(self.counts)[:-1])
        self.n = len(nearest)

    def __getitem__(self, position: int) -> int:
        """Sample at a position."""
        _, members, place = self.at(position)
        return int(members[place])

    def at(self, position: int) -> tuple[list[int], np.ndarray, int]:
        """Height and width at a position, the samples of its bucket, and which of those stands there."""
        step, row = divmod(position, self.batch_size)
        bucket, batch = self._batch(step)
        epoch, place = divmod(batch * self.batch_size + row, len(self.members[bucket]))
        place = permute(place, len(self.members[bucket]), self.seed, f"bucket {bucket}", epoch)
        return self.sizes[bucket], self.members[bucket], place

    def _batch(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and which of its batches, counted from the first step."""
        epoch = step * self.batch_size // self.n  # not too late, since Σ ⌊E n_b / B⌋ <= E n / B
        while (after := (epoch + 1) * self.counts // self.batch_size).sum() <= step:
            epoch += 1
        before = epoch * self.counts // self.batch_size
        ends = np.cumsum(after - before)
        place = permute(step - int(before.sum()), int(ends[-1]), self.seed, "buckets", epoch)
        bucket = int(np.searchsorted(ends, place, "right"))
        return bucket, int(after[bucket] - ends[bucket]) + place
