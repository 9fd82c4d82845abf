"""The global order: which sample stands at position p of a training, as a pure function of (seed, p)."""

from __future__ import annotations

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
        self._half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half)) - 1)

    def __getitem__(self, position: int) -> int:
        """Sample at a position: element p mod n of the permutation of epoch p // n."""
        return int(self.indices(np.array([position]))[0])

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Samples at many positions, int64, the shape of ``positions``."""
        positions = np.asarray(positions, dtype=np.int64)
        result = np.empty_like(positions)
        for epoch in np.unique(positions // self.n):
            here = positions // self.n == epoch
            keys = randomness.bits(self.seed, "order", int(epoch), _ROUNDS)
            value = self._encipher((positions[here] % self.n).astype(np.uint64), keys)
            while (outside := value >= self.n).any():
                value[outside] = self._encipher(value[outside], keys)
            result[here] = value.astype(np.int64)
        return result

    def _encipher(self, value: np.ndarray, keys: np.ndarray) -> np.ndarray:
        left, right = value >> self._half, value & self._mask
        for key in keys:
            # splitmix64's finaliser (Steele et al., OOPSLA 2014) as the round function
            x = right + key
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, (left ^ (x ^ (x >> np.uint64(31)))) & self._mask
        return (left << self._half) | right
