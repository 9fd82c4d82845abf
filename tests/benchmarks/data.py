"""What reading costs: indexed shards beside plain WebDataset on the same tars, and the opening of very large sets.

    python -m tests.benchmarks.data          # writes docs/trust.md; about 4 minutes

Both readers decode with the same functions; WebDataset checks nothing, the indexed reader every member's sha256. The
large sets are made up: a catalogue of empty tars, and real indices for the shards that are read.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import webdataset
from torch.utils.data import DataLoader

from ldm.data import FixedSet, PositionSampler, ShardDataset, TrainingSet, decode_image, fit, to_tensor
from ldm.data.emoji import FOLDER
from ldm.evaluation.report import table
from tests.benchmarks.common import interleaved, machine, write

BATCH = 32
REPEATS = 5
PROCESSES = 3  # of a made-up set
INDEXED, PLAIN = "indexed, every member checked", "plain WebDataset"


def _decoded(sample: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    image = to_tensor(fit(decode_image(sample["webp"], sample["__key__"]), height, width))
    return {"image": image, "caption": sample["txt"].decode()}


def readers(tars: list[Path], workers: int) -> tuple[dict[str, int], dict[str, Callable[[], None]]]:
    """Samples of a pass, and the pass, by each reader."""
    data = ShardDataset(tars)
    steps = len(data) // BATCH

    def indexed() -> None:
        sampler = PositionSampler(BATCH, 0, steps)
        for _ in DataLoader(TrainingSet(data, 0, 128, 128), BATCH, sampler=sampler, num_workers=workers):
            pass

    def plain() -> None:
        stream = webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=len(tars), seed=0).shuffle(1000)
        loader = DataLoader(stream.map(partial(_decoded, height=128, width=128)), BATCH, num_workers=workers)
        seen = 0
        for batch in loader:
            seen += len(batch["caption"])
        assert seen == len(data)

    return {INDEXED: steps * BATCH, PLAIN: len(data)}, {INDEXED: indexed, PLAIN: plain}


def speed() -> None:
    """Samples a second."""
    tars = sorted(FOLDER.glob("[!o]*.tar"))
    rows = []
    for workers in (0, 2):
        counts, variants = readers(tars, workers)
        rates = {name: counts[name] / seconds for name, seconds in interleaved(variants, REPEATS).items()}
        rows += [[workers, name, f"{rate:.0f}", f"{rate / rates[PLAIN]:.2f}"] for name, rate in rates.items()]
    heads = ["workers", "reader", "samples/s", "of plain"]
    write("trust.md", "reading", [machine(), "", table(heads, rows)])


# --------------------------------------------------------------------------------------------------------------------


def made_up(folder: Path, shards: int, samples: int, real: int) -> None:
    """A set of so many shards and samples a shard; the first ``real`` have an index."""
    rows = []
    for shard in range(shards):
        tar, digest = folder / f"{shard:06d}.tar", "00" * 32
        tar.touch()
        if shard < real:
            places = {"txt": 600, "webp": 20_000}
            listed, offset = [], 512
            for row in range(samples):
                members = {}
                for extension, size in places.items():
                    members[extension] = [offset, size, hashlib.sha256(f"{row}{extension}".encode()).hexdigest()]
                    offset += 512 + -(-size // 512) * 512
                listed.append({"key": f"{shard:06d}{row:08d}", "members": members})
            content = json.dumps({"format": 1, "size": offset, "sha256": "", "samples": listed}, indent=0).encode()
            tar.with_name(f"{tar.name}.index.json").write_bytes(content)
            with open(tar, "r+b") as file:
                file.truncate(offset)  # a hole: it takes no room
            digest = hashlib.sha256(content).hexdigest()
        rows.append([tar.name, samples, digest])
    (folder / "catalogue.json").write_text(json.dumps({"format": 1, "shards": rows}))


def resident() -> float:
    """MB."""
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1024


def opened(folder: Path, window: int) -> None:
    """In a process of its own: open, ask the order, read the indices of two windows; print the figures."""
    FixedSet(ShardDataset(sorted(FOLDER.glob("openmoji*.tar"))), 128, 128)  # imports and caches are paid for
    before, start = resident(), time.perf_counter()
    data = ShardDataset(folder)
    items = TrainingSet(data, 0, 128, 128, window=window)
    items.order[0]
    seconds, megabytes = time.perf_counter() - start, resident() - before
    start = time.perf_counter()
    for position in range(0, len(data), len(data) // 2000):
        items.order[position]
    position_us = (time.perf_counter() - start) / 2000 * 1e6
    start = time.perf_counter()
    for shard in range(2 * window):
        data._index(shard)
    index_ms = (time.perf_counter() - start) / (2 * window) * 1e3
    sys.stdout.write(json.dumps([len(data), seconds, megabytes, position_us, index_ms, resident() - before]))


def large(window: int = 16) -> None:
    """Start-up and memory of made-up sets of 1e6 to 1e8 samples."""
    rows = []
    for shards, samples in ((100, 10_000), (1_000, 10_000), (10_000, 10_000), (100_000, 1_000)):
        with tempfile.TemporaryDirectory() as folder:
            made_up(Path(folder), shards, samples, 2 * window)
            command = [sys.executable, "-m", "tests.benchmarks.data", folder, str(window)]
            results = []
            for _ in range(PROCESSES):
                results.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        n, seconds, *rest = (statistics.median(each) for each in zip(*results, strict=True))
        rows.append([f"{n:.0e}", shards, f"{seconds:.2f}", *(f"{each:.0f}" for each in rest)])
        sys.stdout.write(f"{rows[-1]}\n")
    heads = ["samples", "shards", "opening, s", "opened, MB", "a position, µs", "an index, ms", "two windows, MB"]
    write("trust.md", "large", [machine(), "", table(heads, rows)])


if __name__ == "__main__":
    if len(sys.argv) == 3:
        opened(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        large()
        speed()
