"""Peak memory of sampling at the size of SD 1.5 on a CPU, by precision and size, a process each.

    python -m tests.benchmarks.memory        # writes docs/speed.md; about 5 minutes, up to 12 GB

The weights are random. One step with guidance and a decoding are enough: memory does not grow with the steps.
"""

from __future__ import annotations

import resource
import subprocess
import sys

import torch
from torch import nn

from ldm.autoencoder import Autoencoder
from ldm.diffusion import Schedule
from ldm.evaluation.report import table
from ldm.pipeline import Defaults, LatentDiffusion
from ldm.precision import PRECISIONS
from ldm.text import TextEncoder, clip_tokenizer
from ldm.unet import UNet
from tests.benchmarks.common import fill, machine, write

CASES = [
    (precision, size, tile)
    for precision in ("float32", "float32_winograd", "bfloat16")
    for size, tile in ((256, None), (512, None), (512, 32))
]


def _made(kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        module = kind()
    return fill(module.to(dtype).to_empty(device="cpu"))


def one(precision: str, size: int, tile: int | None) -> None:
    """Sample once, and print the weights' and the process's peak memory in GB."""
    dtype = PRECISIONS[precision]
    unet, autoencoder = _made(UNet, dtype), _made(Autoencoder, dtype)
    assert isinstance(autoencoder, Autoencoder)
    autoencoder.set_latent_scale(torch.zeros(4), torch.full((4,), 1 / 0.18215))
    text = TextEncoder("clip", clip_tokenizer()).to(dtype)
    schedule = Schedule("scaled_linear", 1000, 0.00085, 0.012)
    model = LatentDiffusion(unet, autoencoder, text, schedule, "epsilon", Defaults("leading", 7.5, 512, 512))  # type: ignore[arg-type]
    weights = sum(p.numel() * p.element_size() for m in (unet, autoencoder, text) for p in m.parameters())
    model.sample("a cat", steps=1, height=size, width=size, tile=tile, precision=precision)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sys.stdout.write(f"{weights / 1e9:.2f} {peak / 1e9:.2f}\n")


def main() -> None:
    """Every case in a process of its own, and the table."""
    rows = []
    for precision, size, tile in CASES:
        command = [sys.executable, "-m", "tests.benchmarks.memory", precision, str(size), str(tile or 0)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        weights, peak = done.stdout.split()
        rows.append([precision, f"{size}×{size}", "whole" if tile is None else f"tile={tile}", weights, peak])
        sys.stdout.write(f"{rows[-1]}\n")
        sys.stdout.flush()
    heads = ["precision", "pixels", "decoding", "weights, GB", "peak RSS, GB"]
    write("speed.md", "memory", [machine(), "", table(heads, rows)])


if __name__ == "__main__":
    if len(sys.argv) == 4:
        one(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) or None)
    else:
        main()
