"""What training from a cache costs to read, and how many cores feed a GPU with it.

    python -m tests.benchmarks.cache          # writes docs/trust.md; about 3 minutes

Two caches in folders, as `ldm precompute` writes them: emoji200 by the bundled model, and one of Stable Diffusion's
size, made up (512×512 pixels: latents of 4×64×64, contexts of 77×768). The pages are in memory: a disk must bring them
as fast.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from torch.utils.data import DataLoader

from ldm.data import PositionSampler, TrainingSet, emoji_dataset
from ldm.evaluation.report import table
from ldm.loading import load_autoencoder, load_text_encoder
from ldm.training import cache as caching
from ldm.training.cache import CachedSet, Encoding, LatentCache
from tests.benchmarks.common import machine, write

BATCH = 32
STEPS = 60  # batches a pass
REPEATS = 5
EATS = 400  # images/s that an H100 trains on, about
EMOJI, LARGE = "emoji200, 128×128", "made up, 512×512"


def emoji(folder: Path) -> CachedSet:
    """The training images of emoji200 by the bundled encoders."""
    samples = emoji_dataset("emoji200")
    made = Encoding(samples, load_autoencoder("emoji"), load_text_encoder("emoji"), 128, 128, True)
    made.write(folder)
    return CachedSet(TrainingSet(samples, 0, 128, 128, flip=True), made.open(folder))


def large(folder: Path) -> CachedSet:
    """One part of random numbers."""
    n, noise = caching.PART, torch.Generator().manual_seed(0)
    tensors = {f"moments {i} 0": torch.randn(2, 4, 64, 64, generator=noise) for i in range(n)}
    tensors |= {f"context {i}": torch.randn(77, 768, generator=noise) for i in range(n)}
    about = {
        "key": {},
        "samples": [(f"{i:04d}", [i]) for i in range(n)],
        "checksums": {name: caching._checksum(tensor) for name, tensor in tensors.items()},
    }
    folder.mkdir()
    safetensors.torch.save_file(tensors, folder / "part-000000.safetensors", {"part": json.dumps(about)})
    part = caching._open(folder, "{}", 0)
    items = TrainingSet(emoji_dataset("emoji").subset(range(n)), 0, 512, 512)
    return CachedSet(items, LatentCache([part].__getitem__, n))


def seconds() -> tuple[float, float]:
    """Of the clock, and of the cores: of this process and of those that it waited for."""
    spent = os.times()
    return time.perf_counter(), spent.user + spent.system + spent.children_user + spent.children_system


def passes(items: CachedSet, workers: int) -> Iterator[tuple[float, float]]:
    """Samples/s and cores, of each pass after one that is not counted; a pass has its own workers, as an epoch has."""
    for turn in range(REPEATS + 1):
        begun, burnt = seconds()
        for _ in DataLoader(items, BATCH, sampler=PositionSampler(BATCH, 0, STEPS), num_workers=workers):
            pass
        ended, burnt_then = seconds()
        if turn:
            yield BATCH * STEPS / (ended - begun), (burnt_then - burnt) / (ended - begun)


def main() -> None:
    """Both caches, by 0 to 2 workers."""
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, items in ((EMOJI, emoji(Path(folder) / "emoji")), (LARGE, large(Path(folder) / "large"))):
            item = items[0]
            kilobytes = sum(item[each].numel() * 4 for each in ("moments", "context")) / 1e3
            for workers in (0, 1, 2):
                rate, cores = (statistics.median(each) for each in zip(*passes(items, workers), strict=True))
                rows.append(
                    [name, f"{kilobytes:.0f}", workers, f"{rate:.0f}", f"{cores:.2f}", f"{EATS * cores / rate:.2f}"]
                )
    heads = ["cache", "KB a sample", "workers", "samples/s", "cores", f"cores for {EATS} samples/s"]
    write("trust.md", "cache", [machine(), "", table(heads, rows)])


if __name__ == "__main__":
    main()
