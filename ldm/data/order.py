"""The global order: which sample stands at position p of a training, as a pure function of (seed, p)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from ldm import randomness

_ROUNDS = 8
_WORD = (1 << 64) - 1


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
        epoch, place = divmod(position, self.n)
        return permute(place, self.n, self.seed, "order", epoch)


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
            n = len(self.counts)
            shards = np.array([permute(i, n, self.seed, "shards", epoch) for i in range(n)])
            self._epoch, self._shards, self._ends = epoch, shards, np.cumsum(self.counts[shards])
        first = int(np.searchsorted(self._ends, place, "right")) // self.window * self.window
        begin = int(self._ends[first - 1]) if first else 0
        size = int(self._ends[min(first + self.window, len(self._ends)) - 1]) - begin
        place = begin + permute(place - begin, size, self.seed, f"window {first}", epoch)
        shard = int(np.searchsorted(self._ends, place, "right"))
        return int(self._starts[self._shards[shard]] + place - (self._ends[shard - 1] if shard else 0))


def permute(value: int, n: int, seed: int, stream: str, position: int) -> int:
    """Where a permutation of [0, n), one for each (seed, stream, position), takes a value."""
    keys = _keys(seed, stream, position)
    value = _encipher(value, n, keys)
    while value >= n:
        value = _encipher(value, n, keys)
    return value


@lru_cache(maxsize=64)
def _keys(seed: int, stream: str, position: int) -> list[int]:
    return randomness.bits(seed, stream, position, _ROUNDS).tolist()


def _encipher(value: int, n: int, keys: list[int]) -> int:
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for key in keys:
        # splitmix64's finaliser (Steele et al., OOPSLA 2014) as the round function
        x = (right + key) & _WORD
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
        left, right = right, (left ^ x ^ (x >> 31)) & mask
    return (left << half) | right
