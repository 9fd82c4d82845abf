"""Random numbers as pure functions of what they are for (DESIGN: randomness).

Every number is drawn from a counter-based generator, Philox-4x64 (Salmon et al., SC 2011), addressed by
``(seed, stream, position)``: no state is carried from one draw to the next, so world size, workers, batch
size and restarts cannot change a result. Only NumPy's *bit generator* is used, whose raw output NEP 19 freezes
for ever; the step from bits to uniforms and normals is our own, because NumPy's may change between versions.
"""

import math
import zlib
from collections.abc import Sequence

import numpy as np
import torch

_MASK = (1 << 64) - 1


def bits(
    seed: int,  # any integer; taken modulo 2**64. Seed 0 is a seed
    stream: str,  # what the numbers are for, e.g. "noise"; streams are independent of each other
    position: int,  # which sample, image or step they are for, >= 0
    count: int,  # how many words
) -> np.ndarray:  # uint64 (count,)
    """Raw bits: ``count`` uint64, a pure function of the three addresses."""
    key = np.array([seed & _MASK, zlib.crc32(stream.encode())], dtype=np.uint64)
    # The low word of the counter is the one Philox increments: the address goes above it.
    counter = np.array([0, position, 0, 0], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def uniform(seed: int, stream: str, position: int, count: int = 1) -> np.ndarray:
    """Uniform numbers in [0, 1) with 53 bits, float64, shape (count,); see :func:`bits`."""
    return (bits(seed, stream, position, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def integer(seed: int, stream: str, position: int, high: int) -> int:
    """One integer in [0, high); see :func:`bits`. Bias is below high / 2**64."""
    return (int(bits(seed, stream, position, 1)[0]) * high) >> 64


def normal(seed: int, stream: str, position: int, shape: Sequence[int]) -> torch.Tensor:
    """Standard normal numbers by Box and Muller's transform (Ann. Math. Stat. 29, 1958): float32 on the CPU.

    Computed in float64 and rounded once, so machines whose ``log`` or ``cos`` differ in the last bit
    agree in float32 but for roundings at a tie.
    """
    count = math.prod(shape)
    pairs = (count + 1) // 2
    u = uniform(seed, stream, position, 2 * pairs)
    radius = np.sqrt(-2.0 * np.log1p(-u[:pairs]))  # 1 - u lies in (0, 1]: the logarithm is finite
    angle = 2.0 * np.pi * u[pairs:]
    values = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
    return torch.from_numpy(values.astype(np.float32)).reshape(tuple(shape))


def normals(seed: int, stream: str, positions: Sequence[int] | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A row of standard normal numbers for each position, shaped (and placed) as the rows of ``like``."""
    places = positions.tolist() if isinstance(positions, torch.Tensor) else list(positions)
    return torch.stack([normal(seed, stream, p, like.shape[1:]) for p in places]).to(like.device, like.dtype)
