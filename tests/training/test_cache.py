"""The cache of ``ldm precompute``: a training reads from it what it would have made, or there is one line why not."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch.utils.data import DataLoader

import ldm
from ldm import checkpoint
from ldm.cli import door, main, train
from ldm.cli.training import doctor
from ldm.data import FixedSet, ShardDataset, TrainingSet, build_index, write_catalogue, write_shard
from ldm.pipeline import LatentDiffusion
from ldm.training import cache as caching
from ldm.training.cache import CachedSet, Encoding
from tests.conftest import tiny_model, tiny_text
from tests.training.test_training import arguments, column, unet

ROOT = Path(ldm.__file__).parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three parts of the 24 shapes."""
    monkeypatch.setattr(caching, "PART", 10)


def encoding(samples: ShardDataset, model: LatentDiffusion, flip: bool = True, height: int = 32) -> Encoding:
    return Encoding(samples, model.autoencoder, model.text_encoder, height, 32, flip)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items()
    )


# --------------------------------------------------------------------------------------- the same as in memory and live


def test_a_folder_gives_what_memory_gives_to_the_bit(shapes: Path, model: LatentDiffusion, tmp_path: Path) -> None:
    made = encoding(ShardDataset(shapes), model)
    assert made.write(tmp_path) == 1
    for items in (TrainingSet(made.samples, 3, 32, 32, flip=True), FixedSet(made.samples, 32, 32)):
        left, right = (CachedSet(items, each) for each in (made.in_memory(), made.open(tmp_path)))
        assert all(same(left[p], right[p]) for p in range(24))


