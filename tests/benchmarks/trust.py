"""What trust costs: the guard's part of a training step, and a checkpoint against ``torch.save``.

python -m tests.benchmarks.trust      # into docs/trust.md; about five minutes
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytorch_lightning as pl
import torch

from ldm.cli.building import build
from ldm.cli.training import compose
from ldm.evaluation.report import table
from ldm.training.checkpointing import FolderIO
from ldm.training.guard import Guard
from ldm.training.run import fit
from tests.benchmarks.common import machine, write

STEPS, SKIP = 40, 10


def measure(stage: str, folder: Path) -> dict[str, float]:
    """Median seconds of a step, of the guard in it, of a checkpoint, and of ``torch.save`` with the same tensors."""
    spent: list[float] = []
    steps: list[float] = []
    saves: list[tuple[float, float]] = []

    def timed(method: Any, into: list[float]) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            start = time.perf_counter()
            result = method(*args, **named)
            into.append(time.perf_counter() - start)
            return result

        return call

    class Clock(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            self.start = time.perf_counter()

        def on_train_batch_end(self, *args: Any) -> None:
            steps.append(time.perf_counter() - self.start)

    original = FolderIO.save_checkpoint

    def save(self: FolderIO, state: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        start = time.perf_counter()
        original(self, state, path, storage_options)
        middle = time.perf_counter()
        contents = self.contents()
        middle, start = time.perf_counter(), middle - start
        everything = {"state": state, "parts": {n: m.state_dict() for n, m in contents.components.items()}}
        torch.save(everything, Path(path).parent / "plain.pt")
        saves.append((start, time.perf_counter() - middle))
        os.unlink(Path(path).parent / "plain.pt")

    guard_step, guard_start = Guard.on_before_optimizer_step, Guard.on_train_batch_start
    Guard.on_before_optimizer_step = timed(guard_step, spent)  # type: ignore[method-assign]
    FolderIO.save_checkpoint = save  # type: ignore[method-assign]
    try:
        settings = [f"experiment=emoji/{stage}", f"output={folder}", f"trainer.max_steps={STEPS}", "samples.every=0",
                    "validation.every=1000", "validation.images=2", "checkpoint.every=8"]  # fmt: skip
        module, data, options = build(compose(settings)[0])
        module.configure_callbacks = lambda: [Clock()]  # type: ignore[method-assign,assignment]
        folder.mkdir()
        fit(module, data, folder, **options)
    finally:
        Guard.on_before_optimizer_step, Guard.on_train_batch_start = guard_step, guard_start  # type: ignore[method-assign]
        FolderIO.save_checkpoint = original  # type: ignore[method-assign]
    return {
        "step": statistics.median(steps[SKIP:]),
        "guard": statistics.median(spent[SKIP:]),
        "ours": statistics.median(own for own, _ in saves),
        "torch": statistics.median(plain for _, plain in saves),
    }


def main() -> None:
    rows = []
    with TemporaryDirectory() as folder:
        for stage in ("autoencoder", "diffusion"):
            found = measure(stage, Path(folder) / stage)
            share = found["guard"] / found["step"]
            a_thousand = found["ours"] / (1000 * found["step"])
            rows.append([stage, f"{found['step']:.3f}", f"{1e3 * found['guard']:.1f}", f"{share:.1%}",
                         f"{found['ours']:.2f}", f"{found['torch']:.2f}", f"{a_thousand:.2%}"])  # fmt: skip
    head = ["stage", "step, s", "guard with clipping, ms", "of a step", "checkpoint, s", "torch.save, s",
            "checkpoint every 1,000 steps, of the time"]  # fmt: skip
    write("trust.md", "cost", [f"{machine()}. Medians.", "", table(head, rows)])


if __name__ == "__main__":
    main()
