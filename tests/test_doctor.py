"""``ldm doctor`` names each fault that is planted, and nothing where there is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm import checkpoint, randomness
from ldm.autoencoder import Autoencoder
from ldm.cli import door
from ldm.cli.building import build
from ldm.cli.training import compose, doctor, train
from ldm.data import FixedSet, PositionSampler, ShardDataset, build_index, write_shard
from ldm.experiments.doctor import checkpoint_bytes
from tests.conftest import tiny_text
from tests.training.test_training import AUTOENCODER, arguments, streamed, unet


@pytest.fixture(scope="module")
def parts(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A text tower, and an autoencoder whose latent scale is that of the shapes."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    autoencoder, items = Autoencoder(widths=(32, 64), num_blocks=1, stem=4), FixedSet(ShardDataset(shapes), 32, 32)
    with torch.no_grad():
        mean = autoencoder.posterior(torch.stack([items[i]["image"] for i in range(24)])).mean
    autoencoder.set_latent_scale(mean.mean((0, 2, 3)), mean.std((0, 2, 3)))
    checkpoint.save(folder / "autoencoder", checkpoint.Contents({"autoencoder": autoencoder}))
    autoencoder.set_latent_scale(torch.zeros(4), torch.ones(4))
    checkpoint.save(folder / "unscaled", checkpoint.Contents({"autoencoder": autoencoder}))
    checkpoint.save(folder / "text", checkpoint.Contents({"text_encoder": tiny_text("clip")}))
    return folder / "text", folder / "autoencoder"


def findings(capsys: Any, code: int, settings: list[str]) -> list[str]:
    capsys.readouterr()
    said = door(doctor, settings), capsys.readouterr()
    assert said[0] == code, said[1]
    *lines, last = said[1].out.splitlines()
    assert last.startswith(f"{len(lines)} findings; ")
    return lines


@pytest.fixture
def healthy(shapes: Path, parts: tuple[Path, Path], tmp_path: Path) -> list[str]:
    return arguments(shapes, tmp_path / "run", "diffusion", 20, *unet(*parts), "optimizer.learning_rate=1e-3")


def test_it_finds_nothing_in_a_healthy_training_and_writes_nothing(
    healthy: list[str], tmp_path: Path, capsys: Any
) -> None:
    assert findings(capsys, 0, healthy) == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("code", "settings", "words"),
    [
        (0, ["caption_dropout=0"], "warning: caption_dropout=0: the model never learns the null context"),
        (0, ["diffusion=scaled_linear"], "warning: the last timestep keeps 0.068 of the image"),
        (0, ["data.batch_size=30"], "warning: data.batch_size=30 is more than the 24 samples there are"),
        (0, ["optimizer.learning_rate=0.01"], "is high for a batch of 8, which is the same on any number of devices"),
        (2, ["trainer.devices=3"], "error: data.batch_size=8 is not divided by 3 devices × 1 accumulation steps"),
        (2, ["autoencoder.weights=../unscaled"], "of the latents has mean"),
    ],
)
def test_a_planted_setting_is_named(
    code: int, settings: list[str], words: str, healthy: list[str], parts: tuple[Path, Path], capsys: Any
) -> None:
    settings = [s.replace("../", f"{parts[0].parent}/") for s in settings]
    lines = findings(capsys, code, [*healthy, *settings])
    assert any(words in line for line in lines), lines


def test_of_a_stream_it_looks_into_the_validation_samples(healthy: list[str], shapes: Path, capsys: Any) -> None:
    stream = [*streamed(shapes / "shapes.tar", *healthy), "data.num_workers=1", "cache=false"]
    assert findings(capsys, 0, stream) == []
    unscaled = next(each for each in stream if each.startswith("autoencoder.weights=")).replace(
        "/autoencoder", "/unscaled"
    )
    lines = findings(capsys, 2, [*stream, "data.num_workers=2", unscaled])
    assert any("data.train.urls are 1 shards for 2 readers" in line for line in lines)
    assert any("of the latents has mean" in line for line in lines)


def test_train_says_the_quick_part_itself(healthy: list[str], capsys: Any) -> None:
    more = ["caption_dropout=0", "trainer.max_steps=1", "samples.every=0"]
    assert door(train, [*healthy, *more]) == 0
    assert "warning: caption_dropout=0" in capsys.readouterr().err


def test_a_stale_index_and_images_that_are_there_twice_are_named(
    healthy: list[str], shapes: Path, tmp_path: Path, capsys: Any
) -> None:
    data = ShardDataset(shapes)
    rows = [(f"{key}{copy}", {"png": data[i].image, "txt": b"a disc"}) for i, key in enumerate(data.keys)
            for copy in ("a", "b")][:40]  # fmt: skip
    shard = tmp_path / "twice.tar"
    write_shard(shard, rows)
    settings = [*healthy, f"data.train.paths={shard}", f"data.validation.paths={shard}"]
    assert any("20 of 40 images are there twice" in line for line in findings(capsys, 0, settings))
    changed = bytearray(shard.read_bytes())
    changed[600] ^= 1  # the same size, another picture: the index is that of the old one
    shard.write_bytes(bytes(changed))
    settings += ["validation.images=1", "cache=false"]
    index = json.loads((tmp_path / "twice.tar.index.json").read_text())
    assert index["size"] == len(changed)
    lines = [line for line in _shards_only(settings) if "stale" in line]
    assert lines == [f"error: {shard} is not what its index describes: stale; run: ldm index {shard}"]


def _shards_only(settings: list[str]) -> list[str]:
    """What the reading of shards finds, without the decoding of images, which would end at the damaged one."""
    from ldm.experiments.doctor import _shards

    _, data, _ = build(compose(settings)[0], cached=False)
    return [str(finding) for finding in _shards(data)]


def test_the_same_samples_or_noise_on_two_ranks_are_named(
    healthy: list[str], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as planted:
        normal = randomness.normal
        planted.setattr(randomness, "normal", lambda seed, stream, position, shape: normal(seed, stream, 0, shape))
        lines = findings(capsys, 2, healthy)
        assert any("samples get the noise of another one" in line for line in lines)
    # Every rank reads rank 0's slice.
    original = PositionSampler.__init__
    monkeypatch.setattr(
        PositionSampler, "__init__", lambda self, b, start, stop, rank=0, world=1, acc=1: original(
            self, b, start, stop, 0, world, acc)
    )  # fmt: skip
    assert any("positions are read by more than one rank" in line for line in findings(capsys, 2, healthy))


def test_a_null_context_that_is_not_the_text_towers_is_named(
    healthy: list[str], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ldm.cli.training as door_of_training

    original = door_of_training.build

    def other(cfg: Any, cached: bool = True) -> Any:
        module, data, options = original(cfg, cached)
        module.model.null_context = module.model.null_context + 0.5
        return module, data, options

    monkeypatch.setattr(door_of_training, "build", other)
    lines = findings(capsys, 2, healthy)
    assert any("the null context of the weights differs from the text tower's by up to 0.5" in line for line in lines)


def test_a_disk_too_small_for_the_checkpoints_is_named_with_the_figure(
    shapes: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = arguments(shapes, tmp_path / "run", "autoencoder", 20, *AUTOENCODER, "optimizer.learning_rate=1e-3")
    need = checkpoint_bytes(build(compose(settings)[0])[0])
    usage = shutil.disk_usage(tmp_path)
    for free, code, level in ((int(1.5 * need), 2, "error"), (int(3.5 * need), 0, "warning")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        (line,) = findings(capsys, code, settings)
        assert line.startswith(f"{level}: the disk of {tmp_path}/run has")
        assert "lower checkpoint.keep" in line


@pytest.mark.parametrize("more", [[], ["ema.power=[0.05,0.1]"]], ids=["one average", "three averages"])
def test_the_size_foretold_is_that_of_a_real_checkpoint(healthy: list[str], tmp_path: Path, more: list[str]) -> None:
    settings = [*healthy, "trainer.max_steps=2", "samples.every=0", "unet.widths=[64,128]", *more]
    need = checkpoint_bytes(build(compose(settings)[0])[0])
    assert door(train, settings) == 0
    files = checkpoint.newest(tmp_path / "run").iterdir()
    assert sum(file.stat().st_size for file in files) == pytest.approx(need, rel=0.1)  # headers and scheduler beside it


def test_an_index_made_anew_is_not_stale(healthy: list[str], shapes: Path, tmp_path: Path) -> None:
    shard = tmp_path / "own.tar"
    shutil.copy(shapes / "shapes.tar", shard)
    build_index(shard)
    assert _shards_only([*healthy, f"data.train.paths={shard}", f"data.validation.paths={shard}"]) == []