@pytest.mark.usefixtures("small_parts")
def test_every_item_is_that_of_live_encoding(shapes: Path, model: LatentDiffusion, tmp_path: Path) -> None:
    made = encoding(ShardDataset(shapes), model)
    assert made.write(tmp_path) == 3
    live = TrainingSet(made.samples, 3, 32, 32, flip=True)
    cached, seen = CachedSet(live, made.open(tmp_path)), set()
    for position in range(96):
        image, latent = live[position], cached[position]
        assert [image[name] for name in ("key", "position")] == [latent[name] for name in ("key", "position")]
        posterior, context = model.autoencoder.posterior(image["image"][None]), model.text_encoder([image["caption"]])
        # Encoded alone and in batches of 10: the order of a sum, so some last bits.
        torch.testing.assert_close(latent["moments"][0], posterior.mean[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(latent["moments"][1], posterior.std[0], rtol=1e-4, atol=1e-5)
        length = len(latent["context"])  # of its own tokens; the rest is zero
        torch.testing.assert_close(latent["context"], context[0, :length], rtol=1e-4, atol=1e-5)
        assert length < 77
        assert not context[0, length:].any()
        choice = live.choose(position, 2)
        seen.add((choice.variant, choice.flip))
    assert len(seen) == 4  # both captions, both flips


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A text tower and an autoencoder, tiny and random."""
    folder = tmp_path_factory.mktemp("parts")
    checkpoint.save(folder / "text", checkpoint.Contents({"text_encoder": tiny_text("clip")}))
    checkpoint.save(folder / "autoencoder", checkpoint.Contents({"autoencoder": tiny_model().autoencoder}))
    return folder / "text", folder / "autoencoder"


@pytest.mark.parametrize("workers", [0, 2])
def test_training_from_a_folder_has_the_losses_of_memory_to_the_bit_and_of_live(
    shapes: Path, parts: tuple[Path, Path], tmp_path: Path, workers: int
) -> None:
    more = (*unet(*parts), "data.flip=true", "samples.every=0", "caption_dropout=0.3")
    folder, losses, dropped = tmp_path / "cache", {}, {}
    assert main(["precompute", *arguments(shapes, folder, "diffusion", 1, *more)]) == 0
    own = {"memory": "true", "live": "false", "folder": str(folder)}
    for name, cache in own.items():
        run = tmp_path / name
        own = (f"cache={cache}", f"data.num_workers={workers if name == 'folder' else 0}")
        assert door(train, arguments(shapes, run, "diffusion", 20, *more, *own)) == 0
        losses[name], dropped[name] = column(run, "train/loss"), column(run, "train/dropped_captions")
    assert losses["folder"] == losses["memory"]
    # Encoded in a batch of 24 and in batches of 8: measured 9e-8, one rounding of float32, over these 20 steps.
    assert losses["folder"] == pytest.approx(losses["live"], rel=1e-6)
    assert dropped["folder"] == dropped["live"]
    assert max(dropped["folder"]) > 0


def test_windows_of_a_catalogue_give_the_same_samples(shapes: Path, model: LatentDiffusion, tmp_path: Path) -> None:
    whole = ShardDataset(shapes)
    for shard in range(4):
        samples = [whole[n] for n in range(6 * shard, 6 * shard + 6)]
        members = [(s.key, {"png": s.image, "txt": s.caption.encode()}) for s in samples]
        write_shard(tmp_path / f"{shard}.tar", members)
        build_index(tmp_path / f"{shard}.tar")
    write_catalogue(tmp_path)
    made = encoding(ShardDataset(tmp_path), model, flip=False)
    made.write(tmp_path / "cache")
    live = TrainingSet(made.samples, 3, 32, 32, window=2)
    cached = CachedSet(live, made.open(tmp_path / "cache"))
    assert [live[p]["key"] for p in range(48)] == [cached[p]["key"] for p in range(48)]


@pytest.mark.usefixtures("small_parts")
def test_a_sample_that_is_there_several_times_is_encoded_once(
    shapes: Path, model: LatentDiffusion, tmp_path: Path
) -> None:
    chosen = [0, 0, 0, 5, 7, 7, 9, 9, 0, 5, 0, 0, 11]  # ten of them in the first part
    made = encoding(ShardDataset(shapes).subset(chosen), model)
    made.write(tmp_path)
    parts = [safetensors.torch.load_file(path) for path in sorted(tmp_path.iterdir())]
    assert [sum(name.startswith("moments") for name in part) for part in parts] == [2 * 4, 2 * 2]  # each and its mirror
    live = FixedSet(made.samples, 32, 32)
    with torch.no_grad():
        posterior = model.autoencoder.posterior(torch.stack([live[row]["image"] for row in range(len(chosen))]))
    moments = torch.stack([posterior.mean, posterior.std], dim=1)
    for cached in (CachedSet(live, made.in_memory()), CachedSet(live, made.open(tmp_path))):
        assert [cached[row]["key"] for row in range(len(chosen))] == made.samples.keys
        torch.testing.assert_close(torch.stack([cached[row]["moments"] for row in range(len(chosen))]), moments)


def test_workers_and_the_process_itself_read_the_same(shapes: Path, model: LatentDiffusion, tmp_path: Path) -> None:
    made = encoding(ShardDataset(shapes), model)
    made.write(tmp_path)
    cached = CachedSet(TrainingSet(made.samples, 3, 32, 32, flip=True), made.open(tmp_path))
    for one, other in zip(
        *(DataLoader(cached, 8, num_workers=n, collate_fn=caching.collate) for n in (0, 2)), strict=True
    ):
        assert same(one, other)


def test_a_cache_is_mapped_not_read(tmp_path: Path) -> None:
    tensors = {f"moments {i} 0": torch.full((2, 4, 64, 64), float(i)) for i in range(512)}  # 64 MB
    said = json.dumps({"key": {}, "samples": [], "checksums": {}})
    (tmp_path / "part-000000.safetensors").write_bytes(safetensors.torch.save(tensors, {"part": said}))
    del tensors

    def own() -> int:  # KB that are not pages of files
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

    before = own()
    part = caching._open(tmp_path, "{}", 0)
    assert all(float(part.tensor(f"moments {i} 0")[1, 3, 9, 9]) == i for i in range(512))
    assert own() - before < 8 << 10  # all were touched; the names and the allocator's own are left


# ----------------------------------------------------------------------------------------------- many processes, killed


@pytest.mark.usefixtures("small_parts")
def test_ranks_share_the_parts_and_write_what_one_process_writes(
    shapes: Path, model: LatentDiffusion, tmp_path: Path
) -> None:
    made = encoding(ShardDataset(shapes), model)
    assert made.write(tmp_path / "one") == 3
    assert [made.write(tmp_path / "two", rank, 2) for rank in (0, 1)] == [2, 1]
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


_KILLED = """
import sys, time
from pathlib import Path
import torch
from ldm.data import ShardDataset, shards
from ldm.training import cache
from tests.conftest import tiny_model
torch.set_num_threads(1)
cache.PART = 10
replace = shards.os.replace
def slow(old, new):  # long enough to be killed between the writing and the renaming
    if new.name == "part-000001.safetensors":
        time.sleep(600)
    replace(old, new)
shards.os.replace = slow
model = tiny_model()
cache.Encoding(ShardDataset(sys.argv[1]), model.autoencoder, model.text_encoder, 32, 32, True).write(Path(sys.argv[2]))
"""


@pytest.mark.usefixtures("small_parts")
def test_after_kill_9_whole_parts_stay_and_the_others_are_made(
    shapes: Path, model: LatentDiffusion, tmp_path: Path
) -> None:
    folder, environment = tmp_path / "killed", {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", _KILLED, str(shapes), str(folder)], cwd=ROOT, env=environment)
    deadline = time.monotonic() + 120  # seconds; it takes about 10
    while not (folder / "part-000001.safetensors.partial").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    made, first = encoding(ShardDataset(shapes), model), (folder / "part-000000.safetensors").stat()
    with pytest.raises(FileNotFoundError, match=r"2 of 3 parts are missing.*part-000001.*ldm precompute"):
        made.open(folder)
    assert made.write(folder) == 2
    assert (folder / "part-000000.safetensors").stat().st_mtime_ns == first.st_mtime_ns
    made.write(tmp_path / "never")
    assert bytes_of(folder) == bytes_of(tmp_path / "never")


@pytest.mark.slow
def test_devices_are_processes_that_share_the_work(shapes: Path, parts: tuple[Path, Path], tmp_path: Path) -> None:
    own = arguments(shapes, tmp_path / "cache", "diffusion", 1, *unet(*parts), "trainer.devices=2")
    command = [sys.executable, "-m", "ldm.cli", "precompute", *own]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "process 0: 1 parts" in done.stdout
    assert "process 1: 0 parts" in done.stdout


# ------------------------------------------------------------------------------------------- stale, damaged, not there


def change(part: torch.nn.Module) -> None:
    with torch.no_grad():
        next(part.parameters()).view(-1)[0] += 1


@pytest.mark.parametrize("what", ["autoencoder", "text tower", "precision", "size", "flip", "data"])
@pytest.mark.parametrize("by", ["open", "write"])
def test_a_stale_cache_names_what_differs_and_only_that(
    shapes: Path, model: LatentDiffusion, tmp_path: Path, what: str, by: str
) -> None:
    samples, flip, height = ShardDataset(shapes), True, 32
    encoding(samples, model).write(tmp_path / "cache")
    before = bytes_of(tmp_path / "cache")
    if what == "autoencoder":
        change(model.autoencoder.encoder)
    elif what == "text tower":
        change(model.text_encoder)
    elif what == "precision":
        model.text_encoder.to(torch.bfloat16)
    elif what == "size":
        height = 40
    elif what == "flip":
        flip = False
    else:  # one letter of one caption
        members = [(s.key, {"png": s.image, "txt": s.caption.encode()}) for s in (samples[n] for n in range(24))]
        members[5][1]["txt"] += b"s"
        write_shard(tmp_path / "other.tar", members)
        samples = ShardDataset(tmp_path / "other.tar")
    own = encoding(samples, model, flip, height)
    with pytest.raises(ValueError, match=r"was made of something else: .*: ldm precompute") as caught:
        own.open(tmp_path / "cache") if by == "open" else own.write(tmp_path / "cache")
    named = set(re.findall(r"(?:else: |; )([a-z ]+) was ", str(caught.value)))
    # Weights of another type are other weights, too.
    assert named == ({"precision", "text tower"} if what == "precision" else {what})
    assert bytes_of(tmp_path / "cache") == before


def test_a_decoder_and_a_latent_scale_make_no_cache_stale(shapes: Path, model: LatentDiffusion, tmp_path: Path) -> None:
    encoding(ShardDataset(shapes), model).write(tmp_path)
    change(model.autoencoder.decoder)
    model.autoencoder.set_latent_scale(torch.zeros(4), torch.ones(4))
    encoding(ShardDataset(shapes), model).open(tmp_path)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("number", [0, 1])
def test_a_cut_part_is_named_and_made_again(shapes: Path, model: LatentDiffusion, tmp_path: Path, number: int) -> None:
    made, name = encoding(ShardDataset(shapes), model), f"part-{number:06d}.safetensors"
    made.write(tmp_path)
    whole = bytes_of(tmp_path)
    (tmp_path / name).write_bytes(whole[name][:-1])
    with pytest.raises(OSError, match=rf"{name} is missing or damaged.*ldm precompute"):
        list(map(CachedSet(FixedSet(made.samples, 32, 32), made.open(tmp_path)).__getitem__, range(24)))
    assert made.write(tmp_path) == 1
    assert bytes_of(tmp_path) == whole


@pytest.mark.parametrize("column", ["moments 7 0", "context 2"])
def test_one_bit_that_flips_is_named(shapes: Path, model: LatentDiffusion, tmp_path: Path, column: str) -> None:
    made, path = encoding(ShardDataset(shapes), model, flip=False), tmp_path / "part-000000.safetensors"
    made.write(tmp_path)
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    begin = json.loads(content[8 : 8 + length])[column]["data_offsets"][0]
    content[8 + length + begin + 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(OSError, match=rf"part-000000.safetensors is damaged \({column}.*delete it.*ldm precompute"):
        list(map(CachedSet(FixedSet(made.samples, 32, 32), made.open(tmp_path)).__getitem__, range(24)))


@pytest.mark.parametrize("content", [b"", b"not a safetensors file at all", (2**40).to_bytes(8, "little") + b"{}"])
def test_rubbish_in_the_place_of_a_part_is_named(
    shapes: Path, model: LatentDiffusion, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "part-000000.safetensors").write_bytes(content)
    with pytest.raises(OSError, match=r"part-000000.safetensors is missing or damaged"):
        encoding(ShardDataset(shapes), model).open(tmp_path)


def test_tensors_of_another_program_are_no_cache(shapes: Path, model: LatentDiffusion, tmp_path: Path) -> None:
    safetensors.torch.save_file({"weight": torch.zeros(3)}, tmp_path / "part-000000.safetensors")
    with pytest.raises(OSError, match=r"part-000000.safetensors is missing or damaged \('part'\)"):
        encoding(ShardDataset(shapes), model).open(tmp_path)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ([], "the rule is: ldm precompute"),
        (["output={}", "experiment=emoji/autoencoder"], "of a stage two"),
        (["output={}", "resume=nowhere"], "no run there"),
        (["output={}", "data.random_crop=true"], "random_crop=false"),
        (["output={}", "halff=true"], "halff"),
        (["output={}", "a bare word"], "is no setting"),
        (["output={}", "autoencoder.weights=nowhere"], "no model at nowhere"),
        (["output={}", "data.on_bad=maybe"], "choose one of"),
    ],
)
def test_bad_requests_of_precompute_end_with_2_one_line_and_no_file(
    tmp_path: Path, capsys: Any, own: list[str], message: str
) -> None:
    assert main(["precompute", *(each.format(tmp_path / "cache") for each in own)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "cache").exists()


def test_a_training_and_the_doctor_refuse_a_cache_that_is_not_there_or_stale(
    shapes: Path, parts: tuple[Path, Path], tmp_path: Path, capsys: Any
) -> None:
    folder, more = tmp_path / "cache", (*unet(*parts), f"cache={tmp_path / 'cache'}")
    own = arguments(shapes, tmp_path / "run", "diffusion", 1, *more)
    assert door(train, own) == 2
    assert re.search(r"1 of 1 parts are missing in .*cache/train.*ldm precompute", capsys.readouterr().err)
    assert main(["precompute", *arguments(shapes, folder, "diffusion", 1, *more)]) == 0
    for command in (train, doctor):
        assert door(command, [*own, "data.flip=true"]) == 2
        assert "flip was false, now true" in capsys.readouterr().err
    assert door(train, [*own, "validation.images=4"]) == 2
    assert re.search("cache/validation/.*: data was", capsys.readouterr().err)
    shutil.rmtree(folder / "validation")
    assert door(train, own) == 2
    assert "cache/validation" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
