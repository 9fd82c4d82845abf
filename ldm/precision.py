"""Number formats: which there are, and which is the fastest that is exact enough on a device."""

from __future__ import annotations

import time

import torch

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose(name: str, device: torch.device, own: torch.dtype) -> torch.dtype:
    """The type of a name; ``"auto"`` measures.

    On a GPU, auto is bfloat16 where the GPU computes in it, else float16. On a CPU it is bfloat16 if a matrix product
    is faster in it by a fifth, else float32: processors that have the instructions differ by a factor of four in what
    they bring, so their names do not tell. float16 is slow on CPUs and never chosen there.

    Raises:
        ValueError: for an unknown name, or float16 on a CPU.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        return torch.bfloat16 if seconds(torch.bfloat16) < 0.8 * seconds(torch.float32) else torch.float32
    if name not in PRECISIONS:
        raise ValueError(f"precision={name!r} is unknown; choose one of auto, {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def seconds(dtype: torch.dtype, size: int = 1024, repeats: int = 5) -> float:
    """The best time of a few square matrix products on the CPU: 2 · size³ FLOP each."""
    a = torch.ones(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return best
