"""Stage two on images of three sizes, two of them of odd latents: killed, moved, in micro-batches, the run is one."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import checkpoint
from ldm.cli import door, main, train
from ldm.data import write_shard
from ldm.training.diffusion import DiffusionTraining
from tests.training.test_training import AUTOENCODER, arguments, column, unet, weights
from tests.training.test_trust import (
    assert_identical,
    read_keys,  # noqa: F401
    start,
    wait_for,
)

pytestmark = pytest.mark.usefixtures("one_thread")
BUCKETS = "data.buckets=[[32,32],[24,40],[40,24]]"  # latents of 4×4, 3×5, 5×3


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images: 20 square, 12 wide, 8 tall."""
    folder = tmp_path_factory.mktemp("mixed")
    samples = []
    for i in range(40):
        width, height = (32, 32) if i < 20 else (60, 36) if i < 32 else (30, 50)
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        samples.append((f"k{i:02d}", {"png": buffer.getvalue(), "txt": b"a red square" if i % 2 else b"a green disc"}))
    write_shard(folder / "a.tar", samples)
    return folder


@pytest.fixture
def settings(mixed: Path, parts: tuple[Path, Path]) -> Any:
    def build(output: Path, steps: int, *more: str) -> list[str]:
        quiet = ("samples.every=0", "optimizer.decay=constant", "validation.every=1000", "checkpoint.every=3")
        own = (*unet(*parts), *quiet, "cache=false", BUCKETS)
        return arguments(mixed, output, "diffusion", steps, *own, *more)

    return build


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Height and width of the images of each micro-batch of trainings in this process from now on."""
    seen: list[tuple[int, ...]] = []
    encode = DiffusionTraining.encode

    def _encode(self: Any, batch: dict[str, Any], noisy: bool = True) -> Any:
        if noisy:
            seen.append(tuple(batch["image"].shape[2:]))
        return encode(self, batch, noisy)

    monkeypatch.setattr(DiffusionTraining, "encode", _encode)
    return seen


def bucket(key: str) -> tuple[int, int]:
    number = int(key[1:])
    return (32, 32) if number < 20 else (24, 40) if number < 32 else (40, 24)


def test_after_kill_9_a_run_with_buckets_is_the_uninterrupted_one_to_the_bit(
    settings: Any,
    tmp_path: Path,
    read_keys: list[list[str]],  # noqa: F811
    sizes: list[tuple[int, ...]],
) -> None:
    run = tmp_path / "killed"
    process = start({"slow": 0.05}, settings(run, 100_000), tmp_path)
    wait_for(lambda: (run / "checkpoints/step-00000006").exists(), process)
    process.kill()
    process.wait()
    last = int(checkpoint.newest(run).name.removeprefix("step-"))
    torch.manual_seed(last)
    assert door(train, [f"resume={run}", f"trainer.max_steps={last + 4}", "data.num_workers=1"]) == 0
    resumed = list(read_keys)
    read_keys.clear()
    sizes.clear()
    torch.manual_seed(0)
    assert door(train, settings(tmp_path / "whole", last + 4)) == 0
    assert resumed == read_keys[last:]
    assert_identical(run, tmp_path / "whole")
    assert [{bucket(key) for key in keys} for keys in read_keys] == [{size} for size in sizes]
    # Of 40 samples in batches of 8, ⌊20/8⌋ + ⌊12/8⌋ + ⌊8/8⌋ steps are the first epoch.
    assert sorted(sizes[:4]) == [(24, 40), (32, 32), (32, 32), (40, 24)]
    assert len({key for keys in read_keys[:4] for key in keys}) == 32


def test_two_ranks_and_micro_batches_read_the_positions_of_one_and_end_with_the_same_weights(
    settings: Any,
    tmp_path: Path,
    read_keys: list[list[str]],  # noqa: F811
) -> None:
    more = ("optimizer.eps=1e-4",)  # of biases whose gradient is rounding alone Adam would make steps
    assert door(train, settings(tmp_path / "whole", 6, *more)) == 0
    whole = [sorted(keys) for keys in read_keys]
    process = start({"keys": str(tmp_path)}, settings(tmp_path / "two", 6, "trainer.devices=2", *more), tmp_path)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr.decode()[-3000:]
    ranks = [[json.loads(line) for line in (tmp_path / f"rank{r}.jsonl").read_text().splitlines()] for r in (0, 1)]
    assert [sorted(a + b) for (_, a), (_, b) in zip(*ranks, strict=True)] == whole
    read_keys.clear()
    assert door(train, settings(tmp_path / "micro", 6, "trainer.accumulate_grad_batches=2", *more)) == 0
    assert [sorted(a + b) for a, b in zip(read_keys[::2], read_keys[1::2], strict=True)] == whole
    one = weights(tmp_path / "whole")
    for other in ("two", "micro"):
        for name, tensor in weights(tmp_path / other).items():
            # measured 1.5e-8: two sums of four for one of eight
            torch.testing.assert_close(tensor, one[name], rtol=0, atol=1e-7, msg=name)


def test_stage_one_trains_on_buckets_too_and_validates_at_one_size(
    mixed: Path,
    tmp_path: Path,
    read_keys: list[list[str]],  # noqa: F811
) -> None:
    run = tmp_path / "run"
    more = (*AUTOENCODER, "samples.every=2", "validation.every=4", BUCKETS)
    assert door(train, arguments(mixed, run, "autoencoder", 4, *more)) == 0
    assert {frozenset(map(bucket, keys)) for keys in read_keys} == {
        frozenset({size}) for size in ((32, 32), (24, 40), (40, 24))
    }
    assert len(column(run, "val/psnr_ema")) == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("cache=true",), "data.buckets needs images, the cache is of one size: set cache=false, or buckets=null"),
        (("data.window=2",), "data.window=2 with data.buckets"),
        (("data.buckets=[]",), "the rule is a list of [height, width] in pixels"),
        (("data.buckets=[[32,36]]",), "each a multiple of 8"),
        (("data.buckets=[32,32]",), "each a multiple of 8"),
        (("data.buckets=[[32,32],[64,64]]",), "two are of one shape"),
        (("data.batch_size=0",), "data.batch_size=0"),
    ],
)
def test_what_does_not_go_with_buckets_is_one_line(
    more: tuple[str, ...], said: str, settings: Any, tmp_path: Path, capsys: Any
) -> None:
    assert door(train, settings(tmp_path / "run", 1, *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error
    assert not (tmp_path / "run").exists()


def test_precompute_refuses_buckets_in_one_line(settings: Any, tmp_path: Path, capsys: Any) -> None:
    assert main(["precompute", *settings(tmp_path / "cache", 1)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "data.buckets needs images" in error


def test_a_run_is_not_resumed_with_other_buckets(settings: Any, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    assert door(train, settings(run, 3)) == 0
    config = (run / "config.yaml").read_text()
    assert config.count("- 24\n") == 2
    (run / "config.yaml").write_text(config.replace("- 24\n", "- 16\n"))
    capsys.readouterr()
    assert door(train, [f"resume={run}", "trainer.max_steps=4"]) == 2
    assert "buckets was [[24, 40], [32, 32], [40, 24]], now [[16, 40], " in capsys.readouterr().err
