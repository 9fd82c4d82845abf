"""The global order: which sample stands at position p of a training, as a pure function of (seed, p)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ldm import randomness

_ROUNDS = 8


class Order:
    """A fresh permutation of n samples every epoch, by random access and without memory.

    A Feistel network (Luby & Rackoff, SIAM J. Comput. 17, 1988) over the next even number of bits, its round keys
    from Philox; what falls outside [0, n) is enciphered again until it falls inside (cycle walking, Black & Rogaway,
    CT-RSA 2002). It is our own, so that no release of NumPy can change it.
    """

    def __init__(self, n: int, seed: int) -> None:
        if n < 1:
            raise ValueError(f"an order of {n} samples: there must be at least one")
        self.n, self.seed = n, seed

    def __getitem__(self, position: int) -> int:
        """Sample at a position: element p mod n of the permutation of epoch p // n."""
        return int(self.indices(np.array([position]))[0])

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Samples at many positions, int64, the shape of ``positions``."""
        positions = np.asarray(positions, dtype=np.int64)
        result = np.empty_like(positions)
        for epoch in np.unique(positions // self.n):
            here = positions // self.n == epoch
            result[here] = permute(positions[here] % self.n, self.n, self.seed, "order", int(epoch))
        return result


class WindowedOrder:
    """An order in which the samples of few shards stand together.

    Every epoch permutes the shards, then the samples within each window of so many shards, by the same network: still
    a pure function of (seed, position), every sample once an epoch. Its memory is a few numbers a shard.
    """

    def __init__(
        self,
        counts: Sequence[int],  # samples of each shard
        window: int,  # shards
        seed: int,
    ) -> None:
        if window < 1:
            raise ValueError(f"data.window={window} shards: the rule is at least 1, or null to mix all")
        self.counts, self.window, self.seed = np.asarray(counts, dtype=np.int64), window, seed
        self.n = int(self.counts.sum())
        self._starts = np.cumsum(self.counts) - self.counts
        self._epoch = -1

    def __getitem__(self, position: int) -> int:
        """Sample at a position, counted shard by shard."""
        epoch, place = divmod(position, self.n)
        if epoch != self._epoch:
            shards = permute(np.arange(len(self.counts)), len(self.counts), self.seed, "shards", epoch)
            self._epoch, self._shards, self._ends = epoch, shards, np.cumsum(self.counts[shards])
        first = int(np.searchsorted(self._ends, place, "right")) // self.window * self.window
        begin = int(self._ends[first - 1]) if first else 0
        size = int(self._ends[min(first + self.window, len(self._ends)) - 1]) - begin
        place = begin + int(permute(np.array([place - begin]), size, self.seed, f"window {first}", epoch)[0])
        shard = int(np.searchsorted(self._ends, place, "right"))
        return int(self._starts[self._shards[shard]] + place - (self._ends[shard - 1] if shard else 0))


def permute(values: np.ndarray, n: int, seed: int, stream: str, position: int) -> np.ndarray:
    """Where a permutation of [0, n), one for each (seed, stream, position), takes some values; int64."""
    keys = randomness.bits(seed, stream, position, _ROUNDS)
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    value = _encipher(values.astype(np.uint64), half, keys)
    while (outside := value >= n).any():
        value[outside] = _encipher(value[outside], half, keys)
    return value.astype(np.int64)


def _encipher(value: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for key in keys:
        # splitmix64's finaliser (Steele et al., OOPSLA 2014) as the round function
        x = right + key
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        left, right = right, (left ^ (x ^ (x >> np.uint64(31)))) & mask
    return (left << half) | right
