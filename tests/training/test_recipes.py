"""The recipes of stage two reach the training from one line, learn, and are kept in what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import ldm
from ldm import checkpoint
from ldm.autoencoder import Autoencoder
from ldm.cli import door, sample, train
from ldm.cli.building import build
from ldm.cli.training import compose
from ldm.data import FixedSet, ShardDataset
from ldm.diffusion import Flow, Objective
from tests.conftest import tiny_text
from tests.training.test_training import arguments, column, unet, weights

SMALL = ["data=emoji48", "cache=false", "unet.widths=[32,64]", "unet.attention=[false,true]", "unet.num_heads=2"]


@pytest.fixture(scope="module")
def small(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a training of 16 steps on a random autoencoder with the latent scale of the shapes."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    autoencoder, items = Autoencoder(widths=(32, 64), num_blocks=1, stem=4), FixedSet(ShardDataset(shapes), 32, 32)
    with torch.no_grad():
        autoencoder.to_moments.weight[4:], autoencoder.to_moments.bias[4:] = 0.0, -12.0  # a narrow posterior
        mean = autoencoder.posterior(torch.stack([items[i]["image"] for i in range(24)])).mean
    autoencoder.set_latent_scale(mean.mean((0, 2, 3)), mean.std((0, 2, 3)))
    checkpoint.save(folder / "autoencoder", checkpoint.Contents({"autoencoder": autoencoder}))
    checkpoint.save(folder / "text", checkpoint.Contents({"text_encoder": tiny_text("clip")}))
    own = [*unet(folder / "text", folder / "autoencoder"), "samples.every=0", "validation.every=8"]
    return arguments(shapes, Path("-"), "diffusion", 16, *own, "checkpoint.every=8")


def run(small: list[str], output: Path, *more: str) -> Path:
    assert door(train, [*small, f"output={output}", *more]) == 0
    return output


def test_every_recipe_of_the_loss_reaches_the_training() -> None:
    more = ["loss.min_snr=5", "loss.timesteps=logit_normal", "loss.logit_mean=0.5", "loss.logit_std=0.7",
            "loss.offset_noise=0.1", "loss.input_perturbation=0.2", "loss.immiscible=4"]  # fmt: skip
    module, _, _ = build(compose([*SMALL, *more])[0])
    assert module.objective == Objective(5, "logit_normal", 0.5, 0.7, 0.1, 0.2, 4)


def test_eps_is_short_for_epsilon() -> None:
    module, _, _ = build(compose([*SMALL, "diffusion.prediction=eps"])[0])
    assert module.model.prediction == "epsilon"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["loss=gaussian"], "stage=diffusion with a loss of the other stage, ldm.autoencoder.CalibratedLoss"),
        (["experiment=emoji/autoencoder", "loss=diffusion"], "choose loss=gaussian or loss=laplace"),
        (["experiment=emoji/autoencoder", "lora.rank=4"], "lora.rank is not for stage=autoencoder"),
        (["experiment=emoji/autoencoder", "ema.power=[0.05,0.1]"], "ema.power is not for stage=autoencoder"),
        (["experiment=emoji/autoencoder", "repa=0.5"], "repa is not for stage=autoencoder"),
        (["perceptual=features"], "perceptual is not for stage=diffusion"),
        (["adversarial=patch"], "adversarial is not for stage=diffusion"),
        (["decoder_only=true"], "decoder_only is not for stage=diffusion"),
        (["latent_noise=0.2"], "latent_noise is not for stage=diffusion"),
        (["trainer.max_steps=abc"], "trainer.max_steps=abc must be a number"),
        (["trainer.max_steps=null"], "trainer.max_steps=None: the rule is a whole number, at least 1"),
        (["trainer.accumulate_grad_batches=0.5"], "batches=0.5: the rule is a whole number, at least 1"),
        (["data.batch_size=0"], "data.batch_size=0: the rule is a whole number, at least 1"),
        (["data.num_workers=-1"], "data.num_workers=-1: the rule is a whole number, at least 0"),
        (["data.width=12"], "data.width=12: the rule is a whole number, at least 8, and a multiple of 8"),
        (["experiment=emoji/autoencoder", "latent_noise=-1"], "latent_noise=-1 must be a number from 0 to 10"),
        (["experiment=emoji/autoencoder", "latent_noise=nan"], "latent_noise=nan must be a number from 0 to 10"),
    ],
)
def test_a_setting_of_the_other_stage_or_out_of_range_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: Any
) -> None:
    assert door(train, [*arguments, f"output={tmp_path / 'run'}"]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------------------- flow


def test_flow_matching_learns_is_kept_and_drawn_from(small: list[str], tmp_path: Path) -> None:
    trained = run(small, tmp_path / "run", "diffusion=flow")
    curve = column(trained, "val/mse")
    # Velocity ε - z of unit variances: 2.0 is what predicting nothing scores; measured 1.74 at step 8, 1.66 at 16.
    assert curve[-1] < 1.75
    assert curve[-1] < curve[0] - 0.03
    model = ldm.load(trained)
    assert isinstance(model.schedule, Flow)
    assert model.prediction == "flow"
    drawn = model.sample("a red square", steps=4).latents
    model.save(tmp_path / "copy")
    assert torch.equal(ldm.load(tmp_path / "copy").sample("a red square", steps=4).latents, drawn)
    for name in ("ddpm", "unipc", "auto"):
        pictures = tmp_path / name
        assert (
            door(sample, [f"model={trained}", "a red square", "steps=4", f"sampler={name}", f"output={pictures}"]) == 0
        )
        assert list(pictures.glob("*.png"))
    with pytest.raises(ValueError, match="trained by flow matching"):
        model.export_diffusers(tmp_path / "theirs")


# ----------------------------------------------------------------------------------------------------- other averages


def test_averages_of_other_lengths_are_had_after_training_and_survive_a_resume(
    small: list[str], tmp_path: Path
) -> None:
    power = ["ema.power=[0.05,0.1]", "checkpoint.every=2", "validation.every=100", "optimizer.decay=constant"]
    whole = run(small, tmp_path / "whole", *power, "trainer.max_steps=6")
    halves = run(small, tmp_path / "halves", *power, "trainer.max_steps=4")
    assert door(train, [f"resume={halves}", "trainer.max_steps=6"]) == 0
    names = sorted(path.name for path in (whole / "averages").iterdir())
    assert names[0] == "step-00000002-0.050.safetensors"
    assert len(names) == 6
    for name in names:
        assert (halves / "averages" / name).read_bytes() == (whole / "averages" / name).read_bytes()
    usual, kept, other = (ldm.load(whole, weights=w) for w in ("ema", "ema:0.05", "ema:0.07"))
    saved = safetensors.torch.load_file(whole / "averages/step-00000006-0.050.safetensors")
    for name, value in kept.unet.state_dict().items():
        torch.testing.assert_close(value, saved[name].float(), rtol=0, atol=1e-6)  # its weight is 1 to rounding
    assert len({usual.name, kept.name, other.name}) == 3
    assert not torch.equal(other.unet.conv_out.weight, kept.unet.conv_out.weight)
    with pytest.raises(ValueError, match="of a UNet alone"):
        ldm.load_autoencoder(whole, weights="ema:0.07")
    for wrong, said in (("ema:0.3", "0 < sigma_rel <"), ("ema:long", "the rule is ema, raw"), ("raw:1", "ema or raw")):
        with pytest.raises(ValueError, match=said):
            ldm.load(whole, weights=wrong)


# --------------------------------------------------------------------------------------------------------------- LoRA


def test_a_lora_is_trained_resumed_and_opens_as_a_whole_model(small: list[str], tmp_path: Path, capsys: Any) -> None:
    base = run(small, tmp_path / "base", "trainer.max_steps=4", "optimizer.decay=constant")
    lora = ["lora.rank=2", f"init={base}", "checkpoint.every=3", "validation.every=100", "optimizer.decay=constant"]
    whole = run(small, tmp_path / "whole", *lora, "trainer.max_steps=6")
    halves = run(small, tmp_path / "halves", *lora, "trainer.max_steps=3")
    assert door(train, [f"resume={halves}", "trainer.max_steps=6"]) == 0
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(halves)[name], tensor), name
    start = ldm.load(base).unet.state_dict()
    for kind in ("ema", "raw"):
        model = ldm.load(whole, weights=kind)
        assert model.sample("a red square", steps=2).images.isfinite().all()
        differ = {name for name, value in model.unet.state_dict().items() if not torch.equal(value, start[name])}
        assert differ == {
            f"{name}.weight"
            for name, m in model.unet.named_modules()
            if name.endswith((".to_q", ".to_k", ".to_v", ".to_out")) and isinstance(m, torch.nn.Linear)
        }
        # The whole model's change is of the rank asked for.
        name = "middle_blocks.1.cross_attention.to_v.weight"
        assert torch.linalg.matrix_rank((model.unet.state_dict()[name] - start[name]).double(), rtol=1e-3) == 2
    # The file for diffusers holds the averaged factors: what they make is what the averaged model has more.
    file = safetensors.torch.load_file(whole / "pytorch_lora_weights.safetensors")
    part = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.lora"
    made = file[f"{part}.up.weight"] @ file[f"{part}.down.weight"]
    delta = ldm.load(whole).unet.state_dict()[name] - start[name]
    torch.testing.assert_close(made, delta, rtol=0, atol=1e-6)
    assert door(train, [*small, "lora.rank=2", f"output={tmp_path / 'none'}"]) == 2
    assert "lora.rank adapts the weights of init=MODEL" in capsys.readouterr().err


def test_weights_that_predict_something_else_are_said_to(small: list[str], tmp_path: Path, capsys: Any) -> None:
    base = run(small, tmp_path / "base", "trainer.max_steps=1")
    capsys.readouterr()
    for name, more, noted in (("same", [], False), ("other", ["diffusion=flow"], True)):
        run(small, tmp_path / name, f"init={base}", *more, "trainer.max_steps=1")
        assert ("predicts v on the path linear, here flow on flow" in capsys.readouterr().err) == noted


# --------------------------------------------------------------------------------------------------------------- REPA


def test_alignment_is_trained_along_and_is_no_part_of_the_model(small: list[str], tmp_path: Path, capsys: Any) -> None:
    more = ["repa=0.5", "cache=false", "optimizer.decay=constant", "validation.every=100"]
    whole = run(small, tmp_path / "whole", *more, "trainer.max_steps=20")
    curve = column(whole, "train/alignment")
    # λ (1 - cos): 0.5 is what unrelated directions score; measured 0.085 at step 10, 0.077 at step 20.
    assert curve[-1] < curve[0] < 0.2
    assert not [name for name in weights(whole) if "head" in name]
    halves = run(small, tmp_path / "halves", *more, "trainer.max_steps=10")
    assert door(train, [f"resume={halves}", "trainer.max_steps=20"]) == 0
    assert all(torch.equal(weights(halves)[name], value) for name, value in weights(whole).items())
    assert door(train, [*small, "repa=0.5", f"output={tmp_path / 'none'}"]) == 2
    assert "repa=0.5 needs images" in capsys.readouterr().err
