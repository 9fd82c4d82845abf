"""Number formats and convolutions to sample with: which there are, and which are the fastest that are exact enough."""

import timeit
from functools import cache

import torch

PRECISIONS = {
    "float32": torch.float32,
    "float32_winograd": torch.float32,  # the same numbers to 1e-5, by fewer products: see ldm.winograd
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def choose(name: str, device: torch.device) -> str:
    """A key of :data:`PRECISIONS`; ``"auto"`` measures.

    On a GPU, auto is bfloat16 where the GPU computes in it, else float16. On a CPU it is bfloat16, its weights
    prepacked, if a matrix product is 1.5 times as fast in it, else float32 with Winograd's convolutions: processors
    that have bfloat16 instructions differ by a factor of four in what they bring, so their names do not tell. float16
    is slow on CPUs and never chosen there.

    Raises:
        ValueError: for an unknown name, or one that does not fit the device.
    """
    if name == "auto":
        if device.type == "cuda":
            return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        return "bfloat16" if faster_in_bfloat16() > 1.5 else "float32_winograd"
    if name not in PRECISIONS:
        raise ValueError(f"precision={name!r} is unknown; choose one of auto, {', '.join(PRECISIONS)}")
    if name == "float32_winograd" and device.type != "cpu":
        raise ValueError(f"precision={name} is for CPUs; on {device.type} choose bfloat16 or float16")
    return name


@cache
def faster_in_bfloat16() -> float:
    """How much faster the CPU multiplies matrices so; in turns, as a busy moment must not decide. Once a process."""
    a, b = (torch.ones(1024, 1024, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    turns = [(timeit.timeit(lambda: a @ a, number=1), timeit.timeit(lambda: b @ b, number=1)) for _ in range(20)]
    full, half = map(min, zip(*turns, strict=True))
    return full / half
