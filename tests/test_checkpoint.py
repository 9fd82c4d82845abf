from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import ldm
from ldm import checkpoint
from ldm.pipeline import LatentDiffusion
from tests.conftest import tiny_model


@pytest.fixture
def saved(model: LatentDiffusion, tmp_path: Path) -> Path:
    model.save(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("family", ["clip", "minilm"])
def test_a_model_that_was_saved_and_loaded_draws_the_same_bits(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, "v")
    model.save(tmp_path / "model")
    again = ldm.load(tmp_path / "model")
    assert torch.equal(model.sample("a red square", steps=3).images, again.sample("a red square", steps=3).images)
    assert again.defaults == model.defaults
    assert again.prediction == "v"


def test_half_precision_on_disk_becomes_float32_on_a_cpu(model: LatentDiffusion, tmp_path: Path) -> None:
    model.to(dtype=torch.float16).save(tmp_path / "half")
    assert ldm.load(tmp_path / "half", device="cpu").dtype == torch.float32


def test_loading_an_autoencoder_alone(saved: Path, model: LatentDiffusion) -> None:
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(ldm.load_autoencoder(saved).encode(x), model.autoencoder.encode(x))


@pytest.mark.parametrize("file", ["unet.safetensors", "text_encoder.tokenizer.json", "tensors.safetensors"])
def test_one_flipped_bit_is_named(saved: Path, file: str) -> None:
    data = bytearray((saved / file).read_bytes())
    data[len(data) // 2] ^= 1
    (saved / file).write_bytes(data)
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        ldm.load(saved)


def test_a_cut_or_missing_file_is_named(saved: Path) -> None:
    whole = (saved / "unet.safetensors").read_bytes()
    (saved / "unet.safetensors").write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"unet.safetensors is damaged \(its size"):
        ldm.load(saved)
    (saved / "unet.safetensors").unlink()
    with pytest.raises(ValueError, match="is missing"):
        ldm.load(saved)


def test_weights_of_another_shape_are_listed_and_refused(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["components"]["unet"]["arguments"]["widths"] = [32, 96]
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"does not fit: .* is \(64") as caught:
        ldm.load(saved)
    assert "\n" not in str(caught.value)


def test_an_unknown_class_or_format_is_refused_and_nothing_is_imported(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["components"]["unet"]["class"] = "os.system"
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"class 'os.system' .* unknown"):
        ldm.load(saved)
    (saved / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        ldm.load(saved)
    (saved / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        ldm.load(saved)


def test_nothing_there_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model at"):
        ldm.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no manifest.json"):
        ldm.load(tmp_path)
    with pytest.raises(ValueError, match="choose ema or raw"):
        ldm.load("emoji", weights="best")


def test_tensors_that_are_not_finite_are_never_written(model: LatentDiffusion, tmp_path: Path) -> None:
    model.save(tmp_path / "model")
    next(model.unet.parameters()).data.fill_(math.inf)
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.save(tmp_path / "model")
    assert ldm.load(tmp_path / "model").sample("a red square", steps=1).images.isfinite().all()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_damaged_newest_checkpoint_is_passed_over(model: LatentDiffusion, tmp_path: Path) -> None:
    for step in (1, 2):
        model.save(tmp_path / "checkpoints" / f"step-{step:08d}")
    assert checkpoint.newest(tmp_path).name == "step-00000002"
    (tmp_path / "checkpoints/step-00000002/unet.safetensors").write_bytes(b"")
    assert checkpoint.newest(tmp_path).name == "step-00000001"
    (tmp_path / "checkpoints/step-00000001/manifest.json").unlink()
    with pytest.raises(ValueError, match=r"step-00000002/unet.safetensors is damaged"):
        checkpoint.newest(tmp_path)


def test_frozen_parts_are_linked_not_copied_between_checkpoints(model: LatentDiffusion, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a", model.contents())
    checkpoint.save(tmp_path / "b", model.contents(), share=tmp_path / "a")
    assert (tmp_path / "a/unet.safetensors").stat().st_ino == (tmp_path / "b/unet.safetensors").stat().st_ino
    checkpoint.verify(tmp_path / "b")
